"""Generation to metrics beside its three parts alone, and what adaptive compute saves of it.

"alone" loads model, decoder and extractor and calls them on the batches of the stage: latents of
the seeds, their descent, their images, their features; nothing is kept. "stage" is the whole
program: it reads sealed records, counts, brings every part to disk beside the work on the next, and
seals. "to metrics" goes on to all numbers on features with their intervals, against a reference of
as many images as the digits have. The weights are random, which changes no time. Two models: the
demo's, whole (1,797 samples in batches of 256, with the way down that the report shows; half
of its updates, so that all else weighs up to twice as much as in the demo), and S/2 on
4 x 32 x 32 latents, with as few samples as have intervals.

"adaptive" is a small model that has learnt for some seconds, so that its samples stop at different
times: the same samples with and without a threshold, by the whole stage. What the wall clock saves
is to be seen beside what is saved of field evaluations.
"""

import contextlib
import functools
import io
import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench import digits
from bench.timing import paired, show_pairs
from eqm import generate, measures, stage
from eqm.autoencoder import (
    Autoencoder,
    autoencoder_to_bytes,
    fresh_network,
    latent_spec,
    sealed_autoencoder,
)
from eqm.checkpoint import tensors_to_bytes
from eqm.config import (
    AutoencoderFit,
    GenerateConfig,
    Job,
    NetworkConfig,
    ObjectiveConfig,
    Runtime,
    SamplerConfig,
    SamplesStage,
    SourceConfig,
    TrainConfig,
    replace,
)
from eqm.evaluate import sealed_samples
from eqm.features import SmallCNN, SmallCNNConfig, extractor_to_bytes, load_extractor
from eqm.frechet import Moments
from eqm.model import Model, from_record, spec_to_bytes
from eqm.network import Transformer
from eqm.records import Blob, Record, Ref, to_json
from eqm.samples import columns, labels_of, parts_of
from eqm.sampling import rule_of, sample
from eqm.stage import open_ref
from eqm.statistics import Reference, Side
from eqm.storage import LocalStore

CPU = torch.device("cpu")
CLASSES = 10
IMAGES = (1437, 360)
"""Of the reference: to train on and held out."""


class Sealed:
    """Records of a model and of an extractor with random weights, in a store of their own."""

    def __init__(self, folder: Path, trained: Model, *, threads: int) -> None:
        self.store, self.threads = LocalStore(folder), threads
        files = autoencoder_to_bytes(trained.autoencoder)
        autoencoder = self._seal("autoencoder", {}, files)
        latents = self._seal("latents", {"autoencoder": autoencoder.ref}, {})
        weights = tensors_to_bytes(trained.network.state_dict())
        files = {"model.json": spec_to_bytes(trained.spec), "ema.safetensors": weights}
        self.train = self._seal("train", {"latents": latents.ref}, files)
        config = SmallCNNConfig(channels=trained.spec.latent.image_channels, classes=CLASSES)
        files = extractor_to_bytes(SmallCNN(config), config)
        named = dict(zip(("weights.safetensors", "config.json"), files, strict=True))
        self.extractor = self._seal("extractor", {}, named)
        self._runs = itertools.count()

    def _seal(self, name: str, inputs: dict[str, Ref], files: dict[str, bytes]) -> Record:
        outputs: dict[str, Blob] = {key: self.store.put(data) for key, data in files.items()}
        values = {"kind": "fit", "name": "bench-cnn"}
        record = Record(
            stage=name, algorithm=0, config={}, inputs=inputs, outputs=outputs, values=values
        )
        return self.store.seal(record)

    def stage(self, config: GenerateConfig) -> Record:
        """The whole stage, each time with other seeds: what lies there already costs nothing."""
        config = replace(config, first_seed=next(self._runs) * config.samples)
        job = Job(
            stage="samples",
            config=to_json(SamplesStage(generate=config)),
            inputs={"train": self.train.ref, "extractor": self.extractor.ref},
            runtime=Runtime(store=self.store.uri, device="cpu", threads=self.threads),
        )
        with contextlib.redirect_stderr(io.StringIO()):
            return stage.run(job, generate.program)

    def alone(self, config: GenerateConfig) -> None:
        """Sampler, decoder and extractor, loaded and called."""
        torch.set_num_threads(self.threads)
        trained = from_record(self.store, open_ref(self.store, self.train.ref))
        extractor = load_extractor(self.extractor, self.store, CPU)
        for part in parts_of(config):
            seeds = range(part.first, part.first + part.count)
            labels = labels_of(config, seeds, CLASSES)
            rule, updates = rule_of(config.sampler), config.sampler.updates
            found = sample(trained, labels=labels, seeds=seeds, rule=rule, updates=updates)
            extractor.activations(found.images())

    def to_metrics(self, config: GenerateConfig) -> None:
        """The whole stage, and all numbers on its features."""
        made = columns(self.store, self.stage(config))
        samples = sealed_samples(made, np.empty((0, 1, 1, 1), dtype=np.uint8))
        measures.measure(samples, self.reference, neighbours=3)

    @functools.cached_property
    def reference(self) -> Reference:
        """What the extractor makes of images of noise, as many as the digits have on each side."""
        extractor = load_extractor(self.extractor, self.store, CPU)
        autoencoder = open_ref(self.store, open_ref(self.store, self.train.ref).inputs["latents"])
        spec = latent_spec(open_ref(self.store, autoencoder.inputs["autoencoder"]), self.store)
        shape = (spec.image_channels, spec.image_size_px, spec.image_size_px)
        draw = torch.Generator().manual_seed(0)
        sides = []
        for count in IMAGES:
            noise = torch.randint(256, (count, *shape), generator=draw, dtype=torch.uint8)
            found = [extractor.activations(part) for part in noise.split(64)]
            parts = {
                name: torch.cat([getattr(one, name) for one in found]).numpy()
                for name in ("features", "logits", "spatial")
            }
            moments, spatial = Moments.of(parts["features"]), Moments.of(parts["spatial"])
            sides.append(Side(moments, spatial, parts["features"], parts["logits"]))
        values = {"extractor": {"name": "bench-cnn"}}
        record = replace(self.extractor, stage="reference", values=values)
        return Reference(record, self.store, *sides)


