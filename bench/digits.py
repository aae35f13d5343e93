"""Digits for the studies: 8 x 8 pixels, models trained by eqm.learn and kept, and a distance.

What is made lies under ``.eqm/bench``, named by a digest of all that it is a function of, and is
made once. One thread a process: so small a network loses by more.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from eqm import fit, frechet, stage
from eqm.agreement import Reader
from eqm.autoencoder import identity
from eqm.config import (
    ExtractorConfig,
    ExtractorStage,
    Job,
    NetworkConfig,
    ObjectiveConfig,
    Runtime,
    SourceConfig,
    TrainConfig,
)
from eqm.features import load_extractor
from eqm.images import open_source
from eqm.learner import learn
from eqm.model import Model
from eqm.network import Transformer
from eqm.records import Ref, digest, to_json
from eqm.storage import LocalStore

FOLDER = Path(".eqm/bench")
SOURCE = SourceConfig(image_size_px=8)
RECIPE = TrainConfig(
    images=240_000,
    learning_rate=2e-3,
    warmup_images=6_400,
    decay_fraction=0.5,
    ema_half_life_images=8_000.0,
)
"""The demo's."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Digits:
    """One side of the split."""

    images: Tensor
    """(N, 1, 8, 8) uint8."""
    labels: Tensor
    """(N,) int64."""

    @property
    def latents(self) -> Tensor:
        """(N, 1, 8, 8) float32: pixels in [-1, 1]."""
        return self.images.float() / 127.5 - 1


@cache
def digits(*, held_out: bool) -> Digits:
    """The 1,797 digits of scikit-learn, split as the pipeline splits them."""
    source = open_source(SOURCE, None)
    chosen = [i for i, entry in enumerate(source.entries) if entry.held_out == held_out]
    images = torch.stack([source.read(i) for i in chosen])
    return Digits(images, torch.tensor([source.entries[i].label for i in chosen]))


def model(
    *,
    seed: int = 0,
    network: NetworkConfig | None = None,
    objective: ObjectiveConfig | None = None,
    train: TrainConfig = RECIPE,
    say: bool = True,
) -> Model:
    """A model of the training digits; trained when first asked for, and kept."""
    net_config, asked = network or NetworkConfig(), objective or ObjectiveConfig()
    train = TrainConfig(**{**train.__dict__, "seed": seed})
    net = Transformer(net_config, size=8, channels=1, classes=10)
    net.initialise(seed, zero_head=asked.energy != "l2")
    name = digest([to_json(net_config), to_json(asked), to_json(train)])[:16]
    path = FOLDER / f"{name}.safetensors"
    if path.is_file():
        net.load_state_dict(load_file(path))
    else:
        data = digits(held_out=False)
        learn(net, data.latents, data.labels, objective=asked, train=train, on_update=_tell(say))
        FOLDER.mkdir(parents=True, exist_ok=True)
        save_file(net.state_dict(), path)
    return Model.of(net, objective=asked, autoencoder=identity(SOURCE))


def _tell(say: bool):
    def tell(seen: int, loss: float) -> None:
        if say and seen // 48_000 != (seen - RECIPE.batch_size) // 48_000:
            print(f"   trained on {seen:,} images, loss {loss:.3f}", flush=True)

    return tell


class Judge:
    """Distances of samples to the training digits, by an extractor that the pipeline fits."""

    def __init__(self) -> None:
        store = LocalStore(FOLDER / "store")
        listing = open_source(SOURCE, None).digest
        job = Job(
            stage="extractor",
            config=to_json(ExtractorStage(source=SOURCE, extractor=ExtractorConfig())),
            inputs={"source": Ref(stage="source", digest=listing, content=listing)},
            runtime=Runtime(store=store.uri, device="cpu", threads=1),
        )
        self.extractor = load_extractor(stage.run(job, fit.program), store, CPU)
        train = digits(held_out=False)
        self.reference = self.features(train.images)
        self.reader = Reader(train.images.numpy(), train.labels.numpy())
        self.name = f"FD[{self.extractor.name}]"

    def features(self, images: Tensor) -> NDArray[np.float32]:
        """Features (N, D) of uint8 images (N, 1, 8, 8)."""
        return self.extractor(images).numpy()

    def distance(self, images: Tensor) -> float:
        """Fréchet distance of uint8 images to the training digits."""
        return frechet.frechet_from_features(self.features(images), self.reference)

    def agreement(self, images: Tensor, labels: Tensor) -> float:
        """Share of images that an SVC on pixels reads as their label."""
        return self.reader.agreement(images.numpy(), labels.numpy())
