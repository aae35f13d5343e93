"""A stage program as a TrainJob of Kubeflow Trainer, through the plain API of Kubernetes.

The TrainJob's name says stage, digest and store: creating it twice is refused by the server, and
then the flow waits for the one that is there. The job file is a ConfigMap that the TrainJob owns.
Credentials are named, never sent. A program's last words are its container's termination message.
"""

import contextlib
import functools
import http.client
import json
import secrets
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from eqm.config import PROGRAMS, Job, replace
from eqm.errors import ConfigError, StageError
from eqm.records import to_json
from eqm.stage import failure
from flows.clusters import Kubernetes
from flows.launch import (
    SHUTDOWN_SECONDS,
    Leaves,
    cluster_name,
    ended_with_flow,
    is_sealed,
    leaves_none,
)
from flows.pods import (
    WAITING,
    ended,
    fates_of,
    is_going,
    last_words,
    phase,
    said,
    what_holds_up,
)

GROUP = "trainer.kubeflow.org/v1alpha1"
POLL_SECONDS = 5.0
PATIENCE_SECONDS = 900.0
"""How long the API server may be out of reach: an upgrade of the control plane."""
QUIET_SECONDS = 30.0
"""Of waiting for pods, before it is asked what holds them up, and from then on between two looks:
images take a while, and quotas hours."""
GRACE_SECONDS = 180.0
"""For pods to end in: more than they are given in infra/k8s/base/runtime.yaml."""
TIMEOUT_SECONDS = 30.0
SHUTDOWN = f"--shutdown-timeout={SHUTDOWN_SECONDS}"
"""Less than pods are given: torchrun would kill after 30 s what is writing a checkpoint."""
JOB_FOLDER = "/etc/eqm"
CACHE_FOLDER = "/cache"
"""A volume of infra/k8s/base/runtime.yaml."""
LAST_WORDS = "/dev/termination-log"
"""What a container writes there, Kubernetes keeps in the status of its pod."""
CONTAINER = "node"
"""Name that Kubeflow Trainer demands, of the replicated job and of its container."""
JOB_SET = "jobset.sigs.k8s.io/jobset-name"
"""Label that JobSet gives the pods of a TrainJob."""

