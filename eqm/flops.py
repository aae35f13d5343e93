"""How much arithmetic a training image is, and what share of a machine's that is. Pure.

FLOPs are those of matrix products and attention, 2 a multiply-add; norms and activations count
nothing, as is the custom. They are of the work that the method asks for: what activation
checkpointing computes again does not count, so that it cannot make a machine look busier. A network
of N tokens, D wide and L deep has about 12 D^2 L N + 2 N^2 D L + 6 D^2 L multiply-adds: 119 G for
XL/2 at 256 tokens, which is the number that DiT's tables call Gflops.

Called by reporting and by bench.
"""

import re
from dataclasses import dataclass

from eqm.config import NetworkConfig, ObjectiveConfig

PEAKS_BFLOAT16: tuple[tuple[frozenset[str], float], ...] = (
    (frozenset({"B200"}), 2250e12),
    (frozenset({"GH200"}), 989e12),
    (frozenset({"H200", "NVL"}), 835e12),
    (frozenset({"H200"}), 989e12),
    (frozenset({"H100", "PCIe"}), 756e12),
    (frozenset({"H100", "NVL"}), 835e12),
    (frozenset({"H100"}), 989e12),
    (frozenset({"H800", "PCIe"}), 756e12),
    (frozenset({"H800"}), 989e12),
    (frozenset({"A100"}), 312e12),
    (frozenset({"A800"}), 312e12),
    (frozenset({"L40S"}), 362e12),
    (frozenset({"A10G"}), 70e12),
    (frozenset({"L4"}), 121e12),
)
"""Words of a device's name -> dense FLOP/s in bfloat16 as its data sheet has them; first fit."""

FREQUENCIES = 256
"""Inputs of a time embedder."""


@dataclass(frozen=True)
class Products:
    """Multiply-adds of one image in one forward, by how often training repeats them."""

    weights: float
    """With a matrix of weights, on tokens."""
    condition: float
    """With a matrix of weights, on the condition, which does not depend on the latents."""
    attention: float
    """Of activations with activations."""


def products(
    network: NetworkConfig, *, tokens: int, channels: int, conditioned: bool = False
) -> Products:
    """Multiply-adds of a transformer on ``tokens`` tokens of ``channels`` x patch x patch numbers.

    ``conditioned``: it embeds a noise level of each image.
    """
    d, depth, n = network.width, network.depth, tokens
    patch = channels * network.patch**2
    block = 4 * d**2 + _mlp(network)
    time = FREQUENCIES * d + d**2 if conditioned else 0
    return Products(
        weights=n * (depth * block + d * patch * (2 + network.second_head)),
        condition=6 * d**2 * depth + 2 * d**2 + time,
        attention=2 * n**2 * d * depth,
    )


def _mlp(network: NetworkConfig) -> int:
    d = network.width
    if network.swiglu:
        return 3 * d * int(d * network.mlp_ratio * 2 / 3)
    return 2 * d * int(d * network.mlp_ratio)


def forward_flops(network: NetworkConfig, *, tokens: int, channels: int) -> float:
    """FLOPs of one image in one forward of a transformer; see :func:`products`."""
    conditioned = network.time == "conditioned"
    p = products(network, tokens=tokens, channels=channels, conditioned=conditioned)
    return 2 * (p.weights + p.condition + p.attention)


def training_flops(
    network: NetworkConfig, objective: ObjectiveConfig, *, tokens: int, channels: int
) -> float | None:
    """FLOPs of one image in one update; None for a U-Net, whose arithmetic is not counted.

    A backward is two forwards. The slope of an energy in x is one forward and, of attention, two;
    the directional way takes it, then two forwards and backwards; the double way goes back through
    both.
    """
    if network.kind != "transformer":
        return None
    conditioned = network.time == "conditioned"
    p = products(network, tokens=tokens, channels=channels, conditioned=conditioned)
    if objective.energy == "implicit":
        times = 3, 3, 3
    elif objective.backward == "directional":
        times = 8, 7, 9
    else:
        times = 6, 3, 9
    weights, condition, attention = times
    return 2 * (weights * p.weights + condition * p.condition + attention * p.attention)


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its name, "NVIDIA H100 80GB HBM3"; None if unknown.

    None as well for a part of one, "... MIG 1g.10gb", whose name says nothing of its share.
    """
    words = frozenset(re.split(r"[^A-Za-z0-9]+", device_name))
    if "MIG" in words:
        return None
    return next((peak for known, peak in PEAKS_BFLOAT16 if known <= words), None)


def figures(
    images_per_second: float, flops_per_image: float | None, *, devices: int, peak: float | None
) -> dict[str, float]:
    """TFLOP/s of all devices and their share of the peaks, "mfu": as far as they are known.

    ``images_per_second`` is of all devices together. The share is of the bfloat16 peak whatever was
    computed in, so that runs compare.
    """
    if flops_per_image is None:
        return {}
    rate = images_per_second * flops_per_image
    share = {} if peak is None else {"mfu": rate / (devices * peak)}
    return {"tflops_per_second": rate / 1e12, **share}
