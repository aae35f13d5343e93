"""How sure a number about samples is: 95 % intervals, and the distance that endless samples had.

The reference is fixed, as in the field: intervals tell what other samples of the same model would
give. A percentile bootstrap is no use here: drawing with replacement makes every copy of a set look
smaller than it is, and a Frechet distance grows as 1/N when N falls. Groups of samples are left out
instead, one at a time (jackknife). Called by drift, gate, measures and report.

Legend: N samples in GROUPS groups of consecutive ones. Where a group has room for all of them, each
holds the same labels; where classes are more than that, groups differ more than new samples would,
and intervals are too wide.
"""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eqm import frechet
from eqm.errors import DataError, require
from eqm.frechet import SAMPLES_A_DIMENSION, Array, Gaussian, Moments, merge
from eqm.ood import wilson
from eqm.threads import in_threads

GROUPS = 16
T_975 = 2.131449545559323
"""97.5 % point of Student's t with GROUPS - 1 degrees of freedom."""
LEAST_SAMPLES = 8 * GROUPS
"""With fewer, groups are too small for their variance to mean anything."""
LEAST_A_DIMENSION = 2
"""With fewer samples a dimension there is no extrapolated distance. Halves of them have singular
covariances, where the curve over 1/N turns: of an even spectrum, one sample a dimension, 90 % of
the bias is left."""


