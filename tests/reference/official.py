"""The official code's tiny model and its numbers, in our names and with our sign."""

from pathlib import Path

from safetensors.torch import load_file

from eqm.config import NetworkConfig
from eqm.network import Transformer

GOLDEN = Path(__file__).parent.parent / "golden"

RENAMED = (
    ("pos_embed", "positions"),
    ("x_embedder.proj", "patches"),
    ("t_embedder.mlp", "time"),
    ("y_embedder.embedding_table", "labels"),
    ("attn.qkv", "attention.qkv"),
    ("attn.proj", "attention.out"),
    ("mlp.fc1", "mlp.up"),
    ("mlp.fc2", "mlp.down"),
    ("adaLN_modulation.1", "modulation"),
    ("final_layer", "head"),
)


def renamed(name):
    """Our name of an official weight."""
    for theirs, ours in RENAMED:
        name = name.replace(theirs, ours)
    return name


def outputs():
    """Inputs and outputs of the official code, float64, in its sign."""
    return load_file(GOLDEN / "official_tiny_outputs.safetensors")


def weights(flip=True):
    """Official weights under our names, the last layer's sign turned into ours."""
    found = load_file(GOLDEN / "official_tiny_ema.safetensors")
    sign = {"final_layer.linear.weight": -1, "final_layer.linear.bias": -1} if flip else {}
    return {renamed(name): w * sign.get(name, 1) for name, w in found.items()}


def empty_network():
    """The tiny model's architecture."""
    return Transformer(
        NetworkConfig(width=64, depth=2, heads=4, patch=2, time="constant", second_head=True),
        size=8,
        channels=4,
        classes=10,
    )


def network(flip=True):
    """The tiny model, float64."""
    net = empty_network()
    net.load_state_dict(weights(flip))
    return net.double().requires_grad_(False)


def error(found, expected):
    """Relative difference in norm."""
    return float((found - expected).detach().norm() / expected.norm())
