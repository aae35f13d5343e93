"""Samples + sealed reference -> numbers, each under a name that tells what it is.

Distances are to the training images, as in the field, with that of held-out images beside them:
about what a perfect model would reach with as many samples. What the numbers are is eqm.frechet's,
how sure they are eqm.intervals'. Called by evaluate.

Legend: N samples; an "FID" is the distance of 50,000 of them under the Inception network of the
field, "FID-5000" that of fewer, and "FD[name]-N" that under another extractor.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from eqm import frechet, intervals, ood
from eqm.agreement import MOST_IMAGES, Reader, thumbnails
from eqm.features import INCEPTION
from eqm.frechet import Gaussian
from eqm.intervals import Interval
from eqm.records import Metric
from eqm.statistics import Reference, Side
from eqm.words import counted

SAMPLES_OF_THE_FIELD = 50_000
MOST_CLASSES = 100
"""Of a data set whose labels a classifier is fitted to read: pairs of them are what it costs."""
SPLITS = 10
"""Of the Inception Score, as in the field."""
LEAST_SCORED = 2 * SPLITS
"""Images: a split of one has an Inception Score of 1, whatever it shows."""

Features = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Samples:
    """What was sealed of samples."""

    features: Features
    """(N, D), of all samples."""
    logits: Features | None
    spatial: Features | None
    labels: NDArray[np.int64]
    """(N,)"""
    images: NDArray[np.uint8]
    """(K, C, H, W), of the first K; small pictures (eqm.agreement.thumbnails) say all that is asked
    of them."""

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True, eq=False)
class Nearest:
    """The training image nearest to each of some images."""

    numbers: NDArray[np.int64]
    """Among the training images of the source, in their order."""
    distances: NDArray[np.float64]
    """Root mean square of pixel differences, 0 to 255."""


def title(kind: str, extractor: str, count: int) -> str:
    """Name of a number of samples, after its kind: "FD", "sFD", "KID" or "IS"."""
    if extractor != INCEPTION:
        return f"{kind}[{extractor}]-{count}"
    kind = {"FD": "FID", "sFD": "sFID"}.get(kind, kind)
    return kind if count == SAMPLES_OF_THE_FIELD else f"{kind}-{count}"


def measure(
    samples: Samples,
    reference: Reference,
    *,
    neighbours: int,
    told: Callable[[int], None] = lambda samples: None,
) -> dict[str, Metric]:
    """Every number on features of the samples, with that of held-out images beside it.

    Two of them look at all pairs of samples: for each ``told(samples)`` adds up to their number.
    """
    found = {**distances(samples, reference), **_spatial_distance(samples, reference)}
    if len(reference.training.features) > neighbours:
        found |= _kernel_distance(samples, reference, told)
        found |= _precision_recall(samples, reference, neighbours, told)
    if samples.logits is not None and len(samples) >= LEAST_SCORED:
        found |= _class_score(samples.logits, reference)
    return found


# -- distances ----------------------------------------------------------------------------------


def distances(samples: Samples, reference: Reference) -> dict[str, Metric]:
    """Frechet distances to both sides, and to the training images without bias.

    The last only where eqm.intervals has it; the note of the first says where it has not.
    """
    train, held = reference.training, reference.held_out
    name = title("FD", reference.extractor, len(samples))
    real = train.gaussian()
    found = intervals.frechet_intervals(samples.features, real)
    endless = found.endless if found else None
    made = Gaussian.of(samples.features)
    note = (
        f"Fréchet distance to the {train.count} training images; held-out images: {held.count}, "
        "and fewer images make it larger"
    )
    if found and endless is None:
        least = intervals.LEAST_A_DIMENSION
        note += f"; {_endless_title(reference)} takes {least} samples a dimension, there are fewer"
    metrics = {
        "distance": _within(
            found.plain if found else None,
            Metric(
                name=name,
                value=found.plain.value if found else made.distance(real),
                beside=held.gaussian().distance(real),
                note=note,
            ),
        ),
        "distance_held_out": Metric(
            name=f"{name} to held-out",
            value=made.distance(held.gaussian()),
            note="Fréchet distance to the held-out images",
        ),
    }
    if endless is not None:
        floor = intervals.frechet_intervals(held.features, real)
        beside = floor.endless if floor else None
        metrics["distance_endless"] = _within(
            endless,
            Metric(
                name=_endless_title(reference),
                value=endless.value,
                beside=beside.value if beside else None,
                note="where the curve over 1/N ends: the distance that endless samples would have; "
                "almost unbiased, so it may be slightly negative",
            ),
        )
    return metrics


def _endless_title(reference: Reference) -> str:
    of = reference.extractor
    return "FID-infinity" if of == INCEPTION else f"FD-infinity[{of}]"


def _spatial_distance(samples: Samples, reference: Reference) -> dict[str, Metric]:
    train, held = reference.training.spatial, reference.held_out.spatial
    if samples.spatial is None or train is None:
        return {}
    real = Gaussian.of_moments(train)
    found = intervals.frechet_intervals(samples.spatial, real)
    plain = found.plain if found else None
    metric = Metric(
        name=title("sFD", reference.extractor, len(samples)),
        value=plain.value if plain else Gaussian.of(samples.spatial).distance(real),
        beside=Gaussian.of_moments(held).distance(real) if held else None,
        note="Fréchet distance of features at their positions, which are not averaged",
    )
    return {"spatial_distance": _within(plain, metric)}


def _kernel_distance(
    samples: Samples, reference: Reference, told: Callable[[int], None]
) -> dict[str, Metric]:
    train, held = reference.training.features, reference.held_out.features
    found = intervals.kernel_interval(samples.features, train, told=told)
    value = found.value if found else frechet.kernel_distance(samples.features, train).mean
    metric = Metric(
        name=title("KID", reference.extractor, len(samples)),
        value=value,
        beside=frechet.kernel_distance(held, train).mean if len(held) > 1 else None,
        note=f"unbiased, so it may be slightly negative; {_of(reference.training)}",
    )
    return {"kid": _within(found, metric)}


def _precision_recall(
    samples: Samples, reference: Reference, neighbours: int, told: Callable[[int], None]
) -> dict[str, Metric]:
    train, held = reference.training.features, reference.held_out.features
    count, name = len(samples), f"[{reference.extractor}]-{len(samples)}"
    made = samples.features
    found = intervals.recall_interval(train, made, neighbours=neighbours, told=told)
    if found is None:
        precision, recall = frechet.precision_recall(train, made, neighbours=neighbours)
    else:
        precision, recall = frechet.precision_of(train, made, neighbours=neighbours), found.value
    beside = (
        frechet.precision_recall(train, held, neighbours=neighbours)
        if len(held) > neighbours
        else (None, None)
    )
    note = f"{neighbours} neighbours; {_of(reference.training)}"
    return {
        "precision": _within(
            intervals.share_interval(round(precision * count), count),
            Metric(name=f"precision{name}", value=precision, beside=beside[0], note=note),
        ),
        "recall": _within(
            found,
            Metric(name=f"recall{name}", value=recall, beside=beside[1], note=note),
        ),
    }


def _class_score(logits: Features, reference: Reference) -> dict[str, Metric]:
    found = intervals.score_interval(frechet.class_scores(logits, splits=SPLITS))
    held = reference.held_out.logits
    metric = Metric(
        name=title("IS", reference.extractor, len(logits)),
        value=found.value,
        beside=None
        if held is None or len(held) < LEAST_SCORED
        else float(frechet.class_scores(held, splits=SPLITS).mean()),
        note=f"Inception Score, mean of {SPLITS} splits: samples that are told apart with "
        "certainty, of all classes alike; fewer images make it smaller",
    )
    return {"score": _within(found, metric)}


def _of(side: Side) -> str:
    kept, count = len(side.features), side.count
    return f"against {'all' if kept == count else f'{kept} of'} {count} training images"


def _within(interval: Interval | None, metric: Metric) -> Metric:
    """A metric with the ends of its interval, where there is one."""
    if interval is None:
        return metric
    return replace(metric, low=interval.low, high=interval.high)


# -- pixels -------------------------------------------------------------------------------------


def read_labels(samples: Samples, reference: Reference) -> dict[str, Metric]:
    """Whether a classifier that had no part in it reads the kept images as their class.

    Nothing where no image is kept, the reference has no labels or too many classes.
    """
    train = reference.first_pictures("training", MOST_IMAGES)
    kept = len(samples.images)
    classes = len(np.unique(train.labels))
    if not kept or not 1 <= classes <= MOST_CLASSES or (train.labels < 0).any():
        return {}
    held = reference.first_pictures("held-out", MOST_IMAGES)
    reader = Reader(train.images, train.labels)
    agreement = reader.agreement(samples.images, samples.labels[:kept])
    metric = Metric(
        name="read as their own class",
        value=agreement,
        beside=reader.agreement(held.images, held.labels),
        n=kept,
        note=f"by a support vector classifier fitted on training pixels; {kept} samples",
    )
    interval = intervals.share_interval(round(agreement * kept), kept)
    return {"label_agreement": _within(interval, metric)}


def nearest_training_images(images: NDArray[np.uint8], reference: Reference) -> Nearest:
    """The nearest of all training images to each image (K, C, H, W), among small pictures."""
    small = _rows(thumbnails(images))
    blocks = (_rows(part.images) for part in reference.pictures("training"))
    numbers, apart = frechet.nearest(small, blocks)
    return Nearest(numbers, apart / np.sqrt(small.shape[1]))


def memorisation(
    made: Nearest, reference: Reference, images: NDArray[np.uint8]
) -> dict[str, Metric]:
    """How near samples are to training images, beside how near held-out images are.

    ``images`` are the samples', for their size alone. A median would not move for a few copies:
    "copies" is the share of samples that are nearer than 19 of 20 held-out images.
    """
    held = reference.first_pictures("held-out", max(len(made.distances), 1)).images
    found = intervals.median_interval(made.distances)
    beside = nearest_training_images(held, reference).distances
    small = thumbnails(images[:1]).shape[-1]
    size = f", at {small} px" if small < images.shape[-1] else ""
    # Samples that are passed by the threshold that flags 95 % of held-out images as far away.
    low, high = ood.fpr_interval(made.distances, beside, "out")
    copies = Metric(
        name="nearer to a training image than 19 of 20 held-out images",
        value=_not_passed(made.distances, beside),
        beside=_not_passed(beside, beside),
        low=1 - high,
        high=1 - low,
        n=len(made.distances),
        note=f"share, by the same distance, of {counted(len(beside), 'held-out image')}; more than "
        "about one in twenty would mean copies",
    )
    metric = Metric(
        name="distance to the nearest training image",
        value=found.value,
        beside=float(np.median(beside)),
        n=len(made.distances),
        note=f"median root mean square of pixel differences, 0 to 255{size}; far below the "
        "held-out figure would mean that very many are copies",
    )
    return {"nearest": _within(found, metric), "copies": copies}


def _not_passed(distances: NDArray[np.float64], held: NDArray[np.float64]) -> float:
    passed = ood.fpr_at_95_tpr(distances, held, positive="out")
    return (len(distances) - round(passed * len(distances))) / len(distances)


def _rows(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return images.reshape(len(images), -1)
