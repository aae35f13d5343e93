"""The loss of Equilibrium Matching (section 3.2): match a gradient that vanishes at the data.

    x        data, (B, C, H, W)              gamma    in [0, 1], (B,), hidden from the network
    eps      noise, (B, C, H, W)             x_gamma  gamma x + (1 - gamma) eps
    c        decay of the gradient's length  L        ||gradient(x_gamma) - (eps - x) c(gamma)||^2

EqM needs c(1) = 0: data are where the gradient is zero. A constant c is not EqM but flow matching
without noise conditioning (Eq. 2, with our sign); it is here as the paper's baseline. Pure.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from eqm.config import ObjectiveConfig
from eqm.field import Field

Decay = Callable[[Tensor], Tensor]
"""gamma (B,) -> c(gamma) (B,)."""


def decay(config: ObjectiveConfig) -> Decay:
    """The c of Eqs. 4-6 times the multiplier.

    ``constant`` gives the baseline, whose c(1) is not 0; :func:`check_decay` refuses it as EqM.
    """
    a, b, multiplier = config.a, config.b, config.multiplier
    shapes: dict[str, Decay] = {
        "constant": torch.ones_like,
        "linear": lambda gamma: 1 - gamma,
        "truncated": lambda gamma: piecewise(gamma, a=a, b=1.0),
        "piecewise": lambda gamma: piecewise(gamma, a=a, b=b),
    }
    shape = shapes[config.c]
    return lambda gamma: multiplier * shape(gamma)


def piecewise(gamma: Tensor, *, a: float, b: float) -> Tensor:
    """Eq. 6: from b at gamma = 0 in a line to 1 at a, in a line to 0 at 1. b = 1 is Eq. 5."""
    slope = 0.0 if b == 1 else (b - 1) / a
    return torch.where(gamma <= a, b - slope * gamma, (1 - gamma) / (1 - a))


def check_decay(c: Decay) -> None:
    """Refuse a c that does not vanish at the data. Raises ValueError."""
    at_data = float(c(torch.ones(1, dtype=torch.float64)))
    if at_data != 0:
        raise ValueError(
            f"c(1) is {at_data}; Equilibrium Matching needs c(1) = 0, or data are no equilibria: "
            "use a linear, truncated or piecewise c"
        )


def corrupt(x: Tensor, eps: Tensor, gamma: Tensor) -> Tensor:
    """x_gamma = gamma x + (1 - gamma) eps, (B, C, H, W); gamma (B,)."""
    weight = _per_sample(gamma, x)
    return weight * x + (1 - weight) * eps


def target(x: Tensor, eps: Tensor, gamma: Tensor, c: Decay) -> Tensor:
    """The gradient to match at x_gamma, (eps - x) c(gamma), (B, C, H, W) (Eq. 3)."""
    return (eps - x) * _per_sample(c(gamma), x)


def loss_per_sample(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of each sample, (B,): the mean over C, H, W."""
    return (prediction - target).square().flatten(1).mean(dim=1)


def eqm_loss(
    field: Field,
    x: Tensor,
    eps: Tensor,
    gamma: Tensor,
    labels: Tensor | None,
    *,
    c: Decay,
    create_graph: bool,
) -> Tensor:
    """Loss of each sample, (B,) (Eq. 3; for an explicit energy the EqM-E loss of section 3.4).

    ``create_graph`` must be True to train and False to measure. Raises ValueError as
    :meth:`Field.gradient` does.
    """
    x_gamma = corrupt(x, eps, gamma)
    prediction = field.gradient(x_gamma, labels, create_graph=create_graph)
    return loss_per_sample(prediction, target(x, eps, gamma, c))


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1)).to(like.dtype)
