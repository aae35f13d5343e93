"""Progress of long work: a Rich bar in a terminal, a plain line now and then elsewhere."""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

PLAIN_LINE_SECONDS = 10.0


class Progress:
    """Counts towards a total and shows how far, how fast and how long still.

    ``with Progress("training", total=n, unit="images") as bar: bar.advance(128, loss=1.5)``
    A silent one (``show=False``) is for ranks other than the first.
    """

    def __init__(
        self, label: str, *, total: int, unit: str = "images", done: int = 0, show: bool = True
    ) -> None:
        self.label, self.total, self.unit, self.done, self.show = label, total, unit, done, show
        self._first, self._began, self._said = done, time.monotonic(), 0.0
        self._told = -1
        """What was done when a line last said so."""
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if self.show and sys.stderr.isatty():
            self._bar, self._task = _rich_bar(self.label, self.total, self.unit, self.done)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.show and error is None and self._told != self.done:
            self._say({})

    @property
    def per_second(self) -> float:
        """Units a second since this began."""
        return (self.done - self._first) / max(time.monotonic() - self._began, 1e-9)

    def advance(self, count: int, **figures: float) -> None:
        """Count work done; ``figures`` are shown beside it."""
        self.done += count
        if self._bar is not None:
            rate = f"{_rate(self.per_second)}/s" if self.done > self._first else ""
            self._bar.update(self._task, completed=self.done, rate=rate, figures=_figures(figures))
        elif self.show and time.monotonic() - self._said > PLAIN_LINE_SECONDS and self._said:
            self._say(figures)
        elif not self._said:
            self._said = time.monotonic()

    def _say(self, figures: dict[str, float]) -> None:
        self._said, self._told = time.monotonic(), self.done
        rate = self.per_second
        left = (self.total - self.done) / rate if rate > 0 else 0.0
        more = f"  {_figures(figures)}" if figures else ""
        ending = f", {_time(left)} left" if self.done < self.total else ""
        line = f"{self.label}: {self.done:,} of {self.total:,} {self.unit}"
        sys.stderr.write(f"{line}, {_rate(rate)}/s{ending}{more}\n")
        sys.stderr.flush()


UNREAD = (errno.EPIPE, errno.EIO)
"""Of a pipe whose other end is closed, and of a terminal that is gone."""


class Unheard:
    """A stream of words that goes on, silent, once nobody reads it any more.

    What a stage program says is read by the worker that started its flow, which may be killed, or
    shown by a terminal, whose connection may end. A training would otherwise end at the next line
    that it says.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, words: str) -> int:
        """As of a file."""
        try:
            return self._stream.write(words)
        except OSError as error:
            self._fall_silent(error)
            return len(words)

    def flush(self) -> None:
        """As of a file."""
        try:
            self._stream.flush()
        except OSError as error:
            self._fall_silent(error)

    def _fall_silent(self, error: OSError) -> None:
        if error.errno not in UNREAD:
            raise error
        # All that writes there, libraries and children too.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Inside, sys.stdout and sys.stderr are :class:`Unheard`, where there are any."""
    before = sys.stdout, sys.stderr
    inside = [Unheard(stream) if stream is not None else None for stream in before]
    sys.stdout, sys.stderr = inside  # type: ignore[assignment]
    try:
        yield
    finally:
        # Python flushes at its end, and what fails then is the program's exit status.
        for stream in inside:
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


def _rate(per_second: float) -> str:
    """For people: what is slow is not 0."""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"


def _time(seconds: float) -> str:
    """For people: the two largest units of a time."""
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if minutes + 60 * hours >= 60:
        return f"{hours} h {minutes} min"
    return f"{seconds:.0f} s"


def _figures(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())


def _rich_bar(label: str, total: int, unit: str, done: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=Console(stderr=True),
    )
    return bar, bar.add_task(label, total=total, completed=done, rate="", figures="")
