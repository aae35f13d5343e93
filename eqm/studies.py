"""The paper's tables as protocols: what each study asks, its rows, and what was published.

A study is data: rows of settings changes against a base config, so that the same study runs on
digits in minutes and on ImageNet at full size. Step sizes, counts and thresholds are told in shares
of the base's own; for the recipe ``b2-256`` they come to what the paper has. What a row needs is
trained, generated and measured by the stages that everything else uses (flows.study), and put into
a table by eqm.study. Pure.

Legend: N updates of the base; eta its step size; d entries of a latent.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from eqm.config import SIZES, PipelineConfig, PublishedRow, StudyRow, StudyStage
from eqm.errors import require
from eqm.records import to_json

Changes: TypeAlias = dict[str, Any]
"""Single settings by dotted name."""

SHARED = ("source", "autoencoder", "extractor", "encode", "evaluate")
"""Tables that no row of a study may change: its numbers would not be of one kind."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """What the rows of a study depart from."""

    config: PipelineConfig
    latent_shape: tuple[int, int, int]
    """(C, H, W) of one latent."""

    @property
    def updates(self) -> int:
        """N."""
        return self.config.generate.sampler.updates

    @property
    def step_size(self) -> float:
        """eta."""
        return self.config.generate.sampler.step_size

    @property
    def reach(self) -> float:
        """N eta: how far a descent goes, which a study of anything else keeps."""
        return self.updates * self.step_size


@dataclass(frozen=True, kw_only=True)
class Study:
    """One question, and the rows that answer it."""

    name: str
    title: str
    asks: str
    """In one sentence."""
    published_as: str
    """What the published figures are of: which table, models, data."""
    rows: Callable[[Base], list[StudyRow]]
    """The first row is the one that others are held against."""
    notes: tuple[str, ...] = ()
    """What a reader must know of how rows were made comparable."""
    x_label: str = ""
    """Of a picture with lines; empty: one line a row."""
    others: tuple[PublishedRow, ...] = ()
    """Published rows that nothing here corresponds to."""
    outliers: bool = False
    """Whether its table tells what lies out of distribution as well."""

    def stage(self, base: Base, seeds: int) -> StudyStage:
        """The study as asked of a base config. Raises ConfigError."""
        rows = tuple(self.rows(base))
        for row in rows:
            for dotted in row.changes:
                table = dotted.partition(".")[0]
                rule = f"no setting of {', '.join(SHARED)}"
                require(table not in SHARED, f"row {row.label!r} of study", dotted, rule)
        asked = to_json(base.config)
        return StudyStage(
            study=self.name,
            title=self.title,
            asks=self.asks,
            published_as=self.published_as,
            notes=self.notes,
            x_label=self.x_label,
            others=self.others,
            rows=rows,
            seeds=seeds,
            outliers=self.outliers,
            base={k: asked[k] for k in ("source", "network", "objective", "train", "generate")},
        )


def of_seed(config: PipelineConfig, seed: int) -> Changes:
    """Settings of one repetition: another training, and other noise to start from.

    Repetition 0 is the base config itself, whose model is shared with every other run of it. Rows
    of one repetition share the noise, so they can be held against each other in pairs.
    """
    generate = config.generate
    return {
        "train.seed": config.train.seed + seed,
        "generate.first_seed": generate.first_seed + seed * generate.samples,
    }


def studies() -> dict[str, Study]:
    """Name -> study, in the order in which they are listed."""
    return {study.name: study for study in STUDIES}


def study(name: str) -> Study:
    """One of them. Raises ConfigError for another name."""
    known = studies()
    require(name in known, "study", name, f"one of {', '.join(known)}")
    return known[name]


# -- settings of rows ---------------------------------------------------------------------------


def _sampler(**settings: Any) -> Changes:
    return {f"generate.sampler.{name}": value for name, value in settings.items()}


def _integrated(updates: int, rule: str = "euler") -> Changes:
    """The ODE from gamma 0 to 1 by so many updates."""
    return _sampler(rule=rule, step_size=1 / updates, updates=updates)


def _flow(*, sighted: bool) -> Changes:
    """Flow matching, conditioned on gamma or blind to it (Eqs. 1 and 2)."""
    seen = {"network.time": "conditioned"} if sighted else {}
    return {**seen, "objective.c": "constant", "objective.multiplier": 1.0}


# -- how a trained model is sampled -------------------------------------------------------------


def _sampler_rows(base: Base) -> list[StudyRow]:
    n, eta = base.updates, base.step_size
    half = max(1, n // 2)
    return [
        StudyRow(
            label="GD",
            changes=_sampler(rule="gd"),
            published=1.93,
        ),
        StudyRow(label="NAG, 0.3", changes=_sampler(rule="nag", momentum=0.3), published=1.90),
        StudyRow(label="Euler (ODE)", changes=_sampler(rule="euler"), published=1.93),
        StudyRow(
            label="Heun (ODE), N / 2 updates",
            changes=_sampler(rule="heun", step_size=base.reach / half, updates=half),
        ),
        StudyRow(label="heavy ball, 0.3", changes=_sampler(rule="heavy-ball", momentum=0.3)),
        StudyRow(
            label="Barzilai-Borwein",
            changes=_sampler(rule="barzilai-borwein", step_size=eta),
        ),
    ]


SAMPLERS = Study(
    name="samplers",
    title="Samplers",
    asks="Which rule of descent gives the best samples of the same model at equal cost?",
    published_as="Table 2: FID of 50,000 samples, EqM-XL/2 and SiT-XL/2, 1,400 epochs of ImageNet "
    "256 px, guidance 1.5, step size 0.0017 (SiT: 0.004)",
    rows=_sampler_rows,
    notes=(
        "Euler's rule on a field that is blind to gamma is gradient descent, so these two rows "
        "must be equal.",
    ),
    others=(
        PublishedRow(label="SiT-XL/2, Euler (ODE)", published=2.10),
        PublishedRow(label="SiT-XL/2, Heun (SDE)", published=2.06),
    ),
)

STEP_SIZES = {0.4: 33.24, 0.7: 32.85, 1.0: 32.96, 1.5: 33.62, 2.0: 34.59, 2.5: 35.81}
"""N eta -> FID of EqM-B/2 (Figure 7, whose step sizes are shares of 0.004 = 1 / 250)."""


def _step_size_rows(base: Base) -> list[StudyRow]:
    return [
        StudyRow(
            label=f"{reach:g} / N",
            series="GD",
            x=reach,
            changes=_sampler(rule="gd", step_size=reach / base.updates),
            published=published,
        )
        for reach, published in STEP_SIZES.items()
    ]


STEP_SIZE = Study(
    name="step-sizes",
    title="Step sizes",
    asks="How much does the step size of gradient descent matter at a fixed number N of updates?",
    published_as="Figure 7: FID of EqM-B/2, 80 epochs of ImageNet 256 px, 250 steps",
    rows=_step_size_rows,
    notes=(
        "Figure 7 also has SiT-B/2, whose FID is 37.11 at 1 / N and 120 or more at every other "
        "step size: flow matching ends at gamma 1, and this project refuses another end.",
    ),
    x_label="step size x updates",
)

STEPS = {25: (56.12, 49.41), 50: (43.34, 41.07), 100: (38.98, 38.00), 250: (None, None)}
"""Steps -> FID by GD and by NAG (Figure 6)."""


def _steps_rows(base: Base) -> list[StudyRow]:
    rows: list[StudyRow] = []
    for series, rule in (("GD", "gd"), ("NAG", "nag")):
        for steps, published in STEPS.items():
            updates = steps - 1
            changes = _sampler(rule=rule, updates=updates, step_size=base.reach / updates)
            rows.append(
                StudyRow(
                    label=f"{series}, {updates} updates",
                    series=series,
                    x=float(updates),
                    changes=changes | (_sampler(momentum=0.3) if rule == "nag" else {}),
                    published=published[rule == "nag"],
                )
            )
    return rows


STEPS_AGAINST_QUALITY = Study(
    name="steps",
    title="Steps against quality",
    asks="How good are samples of few updates, with and without Nesterov's look ahead?",
    published_as="Figure 6: FID on ImageNet 256 px (EqM-B/2, presumably; neither step sizes nor "
    "momentum are told)",
    rows=_steps_rows,
    notes=("Step size times updates is kept. The released code's N steps are N - 1 updates.",),
    x_label="updates",
)

G_MIN = 10 / math.sqrt(4096)
"""The paper's threshold on B/2, whose latents have 4,096 entries, for one of one entry."""
THRESHOLDS = (8.0, 4.0, 2.0, 1.0)


