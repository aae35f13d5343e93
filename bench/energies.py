"""What training an explicit energy costs beside an implicit step: S/2, 256 tokens, whole updates.

"double" is the released way: a double backward through math attention. "directional" needs first
derivatives alone. Time is of alternating updates in one process. Peak memory is counted twice, in a
fresh process of its own: what weights, moments, averages and two updates add to it, and what
forward and backward alone add, with the gradients of all weights that they leave. On the CPU both
are of the high-water mark of the resident set. ``compiled`` sides are shown where a C++ compiler is
at hand.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.timing import alternate, show
from eqm.compute import prepare
from eqm.config import ComputeConfig, NetworkConfig, ObjectiveConfig, TrainConfig
from eqm.learner import Learner
from eqm.network import Transformer
from eqm.objective import Corrupted
from eqm.precision import choose_products

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, ROUNDS = (128, 5) if DEVICE.type == "cuda" else (4, 3)
SIDES = ("implicit", "double", "directional")


def network() -> Transformer:
    """S/2 with weights that are not zero anywhere."""
    torch.manual_seed(0)
    found = Transformer(NetworkConfig.size("S", patch=2), size=32, channels=4, classes=1000)
    found.initialise(0, zero_head=False)
    with torch.no_grad():
        for weight in found.parameters():
            weight += 0.02 * torch.randn(weight.shape)
    return found.to(DEVICE)


def training(
    side: str, *, compiled: bool = False, fused: bool = False
) -> tuple[Learner, Corrupted]:
    """A learner, and what it is given: noise in the place of latents."""
    way = "double" if side == "implicit" else side
    energy = "implicit" if side == "implicit" else "dot"
    objective = ObjectiveConfig(energy=energy, backward=way)  # type: ignore[arg-type]
    choose_products("float32", DEVICE)
    net = network()
    prepare(net, ComputeConfig(compile=compiled, fused=fused), objective, DEVICE)
    learner = Learner(net, objective, TrainConfig(batch_size=BATCH), device=DEVICE)
    x = torch.randn(BATCH, 4, 32, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    numbers = torch.arange(BATCH, device=DEVICE)
    return learner, learner.corrupted(x, numbers, numbers)


def stepper(side: str, *, compiled: bool = False, fused: bool = False) -> Callable[[], None]:
    """One update, as a function."""
    learner, at = training(side, compiled=compiled, fused=fused)

    def step() -> None:
        learner.backward(at)
        learner.apply(learner.gradient(), images_seen=0)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return step


# -- memory -------------------------------------------------------------------------------------


def peaks(side: str) -> dict[str, int]:
    """Peaks in bytes of a process of its own, by what is counted."""
    code = f"from bench.energies import grown; import json; print(json.dumps(grown({side!r})))"
    # Freed blocks go back to the system at once: else the resident set would hold old ones too.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    return json.loads(done.stdout)


def grown(side: str) -> dict[str, int]:
    """Bytes by which the high-water mark rises, over everything and over forward and backward."""
    torch.set_num_threads(1)
    before = _held()
    learner, at = training(side)
    for _ in range(2):
        learner.backward(at)
        learner.apply(learner.gradient(), images_seen=0)
    whole = _peak() - before
    _forget_peak()
    before = _held()
    learner.backward(at)
    return {"the whole process": whole, "forward and backward": _peak() - before}


def _held() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else _status("VmRSS")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else _status("VmHWM")


def _forget_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(name))
    return 1024 * int(line.split()[1])


def show_memory() -> None:
    """Measure peaks and print them."""
    found = {side: peaks(side) for side in SIDES}
    for counted, base in found["implicit"].items():
        print(f"peak memory of {counted}:")
        for side in SIDES:
            peak = found[side][counted]
            print(f"{side:32} {peak / 2**20:9.0f} MiB       x {peak / base:.3f}")


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    sides = {side: stepper(side) for side in SIDES}
    if shutil.which("c++") or shutil.which("g++"):
        for side in ("implicit", "directional"):
            on_gpu = DEVICE.type == "cuda"
            name = f"{side}, compiled" + (", fused" if on_gpu else "")
            sides[name] = stepper(side, compiled=True, fused=on_gpu)
    show(alternate(sides, rounds=ROUNDS), base="implicit")
    show_memory()


if __name__ == "__main__":
    main()
