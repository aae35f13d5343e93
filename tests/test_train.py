"""The loop: golden losses, and the same bits however often it was stopped.

After a change that is meant to change the numbers, write the golden curve again with
``OMP_NUM_THREADS=1 PYTHONPATH=tests python tests/test_train.py`` and say so in the commit.
"""

import contextlib
import hashlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chain
import needs
import pytest
import torch
from chain import store_of, untrained
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from eqm import checkpoint, compute, lease, train
from eqm.batches import read_batch
from eqm.config import (
    ComputeConfig,
    Job,
    SamplerConfig,
    TrainConfig,
    TrainStage,
    replace,
    stage_config,
)
from eqm.distributed import World
from eqm.ema import EMA, sigma_rel_to_gamma
from eqm.errors import (
    AwayError,
    ConfigError,
    DataError,
    EqmError,
    IntegrityError,
    MissingError,
    PeerError,
    StoreError,
)
from eqm.events import events_of
from eqm.kernels.halves import lacking
from eqm.latents import sample_latents
from eqm.learner import learning_rate
from eqm.network import Transformer
from eqm.official import to_official, write_official
from eqm.randomness import Stream, normal, uniform
from eqm.records import Record, to_json
from eqm.run import InterruptedTraining, first_acts
from eqm.stage import EXIT_REFUSED, Context, job_digest, open_ref, verify
from eqm.storage import LocalStore

GOLDEN = Path(__file__).parent / "golden" / "train_tiny.json"
BATCH = 32
HALF = chain.UPDATES // 2 * BATCH
ROOT = Path(__file__).parent.parent
ALONE = [sys.executable, "-m", "eqm.train"]
IN_PAIRS = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    *("-m", "eqm.train"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.getbasetemp() / "chain", until="train")


def asking(job: Job, **changes: Any) -> Job:
    """The same job with other settings, as ``train={"batch_size": 3}``."""
    config = {name: {**table, **changes.get(name, {})} for name, table in job.config.items()}
    return replace(job, config=config)


def curve(store: LocalStore, record: Record) -> dict[str, list[float]]:
    return json.loads(store.get(record.outputs["history.json"]))


def set_up(job: Job, world: World | None = None) -> train.Run:
    alone = World(0, 1, torch.device("cpu"))
    config = stage_config("train", job.config)
    return train.setup(Context(job=job, config=config, store=store_of(job), world=world or alone))


# -- one update ---------------------------------------------------------------------------------


class Made(TorchDispatchMode):
    """What an operation makes of numbers of the host, or tells it: a GPU would be waited for."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in self.WAITS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [{}, {"objective.energy": "dot"}, {"train.on_nonfinite": "skip", "train.ema_power": (0.1,)}],
)
def test_an_update_asks_its_device_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    """From the moments to the averages; tests/test_gpu.py has the update itself on a device."""
    made = chain.build(tmp_path, changes, until="latents")
    run = set_up(chain.job(made.config, made.store, "train", made.records))
    with contextlib.closing(train.feed(run)) as feed:
        train.step(run, next(feed), False)
        batch = next(feed)
        with Made() as seen:
            train.step(run, batch, False)
            assert seen.found == []
            # It sees what it is for.
            assert float(torch.tensor(1.0)) == 1
        assert seen.found == ["lift_fresh", "_local_scalar_dense"]


@pytest.mark.parametrize("ratio", [0.4, 2.0])
def test_a_training_that_is_slower_in_bfloat16_says_so(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, ratio: float
) -> None:
    monkeypatch.setattr(compute, "bfloat16_blocks", lambda _: ratio)
    set_up(asking(untrained(tiny, tmp_path), train={"precision": "bfloat16"}))
    assert ("'float32' is faster here" in capfd.readouterr().err) == (ratio > 1)


def test_batches_for_a_gpu_are_pinned(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the host waits for each to be copied there."""
    run, asked = set_up(untrained(tiny, tmp_path)), list[bool]()
    monkeypatch.setattr(train, "batches", lambda *_, pin, **__: asked.append(pin))
    for device in ("cpu", "cuda"):
        run.context = replace(run.context, world=World(0, 1, torch.device(device)))
        train.feed(run)
    assert asked == [False, True]


# -- the curve ----------------------------------------------------------------------------------


def test_the_loss_curve_is_the_golden_one(tiny: chain.Chain) -> None:
    found, golden = curve(tiny.store, tiny["train"]), json.loads(GOLDEN.read_text())
    assert found["images"] == golden["images"] == [BATCH * n for n in range(1, 21)]
    for name in ("loss", "gradient_norm"):
        assert found[name] == pytest.approx(golden[name], rel=1e-5)
    assert tiny["train"].values["final_loss"] == found["loss"][-1]


def test_a_rerun_ends_in_the_same_bits(tiny: chain.Chain, tmp_path: Path) -> None:
    again = chain.run(untrained(tiny, tmp_path))
    assert again.outputs == tiny["train"].outputs
    assert again.content == tiny["train"].content


def test_the_loss_falls(tiny: chain.Chain) -> None:
    losses = curve(tiny.store, tiny["train"])["loss"]
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])


