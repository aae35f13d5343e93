"""Medians of alternating runs: noise of a shared machine falls on both sides alike."""

import statistics
import time
from collections.abc import Callable


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
