"""Readers of litdata and MosaicML streaming, in an environment of their own. Not run by hand.

``python peers.py LATENTS.npy FOLDER``: writes the latents in both formats, says READY, and then
reads all of them, in a random order and stacked in batches, each time a name comes in; answers with
the seconds that it took. Imports nothing of eqm, which is not there.
"""

import sys
import time
from pathlib import Path

import numpy as np

BATCH = 256


def sample(i):
    """One sample for litdata's writer, which wants a function that it can import."""
    latents = np.load(sys.argv[1], mmap_mode="r")
    return {"moments": np.array(latents[i]), "label": i % 1000}


def batches(dataset):
    """One pass, stacked."""
    kept = []
    for one in dataset:
        kept.append(one["moments"])
        if len(kept) == BATCH:
            np.stack(kept)
            kept.clear()


def write_litdata(folder, count):
    """Chunks of 64 MB."""
    from litdata import optimize

    optimize(
        fn=sample,
        inputs=list(range(count)),
        output_dir=str(folder),
        chunk_bytes="64MB",
        num_workers=1,
    )


def read_litdata(folder):
    """Shuffled, as for training."""
    from litdata import StreamingDataset

    batches(StreamingDataset(str(folder), shuffle=True))


def write_mds(folder, latents):
    """MDS shards of 64 MB."""
    from streaming import MDSWriter

    columns = {
        "moments": f"ndarray:float16:{','.join(map(str, latents.shape[1:]))}",
        "label": "int",
    }
    with MDSWriter(out=str(folder), columns=columns, size_limit="64mb") as writer:
        for i, moments in enumerate(latents):
            writer.write({"moments": np.array(moments), "label": i % 1000})


def read_mds(folder):
    """Shuffled by the default algorithm."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    batches(StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH))


def main():
    """Write, then read on demand."""
    folder = Path(sys.argv[2])
    latents = np.load(sys.argv[1], mmap_mode="r")
    write_litdata(folder / "litdata", len(latents))
    write_mds(folder / "mds", latents)
    print("READY", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        {"litdata": read_litdata, "mds": read_mds}[line.strip()](folder / line.strip())
        print(f"TOOK {time.perf_counter() - began}", flush=True)


if __name__ == "__main__":
    main()
