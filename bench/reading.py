"""Random batches of latents from plain tar shards: the indexed reader beside stock webdataset.

2,048 samples of 16 KiB (8 x 32 x 32 float16), batches of 256, page cache. The reader checks a CRC
at every sample and reads in a random order; webdataset reads in the order of the tar and checks
nothing.
"""

import tempfile
from pathlib import Path

import numpy as np

from bench.timing import alternate, show
from eqm.records import LatentSpec, Shard
from eqm.shards import LatentSet, Sample, read_index, seal_set, write_shard
from eqm.storage import LocalStore

SAMPLES, SHARDS, BATCH = 2048, 4, 256
SPEC = LatentSpec(
    autoencoder="none",
    image_size_px=256,
    image_channels=3,
    shape=(4, 32, 32),
    shift=(0.0,) * 4,
    scale=(1.0,) * 4,
)


def make(store: LocalStore) -> tuple[LatentSet, list[str]]:
    """Shards of noise: the set, and the tars for webdataset."""
    rng = np.random.default_rng(0)
    shards, indices, tars = [], [], []
    for number in range(SHARDS):
        count = SAMPLES // SHARDS
        moments = rng.random((count, 8, 32, 32), dtype=np.float32).astype(np.float16)
        first = number * count
        samples = [Sample(f"{first + i}", 0, False, m) for i, m in enumerate(moments)]
        packed = write_shard(samples, first_number=first)
        shard = Shard(tar=store.put(packed.tar), index=store.put(packed.index), count=count)
        shards.append(shard)
        indices.append(read_index(packed.index, shard, f"shard {number}"))
        tar = store.root / f"{number}.tar"
        tar.write_bytes(packed.tar)
        tars.append(str(tar))
    sealed = seal_set(shards, indices, spec=SPEC, source="0" * 64, classes=("a",), mirrored=False)
    store.put(sealed.index)
    store.put(sealed.keys)
    return LatentSet(sealed.manifest, store, "bench"), tars


def indexed(data: LatentSet) -> None:
    """One pass in a random order."""
    order = np.random.default_rng(1).permutation(SAMPLES)
    for start in range(0, SAMPLES, BATCH):
        data.moments(order[start : start + BATCH])


def stock(tars: list[str]) -> None:
    """One pass in the order of the tars."""
    import webdataset

    kept = []
    for sample in webdataset.WebDataset(tars, shardshuffle=False).decode():
        kept.append(sample["moments.npy"])
        if len(kept) == BATCH:
            np.stack(kept)
            kept.clear()


def main() -> None:
    """Measure and print; the unit is microseconds a sample."""
    with tempfile.TemporaryDirectory() as folder:
        data, tars = make(LocalStore(Path(folder)))
        sides = {"webdataset, in order": lambda: stock(tars), "indexed": lambda: indexed(data)}
        show(alternate(sides, rounds=5), base="indexed", unit="us/sample", scale=1e6 / SAMPLES)
