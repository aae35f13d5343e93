"""Kill everything that a training consists of, with -9, in turn, and see the same bits at the end.

``make chaos`` (or ``python tests/chaos.py --seed 3 --processes 2 --rounds 1``) runs a training
under torchrun through the product's own launcher against real S3 and MLflow servers. All that it
asks of them passes proxies, and the proxies are how moments are known: a rank, the torchrun agent,
the flow that started it or the S3 server itself is killed when a certain object is on its way, each
at every place, ``--rounds`` times, with new checkpoints between one and the next. In the end:
outputs bit-equal to an undisturbed run of as many processes, nothing gone on from but sealed
commits, no blob read before what names it was sealed, each point once in MLflow, no process left,
and as many kills counted as were asked for. The short form is a test (test_chaos).
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chain
from fault_proxy import Fault, FaultProxy, Seen

from eqm.config import Job, TrainStage, replace
from eqm.errors import EqmError
from eqm.events import events_of
from eqm.records import Record, from_json, to_json
from eqm.run import HISTORY_POINTS
from eqm.stage import job_digest
from eqm.storage import Store, open_store
from flows.launch import LocalLauncher
from infra import local
from infra.processes import members
from infra.stack import MLFLOW, S3, External, Stack
from infra.state import mark_of, read_state

TOKEN = "_EQM_CHAOS"
"""Environment variable by which every process of a scenario is known, whoever starts it."""
COMMIT = r"/checkpoints/[\d-]+\.json\?"
FILE = r"/checkpoints/[\d-]+\.(?:curve\.json|\d{4}\.safetensors)\?"
BLOB = "blobs/sha256/"
LEASE = r"/lease\.json"
SEAL = rf"{COMMIT}|/record\.json\?"
WENT_ON = re.compile(r"goes on from image ([\d,]+)")
S3_AWAY_SECONDS = 3.0
POINTS = r"mlflow/runs/log-batch"
MARKED = r"mlflow/runs/set-tag"
WAIT_SECONDS = 600.0
"""For the next chance to strike."""
END_SECONDS = 1800.0
"""For all that is left to train after the last strike."""
BATCH = 32
CHECKPOINT_IMAGES = 8 * BATCH
"""So far apart that not all of the time something is written."""
UPDATES_STRIKE, UPDATES_MIRROR = 60, 250
"""Updates that pass for a strike, and for one that waits until MLflow has missed something."""
CHECKPOINTS = {"checkpoint_every_images": CHECKPOINT_IMAGES, "keep_checkpoints": 3}

MOMENTS = {
    "in a step": ("PUT", COMMIT, "after"),
    "file on its way": ("PUT", FILE, "before"),
    "files there, no seal": ("PUT", COMMIT, "before"),
    "sealed, answer lost": ("PUT", COMMIT, "after"),
    "lease renewed": ("PUT", LEASE, "before"),
    "mirror catches up": ("POST", POINTS, "after"),
}
"""What passes a proxy when it happens, and whether the server has it by then."""
VICTIMS = ("rank", "agent", "flow", "s3")
ALWAYS = 3
"""At every place each is killed so often, at least, unless fewer ``--rounds`` are asked for."""


@dataclass(frozen=True)
class Strike:
    """Who is killed, and when."""

    victim: str
    moment: str
    number: int = 0
    """Which of those of this victim at this moment."""

    @property
    def needs_mlflow(self) -> bool:
        return MOMENTS[self.moment][1] == POINTS


@dataclass
class Row:
    """What is told of a strike."""

    strike: Strike
    position: int
    """Images of the newest commit when it came."""
    said: int
    """Bytes of the log by then."""
    killed: list[int] = field(default_factory=list)
    """Ids of the processes that were sent SIGKILL and had been alive."""
    who: str = ""
    """The victim, and which rank."""
    next: list[str] = field(default_factory=list)
    """What the log says from then until the next strike."""


# -- processes ----------------------------------------------------------------------------------


def carrying(token: str) -> dict[int, list[str]]:
    """Command lines of the living processes that carry a token, by id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            dead = entry.joinpath("stat").read_text().rpartition(")")[2].split()[0] in "ZX"
            told = entry.joinpath("environ").read_bytes().split(b"\0")
            if f"{TOKEN}={token}".encode() in told and not dead:
                line = entry.joinpath("cmdline").read_bytes().decode().split("\0")
                found[int(entry.name)] = line
        except OSError:
            continue
    return found


