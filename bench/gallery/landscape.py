"""Digits: gradient and energy between noise and data nobody has shown the model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import eqm
from bench.digits import digits, model
from bench.gallery.drawing import BLUE, GREEN, Picture, Table, drawn, percent
from eqm import objective
from eqm.config import ObjectiveConfig, TrainConfig
from eqm.model import Model
from eqm.sampler import norms, start_noise

DIGITS, LEVELS = 160, 26
DOT_RECIPE = TrainConfig(
    images=60_000,
    learning_rate=1e-3,
    warmup_images=6_400,
    decay_fraction=0.5,
    ema_half_life_images=4_000.0,
)
"""A quarter of the images that the implicit model sees: a step of it costs about twice as much."""
BAND = torch.tensor([0.05, 0.95])


def explicit() -> Model:
    """A model of the digits with an energy."""
    return model(
        seed=0, objective=ObjectiveConfig(energy="dot", backward="double"), train=DOT_RECIPE
    )


def along(measure: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """``measure(x_gamma, eps - x, gamma)`` (B,) of held-out digits at all levels, (L, B)."""
    x = digits(held_out=True).latents[:DIGITS]
    eps = start_noise(torch.arange(DIGITS), tuple(x.shape[1:]), dtype=x.dtype, device=x.device)
    rows = []
    for gamma in torch.linspace(0, 1, LEVELS):
        level = gamma.expand(DIGITS)
        rows.append(measure(eqm.corrupt(x, eps, level), eps - x, level))
    return torch.stack(rows)


def _band(axes: Any, rows: Tensor, colour: str, name: str) -> None:
    gamma = torch.linspace(0, 1, LEVELS)
    low, high = rows.quantile(BAND, dim=1)
    axes.fill_between(gamma, low, high, color=colour, alpha=0.22, linewidth=0)
    axes.plot(gamma, rows.mean(dim=1), color=colour, label=name)


def _rises(energies: Tensor) -> float:
    """Share of digits whose energy is higher at each quarter of the way toward noise."""
    at = energies[[LEVELS - 1, 3 * LEVELS // 4, LEVELS // 2, LEVELS // 4, 0]]
    return float((at.diff(dim=0) > 0).all(dim=0).float().mean())


def picture() -> Picture:
    """Norm of the gradient, and energy, against gamma."""
    labels = digits(held_out=True).labels[:DIGITS]
    implicit, dot = model(seed=0), explicit()
    c = objective.decay(ObjectiveConfig())
    target = along(lambda x, way, gamma: norms(way) * c(gamma))
    slopes = along(lambda x, way, gamma: norms(implicit.gradient(x, labels)))
    dot_slopes = along(lambda x, way, gamma: norms(dot.gradient(x, labels)))
    energies = along(lambda x, way, gamma: dot.energy(x, labels))

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        _band(left, slopes, BLUE, "implicit field")
        _band(left, dot_slopes, GREEN, "dot energy")
        gamma = torch.linspace(0, 1, LEVELS)
        mean = target.mean(dim=1)
        left.plot(gamma, mean, color="black", linestyle=(0, (4, 3)), linewidth=1.3, label="target")
        left.set(title="The gradient vanishes at data", ylabel="norm of the gradient")
        left.legend(loc="lower left")
        _band(right, energies, GREEN, "dot energy")
        right.set(title="The energy falls from noise to data", ylabel="energy")
        for axes in (left, right):
            axes.set(xlabel=r"$\gamma$   (0: noise, 1: a held-out digit)", xlim=(0, 1))
            axes.grid(axis="y")
        left.set_ylim(bottom=0)

    return Picture(
        name="landscape",
        title="What the field looks like between noise and a digit it has never seen",
        seen=(
            f"Mean and 5 to 95 % band over {DIGITS} held-out digits. Nobody tells the network "
            "gamma, and still it is about as steep as it should be, down to a small rest at the "
            "digit. It stays below the target `|eps - x| c(gamma)` (dashed) where x could be "
            "several things, because the field is the mean over them. An explicit energy, trained "
            "on a quarter of the images, keeps a larger rest. It rises at every quarter of the "
            f"way to noise for {percent(_rises(energies), digits=1)} of the digits."
        ),
        table=Table(
            ("gradient norm", "target", "implicit field", "dot energy"),
            [_row(gamma, target, slopes, dot_slopes) for gamma in (0, 0.4, 0.8, 0.92, 1)],
        ),
        code="model.gradient(eqm.corrupt(x, eps, gamma), labels)   # and model.energy(...)",
        png=drawn(draw, width=9.6, height=3.9),
    )


def _row(gamma: float, *rows: Tensor) -> tuple[str, ...]:
    level = round(gamma * (LEVELS - 1))
    return (f"gamma = {gamma:g}", *(f"{float(r[level].mean()):.2f}" for r in rows))
