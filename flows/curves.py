"""``eqm curves``: what a training has logged of itself, as a picture and in a few lines.

The log is sealed with what was trained; of a training that goes on, its copy on this machine is
read, which has every event as it happens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from flows.options import check_file
from flows.terminal import show
from flows.terminal import table as table_of

out = Console()

PANELS: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "loss/gamma_"),
    "gradient norm": ("gradient_norm",),
    "images a second": ("images_per_second",),
    "MFU": ("mfu",),
    "TFLOP a second": ("tflops_per_second",),
    "share of time spent waiting for data": ("data_wait_share",),
    "learning rate": ("learning_rate",),
    "length of all weights": ("parameter_norm",),
    "distance of samples from the latents": ("latent_distance",),
}
"""Title -> what is drawn: figures of these names, or that begin so."""
TOLD = ("resume", "skip", "guard", "interrupted")
"""Kinds of events that are marked in the picture and listed below it."""


def curves(
    training: Annotated[
        str,
        typer.Argument(
            help="models:/NAME@ALIAS, <store>/train/<digest>, the first digits of a digest (also "
            "of a training of this machine that goes on), or a log itself, events.jsonl."
        ),
    ],
    to: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("curves.png"),
) -> None:
    """Draw what a training logged: losses by noise level, norms, speed, MFU, what went wrong."""
    from eqm.errors import require
    from eqm.figures import panels_png

    check_file("--to", to)
    events = events_of(training)
    points = [event for event in events if event.kind in ("metrics", "samples")]
    require(bool(points), "training", training, "one that has logged something: wait a little")
    notes = [event for event in events if event.kind in TOLD]
    marks = [event.images_seen for event in notes]
    panels = panels_of(points)
    to.write_bytes(
        panels_png(panels, x_label="images seen", marks=marks, logarithmic=[*PANELS][:2])
    )
    rows = table_of("figure", "last", "mean")
    for name, (_, values) in lines_of(points, "").items():
        rows.add_row(name, f"{values[-1]:.5g}", f"{sum(values) / len(values):.5g}")
    show(rows, out)
    for event in notes:
        facts = ", ".join(f"{name} {value}" for name, value in event.facts.items())
        out.print(f"at image {event.images_seen:,}: {event.kind} ({facts})", soft_wrap=True)
    hours = (events[-1].at_ms - events[0].at_ms) / 3.6e6
    seen, last = events[-1].images_seen, events[-1].kind
    out.print(f"{to}: {seen:,} images in {hours:.2f} hours, last event: {last}", soft_wrap=True)


def lines_of(points: Sequence[Any], prefix: str) -> dict[str, tuple[list[float], list[float]]]:
    """Name of each figure that begins so -> (images seen, values)."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for event in points:
        for name, value in event.figures.items():
            if name.startswith(prefix):
                x, y = found.setdefault(name, ([], []))
                x.append(event.images_seen)
                y.append(value)
    return found


def panels_of(points: Sequence[Any]) -> list[Any]:
    """What is drawn of events with figures; figures that there are none of are left out."""
    panels: list[Any] = []
    for title, wanted in PANELS.items():
        lines: dict[str, Any] = {}
        for prefix in wanted:
            for name, line in lines_of(points, prefix).items():
                if prefix.endswith("_") or name == prefix:
                    lines[_level(name)] = line
        if lines:
            panels.append((title, lines))
    return panels


def _level(name: str) -> str:
    """loss/gamma_0.0_0.2 -> gamma 0.0 to 0.2, and what is of no level as it is."""
    _, level, ends = name.partition("/gamma_")
    return f"gamma {ends.replace('_', ' to ')}" if level else name


def events_of(training: str) -> list[Any]:
    """Events of a training by what a person calls it.

    Raises ConfigError for a config, DataError, IntegrityError.
    """
    from eqm import events
    from eqm.errors import ConfigError, DataError, EqmError, IntegrityError
    from eqm.model import sealed
    from flows.addresses import open_sealed
    from flows.settings import activate

    file = Path(training)
    if file.suffix == ".toml":
        raise ConfigError(
            f"{training} is a config, and curves are of a training: give the first digits of its "
            "digest, which `eqm train` prints when it starts, or models:/NAME@ALIAS"
        )
    if file.suffix == ".jsonl":
        if not file.is_file():
            raise DataError(f"{training}: there is no such file")
        return _of_copy(file)
    settings = activate()
    if training.startswith("models:/"):
        cache = settings.home / "cache"
        store, record = sealed(training, mlflow_uri=settings.mlflow_uri, cache=cache)
    else:
        digits = training.rstrip("/").rpartition("/")[2]
        here = sorted((settings.home / "cache" / "events").glob(f"{digits}*.jsonl"))
        try:
            store, record = open_sealed(training, "train")
        except EqmError as error:
            # The copy serves as well where nothing is sealed yet or the store is away; damage is
            # for nobody to pass over.
            if isinstance(error, IntegrityError) or len(here) != 1:
                raise
            return _of_copy(here[0])
    if events.EVENTS not in record.logs:
        raise DataError(f"{training} was sealed without a log: there is nothing to draw")
    return events.events_of(
        store.get(record.logs[events.EVENTS]), f"{events.EVENTS} of {record.digest[:12]}"
    )


def _of_copy(file: Path) -> list[Any]:
    """Events of the copy that a training writes line by line. Raises IntegrityError."""
    from eqm import events

    written = file.read_bytes()
    # Its last line may be on its way still, or have been when its writer was killed.
    whole = written[: written.rfind(b"\n") + 1]
    return events.events_of(whole or written, str(file))
