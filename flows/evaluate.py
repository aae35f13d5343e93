"""A trained model -> samples, numbers, report.

Wraps ``python -m eqm.generate``, ``python -m eqm.reference`` and ``python -m eqm.evaluate``.
Locally: ``eqm evaluate demo``.
"""

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow

from eqm import champion, dossier, drift, gate
from eqm.config import Job, replace
from eqm.errors import DataError
from eqm.names import further_inputs
from eqm.records import Decision, Evaluation, Reason, Record, Ref, from_json, to_json
from eqm.registry import Registry
from eqm.report import render_json, report_key
from eqm.report_note import render_note
from eqm.report_page import render_html
from eqm.stage import open_ref
from eqm.storage import Store
from flows.checks import check_evaluation, told_of_policy
from flows.encode import encode_images, fit_autoencoder, list_images, open_plan
from flows.jobs import (
    Plan,
    Records,
    ensure,
    evaluation_job,
    extractor_job,
    reference_job,
    require_sealed,
    samples_job,
    train_job,
)
from flows.plan import make_plan
from flows.prefect_tools import day_asked, link, logged, page, stage, tell
from flows.study import sealed_studies
from flows.train import latents_of, register_model, train_model


@dataclass(frozen=True)
class Report:
    """Where a report lies."""

    key: str
    """In the store."""
    file: Path
    """A copy on this machine."""
    run_page: str | None
    """Page of the MLflow run that shows it."""


@dataclass(frozen=True)
class Standing:
    """A champion, and what it was judged by."""

    entry: champion.Entry
    evaluation: Record
    """On which it was promoted."""
    trained: Record
    extractor: Record
    further: Records
    """Other extractors that its samples were measured by as well."""
    references: Records
    """What those made of the real images."""


@stage
def find_champion(plan: Plan) -> Standing | None:
    """The champion of a model; None before the first."""
    entry = champion.current(plan.store, plan.model_name)
    if entry is None:
        return None
    evaluation = open_ref(plan.store, entry.evaluation)
    references = references_of(plan, evaluation)
    return Standing(
        entry,
        evaluation,
        trained=open_ref(plan.store, entry.train),
        extractor=open_ref(plan.store, evaluation.inputs["extractor"]),
        further=extractors_of(plan, references),
        references=references,
    )


@stage
def check_sets(plan: Plan, source: Ref | None = None) -> None:
    """Refuse before a training what its evaluation would refuse, and tell of its policy."""
    check_evaluation(plan, source, say=logged)
    for told in told_of_policy(plan.config):
        logged(f"warning: {told}")


@stage
def fit_extractor(plan: Plan, source: Ref, further: str | None = None) -> Record:
    """Fit the feature extractor on the training images, or seal the one that is given."""
    return ensure(plan, extractor_job(plan, source, further), say=logged)


def fit_further(plan: Plan, source: Ref, had: Records | None = None) -> Records:
    """The further extractors of a config by name; those that are there already stay."""
    there = had or {}
    return {
        name: there[name] if name in there else fit_extractor(plan, source, name)
        for name in plan.config.further
    }


@stage
def generate_samples(
    plan: Plan, trained: Record, extractor: Record, further: Records | None = None
) -> Record:
    """Generate the samples that are judged, and show each to all extractors."""
    job = samples_job(plan, trained, extractor, further)
    return ensure(plan, job, say=logged, processes=plan.processes)


@stage
def look_at_images(
    plan: Plan, source: Ref, extractor: Record, further: str | None = None
) -> Record:
    """Moments and features of the real images, once for all evaluations of them."""
    job = reference_job(plan, source, extractor, further)
    return ensure(plan, job, say=logged, processes=plan.processes)


def look_further(plan: Plan, source: Ref, extractors: Records) -> Records:
    """What each further extractor makes of the real images."""
    return {name: look_at_images(plan, source, one, name) for name, one in extractors.items()}


@stage
def evaluate_model(
    plan: Plan,
    source: Ref,
    trained: Record,
    extractor: Record,
    samples: Record,
    reference: Record,
    further: Records | None = None,
) -> Record:
    """Measure the samples and the model; ``further``: references of further extractors."""
    job = evaluation_job(plan, source, trained, extractor, samples, reference, further)
    return ensure(plan, job, say=logged)


def references_of(plan: Plan, evaluation: Record) -> Records:
    """References of the further extractors that an evaluation has."""
    found = further_inputs(evaluation.inputs, "reference")
    return {name: open_ref(plan.store, ref) for name, ref in found.items()}


