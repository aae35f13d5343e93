"""Numbers about sets of features: Frechet and kernel distances, precision, recall, neighbours.

Everything is float64 and knows only features, arrays (N, D): not what made them (eqm.features) and
not what a distance is to be called or compared with (eqm.measures), nor how sure it is
(eqm.intervals). Matrices of N x M are made by blocks of rows, whatever N and M are.

Legend: N, M images; D dimension of a feature. A *factor* of a covariance S is any F (D, R) with
F F^T = S; all factors of S give the same distance.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eqm.errors import DataError, require
from eqm.threads import in_threads

Array: TypeAlias = NDArray[np.float64]

BLOCK_ROWS = 128
"""Rows of a Gram matrix that a core holds at a time: bounds memory, and changes no result but by
rounding."""
SPARE = 32
"""Neighbours that are looked up beyond those asked for, for when some are left out."""
BLOCK_REFERENCES = 16_384
"""References that queries are held against at a time, where these are not features but many."""

SAMPLES_A_DIMENSION = 4
"""From so many samples a dimension on, the distance is taken from covariances. With fewer they are
singular or nearly so, and the square roots of their rounding errors (1e-8) would be seen."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter of a set of features: all that a Frechet distance reads of it."""

    count: int
    mean: Array
    """(D,)"""
    scatter: Array
    """(D, D): sum of outer products of the centred features."""

    def __post_init__(self) -> None:
        count, dimension = self.count, len(self.mean)
        if count < 1 or self.mean.ndim != 1 or self.scatter.shape != (dimension, dimension):
            shapes = f"count {count}, mean {self.mean.shape}, scatter {self.scatter.shape}"
            raise DataError(f"these are no moments: {shapes}; build them with Moments.of(features)")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.scatter).all()):
            raise DataError("moments hold NaN or infinity: compute them again from finite features")

    @staticmethod
    def of(features: ArrayLike) -> "Moments":
        """Moments of features (N, D), N >= 1. Raises DataError for NaN, infinity, another shape."""
        rows = _rows(features, "features", at_least=1)
        mean = rows.mean(axis=0)
        centred = rows - mean
        return Moments(len(rows), mean, centred.T @ centred)

    def covariance(self) -> Array:
        """Unbiased covariance (D, D), over count - 1. Raises DataError for fewer than 2 samples."""
        if self.count < 2:
            raise DataError(f"{self.count} sample has no covariance: give at least 2")
        return self.scatter / (self.count - 1)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union, as if computed at once (Chan, Golub and LeVeque 1983).

    Raises DataError for features of different dimensions.
    """
    _same_dimension(a.mean, b.mean)
    count = a.count + b.count
    step = b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(step, step) * (a.count * b.count / count)
    return Moments(count, a.mean + step * (b.count / count), scatter)


# -- Frechet distance ---------------------------------------------------------------------------


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of the Gaussians with these moments (Heusel et al. 2017, Eq. 6).

    |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2). Singular covariances are welcome. Raises
    DataError for fewer than 2 samples or different dimensions.
    """
    _same_dimension(a.mean, b.mean)
    return Gaussian.of_moments(a).distance(Gaussian.of_moments(b))


def frechet_distance_from_features(a: ArrayLike, b: ArrayLike) -> float:
    """The same distance, from features (N, D) and (M, D) without forming a covariance.

    tr (S_a S_b)^1/2 is the nuclear norm of A B^T / sqrt((N - 1)(M - 1)), A and B centred. For few
    samples, see SAMPLES_A_DIMENSION. Raises DataError, also for NaN and infinity.
    """
    left, right = (_gaussian(rows, covariance_from=math.inf) for rows in _pair(a, b))
    return left.distance(right)


