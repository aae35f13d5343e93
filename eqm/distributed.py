"""Rank, world size, device and collectives: the only reader of RANK and friends.

A program asks :func:`connect` once. Alone it is a world of one; under ``torchrun`` it joins the
others (NCCL on CUDA, gloo on CPU; on a GPU also where it is the only one, so that what runs on many
is what ran on one). Collectives here carry tensors only: nothing is pickled. One
that breaks off, or does not end in time, is told with the ranks that do not answer.
"""

import contextlib
import ctypes
import datetime
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store
from torch.distributed.rendezvous import rendezvous

from eqm.cores import cores
from eqm.errors import EXIT_REFUSED, ConfigError, PeerError
from eqm.memory import keep_freed
from eqm.threads import one_core_products
from eqm.watch import Watch

JOIN = datetime.timedelta(minutes=10)
"""For all ranks to start: machines do not come up at once."""
NCCL_LATER = datetime.timedelta(minutes=1)
"""For so much longer NCCL waits, whose watchdog ends the process: until who is silent is told."""
ROLL_CALL_SECONDS = 6.0
"""After a collective broke off, for the others to notice it as well and say that they are there."""
MOST_WAITS = 12
"""For so many time-outs of collectives the first rank may be at work alone: two hours."""
AT_WORK_SECONDS = 5.0
"""So often at least it says so, and hears of the others."""
LOOK_SECONDS = 5.0
"""Between two looks at what others have done, at most."""
PR_SET_PDEATHSIG = 1
DEVICES = Path("/dev")
"""Where Linux shows GPUs of NVIDIA: nvidia0, nvidia1, ..."""


