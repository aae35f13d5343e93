"""Around every stage program: skip what is sealed, seal last, refuse in words."""

import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eqm import progress, stage
from eqm.config import Job, Runtime, replace
from eqm.errors import (
    AwayError,
    ConfigError,
    DataError,
    DivergedError,
    EqmError,
    IntegrityError,
    PeerError,
    StageError,
    StoreError,
    TransferError,
)
from eqm.records import Ref, to_json
from eqm.stage import Context, Outcome
from eqm.storage import LocalStore
from flows.doctor import PINNED

CONFIG: dict[str, Any] = {"source": {}, "encode": {}}


def a_job(folder: Path, **changes: Any) -> Job:
    runtime = Runtime(store=str(folder / "store"), device="cpu", threads=1)
    values = {"stage": "latents", "config": CONFIG, "inputs": {}, "runtime": runtime}
    return Job(**{**values, **changes})


def makes(value: bytes) -> stage.Program:
    return lambda context: Outcome(outputs={"out": value}, values={"n": 1})


def test_a_stage_is_sealed_once(tmp_path: Path) -> None:
    first = stage.run(a_job(tmp_path), makes(b"one"))
    again = stage.run(a_job(tmp_path), lambda _: pytest.fail("a sealed stage was run"))
    assert first == again
    assert LocalStore(tmp_path / "store").get(first.outputs["out"]) == b"one"


def test_where_it_runs_is_in_no_digest(tmp_path: Path) -> None:
    one = stage.run(a_job(tmp_path / "a"), makes(b"x"))
    two = stage.run(a_job(tmp_path / "b"), makes(b"x"))
    assert (one.digest, one.content) == (two.digest, two.content)


def test_a_failed_stage_seals_nothing(tmp_path: Path) -> None:
    def fails(_: Context) -> Outcome:
        raise DataError("no")

    with pytest.raises(DataError):
        stage.run(a_job(tmp_path), fails)
    assert LocalStore(tmp_path / "store").list("latents/") == []


def test_a_stage_that_diverged_says_so_beside_what_it_left(tmp_path: Path) -> None:
    def runs_off(_: stage.Context) -> stage.Outcome:
        raise DivergedError("loss nan: lower it")

    store, job = LocalStore(tmp_path / "store"), a_job(tmp_path)
    assert stage.divergence(store, job) is None
    for _ in range(2):
        with pytest.raises(DivergedError, match="loss nan"):
            stage.run(job, runs_off)
        assert stage.divergence(store, job) == "loss nan: lower it"
    # It was tried again elsewhere, and went well.
    stage.run(job, makes(b"data"))
    assert stage.divergence(store, job) is None


def test_a_stage_that_failed_otherwise_is_not_called_diverged(tmp_path: Path) -> None:
    def fails(_: stage.Context) -> stage.Outcome:
        raise DataError("no images")

    with pytest.raises(DataError, match="no images"):
        stage.run(a_job(tmp_path), fails)
    assert stage.divergence(LocalStore(tmp_path / "store"), a_job(tmp_path)) is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (AwayError("S3 cannot be reached"), AwayError),
        (TransferError("it broke off"), AwayError),
        (StoreError("the disk is full"), StageError),
        (DataError("no images"), StageError),
    ],
)
def test_whoever_started_a_program_learns_whether_the_store_was_away(
    tmp_path: Path, error: EqmError, kind: type[EqmError]
) -> None:
    left, job = tmp_path / "error", a_job(tmp_path)
    told = replace(job, runtime=replace(job.runtime, error_file=str(left)))
    (tmp_path / "job.json").write_text(json.dumps(to_json(told)))

    def fails(_: Context) -> Outcome:
        raise error

    def follows(_: Context) -> Outcome:
        raise PeerError("rank 0 does not answer")

    for program in (fails, follows):
        assert stage.main(("latents",), program, [str(tmp_path / "job.json")]) == 2
    # The first rank to write it has the cause.
    raised = stage.failure(left.read_text())
    assert type(raised) is kind
    assert str(raised).startswith(str(error))


def of_a_gpu() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB "
        "of which 1 GiB is free."
    )


def of_torch() -> None:
    torch.empty(2**62, dtype=torch.uint8)


