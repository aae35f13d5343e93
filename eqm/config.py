"""Typed configuration of a pipeline and of each stage, checked when it is built.

A run is one frozen :class:`PipelineConfig`. Each stage is handed only the part its output depends
on, because that part is hashed into the address of its record; where things lie and how fast they
run is :class:`Runtime`, which is hashed into nothing. Presets are functions. Counts are in images.
"""

import dataclasses
import datetime
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast, get_args, get_origin, get_type_hints

from eqm.errors import ConfigError, require
from eqm.names import kind_of
from eqm.policy import MethodScore, PolicyConfig
from eqm.records import LATER, Ref, from_json, to_json

ALGORITHMS = {
    "autoencoder": 1,
    "extractor": 1,
    "latents": 2,
    "train": 1,
    "samples": 4,
    "reference": 1,
    "evaluation": 6,
    "study": 2,
}
"""Stage -> number that is raised when the stage's output for the same input would change."""

PROGRAMS = {
    "autoencoder": "eqm.fit",
    "extractor": "eqm.fit",
    "latents": "eqm.encode",
    "train": "eqm.train",
    "samples": "eqm.generate",
    "reference": "eqm.reference",
    "evaluation": "eqm.evaluate",
    "study": "eqm.study",
}
"""Stage -> module that is run as a program, ``python -m MODULE CONFIG.json``."""


def _known(config: Any, section: str) -> None:
    """Refuse what is none of a field's choices, or no number: Python itself would let it pass."""
    kind: type[Any] = config.__class__
    for name, hint in get_type_hints(kind).items():
        place, value = f"{section}.{name}", getattr(config, name)
        if get_origin(hint) is Literal:
            choices = get_args(hint)
            require(value in choices, place, value, f"one of {choices}")
        elif hint in (int, int | None):
            ok = (value is None and hint is not int) or _is_number(value, int)
            require(ok, place, value, "a whole number")
        elif hint in (float, float | None):
            ok = (value is None and hint is not float) or _is_number(value, (int, float))
            require(ok, place, value, "a number")


def _is_number(value: object, kinds: type | tuple[type, ...]) -> bool:
    """Whether it is one, and True and False are none."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def _positive(config: Any, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name}", value, "greater than 0")


def _fraction(config: Any, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 <= value < 1, f"{section}.{name}", value, "at least 0 and less than 1")


def _is_day(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)


def _is_plain_name(text: str) -> bool:
    return bool(re.fullmatch("[a-z0-9]([a-z0-9-]{0,39})", text))


def _seed(config: Any, section: str, name: str = "seed") -> None:
    value = getattr(config, name)
    require(0 <= value < 2**63, f"{section}.{name}", value, "from 0 to 2**63 - 1")


# -- data ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which images, at what size, and how they are split."""

    kind: Literal["digits", "folder", "imagenet", "webdataset", "parquet"] = "digits"
    """What lies at ``source_uri``, on this machine or under s3://: "folder": one folder of images a
    class; "imagenet": the tars of ILSVRC2012 as distributed; "webdataset": tars of images with
    labels beside them; "parquet": files with a column of image bytes. "digits": the 1,797 of
    scikit-learn, from nowhere."""
    image_size_px: int = 16
    channels: int = 1
    """1 (grayscale) or 3 (RGB)."""
    mirror: bool = False
    """Whether the left-right mirror of an image is an image of its class as well."""
    held_out_fraction: float = 0.2
    """Share of the keys kept from training, chosen by a hash of the key. For "imagenet", 0 keeps
    the official validation images, which must be there; a share is one of the training images,
    and is refused where validation images lie beside them."""
    split_seed: int = 0
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """What to do about images that cannot be decoded. Skipped ones are named in the manifest."""
    exif_rotation: bool = False
    """Whether images are turned upright as their EXIF says, before the crop. ADM, and so the
    reference batches of the field, ignore it."""
    image_column: str = "image"
    """Of "parquet": image bytes, or a struct with a field ``bytes``, as Hugging Face writes it."""
    label_column: str = "label"
    """Of "parquet": integers from 0, or names of classes."""

    def __post_init__(self) -> None:
        require(self.channels in (1, 3), "source.channels", self.channels, "1 or 3")
        size = self.image_size_px
        require(4 <= size <= 4096, "source.image_size_px", size, "from 4 to 4096")
        _fraction(self, "source", "held_out_fraction")
        _seed(self, "source", "split_seed")
        require(
            not (self.kind == "digits" and self.mirror),
            "source.mirror",
            self.mirror,
            "false for digits: a mirrored digit is not a digit",
        )
        require(
            not (self.kind == "digits" and self.exif_rotation),
            "source.exif_rotation",
            self.exif_rotation,
            "false for digits: they have no EXIF",
        )
        for name, default in (("image_column", "image"), ("label_column", "label")):
            value = getattr(self, name)
            rule = f"{default!r}, or source.kind 'parquet'"
            require(self.kind == "parquet" or value == default, f"source.{name}", value, rule)
            require(value != "", f"source.{name}", value, "the name of a column")
        columns = (self.image_column, self.label_column)
        require(len(set(columns)) == 2, "source.label_column", columns[1], "another column")


@dataclass(frozen=True, kw_only=True)
class AutoencoderFit:
    """How a small AutoencoderKL is fitted where no pretrained one is given."""

    latent_channels: int = 4
    widths: tuple[int, ...] = (16, 32)
    """Channels of each resolution; every one after the first halves the size."""
    images: int = 20_000
    batch_size: int = 32
    learning_rate: float = 4e-3
    kl_weight: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        section = "autoencoder.fit"
        _positive(self, section, "latent_channels", "images", "batch_size", "learning_rate")
        require(len(self.widths) > 0, f"{section}.widths", self.widths, "at least one width")
        for width in self.widths:
            require(width > 0 and width % 8 == 0, f"{section}.widths", width, "multiples of 8")
        require(self.kl_weight >= 0, f"{section}.kl_weight", self.kl_weight, "0 or greater")
        _seed(self, section)


