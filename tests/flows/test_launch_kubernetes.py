"""TrainJobs on an API server whose pods really run: a stage trains to its sealed record."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chain
import pytest
import stub_kubernetes
from stub_kubernetes import CORE, TRAIN_JOBS, Cluster, Server
from waiting import UPDATES, wait_for, when

from eqm.config import Job, replace
from eqm.errors import AwayError, ConfigError, StageError
from eqm.records import Record
from eqm.stage import AWAY, job_digest
from eqm.storage import LocalStore
from flows import launch_kubernetes
from flows.clusters import Kubernetes, Nodes
from flows.jobs import Plan, ensure
from flows.launch import cluster_name, is_sealed
from flows.launch_kubernetes import KubernetesLauncher
from flows.settings import Settings

pytestmark = pytest.mark.timeout(180)

PROJECT = Path(__file__).parents[2]
SECRETS = {"AWS_ACCESS_KEY_ID": "who", "AWS_SECRET_ACCESS_KEY": "a-secret"}


@dataclass
class Place:
    """A cluster, a store with latents, and a launcher."""

    cluster: Cluster
    store: LocalStore
    launcher: KubernetesLauncher
    job: Job
    said: list[str] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    @property
    def name(self) -> str:
        return cluster_name(self.job)

    def when(self, true: Callable[[], Any], then: Callable[[], Any]) -> None:
        """Do something beside the launcher as soon as something is true."""

        self.threads.append(when(true, then))

    def has_checkpoint(self) -> bool:
        keys = self.store.list(f"train/{job_digest(self.job)}/checkpoints/")
        return any(key.endswith(".json") for key in keys)

    def suspended(self, beside: ThreadPoolExecutor) -> Future[None]:
        """A launcher in another thread, whose TrainJob waits for its turn."""
        self.cluster.suspended.set()
        running = beside.submit(self.launcher.run, self.job)
        wait_for(lambda: self.created() == 1)
        return running

    def created(self) -> int:
        return self.cluster.requests.count(f"POST {TRAIN_JOBS}")

    def record(self) -> Record:
        found = self.store.record("train", job_digest(self.job))
        assert found is not None
        return found


@pytest.fixture
def place(latents: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(launch_kubernetes, "POLL_SECONDS", 0.1)
    image = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT)}
    cluster = Cluster(tmp_path / "cluster", image)
    cluster.secrets["eqm-s3"] = SECRETS
    store = chain.copied(latents, tmp_path / "store", without=())
    job = chain.job(latents.config, store, "train", latents.records, checkpoint_every_images=64)
    (tmp_path / "token").write_text(stub_kubernetes.TOKEN + "\n")
    said: list[str] = []
    with Server(cluster) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        told = Kubernetes(
            nodes=Nodes(processes=1, gpus=0),
            api=server.address,
            namespace="research",
            token_file=tmp_path / "token",
            image="registry.example/eqm:1.0",
            secret="eqm-s3",
        )
        environment = {**SECRETS, "AWS_DEFAULT_REGION": "here", "LOCAL_ONLY": "stays"}
        launcher = KubernetesLauncher(told, environment=environment, say=said.append)
        here = Place(cluster, store, launcher, job, said)
        try:
            yield here
        finally:
            cluster.close()
            server.shutdown()
            for thread in here.threads:
                thread.join()


def event(
    name: str, reason: str, message: str, when: str = "2026-01-01T00:00:07Z"
) -> dict[str, Any]:
    """A warning about an object, as controllers write it."""
    return {
        "involvedObject": {"name": name},
        "type": "Warning",
        "reason": reason,
        "message": message,
        "lastTimestamp": when,
    }


# -- to the sealed record -----------------------------------------------------------------------


def test_a_train_job_waits_is_evicted_and_ends_in_the_same_bits(
    place: Place, expected: Record
) -> None:
    place.cluster.suspended.set()
    place.when(lambda: any("suspended" in s for s in place.said), place.cluster.suspended.clear)
    place.when(place.has_checkpoint, place.cluster.evict)
    settings = Settings(home=place.cluster.folder, store=place.store.uri)
    plan = Plan(chain.tiniest(UPDATES), settings, place.store, place.launcher)
    record = ensure(plan, place.job, say=lambda _: None)
    assert place.cluster.starts == 2
    assert record.content == expected.content
    assert place.said[1] == f"{place.name}: suspended: waiting for its turn"
    assert f"{place.name}: running" in place.said
    # Its pods had the credentials, which no body held, and nothing else of this machine.
    [first, again] = place.cluster.environs
    assert SECRETS.items() <= first.items()
    assert again["AWS_DEFAULT_REGION"] == "here"
    assert "LOCAL_ONLY" not in first
    # It is gone, and what it owned; the same flow again starts nothing.
    wait_for(lambda: place.cluster.objects == {})
    assert ensure(plan, place.job, say=lambda _: None) == record
    assert place.created() == 1


@pytest.mark.slow
def test_two_nodes_train_together(place: Place) -> None:
    place.launcher.run(place.job, processes=2)
    assert place.record().provenance["world_size"] == 2
    assert [e["PET_NODE_RANK"] for e in place.cluster.environs] == ["0", "1"]


@pytest.mark.slow
def test_a_train_job_that_is_there_is_waited_for(place: Place) -> None:
    with ThreadPoolExecutor() as beside:
        first = place.suspended(beside)
        second = beside.submit(place.launcher.run, place.job)
        wait_for(lambda: any("already, waiting" in line for line in place.said))
        place.cluster.suspended.clear()
        first.result(120)
        second.result(120)
    assert place.cluster.starts == 1
    assert is_sealed(place.job)


@pytest.mark.slow
def test_a_train_job_that_a_killed_flow_left_without_its_file_gets_it(place: Place) -> None:
    def upgrade() -> None:
        place.cluster.away = True
        time.sleep(1)
        place.cluster.away = False

    place.launcher.api.call("POST", TRAIN_JOBS, place.launcher.train_job(place.job, 1))
    # And a server that does not answer for a while is waited for.
    place.when(lambda: place.cluster.starts, upgrade)
    place.launcher.run(place.job)
    assert place.cluster.starts == 1
    assert is_sealed(place.job)


def test_what_keeps_pods_from_running_is_said_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_kubernetes, "QUIET_SECONDS", 0.2)
    quota = 'pods "it" is forbidden: exceeded quota: gpus, requested: 8, used: 8, limited: 8'
    place.cluster.events = [
        event(f"{place.name}-node-0", "FailedCreate", f"Error creating: {quota}"),
        event(f"{place.name}-node-0", "FailedCreate", "of an earlier job", "2025-12-31T00:00:00Z"),
        event("somebody-elses", "FailedCreate", "of another job"),
    ]
    place.cluster.full.set()
    looks = f"GET {CORE}/events"
    place.when(lambda: place.cluster.requests.count(looks) > 8, place.cluster.full.clear)
    place.launcher.run(place.job)
    why = [line for line in place.said if "FailedCreate" in line]
    assert why == [
        f"{place.name}: waiting for its pods: FailedCreate (Error creating: {quota})",
    ]
    assert is_sealed(place.job)


def test_pods_are_waited_for_where_events_may_not_be_seen(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_kubernetes, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(place.launcher, "_start", lambda *_: None)
    place.cluster.blind = True
    message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    placed = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    place.cluster.messages = [
        {
            "metadata": {"name": f"{place.name}-node-0-0-abcde"},
            "status": {"conditions": [{**placed, "message": message}]},
        }
    ]
    path = f"{TRAIN_JOBS}/{place.name}"
    place.cluster.objects[path] = {"metadata": {}, "status": {}}
    place.when(
        lambda: place.cluster.requests.count(f"GET {CORE}/pods") > 2,
        lambda: place.cluster.objects.pop(path),
    )
    with pytest.raises(StageError, match="was deleted by somebody"):
        place.launcher.run(place.job)
    [line] = [line for line in place.said if "Unschedulable" in line]
    assert line == f"{place.name}: waiting for its pods: Unschedulable ({message})"


# -- failure and cancellation, in words ---------------------------------------------------------


def test_the_last_words_of_the_program_are_the_message(place: Place) -> None:
    place.cluster.restarts = 0
    (place.store.root / "latents").rename(place.store.root / "elsewhere")
    for number in (1, 2):
        with pytest.raises(StageError, match=rf"^{place.name}: latents .* is not sealed in .*: ru"):
            place.launcher.run(place.job)
        # It is kept for a look at its logs, and the next start replaces it.
        assert f"{TRAIN_JOBS}/{place.name}" in place.cluster.objects
        assert place.cluster.starts == number


def test_a_program_whose_store_was_away_may_be_tried_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.cluster.messages = [
        {"status": {"containerStatuses": [stub_kubernetes.terminated(2, f"S3 is gone{AWAY}\n")]}}
    ]
    monkeypatch.setattr(place.launcher, "_start", lambda *_: None)
    monkeypatch.setattr(place.launcher, "_watch", lambda *_: "failed")
    with pytest.raises(AwayError, match=rf"^{place.name}: S3 is gone"):
        place.launcher.run(place.job)


def test_a_failure_without_words_is_told(place: Place) -> None:
    place.cluster.restarts = 0
    place.when(
        lambda: place.cluster.pods,
        lambda: [place.cluster.tell(name, signal.SIGKILL) for name in place.cluster.pods],
    )
    told = r"failed \(ReachedMaxRestarts: .*a pod was OOMKilled \(.*`kubectl logs --namesp"
    with pytest.raises(StageError, match=told):
        place.launcher.run(place.job)


def test_a_train_job_that_somebody_deletes_is_told(place: Place) -> None:
    path = f"{TRAIN_JOBS}/{place.name}"
    policy = {"propagationPolicy": "Foreground"}
    place.when(lambda: place.cluster.pods, lambda: place.launcher.api.call("DELETE", path, policy))
    with pytest.raises(StageError, match="was deleted by somebody: run it again to go on"):
        place.launcher.run(place.job)


def test_an_interrupt_deletes_the_train_job_and_sees_its_pods_go(place: Place) -> None:
    place.when(place.has_checkpoint, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        place.launcher.run(place.job)
    assert f"{TRAIN_JOBS}/{place.name}" not in place.cluster.objects
    wait_for(lambda: place.cluster.objects == {})
    assert all(pod.poll() is not None for pods in place.cluster.pods.values() for pod in pods)
    assert not is_sealed(place.job)


@pytest.mark.slow
def test_a_server_that_dies_while_it_answers_is_asked_again(place: Place) -> None:
    place.cluster.dying = 2
    place.launcher.run(place.job)
    assert is_sealed(place.job)


@pytest.mark.slow
def test_a_train_job_that_is_being_deleted_is_waited_out(place: Place) -> None:
    with ThreadPoolExecutor() as beside:
        # A flow that was cancelled, and killed before it had seen the pods go.
        first = place.suspended(beside)
        path = f"{TRAIN_JOBS}/{place.name}"
        place.cluster.lingers = 1.0
        place.launcher.api.call("DELETE", path, {"propagationPolicy": "Foreground"})
        place.cluster.suspended.clear()
        place.launcher.run(place.job)
        with contextlib.suppress(StageError):
            first.result(120)
    assert is_sealed(place.job)


@pytest.mark.slow
def test_a_flow_that_is_moved_leaves_its_train_job_to_the_next(place: Place) -> None:
    place.launcher.leaves = lambda error: isinstance(error, KeyboardInterrupt)
    place.when(place.has_checkpoint, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        place.launcher.run(place.job)
    assert f"{TRAIN_JOBS}/{place.name}" in place.cluster.objects
    assert place.said[-1].startswith(f"{place.name}: goes on without this flow; the same flow, st")
    place.launcher.run(place.job)
    assert (place.created(), place.cluster.starts) == (2, 1)
    assert is_sealed(place.job)


def test_what_the_server_refuses_is_told(place: Place) -> None:
    place.launcher.cluster.token_file.write_text("an old one")
    with pytest.raises(StageError, match=r"401 Unauthorized; the token of .*/token is not accept"):
        place.launcher.run(place.job)
    place.launcher.cluster.token_file.unlink()
    with pytest.raises(ConfigError, match=r"EQM_KUBERNETES_TOKEN_FILE .* cannot be read: No such"):
        place.launcher.run(place.job)
    assert place.cluster.starts == 0


# -- bodies -------------------------------------------------------------------------------------


def test_the_body_asks_for_what_the_settings_say(place: Place) -> None:
    nodes = Nodes(processes=8, gpus=1, cpus=12, memory_gib=64)
    cluster = replace(place.launcher.cluster, nodes=nodes, queue="night")
    launcher = KubernetesLauncher(cluster, environment=SECRETS, say=place.said.append)
    body = launcher.train_job(place.job, 16)
    stub_kubernetes.checked(stub_kubernetes.models.TrainerV1alpha1TrainJob, body)
    trainer = body["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    asked = {"nvidia.com/gpu": "8", "cpu": "96", "memory": "512Gi"}
    assert trainer["resourcesPerNode"] == {"limits": asked, "requests": asked}
    few = replace(cluster, nodes=Nodes(processes=8, gpus=0, memory_gib=2))
    body = KubernetesLauncher(few, environment={}, say=place.said.append).train_job(place.job, 3)
    assert body["spec"]["trainer"]["resourcesPerNode"]["requests"] == {"memory": "6Gi"}
    bare = replace(cluster, nodes=Nodes(gpus=0))
    body = KubernetesLauncher(bare, environment={}, say=place.said.append).train_job(place.job, 3)
    assert "resourcesPerNode" not in body["spec"]["trainer"]
    body = launcher.train_job(place.job, 16)
    assert body["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "night"
    assert "a-secret" not in json.dumps(body)
    # A name of JobSet's pods has 63 letters: ours, -node-0-NN and a suffix.
    assert len(body["metadata"]["name"]) < 45


def test_what_a_pod_keeps_is_not_what_the_flow_keeps(place: Place) -> None:
    job = replace(place.job, runtime=replace(place.job.runtime, cache_bytes=35 * 10**9))
    owner = {**place.launcher.train_job(job, 1)}
    owner["metadata"] = {**owner["metadata"], "uid": "1"}
    for gib, room in ((None, None), (400, 400 * 2**30)):
        cluster = replace(place.launcher.cluster, cache_gib=gib)
        launcher = KubernetesLauncher(cluster, environment={}, say=place.said.append)
        told = json.loads(launcher.job_file(job, owner)["data"]["job.json"])
        assert told["runtime"]["cache_bytes"] == room


def test_a_body_with_an_unknown_field_would_be_refused(place: Place) -> None:
    body = place.launcher.train_job(place.job, 1)
    body["spec"]["trainer"]["nodes"] = 2
    with pytest.raises(StageError, match=r"422 .*does not know all of"):
        place.launcher.api.call("POST", TRAIN_JOBS, body)
    assert f"{CORE}/configmaps" not in place.cluster.objects


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("https://me:word@mlflow.example", "holds a password, which would stand in a manifest"),
        ("http://127.0.0.1:5000", "is another machine in every pod"),
    ],
)
def test_addresses_that_do_not_belong_into_a_manifest(place: Place, uri: str, why: str) -> None:
    for job, environment in (
        (replace(place.job, runtime=replace(place.job.runtime, mlflow_uri=uri)), {}),
        (place.job, {"AWS_ENDPOINT_URL_S3": uri}),
    ):
        launcher = KubernetesLauncher(
            place.launcher.cluster, environment=environment, say=place.said.append
        )
        with pytest.raises(ConfigError, match=why):
            launcher.run(job)
    assert place.cluster.requests == []
