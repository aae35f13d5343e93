"""Stage programs as processes: their reasons are told, and none is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from eqm.config import Job, Runtime, replace
from eqm.errors import AwayError, StageError
from eqm.records import from_json
from eqm.stage import AWAY, read_job
from flows import launch
from flows.calling import interrupts_told
from flows.launch import LocalLauncher

pytestmark = pytest.mark.timeout(120)

PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path

{body}
"""
SLEEPS_WITH_A_CHILD = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
Path("pids-%s" % os.environ.get("RANK", "0")).write_text("%d %d" % (os.getpid(), child.pid))
time.sleep(300)
"""
IGNORES_SIGTERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEPS_WITH_A_CHILD
MAKES_A_CHECKPOINT = """
def ends(*_):
    time.sleep(0.5)
    Path("checkpoint").write_text("made")
    sys.exit(0)

signal.signal(signal.SIGTERM, ends)
Path("pids-0").write_text(str(os.getpid()))
while True:
    time.sleep(0.1)
"""


@dataclass
class Place:
    """A folder with a stage program that the launcher runs instead of the real one."""

    folder: Path
    launcher: LocalLauncher

    def program(self, body: str) -> None:
        (self.folder / "a_program.py").write_text(PROGRAM.format(body=body))

    def pids(self, count: int) -> list[int]:
        """Of a program that has begun, and of its children."""
        deadline = time.monotonic() + 60
        while True:
            texts = [file.read_text() for file in self.folder.glob("pids-*")]
            if len(texts) == count and all(texts):
                return [int(pid) for text in texts for pid in text.split()]
            assert time.monotonic() < deadline, f"{texts}: not all have begun"
            time.sleep(0.05)

    def survivors(self) -> list[str]:
        """Processes that carry the mark of this launcher, after a moment to be buried in."""
        mark = str(self.folder).encode()
        deadline = time.monotonic() + 5
        while (found := marked(mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found


def marked(mark: bytes) -> list[str]:
    return list(pids_marked(mark).values())


def pids_marked(mark: bytes) -> dict[int, str]:
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            dead = entry.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if not dead and mark in entry.joinpath("environ").read_bytes():
                found[int(entry.name)] = entry.joinpath("cmdline").read_bytes().decode()
        except OSError:
            continue
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setitem(launch.PROGRAMS, "latents", "a_program")
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    return Place(tmp_path, LocalLauncher(folder=tmp_path / "jobs", environment=environment))


def a_job(**changes: Any) -> Job:
    runtime = Runtime(store="/nowhere", device="cpu", threads=1, **changes)
    return Job(stage="latents", config={"source": {}, "encode": {}}, inputs={}, runtime=runtime)


# -- how a program ends -------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "told"), [(None, "4"), (3, "3")])
def test_processes_share_the_cores_unless_it_is_said_otherwise(
    place: Place, monkeypatch: pytest.MonkeyPatch, threads: int | None, told: str
) -> None:
    monkeypatch.setattr(launch, "cores", lambda: 9)
    place.program('Path("seen-" + os.environ["RANK"]).write_text(os.environ["OMP_NUM_THREADS"])')
    job = a_job()
    place.launcher.run(replace(job, runtime=replace(job.runtime, threads=threads)), processes=2)
    assert [(place.folder / f"seen-{rank}").read_text() for rank in (0, 1)] == [told, told]


def test_a_program_is_given_its_job_and_environment(place: Place) -> None:
    place.program('Path("seen").write_text(sys.argv[1] + " " + os.environ["PYTHONPATH"])')
    place.launcher.run(a_job(), processes=1)
    file, path = (place.folder / "seen").read_text().split()
    assert path == str(place.folder)
    given = read_job(Path(file), ("latents",))
    assert given.config == a_job().config
    assert given.runtime.store == "/nowhere"
    assert Path(str(given.runtime.error_file)).parent == place.folder / "jobs"
    assert from_json(Runtime, {"store": "x"}, "runtime").error_file is None


def test_what_lies_where_a_flow_is_started_is_not_run(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = place.folder / "here"
    here.mkdir()
    for name in ("a_program.py", "random.py"):
        (here / name).write_text("raise SystemExit(3)")
    monkeypatch.chdir(here)
    place.program("import random")
    place.launcher.run(a_job(), processes=1)


def test_parts_of_a_job_run_beside_each_other_but_no_part_twice(place: Place) -> None:
    place.program(SLEEPS_WITH_A_CHILD)
    with ThreadPoolExecutor() as beside:
        running = beside.submit(place.launcher.run, a_job(shards=(0, 2)))
        pids = place.pids(1)
        told = rf"is running already on this machine.* end it \(kill {pids[0]}; a training makes"
        with pytest.raises(StageError, match=told):
            place.launcher.run(a_job(shards=(0, 2)))
        place.program('Path("seen").write_text(sys.argv[1])')
        place.launcher.run(a_job(shards=(2, 4)))
        assert (place.folder / "seen").read_text().endswith("-2-4.json")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(StageError, match="was killed by SIGKILL"):
            running.result(30)
    assert place.survivors() == []


def test_the_message_of_the_program_is_the_message(place: Place) -> None:
    place.program(
        "import json\n"
        'told = json.loads(Path(sys.argv[1]).read_text())["runtime"]["error_file"]\n'
        'Path(told).write_text("class 7 has no image: add some")\n'
        "sys.exit(2)"
    )
    with pytest.raises(StageError, match=r"^latents-[0-9a-f]{16}: class 7 has no image: add some$"):
        place.launcher.run(a_job(), processes=1)
    # The reason of the run before is not the reason of this one.
    place.program("sys.exit(3)")
    with pytest.raises(StageError, match="ended with status 3: its output above says why"):
        place.launcher.run(a_job(), processes=1)


def test_a_program_whose_store_was_away_may_be_tried_again(place: Place) -> None:
    place.program(
        "import json\n"
        'told = json.loads(Path(sys.argv[1]).read_text())["runtime"]["error_file"]\n'
        f'Path(told).write_text("S3 cannot be reached{AWAY}")\n'
        "sys.exit(2)"
    )
    with pytest.raises(AwayError, match=r"^latents-[0-9a-f]{16}: S3 cannot be reached"):
        place.launcher.run(a_job(), processes=1)


def test_the_message_of_a_real_program(tmp_path: Path) -> None:
    launcher = LocalLauncher(folder=tmp_path / "jobs", environment=os.environ)
    config = {"source": {"image_size_px": 2}, "autoencoder": {}}
    runtime = Runtime(store=str(tmp_path / "store"), device="cpu")
    job = Job(stage="autoencoder", config=config, inputs={}, runtime=runtime)
    with pytest.raises(StageError, match=r"source.image_size_px is 2; it must be from 4 to 4096"):
        launcher.run(job, processes=1)


def test_a_program_that_is_killed_is_told(place: Place) -> None:
    place.program("os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(StageError, match=r"SIGKILL: if memory ran out.*run it again to go on"):
        place.launcher.run(a_job(), processes=1)


def test_a_rank_that_is_killed_is_told_beside_what_others_make_of_it(place: Place) -> None:
    place.program(
        "import json\n"
        'told = Path(json.loads(Path(sys.argv[1]).read_text())["runtime"]["error_file"])\n'
        'if os.environ["RANK"] == "0":\n'
        '    told.write_text("no answer")\n'
        "    time.sleep(300)\n"
        "while not told.exists(): time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    told = r"^latents-[0-9a-f]{16}: no answer\. A process of it was killed by SIGKILL, .*: if m"
    with pytest.raises(StageError, match=told):
        place.launcher.run(a_job(), processes=2)


def test_under_torchrun_a_message_comes_through_and_which_rank_has_failed(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    place.program(
        "import json\n"
        'told = json.loads(Path(sys.argv[1]).read_text())["runtime"]["error_file"]\n'
        'if os.environ["RANK"] == "1": Path(told).write_text("rank 1 says no")\n'
        "else: time.sleep(300)\n"
        "sys.exit(2)"
    )
    with pytest.raises(StageError, match=r"latents-[0-9a-f]{16}: rank 1 says no$"):
        place.launcher.run(a_job(), processes=2)
    (told,) = capfd.readouterr().err.splitlines()
    assert "(exitcode: 2) local_rank: 1" in told
    assert place.survivors() == []


def test_workers_do_not_outlive_a_torchrun_that_is_killed(place: Place) -> None:
    place.program(SLEEPS_WITH_A_CHILD)
    killed = threading.Thread(target=lambda: kill_torchrun(place))
    killed.start()
    with pytest.raises(StageError, match="was killed by SIGKILL"):
        place.launcher.run(a_job(), processes=2)
    killed.join()
    assert place.survivors() == []


def kill_torchrun(place: Place) -> int:
    worker = place.pids(2)[0]
    parent = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1]
    os.kill(int(parent), signal.SIGKILL)
    return int(parent)


# -- cancelled ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "processes", "grace"),
    [(SLEEPS_WITH_A_CHILD, 1, 30.0), (IGNORES_SIGTERM, 1, 1.0), (SLEEPS_WITH_A_CHILD, 2, 30.0)],
    ids=["alone", "deaf", "torchrun"],
)
def test_an_interrupt_ends_the_whole_group(
    place: Place,
    body: str,
    processes: int,
    grace: float,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", grace)
    monkeypatch.setattr(launch, "TOLD_SECONDS", grace)
    place.program(body)
    with interrupted(lambda: place.pids(processes)) as begun, pytest.raises(KeyboardInterrupt):
        place.launcher.run(a_job(), processes=processes)
    assert len(begun) == 2 * processes
    assert place.survivors() == []
    assert capfd.readouterr().err == ""


def test_training_has_time_for_a_checkpoint(place: Place) -> None:
    place.program(MAKES_A_CHECKPOINT)
    with interrupted(lambda: place.pids(1)), pytest.raises(KeyboardInterrupt):
        place.launcher.run(a_job(), processes=1)
    assert (place.folder / "checkpoint").read_text() == "made"
    assert place.survivors() == []


def speechless(within: pytest.MonkeyPatch, place: Place, stderr: Any) -> None:
    within.setattr(sys, "stderr", stderr)
    place.launcher.run(a_job(), processes=1)


@pytest.mark.parametrize("gone", [BrokenPipeError(), None])
def test_it_has_that_time_though_nobody_reads_what_is_said(
    place: Place, monkeypatch: pytest.MonkeyPatch, gone: OSError | None
) -> None:
    """Ctrl-C ends the `tee` behind a pipe too; a daemon may have no stderr at all."""

    def write(_: str) -> int:
        assert gone is not None
        raise gone

    monkeypatch.setattr(launch, "TOLD_SECONDS", 0.1)
    place.program(MAKES_A_CHECKPOINT)
    stderr = None if gone is None else SimpleNamespace(write=write)
    with (
        monkeypatch.context() as within,
        interrupted(lambda: place.pids(1)),
        pytest.raises(KeyboardInterrupt),
    ):
        speechless(within, place, stderr)
    assert (place.folder / "checkpoint").read_text() == "made"


def test_a_second_interrupt_ends_it_at_once(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "TOLD_SECONDS", 0.1)
    place.program(IGNORES_SIGTERM)
    began = time.monotonic()
    with calling_interrupted(), interrupted(lambda: place.pids(1), times=2):
        place.launcher.run(a_job(), processes=1)
    assert time.monotonic() - began < launch.GRACE_SECONDS
    assert place.survivors() == []
    told = " ".join(capsys.readouterr().err.split())
    assert "a training writes a checkpoint (for up to 110 s). Ctrl-C again ends it at once" in told
    assert told.endswith("goes on with a training from its last checkpoint")


@contextlib.contextmanager
def calling_interrupted() -> Iterator[None]:
    """What a command says in the end, and its exit status."""
    with pytest.raises(typer.Exit) as left, interrupts_told():
        yield
    assert left.value.exit_code == 130


def test_an_interrupt_of_the_start_itself_leaves_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine a program may be at work before its launcher knows that it has begun."""
    place.program(SLEEPS_WITH_A_CHILD)
    really = subprocess.Popen

    def started_and_interrupted(*line: Any, **settings: Any) -> None:
        really(*line, **settings)
        assert len(place.pids(1)) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.subprocess, "Popen", started_and_interrupted)
    with pytest.raises(KeyboardInterrupt):
        place.launcher.run(a_job(), processes=1)
    assert place.survivors() == []


