"""Moving averages of weights, whose memory is told in images: exponential, and of a power.

    average <- d average + (1 - d) weights

    exponential  d = 2 ** -(images of the update / half-life)
    power        d = (1 - images of the update / t) ** (gamma + 1),   t: images seen after it

so that neither memory changes with the batch size. The exponential one starts at the initial
weights, as in the paper; there is no bias correction. The 0.9999 an update of the released code, at
256 images an update, is a half-life of 1.774 million images.

The power one forgets the initial weights at its first update. Its memory grows with the run: it is
the mean of the weights under the density p(s) = (gamma + 1) s^gamma / t^(gamma + 1) over images
0 < s <= t (Karras et al. 2023, arXiv 2312.02696, section 3.1). Weights are constant within an
update, so that the rule above is that integral exactly, whatever the sizes of updates. Its length
is named by sigma_rel, the standard deviation of p in shares of t.

A few averages of this kind, kept at some moments of a run, give that of any other length after it
(:func:`reconstruct`, their section 3.2): all are integrals of the same weights, so those whose
density is a sum of theirs is the same sum of averages.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eqm.errors import ConfigError, DataError

LONGEST_SIGMA_REL = 12**-0.5
"""Of gamma = 0, the plain mean of all weights; a longer one would favour the earliest."""
SOLVABLE = 1e-13
"""Singular values below this share of the largest one are rounding of float64."""


class _Averages:
    """Averages of named weights, kept in float32, or in float64 for weights of float64."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._averages = {name: _wide(w.detach()).clone() for name, w in weights.items()}

    @torch.no_grad()
    def _move(self, weights: Mapping[str, Tensor], share: float, happened: Tensor | None) -> None:
        self._check_names(weights)
        news = [_wide(weights[name]) for name in self._averages]
        averages = list(self._averages.values())
        # One share on the device for each, where only the device knows whether there was an update.
        shares = share if happened is None else [(share * happened).to(a.dtype) for a in averages]
        torch._foreach_lerp_(averages, news, shares)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> average: the tensors themselves, which the next update changes."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy averages in. Raises ValueError for names or shapes that are not those we have."""
        self._check_names(state)
        for name, average in self._averages.items():
            if state[name].shape != average.shape:
                raise ValueError(
                    f"average {name} has shape {tuple(state[name].shape)}; "
                    f"the weight has {tuple(average.shape)}"
                )
        for name, average in self._averages.items():
            average.copy_(state[name])

    def _check_names(self, found: Mapping[str, Tensor]) -> None:
        odd = sorted(found.keys() ^ self._averages.keys())
        if odd:
            where = "is not averaged" if odd[0] in found else "is missing"
            raise ValueError(f"{odd[0]} {where}: averages are of {len(self._averages)} weights")


class EMA(_Averages):
    """Exponential average. Raises ValueError for a half-life that is not greater than 0."""

    def __init__(self, weights: Mapping[str, Tensor], *, half_life_images: float) -> None:
        if not half_life_images > 0:
            raise ValueError(f"half_life_images is {half_life_images}; it must be greater than 0")
        super().__init__(weights)
        self.half_life_images = half_life_images

    def update(
        self, weights: Mapping[str, Tensor], *, images: int, happened: Tensor | None = None
    ) -> None:
        """Move the averages toward the weights, after an update on so many images.

        ``happened`` () is 1, or 0 where the update was left out: nothing moves then. Raises
        ValueError for names that are not those of the averages.
        """
        share = -math.expm1(-math.log(2) * images / self.half_life_images)
        self._move(weights, share, happened)


class PowerEMA(_Averages):
    """Power-function average of relative length ``sigma_rel``. Raises ConfigError for another."""

    def __init__(self, weights: Mapping[str, Tensor], *, sigma_rel: float) -> None:
        self.gamma = sigma_rel_to_gamma(sigma_rel)
        super().__init__(weights)
        self.sigma_rel = sigma_rel

    def update(
        self,
        weights: Mapping[str, Tensor],
        *,
        images: int,
        images_seen: int,
        happened: Tensor | None = None,
    ) -> None:
        """Move the averages toward the weights, after an update on so many images.

        ``images_seen`` is the position before it, ``happened`` as of :class:`EMA`. Raises
        ValueError for names that are not those of the averages.
        """
        share = power_share(self.gamma, images=images, images_seen=images_seen)
        self._move(weights, share, happened)


