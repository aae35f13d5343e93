"""Real images looked at once: what is sealed, however the work was cut, shared or interrupted."""

import contextlib
import hashlib
import io
from pathlib import Path
from typing import Any

import chain
import numpy as np
import pytest
import torch

from eqm import reference
from eqm.config import Job, stage_config
from eqm.distributed import World
from eqm.errors import ConfigError, DataError
from eqm.features import INCEPTION, load_extractor
from eqm.frechet import Gaussian, Moments
from eqm.images import open_source
from eqm.records import note_from_bytes
from eqm.stage import Context, job_digest
from eqm.statistics import Reference, Side, open_reference

COUNTS = (1432, 365)
"""Training and held-out digits."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.getbasetemp() / "chain")


def fresh(tiny: chain.Chain, folder: Path, changes: dict[str, Any] | None = None) -> Job:
    """The chain's job with other settings, in a store where nothing was looked at."""
    store = chain.copied(tiny, folder / "store", without=("reference", "evaluation"))
    return chain.job(chain.tiniest(changes), store, "reference", tiny.records)


def opened(job: Job) -> Reference:
    return open_reference(chain.store_of(job), chain.run(job))


def near(found: Moments, expected: Moments) -> None:
    assert found.count == expected.count
    for name in ("mean", "scatter"):
        a, b = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * np.abs(b).max())


def test_all_images_are_in_the_moments_and_the_pictures(tiny: chain.Chain) -> None:
    found = open_reference(tiny.store, tiny["reference"])
    source = open_source(tiny.config.source, None)
    extractor = load_extractor(tiny["extractor"], tiny.store, torch.device("cpu"))
    assert found.extractor == extractor.name
    for name, side in (("training", found.training), ("held-out", found.held_out)):
        numbers = source.numbers(held_out=name == "held-out")
        pixels = torch.stack([source.read(i) for i in numbers])
        seen = extractor.activations(pixels)
        near(side.moments, Moments.of(seen.features))
        assert seen.spatial is not None
        assert side.spatial is not None
        near(side.spatial, Moments.of(seen.spatial))
        np.testing.assert_allclose(side.features, seen.features, atol=1e-5)
        (part,) = found.pictures(name)  # type: ignore[arg-type]
        # Images of 8 px are their own small pictures.
        assert np.array_equal(part.images, pixels)
        assert part.labels.tolist() == [source.entries[i].label for i in numbers]
    assert found.held_out.logits is not None
    assert found.held_out.logits.shape == (found.held_out.count, 10)
    assert found.record.values["images"] == {"training": COUNTS[0], "held-out": COUNTS[1]}


def test_features_of_the_first_images_are_kept(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "PART_IMAGES", 200)
    found = opened(fresh(tiny, tmp_path, {"reference.keep_features": 300}))
    whole = open_reference(tiny.store, tiny["reference"])
    assert found.training.features.shape == (300, 16)
    np.testing.assert_allclose(found.training.features, whole.training.features[:300], atol=1e-5)
    # Moments and pictures are of all of them, in eight parts.
    near(found.training.moments, whole.training.moments)
    parts = list(found.pictures("training"))
    assert [len(part.images) for part in parts] == [200] * 7 + [32]
    assert np.array_equal(
        np.concatenate([part.images for part in parts]),
        next(whole.pictures("training")).images,
    )
    first = found.first_pictures("training", 250)
    assert np.array_equal(first.images, next(whole.pictures("training")).images[:250])
    assert len(first.labels) == 250


def test_it_goes_on_where_it_was_and_ranks_share_the_work(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "PART_IMAGES", 500)
    lefts: list[int] = []
    monkeypatch.setattr(World, "barrier", lambda _, left=None: left and lefts.append(left()))
    monkeypatch.setattr(World, "first_at_work", lambda _: contextlib.nullcontext())
    job, alone = fresh(tiny, tmp_path / "two"), fresh(tiny, tmp_path / "one")
    look, looked = reference.look, []

    def counted(*args: Any) -> Any:
        if len(looked) == 1:
            looked.append("killed")
            raise KeyboardInterrupt
        looked.append((args[-1].side, args[-1].number))
        return look(*args)

    def as_rank(rank: int) -> Any:
        config = stage_config("reference", job.config)
        world = World(rank, 2, torch.device("cpu"))
        store = chain.store_of(job)
        return reference.program(Context(job=job, config=config, store=store, world=world))

    monkeypatch.setattr(reference, "look", counted)
    with pytest.raises(KeyboardInterrupt):
        as_rank(1)
    assert as_rank(1) is None
    assert as_rank(0) is not None
    expected = [("training", 1), "killed", ("held-out", 0), ("training", 0), ("training", 2)]
    assert looked == expected
    assert lefts == [2, 0]
    assert chain.run(job).content == chain.run(alone).content


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_a_part_whose_bytes_were_lost_is_made_again(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "PART_IMAGES", 500)
    job, alone = fresh(tiny, tmp_path / "lost"), fresh(tiny, tmp_path / "alone")
    with monkeypatch.context() as patch:
        patch.setattr(reference, "gather", interrupted)
        with pytest.raises(KeyboardInterrupt):
            chain.run(job)
    store = chain.store_of(job)
    for number, name in enumerate(("moments", "images")):
        key = f"reference/{job_digest(job)}/parts/training-{number:04d}.json"
        made = note_from_bytes(reference.Made, store.read(key), key)
        store.delete(getattr(made, name).key)
    assert chain.run(job).content == chain.run(alone).content
    opened(job)


