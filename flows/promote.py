"""Evidence -> champion, and the way back.

Wraps eqm.gate and eqm.champion. Locally: ``eqm promote demo``, ``eqm rollback demo``.
"""

from typing import Any

from prefect import flow

from eqm import champion
from eqm.records import Decision, Record
from eqm.registry import Registry, Version
from flows.encode import list_images
from flows.evaluate import Report, judge, publish
from flows.plan import (
    Plan,
    autoencoder_job,
    evaluation_job,
    extractor_job,
    latents_job,
    make_plan,
    require_sealed,
    samples_job,
    train_job,
)
from flows.prefect_tools import logged, stage
from flows.train import register_model


@stage
def promote_model(
    plan: Plan, trained: Record, version: Version, decision: Decision, report: Report
) -> champion.Entry | None:
    """Move ``champion`` to the candidate where the decision says so."""
    registry = Registry(plan.mlflow_uri)
    repaired = champion.repair(plan.store, registry, plan.model_name)
    if repaired:
        logged(f"repaired: {repaired}")
    standing = champion.current(plan.store, plan.model_name)
    if standing is not None and standing.evaluation == decision.candidate:
        logged(f"{version.model} version {standing.version} is champion already")
        return standing
    if not decision.promote:
        logged(f"{version.model} version {version.number} is not promoted")
        return None
    entry = champion.promote(
        plan.store,
        registry,
        version=version,
        train=trained.ref,
        decision=decision,
        report=report.key,
    )
    logged(f"{version.model} version {version.number} is champion (history {entry.number})")
    return entry


@flow(name="promote")
def promote(config: str | dict[str, Any] = "demo", changes: dict[str, Any] | None = None) -> bool:
    """Judge the evaluated model of a config, and promote it if the policy is met."""
    plan = make_plan(config, changes)
    source = list_images(plan)
    autoencoder = require_sealed(plan, autoencoder_job(plan, source))
    extractor = require_sealed(plan, extractor_job(plan, source))
    latents = require_sealed(plan, latents_job(plan, source, autoencoder))
    trained = require_sealed(plan, train_job(plan, latents))
    samples = require_sealed(plan, samples_job(plan, trained, extractor))
    asked = evaluation_job(plan, source, trained, extractor, samples)
    evaluation = require_sealed(plan, asked)
    version = register_model(plan, trained)
    decision = judge(plan, evaluation)
    report = publish(plan, evaluation, decision)
    return promote_model(plan, trained, version, decision, report) is not None


@flow(name="rollback")
def rollback(config: str | dict[str, Any] = "demo", changes: dict[str, Any] | None = None) -> int:
    """Make the champion before this one champion again; returns its version."""
    plan = make_plan(config, changes)
    registry = Registry(plan.mlflow_uri)
    entry = champion.rollback(plan.store, registry, plan.model_name)
    logged(f"{plan.model_name}: version {entry.version} is champion again ({entry.number})")
    return entry.version
