"""Whole configs with what to expect of them: the paper's models, small pixel images, the demo.

``eqm recipes`` lists them and ``eqm recipes NAME`` prints one as a TOML file, to be edited where it
says so and run by ``eqm pipeline``. Settings are those of the paper (arXiv 2510.02300) and, where
it is silent, of its released code; what neither says is named in the recipe's notes. What they cost
is counted by ``python -m bench recipes`` (docs/recipes.md).
"""

import json
import math
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from eqm.config import (
    INCEPTION_SHA256,
    AutoencoderConfig,
    CheckpointConfig,
    ComputeConfig,
    ExtractorConfig,
    GenerateConfig,
    NetworkConfig,
    PipelineConfig,
    PretrainedFile,
    SamplerConfig,
    SourceConfig,
    TrainConfig,
    UNetConfig,
    demo,
    replace,
)
from eqm.errors import ConfigError
from eqm.policy import PolicyConfig
from eqm.records import to_json

IMAGENET_IMAGES = 1_281_167
UPDATES_AN_EPOCH = IMAGENET_IMAGES // 256
"""The released code drops the last, incomplete batch of an epoch."""
HALF_LIFE = math.log(0.5) / math.log(0.9999) * 256
"""In images, of an average that keeps 0.9999 of itself at every update of 256 images."""
EVERY_EPOCH = CheckpointConfig(every_images=1_280_000, grid_every_images=12_800_000)
ON_GPUS = ComputeConfig(fused=True)
"""Compiled as well, a step took as long or longer, and 20 s to begin."""
SD_VAE_CHANNELS, SD_VAE_PIXELS = 4, 8
"""Of a latent, and of an image's side for one of a latent's."""
UNKNOWN_DIGEST = "0" * 64
"""In place of the digest of a file that only its owner has: refused when the file is read."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A config, and what is known of it."""

    name: str
    title: str
    """The model, as the paper calls it."""
    config: PipelineConfig
    parameters: int
    """With the table of positions, as the paper counts."""
    expected: str
    """What was published for it, and where."""
    notes: tuple[str, ...] = ()
    """Where it departs from the paper, and what must be edited."""


EDIT = {
    "source_uri": "yours: see docs/data.md",
    "autoencoder.pretrained.uri": "stabilityai/sd-vae-ft-ema, as a folder of this machine",
    "autoencoder.pretrained.sha256": "yours: sha256sum of its diffusion_pytorch_model.safetensors",
    "extractor.pretrained.uri": "torch-fidelity's file, on this machine",
    "processes": "GPUs of this machine",
    "compute.fused": "kernels for GPUs of NVIDIA: false elsewhere",
    "generate.sampler.precision": "of GPUs of NVIDIA, as released: 'float32' elsewhere",
    "train.ema_half_life_images": "ln 0.5 / ln 0.9999 * 256: a decay of 0.9999 an update of 256",
}
"""Dotted name of a setting -> what is said beside it."""

PARAMETERS = {
    "S/2": (32_963_360, 33_258_272),
    "S/4": (32_945_024, None),
    "S/8": (33_148_160, None),
    "B/2": (130_512_416, 131_102_240),
    "B/4": (130_475_648, None),
    "B/8": (130_881_536, None),
    "L/2": (458_102_816, 458_889_248),
    "L/4": (458_053_760, None),
    "L/8": (458_594_816, None),
    "XL/2": (675_129_632, 676_014_368),
    "XL/4": (675_074_432, None),
    "XL/8": (675_683_072, None),
}
"""Model -> at 256 px, and at 512 px where there is a recipe."""

UNPUBLISHED = "not published"
FIGURE_3 = "read off Figure 3 (80 epochs, no guidance)"
EXPECTED = {
    "S/2": f"FID 61.0, {FIGURE_3}",
    "B/2": "FID 32.85, Table 4; 34.4 in Figure 3, by a sampler that is not told",
    "B/4": "FID 57.54, Table 5",
    "B/8": f"FID 104.2, {FIGURE_3}",
    "L/2": f"FID 17.7, {FIGURE_3}",
    "XL/2": f"FID 15.6, {FIGURE_3}",
}
"""Model at 256 px after 80 epochs -> FID of 50,000 samples."""