def _adaptive_rows(base: Base) -> list[StudyRow]:
    entries = math.prod(base.latent_shape)
    one = G_MIN * math.sqrt(entries)
    fixed = [
        StudyRow(label="fixed, N updates", changes=_sampler(stop_below=None), published=32.85),
        *(
            StudyRow(
                label=f"fixed, {share:g} N updates",
                changes=_sampler(stop_below=None, updates=round(share * base.updates)),
            )
            for share in (0.75, 0.5)
        ),
    ]
    adaptive = [
        StudyRow(
            label=f"until the norm is below {times * one:.3g}",
            changes=_sampler(stop_below=times * one),
            published=33.79 if times == 1 else None,
        )
        for times in THRESHOLDS
    ]
    return fixed + adaptive


ADAPTIVE = Study(
    name="adaptive",
    title="Adaptive compute",
    asks="What does it cost in quality to end each sample when its gradient is short?",
    published_as="Section 5 and Figure 8: FID of EqM-B/2, ImageNet 256 px; g_min 10 takes about 40 "
    "percent of the field evaluations of 250 steps",
    rows=_adaptive_rows,
    notes=(
        "Thresholds are 8, 4, 2 and 1 times the paper's 10, scaled by the root of the entries "
        "of a latent. No sample takes more than N updates, all at the base's step size.",
    ),
)

