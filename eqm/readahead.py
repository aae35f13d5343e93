"""Pixels ahead of the device: worker processes that read, check, decode and crop images.

Workers are forked. They share the listing with their parent and start in milliseconds, where a
spawned one would import torch and open the source anew. It is safe because a worker uses nothing
that does not survive a fork: no CUDA, no OpenMP (one thread), no connection of its parent's.

Pixels come back in anonymous shared memory. Tasks and answers are records of a fixed size in two
pipes that all workers share; Linux writes and reads such small records whole, so whoever is free
takes the next one, and nothing is pickled. A worker ends when the pipe of tasks does, which is also
when its parent was killed. Called by encode.
"""

import json
import mmap
import multiprocessing
import os
import signal
import struct
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import wait
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from eqm import errors
from eqm.cores import cores
from eqm.errors import DataError, EqmError, StageError
from eqm.images import UNDECODABLE, ImageSource

AHEAD = 3
"""Batches that are being decoded or wait for the device."""
TASKS_A_WORKER = 4
"""Into so many tasks a worker a batch is cut: one slow image holds up few others."""
LONGEST_MESSAGE = 2**14
JOIN_SECONDS = 5.0

TASK = struct.Struct("<qii")
"""Number of the batch, place of the first image in it, count."""
ANSWER = struct.Struct("<qiii")
"""Number of the batch, count, number of the worker, whether it failed."""

IDLE = -1


class HasNumbers(Protocol):
    """What is read: some images."""

    @property
    def numbers(self) -> Sequence[int]:
        """Their numbers in the source."""
        ...


B = TypeVar("B", bound=HasNumbers)


class Readers(ABC):
    """Decodes batches in the order in which they are asked for, some ahead."""

    def __init__(self, source: ImageSource, batch_size: int, kept: int) -> None:
        self.source, self.kept = source, kept
        config = source.config
        shape = (batch_size, config.channels, config.image_size_px, config.image_size_px)
        self.slots = AHEAD + 1 + kept
        # Shared with what is forked later; gone with the last process that has it.
        self.memory = mmap.mmap(-1, self.slots * int(np.prod(shape)))
        self.pixels = np.frombuffer(self.memory, dtype=np.uint8).reshape(self.slots, *shape)

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, batches: Iterable[B]) -> Iterator[tuple[B, Tensor]]:
        """Batches with their pixels, uint8 (B, C, H, W).

        ``batches`` is asked for the next one AHEAD batches early. Pixels are valid until ``kept``
        more batches were given and another is asked for. Raises what reading an image raises, and
        StageError where a worker dies.
        """
        coming: deque[tuple[int, B]] = deque()
        number = 0
        for number, batch in enumerate(batches):
            self._begin(number, batch.numbers)
            coming.append((number, batch))
            if len(coming) > AHEAD:
                yield self._taken(*coming.popleft())
        while coming:
            yield self._taken(*coming.popleft())

    def _taken(self, number: int, batch: B) -> tuple[B, Tensor]:
        self._finish(number)
        pixels = self.pixels[number % self.slots, : len(batch.numbers)]
        return batch, torch.from_numpy(pixels)

    @abstractmethod
    def _begin(self, number: int, images: Sequence[int]) -> None:
        """Start to read a batch into its slot."""

    @abstractmethod
    def _finish(self, number: int) -> None:
        """Return when a batch has been read."""

    @abstractmethod
    def close(self) -> None:
        """Stop; what was begun is given up."""


def open_readers(source: ImageSource, batch_size: int, *, workers: int, kept: int = 1) -> "Readers":
    """Readers with so many worker processes; 0 decodes in threads of this process."""
    if workers:
        return Processes(source, batch_size, kept, workers)
    return Threads(source, batch_size, kept)


class Threads(Readers):
    """Decodes in this process."""

    def __init__(self, source: ImageSource, batch_size: int, kept: int) -> None:
        super().__init__(source, batch_size, kept)
        self._pool = ThreadPoolExecutor(cores())
        self._reading: dict[int, list[Future[None]]] = {}

    def _begin(self, number: int, images: Sequence[int]) -> None:
        slot = self.pixels[number % self.slots]
        self._reading[number] = [
            self._pool.submit(_read_into, slot, at, self.source, image)
            for at, image in enumerate(images)
        ]

    def _finish(self, number: int) -> None:
        for reading in self._reading.pop(number):
            reading.result()

    def close(self) -> None:
        """Stop; what was begun is given up."""
        self._pool.shutdown(cancel_futures=True)


def _read_into(slot: Any, at: int, source: ImageSource, image: int) -> None:
    try:
        slot[at] = source.read(image).numpy()
    except UNDECODABLE as error:
        if isinstance(error, EqmError):
            raise
        raise DataError(
            f"image {source.entries[image].key!r} cannot be decoded ({error}), though it could be "
            "when it was listed: run the pipeline again"
        ) from error


