"""Start a stage program, watch it, stop it: on this machine, alone or under torchrun.

The program runs in a process group of its own. When the flow is cancelled or fails, the whole
group is told to end (training makes a checkpoint), then made to. A flow that is killed outright
leaves the program running: a dead orchestrator never kills training.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from eqm.config import PROGRAMS, Job, replace
from eqm.cores import cores
from eqm.errors import StageError
from eqm.records import to_json
from eqm.stage import failure, job_digest
from eqm.storage import open_store

GRACE_SECONDS = 110.0
"""From SIGTERM to SIGKILL: time for a checkpoint, which of XL/2 is 11 GB."""
SHUTDOWN_SECONDS = 100
"""The same between torchrun and its workers, which otherwise is 30."""
TOLD_SECONDS = 1
"""What ends sooner than that after Ctrl-C needs no explanation."""
MARK = "_EQM_PROGRAM"
"""Environment variable by which all processes of a program are recognised: torchrun gives each of
its workers a session of its own."""


class Launcher(Protocol):
    """Runs a stage program to its end."""

    def run(self, job: Job, *, processes: int) -> None:
        """Return when the program has ended well.

        Raises StageError with the program's reason; AwayError where that is a store that was away.
        """
        ...


def cluster_name(job: Job) -> str:
    """Name by which a cluster knows a job: the same for every flow that asks for the same."""
    store = hashlib.sha256(job.runtime.store.encode()).hexdigest()[:8]
    name = f"{job.stage}-{job_digest(job)[:16]}-{store}"
    shards = job.runtime.shards
    return name if shards is None else f"{name}-{shards[0]}-{shards[1]}"


Leaves = Callable[[BaseException], bool]
"""Whether what ends a flow is to leave its job on the cluster: the flow is started again and waits
for it. None of this machine's programs is left."""


def leaves_none(_: BaseException) -> bool:
    """A flow that ends takes its job along: of flows that no worker has taken."""
    return False


@contextlib.contextmanager
def ended_with_flow(
    name: str, end: Callable[[], None], *, leaves: Leaves, say: Callable[[str], None]
) -> Iterator[None]:
    """What runs on a cluster ends with the flow that waits for it inside, if that is cancelled."""
    try:
        yield
    except Exception:
        # The cluster is out of reach, or refuses: what runs there is not ours to end.
        raise
    except BaseException as error:
        # Cancelled or interrupted: the program ends before the flow does.
        if leaves(error):
            say(f"{name}: goes on without this flow; the same flow, started again, waits for it")
        else:
            end()
        raise


def is_sealed(job: Job) -> bool:
    """Whether the record of a job is in its store."""
    return open_store(job.runtime.store).record(job.stage, job_digest(job)) is not None


