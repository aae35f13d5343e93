"""Stage "train": sealed latents -> a trained gradient field. ``python -m eqm.train CONFIG.json``

The loop is setup / step / report / persist. Everything random about training image number n is a
function of (seed, n), and the position is one integer, so a killed run that is started again ends
in the same bits. One trainer at a time holds the lease of the run (eqm.lease); checkpoints are
written beside the loop, which only copies the state. Gradients are summed over ranks in segments
(eqm.gradients) while the backward goes on.
"""

import collections
import contextlib
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from eqm import checkpoint, flops, gauges, glimpse, lease, model
from eqm.batches import Batch, batches, samples_of
from eqm.checkpoint import Position, TrainState
from eqm.compute import blocks_of, check_attention, check_micro_batch, prepare, slow_bfloat16
from eqm.config import Runtime, TrainConfig, TrainStage
from eqm.distributed import OnItsWay, Sum, World
from eqm.errors import AwayError, DataError, DivergedError, EqmError, PeerError, ReplicaError
from eqm.events import EventLog, log_of, restore
from eqm.first_weights import first_network
from eqm.frechet import Gaussian
from eqm.latent_set import LatentSet, open_manifest
from eqm.latents import sample_latents
from eqm.learner import FLAGS, Learner, diverged, learning_rate, told_of_averages
from eqm.model import Model, ModelSpec
from eqm.objective import Corrupted
from eqm.patience import PASSING, Patience
from eqm.precision import check_products, choose_deterministic, choose_products
from eqm.progress import Progress
from eqm.randomness import Stream, normal
from eqm.records import Blob, Record
from eqm.registry import RunMirror
from eqm.stage import AWAY, Context, Outcome
from eqm.stage import main as stage_main
from eqm.storage import Store
from eqm.words import counted

if TYPE_CHECKING:
    from eqm.sharding import Shards

HISTORY_POINTS = 200
"""The training curve has so many points at least, and fewer than twice as many; one an update in a
run that has fewer updates."""
EVENTS = "events.jsonl"
"""The log of the run, among the logs of the sealed record."""
CATCH_UP_SECONDS = 600.0
"""How long MLflow may take for what it has missed of a sealed run, while it answers."""
LOG_UPDATES = 500
"""The log has an event after so many updates at most: a point of the curve may be hours long."""
SPIKE, SPIKE_POINTS = 5.0, 10
"""A loss so many times the median of so many points of the curve is told."""
NAMED_UPDATES = 8
"""Of so many updates that were skipped the log names the samples; of all it names the images."""


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


# -- setup --------------------------------------------------------------------------------------