NOISE_LEVELS = {
    1.0: (59.6, 59.6),
    0.75: (54.0, 148.5),
    0.5: (29.5, 134.0),
    0.25: (7.6, 152.5),
    0.0: (4.4, 168.5),
}
"""Noise level -> FID of EqM-B/4 and of SiT-B/4 (Figure 10)."""


def _partly_noised_rows(base: Base) -> list[StudyRow]:
    flow = _flow(sighted=True) | _integrated(base.updates)
    return [
        StudyRow(
            label=f"{series}, level {level:g}",
            series=series,
            x=level,
            changes=changes | {"generate.noise_level": level},
            published=published[i],
        )
        for i, (series, changes) in enumerate((("EqM", {}), ("flow matching", flow)))
        for level, published in NOISE_LEVELS.items()
    ]


PARTLY_NOISED = Study(
    name="partly-noised",
    title="Partly noised starts",
    asks="What becomes of images that are only partly noise, when nobody tells the model so?",
    published_as="Figure 10, read off the plot: FID of EqM-B/4 and SiT-B/4, ImageNet 256 px; which "
    "images are noised is not told",
    rows=_partly_noised_rows,
    notes=(
        "Samples start at held-out images, in turn, mixed with noise: level 1 is noise alone, "
        "level 0 the images themselves. Labels are those of the images.",
        "With more samples than held-out images (of digits 400 and 365) some start at the same "
        "image. Below level 1 these are alike, at level 0 exact copies: FD is then too large, KID "
        "is not unbiased, and intervals, which take samples for independent, may be too narrow.",
        "Flow matching takes every start for noise, and integrates from gamma 0 to 1.",
    ),
    x_label="noise level",
)


# -- what is trained ----------------------------------------------------------------------------


def _shape_rows(base: Base) -> list[StudyRow]:
    # Only the product of step size and multiplier matters to a descent.
    descent = _sampler(step_size=base.step_size * base.config.objective.multiplier)
    one: Changes = {"objective.multiplier": 1.0}

    def row(label: str, published: float, **c: Any) -> StudyRow:
        changes = one | descent | {f"objective.{name}": value for name, value in c.items()}
        return StudyRow(label=label, changes=changes, published=published)

    return [
        row("truncated, a 0.8", 38.34, c="truncated", a=0.8),
        row("truncated, a 0.5", 38.98, c="truncated", a=0.5),
        row("truncated, a 0.9", 41.22, c="truncated", a=0.9),
        row("linear", 50.47, c="linear"),
        row("piecewise, a 0.8, b 0.8", 38.84, c="piecewise", a=0.8, b=0.8),
        row("piecewise, a 0.8, b 1.4", 38.75, c="piecewise", a=0.8, b=1.4),
        StudyRow(
            label="constant (blind flow matching)",
            changes=_flow(sighted=False) | _integrated(base.updates),
            published=40.81,
        ),
    ]


