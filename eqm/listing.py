"""The listing of a source in columns: a name, a label and a digest for each of a million images.

As objects of Python 1.28 million images would take a gigabyte, copied into every process that is
forked, since counting references writes to them. Columns take some 65 bytes an image beside its
key, and are shared. A listing is named by the digest of what it lists; its bytes are safetensors,
checked against that digest when they are read. Pure; eqm.layouts and eqm.images fill it.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from eqm.errors import IntegrityError
from eqm.records import canonical_bytes

Bytes = NDArray[np.uint8]
BLOCK_IMAGES = 4096
"""Images are turned into text by so many at once."""
AGAIN = "run the pipeline again, which lists the source anew"


@dataclass(frozen=True)
class Entry:
    """One image of a listing."""

    key: str
    """Its name within the source, "/" between the parts."""
    label: int
    held_out: bool
    """Kept from training."""
    sha256: str
    """Of its bytes as they lie in the source."""


class Place(NamedTuple):
    """Where the bytes of an image lie, if its key does not say it."""

    file: str
    offset: int
    """First byte in the file; of a parquet file the row."""
    size: int


@dataclass(frozen=True, eq=False)
class Places:
    """Columns of :class:`Place`, N rows."""

    files: tuple[str, ...]
    file: NDArray[np.int32]
    """Index into ``files``."""
    offset: NDArray[np.int64]
    size: NDArray[np.int64]

    def at(self, i: int) -> Place:
        """One row."""
        return Place(self.files[self.file[i]], int(self.offset[i]), int(self.size[i]))

    def taken(self, rows: NDArray[np.int64]) -> "Places":
        """Some rows."""
        return Places(self.files, self.file[rows], self.offset[rows], self.size[rows])


@dataclass(frozen=True, eq=False)
class Listing(Sequence[Entry]):
    """Images in their order; a sequence of :class:`Entry` that is kept as columns, N rows."""

    key_bytes: Bytes
    """UTF-8 of all keys, end to end."""
    key_end: NDArray[np.int64]
    label: NDArray[np.int32]
    held_out: NDArray[np.bool_]
    sha256: Bytes
    """(N, 32)."""
    places: Places | None = None
    """None where keys say where the images lie."""

    def __len__(self) -> int:
        return len(self.label)

    @overload
    def __getitem__(self, i: int) -> Entry: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[Entry, ...]: ...
    def __getitem__(self, i: int | slice) -> Entry | tuple[Entry, ...]:
        if isinstance(i, slice):
            return tuple(self[j] for j in range(*i.indices(len(self))))
        if not -len(self) <= i < len(self):
            raise IndexError(f"entry {i} of {len(self)}")
        i %= len(self)
        sha256 = self.sha256[i].tobytes().hex()
        return Entry(self.key(i), int(self.label[i]), bool(self.held_out[i]), sha256)

    def __eq__(self, other: object) -> bool:
        """Whether the same images are listed; not where they lie."""
        if not isinstance(other, Listing):
            return NotImplemented
        return all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("key_bytes", "key_end", "label", "held_out", "sha256")
        )

    __hash__ = None  # type: ignore[assignment]

    def key(self, i: int) -> str:
        """Key of image i >= 0."""
        start = self.key_end[i - 1] if i else 0
        return self.key_bytes[start : self.key_end[i]].tobytes().decode()

    def keys(self) -> Iterator[str]:
        """All keys, in order."""
        return unpacked(self.key_bytes, self.key_end)


def packed(texts: Iterable[str]) -> tuple[Bytes, NDArray[np.int64]]:
    """UTF-8 of texts end to end, and where each of them ends."""
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), ends


def unpacked(joined: Bytes, ends: NDArray[np.int64]) -> Iterator[str]:
    """The texts that :func:`packed` took. Raises UnicodeDecodeError."""
    data = joined.tobytes()
    return (data[a:b].decode() for a, b in itertools.pairwise([0, *ends.tolist()]))


# -- order and split ----------------------------------------------------------------------------


def held_out(key: str, fraction: float, seed: int) -> bool:
    """Whether a key is kept from training: a function of the key, not of its neighbours."""
    number = int.from_bytes(hashlib.sha256(f"split/{seed}/{key}".encode()).digest()[:8], "big")
    return number < fraction * 2**64


def order(keys: Iterable[str]) -> NDArray[np.int64]:
    """The order of a listing, as positions in ``keys``.

    By hash: classes are mixed, and an image keeps its place among the others for ever.
    """
    hashes = b"".join(hashlib.sha256(f"order/{key}".encode()).digest() for key in keys)
    words = np.frombuffer(hashes, dtype=">u8").reshape(-1, 4)
    return np.lexsort((words[:, 3], words[:, 2], words[:, 1], words[:, 0])).astype(np.int64)


def told_of_twins(listing: Listing) -> str | None:
    """What to tell of images that are the same bytes as another one; None where there are none.

    The split is by name, and so may put one of two twins on either side.
    """
    # 128 bits of a digest are enough to tell images apart.
    columns = np.ascontiguousarray(listing.sha256[:, :16]).view(np.uint64)
    rows = np.lexsort((columns[:, 0], columns[:, 1]))
    begins = np.ones(len(rows), dtype=bool)
    begins[1:] = (columns[rows][1:] != columns[rows][:-1]).any(axis=1)
    if begins.all():
        return None
    group = np.cumsum(begins) - 1
    trained_on = np.bincount(group, weights=~listing.held_out[rows]) > 0
    seen = int((listing.held_out[rows] & trained_on[group]).sum())
    second = int(np.flatnonzero(~begins)[0])
    one, other = sorted((int(rows[second - 1]), int(rows[second])))
    told = (
        f"{len(rows) - int(begins.sum()):,} of {len(rows):,} images are the same bytes as another "
        f"one, as {listing.key(other)} is {listing.key(one)}"
    )
    if not seen:
        return told
    return (
        f"{told}; {seen:,} of those that are held out are trained on all the same, so that numbers "
        "of held-out images, which stand for images that are new, are too good: remove twins"
    )


def listing_digest(
    kind: str, classes: Sequence[str], listing: Listing, skipped: Sequence[str]
) -> str:
    """SHA-256 over kind, classes, keys, labels, content and what was skipped; not over places.

    It is ``records.digest`` of the table of these, without holding its text at once.
    """
    found = hashlib.sha256(b'{"classes":' + canonical_bytes(classes) + b',"images":[')
    labels, keys = listing.label.tolist(), listing.keys()
    for start in range(0, len(listing), BLOCK_IMAGES):
        rows = range(start, min(start + BLOCK_IMAGES, len(listing)))
        images = [[next(keys), labels[i], listing.sha256[i].tobytes().hex()] for i in rows]
        text = json.dumps(images, separators=(",", ":"), ensure_ascii=False)[1:-1]
        found.update((("," if start else "") + text).encode())
    rest = canonical_bytes({"kind": kind, "skipped": skipped})
    found.update(b"]," + rest[1:])
    return found.hexdigest()


# -- bytes --------------------------------------------------------------------------------------

LISTING_TYPES: dict[str, tuple[Any, int]] = {
    "about": (np.uint8, 1),
    "key_bytes": (np.uint8, 1),
    "key_end": (np.int64, 1),
    "label": (np.int32, 1),
    "sha256": (np.uint8, 2),
}
PLACE_TYPES: dict[str, tuple[Any, int]] = {
    "file": (np.int32, 1),
    "offset": (np.int64, 1),
    "size": (np.int64, 1),
}


class Named(NamedTuple):
    """A listing with what its numbers mean."""

    classes: tuple[str, ...]
    skipped: tuple[str, ...]
    listing: Listing


def listing_to_bytes(named: Named) -> bytes:
    """safetensors with the columns. The split is not in it: it is a function of the keys."""
    listing, places = named.listing, named.listing.places
    about = {
        "classes": named.classes,
        "skipped": named.skipped,
        "files": None if places is None else places.files,
    }
    columns: dict[str, NDArray[Any]] = {
        "about": np.frombuffer(canonical_bytes(about), dtype=np.uint8),
        **{name: getattr(listing, name) for name in LISTING_TYPES if name != "about"},
        **({} if places is None else {name: getattr(places, name) for name in PLACE_TYPES}),
    }
    return safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in columns.items()})


def listing_from_bytes(
    data: bytes, *, kind: str, digest: str, is_held_out: Callable[[str], bool], where: str
) -> Named:
    """Read what :func:`listing_to_bytes` wrote; IntegrityError unless it has this digest."""
    try:
        columns = safetensors.numpy.load(data)
        about = json.loads(columns["about"].tobytes())
        named = _named(columns, about, is_held_out)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{where} is not a listing of images ({error}): {AGAIN}") from error
    found = listing_digest(kind, named.classes, named.listing, named.skipped)
    if found != digest:
        raise IntegrityError(
            f"{where} lists other images ({found[:12]}) than those asked for ({digest[:12]}): "
            f"{AGAIN}"
        )
    return named


def _named(
    columns: dict[str, NDArray[Any]], about: dict[str, Any], is_held_out: Callable[[str], bool]
) -> Named:
    files = about["files"]
    expected = LISTING_TYPES | ({} if files is None else PLACE_TYPES)
    check_columns(columns, expected)
    rows = {len(columns[name]) for name in expected if name not in ("about", "key_bytes")}
    label, sha256 = columns["label"], columns["sha256"]
    if len(rows) != 1 or sha256.shape[1] != 32:
        raise ValueError(f"columns of {sorted(rows)} rows")
    check_ends(columns["key_end"], columns["key_bytes"])
    if len(label) and not 0 <= label.min() <= label.max() < len(about["classes"]):
        raise ValueError("labels of no class")
    places = None
    if files is not None:
        places = Places(tuple(files), *(columns[name] for name in PLACE_TYPES))
        if len(label) and not 0 <= places.file.min() <= places.file.max() < len(files):
            raise ValueError("places in no file")
        if min(places.offset.min(initial=0), places.size.min(initial=0)) < 0:
            raise ValueError("places before their file")
    keys = unpacked(columns["key_bytes"], columns["key_end"])
    held = np.fromiter((is_held_out(key) for key in keys), dtype=np.bool_, count=len(label))
    listing = Listing(columns["key_bytes"], columns["key_end"], label, held, sha256, places=places)
    return Named(tuple(about["classes"]), tuple(about["skipped"]), listing)


def check_columns(columns: dict[str, NDArray[Any]], expected: dict[str, tuple[Any, int]]) -> None:
    """ValueError unless there are exactly these columns, of these types and dimensions."""
    found = {name: (column.dtype, column.ndim) for name, column in columns.items()}
    if found != expected:
        raise ValueError(f"it holds {sorted(found)}")


def check_ends(ends: NDArray[np.int64], joined: Bytes) -> None:
    """ValueError unless texts that end there fill the joined bytes."""
    if np.diff(ends, prepend=0).min(initial=0) < 0 or (ends[-1] if len(ends) else 0) != len(joined):
        raise ValueError("texts that do not fill their bytes")


# -- what a scan found --------------------------------------------------------------------------

TABLE_TYPES: dict[str, tuple[Any, int]] = {
    "name_bytes": (np.uint8, 1),
    "name_end": (np.int64, 1),
    "label_bytes": (np.uint8, 1),
    "label_end": (np.int64, 1),
    "wrong_bytes": (np.uint8, 1),
    "wrong_end": (np.int64, 1),
    "offset": (np.int64, 1),
    "size": (np.int64, 1),
    "sha256": (np.uint8, 2),
}


@dataclass(frozen=True, eq=False)
class Table:
    """What a scan found in one part of a source, in the order in which it lies there; N rows."""

    names: list[str]
    labels: list[str]
    """As the source writes them; "" where the place of an image says its label."""
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    sha256: Bytes
    """(N, 32)."""
    wrong: list[str]
    """Why an image cannot be decoded; "" for most."""


def table_to_bytes(table: Table) -> bytes:
    """safetensors with the columns and a checksum over them."""
    columns: dict[str, NDArray[Any]] = {
        "offset": table.offset,
        "size": table.size,
        "sha256": table.sha256,
    }
    for name in ("names", "labels", "wrong"):
        texts = packed(getattr(table, name))
        single = name.removesuffix("s")
        columns[f"{single}_bytes"], columns[f"{single}_end"] = texts
    columns = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    return safetensors.numpy.save({**columns, "checksum": _checksum(columns)})


def table_from_bytes(data: bytes) -> Table:
    """Read what :func:`table_to_bytes` wrote. Raises ValueError if any bit of it changed."""
    try:
        columns = safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
    checksum = columns.pop("checksum", None)
    check_columns(columns, TABLE_TYPES)
    if checksum is None or not np.array_equal(checksum, _checksum(columns)):
        raise ValueError("it does not match its checksum")
    names, labels, wrong = (
        list(unpacked(columns[f"{name}_bytes"], columns[f"{name}_end"]))
        for name in ("name", "label", "wrong")
    )
    return Table(
        names=names,
        labels=labels,
        offset=columns["offset"],
        size=columns["size"],
        sha256=columns["sha256"],
        wrong=wrong,
    )


def _checksum(columns: dict[str, NDArray[Any]]) -> Bytes:
    found = hashlib.sha256()
    for name in sorted(columns):
        found.update(f"{name} {columns[name].shape} ".encode())
        found.update(columns[name].tobytes())
    return np.frombuffer(found.digest(), dtype=np.uint8)
