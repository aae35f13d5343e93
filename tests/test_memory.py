"""Freed memory is kept: after a few steps, further ones cost few pages of the system."""

import subprocess
import sys

import pytest

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
