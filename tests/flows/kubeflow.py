"""Kubeflow Trainer and JobSet in short, for a real API server: their images are not to be had here.

Kinds have the schemas that Kubeflow publishes (``kubeflow-trainer-api``), so the server itself
drops or refuses what they do not know. The controller makes of a TrainJob what the two make of it:
a headless Service, a JobSet, Jobs, and in their pods the environment of the torch plugin (PET_*).
When one Job fails, all begin again, as often as the runtime's ``maxRestarts`` says. Owners are
those of the real thing, so that deleting a TrainJob in the foreground waits for its pods.
"""

import contextlib
import copy
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from typing import Any

from kubeflow_trainer_api import models

TRAINER = "trainer.kubeflow.org/v1alpha1"
JOB_SET = "jobset.x-k8s.io/v1alpha2"
LABEL = "jobset.sigs.k8s.io/jobset-name"
ATTEMPT = "jobset.sigs.k8s.io/restart-attempt"
PORT = 29400
SECONDS = 0.3
"""Between two looks."""
KINDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
PLAYED = {"app.kubernetes.io/managed-by": "eqm-tests"}
INDEXED = 24
"""Minor version of Kubernetes from which on Jobs of several numbered pods are settled."""


def kinds() -> list[dict[str, Any]]:
    """CustomResourceDefinitions of TrainJob, TrainingRuntime and JobSet."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return [
        _kind(TRAINER, "TrainJob", _schema(models.TrainerV1alpha1TrainJob)),
        _kind(TRAINER, "TrainingRuntime", _schema(models.TrainerV1alpha1TrainingRuntime)),
        _kind(JOB_SET, "JobSet", {"type": "object", "properties": {"spec": anything}}),
    ]


def _kind(version: str, kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    group, _, number = version.partition("/")
    plural = f"{kind.lower()}s"
    # What every object has is the server's business.
    for name in ("apiVersion", "kind", "metadata"):
        schema.get("properties", {}).pop(name, None)
    schema["properties"]["status"] = {
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": True,
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}", "labels": PLAYED},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [
                {
                    "name": number,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": schema},
                    "subresources": {"status": {}},
                }
            ],
        },
    }


def _schema(model: Any) -> dict[str, Any]:
    """A published model as Kubernetes wants schemas: no references, no ``anyOf``, no titles."""
    whole = model.model_json_schema()
    return _plain(whole, whole.get("$defs", {}))


def _plain(part: Mapping[str, Any], defs: Mapping[str, Any]) -> dict[str, Any]:
    if "$ref" in part:
        return _plain(defs[part["$ref"].rpartition("/")[2]], defs)
    if "anyOf" in part:
        real = [one for one in part["anyOf"] if one != {"type": "null"}]
        if len(real) == 1:
            return _plain(real[0], defs)
        return {"x-kubernetes-int-or-string": True}
    if "oneOf" in part or "actual_instance" in part.get("properties", {}):
        return {"x-kubernetes-int-or-string": True}
    kind = part.get("type")
    if kind == "object":
        if "properties" in part:
            fields = {name: _plain(one, defs) for name, one in part["properties"].items()}
            needed = {"required": part["required"]} if part.get("required") else {}
            return {"type": "object", "properties": fields, **needed}
        more = part.get("additionalProperties")
        if isinstance(more, dict):
            return {"type": "object", "additionalProperties": _plain(more, defs)}
        return {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    if kind == "array":
        return {"type": "array", "items": _plain(part["items"], defs)}
    if kind is None:
        return {"x-kubernetes-preserve-unknown-fields": True}
    return {"type": kind, **({"format": part["format"]} if "format" in part else {})}


class Refused(Exception):
    """An answer of the API server that is no success."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status} {message}")
        self.status = status


