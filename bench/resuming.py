"""What going on from a checkpoint costs: ``python -m bench resuming``.

Processes of one core each, alike and at once, go on from a checkpoint of S/2: as ours does, where
the first one reads it for all, a few files ahead of the one that is put in place, and with each of
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
PROCESSES, ROUNDS = (2, 4), 3
MIB = 2**20
CONNECTION = 100e6
"""Bytes a second."""


def made(device: torch.device) -> Learner:
    """A network and its optimisation, at their beginning."""
    return Learner(network("S"), ObjectiveConfig(), TrainConfig(), device=device)


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


def measure(way: str, kind: str, folder: str) -> None:
    """What one process does."""
    with connect("cpu", threads=1) as world:
        learner, store = made(world.device), STORES[kind](Path(folder))
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


def asked(way: str, kind: str, folder: str, processes: int) -> list[float]:
    """Seconds, and MiB by which the first process and the largest other one grew."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    line = [sys.executable, *start, "-m", "bench.resuming", way, kind, folder]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()]


def main() -> None:
    """Measure both, in turn, and print."""
    with tempfile.TemporaryDirectory() as folder:
        learner = made(torch.device("cpu"))
        curve = {"history": {}, "pending": []}
        state = checkpoint.from_flat(learner.state(), AT.images_seen, curve, {})
        checkpoint.save(LocalStore(Path(folder)), RUN, state)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
        print(f"S/2, {size / MIB:,.0f} MiB a checkpoint")
        for kind in STORES:
            for processes in PROCESSES:
                beside(kind, folder, processes)


def beside(kind: str, folder: str, processes: int) -> None:
    """Measure both ways in turn, and print the medians."""
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, rows in found.items():
            rows.append(asked(way, kind, folder, processes))
    middle = {
        way: [statistics.median(column) for column in zip(*rows, strict=True)]
        for way, rows in found.items()
    }
    for way, (seconds, first, others) in middle.items():
        print(
            f"   {kind:7}, {processes} processes, {way:6}: {seconds:5.2f} s, the first grew by "
            f"{first:,.0f} MiB, others by {others:,.0f}"
        )
    print(f"   x {middle['each'][0] / middle['shared'][0]:.2f} as fast", flush=True)


if __name__ == "__main__":
    measure(*sys.argv[1:4])
