"""What a model's scores must be held against: simple densities fitted on rows, in closed form.

Every score is HIGH for what is unlike the rows it was fitted on, as those of the model are:
negative log-likelihoods in nats, and a distance. Rows are pixels or features; which of them is the
business of eqm.outliers. Pure numpy, float64.

Legend: N rows of D numbers that are fitted, M rows that are scored.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eqm.errors import DataError, require

Array = NDArray[np.float64]

BLOCK_ROWS = 512
SINGULAR = 1e-13
"""Variances that differ by more than this are rounding."""
ROUNDING_VARIANCE = 1 / 12
"""Of a number that is rounded to whole ones, as levels of gray are: no pixel varies by less."""

LEAST_ROWS = {"pixel_gaussian": 3, "pixel_pca": 2, "feature_gaussian": 3}
"""Baseline -> rows that it is fitted on at least; of neighbours, as many as it asks for. Of two
rows the covariance is not shrunk: it varies in one direction."""


class Gaussian:
    """A normal density with the covariance of Ledoit and Wolf (2004), defined where N < D too.

    Its negative log-likelihood ranks as the Mahalanobis distance does. Raises DataError for rows
    that do not vary in every direction.
    """

    def __init__(self, rows: ArrayLike) -> None:
        fitted = _rows(rows, least=2)
        self.mean = fitted.mean(axis=0)
        covariance = _shrunk(fitted - self.mean)
        values, self._axes = np.linalg.eigh(covariance)
        if values[0] <= SINGULAR * values[-1]:
            raise DataError(
                f"the {len(fitted)} rows that a Gaussian is fitted on do not vary in every "
                "direction: give more of them, or leave this baseline out"
            )
        self._values = values

    def score(self, rows: ArrayLike) -> Array:
        """Negative log-likelihood of each row (M, D), (M,) in nats."""
        z = (_rows(rows, dimension=len(self.mean)) - self.mean) @ self._axes
        constant = len(self.mean) * math.log(2 * math.pi) + float(np.log(self._values).sum())
        return (np.sum(z * z / self._values, axis=1) + constant) / 2


def _shrunk(centred: Array) -> Array:
    """Covariance (D, D) of centred rows (N, D), shrunk towards a multiple of the identity.

    By as much as minimises the expected squared error (Ledoit and Wolf 2004, lemma 3.4).
    """
    n, d = centred.shape
    sample = centred.T @ centred / n
    level = np.trace(sample) / d
    target = level * np.eye(d)
    apart = float(np.sum((sample - target) ** 2))
    noise = float(np.sum(np.sum(centred**2, axis=1) ** 2) / n - np.sum(sample**2)) / n
    share = min(noise / apart, 1.0) if apart > 0 else 0.0
    return (1 - share) * sample + share * target


class PrincipalComponents:
    """The density under PCA (probabilistic PCA: Tipping and Bishop 1999, equations 3 to 8).

    Of the components as many are kept as hold ``share`` of the variance; across the others it is
    the same in all directions, and no less than ``least_variance``. Raises DataError for rows that
    leave none.
    """

    def __init__(self, rows: ArrayLike, *, share: float, least_variance: float = 0.0) -> None:
        require(0 < share < 1, "share", share, "between 0 and 1")
        fitted = _rows(rows, least=2)
        self.mean = fitted.mean(axis=0)
        centred = fitted - self.mean
        values, axes = np.linalg.eigh(centred.T @ centred / (len(fitted) - 1))
        values, axes = np.maximum(values[::-1], 0), axes[:, ::-1]
        d, held = len(values), np.cumsum(values)
        # At least one direction is left over: without any there is no noise to speak of.
        self.kept = min(int(np.searchsorted(held, share * held[-1])) + 1, d - 1)
        noise = max(float(values[self.kept :].sum()) / (d - self.kept), least_variance)
        if noise <= 0:
            raise DataError(
                f"{len(fitted)} rows of {d} numbers leave no variance beside {self.kept} principal "
                "components: give more of them, or leave this baseline out"
            )
        self._axes, self._noise = axes[:, : self.kept], noise
        self._values = np.maximum(values[: self.kept], noise)

    def score(self, rows: ArrayLike) -> Array:
        """Negative log-likelihood of each row (M, D), (M,) in nats."""
        centred = _rows(rows, dimension=len(self.mean)) - self.mean
        z = centred @ self._axes
        across = np.sum(centred * centred, axis=1) - np.sum(z * z, axis=1)
        left = len(self.mean) - self.kept
        constant = (
            len(self.mean) * math.log(2 * math.pi)
            + float(np.log(self._values).sum())
            + left * math.log(self._noise)
        )
        squares = np.sum(z * z / self._values, axis=1) + np.maximum(across, 0) / self._noise
        return (squares + constant) / 2


class Neighbours:
    """Euclidean distance to the k-th nearest of the rows (Sun et al. 2022, unnormalised)."""

    def __init__(self, rows: ArrayLike, *, k: int) -> None:
        require(k > 0, "k", k, "greater than 0")
        fitted = _rows(rows, least=k)
        # Near the origin, differences of squares lose the fewest digits.
        self.mean = fitted.mean(axis=0)
        self._rows, self._k = fitted - self.mean, k
        self._squares = np.sum(self._rows**2, axis=1)

    def score(self, rows: ArrayLike) -> Array:
        """Distance of each row (M, D), (M,)."""
        asked = _rows(rows, dimension=len(self.mean)) - self.mean
        found = []
        for block in _blocks(asked):
            squares = np.sum(block**2, axis=1)[:, None] + self._squares - 2 * block @ self._rows.T
            nearest = np.partition(squares, self._k - 1, axis=1)[:, self._k - 1]
            found.append(np.sqrt(np.maximum(nearest, 0)))
        return np.concatenate(found)


def _blocks(rows: Array) -> Iterator[Array]:
    for start in range(0, len(rows), BLOCK_ROWS):
        yield rows[start : start + BLOCK_ROWS]


def _rows(rows: ArrayLike, *, least: int = 1, dimension: int | None = None) -> Array:
    found = np.asarray(rows, dtype=np.float64)
    if found.ndim != 2 or found.shape[1] < 2:
        raise DataError(f"rows have shape {found.shape}: give (N, D) with D at least 2")
    if len(found) < least:
        raise DataError(f"{len(found)} rows are too few to fit a baseline on: give {least}")
    if dimension is not None and found.shape[1] != dimension:
        raise DataError(f"rows have {found.shape[1]} numbers, {dimension} were fitted")
    if not np.isfinite(found).all():
        raise DataError("rows hold NaN or infinity: a baseline cannot be fitted on them")
    return found
