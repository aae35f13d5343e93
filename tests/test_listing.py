"""A listing is a sequence of entries, small, and bound to its digest."""

import hashlib
import os
import re
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from eqm import listing, records
from eqm.errors import IntegrityError
from eqm.listing import (
    Entry,
    Listing,
    Named,
    Place,
    Places,
    Table,
    listing_digest,
    listing_from_bytes,
    listing_to_bytes,
    packed,
    table_from_bytes,
    table_to_bytes,
    told_of_twins,
    unpacked,
)

CLASSES = ("cat", "Hund ä", "犬")


def is_held_out(key: str) -> bool:
    return listing.held_out(key, 0.3, 7)


def made(count: int = 20, *, places: bool = True) -> Named:
    keys = [f"{CLASSES[i % 3]}/{i}" + "é" * (i % 4) for i in range(count)]
    hashes = b"".join(hashlib.sha256(key.encode()).digest() for key in keys)
    files = tuple(f"{i}.tar" for i in range(4))
    numbers = np.arange(count)
    where = Places(files, (numbers % 4).astype(np.int32), numbers * 1000, numbers + 5)
    found = Listing(
        *packed(keys),
        (numbers % 3).astype(np.int32),
        np.array([is_held_out(key) for key in keys], dtype=np.bool_),
        np.frombuffer(hashes, dtype=np.uint8).reshape(-1, 32),
        places=where if places else None,
    )
    return Named(CLASSES, ("cat/bad",), found)


def digest_of(named: Named) -> str:
    return listing_digest("folder", named.classes, named.listing, named.skipped)


def read(data: bytes, digest: str, kind: str = "folder") -> Named:
    return listing_from_bytes(
        data, kind=kind, digest=digest, is_held_out=is_held_out, where="the listing"
    )


def test_it_is_a_sequence_of_entries() -> None:
    found = made().listing
    assert len(found) == 20
    key = "犬/5é"
    expected = Entry(key, 2, is_held_out(key), hashlib.sha256(key.encode()).hexdigest())
    assert found[5] == found[-15] == expected
    assert list(found)[5] == expected
    assert found[4:7] == (found[4], found[5], found[6])
    assert expected in found
    assert [entry.key for entry in found] == list(found.keys())
    assert found.places is not None
    assert found.places.at(6) == Place("2.tar", 6000, 11)
    for i in (20, -21):
        with pytest.raises(IndexError):
            found[i]


def test_equal_listings_have_equal_images_wherever_they_lie() -> None:
    assert made().listing == made(places=False).listing
    assert made().listing != made(19).listing
    one, other = made().listing, made().listing
    other.label[3] = 1
    assert one != other
    assert one != list(one)


def test_an_image_takes_some_tens_of_bytes_beside_its_key() -> None:
    found = made(1000).listing
    assert found.places is not None
    columns = [found.key_end, found.label, found.held_out, found.sha256]
    columns += [found.places.file, found.places.offset, found.places.size]
    assert sum(column.nbytes for column in columns) == 65 * 1000
    assert len(listing_to_bytes(made(1000))) < 64 * 1000 + found.key_bytes.nbytes + 2000


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097, 9000])
def test_the_digest_is_that_of_the_whole_table(count: int) -> None:
    named = made(count)
    images = [[entry.key, entry.label, entry.sha256] for entry in named.listing]
    table = {"kind": "folder", "classes": named.classes, "images": images}
    assert digest_of(named) == records.digest({**table, "skipped": named.skipped})


@pytest.mark.parametrize("places", [True, False])
def test_bytes_give_back_the_listing(places: bool) -> None:
    named = made(places=places)
    data = listing_to_bytes(named)
    assert data == listing_to_bytes(made(places=places))
    again = read(data, digest_of(named))
    assert again.listing == named.listing
    assert (again.classes, again.skipped) == (named.classes, named.skipped)
    if again.listing.places is None:
        assert not places
    else:
        where = again.listing.places
        assert [where.at(i) for i in range(20)] == [made().listing.places.at(i) for i in range(20)]  # type: ignore[union-attr]


def test_another_listing_is_refused() -> None:
    named = made()
    data = listing_to_bytes(named)
    with pytest.raises(IntegrityError, match="lists other images"):
        read(data, digest_of(made(19)))
    with pytest.raises(IntegrityError, match="lists other images"):
        read(data, digest_of(named), kind="webdataset")
    for changed in (
        named._replace(skipped=()),
        named._replace(classes=("a", "b", "c")),
        named._replace(classes=(*CLASSES, "d")),
    ):
        with pytest.raises(IntegrityError, match="lists other images"):
            read(listing_to_bytes(changed), digest_of(named))


def changed(**columns: Callable[[np.ndarray], np.ndarray] | None) -> bytes:
    found = safetensors.numpy.load(listing_to_bytes(made()))
    for name, change in columns.items():
        if change is None:
            del found[name]
        else:
            found[name] = np.ascontiguousarray(change(found[name]))
    return safetensors.numpy.save(found)


