"""Stage "latents": images -> sealed shards of moments. ``python -m eqm.encode CONFIG.json``

The plan cuts the listing into runs of consecutive images, one a shard. A finished shard is
committed create-once under ``latents/<digest>/shards/``; interrupted, the stage goes on with the
shards that are not. A batch of the autoencoder never spans two shards, and on a CPU it is cut into
pieces whose size the config alone decides, so a shard's bytes do not depend on who encodes it.
Images that an earlier set holds are copied from it (eqm.earlier); batches are of the others.

Any number of encoders, in one program or in many, share the shards (eqm.walk). In each of them
worker processes decode (eqm.readahead), lanes keep the device busy, and a thread packs and uploads
the shard before.
"""

import contextlib
import functools
import math
import secrets
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from eqm.autoencoder import Autoencoder, load_autoencoder
from eqm.compute import check_for_training
from eqm.config import EncodeConfig, LatentsStage, Runtime, SourceConfig
from eqm.distributed import World
from eqm.earlier import INPUT, Earlier, open_earlier
from eqm.errors import ConfigError, DataError, MissingError
from eqm.images import ImageSource, checked_source, mirrored
from eqm.precision import full_precision
from eqm.progress import Progress
from eqm.readahead import open_readers
from eqm.records import Blob, Shard, note_from_bytes, note_to_bytes, to_json
from eqm.shards import ORIGINALS, Index, Sample, read_index, seal_set, write_shard
from eqm.stage import Context, Outcome, Unfinished
from eqm.stage import main as stage_main
from eqm.walk import Batch, Commits, NoCommits, ShardPlan, Walk, commit_key, shard_plans
from eqm.words import counted

ORIGINAL_IMAGES = 24
PIECE_PIXELS = 2**16
"""On a CPU a call of the autoencoder takes images of so many pixels, and their activations stay in
its caches; larger calls took 1.2 to 1.6 times as long."""
GATHERERS = 16
"""Commits and indices that are read at once."""


def program(context: Context) -> Outcome | Unfinished | None:
    """Encode what is missing; the first rank returns the outcome."""
    stage: LatentsStage = context.config
    runtime = context.job.runtime
    check_for_training(runtime.compute, context.world.device)
    source = checked_source(
        stage.source, runtime.source_uri, context.job.inputs["source"], listing=context.listing()
    )
    earlier = open_earlier(context, source.entries)
    is_new = None if earlier is None else earlier.is_new
    plans = shard_plans(len(source.entries), stage.encode, is_new)
    asked = _asked(plans, runtime)
    walk = Walk(Commits(context), asked, _start(context.world, len(plans)))
    autoencoder = encode_shards(context, source, walk, earlier)
    wanted = {plan.number for plan in asked}
    context.world.barrier(left=lambda: len(wanted.difference(Commits(context).numbers())))
    with context.world.first_at_work():
        if not context.world.is_first:
            return None
        return _outcome(context, source, autoencoder, plans, earlier)


def _outcome(
    context: Context,
    source: ImageSource,
    autoencoder: Autoencoder,
    plans: list[ShardPlan],
    earlier: Earlier | None,
) -> Outcome | Unfinished:
    """What the set is, of all that was committed; what is lost of it is encoded again."""
    runtime = context.job.runtime
    missing = len(plans) - len(Commits(context).numbers())
    if missing and runtime.shards is not None:
        return Unfinished(f"range done, {counted(missing, 'shard')} of the set still missing")
    lost = _lost(context, plans)
    if lost:
        encode_shards(context, source, Walk(NoCommits(), lost, 0), earlier)
    return gather(context, source, autoencoder, plans)


def _asked(plans: list[ShardPlan], runtime: Runtime) -> list[ShardPlan]:
    """The plans of this program. Raises ConfigError for a range that holds none."""
    if runtime.shards is None:
        return plans
    first, end = runtime.shards
    if end > len(plans):
        raise ConfigError(
            f"runtime.shards is {runtime.shards}, but the images fill "
            f"{counted(len(plans), 'shard')}: the second number must be at most {len(plans)}"
        )
    return plans[first:end]


