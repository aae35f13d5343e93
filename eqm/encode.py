"""Stage "latents": images -> sealed shards of moments. ``python -m eqm.encode CONFIG.json``

The plan cuts the listing into runs of consecutive images, one a shard. A finished shard is
committed create-once under ``latents/<digest>/shards/``; interrupted, the stage goes on with the
shards that are not. A batch of the autoencoder never spans two shards, so a shard's bytes do not
depend on who encodes it, and processes share the shards without talking to each other.
"""

import functools
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from eqm.autoencoder import Autoencoder, load_autoencoder
from eqm.config import EncodeConfig, LatentsStage
from eqm.errors import DataError
from eqm.images import ImageSource, checked_source, mirrored
from eqm.records import Blob, Shard, note_from_bytes, note_to_bytes, to_json
from eqm.shards import ORIGINALS, Index, Sample, read_index, seal_set, write_shard
from eqm.stage import Context, Outcome
from eqm.stage import main as stage_main

ORIGINAL_IMAGES = 24
GATHERERS = 16
"""Commits and indices that are read at once."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """A run of consecutive images that become one shard."""

    number: int
    first: int
    """Number of its first image in the listing, and of its first sample."""
    count: int

    def batches(self, size: int) -> Iterator[range]:
        """Image numbers of each call of the autoencoder."""
        end = self.first + self.count
        for start in range(self.first, end, size):
            yield range(start, min(start + size, end))


def shard_plans(images: int, config: EncodeConfig) -> list[ShardPlan]:
    """Cut a listing into shards; all but the last have config.shard_images."""
    size = config.shard_images
    starts = enumerate(range(0, images, size))
    return [ShardPlan(number=i, first=s, count=min(size, images - s)) for i, s in starts]


def program(context: Context) -> Outcome | None:
    """Encode what is missing; the first rank returns the outcome."""
    stage: LatentsStage = context.config
    source = checked_source(
        stage.source, context.job.runtime.source_uri, context.job.inputs["source"]
    )
    autoencoder = load_autoencoder(
        context.input("autoencoder"), context.store, context.world.device
    )
    _check_sizes(source, autoencoder)
    plans = shard_plans(len(source.entries), stage.encode)
    mine = plans[context.world.rank :: context.world.size]
    done = [plan for plan in mine if committed(context, plan) is not None]
    total, skipped = sum(plan.count for plan in mine), sum(plan.count for plan in done)
    with context.progress("encoding", total, done=skipped) as bar:
        for plan in mine:
            if plan not in done:
                commit(context, plan, encode_shard(plan, source, autoencoder, stage.encode))
                bar.advance(plan.count)
    context.world.barrier()
    return gather(context, source, autoencoder, plans) if context.world.is_first else None


def _check_sizes(source: ImageSource, autoencoder: Autoencoder) -> None:
    spec, config = autoencoder.spec, source.config
    made_for = (spec.image_size_px, spec.image_channels)
    if made_for != (config.image_size_px, config.channels):
        raise DataError(
            f"the autoencoder takes images of {made_for[0]} px and {made_for[1]} channels, the "
            f"source gives {config.image_size_px} px and {config.channels}: fit one for this source"
        )


# -- one shard ----------------------------------------------------------------------------------


def encode_shard(
    plan: ShardPlan, source: ImageSource, autoencoder: Autoencoder, config: EncodeConfig
) -> list[Sample]:
    """Moments of all images of a shard, and of their mirrors where the source has mirrors."""
    samples: list[Sample] = []
    batches = list(plan.batches(config.batch_size))
    for numbers, pixels in zip(batches, source.read_many(batches), strict=True):
        moments = autoencoder.encode(pixels).cpu()
        mirrors = autoencoder.encode(mirrored(pixels)).cpu() if source.config.mirror else None
        samples.extend(
            _sample(source, number, moments[i], None if mirrors is None else mirrors[i])
            for i, number in enumerate(numbers)
        )
    return samples


def _sample(source: ImageSource, number: int, moments: Tensor, mirror: Tensor | None) -> Sample:
    entry = source.entries[number]
    return Sample(
        key=entry.key,
        label=entry.label,
        held_out=entry.held_out,
        moments=moments.numpy(),
        mirror=None if mirror is None else mirror.numpy(),
    )


def _commit_key(context: Context, plan: ShardPlan) -> str:
    return f"latents/{context.digest}/shards/{plan.number:05d}.json"


def committed(context: Context, plan: ShardPlan) -> Shard | None:
    """The finished shard of a plan; None if it must still be made."""
    key = _commit_key(context, plan)
    if not context.store.exists(key):
        return None
    shard = note_from_bytes(Shard, context.store.read(key), context.store.where(key))
    # A blob that was lost since is made again: equal bytes come back under the same name.
    there = all(context.store.exists(blob.key) for blob in (shard.tar, shard.index))
    return shard if there else None


def commit(context: Context, plan: ShardPlan, samples: list[Sample]) -> None:
    """Make a shard durable: what it consists of first, what names it last."""
    packed = write_shard(samples, first_number=plan.first)
    tar, index = context.store.put(packed.tar), context.store.put(packed.index)
    shard = Shard(tar=tar, index=index, count=packed.count)
    context.store.write_once(_commit_key(context, plan), note_to_bytes(shard))


# -- all of them --------------------------------------------------------------------------------


def gather(
    context: Context, source: ImageSource, autoencoder: Autoencoder, plans: list[ShardPlan]
) -> Outcome:
    """The manifest of all shards, and an outcome that names every one of them."""
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
        lineage=context.job.inputs,
    )
    manifest = sealed.manifest
    outputs: dict[str, bytes | Blob] = {**sealed.files, ORIGINALS: originals(source)}
    for plan, shard in zip(plans, shards, strict=True):
        outputs[f"shard-{plan.number:05d}.tar"] = shard.tar
        outputs[f"shard-{plan.number:05d}.index"] = shard.index
    return Outcome(
        outputs=outputs,
        values={
            "spec": to_json(manifest.spec),
            "images": manifest.count,
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
            f"deletes from the store; delete {_commit_key(context, plan)} too and run again"
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