@dataclass(frozen=True)
class Interval:
    """An estimate between the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class FrechetIntervals:
    """A Frechet distance of samples to a reference, both ways of telling it."""

    plain: Interval
    """As the field reports it, at this number of samples: biased up by about 1/N."""
    endless: Interval | None
    """What the curve over 1/N reaches at 0 (FD-infinity: Chong and Forsyth 2020, section 4).

    Theirs is a line through 15 sizes. With few samples a dimension the bias is none: at 2 of them,
    a line through all samples and three quarters ends up to 13 % of the bias too low. So it is a
    parabola through all samples, three quarters and halves. At 4 samples a dimension it leaves 1 to
    2 % of the bias; at 2, of an even spectrum, 14 %; of features whose lengths have heavy tails 10
    and 18 %. The bias grows with the dimension and the spread does not, so an interval of the
    spread alone would miss. This one goes from the lowest to the highest end of the line, the
    parabola and a cubic, and as far beyond them as that of the plain distance does. Of samples as
    good as the reference the parabola's end is about as often below 0 as above: cut off there, it
    would be biased. None with fewer than LEAST_A_DIMENSION.
    """


def frechet_intervals(samples: ArrayLike, reference: Gaussian) -> FrechetIntervals | None:
    """Distance of samples (N, D) with its interval, and without its bias.

    None for fewer than LEAST_SAMPLES, of which nothing can be said.
    """
    groups = _groups(samples)
    if groups is None:
        return None
    count, dimension = sum(len(g.rows) for g in groups), groups[0].rows.shape[1]

    def distance(chosen: Sequence[int]) -> float:
        return _gaussian([groups[i] for i in chosen]).distance(reference)

    chosen: list[Sequence[int]] = [range(GROUPS), *_each_left_out()]
    if count >= LEAST_A_DIMENSION * dimension:
        chosen += [*_quarters_left_out(), *_halves()]
    plain, *fewer = in_threads(distance, chosen)
    reach = T_975 * _jackknife_error(fewer[:GROUPS])
    return FrechetIntervals(
        Interval(plain, max(plain - reach, 0.0), plain + reach),
        _endless(plain, fewer, reach) if len(fewer) > GROUPS else None,
    )


def _endless(plain: float, fewer: Sequence[float], reach: float) -> Interval:
    """At 1/N = 0, from distances of all samples, and of those without a group, a quarter, half."""
    parts = fewer[:GROUPS], fewer[GROUPS:-2], fewer[-2:]
    nearly, most, half = (float(np.mean(part)) for part in parts)
    known = {1.0: plain, GROUPS / (GROUPS - 1): nearly, 4 / 3: most, 2.0: half}
    parabola = _at_0(known, (1.0, 4 / 3, 2.0))
    # Each is wrong by another part of the bias: the truth is not far outside what they span.
    ends = (_at_0(known, (1.0, 4 / 3)), parabola, _at_0(known, tuple(known)))
    # The samples are the same ones, so what is uncertain about the plain one is so about these.
    return Interval(parabola, min(ends) - reach, max(ends) + reach)


def _at_0(known: Mapping[float, float], places: Sequence[float]) -> float:
    """Of the polynomial through what is known at some places (Lagrange)."""
    others = {x: [o for o in places if o != x] for x in places}
    weights = {x: math.prod(o / (o - x) for o in others[x]) for x in places}
    return sum(weight * known[x] for x, weight in weights.items())


def kernel_interval(
    samples: ArrayLike, reference: ArrayLike, *, told: Callable[[int], None] = lambda rows: None
) -> Interval | None:
    """Unbiased kernel distance (eqm.frechet.kernel_distance) with its interval; None for few.

    Every pair is looked at once: what is left out is a group of sums, not of features.
    ``told(rows)`` is called after so many samples more.
    """
    groups = _groups(samples)
    if groups is None:
        return None
    real = np.asarray(reference, dtype=np.float64)
    sizes = np.array([len(g.rows) for g in groups])
    across = np.array([frechet.kernel_sum(g.rows, real) for g in groups])
    every = np.concatenate([g.rows for g in groups])
    starts = np.cumsum(sizes) - sizes
    table = []
    for group in groups:
        table.append(np.add.reduceat(frechet.kernel_sums(group.rows, every), starts))
        told(len(group.rows))
    within = np.array(table)
    within -= np.diag([frechet.kernel_diagonal(g.rows) for g in groups])
    fixed = frechet.kernel_mean(real)

    def distance(chosen: Sequence[int]) -> float:
        count = sizes[chosen].sum()
        among = within[np.ix_(chosen, chosen)].sum() / (count * (count - 1))
        return float(among + fixed - 2 * across[chosen].sum() / (count * len(real)))

    value = distance(list(range(GROUPS)))
    reach = T_975 * _jackknife_error([distance(some) for some in _each_left_out()])
    return Interval(value, value - reach, value + reach)


def recall_interval(
    real: ArrayLike,
    fake: ArrayLike,
    *,
    neighbours: int = 3,
    told: Callable[[int], None] = lambda rows: None,
) -> Interval | None:
    """Recall of fake (M, D) against real (N, D) with its interval; None for few.

    ``told(rows)`` is called after so many fakes more.

    Precision is a share of independent samples, recall is not: each sample reaches as far as the
    others let it. Both are those of eqm.frechet.precision_recall. A low recall hangs on a few
    samples that lie apart, of which groups say little: the interval is no narrower than that of a
    share of independent images, and still too low (docs/metrics.md). Raises DataError.
    """
    reals, fakes = frechet.manifolds(real, fake, neighbours)
    if len(fakes) < LEAST_SAMPLES:
        return None
    sizes = [len(part) for part in np.array_split(fakes, GROUPS)]
    left_out = np.repeat(np.arange(GROUPS), sizes)
    reach = frechet.reaches(fakes, neighbours, left_out, told=told)
    value, *others = frechet.inside(reals, fakes, reach).mean(axis=1).tolist()
    wide = T_975 * _jackknife_error(others)
    low, high = wilson(value, len(reals))
    return Interval(value, min(max(value - wide, 0.0), low), max(min(value + wide, 1.0), high))


def score_interval(scores: ArrayLike) -> Interval:
    """Mean of scores of independent splits (eqm.frechet.class_scores) with its interval."""
    from scipy.stats import t

    each: NDArray[np.float64] = np.asarray(scores, dtype=np.float64)
    count = len(each)
    require(count > 1, "splits", count, "2 or more")
    value = float(each.mean())
    reach = float(t.ppf(0.975, count - 1)) * float(each.std(ddof=1)) / math.sqrt(count)
    return Interval(value, value - reach, value + reach)


def share_interval(count: int, total: int) -> Interval:
    """A share of independent trials (Wilson 1927). Raises ConfigError for an impossible one."""
    require(0 <= count <= total and total > 0, "count", count, f"from 0 to {total}, at least 1")
    share = count / total
    return Interval(share, *wilson(share, total))


def difference_interval(a: Interval, b: Interval) -> Interval:
    """Of a - b, from the intervals of both (Zou and Donner 2008, "MOVER").

    Holds for independent estimates. Two models that are sampled with the same seeds share their
    noise: what they have in common cancels, and the interval is too wide rather than too narrow.
    """
    value = a.value - b.value
    down = math.hypot(a.value - a.low, b.high - b.value)
    up = math.hypot(a.high - a.value, b.value - b.low)
    return Interval(value, value - down, value + up)


def median_interval(values: ArrayLike) -> Interval:
    """A median between two order statistics, whatever the distribution. Raises DataError for none.

    Exact, so it holds the truth in 95 % of cases at least. Fewer than 6 values have no such
    interval: it is all of them.
    """
    from scipy.stats import binom

    ordered: NDArray[np.float64] = np.sort(np.asarray(values, dtype=np.float64).ravel())
    count = len(ordered)
    if not count:
        raise DataError("there are no values to take the median of: give at least one")
    # Fewer values than this lie on one side of the true median in at most 2.5 % of cases.
    passed = max(int(binom.ppf(0.025, count, 0.5)), 1)
    low, high = ordered[passed - 1], ordered[count - passed]
    return Interval(float(np.median(ordered)), float(low), float(high))


# -- groups -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Group:
    rows: Array
    moments: Moments


def _groups(samples: ArrayLike) -> list[_Group] | None:
    rows = np.asarray(samples, dtype=np.float64)
    if len(rows) < LEAST_SAMPLES:
        return None
    return [_Group(part, Moments.of(part)) for part in np.array_split(rows, GROUPS)]


def _gaussian(groups: Sequence[_Group]) -> Gaussian:
    """Of the union, from merged moments where there are enough samples for a covariance."""
    count, dimension = sum(len(g.rows) for g in groups), groups[0].rows.shape[1]
    if count < SAMPLES_A_DIMENSION * dimension:
        return Gaussian.of(np.concatenate([g.rows for g in groups]))
    moments = groups[0].moments
    for group in groups[1:]:
        moments = merge(moments, group.moments)
    return Gaussian.of_moments(moments)


def _without(some: Container[int]) -> list[int]:
    return [i for i in range(GROUPS) if i not in some]


def _each_left_out() -> list[list[int]]:
    return [_without((k,)) for k in range(GROUPS)]


def _quarters_left_out() -> list[list[int]]:
    return [_without(range(k * GROUPS // 4, (k + 1) * GROUPS // 4)) for k in range(4)]


def _halves() -> list[range]:
    return [range(GROUPS // 2), range(GROUPS // 2, GROUPS)]


def _jackknife_error(left_out: Sequence[float]) -> float:
    """Standard error of a statistic of all groups, of its values without each (Tukey 1958)."""
    return math.sqrt((GROUPS - 1) * float(np.var(left_out)))
