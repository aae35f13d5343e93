"""Samples <-> shards with an index, and the sealed set that they form.

A shard is a plain tar (eqm.tars) with an index of its own beside it: the unit in which images are
encoded and committed. Sealing joins the indices into one file of columns. Which images go into
which shard is eqm.walk's business; sets are read by eqm.latent_set, and eqm.damage looks for
what changed.

    N  samples of the set    V  views of a sample (1, or 2 with mirrors)    C, H, W  of a latent
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from eqm.errors import ConfigError, DataError, IntegrityError
from eqm.records import Blob, LatentSpec, Manifest, Record, Ref, Shard, canonical_bytes, from_json
from eqm.storage import Store, open_store
from eqm.tars import LARGEST_NUMBER, Facts, Placed, pack

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
        if (found := tuple(index.shape.tolist())) != shape:
            raise DataError(
                f"shard {number} has moments of shape {found}, those of the "
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


def manifest_of(store: Store, record: Record) -> Manifest:
    """The manifest of a "latents" record. Raises DataError, IntegrityError, StoreError."""
    if record.stage != "latents" or MANIFEST not in record.outputs:
        raise DataError(f"{record.stage} {record.digest[:12]} is no set of latents")
    place = f"{place_of(store, record)}/{MANIFEST}"
    return manifest_from_bytes(store.get(record.outputs[MANIFEST]), place)


def beside_manifest(manifest: Manifest, record: Record) -> dict[str, Blob]:
    """Files of a "latents" record that its manifest does not name, as ORIGINALS, by name."""
    named = {blob.sha256 for shard in manifest.shards for blob in (shard.tar, shard.index)}
    named |= {manifest.index.sha256, manifest.keys.sha256, record.outputs[MANIFEST].sha256}
    return {name: blob for name, blob in record.outputs.items() if blob.sha256 not in named}


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