C_GAMMA = Study(
    name="c-gamma",
    title="The shape of c(gamma)",
    asks="How should the target vanish toward the data?",
    published_as="Table 3: FID of EqM-B/2, 80 epochs of ImageNet 256 px, lambda 1",
    rows=_shape_rows,
    notes=(
        "Lambda is 1 in all rows, and the step size so many times longer as the base's lambda is. "
        "The constant c is integrated by Euler's rule from gamma 0 to 1.",
    ),
)

MULTIPLIERS = {4: 32.85, 1: 38.3, 2: 35.0, 3: 34.6, 5: 34.7, 6: 35.6}
"""Lambda -> FID (Figure 9)."""


def _multiplier_rows(base: Base) -> list[StudyRow]:
    scaled = base.step_size * base.config.objective.multiplier
    return [
        StudyRow(
            label=f"lambda {value}",
            series="EqM",
            x=float(value),
            changes={"objective.multiplier": float(value), **_sampler(step_size=scaled / value)},
            published=published,
        )
        for value, published in MULTIPLIERS.items()
    ]


MULTIPLIER = Study(
    name="multiplier",
    title="The multiplier lambda",
    asks="How large should the gradient be?",
    published_as="Figure 9, read off the plot but for lambda 4: FID of EqM-B/2, 80 epochs of "
    "ImageNet 256 px",
    rows=_multiplier_rows,
    notes=("Step size times lambda is kept; the paper does not tell its step sizes.",),
    x_label="lambda",
)


def _conditioning_rows(base: Base) -> list[StudyRow]:
    objective, n = base.config.objective, base.updates
    # So that c integrates to 1 over gamma, as whoever is told gamma must be taken from 0 to 1.
    unit = 2 / (1 + objective.a)
    return [
        StudyRow(label="no, truncated c (EqM)", changes={}, published=32.85),
        StudyRow(
            label="no, constant c (blind flow matching)",
            changes=_flow(sighted=False) | _integrated(n),
            published=40.81,
        ),
        StudyRow(
            label="yes, constant c (flow matching)",
            changes=_flow(sighted=True) | _integrated(n),
            published=36.68,
        ),
        StudyRow(
            label="yes, truncated c",
            changes={
                "network.time": "conditioned",
                "objective.c": "truncated",
                "objective.multiplier": unit,
                **_integrated(n),
            },
            published=41.89,
        ),
    ]


NOISE_CONDITIONING = Study(
    name="noise-conditioning",
    title="Noise conditioning",
    asks="Does it help to tell the network how much noise there is, for either c?",
    published_as="Table 4: FID of B/2, 80 epochs of ImageNet 256 px",
    rows=_conditioning_rows,
    notes=(
        "EqM descends as its base config has it; all others are integrated by Euler's rule from "
        "gamma 0 to 1, by as many updates. For that the conditioned, truncated c is scaled to "
        "integrate to 1; how the paper samples this one is not told.",
    ),
)


def _energy_rows(base: Base) -> list[StudyRow]:
    return [
        StudyRow(label=label, changes={"objective.energy": energy}, published=published)
        for label, energy, published in (
            ("none", "implicit", 57.54),
            ("dot product", "dot", 73.40),
            ("squared L2 norm", "l2", 75.53),
        )
    ]


ENERGIES = Study(
    name="energies",
    title="Explicit energies",
    asks="What does it cost in quality to have an energy whose gradient the field truly is?",
    published_as="Table 5: FID of EqM-B/4 (inferred), 80 epochs of ImageNet 256 px",
    rows=_energy_rows,
    notes=(
        "Samples descend the true gradient of the energy. The paper starts L2 from a trained EqM; "
        "here all three start from their own initialisation, L2 from a head that is drawn as well.",
        "Scores of images are of mean latents, without a label; all are high outside. Table 6 has "
        "AUROC 0.55 on SVHN, 0.49 on textures and 1.00 on constant images by the energy of the dot "
        "product, of a model whose data it does not tell.",
    ),
    outliers=True,
)

FIGURE_3 = {"S/2": 61.0, "B/2": 34.4, "L/2": 17.7, "XL/2": 15.6, "B/8": 104.2, "B/4": 57.5}
"""Size and patch -> FID."""


def _size_rows(base: Base) -> list[StudyRow]:
    if base.config.network.kind == "unet":
        return _unet_widths(base)
    return [*_widths(base), *_patches(base)]