@dataclass(frozen=True)
class World:
    """Where this process stands among its peers."""

    rank: int
    size: int
    device: torch.device
    group: ProcessGroup | None = None
    """Of all ranks, with the time-out of collectives; None for a process that is alone."""
    store: Store | None = None
    """What the ranks met at; it is on the first one's machine, or where torchrun has put it."""
    timeout_seconds: float = 600.0
    """How long the others are waited for."""
    watch: Watch | None = None
    """What tells of a collective that does not end, where waiting for it does not: on GPUs."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0: the one that speaks, writes and seals."""
        return self.rank == 0

    def barrier(self, left: Callable[[], int] | None = None) -> None:
        """Wait for everybody. Raises PeerError.

        ``left``: how much any of them still has to do. As long as it falls, the others are slow and
        not silent, and are waited for however long it takes them.
        """
        if left is not None and self.size > 1:
            self._wait_while_falling(left)
        # Read on the host: on a GPU the sum itself returns before anybody has come.
        self.sum_(torch.zeros(1, device=self.device)).item()

    def _wait_while_falling(self, left: Callable[[], int]) -> None:
        least, began = sys.maxsize, time.monotonic()
        since = began
        while (now := left()) > 0:
            if now < least:
                least, since = now, time.monotonic()
            elif time.monotonic() - since > self.timeout_seconds:
                return
            time.sleep(min(LOOK_SECONDS, 0.02 + 0.1 * (time.monotonic() - began)))

    def begin_sum(self, flat: torch.Tensor) -> "Sum":
        """Begin :meth:`sum_`: ``flat`` is nobody else's until its end is waited for.

        All ranks begin the same sums in the same order. Raises PeerError where another is gone.
        """
        if self.size == 1 and self.group is None:
            return Sum(self, None)
        return self._begun(lambda: dist.all_reduce(flat, group=self.group, async_op=True))

    def _begun(self, begin: Callable[[], dist.Work | None]) -> "Sum":
        began = time.monotonic()
        try:
            work = begin()
        except RuntimeError as error:
            raise PeerError(self.told(time.monotonic() - began, error)) from error
        if self.watch is not None and work is not None:
            self.watch.add(work)
        return Sum(self, work)

    def sum_(self, flat: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all ranks, in place, in one call: the order of addition is fixed.

        Raises PeerError where another rank does not come, or is gone.
        """
        self.begin_sum(flat).wait()
        return flat

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Do what makes collectives of its own, as a network that is shared. Raises PeerError."""
        try:
            yield
        except RuntimeError as error:
            if not _is_of_peers(error):
                raise
            raise PeerError(self.told(None, error)) from error

    def told(self, seconds: float | None, error: RuntimeError) -> str:
        """A message on a collective that came to nothing: who is silent, and what to do.

        ``seconds``: how long this rank has waited; None where that is not known.
        """
        silent = roll_call(self.store, self.rank, self.size)
        if silent is None:
            who = (
                "and cannot reach the place where the ranks met: this machine is cut off, or the "
                "first one is gone"
            )
        elif silent:
            who = f"and rank {', '.join(map(str, silent))} does not answer"
        else:
            who = "and all ranks answer: one was too slow, or the network broke off for a moment"
        waited = "waited" if seconds is None else f"waited {seconds:.0f} s"
        return (
            f"rank {self.rank} of {self.size} {waited} for the others {who} "
            f"({_reason(error)}). Look at that machine and the network, then start the same "
            "command again: it goes on from the newest checkpoint"
        )

    def first_says(self, number: int) -> int:
        """The number that the first rank has, for all ranks: what it saw is what all go by."""
        told = torch.tensor(int(number) if self.is_first else 0, device=self.device)
        return int(self.sum_(told))

    def some_say(self, asked: bool) -> bool:
        """Whether any rank says so, for all ranks."""
        return int(self.sum_(torch.tensor(int(asked), device=self.device))) > 0

    @contextlib.contextmanager
    def first_at_work(self, asked: Callable[[], bool] = lambda: False) -> Iterator[threading.Event]:
        """What the first rank does within may take longer than the others wait for one another.

        All enter. The first one tells them all along, by a thread, that it is at it, for MOST_WAITS
        of their time-outs: then it hangs. Within it calls no other collectives. What is given is
        set, on the first rank, as soon as another one was ``asked`` to end. Raises PeerError.
        """
        wanted = threading.Event()
        if self.size == 1:
            yield wanted
            return
        if not self.is_first:
            yield wanted
            while self.first_says(True):
                self.some_say(asked())
            return
        ended, failed = threading.Event(), []

        def tell() -> None:
            until = time.monotonic() + MOST_WAITS * self.timeout_seconds
            often = min(AT_WORK_SECONDS, self.timeout_seconds / 10)
            try:
                while not ended.wait(often) and time.monotonic() < until:
                    self.first_says(True)
                    if self.some_say(False):
                        wanted.set()
            except Exception as error:
                # The edge of a thread: it is raised at the end of the work.
                failed.append(error)

        telling = threading.Thread(target=tell, name="at-work", daemon=True)
        telling.start()
        try:
            yield wanted
        finally:
            ended.set()
            telling.join()
        if failed:
            raise failed[0]
        self.first_says(False)

    def each_says(self, number: int) -> list[int]:
        """The numbers that the ranks have, in their order, for all ranks."""
        told = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        told[self.rank] = number
        return self.sum_(told).tolist()

    def first_gives(self, data: bytes) -> bytes:
        """The bytes that the first rank has, for all ranks. Raises PeerError."""
        if self.group is None:
            return data
        size = self.first_says(len(data))
        sent = torch.empty(size, dtype=torch.uint8, device=self.device)
        if self.is_first:
            sent.copy_(torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()))
        self._begun(lambda: dist.broadcast(sent, 0, group=self.group, async_op=True)).wait()
        return data if self.is_first else sent.cpu().numpy().tobytes()

    def first_tells(self, text: str) -> str:
        """The text that the first rank has, for all ranks; "" for none."""
        if self.size == 1:
            return text
        size = self.first_says(len(text.encode()))
        told = torch.zeros(size, dtype=torch.int64, device=self.device)
        if self.is_first:
            told += torch.tensor(list(text.encode()), dtype=torch.int64, device=self.device)
        return bytes(self.sum_(told).tolist()).decode() if size else ""