def power_share(gamma: float, *, images: int, images_seen: int) -> float:
    """Share of the new weights, 1 - beta, in an update on ``images`` after ``images_seen``.

    Raises ValueError for no images, or a position before the first.
    """
    if images < 1 or images_seen < 0:
        raise ValueError(
            f"an update on {images} images after {images_seen}: it must be on at least 1, after "
            "0 or more"
        )
    if images_seen == 0:
        return 1.0
    # 1 - (1 - images / t) ** (gamma + 1), without the rounding of a beta close to 1.
    return -math.expm1((gamma + 1) * math.log1p(-images / (images_seen + images)))


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """Exponent of the power-function average of a relative length. Raises ConfigError.

    Inverts :func:`gamma_to_sigma_rel` for gamma >= 0.
    """
    if not 0 < sigma_rel <= LONGEST_SIGMA_REL:
        raise ConfigError(
            f"sigma_rel is {sigma_rel}; it must be greater than 0 and at most "
            f"{LONGEST_SIGMA_REL:.4f} (12 ** -0.5, the mean of all weights)"
        )
    if sigma_rel == LONGEST_SIGMA_REL:
        return 0.0
    # a (1 / sigma)^2 = (a + 1)^2 (a + 2) for a = gamma + 1. The cubic is convex for a > 0 and
    # positive at 1 / sigma, beyond its largest root, so Newton's steps fall onto that root.
    square = sigma_rel**-2
    a = 1 / sigma_rel
    while True:
        value = (a + 1) ** 2 * (a + 2) - square * a
        lower = a - value / (3 * a * a + 8 * a + 5 - square)
        if not lower < a:
            return max(a - 1, 0.0)
        a = lower