@dataclass(frozen=True, kw_only=True)
class PretrainedFile:
    """Weights that somebody else made: where they lie and what they must hash to."""

    uri: str
    """A local path, an s3:// URI, or a hub id."""
    sha256: str
    """Of the weights file; checked before it is parsed."""
    revision: str | None = None
    """Commit of the hub repository; required for a hub id."""

    def __post_init__(self) -> None:
        ok = _is_sha256(self.sha256)
        require(ok, "pretrained.sha256", self.sha256, "64 hexadecimal digits, as sha256sum prints")


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """What maps pixels to moments and latents back to pixels."""

    kind: Literal["fit", "identity", "pretrained"] = "fit"
    fit: AutoencoderFit = field(default_factory=AutoencoderFit)
    pretrained: PretrainedFile | None = None

    def __post_init__(self) -> None:
        if self.kind == "pretrained" and self.pretrained is None:
            raise ConfigError(
                "autoencoder.kind is 'pretrained', but autoencoder.pretrained is missing: "
                "give its uri and sha256"
            )


@dataclass(frozen=True, kw_only=True)
class ExtractorFit:
    """How a small feature extractor is fitted where no Inception weights are given."""

    width: int = 32
    dimension: int = 64
    images: int = 24_000
    batch_size: int = 32
    learning_rate: float = 4e-3
    seed: int = 0

    def __post_init__(self) -> None:
        names = ("width", "dimension", "images", "batch_size", "learning_rate")
        _positive(self, "extractor.fit", *names)
        require(self.width % 8 == 0, "extractor.fit.width", self.width, "a multiple of 8")
        _seed(self, "extractor.fit")


INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of torch-fidelity's weights-inception-2015-12-05-6726825d.pth: with these, a distance is an FID.
"""
EXTRACTOR_FILES = {
    "inception": "torch-fidelity's weights-inception-2015-12-05-6726825d.pth",
    "dinov2": "DINOv2's own dinov2_vits14_pretrain.pth, or that of b, l or g, or of a Hugging Face "
    "folder with model.safetensors",
    "clip": "the state dict of CLIP's vision transformer, plain tensors (visual.…), or of a "
    "Hugging Face folder with model.safetensors",
}
"""Kind of extractor -> the file that it needs."""


@dataclass(frozen=True, kw_only=True)
class ExtractorConfig:
    """What maps images to the features that distances are computed on."""

    kind: Literal["fit", "inception", "dinov2", "clip"] = "fit"
    """"fit": a small classifier, fitted on the training images. "inception": the features of FID.
    "dinov2" and "clip": the class token of a vision transformer, as torch-fidelity takes it."""
    fit: ExtractorFit = field(default_factory=ExtractorFit)
    pretrained: PretrainedFile | None = None

    def __post_init__(self) -> None:
        _known(self, "extractor")
        if self.kind != "fit" and self.pretrained is None:
            raise ConfigError(
                f"extractor.kind is {self.kind!r}, but extractor.pretrained is missing: give the "
                f"uri and sha256 of {EXTRACTOR_FILES[self.kind]}"
            )


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """What is kept of the real images that samples are held against, beside moments of them all."""

    keep_features: int = 10_000
    """Images of each side of the split whose features are kept, for KID, precision and recall: as
    many as ADM's reference batches hold. Sources mix their images, so it is the first ones."""
    file: PretrainedFile | None = None
    """A reference batch of ADM (.npz) in place of the training images: its moments ``mu`` and
    ``sigma``, ``mu_s`` and ``sigma_s`` for Inception, its images ``arr_0`` for the rest."""
    file_images: int | None = None
    """Images that the moments in the file were taken of, which it does not say."""

    def __post_init__(self) -> None:
        _positive(self, "reference", "keep_features")
        count, rule = self.file_images, "at least 2 with reference.file, else null"
        ok = count is None or (count >= 2 and self.file is not None)
        require(ok, "reference.file_images", count, rule)


@dataclass(frozen=True, kw_only=True)
class FurtherConfig:
    """Another extractor, under which the same samples are measured as well: ``[further.NAME]``."""

    extractor: ExtractorConfig
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """What is kept of the real images as it sees them."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How images become shards."""

    shard_images: int = 1024
    batch_size: int = 128
    """Images a call of the autoencoder; a batch never spans two shards."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the autoencoder computes in. Moments leave it as float32 and are stored as float16."""

    def __post_init__(self) -> None:
        _known(self, "encode")
        _positive(self, "encode", "shard_images", "batch_size")


# -- model and training -------------------------------------------------------------------------

