"""Our kernels are the plain formulas: run by Triton's interpreter, in a process of its own."""

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from eqm.compute import check_attention, fuse, prepare
from eqm.config import ComputeConfig, NetworkConfig, ObjectiveConfig, TrainConfig, replace
from eqm.errors import ConfigError
from eqm.network import Transformer, layer_norm, modulate

ROOT = Path(__file__).parent.parent
IMPLICIT = ObjectiveConfig()
WIDTHS = [(5, 24), (33, 40), (5, 37), (3, 4), *((2, width) for width in (384, 768, 1024, 1152))]
"""Tokens and channels: one walk and several, rows that two powers of two fill and others."""
ATTENTIONS = [
    (21, 8, (16, 16), torch.float32, 0.0),
    (37, 24, (16, 32), torch.float32, 0.0),
    (64, 72, (32, 64), torch.float32, 0.0),
    (64, 72, (32, 64), torch.float16, 0.0),
    (70, 64, (64, 16), torch.float32, 0.0),
    (96, 16, (32, 64), torch.float32, -100.0),
]
"""Tokens, channels of a head, queries and keys at once, number type, and what all logits are moved
by: one tile and several, whole ones and not, of heads that are a power of two, more than one, and
less than a product takes; and logits of which exp(-logit) is no float32."""
SHARED_BYTES = 227 * 2**10
"""Of an H100, that one program can have."""
NETWORKS: list[tuple[bool, dict[str, object], dict[str, object]]] = [
    (False, {}, {"attends": True, "carries": True}),
    (True, {}, {"attends": True, "carries": True}),
    (False, {}, {"attends": False, "carries": False}),
    (False, {"swiglu": True, "rope": True}, {"attends": False, "carries": True}),
]
"""Whether it is compiled, what of the network differs, and how its blocks are asked for."""


def test_they_are_the_plain_formulas() -> None:
    """All cases in one process: the interpreter is chosen before Triton is loaded."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok") == 2 * len(WIDTHS) + len(ATTENTIONS) + 1 + len(NETWORKS) + 5


def network(**changes: object) -> Transformer:
    config = replace(NetworkConfig(width=24, depth=1, heads=2, patch=2), **changes)
    return Transformer(config, size=4, channels=4, classes=3)


@pytest.mark.parametrize(
    ("device", "changes", "objective", "said"),
    [
        ("cpu", {}, IMPLICIT, "compute.fused is True; .*GPUs of NVIDIA"),
        ("cuda", {"rms_norm": True}, IMPLICIT, "with network.rms_norm"),
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


def test_what_our_attention_is_not_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"attention is 'eqm'; .*where compute\.fused is"):
        ComputeConfig(attention="eqm")
    ours, half = ComputeConfig(fused=True, attention="eqm"), TrainConfig(precision="bfloat16")
    usual, wide = NetworkConfig(), NetworkConfig(width=272, heads=2)
    check_attention(ours, usual, half)
    check_attention(ComputeConfig(), usual, TrainConfig())
    for odd, said in ((replace(usual, rope=True), r"network\.qk_norm or"), (wide, "heads of 136")):
        with pytest.raises(ConfigError, match=f"'auto' or 'torch' with {said}"):
            check_attention(ours, odd, half)
        check_attention(replace(ours, attention="auto"), odd, half)
    with pytest.raises(ConfigError, match=r"train\.precision 'float32'"):
        check_attention(ours, usual, TrainConfig())


@pytest.mark.parametrize(
    ("attention", "changes", "objective", "ours"),
    [
        ("auto", {}, IMPLICIT, {"attends": True, "carries": True}),
        ("eqm", {}, IMPLICIT, {"attends": True, "carries": True}),
        ("torch", {}, IMPLICIT, {"attends": False, "carries": True}),
        ("auto", {"rope": True}, IMPLICIT, {"attends": False, "carries": True}),
        ("auto", {}, replace(IMPLICIT, dispersive_weight=0.5), {"attends": True, "carries": False}),
    ],
)
def test_all_of_a_network_goes_our_way(attention, changes, objective, ours) -> None:
    from eqm.kernels import blocks

    net = network(**changes)
    fuse(net, ComputeConfig(fused=True, attention=attention), objective)
    asked = {part.forward.__func__ for part in net.blocks}
    assert asked == {blocks.block_forward(**ours)}
    assert net.patches.forward.__func__ is blocks.patches_forward  # type: ignore[attr-defined]
    assert net.head.forward.__func__ is blocks.head_forward  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "head"), [(16, 72), (6, 64)], ids=["XL", "S"])
def test_an_h100_takes_them(heads: int, head: int) -> None:
    """What its compiler makes of them, which needs no GPU; a program's share of its memory."""
    from eqm.kernels import adaln, attention, gelu

    width = heads * head
    block = {**adaln._shapes(width), "GATED": True}
    qkv = torch.empty(1, 256, 3 * width, device="meta")
    parts = []
    for tiles in (attention.FORWARD, attention.TO_QUERIES, attention.TO_KEYS):
        shapes = attention._shapes(qkv, heads, tiles)
        parts.append(({n: v for n, v in shapes.items() if n.isupper()}, shapes["num_warps"]))
    tile = {"ROWS": gelu.ROWS, "COLUMNS": gelu.COLUMNS, "STEPS": gelu.STEPS}
    for kernel, constants, warps in (
        (adaln._forward_kernel, block, adaln.WARPS),
        (adaln._backward_kernel, {**block, "WALK": adaln.WALK}, adaln.WARPS),
        (adaln._sums_kernel, {"PARTS": 4, "COLUMNS": adaln.COLUMNS, "GATED": True}, adaln.WARPS),
        (gelu._backward_kernel, tile, gelu.WARPS),
        (attention._forward_kernel, *parts[0]),
        (attention._to_queries_kernel, *parts[1]),
        (attention._to_keys_kernel, *parts[2]),
    ):
        found = built(kernel, constants, warps)
        assert found.metadata.shared <= SHARED_BYTES
        assert len(found.asm["cubin"])
        if kernel.fn.__module__ == adaln.__name__:
            # bfloat16 and float32 meet in the threads that loaded them.
            assert "convert_layout" not in found.asm["ttgir"]


