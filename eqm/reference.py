"""Stage "reference": real images + extractor -> what samples are held against.
``python -m eqm.reference CONFIG.json``

Once for all evaluations of the same images with the same extractor. Work is cut into parts of
PART_IMAGES, shared by the ranks and committed create-once: interrupted, it goes on at the part
where it was, and the sums over parts are the same for any number of ranks. Moments are those of
all images; of a million of them only one part is in memory at a time.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eqm.adm import AdmBatch, read_batch
from eqm.agreement import thumbnails
from eqm.autoencoder import read_pretrained
from eqm.checkpoint import tensors_to_bytes
from eqm.config import ReferenceConfig, ReferenceStage
from eqm.errors import ConfigError, DataError
from eqm.features import FeatureExtractor, load_extractor
from eqm.frechet import Moments, merge
from eqm.images import ImageSource, checked_source
from eqm.records import Blob, note_from_bytes, note_to_bytes
from eqm.stage import Context, Outcome
from eqm.stage import main as stage_main
from eqm.statistics import (
    MOMENTS,
    SIDES,
    Arrays,
    SideName,
    moments_from_tensors,
    moments_to_tensors,
)

PART_IMAGES = 16_384
BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Part:
    """A run of consecutive images of one side of the split."""

    side: SideName
    number: int
    first: int
    """Index of its first image among those of its side."""
    count: int


@dataclass(frozen=True, kw_only=True)
class Made:
    """A finished part."""

    moments: Blob
    """Read when parts are put together, and by nobody after that."""
    images: Blob


class Real:
    """The images of both sides: the source's, or those of a file in place of the training ones."""

    def __init__(self, source: ImageSource, batch: AdmBatch | None) -> None:
        self._source, self.batch = source, batch
        self._numbers = {side: source.numbers(held_out=side == "held-out") for side in SIDES}
        for side, numbers in self._numbers.items():
            if not numbers and not (side == "training" and batch is not None):
                raise DataError(
                    f"there are no {side} images to measure against: set "
                    f"source.held_out_fraction ({source.config.held_out_fraction}) above 0, or "
                    "add images"
                )

    def count(self, side: SideName) -> int:
        """Images of a side."""
        if side == "training" and self.batch is not None:
            return 0 if self.batch.images is None else len(self.batch.images)
        return len(self._numbers[side])

    def labels(self, part: Part) -> NDArray[np.int64]:
        """Labels of a part; -1 for images of a file, which has none."""
        if part.side == "training" and self.batch is not None:
            return np.full(part.count, -1, dtype=np.int64)
        labels = [self._source.entries[i].label for i in self._of(part)]
        return np.array(labels, dtype=np.int64)

    def read(self, part: Part) -> Iterator[Tensor]:
        """Batches of a part, uint8 (B, C, H, W)."""
        starts = range(0, part.count, BATCH)
        if part.side == "training" and self.batch is not None and self.batch.images is not None:
            rows = self.batch.images[part.first : part.first + part.count]
            for start in starts:
                channels_first = rows[start : start + BATCH].transpose(0, 3, 1, 2)
                yield torch.from_numpy(np.ascontiguousarray(channels_first))
            return
        numbers = self._of(part)
        yield from self._source.read_many(numbers[start : start + BATCH] for start in starts)

    def _of(self, part: Part) -> list[int]:
        return self._numbers[part.side][part.first : part.first + part.count]


def parts_of(real: Real) -> list[Part]:
    """Cut both sides into parts."""
    return [
        Part(side=side, number=number, first=first, count=min(PART_IMAGES, count - first))
        for side in SIDES
        for count in (real.count(side),)
        for number, first in enumerate(range(0, count, PART_IMAGES))
    ]


def program(context: Context) -> Outcome | None:
    """Look at what was not looked at yet; the first rank returns the outcome."""
    stage: ReferenceStage = context.config
    extractor = load_extractor(context.input("extractor"), context.store, context.world.device)
    source = checked_source(
        stage.source,
        context.job.runtime.source_uri,
        context.job.inputs["source"],
        listing=context.listing(),
    )
    real = Real(source, imported(stage.reference, extractor))
    parts = parts_of(real)
    mine = parts[context.world.rank :: context.world.size]
    with context.progress("looking at real images", sum(part.count for part in mine)) as bar:
        for part in mine:
            if committed(context, part) is None:
                commit(context, part, *look(stage.reference, extractor, real, part))
            bar.advance(part.count)
    folder = _commit_folder(context)
    context.world.barrier(left=lambda: len(parts) - len(context.store.list(folder)))
    with context.world.first_at_work():
        return gather(context, extractor, real, parts) if context.world.is_first else None


def imported(config: ReferenceConfig, extractor: FeatureExtractor) -> AdmBatch | None:
    """The batch that the config names, if any. Raises ConfigError where it does not fit."""
    if config.file is None:
        return None
    batch = read_batch(read_pretrained(config.file), config.file.uri)
    if batch.features is None:
        return batch
    if config.file_images is None:
        raise ConfigError(
            f"{config.file.uri} does not say of how many images its moments are: set "
            "reference.file_images (1281167 for ADM's batches of ImageNet)"
        )
    dimension = len(batch.features[0])
    if not extractor.name.startswith("inception") or dimension != extractor.dimension:
        raise ConfigError(
            f"{config.file.uri} holds moments of {dimension} features under Inception, and "
            f"extractor {extractor.name} gives {extractor.dimension} others: set extractor.kind to "
            "'inception', or take reference.file away"
        )
    return batch