SIZES = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
"""Name -> (width, depth, heads), as in DiT, SiT and the paper."""


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """A U-Net for small pixel images, where a transformer fails (the paper's CIFAR-10 table)."""

    widths: tuple[int, ...] = (128, 256, 256)
    """Channels of each resolution; every one after the first halves the size."""
    layers: int = 2
    """Residual blocks a resolution."""
    attention: tuple[int, ...] = (1,)
    """Indices into ``widths`` of the resolutions with self-attention; if any, the middle has it."""
    head_width: int = 64
    """Channels of an attention head."""
    groups: int = 32
    """Groups of the group norms; must divide every width."""

    def __post_init__(self) -> None:
        _positive(self, "network.unet", "layers", "head_width", "groups")
        require(len(self.widths) > 0, "network.unet.widths", self.widths, "at least one width")
        for width in self.widths:
            rule = f"multiples of groups ({self.groups})"
            require(width > 0 and width % self.groups == 0, "network.unet.widths", width, rule)
        for level in self.attention:
            rule = f"indices of widths, 0 to {len(self.widths) - 1}"
            require(0 <= level < len(self.widths), "network.unet.attention", level, rule)
            width = self.widths[level]
            for attended in (width, self.widths[-1]):
                rule = f"a divisor of the widths it attends at, the last among them ({attended})"
                fits = attended % self.head_width == 0
                require(fits, "network.unet.head_width", self.head_width, rule)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The network f. EqM's has no time input: the noise level is hidden from it."""

    kind: Literal["transformer", "unet"] = "transformer"
    """"transformer": adaLN-zero blocks over patches. "unet": diffusers' U-Net, for pixels."""
    width: int = 64
    depth: int = 4
    heads: int = 4
    patch: int = 2
    mlp_ratio: float = 4.0
    time: Literal["none", "constant", "conditioned"] = "none"
    """"conditioned": sees gamma, as the baselines do. "constant": an embedder that is fed zeros,
    which is what weights of the official code have."""
    second_head: bool = False
    """A second half of output channels: unused in official weights, h in the inner-product loss."""
    qk_norm: bool = False
    """Normalise queries and keys, with learnt scales."""
    rope: bool = False
    """Rotate queries and keys by row and column, beside the fixed position embedding."""
    swiglu: bool = False
    """A gated MLP with as many weights."""
    rms_norm: bool = False
    """Root-mean-square norms in place of layer norms."""
    unet: UNetConfig = field(default_factory=UNetConfig)

    def __post_init__(self) -> None:
        _known(self, "network")
        _positive(self, "network", "width", "depth", "heads", "patch", "mlp_ratio")
        rule = f"a multiple of 4 and of heads ({self.heads})"
        require(self.width % self.heads == 0 == self.width % 4, "network.width", self.width, rule)
        head = self.width // self.heads
        require(
            not self.rope or head % 4 == 0,
            "network.heads",
            self.heads,
            f"such that width / heads ({head}) is a multiple of 4, for network.rope",
        )

    @staticmethod
    def size(name: str, *, patch: int) -> "NetworkConfig":
        """Sizes of the paper: S, B, L, XL. Raises ConfigError for another name."""
        require(name in SIZES, "network size", name, f"one of {', '.join(SIZES)}")
        width, depth, heads = SIZES[name]
        return NetworkConfig(width=width, depth=depth, heads=heads, patch=patch)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The loss: ||gradient(x_gamma) - (eps - x) c(gamma)||^2 (Eq. 3) and the c of Eqs. 4-6.

    With ``network.time`` it spans the paper's Table 4: a c that vanishes at the data is EqM (or,
    conditioned on gamma, its ablation), a constant one is flow matching.
    """

    c: Literal["constant", "linear", "truncated", "piecewise"] = "truncated"
    """"constant" is flow matching, a baseline: data are no equilibria of it."""
    a: float = 0.8
    """Where the decay begins (truncated, piecewise)."""
    b: float = 1.0
    """Value at gamma = 0 (piecewise)."""
    multiplier: float = 4.0
    """lambda: scales c as a whole."""
    energy: Literal["implicit", "dot", "l2"] = "implicit"
    loss: Literal["gradient", "inner-product", "norms"] = "gradient"
    """"gradient" is Eq. 3. The others are ablations that circulate as summaries of the paper:
    (f . h - ||t||^2)^2 with a second head h, and (||f|| - ||t||)^2, for the target t."""
    backward: Literal["directional", "double"] = "directional"
    """How the loss of an explicit energy reaches the weights: through the energy's difference
    along the residual, which is faster and smaller wherever it was measured (docs/LOG.md), or
    through a double backward, which is exact."""
    difference: float | None = None
    """Step of the directional way, in shares of the norm of x; null: by precision."""
    dispersive_weight: float = 0.0
    """Weight of the dispersive loss on hidden tokens; the paper uses none."""
    dispersive_group: int = 16
    """Consecutive images that are pushed apart; a multiple of it goes to every process."""

    def __post_init__(self) -> None:
        _known(self, "objective")
        _fraction(self, "objective", "a")
        _positive(self, "objective", "multiplier", "dispersive_group")
        require(self.b >= 0, "objective.b", self.b, "0 or greater")
        piecewise_ok = self.c != "piecewise" or self.a > 0
        require(piecewise_ok, "objective.a", self.a, "greater than 0 for a piecewise c")
        step, weight = self.difference, self.dispersive_weight
        require(step is None or 0 < step < 1, "objective.difference", step, "in (0, 1), or null")
        require(weight >= 0, "objective.dispersive_weight", weight, "0 or greater")
        implicit = self.energy == "implicit"
        rule = "'gradient' for an explicit energy: the ablations read f itself"
        require(implicit or self.loss == "gradient", "objective.loss", self.loss, rule)
        rule = "0 for an explicit energy"
        require(implicit or weight == 0, "objective.dispersive_weight", weight, rule)

    @property
    def is_equilibrium(self) -> bool:
        """Whether c(1) = 0, so that data are where the gradient vanishes."""
        return self.c != "constant"


SNAPSHOTS = 32
"""Of power-function averages, in a run that does not say how often they are kept."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation: AdamW at a constant rate, EMA, label dropout (paper, appendix A).

    Defaults are for digits; the paper's numbers are in eqm.recipes.
    """

    images: int = 200_000
    """Length of the run."""
    batch_size: int = 128
    """Global: over all processes."""
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_images: int = 0
    """The rate rises linearly over the first so many images."""
    decay_fraction: float = 0.0
    """The rate falls linearly to zero over this last part of the run; 0 keeps it constant."""
    gradient_clip: float | None = None
    ema_half_life_images: float = 10_000.0
    """Of the averages that everything downstream uses."""
    ema_tracks: tuple[float, ...] = ()
    """Half-lives, in images, of further averages that are sealed beside those."""
    ema_power: tuple[float, ...] = ()
    """Relative lengths (sigma_rel) of power-function averages, from whose snapshots that of any
    other length is reconstructed afterwards (`eqm ema`): two, as (0.05, 0.1), serve well."""
    ema_snapshot_images: int | None = None
    """Images between two snapshots of them; null: 32 snapshots a run. The last is at its end."""
    label_dropout: float = 0.1
    """Probability of the null label; 0 gives a model without guidance."""
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    """What the network computes in; weights, averages and losses are float32. "tf32" is float32
    whose products a GPU takes in TF32, as the released code does; "float32" never does. "float16"
    is float32 whose products a CPU with AVX512-FP16 takes in float16 (eqm.kernels.halves)."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do about an update whose loss or gradient is not finite. It never reaches the
    weights; "skip" goes on without it, and counts it, unless all of a point of the curve are so, or
    the last 500 of a longer one."""
    init_from: PretrainedFile | None = None
    """Weights to begin from: of a sealed training (``ema.safetensors``), or an official or SiT
    checkpoint (``.pt``). The autoencoder and the shapes must be the same."""
    seed: int = 0

    def __post_init__(self) -> None:
        _known(self, "train")
        _positive(self, "train", "images", "batch_size", "learning_rate", "ema_half_life_images")
        _fraction(self, "train", "label_dropout")
        require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "0 or greater")
        require(self.warmup_images >= 0, "train.warmup_images", self.warmup_images, "0 or greater")
        decay = self.decay_fraction
        require(0 <= decay <= 1, "train.decay_fraction", decay, "from 0 to 1")
        clip = self.gradient_clip
        require(clip is None or clip > 0, "train.gradient_clip", clip, "greater than 0, or null")
        require(all(0 <= b < 1 for b in self.betas), "train.betas", self.betas, "in [0, 1)")
        _seed(self, "train")
        self._check_averages()

    def _check_averages(self) -> None:
        for name, longest, rule in (
            ("ema_tracks", math.inf, "half-lives greater than 0"),
            # That of the mean of all weights; a longer average would favour the earliest.
            ("ema_power", 12**-0.5, "relative lengths, greater than 0 and at most 12 ** -0.5"),
        ):
            values: tuple[float, ...] = getattr(self, name)
            for value in values:
                require(0 < value <= longest, f"train.{name}", value, rule)
            once = len(set(values)) == len(values)
            require(once, f"train.{name}", values, "different ones, each named once")
        every = self.ema_snapshot_images
        ok = every is None or every > 0
        require(ok, "train.ema_snapshot_images", every, "greater than 0, or null")

    @property
    def snapshots(self) -> tuple[int, ...]:
        """Positions, in images, after whose update the power-function averages are kept.

        Those of the first updates that reach a multiple of the interval, and of the last one.
        """
        if not self.ema_power:
            return ()
        updates, every = self.updates, self.ema_snapshot_images
        if every is None:
            # Rounded up, for an update counts whole.
            ends = {-(-k * updates // SNAPSHOTS) for k in range(1, SNAPSHOTS + 1)}
        else:
            count = updates * self.batch_size // every
            ends = {-(-k * every // self.batch_size) for k in range(1, count + 1)}
        return tuple(sorted(end * self.batch_size for end in {*ends, updates}))

    @property
    def updates(self) -> int:
        """Optimiser updates in all; the last one may pass ``images`` by part of a batch."""
        return math.ceil(self.images / self.batch_size)


def check_fit(network: NetworkConfig, objective: ObjectiveConfig) -> None:
    """Refuse a network that cannot serve an objective. Raises ConfigError."""
    inner = objective.loss == "inner-product"
    require(
        not inner or network.second_head,
        "network.second_head",
        network.second_head,
        "true for objective.loss 'inner-product'",
    )
    transformer = network.kind == "transformer"
    for name, unused in (
        ("objective.dispersive_weight", objective.dispersive_weight == 0),
        ("network.second_head", not network.second_head),
    ):
        require(transformer or unused, "network.kind", network.kind, f"'transformer' for {name}")


def method(network: NetworkConfig, objective: ObjectiveConfig) -> str:
    """What a model is called: EqM or one of the paper's baselines (Table 4, Table 5)."""
    conditioned = network.time == "conditioned"
    if not objective.is_equilibrium:
        return "flow matching" if conditioned else "noise-unconditional flow matching"
    name = {"implicit": "EqM", "dot": "EqM-E (dot)", "l2": "EqM-E (L2)"}[objective.energy]
    return f"noise-conditioned {name}" if conditioned else name