def rank_of(pid: int) -> int | None:
    """Rank of a training process; None for others."""
    try:
        told = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    ranks = [int(one.removeprefix(b"RANK=")) for one in told if one.startswith(b"RANK=")]
    return ranks[0] if ranks else None


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# -- a run under attack -------------------------------------------------------------------------


class Scenario:
    """One training, the flow that is started again whenever it ends, and the strikes at it."""

    def __init__(
        self,
        job: Job,
        processes: int,
        *,
        home: Path,
        proxy: FaultProxy,
        shown: FaultProxy | None,
        services: Path,
        stack: Stack,
        seed: int,
    ) -> None:
        """``proxy`` stands before S3, ``shown`` before MLflow where that is served."""
        self.stack = stack
        self.job, self.processes, self.home, self.proxy = job, processes, home, proxy
        self.shown, self.services = shown, services
        self.random = random.Random(seed)
        self.token = f"{seed}-{processes}-{os.getpid()}"
        self.log = home / "run.log"
        self.rows: list[Row] = []
        self.status: int | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    # -- the flow, again and again

    def keep_running(self) -> None:
        """Start the flow, and start it again whenever it ends otherwise than well."""
        file = self.home / "job.json"
        file.write_text(json.dumps(to_json(self.job)))
        line = [sys.executable, __file__, "--flow", str(file), str(self.processes), str(self.home)]
        environment = {
            **os.environ,
            "AWS_ENDPOINT_URL_S3": self.proxy.endpoint,
            "PYTHONPATH": os.pathsep.join(sys.path),
            TOKEN: self.token,
        }
        with self.log.open("ab") as log:
            while not self._ended.is_set():
                flow = subprocess.Popen(line, env=environment, stdout=log, stderr=log)
                self.status = flow.wait()
                if self.status == 0:
                    self._ended.set()
                else:
                    log.write(f"flow ended with {self.status}\n".encode())
                    log.flush()
                    self._ended.wait(0.3)

    def lines(self, start: int, end: int | None = None) -> list[str]:
        """What was said between two places of the log."""
        return self.log.read_bytes()[start:end].decode(errors="replace").splitlines()

    # -- what is known of it

    def position(self) -> int:
        """Images of the newest commit that the server has taken."""
        taken = [one for one in self.proxy.requests("PUT", COMMIT) if one.status == 200]
        return max((int(Path(one.key).name[:12]) for one in taken), default=0)

    def victims(self, victim: str, rank: int) -> list[int]:
        """Ids of what is to be killed; none where it does not run now."""
        if victim == "s3":
            leader = read_state(self.services).running[S3].leader
            return [process.pid for process in members(mark_of(S3, self.services), leader)]
        found = carrying(self.token)
        agents = [pid for pid, line in found.items() if "flows.torchrun" in line]
        if victim == "agent":
            return agents
        if victim == "flow":
            # Not one that was just refused because the program of another still runs.
            parents = [parent_of(pid) for pid in agents]
            return [pid for pid, line in found.items() if "--flow" in line and pid in parents]
        return [pid for pid in found if pid not in agents and rank_of(pid) == rank]

    # -- strikes

    def strike(self, strike: Strike) -> Row:
        """Wait for progress and for the moment, and kill."""
        method, pattern, moment = MOMENTS[strike.moment]
        before = self.rows[-1].position if self.rows else 0
        rank = self._rank(strike)
        done = threading.Event()
        rows: list[Row] = []

        def kill(after_seconds: float = 0.0) -> None:
            time.sleep(after_seconds)
            if strike.moment == "in a step" and self.proxy.under_way("PUT", f"{FILE}|{COMMIT}"):
                # It writes already: another time.
                rows.clear()
                return
            rows[0].killed = self._kill(strike.victim, rank)
            done.set()

        def act(request: Seen) -> bool:
            with self._lock:
                if rows or self.position() <= before:
                    return False
                pids = self.victims(strike.victim, rank)
                if not pids:
                    return False
                who = f"rank {rank}" if strike.victim == "rank" else strike.victim
                rows.append(Row(strike, self.position(), self.log.stat().st_size, who=who))
            if strike.moment == "in a step":
                self._beside(lambda: kill(self.random.uniform(0.0, 0.1)))
                return False
            kill()
            # The dead ask no further; what was on its way from them is lost.
            return strike.victim == "rank" or moment == "after"

        passes = self.proxy
        if strike.needs_mlflow:
            assert self.shown is not None
            passes = self.shown
            self._let_the_mirror_fall_behind()
        with passes.watch(method, pattern, moment, act):
            if strike.needs_mlflow:
                passes.now()
            struck = done.wait(WAIT_SECONDS)
        assert struck, f"{strike} never came; the run says:\n{self.log.read_text()[-3000:]}"
        self.rows.append(rows[0])
        say(f"{len(self.rows):3} {rows[0].who:7} {strike.moment:20} {rows[0].position:9,}")
        return rows[0]

    def _rank(self, strike: Strike) -> int:
        """First the one that writes, then the last, then any."""
        fixed = {0: 0, 1: self.processes - 1}
        return fixed.get(strike.number, self.random.randrange(self.processes))

    def _let_the_mirror_fall_behind(self) -> None:
        """MLflow is away until two points of the curve that it has not are durable."""
        assert self.shown is not None
        shown, runtime = self.shown, self.job.runtime
        self._wait(lambda: any(one.status == 200 for one in shown.requests("POST", MARKED)))
        shown.now(Fault("cut before", most=None))
        points = 2 * report_every(self.job) + 2 * runtime.checkpoint_every_images
        start = self.position()
        self._wait(lambda: self.position() >= start + points)

    def _wait(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not holds():
            assert not self._ended.is_set(), (
                f"it ended before all strikes, make it longer:\n{self.log.read_text()[-3000:]}"
            )
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.02)

    def _kill(self, victim: str, rank: int) -> list[int]:
        killed = []
        for pid in self.victims(victim, rank):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed.append(pid)
        if victim == "s3":
            self._beside(self._revive)
        return killed

    def _revive(self) -> None:
        time.sleep(S3_AWAY_SECONDS)
        self.stack = serve(self.services, mlflow=self.shown is not None)
        # Another program's server may have the old port by now.
        self.proxy.aim(str(self.stack.s3_endpoint))
        if self.shown is not None:
            self.shown.aim(str(self.stack.mlflow_uri))

    def _beside(self, work: Any) -> None:
        thread = threading.Thread(target=work)
        self._threads.append(thread)
        thread.start()

    def attack(self, strikes: list[Strike]) -> list[Row]:
        """Carry out all strikes, let the run end, and tell what followed each."""
        runner = threading.Thread(target=self.keep_running)
        runner.start()
        try:
            for strike in strikes:
                if self.rows:
                    self._wait(lambda: self._has_gone_on(self.rows[-1]))
                self.strike(strike)
            assert self._ended.wait(END_SECONDS), self.log.read_text()[-3000:]
            self._tell_what_followed()
        finally:
            self._ended.set()
            if sys.exc_info()[0] is not None:
                for pid in carrying(self.token):
                    os.kill(pid, signal.SIGKILL)
            runner.join()
            for thread in self._threads:
                thread.join()
        return self.rows

    def _has_gone_on(self, row: Row) -> bool:
        begun = resumed(self.lines(row.said))
        # Without a rank or the agent no run lasts; it may do without the flow, or S3 for a while.
        if row.strike.victim in ("rank", "agent") and not begun:
            return False
        return self.position() > max([row.position, *begun])

    def _tell_what_followed(self) -> None:
        ends = [row.said for row in self.rows[1:]]
        for row, end in zip(self.rows, [*ends, None], strict=True):
            row.next = self.lines(row.said, end)

    # -- what must hold

    def check(self, undisturbed: Record, store: Store) -> None:
        """Raise AssertionError unless all is as if nothing had happened."""
        record = store.record("train", job_digest(self.job))
        assert record is not None, "no record was sealed"
        assert record.outputs == undisturbed.outputs, "other bits than those of an undisturbed run"
        self._check_progress()
        self._check_positions()
        self._check_reads()
        if self.shown is not None:
            self._check_mirror(record, store)
        deadline = time.monotonic() + 10
        while (left := carrying(self.token)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, f"processes are left: {left}"

    def _check_progress(self) -> None:
        """Every strike killed something, and more was sealed than at the one before."""
        assert all(row.killed for row in self.rows), "a strike met nobody"
        positions = [row.position for row in self.rows]
        assert positions == sorted(set(positions)), f"no progress between two kills: {positions}"

    def _check_mirror(self, record: Record, store: Store) -> None:
        """MLflow has each point of the sealed log once."""
        from mlflow import MlflowClient

        events = events_of(store.get(record.logs["events.jsonl"]), "events.jsonl")
        expected = [(e.images_seen, e.figures["loss"]) for e in events if e.kind == "metrics"]
        assert self.shown is not None
        client = MlflowClient(tracking_uri=self.shown.endpoint)
        runtime = self.job.runtime
        experiment = client.get_experiment_by_name(runtime.mlflow_experiment)
        query = f"tags.`eqm.digest` = '{record.digest}'"
        (shown,) = client.search_runs([experiment.experiment_id], query)
        assert shown.info.status == "FINISHED", shown.info.status
        told = client.get_metric_history(shown.info.run_id, "loss")
        found = sorted((point.step, point.value) for point in told)
        assert found == expected, "MLflow shows other points than the log holds"

    def _check_positions(self) -> None:
        """What was gone on from had been sealed, and nothing that was sealed is lost."""
        sealed = {
            int(Path(one.key).name[:12])
            for one in self.proxy.requests("PUT", COMMIT)
            if one.status == 200
        }
        for row in self.rows:
            for position in resumed(row.next):
                assert position in sealed, f"image {position} was gone on from, never sealed"
                assert position >= row.position, f"{row.position} was sealed, {position} used"

    def _check_reads(self) -> None:
        """No blob is read before something sealed names it."""
        # What was there before anything was killed, and what seals named since.
        sealed = set(self.there)
        # Bodies of the seals as they came: commits are pruned by and by.
        own = {key: set(digests(json.loads(body))) for key, body in self.proxy.kept.items()}
        commits: set[str] = set()
        for one in list(self.proxy.seen):
            if one.method == "PUT" and one.status in (200, 412):
                sealed |= own.get(one.key, set())
            if one.method == "PUT" and one.status == 200 and re.search(COMMIT, one.key):
                commits.add(checkpoint_of(one.key))
            if one.method == "GET" and re.search(FILE, one.key):
                assert checkpoint_of(one.key) in commits, f"{one.key} was read before its commit"
            if one.method == "GET" and BLOB in one.key:
                digest = one.key.rpartition("/")[2]
                assert digest in sealed, f"blob {digest} was read before it was sealed"


def report_every(job: Job) -> int:
    """Images between two points of the curve."""
    stage = from_json(TrainStage, dict(job.config), "config")
    return stage.train.batch_size * max(1, stage.train.updates // HISTORY_POINTS)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def checkpoint_of(key: str) -> str:
    """Position and token that the names of all its files begin with."""
    return key.rpartition("/")[2].partition(".")[0]


def resumed(lines: list[str]) -> list[int]:
    return [int(found[1].replace(",", "")) for line in lines if (found := WENT_ON.search(line))]


def digests(value: Any) -> Iterator[str]:
    """All digests of blobs that a piece of JSON names."""
    if isinstance(value, dict) and "sha256" in value:
        yield value["sha256"]
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from digests(inner)


# -- setting it up ------------------------------------------------------------------------------


def serve(home: Path, *, mlflow: bool) -> Stack:
    """Start S3, and MLflow where it is asked for, in a folder of their own, or what of it died."""
    taken = ("EQM_", "AWS_", "MLFLOW_", "PREFECT_")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(taken)}
    return local.up(
        home,
        external=External(worker=False),
        environ=environ,
        report=lambda _: None,
        services=(S3, MLFLOW) if mlflow else (S3,),
    )


def make_chain(folder: Path, updates: int) -> chain.Chain:
    """Latents, and a config for a training of so many updates."""
    return chain.build(folder, {"train.images": updates * BATCH}, until="latents")


def job_in(
    made: chain.Chain, prefix: str, cache: Path, mlflow_uri: str | None
) -> tuple[Job, Store]:
    """The training job in S3, where it was never begun; and its store."""
    store = open_store(f"s3://eqm/{prefix}", cache=cache)
    for key in made.store.list(""):
        store.write_once(key, made.store.read(key))
    asked = made.job("train", cache=str(cache), mlflow_uri=mlflow_uri, **CHECKPOINTS)
    return replace(asked, runtime=replace(asked.runtime, store=store.uri)), store


def undisturbed(made: chain.Chain, processes: int, folder: Path) -> Record:
    """The same training on this machine, by as many processes, left alone."""
    store = chain.copied(made, folder / "undisturbed", without=())
    job = chain.elsewhere(made.job("train", **CHECKPOINTS), store.root)
    LocalLauncher(folder=folder / "jobs", environment=dict(os.environ)).run(
        job, processes=processes
    )
    record = store.record("train", job_digest(job))
    assert record is not None
    return record


def run(
    made: chain.Chain, processes: int, strikes: list[Strike], *, folder: Path, seed: int
) -> list[Row]:
    """Attack one training and check how it ended; returns what was done. Raises AssertionError."""
    home = folder / f"chaos-{processes}"
    home.mkdir(parents=True)
    expected = undisturbed(made, processes, home)
    services = home / "services"
    stack = serve(services, mlflow=any(strike.needs_mlflow for strike in strikes))
    with contextlib.ExitStack() as until_the_end:
        until_the_end.callback(local.down, services, report=lambda _: None)
        until_the_end.enter_context(pointed_at(stack.environment()))
        proxy = until_the_end.enter_context(FaultProxy(str(stack.s3_endpoint), keep=SEAL))
        shown = None
        if stack.mlflow_uri is not None:
            shown = until_the_end.enter_context(FaultProxy(stack.mlflow_uri, keep_host=False))
        uri = None if shown is None else shown.endpoint
        job, store = job_in(made, f"chaos-{seed}-{processes}", home / "cache", uri)
        scenario = Scenario(
            *(job, processes),
            home=home,
            proxy=proxy,
            shown=shown,
            services=services,
            stack=stack,
            seed=seed,
        )
        scenario.there = {key.rpartition("/")[2] for key in store.list(BLOB)}
        rows = scenario.attack(strikes)
        with pointed_at(scenario.stack.environment()):
            scenario.check(expected, open_store(store.uri, cache=home / "cache"))
    return rows


class pointed_at:
    """This process' environment, with other values for a while."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = values

    def __enter__(self) -> None:
        self.before = dict(os.environ)
        os.environ.update(self.values)

    def __exit__(self, *_: object) -> None:
        os.environ.clear()
        os.environ.update(self.before)


def all_strikes(seed: int, rounds: int) -> list[Strike]:
    """Every victim at every moment, so many times, in an order that the seed gives.

    A flow that is killed leaves its programs to themselves, and no other flow has them until they
    are started again: so a rank or the agent is always killed next.
    """
    drawn = random.Random(seed)
    every = {
        victim: [Strike(victim, moment, n) for moment in MOMENTS for n in range(rounds)]
        for victim in VICTIMS
    }
    for strikes in every.values():
        drawn.shuffle(strikes)
    ends = every["rank"] + every["agent"]
    drawn.shuffle(ends)
    pairs = [[flow, ends.pop()] for flow in every["flow"]]
    units = [*pairs, *([one] for one in (*ends, *every["s3"]))]
    drawn.shuffle(units)
    return [strike for unit in units for strike in unit]


def updates_for(strikes: list[Strike]) -> int:
    """Updates that last until all of them have come, by what they took at most, and more."""
    return 100 + sum(UPDATES_MIRROR if one.needs_mlflow else UPDATES_STRIKE for one in strikes)


def tally(rows: list[Row], rounds: int) -> str:
    """Kills by place and victim. Raises AssertionError where one was killed less often."""
    found = Counter((row.strike.moment, row.strike.victim) for row in rows if row.killed)
    lines = [f"{'':20} " + " ".join(f"{victim:>6}" for victim in VICTIMS)]
    for moment in MOMENTS:
        counts = [found[moment, victim] for victim in VICTIMS]
        assert min(counts) >= rounds, f"{moment}: {dict(zip(VICTIMS, counts, strict=True))}"
        lines.append(f"{moment:20} " + " ".join(f"{count:6}" for count in counts))
    return "\n".join(lines)


def flow(argv: list[str]) -> int:
    """What stands for the flow: the product's launcher, and what it says."""
    file, processes, home = argv
    job = from_json(Job, json.loads(Path(file).read_text()), "job")
    launcher = LocalLauncher(folder=Path(home) / "flow", environment=dict(os.environ))
    try:
        launcher.run(job, processes=int(processes))
    except EqmError as error:
        sys.stderr.write(f"flow: {error}\n")
        return 2
    return 0


def table(rows: list[Row]) -> str:
    """Who was killed, when, where the run was, and what happened next."""
    lines = [f"{'killed':7} {'moment':20} {'image':>7}  next"]
    for row in rows:
        lines.append(f"{row.who:7} {row.strike.moment:20} {row.position:7,}  {story(row)}")
    return "\n".join(lines)


def story(row: Row) -> str:
    """The lines that tell what became of the run, in short."""
    kept = []
    for line in row.next:
        if WENT_ON.search(line):
            kept.append(f"went on from {resumed([line])[0]:,}")
        elif line.startswith("flow:") and "running already" not in line:
            kept.append(line.partition(": ")[2].partition(": ")[2][:60] or line[:60])
        elif "running already" in line and "waited for the program" not in kept:
            kept.append("waited for the program")
        elif line.startswith("flow ended with -9"):
            kept.append("flow gone")
        elif "sealed, content" in line:
            kept.append("sealed")
    return "; ".join(kept) or "went on, undisturbed"


def main(argv: list[str]) -> int:
    """Run the scenarios and print what was done."""
    if argv[:1] == ["--flow"]:
        return flow(argv[1:])
    # So that a harness that is told to end cleans up as after an error.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=ALWAYS, help="of every victim at every place")
    asked = parser.parse_args(argv)
    strikes = all_strikes(asked.seed, asked.rounds)
    with tempfile.TemporaryDirectory(prefix="eqm-chaos-") as folder:
        made = make_chain(Path(folder) / "chain", updates_for(strikes))
        for processes in asked.processes:
            began = time.monotonic()
            rows = run(made, processes, strikes, folder=Path(folder), seed=asked.seed)
            seconds = time.monotonic() - began
            say(f"\n{processes} processes, seed {asked.seed}, {seconds:.0f} s: same bits\n")
            say(f"{table(rows)}\n\n{tally(rows, asked.rounds)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
