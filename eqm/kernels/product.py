"""A layer's product, which adds the gradient of its weight to the update's sum itself.

Autograd makes a weight's gradient in the number type of the product, casts it to that of the
weight, and adds it: 20 bytes a weight go through memory. Here the product dy^T x adds to the sum
where that lies, from its own float32: 8 bytes, and nothing is rounded to half precision between.
And a weight is cast once an update, not once for every part of its batch.

    x  (..., I) inputs      y  (..., O) outputs      weight  (O, I)
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from eqm.gradients import Update, update_under_way


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, sums_bias: bool) -> Tensor:
        device = x.device.type
        half = torch.is_autocast_enabled(device)
        ctx.given, ctx.sums_bias, ctx.update = x.dtype, sums_bias, update_under_way()
        x = x.to(torch.get_autocast_dtype(device)) if half else x
        # Not as it was cast: FSDP2 takes a weight away until its gradient is asked for.
        ctx.save_for_backward(x, weight, bias)
        # But as itself where it is summed: blocks that are computed again give a copy of it.
        known = ctx.update is not None and ctx.update.sum_of(weight) is not None
        ctx.summed = weight if known else None
        given = (_cast(ctx.update, w, x.dtype) for w in (weight, bias))
        with torch.autocast(device, enabled=False):
            return functional.linear(x, *given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        weight = weight if ctx.summed is None else ctx.summed
        rows, inputs = dy.flatten(0, -2), x.flatten(0, -2)
        dx = dw = db = None
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = (dy @ _cast(ctx.update, weight, dy.dtype)).to(ctx.given)
            if ctx.needs_input_grad[1]:
                dw = _handed(ctx.update, weight, rows, inputs)
            if ctx.sums_bias and ctx.needs_input_grad[2]:
                db = rows.sum(dim=0, dtype=bias.dtype)
        return dx, dw, db, None


def _cast(update: Update | None, weight: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.dtype == dtype:
        return weight
    return weight.to(dtype) if update is None else update.cast(weight, dtype)


def _handed(update: Update | None, weight: Tensor, dy: Tensor, x: Tensor) -> Tensor | None:
    """The gradient of a weight, of dy (T, O) and x (T, I); None where it was added to the sum."""
    onto = None if update is None else update.sum_of(weight)
    if onto is None:
        return add_product(None, dy, x).to(weight.dtype)
    add_product(onto, dy, x)
    return None


def add_product(onto: Tensor | None, dy: Tensor, x: Tensor) -> Tensor:
    """onto (O, I) + dy^T x, of dy (T, O) and x (T, I), in place; without ``onto``, dy^T x.

    Of half precision in float32, which the products' own sums are: on a GPU that is no more work.
    """
    rows = dy.t()
    if dy.dtype.itemsize < torch.float32.itemsize:
        if dy.is_cuda:
            if onto is None:
                return torch.mm(rows, x, out_dtype=torch.float32)
            return torch.addmm(onto, rows, x, out_dtype=torch.float32, out=onto)
        rows, x = rows.float(), x.float()
    return rows @ x if onto is None else onto.addmm_(rows, x)


def product(x: Tensor, weight: Tensor, bias: Tensor, *, sums_bias: bool = True) -> Tensor:
    """y = x weight^T + bias, (..., O), in the number type of autocast where that is on.

    Not ``sums_bias``: the bias gets no gradient here, but from who reads y.
    """
    return cast(Tensor, _Product.apply(x, weight, bias, sums_bias))