# -- sampling, evaluation, promotion ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Descent: x <- x - step_size * gradient (NAG: the gradient is taken ahead, section 3.3)."""

    rule: Literal["gd", "nag", "heavy-ball", "barzilai-borwein", "adam", "euler", "heun"] = "nag"
    """"euler" and "heun" integrate the ODE over gamma, as flow matching needs."""
    step_size: float = 0.003
    """Of the first update, for "barzilai-borwein"."""
    momentum: float = 0.3
    """Of "nag" and "heavy-ball"."""
    updates: int = 249
    """Updates at most, not the "steps" of the released code, which are one more."""
    stop_below: float | None = None
    """Stop a sample when the norm of its gradient falls below this (Algorithm 2); null: never."""
    guidance: float = 1.0
    guidance_channels: int | None = None
    """Guide only the first so many channels (3 reproduces the released numbers); null: all."""
    batch_size: int = 256
    precision: Literal["float32", "tf32", "bfloat16"] = field(
        default="float32", metadata={LATER: True}
    )
    """Of the network's products on the way down; samples are float32 in any. "tf32" is for GPUs of
    NVIDIA, on which both others are some times as fast as "float32"."""

    def __post_init__(self) -> None:
        _known(self, "sampler")
        _positive(self, "sampler", "step_size", "updates", "batch_size")
        below = self.stop_below
        require(below is None or below > 0, "sampler.stop_below", below, "greater than 0, or null")
        _fraction(self, "sampler", "momentum")
        require(self.guidance >= 0, "sampler.guidance", self.guidance, "0 or greater")
        channels = self.guidance_channels
        ok = channels is None or channels > 0
        require(ok, "sampler.guidance_channels", channels, "greater than 0, or null")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Which samples are generated."""

    samples: int = 1797
    first_seed: int = 0
    labels: Literal["balanced", "random"] = "balanced"
    """"balanced": sample s has label s modulo the number of classes. "random": a label drawn for s,
    as of images of classes that are equally frequent."""
    noise_level: float = 1.0
    """Of the starts: 1 is noise; below, the rest is held-out images, each with its own label, as
    the paper's Figure 10 starts from partly noised images (eqm.starts)."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    keep_images: int = 10_000
    """The first so many images are sealed beside the features of all, part by part."""
    trajectory_points: int = 8
    """Moments of the descent that are shown, from noise to sample."""

    def __post_init__(self) -> None:
        _known(self, "generate")
        _positive(self, "generate", "samples", "trajectory_points")
        require(self.keep_images >= 0, "generate.keep_images", self.keep_images, "0 or greater")
        level = self.noise_level
        require(0 <= level <= 1, "generate.noise_level", level, "from 0 to 1")
        whole = level == 1 or self.sampler.stop_below is None
        rule = "1 for samples that stop by generate.sampler.stop_below"
        require(whole, "generate.noise_level", level, rule)
        _seed(self, "generate", "first_seed")


