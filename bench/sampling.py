"""What descent costs beside the bare network calls that it makes: S/2 on 32 x 32 latents."""

import torch

from bench.timing import alternate, show
from eqm.config import NetworkConfig
from eqm.field import Field, guided
from eqm.network import Transformer
from eqm.rules import NAG
from eqm.sampler import descend, start_noise

BATCH, UPDATES = 16, 3


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    config = NetworkConfig.size("S", patch=2)
    network = Transformer(config, size=32, channels=4, classes=1000).eval()
    start = start_noise(
        torch.arange(BATCH), (4, 32, 32), dtype=torch.float32, device=torch.device("cpu")
    )
    labels = torch.arange(BATCH)
    gradient = guided(Field(network), labels, scale=1.0)

    def bare() -> None:
        with torch.no_grad():
            for _ in range(UPDATES):
                network(start, labels)

    def descent() -> None:
        descend(gradient, start, rule=NAG(step_size=0.003, momentum=0.3), updates=UPDATES)

    sides = {"bare network calls": bare, "NAG descent": descent}
    show(alternate(sides, rounds=7), base="bare network calls", unit="s")
