"""A namespace in the cluster that kubectl is pointed at, with S3 and a pod that flows run in.

Needs a cluster where one may make namespaces and CustomResourceDefinitions, kubectl on PATH, and
in ``EQM_TEST_KUBERNETES_IMAGE`` an image of this code that its nodes have or can pull. Kubeflow
Trainer is played by ``kubeflow.py``, or is there already (``EQM_TEST_KUBEFLOW=installed``).

What is installed is that of infra/k8s: flows have the rights of its service account and no others,
and run in a pod, with the token that Kubernetes gives them.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from kubeflow import LABEL, Trainer

IMAGE = os.environ.get("EQM_TEST_KUBERNETES_IMAGE", "")
INFRA = Path(__file__).parents[2] / "infra" / "k8s"
POD = "eqm-flow"
"""The pod that flows run in."""
SECRET = "eqm"
KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    # The server is without accounts, which nobody sees from outside.
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
)
SECONDS = 180
FIRST_SECONDS = 900
"""For a first pull of an image of 7 GB."""


def missing() -> str | None:
    """Why there is none here."""
    if not IMAGE:
        return "EQM_TEST_KUBERNETES_IMAGE names no image for a cluster"
    if shutil.which("kubectl") is None:
        return "kubectl is not here"
    return None


class RealKubernetes:
    """A namespace from ``with`` on, deleted with all that is in it."""

    def __init__(self) -> None:
        self.namespace = f"eqm-test-{secrets.token_hex(3)}"
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> "RealKubernetes":
        with contextlib.ExitStack() as stack:
            if os.environ.get("EQM_TEST_KUBEFLOW") != "installed":
                stack.enter_context(Trainer(stack.enter_context(proxied()), self.namespace))
            self.ask("create", "namespace", self.namespace)
            stack.callback(
                self.ask, "delete", "namespace", self.namespace, "--grace-period=1", where=False
            )
            self.install()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def ask(self, *words: str, given: str | None = None, where: bool = True) -> str:
        """What kubectl says."""
        line = ["kubectl", *(["--namespace", self.namespace] if where else []), *words]
        done = subprocess.run(
            line,
            input=given,
            capture_output=True,
            text=True,
            timeout=FIRST_SECONDS + 10,
            check=False,
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        return done.stdout

    def listed(self, kind: str, **labels: str) -> list[dict[str, Any]]:
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        told = self.ask("get", kind, "--output=json", f"--selector={selector}")
        return json.loads(told)["items"]

    def pods(self, name: str) -> list[dict[str, Any]]:
        """Pods of a TrainJob."""
        return self.listed("pods", **{LABEL: name})

    def applied(self, *bodies: Mapping[str, Any]) -> None:
        self.ask(
            "apply",
            "--filename=-",
            given=json.dumps({"apiVersion": "v1", "kind": "List", "items": bodies}),
        )

    def within(self, *command: str) -> list[str]:
        """A command line that runs something in the flows' pod."""
        return [
            "kubectl",
            "--namespace",
            self.namespace,
            "exec",
            POD,
            "--container=main",
            "--",
            *command,
        ]

    def install(self) -> None:
        told = {key: secrets.token_hex(16) for key in KEYS}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET}}
        self.applied({**secret, "stringData": told})
        for name in ("access.yaml", "runtime.yaml"):
            self.ask("apply", "--filename", str(INFRA / "base" / name))
        self.applied(*object_store(), *flow_pod())
        self.ask("rollout", "status", "statefulset/eqm-s3", f"--timeout={FIRST_SECONDS}s")
        self.ask("wait", "--for=condition=Ready", f"pod/{POD}", f"--timeout={FIRST_SECONDS}s")
        subprocess.run(self.within("python", "-m", "infra.cluster", "bucket"), check=True)


