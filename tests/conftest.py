"""Real services for tests: started when first asked for, once a session, on loopback, in a folder
of their own. Torch runs deterministic and on few threads, so that bits can be compared.
"""

import functools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is loaded, and for every program that tests start: threads that wait sleep, for there
# are more of them than cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from eqm.memory import keep_freed
from eqm.threads import one_core_products
from flows import settings
from infra import local
from infra.stack import External, Stack

DISK_BYTES = 3 * 2**30
"""What a whole run leaves room for: its services write nothing on a disk that is nearly full."""
SERVICES = re.compile("s3_environment|mlflow_environment|all_environment|local.up|own_home")


def pytest_sessionstart() -> None:
    """One message instead of hundreds of tests that fail for want of room."""
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if free < DISK_BYTES:
        pytest.exit(
            f"{place} has {free / 2**30:.1f} GiB left, and tests need {DISK_BYTES / 2**30:.0f}: "
            "free some, or set TMPDIR to a folder with more",
            returncode=2,
        )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Files that need services run in one process, which starts them once; others beside it."""
    from xdist.scheduler import LoadScopeScheduling

    class ByServices(LoadScopeScheduling):
        @functools.cache  # noqa: B019  one scheduler a session
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "services" if SERVICES.search((config.rootpath / file).read_text()) else file

    return ByServices(config, log)


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> Iterator[None]:
    torch.set_num_threads(1)
    keep_freed()
    with one_core_products():
        yield


@pytest.fixture(autouse=True)
def _as_torch_was() -> Iterator[None]:
    """What a test chose for the whole process, by running a stage in it, ends with the test."""
    backends: Any = torch.backends
    knobs = (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    )
    products = [knob.fp32_precision for knob in knobs]
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    # Where it changed: the call alone imports a compiler, for seconds.
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)
    for knob, value in zip(knobs, products, strict=True):
        knob.fp32_precision = value


@pytest.fixture(scope="session")
def services_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of the session's services; whatever runs there is stopped at the end."""
    home = tmp_path_factory.mktemp("services") / "eqm"
    yield home
    local.down(home, report=lambda _: None)


def start(home: Path, *services: str) -> Stack:
    """Start services that do not run yet, away from those of whoever runs the tests."""
    taken = ("EQM_", "AWS_", "MLFLOW_", "PREFECT_")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(taken)}
    return local.up(
        home,
        external=External(worker="worker" in services),
        environ=environ,
        report=lambda _: None,
        services=services,
    )


@pytest.fixture
def s3_environment(services_home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A real S3 server, and this process pointed at it."""
    return _point(monkeypatch, start(services_home, "s3"))


@pytest.fixture(scope="module")
def s3_environment_once(services_home: Path) -> dict[str, str]:
    """A real S3 server, looked after once for all tests of a file, which point at it themselves."""
    return start(services_home, "s3").environment()


@pytest.fixture
def mlflow_environment(services_home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Real S3 and MLflow servers, and this process pointed at them."""
    return _point(monkeypatch, start(services_home, "s3", "mlflow"))


@pytest.fixture
def all_environment(services_home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """S3, MLflow, Prefect, its worker and the deployments, and this process pointed at them."""
    return _point(monkeypatch, start(services_home, "s3", "mlflow", "prefect", "worker"))


def _point(monkeypatch: pytest.MonkeyPatch, stack: Stack) -> dict[str, str]:
    for name in settings.SERVICE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    environment = stack.environment()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return environment