# -- one part -----------------------------------------------------------------------------------


def look(
    config: ReferenceConfig, extractor: FeatureExtractor, real: Real, part: Part
) -> tuple[Arrays, Arrays]:
    """Moments of a part, and what is kept of its images."""
    seen: dict[str, list[NDArray[np.float32]]] = {}
    small: list[NDArray[np.uint8]] = []
    for images in real.read(part):
        for name, rows in extractor.activations(images).tensors().items():
            seen.setdefault(name, []).append(rows.cpu().numpy())
        small.append(thumbnails(images.numpy()))
    whole = {name: np.concatenate(rows) for name, rows in seen.items()}
    moments: Arrays = {}
    for name in ("features", "spatial"):
        if name in whole:
            moments |= moments_to_tensors(_finite_moments(whole[name], extractor, part), name)
    kept = max(0, min(part.count, config.keep_features - part.first))
    images_of = {
        "labels": real.labels(part),
        "thumbnails": np.concatenate(small),
        "features": whole["features"][:kept],
    }
    if "logits" in whole and part.side == "held-out":
        images_of["logits"] = whole["logits"][:kept]
    return moments, images_of


def _finite_moments(rows: NDArray[np.float32], extractor: FeatureExtractor, part: Part) -> Moments:
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise DataError(
            f"{extractor.name} gives NaN or infinity for {len(bad)} {part.side} images, first for "
            f"number {part.first + bad[0]}: its weights are damaged or its training diverged"
        )
    return Moments.of(rows)


def _commit_folder(context: Context) -> str:
    return f"reference/{context.digest}/parts/"


def _commit(context: Context, part: Part) -> str:
    return f"{_commit_folder(context)}{part.side}-{part.number:04d}.json"


def committed(context: Context, part: Part) -> Made | None:
    """Where a finished part lies; None if it must still be made."""
    key = _commit(context, part)
    if not context.store.exists(key):
        return None
    made = note_from_bytes(Made, context.store.read(key), context.store.where(key))
    # A blob that was lost since is made again: equal bytes come back under the same name.
    blobs = (made.moments, made.images)
    return made if all(context.store.exists(blob.key) for blob in blobs) else None


def commit(context: Context, part: Part, moments: Arrays, images: Arrays) -> None:
    """Make a part durable; the blobs first, what names them last."""
    made = Made(
        moments=context.store.put(_to_bytes(moments)), images=context.store.put(_to_bytes(images))
    )
    context.store.write_once(_commit(context, part), note_to_bytes(made))


def _to_bytes(arrays: Arrays) -> bytes:
    return tensors_to_bytes({k: torch.from_numpy(np.array(v)) for k, v in arrays.items()})


# -- all of them --------------------------------------------------------------------------------


def gather(context: Context, extractor: FeatureExtractor, real: Real, parts: list[Part]) -> Outcome:
    """Merge the moments of all parts, in their order, and name what is kept of each."""
    stage: ReferenceStage = context.config
    outputs: dict[str, bytes | Blob] = {}
    moments: dict[str, Moments] = {}
    for part in parts:
        made = committed(context, part)
        if made is None:
            raise DataError(
                f"part {part.number} of the {part.side} images is not in {context.store.uri} "
                "although it was looked at: something deletes from the store; delete "
                f"{_commit(context, part)} too and run again"
            )
        outputs[f"{part.side}-{part.number:04d}.safetensors"] = made.images
        found = _from_bytes(context.store.get(made.moments))
        for name in ("features", "spatial"):
            own = moments_from_tensors(found, name)
            if own is not None:
                key = f"{part.side}/{name}"
                moments[key] = merge(moments[key], own) if key in moments else own
    given = _of_file(stage.reference, real.batch)
    if given:
        # Those of the few images in the file, which are of the many.
        moments.pop("training/spatial", None)
    moments |= given
    tensors: Arrays = {}
    for key, value in moments.items():
        tensors |= moments_to_tensors(value, key)
    return Outcome(
        outputs={**outputs, MOMENTS: _to_bytes(tensors)},
        values={
            "extractor": {"name": extractor.name, "digest": extractor.digest},
            "images": {side: moments[f"{side}/features"].count for side in SIDES},
            "pictures": {side: real.count(side) for side in SIDES},
            "keep_features": stage.reference.keep_features,
            "file": stage.reference.file.sha256 if stage.reference.file else None,
        },
    )


def _from_bytes(data: bytes) -> Arrays:
    from safetensors.numpy import load

    return load(data)


def _of_file(config: ReferenceConfig, batch: AdmBatch | None) -> dict[str, Moments]:
    """Moments of all training images, where a file has them."""
    if batch is None or batch.features is None or config.file_images is None:
        return {}
    count = config.file_images
    given = {"training/features": batch.features, "training/spatial": batch.spatial}
    return {
        key: Moments(count, pair[0], pair[1] * (count - 1))
        for key, pair in given.items()
        if pair is not None
    }


def main(argv: list[str]) -> int:
    """Run the stage program."""
    return stage_main(("reference",), program, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
