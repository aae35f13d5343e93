"""Stage "evaluation": samples + real images -> numbers. ``python -m eqm.evaluate CONFIG.json``

Distances are to the training images, as in the field, with the distance between held-out and
training images beside them: the floor that a perfect model would reach. What lies out of
distribution is told by eqm.outliers.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eqm import frechet, images, intervals, model, outliers
from eqm.agreement import Reader
from eqm.checkpoint import tensors_to_bytes
from eqm.config import EvaluateConfig, EvaluationStage, SamplerConfig
from eqm.errors import DataError
from eqm.features import FeatureExtractor, extract, load_extractor
from eqm.frechet import Gaussian
from eqm.images import ImageSource
from eqm.intervals import Interval
from eqm.outliers import Subject
from eqm.records import Evaluation, Metric, Record, from_json, to_json
from eqm.samples import columns, kept_images
from eqm.stage import Context, Outcome
from eqm.stage import main as stage_main

BATCH = 256
GRID_CLASSES = 10


@dataclass(frozen=True)
class Split:
    """Images of one side of the split, with labels and features."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    features: NDArray[np.float32]


@dataclass(frozen=True)
class Material:
    """All that is measured."""

    config: EvaluateConfig
    training: Split
    held_out: Split
    samples: Split
    """Images are the kept ones; features are those of all samples."""
    sample_count: int
    mean_field_evaluations: float


def program(context: Context) -> Outcome | None:
    """Measure; one process does it all."""
    if not context.world.is_first:
        return None
    stage: EvaluationStage = context.config
    samples, trained = context.input("samples"), context.input("train")
    extractor = load_extractor(context.input("extractor"), context.store, context.world.device)
    source = images.checked_source(
        stage.source,
        context.job.runtime.source_uri,
        context.job.inputs["source"],
        listing=context.listing(),
    )
    # First, for it reads files that may be missing or damaged.
    rows, scores = outliers.out_of_distribution(
        stage.evaluate.ood,
        Subject(
            model=model.from_record(context.store, trained).to(context.world.device),
            sampler=from_json(SamplerConfig, samples.config["generate"]["sampler"]),
            source=source,
            extractor=extractor,
        ),
        context.progress,
    )
    material = gather(context, stage.evaluate, source, extractor, samples)
    evaluation = Evaluation(
        protocol=protocol(stage, extractor, samples, source.digest),
        samples=material.sample_count,
        metrics=measure(material, extractor),
        ood=rows,
        mean_field_evaluations=material.mean_field_evaluations,
    )
    shown = min(GRID_CLASSES, len(source.classes))
    return Outcome(
        outputs={
            "ood-scores.safetensors": tensors_to_bytes(scores),
            "real-images.safetensors": tensors_to_bytes(
                {"images": grid_of(material.held_out, shown, stage.evaluate.grid_rows)}
            ),
            "sample-images.safetensors": tensors_to_bytes(
                {"images": grid_of(material.samples, shown, stage.evaluate.grid_rows)}
            ),
        },
        values={
            "evaluation": to_json(evaluation),
            "protocol_digest": evaluation.protocol_digest,
            "classes": list(source.classes[:shown]),
        },
    )


# -- what is measured ---------------------------------------------------------------------------


def gather(
    context: Context,
    config: EvaluateConfig,
    source: ImageSource,
    extractor: FeatureExtractor,
    samples: Record,
) -> Material:
    """Real images of both splits with their features, and the sealed samples."""
    sealed = columns(context.store, samples)
    kept = torch.cat(list(kept_images(context.store, samples)))
    return Material(
        config=config,
        training=real_split(context, source, extractor, held_out=False),
        held_out=real_split(context, source, extractor, held_out=True),
        samples=Split(kept.numpy(), sealed["labels"].numpy(), sealed["features"].numpy()),
        sample_count=int(samples.values["samples"]),
        mean_field_evaluations=float(samples.values["mean_field_evaluations"]),
    )


def real_split(
    context: Context, source: ImageSource, extractor: FeatureExtractor, *, held_out: bool
) -> Split:
    """Images of one side of the split."""
    chosen = [i for i, entry in enumerate(source.entries) if entry.held_out == held_out]
    label = "held-out images" if held_out else "training images"
    if not chosen:
        raise DataError(
            f"there are no {label} to measure against: set source.held_out_fraction "
            f"({source.config.held_out_fraction}) above 0, or add images"
        )
    pixels: list[Tensor] = []
    features: list[NDArray[np.float32]] = []
    with context.progress(label, len(chosen)) as bar:
        for start in range(0, len(chosen), BATCH):
            batch = torch.stack([source.read(i) for i in chosen[start : start + BATCH]])
            pixels.append(batch)
            features.append(extract(extractor, [batch.to(context.world.device)]))
            bar.advance(len(batch))
    labels = np.array([source.entries[i].label for i in chosen], dtype=np.int64)
    return Split(torch.cat(pixels).numpy(), labels, np.concatenate(features))


def protocol(
    stage: EvaluationStage, extractor: FeatureExtractor, samples: Record, source: str
) -> dict[str, Any]:
    """All that must be equal for two evaluations to be comparable."""
    how = dict(samples.config["generate"])
    # Seeds are not part of it: the same protocol may be run on others.
    for name in ("keep_images", "trajectory_points", "first_seed"):
        how.pop(name)
    how["sampler"] = {k: v for k, v in how["sampler"].items() if k != "batch_size"}
    return {
        "images": {"source": source, **to_json(stage.source)},
        "extractor": {"name": extractor.name, "digest": extractor.digest},
        "generate": how,
        "neighbours": stage.evaluate.neighbours,
        "ood": outliers.protocol(stage.evaluate.ood),
        "pixels": "clamp(127.5 x + 128, 0, 255), truncated to uint8",
        "reference": "training images; beside: held-out images",
    }


