"""Waiting for a store that is away: what was asked of it is asked again, less and less often.

What boto3 itself tries again is over within seconds; a server that is restarted, or a network that
is mended, takes minutes, and no training need end for that. Called by batches,
checkpoint, run and stage.
"""

import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from eqm.errors import AwayError, TransferError

T = TypeVar("T")

PASSING = (AwayError, TransferError)
FIRST_SECONDS, LONGEST_SECONDS = 1.0, 30.0
"""Wait after the first failure, doubled after each, and the longest one."""


class Patience:
    """Asks again for ``seconds`` from when it first asked; 0: once. Safe to use by several threads.

    From then on, for a server that says nothing takes minutes to fail: whoever waits for this one
    would have given it up. What is asked must do no harm when it is done twice.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._over = threading.Event()

    def end(self) -> None:
        """Wait no more, in any thread: what fails now has failed."""
        self._over.set()

    def __call__(self, act: Callable[[], T]) -> T:
        """What an act returns. Raises what it raises last, and at once what time does not mend."""
        began, failed = time.monotonic(), False
        pause = FIRST_SECONDS
        while True:
            try:
                found = act()
            except PASSING as error:
                left = began + self.seconds - time.monotonic()
                if left <= 0 or self._over.is_set():
                    raise
                if not failed:
                    _say(f"warning: {error}. It is asked again for {left:.0f} s")
                failed = True
                self._over.wait(min(pause, left))
                pause = min(2 * pause, LONGEST_SECONDS)
                continue
            if failed:
                _say(f"the store answers again, after {time.monotonic() - began:.0f} s")
            return found


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
