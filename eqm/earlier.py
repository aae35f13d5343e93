"""An earlier set of latents: images that it holds are copied from it and not encoded again.

An image is what its bytes in the source are, whatever it is called: it is found by the SHA-256 that
the kept listing of the earlier set has of it. Its moments are copied as they are stored, to the
bit. A set may be copied from where the same autoencoder would be shown the same pixels; what else
decides bytes of shards (their size, that of batches, the split) may differ. Called by eqm.encode
and by flows.

    N  images of the new listing    V  views of an image    C, H, W  of a latent
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from eqm.config import ALGORITHMS, LatentsStage, stage_config
from eqm.errors import ConfigError, DataError, IntegrityError, MissingError
from eqm.latent_set import LatentSet, open_manifest
from eqm.listing import Listing, listing_from_bytes
from eqm.records import LatentSpec, Record, Ref
from eqm.shards import Float16, Int64
from eqm.stage import Context, listing_key, open_ref
from eqm.storage import Store

INPUT = "earlier"
"""Name of this input of a job for stage "latents"."""
PIXELS = ("image_size_px", "channels", "mirror", "exif_rotation")
"""Settings of a source that decide what pixels the bytes of an image become, and how many views."""
NAMED_AT_MOST = 5
ANEW = "encode all images, without the input 'earlier' (of the flow weekly: encode_all)"


def differences(earlier: Record, asked: LatentsStage, autoencoder: Ref) -> list[str]:
    """Why images must not be copied from an earlier set, for people; empty where they may be."""
    number = ALGORITHMS["latents"]
    if earlier.algorithm != number:
        return [f"the algorithm is number {number}, it was {earlier.algorithm}"]
    had: LatentsStage = stage_config("latents", earlier.config)
    settings = [
        (f"source.{name}", getattr(asked.source, name), getattr(had.source, name))
        for name in PIXELS
    ]
    settings.append(("encode.precision", asked.encode.precision, had.encode.precision))
    found = [f"{name} is {now!r}, it was {then!r}" for name, now, then in settings if now != then]
    if earlier.inputs["autoencoder"] != autoencoder:
        was = earlier.inputs["autoencoder"].content[:12]
        found.append(f"the autoencoder is {autoencoder.content[:12]}, it was {was}")
    return found


def open_earlier(context: Context, listing: Listing) -> "Earlier | None":
    """The earlier set of a job and which images are in it; None where the job names none.

    Raises ConfigError, DataError where it is not one to copy from, IntegrityError, StoreError.
    """
    if INPUT not in context.job.inputs:
        return None
    ref, store = context.job.inputs[INPUT], context.store
    where = store.where(f"latents/{ref.digest}")
    if ref.stage != "latents":
        raise ConfigError(f"input {INPUT!r} is of stage {ref.stage}: it must be one of latents")
    if store.record(ref.stage, ref.digest) is None:
        raise DataError(f"{where}, to copy images from, is not sealed: restore it, or {ANEW}")
    record = open_ref(store, ref)
    wrong = differences(record, context.config, context.job.inputs["autoencoder"])
    if wrong:
        raise DataError(
            f"images cannot be copied from {where}: {'; '.join(wrong)}. Ask for what it was made "
            f"with, or {ANEW}"
        )
    with _told(where):
        had = _listing_of(store, record)
        latents = open_manifest(record, store)
    if len(had) != len(latents):
        raise IntegrityError(
            f"{where} holds {len(latents)} images, its listing names {len(had)}: {ANEW}"
        )
    return Earlier(latents, store, rows_of(listing.sha256, had.sha256))


class Earlier:
    """An earlier set, and where in it the images of a new listing are."""

    def __init__(self, latents: LatentSet, store: Store, samples: Int64) -> None:
        self._latents, self._store = latents, store
        self._samples = samples
        """(N,): number of each image's sample in the earlier set, -1 for new ones."""
        self.is_new: NDArray[np.bool_] = samples < 0
        """(N,): images that are not in it."""

    def check(self, spec: LatentSpec) -> None:
        """Raises DataError unless its moments mean what those of an autoencoder mean."""
        if self._latents.manifest.spec != spec:
            raise DataError(
                f"images cannot be copied from {self._latents.where}: its moments are not those "
                f"of autoencoder {spec.autoencoder}: {ANEW}"
            )

    def require(self, images: Sequence[int]) -> None:
        """Raises IntegrityError where shards that hold some images are gone, naming them."""
        manifest = self._latents.manifest
        numbers = np.unique(self._samples[images] // manifest.shard_images).tolist()
        gone = [n for n in numbers if not self._store.holds(manifest.shards[n].tar)]
        if gone:
            named = "; ".join(
                f"shard {n} ({manifest.shards[n].tar.key})" for n in gone[:NAMED_AT_MOST]
            )
            more = f" and {len(gone) - NAMED_AT_MOST} more" if len(gone) > NAMED_AT_MOST else ""
            raise IntegrityError(
                f"images are copied from {self._latents.where}, but of its shards {named}{more} "
                f"are gone from {self._store.uri} or of another size: restore them from a copy, or "
                f"{ANEW}"
            )

    def moments(self, images: Sequence[int]) -> tuple[Float16, Float16 | None]:
        """Stored moments of some images and of their mirrors, (B, 2C, H, W) each.

        Whole shards are brought to this machine and checked against their digests: images keep
        their order, so those of a new shard lie together in the earlier set. Raises
        IntegrityError for damage, StoreError.
        """
        samples, mirrored = self._samples[images], self._latents.manifest.mirrored
        with _told(self._latents.where):
            self._latents.bring(samples)
            means = self._latents.moments(samples)
            mirrors = np.ones(len(samples), dtype=np.bool_)
            return means, self._latents.moments(samples, mirrors) if mirrored else None


def rows_of(wanted: NDArray[np.uint8], known: NDArray[np.uint8]) -> Int64:
    """For each row of ``wanted`` (N, 32) the first equal row of ``known``, -1 where none is."""
    if not len(known):
        return np.full(len(wanted), -1, dtype=np.int64)
    # numpy pads strings with zeros: at one length, equal strings are equal rows.
    names, asked = (np.ascontiguousarray(rows).view("S32").ravel() for rows in (known, wanted))
    order = np.argsort(names, kind="stable")
    places = np.searchsorted(names, asked, sorter=order)
    found = order[np.minimum(places, len(known) - 1)]
    return np.where(names[found] == asked, found, -1).astype(np.int64)


def _listing_of(store: Store, record: Record) -> Listing:
    """The kept listing of a set, by number of its samples."""
    key = listing_key(record.inputs["source"].digest)
    had: LatentsStage = stage_config("latents", record.config)
    return listing_from_bytes(
        store.read(key),
        kind=had.source.kind,
        digest=record.inputs["source"].digest,
        is_held_out=lambda _: False,  # the side that an image was on is no matter
        where=store.where(key),
    ).listing


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Say of what is missing or damaged what it is needed for."""
    try:
        yield
    except (MissingError, IntegrityError) as error:
        raise IntegrityError(
            f"images cannot be copied from {where}: {error}. Restore what it lacks, or {ANEW}"
        ) from error
