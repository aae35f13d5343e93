"""numpy's work on many cores: in order, with the same bits on any number of them."""

import itertools
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

import eqm.threads
from eqm import frechet
from eqm.distributed import connect
from eqm.frechet import Gaussian
from eqm.intervals import frechet_intervals, kernel_interval, recall_interval
from eqm.threads import ahead, in_threads, one_core_products


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    with threadpool_limits(limits=2, user_api="blas"):
        yield
    torch.set_num_threads(before)


def blas_threads() -> set[int]:
    return {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}


def test_products_take_one_core_where_it_was_asked_for():
    assert blas_threads() == {2}
    with one_core_products():
        assert blas_threads() == {1}
    assert blas_threads() == {2}
    with connect("cpu", threads=1):
        assert blas_threads() == {1}
    assert blas_threads() == {2}


LATER = """
import numpy
from threadpoolctl import threadpool_info
from eqm.threads import one_core_products

with one_core_products():
    pass
import scipy.linalg
with one_core_products():
    print(sorted(one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"))
"""


def test_what_is_loaded_later_takes_one_core_as_well():
    line = [sys.executable, "-c", LATER]
    told = subprocess.run(line, capture_output=True, text=True, check=True)
    assert told.stdout == "[1, 1]\n"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors, other kernels")
def test_the_kernels_are_those_that_openblas_was_told_to_take():
    code = "import numpy, eqm.threads; print(*eqm.threads.blas_kernels())"
    said = {
        kernel: subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "OPENBLAS_CORETYPE": kernel},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for kernel in ("Haswell", "Sandybridge")
    }
    if "openblas" not in said["Haswell"]:
        pytest.skip("numpy multiplies with another library here")
    assert said == {"Haswell": "openblas Haswell\n", "Sandybridge": "openblas Sandybridge\n"}


def test_the_kernels_are_the_same_whatever_else_is_loaded(monkeypatch):
    class Loaded:
        def __init__(self, *wheels: str) -> None:
            self.wheels = wheels

        def select(self, **_: str) -> "Loaded":
            return self

        def info(self) -> list[dict[str, str]]:
            kernels = {"numpy.libs": "Zen", "scipy.libs": "Haswell", "lib": "Haswell"}
            return [
                {"internal_api": "openblas", "architecture": kernels[w], "filepath": f"/{w}/a.so"}
                for w in self.wheels
            ]

    def with_loaded(*wheels: str) -> list[str]:
        monkeypatch.setattr(eqm.threads, "_libraries", lambda _: Loaded(*wheels))
        return eqm.threads.blas_kernels()

    assert with_loaded("numpy.libs", "scipy.libs") == with_loaded("numpy.libs") == ["openblas Zen"]
    # Of a distribution where all share one.
    assert with_loaded("lib") == ["openblas Haswell"]


@pytest.mark.parametrize("kind", [iter, lambda items: itertools.chain(items, itertools.count(9))])
def test_what_is_read_ahead_comes_in_order_and_ends_with_whoever_leaves(kind):
    begun: list[int] = []
    coming = ahead(lambda i: begun.append(i) or 2 * i, kind(range(9)), threads=3, name="reads")
    assert [next(coming) for _ in range(4)] == [0, 2, 4, 6]
    assert len(begun) <= 4 + 3
    coming.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("reads")]
    assert list(ahead(str, "abc", threads=5, name="reads")) == ["a", "b", "c"]
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda i: 1 // i, (1, 0, 1), threads=2, name="reads"))


def test_the_next_is_under_way_before_the_first_is_there():
    second = threading.Event()

    def made(i):
        if i == 1:
            second.set()
        # The first is ready once the second has begun.
        assert second.wait(20)
        return i

    assert list(ahead(made, range(3), threads=2, name="reads")) == [0, 1, 2]


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_the_order_of_their_items(threads):
    torch.set_num_threads(threads)
    assert list(in_threads(lambda i: (i, blas_threads()), range(20))) == [
        (i, {1}) for i in range(20)
    ]
    assert blas_threads() == {2}


@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_raised_in_a_thread_is_raised_here(threads):
    torch.set_num_threads(threads)
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda i: 1 / (i - 3), range(1000)))
    assert blas_threads() == {2}


def test_measures_have_the_same_bits_on_any_number_of_cores():
    rng = np.random.default_rng(0)
    fake, real = rng.standard_normal((700, 40)), rng.standard_normal((500, 40))
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        told: list[int] = []
        found.append(
            (
                frechet_intervals(fake, Gaussian.of(real)),
                kernel_interval(fake, real, told=told.append),
                recall_interval(real, fake, told=told.append),
                frechet.precision_recall(real, fake),
                [part.tolist() for part in frechet.nearest(fake, [real])],
            )
        )
        assert sum(told) == 2 * len(fake)
    assert found[0] == found[1] == found[2]
