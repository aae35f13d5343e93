"""A home of its own for a test, on ports of its own, whose services may be killed."""

import contextlib
import datetime
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eqm import checkpoint
from eqm.storage import Store, open_store
from infra import local, ports
from infra.deployments import PrefectApi
from infra.stack import External, Stack

VARIABLES = ("EQM_", "AWS_", "MLFLOW_", "PREFECT_")


class Home:
    """A home, whose services may be killed, and pictures of which a config speaks."""

    def __init__(self, folder: Path, name: str, *, project: Path | None = None) -> None:
        self.home, self.pictures, self.name = folder / "eqm", folder / "pictures", name
        self.project = project or local.PROJECT
        self.lines: list[str] = []
        self.stack = self.up()
        self.api = PrefectApi(self.stack.prefect_api_url or "", self.stack.environment())

    def up(self) -> Stack:
        """`eqm up`, and this process pointed at what it started."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith(VARIABLES)}
        stack = local.up(
            self.home,
            external=External(),
            environ=environ,
            report=self.lines.append,
            project=self.project,
        )
        for name, value in stack.environment().items():
            os.environ[name] = value
        return stack

    def down(self) -> None:
        """`eqm down`."""
        local.down(self.home, report=self.lines.append)

    @property
    def store(self) -> Store:
        return open_store("s3://eqm/store", cache=self.home / "test-cache")

    @property
    def config(self) -> dict[str, Any]:
        """A pipeline that takes seconds, and goes on from its champion for a little longer."""
        return {
            "preset": "tiny",
            "name": self.name,
            "source_uri": str(self.pictures),
            "source": {"kind": "folder", "image_size_px": 8, "channels": 3},
            "autoencoder": {"kind": "identity"},
            "extractor": {"fit": {"width": 8, "dimension": 8, "images": 128}},
            "network": {"width": 16, "depth": 1, "heads": 2},
            "train": {"images": 512, "batch_size": 32},
            "checkpoints": {"every_images": 3200},
            "continue_images": 64_000,
            "generate": {"samples": 128, "sampler": {"updates": 4}},
            "evaluate": {"ood": {"images": 20}, "grid_rows": 1},
            "policy": {"minimum_samples": 40, "maximum_distance_ratio": 1000.0},
            "threads": 1,
        }

    def due(
        self, deployment: str, parameters: dict[str, Any], *, seconds: float = 75
    ) -> datetime.datetime:
        """Have a schedule of a deployment fire soon, and not again this year; when."""
        found = self.api._post("/deployments/filter", {"limit": 200})
        which = next(one["id"] for one in found if one["name"] == deployment)
        at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
        schedule = {"interval": 365 * 24 * 3600, "anchor_date": at.isoformat()}
        body = [{"schedule": schedule, "active": True, "parameters": parameters}]
        self.api._post(f"/deployments/{which}/schedules", body)  # type: ignore[arg-type]
        return at

    def runs(self, flow: str) -> list[dict[str, Any]]:
        """Runs of a flow that were begun or are due now."""
        found = self.api._post("/flow_runs/filter", {"flows": {"name": {"any_": [flow]}}})
        now = datetime.datetime.now(datetime.UTC).isoformat()
        return [run for run in found if run["expected_start_time"] < now]

    def leader(self, service: str) -> int:
        return json.loads((self.home / "stack.json").read_text())["running"][service]["pid"]

    def log(self) -> str:
        return (self.home / "logs" / "worker.log").read_text()

    def kill(self, service: str) -> None:
        """A service and every process under it."""
        for pid in (self.leader(service), *descendants(self.leader(service))):
            kill(pid)

    def kill_worker(self) -> None:
        """The worker and every process under it, but not the keeper."""
        for pid in descendants(self.leader("worker")):
            kill(pid)

    def kill_everything(self) -> None:
        """Every process that has to do with this home, at once, as when a machine loses power."""
        deadline = time.monotonic() + 30
        while left := self.processes():
            assert time.monotonic() < deadline, left
            for pid in left:
                kill(pid)

    def processes(self) -> list[int]:
        """Processes that name this home in their environment or on their command line."""
        mark = str(self.home).encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    words = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
                    found += [int(entry.name)] if mark in words else []
        return found

    def training(self) -> str | None:
        """Digest of a training that has a whole checkpoint and no record yet."""
        keys = self.store.list("train/")
        digests = {key.split("/")[1] for key in keys if "/checkpoints/" in key}
        open_ones = [d for d in digests if f"train/{d}/record.json" not in keys]
        return next((d for d in open_ones if checkpoint.newest(self.store, d)), None)

    def trainings(self) -> list[str]:
        """Digests of the trainings that are sealed."""
        keys = self.store.list("train/")
        return [key.split("/")[1] for key in keys if key.endswith("/record.json")]

    def taken_slots(self) -> dict[str, int]:
        """Deployments of which somebody holds a slot."""
        limits = self.api._post("/v2/concurrency_limits/filter", {})
        return {one["name"]: one["active_slots"] for one in limits if one["active_slots"]}

    def until(self, true: Callable[[], Any], *, seconds: float = 120) -> Any:
        """Wait for something, and give it."""
        deadline = time.monotonic() + seconds
        while not (found := true()):
            assert time.monotonic() < deadline, self.log()[-6000:]
            time.sleep(0.1)
        return found


def descendants(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *descendants(int(child))]
    return found


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def own_home(folder: Path, name: str, *, project: Path | None = None) -> Iterator[Home]:
    """A home in a folder, whose services are ended afterwards; the environment is as it was."""
    before = dict(os.environ)
    apart = 2000 + os.getpid() % 1000
    moved = {
        service: {port: number + apart for port, number in wanted.items()}
        for service, wanted in ports.PREFERRED.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        for variable in [n for n in os.environ if n.startswith(VARIABLES)]:
            patch.delenv(variable)
        patch.setattr(ports, "PREFERRED", moved)
        try:
            yield Home(folder.resolve(), name, project=project)
        finally:
            local.down(folder.resolve() / "eqm", report=lambda _: None)
    os.environ.clear()
    os.environ.update(before)
