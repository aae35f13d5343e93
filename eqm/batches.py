"""(latents, seed, first image, rank, world) -> batches; the position is arithmetic.

Image number n of a run is a function of (seed, n): epoch n // N visits the N samples of the split
in an order of its own, each once, and a coin of image n says whether its mirror is taken. Nothing
is kept between batches, so going on at image k is the same as never having stopped, and any number
of processes share the same global batch. What else is drawn for an image is eqm.learner's business.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eqm import randomness, threads
from eqm.errors import ConfigError, DataError, require
from eqm.latent_set import LatentSet, open_manifest
from eqm.patience import Patience
from eqm.randomness import Stream, uniform
from eqm.shards import Int64

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch."""

    moments: Tensor
    """(B, 2C, H, W) float16: mean, then standard deviation, raw."""
    labels: Tensor
    """(B,) int64."""
    image_numbers: Tensor
    """(B,) int64, counted from the start of the run: what everything random is drawn by."""
    sample_numbers: Tensor
    """(B,) int64, of the latent set."""

    def pinned(self) -> "Batch":
        """The same in page-locked memory."""
        return Batch(*(tensor.pin_memory() for tensor in self._tensors))

    def to(self, device: torch.device | str) -> "Batch":
        """The same on a device; from page-locked memory the copy runs while the host goes on."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self._tensors))

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.moments, self.labels, self.image_numbers, self.sample_numbers


def batches(
    latents: LatentSet | str | Path,
    *,
    batch_size: int,
    seed: int,
    first_image: int = 0,
    rank: int = 0,
    world: int = 1,
    split: Split = "train",
    ahead: int = 2,
    pin: bool = False,
    patience: Patience | None = None,
) -> Iterator[Batch]:
    """Batches without end, from image number ``first_image`` on; ``ahead`` are read ahead.

    ``batch_size`` is global: each of ``world`` ranks gets its contiguous part. ``pin`` puts what is
    read into page-locked memory, from where a GPU takes it without anybody waiting
    (:meth:`Batch.to`). A store that is away is waited for with ``patience``. Raises ConfigError for
    a batch that the ranks cannot share equally, DataError for a split without samples, and what
    reading raises.
    """
    _check(batch_size, first_image, rank, world, split)
    require(ahead > 0, "ahead", ahead, "greater than 0")
    data = latents if isinstance(latents, LatentSet) else open_manifest(latents)
    if not len(split_numbers(data, split)):
        raise DataError(f"{data.where} has no {split} samples")
    share, ask = batch_size // world, patience or Patience()
    starts = itertools.count(first_image + rank * share, batch_size)

    def read(start: int) -> Batch:
        batch = ask(lambda: read_batch(data, seed, start, share, split))
        return batch.pinned() if pin else batch

    # Several threads: a page that must come from the disk holds up its own batch alone.
    return threads.ahead(read, starts, threads=ahead, name="eqm-batches")


def _check(batch_size: int, first_image: int, rank: int, world: int, split: str) -> None:
    require(batch_size > 0, "batch_size", batch_size, "greater than 0")
    require(first_image >= 0, "first_image", first_image, "0 or greater")
    require(world > 0, "world", world, "greater than 0")
    require(0 <= rank < world, "rank", rank, f"from 0 to {world - 1}")
    require(split in ("train", "held_out"), "split", split, "'train' or 'held_out'")
    if batch_size % world:
        raise ConfigError(
            f"batch_size is {batch_size}, which {world} processes cannot share equally: change "
            "one of them"
        )


def read_batch(data: LatentSet, seed: int, start: int, count: int, split: Split = "train") -> Batch:
    """Images ``start`` to ``start + count`` of a run."""
    numbers = np.arange(start, start + count, dtype=np.int64)
    samples = samples_of(data, seed, numbers, split)
    mirror = mirror_of(data, seed, numbers)
    return Batch(
        moments=torch.from_numpy(data.moments(samples, mirror)),
        labels=torch.from_numpy(data.labels[samples].astype(np.int64)),
        image_numbers=torch.from_numpy(numbers),
        sample_numbers=torch.from_numpy(samples),
    )


def split_numbers(data: LatentSet, split: Split) -> NDArray[np.int32]:
    """Sample numbers of one side of the split."""
    return data.train_numbers if split == "train" else data.held_out_numbers


def samples_of(data: LatentSet, seed: int, image_numbers: Int64, split: Split = "train") -> Int64:
    """Sample number of each image of a run, (B,)."""
    chosen = split_numbers(data, split)
    return chosen[order(seed, len(chosen), image_numbers)].astype(np.int64)


def order(seed: int, size: int, image_numbers: Int64) -> Int64:
    """Which of ``size`` things each image of a run is, (B,): every one once an epoch."""
    return randomness.order(seed, size, torch.from_numpy(image_numbers)).numpy()


def mirror_of(data: LatentSet, seed: int, image_numbers: Int64) -> np.ndarray | None:
    """Whether each image of a run is taken in the mirror, (B,) bool; None without mirrors."""
    if not data.manifest.mirrored:
        return None
    coins = uniform(seed, Stream.MIRROR, torch.from_numpy(image_numbers))
    return (coins.view(-1) < 0.5).numpy()


class _Callable(ModuleType):
    """``eqm.batches(...)`` is public, but the name is this module once anybody has imported it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[Batch]:
        """See :func:`batches`."""
        return batches(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