RELEASED = (
    "The network keeps the released code's time embedder, which is fed zeros, and the unused half "
    "of its head, so that weights go there and back bit for bit.",
    "bfloat16 in the network while it is trained, where the released code has TF32; weights are "
    "float32 in both. Samples are made in TF32, as released.",
    "Labels of the samples are balanced; the released code draws them.",
)
STEP_OF_B = "Only for B/2 and XL/2 is a step size told: this is that of B/2."
STEP_OF_XL = "The step size is told for 1,400 epochs (Table 2)."


def recipes() -> dict[str, Recipe]:
    """Name -> recipe, in the order in which they are listed."""
    return {recipe.name: recipe for recipe in _all()}


def recipe(name: str) -> Recipe:
    """One of them. Raises ConfigError for another name."""
    known = recipes()
    if name not in known:
        raise ConfigError(f"recipe is {name!r}; it must be one of {', '.join(known)}")
    return known[name]


def _all() -> Iterator[Recipe]:
    for model in PARAMETERS:
        yield _imagenet(model, image_size_px=256)
    yield _headline()
    for model, (_, large) in PARAMETERS.items():
        if large is not None:
            yield _imagenet(model, image_size_px=512)
    yield _cifar10()
    yield _demo()


def latent_shape(config: PipelineConfig) -> tuple[int, int, int]:
    """(C, H, W) of a config's latents, before there are any; weights of others are SD-VAE's."""
    size = config.source.image_size_px
    if config.autoencoder.kind == "identity":
        return config.source.channels, size, size
    if config.autoencoder.kind == "pretrained":
        return SD_VAE_CHANNELS, size // SD_VAE_PIXELS, size // SD_VAE_PIXELS
    fit = config.autoencoder.fit
    side = size // 2 ** (len(fit.widths) - 1)
    return fit.latent_channels, side, side


# -- ImageNet -----------------------------------------------------------------------------------


def _imagenet(model: str, *, image_size_px: int, epochs: int = 80) -> Recipe:
    """A model of the paper, EqM-<model>, on ImageNet."""
    size, patch = model.split("/")
    name = f"{size.lower()}{patch}-{image_size_px}"
    published = EXPECTED.get(model, UNPUBLISHED) if image_size_px == 256 else UNPUBLISHED
    small, large = PARAMETERS[model]
    return Recipe(
        name=name,
        title=f"EqM-{model}",
        config=_imagenet_config(name, size, int(patch), image_size_px, epochs),
        parameters=small if image_size_px == 256 or large is None else large,
        expected=published,
        notes=(*RELEASED, *_step_note(model)),
    )


def _step_note(model: str) -> tuple[str, ...]:
    if model == "B/2":
        return ()
    return (STEP_OF_XL if model.startswith("XL") else STEP_OF_B,)


def _imagenet_config(
    name: str, size: str, patch: int, image_size_px: int, epochs: int
) -> PipelineConfig:
    network = replace(NetworkConfig.size(size, patch=patch), time="constant", second_head=True)
    step_size = 0.0017 if size == "XL" else 0.003
    return PipelineConfig(
        name=name,
        source_uri="/data/ILSVRC2012",
        source=SourceConfig(
            kind="imagenet",
            image_size_px=image_size_px,
            channels=3,
            mirror=True,
            held_out_fraction=0.0,
        ),
        autoencoder=AutoencoderConfig(
            kind="pretrained",
            pretrained=PretrainedFile(uri="/data/sd-vae-ft-ema", sha256=UNKNOWN_DIGEST),
        ),
        extractor=inception(),
        network=network,
        train=TrainConfig(
            images=epochs * UPDATES_AN_EPOCH * 256,
            batch_size=256,
            learning_rate=1e-4,
            ema_half_life_images=HALF_LIFE,
            precision="bfloat16",
        ),
        generate=GenerateConfig(
            samples=50_000,
            sampler=SamplerConfig(rule="gd", step_size=step_size, updates=249, precision="tf32"),
        ),
        policy=PolicyConfig(name=name),
        checkpoints=EVERY_EPOCH,
        compute=ON_GPUS,
        processes=8,
    )


