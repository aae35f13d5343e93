"""A training step of ours beside a plain one: eager, fp32, default AdamW, an EMA weight by weight.

The plain side is the recipe of the released script, written here: fp32 without autocast, torch's
default optimiser, one EMA call a weight, ``loss.item()`` at every step. Both sides train the same
network on the same latents; ours draws latents of stored moments and its noise by image number, and
adds losses up by level, which the plain one does not. That both have one loss is seen in float64
first. On a CPU, S/2 and B/2 at 256 tokens, batches alike, each side in a process of its own, which
are asked for a step in turn: how a process keeps freed memory is part of ours. With a GPU, XL/2 and
B/2, or the one that ``--size`` names: the plain side in TF32 with the largest batch that fits, ours
with 256 images an update, with kernels that add in a fixed order and with the quickest; what was
measured is shown at once. FLOPs are those of matrix products and attention, 2 a multiply-add, three
forwards a step, nothing recomputed; a CPU's peak is what its own matrix products reach here in
float32, a GPU's what its data sheet says of bfloat16.
"""

import copy
import functools
import gc
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from bench.energies import DEVICE, _held, _peak
from eqm import flops
from eqm.compute import bfloat16_products, is_replayed, prepare
from eqm.config import ComputeConfig, NetworkConfig, ObjectiveConfig, TrainConfig
from eqm.gauges import BANDS, by_band
from eqm.kernels.halves import lacking
from eqm.latents import sample_latents
from eqm.learner import Learner
from eqm.memory import keep_freed
from eqm.network import Transformer
from eqm.precision import choose_deterministic, choose_products
from eqm.randomness import Stream, normal
from eqm.records import LatentSpec

ON_GPU = DEVICE.type == "cuda"
CASES = {"XL": 256, "B": 256} if ON_GPU else {"S": 16, "B": 8}
"""Size -> batch of ours. On a GPU the plain side takes the largest that fits."""
MICRO_BATCH = {"XL": 128}
"""Size -> images of one backward, where not all of the batch fit: on GPUs of less than ROOMY."""
ROOMY = 100 * 2**30
LARGEST = {
    "B": (768, 704, 640, 576, 512, 448, 384, 320, 256, 192, 128),
    "XL": (208, 192, 176, 160, 144, 128, 112, 104, 96, 88, 80, 64, 48, 32),
}
"""Size -> batches that the plain side is tried with."""
ROUNDS, STEPS = (3, 6) if ON_GPU else (7, 1)
FIRST = 3
"""Steps that are not counted: kernels are compiled, and the step recorded."""
TOKENS, CLASSES, DECAY = 256, 1000, 0.9999
LATENT = LatentSpec(
    autoencoder="",
    image_size_px=256,
    image_channels=3,
    shape=(4, 32, 32),
    shift=(0.0,) * 4,
    scale=(1.0,) * 4,
)
HAS_BF16 = ON_GPU or bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
HAS_COMPILER = any(map(shutil.which, ("c++", "g++")))
Precision = Literal["float32", "bfloat16", "float16"]


@functools.cache
def _drawn(size: str) -> Transformer:
    found = Transformer(NetworkConfig.size(size, patch=2), size=32, channels=4, classes=CLASSES)
    found.initialise(0)
    return found


def network(size: str) -> Transformer:
    """A network of the paper at 256 px."""
    return copy.deepcopy(_drawn(size)).to(DEVICE)


def latents(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and labels, always the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, 32, 32, generator=generator).to(DEVICE)
    return x, torch.arange(batch, device=DEVICE) % CLASSES


def plain_loss(
    net: Transformer,
    x: torch.Tensor,
    eps: torch.Tensor,
    gamma: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """The released recipe's mean loss; gamma (B, 1, 1, 1)."""
    goal = (eps - x) * 4 * torch.clamp((1 - gamma) / 0.2, max=1)
    return F.mse_loss(net(gamma * x + (1 - gamma) * eps, labels), goal)


def plain(size: str, batch: int) -> Callable[[], None]:
    """The released recipe."""
    choose_products("tf32" if ON_GPU else "float32", DEVICE)
    net = network(size)
    average = copy.deepcopy(net).requires_grad_(False)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0)
    x, labels = latents(batch)

    def step() -> None:
        gamma = torch.rand(batch, 1, 1, 1, device=DEVICE)
        dropped = torch.where(torch.rand(batch, device=DEVICE) < 0.1, CLASSES, labels)
        loss = plain_loss(net, x, torch.randn_like(x), gamma, dropped)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for old, new in zip(average.parameters(), net.parameters(), strict=True):
                old.mul_(DECAY).add_(new, alpha=1 - DECAY)
        loss.item()

    return step


