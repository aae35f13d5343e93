"""Norm, modulation, gate and residual of a transformer's block in one pass over memory.

Compiled from the plain formulas, the backward of adaLN reads its inputs twice: once for the sums
over a token's channels, and once for those over an image's tokens, which are the gradients of
shift, scale and gate, and of the bias of the product y. Here a program walks through some tokens of
one image and does both. Sums over tokens are kept for each walk and added afterwards.

A row is taken in two parts, each as long as a power of two: of 1152 channels, 1024 and 128. As one
power of two it would be 2048, with threads that hold nothing, and a mask at every access.

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
"""Of 2, 4 and 8, and walks of 8, 16 and 32, the quickest on an H100 at D = 1152, when a row was one
power of two."""
COLUMNS = 128
"""Of which one program adds up the walks."""
TOGETHER = 4
"""Numbers that a thread takes at once, of any type: 16 bytes of float32. Of bfloat16 16 bytes would
be 8, and numbers would change threads, through shared memory, wherever both types meet."""
_TOGETHER = tl.constexpr(TOGETHER)


@triton.jit
def _columns(WIDE: tl.constexpr, REST: tl.constexpr):
    wide = tl.max_contiguous(tl.arange(0, WIDE), _TOGETHER)
    return wide, WIDE + tl.max_contiguous(tl.arange(0, REST), _TOGETHER)


@triton.jit
def _load(at, WIDTH: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr):
    """A row as float32, in two parts; zeros beyond its width."""
    column, further = _columns(WIDE, REST)  # pyright: ignore[reportGeneralTypeIssues]
    wide = tl.load(at + column)
    if WIDE + REST == WIDTH:
        rest = tl.load(at + further)
    else:
        rest = tl.load(at + further, mask=further < WIDTH, other=0.0)
    return wide.to(tl.float32), rest.to(tl.float32)


@triton.jit
def _store(at, wide, rest, WIDTH: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr):
    column, further = _columns(WIDE, REST)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(at + column, wide.to(at.dtype.element_ty))
    if WIDE + REST == WIDTH:
        tl.store(at + further, rest.to(at.dtype.element_ty))
    else:
        tl.store(at + further, rest.to(at.dtype.element_ty), mask=further < WIDTH)


@triton.jit
def _zeros(WIDE: tl.constexpr, REST: tl.constexpr):
    return tl.zeros([WIDE], dtype=tl.float32), tl.zeros([REST], dtype=tl.float32)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _means(a, b, a_rest, b_rest, WIDTH: tl.constexpr):
    """Of a and of b, each in two parts: threads wait for each other once for both."""
    a, b = tl.reduce((a, b), 0, _add_pairs)
    a_rest, b_rest = tl.reduce((a_rest, b_rest), 0, _add_pairs)
    return (a + a_rest) / WIDTH, (b + b_rest) / WIDTH


@triton.jit
def _forward_kernel(
    x_at, y_at, gate_at, shift_at, scale_at, sum_at, h_at, mean_at, rstd_at,
    tokens, gate_row, shift_row, scale_row, eps,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One token: x (B N, D) -> x' and h; rows of gate, shift and scale lie so far apart."""
    token = tl.program_id(0).to(tl.int64)
    image = token // tokens
    here = token * WIDTH
    x, x_rest = _load(x_at + here, WIDTH, WIDE, REST)  # pyright: ignore[reportGeneralTypeIssues]
    if GATED:
        y, y_rest = _load(y_at + here, WIDTH, WIDE, REST)
        gate, gate_rest = _load(gate_at + image * gate_row, WIDTH, WIDE, REST)
        x, x_rest = x + gate * y, x_rest + gate_rest * y_rest
        _store(sum_at + here, x, x_rest, WIDTH, WIDE, REST)
    scale, scale_rest = _load(scale_at + image * scale_row, WIDTH, WIDE, REST)
    shift, shift_rest = _load(shift_at + image * shift_row, WIDTH, WIDE, REST)
    mean = (tl.sum(x, axis=0) + tl.sum(x_rest, axis=0)) / WIDTH
    x, x_rest = x - mean, x_rest - mean
    if WIDE + REST != WIDTH:
        _, further = _columns(WIDE, REST)
        x_rest = tl.where(further < WIDTH, x_rest, 0.0)
    # Not in one pass with the mean: squares of numbers far from 0 lose what differs in them.
    variance = (tl.sum(x * x, axis=0) + tl.sum(x_rest * x_rest, axis=0)) / WIDTH
    rstd = 1 / tl.sqrt(variance + eps)
    h, h_rest = x * rstd * (1 + scale) + shift, x_rest * rstd * (1 + scale_rest) + shift_rest
    _store(h_at + here, h, h_rest, WIDTH, WIDE, REST)
    tl.store(mean_at + token, mean)
    tl.store(rstd_at + token, rstd)


