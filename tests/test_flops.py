"""Arithmetic is counted as torch counts it on the real network, and as the field's formula does."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from eqm.config import NetworkConfig, ObjectiveConfig, TrainConfig, replace
from eqm.flops import figures, forward_flops, peak_flops, training_flops
from eqm.learner import Learner
from eqm.network import Transformer

CPU = torch.device("cpu")
PLAIN = NetworkConfig(width=64, depth=2, heads=2)
BATCH, SIDE, CHANNELS = 2, 16, 4
TOKENS = (SIDE // 2) ** 2
GIGA = 1e9


def network(config):
    net = Transformer(config, size=SIDE, channels=CHANNELS, classes=10)
    net.initialise(0, zero_head=False)
    return net


class Counter(TorchDispatchMode):
    """What torch counts; its own FlopCounterMode fails where a slope in x alone is taken."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.total += 0 if count is None else count(*args, **(kwargs or {}), out_val=out)
        return out


def counted(run):
    """FLOPs of products written out: torch does not know every fused kernel."""
    with sdpa_kernel(SDPBackend.MATH), Counter() as counter:
        run()
    return counter.total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"time": "conditioned"},
        {"second_head": True, "patch": 4},
        {"swiglu": True, "mlp_ratio": 3.0},
        {"qk_norm": True, "rope": True, "rms_norm": True},
    ],
)
def test_a_forward_is_counted_as_torch_counts_it(changes):
    config = replace(PLAIN, **changes)
    net, x = network(config), torch.randn(BATCH, CHANNELS, SIDE, SIDE)
    gamma = torch.rand(BATCH) if config.time == "conditioned" else None
    found = counted(lambda: net(x, torch.arange(BATCH), gamma))
    tokens = (SIDE // config.patch) ** 2
    assert BATCH * forward_flops(config, tokens=tokens, channels=CHANNELS) == found


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(),
        ObjectiveConfig(energy="dot"),
        ObjectiveConfig(energy="l2", backward="double"),
    ],
)
def test_an_update_is_counted_as_torch_counts_it(objective):
    train = TrainConfig(batch_size=BATCH)
    learner = Learner(network(PLAIN), objective, train, device=CPU)
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE)
    at = learner.corrupted(x, torch.arange(BATCH), torch.arange(BATCH))
    found = counted(lambda: learner.backward(at))
    told = training_flops(PLAIN, objective, tokens=TOKENS, channels=CHANNELS)
    assert told is not None
    # The slopes of an implicit field in the latents are not needed, and torch does not take them.
    assert BATCH * told == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize(("size", "expected"), [("XL", 118.6), ("B", 23.0)])
def test_sizes_of_the_paper_are_those_of_the_formula(size, expected):
    found = forward_flops(NetworkConfig.size(size, patch=2), tokens=256, channels=4)
    assert found / 2 / GIGA == pytest.approx(expected, rel=0.01)


def test_a_unet_is_not_counted():
    unet = NetworkConfig(kind="unet")
    assert training_flops(unet, ObjectiveConfig(), tokens=64, channels=1) is None
    assert figures(10.0, None, devices=1, peak=1e12) == {}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA H800 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA H20", None),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_devices_are_known_by_name(name, expected):
    assert peak_flops(name) == expected


def test_shares_are_of_all_devices():
    assert figures(100.0, 1e12, devices=2, peak=100e12) == {"tflops_per_second": 100.0, "mfu": 0.5}
    assert figures(100.0, 1e12, devices=2, peak=None) == {"tflops_per_second": 100.0}
