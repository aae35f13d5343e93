"""How many cores this process may use, which in a container are fewer than it sees.

A limit of CPUs (``docker run --cpus 4``, ``limits: {cpu: 4}`` in Kubernetes) takes no core away: it
is a quota of time, and all threads stand still when it is used up. As many threads as a large node
has cores would spend theirs waiting for each other. Called by distributed, readahead, images,
image_sets and flows.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cores() -> int:
    """Cores that this process is bound to, or fewer where control groups limit its time."""
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), limit())))


def limit(groups: Path = GROUPS, own_groups: Path = OWN_GROUPS) -> float:
    """Cores whose time this process may use, by the control groups that it is in; else infinity.

    ``groups`` is where they are mounted, ``own_groups`` the kernel's list of those of this process.
    Both versions of Linux's control groups are understood, and what cannot be read limits nothing.
    """
    return min(_limits(groups, own_groups), default=math.inf)


def _limits(groups: Path, own_groups: Path) -> Iterator[float]:
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounted = groups / controllers
        # Of every group above it as well; seen from a container, the first may be its own.
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            yield from _of(mounted / group.relative_to("/"))


def _of(group: Path) -> Iterator[float]:
    """The limit of one group, if it has one: version 2, then version 1."""
    # A group that is not there, as that of a host seen from a container; "max" and -1 are none.
    with contextlib.suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        yield int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota = int((group / "cpu.cfs_quota_us").read_text())
        if quota > 0:
            yield quota / int((group / "cpu.cfs_period_us").read_text())
