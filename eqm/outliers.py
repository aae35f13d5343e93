"""Do a model's scores tell other images from those it was trained on? Sets of images -> rows.

Scores are gradient norms at the mean latents, unlabelled, held-out images against others. The
measures of scores are eqm.ood's. Called by evaluate.
"""

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eqm import images, ood
from eqm.autoencoder import Autoencoder
from eqm.config import EvaluateConfig
from eqm.latents import mean_latents
from eqm.model import Model
from eqm.records import OODRow

BATCH = 256
SHUFFLE_SEED = 0


def out_of_distribution(
    config: EvaluateConfig, trained: Model, held_out: NDArray[np.uint8]
) -> tuple[tuple[OODRow, ...], dict[str, Tensor]]:
    """Rows and scores of each set against held-out images; empty without a null label."""
    if not trained.spec.null_label:
        return (), {}
    real = torch.from_numpy(held_out[: config.ood_images])
    size, channels = trained.spec.latent.image_size_px, trained.spec.latent.image_channels
    sets = {
        "photographs": (images.sample_photographs(size, channels, config.ood_images), True),
        "constant": (images.constant_images(size, channels, config.ood_images), True),
        "flipped": (images.flipped(real), False),
        "shuffled": (images.shuffled(real, SHUFFLE_SEED), False),
    }
    score = partial(gradient_norms, trained, trained.autoencoder)
    scores = {"held-out": score(real), **{name: score(x) for name, (x, _) in sets.items()}}
    inside = scores["held-out"].numpy()
    rows = (_row(n, inside, scores[n].numpy(), gated) for n, (_, gated) in sets.items())
    return tuple(rows), scores


def gradient_norms(trained: Model, autoencoder: Autoencoder, pixels: Tensor) -> Tensor:
    """Norm of the gradient at each image's mean latent, (N,): low on data, higher off it."""
    found = []
    for batch in pixels.split(BATCH):
        moments = autoencoder.encode(batch.to(trained.device))
        x = mean_latents(moments, trained.spec.latent).to(trained.dtype)
        # A baseline that is conditioned on the noise level is asked where data are.
        gamma = x.new_ones(len(x)) if trained.field.conditioned else None
        found.append(trained.gradient(x, gamma=gamma).flatten(1).norm(dim=1).double().cpu())
    return torch.cat(found)


def _row(
    name: str, inside: NDArray[np.float64], outside: NDArray[np.float64], gated: bool
) -> OODRow:
    result = ood.compare(inside, outside)
    low, high = result.auroc_interval
    return OODRow(
        name=name,
        count=len(outside),
        auroc=result.auroc,
        auroc_low=low,
        auroc_high=high,
        aupr=result.aupr_out,
        fpr95_in=result.fpr95_in,
        gated=gated,
    )
