"""Samples <-> shards with an index, and the sealed set that they form.

A shard is a plain tar (eqm.tars) with an index of its own beside it: the unit in which images are
encoded and committed. Sealing joins the indices into one file of columns that is mapped, not read:
opening a set of any size costs the same, and a LatentSet reads any sample from the mapped tars, or
from S3 by range until they are here, without parsing anything. Which images go into which shard is
eqm.encode's business, their order in training that of eqm.batches. The only door to webdataset.

    N  samples of the set    V  views of a sample (1, or 2 with mirrors)    C, H, W  of a latent
"""

import itertools
import json
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from eqm.errors import ConfigError, DataError, EqmError, IntegrityError, MissingError
from eqm.records import Blob, LatentSpec, Manifest, Record, Ref, Shard, canonical_bytes, from_json
from eqm.storage import LocalStore, Store, open_store
from eqm.tars import LARGEST_NUMBER, VIEWS, Facts, Placed, flaws, npy_header, npy_size, pack

MANIFEST, INDEX, KEYS = "manifest.json", "index.safetensors", "keys.safetensors"
"""What a "latents" record has among its outputs, beside the shards."""
ORIGINALS = "originals.safetensors"
"""Pixels of some of the images: ``numbers`` (K,) int64 and ``pixels`` (K, C, H, W) uint8."""

