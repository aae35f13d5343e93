"""GELU's backward, and the gradient of the bias before it, in one pass over memory.

a = gelu(u) in its tanh form, u (..., E) a product with its bias.
"""

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

ROWS, COLUMNS, STEPS, WARPS = 16, 128, 8, 4
"""Of u that one program holds at once, how many times it goes on down, and its warps."""


@triton.jit
def _backward_kernel(
    da_at, u_at, du_at, sums_at, rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """da, u (rows, width) -> du, and its sums over ROWS * STEPS rows."""
    walk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for step in range(STEPS):
        row = (walk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        here = row[:, None] * width + column[None, :]
        u = tl.load(u_at + here, mask=inside, other=0.0).to(tl.float32)
        da = tl.load(da_at + here, mask=inside, other=0.0).to(tl.float32)
        # (1 + tanh(z)) / 2 is sigmoid(2 z), of z = sqrt(2 / pi) (u + 0.044715 u**3).
        share = tl.sigmoid(1.5957691216057308 * u * (1 + 0.044715 * u * u))
        slope = 1.5957691216057308 * (1 + 0.134145 * u * u)
        du = da * share * (1 + u * slope * (1 - share))
        total += du
        tl.store(du_at + here, du.to(du_at.dtype.element_ty), mask=inside)
    tl.store(sums_at + walk * width + column, tl.sum(total, axis=0), mask=column < width)


@torch.library.custom_op("eqm::gelu_backward", mutates_args=())
def _backward(da: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of u (..., E), and its sums over some rows each, (walks, E): yet to be added."""
    du, sums = _backward_fake(da, u)
    width = u.shape[-1]
    cast(Any, _backward_kernel)[(len(sums), triton.cdiv(width, COLUMNS))](
        da, u, du, sums, u.numel() // width, width,
        ROWS=ROWS, COLUMNS=COLUMNS, STEPS=STEPS, num_warps=WARPS,
    )  # fmt: skip
    return du, sums


@_backward.register_fake
def _backward_fake(da: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    width = u.shape[-1]
    walks = -(-u.numel() // (width * ROWS * STEPS))
    return torch.empty_like(u), u.new_empty(walks, width, dtype=torch.float32)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, bias: Tensor) -> Tensor:
        u = u.contiguous()
        ctx.save_for_backward(u)
        ctx.dtype = bias.dtype
        return functional.gelu(u, approximate="tanh")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor, Tensor]:
        (u,) = ctx.saved_tensors
        du, sums = _backward(da.contiguous(), u)
        return du, sums.sum(dim=0).to(ctx.dtype)


@torch.compiler.allow_in_graph
def gelu(u: Tensor, bias: Tensor) -> Tensor:
    """GELU of u (..., E), which already has its bias (E,): that is here for its gradient alone."""
    return cast(Tensor, _GELU.apply(u, bias))
