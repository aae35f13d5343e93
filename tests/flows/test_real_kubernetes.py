"""A real Kubernetes, where there is one: what tests/flows/stub_kubernetes.py stands for is so.

``EQM_TEST_KUBERNETES_IMAGE=... pytest -m slow tests/flows/test_real_kubernetes.py``;
real_kubernetes.py says what it needs.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from real_kubernetes import Flow, RealKubernetes, changed, missing
from waiting import wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

SETTINGS = {
    "source.image_size_px": 8,
    "autoencoder.kind": "identity",
    "encode.shard_images": 600,
    "train.batch_size": 32,
    "train.ema_half_life_images": 160.0,
}
SHORT, LONG = 640, 64_000
"""Images of a training: over before one looks, or there when something is done to it."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RealKubernetes]:
    with RealKubernetes() as started:
        yield started


Starts = Callable[..., Flow]


@pytest.fixture
def start(cluster: RealKubernetes) -> Iterator[Starts]:
    """Starts ``eqm train`` in the flows' pod; what is left of it goes with the test."""
    flows: list[Flow] = []

    def begin(
        seed: int, images: int = SHORT, changes: Any = None, *, processes: int = 1, **told: str
    ) -> Flow:
        more = {"train.seed": seed, "train.images": images, "processes": processes}
        command = ("train", "tiny", *changed({**SETTINGS, **more, **(changes or {})}))
        flows.append(Flow(cluster, *command, environment=told))
        return flows[-1]

    yield begin
    for flow in flows:
        if flow.process.poll() is None:
            flow.tell("KILL")
            flow.process.wait()
    cluster.ask("delete", "trainjobs", "--all", "--cascade=foreground", "--wait=true")


def left(cluster: RealKubernetes) -> list[str]:
    """What TrainJobs have left behind."""
    kinds = ("trainjobs", "jobsets", "jobs", "pods", "configmaps")
    names = [item["metadata"]["name"] for kind in kinds for item in cluster.listed(kind)]
    stay = ("eqm-", "kube-root-ca.crt")
    return [name for name in names if not name.startswith(stay)]


def is_training(cluster: RealKubernetes, name: str) -> Callable[[], bool]:
    def so() -> bool:
        pods = cluster.pods(name)
        logs = [cluster.ask("logs", pod["metadata"]["name"]) for pod in pods if is_running(pod)]
        return bool(logs) and any("images/s" in text or "/s," in text for text in logs)

    return so


def training(cluster: RealKubernetes, start: Starts, seed: int) -> tuple[Flow, str]:
    """A flow whose training is under way, and the name of its TrainJob."""
    flow = start(seed, LONG)
    name = flow.train_job()
    wait_for(is_training(cluster, name))
    return flow, name


def another(cluster: RealKubernetes, name: str, before: dict[str, Any]) -> Callable[[], bool]:
    """Whether a TrainJob has another pod by now."""
    uid = before["metadata"]["uid"]
    return lambda: any(pod["metadata"]["uid"] != uid for pod in cluster.pods(name))


def is_running(pod: dict[str, Any]) -> bool:
    return pod["status"].get("phase") == "Running"


# -- to the sealed record -----------------------------------------------------------------------


def test_a_training_ends_in_its_record_and_leaves_nothing(
    cluster: RealKubernetes, start: Starts
) -> None:
    flow = start(1)
    assert flow.end() == 0, flow.text
    assert flow.sealed()
    # The collector comes by after the last TrainJob has gone.
    wait_for(lambda: not left(cluster))


def test_two_nodes_train_together(cluster: RealKubernetes, start: Starts) -> None:
    flow = start(2, LONG, processes=2, EQM_NODE_PROCESSES="1")
    name = flow.train_job()
    wait_for(lambda: [is_running(pod) for pod in cluster.pods(name)] == [True, True])
    assert flow.end() == 0, flow.text
    assert flow.sealed()


# -- what happens to pods -----------------------------------------------------------------------


def test_a_pod_that_is_evicted_begins_again_and_ends_in_the_same_bits(
    cluster: RealKubernetes, start: Starts
) -> None:
    disturbed, name = training(cluster, start, 3)
    [pod] = cluster.pods(name)
    place = f"/api/v1/namespaces/{cluster.namespace}/pods/{pod['metadata']['name']}"
    versions = cluster.ask("api-versions", where=False).split()
    body = {
        "apiVersion": "policy/v1" if "policy/v1" in versions else "policy/v1beta1",
        "kind": "Eviction",
        "metadata": {"name": pod["metadata"]["name"], "namespace": cluster.namespace},
    }
    cluster.ask("create", "--raw", f"{place}/eviction", "--filename=-", given=json.dumps(body))
    wait_for(another(cluster, name, pod))
    assert disturbed.end() == 0, disturbed.text
    undisturbed = start(3, LONG, EQM_STORE="s3://eqm/undisturbed")
    assert undisturbed.end() == 0, undisturbed.text
    assert disturbed.sealed() == undisturbed.sealed()


