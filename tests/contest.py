"""What tests of promotion share: versions that may become champion, and a registry in memory."""

import dataclasses
import fcntl
import itertools
import json
import multiprocessing
import random
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from eqm import champion, stage
from eqm.champion import Entry, LostRaceError
from eqm.config import Job, Runtime
from eqm.errors import DataError
from eqm.records import Decision, Reason, Record, Ref, to_json
from eqm.registry import Registry, Version
from eqm.stage import Outcome
from eqm.storage import open_store

CANDIDATES = 3
RACES = 50
MOVES = 5
"""Of a schedule."""
CALLS = {"promote": 36, "rollback": 26}
"""Calls of a move of which every one is cut off, in some schedule; with others in it up to 60."""
WATCHED = ("read", "write_once", "list", "get", "record", "find_number", "find", "by_alias")
CHANGING = ("point", "unpoint", "tag")


class MemoryRegistry:
    """The few calls of eqm.registry.Registry that a promotion makes, without a server."""

    def __init__(self) -> None:
        self.versions: dict[str, dict[int, Version]] = {}
        self.aliases: dict[tuple[str, str], int] = {}

    def register(
        self, model: str, *, source: str, tags: dict[str, str], run_digest: str
    ) -> Version:
        found = self.find(model, source=source, content=tags["eqm.content"])
        if found is None:
            versions = self.versions.setdefault(model, {})
            number = len(versions) + 1
            found = Version(model=model, number=number, source=source, tags=dict(tags))
            versions[number] = found
        return found

    def find(self, model: str, *, source: str, content: str) -> Version | None:
        for version in self.versions.get(model, {}).values():
            if (version.source, version.tags.get("eqm.content")) == (source, content):
                return version
        return None

    def find_number(self, model: str, number: int) -> Version | None:
        return self.versions.get(model, {}).get(number)

    def by_number(self, model: str, number: int) -> Version:
        return self.versions[model][number]

    def by_alias(self, model: str, alias: str) -> Version | None:
        number = self.aliases.get((model, alias))
        return None if number is None else self.versions[model][number]

    def point(self, model: str, alias: str, number: int) -> None:
        self.aliases[model, alias] = number

    def unpoint(self, model: str, alias: str) -> None:
        self.aliases.pop((model, alias), None)

    def tag(self, version: Version, tags: dict[str, str]) -> None:
        known = self.versions[version.model][version.number]
        new = dataclasses.replace(known, tags={**known.tags, **tags})
        self.versions[version.model][version.number] = new