@pytest.mark.parametrize(
    "columns",
    [
        {"label": lambda x: x + 3},
        {"label": lambda x: x.astype(np.int64)},
        {"label": lambda x: x[1:]},
        {"key_end": lambda x: x[::-1]},
        {"key_end": lambda x: x + 1},
        {"key_bytes": lambda x: x[:-1]},
        {"key_bytes": lambda x: np.where(x == ord("c"), 0xFF, x).astype(np.uint8)},
        {"sha256": lambda x: x[:, :31]},
        {"sha256": lambda x: x ^ 1},
        {"sha256": None},
        {"file": lambda x: x + 1},
        {"file": lambda x: x - 1},
        {"offset": lambda x: x - 1},
        {"size": lambda x: x - 6},
        {"about": lambda x: x[:-1]},
        {"about": None},
        {"offset": None},
    ],
)
def test_columns_that_do_not_fit_are_refused(columns: dict[str, None]) -> None:
    with pytest.raises(IntegrityError, match=r"the listing .*run the pipeline again"):
        read(changed(**columns), digest_of(made()))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused_or_list_the_same_images(data: st.DataObject) -> None:
    named = made()
    damaged = bytearray(listing_to_bytes(named))
    for at in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[at] = data.draw(st.integers(0, 255))
    try:
        found = read(bytes(damaged), digest_of(named))
    except IntegrityError:
        return
    assert found.listing == named.listing


# -- order and split ----------------------------------------------------------------------------


@given(st.lists(st.text(max_size=8), unique=True, max_size=60))
def test_the_order_is_that_of_the_hashes_of_the_keys(keys: list[str]) -> None:
    expected = sorted(keys, key=lambda key: hashlib.sha256(f"order/{key}".encode()).digest())
    assert [keys[i] for i in listing.order(keys)] == expected


@given(st.text(min_size=1, max_size=30), st.floats(0, 0.99), st.integers(0, 2**63 - 1))
def test_a_key_that_is_held_out_stays_so_as_the_share_grows(
    key: str, fraction: float, seed: int
) -> None:
    if listing.held_out(key, fraction, seed):
        assert listing.held_out(key, (1 + fraction) / 2, seed)
    assert not listing.held_out(key, 0.0, seed)


def test_the_split_has_the_share_asked_for_and_depends_on_the_seed() -> None:
    keys = [f"k/{i}" for i in range(4000)]
    one, two = ([listing.held_out(key, 0.3, seed) for key in keys] for seed in (0, 1))
    assert abs(sum(one) / 4000 - 0.3) < 0.03
    assert 0.3 < np.mean(np.array(one) == np.array(two)) < 0.7


# -- what a scan found --------------------------------------------------------------------------


def table(count: int = 3) -> Table:
    return Table(
        names=[f"{i}é" for i in range(count)],
        labels=["", "7", "犬"][:count],
        offset=np.arange(count),
        size=np.arange(count) + 10,
        sha256=np.frombuffer(os.urandom(32 * count), dtype=np.uint8).reshape(-1, 32),
        wrong=["", "broken", ""][:count],
    )


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_table_survives_its_bytes(count: int) -> None:
    one = table(count)
    two = table_from_bytes(table_to_bytes(one))
    assert (two.names, two.labels, two.wrong) == (one.names, one.labels, one.wrong)
    for name in ("offset", "size", "sha256"):
        assert np.array_equal(getattr(two, name), getattr(one, name))


def test_a_table_with_any_byte_changed_is_refused_or_the_same() -> None:
    one = table()
    whole = table_to_bytes(one)
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        try:
            two = table_from_bytes(bytes(damaged))
        except ValueError:
            continue
        # What is left is space that pads the header.
        assert (two.names, two.labels, two.wrong) == (one.names, one.labels, one.wrong)
        assert np.array_equal(two.sha256, one.sha256)
    with pytest.raises(ValueError, match="holds"):
        table_from_bytes(safetensors.numpy.save({"checksum": np.zeros(32, dtype=np.uint8)}))


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=15))
def test_twins_are_counted_and_those_that_are_trained_on(images: list[tuple[int, bool]]) -> None:
    """``images``: what the bytes of each are, and whether it is held out."""
    hashes = b"".join(hashlib.sha256(bytes([one])).digest() for one, _ in images)
    told = told_of_twins(
        Listing(
            *packed(f"{i}.png" for i in range(len(images))),
            np.zeros(len(images), dtype=np.int32),
            np.array([held for _, held in images]),
            np.frombuffer(hashes, dtype=np.uint8).reshape(-1, 32),
        )
    )
    again = len(images) - len({one for one, _ in images})
    trained = {one for one, held in images if not held}
    seen = sum(held and one in trained for one, held in images)
    if not again:
        assert told is None
        return
    assert told is not None
    assert told.startswith(f"{again} of {len(images)} images are the same bytes as another one")
    assert (f"; {seen} of those that are held out are trained on" in told) == bool(seen)
    other, one = re.findall(r"as (\d+)\.png is (\d+)\.png", told)[0]
    assert int(one) < int(other)
    assert images[int(one)][0] == images[int(other)][0]


@given(st.lists(st.text(max_size=5), max_size=20))
def test_texts_are_packed_and_unpacked(texts: list[str]) -> None:
    assert list(unpacked(*packed(texts))) == texts
