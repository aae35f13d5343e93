"""Products and attention in float16 on a CPU (eqm.kernels.halves), beside torch's in float32.

Of S/2 at 256 tokens, batch 16: 4,096 rows, six heads of 64. Calls alternate, each on matrices of
its own, which are in no cache; the median of ROUNDS. How wrong each is against float64, of normal
numbers, and of such with a mean of 1: relative error of the whole matrix. bfloat16 is torch's, as
autocast takes it.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from eqm.kernels.halves import _product, attention, check_machine
from eqm.memory import keep_freed

TOKENS, BATCH, HEADS, HEAD = 256, 16, 6, 64
LAYERS = {"qkv": (384, 1152), "out": (384, 384), "up": (384, 1536), "down": (1536, 384)}
ROUNDS, SETS = 15, 5

Call = Callable[..., object]


def seconds(calls: dict[str, Call], given: Sequence[Sequence[Tensor]]) -> dict[str, float]:
    """Median of each call; given are the arguments, one set after the other."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    turn = 0
    for number in range(ROUNDS + 1):
        for name, call in calls.items():
            turn += 1
            began = time.perf_counter()
            call(*given[turn % len(given)])
            if number:
                found[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in found.items()}


def wrong(found: Tensor, exact: Tensor) -> float:
    """Relative error of a matrix."""
    return float((found.double() - exact).norm() / exact.norm())


def errors(ours: Call, plain: Call, given: Sequence[Tensor]) -> str:
    """How wrong ours is, and torch's in bfloat16."""
    exact = plain(*(x.double() for x in given))
    half = plain(*(x.bfloat16() for x in given))
    assert isinstance(exact, Tensor)
    assert isinstance(half, Tensor)
    mine = ours(*given)
    assert isinstance(mine, Tensor)
    return f"{wrong(mine, exact):.1e} (bfloat16 {wrong(half, exact):.1e})"


def products() -> dict[str, float]:
    """Print a line for each product of a block; seconds of all, by side."""
    rows, total = TOKENS * BATCH, {"float32": 0.0, "float16": 0.0}
    most = torch.tensor(6.0)
    for name, (inner, outer) in LAYERS.items():
        x, dy = (torch.randn(SETS, rows, n) for n in (inner, outer))
        w = torch.randn(SETS, outer, inner)
        for kind, pairs, known in (
            ("y = x W^T", [(x[i], w[i].t()) for i in range(SETS)], (None, None)),
            ("dx = dy W", [(dy[i], w[i]) for i in range(SETS)], (None, None)),
            ("dW = dy^T x", [(dy[i].t(), x[i]) for i in range(SETS)], (most, most)),
        ):

            def ours(a: Tensor, b: Tensor, known: tuple[Tensor | None, ...] = known) -> Tensor:
                return _product(a, b, None, *known)[0]

            took = seconds({"float32": torch.mm, "float16": ours}, pairs)
            rates = {side: 2e-9 * rows * inner * outer / took[side] for side in took}
            a, b = pairs[0]
            print(
                f"{name:5} {kind:12} float32 {rates['float32']:5.0f} GFLOP/s, float16 "
                f"{rates['float16']:5.0f}  x {took['float32'] / took['float16']:.2f}; wrong by "
                f"{errors(ours, torch.mm, (a, b))}, of mean 1 "
                f"{errors(ours, torch.mm, (a + 1, b + 1))}",
                flush=True,
            )
            for side in total:
                total[side] += took[side]
    return total


def plain_attention(qkv: Tensor) -> Tensor:
    """torch's, of qkv (B, N, 3 * D)."""
    q, k, v = qkv.unflatten(2, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def our_attention(qkv: Tensor) -> Tensor:
    """Ours."""
    return attention(qkv, HEADS)


def gradient(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Forward and back: the gradient of qkv, for one of what comes out."""

    def both(qkv: Tensor, grad: Tensor) -> Tensor:
        given = qkv.detach().requires_grad_()
        return torch.autograd.grad(function(given), given, grad)[0]

    return both


def main() -> None:
    """Measure and print."""
    check_machine()
    keep_freed()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    total = products()
    print(f"all products of a block  x {total['float32'] / total['float16']:.2f}")
    width = HEADS * HEAD
    qkv = torch.randn(SETS, BATCH, TOKENS, 3 * width)
    grads = torch.randn(SETS, BATCH, TOKENS, width)
    both = {"float32": gradient(plain_attention), "float16": gradient(our_attention)}
    took = seconds(both, [(qkv[i], grads[i]) for i in range(SETS)])
    print(
        f"attention, forward and back: float32 {took['float32'] * 1e3:.1f} ms, float16 "
        f"{took['float16'] * 1e3:.1f}  x {took['float32'] / took['float16']:.2f}; wrong by "
        f"{errors(our_attention, plain_attention, (qkv[0],))}, gradient "
        f"{errors(both['float16'], both['float32'], (qkv[0], grads[0]))}"
    )
    for scale in (2, 4):
        print(
            f"  scores {scale * scale} times as large: "
            f"{errors(our_attention, plain_attention, (scale * qkv[0],))}, gradient "
            f"{errors(both['float16'], both['float32'], (scale * qkv[0], grads[0]))}"
        )


if __name__ == "__main__":
    main()
