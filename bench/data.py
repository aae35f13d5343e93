"""Reading latents: the indexed reader beside stock webdataset, litdata and MosaicML streaming.

16,384 samples of 16 KiB (8 x 32 x 32 float16) from the page cache, on one core, in batches of 256,
stacked. Ours is ``eqm.batches`` as training uses it: a permutation of the whole set, a CRC at every
sample. webdataset reads in the order of the tars and checks nothing; litdata and streaming shuffle,
and run from an environment of their own where it can be made. Then: what sealing, opening and
seeking cost at 1.28 million images, what memory a reader takes, and what posterior noise costs.
"""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.timing import alternate, show
from eqm.batches import batches
from eqm.latent_set import LatentSet
from eqm.records import Blob, LatentSpec, Shard
from eqm.shards import (
    MANIFEST,
    Index,
    Sample,
    manifest_from_bytes,
    read_index,
    seal_set,
    write_shard,
)
from eqm.storage import LocalStore

SAMPLES, SHARDS, BATCH = 16_384, 16, 256
SPEC = LatentSpec(
    autoencoder="none",
    image_size_px=256,
    image_channels=3,
    shape=(4, 32, 32),
    shift=(0.0,) * 4,
    scale=(1.0,) * 4,
)
PEERS = ("litdata==0.2.76", "mosaicml-streaming==0.13.0", "torch==2.13.0", "numpy")
IMAGENET = 1_281_167


def make(store: LocalStore, latents: np.ndarray) -> tuple[LatentSet, list[str]]:
    """The set, and its tars for webdataset."""
    shards, indices, tars = [], [], []
    count = len(latents) // SHARDS
    for number in range(SHARDS):
        first = number * count
        part = latents[first : first + count]
        samples = [Sample(f"{first + i}", 0, False, m) for i, m in enumerate(part)]
        packed = write_shard(samples, first_number=first)
        shard = Shard(tar=store.put(packed.tar), index=store.put(packed.index), count=count)
        shards.append(shard)
        indices.append(read_index(packed.index, shard, f"shard {number}"))
        tars.append(str(store.root / f"{number}.tar"))
        Path(tars[-1]).write_bytes(packed.tar)
    sealed = seal_set(shards, indices, spec=SPEC, source="0" * 64, classes=("a",), mirrored=False)
    for data in sealed.files.values():
        store.put(data)
    return LatentSet(sealed.manifest, store, "bench"), tars


