"""Latents -> a trained, registered model.

Wraps ``python -m eqm.train`` (under torchrun for several processes). Locally: ``eqm train demo``.
"""

from typing import Any

from prefect import flow

from eqm import serving
from eqm.errors import TrackingError
from eqm.records import Record
from eqm.records import digest as digest_of
from eqm.registry import Registry, Version
from flows.encode import encode_images, fit_autoencoder, list_images
from flows.jobs import Plan, autoencoder_job, ensure, latents_job, require_sealed, train_job
from flows.plan import make_plan
from flows.prefect_tools import logged, stage


@stage
def train_model(plan: Plan, latents: Record) -> Record:
    """Train, or go on training, to the end of the config."""
    return ensure(plan, train_job(plan, latents), say=logged, processes=plan.processes)


@stage
def register_model(plan: Plan, trained: Record) -> Version:
    """Make a registered version that points to the sealed model, alias ``candidate``."""
    try:
        return _registered(plan, trained)
    except TrackingError as error:
        where = plan.store.where(f"train/{trained.digest}")
        raise TrackingError(
            f"{error}. The model is sealed ({where}), and the same command makes its version"
        ) from error


def _registered(plan: Plan, trained: Record) -> Version:
    registry = Registry(plan.mlflow_uri)
    if not registry.has_finished(trained.digest):
        # MLflow was away while it was trained: the run is shown first, so that it can be named.
        from eqm.mirroring import send_missed

        send_missed(plan.store, trained, plan.runtime("train"))
    revision = trained.provenance.get("git_revision") or "unknown"
    tags = {
        "eqm.train": trained.digest,
        "eqm.content": trained.content,
        "eqm.weights": trained.outputs["ema.safetensors"].sha256,
        "eqm.data": trained.inputs["latents"].content,
        "eqm.config": digest_of(plan.config),
        "eqm.git_revision": revision,
    }
    source = plan.store.where(f"train/{trained.digest}")
    described = serving.files_of(plan.store, trained, plan.config.generate.sampler)
    for name, data in described.items():
        # By these MLflow knows what it is: its pages show the signature, its server loads it.
        plan.store.write_once(f"train/{trained.digest}/{name}", data)
    version = registry.register(
        plan.model_name, source=source, tags=tags, run_digest=trained.digest
    )
    logged(f"{version.model} version {version.number}: registered as candidate")
    return version


@flow(name="register")
def register(config: str | dict[str, Any] = "demo", changes: dict[str, Any] | None = None) -> int:
    """Register the trained model of a config; returns its version."""
    plan = make_plan(config, changes)
    return register_model(plan, require_sealed(plan, train_job(plan, latents_of(plan)))).number


def latents_of(plan: Plan) -> Record:
    """The sealed latents of a config. Raises DataError if they were not encoded."""
    source = list_images(plan)
    autoencoder = require_sealed(plan, autoencoder_job(plan, source))
    return require_sealed(plan, latents_job(plan, source, autoencoder))


@flow(name="train")
def train(config: str | dict[str, Any] = "demo", changes: dict[str, Any] | None = None) -> str:
    """Train and register the model of a config; returns the address of the sealed model."""
    plan = make_plan(config, changes)
    source = list_images(plan)
    latents = encode_images(plan, source, fit_autoencoder(plan, source))
    trained = train_model(plan, latents)
    register_model(plan, trained)
    return plan.store.where(f"train/{trained.digest}")
