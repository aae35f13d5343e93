"""One optimiser update after another: the training that every objective shares, without its data.

eqm.train feeds it from sealed shards, over ranks and restarts; :func:`learn` from tensors in
memory. Everything random about training image number n of a run (noise, gamma, whether its label is
dropped) is a function of (seed, n). Pure: knows no files and no ranks.

    x  latents (B, C, H, W)      numbers  (B,) int64, image numbers of the run
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eqm import gauges, objective
from eqm.adamw import AdamW
from eqm.compute import check_halves
from eqm.config import ObjectiveConfig, TrainConfig
from eqm.ema import EMA, PowerEMA
from eqm.errors import ConfigError, DataError, DivergedError
from eqm.field import Field
from eqm.gradients import FlatGradient
from eqm.kernels.halves import in_halves, parts_of
from eqm.network import check_labels, uncompiled
from eqm.objective import Corrupted, Decay
from eqm.precision import deterministic, products_in, without_order
from eqm.randomness import Stream, normal, order, uniform
from eqm.recorded import Recorded

if TYPE_CHECKING:
    from eqm.sharding import Shards

FLAGS = 2
"""Numbers of an update that processes add up beside its gradient: the loss, and whether to stop."""
MUCH = 0.05
"""Of the initial weights in the averages of a whole run: samples show it."""


class Learner:
    """A network, what it is to become, and the state of its optimisation.

    ``c`` takes the place of the objective's c. ``micro_batch`` is how many images go backward at
    once; None: all that are given. ``shards`` are of a network that processes share: weights,
    moments and averages are then this process's rows. ``room`` is how many numbers are summed over
    processes beside the gradient. ``replays``: the backward is recorded once and replayed
    (:func:`eqm.compute.is_replayed`); all batches are then of one size. Raises ConfigError for a c
    that cannot be (:func:`eqm.objective.check_decay`), for weights in half precision whose energy
    would be trained by differences, and where "float16" cannot be
    (:func:`eqm.compute.check_halves`).
    """

    def __init__(
        self,
        network: nn.Module,
        objective_config: ObjectiveConfig,
        config: TrainConfig,
        *,
        device: torch.device,
        c: Decay | None = None,
        micro_batch: int | None = None,
        shards: "Shards | None" = None,
        room: int = FLAGS,
        replays: bool = False,
    ) -> None:
        if c is not None:
            objective.check_decay(c)
        self.network, self.objective, self.config = network, objective_config, config
        self.device, self.micro_batch, self.shards = device, micro_batch, shards
        self.halves: Sequence[nn.Module] = ()
        """Parts of the network that compute in float16: none in other precisions."""
        if config.precision == "float16":
            check_halves(config, objective_config, device=device)
            self.halves = parts_of(network)
        self.c = c or objective.decay(objective_config)
        self.field = Field(network, energy=objective_config.energy)  # type: ignore[arg-type]
        self.way = objective_config.backward
        if self.field.kind != "implicit" and self.way == "directional":
            objective.difference_for(next(network.parameters()).dtype)
        trained = _trained(network) if shards is None else shards.pieces
        self.trained: dict[str, nn.Parameter] = trained
        self.gradients = FlatGradient(tuple(trained.values()), room=room)
        self.optimiser = AdamW(trained, betas=config.betas, weight_decay=config.weight_decay)
        if shards is not None:
            shards.attach(self.gradients.views)
        remedy = "set compute.replay to 'never'"
        self._recorded = Recorded(self._all_parts, remedy=remedy) if replays else None
        self.ema = EMA(trained, half_life_images=config.ema_half_life_images)
        self.tracks = {h: EMA(trained, half_life_images=h) for h in config.ema_tracks}
        """Half-life in images -> further averages."""
        self.power = {s: PowerEMA(trained, sigma_rel=s) for s in config.ema_power}
        """sigma_rel -> power-function averages."""

    @cached_property
    def names(self) -> dict[Tensor, str]:
        """Trained parameters and their names."""
        return {p: n for n, p in self.trained.items()}

    def weights(self) -> dict[str, Tensor]:
        """All that the network's state_dict has; see :meth:`whole`."""
        if self.shards is None:
            return self.network.state_dict()
        kept = {n: t for n, t in self.network.state_dict().items() if n not in self.trained}
        return {**kept, **self.shards.whole(self.trained)}

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by names of weights, or by "<anything>/<name>", as one process has them.

        Of a network that is shared, all processes ask at once, and the first one is told.
        """
        return dict(tensors) if self.shards is None else self.shards.whole(tensors)

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this process holds of whole tensors."""
        return dict(tensors) if self.shards is None else self.shards.cut(tensors)

    def averages(self) -> dict[str, dict[str, Tensor]]:
        """All averages but the main ones, under their names: "ema-20000", "power-0.05"."""
        return {name: track.state_dict() for name, track in self._further.items()}

    def state(self) -> dict[str, Tensor]:
        """All that updates change, under "<part>/<name>": the tensors themselves.

        Parts are "parameters", "ema", "optimiser/<moment>" and "averages/<track>". Whoever puts
        others' numbers into them goes on where they were.
        """
        moments = {f"optimiser/{n}": moment for n, moment in self.optimiser.state_dict().items()}
        further = {
            f"averages/{track}/{name}": average
            for track, averages in self.averages().items()
            for name, average in averages.items()
        }
        ema = {f"ema/{name}": average for name, average in self.ema.state_dict().items()}
        weights = {f"parameters/{name}": p.detach() for p, name in self.names.items()}
        return {**weights, **ema, **moments, **further}

    @property
    def _further(self) -> dict[str, EMA | PowerEMA]:
        tracks = {f"ema-{number_name(h)}": track for h, track in self.tracks.items()}
        power = {f"power-{number_name(s)}": track for s, track in self.power.items()}
        return {**tracks, **power}

    def corrupted(self, x: Tensor, labels: Tensor | None, numbers: Tensor) -> Corrupted:
        """What images of these numbers look like to the network, and what it should say."""
        seed, shape = self.config.seed, tuple(x.shape[1:])
        eps = normal(seed, Stream.EPS, numbers, shape, x.dtype)
        gamma = self.levels(numbers, x.dtype)
        if labels is not None:
            coins = uniform(seed, Stream.LABEL_DROP, numbers).squeeze(1)
            null = int(self.network.null_label)  # type: ignore[arg-type]
            labels = labels.masked_fill(coins < self.config.label_dropout, null)
        goal = objective.target(x, eps, gamma, self.c)
        return Corrupted(objective.mixed(x, eps, gamma), goal, gamma, labels)

    def levels(self, numbers: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """gamma of images, (B,): a function of their numbers (B,)."""
        return uniform(self.config.seed, Stream.GAMMA, numbers, dtype=dtype).squeeze(1)

    def backward(self, at: Corrupted, take: Callable[[Tensor], None] | None = None) -> Tensor:
        """Add this share's part of the gradient of the mean loss over the global batch.

        Returns the loss of each image, (B,), detached. Parts of the share go back one after the
        other, each with its part of the sum, so that they add up to what the whole would give.
        ``take`` is handed all segments of the gradient but the last, each when it is complete
        (:meth:`eqm.gradients.FlatGradient.handing`); of a backward that is replayed, after it.
        """
        if self._recorded is not None:
            losses = self._recorded(at.x, at.goal, at.gamma, at.labels)
            if take is not None:
                for segment in self.gradients.segments[:-1]:
                    take(segment)
            return losses
        with self.gradients.adding():
            return self._of_parts(at, take)

    def _all_parts(
        self, x: Tensor, goal: Tensor, gamma: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        with self.gradients.adding():
            return self._of_parts(Corrupted(x, goal, gamma, labels), None)

    def _of_parts(self, at: Corrupted, take: Callable[[Tensor], None] | None) -> Tensor:
        *first, last = parts(at, self.micro_batch)
        losses = [self._backward(part) for part in first]
        if take is None:
            return torch.cat([*losses, self._backward(last)])
        # The directional way goes back several times.
        at_once = self.field.kind != "implicit" and self.way == "directional"
        if at_once:
            losses.append(self._backward(last))
        with self.gradients.handing(take):
            if not at_once:
                losses.append(self._backward(last))
        return torch.cat(losses)

    def _backward(self, at: Corrupted) -> Tensor:
        scale = 1 / self.config.batch_size
        half = self.config.precision == "bfloat16"
        # Blocks that are computed again are so on the way back.
        with in_halves(self.halves):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                if self.objective.loss == "gradient" and not self.objective.dispersive_weight:
                    return self._gradient_matched(at, scale)
                losses = self._ablation(at)
            (scale * losses.sum()).backward()
        return losses.detach()

    def _gradient_matched(self, at: Corrupted, scale: float) -> Tensor:
        if self.field.kind == "implicit" or self.way == "double":
            return objective.backward(self.field, at, scale=scale, way="double")
        step = self.objective.difference
        return objective.directional_backward(self.field, at, scale=scale, difference=step)

    def _ablation(self, at: Corrupted) -> Tensor:
        """Losses (B,) of an implicit field that are not, or not alone, Eq. 3."""
        if self.objective.loss == "inner-product":
            return objective.inner_product_loss(self.field, at)
        if self.objective.loss == "norms":
            return objective.norms_loss(self.field, at)
        # Compiled code runs past the hook that collects the tokens.
        plain = uncompiled(self.network)
        with objective.hidden_tokens(plain) as hidden:
            field = Field(plain)  # type: ignore[arg-type]
            found = field.gradient(at.x, at.labels, at.gamma, create_graph=True)
        spread = objective.dispersive_loss(hidden[0].float(), group=self.objective.dispersive_group)
        # A mean over groups of equal size counts each image once: it may be added to every loss.
        matched = objective.loss_per_sample(found.float(), at.goal)
        return matched + self.objective.dispersive_weight * spread

    def gradient(self) -> Tensor:
        """Gradient of all weights, flat, (P,); zeros where the loss does not depend on one.

        The tensor itself that the next :meth:`backward` adds to, until :meth:`apply` clears it.
        """
        return self.gradients.collect()

    def apply(self, gradient: Tensor, *, images_seen: int, loss: Tensor | None = None) -> Tensor:
        """One update of weights and averages by :meth:`gradient`; returns its norm before clipping.

        ``images_seen`` is the position before the update, ``loss`` () its loss. Where that or the
        norm is not finite nothing reaches the weights; this is decided on the device, and the host
        is not made to wait for it. Averages stand still then if train.on_nonfinite is "skip";
        "stop" is the caller's, who sees the norm.
        """
        if gradient.data_ptr() != self.gradients.flat.data_ptr():
            self.gradients.flat.copy_(gradient)
            gradient = self.gradients.flat
        norm = gauges.norm(gradient) if self.shards is None else self.shards.norm(gradient)
        finite = norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()
        if self.config.gradient_clip is not None:
            gradient.mul_((self.config.gradient_clip / (norm + 1e-12)).clamp(max=1.0))
        rate = learning_rate(self.config, images_seen)
        self.optimiser.step(self.gradients.views, learning_rate=rate, happened=finite.float())
        self._average(images_seen, finite.float() if self.config.on_nonfinite == "skip" else None)
        self.gradients.clear()
        return norm

    def _average(self, images_seen: int, happened: Tensor | None) -> None:
        weights, images = self.trained, self.config.batch_size
        for track in (self.ema, *self.tracks.values()):
            track.update(weights, images=images, happened=happened)
        for power in self.power.values():
            power.update(weights, images=images, images_seen=images_seen, happened=happened)


def _trained(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def parts(at: Corrupted, size: int | None) -> Iterator[Corrupted]:
    """Consecutive parts of so many images; None: all in one."""
    size = len(at.x) if size is None else size
    for start in range(0, len(at.x), size):
        here = slice(start, start + size)
        labels = None if at.labels is None else at.labels[here]
        yield Corrupted(at.x[here], at.goal[here], at.gamma[here], labels)


def number_name(value: float) -> str:
    """A number as a name tells it: 20000 for 20000.0, and different for different ones."""
    return repr(float(value)).removesuffix(".0")


def learning_rate(config: TrainConfig, images_seen: int) -> float:
    """Rate of the update that begins at a position: warm-up, constant, linear decay to zero."""
    warm = min(1.0, (images_seen + config.batch_size) / max(config.warmup_images, 1))
    left = config.images - images_seen
    falling = config.decay_fraction * config.images
    decay = min(1.0, left / falling) if falling else 1.0
    return config.learning_rate * warm * decay


def initial_share(config: TrainConfig) -> float:
    """Share of the initial weights in the averages at the end of a run."""
    return 2.0 ** -(config.updates * config.batch_size / config.ema_half_life_images)


def told_of_averages(config: TrainConfig) -> str | None:
    """What to say of a run that is short for its averages; None where there is nothing to say."""
    share = initial_share(config)
    if share < MUCH:
        return None
    return (
        f"the averaged weights at the end of this run will hold {share:.0%} of the initial ones: "
        f"train.ema_half_life_images is {config.ema_half_life_images:,.0f}, and train.images "
        f"{config.images:,}; make the half-life a tenth of the run, or the run longer"
    )


def check_slope(network: nn.Module, config: ObjectiveConfig) -> None:
    """Refuse the l2 energy of a network that is zero everywhere. Raises ConfigError.

    1/2 ||f||^2 has no slope in any weight where f == 0, so it would never train.
    """
    if config.energy != "l2":
        return
    weight = next(network.parameters())
    shape = tuple(network.shape)  # type: ignore[arg-type]
    x = normal(0, Stream.EPS, torch.arange(2), shape).to(weight)
    gamma = x.new_full((2,), 0.5) if network.conditioned else None
    with torch.no_grad():
        if bool(network(x, None, gamma).any()):
            return
    raise ConfigError(
        "objective.energy is 'l2', but the network is zero everywhere: its energy has no slope in "
        "any weight and would never train. Begin from a trained implicit model (train.init_from), "
        "or draw the head as well: initialise(seed, zero_head=False)"
    )


# -- in memory ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learnt:
    """What :func:`learn` made."""

    field: Field
    """With averaged weights."""
    losses: Tensor
    """Mean loss of every update, (U,)."""
    averages: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    """Of the further tracks asked for, name -> weights by name: :meth:`Learner.averages`."""


def learn(
    network: nn.Module,
    x: Tensor,
    labels: Tensor | Sequence[int] | None = None,
    *,
    objective: ObjectiveConfig | None = None,
    train: TrainConfig | None = None,
    c: Decay | None = None,
    on_update: Callable[[int, float], None] | None = None,
) -> Learnt:
    """Train a network on data in memory, by the loop that the pipeline trains with.

    ``x`` (N, C, H, W) in the dtype of the weights, ``labels`` (N,) int64 or None; ``network`` a
    Transformer or UNet, which is changed. ``c`` is any function of gamma that is 0 at 1 and
    positive before. ``on_update(images_seen, loss)`` is called after each update, and waits for the
    device. The same arguments give the same bits on one kind of device. Warns of averages that will
    hold much of the initial weights. Raises DataError for data that do not fit or are not finite,
    DivergedError for a loss or gradient that is not finite (unless train.on_nonfinite is "skip"),
    and ConfigError for settings that cannot be trained with, and for an operation on a GPU that
    adds in no fixed order.
    """
    asked, config = objective or ObjectiveConfig(), train or TrainConfig()
    if config.init_from is not None:
        raise ConfigError(
            f"train.init_from is {config.init_from.uri}, which is for the pipeline: here, put the "
            "weights into the network before, as eqm.load(...).network"
        )
    if not any(p.requires_grad for p in network.parameters()):
        # As an earlier call leaves it: this one goes on from there.
        network.train().requires_grad_(True)
    elif (told := told_of_averages(config)) is not None:
        warnings.warn(told, stacklevel=2)
    check_slope(network, asked)
    given = None if labels is None else _labels(labels)
    _check_data(network, x, given)
    device = next(network.parameters()).device
    learner = Learner(network, asked, config, device=device, c=c)
    products = "tf32" if config.precision == "tf32" else "float32"
    # As the stage trains, and as it was before once this is over.
    with deterministic(device), products_in(products, device, setting="train.precision"):
        try:
            curve = _descend(learner, x, given, on_update)
        except RuntimeError as error:
            if (said := without_order(error)) is None:
                raise
            raise ConfigError(said) from error
    _keep_averages(learner)
    return Learnt(learner.field, curve, learner.averages())


def _descend(
    learner: Learner,
    x: Tensor,
    given: Tensor | None,
    on_update: Callable[[int, float], None] | None,
) -> Tensor:
    """All updates; the loss of each, (U,). Raises DivergedError."""
    config, device = learner.config, learner.device
    losses, norms = [], []
    for seen in range(0, config.updates * config.batch_size, config.batch_size):
        numbers = torch.arange(seen, seen + config.batch_size)
        rows = order(config.seed, len(x), numbers)
        chosen = None if given is None else given[rows].to(device)
        at = learner.corrupted(x[rows].to(device), chosen, numbers.to(device))
        losses.append(learner.backward(at).mean())
        norms.append(learner.apply(learner.gradient(), images_seen=seen, loss=losses[-1]))
        if on_update is not None:
            on_update(seen + config.batch_size, float(losses[-1]))
    curve = torch.stack(losses)
    if config.on_nonfinite == "stop":
        _refuse_divergence(curve, torch.stack(norms), config.batch_size)
    return curve


def _refuse_divergence(losses: Tensor, norms: Tensor, batch_size: int) -> None:
    odd = (~(losses.isfinite() & norms.isfinite())).nonzero()
    if len(odd):
        update = int(odd[0])
        raise DivergedError(
            diverged(float(losses[update]), float(norms[update]), update * batch_size)
        )


def diverged(loss: float, norm: float, first_image: int) -> str:
    """What to say of the update that began at an image and was not finite."""
    return (
        f"loss {loss} and gradient norm {norm} of the update from image {first_image:,} on: "  # noqa: S608
        "training has diverged; lower train.learning_rate or set train.gradient_clip"
    )


@torch.no_grad()
def _keep_averages(learner: Learner) -> None:
    averages = learner.ema.state_dict()
    for parameter, name in learner.names.items():
        parameter.copy_(averages[name])
    learner.gradients.release()
    learner.network.eval().requires_grad_(False)


def _labels(labels: Tensor | Sequence[int]) -> Tensor:
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"labels are no whole numbers ({error}): give (N,) int64") from error


def _check_data(network: nn.Module, x: Tensor, labels: Tensor | None) -> None:
    shape = tuple(network.shape)  # type: ignore[arg-type]
    if not isinstance(x, Tensor):
        raise DataError(f"data are a {type(x).__name__}: give a tensor, as torch.as_tensor(x)")
    if tuple(x.shape[1:]) != shape or not len(x) or not x.is_floating_point():
        raise DataError(
            f"data are {x.dtype} of shape {tuple(x.shape)}; this network takes floats (N, *{shape})"
        )
    dtype = next(network.parameters()).dtype
    if x.dtype != dtype:
        raise DataError(
            f"data are {x.dtype}, and the weights of the network {dtype}: convert one of them, as "
            f"x.to({dtype})"
        )
    odd = (~x.flatten(1).isfinite().all(dim=1)).nonzero()
    if len(odd):
        raise DataError(f"datum {int(odd[0])} of {len(x)} has NaN or infinite entries: mend it")
    if labels is None:
        return
    if network.classes is None:
        raise DataError("labels were given to a network without labels: leave them out")
    if len(labels) != len(x):
        raise DataError(f"{len(labels)} labels for {len(x)} data: give one each")
    classes = int(network.classes)  # type: ignore[arg-type]
    check_labels(labels, classes=classes)
    # All from 1 on, and none that is missing: not a set in which some have no label.
    if torch.equal(labels.unique().cpu(), torch.arange(1, classes + 1)):
        raise DataError(
            f"labels go from 1 to {classes}, and {classes} is no class here: it stands for no "
            f"label. Classes are 0 to {classes - 1}: if yours begin at 1, take 1 off"
        )