def _start(world: World, plans: int) -> int:
    """Where a rank begins: far from the others, and by chance for those of other programs."""
    return world.first_says(secrets.randbelow(plans)) + world.rank * plans // world.size


def _check_sizes(source: ImageSource, autoencoder: Autoencoder) -> None:
    spec, config = autoencoder.spec, source.config
    made_for = (spec.image_size_px, spec.image_channels)
    if made_for != (config.image_size_px, config.channels):
        raise DataError(
            f"the autoencoder takes images of {made_for[0]} px and {made_for[1]} channels, the "
            f"source gives {config.image_size_px} px and {config.channels}: fit one for this source"
        )


# -- from pixels to commits ---------------------------------------------------------------------


def encode_shards(
    context: Context, source: ImageSource, walk: Walk, earlier: Earlier | None
) -> Autoencoder:
    """Encode and commit the shards of a walk; returns the autoencoder."""
    config: EncodeConfig = context.config.encode
    world, size = context.world, config.batch_size
    workers = decoders(context.job.runtime) if any(plan.new for plan in walk.left) else 0
    if earlier is not None:
        earlier.require([number for plan in walk.left for number in plan.copied])
    lanes = Lanes(world.device, source.config, size)
    # Forked before the weights are here: the workers need none of them.
    with contextlib.ExitStack() as stack:
        readers = stack.enter_context(open_readers(source, size, workers=workers, kept=lanes.kept))
        autoencoder = load_autoencoder(context.input("autoencoder"), context.store, world.device)
        _check_sizes(source, autoencoder)
        if earlier is not None:
            earlier.check(autoencoder.spec)
        done = walk.count(walk.finished)
        bar = stack.enter_context(
            context.progress("encoding", walk.images, unit=walk.unit, done=done)
        )
        committer = stack.enter_context(Committer(context, source, walk, earlier))
        stack.enter_context(lanes)
        # Lanes set and restore it at the same time: here it is what all of them restore.
        stack.enter_context(full_precision())
        counter = Counter(walk, bar)
        pixels = readers.read(walk.batches(size))
        network = autoencoder.in_precision(config.precision)
        for batch, moments in lanes.encoded(pixels, network, walk):
            counter.count(batch)
            if batch.plan.number not in walk.overtaken:
                committer.add(batch, moments)
        committer.wait()
    return autoencoder


def decoders(runtime: Runtime) -> int:
    """Worker processes of this encoder."""
    return max(1, torch.get_num_threads() - 1) if runtime.workers is None else runtime.workers


class Counter:
    """What of the walk is done, here and elsewhere, on a bar."""

    def __init__(self, walk: Walk, bar: Progress) -> None:
        self._walk, self._bar = walk, bar
        self._here: dict[int, int] = {}

    def count(self, batch: Batch) -> None:
        """Count a batch."""
        number, finished = batch.plan.number, self._walk.finished
        # What is copied into a shard is counted with its last batch.
        copied = batch.plan.count - len(batch.plan.new) if batch.is_last else 0
        self._here[number] = self._here.get(number, 0) + len(batch.numbers) + copied
        here = sum(images for shard, images in self._here.items() if shard not in finished)
        self._bar.advance(self._walk.count(finished) + here - self._bar.done)


Moments = tuple[NDArray[Any], NDArray[Any] | None]
"""Of some images and of their mirrors, float32 (B, 2C, H, W) each."""


