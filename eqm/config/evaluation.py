"""Configs of samples and of what is measured on them, images out of distribution among it."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from eqm.config.checks import (
    LARGEST_SAMPLE_SEED,
    fraction,
    is_day,
    is_plain_name,
    is_sha256,
    known,
    positive,
)
from eqm.errors import require
from eqm.policy import MethodScore
from eqm.records import LATER


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
        known(self, "sampler")
        positive(self, "sampler", "step_size", "updates", "batch_size")
        below = self.stop_below
        require(below is None or below > 0, "sampler.stop_below", below, "greater than 0, or null")
        fraction(self, "sampler", "momentum")
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
    the paper's Figure 10 starts from partly noised images (eqm.starts). More samples than such
    images repeat them, which makes distances too large."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    keep_images: int = 10_000
    """The first so many images are sealed beside the features of all, part by part."""
    trajectory_points: int = 8
    """Moments of the descent that are shown, from noise to sample."""

    def __post_init__(self) -> None:
        known(self, "generate")
        positive(self, "generate", "samples", "trajectory_points")
        require(self.keep_images >= 0, "generate.keep_images", self.keep_images, "0 or greater")
        level = self.noise_level
        require(0 <= level <= 1, "generate.noise_level", level, "from 0 to 1")
        whole = level == 1 or self.sampler.stop_below is None
        rule = "1 for samples that stop by generate.sampler.stop_below"
        require(whole, "generate.noise_level", level, rule)
        most = LARGEST_SAMPLE_SEED + 1
        require(self.samples <= most, "generate.samples", self.samples, f"at most {most}")
        last = most - self.samples
        rule = (
            f"0 or greater, and at most {last} with generate.samples {self.samples}: seeds of "
            f"samples end at {LARGEST_SAMPLE_SEED}"
        )
        require(0 <= self.first_seed <= last, "generate.first_seed", self.first_seed, rule)


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
        named = is_plain_name(self.name) and self.name != IN_DISTRIBUTION
        rule = f"lower-case letters, digits and dashes, at most 40, and not {IN_DISTRIBUTION!r}"
        require(named, "evaluate.ood.sets.name", self.name, rule)
        known(self, where)
        if self.kind not in SET_SPLITS:
            for name in ("uri", "sha256", "split"):
                rule = f"left out: {self.kind!r} lies in no files"
                require(getattr(self, name) is None, f"{where}.{name}", getattr(self, name), rule)
            return
        require(self.uri is not None, f"{where}.uri", self.uri, "the folder of the files")
        ok = self.sha256 is not None and is_sha256(self.sha256)
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
        positive(self, section, *names)
        require(self.images >= 2, f"{section}.images", self.images, "at least 2")
        share = self.pca_variance
        require(0 < share < 1, f"{section}.pca_variance", share, "between 0 and 1")
        set_names = tuple(one.name for one in self.sets)
        for name, values, allowed in (
            ("sets", set_names, set_names),
            ("scores", self.scores, get_args(MethodScore)),
            ("baselines", self.baselines, get_args(Baseline)),
        ):
            once = len(set(values)) == len(values) and set(values) <= set(allowed)
            rule = "different names" if name == "sets" else f"some of {allowed}, each once"
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
        positive(self, "evaluate", "neighbours", "grid_rows")
        day = self.as_of
        require(day is None or is_day(day), "evaluate.as_of", day, "a day, as 2026-01-31")
