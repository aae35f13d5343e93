"""The encode stage beside the bare autoencoder on the same batches, and how busy the cores are.

"bare" loads the autoencoder and calls it on batches that lie in memory, on all cores. "stage" is
the whole program: it loads it too, opens the source by its kept listing, decodes, encodes, packs,
commits and seals, into a folder. "bare, in lanes" cuts and spreads the same batches as the stage
does: what the stage takes beyond it is what decoding and packing cost. Three cases: the
architecture of SD-VAE with random weights at 256 px, and the demo's small one (random weights too;
time does not depend on them) at 64 px and on the digits. Pictures are JPEGs of scikit-learn's
photographs. A run that others disturb is measured again; where that never ends, the seconds of
cores that each side used still compare.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor

from eqm import encode, stage
from eqm.autoencoder import (
    Autoencoder,
    autoencoder_to_bytes,
    fresh_network,
    load_autoencoder,
    sealed_autoencoder,
)
from eqm.config import (
    AutoencoderConfig,
    AutoencoderFit,
    AutoencoderStage,
    EncodeConfig,
    Job,
    LatentsStage,
    Runtime,
    SourceConfig,
)
from eqm.encode import Lanes
from eqm.images import ImageSource, open_source, sample_photographs
from eqm.records import Record, Ref, to_json
from eqm.stage import Outcome, listing_key
from eqm.storage import LocalStore
from eqm.walk import Batch, Walk, shard_plans

SD_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
}
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Case:
    """An autoencoder, images, and batches."""

    name: str
    source: SourceConfig
    make: Callable[[SourceConfig], Autoencoder]
    images: int
    picture_px: int
    encode: EncodeConfig
    rounds: int


def sd_vae(source: SourceConfig) -> Autoencoder:
    """The architecture of SD-VAE."""
    torch.manual_seed(0)
    return sealed_autoencoder(
        AutoencoderKL(**SD_VAE), source, name="sd", shift=(0.0,) * 4, scale=(1.0,) * 4
    )


def small(source: SourceConfig) -> Autoencoder:
    """The architecture of the demo's."""
    torch.manual_seed(0)
    network = fresh_network(AutoencoderFit(), source)
    return sealed_autoencoder(network, source, name="kl", shift=(0.0,) * 4, scale=(1.0,) * 4)


CASES = (
    Case(
        "small, digits of 16 px",
        SourceConfig(),
        small,
        1797,
        0,
        EncodeConfig(shard_images=512),
        rounds=7,
    ),
    Case(
        "small, JPEGs of 96 px at 64 px",
        SourceConfig(kind="folder", image_size_px=64, channels=3),
        small,
        1536,
        96,
        EncodeConfig(shard_images=256, batch_size=64),
        rounds=5,
    ),
    Case(
        "SD-VAE, JPEGs of 375 px at 256 px",
        SourceConfig(kind="folder", image_size_px=256, channels=3),
        sd_vae,
        8,
        375,
        EncodeConfig(shard_images=4, batch_size=4),
        rounds=3,
    ),
)


def pictures(folder: Path, case: Case) -> str | None:
    """A folder of JPEGs; nothing for the digits."""
    if case.source.kind == "digits":
        return None
    for i, pixels in enumerate(sample_photographs(case.picture_px, 3, case.images)):
        place = folder / "images" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(place / f"{i:05d}.jpg", quality=90)
    return str(folder / "images")


