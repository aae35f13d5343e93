"""Distances between two sets of features: Frechet, kernel, precision and recall, nearest neighbour.

Everything is float64 and knows only features, arrays (N, D): not what made them (eqm.features) and
not what a distance is to be called or compared with (eqm.evaluate, which calls this), nor how sure
it is (eqm.intervals).

Legend: N, M images; D dimension of a feature. A *factor* of a covariance S is any F (D, R) with
F F^T = S; all factors of S give the same distance.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eqm.config import require
from eqm.errors import DataError

Array: TypeAlias = NDArray[np.float64]

BLOCK_ROWS = 256
"""Rows of a Gram matrix held at a time: bounds memory and changes no result but by rounding."""

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
    within = [
        (_kernel_sum(x, x) - np.sum(_kernel(np.sum(x * x, axis=1), x.shape[1])))
        / (len(x) * (len(x) - 1))
        for x in (a, b)
    ]
    return float(within[0] + within[1] - 2 * _kernel_sum(a, b) / (len(a) * len(b)))


def _kernel_sum(a: Array, b: Array) -> float:
    return float(sum(_kernel(a[rows] @ b.T, a.shape[1]).sum() for rows in _blocks(len(a))))


def _kernel(products: Array, dimension: int) -> Array:
    return (products / dimension + 1) ** 3


# -- neighbours ---------------------------------------------------------------------------------


def precision_recall(
    real: ArrayLike, fake: ArrayLike, *, neighbours: int = 3
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of fake (M, D) against real (N, D).

    Precision is the share of fakes inside the manifold of the real features: within reach of one of
    them, its reach being the distance to its ``neighbours``-th nearest. Recall is the converse.
    Raises DataError unless each side has more features than ``neighbours``.
    """
    require(neighbours > 0, "neighbours", neighbours, "greater than 0")
    reals = _rows(real, "real features", at_least=neighbours + 1)
    fakes = _rows(fake, "fake features", at_least=neighbours + 1)
    _same_dimension(reals[0], fakes[0])
    return _share_inside(fakes, reals, neighbours), _share_inside(reals, fakes, neighbours)


def nearest_distances(queries: ArrayLike, references: ArrayLike) -> Array:
    """Euclidean distance of each query (N, D) to its nearest reference (M, D): (N,) float64.

    Which reference is nearest is settled to 1e-7 of the features' norm; its distance is exact, 0
    for an equal feature. Raises DataError.
    """
    asked = _rows(queries, "queries", at_least=1)
    known = _rows(references, "references", at_least=1)
    _same_dimension(asked[0], known[0])
    found = [_squared_distances(asked[rows], known).argmin(axis=1) for rows in _blocks(len(asked))]
    # Differences of the chosen pairs are exact where differences of squares are not.
    return np.linalg.norm(asked - known[np.concatenate(found)], axis=1)


def _share_inside(points: Array, manifold: Array, neighbours: int) -> float:
    reach = np.concatenate(
        [
            # Index 0 is the feature itself.
            np.partition(_squared_distances(manifold[rows], manifold), neighbours)[:, neighbours]
            for rows in _blocks(len(manifold))
        ]
    )
    inside = [
        (_squared_distances(points[rows], manifold) <= reach).any(axis=1)
        for rows in _blocks(len(points))
    ]
    return float(np.concatenate(inside).mean())


def _squared_distances(a: Array, b: Array) -> Array:
    size = np.sum(a * a, axis=1)[:, None] + np.sum(b * b, axis=1)
    squared = size - 2 * (a @ b.T)
    # What is less than the rounding of this difference is the distance of two equal features.
    noise = a.shape[1] * np.finfo(np.float64).eps * size
    return np.where(squared <= noise, 0.0, squared)


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
