"""A stage program as a job of Slurm: submitted, watched, cancelled, taken up again.

The job's name says stage, digest and store, so a flow that finds one in the queue waits for it
and starts no second. Nothing here is needed by the job once it is submitted: a flow that is killed
leaves it, and the next one finds it.
"""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import infra
from eqm.config import PROGRAMS, Job, replace
from eqm.disk import locked
from eqm.errors import AwayError, ConfigError, StageError
from eqm.records import to_json
from eqm.stage import failure
from flows.clusters import Slurm
from flows.launch import (
    SHUTDOWN_SECONDS,
    Leaves,
    cluster_name,
    ended_with_flow,
    is_sealed,
    leaves_none,
)

T = TypeVar("T")

TEMPLATE = Path(infra.__file__).parent / "slurm" / "job.sh"
POLL_SECONDS = 10.0
"""Between two looks at the queue: sites ask for no more."""
PATIENCE_SECONDS = 900.0
"""How long the controller may be out of reach: longer than it takes to start it again."""
GRACE_SECONDS = 60.0
"""From scancel to giving up on seeing the end."""

ENDED = frozenset(
    ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL")
)
UNSETTLED = frozenset(("PREEMPTED", "NODE_FAIL"))
"""Ends that Slurm may be about to undo by putting the job back into the queue."""
SETTLED_LOOKS = 3
"""Also at a queue that does not show a job whose submission had no answer."""
HELD = "`scontrol release {id}` lets it go on"
HINTS = {
    "PENDING": "waiting in the queue",
    "REQUEUE_HOLD": f"held after a requeue: {HELD}",
    "SPECIAL_EXIT": f"held after an exit: {HELD}",
}
REASONS = {
    "PartitionTimeLimit": "EQM_SLURM_TIME is longer than the partition allows",
    "PartitionNodeLimit": "the partition has too few nodes for EQM_NODE_PROCESSES and processes",
    "PartitionConfig": "the partition does not allow what is asked for",
    "PartitionDown": "the partition is closed",
    "PartitionInactive": "the partition is closed",
    "BadConstraints": "no node is as asked for: see EQM_PROCESS_GPUS, _CPUS and _MEMORY",
    "ReqNodeNotAvail": "nodes are down or reserved: a shorter EQM_SLURM_TIME may fit in before",
    "Reservation": "it waits for its reservation",
    "AccountNotAllowed": "the partition does not take EQM_SLURM_ACCOUNT",
    "InvalidAccount": "Slurm does not know EQM_SLURM_ACCOUNT",
    "InvalidQOS": "Slurm does not know SBATCH_QOS",
    "QOSNotAllowed": "the account or the partition does not allow SBATCH_QOS",
    "MaxMemPerLimit": "EQM_PROCESS_MEMORY is more than the site gives",
    "JobHeldUser": HELD,
    "JobHeldAdmin": "an administrator holds it",
    "JobHoldMaxRequeue": f"it was requeued too often; {HELD}",
    # "launch failed requeued held", "job requeued in held state"
    "launch": f"it could not be started; {HELD}",
    "job": f"it was requeued and held; {HELD}",
}
"""Why a job waits, by the first word that Slurm has for it, where more than time is needed."""
LIMITS = ("QOS", "Assoc", "Max", "AccountingPolicy")
"""Beginnings of the names of limits."""
AWAY = (
    "unable to contact slurm controller",
    "socket timed out",
    "connection timed out",
    "connection refused",
    "connection reset",
    "transport endpoint is not connected",
    "zero bytes were transmitted or received",
    "communication connection failure",
    "communication shutdown failure",
    "message send failure",
    "message receive failure",
    "backup controller in standby mode",
    "process is shutting down",
    # Of a controller that is there, and asks to be asked again.
    "rate limit exceeded",
    "temporarily unable to accept job",
)
"""What commands say of a controller that is away or busy, in small letters; anything else is its
answer. They are what Slurm's slurm_errno.c says for SLURM_COMMUNICATIONS_*, for
SLURMCTLD_COMMUNICATIONS_*, for SLURM_PROTOCOL_SOCKET_* and for ESLURM_IN_STANDBY_MODE, and what
Linux says of sockets. Whatever is refused, as ESLURM_INVALID_PARTITION_NAME, has other words."""
WHY = {
    "TIMEOUT": "ran out of time before it could make a checkpoint: raise EQM_SLURM_TIME",
    "OUT_OF_MEMORY": "ran out of memory: raise EQM_PROCESS_MEMORY, or lower processes or "
    "compute.micro_batch",
    "CANCELLED": "was cancelled: run it again to go on",
    "PREEMPTED": "was preempted and not put back into the queue: run it again to go on",
    "NODE_FAIL": "lost its node and was not put back into the queue: run it again to go on",
    "DEADLINE": "could not end before its deadline: run it again to go on",
}

