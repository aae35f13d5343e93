"""What lies in a set of latents: counts, moments, what looks wrong, and a picture of some.

Reads a random share of the samples; what every sample says (counts, means) comes from the manifest.
Whether bytes are undamaged is the business of eqm.damage.
"""

from dataclasses import dataclass

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray

from eqm.autoencoder import Autoencoder, load_autoencoder
from eqm.batches import order
from eqm.errors import DataError
from eqm.figures import sample_grid
from eqm.latent_set import LatentSet
from eqm.latents import mean_latents
from eqm.records import Manifest, Record
from eqm.shards import ORIGINALS
from eqm.stage import open_ref
from eqm.storage import Store
from eqm.words import counted

LOOKED_AT = 4096
"""Samples that are read for the statistics, at most."""
READ_AT_ONCE = 256
CONSTANT_BELOW = 1e-4
"""A channel whose standard deviation is this share of the largest channel's is constant."""
SATURATED_FROM = 65504 / 4
"""Moments of such size are near the end of float16."""
CLAMPED_STD = (1e-6, 1e4)
"""diffusers holds the logarithm of the variance between -30 and 20: stds near these are no news of
the image. 0 is the identity's."""
WELL_SCALED = (0.25, 4.0)
"""Standard deviation of whitened latents, about 1, within which training needs no thought."""
IMBALANCE = 10.0
"""Largest class over smallest from which on a warning is due."""
COLUMNS = 8


@dataclass(frozen=True)
class Statistics:
    """Figures of a set of latents; channels are those of the latents, C."""

    images: int
    train: int
    held_out: int
    classes: int
    smallest: tuple[str, int]
    """Class with the fewest training images, and how many."""
    largest: tuple[str, int]
    looked_at: int
    """Samples that the figures below are of."""
    mean: tuple[float, ...]
    """Of the posterior means, (C,)."""
    std: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    posterior_std: tuple[float, ...]
    """Mean standard deviation of the autoencoder's posterior, (C,)."""
    whitened_std: tuple[float, ...]
    """Standard deviation of the latents that a network sees, (C,)."""
    saturated: float
    """Share of moments that are near the ends of their range."""
    warnings: tuple[str, ...]


def statistics(latents: LatentSet, *, seed: int = 0) -> Statistics:
    """Look at up to LOOKED_AT samples, chosen at random. Raises IntegrityError, StoreError."""
    numbers = order(seed, len(latents), np.arange(min(len(latents), LOOKED_AT)))
    parts = [numbers[i : i + READ_AT_ONCE] for i in range(0, len(numbers), READ_AT_ONCE)]
    moments = np.concatenate([latents.moments(part) for part in parts]).astype(np.float32)
    manifest = latents.manifest
    channels = manifest.spec.shape[0]
    means, stds = moments[:, :channels], moments[:, channels:]
    over = (0, 2, 3)
    std = means.std(axis=over, dtype=np.float64)
    whitened = std * np.array(manifest.spec.scale)
    saturated = _saturated(means, stds)
    per_class = manifest.train_per_class
    ends = int(np.argmin(per_class)), int(np.argmax(per_class))
    found = Statistics(
        images=manifest.count,
        train=sum(per_class),
        held_out=sum(manifest.held_out_per_class),
        classes=len(per_class),
        smallest=(manifest.classes[ends[0]], per_class[ends[0]]),
        largest=(manifest.classes[ends[1]], per_class[ends[1]]),
        looked_at=len(numbers),
        mean=_numbers(means.mean(axis=over, dtype=np.float64)),
        std=_numbers(std),
        low=_numbers(means.min(axis=over)),
        high=_numbers(means.max(axis=over)),
        posterior_std=_numbers(stds.mean(axis=over, dtype=np.float64)),
        whitened_std=_numbers(whitened),
        saturated=saturated,
        warnings=(*_channel_warnings(std, whitened), *_set_warnings(manifest, saturated)),
    )
    return found


