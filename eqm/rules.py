"""Rules of descent: where the gradient is taken, and where a sample goes from there.

    x    latents (B, ...)       eta  step size     mu  momentum
    k    updates so far         g    gradient: from data to noise, so every rule subtracts it

A rule is a value. What it remembers of each sample is a :data:`Memory` that eqm.sampler carries,
with the sample as the first index of everything, so that a sample can be replaced by another.
Energies are descended by true rules of optimisation; :class:`Euler` and :class:`Heun` read the
same gradient as the velocity of an ODE over gamma (appendix D), which is how flow matching samples.
Pure.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias, cast

import torch
from torch import Tensor

from eqm.errors import ConfigError
from eqm.field import Gradient
from eqm.randomness import Stream, normal

Memory: TypeAlias = dict[str, Tensor | list[torch.optim.Optimizer]]
"""What a rule remembers of each sample: tensors (B, ...), or lists of B things."""

LANGEVIN_UPDATES = 2**20
"""Updates that have noise of their own; sample numbers are below 2**43 for that."""
WARMTH = 3.0
"""Of sqrt(T / eta): what gradients of Langevin may be by its noise alone, up to eta k = 1.6."""


@dataclass(frozen=True)
class Move:
    """One update of all samples."""

    x: Tensor
    """Where it leads, (B, ...)."""
    gradient: Tensor
    """The gradient that was taken first, (B, ...)."""
    memory: Memory
    noise: float = 0.0
    """Root mean square of the gradient's entries that is owed to the noise of the rule alone."""


class Rule(Protocol):
    """How a sample descends."""

    evaluations: ClassVar[int]
    """Field evaluations an update takes."""

    def begin(self, x: Tensor, numbers: Tensor) -> Memory:
        """Memory of samples that are about to start at x (B, ...); numbers (B,) int64 name them."""
        ...

    def move(self, gradient: Gradient, x: Tensor, memory: Memory) -> Move:
        """One update from x; it changes no argument, except optimisers in its memory."""
        ...


class _Memoryless:
    """A rule that needs nothing but x."""

    def begin(self, x: Tensor, numbers: Tensor) -> Memory:
        """Nothing."""
        return {}


@dataclass(frozen=True, kw_only=True)
class _Momentum:
    """A rule that remembers the last move, x_k - x_{k-1}, zero at first (see :func:`shifted`)."""

    evaluations: ClassVar[int] = 1
    step_size: float
    momentum: float

    def __post_init__(self) -> None:
        _positive("step_size", self.step_size)
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum is {self.momentum}; it must be at least 0 and less than 1")

    def begin(self, x: Tensor, numbers: Tensor) -> Memory:
        """No move yet."""
        return {"moved": torch.zeros_like(x)}


class _Counted:
    """A rule that knows how many updates a sample has had."""

    def begin(self, x: Tensor, numbers: Tensor) -> Memory:
        """None yet."""
        return {"k": torch.zeros(len(x), dtype=torch.int64, device=x.device), "number": numbers}


@dataclass(frozen=True, kw_only=True)
class GradientDescent(_Memoryless):
    """x_{k+1} = x_k - eta g(x_k)."""

    evaluations: ClassVar[int] = 1
    step_size: float

    def __post_init__(self) -> None:
        _positive("step_size", self.step_size)

    def move(self, gradient: Gradient, x: Tensor, memory: Memory) -> Move:
        """See :class:`Rule`."""
        g = gradient(x)
        return Move(x - self.step_size * g, g, memory)


@dataclass(frozen=True, kw_only=True)
class NAG(_Momentum):
    """x_{k+1} = x_k - eta g(x_k + mu (x_k - x_{k-1})), as in the paper and its code.

    Not torch.optim.SGD(nesterov=True): that one accumulates a velocity, this one does not.
    """

    def move(self, gradient: Gradient, x: Tensor, memory: Memory) -> Move:
        """See :class:`Rule`."""
        g = gradient(x + self.momentum * _tensor(memory, "moved"))
        step = -self.step_size * g
        return Move(x + step, g, {"moved": step})


@dataclass(frozen=True, kw_only=True)
class HeavyBall(_Momentum):
    """x_{k+1} = x_k - eta g(x_k) + mu (x_k - x_{k-1}) (Polyak, 1964)."""

    def move(self, gradient: Gradient, x: Tensor, memory: Memory) -> Move:
        """See :class:`Rule`."""
        g = gradient(x)
        step = self.momentum * _tensor(memory, "moved") - self.step_size * g
        return Move(x + step, g, {"moved": step})


