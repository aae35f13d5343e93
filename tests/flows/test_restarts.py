"""Machines that lose power, servers that are down when a schedule falls due, runs that hang.

Each with services of its own, and with nobody who cleans up.
"""

import datetime
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deployed import ended, pictures, start_deployment
from own_home import Home, own_home

from eqm import champion, checkpoint, lease

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(900)]

STUCK = """
from flows.weekly import weekly

# The flow itself, in a week of {seconds} seconds.
weekly = weekly.with_options(timeout_seconds={seconds})
"""
STUCK_SECONDS = 120
DEPLOYMENT = """
name: stuck
deployments:
  - name: weekly
    entrypoint: stuck.py:weekly
    work_pool: {name: eqm}
    concurrency_limit: {limit: 1, collision_strategy: ENQUEUE, grace_period_seconds: 300}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with own_home(tmp_path_factory.mktemp("restarts"), "test-restarts") as one:
        pictures(one.pictures)
        yield one


def with_images(home: Home, name: str, images: int) -> dict[str, Any]:
    """The config of a model of its own, whose training takes so many images."""
    return {**home.config, "name": name, "train": {"images": images, "batch_size": 32}}


def test_a_machine_that_lost_power_goes_on_where_it_was(home: Home) -> None:
    config = with_images(home, "test-power", 64_000)
    run = start_deployment(home.api, "weekly", {"config": config})
    digest = home.until(home.training, seconds=240)
    kept = checkpoint.newest(home.store, digest)
    assert kept is not None
    home.kill_everything()

    home.up()
    state = ended(home.api, run, seconds=300)
    assert state["type"] == "COMPLETED", home.log()[-6000:]
    # The same run, started a second time, and nobody beside it.
    (shown,) = home.runs("weekly")
    assert (shown["id"], shown["run_count"]) == (run, 2)
    assert home.trainings() == [digest]
    # Not from the beginning.
    (start, again) = begun(home, digest)
    assert start == ("start", 0)
    assert again[0] == "resume"
    assert again[1] >= kept.images_seen > 0
    held = lease.read(home.store, checkpoint.lease_key(digest))
    assert held is not None
    assert (held.token, held.released) == (2, True)
    assert [entry.version for entry in champion.history(home.store, "eqm-test-power")] == [1]
    assert not home.taken_slots()


def begun(home: Home, digest: str) -> list[tuple[str, int]]:
    """How and at which image each attempt at a sealed training began, by its own log."""
    record = home.store.record("train", digest)
    assert record is not None
    lines = home.store.get(record.logs["events.jsonl"]).splitlines()
    events = [json.loads(line) for line in lines]
    return [(e["kind"], e["images_seen"]) for e in events if e["kind"] in ("start", "resume")]


def test_what_fell_due_while_all_was_off_is_run_once(home: Home) -> None:
    """A second run of the same deployment is asked for at the moment in which all is on again."""
    config = with_images(home, "test-missed", 6400)
    before = {run["id"] for run in home.runs("weekly")}
    at = home.due("weekly", {"config": config})
    home.until(lambda: is_planned(home, at))
    home.down()
    time.sleep(max(0.0, (at - datetime.datetime.now(datetime.UTC)).total_seconds()) + 5)

    home.up()
    beside = start_deployment(home.api, "weekly", {"config": config})

    def both() -> list[dict[str, Any]]:
        found = [run for run in home.runs("weekly") if run["id"] not in before]
        return found if {run["state"]["type"] for run in found} == {"COMPLETED"} else []

    found = home.until(both, seconds=400)
    (missed,) = [run for run in found if run["id"] != beside]
    due = datetime.datetime.fromisoformat(missed["expected_start_time"])
    assert abs((due - at).total_seconds()) < 1
    assert [run["run_count"] for run in found] == [1, 1]
    # One after the other: what the first sealed, the second found.
    first, second = sorted(found, key=lambda run: run["start_time"])
    assert first["end_time"] <= second["start_time"]
    (entry,) = champion.history(home.store, "eqm-test-missed")
    held = lease.read(home.store, checkpoint.lease_key(entry.train.digest))
    assert held is not None
    assert held.token == 1
    assert not home.taken_slots()


def is_planned(home: Home, at: datetime.datetime) -> bool:
    """Whether Prefect has made the run of a moment ahead of it."""
    asked = {"flows": {"name": {"any_": ["weekly"]}}}
    planned = home.api._post("/flow_runs/filter", asked)
    times = [datetime.datetime.fromisoformat(run["expected_start_time"]) for run in planned]
    return any(abs((one - at).total_seconds()) < 1 for one in times)


def test_a_run_that_hangs_is_ended_and_holds_nothing(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "stuck.py").write_text(STUCK.format(seconds=STUCK_SECONDS))
    (project / "prefect.yaml").write_text(DEPLOYMENT)
    with own_home(tmp_path, "test-stuck", project=project) as home:
        pictures(home.pictures)
        config = with_images(home, "test-stuck", 6400)
        run = start_deployment(home.api, "weekly", {"config": config})
        stuck = home.until(lambda: trainer(home), seconds=240)
        os.kill(stuck, signal.SIGSTOP)
        waiting = start_deployment(home.api, "weekly", {"config": config})

        state = ended(home.api, run, seconds=STUCK_SECONDS + 240)
        assert (state["type"], state["name"]) == ("FAILED", "TimedOut"), home.log()[-6000:]
        assert not Path(f"/proc/{stuck}").exists()
        # The one that waited has the slot now, trains, and is done.
        state = ended(home.api, waiting, seconds=240)
        assert state["type"] == "COMPLETED", home.log()[-6000:]
        (digest,) = home.trainings()
        held = lease.read(home.store, checkpoint.lease_key(digest))
        assert held is not None
        assert held.released
        assert not home.taken_slots()


def trainer(home: Home) -> int | None:
    """The process that trains, once it holds its lease or is about to."""
    for pid in home.processes():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"eqm.train" in words:
            return pid
    return None
