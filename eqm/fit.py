"""Stages "autoencoder" and "extractor": fitted, or checked. ``python -m eqm.fit CONFIG.json``

Where no weights are given, a small AutoencoderKL and a small classifier are fitted on the training
images; weights of somebody else and the identity are sealed in the same form, so whoever uses one
never asks where it came from. Everything drawn is a function of the seed and the image's number.
One process does the work.
"""

import contextlib
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eqm.autoencoder import (
    Autoencoder,
    autoencoder_to_bytes,
    fresh_network,
    identity,
    pretrained,
    read_snapshot,
    sealed_autoencoder,
    signed,
)
from eqm.batches import order
from eqm.config import (
    AutoencoderFit,
    AutoencoderStage,
    ExtractorFit,
    ExtractorStage,
    PretrainedFile,
)
from eqm.errors import DataError
from eqm.features import (
    PRETRAINED,
    CNNExtractor,
    SmallCNN,
    SmallCNNConfig,
    extractor_to_bytes,
)
from eqm.images import ImageSource, checked_source, mirrored
from eqm.latents import mean_latents
from eqm.precision import deterministic
from eqm.randomness import Stream, normal, uniform
from eqm.shards import Int64
from eqm.stage import Context, Outcome
from eqm.stage import main as stage_main

KEPT_BYTES = 2**30
"""Training images are kept in memory up to this size, and read again for each use beyond it."""
MEASURED_IMAGES = 4096
"""Statistics and errors are taken over so many images at most: the first, which are mixed."""
MEASURE_BATCH = 128
WARMUP = 0.05
"""Share of the fit over which the learning rate rises; a cosine takes it to zero after that."""
SNAPSHOT_WEIGHTS = "model.safetensors"
"""What Hugging Face's transformers calls the weights in its folders."""
LARGEST_SHIFT = 1 / 16
"""Of a classifier's training image in either direction, as a share of its size."""


