"""What the loop of a training carries from update to update, and what its parts share.

eqm.train makes one and drives it; eqm.reporting tells what was measured, eqm.guards what must not
be, eqm.looks how samples look, and eqm.persistence makes it durable and goes on from that.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from eqm import checkpoint, gauges, glimpse, lease
from eqm.config import TrainConfig, TrainStage
from eqm.distributed import OnItsWay, Sum, World
from eqm.errors import AwayError, EqmError, IntegrityError, MissingError
from eqm.events import EventLog
from eqm.frechet import Gaussian
from eqm.latent_set import LatentSet
from eqm.learner import Learner
from eqm.model import ModelSpec
from eqm.patience import PASSING, Patience
from eqm.stage import Context

HISTORY_POINTS = 200
"""The training curve has so many points at least, and fewer than twice as many; one an update in a
run that has fewer updates."""
LOG_UPDATES = 500
"""The log has an event after so many updates at most: a point of the curve may be hours long."""


class InterruptedTraining(EqmError):
    """The run was asked to stop, and has made its state durable."""


@dataclass
class Run:
    """What the loop carries."""

    context: Context
    stage: TrainStage
    spec: ModelSpec
    data: LatentSet
    learner: Learner
    images_seen: int = 0
    history: dict[str, list[float]] = field(
        default_factory=lambda: {"images": [], "loss": [], "gradient_norm": []}
    )
    since_report: list[Tensor] = field(default_factory=list)
    """(loss, gradient norm) of the updates since the last point of the curve, on the device. Where
    they stand in the log follows from their number."""
    persisted: int = -1
    """Position of the newest checkpoint that is durable or being written."""
    mine: lease.Held | None = None
    """The lease, on the first rank; None in a program that has the run for itself."""
    log: EventLog = field(default_factory=EventLog)
    """Of the first rank; that of another stays empty."""
    stopwatch: gauges.Stopwatch = field(default_factory=gauges.Stopwatch)
    sums: list[Sum] = field(default_factory=list)
    """Of this update's gradient, that are on their way."""
    stops: OnItsWay | None = None
    """How many ranks wanted to stop at the last update, on GPUs that are several."""

    @cached_property
    def tally(self) -> Tensor:
        """Losses by band since the last report (gauges.by_band), float64, on the device."""
        return torch.zeros(2 * gauges.BANDS, dtype=torch.float64, device=self.world.device)

    @property
    def world(self) -> World:
        """Where this process stands among its peers."""
        return self.context.world

    @property
    def config(self) -> TrainConfig:
        """Settings of the optimisation."""
        return self.stage.train

    @property
    def network(self) -> torch.nn.Module:
        """What is trained."""
        return self.learner.network

    @property
    def names(self) -> dict[Tensor, str]:
        """Trained parameters and their names."""
        return self.learner.names

    @cached_property
    def writer(self) -> checkpoint.Writer:
        """What makes states durable, on the first rank."""
        keep = self.context.job.runtime.keep_checkpoints
        return checkpoint.Writer(
            *(self.context.store, self.context.digest),
            keep=keep,
            mine=self.mine,
            durable=lambda state: self.log.commit(state.events),
            patience=self.patience,
        )

    @cached_property
    def patience(self) -> Patience:
        """How a store that is away is waited for."""
        runtime = self.context.job.runtime
        return Patience(min(runtime.patience_seconds, runtime.collective_timeout_seconds / 2))

    @cached_property
    def around(self) -> Gaussian:
        """The training latents, that those of samples are held against."""
        return glimpse.reference(self.data, self.config.seed)

    @cached_property
    def snapshots(self) -> frozenset[int]:
        """Positions at which power-function averages are kept."""
        return frozenset(self.config.snapshots)

    @property
    def report_every(self) -> int:
        """Images between two points of the curve: a function of the config alone."""
        return self.config.batch_size * max(1, self.config.updates // HISTORY_POINTS)

    @property
    def since_event(self) -> int:
        """How many of the updates ``since_report`` no event tells of yet."""
        return (len(self.since_report) - 1) % LOG_UPDATES + 1

    @property
    def event_due(self) -> bool:
        """Whether so many updates are since the last event that there must be one."""
        return self.since_event == LOG_UPDATES

    @property
    def recent(self) -> list[Tensor]:
        """The last LOG_UPDATES of ``since_report``, or all."""
        return self.since_report[-LOG_UPDATES:]


def gathers(run: Run) -> bool:
    """Whether this process takes part in putting state together."""
    return run.world.is_first or run.learner.shards is not None


def total_images(run: Run) -> int:
    """Images of the whole run: whole updates."""
    return run.config.updates * run.config.batch_size


def crossed(before: int, after: int, interval: int) -> bool:
    """Whether a multiple of an interval lies in (before, after]."""
    return before // interval != after // interval


def first_acts(world: World, act: Callable[[], None]) -> None:
    """Let the first rank do what only one may; where it fails in words, all ranks raise them.

    Otherwise the others would wait for it until their collectives time out; while it is at work
    they wait longer. What it raises they do where it matters to whoever asked: AwayError,
    MissingError, IntegrityError; else InterruptedTraining.
    """
    failure: EqmError | None = None
    with world.first_at_work():
        if world.is_first:
            try:
                act()
            except EqmError as error:
                failure = error
    kinds = (AwayError, MissingError, IntegrityError, InterruptedTraining)
    meant = AwayError if isinstance(failure, PASSING) else type(failure)
    number = next((i for i, kind in enumerate(kinds) if issubclass(meant, kind)), len(kinds) - 1)
    told = world.first_tells("" if failure is None else f"{number} {failure}")
    if failure is not None:
        raise failure
    if told:
        kind, _, words = told.partition(" ")
        raise kinds[int(kind)](words)