class Sum:
    """A sum over ranks, or what the first one sends, that was begun."""

    def __init__(self, world: World, work: dist.Work | None) -> None:
        self._world, self._work = world, work

    def wait(self) -> None:
        """Go on when it is there; on a GPU what is computed next does. Raises PeerError."""
        began = time.monotonic()
        try:
            if self._work is not None:
                self._work.wait()
        except RuntimeError as error:
            raise PeerError(self._world.told(time.monotonic() - began, error)) from error


class OnItsWay:
    """A number () of a device, which the host asks for later: the device goes on meanwhile.

    Asked for at once, the host would wait until all that was given to the device is done, and the
    device then for the host.
    """

    def __init__(self, number: torch.Tensor) -> None:
        # Into page-locked memory, where it is from a GPU.
        self._number = number.detach().to("cpu", non_blocking=True)
        self._arrived = None
        if number.device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def value(self) -> float:
        """The number, as soon as it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._number)


def _is_of_peers(error: RuntimeError) -> bool:
    """Whether a collective failed, and not what was computed: gloo has no errors of its own."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _reason(error: RuntimeError) -> str:
    """What torch says, without the place in its sources."""
    first, _, rest = str(error).strip().partition("] ")
    said = (rest if first.startswith("[") and rest else str(error)).splitlines()[0]
    # Behind that gloo guesses, and wishes good luck.
    return said.partition(". This is typically")[0][:200]


def roll_call(store: Store | None, rank: int, size: int) -> list[int] | None:
    """Ranks that do not say that they are there, within ROLL_CALL_SECONDS; None without the store.

    A store that is cut off does not answer and does not fail: it is asked by a thread of its own.
    """
    here: set[int] | None = None

    def call() -> None:
        nonlocal here
        if store is None:
            return
        store.set(f"here/{rank}", "yes")
        until = time.monotonic() + ROLL_CALL_SECONDS
        while time.monotonic() < until and (here is None or len(here) < size):
            here = {r for r in range(size) if store.check([f"here/{r}"])}
            time.sleep(0.1)

    def quietly() -> None:
        with contextlib.suppress(RuntimeError):
            call()

    asking = threading.Thread(target=quietly, daemon=True)
    asking.start()
    asking.join(ROLL_CALL_SECONDS + 2)
    return None if here is None else [r for r in range(size) if r not in here]


def end_at_once(words: str) -> None:
    """Say why, and end without the thread that hangs."""
    sys.stderr.write(f"error: {words}\n")
    sys.stderr.flush()
    os._exit(EXIT_REFUSED)


