"""The transformer f: noisy latents in, a gradient (or what an energy is made of) out.

DiT's blocks with adaLN-zero conditioning on the label (Peebles and Xie, 2023; SiT, Ma et al.,
2024), without a time input: EqM hides the noise level from the network. Only baselines are
conditioned on it. What the output means is said in eqm.field; this module knows neither the sign
nor the loss. Pure; parts are single-device.

    B  batch      C  channels     H, W  height, width             P  patch
    N  tokens, H W / P**2         D     width                     K  classes
    gamma  noise level, (B,): 0 is noise, 1 is data

Every weight of the official code has one here under a readable name, of the same shape:

    pos_embed                          positions
    x_embedder.proj                    patches
    t_embedder.mlp.0, .2               time.0, time.2          (not for time="none")
    y_embedder.embedding_table         labels
    blocks.i.attn.qkv, .proj           blocks.i.attention.qkv, .out
    blocks.i.mlp.fc1, .fc2             blocks.i.mlp.up, .down
    blocks.i.adaLN_modulation.1        blocks.i.modulation
    final_layer.linear                 head.linear
    final_layer.adaLN_modulation.1     head.modulation
"""

import functools
import math
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from eqm.config import NetworkConfig, replace
from eqm.errors import ConfigError, DataError

TIME_FREQUENCIES = 256
"""Inputs of the official time embedder: 128 cosines, then 128 sines."""
NORM_EPS = 1e-6

Module = TypeVar("Module", bound=nn.Module)


class Labelled(nn.Module):
    """What networks share: latents of one shape (C, H, W), and labels of which K is the null one.

    ``classes`` is K; None is a network without labels, which learns one conditioning vector. Raises
    ConfigError for sizes or classes below 1.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int | None, *, timed: bool) -> None:
        super().__init__()
        if min(shape) < 1:
            raise ConfigError(f"latents have shape {shape}; every size must be at least 1")
        if classes is not None and classes < 1:
            raise ConfigError(f"classes is {classes}; give at least 1, or None for no labels")
        self.shape, self.classes = shape, classes
        self.conditioned = timed
        """Whether gamma must be given."""

    @property
    def null_label(self) -> int:
        """The label that stands for none: K."""
        return self.classes or 0

    def fitting_labels(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Labels for x, the null label where none are given. Raises DataError."""
        if tuple(x.shape[1:]) != self.shape:
            raise DataError(f"x has shape {tuple(x.shape)}; this network takes (B, *{self.shape})")
        if labels is None:
            return torch.full((len(x),), self.null_label, device=x.device)
        if self.classes is None:
            raise DataError("labels were given to a network without labels: leave them out")
        if labels.shape != x.shape[:1]:
            raise DataError(f"labels have shape {tuple(labels.shape)} for {len(x)} latents")
        return labels

    def fitting_gamma(self, x: Tensor, gamma: Tensor | None) -> Tensor | None:
        """Noise levels (B,) for x: given exactly where they are needed. Raises DataError."""
        if not self.conditioned:
            if gamma is not None:
                raise DataError("gamma was given to a network that is blind to it: leave it out")
            return None
        if gamma is None:
            raise DataError(
                "this network is conditioned on the noise level: give gamma (B,), or sample with "
                "Euler or Heun, which know it"
            )
        if gamma.shape != x.shape[:1]:
            raise DataError(f"gamma has shape {tuple(gamma.shape)} for {len(x)} latents")
        return gamma


class Transformer(Labelled):
    """f(x, labels): (B, C, H, W) -> (B, C, H, W), with labels (B,) int64.

    ``size`` is (H, W), or one number for both. ``config.time`` "constant" feeds zeros to a time
    embedder, as the official code does; "conditioned" feeds gamma, as SiT does. Built on torch's
    default device, with ``initialise(0)`` (on "meta": without weights). Raises ConfigError for an
    input that patches do not tile.
    """

    positions: Tensor

    def __init__(
        self,
        config: NetworkConfig,
        *,
        size: int | tuple[int, int],
        channels: int,
        classes: int | None,
    ) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        super().__init__((channels, height, width), classes, timed=config.time == "conditioned")
        self.config = replace(config, kind="transformer")
        self.grid = _grid(height, width, config.patch)
        self.register_buffer("positions", position_embedding(*self.grid, config.width))
        self.patches = _bare(nn.Conv2d, channels, config.width, config.patch, stride=config.patch)
        self.labels = _bare(nn.Embedding, (classes or 0) + 1, config.width)
        self.time = None if config.time == "none" else _time_embedder(config.width)
        self.blocks = nn.ModuleList(Block(config, self.grid) for _ in range(config.depth))
        self.head = Head(config, channels * (1 + config.second_head))
        if not self.positions.is_meta:
            self.initialise(0)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, gamma: Tensor | None = None
    ) -> Tensor:
        """Apply f to x (B, C, H, W) with labels (B,) int64; None takes the null label.

        ``gamma`` (B,) is for networks that are conditioned on it, and for no others. Raises
        DataError for what does not fit. Labels out of range are the caller's to find, by
        :func:`check_labels`, once and not in every call.
        """
        return self.outputs(x, labels, gamma)[:, : self.shape[0]]

    def outputs(self, x: Tensor, labels: Tensor | None, gamma: Tensor | None) -> Tensor:
        """All output channels, (B, C', H, W): f, then the second head where there is one."""
        condition = functional.silu(self.condition(x, labels, gamma))
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.unpatch(self.head(tokens, condition))

    def condition(self, x: Tensor, labels: Tensor | None, gamma: Tensor | None) -> Tensor:
        """Conditioning vectors (B, D): of the label, and of the time where there is an embedder."""
        found = self.labels(self.fitting_labels(x, labels))
        level = self.fitting_gamma(x, gamma)
        if self.time is None:
            return found
        # (1,) broadcasts: the learned constant is computed once, as cheap as a bias.
        given = found.new_zeros(1) if level is None else level
        return found + self.time(time_features(given).to(found.dtype))

    def unpatch(self, tokens: Tensor) -> Tensor:
        """Put patches together: (B, N, P * P * C') -> (B, C', H, W)."""
        patch, (_, height, width) = self.config.patch, self.shape
        cells = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, self.grid)
        return torch.einsum("bhwpqc->bchpwq", cells).reshape(len(tokens), -1, height, width)

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
            elif name.endswith("_scale"):
                weight.fill_(1)
            elif name.startswith(("labels", "time")):
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator, device="cpu"))
            else:
                weight.copy_(_xavier_uniform(weight.shape, generator))