class FileRegistry:
    """A registry in a file, which several processes share: each call is one step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            with self.path.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                held = _loaded(file.read())
                answer = getattr(held, name)(*given, **named)
                file.seek(0)
                file.write(_dumped(held))
                file.truncate()
            return answer

        return call


def _loaded(text: str) -> MemoryRegistry:
    held = MemoryRegistry()
    for version in json.loads(text or "{}").get("versions", []):
        held.versions.setdefault(version["model"], {})[version["number"]] = Version(**version)
    for model, alias, number in json.loads(text or "{}").get("aliases", []):
        held.aliases[model, alias] = number
    return held


def _dumped(held: MemoryRegistry) -> str:
    versions = [vars(v) for of_model in held.versions.values() for v in of_model.values()]
    aliases = [[model, alias, number] for (model, alias), number in held.aliases.items()]
    return json.dumps({"versions": versions, "aliases": aliases})


class Bench:
    """A model with versions that may become champion."""

    def __init__(self, store: Any, registry: Any, model: str) -> None:
        self.store, self.registry, self.model = store, registry, model
        self.trained: dict[int, Record] = {}
        self.evaluated: dict[int, Ref] = {}

    def trains(self) -> Version:
        """Seal another training, and register it."""
        names = ("ema.safetensors", "model.json")
        outputs = {name: f"{name} {len(self.trained)}".encode() for name in names}
        runtime = Runtime(store=self.store.uri, device="cpu", threads=1)
        config: dict[str, Any] = {
            "network": {},
            "objective": {},
            "train": {"seed": len(self.trained)},
        }
        job = Job(stage="train", config=config, inputs={}, runtime=runtime)
        record = stage.run(job, lambda _: Outcome(outputs={**outputs}))
        version = self.registers(record)
        self.trained[version.number] = record
        return version

    def beside(self, model: str, registry: Any | None = None, store: Any | None = None) -> "Bench":
        """Another model in the same store, with the same trainings registered."""
        other = Bench(store or self.store, registry or self.registry, model)
        for number, record in self.trained.items():
            other.registers(record)
            other.trained[number] = record
        other.evaluated = self.evaluated
        return other

    def registers(self, record: Record) -> Version:
        return self.registry.register(
            self.model,
            source=self.store.where(f"train/{record.digest}"),
            tags={"eqm.content": record.content},
            run_digest=record.digest,
        )

    def evidence(self, number: int) -> Ref:
        """Sealed evaluation of a version."""
        if number not in self.evaluated:
            self.evaluated[number] = self.evaluates(number)
        return self.evaluated[number]

    def evaluates(self, number: int, **config: Any) -> Ref:
        record = Record(
            stage="evaluation",
            algorithm=1,
            config=config,
            inputs={"train": self.trained[number].ref},
            outputs={},
            values={"number": number},
        )
        return self.store.seal(record).ref

    def judged(self, version: Version, *, promote: bool = True) -> Decision:
        standing = champion.current(self.store, self.model)
        return Decision(
            promote=promote,
            policy={"name": "test"},
            candidate=self.evidence(version.number),
            champion=standing.evaluation if standing else None,
            reasons=(
                Reason(check="distance", passed=promote, text="distance is 9; at most 5"),
                Reason(check="numbers", passed=True, text="all finite"),
            ),
        )

    def promotes(
        self,
        version: Version,
        decision: Decision | None = None,
        train: Ref | None = None,
        by: str = "a test",
    ) -> champion.Entry:
        report = f"reports/{version.number}.html"
        self.store.write_once(report, f"<p>report {version.number}".encode())
        return champion.promote(
            self.store,
            self.registry,
            version=version,
            train=train or self.trained[version.number].ref,
            decision=decision or self.judged(version),
            report=report,
            provenance={"by": by},
        )

    def rolls_back(self, by: str = "a test") -> champion.Entry:
        return champion.rollback(self.store, self.registry, self.model, {"by": by})

    def repairs(self, *, every: bool = False) -> list[str]:
        return champion.repair(self.store, self.registry, self.model, every=every)

    def shown(self) -> int | None:
        found = self.registry.by_alias(self.model, "champion")
        return found.number if found else None

    def moves(self) -> list[tuple[int, str, int]]:
        entries = champion.history(self.store, self.model)
        return [(e.number, e.action, e.version) for e in entries]


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


@dataclasses.dataclass
class Made:
    """A move of a schedule."""

    kind: str
    calls: int = 0
    """That it made itself."""
    alone: bool = True
    """Whether nothing happened in it."""


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
        self.made: list[Made] = []

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
        event, at = self.event(kind)
        made = Made(kind)
        self.made.append(made)

        def announce(_: str) -> None:
            number = made.calls
            made.calls += 1
            made.alone = made.alone and number != at
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

    def event(self, kind: str) -> tuple[str, int]:
        """What happens in a move of this kind, and before which of its calls."""
        event = self.chance.choice(("kill", "kill", "meet", "late"))
        at = self.chance.randrange(CALLS[kind])
        # Most moves have ended by then.
        return ("kill", at + CALLS[kind]) if event == "late" else (event, at)

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
                if standing and standing[-1].version == entry.version:
                    standing.pop()
                standing.append(entry)
            else:
                standing.pop()
        self.known = entries

    def expected(self) -> int | None:
        """The version that a stack of promotions ends in; promoted again, it is there once."""
        stack: list[int] = []
        for entry in self.known:
            if entry.action == "rollback":
                stack = stack[:-1]
            elif stack[-1:] != [entry.version]:
                stack = [*stack, entry.version]
        return stack[-1] if stack else None


class Cut(Schedule):
    """The schedule of a seed, in which a certain move is killed before a certain call of it."""

    def __init__(
        self, seed: int, bench: Bench, reached: set[tuple[str, int]], *, move: int, at: int
    ) -> None:
        super().__init__(seed, bench, reached)
        self.move, self.at = move, at

    def event(self, kind: str) -> tuple[str, int]:
        found = super().event(kind)
        return ("kill", self.at) if len(self.made) == self.move else found


# -- races --------------------------------------------------------------------------------------


def race_all(benches: list[Bench], *, registry: str) -> int:
    """Have two processes promote version 1 and version 2 of each model at the same moment.

    In every race exactly one wins, the other is told, and the alias is the winner's. ``registry``
    is the file of a FileRegistry, or the address of an MLflow. Returns in how many races both had
    found the same history, so that the store alone decided.
    """
    context = multiprocessing.get_context("spawn")
    start, ended = context.Barrier(2), context.Queue()
    models = [bench.model for bench in benches]
    given = (benches[0].store.uri, registry, models, benches[0].trained, start, ended)
    racers = [context.Process(target=racer, args=(mine, *given)) for mine in (1, 2)]
    for process in racers:
        process.start()
    results = [ended.get(timeout=90) for _ in range(2 * len(benches))]
    for process in racers:
        process.join(30)
        assert process.exitcode == 0
    met = 0
    for bench in benches:
        mine = {number: (won, told) for which, number, won, told in results if which == bench.model}
        (winner,) = [number for number, (won, _) in mine.items() if won]
        ((_, told),) = [mine[number] for number in mine if number != winner]
        assert "judge again" in told or "at the same moment" in told
        met += "at the same moment" in told
        assert bench.moves() == [(1, "promote", winner)]
        assert bench.shown() == winner
        assert bench.repairs(every=True) == []
    return met


def racer(
    mine: int,
    store: str,
    registry: str,
    models: list[str],
    trained: dict[int, Record],
    start: Barrier,
    ended: Any,
) -> None:
    """Promote one of two candidates of each model, when somebody else does the other."""
    shared: Any = FileRegistry(Path(registry)) if registry.startswith("/") else Registry(registry)
    for model in models:
        bench = Bench(open_store(store), shared, model)
        bench.trained = trained
        version = shared.by_number(model, mine)
        decision = bench.judged(version)
        start.wait(60)
        try:
            won = bench.promotes(version, decision).number == 1
            ended.put((model, mine, won, ""))
        except LostRaceError as error:
            ended.put((model, mine, False, str(error)))