Float16 = NDArray[np.float16]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One image, encoded."""

    key: str
    label: int
    held_out: bool
    moments: NDArray[Any]
    """(2C, H, W): mean, then standard deviation, raw."""
    mirror: NDArray[Any] | None = None
    """The same of the mirror image."""


@dataclass(frozen=True)
class Packed:
    """A shard before it is stored."""

    tar: bytes
    index: bytes
    count: int


# -- one shard ----------------------------------------------------------------------------------


def write_shard(samples: Sequence[Sample], *, first_number: int) -> Packed:
    """Pack samples numbered from ``first_number`` on; equal samples give equal bytes.

    Arrays are stored as float16. Raises DataError for a shard without samples, for arrays of
    different shapes, and for values that are not finite as float16.
    """
    if not samples:
        raise DataError("a shard must hold at least one sample")
    if first_number + len(samples) - 1 > LARGEST_NUMBER:
        raise DataError(f"a set of latents holds at most {LARGEST_NUMBER + 1:,} samples")
    arrays = [_arrays(sample, samples[0]) for sample in samples]
    numbered = enumerate(samples, first_number)
    facts = [Facts(n, sample.key, sample.label, sample.held_out) for n, sample in numbered]
    tar, places = pack(list(zip(facts, arrays, strict=True)))
    if len(tar) > LARGEST_TAR:
        raise DataError(
            f"a shard of {len(samples)} samples takes {len(tar):,} bytes, {LARGEST_TAR:,} are the "
            "most: lower encode.shard_images"
        )
    index = _index(facts, places, [views[0] for views in arrays])
    return Packed(tar, safetensors.numpy.save(index), len(samples))


LARGEST_TAR = 2**32 - 1
"""Places in a tar are kept as 32 bits."""


def _arrays(sample: Sample, first: Sample) -> list[Float16]:
    if (sample.mirror is None) != (first.mirror is None):
        raise DataError(
            f"sample {sample.key!r}: either all samples of a shard have a mirror, or none"
        )
    views = [sample.moments] if sample.mirror is None else [sample.moments, sample.mirror]
    for view in views:
        if view.shape != first.moments.shape or view.ndim != 3 or len(view) % 2:
            raise DataError(
                f"sample {sample.key!r} has moments of shape {view.shape}; the first of its shard "
                f"has {first.moments.shape}, and (2C, H, W) is needed"
            )
    with np.errstate(over="ignore"):  # what overflows is refused below, by name
        halves = [np.ascontiguousarray(view, dtype="<f2") for view in views]
    for view, half in zip(views, halves, strict=True):
        if not np.isfinite(half).all():
            raise DataError(
                f"the moments of image {sample.key!r} reach {np.abs(view).max():g}, which is not "
                "finite as float16: the autoencoder is damaged, or made for other images"
            )
    return halves


def _index(
    facts: Sequence[Facts], places: list[list[Placed]], moments: list[Float16]
) -> dict[str, NDArray[Any]]:
    """Columns of the index of one shard."""
    keys = [one.key.encode() for one in facts]
    held_out = np.array([one.held_out for one in facts])
    # Stacked one by one: a float64 copy of a whole shard would be four times its size.
    means = [m[: len(m) // 2].astype(np.float64) for m in itertools.compress(moments, ~held_out)]
    nothing = np.zeros(len(moments[0]) // 2)
    return {
        "offset": np.array([[place.offset for place in row] for row in places], dtype=np.uint32),
        "crc32": np.array([[place.crc32 for place in row] for row in places], dtype=np.uint32),
        "label": np.array([one.label for one in facts], dtype=np.int32),
        "held_out": held_out,
        "key_bytes": np.frombuffer(b"".join(keys), dtype=np.uint8),
        "key_end": np.cumsum([len(key) for key in keys], dtype=np.int64),
        "shape": np.array(moments[0].shape, dtype=np.int64),
        # Over the training means, for the statistics of the whole set.
        "sum": sum((m.sum(axis=(1, 2)) for m in means), nothing),
        "sum_of_squares": sum((np.square(m).sum(axis=(1, 2)) for m in means), nothing),
    }


@dataclass(frozen=True)
class Index:
    """Where everything lies in one tar; arrays have one row a sample."""

    offset: NDArray[np.uint32]
    """(N, V): first byte of each array's .npy file in the tar; V views."""
    crc32: NDArray[np.uint32]
    """(N, V), over those files."""
    label: NDArray[np.int32]
    held_out: NDArray[np.bool_]
    key_bytes: NDArray[np.uint8]
    key_end: Int64
    shape: Int64
    """Of every array: 2C, H, W."""
    sum: NDArray[np.float64]
    """(C,) of the stored means over training samples and positions."""
    sum_of_squares: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.label)

    @property
    def keys(self) -> list[str]:
        """Names of the images in their source."""
        joined, ends = self.key_bytes.tobytes(), [0, *self.key_end.tolist()]
        return [joined[a:b].decode() for a, b in itertools.pairwise(ends)]

    def samples(self, first_number: int) -> list[tuple[Facts, list[Placed]]]:
        """What each sample is and where its arrays lie, as eqm.tars wants it."""
        rows = zip(self.keys, self.label.tolist(), self.held_out.tolist(), strict=True)
        facts = [Facts(first_number + i, *row) for i, row in enumerate(rows)]
        places = zip(self.offset.tolist(), self.crc32.tolist(), strict=True)
        return list(
            zip(
                facts,
                ([Placed(*view) for view in zip(*row, strict=True)] for row in places),
                strict=True,
            )
        )


INDEX_TYPES: dict[str, Any] = {
    "offset": np.uint32,
    "crc32": np.uint32,
    "label": np.int32,
    "held_out": np.bool_,
    "key_bytes": np.uint8,
    "key_end": np.int64,
    "shape": np.int64,
    "sum": np.float64,
    "sum_of_squares": np.float64,
}

AGAIN = "delete the record of the latents and encode again"


