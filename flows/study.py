"""A study: every cell of its table trained, generated and measured, then the table.

Wraps all stage programs and ``python -m eqm.study``. Locally: ``eqm study samplers --config demo``.
Every cell is a sealed record, so a study that was killed goes on where it was, and studies share
what is equal in them. It needs no services where the store is a folder.
"""

import contextlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow

from eqm import studies, study_page
from eqm.autoencoder import latent_spec
from eqm.config import Job, StudyStage, replace, study_input, with_settings
from eqm.errors import DataError, DivergedError, EqmError
from eqm.recipes import latent_shape
from eqm.records import Record, Ref, note_from_bytes, note_to_bytes
from eqm.registry import Registry
from eqm.stage import divergence, divergence_key, job_digest, open_ref
from eqm.studies import Base, Study
from eqm.study_table import table_of
from flows.checks import (
    check_counts,
    check_evaluation,
    check_foreseen,
    check_trainable,
    check_training,
)
from flows.encode import open_plan
from flows.jobs import (
    Plan,
    autoencoder_job,
    ensure,
    evaluation_job,
    extractor_job,
    latents_job,
    list_source,
    reference_job,
    require_sealed,
    samples_job,
    source_ref,
    study_job,
    to_be_trained_on,
    train_job,
)
from flows.prefect_tools import MONTH_SECONDS, logged, page, stage

Ensure = Callable[[Plan, Job, int], Record]
"""How a job comes to its record, by so many processes."""


@dataclass(frozen=True)
class Shown:
    """Where the pages of a study lie."""

    record: Record
    keys: dict[str, str]
    """Suffix ("md", "svg", "json") -> key in the store."""
    texts: dict[str, bytes]


def run_stage(plan: Plan, job: Job, processes: int) -> Record:
    """The sealed record of a job, which is launched where there is none."""
    return ensure(plan, job, say=logged, processes=processes)


_as_task: Ensure = stage(run_stage)

Ask = Callable[..., Any]
"""How a function that asks the store is called, with its arguments."""


def directly(function: Callable[..., Any], *given: Any) -> Any:
    """Call it: whoever watches sees a store that is away."""
    return function(*given)


def _in_stage(function: Callable[..., Any], *given: Any) -> Any:
    """Call it as a stage, which waits for a store that is away: a study lasts for nights."""
    return stage(function)(*given)


# -- the cells ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ground:
    """What all cells of a study stand on."""

    source: Ref
    latents: Record
    extractor: Record
    reference: Record


def run_study(
    plan: Plan, name: str, *, seeds: int, do: Ensure = run_stage, ask: Ask = directly
) -> Record:
    """The sealed table of a study; whatever of it is missing is made.

    A training or samples that diverge cost their row its means, and nothing else. Raises
    ConfigError, and DataError where no row is left whole.
    """
    asked_for = studies.study(name)
    source = ask(_source, plan)
    fitting = autoencoder_job(plan, source)
    if not ask(_is_measured, plan, asked_for, source, seeds):
        ask(_check_cells, plan, asked_for, source, fitting)
    autoencoder = do(plan, fitting, 1)
    asked = asked_for.stage(ask(_base, plan, autoencoder), seeds)
    plans = _cells(plan, asked)
    for cell in plans[0]:
        ask(check_trainable, cell, autoencoder, latents_job(plan, source, autoencoder))
    ground = _ground(plan, source, autoencoder, do)
    cells: dict[str, Ref] = {}
    failed: dict[str, str] = {}
    trained: dict[str, Record] = {}
    for k, of_one in enumerate(plans):
        for i, cell in enumerate(of_one):
            logged(f"study {name}: {asked.rows[i].label}, repetition {k + 1} of {seeds}")
            try:
                model, evaluation = _measure(cell, ground, do, ask)
            except DivergedError as error:
                # It is what this row came to; the others can be told all the same.
                failed[study_input(i, k)] = str(error)
                logged(f"study {name}: {asked.rows[i].label} has failed: {error}")
                continue
            cells[study_input(i, k)] = evaluation.ref
            trained[model.digest] = model
    asked = replace(asked, failed=failed)
    record = do(plan, study_job(plan, asked, cells), 1)
    for digest in sorted(trained):
        ask(_index, plan, digest, asked, record)
    return record


