"""Flow runs whose process is gone: they are found and started again, each a few times at most.

A run whose process was killed together with its worker stays "Running" in Prefect for ever, one
that was about to be started stays "Pending", and both keep their deployment's slot. Whether a
process is gone is looked up, not concluded from a silence: every process of a run, its stage
programs included, has the run's id in its environment. A run is nobody's as long as one of them
lives: a training whose flow was killed ends by itself, and only then is the flow run again, which
finds it sealed. All flows may be run again at any time (a sealed record decides what is done), and
a lease in the store keeps a second trainer out whatever Prefect believes.

Called by infra.keeper for the runs of its own worker alone: those of another machine are left to
the worker there.
"""

import datetime
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from infra.deployments import PrefectApi

MOST_STARTS = 4
"""A run that was started so often and lost its process each time is left crashed, for people."""
GONE_SECONDS = 15.0
"""A process that ends by itself says so a little later than it is gone."""
PENDING_SECONDS = 120.0
"""From the moment in which a worker takes a run to that in which its process is there."""
CRASHED_HOURS = 24.0
"""A worker that outlives a killed process calls the run crashed; if not longer ago, it goes on."""
RUN_ID = b"PREFECT__FLOW_RUN_ID="
PROGRAM = b"_EQM_PROGRAM="
"""What flows give the programs of their stages (flows.launch)."""

Say = Callable[[str], None]
Run = dict[str, Any]


class Orphans:
    """The runs of one worker, looked at again and again."""

    def __init__(self, api: PrefectApi, worker: str, *, say: Say) -> None:
        self._api, self._worker, self._say = api, worker, say
        self._gone_since: dict[str, float] = {}

    def look(self, *, worker_since: datetime.datetime) -> None:
        """Look once, and mend what has been gone for long enough. Raises ServiceError.

        ``worker_since``: when the worker that runs now was started; what an earlier one took and
        no process works on is nobody's for sure.
        """
        living = set(living_runs())
        gone = {run["id"]: run for run in self._runs() if run["id"] not in living}
        now = time.monotonic()
        self._gone_since = {id_: self._gone_since.get(id_, now) for id_ in gone}
        for id_, run in gone.items():
            if now - self._gone_since[id_] >= _patience(run, worker_since):
                self._mend(run)

    def _runs(self) -> Iterator[Run]:
        earliest = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=CRASHED_HOURS)
        for run in self._api.unfinished_runs(crashed_since=earliest):
            worker = (run.get("labels") or {}).get("prefect.worker.name")
            # One without a name was being taken when its worker was killed.
            if worker == self._worker or (worker is None and run["state"]["type"] == "PENDING"):
                yield run

    def _mend(self, run: Run) -> None:
        kind, starts = run["state"]["type"], run["run_count"]
        # Nobody waits for them any more: started again, it asks for its own.
        for name in self._api.cancel_children(run["id"]):
            self._say(f"run {name} is cancelled: the process of its parent {run['name']} is gone")
        if kind == "CANCELLING":
            self._set(run, "CANCELLED", "Cancelled", "its process is gone")
        elif starts < MOST_STARTS:
            self._set(
                run, "SCHEDULED", "AwaitingRetry", "its process is gone: it is started once more"
            )
        elif kind != "CRASHED":
            why = f"its process is gone, as after each of {starts} starts: see the worker's log"
            self._set(run, "CRASHED", "Crashed", why)

    def _set(self, run: Run, kind: str, name: str, why: str) -> None:
        self._say(f"run {run['name']} ({run['id']}) is {run['state']['name']}, and {why}")
        self._api.set_state(run["id"], kind=kind, name=name, message=f"Found by eqm: {why}")


def _patience(run: Run, worker_since: datetime.datetime) -> float:
    if datetime.datetime.fromisoformat(run["state"]["timestamp"]) < worker_since:
        return 0.0
    return PENDING_SECONDS if run["state"]["type"] == "PENDING" else GONE_SECONDS


def living_runs(mark: bytes = b"") -> Iterator[str]:
    """Ids of the runs that some process of this machine works on.

    ``mark``: only of processes that have this, NAME=value, in their environment.
    """
    for _, words in _environments(mark):
        for word in words:
            if word.startswith(RUN_ID):
                yield word.removeprefix(RUN_ID).decode(errors="replace")


def stage_programs(mark: bytes) -> Iterator[int]:
    """Processes of stage programs that have a mark; not of the flows that wait for them."""
    for pid, words in _environments(mark):
        if any(word.startswith(PROGRAM) for word in words):
            yield pid


def _environments(mark: bytes) -> Iterator[tuple[int, list[bytes]]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                # Gone, or somebody else's.
                continue
            if not mark or mark in words:
                yield int(entry.name), words
