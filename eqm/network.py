"""The transformer: adaLN-zero blocks over patches, conditioned on a label and on nothing else."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eqm.config import NetworkConfig

EPSILON = 1e-6


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.width
        self.attn = Attention(width, config.heads)
        self.mlp = MLP(width, int(width * config.mlp_ratio))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x, c):
        s1, c1, g1, s2, c2, g2 = self.modulation(F.silu(c)).chunk(6, dim=1)
        n = lambda z: F.layer_norm(z, z.shape[-1:], eps=EPSILON)
        x = x + g1[:, None] * self.attn(modulate(n(x), s1, c1))
        return x + g2[:, None] * self.mlp(modulate(n(x), s2, c2))


class Transformer(nn.Module):
    def __init__(self, config: NetworkConfig, *, input_size, channels, classes):
        super().__init__()
        if input_size % config.patch:
            raise ValueError(f"input size {input_size} not divisible by patch {config.patch}")
        self.config, self.channels, self.classes = config, channels, classes
        self.side = input_size // config.patch
        self.embed = nn.Conv2d(channels, config.width, config.patch, config.patch)
        self.label = nn.Embedding((classes or 0) + 1, config.width)
        self.register_buffer("pos", position_embedding(config.width, self.side), persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_modulation = nn.Linear(config.width, 2 * config.width)
        self.head = nn.Linear(config.width, config.patch**2 * channels)
        self.initialise(0)

    def initialise(self, seed):
        g = torch.Generator().manual_seed(seed)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight, generator=g)
                nn.init.zeros_(m.bias)
        w = self.embed.weight
        nn.init.xavier_uniform_(w.data.view(len(w), -1), generator=g)
        nn.init.zeros_(self.embed.bias)
        nn.init.normal_(self.label.weight, std=0.02, generator=g)
        for m in [*(b.modulation for b in self.blocks), self.final_modulation, self.head]:
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)

    def forward(self, x, labels=None):
        if labels is None:
            labels = torch.full((len(x),), self.classes or 0, device=x.device)
        h = self.embed(x).flatten(2).transpose(1, 2) + self.pos
        c = self.label(labels)
        for b in self.blocks:
            h = b(h, c)
        s, k = self.final_modulation(F.silu(c)).chunk(2, dim=1)
        h = self.head(modulate(F.layer_norm(h, h.shape[-1:], eps=EPSILON), s, k))
        p, n = self.config.patch, self.side
        h = h.reshape(len(x), n, n, p, p, self.channels)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.channels, n * p, n * p)


def position_embedding(width, side):
    w = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    at = torch.arange(side, dtype=torch.float64)
    a = at[:, None] * w
    one = torch.cat([a.sin(), a.cos()], dim=1)
    col = one[None].expand(side, side, -1)
    row = one[:, None].expand(side, side, -1)
    return torch.cat([col, row], dim=-1).reshape(1, side * side, width).float()
