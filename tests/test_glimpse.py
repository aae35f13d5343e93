"""Looks at a training on its way: what they show, and that they change nothing of it."""

import contextlib
import io
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import chain
import numpy as np
import pytest
import torch
from PIL import Image

from eqm import checkpoint, glimpse, looks, sampling, train
from eqm.config import SamplerConfig, replace, stage_config
from eqm.distributed import World
from eqm.errors import ConfigError, DataError, IntegrityError, StoreError
from eqm.events import events_of
from eqm.frechet import Gaussian
from eqm.latent_set import open_manifest
from eqm.model import from_record
from eqm.stage import Context, job_digest

FEW = SamplerConfig(updates=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.getbasetemp() / "chain", until="train")


def test_directions_are_unit_vectors_and_always_the_same() -> None:
    found = glimpse.directions(40)
    assert found.shape == (40, glimpse.DIRECTIONS)
    assert torch.allclose(found.norm(dim=0), torch.ones(glimpse.DIRECTIONS, dtype=torch.float64))
    assert torch.linalg.matrix_rank(found) == glimpse.DIRECTIONS
    assert torch.equal(found, glimpse.directions(40))


def test_distance_grows_with_what_is_wrong(tiny: chain.Chain) -> None:
    data = open_manifest(tiny["latents"], tiny.store)
    around = glimpse.reference(data, seed=0)
    shape = data.manifest.spec.shape
    noise = torch.randn(glimpse.SAMPLES, *shape, generator=torch.Generator().manual_seed(0))
    far, farther = (
        Gaussian.of(glimpse.projected(scale * noise + shift)).distance(around)
        for scale, shift in ((1.0, 0.0), (3.0, 1.0))
    )
    assert around.distance(around) < 1e-9 < far < farther


def test_a_look_is_a_grid_and_a_distance(tiny: chain.Chain) -> None:
    data = open_manifest(tiny["latents"], tiny.store)
    model = from_record(tiny.store, tiny["train"])
    around = glimpse.reference(data, seed=0)
    seen = glimpse.take(model, FEW, around)
    assert glimpse.take(model, FEW, around) == seen
    assert seen.distance > 0
    picture = np.asarray(Image.open(io.BytesIO(seen.grid)))
    assert picture.shape[0] >= 10 * 16
    assert picture.std() > 1


def test_looks_are_in_the_log_and_sealed_and_training_is_the_same(
    tiny: chain.Chain, tmp_path
) -> None:
    job = chain.untrained(tiny, tmp_path, grid_every_images=256, grid_sampler=FEW)
    record = chain.run(job)
    assert record.content == tiny["train"].content
    store = chain.store_of(job)
    looks = [e for e in events_of(store.get(record.logs["events.jsonl"]), "log") if e.blobs]
    assert [event.images_seen for event in looks] == [256, 512, 640]
    assert all(event.figures["latent_distance"] > 0 for event in looks)
    # Of the averages, not of the weights as they are.
    data = open_manifest(tiny["latents"], tiny.store)
    last = glimpse.take(from_record(tiny.store, record), FEW, glimpse.reference(data, seed=0))
    assert looks[-1].figures["latent_distance"] == pytest.approx(last.distance, rel=1e-6)
    raw = from_record(tiny.store, record, weights="raw")
    other = glimpse.take(raw, FEW, glimpse.reference(data, seed=0))
    assert abs(other.distance - last.distance) > 1e-4 * last.distance
    for event in looks:
        assert record.logs[f"samples-{event.images_seen:012d}-grid.png"] == event.blobs["grid.png"]
        assert store.get(event.blobs["grid.png"]).startswith(b"\x89PNG")


def test_how_samples_are_taken_is_no_matter_where_nobody_looks(tiny: chain.Chain, tmp_path) -> None:
    """A machine that trains need not be one that samples."""
    asked = {"grid_sampler": SamplerConfig(updates=3, precision="tf32")}
    job = chain.untrained(tiny, tmp_path / "unseen", **asked)
    assert chain.run(job).content == tiny["train"].content
    with pytest.raises(ConfigError, match=r"generate\.sampler\.precision is 'tf32'"):
        chain.run(chain.untrained(tiny, tmp_path / "seen", grid_every_images=320, **asked))