class _NotMade(Exception):
    """A job that was never done."""


def _made(plan: Plan, job: Job, _: int) -> Record:
    record = plan.store.record(job.stage, job_digest(job))
    if record is None:
        raise _NotMade
    return record


def _is_measured(plan: Plan, asked_for: Study, source: Ref, seeds: int) -> bool:
    """Whether all cells of a study are sealed, or diverged: then nothing is needed any more."""
    try:
        autoencoder = _made(plan, autoencoder_job(plan, source), 1)
        asked = asked_for.stage(_base(plan, autoencoder), seeds)
        ground = _ground(plan, source, autoencoder, _made)
        for cell in itertools.chain(*_cells(plan, asked)):
            with contextlib.suppress(DivergedError):
                _measure(cell, ground, _made, directly)
    except _NotMade:
        return False
    return True


def _check_cells(plan: Plan, asked_for: Study, source: Ref, fitting: Job) -> None:
    """Check every config before the first hour is spent, with latents as they are foreseen."""
    check_evaluation(plan, source, say=logged)
    foreseen = asked_for.stage(Base(config=plan.config, latent_shape=latent_shape(plan.config)), 1)
    for i in range(len(foreseen.rows)):
        cell = _cell_plan(plan, foreseen, i, 0)
        check_training(cell.config)
        check_counts(cell.config)
        check_foreseen(cell, fitting)


def _source(plan: Plan) -> Ref:
    return source_ref(list_source(plan))


def _ground(plan: Plan, source: Ref, autoencoder: Record, do: Ensure) -> Ground:
    job = to_be_trained_on(plan, latents_job(plan, source, autoencoder))
    latents = do(plan, job, plan.processes)
    extractor = do(plan, extractor_job(plan, source), 1)
    reference = do(plan, reference_job(plan, source, extractor), plan.processes)
    return Ground(source, latents, extractor, reference)


def _base(plan: Plan, autoencoder: Record) -> Base:
    return Base(config=plan.config, latent_shape=latent_spec(autoencoder, plan.store).shape)


def _cells(plan: Plan, asked: StudyStage) -> list[list[Plan]]:
    """The plans of each repetition, one a row."""
    rows = range(len(asked.rows))
    return [[_cell_plan(plan, asked, i, k) for i in rows] for k in range(asked.seeds)]


def _cell_plan(plan: Plan, asked: StudyStage, row: int, repetition: int) -> Plan:
    changes = {**asked.rows[row].changes, **studies.of_seed(plan.config, repetition)}
    return replace(plan, config=with_settings(plan.config, changes))


def _measure(cell: Plan, ground: Ground, do: Ensure, ask: Ask) -> tuple[Record, Record]:
    """The model and the evaluation of a cell. Raises DivergedError."""
    trained = _or_diverged(cell, train_job(cell, ground.latents), do, ask)
    samples = _or_diverged(cell, samples_job(cell, trained, ground.extractor), do, ask)
    job = evaluation_job(cell, ground.source, trained, ground.extractor, samples, ground.reference)
    return trained, do(cell, job, 1)


def _or_diverged(cell: Plan, job: Job, do: Ensure, ask: Ask) -> Record:
    """What a training or sampling made. Raises DivergedError where it ran off, now or before.

    Every other failure (a killed program, a store that is away) says nothing of the row.
    """
    before = ask(divergence, cell.store, job)
    if before is not None:
        key = cell.store.where(divergence_key(job.stage, job_digest(job)))
        logged(f"{job.stage} {job_digest(job)[:12]}: diverged before; delete {key} to try it again")
        raise DivergedError(f"{job.stage}: {before}")
    try:
        return do(cell, job, cell.processes)
    except EqmError as error:
        found = ask(divergence, cell.store, job)
        if found is None:
            raise
        raise DivergedError(f"{job.stage}: {found}") from error


# -- which studies there are of a model ---------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StudyOf:
    """That a study has a model in it."""

    study: str
    seeds: int
    record: Ref


def _folder(train_digest: str) -> str:
    return f"studies/of/{train_digest}/"


