"""What a model is used for: sampling, composing, inpainting, cleaning, scoring.

    out = eqm.sample(model, labels=[3, 7], seeds=[0, 1])
    out = eqm.sample(model, start=noisy)                          # no noise level is asked for
    out = eqm.sample(model, seeds=range(8), project=eqm.Known(mask, values))
    out = eqm.sample(eqm.compose((model, 3, 1.0), (model, 5, 1.0)), seeds=range(8))
    out = eqm.sample(model, seeds=range(10_000), stop=eqm.GradientNormBelow(10.0), slots=64)
    eqm.score(model, images_as_latents)                           # high where out of distribution

Every part of it is a descent on the landscape (section 3.3, appendix B). Called by people,
and by generate, glimpse, outliers, serving and flows.models.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from eqm import field, rules, sampler
from eqm.autoencoder import Autoencoder
from eqm.config import LARGEST_SAMPLE_SEED, SamplerConfig
from eqm.errors import ConfigError, DataError, require
from eqm.field import Gradient
from eqm.model import Labels, Model, ModelSpec
from eqm.precision import check_products, products_in
from eqm.sampler import Descent, Known, Problem, Projection, StopRule

Precision: TypeAlias = Literal["float32", "tf32", "bfloat16"]
"""Of a network's products."""
SLACK = 1e-3
"""Of gamma: step sizes may be rounded, and ends of the ODE are 1 to this."""


def rule_of(config: SamplerConfig) -> rules.Rule:
    """The descent rule that a config names."""
    step_size, momentum = config.step_size, config.momentum
    made: dict[str, Callable[[], rules.Rule]] = {
        "gd": lambda: rules.GradientDescent(step_size=step_size),
        "nag": lambda: rules.NAG(step_size=step_size, momentum=momentum),
        "heavy-ball": lambda: rules.HeavyBall(step_size=step_size, momentum=momentum),
        "barzilai-borwein": lambda: rules.BarzilaiBorwein(step_size=step_size),
        "adam": lambda: rules.Optimiser(torch.optim.Adam, lr=step_size),
        "euler": lambda: rules.Euler(step_size=step_size),
        "heun": lambda: rules.Heun(step_size=step_size),
    }
    return made[config.rule]()


def stop_of(config: SamplerConfig) -> StopRule | None:
    """The stop rule that a config names."""
    return None if config.stop_below is None else sampler.GradientNormBelow(config.stop_below)


# -- composition --------------------------------------------------------------------------------


class Composition:
    """The weighted sum of the landscapes of several labels or models, over the same latents.

    Each part is (model, label, weight); label None is the null label, so guidance of scale s is
    the parts (model, label, s) and (model, None, 1 - s). Raises DataError where there are no
    parts, and for models whose latents differ in shape or whitening.
    """

    def __init__(self, *parts: tuple[Model, int | None, float]) -> None:
        if not parts:
            raise DataError("a composition needs at least one (model, label, weight)")
        self.parts = parts
        self.first = parts[0][0]
        for model, label, weight in parts:
            self._check(model, weight)
            model.checked_labels(1, None if label is None else torch.tensor([label]))

    def _check(self, model: Model, weight: float) -> None:
        if model.spec.latent != self.first.spec.latent:
            raise DataError(
                f"models of latents {self.first.spec.latent} and {model.spec.latent} cannot be "
                "composed: their latents mean different things"
            )
        if model.dtype != self.first.dtype or model.device != self.first.device:
            raise DataError("models of a composition must share dtype and device: use model.to")
        if not -float("inf") < weight < float("inf"):
            raise DataError(f"weight is {weight}; it must be a finite number")

    @property
    def spec(self) -> ModelSpec:
        """Of the first model; its latents are those of all."""
        return self.first.spec

    @property
    def device(self) -> torch.device:
        """Where the weights of all are."""
        return self.first.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and latents of all."""
        return self.first.dtype

    @property
    def autoencoder(self) -> Autoencoder:
        """Pixels <-> latents."""
        return self.first.autoencoder

    def check_latents(self, x: Tensor) -> None:
        """Refuse latents that do not fit. Raises DataError."""
        self.first.check_latents(x)

    def checked_labels(self, count: int, labels: Labels | None) -> Tensor | None:
        """None: labels belong to the parts. Raises DataError where some are given."""
        if labels is not None:
            raise DataError("the labels of a composition are those of its parts: leave them out")
        return None

    def gradient_of(
        self, labels: Tensor | None, *, guidance: float = 1.0, channels: int | None = None
    ) -> Gradient:
        """The sum of the parts' gradients, as a function of x. Raises DataError for guidance."""
        if guidance != 1.0:
            raise DataError("guide a composition by its weights: add a part of the null label")

        def part(model: Model, label: int | None) -> Gradient:
            def gradient(x: Tensor, gamma: Tensor | None = None) -> Tensor:
                return model.field.gradient(x, _filled(model, label, len(x)), gamma)

            return gradient

        gradients = [part(model, label) for model, label, _ in self.parts]
        return field.composed(gradients, weights=[weight for _, _, weight in self.parts])

    def gradient(self, x: Tensor) -> Tensor:
        """Gradient of the sum at latents x (B, C, H, W). Raises DataError for what does not fit."""
        self.first.check_latents(x)
        return self.gradient_of(None)(x)

    def energy(self, x: Tensor) -> Tensor:
        """Weighted sum of energies at latents x, (B,). Raises DataError for implicit models."""
        energies = [
            weight * model.energy(x, _filled(model, label, len(x)))
            for model, label, weight in self.parts
        ]
        return torch.stack(energies).sum(dim=0)


