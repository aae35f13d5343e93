"""Where samples start that do not start at noise alone: held-out images, partly noised (Figure 10).

    x_gamma = gamma x + (1 - gamma) eps        noise level = 1 - gamma

Called by generate.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eqm.errors import DataError
from eqm.latent_set import LatentSet, open_manifest
from eqm.latents import mean_latents
from eqm.model import Model
from eqm.records import Record
from eqm.sampler import start_noise
from eqm.stage import open_ref
from eqm.storage import Store


def held_out_of(store: Store, trained: Record, level: float) -> LatentSet | None:
    """The set that a model was trained on, whose held-out images samples of a noise level start at.

    None at level 1, where no image is left in the start. Raises DataError where none is held out.
    """
    if level == 1:
        return None
    latents = open_manifest(open_ref(store, trained.inputs["latents"]), store)
    if not len(latents.held_out_numbers):
        raise DataError(
            f"generate.noise_level is {level}, which needs held-out images, and {latents.where} "
            "has none: set source.held_out_fraction above 0, or noise_level to 1"
        )
    return latents


def told_of_repeats(held: LatentSet | None, samples: int, level: float) -> str | None:
    """What to tell people of so many samples where images start twice; None where none does."""
    if held is None or samples <= len(held.held_out_numbers):
        return None
    alike = "exact copies" if level == 0 else "alike"
    images = len(held.held_out_numbers)
    return (
        f"generate.samples is {samples}, and there are {images} held-out images to start at: "
        f"samples that start at the same one are {alike}, so distances are too large, KID is not "
        "unbiased, and intervals, which take samples for independent, may be too narrow. Set "
        "generate.samples to no more, or hold out more images (source.held_out_fraction)"
    )


def labels_of_held_out(latents: LatentSet, seeds: Sequence[int]) -> Tensor:
    """Labels (B,) int64 of the images that samples start at."""
    return torch.from_numpy(latents.labels[_numbers(latents, seeds)].astype(np.int64))


def partly_noised(latents: LatentSet, model: Model, seeds: Sequence[int], level: float) -> Tensor:
    """Starts (B, C, H, W) of samples: ``level`` parts of noise, the rest an image.

    Sample s has held-out image s, modulo their number, as its mean latent; its noise is the one
    that it would start from alone. With more samples than images some are alike, at level 0 the
    same (:func:`told_of_repeats`).
    """
    moments = torch.from_numpy(latents.moments(_numbers(latents, seeds)))
    x = mean_latents(moments, latents.manifest.spec).to(model.device, model.dtype)
    names = torch.tensor(list(seeds), dtype=torch.int64)
    noise = start_noise(names, tuple(x.shape[1:]), dtype=model.dtype, device=model.device)
    return (1 - level) * x + level * noise


def _numbers(latents: LatentSet, seeds: Sequence[int]) -> NDArray[np.int64]:
    held = latents.held_out_numbers
    return held[np.asarray(seeds, dtype=np.int64) % len(held)].astype(np.int64)
