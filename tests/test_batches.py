"""Batches: every image once an epoch, however many processes share it and wherever it went on."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sets import stored_set

import eqm
from eqm import patience
from eqm.batches import Batch, batches, mirror_of, order, read_batch, samples_of
from eqm.errors import AwayError, ConfigError, DataError
from eqm.latent_set import LatentSet
from eqm.patience import Patience
from eqm.randomness import Stream, uniform
from eqm.shards import MANIFEST, Sample, manifest_from_bytes
from eqm.storage import LocalStore

SHAPE = (4, 2, 2)


def a_sample(i: int, *, held_out: bool, mirror: bool) -> Sample:
    """Moments tell which sample and which view it is."""
    moments = np.full(SHAPE, i, dtype=np.float32)
    other = np.full(SHAPE, -i - 1, dtype=np.float32) if mirror else None
    return Sample(f"k/{i}", i % 2, held_out, moments, other)


def a_set(folder: Path, train: int = 10, held_out: int = 3, *, mirror: bool = False) -> LatentSet:
    """A set in shards of four; every third sample is held out as long as there are any."""
    store = LocalStore(folder)
    side = [i % 3 == 2 and i // 3 < held_out for i in range(train + held_out)]
    samples = [a_sample(i, held_out=h, mirror=mirror) for i, h in enumerate(side)]
    files = stored_set(store, samples, 4, classes=("a", "b"))
    return LatentSet(manifest_from_bytes(files[MANIFEST], "the set"), store, "the set")


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> LatentSet:
    return a_set(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def with_mirrors(tmp_path_factory: pytest.TempPathFactory) -> LatentSet:
    return a_set(tmp_path_factory.mktemp("mirrors"), train=40, held_out=4, mirror=True)


def take(data: LatentSet, count: int, **how: int) -> list[Batch]:
    return list(itertools.islice(batches(data, **how), count))


def joined(parts: list[Batch], name: str) -> list[int]:
    return torch.cat([getattr(part, name) for part in parts]).tolist()


def equal(one: Batch, two: Batch) -> bool:
    names = ("moments", "labels", "image_numbers", "sample_numbers")
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in names)


def test_a_batch_holds_what_its_sample_numbers_say(latents: LatentSet) -> None:
    batch = take(latents, 1, batch_size=6, seed=3)[0]
    assert batch.moments.shape == (6, *SHAPE)
    assert batch.moments.dtype == torch.float16
    assert batch.labels.dtype == batch.image_numbers.dtype == torch.int64
    assert batch.image_numbers.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.moments[:, 0, 0, 0].tolist() == batch.sample_numbers.tolist()
    assert batch.labels.tolist() == [n % 2 for n in batch.sample_numbers.tolist()]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    world=st.sampled_from([1, 2, 3, 4, 6]),
    share=st.integers(1, 7),
    epoch=st.integers(0, 4),
)
def test_every_image_comes_once_an_epoch(
    latents: LatentSet, seed: int, world: int, share: int, epoch: int
) -> None:
    size, total = world * share, len(latents.train_numbers)
    start, needed = epoch * total, -(-total // size)
    ranks = [
        take(latents, needed, batch_size=size, seed=seed, first_image=start, rank=r, world=world)
        for r in range(world)
    ]
    # Ranks side by side, batch by batch, are the images in their order.
    mixed = [part for parts in zip(*ranks, strict=True) for part in parts]
    assert joined(mixed, "image_numbers") == list(range(start, start + needed * size))
    assert sorted(joined(mixed, "sample_numbers")[:total]) == latents.train_numbers.tolist()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    size=st.integers(1, 25),
    done=st.integers(0, 12),
    world=st.sampled_from([1, 5]),
)
def test_going_on_is_the_same_as_never_having_stopped(
    with_mirrors: LatentSet, seed: int, size: int, done: int, world: int
) -> None:
    how = {"batch_size": size * world, "seed": seed, "rank": world - 1, "world": world}
    whole = take(with_mirrors, done + 2, **how)
    resumed = take(with_mirrors, 2, first_image=done * size * world, **how)
    assert all(equal(a, b) for a, b in zip(whole[done:], resumed, strict=True))


@pytest.mark.parametrize("world", [2, 3, 4, 6, 12])
def test_the_number_of_processes_changes_no_batch(with_mirrors: LatentSet, world: int) -> None:
    alone = take(with_mirrors, 5, batch_size=12, seed=1)
    ranks = [
        take(with_mirrors, 5, batch_size=12, seed=1, rank=r, world=world) for r in range(world)
    ]
    for whole, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        for name in ("moments", "labels", "image_numbers", "sample_numbers"):
            together = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(together, getattr(whole, name))
        assert {len(part.labels) for part in parts} == {12 // world}


def test_epochs_and_seeds_have_orders_of_their_own(with_mirrors: LatentSet) -> None:
    numbers = np.arange(80, dtype=np.int64)
    found = samples_of(with_mirrors, 0, numbers)
    assert found[:40].tolist() != found[40:].tolist()
    assert found.tolist() != samples_of(with_mirrors, 1, numbers).tolist()
    assert found[:40].tolist() != with_mirrors.train_numbers.tolist()


def test_the_order_does_not_see_the_blocks_it_is_computed_in() -> None:
    from eqm.randomness import BLOCK_IMAGES, permutation

    numbers = np.arange(BLOCK_IMAGES - 50, BLOCK_IMAGES + 50, dtype=np.int64)
    for size in (1, 7, 1797):
        expected = [
            int(permutation(5, int(n) // size, size, torch.tensor([int(n) % size]))[0])
            for n in numbers
        ]
        assert order(5, size, numbers).tolist() == expected


def test_half_of_the_images_are_mirrored_where_that_is_allowed(with_mirrors: LatentSet) -> None:
    numbers = np.arange(4000, dtype=np.int64)
    coins = mirror_of(with_mirrors, 0, numbers)
    assert coins is not None
    assert 0.46 < coins.mean() < 0.54
    batch = read_batch(with_mirrors, 0, 100, 50)
    shown = batch.moments[:, 0, 0, 0].long()
    expected = torch.where(
        torch.from_numpy(coins[100:150]), -batch.sample_numbers - 1, batch.sample_numbers
    )
    assert torch.equal(shown, expected)


def test_coins_are_of_the_image_and_never_change(with_mirrors: LatentSet) -> None:
    """A run that goes on under another version goes on with the same mirrors."""
    numbers = np.arange(16, dtype=np.int64)
    coins = mirror_of(with_mirrors, 7, numbers)
    assert coins is not None
    expected = uniform(7, Stream.MIRROR, torch.from_numpy(numbers))[:, 0] < 0.5
    assert coins.tolist() == expected.tolist()
    assert mirror_of(with_mirrors, 8, numbers).tolist() != coins.tolist()  # type: ignore[union-attr]
    # The same sample, an epoch later: a coin of its own.
    epoch = len(with_mirrors.train_numbers)
    firsts, seconds = (mirror_of(with_mirrors, 7, numbers + n) for n in (0, epoch))
    assert firsts.tolist() != seconds.tolist()  # type: ignore[union-attr]


def test_batches_are_page_locked_where_that_is_asked_for(
    latents: LatentSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked: list[Batch] = []
    monkeypatch.setattr(Batch, "pinned", lambda batch: locked.append(batch) or batch)
    plain = take(latents, 2, batch_size=4, seed=0)
    assert locked == []
    pinned = list(itertools.islice(batches(latents, batch_size=4, seed=0, pin=True), 2))
    assert all(equal(a, b) for a, b in zip(plain, pinned, strict=True))
    assert {id(batch) for batch in pinned} <= {id(batch) for batch in locked}


def test_a_store_that_is_away_for_a_while_ends_no_stream(
    latents: LatentSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = LatentSet.moments, [AwayError("S3 is away")] * 2

    def moments(self: LatentSet, *given: object) -> object:
        if failures:
            raise failures.pop()
        return real(self, *given)  # type: ignore[arg-type]

    expected = take(latents, 2, batch_size=4, seed=0)
    monkeypatch.setattr(LatentSet, "moments", moments)
    monkeypatch.setattr(patience, "FIRST_SECONDS", 0.01)
    feed = batches(latents, batch_size=4, seed=0, patience=Patience(60.0))
    found = list(itertools.islice(feed, 2))
    assert failures == []
    assert all(equal(a, b) for a, b in zip(expected, found, strict=True))


def test_held_out_samples_are_batches_of_their_own(latents: LatentSet) -> None:
    found = next(batches(latents, batch_size=3, seed=0, split="held_out"))
    assert sorted(found.sample_numbers.tolist()) == latents.held_out_numbers.tolist()
    trained = take(latents, 5, batch_size=4, seed=0)
    assert not set(joined(trained, "sample_numbers")) & set(latents.held_out_numbers.tolist())


def test_a_batch_may_be_larger_than_the_set(latents: LatentSet) -> None:
    found = take(latents, 1, batch_size=25, seed=0)[0].sample_numbers.tolist()
    assert sorted(found[:10]) == sorted(found[10:20]) == latents.train_numbers.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 5, "world": 2}, "2 processes cannot share equally"),
        ({"first_image": -1}, "first_image is -1"),
        ({"world": 0}, "world is 0"),
        ({"rank": 1}, "rank is 1"),
        ({"rank": -1}, "rank is -1"),
        ({"split": "test"}, "split is 'test'"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_read(
    latents: LatentSet, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        batches(latents, **{"batch_size": 4, "seed": 0, **changes})  # type: ignore[arg-type]


def test_a_side_without_samples_is_refused(tmp_path: Path) -> None:
    data = a_set(tmp_path, held_out=0)
    with pytest.raises(DataError, match="has no held_out samples"):
        batches(data, batch_size=1, seed=0, split="held_out")


def test_damage_reaches_the_reader(tmp_path: Path) -> None:
    data = a_set(tmp_path)
    # All shards are open by now: one that is damaged before that is told by its digest.
    data.moments(np.arange(len(data)))
    feed = batches(data, batch_size=10, seed=0)
    next(feed)
    for shard in data.manifest.shards:
        path = tmp_path / shard.tar.key
        path.chmod(0o644)
        with path.open("r+b") as file:
            file.write(b"\xff" * shard.tar.size_bytes)
    with pytest.raises(eqm.errors.IntegrityError, match="does not match its CRC"):
        list(itertools.islice(feed, 3))


def test_the_public_name_is_called_and_is_a_module(latents: LatentSet) -> None:
    assert equal(
        next(eqm.batches(latents, batch_size=4, seed=0)),
        next(eqm.batches.batches(latents, batch_size=4, seed=0)),  # type: ignore[attr-defined]
    )


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_set_any_world_any_place(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever the shards, ranks, readers and start: one order, each image once an epoch."""
    draw = data.draw
    count, shard_images = draw(st.integers(2, 30)), draw(st.integers(1, 12))
    mirror, seed = draw(st.booleans()), draw(st.integers(0, 2**62))
    held = draw(st.integers(0, count - 2))
    samples = [a_sample(i, held_out=i >= count - held, mirror=mirror) for i in range(count)]
    store = LocalStore(tmp_path_factory.mktemp("any"))
    files = stored_set(store, samples, shard_images, classes=("a", "b"))
    latents = LatentSet(manifest_from_bytes(files[MANIFEST], "m"), store, "m")
    world, share = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    size, start = world * share, draw(st.integers(0, 4 * count))
    epoch = len(latents.train_numbers)
    updates = -(-2 * epoch // size)

    def stream(first: int, world: int, ahead: int) -> np.ndarray:
        """(image, sample, value) of all images from ``first`` on, by rank and then by place."""
        ranks = [
            take(latents, updates, batch_size=size, seed=seed, first_image=first, rank=rank,
                 world=world, ahead=ahead)
            for rank in range(world)
        ]  # fmt: skip
        parts = [batch for update in zip(*ranks, strict=True) for batch in update]
        numbers, samples = joined(parts, "image_numbers"), joined(parts, "sample_numbers")
        values = torch.cat([part.moments[:, 0, 0, 0] for part in parts]).tolist()
        return np.array([numbers, samples, values])

    alone = stream(0, 1, draw(st.integers(1, 4)))
    assert np.array_equal(alone, stream(0, world, draw(st.integers(1, 4))))
    assert alone[0].tolist() == list(range(updates * size))
    for first in range(0, 2 * epoch, epoch):
        assert sorted(alone[1, first : first + epoch]) == latents.train_numbers.tolist()
    later = stream(start, world, draw(st.integers(1, 4)))
    both = slice(start, updates * size)
    assert np.array_equal(alone[:, both], later[:, : max(0, updates * size - start)])
