"""How well a score tells out-of-distribution images from in-distribution ones.

By convention the out-of-distribution (OOD) image has the HIGHER score: energy, gradient norm. Ties
count one half. This module computes no scores (eqm.outliers does, and calls this) and decides
nothing. Legend: K in-distribution scores, L out-of-distribution scores.

The false-positive rate at 95 % true positives goes under two definitions in the literature, which
disagree; precision and recall depend on the side called positive as well, and on the ratio L : K.
Both sides are therefore named: ``positive="out"`` (OpenOOD) or ``positive="in"`` (Hendrycks and
Gimpel 2017; Liu et al. 2020).
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eqm.config import require
from eqm.errors import DataError

Array: TypeAlias = NDArray[np.float64]
Side: TypeAlias = Literal["out", "in"]

NORMAL_975 = 1.959963984540054
"""97.5 % point of the standard normal distribution."""


@dataclass(frozen=True, kw_only=True)
class OODResult:
    """What one score says about one set of OOD images."""

    in_count: int
    out_count: int
    auroc: float
    auroc_interval: tuple[float, float]
    """DeLong 95 % interval, cut to [0, 1]; of zero width where the two sets are separated."""
    aupr_out: float
    aupr_in: float
    fpr95_out: float
    """Share of in-distribution images flagged by the threshold that flags 95 % of OOD images."""
    fpr95_in: float
    """Share of OOD images passed by the threshold that passes 95 % of in-distribution images."""


def compare(in_scores: ArrayLike, out_scores: ArrayLike) -> OODResult:
    """All measures of the scores (K,) and (L,), K and L at least 2 for the interval.

    Raises DataError for NaN, infinities, other shapes or too few scores.
    """
    inside, outside = _scores(in_scores, out_scores, at_least=2)
    area, low, high = _delong(inside, outside)
    return OODResult(
        in_count=len(inside),
        out_count=len(outside),
        auroc=area,
        auroc_interval=(low, high),
        aupr_out=aupr(inside, outside, positive="out"),
        aupr_in=aupr(inside, outside, positive="in"),
        fpr95_out=fpr_at_95_tpr(inside, outside, positive="out"),
        fpr95_in=fpr_at_95_tpr(inside, outside, positive="in"),
    )


def auroc(in_scores: ArrayLike, out_scores: ArrayLike) -> float:
    """Probability that an OOD image scores higher than an in-distribution one; ties are one half.

    The Mann-Whitney statistic. It is the same whichever side is called positive.
    """
    inside, outside = _scores(in_scores, out_scores)
    # In twice the count, ties are integers: the sum is exact.
    return int(_twice_below(outside, inside).sum()) / (2 * len(inside) * len(outside))


def aupr(in_scores: ArrayLike, out_scores: ArrayLike, *, positive: Side) -> float:
    """Average precision: the sum of precision times gain of recall over the distinct thresholds."""
    true, false = _flagged(in_scores, out_scores, positive)
    gain = np.diff(true, prepend=0)
    return float(np.sum(gain * (true / (true + false))) / true[-1])


def fpr_at_95_tpr(in_scores: ArrayLike, out_scores: ArrayLike, *, positive: Side) -> float:
    """Least share of false positives among the thresholds with 95 % true positives or more."""
    true, false = _flagged(in_scores, out_scores, positive)
    enough = int(np.argmax(100 * true >= 95 * true[-1]))
    return int(false[enough]) / int(false[-1])


def _flagged(
    in_scores: ArrayLike, out_scores: ArrayLike, positive: Side
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """True and false positives at each distinct threshold, from the strictest to the laxest."""
    inside, outside = _scores(in_scores, out_scores)
    require(positive in ("out", "in"), "positive", positive, "'out' or 'in'")
    right, wrong = (outside, inside) if positive == "out" else (-inside, -outside)
    thresholds = np.unique(np.concatenate([right, wrong]))[::-1]
    true, false = (
        len(side) - np.searchsorted(np.sort(side), thresholds, side="left")
        for side in (right, wrong)
    )
    return true, false


def _twice_below(scores: Array, others: Array) -> NDArray[np.int64]:
    """For each score, twice the number of others below it plus the number equal to it."""
    ordered = np.sort(others)
    return np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")


def _delong(inside: Array, outside: Array) -> tuple[float, float, float]:
    """AUROC and its 95 % interval (DeLong, DeLong and Clarke-Pearson 1988)."""
    area = auroc(inside, outside)
    out_placed = _twice_below(outside, inside) / (2 * len(inside))
    in_placed = 1 - _twice_below(inside, outside) / (2 * len(outside))
    variance = out_placed.var(ddof=1) / len(outside) + in_placed.var(ddof=1) / len(inside)
    reach = NORMAL_975 * float(np.sqrt(variance))
    return area, max(area - reach, 0.0), min(area + reach, 1.0)


def _scores(
    in_scores: ArrayLike, out_scores: ArrayLike, *, at_least: int = 1
) -> tuple[Array, Array]:
    checked = []
    for name, values in (("in-distribution", in_scores), ("out-of-distribution", out_scores)):
        scores = np.asarray(values, dtype=np.float64)
        if scores.ndim != 1:
            raise DataError(f"{name} scores have shape {scores.shape}: give one number an image")
        if len(scores) < at_least:
            raise DataError(f"{len(scores)} {name} scores: give at least {at_least}")
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            raise DataError(
                f"{len(bad)} of {len(scores)} {name} scores are NaN or infinite, the first, "
                f"number {bad[0]}, is {scores[bad[0]]}: an image without a score cannot be ranked"
            )
        checked.append(scores)
    return checked[0], checked[1]