def ours(
    size: str,
    batch: int,
    *,
    precision: Precision = "float32",
    compiled: bool = False,
    fused: bool = False,
    attention: Literal["auto", "torch"] = "auto",
    replay: Literal["auto", "never"] = "auto",
    in_order: bool = ON_GPU,
) -> Callable[[], None]:
    """What eqm.train does between two batches.

    ``attention`` and ``replay`` are those of a fused step. ``in_order``: by kernels that always add
    alike.
    """
    torch.use_deterministic_algorithms(False)
    if in_order:
        choose_deterministic(DEVICE)
    if not ON_GPU:
        keep_freed()
    config = TrainConfig(batch_size=batch, learning_rate=1e-4, precision=precision)
    choose_products(config.precision, DEVICE)
    net, objective = network(size), ObjectiveConfig()
    small = ON_GPU and torch.cuda.get_device_properties(DEVICE).total_memory < ROOMY
    micro = MICRO_BATCH.get(size) if small else None
    compute = ComputeConfig(compile=compiled, fused=fused, attention=attention, replay=replay)
    prepare(net, compute, objective, DEVICE)
    again = is_replayed(compute, objective, DEVICE)
    learner = Learner(net, objective, config, device=DEVICE, micro_batch=micro, replays=again)
    x, labels = latents(batch)
    # As a store has them: of these the posterior is a point.
    moments = torch.cat([x, torch.zeros_like(x)], dim=1).half()
    numbers, tally = torch.arange(batch, device=DEVICE), torch.zeros(2 * BANDS, device=DEVICE)

    def step() -> None:
        noise = normal(config.seed, Stream.POSTERIOR, numbers, LATENT.shape)
        at = learner.corrupted(sample_latents(moments, noise, LATENT), labels, numbers)
        losses = learner.backward(at)
        tally.add_(by_band(losses, learner.levels(numbers)))
        learner.apply(learner.gradient(), images_seen=0, loss=losses.mean())
        numbers.add_(batch)

    return step


def same_loss(size: str) -> float:
    """Relative difference of the two sides' losses of the same images, in float64."""
    net, batch = network(size).double(), 4
    net.initialise(0, zero_head=False)
    config = TrainConfig(batch_size=batch, label_dropout=0.0)
    learner = Learner(net, ObjectiveConfig(), config, device=DEVICE)
    x, labels = latents(batch)
    numbers = torch.arange(batch, device=DEVICE)
    one = learner.backward(learner.corrupted(x.double(), labels, numbers)).mean()
    eps = normal(config.seed, Stream.EPS, numbers, tuple(x.shape[1:]), torch.float64)
    gamma = learner.levels(numbers, torch.float64).view(-1, 1, 1, 1)
    with torch.no_grad():
        other = plain_loss(net, x.double(), eps, gamma, labels)
    return float((one - other).abs() / other)


Make = Callable[[str, int], Callable[[], None]]
SIDES: dict[str, Make] = {"plain": plain}
PRECISIONS: dict[str, Precision] = {"": "float32"}
if HAS_BF16:
    PRECISIONS[", bf16"] = "bfloat16"
if HAS_COMPILER and lacking() is None:
    PRECISIONS[", fp16"] = "float16"
for _name, _precision in PRECISIONS.items():
    SIDES[f"ours{_name}"] = functools.partial(ours, precision=_precision)
    if HAS_COMPILER:
        SIDES[f"ours{_name}, compiled"] = functools.partial(
            ours, precision=_precision, compiled=True
        )
if ON_GPU:
    half = functools.partial(ours, precision="bfloat16")
    SIDES = {
        "plain, TF32": plain,
        "ours, bf16": half,
        "ours, bf16, compiled": functools.partial(half, compiled=True),
        "ours, bf16, fused": functools.partial(half, fused=True),
        "the same, not replayed": functools.partial(half, fused=True, replay="never"),
        "the same, compiled": functools.partial(half, fused=True, compiled=True),
        "fused, attention of torch": functools.partial(half, fused=True, attention="torch"),
        "fused, in any order": functools.partial(half, fused=True, in_order=False),
    }


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


# -- on a CPU -----------------------------------------------------------------------------------