def extractors_of(plan: Plan, references: Records) -> Records:
    """The extractors that made some references."""
    return {name: open_ref(plan.store, one.inputs["extractor"]) for name, one in references.items()}


def under_same_protocol(plan: Plan, evaluation: Record, standing: champion.Entry) -> Record:
    """Evaluation of the champion that a candidate may be compared with.

    That of its promotion where the protocols are equal; else (new images, another sampler) the
    champion is generated from and measured again, as the candidate was.
    """
    then = open_ref(plan.store, standing.evaluation)
    wanted = dossier.evaluation_of(evaluation).protocol_digest
    if dossier.evaluation_of(then).protocol_digest == wanted:
        return then
    logged(f"version {standing.version} was judged under another protocol: measuring it again")
    trained = open_ref(plan.store, standing.train)
    extractor = open_ref(plan.store, evaluation.inputs["extractor"])
    references = references_of(plan, evaluation)
    asked = samples_job(plan, trained, extractor, extractors_of(plan, references))
    samples = ensure(plan, asked, say=logged, processes=plan.processes)
    source, reference = evaluation.inputs["source"], evaluation.inputs["reference"]
    real = open_ref(plan.store, reference)
    job = evaluation_job(plan, source, trained, extractor, samples, real, references)
    return ensure(plan, job, say=logged)


def refused_after_rollback(decision: Decision, taken_back: champion.Entry) -> Decision:
    """A model that people rolled back does not come back by itself."""
    reason = Reason(
        check="rollback",
        passed=False,
        text=f"version {taken_back.version} was rolled back: it is promoted again only by "
        "`eqm promote --despite-rollback`",
    )
    return replace(decision, promote=False, reasons=(*decision.reasons, reason))


@stage
def judge(plan: Plan, evaluation: Record, despite_rollback: bool = False) -> Decision:
    """Hold the evaluation against the policy and the champion."""
    entries = champion.history(plan.store, plan.model_name)
    standing = next(iter(champion.lineage(entries)[-1:]), None)
    if standing is not None and standing.evaluation == evaluation.ref:
        same = from_json(Decision, standing.decision, "history")
        if same.policy == to_json(plan.config.policy):
            logged(f"version {standing.version} is champion on this very evidence")
            return same
    against = None if standing is None else under_same_protocol(plan, evaluation, standing)
    decision = gate.decide(
        dossier.evaluation_of(evaluation),
        evaluation.ref,
        plan.config.policy,
        champion=None if against is None else dossier.evaluation_of(against),
        champion_ref=None if against is None else against.ref,
        studies=sealed_studies(plan, evaluation.inputs["train"])
        if plan.config.policy.required_studies
        else {},
        evaluated=dossier.ended(evaluation),
        now=datetime.datetime.now(datetime.UTC),
    )
    taken_back = champion.withdrawn(entries).get(evaluation.inputs["train"].content)
    if taken_back is not None and not despite_rollback:
        decision = refused_after_rollback(decision, taken_back)
    for reason in decision.reasons:
        logged(f"{'passed' if reason.passed else 'FAILED'}  {reason.check}: {reason.text}")
    return decision


@stage
def publish(
    plan: Plan, evaluation: Record, decision: Decision | None, night: drift.Drift | None = None
) -> Report:
    """Make the report and put it, with what a night has to say, into store, MLflow and Prefect."""
    content = dossier.collect(
        plan.store,
        evaluation,
        title=f"{plan.config.name}: Equilibrium Matching",
        model_name=plan.model_name,
        decision=decision,
    )
    html, data = render_html(content), render_json(content)
    key = report_key(evaluation.digest, content.title, content.model_name, decision)
    plan.store.write_once(f"{key}.html", html)
    plan.store.write_once(f"{key}.json", data)
    # What stands is what is shown everywhere, also where another version of this program made it.
    html, data = plan.store.read(f"{key}.html"), plan.store.read(f"{key}.json")
    file = plan.settings.home / "reports" / f"{plan.config.name}-{evaluation.digest[:12]}.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(html)
    note = render_note(content.evaluation, decision, digest=evaluation.digest)
    report = Report(f"{key}.html", file, show(plan, evaluation, html, data, night, note))
    logged(f"report: {file}")
    return report


