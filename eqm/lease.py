"""Who may write: a lease in the store that one process holds, and a token that fences all others.

A lease is one small key, made and renewed by compare-and-set. Each new holder gets a *fencing
token* that is one greater than the last. Whoever wants a lease that another one holds watches it:
if it does not change for its length by the watcher's own monotonic clock, its holder is taken for
dead. Clocks of two machines are never compared. A holder that wakes up later learns at its next
renewal that it was replaced; what it had under way by then is told apart by its token, which is why
the lease says, from the moment of a takeover on, what was ``accepted`` of all that was written
under smaller ones. Called by train, run, persistence and checkpoint.

Safety rests on the compare-and-set and on the tokens alone. The length of a lease decides only how
soon a dead holder is replaced, and how long a paused one is waited for.
"""

import contextlib
import dataclasses
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from eqm.errors import EqmError, MissingError, StoreError
from eqm.records import note_from_bytes, note_to_bytes
from eqm.storage import Store

SCHEMA = "eqm-lease/1"
LOOKS_A_LENGTH = 30
"""How often a watcher looks within the length of a lease, but not more often than ..."""
SHORTEST_LOOK_SECONDS = 0.05
MARGIN = 1.25
"""A lease is waited for so many of its lengths, in all."""
ENDED, UNSEEN = -1, -2
"""In place of the start of a process: its parent has only not asked for it yet; hidden from us."""


class HeldByAnotherError(EqmError):
    """The lease is held by another process, which is alive."""


class LostLeaseError(EqmError):
    """The lease was taken by another process, as this one did not renew it in time."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """Which process, in terms that no later process repeats."""

    host: str
    pid: int
    kernel: str
    """Boot and process namespace in which ``pid`` means something; "" where nothing tells."""
    started: int
    """When it was started, in ticks since that boot."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True, kw_only=True)
class Lease:
    """What lies in the store."""

    schema: str
    token: int
    holder: str
    """Random, so that equal processes are told apart."""
    process: Process
    seconds: float
    """For so long without a change it is its holder's."""
    renewals: int = 0
    released: bool = False
    accepted: tuple[str, ...] = ()
    """Names of what was there of former holders when this one took over, and counts; and, last, of
    what this one was about to seal: whether that is there a look tells, and no list, which may be
    behind."""


@dataclass(frozen=True)
class Terms:
    """What a new holder finds, and goes by."""

    accepted: tuple[str, ...] = ()
    above: int = 0
    """The token must be greater than this: the greatest one that anything was written under."""


Fix = Callable[[Lease | None], Terms]
"""Looks at what is there. Asked between reading a lease and taking it, which fails if its holder
did anything in between: so nothing counts that was written afterwards, and no token is repeated."""


def read(store: Store, key: str) -> Lease | None:
    """The lease as it stands; None if nobody ever held it. Raises IntegrityError, StoreError."""
    try:
        return _read_version(store, key)[0]
    except MissingError:
        return None


def _read_version(store: Store, key: str) -> tuple[Lease, str]:
    data, version = store.read_version(key)
    return note_from_bytes(Lease, data, store.where(key)), version


# -- taking it ----------------------------------------------------------------------------------


@contextlib.contextmanager
def held(
    store: Store, key: str, *, seconds: float, fix: Fix = lambda _: Terms()
) -> Iterator["Held"]:
    """Hold a lease, renewed by a thread, and give it back. Raises as :func:`acquire`."""
    mine = acquire(store, key, seconds=seconds, fix=fix)
    mine.keep()
    try:
        yield mine
    finally:
        mine.release()


def acquire(store: Store, key: str, *, seconds: float, fix: Fix = lambda _: Terms()) -> "Held":
    """Take a lease: at once if it is free or its holder is known to be dead, else when it expires.

    Raises HeldByAnotherError, naming the holder, if that is still alive after a little more than
    the length of the lease.
    """
    watch = _Watch(store.where(key))
    while True:
        try:
            found, version = _read_version(store, key)
        except MissingError:
            found, version = None, None
        if found is None or watch.is_free(found):
            mine = _successor(found, fix(found), seconds)
            taken = _take(store, key, mine, version)
            if taken is not None:
                return Held(store, key, mine, taken)
            # Another one was faster: its lease is looked at next, at once.
            continue
        watch.wait(found)


def _successor(found: Lease | None, terms: Terms, seconds: float) -> Lease:
    return Lease(
        schema=SCHEMA,
        token=max(terms.above, 0 if found is None else found.token) + 1,
        holder=secrets.token_hex(16),
        process=this_process(),
        seconds=float(seconds),
        accepted=terms.accepted,
    )


def _take(store: Store, key: str, mine: Lease, version: str | None) -> str | None:
    """The version under which it is ours; None if another one has it."""
    data = note_to_bytes(mine)
    if version is not None:
        return store.replace(key, data, version)
    store.write_once(key, data)
    with contextlib.suppress(MissingError):
        # Ours also where a request that had arrived was sent, and then refused, once more.
        found, version = store.read_version(key)
        return version if found == data else None
    return None


