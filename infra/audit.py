"""What is locked, installed and written, against known holes: ``python -m infra.audit``.

Works without a network: the floors below are kept by hand, each with the advisories that set it.
Ruff bans what it knows a rule for (pickle, ``shell=True``, ``yaml.load``: rules S and TID251 in
pyproject.toml); the arguments that it has no rule for are looked for here. Exit status 1 and one
line for each problem.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.version import Version

PROJECT = Path(__file__).resolve().parent.parent
SOURCES = ("eqm", "flows", "infra", "bench")


@dataclass(frozen=True)
class Floor:
    """The oldest version of a package that is safe, and the first that does not work."""

    package: str
    oldest: str
    why: str
    """Advisories that older versions are subject to."""
    below: str | None = None


FLOORS = (
    Floor(
        "mlflow",
        "3.17",
        "CVE-2026-64849 (webhooks reach inner addresses), CVE-2026-2652 (routes without accounts), "
        "CVE-2026-2033 (path traversal to code), CVE-2026-2614, CVE-2026-2635, CVE-2026-118628, "
        "PYSEC-2026-93, PYSEC-2026-94, CVE-2024-37052 to 37060 (pickles)",
    ),
    Floor("torch", "2.10", "CVE-2025-32434 and CVE-2026-24747 (weights_only does not hold)"),
    Floor(
        "prefect",
        "3.8",
        "GHSA-4hh5-2678-83fx (no accounts), GHSA-4v9f-r55g-g6hc (CORS), argument injection in git "
        "steps, RemoteFileSystem outside of its folder",
    ),
    Floor("fastapi", "0.139", "Prefect's server does not start on 0.151", below="0.151"),
    Floor("sqlalchemy", "2.0", "Prefect's schedules never fire on 2.1", below="2.1"),
    Floor("aiohttp", "3.12.14", "CVE-2025-53643"),
    Floor("certifi", "2024.7.4", "CVE-2024-39689"),
    Floor("cryptography", "44.0.1", "CVE-2024-12797"),
    Floor("flask", "3.1.1", "CVE-2025-47278"),
    Floor("gitpython", "3.1.41", "CVE-2024-22190"),
    Floor("gunicorn", "22.0.0", "CVE-2024-1135"),
    Floor("h11", "0.16.0", "CVE-2025-43859"),
    Floor("h2", "4.3.0", "CVE-2025-57804"),
    Floor("idna", "3.7", "CVE-2024-3651"),
    Floor("jinja2", "3.1.6", "CVE-2025-27516"),
    Floor("pillow", "11.3.0", "CVE-2025-48379"),
    Floor("protobuf", "6.31.1", "CVE-2025-4565"),
    Floor("pyarrow", "14.0.1", "CVE-2023-47248 (pickles)"),
    Floor("pyyaml", "5.4", "CVE-2020-14343"),
    Floor("requests", "2.32.4", "CVE-2024-47081"),
    Floor("setuptools", "78.1.1", "CVE-2025-47273"),
    Floor("skops", "0.12.0", "CVE-2025-54412, CVE-2025-54413"),
    Floor("starlette", "0.49.1", "CVE-2025-62727"),
    Floor("tqdm", "4.66.3", "CVE-2024-34062"),
    Floor("urllib3", "2.5.0", "CVE-2025-50181, CVE-2025-50182"),
    Floor("werkzeug", "3.0.6", "CVE-2024-49766, CVE-2024-49767"),
)

BANNED_ARGUMENTS = {
    "allow_pickle": (True, "numpy would run code that is in the file"),
    "weights_only": (False, "torch would run code that is in the file"),
    "shell": (True, "a name with a semicolon would be a command"),
    "verify": (False, "anybody on the way could answer"),
    "trust_remote_code": (True, "code of a hub would run"),
}
LOADERS = {"load": "weights_only"}
"""Functions of torch that must be told so."""
DCP = "torch.distributed.checkpoint"
"""Its ``.metadata`` is a pickle."""
BANNED_MODULES = ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle")
"""What they read, they run; torch's own restricted loader is the only way in for foreign files."""


