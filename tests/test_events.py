"""The log of a run: no gap and no double, however often the run was stopped."""

import dataclasses
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chain
import pytest
import torch
from chain import store_of, untrained
from hypothesis import given, settings
from hypothesis import strategies as st

from eqm import checkpoint, events, gauges, registry, train
from eqm.checkpoint import Position
from eqm.config import replace
from eqm.errors import IntegrityError
from eqm.events import PREFIX, Event, EventLog, events_of, log_of, restore
from eqm.records import Blob, Record, canonical_bytes, to_json
from eqm.run import InterruptedTraining
from eqm.stage import job_digest
from eqm.storage import LocalStore

BATCH = 32
ROOT = Path(__file__).parent.parent


# -- the log alone ------------------------------------------------------------------------------


def assert_sound(events: list[Event]) -> None:
    """Numbers go up by one, positions never back, and no position has metrics twice."""
    assert [event.number for event in events] == list(range(len(events)))
    positions = [event.images_seen for event in events]
    assert positions == sorted(positions)
    points = [event.images_seen for event in events if event.kind == "metrics"]
    assert points == sorted(set(points))


STEPS = st.lists(st.sampled_from(["step", "step", "checkpoint", "killed"]), max_size=60)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.randoms())
def test_cut_anywhere_and_gone_on_with_the_log_is_sound(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str], random: Any
) -> None:
    store = LocalStore(tmp_path_factory.mktemp("log"))
    log, images = EventLog(itertools.count().__next__), 0
    kept: list[tuple[int, dict[str, Any], bytes]] = []
    for step in steps:
        if step == "step":
            images += 1
            log.append("metrics", images, {"loss": 1 / images})
        if step == "checkpoint" and not (kept and kept[-1][0] == images):
            log.append("checkpoint", images)
            segments = log.segments()
            blobs = {n: store.put(s) if isinstance(s, bytes) else s for n, s in segments.items()}
            log.commit(segments)
            kept.append((images, blobs, log.to_bytes()))
            assert len(blobs) <= 1 + math.log2(len(log.events))
            assert log.committed() == log.events
        if step == "killed" and kept:
            del kept[random.randrange(len(kept)) + 1 :]
            images, blobs, lines = kept[-1]
            log = restore(store, blobs, itertools.count(1000).__next__)
            assert log.to_bytes() == lines
            assert log.committed() == log.events
            log.append("resume", images)
        assert_sound(log.events)
        assert events_of(log.to_bytes(), "log") == log.events


def test_segments_are_not_written_again_with_every_checkpoint(tmp_path: Path) -> None:
    store, log, written = LocalStore(tmp_path), EventLog(lambda: 0), 0
    for images in range(1, 201):
        log.append("metrics", images)
        segments = log.segments()
        assert len(segments) <= 1 + math.log2(images)
        for data in segments.values():
            if isinstance(data, bytes):
                store.put(data)
                written += data.count(b"\n")
        log.commit(segments)
    # Nine times at most for each event, instead of a hundred times.
    assert written < 200 * (1 + math.log2(200))
    assert restore(store, log.segments()).events == log.events


def test_a_line_is_put_together_once_however_often_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[object] = []

    def counted(value: object) -> bytes:
        encoded.append(value)
        return canonical_bytes(value)

    monkeypatch.setattr(events, "canonical_bytes", counted)
    store, log = LocalStore(tmp_path / "store"), EventLog(lambda: 0)
    for images in range(1, 65):
        log.append("metrics", images, {"loss": 1 / images})
        segments = log.segments()
        kept = {n: s if isinstance(s, Blob) else store.put(s) for n, s in segments.items()}
        log.commit(segments)
    log.follow(tmp_path / "copy.jsonl")
    whole = log.to_bytes()
    assert (tmp_path / "copy.jsonl").read_bytes() == whole
    assert len(encoded) == 64
    # Nor what was read: it is as it was written.
    again = restore(store, kept)
    again.follow(tmp_path / "copy.jsonl")
    assert again.to_bytes() == whole == (tmp_path / "copy.jsonl").read_bytes()
    assert [event.digest for event in again.events] == [event.digest for event in log.events]
    assert len(encoded) == 64


def test_an_event_is_found_by_its_number_where_it_is_committed() -> None:
    log = EventLog()
    for images in range(1, 7):
        log.append("metrics", images)
        if images in (3, 5):
            segments = log.segments()
            log.commit(segments)
    assert [log.find(number) for number in range(-1, 8)] == [None, *log.events[:5], *[None] * 3]
    # What is lost leaves a gap.
    lacking = log_of(b"".join(log.events[number].line for number in (1, 3, 4)), "a log")
    found = [lacking.find(number) for number in range(6)]
    assert [event and event.number for event in found] == [None, 1, None, 3, 4, None]