def built(kernel: Any, constants: dict[str, int], warps: int) -> Any:
    """A kernel of training in bfloat16, for an H100."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    whole = {"sum_at", "mean_at", "rstd_at", "dsum_at", "dx_at", "x_at", "mass_at"}
    whole |= {
        "delta_at",
        "sums_at",
        "dshift_at",
        "dscale_at",
        "dgate_at",
        "dbias_at",
        "walks_at",
        "bias_at",
    }
    names = [n for n in kernel.arg_names if n not in constants]
    kinds = {n: "*fp32" if n in whole else "*bf16" for n in names if n.endswith("_at")}
    floats = dict.fromkeys({"eps", "slope", "scale"} & set(names), "fp32")
    signature = {n: {**kinds, **floats}.get(n, "i32") for n in names}
    # Which a GPU's memory begins with, and rows of these widths too.
    aligned = {
        (kernel.arg_names.index(n),): [["tt.divisibility", 16]]
        for n in names
        if n.endswith(("_at", "_row"))
    }
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


# -- in the process that interprets -------------------------------------------------------------


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).requires_grad_()


def near(found: Sequence[Tensor], wanted: Sequence[Tensor], bound: float) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert float((ours.detach() - theirs).norm() / theirs.detach().norm()) < bound
    print("ok")  # noqa: T201


def check_adaln(tokens: int, width: int) -> None:
    """Against autograd through the formulas, in float64; with a branch and without."""
    from eqm.kernels.adaln import adaln

    x, y, bias = draw(2, tokens, width), draw(2, tokens, width, seed=1), draw(width, seed=2)
    parts, slopes = draw(2, 6 * width, seed=3), draw(2, 2, tokens, width, seed=4)

    def plain(*given: Tensor | None) -> tuple[Tensor, Tensor]:
        x, y, bias, gate, shift, scale = (None if t is None else t.double() for t in given)
        assert x is not None and shift is not None and scale is not None  # noqa: PT018
        if y is not None and bias is not None and gate is not None:
            x = x + gate.unsqueeze(1) * (y + bias - bias.detach())
        return x, modulate(layer_norm(x), shift.unsqueeze(1), scale.unsqueeze(1))

    for gated in (True, False):
        leaves = (x, y, bias, parts) if gated else (x, parts)
        found = []
        for way in (adaln, plain):
            pieces = parts.chunk(6, dim=-1)
            branch = (y, bias, pieces[2]) if gated else (None, None, None)
            sums, h = way(x, *branch, *pieces[3:5])
            total = (sums * slopes[0]).sum() + (h * slopes[1]).sum()
            found.append([sums, h, *torch.autograd.grad(total, leaves)])
        near(*found, 1e-6)


def check_mixing(
    tokens: int, head: int, tiles: tuple[int, int], dtype: torch.dtype, offset: float
) -> None:
    """Against autograd through the formula in float64, of the same numbers; two heads."""
    from eqm.kernels import attention as kernels

    kernels.FORWARD = kernels.TO_QUERIES = kernels.Tiles(*tiles, 1, 1)
    kernels.TO_KEYS = kernels.Tiles(*reversed(tiles), 1, 1)
    qkv = draw(2, tokens, 6 * head).detach()
    if offset:
        # One channel of each head, of q and of k, gives it to all of a head's logits.
        each = qkv.view(2, tokens, 3, 2, head)
        each[:, :, 0, :, 0], each[:, :, 1, :, 0] = offset, head**0.5
    qkv = qkv.to(dtype).requires_grad_()
    bias, slope = draw(6 * head, seed=1), draw(2, tokens, 2 * head, seed=2).to(dtype).detach()

    def plain(qkv: Tensor, bias: Tensor, heads: int) -> Tensor:
        parts = (qkv + bias - bias.detach()).double().unflatten(2, (3, heads, head))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(2, 3) / head**0.5).softmax(dim=3) @ v
        return mixed.transpose(1, 2).flatten(2)

    found = []
    for way in (kernels.attention, plain):
        out = way(qkv, bias, 2)
        found.append([out, *torch.autograd.grad((out * slope.to(out.dtype)).sum(), (qkv, bias))])
    # What the last digit of a large logit is worth, exp makes a share of its weight.
    near(*found, (2e-6 if dtype == torch.float32 else 2e-3) * max(1.0, abs(offset) / 10))


def check_gelu(rows: int, width: int) -> None:
    """Against autograd in float64, also where tanh is 1 to the last bit."""
    from eqm.kernels.gelu import gelu

    u, bias, slope = 3 * draw(2, rows, width), draw(width, seed=1), draw(2, rows, width, seed=2)

    def plain(u: Tensor, bias: Tensor) -> Tensor:
        return functional.gelu((u + bias - bias.detach()).double(), approximate="tanh")

    found = []
    for way in (gelu, plain):
        a = way(u, bias)
        found.append([a, *torch.autograd.grad((a * slope).sum(), (u, bias))])
    near(*found, 1e-6)


def drawn(**changes: object) -> Transformer:
    """A network of two blocks whose weights are nowhere 0."""
    net = network(depth=2, **changes)
    net.initialise(0, zero_head=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in net.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return net


def fused(net: Transformer, *, compiled: bool = False, **asked: object) -> Transformer:
    from eqm.kernels.blocks import block_forward, head_forward, patches_forward

    forward = block_forward(**asked)  # type: ignore[arg-type]
    if compiled:
        forward = torch.compile(forward, backend="aot_eager", fullgraph=True)
    for block in net.blocks:
        block.forward = forward.__get__(block)  # type: ignore[attr-defined]
    net.patches.forward = patches_forward.__get__(net.patches)  # type: ignore[method-assign]
    net.head.forward = head_forward.__get__(net.head)  # type: ignore[attr-defined]
    return net


def gone_through(net: Transformer, *, half: bool = False) -> list[Tensor]:
    """Output, and gradients of input and weights."""
    x = draw(2, 4, 4, 4, seed=2)
    with torch.autocast("cpu", torch.float16, enabled=half):
        out = net(x, torch.tensor([0, 2]))
    return [out, *torch.autograd.grad(out.float().square().sum(), [x, *net.parameters()])]


def check_network(compiled: bool, changes: dict[str, object], asked: dict[str, object]) -> None:
    """A network of several blocks and a head, and what torch.compile makes of it."""
    from eqm.kernels import blocks

    usual, blocks.ATTENDED = blocks.ATTENDED, (torch.float32,)
    ours = fused(drawn(**changes), compiled=compiled, **asked)
    near(gone_through(ours), gone_through(drawn(**changes)), 1e-5)
    blocks.ATTENDED = usual


def check_sums() -> None:
    """Products that add to an update's sums: what autograd adds, and each weight is told of."""
    from eqm.gradients import FlatGradient

    def summed(*, adds: bool) -> tuple[Tensor, list[Tensor]]:
        net, taken = fused(drawn(), attends=False, carries=True), []
        gradient = FlatGradient(tuple(net.parameters()), room=1, segment_bytes=64)
        for number in range(2):
            x = draw(2, 4, 4, 4, seed=2 + number)
            with contextlib.ExitStack() as held:
                if adds:
                    held.enter_context(gradient.adding())
                if number:
                    held.enter_context(gradient.handing(lambda s: taken.append(s.clone())))
                net(x, torch.tensor([0, 2])).square().sum().backward()
                early = len(taken)
        assert early == len(taken), "segments wait for the backward's end"
        return gradient.collect().clone(), taken

    (ours, handed), (theirs, others) = (summed(adds=adds) for adds in (True, False))
    assert len(handed) == len(others) > 9
    near([ours, *handed], [theirs, *others], 1e-6)


