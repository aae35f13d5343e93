"""How a training looks on its way: a grid of samples and a quick distance, by its EMA weights.

The distance needs no extractor and no decoder, and is for the trend of one run alone: it is a
Fréchet distance between latents in a few random directions, of few samples that are the same
seeds each time. It is no metric to report. Called by run and looks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eqm import sampling
from eqm.batches import read_batch
from eqm.config import SamplerConfig
from eqm.figures import sample_grid
from eqm.frechet import Gaussian
from eqm.latent_set import LatentSet
from eqm.latents import mean_latents
from eqm.model import Model
from eqm.randomness import Stream, normal

GRID_SAMPLES_A_CLASS = 6
GRID_CLASSES = 10
SAMPLES = 120
"""Of the distance, over all classes."""
DIRECTIONS = 16
REFERENCE_IMAGES = 1024
CELL_PX = 64
"""Smaller images are drawn about so large."""


@dataclass(frozen=True, kw_only=True)
class Glimpse:
    """What is shown of the samples at one position of a run."""

    grid: bytes
    """PNG: a row for each of the first classes."""
    distance: float


def directions(size: int) -> Tensor:
    """DIRECTIONS random directions in latent space, (size, DIRECTIONS) float64: always the same."""
    rows = normal(0, Stream.DIRECTION, torch.arange(DIRECTIONS), (size,), dtype=torch.float64)
    return (rows / rows.norm(dim=1, keepdim=True)).T


def projected(latents: Tensor) -> np.ndarray:
    """Latents (B, C, H, W) in the random directions: (B, DIRECTIONS) float64."""
    flat = latents.detach().flatten(1).double().cpu()
    return (flat @ directions(flat.shape[1])).numpy()


def reference(data: LatentSet, seed: int) -> Gaussian:
    """Mean and covariance of the first training images in those directions."""
    batch = read_batch(data, seed, 0, REFERENCE_IMAGES)
    return Gaussian.of(projected(mean_latents(batch.moments.float(), data.manifest.spec)))


def take(
    model: Model,
    settings: SamplerConfig,
    against: Gaussian,
    on_update: Callable[[int, Tensor], None] | None = None,
) -> Glimpse:
    """Sample a grid, and the samples of the distance. Raises DataError where samples diverge.

    By rule, updates and precision of the settings; without guidance and without a stop, for a look
    costs training time, and looks are compared with one another. ``on_update`` as
    :func:`eqm.sampling.sample` has it; what it raises ends the look.
    """
    classes = model.spec.classes[:GRID_CLASSES]
    labels = [k for k in range(len(classes)) for _ in range(GRID_SAMPLES_A_CLASS)]
    shown = _sample(model, settings, labels, on_update).images().cpu().numpy()
    grid = shown.reshape(len(classes), GRID_SAMPLES_A_CLASS, *shown.shape[1:])
    spread = [k * len(model.spec.classes) // SAMPLES for k in range(SAMPLES)]
    made = projected(_sample(model, settings, spread, on_update).latents)
    return Glimpse(
        grid=sample_grid(grid, classes, scale=max(1, CELL_PX // shown.shape[-1])),
        distance=Gaussian.of(made).distance(against),
    )


def _sample(
    model: Model,
    settings: SamplerConfig,
    labels: list[int],
    on_update: Callable[[int, Tensor], None] | None,
) -> sampling.Samples:
    return sampling.sample(
        model,
        labels=labels,
        seeds=range(len(labels)),
        rule=sampling.rule_of(settings),
        updates=settings.updates,
        precision=settings.precision,
        on_update=on_update,
    )
