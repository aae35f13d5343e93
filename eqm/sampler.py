"""Samples by descent (section 3.3), until a budget or a stop rule.

    x    latents (B, ...)       gradient    a function of x alone; from data to noise
    k    updates so far         N samples in S slots

The released code's "250 steps" are 249 updates. Every field evaluation of every sample is
counted. A sample that has stopped or blown up stays where it is; since no sample sees another,
what becomes of one does not depend on its neighbours. :func:`descend` carries all samples to the
end together; :func:`found_in_slots` gives the place of one that has stopped to the next, which is
how adaptive compute saves time. Pure: knows no network, no labels, no files.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import TypeAlias

import torch
from torch import Tensor

from eqm.errors import ConfigError, DataError
from eqm.field import Gradient
from eqm.randomness import Stream, normal
from eqm.rules import Memory, Rule, refilled, shifted

# Norms below are those of what may move, and "noise" has the norm of unit noise, plus that of the
# noise that a rule adds.
EXPLODED = 50.0
"""A sample has diverged when its norm passes so many times that of its start plus noise, and"""
DISTANT = 10.0
"""so many times that of its first gradient on top: this tells how far away data are, in whatever
unit they come."""
STEEPENED = 10.0
"""Likewise when its gradient's norm passes so many times that of its first plus noise."""
SWINGS = 10
"""Likewise when so many gradients in a row turned against the one before without having become
shorter: a network's output is bounded, so steps that are too long make samples swing for ever
across what they should find, and not fly away."""
SHORTER = 0.99
LOUD = 0.5
"""Of the first gradient plus noise: shorter ones may turn while a sample settles."""
WIDE = 0.25
"""Of unit noise: shorter moves may turn. Optimisers whose moves do not shrink with the gradient
(RMSprop) end by swinging closely around what they found."""

Projection: TypeAlias = Callable[[Tensor], Tensor]
"""x (B, ...) -> the nearest point that satisfies a constraint, (B, ...), in the dtype of x.

One that holds entries where they are may say so by an attribute ``free``, a bool tensor that
broadcasts to (B, ...), True where x may move: as :class:`Known` has it. Then gradients are zero
where x is held, and norms, stop rules and marks of divergence are of the free entries alone.
Without it they are of all entries: nobody can tell which of them an arbitrary function holds.
"""


@dataclass(frozen=True)
class Look:
    """What a stop rule sees of the samples before they move."""

    x: Tensor
    """(B, ...)."""
    gradient: Tensor
    """(B, ...), as the rule of descent took it: ahead of x, where that looks ahead; zero in what
    the projection holds (see :data:`Projection`)."""
    gradient_norms: Tensor
    """(B,), of that."""
    updates: Tensor
    """(B,) int64: updates that each has had."""


StopRule: TypeAlias = Callable[[Look], Tensor]
"""Look -> (B,) bool: samples that shall stay where they are."""


