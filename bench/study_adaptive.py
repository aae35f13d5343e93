"""Study: is a threshold on the gradient's norm better spent than a fixed number of updates?

One descent of 250 updates a seed range holds everything: the fixed count k is its point k, a
threshold its first point with a norm below it, so all see the same noise, labels and model.
Distances at equal mean evaluations are compared in pairs over five ranges, for a threshold alone
and for a threshold with a cap on the updates (which, at no threshold, is the fixed count). What is
free is chosen on a sixth range. Then the wall-clock time of slots against that of a fixed count.

    python -m bench study_adaptive
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.digits import FOLDER, Judge, digits, model
from eqm.model import Model
from eqm.rules import NAG
from eqm.sampler import GradientNormBelow, Look
from eqm.sampling import sample

SAMPLES, UPDATES, RANGES = 1000, 250, 5
CHUNK = 250
"""Samples carried down at once: more would leave the cache."""
RULE = NAG(step_size=0.003, momentum=0.3)
"""The paper's for B/2, so that its 249 updates are the ones to beat."""
BUDGETS = (60, 70, 80, 90, 100, 120, 150, 200)
"""Mean field evaluations a sample."""
SPREADS = (1.0, 1.05, 1.1, 1.2, 1.4, 2.0)
"""Caps that are tried, in shares of the budget."""
T_975 = 2.776
"""97.5 % point of Student's t with RANGES - 1 = 4 degrees of freedom."""


Distance: TypeAlias = Callable[[Tensor], float]
"""Latents -> distance of their images to the training digits."""


class Descended:
    """Every point of the descent of one seed range, pixels uint8, and the norm at every update."""

    def __init__(self, trained: Model, first_seed: int) -> None:
        starts = range(first_seed, first_seed + SAMPLES, CHUNK)
        parts = [_way_down(trained, start) for start in starts]
        self.points = torch.cat([points for points, _ in parts], dim=1)
        """(UPDATES + 1, N, 1, 8, 8): where the samples are after k updates."""
        self.norms = torch.cat([found for _, found in parts], dim=1)
        """(UPDATES, N): of the gradient that update k + 1 would follow."""

    def fixed(self, count: int) -> Tensor:
        """Samples after a fixed number of evaluations."""
        return self.points[count]

    def evaluations(self, stop: "Stop") -> Tensor:
        """(N,) evaluations until a norm is below the threshold; the one that tells is counted."""
        below = self.norms[: stop.cap] < stop.threshold
        return torch.where(below.any(dim=0), below.int().argmax(dim=0) + 1, stop.cap)

    def mean(self, stop: "Stop") -> float:
        """Mean number of evaluations."""
        return float(self.evaluations(stop).double().mean())

    def adaptive(self, stop: "Stop") -> Tensor:
        """Samples where their norm first is below the threshold: one move less than evaluated."""
        spent = self.evaluations(stop)
        stopped = (self.norms[: stop.cap] < stop.threshold).any(dim=0)
        return self.points[spent - stopped.int(), torch.arange(SAMPLES)]


@dataclass(frozen=True)
class Stop:
    """When a sample ends."""

    threshold: float
    cap: int


def _way_down(trained: Model, first_seed: int) -> tuple[Tensor, Tensor]:
    points, found = [], []

    def look(update: int, x: Tensor) -> None:
        points.append(x)

    def stop(sight: Look) -> Tensor:
        found.append(sight.gradient_norms)
        return torch.zeros_like(sight.gradient_norms, dtype=torch.bool)

    sample(
        trained,
        labels=torch.arange(CHUNK) % 10,
        seeds=range(first_seed, first_seed + CHUNK),
        rule=RULE,
        updates=UPDATES,
        stop=stop,
        on_update=look,
    )
    return torch.stack(points), torch.stack(found)


def stop_for(descended: Descended, budget: float, cap: int) -> Stop:
    """The threshold at which the mean number of evaluations is the budget, by bisection."""
    low, high = 0.0, float(descended.norms.max())
    for _ in range(40):
        middle = (low + high) / 2
        if descended.mean(Stop(middle, cap)) > budget:
            low = middle
        else:
            high = middle
    return Stop(high, cap)


def capped_for(descended: Descended, budget: int, distance: Distance) -> Stop:
    """The best threshold and cap of one budget; no threshold is one of them."""
    caps = [min(UPDATES, round(spread * budget)) for spread in SPREADS]
    stops = [Stop(0.0, budget), *(stop_for(descended, budget, cap) for cap in caps[1:])]
    return min(stops, key=lambda stop: distance(descended.adaptive(stop)))


@dataclass(frozen=True)
class Row:
    """One policy on all ranges."""

    name: str
    stop: Stop
    spent: NDArray[np.float64]
    distances: NDArray[np.float64]
    fixed: NDArray[np.float64]
    """Of the fixed count that spends the same on the same range."""


