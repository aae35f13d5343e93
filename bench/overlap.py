"""Gradients that are summed over processes while the backward goes on, and after it.

Two processes on one core each train S/2 with 4 images; between them a network of so many bits a
second, in a network namespace of its own (Linux, unprivileged user namespaces, iproute2's tc).
A step in which nobody waits for the network stands beside both.
"""

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch

from bench.timing import alternate
from bench.train import latents, network
from eqm.config import ObjectiveConfig, TrainConfig
from eqm.distributed import World, connect
from eqm.gradients import SEGMENT_BYTES, FlatGradient
from eqm.learner import FLAGS, Learner

RATES = ("1gbit", "2gbit", "4gbit")
BATCH, ROUNDS = 4, 4
WHOLE = 2**40
"""Bytes of a segment that no gradient has."""


def stepper(world: World, segment_bytes: int | None) -> Callable[[], None]:
    """An update; None: each process for itself."""
    config = TrainConfig(batch_size=BATCH * world.size, learning_rate=1e-4)
    learner = Learner(network("S"), ObjectiveConfig(), config, device=world.device)
    weights = tuple(learner.trained.values())
    learner.gradients = FlatGradient(weights, room=FLAGS, segment_bytes=segment_bytes or WHOLE)
    x, labels = latents(BATCH)
    numbers = torch.arange(BATCH) + BATCH * world.rank

    def step() -> None:
        sums = []
        at = learner.corrupted(x, labels, numbers)
        loss = learner.backward(at, lambda part: sums.append(world.begin_sum(part))).mean()
        if segment_bytes is not None:
            world.sum_(learner.gradients.segments[-1])
            for begun in sums:
                begun.wait()
        learner.apply(learner.gradient(), images_seen=0, loss=loss)
        world.barrier()

    return step


def measure() -> None:
    """What one process does."""
    with connect("cpu", threads=1) as world:
        sides = {
            "nothing is summed": stepper(world, None),
            "after the backward": stepper(world, WHOLE),
            "while it goes on": stepper(world, SEGMENT_BYTES),
        }
        found = alternate(sides, rounds=ROUNDS)
        if not world.is_first:
            return
        middle = {name: statistics.median(seconds) for name, seconds in found.items()}
        alone, after, while_ = middle.values()
        for name, seconds in middle.items():
            low, high = min(found[name]), max(found[name])
            print(f"   {name:20} {seconds:6.3f} s a step ({low:.3f} to {high:.3f})")
        hidden = (after - while_) / (after - alone)
        print(f"   x {after / while_:.2f}; of the network's time {hidden:.0%} hidden", flush=True)


def main() -> None:
    """Measure at each rate and print."""
    for rate in RATES:
        print(f"-- S/2, two processes of {BATCH} images, {rate}", flush=True)
        apart = ["unshare", "--map-root-user", "--net"]
        subprocess.run([*apart, sys.executable, "-m", "bench.overlap", rate], check=True)


def in_network(rate: str) -> None:
    """Start both processes where the loopback interface is as slow as that."""
    limit = ["root", "tbf", "rate", rate, "burst", "1mb", "latency", "1s"]
    ip, tc = (shutil.which(name) or name for name in ("ip", "tc"))
    subprocess.run([ip, "link", "set", "lo", "up"], check=True)
    subprocess.run([tc, "qdisc", "add", "dev", "lo", *limit], check=True)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *start, "-m", "bench.overlap"], env=environment, check=True)


if __name__ == "__main__":
    if "RANK" in os.environ:
        measure()
    elif len(sys.argv) > 1:
        in_network(sys.argv[1])
    else:
        main()
