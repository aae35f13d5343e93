"""Evidence -> champion, and the way back.

Wraps eqm.gate and eqm.champion. Locally: ``eqm promote demo``, ``eqm rollback demo``.
"""

import getpass
import os
import socket
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from eqm import champion
from eqm.errors import DataError
from eqm.records import Decision, Record
from eqm.registry import Registry, Version
from eqm.stage import git_revision, open_ref
from flows.addresses import sealed_by_digits
from flows.evaluate import Report, evaluation_of, judge, publish
from flows.jobs import Plan, require_sealed
from flows.plan import make_plan
from flows.prefect_tools import logged, stage
from flows.train import register_model

PROMOTE_SECONDS = 12 * 3600.0
"""Weights are read from the store, once."""


def whoever() -> dict[str, Any]:
    """Who moves the champion, and with which program: provenance of an entry of its history."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # In a container nobody may have a name.
        user = str(os.getuid())
    return {
        "by": user,
        "machine": socket.gethostname(),
        "flow_run": flow_run.get_name(),
        "git_revision": git_revision(),
    }


@stage
def promote_model(
    plan: Plan, trained: Record, version: Version, decision: Decision, report: Report
) -> champion.Entry | None:
    """Move ``champion`` to the candidate where the decision says so."""
    registry = Registry(plan.mlflow_uri)
    for line in champion.repair(plan.store, registry, plan.model_name):
        logged(f"repaired: {line}")
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
        provenance=whoever(),
    )
    logged(f"{version.model} version {version.number} is champion (history {entry.number})")
    return entry


@stage
def named(plan: Plan, digits: str) -> Record:
    """The evaluation whose digest begins so, of a version of this model.

    Raises ConfigError for digits of several, DataError for none and for that of another model.
    """
    found = sealed_by_digits(plan.store, "evaluation", digits)
    if found is None:
        raise DataError(
            f"--evaluation is {digits}, and {plan.store.uri} has no such evaluation: `eqm history` "
            "and the log of the run that made it name its digest"
        )
    train = found.inputs["train"]
    source = plan.store.where(f"train/{train.digest}")
    registry = Registry(plan.mlflow_uri)
    if registry.find(plan.model_name, source=source, content=train.content) is None:
        raise DataError(
            f"evaluation {found.digest[:12]} is of a model that is no version of "
            f"{plan.model_name}: give the config whose name the model has"
        )
    return found


@flow(name="promote", timeout_seconds=PROMOTE_SECONDS)
def promote(
    config: str | dict[str, Any] = "demo",
    changes: dict[str, Any] | None = None,
    despite_rollback: bool = False,
    evaluation: str | None = None,
) -> bool:
    """Judge the evaluated model of a config, and promote it if the policy is met.

    A model that was rolled back is promoted again only with ``despite_rollback``. ``evaluation``:
    first digits of the digest of another one to judge, as of a model that `weekly` trained.
    """
    plan = make_plan(config, changes)
    judged = named(plan, evaluation) if evaluation else require_sealed(plan, evaluation_of(plan))
    trained = open_ref(plan.store, judged.inputs["train"])
    version = register_model(plan, trained)
    decision = judge(plan, judged, despite_rollback)
    report = publish(plan, judged, decision)
    return promote_model(plan, trained, version, decision, report) is not None


@flow(name="rollback")
def rollback(config: str | dict[str, Any] = "demo", changes: dict[str, Any] | None = None) -> int:
    """Make the champion before this one champion again; returns its version."""
    plan = make_plan(config, changes)
    registry = Registry(plan.mlflow_uri)
    entry = champion.rollback(plan.store, registry, plan.model_name, whoever())
    logged(f"{plan.model_name}: version {entry.version} is champion again ({entry.number})")
    return entry.version
