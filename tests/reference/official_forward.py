"""The official network as paper.md 4.1 tells it, on weights under their official names and sign.

Slow and literal: every product, sum and exponential is written out, and no layer of torch is used.
"""

import math

import torch


def shapes(*, width, depth, patch, channels, size, classes, learn_sigma=True):
    """Name -> shape of every official weight, in the official order."""
    outputs = patch**2 * channels * (2 if learn_sigma else 1)
    found = {
        "pos_embed": (1, (size // patch) ** 2, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
    }
    for i in range(depth):
        found |= {
            f"blocks.{i}.attn.qkv.weight": (3 * width, width),
            f"blocks.{i}.attn.qkv.bias": (3 * width,),
            f"blocks.{i}.attn.proj.weight": (width, width),
            f"blocks.{i}.attn.proj.bias": (width,),
            f"blocks.{i}.mlp.fc1.weight": (4 * width, width),
            f"blocks.{i}.mlp.fc1.bias": (4 * width,),
            f"blocks.{i}.mlp.fc2.weight": (width, 4 * width),
            f"blocks.{i}.mlp.fc2.bias": (width,),
            f"blocks.{i}.adaLN_modulation.1.weight": (6 * width, width),
            f"blocks.{i}.adaLN_modulation.1.bias": (6 * width,),
        }
    return found | {
        "final_layer.linear.weight": (outputs, width),
        "final_layer.linear.bias": (outputs,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }


def random_weights(seed=0, **sizes):
    """Float32 weights of such a network under which every part of it matters."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1] if shape[1:] else 4)
        for name, shape in shapes(**sizes).items()
    }


def forward(w, x, y, *, heads, t=None):
    """Official field (B, C, H, W) at x with labels y (B,): from noise to data. EqM has no t."""
    w = {name: value.to(x.dtype) for name, value in w.items()}
    t = torch.zeros(len(x)) if t is None else t
    tokens = _patches(w, x) + w["pos_embed"]
    c = _time(w, t) + w["y_embedder.embedding_table.weight"][y]
    depth = len([name for name in w if name.endswith("attn.qkv.bias")])
    for i in range(depth):
        tokens = _block(w, f"blocks.{i}", tokens, c, heads)
    return _final(w, tokens, c, x.shape)


def _linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _silu(x):
    return x / (1 + torch.exp(-x))


def _gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _layer_norm(x):
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / torch.sqrt(variance + 1e-6)


def _modulate(x, shift, scale):
    return x * (1 + scale[:, None, :]) + shift[:, None, :]


def _patches(w, x):
    """Rule 1: a patch is a sum over its channels, rows and columns; patches go row by row."""
    kernel, bias = w["x_embedder.proj.weight"], w["x_embedder.proj.bias"]
    p = kernel.shape[-1]
    rows = []
    for top in range(0, x.shape[2], p):
        for left in range(0, x.shape[3], p):
            cell = x[:, None, :, top : top + p, left : left + p]
            rows.append((cell * kernel).sum((2, 3, 4)) + bias)
    return torch.stack(rows, dim=1)


def _time(w, t):
    """Rule 2: 128 cosines, 128 sines, in float32; then an MLP."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = t.float()[:, None] * frequencies
    features = torch.cat((torch.cos(angles), torch.sin(angles)), dim=1)
    hidden = _silu(_linear(w, "t_embedder.mlp.0", features.to(w["pos_embed"].dtype)))
    return _linear(w, "t_embedder.mlp.2", hidden)


def _block(w, name, tokens, c, heads):
    """Rule 3."""
    parts = _linear(w, f"{name}.adaLN_modulation.1", _silu(c)).chunk(6, dim=1)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
    inner = _modulate(_layer_norm(tokens), shift_msa, scale_msa)
    tokens = tokens + gate_msa[:, None, :] * _attention(w, f"{name}.attn", inner, heads)
    inner = _modulate(_layer_norm(tokens), shift_mlp, scale_mlp)
    hidden = _gelu_tanh(_linear(w, f"{name}.mlp.fc1", inner))
    return tokens + gate_mlp[:, None, :] * _linear(w, f"{name}.mlp.fc2", hidden)


def _attention(w, name, tokens, heads):
    q, k, v = _linear(w, f"{name}.qkv", tokens).chunk(3, dim=2)
    head = tokens.shape[2] // heads
    found = []
    for i in range(heads):
        mine = slice(i * head, (i + 1) * head)
        scores = q[:, :, mine] @ k[:, :, mine].transpose(1, 2) / math.sqrt(head)
        weights = torch.exp(scores - scores.amax(2, keepdim=True))
        found.append(weights / weights.sum(2, keepdim=True) @ v[:, :, mine])
    return _linear(w, f"{name}.proj", torch.cat(found, dim=2))


def _final(w, tokens, c, shape):
    """Rule 4: output (p * P + q) * C' + k of a token is channel k at row p, column q of a patch."""
    shift, scale = _linear(w, "final_layer.adaLN_modulation.1", _silu(c)).chunk(2, dim=1)
    outputs = _linear(w, "final_layer.linear", _modulate(_layer_norm(tokens), shift, scale))
    p = w["x_embedder.proj.weight"].shape[-1]
    all_channels = outputs.shape[2] // p**2
    _, channels, height, width = shape
    field = tokens.new_zeros(shape)
    for row in range(height):
        for column in range(width):
            token = (row // p) * (width // p) + column // p
            first = ((row % p) * p + column % p) * all_channels
            field[:, :, row, column] = outputs[:, token, first : first + channels]
    return field