def of_numpy() -> None:
    np.empty(2**62, dtype=np.uint8)


def of_threads() -> None:
    before = threading.stack_size(2**47)
    try:
        threading.Thread(target=of_numpy).start()
    finally:
        threading.stack_size(before)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (of_a_gpu, r"CUDA out of memory. Tried to allocate 2.00 GiB: lower encode\.batch_size;"),
        (
            of_torch,
            r"this process is given no more memory \(you tried .*: lower encode\.batch_size",
        ),
        (of_numpy, r"this process is given no more memory \(.* 4\.00 EiB .*: lower encode\.batch_"),
        (of_threads, "this process may start no more threads: raise the limit"),
    ],
)
def test_what_is_used_up_is_told_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ask: Callable[[], None], said: str
) -> None:
    (tmp_path / "job.json").write_text(json.dumps(to_json(a_job(tmp_path))))

    def fails(_: Context) -> Outcome:
        ask()
        raise AssertionError("there was enough")

    assert stage.main(("latents",), fails, [str(tmp_path / "job.json")]) == 2
    assert re.match(f"error: {said}", capsys.readouterr().err)


def test_whoever_started_a_program_learns_of_a_defect_and_it_keeps_its_traceback(
    tmp_path: Path,
) -> None:
    """Of several ranks, the others would say that this one does not answer."""
    left, job = tmp_path / "error", a_job(tmp_path)
    told = replace(job, runtime=replace(job.runtime, error_file=str(left)))
    (tmp_path / "job.json").write_text(json.dumps(to_json(told)))

    def fails(_: Context) -> Outcome:
        raise ZeroDivisionError("by a defect")

    with pytest.raises(ZeroDivisionError):
        stage.main(("latents",), fails, [str(tmp_path / "job.json")])
    assert left.read_text().startswith("ZeroDivisionError: by a defect (the traceback is in")


def test_inputs_are_checked_before_use(tmp_path: Path) -> None:
    made = stage.run(a_job(tmp_path), makes(b"x"))
    store = LocalStore(tmp_path / "store")
    assert stage.open_ref(store, made.ref) == made
    with pytest.raises(IntegrityError, match="made again elsewhere"):
        stage.open_ref(store, Ref(stage="latents", digest=made.digest, content="0" * 64))
    with pytest.raises(DataError, match="not sealed"):
        stage.open_ref(store, Ref(stage="latents", digest="0" * 64, content="0" * 64))


@pytest.mark.parametrize("part", ["outputs", "logs"])
def test_verify_looks_at_every_blob(tmp_path: Path, part: str) -> None:
    made = stage.run(
        a_job(tmp_path), lambda _: Outcome(outputs={"out": b"data"}, logs={"out": b"seconds"})
    )
    store = LocalStore(tmp_path / "store")
    stage.verify(store, made)
    path = store.root / getattr(made, part)["out"].key
    path.write_bytes(b"dat4" if part == "outputs" else b"second5")
    with pytest.raises(IntegrityError, match="damaged"):
        stage.verify(store, made)
    path.unlink()
    with pytest.raises(IntegrityError, match="is gone"):
        stage.verify(store, made)


def test_a_good_copy_here_does_not_hide_what_was_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stage.run(a_job(tmp_path), makes(b"data"))
    store = LocalStore(tmp_path / "store")
    # As where this machine has a copy of what S3 holds.
    monkeypatch.setattr(store, "check", lambda blob: None)
    stage.verify(store, made)
    (store.root / made.outputs["out"].key).write_bytes(b"dat")
    with pytest.raises(IntegrityError, match="of another size"):
        stage.verify(store, made)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("{}", "lacks stage"),
        ('{"stage": 1}', "must be of type str"),
    ],
)
def test_bad_job_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "job.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        stage.read_job(path, ("latents",))


def test_a_job_of_another_stage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(to_json(a_job(tmp_path))))
    with pytest.raises(ConfigError, match="a job for stage 'latents', not train"):
        stage.read_job(path, ("train",))