class Processes(Readers):
    """Decodes in forked workers."""

    def __init__(self, source: ImageSource, batch_size: int, kept: int, workers: int) -> None:
        super().__init__(source, batch_size, kept)
        self._left: dict[int, int] = {}
        numbers = mmap.mmap(-1, self.slots * batch_size * 8)
        self.numbers = np.frombuffer(numbers, dtype=np.int64).reshape(self.slots, batch_size)
        """Which images a slot is for: shared with the workers, as any may be in a batch."""
        self._board = Board(workers)
        self._share = max(1, -(-batch_size // (TASKS_A_WORKER * workers)))
        tasks, self._tasks = os.pipe()
        self._answers, answers = os.pipe()
        context = multiprocessing.get_context("fork")
        ours = (self._tasks, self._answers)
        self._workers = [
            context.Process(
                target=_work, args=(self, n, tasks, answers, ours), name=f"decoder-{n}", daemon=True
            )
            for n in range(workers)
        ]
        for worker in self._workers:
            worker.start()
        # Held by the workers alone from here on, or none of them would ever be missed.
        os.close(tasks)
        os.close(answers)

    def _begin(self, number: int, images: Sequence[int]) -> None:
        self._left[number] = len(images)
        self.numbers[number % self.slots, : len(images)] = images
        for at in range(0, len(images), self._share):
            count = min(self._share, len(images) - at)
            try:
                os.write(self._tasks, TASK.pack(number, at, count))
            except BrokenPipeError:
                raise self._death() from None

    def _finish(self, number: int) -> None:
        sentinels = [worker.sentinel for worker in self._workers]
        while self._left[number]:
            ready = wait([self._answers, *sentinels])
            # Answers first: what a worker had done before it died is done.
            if self._answers not in ready:
                raise self._death()
            data = os.read(self._answers, ANSWER.size)
            if not data:
                raise self._death()
            batch, count, worker, failed = ANSWER.unpack(data)
            if failed:
                raise self._board.error(worker)
            self._left[batch] -= count
        del self._left[number]

    def _death(self) -> StageError:
        number, dead = next(
            ((n, one) for n, one in enumerate(self._workers) if not one.is_alive()),
            (0, self._workers[0]),
        )
        dead.join(JOIN_SECONDS)
        image, status = int(self._board.working[number]), dead.exitcode
        what = "between two images"
        if image != IDLE:
            what = f"at image {self.source.entries[image].key!r}"
        how = f"ended with status {status}"
        if status is not None and status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        return StageError(
            f"a worker process that decodes images {how} {what}: if the machine is short of memory "
            "(dmesg tells), lower runtime.workers or encode.batch_size; run again to go on"
        )

    def close(self) -> None:
        """Stop; what was begun is given up."""
        os.close(self._tasks)
        os.close(self._answers)
        for worker in self._workers:
            # It may be deep in an image whose pixels nobody wants any more.
            worker.kill()
        for worker in self._workers:
            worker.join(JOIN_SECONDS)


class Board:
    """What workers leave for their parent to read, in shared memory."""

    def __init__(self, workers: int) -> None:
        self.working = np.frombuffer(mmap.mmap(-1, 8 * workers), dtype=np.int64)
        """Number of the image that each one is at, or IDLE."""
        self.working[:] = IDLE
        self._messages = [mmap.mmap(-1, LONGEST_MESSAGE) for _ in range(workers)]

    def tell(self, worker: int, error: BaseException) -> None:
        """Leave an error: in words where it is told to a person, else with where it happened."""
        known = isinstance(error, EqmError)
        text = str(error) if known else "".join(traceback.format_exception(error))
        # Of a long traceback the end says most.
        cut = text[: LONGEST_MESSAGE // 8] if known else text[-LONGEST_MESSAGE // 8 :]
        data = json.dumps([type(error).__name__ if known else None, cut]).encode()
        self._messages[worker][: len(data) + 1] = data + b"\0"

    def error(self, worker: int) -> Exception:
        """The error that a worker left."""
        name, text = json.loads(self._messages[worker][:].partition(b"\0")[0])
        if name is None:
            return RuntimeError(f"in a worker process that decodes images:\n{text}")
        return getattr(errors, name, EqmError)(text)


def _work(
    readers: Processes, number: int, tasks: int, answers: int, parents: tuple[int, int]
) -> None:
    # Ctrl-C reaches all of a terminal's processes; the parent decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for handle in parents:
        os.close(handle)
    # More would be OpenMP's, whose threads are not there after a fork.
    torch.set_num_threads(1)
    working, source = readers._board.working, readers.source
    try:
        while task := os.read(tasks, TASK.size):
            batch, first, count = TASK.unpack(task)
            slot, failed = readers.pixels[batch % readers.slots], 0
            images = readers.numbers[batch % readers.slots]
            try:
                for at in range(first, first + count):
                    working[number] = images[at]
                    _read_into(slot, at, source, int(images[at]))
                working[number] = IDLE
            except BaseException as error:
                readers._board.tell(number, error)
                failed = 1
            os.write(answers, ANSWER.pack(batch, count, number, failed))
    except BrokenPipeError:
        # The parent is gone, or wants nothing more.
        return
