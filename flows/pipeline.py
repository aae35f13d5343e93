"""The whole story, one line a stage. Locally: ``eqm pipeline demo``; deployed: on demand.

What a schedule makes of it is flows.weekly.
"""

from dataclasses import dataclass
from typing import Any

from prefect import flow

from eqm.records import Record, Ref
from flows.encode import encode_images, fit_autoencoder, list_images, open_plan
from flows.evaluate import (
    check_sets,
    evaluate_model,
    fit_extractor,
    fit_further,
    generate_samples,
    judge,
    look_at_images,
    look_further,
    publish,
)
from flows.jobs import Plan, Records
from flows.prefect_tools import MONTH_SECONDS
from flows.promote import promote_model
from flows.train import register_model, train_model


@dataclass(frozen=True)
class Base:
    """What a training that goes on from another one keeps of it: its latents and its ruler."""

    autoencoder: Record
    extractor: Record
    further: Records
    """Other extractors that samples are measured by as well."""
    latents: Record | None
    """What its images were encoded to, where those may be copied."""


@flow(name="pipeline", timeout_seconds=MONTH_SECONDS)
def pipeline(
    config: str | dict[str, Any] = "demo", changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Images to decision; every stage that is sealed already is verified and skipped.

    ``config`` is a preset, a TOML file or a table; ``changes`` sets single values by dotted name.
    """
    plan = open_plan(config, changes)
    return images_to_decision(plan, list_images(plan))


def images_to_decision(plan: Plan, source: Ref, base: Base | None = None) -> dict[str, Any]:
    """Every stage in its turn, on a base that is there already or on one that is fitted here."""
    check_sets(plan, source)
    autoencoder = base.autoencoder if base else fit_autoencoder(plan, source)
    latents = encode_images(plan, source, autoencoder, base.latents if base else None)
    extractor = base.extractor if base else fit_extractor(plan, source)
    further = fit_further(plan, source, base.further if base else None)
    trained = train_model(plan, latents)
    version = register_model(plan, trained)
    samples = generate_samples(plan, trained, extractor, further)
    reference = look_at_images(plan, source, extractor)
    references = look_further(plan, source, further)
    evaluation = evaluate_model(plan, source, trained, extractor, samples, reference, references)
    decision = judge(plan, evaluation)
    report = publish(plan, evaluation, decision)
    promoted = promote_model(plan, trained, version, decision, report)
    return {
        "latents": latents.content,
        "train": trained.content,
        "samples": samples.content,
        "evaluation": evaluation.content,
        "model": version.model,
        "version": version.number,
        "promoted": promoted is not None,
        "report": str(report.file),
        "run_page": report.run_page,
    }
