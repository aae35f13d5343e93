"""Digits: what else a landscape is good for. Composing, cleaning, inpainting."""

from typing import Any

import torch
from torch import Tensor

import eqm
from bench.digits import Digits, Judge, digits, model
from bench.gallery.descents import CODE, RULE, UPDATES, judge_of_digits, rms
from bench.gallery.drawing import BLUE, VERMILLION, Picture, Table, drawn, percent, show_sheet
from eqm.sampler import start_noise

PAIRS = ((3, 8), (1, 7), (0, 6))
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
COMPOSED, SHOWN = 32, 2
NOISE_LEVELS = (0.25, 0.5, 0.75, 1.0)
CLEANED, INPAINTED, COMPLETIONS = 120, 60, 4


# -- composition --------------------------------------------------------------------------------


def blends() -> dict[tuple[int, int], list[Tensor]]:
    """Images (COMPOSED, 1, 8, 8) of each pair at each weight of its second label."""
    trained = model(seed=0)
    found = {}
    for first, second in PAIRS:
        row = []
        for weight in WEIGHTS:
            parts = ((trained, first, 1 - weight), (trained, second, weight))
            both = eqm.compose(*[part for part in parts if part[2]])
            out = eqm.sample(both, seeds=range(COMPOSED), rule=RULE, updates=UPDATES)
            row.append(out.images())
        found[first, second] = row
    return found


def _read_as(judge: Judge, images: Tensor, label: int) -> float:
    return judge.agreement(images, torch.full((len(images),), label))


def composition() -> Picture:
    """Two labels' landscapes added, with weights."""
    found, judge = blends(), judge_of_digits()
    shares = {
        pair: [[_read_as(judge, images, label) for images in row] for label in pair]
        for pair, row in found.items()
    }

    def draw(figure: Any) -> None:
        axes = figure.subplots(2, len(PAIRS), height_ratios=(0.6, 1))
        for (upper, lower), pair in zip(axes.T, PAIRS, strict=True):
            row = found[pair]
            rows = [[images[i] for images in row] for i in range(SHOWN)]
            show_sheet(upper, rows, column_names=[f"{w:g}" for w in WEIGHTS])
            upper.set_title(f"from {pair[0]} to {pair[1]}")
            _shares(lower, pair, shares[pair])

    half = WEIGHTS.index(0.5)
    rows = []
    for (first, second), (one, two) in shares.items():
        values = (one[half], two[half], 1 - one[half] - two[half])
        rows.append((f"{first} and {second}", *(percent(v) for v in values)))
    return Picture(
        name="composition",
        title="Composition: the sum of two landscapes",
        seen=(
            "Above, the same two noise images at every weight; below, what the SVC reads in "
            f"{COMPOSED} samples of each. The sum of two landscapes has valleys of its own, with "
            "shapes between the two. It is a walk between labels and not a picture of both: no "
            "8 x 8 image is a 3 and an 8."
        ),
        table=Table(("at equal weights", "read as the first", "as the second", "as another"), rows),
        code=(
            "both = eqm.compose((model, 3, 0.5), (model, 8, 0.5))\n"
            f"eqm.sample(both, seeds=range({COMPOSED}), {CODE})"
        ),
        png=drawn(draw, width=9.6, height=4.7),
    )


def _shares(axes: Any, pair: tuple[int, int], shares: list[list[float]]) -> None:
    """Two lines, named at the end where each is high."""
    colours, ends = (BLUE, VERMILLION), ((WEIGHTS[0], "left"), (WEIGHTS[-1], "right"))
    for label, values, colour, (at, side) in zip(pair, shares, colours, ends, strict=True):
        axes.plot(WEIGHTS, values, color=colour, marker="o")
        axes.text(at, 1.07, f"read as {label}", color=colour, ha=side)
    axes.set(ylim=(-0.05, 1.2), xlim=(-0.125, 1.125), xticks=WEIGHTS, yticks=(0, 0.5, 1))
    axes.xaxis.set_major_formatter(lambda weight, _: f"{weight:g}")
    axes.yaxis.set_major_formatter(lambda share, _: percent(share))
    axes.set_xlabel(f"weight of {pair[1]}")
    axes.grid(axis="y")


# -- partly noised starts -----------------------------------------------------------------------


