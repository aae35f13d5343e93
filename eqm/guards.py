"""What must not go on unseen in a training: numbers that are not finite, spikes, ranks apart."""

import collections
import statistics
import sys
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from eqm import gauges
from eqm.batches import samples_of
from eqm.errors import DivergedError, ReplicaError
from eqm.learner import diverged
from eqm.run import Run
from eqm.words import counted

SPIKE, SPIKE_POINTS = 5.0, 10
"""A loss so many times the median of so many points of the curve is told."""
NAMED_UPDATES = 8
"""Of so many updates that were skipped the log names the samples; of all it names the images."""


def guarded(run: Run) -> tuple[Tensor, Tensor]:
    """(loss, gradient norm) of the updates since the last event that were finite, (U, 2) float64.

    And their first images, (U,). Raises DivergedError, naming the update, for one that was not
    where training is to stop, and where none of ``run.recent`` was. Others that were not are told
    and logged, with the numbers of their samples.
    """
    # What no event tells of yet may be one update: alone it is no sign of anything.
    recent = torch.stack(run.recent).double().cpu()
    found, size = recent[-run.since_event :], run.config.batch_size
    begun = torch.arange(run.images_seen - len(found) * size, run.images_seen, size)
    finite = found.isfinite().all(dim=1)
    odd = begun[~finite].tolist()
    if odd and (run.config.on_nonfinite == "stop" or not recent.isfinite().all(dim=1).any()):
        tell_nonfinite(run, "guard", odd[:1])
        loss, norm = found[~finite][0].tolist()
        told = diverged(loss, norm, odd[0])
        if run.config.on_nonfinite == "skip":
            of = counted(len(recent), "update")
            told += f" (train.on_nonfinite is 'skip', but of the last {of} none was finite)"
        raise DivergedError(told, updates_from=odd[:1], samples=[samples_at(run, odd[0])])
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
    return list(run.learner.state().values())