SetKind: TypeAlias = Literal[
    "photographs",
    "constant",
    "flipped",
    "shuffled",
    "interpolated",
    "folder",
    "cifar10",
    "svhn",
    "dtd",
]
Baseline: TypeAlias = Literal[
    "pixel_gaussian", "pixel_pca", "feature_gaussian", "feature_neighbours"
]
SET_SPLITS: dict[str, tuple[str, ...]] = {
    "folder": (),
    "cifar10": ("test", "train"),
    "svhn": ("test", "train", "extra"),
    "dtd": tuple(f"{part}{i}" for part in ("test", "train", "val") for i in range(1, 11)),
}
"""Kinds of sets that lie in files, and their splits; the first is meant where none is named."""
IN_DISTRIBUTION = "held-out"
"""Name of the images that others are told from."""


@dataclass(frozen=True, kw_only=True)
class OODSet:
    """A set of images that are told from held-out ones (eqm.image_sets)."""

    name: str
    """Of lower-case letters, digits and dashes; a policy names the set by it."""
    kind: SetKind
    """Made of what is at hand: crops of scikit-learn's "photographs", "constant" grays; held-out
    images upside down ("flipped"), with their pixels "shuffled", or "interpolated" in pairs. Or in
    files: images of a "folder" at any depth, "cifar10" (binary version), "svhn" (cropped digits),
    "dtd" (Describable Textures)."""
    uri: str | None = None
    """Folder of the files, on this machine or s3://bucket/prefix; in no protocol."""
    sha256: str | None = None
    """Digest of the files, as `eqm data digest` prints it; checked before they are parsed."""
    split: str | None = None
    """Which part of the files: "test" unless given ("test1" for "dtd")."""
    gated: bool = False
    """Whether a policy may read what is found; sets that only inform are never gated."""

    def __post_init__(self) -> None:
        where = f"evaluate.ood.sets[{self.name!r}]"
        named = _is_plain_name(self.name) and self.name != IN_DISTRIBUTION
        rule = f"lower-case letters, digits and dashes, at most 40, and not {IN_DISTRIBUTION!r}"
        require(named, "evaluate.ood.sets.name", self.name, rule)
        _known(self, where)
        if self.kind not in SET_SPLITS:
            for name in ("uri", "sha256", "split"):
                rule = f"left out: {self.kind!r} lies in no files"
                require(getattr(self, name) is None, f"{where}.{name}", getattr(self, name), rule)
            return
        require(self.uri is not None, f"{where}.uri", self.uri, "the folder of the files")
        ok = self.sha256 is not None and _is_sha256(self.sha256)
        rule = f"64 hexadecimal digits, as `eqm data digest {self.kind} {self.uri}` prints them"
        require(ok, f"{where}.sha256", self.sha256, rule)
        splits = SET_SPLITS[self.kind]
        rule = f"one of {', '.join(splits)}" if splits else f"left out: {self.kind!r} has none"
        require(self.split is None or self.split in splits, f"{where}.split", self.split, rule)


def default_sets() -> tuple[OODSet, ...]:
    """Sets that need no files."""
    return (
        OODSet(name="photographs", kind="photographs", gated=True),
        OODSet(name="constant", kind="constant", gated=True),
        OODSet(name="flipped", kind="flipped"),
        OODSet(name="shuffled", kind="shuffled"),
        OODSet(name="interpolated", kind="interpolated"),
    )


