"""Jobs of a Slurm that really starts them: a stage trains to its sealed record, whatever comes."""

import contextlib
import json
import os
import random
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chain
import fake_slurm
import pytest
from waiting import UPDATES, wait_for, when

import infra
from eqm.config import Job, replace
from eqm.disk import locked
from eqm.errors import AwayError, ConfigError, StageError
from eqm.records import Record
from eqm.stage import AWAY, job_digest
from eqm.storage import LocalStore
from flows import launch_slurm
from flows.clusters import Nodes, Slurm
from flows.jobs import Plan, ensure
from flows.launch import cluster_name, is_sealed
from flows.launch_slurm import SlurmLauncher
from flows.settings import Settings

pytestmark = pytest.mark.timeout(180)

PROJECT = Path(__file__).parents[2]
SECRET = "a'secret $(touch stolen)"


@dataclass
class Place:
    """A Slurm, a store with latents, and a launcher."""

    folder: Path
    store: LocalStore
    launcher: SlurmLauncher
    job: Job
    said: list[str] = field(default_factory=list)
    number: int = 0
    """Of the first job."""

    @property
    def state(self) -> Path:
        return self.folder / "bin" / "state"

    @property
    def name(self) -> str:
        return cluster_name(self.job)

    def submissions(self) -> int:
        file = self.state / "submissions"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def slurm(self) -> dict[str, Any]:
        return json.loads((self.state / f"{self.number}.json").read_text())

    def file(self, kind: str) -> Path:
        return self.folder / "jobs" / f"{self.name}.{kind}"

    def record(self) -> Record | None:
        return self.store.record("train", job_digest(self.job))

    def when(self, true: Callable[[], Any], then: Callable[[], Any]) -> threading.Thread:
        """Do something beside the launcher as soon as something is true."""

        return when(true, then)

    def has_checkpoint(self) -> bool:
        keys = self.store.list(f"train/{job_digest(self.job)}/checkpoints/")
        return any(key.endswith(".json") for key in keys)

    def is_running(self) -> bool:
        return self.submissions() == 1 and self.slurm()["state"] == "RUNNING"

    def has_step(self) -> bool:
        return bool(list(self.state.glob("*.steps")))


