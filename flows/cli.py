"""The ``eqm`` command: services, stages, samples, promotion.

Everything heavy is imported by the command that needs it, so that ``eqm --help`` answers at once.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from flows import curves, data, imports, recovery, reports, samples, study_command
from flows.options import ConfigArgument, SetOption, check_folder
from flows.terminal import any_encoding, show
from flows.terminal import table as table_of

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train generative models with Equilibrium Matching: latents, training, registry, "
    "evaluation, promotion.\n\nFirst steps: `eqm up`, then `eqm pipeline demo`.",
)
app.add_typer(data.app, name="data")
app.add_typer(samples.app, name="samples")
app.add_typer(reports.app, name="report")
app.command("study")(study_command.run_study)
app.command("curves")(curves.curves)
app.command("import-reference")(imports.import_reference)
out = Console()
err = Console(stderr=True)

PolicyOption = Annotated[
    Path | None,
    typer.Option("--policy", help="A policy file of its own (docs/policy.toml) to judge by."),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved config as JSON and start nothing.")
]


def run() -> None:
    """Entry point: errors that a person can mend are one message and exit status 2."""
    from eqm.errors import EqmError

    any_encoding()
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


@app.command()
def up() -> None:
    """Start the embedded S3, MLflow and Prefect on this machine; keeps what runs already."""
    from flows.settings import start_services

    stack = start_services(report=_say)
    _links(stack)


@app.command()
def down() -> None:
    """Stop the embedded services; data is kept."""
    from flows.settings import current_home
    from infra import local

    local.down(current_home(), report=_say)


@app.command()
def status() -> None:
    """Show services, and the champion of every model."""
    from flows.settings import current_home
    from infra import local

    table = table_of("service", "state", "address")
    for service in local.status(current_home()):
        table.add_row(service.name, service.state, service.address)
    show(table, out)
    _champions()


def _champions() -> None:
    from eqm import champion
    from eqm.errors import EqmError
    from flows.plan import store_of
    from flows.settings import activate

    try:
        store = store_of(activate())
        models = sorted({key.split("/")[1] for key in store.list("history/")})
    except EqmError as error:
        out.print(f"champions: unknown ({_plain(str(error))})", soft_wrap=True)
        return
    for model in models:
        standing = champion.current(store, model)
        if standing is not None:
            out.print(f"{model}: version {standing.version} is champion since {standing.at}")
    if not models:
        out.print("no champion yet")


@app.command()
def env() -> None:
    """Print the environment of the services, for `eval "$(eqm env)"`. Shows the S3 secret."""
    import shlex

    from flows.settings import current_settings

    for name, value in current_settings().service_environment().items():
        sys.stdout.write(f"export {name}={shlex.quote(value)}\n")


app.command()(recovery.backup)
app.command()(recovery.restore)
app.command()(recovery.secrets)


@app.command()
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


@app.command()
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


@app.command()
def encode(
    config: ConfigArgument = "demo", set_: SetOption = None, dry_run: DryRunOption = False
) -> None:
    """Encode images into sealed shards of latents."""
    _said("latents", _flow("flows.encode", "encode", config, set_, dry_run))


@app.command()
def train(
    config: ConfigArgument = "demo", set_: SetOption = None, dry_run: DryRunOption = False
) -> None:
    """Train and register a model; goes on from the newest checkpoint."""
    _said("model", _flow("flows.train", "train", config, set_, dry_run))


@app.command()
def evaluate(
    config: ConfigArgument = "demo",
    set_: SetOption = None,
    policy: PolicyOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Generate samples, measure, judge and report; promotes nothing."""
    _said("report", _flow("flows.evaluate", "evaluate", config, _with(set_, policy), dry_run))


@app.command()
def promote(
    config: ConfigArgument = "demo",
    set_: SetOption = None,
    policy: PolicyOption = None,
    dry_run: DryRunOption = False,
    despite_rollback: Annotated[
        bool, typer.Option("--despite-rollback", help="Also a model that was rolled back.")
    ] = False,
) -> None:
    """Judge the evaluated model; make it champion if the policy is met."""
    more = {"despite_rollback": despite_rollback}
    promoted = _flow("flows.promote", "promote", config, _with(set_, policy), dry_run, **more)
    if promoted is not None:
        out.print("champion" if promoted else "not promoted: the reasons are above")
        raise typer.Exit(0 if promoted else 1)


