"""A real Slurm, where one is installed: what tests/flows/fake_slurm.py stands for is so.

``apt-get install slurmctld slurmd slurm-client munge``, as root; then ``pytest -m slow
tests/flows/test_real_slurm.py``.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import chain
import pytest
from real_slurm import NODES, RealSlurm, missing
from waiting import UPDATES, when

from eqm.config import Job, replace
from eqm.errors import StageError
from eqm.records import Record, to_json
from eqm.stage import job_digest
from eqm.storage import LocalStore
from flows import launch_slurm
from flows.clusters import Nodes, Slurm
from flows.launch import cluster_name, is_sealed
from flows.launch_slurm import SlurmLauncher

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

PROJECT = Path(__file__).parents[2]
SECRET = "a'secret $(touch stolen)"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealSlurm]:
    with RealSlurm(tmp_path_factory.mktemp("slurm") / "two", grace_seconds=60) as started:
        yield started


@dataclass
class Place:
    """A store with latents on a cluster of two nodes, and a launcher."""

    folder: Path
    slurm: RealSlurm
    store: LocalStore
    launcher: SlurmLauncher
    job: Job
    said: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return cluster_name(self.job)

    def file(self, kind: str) -> Path:
        return self.folder / "jobs" / f"{self.name}.{kind}"

    def log(self) -> str:
        return self.file("log").read_text()

    def record(self) -> Record | None:
        return self.store.record("train", job_digest(self.job))

    def has_checkpoint(self) -> bool:
        keys = self.store.list(f"train/{job_digest(self.job)}/checkpoints/")
        return any(key.endswith(".json") for key in keys)

    def is_said(self, *words: str) -> bool:
        return any(all(word in line for word in words) for line in self.said)

    def is_running(self) -> bool:
        return self.is_said("is RUNNING")

    def number(self) -> str:
        """Of its last job, as Slurm knows it."""
        asked = ("--noheader", "--states=all", f"--name={self.name}", "--format=%i")
        return max(self.slurm.ask("squeue", *asked).split(), key=int)

    def shown(self, key: str) -> str:
        told = self.slurm.ask("scontrol", "show", "job", "--oneliner", self.number())
        (value,) = re.findall(rf"\b{key}=(\S+)", told)
        return value

    def longer(self, times: int) -> None:
        """A run that is still there when something is done to it."""
        train = {**self.job.config["train"], "images": times * UPDATES["train.images"]}
        self.job = replace(self.job, config={**self.job.config, "train": train})


@pytest.fixture
def place(
    slurm: RealSlurm, latents: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    with placed(slurm, latents, tmp_path, monkeypatch) as here:
        yield here


@contextlib.contextmanager
def placed(
    slurm: RealSlurm, latents: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    monkeypatch.setattr(launch_slurm, "POLL_SECONDS", 0.5)
    monkeypatch.setenv("PATH", f"{slurm.bin}:{os.environ['PATH']}")
    store = chain.copied(latents, tmp_path / "store", without=())
    job = chain.job(latents.config, store, "train", latents.records, checkpoint_every_images=64)
    said: list[str] = []
    environment = {"PYTHONPATH": str(PROJECT), "AWS_SECRET_ACCESS_KEY": SECRET}
    nodes = Nodes(processes=1, gpus=0, cpus=1, memory_gib=2)
    cluster = Slurm(nodes=nodes, folder=tmp_path / "jobs", partition="long")
    launcher = SlurmLauncher(cluster, environment=environment, say=said.append)
    yield Place(tmp_path, slurm, store, launcher, job, said)
    subprocess.run(["scancel", "--me", "--full", "--signal=KILL"], check=False)
    subprocess.run(["scancel", "--me"], check=False)
    slurm.wait_for_nodes()


def test_a_job_runs_and_seals_its_record(place: Place, expected: Record) -> None:
    place.launcher.run(place.job)
    record = place.record()
    assert record is not None, place.log()
    assert record.content == expected.content
    assert place.is_running()
    assert place.said[-1].endswith("is COMPLETED")
    # Neither files nor the controller's spool keep a secret.
    assert not place.file("env").exists()
    for file in place.slurm.folder.rglob("*"):
        if file.is_file():
            assert b"a'secret" not in file.read_bytes(), file


def test_two_nodes_train_together(place: Place) -> None:
    place.launcher.run(place.job, processes=2)
    record = place.record()
    assert record is not None
    assert record.provenance["world_size"] == 2
    assert place.shown("NodeList") == "n[1-2]"


def test_processes_have_the_gpus_and_cores_of_their_node(place: Place) -> None:
    nodes = Nodes(processes=2, gpus=1, cpus=2, memory_gib=2)
    place.launcher.cluster = replace(place.launcher.cluster, nodes=nodes)
    place.longer(10)
    given: list[dict[str, str]] = []
    looks = when(place.has_checkpoint, lambda: given.extend(ranks_of(place.number())))
    place.launcher.run(place.job, processes=4)
    looks.join()
    assert is_sealed(place.job)
    assert len(given) == 4
    assert {one["CUDA_VISIBLE_DEVICES"] for one in given} == {"0,1"}
    assert {one["SLURM_CPUS_PER_TASK"] for one in given} == {"4"}


def ranks_of(number: str) -> list[dict[str, str]]:
    """The environments of the ranks of a job."""
    found: list[dict[str, str]] = []
    for process in Path("/proc").glob("[1-9]*"):
        with contextlib.suppress(OSError):
            line = (process / "cmdline").read_text().replace("\0", " ")
            words = (process / "environ").read_text().split("\0")
            pairs = dict(word.partition("=")[::2] for word in words)
            if "-m eqm.train" in line and "RANK" in pairs and pairs.get("SLURM_JOB_ID") == number:
                found.append(pairs)
    return found


def test_a_requeued_job_ends_in_the_same_bits(place: Place, expected: Record) -> None:
    requeues = when(
        lambda: place.is_running() and place.has_checkpoint(),
        lambda: place.slurm.ask("scontrol", "requeue", place.number()),
    )
    place.launcher.run(place.job)
    requeues.join()
    assert place.shown("Restarts") == "1"
    assert place.record().content == expected.content  # type: ignore[union-attr]


def test_a_preempted_job_makes_a_checkpoint_in_its_grace_time_and_comes_back(place: Place) -> None:
    place.longer(20)

    def preempts() -> None:
        line = ["--partition=first", "--nodes=2", "--exclusive", "--output=/dev/null"]
        place.slurm.ask("sbatch", "--parsable", *line, "--wrap=sleep 5")

    first = when(lambda: place.is_running() and place.has_checkpoint(), preempts)
    place.launcher.run(place.job, processes=2)
    first.join()
    # Since 24.05 it is put back once more, and is not waited for.
    assert place.shown("Restarts") in ("1", "2"), place.log()
    assert "with a checkpoint there" in place.log()
    assert is_sealed(place.job)


def test_a_job_out_of_time_makes_a_checkpoint_and_requeues_itself(place: Place) -> None:
    place.longer(200)
    place.launcher.cluster = replace(place.launcher.cluster, time="3")

    def stops() -> None:
        deadline = time.monotonic() + 240
        while place.shown("Restarts") != "1" and time.monotonic() < deadline:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

    comes_back = when(place.is_running, stops)
    with pytest.raises(KeyboardInterrupt):
        place.launcher.run(place.job, processes=2)
    comes_back.join()
    assert place.shown("Restarts") == "1"
    assert "with a checkpoint there" in place.log()


def test_a_job_whose_node_dies_comes_back_on_another(place: Place) -> None:
    dead: list[str] = []

    def dies() -> None:
        dead.append(place.shown("BatchHost"))
        place.slurm.power_off(NODES.index(dead[0]))

    died = when(lambda: place.is_running() and place.has_checkpoint(), dies)
    place.longer(4)
    try:
        place.launcher.run(place.job)
        died.join()
        assert place.shown("Restarts") == "1"
        assert place.shown("BatchHost") not in dead
    finally:
        died.join()
        place.slurm.node(NODES.index(dead[0]))
    assert is_sealed(place.job)


def test_a_controller_that_is_away_is_waited_for(place: Place) -> None:
    def away() -> None:
        place.slurm.kill("slurmctld")
        time.sleep(15)
        place.slurm.controller()

    gone = when(lambda: place.is_running() and place.has_checkpoint(), away)
    place.longer(4)
    place.launcher.run(place.job)
    gone.join()
    assert is_sealed(place.job)
    # Also at the start.
    place.slurm.kill("slurmctld")
    place.longer(1)
    train = {**place.job.config["train"], "seed": 7}
    place.job = replace(place.job, config={**place.job.config, "train": train})
    back = when(lambda: place.is_said("waiting for Slurm"), place.slurm.controller)
    place.launcher.run(place.job)
    back.join()
    assert is_sealed(place.job)


FLOW = """
import json, sys
from pathlib import Path
from eqm.config import Job
from eqm.records import from_json
from flows.clusters import Nodes, Slurm
from flows.launch_slurm import SlurmLauncher
job = from_json(Job, json.loads(Path(sys.argv[1]).read_text()))
cluster = Slurm(nodes=Nodes(processes=1, gpus=0, cpus=1, memory_gib=2), folder=Path(sys.argv[2]))
SlurmLauncher(cluster, environment={}, say=print).run(job)
"""


def test_a_flow_that_is_killed_leaves_its_job_to_the_next(place: Place) -> None:
    place.longer(10)
    (place.folder / "flow.py").write_text(FLOW)
    job = place.folder / "job.json"
    job.write_text(json.dumps(to_json(place.job)))
    line = [sys.executable, str(place.folder / "flow.py"), str(job), str(place.folder / "jobs")]
    flow = subprocess.Popen(line, env={**os.environ, "PYTHONPATH": str(PROJECT)})
    when(lambda: place.has_checkpoint(), flow.kill).join()
    flow.wait()
    first = place.number()
    place.launcher.run(place.job)
    assert place.is_said(f"is job {first} of Slurm already, waiting for it")
    assert place.number() == first
    assert is_sealed(place.job)


def test_an_interrupt_cancels_the_job_after_a_checkpoint(place: Place) -> None:
    place.longer(20)
    interrupts = when(
        lambda: place.is_running() and place.has_checkpoint(),
        lambda: os.kill(os.getpid(), signal.SIGINT),
    )
    with pytest.raises(KeyboardInterrupt):
        place.launcher.run(place.job, processes=2)
    interrupts.join()
    assert place.shown("JobState") == "CANCELLED"
    assert "with a checkpoint there" in place.log()
    assert not place.file("env").exists()


def test_a_job_that_somebody_cancels_is_told(place: Place) -> None:
    place.longer(20)
    cancels = when(
        lambda: place.is_running() and place.has_checkpoint(),
        lambda: place.slurm.ask("scancel", place.number()),
    )
    with pytest.raises(StageError, match=r"was cancelled: run it again .* \(stopped at image "):
        place.launcher.run(place.job)
    cancels.join()
    assert place.shown("Restarts") == "0"


def test_the_message_of_the_program_is_the_message(place: Place) -> None:
    (place.store.root / "latents").rename(place.store.root / "elsewhere")
    with pytest.raises(StageError, match=rf"^{place.name}: latents .* is not sealed in .*: run th"):
        place.launcher.run(place.job, processes=2)


def test_memory_that_is_used_up_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_MEM_PER_NODE", "200M")
    nodes = replace(place.launcher.cluster.nodes, memory_gib=None)
    place.launcher.cluster = replace(place.launcher.cluster, nodes=nodes)
    with pytest.raises(StageError, match="EQM_PROCESS_MEMORY"):
        place.launcher.run(place.job)


def test_a_partition_that_is_not_there_is_told(place: Place) -> None:
    place.launcher.cluster = replace(place.launcher.cluster, partition="nowhere")
    with pytest.raises(StageError, match=r"sbatch refused .*invalid partition"):
        place.launcher.run(place.job)
    assert not place.file("env").exists()


def test_why_a_job_waits_is_told(place: Place) -> None:
    place.launcher.cluster = replace(place.launcher.cluster, partition="short", time="1-00:00:00")
    words = "(PartitionTimeLimit), EQM_SLURM_TIME is longer than the partition allows"
    ends = when(lambda: place.is_said(words), lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        place.launcher.run(place.job)
    ends.join()
    assert place.shown("JobState") == "CANCELLED"
    assert not place.file("env").exists()


def test_a_job_that_slurm_has_forgotten_is_known_by_what_it_left(
    latents: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = "MinJobAge=2"
    with (
        RealSlurm(tmp_path / "two", more=more) as forgets,
        placed(forgets, latents, tmp_path, monkeypatch) as place,
    ):
        ask = launch_slurm._ask

        def forgotten(program: str, *words: str) -> str:
            """The first look is long after its end."""
            if "--format=%T %r" in words and not place.is_said("is GONE"):
                number = words[2].removeprefix("--jobs=")
                known = ("squeue", "--noheader", "--states=all", f"--jobs={number}")
                while not is_unknown(known):
                    time.sleep(1)
            return ask(program, *words)

        monkeypatch.setattr(launch_slurm, "_ask", forgotten)
        place.launcher.run(place.job)
        assert place.is_said("is GONE")
        assert is_sealed(place.job)
        place.said.clear()
        (place.store.root / "latents").rename(place.store.root / "elsewhere")
        place.longer(2)
        with pytest.raises(StageError, match=rf"^{place.name}: latents .* is not sealed in"):
            place.launcher.run(place.job)
        assert place.is_said("is GONE")


def is_unknown(line: Sequence[str]) -> bool:
    told = subprocess.run(line, capture_output=True, text=True, check=False)
    return "Invalid job id" in told.stderr
