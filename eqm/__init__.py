"""Equilibrium Matching (arXiv 2510.02300): train, sample, score and judge generative models.

Modules in the order in which a datum meets them:

    records config storage distributed     what crosses boundaries, and the edges
    images latents autoencoder fit         pixels <-> latents
    shards encode batches                  latents <-> WebDataset shards -> batches
    network field objective ema            the gradient field and how it is trained
    checkpoint train model registry        training state, the public model
    sampler generate                       descent
    features frechet ood evaluate          numbers
    gate report                            decision and page

Names are loaded when first used: ``import eqm`` itself costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eqm.batches import Batch, batches
    from eqm.model import Model, load, sample
    from eqm.sampler import NAG, GradientDescent, GradientNormBelow
    from eqm.shards import open_manifest

__version__ = "0.1.0"

_HOME = {
    "load": "eqm.model",
    "sample": "eqm.model",
    "Model": "eqm.model",
    "NAG": "eqm.sampler",
    "GradientDescent": "eqm.sampler",
    "GradientNormBelow": "eqm.sampler",
    "open_manifest": "eqm.shards",
    "batches": "eqm.batches",
    "Batch": "eqm.batches",
}

__all__ = [
    "NAG",
    "Batch",
    "GradientDescent",
    "GradientNormBelow",
    "Model",
    "batches",
    "load",
    "open_manifest",
    "sample",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'eqm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """List the public names for interactive use."""
    return sorted([*globals(), *__all__])
