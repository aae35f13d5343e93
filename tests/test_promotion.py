"""Promotions that are cut off between any two calls, that meet, and that race: the history stays
complete, and the alias follows it.
"""

from pathlib import Path

import pytest
from contest import (
    CALLS,
    CANDIDATES,
    RACES,
    Bench,
    Cut,
    FileRegistry,
    MemoryRegistry,
    Schedule,
    race_all,
)

from eqm import disk, storage
from eqm.storage import LocalStore

ENOUGH = 1000
"""Schedules that are cut off before every call at least once."""
LATE = 3
LOOKED_AT = 160


@pytest.fixture
def contest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Candidates in a store on this machine, which need not outlive it."""
    monkeypatch.setattr(storage.os, "fsync", lambda _: None)
    monkeypatch.setattr(disk.os, "fsync", lambda _: None)
    bench = Bench(LocalStore(tmp_path / "store"), MemoryRegistry(), "eqm-contest")
    for _ in range(CANDIDATES):
        bench.trains()
    return bench


@pytest.mark.parametrize("schedules", [250, pytest.param(ENOUGH, marks=pytest.mark.slow)])
def test_schedules(contest: Bench, schedules: int) -> None:
    reached: set[tuple[str, int]] = set()
    moves = 0
    for seed in range(schedules):
        schedule = Schedule(seed, contest.beside(f"eqm-{seed}", MemoryRegistry()), reached)
        schedule.run()
        moves += len(schedule.known)
    late = {(kind, at) for kind, at in reached if at >= CALLS[kind]}
    if schedules >= ENOUGH:
        every = {(kind, at) for kind, calls in CALLS.items() for at in range(calls)}
        assert reached - late == every
        assert len(late) >= LATE, sorted(late)
    assert moves > 2 * schedules


@pytest.mark.parametrize("kind", CALLS)
def test_the_longest_move_is_cut_off_before_each_of_its_calls(contest: Bench, kind: str) -> None:
    """After a move that was cut off the next one has more to do than usual."""
    found = []
    for seed in range(LOOKED_AT):
        schedule = Schedule(seed, contest.beside(f"eqm-{seed}", MemoryRegistry()), set())
        schedule.run()
        whole = [(i, made) for i, made in enumerate(schedule.made) if made.alone]
        found += [(made.calls, seed, i) for i, made in whole if made.kind == kind]
    calls, seed, move = max(found)
    assert calls > CALLS[kind]
    for at in range(calls):
        reached: set[tuple[str, int]] = set()
        bench = contest.beside(f"eqm-cut-{at}", MemoryRegistry())
        Cut(seed, bench, reached, move=move, at=at).run()
        assert (kind, at) in reached


def test_fifty_races_of_two_processes(contest: Bench, tmp_path: Path) -> None:
    """Exactly one of them wins, the other is told, and the alias is the winner's."""
    path = tmp_path / "registry.json"
    registry = FileRegistry(path)
    benches = [contest.beside(f"eqm-race-{race}", registry) for race in range(RACES)]
    assert race_all(benches, registry=str(path)), "in no race did both find the same history"
