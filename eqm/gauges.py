"""What is measured of a training beside its curve: losses by level, norms, memory, rates.

Nothing here waits for the device but :func:`band_figures` and :func:`parameter_norm`, which are for
reports, and :func:`fingerprint`, which is for checkpoints. Pure but for the clock and the counters
of this process. Called by learner, train, run, guards and reporting.
"""

import contextlib
import math
import re
import resource
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

NORM_PART = 2**19
"""Numbers of which torch's own norm is right to a few millionths."""
BANDS = 5
"""Equal intervals of gamma, from noise (0) to data (1)."""


def by_band(losses: Tensor, gamma: Tensor) -> Tensor:
    """Sum of the losses of images (B,) in each band of their levels gamma (B,), and their number.

    (2 BANDS,) in the dtype of the losses: sums, then numbers. They add up over ranks and updates.
    """
    band = (gamma * BANDS).long().clamp(0, BANDS - 1)
    inside = band == torch.arange(BANDS, device=band.device).unsqueeze(1)
    # Not a product: one loss that is infinite would be NaN in all bands.
    sums = torch.where(inside, losses, losses.new_zeros(())).sum(dim=1)
    return torch.cat([sums, inside.sum(dim=1).to(losses.dtype)])


def band_figures(tally: Tensor) -> dict[str, float]:
    """Mean loss of each band, and how many images it is a mean of; no mean of none."""
    sums, counts = tally.double().reshape(2, BANDS).tolist()
    names = [f"gamma_{k / BANDS:.1f}_{(k + 1) / BANDS:.1f}" for k in range(BANDS)]
    means = {f"loss/{n}": s / c for n, s, c in zip(names, sums, counts, strict=True) if c}
    return means | {f"images/{n}": c for n, c in zip(names, counts, strict=True)}


def norm(values: Tensor) -> Tensor:
    """Euclidean norm () of a flat tensor (N,), to a few millionths.

    On a CPU torch adds the squares up in a few running sums: of 30 million numbers in float32 the
    norm is 0.02 to 0.2 % too small, and of 130 million 0.1 to 1 %. Parts are not.
    """
    if not values.is_cpu or len(values) <= NORM_PART:
        return values.norm()
    return torch.stack([part.norm() for part in values.split(NORM_PART)]).norm()


def parameter_norm(parameters: Iterable[Tensor]) -> float:
    """Length of all weights as one vector."""
    norms = [norm(parameter.detach().flatten()).double() for parameter in parameters]
    return float(torch.stack(norms).norm())


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """A number of 62 bits that any one changed bit changes, and equal bits never do.

    Bit patterns are added up where they lie, and one number of each tensor comes to the host.
    """
    sums = [_bits(tensor.detach()).sum(dtype=torch.int64) for tensor in tensors]
    found = 0
    for one in torch.stack([s.cpu() for s in sums]).tolist():
        found = (found * 1_000_003 + one) % 2**62
    return found


def _bits(tensor: Tensor) -> Tensor:
    if tensor.itemsize == 8:
        # In halves: the two highest bits of 64 are lost where the sums are cut to 62.
        return tensor.flatten().view(torch.int32)
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory that this process has held, in bytes: of the machine, and of its GPU."""
    found = {"memory_peak_bytes": _resident_peak()}
    if device.type == "cuda":
        found["gpu_memory_peak_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return found


def _resident_peak() -> float:
    """Bytes. Of ``getrusage`` a process inherits the peak of whoever started it."""
    with contextlib.suppress(FileNotFoundError):
        status = Path("/proc/self/status").read_text()
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
        if found is not None:
            return 1024.0 * int(found[1])
    # Not Linux, or a sandbox that imitates it in part.
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def finite(figures: dict[str, float]) -> dict[str, float]:
    """Those that have a JSON form, and MLflow a place for."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}


class Stopwatch:
    """How fast images go by, and how long they are waited for, between two reports."""

    def __init__(self) -> None:
        self._began, self._waited, self._count = time.monotonic(), 0.0, 0

    def waiting_for(self, things: Iterable[T]) -> Iterator[T]:
        """The same things; time until each of them is there counts as waiting."""
        coming = iter(things)
        self._began = time.monotonic()
        while True:
            asked = time.monotonic()
            try:
                thing = next(coming)
            except StopIteration:
                return
            self._waited += time.monotonic() - asked
            self._count += 1
            yield thing

    def figures(self, images_each: int) -> dict[str, float]:
        """Images a second, seconds a step, and the share of the time spent waiting; begins anew.

        All that a training does between two reports is in them, checkpoints and grids as well.
        """
        now = time.monotonic()
        seconds, waited, count = max(now - self._began, 1e-9), self._waited, self._count
        self._began, self._waited, self._count = now, 0.0, 0
        step = {"step_seconds": seconds / count} if count else {}
        rate = count * images_each / seconds
        return {"images_per_second": rate, "data_wait_share": waited / seconds, **step}
