"""Samples by descent (section 3.3): x <- x - eta gradient, until a budget or a stop rule.

    x    latents (B, ...)       eta  step size     mu  momentum
    k    updates so far         gradient           a function of x alone; from data to noise

The released code's "250 steps" are 249 updates. Every field evaluation of every sample is
counted. A sample that has stopped or blown up stays where it is; since no sample sees another,
what becomes of one does not depend on its neighbours. Pure: knows no network, no labels, no
files.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eqm.randomness import Stream, normal

EXPLODED = 1000.0
"""A sample has diverged when its norm passes so many times that of its start plus unit noise."""


@dataclass(frozen=True, kw_only=True)
class GradientDescent:
    """x_{k+1} = x_k - eta gradient(x_k)."""

    step_size: float

    def __post_init__(self) -> None:
        _check_step_size(self.step_size)

    def lookahead(self, x: Tensor, moved: Tensor) -> Tensor:
        """Where the gradient is taken: at x."""
        return x


@dataclass(frozen=True, kw_only=True)
class NAG:
    """x_{k+1} = x_k - eta gradient(x_k + mu (x_k - x_{k-1})), as in the paper and its code.

    Not torch.optim.SGD(nesterov=True): that one accumulates a velocity, this one does not.
    """

    step_size: float
    momentum: float

    def __post_init__(self) -> None:
        _check_step_size(self.step_size)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must be at least 0 and less than 1")

    def lookahead(self, x: Tensor, moved: Tensor) -> Tensor:
        """Where the gradient is taken: ahead of x, by momentum times the last move."""
        return x + self.momentum * moved


Rule = GradientDescent | NAG


@dataclass(frozen=True)
class GradientNormBelow:
    """Stop a sample when the norm of its gradient falls below a threshold (Algorithm 2).

    Where a rule looks ahead, so does the norm.
    """

    threshold: float

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold is {self.threshold}; it must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class Descent:
    """What a descent found."""

    latents: Tensor
    """(B, ...), in the dtype of the start."""
    evaluations: Tensor
    """(B,) int64: field evaluations of each sample."""
    gradient_norms: Tensor
    """(B,): norm of the last gradient that was evaluated for each sample; NaN where none was."""
    diverged: Tensor
    """(B,) bool: samples that blew up, left at the last point before. They are not samples."""


@dataclass(frozen=True, kw_only=True)
class _State:
    x: Tensor
    moved: Tensor
    """x_k - x_{k-1}."""
    active: Tensor
    evaluations: Tensor
    norms: Tensor
    diverged: Tensor


def descend(
    gradient: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    rule: Rule,
    updates: int,
    stop: GradientNormBelow | None = None,
    on_update: Callable[[int, Tensor], None] | None = None,
) -> Descent:
    """Descend from start (B, ...) for so many updates, each sample until its own stop.

    An update takes one evaluation of the gradient; the one that tells a sample to stop moves
    nothing and is counted. ``on_update(k, latents)`` is called with the start for k = 0 and after
    every update, until all samples have stopped. Without ``stop`` nothing waits for the device.
    Raises ValueError for a start that is not (B, ...) of floats and for fewer than 0 updates.
    """
    if start.dim() < 2 or not start.is_floating_point():
        raise ValueError(f"start is {start.dtype} of shape {tuple(start.shape)}; give (B, ...)")
    if updates < 0:
        raise ValueError(f"updates is {updates}; it must be 0 or greater")
    tell = on_update or (lambda update, latents: None)
    with torch.no_grad():
        state = _begin(start)
        limit = EXPLODED * (norms(start) + start[0].numel() ** 0.5)
        tell(0, state.x)
        for update in range(1, updates + 1):
            g = gradient(rule.lookahead(state.x, state.moved))
            state = _update(state, g, rule.step_size, stop, limit)
            if stop is not None and not bool(state.active.any()):
                break
            tell(update, state.x)
    return Descent(
        latents=state.x,
        evaluations=state.evaluations,
        gradient_norms=state.norms,
        diverged=state.diverged,
    )


def _begin(start: Tensor) -> _State:
    size = norms(start)
    finite = size.isfinite()
    return _State(
        x=start.clone(),
        moved=torch.zeros_like(start),
        active=finite,
        evaluations=torch.zeros_like(finite, dtype=torch.int64),
        norms=torch.full_like(size, torch.nan),
        diverged=~finite,
    )


def _update(
    state: _State, g: Tensor, step_size: float, stop: GradientNormBelow | None, limit: Tensor
) -> _State:
    """Move those that are active by the gradient g, unless it tells them to stop."""
    norm = norms(g)
    moving = state.active if stop is None else state.active & ~(norm < stop.threshold)
    step = -step_size * g
    size = norms(state.x + step)
    # Written so that a norm that is not a number is a norm that is too large.
    sound = size.isfinite() & (size <= limit)
    active = moving & sound
    where = active.view(-1, *[1] * (g.dim() - 1))
    return _State(
        x=torch.where(where, state.x + step, state.x),
        moved=torch.where(where, step, state.moved),
        active=active,
        evaluations=state.evaluations + state.active,
        norms=torch.where(state.active, norm, state.norms),
        diverged=state.diverged | (moving & ~sound),
    )


def norms(x: Tensor) -> Tensor:
    """Euclidean norm of each sample, (B,), in float32 at least."""
    return x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)).norm(dim=1)


def start_noise(
    seeds: Tensor, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Where samples start, (B, *shape): the noise of sample s is a function of s alone.

    ``seeds`` (B,) int64 are the numbers of the samples.
    """
    return normal(0, Stream.SAMPLE_NOISE, seeds.to(device), shape, dtype)


def _check_step_size(step_size: float) -> None:
    if not step_size > 0:
        raise ValueError(f"step_size is {step_size}; it must be greater than 0")