def _saturated(means: NDArray[np.float32], stds: NDArray[np.float32]) -> float:
    wide = np.abs(means) >= SATURATED_FROM
    clamped = ((stds > 0) & (stds < CLAMPED_STD[0])) | (stds > CLAMPED_STD[1])
    return float((wide | clamped).mean())


def _channel_warnings(std: NDArray[np.float64], whitened: NDArray[np.float64]) -> list[str]:
    warnings = []
    for channel, (one, white) in enumerate(zip(std, whitened, strict=True)):
        if one <= CONSTANT_BELOW * max(std.max(), 1e-12):
            warnings.append(
                f"channel {channel} is constant (standard deviation {one:.3g}): the autoencoder "
                "does not use it, or the images are all alike"
            )
        elif not WELL_SCALED[0] <= white <= WELL_SCALED[1]:
            warnings.append(
                f"channel {channel} has standard deviation {white:.3g} after whitening, about 1 is "
                "expected: check the scale of the autoencoder's config"
            )
    return warnings


def _set_warnings(manifest: Manifest, saturated: float) -> list[str]:
    warnings = []
    if saturated > 0:
        warnings.append(
            f"{saturated:.2%} of the moments are near the ends of their range: the autoencoder is "
            "damaged, or was made for other images"
        )
    per_class = manifest.train_per_class
    empty = [manifest.classes[i] for i, count in enumerate(per_class) if not count]
    if empty:
        named = ", ".join(empty[:5])
        more = f" and {len(empty) - 5:,} more" if len(empty) > 5 else ""
        warnings.append(f"classes without a training image: {named}{more}")
    elif max(per_class) > IMBALANCE * min(per_class):
        warnings.append(
            f"the largest class has {max(per_class) / min(per_class):.0f} times the images of the "
            "smallest: guidance and per-class figures of small classes will be poor"
        )
    if manifest.skipped:
        warnings.append(
            f"{counted(len(manifest.skipped), 'image')} left out that could not be decoded"
        )
    return warnings


def _numbers(values: NDArray[np.floating]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


# -- a picture ----------------------------------------------------------------------------------


def autoencoder_of(latents: LatentSet, store: Store) -> Autoencoder:
    """The autoencoder that made a set. Raises DataError where the store does not have it."""
    ref = latents.manifest.lineage.get("autoencoder")
    if ref is None:
        raise DataError(f"the manifest of {latents.where} names no autoencoder: encode again")
    return load_autoencoder(open_ref(store, ref), store)


def preview(latents: LatentSet, record: Record, store: Store, *, columns: int = COLUMNS) -> bytes:
    """PNG of images as they were, as they come back from their latents, and so their mirrors.

    Raises DataError, IntegrityError, StoreError.
    """
    if ORIGINALS not in record.outputs:
        raise DataError(f"{latents.where} holds no original images: encode again")
    shown = safetensors.numpy.load(store.get(record.outputs[ORIGINALS]))
    autoencoder = autoencoder_of(latents, store)
    count = len(shown["numbers"])
    columns = min(columns, count)
    usable = count // columns * columns
    numbers, originals = shown["numbers"][:usable], shown["pixels"][:usable]
    rows = {"image": originals, "decoded": _decoded(latents, autoencoder, numbers, mirror=False)}
    if latents.manifest.mirrored:
        rows["mirror"] = _decoded(latents, autoencoder, numbers, mirror=True)
    bands = usable // columns
    grid = np.stack(
        [
            images.reshape(bands, columns, *images.shape[1:])[band]
            for band in range(bands)
            for images in rows.values()
        ]
    )
    scale = max(1, 96 // originals.shape[-1])
    return sample_grid(grid, list(rows) * bands, scale)


def _decoded(
    latents: LatentSet, autoencoder: Autoencoder, numbers: NDArray[np.int64], *, mirror: bool
) -> NDArray[np.uint8]:
    views = np.full(len(numbers), mirror) if mirror else None
    moments = torch.from_numpy(latents.moments(numbers, views))
    decoded = [
        autoencoder.decode(mean_latents(part, latents.manifest.spec)) for part in moments.split(8)
    ]
    return torch.cat(decoded).cpu().numpy()
