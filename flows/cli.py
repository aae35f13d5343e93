"""The ``eqm`` command: services, stages, samples, promotion.

Everything heavy is imported by the command that needs it, so that ``eqm --help`` answers at once.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from eqm.words import counted
from flows import curves, data, imports, models, recovery, reports, samples, study_command
from flows.options import ConfigArgument, SetOption, changes_of
from flows.terminal import any_encoding, show
from flows.terminal import table as table_of

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train generative models with Equilibrium Matching: latents, training, registry, "
    "evaluation, promotion.\n\nFirst steps: `eqm up`, then `eqm pipeline demo`.",
)
out = Console()
err = Console(stderr=True)

STORY = "From images to a decision"
CHAMPION = "The champion"
MODELS = "A model in hand"
MADE = "What was made, and what could be"
SERVICES = "Services and this machine"

PolicyOption = Annotated[
    Path | None,
    typer.Option("--policy", help="A policy file of its own (docs/policy.toml) to judge by."),
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Check the config, print it whole as JSON, and start nothing."),
]


def run() -> None:
    """Entry point: errors that a person can mend are one message and exit status 2."""
    from eqm.errors import EqmError
    from eqm.memory import keep_freed

    any_encoding()
    keep_freed()
    try:
        app()
    except EqmError as error:
        err.print(f"[bold red]error:[/] {_plain(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        _told_disk_error(error)


def _told_disk_error(error: OSError) -> None:
    """A full disk or a folder without rights is one message too; other OSErrors are defects."""
    from eqm.disk import disk_errors
    from eqm.errors import EqmError

    try:
        # Where it was to be put, rather than what was written aside for it.
        with disk_errors(str(error.filename2 or error.filename or "this machine")):
            raise error
    except EqmError as told:
        err.print(f"[bold red]error:[/] {_plain(str(told))}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


# -- services -----------------------------------------------------------------------------------


@app.command(rich_help_panel=SERVICES)
def up() -> None:
    """Start the embedded S3, MLflow and Prefect on this machine; keeps what runs already."""
    from flows.settings import start_services

    stack = start_services(report=_say)
    _links(stack)


@app.command(rich_help_panel=SERVICES)
def down() -> None:
    """Stop the embedded services; data is kept."""
    from flows.settings import current_home
    from infra import local

    local.down(current_home(), report=_say)


@app.command(rich_help_panel=SERVICES)
def status() -> None:
    """Show services, and the champion of every model."""
    from flows.settings import current_home, given_from_outside
    from infra import local

    table = table_of("service", "state", "address")
    services = local.status(current_home(), given_from_outside())
    for service in services:
        table.add_row(service.name, service.state, service.address)
    show(table, out)
    if any(service.state == "full" for service in services):
        _say(local.shortage(current_home()) or "")
    _champions()


def _champions() -> None:
    from eqm import champion
    from eqm.errors import EqmError
    from flows.plan import store_of
    from flows.settings import activate

    try:
        store = store_of(activate())
        models = [place.removeprefix("history/") for place in store.folders("history/")]
    except EqmError as error:
        out.print(f"champions: unknown ({_plain(str(error))})", soft_wrap=True)
        return
    for model in models:
        moves = champion.history(store, model)
        if standing := champion.lineage(moves):
            # A rollback made champion again what was promoted long before.
            since = moves[-1].at
            out.print(f"{model}: version {standing[-1].version} is champion since {since}")
    if not models:
        out.print("no champion yet")


@app.command(rich_help_panel=SERVICES)
def env() -> None:
    """Print the environment of the services, for `eval "$(eqm env)"`. Shows the S3 secret."""
    import os
    import shlex

    from flows.settings import current_settings

    settings = current_settings()
    for name, value in settings.service_environment().items():
        sys.stdout.write(f"export {name}={shlex.quote(value)}\n")
    programs = str(Path(sys.executable).parent)
    if programs not in settings.environ.get("PATH", "").split(os.pathsep):
        # `mlflow` and `prefect` of this installation, and the `uvicorn` that `mlflow models serve`
        # looks for there.
        sys.stdout.write(f'export PATH={shlex.quote(programs)}:"$PATH"\n')


@app.command(rich_help_panel=SERVICES)
def doctor() -> None:
    """Check this machine: what is there, what is missing and how to get it."""
    from flows.doctor import examine

    table = table_of("", "what", "found", "remedy")
    findings = list(examine())
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else "[red]no[/]" if finding.needed else "[yellow]--[/]"
        table.add_row(mark, finding.what, _plain(finding.found), _remedy(finding))
    show(table, out)
    if any(not finding.ok and finding.needed for finding in findings):
        raise typer.Exit(1)


def _remedy(finding: Any) -> str:
    return "" if finding.ok else _plain(finding.remedy)


# -- the story ----------------------------------------------------------------------------------


@app.command(rich_help_panel=STORY)
def pipeline(
    config: ConfigArgument = "demo",
    set_: SetOption = None,
    policy: PolicyOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Run all stages: images to decision. Sealed stages are verified and skipped."""
    result = _flow("flows.pipeline", "pipeline", config, _with(set_, policy), dry_run)
    if result:
        _summary(result)


