"""What is remembered of the embedded services between commands: ports, processes, deployments."""

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from infra.credentials import Credentials
from infra.files import open_private, write_private
from infra.processes import Leader, alive
from infra.services import address
from infra.stack import MLFLOW, PREFECT, S3, SERVICES, External, ServiceError, Stack

RESTORING = "restoring"
"""File of a home into which a back-up is being put; it holds the back-up's address."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class Running:
    """A service as it was started."""

    pid: int
    started_ticks: int
    digest: str

    @property
    def leader(self) -> Leader:
        """Its first process."""
        return Leader(self.pid, self.started_ticks)


@dataclass
class State:
    """What is remembered between commands, in ``stack.json``. Holds no secret."""

    ports: dict[str, int] = field(default_factory=dict)
    running: dict[str, Running] = field(default_factory=dict)
    external: External = field(default_factory=External)
    bucket: str = ""
    """The bucket, once it is made."""
    deployed: str = ""
    """Digest of the deployments, once they are registered."""

    def lives(self, service: str) -> bool:
        """Whether the process that was started for this service still runs."""
        return service in self.running and alive(self.running[service].leader)


def stack_of(
    root: Path, state: State, secrets: Credentials | None, planned: Sequence[str] = ()
) -> Stack:
    """What runs, or is about to."""
    external = state.external
    embedded = {
        name
        for name in SERVICES
        if not external.replaces(name) and (name in planned or state.lives(name))
    }
    ours = secrets if S3 in embedded else None
    at = {name: address(state.ports.get(name)) for name in embedded}
    prefect = f"{at[PREFECT]}/api" if PREFECT in at else None
    return Stack(
        home=root,
        embedded=frozenset(embedded),
        s3_endpoint=external.s3_endpoint or at.get(S3),
        s3_access_key=ours.s3_access_key if ours else None,
        s3_secret_key=ours.s3_secret_key if ours else None,
        s3_bucket=external.s3_bucket,
        mlflow_uri=external.mlflow_uri or at.get(MLFLOW),
        prefect_api_url=external.prefect_api_url or prefect,
        prefect_auth=secrets.prefect_auth if secrets and PREFECT in embedded else None,
    )


def mark_of(name: str, root: Path) -> str:
    """Mark of the processes of one service of one home."""
    return f"{name}@{root}"


def log_of(root: Path, name: str) -> Path:
    """Where a service writes what it has to say."""
    return root / "logs" / f"{name}.log"


def read_state(root: Path) -> State:
    """What is remembered; nothing before the first start. Raises ServiceError."""
    path = root / "stack.json"
    try:
        data = json.loads(path.read_bytes())
        return State(
            ports=data["ports"],
            running={name: Running(**one) for name, one in data["running"].items()},
            external=External(**data["external"]),
            bucket=data["bucket"],
            deployed=data["deployed"],
        )
    except FileNotFoundError:
        return State()
    except (ValueError, KeyError, TypeError) as error:
        raise ServiceError(
            f"{path} cannot be read ({error}): delete it, it is made anew"
        ) from error


def write_state(root: Path, state: State) -> None:
    """Remember, in one step."""
    write_private(root / "stack.json", json.dumps(asdict(state), indent=1).encode())


@contextlib.contextmanager
def locked(root: Path, report: Report) -> Iterator[None]:
    """One command at a time; the lock vanishes with its holder."""
    with open_private(root / "lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another eqm up or down to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