@dataclass(frozen=True)
class GradientNormBelow:
    """Stop a sample when the norm of its gradient falls below a threshold (Algorithm 2).

    Where a rule looks ahead, so does the norm.
    """

    threshold: float

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ConfigError(f"threshold is {self.threshold}; it must be greater than 0")

    def __call__(self, look: Look) -> Tensor:
        """Which samples stop, (B,) bool."""
        return look.gradient_norms < self.threshold


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What happened along the way, at T of the updates."""

    updates: Tensor
    """(T,) int64."""
    path_lengths: Tensor
    """(T, B)."""
    energy_changes: Tensor
    """(T, B): since the start, as the work of the gradient along the path."""
    gradient_norms: Tensor
    """(T, B): of the last gradient taken; NaN at the start."""
    energies: Tensor | None
    """(T, B): of what is descended, guidance and weights of a composition included; None where that
    is no explicit energy (implicit fields, guidance of some channels alone, flow matching)."""


@dataclass(frozen=True, kw_only=True)
class Descent:
    """What a descent found."""

    latents: Tensor
    """(B, ...), in the dtype of the start."""
    evaluations: Tensor
    """(B,) int64: field evaluations of each sample; a guided or composed one counts once."""
    updates: Tensor
    """(B,) int64: moves of each sample."""
    gradient_norms: Tensor
    """(B,): norm of the last gradient that was evaluated for each sample; NaN where none was."""
    path_lengths: Tensor
    """(B,): sum of the lengths of all moves."""
    energy_changes: Tensor
    """(B,): work of the gradient along the path, the sum of <g, move>: for an explicit energy its
    change to first order in the step, for an implicit field the nearest thing to one."""
    stopped: Tensor
    """(B,) bool: samples that the stop rule ended."""
    diverged: Tensor
    """(B,) bool: samples that blew up, left at the last point before. They are not samples."""
    trace: Trace | None = None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """N samples to find, for any choice of them; indices are (S,) int64 from 0 to N - 1."""

    start: Callable[[Tensor], Tensor]
    """indices -> where they start, (S, ...)."""
    gradient: Callable[[Tensor], Gradient]
    """indices -> the gradient of those samples (their labels, their guidance)."""
    project: Callable[[Tensor], Projection] | None = None
    """indices -> the constraint of those samples."""
    numbers: Callable[[Tensor], Tensor] = lambda indices: indices
    """indices -> the names by which Langevin noise is drawn."""


@dataclass(frozen=True, kw_only=True)
class _State:
    x: Tensor
    memory: Memory
    active: Tensor
    evaluations: Tensor
    updates: Tensor
    norms: Tensor
    lengths: Tensor
    works: Tensor
    stopped: Tensor
    diverged: Tensor
    limit: Tensor
    """Norm of what is free of x past which a sample has blown up; the first gradient widens it."""
    steepest: Tensor
    """Norm of the gradient past which it has; NaN before the first."""
    gradient: Tensor
    """The last one, (B, ...)."""
    swings: Tensor
    """(B,) int64: gradients in a row that turned and did not become shorter."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What stays the same over a descent."""

    rule: Rule
    updates: int
    stop: StopRule | None


@dataclass(frozen=True, kw_only=True)
class _Constraint:
    """A projection, and which entries of x it holds where they are."""

    project: Projection | None
    held: Tensor | None
    """Bool that broadcasts to (B, ...); None where nothing is known to be held."""
    unit: Tensor | float
    """Norm of unit noise in the free entries: (B,) or (1,), or one for all."""

    def free(self, x: Tensor) -> Tensor:
        """X with zeros where it is held."""
        return x if self.held is None else x.masked_fill(self.held, 0)

    def of_free(self, gradient: Gradient) -> Gradient:
        """The gradient over the free entries: rules must not look where samples cannot go."""
        if self.held is None:
            return gradient

        def slope(x: Tensor, gamma: Tensor | None = None) -> Tensor:
            return self.free(gradient(x) if gamma is None else gradient(x, gamma))

        return slope


def _nearest(x: Tensor, project: Projection | None) -> Tensor:
    """What satisfies a constraint. Raises ConfigError for a projection to something else."""
    if project is None:
        return x
    there = project(x)
    if there.shape != x.shape or there.dtype != x.dtype:
        raise ConfigError(
            f"project maps {x.dtype} of shape {tuple(x.shape)} to {there.dtype} of shape "
            f"{tuple(there.shape)}: it must return the shape and dtype it is given"
        )
    return there


def _constraint(project: Projection | None, x: Tensor) -> _Constraint:
    """Of samples that are at x (B, ...). Raises ConfigError for a ``free`` that does not fit."""
    free = getattr(project, "free", None)
    if free is None:
        return _Constraint(project=project, held=None, unit=x[0].numel() ** 0.5)
    found = f"{free.dtype} of shape {tuple(free.shape)}" if isinstance(free, Tensor) else repr(free)
    if not (isinstance(free, Tensor) and free.dtype == torch.bool and _fits(free, x.shape)):
        raise ConfigError(
            f"what project.free says is {found}: give bool that broadcasts to {tuple(x.shape)}, "
            "True where x may move"
        )
    here = free.to(x.device).expand_as(x)
    return _Constraint(project=project, held=~here, unit=here.flatten(1).sum(dim=1).sqrt())