def test_a_look_that_was_due_where_the_run_was_stopped_is_taken_when_it_goes_on(
    tiny: chain.Chain, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = (
        chain.untrained(tiny, tmp_path / name, grid_every_images=256, grid_sampler=FEW)
        for name in ("whole", "parted")
    )
    step = train.step
    monkeypatch.setattr(
        train, "step", lambda run, *rest: step(run, *rest) or run.images_seen in (256, 448)
    )
    taken, take = [], glimpse.take
    monkeypatch.setattr(glimpse, "take", lambda *a, **k: taken.append("") or take(*a, **k))
    for looked in (0, 1):
        with pytest.raises(train.InterruptedTraining):
            chain.run(parted)
        # There was no time for it before the checkpoint.
        assert len(taken) == looked
    monkeypatch.undo()
    usual, record = chain.run(whole), chain.run(parted)
    assert record.content == usual.content
    grids = {name: blob for name, blob in record.logs.items() if "grid" in name}
    assert grids == {name: blob for name, blob in usual.logs.items() if "grid" in name}
    assert len(grids) == 3


@pytest.mark.parametrize("at", [256, 640])
def test_a_look_makes_room_for_the_checkpoint_of_a_run_that_is_told_to_end(
    tiny: chain.Chain, tmp_path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Of XL/2 a look takes a minute or more, of the 100 s that there are."""
    whole, parted = (
        chain.untrained(tiny, tmp_path / name, grid_every_images=256, grid_sampler=FEW)
        for name in ("whole", "parted")
    )
    ways: list[list[int]] = []
    sample = sampling.sample

    def told_to_end(*given: object, on_update, **more: object):
        way: list[int] = []
        ways.append(way)

        def on_its_way(update: int, latents: torch.Tensor) -> None:
            way.append(update)
            # Looks are of two kinds of samples: a row for each class, and those of the distance.
            if len(ways) == (1 if at == 256 else 6) and update == 1:
                signal.raise_signal(signal.SIGTERM)
            on_update(update, latents)

        return sample(*given, on_update=on_its_way, **more)

    monkeypatch.setattr(sampling, "sample", told_to_end)
    with pytest.raises(train.InterruptedTraining, match=f"stopped at image {at} of 640, with a c"):
        chain.run(parted)
    assert ways[-1] == [0, 1], "what is left of it is left out"
    kept = checkpoint.newest(chain.store_of(parted), job_digest(parted))
    assert kept is not None
    assert kept.images_seen == at
    # Told again where the look is made up for.
    ways.clear()
    if at == 256:
        with pytest.raises(train.InterruptedTraining, match=f"stopped at image {at} of 640"):
            chain.run(parted)
    monkeypatch.undo()
    usual, record = chain.run(whole), chain.run(parted)
    assert record.content == usual.content
    grids = {name: blob for name, blob in record.logs.items() if "grid" in name}
    assert grids == {name: blob for name, blob in usual.logs.items() if "grid" in name}
    assert len(grids) == 3


@pytest.mark.parametrize("kind", [DataError, StoreError, IntegrityError, torch.OutOfMemoryError])
def test_a_look_that_fails_costs_no_training(
    tiny: chain.Chain, tmp_path, monkeypatch: pytest.MonkeyPatch, capfd, kind: type[Exception]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind("samples diverged")

    monkeypatch.setattr(glimpse, "take", fail)
    job = chain.untrained(tiny, tmp_path, grid_every_images=500, grid_sampler=FEW)
    assert chain.run(job).content == tiny["train"].content
    assert "no samples at image 512: samples diverged" in capfd.readouterr().err


def test_the_first_process_looks_while_the_others_wait(tiny: chain.Chain, tmp_path) -> None:
    run = alone(tiny, tmp_path)
    among: list[bool] = []

    @contextlib.contextmanager
    def waited_for(_: object) -> Iterator[threading.Event]:
        before = len(run.log.events)
        yield threading.Event()
        among.append(len(run.log.events) > before)

    for first in (True, False):
        world = SimpleNamespace(
            is_first=first,
            device=run.world.device,
            first_at_work=waited_for,
            first_says=lambda number: number,
        )
        run.context = replace(run.context, world=world)
        assert looks.look(run)
    assert among == [True, False]
    assert [event.kind for event in run.log.events].count("samples") == 1


def alone(tiny: chain.Chain, tmp_path) -> train.Run:
    job = chain.untrained(tiny, tmp_path, grid_every_images=320, grid_sampler=FEW)
    world = World(0, 1, torch.device("cpu"))
    config = stage_config("train", job.config)
    return train.setup(Context(job=job, config=config, store=chain.store_of(job), world=world))