def _index(plan: Plan, train_digest: str, asked: StudyStage, record: Record) -> None:
    key = f"{_folder(train_digest)}{asked.study}-{record.digest}.json"
    note = StudyOf(study=asked.study, seeds=asked.seeds, record=record.ref)
    plan.store.write_once(key, note_to_bytes(note))


def sealed_studies(plan: Plan, trained: Record | Ref | None = None) -> dict[str, Ref]:
    """Name -> sealed study that has a model in one of its rows; starts nothing.

    The model is ``trained``, else that of the plan's config. Of several studies of one name the
    one with most repetitions is given. Raises DataError, IntegrityError.
    """
    asked = trained.digest if trained else _train_digest(plan)
    best: dict[str, StudyOf] = {}
    for key in plan.store.list(_folder(asked)):
        found = note_from_bytes(StudyOf, plan.store.read(key), plan.store.where(key))
        open_ref(plan.store, found.record)
        if found.study not in best or found.seeds > best[found.study].seeds:
            best[found.study] = found
    return {name: found.record for name, found in sorted(best.items())}


def _train_digest(plan: Plan) -> str:
    """Address of the model of a plan's config. Raises DataError where its latents are not there."""
    source = _source(plan)
    autoencoder = require_sealed(plan, autoencoder_job(plan, source))
    return job_digest(train_job(plan, require_sealed(plan, latents_job(plan, source, autoencoder))))


# -- its pages ----------------------------------------------------------------------------------


def show(plan: Plan, record: Record) -> Shown:
    """Put the pages of a study into the store; what stands there is what is shown."""
    name = f"{record.config['study']}-{record.digest[:16]}"
    seconds = json.loads(plan.store.get(record.logs["seconds.json"]))
    made = study_page.render(record, seconds, picture=f"{name}.svg")
    keys = {suffix: f"studies/{name}.{suffix}" for suffix in made}
    for suffix, key in keys.items():
        plan.store.write_once(key, made[suffix])
    texts = {suffix: plan.store.read(key) for suffix, key in keys.items()}
    logged(f"study {record.config['study']}: {plan.store.where(keys['md'])}")
    return Shown(record, keys, texts)


def write_pages(plan: Plan, record: Record, folder: Path) -> list[Path]:
    """The same pages as files NAME.md, NAME.svg and NAME.json of a folder. Raises DataError."""
    if not folder.is_dir():
        raise DataError(f"--to is {folder}, which is no folder: make it first")
    name = record.config["study"]
    seconds = json.loads(plan.store.get(record.logs["seconds.json"]))
    made = study_page.render(record, seconds, picture=f"{name}.svg")
    for suffix, text in made.items():
        (folder / f"{name}.{suffix}").write_bytes(text)
    return [folder / f"{name}.{suffix}" for suffix in made]


def tell(plan: Plan, shown: Shown) -> None:
    """Add the pages and numbers to the MLflow run of the model that was studied."""
    record, table = shown.record, table_of(shown.record)
    name = table.study
    first = open_ref(plan.store, record.inputs[min(record.inputs)])
    numbers = {
        f"study/{name}/{i:02d}/{key}": found.value
        for i, row in enumerate(table.rows)
        for key, found in row.metrics.items()
    }
    Registry(plan.mlflow_uri).add_evidence(
        first.inputs["train"].digest,
        metrics=numbers,
        files={f"studies/{name}.{suffix}": text for suffix, text in shown.texts.items()},
    )


@flow(name="study", timeout_seconds=MONTH_SECONDS)
def study(
    name: str,
    config: str | dict[str, Any] = "demo",
    changes: dict[str, Any] | None = None,
    seeds: int = 3,
) -> dict[str, str]:
    """Run a study of a config; sealed cells are verified and skipped."""
    plan = open_plan(config, changes)
    record = run_study(plan, name, seeds=seeds, do=_as_task, ask=_in_stage)
    shown = _in_stage(show, plan, record)
    _in_stage(tell, plan, shown)
    page(f"study-{name}", shown.texts["md"].decode(), f"Study: {name}")
    return answer(shown, plan)


def answer(shown: Shown, plan: Plan) -> dict[str, str]:
    """What is told of a study: its digest, and where its page lies."""
    return {"study": shown.record.digest, "page": plan.store.where(shown.keys["md"])}