@contextlib.contextmanager
def proxied() -> Iterator[str]:
    """Address at which the cluster's API asks for no token."""
    line = ["kubectl", "proxy", "--port=0"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout is not None
        found = re.search(r"127\.0\.0\.1:\d+", proxy.stdout.readline())
        assert found is not None
        try:
            yield f"http://{found[0]}"
        finally:
            proxy.terminate()


def object_store() -> list[dict[str, Any]]:
    """The S3 of infra/k8s, on a disk that goes with its pod."""
    found = list(yaml.safe_load_all((INFRA / "overlays" / "standalone" / "s3.yaml").read_text()))
    [store] = [body for body in found if body["kind"] == "StatefulSet"]
    del store["spec"]["volumeClaimTemplates"]
    pod = store["spec"]["template"]["spec"]
    pod["volumes"].append({"name": "data", "emptyDir": {}})
    [container] = pod["containers"]
    container["image"] = IMAGE
    container["resources"] = {}
    return found


def flow_pod() -> list[dict[str, Any]]:
    """Where flows run, with the rights of their account; Prefect and MLflow are beside them."""
    told = {
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": "http://eqm-s3:8333",
        "EQM_S3_ENDPOINT": "http://eqm-s3:8333",
        "EQM_STORE": "s3://eqm/store",
        "EQM_LAUNCHER": "kubernetes",
        "EQM_KUBERNETES_IMAGE": IMAGE,
        "EQM_KUBERNETES_SECRET": SECRET,
        "EQM_PROCESS_GPUS": "0",
        "MLFLOW_TRACKING_URI": "http://eqm-mlflow:5000",
        "PREFECT_API_URL": "http://127.0.0.1:4200/api",
    }
    env: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in told.items()]
    for key in KEYS:
        env.append({"name": key, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": key}}})
    mlflow = (
        "mlflow server --host=0.0.0.0 --workers=1 --allowed-hosts=eqm-mlflow:5000,127.0.0.1:5000"
    )
    labels = {"app.kubernetes.io/name": POD}
    spec = {
        "serviceAccountName": "eqm-flows",
        "terminationGracePeriodSeconds": 1,
        "containers": [
            {"name": "main", "image": IMAGE, "command": ["sleep", "infinity"], "env": env},
            _server("prefect", "prefect server start", "http://127.0.0.1:4200/api/health", "200"),
            _server("mlflow", mlflow, "http://127.0.0.1:5000/health", "200"),
        ],
    }
    service = {"selector": labels, "ports": [{"port": 5000}], "publishNotReadyAddresses": True}
    return [
        _body("Pod", POD, spec, labels=labels),
        _body("Service", "eqm-mlflow", service),
    ]


def _body(kind: str, name: str, spec: Mapping[str, Any], **metadata: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, **metadata}, "spec": spec}


def _server(name: str, line: str, address: str, status: str) -> dict[str, Any]:
    """A container, ready when its server answers."""
    command = ["python", "-m", "infra.health", address, status]
    return {
        "name": name,
        "image": IMAGE,
        "command": line.split(),
        "workingDir": "/data",
        "readinessProbe": {
            "exec": {"command": command},
            "timeoutSeconds": 10,
            "failureThreshold": 30,
        },
    }


class Flow:
    """An ``eqm`` command in the flows' pod, and what it says."""

    def __init__(
        self, cluster: RealKubernetes, *command: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self.cluster = cluster
        self.home = f"/tmp/{secrets.token_hex(6)}"
        told = {"EQM_HOME": self.home, **(environment or {})}
        variables = [f"{name}={value}" for name, value in told.items()]
        # Its own number: kubectl passes no signals on.
        script = f'mkdir {self.home} && echo $$ > {self.home}/pid && exec "$@"'
        line = cluster.within("env", *variables, "sh", "-c", script, "sh", "eqm", *command)
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(line for line in self.process.stdout)

    def tell(self, signal: str) -> None:
        script = f"kill -{signal} $(cat {self.home}/pid)"
        subprocess.run(self.cluster.within("sh", "-c", script), check=True)

    def end(self) -> int:
        """Its exit status."""
        status = self.process.wait(SECONDS)
        self.reader.join()
        return status

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def is_said(self, *words: str) -> bool:
        return any(all(word in line for word in words) for line in list(self.lines))

    def until(self, *words: str) -> None:
        """Wait for a line with all of these."""
        deadline = time.monotonic() + SECONDS
        while not self.is_said(*words):
            assert time.monotonic() < deadline, self.text
            assert self.process.poll() is None or self.is_said(*words), self.text
            time.sleep(0.1)

    def train_job(self) -> str:
        """Name of its training's TrainJob, once it is there."""
        self.until("train-", "TrainJob")
        [name] = re.findall(r"(train-[0-9a-f]+-[0-9a-f]+): TrainJob created", self.text)[:1]
        return name

    def sealed(self) -> str:
        """Digest of the content of the training that it sealed."""
        found = re.findall(r"train [0-9a-f]+: sealed, content ([0-9a-f]+)", self.text)
        assert found, self.text
        return found[-1]


def changed(changes: Mapping[str, Any]) -> Sequence[str]:
    """Options of ``eqm`` that change settings."""
    return [f"--set={name}={json.dumps(value)}" for name, value in changes.items()]
