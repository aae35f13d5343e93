"""What descent costs beside the bare network calls that it makes: S/2 on 32 x 32 latents.

Then what it costs in the precisions that a sampler may have.
"""

import functools

import torch

from bench.energies import DEVICE
from bench.timing import alternate, show
from eqm.config import NetworkConfig
from eqm.field import Field, guided
from eqm.network import Transformer
from eqm.precision import products_in
from eqm.rules import NAG
from eqm.sampler import descend, start_noise

BATCH, UPDATES = (256, 20) if DEVICE.type == "cuda" else (16, 3)
PRECISIONS = ("float32", "tf32", "bfloat16") if DEVICE.type == "cuda" else ("float32", "bfloat16")


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    config = NetworkConfig.size("S", patch=2)
    network = Transformer(config, size=32, channels=4, classes=1000).eval().to(DEVICE)
    start = start_noise(torch.arange(BATCH), (4, 32, 32), dtype=torch.float32, device=DEVICE)
    labels = torch.arange(BATCH, device=DEVICE)
    gradient = guided(Field(network), labels, scale=1.0)

    def wait() -> None:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def bare() -> None:
        with torch.no_grad():
            for _ in range(UPDATES):
                network(start, labels)
        wait()

    def descent() -> None:
        descend(gradient, start, rule=NAG(step_size=0.003, momentum=0.3), updates=UPDATES)
        wait()

    def within(precision: str) -> None:
        with products_in(precision, DEVICE):
            descent()

    sides = {"bare network calls": bare, "NAG descent": descent}
    show(alternate(sides, rounds=7), base="bare network calls", unit="s")
    chosen = {f"in {name}": functools.partial(within, name) for name in PRECISIONS}
    show(alternate(chosen, rounds=7), base="in float32", unit="s")


if __name__ == "__main__":
    main()
