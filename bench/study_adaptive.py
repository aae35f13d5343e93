"""Study: is a threshold on the gradient's norm better spent than a fixed number of updates?

One descent of 250 updates a seed range holds both: the fixed count k is its point k, the threshold
t its first point with a norm below t, so both see the same noise, labels and model. Distances at
equal mean evaluations are compared in pairs over five ranges; thresholds are chosen on a sixth.
Then the wall-clock time of slots against carrying everybody to the end of the last.

    python -m bench study_adaptive
"""

import time

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
BUDGETS = (60, 80, 100, 120, 140, 170, 200)
"""Mean field evaluations a sample."""
T_975 = 2.776
"""97.5 % point of Student's t with RANGES - 1 = 4 degrees of freedom."""


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

    def evaluations(self, threshold: float) -> Tensor:
        """(N,) evaluations until a norm is below the threshold; the one that tells is counted."""
        below = self.norms < threshold
        first = torch.where(below.any(dim=0), below.int().argmax(dim=0) + 1, UPDATES)
        return first

    def adaptive(self, threshold: float) -> Tensor:
        """Samples where their norm first is below the threshold: one move less than evaluated."""
        spent = self.evaluations(threshold)
        stopped = (self.norms < threshold).any(dim=0)
        return self.points[spent - stopped.int(), torch.arange(SAMPLES)]


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


def threshold_for(descended: Descended, budget: float) -> float:
    """The threshold at which the mean number of evaluations is the budget, by bisection."""
    low, high = 0.0, float(descended.norms.max())
    for _ in range(40):
        middle = (low + high) / 2
        if float(descended.evaluations(middle).double().mean()) > budget:
            low = middle
        else:
            high = middle
    return high


def pareto(trained: Model, judge: Judge) -> None:
    """Print distances by budget: fixed, adaptive, and the paired difference."""
    chosen_on = Descended(trained, RANGES * SAMPLES)
    thresholds = {b: threshold_for(chosen_on, b) for b in BUDGETS}
    fixed: dict[int, list[float]] = {b: [] for b in (*BUDGETS, UPDATES - 1)}
    adaptive: dict[int, list[float]] = {b: [] for b in BUDGETS}
    interpolated: dict[int, list[float]] = {b: [] for b in BUDGETS}
    spent: dict[int, list[float]] = {b: [] for b in BUDGETS}
    for k in range(RANGES):
        descended = Descended(trained, k * SAMPLES)
        for budget in fixed:
            fixed[budget].append(_distance(trained, judge, descended.fixed(budget)))
        for budget, threshold in thresholds.items():
            used = float(descended.evaluations(threshold).double().mean())
            spent[budget].append(used)
            adaptive[budget].append(_distance(trained, judge, descended.adaptive(threshold)))
            # The fixed count that spends the same on this very range.
            same = descended.fixed(round(used))
            interpolated[budget].append(_distance(trained, judge, same))
        print(f"   range {k + 1} of {RANGES}", flush=True)
    _print(judge, thresholds, fixed, adaptive, interpolated, spent)


def _distance(trained: Model, judge: Judge, latents: Tensor) -> float:
    return judge.distance(trained.autoencoder.decode(latents))


def _print(judge, thresholds, fixed, adaptive, interpolated, spent) -> None:
    print(f"{judge.name}-{SAMPLES}, mean of {RANGES} seed ranges")
    print("evaluations  threshold    fixed  adaptive   adaptive - fixed, 95 % (paired)")
    for budget, threshold in thresholds.items():
        low, middle, high = interval(np.array(adaptive[budget]) - np.array(interpolated[budget]))
        print(
            f"{np.mean(spent[budget]):11.1f} {threshold:10.3f} {np.mean(interpolated[budget]):8.3f}"
            f" {np.mean(adaptive[budget]):9.3f}   {middle:+.3f} ({low:+.3f} to {high:+.3f})"
        )
    best_fixed = min(fixed, key=lambda b: np.mean(fixed[b]))
    best = min(adaptive, key=lambda b: np.mean(adaptive[b]))
    print(
        f"best fixed count {best_fixed}: {np.mean(fixed[best_fixed]):.3f}; 249: "
        f"{np.mean(fixed[UPDATES - 1]):.3f}; best threshold {thresholds[best]:.3f} at "
        f"{np.mean(spent[best]):.1f} evaluations: {np.mean(adaptive[best]):.3f}"
    )


def interval(differences: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean of paired differences with its 95 % interval (Student): low, mean, high."""
    middle = float(differences.mean())
    reach = T_975 * float(differences.std(ddof=1)) / len(differences) ** 0.5
    return middle - reach, middle, middle + reach


def clock(trained: Model, threshold: float, *, slots: int = 32, fulls: int = 24) -> None:
    """Print what slots save in evaluations and in seconds, tail included."""
    count, cap = slots * fulls, UPDATES - 1
    labels = torch.arange(count) % 10
    seconds: dict[str, list[float]] = {"fixed": [], "adaptive": []}
    found = None
    for _ in range(3):
        for name, stop in (("fixed", None), ("adaptive", GradientNormBelow(threshold))):
            began = time.perf_counter()
            out = sample(
                trained,
                labels=labels,
                seeds=range(count),
                rule=RULE,
                updates=cap,
                stop=stop,
                slots=slots,
            )
            seconds[name].append(time.perf_counter() - began)
            found = out if stop else found
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
    pareto(trained, judge)
    clock(trained, threshold_for(Descended(trained, RANGES * SAMPLES), 100))


if __name__ == "__main__":
    main()
