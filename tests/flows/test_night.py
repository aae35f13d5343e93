"""A night, with real services: schedules fire, and everything that they need is killed once.

New pictures lie there; the weekly pipeline and the nightly look at the champion fall due. While
the weekly one trains, its worker and every process under it are killed. While it is started again,
the Prefect server is killed; before it registers its model, MLflow is. In the morning all runs have
ended well, the one that was killed went on from its checkpoint, and the reports are there.
"""

import contextlib
import datetime
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from deployed import ended, pictures, start_deployment
from mlflow import MlflowClient

from eqm import champion, checkpoint, lease
from eqm.dossier import chain_of
from eqm.records import Record
from eqm.stage import open_ref, verify
from eqm.storage import Store, open_store
from infra import local, ports
from infra.deployments import PrefectApi
from infra.stack import External, Stack

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(900)]

NAME = "test-night"
MODEL = f"eqm-{NAME}"


class Night:
    """A home of its own, whose services may be killed."""

    def __init__(self, folder: Path) -> None:
        self.home, self.pictures = folder / "eqm", folder / "pictures"
        self.lines: list[str] = []
        self.stack = self.up()
        self.api = PrefectApi(self.stack.prefect_api_url or "", self.stack.environment())

    def up(self) -> Stack:
        taken = ("EQM_", "AWS_", "MLFLOW_", "PREFECT_")
        environ = {k: v for k, v in os.environ.items() if not k.startswith(taken)}
        stack = local.up(self.home, external=External(), environ=environ, report=self.lines.append)
        for name, value in stack.environment().items():
            os.environ[name] = value
        return stack

    @property
    def store(self) -> Store:
        return open_store("s3://eqm/store", cache=self.home / "test-cache")

    @property
    def config(self) -> dict[str, Any]:
        return {
            "preset": "tiny",
            "name": NAME,
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

    def due(self, deployment: str, parameters: dict[str, Any]) -> None:
        """Have a schedule of a deployment fire soon, and not again this year."""
        found = self.api._post("/deployments/filter", {"limit": 200})
        which = next(one["id"] for one in found if one["name"] == deployment)
        at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=75)
        schedule = {"interval": 365 * 24 * 3600, "anchor_date": at.isoformat()}
        body = [{"schedule": schedule, "active": True, "parameters": parameters}]
        self.api._post(f"/deployments/{which}/schedules", body)  # type: ignore[arg-type]

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
        for pid in (self.leader(service), *descendants(self.leader(service))):
            kill(pid)

    def kill_worker(self) -> None:
        """The worker and every process under it, but not the keeper."""
        for pid in descendants(self.leader("worker")):
            kill(pid)

    def training(self) -> str | None:
        """Digest of a training that has a whole checkpoint and no record yet."""
        keys = self.store.list("train/")
        digests = {key.split("/")[1] for key in keys if "/checkpoints/" in key}
        open_ones = [d for d in digests if f"train/{d}/record.json" not in keys]
        return next((d for d in open_ones if checkpoint.newest(self.store, d)), None)


def descendants(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *descendants(int(child))]
    return found


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def until(true: Callable[[], Any], night: Night, *, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, night.log()[-6000:]
        time.sleep(0.1)
    return found


@pytest.fixture
def night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Night]:
    for name in [n for n in os.environ if n.startswith(("EQM_", "AWS_", "MLFLOW_", "PREFECT_"))]:
        monkeypatch.delenv(name)
    # What `up` puts there is taken away again by the same.
    for name in ("EQM_HOME", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "")
    apart = 2000 + os.getpid() % 1000
    moved = {
        service: {name: port + apart for name, port in wanted.items()}
        for service, wanted in ports.PREFERRED.items()
    }
    monkeypatch.setattr(ports, "PREFERRED", moved)
    before = dict(os.environ)
    try:
        yield Night(tmp_path.resolve())
    finally:
        local.down(tmp_path.resolve() / "eqm", report=lambda _: None)
        os.environ.clear()
        os.environ.update(before)


def test_in_the_morning_all_is_done_once(night: Night) -> None:
    pictures(night.pictures)
    state = ended(
        night.api, start_deployment(night.api, "weekly", {"config": night.config}), seconds=400
    )
    assert state["type"] == "COMPLETED", night.log()[-6000:]
    (first,) = champion.history(night.store, MODEL)

    pictures(night.pictures / "new", seed=1)
    for name in ("circles", "squares"):
        for file in (night.pictures / "new" / name).iterdir():
            file.rename(night.pictures / name / f"new-{file.name}")
        (night.pictures / "new" / name).rmdir()
    (night.pictures / "new").rmdir()
    night.due("weekly", {"config": night.config})
    digest = until(night.training, night, seconds=240)
    night.kill_worker()
    before = checkpoint.newest(night.store, digest)
    assert before is not None

    # The keeper starts a worker, and the run that nobody works on again.
    until(lambda: "is Running, and its process is gone" in night.log(), night)
    night.kill("prefect")
    night.up()
    until(lambda: lease.read(night.store, checkpoint.lease_key(digest)).token == 2, night)
    night.kill("mlflow")
    until(lambda: night.store.record("train", digest), night)
    until(lambda: "MLflow" in night.log() and "Retry" in night.log(), night)
    night.up()
    night.due("reevaluate-champion", {"config": night.config})

    def morning() -> bool:
        runs = [*night.runs("weekly"), *night.runs("reevaluate-champion")]
        return len(runs) == 3 and all(run["state"]["type"] == "COMPLETED" for run in runs)

    until(morning, night, seconds=240)
    assert sorted(run["run_count"] for run in night.runs("weekly")) == [1, 2]
    assert [run["run_count"] for run in night.runs("reevaluate-champion")] == [1]

    entries = champion.history(night.store, MODEL)
    assert [entry.version for entry in entries] == [1, 2]
    trained = open_ref(night.store, entries[1].train)
    assert trained.digest == digest
    assert trained.config["train"]["init_from"]["sha256"] == (
        open_ref(night.store, first.train).outputs["ema.safetensors"].sha256
    )
    for record in chain_of(night.store, open_ref(night.store, entries[1].evaluation)):
        verify(night.store, record)
    # Two trainings were done, the second by two processes one after the other.
    assert len([k for k in night.store.list("train/") if k.endswith("record.json")]) == 2
    held = lease.read(night.store, checkpoint.lease_key(digest))
    assert held is not None
    assert (held.token, held.released) == (2, True)
    for entry in entries:
        assert night.store.exists(entry.report)
    (watch,) = records(night.store, "watch")
    assert (watch.values["outcome"], watch.values["new_images"]) == ("continued", 24)
    (looked,) = records(night.store, "night")
    assert looked.inputs["train"] == entries[1].train
    assert looked.values["drift"]["outcome"] in ("none", "drift")
    shown = MlflowClient().get_model_version_by_alias(MODEL, "champion")
    assert int(shown.version) == 2
    metrics = MlflowClient().get_run(shown.run_id).data.metrics
    assert "nightly/drift" in metrics
    limits = night.api._post("/v2/concurrency_limits/filter", {})
    assert all(limit["active_slots"] == 0 for limit in limits), limits


def records(store: Store, stage: str) -> list[Record]:
    keys = [key for key in store.list(f"{stage}/") if re.fullmatch(r".*/record\.json", key)]
    return [record for key in keys if (record := store.record(stage, key.split("/")[1]))]
