"""provisional"""

from dataclasses import dataclass
import torch
from eqm.randomness import Stream, normal


@dataclass(frozen=True)
class GradientDescent:
    step_size: float


@dataclass(frozen=True)
class NAG:
    step_size: float
    momentum: float


Rule = GradientDescent | NAG


@dataclass(frozen=True)
class GradientNormBelow:
    threshold: float


@dataclass(frozen=True)
class Descent:
    latents: torch.Tensor
    evaluations: torch.Tensor
    gradient_norms: torch.Tensor
    diverged: torch.Tensor


def start_noise(seeds, shape, *, dtype, device):
    return normal(0, Stream.SAMPLE_NOISE, seeds, shape).to(dtype)


def descend(gradient, start, *, rule, updates, stop=None, on_update=None):
    x, last = start.clone(), start.clone()
    mu = getattr(rule, "momentum", 0.0)
    if on_update:
        on_update(0, x)
    for k in range(updates):
        g = gradient(x + mu * (x - last))
        last, x = x, x - rule.step_size * g
        if on_update:
            on_update(k + 1, x)
    n = g.flatten(1).norm(dim=1)
    return Descent(x, torch.full((len(x),), updates), n, ~torch.isfinite(n))