class Block(nn.Module):
    """Attention, then MLP, each normalised, modulated, gated by the condition, and added."""

    def __init__(self, config: NetworkConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        self.attention = Attention(config, grid)
        self.mlp = GatedMLP(config) if config.swiglu else MLP(config)
        self.modulation = _bare(nn.Linear, config.width, 6 * config.width)
        self.norm = norm_of(config)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Map tokens (B, N, D), under condition (B, D), to (B, N, D)."""
        parts = self.modulation(condition).unsqueeze(-2).chunk(6, dim=-1)
        shift, scale, gate = parts[:3]
        tokens = tokens + gate * self.attention(modulate(self.norm(tokens), shift, scale))
        shift, scale, gate = parts[3:]
        return tokens + gate * self.mlp(modulate(self.norm(tokens), shift, scale))


class Attention(nn.Module):
    """Multi-head self-attention over the tokens."""

    turns: Tensor

    def __init__(self, config: NetworkConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = _bare(nn.Linear, config.width, 3 * config.width)
        self.out = _bare(nn.Linear, config.width, config.width)
        head = config.width // config.heads
        self.q_scale = nn.Parameter(torch.ones(head)) if config.qk_norm else None
        self.k_scale = nn.Parameter(torch.ones(head)) if config.qk_norm else None
        turns = rotary_angles(*grid, head) if config.rope else None
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.out(self.mixed(tokens))

    def mixed(self, tokens: Tensor) -> Tensor:
        """What ``out`` is given: the heads' values, mixed over tokens, (B, N, D)."""
        split = self.qkv(tokens).unflatten(2, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        if self.q_scale is not None and self.k_scale is not None:
            q, k = rms_norm(q) * self.q_scale, rms_norm(k) * self.k_scale
        if self.turns is not None:
            q, k = rotated(q, self.turns), rotated(k, self.turns)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).flatten(2)


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


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate) * up), two thirds as wide, so as many weights."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        hidden = int(config.width * config.mlp_ratio * 2 / 3)
        self.up = _bare(nn.Linear, config.width, 2 * hidden)
        self.down = _bare(nn.Linear, hidden, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.down(self.activated(tokens))

    def activated(self, tokens: Tensor) -> Tensor:
        """What ``down`` is given."""
        gate, up = self.up(tokens).chunk(2, dim=-1)
        return functional.silu(gate) * up


class Head(nn.Module):
    """Tokens -> patches of output, (p, q, channel) in this order."""

    def __init__(self, config: NetworkConfig, channels: int) -> None:
        super().__init__()
        self.linear = _bare(nn.Linear, config.width, config.patch**2 * channels)
        self.modulation = _bare(nn.Linear, config.width, 2 * config.width)
        self.norm = norm_of(config)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, P * P * channels)."""
        shift, scale = self.modulation(condition).unsqueeze(-2).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(tokens), shift, scale))


def norm_of(config: NetworkConfig) -> Callable[[Tensor], Tensor]:
    """The norm that a config asks for; adaLN's modulation takes the place of its weights."""
    return rms_norm if config.rms_norm else layer_norm


def layer_norm(tokens: Tensor) -> Tensor:
    """Layer norm over the last dimension, without weights of its own."""
    return functional.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS)