class Bench:
    """One case, ready to be measured."""

    def __init__(self, folder: Path, case: Case) -> None:
        self.folder, self.case = folder, case
        self.uri = pictures(folder, case)
        self.source = open_source(case.source, self.uri)
        self.autoencoder = case.make(case.source)
        self.plans = shard_plans(len(self.source.entries), case.encode)
        self.batches = [
            (Batch(plan=plan, numbers=numbers), self._pixels(self.source, numbers))
            for plan in self.plans
            for numbers in plan.batches(case.encode.batch_size)
        ]
        self._numbers = itertools.count()
        self.store = LocalStore(folder / "store")
        self.record = self._sealed(self.store)

    def _sealed(self, store: LocalStore) -> Record:
        """The autoencoder, sealed."""
        runtime = Runtime(store=store.uri, device="cpu")
        asked = AutoencoderStage(
            source=self.case.source, autoencoder=AutoencoderConfig(kind="identity")
        )
        job = Job(stage="autoencoder", config=to_json(asked), inputs={}, runtime=runtime)
        files = autoencoder_to_bytes(self.autoencoder)
        return stage.run(job, lambda _: Outcome(outputs=files))

    @staticmethod
    def _pixels(source: ImageSource, numbers: Sequence[int]) -> Tensor:
        return torch.stack([source.read(i) for i in numbers])

    def bare(self) -> None:
        """The autoencoder alone."""
        self._bare(CORES)

    def on_one_core(self) -> None:
        """The autoencoder alone on one core, where no thread waits for another."""
        self._bare(1)

    def _bare(self, threads: int) -> None:
        torch.set_num_threads(threads)
        autoencoder = load_autoencoder(self.record, self.store)
        for _, pixels in self.batches:
            autoencoder.encode(pixels)

    def in_lanes(self) -> None:
        """The autoencoder alone, spread as the stage does."""
        torch.set_num_threads(CORES)
        lanes = Lanes(torch.device("cpu"), self.case.source, self.case.encode.batch_size)
        with lanes:
            autoencoder = load_autoencoder(self.record, self.store)
            for _ in lanes.encoded(self.batches, autoencoder, NOWHERE):
                pass

    def prepared(self, workers: int | None) -> Callable[[], object]:
        """The stage, in a store of its own."""
        store = LocalStore(self.folder / f"store-{next(self._numbers)}")
        runtime = Runtime(store=store.uri, source_uri=self.uri, device="cpu", workers=workers)
        made = self._sealed(store).ref
        digest = self.source.digest
        store.write_once(listing_key(digest), self.source.listing_bytes())
        asked = LatentsStage(source=self.case.source, encode=self.case.encode)
        inputs = {
            "source": Ref(stage="source", digest=digest, content=digest),
            "autoencoder": made,
        }
        job = Job(stage="latents", config=to_json(asked), inputs=inputs, runtime=runtime)
        return lambda: stage.run(job, encode.program)


class Nowhere(Walk):
    """A walk over nothing, for lanes that are measured alone."""

    def __init__(self) -> None:
        self.overtaken = set()


NOWHERE = Nowhere()


@dataclass(frozen=True)
class Measured:
    """One run."""

    seconds: float
    busy: float
    """Share of all cores that it used, its children too."""
    others: float
    """Share that everybody else used: what disturbs a measurement on a shared machine."""


def measured(run: Callable[[], object]) -> Measured:
    """Run, and look at the clocks."""
    began, ours, everybody = time.perf_counter(), sum(os.times()[:4]), machine_seconds()
    run()
    seconds = time.perf_counter() - began
    cores = seconds * CORES
    used = sum(os.times()[:4]) - ours
    others = machine_seconds() - everybody - used
    return Measured(seconds, used / cores, others / cores)


def machine_seconds() -> float:
    """Seconds of cores that this machine has worked, or that its host has worked for others."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def in_quiet(prepare: Callable[[], Callable[[], object]]) -> Measured:
    """Measure until nobody else works meanwhile; the least disturbed run if that never comes."""
    runs: list[Measured] = []
    for _ in range(TRIES):
        while measured(lambda: time.sleep(0.5)).others > QUIET and not is_late():
            time.sleep(1)
        runs.append(measured(prepare()))
        if runs[-1].others < QUIET or is_late():
            break
    return min(runs, key=lambda one: one.others)


def is_late() -> bool:
    """Whether this benchmark has waited long enough for others."""
    return time.monotonic() > LATEST


QUIET = 0.05
TRIES = 4
LATEST = time.monotonic() + 1800


def compare(bench: Bench) -> None:
    """Measure the sides in turn and print medians."""
    sides: dict[str, Callable[[], Callable[[], object]]] = {
        "bare": lambda: bench.bare,
        "bare, on one core": lambda: bench.on_one_core,
        "bare, in lanes": lambda: bench.in_lanes,
        "stage": lambda: bench.prepared(None),
        "stage, decoding in threads": lambda: bench.prepared(0),
    }
    found: dict[str, list[Measured]] = {name: [] for name in sides}
    for number in range(bench.case.rounds + 1):
        for name, prepare in sides.items():
            one = in_quiet(prepare)
            if number:
                found[name].append(one)
    base = statistics.median(one.seconds for one in found["bare"])
    images = len(bench.source.entries)
    for name, runs in found.items():
        seconds = statistics.median(one.seconds for one in runs)
        busy = statistics.median(one.busy for one in runs)
        work = statistics.median(one.busy * one.seconds for one in runs) * CORES / images
        print(
            f"{name:28} {images / seconds:9.2f} images/s  x {seconds / base:.3f}  "
            f"cores busy {busy:.0%}, {work * 1e3:.3g} ms of a core an image, "
            f"others at most {max(one.others for one in runs):.0%}",
            flush=True,
        )


def main() -> None:
    """Measure and print."""
    for case in CASES:
        print(f"-- {case.name}, {CORES} cores")
        with tempfile.TemporaryDirectory() as folder:
            compare(Bench(Path(folder), case))