def _fits(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether it broadcasts to a shape."""
    sides = zip(reversed(tensor.shape), reversed(shape), strict=False)
    return tensor.dim() <= len(shape) and all(a in (1, b) for a, b in sides)


# -- all together -------------------------------------------------------------------------------


def descend(
    gradient: Gradient,
    start: Tensor,
    *,
    rule: Rule,
    updates: int,
    stop: StopRule | None = None,
    project: Projection | None = None,
    numbers: Tensor | None = None,
    check_every: int = 1,
    on_update: Callable[[int, Tensor], None] | None = None,
    trace_every: int | None = None,
    energy: Callable[[Tensor], Tensor] | None = None,
) -> Descent:
    """Descend from start (B, ...) for so many updates, each sample until its own stop.

    The evaluation that tells a sample to stop moves nothing and is counted. ``project`` is applied
    to the start and after every move (see :data:`Projection`). ``numbers`` (B,) int64 name the
    samples for Langevin noise.
    ``on_update(k, latents)`` is called with the start for k = 0 and after every update, until all
    have stopped. ``trace_every`` keeps a :class:`Trace`, with ``energy`` at its points (not counted
    as evaluations). Without ``stop`` nothing waits for the device; with it, every ``check_every``
    updates do. Raises DataError for a start that is not (B, ...) of floats, ConfigError for fewer
    than 0 updates and for intervals below 1, both for projections that do not fit.
    """
    _check(start, updates, check_every, 1 if trace_every is None else trace_every)
    plan = _Plan(rule=rule, updates=updates, stop=stop)
    tracer = _Tracer(trace_every, energy)
    tell = on_update or (lambda update, latents: None)
    with torch.no_grad():
        x = _nearest(start, project)
        constraint = _constraint(project, x)
        state = _begin(plan, constraint, x, numbers)
        tell(0, state.x)
        tracer.look(0, state)
        for update in range(1, updates + 1):
            state = _update(plan, state, gradient, constraint)
            due = stop is not None and update % check_every == 0 and update < updates
            if due and not bool(state.active.any()):
                break
            tell(update, state.x)
            tracer.look(update, state)
        return replace(_descent(state), trace=tracer.trace())


def _begin(plan: _Plan, constraint: _Constraint, start: Tensor, numbers: Tensor | None) -> _State:
    """State of samples whose start (B, ...) satisfies their constraint."""
    x = start.clone()
    finite, size = norms(x).isfinite(), norms(constraint.free(x))
    count, zero = torch.zeros_like(finite, dtype=torch.int64), torch.zeros_like(size)
    named = torch.arange(len(x), device=x.device) if numbers is None else numbers
    return _State(
        x=x,
        memory=plan.rule.begin(x, named.to(x.device)),
        active=finite & (plan.updates > 0),
        evaluations=count,
        updates=count,
        norms=torch.full_like(size, torch.nan),
        lengths=zero,
        works=zero,
        stopped=torch.zeros_like(finite),
        diverged=~finite,
        limit=EXPLODED * (size + constraint.unit),
        steepest=torch.full_like(size, torch.nan),
        gradient=torch.zeros_like(x),
        swings=count,
    )


def _update(plan: _Plan, state: _State, gradient: Gradient, constraint: _Constraint) -> _State:
    """Move those that are active, unless their gradient tells them to stop."""
    move = plan.rule.move(constraint.of_free(gradient), state.x, state.memory)
    norm, g = norms(move.gradient), move.gradient
    stopping = torch.zeros_like(state.active)
    if plan.stop is not None:
        stopping = state.active & _told(plan.stop(Look(state.x, g, norm, state.updates)), norm)
    moving = state.active & ~stopping
    there, memory = move.x, move.memory
    if constraint.project is not None:
        there = _nearest(move.x, constraint.project)
        memory = shifted(memory, there - move.x)
    step = (there - state.x).to(state.lengths.dtype)
    size, length = norms(constraint.free(there)), norms(step)
    state = _bounded(state, norm, constraint.unit, move.noise)
    swung = _swung(state, g, norm) & (length > WIDE * constraint.unit)
    swings = torch.where(swung, state.swings + 1, 0)
    # Written so that a norm that is not a number is a norm that is too large.
    sound = size.isfinite() & (size <= state.limit) & (norm <= state.steepest) & (swings < SWINGS)
    moved = moving & sound
    work = (g * step).flatten(1).sum(dim=1)
    return replace(
        state,
        x=torch.where(moved.view(-1, *[1] * (g.dim() - 1)), there, state.x),
        memory=memory,
        active=moved & (state.updates + 1 < plan.updates),
        evaluations=state.evaluations + plan.rule.evaluations * state.active,
        updates=state.updates + moved,
        norms=torch.where(state.active, norm, state.norms),
        lengths=torch.where(moved, state.lengths + length, state.lengths),
        works=torch.where(moved, state.works + work, state.works),
        stopped=state.stopped | stopping,
        diverged=state.diverged | (moving & ~sound),
        gradient=g,
        swings=swings,
    )


def _told(stopping: object, norm: Tensor) -> Tensor:
    """What a stop rule said, (B,) bool. Raises ConfigError for something else."""
    if isinstance(stopping, Tensor) and stopping.dtype == torch.bool:
        if stopping.shape == norm.shape:
            return stopping
        found = f"bool of shape {tuple(stopping.shape)}"
    else:
        found = _kind(stopping)
    raise ConfigError(
        f"the stop rule says {found}: it must say for each of {len(norm)} samples whether it "
        "stops, as look.gradient_norms < 10 does"
    )


def _bounded(state: _State, norm: Tensor, unit: Tensor | float, noise: float) -> _State:
    """The bounds of samples that see their first gradient, of these norms (B,)."""
    first, loud = state.steepest.isnan(), noise * unit
    farther = state.limit + EXPLODED * loud + DISTANT * norm
    return replace(
        state,
        limit=torch.where(first, farther, state.limit),
        steepest=torch.where(first, STEEPENED * (norm + unit + loud), state.steepest),
    )


def _swung(state: _State, g: Tensor, norm: Tensor) -> Tensor:
    """Whether gradients (B, ...) turned against the last ones and are not shorter, (B,) bool."""
    turned = (g * state.gradient).flatten(1).sum(dim=1) < 0
    loud = norm > LOUD / STEEPENED * state.steepest
    return turned & loud & (norm > SHORTER * state.norms)


def _descent(state: _State) -> Descent:
    return Descent(
        latents=state.x,
        evaluations=state.evaluations,
        updates=state.updates,
        gradient_norms=state.norms,
        path_lengths=state.lengths,
        energy_changes=state.works,
        stopped=state.stopped,
        diverged=state.diverged,
    )


class _Tracer:
    """Collects the points of a trace; nothing where none is wanted."""

    def __init__(self, every: int | None, energy: Callable[[Tensor], Tensor] | None) -> None:
        self.every, self.energy = every, energy
        self.rows: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self.energies: list[Tensor] = []

    def look(self, update: int, state: _State) -> None:
        """Keep a point where one is due."""
        if self.every is None or update % self.every:
            return
        self.rows.append((update, state.lengths, state.works, state.norms))
        if self.energy is not None:
            self.energies.append(self.energy(state.x))

    def trace(self) -> Trace | None:
        """All points."""
        if self.every is None:
            return None
        updates, lengths, works, gradient_norms = zip(*self.rows, strict=True)
        return Trace(
            updates=torch.tensor(updates),
            path_lengths=torch.stack(lengths),
            energy_changes=torch.stack(works),
            gradient_norms=torch.stack(gradient_norms),
            energies=torch.stack(self.energies) if self.energies else None,
        )


# -- in slots -----------------------------------------------------------------------------------


def descend_in_slots(
    problem: Problem,
    count: int,
    *,
    slots: int,
    rule: Rule,
    updates: int,
    stop: StopRule | None = None,
    check_every: int = 1,
    on_finished: Callable[[int], None] | None = None,
) -> Descent:
    """Find ``count`` samples, ``slots`` at a time: one that has stopped makes room for the next.

    ``on_finished(samples)`` is called with how many have been found so far. Raises as
    :func:`found_in_slots` does, and ConfigError for fewer than 1 sample.
    """
    if count < 1:
        raise ConfigError(f"count is {count}; it must be at least 1")
    settings = {"rule": rule, "updates": updates, "stop": stop, "check_every": check_every}
    whole, done = None, 0
    for indices, some in found_in_slots(problem, range(count), slots=slots, **settings):
        whole = _empty(some, count) if whole is None else whole
        _put(whole, indices, some)
        done += len(indices)
        if on_finished is not None:
            on_finished(done)
    assert whole is not None
    return whole


@torch.no_grad()
def found_in_slots(
    problem: Problem,
    indices: Sequence[int],
    *,
    slots: int,
    rule: Rule,
    updates: int,
    stop: StopRule | None = None,
    check_every: int = 1,
) -> Iterator[tuple[list[int], Descent]]:
    """Samples of a problem as they are found, with their indices; they begin in the order given.

    The batch has ``slots`` rows from the first update to the last, be there samples for them or
    not. So a sample's bits depend on the number of slots (through the kernels that this shape is
    computed with) and on nothing else: not on its slot, its neighbours, its turn, or how many are
    asked for. Every ``check_every`` updates the device is asked who has stopped; between, those
    wait where they are. Raises as :func:`descend` does, and ConfigError for fewer than 1 slot.
    """
    if slots < 1:
        raise ConfigError(f"slots is {slots}; it must be at least 1")
    if not indices:
        return
    plan = _Plan(rule=rule, updates=updates, stop=stop)
    waiting = iter(indices)
    holds: list[int | None] = list(islice(waiting, slots))
    holds += [None] * (slots - len(holds))
    # Slots without a sample of their own follow the first one, and nobody looks at them.
    held = torch.tensor([indices[0] if holder is None else holder for holder in holds])
    start = problem.start(held)
    _check(start, updates, check_every, 1)
    table = _Table(problem, plan, held, start)
    while any(holder is not None for holder in holds):
        for _ in range(check_every):
            table.advance()
        over = table.finished(holds)
        if not over:
            continue
        there = [holder for holder in (holds[slot] for slot in over) if holder is not None]
        some = table.found(over)
        _refill(table, holds, over, waiting)
        yield there, some


class _Table:
    """The slots: which sample sits in each, and its state."""

    def __init__(self, problem: Problem, plan: _Plan, held: Tensor, start: Tensor) -> None:
        self.problem, self.plan, self.held = problem, plan, held
        self.state = self.state_of(held, start)
        self.seat()

    def state_of(self, held: Tensor, start: Tensor) -> _State:
        """State of samples that are about to start."""
        project, numbers = self.project_of(held), self.problem.numbers(held).to(start.device)
        x = _nearest(start, project)
        return _begin(self.plan, _constraint(project, x), x, numbers)

    def project_of(self, held: Tensor) -> Projection | None:
        """Constraint of samples."""
        return None if self.problem.project is None else self.problem.project(held)

    def seat(self) -> None:
        """Look up gradient and constraint of those that sit here now."""
        self.gradient = self.problem.gradient(self.held)
        self.constraint = _constraint(self.project_of(self.held), self.state.x)

    def advance(self) -> None:
        """One update."""
        self.state = _update(self.plan, self.state, self.gradient, self.constraint)

    def finished(self, holds: list[int | None]) -> list[int]:
        """Slots with a sample that moves no more."""
        active = self.state.active.tolist()
        return [s for s, holder in enumerate(holds) if holder is not None and not active[s]]

    def found(self, slots: list[int]) -> Descent:
        """What is in some slots."""
        here = _descent(self.state)
        at = torch.tensor(slots, device=here.latents.device)
        rows = {f.name: getattr(here, f.name)[at] for f in fields(Descent) if f.name != "trace"}
        return Descent(**rows)

    def replace(self, slots: list[int], samples: list[int]) -> None:
        """Seat new samples."""
        new, where = torch.tensor(samples), torch.tensor(slots)
        fresh = self.state_of(new, self.problem.start(new))
        self.held = self.held.index_copy(0, where, new)
        where = where.to(fresh.x.device)
        changed = {
            f.name: getattr(self.state, f.name).index_copy(0, where, getattr(fresh, f.name))
            for f in fields(_State)
            if f.name != "memory"
        }
        memory = refilled(self.state.memory, where, fresh.memory)
        self.state = _State(memory=memory, **changed)
        self.seat()


def _refill(
    table: _Table, holds: list[int | None], over: list[int], waiting: Iterator[int]
) -> None:
    """Seat those that wait in slots that are free; slots that stay free hold nobody."""
    coming = list(islice(waiting, len(over)))
    for slot in over:
        holds[slot] = None
    for slot, sample in zip(over, coming, strict=False):
        holds[slot] = sample
    if coming:
        table.replace(over[: len(coming)], coming)


def _empty(like: Descent, count: int) -> Descent:
    """Room for so many samples."""
    room = {
        f.name: getattr(like, f.name).new_empty((count, *getattr(like, f.name).shape[1:]))
        for f in fields(Descent)
        if f.name != "trace"
    }
    return Descent(**room)


def _put(whole: Descent, indices: list[int], some: Descent) -> None:
    """Write samples to the places of their indices."""
    where = torch.tensor(indices, device=some.latents.device)
    for f in fields(Descent):
        if f.name != "trace":
            getattr(whole, f.name)[where] = getattr(some, f.name)


# -- helpers ------------------------------------------------------------------------------------


def norms(x: Tensor) -> Tensor:
    """Euclidean norm of each sample, (B,), in float32 at least."""
    return x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)).norm(dim=1)


def start_noise(
    seeds: Tensor,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Where samples start, (B, *shape): the noise of sample s is a function of s alone.

    ``seeds`` (B,) int64 are the numbers of the samples.
    """
    return normal(0, Stream.SAMPLE_NOISE, seeds.to(device), shape, dtype)