class Pixels:
    """Some images of a source by position, uint8; in memory where they fit."""

    def __init__(self, source: ImageSource, *, held_out: bool) -> None:
        self.source = source
        self.numbers = source.numbers(held_out=held_out)
        labels = [source.entries[i].label for i in self.numbers]
        self.labels = torch.tensor(labels, dtype=torch.int64)
        size = len(labels) * source.config.channels * source.config.image_size_px**2
        self._kept = self._read(self.numbers) if 0 < size <= KEPT_BYTES else None

    def __len__(self) -> int:
        return len(self.numbers)

    def at(self, positions: Int64) -> Tensor:
        """Images (B, C, H, W)."""
        if self._kept is not None:
            return self._kept[torch.from_numpy(positions)]
        return self._read([self.numbers[i] for i in positions.tolist()])

    def first(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the first ``count`` images and their labels."""
        end = min(count, len(self))
        for start in range(0, end, MEASURE_BATCH):
            positions = np.arange(start, min(start + MEASURE_BATCH, end), dtype=np.int64)
            yield self.at(positions), self.labels[torch.from_numpy(positions)]

    def _read(self, numbers: list[int]) -> Tensor:
        size = MEASURE_BATCH
        batches = [numbers[i : i + size] for i in range(0, len(numbers), size)]
        return torch.cat(list(self.source.read_many(batches)))


# -- the loop that both fits share --------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """One batch of a fit."""

    numbers: Tensor
    """(B,) int64, images seen so far in the fit: what everything random is drawn by."""
    images: Tensor
    """uint8 (B, C, H, W)."""
    labels: Tensor
    """(B,) int64."""

    def to(self, device: torch.device) -> "Drawn":
        """The same, elsewhere."""
        return Drawn(*(x.to(device) for x in (self.numbers, self.images, self.labels)))


def fit_network(
    context: Context,
    network: nn.Module,
    loss_of: Callable[[Drawn], Tensor],
    pixels: Pixels,
    settings: AutoencoderFit | ExtractorFit,
    label: str,
) -> None:
    """Minimise a loss by AdamW, in place. Raises DataError if it diverges."""
    updates = math.ceil(settings.images / settings.batch_size)
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate)
    loss = torch.zeros(())
    with context.progress(label, updates * settings.batch_size) as bar:
        for update in range(updates):
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * rate(update, updates)
            loss = loss_of(draw(pixels, settings, update).to(context.world.device))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            bar.advance(settings.batch_size)
    last = float(loss.detach())
    if not math.isfinite(last):
        raise DataError(
            f"{label} has diverged: the last loss is {last}; lower its learning_rate "
            f"({settings.learning_rate})"
        )


def rate(update: int, updates: int) -> float:
    """Share of the learning rate at an update: a linear rise, then half a cosine down to 0."""
    rise = min(1.0, (update + 1) / max(1.0, WARMUP * updates))
    return rise * 0.5 * (1 + math.cos(math.pi * update / updates))


def draw(pixels: Pixels, settings: AutoencoderFit | ExtractorFit, update: int) -> Drawn:
    """The images of an update: every image once an epoch, in an order of the seed."""
    start = update * settings.batch_size
    numbers = np.arange(start, start + settings.batch_size, dtype=np.int64)
    positions = order(settings.seed, len(pixels), numbers)
    return Drawn(
        torch.from_numpy(numbers), pixels.at(positions), pixels.labels[torch.from_numpy(positions)]
    )


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initial weights are drawn from torch's generator: seed it, and put it back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# -- stage "autoencoder" ------------------------------------------------------------------------


def autoencoder_outcome(context: Context, source: ImageSource) -> Outcome:
    """Fit, check or make up the autoencoder of the config."""
    config = context.config.autoencoder
    if config.kind == "identity":
        made = identity(source.config)
    elif config.kind == "pretrained":
        made = pretrained(config.pretrained, source.config).to(context.world.device)
    else:
        made = fit_autoencoder(context, source, config.fit)
    values = {"kind": config.kind, "parameters": made.parameters, **reconstruction(made, source)}
    return Outcome(
        outputs=autoencoder_to_bytes(made), values={**values, "spec": made.spec.autoencoder}
    )


def fit_autoencoder(context: Context, source: ImageSource, fit: AutoencoderFit) -> Autoencoder:
    """A small AutoencoderKL, and the whitening that gives its latents unit variance."""
    with seeded(fit.seed):
        network = fresh_network(fit, source.config)
    network.to(context.world.device)
    pixels = Pixels(source, held_out=False)

    def loss_of(drawn: Drawn) -> Tensor:
        return autoencoder_loss(network, drawn, fit)

    fit_network(context, network, loss_of, pixels, fit, "fitting the autoencoder")
    name = f"{source.kind}-kl"
    neutral = (0.0,) * fit.latent_channels
    raw = sealed_autoencoder(
        network, source.config, name=name, shift=neutral, scale=(1.0,) * fit.latent_channels
    )
    shift, scale = whitening(raw, pixels)
    return sealed_autoencoder(network, source.config, name=name, shift=shift, scale=scale)


def autoencoder_loss(network: nn.Module, drawn: Drawn, fit: AutoencoderFit) -> Tensor:
    """Squared error of a reconstruction from a drawn latent, plus kl_weight KL to the normal."""
    x = signed(drawn.images)
    posterior = network.encode(x).latent_dist  # type: ignore[operator]
    mean, std = posterior.mean, posterior.std
    noise = normal(fit.seed, Stream.FIT_NOISE, drawn.numbers, tuple(mean.shape[1:]))
    found = network.decode(mean + std * noise).sample  # type: ignore[operator]
    divergence = 0.5 * (mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return F.mse_loss(found, x) + fit.kl_weight * divergence


def whitening(
    autoencoder: Autoencoder, pixels: Pixels
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Shift and scale of each channel that give drawn latents mean 0 and variance 1."""
    channels = autoencoder.spec.shape[0]
    total = torch.zeros(3, channels, dtype=torch.float64)
    count = 0
    for images, _ in pixels.first(MEASURED_IMAGES):
        moments = autoencoder.encode(images).double().cpu()
        mean, std = moments.chunk(2, dim=1)
        parts = (mean, mean.square(), std.square())
        total += torch.stack([part.sum(dim=(0, 2, 3)) for part in parts])
        count += mean.numel() // channels
    mean, square, noise = total / count
    variance = square - mean.square() + noise
    return tuple(mean.tolist()), tuple(variance.clamp(min=1e-12).rsqrt().tolist())


def reconstruction(autoencoder: Autoencoder, source: ImageSource) -> dict[str, object]:
    """Error of decoded mean latents on held-out images; on training images if none are held out.

    ``psnr_db`` is null where nothing is lost.
    """
    pixels = Pixels(source, held_out=source.holds_out)
    squares, values, images_seen = 0.0, 0, 0
    for images, _ in pixels.first(MEASURED_IMAGES):
        error = images.double() - reconstructed(autoencoder, images).cpu().double()
        squares += float(error.square().sum())
        values += error.numel()
        images_seen += len(images)
    mean_square = squares / values
    return {
        "psnr_db": 10 * math.log10(255**2 / mean_square) if mean_square else None,
        "rms_error": math.sqrt(mean_square),
        **_measured_on(source, images_seen),
    }


def _measured_on(source: ImageSource, images: int) -> dict[str, object]:
    side = "held-out" if source.holds_out else "training"
    return {"measured_on": f"{side} images", "measured_images": images}


def reconstructed(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Images decoded from their own mean latents, uint8 (B, C, H, W)."""
    return autoencoder.decode(mean_latents(autoencoder.encode(images), autoencoder.spec))


# -- stage "extractor" --------------------------------------------------------------------------


def extractor_outcome(context: Context, source: ImageSource) -> Outcome:
    """Fit or check the feature extractor of the config."""
    config = context.config.extractor
    if config.kind != "fit":
        return pretrained_outcome(config.kind, config.pretrained)
    network = fit_extractor(context, source, config.fit)
    extractor = CNNExtractor(network, f"{source.kind}-cnn")
    weights, architecture = extractor_to_bytes(network, network.config)
    return Outcome(
        outputs={"weights.safetensors": weights, "config.json": architecture},
        values={
            "kind": "fit",
            "name": extractor.name,
            "digest": extractor.digest,
            "dimension": extractor.dimension,
            "parameters": sum(p.numel() for p in network.parameters()),
            **accuracy(extractor, source),
        },
    )


def pretrained_outcome(kind: str, file: PretrainedFile) -> Outcome:
    """Weights of somebody else, sealed as they are once they prove to be of that kind."""
    read, data = read_snapshot(file, SNAPSHOT_WEIGHTS)
    # Blobs of a store have no suffix: a header of JSON after its length is what the format begins
    # with, and no file of torch does.
    tensors = read.endswith(".safetensors") or data[8:9] == b"{"
    name = "weights.safetensors" if tensors else "weights.pth"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        extractor = PRETRAINED[kind](path, file.sha256)
    return Outcome(
        outputs={name: data},
        values={
            "kind": kind,
            "name": extractor.name,
            "digest": extractor.digest,
            "dimension": extractor.dimension,
            "weights_sha256": file.sha256,
        },
    )


def fit_extractor(context: Context, source: ImageSource, fit: ExtractorFit) -> SmallCNN:
    """A small classifier of the training images, shifted a little and mirrored where allowed.

    Raises DataError for a source of one class.
    """
    if len(source.classes) < 2:
        raise DataError(
            "a feature extractor is fitted by telling classes apart, and the source has only "
            f"{', '.join(source.classes)}: set extractor.kind to 'inception', or add a class"
        )
    architecture = SmallCNNConfig(
        channels=source.config.channels,
        classes=len(source.classes),
        width=fit.width,
        dimension=fit.dimension,
    )
    with seeded(fit.seed):
        network = SmallCNN(architecture)
    network.to(context.world.device)

    def loss_of(drawn: Drawn) -> Tensor:
        images = augmented(drawn, fit.seed, mirror=source.config.mirror)
        return F.cross_entropy(network(signed(images)), drawn.labels)

    pixels = Pixels(source, held_out=False)
    fit_network(context, network, loss_of, pixels, fit, "fitting the extractor")
    return network.eval()


def augmented(drawn: Drawn, seed: int, *, mirror: bool) -> Tensor:
    """Images moved by up to LARGEST_SHIFT, edges repeated, and half of them mirrored if allowed."""
    height, width = drawn.images.shape[-2:]
    chance = uniform(seed, Stream.FIT_DATUM, drawn.numbers, 3)
    limit = torch.tensor([height, width], device=chance.device).mul(LARGEST_SHIFT).floor()
    moves = (chance[:, :2] * (2 * limit + 1)).floor() - limit
    rows = _moved(moves[:, 0], height)[:, None, :, None]
    columns = _moved(moves[:, 1], width)[:, None, None, :]
    each = torch.arange(len(moves), device=chance.device)[:, None, None, None]
    channels = torch.arange(drawn.images.shape[1], device=chance.device)[None, :, None, None]
    found = drawn.images[each, channels, rows, columns]
    if not mirror:
        return found
    return torch.where(chance[:, 2, None, None, None] < 0.5, mirrored(found), found)


def _moved(moves: Tensor, size: int) -> Tensor:
    """Where each position of a line of pixels is taken from, (B, size) int64."""
    positions = torch.arange(size, device=moves.device)[None]
    return (positions - moves.long()[:, None]).clamp(0, size - 1)


def accuracy(extractor: CNNExtractor, source: ImageSource) -> dict[str, object]:
    """Share of held-out images read as their class; of training images if none are held out."""
    pixels = Pixels(source, held_out=source.holds_out)
    right = seen = 0
    for images, labels in pixels.first(MEASURED_IMAGES):
        right += int((extractor.logits(images).argmax(dim=1).cpu() == labels).sum())
        seen += len(images)
    return {"accuracy": right / seen, **_measured_on(source, seen)}


# -- the program --------------------------------------------------------------------------------


def program(context: Context) -> Outcome | None:
    """Make what the stage asks for; one process does it all."""
    if not context.world.is_first:
        return None
    stage: AutoencoderStage | ExtractorStage = context.config
    source = checked_source(
        stage.source,
        context.job.runtime.source_uri,
        context.job.inputs["source"],
        listing=context.listing(),
    )
    make = extractor_outcome if isinstance(stage, ExtractorStage) else autoencoder_outcome
    with deterministic(context.world.device):
        return make(context, source)


def main(argv: list[str]) -> int:
    """Run the stage program."""
    return stage_main(("autoencoder", "extractor"), program, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