CARRIED = ("AWS_", "MLFLOW_", "NCCL_", "GLOO_", "HF_", "SSL_CERT_", "TORCH", "TRITON_")
"""Beginnings of names; also of where kernels are kept and how they are compiled."""
CARRIED_NAMES = frozenset(
    (
        "PYTHONPATH",
        "OMP_NUM_THREADS",
        # Compilers, which may be of a module that is loaded where the flow is and not on nodes.
        "CC",
        "CXX",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
        "REQUESTS_CA_BUNDLE",
        "http_proxy",
        "https_proxy",
        "no_proxy",
    )
)


def carried(environment: Mapping[str, str]) -> dict[str, str]:
    """What of an environment a stage program needs on another machine. Holds secrets."""
    return {
        name: value
        for name, value in environment.items()
        if name in CARRIED_NAMES or name.startswith(CARRIED)
    }


class _AwayError(StageError):
    """The controller did not answer; what was asked may have been done all the same."""


class _UnknownError(StageError):
    """Nobody says whether a job was submitted."""


class SlurmLauncher:
    """Jobs of a Slurm cluster."""

    def __init__(
        self,
        cluster: Slurm,
        *,
        environment: Mapping[str, str],
        say: Callable[[str], None],
        leaves: Leaves = leaves_none,
    ) -> None:
        self.cluster = cluster
        self.environment = dict(environment)
        self.say = say
        self.leaves = leaves

    def run(self, job: Job, *, processes: int = 1) -> None:
        """Run a program to its end. Raises as :class:`flows.launch.Launcher`."""
        name = cluster_name(job)
        number = None

        def end() -> None:
            self._cancel(name, number)

        with ended_with_flow(name, end, leaves=self.leaves, say=self.say):
            number = self._started(job, name, processes)
            state = self._watch(job, number, name)
        self._forget(name)
        # Since 24.05 what ends well in its time of grace may be PREEMPTED all the same.
        if state in (*UNSETTLED, "GONE") and is_sealed(job):
            return
        if state != "COMPLETED":
            raise failure(self._why(name, number, state))

    # -- started --

    def _started(self, job: Job, name: str, processes: int) -> str:
        self.cluster.folder.mkdir(parents=True, exist_ok=True)
        # Two flows would both find no job, and both start one.
        with locked(self._file(name, "lock")):
            there = self._patient(name, lambda: self._there(job, name))
            if there is not None:
                self.say(f"{name}: is job {there} of Slurm already, waiting for it")
                return there
            before = self._patient(name, lambda: _numbers(name, "--states=all"))
            self._write(job, name, processes)
            try:
                number = self._patient(name, lambda: self._submitted(name, before))
            except _UnknownError as error:
                # It may be in the queue, and is nothing without its environment.
                raise StageError(
                    f"{name}: whether it was submitted is not known, so "
                    f"{self._file(name, 'env')} with its credentials is kept: run it again when "
                    f"`squeue` answers ({error})"
                ) from error
            except (StageError, ConfigError):
                self._file(name, "env").unlink()
                raise
        self.say(f"{name}: job {number} of Slurm, output in {self._file(name, 'log')}")
        return number

    def _there(self, job: Job, name: str) -> str | None:
        """Number of the job of a name; None if there is none. One that is ending is waited out."""
        deadline, told = time.monotonic() + PATIENCE_SECONDS, False
        while True:
            asked = ("--noheader", "--me", f"--name={name}", "--format=%i %T")
            found = [line.split() for line in _ask("squeue", *asked).splitlines()]
            going = [number for number, state in found if state == "COMPLETING"]
            if len(going) < len(found):
                return next(number for number, state in found if state != "COMPLETING")
            if not going:
                return None
            if time.monotonic() > deadline:
                raise StageError(f"{name}: job {going[0]} of Slurm does not end: see `squeue`")
            if not told:
                self.say(f"{name}: job {going[0]} of Slurm is ending, waiting for that")
            told = True
            time.sleep(POLL_SECONDS)
            if is_sealed(job):
                # It was ending because it was done.
                return going[0]

    def _submitted(self, name: str, before: set[str]) -> str:
        """Number of the job that was submitted now, or by a question whose answer was lost.

        ``before``: numbers that the name had already. Raises _AwayError where the job is not
        there and may be asked for again, _UnknownError where nobody knows, StageError if refused.
        """
        try:
            told = _ask("sbatch", "--parsable", str(self._file(name, "sh")))
            number = told.strip().split(";")[0]
            if not number.isdecimal():
                raise StageError(f"{name}: sbatch answered {told!r} and not with a number of a job")
            return number
        except StageError as error:
            # A busy controller may do later what it was asked; what it refuses it never does.
            away = isinstance(error, _AwayError)
            for _ in range(SETTLED_LOOKS if away else 1):
                if away:
                    time.sleep(POLL_SECONDS)
                # One that has ended since is found as well, and not started twice.
                if found := self._looked_for(name) - before:
                    return max(found, key=int)
            raise

    def _looked_for(self, name: str) -> set[str]:
        try:
            return self._patient(name, lambda: _numbers(name, "--states=all"))
        except _AwayError as error:
            raise _UnknownError(str(error)) from error

    def _patient(self, name: str, ask: Callable[[], T]) -> T:
        """Ask again for as long as a controller may be away."""
        deadline, told = time.monotonic() + PATIENCE_SECONDS, False
        while True:
            try:
                return ask()
            except _AwayError as error:
                if time.monotonic() > deadline:
                    raise
                if not told:
                    self.say(f"{name}: waiting for Slurm: {error}")
                told = True
                time.sleep(POLL_SECONDS)

    def _write(self, job: Job, name: str, processes: int) -> None:
        for left in ("error", "done"):
            self._file(name, left).unlink(missing_ok=True)
        error = str(self._file(name, "error"))
        told = replace(job, runtime=replace(job.runtime, error_file=error))
        self._file(name, "json").write_text(json.dumps(to_json(told), indent=1))
        _write_private(self._file(name, "env"), self._exports(job))
        self._file(name, "sh").write_text(self.script(job, processes))

    def _exports(self, job: Job) -> str:
        needed = carried(self.environment)
        if job.runtime.threads is not None:
            needed["OMP_NUM_THREADS"] = str(job.runtime.threads)
        return "".join(f"{name}={shlex.quote(value)}\n" for name, value in sorted(needed.items()))

    def script(self, job: Job, processes: int) -> str:
        """The batch script of a job. Raises ConfigError."""
        name, cluster = cluster_name(job), self.cluster
        nodes, here = cluster.nodes.spread(processes)
        cores = str(here * cluster.nodes.cpus) if cluster.nodes.cpus else None
        memory = f"{here * cluster.nodes.memory_gib}G" if cluster.nodes.memory_gib else None
        values = {
            "NAME": name,
            "FOLDER": str(cluster.folder),
            "NODES": str(nodes),
            "PROCESSES": str(here),
            "SHUTDOWN": str(SHUTDOWN_SECONDS),
            "MODULE": PROGRAMS[job.stage],
            "PYTHON": shlex.quote(sys.executable),
            "JOB": str(self._file(name, "json")),
            "ERROR": str(self._file(name, "error")),
            "LOG": str(self._file(name, "log")),
            "DONE": str(self._file(name, "done")),
            "ENVIRONMENT": str(self._file(name, "env")),
            # Since Slurm 22.05 a step does not inherit it, and has one core of those of its job.
            "CORES": f"--cpus-per-task={cores}" if cores else "",
        }
        options = {
            "gpus-per-node": str(here * cluster.nodes.gpus) if cluster.nodes.gpus else None,
            "cpus-per-task": cores,
            "mem": memory,
            "time": cluster.time,
            "partition": cluster.partition,
            "account": cluster.account,
        }
        lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value]
        text = TEMPLATE.read_text().replace("#SBATCH @OPTION@", "\n".join(lines))
        return re.sub(r"@([A-Z]+)@", lambda found: values[found[1]], text)

    def _file(self, name: str, kind: str) -> Path:
        return self.cluster.folder / f"{name}.{kind}"

    # -- watched --

    def _watch(self, job: Job, number: str, name: str) -> str:
        """The state in which a job ended; GONE if nobody knows it any more."""
        before, looks, reached = "", 0, time.monotonic()
        told: set[str] = set()
        while True:
            try:
                state, reason = _state(number)
                reached = time.monotonic()
            except StageError as error:
                if time.monotonic() - reached > PATIENCE_SECONDS:
                    raise StageError(f"{name}: job {number} is left running: {error}") from error
                # No look at all: what is unsettled is no more settled by it.
                time.sleep(POLL_SECONDS)
                continue
            looks = looks + 1 if state == before else 1
            if state != before:
                told = set()
            # Each reason once a wait: they go back and forth, and with them the names of nodes.
            word = _word(reason)
            if state != before or (word and word not in told):
                self.say(f"{name}: job {number} is {_in_words(state, reason, number)}")
            told.add(word)
            if state == "PENDING" and state != before and self._has_sealed(job):
                # Of a job that was preempted, Slurm may start again what has ended well since.
                self.say(f"{name}: has sealed its record, so job {number} is not waited for")
                self._cancel(name, number)
                return "COMPLETED"
            before = state
            if state in ENDED or (state in (*UNSETTLED, "GONE") and looks >= SETTLED_LOOKS):
                return state
            time.sleep(POLL_SECONDS)

    def _has_sealed(self, job: Job) -> bool:
        """Whether there is nothing left to do for a job, as far as its store can be asked."""
        try:
            return is_sealed(job)
        except AwayError:
            return False

    def _cancel(self, name: str, number: str | None) -> None:
        """End a job, also one that may or may not have been submitted."""
        which = [number] if number else ["--me", f"--name={name}"]
        try:
            _ask("scancel", *which)
            deadline = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < deadline:
                over = _is_over(number) if number else not _numbers(name)
                if over:
                    self._forget(name)
                    return
                time.sleep(min(1.0, POLL_SECONDS))
        except StageError as error:
            self.say(f"{name}: may go on, it could not be cancelled: {error}")

    def _forget(self, name: str) -> None:
        """Delete the environment of a job that is over, unless it is the next one's by now."""
        file = self._file(name, "env")
        if not file.exists():
            return
        try:
            with locked(self._file(name, "lock"), wait=False):
                if not _numbers(name):
                    file.unlink(missing_ok=True)
        except BlockingIOError:
            # Held by a flow that is starting the next one: the file is that flow's.
            return
        except StageError as error:
            self.say(
                f"{name}: {file} with its credentials is kept, as another job may need it: "
                f"delete it if none does ({error})"
            )

    def _why(self, name: str, number: str, state: str) -> str:
        error = self._file(name, "error")
        # A job that was stopped says so in its error file; why it was stopped is Slurm's to say.
        if state in ("FAILED", "GONE") and error.exists():
            return f"{name}: {error.read_text().strip()}"
        log = self._file(name, "log")
        if state == "GONE":
            return f"{name}: neither squeue nor sacct knows job {number} any more; see {log}"
        why = WHY.get(state, "failed")
        said = f" ({error.read_text().strip()})" if error.exists() else ""
        return f"{name}: job {number} of Slurm {why}{said}; its output is in {log}"


