"""Work on a GPU, recorded once and replayed: one call starts all of its kernels (CUDA graphs).

What starts a kernel costs the host 5 to 200 us, and a kernel of a small network takes no longer:
S/2's update of 256 images was 30 ms of work on an H200, and 80 of calls. Called by learner.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from eqm.errors import ConfigError

WARM = 2
"""Calls before it is recorded: libraries make what they keep at the first, and choose kernels."""


class Recorded:
    """A function of tensors of fixed shapes, or None, on one GPU, that gives a tensor.

    It is called twice as it is, then recorded, and from then on replayed: the same kernels in the
    same order, and the same bits. All else that it reads or writes must stay where it is in memory;
    what memory it needs itself is kept for it. ``remedy`` is what to do where it cannot be
    recorded, which raises ConfigError. Raises ValueError for tensors of other shapes than the
    first.
    """

    def __init__(self, function: Callable[..., Tensor], *, remedy: str) -> None:
        self._function, self._remedy = function, remedy
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: tuple[Tensor | None, ...] = ()
        self._found = torch.empty(0)

    def __call__(self, *given: Tensor | None) -> Tensor:
        """What the function gives, which is the caller's own."""
        if self._graph is None and self._calls < WARM:
            self._calls += 1
            return self._aside(given)
        if self._graph is None:
            self._graph = self._record(given)
        for kept, new in zip(self._given, given, strict=True):
            if _shape(kept) != _shape(new):
                raise ValueError(f"recorded with {_shape(kept)}, and now given {_shape(new)}")
            if kept is not None and new is not None:
                kept.copy_(new)
        self._graph.replay()
        return self._found.clone()

    def _aside(self, given: tuple[Tensor | None, ...]) -> Tensor:
        """In a stream of its own, as CUDA asks of what is to be recorded."""
        here, aside = torch.cuda.current_stream(), _stream(torch.cuda.current_device())
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            found = self._function(*given)
        here.wait_stream(aside)
        found.record_stream(here)
        return found

    def _record(self, given: tuple[Tensor | None, ...]) -> torch.cuda.CUDAGraph:
        self._given = tuple(None if t is None else t.clone() for t in given)
        graph, stream = torch.cuda.CUDAGraph(), _stream(torch.cuda.current_device())
        try:
            # Of this thread alone: others copy checkpoints and batches meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._found = self._function(*self._given)
        except RuntimeError as last:
            # Where the step fails, so does the end of its recording, which says less.
            error = last.__context__ if isinstance(last.__context__, RuntimeError) else last
            if isinstance(error, torch.OutOfMemoryError):
                raise error from last
            said = str(error).partition("\n")[0]
            raise ConfigError(f"this step cannot be recorded ({said}): {self._remedy}") from error
        return graph


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """One for all: libraries keep memory for each stream that they were ever called in."""
    return torch.cuda.Stream(device)


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)
