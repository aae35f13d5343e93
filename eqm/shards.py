"""Samples <-> WebDataset shards with an index, and the sealed set that they form.

A shard is a plain tar that ``tar`` and stock ``webdataset`` read, written so that equal samples
give equal bytes. The index beside it holds place, length and CRC of every array, label, side of the
split and key, so a LatentSet reads any sample from the mapped file without parsing the tar. Which
images go into which shard is eqm.encode's business, their order in training that of eqm.batches.
The only door to webdataset.
"""

import functools
import io
import itertools
import json
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray

from eqm.errors import ConfigError, DataError, IntegrityError
from eqm.records import Manifest, Record, Shard, canonical_bytes, from_json, sha256
from eqm.storage import Store, open_store

MANIFEST = "manifest.json"
"""Name of the manifest among the outputs of a "latents" record."""

VIEWS = ("moments.npy", "mirror.npy")
"""Arrays of a sample: of the image, and of its mirror where the source has mirrors."""

LARGEST_NUMBER = 99_999_999
"""Members are named by eight digits."""

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


# -- writing ------------------------------------------------------------------------------------


def write_shard(samples: Sequence[Sample], *, first_number: int) -> Packed:
    """Pack samples numbered from ``first_number`` on; equal samples give equal bytes.

    Arrays are stored as float16. Raises DataError for a shard without samples, for arrays of
    different shapes, and for values that are not finite as float16.
    """
    from webdataset.writer import TarWriter

    if not samples:
        raise DataError("a shard must hold at least one sample")
    if first_number + len(samples) - 1 > LARGEST_NUMBER:
        raise DataError(f"a set of latents holds at most {LARGEST_NUMBER + 1:,} samples")
    arrays = [_arrays(sample, samples[0]) for sample in samples]
    stream = io.BytesIO()
    # Time, owner and mode are fixed: they would differ from run to run and from place to place.
    writer = TarWriter(stream, encoder=False, mtime=0, user="", group="", mode=0o444)
    for number, (sample, views) in enumerate(zip(samples, arrays, strict=True), first_number):
        writer.write({"__key__": f"{number:08d}", **_members(sample, views)})
    writer.close()
    tar = stream.getvalue()
    index = _index(tar, samples, [views[0] for views in arrays], first_number)
    return Packed(tar, safetensors.numpy.save(index), len(samples))


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


def _members(sample: Sample, views: list[Float16]) -> dict[str, bytes]:
    arrays = {name: _npy(view) for name, view in zip(VIEWS, views, strict=False)}
    about = canonical_bytes({"key": sample.key, "held_out": sample.held_out})
    return {**arrays, "cls": str(sample.label).encode(), "json": about}


def _npy(array: Float16) -> bytes:
    return npy_header(array.shape) + array.tobytes()


