"""The transformer f: noisy latents in, a gradient (or what an energy is made of) out.

DiT's blocks with adaLN-zero conditioning on the label (Peebles and Xie, 2023; SiT, Ma et al.,
2024), without a time input: EqM hides the noise level from the network. What its output means is
said in eqm.field; this module knows neither the sign nor the loss. Pure; parts are single-device.

    B  batch      C  channels     H, W  height, width (equal)     P  patch
    N  tokens, (H / P)**2         D     width                     K  classes

Every weight of the official code has one here under a readable name, of the same shape:

    pos_embed                          positions
    x_embedder.proj                    patches
    t_embedder.mlp.0, .2               time.0, time.2          (time="constant" only)
    y_embedder.embedding_table         labels
    blocks.i.attn.qkv, .proj           blocks.i.attention.qkv, .out
    blocks.i.mlp.fc1, .fc2             blocks.i.mlp.up, .down
    blocks.i.adaLN_modulation.1        blocks.i.modulation
    final_layer.linear                 head.linear
    final_layer.adaLN_modulation.1     head.modulation
"""

import math
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from eqm.config import NetworkConfig

TIME_FREQUENCIES = 256
"""Inputs of the official time embedder: 128 cosines, then 128 sines."""
NORM_EPS = 1e-6

Module = TypeVar("Module", bound=nn.Module)