def frechet_from_features(a: ArrayLike, b: ArrayLike) -> float:
    """The same distance from features (N, D) and (M, D), each side by the way that suits its size.

    From its covariance with SAMPLES_A_DIMENSION * D samples or more, from its features with fewer.
    """
    left, right = (_gaussian(r, covariance_from=SAMPLES_A_DIMENSION) for r in _pair(a, b))
    return left.distance(right)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A Gaussian by its mean and a factor of its covariance: one side of a distance."""

    mean: Array
    """(D,)"""
    factor: Array
    """(D, R)"""

    @staticmethod
    def of_moments(moments: Moments) -> "Gaussian":
        """With these moments. Raises DataError for fewer than 2 samples."""
        return Gaussian(moments.mean, _factor(moments.covariance()))

    @staticmethod
    def of(features: ArrayLike) -> "Gaussian":
        """With the moments of features (N, D), by the way that suits N >= 2. Raises DataError."""
        rows = _rows(features, "features", at_least=2)
        return _gaussian(rows, covariance_from=SAMPLES_A_DIMENSION)

    def distance(self, other: "Gaussian") -> float:
        """Squared Frechet distance."""
        # The eigenvalues of S_a S_b are the squared singular values of F_a^T F_b: taking these
        # directly keeps the digits that squaring loses.
        cross = np.linalg.svd(self.factor.T @ other.factor, compute_uv=False).sum()
        shift = np.sum((self.mean - other.mean) ** 2)
        value = shift + np.sum(self.factor**2) + np.sum(other.factor**2) - 2 * cross
        return max(float(value), 0.0)  # rounding alone can take it below


def _gaussian(rows: Array, *, covariance_from: float) -> Gaussian:
    if len(rows) >= covariance_from * rows.shape[1]:
        return Gaussian.of_moments(Moments.of(rows))
    mean = rows.mean(axis=0)
    return Gaussian(mean, _factor_of_features(rows - mean))


def _factor(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    # Below this, eigh returns noise: of a singular covariance the truth there is zero.
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def _factor_of_features(centred: Array) -> Array:
    scaled = centred / np.sqrt(len(centred) - 1)
    # R^T R of a QR is the same product in at most D rows, and squares nothing.
    long = len(scaled) > scaled.shape[1]
    return np.asarray(np.linalg.qr(scaled, mode="r") if long else scaled).T


# -- kernel distance ----------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance: unbiased, so at times a little below 0."""

    mean: float
    std: float | None = None
    """Over subsets; None where the full sets were used."""


def kernel_distance(
    a: ArrayLike,
    b: ArrayLike,
    *,
    subsets: int | None = None,
    subset_size: int = 1000,
    seed: int = 2020,
) -> KernelDistance:
    """Unbiased squared MMD under the kernel (x.y / D + 1)^3 (KID: Binkowski et al. 2018).

    On the full sets, deterministic, or as mean and standard deviation over ``subsets`` draws of
    ``subset_size`` features of each side: the defaults draw what torch-fidelity draws.
    """
    left, right = _pair(a, b)
    if subsets is None:
        return KernelDistance(_mmd2(left, right))
    require(subsets > 0, "subsets", subsets, "greater than 0, or None for the full sets")
    most = min(len(left), len(right))
    require(2 <= subset_size <= most, "subset_size", subset_size, f"from 2 to {most}, the samples")
    require(0 <= seed < 2**32, "seed", seed, "from 0 to 2**32 - 1")
    # The legacy generator on purpose: its stream is frozen for good, and torch-fidelity's is this.
    generator = np.random.RandomState(seed)
    draws = []
    for _ in range(subsets):
        some_left = left[generator.choice(len(left), subset_size, replace=False)]
        some_right = right[generator.choice(len(right), subset_size, replace=False)]
        draws.append(_mmd2(some_left, some_right))
    return KernelDistance(float(np.mean(draws)), float(np.std(draws)))


def _mmd2(a: Array, b: Array) -> float:
    within = kernel_mean(a) + kernel_mean(b)
    return within - 2 * kernel_sum(a, b) / (len(a) * len(b))


def kernel_mean(a: Array) -> float:
    """Mean kernel of two different features among (N, D), N >= 2."""
    return (kernel_sum(a, a) - kernel_diagonal(a)) / (len(a) * (len(a) - 1))


def kernel_diagonal(a: Array) -> float:
    """Sum of the kernel of each feature of (N, D) with itself."""
    return float(_kernel(np.sum(a * a, axis=1), a.shape[1]).sum())


def kernel_sum(a: Array, b: Array) -> float:
    """Sum of the kernel over all pairs of features (N, D) and (M, D)."""
    return float(kernel_sums(a, b).sum())


def kernel_sums(a: Array, b: Array) -> Array:
    """Of each feature of ``b`` the sum of its kernel with all of ``a``: (M,)."""
    found = np.zeros(len(b))

    def sums(rows: slice) -> Array:
        return _kernel(a[rows] @ b.T, a.shape[1]).sum(axis=0)

    for some in in_threads(sums, _blocks(len(a))):
        found += some
    return found


