"""Digits: do scores tell what is no digit?"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import eqm
from bench.digits import digits, model
from bench.gallery.drawing import BLUE, GREY, VERMILLION, Picture, Table, drawn
from eqm import ood
from eqm.randomness import Stream, uniform
from eqm.sampling import Scores

IMAGES, UPDATES, BINS = 200, 50, 60
RULE = eqm.NAG(step_size=0.012, momentum=0.3)
"""Half as many updates as for samples, each twice as long."""
INSIDE = "held-out digits"
SCORES = {
    "gradient_norm": "norm of the gradient (1 evaluation)",
    "descent_length": f"length of the descent ({UPDATES} evaluations)",
}


def sets() -> dict[str, Tensor]:
    """Latents (IMAGES, 1, 8, 8): digits, then what is none, the hardest last."""
    numbers, held = torch.arange(IMAGES), digits(held_out=True).latents[:IMAGES]
    noise = uniform(0, Stream.SAMPLE_NOISE, numbers, 64).view(IMAGES, 1, 8, 8)
    flat = torch.linspace(-1, 1, IMAGES).view(-1, 1, 1, 1).expand(IMAGES, 1, 8, 8)
    return {
        INSIDE: held,
        "inverted digits": -held,
        "uniform noise": 2 * noise.float() - 1,
        "constant images": flat,
        "upside-down digits": held.flip(2),
    }


def _auroc(found: dict[str, Scores], name: str, score: str) -> ood.OODResult:
    return ood.compare(getattr(found[INSIDE], score), getattr(found[name], score))


def picture() -> Picture:
    """Histograms of both scores, and how well they tell."""
    trained = model(seed=0)
    found = {name: eqm.score(trained, x, rule=RULE, updates=UPDATES) for name, x in sets().items()}
    rows = []
    for name in list(found)[1:]:
        results = [_auroc(found, name, score) for score in SCORES]
        cells = [
            f"{r.auroc:.3f} ({r.auroc_interval[0]:.3f} to {r.auroc_interval[1]:.3f})"
            for r in results
        ]
        rows.append((name, *cells))
    return Picture(
        name="outside",
        title="Scores of what is no digit",
        seen=(
            f"{IMAGES} images a set, no labels given; higher is stranger. Noise, inverted digits "
            "and most constant images lie far up the slopes. Those are easy. Digits upside down "
            "are the hard case, and there either score tells them apart only in part."
        ),
        table=Table(
            ("AUROC (95 % interval)", "norm of the gradient", "length of the descent"), rows
        ),
        code=f"eqm.score(model, x, rule=eqm.NAG(step_size=0.012, momentum=0.3), updates={UPDATES})",
        png=drawn(lambda figure: _draw(figure, found), width=9.6, height=4.6),
    )


def _draw(figure: Any, found: dict[str, Scores]) -> None:
    """A strip for each set, a column for each score."""
    panels = figure.subplots(len(found), len(SCORES), sharex="col")
    for column, (score, label) in zip(panels.T, SCORES.items(), strict=True):
        values = {name: getattr(scores, score).numpy() for name, scores in found.items()}
        edges = np.linspace(0, 1.02 * max(v.max() for v in values.values()), BINS + 1)
        for axes, name in zip(column, found, strict=True):
            _strip(axes, values[name], edges, BLUE if name == INSIDE else VERMILLION)
            text = "AUROC" if name == INSIDE else f"{_auroc(found, name, score).auroc:.3f}"
            axes.text(1.02, 0.4, text, transform=axes.transAxes, va="center")
        column[-1].set_xlabel(label)
    for axes, name in zip(panels[:, 0], found, strict=True):
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    panels[0, 0].set_title("Digits lie at the bottom of the landscape")
    panels[0, 1].set_title("Their way down is short")


def _strip(axes: Any, values: NDArray[np.float32], edges: Sequence[float], colour: str) -> None:
    axes.hist(values, bins=edges, color=colour)
    axes.set_yticks([])
    axes.set_xlim(edges[0], edges[-1])
    axes.spines["left"].set_visible(False)
    axes.axvline(0, color=GREY, linewidth=0.8)