def main() -> int:
    """Print every problem; 1 if there is one."""
    lock = (PROJECT / "requirements.lock").read_text()
    found = [*locked(lock), *installed(), *written(PROJECT)]
    for problem in found:
        sys.stdout.write(f"{problem}\n")
    if not found:
        sys.stdout.write(f"audit: {len(FLOORS)} floors and the sources hold\n")
    return 1 if found else 0


# -- versions -----------------------------------------------------------------------------------


def locked(lock: str) -> Iterator[str]:
    """What a lock file pins outside of the floors, or takes from elsewhere than an index."""
    pins = re.findall(r"^([A-Za-z0-9_.-]+)==([^ ;\\]+)", lock, re.MULTILINE)
    for name, version in pins:
        yield from _outside(name, version, "requirements.lock")
    missing = {floor.package for floor in FLOORS} - {_plain(name) for name, _ in pins}
    for name in sorted(missing):
        yield f"requirements.lock does not pin {name}: run make lock"
    for line in lock.splitlines():
        if re.search(r"://|^-e |^--(extra-)?index-url|^--find-links", line):
            yield f"requirements.lock names a place: {line.strip()[:80]}"
    entries = re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE)
    for entry in entries:
        if "==" in entry and "--hash=sha256:" not in entry:
            yield f"requirements.lock has no hash of {entry.split()[0]}: run make lock"


def installed() -> Iterator[str]:
    """What is installed outside of the floors."""
    for floor in FLOORS:
        try:
            version = metadata.version(floor.package)
        except metadata.PackageNotFoundError:
            yield f"{floor.package} is not installed: run make setup"
        else:
            yield from _outside(floor.package, version, "this environment")


def _outside(name: str, version: str, where: str) -> Iterator[str]:
    for floor in FLOORS:
        if floor.package != _plain(name):
            continue
        found = Version(version)
        if found < Version(floor.oldest) or (floor.below and found >= Version(floor.below)):
            wanted = f">= {floor.oldest}" + (f", < {floor.below}" if floor.below else "")
            yield f"{name} {version} in {where} must be {wanted}: {floor.why}"


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# -- sources ------------------------------------------------------------------------------------


def written(project: Path) -> Iterator[str]:
    """Calls in our own sources that would trust what is read."""
    for folder in SOURCES:
        for path in sorted((project / folder).rglob("*.py")):
            for line, what in unsafe_calls(path.read_text()):
                yield f"{path.relative_to(project)}:{line}: {what}"


def unsafe_calls(source: str) -> Iterator[tuple[int, str]]:
    """Line and reason of every call or import that would run what is read."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield from _unsafe(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for name in _imported(node):
                if name.partition(".")[0] in BANNED_MODULES or name == DCP:
                    yield node.lineno, f"import of {name}: what it reads, it runs"


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    names = [f"{node.module}.{name.name}" for name in node.names]
    # Its error may be caught; torch raises it where it refuses a file.
    return [name for name in names if name != "pickle.UnpicklingError"]


def _unsafe(call: ast.Call) -> Iterator[tuple[int, str]]:
    given = {word.arg: word.value for word in call.keywords}
    for name, (banned, why) in BANNED_ARGUMENTS.items():
        value = given.get(name)
        if isinstance(value, ast.Constant) and value.value is banned:
            yield call.lineno, f"{name}={banned}: {why}"
    function = call.func
    if isinstance(function, ast.Attribute) and function.attr in LOADERS:
        owner, needed = function.value, LOADERS[function.attr]
        if isinstance(owner, ast.Name) and owner.id == "torch" and needed not in given:
            yield call.lineno, f"torch.{function.attr} without {needed}=True"


if __name__ == "__main__":
    sys.exit(main())