# -- the stage beside its parts -----------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model and what is generated of it."""

    name: str
    source: SourceConfig
    network: NetworkConfig
    generate: GenerateConfig
    rounds: int
    threads: int

    def model(self) -> Model:
        """With random weights, and the architecture of the demo's autoencoder."""
        torch.manual_seed(0)
        decoder = fresh_network(AutoencoderFit(), self.source)
        plain: dict[str, tuple[float, ...]] = {"shift": (0.0,) * 4, "scale": (1.0,) * 4}
        autoencoder: Autoencoder = sealed_autoencoder(decoder, self.source, name="kl", **plain)
        channels, side, _ = autoencoder.spec.shape
        network = Transformer(self.network, size=side, channels=channels, classes=CLASSES)
        network.initialise(0)
        return Model.of(network, objective=ObjectiveConfig(), autoencoder=autoencoder)


CASES = (
    Case(
        "the demo's model, 1,797 samples of 50 updates, one thread",
        SourceConfig(),
        NetworkConfig(),
        GenerateConfig(sampler=SamplerConfig(step_size=0.006, updates=50)),
        rounds=3,
        threads=1,
    ),
    Case(
        "S/2, 128 samples of 2 updates, two threads",
        SourceConfig(kind="folder", image_size_px=64, channels=3),
        NetworkConfig.size("S", patch=2),
        # No moment of the descent but its start is shown: ten more descents are nothing beside
        # 50,000, and would be two thirds of these.
        GenerateConfig(
            samples=128, trajectory_points=1, sampler=SamplerConfig(updates=2, batch_size=16)
        ),
        rounds=3,
        threads=2,
    ),
)


def compare(case: Case, folder: Path) -> None:
    """Print what the stage takes beside its parts alone."""
    sealed = Sealed(folder, case.model(), threads=case.threads)
    sides = {
        "alone": lambda: sealed.alone(case.generate),
        "stage": lambda: sealed.stage(case.generate),
        "to metrics": lambda: sealed.to_metrics(case.generate),
    }
    sealed.reference  # noqa: B018  made before the clock runs
    show_pairs(paired(sides, rounds=case.rounds), base="alone")


# -- adaptive compute ---------------------------------------------------------------------------

LEARNT = TrainConfig(images=6_400, learning_rate=2e-3, warmup_images=640, decay_fraction=0.5)
"""Enough that gradients become shorter on the way down."""
ADAPTIVE = GenerateConfig(
    samples=256,
    keep_images=0,
    trajectory_points=1,
    sampler=SamplerConfig(step_size=0.015, updates=40, batch_size=32),
)


def threshold(trained: Model) -> float:
    """A norm that about half of the samples reach on half of their way."""
    seeds, settings = range(64), ADAPTIVE.sampler
    labels = labels_of(ADAPTIVE, seeds, CLASSES)
    found = sample(
        trained,
        labels=labels,
        seeds=seeds,
        rule=rule_of(settings),
        updates=settings.updates // 2,
    )
    return float(found.gradient_norms.median())


def adaptive(folder: Path) -> None:
    """Print what a threshold saves of the field evaluations, and of the time of the stage."""
    trained = digits.model(train=LEARNT, say=False)
    sealed = Sealed(folder, trained, threads=1)
    stop = replace(ADAPTIVE.sampler, stop_below=threshold(trained))
    stopped = replace(ADAPTIVE, sampler=stop)
    last: list[Record] = []
    sides = {
        "fixed number of updates": lambda: sealed.stage(ADAPTIVE),
        "until the threshold": lambda: last.append(sealed.stage(stopped)),
    }
    show_pairs(paired(sides, rounds=3), base="fixed number of updates")
    spent = columns(sealed.store, last[-1])["evaluations"].double()
    share = float(spent.mean()) / ADAPTIVE.sampler.updates
    print(
        f"field evaluations: {spent.mean():.1f} of {ADAPTIVE.sampler.updates} on average (x "
        f"{share:.3f}), {int(spent.min())} to {int(spent.max())}"
    )


def main() -> None:
    """Measure and print."""
    for case in CASES:
        print(f"-- {case.name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            compare(case, Path(folder))
    print("-- adaptive compute, 256 samples in 32 slots, one thread", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        adaptive(Path(folder))