def compose(*parts: tuple[Model, int | None, float]) -> Composition:
    """See :class:`Composition`."""
    return Composition(*parts)


def _filled(model: Model, label: int | None, count: int) -> Tensor | None:
    if label is None:
        return model.checked_labels(count, None)
    return torch.full((count,), label, dtype=torch.int64, device=model.device)


# -- sampling -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Samples(Descent):
    """What a descent of a model found; latents (B, C, H, W) in the dtype of the model."""

    model: Model | Composition

    def images(self) -> Tensor:
        """Decode to uint8 (B, C, H, W)."""
        return self.model.autoencoder.decode(self.latents.float())


def sample(
    model: Model | Composition,
    *,
    labels: Labels | None = None,
    seeds: Sequence[int] | None = None,
    start: Tensor | None = None,
    rule: rules.Rule | None = None,
    updates: int = 249,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    stop: StopRule | None = None,
    project: Known | Projection | None = None,
    slots: int | None = None,
    check_every: int = 1,
    precision: Precision | None = None,
    on_update: Callable[[int, Tensor], None] | None = None,
    on_finished: Callable[[int], None] | None = None,
    trace_every: int | None = None,
) -> Samples:
    """Find samples by descent (section 3.3) from noise, or from ``start`` (B, C, H, W).

    Sample s of ``seeds`` begins at noise that is a function of s alone; ``labels`` (B,) int64,
    None for the null label. ``rule`` is NAG(0.003, 0.3) unless given. ``start`` may be noisy to any
    degree: nobody asks to which (flow matching that is conditioned takes it for noise); ``seeds``
    beside it number the noise of Langevin. ``project`` holds samples to a constraint, as
    :class:`Known` does. Flow matching must be integrated to its end: updates x step size is 1.

    ``stop`` ends each sample when it is done (GradientNormBelow, or any function of a Look); with
    ``slots``, one that is done makes room for the next, and ``on_finished(count)`` tells how many
    are; the batch has so many rows even for fewer samples, so that the bits of one depend on no
    other. Without, all are carried to the end of the last, ``on_update(k, latents)`` sees every
    update, and ``trace_every`` keeps the way, with the energy that is descended (guided, composed)
    where that is explicit. The device is asked every ``check_every`` updates. ``precision`` is that
    of the network's products, where weights are float32: torch's own choice unless given. Samples
    have the dtype of the model in any.

    Samples that blow up are marked in ``diverged``. Raises DataError and ConfigError for what does
    not fit.
    """
    asked = _asked(
        *(model, labels, seeds, start, rule, updates, guidance, guidance_channels, project),
        precision,
        stop,
    )
    common = {"rule": asked.rule, "updates": updates, "stop": stop, "check_every": check_every}
    if slots is not None:
        if on_update is not None or trace_every is not None:
            raise DataError(
                "with slots, samples have no common update: leave on_update and "
                "trace_every out, or slots"
            )
        found = sampler.descend_in_slots(
            asked.problem,
            asked.count,
            slots=slots,
            on_finished=on_finished,
            **common,
        )
    else:
        energy = (
            None
            if trace_every is None
            else _energy_of(model, asked.labels, guidance, guidance_channels)
        )
        found = _together(asked.problem, asked.count, on_update, trace_every, energy, common)
    return Samples(**vars(found), model=model)


def samples_as_found(
    model: Model | Composition,
    *,
    labels: Labels | None = None,
    seeds: Sequence[int],
    slots: int,
    rule: rules.Rule | None = None,
    updates: int = 249,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    stop: StopRule | None = None,
    check_every: int = 1,
    precision: Precision | None = None,
) -> Iterator[tuple[list[int], Samples]]:
    """Samples as soon as each is found, with their places among the seeds; any number of them.

    As :func:`sample` with ``slots``, but nothing waits for the last one.
    """
    asked = _asked(
        *(model, labels, seeds, None, rule, updates, guidance, guidance_channels, None),
        precision,
        stop,
    )
    found = sampler.found_in_slots(
        asked.problem,
        range(asked.count),
        slots=slots,
        rule=asked.rule,
        updates=updates,
        stop=stop,
        check_every=check_every,
    )
    for places, some in found:
        yield places, Samples(**vars(some), model=model)


