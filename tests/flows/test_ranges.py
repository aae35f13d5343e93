"""Encoding on a work pool: ranges of shards that flow runs share."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deployed import ended, pictures, start_deployment

from eqm.latent_set import open_manifest
from eqm.storage import open_store
from flows.encode import encode, ranges
from infra.deployments import PrefectApi


@pytest.mark.parametrize("shards", [1, 2, 7, 1250])
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_ranges_hold_every_shard_once_and_are_of_nearly_one_size(shards: int, workers: int) -> None:
    found = ranges(shards, workers)
    assert [n for first, end in found for n in range(first, end)] == list(range(shards))
    sizes = [end - first for first, end in found]
    assert len(sizes) == min(shards, workers)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 0


def test_no_worker_is_refused() -> None:
    from eqm.errors import ConfigError

    with pytest.raises(ConfigError, match="workers is 0; it must be 1 or greater"):
        encode.fn(workers=0)


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(400)
def test_a_deployed_run_shares_its_shards_among_flow_runs(
    all_environment: dict[str, str], tmp_path: Path
) -> None:
    config = config_of(tmp_path, "test-ranges", seed=1)
    api = PrefectApi(all_environment["PREFECT_API_URL"], all_environment)
    home = Path(all_environment["EQM_HOME"])
    run = start_deployment(api, "encode", {"config": config, "workers": 2})
    log = home / "logs" / "worker.log"
    assert ended(api, run, seconds=300)["type"] == "COMPLETED", log.read_text()
    jobs = [json.loads(file.read_text()) for file in (home / "jobs").glob("latents-*.json")]
    ours = [job for job in jobs if job["runtime"]["source_uri"] == config["source_uri"]]
    assert sorted(job["runtime"]["shards"] or [] for job in ours)[-2:] == [[0, 3], [3, 6]]
    store = open_store(ours[0]["runtime"]["store"], cache=home / "cache")
    asked = api._post("/flow_runs/filter", {"flow_runs": {"name": {"like_": "shards-"}}})
    assert {(one["name"], one["state"]["type"]) for one in asked} == {
        ("shards-0-3", "COMPLETED"),
        ("shards-3-6", "COMPLETED"),
    }
    digest = ours[0]["inputs"]["source"]["digest"]
    assert store.exists(f"source/{digest}/listing")
    records = [
        record
        for key in store.list("latents/")
        if key.endswith("record.json")
        and (record := store.record("latents", key.split("/")[-2])) is not None
        and record.inputs["source"].digest == digest
    ]
    (record,) = records
    manifest = open_manifest(record, store).manifest
    assert [shard.count for shard in manifest.shards] == [4] * 6


# -- a run that ends before its ranges ----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(400)
def test_ranges_of_a_cancelled_run_are_cancelled(
    all_environment: dict[str, str], tmp_path: Path
) -> None:
    place = Place(all_environment, tmp_path, "test-cancelled-ranges", seed=2)
    run, programs = place.run_with_ranges()
    place.api._post(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    # At once: Prefect itself comes to it a minute later, after it has killed the flow's process.
    ending = {"CANCELLING", "CANCELLED"}
    place.until(lambda: {state for _, state in place.ranges(run)} <= ending, seconds=20)
    for program in programs:
        resume(program)
    assert ended(place.api, run)["type"] == "CANCELLED"
    place.until(lambda: {state for _, state in place.ranges(run)} == {"CANCELLED"})
    assert len(place.ranges(run)) == 2
    place.until(lambda: not place.programs())
    assert not place.sealed()


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(400)
def test_ranges_of_a_killed_run_are_cancelled_and_asked_for_anew(
    all_environment: dict[str, str], tmp_path: Path
) -> None:
    place = Place(all_environment, tmp_path, "test-killed-ranges", seed=3)
    run, programs = place.run_with_ranges()
    for pid in flow_processes(run):
        os.kill(pid, signal.SIGKILL)
    place.until(lambda: {s for _, s in place.ranges(run)} <= {"CANCELLING", "CANCELLED"})
    for program in programs:
        resume(program)
    # By the keeper, as the same run.
    place.until(lambda: place.state(run) == "COMPLETED", seconds=240)
    assert place.api._send("GET", f"/flow_runs/{run}", None)["run_count"] == 2
    assert sorted(place.ranges(run)) == [
        (name, state)
        for name in ("shards-0-3", "shards-3-6")
        for state in ("CANCELLED", "COMPLETED")
    ]
    assert not place.programs()
    assert place.sealed()


class Place:
    """A set of pictures that a deployed run encodes in two ranges of shards."""

    def __init__(self, environment: dict[str, str], folder: Path, name: str, *, seed: int) -> None:
        self.api = PrefectApi(environment["PREFECT_API_URL"], environment)
        self.home = Path(environment["EQM_HOME"])
        self.config = config_of(folder, name, seed=seed)

    def run_with_ranges(self) -> tuple[str, list[int]]:
        """A run, and the programs of its ranges, which are stopped before they do anything."""
        run = start_deployment(self.api, "encode", {"config": self.config, "workers": 2})
        stopped: set[int] = set()

        def both() -> bool:
            for pid in set(self.programs()) - stopped:
                os.kill(pid, signal.SIGSTOP)
                stopped.add(pid)
            return len(stopped) == 2

        self.until(both)
        return run, sorted(stopped)

    def jobs(self) -> list[Path]:
        """Files of the ranges of this set of pictures."""
        return [
            file
            for file in (self.home / "jobs").glob("latents-*-*-*.json")
            if self.config["source_uri"] in file.read_text()
        ]

    def programs(self) -> list[int]:
        """Stage programs that encode ranges."""
        jobs = {str(job) for job in self.jobs()}
        return [pid for pid, words in processes() if jobs & set(words)]

    def ranges(self, run: str) -> list[tuple[str, str]]:
        """Name and state of the runs that a run had shards encoded by."""
        asked = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}}
        found = self.api._post("/flow_runs/filter", asked)
        return [(one["name"], one["state"]["type"]) for one in found]

    def state(self, run: str) -> str:
        return self.api._send("GET", f"/flow_runs/{run}", None)["state"]["type"]

    def sealed(self) -> bool:
        job = json.loads(self.jobs()[0].read_text())
        digest = self.jobs()[0].name.split("-")[1]
        store = open_store(job["runtime"]["store"], cache=self.home / "cache")
        return any(
            key.split("/")[1].startswith(digest) and key.endswith("/record.json")
            for key in store.list("latents/")
        )

    def until(self, true: Callable[[], Any], *, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            log = (self.home / "logs" / "worker.log").read_text()
            assert time.monotonic() < deadline, log[-6000:]
            time.sleep(0.05)


def config_of(folder: Path, name: str, *, seed: int) -> dict[str, Any]:
    """Six shards of four pictures."""
    pictures(folder / "pictures", seed=seed)
    return {
        "preset": "tiny",
        "name": name,
        "source_uri": str(folder / "pictures"),
        "source": {"kind": "folder", "image_size_px": 8, "channels": 3},
        "autoencoder": {"kind": "identity"},
        "encode": {"shard_images": 4},
    }


def processes() -> list[tuple[int, list[str]]]:
    """Numbers and words of the processes of this machine."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            found.append((int(entry.name), words))
    return found


def flow_processes(run: str) -> list[int]:
    """Processes that work on a run."""
    mark = f"PREFECT__FLOW_RUN_ID={run}".encode()
    found = []
    for pid, _ in processes():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if mark in environment.split(b"\0"):
            found.append(pid)
    return found


def resume(pid: int) -> None:
    """Let a stopped process go on, if it is still there."""
    if Path(f"/proc/{pid}").exists():
        os.kill(pid, signal.SIGCONT)
