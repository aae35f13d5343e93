"""What an extractor saw of real images, sealed: moments of all, features and small pictures.

Stage "reference" makes it once (eqm.reference), every evaluation of the same images and the same
extractor reads it. Pictures lie in parts that are read one by one: of a million images, never all
are in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eqm.errors import DataError
from eqm.frechet import SAMPLES_A_DIMENSION, Gaussian, Moments
from eqm.records import Blob, Record
from eqm.storage import Store

SideName = Literal["training", "held-out"]
SIDES: tuple[SideName, ...] = ("training", "held-out")
MOMENTS = "moments.safetensors"

Arrays = dict[str, NDArray[Any]]


class Pictures(NamedTuple):
    """Some images of a side as small pictures (eqm.agreement.thumbnails)."""

    images: NDArray[np.uint8]
    """(N, C, h, w)"""
    labels: NDArray[np.int64]
    """(N,); -1 where an image has none."""


@dataclass(frozen=True, eq=False)
class Side:
    """What is known of the images on one side of the split."""

    moments: Moments
    """Of the features of all images."""
    spatial: Moments | None
    """Of their spatial features; None where the extractor has none."""
    features: NDArray[np.float32]
    """(K, D), of the first K images."""
    logits: NDArray[np.float32] | None
    """(K, classes); None where the extractor has no classifier."""

    @property
    def count(self) -> int:
        """Images in all."""
        return self.moments.count

    def gaussian(self) -> Gaussian:
        """For a Frechet distance, by the way that suits the number of images."""
        few = self.count < SAMPLES_A_DIMENSION * len(self.moments.mean)
        if few and len(self.features) == self.count:
            return Gaussian.of(self.features)
        return Gaussian.of_moments(self.moments)


@dataclass(frozen=True, eq=False)
class Reference:
    """A sealed reference."""

    record: Record
    store: Store
    training: Side
    held_out: Side

    @property
    def extractor(self) -> str:
        """Name of the extractor that looked."""
        return self.record.values["extractor"]["name"]

    def pictures(self, side: SideName) -> Iterator[Pictures]:
        """Small pictures of all images of a side and their labels, a part after the other."""
        for blob in _parts(self.record, side):
            found = _tensors(self.store, blob, "thumbnails", "labels")
            yield Pictures(found["thumbnails"], found["labels"])

    def first_pictures(self, side: SideName, count: int) -> Pictures:
        """The first ``count`` of them, or as many as there are."""
        images, labels, have = [], [], 0
        for part in self.pictures(side):
            images.append(part.images[: count - have])
            labels.append(part.labels[: count - have])
            have += len(images[-1])
            if have >= count:
                break
        return Pictures(np.concatenate(images), np.concatenate(labels))


def open_reference(store: Store, record: Record) -> Reference:
    """Moments and features of a sealed reference. Raises IntegrityError, StoreError."""
    moments = _tensors(store, record.outputs[MOMENTS])
    sides = {name: _side(store, record, moments, name) for name in SIDES}
    return Reference(record, store, sides["training"], sides["held-out"])


def _side(store: Store, record: Record, moments: Arrays, name: SideName) -> Side:
    kept: dict[str, list[NDArray[Any]]] = {"features": [], "logits": []}
    for blob in _parts(record, name):
        found = _tensors(store, blob, *kept)
        for key, rows in kept.items():
            if key in found:
                rows.append(found[key])
    features, logits = (np.concatenate(v) if v else None for v in kept.values())
    own = moments_from_tensors(moments, f"{name}/features")
    if own is None:
        raise DataError(f"{record.stage} {record.digest[:12]} holds no moments of {name} images")
    none = np.zeros((0, len(own.mean)), dtype=np.float32)
    return Side(
        moments=own,
        spatial=moments_from_tensors(moments, f"{name}/spatial"),
        features=none if features is None else features,
        logits=logits,
    )


def _parts(record: Record, side: SideName) -> list[Blob]:
    return [blob for name, blob in sorted(record.outputs.items()) if name.startswith(f"{side}-")]


def _tensors(store: Store, blob: Blob, *names: str) -> Arrays:
    """The named tensors of a blob that are in it, or all; others are not read into memory."""
    from safetensors import safe_open

    with safe_open(store.fetch(blob), framework="numpy") as file:
        there = list(file.keys())
        return {name: file.get_tensor(name) for name in there if not names or name in names}


# -- moments as tensors -------------------------------------------------------------------------


def moments_to_tensors(moments: Moments, name: str) -> Arrays:
    """Tensors under ``name/``."""
    return {
        f"{name}/count": np.array([moments.count], dtype=np.int64),
        f"{name}/mean": moments.mean,
        f"{name}/scatter": moments.scatter,
    }


def moments_from_tensors(tensors: Arrays, name: str) -> Moments | None:
    """What ``moments_to_tensors`` made; None if there is nothing under the name."""
    if f"{name}/count" not in tensors:
        return None
    count = int(tensors[f"{name}/count"][0])
    return Moments(count, tensors[f"{name}/mean"], tensors[f"{name}/scatter"])
