"""What checkpoints cost a training: ``python -m bench.checkpointing [--seconds 60] [--writes 2]``.

S/2 at 256 tokens (with a GPU, B/2) takes steps, and begins a checkpoint every so many seconds into
a store in a folder. Printed: the share of time for which the loop stood still, the median step
beside a write against one without, what a write costs in seconds of cores, and for how long at most
it kept Python's lock to itself, in which no other thread can begin anything.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.energies import DEVICE
from bench.train import CLASSES, latents, network
from eqm import checkpoint, lease
from eqm.checkpoint import TrainState, Writer
from eqm.config import ObjectiveConfig, TrainConfig
from eqm.learner import Learner
from eqm.storage import LocalStore

SIZE, BATCH = ("B", 64) if DEVICE.type == "cuda" else ("S", 4)
RUN = "0" * 64
ASKED = 0.02
"""Of the time, at most, with a checkpoint every minute."""


def training() -> tuple[Callable[[], None], Callable[[], TrainState]]:
    """One step, and the state after it."""
    net = network(SIZE)
    learner = Learner(net, ObjectiveConfig(), TrainConfig(batch_size=BATCH), device=DEVICE)
    x, labels = latents(BATCH)
    numbers = torch.arange(BATCH, device=DEVICE) % CLASSES

    def step() -> None:
        learner.backward(learner.corrupted(x, labels, numbers))
        learner.apply(learner.gradient(), images_seen=int(numbers[0]))
        numbers.add_(BATCH)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def state() -> TrainState:
        curve = {"history": {}, "pending": []}
        return checkpoint.from_flat(learner.state(), int(numbers[0]), curve, {})

    return step, state


class Lock:
    """How long a thread that wakes every millisecond had to wait at most. A context manager."""

    def __enter__(self) -> "Lock":
        self.longest_seconds = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        last = time.perf_counter()
        while not self._end.wait(0.001):
            now = time.perf_counter()
            self.longest_seconds = max(self.longest_seconds, now - last)
            last = now

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def cost(state: TrainState, folder: Path) -> tuple[float, float]:
    """Seconds of cores of one write with nothing beside it, and of Python's lock at a time."""
    with Lock() as lock:
        began = time.thread_time()
        checkpoint.save(LocalStore(folder), RUN, state)
        seconds = time.thread_time() - began
    return seconds, lock.longest_seconds


def measure(folder: Path, every_seconds: float, writes: int) -> None:
    """Train for so many intervals, each of which ends with a checkpoint, and print."""
    step, state = training()
    step()
    store = LocalStore(folder)
    plain: list[float] = []
    beside: list[float] = []
    stalls: list[float] = []
    with lease.held(store, checkpoint.lease_key(RUN), seconds=30) as mine:
        writer = Writer(store, RUN, keep=1, mine=mine)
        began = due = time.perf_counter()
        while len(stalls) < writes or writer.busy:
            if time.perf_counter() - due >= every_seconds and len(stalls) < writes:
                due = time.perf_counter()
                writer.write(state())
                stalls.append(time.perf_counter() - due)
            busy, start = writer.busy, time.perf_counter()
            step()
            (beside if busy else plain).append(time.perf_counter() - start)
        seconds = time.perf_counter() - began
        writer.wait()
        writer.close()
    size_bytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    print(f"{SIZE}/2, batch {BATCH}, {size_bytes / 2**20:,.0f} MiB a checkpoint, {seconds:.0f} s")
    print(f"stalls: {', '.join(f'{1e3 * s:.0f} ms' for s in stalls)}: the first has no memory yet")
    share = sum(stalls) / seconds
    print(f"the loop stood still for {share:.2%} of the time, every {every_seconds:g} s")
    minute = statistics.median(stalls) / 60
    print(f"of a minute with one checkpoint: {minute:.2%} (asked: under {ASKED:.0%})")
    ratio = statistics.median(beside) / statistics.median(plain) if beside else float("nan")
    print(
        f"step {statistics.median(plain):.3f} s, beside a write x {ratio:.3f} "
        f"({len(plain)} and {len(beside)} steps)"
    )
    seconds, lock = cost(state(), folder / "alone")
    print(
        f"one write: {seconds:.2f} s of a core, {seconds / 60:.1%} of one with one a minute; it "
        f"kept Python's lock for {1e3 * lock:.0f} ms at most"
    )


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="between two checkpoints")
    parser.add_argument("--writes", type=int, default=2, help="how many checkpoints")
    asked = parser.parse_args(argv or [])
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), asked.seconds, asked.writes)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
