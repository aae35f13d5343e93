"""What going on from a checkpoint costs: ``python -m bench resuming``.

Processes of one core each, alike and at once, go on from a checkpoint: as ours does, where the
first one reads it for all, a few files ahead of the one that is put in place, and with each of
them reading the whole of it, a file at a time. From a folder, and from one that gives as much a
second as a connection to S3 may (it sleeps). Printed: seconds until all are there, and by how much
the memory of a process grew above what it holds of the state, at its peak.
"""

import gc
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

import torch

from bench.train import network
from eqm import checkpoint
from eqm.checkpoint import Position, Wanted
from eqm.config import ObjectiveConfig, TrainConfig
from eqm.distributed import World, connect
from eqm.learner import Learner
from eqm.persistence import shared_read
from eqm.records import Blob
from eqm.storage import LocalStore

RUN, AT = "0" * 64, Position(256, 1)
RUNS, ROUNDS = (("S", 2), ("S", 4), ("B", 2)), 3
"""Sizes of networks, and numbers of processes."""
MIB = 2**20
CONNECTION = 100e6
"""Bytes a second."""


def made(size: str, device: torch.device) -> Learner:
    """A network and its optimisation, at their beginning."""
    return Learner(network(size), ObjectiveConfig(), TrainConfig(), device=device)


def shared(learner: Learner, store: LocalStore, world: World) -> None:
    """As eqm.persistence goes on."""
    read = shared_read(store, world)
    with checkpoint.opened(store, RUN, AT, read=read) as found:
        checkpoint.fill(learner.state(), found.files)


def each(learner: Learner, store: LocalStore, world: World) -> None:
    """Each process reads all of it, and then copies."""

    def one_by_one(wanted: Wanted) -> Generator[bytes, None, None]:
        for key, blob in wanted:
            data = store.read(key)
            assert blob is None or Blob.of(data) == blob
            yield data

    with checkpoint.opened(store, RUN, AT, read=one_by_one) as found:
        files = list(found.files)
        checkpoint.fill(learner.state(), files)


WAYS: dict[str, Callable[[Learner, LocalStore, World], None]] = {"shared": shared, "each": each}


class Distant(LocalStore):
    """A folder that is read at CONNECTION bytes a second by each who reads."""

    def read(self, key: str) -> bytes:
        """Also takes its time."""
        data = super().read(key)
        time.sleep(len(data) / CONNECTION)
        return data


STORES = {"folder": LocalStore, "distant": Distant}


def measure(way: str, kind: str, folder: str, size: str) -> None:
    """What one process does."""
    with connect("cpu", threads=1) as world:
        learner, store = made(size, world.device), STORES[kind](Path(folder))
        gc.collect()
        world.barrier()
        before, began = peak(), time.perf_counter()
        WAYS[way](learner, store, world)
        world.barrier()
        seconds = time.perf_counter() - began
        grown = world.each_says(peak() - before)
        if world.is_first:
            others = max(grown[1:])
            print(f"{seconds} {grown[0] / MIB} {others / MIB}", flush=True)


def peak() -> int:
    """The most memory that this process ever held, bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def asked(way: str, kind: str, folder: str, size: str, processes: int) -> list[float]:
    """Seconds, and MiB by which the first process and the largest other one grew."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    line = [sys.executable, *start, "-m", "bench.resuming", way, kind, folder, size]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()]


def main() -> None:
    """Measure both, in turn, and print."""
    for size, processes in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            size_bytes = written(size, Path(folder))
            print(f"{size}/2, {size_bytes / MIB:,.0f} MiB a checkpoint, {processes} processes")
            for kind in STORES:
                beside(kind, folder, size, processes)


def written(size: str, folder: Path) -> int:
    """Leave a checkpoint in a folder; its bytes."""
    learner, curve = made(size, torch.device("cpu")), {"history": {}, "pending": []}
    state = checkpoint.from_flat(learner.state(), AT.images_seen, curve, {})
    checkpoint.save(LocalStore(folder), RUN, state)
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def beside(kind: str, folder: str, size: str, processes: int) -> None:
    """Measure both ways in turn, and print the medians."""
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, rows in found.items():
            rows.append(asked(way, kind, folder, size, processes))
    middle = {
        way: [statistics.median(column) for column in zip(*rows, strict=True)]
        for way, rows in found.items()
    }
    for way, (seconds, first, others) in middle.items():
        print(
            f"   {kind:7}, {way:6}: {seconds:5.2f} s, the first grew by {first:,.0f} MiB, "
            f"others by {others:,.0f}"
        )
    print(f"   x {middle['each'][0] / middle['shared'][0]:.2f} as fast", flush=True)


if __name__ == "__main__":
    measure(*sys.argv[1:5])
