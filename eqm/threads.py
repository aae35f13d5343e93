"""The cores of this process for numpy: pieces of work beside each other, each on one core.

OpenBLAS has threads of its own, as many as the machine has cores, that wait for each other by
spinning. Beside other work that costs a multiple of what is computed, and how many they are decides
how results are rounded. Pieces on one core each give the same bits on any number of cores, and use
as many as torch was told to. Called by distributed, frechet and intervals.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

MOST_THREADS = 8
"""Each holds tables of its own: of 50,000 features they are 200 MB."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@functools.cache
def _libraries() -> Any:
    from threadpoolctl import ThreadpoolController

    # To look through everything that is loaded takes milliseconds: once.
    return ThreadpoolController()


@contextlib.contextmanager
def one_core_products() -> Iterator[None]:
    """Products and decompositions of numpy take one core each; torch's are left alone."""
    with _libraries().limit(limits=1, user_api="blas"):
        yield


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results of a function of each item, in order, made on as many cores as torch may use.

    Worth it where numpy does the work, which then holds no lock. Raises what the function raises.
    """
    workers = min(torch.get_num_threads(), MOST_THREADS)
    with one_core_products():
        if workers == 1:
            yield from map(function, items)
            return
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(function, items)
