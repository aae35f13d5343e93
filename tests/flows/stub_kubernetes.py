"""An API server with a Kubeflow Trainer behind it, for tests: it runs the pods as processes.

Every body is read by the models that Kubeflow publishes and must survive them whole, so an
unknown or misplaced field is refused as a server would. A TrainJob waits for its turn and for its
ConfigMap, is given the environment that the torch plugin gives (PET_*), and loses its pods when a
test evicts them; they begin again as infra/k8s/base/runtime.yaml says. What a container would see
under a mount or as ``python`` is put in its place in the command and in the files.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from kubeflow_trainer_api import models
from unused import unused_port

RUNTIME = Path(__file__).parents[2] / "infra" / "k8s" / "base" / "runtime.yaml"
TRAIN_JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/research/trainjobs"
CORE = "/api/v1/namespaces/research"
TOKEN = "token-of-the-test"
COLLECTED_SECONDS = 0.7
"""From the end of a TrainJob to that of its ConfigMap."""


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def checked(model: Any, body: dict[str, Any]) -> dict[str, Any]:
    """A body as the published model understands it; it must lose nothing."""
    read = model.from_dict(body).to_dict()
    if read != body:
        raise Refused(422, f"{model.__name__} does not know all of {json.dumps(body)}: {read}")
    return body


def runtime() -> dict[str, Any]:
    return checked(models.TrainerV1alpha1TrainingRuntime, yaml.safe_load(RUNTIME.read_text()))


class Cluster:
    """What the server knows, and the pods that it runs."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        """What the image would bring along."""
        self.secrets: dict[str, dict[str, str]] = {}
        self.objects: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, list[subprocess.Popen[bytes]]] = {}
        self.messages: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.blind = False
        """Whether the flow's account may not list events."""
        self.full = threading.Event()
        """While it is set, no pod is created."""
        self.requests: list[str] = []
        self.environs: list[dict[str, str]] = []
        self.starts = 0
        self.suspended = threading.Event()
        self.away = False
        self.lingers = 0.0
        """Seconds from a TrainJob's deletion to its going, beside those of its pods."""
        self.dying = 0
        """How many answers are cut off in the middle."""
        self.restarts = runtime()["spec"]["template"]["spec"]["failurePolicy"]["maxRestarts"]
        self.lock = threading.RLock()
        self.threads: list[threading.Thread] = []

    # -- what is asked --

    def answer(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        where = urlsplit(path)
        with self.lock:
            self.requests.append(f"{method} {where.path}")
            if method == "POST":
                return self.create(where.path, body or {})
            if where.path == f"{CORE}/pods":
                assert "labelSelector" in parse_qs(where.query)
                return {"kind": "PodList", "items": self.messages}
            if where.path == f"{CORE}/events":
                return {"kind": "EventList", "items": self.warnings(parse_qs(where.query))}
            if where.path not in self.objects:
                raise Refused(404, f"{where.path} not found")
            if method == "DELETE":
                assert body == {"propagationPolicy": "Foreground"}
                self.objects[where.path]["metadata"]["deletionTimestamp"] = "now"
                self.tell(where.path, signal.SIGTERM)
            return self.objects[where.path]

    def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        kinds = {
            TRAIN_JOBS: models.TrainerV1alpha1TrainJob,
            f"{CORE}/configmaps": models.IoK8sApiCoreV1ConfigMap,
        }
        if path not in kinds:
            raise Refused(404, f"{path} not found")
        body = json.loads(json.dumps(checked(kinds[path], body)))
        name = f"{path}/{body['metadata']['name']}"
        if name in self.objects:
            raise Refused(409, f"{name} already exists")
        assert body["metadata"]["namespace"] == "research"
        for owner in body["metadata"].get("ownerReferences", []):
            assert owner["uid"] == self.objects[f"{TRAIN_JOBS}/{owner['name']}"]["metadata"]["uid"]
        body["metadata"]["uid"] = str(uuid.uuid4())
        body["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
        self.objects[name] = body
        if path == TRAIN_JOBS:
            body["status"] = {}
            thread = threading.Thread(target=self.control, args=(name,))
            self.threads.append(thread)
            thread.start()
        return body

    def warnings(self, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        if self.blind:
            raise Refused(403, "events is forbidden")
        named, kind = query["fieldSelector"][0].split(",")
        assert kind == "type=Warning"
        name = named.removeprefix("involvedObject.name=")
        return [event for event in self.events if event["involvedObject"]["name"] == name]

    # -- the controller --

    def control(self, name: str) -> None:
        """A TrainJob from its creation to its end."""
        job = self.objects[name]
        config = f"{CORE}/configmaps/{mounted(job)}"
        while self.suspended.is_set() and not self.deleted(name):
            self.condition(name, "Suspended", "Suspended", "TrainJob is suspended")
            time.sleep(0.02)
        while not self.has_file(job, config) and not self.deleted(name):
            self.condition(name)
            time.sleep(0.02)
        while self.full.is_set() and not self.deleted(name):
            time.sleep(0.02)
        for attempt in range(self.restarts + 1):
            if self.deleted(name):
                break
            status, words = self.run_pods(name, config)
            if status == 0:
                self.condition(name, "Complete", "JobsCompleted", "jobset completed successfully")
                break
            if attempt == self.restarts and not self.deleted(name):
                self.messages = [pod(terminated(status, words))]
                self.condition(name, "Failed", "ReachedMaxRestarts", "jobset failed due to that")
            else:
                self.condition(name)
        while not self.deleted(name) and not self.away:
            time.sleep(0.02)
        time.sleep(self.lingers)
        with self.lock:
            # Foreground: after its pods. What it owns goes when the collector comes by.
            self.objects.pop(name, None)
        time.sleep(COLLECTED_SECONDS)
        with self.lock:
            self.objects.pop(config, None)

    def has_file(self, job: dict[str, Any], config: str) -> bool:
        """Whether the ConfigMap is there, and stays: one whose owner has gone is about to go."""
        owners = self.objects.get(config, {}).get("metadata", {}).get("ownerReferences", [])
        return any(owner["uid"] == job["metadata"]["uid"] for owner in owners)

    def deleted(self, name: str) -> bool:
        return "deletionTimestamp" in self.objects[name]["metadata"]

    def condition(self, name: str, kind: str = "", reason: str = "", message: str = "") -> None:
        now = "2026-01-01T00:00:00Z"
        said = {"type": kind, "status": "True", "reason": reason, "message": message}
        conditions = [{**said, "lastTransitionTime": now}] if kind else []
        self.objects[name]["status"] = {"conditions": conditions}

    def run_pods(self, name: str, config: str) -> tuple[int, str]:
        trainer = self.objects[name]["spec"]["trainer"]
        self.starts += 1
        place = self.folder / f"pods-{self.starts}"
        mounts = self.mount(name, config, place)
        port = unused_port()
        pods = []
        for node in range(trainer["numNodes"]):
            environ = self.environ(trainer) | {
                "PET_NNODES": str(trainer["numNodes"]),
                "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
                "PET_NODE_RANK": str(node),
                "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": str(port),
            }
            self.environs.append(environ)
            words = [mapped(word, mounts) for word in (*trainer["command"], *trainer["args"])]
            assert words[0] == "python"
            with (place / f"output-{node}").open("w") as output:
                pods.append(
                    subprocess.Popen(
                        [sys.executable, *words[1:]],
                        env=environ,
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                    )
                )
        with self.lock:
            self.pods[name] = pods
            counts = {"active": 1, "ready": 1, "failed": 0, "succeeded": 0, "suspended": 0}
            self.objects[name]["status"] = {"jobsStatus": [{"name": "node", **counts}]}
        while any(pod.poll() is None for pod in pods):
            if self.deleted(name) or any(pod.poll() for pod in pods):
                self.tell(name, signal.SIGTERM)
            time.sleep(0.05)
        words = place / "termination-log"
        status = max(abs(pod.returncode) for pod in pods)
        return status, words.read_text() if words.exists() else ""

    def mount(self, name: str, config: str, place: Path) -> dict[str, str]:
        """The files of a pod, and where they really are."""
        patch = self.objects[name]["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]
        [node] = patch["template"]["spec"]["replicatedJobs"]
        spec = node["template"]["spec"]["template"]["spec"]
        [volume], [container] = spec["volumes"], spec["containers"]
        assert node["name"] == container["name"] == "node"
        assert volume["configMap"]["name"] == config.rpartition("/")[2]
        there = runtime()["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
        [fixed] = there["template"]["spec"]["containers"]
        mounts = {m["mountPath"]: str(place / m["name"]) for m in fixed["volumeMounts"]}
        mounts[fixed["terminationMessagePath"]] = str(place / "termination-log")
        mounts[container["volumeMounts"][0]["mountPath"]] = str(place / "job")
        (place / "job").mkdir(parents=True)
        for key, text in self.objects[config]["data"].items():
            (place / "job" / key).write_text(mapped(text, mounts))
        return mounts

    def environ(self, trainer: dict[str, Any]) -> dict[str, str]:
        found = dict(self.environment)
        for entry in trainer["env"]:
            if "value" in entry:
                found[entry["name"]] = entry["value"]
                continue
            ref = entry["valueFrom"]["secretKeyRef"]
            secret = self.secrets[ref["name"]]
            if ref["key"] in secret or not ref["optional"]:
                found[entry["name"]] = secret[ref["key"]]
        return found

    def tell(self, name: str, kind: int) -> None:
        for pod in self.pods.get(name, []):
            if pod.poll() is None:
                os.killpg(pod.pid, kind)

    def evict(self) -> None:
        """Drain the node: all pods are told to end."""
        for name in list(self.pods):
            self.tell(name, signal.SIGTERM)

    def close(self) -> None:
        self.away = True
        self.suspended.clear()
        self.full.clear()
        for name in list(self.objects):
            if name.startswith(TRAIN_JOBS):
                self.objects[name]["metadata"]["deletionTimestamp"] = "now"
        for thread in self.threads:
            thread.join()


def mapped(text: str, mounts: dict[str, str]) -> str:
    for inside, outside in mounts.items():
        # Whole paths: the store's own folder may have a "/cache" somewhere inside.
        text = text.replace(f'"{inside}"', f'"{outside}"')
        if text.startswith(inside):
            text = outside + text.removeprefix(inside)
    return text


def mounted(job: dict[str, Any]) -> str:
    """Name of the ConfigMap that a TrainJob's pods see."""
    [patch] = job["spec"]["runtimePatches"]
    [node] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    [volume] = node["template"]["spec"]["template"]["spec"]["volumes"]
    return volume["configMap"]["name"]


def pod(container: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {"name": "a-pod"}, "status": {"containerStatuses": [container]}}


def terminated(status: int, words: str) -> dict[str, Any]:
    # The test's pods know no limit of memory: what kills them is taken for one.
    reason = "OOMKilled" if status == signal.SIGKILL else "Error"
    state = {"exitCode": status, "reason": reason, "message": words}
    return {"name": "node", "state": {"terminated": state}}


class Server(ThreadingHTTPServer):
    """The cluster's API on a port of loopback."""

    daemon_threads = True

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cluster = cluster

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        try:
            if self.server.cluster.dying:
                self.server.cluster.dying -= 1
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"kind": ')
                self.close_connection = True
                return
            if self.server.cluster.away:
                raise Refused(503, "the server is being upgraded")
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                raise Refused(401, "Unauthorized")
            status, said = 200, self.server.cluster.answer(self.command, self.path, body)
        except Refused as error:
            status, said = error.status, {"kind": "Status", "message": str(error)}
        except Exception as error:
            status, said = 422, {"kind": "Status", "message": repr(error)}
        text = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_DELETE = handle_any

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
