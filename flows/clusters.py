"""Where stage programs run when it is not this machine: what a cluster must be told.

| variable                  | what it is                                       | if it is not set |
|---------------------------|--------------------------------------------------|------------------|
| EQM_LAUNCHER              | local, slurm or kubernetes                       | local            |
| EQM_NODE_PROCESSES        | most processes of a job on one node              | 8                |
| EQM_PROCESS_GPUS          | GPUs of a process: 1, or 0 on nodes without      | 1                |
| EQM_PROCESS_CPUS          | CPU cores of a process                           | the cluster's    |
| EQM_PROCESS_MEMORY        | memory of a process, GiB                         | the cluster's    |
| EQM_SLURM_FOLDER          | folder of job files and logs that all nodes see  | EQM_HOME/jobs    |
| EQM_SLURM_TIME            | longest time between two requeues, as 1-00:00:00 | the partition's  |
| EQM_SLURM_PARTITION       | partition                                        | Slurm's default  |
| EQM_SLURM_ACCOUNT         | account                                          | Slurm's default  |
| EQM_KUBERNETES_IMAGE      | image with this code, with a tag or digest       | must be set      |
| EQM_KUBERNETES_RUNTIME    | TrainingRuntime that jobs build on               | eqm              |
| EQM_KUBERNETES_SECRET     | Secret with the S3 credentials, by its name      | no credentials   |
| EQM_KUBERNETES_QUEUE      | queue of Kueue                                   | none             |
| EQM_KUBERNETES_CACHE      | the most that a pod keeps of S3, GiB             | no limit         |
| EQM_KUBERNETES_API        | https:// address of the API server               | the pod's own    |
| EQM_KUBERNETES_NAMESPACE  | namespace                                        | the pod's own    |
| EQM_KUBERNETES_TOKEN_FILE | file with a bearer token, read at every request  | the pod's own    |
| EQM_KUBERNETES_CA_FILE    | certificates to trust                            | the pod's own    |

Everything is checked here, once: what gets into a script or a manifest cannot leave its place.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eqm.errors import ConfigError

VARIABLES = (
    "EQM_LAUNCHER",
    "EQM_NODE_PROCESSES",
    "EQM_PROCESS_GPUS",
    "EQM_PROCESS_CPUS",
    "EQM_PROCESS_MEMORY",
    "EQM_SLURM_FOLDER",
    "EQM_SLURM_TIME",
    "EQM_SLURM_PARTITION",
    "EQM_SLURM_ACCOUNT",
    "EQM_KUBERNETES_IMAGE",
    "EQM_KUBERNETES_RUNTIME",
    "EQM_KUBERNETES_SECRET",
    "EQM_KUBERNETES_QUEUE",
    "EQM_KUBERNETES_CACHE",
    "EQM_KUBERNETES_API",
    "EQM_KUBERNETES_NAMESPACE",
    "EQM_KUBERNETES_TOKEN_FILE",
    "EQM_KUBERNETES_CA_FILE",
)
LAUNCHERS = ("local", "slurm", "kubernetes")
POD = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes gives a pod its identity."""

