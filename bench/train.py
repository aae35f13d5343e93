"""A training step of ours beside a plain one: eager, fp32, default AdamW, an EMA weight by weight.

The plain side is the recipe of the released script, written here: fp32 without autocast, torch's
default optimiser, one EMA call a weight, ``loss.item()`` at every step. Both sides train the same
network on the same latents; ours draws its noise by image number, which the plain one does not. On
a CPU, S/2 and B/2 at 256 tokens; with a GPU, B/2 and XL/2. FLOPs are those of matrix products and
attention, 2 a multiply-add, three forwards a step, nothing recomputed; a machine's peak is what its
own matrix products reach here.
"""

import copy
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from bench.energies import DEVICE, _held, _peak
from bench.timing import alternate, show
from eqm import flops
from eqm.config import NetworkConfig, ObjectiveConfig, TrainConfig
from eqm.learner import Learner
from eqm.network import Transformer

ON_GPU = DEVICE.type == "cuda"
CASES = {"B": 64, "XL": 32} if ON_GPU else {"S": 16, "B": 8}
"""Size -> batch."""
ROUNDS = 3
TOKENS, CLASSES, DECAY = 256, 1000, 0.9999
HAS_BF16 = ON_GPU or "avx512_bf16" in Path("/proc/cpuinfo").read_text()


def network(size: str) -> Transformer:
    """A network of the paper at 256 px."""
    found = Transformer(NetworkConfig.size(size, patch=2), size=32, channels=4, classes=CLASSES)
    found.initialise(0)
    return found.to(DEVICE)


def latents(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and labels, always the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, 32, 32, generator=generator).to(DEVICE)
    return x, torch.arange(batch, device=DEVICE)


def plain(size: str, batch: int) -> Callable[[], None]:
    """The released recipe."""
    net = network(size)
    average = copy.deepcopy(net).requires_grad_(False)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0)
    x, labels = latents(batch)

    def step() -> None:
        gamma = torch.rand(batch, 1, 1, 1, device=DEVICE)
        eps = torch.randn_like(x)
        goal = (eps - x) * 4 * torch.clamp((1 - gamma) / 0.2, max=1)
        dropped = torch.where(torch.rand(batch, device=DEVICE) < 0.1, CLASSES, labels)
        loss = F.mse_loss(net(gamma * x + (1 - gamma) * eps, dropped), goal)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for old, new in zip(average.parameters(), net.parameters(), strict=True):
                old.mul_(DECAY).add_(new, alpha=1 - DECAY)
        loss.item()

    return step


def ours(
    size: str, batch: int, *, half: bool = False, compiled: bool = False
) -> Callable[[], None]:
    """What eqm.train does between two batches."""
    net = network(size)
    config = TrainConfig(
        batch_size=batch, learning_rate=1e-4, precision="bfloat16" if half else "float32"
    )
    learner = Learner(net, ObjectiveConfig(), config, device=DEVICE)
    if compiled:
        for block in net.blocks:
            block.compile()
    x, labels = latents(batch)
    numbers = torch.arange(batch, device=DEVICE)

    def step() -> None:
        learner.backward(learner.corrupted(x, labels, numbers))
        learner.apply(learner.gradient(), images_seen=0)
        numbers.add_(batch)
        if ON_GPU:
            torch.cuda.synchronize()

    return step


SIDES: dict[str, Callable[[str, int], Callable[[], None]]] = {"plain": plain, "ours": ours}
if HAS_BF16:
    SIDES["ours, bf16"] = lambda size, batch: ours(size, batch, half=True)
if shutil.which("c++") or shutil.which("g++"):
    SIDES["ours, compiled"] = lambda size, batch: ours(size, batch, compiled=True)
    if HAS_BF16:
        SIDES["ours, bf16, compiled"] = lambda size, batch: ours(
            size, batch, half=True, compiled=True
        )


def work(size: str) -> float:
    """FLOPs of one image and step."""
    config = NetworkConfig.size(size, patch=2)
    found = flops.training_flops(config, ObjectiveConfig(), tokens=TOKENS, channels=4)
    assert found is not None, "only a U-Net's is not counted"
    return found


def machine_flops() -> float:
    """FLOP/s that this machine is said, or on a CPU seen, to do at most."""
    if ON_GPU:
        return flops.peak_flops(torch.cuda.get_device_name()) or float("nan")
    a = torch.randn(2048, 2048)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def grown(side: str, size: str, batch: int) -> int:
    """Bytes that weights, moments, averages and three steps add to a process."""
    before = _held()
    step = SIDES[side](size, batch)
    for _ in range(3):
        step()
    return _peak() - before


def memory(side: str, size: str, batch: int) -> float:
    """MiB, in a process of its own."""
    code = (
        f"from bench.train import grown; import json; print(json.dumps(grown{side, size, batch}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) / 2**20


def main() -> None:
    """Measure and print."""
    peak = machine_flops()
    print(f"bfloat16 in this processor: {HAS_BF16}; peak {peak / 1e9:,.0f} GFLOP/s")
    for size, batch in CASES.items():
        print(f"-- {size}/2, batch {batch}")
        sides = {name: make(size, batch) for name, make in SIDES.items()}
        seconds = alternate(sides, rounds=ROUNDS)
        show(seconds, base="plain")
        for name, values in seconds.items():
            rate = batch / sorted(values)[len(values) // 2]
            share = rate * work(size) / peak
            used = memory(name, size, batch)
            print(f"{name:32} {rate:9.3g} images/s  MFU {share:.1%}  {used:,.0f} MiB")


if __name__ == "__main__":
    main()
