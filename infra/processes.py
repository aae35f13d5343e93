"""Processes that outlive the program that started them, and that are found again to be stopped.

A process is known by its id *and* its time of start, so that a number used again by the kernel is
never mistaken for ours; its children are known by a mark in their environment, which every
descendant inherits, whatever session it moves to and whoever dies before it. Linux only (/proc).
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.files import make_private_folder, open_private
from infra.stack import ServiceError

MARK = "_EQM_SERVICE"
"""Environment variable by which the processes of a service are recognised."""

LOG_BYTES = 20 * 2**20
"""A log that is longer is put aside at the next start; one older log is kept."""

KILL_SECONDS = 10.0
LOOK_SECONDS = 0.05
PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """One process, as the kernel tells it."""

    pid: int
    started_ticks: int
    parent: int
    session: int
    ended: bool
    """Only its exit status is left."""


@dataclass(frozen=True)
class Leader:
    """The process that was started for a service; also the id of its session and group."""

    pid: int
    started_ticks: int


def read_process(pid: int) -> Process | None:
    """The process of this id; None where there is none, or only its exit status."""
    seen = _read(pid)
    return None if seen is None or seen.ended else seen


def _read(pid: int) -> Process | None:
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name stands in brackets and may contain anything, brackets too.
    fields = text.rpartition(")")[2].split()
    return Process(
        pid=pid,
        started_ticks=int(fields[19]),
        parent=int(fields[1]),
        session=int(fields[3]),
        ended=fields[0] in "ZX",
    )


def spawn(
    command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: Path
) -> Leader:
    """Start a program in a session of its own, detached from the terminal, writing to a log."""
    make_private_folder(folder)
    make_private_folder(log.parent)
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    with open_private(log) as output:
        child = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=0o077,
        )
    seen = read_process(child.pid)
    # It is left alone from here on; `alive` collects its exit status if it ends before we do.
    child.returncode = 0
    return Leader(child.pid, seen.started_ticks if seen else -1)


def alive(leader: Leader) -> bool:
    """Whether that very process still runs."""
    seen = _read(leader.pid)
    if seen is None or seen.started_ticks != leader.started_ticks:
        return False
    if seen.ended:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(leader.pid, os.WNOHANG)  # Ours to collect, if we are who started it.
    return not seen.ended


def members(mark: str, leader: Leader | None) -> set[Process]:
    """Processes of a service: marked, in its session, or descended from one of these."""
    everything = _all_processes()
    session = leader.pid if leader is not None and alive(leader) else None
    found = {p for p in everything if p.session == session or _marked(p.pid, mark)}
    while True:
        parents = {p.pid for p in found}
        more = {p for p in everything if p.parent in parents} - found
        if not more:
            return {p for p in found if p.pid != os.getpid()}
        found |= more


def _all_processes() -> list[Process]:
    numbers = [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]
    return [process for process in map(read_process, numbers) if process is not None]


def _marked(pid: int, mark: str) -> bool:
    try:
        environment = (PROC / str(pid) / "environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False  # Gone, or another user's: not ours.
    return f"{MARK}={mark}".encode() in environment.split(b"\0")


def terminate(find: Callable[[], set[Process]], *, grace_seconds: float) -> None:
    """Ask the processes to end, then make them. Raises ServiceError if one stays."""
    _signal_all(find(), signal.SIGTERM)
    if _none_left(find, grace_seconds):
        return
    deadline = time.monotonic() + KILL_SECONDS
    while left := find():
        # Again and again: one may have been starting another while it was killed.
        _signal_all(left, signal.SIGKILL)
        if time.monotonic() > deadline:
            numbers = sorted(p.pid for p in left)
            raise ServiceError(f"processes {numbers} do not end, not even by SIGKILL: see `ps`")
        time.sleep(LOOK_SECONDS)


def _none_left(find: Callable[[], set[Process]], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while find():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_SECONDS)
    return True


def _signal_all(processes: set[Process], kind: signal.Signals) -> None:
    for process in processes:
        _signal(process, kind)


def _signal(process: Process, kind: signal.Signals) -> None:
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        # The handle is to whoever has the number now: make sure that it is still the same one.
        seen = read_process(process.pid)
        if seen is not None and seen.started_ticks == process.started_ticks:
            signal.pidfd_send_signal(handle, kind)
    except ProcessLookupError:
        return
    finally:
        os.close(handle)


def last_lines(log: Path, *, count: int = 15) -> str:
    """The end of a log, for an error message."""
    if not log.exists():
        return "(no log)"
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
