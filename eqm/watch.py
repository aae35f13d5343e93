"""Collectives that are under way, and since when: what tells of one that does not end on GPUs.

Waiting for a collective of NCCL returns at once, and it is the next copy to the host that hangs
where another rank does not come. NCCL's own watchdog then ends the process with a signal, and names
nobody. Called by distributed.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

LONGEST_PAUSE_SECONDS = 1.0
"""Between two looks: for so long what is done is held on to."""


class Work(Protocol):
    """A collective that was begun."""

    def is_completed(self) -> bool:
        """Whether it has ended, well or not."""
        ...


class Watch:
    """Looks after collectives in a thread, from when they are begun.

    ``late`` is called, once and in that thread, with the age of the first one that does not end in
    ``seconds``.
    """

    def __init__(self, seconds: float, late: Callable[[float], None]) -> None:
        self._seconds, self._late = seconds, late
        self._under_way: deque[tuple[Work, float]] = deque()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="collectives", daemon=True)
        self._thread.start()

    def add(self, work: Work) -> None:
        """Look after one that begins now. They end in the order in which they begin."""
        self._under_way.append((work, time.monotonic()))

    def close(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(min(LONGEST_PAUSE_SECONDS, self._seconds / 10)):
            while self._under_way and self._under_way[0][0].is_completed():
                self._under_way.popleft()
            if self._under_way:
                age = time.monotonic() - self._under_way[0][1]
                if age > self._seconds:
                    self._late(age)
                    return
