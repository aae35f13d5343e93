"""What the services are to those who use them: addresses, credentials, an environment.

Values only; `infra.local` makes them and starts the processes behind them.
"""

import hashlib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from eqm.errors import EqmError

S3, MLFLOW, PREFECT, WORKER = SERVICES = ("s3", "mlflow", "prefect", "worker")
"""Embedded services, in the order in which they are started."""

BUCKET = "eqm"
REGION = "us-east-1"
POOL = "eqm"
JOBS_POOL = "eqm-jobs"
"""Whose runs are Jobs of Kubernetes: infra/k8s/README.md."""

LOOPBACK = ("127.0.0.1", "localhost")

UNWANTED = frozenset({"PYTHONDONTWRITEBYTECODE"})
"""Without bytecode every start of a service compiles hundreds of modules again."""

PROXIES = ("all_proxy", "http_proxy", "https_proxy")


class ServiceError(EqmError):
    """A service cannot be started, reached or stopped."""


@dataclass(frozen=True)
class External:
    """Services of somebody else; each one given replaces the embedded one."""

    s3_endpoint: str | None = None
    mlflow_uri: str | None = None
    prefect_api_url: str | None = None
    s3_bucket: str = BUCKET
    worker: bool = True
    """Whether a process worker and the deployments are wanted on this machine."""

    def replaces(self, service: str) -> bool:
        """Whether the embedded service of this name is not to be started."""
        given = {
            S3: self.s3_endpoint is not None,
            MLFLOW: self.mlflow_uri is not None,
            PREFECT: self.prefect_api_url is not None,
            WORKER: not self.worker,
        }
        return given[service]


@dataclass(frozen=True)
class Stack:
    """Where the services are and how to be let in. None: not started, or not ours to know."""

    home: Path
    embedded: frozenset[str]
    """Which of SERVICES run here, started by `infra.local`."""
    s3_endpoint: str | None = None
    s3_access_key: str | None = None
    s3_secret_key: str | None = field(default=None, repr=False)
    s3_bucket: str = BUCKET
    s3_region: str = REGION
    mlflow_uri: str | None = None
    prefect_api_url: str | None = None
    prefect_auth: str | None = field(default=None, repr=False)

    @property
    def prefect_ui_url(self) -> str | None:
        """Address of Prefect's pages."""
        return self.prefect_api_url.removesuffix("/api") if self.prefect_api_url else None

    def replaced_by(self, external: External) -> "Stack":
        """The same with services of somebody else where these are given."""
        kept = frozenset(s for s in self.embedded if s == WORKER or not external.replaces(s))
        own_s3, own_prefect = S3 in kept, PREFECT in kept
        return replace(
            self,
            embedded=kept,
            s3_endpoint=external.s3_endpoint or self.s3_endpoint,
            s3_access_key=self.s3_access_key if own_s3 else None,
            s3_secret_key=self.s3_secret_key if own_s3 else None,
            mlflow_uri=external.mlflow_uri or self.mlflow_uri,
            prefect_api_url=external.prefect_api_url or self.prefect_api_url,
            prefect_auth=self.prefect_auth if own_prefect else None,
        )

    def environment(self) -> dict[str, str]:
        """Variables with which boto3, MLflow and Prefect of a child process find the services."""
        mine = {
            "EQM_HOME": str(self.home),
            "AWS_ENDPOINT_URL_S3": self.s3_endpoint,
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PREFECT_API_URL": self.prefect_api_url,
            "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }
        if self.s3_access_key is not None:
            mine["AWS_ACCESS_KEY_ID"] = self.s3_access_key
            mine["AWS_SECRET_ACCESS_KEY"] = self.s3_secret_key
            mine["AWS_DEFAULT_REGION"] = self.s3_region
        if PREFECT in self.embedded:
            # Somebody else's Prefect is reached through the user's own profile.
            mine["PREFECT_HOME"] = str(self.home / "prefect")
            mine["PREFECT_API_AUTH_STRING"] = self.prefect_auth
        return {name: value for name, value in mine.items() if value is not None}


@dataclass(frozen=True)
class ServiceStatus:
    """One line of `eqm status`."""

    name: str
    state: str
    """running, full (it answers, and writes nothing, for the disk has no room), silent (the process
    lives but does not answer), stopped or external."""
    address: str
    pid: int | None = None


def child_environment(environ: Mapping[str, str], stack: Stack) -> dict[str, str]:
    """Environment for a child process: the given one, with what would mislead it taken out."""
    kept = {k: v for k, v in environ.items() if not (is_unwanted(k, v) or _misleads(k, stack))}
    return {**kept, **without_proxy(environ), **stack.environment()}


def is_unwanted(name: str, value: str) -> bool:
    """Whether no child should have this variable.

    Where httpx cannot speak SOCKS, no client of Prefect can be made with such a proxy in the
    environment, not even one for this machine.
    """
    socks = name.lower() in PROXIES and value.lower().startswith("socks")
    return name in UNWANTED or (socks and importlib.util.find_spec("socksio") is None)


def _misleads(name: str, stack: Stack) -> bool:
    # A session token or a profile of a real cloud would spoil the signatures of the embedded S3.
    if stack.s3_access_key is not None and name.startswith("AWS_"):
        return name != "AWS_CA_BUNDLE"
    if MLFLOW in stack.embedded and name.startswith("MLFLOW_"):
        return True
    return PREFECT in stack.embedded and name.startswith("PREFECT_")


def without_proxy(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that keep requests to this machine away from a proxy."""
    given = environ.get("NO_PROXY") or environ.get("no_proxy") or ""
    hosts = [host.strip() for host in given.split(",") if host.strip()]
    hosts += [host for host in LOOPBACK if host not in hosts]
    return {"NO_PROXY": ",".join(hosts), "no_proxy": ",".join(hosts)}


def digest_of(parts: Iterable[bytes | str]) -> str:
    """SHA-256 over parts, each with its length, so that no two lists share a digest."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "big") + data)
    return total.hexdigest()