PLAIN = ("AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "MLFLOW_TRACKING_URI")
SECRET_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
OPTIONAL_KEYS = (
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)


class ApiError(StageError):
    """What the API server answered; status 0 if it did not."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    @property
    def passing(self) -> bool:
        """Whether asking again may help."""
        return self.status in (0, 429) or self.status >= 500


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to another server."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow none."""


class Api:
    """The few calls that are needed of an API server."""

    def __init__(self, cluster: Kubernetes) -> None:
        self.cluster = cluster
        handlers: list[urllib.request.BaseHandler] = [
            _NoRedirect(),
            # The token is for the API server alone.
            urllib.request.ProxyHandler({}),
        ]
        if cluster.api.startswith("https://"):
            trusted = ssl.create_default_context(cafile=cluster.ca_file)
            handlers.append(urllib.request.HTTPSHandler(context=trusted))
        self._opener = urllib.request.build_opener(*handlers)

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One request. Raises ApiError, ConfigError."""
        try:
            # Kubernetes replaces it within the hour.
            token = self.cluster.token_file.read_text().strip()
        except OSError as error:
            raise ConfigError(
                f"EQM_KUBERNETES_TOKEN_FILE {self.cluster.token_file} cannot be read: "
                f"{error.strerror}"
            ) from error
        request = urllib.request.Request(  # noqa: S310
            self.cluster.api + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )
        try:
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise ApiError(error.code, _refusal(self.cluster, method, path, error)) from None
        # A server that goes while it answers leaves half an answer.
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ApiError(
                0,
                f"{self.cluster.api} does not answer as an API server ({reason}): see "
                "EQM_KUBERNETES_API and EQM_KUBERNETES_CA_FILE",
            ) from None

    def train_jobs(self, name: str = "") -> str:
        """Path of the TrainJobs, or of one."""
        path = f"/apis/{GROUP}/namespaces/{self.cluster.namespace}/trainjobs"
        return f"{path}/{name}" if name else path

    def core(self, kind: str, **query: str) -> str:
        """Path of objects that every Kubernetes has."""
        path = f"/api/v1/namespaces/{self.cluster.namespace}/{kind}"
        return f"{path}?{urllib.parse.urlencode(query)}" if query else path


def _refusal(cluster: Kubernetes, method: str, path: str, error: urllib.error.HTTPError) -> str:
    try:
        said = str(json.loads(error.read())["message"])
    except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        said = str(error.reason)
    remedy = {
        401: f"; the token of {cluster.token_file} is not accepted: renew it",
        403: "; give the flow's service account the rights of infra/k8s/base/access.yaml",
        404: "; is Kubeflow Trainer installed there? infra/k8s/README.md says how",
    }.get(error.code, "")
    return f"{method} {cluster.api}{path}: {error.code} {said}{remedy}"


class KubernetesLauncher:
    """TrainJobs in a namespace."""

    def __init__(
        self,
        cluster: Kubernetes,
        *,
        environment: Mapping[str, str],
        say: Callable[[str], None],
        leaves: Leaves = leaves_none,
    ) -> None:
        self.cluster = cluster
        self.environment = dict(environment)
        self.say = say
        self.leaves = leaves
        self.api = Api(cluster)

    def run(self, job: Job, *, processes: int = 1) -> None:
        """Run a program to its end. Raises as :class:`flows.launch.Launcher`."""
        name = cluster_name(job)
        body = self.train_job(job, processes)
        end = functools.partial(self._delete, name)
        with ended_with_flow(name, end, leaves=self.leaves, say=self.say):
            self._start(job, name, body)
            why = self._watch(job, name)
        if why is not None:
            # It stays for a look at its logs, and the next start replaces it.
            raise failure(self._why(name, why))
        self._delete(name)

    # -- what is sent --

    def train_job(self, job: Job, processes: int) -> dict[str, Any]:
        """The TrainJob of a job. Raises ConfigError."""
        _refuse_secrets(job, self.environment)
        name, cluster = cluster_name(job), self.cluster
        nodes, here = cluster.nodes.spread(processes)
        # Asked for and granted are the same: such pods are the last that a full node evicts.
        wanted = {name: value for name, value in _resources(cluster, here).items() if value}
        labels = {"app.kubernetes.io/name": "eqm", "app.kubernetes.io/component": job.stage}
        queue = {"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue else {}
        trainer = {
            "image": cluster.image,
            "command": ["python", "-m", "torch.distributed.run"],
            "args": [SHUTDOWN, "-m", PROGRAMS[job.stage], f"{JOB_FOLDER}/job.json"],
            "numNodes": nodes,
            "numProcPerNode": here,
            "env": self._env(job),
            **({"resourcesPerNode": {"limits": wanted, "requests": wanted}} if wanted else {}),
        }
        return {
            "apiVersion": GROUP,
            "kind": "TrainJob",
            "metadata": {
                "name": name,
                "namespace": cluster.namespace,
                "labels": {**labels, **queue},
            },
            "spec": {
                "runtimeRef": {"kind": "TrainingRuntime", "name": cluster.runtime},
                "trainer": trainer,
                "runtimePatches": [_mounted(f"{name}-{secrets.token_hex(4)}")],
            },
        }

    def _env(self, job: Job) -> list[dict[str, Any]]:
        plain = {name: self.environment[name] for name in PLAIN if self.environment.get(name)}
        if job.runtime.threads is not None:
            plain["OMP_NUM_THREADS"] = str(job.runtime.threads)
        told: list[dict[str, Any]] = [{"name": k, "value": v} for k, v in sorted(plain.items())]
        if self.cluster.secret is None:
            return told
        for key in (*SECRET_KEYS, *OPTIONAL_KEYS):
            where = {"name": self.cluster.secret, "key": key, "optional": key in OPTIONAL_KEYS}
            told.append({"name": key, "valueFrom": {"secretKeyRef": where}})
        return told

    def job_file(self, job: Job, owner: Mapping[str, Any]) -> dict[str, Any]:
        """The ConfigMap with the job file; it goes after the TrainJob has gone.

        That may be so much later that the next TrainJob of the name is there by then: each has one
        of its own.
        """
        # EQM_CACHE_SIZE is of the machine that the flow is on, often a small one.
        room = self.cluster.cache_gib * 2**30 if self.cluster.cache_gib else None
        runtime = replace(job.runtime, error_file=LAST_WORDS, cache=CACHE_FOLDER, cache_bytes=room)
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": _file_of(owner),
                "namespace": self.cluster.namespace,
                "ownerReferences": [
                    {
                        "apiVersion": GROUP,
                        "kind": "TrainJob",
                        "name": owner["metadata"]["name"],
                        "uid": owner["metadata"]["uid"],
                        "controller": True,
                    }
                ],
            },
            "data": {"job.json": json.dumps(to_json(replace(job, runtime=runtime)), indent=1)},
        }

    # -- started, watched, ended --

    def _start(self, job: Job, name: str, body: Mapping[str, Any]) -> None:
        there = self._create(self.api.train_jobs(), body)
        if there is None:
            there = self._found(name)
            if there is not None and ended(there) is None and not is_going(there):
                self.say(f"{name}: is a TrainJob in {self.cluster.namespace} already, waiting")
            else:
                # One that ended before the record was sealed, or is being deleted by a flow that
                # was cancelled: its place is taken.
                self._delete(name)
                there = self._create(self.api.train_jobs(), body)
                if there is None:
                    raise StageError(
                        f"{name}: the TrainJob of an earlier run is still ending in "
                        f"{self.cluster.namespace}: run it again in a moment"
                    )
        else:
            self.say(f"{name}: TrainJob created in {self.cluster.namespace}")
        # Its pods wait for it. One that a flow left behind without may get it from us.
        self._create(self.api.core("configmaps"), self.job_file(job, there))

    def _create(self, path: str, body: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was created; None if it is there already."""
        try:
            return self._patient(lambda: self.api.call("POST", path, body))
        except ApiError as error:
            if error.status == 409:
                return None
            raise

    def _found(self, name: str) -> dict[str, Any] | None:
        try:
            return self._patient(lambda: self.api.call("GET", self.api.train_jobs(name)))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def _patient(self, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Ask again where that may help, for as long as a server may be away."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return ask()
            except ApiError as error:
                if not error.passing or time.monotonic() > deadline:
                    raise
                time.sleep(POLL_SECONDS)

    def _watch(self, job: Job, name: str) -> str | None:
        """None when it ended well, else why it did not."""
        told: set[str] = set()
        before, since = "", time.monotonic()
        while True:
            there = self._found(name)
            if there is None:
                return None if is_sealed(job) else "was deleted by somebody: run it again to go on"
            now = phase(there)
            if now != before:
                self.say(f"{name}: {now}")
                before, since = now, time.monotonic()
            elif now == WAITING and time.monotonic() - since >= QUIET_SECONDS:
                since = time.monotonic()
                # Each once: Kubernetes goes back and forth between trying and having failed.
                new = [why for why in self._held_up(name, there) if why not in told]
                told.update(new)
                for why in new:
                    self.say(f"{name}: {WAITING}: {why}")
            end = ended(there)
            if end is not None:
                return None if end["type"] == "Complete" else said(end)
            time.sleep(POLL_SECONDS)

    def _held_up(self, name: str, there: Mapping[str, Any]) -> list[str]:
        """Why pods are not there or do not start, as far as the server lets us know."""
        pods = self._listed("pods", labelSelector=f"{JOB_SET}={name}")
        # Of the TrainJob and its JobSet, of the Job that makes the pods, of one pod for all.
        places = [name, f"{name}-{CONTAINER}-0", *[pod["metadata"]["name"] for pod in pods[:1]]]
        selectors = [f"involvedObject.name={place},type=Warning" for place in places]
        events = [e for each in selectors for e in self._listed("events", fieldSelector=each)]
        return what_holds_up(pods, events, since=there["metadata"].get("creationTimestamp", ""))

    def _listed(self, kind: str, **query: str) -> list[dict[str, Any]]:
        """Objects of a kind; none where we may not see them, or the server does not answer."""
        with contextlib.suppress(StageError):
            return self.api.call("GET", self.api.core(kind, **query)).get("items") or []
        return []

    def _delete(self, name: str) -> None:
        """Delete a TrainJob, and see it and its pods go."""
        with contextlib.suppress(StageError):
            # Foreground: it is there until its pods are not.
            policy = {"propagationPolicy": "Foreground"}
            self.api.call("DELETE", self.api.train_jobs(name), policy)
            deadline = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < deadline and self._found(name) is not None:
                time.sleep(min(1.0, POLL_SECONDS))

    def _why(self, name: str, why: str) -> str:
        pods = self._listed("pods", labelSelector=f"{JOB_SET}={name}")
        words = [text for pod in pods for text in last_words(pod)]
        if words:
            return f"{name}: {words[0]}"
        fates = list(dict.fromkeys(fate for pod in pods for fate in fates_of(pod)))
        why = f"{why}, a pod was {fates[0]}" if fates else why
        return (
            f"{name}: the TrainJob {why}; `kubectl logs --namespace {self.cluster.namespace} "
            f"--selector {JOB_SET}={name}` has its output"
        )


def _refuse_secrets(job: Job, environment: Mapping[str, str]) -> None:
    """Refuse what everybody who may look at the namespace would read, or no pod could reach."""
    told = {name: environment[name] for name in PLAIN if environment.get(name)}
    told |= {"runtime.mlflow_uri": job.runtime.mlflow_uri or ""}
    for name, value in told.items():
        parts = urllib.parse.urlsplit(value)
        if parts.password is not None:
            raise ConfigError(
                f"{name} holds a password, which would stand in a manifest: put it into the Secret "
                "of EQM_KUBERNETES_SECRET as MLFLOW_TRACKING_PASSWORD, and give the bare address"
            )
        if parts.hostname in ("127.0.0.1", "localhost", "::1"):
            raise ConfigError(
                f"{name} is {value}, which is another machine in every pod: with "
                "EQM_LAUNCHER=kubernetes give an address that the cluster reaches"
            )


def _resources(cluster: Kubernetes, processes: int) -> dict[str, str | None]:
    """What a pod of so many processes needs of its node; None for what the cluster decides."""
    nodes = cluster.nodes
    return {
        "nvidia.com/gpu": str(processes * nodes.gpus) if nodes.gpus else None,
        "cpu": str(processes * nodes.cpus) if nodes.cpus else None,
        "memory": f"{processes * nodes.memory_gib}Gi" if nodes.memory_gib else None,
    }


def _mounted(name: str) -> dict[str, Any]:
    """The patch by which the trainer's pods see the job file, of a ConfigMap."""
    pod = {
        "volumes": [{"name": "eqm-job", "configMap": {"name": name}}],
        "containers": [
            {
                "name": CONTAINER,
                "volumeMounts": [{"name": "eqm-job", "mountPath": JOB_FOLDER, "readOnly": True}],
            }
        ],
    }
    jobs = [{"name": CONTAINER, "template": {"spec": {"template": {"spec": pod}}}}]
    return {
        "manager": "eqm.flows/launcher",
        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}},
    }


def _file_of(there: Mapping[str, Any]) -> str:
    """Name of the ConfigMap that the pods of a TrainJob wait for."""
    [patch] = there["spec"]["runtimePatches"]
    [jobs] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    [volume] = jobs["template"]["spec"]["template"]["spec"]["volumes"]
    return volume["configMap"]["name"]
