"""Norm, modulation, gate and residual of a transformer's block in one pass over memory.

Compiled from the plain formulas, the backward of adaLN reads its inputs twice: once for the sums
over a token's channels, and once for those over an image's tokens, which are the gradients of
shift, scale and gate, and of the bias of the product y. Here a program walks through some tokens of
one image and does both. Sums over tokens are kept for each walk and added afterwards.

    x'  = x + gate y                       y a branch's output; without one, x' = x
    h   = norm(x') (1 + scale) + shift     norm without weights, over D

    B  batch      N  tokens      D  width
"""

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from eqm.network import NORM_EPS

WALK = 32
"""Tokens that one program of the backward walks through."""
WARPS = 2
"""Of 2, 4 and 8, and walks of 8, 16 and 32, the quickest on an H100 at D = 1152."""


@triton.jit
def _forward_kernel(
    x_at, y_at, gate_at, shift_at, scale_at, sum_at, h_at, mean_at, rstd_at,
    tokens, gate_row, shift_row, scale_row, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One token: x (B N, D) -> x' and h; rows of gate, shift and scale lie so far apart."""
    token = tl.program_id(0).to(tl.int64)
    image = token // tokens
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    here = token * WIDTH + column
    x = tl.load(x_at + here, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        y = tl.load(y_at + here, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_at + image * gate_row + column, mask=inside, other=0.0).to(tl.float32)
        x += gate * y
        tl.store(sum_at + here, x.to(sum_at.dtype.element_ty), mask=inside)
    mean = tl.sum(x, axis=0) / WIDTH
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / WIDTH + eps)
    shift = tl.load(shift_at + image * shift_row + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_at + image * scale_row + column, mask=inside, other=0.0).to(tl.float32)
    h = centred * rstd * (1 + scale) + shift
    tl.store(h_at + here, h.to(h_at.dtype.element_ty), mask=inside)
    tl.store(mean_at + token, mean)
    tl.store(rstd_at + token, rstd)


@triton.jit
def _backward_kernel(
    dh_at, dsum_at, sum_at, y_at, gate_at, scale_at, mean_at, rstd_at,
    dx_at, dy_at, dshift_at, dscale_at, dgate_at, dbias_at,
    tokens, gate_row, scale_row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """WALK tokens of an image: gradients of h and x' -> those of x and y, and sums over tokens."""
    walk, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    scale = tl.load(scale_at + image * scale_row + column, mask=inside, other=0.0)
    slope = 1 + scale.to(tl.float32)
    dshift = tl.zeros([BLOCK], dtype=tl.float32)
    dscale = tl.zeros([BLOCK], dtype=tl.float32)
    dgate = tl.zeros([BLOCK], dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    if GATED:
        gate = tl.load(gate_at + image * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    for step in range(WALK):
        number = walk * WALK + step
        if number < tokens:
            token = image * tokens + number
            here = token * WIDTH + column
            dh = tl.load(dh_at + here, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(sum_at + here, mask=inside, other=0.0).to(tl.float32)
            dx = tl.load(dsum_at + here, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_at + token)
            unit = tl.where(inside, (x - tl.load(mean_at + token)) * rstd, 0.0)
            dshift += dh
            dscale += dh * unit
            g = dh * slope
            along = tl.sum(g * unit, axis=0) / WIDTH
            dx += (g - tl.sum(g, axis=0) / WIDTH - unit * along) * rstd
            tl.store(dx_at + here, dx.to(dx_at.dtype.element_ty), mask=inside)
            if GATED:
                y = tl.load(y_at + here, mask=inside, other=0.0).to(tl.float32)
                dgate += dx * y
                total += dx
                tl.store(dy_at + here, (dx * gate).to(dy_at.dtype.element_ty), mask=inside)
    kept = (image * tl.num_programs(0) + walk) * WIDTH + column
    tl.store(dshift_at + kept, dshift, mask=inside)
    tl.store(dscale_at + kept, dscale, mask=inside)
    if GATED:
        tl.store(dgate_at + kept, dgate, mask=inside)
        tl.store(dbias_at + kept, total * gate, mask=inside)


# Opaque to torch.compile, which calls them where they stand.


@torch.library.custom_op("eqm::adaln", mutates_args=())
def _forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x', h, and what the norm was by: mean and 1 / standard deviation, (B N,). No x' without y."""
    batch, tokens, width = x.shape
    gated = y is not None and gate is not None
    sums, h, mean, rstd = _forward_fake(x, y, gate, shift, scale)
    cast(Any, _forward_kernel)[(batch * tokens,)](
        x, y if gated else x, gate if gated else shift, shift, scale, sums, h, mean, rstd,
        tokens, _row(gate), _row(shift), _row(scale), NORM_EPS,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), GATED=gated, num_warps=WARPS,
    )  # fmt: skip
    return sums, h, mean, rstd


@_forward.register_fake
def _forward_fake(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = x.shape[0] * x.shape[1]
    return (
        x.new_empty(0 if y is None else x.shape),
        x.new_empty(x.shape, dtype=shift.dtype),
        x.new_empty(count, dtype=torch.float32),
        x.new_empty(count, dtype=torch.float32),
    )


@torch.library.custom_op("eqm::adaln_backward", mutates_args=())
def _backward(
    dh: Tensor,
    dsums: Tensor,
    sums: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (B, N, D) and y; of shift, scale, gate and bias (B, walks, D), to be added."""
    batch, tokens, width = sums.shape
    gated = y is not None and gate is not None
    found = _backward_fake(dh, dsums, sums, y, gate, scale, mean, rstd)
    cast(Any, _backward_kernel)[(found[2].shape[1], batch)](
        dh, dsums, sums, y if gated else sums, gate if gated else scale, scale, mean, rstd,
        *found, tokens, _row(gate), _row(scale),
        WIDTH=width, BLOCK=triton.next_power_of_2(width), GATED=gated, WALK=WALK, num_warps=WARPS,
    )  # fmt: skip
    return found


@_backward.register_fake
def _backward_fake(
    dh: Tensor,
    dsums: Tensor,
    sums: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, width = sums.shape
    walks = batch, -(-tokens // WALK), width
    return (
        torch.empty_like(sums),
        sums.new_empty(0) if y is None else torch.empty_like(y),
        sums.new_empty(walks, dtype=torch.float32),
        sums.new_empty(walks, dtype=torch.float32),
        sums.new_empty((0,) if y is None else walks, dtype=torch.float32),
        sums.new_empty((0,) if y is None else walks, dtype=torch.float32),
    )


def _row(part: Tensor | None) -> int:
    """How far its rows lie apart; what has no such rows would be read wrongly."""
    if part is None:
        return 0
    assert part.stride(1) == 1, "columns of gate, shift and scale lie side by side"
    return part.stride(0)


class _AdaLN(torch.autograd.Function):
    """(x, y, bias, gate, shift, scale) -> (x', h); y, bias and gate None for a norm alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        bias: Tensor | None,
        gate: Tensor | None,
        shift: Tensor,
        scale: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x, y = x.contiguous(), None if y is None else y.contiguous()
        sums, h, mean, rstd = _forward(x, y, gate, shift, scale)
        # x itself without a branch: gradients of both its uses are then added where it is read.
        sums = x if y is None else sums
        ctx.save_for_backward(sums, y, gate, scale, mean, rstd)
        ctx.dtype = None if bias is None else bias.dtype
        return sums, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsums: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        sums, y, gate, scale, mean, rstd = ctx.saved_tensors
        dx, dy, dshift, dscale, dgate, dbias = _backward(
            dh.contiguous(), dsums.contiguous(), sums, y, gate, scale, mean, rstd
        )
        dshift, dscale = (d.sum(dim=1).to(scale.dtype) for d in (dshift, dscale))
        if y is None:
            return dx, None, None, None, dshift, dscale
        dgate = dgate.sum(dim=1).to(scale.dtype)
        return dx, dy, dbias.sum(dim=(0, 1)).to(ctx.dtype), dgate, dshift, dscale


@torch.compiler.allow_in_graph
def adaln(
    x: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """(x', h) of tokens x and y (B, N, D), and gate, shift and scale (B, D), in whose dtype h is.

    The last three may be columns of a wider tensor. y already has its bias (D,), which is here for
    its gradient alone. Without y, bias and gate, x' is x: whoever goes on with it in place of x has
    its gradients added in the same pass.
    """
    return cast(tuple[Tensor, Tensor], _AdaLN.apply(x, y, bias, gate, shift, scale))
