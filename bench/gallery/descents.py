"""Digits: samples while they descend, and how long each of them takes."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

import eqm
from bench.digits import Judge, digits, model
from bench.gallery.drawing import BLUE, INK, VERMILLION, Picture, Table, drawn, percent, show_sheet
from eqm.sampler import norms

RULE = eqm.NAG(step_size=0.006, momentum=0.3)
UPDATES = 100
COLUMNS = (0, 10, 20, 30, 40, 50, 60, 80, 100)
SAMPLES, SLOTS = 400, 64
CODE = "rule=eqm.NAG(step_size=0.006, momentum=0.3), updates=100"
"""What every call has in common."""


@cache
def judge_of_digits() -> Judge:
    """The same for all pictures."""
    return Judge()


def proceeding() -> Picture:
    """Rows are classes, columns are updates."""
    trained = model(seed=0)
    latents: list[Tensor] = []

    def keep(update: int, x: Tensor) -> None:
        if update in COLUMNS:
            latents.append(x)

    eqm.sample(
        trained, labels=range(10), seeds=range(10), rule=RULE, updates=UPDATES, on_update=keep
    )
    kept = [trained.autoencoder.decode(x) for x in latents]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        rows = [[images[label] for images in kept] for label in range(10)]
        names = [str(update) for update in COLUMNS]
        show_sheet(axes, rows, row_names=[str(i) for i in range(10)], column_names=names)
        axes.set(xlabel="updates", ylabel="label")

    lengths = [f"{rms(x, latents[-1]):.2f}" for x in latents]
    return Picture(
        name="proceeding",
        title="Samples on their way down",
        seen=(
            "A row is one label and one noise image. What the digit will be is settled in the "
            "first half; the second only sharpens it, as the distances (root mean square of the "
            "pixels, which go from -1 to 1) say."
        ),
        table=Table(("updates", *map(str, COLUMNS)), [("distance to the end", *lengths)]),
        code=(
            "eqm.sample(model, labels=range(10), seeds=range(10),\n"
            f"           {CODE}, on_update=keep)"
        ),
        png=drawn(draw, width=6.0, height=6.6),
    )


def rms(a: Tensor, b: Tensor) -> float:
    """Mean over images of the root mean square difference."""
    return float((a - b).square().flatten(1).mean(dim=1).sqrt().mean())


def adaptive() -> Picture:
    """Evaluations of each sample where each stops by itself."""
    trained, judge, held = model(seed=0), judge_of_digits(), digits(held_out=True)
    quiet = float(norms(trained.gradient(held.latents, held.labels)).median())
    labels = torch.arange(SAMPLES) % 10
    asked: dict[str, Any] = {
        "labels": labels,
        "seeds": range(SAMPLES),
        "rule": RULE,
        "updates": UPDATES,
    }
    fixed = eqm.sample(trained, **asked)
    found = eqm.sample(trained, **asked, stop=eqm.GradientNormBelow(quiet), slots=SLOTS)
    mean = float(found.evaluations.double().mean())

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.hist(found.evaluations.tolist(), bins=range(0, UPDATES + 4, 2), color=BLUE, rwidth=0.9)
        top = axes.get_ylim()[1] * 1.12
        for at, colour, name in (
            (mean, INK, f"mean {mean:.0f} "),
            (UPDATES, VERMILLION, f"fixed: {UPDATES} "),
        ):
            axes.axvline(at, color=colour, linestyle=(0, (4, 3)), linewidth=1.4)
            axes.text(at, top * 0.97, name, color=colour, ha="right", va="top")
        axes.set(xlabel="evaluations of the field", ylabel=f"samples of {SAMPLES}")
        axes.set(xlim=(0, UPDATES + 4), ylim=(0, top))
        axes.set_title("Each sample stops when it is as quiet as a real digit")
        axes.grid(axis="y")

    rows = [
        (
            name,
            f"{float(way.evaluations.double().mean()):.1f}",
            f"{judge.distance(way.images()):.2f}",
            percent(judge.agreement(way.images(), labels), digits=1),
        )
        for name, way in (("stopped", found), ("fixed", fixed))
    ]
    return Picture(
        name="adaptive",
        title="Adaptive compute",
        seen=(
            "A sample stops when its gradient is as small as that of the median held-out digit "
            f"({quiet:.2f}), and makes room for the next. {int(found.stopped.sum())} of {SAMPLES} "
            f"stopped, which saved {percent(1 - mean / UPDATES)} of the evaluations."
        ),
        table=Table(("", "evaluations", f"{judge.name}-{SAMPLES}", "read as their label"), rows),
        code=(
            f"eqm.sample(model, labels=labels, seeds=range({SAMPLES}),\n           {CODE},\n"
            f"           stop=eqm.GradientNormBelow(threshold), slots={SLOTS})"
        ),
        png=drawn(draw, width=7.2, height=3.6),
    )