def cleaning() -> Picture:
    """Descents from held-out digits in noise, by a model that is told neither level nor label."""
    trained, judge, held = model(seed=0), judge_of_digits(), digits(held_out=True)
    x, labels = held.latents[:CLEANED], held.labels[:CLEANED]
    eps = start_noise(torch.arange(CLEANED), (1, 8, 8), dtype=x.dtype, device=x.device)
    columns, rows = [held.images[:CLEANED]], []
    for level in NOISE_LEVELS:
        noisy = eqm.corrupt(x, eps, torch.full((CLEANED,), 1 - level))
        out = eqm.sample(trained, start=noisy, rule=RULE, updates=UPDATES)
        columns += [trained.autoencoder.decode(noisy), out.images()]
        apart = [f"{rms(y, x):.2f}" for y in (noisy, out.latents)]
        read = [percent(judge.agreement(images, labels)) for images in columns[-2:]]
        rows.append((percent(level), *apart, *read))
    return Picture(
        name="cleaning",
        title="Descent from a digit in noise",
        seen=(
            "Nobody tells the model how much noise there is, nor which digit: it goes down from "
            "where it stands. A little noise comes off and the digit stays; from half noise on it "
            "is often another digit that appears, and from noise alone "
            f"it has nothing to do with the original, as it must be. {CLEANED} held-out digits."
        ),
        table=Table(
            (
                "noise",
                "RMS to the original: start",
                "end",
                "read as the original's class: start",
                "end",
            ),
            rows,
        ),
        code=f"eqm.sample(model, start=noisy, {CODE})",
        png=drawn(lambda figure: _draw_cleaning(figure, columns, labels), width=7.4, height=6.4),
    )


def _one_of_each(labels: Tensor) -> list[int]:
    """The first index of each label."""
    return [labels.tolist().index(label) for label in range(10)]


def _draw_cleaning(figure: Any, columns: list[Tensor], labels: Tensor) -> None:
    names = [f"{percent(level)} noise" for level in NOISE_LEVELS]
    panels = figure.subplots(1, 1 + len(NOISE_LEVELS), width_ratios=(1, 2, 2, 2, 2))
    at = _one_of_each(labels)
    show_sheet(panels[0], [[columns[0][i]] for i in at], column_names=[" "])
    panels[0].set_title("original")
    for k, (axes, name) in enumerate(zip(panels[1:], names, strict=True)):
        pair = columns[1 + 2 * k : 3 + 2 * k]
        show_sheet(
            axes, [[images[i] for images in pair] for i in at], column_names=["start", "end"]
        )
        axes.set_title(name)


# -- inpainting ---------------------------------------------------------------------------------


def _completed(held: Digits, labels: Tensor | None) -> Tensor:
    """Images (COMPLETIONS * INPAINTED, 1, 8, 8): every digit with seed 0, every one with 1, ..."""
    x = held.latents[:INPAINTED].repeat(COMPLETIONS, 1, 1, 1)
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[:, :, :4] = True
    given = None if labels is None else labels.repeat(COMPLETIONS)
    out = eqm.sample(
        model(seed=0),
        labels=given,
        seeds=range(len(x)),
        project=eqm.Known(mask, x),
        rule=RULE,
        updates=UPDATES,
    )
    return out.images()


def inpainting() -> Picture:
    """Digits whose upper half is known."""
    judge, held = judge_of_digits(), digits(held_out=True)
    images, labels = held.images[:INPAINTED], held.labels[:INPAINTED]
    grey = images.clone()
    grey[:, :, 4:] = 128
    blind, told = _completed(held, None), _completed(held, labels)
    every = labels.repeat(COMPLETIONS)
    shares = {
        "upper half, the rest grey": judge.agreement(grey, labels),
        "completed, label unknown": judge.agreement(blind, every),
        "completed, label given": judge.agreement(told, every),
        "the whole original": judge.agreement(images, labels),
    }

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 4, width_ratios=(1, 1, COMPLETIONS, COMPLETIONS))
        at = _one_of_each(labels)
        sheets = {
            "original": [[images[i]] for i in at],
            "known": [[grey[i]] for i in at],
            "completed, label unknown": [list(blind[i::INPAINTED]) for i in at],
            "completed, label given": [list(told[i::INPAINTED]) for i in at],
        }
        for axes, (name, rows) in zip(panels, sheets.items(), strict=True):
            show_sheet(axes, rows)
            axes.set_title(name)

    return Picture(
        name="inpainting",
        title="Inpainting: the upper half is known",
        seen=(
            f"{COMPLETIONS} completions of each digit, from {COMPLETIONS} noise images. "
            "With the label, the lower half fits what is known. Without it the result is "
            "disappointing: many a completion is another digit or none, and the SVC reads the "
            "half digit on grey better. A known half without noise beside an unknown half in noise "
            "is nothing that the model was trained on."
        ),
        table=Table(
            (f"of {INPAINTED} digits, {COMPLETIONS} completions each", "read as its class"),
            [(name, percent(share, digits=1)) for name, share in shares.items()],
        ),
        code=f"eqm.sample(model, seeds=seeds, project=eqm.Known(mask, values),\n           {CODE})",
        png=drawn(draw, width=7.4, height=6.4),
    )
