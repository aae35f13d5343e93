"""How well a score tells out-of-distribution images from in-distribution ones.

By convention the out-of-distribution (OOD) image has the HIGHER score: energy, gradient norm. Ties
count one half. This module computes no scores (eqm.outliers does, and calls this) and decides
nothing. Legend: K in-distribution scores, L out-of-distribution scores.

The false-positive rate at 95 % true positives goes under two definitions in the literature, which
disagree; precision and recall depend on the side called positive as well, and on the ratio L : K.
Both sides are therefore named: ``positive="out"`` (OpenOOD) or ``positive="in"`` (Hendrycks and
Gimpel 2017; Liu et al. 2020).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eqm.errors import DataError, require

Array: TypeAlias = NDArray[np.float64]
Side: TypeAlias = Literal["out", "in"]

NORMAL_975 = 1.959963984540054
"""97.5 % point of the standard normal distribution."""

Ends: TypeAlias = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class OODResult:
    """What one score says about one set of OOD images, with 95 % intervals.

    None of them is of zero width, unless the scores of each side are all equal. In simulations of
    60 to 2,000 images a side, also of reversed scores, each held the truth in 90 % of cases at
    least (docs/metrics.md).
    """

    in_count: int
    out_count: int
    auroc: float
    auroc_interval: Ends
    """DeLong, on the logit scale, with Student's t."""
    aupr_out: float
    aupr_out_interval: Ends
    aupr_in: float
    aupr_in_interval: Ends
    """At the ratio of the two counts, as the value is."""
    fpr95_out: float
    """Share of in-distribution images flagged by the threshold that flags 95 % of OOD images."""
    fpr95_out_interval: Ends
    fpr95_in: float
    """Share of OOD images passed by the threshold that passes 95 % of in-distribution images."""
    fpr95_in_interval: Ends