def read_index(data: bytes, shard: Shard, where: str) -> Index:
    """Index of a shard. Raises IntegrityError where it is not one, or not that shard's."""
    try:
        tensors = safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise IntegrityError(f"the index of {where} cannot be read ({error}): {AGAIN}") from error
    types = {name: tensor.dtype for name, tensor in tensors.items()}
    if types != INDEX_TYPES:
        raise IntegrityError(f"the index of {where} holds {sorted(types)}: {AGAIN}")
    index = Index(**tensors)
    rows = {len(x) for x in (index.offset, index.crc32, index.label, index.held_out, index.key_end)}
    if rows != {shard.count} or index.offset.ndim != 2 or index.offset.shape != index.crc32.shape:
        raise IntegrityError(
            f"the index of {where} does not have {shard.count} rows, as the manifest says: {AGAIN}"
        )
    if int(index.offset.max()) >= shard.tar.size_bytes:
        raise IntegrityError(f"the index of {where} points outside its tar: {AGAIN}")
    return index


# -- sealing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sealed:
    """The files of a set beside its shards."""

    manifest: Manifest
    index: bytes
    keys: bytes

    @property
    def files(self) -> dict[str, bytes]:
        """By name: MANIFEST, INDEX and KEYS."""
        return {MANIFEST: canonical_bytes(self.manifest), INDEX: self.index, KEYS: self.keys}


def seal_set(
    shards: Sequence[Shard],
    indices: Sequence[Index],
    *,
    spec: LatentSpec,
    source: str,
    classes: tuple[str, ...],
    mirrored: bool,
    skipped: tuple[str, ...] = (),
    lineage: Mapping[str, Ref] | None = None,
) -> Sealed:
    """Join the indices of all shards into one, count, and describe the whole.

    All shards but the last must be of one size, so that the shard of a sample is a division. Raises
    DataError where they are not, or are no shards of one set.
    """
    if not shards:
        raise DataError("a set of latents must hold at least one shard")
    size = shards[0].count
    channels, height, width = spec.shape
    _check_shards(shards, indices, size, len(classes), 1 + mirrored, (2 * channels, height, width))
    labels = np.concatenate([index.label for index in indices])
    held_out = np.concatenate([index.held_out for index in indices])
    columns = {
        "offset": np.concatenate([index.offset for index in indices]),
        "crc32": np.concatenate([index.crc32 for index in indices]),
        "label": labels,
        "held_out": held_out,
        "shape": np.array((2 * channels, height, width), dtype=np.int64),
        "train": np.flatnonzero(~held_out).astype(np.int32),
        "held_out_numbers": np.flatnonzero(held_out).astype(np.int32),
    }
    index = safetensors.numpy.save(columns)
    keys = safetensors.numpy.save(_joined_keys(indices))
    mean, std = channel_statistics(indices, len(columns["train"]), spec.shape)
    manifest = Manifest(
        spec=spec,
        source=source,
        classes=classes,
        mirrored=mirrored,
        shards=tuple(shards),
        shard_images=size,
        index=Blob.of(index),
        keys=Blob.of(keys),
        train_per_class=_per_class(labels[~held_out], len(classes)),
        held_out_per_class=_per_class(labels[held_out], len(classes)),
        channel_mean=mean,
        channel_std=std,
        skipped=skipped,
        lineage=dict(lineage or {}),
    )
    return Sealed(manifest, index, keys)


def _check_shards(
    shards: Sequence[Shard],
    indices: Sequence[Index],
    size: int,
    classes: int,
    views: int,
    shape: tuple[int, ...],
) -> None:
    for number, (shard, index) in enumerate(zip(shards, indices, strict=True)):
        last = number == len(shards) - 1
        if shard.count != size and not (last and 0 < shard.count < size):
            raise DataError(
                f"shard {number} holds {shard.count} samples, the first holds {size}: all but the "
                "last must hold as many"
            )
        if index.offset.shape != (shard.count, views):
            raise DataError(
                f"shard {number} has an index of shape {index.offset.shape}, ({shard.count}, "
                f"{views}) is needed"
            )
        if tuple(index.shape) != shape:
            raise DataError(
                f"shard {number} has moments of shape {tuple(index.shape)}, those of the "
                f"autoencoder have {shape}: it was made with another one"
            )
        if int(index.label.min()) < 0 or int(index.label.max()) >= classes:
            raise DataError(f"shard {number} has a label outside 0 to {classes - 1}")


