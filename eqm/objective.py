"""The loss of Equilibrium Matching (section 3.2): match a gradient that vanishes at the data.

    x        data, (B, C, H, W)              gamma    in [0, 1], (B,), hidden from the network
    eps      noise, (B, C, H, W)             x_gamma  gamma x + (1 - gamma) eps
    c        decay of the gradient's length  L        ||gradient(x_gamma) - (eps - x) c(gamma)||^2

EqM needs c(1) = 0: data are where the gradient is zero. A constant c is not EqM but flow matching
(Eqs. 1 and 2, with our sign): with a network that is conditioned on gamma, and with one that is
not. They are here as the paper's baselines.

For an explicit energy E the gradient is itself a derivative, so its loss reaches the weights by one
of two ways that are equal up to rounding. The *double* way differentiates the gradient. The
*directional* way holds the residual r = grad E - target fixed and uses

    d ||r||^2 / d theta = 2 d <grad_x E, r> / d theta = 2 d/d theta d/ds E(x + s r),   s = 0,

with a central difference in s, which needs first derivatives alone: kernels that can be
differentiated once (flash attention, compiled code) keep working, and the memory is at most that of
one ordinary step. Pure.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from eqm.config import ObjectiveConfig
from eqm.errors import ConfigError
from eqm.field import Field
from eqm.network import Transformer, check_gamma, uncompiled

Decay = Callable[[Tensor], Tensor]
"""gamma (B,) -> c(gamma) (B,)."""
Way = Literal["double", "directional"]

DIFFERENCE = {torch.float64: 1e-5, torch.float32: 5e-3}
"""Steps of the directional way, in shares of the norm of x_gamma: docs/precision.md has the errors
on both sides of them."""


# -- c ------------------------------------------------------------------------------------------


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
    """Refuse a c that cannot be the length of EqM's gradient. Raises ConfigError.

    It must be a function of gamma alone, vanish at the data, and be 0 or greater before, though
    not everywhere 0: it is looked at 1001 levels.
    """
    gamma = torch.linspace(0, 1, 1001, dtype=torch.float64)
    asked = "c is given a tensor of levels gamma, (B,), and returns as many, as 1 - gamma does"
    try:
        values = c(gamma)
    except Exception as error:
        raise ConfigError(f"{asked}; it raised {type(error).__name__}: {error}") from error
    if not isinstance(values, Tensor):
        raise ConfigError(f"{asked}; it returned a {type(values).__name__}")
    if values.shape != gamma.shape or not bool(values.isfinite().all()):
        found = f"shape {tuple(values.shape)}"
        if values.shape == gamma.shape:
            found = f"{float(values[~values.isfinite()][0])} among them"
        raise ConfigError(
            f"c maps 1001 levels gamma from 0 to 1 to {found}: it must give one finite number for "
            "each"
        )
    at_data, largest = float(values[-1]), float(values.abs().max())
    # cos(pi / 2) is 6e-17 in float64: as good as zero.
    if abs(at_data) > 1e-9 * largest:
        raise ConfigError(
            f"c(1) is {at_data}; Equilibrium Matching needs c(1) = 0, or data are no equilibria: "
            "use a linear, truncated or piecewise c"
        )
    if largest == 0:
        raise ConfigError(
            "c is 0 at every level: there would be no gradient to learn; use a c that is greater "
            "than 0 before gamma = 1"
        )
    wrong = (values < -1e-9 * largest).nonzero()
    if len(wrong):
        raise ConfigError(
            f"c({float(gamma[wrong[0]]):.3g}) is {float(values[wrong[0]]):.3g}; c is the length of "
            "a gradient that points from data to noise, so it must be 0 or greater: turn its sign"
        )


# -- corruption and target ----------------------------------------------------------------------


def corrupt(x: Tensor, eps: Tensor, gamma: Tensor) -> Tensor:
    """x_gamma = gamma x + (1 - gamma) eps, (B, C, H, W); gamma (B,).

    Raises DataError for levels outside of [0, 1], for which it waits for the device.
    """
    check_gamma(gamma, len(x))
    return mixed(x, eps, gamma)


def mixed(x: Tensor, eps: Tensor, gamma: Tensor) -> Tensor:
    """:func:`corrupt` of levels that are known to be right."""
    weight = _per_sample(gamma, x)
    return weight * x + (1 - weight) * eps


def target(x: Tensor, eps: Tensor, gamma: Tensor, c: Decay) -> Tensor:
    """The gradient to match at x_gamma, (eps - x) c(gamma), (B, C, H, W) (Eq. 3)."""
    return (eps - x) * _per_sample(c(gamma), x)


def loss_per_sample(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of each sample, (B,): the mean over C, H, W."""
    return (prediction - target).square().flatten(1).mean(dim=1)