@contextlib.contextmanager
def connect(
    device: str = "auto",
    *,
    threads: int | None = None,
    timeout_seconds: float = 600.0,
    on_stall: Callable[[str], None] = end_at_once,
) -> Iterator[World]:
    """Join the world this process was started in, and leave it in order.

    ``device`` is "auto", "cpu" or "cuda". ``threads`` bounds the CPU threads of this process; None
    shares the cores among the processes of this machine. Products of numpy take one core each
    (eqm.threads), and on a CPU freed memory is kept (eqm.memory). ``timeout_seconds`` is how long a
    collective waits for the other ranks. On GPUs ``on_stall`` is then told who is silent, in a
    thread, and must end the process: whoever waits for a GPU hears nothing. Raises ConfigError.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    chosen = pick_device(device, local)
    torch.set_num_threads(threads or max(1, cores() // here))
    # Torch would start up to 32 compilers for each process, whatever shares the cores with it.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(32, max(1, cores() // here))))
    if chosen.type == "cpu":
        keep_freed()
    else:
        # cuBLAS adds in a fixed order only in workspaces that it is told of before its first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.set_device(chosen)
        if local == 0 and (told := told_of_cores(here)) is not None:
            sys.stderr.write(f"warning: {told}\n")
    with one_core_products():
        if size == 1 and (chosen.type == "cpu" or "RANK" not in os.environ):
            yield World(rank, size, chosen)
            return
        end_with_parent()
        timeout = datetime.timedelta(seconds=timeout_seconds)
        with _joined(rank, size, chosen, timeout) as world, _watched(world, on_stall) as watched:
            yield watched


@contextlib.contextmanager
def _joined(
    rank: int, size: int, device: torch.device, timeout: datetime.timedelta
) -> Iterator[World]:
    store, _, _ = next(rendezvous("env://", rank, size, timeout=JOIN))
    backend = "nccl" if device.type == "cuda" else "gloo"
    ranks = PrefixStore("ranks", store)
    try:
        dist.init_process_group(backend, store=ranks, rank=rank, world_size=size, timeout=JOIN)
        # One of its own: the other's time-out also bounds how far apart ranks may start.
        group = dist.new_group(timeout=timeout + NCCL_LATER * (backend == "nccl"))
    except RuntimeError as error:
        raise PeerError(
            f"rank {rank} of {size} could not join the others ({_reason(error)}): see that all "
            "machines run the command, and reach each other (GLOO_SOCKET_IFNAME or "
            "NCCL_SOCKET_IFNAME names the network to use)"
        ) from error
    calls = PrefixStore("roll-call", store)
    try:
        yield World(
            *(rank, size, device),
            group=cast("ProcessGroup", group),
            store=calls,
            timeout_seconds=timeout.total_seconds(),
        )
    except BaseException:
        # NCCL leaves together with the others, who may be waiting for this rank: it would not come
        # to say why it failed until all are killed. The end of the process aborts what is left.
        if backend != "nccl":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextlib.contextmanager
def _watched(world: World, on_stall: Callable[[str], None]) -> Iterator[World]:
    if world.device.type == "cpu":
        yield world
        return
    with contextlib.closing(watch_of(world, on_stall)) as watch:
        yield replace(world, watch=watch)


def watch_of(world: World, on_stall: Callable[[str], None]) -> Watch:
    """What tells, in words, of a collective that does not end within the time-out."""
    late = RuntimeError("a collective has not ended")
    return Watch(world.timeout_seconds, lambda seconds: on_stall(world.told(seconds, late)))


def told_of_cores(processes: int) -> str | None:
    """What to say where so many processes, one a GPU, have not a core each; else None."""
    have = cores()
    if have >= processes:
        return None
    return (
        f"{processes} processes share {have} core{'s' if have > 1 else ''} on this machine: their "
        "GPUs will wait for them. Give the job more (EQM_PROCESS_CPUS, a container's limit of CPUs)"
    )


def end_with_parent() -> None:
    """Be told to end (SIGTERM) when the torchrun that started this process is killed outright.

    A worker without it would train on, beside those of the next attempt.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Turn "auto", "cpu" or "cuda" into a device.

    Raises ConfigError if it is not there, and for "auto" where there is a GPU that torch cannot
    use: a CPU in its place would take weeks for what was to take a day.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; it must be auto, cpu or cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError(
            "device is 'cuda', but torch sees no GPU: check the driver with nvidia-smi, "
            "or set device to 'auto'"
        )
    if name == "auto" and not available and (why := why_unusable()) is not None:
        raise ConfigError(
            f"device is 'auto', and torch can use none of the GPUs that are here: {why} See that "
            "nvidia-smi shows them, and that the driver is new enough for CUDA "
            f"{torch.version.cuda}, which this torch is made for; or set CUDA_VISIBLE_DEVICES to "
            "nothing, to compute on the CPU"
        )
    if name == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            "start fewer processes"
        )
    return torch.device("cuda", local_rank)


def why_unusable() -> str | None:
    """Why torch sees none of the GPUs that this process may open; None where there are none.

    Nor where CUDA_VISIBLE_DEVICES hides them. Torch itself only warns, of a driver that is too old
    for it or not well, and goes on as if there was no GPU.
    """
    if not any(_opens(path) for path in DEVICES.glob("nvidia[0-9]*")):
        return None
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"{str(error).strip().splitlines()[0].rstrip('.')}."
    return None


def _opens(path: Path) -> bool:
    """Whether control groups let this process at a device: all see those of a shared machine."""
    try:
        path.open("rb").close()
    except OSError:
        return False
    return True
