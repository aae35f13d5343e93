"""Images -> latents: the autoencoder, and the shards that it makes.

Wraps ``python -m eqm.fit`` and ``python -m eqm.encode``. Locally: ``eqm encode demo``.
"""

from typing import Any

from prefect import flow

from eqm.records import Record, Ref
from flows.plan import (
    Plan,
    autoencoder_job,
    ensure,
    latents_job,
    list_source,
    make_plan,
    source_ref,
)
from flows.prefect_tools import logged, stage


@stage
def list_images(plan: Plan) -> Ref:
    """List the images of the source; its digest stands for all of them."""
    source = list_source(plan)
    skipped = f", {len(source.skipped)} corrupt ones skipped" if source.skipped else ""
    logged(f"source {source.digest[:12]}: {len(source.entries)} images{skipped}")
    return source_ref(source)


@stage
def fit_autoencoder(plan: Plan, source: Ref) -> Record:
    """Fit the autoencoder on the training images, or seal the one that is given."""
    return ensure(plan, autoencoder_job(plan, source), say=logged)


@stage
def encode_images(plan: Plan, source: Ref, autoencoder: Record) -> Record:
    """Encode all images into sealed shards of moments."""
    job = latents_job(plan, source, autoencoder)
    return ensure(plan, job, say=logged, processes=plan.processes)


@flow(name="fit-autoencoder")
def fit(config: str | dict[str, Any] = "demo", changes: dict[str, Any] | None = None) -> str:
    """Fit the autoencoder of a config; returns the address of its record."""
    plan = make_plan(config, changes, tracked=False)
    made = fit_autoencoder(plan, list_images(plan))
    return plan.store.where(f"autoencoder/{made.digest}")


@flow(name="encode")
def encode(config: str | dict[str, Any] = "demo", changes: dict[str, Any] | None = None) -> str:
    """Encode the images of a config; returns the address of the sealed latents."""
    plan = make_plan(config, changes, tracked=False)
    source = list_images(plan)
    latents = encode_images(plan, source, fit_autoencoder(plan, source))
    return plan.store.where(f"latents/{latents.digest}")