@dataclass(frozen=True)
class Corrupted:
    """Noisy latents and what the field should say there."""

    x: Tensor
    """x_gamma, (B, C, H, W)."""
    goal: Tensor
    """(eps - x) c(gamma), (B, C, H, W)."""
    gamma: Tensor
    """(B,)."""
    labels: Tensor | None
    """(B,) int64."""


def corrupted(
    x: Tensor, eps: Tensor, gamma: Tensor, labels: Tensor | None, *, c: Decay
) -> Corrupted:
    """Data (B, C, H, W), noise and levels (B,) -> what the loss is made of.

    Raises DataError as :func:`corrupt` does.
    """
    return Corrupted(corrupt(x, eps, gamma), target(x, eps, gamma, c), gamma, labels)


# -- losses -------------------------------------------------------------------------------------


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
    :meth:`Field.gradient` does, and DataError as :func:`corrupt`.
    """
    at = corrupted(x, eps, gamma, labels, c=c)
    prediction = field.gradient(at.x, labels, gamma, create_graph=create_graph)
    return loss_per_sample(prediction, at.goal)


def inner_product_loss(field: Field, at: Corrupted) -> Tensor:
    """(f . h - ||target||^2)^2 of each sample, (B,), with a second head h. An ablation.

    A summary of the paper has it for the dot energy; the paper has not. Products are means over
    entries, so that its size does not grow with the latents. A compiled network runs uncompiled:
    its second head is no output of the compiled call. Raises ConfigError for a network without one.
    """
    network = uncompiled(cast(nn.Module, field.network))
    if not (isinstance(network, Transformer) and network.config.second_head):
        raise ConfigError("the inner-product loss needs a network with network.second_head = true")
    gamma = at.gamma if field.conditioned else None
    f, h = network.outputs(at.x, at.labels, gamma).float().chunk(2, dim=1)
    return (_mean(f * h) - _mean(at.goal.square())).square()


def norms_loss(field: Field, at: Corrupted) -> Tensor:
    """(||f|| - ||target||)^2 of each sample, (B,). An ablation: lengths without directions.

    A summary of the paper has it for the L2 energy; the paper has not. Norms are root mean squares.
    """
    f = field.gradient(at.x, at.labels, at.gamma, create_graph=torch.is_grad_enabled())
    # Its slope at f = 0, where a zero head begins, would be infinite.
    length = (_mean(f.square()) + 1e-12).sqrt()
    return (length - _mean(at.goal.square()).sqrt()).square()


def dispersive_loss(hidden: Tensor, *, group: int) -> Tensor:
    """log mean exp(-||z_i - z_j||^2 / D) over the pairs of each group, the mean over groups: ().

    The dispersive loss (Wang and He, 2025) of hidden tokens (B, N, D'), flattened to D = N D'. The
    group, and not the share of a process, is what is pushed apart: the loss is the same for every
    number of processes. Raises ConfigError where groups do not fill the batch.
    """
    if len(hidden) % group:
        raise ConfigError(
            f"objective.dispersive_group is {group}, which does not divide the {len(hidden)} "
            "images of a process: change one of them"
        )
    z = hidden.flatten(1).unflatten(0, (-1, group))
    squared = (z.unsqueeze(1) - z.unsqueeze(2)).square().mean(dim=3)
    return (-squared).flatten(1).logsumexp(dim=1).mean() - math.log(group**2)


@contextmanager
def hidden_tokens(network: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the tokens (B, N, D) after the first quarter of the blocks, where Wang and He look.

    One entry for each call of the network within. Raises ConfigError for a network without blocks,
    and at the end where no call was seen: compiled code runs past what looks into it, so call
    what :func:`eqm.network.uncompiled` gives.
    """
    blocks = getattr(uncompiled(network), "blocks", None)
    if blocks is None:
        raise ConfigError("the dispersive loss needs a transformer: it reads tokens of its blocks")
    seen: list[Tensor] = []
    block = blocks[max(0, len(blocks) // 4 - 1)]
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
    if not seen:
        raise ConfigError(
            "the dispersive loss saw no hidden tokens: compiled code runs past what looks into it. "
            "Leave the network uncompiled, or set objective.dispersive_weight to 0"
        )


# -- the way back to the weights ----------------------------------------------------------------


def backward(field: Field, at: Corrupted, *, scale: float, way: Way) -> Tensor:
    """Add the gradient of scale times the sum of losses to the weights' ``.grad``.

    Returns the loss of each sample, (B,), detached. ``way`` matters for explicit energies only.
    """
    if field.kind != "implicit" and way == "directional":
        return directional_backward(field, at, scale=scale)
    gradient = field.gradient(at.x, at.labels, at.gamma, create_graph=True)
    losses = loss_per_sample(gradient.float() if _is_half(gradient) else gradient, at.goal)
    # Each operation goes back in the precision it had forward; autocast would choose anew.
    with torch.autocast(at.x.device.type, enabled=False):
        (scale * losses.sum()).backward()
    return losses.detach()


def directional_backward(
    field: Field, at: Corrupted, *, scale: float, difference: float | None = None
) -> Tensor:
    """:func:`backward` of an explicit energy without a double backward.

    ``difference`` is the length of the step to either side in shares of the norm of x_gamma, which
    makes it a length of the landscape whatever the size of the residual; None takes DIFFERENCE.
    The error of the slope is O(step^2) from the landscape and O(rounding / step) from the numbers,
    so the two evaluations run in full precision, outside of autocast: bfloat16 would leave noise.
    Raises ConfigError for weights in half precision without a ``difference``.
    They go backward one after the other, so no two graphs are ever alive, and by halves of the
    batch, because the weights' gradients of those before are held beside each.
    """
    with frozen(field.network):
        gradient = field.gradient(at.x, at.labels, at.gamma)
    residual = (gradient - at.goal).detach()
    share = difference_for(residual.dtype) if difference is None else difference
    step = share * _norm(at.x) / _norm(residual).clamp(min=torch.finfo(residual.dtype).tiny)
    reach = _per_sample(step, residual) * residual
    # Losses are means over entries: 2 / D of <grad E, r>; the difference spans two steps.
    weight = scale / (residual[0].numel() * step)
    everyone = torch.arange(len(at.x), device=at.x.device)
    with torch.autocast(at.x.device.type, enabled=False):
        for half in everyone.chunk(2):
            labels = None if at.labels is None else at.labels[half]
            for side in (1, -1):
                energy = field.energy((at.x + side * reach)[half], labels, at.gamma[half])
                (side * weight[half] * energy).sum().backward()
    return residual.square().flatten(1).mean(dim=1)


def difference_for(dtype: torch.dtype) -> float:
    """DIFFERENCE of weights of a dtype. Raises ConfigError for half precision."""
    if dtype not in DIFFERENCE:
        raise ConfigError(
            f"the weights are {dtype}, in which the differences of objective.backward = "
            "'directional' are noise: keep them in float32, with train.precision = 'bfloat16' to "
            "compute in half precision, or set objective.backward = 'double'"
        )
    return DIFFERENCE[dtype]


@contextmanager
def frozen(network: object) -> Iterator[None]:
    """No weight of the network asks for a gradient: what needs that of x alone costs no more."""
    trained = (
        [p for p in network.parameters() if p.requires_grad]
        if isinstance(network, nn.Module)
        else []
    )
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1)).to(like.dtype)
