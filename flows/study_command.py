"""``eqm study``: list the studies, show the rows of one, run it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from eqm.words import counted
from flows.options import changes_of
from flows.terminal import show
from flows.terminal import table as table_of

if TYPE_CHECKING:
    from eqm.config import PipelineConfig
    from eqm.studies import Study

out = Console()


def run_study(
    name: Annotated[
        str | None, typer.Argument(help="Which one; without it all are listed.")
    ] = None,
    config: Annotated[
        str, typer.Option(help="A preset, one of `eqm recipes`, or a TOML file.")
    ] = "demo",
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Repetitions of each row.")] = 3,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one setting: --set generate.samples=500. Repeatable."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check and print what each row changes, and start nothing."),
    ] = False,
    here: Annotated[
        bool, typer.Option("--here", help="Without Prefect and MLflow: any store serves.")
    ] = False,
    to: Annotated[
        Path | None, typer.Option(help="Folder for its page, picture and JSON as well.")
    ] = None,
) -> None:
    """Run a table of the paper as a protocol. What is sealed of it is verified and skipped."""
    if name is None:
        _list()
        return
    from eqm import studies
    from eqm.errors import ConfigError
    from flows.plan import read_config

    asked, changes = studies.study(name), changes_of(set_)
    base = read_config(config, changes)
    if dry_run:
        for line in _rehearsed(asked, base, seeds):
            out.print(line, soft_wrap=True, highlight=False, markup=False)
        return
    if to is not None and not to.is_dir():
        raise ConfigError(f"--to is {to}, which is no folder: make it first")
    made = _run(name, config, changes, seeds, here)
    out.print(f"study: {made['page']}", soft_wrap=True)
    if to is not None:
        _copy(config, changes, made["study"], to)


def _rehearsed(asked: "Study", base: "PipelineConfig", seeds: int) -> Iterator[str]:
    """What each row changes, and how much there is to do. Raises ConfigError for a wrong row."""
    from eqm import studies
    from eqm.config import with_settings
    from eqm.recipes import latent_shape
    from eqm.records import digest
    from flows.checks import check_config, check_counts, check_training
    from flows.settings import current_settings

    check_config(base, current_settings())
    # What a latent measures is known for sure when images are encoded.
    stage = asked.stage(studies.Base(config=base, latent_shape=latent_shape(base)), seeds)
    cells = [with_settings(base, row.changes) for row in stage.rows]
    for cell in cells:
        check_training(cell)
        check_counts(cell)
    yield from (f"{row.label}: {json.dumps(row.changes)}" for row in stage.rows)
    trained = {digest((cell.network, cell.objective, cell.train)) for cell in cells}
    yield (
        f"with {counted(seeds, 'repetition')}: {counted(seeds * len(trained), 'training')} of "
        f"{base.train.images:,} images, {counted(seeds * len(cells), 'time')} "
        f"{base.generate.samples:,} samples"
    )


def _list() -> None:
    from eqm import studies

    table = table_of("study", "asks")
    for one in studies.studies().values():
        table.add_row(one.name, one.asks)
    show(table, out)


def _run(name: str, config: str, changes: dict[str, Any], seeds: int, here: bool) -> dict[str, str]:
    from flows.calling import run_flow
    from flows.settings import activate

    if not here:
        asked = {"name": name, "seeds": seeds}
        return run_flow("flows.study", "study", config, changes, **asked)
    activate()
    from flows import study
    from flows.plan import make_plan

    plan = make_plan(config, changes, tracked=False)
    return study.answer(study.show(plan, study.run_study(plan, name, seeds=seeds)), plan)


def _copy(config: str, changes: dict[str, Any], digest: str, to: Path) -> None:
    from eqm.errors import DataError
    from flows import study
    from flows.plan import make_plan

    plan = make_plan(config, changes, tracked=False)
    record = plan.store.record("study", digest)
    if record is None:
        raise DataError(f"study {digest[:12]} is gone from {plan.store.uri}: run it again")
    for path in study.write_pages(plan, record, to):
        out.print(str(path), soft_wrap=True)