def test_mlflow_that_is_back_is_gone_on_with_by_a_look_at_one_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, looked = EventLog(), []
    for images in range(1, 101):
        log.append("metrics", images)
    log.commit(log.segments())
    mark = registry._Mark.of(log.events[70])
    mirror = registry.RunMirror(
        "http://127.0.0.1:9",
        experiment="e",
        run_name="r",
        digest="d",
        params={},
        log=log,
        fetch=lambda _: b"",
    )
    monkeypatch.setattr(Event, "digest", property(lambda e: looked.append(e.number) or e.line))
    try:
        assert mirror._begin(dataclasses.replace(mark, event=log.events[70].line)) == -1
    finally:
        mirror.abandon()
    assert looked == [70]
    assert [event.number for event in mirror._points()] == list(range(71, 100))


def test_a_call_of_mlflow_has_no_more_figures_than_it_takes() -> None:
    log = EventLog()
    for images, count in enumerate((400, 600, 1, 1200, 30, 30), start=1):
        log.append("metrics", images, {f"figure {k}": 0.0 for k in range(count)})
    for images in range(7, 60):
        log.append("metrics", images, {f"figure {k}": 0.0 for k in range(30)})
    parts = list(registry.calls(log.events))
    assert [event for part in parts for event in part] == log.events
    assert [sum(len(event.figures) for event in part) for part in parts] == [
        1000,
        1,
        1200,
        990,
        660,
    ]


def test_what_no_checkpoint_holds_is_not_committed() -> None:
    log = EventLog()
    log.append("metrics", 1)
    first = log.segments()
    log.append("metrics", 2)
    assert log.committed() == []
    log.commit(first)
    assert [event.images_seen for event in log.committed()] == [1]
    second = log.segments()
    assert log.committed(after=0) == []
    log.commit(second)
    assert [event.images_seen for event in log.committed(after=0)] == [2]


def test_no_position_is_told_twice_and_none_that_was_passed() -> None:
    log = EventLog()
    log.append("metrics", 64)
    log.append("checkpoint", 64)
    with pytest.raises(ValueError, match="metrics at image 64, but the log is at 64 already"):
        log.append("metrics", 64)
    with pytest.raises(ValueError, match="checkpoint at image 32, but the log is at 64"):
        log.append("checkpoint", 32)
    assert len(log.events) == 2


@pytest.mark.parametrize("harm", [b"{}\n", b"[]\n", b"x\n", b'{"number": 1'])
def test_lines_that_are_no_events_are_refused(harm: bytes) -> None:
    log = EventLog()
    log.append("start", 0)
    with pytest.raises(IntegrityError, match="is no log of events"):
        log_of(log.to_bytes() + harm, "log")
    with pytest.raises(IntegrityError, match="do not rise"):
        log_of(2 * log.to_bytes(), "log")


def test_a_copy_that_cannot_be_written_is_told_once(tmp_path: Path, capfd: Any) -> None:
    log = EventLog()
    log.append("start", 0)
    log.follow(tmp_path / "a" / "log.jsonl")
    log.append("metrics", 32, {"loss": 0.5})
    assert (tmp_path / "a" / "log.jsonl").read_bytes() == log.to_bytes()
    (tmp_path / "file").write_text("")
    log.follow(tmp_path / "file" / "log.jsonl")
    log.append("metrics", 64)
    assert capfd.readouterr().err.count("cannot be written") == 1


def test_who_was_replaced_and_wakes_up_writes_nothing_into_the_copy(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    asleep, awake = EventLog(), EventLog()
    for log in (asleep, awake):
        log.append("start", 0)
        log.follow(file)
    awake.append("metrics", 64)
    asleep.append("metrics", 32)
    assert file.read_bytes() == awake.to_bytes()


# -- what is measured ---------------------------------------------------------------------------


def test_losses_by_band_are_those_of_a_plain_loop() -> None:
    losses, gamma = torch.rand(200), torch.rand(200)
    gamma[:3], losses[0] = torch.tensor([0.0, 1.0, 0.2]), math.inf
    figures = gauges.band_figures(gauges.by_band(losses, gamma))
    for k in range(5):
        low, high = k / 5, (k + 1) / 5
        pairs = zip(losses.tolist(), gamma.tolist(), strict=True)
        inside = [loss for loss, g in pairs if low <= g < high or (k == 4 and g == 1.0)]
        name = f"gamma_{low:.1f}_{high:.1f}"
        assert figures[f"images/{name}"] == len(inside)
        assert figures[f"loss/{name}"] == pytest.approx(sum(inside) / len(inside))
    assert "loss/gamma_0.0_0.2" not in gauges.band_figures(torch.zeros(10))


def test_waiting_is_told_from_working() -> None:
    def slow() -> Iterator[int]:
        for k in range(3):
            time.sleep(0.05)
            yield k

    watch = gauges.Stopwatch()
    assert list(watch.waiting_for(slow())) == [0, 1, 2]
    found = watch.figures(32)
    assert found["data_wait_share"] > 0.9
    assert 0 < found["images_per_second"] < 3 * 32 / 0.15
    assert found["step_seconds"] == pytest.approx(32 / found["images_per_second"])
    nothing = watch.figures(32)
    # What was waited for before the last report counts no more.
    assert nothing["images_per_second"] == nothing["data_wait_share"] == 0
    assert "step_seconds" not in nothing


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="not Linux")
def test_the_peak_of_memory_is_not_that_of_whoever_started_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process begins with its parent's in what ``getrusage`` tells."""
    inherited = SimpleNamespace(ru_maxrss=2**40)
    monkeypatch.setattr(gauges.resource, "getrusage", lambda _: inherited)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    found = gauges.peak_memory(torch.device("cpu"))["memory_peak_bytes"]
    assert 0.99 * resident < found < 2**40


