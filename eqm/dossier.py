"""Sealed records -> all that a report shows, verified on the way.

Reads the chain of records behind an evaluation and the bytes that the page needs. Called by study,
verification and flows.
"""

import datetime
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eqm.config import SamplerConfig
from eqm.errors import IntegrityError
from eqm.model import spec_from_bytes
from eqm.records import Blob, Decision, Evaluation, Record, Ref, from_json
from eqm.registry import Version
from eqm.report import ReportInput
from eqm.samples import config_of, labels_of
from eqm.stage import open_ref
from eqm.storage import Store

STORY = ("autoencoder", "extractor", "latents", "train", "samples", "reference", "evaluation")
"""Order of the chain on the page."""


def evaluation_of(record: Record) -> Evaluation:
    """The typed evaluation in its record."""
    return from_json(Evaluation, record.values["evaluation"], f"evaluation {record.digest[:12]}")


def ended(record: Record) -> datetime.datetime | None:
    """When a result was sealed, by the clock of the machine that made it."""
    try:
        found = datetime.datetime.fromisoformat(str(record.provenance.get("ended")))
    except ValueError:
        return None
    return found if found.tzinfo else None


def sampler_of(store: Store, version: Version) -> SamplerConfig | None:
    """How the samples were found on which a registered version was promoted; None for others.

    MLflow says which evaluation that was, and the sealed records the rest. Raises IntegrityError
    where they are of another model, or not what MLflow promises; DataError where they are gone.
    """
    if (digest := version.tags.get("eqm.evaluation")) is None:
        return None
    content = version.tags.get("eqm.evaluation_content", "")
    evaluation = open_ref(store, Ref(stage="evaluation", digest=digest, content=content))
    samples = open_ref(store, evaluation.inputs["samples"])
    train = samples.inputs["train"].digest
    if train != (found := version.source.rpartition("/")[2]):
        raise IntegrityError(
            f"{version.model} version {version.number} names evaluation {digest[:12]}, which is of "
            f"training {train[:12]}, and itself is training {found[:12]}: one was edited in "
            "MLflow; `eqm history` with --repair sets it right"
        )
    return config_of(samples).sampler


def chain_of(store: Store, record: Record) -> tuple[Record, ...]:
    """The record and everything it was built on, in the order of the story."""
    found: dict[str, Record] = {}
    _collect(store, record, found)
    return tuple(sorted(found.values(), key=lambda r: (STORY.index(r.stage), r.digest)))


def _collect(store: Store, record: Record, found: dict[str, Record]) -> None:
    found[record.digest] = record
    for ref in record.inputs.values():
        if ref.stage != "source" and ref.digest not in found:
            _collect(store, open_ref(store, ref), found)


def collect(
    store: Store,
    record: Record,
    *,
    title: str,
    model_name: str,
    decision: Decision | None,
) -> ReportInput:
    """Gather what the report of an evaluation shows; the champion is the decision's."""
    compared = decision.champion if decision else None
    samples = open_ref(store, record.inputs["samples"])
    trained = open_ref(store, record.inputs["train"])
    path = _arrays(store, samples.outputs["trajectory.safetensors"])
    scores = _arrays(store, record.outputs["ood-scores.safetensors"])
    shown, real = (
        _arrays(store, record.outputs[f"{name}-images.safetensors"]) for name in ("sample", "real")
    )
    generated = samples.config["generate"]
    first = generated["first_seed"]
    return ReportInput(
        title=title,
        model_name=model_name,
        evaluation=evaluation_of(record),
        decision=decision,
        champion=evaluation_of(open_ref(store, compared)) if compared else None,
        chain=chain_of(store, record),
        history=json.loads(store.get(trained.outputs["history.json"])),
        sample_images=shown["images"],
        sample_counts=_counts(shown),
        real_images=real["images"],
        real_counts=_counts(real),
        class_names=tuple(record.values["classes"]),
        ood_scores=_by_score(scores),
        trajectory=path["images"],
        trajectory_updates=path["updates"].tolist(),
        generated_with={
            **generated["sampler"],
            "labels": generated["labels"],
            "seeds": f"{first} to {first + generated['samples'] - 1}",
        },
        sample_seeds=seeds_shown(store, samples, trained, shown["images"].shape[:2]),
    )


def seeds_shown(
    store: Store, samples: Record, trained: Record, grid: tuple[int, ...]
) -> list[list[int]]:
    """Seeds of the first samples of each class, as in the grid (K, R, ...) of an evaluation."""
    classes, rows = grid
    config = config_of(samples)
    kept = range(config.first_seed, config.first_seed + int(samples.values["images_kept"]))
    spec = spec_from_bytes(store.get(trained.outputs["model.json"]), trained.digest[:12])
    labels = labels_of(config, kept, len(spec.classes)).numpy()
    return [[kept[i] for i in np.flatnonzero(labels == k)[:rows]] for k in range(classes)]


def _by_score(sealed: dict[str, NDArray[Any]]) -> dict[str, dict[str, list[float]]]:
    """Score -> set -> scores; names without a score are those of the first evaluations."""
    found: dict[str, dict[str, list[float]]] = {}
    for key, values in sorted(sealed.items()):
        score, _, name = key.rpartition("/")
        found.setdefault(score or "gradient_norm", {})[name] = values.tolist()
    return found


def _counts(grid: dict[str, NDArray[Any]]) -> tuple[int, ...]:
    """Pictures of each class; the first evaluations did not count them."""
    return tuple(grid["counts"].tolist()) if "counts" in grid else ()


def _arrays(store: Store, blob: Blob) -> dict[str, NDArray[Any]]:
    from safetensors.numpy import load

    return load(store.get(blob))
