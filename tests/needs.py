"""What some tests need of the machine, and are skipped without."""

import shutil

import pytest

compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))),
    reason="torch.compile needs a C++ compiler: install g++",
)
