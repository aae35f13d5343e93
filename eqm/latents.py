"""Stored moments <-> latents that a network sees.

Moments are stored raw: mean and standard deviation of the autoencoder's posterior, fp16, neither
sampled nor whitened, channels [mean..., std...]. Whitening is the LatentSpec's: shift, then scale.
Pure.
"""

import functools

import torch
from torch import Tensor

from eqm.records import LatentSpec


def sample_latents(moments: Tensor, noise: Tensor, spec: LatentSpec) -> Tensor:
    """Draw whitened latents: (mean + std * noise - shift) * scale.

    Shapes: moments (B, 2C, H, W), noise (B, C, H, W); returns float32 (B, C, H, W).
    """
    mean, std = moments.float().chunk(2, dim=1)
    return whiten(mean + std * noise, spec)


def mean_latents(moments: Tensor, spec: LatentSpec) -> Tensor:
    """Whitened posterior means, float32 (B, C, H, W): what scores are computed on."""
    mean, _ = moments.float().chunk(2, dim=1)
    return whiten(mean, spec)


def whiten(raw: Tensor, spec: LatentSpec) -> Tensor:
    """Autoencoder latents -> network latents, (B, C, H, W)."""
    return (raw - _channels(spec.shift, raw)) * _channels(spec.scale, raw)


def unwhiten(latents: Tensor, spec: LatentSpec) -> Tensor:
    """Network latents -> autoencoder latents, (B, C, H, W)."""
    return latents / _channels(spec.scale, latents) + _channels(spec.shift, latents)


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return _there(values, like.dtype, like.device)


@functools.lru_cache(maxsize=16)
def _there(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Once a device: what a GPU is given of the host is waited for, with all that it has to do."""
    # Whoever asks first may keep no graphs; another one keeps it in one.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)