class _Watch:
    """One process's view of a lease that it waits for."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._began = self._since = time.monotonic()
        self._seen: tuple[str, int] | None = None
        self._told = False

    def is_free(self, lease: Lease) -> bool:
        """Whether it was given back, or its holder is dead or has not renewed it for its length."""
        now = time.monotonic()
        if (lease.holder, lease.renewals) != self._seen:
            self._since, self._seen = now, (lease.holder, lease.renewals)
        if lease.released or is_dead(lease.process):
            return True
        if now - self._since < lease.seconds:
            return False
        _say(f"{lease.process} has not renewed its lease for {lease.seconds:g} s: taking it over")
        return True

    def wait(self, lease: Lease) -> None:
        """Wait until the next look. Raises HeldByAnotherError when that takes too long."""
        if not self._told:
            self._told = True
            _say(
                f"{lease.process} is at work on this already: waiting for it to end, or for "
                f"{lease.seconds:g} s in which it does not renew {self.where}"
            )
        if time.monotonic() - self._began > MARGIN * lease.seconds:
            raise HeldByAnotherError(
                f"{lease.process} is at work on this already, and alive: it renews "
                f"{self.where} (token {lease.token}). Wait for it, or end it and start this again"
            )
        time.sleep(max(SHORTEST_LOOK_SECONDS, min(1.0, lease.seconds / LOOKS_A_LENGTH)))


# -- having it ----------------------------------------------------------------------------------


class Held:
    """A lease that this process took, and may have lost since. Its methods are thread-safe."""

    def __init__(self, store: Store, key: str, lease: Lease, version: str) -> None:
        self.store, self.key = store, key
        self._lease, self._version = lease, version
        self._former = lease.accepted
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost: EqmError | None = None

    @property
    def token(self) -> int:
        """The fencing token: what is written under this lease carries it."""
        return self._lease.token

    @property
    def is_lost(self) -> bool:
        """Whether a renewal has failed for good. False says nothing: only ``check`` is certain."""
        return self._lost is not None

    def why_lost(self) -> EqmError | None:
        """Why it is not ours any more; None if it is, or the store is away: nobody has said so."""
        try:
            self.check()
        except StoreError:
            return self._lost
        except EqmError as error:
            return error
        return None

    def check(self, *, sealing: str | None = None) -> None:
        """Renew it: on return it was ours, and nobody has taken it since it was last looked at.

        ``sealing`` names what is sealed next, for whoever takes the lease over. Raises
        LostLeaseError, naming the new holder, and StoreError.
        """
        with self._lock:
            if self._lost is not None:
                raise self._lost
            named = self._lease.accepted if sealing is None else (*self._former, sealing)
            self._change(renewals=self._lease.renewals + 1, accepted=named)

    def _change(self, **changes: object) -> None:
        wanted = dataclasses.replace(self._lease, **changes)  # type: ignore[arg-type]
        data = note_to_bytes(wanted)
        version = self.store.replace(self.key, data, self._version)
        if version is None:
            # An earlier renewal may have arrived though its answer did not: then it is ours still.
            self._version = self._read_own_version()
            version = self.store.replace(self.key, data, self._version)
        if version is None:
            self._lost = LostLeaseError(f"{self.store.where(self.key)} changes under us: run again")
            raise self._lost
        self._lease, self._version = wanted, version

    def _read_own_version(self) -> str:
        try:
            found, version = _read_version(self.store, self.key)
        except MissingError:
            found, version = None, ""
        if found is None or found.holder != self._lease.holder:
            by = "somebody deleted it" if found is None else f"{found.process} took it over"
            self._lost = LostLeaseError(
                f"the lease {self.store.where(self.key)} (token {self.token}) is not ours any "
                f"more: {by}" + ("" if found is None else f" (token {found.token})") + ". This "
                "process was not heard of for too long; it stops, and writes nothing more"
            )
            raise self._lost
        return version

    def keep(self) -> None:
        """Renew it from a thread, every third of its length, until it is released or lost."""
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._end.wait(self._lease.seconds / 3):
            try:
                self.check()
            except StoreError as error:
                # A store that is away for a while ends no training: the next write will tell.
                _say(f"the lease could not be renewed, and will be tried again: {error}")
            except EqmError as error:
                self._lost = error
                return

    def release(self) -> None:
        """Give it back, so that the next one need not wait. A store that is away is only told."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            if self._lost is not None:
                return
            try:
                self._change(released=True, renewals=self._lease.renewals + 1)
            except EqmError as error:
                _say(f"the lease could not be given back: {error}")


# -- processes ----------------------------------------------------------------------------------


def this_process() -> Process:
    """The process that this code runs in."""
    pid = os.getpid()
    return Process(host=socket.gethostname(), pid=pid, kernel=_kernel(), started=_started(pid))


def is_dead(process: Process) -> bool:
    """Whether a process is known to have ended; False where that cannot be told from here.

    Within one boot and one namespace a pid and the time of its start name one process for ever,
    also after the pid was given to another one.
    """
    kernel = _kernel()
    if not kernel or (process.host, process.kernel) != (socket.gethostname(), kernel):
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        # Somebody else's, which may be the one that was meant.
        pass
    return _started(process.pid) not in (process.started, UNSEEN)


def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> int:
    """Ticks from boot to the start of a process; ENDED, or UNSEEN where nothing tells."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return UNSEEN
    # The name in parentheses may hold anything. State is the field after it, start the 20th.
    after = stat.rpartition(")")[2].split()
    return ENDED if after[0] in "ZX" else int(after[19])


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
