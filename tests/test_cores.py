"""A container's limit of CPUs is what threads are counted by, and not the cores of its node."""

import math
import os
from pathlib import Path

import pytest

from eqm import cores


def laid_out(folder: Path, own: str, files: dict[str, str]) -> float:
    (folder / "own").write_text(own)
    for name, text in files.items():
        path = folder / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return cores.limit(folder / "groups", folder / "own")


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        # Version 2: in a container, and on a host, where a group above is narrower.
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/a/b\n", {"a/b/cpu.max": "800000 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
        # The path is the host's, and what is mounted the container's own.
        ("0::/kubepods/pod1\n", {"cpu.max": "150000 100000\n"}, 1.5),
        # Version 1, by itself and with another controller.
        (
            "3:memory:/x\n2:cpu:/x\n",
            {"cpu/x/cpu.cfs_quota_us": "300000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
            3.0,
        ),
        (
            "4:cpu,cpuacct:/docker/1\n0::/\n",
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
                "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        (
            "2:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            math.inf,
        ),
        # Of others, damaged, and none.
        ("3:cpuset:/\n", {"cpuset/cpu.max": "100000 100000\n"}, math.inf),
        ("0::/\n", {"cpu.max": "torn\n"}, math.inf),
        ("0::/\n", {}, math.inf),
    ],
)
def test_limits_of_both_versions(
    tmp_path: Path, own: str, files: dict[str, str], expected: float
) -> None:
    assert laid_out(tmp_path, own, files) == expected


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert cores.limit(tmp_path, tmp_path / "none") == math.inf


@pytest.mark.parametrize(
    ("limit", "expected"), [(0.2, 1), (1.0, 1), (1.5, 2), (2.0, 2), (8.0, 3), (math.inf, 3)]
)
def test_a_part_of_a_core_counts_and_there_is_always_one(
    monkeypatch: pytest.MonkeyPatch, limit: float, expected: int
) -> None:
    monkeypatch.setattr(cores, "limit", lambda: limit)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert cores.cores() == expected