class Apart:
    """One side in a process of its own, which takes a step when it is told to."""

    def __init__(self, side: str, size: str, batch: int) -> None:
        code = f"from bench.train import obey; obey{side, size, batch}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def step(self) -> dict[str, float]:
        """Its seconds, and how many bytes weights, moments, averages and steps added so far."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def obey(side: str, size: str, batch: int) -> None:
    """Take a step for each line that comes in."""
    before = _held()
    step = SIDES[side](size, batch)
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "bytes": _peak() - before}), flush=True)


def compare_on_cpu(size: str, batch: int, peak: float) -> None:
    """Measure each side in steps that alternate with the plain side's, and print.

    Two at a time, for all of B/2 would need 15 GiB.
    """
    for name in SIDES:
        if name == "plain":
            continue
        with Apart("plain", size, batch) as other, Apart(name, size, batch) as ours_:
            pairs = [(other.step(), ours_.step()) for _ in range(ROUNDS + 2)][2:]
        reference, mine = (
            statistics.median(found["seconds"] for found in side)
            for side in zip(*pairs, strict=True)
        )
        ratios = sorted(a["seconds"] / b["seconds"] for a, b in pairs)
        plain_held, held = (found["bytes"] / 2**20 for found in pairs[-1])
        print(
            f"{name:24} {batch / mine:8.3g} images/s  x {reference / mine:.2f} ({ratios[0]:.2f} "
            f"to {ratios[-1]:.2f})  MFU {batch / mine * work(size) / peak:.1%}  {held:,.0f} MiB; "
            f"plain {batch / reference:.3g} images/s, {plain_held:,.0f} MiB",
            flush=True,
        )


# -- on a GPU -----------------------------------------------------------------------------------


@dataclass
class Found:
    """What one side of a case came to on a GPU."""

    batch: int
    seconds: list[float]
    """Of a step, in each round."""
    peak_bytes: int = 0


def timed(make: Make, size: str, batch: int) -> tuple[float, int]:
    """Seconds of a step, in the mean of STEPS after some, and the most memory that was held."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = make(size, batch)
    for _ in range(FIRST):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / STEPS, torch.cuda.max_memory_allocated()


def largest(make: Make, size: str) -> int:
    """The largest batch that fits."""
    for batch in LARGEST[size]:
        try:
            timed(make, size, batch)
        except torch.OutOfMemoryError:
            continue
        return batch
    raise MemoryError(f"not even {LARGEST[size][-1]} images of {size}/2 fit")


def keep_versions() -> None:
    """Drop what was compiled of another size, and keep what every side compiles of this one.

    Sides share a block's code, and the compiler keeps 8 versions of a code.
    """
    import torch._dynamo

    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 8 * len(SIDES)


def compare_on_gpu(size: str, batch: int, peak: float) -> None:
    """Measure all sides in turn, ROUNDS times, and print. They do not fit beside each other.

    Each measurement is printed as it is made: who cuts this short has those.
    """
    keep_versions()
    found = {name: Found(batch, []) for name in SIDES}
    base, *_ = SIDES
    found[base].batch = largest(SIDES[base], size)
    for number in range(ROUNDS):
        for name, make in SIDES.items():
            side = found[name]
            seconds, side.peak_bytes = timed(make, size, side.batch)
            side.seconds.append(seconds)
            print(
                f"   round {number + 1}: {name:28} batch {side.batch:3}  "
                f"{side.batch / seconds:7.1f} images/s  {side.peak_bytes / 2**30:.1f} GiB",
                flush=True,
            )
    reference = found[base].batch / statistics.median(found[base].seconds)
    for name, side in found.items():
        rates = sorted(side.batch / s for s in side.seconds)
        rate = statistics.median(rates)
        print(
            f"{name:28} batch {side.batch:3}  {rate:7.1f} images/s ({rates[0]:.1f} to "
            f"{rates[-1]:.1f})  x {rate / reference:.2f}  MFU {rate * work(size) / peak:.1%}  "
            f"{side.peak_bytes / 2**30:.1f} GiB",
            flush=True,
        )


def main(only: str | None = None) -> None:
    """Measure and print, of all sizes or one."""
    if only is not None and only not in CASES:
        sys.exit(f"error: no size {only!r}; there are {', '.join(CASES)} on this machine")
    peak = machine_flops()
    name = torch.cuda.get_device_name() if ON_GPU else "this processor"
    print(f"{name}: peak {peak / 1e12:,.3f} TFLOP/s, torch {torch.__version__}", flush=True)
    if not ON_GPU:
        says = "has" if HAS_BF16 else "has no"
        print(
            f"{says} instructions for bfloat16; products in it take {bfloat16_products():.2f} "
            "times as long as in float32"
        )
    for size, batch in CASES.items():
        if only not in (None, size):
            continue
        print(f"-- {size}/2, losses apart by {same_loss(size):.1e} in float64", flush=True)
        (compare_on_gpu if ON_GPU else compare_on_cpu)(size, batch, peak)


if __name__ == "__main__":
    main()
