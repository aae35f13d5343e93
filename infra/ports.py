"""Ports on loopback: the preferred ones where they are free, others where they are not."""

import contextlib
import os
import socket
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from infra.stack import MLFLOW, PREFECT, S3, WORKER, ServiceError

HOST = "127.0.0.1"

PREFERRED: dict[str, dict[str, int]] = {
    S3: {
        "s3": 8333,
        "s3-grpc": 18333,
        "master": 9333,
        "master-grpc": 19333,
        "volume": 9340,
        "volume-grpc": 19340,
        "filer": 8888,
        "filer-grpc": 18888,
    },
    MLFLOW: {"mlflow": 5000},
    PREFECT: {"prefect": 4200},
    WORKER: {},
}
"""First choice for every port that a service opens."""

SOCKETS = Path("/tmp")  # noqa: S108  a name that SeaweedFS chose
"""Where SeaweedFS makes a socket file for each of its gRPC ports, whatever TMPDIR is."""

TRIES = 400
PATIENCE_SECONDS = 2.0


@dataclass
class Claims:
    """Ports chosen by this program for services that do not listen yet."""

    held: dict[int, socket.socket] = field(default_factory=dict)

    def choose(self, preferred: int, *, avoid: Collection[int] = ()) -> int:
        """The preferred port or the next free one; nobody else who asks gets it meanwhile.

        Raises ServiceError where none is free.
        """
        for port in range(preferred, min(preferred + TRIES, 65536)):
            if port not in avoid and self._claim(port):
                return port
        raise ServiceError(
            f"no free port on {HOST} between {preferred} and {preferred + TRIES}: "
            "end the programs that listen there"
        )

    def _claim(self, port: int) -> bool:
        if port in self.held:
            return is_free(port)
        # Seconds pass between choosing a port and listening on it. An abstract socket, which
        # vanishes with us, keeps another start on this machine from choosing the same.
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0eqm-port-{port}")
        except OSError:
            claim.close()
            return False
        if not is_free(port) or _left_by_others(port):
            claim.close()
            return False
        self.held[port] = claim
        return True


@contextlib.contextmanager
def claims() -> Iterator[Claims]:
    """Hold chosen ports until the services listen on them."""
    mine = Claims()
    try:
        yield mine
    finally:
        for claim in mine.held.values():
            claim.close()


def _left_by_others(port: int) -> bool:
    """Whether a killed SeaweedFS of another user left a socket file where one of ours would be.

    In /tmp nobody may remove it but its owner; S3 would call it for ever, and never answer.
    """
    uid = os.geteuid()
    files = (SOCKETS / f"seaweedfs-{part}-{port}.sock" for part in PREFERRED[S3])
    return uid != 0 and any(_owner(file) not in (None, uid) for file in files)


def _owner(file: Path) -> int | None:
    try:
        return file.lstat().st_uid
    except FileNotFoundError:
        return None


def wait_until_free(port: int) -> None:
    """Give the kernel a moment to take a port from a process that has just been killed."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not is_free(port) and time.monotonic() < until:
        time.sleep(0.05)


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of loopback now."""
    with socket.socket(socket.AF_INET) as attempt:
        # As servers do; a connection of yesterday in TIME_WAIT is no obstacle.
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind((HOST, port))
        except OSError:
            return False
    return True