@dataclass(frozen=True, kw_only=True)
class OODConfig:
    """Which images are told from held-out ones, and by what (eqm.outliers)."""

    images: int = 360
    """Images of each set at most, held-out ones too. Areas under precision and recall depend on
    the ratio of the two."""
    sets: tuple[OODSet, ...] = field(default_factory=default_sets)
    scores: tuple[MethodScore, ...] = ("gradient_norm", "descent_length", "energy")
    """Of the model; those that it does not have are left out (an energy has only EqM-E). The first
    that it has is the main one, which a policy means by the name of a set alone."""
    baselines: tuple[Baseline, ...] = (
        "pixel_gaussian",
        "pixel_pca",
        "feature_gaussian",
        "feature_neighbours",
    )
    """Fitted on training images: what the model must be held against (eqm.baselines)."""
    descent_updates: int = 50
    """Updates of the descent whose length is a score, by the rule that samples are made with."""
    baseline_images: int = 10_000
    """Training images at most that baselines are fitted on."""
    pca_variance: float = 0.95
    """Share of the variance of pixels that the components of "pixel_pca" hold."""
    neighbours: int = 5
    """The distance to which neighbour is the score of "feature_neighbours"."""

    def __post_init__(self) -> None:
        section = "evaluate.ood"
        names = ("descent_updates", "baseline_images", "neighbours")
        _positive(self, section, *names)
        require(self.images >= 2, f"{section}.images", self.images, "at least 2")
        share = self.pca_variance
        require(0 < share < 1, f"{section}.pca_variance", share, "between 0 and 1")
        set_names = tuple(one.name for one in self.sets)
        for name, values, known in (
            ("sets", set_names, set_names),
            ("scores", self.scores, get_args(MethodScore)),
            ("baselines", self.baselines, get_args(Baseline)),
        ):
            once = len(set(values)) == len(values) and set(values) <= set(known)
            rule = "different names" if name == "sets" else f"some of {known}, each once"
            require(once, f"{section}.{name}", values, rule)
        require(len(self.scores) > 0, f"{section}.scores", self.scores, "at least one score")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured."""

    neighbours: int = 3
    """k of precision and recall."""
    ood: OODConfig = field(default_factory=OODConfig)
    """What lies out of distribution, and how well it is told."""
    grid_rows: int = 8
    """Samples of each class in the report's grid."""
    as_of: str | None = None
    """Date of a scheduled re-evaluation (YYYY-MM-DD); part of what is asked for."""

    def __post_init__(self) -> None:
        _positive(self, "evaluate", "neighbours", "grid_rows")
        day = self.as_of
        require(day is None or _is_day(day), "evaluate.as_of", day, "a day, as 2026-01-31")


