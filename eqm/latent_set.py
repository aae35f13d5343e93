"""A sealed set of latents, read by sample number, from this machine or from S3.

The joined index is mapped, not read: opening a set of any size costs the same. Any sample is read
from the mapped tars, or from S3 by its range until they are here, without parsing anything. In
which order training wants them is the business of eqm.batches. The only door to webdataset.

    N  samples of the set    V  views of a sample (1, or 2 with mirrors)    C, H, W  of a latent
"""

import io
import itertools
import json
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from eqm.damage import damages
from eqm.errors import ConfigError, DataError, EqmError, IntegrityError
from eqm.records import Manifest, Record
from eqm.shards import AGAIN, Float16, Int64, manifest_of, place_of, sealed_latents
from eqm.storage import LocalStore, Store
from eqm.tars import VIEWS, npy_header, npy_size

# -- opening ------------------------------------------------------------------------------------


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

    def bring(self, numbers: NDArray[Any] | Sequence[int]) -> None:
        """Bring the whole shards of some samples to this machine, verified, and let go of others.

        For reading a set in order: memory and disk are held for what is read now. Raises
        IntegrityError, StoreError.
        """
        wanted = set((np.asarray(numbers, dtype=np.int64) // self.manifest.shard_images).tolist())
        for number, shard in enumerate(self.manifest.shards):
            if number not in wanted:
                self._mapped[number] = None
            elif self._mapped[number] is None:
                self._map(number, self._store.fetch(shard.tar, remembered=True))

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
DOUBLINGS, LONGEST_SECONDS = 10, 300.0
"""After each failure it begins twice as late, so often and so late at most."""
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
                self.stop.wait(min(AGAIN_SECONDS * 2 ** min(failures, DOUBLINGS), LONGEST_SECONDS))

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
    ``moments.npy`` (and ``mirror.npy``) as arrays, ``cls`` and ``json``. Raises ConfigError where
    they do not all fit into the cache, StoreError, IntegrityError.
    """
    from webdataset.compat import WebDataset

    store, tars = latents._store, [shard.tar for shard in latents.manifest.shards]
    needed, limit = sum(tar.size_bytes for tar in tars), store.copies_limit_bytes
    if limit is not None and needed > limit:
        # webdataset opens them by path, one after the other, and the first might be gone by then.
        raise ConfigError(
            f"cache_bytes is {limit:,}, and the tars of {latents.where} are {needed:,} bytes; "
            "webdataset needs all of them: raise it, or read by eqm.batches, which needs no room"
        )
    paths = [str(store.fetch(tar)) for tar in tars]
    return WebDataset(paths, shardshuffle=False).map(_plain)


def _plain(sample: dict[str, Any]) -> dict[str, Any]:
    """Members of a sample decoded; webdataset's own decoders would run a pickle or a .pyd."""
    decoded: dict[str, Any] = {"__key__": sample["__key__"]}
    for view in VIEWS:
        if view in sample:
            decoded[view] = np.load(io.BytesIO(sample[view]), allow_pickle=False)
    return {**decoded, "cls": int(sample["cls"]), "json": json.loads(sample["json"])}