def check_learner() -> None:
    """A learner lets products add, of blocks that are computed again too, and casts once."""
    from eqm.compute import _recomputed
    from eqm.gradients import Update
    from eqm.kernels import product
    from eqm.learner import Learner

    handed, usual, made = product._handed, Update.cast, []

    def gradient(*, again: bool, objective: ObjectiveConfig, half: bool) -> tuple[Tensor, int]:
        net = fused(drawn(), attends=False, carries=True)
        if again:
            for block in net.blocks:
                block.forward = functools.partial(_recomputed, block.forward)
        train = TrainConfig(batch_size=2, precision="bfloat16" if half else "float32")
        of = Learner(net, objective, train, device=torch.device("cpu"), micro_batch=1)
        of.backward(of.corrupted(draw(2, 4, 4, 4).detach(), torch.tensor([0, 2]), torch.arange(2)))
        return of.gradient().clone(), len(list(net.parameters()))

    directional = replace(IMPLICIT, energy="dot", backward="directional")
    for objective in (IMPLICIT, directional):
        found = []
        for again in (False, True):
            added: list[bool] = []
            product._handed = lambda *a, to=added: (d := handed(*a), to.append(d is None))[0]
            found.append(gradient(again=again, objective=objective, half=False)[0])
            # All but the patches' weight, of which a view goes in.
            assert added.count(False) * 11 == len(added)
        product._handed = lambda update, *rest: handed(None, *rest)
        found.append(gradient(again=False, objective=objective, half=False)[0])
        near(found[:2], [found[2]] * 2, 1e-6)
    product._handed = handed

    def counted(update: Update, weight: Tensor, dtype: torch.dtype) -> Tensor:
        made.append(usual(update, weight, dtype))
        return made[-1]

    Update.cast = counted  # type: ignore[method-assign]
    _, weights = gradient(again=True, objective=IMPLICIT, half=True)
    Update.cast = usual  # type: ignore[method-assign]
    distinct = {found.data_ptr() for found in made}
    assert len(made) > 2 * len(distinct)
    assert len(distinct) <= weights + 4, "a weight is cast for every part of its batch"
    print("ok")  # noqa: T201


def check_half() -> None:
    """Under autocast no farther from float32 than torch's own way. (bfloat16 the interpreter cuts
    off where a GPU rounds.)"""
    whole = gone_through(drawn())
    found = gone_through(drawn(), half=True)
    ours = gone_through(fused(drawn(), attends=True, carries=True), half=True)
    apart = [
        sum(float((a.float() - b).norm() / b.norm()) for a, b in zip(some, whole, strict=True))
        for some in (ours, found)
    ]
    assert 0 < apart[0] < apart[1]
    print("ok")  # noqa: T201


def main() -> None:
    for tokens, width in WIDTHS:
        check_adaln(tokens, width)
    for case in ATTENTIONS:
        check_mixing(*case)
    check_gelu(rows=70, width=260)
    for compiled, changes, asked in NETWORKS:
        check_network(compiled, changes, asked)
    check_sums()
    check_learner()
    check_half()


if __name__ == "__main__":
    main()
