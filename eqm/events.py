"""The log of a training run: what happened, when, and at which image; one JSON line an event.

The log is the truth about a run, and MLflow mirrors it (eqm.registry). Every checkpoint keeps the
log up to itself, as segments that are never changed, so the log ends where the state ends that
training goes on from: nothing is told twice and nothing is missing. The whole log is sealed beside
what was trained, among the logs of the record: it holds times, and is part of no digest of content.
Called by run, persistence, mirroring, registry and flows.
"""

import json
import re
import sys
import threading
import time
import weakref
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import FileIO
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, Literal

from eqm.errors import ConfigError, IntegrityError, MissingError
from eqm.records import Blob, canonical_bytes, from_json, sha256
from eqm.storage import Store

EVENTS = "events.jsonl"
"""The whole log, among the logs of a sealed record."""
PREFIX = "events-"
"""Names of segments among the files of a checkpoint begin with this."""

Kind = Literal[
    "start",
    "resume",
    "metrics",
    "samples",
    "checkpoint",
    "skip",
    "guard",
    "interrupted",
    "finished",
]
CURVES: tuple[Kind, ...] = ("metrics", "samples")
"""Kinds with figures, of which there is one a position."""
Segments = Mapping[str, bytes | Blob]
"""``events-<first>..<last>`` -> its lines, or where they are kept already."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a run."""

    number: int
    """One more than that of the event before."""
    at_ms: int
    """Wall clock, milliseconds since 1970."""
    images_seen: int
    """Position of the run."""
    kind: Kind
    figures: dict[str, float] = field(default_factory=dict)
    """What is drawn as a curve."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else is to be known: JSON values."""
    blobs: dict[str, Blob] = field(default_factory=dict)
    """What was made, among the blobs of the store, by a name without folders."""

    @cached_property
    def line(self) -> bytes:
        """Canonical JSON, with the end of the line: kept, for a log is written again and again."""
        return canonical_bytes(self) + b"\n"

    @property
    def digest(self) -> str:
        """SHA-256 of the line: two events of two attempts differ in it, for their times do."""
        return sha256(self.line)


def wall_clock_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class EventLog:
    """Events in the order in which they happened; safe to read while another thread appends.

    ``clock`` tells the milliseconds since 1970.
    """

    def __init__(self, clock: Callable[[], int] = wall_clock_ms) -> None:
        self.lost: tuple[str, ...] = ()
        """What could not be read of the log that this one goes on from."""
        self._clock = clock
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._next = 0
        self._parts: list[_Part] = []
        self._committed = 0
        self._file: FileIO | None = None

    @property
    def events(self) -> list[Event]:
        """All of them."""
        with self._lock:
            return list(self._events)

    def committed(self, after: int = -1) -> list[Event]:
        """Those after a number that a durable checkpoint holds: whatever happens, they stay."""
        with self._lock:
            newer = takewhile(lambda event: event.number > after, reversed(self._events))
            return [event for event in newer if event.number < self._committed][::-1]

    def find(self, number: int) -> Event | None:
        """The event of a number, where a durable checkpoint holds it."""
        with self._lock:
            at = self._place(number)
            found = self._events[at : at + 1] if number < self._committed else []
        return found[0] if found and found[0].number == number else None

    def _place(self, number: int) -> int:
        """Where the first event of this number or a later one stands: what is lost leaves gaps."""
        return bisect_left(self._events, number, key=lambda event: event.number)

    def append(
        self,
        kind: Kind,
        images_seen: int,
        figures: Mapping[str, float] | None = None,
        *,
        blobs: Mapping[str, Blob] | None = None,
        **facts: Any,
    ) -> Event:
        """Add what happened just now.

        Raises ValueError for a position before the last one, or one that has such figures already;
        ConfigError for what has no JSON form.
        """
        with self._lock:
            self._check(kind, images_seen)
            event = Event(
                number=self._next,
                at_ms=self._clock(),
                images_seen=images_seen,
                kind=kind,
                figures=dict(figures or {}),
                facts=facts,
                blobs=dict(blobs or {}),
            )
            line = event.line
            self._events.append(event)
            self._next += 1
            self._write(line)
        return event

    def _check(self, kind: Kind, images_seen: int) -> None:
        last = self._events[-1].images_seen if self._events else 0
        told = next((e for e in reversed(self._events) if e.kind == kind), None)
        again = kind in CURVES and told is not None and told.images_seen == images_seen
        if images_seen < last or again:
            raise ValueError(f"{kind} at image {images_seen:,}, but the log is at {last:,} already")

    def to_bytes(self) -> bytes:
        """The log as a file: one line an event."""
        return b"".join(event.line for event in self.events)

    # -- a copy to look at ----------------------------------------------------------------------

    def follow(self, file: Path) -> None:
        """Keep a copy in a file of this machine, written line by line, for whoever looks there.

        It is a convenience: where it cannot be written that is told once, and nothing else is lost.
        """
        with self._lock:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                # Not the same file emptied: a process that was replaced and wakes up writes there.
                file.unlink(missing_ok=True)
                self._file = file.open("xb", buffering=0)
            except OSError as error:
                self._give_up(file, error)
                return
            weakref.finalize(self, self._file.close)
            self._write(*(event.line for event in self._events))

    def _write(self, *lines: bytes) -> None:
        if self._file is None:
            return
        rest = memoryview(b"".join(lines))
        try:
            while rest:
                # All of it, or what the disk says.
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._give_up(self._file.name, error)

    def _give_up(self, file: str | Path, error: OSError) -> None:
        sys.stderr.write(
            f"warning: the log of events at {file} cannot be written ({error.strerror}); it "
            "is kept with every checkpoint all the same\n"
        )
        self._file = None

    # -- with checkpoints -----------------------------------------------------------------------

    def segments(self) -> dict[str, bytes | Blob]:
        """The whole log as a checkpoint keeps it: few segments, of which most are kept already.

        A segment less than twice as long as what follows is joined with that. So there are at most
        1 + log2(events) of them, and an event is written again that often at most in its life.
        """
        with self._lock:
            first = self._parts[-1].end if self._parts else 0
            if first < self._next:
                self._parts.append(_Part(first, self._next))
            while len(self._parts) > 1 and _near(*self._parts[-2:]):
                older, newer = self._parts[-2:]
                self._parts[-2:] = [_Part(older.first, newer.end)]
            return {part.name: part.blob or self._lines(part) for part in self._parts}

    def _lines(self, part: "_Part") -> bytes:
        inside = self._events[self._place(part.first) : self._place(part.end)]
        return b"".join(event.line for event in inside)

    def commit(self, segments: Segments) -> None:
        """Note that a checkpoint with these segments is durable."""
        with self._lock:
            ends = [_bounds(name)[1] for name in segments]
            self._committed = max([self._committed, *ends])
            for at, part in enumerate(self._parts):
                data = segments.get(part.name)
                if isinstance(data, bytes):
                    self._parts[at] = _Part(part.first, part.end, Blob.of(data))


