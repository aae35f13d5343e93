"""Commands that have a model in hand: draw from it, serve it, average it anew, convert it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from eqm.words import counted
from flows.options import check_file, check_new_folder

out = Console()
err = Console(stderr=True)

FIRST_CLASSES = 10
MOST_NUMBERS = 1000
"""Rows or columns of a picture."""
JUDGED = "As for the champion's evaluation unless given; else the paper's."


def sample(
    model: Annotated[
        str, typer.Argument(help="models:/NAME@ALIAS, a sealed train record, or a directory.")
    ] = "models:/eqm-digits@champion",
    labels: Annotated[
        str | None, typer.Option(help="Class numbers, as 0,1,2 or 0-9; the first 10 unless given.")
    ] = None,
    seeds: Annotated[
        str,
        typer.Option(help="Columns, as 0-7. No two labels share noise; seeds elsewhere are told."),
    ] = "0-7",
    guidance: Annotated[float | None, typer.Option(min=0, help=f"Guidance scale. {JUDGED}")] = None,
    updates: Annotated[int | None, typer.Option(min=1, help=f"Descent updates. {JUDGED}")] = None,
    step_size: Annotated[
        float | None, typer.Option(min=1e-9, help=f"Descent step size. {JUDGED}")
    ] = None,
    momentum: Annotated[
        float | None, typer.Option(min=0, max=0.999, help=f"Of NAG and heavy-ball. {JUDGED}")
    ] = None,
    to: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("samples.png"),
) -> None:
    """Draw a grid of samples: one row a label, one column a seed.

    A champion is sampled as it was for its evaluation, other models as the paper does.
    """
    from flows.settings import activate, current_settings

    activate()
    import eqm
    from eqm.errors import DivergedError
    from eqm.figures import sample_grid
    from eqm.sampling import rule_of, stop_of

    columns = _numbers("seeds", seeds)
    asked = None if labels is None else _numbers("labels", labels)
    check_file("--to", to)
    mlflow_uri = current_settings().mlflow_uri
    asked_for = {"guidance": guidance, "updates": updates, "step_size": step_size}
    sampler = _sampler(model, mlflow_uri, {**asked_for, "momentum": momentum})
    loaded = eqm.load(model, mlflow_uri=mlflow_uri)
    rows, names = _rows(loaded.spec.classes, asked)
    _check_columns(columns, rows, loaded.spec.classes)
    _ = loaded.autoencoder  # a model that came without one is told before its descent, not after
    found = eqm.sample(
        loaded,
        labels=[k for k in rows for _ in columns] if loaded.spec.classes else None,
        # Seeds differ between rows too, or rows would share their noise.
        seeds=[s * max(1, len(loaded.spec.classes)) + k for k in rows for s in columns],
        rule=rule_of(sampler),
        stop=stop_of(sampler),
        updates=sampler.updates,
        guidance=sampler.guidance,
        guidance_channels=sampler.guidance_channels,
    )
    images = found.images().cpu().numpy()
    grid = images.reshape(len(rows), len(columns), *images.shape[1:])
    to.write_bytes(sample_grid(grid, names, scale=max(1, 64 // images.shape[-1])))
    cost = float(found.evaluations.double().mean())
    out.print(
        f"{to}: {counted(len(images), 'sample')}, {counted(round(cost), 'field evaluation')} each"
    )
    if labels is None and len(rows) < len(loaded.spec.classes):
        more = f"{len(rows)} of {len(loaded.spec.classes):,} classes: --labels names others"
        out.print(more, highlight=False)
    if loaded.spec.classes:
        told = f"elsewhere, label k of seed s has seed {len(loaded.spec.classes)} s + k"
        out.print(told, highlight=False)
    diverged = int(found.diverged.sum())
    if diverged:
        raise DivergedError(
            f"{diverged} of {counted(len(images), 'sample')} diverged, which {to} shows as they "
            f"are: lower --step-size ({sampler.step_size:g}) or --guidance ({sampler.guidance:g})"
        )


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
    updates: Annotated[int | None, typer.Option(min=1, help=f"Descent updates. {JUDGED}")] = None,
    step_size: Annotated[
        float | None, typer.Option(min=1e-9, help=f"Descent step size. {JUDGED}")
    ] = None,
) -> None:
    """Answer calls with images for labels and seeds, as MLflow's scoring server does.

    What a call does not set is as in the champion's evaluation, or the paper's for other models.
    """
    from flows.settings import activate, current_settings

    activate()
    import uvicorn

    from eqm.serving import application

    token = _token(host, token_file)
    _refuse_taken(host, port)
    settings = current_settings()
    served = application(
        model,
        _sampler(model, settings.mlflow_uri, {"updates": updates, "step_size": step_size}),
        token=token,
        mlflow_uri=settings.mlflow_uri,
        cache=settings.home / "cache",
    )
    err.print(f"{model}: POST http://{host}:{port}/invocations", highlight=False, soft_wrap=True)
    uvicorn.run(served, host=host, port=port, log_level="warning")


def _sampler(model: str, mlflow_uri: str | None, asked: dict[str, Any]) -> Any:
    """The SamplerConfig of a model's evaluation, or the paper's, with what is asked for put in.

    Says which. Raises ConfigError.
    """
    from eqm.config import SamplerConfig, replace
    from eqm.dossier import sampler_of
    from eqm.errors import require
    from eqm.model import open_record, version_of

    judged = None
    if model.startswith("models:/"):
        version = version_of(model, mlflow_uri)
        judged = sampler_of(open_record(version.source)[0], version)
    base = judged or SamplerConfig()
    given = {name: value for name, value in asked.items() if value is not None}
    moves = base.rule in ("nag", "heavy-ball")
    rule = f"left out: {model} is sampled by {base.rule!r}, which has none"
    require(moves or "momentum" not in given, "--momentum", given.get("momentum"), rule)
    # Products in less are for GPUs, and for the tens of thousands of samples of an evaluation.
    sampler = replace(base, **given, precision="float32")
    parts = [f"{sampler.rule}, step size {sampler.step_size:g}", counted(sampler.updates, "update")]
    parts += [f"momentum {sampler.momentum:g}"] if moves else []
    parts += [f"guidance {sampler.guidance:g}"] if sampler.guidance != 1 else []
    stops = sampler.stop_below
    parts += [f"until its gradient is below {stops:g}"] if stops is not None else []
    whose = "as for its evaluation" if judged and not given else "as asked for"
    whose = whose if judged or given else "as the paper"
    whose += f", but in float32, not {base.precision}" if base.precision != "float32" else ""
    err.print(f"sampler: {', '.join(parts)} ({whose})", highlight=False, soft_wrap=True)
    return sampler


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
    # All thousand of ImageNet would take hours, and are no picture.
    rows = list(range(min(len(classes), FIRST_CLASSES))) if asked is None else asked
    if max(rows) >= len(classes):
        last = len(classes) - 1
        raise ConfigError(
            f"--labels asks for {max(rows)}; this model has 0 ({classes[0]}) to {last} "
            f"({classes[last]}), in the order of their names"
        )
    return rows, [classes[k] for k in rows]


def _check_columns(columns: list[int], rows: list[int], classes: tuple[str, ...]) -> None:
    """Refuse seeds whose samples would have numbers that there are none of. Raises ConfigError."""
    from eqm.config import LARGEST_SAMPLE_SEED
    from eqm.errors import ConfigError

    largest = (LARGEST_SAMPLE_SEED - max(rows)) // max(1, len(classes))
    if max(columns) > largest:
        raise ConfigError(f"--seeds asks for {max(columns)}; they go from 0 to {largest} here")


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
    from flows.settings import activate, current_settings

    activate()
    from eqm.model import reconstructed

    check_new_folder("--to", to)
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
    check_new_folder("--to", to)
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
    shape, classes = model.spec.latent.shape, counted(len(model.spec.classes), "class", "classes")
    out.print(f"{to}: {_size(model)}, latents {shape}, {classes}", soft_wrap=True)


def export_official(
    model: Annotated[
        str, typer.Argument(help="models:/NAME@ALIAS, a sealed train record, or a directory.")
    ],
    to: Annotated[Path, typer.Option(help=".pt file to write.")],
) -> None:
    """Write averaged weights as a .pt file that the official code loads, with its sign."""
    from flows.settings import activate, current_settings

    activate()
    import eqm
    from eqm.errors import ConfigError
    from eqm.official import to_official, write_official

    if to.suffix.lower() != ".pt":
        raise ConfigError(f"--to is {to}; the official code loads .pt files: name it so")
    check_file("--to", to)
    loaded = eqm.load(model, mlflow_uri=current_settings().mlflow_uri, device="cpu")
    write_official(to, to_official(loaded.network))
    out.print(f"{to}: {_size(loaded)}. Heads are in no file: remember them", soft_wrap=True)


def _size(model: Any) -> str:
    network = model.spec.network
    return (
        f"width {network.width}, depth {network.depth}, {counted(network.heads, 'head')}, patch "
        f"{network.patch}, energy {model.spec.objective.energy}"
    )


def _numbers(name: str, text: str) -> list[int]:
    from eqm.errors import ConfigError

    try:
        parts = [part.partition("-") for part in text.split(",")]
        spans = [range(int(a), int(b if dash else a) + 1) for a, dash, b in parts]
    except ValueError as error:
        numbered = "; classes are numbered from 0, in the order of their names"
        more = numbered if name == "labels" else ""
        raise ConfigError(f"--{name} is {text!r}; it must look like 0-9 or 0,3,5{more}") from error
    # Of what is too long for len() as well.
    count = sum(max(0, span.stop - span.start) for span in spans)
    if not count:
        raise ConfigError(f"--{name} is {text!r}, which names none; it must look like 0-9")
    if count > MOST_NUMBERS:
        raise ConfigError(
            f"--{name} is {text!r}, which names {count:,}: a picture shows at most {MOST_NUMBERS:,}"
        )
    return [number for span in spans for number in span]