def test_a_container_that_is_killed_begins_again(cluster: RealKubernetes, start: Starts) -> None:
    flow, name = training(cluster, start, 4)
    [pod] = cluster.pods(name)
    # Its first process is torchrun; what has no handler for it in a container hears no KILL.
    kill = "import os, signal; [os.kill(int(n), signal.SIGKILL) for n in os.listdir('/proc')"
    kill += " if n.isdigit() and int(n) not in (1, os.getpid())]"
    cluster.ask("exec", pod["metadata"]["name"], "--", "python", "-c", kill)
    wait_for(another(cluster, name, pod))
    assert flow.end() == 0, flow.text
    assert flow.sealed()


def test_memory_that_is_used_up_is_told(start: Starts) -> None:
    batch = {"train.batch_size": 400_000}
    flow = start(5, 800_000, batch, EQM_PROCESS_MEMORY="1")
    assert flow.end() not in (0, 130)
    assert (
        "OOMKilled (it needed more memory than it may have: raise EQM_PROCESS_MEMORY)" in flow.text
    )


# -- what keeps pods from running ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"EQM_PROCESS_CPUS": "9999"}, ("Unschedulable", "Insufficient cpu")),
        ({"EQM_KUBERNETES_IMAGE": "eqm.invalid/eqm:none"}, ("none", "Pull")),
        ({"EQM_KUBERNETES_SECRET": "other"}, ("CreateContainerConfigError", 'secret "other"')),
    ],
    ids=["no node", "no image", "no secret"],
)
def test_what_keeps_pods_from_running_is_said(
    cluster: RealKubernetes, start: Starts, environment: dict[str, str], words: tuple[str, ...]
) -> None:
    first = start(1)
    assert first.end() == 0, first.text
    flow = start(7, **environment)
    flow.until(*words)
    flow.tell("INT")
    assert flow.end() == 130, flow.text
    wait_for(lambda: not left(cluster))


def test_a_quota_is_said(cluster: RealKubernetes, start: Starts) -> None:
    first = start(1)
    assert first.end() == 0, first.text
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "eqm-few"}}
    cluster.applied(quota | {"spec": {"hard": {"pods": "2"}}})
    try:
        flow = start(8)
        flow.until("FailedCreate", "exceeded quota: eqm-few")
        cluster.ask("delete", "resourcequota", "eqm-few")
        assert flow.end() == 0, flow.text
    finally:
        cluster.ask("delete", "resourcequota", "eqm-few", "--ignore-not-found")


# -- what happens to flows ----------------------------------------------------------------------


def test_an_interrupt_deletes_the_train_job_after_a_checkpoint(
    cluster: RealKubernetes, start: Starts
) -> None:
    flow, name = training(cluster, start, 9)
    flow.tell("INT")
    assert flow.end() == 130, flow.text
    assert not cluster.pods(name)
    again, name = training(cluster, start, 9)
    [pod] = cluster.pods(name)
    assert "goes on from image" in cluster.ask("logs", pod["metadata"]["name"])
    assert again.end() == 0, again.text


def test_a_flow_that_is_killed_leaves_its_train_job_to_the_next(
    cluster: RealKubernetes, start: Starts
) -> None:
    first, name = training(cluster, start, 10)
    first.tell("KILL")
    first.end()
    [before] = cluster.pods(name)
    second = start(10, LONG)
    second.until(name, "is a TrainJob", "already")
    [now] = cluster.pods(name)
    assert now["metadata"]["uid"] == before["metadata"]["uid"]
    assert second.end() == 0, second.text


# -- what is told -------------------------------------------------------------------------------


def test_the_last_words_of_the_program_are_the_message(start: Starts) -> None:
    flow = start(11, changes={"train.learning_rate": 1e30})
    assert flow.end() not in (0, 130)
    assert "diverged" in flow.text


def test_missing_rights_are_told_with_what_gives_them(
    cluster: RealKubernetes, start: Starts
) -> None:
    cluster.ask("delete", "rolebinding", "eqm-flows")
    try:
        flow = start(12)
        assert flow.end() not in (0, 130)
        assert "403" in flow.text
        assert "infra/k8s/base/access.yaml" in flow.text
    finally:
        cluster.ask("apply", "--filename", "infra/k8s/base/access.yaml")
