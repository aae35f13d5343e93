"""Keeps a worker alive: starts it again when it was killed, and looks after runs that were lost.

``python -m infra.keeper NAME COMMAND...`` runs the command (``prefect worker start --name=NAME
...``) as a child until it is told to end. It is what `eqm up` starts as the worker, and what a
container of a worker may start. The Prefect is that of the environment (PREFECT_API_URL).
"""

import contextlib
import datetime
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from types import FrameType

from infra.deployments import PrefectApi
from infra.orphans import Orphans, living_runs, stage_programs
from infra.processes import MARK
from infra.stack import ServiceError

LOOK_SECONDS = 1.0
ORPHANS_SECONDS = 10.0
"""Between two looks at the runs."""
WELL_SECONDS = 60.0
"""A worker that ran for so long was well: the next start after it waits for the least time."""
LONGEST_WAIT_SECONDS = 60.0
PROGRAMS_SECONDS = 110.0
"""For programs to end in, once the worker has; less than containers are given."""
LEAST_SECONDS = 0.1


class Keeper:
    """A worker's command, kept running."""

    def __init__(self, name: str, command: list[str], *, api: PrefectApi) -> None:
        self._command = command
        # `eqm down` tells every process that has its mark; nobody else tells those of a container.
        self._tells = MARK not in os.environ
        self._mark = os.environ.get(MARK) or secrets.token_hex(16)
        self._orphans = Orphans(api, name, say=_say)
        self._end = threading.Event()

    def run(self) -> int:
        """Until SIGTERM; the status of a worker that cannot even start once."""
        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, self._told)
        wait_seconds = LOOK_SECONDS
        first = True
        while not self._end.is_set():
            began = time.monotonic()
            status = self._watch()
            lived = time.monotonic() - began
            if first and status > 0 and not self._end.is_set() and lived < WELL_SECONDS:
                # It said why, and whoever started us waits for it.
                return status
            first = False
            if lived > WELL_SECONDS:
                wait_seconds = LOOK_SECONDS
            if not self._end.wait(wait_seconds):
                _say(f"the worker ended with {status} after {lived:.0f} s: starting it again")
            wait_seconds = min(2 * wait_seconds, LONGEST_WAIT_SECONDS)
        return 0

    def _told(self, _kind: int, _frame: FrameType | None) -> None:
        self._end.set()

    def _watch(self) -> int:
        """Start the worker and look after it until it ends; its status."""
        since = datetime.datetime.now(datetime.UTC)
        child = subprocess.Popen(self._command, env={**os.environ, MARK: self._mark})
        looked = time.monotonic()
        while child.poll() is None:
            if self._end.wait(LOOK_SECONDS):
                child.terminate()
                status = child.wait()
                self._wait_for_programs()
                return status
            if time.monotonic() - looked > ORPHANS_SECONDS:
                self._look(since)
                looked = time.monotonic()
        return child.returncode

    def _wait_for_programs(self) -> None:
        """Let programs of runs make their checkpoints: with us, a container kills all that is left.

        The worker kills its flows at once, which then tell their programs nothing.
        """
        deadline = time.monotonic() + PROGRAMS_SECONDS
        mark = f"{MARK}={self._mark}".encode()
        told: set[int] = set()
        while any(living_runs(mark)) and time.monotonic() < deadline:
            for pid in set(stage_programs(mark)) - told if self._tells else ():
                told.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            time.sleep(LEAST_SECONDS)

    def _look(self, since: datetime.datetime) -> None:
        try:
            self._orphans.look(worker_since=since)
        except ServiceError as error:
            # A Prefect that is away is asked again; the worker does the same.
            _say(f"runs could not be looked at: {error}")


def _say(line: str) -> None:
    sys.stderr.write(f"keeper: {line}\n")
    sys.stderr.flush()


def main(argv: list[str]) -> int:
    """Keep a command running."""
    if len(argv) < 2:
        sys.stderr.write("usage: python -m infra.keeper NAME COMMAND...\n")
        return 2
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        sys.stderr.write("error: PREFECT_API_URL is not set: a worker needs a Prefect\n")
        return 2
    return Keeper(argv[0], argv[1:], api=PrefectApi(url, os.environ)).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