# -- samples against real images ----------------------------------------------------------------


def measure(material: Material, extractor: FeatureExtractor) -> dict[str, Metric]:
    """Every number about the samples, each with that of held-out images beside it."""
    train, held, made = material.training, material.held_out, material.samples
    k = material.config.neighbours
    precision, recall = frechet.precision_recall(train.features, made.features, neighbours=k)
    real_precision, real_recall = frechet.precision_recall(
        train.features, held.features, neighbours=k
    )
    count = f"{extractor.name}]-{material.sample_count}"
    kid = intervals.kernel_interval(made.features, train.features)
    inside = intervals.share_interval(
        round(precision * material.sample_count), material.sample_count
    )
    metrics = {
        **_distances(material, extractor),
        "kid": _within(
            kid,
            Metric(
                name=f"KID[{count}",
                value=frechet.kernel_distance(made.features, train.features).mean,
                beside=frechet.kernel_distance(held.features, train.features).mean,
                note="unbiased, so it may be slightly negative",
            ),
        ),
        "precision": _within(
            inside,
            Metric(
                name=f"precision[{count}",
                value=precision,
                beside=real_precision,
            ),
        ),
        "recall": Metric(name=f"recall[{count}", value=recall, beside=real_recall),
    }
    return {**metrics, **read_images(material)}


def _distances(material: Material, extractor: FeatureExtractor) -> dict[str, Metric]:
    """Frechet distances to both splits, and to the training images without bias."""
    train, held, made = material.training, material.held_out, material.samples
    name = f"FD[{extractor.name}]-{material.sample_count}"
    reference = Gaussian.of(train.features)
    found = intervals.frechet_intervals(made.features, reference)
    floor = intervals.frechet_intervals(held.features, reference)
    metrics = {
        "distance": _within(
            found.plain if found else None,
            Metric(
                name=name,
                value=frechet.frechet_from_features(made.features, train.features),
                beside=frechet.frechet_from_features(held.features, train.features),
                note=f"Fréchet distance to the {len(train.images)} training images; held-out "
                f"images: {len(held.images)}, and fewer images make it larger",
            ),
        ),
        "distance_held_out": Metric(
            name=f"{name} to held-out",
            value=frechet.frechet_from_features(made.features, held.features),
            note="Fréchet distance to the held-out images",
        ),
    }
    if found is not None:
        metrics["distance_endless"] = _within(
            found.endless,
            Metric(
                name=f"FD-infinity[{extractor.name}]",
                value=found.endless.value,
                beside=floor.endless.value if floor else None,
                note="where the line over 1/N ends: the distance that endless samples would have",
            ),
        )
    return metrics


def _within(interval: Interval | None, metric: Metric) -> Metric:
    """A metric with the ends of its interval, where there is one."""
    if interval is None:
        return metric
    return replace(metric, low=interval.low, high=interval.high)


def read_images(material: Material) -> dict[str, Metric]:
    """Numbers on pixels of the kept images; none where none are kept."""
    train, held, made = material.training, material.held_out, material.samples
    kept = len(made.images)
    if not kept:
        return {}
    reader = Reader(train.images, train.labels)
    agreement = reader.agreement(made.images, made.labels[:kept])
    near = partial(_nearest, train)
    nearest = intervals.median_interval(near(made.images))
    return {
        "label_agreement": _within(
            intervals.share_interval(round(agreement * kept), kept),
            Metric(
                name="read as their own class",
                value=agreement,
                beside=reader.agreement(held.images, held.labels),
                n=kept,
                note=f"by a support vector classifier fitted on training pixels; {kept} samples",
            ),
        ),
        "nearest": _within(
            nearest,
            Metric(
                name="distance to the nearest training image",
                value=nearest.value,
                beside=float(np.median(near(held.images))),
                n=kept,
                note="median root mean square of pixel differences, 0 to 255; far below the "
                "held-out figure would mean copies",
            ),
        ),
    }


def _nearest(train: Split, queries: NDArray[np.uint8]) -> NDArray[np.float64]:
    flat = [x.reshape(len(x), -1).astype(np.float64) for x in (queries, train.images)]
    return frechet.nearest_distances(*flat) / np.sqrt(flat[0].shape[1])


# -- pictures -----------------------------------------------------------------------------------


def grid_of(split: Split, classes: int, rows: int) -> Tensor:
    """The first images of each class, uint8 (K, R, C, H, W); R is what every class has.

    R is 1 at least: a class of which there is no image shows a black one.
    """
    labels = split.labels[: len(split.images)]
    chosen = [np.flatnonzero(labels == k)[:rows] for k in range(classes)]
    full = max(1, min(len(numbers) for numbers in chosen))
    grid = np.zeros((classes, full, *split.images.shape[1:]), dtype=np.uint8)
    for row, numbers in zip(grid, chosen, strict=True):
        row[: len(numbers)] = split.images[numbers[:full]]
    return torch.from_numpy(grid)


def main(argv: list[str]) -> int:
    """Run the stage program."""
    return stage_main(("evaluation",), program, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
