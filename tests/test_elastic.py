"""Trained by 1, then 2, then 4, then 1 process: the same images, noise and gamma, and curve.

What every rank was really given is observed in the programs, and computed once more without them.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import chain
import observed
import pytest
import torch

from eqm import checkpoint
from eqm.batches import batches
from eqm.config import Job, ObjectiveConfig
from eqm.kernels.halves import lacking
from eqm.latent_set import open_manifest
from eqm.latents import sample_latents
from eqm.objective import Corrupted, decay, mixed, target
from eqm.randomness import Stream, normal, uniform
from eqm.records import Record, to_json
from eqm.run import InterruptedTraining
from eqm.stage import job_digest
from eqm.storage import LocalStore

BATCH = 32
ROOT = Path(__file__).parent.parent
PARTS = {
    "float32": ((1, 50), (2, 100), (4, 150), (1, 200)),
    "bfloat16": ((1, 50), (2, 100), (4, 150), (1, 200)),
    "float16": ((1, 10), (2, 30), (1, 40)),
}
"""Precision -> (processes, update at which they stop)."""
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 1e-4}
"""Relative, of the loss of every update."""

SHOWN = 40
"""Updates whose images are made once more, without the trainer."""


class Runs:
    """One training undisturbed, and the same one by changing numbers of processes."""

    def __init__(self, folder: Path, precision: str) -> None:
        self.parts = PARTS[precision]
        self.updates = self.parts[-1][1]
        changes = {"train.images": self.updates * BATCH, "train.precision": precision}
        self.latents = chain.build(folder / "store", changes, until="latents")
        self.alone_seen, self.elastic_seen = folder / "alone", folder / "elastic"
        store = chain.copied(self.latents, folder / "alone-store", without=())
        with observed.observing(self.alone_seen):
            self.alone = self.curve(store, chain.run(self.job(store)))
        store = chain.copied(self.latents, folder / "elastic-store", without=())
        self.positions = [self.part(store, *part) for part in self.parts]
        record = store.record("train", job_digest(self.job(store)))
        assert record is not None
        self.elastic, self.world = self.curve(store, record), record.provenance["world_size"]

    def job(self, store: LocalStore) -> Job:
        return chain.job(self.latents.config, store, "train", self.latents.records)

    def curve(self, store: LocalStore, record: Record) -> dict[str, list[float]]:
        return json.loads(store.get(record.outputs["history.json"]))

    def part(self, store: LocalStore, processes: int, end: int) -> int | None:
        """Train on to an update; returns where the newest checkpoint is."""
        job, stop, last = self.job(store), end * BATCH, end == self.updates
        if processes == 1:
            stopped = contextlib.nullcontext() if last else pytest.raises(InterruptedTraining)
            with observed.observing(self.elastic_seen, stop=None if last else stop), stopped:
                chain.run(job)
        else:
            self.together(job, processes, stop)
        found = checkpoint.newest(store, job_digest(job))
        return None if found is None else found.images_seen

    def together(self, job: Job, processes: int, stop: int) -> None:
        """Train on under torchrun, which is told to stop."""
        file = self.elastic_seen / ".." / f"{processes}.json"
        file.write_text(json.dumps(to_json(job)))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        program = [str(Path(observed.__file__)), str(file), str(self.elastic_seen), str(stop)]
        ended = subprocess.run(
            [*torchrun, f"--nproc-per-node={processes}", *program],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
            timeout=240,
            check=False,
        )
        assert f"stopped at image {stop:,} of" in ended.stderr, ended.stderr


HAS_FLOAT16 = pytest.mark.skipif(lacking() is not None, reason="this processor has no AVX512-FP16")


@pytest.fixture(
    scope="module",
    params=[
        "float32",
        "bfloat16",
        pytest.param("float16", marks=[pytest.mark.slow, HAS_FLOAT16]),
    ],
)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp(request.param), request.param)


def test_every_number_of_processes_goes_on_where_the_last_one_stopped(runs: Runs) -> None:
    assert runs.positions == [end * BATCH for _, end in runs.parts]
    assert runs.world == runs.parts[-1][0]
    assert runs.elastic["images"] == runs.alone["images"]


def test_images_noise_and_gamma_are_the_same_bits_by_any_number_of_processes(runs: Runs) -> None:
    (alone,) = observed.read(runs.alone_seen).values()
    by_rank = observed.read(runs.elastic_seen)
    seen = [number for images in by_rank.values() for number in images]
    assert sorted(seen) == list(range(runs.updates * BATCH)) == sorted(alone)
    assert {n: told for images in by_rank.values() for n, told in images.items()} == alone
    # Each rank its contiguous part, or the union would not be in order.
    begin = 0
    for size, end in runs.parts:
        for rank in range(size):
            share = {n for n in by_rank[f"{size}-{rank}"] if begin <= n < end * BATCH}
            first = rank * BATCH // size
            assert share == {
                n for n in range(begin, end * BATCH) if first <= n % BATCH < first + BATCH // size
            }
        begin = end * BATCH


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_is_given_is_a_function_of_seed_and_number(runs: Runs, size: int) -> None:
    """Computed without the trainer, rank by rank, and joined in the order of the ranks."""
    (given,) = observed.read(runs.alone_seen).values()
    data = open_manifest(runs.latents["latents"], runs.latents.store)
    feeds = [
        batches(data, batch_size=BATCH, seed=0, first_image=0, rank=rank, world=size)
        for rank in range(size)
    ]
    made: dict[int, str] = {}
    for _ in range(SHOWN):
        for feed in feeds:
            batch = next(feed)
            made |= observed.digests(batch, corrupted(batch, data.manifest.spec))
    assert list(made) == list(range(SHOWN * BATCH))
    assert made.items() <= given.items()


def corrupted(batch, spec) -> Corrupted:
    """Equation 3 and its noise, written out from the streams."""
    numbers = batch.image_numbers
    x = sample_latents(batch.moments, normal(0, Stream.POSTERIOR, numbers, spec.shape), spec)
    eps = normal(0, Stream.EPS, numbers, spec.shape)
    gamma = uniform(0, Stream.GAMMA, numbers).squeeze(1)
    dropped = uniform(0, Stream.LABEL_DROP, numbers).squeeze(1) < 0.1
    labels = torch.where(dropped, 10, batch.labels)
    c = decay(ObjectiveConfig())
    return Corrupted(mixed(x, eps, gamma), target(x, eps, gamma, c), gamma, labels)


def test_the_curve_is_the_same(runs: Runs) -> None:
    bound = TOLERANCE[runs.latents.config.train.precision]
    off = [abs(a / b - 1) for a, b in zip(runs.elastic["loss"], runs.alone["loss"], strict=True)]
    worst = max(range(len(off)), key=off.__getitem__)
    assert off[worst] <= bound, f"update {worst + 1}: loss off by {off[worst]:.1e}"
