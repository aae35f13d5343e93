"""What the recipes cost, counted and not measured: the table of docs/recipes.md.

Networks are built without weights, on torch's meta device, and FLOPs counted by torch as one latent
goes through: matrix products, convolutions and attention, 2 a multiply-add. An update is three
forwards (forward, gradient of inputs, gradient of weights). ``python -m bench recipes`` prints it;
a test compares it with the page.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from eqm.config import PipelineConfig
from eqm.network import Transformer
from eqm.recipes import IMAGENET_IMAGES, Recipe, latent_shape, recipes
from eqm.unet import UNet

PEAK = 989e12
"""bf16 FLOP/s of an H100, dense."""
UTILISATION = {"EqM-S/2": 0.26, "EqM-B/2": 0.40, "EqM-XL/2": 0.44}
"""Model at MEASURED_PX -> the share of them that its update was measured to reach (docs/LOG.md)."""
MEASURED_PX = 256
MOST = 0.44
"""The share that no other is taken to exceed."""
TRAINING_BYTES = 4 + 4 + 8 + 4
"""A weight: itself, its gradient, AdamW's two moments, its average; all float32."""
CHECKPOINT_BYTES = 4 + 8 + 4
"""A weight: the same without the gradient."""
IMAGES = {"imagenet": IMAGENET_IMAGES, "parquet": 50_000, "digits": 1_797}
CLASSES = {"imagenet": 1000, "parquet": 10, "digits": 10}


def network(config: PipelineConfig) -> Transformer | UNet:
    """The network of a recipe, without weights."""
    channels, height, width = latent_shape(config)
    kind = Transformer if config.network.kind == "transformer" else UNet
    with torch.device("meta"):
        return kind(
            config.network,
            size=(height, width),
            channels=channels,
            classes=CLASSES[config.source.kind],
        )


def parameters(net: Transformer | UNet) -> int:
    """Weights, and the table of positions, as the paper counts."""
    positions = net.positions.numel() if isinstance(net, Transformer) else 0
    return sum(weight.numel() for weight in net.parameters()) + positions


def forward_flops(net: Transformer | UNet) -> int:
    """Of one latent."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.empty(1, *net.shape), torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops()


def gpu_hours(images: int, flops: int, share: float) -> float:
    """Of training on so many images, ``flops`` a forward, on an H100 at this share of PEAK."""
    return images * 3 * flops / (PEAK * share) / 3600


def hours(recipe: Recipe, flops: int) -> str:
    """By the measured share; or at least so many, by that of the same size, or the most of all."""
    config, size = recipe.config, recipe.title.partition("/")[0]
    measured = recipe.title in UTILISATION and config.source.image_size_px == MEASURED_PX
    near = config.source.image_size_px <= MEASURED_PX
    share = UTILISATION.get(f"{size}/2", MOST) if near else MOST
    found = figure(gpu_hours(config.train.images, flops, share))
    return found if measured or found.startswith("<") else f"> {found}"


def latents_bytes(config: PipelineConfig) -> int:
    """Of all images: mean and standard deviation, float16, and the same of the mirror."""
    channels, height, width = latent_shape(config)
    return (
        IMAGES[config.source.kind] * (1 + config.source.mirror) * 2 * channels * height * width * 2
    )


def row(recipe: Recipe) -> str:
    """A line of the table."""
    config, net = recipe.config, network(recipe.config)
    weights, flops = sum(weight.numel() for weight in net.parameters()), forward_flops(net)
    cells = (
        f"`{recipe.name}`",
        recipe.title,
        f"{parameters(net):,}",
        f"{config.train.images / 1e6:,.1f}",
        figure(flops / 1e9),
        hours(recipe, flops),
        figure(TRAINING_BYTES * weights / 1e9),
        figure(CHECKPOINT_BYTES * weights / 1e9),
        figure(latents_bytes(config) / 1e9),
        recipe.expected,
    )
    return "| " + " | ".join(cells) + " |"


def figure(value: float) -> str:
    """Three digits of it, without an exponent."""
    if value < 0.01:
        return "< 0.01"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


HEAD = (
    "| recipe | model | parameters | images, M | forward, GFLOP an image | H100 hours "
    "| training state, GB | a checkpoint, GB | latents, GB | what to expect |",
    "|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
)


def table() -> str:
    """All recipes and what each costs, as Markdown."""
    return "\n".join((*HEAD, *(row(recipe) for recipe in recipes().values())))


def main() -> None:
    """Print the table."""
    print(table())
