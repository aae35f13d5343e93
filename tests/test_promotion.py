"""Promotions that are cut off between any two calls, that meet, and that race: the history stays
complete, and the alias follows it.
"""

import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from contest import CALLS, CANDIDATES, Bench, FileRegistry, MemoryRegistry, Schedule

from eqm import disk, storage
from eqm.champion import LostRaceError
from eqm.records import Record
from eqm.storage import LocalStore

SCHEDULES = 1000
LATE = 3
RACES = 50


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
    late = {(kind, at) for kind, at in reached if at >= CALLS[kind]}
    assert reached - late == {(kind, at) for kind, calls in CALLS.items() for at in range(calls)}
    assert len(late) >= LATE, sorted(late)
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