def show(
    plan: Plan,
    evaluation: Record,
    html: bytes,
    data: bytes,
    night: drift.Drift | None,
    note: str,
) -> str | None:
    """Add report and numbers to the MLflow run of the training, and to Prefect.

    A verdict, and a first evaluation, are told on the pages of run and version as well.
    """
    day = evaluation.config["evaluate"]["as_of"]
    train, measured = evaluation.inputs["train"].digest, dossier.evaluation_of(evaluation)
    registry = Registry(plan.mlflow_uri)
    page(f"{plan.model_name}-evaluation", note, "Numbers of the evaluation")
    if day is None:
        registry.describe(
            plan.model_name,
            source=plan.store.where(f"train/{train}"),
            content=evaluation.inputs["train"].content,
            run_digest=train,
            note=note,
        )
    # A later look at the champion stands beside the numbers that it was promoted on.
    kind = "eval" if day is None else "nightly"
    name = registry.name_for(train, kind, measured.protocol_digest)
    folder = f"report{name.removeprefix(kind)}" if day is None else f"{name}/{day}"
    run_id = registry.add_evidence(
        train,
        metrics={**figures(measured, name), **figures_of(night, name)},
        files={f"{folder}/report.html": html, f"{folder}/report.json": data},
    )
    address = registry.run_page(run_id) if run_id else None
    if address:
        link(
            f"{plan.model_name}-report", f"{address}/artifacts", "Report, as an artifact in MLflow"
        )
    return address


def figures(measured: Evaluation, within: str) -> dict[str, float]:
    """Numbers of an evaluation under the names that MLflow shows, ``<within>/...``."""
    found: dict[str, float] = {}
    for key, metric in measured.metrics.items():
        found |= _with_ends(f"{within}/{key}", metric.value, metric.low, metric.high)
    for row in measured.ood:
        name = f"{within}/auroc_{row.name}" + ("" if row.role == "main" else f"_{row.score}")
        found |= _with_ends(name, row.auroc, row.auroc_low, row.auroc_high)
    return found


def _with_ends(name: str, value: float, low: float | None, high: float | None) -> dict[str, float]:
    """A number and the ends of its interval, which stand beside it as NAME.low and NAME.high."""
    ends = {f"{name}.low": low, f"{name}.high": high}
    return {name: value, **{key: end for key, end in ends.items() if end is not None}}


def figures_of(night: drift.Drift | None, within: str) -> dict[str, float]:
    """Drift under the names that MLflow shows; an alarm is a line that rises to 1."""
    if night is None or night.difference is None or night.low is None or night.high is None:
        return {}
    return {
        f"{within}/drift": night.difference,
        f"{within}/drift_low": night.low,
        f"{within}/drift_high": night.high,
        f"{within}/drift_alarm": float(night.alarm),
    }


@flow(name="fit-extractor")
def fit(config: str | dict[str, Any] = "demo", changes: dict[str, Any] | None = None) -> str:
    """Fit the feature extractor of a config; returns the address of its record."""
    plan = make_plan(config, changes, tracked=False)
    made = fit_extractor(plan, list_images(plan))
    return plan.store.where(f"extractor/{made.digest}")


@flow(name="generate")
def generate(config: str | dict[str, Any] = "demo", changes: dict[str, Any] | None = None) -> str:
    """Generate from the trained model of a config; returns the address of the samples."""
    plan = make_plan(config, changes, tracked=False)
    trained = require_sealed(plan, train_job(plan, latents_of(plan)))
    source = list_images(plan)
    extractor, further = fit_extractor(plan, source), fit_further(plan, source)
    made = generate_samples(plan, trained, extractor, further)
    return plan.store.where(f"samples/{made.digest}")


@flow(name="report")
def report(config: str | dict[str, Any] = "demo", changes: dict[str, Any] | None = None) -> str:
    """Judge and report the sealed evaluation of a config; returns the address of the page."""
    plan = make_plan(config, changes)
    evaluation = require_sealed(plan, evaluation_of(plan))
    return plan.store.where(publish(plan, evaluation, judge(plan, evaluation)).key)


def evaluation_of(plan: Plan) -> Job:
    """What the evaluation of a config is asked, everything before it being sealed."""
    source = list_images(plan)
    extractor = require_sealed(plan, extractor_job(plan, source))
    trained = require_sealed(plan, train_job(plan, latents_of(plan)))
    further = {
        name: require_sealed(plan, extractor_job(plan, source, name))
        for name in plan.config.further
    }
    samples = require_sealed(plan, samples_job(plan, trained, extractor, further))
    reference = require_sealed(plan, reference_job(plan, source, extractor))
    references = {
        name: require_sealed(plan, reference_job(plan, source, one, name))
        for name, one in further.items()
    }
    return evaluation_job(plan, source, trained, extractor, samples, reference, references)