def _headline() -> Recipe:
    """The paper's best model: XL/2 for 1,400 epochs, guided."""
    base = _imagenet("XL/2", image_size_px=256, epochs=1400)
    name = f"{base.name}-1400"
    sampler = SamplerConfig(
        rule="nag",
        step_size=0.0017,
        momentum=0.3,
        updates=249,
        guidance=1.5,
        guidance_channels=3,
        precision="tf32",
    )
    config = replace(
        base.config,
        name=name,
        generate=replace(base.config.generate, sampler=sampler),
        policy=PolicyConfig(name=name),
    )
    return replace(
        base, name=name, config=config, expected="FID 1.90, Table 1 and Table 2", notes=RELEASED
    )


def inception() -> ExtractorConfig:
    """The features of FID."""
    file = PretrainedFile(
        uri="/data/weights-inception-2015-12-05-6726825d.pth", sha256=INCEPTION_SHA256
    )
    return ExtractorConfig(kind="inception", pretrained=file)


# -- pixels -------------------------------------------------------------------------------------


def _cifar10() -> Recipe:
    """The U-Net on 32 px."""
    config = PipelineConfig(
        name="cifar10",
        source_uri="/data/cifar10/plain_text",
        source=SourceConfig(
            kind="parquet",
            image_size_px=32,
            channels=3,
            mirror=True,
            held_out_fraction=0.02,
            image_column="img",
        ),
        autoencoder=AutoencoderConfig(kind="identity"),
        extractor=inception(),
        network=NetworkConfig(
            kind="unet",
            unet=UNetConfig(widths=(256, 256, 256), layers=4, attention=(1,), head_width=64),
        ),
        train=TrainConfig(
            images=100_000_000,
            batch_size=256,
            learning_rate=1e-4,
            warmup_images=1_280_000,
            ema_half_life_images=HALF_LIFE,
            precision="bfloat16",
        ),
        generate=GenerateConfig(samples=50_000, sampler=SamplerConfig(rule="gd", precision="tf32")),
        policy=PolicyConfig(name="cifar10"),
        checkpoints=EVERY_EPOCH,
        processes=8,
    )
    return Recipe(
        name="cifar10",
        title="U-Net, 32 px",
        config=config,
        parameters=66_634_243,
        expected="FID 3.36, Table 8, for another U-Net, of facebookresearch/flow_matching",
        notes=(
            "The paper tells neither its U-Net's settings, nor its length, nor its lambda: the "
            "shape, the rate and the length here are this project's, without dropout, untried.",
            "With labels; the paper's is taken to be without.",
            "source_uri must hold the training split alone (docs/data.md); 2 % of it is held out.",
        ),
    )


def _demo() -> Recipe:
    return Recipe(
        name="demo",
        title="digits, 16 px",
        config=demo(),
        parameters=310_928,
        expected="no figure of the paper: docs/LOG.md has ours",
        notes=("The preset `demo`, written out.",),
    )


# -- as a file ----------------------------------------------------------------------------------


def to_toml(chosen: Recipe) -> str:
    """The config file of a recipe: what differs from every default, with its notes above it."""
    images = chosen.config.train.images
    lines = [
        f"# {chosen.title}: {chosen.parameters:,} parameters, {images:,} images",
        f"# Expect: {chosen.expected}",
        *(line for note in chosen.notes for line in _comment(note)),
        "",
        'preset = "defaults"',
    ]
    settings = _differences(to_json(PipelineConfig()), to_json(chosen.config))
    table = ""
    for dotted, value in sorted(settings.items(), key=lambda item: "." in item[0]):
        parent, _, key = dotted.rpartition(".")
        if parent != table:
            lines += ["", f"[{parent}]"]
            table = parent
        said = f"  # {EDIT[dotted]}" if dotted in EDIT and chosen.name != "demo" else ""
        lines.append(f"{key} = {json.dumps(value)}{said}")
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 98, initial_indent="# ", subsequent_indent="#   ")


def _differences(base: Any, changed: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted name -> value of what is not as in ``base``, the settings of a table together."""
    plain: dict[str, Any] = {}
    deeper: dict[str, Any] = {}
    for key, value in changed.items():
        before = cast("dict[str, Any]", base or {}).get(key)
        if isinstance(value, dict):
            deeper |= _differences(before, cast("dict[str, Any]", value), f"{above}{key}.")
        elif value is not None and value != before:
            plain[f"{above}{key}"] = value
    return plain | deeper