def _unet_widths(base: Base) -> list[StudyRow]:
    """A U-Net has no patches, and widths of its own; those that its groups and heads allow."""
    unet = base.config.network.unet
    rows: list[StudyRow] = []
    for times in (4, 2, 8):
        widths = [width * times // 4 for width in unet.widths]
        # Heads are as wide in all rows, so that they differ in one thing.
        attended = [widths[level] for level in unet.attention]
        attended += widths[-1:] if attended else []
        whole = not any(width % unet.groups for width in widths)
        if whole and not any(width % unet.head_width for width in attended):
            label = f"U-Net, widths {', '.join(map(str, widths))}"
            rows.append(StudyRow(label=label, changes={"network.unet.widths": widths}))
    return rows


def _widths(base: Base) -> list[StudyRow]:
    network = base.config.network
    if (network.width, network.depth, network.heads) in SIZES.values():
        return [
            StudyRow(
                label=f"{name}, patch {network.patch}",
                changes={"network.width": w, "network.depth": d, "network.heads": h},
                published=FIGURE_3.get(f"{name}/{network.patch}"),
            )
            for name, (w, d, h) in SIZES.items()
        ]
    return [
        StudyRow(
            label=f"width {network.width * times // 4}, depth {network.depth}",
            changes={"network.width": network.width * times // 4},
        )
        for times in (4, 2, 8)
    ]


def _patches(base: Base) -> list[StudyRow]:
    network, side = base.config.network, base.latent_shape[1]
    known = {width: name for name, (width, _, _) in SIZES.items()}
    return [
        StudyRow(
            label=f"patch {patch}",
            changes={"network.patch": patch},
            published=FIGURE_3.get(f"{known.get(network.width)}/{patch}"),
        )
        for patch in (1, 2, 4, 8)
        if side % patch == 0 and side // patch >= 2 and patch != network.patch
    ]


SIZES_AND_PATCHES = Study(
    name="sizes-patches",
    title="Sizes and patches",
    asks="How does quality grow with the network, and with the number of its tokens?",
    published_as="Figure 3, read off the plot: FID of EqM, 80 epochs of ImageNet 256 px",
    rows=_size_rows,
    notes=("All sizes have the base's schedule and step size.",),
)


def _flow_rows(base: Base) -> list[StudyRow]:
    rows: list[StudyRow] = []
    for n in (base.updates, base.updates // 2):
        flow, half = _flow(sighted=True), max(1, n // 2)
        full = n == base.updates
        rows += [
            StudyRow(
                label=f"EqM, {n} evaluations",
                changes=_sampler(updates=n, step_size=base.reach / n),
                published=1.90 if full else None,
            ),
            StudyRow(
                label=f"flow matching, Euler, {n}",
                changes=flow | _integrated(n),
                published=2.10 if full else None,
            ),
            StudyRow(
                label=f"flow matching, Heun, {2 * half}",
                changes=flow | _integrated(half, "heun"),
            ),
        ]
    return rows


EQM_VS_FLOW = Study(
    name="eqm-vs-flow",
    title="EqM against flow matching",
    asks="Same network, data, images and field evaluations: which method gives better samples?",
    published_as="Tables 1 and 2: FID of 50,000 samples, EqM-XL/2 and SiT-XL/2 (250 steps), 1,400 "
    "epochs of ImageNet 256 px, guidance 1.5",
    rows=_flow_rows,
    notes=(
        "Flow matching is conditioned on gamma and has c = 1. Its rows differ from EqM's in "
        "objective and conditioning, and in the sampler that each needs; in nothing else.",
        "Neither method was tuned here beyond the base config, whose rate, length and step size "
        "were chosen with EqM.",
    ),
    others=(
        PublishedRow(label="SiT-XL/2, Heun (SDE)", published=2.06),
        PublishedRow(label="StyleGAN-XL", published=2.30),
        PublishedRow(label="VDM++", published=2.12),
        PublishedRow(label="DiT-XL/2", published=2.27),
    ),
)

STUDIES = (
    SAMPLERS,
    STEP_SIZE,
    STEPS_AGAINST_QUALITY,
    ADAPTIVE,
    PARTLY_NOISED,
    C_GAMMA,
    MULTIPLIER,
    NOISE_CONDITIONING,
    ENERGIES,
    SIZES_AND_PATCHES,
    EQM_VS_FLOW,
)