@app.command(rich_help_panel=STORY)
def encode(
    config: ConfigArgument = "demo", set_: SetOption = None, dry_run: DryRunOption = False
) -> None:
    """Encode images into sealed shards of latents."""
    _said("latents", _flow("flows.encode", "encode", config, set_, dry_run))


@app.command(rich_help_panel=STORY)
def train(
    config: ConfigArgument = "demo", set_: SetOption = None, dry_run: DryRunOption = False
) -> None:
    """Train and register a model; goes on from the newest checkpoint."""
    _said("model", _flow("flows.train", "train", config, set_, dry_run))


@app.command(rich_help_panel=STORY)
def evaluate(
    config: ConfigArgument = "demo",
    set_: SetOption = None,
    policy: PolicyOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Generate samples, measure, judge and report; promotes nothing."""
    _said("report", _flow("flows.evaluate", "evaluate", config, _with(set_, policy), dry_run))


@app.command(rich_help_panel=STORY)
def promote(
    config: ConfigArgument = "demo",
    set_: SetOption = None,
    policy: PolicyOption = None,
    dry_run: DryRunOption = False,
    despite_rollback: Annotated[
        bool, typer.Option("--despite-rollback", help="Also a model that was rolled back.")
    ] = False,
    evaluation: Annotated[
        str | None,
        typer.Option(
            metavar="DIGITS",
            help="Judge this one, by the first digits of its digest, and not that of the config: "
            "of a model that weekly trained.",
        ),
    ] = None,
) -> None:
    """Judge the evaluated model; make it champion if the policy is met."""
    more = {"despite_rollback": despite_rollback, "evaluation": evaluation}
    promoted = _flow("flows.promote", "promote", config, _with(set_, policy), dry_run, **more)
    if promoted is not None:
        out.print("champion" if promoted else "not promoted: the reasons are above")
        raise typer.Exit(0 if promoted else 1)


@app.command(rich_help_panel=CHAMPION)
def rollback(config: ConfigArgument = "demo", set_: SetOption = None) -> None:
    """Make the champion before this one champion again."""
    version = _flow("flows.promote", "rollback", config, set_, False)
    _said("champion", f"version {version}")


@app.command(rich_help_panel=CHAMPION)
def history(
    config: ConfigArgument = "demo",
    set_: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Set alias and tags in MLflow again from the history.")
    ] = False,
) -> None:
    """Show every move of the champion, and verify the chain and its evidence."""
    from eqm import champion
    from eqm.records import to_json
    from eqm.registry import Registry
    from flows.plan import make_plan

    _prepare()
    plan = make_plan(config, changes_of(set_), tracked=repair)
    found = champion.examine(plan.store, plan.model_name)
    faults = list(found.faults)
    for entry in found.entries:
        faults += champion.missing_evidence(plan.store, entry)
    told: list[str] = []
    if repair:
        registry = Registry(plan.mlflow_uri)
        told = champion.repair(plan.store, registry, plan.model_name, every=True)
    if as_json:
        entries = [
            {**to_json(entry), "sha256": key}
            for entry, key in zip(found.entries, found.digests, strict=True)
        ]
        whole = {"model": plan.model_name, "entries": entries, "faults": faults, "repaired": told}
        sys.stdout.write(json.dumps(whole, indent=1) + "\n")
    else:
        _show_history(plan.model_name, found.entries, faults, told)
    if faults:
        raise typer.Exit(1)


def _show_history(model: str, entries: list[Any], faults: list[str], told: list[str]) -> None:
    table = table_of("move", "when", "what", "version", "evaluation", "by", "revision")
    for entry in entries:
        by, revision = (entry.provenance.get(name) or "" for name in ("by", "git_revision"))
        words = (str(entry.number), entry.at, entry.action, str(entry.version))
        table.add_row(*words, entry.evaluation.digest[:12], _plain(str(by)), str(revision)[:12])
    if entries:
        show(table, out)
    for line in told:
        out.print(f"repaired: {_plain(line)}", soft_wrap=True)
    for fault in faults:
        err.print(f"[bold red]broken:[/] {_plain(fault)}", highlight=False, soft_wrap=True)
    if not faults:
        whole = "the chain is whole and its evidence is there" if entries else "no champion yet"
        out.print(f"{model}: {counted(len(entries), 'move')}; {whole}", soft_wrap=True)


@app.command("clean", rich_help_panel=SERVICES)
def clean_command(
    older_than: Annotated[
        str, typer.Option("--older-than", help="Only what is older: 36h, 30d, 4w; a day at least.")
    ] = "30d",
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete it; without this it is only listed.")
    ] = False,
) -> None:
    """List what nothing in the store names any more; delete it with --delete."""
    import datetime

    _prepare()
    from eqm import clean
    from flows.plan import store_of
    from flows.settings import current_settings

    seconds = clean.seconds_of(older_than)
    store = store_of(current_settings())
    work = clean.sweep if delete else clean.survey
    found = work(store, older_than_seconds=seconds, now=datetime.datetime.now(datetime.UTC))
    for key in found.keys:
        out.print(key, highlight=False, soft_wrap=True)
    for line in found.lines():
        out.print(line, highlight=False)
    verb = "deleted" if delete else "could be deleted: `eqm clean --delete` does it"
    out.print(f"{counted(len(found.keys), 'object')} {verb}")


# -- recipes ------------------------------------------------------------------------------------


@app.command("recipes", rich_help_panel=MADE)
def show_recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this one as a config file: NAME > config.toml.")
    ] = None,
) -> None:
    """List whole configs, the paper's among them, with what to expect of each."""
    from eqm import recipes

    if name is not None:
        sys.stdout.write(recipes.to_toml(recipes.recipe(name)))
        return
    table = table_of("recipe", "model", "parameters", "images", "what to expect")
    for one in recipes.recipes().values():
        count, images = f"{one.parameters:,}", f"{one.config.train.images:,}"
        table.add_row(one.name, one.title, count, images, one.expected)
    show(table, out)
    out.print("What each costs: docs/recipes.md")


# -- commands of modules of their own -----------------------------------------------------------

app.add_typer(reports.app, name="report", rich_help_panel=CHAMPION)
for command in (models.sample, models.serve, models.ema):
    app.command(rich_help_panel=MODELS)(command)
app.command("import-official", rich_help_panel=MODELS)(models.import_official)
app.command("export-official", rich_help_panel=MODELS)(models.export_official)
app.add_typer(data.app, name="data", rich_help_panel=MADE)
app.add_typer(samples.app, name="samples", rich_help_panel=MADE)
app.command("curves", rich_help_panel=MADE)(curves.curves)
app.command("study", rich_help_panel=MADE)(study_command.run_study)
app.command("import-reference", rich_help_panel=MADE)(imports.import_reference)
for command in (recovery.backup, recovery.restore, recovery.secrets):
    app.command(rich_help_panel=SERVICES)(command)


# -- helpers ------------------------------------------------------------------------------------


def _with(settings: list[str] | None, policy: Path | None) -> list[str]:
    """Settings of --set, with the policy file as one of them; a path is a JSON string."""
    given = [] if policy is None else [f"policy={json.dumps(str(policy.absolute()))}"]
    return [*given, *(settings or [])]


def _prepare() -> None:
    """Point this process at the services before any of their clients is imported."""
    from flows.settings import activate

    activate()


def _flow(
    module: str,
    name: str,
    config: str,
    settings: list[str] | None,
    dry_run: bool,
    /,
    **more: Any,
) -> Any:
    """Run a flow here, in this process; None for a dry run."""
    from eqm.records import to_json
    from flows.plan import read_config

    changes = changes_of(settings)
    if dry_run:
        from flows.checks import check_config, check_counts
        from flows.settings import current_settings

        checked = read_config(config, changes)
        check_config(checked, current_settings())
        if name in ("pipeline", "evaluate", "promote"):
            check_counts(checked)
        out.print_json(data=to_json(checked))
        return None
    from flows.calling import run_flow

    return run_flow(module, name, config, changes, **more)


def _said(what: str, result: Any) -> None:
    if result is not None:
        out.print(f"{what}: {result}", soft_wrap=True)


def _say(line: str) -> None:
    err.print(line, highlight=False, soft_wrap=True)


def _summary(result: dict[str, Any]) -> None:
    verdict = "champion" if result["promoted"] else "not promoted: the report says why"
    out.print(f"\n{result['model']} version {result['version']}: {verdict}")
    out.print(f"report   {Path(result['report']).resolve().as_uri()}", soft_wrap=True)
    if result["run_page"]:
        out.print(f"MLflow   {result['run_page']}", soft_wrap=True)
    from flows.settings import current_settings

    out.print(f"Prefect  {current_settings().prefect_ui}", soft_wrap=True)


def _links(stack: Any) -> None:
    out.print(f"S3       {stack.s3_endpoint}")
    out.print(f"MLflow   {stack.mlflow_uri}")
    secrets = stack.home / "credentials.json"
    hint = f"  (its pages ask for prefect_auth in {secrets})" if stack.prefect_auth else ""
    out.print(f"Prefect  {stack.prefect_ui_url}{hint}", soft_wrap=True)


if __name__ == "__main__":
    run()
