"""torchrun for one machine, whose end by a signal or a rank's failure is no traceback of its own.

Ranks say themselves why they fail, and torchrun which was first. Called, as a program, by launch.
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run() -> None:
    """As ``torch.distributed.run``; the exit status is the first failed rank's, or the signal's."""
    # It warns that a signal came, and of each rank that it ends.
    logging.disable(logging.WARNING)
    try:
        main()
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        # One that lost a killed rank may have been seen to end before that one.
        killed = any(one.exitcode == -signal.SIGKILL for one in error.failures.values())
        status = -signal.SIGKILL if killed else first.exitcode
        sys.exit(status if status > 0 else 128 - status)


if __name__ == "__main__":
    run()