@pytest.mark.parametrize("launched", [False, True])
def test_a_program_ends_with_one_message_and_status_2(tmp_path: Path, launched: bool) -> None:
    reason = tmp_path / "why"
    runtime = Runtime(store="http://nowhere", error_file=str(reason) if launched else None)
    path = tmp_path / "job.json"
    path.write_text(json.dumps(to_json(a_job(tmp_path, runtime=runtime))))
    line = [sys.executable, "-m", "eqm.encode", str(path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: store 'http://nowhere'")
    assert len(done.stderr.splitlines()) == 1
    assert reason.exists() == launched
    assert not launched or done.stderr == f"error: {reason.read_text()}\n"


SPEAKS = """
import sys, time
from eqm import stage
from eqm.progress import Progress
def program(context):
    print("begun", file=sys.stderr, flush=True)
    for number in range(4):
        time.sleep(0.1)
        print("in a buffer until the end")
        print("more", file=sys.stderr, flush=True)
    with Progress("working", total=2) as progress:
        progress.advance(2)
    return stage.Outcome(outputs={"out": b"x"})
sys.exit(stage.main(("latents",), program, sys.argv[1:]))
"""


@pytest.mark.parametrize("heard_by", ["a pipe", "a terminal", "no stdout"])
def test_a_program_goes_on_where_nobody_reads_what_it_says(heard_by: str, tmp_path: Path) -> None:
    """A worker may be killed, and a connection end: a training that goes on is not to end by it."""
    job = a_job(tmp_path)
    path = tmp_path / "job.json"
    path.write_text(json.dumps(to_json(job)))
    line = [sys.executable, "-c", SPEAKS, str(path)]
    if heard_by == "no stdout":
        line = ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *line]
    reads, writes = pty.openpty() if heard_by == "a terminal" else os.pipe()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(line, stdout=writes, stderr=writes, env=env) as child:
        os.close(writes)
        assert b"begun" in os.read(reads, 1000)
        os.close(reads)
        assert child.wait(60) == 0
    assert LocalStore(tmp_path / "store").record("latents", stage.job_digest(job)) is not None


def test_provenance_names_no_place(tmp_path: Path) -> None:
    made = stage.run(a_job(tmp_path), makes(b"x"))
    assert str(tmp_path) not in json.dumps(to_json(made))
    assert (made.provenance["threads"], made.provenance["world_size"]) == (1, 1)
    versions = made.provenance["versions"]
    assert {name: versions[name].partition("+")[0] for name in PINNED} == PINNED
    assert made.provenance["git_revision"] == stage.git_revision()


COMMIT, OTHER = 40 * "a", 40 * "b"
PACKED = f"# pack-refs\n{OTHER} refs/remotes/origin/main\n{COMMIT} refs/heads/main\n^{OTHER}\n"
MAIN = "ref: refs/heads/main\n"
SECOND = ".git/worktrees/second"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({".git/HEAD": f"{COMMIT}\n"}, COMMIT),
        ({".git/HEAD": MAIN, ".git/refs/heads/main": f"{COMMIT}\n"}, COMMIT),
        ({".git/HEAD": MAIN, ".git/packed-refs": PACKED}, COMMIT),
        ({".git/HEAD": "ref: refs/heads/new\n", ".git/packed-refs": PACKED}, None),
        ({}, None),
    ],
    ids=["no branch", "branch", "packed", "no commit", "no git"],
)
@pytest.mark.parametrize("second", [False, True])
def test_a_revision_is_that_of_the_source_tree(
    tmp_path: Path, files: dict[str, str], found: str | None, second: bool
) -> None:
    there, root = dict(files), tmp_path
    if second and files:
        # As `git worktree add` makes it: a HEAD of its own, and the branches of the first.
        there[f"{SECOND}/HEAD"], there[f"{SECOND}/commondir"] = files[".git/HEAD"], "../..\n"
        there[".git/HEAD"] = f"{OTHER}\n"
        there["second/.git"] = f"gitdir: {tmp_path / SECOND}\n"
        root = tmp_path / "second"
    for name, text in there.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert stage.git_revision(root) == found


@pytest.mark.parametrize("last_seconds", [1.0, 20.0])
def test_the_last_line_of_progress_is_said_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, last_seconds: float
) -> None:
    now = 1.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.Progress("scoring", total=4) as bar:
        bar.advance(2)
        now += last_seconds
        bar.advance(2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("scoring: 4 of 4 images")
