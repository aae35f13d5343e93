"""Freed memory is kept: after a few steps, further ones cost few pages of the system."""

import ctypes
import subprocess
import sys

import pytest

from eqm import memory

CODE = """
import resource
import torch
from eqm.memory import keep_freed

keep_freed()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
layers = torch.nn.Sequential(*(torch.nn.Linear(640, 640) for _ in range(2)))
x = torch.ones(16384, 640)
for number in range(5):
    if number == 3:
        before = faults()
    torch.nn.functional.gelu(layers(x)).sum().backward()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_memory_that_was_freed_is_taken_again_without_asking_the_system():
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    # Of 16,384 x 640 numbers, 10,240 pages each, that glibc alone asks for twelve times.
    assert int(done.stdout) < 6 * 10_240


def test_an_older_glibc_is_asked_for_what_it_allows(monkeypatch: pytest.MonkeyPatch):
    class Old:
        """Refuses more than half of its heap's size, as glibc did before 2.35."""

        def __init__(self, name: None):
            self.gnu_get_libc_version = None

        def mallopt(self, what: int, value: int) -> int:
            if what == memory.M_MMAP_THRESHOLD and value > 2**25:
                return 0
            kept[what] = value
            return 1

    kept: dict[int, int] = {}
    monkeypatch.setattr(ctypes, "CDLL", Old)
    memory.keep_freed()
    assert kept == {memory.M_MMAP_THRESHOLD: 2**25, memory.M_TRIM_THRESHOLD: 2**31 - 1}
