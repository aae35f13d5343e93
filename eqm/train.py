"""Stage "train": sealed latents -> a trained gradient field. ``python -m eqm.train CONFIG.json``

The loop is setup / step / report (eqm.reporting) / persist (eqm.persistence). Everything random
about training image number n is a function of (seed, n), and the position is one integer, so a
killed run that is started again ends in the same bits. One trainer at a time holds the lease of the
run (eqm.lease); checkpoints are written beside the loop, which only copies the state. Gradients are
summed over ranks in segments (eqm.gradients) while the backward goes on.
"""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eqm import gauges, lease, model
from eqm.batches import Batch, batches
from eqm.compute import (
    blocks_of,
    check_attention,
    check_micro_batch,
    is_replayed,
    prepare,
    slow_bfloat16,
)
from eqm.config import TrainConfig, TrainStage
from eqm.distributed import OnItsWay, World
from eqm.errors import DataError, EqmError
from eqm.first_weights import first_network
from eqm.latent_set import open_manifest
from eqm.latents import sample_latents
from eqm.learner import FLAGS, Learner, told_of_averages
from eqm.looks import look, look_is_due, look_missed
from eqm.mirroring import mirror_of, send_missed
from eqm.model import ModelSpec
from eqm.objective import Corrupted
from eqm.persistence import keep_snapshot, newest, only_trainer, outcome_of, persist, resume
from eqm.precision import check_products, choose_deterministic, choose_products
from eqm.randomness import Stream, normal
from eqm.records import Record
from eqm.registry import RunMirror
from eqm.reporting import report
from eqm.run import InterruptedTraining, Run, crossed, total_images
from eqm.stage import Context, Outcome
from eqm.stage import main as stage_main
from eqm.words import counted

if TYPE_CHECKING:
    from eqm.sharding import Shards


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
    spec = ModelSpec(
        schema=model.SCHEMA,
        network=stage.network,
        objective=stage.objective,
        latent=data.manifest.spec,
        classes=data.manifest.classes,
        null_label=stage.train.label_dropout > 0,
    )
    begun = newest(context)
    # What a run goes on from is in its checkpoint: the file that it began from may be gone.
    network = spec.build() if begun else first_network(stage, spec, context.store)
    network.to(device)
    if context.world.is_first and (told := slow_bfloat16(stage.train, network, device)):
        sys.stderr.write(told + "\n")
    if compute.compile:
        # Versions of blocks trained earlier in this process would count against these.
        torch.compiler.reset()
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
            replays=is_replayed(compute, stage.objective, device),
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


# -- the loop -----------------------------------------------------------------------------------


def program(context: Context) -> Outcome | None:
    """Train to the end of the config; the first rank returns the outcome."""
    choose_deterministic(context.world.device)
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
        # Of a process that slept the error may be another one: that its peers are gone.
        lost = None if mine is None else mine.why_lost()
        if mirror is not None and lost is not None:
            # Whoever has the lease shows the run; as this one sees it, it is over.
            mirror.abandon()
        elif mirror is not None:
            mirror.close("KILLED")
        if isinstance(error, EqmError) and lost not in (None, error):
            raise lost from error
        raise
    with run.world.first_at_work():
        if run.world.is_first:
            run.log.append("finished", run.images_seen)
        if mirror is not None:
            mirror.close("FINISHED")


def loop(run: Run) -> None:
    """Step, report, persist until all images are seen."""
    runtime, total = run.context.job.runtime, total_images(run)
    bar = run.context.progress("training", total, done=run.images_seen)
    began = time.monotonic()
    with StopSignals() as asked, bar:
        if not look_missed(run, asked):
            raise InterruptedTraining(interrupted(run))
        coming = islice(feed(run), (total - run.images_seen) // run.config.batch_size)
        for batch in run.stopwatch.waiting_for(coming):
            before = run.images_seen
            stop = step(run, batch, bool(asked) or run.writer.failed)
            report(run, bar)
            last = run.images_seen >= total
            stop = stop and not last
            # Before the checkpoint: whoever goes on from that finds all snapshots up to there.
            keep_snapshot(run)
            if look_is_due(run, before, last) and not stop:
                stop = not look(run, asked)
            if stop and run.world.is_first:
                run.log.append("interrupted", run.images_seen)
            if stop or last or crossed(before, run.images_seen, runtime.checkpoint_every_images):
                persist(run, durable=stop or last)
            if stop:
                raise InterruptedTraining(interrupted(run))
    say_stall(run, time.monotonic() - began)


def interrupted(run: Run) -> str:
    """What is said of a run that was asked to stop."""
    return (
        f"stopped at image {run.images_seen:,} of {total_images(run):,}, with a checkpoint there: "
        "start it again to go on"
    )


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


# -- its mirror in MLflow -----------------------------------------------------------------------


def open_mirror(run: Run) -> RunMirror | None:
    """The MLflow run of the first rank, where MLflow is given."""
    if not run.world.is_first:
        return None
    context = run.context
    return mirror_of(
        context.job.runtime, context.job.config, context.digest, run.log, context.store
    )


def catch_up(context: Context, record: Record) -> None:
    """The same, by the program of a training that is found sealed."""
    if context.world.is_first:
        send_missed(context.store, record, context.job.runtime)


def main(argv: list[str]) -> int:
    """Run the stage program."""
    StopSignals.of_program = True
    return stage_main(("train",), program, argv, sealed=catch_up)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