# -- the log of a training ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.getbasetemp() / "chain", until="train")


def sealed_log(store: LocalStore, record: Record) -> list[Event]:
    return events_of(store.get(record.logs["events.jsonl"]), "log")


def points(events: list[Event]) -> list[Event]:
    return [event for event in events if event.kind == "metrics"]


def reproducible(event: Event) -> dict[str, float]:
    """Figures that are a function of the config."""
    timed = r".*_(per_second|seconds|share|bytes)"
    return {name: v for name, v in event.figures.items() if not re.fullmatch(timed, name)}


def test_the_log_is_sealed_beside_the_curve_and_tells_what_it_tells(tiny: chain.Chain) -> None:
    record = tiny["train"]
    assert "events.jsonl" not in record.outputs
    events = sealed_log(tiny.store, record)
    assert_sound(events)
    kinds = [event.kind for event in events]
    assert kinds == ["start", *20 * ["metrics"], "checkpoint", "finished"]
    assert [event.at_ms for event in events] == sorted(event.at_ms for event in events)
    assert abs(events[-1].at_ms / 1000 - time.time()) < 3600
    history = json.loads(tiny.store.get(record.outputs["history.json"]))
    for name in ("loss", "gradient_norm"):
        assert [event.figures[name] for event in points(events)] == history[name]
    for event in points(events):
        f = event.figures
        bands = [name.partition("/")[2] for name in f if name.startswith("images/")]
        assert len(bands) == 5
        assert sum(f[f"images/{band}"] for band in bands) == BATCH
        mean = sum(f[f"images/{b}"] * f.get(f"loss/{b}", 0.0) for b in bands) / BATCH
        assert mean == pytest.approx(f["loss"], rel=1e-5)
        assert f["images_per_second"] * f["step_seconds"] == pytest.approx(BATCH)
        assert 0 <= f["data_wait_share"] <= 1
        assert f["memory_peak_bytes"] > 2**26
        # Of a CPU nobody knows the peak, so there is no "mfu" here.
        assert f["tflops_per_second"] > 0
    assert points(events)[-1].figures["learning_rate"] < points(events)[0].figures["learning_rate"]


def test_the_norm_of_the_weights_is_that_of_those_kept(tiny: chain.Chain) -> None:
    record = tiny["train"]
    weights = checkpoint.load(tiny.store, record.digest, Position(20 * BATCH, 1)).parameters
    norm = math.sqrt(sum(float(w.double().square().sum()) for w in weights.values()))
    last = points(sealed_log(tiny.store, record))[-1]
    assert last.figures["parameter_norm"] == pytest.approx(norm, rel=1e-5)