def row(name: str, stop: Stop, ranges: list[Descended], distance: Distance) -> Row:
    """Measure a policy on all ranges."""
    spent = [descended.mean(stop) for descended in ranges]
    found = [distance(descended.adaptive(stop)) for descended in ranges]
    same = [distance(d.fixed(round(n))) for d, n in zip(ranges, spent, strict=True)]
    return Row(name, stop, *map(np.array, (spent, found, same)))


def pareto(trained: Model, judge: Judge) -> Stop:
    """Print distances by budget and policy, and what is saved; returns the threshold of 100."""

    def distance(latents: Tensor) -> float:
        return judge.distance(trained.autoencoder.decode(latents))

    chosen_on = Descended(trained, RANGES * SAMPLES)
    ranges = []
    for k in range(RANGES):
        ranges.append(Descended(trained, k * SAMPLES))
        print(f"   range {k + 1} of {RANGES}", flush=True)
    print(f"{judge.name}-{SAMPLES}, mean of {RANGES} seed ranges; differences are paired, 95 %")
    rows = []
    for budget in BUDGETS:
        plain = stop_for(chosen_on, budget, UPDATES)
        rows.append(row("threshold", plain, ranges, distance))
        capped = capped_for(chosen_on, budget, distance)
        rows.append(row("threshold, cap", capped, ranges, distance))
        for found in rows[-2:]:
            _print(found)
    _against_best(rows, ranges, distance)
    return stop_for(chosen_on, 100, UPDATES)


def _print(found: Row) -> None:
    low, middle, high = interval(found.distances - found.fixed)
    print(
        f"{found.spent.mean():6.1f} evaluations, {found.name:14} ({found.stop.threshold:6.2f}, "
        f"{found.stop.cap:3}): {found.distances.mean():.3f}, fixed {found.fixed.mean():.3f}, "
        f"difference {middle:+.4f} ({low:+.4f} to {high:+.4f})",
        flush=True,
    )


def _against_best(rows: list[Row], ranges: list[Descended], distance: Distance) -> None:
    counts = (*range(60, 140, 5), 150, 200, UPDATES - 1)
    fixed = {k: np.array([distance(d.fixed(k)) for d in ranges]) for k in counts}
    best = min(fixed, key=lambda k: fixed[k].mean())
    print(
        f"best fixed count {best}: {fixed[best].mean():.3f}; {UPDATES - 1} updates: "
        f"{fixed[UPDATES - 1].mean():.3f}"
    )
    good = [r for r in rows if interval(r.distances - fixed[best])[0] <= 0]
    cheapest = min(good, key=lambda r: r.spent.mean())
    low, middle, high = interval(cheapest.distances - fixed[best])
    saved = 1 - cheapest.spent.mean() / best
    print(
        f"cheapest policy that is no worse than it: {cheapest.name} {cheapest.stop}, "
        f"{cheapest.spent.mean():.1f} evaluations (saves {100 * saved:.1f} % of {best}): "
        f"{cheapest.distances.mean():.3f}, difference {middle:+.4f} ({low:+.4f} to {high:+.4f})"
    )


def interval(differences: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean of paired differences with its 95 % interval (Student): low, mean, high."""
    middle = float(differences.mean())
    reach = T_975 * float(differences.std(ddof=1)) / len(differences) ** 0.5
    return middle - reach, middle, middle + reach


def clock(trained: Model, stop: Stop, *, slots: int = 32, fulls: int = 24) -> None:
    """Print what slots save in evaluations and in seconds, tail included."""
    count, cap = slots * fulls, UPDATES - 1
    policies = {"fixed": None, "adaptive": GradientNormBelow(stop.threshold)}
    labels = torch.arange(count) % 10
    seconds: dict[str, list[float]] = {"fixed": [], "adaptive": []}
    found = None
    for _ in range(3):
        for name, rule in policies.items():
            began = time.perf_counter()
            out = sample(
                trained,
                labels=labels,
                seeds=range(count),
                rule=RULE,
                updates=cap,
                stop=rule,
                slots=slots,
            )
            seconds[name].append(time.perf_counter() - began)
            found = out if rule else found
    spent = float(found.evaluations.double().mean())
    evaluations, wall = (
        1 - spent / cap,
        1 - np.median(seconds["adaptive"]) / np.median(seconds["fixed"]),
    )
    print(
        f"{count} samples in {slots} slots ({fulls} slot-fulls), at most {cap} updates: "
        f"{spent:.1f} evaluations each (-{100 * evaluations:.1f} %), "
        f"{np.median(seconds['fixed']):.1f} s -> {np.median(seconds['adaptive']):.1f} s "
        f"(-{100 * wall:.1f} %): time falls by {wall / evaluations:.2f} of what evaluations do"
    )


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    trained, judge = model(seed=0), Judge()
    held = judge.distance(digits(held_out=True).images)
    print(f"held-out digits: {held:.3f}")
    clock(trained, pareto(trained, judge))


if __name__ == "__main__":
    main()