class LocalLauncher:
    """Processes on this machine."""

    def __init__(self, *, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = dict(environment)

    def run(self, job: Job, *, processes: int = 1) -> None:
        """Run a program to its end. Raises as :class:`Launcher`."""
        name = f"{job.stage}-{job_digest(job)[:16]}"
        if job.runtime.shards is not None:
            # Parts of one job may run beside each other.
            name = f"{name}-{job.runtime.shards[0]}-{job.runtime.shards[1]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone(name) as lock:
            self._launch(job, name, processes, lock)

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[int]:
        """Hold a job's lock; the program inherits it, and keeps it when the flow is killed.

        The lock file holds the mark of the last program. Workers of a torchrun that was killed
        after its flow was have no lock and nobody who ends them: whoever comes next does.
        """
        with (self.folder / f"{name}.lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                # The first one has started all others.
                first = min(_marked(file.read()), default=None)
                how = "" if first is None else f" (kill {first}; a training makes a checkpoint)"
                raise StageError(
                    f"{name} is running already on this machine, started by another flow: wait "
                    f"for it to end, or end it{how}"
                ) from None
            file.seek(0)
            if left := file.read():
                _kill_marked(left)
            yield file.fileno()

    def _launch(self, job: Job, name: str, processes: int, lock: int) -> None:
        reason = self.folder / f"{name}.error"
        reason.unlink(missing_ok=True)
        file = self.folder / f"{name}.json"
        told = replace(job, runtime=replace(job.runtime, error_file=str(reason)))
        file.write_text(json.dumps(to_json(told), indent=1))
        mark = secrets.token_hex(16)
        # Through the locked file itself, and before there is anything to be found by it.
        os.truncate(lock, 0)
        os.write(lock, mark.encode())
        # Said here, or torchrun says at length that it chooses 1.
        threads = job.runtime.threads or max(1, cores() // processes)
        environment = {
            **self.environment,
            "OMP_NUM_THREADS": str(threads),
            # `-m` would look into the folder where the flow was started first: an `eqm` there, or
            # a random.py, would be run in place of ours.
            "PYTHONSAFEPATH": "1",
            MARK: mark,
        }
        status = self._run(command(PROGRAMS[job.stage], file, processes), environment, lock)
        if status != 0:
            raise failure(_why(name, status, reason))

    def _run(self, line: list[str], environment: Mapping[str, str], lock: int) -> int:
        child = None
        try:
            child = subprocess.Popen(
                line, env=environment, start_new_session=True, pass_fds=(lock,)
            )
            status = child.wait()
        except BaseException as error:
            # Cancelled or interrupted: the program ends before the flow does.
            stop(child, environment[MARK], by_hand=isinstance(error, KeyboardInterrupt))
            raise
        # Workers of a torchrun that was killed would train on beside the next attempt.
        _kill_marked(environment[MARK])
        return status


def command(module: str, file: Path, processes: int) -> list[str]:
    """Command line of a stage program."""
    if processes == 1:
        return [sys.executable, "-m", module, str(file)]
    torchrun = [sys.executable, "-m", "flows.torchrun", "--standalone"]
    torchrun += [f"--nproc-per-node={processes}", f"--shutdown-timeout={SHUTDOWN_SECONDS}"]
    return [*torchrun, "-m", module, str(file)]


class InterruptedTwiceError(KeyboardInterrupt):
    """Ctrl-C again, while what ran was about to end in order."""


def stop(child: subprocess.Popen[bytes] | None, mark: str, *, by_hand: bool = False) -> None:
    """End a program and all its children: SIGTERM, and SIGKILL after a grace time.

    None: of a start that was interrupted, which may have been made all the same. ``by_hand``: of
    Ctrl-C, whose next one ends it at once (InterruptedTwiceError).
    """
    try:
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                _wait(child, by_hand=by_hand)
    except KeyboardInterrupt as error:
        raise (InterruptedTwiceError() if by_hand else error) from None
    finally:
        _kill_marked(mark)
        if child is not None:
            child.wait()


def _wait(child: subprocess.Popen[bytes], *, by_hand: bool) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(min(TOLD_SECONDS, GRACE_SECONDS))
        return
    if by_hand and GRACE_SECONDS > TOLD_SECONDS:
        # Ctrl-C has ended whoever reads a pipe as well: that is no reason to kill what is ending.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(
                "interrupted: what runs is ending in order, and a training writes a checkpoint "
                f"(for up to {GRACE_SECONDS:g} s). Ctrl-C again ends it at once, which costs what "
                "came after the checkpoint before\n"
            )
    child.wait(max(0, GRACE_SECONDS - TOLD_SECONDS))


def _kill_marked(mark: str) -> None:
    # Again: one may have been starting another while it was killed.
    for _ in range(5):
        left = _marked(mark)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not left:
            return
        time.sleep(0.02)


def _marked(mark: str) -> list[int]:
    """Processes of the program that was started with a mark."""
    return [int(e.name) for e in Path("/proc").iterdir() if e.name.isdigit() and _has(e, mark)]


def _has(process: Path, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0")
    except OSError:
        # Gone, or somebody else's.
        return False


def _why(name: str, status: int, reason: Path) -> str:
    said = reason.read_text() if reason.exists() else ""
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        memory = (
            "if memory ran out, of this machine or of its container (dmesg tells), give it more, "
            "or lower processes or compute.micro_batch; run it again to go on"
        )
        if not said:
            which = name if status < 0 else f"a process of {name}"
            return f"{which} was killed by SIGKILL: {memory}"
        # What other ranks say is what followed from it; or one of them did not answer, and was
        # killed for that.
        killed = "A process of it was killed by SIGKILL, before that or for it"
        return f"{name}: {said}. {killed}: {memory}"
    if said:
        return f"{name}: {said}"
    if status < 0:
        return f"{name} was killed by {signal.Signals(-status).name}: run it again to go on"
    return f"{name} ended with status {status}: its output above says why"