# -- the whole, and one stage of it -------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a training step is computed: in no digest, for it changes no result beyond rounding.

    Its place is that of the number of processes and threads, which change bits in the same way: a
    run goes on from its checkpoint on a machine with other memory. Provenance keeps what it was.
    """

    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """"ddp": every process holds all weights. "fsdp2": each holds its share of weights, moments and
    averages, for networks that would not fit. Checkpoints are the same."""
    micro_batch: int | None = None
    """Images of a process in one backward, of which an update then has several; null: its whole
    share of the batch."""
    checkpointing: bool = False
    """Whether the backward computes each block's activations again in place of keeping them."""
    compile: bool = False
    """Whether torch.compile makes kernels of the blocks; on a CPU it needs a C++ compiler."""
    fused: bool = False
    """Whether what a transformer's blocks do between their products are kernels of ours
    (eqm.kernels); on GPUs of NVIDIA alone."""
    attention: Literal["torch", "eqm"] = "torch"
    """Whose kernels mix the tokens of a fused block. "eqm": ours, for up to some hundred tokens in
    bfloat16."""
    timeout_seconds: float = 600.0
    """How long ranks wait for one that stalls before they end, and name it."""

    def __post_init__(self) -> None:
        _known(self, "compute")
        _positive(self, "compute", "timeout_seconds")
        rule = "'torch' where compute.fused is false, for ours is a kernel of a fused block"
        require(self.fused or self.attention == "torch", "compute.attention", self.attention, rule)
        size = self.micro_batch
        require(size is None or size > 0, "compute.micro_batch", size, "greater than 0, or null")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a training makes its state durable: in no digest."""

    every_images: int = 25_600
    keep: int = 3
    """The newest so many stay."""
    grid_every_images: int = 51_200
    """Images between two grids of samples that MLflow is sent."""

    def __post_init__(self) -> None:
        _positive(self, "checkpoints", "every_images", "keep", "grid_every_images")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """A whole run."""

    name: str = "digits"
    """Names the registered model, ``eqm-<name>``."""
    source_uri: str | None = None
    """Where the images lie; in no digest, the listing of the images is."""
    source: SourceConfig = field(default_factory=SourceConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    further: dict[str, FurtherConfig] = field(default_factory=dict)
    """Name -> another extractor, whose numbers stand beside those of the main one: "fd_NAME" beside
    "distance" (eqm.names). Without any, every digest is what it would be if there were no such
    table."""
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    processes: int = 1
    """Processes that encode, train, generate and look at real images; several run under torchrun.
    Where this machine has GPUs, one starts on each at most."""
    threads: int | None = None
    """CPU threads of each process; null: all cores, shared among the processes."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """How training computes its steps; in no digest."""
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When training makes its state durable; in no digest."""
    continue_images: int = 50_000
    """Length of a scheduled training that goes on from the champion, when there are new images."""

    def __post_init__(self) -> None:
        ok = self.name.replace("-", "").isalnum() and self.name.isascii() and len(self.name) <= 60
        require(ok, "name", self.name, "letters, digits and dashes, at most 60")
        require(
            self.source.kind == "digits" or self.source_uri is not None,
            "source_uri",
            self.source_uri,
            "where the images lie (docs/data.md)",
        )
        if re.match(r"[a-zA-Z0-9+.-]+://[^/]*@", self.source_uri or ""):
            # Not shown: what stands before the @ may be a password.
            raise ConfigError("source_uri holds a user or a password: give the bare address")
        _positive(self, "config", "processes", "continue_images")
        check_fit(self.network, self.objective)
        rule = self.generate.sampler.rule
        integrates = self.network.time != "conditioned" or rule in ("euler", "heun")
        wanted = "'euler' or 'heun' for a network that is conditioned on gamma"
        require(integrates, "generate.sampler.rule", rule, wanted)
        require(
            self.threads is None or self.threads > 0,
            "threads",
            self.threads,
            "greater than 0, or null",
        )
        require(
            self.train.batch_size % self.processes == 0,
            "train.batch_size",
            self.train.batch_size,
            f"a multiple of processes ({self.processes})",
        )
        for name in self.further:
            require(_is_plain_name(name), "further", name, "lower-case letters, digits and dashes")
        for key in self.policy.metrics:
            extractor = kind_of(key)[1]
            known = extractor is None or extractor in self.further
            rule = f"of an extractor of [further] ({', '.join(self.further) or 'there are none'})"
            require(known, "policy.metrics", key, rule)
        gated = sorted(one.name for one in self.evaluate.ood.sets if one.gated)
        for name in self.policy.minimum_auroc:
            read = name.partition("/")[0]
            rule = f"of a gated set of evaluate.ood.sets ({', '.join(gated) or 'there are none'})"
            require(read in gated, "policy.minimum_auroc", name, rule)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where things lie and how they run: changes no result, is hashed into no digest."""

    store: str
    """s3://bucket/prefix or a local directory."""
    cache: str | None = None
    """Directory for verified local copies of blobs."""
    cache_bytes: int | None = None
    """How much of them is kept at most; null: all."""
    source_uri: str | None = None
    mlflow_uri: str | None = None
    mlflow_experiment: str = "eqm"
    run_name: str = ""
    device: str = "auto"
    threads: int | None = None
    """CPU threads a process; null: all cores over the local processes."""
    collective_timeout_seconds: float = 600.0
    """How long ranks wait for one that stalls and says nothing."""
    patience_seconds: float = 300.0
    """How long a training asks a store again that is away; at most half of the time above, for the
    others may wait for the rank that asks."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """How a training step is computed."""
    checkpoint_every_images: int = 25_600
    keep_checkpoints: int = 3
    """The newest of a training that stay; older ones are deleted."""
    lease_seconds: float = 30.0
    """A training that is not heard of for so long is taken over by another process that was started
    for it. Less than the default is for tests: a store that answers late would end a training."""
    grid_every_images: int | None = None
    """None: samples are not looked at while training goes on."""
    grid_sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How the grids that training shows are sampled."""
    error_file: str | None = None
    """Where a failed program leaves its message for whoever started it."""
    workers: int | None = None
    """Processes that decode images beside each encoding one; 0 decodes in its own threads, null is
    its share of the cores less one, at least 1."""
    shards: tuple[int, int] | None = None
    """Encode only the shards from the first number to before the second; null: all."""

    def __post_init__(self) -> None:
        _positive(self, "runtime", "collective_timeout_seconds")
        count, span = self.workers, self.shards
        require(count is None or count >= 0, "runtime.workers", count, "0 or greater, or null")
        require(
            self.patience_seconds >= 0,
            "runtime.patience_seconds",
            self.patience_seconds,
            "0 or greater",
        )
        for name in ("keep_checkpoints", "lease_seconds", "checkpoint_every_images"):
            value = getattr(self, name)
            require(value >= 1, f"runtime.{name}", value, "1 or greater")
        ok = span is None or 0 <= span[0] < span[1]
        require(ok, "runtime.shards", span, "a first number and a greater end, or null")


@dataclass(frozen=True, kw_only=True)
class Job:
    """The CONFIG.json of one stage program."""

    stage: str
    config: dict[str, Any]
    inputs: dict[str, Ref]
    runtime: Runtime


@dataclass(frozen=True, kw_only=True)
class AutoencoderStage:
    """Config of stage "autoencoder"."""

    source: SourceConfig
    autoencoder: AutoencoderConfig


@dataclass(frozen=True, kw_only=True)
class ExtractorStage:
    """Config of stage "extractor"."""

    source: SourceConfig
    extractor: ExtractorConfig


@dataclass(frozen=True, kw_only=True)
class LatentsStage:
    """Config of stage "latents"."""

    source: SourceConfig
    encode: EncodeConfig


@dataclass(frozen=True, kw_only=True)
class TrainStage:
    """Config of stage "train"."""

    network: NetworkConfig
    objective: ObjectiveConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        check_fit(self.network, self.objective)


@dataclass(frozen=True, kw_only=True)
class SamplesStage:
    """Config of stage "samples"."""

    generate: GenerateConfig


@dataclass(frozen=True, kw_only=True)
class ReferenceStage:
    """Config of stage "reference"."""

    source: SourceConfig
    reference: ReferenceConfig