@dataclass(frozen=True, kw_only=True)
class BarzilaiBorwein:
    """Gradient descent whose step size is read off the last move (Barzilai and Borwein, 1988).

    eta_k = <s, s> / <s, y> with s = x_k - x_{k-1} and y = g_k - g_{k-1}, of each sample alone, kept
    between ``shortest`` and ``longest``; the longest where the landscape curves down. The first
    step is ``step_size``. Near a datum the landscape is a spring of stiffness multiplier / (1 - a),
    so its inverse, 0.05 for the paper's c, is a natural ``longest``.
    """

    evaluations: ClassVar[int] = 1
    step_size: float
    shortest: float = 1e-4
    longest: float = 0.05

    def __post_init__(self) -> None:
        for name in ("step_size", "shortest", "longest"):
            _positive(name, getattr(self, name))
        if self.shortest > self.longest:
            raise ConfigError(f"shortest is {self.shortest}; longest is less: {self.longest}")

    def begin(self, x: Tensor, numbers: Tensor) -> Memory:
        """Neither a place nor a gradient before this one."""
        nothing = torch.full_like(x, torch.nan)
        return {"x": nothing, "g": nothing}

    def move(self, gradient: Gradient, x: Tensor, memory: Memory) -> Move:
        """See :class:`Rule`."""
        g = gradient(x)
        step_size = self._step_size(x - _tensor(memory, "x"), g - _tensor(memory, "g"))
        return Move(x - step_size.view(-1, *[1] * (x.dim() - 1)) * g, g, {"x": x, "g": g})

    def _step_size(self, s: Tensor, y: Tensor) -> Tensor:
        curvature = (s * y).flatten(1).sum(dim=1)
        found = s.square().flatten(1).sum(dim=1) / curvature
        found = torch.where(curvature > 0, found, self.longest)
        found = found.clamp(self.shortest, self.longest)
        # Before the first move everything is NaN, which no comparison admits.
        return torch.where(curvature.isnan(), self.step_size, found)


@dataclass(frozen=True, kw_only=True)
class Langevin(_Counted):
    """x_{k+1} = x_k - eta g(x_k) + sqrt(2 eta T) xi, with xi a function of (sample, k)."""

    evaluations: ClassVar[int] = 1
    step_size: float
    temperature: float

    def __post_init__(self) -> None:
        _positive("step_size", self.step_size)
        if not self.temperature >= 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 or greater")

    def move(self, gradient: Gradient, x: Tensor, memory: Memory) -> Move:
        """See :class:`Rule`."""
        g, k, number = gradient(x), _tensor(memory, "k"), _tensor(memory, "number")
        names = number * LANGEVIN_UPDATES + k % LANGEVIN_UPDATES
        xi = normal(0, Stream.LANGEVIN, names, tuple(x.shape[1:]), x.dtype)
        reach = (2 * self.step_size * self.temperature) ** 0.5
        there = x - self.step_size * g + reach * xi
        # At rest in a spring of stiffness k it is sqrt(2 k T / (2 - eta k)), and eta k < 2.
        noise = WARMTH * (self.temperature / self.step_size) ** 0.5
        return Move(there, g, {"k": k + 1, "number": number}, noise)


@dataclass(frozen=True, kw_only=True)
class Euler(_Counted):
    """The ODE dx = -g dgamma by Euler's rule: x <- x - h g(x, gamma), gamma = k h.

    Flow matching goes from gamma 0 to 1: ``updates`` times ``step_size`` is 1, and eqm.sample
    refuses another end. EqM ignores gamma, so there it is gradient descent, which may go any way.
    A rule alone does not know the updates: past 1, gamma stays 1.
    """

    evaluations: ClassVar[int] = 1
    step_size: float

    def __post_init__(self) -> None:
        _positive("step_size", self.step_size)

    def move(self, gradient: Gradient, x: Tensor, memory: Memory) -> Move:
        """See :class:`Rule`."""
        k = _tensor(memory, "k")
        g = gradient(x, self.gamma(k, x.dtype))
        return Move(x - self.step_size * g, g, {**memory, "k": k + 1})

    def gamma(self, k: Tensor, dtype: torch.dtype) -> Tensor:
        """Noise level after k updates, (B,): 0 is noise, 1 is data."""
        return (k.to(torch.promote_types(dtype, torch.float32)) * self.step_size).clamp(max=1)