@functools.lru_cache(maxsize=16)
def npy_header(shape: tuple[int, ...]) -> bytes:
    """What precedes the values of a float16 array in a .npy file."""
    stream = io.BytesIO()
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def _index(
    tar: bytes, samples: Sequence[Sample], moments: list[Float16], first_number: int
) -> dict[str, NDArray[Any]]:
    """Tensors of the index, from the tar as a reader finds it."""
    names = VIEWS[: 1 if samples[0].mirror is None else 2]
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
        at = {member.name: (member.offset_data, member.size) for member in archive}
    numbers = range(first_number, first_number + len(samples))
    places = np.array([[at[f"{i:08d}.{name}"] for name in names] for i in numbers], dtype=np.int64)
    crcs = [[zlib.crc32(tar[start : start + size]) for start, size in row] for row in places]
    keys = [sample.key.encode() for sample in samples]
    held_out = np.array([sample.held_out for sample in samples])
    means = np.stack(moments).astype(np.float64)[~held_out, : len(moments[0]) // 2]
    return {
        "offset": np.ascontiguousarray(places[..., 0]),
        "length": np.ascontiguousarray(places[..., 1]),
        "crc32": np.array(crcs, dtype=np.int64),
        "label": np.array([sample.label for sample in samples], dtype=np.int64),
        "held_out": held_out,
        "key_bytes": np.frombuffer(b"".join(keys), dtype=np.uint8),
        "key_end": np.cumsum([len(key) for key in keys], dtype=np.int64),
        # Over the training means, for the statistics of the whole set.
        "sum": means.sum(axis=(0, 2, 3)),
        "sum_of_squares": np.square(means).sum(axis=(0, 2, 3)),
    }


# -- the index ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Index:
    """Where everything lies in one tar; arrays have one row a sample."""

    offset: Int64
    """(N, V): first byte of each array's .npy file in the tar; V views."""
    length: Int64
    """(N, V), in bytes, with the .npy header."""
    crc32: Int64
    """(N, V), over those bytes."""
    label: Int64
    held_out: NDArray[np.bool_]
    key_bytes: NDArray[np.uint8]
    key_end: Int64
    sum: NDArray[np.float64]
    """(C,) of the stored means over training samples and positions."""
    sum_of_squares: NDArray[np.float64]

    @property
    def keys(self) -> list[str]:
        """Names of the images in their source."""
        joined, ends = self.key_bytes.tobytes(), [0, *self.key_end.tolist()]
        return [joined[a:b].decode() for a, b in itertools.pairwise(ends)]


INDEX_TYPES: dict[str, Any] = {
    "offset": np.int64,
    "length": np.int64,
    "crc32": np.int64,
    "label": np.int64,
    "held_out": np.bool_,
    "key_bytes": np.uint8,
    "key_end": np.int64,
    "sum": np.float64,
    "sum_of_squares": np.float64,
}


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
    _check_index(index, shard, where)
    return index


AGAIN = "delete the record of the latents and encode again"


def _check_index(index: Index, shard: Shard, where: str) -> None:
    rows = {len(x) for x in (index.offset, index.length, index.crc32, index.label, index.key_end)}
    if rows != {shard.count} or len(index.held_out) != shard.count or index.offset.ndim != 2:
        raise IntegrityError(
            f"the index of {where} does not have {shard.count} rows, as the manifest says: {AGAIN}"
        )
    ends = index.offset + index.length
    if index.offset.min() < 0 or index.length.min() < 0 or ends.max() > shard.tar.size_bytes:
        raise IntegrityError(f"the index of {where} points outside its tar: {AGAIN}")


# -- the manifest -------------------------------------------------------------------------------


def manifest_to_bytes(manifest: Manifest) -> bytes:
    """manifest.json."""
    return canonical_bytes(manifest)


def manifest_from_bytes(data: bytes, where: str) -> Manifest:
    """Read manifest.json. Raises IntegrityError, ConfigError."""
    try:
        body = json.loads(data)
    except ValueError as error:
        raise IntegrityError(f"{where} is not JSON ({error}): {AGAIN}") from error
    return from_json(Manifest, body, where)


def open_manifest(
    where: str | Path | Record, store: Store | None = None, *, cache: Path | None = None
) -> "LatentSet":
    """Open a sealed set of latents, everything checked against its digest before it is parsed.

    ``where`` is the address of its record (``s3://bucket/prefix/latents/<digest>``, or the same in
    a local directory), or the record itself with its ``store``. ``cache`` keeps verified copies of
    what lies in S3. Raises ConfigError, DataError, IntegrityError, StoreError.
    """
    if isinstance(where, Record):
        if store is None:
            raise ConfigError("a record alone does not say where its shards lie: give its store")
        record = where
    else:
        store, record = _sealed(str(where), cache)
    if record.stage != "latents" or MANIFEST not in record.outputs:
        raise DataError(f"{record.stage} {record.digest[:12]} is no set of latents")
    place = f"{store.uri}/latents/{record.digest}"
    manifest = manifest_from_bytes(store.get(record.outputs[MANIFEST]), f"{place}/{MANIFEST}")
    return LatentSet(manifest, store, place)


def _sealed(uri: str, cache: Path | None) -> tuple[Store, Record]:
    root, _, digest = uri.rstrip("/").removesuffix("/record.json").rpartition("/")
    root, _, stage = root.rpartition("/")
    if stage != "latents" or len(digest) != 64 or not root:
        raise ConfigError(
            f"{uri!r} is no set of latents: give <store>/latents/<digest>, s3:// or local"
        )
    if "://" not in root and not Path(root).is_dir():
        raise DataError(f"there is no store at {root}")
    store = open_store(root, cache=cache)
    record = store.record(stage, digest)
    if record is None:
        raise DataError(
            f"{uri} is not sealed: there is no record.json; run the encoding to its end"
        )
    return store, record


# -- reading ------------------------------------------------------------------------------------


class LatentSet:
    """Random access to the samples of a manifest, by number: 0 is the first of the first shard."""

    def __init__(self, manifest: Manifest, store: Store, where: str) -> None:
        self.manifest = manifest
        self.where = where
        self._store = store
        self._indices = [
            read_index(store.fetch(shard.index).read_bytes(), shard, self._name(i))
            for i, shard in enumerate(manifest.shards)
        ]
        self._firsts = np.cumsum([0, *(shard.count for shard in manifest.shards)], dtype=np.int64)
        self.labels: Int64 = self._joined("label")
        """(N,), by sample number."""
        self.held_out: NDArray[np.bool_] = self._joined("held_out")
        """(N,), by sample number."""
        self.train_numbers: Int64 = np.flatnonzero(~self.held_out)
        """Numbers of the samples to train on, ascending."""
        self.held_out_numbers: Int64 = np.flatnonzero(self.held_out)
        self._check_counts()
        views = 1 + manifest.mirrored
        self._offset, self._length = self._joined("offset", views), self._joined("length", views)
        self._crc32 = self._joined("crc32", views)
        channels, height, width = manifest.spec.shape
        self._shape = (2 * channels, height, width)
        self._check_lengths()
        self._mapped: dict[int, memoryview] = {}

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def keys(self) -> list[str]:
        """Names of all images in their source, by sample number."""
        return [key for index in self._indices for key in index.keys]

    def moments(self, numbers: Int64 | Sequence[int], mirror: Any = None) -> Float16:
        """Moments (B, 2C, H, W) of samples, each checked against its CRC.

        ``mirror`` (B,) bool tells which ones to take of the mirror image; None takes none. Raises
        IntegrityError for bytes that changed on disk, DataError for numbers or mirrors that the set
        does not have.
        """
        wanted = np.asarray(numbers, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise DataError(f"{self.where} has samples 0 to {len(self) - 1}, not {wanted.tolist()}")
        views = np.zeros(len(wanted), dtype=np.int64) if mirror is None else np.asarray(mirror)
        if views.any() and not self.manifest.mirrored:
            raise DataError(f"{self.where} holds no mirror images: its source does not allow them")
        shards = np.searchsorted(self._firsts, wanted, side="right") - 1
        views = views.astype(np.int64)
        starts, sizes = self._offset[wanted, views].tolist(), self._length[wanted, views].tolist()
        crcs = self._crc32[wanted, views].tolist()
        header = len(npy_header(self._shape))
        out = np.empty((len(wanted), 2 * int(np.prod(self._shape))), dtype=np.uint8)
        for i, shard in enumerate(shards.tolist()):
            member = self._bytes_of(shard)[starts[i] : starts[i] + sizes[i]]
            if zlib.crc32(member) != crcs[i]:
                raise IntegrityError(self._damaged(shard, int(wanted[i]), starts[i]))
            out[i] = np.frombuffer(member, dtype=np.uint8)[header:]
        return out.view("<f2").reshape(len(wanted), *self._shape)

    def verify(self) -> None:
        """Read everything once: digests, the form of each tar, CRCs, and that values are finite.

        Raises IntegrityError naming shard and sample, StoreError.
        """
        for number, shard in enumerate(self.manifest.shards):
            data = self._store.fetch(shard.tar).read_bytes()
            if sha256(data) != shard.tar.sha256:
                raise IntegrityError(f"{self._name(number)} does not match its digest: {AGAIN}")
            first = int(self._firsts[number])
            views = VIEWS[: 1 + self.manifest.mirrored]
            check_tar(data, self._indices[number], first, self._shape, views, self._name(number))

    def _joined(self, name: str, views: int | None = None) -> NDArray[Any]:
        parts = [getattr(index, name) for index in self._indices]
        for number, part in enumerate(parts):
            if views is not None and part.shape[1] != views:
                raise IntegrityError(
                    f"the index of {self._name(number)} has {part.shape[1]} views a sample, the "
                    f"manifest says {views}: {AGAIN}"
                )
        return np.concatenate(parts)

    def _check_counts(self) -> None:
        classes = len(self.manifest.classes)
        if self.labels.min() < 0 or self.labels.max() >= classes:
            raise IntegrityError(f"{self.where} has a label outside 0 to {classes - 1}: {AGAIN}")
        stated = (self.manifest.train_per_class, self.manifest.held_out_per_class)
        for numbers, counts in zip(
            (self.train_numbers, self.held_out_numbers), stated, strict=True
        ):
            found = np.bincount(self.labels[numbers], minlength=classes)
            if tuple(found.tolist()) != counts:
                raise IntegrityError(
                    f"{self.where} states {counts} samples a class, its shards hold "
                    f"{tuple(found.tolist())}: {AGAIN}"
                )

    def _check_lengths(self) -> None:
        size = len(npy_header(self._shape)) + 2 * int(np.prod(self._shape))
        if (self._length != size).any():
            raise IntegrityError(
                f"{self.where} has arrays of {np.unique(self._length).tolist()} bytes; moments of "
                f"shape {self._shape}, as its spec says, take {size}: {AGAIN}"
            )

    def _bytes_of(self, shard: int) -> memoryview:
        """The tar of a shard, verified once and mapped."""
        if shard not in self._mapped:
            blob = self.manifest.shards[shard].tar
            path = self._store.fetch(blob)
            # torch maps without keeping the file open: a large set has more shards than a process
            # may have open files.
            tensor = torch.from_file(
                str(path), shared=False, size=blob.size_bytes, dtype=torch.uint8
            )
            self._mapped[shard] = tensor.numpy().data
        return self._mapped[shard]

    def _name(self, shard: int) -> str:
        return f"shard {shard} of {self.where}"

    def _damaged(self, shard: int, sample: int, offset: int) -> str:
        return (
            f"{self._name(shard)}: sample {sample} at byte {offset} does not match its CRC: the "
            f"file {self.manifest.shards[shard].tar.key} changed after it was opened; restore it"
        )


def check_tar(
    tar: bytes,
    index: Index,
    first_number: int,
    shape: tuple[int, ...],
    views: Iterable[str],
    where: str,
) -> None:
    """Check that a tar holds what its index says, in the form that ``write_shard`` gives it.

    Raises IntegrityError for members that are missing, extra, out of order or no plain files, and
    for arrays that are damaged or not finite.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
            members = archive.getmembers()
    except tarfile.TarError as error:
        raise IntegrityError(f"{where} is not a tar ({error}): {AGAIN}") from error
    names = sorted([*views, "cls", "json"])
    numbers = range(first_number, first_number + len(index.label))
    expected = [f"{number:08d}.{name}" for number in numbers for name in names]
    found = [member.name for member in members if member.isreg()]
    if found != expected or len(found) != len(members):
        raise IntegrityError(_members_differ(found, expected, where))
    by_name = {member.name: member for member in members}
    for row, number in enumerate(numbers):
        for view, name in enumerate(views):
            member = by_name[f"{number:08d}.{name}"]
            place = (int(index.offset[row, view]), int(index.length[row, view]))
            data = tar[member.offset_data : member.offset_data + member.size]
            if (member.offset_data, member.size) != place or not _is_sound(
                data, int(index.crc32[row, view]), shape
            ):
                raise IntegrityError(
                    f"{where}: {member.name} at byte {member.offset_data} is not what the index "
                    f"says: {AGAIN}"
                )


def _is_sound(data: bytes, crc32: int, shape: tuple[int, ...]) -> bool:
    header = npy_header(shape)
    size = len(header) + 2 * int(np.prod(shape))
    if zlib.crc32(data) != crc32 or len(data) != size or not data.startswith(header):
        return False
    return bool(np.isfinite(np.frombuffer(data[len(header) :], dtype="<f2")).all())


def _members_differ(found: list[str], expected: list[str], where: str) -> str:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    what = f"lacks {', '.join(missing[:5])}" if missing else "has them out of order or twice"
    more = f" and has {', '.join(extra[:5])}" if extra else ""
    return f"{where} holds {len(found)} of {len(expected)} members: it {what}{more}; {AGAIN}"