def restore(store: Store, segments: Segments, clock: Callable[[], int] = wall_clock_ms) -> EventLog:
    """The log as a checkpoint keeps it: cut there, whatever was told after.

    A segment that is damaged or gone costs no training: it is left out and told in ``lost``, and
    numbers go on behind it. Raises StoreError where the store does not answer.
    """
    log = EventLog(clock)
    for name in sorted(segments):
        first, end = _bounds(name)
        log._next = log._committed = end
        try:
            blob, found = _read(store, name, segments[name])
        except (IntegrityError, MissingError) as error:
            log.lost = (*log.lost, f"events {first} to {end - 1}: {error}")
            continue
        log._events += found
        log._parts.append(_Part(first, end, blob))
    return log


@dataclass(frozen=True)
class _Part:
    """Events with numbers from ``first`` to before ``end``, and where they are kept."""

    first: int
    end: int
    blob: Blob | None = None

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.first:012d}..{self.end - 1:012d}"


def _near(older: _Part, newer: _Part) -> bool:
    return older.end - older.first < 2 * (newer.end - newer.first)


def _bounds(name: str) -> tuple[int, int]:
    found = re.fullmatch(rf"{PREFIX}(\d+)\.\.(\d+)", name)
    if found is None:
        raise IntegrityError(f"{name!r} is no name of a segment of events: it was changed")
    return int(found[1]), int(found[2]) + 1


def _read(store: Store, name: str, kept: bytes | Blob) -> tuple[Blob, list[Event]]:
    blob = kept if isinstance(kept, Blob) else Blob.of(kept)
    events = events_of(store.get(blob) if isinstance(kept, Blob) else kept, name)
    first, end = _bounds(name)
    if events and not first <= events[0].number <= events[-1].number < end:
        raise IntegrityError(f"{name} holds events {events[0].number} to {events[-1].number}")
    return blob, events


def events_of(data: bytes, where: str) -> list[Event]:
    """Events of lines. Raises IntegrityError where a line is none, or numbers do not rise."""
    try:
        events = [_of_line(line, where) for line in data.splitlines(keepends=True)]
    except (ValueError, ConfigError) as error:
        raise IntegrityError(f"{where} is no log of events ({error}): restore it") from error
    if not _rising([event.number for event in events]):
        raise IntegrityError(f"{where}: numbers of events do not rise; restore it")
    return events


def _of_line(line: bytes, where: str) -> Event:
    event = from_json(Event, json.loads(line), where)
    if line.endswith(b"\n"):
        # As it was written, and not to be put together once more.
        vars(event)["line"] = line
    return event


def log_of(data: bytes, where: str) -> EventLog:
    """A log that is at its end, of the bytes that were sealed. Raises IntegrityError."""
    log = EventLog()
    log._events = events_of(data, where)
    log._next = log._committed = log._events[-1].number + 1 if log._events else 0
    return log


def _rising(numbers: Sequence[int]) -> bool:
    return all(a < b for a, b in pairwise(numbers))