@dataclass(frozen=True, kw_only=True)
class Heun(Euler):
    """The same ODE by Heun's rule, of second order: the mean of the slopes at both ends."""

    evaluations: ClassVar[int] = 2

    def move(self, gradient: Gradient, x: Tensor, memory: Memory) -> Move:
        """See :class:`Rule`."""
        k = _tensor(memory, "k")
        g = gradient(x, self.gamma(k, x.dtype))
        there = gradient(x - self.step_size * g, self.gamma(k + 1, x.dtype))
        return Move(x - self.step_size / 2 * (g + there), g, {**memory, "k": k + 1})


@dataclass(frozen=True)
class Optimiser:
    """Any optimiser of torch.optim: ``Optimiser(torch.optim.Adam, lr=0.01)``.

    Each sample is a parameter with an optimiser of its own, so what is learnt of one (Adam's
    moments, LBFGS's history) touches no other. Optimisers that need a closure get one that tells
    the gradient where they are; those that would look elsewhere within a step (LBFGS with
    ``max_iter`` above 1 or a line search) are not for this. Torch's own Nesterov is
    ``Optimiser(torch.optim.SGD, lr=..., momentum=..., nesterov=True)``.

    Raises ConfigError for what is no optimiser of torch, and for such an LBFGS.
    """

    evaluations: ClassVar[int] = 1
    kind: type[torch.optim.Optimizer]
    settings: tuple[tuple[str, object], ...]

    def __init__(self, kind: type[torch.optim.Optimizer], **settings: object) -> None:
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            raise ConfigError(
                f"kind is a {type(kind).__name__}: give a class of torch.optim and its settings, "
                "as Optimiser(torch.optim.Adam, lr=0.01)"
            )
        if issubclass(kind, torch.optim.LBFGS):
            settings = {"max_iter": 1, **settings}
            if settings["max_iter"] != 1 or settings.get("line_search_fn") is not None:
                raise ConfigError(
                    "LBFGS takes one evaluation an update here: max_iter=1, no line search"
                )
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "settings", tuple(sorted(settings.items())))

    def begin(self, x: Tensor, numbers: Tensor) -> Memory:
        """A parameter and an optimiser for each sample."""
        make = cast("Callable[..., torch.optim.Optimizer]", self.kind)
        # A list of settings, and not of names: torch's optimisers check what they are given.
        return {"optimisers": [make([_parameter(row)], **dict(self.settings)) for row in x]}

    def move(self, gradient: Gradient, x: Tensor, memory: Memory) -> Move:
        """See :class:`Rule`."""
        g, places = gradient(x), []
        optimisers = cast("list[torch.optim.Optimizer]", memory["optimisers"])
        for optimiser, at, slope in zip(optimisers, x, g, strict=True):
            (parameter,) = optimiser.param_groups[0]["params"]
            parameter.copy_(at)
            parameter.grad = slope.clone()
            optimiser.step(lambda: 0.0)
            places.append(parameter.detach().clone())
        return Move(torch.stack(places), g, memory)


def _parameter(row: Tensor) -> Tensor:
    return torch.nn.Parameter(row.detach().clone())


def shifted(memory: Memory, shift: Tensor) -> Memory:
    """Memory of samples that something moved by ``shift`` (B, ...) after the rule had moved them.

    The last move, of rules that remember it, is then the whole way: momentum does not go on
    pushing against a constraint. :class:`BarzilaiBorwein` sees where samples really are.
    """
    if "moved" not in memory:
        return memory
    return {**memory, "moved": _tensor(memory, "moved") + shift}


def refilled(memory: Memory, slots: Tensor, fresh: Memory) -> Memory:
    """Memory in which the samples in ``slots`` (S,) int64 are those of ``fresh``."""
    found: Memory = {}
    for name, values in memory.items():
        news = fresh[name]
        if isinstance(values, Tensor):
            found[name] = values.index_copy(0, slots, cast(Tensor, news))
        else:
            coming = cast("list[torch.optim.Optimizer]", news)
            of_slot = dict(zip(slots.tolist(), coming, strict=True))
            found[name] = [of_slot.get(i, kept) for i, kept in enumerate(values)]
    return found


def _tensor(memory: Memory, name: str) -> Tensor:
    return cast(Tensor, memory[name])


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name} is {value}; it must be greater than 0")
