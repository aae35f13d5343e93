"""A transformer's parts by our kernels: what eqm.network computes, in other pieces.

A block ends with a residual, and the next one begins with a norm of it: one kernel for both, where
what is yet to be added goes from block to block beside the tokens.
"""

import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from eqm.kernels.adaln import adaln
from eqm.kernels.attention import attention
from eqm.kernels.gelu import gelu
from eqm.kernels.product import product
from eqm.network import MLP, Attention, Block, GatedMLP, Head

Stream = tuple[Tensor, Tensor, Tensor, Tensor]
"""Tokens (B, N, D), and a product y (B, N, D), its bias (D,) and a gate (B, D): gate * y is yet to
be added to the tokens, and y's bias has yet to get its gradient."""
ATTENDED = torch.bfloat16, torch.float16
"""Number types that our attention is for: where a training looks at samples in float32, whose
products it would take one by one, attention is torch's."""
Forward = Callable[[Block, Tensor | Stream, Tensor], Tensor | Stream]


@functools.cache
def block_forward(*, attends: bool, carries: bool) -> Forward:
    """What ``Block.forward`` computes of tokens (B, N, D) or a stream, under condition (B, D).

    ``attends``: attention too is a kernel of ours, in half precision. ``carries``: it gives a
    stream, else tokens.
    """

    def forward(block: Block, given: Tensor | Stream, condition: Tensor) -> Tensor | Stream:
        parts = _product(block.modulation, condition, sums_bias=True).chunk(6, dim=-1)
        tokens, hidden = _normed(given, parts[0], parts[1])
        y, bias = _attended(block.attention, hidden, attends=attends)
        tokens, hidden = adaln(tokens, y, bias, *parts[2:5])
        hidden, down = _activated(block.mlp, hidden), block.mlp.down
        if not carries:
            return tokens + parts[5].unsqueeze(-2) * down(hidden)
        # A copy of the bias: FSDP2 takes a block's weights away when it has ended.
        return tokens, _product(down, hidden), down.bias.clone(), parts[5]

    return forward


def patches_forward(patches: nn.Conv2d, x: Tensor) -> Tensor:
    """What the convolution makes of latents (B, C, H, W), (B, D, H / P, W / P): a product.

    Its tokens lie as blocks read them; what cuDNN makes would have to be copied.
    """
    size = patches.kernel_size[0]
    cells = x.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
    rows, columns = cells.shape[1:3]
    # A view of the weight, so that autograd adds its gradient; it is a small one.
    weight, bias = patches.weight.flatten(1), cast(Tensor, patches.bias)
    tokens = product(cells.flatten(3).flatten(1, 2), weight, bias)
    return tokens.transpose(1, 2).unflatten(2, (rows, columns))


def head_forward(head: Head, given: Tensor | Stream, condition: Tensor) -> Tensor:
    """What ``Head.forward`` computes, (B, N, P * P * channels)."""
    shift, scale = _product(head.modulation, condition, sums_bias=True).chunk(2, dim=-1)
    _, hidden = _normed(given, shift, scale)
    return _product(head.linear, hidden, sums_bias=True)


def _normed(given: Tensor | Stream, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(given, Tensor):
        return adaln(given, None, None, None, shift, scale)
    return adaln(*given, shift, scale)


def _attended(module: Attention, hidden: Tensor, *, attends: bool) -> tuple[Tensor, Tensor]:
    """What comes out of attention, and the bias that has yet to get its gradient."""
    if attends and hidden.dtype in ATTENDED:
        qkv = _product(module.qkv, hidden)
        mixed = attention(qkv, module.qkv.bias, module.heads)
    else:
        mixed = module.mixed(hidden)
    return _product(module.out, mixed), module.out.bias


def _activated(mlp: MLP | GatedMLP, hidden: Tensor) -> Tensor:
    """What an MLP's second product is given."""
    if isinstance(mlp, GatedMLP):
        return mlp.activated(hidden)
    return gelu(_product(mlp.up, hidden), mlp.up.bias)


def _product(layer: nn.Linear, x: Tensor, *, sums_bias: bool = False) -> Tensor:
    """A layer's output. Not ``sums_bias``: who reads it gives the bias its gradient.

    Compiled code adds to no sum: what it makes, autograd adds.
    """
    if torch.compiler.is_compiling():
        return functional.linear(x, layer.weight, layer.bias if sums_bias else layer.bias.detach())
    return product(x, layer.weight, layer.bias, sums_bias=sums_bias)