@app.command()
def rollback(config: ConfigArgument = "demo", set_: SetOption = None) -> None:
    """Make the champion before this one champion again."""
    version = _flow("flows.promote", "rollback", config, set_, False)
    _said("champion", f"version {version}")


@app.command()
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
        out.print(f"{model}: {len(entries)} moves; {whole}", soft_wrap=True)


@app.command()
def sample(
    model: Annotated[
        str, typer.Argument(help="models:/NAME@ALIAS, a sealed train record, or a directory.")
    ] = "models:/eqm-digits@champion",
    labels: Annotated[
        str | None, typer.Option(help="Class numbers, as 0,1,2 or 0-9; all unless given.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds for each label, as 0-7.")] = "0-7",
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is none.")] = 1.0,
    updates: Annotated[int, typer.Option(min=1, help="Descent updates.")] = 249,
    step_size: Annotated[float, typer.Option(min=1e-9, help="Descent step size.")] = 0.003,
    momentum: Annotated[float, typer.Option(min=0, max=0.999, help="NAG momentum.")] = 0.3,
    to: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("samples.png"),
) -> None:
    """Draw a grid of samples: one row a label, one column a seed."""
    _prepare()
    import eqm
    from eqm.figures import sample_grid
    from flows.settings import current_settings

    columns = _numbers("seeds", seeds)
    asked = None if labels is None else _numbers("labels", labels)
    check_folder("--to", to)
    loaded = eqm.load(model, mlflow_uri=current_settings().mlflow_uri)
    rows, names = _rows(loaded.spec.classes, asked)
    _ = loaded.autoencoder  # a model that came without one is told before its descent, not after
    found = eqm.sample(
        loaded,
        labels=[k for k in rows for _ in columns] if loaded.spec.classes else None,
        # Seeds differ between rows too, or rows would share their noise.
        seeds=[s * max(1, len(loaded.spec.classes)) + k for k in rows for s in columns],
        rule=eqm.NAG(step_size=step_size, momentum=momentum),
        updates=updates,
        guidance=guidance,
    )
    images = found.images().cpu().numpy()
    grid = images.reshape(len(rows), len(columns), *images.shape[1:])
    to.write_bytes(sample_grid(grid, names, scale=max(1, 64 // images.shape[-1])))
    cost = float(found.evaluations.double().mean())
    out.print(f"{to}: {len(images)} samples, {cost:.0f} field evaluations each")


@app.command()
def serve(
    model: Annotated[
        str, typer.Argument(help="models:/NAME@ALIAS or a sealed train record.")
    ] = "models:/eqm-digits@champion",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5001,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with a token that every call must bring; needed off loopback."),
    ] = None,
    updates: Annotated[int, typer.Option(min=1, help="Descent updates.")] = 249,
    step_size: Annotated[float, typer.Option(min=1e-9, help="Descent step size.")] = 0.003,
) -> None:
    """Answer calls with images for labels and seeds, as MLflow's scoring server does."""
    _prepare()
    import uvicorn

    from eqm.config import SamplerConfig
    from eqm.serving import application
    from flows.settings import current_settings

    token = _token(host, token_file)
    _refuse_taken(host, port)
    settings = current_settings()
    served = application(
        model,
        SamplerConfig(updates=updates, step_size=step_size),
        token=token,
        mlflow_uri=settings.mlflow_uri,
        cache=settings.home / "cache",
    )
    _say(f"{model}: POST http://{host}:{port}/invocations")
    uvicorn.run(served, host=host, port=port, log_level="warning")


def _refuse_taken(host: str, port: int) -> None:
    """Tell that nothing can listen there before a model is loaded for it. Raises ConfigError."""
    import socket

    from eqm.errors import ConfigError

    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise ConfigError(
            f"--port is {port} and --host {host}, where this program cannot listen "
            f"({error.strerror}): give another --port, or end what listens there"
        ) from error


def _token(host: str, file: Path | None) -> str | None:
    """The token that calls must bring; None on loopback without a file. Raises ConfigError."""
    from eqm.errors import ConfigError

    if file is None:
        if host in ("127.0.0.1", "::1", "localhost"):
            return None
        raise ConfigError(
            f"--host is {host!r}, where others can call: give --token-file, or serve on 127.0.0.1 "
            "behind something that asks who calls"
        )
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {file} cannot be read: {error}") from error
    if len(token) < 16:
        raise ConfigError(f"--token-file {file} holds fewer than 16 characters: make it longer")
    return token


def _rows(classes: tuple[str, ...], asked: list[int] | None) -> tuple[list[int], list[str]]:
    """Rows of the grid and their names; a model without labels has one. Raises ConfigError."""
    from eqm.errors import ConfigError

    if not classes:
        if asked is not None:
            raise ConfigError("--labels is given, and this model has no labels: leave it out")
        return [0], [""]
    rows = list(range(len(classes))) if asked is None else asked
    if max(rows) >= len(classes):
        raise ConfigError(f"--labels asks for {max(rows)}; this model has 0 to {len(classes) - 1}")
    return rows, [classes[k] for k in rows]


@app.command()
def ema(
    model: Annotated[
        str, typer.Argument(help="models:/NAME@ALIAS or a sealed train record (train.ema_power).")
    ],
    sigma_rel: Annotated[
        float, typer.Option(help="Length of the average, in shares of the images seen, as 0.08.")
    ],
    to: Annotated[Path, typer.Option(help="Directory to make; eqm.load reads it.")],
    images: Annotated[
        int | None, typer.Option(help="The average as it stood after so many; all unless given.")
    ] = None,
    max_error: Annotated[
        float, typer.Option(help="Refuse a greater relative error than this one.")
    ] = 0.05,
) -> None:
    """Average weights over another length, after training: from the snapshots it left."""
    _prepare()
    from eqm.errors import ConfigError
    from eqm.model import reconstructed
    from flows.settings import current_settings

    if to.exists():
        raise ConfigError(f"--to is {to}, which exists: name a directory that does not")
    made, plan = reconstructed(
        model,
        sigma_rel=sigma_rel,
        images_seen=images,
        maximum_error=max_error,
        mlflow_uri=current_settings().mlflow_uri,
    )
    made.save(to)
    out.print(
        f"{to}: weights averaged over sigma_rel {sigma_rel:g} at image {plan.images_seen:,}, "
        f"expected relative error {plan.expected_error:.1e}",
        soft_wrap=True,
    )


@app.command("clean")
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
    out.print(f"{len(found.keys)} objects {verb}")


# -- recipes ------------------------------------------------------------------------------------


@app.command("recipes")
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


# -- checkpoints of the official code -----------------------------------------------------------


@app.command("import-official")
def import_official(
    checkpoint: Annotated[Path, typer.Argument(help="A .pt file of the official code, or a SiT.")],
    to: Annotated[Path, typer.Option(help="Directory to make; eqm.load reads it.")],
    weights: Annotated[str, typer.Option(help="ema or raw.")] = "ema",
    energy: Annotated[str, typer.Option(help="implicit, dot or l2: no file says it.")] = "implicit",
    num_heads: Annotated[
        int | None, typer.Option(help="For widths other than 384, 768, 1024, 1152.")
    ] = None,
    flow_matching: Annotated[
        bool, typer.Option("--flow-matching", help="The weights are of a SiT.")
    ] = False,
    autoencoder: Annotated[
        str | None,
        typer.Option(help="Folder of SD-VAE as diffusers wrote it, to be kept with the model."),
    ] = None,
) -> None:
    """Turn a checkpoint of the official code into a model directory. Runs no code in it."""
    import eqm
    from eqm.errors import ConfigError

    if checkpoint.suffix.lower() != ".pt":
        raise ConfigError(f"{checkpoint} is no .pt file of the official code")
    if to.exists():
        raise ConfigError(f"--to is {to}, which exists: name a directory that does not")
    if energy not in ("implicit", "dot", "l2"):
        raise ConfigError(f"--energy is {energy!r}; it must be implicit, dot or l2")
    model = eqm.load(
        checkpoint,
        weights=weights,
        energy=energy,  # type: ignore[arg-type]
        num_heads=num_heads,
        flow_matching=flow_matching,
        autoencoder=autoencoder,
        device="cpu",
    )
    model.save(to)
    shape, classes = model.spec.latent.shape, len(model.spec.classes)
    out.print(f"{to}: {_size(model)}, latents {shape}, {classes} classes", soft_wrap=True)


@app.command("export-official")
def export_official(
    model: Annotated[
        str, typer.Argument(help="models:/NAME@ALIAS, a sealed train record, or a directory.")
    ],
    to: Annotated[Path, typer.Option(help=".pt file to write.")],
) -> None:
    """Write averaged weights as a .pt file that the official code loads, with its sign."""
    _prepare()
    import eqm
    from eqm.errors import ConfigError
    from eqm.official import to_official, write_official
    from flows.settings import current_settings

    if to.suffix.lower() != ".pt":
        raise ConfigError(f"--to is {to}; the official code loads .pt files: name it so")
    loaded = eqm.load(model, mlflow_uri=current_settings().mlflow_uri, device="cpu")
    write_official(to, to_official(loaded.network))
    out.print(f"{to}: {_size(loaded)}. Heads are in no file: remember them", soft_wrap=True)


def _size(model: Any) -> str:
    network = model.spec.network
    return (
        f"width {network.width}, depth {network.depth}, {network.heads} heads, patch "
        f"{network.patch}, energy {model.spec.objective.energy}"
    )


# -- helpers ------------------------------------------------------------------------------------


def _numbers(name: str, text: str) -> list[int]:
    from eqm.errors import ConfigError

    try:
        spans = [part.partition("-") for part in text.split(",")]
        numbers = [n for a, dash, b in spans for n in range(int(a), int(b if dash else a) + 1)]
    except ValueError as error:
        raise ConfigError(f"--{name} is {text!r}; it must look like 0-9 or 0,3,5") from error
    if not numbers:
        raise ConfigError(f"--{name} is {text!r}, which names none; it must look like 0-9")
    return numbers


def changes_of(settings: list[str] | None) -> dict[str, Any]:
    """``name=value`` of --set, values as JSON or bare words. Raises ConfigError."""
    from eqm.errors import ConfigError

    changes: dict[str, Any] = {}
    for item in settings or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item!r} must look like name=value")
        try:
            changes[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            # A bare word is a string, as in --set source.kind=folder.
            changes[name.strip()] = value
    return changes


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
        out.print_json(data=to_json(read_config(config, changes)))
        return None
    return run_flow(module, name, config, changes, **more)


def run_flow(module: str, name: str, config: str, changes: dict[str, Any], /, **more: Any) -> Any:
    """Run a flow here, in this process, once its config is right and Prefect answers.

    ``more`` are its own arguments, of whatever name.
    """
    from importlib import import_module

    import httpx

    from flows.plan import read_config
    from flows.settings import check_prefect, current_settings
    from infra.stack import ServiceError

    read_config(config, changes)
    _prepare()
    check_prefect()
    flow: Callable[..., Any] = getattr(import_module(module), name)
    try:
        return flow(config=config, changes=changes, **more)
    except KeyboardInterrupt:
        _say("interrupted: the same command goes on where this one was")
        raise typer.Exit(130) from None
    except httpx.TransportError as error:
        # Of all that flows talk to, Prefect alone is asked by httpx; its client has waited by now.
        where = current_settings().prefect_api_url or "its address before"
        raise ServiceError(
            f"Prefect at {where} went away while `{name}` ran ({error}): start it with `eqm up`; "
            "what is sealed is kept, and the same command goes on"
        ) from error


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