# -- stopped and started again ------------------------------------------------------------------


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training_with_a_checkpoint(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: signal.Signals
) -> None:
    job = untrained(tiny, tmp_path)
    before = signal.getsignal(kind)
    losses = train.accumulate

    def halfway(run: train.Run, batch: train.Batch) -> torch.Tensor:
        if run.images_seen == HALF - 2 * BATCH:
            os.kill(os.getpid(), kind)
        return losses(run, batch)

    monkeypatch.setattr(train, "accumulate", halfway)
    with pytest.raises(InterruptedTraining, match="start it again to go on"):
        chain.run(job)
    monkeypatch.undo()
    assert signal.getsignal(kind) is before
    position = checkpoint.newest(store_of(job), job_digest(job))
    assert position is not None
    state = checkpoint.load(store_of(job), job_digest(job), position)
    assert state is not None
    assert state.images_seen == HALF
    assert store_of(job).record("train", job_digest(job)) is None
    assert chain.run(job).content == tiny["train"].content


@pytest.mark.parametrize(("keep", "kept"), [(1, [640]), (3, [512, 608, 640])])
def test_frequent_checkpoints_change_nothing_and_the_newest_stay(
    tiny: chain.Chain, tmp_path: Path, keep: int, kept: list[int]
) -> None:
    job = untrained(tiny, tmp_path, checkpoint_every_images=100, keep_checkpoints=keep)
    assert chain.run(job).content == tiny["train"].content
    found = checkpoint.complete(store_of(job), job_digest(job))
    assert [at.images_seen for at in found] == kept
    begins = {Path(key).name.partition(".")[0] for key in checkpoint_keys(job)}
    assert begins == {at.name for at in found}


def checkpoint_keys(job: Job) -> list[str]:
    return store_of(job).list(f"train/{job_digest(job)}/checkpoints/")


def commits(job: Job) -> list[str]:
    return [key for key in checkpoint_keys(job) if key.endswith("-000001.json")]