def indexed(data: LatentSet) -> None:
    """One epoch as training reads it."""
    stream = batches(data, batch_size=BATCH, seed=0)
    for _ in itertools.islice(stream, SAMPLES // BATCH):
        pass


def stock(tars: list[str]) -> None:
    """One pass in the order of the tars."""
    import webdataset

    kept = []
    for sample in webdataset.WebDataset(tars, shardshuffle=False).decode():
        kept.append(sample["moments.npy"])
        if len(kept) == BATCH:
            np.stack(kept)
            kept.clear()


# -- other loaders ------------------------------------------------------------------------------


def peers(folder: Path, latents: np.ndarray) -> dict[str, Callable[[], float]]:
    """Readers that run in another environment; none where it cannot be made."""
    home = Path(".eqm/bench/peers").absolute()
    python = home / "bin/python"
    uv = Path(sys.executable).with_name("uv")
    make_it = [[uv, "venv", "-q", "--allow-existing", "--python", sys.executable, home]]
    make_it.append([uv, "pip", "install", "-q", "--python", python, *PEERS])
    for line in make_it:
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"litdata and streaming are left out: {done.stderr.strip()[-300:]}")
            return {}
    np.save(folder / "latents.npy", latents)
    child = subprocess.Popen(
        [python, Path(__file__).with_name("peers.py"), folder / "latents.npy", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(folder / "peers.log").open("w"),
        text=True,
    )
    if not answer(child, "READY"):
        print(f"litdata and streaming are left out: {(folder / 'peers.log').read_text()[-300:]}")
        return {}

    def ask(name: str) -> float:
        assert child.stdin is not None
        child.stdin.write(f"{name}\n")
        child.stdin.flush()
        return float(answer(child, "TOOK").split()[1])

    return {"litdata, shuffled": lambda: ask("litdata"), "MDS, shuffled": lambda: ask("mds")}


def answer(child: subprocess.Popen[str], word: str) -> str:
    """The next line that begins with a word; empty if the child ended."""
    assert child.stdout is not None
    return next((line for line in child.stdout if line.startswith(word)), "")


# -- a million images ---------------------------------------------------------------------------


def synthetic(images: int, size: int = 1024) -> tuple[list[Shard], list[Index]]:
    """Shards that are not there and their indices, as those of ImageNet would be."""
    rng = np.random.default_rng(0)
    shards, indices = [], []
    for number, first in enumerate(range(0, images, size)):
        n = min(size, images - first)
        keys = [b"n%08d/n%08d_%07d.JPEG" % (k % 1000, k % 1000, k) for k in range(first, first + n)]
        index = Index(
            offset=np.arange(2 * n, dtype=np.uint32).reshape(n, 2) * 17_000 + 512,
            crc32=rng.integers(0, 2**32, (n, 2), dtype=np.uint32),
            label=(np.arange(first, first + n) % 1000).astype(np.int32),
            held_out=np.arange(n) % 20 == 0,
            key_bytes=np.frombuffer(b"".join(keys), dtype=np.uint8),
            key_end=np.cumsum([len(key) for key in keys]),
            shape=np.array([8, 32, 32]),
            sum=np.ones(4),
            sum_of_squares=np.ones(4),
        )
        blob = Blob(sha256=f"{number:064x}", size_bytes=2**32 - 1)
        shards.append(Shard(tar=blob, index=blob, count=n))
        indices.append(index)
    return shards, indices


def at_scale(folder: Path) -> None:
    """Seal, open and seek; and the memory of a process that has done the latter two."""
    for images in (IMAGENET // 100, IMAGENET):
        shards, indices = synthetic(images)
        names = tuple(map(str, range(1000)))
        began = time.perf_counter()
        sealed = seal_set(shards, indices, spec=SPEC, source="s", classes=names, mirrored=True)
        store = LocalStore(folder / str(images))
        blobs = {name: store.put(data) for name, data in sealed.files.items()}
        seconds = time.perf_counter() - began
        line = [sys.executable, "-m", "bench.data", str(store.root), blobs[MANIFEST].sha256]
        opened = subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
        print(f"{images:9,} images: sealed and written in {seconds:.3f} s, {opened}")


def open_and_seek(root: str, digest: str) -> None:
    """In a process of its own: what it costs to be at image 987,654,321 of a run."""
    store = LocalStore(Path(root))
    before = anonymous_mib()
    began = time.perf_counter()
    manifest = manifest_from_bytes((store.root / "blobs/sha256" / digest).read_bytes(), "m")
    data = LatentSet(manifest, store, "bench")
    opened = time.perf_counter()
    from eqm.batches import mirror_of, samples_of

    numbers = np.arange(987_654_321, 987_654_321 + BATCH)
    samples_of(data, 0, numbers)
    mirror_of(data, 0, numbers)
    print(
        f"opened in {opened - began:.3f} s, sought in {time.perf_counter() - opened:.3f} s, "
        f"{anonymous_mib() - before:.1f} MiB of memory"
    )


def anonymous_mib() -> float:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


# -- noise --------------------------------------------------------------------------------------


def noise_of_a_step() -> None:
    """Posterior noise and whitening beside the step of S/2 that they feed, batch 16."""
    from eqm.config import NetworkConfig, ObjectiveConfig, TrainConfig
    from eqm.latents import sample_latents
    from eqm.learner import Learner
    from eqm.network import Transformer
    from eqm.randomness import Stream, normal

    network = Transformer(NetworkConfig.size("S", patch=2), size=32, channels=4, classes=1000)
    network.initialise(0)
    train = TrainConfig(batch_size=16)
    learner = Learner(network, ObjectiveConfig(), train, device=torch.device("cpu"))
    numbers, labels = torch.arange(16), torch.zeros(16, dtype=torch.int64)
    moments = torch.rand(16, 8, 32, 32).half()

    def noise() -> torch.Tensor:
        drawn = normal(0, Stream.POSTERIOR, numbers, (4, 32, 32))
        return sample_latents(moments, drawn, SPEC)

    def step() -> None:
        learner.backward(learner.corrupted(noise(), labels, numbers))
        learner.apply(learner.gradient(), images_seen=0)

    show(alternate({"step of S/2": step, "noise alone": noise}, rounds=3), base="step of S/2")


def main() -> None:
    """Measure and print; the unit is microseconds a sample."""
    os.environ["OMP_NUM_THREADS"] = "1"
    cores = os.sched_getaffinity(0)
    threads = torch.get_num_threads()
    rng = np.random.default_rng(0)
    latents = rng.random((SAMPLES, 8, 32, 32), dtype=np.float32).astype(np.float16)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        data, tars = make(LocalStore(Path(folder)), latents)
        os.sched_setaffinity(0, {min(cores)})
        torch.set_num_threads(1)
        others = peers(Path(folder), latents)
        sides: dict[str, Callable[[], object]] = {
            "webdataset, in order": lambda: stock(tars),
            **others,
            "eqm.batches": lambda: indexed(data),
        }
        seconds = alternate(sides, rounds=5)
        show(seconds, base="eqm.batches", unit="us/sample", scale=1e6 / SAMPLES)
        best = sorted(seconds["eqm.batches"])[2]
        print(f"{SAMPLES / best:,.0f} samples a second on one core")
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
        at_scale(Path(folder))
    noise_of_a_step()


if __name__ == "__main__":
    open_and_seek(*sys.argv[1:])