def setup(context: Context, mine: lease.Held | None = None) -> Run:
    """Open the data, build the network, and go on from the newest complete checkpoint."""
    stage: TrainStage = context.config
    data = open_manifest(context.input("latents"), context.store)
    compute, device = context.job.runtime.compute, context.world.device
    world_divides(stage.train, context.world)
    check_micro_batch(compute, stage.objective, stage.train.batch_size // context.world.size)
    check_attention(compute, stage.network, stage.train)
    choose_products(stage.train.precision, device)
    runtime = context.job.runtime
    if runtime.grid_every_images is not None:
        sampled = runtime.grid_sampler.precision
        check_products(sampled, device, setting="generate.sampler.precision")
    if context.world.is_first and (told := slow_bfloat16(stage.train, device)) is not None:
        sys.stderr.write(told + "\n")
    spec = ModelSpec(
        schema=model.SCHEMA,
        network=stage.network,
        objective=stage.objective,
        latent=data.manifest.spec,
        classes=data.manifest.classes,
        null_label=stage.train.label_dropout > 0,
    )
    begun = _newest(context)
    # What a run goes on from is in its checkpoint: the file that it began from may be gone.
    network = spec.build() if begun else first_network(stage, spec, context.store)
    network.to(device)
    prepare(network, compute, stage.objective, device)
    shards = sharded(network, stage, context) if compute.parallel == "fsdp2" else None
    run = Run(
        context=context,
        stage=stage,
        spec=spec,
        data=data,
        learner=Learner(
            network,
            stage.objective,
            stage.train,
            device=device,
            micro_batch=compute.micro_batch,
            shards=shards,
            room=FLAGS + 2 * gauges.BANDS,
        ),
        mine=mine,
    )
    if begun is not None:
        resume(run, begun)
    begin_log(run)
    told = told_of_averages(stage.train) if stage.train.init_from is None else None
    if told is not None and run.world.is_first:
        sys.stderr.write(f"warning: {told}\n")
    return run


def sharded(network: torch.nn.Module, stage: TrainStage, context: Context) -> "Shards":
    """Share a network among the processes. Raises ConfigError for what cannot be trained so."""
    # Half a second that nobody else should wait for.
    from eqm.sharding import Shards, check_shardable

    check_shardable(stage.objective, context.world.size)
    blocks = blocks_of(network, context.job.runtime.compute)
    # Differences of an energy would be noise in bfloat16: autocast leaves those alone.
    half = stage.train.precision == "bfloat16" and stage.objective.energy == "implicit"
    return Shards(network, blocks, context.world, half=half)


def world_divides(config: TrainConfig, world: World) -> None:
    """Refuse a global batch that the processes cannot share equally."""
    if config.batch_size % world.size:
        raise DataError(
            f"train.batch_size is {config.batch_size}, which {world.size} processes cannot share "
            "equally: change one of them"
        )


def _newest(context: Context) -> Position | None:
    """Where the run goes on; None where it begins.

    The first process looks: others might see another one, while another process writes.
    """
    found = checkpoint.newest(context.store, context.digest) if context.world.is_first else None
    images, token = (context.world.first_says(number) for number in found or (-1, 0))
    return None if images < 0 else Position(images, token)


def resume(run: Run, at: Position) -> None:
    """Put a checkpoint's state in place."""
    state, own = checkpoint.load(run.context.store, run.context.digest, at), run.learner.own
    with torch.no_grad():
        for name, tensor in own(state.parameters).items():
            run.learner.trained[name].copy_(tensor)
    run.learner.ema.load_state_dict(own(state.ema))
    run.learner.load_averages({name: own(track) for name, track in state.averages.items()})
    checkpoint.tensors_to_optimiser(own(state.optimiser), run.learner.optimiser, run.names)
    run.images_seen = run.persisted = state.images_seen
    run.history = state.history
    run.since_report = [torch.tensor(pair, device=run.world.device) for pair in state.pending]
    if run.world.is_first:
        run.log = restore(run.context.store, state.events)
        restore_tally(run)
        sys.stderr.write(f"training goes on from image {state.images_seen:,}\n")


def restore_tally(run: Run) -> None:
    """Go on adding up losses by band: what the checkpoint had of them is in its event."""
    last = run.log.events[-1] if run.log.events else None
    if last is not None and last.images_seen == run.images_seen and last.facts.get("tally"):
        run.tally.copy_(torch.tensor(last.facts["tally"], dtype=torch.float64))


def begin_log(run: Run) -> None:
    """Note that the run starts or goes on."""
    if not run.world.is_first:
        return
    cache, log = run.context.job.runtime.cache, run.log
    if cache is not None:
        log.follow(Path(cache) / "events" / f"{run.context.digest}.jsonl")
    for lost in log.lost:
        sys.stderr.write(f"warning: the log of the run lacks {lost}; training is unaffected\n")
    kind = "start" if run.persisted < 0 else "resume"
    where = {"world_size": run.world.size, "device": str(run.world.device.type)}
    log.append(kind, run.images_seen, **where, lost=list(log.lost))


# -- step ---------------------------------------------------------------------------------------


def step(run: Run, batch: Batch, stop: bool) -> bool:
    """One optimiser update; returns whether any rank wants to stop.

    GPUs that are several are asked one update later, for the answer to be there without waiting.
    """
    # A mean over the global batch, whatever the number of ranks.
    losses = accumulate(run, batch)
    loss = losses.sum() / run.config.batch_size
    numbers = batch.image_numbers.to(run.world.device, non_blocking=True)
    gradient, gradients = run.learner.gradient(), run.learner.gradients
    gradients.beside[0].copy_(loss)
    gradients.beside[1].fill_(float(stop))
    gradients.beside[FLAGS:].copy_(gauges.by_band(losses, run.learner.levels(numbers)))
    # Gradients of shared weights are summed already.
    run.world.sum_(gradients.segments[-1] if run.learner.shards is None else gradients.beside)
    while run.sums:
        run.sums.pop(0).wait()
    beside = gradients.beside.clone()
    loss, stops, told = beside[0], beside[1], beside[FLAGS:]
    norm = run.learner.apply(gradient, images_seen=run.images_seen, loss=loss)
    run.images_seen += run.config.batch_size
    run.since_report.append(torch.stack([loss, norm]))
    # What was skipped, or is about to be refused, is in no mean.
    run.tally.add_(torch.where((loss + norm).isfinite(), told, torch.zeros_like(told)))
    return stop if run.world.size == 1 else somebody_stops(run, stops)


def somebody_stops(run: Run, stops: Tensor) -> bool:
    """Whether any rank wants to stop, of how many do, (): all are told the same, in one update."""
    if run.world.device.type == "cpu":
        return bool(stops > 0)
    before, run.stops = run.stops, OnItsWay(stops)
    return before is not None and before.value() > 0


def accumulate(run: Run, batch: Batch) -> Tensor:
    """Add the gradient of this rank's share; returns the loss of each of its images, (B,).

    What of the gradient is complete begins to be summed over ranks while the rest is computed.
    """
    alone = run.world.group is None or run.learner.shards is not None
    begin = None if alone else lambda part: run.sums.append(run.world.begin_sum(part))
    at = corrupted(run, batch)
    with run.world.together():
        return run.learner.backward(at, begin)


def corrupted(run: Run, batch: Batch) -> Corrupted:
    """Latents sampled from the autoencoder's posterior, with noise and dropped labels."""
    here = batch.to(run.world.device)
    noise = normal(run.config.seed, Stream.POSTERIOR, here.image_numbers, run.spec.latent.shape)
    x = sample_latents(here.moments, noise, run.spec.latent)
    return run.learner.corrupted(x, here.labels, here.image_numbers)


# -- report -------------------------------------------------------------------------------------


def report(run: Run, bar: Progress) -> None:
    """Log what is measured where that is due, and add a point to the curve where one is."""
    ends = run.images_seen % run.report_every == 0 or run.images_seen >= total_images(run)
    if not ends and len(run.since_report) % LOG_UPDATES:
        bar.advance(run.config.batch_size)
        return
    found, begun = guarded(run)
    loss, norm = found.mean(dim=0).tolist()
    tell_spikes(run, found, begun)
    if ends:
        add_point(run)
    bar.advance(run.config.batch_size, loss=loss, gradient=norm)
    # All processes take part: of shared weights each has its rows.
    weights = parameter_norm(run)
    if run.world.is_first:
        figures = {**figures_of(run, loss, norm), "parameter_norm": weights}
        run.log.append("metrics", run.images_seen, gauges.finite(figures))
    run.tally.zero_()


def add_point(run: Run) -> None:
    """Add the updates since the last point to the curve: means of those that were finite."""
    found = torch.stack(run.since_report).double().cpu()
    finite = found.isfinite().all(dim=1)
    loss, norm = found[finite].mean(dim=0).tolist()
    for name, value in (("images", run.images_seen), ("loss", loss), ("gradient_norm", norm)):
        run.history[name].append(value)
    if run.config.on_nonfinite == "skip":
        run.history.setdefault("skipped", []).append(float((~finite).sum()))
    run.since_report.clear()


def parameter_norm(run: Run) -> float:
    """Length of all weights as one vector."""
    here = gauges.parameter_norm(run.names)
    if run.learner.shards is None:
        return here
    return float(run.world.sum_(torch.tensor(here**2, device=run.world.device)).sqrt())


def figures_of(run: Run, loss: float, norm: float) -> dict[str, float]:
    """What is logged of the updates since the last report."""
    figures = {
        "loss": loss,
        "gradient_norm": norm,
        "learning_rate": learning_rate(run.config, run.images_seen - run.config.batch_size),
    }
    rates = run.stopwatch.figures(run.config.batch_size)
    work = speed(run, rates["images_per_second"])
    memory = gauges.peak_memory(run.world.device)
    return figures | gauges.band_figures(run.tally) | rates | work | memory


def guarded(run: Run) -> tuple[Tensor, Tensor]:
    """(loss, gradient norm) of the updates since the last event that were finite, (U, 2) float64.

    And their first images, (U,). Raises DivergedError, naming the update, for one that was not
    where training is to stop, and where none of the last LOG_UPDATES of this point was. Others that
    were not are told and logged, with the numbers of their samples.
    """
    # What no event tells of yet may be one update: alone it is no sign of anything.
    recent = torch.stack(run.since_report[-LOG_UPDATES:]).double().cpu()
    found, size = recent[-run.since_event :], run.config.batch_size
    begun = torch.arange(run.images_seen - len(found) * size, run.images_seen, size)
    finite = found.isfinite().all(dim=1)
    odd = begun[~finite].tolist()
    if odd and (run.config.on_nonfinite == "stop" or not recent.isfinite().all(dim=1).any()):
        tell_nonfinite(run, "guard", odd[:1])
        loss, norm = found[~finite][0].tolist()
        raise DivergedError(diverged(loss, norm, odd[0]))
    if odd:
        tell_nonfinite(run, "skip", odd)
    return found[finite], begun[finite]


def tell_nonfinite(run: Run, kind: Literal["skip", "guard"], begun: list[int]) -> None:
    """Say and log that updates, by their first images, were not finite, and what is done then."""
    if not run.world.is_first:
        return
    ends = ", ".join(f"{image:,} to {image + run.config.batch_size - 1:,}" for image in begun)
    done = "were skipped" if kind == "skip" else "ended the training"
    sys.stderr.write(
        f"{len(begun)} updates {done}, whose loss or gradient was not finite: images {ends} of "
        "the run\n"
    )
    samples = [samples_at(run, image) for image in begun[:NAMED_UPDATES]]
    run.log.append(kind, run.images_seen, what="not finite", updates_from=begun, samples=samples)


def samples_at(run: Run, image: int) -> list[int]:
    """Numbers in the latents of what the update that begins at an image of the run was given."""
    numbers = np.arange(image, image + run.config.batch_size)
    return samples_of(run.data, run.config.seed, numbers).tolist()


def refuse_divergence(run: Run) -> None:
    """What a checkpoint must not come after, where training is to stop: raises DivergedError."""
    if run.since_report and run.config.on_nonfinite == "stop":
        guarded(run)


def tell_spikes(run: Run, found: Tensor, begun: Tensor) -> None:
    """Say and log where a loss was far above the usual; nothing is done about it.

    ``found`` (U, 2) are losses and norms of updates, ``begun`` (U,) their first images.
    """
    usual = run.history["loss"][-SPIKE_POINTS:]
    if not len(found) or len(usual) < SPIKE_POINTS or not run.world.is_first:
        return
    middle, at = statistics.median(usual), int(found[:, 0].argmax())
    highest, image = float(found[at, 0]), int(begun[at])
    if highest > SPIKE * middle:
        sys.stderr.write(
            f"a loss of {highest:.4g} in the update from image {image:,} on, "
            f"{highest / middle:.1f} times the usual {middle:.4g}\n"
        )
        facts = {"loss": highest, "usual": middle, "samples": [samples_at(run, image)]}
        run.log.append("guard", run.images_seen, what="spike", updates_from=[image], **facts)


def speed(run: Run, images_per_second: float) -> dict[str, float]:
    """TFLOP/s and MFU of all devices since the last report, as far as they are known."""
    latent, network = run.spec.latent, run.stage.network
    tokens = latent.shape[1] * latent.shape[2] // network.patch**2
    asked = run.stage.objective
    work = flops.training_flops(network, asked, tokens=tokens, channels=latent.shape[0])
    device = run.world.device
    peak = flops.peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return flops.figures(images_per_second, work, devices=run.world.size, peak=peak)


def look(run: Run) -> None:
    """Note how samples of the EMA weights look, and how far they are: eqm.glimpse.

    The first process looks. It tells the others on the way that it is at it, for that may take
    longer than they would wait for somebody who says nothing.
    """
    tensors = {}
    if gathers(run):
        tensors = {**run.learner.weights(), **run.learner.whole(run.learner.ema.state_dict())}
    if not run.world.is_first:
        while run.world.first_says(False):
            pass
        return
    told, pause = time.monotonic(), run.world.timeout_seconds / 10

    def at_it(*_: object) -> None:
        nonlocal told
        if time.monotonic() - told > pause:
            run.world.first_says(True)
            told = time.monotonic()

    try:
        note_look(run, tensors, at_it)
    except PeerError:
        raise
    except (EqmError, torch.OutOfMemoryError) as error:
        # A look costs no training, and where one rank alone ended, the others would wait for it.
        reason = str(error).partition(". ")[0] if isinstance(error, RuntimeError) else error
        sys.stderr.write(f"warning: no samples at image {run.images_seen:,}: {reason}\n")
    run.world.first_says(False)


def note_look(run: Run, tensors: dict[str, Tensor], at_it: Callable[..., None]) -> None:
    """What :func:`look` does by itself; ``at_it`` is called on the way."""
    settings = run.context.job.runtime.grid_sampler
    seen = glimpse.take(model_of(run, tensors), settings, run.around, on_update=at_it)
    grid = run.context.store.put(seen.grid)
    figures = {"latent_distance": seen.distance}
    run.log.append("samples", run.images_seen, figures, blobs={"grid.png": grid})


def model_of(run: Run, tensors: dict[str, Tensor]) -> Model:
    """The model with averaged weights."""
    net = model.filled(run.spec.build().to(run.world.device), tensors, "EMA weights")
    return Model(run.spec, net, autoencoder=lambda: _autoencoder(run))


def _autoencoder(run: Run) -> Any:
    from eqm.autoencoder import load_autoencoder
    from eqm.stage import open_ref

    latents = run.context.input("latents")
    return load_autoencoder(
        open_ref(run.context.store, latents.inputs["autoencoder"]), run.context.store
    )


# -- persist ------------------------------------------------------------------------------------


def persist(run: Run, *, durable: bool = True) -> None:
    """Begin to make the state durable, once a position, and wait for that where it is asked.

    Where it fails, or something before it did, all ranks raise what the first one met. Raises
    DivergedError for a run that has diverged, ReplicaError for ranks that are apart.
    """
    refuse_divergence(run)
    refuse_apart(run)
    state = None
    if gathers(run) and run.persisted != run.images_seen:
        if run.world.is_first:
            run.log.append("checkpoint", run.images_seen, tally=run.tally.tolist())
        state = state_of(run)

    def write() -> None:
        if state is not None:
            run.writer.write(state)
        if durable:
            run.writer.wait()

    first_acts(run.world, write)
    run.persisted = run.images_seen


def refuse_apart(run: Run) -> None:
    """What a checkpoint must not come after: raises ReplicaError for ranks whose states differ.

    Every rank computes all updates for itself, of one sum. A flipped bit in the memory of one, or
    another kind of processor, would have it give gradients at other weights than the rest, and only
    the first one's state is ever kept. Of shared weights there are no two to compare.
    """
    world = run.world
    if world.size == 1 or run.learner.shards is not None or run.persisted == run.images_seen:
        return
    told = world.each_says(gauges.fingerprint(replicated(run)))
    usual, count = collections.Counter(told).most_common(1)[0]
    if count == world.size:
        return
    odd = [str(rank) for rank, number in enumerate(told) if number != usual]
    who = f"rank {', '.join(odd)} of {world.size} is apart from the others"
    if 2 * count <= world.size:
        who = f"the {world.size} ranks are apart"
    raise ReplicaError(
        f"{who} at image {run.images_seen:,}: their weights, moments or averages differ, and must "
        "be the same bits. That comes of faulty memory, or of processors or GPUs of several kinds. "
        "Nothing of it is kept: look at that machine, or train on machines of one kind; the same "
        "command goes on from the newest checkpoint"
    )


def replicated(run: Run) -> list[Tensor]:
    """All that every rank has for itself, and that must be the same; in one order on all."""
    tables = {
        "weights": {name: weights for weights, name in run.names.items()},
        "ema": run.learner.ema.state_dict(),
        "moments": checkpoint.optimiser_to_tensors(run.learner.optimiser, run.names),
        **run.learner.averages(),
    }
    # A state that was read has the order in which its file was parsed, which is no two ranks' same.
    return [table[name] for _, table in sorted(tables.items()) for name in sorted(table)]


def first_acts(world: World, act: Callable[[], None]) -> None:
    """Let the first rank do what only one may; where it fails in words, all ranks raise them.

    Otherwise the others would wait for it until their collectives time out.
    """
    failure: EqmError | None = None
    if world.is_first:
        try:
            act()
        except EqmError as error:
            failure = error
    mark = AWAY if isinstance(failure, PASSING) else ""
    told = world.first_tells("" if failure is None else f"{failure}{mark}")
    if failure is not None:
        raise failure
    if told.endswith(AWAY):
        raise AwayError(told.removesuffix(AWAY))
    if told:
        raise InterruptedTraining(told)


@contextlib.contextmanager
def only_trainer(context: Context) -> Iterator[lease.Held | None]:
    """Hold the lease of the run, on the first rank; the others learn that it has it.

    Raises HeldByAnotherError where another process trains the same run.
    """
    store, digest = context.store, context.digest
    held = lease.held(
        store,
        checkpoint.lease_key(digest),
        seconds=context.job.runtime.lease_seconds,
        fix=checkpoint.terms(store, digest),
    )
    found: list[lease.Held] = []
    with contextlib.ExitStack() as until_the_end:
        first_acts(context.world, lambda: found.append(until_the_end.enter_context(held)))
        yield found[0] if found else None


def gathers(run: Run) -> bool:
    """Whether this process takes part in putting state together."""
    return run.world.is_first or run.learner.shards is not None


def state_of(run: Run) -> TrainState:
    """All that the rest of the run is a function of, tensors that change among it.

    Tensors are the first process's.
    """
    whole, optimiser = run.learner.whole, run.learner.optimiser
    return TrainState(
        images_seen=run.images_seen,
        parameters=whole({name: p.detach() for p, name in run.names.items()}),
        ema=whole(run.learner.ema.state_dict()),
        optimiser=whole(checkpoint.optimiser_to_tensors(optimiser, run.names)),
        history=run.history,
        pending=torch.stack(run.since_report).tolist() if run.since_report else [],
        averages={name: whole(track) for name, track in run.learner.averages().items()},
        events=run.log.segments() if run.world.is_first else {},
    )


def keep_snapshot(run: Run) -> None:
    """Begin to keep the power-function averages, where the config wants them kept."""
    if not gathers(run) or run.images_seen not in run.snapshots:
        return
    power, whole = run.learner.power, run.learner.whole
    averages = {sigma: whole(track.state_dict()) for sigma, track in power.items()}
    if run.world.is_first:
        run.writer.snapshot(run.images_seen, averages)


def further_outputs(
    run: Run, weights: dict[str, Tensor], further: dict[str, dict[str, Tensor]]
) -> dict[str, bytes | Blob]:
    """Averages beside the main ones: those at the end, and the snapshots on the way there."""
    found: dict[str, bytes | Blob] = {
        f"{name}.safetensors": checkpoint.tensors_to_bytes({**weights, **averages})
        for name, averages in further.items()
    }
    for images in sorted(run.snapshots):
        kept = checkpoint.read_snapshot(run.context.store, run.context.digest, images)
        for track in kept.tracks:
            found[model.snapshot_name(track.sigma_rel, images)] = track.tensors
    return found


def outcome_of(run: Run) -> Outcome | None:
    """What the stage leaves behind; None but for the first process."""
    whole = run.learner.whole
    weights, averages = run.learner.weights(), whole(run.learner.ema.state_dict())
    further = {name: whole(track) for name, track in run.learner.averages().items()}
    if not run.world.is_first:
        return None
    return Outcome(
        outputs={
            "model.json": model.spec_to_bytes(run.spec),
            "ema.safetensors": checkpoint.tensors_to_bytes({**weights, **averages}),
            "raw.safetensors": checkpoint.tensors_to_bytes(weights),
            **further_outputs(run, weights, further),
            "history.json": json.dumps(run.history).encode(),
        },
        values={
            "images_seen": run.images_seen,
            "parameters": sum(weights[name].numel() for name in run.names.values()),
            "final_loss": run.history["loss"][-1],
        },
        logs={EVENTS: run.log.to_bytes(), **grids_of(run.log)},
    )


def grids_of(log: EventLog) -> dict[str, Blob]:
    """Grids of samples that the log names, under names that say at which image."""
    return {
        f"samples-{event.images_seen:012d}-{name}": blob
        for event in log.events
        for name, blob in event.blobs.items()
    }


# -- the loop -----------------------------------------------------------------------------------


def program(context: Context) -> Outcome | None:
    """Train to the end of the config; the first rank returns the outcome."""
    choose_deterministic()
    # Until the record is sealed: nobody begins the run again between its end and its seal.
    mine = context.until_sealed.enter_context(only_trainer(context))
    run = setup(context, mine)
    with contextlib.closing(run.writer):
        mirrored(run)
    outcome = outcome_of(run)
    if mine is not None:
        # Whoever was replaced seals nothing.
        mine.check()
    return outcome


def mirrored(run: Run) -> None:
    """The loop, with its curve shown in MLflow where that is given."""
    mirror, mine = open_mirror(run), run.mine
    try:
        loop(run)
        if mine is not None:
            run.patience(mine.check)
    except BaseException as error:
        if mirror is not None and isinstance(error, lease.LostLeaseError):
            # Whoever has the lease shows the run; as this one sees it, it is over.
            mirror.abandon()
        elif mirror is not None:
            mirror.close("KILLED")
        raise
    if run.world.is_first:
        run.log.append("finished", run.images_seen)
    if mirror is not None:
        mirror.close("FINISHED")


def loop(run: Run) -> None:
    """Step, report, persist until all images are seen."""
    runtime, total = run.context.job.runtime, total_images(run)
    bar = run.context.progress("training", total, done=run.images_seen)
    began = time.monotonic()
    look_missed(run)
    with StopSignals() as asked, bar:
        coming = islice(feed(run), (total - run.images_seen) // run.config.batch_size)
        for batch in run.stopwatch.waiting_for(coming):
            before = run.images_seen
            stop = step(run, batch, bool(asked) or run.writer.failed)
            report(run, bar)
            last = run.images_seen >= total
            if stop and not last and run.world.is_first:
                run.log.append("interrupted", run.images_seen)
            # Before the checkpoint: whoever goes on from that finds all snapshots up to there.
            keep_snapshot(run)
            if looks(run, before, last) and not (stop and not last):
                look(run)
            if stop or last or crossed(before, run.images_seen, runtime.checkpoint_every_images):
                persist(run, durable=stop or last)
            if stop and not last:
                raise InterruptedTraining(
                    f"stopped at image {run.images_seen:,} of {total:,}, with a checkpoint there: "
                    "start it again to go on"
                )
    say_stall(run, time.monotonic() - began)


def looks(run: Run, before: int, last: bool) -> bool:
    """Whether samples are looked at here."""
    every = run.context.job.runtime.grid_every_images
    return every is not None and (last or crossed(before, run.images_seen, every))


def look_missed(run: Run) -> None:
    """Look where samples were due when the run was stopped, for there was no time for it then."""
    before = run.images_seen - run.config.batch_size
    if run.images_seen == 0 or not looks(run, before, last=False):
        missed = 0
    else:
        missed = not any(
            event.kind == "samples" and event.images_seen == run.images_seen
            for event in run.log.events
        )
    # The log is the first rank's.
    if run.world.first_says(missed):
        look(run)


def say_stall(run: Run, seconds: float) -> None:
    """Say what checkpoints cost the loop."""
    if run.writer.written:
        stalled = run.writer.stalled_seconds
        sys.stderr.write(
            f"{counted(run.writer.written, 'checkpoint')}; training stood still for "
            f"{stalled:.2f} s "
            f"({stalled / seconds:.1%})\n"
        )


def feed(run: Run) -> Iterator[Batch]:
    """This rank's share of the batches from the current position on."""
    return batches(
        run.data,
        batch_size=run.config.batch_size,
        seed=run.config.seed,
        first_image=run.images_seen,
        rank=run.world.rank,
        world=run.world.size,
        pin=run.world.device.type == "cuda",
        patience=run.patience,
    )


def total_images(run: Run) -> int:
    """Images of the whole run: whole updates."""
    return run.config.updates * run.config.batch_size


def crossed(before: int, after: int, interval: int) -> bool:
    """Whether a multiple of an interval lies in (before, after]."""
    return before // interval != after // interval


def open_mirror(run: Run) -> RunMirror | None:
    """The MLflow run of the first rank, where MLflow is given."""
    if not run.world.is_first:
        return None
    context = run.context
    return mirror_of(
        context.job.runtime, context.job.config, context.digest, run.log, context.store
    )


def mirror_of(
    runtime: Runtime, config: Mapping[str, Any], digest: str, log: EventLog, store: Store
) -> RunMirror | None:
    """What shows a log in MLflow, where MLflow is given."""
    if runtime.mlflow_uri is None:
        return None
    return RunMirror(
        runtime.mlflow_uri,
        experiment=runtime.mlflow_experiment,
        run_name=f"{runtime.run_name or 'train'}-{digest[:8]}",
        digest=digest,
        params={f"{s}.{k}": v for s, table in config.items() for k, v in table.items()},
        log=log,
        fetch=store.get,
    )


def send_missed(store: Store, record: Record, runtime: Runtime) -> None:
    """Send MLflow what it has missed of a run that is sealed; nothing where it has it all."""
    if EVENTS not in record.logs:
        return
    log = log_of(store.get(record.logs[EVENTS]), f"{EVENTS} of {record.digest[:12]}")
    mirror = mirror_of(runtime, record.config, record.digest, log, store)
    if mirror is not None:
        mirror.close("FINISHED", seconds=CATCH_UP_SECONDS)


def catch_up(context: Context, record: Record) -> None:
    """The same, by the program of a training that is found sealed."""
    if context.world.is_first:
        send_missed(context.store, record, context.job.runtime)


class StopSignals:
    """Collect SIGTERM and SIGINT while the loop runs, so that it ends between two updates."""

    of_program = False
    """Whether this process ends with the training: then a SIGTERM after the one that it ends for is
    passed over, for there is still to say why, and a lease and a run of MLflow to give back."""

    def __enter__(self) -> list[int]:
        self.asked: list[int] = []
        kinds = (signal.SIGTERM, signal.SIGINT)
        self._before = {kind: signal.signal(kind, self._note) for kind in kinds}
        return self.asked

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._before.items():
            leaves = self.of_program and self.asked and kind == signal.SIGTERM
            signal.signal(kind, signal.SIG_IGN if leaves else handler)

    def _note(self, kind: int, _: FrameType | None) -> None:
        self.asked.append(kind)


def main(argv: list[str]) -> int:
    """Run the stage program."""
    StopSignals.of_program = True
    return stage_main(("train",), program, argv, sealed=catch_up)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