def _joined_keys(indices: Sequence[Index]) -> dict[str, NDArray[Any]]:
    starts = np.cumsum([0, *(len(index.key_bytes) for index in indices)])
    ends = [index.key_end + start for index, start in zip(indices, starts, strict=False)]
    return {
        "key_bytes": np.concatenate([index.key_bytes for index in indices]),
        "key_end": np.concatenate(ends),
    }


def _per_class(labels: NDArray[Any], classes: int) -> tuple[int, ...]:
    return tuple(np.bincount(labels, minlength=classes).tolist())


def channel_statistics(
    indices: Sequence[Index], samples: int, shape: tuple[int, int, int]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each latent channel over the training samples."""
    count = samples * shape[1] * shape[2]
    mean = np.sum([index.sum for index in indices], axis=0) / count
    square = np.sum([index.sum_of_squares for index in indices], axis=0) / count
    std = np.sqrt(np.maximum(square - mean**2, 0.0))
    return tuple(mean.tolist()), tuple(std.tolist())


# -- opening ------------------------------------------------------------------------------------


def manifest_from_bytes(data: bytes, where: str) -> Manifest:
    """Read manifest.json. Raises IntegrityError, ConfigError."""
    try:
        body = json.loads(data)
    except ValueError as error:
        raise IntegrityError(f"{where} is not JSON ({error}): {AGAIN}") from error
    return from_json(Manifest, body, where)


def open_manifest(
    where: str | Path | Record,
    store: Store | None = None,
    *,
    cache: Path | None = None,
    cache_bytes: int | None = None,
) -> "LatentSet":
    """Open a sealed set of latents, everything checked against its digest before it is parsed.

    ``where`` is the address of its record (``s3://bucket/prefix/latents/<digest>``, or the same in
    a local directory), or the record itself with its ``store``. ``cache`` keeps verified copies of
    what lies in S3, at most ``cache_bytes`` of them (None: all). Raises ConfigError, DataError,
    IntegrityError, StoreError.
    """
    if isinstance(where, Record):
        if store is None:
            raise ConfigError("a record alone does not say where its shards lie: give its store")
        record = where
    else:
        store, record = sealed_latents(str(where), cache, cache_bytes)
    return LatentSet(manifest_of(store, record), store, place_of(store, record))


def manifest_of(store: Store, record: Record) -> Manifest:
    """The manifest of a "latents" record. Raises DataError, IntegrityError, StoreError."""
    if record.stage != "latents" or MANIFEST not in record.outputs:
        raise DataError(f"{record.stage} {record.digest[:12]} is no set of latents")
    place = f"{place_of(store, record)}/{MANIFEST}"
    return manifest_from_bytes(store.get(record.outputs[MANIFEST]), place)


def place_of(store: Store, record: Record) -> str:
    """Address of a set, for people and for :func:`open_manifest`."""
    return store.where(f"latents/{record.digest}")


def sealed_latents(
    uri: str, cache: Path | None = None, cache_bytes: int | None = None
) -> tuple[Store, Record]:
    """Store and record of ``<store>/latents/<digest>``.

    Raises ConfigError for another address, DataError where nothing is sealed, StoreError.
    """
    root, _, digest = uri.rstrip("/").removesuffix("/record.json").rpartition("/")
    root, _, stage = root.rpartition("/")
    if stage != "latents" or len(digest) != 64 or not root:
        raise ConfigError(
            f"{uri!r} is no set of latents: give <store>/latents/<digest>, s3:// or local"
        )
    if "://" not in root and not Path(root).is_dir():
        raise DataError(f"there is no store at {root}")
    store = open_store(root, cache=cache, cache_bytes=cache_bytes)
    record = store.record(stage, digest)
    if record is None:
        raise DataError(
            f"{uri} is not sealed: there is no record.json; run the encoding to its end"
        )
    return store, record


def _columns(path: Path, types: Mapping[str, Any], where: str) -> dict[str, NDArray[Any]]:
    """Arrays of a safetensors file, mapped: no byte is read before it is looked at."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    try:
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header: dict[str, Any] = json.loads(data[8:start].tobytes())
        found = {name: _column(data[start:], header[name], types[name]) for name in types}
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{where} does not hold {', '.join(types)}: {AGAIN}") from error
    return found


def _column(data: NDArray[np.uint8], entry: Any, dtype: Any) -> NDArray[Any]:
    first, end = entry["data_offsets"]
    return data[first:end].view(dtype).reshape(entry["shape"])


COLUMN_TYPES: dict[str, Any] = {
    "offset": np.uint32,
    "crc32": np.uint32,
    "label": np.int32,
    "held_out": np.bool_,
    "shape": np.int64,
    "train": np.int32,
    "held_out_numbers": np.int32,
}
KEY_TYPES: dict[str, Any] = {"key_bytes": np.uint8, "key_end": np.int64}
COUNTED_AT_ONCE = 2**16


# -- reading ------------------------------------------------------------------------------------


class LatentSet:
    """Random access to the samples of a manifest, by number: 0 is the first of the first shard.

    Columns of the index are mapped: the memory of this process does not grow with the set. Shards
    in a local store are mapped where they lie. Of a set in S3 the shards are fetched into this
    machine's cache in the background, from the first read on; a sample whose shard is not here yet,
    or never will be because the cache is full, is read from S3 by its range.
    """

    def __init__(self, manifest: Manifest, store: Store, where: str) -> None:
        self.manifest = manifest
        self.where = where
        self._store = store
        path = store.fetch(manifest.index)
        columns = _columns(path, COLUMN_TYPES, f"the index of {where}")
        self._offset, self._crc32 = columns["offset"], columns["crc32"]
        self.labels: NDArray[np.int32] = columns["label"]
        """(N,), by sample number."""
        self.held_out: NDArray[np.bool_] = columns["held_out"]
        """(N,), by sample number."""
        self.train_numbers: NDArray[np.int32] = columns["train"]
        """Numbers of the samples to train on, ascending."""
        self.held_out_numbers: NDArray[np.int32] = columns["held_out_numbers"]
        channels, height, width = manifest.spec.shape
        self._shape = (2 * channels, height, width)
        self._check(tuple(columns["shape"].tolist()))
        self._mapped: list[memoryview | None] = [None] * len(manifest.shards)
        self._fetcher: _Fetcher | None = None
        self._ranges: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def resident(self) -> float:
        """Share of the shards that this process has mapped."""
        return sum(tar is not None for tar in self._mapped) / len(self._mapped)

    @property
    def keys(self) -> list[str]:
        """Names of all images in their source, by sample number."""
        path = self._store.fetch(self.manifest.keys)
        columns = _columns(path, KEY_TYPES, f"the keys of {self.where}")
        joined, ends = columns["key_bytes"].tobytes(), [0, *columns["key_end"].tolist()]
        return [joined[a:b].decode() for a, b in itertools.pairwise(ends)]

    def moments(self, numbers: NDArray[Any] | Sequence[int], mirror: Any = None) -> Float16:
        """Moments (B, 2C, H, W) of samples, each checked against its CRC.

        ``mirror`` (B,) bool tells which ones to take of the mirror image; None takes none. Raises
        IntegrityError for bytes that changed on disk, DataError for numbers or mirrors that the set
        does not have, StoreError.
        """
        wanted, views = self._wanted(numbers, mirror)
        shards = (wanted // self.manifest.shard_images).tolist()
        starts, crcs = self._offset[wanted, views].tolist(), self._crc32[wanted, views].tolist()
        size, header = npy_size(self._shape), len(npy_header(self._shape))
        width = size - header
        out = np.empty(len(wanted) * width, dtype=np.uint8)
        rows, absent = out.data, list[int]()
        for i, (shard, start, crc) in enumerate(zip(shards, starts, crcs, strict=True)):
            tar = self._mapped[shard] or self._tar(shard)
            if tar is None:
                absent.append(i)
                continue
            member = tar[start : start + size]
            if crc32(member) != crc:
                raise IntegrityError(self._damaged(shard, int(wanted[i]), start))
            rows[i * width : (i + 1) * width] = member[header:]
        if absent:
            places = [(shards[i], starts[i], crcs[i], int(wanted[i])) for i in absent]
            for i, member in zip(absent, self._by_range(places, size), strict=True):
                rows[i * width : (i + 1) * width] = memoryview(member)[header:]
        return out.view("<f2").reshape(len(wanted), *self._shape)

    def close(self) -> None:
        """Stop fetching. What is mapped stays until the set is gone."""
        if self._fetcher is not None:
            self._fetcher.stop.set()
        if self._ranges is not None:
            self._ranges.shutdown(wait=False, cancel_futures=True)

    def verify(self) -> None:
        """Read everything once; raises IntegrityError naming the first damage, StoreError."""
        for damage in damages(self.manifest, self._store, self.where):
            raise IntegrityError(f"{damage.text}: {AGAIN}")

    def _check(self, shape: tuple[int, ...]) -> None:
        if shape != self._shape:
            raise IntegrityError(
                f"{self.where} has arrays of shape {shape}; moments as its spec says have shape "
                f"{self._shape}: {AGAIN}"
            )
        count, views = len(self), 1 + self.manifest.mirrored
        if self._offset.shape != (count, views) or len(self.labels) != count:
            raise IntegrityError(
                f"the index of {self.where} has {len(self.labels)} samples with "
                f"{self._offset.shape[1]} views, the manifest says {count} with {views}: {AGAIN}"
            )
        classes = len(self.manifest.classes)
        sides = (
            (self.train_numbers, self.manifest.train_per_class),
            (self.held_out_numbers, self.manifest.held_out_per_class),
        )
        for numbers, stated in sides:
            found = np.zeros(classes, dtype=np.int64)
            for start in range(0, len(numbers), COUNTED_AT_ONCE):
                labels = self.labels[numbers[start : start + COUNTED_AT_ONCE]]
                if labels.min() < 0 or labels.max() >= classes:
                    raise IntegrityError(
                        f"{self.where} has a label outside 0 to {classes - 1}: {AGAIN}"
                    )
                found += np.bincount(labels, minlength=classes)
            if tuple(found.tolist()) != stated:
                raise IntegrityError(
                    f"{self.where} states {stated} samples a class, its shards hold "
                    f"{tuple(found.tolist())}: {AGAIN}"
                )

    def _wanted(self, numbers: Any, mirror: Any) -> tuple[Int64, Int64]:
        wanted = np.asarray(numbers, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise DataError(f"{self.where} has samples 0 to {len(self) - 1}, not {wanted.tolist()}")
        if mirror is None:
            return wanted, np.zeros(len(wanted), dtype=np.int64)
        views = np.asarray(mirror).astype(np.int64)
        if views.any() and not self.manifest.mirrored:
            raise DataError(f"{self.where} holds no mirror images: its source does not allow them")
        return wanted, views

    def _tar(self, shard: int) -> memoryview | None:
        """The mapped tar of a shard; None while it is not on this machine."""
        if isinstance(self._store, LocalStore):
            blob = self.manifest.shards[shard].tar
            self._map(shard, self._store.fetch(blob, remembered=True))
        elif self._fetcher is None:
            self._fetcher = _Fetcher(self)
        return self._mapped[shard]

    def _map(self, shard: int, path: Path) -> None:
        # torch maps without keeping the file open: a large set has more shards than a process
        # may have open files.
        size = self.manifest.shards[shard].tar.size_bytes
        tensor = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        self._mapped[shard] = tensor.numpy().data

    def _by_range(self, places: list[tuple[int, int, int, int]], size: int) -> Iterator[bytes]:
        if self._ranges is None:
            self._ranges = ThreadPoolExecutor(RANGE_READERS)

        def read(place: tuple[int, int, int, int]) -> bytes:
            shard, start, crc, number = place
            tar = self._mapped[shard]
            if tar is not None:  # it arrived meanwhile
                member = bytes(tar[start : start + size])
            else:
                member = self._store.read_range(self.manifest.shards[shard].tar, start, size)
            if len(member) != size or crc32(member) != crc:
                raise IntegrityError(self._damaged(shard, number, start))
            return member

        return self._ranges.map(read, places)

    def _damaged(self, shard: int, sample: int, offset: int) -> str:
        return (
            f"shard {shard} of {self.where}: sample {sample} at byte {offset} does not match its "
            f"CRC: {self.manifest.shards[shard].tar.key} changed after it was sealed; restore it"
        )


RANGE_READERS = 32
"""Samples that are read from S3 by range at once."""
FETCHERS = 4
"""Shards that are fetched from S3 at once."""
AGAIN_SECONDS = 5.0
"""After a pass over the shards in which none could be had, the next one begins so much later."""
TOUCH_SECONDS = 60.0


class _Fetcher:
    """Brings the shards of a set in S3 to this machine, in the background, while it is used."""

    def __init__(self, latents: LatentSet) -> None:
        self.stop = threading.Event()
        self._latents = weakref.ref(latents)
        # Ranks of a machine begin at different places, and so share the work.
        numbers = np.random.default_rng().permutation(len(latents.manifest.shards))
        self._open = deque(numbers.tolist())
        self._touched = time.monotonic()
        self._said = False
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(FETCHERS)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        failures = 0
        while not self.stop.is_set():
            latents = self._latents()
            if latents is None:
                return
            try:
                got = self._fetch_one(latents)
                failures = 0
            except (EqmError, OSError) as error:
                # Damage and dead networks are told by the read that needs the sample.
                failures += 1
                got = False
                self._say(f"a shard of {latents.where} cannot be fetched yet ({error})")
            del latents
            if not got:
                self.stop.wait(min(AGAIN_SECONDS * 2**failures, 300.0))

    def _fetch_one(self, latents: LatentSet) -> bool:
        """Fetch the next shard; False where there is nothing to do for now."""
        store, shards = latents._store, latents.manifest.shards
        self._touch(latents)
        try:
            number = self._open.popleft()
        except IndexError:
            return False
        try:
            path = store.fetch_unless_full(shards[number].tar)
            if path is not None:
                latents._map(number, path)
                return True
        except BaseException:
            self._open.append(number)
            raise
        self._open.append(number)
        share = latents.resident
        self._say(f"{share:.0%} of {latents.where} is in the cache; the rest is read by range")
        return False

    def _touch(self, latents: LatentSet) -> None:
        """Mark as used what is mapped, so that no other job takes it out of the cache."""
        if time.monotonic() - self._touched > TOUCH_SECONDS:
            self._touched = time.monotonic()
            for shard, tar in zip(latents.manifest.shards, latents._mapped, strict=True):
                if tar is not None:
                    latents._store.touch(shard.tar)

    def _say(self, line: str) -> None:
        if not self._said:
            self._said = True
            sys.stderr.write(f"{line}\n")


def as_webdataset(latents: LatentSet) -> Any:
    """The tars of a set as a stock ``webdataset.WebDataset``, in their order, for other tools.

    Each tar is verified before its path is handed over; samples are dicts with ``__key__``,
    ``moments.npy`` (and ``mirror.npy``) as arrays, ``cls`` and ``json``.
    """
    from webdataset.compat import WebDataset

    paths = [str(latents._store.fetch(shard.tar)) for shard in latents.manifest.shards]
    return WebDataset(paths, shardshuffle=False).map(_plain)


def _plain(sample: dict[str, Any]) -> dict[str, Any]:
    """Members of a sample decoded; webdataset's own decoders would run a pickle or a .pyd."""
    import io

    decoded: dict[str, Any] = {"__key__": sample["__key__"]}
    for view in VIEWS:
        if view in sample:
            decoded[view] = np.load(io.BytesIO(sample[view]), allow_pickle=False)
    return {**decoded, "cls": int(sample["cls"]), "json": json.loads(sample["json"])}


# -- verifying ----------------------------------------------------------------------------------

GONE = (MissingError, IntegrityError)

NAMED_A_SHARD = 20
"""So many flaws of one shard are named; a tar that lost a member is wrong from there on."""
VERIFIERS = 4


@dataclass(frozen=True)
class Damage:
    """Something of a sealed set that is not what it was."""

    place: str
    """Which file."""
    reason: str
    shard: int | None = None
    sample: int | None = None
    """Number of the sample in the set."""
    key: str | None = None
    """Name of its image."""
    offset: int | None = None
    """Byte in the tar."""

    @property
    def text(self) -> str:
        """For people: shard, sample, offset, reason."""
        shard = self.place if self.shard is None else f"shard {self.shard} ({self.place})"
        sample = "" if self.sample is None else f", sample {self.sample} ({self.key})"
        offset = "" if self.offset is None else f", byte {self.offset}"
        return f"{shard}{sample}{offset}: {self.reason}"


def damages(manifest: Manifest, store: Store, where: str, *, done: Any = None) -> Iterator[Damage]:
    """All that is damaged in a set, read from the store itself and from no cache.

    ``done(count)`` is called as samples have been checked. Raises StoreError where the store
    cannot be reached; what is missing is damage.
    """
    yield from _file_damage(store, manifest.index, f"{where}/{INDEX}")
    yield from _file_damage(store, manifest.keys, f"{where}/{KEYS}")
    with ThreadPoolExecutor(VERIFIERS) as checkers:
        checking: deque[Any] = deque()
        for number in range(len(manifest.shards)):
            checking.append(checkers.submit(_shard_damages, manifest, store, number))
            if len(checking) > VERIFIERS:  # bounds what is in memory
                yield from _told(checking.popleft(), done)
        while checking:
            yield from _told(checking.popleft(), done)


def _told(check: Any, done: Any) -> list[Damage]:
    count, found = check.result()
    if done is not None:
        done(count)
    return found


def _file_damage(store: Store, blob: Blob, place: str) -> Iterator[Damage]:
    try:
        store.get(blob)
    except GONE as error:
        yield Damage(place, str(error))


def _shard_damages(manifest: Manifest, store: Store, number: int) -> tuple[int, list[Damage]]:
    shard = manifest.shards[number]
    place, first = store.where(shard.tar.key), number * manifest.shard_images
    try:
        index = read_index(store.get(shard.index), shard, f"shard {number}")
    except GONE as error:
        return shard.count, [Damage(store.where(shard.index.key), str(error), shard=number)]
    try:
        tar = store.read(shard.tar.key)
    except MissingError as error:
        return shard.count, [Damage(place, str(error), shard=number)]
    sound = Blob.of(tar) == shard.tar
    channels, height, width = manifest.spec.shape
    keys, found = index.keys, []
    checked = flaws(tar, index.samples(first), (2 * channels, height, width))
    for flaw in itertools.islice(checked, NAMED_A_SHARD):
        key = None if flaw.number is None else keys[flaw.number - first]
        found.append(Damage(place, flaw.reason, number, flaw.number, key, flaw.offset))
    rest = sum(1 for _ in checked)
    if rest:
        found.append(Damage(place, f"{rest} more places differ", shard=number))
    if not sound and not found:
        found.append(Damage(place, "the bytes do not match their SHA-256", shard=number))
    return shard.count, found