@triton.jit
def _backward_kernel(
    dh_at, dsum_at, sum_at, y_at, gate_at, scale_at, mean_at, rstd_at,
    dx_at, dy_at, dshift_at, dscale_at, dgate_at, dbias_at,
    tokens, gate_row, scale_row,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    GATED: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """WALK tokens of an image: gradients of h and x' -> those of x and y, and sums over tokens.

    What is computed beyond the width, of zeros, is summed nowhere.
    """
    walk, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    scale, scale_rest = _load(scale_at + image * scale_row, WIDTH, WIDE, REST)  # pyright: ignore[reportGeneralTypeIssues]
    dshift, dshift_rest = _zeros(WIDE, REST)
    dscale, dscale_rest = _zeros(WIDE, REST)
    dgate, dgate_rest = _zeros(WIDE, REST)
    total, total_rest = _zeros(WIDE, REST)
    if GATED:
        gate, gate_rest = _load(gate_at + image * gate_row, WIDTH, WIDE, REST)
    first = walk * WALK
    for number in range(first, tl.minimum(first + WALK, tokens)):
        token = image * tokens + number
        here = token * WIDTH
        # All that is read of a token is asked for before anything waits.
        dh, dh_rest = _load(dh_at + here, WIDTH, WIDE, REST)
        x, x_rest = _load(sum_at + here, WIDTH, WIDE, REST)
        dx, dx_rest = _load(dsum_at + here, WIDTH, WIDE, REST)
        if GATED:
            y, y_rest = _load(y_at + here, WIDTH, WIDE, REST)
        mean, rstd = tl.load(mean_at + token), tl.load(rstd_at + token)
        unit, unit_rest = (x - mean) * rstd, (x_rest - mean) * rstd
        dshift, dshift_rest = dshift + dh, dshift_rest + dh_rest
        dscale, dscale_rest = dscale + dh * unit, dscale_rest + dh_rest * unit_rest
        g, g_rest = dh * (1 + scale), dh_rest * (1 + scale_rest)
        along, middle = _means(g * unit, g, g_rest * unit_rest, g_rest, WIDTH)
        dx += (g - middle - unit * along) * rstd
        dx_rest += (g_rest - middle - unit_rest * along) * rstd
        _store(dx_at + here, dx, dx_rest, WIDTH, WIDE, REST)
        if GATED:
            dgate, dgate_rest = dgate + dx * y, dgate_rest + dx_rest * y_rest
            total, total_rest = total + dx, total_rest + dx_rest
            _store(dy_at + here, dx * gate, dx_rest * gate_rest, WIDTH, WIDE, REST)
    kept = (image * tl.num_programs(0) + walk) * WIDTH
    _store(dshift_at + kept, dshift, dshift_rest, WIDTH, WIDE, REST)
    _store(dscale_at + kept, dscale, dscale_rest, WIDTH, WIDE, REST)
    if GATED:
        _store(dgate_at + kept, dgate, dgate_rest, WIDTH, WIDE, REST)
        _store(dbias_at + kept, total * gate, total_rest * gate_rest, WIDTH, WIDE, REST)


@triton.jit
def _sums_kernel(
    walks_at, parts_at, bias_at, walks, width,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Sums over an image's walks (PARTS, B, walks, D) -> shift's, scale's and gate's gradients.

    And, where there is a branch, the image's part of its bias's: the last of PARTS.
    """
    image, images = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    for part in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        here = walks_at + (part * images + image) * walks * width + column
        total = tl.zeros([COLUMNS], dtype=tl.float32)
        for walk in range(walks):
            total += tl.load(here + walk * width, mask=inside, other=0.0)
        if GATED and part == PARTS - 1:
            tl.store(bias_at + image * width + column, total, mask=inside)
        else:
            there = parts_at + (part * images + image) * width + column
            tl.store(there, total.to(parts_at.dtype.element_ty), mask=inside)


def _shapes(width: int) -> dict[str, int]:
    """What kernels are compiled for: a row's two parts, of which the second may be less than full.

    Both are as long as a power of two, and no shorter than what a thread takes at once.
    """
    assert width >= TOGETHER, "the first part of a row is full"
    wide = max(TOGETHER, 2 ** (width - 1).bit_length() // 2)
    rest = max(TOGETHER, 2 ** max(0, width - wide - 1).bit_length())
    return {"WIDTH": width, "WIDE": wide, "REST": rest}


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
        **_shapes(width), GATED=gated, num_warps=WARPS,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (B, N, D) and y; of shift, scale and gate (3, B, D), and of bias (B, D).

    The last is yet to be added up. Without y, of x, shift and scale alone.
    """
    batch, tokens, width = sums.shape
    gated = y is not None and gate is not None
    dx, dy, parts, bias = _backward_fake(dh, dsums, sums, y, gate, scale, mean, rstd)
    walks = -(-tokens // WALK)
    found = sums.new_empty(4 if gated else 2, batch, walks, width, dtype=torch.float32)
    shift_scale_gate_bias = found if gated else (*found, *found)
    cast(Any, _backward_kernel)[(walks, batch)](
        dh, dsums, sums, y if gated else sums, gate if gated else scale, scale, mean, rstd,
        dx, dy, *shift_scale_gate_bias, tokens, _row(gate), _row(scale),
        **_shapes(width), GATED=gated, WALK=WALK, num_warps=WARPS,
    )  # fmt: skip
    cast(Any, _sums_kernel)[(batch, triton.cdiv(width, COLUMNS))](
        found, parts, bias, walks, width,
        PARTS=len(found), COLUMNS=COLUMNS, GATED=gated, num_warps=WARPS,
    )  # fmt: skip
    return dx, dy, parts, bias


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, width = sums.shape
    return (
        torch.empty_like(sums),
        sums.new_empty(0) if y is None else torch.empty_like(y),
        scale.new_empty(2 if y is None else 3, batch, width),
        sums.new_empty((0,) if y is None else (batch, width), dtype=torch.float32),
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
        dx, dy, (dshift, dscale, *dgate), dbias = _backward(
            dh.contiguous(), dsums.contiguous(), sums, y, gate, scale, mean, rstd
        )
        if y is None:
            return dx, None, None, None, dshift, dscale
        return dx, dy, dbias.sum(dim=0).to(ctx.dtype), *dgate, dshift, dscale


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