class Transformer(nn.Module):
    """f(x, labels): (B, C, H, W) -> (B, C, H, W), with labels (B,) int64.

    ``classes`` is K: labels 0 to K - 1, and K itself is the null label. None is a network without
    labels, which learns one conditioning vector. ``time`` and ``unused_half`` exist for weights
    of the official code: "constant" feeds zeros to a time embedder, as that code does, and the
    head has a second half of channels that nothing reads. Built on torch's default device, with
    ``initialise(0)`` (on "meta": without weights). Raises ValueError for an input that patches do
    not tile.
    """

    positions: Tensor

    def __init__(
        self,
        config: NetworkConfig,
        *,
        input_size: int,
        channels: int,
        classes: int | None,
        time: Literal["none", "constant"] = "none",
        unused_half: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(config, input_size, channels, classes)
        self.config, self.input_size, self.channels = config, input_size, channels
        self.classes = classes
        self.grid = input_size // config.patch
        width, patch = config.width, config.patch
        self.register_buffer("positions", position_embedding(self.grid, width))
        self.patches = _bare(nn.Conv2d, channels, width, patch, stride=patch)
        self.labels = _bare(nn.Embedding, (classes or 0) + 1, width)
        self.time = _time_embedder(width) if time == "constant" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Head(config, channels * (1 + unused_half))
        if not self.positions.is_meta:
            self.initialise(0)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Apply f to x (B, C, H, W) with labels (B,) int64; None takes the null label.

        Raises ValueError for a shape that does not fit. Labels out of range are the caller's to
        find, by :func:`check_labels`, once and not in every call.
        """
        condition = functional.silu(self.condition(x, labels))
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.unpatch(self.head(tokens, condition))

    def condition(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Conditioning vectors (B, D): of the label, and of time 0 where there is an embedder."""
        found = self.labels(self.fitting_labels(x, labels))
        if self.time is None:
            return found
        zero = found.new_zeros(TIME_FREQUENCIES // 2)
        return found + self.time(torch.cat((zero.cos(), zero.sin())))

    def fitting_labels(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Labels for x, the null label where none are given. Raises ValueError."""
        expected = (self.channels, self.input_size, self.input_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"x has shape {tuple(x.shape)}; this network takes (B, *{expected})")
        if labels is None:
            return torch.full((len(x),), self.null_label, device=x.device)
        if self.classes is None:
            raise ValueError("labels were given to a network without labels: leave them out")
        if labels.shape != x.shape[:1]:
            raise ValueError(f"labels have shape {tuple(labels.shape)} for {len(x)} latents")
        return labels

    @property
    def null_label(self) -> int:
        """The label that stands for none: K."""
        return self.classes or 0

    def unpatch(self, tokens: Tensor) -> Tensor:
        """Put patches together: (B, N, P * P * C') -> (B, C, H, W); channels past C are dropped."""
        patch, size = self.config.patch, self.input_size
        cells = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (self.grid, self.grid))
        image = torch.einsum("bhwpqc->bchpwq", cells).reshape(len(tokens), -1, size, size)
        return image[:, : self.channels]

    @torch.no_grad()
    def initialise(self, seed: int, *, zero_head: bool = True) -> None:
        """Draw all weights anew, in place: a function of the seed alone.

        Linear layers and patches: Xavier uniform, biases 0; embeddings N(0, 0.02); modulations
        and the head 0, so that f == 0 at first (DiT). The energy 1/2 ||f||^2 has no gradient
        there and would never train: ``zero_head=False`` draws the head as well.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, weight in self.named_parameters():
            zero = name.endswith("bias") or "modulation" in name
            if zero or (zero_head and name == "head.linear.weight"):
                weight.zero_()
            elif name.startswith(("labels", "time")):
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator, device="cpu"))
            else:
                weight.copy_(_xavier_uniform(weight.shape, generator))


class Block(nn.Module):
    """Attention, then MLP, each normalised, modulated, gated by the condition, and added."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config)
        self.modulation = _bare(nn.Linear, config.width, 6 * config.width)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Map tokens (B, N, D), under condition (B, D) or (D,), to (B, N, D)."""
        parts = self.modulation(condition).unsqueeze(-2).chunk(6, dim=-1)
        shift, scale, gate = parts[:3]
        tokens = tokens + gate * self.attention(modulate(norm(tokens), shift, scale))
        shift, scale, gate = parts[3:]
        return tokens + gate * self.mlp(modulate(norm(tokens), shift, scale))


class Attention(nn.Module):
    """Multi-head self-attention over the tokens."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = _bare(nn.Linear, config.width, 3 * config.width)
        self.out = _bare(nn.Linear, config.width, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        split = self.qkv(tokens).unflatten(2, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with GELU between them, in its tanh form."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.up = _bare(nn.Linear, config.width, hidden)
        self.down = _bare(nn.Linear, hidden, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.down(functional.gelu(self.up(tokens), approximate="tanh"))


class Head(nn.Module):
    """Tokens -> patches of output, (p, q, channel) in this order."""

    def __init__(self, config: NetworkConfig, channels: int) -> None:
        super().__init__()
        self.linear = _bare(nn.Linear, config.width, config.patch**2 * channels)
        self.modulation = _bare(nn.Linear, config.width, 2 * config.width)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, P * P * channels)."""
        shift, scale = self.modulation(condition).unsqueeze(-2).chunk(2, dim=-1)
        return self.linear(modulate(norm(tokens), shift, scale))


def norm(tokens: Tensor) -> Tensor:
    """Layer norm over the last dimension, without weights of its own."""
    return functional.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS)


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: tokens * (1 + scale) + shift."""
    return tokens * (1 + scale) + shift


def position_embedding(grid: int, width: int) -> Tensor:
    """Embedding of a grid x grid of patches, (1, N, D) float32, row by row.

    The first half encodes the column, the second the row; each is [sin, cos] of the index times
    10000**(-4 i / D), i from 0 to D / 4 - 1. Computed in float64.
    """
    quarter = width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat((angles.sin(), angles.cos()), dim=1)
    columns, rows = line.expand(grid, grid, -1), line[:, None].expand(grid, grid, -1)
    return torch.cat((columns, rows), dim=2).view(1, grid * grid, -1).float()


def check_labels(labels: Tensor, *, classes: int) -> None:
    """Refuse labels that are not int64 of 0 to ``classes``, the null label. Raises ValueError.

    It waits for the device: check once, outside of loops.
    """
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; give (B,) int64"
        )
    wrong = labels[(labels < 0) | (labels > classes)]
    if len(wrong):
        raise ValueError(
            f"label {int(wrong[0])} is out of range: this network knows 0 to {classes - 1}, "
            f"and {classes} for no label"
        )


def _check_sizes(
    config: NetworkConfig, input_size: int, channels: int, classes: int | None
) -> None:
    if input_size < 1 or input_size % config.patch:
        raise ValueError(
            f"latents of {input_size} x {input_size} cannot be cut into patches of "
            f"{config.patch}: choose a network.patch that divides {input_size}"
        )
    if channels < 1:
        raise ValueError(f"channels is {channels}; latents have at least 1")
    if classes is not None and classes < 1:
        raise ValueError(f"classes is {classes}; give at least 1, or None for no labels")


def _bare(module: type[Module], *args: int, **settings: int) -> Module:
    # Torch's own first weights would be drawn from its global generator, only to be overwritten.
    bare = skip_init(module, *args, device=torch.get_default_device(), **settings)
    return cast(Module, bare)


def _time_embedder(width: int) -> nn.Sequential:
    first = _bare(nn.Linear, TIME_FREQUENCIES, width)
    return nn.Sequential(first, nn.SiLU(), _bare(nn.Linear, width, width))


def _xavier_uniform(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform in +-sqrt(6 / (inputs + outputs)); patches count as a matrix of flattened patches."""
    bound = math.sqrt(6 / (shape[0] + shape[1:].numel()))
    return bound * (2 * torch.rand(shape, generator=generator, device="cpu") - 1)
