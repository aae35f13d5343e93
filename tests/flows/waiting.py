"""Doing something beside a launcher as soon as something is true."""

import threading
import time
from collections.abc import Callable
from typing import Any

UPDATES = {"train.images": 60 * 32}
"""Of the run that the launchers' tests train."""


def wait_for(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 90
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def when(true: Callable[[], Any], then: Callable[[], Any]) -> threading.Thread:
    """Do something beside the caller as soon as something is true."""

    def waits() -> None:
        wait_for(true)
        then()

    thread = threading.Thread(target=waits)
    thread.start()
    return thread
