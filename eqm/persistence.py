"""How a training becomes durable, goes on from that, and what it leaves at its end."""

import contextlib
import json
import sys
from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from eqm import checkpoint, lease, model
from eqm.checkpoint import Position, TrainState
from eqm.distributed import World
from eqm.errors import ReplicaError
from eqm.events import EVENTS, EventLog, Segments, restore
from eqm.guards import refuse_apart, refuse_divergence
from eqm.records import Blob
from eqm.run import Run, first_acts, gathers
from eqm.stage import Context, Outcome
from eqm.storage import Store


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


def newest(context: Context) -> Position | None:
    """Where the run goes on; None where it begins.

    The first process looks: others might see another one, while another process writes.
    """
    found: list[Position | None] = []
    store, world = context.store, context.world
    first_acts(world, lambda: found.append(checkpoint.newest(store, context.digest)))
    at = found[0] if found else None
    images, token = (world.first_says(number) for number in at or (-1, 0))
    return None if images < 0 else Position(images, token)


def resume(run: Run, at: Position) -> None:
    """Put a checkpoint's state in place, which the first process reads for all.

    Each verifies what it is given. Raises as :func:`eqm.checkpoint.opened`, and ReplicaError where
    a process was given other bytes.
    """
    context, learner = run.context, run.learner
    read = shared_read(context.store, context.world)
    with checkpoint.opened(context.store, context.digest, at, read=read) as found:
        checkpoint.fill(learner.state(), found.files, learner.own)
    run.images_seen = run.persisted = found.images_seen
    run.history = found.curve["history"]
    run.since_report = [
        torch.tensor(pair, device=run.world.device) for pair in found.curve["pending"]
    ]
    first_acts(context.world, lambda: restore_log(run, found.events))


def shared_read(store: Store, world: World) -> checkpoint.Read:
    """Reading a store by the first process for all: they ask together, and are told the same."""

    def read(wanted: checkpoint.Wanted) -> Generator[bytes, None, None]:
        with contextlib.closing(checkpoint.read_ahead(store, wanted)) as coming:
            for key, blob in wanted:
                found: list[bytes] = []
                first_acts(world, lambda found=found: found.append(next(coming)))
                data = world.first_gives(found[0] if found else b"")
                if blob is not None and not world.is_first and Blob.of(data) != blob:
                    # The object itself is sound: the first process has verified it.
                    raise ReplicaError(
                        f"rank {world.rank} of {world.size} was given other bytes of "
                        f"{store.where(key)} than the first one has read and verified: look at "
                        "the memory and the network of its machine, and start again"
                    )
                yield data

    return read


def restore_log(run: Run, segments: Segments) -> None:
    """Go on with the log, and with adding up losses by band: what there was is in its last event.

    The first process has both.
    """
    run.log = restore(run.context.store, segments)
    sys.stderr.write(f"training goes on from image {run.images_seen:,}\n")
    last = run.log.events[-1] if run.log.events else None
    if last is not None and last.images_seen == run.images_seen and last.facts.get("tally"):
        run.tally.copy_(torch.tensor(last.facts["tally"], dtype=torch.float64))


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


def state_of(run: Run) -> TrainState:
    """All that the rest of the run is a function of, tensors that change among it.

    Tensors are the first process's.
    """
    pending = torch.stack(run.since_report).tolist() if run.since_report else []
    return checkpoint.from_flat(
        run.learner.whole(run.learner.state()),
        run.images_seen,
        {"history": run.history, "pending": pending},
        run.log.segments() if run.world.is_first else {},
    )


def keep_snapshot(run: Run) -> None:
    """Begin to keep the power-function averages, where the config wants them kept."""
    if not gathers(run) or run.images_seen not in run.snapshots:
        return
    power, whole = run.learner.power, run.learner.whole
    averages = {sigma: whole(track.state_dict()) for sigma, track in power.items()}
    if run.world.is_first:
        run.writer.snapshot(run.images_seen, averages)


def outcome_of(run: Run) -> Outcome | None:
    """What the stage leaves behind; None but for the first process."""
    whole = run.learner.whole
    weights, averages = run.learner.weights(), whole(run.learner.ema.state_dict())
    further = {name: whole(track) for name, track in run.learner.averages().items()}
    with run.world.first_at_work():
        return _outcome(run, weights, averages, further) if run.world.is_first else None


def _outcome(
    run: Run,
    weights: dict[str, Tensor],
    averages: dict[str, Tensor],
    further: dict[str, dict[str, Tensor]],
) -> Outcome:
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


def grids_of(log: EventLog) -> dict[str, Blob]:
    """Grids of samples that the log names, under names that say at which image."""
    return {
        f"samples-{event.images_seen:012d}-{name}": blob
        for event in log.events
        for name, blob in event.blobs.items()
    }