class Lanes:
    """Threads that keep a device busy: while one waits, another has given it work.

    On a CPU each is one core's: pieces of a batch beside each other are faster than one call on all
    cores, and their bits do not depend on how many cores there are.
    """

    def __init__(self, device: torch.device, source: SourceConfig, batch_size: int) -> None:
        self._device, self._mirror = device, source.mirror
        on_cpu = device.type == "cpu"
        self._threads = torch.get_num_threads()
        lanes = self._threads if on_cpu else 2
        fitting = max(1, PIECE_PIXELS // source.image_size_px**2)
        self._piece = min(batch_size, fitting) if on_cpu else batch_size
        self.kept = max(2, math.ceil(2 * lanes / math.ceil(batch_size / self._piece)))
        """Batches that it holds at once."""
        # Two calls at once would hold twice the activations on a GPU, and win nothing.
        self._call = contextlib.nullcontext() if on_cpu else threading.Lock()
        self._pool = ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> "Lanes":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def encoded(
        self, pixels: Iterable[tuple[Batch, Tensor]], autoencoder: Autoencoder, walk: Walk
    ) -> Iterator[tuple[Batch, list[Moments]]]:
        """Batches with their moments in pieces, in order; those of overtaken shards left out."""
        coming: deque[tuple[Batch, list[Future[Moments]]]] = deque()
        for batch, images in pixels:
            if batch.plan.number not in walk.overtaken:
                pieces = images.split(self._piece) if len(images) else ()
                coming.append(
                    (batch, [self._pool.submit(self._encode, autoencoder, p) for p in pieces])
                )
            if len(coming) == self.kept:
                yield _finished_batch(*coming.popleft())
        while coming:
            yield _finished_batch(*coming.popleft())

    def _encode(self, autoencoder: Autoencoder, images: Tensor) -> Moments:
        with self._call:
            there = images.to(self._device)
            moments = autoencoder.encode(there)
            mirrors = autoencoder.encode(mirrored(there)) if self._mirror else None
        return moments.cpu().numpy(), None if mirrors is None else mirrors.cpu().numpy()


def _finished_batch(batch: Batch, pieces: list[Future[Moments]]) -> tuple[Batch, list[Moments]]:
    return batch, [piece.result() for piece in pieces]


class Committer:
    """Packs, uploads and commits a shard in the background while the next one is encoded."""

    def __init__(
        self, context: Context, source: ImageSource, walk: Walk, earlier: Earlier | None
    ) -> None:
        self._context, self._source, self._walk = context, source, walk
        self._earlier = earlier
        self._plan: ShardPlan | None = None
        self._moments: list[Moments] = []
        self._pool = ThreadPoolExecutor(1)
        self._commit: Future[bool] | None = None

    def __enter__(self) -> "Committer":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def add(self, batch: Batch, moments: list[Moments]) -> None:
        """Take a batch; with its last one a shard is on its way."""
        if batch.plan is not self._plan:
            self._plan, self._moments = batch.plan, []
        self._moments += moments
        if batch.is_last:
            # Bounds the memory: one shard on its way, one that fills.
            self.wait()
            work = (self._context, batch.plan, self._source, self._moments, self._earlier)
            self._commit = self._pool.submit(commit, *work)
            self._moments = []

    def wait(self) -> None:
        """Return when nothing is on its way. Raises what committing raised."""
        if self._commit is not None:
            if not self._commit.result():
                self._walk.leap()
            self._commit = None


# -- one shard ----------------------------------------------------------------------------------


def samples_of(
    plan: ShardPlan, source: ImageSource, moments: Iterable[Moments], earlier: Earlier | None
) -> Iterator[Sample]:
    """Samples of a shard: moments of new images come in pieces, the others are copied."""
    entries, encoded, copied = source.entries, _each(moments), plan.copied
    known: dict[int, Views] = {}
    if earlier is not None and copied:
        known = dict(zip(copied, _each([earlier.moments(copied)]), strict=True))
    for number in range(plan.first, plan.first + plan.count):
        means, mirror = known[number] if number in known else next(encoded)
        yield Sample(
            key=entries.key(number),
            label=int(entries.label[number]),
            held_out=bool(entries.held_out[number]),
            moments=means,
            mirror=mirror,
        )


Views = tuple[NDArray[Any], NDArray[Any] | None]
"""Moments (2C, H, W) of an image and of its mirror."""


def _each(pieces: Iterable[Moments]) -> Iterator[Views]:
    for means, mirrors in pieces:
        for i in range(len(means)):
            yield means[i], None if mirrors is None else mirrors[i]


def committed(context: Context, plan: ShardPlan) -> Shard | None:
    """The finished shard of a plan; None if it must still be made."""
    key = commit_key(context, plan.number)
    try:
        shard = note_from_bytes(Shard, context.store.read(key), context.store.where(key))
    except MissingError:
        return None
    # A blob that was lost since is made again: equal bytes come back under the same name.
    return shard if all(map(context.store.holds, (shard.tar, shard.index))) else None


def commit(
    context: Context,
    plan: ShardPlan,
    source: ImageSource,
    moments: Iterable[Moments],
    earlier: Earlier | None,
) -> bool:
    """Make a shard durable: what it consists of first, what names it last.

    False where another encoder was first; its commit stands.
    """
    samples = list(samples_of(plan, source, moments, earlier))
    packed = write_shard(samples, first_number=plan.first)
    tar, index = context.store.put(packed.tar), context.store.put(packed.index)
    shard = Shard(tar=tar, index=index, count=packed.count)
    return context.store.write_once(commit_key(context, plan.number), note_to_bytes(shard))


def _lost(context: Context, plans: list[ShardPlan]) -> list[ShardPlan]:
    """Shards that are not in the store as they were committed."""
    with ThreadPoolExecutor(GATHERERS) as gatherers:
        found = gatherers.map(functools.partial(committed, context), plans)
        return [plan for plan, shard in zip(plans, found, strict=True) if shard is None]


# -- all of them --------------------------------------------------------------------------------


def gather(
    context: Context, source: ImageSource, autoencoder: Autoencoder, plans: list[ShardPlan]
) -> Outcome:
    """The manifest of all shards, and an outcome that names every one of them."""
    inputs = context.job.inputs
    with ThreadPoolExecutor(GATHERERS) as gatherers:
        shards = list(gatherers.map(functools.partial(_finished, context), plans))
        indices = list(gatherers.map(functools.partial(_index_of, context), plans, shards))
    sealed = seal_set(
        shards,
        indices,
        spec=autoencoder.spec,
        source=source.digest,
        classes=source.classes,
        mirrored=source.config.mirror,
        skipped=source.skipped,
        lineage=inputs,
    )
    manifest = sealed.manifest
    # Named only where there is an earlier set: all other records stay what they were.
    copied = {"copied": sum(p.count - len(p.new) for p in plans)} if INPUT in inputs else {}
    outputs: dict[str, bytes | Blob] = {**sealed.files, ORIGINALS: originals(source)}
    for plan, shard in zip(plans, shards, strict=True):
        outputs[f"shard-{plan.number:05d}.tar"] = shard.tar
        outputs[f"shard-{plan.number:05d}.index"] = shard.index
    return Outcome(
        outputs=outputs,
        values={
            "spec": to_json(manifest.spec),
            "images": manifest.count,
            **copied,
            "train_images": sum(manifest.train_per_class),
            "held_out_images": sum(manifest.held_out_per_class),
            "classes": len(manifest.classes),
            "shards": len(shards),
            "skipped": len(manifest.skipped),
        },
    )


def originals(source: ImageSource) -> bytes:
    """Pixels of some images, spread over the set, to look at beside what is decoded of latents."""
    count = len(source.entries)
    numbers = [i * count // ORIGINAL_IMAGES for i in range(min(ORIGINAL_IMAGES, count))]
    numbers = sorted(set(numbers)) if count > ORIGINAL_IMAGES else list(range(count))
    pixels = torch.stack([source.read(i) for i in numbers])
    columns = {"numbers": np.array(numbers, dtype=np.int64), "pixels": pixels.numpy()}
    return safetensors.numpy.save(columns)


def _finished(context: Context, plan: ShardPlan) -> Shard:
    shard = committed(context, plan)
    if shard is None:
        raise DataError(
            f"shard {plan.number} is not in {context.store.uri} although it was encoded: something "
            f"deletes from the store; delete {commit_key(context, plan.number)} too and run again"
        )
    return shard


def _index_of(context: Context, plan: ShardPlan, shard: Shard) -> Index:
    return read_index(context.store.get(shard.index), shard, f"shard {plan.number}")


def main(argv: list[str]) -> int:
    """Run the stage program."""
    torch.backends.cudnn.benchmark = False
    return stage_main(("latents",), program, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