@flow(name="evaluate")
def evaluate(config: str | dict[str, Any] = "demo", changes: dict[str, Any] | None = None) -> str:
    """Train what is missing, evaluate, judge and report; promotes nothing."""
    plan = make_plan(config, changes)
    source = list_images(plan)
    check_sets(plan, source)
    latents = encode_images(plan, source, fit_autoencoder(plan, source))
    trained = train_model(plan, latents)
    register_model(plan, trained)
    extractor, further = fit_extractor(plan, source), fit_further(plan, source)
    samples = generate_samples(plan, trained, extractor, further)
    reference = look_at_images(plan, source, extractor)
    references = look_further(plan, source, further)
    evaluation = evaluate_model(plan, source, trained, extractor, samples, reference, references)
    report = publish(plan, evaluation, judge(plan, evaluation))
    return plan.store.where(report.key)


NIGHT_SECONDS = 20 * 3600.0
"""Before the next night begins, a run that does not end is ended, and told of."""
DRIFTED = "eqm.champion.drifted"
"""Event, for automations."""


@flow(name="reevaluate-champion", timeout_seconds=NIGHT_SECONDS)
def reevaluate_champion(
    config: str | dict[str, Any] = "demo",
    changes: dict[str, Any] | None = None,
    as_of: str | None = None,
) -> str:
    """Evaluate the champion again with the seeds of a day (YYYY-MM-DD), and look for drift.

    Unless given, it is the day (UTC) on which the run was due: nights that were missed are made up
    for, each with its own seeds. A day asks for the same thing, so a second run starts nothing.
    """
    day = day_asked(as_of)
    plan = open_plan(config, changes)
    plan = replace(plan, config=_of_day(plan, day))
    standing = find_champion(plan)
    if standing is None:
        raise DataError(f"{plan.model_name} has no champion yet: run `eqm pipeline` first")
    check_sets(plan)
    # By the extractor, and against the images, of the promotion, whatever came since: with others
    # there were nothing to compare the night with.
    source = standing.evaluation.inputs["source"]
    trained, extractor, references = standing.trained, standing.extractor, standing.references
    samples = generate_samples(plan, trained, extractor, standing.further)
    reference = look_at_images(plan, source, extractor)
    evaluation = evaluate_model(plan, source, trained, extractor, samples, reference, references)
    night = compare_days(plan, standing, evaluation, day)
    return plan.store.where(publish(plan, evaluation, None, night).key)


def _of_day(plan: Plan, day: datetime.date) -> Any:
    config = plan.config
    first_seed = day.toordinal() * config.generate.samples
    return replace(
        config,
        generate=replace(config.generate, first_seed=first_seed),
        evaluate=replace(config.evaluate, as_of=day.isoformat()),
    )


def first_night(store: Store, promotion: Record, day: datetime.date) -> tuple[Record, str] | None:
    """The evaluation of the first night after a promotion, before a day, and what to call it.

    Under the protocol of the promotion; None before there is one.
    """
    nights: dict[str, Ref] = {}
    for digest in {key.split("/")[1] for key in store.list("night/")}:
        night = store.record("night", digest)
        if night is not None and night.inputs["promotion"] == promotion.ref:
            nights[night.config["day"]] = night.inputs["evaluation"]
    wanted = dossier.evaluation_of(promotion).protocol_digest
    for earlier in sorted(name for name in nights if name < day.isoformat()):
        evaluation = open_ref(store, nights[earlier])
        if dossier.evaluation_of(evaluation).protocol_digest == wanted:
            return evaluation, f"on {earlier}, the first night after its promotion"
    return None


@stage
def compare_days(plan: Plan, standing: Standing, today: Record, day: datetime.date) -> drift.Drift:
    """Seal what the night has to say beside the promotion, show it, and raise the alarm if so."""
    promotion, entry = standing.evaluation, standing.entry
    before, when = first_night(plan.store, promotion, day) or (promotion, "at promotion")
    found = drift.between(dossier.evaluation_of(before), dossier.evaluation_of(today), when=when)
    plan.store.seal(
        Record(
            stage="night",
            algorithm=1,
            config={"model": plan.model_name, "day": day.isoformat()},
            inputs={
                "promotion": promotion.ref,
                "before": before.ref,
                "evaluation": today.ref,
                "train": entry.train,
            },
            outputs={},
            values={"drift": to_json(found)},
        )
    )
    logged(f"{'ALARM  ' if found.alarm else ''}version {entry.version}: {found.text}")
    verdict = {"none": "No drift", "drift": "**Drift**", "unknown": "Drift unknown"}[found.outcome]
    text = f"{verdict} of version {entry.version} on {day}: {found.text}."
    page(f"{plan.model_name}-drift", text, "Last night's look at the champion")
    if found.alarm:
        tell(DRIFTED, plan.model_name, {"version": entry.version, "day": str(day), "text": text})
    return found
