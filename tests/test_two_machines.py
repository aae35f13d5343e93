"""Training across two machines: real agents of torchrun in network namespaces with one link.

As one machine would, bit for bit; and when the link is cut or an agent killed, an end in words, no
process left over, and the same bits after the same command again.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import chain
import machines
import pytest

from eqm import checkpoint
from eqm.config import Job
from eqm.records import Record, to_json
from eqm.stage import job_digest
from eqm.storage import LocalStore

ROOT = Path(__file__).parent.parent

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
PROGRAM = ["-m", "eqm.train"]
BATCH, UPDATES = 32, 300
TIMEOUT_SECONDS = 6
BOUND_SECONDS = 90
"""For the end of everything after a fault: the time-out, the roll call, and the agents' ends."""
MARK = "EQM_TEST_MACHINES"


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    changes = {"train.images": UPDATES * BATCH}
    return chain.build(tmp_path_factory.mktemp("machines") / "store", changes, until="latents")


@pytest.fixture(scope="module")
def expected(latents: chain.Chain, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """What two ranks of one machine make, undisturbed."""
    folder = tmp_path_factory.mktemp("one-machine")
    job = job_in(latents, folder)
    line = [*TORCHRUN, "2", "--standalone", *PROGRAM, written(job, folder)]
    ended = subprocess.run(
        line, env=environment("one"), cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    return sealed(job)


@pytest.fixture(scope="module")
def two() -> Iterator[machines.Machines]:
    with machines.Machines() as made:
        yield made


def job_in(latents: chain.Chain, folder: Path) -> Job:
    store = chain.copied(latents, folder / "store", without=())
    return chain.job(
        latents.config,
        store,
        "train",
        latents.records,
        checkpoint_every_images=20 * BATCH,
        collective_timeout_seconds=TIMEOUT_SECONDS,
    )


def written(job: Job, folder: Path) -> str:
    path = folder / "job.json"
    path.write_text(json.dumps(to_json(job)))
    return str(path)


def environment(mark: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: mark}


def sealed(job: Job) -> Record:
    record = LocalStore(Path(job.runtime.store)).record("train", job_digest(job))
    assert record is not None
    return record


def checkpoints(job: Job) -> int:
    store = LocalStore(Path(job.runtime.store))
    found = checkpoint.newest(store, job_digest(job))
    return 0 if found is None else found.images_seen


class Attempt:
    """The command, started on both machines."""

    def __init__(self, two: machines.Machines, job: Job, folder: Path) -> None:
        self.mark = secrets.token_hex(8)
        self.outputs = [folder / f"{self.mark}-{number}.txt" for number in range(2)]
        there = ["--nnodes", "2", "--master-addr", machines.ADDRESSES[0], "--master-port", "29611"]
        environ = {**environment(self.mark), "GLOO_SOCKET_IFNAME": machines.NAME}
        self.agents = []
        for number, output in enumerate(self.outputs):
            line = [*TORCHRUN, "1", *there, "--node-rank", str(number), *PROGRAM]
            with output.open("w") as file:
                agent = subprocess.Popen(
                    [*two.within(number), *line, written(job, folder)],
                    env=environ,
                    cwd=ROOT,
                    stdout=file,
                    stderr=file,
                )
            self.agents.append(agent)

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in machines.with_mark(f"{MARK}={self.mark}"):
            os.kill(pid, signal.SIGKILL)
        for agent in self.agents:
            agent.wait()

    @property
    def said(self) -> list[str]:
        return [output.read_text() for output in self.outputs]

    def ends(self, seconds: float) -> None:
        """Wait until nothing of it runs any more."""
        until = time.monotonic() + seconds
        for agent in self.agents:
            agent.wait(max(0.1, until - time.monotonic()))
        left = max(5.0, until - time.monotonic())
        assert machines.gone(f"{MARK}={self.mark}", left), "a worker outlived its agent"

    def trains(self, job: Job, beyond: int = 0) -> None:
        """Wait until it has made a checkpoint."""
        until = time.monotonic() + 180
        while checkpoints(job) <= beyond:
            assert time.monotonic() < until, self.said
            assert all(agent.poll() is None for agent in self.agents), self.said
            time.sleep(0.02)


def finish(two: machines.Machines, job: Job, folder: Path) -> Record:
    """The same command again, to the end."""
    with Attempt(two, job, folder) as attempt:
        attempt.ends(240)
        assert [agent.returncode for agent in attempt.agents] == [0, 0], attempt.said
        assert "training goes on from image" in attempt.said[0]
    return sealed(job)


def test_a_cut_network_ends_in_words_and_the_run_goes_on_after_it(
    two: machines.Machines, latents: chain.Chain, expected: Record, tmp_path: Path
) -> None:
    job = job_in(latents, tmp_path)
    with Attempt(two, job, tmp_path) as attempt:
        attempt.trains(job)
        two.cut()
        try:
            attempt.ends(BOUND_SECONDS)
        finally:
            two.join()
        first, second = attempt.said
        assert all(agent.returncode not in (0, None) for agent in attempt.agents)
        assert "error: rank 0 of 2 waited" in first, first
        assert "rank 1 does not answer" in first, first
        assert "error: rank 1 of 2 waited" in second, second
        assert "cannot reach the place where the ranks met" in second, second
        assert "then start the same command again" in first
    assert finish(two, job, tmp_path).content == expected.content


def test_a_killed_agent_leaves_no_worker_and_the_run_goes_on_after_it(
    two: machines.Machines, latents: chain.Chain, expected: Record, tmp_path: Path
) -> None:
    job = job_in(latents, tmp_path)
    with Attempt(two, job, tmp_path) as attempt:
        attempt.trains(job)
        attempt.agents[1].kill()
        attempt.ends(BOUND_SECONDS)
        assert attempt.agents[1].returncode == -signal.SIGKILL
        assert "error: " in attempt.said[0], attempt.said[0]
        assert "start" in attempt.said[0]
    assert finish(two, job, tmp_path).content == expected.content