class Plain:
    """An API server at an address that asks for no token (``kubectl proxy``)."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(
        self, method: str, path: str, body: Any = None, *, kind: str = "application/json"
    ) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.address + path, method=method, data=data, headers={"Content-Type": kind}
        )
        try:
            with self._opener.open(request, timeout=20) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode(errors="replace")) from None

    def ensured(self, path: str, body: Mapping[str, Any]) -> None:
        """Create it unless it is there."""
        try:
            self.call("POST", path, body)
        except Refused as error:
            if error.status != 409:
                raise


class Trainer:
    """The controller; it runs from ``with`` on, in one namespace.

    The kinds are made, and go with it. Where somebody else has made them it refuses to start: there
    a Kubeflow is installed, and two controllers would undo each other's work.
    """

    def __init__(self, address: str, namespace: str) -> None:
        self.api = Plain(address)
        self.namespace = namespace
        self.said: list[str] = []
        """What went wrong, for whoever looks."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._indexed = False

    def __enter__(self) -> "Trainer":
        for kind in kinds():
            try:
                self.api.call("POST", KINDS, kind)
            except Refused as error:
                if error.status != 409:
                    raise
                name = kind["metadata"]["name"]
                there = self.api.call("GET", f"{KINDS}/{name}")
                if there["metadata"].get("labels") != PLAYED:
                    raise RuntimeError(
                        f"{name} is there: set EQM_TEST_KUBEFLOW=installed if a controller is, too"
                    ) from None
        minor = self.api.call("GET", "/version")["minor"]
        self._indexed = int(minor.rstrip("+")) >= INDEXED
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for kind in kinds():
            self.api.call("DELETE", f"{KINDS}/{kind['metadata']['name']}")

    def _run(self) -> None:
        path = f"/apis/{TRAINER}/namespaces/{self.namespace}/trainjobs"
        while not self._over.wait(SECONDS):
            # A server that is away, or an object that somebody else has changed: the next look.
            try:
                for job in self.api.call("GET", path)["items"]:
                    self._reconcile(job)
            except (OSError, Refused, ValueError) as error:
                self.said.append(str(error))

    # -- one TrainJob --

    def _reconcile(self, job: dict[str, Any]) -> None:
        done = {c["type"] for c in job.get("status", {}).get("conditions", [])}
        if job["metadata"].get("deletionTimestamp") or done & {"Complete", "Failed"}:
            return
        if job["spec"].get("suspend"):
            self._condition(job, "Suspended", "Suspended", "TrainJob is suspended")
            return
        runtime = self.api.call("GET", self._of(job, TRAINER, "trainingruntimes", runtime_of(job)))
        template = runtime["spec"]["template"]["spec"]
        job_set = self._job_set(job)
        attempt = job_set.get("status", {}).get("restarts", 0)
        there = self._listed(job, "batch/v1", "jobs")
        old = [one for one in there if one["metadata"]["labels"][ATTEMPT] != str(attempt)]
        for one in old:
            if not one["metadata"].get("deletionTimestamp"):
                with contextlib.suppress(Refused):
                    path = self._of(job, "batch/v1", "jobs", one["metadata"]["name"])
                    self.api.call("DELETE", path, {"propagationPolicy": "Foreground"})
        if old:
            return
        for body in self._jobs(job, job_set, template, attempt):
            if body["metadata"]["name"] not in {one["metadata"]["name"] for one in there}:
                self.api.call("POST", self._of(job, "batch/v1", "jobs"), body)
        self._judge(job, job_set, there, attempt, template["failurePolicy"]["maxRestarts"])

    def _judge(
        self,
        job: dict[str, Any],
        job_set: dict[str, Any],
        there: list[dict[str, Any]],
        attempt: int,
        most: int,
    ) -> None:
        ends = [ended(one) for one in there]
        pods = self._listed(job, "v1", "pods")
        counts = {
            "active": sum(1 for end in ends if end is None),
            "ready": sum(1 for pod in pods if is_ready(pod)),
            "failed": ends.count("Failed"),
            "succeeded": ends.count("Complete"),
            "suspended": 0,
        }
        status = {"jobsStatus": [{"name": "node", **counts}]}
        if "Failed" in ends:
            if attempt < most:
                path = self._of(job, JOB_SET, "jobsets", f"{job['metadata']['name']}/status")
                body = {**job_set, "status": {"restarts": attempt + 1}}
                self.api.call("PUT", path, body)
            else:
                why = "jobset failed due to reaching max number of restarts"
                self._condition(job, "Failed", "ReachedMaxRestarts", why, **status)
        elif ends and all(end == "Complete" for end in ends):
            why = "jobset completed successfully"
            self._condition(job, "Complete", "AllJobsCompleted", why, **status)
        elif job.get("status", {}).get("jobsStatus") != status["jobsStatus"]:
            self._tell(job, status)

    def _condition(
        self, job: dict[str, Any], kind: str, reason: str, message: str, **more: Any
    ) -> None:
        said = {"type": kind, "status": "True", "reason": reason, "message": message}
        if [said] != job.get("status", {}).get("conditions"):
            self._tell(job, {"conditions": [said], **more})

    def _tell(self, job: dict[str, Any], status: dict[str, Any]) -> None:
        path = self._of(job, TRAINER, "trainjobs", f"{job['metadata']['name']}/status")
        self.api.call("PUT", path, {**job, "status": status})

    # -- what it makes --

    def _job_set(self, job: dict[str, Any]) -> dict[str, Any]:
        name = job["metadata"]["name"]
        owned = {"name": name, "ownerReferences": [owner(job)]}
        path = self._of(job, JOB_SET, "jobsets")
        self.api.ensured(path, {"apiVersion": JOB_SET, "kind": "JobSet", "metadata": owned})
        job_set = self.api.call("GET", f"{path}/{name}")
        selected = {"clusterIP": "None", "selector": {LABEL: name}}
        self.api.ensured(
            self._of(job, "v1", "services"),
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": name, "ownerReferences": [owner(job_set)]},
                "spec": {**selected, "publishNotReadyAddresses": True},
            },
        )
        return job_set

    def _jobs(
        self, job: dict[str, Any], job_set: dict[str, Any], template: dict[str, Any], attempt: int
    ) -> Iterable[dict[str, Any]]:
        name, nodes = job["metadata"]["name"], job["spec"]["trainer"]["numNodes"]
        labels = {LABEL: name, ATTEMPT: str(attempt)}
        [replicated] = template["replicatedJobs"]
        counts: dict[str, Any] = {"parallelism": 1, "completions": 1}
        numbers = range(nodes)
        if self._indexed:
            counts = {"parallelism": nodes, "completions": nodes, "completionMode": "Indexed"}
            numbers = range(1)
        for number in numbers:
            spec = copy.deepcopy(replicated["template"]["spec"])
            pod = spec["template"]
            merge(pod["spec"], patch_of(job))
            rank = {"value": str(number)}
            if self._indexed:
                path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
                rank = {"valueFrom": {"fieldRef": {"fieldPath": path}}}
            fill(pod["spec"], job, rank)
            pod.setdefault("metadata", {}).setdefault("labels", {}).update(labels)
            if not self._indexed:
                pod["spec"] |= {"hostname": f"{name}-node-0-{number}"}
            pod["spec"]["subdomain"] = name
            yield {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {
                    "name": f"{name}-node-{number}",
                    "labels": labels,
                    "ownerReferences": [owner(job_set)],
                },
                "spec": {**spec, **counts},
            }

    def _listed(self, job: dict[str, Any], version: str, plural: str) -> list[dict[str, Any]]:
        selector = f"labelSelector={LABEL}%3D{job['metadata']['name']}"
        return self.api.call("GET", f"{self._of(job, version, plural)}?{selector}")["items"]

    @staticmethod
    def _of(job: dict[str, Any], version: str, plural: str, name: str = "") -> str:
        root = "/api/v1" if version == "v1" else f"/apis/{version}"
        path = f"{root}/namespaces/{job['metadata']['namespace']}/{plural}"
        return f"{path}/{name}" if name else path


