"""Errors of the directional way against a float64 double backward, on energies that have learnt.

Relative norm of the error of the gradient of all weights, and its cosine, by precision and by the
step of the central difference (in shares of the norm of x). docs/precision.md reads this.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from bench.digits import digits
from eqm.config import NetworkConfig, ObjectiveConfig, TrainConfig
from eqm.field import Energy, Field
from eqm.learner import Learner, learn
from eqm.network import Transformer
from eqm.objective import DIFFERENCE, Corrupted, Way, backward, directional_backward

STEPS = {
    torch.float64: (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    torch.float32: (1e-3, 2e-3, 5e-3, 1e-2, 3e-2, 1e-1, 3e-1),
}
TRAIN = TrainConfig(images=64 * 300, batch_size=64, gradient_clip=10.0)


def trained(energy: Energy) -> tuple[Transformer, Corrupted]:
    """A network whose energy has seen 19,200 digits, and 64 noisy digits to ask it about."""
    data, objective = digits(held_out=False), ObjectiveConfig(energy=energy)
    net = Transformer(NetworkConfig(), size=8, channels=1, classes=10)
    net.initialise(0, zero_head=False)
    learn(net, data.latents, data.labels, objective=objective, train=TRAIN)
    net.requires_grad_(True)
    learner = Learner(net, objective, TRAIN, device=torch.device("cpu"))
    return net, learner.corrupted(data.latents[:64], data.labels[:64], torch.arange(64))


def gradient(net: Transformer, run: Callable[[], object]) -> Tensor:
    """What a run adds to the weights' gradients, flat, float64."""
    net.zero_grad(set_to_none=True)
    run()
    return torch.cat([p.grad.flatten().double() for p in net.parameters() if p.grad is not None])


def show(name: str, found: Tensor, exact: Tensor) -> None:
    """Print one line."""
    error = float((found - exact).norm() / exact.norm())
    cosine = float(found @ exact / found.norm() / exact.norm())
    print(f"  {name:44} error {error:.1e}  1 - cosine {1 - cosine:.1e}")


def directional(net: Transformer, at: Corrupted, energy: Energy, step: float) -> Tensor:
    """Gradient by a central difference of a step."""
    field = Field(net, energy=energy)
    return gradient(net, lambda: directional_backward(field, at, scale=1 / 64, difference=step))


def by_way(net: Transformer, at: Corrupted, energy: Energy, way: Way) -> Tensor:
    """Gradient as training would have it."""
    field = Field(net, energy=energy)
    return gradient(net, lambda: backward(field, at, scale=1 / 64, way=way))


def measure(energy: Energy) -> None:
    """Train one energy and print its errors."""
    net, at = trained(energy)
    wide = copy.deepcopy(net).double()
    wide_at = Corrupted(at.x.double(), at.goal.double(), at.gamma.double(), at.labels)
    exact = by_way(wide, wide_at, energy, "double")
    for dtype, network, noisy in ((torch.float64, wide, wide_at), (torch.float32, net, at)):
        for step in STEPS[dtype]:
            mark = "  (default)" if step == DIFFERENCE[dtype] else ""
            name = f"{str(dtype)[6:]}, directional, step {step:.0e}{mark}"
            show(name, directional(network, noisy, energy, step), exact)
    for way in ("double", "directional"):
        show(f"float32, {way}", by_way(net, at, energy, way), exact)
        with torch.autocast("cpu", torch.bfloat16):
            show(f"bfloat16, {way}", by_way(net, at, energy, way), exact)


def main() -> None:
    """Both energies."""
    torch.set_num_threads(1)
    for energy in ("dot", "l2"):
        print(f"energy {energy}")
        measure(energy)


if __name__ == "__main__":
    main()
