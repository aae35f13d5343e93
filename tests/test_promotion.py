"""Promotions that are cut off between any two calls, that meet, and that race: the history stays
complete, and the alias follows it.
"""

import itertools
import multiprocessing
import random
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from contest import Bench, FileRegistry, MemoryRegistry

from eqm import champion, disk, storage
from eqm.champion import Entry, LostRaceError
from eqm.errors import DataError
from eqm.records import Record, to_json
from eqm.registry import Version
from eqm.storage import LocalStore

SCHEDULES = 1000
MOVES = 4
RACES = 50
CANDIDATES = 3
WATCHED = ("read", "write_once", "list", "get", "record", "find_number", "find", "by_alias")
CHANGING = ("point", "unpoint", "tag")


class Killed(BaseException):
    """The program ends here, as by kill -9."""


class Watched:
    """A store or a registry whose every call is announced before it is made."""

    def __init__(self, inner: Any, announce: Callable[[str], None]) -> None:
        self._inner, self._announce = inner, announce

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in (*WATCHED, *CHANGING):
            return found

        def call(*given: Any, **named: Any) -> Any:
            self._announce(name)
            return found(*given, **named)

        return call


class Schedule:
    """A seeded run of moves of one champion, some of which are cut off or met by another move."""

    def __init__(self, seed: int, bench: Bench, reached: set[tuple[str, int]]) -> None:
        self.seed, self.bench, self.reached = seed, bench, reached
        self.chance = random.Random(seed)
        self.names = itertools.count()
        self.known: list[Entry] = []
        self.promised: list[Entry] = []
        """What was said to be done."""
        self.open: set[str] = set()
        """Moves that were killed: they may be done or not."""

    def run(self) -> None:
        for _ in range(MOVES):
            killed = self.moves()
            self.check_history()
            if not killed:
                assert self.bench.shown() == self.expected(), f"schedule {self.seed}"
        # The next program, whatever it is, begins with this.
        self.bench.repairs()
        assert self.bench.shown() == self.expected(), f"schedule {self.seed}"
        assert self.bench.repairs(every=True) == [], f"schedule {self.seed}"

    def moves(self) -> bool:
        """Make a move; whether it was killed."""
        kind = self.chance.choice(("promote", "promote", "rollback"))
        event = self.chance.choice(("kill", "kill", "meet", "none"))
        at, count = self.chance.randrange(CALLS[kind]), itertools.count()

        def announce(_: str) -> None:
            number = next(count)
            if number == at and event == "kill":
                self.reached.add((kind, at))
                raise Killed
            if number == at and event == "meet":
                self.make(self.chance.choice(("promote", "rollback")), self.bench)

        watched = Bench(
            Watched(self.bench.store, announce),
            Watched(self.bench.registry, announce),
            self.bench.model,
        )
        watched.trained = self.bench.trained
        return self.make(kind, watched)

    def make(self, kind: str, bench: Bench) -> bool:
        name = f"move {next(self.names)}"
        try:
            if kind == "promote":
                version = self.candidate()
                decision = self.bench.judged(version)
                done = bench.promotes(version, decision, by=name)
            else:
                done = bench.rolls_back(by=name)
        except Killed:
            self.open.add(name)
            return True
        except (LostRaceError, DataError):
            return False
        self.promised.append(done)
        return False

    def candidate(self) -> Version:
        number = self.chance.randrange(CANDIDATES) + 1
        return self.bench.registry.by_number(self.bench.model, number)

    def check_history(self) -> None:
        """Nothing that was there has changed, what was promised is there, and nothing else."""
        entries = champion.history(self.bench.store, self.bench.model)
        told = f"schedule {self.seed}: {[(e.number, e.action, e.version) for e in entries]}"
        assert entries[: len(self.known)] == self.known, told
        assert all(entry in entries for entry in self.promised), told
        others = [e.provenance["by"] for e in entries if e not in self.promised]
        assert set(others) <= self.open, told
        assert len(set(others)) == len(others), told
        standing: list[Entry] = []
        for entry in entries:
            judged_against = entry.decision["champion"]
            if entry.action == "promote":
                before = to_json(standing[-1].evaluation) if standing else None
                assert judged_against == before, f"{told}: judged against another champion"
                standing.append(entry)
            else:
                standing.pop()
        self.known = entries

    def expected(self) -> int | None:
        """The version that a stack of promotions ends in."""
        stack: list[int] = []
        for entry in self.known:
            stack = [*stack, entry.version] if entry.action == "promote" else stack[:-1]
        return stack[-1] if stack else None


CALLS = {"promote": 36, "rollback": 26}
"""Calls of a move that are numbered; one that makes fewer is not cut off."""


@pytest.fixture
def contest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Candidates in a store on this machine, which need not outlive it."""
    monkeypatch.setattr(storage.os, "fsync", lambda _: None)
    monkeypatch.setattr(disk.os, "fsync", lambda _: None)
    bench = Bench(LocalStore(tmp_path / "store"), MemoryRegistry(), "eqm-contest")
    for _ in range(CANDIDATES):
        bench.trains()
    return bench


def test_a_thousand_schedules(contest: Bench) -> None:
    reached: set[tuple[str, int]] = set()
    moves = 0
    for seed in range(SCHEDULES):
        schedule = Schedule(seed, contest.beside(f"eqm-{seed}", MemoryRegistry()), reached)
        schedule.run()
        moves += len(schedule.known)
    assert reached == {(kind, at) for kind, calls in CALLS.items() for at in range(calls)}
    assert moves > 2 * SCHEDULES


# -- races --------------------------------------------------------------------------------------


def racer(home: Path, mine: int, trained: dict[int, Record], start: Barrier, ended: Any) -> None:
    """Promote one of two candidates again and again, each time at the same moment as the other."""
    registry = FileRegistry(home / "registry.json")
    for race in range(RACES):
        bench = Bench(LocalStore(home / "store"), registry, f"eqm-race-{race}")
        bench.trained = trained
        version = registry.by_number(bench.model, mine)
        decision = bench.judged(version)
        start.wait(60)
        try:
            won = bench.promotes(version, decision).number == 1
            ended.put((race, mine, won, ""))
        except LostRaceError as error:
            ended.put((race, mine, False, str(error)))


def test_fifty_races_of_two_processes(contest: Bench, tmp_path: Path) -> None:
    """Exactly one of them wins, the other is told, and the alias is the winner's."""
    registry = FileRegistry(tmp_path / "registry.json")
    benches = [contest.beside(f"eqm-race-{race}", registry) for race in range(RACES)]
    context = multiprocessing.get_context("spawn")
    start, ended = context.Barrier(2), context.Queue()
    racers = [
        context.Process(target=racer, args=(tmp_path, mine, contest.trained, start, ended))
        for mine in (1, 2)
    ]
    for process in racers:
        process.start()
    results = [ended.get(timeout=90) for _ in range(2 * RACES)]
    for process in racers:
        process.join(30)
        assert process.exitcode == 0
    met = 0
    for race, bench in enumerate(benches):
        mine = {number: (won, told) for which, number, won, told in results if which == race}
        (winner,) = [number for number, (won, _) in mine.items() if won]
        ((_, told),) = [mine[number] for number in mine if number != winner]
        assert "judge again" in told or "at the same moment" in told
        met += "at the same moment" in told
        assert bench.moves() == [(1, "promote", winner)]
        assert bench.shown() == winner
        assert bench.repairs(every=True) == []
    assert met, "in no race did both find the same history"