def test_stopped_between_two_points_all_that_is_reproducible_is_the_same(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eqm.run.HISTORY_POINTS", 5)
    whole = untrained(tiny, tmp_path / "whole")
    undisturbed = points(sealed_log(store_of(whole), chain.run(whole)))
    job = untrained(tiny, tmp_path / "stopped")
    step = train.step
    for position in (2, 10, 11):
        with monkeypatch.context() as patch:
            patch.setattr(
                train,
                "step",
                lambda run, batch, _, at=position: (
                    step(run, batch, False) or run.images_seen == at * BATCH
                ),
            )
            with pytest.raises(InterruptedTraining):
                chain.run(job)
    events = sealed_log(store_of(job), chain.run(job))
    assert_sound(events)
    kinds = [event.kind for event in events]
    assert (kinds.count("interrupted"), kinds.count("resume"), kinds.count("start")) == (3, 3, 1)
    assert [reproducible(e) for e in points(events)] == [reproducible(e) for e in undisturbed]
    assert [e.images_seen for e in points(events)] == [128, 256, 384, 512, 640]


def test_a_point_of_the_curve_that_is_long_has_several_events(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where training was stopped between two of them; what is sealed stays as it was."""
    monkeypatch.setattr("eqm.run.HISTORY_POINTS", 4)
    whole = untrained(tiny, tmp_path / "whole")
    few = chain.run(whole)
    monkeypatch.setattr("eqm.run.LOG_UPDATES", 2)
    job = untrained(tiny, tmp_path / "stopped")
    step = train.step
    with monkeypatch.context() as patch:
        patch.setattr(
            train, "step", lambda run, b, _: step(run, b, False) or run.images_seen == 8 * BATCH
        )
        with pytest.raises(InterruptedTraining):
            chain.run(job)
    record = chain.run(job)
    assert record.content == few.content
    found = points(sealed_log(store_of(job), record))
    ends = [2, 4, 5, 7, 9, 10, 12, 14, 15, 17, 19, 20]
    assert [event.images_seen for event in found] == [BATCH * end for end in ends]
    every = curve_of(tiny.store, tiny["train"])
    for begin, end, event in zip([0, *ends], ends, found, strict=False):
        mean = sum(every[begin:end]) / (end - begin)
        assert event.figures["loss"] == pytest.approx(mean, rel=1e-6)
        counts = (v for name, v in event.figures.items() if name.startswith("images/"))
        assert sum(counts) == (end - begin) * BATCH
    assert curve_of(store_of(job), record) == pytest.approx(
        [sum(every[k : k + 5]) / 5 for k in range(0, 20, 5)], rel=1e-6
    )


def curve_of(store: LocalStore, record: Record) -> list[float]:
    return json.loads(store.get(record.outputs["history.json"]))["loss"]


def test_killed_and_started_again_the_log_has_no_gap_and_no_double(
    tiny: chain.Chain, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    job = untrained(tiny, tmp_path, checkpoint_every_images=3 * BATCH, cache=str(cache))
    path = tmp_path / "job.json"
    path.write_text(json.dumps(to_json(job)))
    copy = cache / "events" / f"{job_digest(job)}.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "eqm.train", str(path)],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.DEVNULL,
    ) as child:
        deadline = time.monotonic() + 120
        # Killed where the log is ahead of the checkpoint.
        while child.poll() is None and time.monotonic() < deadline:
            if copy.is_file() and copy.read_bytes().count(b'"metrics"') % 3 == 1:
                break
            time.sleep(0.001)
        child.kill()
    assert child.returncode == -signal.SIGKILL, "it ended before it could be killed"
    record = chain.run(job)
    assert record.content == tiny["train"].content
    events = sealed_log(store_of(job), record)
    assert_sound(events)
    assert [e.images_seen for e in points(events)] == [BATCH * n for n in range(1, 21)]
    assert [reproducible(e) for e in points(events)] == [
        reproducible(e) for e in points(sealed_log(tiny.store, tiny["train"]))
    ]
    assert copy.read_bytes() == store_of(job).get(record.logs["events.jsonl"])


def test_a_log_that_is_damaged_costs_no_training_and_is_told(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    job = untrained(tiny, tmp_path, checkpoint_every_images=5 * BATCH)
    with monkeypatch.context() as patch:
        patch.setattr(train, "outcome_of", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            chain.run(job)
    store, digest = store_of(job), job_digest(job)
    before, last = checkpoint.complete(store, digest)[-2:]
    assert (last.images_seen, before.images_seen) == (20 * BATCH, 15 * BATCH)
    (store.root / f"train/{digest}/checkpoints/{last.name}.json").unlink()
    state = checkpoint.load(store, digest, before)
    assert all(name.startswith(PREFIX) for name in state.events)
    name = min(state.events)
    (store.root / state.events[name].key).unlink()  # type: ignore[union-attr]
    record = chain.run(job)
    assert record.content == tiny["train"].content
    events = sealed_log(store, record)
    (again,) = (event for event in events if event.kind == "resume")
    assert "events 0 to" in again.facts["lost"][0]
    assert "does not exist" in again.facts["lost"][0]
    assert "the log of the run lacks events 0 to" in capfd.readouterr().err
    assert [e.number for e in events] == sorted({e.number for e in events})
    assert points(events)[-1].images_seen == 20 * BATCH


def test_a_checkpoint_of_before_there_was_a_log_is_gone_on_from(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = untrained(tiny, tmp_path)
    step, save = train.step, checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(train, "step", lambda run, batch, _: step(run, batch, True) or True)
        patch.setattr(
            checkpoint,
            "save",
            lambda s, d, state, **rest: save(s, d, replace(state, events={}), **rest),
        )
        with pytest.raises(InterruptedTraining):
            chain.run(job)
    record = chain.run(job)
    assert record.content == tiny["train"].content
    events = sealed_log(store_of(job), record)
    assert_sound(events)
    assert events[0].kind == "resume"
