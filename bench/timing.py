"""Medians of alternating runs: noise of a shared machine falls on both sides alike."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


def alternate(sides: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, measured in turn ``rounds`` times after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def show(seconds: dict[str, list[float]], *, base: str, unit: str = "s", scale: float = 1) -> None:
    """Print the median of each side and its ratio to the base side."""
    reference = statistics.median(seconds[base])
    for name, values in seconds.items():
        middle = statistics.median(values)
        low, high = min(values) * scale, max(values) * scale
        ratio = middle / reference
        print(f"{name:32} {middle * scale:9.4g} {unit}  ({low:.4g} to {high:.4g})  x {ratio:.3f}")


@dataclass(frozen=True)
class Spent:
    """What one run took."""

    wall: float
    """Seconds that passed."""
    cores: float
    """Seconds of cores that this process used: what others do beside it hardly enters."""


def paired(sides: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, list[Spent]]:
    """What each side took, measured in turn ``rounds`` times after one that is not counted."""
    spent: dict[str, list[Spent]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            wall, cores = time.perf_counter(), time.process_time()
            run()
            found = Spent(time.perf_counter() - wall, time.process_time() - cores)
            if number:
                spent[name].append(found)
    return spent


def show_pairs(spent: dict[str, list[Spent]], *, base: str) -> None:
    """Print the median of each side, and of its ratios to the base side of the same round."""
    for name in spent:
        line = [f"{name:32}"]
        for clock in ("wall", "cores"):
            mine, other = ([getattr(run, clock) for run in spent[n]] for n in (name, base))
            ratios = [a / b for a, b in zip(mine, other, strict=True)]
            line.append(
                f"{clock} {statistics.median(mine):8.3f} s  x {statistics.median(ratios):.3f} "
                f"({min(ratios):.3f} to {max(ratios):.3f})"
            )
        print("  ".join(line), flush=True)