@dataclass(frozen=True)
class _Asked:
    """What samples are asked for, checked."""

    problem: Problem
    count: int
    labels: Tensor | None
    rule: rules.Rule


def _asked(
    model: Model | Composition,
    labels: Labels | None,
    seeds: Sequence[int] | None,
    start: Tensor | None,
    rule: rules.Rule | None,
    updates: int,
    guidance: float,
    channels: int | None,
    project: Known | Projection | None,
    precision: Precision | None,
    stop: StopRule | None,
) -> _Asked:
    """Check what is asked. Raises DataError, ConfigError."""
    _check_kinds(rule, stop, updates)
    _check_precision(model, precision)
    names = _names(seeds)
    first, count = _starts(model, names, start)
    checked = model.checked_labels(count, labels)
    if guidance != 1.0 and labels is None and isinstance(model, Model):
        raise DataError(
            f"guidance is {guidance}, and no labels are given: give some, or guidance 1"
        )
    chosen = rule or rules.NAG(step_size=0.003, momentum=0.3)
    _check_rule(model, chosen, updates)
    problem = Problem(
        start=first,
        gradient=lambda at: _taken_in(
            precision,
            model.gradient_of(
                None if checked is None else checked[at.to(checked.device)],
                guidance=guidance,
                channels=channels,
            ),
            model.device,
        ),
        project=_projections(model, project, count),
        numbers=lambda at: at if names is None else names[at],
    )
    return _Asked(problem, count, checked, chosen)


def _check_precision(model: Model | Composition, precision: Precision | None) -> None:
    """Refuse a precision that weights or device have not. Raises ConfigError."""
    if precision is None:
        return
    known = get_args(Precision)
    require(precision in known, "precision", precision, f"one of {', '.join(known)}")
    check_products(precision, model.device, setting="precision")
    if model.dtype != torch.float32:
        raise ConfigError(
            f"precision is {precision!r}, and weights are {model.dtype}: leave it out, or convert "
            "the model with model.to(dtype=torch.float32)"
        )


def _taken_in(precision: Precision | None, gradient: Gradient, device: torch.device) -> Gradient:
    """The same gradient, with the network's products in another precision."""
    if precision is None or (precision == "float32" and device.type == "cpu"):
        return gradient

    def taken(x: Tensor, gamma: Tensor | None = None) -> Tensor:
        with products_in(precision, device):
            return gradient(x, gamma).to(x.dtype)

    return taken


def _check_kinds(rule: object, stop: object, updates: object) -> None:
    """Refuse what is no rule, no stop rule or no number of updates. Raises ConfigError."""
    if rule is not None and (isinstance(rule, type) or not _is_rule(rule)):
        raise ConfigError(
            f"rule is {rule!r}: give a rule, as eqm.NAG(step_size=0.003, momentum=0.3)"
        )
    if stop is not None and not callable(stop):
        raise ConfigError(
            f"stop is {stop!r}: give eqm.GradientNormBelow({stop!r}), or a function of a Look"
        )
    require(hasattr(updates, "__index__"), "updates", updates, "a whole number")


def _is_rule(thing: object) -> bool:
    return all(callable(getattr(thing, name, None)) for name in ("begin", "move"))


def _together(
    problem: Problem,
    count: int,
    on_update: Callable[[int, Tensor], None] | None,
    trace_every: int | None,
    energy: Callable[[Tensor], Tensor] | None,
    common: dict[str, Any],
) -> Descent:
    everyone = torch.arange(count)
    start = problem.start(everyone)
    return sampler.descend(
        problem.gradient(everyone),
        start,
        project=None if problem.project is None else problem.project(everyone),
        numbers=problem.numbers(everyone).to(start.device),
        on_update=on_update,
        trace_every=trace_every,
        energy=energy,
        **common,
    )


def _energy_of(
    model: Model | Composition, labels: Tensor | None, guidance: float, channels: int | None
) -> Callable[[Tensor], Tensor] | None:
    """The energy that is descended, (B,), as a function of x; None where there is none."""
    if isinstance(model, Model):
        # To guide all channels by their number is to guide all.
        some = channels if channels is not None and channels < model.spec.latent.shape[0] else None
        return field.guided_energy(model.field, labels, scale=guidance, channels=some)
    fields = [part.field for part, _, _ in model.parts]
    explicit = all(f.kind != "implicit" and not f.conditioned for f in fields)
    return model.energy if explicit else None


