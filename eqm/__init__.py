"""Equilibrium Matching (arXiv 2510.02300): train, sample, score and judge generative models.

The main modules, in the order in which a datum meets them:

    records config recipes                 what crosses boundaries
    disk s3 cache storage distributed      the edges
    pictures files layouts images          where images lie -> pixels
    latents autoencoder fit                pixels <-> latents
    tars shards encode                     latents -> sealed WebDataset shards
    latent_set damage inspection batches   shards -> batches, and what is wrong with them
    network unet field objective ema       the gradient field and its loss
    learner adamw gradients compute sharding    one update after another
    lease checkpoint events gauges         what outlives a process
    run guards reporting looks persistence train    how it is trained, for weeks
    model official registry                the trained model, ours and others'
    rules sampler sampling                 descent, and what it is good for
    generate samples                       samples of a model -> a sealed set, and out of it again
    features vision_transformer            images -> features
    adm statistics reference               what is known of the real images
    frechet intervals measures ood outliers evaluate   numbers
    gate report                            decision and page

Names are loaded when first used: ``import eqm`` itself costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eqm.batches import Batch, batches
    from eqm.config import NetworkConfig, ObjectiveConfig, TrainConfig
    from eqm.field import Field
    from eqm.latent_set import open_manifest
    from eqm.learner import learn
    from eqm.model import Model, load
    from eqm.network import Transformer
    from eqm.objective import corrupt
    from eqm.rules import (
        NAG,
        BarzilaiBorwein,
        Euler,
        GradientDescent,
        HeavyBall,
        Heun,
        Langevin,
        Optimiser,
    )
    from eqm.sampler import GradientNormBelow, Known, descend, descend_in_slots, start_noise
    from eqm.sampling import compose, sample, score
    from eqm.unet import UNet

__version__ = "0.1.0"

_HOMES = {
    "eqm.batches": ("Batch", "batches"),
    "eqm.config": ("NetworkConfig", "ObjectiveConfig", "TrainConfig"),
    "eqm.field": ("Field",),
    "eqm.learner": ("learn",),
    "eqm.model": ("Model", "load"),
    "eqm.network": ("Transformer",),
    "eqm.objective": ("corrupt",),
    "eqm.rules": (
        *("NAG", "BarzilaiBorwein", "Euler", "GradientDescent", "HeavyBall", "Heun", "Langevin"),
        "Optimiser",
    ),
    "eqm.sampler": (*("GradientNormBelow", "Known", "descend", "descend_in_slots", "start_noise"),),
    "eqm.sampling": ("compose", "sample", "score"),
    "eqm.latent_set": ("open_manifest",),
    "eqm.unet": ("UNet",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "NAG",
    "BarzilaiBorwein",
    "Batch",
    "Euler",
    "Field",
    "GradientDescent",
    "GradientNormBelow",
    "HeavyBall",
    "Heun",
    "Known",
    "Langevin",
    "Model",
    "NetworkConfig",
    "ObjectiveConfig",
    "Optimiser",
    "TrainConfig",
    "Transformer",
    "UNet",
    "batches",
    "compose",
    "corrupt",
    "descend",
    "descend_in_slots",
    "learn",
    "load",
    "open_manifest",
    "sample",
    "score",
    "start_noise",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'eqm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """List the public names for interactive use."""
    return sorted([*globals(), *__all__])