@pytest.mark.skipif(lacking() is not None, reason="this processor has no AVX512-FP16")
def test_stopped_halfway_in_float16_it_ends_in_the_same_bits(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = {"precision": "float16"}
    whole = chain.run(asking(untrained(tiny, tmp_path / "whole"), train=half))
    assert whole.content != tiny["train"].content
    job = asking(untrained(tiny, tmp_path / "stopped"), train=half)
    step = train.step
    with monkeypatch.context() as patch:
        patch.setattr(
            train, "step", lambda run, batch, _: step(run, batch, run.images_seen == HALF - BATCH)
        )
        with pytest.raises(InterruptedTraining):
            chain.run(job)
    assert chain.run(job).content == whole.content


def test_points_of_the_curve_survive_a_stop_between_them(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eqm.run.HISTORY_POINTS", 5)
    whole = chain.run(untrained(tiny, tmp_path / "whole"))
    job = untrained(tiny, tmp_path / "stopped")
    with monkeypatch.context() as patch:
        # As if SIGTERM came within the second update of the third point.
        patch.setattr(train, "crossed", lambda before, after, _: False)
        step = train.step
        patch.setattr(train, "step", lambda run, batch, _: step(run, batch, True) and stops(run))
        with pytest.raises(InterruptedTraining):
            chain.run(job)
    again = chain.run(job)
    assert len(curve(store_of(job), again)["loss"]) == 5
    assert again.content == whole.content


def stops(run: train.Run) -> bool:
    return run.images_seen == 10 * BATCH


def test_killed_after_the_last_update_it_only_seals(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = untrained(tiny, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train, "outcome_of", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            chain.run(job)
    monkeypatch.setattr(train, "step", lambda *_: pytest.fail("a finished run went on"))
    assert chain.run(job).content == tiny["train"].content


def test_a_damaged_checkpoint_is_refused_by_name(tiny: chain.Chain, tmp_path: Path) -> None:
    job = untrained(tiny, tmp_path)
    run = set_up(job)
    train.step(run, next(train.feed(run)), stop=False)
    train.persist(run)
    store = store_of(job)
    (key,) = commits(job)
    file = store.root / key.replace(".json", ".0000.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    with pytest.raises(EqmError, match=f"{Path(key).name} cannot be used.*damaged"):
        chain.run(job)


def written(job: Job, path: Path) -> str:
    path.write_text(json.dumps(to_json(job)))
    return str(path)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def started(job: Job, path: Path, line: list[str] = ALONE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*line, written(job, path)],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def worker(agent: int, rank: int) -> int:
    """The process of a rank that torchrun started."""
    for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
            return int(pid)
    raise AssertionError(f"no rank {rank} under {agent}")


def until(met: Callable[[], bool], child: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not met() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert met()


def test_killed_at_random_moments_it_ends_in_the_same_bits(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a checkpoint is written beside the loop, which at this pace is nearly always."""
    job = untrained(tiny, tmp_path, checkpoint_every_images=BATCH, lease_seconds=600.0)
    moments = random.Random(0)
    # Once when a checkpoint is whole, and once when one is begun.
    for token, end in ((1, ".json"), (2, "")):
        with started(job, tmp_path / "job.json") as child:
            seen = rf"/\d+-{token:06d}" + (re.escape(end) + "$" if end else "")
            until(lambda s=seen: any(re.search(s, key) for key in checkpoint_keys(job)), child)
            time.sleep(moments.uniform(0, 0.1))
            child.kill()
        assert child.returncode == -signal.SIGKILL, "it ended before it could be killed"
        # Of the first start's none may be left, once the second has made enough of its own.
        assert checkpoint.newest(store_of(job), job_digest(job)) is not None
        assert store_of(job).record("train", job_digest(job)) is None
    # The lease lasts for ten minutes: that its holder is dead is seen, and not waited for.
    assert chain.run(job).content == tiny["train"].content


def test_told_again_and_again_it_still_leaves_in_order(tiny: chain.Chain, tmp_path: Path) -> None:
    """As by a scheduler that tells the script and its steps, or by torchrun that is told twice."""
    job = asking(untrained(tiny, tmp_path), train={"images": 1000 * BATCH})
    digest = job_digest(job)
    with started(job, tmp_path / "job.json") as child:
        until(lambda: lease.read(store_of(job), checkpoint.lease_key(digest)) is not None, child)
        # Until the loop has begun, a signal ends it at once.
        until(lambda: notes_signals(child.pid), child)
        while child.poll() is None:
            child.send_signal(signal.SIGTERM)
            time.sleep(0.001)
        _, said = child.communicate(timeout=60)
    assert child.returncode == EXIT_REFUSED, said
    assert "error: stopped at image" in said
    left = lease.read(store_of(job), checkpoint.lease_key(digest))
    assert left is not None
    assert left.released


def notes_signals(pid: int) -> bool:
    """Whether a process does something of its own at SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(re.findall(r"SigCgt:\s+(\w+)", status)[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def test_the_lease_is_held_until_the_record_is_sealed(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = untrained(tiny, tmp_path)
    digest, seal, seen = job_digest(job), LocalStore.seal, []

    def watched(store: LocalStore, record: Record) -> Record:
        seen.append(lease.read(store, checkpoint.lease_key(digest)))
        return seal(store, record)

    monkeypatch.setattr(LocalStore, "seal", watched)
    chain.run(job)
    assert [found.released for found in seen] == [False]
    after = lease.read(store_of(job), checkpoint.lease_key(digest))
    assert after is not None
    assert after.released


def test_a_trainer_that_was_replaced_while_it_slept_changes_nothing_and_says_who(
    tiny: chain.Chain, tmp_path: Path
) -> None:
    job = untrained(tiny, tmp_path, checkpoint_every_images=BATCH, lease_seconds=1.0)
    store, digest = store_of(job), job_digest(job)
    with started(job, tmp_path / "job.json") as sleeper:
        until(lambda: checkpoint.newest(store, digest) is not None, sleeper)
        sleeper.send_signal(signal.SIGSTOP)
        try:
            again = chain.run(job)
            found = lease.read(store, checkpoint.lease_key(digest))
            before = readable(job)
        finally:
            sleeper.send_signal(signal.SIGCONT)
        _, said = sleeper.communicate(timeout=120)
    assert again.content == tiny["train"].content
    assert found is not None
    assert found.token == 2
    assert sleeper.returncode == 2, said
    assert f"process {os.getpid()} on {found.process.host} took it over (token 2)" in said
    assert readable(job) == before


@pytest.mark.parametrize("when", ["in the loop", "after it", "and its peers are gone", "away"])
def test_a_trainer_that_was_replaced_leaves_alone_what_mlflow_shows(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    job, told, loop = untrained(tiny, tmp_path), [], train.loop

    class Shown:
        def close(self, status: str) -> None:
            told.append(status)

        def abandon(self) -> None:
            told.append("abandoned")

    def lost(run: train.Run) -> None:
        if when == "after it":
            loop(run)
        if when == "away":
            # Nobody says that it is another one's.
            monkeypatch.setattr(LocalStore, "replace", away)
            raise PeerError("rank 1 does not answer")
        run.context.store.delete(checkpoint.lease_key(job_digest(job)))
        if when == "in the loop":
            loop(run)
        if when == "and its peers are gone":
            raise PeerError("rank 1 does not answer")

    def away(*_: object) -> None:
        raise AwayError("no store")

    monkeypatch.setattr(train, "open_mirror", lambda _: Shown())
    monkeypatch.setattr(train, "loop", lost)
    with pytest.raises(PeerError if when == "away" else lease.LostLeaseError):
        chain.run(job)
    assert told == (["KILLED"] if when == "away" else ["abandoned"])
    assert store_of(job).record("train", job_digest(job)) is None


def test_whoever_is_replaced_after_its_last_update_seals_nothing(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, outcome = untrained(tiny, tmp_path), train.outcome_of

    def replaced(run: train.Run) -> Any:
        run.context.store.delete(checkpoint.lease_key(job_digest(job)))
        return outcome(run)

    monkeypatch.setattr(train, "outcome_of", replaced)
    with pytest.raises(lease.LostLeaseError):
        chain.run(job)
    assert store_of(job).record("train", job_digest(job)) is None


def test_a_checkpoint_that_failed_ends_training_before_the_next_is_due(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, seen = train.step, []

    def full(*_: object, **__: object) -> None:
        raise StoreError("the disk is full")

    def counted(run: train.Run, *rest: Any) -> bool:
        seen.append(run.images_seen)
        while run.images_seen == HALF + BATCH and not run.writer.failed:
            time.sleep(0.001)
        return step(run, *rest)

    monkeypatch.setattr(checkpoint, "save", full)
    monkeypatch.setattr(train, "step", counted)
    with pytest.raises(StoreError, match="disk is full"):
        chain.run(untrained(tiny, tmp_path, checkpoint_every_images=HALF))
    # It was seen to have failed at the latest by the update after that one.
    assert seen[-1] <= HALF + 2 * BATCH


def test_a_store_is_waited_for_no_longer_than_ranks_wait_for_each_other(
    tiny: chain.Chain, tmp_path: Path
) -> None:
    run = set_up(untrained(tiny, tmp_path, collective_timeout_seconds=100.0))
    assert run.patience.seconds == 50.0


def readable(job: Job) -> dict[str, bytes]:
    """All that anybody reads of a run."""
    store, digest = store_of(job), job_digest(job)
    names = {at.name for at in checkpoint.complete(store, digest)}
    kept = [key for key in checkpoint_keys(job) if Path(key).name.partition(".")[0] in names]
    others = [checkpoint.lease_key(digest), f"train/{digest}/record.json"]
    return {key: store.read(key) for key in [*kept, *others]}


def test_where_the_first_process_may_not_train_all_end_and_say_why(
    tiny: chain.Chain, tmp_path: Path
) -> None:
    job = untrained(tiny, tmp_path, error_file=str(tmp_path / "error"))
    key = checkpoint.lease_key(job_digest(job))
    with lease.held(store_of(job), key, seconds=1.5):
        with started(job, tmp_path / "job.json", IN_PAIRS) as pair:
            _, said = pair.communicate(timeout=120)
        assert pair.returncode != 0
        assert "Traceback" not in said.partition("ChildFailedError")[0].partition("elastic")[0]
    assert f"process {os.getpid()} on " in (tmp_path / "error").read_text()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (AwayError("S3 is gone"), AwayError),
        (MissingError("no such file"), MissingError),
        (IntegrityError("it is damaged"), IntegrityError),
        (StoreError("disk full"), InterruptedTraining),
    ],
)
def test_all_processes_end_by_what_the_first_one_met(error: EqmError, kind: type[EqmError]) -> None:
    said: list[str] = []

    def fails() -> None:
        raise error

    def world(first: bool) -> Any:
        return SimpleNamespace(
            is_first=first,
            first_at_work=contextlib.nullcontext,
            first_tells=lambda text: said.append(text) or said[0],
        )

    with pytest.raises(type(error)) as met:
        first_acts(world(first=True), fails)
    assert met.value is error
    with pytest.raises(kind, match=f"^{error}$"):
        first_acts(world(first=False), fails)


# -- more than one process ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(
    tiny: chain.Chain, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[LocalStore, Record]]:
    """The same job twice, by two processes each, at the same time."""
    folders = [tmp_path_factory.mktemp("pair") for _ in range(2)]
    jobs = [untrained(tiny, folder) for folder in folders]
    children = [
        subprocess.Popen(
            [*IN_PAIRS, written(job, folder / "job.json")],
            cwd=ROOT,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for job, folder in zip(jobs, folders, strict=True)
    ]
    try:
        for child in children:
            _, said = child.communicate(timeout=240)
            assert child.returncode == 0, said
    finally:
        # SIGTERM, so that torchrun takes its two workers with it.
        for child in children:
            child.terminate()
    found = [(store_of(job), store_of(job).record("train", job_digest(job))) for job in jobs]
    return [(store, record) for store, record in found if record is not None]


@pytest.mark.parametrize("rank", [None, 1])
def test_two_processes_that_are_told_to_end_leave_a_look(
    tiny: chain.Chain, tmp_path: Path, rank: int | None
) -> None:
    """The first one draws samples for minutes, and the other waits for it: or is told alone."""
    looking = {"grid_every_images": 64, "grid_sampler": SamplerConfig(updates=200_000)}
    often = {"collective_timeout_seconds": 20.0}
    job = untrained(tiny, tmp_path, cache=str(tmp_path / "cache"), **looking, **often)
    log = tmp_path / "cache" / "events" / f"{job_digest(job)}.jsonl"
    with started(job, tmp_path / "job.json", IN_PAIRS) as pair:
        until(lambda: log.is_file() and '"metrics"' in log.read_text(), pair)
        time.sleep(0.5)
        os.kill(pair.pid if rank is None else worker(pair.pid, rank), signal.SIGTERM)
        _, said = pair.communicate(timeout=60)
    assert "stopped at image 64 of 640, with a checkpoint there" in said
    at = checkpoint.newest(store_of(job), job_digest(job))
    assert at is not None
    assert at.images_seen == 64


def test_two_processes_train_as_one(
    tiny: chain.Chain, pairs: list[tuple[LocalStore, Record]]
) -> None:
    store, record = pairs[0]
    assert record.provenance["world_size"] == 2
    alone, together = curve(tiny.store, tiny["train"]), curve(store, record)
    assert together["images"] == alone["images"]
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)


def test_two_processes_log_the_losses_of_all_images(
    tiny: chain.Chain, pairs: list[tuple[LocalStore, Record]]
) -> None:
    logs = [
        events_of(store.get(record.logs["events.jsonl"]), "log")
        for store, record in ((tiny.store, tiny["train"]), pairs[0])
    ]
    alone, together = ([e.figures for e in log if e.kind == "metrics"] for log in logs)
    for one, other in zip(alone, together, strict=True):
        bands = {name for name in one if "/gamma_" in name}
        assert bands == {name for name in other if "/gamma_" in name}
        for name in bands:
            assert other[name] == pytest.approx(one[name], rel=1e-4), name


def test_two_processes_end_in_the_same_bits_twice(pairs: list[tuple[LocalStore, Record]]) -> None:
    (_, one), (_, other) = pairs
    assert one.content == other.content


@pytest.mark.parametrize(("kind", "told"), [("cpu", [0, 1, 0]), ("cuda", [0, 0, 1])])
def test_gpus_learn_of_a_wish_to_stop_one_update_later(
    tiny: chain.Chain, tmp_path: Path, kind: str, told: list[int]
) -> None:
    run = set_up(untrained(tiny, tmp_path))
    run.context = replace(run.context, world=World(0, 2, torch.device(kind)))
    assert [train.somebody_stops(run, torch.tensor(n)) for n in (0.0, 2.0, 0.0)] == told


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_of_the_ranks_add_up(tiny: chain.Chain, tmp_path: Path, size: int) -> None:
    job = untrained(tiny, tmp_path)
    run = set_up(job)
    run.network.initialise(1, zero_head=False)
    batch = read_batch(run.data, run.config.seed, 0, BATCH)
    whole = train.accumulate(run, batch)
    shares = [
        train.accumulate(run, read_batch(run.data, run.config.seed, start, BATCH // size))
        for start in range(0, BATCH, BATCH // size)
    ]
    assert torch.allclose(torch.cat(shares), whole, rtol=1e-5)


@needs.compiler
def test_each_training_of_a_process_has_all_versions_that_the_compiler_keeps(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._dynamo

    really = torch.compile
    # What is traced is what counts: no kernels are made of it.
    monkeypatch.setattr(
        "torch.compile", lambda forward, options, **asked: really(forward, backend="eager", **asked)
    )
    monkeypatch.setattr(compute, "_compiled", compute._compiled.__wrapped__)
    job = untrained(tiny, tmp_path, compute=ComputeConfig(compile=True))
    with torch._dynamo.config.patch(recompile_limit=1):
        for patch in (1, 2):
            run = set_up(asking(job, network={"patch": patch}))
            run.learner.network(torch.zeros(2, *run.spec.latent.shape), torch.zeros(2).long())


# -- what is refused ----------------------------------------------------------------------------


def test_a_batch_that_the_processes_cannot_share_is_refused(
    tiny: chain.Chain, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"batch_size is 32, which 3 processes cannot share"):
        set_up(untrained(tiny, tmp_path), World(1, 3, torch.device("cpu")))


def test_a_patch_that_does_not_divide_the_latents_is_refused(
    tiny: chain.Chain, tmp_path: Path
) -> None:
    job = asking(untrained(tiny, tmp_path), network={"patch": 3})
    with pytest.raises(ConfigError, match=r"8 x 8 cannot be cut into patches of 3: choose"):
        chain.run(job)


def test_divergence_is_told_and_nothing_is_sealed(tiny: chain.Chain, tmp_path: Path) -> None:
    job = asking(untrained(tiny, tmp_path), train={"learning_rate": 1e18})
    with pytest.raises(DataError, match=r"diverged; lower train\.learning_rate"):
        chain.run(job)
    assert store_of(job).record("train", job_digest(job)) is None


# -- further averages ---------------------------------------------------------------------------

FURTHER = {"ema_tracks": [40, 320.5], "ema_power": [0.05, 0.1], "ema_snapshot_images": 3 * BATCH}


@pytest.fixture(scope="module")
def further(tiny: chain.Chain, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Record]:
    """The training of the chain with averages of other lengths beside the main ones."""
    job = asking(untrained(tiny, tmp_path_factory.mktemp("further")), train=FURTHER)
    return job, chain.run(job)


def sealed_tensors(job: Job, record: Record, name: str) -> dict[str, torch.Tensor]:
    return checkpoint.tensors_from_bytes(store_of(job).get(record.outputs[name]))


def test_further_averages_are_sealed_beside_the_main_ones_and_change_nothing(
    tiny: chain.Chain, further: tuple[Job, Record]
) -> None:
    job, record = further
    usual = tiny["train"].outputs
    assert usual.keys() == {"model.json", "ema.safetensors", "raw.safetensors", "history.json"}
    assert {name: record.outputs[name] for name in usual} == dict(usual)
    ends = {"ema-40", "ema-320.5", "power-0.05", "power-0.1"}
    moments = [*range(96, 640, 96), 640]
    snapshots = {f"snapshots/{n:012d}/{sigma}" for n in moments for sigma in (0.05, 0.1)}
    assert record.outputs.keys() - usual.keys() == {f"{n}.safetensors" for n in ends | snapshots}
    keys = store_of(job).list(f"train/{record.digest}/snapshots/")
    assert [int(Path(key).stem.partition("-")[0]) for key in keys] == moments
    verify(store_of(job), record)


def test_further_averages_are_those_of_the_weights_of_every_update(
    tiny: chain.Chain, tmp_path: Path, further: tuple[Job, Record]
) -> None:
    job, record = further
    run = set_up(asking(untrained(tiny, tmp_path), train=FURTHER))
    start = {name: p.detach().clone() for p, name in run.names.items()}
    path = []
    for batch in islice(train.feed(run), chain.UPDATES):
        train.step(run, batch, stop=False)
        path.append({name: p.detach().clone() for p, name in run.names.items()})
    name = "head.linear.weight"
    for half_life in (40, 320.5):
        average = EMA(start, half_life_images=half_life)
        for weights in path:
            average.update(weights, images=BATCH)
        found = sealed_tensors(job, record, f"ema-{half_life}.safetensors")[name]
        assert torch.equal(found, average.state_dict()[name])
    for sigma in (0.05, 0.1):
        edges = torch.arange(len(path) + 1, dtype=torch.float64)
        for end in (3, 12, 20):
            shares = ((edges.clamp(max=end) / end) ** (sigma_rel_to_gamma(sigma) + 1)).diff()
            expected = sum(
                s * weights[name].double() for s, weights in zip(shares, path, strict=True)
            )
            kept = f"snapshots/{end * BATCH:012d}/{sigma}.safetensors"
            found = sealed_tensors(job, record, kept)[name]
            assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-7)
        end = sealed_tensors(job, record, f"power-{sigma}.safetensors")
        assert torch.equal(end[name], found)
        assert end.keys() == run.network.state_dict().keys()


def test_stopped_after_every_update_further_averages_end_in_the_same_bits(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, further: tuple[Job, Record]
) -> None:
    job = asking(untrained(tiny, tmp_path), train=FURTHER)
    step = train.step
    with monkeypatch.context() as patch:
        patch.setattr(train, "step", lambda run, batch, _: step(run, batch, True) or True)
        for _ in range(chain.UPDATES - 1):
            with pytest.raises(InterruptedTraining):
                chain.run(job)
        again = chain.run(job)
    assert again.outputs == further[1].outputs
    assert again.content == further[1].content


def test_killed_between_a_snapshot_and_its_checkpoint_it_ends_in_the_same_bits(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, further: tuple[Job, Record]
) -> None:
    job = asking(untrained(tiny, tmp_path, checkpoint_every_images=3 * BATCH), train=FURTHER)
    save = checkpoint.save

    def killed(store: Any, digest: str, state: checkpoint.TrainState, **rest: Any) -> str:
        if state.images_seen == 6 * BATCH:
            raise KeyboardInterrupt
        return save(store, digest, state, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            chain.run(job)
    folder = f"train/{job_digest(job)}"
    assert len(store_of(job).list(f"{folder}/snapshots/")) == 2
    newest = checkpoint.newest(store_of(job), job_digest(job))
    assert newest is not None
    assert newest.images_seen == 3 * BATCH
    assert chain.run(job).content == further[1].content


def test_a_snapshot_that_is_gone_is_told_before_anything_is_sealed(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = asking(untrained(tiny, tmp_path), train=FURTHER)
    outcome = train.outcome_of

    def lost(run: train.Run) -> Any:
        key = f"train/{run.context.digest}/snapshots/{96:012d}-000001.json"
        (store_of(job).root / key).unlink()
        return outcome(run)

    monkeypatch.setattr(train, "outcome_of", lost)
    with pytest.raises(IntegrityError, match=r"snapshots/000000000096\.json cannot be used.*start"):
        chain.run(job)
    assert store_of(job).record("train", job_digest(job)) is None


def test_only_the_first_process_leaves_snapshots(tiny: chain.Chain, tmp_path: Path) -> None:
    run = set_up(asking(untrained(tiny, tmp_path), train=FURTHER))
    run.images_seen, first = 3 * BATCH, run.context
    folder = f"train/{first.digest}/snapshots/"
    run.context = replace(first, world=World(1, 2, torch.device("cpu")))
    train.keep_snapshot(run)
    assert first.store.list(folder) == []
    run.context = first
    train.keep_snapshot(run)
    run.writer.wait()
    assert len(first.store.list(folder)) == 1


# -- other beginnings and other methods ----------------------------------------------------------


def begun_from(job: Job, path: Path, **changes: Any) -> Job:
    """The same job, from weights in a file."""
    train_changes = {
        **changes.pop("train", {}),
        "init_from": {"uri": str(path), "sha256": of(path)},
    }
    return asking(job, train=train_changes, **changes)


def of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights_file(tiny: chain.Chain) -> Path:
    """The averaged weights of the trained model, where the store has them."""
    return tiny.store.fetch(tiny["train"].outputs["ema.safetensors"])


@pytest.mark.parametrize("energy", ["implicit", "dot", "l2"])
def test_training_begins_from_the_weights_of_another(
    tiny: chain.Chain, tmp_path: Path, energy: str
) -> None:
    path = tmp_path / "ema.safetensors"
    path.write_bytes(weights_file(tiny).read_bytes())
    job = begun_from(untrained(tiny, tmp_path), path, objective={"energy": energy})
    run, sealed = set_up(job), load_file(path)
    for name, value in run.network.state_dict().items():
        assert torch.equal(value, sealed[name]), name
    assert job_digest(job) != job_digest(tiny.job("train"))
    losses = curve(store_of(job), chain.run(job))["loss"]
    assert all(math.isfinite(loss) for loss in losses)


def test_a_run_goes_on_when_the_weights_that_it_began_from_are_gone(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ema.safetensors"
    path.write_bytes(weights_file(tiny).read_bytes())
    whole = chain.run(begun_from(untrained(tiny, tmp_path / "whole"), path))
    job = begun_from(untrained(tiny, tmp_path / "stopped"), path)
    step = train.step
    with monkeypatch.context() as patch:
        patch.setattr(train, "step", lambda run, batch, _: step(run, batch, True) or True)
        with pytest.raises(InterruptedTraining):
            chain.run(job)
    path.unlink()
    assert chain.run(job).content == whole.content


def test_training_begins_from_an_official_checkpoint(tiny: chain.Chain, tmp_path: Path) -> None:
    config = chain.tiniest().network
    official = Transformer(
        replace(config, time="constant", second_head=True), size=8, channels=1, classes=10
    )
    official.initialise(5, zero_head=False)
    path = tmp_path / "sit.pt"
    write_official(path, to_official(official))
    network = {"time": "constant", "second_head": True}
    run = set_up(begun_from(untrained(tiny, tmp_path), path, network=network))
    for name, value in run.network.state_dict().items():
        assert torch.equal(value, official.state_dict()[name]), name
    with pytest.raises(IntegrityError, match=r"sit\.pt: weight .* this network has"):
        set_up(begun_from(untrained(tiny, tmp_path / "other"), path))


def test_an_l2_energy_without_other_weights_begins_with_a_head_that_is_not_zero(
    tiny: chain.Chain, tmp_path: Path
) -> None:
    for energy, drawn in (("l2", True), ("dot", False)):
        job = asking(untrained(tiny, tmp_path / energy), objective={"energy": energy})
        head = set_up(job).network.state_dict()["head.linear.weight"]
        assert bool(head.any()) == drawn


def test_weights_of_another_digest_or_of_zeros_for_l2_are_refused(
    tiny: chain.Chain, tmp_path: Path
) -> None:
    path = tmp_path / "zeros.safetensors"
    zeros = Transformer(chain.tiniest().network, size=8, channels=1, classes=10).state_dict()
    save_file(zeros, path)
    with pytest.raises(ConfigError, match="would never train"):
        set_up(begun_from(untrained(tiny, tmp_path / "l2"), path, objective={"energy": "l2"}))
    job = begun_from(untrained(tiny, tmp_path / "wrong"), path)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(IntegrityError, match="SHA-256"):
        set_up(job)


@pytest.mark.parametrize("time", ["none", "conditioned"])
def test_flow_matching_goes_through_the_whole_pipeline(tmp_path: Path, time: str) -> None:
    made = chain.build(
        tmp_path,
        {
            "network.time": time,
            "objective.c": "constant",
            "objective.multiplier": 1.0,
            "generate.sampler.rule": "heun",
            "generate.sampler.step_size": 0.2,
            "generate.sampler.updates": 5,
        },
    )
    assert made["samples"].values["mean_field_evaluations"] == 10
    assert made["evaluation"].values["evaluation"]["metrics"]["distance"]["value"] > 0


def test_a_unet_goes_through_the_whole_pipeline(tmp_path: Path) -> None:
    unet = {"widths": [8, 16], "layers": 1, "attention": [], "groups": 4}
    changes = {f"network.unet.{name}": value for name, value in unet.items()}
    made = chain.build(tmp_path, {"network.kind": "unet", "train.images": 96, **changes})
    assert made["train"].values["final_loss"] < 30


def test_a_dot_energy_is_trained_by_both_ways_and_stops_early(
    tiny: chain.Chain, tmp_path: Path
) -> None:
    ends = {}
    for way in ("double", "directional"):
        changes = {"energy": "dot", "backward": way}
        job = asking(untrained(tiny, tmp_path / way), objective=changes)
        ends[way] = curve(store_of(job), chain.run(job))["loss"]
    assert ends["double"] == pytest.approx(ends["directional"], rel=1e-3)
    assert ends["double"] != ends["directional"]


def test_a_conditioned_network_needs_a_rule_that_knows_gamma() -> None:
    changes = {"network.time": "conditioned", "objective.c": "constant"}
    with pytest.raises(ConfigError, match="'euler' or 'heun'"):
        chain.tiniest(changes)
    with pytest.raises(ConfigError, match=r"network\.second_head"):
        chain.tiniest({"objective.loss": "inner-product"})
    with pytest.raises(ConfigError, match=r"objective\.loss is 'norms'"):
        chain.tiniest({"objective.loss": "norms", "objective.energy": "dot"})


# -- one step -----------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_stays_and_decays() -> None:
    config = TrainConfig(
        images=1000, batch_size=10, learning_rate=2.0, warmup_images=100, decay_fraction=0.2
    )
    rates = [learning_rate(config, seen) for seen in range(0, 1000, 10)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10:81] == [2.0] * 71
    assert rates[80:] == pytest.approx([0.1 * n for n in range(20, 0, -1)])


def test_the_learning_rate_is_constant_unless_asked() -> None:
    config = TrainConfig(images=1001, batch_size=10, learning_rate=0.5)
    rates = {learning_rate(config, n * 10) for n in range(config.updates)}
    assert rates == {0.5}


def test_labels_are_dropped_at_their_rate(tiny: chain.Chain, tmp_path: Path) -> None:
    run = set_up(asking(untrained(tiny, tmp_path), train={"label_dropout": 0.3}))
    batch = read_batch(run.data, 0, 0, 4000)
    labels = train.corrupted(run, batch).labels
    dropped = labels == 10
    assert float(dropped.double().mean()) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 4000))
    assert torch.equal(labels[~dropped], batch.labels[~dropped])


def test_without_dropout_no_label_is_dropped_and_there_is_no_null_label(
    tiny: chain.Chain, tmp_path: Path
) -> None:
    run = set_up(asking(untrained(tiny, tmp_path), train={"label_dropout": 0.0}))
    batch = read_batch(run.data, 0, 0, 500)
    assert torch.equal(train.corrupted(run, batch).labels, batch.labels)
    assert not run.spec.null_label


def test_the_loss_is_equation_3(tiny: chain.Chain, tmp_path: Path) -> None:
    """||f(x_gamma) - (eps - x) c(gamma)||^2 for each image, written out once more."""
    run = set_up(untrained(tiny, tmp_path))
    run.network.initialise(3, zero_head=False)
    batch = read_batch(run.data, run.config.seed, 96, BATCH)
    # Those of pixels are 0: then nobody sees whose noise the posterior is given.
    batch.moments[:, 1:] = 0.5
    expected, wrong_sign = [], []
    for i, number in enumerate(batch.image_numbers.tolist()):
        n = torch.tensor([number])
        posterior = normal(0, Stream.POSTERIOR, n, (1, 8, 8))
        x = sample_latents(batch.moments[i : i + 1], posterior, run.spec.latent)
        eps = normal(0, Stream.EPS, n, (1, 8, 8))
        gamma = float(uniform(0, Stream.GAMMA, n))
        dropped = float(uniform(0, Stream.LABEL_DROP, n)) < 0.1
        label = torch.tensor([10]) if dropped else batch.labels[i : i + 1]
        c = 4.0 * (1.0 if gamma <= 0.8 else (1.0 - gamma) / 0.2)
        with torch.no_grad():
            f = run.network(gamma * x + (1.0 - gamma) * eps, label)
        expected.append(float(((f - (eps - x) * c) ** 2).mean()))
        wrong_sign.append(float(((f - (x - eps) * c) ** 2).mean()))
    found = train.accumulate(run, batch).tolist()
    assert found == pytest.approx(expected, rel=1e-4)
    assert found != pytest.approx(wrong_sign, rel=1e-4)


def test_one_step_is_adam_on_the_mean_loss_and_the_average_follows(
    tiny: chain.Chain, tmp_path: Path
) -> None:
    job = untrained(tiny, tmp_path)
    run, other = set_up(job), set_up(job)
    batch = next(train.feed(run))
    assert train.step(run, batch, stop=False) is False
    trained = {n: p for p, n in other.names.items()}
    plain = torch.optim.AdamW(trained.values(), lr=4e-3, weight_decay=0.0)
    average = EMA(trained, half_life_images=160.0)
    train.accumulate(other, batch)
    plain.step()
    average.update(trained, images=BATCH)
    for parameter, name in run.names.items():
        assert torch.allclose(parameter, trained[name], atol=1e-6), name
    for name, value in run.learner.ema.state_dict().items():
        assert torch.allclose(value, average.state_dict()[name], atol=1e-6), name


def test_a_clipped_gradient_has_the_norm_asked_for(tiny: chain.Chain, tmp_path: Path) -> None:
    run = set_up(asking(untrained(tiny, tmp_path), train={"gradient_clip": 0.01}))
    given: list[float] = []
    step = run.learner.optimiser.step

    def look(gradients: Sequence[torch.Tensor], **rest: Any) -> None:
        given.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        step(gradients, **rest)

    run.learner.optimiser.step = look  # type: ignore[method-assign]
    train.step(run, next(train.feed(run)), stop=False)
    assert given == pytest.approx([0.01], rel=1e-4)
    assert float(run.since_report[0][1]) > 0.01


def test_what_is_asked_is_typed(tiny: chain.Chain) -> None:
    job = tiny.job("train")
    assert isinstance(stage_config("train", job.config), TrainStage)
    assert open_ref(tiny.store, tiny["train"].ref) == tiny["train"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = chain.build(Path(folder), until="train")
        text = json.dumps(curve(made.store, made["train"]), indent=1)
    GOLDEN.write_text(text + "\n")
