"""A training and the MLflow that shows it, both killed: in the end MLflow has what the log has."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chain
import pytest
from mlflow import MlflowClient
from unused import unused_port
from waiting import wait_for

from eqm.config import SamplerConfig
from eqm.errors import TrackingError
from eqm.events import Event, events_of
from eqm.records import to_json
from eqm.registry import check
from eqm.stage import job_digest
from eqm.storage import LocalStore
from flows.jobs import Plan
from flows.launch import LocalLauncher
from flows.settings import Settings
from flows.train import register_model

pytestmark = pytest.mark.services

BATCH = 32
ROOT = Path(__file__).parent.parent.parent


PACED = """
import sys, time
from pathlib import Path
from eqm import train

step, gates = train.step, Path(sys.argv[2])

def paced(run, batch, stop):
    gate = gates / str(run.images_seen // 32)
    while gate.exists():
        time.sleep(0.02)
    return step(run, batch, stop)

train.step = paced
sys.exit(train.main(sys.argv[1:2]))
"""
"""Training that stops before the update of a number for as long as a file of that name exists."""


class Server:
    """An MLflow server of this test alone, that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.port = unused_port()
        self.uri, self.folder = f"http://127.0.0.1:{self.port}", folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--workers=1"),
                f"--backend-store-uri=sqlite:///{self.folder}/mlflow.db",
                f"--artifacts-destination={self.folder}/artifacts",
                *("--host=127.0.0.1", f"--port={self.port}"),
            ],
            env=environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(self.answers)

    def answers(self) -> bool:
        try:
            check(self.uri)
        except TrackingError:
            return False
        return True

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    return {**kept, "OMP_NUM_THREADS": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path)
    found.start()
    try:
        yield found
    finally:
        found.kill()


@contextlib.contextmanager
def training(path: Path, gates: Path) -> Iterator[subprocess.Popen[str]]:
    line = [sys.executable, "-c", PACED, str(path), str(gates)]
    child = subprocess.Popen(line, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def marked(client: MlflowClient, digest: str) -> int:
    """How far MLflow has the log: images seen."""
    experiment = client.get_experiment_by_name("eqm-tiny")
    if experiment is None:
        return -1
    runs = client.search_runs([experiment.experiment_id], f"tags.`eqm.digest` = '{digest}'")
    return json.loads(runs[0].data.tags["eqm.mirrored"])["images_seen"] if runs else -1


@pytest.mark.slow
def test_killed_both_and_started_again_mlflow_has_what_the_log_has(
    latents: chain.Chain, tmp_path: Path, server: Server
) -> None:
    store = chain.copied(latents, tmp_path / "store", without=())
    runtime: dict[str, Any] = {
        "checkpoint_every_images": 4 * BATCH,
        "grid_every_images": 16 * BATCH,
        "grid_sampler": SamplerConfig(updates=2),
        "mlflow_uri": server.uri,
        "mlflow_experiment": "eqm-tiny",
    }
    job = chain.job(latents.config, store, "train", latents.records, **runtime)
    path, digest, client = tmp_path / "job.json", job_digest(job), MlflowClient(server.uri)
    path.write_text(json.dumps(to_json(job)))

    gates = tmp_path / "gates"
    gates.mkdir()
    for update in (22, 43):
        (gates / str(update)).touch()

    # Both die in the middle: first MLflow, and training goes on; then training, where the log is
    # ahead of the checkpoint.
    with training(path, gates) as child:
        wait_for(lambda: child.poll() is not None or marked(client, digest) == 20 * BATCH)
        assert child.poll() is None, child.communicate()
        server.kill()
        (gates / "22").unlink()
        wait_for(lambda: child.poll() is not None or checkpoints(store, digest) == 10)
        assert child.poll() is None, child.communicate()
    assert store.record("train", digest) is None
    (gates / "43").unlink()

    # It starts, and comes to its end, without MLflow.
    with training(path, gates) as child:
        _, said = child.communicate(timeout=120)
    assert child.returncode == 0, said
    assert said.count("Training goes on") == 1
    assert "did not take all of this run" in said
    record = store.record("train", digest)
    assert record is not None

    # Registered with MLflow there, the run is shown first: the version can name it.
    server.start()
    settings = Settings(home=tmp_path, store=str(store.root), mlflow_uri=server.uri)
    plan = Plan(latents.config, settings, store, LocalLauncher(folder=tmp_path, environment={}))
    version = register_model.fn(plan, record)
    assert client.get_model_version("eqm-tiny", str(version.number)).run_id == run_of(
        client, digest
    )

    # The same command once more finds nothing to send.
    with training(path, gates) as child:
        _, said = child.communicate(timeout=120)
    assert child.returncode == 0, said
    assert "is sealed already" in said
    assert "warning" not in said, said

    events = events_of(store.get(record.logs["events.jsonl"]), "log")
    assert [event.kind for event in events].count("resume") >= 1
    assert [e.images_seen for e in events if e.kind == "metrics"] == [
        BATCH * n for n in range(1, 61)
    ]
    assert shown(client, digest) == told(events)
    # Also those that were made while MLflow was away, or before the kill.
    looks = [16 * BATCH, 32 * BATCH, 48 * BATCH, 60 * BATCH]
    grids = [f"samples/{images:012d}.png" for images in looks]
    assert [e.images_seen for e in events if e.kind == "samples"] == looks
    assert [
        found.path for found in client.list_artifacts(run_of(client, digest), "samples")
    ] == grids
    assert [f"samples/{name[8:20]}.png" for name in sorted(record.logs) if "grid" in name] == grids


def checkpoints(store: LocalStore, digest: str) -> int:
    return len(store.list(f"train/{digest}/checkpoints/"))


def run_of(client: MlflowClient, digest: str) -> str:
    experiment = client.get_experiment_by_name("eqm-tiny")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`eqm.digest` = '{digest}'")
    return run.info.run_id


Point = tuple[str, int, float, int]


def told(events: list[Event]) -> list[Point]:
    """(name, step, value, time) of all that the log tells."""
    return sorted(
        (name, event.images_seen, value, event.at_ms)
        for event in events
        for name, value in event.figures.items()
    )


def shown(client: MlflowClient, digest: str) -> list[Point]:
    """The same of all that MLflow shows; a list, so that nothing may be there twice."""
    experiment = client.get_experiment_by_name("eqm-tiny")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`eqm.digest` = '{digest}'")
    assert run.info.status == "FINISHED"
    return sorted(
        (point.key, point.step, point.value, point.timestamp)
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    )