def _in_words(state: str, reason: str, number: str) -> str:
    word = _word(reason)
    limit = "a limit of your account or QOS" if word.startswith(LIMITS) else ""
    hint = (REASONS.get(word) or limit or HINTS.get(state, "")).format(id=number)
    return state + (f" ({reason})" if reason else "") + (f", {hint}" if hint else "")


def _word(reason: str) -> str:
    """What a reason is known by: "ReqNodeNotAvail, UnavailableNodes:n[1-3]" names nodes too."""
    return reason.partition(" ")[0].strip(",")


def _is_over(number: str) -> bool:
    return _state(number)[0] in (*ENDED, *UNSETTLED, "GONE")


def _numbers(name: str, *which: str) -> set[str]:
    """Numbers of the jobs of a name in the queue. Raises StageError."""
    return set(
        _ask("squeue", "--noheader", "--me", f"--name={name}", "--format=%i", *which).split()
    )


def _state(number: str) -> tuple[str, str]:
    """State of a job as the queue, else the accounts, know it, and why it waits, if it does.

    Raises StageError.
    """
    try:
        line = ("--noheader", "--states=all", f"--jobs={number}", "--format=%T %r")
        told = _ask("squeue", *line).split(maxsplit=1)
    except StageError as error:
        if "Invalid job id" not in str(error):
            raise
        told = []
    if told:
        reason = told[1].strip() if len(told) > 1 and told[0] == "PENDING" else ""
        return told[0], "" if reason == "None" else reason
    # Ended some minutes ago. A site without accounts answers with an error.
    asked = ("--noheader", "--parsable2", "--allocations", f"--jobs={number}", "--format=State")
    with contextlib.suppress(StageError):
        # "CANCELLED by 1000"
        told = _ask("sacct", *asked).split()
    return (told[0] if told else "GONE"), ""


def _ask(program: str, *words: str) -> str:
    """What a command of Slurm says. Raises ConfigError without Slurm, StageError if it refuses."""
    try:
        # In a session of its own: Ctrl-C is for the flow, which then cancels the job in order.
        ended = subprocess.run(
            [program, *words], capture_output=True, text=True, check=False, start_new_session=True
        )
    except FileNotFoundError:
        raise ConfigError(
            f"EQM_LAUNCHER is slurm, but {program} is not on PATH: run on a login node of the "
            "cluster, or set EQM_LAUNCHER=local"
        ) from None
    if ended.returncode != 0:
        said = ended.stderr.strip() or f"status {ended.returncode}"
        kind = _AwayError if any(told in said.lower() for told in AWAY) else StageError
        raise kind(f"{program} refused ({said}): see that Slurm is well with `sinfo`")
    return ended.stdout


def _write_private(path: Path, text: str) -> None:
    """A file that nobody else can read at any moment, also where one was before."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
