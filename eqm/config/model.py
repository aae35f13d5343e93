"""Configs of a model and its training: network, objective, optimisation."""

import math
from dataclasses import dataclass, field
from typing import Literal

from eqm.config.checks import fraction, known, positive, seed_in_range
from eqm.config.data import PretrainedFile
from eqm.errors import require

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
        positive(self, "network.unet", "layers", "head_width", "groups")
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
        known(self, "network")
        positive(self, "network", "width", "depth", "heads", "patch", "mlp_ratio")
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
        known(self, "objective")
        fraction(self, "objective", "a")
        positive(self, "objective", "multiplier", "dispersive_group")
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
        known(self, "train")
        positive(self, "train", "images", "batch_size", "learning_rate", "ema_half_life_images")
        fraction(self, "train", "label_dropout")
        require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "0 or greater")
        require(self.warmup_images >= 0, "train.warmup_images", self.warmup_images, "0 or greater")
        decay = self.decay_fraction
        require(0 <= decay <= 1, "train.decay_fraction", decay, "from 0 to 1")
        clip = self.gradient_clip
        require(clip is None or clip > 0, "train.gradient_clip", clip, "greater than 0, or null")
        require(all(0 <= b < 1 for b in self.betas), "train.betas", self.betas, "in [0, 1)")
        seed_in_range(self, "train")
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
