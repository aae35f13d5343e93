"""Stage "evaluation": samples + real images -> numbers. ``python -m eqm.evaluate CONFIG.json``

Features of samples were sealed by eqm.generate, those of real images by eqm.reference; they are not
taken again here. What is measured of them is told by eqm.measures, what lies out of distribution by
eqm.outliers.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eqm import images, measures, model, outliers
from eqm.agreement import thumbnails
from eqm.checkpoint import tensors_to_bytes
from eqm.config import EvaluationStage, SamplerConfig
from eqm.errors import DataError
from eqm.features import column, load_extractor
from eqm.images import ImageSource
from eqm.measures import Samples
from eqm.names import further_input, further_inputs, further_key
from eqm.outliers import Subject
from eqm.records import Evaluation, Record, Ref, from_json, to_json
from eqm.samples import columns, kept_images
from eqm.stage import Context, Outcome
from eqm.stage import main as stage_main
from eqm.statistics import Reference, open_reference

BATCH = 256
GRID_CLASSES = 10


@dataclass(frozen=True)
class Split:
    """Some images of one side of the split, with their labels."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def program(context: Context) -> Outcome | None:
    """Measure; one process does it all."""
    if not context.world.is_first:
        return None
    stage: EvaluationStage = context.config
    record, trained = context.input("samples"), context.input("train")
    extractor = load_extractor(context.input("extractor"), context.store, context.world.device)
    source = images.checked_source(
        stage.source,
        context.job.runtime.source_uri,
        context.job.inputs["source"],
        listing=context.listing(),
    )
    check_of_one_model(context.job.inputs, record)
    reference = reference_for(context, record)
    further = {
        name: reference_for(context, record, name)
        for name in further_inputs(context.job.inputs, "reference")
    }
    # First, for it reads files that may be missing or damaged.
    rows, scores = outliers.out_of_distribution(
        stage.evaluate.ood,
        Subject(
            model=model.from_record(context.store, trained).to(context.world.device),
            sampler=from_json(SamplerConfig, record.config["generate"]["sampler"]),
            source=source,
            extractor=extractor,
        ),
        context.progress,
    )
    sealed = columns(context.store, record)
    shown = min(GRID_CLASSES, len(source.classes))
    rows_shown = stage.evaluate.grid_rows
    parts = kept_images(context.store, record)
    small, made = looked_through(parts, sealed["labels"].numpy(), shown, rows_shown)
    samples = sealed_samples(sealed, small)
    how: dict[str, Any] = {"neighbours": stage.evaluate.neighbours}
    # Pairs of samples are what takes long: of 50,000 there are a thousand million.
    pairs = 2 * len(samples) * (1 + len(further))
    with context.progress("measuring", pairs, unit="samples") as bar:
        metrics = measures.measure(samples, reference, **how, told=bar.advance)
        for name, of_name in further.items():
            seen = sealed_samples(sealed, small[:0], further=name)
            found = measures.measure(seen, of_name, **how, told=bar.advance)
            metrics |= {further_key(kind, name): metric for kind, metric in found.items()}
        bar.advance(pairs - bar.done)
    outputs = {"ood-scores.safetensors": tensors_to_bytes(scores)}
    if len(samples.images):
        near = measures.nearest_training_images(samples.images, reference)
        metrics |= measures.read_labels(samples, reference)
        metrics |= measures.memorisation(near, reference, made.images)
        outputs["nearest.safetensors"] = tensors_to_bytes(
            {name: torch.from_numpy(value) for name, value in vars(near).items()}
        )
    evaluation = Evaluation(
        protocol=protocol(
            stage,
            reference.record,
            record,
            source.digest,
            further={name: of_name.record for name, of_name in further.items()},
        ),
        samples=len(samples),
        metrics=metrics,
        ood=rows,
        # Not what the record says of it: like every number, it can be computed again.
        mean_field_evaluations=float(sealed["evaluations"].double().mean()),
    )
    real = first_of_each_class(source, shown, rows_shown)
    grids = {"real-images": real, "sample-images": made}
    return Outcome(
        outputs={
            **outputs,
            **{
                f"{name}.safetensors": tensors_to_bytes(grid_of(split, shown, rows_shown))
                for name, split in grids.items()
            },
        },
        values={
            "evaluation": to_json(evaluation),
            "protocol_digest": evaluation.protocol_digest,
            "classes": list(source.classes[:shown]),
        },
    )


# -- what is measured ---------------------------------------------------------------------------


def check_of_one_model(inputs: Mapping[str, Ref], samples: Record) -> None:
    """Refuse samples of another model, or seen by another extractor, than what is evaluated.

    An evaluation is evidence of the model that its inputs name. Raises DataError.
    """
    for name, remedy in (("train", "generate from this model"), ("extractor", "give that one")):
        made, asked = samples.inputs[name], inputs[name]
        if made != asked:
            raise DataError(
                f"samples {samples.digest[:12]} are of {name} {made.digest[:12]}, and {name} "
                f"{asked.digest[:12]} is to be evaluated: {remedy}"
            )


