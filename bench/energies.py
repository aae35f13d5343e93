"""What training an explicit energy costs beside an implicit step: S/2, 256 tokens, whole updates.

"double" is the released way: a double backward through math attention. "directional" needs first
derivatives alone. Time is of alternating updates in one process; peak memory is what weights,
moments, averages and two updates add to a fresh process of their own (the high-water mark of its
resident set). ``compiled`` sides are shown
where a C++ compiler is at hand.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable

import torch

from bench.timing import alternate, show
from eqm.config import NetworkConfig, ObjectiveConfig, TrainConfig
from eqm.learner import Learner
from eqm.network import Transformer

BATCH, ROUNDS = 4, 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def stepper(side: str, *, compiled: bool = False) -> Callable[[], None]:
    """One update, as a function."""
    way = "double" if side == "implicit" else side
    energy = "implicit" if side == "implicit" else "dot"
    objective = ObjectiveConfig(energy=energy, backward=way)  # type: ignore[arg-type]
    net = network()
    learner = Learner(net, objective, TrainConfig(batch_size=BATCH), device=DEVICE)
    if compiled:
        learner.field.network = torch.compile(net)
    # Noise in the place of latents.
    x = torch.randn(BATCH, 4, 32, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    numbers = torch.arange(BATCH, device=DEVICE)

    def step() -> None:
        learner.backward(learner.corrupted(x, numbers, numbers))
        learner.apply(learner.gradient(), images_seen=0)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return step


def peak_bytes(side: str) -> int:
    """Peak of a process of its own."""
    code = f"from bench.energies import grown; print(grown({side!r}))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def grown(side: str) -> int:
    """Bytes by which the high-water mark rises over building a learner and two updates."""
    torch.set_num_threads(1)
    before = 0 if DEVICE.type == "cuda" else _status("VmRSS")
    step = stepper(side)
    step()
    step()
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(name))
    return 1024 * int(line.split()[1])


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    sides = {side: stepper(side) for side in SIDES}
    if shutil.which("c++") or shutil.which("g++"):
        for side in ("implicit", "directional"):
            sides[f"{side}, compiled"] = stepper(side, compiled=True)
    show(alternate(sides, rounds=ROUNDS), base="implicit")
    peaks = {side: peak_bytes(side) for side in SIDES}
    for side, peak in peaks.items():
        print(f"{side:32} {peak / 2**20:9.0f} MiB peak  x {peak / peaks['implicit']:.3f}")


if __name__ == "__main__":
    main()