@pytest.fixture
def place(latents: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(launch_slurm, "POLL_SECONDS", 0.1)
    first = random.randrange(10**5, 10**6)
    fake_slurm.install(tmp_path / "bin", first)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    store = chain.copied(latents, tmp_path / "store", without=())
    job = chain.job(latents.config, store, "train", latents.records, checkpoint_every_images=64)
    said: list[str] = []
    environment = {
        "PYTHONPATH": str(PROJECT),
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "LOCAL_ONLY": "stays here",
    }
    cluster = Slurm(nodes=Nodes(processes=1, gpus=0), folder=tmp_path / "jobs", partition="long")
    launcher = SlurmLauncher(cluster, environment=environment, say=said.append)
    here = Place(tmp_path, store, launcher, job, said, first)
    yield here
    for file in here.state.glob("*.json"):
        # One that has ended is none to cancel; what counts is that it has.
        subprocess.run(["scancel", file.stem], check=False)
        wait_for(lambda file=file: json.loads(file.read_text())["state"] in fake_slurm.ENDED)


# -- to the sealed record -----------------------------------------------------------------------


def test_a_job_waits_runs_and_seals_its_record(place: Place, expected: Record) -> None:
    (place.state / "hold").touch()
    waiting = place.when(
        lambda: any("PENDING" in line for line in place.said), (place.state / "hold").unlink
    )
    seen: list[int] = []
    place.when(place.is_running, lambda: seen.append(place.file("env").stat().st_mode))
    settings = Settings(home=place.folder, store=place.store.uri)
    plan = Plan(chain.tiniest(UPDATES), settings, place.store, place.launcher)
    record = ensure(plan, place.job, say=lambda _: None)
    waiting.join()
    assert record.content == expected.content
    # The same flow again starts nothing.
    assert ensure(plan, place.job, say=lambda _: None) == record
    assert place.submissions() == 1
    assert place.slurm()["states"] == ["PENDING", "RUNNING", "COMPLETED"]
    assert place.said[1:] == [
        f"{place.name}: job {place.number} is PENDING, waiting in the queue",
        f"{place.name}: job {place.number} is RUNNING",
        f"{place.name}: job {place.number} is COMPLETED",
    ]
    # Secrets were in a file of their owner alone, came through whole, and are gone.
    assert [stat.S_IMODE(mode) for mode in seen] == [0o600]
    assert not place.file("env").exists()
    for file in [*place.state.iterdir(), *(place.folder / "jobs").iterdir()]:
        assert "a'secret" not in file.read_text(), file
    assert not list(place.folder.rglob("stolen"))


@pytest.mark.slow
def test_two_nodes_train_together(place: Place) -> None:
    place.launcher.run(place.job, processes=2)
    record = place.record()
    assert record is not None
    assert record.provenance["world_size"] == 2
    assert place.slurm()["options"]["nodes"] == "2"


def test_a_preempted_job_comes_back_and_ends_in_the_same_bits(
    place: Place, expected: Record
) -> None:
    preempts = place.when(place.has_checkpoint, (place.state / f"{place.number}.preempt").touch)
    place.launcher.run(place.job)
    preempts.join()
    assert place.slurm()["states"].count("RUNNING") == 2
    record = place.record()
    assert record is not None
    assert record.content == expected.content
    assert place.submissions() == 1


@pytest.mark.parametrize(
    ("version", "mode", "ends"),
    [
        ("22.05.8", "requeues", ("COMPLETED",)),
        # It is put back once more, has nothing to do, and is not waited for.
        ("24.11.5", "requeues", ("COMPLETED", "CANCELLED")),
        ("24.11.5", "cancels", ("PREEMPTED",)),
    ],
)
def test_a_job_that_leaves_in_its_time_of_grace_comes_back(
    place: Place, expected: Record, version: str, mode: str, ends: tuple[str, ...]
) -> None:
    (place.state / "version").write_text(version)
    (place.state / mode).touch()
    preempts = place.when(place.has_checkpoint, (place.state / f"{place.number}.grace").touch)
    place.launcher.run(place.job)
    preempts.join()
    assert place.record().content == expected.content  # type: ignore[union-attr]
    assert place.submissions() == 1
    wait_for(lambda: place.slurm()["state"] in fake_slurm.ENDED)
    assert place.slurm()["states"][-1] in ends
    assert place.slurm()["states"].count("RUNNING") >= 2
    assert not place.file("env").exists()


@pytest.mark.slow
def test_a_job_out_of_time_makes_a_checkpoint_and_requeues_itself(
    place: Place, expected: Record
) -> None:
    late = place.when(place.has_checkpoint, (place.state / f"{place.number}.timeout").touch)
    place.launcher.run(place.job)
    late.join()
    assert place.slurm()["states"].count("RUNNING") == 2
    assert "with a checkpoint there" in place.file("log").read_text()
    assert place.record().content == expected.content  # type: ignore[union-attr]
    assert not place.file("error").exists()


def test_a_job_that_comes_back_after_its_record_is_sealed_is_not_waited_for(place: Place) -> None:
    # As Slurm does since 24.05 of a job that did not leave in its time of grace.
    (place.state / f"{place.number}.again").touch()
    place.when(place.has_step, (place.state / "hold").touch)
    place.launcher.run(place.job)
    assert place.slurm()["states"][-2:] == ["PENDING", "CANCELLED"]
    assert is_sealed(place.job)
    assert not place.file("env").exists()


def test_a_job_that_has_ended_well_does_nothing_when_it_is_started_again(place: Place) -> None:
    (place.state / f"{place.number}.again").touch()
    number = place.launcher._started(place.job, place.name, 1)
    wait_for(lambda: launch_slurm._state(number)[0] in fake_slurm.ENDED)
    assert place.slurm()["states"].count("RUNNING") == 2
    assert place.slurm()["states"][-1] == "COMPLETED"
    assert not place.file("error").exists()
    # What is not its own end says nothing of the next job of its name.
    place.launcher._write(place.job, place.name, 1)
    assert not place.file("done").exists()


@pytest.mark.slow
def test_a_job_that_is_there_is_waited_for(place: Place) -> None:
    (place.state / "hold").touch()
    with ThreadPoolExecutor() as beside:
        first = beside.submit(place.launcher.run, place.job)
        wait_for(lambda: place.submissions() == 1)
        second = beside.submit(place.launcher.run, place.job)
        wait_for(
            lambda: any(f"is job {place.number} of Slurm already" in line for line in place.said)
        )
        (place.state / "hold").unlink()
        first.result(120)
        second.result(120)
    assert place.submissions() == 1
    assert is_sealed(place.job)


@pytest.mark.slow
def test_the_record_decides_where_nobody_knows_the_job(place: Place) -> None:
    (place.state / "purge").touch()
    (place.state / "no-accounts").touch()
    place.launcher.run(place.job)
    assert is_sealed(place.job)


def port_of(number: int) -> int:
    """Where ranks of a job meet on this machine, as the script of the job decides it."""
    script = (Path(infra.__file__).parent / "slurm" / "job.sh").read_text()
    (lines,) = re.findall(r"^port=.*?^' \"\$SLURM_JOB_ID\"\)$", script, re.MULTILINE | re.DOTALL)
    lines = lines.replace("@PYTHON@", shlex.quote(sys.executable))
    told = subprocess.run(
        ["bash", "-c", f"{lines}\necho $port"],
        env={**os.environ, "SLURM_JOB_ID": str(number)},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(told.stdout)


@pytest.mark.parametrize("number", [0, 11_999, 18_938, 458_938, 2**31 - 1])
def test_ranks_meet_at_a_port_that_linux_gives_to_nobody(number: int) -> None:
    assert 20_000 <= port_of(number) < 32_768


@pytest.mark.parametrize("host", ["", "127.0.0.1"])
def test_ranks_do_not_meet_where_something_else_listens(host: str) -> None:
    number = random.randrange(10**5, 10**6)
    port = port_of(number)
    with socket.create_server((host, port)):
        other = port_of(number)
    assert other != port
    assert 20_000 <= other < 32_768


def test_a_job_whose_port_is_taken_trains_all_the_same(place: Place) -> None:
    with socket.create_server(("", port_of(place.number))):
        place.launcher.run(place.job)
    assert is_sealed(place.job)
    assert "address already in use" not in place.file("log").read_text().lower()


@pytest.mark.slow
def test_a_controller_that_is_away_for_a_while_is_waited_for(place: Place) -> None:
    place.when(place.is_running, (place.state / "down").touch)
    # However it ends: one that failed would otherwise be waited for in silence.
    back = place.when(
        lambda: place.submissions() and place.slurm()["state"] not in ("PENDING", "RUNNING"),
        (place.state / "down").unlink,
    )
    place.launcher.run(place.job)
    back.join()
    assert is_sealed(place.job)


def test_why_a_job_waits_is_said_once(place: Place) -> None:
    (place.state / "hold").touch()
    (place.state / "reason").write_text("Priority")

    def said(word: str) -> bool:
        return any(word in line for line in place.said)

    def goes_on() -> None:
        for reason in ("PartitionTimeLimit", "Priority", "QOSMaxGRESPerUser"):
            (place.state / "new").write_text(reason)
            (place.state / "new").replace(place.state / "reason")
            wait_for(lambda reason=reason: said(reason))
            time.sleep(0.3)
        (place.state / "hold").unlink()

    waiting = place.when(lambda: said("(Priority)"), goes_on)
    place.launcher.run(place.job)
    waiting.join()
    job = f"{place.name}: job {place.number} is"
    assert [line for line in place.said if "PENDING" in line] == [
        f"{job} PENDING (Priority), waiting in the queue",
        f"{job} PENDING (PartitionTimeLimit), EQM_SLURM_TIME is longer than the partition allows",
        f"{job} PENDING (QOSMaxGRESPerUser), a limit of your account or QOS",
    ]


def test_a_reason_is_said_once_whatever_nodes_it_names(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = "ReqNodeNotAvail, UnavailableNodes:"
    held = "job requeued in held state"
    reasons = ["", f"{nodes}n1", "Priority", f"{nodes}n[1-2]", "Priority", held]
    looks = iter([*(("PENDING", reason) for reason in reasons), ("COMPLETED", "")])
    monkeypatch.setattr(launch_slurm, "_state", lambda _: next(looks))
    monkeypatch.setattr(launch_slurm, "POLL_SECONDS", 0.0)
    assert place.launcher._watch(place.job, "7", "NAME") == "COMPLETED"
    assert [line.removeprefix("NAME: job 7 is ") for line in place.said] == [
        "PENDING, waiting in the queue",
        f"PENDING ({nodes}n1), nodes are down or reserved: a shorter EQM_SLURM_TIME may fit in "
        "before",
        "PENDING (Priority), waiting in the queue",
        f"PENDING ({held}), it was requeued and held; `scontrol release 7` lets it go on",
        "COMPLETED",
    ]


@pytest.mark.parametrize(
    ("reason", "hint"),
    [
        ("MaxGRESPerAccount", "a limit of your account or QOS"),
        ("AssocGrpGRES", "a limit of your account or QOS"),
        ("MaxMemPerLimit", "EQM_PROCESS_MEMORY is more than the site gives"),
        ("InvalidAccount", "Slurm does not know EQM_SLURM_ACCOUNT"),
        ("QOSNotAllowed", "the account or the partition does not allow SBATCH_QOS"),
        (
            "launch failed requeued held",
            "it could not be started; `scontrol release 7` lets it go on",
        ),
        # It passes by itself.
        ("Nodes required for job are DOWN, DRAINED or reserved", "waiting in the queue"),
    ],
)
def test_what_keeps_a_job_waiting_has_a_hint(reason: str, hint: str) -> None:
    assert launch_slurm._in_words("PENDING", reason, "7") == f"PENDING ({reason}), {hint}"


@pytest.mark.parametrize(
    ("said", "away"),
    [
        ("Unable to contact slurm controller (connect failure)", True),
        ("Socket timed out on send/recv operation", True),
        ("Connection timed out establishing", True),
        ("Communication connection failure", True),
        ("Message receive failure", True),
        ("Rate limit exceeded, please retry momentarily", True),
        ("Slurm backup controller in standby mode", True),
        ("Invalid partition name specified", False),
        ("Invalid job id specified", False),
        ("Requested time limit is invalid (missing or exceeds some limit)", False),
        ("Requested operation is presently disabled", False),
    ],
)
def test_a_controller_that_is_away_is_told_from_one_that_refuses(
    said: str, away: bool, place: Place
) -> None:
    (place.state / "sbatch.says").write_text(said)
    place.launcher.cluster.folder.mkdir()
    place.file("sh").write_text("")
    with pytest.raises(StageError, match=re.escape(said)) as caught:
        launch_slurm._ask("sbatch", "--parsable", str(place.file("sh")))
    assert isinstance(caught.value, launch_slurm._AwayError) == away


def test_a_job_whose_submission_had_no_answer_is_found_and_has_its_secrets(place: Place) -> None:
    (place.state / "sbatch.lost").touch()
    place.launcher.run(place.job)
    assert place.submissions() == 1
    assert is_sealed(place.job)


def test_a_job_that_ended_before_it_was_looked_for_is_not_submitted_twice(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = launch_slurm._ask

    def late(program: str, *words: str) -> str:
        try:
            return ask(program, *words)
        finally:
            if program == "sbatch":
                wait_for(lambda: place.slurm()["state"] in fake_slurm.ENDED)

    monkeypatch.setattr(launch_slurm, "_ask", late)
    (place.state / "sbatch.lost").touch()
    (place.store.root / "latents").rename(place.store.root / "elsewhere")
    with pytest.raises(StageError, match=rf"^{place.name}: latents .* is not sealed"):
        place.launcher.run(place.job)
    assert place.submissions() == 1


def test_a_job_is_taken_whatever_sbatch_says_of_it(place: Place) -> None:
    (place.state / "hold").touch()
    (place.state / "sbatch.lost").write_text("Unspecified error")
    assert place.launcher._started(place.job, place.name, 1) == str(place.number)
    assert place.submissions() == 1
    assert place.file("env").exists()


def test_no_credentials_stay_of_a_job_that_is_certain_not_to_be_there(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_slurm, "PATIENCE_SECONDS", 0.1)
    (place.state / "sbatch.says").write_text("Socket timed out on send/recv operation")
    with pytest.raises(StageError, match=r"sbatch refused .*Socket timed out"):
        place.launcher.run(place.job)
    assert place.submissions() == 0
    assert not place.file("env").exists()


def test_a_cancelled_flow_leaves_no_credentials_of_a_job_whose_number_it_does_not_know(
    place: Place,
) -> None:
    (place.state / "hold").touch()
    place.launcher._started(place.job, place.name, 1)
    place.launcher._cancel(place.name, None)
    assert place.slurm()["state"] == "CANCELLED"
    assert not place.file("env").exists()


def test_a_flow_that_cannot_cancel_says_so_and_keeps_what_the_job_needs(place: Place) -> None:
    (place.state / "hold").touch()
    number = place.launcher._started(place.job, place.name, 1)
    (place.state / "down").touch()
    place.launcher._cancel(place.name, number)
    (place.state / "down").unlink()
    assert place.file("env").exists()
    assert f"{place.name}: may go on, it could not be cancelled: squeue refused" in place.said[-1]


def test_who_watched_a_job_leaves_the_next_one_its_credentials(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.state / "hold").touch()
    before = place.launcher._started(place.job, place.name, 1)
    subprocess.run(["scancel", before], check=True)
    wait_for(lambda: launch_slurm._state(before)[0] == "CANCELLED")
    place.launcher._started(place.job, place.name, 1)
    late = SlurmLauncher(place.launcher.cluster, environment={}, say=place.said.append)
    monkeypatch.setattr(late, "_started", lambda *_: before)
    with pytest.raises(StageError, match="was cancelled"):
        late.run(place.job)
    assert place.file("env").exists()
    (place.state / "hold").unlink()
    place.launcher.run(place.job)
    assert place.submissions() == 2
    assert is_sealed(place.job)


def test_the_credentials_of_a_flow_that_is_at_its_start_are_its_own(place: Place) -> None:
    place.launcher.cluster.folder.mkdir()
    place.file("env").touch()
    with locked(place.file("lock")):
        place.launcher._forget(place.name)
        assert place.file("env").exists()
    (place.state / "down").touch()
    place.launcher._forget(place.name)
    assert place.file("env").exists()
    assert "with its credentials is kept, as another job may need it" in place.said[-1]
    (place.state / "down").unlink()
    place.launcher._forget(place.name)
    assert not place.file("env").exists()


@pytest.mark.slow
def test_a_controller_that_is_away_at_the_start_is_waited_for(place: Place) -> None:
    (place.state / "down").touch()
    (place.state / "sbatch.away").touch()
    back = place.when(
        lambda: any("waiting for Slurm" in line for line in place.said),
        (place.state / "down").unlink,
    )
    place.launcher.run(place.job)
    back.join()
    assert place.submissions() == 1
    assert is_sealed(place.job)


@pytest.mark.slow
def test_a_controller_that_stays_away_leaves_what_may_have_been_submitted(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_slurm, "PATIENCE_SECONDS", 1.0)
    (place.state / "hold").touch()
    (place.state / "sbatch.lost").touch()
    away = place.when(lambda: place.submissions() == 1, (place.state / "down").touch)
    kept = rf"submitted is not known, so {place.file('env')} with its credentials is kept: run it"
    with pytest.raises(StageError, match=kept):
        place.launcher.run(place.job)
    away.join()
    assert place.file("env").exists()
    (place.state / "down").unlink()
    (place.state / "hold").unlink()
    place.launcher.run(place.job)
    assert place.submissions() == 1
    assert is_sealed(place.job)


@pytest.mark.parametrize(
    ("looks", "there"),
    [(["7 COMPLETING", "7 COMPLETING", ""], None), (["7 COMPLETING", "7 PENDING"], "7")],
)
def test_an_ending_job_is_not_there_unless_it_comes_back(
    looks: list[str], there: str | None, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter(looks)
    monkeypatch.setattr(launch_slurm, "_ask", lambda *_: next(told))
    monkeypatch.setattr(launch_slurm, "POLL_SECONDS", 0.0)
    assert place.launcher._there(place.job, place.name) == there
    assert not list(told)


@pytest.mark.slow
def test_a_job_that_is_ending_is_waited_out(place: Place) -> None:
    # Of a flow that was cancelled, and killed before it had seen the end.
    with ThreadPoolExecutor() as beside:
        first = beside.submit(place.launcher.run, place.job)
        wait_for(place.has_step)
        wait_for(place.has_checkpoint)
        (place.state / f"{place.number}.cancel").touch()
        wait_for(lambda: place.slurm()["state"] in ("COMPLETING", "CANCELLED"))
        place.launcher.run(place.job)
        with contextlib.suppress(StageError):
            first.result(120)
    assert is_sealed(place.job)
    assert not any("already, waiting" in line for line in place.said)


def test_no_credentials_stay_where_the_flow_was_killed(place: Place) -> None:
    number = place.launcher._started(place.job, place.name, 1)
    wait_for(lambda: launch_slurm._state(number)[0] == "COMPLETED")
    assert is_sealed(place.job)
    assert not place.file("env").exists()
    # Nothing starts without them: a run that could reach nothing would say so in other words.
    subprocess.run(["sbatch", "--parsable", str(place.file("sh"))], check=True)
    wait_for(lambda: launch_slurm._state(str(place.number + 1))[0] == "FAILED")
    assert "env is gone, and credentials with it: run the flow" in place.file("error").read_text()


# -- failure and cancellation, in words ---------------------------------------------------------


def test_the_message_of_the_program_is_the_message(place: Place) -> None:
    record = place.store.root / "latents"
    record.rename(place.store.root / "elsewhere")
    with pytest.raises(StageError, match=rf"^{place.name}: latents .* is not sealed in .*: run th"):
        place.launcher.run(place.job)
    # The queue has forgotten it; the accounts have not.
    (place.state / "purge").touch()
    assert launch_slurm._state(str(place.number)) == ("FAILED", "")


def test_the_message_of_a_program_outlives_what_slurm_knows_of_its_job(place: Place) -> None:
    (place.state / "purge").touch()
    (place.state / "no-accounts").touch()
    (place.store.root / "latents").rename(place.store.root / "elsewhere")
    with pytest.raises(StageError, match=rf"^{place.name}: latents .* is not sealed in .*: run th"):
        place.launcher.run(place.job)


def test_what_is_killed_for_its_memory_is_told_so(place: Place) -> None:
    # Slurm's own words are in the log; ranks that lost another have theirs in the error file.
    words = "slurmstepd-n1: error: Detected 1 oom-kill event(s) in StepId=7.0."
    script = place.launcher.script(place.job, 1)
    place.launcher.cluster.folder.mkdir()
    log, error = place.file("log"), place.file("error")
    srun = place.folder / "bin" / "srun"
    srun.write_text(f"#!/bin/sh\necho 'rank 1 is gone' >{error}\necho '{words}'\nexit 1\n")
    place.file("env").touch()
    environ = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    with log.open("w") as output:
        output.write("of a start before\n")
        output.flush()
        ended = subprocess.run(["bash", "-c", script], env=environ, stdout=output, check=False)
    assert ended.returncode == 1
    assert "more memory than it may have: raise EQM_PROCESS_MEMORY" in error.read_text()
    # What an earlier start was killed for is not what ends this one.
    srun.write_text(f"#!/bin/sh\necho 'rank 1 is gone' >{error}\nexit 1\n")
    with log.open("a") as output:
        subprocess.run(["bash", "-c", script], env=environ, stdout=output, check=False)
    assert error.read_text() == "rank 1 is gone\n"


def test_a_program_whose_store_was_away_may_be_tried_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place.launcher, "_started", lambda *_: "7")
    monkeypatch.setattr(place.launcher, "_watch", lambda *_: "FAILED")
    place.file("error").parent.mkdir(parents=True, exist_ok=True)
    place.file("error").write_text(f"S3 is gone{AWAY}")
    with pytest.raises(AwayError, match=rf"^{place.name}: S3 is gone"):
        place.launcher.run(place.job)


def test_a_lost_node_is_told(place: Place) -> None:
    loses = place.when(place.has_step, (place.state / f"{place.number}.lose").touch)
    with pytest.raises(StageError, match="lost its node and was not put back into the queue"):
        place.launcher.run(place.job)
    loses.join()


def test_a_job_that_somebody_cancels_is_told(place: Place) -> None:
    # Long enough to be still there when it is cancelled, on a machine that does much else.
    train = {**place.job.config["train"], "images": 10 * UPDATES["train.images"]}
    place.job = replace(place.job, config={**place.job.config, "train": train})
    cancels = place.when(place.has_checkpoint, (place.state / f"{place.number}.cancel").touch)
    with pytest.raises(StageError, match=r"was cancelled: run it again .* \(stopped at image "):
        place.launcher.run(place.job)
    cancels.join()
    # Its script was told to end as well, and did not requeue it.
    assert place.slurm()["states"].count("RUNNING") == 1


def test_an_interrupt_cancels_the_job(place: Place) -> None:
    interrupts = place.when(place.has_step, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        place.launcher.run(place.job)
    interrupts.join()
    assert place.slurm()["state"] == "CANCELLED"
    assert not place.file("env").exists()


def test_a_requeue_that_is_refused_is_a_failure(place: Place) -> None:
    (place.state / "no-requeue").touch()
    late = place.when(place.has_checkpoint, (place.state / f"{place.number}.timeout").touch)
    with pytest.raises(StageError, match="\nSlurm did not requeue the job: run it again to go on"):
        place.launcher.run(place.job)
    late.join()
    assert not place.file("env").exists()


def test_a_flow_that_is_moved_leaves_its_job_to_the_next(place: Place) -> None:
    place.launcher.leaves = lambda error: isinstance(error, KeyboardInterrupt)
    interrupts = place.when(place.has_step, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        place.launcher.run(place.job)
    interrupts.join()
    place.launcher.run(place.job)
    assert place.submissions() == 1
    assert is_sealed(place.job)


def test_what_sbatch_refuses_is_told(place: Place) -> None:
    closed = replace(place.launcher.cluster, partition="closed")
    launcher = SlurmLauncher(closed, environment={}, say=place.said.append)
    with pytest.raises(StageError, match=r"sbatch refused .*invalid partition specified: closed"):
        launcher.run(place.job)
    assert not place.file("env").exists()


def test_a_machine_without_slurm_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(place.folder))
    with pytest.raises(ConfigError, match="squeue is not on PATH: run on a login node"):
        place.launcher.run(place.job)


# -- the script ---------------------------------------------------------------------------------


def test_the_script_asks_for_what_the_settings_say(place: Place) -> None:
    cluster = Slurm(
        nodes=Nodes(processes=8, gpus=1, cpus=4, memory_gib=64),
        folder=place.folder / "jobs",
        time="1-00:00:00",
        account="physics",
    )
    launcher = SlurmLauncher(cluster, environment={}, say=place.said.append)
    lines = launcher.script(place.job, 16).splitlines()
    for wanted in (
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=32",
        "#SBATCH --mem=512G",
        "#SBATCH --time=1-00:00:00",
        "#SBATCH --account=physics",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:TERM@120",
        "#SBATCH --open-mode=append",
    ):
        assert wanted in lines
    exported = launch_slurm.carried({"CC": "gcc", "TRITON_CACHE_DIR": "/k", "PATH": "/bin"})
    assert exported == {"CC": "gcc", "TRITON_CACHE_DIR": "/k"}
    # A step has one core where it is not told.
    (step,) = [line for line in lines if line.startswith("srun")]
    assert "--cpus-per-task=32" in step.split()
    assert "    --shutdown-timeout=100 \\" in lines
    asked = [line for line in lines if line.startswith("#SBATCH")]
    assert not any("partition" in line for line in asked)
    assert not any(re.search("@[A-Z]+@", line) for line in lines)
    with pytest.raises(ConfigError, match=r"processes is 12, which nodes of EQM_NODE_PROCESSES=8"):
        launcher.script(place.job, 12)