WORD = (r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", "a name of letters, digits, _, . and -")
LABEL = (r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", "a name of small letters, digits, . and -")
TIME = (r"(\d+-)?\d{1,3}(:\d\d){0,2}", "minutes, hours:minutes:seconds or days-hours:minutes")
PATH = (r"/[A-Za-z0-9_./+@=-]*", "an absolute path of letters, digits, and _ . / + @ = -")
IMAGE = (
    r"[A-Za-z0-9][A-Za-z0-9_./:-]*(:[A-Za-z0-9_.-]+|@sha256:[0-9a-f]{64})",
    "name:tag or @sha256",
)
NUMBER = (r"[1-9]\d{0,3}", "a whole number from 1 to 9999")


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """How processes are laid on nodes."""

    processes: int = 8
    """Most of a job on one node."""
    gpus: int = 1
    """Of each process."""
    cpus: int | None = None
    """Cores of each process; None: what the cluster gives whoever does not ask."""
    memory_gib: int | None = None
    """Of each process; None as of ``cpus``."""

    def spread(self, processes: int) -> tuple[int, int]:
        """Nodes, and processes on each of them. Raises ConfigError."""
        here = min(processes, self.processes)
        if processes % here:
            raise ConfigError(
                f"processes is {processes}, which nodes of EQM_NODE_PROCESSES={self.processes} do "
                f"not divide: set it to a multiple of {self.processes}"
            )
        return processes // here, here


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """A Slurm cluster whose commands are on this machine's PATH."""

    nodes: Nodes
    folder: Path
    time: str | None = None
    partition: str | None = None
    account: str | None = None


@dataclass(frozen=True, kw_only=True)
class Kubernetes:
    """A namespace of a Kubernetes cluster with Kubeflow Trainer."""

    nodes: Nodes
    api: str
    namespace: str
    token_file: Path
    image: str
    ca_file: Path | None = None
    runtime: str = "eqm"
    secret: str | None = None
    queue: str | None = None
    cache_gib: int | None = None
    """The most that a pod keeps of S3 in its volume; None: all that it has read."""


Cluster = Slurm | Kubernetes


def read_cluster(environ: Mapping[str, str], home: Path) -> Cluster | None:
    """The cluster that EQM_LAUNCHER names; None for this machine. Raises ConfigError."""
    kind = environ.get("EQM_LAUNCHER") or "local"
    if kind not in LAUNCHERS:
        raise ConfigError(f"EQM_LAUNCHER is {kind!r}; it must be one of {', '.join(LAUNCHERS)}")
    if kind == "local":
        return None
    processes = _checked(environ, "EQM_NODE_PROCESSES", NUMBER) or "8"
    gpus = _checked(environ, "EQM_PROCESS_GPUS", ("[01]", "0 or 1")) or "1"
    cpus = _checked(environ, "EQM_PROCESS_CPUS", NUMBER)
    memory = _checked(environ, "EQM_PROCESS_MEMORY", NUMBER)
    nodes = Nodes(
        processes=int(processes),
        gpus=int(gpus),
        cpus=int(cpus) if cpus else None,
        memory_gib=int(memory) if memory else None,
    )
    return _slurm(environ, nodes, home) if kind == "slurm" else _kubernetes(environ, nodes)


def _slurm(environ: Mapping[str, str], nodes: Nodes, home: Path) -> Slurm:
    place = {"EQM_SLURM_FOLDER": str(home / "jobs"), **environ}
    return Slurm(
        nodes=nodes,
        # It stands in lines that Slurm reads by rules of its own, which know no good quotes.
        folder=Path(_needed(place, "EQM_SLURM_FOLDER", PATH)),
        time=_checked(environ, "EQM_SLURM_TIME", TIME),
        partition=_checked(environ, "EQM_SLURM_PARTITION", WORD),
        account=_checked(environ, "EQM_SLURM_ACCOUNT", WORD),
    )


def _kubernetes(environ: Mapping[str, str], nodes: Nodes) -> Kubernetes:
    known = {**_pod(environ), **{name: value for name, value in environ.items() if value}}
    image = _needed(known, "EQM_KUBERNETES_IMAGE", IMAGE)
    if image.endswith(":latest"):
        raise ConfigError(
            f"EQM_KUBERNETES_IMAGE is {image!r}, which is another image every week: name a version"
        )
    ca = known.get("EQM_KUBERNETES_CA_FILE")
    cache = _checked(known, "EQM_KUBERNETES_CACHE", NUMBER)
    return Kubernetes(
        nodes=nodes,
        api=_api(known),
        namespace=_needed(known, "EQM_KUBERNETES_NAMESPACE", LABEL),
        token_file=Path(_needed(known, "EQM_KUBERNETES_TOKEN_FILE", (r".+", "a file"))),
        ca_file=Path(ca) if ca else None,
        image=image,
        runtime=_checked(known, "EQM_KUBERNETES_RUNTIME", LABEL) or "eqm",
        secret=_checked(known, "EQM_KUBERNETES_SECRET", LABEL),
        queue=_checked(known, "EQM_KUBERNETES_QUEUE", LABEL),
        cache_gib=int(cache) if cache else None,
    )


def _pod(environ: Mapping[str, str]) -> dict[str, str]:
    """What a pod knows of the cluster that it is in; nothing elsewhere."""
    host = environ.get("KUBERNETES_SERVICE_HOST")
    if not host or not (POD / "token").exists():
        return {}
    host = f"[{host}]" if ":" in host else host
    return {
        "EQM_KUBERNETES_API": f"https://{host}:{environ.get('KUBERNETES_SERVICE_PORT', '443')}",
        "EQM_KUBERNETES_NAMESPACE": (POD / "namespace").read_text().strip(),
        "EQM_KUBERNETES_TOKEN_FILE": str(POD / "token"),
        "EQM_KUBERNETES_CA_FILE": str(POD / "ca.crt"),
    }


def _api(environ: Mapping[str, str]) -> str:
    # A token in the clear only where nobody else listens.
    plain = r"http://(127\.0\.0\.1|localhost)(:\d+)?"
    allowed = (rf"(https://[A-Za-z0-9.:\[\]-]+|{plain})(/[A-Za-z0-9_./-]*)?", "an https:// address")
    return _needed(environ, "EQM_KUBERNETES_API", allowed).rstrip("/")


def _needed(environ: Mapping[str, str], name: str, allowed: tuple[str, str]) -> str:
    value = _checked(environ, name, allowed)
    if value is None:
        raise ConfigError(
            f"{name} is not set, and EQM_LAUNCHER={environ.get('EQM_LAUNCHER')} needs it: set it "
            f"to {allowed[1]}"
        )
    return value


def _checked(environ: Mapping[str, str], name: str, allowed: tuple[str, str]) -> str | None:
    value = environ.get(name) or None
    if value is not None and not re.fullmatch(allowed[0], value):
        # The log is no place for a password that somebody put into an address.
        shown = re.sub(r"//[^/@]*@", "//...@", value)
        raise ConfigError(f"{name} is {shown!r}; it must be {allowed[1]}")
    return value