def _kernel(products: Array, dimension: int) -> Array:
    base = products / dimension + 1
    # Numpy takes a third power by logarithms, in ten times as long.
    return base * base * base


# -- neighbours ---------------------------------------------------------------------------------


def precision_recall(
    real: ArrayLike, fake: ArrayLike, *, neighbours: int = 3
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of fake (M, D) against real (N, D).

    Precision is the share of fakes inside the manifold of the real features: within reach of one of
    them, its reach being the distance to its ``neighbours``-th nearest. Recall is the converse.
    Raises DataError unless each side has more features than ``neighbours``.
    """
    reals, fakes = manifolds(real, fake, neighbours)
    return _share_inside(fakes, reals, neighbours), _share_inside(reals, fakes, neighbours)


def manifolds(real: ArrayLike, fake: ArrayLike, neighbours: int) -> tuple[Array, Array]:
    """Features of both sides, checked to be enough for so many neighbours. Raises DataError."""
    require(neighbours > 0, "neighbours", neighbours, "greater than 0")
    reals = _rows(real, "real features", at_least=neighbours + 1)
    fakes = _rows(fake, "fake features", at_least=neighbours + 1)
    _same_dimension(reals[0], fakes[0])
    return reals, fakes


def nearest(queries: ArrayLike, references: Iterable[ArrayLike]) -> tuple[NDArray[np.int64], Array]:
    """Of each query (N, D) its nearest reference: number over all blocks, and Euclidean distance.

    References come in blocks (M, D) of any size and number type, so that they need not lie in
    memory together. Which one is nearest is settled to 1e-7 of the features' norm; its distance is
    exact, 0 for an equal feature. Raises DataError.
    """
    asked = _rows(queries, "queries", at_least=1)
    number, distance = np.full(len(asked), -1), np.full(len(asked), math.inf)
    seen = 0
    for known in _reference_blocks(references):
        _same_dimension(asked[0], known[0])
        each = in_threads(functools.partial(_nearest_rows, asked, known), _blocks(len(asked)))
        chosen = np.concatenate(list(each))
        # Differences of the chosen pairs are exact where differences of squares are not.
        apart = np.linalg.norm(asked - known[chosen], axis=1)
        nearer = apart < distance
        number[nearer], distance[nearer] = seen + chosen[nearer], apart[nearer]
        seen += len(known)
    if not seen:
        raise DataError("there are no references to look for neighbours among: give at least one")
    return number, distance


def _nearest_rows(asked: Array, known: Array, rows: slice) -> NDArray[np.int64]:
    return _squared_distances(asked[rows], known).argmin(axis=1)


def nearest_distances(queries: ArrayLike, references: ArrayLike) -> Array:
    """Euclidean distance of each query (N, D) to its nearest reference (M, D), as ``nearest``."""
    return nearest(queries, [references])[1]


def _reference_blocks(references: Iterable[ArrayLike]) -> Iterator[Array]:
    for block in references:
        rows = np.asarray(block)
        for first in range(0, len(rows), BLOCK_REFERENCES):
            yield _rows(rows[first : first + BLOCK_REFERENCES], "references", at_least=1)


def precision_of(real: ArrayLike, fake: ArrayLike, *, neighbours: int = 3) -> float:
    """The first half of :func:`precision_recall`: cheap where fakes are many and reals few."""
    reals, fakes = manifolds(real, fake, neighbours)
    return _share_inside(fakes, reals, neighbours)


def reaches(
    manifold: Array,
    neighbours: int,
    left_out: NDArray[np.int64] | None = None,
    *,
    told: Callable[[int], None] = lambda rows: None,
) -> NDArray[np.float64]:
    """Squared distance of each feature (M, D) to its ``neighbours``-th nearest: (1, M).

    All pairs are looked at; ``told(rows)`` is called after so many features more. With groups (M,)
    of ``left_out``, numbers from 0, there is one more row for each of them: how far the others
    reach without it. Those of the group itself reach nowhere there: -1.
    """
    group_of = np.full(len(manifold), -1) if left_out is None else left_out
    groups = range(int(group_of.max()) + 1)
    found = np.empty((1 + len(groups), len(manifold)))
    # Of so many nearest ones enough are left without a group, nearly always.
    enough = min(neighbours + (SPARE if len(groups) else 0), len(manifold) - 1)

    def reach(rows: slice) -> int:
        apart = _squared_distances(manifold[rows], manifold)
        # One of them is the feature itself.
        near = np.argpartition(apart, enough, axis=1)[:, : enough + 1]
        near_by = np.take_along_axis(apart, near, axis=1)
        order = np.argsort(near_by, axis=1)
        near_by = np.take_along_axis(near_by, order, axis=1)
        near_groups = group_of[np.take_along_axis(near, order, axis=1)]
        found[:, rows] = near_by[:, neighbours]
        for group in groups:
            line, own = found[1 + group, rows], group_of[rows] == group
            left = np.cumsum(near_groups != group, axis=1)
            known = left[:, -1] > neighbours
            at = np.argmax(left > neighbours, axis=1)
            line[known] = near_by[known, at[known]]
            lost = ~known & ~own
            if lost.any():
                rest = apart[lost][:, group_of != group]
                line[lost] = np.partition(rest, neighbours, axis=1)[:, neighbours]
            line[own] = -1
        return len(apart)

    for count in in_threads(reach, _blocks(len(manifold))):
        told(count)
    return found


def inside(points: Array, manifold: Array, reach: Array) -> NDArray[np.bool_]:
    """Whether points (N, D) lie within reach of a feature of the manifold: (R, N), for (R, M)."""

    def seen(rows: slice) -> NDArray[np.bool_]:
        apart = _squared_distances(points[rows], manifold)
        return np.stack([(apart <= far).any(axis=1) for far in reach])

    return np.concatenate(list(in_threads(seen, _blocks(len(points)))), axis=1)


def _share_inside(points: Array, manifold: Array, neighbours: int) -> float:
    return float(inside(points, manifold, reaches(manifold, neighbours)).mean())


def _squared_distances(a: Array, b: Array) -> Array:
    size = np.sum(a * a, axis=1)[:, None] + np.sum(b * b, axis=1)
    # In place: of 50,000 features, passing tables of all pairs through memory is the whole cost.
    squared = a @ b.T
    squared *= -2
    squared += size
    # What is less than the rounding of this difference is the distance of two equal features.
    size *= a.shape[1] * np.finfo(np.float64).eps
    squared[squared <= size] = 0.0
    return squared


# -- classes ------------------------------------------------------------------------------------


def class_scores(logits: ArrayLike, *, splits: int = 10, seed: int = 2020) -> Array:
    """Inception Score of each split (Salimans et al. 2016) of logits (N, K): (splits,).

    exp of the mean KL divergence of p(class | image) from p(class). Images are shuffled as
    torch-fidelity does; the score that is told is the mean over splits. Raises DataError for fewer
    images than splits.
    """
    rows = _rows(logits, "logits", at_least=splits)
    order = np.random.RandomState(seed).permutation(len(rows))
    shifted = rows[order] - rows[order].max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    ends = [i * len(rows) // splits for i in range(splits + 1)]
    return np.array([_class_score(log_p[a:b]) for a, b in itertools.pairwise(ends)])


def _class_score(log_p: Array) -> float:
    p = np.exp(log_p)
    # A class that no image is given has no logarithm, and no part in the sum.
    marginal = np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny)
    return math.exp(float((p * (log_p - np.log(marginal))).sum(axis=1).mean()))


# -- what is refused ----------------------------------------------------------------------------


def _blocks(count: int) -> Iterator[slice]:
    return (slice(first, first + BLOCK_ROWS) for first in range(0, count, BLOCK_ROWS))


def _rows(features: ArrayLike, name: str, *, at_least: int) -> Array:
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise DataError(f"{name} have shape {rows.shape}: give an array (N, D), a row an image")
    if len(rows) < at_least:
        raise DataError(f"{name} hold {len(rows)} samples: give at least {at_least}")
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise DataError(
            f"{name} hold NaN or infinity in {len(bad)} of {len(rows)} rows, first row {bad[0]}; "
            "look at the images or at the model that made them"
        )
    return rows


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    left = _rows(a, "the first features", at_least=2)
    right = _rows(b, "the second features", at_least=2)
    _same_dimension(left[0], right[0])
    return left, right


def _same_dimension(a: Array, b: Array) -> None:
    if a.shape != b.shape:
        raise DataError(
            f"features of {a.size} and of {b.size} dimensions cannot be compared: "
            "use one extractor for both sides"
        )
