"""Our kernels are the plain formulas: run by Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eqm.compute import prepare
from eqm.config import ComputeConfig, NetworkConfig, ObjectiveConfig
from eqm.errors import ConfigError
from eqm.network import Block, Transformer, layer_norm, modulate

ROOT = Path(__file__).parent.parent
WIDTHS = [(5, 24), (33, 40)]
"""Tokens and channels: neither a power of two, and one walk and several."""


def test_they_are_the_plain_formulas() -> None:
    """All cases in one process: the interpreter is chosen before Triton is loaded."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok") == 2 * len(WIDTHS) + 2


def network(**changes: object) -> Transformer:
    config = NetworkConfig(width=24, depth=1, heads=2, patch=2, **changes)  # type: ignore[arg-type]
    return Transformer(config, size=8, channels=4, classes=3)


@pytest.mark.parametrize(
    ("device", "changes", "objective", "said"),
    [
        ("cpu", {}, ObjectiveConfig(), "compute.fused is True; .*GPUs of NVIDIA"),
        ("cuda", {"rms_norm": True}, ObjectiveConfig(), "with network.rms_norm"),
        (
            "cuda",
            {},
            ObjectiveConfig(energy="dot", backward="double"),
            "compute.fused is true, but these kernels have no double backward",
        ),
    ],
)
def test_what_they_are_not_for_is_refused(
    device: str, changes: dict[str, object], objective: ObjectiveConfig, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        prepare(network(**changes), ComputeConfig(fused=True), objective, torch.device(device))


# -- in the process that interprets -------------------------------------------------------------


def check_formulas(tokens: int, width: int) -> None:
    """Against autograd through the formulas, in float64; with a branch and without."""
    from eqm.kernels import adaln

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    x, y, parts = draw(2, tokens, width), draw(2, tokens, width), draw(2, 6 * width)
    slopes = draw(2, tokens, width), draw(2, tokens, width)

    def plain(*given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        x, y, gate, shift, scale = (None if t is None else t.double() for t in given)
        assert x is not None and shift is not None and scale is not None  # noqa: PT018
        sums = x if y is None or gate is None else x + gate.unsqueeze(1) * y
        return sums, modulate(layer_norm(sums), shift.unsqueeze(1), scale.unsqueeze(1))

    for gated in (True, False):
        leaves = (x, y, parts) if gated else (x, parts)
        found = []
        for way in (adaln, plain):
            pieces = parts.chunk(6, dim=-1)
            sums, h = way(x, y if gated else None, pieces[2] if gated else None, *pieces[3:5])
            total = (sums * slopes[0]).sum() + (h * slopes[1]).sum()
            found.append([sums, h, *torch.autograd.grad(total, leaves)])
        for ours, theirs in zip(*found, strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-6
        print("ok")  # noqa: T201


def check_block(compiled: bool) -> None:
    """A whole block, and what torch.compile makes of it."""
    from eqm.kernels import block_forward

    net = network()
    net.initialise(0, zero_head=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in net.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    block = net.blocks[0]
    tokens = torch.randn(2, 16, 24, generator=generator, requires_grad=True)
    condition = torch.randn(2, 24, generator=generator)
    fused = torch.compile(block_forward, backend="aot_eager", fullgraph=True)
    found = []
    for way in (Block.forward, fused if compiled else block_forward):
        out = way(block, tokens, condition)
        found.append([out, *torch.autograd.grad(out.square().sum(), [tokens, *block.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    print("ok")  # noqa: T201


if __name__ == "__main__":
    for tokens, width in WIDTHS:
        check_formulas(tokens, width)
    check_block(compiled=False)
    check_block(compiled=True)