def compare(in_scores: ArrayLike, out_scores: ArrayLike) -> OODResult:
    """All measures of the scores (K,) and (L,), K and L at least 2 for the intervals.

    Raises DataError for NaN, other shapes or too few scores. Ranks are all that counts: an infinite
    score is above all others.
    """
    inside, outside = _scores(in_scores, out_scores, at_least=2)
    area, low, high = _delong(inside, outside)
    return OODResult(
        in_count=len(inside),
        out_count=len(outside),
        auroc=area,
        auroc_interval=(low, high),
        aupr_out=aupr(inside, outside, positive="out"),
        aupr_out_interval=_aupr_interval(inside, outside, "out"),
        aupr_in=aupr(inside, outside, positive="in"),
        aupr_in_interval=_aupr_interval(inside, outside, "in"),
        fpr95_out=fpr_at_95_tpr(inside, outside, positive="out"),
        fpr95_out_interval=fpr_interval(inside, outside, "out"),
        fpr95_in=fpr_at_95_tpr(inside, outside, positive="in"),
        fpr95_in_interval=fpr_interval(inside, outside, "in"),
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
    right, wrong = _sides(inside, outside, positive)
    thresholds = np.unique(np.concatenate([right, wrong]))[::-1]
    true, false = (
        len(side) - np.searchsorted(np.sort(side), thresholds, side="left")
        for side in (right, wrong)
    )
    return true, false


def _sides(inside: Array, outside: Array, positive: Side) -> tuple[Array, Array]:
    """Scores of the positive side, which is high, and of the other."""
    return (outside, inside) if positive == "out" else (-inside, -outside)


def _twice_below(scores: Array, others: Array) -> NDArray[np.int64]:
    """For each score, twice the number of others below it plus the number equal to it."""
    ordered = np.sort(others)
    return np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")


# -- intervals ----------------------------------------------------------------------------------


def wilson(share: float, total: int) -> Ends:
    """95 % interval of a share of independent trials (Wilson 1927)."""
    z2 = NORMAL_975**2 / total
    middle = (share + z2 / 2) / (1 + z2)
    reach = NORMAL_975 * math.sqrt(share * (1 - share) / total + z2 / (4 * total)) / (1 + z2)
    # Of none and of all the end is the share itself, which rounding would miss.
    low = 0.0 if share == 0 else max(middle - reach, 0.0)
    high = 1.0 if share == 1 else min(middle + reach, 1.0)
    return low, high


def _unseen(count: int) -> float:
    """The largest share of images that may be out of order where none of so many was seen to be."""
    return wilson(0.0, count)[1]


def _delong(inside: Array, outside: Array) -> tuple[float, float, float]:
    """AUROC and its 95 % interval (DeLong, DeLong and Clarke-Pearson 1988), on the logit scale.

    Near 1, an interval that is symmetric about the area itself holds the truth too seldom.
    Separated sets have no variance; there the interval goes to where it would be if as many images
    as may have been missed (``_unseen``) were scored like the other side's.
    """
    area = auroc(inside, outside)
    if area in (0.0, 1.0):
        missed = max(_unseen(len(inside)), _unseen(len(outside))) / 2
        return area, max(area - missed, 0.0), min(area + missed, 1.0)
    out_placed = _twice_below(outside, inside) / (2 * len(inside))
    in_placed = 1 - _twice_below(inside, outside) / (2 * len(outside))
    spreads = [_Spread.of(placed, np.ones(len(placed))) for placed in (out_placed, in_placed)]
    variance = sum(spread.variance / spread.count for spread in spreads)
    reach = _reach(area, variance, _student([s.variance / s.count for s in spreads], spreads))
    return area, _moved(area, -reach), _moved(area, reach)


def _aupr_interval(inside: Array, outside: Array, positive: Side) -> Ends:
    """On the logit scale (Boyd, Eng and Page 2013), by the infinitesimal jackknife.

    Its error is what a stratified bootstrap converges to (Efron 1982, chapter 6), without the noise
    of that: from the derivatives of the area with respect to the weight of each image.

    The area sums precision where each step of recall ends: too much, by the order of 1 in as many
    images as are positive. Where scores are reversed, precision is so steep and images say so
    little of one another that this is many times the error. The lower end is therefore that of the
    area with precision taken in the middle of each step.
    """
    right, wrong = _sides(inside, outside, positive)
    true, false = _flagged(inside, outside, positive)
    gain, loss, flagged = np.diff(true, prepend=0), np.diff(false, prepend=0), true + false
    precision = true / flagged
    area = float(np.sum(gain * precision) / len(right))
    if area == 1:
        return _separated_aupr(len(right), len(wrong)), 1.0
    # An image counts at its own threshold, and in the precision at every laxer one.
    helps = np.cumsum((gain * false / flagged**2)[::-1])[::-1] + precision - area
    harms = np.cumsum((gain * true / flagged**2)[::-1])[::-1]
    spreads = [_Spread.of(helps, gain), _Spread.of(harms, loss)]
    parts = [spreads[0].variance / len(right), spreads[1].variance * len(wrong) / len(right) ** 2]
    # Images that share a threshold are one step of the distribution too: that step has no middle.
    middle = true - 0.5 * (gain == 1)
    below = float(np.sum(gain * middle / (middle + false)) / len(right))
    point = _student(parts, spreads)
    low = _moved(below, -_reach(below, sum(parts), point))
    return low, _moved(area, _reach(area, sum(parts), point))


@dataclass(frozen=True)
class _Spread:
    """Variance of some values, and how surely it is known."""

    count: float
    variance: float
    """Unbiased."""
    freedom: float
    """Degrees of freedom of a normal sample whose variance were known as surely, by the fourth
    moment: few where a few values make nearly all of it."""

    @staticmethod
    def of(values: Array, counts: NDArray[Any]) -> "_Spread":
        """Of values that occur so many times each."""
        total = float(counts.sum())
        apart = values - float(np.sum(values * counts) / total)
        second, fourth = (float(np.sum(apart**k * counts) / total) for k in (2, 4))
        if second == 0:
            return _Spread(total, 0.0, total - 1)
        excess = fourth / second**2 - 1
        return _Spread(total, second * total / (total - 1), 2 * total / max(excess, 1e-9))


def _student(parts: Sequence[float], spreads: Sequence[_Spread]) -> float:
    """97.5 % point of Student's t for the root of a sum of variances (Satterthwaite 1946).

    Near separation a few images out of order make nearly all of it, and samples that hold fewer of
    them than are due take it for small. Their fourth moment is too small then as well: by
    simulation, half of the degrees of freedom, and 2 at least, are what there is.
    """
    from scipy.stats import t

    whole = sum(parts)
    if whole == 0:
        return NORMAL_975
    freedom = whole**2 / sum(p * p / s.freedom for p, s in zip(parts, spreads, strict=True))
    return float(t.ppf(0.975, max(freedom / 2, 2.0)))


def _reach(area: float, variance: float, point: float) -> float:
    """On the logit scale, of an area that is neither 0 nor 1."""
    return point * math.sqrt(variance) / (area * (1 - area))


def _moved(area: float, reach: float) -> float:
    """An area that is neither 0 nor 1, moved by so much on the logit scale."""
    logit = math.log(area / (1 - area)) + reach
    return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0


def _separated_aupr(right: int, wrong: int) -> float:
    """The area if as many images as may have been missed were scored like the other side's."""
    mixed = right / (right + _unseen(wrong) * wrong)
    lost = _unseen(right)
    return min(mixed, 1 - lost + lost * right / (right + wrong))


def fpr_interval(in_scores: ArrayLike, out_scores: ArrayLike, positive: Side) -> Ends:
    """Interval of :func:`fpr_at_95_tpr`.

    Two errors in one (Zou and Donner 2008): of the share, and of the threshold it is taken at. The
    share's is Wilson's. The threshold is a quantile: its ends are order statistics of the
    positive side. Where that has too few (under 59) for the least of them to lie below the quantile
    in 95 % of cases, nothing is known of how lax the threshold may have to be: all may pass.
    """
    from scipy.stats import binom

    right, wrong = _sides(*_scores(in_scores, out_scores), positive)
    ordered = np.sort(right)
    passed = len(ordered) - -(-95 * len(ordered) // 100)

    def share(number: int) -> float:
        return float(np.mean(wrong >= ordered[min(max(number, 0), len(ordered) - 1)]))

    value = share(passed)
    low, high = wilson(value, len(wrong))
    fewest, most = (int(binom.ppf(p, len(ordered), 0.05)) for p in (0.025, 0.975))
    unknown = 0.95 ** len(ordered) > 0.05
    stricter, laxer = share(most), 1.0 if unknown else share(fewest - 1)
    return (
        max(value - math.hypot(value - low, value - stricter), 0.0),
        min(value + math.hypot(high - value, laxer - value), 1.0),
    )


# -- what is refused ----------------------------------------------------------------------------


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
        bad = np.flatnonzero(np.isnan(scores))
        if len(bad):
            raise DataError(
                f"{len(bad)} of {len(scores)} {name} scores are NaN, number {bad[0]} the first: an "
                "image without a score cannot be ranked"
            )
        checked.append(scores)
    return checked[0], checked[1]
