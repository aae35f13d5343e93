"""Image sources: a listing that names every image by its content, and the pixels of each.

A source is scanned when it is opened: every image is hashed and decoded, and what cannot be
decoded is told all together before anything is made of the rest. What a scan found in a file is
remembered where a folder is given for it, so that a second look at what did not change costs a
listing of the files. A job that is handed the sealed listing scans nothing: every image is checked
against it when it is read. How images lie in files is eqm.layouts, how they become pixels
eqm.pictures. Nothing here knows of autoencoders or shards. Called by encode, evaluate, fit,
outliers, readahead, reference and flows.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor

from eqm.config import SourceConfig
from eqm.cores import cores
from eqm.disk import disk_errors, written_aside
from eqm.errors import DataError, OtherImagesError
from eqm.layouts import Found, Layout, Part, Raw, layout_of
from eqm.listing import (
    Entry,
    Listing,
    Named,
    Table,
    held_out,
    listing_digest,
    listing_from_bytes,
    listing_to_bytes,
    order,
    packed,
    table_from_bytes,
    table_to_bytes,
)
from eqm.pictures import (
    FORMATS,
    UNDECODABLE,
    centre_crop,
    constant_images,
    flipped,
    mirrored,
    sample_photographs,
    shuffled,
    to_tensor,
    why_undecodable,
)
from eqm.progress import Progress
from eqm.records import Ref, digest, sha256
from eqm.words import counted, first_of

__all__ = [
    "FORMATS",
    "UNDECODABLE",
    "Entry",
    "ImageSource",
    "Listing",
    "checked_source",
    "constant_images",
    "flipped",
    "held_out",
    "mirrored",
    "open_source",
    "sample_photographs",
    "shuffled",
]

NAMED_AT_MOST = 10
READERS = 4
"""Threads that decode: Pillow lets go of the interpreter lock while it does."""
MOST_SCANNERS = 16
LARGE_SOURCE_BYTES = 50_000_000
"""From so many bytes on, a scan shows its progress."""
MEGABYTE = 10**6

LOOK = 1
"""Raised when a scan would find something else in the same bytes: what is remembered is void."""


class ImageSource:
    """A scanned source: ``entries`` in a fixed order that mixes the classes, and their pixels.

    It holds no file open: it may be used from threads and after a fork.
    """

    def __init__(self, layout: Layout, named: Named) -> None:
        self.config = layout.config
        self.kind = layout.config.kind
        self.classes = named.classes
        """Names; a label is an index into them."""
        self.entries = named.listing
        self.skipped = named.skipped
        """Keys of images that cannot be decoded, where the config says to skip them."""
        self._layout = layout

    @cached_property
    def digest(self) -> str:
        """SHA-256 over kind, classes, keys, labels and content: equal wherever the images lie."""
        return listing_digest(self.kind, self.classes, self.entries, self.skipped)

    @property
    def holds_out(self) -> bool:
        """Whether any image is kept from training."""
        return bool(self.entries.held_out.any())

    def listing_bytes(self) -> bytes:
        """The listing, for ``checked_source``; always the same bytes for the same listing."""
        return listing_to_bytes(Named(self.classes, self.skipped, self.entries))

    def numbers(self, *, held_out: bool) -> list[int]:
        """Numbers of the entries on one side of the split, in their order."""
        return np.flatnonzero(self.entries.held_out == held_out).tolist()

    def read(self, i: int) -> Tensor:
        """Pixels of entry i, uint8 (C, H, W). Raises OtherImagesError if it changed since."""
        entry, places = self.entries[i], self.entries.places
        try:
            data = self._layout.read(entry.key, None if places is None else places.at(i))
        except DataError as error:
            raise OtherImagesError(str(error)) from error
        if sha256(data) != entry.sha256:
            raise OtherImagesError(
                f"image {entry.key!r} has other bytes than when it was listed",
                "it was changed while it was in use, run the pipeline again",
            )
        return to_tensor(centre_crop(self._layout.decode(data), self.config.image_size_px))

    def read_many(self, numbers: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """Batches uint8 (B, C, H, W) of the given entries; the next is read while one is used."""
        with ThreadPoolExecutor(READERS) as readers:
            coming: list[list[Any]] = []
            for batch in numbers:
                coming.append([readers.submit(self.read, i) for i in batch])
                if len(coming) > 1:
                    yield torch.stack([reading.result() for reading in coming.pop(0)])
            for batch in coming:
                yield torch.stack([reading.result() for reading in batch])


def open_source(
    config: SourceConfig, uri: str | None, *, memory: Path | None = None
) -> ImageSource:
    """Scan the images of a source. Raises DataError, ConfigError, StoreError.

    ``uri``: a folder of this machine or ``s3://bucket/prefix``; for "webdataset" and "parquet" one
    file as well; not looked at for "digits". ``memory``: a folder of this machine that keeps what
    scans found; it may be deleted at any time.
    """
    return _scanned(layout_of(config, uri), memory, decode=True)


def checked_source(
    config: SourceConfig, uri: str | None, ref: Ref, *, listing: bytes | None = None
) -> ImageSource:
    """The source that a job was configured for; OtherImagesError if any image changed since.

    With the bytes of its ``listing`` (ImageSource.listing_bytes; IntegrityError unless their digest
    is that of ``ref``) no image is looked at before it is read, when its digest is checked. Without
    them all are hashed here; they were decoded when the listing was made, and are decoded again
    only if something differs.
    """
    layout = layout_of(config, uri)
    if listing is not None:
        named = listing_from_bytes(
            listing,
            kind=config.kind,
            digest=ref.digest,
            is_held_out=layout.is_held_out,
            where=f"the listing of {uri or config.kind}",
        )
        return ImageSource(layout, named)
    try:
        source = _scanned(layout, None, decode=False)
        if source.digest != ref.digest:
            source = _scanned(layout_of(config, uri), None, decode=True)
    except DataError as error:
        raise OtherImagesError(str(error)) from error
    if source.digest != ref.digest:
        raise OtherImagesError(
            f"the images changed since this run was configured (listing {source.digest[:12]}, "
            f"configured for {ref.digest[:12]})",
            "run the pipeline again",
        )
    return source


# -- the scan -----------------------------------------------------------------------------------


def _scanned(layout: Layout, memory: Path | None, *, decode: bool) -> ImageSource:
    """Look at all images, or say in words why the source cannot be used."""
    kept = Memory(layout, memory)
    parts = layout.parts(kept.remember)
    total = sum(part.size_bytes for part in parts)
    show = decode and total >= LARGE_SOURCE_BYTES
    scanners = max(READERS, min(MOST_SCANNERS, cores()))
    tables = []
    with (
        Progress("scanning images", total=total // MEGABYTE, unit="MB", show=show) as bar,
        ThreadPoolExecutor(scanners) as pool,
    ):
        done = 0
        for part in parts:
            tables.append(kept.remember(part, partial(_table, layout, part, pool, decode)))
            before, done = done, done + part.size_bytes
            bar.advance(done // MEGABYTE - before // MEGABYTE)
    return ImageSource(layout, _named(layout, layout.found(parts, tables), tables))


class Looked(NamedTuple):
    """What a look at an image found."""

    raw: Raw
    sha256: bytes
    wrong: str
    """Why it cannot be decoded, or ""."""


def _table(layout: Layout, part: Part, pool: ThreadPoolExecutor, decode: bool) -> Table:
    looked = list(_in_order(pool, partial(_look, layout, decode), layout.raw(part)))
    digests = b"".join(one.sha256 for one in looked)
    return Table(
        names=[one.raw.name for one in looked],
        labels=[one.raw.label for one in looked],
        offset=np.array([one.raw.offset for one in looked], dtype=np.int64),
        size=np.array([one.raw.size for one in looked], dtype=np.int64),
        sha256=np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32),
        wrong=[one.wrong for one in looked],
    )


def _in_order(
    pool: ThreadPoolExecutor, look: Callable[[Raw], Looked], images: Iterator[Raw]
) -> Iterator[Looked]:
    """What is found in images, in their order; a few are read ahead, never all."""
    coming: deque[Future[Looked]] = deque()
    try:
        for raw in images:
            coming.append(pool.submit(look, raw))
            if len(coming) > 4 * MOST_SCANNERS:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        for future in coming:
            future.cancel()


def _look(layout: Layout, decode: bool, raw: Raw) -> Looked:
    data = raw.read()
    found = bytes.fromhex(sha256(data))
    # The bytes of an image wait for their turn no longer than the image does.
    return Looked(raw._replace(read=bytes), found, _wrong_with(layout, data) if decode else "")


def _wrong_with(layout: Layout, data: bytes) -> str:
    if not data:
        return "it is empty"
    try:
        layout.decode(data)
    except UNDECODABLE as error:
        return why_undecodable(error)
    return ""


class Memory:
    """What scans found, a file for each part of a source; without a folder nothing is kept."""

    def __init__(self, layout: Layout, folder: Path | None) -> None:
        self.layout, self.folder = layout, folder
        config = layout.config
        self._about = {
            "look": LOOK,
            "pillow": PIL.__version__,
            "kind": config.kind,
            "channels": config.channels,
            "exif_rotation": config.exif_rotation,
            "columns": [config.image_column, config.label_column],
        }

    def remember(self, part: Part, find: Callable[[], Table]) -> Table:
        """What was found in a part when its files were as they are; else what is found now."""
        files = self.layout.files
        if self.folder is None or files is None:
            return find()
        path = self.folder / f"{self._digest(part)}.safetensors"
        # A damaged one is as good as none: it only saves time.
        with contextlib.suppress(FileNotFoundError, ValueError):
            return table_from_bytes(path.read_bytes())
        table = find()
        if all(files.is_settled(file) for file in part.files):
            with disk_errors(str(self.folder)):
                self.folder.mkdir(parents=True, exist_ok=True)
                with written_aside(self.folder) as (file, aside):
                    file.write(table_to_bytes(table))
                    file.flush()
                    os.replace(aside, path)
        return table

    def _digest(self, part: Part) -> str:
        files = self.layout.files
        where = "" if files is None else files.where()
        return digest(
            {"about": self._about, "where": where, "name": part.name, "files": part.files}
            | {"start": part.start, "end": part.end}
        )


# -- from what was found to a listing -----------------------------------------------------------


def _named(layout: Layout, found: Found, tables: Sequence[Table]) -> Named:
    """The listing of all images that can be decoded, in its order and split."""
    wrong = [text for table in tables for text in table.wrong]
    bad = sorted((found.keys[i], text) for i, text in enumerate(wrong) if text)
    if bad and layout.config.on_corrupt == "refuse":
        raise DataError(_corrupt(bad, len(wrong)))
    ordered = order(found.keys)
    if bad:
        ordered = ordered[np.array([not text for text in wrong])[ordered]]
    keys = [found.keys[i] for i in ordered.tolist()]
    key_bytes, key_end = packed(keys)
    hashes = np.concatenate([table.sha256 for table in tables])
    listing = Listing(
        key_bytes,
        key_end,
        found.labels[ordered],
        np.fromiter(map(layout.is_held_out, keys), dtype=np.bool_, count=len(keys)),
        hashes[ordered],
        places=None if found.places is None else found.places.taken(ordered),
    )
    if not wrong:
        place = "" if layout.files is None else f"{layout.files.address} "
        raise DataError(f"{place}holds no image: give another source_uri, or add images")
    named = Named(found.classes, tuple(key for key, _ in bad), listing)
    _check_split(layout.config, named)
    return named


def _corrupt(bad: list[tuple[str, str]], total: int) -> str:
    shown = first_of([f"{key} ({text})" for key, text in bad], NAMED_AT_MOST)
    return (
        f"{len(bad)} of {total} images cannot be decoded: {shown}. Mend or remove them, or "
        "set source.on_corrupt to 'skip': what is skipped is named in the manifest"
    )


def _check_split(config: SourceConfig, named: Named) -> None:
    """Refuse a split with too few images on a side, or with a class that is never trained."""
    classes, skipped, listing = named.classes, len(named.skipped), named.listing
    total = np.bincount(listing.label, minlength=len(classes))
    training = np.bincount(listing.label[~listing.held_out], minlength=len(classes))
    for name, count in zip(classes, total, strict=True):
        if not count:
            why = f" that can be decoded ({counted(skipped, 'image')} skipped)" if skipped else ""
            raise DataError(f"class {name!r} has no image{why}: add some, or remove the class")
    if training.sum() < 2:
        raise DataError(
            f"{training.sum()} of {total.sum()} images are left for training, 2 are the least: add "
            f"images, or lower source.held_out_fraction ({config.held_out_fraction})"
        )
    for name, count in zip(classes, training, strict=True):
        if not count:
            raise DataError(
                f"all images of class {name!r} are held out, none is left for training: add "
                "images, lower source.held_out_fraction or change source.split_seed"
            )
    if config.held_out_fraction > 0 and training.sum() == total.sum():
        raise DataError(
            f"source.held_out_fraction is {config.held_out_fraction}, but none of the "
            f"{total.sum()} images falls on the held-out side: add images, or set it higher"
        )