def _starts(
    model: Model | Composition, names: Tensor | None, start: Tensor | None
) -> tuple[Callable[[Tensor], Tensor], int]:
    """Where samples start, by their indices, and how many there are; ``names`` are the seeds."""
    if start is None:
        if names is None:
            raise DataError("give seeds, or start, or both")
        shape, dtype, device = model.spec.latent.shape, model.dtype, model.device
        return lambda at: sampler.start_noise(names[at], shape, dtype=dtype, device=device), len(
            names
        )
    model.check_latents(start)
    if not len(start):
        raise DataError("start has no latents: give at least one")
    if names is not None and len(names) != len(start):
        raise DataError(
            f"{len(names)} seeds for {len(start)} latents of start: give one each, or leave seeds "
            "out"
        )
    return lambda at: start[at.to(start.device)].to(model.device), len(start)


def _names(seeds: Iterable[Any] | None) -> Tensor | None:
    """Seeds as numbers of samples, (B,) int64. Raises DataError."""
    if seeds is None:
        return None
    try:
        names = [operator.index(s) for s in seeds]
    except TypeError as error:
        raise DataError(
            f"seeds are a sequence of whole numbers, as range(8) or [3]: {error}"
        ) from error
    odd = [s for s in names if not 0 <= s <= LARGEST_SAMPLE_SEED]
    if odd:
        raise DataError(f"seed {odd[0]} is out of range: seeds go from 0 to {LARGEST_SAMPLE_SEED}")
    if not names:
        raise DataError("seeds are empty: give at least one")
    return torch.tensor(names, dtype=torch.int64)


def _projections(
    model: Model | Composition, project: Known | Projection | None, count: int
) -> Callable[[Tensor], Projection] | None:
    """The constraint of samples by their indices."""
    if project is None:
        return None
    if not isinstance(project, Known):
        return lambda at: project
    shape = (count, *model.spec.latent.shape)
    known = project.spread(shape, dtype=model.dtype, device=model.device)
    return lambda at: known[at]


def _check_rule(model: Model | Composition, rule: rules.Rule, updates: int) -> None:
    """Refuse a rule that cannot serve flow matching. Raises DataError, ConfigError."""
    parts = [m for m, _, _ in model.parts] if isinstance(model, Composition) else [model]
    integrates = isinstance(rule, rules.Euler)
    if any(part.field.conditioned for part in parts) and not integrates:
        raise DataError(
            "this model is conditioned on the noise level, as flow matching is: give "
            "rule=eqm.Euler or eqm.Heun, with a step_size of 1 / updates"
        )
    # EqM has no time at which it must end: there an integrator is a descent of any length.
    timed = any(not part.spec.objective.is_equilibrium for part in parts)
    if not (timed and integrates and updates > 0):
        return
    end = updates * rule.step_size
    if abs(end - 1) > SLACK:
        raise ConfigError(
            f"{updates} updates of step_size {rule.step_size} end at gamma {end:.6g}, and flow "
            f"matching has its data at gamma 1: give a step_size of {1 / updates:.6g}"
        )


# -- scores -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """How far latents are from what the model was trained on: every score is HIGH outside."""

    gradient_norm: Tensor
    """(B,) ||gradient(x)||: zero at data."""
    descent_length: Tensor
    """(B,) length of the way from x down to where the descent ended."""
    energy: Tensor | None
    """(B,) of an explicit energy, which rises toward noise; None for an implicit field."""
    diverged: Tensor
    """(B,) bool: latents whose descent blew up; its length is infinite."""


def score(
    model: Model,
    x: Tensor,
    labels: Labels | None = None,
    *,
    rule: rules.Rule | None = None,
    updates: int = 100,
    stop: StopRule | None = None,
) -> Scores:
    """Score latents x (B, C, H, W) for being out of distribution (section 5, table 6).

    ``labels`` (B,) int64, None for the null label. The descent takes ``updates`` of ``rule``
    (NAG(0.003, 0.3)), or fewer by ``stop``. eqm.ood compares scores of two sets. Raises DataError
    for latents that do not fit, a model that is conditioned on the noise level, and a composition.
    """
    if not isinstance(model, Model):
        raise DataError("a composition has no scores of its own: give score one of its models")
    if model.field.conditioned:
        raise DataError("a model that is conditioned on the noise level gives no score without one")
    found = sample(model, labels=labels, start=x, rule=rule, updates=updates, stop=stop)
    explicit = model.field.kind != "implicit"
    return Scores(
        gradient_norm=sampler.norms(model.gradient(x, labels)),
        # What blew up went no way that could be measured: it is as far outside as can be.
        descent_length=found.path_lengths.masked_fill(found.diverged, float("inf")),
        energy=model.energy(x, labels) if explicit else None,
        diverged=found.diverged,
    )
