"""The whole story, one line a stage. Locally: ``eqm pipeline demo``; deployed: every week."""

from typing import Any

from prefect import flow

from flows.encode import encode_images, fit_autoencoder, list_images
from flows.evaluate import (
    evaluate_model,
    fit_extractor,
    generate_samples,
    judge,
    look_at_images,
    publish,
)
from flows.plan import make_plan
from flows.promote import promote_model
from flows.train import register_model, train_model


@flow(name="pipeline")
def pipeline(
    config: str | dict[str, Any] = "demo", changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Images to decision; every stage that is sealed already is verified and skipped.

    ``config`` is a preset, a TOML file or a table; ``changes`` sets single values by dotted name.
    """
    plan = make_plan(config, changes)
    source = list_images(plan)
    autoencoder = fit_autoencoder(plan, source)
    extractor = fit_extractor(plan, source)
    latents = encode_images(plan, source, autoencoder)
    trained = train_model(plan, latents)
    version = register_model(plan, trained)
    samples = generate_samples(plan, trained, extractor)
    reference = look_at_images(plan, source, extractor)
    evaluation = evaluate_model(plan, source, trained, extractor, samples, reference)
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
