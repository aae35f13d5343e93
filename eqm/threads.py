"""The cores of this process for numpy: pieces of work beside each other, each on one core.

OpenBLAS has threads of its own, as many as the machine has cores, that wait for each other by
spinning. Beside other work that costs a multiple of what is computed, and how many they are decides
how results are rounded. Pieces on one core each give the same bits on any number of cores, and use
as many as torch was told to. What waits and does not compute has threads of its own
(:func:`ahead`). Called by batches, checkpoint, distributed, frechet, image_sets,
intervals and stage.
"""

import contextlib
import functools
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

MOST_THREADS = 8
"""Each holds tables of its own: of 50,000 features they are 200 MB."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@functools.lru_cache(maxsize=1)
def _libraries(_: int) -> Any:
    """Those that are loaded with so many modules: scipy brings an OpenBLAS of its own."""
    from threadpoolctl import ThreadpoolController

    # To look through everything that is loaded takes milliseconds: once, until there is more.
    return ThreadpoolController()


@contextlib.contextmanager
def one_core_products() -> Iterator[None]:
    """Products and decompositions of numpy take one core each; torch's are left alone."""
    with _libraries(len(sys.modules)).limit(limits=1, user_api="blas"):
        yield


def blas_kernels() -> list[str]:
    """What multiplies for numpy, with the processor that it takes this one for.

    OpenBLAS chooses by the processor's model, or by OPENBLAS_CORETYPE, and each choice adds up in
    an order of its own: the last bits of products and decompositions are others.
    """
    found = _libraries(len(sys.modules)).select(user_api="blas").info()
    # That of numpy's wheel: what else is loaded by now differs from run to run.
    own = [each for each in found if Path(each["filepath"]).parent.name.startswith("numpy")]
    return sorted({f"{each['internal_api']} {each.get('architecture')}" for each in own or found})


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, name: str
) -> Generator[Result, None, None]:
    """Results of a function of each item, in order, of which the next ``threads`` are under way.

    For what waits for disks and networks; items may have no end. Raises what the function raises.
    """
    left = iter(items)
    with ThreadPoolExecutor(threads, name) as pool:
        coming = deque(pool.submit(function, item) for item in islice(left, threads))
        try:
            while coming:
                result = coming.popleft().result()
                coming.extend(pool.submit(function, item) for item in islice(left, 1))
                yield result
        finally:
            for future in coming:
                future.cancel()


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