def rms_norm(tokens: Tensor) -> Tensor:
    """tokens / root mean square over the last dimension, without weights of its own."""
    return functional.rms_norm(tokens, tokens.shape[-1:], eps=NORM_EPS)


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: tokens * (1 + scale) + shift."""
    return tokens * (1 + scale) + shift


def position_embedding(rows: int, columns: int, width: int) -> Tensor:
    """Embedding of rows x columns of patches, (1, N, D) float32, row by row.

    The first half encodes the column, the second the row; each is [sin, cos] of the index times
    10000**(-4 i / D), i from 0 to D / 4 - 1. Computed in float64, on the CPU.
    """
    across, down = (_angles(count, width // 4) for count in (columns, rows))
    across, down = (torch.cat((a.sin(), a.cos()), dim=1) for a in (across, down))
    pair = across.expand(rows, columns, -1), down[:, None].expand(rows, columns, -1)
    return _placed(torch.cat(pair, dim=2).view(1, rows * columns, -1))


def rotary_angles(rows: int, columns: int, head: int) -> Tensor:
    """Angles by which pairs of a head's channels turn, (N, head / 2) float32 (Su et al., 2021).

    The first half of the pairs turns with the column, the second with the row.
    """
    across, down = (_angles(count, head // 4) for count in (columns, rows))
    pair = across.expand(rows, columns, -1), down[:, None].expand(rows, columns, -1)
    return _placed(torch.cat(pair, dim=2).view(rows * columns, -1))


def rotated(heads: Tensor, angles: Tensor) -> Tensor:
    """Turn channel i of heads (B, heads, N, d) with channel i + d / 2 by angles (N, d / 2)."""
    cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    a, b = heads.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def _angles(count: int, frequencies: int) -> Tensor:
    """Index times 10000**(-i / frequencies), (count, frequencies) float64, on the CPU."""
    index = torch.arange(frequencies, dtype=torch.float64, device="cpu")
    rates = 10000.0 ** -(index / frequencies)
    return torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * rates


def _placed(table: Tensor) -> Tensor:
    """A table in float32 where new tensors are made.

    Made there from the start, one without memory ("meta") would load a compiler, for seconds.
    """
    return table.float().to(torch.get_default_device())


def time_features(gamma: Tensor) -> Tensor:
    """SiT's features of a time in [0, 1], (B,) -> (B, 256): 128 cosines, then 128 sines."""
    half = TIME_FREQUENCIES // 2
    index = torch.arange(half, dtype=torch.float32, device=gamma.device)
    angles = gamma[:, None].float() * (-math.log(10000) * index / half).exp()
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def uncompiled(network: Module) -> Module:
    """What torch.compile has wrapped, with its own names of weights; others as they are."""
    return cast(Module, getattr(network, "_orig_mod", network))


def check_labels(labels: Tensor, *, classes: int) -> None:
    """Refuse labels that are not int64 of 0 to ``classes``, the null label. Raises DataError.

    It waits for the device: check once, outside of loops.
    """
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise DataError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; give (B,) int64"
        )
    wrong = labels[(labels < 0) | (labels > classes)]
    if len(wrong):
        raise DataError(
            f"label {int(wrong[0])} is out of range: this network knows 0 to {classes - 1}, "
            f"and {classes} for no label"
        )


def check_gamma(gamma: Tensor, count: int) -> None:
    """Refuse noise levels that are not one number in [0, 1] for each latent. Raises DataError.

    It waits for the device: check once, outside of loops.
    """
    if gamma.shape != (count,):
        raise DataError(
            f"gamma has shape {tuple(gamma.shape)} for {count} latents: give one level each"
        )
    wrong = gamma[~((gamma >= 0) & (gamma <= 1))]
    if len(wrong):
        raise DataError(
            f"gamma is {float(wrong[0])}; give levels from 0, which is noise, to 1, which is data"
        )


def _grid(height: int, width: int, patch: int) -> tuple[int, int]:
    if height % patch or width % patch:
        raise ConfigError(
            f"latents of {height} x {width} cannot be cut into patches of {patch}: choose a "
            f"network.patch that divides {height} and {width}"
        )
    return height // patch, width // patch


def _bare(module: type[Module], *args: int, **settings: int) -> Module:
    # Torch's own first weights would be drawn from its global generator, only to be overwritten.
    # torch.nn.utils.skip_init goes by way of "meta", and so loads a compiler, for seconds.
    bare = _undrawn(module)(*args, **settings)
    bare.__class__ = module
    return cast(Module, bare)


@functools.cache
def _undrawn(module: type[nn.Module]) -> type[nn.Module]:
    """The same, with whatever the memory held as first weights."""
    return type(module.__name__, (module,), {"reset_parameters": lambda _: None})


def _time_embedder(width: int) -> nn.Sequential:
    first = _bare(nn.Linear, TIME_FREQUENCIES, width)
    return nn.Sequential(first, nn.SiLU(), _bare(nn.Linear, width, width))


def _xavier_uniform(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform in +-sqrt(6 / (inputs + outputs)); patches count as a matrix of flattened patches."""
    bound = math.sqrt(6 / (shape[0] + shape[1:].numel()))
    return bound * (2 * torch.rand(shape, generator=generator, device="cpu") - 1)