def runtime_of(job: dict[str, Any]) -> str:
    assert job["spec"]["runtimeRef"]["kind"] == "TrainingRuntime"
    return job["spec"]["runtimeRef"]["name"]


def owner(there: dict[str, Any]) -> dict[str, Any]:
    """A reference to what controls something else, and whose deletion waits for it."""
    return {
        "apiVersion": there["apiVersion"],
        "kind": there["kind"],
        "name": there["metadata"]["name"],
        "uid": there["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def ended(job: dict[str, Any]) -> str | None:
    conditions = job.get("status", {}).get("conditions") or []
    found = [c["type"] for c in conditions if c["status"] == "True"]
    return next((kind for kind in found if kind in ("Complete", "Failed")), None)


def is_ready(pod: dict[str, Any]) -> bool:
    conditions = pod.get("status", {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def patch_of(job: dict[str, Any]) -> dict[str, Any]:
    """What a TrainJob changes in the pods of its runtime."""
    merged: dict[str, Any] = {}
    for patch in job["spec"].get("runtimePatches", []):
        spec = patch["trainingRuntimeSpec"]["template"]["spec"]
        [one] = spec["replicatedJobs"]
        assert one["name"] == "node"
        merge(merged, one["template"]["spec"]["template"]["spec"])
    return merged


def merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    """A strategic merge, as far as it is needed: lists of named things by their names."""
    for key, value in more.items():
        if isinstance(value, list) and value and "name" in value[0]:
            there = {one["name"]: one for one in into.setdefault(key, [])}
            for one in value:
                if key == "volumeMounts" or one["name"] not in there:
                    into[key].append(copy.deepcopy(one))
                else:
                    merge(there[one["name"]], one)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


def fill(spec: dict[str, Any], job: dict[str, Any], rank: dict[str, Any]) -> None:
    """What the trainer of a TrainJob and the torch plugin put into its container."""
    trainer, name = job["spec"]["trainer"], job["metadata"]["name"]
    [container] = [one for one in spec["containers"] if one["name"] == "node"]
    container |= {key: trainer[key] for key in ("image", "command", "args") if key in trainer}
    if "resourcesPerNode" in trainer:
        container["resources"] = trainer["resourcesPerNode"]
    plain = {
        "PET_NNODES": str(trainer["numNodes"]),
        "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
        "PET_MASTER_ADDR": f"{name}-node-0-0.{name}",
        "PET_MASTER_PORT": str(PORT),
    }
    container["env"] = [
        *container.get("env", []),
        *trainer.get("env", []),
        *({"name": key, "value": value} for key, value in plain.items()),
        {"name": "PET_NODE_RANK", **rank},
    ]