def test_a_flow_that_is_killed_leaves_its_program(place: Place) -> None:
    place.program(SLEEPS_WITH_A_CHILD)
    script = (
        "import os, sys; from pathlib import Path; from flows import launch; "
        "from eqm.config import Job, Runtime; launch.PROGRAMS['latents'] = 'a_program'; "
        "launch.LocalLauncher(folder=Path('jobs'), environment=os.environ).run("
        "Job(stage='latents', config={'source': {}, 'encode': {}}, inputs={}, "
        "runtime=Runtime(store='/nowhere')), processes=1)"
    )
    flow = subprocess.Popen([sys.executable, "-c", script], env=place.launcher.environment)
    try:
        program, child = place.pids(1)
        flow.kill()
        flow.wait()
        time.sleep(0.2)
        assert len(marked(str(place.folder).encode())) == 2
        # It still has the job: the same command does not start a second one beside it.
        again = subprocess.run(
            [sys.executable, "-c", script],
            env=place.launcher.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "is running already on this machine" in again.stderr
        assert len(marked(str(place.folder).encode())) == 2
    finally:
        flow.kill()
        flow.wait()
        for pid in place.pids(1):
            os.kill(pid, signal.SIGKILL)
    assert place.survivors() == []
    assert program != child


def test_ranks_whose_flow_and_torchrun_were_killed_end_before_the_next_attempt(
    place: Place,
) -> None:
    place.program(SLEEPS_WITH_A_CHILD)
    script = (
        "import os; from pathlib import Path; from flows import launch; "
        "from eqm.config import Job, Runtime; launch.PROGRAMS['latents'] = 'a_program'; "
        "launch.LocalLauncher(folder=Path('jobs'), environment=os.environ).run("
        "Job(stage='latents', config={'source': {}, 'encode': {}}, inputs={}, "
        "runtime=Runtime(store='/nowhere')), processes=2)"
    )
    # The launcher that is tested here, wherever it lies, and the program.
    path = os.pathsep.join([str(place.folder), *filter(None, sys.path)])
    environment = {**place.launcher.environment, "PYTHONPATH": path}
    flow = subprocess.Popen([sys.executable, "-c", script], env=environment)
    ranks = place.pids(2)
    flow.kill()
    flow.wait()
    torchrun = kill_torchrun(place)
    while torchrun in pids_marked(str(place.folder).encode()):
        time.sleep(0.02)
    # Each in a session of its own, and without the lock: nothing ended them, nothing keeps others
    # from starting.
    assert set(ranks) <= set(pids_marked(str(place.folder).encode()))
    place.program("")
    deadline = time.monotonic() + 30
    while not begins(place):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert place.survivors() == []


def begins(place: Place) -> bool:
    """Run the program, unless of one that was killed a last thread is still dying with the lock."""
    try:
        place.launcher.run(a_job(), processes=1)
    except StageError as error:
        if "is running already" not in str(error):
            raise
        return False
    return True


class interrupted:
    """Send this process a SIGINT, as Ctrl-C does, once something has happened."""

    def __init__(self, when: Callable[[], list[int]], times: int = 1) -> None:
        self.when = when
        self.times = times
        self.begun: list[int] = []
        self.thread = threading.Thread(target=self._wait)
        self.lock, self.over = threading.Lock(), threading.Event()

    def _wait(self) -> None:
        self.begun.extend(self.when())
        for _ in range(self.times):
            with self.lock:
                # Later, it would interrupt the test run.
                if not self.over.is_set():
                    os.kill(os.getpid(), signal.SIGINT)
            self.over.wait(1)

    def __enter__(self) -> list[int]:
        self.thread.start()
        return self.begun

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.over.set()
        self.thread.join()
