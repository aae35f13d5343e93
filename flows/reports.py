"""``eqm report``: fetch the report of the champion, and verify any report there is.

What is verified is the business of eqm.verification; here is how it is asked and answered.
"""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from flows.addresses import sealed_digests, store_at
from flows.options import ConfigArgument, SetOption, changes_of, check_file

FETCH = "fetch"
ADDRESS = re.compile(
    r"(?P<store>.+)/(?P<key>(?P<stage>reports|evaluation)/(?P<digest>[0-9a-f]{64})(?:/(?P<name>[^/]+))?)"
)
"""What `eqm evaluate` prints of a report, and the address of an evaluation."""
MOST_DIFFERENCES = 12
"""Of a check, that are shown to people; --json gives all."""


class FetchUnlessNamed(TyperGroup):
    """``eqm report demo`` is ``eqm report fetch demo``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command in where none is named."""
        if not args or (args[0] not in self.commands and args[0] not in ("--help", "-h")):
            args = [FETCH, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=FetchUnlessNamed,
    help="Fetch the report on which the champion was promoted, or verify a report.",
)
out = Console()
err = Console(stderr=True)


@app.command(FETCH)
def fetch(
    config: ConfigArgument = "demo",
    set_: SetOption = None,
    to: Annotated[Path, typer.Option(help="File to write; .json gives the numbers.")] = Path(
        "report.html"
    ),
) -> None:
    """Fetch the report on which the champion was promoted."""
    from eqm.verification import stored_report

    check_file("--to", to)
    plan, standing = _champion(config, set_)
    report = stored_report(plan.store, standing.report)
    to.write_bytes(report.data if to.suffix == ".json" else report.page)
    out.print(f"{plan.model_name} version {standing.version}: {to}", soft_wrap=True)


@app.command()
def verify(
    report: Annotated[
        str,
        typer.Argument(
            metavar="REPORT",
            help="A config (its champion's report), an evaluation (first digits of its digest, or "
            "its address), or a report (a .json or .html file, or its address).",
        ),
    ] = "demo",
    set_: SetOption = None,
    seeds: Annotated[int, typer.Option(min=0, help="Samples to make again.")] = 4,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Make them in their whole batches: equal to the last bit."),
    ] = False,
    source_uri: Annotated[
        str | None, typer.Option(help="Where the images lie, unless a config says it.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="All differences, as JSON.")] = False,
) -> None:
    """Compute a report again from what is sealed; exit status 1 if anything differs."""
    from eqm.config import Runtime
    from eqm.verification import stored_as, stored_report, stored_reports
    from eqm.verification import verify as checks_of

    checks = []
    if (found := _by_address(report)) is not None:
        store, evaluation, reports = found
    elif Path(report).suffix in (".json", ".html"):
        store = _store()
        evaluation, stored, check = stored_as(store, Path(report))
        checks, reports = [check], [stored]
    elif re.fullmatch("[0-9a-f]{4,64}", report):
        store = _store()
        evaluation = _whole_digest(store, report)
        reports = stored_reports(store, evaluation)
    else:
        plan, standing = _champion(report, set_)
        store, evaluation = plan.store, standing.evaluation.digest
        reports = [stored_report(store, standing.report)]
        source_uri = source_uri or plan.config.source_uri
    runtime = Runtime(store=store.uri, source_uri=source_uri, device=device)
    checks += checks_of(store, evaluation, runtime, reports=reports, seeds=seeds, exact=exact)
    passed = all(check.passed for check in checks)
    _tell_json(checks, passed) if as_json else _tell(checks, passed)
    raise typer.Exit(0 if passed else 1)


def _champion(config: str, settings: list[str] | None) -> Any:
    """Plan of a config, and its standing champion. Raises DataError before the first."""
    from eqm import champion
    from eqm.errors import DataError
    from flows.plan import make_plan
    from flows.settings import activate

    activate()
    plan = make_plan(config, changes_of(settings), tracked=False)
    standing = champion.current(plan.store, plan.model_name)
    if standing is None:
        raise DataError(f"{plan.model_name} has no champion yet: run `eqm pipeline` first")
    return plan, standing


def _by_address(report: str) -> tuple[Any, str, list[Any]] | None:
    """Store, evaluation and reports of an address in a store; None for what is none.

    Nor is a file in a folder of reports that somebody copied. Raises DataError for what is not
    sealed there.
    """
    from eqm.errors import DataError
    from eqm.verification import stored_report, stored_reports

    found = ADDRESS.fullmatch(report.rstrip("/"))
    if found is None:
        return None
    store, evaluation = store_at(found["store"]), found["digest"]
    if store.exists(f"evaluation/{evaluation}/record.json"):
        if found["stage"] == "reports" and found["name"]:
            return store, evaluation, [stored_report(store, found["key"])]
        return store, evaluation, stored_reports(store, evaluation)
    if Path(report).is_file():
        return None
    raise DataError(f"{report}: no such evaluation is sealed in {store.uri}")


def _store() -> Any:
    from flows.plan import store_of
    from flows.settings import activate

    return store_of(activate())


def _whole_digest(store: Any, digits: str) -> str:
    """The one evaluation whose digest begins so. Raises DataError."""
    from eqm.errors import DataError

    found = sealed_digests(store, "evaluation", digits)
    if not found:
        raise DataError(
            f"no evaluation in {store.uri} begins with {digits}: "
            "`eqm history` shows those of champions"
        )
    if len(found) > 1:
        raise DataError(
            f"{len(found)} evaluations in {store.uri} begin with {digits}: give more of its digits"
        )
    return found[0]


def _tell(checks: list[Any], passed: bool) -> None:
    from eqm.discrepancies import told

    for check in checks:
        mark = "[green]pass   [/]" if check.passed else "[bold red]differs[/]"
        out.print(f"{mark} {check.name:<9}{escape(check.text)}", highlight=False, soft_wrap=True)
        for line in told(check.differences, MOST_DIFFERENCES):
            out.print(f"          {escape(line)}", highlight=False, soft_wrap=True)
    meaning = "something differs: docs/reports.md says what it may mean"
    out.print("nothing differs" if passed else meaning)


def _tell_json(checks: list[Any], passed: bool) -> None:
    from eqm.records import to_json

    body = [{"passed": check.passed, **to_json(check)} for check in checks]
    sys.stdout.write(json.dumps({"passed": passed, "checks": body}, indent=1) + "\n")