@dataclass(frozen=True, kw_only=True)
class EvaluationStage:
    """Config of stage "evaluation"."""

    source: SourceConfig
    evaluate: EvaluateConfig


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """One row of a study: what it changes of the base config, and what was published for it."""

    label: str
    changes: dict[str, Any]
    """Settings by dotted name."""
    published: float | None = None
    """The paper's figure, of another protocol than ours."""
    series: str = ""
    """The line it is a point of, in a picture with lines."""
    x: float | None = None
    """Where on that line."""


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A row of the paper alone."""

    label: str
    published: float


@dataclass(frozen=True, kw_only=True)
class StudyStage:
    """Config of stage "study": all that its table shows beside the numbers (eqm.studies)."""

    study: str
    title: str
    asks: str
    published_as: str
    notes: tuple[str, ...]
    x_label: str
    others: tuple[PublishedRow, ...]
    """Published rows that nothing here corresponds to."""
    rows: tuple[StudyRow, ...]
    seeds: int
    """Repetitions of each row; input "<row>-<repetition>" is an evaluation, unless it failed."""
    base: dict[str, Any]
    """Tables of the config that the rows change."""
    outliers: bool = False
    """Whether its table tells what lies out of distribution as well."""
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """Name of an input that there is none of -> why: that training or its samples diverged."""

    def __post_init__(self) -> None:
        _positive(self, "study", "seeds")
        require(len(self.rows) > 0, "study.rows", self.rows, "at least one row")
        labels = [row.label for row in self.rows]
        require(len(set(labels)) == len(labels), "study.rows", labels, "rows of different labels")


def study_input(row: int, repetition: int) -> str:
    """Name of the input of stage "study" that is one cell of its table."""
    return f"{row:02d}-{repetition:02d}"


# -- presets and files --------------------------------------------------------------------------


def demo() -> PipelineConfig:
    """The 1,797 digits of scikit-learn through a small fitted autoencoder, minutes on two cores."""
    return PipelineConfig(
        name="digits",
        train=TrainConfig(
            images=240_000,
            learning_rate=2e-3,
            warmup_images=6_400,
            decay_fraction=0.5,
            ema_half_life_images=8_000.0,
        ),
        # 100 updates of twice the paper's step: no worse on digits, and done in less than half.
        generate=GenerateConfig(sampler=SamplerConfig(step_size=0.006, updates=100)),
        policy=demo_policy(),
        processes=2,
        # Such small networks gain little from more, and lose all of it on a machine that is shared.
        threads=1,
    )


def demo_policy() -> PolicyConfig:
    """As many samples as there are digits, and floors that a broken model misses."""
    return PolicyConfig(
        name="demo",
        minimum_samples=1797,
        maximum_distance_ratio=1.05,
        minimum_recall=0.3,
        minimum_precision=0.5,
        minimum_label_agreement=0.9,
        minimum_auroc={"photographs": 0.75},
    )


def tiny() -> PipelineConfig:
    """The demo in seconds: every stage real, nothing learnt. For tests and first contact."""
    return PipelineConfig(
        name="tiny",
        autoencoder=AutoencoderConfig(fit=AutoencoderFit(widths=(8, 16), images=640)),
        extractor=ExtractorConfig(fit=ExtractorFit(width=8, dimension=16, images=640)),
        network=NetworkConfig(width=16, depth=1, heads=2),
        train=TrainConfig(images=1280, batch_size=64, ema_half_life_images=320.0),
        generate=GenerateConfig(samples=100, sampler=SamplerConfig(updates=5)),
        evaluate=EvaluateConfig(ood=OODConfig(images=40, descent_updates=3), grid_rows=2),
        policy=PolicyConfig(name="tiny", minimum_samples=100),
    )


OPEN_TABLES = {"minimum_auroc", "metrics", "ood", "further"}

PRESETS: dict[str, Callable[[], PipelineConfig]] = {
    "demo": demo,
    "tiny": tiny,
    # What recipes change: every default as it stands.
    "defaults": PipelineConfig,
}


def pipeline_config(data: Mapping[str, Any]) -> PipelineConfig:
    """Build a pipeline config from a table; ``preset`` names the one it changes (else "demo").

    Raises ConfigError for unknown keys, wrong types and values out of range.
    """
    changes = dict(data)
    preset = changes.pop("preset", "demo")
    require(preset in PRESETS, "preset", preset, f"one of {', '.join(PRESETS)}")
    return from_json(PipelineConfig, _merged(to_json(PRESETS[preset]()), changes))


Table = Mapping[str, Any]


def _merged(base: Table, changes: Table) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        inner = merged.get(key)
        # A table with keys of the user's own is given whole, or none of them could be taken out.
        if isinstance(inner, dict) and isinstance(value, Mapping) and key not in OPEN_TABLES:
            merged[key] = _merged(cast("Table", inner), cast("Table", value))
        else:
            merged[key] = value
    return merged


def with_settings(config: PipelineConfig, settings: Mapping[str, Any]) -> PipelineConfig:
    """Change single settings by dotted name, as ``{"train.images": 1000}``. Raises ConfigError."""
    data = to_json(config)
    for dotted, value in settings.items():
        *path, last = dotted.split(".")
        table: Any = data
        for part in path:
            table = cast("dict[str, Any]", table).get(part) if isinstance(table, dict) else None
        # Tables may be extended by a misspelt key here; from_json refuses it by name below.
        if not isinstance(table, dict):
            raise ConfigError(f"there is no table {'.'.join(path)!r} to set {last!r} in")
        table[last] = value
    return from_json(PipelineConfig, data)


def stage_config(stage: str, config: Mapping[str, Any]) -> Any:
    """Build the typed config of a stage from the JSON of its job. Raises ConfigError."""
    classes = {
        "autoencoder": AutoencoderStage,
        "extractor": ExtractorStage,
        "latents": LatentsStage,
        "train": TrainStage,
        "samples": SamplesStage,
        "reference": ReferenceStage,
        "evaluation": EvaluationStage,
        "study": StudyStage,
    }
    require(stage in classes, "stage", stage, f"one of {', '.join(classes)}")
    return from_json(classes[stage], config, stage)


def replace(config: Any, /, **changes: Any) -> Any:
    """Copy of a frozen config with some fields changed, checked again."""
    return dataclasses.replace(config, **changes)
