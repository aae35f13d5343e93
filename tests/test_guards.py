"""An update that is not finite never reaches weights: training stops, or goes on past it."""

import json
import math
from pathlib import Path
from typing import Any

import chain
import pytest
import torch
from chain import store_of, untrained

from eqm import checkpoint, guards, train
from eqm.batches import read_batch
from eqm.config import ComputeConfig, Job, replace
from eqm.errors import ConfigError, DataError
from eqm.events import Event, events_of
from eqm.latent_set import open_manifest
from eqm.records import Record, note_from_bytes
from eqm.run import InterruptedTraining
from eqm.stage import Divergence, divergence_key, job_digest

BATCH = 32
BAD = 4 * BATCH
"""Where the update begins that goes wrong."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.getbasetemp() / "chain", until="train")


def asked(tiny: chain.Chain, folder: Path, kind: str, **runtime: Any) -> Job:
    job = untrained(tiny, folder, **runtime)
    config = {**job.config, "train": {**job.config["train"], "on_nonfinite": kind}}
    return replace(job, config=config)


def positions(job: Job) -> list[int]:
    found = checkpoint.complete(store_of(job), job_digest(job))
    return [at.images_seen for at in found]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """The gradient of one update is infinite in one entry; its loss is as ever. Where it begins."""
    accumulate, bad = train.accumulate, getattr(request, "param", BAD)

    def worse(run: train.Run, batch: train.Batch) -> torch.Tensor:
        losses = accumulate(run, batch)
        if run.images_seen == bad:
            run.learner.gradient()[5] = float("inf")
        return losses

    monkeypatch.setattr(train, "accumulate", worse)
    return bad


@pytest.mark.usefixtures("poisoned")
def test_training_stops_and_names_the_update_before_a_checkpoint_follows_it(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eqm.run.HISTORY_POINTS", 2)
    cache = tmp_path / "cache"
    job = asked(tiny, tmp_path, "stop", checkpoint_every_images=BATCH, cache=str(cache))
    words = r"gradient norm inf of the update from image 128 on: training has diverged; lower"
    with pytest.raises(DataError, match=words):
        chain.run(job)
    assert positions(job)[-1] == BAD
    (copy,) = cache.glob("events/*.jsonl")
    told = events_of(copy.read_bytes(), "copy")[-1]
    assert (told.kind, told.facts) == ("guard", {"what": "not finite", **where(tiny, BAD)})
    # Nothing durable follows that event: its facts are kept beside what the training left.
    key = divergence_key("train", job_digest(job))
    assert note_from_bytes(Divergence, store_of(job).read(key), key).facts == where(tiny, BAD)


def where(tiny: chain.Chain, image: int) -> dict[str, Any]:
    """What the log says of the update that begins at an image: with the numbers of its samples."""
    data = open_manifest(tiny["latents"], tiny.store)
    samples = read_batch(data, 0, image, BATCH).sample_numbers.tolist()
    return {"updates_from": [image], "samples": [samples]}


def events(job: Job, record: Record, kind: str) -> list[Event]:
    log = events_of(store_of(job).get(record.logs["events.jsonl"]), "log")
    return [event for event in log if event.kind == kind]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("points", [200, 5])
def test_training_goes_on_past_it_counts_it_and_tells_its_images(
    tiny: chain.Chain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    points: int,
) -> None:
    monkeypatch.setattr("eqm.run.HISTORY_POINTS", points)
    job = asked(tiny, tmp_path, "skip")
    if points == 200:
        # The update is alone in its point of the curve: there is nothing to go on with.
        with pytest.raises(DataError, match="from image 128 on: training has diverged"):
            chain.run(job)
        return
    record = chain.run(job)
    assert "1 updates were skipped" in (said := capsys.readouterr().err)
    assert "images 128 to 159 of the run" in said
    (skip,) = events(job, record, "skip")
    assert skip.facts == {"what": "not finite", **where(tiny, BAD)}
    # Four updates a point, and what was skipped is in no mean.
    counts = [
        sum(n for name, n in event.figures.items() if name.startswith("images/"))
        for event in events(job, record, "metrics")
    ]
    assert counts == [4 * BATCH, 3 * BATCH, 4 * BATCH, 4 * BATCH, 4 * BATCH]
    curve = json.loads(store_of(job).get(record.outputs["history.json"]))
    assert curve["skipped"] == [0, 1, 0, 0, 0]
    assert all(math.isfinite(v) for name in ("loss", "gradient_norm") for v in curve[name])
    for name in ("ema.safetensors", "raw.safetensors"):
        tensors = checkpoint.tensors_from_bytes(store_of(job).get(record.outputs[name]))
        assert all(bool(t.isfinite().all()) for t in tensors.values())


@pytest.mark.parametrize("poisoned", [4 * BATCH, 9 * BATCH], indirect=True)
def test_a_skipped_update_that_is_alone_in_its_event_ends_no_training(
    tiny: chain.Chain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    poisoned: int,
) -> None:
    """What events leave over of a point may be one update: of 2,001, where they tell of 500."""
    monkeypatch.setattr("eqm.run.HISTORY_POINTS", 4)
    monkeypatch.setattr("eqm.run.LOG_UPDATES", 4)
    monkeypatch.setattr("eqm.guards.SPIKE_POINTS", 1)
    job = asked(tiny, tmp_path, "skip")
    record = chain.run(job)
    assert "1 updates were skipped" in capsys.readouterr().err
    curve = json.loads(store_of(job).get(record.outputs["history.json"]))
    assert curve["skipped"] == [int(poisoned == at * BATCH) for at in (4, 9, 14, 19)]
    assert all(math.isfinite(v) for name in ("loss", "gradient_norm") for v in curve[name])
    told = {e.images_seen: e.figures for e in events(job, record, "metrics")}
    assert [at for at, figures in told.items() if "loss" not in figures] == [poisoned + BATCH]
    # All that does not depend on its loss is told.
    assert told[poisoned + BATCH].keys() > {"learning_rate", "step_seconds", "parameter_norm"}


@pytest.mark.parametrize(("good", "made"), [(0, 4), (6, 12)])
def test_as_many_as_an_event_tells_of_that_are_all_skipped_end_training(
    tiny: chain.Chain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    good: int,
    made: int,
) -> None:
    """Also in the middle of a point whose beginning was good."""
    monkeypatch.setattr("eqm.run.HISTORY_POINTS", 1)
    monkeypatch.setattr("eqm.run.LOG_UPDATES", 4)
    accumulate, begun = train.accumulate, []

    def worse(run: train.Run, batch: train.Batch) -> torch.Tensor:
        losses = accumulate(run, batch)
        begun.append(run.images_seen)
        if run.images_seen >= good * BATCH:
            run.learner.gradient()[5] = float("inf")
        return losses

    monkeypatch.setattr(train, "accumulate", worse)
    with pytest.raises(DataError, match=r"has diverged.*'skip', but of the last 4 updates none"):
        chain.run(asked(tiny, tmp_path, "skip"))
    # Where an event is due, and the four before it were skipped.
    assert len(begun) == made


@pytest.mark.usefixtures("poisoned")
def test_stopped_beside_a_skipped_update_it_ends_in_the_same_bits(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eqm.run.HISTORY_POINTS", 5)
    whole = chain.run(asked(tiny, tmp_path / "whole", "skip"))
    job = asked(tiny, tmp_path / "stopped", "skip")
    step = train.step
    with monkeypatch.context() as patch:

        def stops(run: train.Run, batch: train.Batch, stop: bool) -> bool:
            return step(run, batch, stop) or run.images_seen == BAD + BATCH

        patch.setattr(train, "step", stops)
        with pytest.raises(InterruptedTraining):
            chain.run(job)
    assert positions(job) == [BAD + BATCH]
    assert chain.run(job).content == whole.content


def test_a_loss_far_above_the_usual_is_told_and_changes_nothing(
    tiny: chain.Chain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    accumulate = train.accumulate

    def high(run: train.Run, batch: train.Batch) -> torch.Tensor:
        return accumulate(run, batch) * (7 if run.images_seen == 15 * BATCH else 1)

    monkeypatch.setattr(train, "accumulate", high)
    job = asked(tiny, tmp_path, "stop")
    record = chain.run(job)
    assert "in the update from image 480 on" in (said := capsys.readouterr().err)
    assert said.count("times the usual") == 1
    (spike,) = events(job, record, "guard")
    assert spike.facts.items() >= {"what": "spike", **where(tiny, 15 * BATCH)}.items()
    assert spike.facts["loss"] > guards.SPIKE * spike.facts["usual"]
    for name in ("ema.safetensors", "raw.safetensors"):
        assert record.outputs[name] == tiny["train"].outputs[name]


def test_parts_of_a_share_train_as_the_whole_and_go_on_from_its_checkpoint(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = asked(tiny, tmp_path, "stop")
    step = train.step
    with monkeypatch.context() as patch:

        def stops(run: train.Run, batch: train.Batch, stop: bool) -> bool:
            return step(run, batch, stop) or run.images_seen == 10 * BATCH

        patch.setattr(train, "step", stops)
        with pytest.raises(InterruptedTraining):
            chain.run(job)
    split = ComputeConfig(micro_batch=8, checkpointing=True)
    other = replace(job, runtime=replace(job.runtime, compute=split))
    assert job_digest(other) == job_digest(job)
    record = chain.run(other)
    curve, usual = (
        json.loads(store.get(r.outputs["history.json"]))
        for store, r in ((store_of(job), record), (tiny.store, tiny["train"]))
    )
    assert curve["loss"][:10] == usual["loss"][:10]
    assert curve["loss"] == pytest.approx(usual["loss"], rel=1e-4)
    assert record.provenance["compute"]["micro_batch"] == 8


def test_parts_that_do_not_divide_a_share_are_refused_before_training(
    tiny: chain.Chain, tmp_path: Path
) -> None:
    job = asked(tiny, tmp_path, "stop", compute=ComputeConfig(micro_batch=5))
    with pytest.raises(ConfigError, match=r"micro_batch is 5; .*divisor of the 32 images"):
        chain.run(job)
    assert positions(job) == []