def reference_for(context: Context, samples: Record, further: str | None = None) -> Reference:
    """The sealed reference, or that of a further extractor.

    Raises DataError if another extractor looked at the samples, or if it is of other images.
    """

    def named(stage: str) -> str:
        return stage if further is None else further_input(stage, further)

    record = context.input(named("reference"))
    seen, source = record.inputs["source"], context.job.inputs["source"]
    if seen != source:
        raise DataError(
            f"reference {record.digest[:12]} is of images {seen.digest[:12]}, and those of this "
            f"evaluation are {source.digest[:12]}: make a reference of them"
        )
    looked = samples.inputs.get(named("extractor"))
    if looked is None:
        raise DataError(
            f"samples {samples.digest[:12]} were not looked at by further extractor {further!r}: "
            f"generate them with [further.{further}] in the config"
        )
    if record.inputs["extractor"] != looked:
        raise DataError(
            f"reference {record.digest[:12]} was made with extractor "
            f"{record.inputs['extractor'].digest[:12]}, the samples with "
            f"{looked.digest[:12]}: their features cannot be compared; make "
            "both with one extractor"
        )
    return open_reference(context.store, record)


def looked_through(
    parts: Iterable[Tensor], labels: NDArray[np.int64], classes: int, rows: int
) -> tuple[NDArray[np.uint8], Split]:
    """Kept images, uint8 (B, C, H, W) a part: all as small pictures, few of them as they are.

    Those few are the first ``rows`` of each of the first ``classes``, which a grid shows. Fifty
    thousand images of 256 px are 10 GB, so they are let go part by part. ``labels`` (N,) are those
    of all samples, in the order of the images.
    """
    small: list[NDArray[np.uint8]] = []
    shown: list[NDArray[np.uint8]] = []
    names: list[int] = []
    wanted, first = Counter({label: rows for label in range(classes)}), 0
    for part in parts:
        images, own = part.numpy(), labels[first : first + len(part)].tolist()
        first += len(part)
        small.append(thumbnails(images))
        chosen: list[int] = []
        for at, label in enumerate(own):
            if wanted[label] > 0:
                wanted[label] -= 1
                chosen.append(at)
        shown.append(images[chosen])
        names += [own[at] for at in chosen]
    return np.concatenate(small), Split(np.concatenate(shown), np.array(names, dtype=np.int64))


def sealed_samples(
    sealed: Mapping[str, Tensor], images: NDArray[np.uint8], *, further: str | None = None
) -> Samples:
    """Samples of their columns (eqm.samples.columns) and the kept images, or pictures of them.

    Activations are those of the main extractor, unless a further one is named.
    """
    logits = sealed.get(column("logits", further))
    spatial = sealed.get(column("spatial", further))
    return Samples(
        features=sealed[column("features", further)].numpy(),
        logits=None if logits is None else logits.numpy(),
        spatial=None if spatial is None else spatial.numpy(),
        labels=sealed["labels"].numpy(),
        images=images,
    )


def protocol(
    stage: EvaluationStage,
    reference: Record,
    samples: Record,
    source: str,
    *,
    further: Mapping[str, Record] | None = None,
) -> dict[str, Any]:
    """All that must be equal for two evaluations to be comparable.

    ``further``: references under further extractors. Without any the protocol says nothing of them,
    as it did before there were any.
    """
    how = dict(samples.config["generate"])
    # Seeds are not part of it: the same protocol may be run on others.
    for name in ("keep_images", "trajectory_points", "first_seed"):
        how.pop(name)
    how["sampler"] = {k: v for k, v in how["sampler"].items() if k != "batch_size"}
    looked = reference.values
    others = {
        name: {"extractor": record.values["extractor"], "reference_images": _kept_of(record)}
        for name, record in (further or {}).items()
    }
    return {
        **({"further": others} if others else {}),
        "images": {"source": source, **to_json(stage.source)},
        "extractor": looked["extractor"],
        "generate": how,
        "neighbours": stage.evaluate.neighbours,
        "ood": outliers.protocol(stage.evaluate.ood),
        "pixels": "clamp(127.5 x + 128, 0, 255), truncated to uint8",
        "reference": "training images; beside: held-out images",
        "reference_images": _kept_of(reference),
    }


def _kept_of(reference: Record) -> dict[str, Any]:
    return {name: reference.values[name] for name in ("images", "keep_features", "file")}


# -- pictures -----------------------------------------------------------------------------------


def first_of_each_class(source: ImageSource, classes: int, rows: int) -> Split:
    """The first held-out images of each of the first classes."""
    numbers = np.array(source.numbers(held_out=True))
    labels = np.array([source.entries[i].label for i in numbers.tolist()])
    chosen = [numbers[labels == k][:rows] for k in range(classes)]
    return read(source, np.concatenate(chosen).tolist())


def read(source: ImageSource, numbers: Sequence[int]) -> Split:
    """Images of a source by number."""
    starts = range(0, len(numbers), BATCH)
    pixels = list(source.read_many(numbers[start : start + BATCH] for start in starts))
    labels = np.array([source.entries[i].label for i in numbers], dtype=np.int64)
    return Split(torch.cat(pixels).numpy(), labels)


def grid_of(split: Split, classes: int, rows: int) -> dict[str, Tensor]:
    """The first images of each class: "images" uint8 (K, R, C, H, W), and "counts" of them (K,).

    R is what the class with most of them has, 1 at least; others end in black ones.
    """
    labels = split.labels[: len(split.images)]
    chosen = [np.flatnonzero(labels == k)[:rows] for k in range(classes)]
    full = max(1, *(len(numbers) for numbers in chosen))
    grid = np.zeros((classes, full, *split.images.shape[1:]), dtype=np.uint8)
    for row, numbers in zip(grid, chosen, strict=True):
        row[: len(numbers)] = split.images[numbers]
    counts = torch.tensor([len(numbers) for numbers in chosen])
    return {"images": torch.from_numpy(grid), "counts": counts}


def main(argv: list[str]) -> int:
    """Run the stage program."""
    return stage_main(("evaluation",), program, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