def test_without_held_out_images_nothing_is_measured(tiny: chain.Chain, tmp_path: Path) -> None:
    job = fresh(tiny, tmp_path, {"source.held_out_fraction": 0.0})
    with pytest.raises(DataError, match=r"no held-out images.*source\.held_out_fraction"):
        chain.run(job)


class Broken:
    name, digest, dimension = "broken", "0", 2

    def activations(self, images: torch.Tensor) -> Any:
        from eqm.features import Activations

        features = torch.zeros(len(images), 2)
        features[1] = torch.inf
        return Activations(features)


def test_features_that_are_not_finite_are_refused(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "load_extractor", lambda *_: Broken())
    job = fresh(tiny, tmp_path)
    with pytest.raises(DataError, match=r"broken gives NaN .* training images, first for number 1"):
        chain.run(job)
    assert chain.store_of(job).record("reference", job_digest(job)) is None


def test_where_features_of_few_images_are_kept_a_distance_is_that_of_all_of_them() -> None:
    rows = np.random.default_rng(2).normal(size=(20, 8)).astype(np.float32)
    other = Gaussian.of(np.random.default_rng(3).normal(size=(20, 8)))
    expected = Gaussian.of(rows).distance(other)
    for kept in (20, 6):
        side = Side(moments=Moments.of(rows), spatial=None, features=rows[:kept], logits=None)
        assert side.gaussian().distance(other) == pytest.approx(expected, rel=1e-6)


# -- a batch of ADM in place of the training images ---------------------------------------------


class Coloured:
    """Means of colours in the corners: 12 features, 3 spatial ones."""

    name, digest, dimension = INCEPTION, "0", 12

    def activations(self, images: torch.Tensor) -> Any:
        from eqm.features import Activations

        colour = images.float().expand(-1, 3, -1, -1)
        corners = torch.nn.functional.adaptive_avg_pool2d(colour, 2)
        return Activations(corners.flatten(1), spatial=corners[:, :, 0, 0])


def batch_file(folder: Path, **arrays: Any) -> dict[str, Any]:
    data = io.BytesIO()
    np.savez(data, **arrays)
    path = folder / "batch.npz"
    path.write_bytes(data.getvalue())
    digest = hashlib.sha256(data.getvalue()).hexdigest()
    return {"reference.file": {"uri": str(path), "sha256": digest}}


IMAGES = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)


def test_images_of_a_file_stand_in_for_training_images(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "load_extractor", lambda *_: Coloured())
    job = fresh(tiny, tmp_path, batch_file(tmp_path, arr_0=IMAGES))
    found = opened(job)
    rows = Coloured().activations(torch.from_numpy(IMAGES).permute(0, 3, 1, 2)).features
    near(found.training.moments, Moments.of(rows))
    np.testing.assert_allclose(found.training.features, rows)
    assert found.held_out.count == COUNTS[1]
    (part,) = found.pictures("training")
    assert np.array_equal(part.images, IMAGES.transpose(0, 3, 1, 2))
    assert set(part.labels.tolist()) == {-1}


def test_moments_of_a_file_are_those_of_all_training_images(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "load_extractor", lambda *_: Coloured())
    rows = np.random.default_rng(1).normal(size=(500, 12))
    own = {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}
    file = batch_file(tmp_path, **own, mu_s=np.ones(3), sigma_s=np.eye(3))
    job = fresh(tiny, tmp_path / "a", {**file, "reference.file_images": 500})
    found = opened(job)
    near(found.training.moments, Moments.of(rows))
    assert found.training.spatial is not None
    np.testing.assert_allclose(found.training.spatial.covariance(), np.eye(3))
    assert found.training.features.shape == (0, 12)
    assert list(found.pictures("training")) == []
    assert found.record.values["images"] == {"training": 500, "held-out": COUNTS[1]}
    # Images beside moments give features, and no moments of their own.
    file = batch_file(tmp_path, arr_0=IMAGES, **own)
    found = opened(fresh(tiny, tmp_path / "b", {**file, "reference.file_images": 500}))
    near(found.training.moments, Moments.of(rows))
    assert found.training.spatial is None
    assert found.training.features.shape == (30, 12)


def test_moments_that_do_not_fit_are_refused(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = batch_file(tmp_path, mu=np.zeros(12), sigma=np.eye(12))
    with pytest.raises(ConfigError, match=r"set reference\.file_images"):
        chain.run(fresh(tiny, tmp_path / "a", file))
    known = {**file, "reference.file_images": 9}
    with pytest.raises(ConfigError, match=r"12 features under Inception.*digits-cnn gives 16"):
        chain.run(fresh(tiny, tmp_path / "b", known))
    monkeypatch.setattr(reference, "load_extractor", lambda *_: Coloured())
    assert opened(fresh(tiny, tmp_path / "c", known)).training.count == 9
    # As many features of another extractor are others all the same.
    monkeypatch.setattr(Coloured, "name", "digits-cnn")
    with pytest.raises(ConfigError, match=r"12 features .*digits-cnn gives 12 others"):
        chain.run(fresh(tiny, tmp_path / "d", known))