@dataclass(frozen=True)
class Known:
    """Inpainting as a constraint: where ``mask`` is True, x is ``values``, and stays it.

    Both are (B, ...) or broadcast to it, mask in bool, values in the dtype of x; they may lie on
    another device. Where mask is False, values are not read. Raises DataError for other dtypes, and
    when it is used for x of a shape or dtype that does not fit.
    """

    mask: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Tensor) or self.mask.dtype != torch.bool:
            raise DataError(
                f"the mask of Known is {_kind(self.mask)}: give a tensor of bool, True where "
                "values are known"
            )
        if not isinstance(self.values, Tensor) or not self.values.is_floating_point():
            raise DataError(
                f"the values of Known are {_kind(self.values)}: give a tensor in the dtype of the "
                "latents"
            )

    @property
    def free(self) -> Tensor:
        """Where x may move; the shape of the mask."""
        return ~self.mask

    def __call__(self, x: Tensor) -> Tensor:
        """The nearest point that agrees with what is known."""
        self._check(tuple(x.shape), x.dtype)
        return torch.where(self.mask.to(x.device), self.values.to(x.device), x)

    def spread(
        self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device | str
    ) -> "Known":
        """The same on a device, with mask and values of this shape, (B, ...).

        Raises DataError for what does not fit, and for known values that are not finite.
        """
        self._check(shape, dtype)
        mask, values = (t.to(device).expand(shape) for t in (self.mask, self.values))
        odd = (mask & ~values.isfinite()).flatten(1).any(dim=1).nonzero()
        if len(odd):
            raise DataError(
                f"the values of Known have NaN or infinite entries where sample {int(odd[0])} of "
                f"{len(mask)} is known: mend them, or set the mask to False there"
            )
        return Known(mask, values)

    def __getitem__(self, samples: Tensor) -> "Known":
        """What is known of some samples (S,) int64, where each has a mask and values."""
        at = samples.to(self.mask.device)
        return Known(self.mask[at], self.values[at])

    def _check(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        for name, tensor in (("mask", self.mask), ("values", self.values)):
            if not _fits(tensor, shape):
                raise DataError(
                    f"{name} of Known has shape {tuple(tensor.shape)}: give {shape}, or what "
                    "broadcasts to it"
                )
        if self.values.dtype != dtype:
            raise DataError(
                f"values of Known are {self.values.dtype}, and latents {dtype}: convert them, as "
                f"values.to({dtype})"
            )


def _kind(thing: object) -> str:
    return str(thing.dtype) if isinstance(thing, Tensor) else type(thing).__name__


def _check(start: Tensor, updates: int, *intervals: int) -> None:
    if start.dim() < 2 or not start.is_floating_point():
        raise DataError(f"start is {start.dtype} of shape {tuple(start.shape)}; give (B, ...)")
    if updates < 0:
        raise ConfigError(f"updates is {updates}; it must be 0 or greater")
    for interval in intervals:
        if interval < 1:
            raise ConfigError(f"an interval is {interval} updates; it must be at least 1")