def gamma_to_sigma_rel(gamma: float) -> float:
    """Standard deviation of the density of exponent gamma, in shares of its length."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


# -- reconstruction -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """A power-function average as it stood at a moment of a run."""

    sigma_rel: float
    images_seen: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Reconstruction:
    """How averages that were kept are added up to one that was not."""

    sigma_rel: float
    images_seen: int
    factors: tuple[float, ...]
    """Of the snapshots, in their order; they add up to 1."""
    expected_error: float
    """||wanted density - sum of densities|| / ||wanted density|| in L2: the relative error for
    weights that move at random from image to image, and far above it for smoother paths."""


@dataclass(frozen=True)
class Reconstructed:
    """Averages of a length that was not tracked."""

    tensors: dict[str, Tensor]
    """In the dtype of the snapshots."""
    expected_error: float
    """As of :class:`Reconstruction`."""


def reconstruct(
    snapshots: Sequence[Snapshot], sigma_rel: float, *, images_seen: int | None = None
) -> Reconstructed:
    """Averages of relative length ``sigma_rel`` after ``images_seen`` (None: the last snapshot).

    Raises ConfigError for a length that no power function has, DataError for snapshots that are too
    few, later than that moment, or not of the same weights.
    """
    moments = [(s.sigma_rel, s.images_seen) for s in snapshots]
    plan = plan_reconstruction(moments, sigma_rel, images_seen=images_seen)
    terms = zip(plan.factors, (s.tensors for s in snapshots), strict=True)
    return Reconstructed(weighted_sum(terms), plan.expected_error)


def plan_reconstruction(
    moments: Sequence[tuple[float, int]], sigma_rel: float, *, images_seen: int | None = None
) -> Reconstruction:
    """Least-squares factors of averages of (sigma_rel, images seen); raises as reconstruct.

    The density wanted is approximated by a sum of theirs in L2, with factors that add up to 1:
    weights that stand still come back exactly.
    """
    gamma = sigma_rel_to_gamma(sigma_rel)
    gammas = np.array([sigma_rel_to_gamma(sigma) for sigma, _ in moments])
    end = _moment(moments, sigma_rel, images_seen)
    # In shares of the moment wanted, so that every inner product is of order one.
    times = np.array([seen / end for _, seen in moments])
    gram = inner_product(gammas[:, None], times[:, None], gammas[None], times[None])
    wanted = np.array(gamma), np.array(1.0)
    goal = inner_product(gammas, times, *wanted)
    norm = float(inner_product(*wanted, *wanted))
    if (sigma_rel, end) in moments:
        # It was kept: what least squares would add to it is rounding.
        factors = np.zeros(len(moments))
        factors[list(moments).index((sigma_rel, end))] = 1.0
    else:
        factors = _least_squares(gram, goal)
    left = norm - 2 * float(factors @ goal) + float(factors @ gram @ factors)
    return Reconstruction(
        sigma_rel=sigma_rel,
        images_seen=end,
        factors=tuple(float(f) for f in factors),
        expected_error=math.sqrt(max(left, 0.0) / norm),
    )


def inner_product(
    gamma: np.ndarray, t: np.ndarray, other_gamma: np.ndarray, other_t: np.ndarray
) -> np.ndarray:
    """Integral of the product of two densities, over all images: float64, broadcast.

    (g + 1) (h + 1) / (g + h + 1) * (u / v)^k / v, for the earlier end u, the later one v and the
    exponent k of the density that ends at v.
    """
    first, last = np.minimum(t, other_t), np.maximum(t, other_t)
    of_last = np.where(t > other_t, gamma, other_gamma)
    scale = (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1)
    return scale * (first / last) ** of_last / last


def weighted_sum(terms: Iterable[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Sum of factor * tensors, in float64, given in the dtype of the first; one term at a time.

    Raises DataError for no terms, and for terms that are not of the same weights.
    """
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for factor, tensors in terms:
        if not total:
            dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
            total = {name: factor * tensor.double() for name, tensor in tensors.items()}
            continue
        for name in sorted(total.keys() | tensors.keys()):
            ours, theirs = (
                None if name not in found else tuple(found[name].shape)
                for found in (total, tensors)
            )
            if ours != theirs:
                raise DataError(
                    f"snapshots are of different weights: {name} has shape {ours or 'none'} in one "
                    f"and {theirs or 'none'} in another; give those of one run"
                )
        for name, tensor in tensors.items():
            total[name].add_(tensor.double(), alpha=factor)
    if not total:
        raise DataError("there are no averages to add up: give snapshots that hold weights")
    return {name: tensor.to(dtypes[name]) for name, tensor in total.items()}


def _least_squares(gram: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Factors that minimise the distance and add up to 1: the normal equations with a multiplier.

    Many snapshots, or one that is given twice, make them singular: the shortest answer is taken.
    """
    size = np.sqrt(np.diag(gram))
    count = len(goal)
    system = np.zeros((count + 1, count + 1))
    # Densities of norm one: those of early snapshots are so much taller than the others.
    system[:count, :count] = gram / np.outer(size, size)
    system[:count, count] = system[count, :count] = 1 / size
    found = np.linalg.lstsq(system, np.append(goal / size, 1.0), rcond=SOLVABLE)[0]
    return found[:count] / size


def _moment(moments: Sequence[tuple[float, int]], sigma_rel: float, asked: int | None) -> int:
    """Where the average wanted ends. Raises DataError."""
    if not moments:
        raise DataError(
            "there are no snapshots to reconstruct from: train with train.ema_power, as "
            "(0.05, 0.10)"
        )
    end = max(seen for _, seen in moments) if asked is None else asked
    for _, seen in moments:
        if seen < 1:
            raise DataError(f"a snapshot is of image {seen}: it must be of 1 or a later one")
        if seen > end:
            raise DataError(
                f"a snapshot is of image {seen:,}, after the moment wanted ({end:,}): leave it "
                "out, for it has seen weights that the average wanted has not"
            )
    if (sigma_rel, end) not in moments and len(set(moments)) < 2:
        raise DataError(
            f"one snapshot, of sigma_rel {moments[0][0]} at image {moments[0][1]:,}, gives no "
            "other average: give more, of two lengths at best"
        )
    return end


def _wide(weight: Tensor) -> Tensor:
    """At least float32: a small share of a half-precision number is rounded away."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
