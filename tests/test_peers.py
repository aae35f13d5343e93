"""Ranks that fail while others wait for them in collectives that a network makes of its own."""

import contextlib
import datetime
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eqm import compute, distributed, gauges, guards, train
from eqm.config import ComputeConfig
from eqm.distributed import World, pick_device
from eqm.errors import ConfigError, IntegrityError, PeerError, ReplicaError
from eqm.persistence import shared_read
from eqm.records import Blob, to_json
from eqm.storage import LocalStore
from eqm.watch import Watch
from flows import doctor

ROOT = Path(__file__).parent.parent
WAIT_SECONDS, SLOW_SECONDS = 5.0, 8.0
"""How long collectives wait for a rank, and for how long a store keeps one."""
CUT = (
    "[/builds/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
    "[127.0.0.1]:31. This is typically caused by a remote worker crashing. GLHF!"
)


def test_what_breaks_off_is_told_and_what_is_wrong_is_not_taken_for_it() -> None:
    world = World(1, 2, torch.device("cpu"))
    told = r"^rank 1 of 2 waited for the others .* \(Connection closed by peer \[127.0.0.1\]:31\)"
    with pytest.raises(PeerError, match=told), world.together():
        raise RuntimeError(CUT)
    with pytest.raises(PeerError), world.together():
        raise torch.distributed.DistBackendError("NCCL error")
    with pytest.raises(RuntimeError, match=r"^shapes"), world.together():
        raise RuntimeError("shapes do not fit")
    with pytest.raises(torch.OutOfMemoryError), world.together():
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_gpu_that_torch_cannot_use_is_told_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that is too old for torch: it warns, and everything would run on the CPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(distributed, "DEVICES", tmp_path)
    assert pick_device("auto").type == "cpu"
    (tmp_path / "nvidia0").touch()

    def fails() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\n?")

    monkeypatch.setattr(torch.cuda, "init", fails)
    told = (
        r"none of the GPUs that are here: The NVIDIA driver .* \(found version 12040\)\. See that"
    )
    with pytest.raises(ConfigError, match=told):
        pick_device("auto")
    assert pick_device("cpu").type == "cpu"
    found = doctor.accelerator()
    assert not found.ok
    assert "too old" in found.found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    assert doctor.accelerator().ok
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    assert "install gcc" in doctor.accelerator().remedy
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert pick_device("auto").type == "cpu"
    for ratio, quickest in ((0.2, "bfloat16"), (0.9, "float32")):
        monkeypatch.setattr(compute, "bfloat16_products", lambda ratio=ratio: ratio)
        monkeypatch.setattr(compute, "lacking", lambda: "avx512_fp16")
        assert f"'{quickest}' trains wide transformers quickest" in doctor.accelerator().found
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    # Of another job on a shared machine: control groups refuse to open it.
    (tmp_path / "nvidia0").unlink()
    (tmp_path / "nvidia0").symlink_to(tmp_path / "nothing")
    assert pick_device("auto").type == "cpu"


@pytest.mark.parametrize(
    ("device", "fails", "leaves"), [("cuda", True, 0), ("cuda", False, 1), ("cpu", True, 1)]
)
def test_a_rank_of_nccl_that_fails_does_not_wait_for_the_others(
    device: str, fails: bool, leaves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for it, and why it failed would never be told: NCCL leaves all together."""
    left: list[bool] = []
    fake = SimpleNamespace(
        init_process_group=lambda *_, **__: None,
        new_group=lambda **_: None,
        destroy_process_group=lambda: left.append(True),
    )
    monkeypatch.setattr(distributed, "dist", fake)
    store = torch.distributed.HashStore()
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    joined = distributed._joined(0, 2, torch.device(device), datetime.timedelta(seconds=9))
    with contextlib.suppress(ConfigError), joined:
        if fails:
            raise ConfigError("why it failed")
    assert len(left) == leaves


def test_processes_of_a_machine_share_its_cores_for_compilers_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "cores", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "")
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    before = torch.get_num_threads()
    with distributed.connect("cpu", threads=before):
        assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "2"


@pytest.mark.parametrize(("here", "given", "used"), [(1, None, 8), (4, None, 2), (4, 3, 3)])
def test_ranks_share_the_cores_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, here: int, given: int | None, used: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(distributed, "cores", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    with distributed.connect("cpu", threads=given):
        assert asked[:1] == [used]


def test_processes_that_have_not_a_core_each_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "cores", lambda: 1)
    assert distributed.told_of_cores(1) is None
    assert "8 processes share 1 core on" in str(distributed.told_of_cores(8))


@settings(max_examples=60, deadline=None)
@given(
    bit=st.integers(0, 31), at=st.integers(0, 29), table=st.integers(0, 2), seed=st.integers(0, 99)
)
def test_a_fingerprint_changes_with_every_bit(bit: int, at: int, table: int, seed: int) -> None:
    drawn = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(seed))
    tables = [*drawn.unbind(), torch.tensor(7.0), torch.arange(3), torch.ones(2).bfloat16()]
    before = gauges.fingerprint(tables)
    assert before == gauges.fingerprint([one.clone() for one in tables])
    # 2^31 is the sign.
    tables[table].view(torch.int32).view(-1)[at] ^= (1 << bit) - (bit == 31) * 2**32
    assert gauges.fingerprint(tables) != before
    assert 0 <= before < 2**62


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_a_fingerprint_has_the_highest_bits_of_wide_numbers(dtype: torch.dtype) -> None:
    table = torch.ones(2, 3, dtype=dtype)
    before = gauges.fingerprint([table])
    for bit in range(64):
        changed = table.clone()
        # 2^63 is the sign.
        changed.view(torch.int64)[1, 2] ^= (1 << bit) - (bit == 63) * 2**64
        assert gauges.fingerprint([changed]) != before


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ([7, 7, 8, 7], r"^rank 2 of 4 is apart from the others at image 64: .* one kind"),
        ([7, 8, 9, 7, 7], r"^rank 1, 2 of 5 is"),
        ([7, 8], r"^the 2 ranks are apart at image 64: "),
    ],
)
def test_ranks_that_are_apart_are_told_before_anything_is_written(
    told: list[int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "each_says", lambda *_: told)
    monkeypatch.setattr(guards, "replicated", lambda _: [torch.zeros(1)])
    world = World(0, len(told), torch.device("cpu"))
    run: Any = SimpleNamespace(world=world, images_seen=64, persisted=0, since_report=[])
    run.learner = SimpleNamespace(shards=None)
    with pytest.raises(ReplicaError, match=said):
        train.persist(run)
    told[:] = [7] * len(told)
    guards.refuse_apart(run)


def test_the_first_rank_is_waited_for_as_long_as_it_says_that_it_is_at_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[bool] = []
    monkeypatch.setattr(World, "first_says", lambda _, number: said.append(number) or number)
    others = iter([False, False, True, *[False] * 99])
    monkeypatch.setattr(World, "some_say", lambda *_: next(others))
    world = World(0, 2, torch.device("cpu"), timeout_seconds=0.1)
    with world.first_at_work() as wanted:
        assert not wanted.is_set()
        time.sleep(0.2)
        assert said.count(True) == len(said) >= 5
        assert wanted.is_set()
    assert said.pop() is False
    # Whoever hangs is not spoken for for ever.
    said.clear()
    monkeypatch.setattr(distributed, "MOST_WAITS", 1)
    with world.first_at_work():
        time.sleep(0.3)
    assert 5 <= said.count(True) <= 10
    first, told = iter([True, True, False, True]), []
    monkeypatch.setattr(World, "first_says", lambda *_: next(first))
    monkeypatch.setattr(World, "some_say", lambda _, asked: told.append(asked))
    with World(1, 2, torch.device("cpu")).first_at_work(lambda: len(told) > 0):
        pass
    assert list(first) == [True]
    assert told == [False, True]


@pytest.mark.parametrize("kind", [PeerError, torch.OutOfMemoryError])
def test_the_first_rank_learns_at_the_end_of_its_work_that_the_others_were_not_told(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def gone(_: World, at_work: int) -> int:
        if at_work:
            raise kind("rank 1 does not answer")
        return 0

    monkeypatch.setattr(World, "first_says", gone)
    world, done = World(0, 2, torch.device("cpu"), timeout_seconds=0.01), []
    with pytest.raises(kind, match="rank 1"), world.first_at_work():
        done.append(time.sleep(0.05) or "whole")
    assert done == ["whole"]
    # What went wrong here comes before what others make of it.
    with pytest.raises(KeyError), world.first_at_work():
        raise KeyError


class Hangs:
    """A collective that ends when it is told to."""

    def __init__(self, *, done: bool = False) -> None:
        self.done = done

    def is_completed(self) -> bool:
        return self.done


def test_a_collective_that_does_not_end_is_told_once_and_others_are_forgotten() -> None:
    ages: list[float] = []
    slow, hangs = Hangs(), Hangs()
    with contextlib.closing(Watch(0.3, ages.append)) as watch:
        for work in (Hangs(done=True), slow, Hangs(done=True)):
            watch.add(work)
        time.sleep(0.2)
        slow.done = True
        time.sleep(0.2)
        assert len(watch._under_way) == 0
        assert ages == []
        watch.add(hangs)
        time.sleep(0.6)
    assert len(ages) == 1
    assert 0.3 < ages[0] < 0.5


@pytest.mark.slow
def test_where_waiting_never_ends_a_silent_rank_is_named_all_the_same(tmp_path: Path) -> None:
    """As on GPUs, where a wait returns at once and the next copy to the host hangs."""
    left = tmp_path / "words"
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    ended = subprocess.run(
        [sys.executable, *line, str(left), "hangs"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode != 0
    assert re.match(r"rank 0 of 2 waited \d s for the others and rank 1 does not", left.read_text())
    assert f"error: {left.read_text()}" in ended.stderr


def hangs(left: Path) -> None:
    """One rank does not come, and the other hangs without a word of its own."""

    def stalled(words: str) -> None:
        left.write_text(words)
        distributed.end_at_once(words)

    with distributed.connect("cpu", threads=1, timeout_seconds=600) as world:
        watch = distributed.watch_of(replace(world, timeout_seconds=2.0), stalled)
        if world.is_first:
            replace(world, watch=watch).begin_sum(torch.zeros(1))
        time.sleep(600)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("harm", ["none", "of the store", "on the way"])
def test_every_rank_verifies_what_it_is_given_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, harm: str
) -> None:
    """The first one is right about the store, and another says what it alone has seen."""
    store = LocalStore(tmp_path)
    good, bad = b"tensors" * 9, b"tensirs" * 9
    store.write_once("a/file", bad if harm == "of the store" else good)
    monkeypatch.setattr(World, "first_at_work", lambda _: contextlib.nullcontext())
    found = IntegrityError("a/file is damaged")
    told = f"2 {found}" if harm == "of the store" else ""
    monkeypatch.setattr(World, "first_tells", lambda world, text: text if world.is_first else told)
    given = bad if harm == "on the way" else good
    monkeypatch.setattr(World, "first_gives", lambda world, data: data or given)
    read = shared_read(store, World(rank, 2, torch.device("cpu")))
    wanted = [("a/file", Blob.of(good))]
    if harm == "of the store":
        with pytest.raises(IntegrityError, match="is damaged"):
            list(read(wanted))
    elif harm == "on the way" and rank == 1:
        with pytest.raises(ReplicaError, match=r"rank 1 of 2 was given other bytes of \S+a/file"):
            list(read(wanted))
    else:
        assert list(read(wanted)) == [good]


@pytest.mark.slow
def test_a_store_that_is_slower_than_the_time_out_of_collectives_ends_no_training(
    tmp_path: Path,
) -> None:
    ended, left = in_a_pair(tmp_path, "ddp", "slow")
    assert ended.returncode == 0, ended.stderr
    assert "sealed, content" in ended.stderr
    assert not left.exists()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("how", ["killed", "stalled"])
def test_a_rank_that_is_gone_or_silent_is_named_within_the_time_out(
    tmp_path: Path, parallel: str, how: str
) -> None:
    began = time.monotonic()
    told = ended_badly(tmp_path, parallel, how)
    assert told.startswith("rank 0 of 2 waited")
    assert "and rank 1 does not answer" in told
    # Torchrun gives a rank 30 s to end in.
    assert time.monotonic() - began < 120


@pytest.mark.slow
def test_one_flipped_bit_of_one_rank_ends_the_training_before_it_is_kept(tmp_path: Path) -> None:
    told = ended_badly(tmp_path, "ddp", "flipped")
    assert told.startswith("the 2 ranks are apart at image "), told
    kept = [file for file in tmp_path.rglob("checkpoints/*") if "chain" not in file.parts]
    assert kept == []


def ended_badly(tmp_path: Path, parallel: str, how: str) -> str:
    """What two ranks leave as their error, of which the second does something on its way."""
    ended, left = in_a_pair(tmp_path, parallel, how)
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr.partition("elastic")[0]
    return left.read_text()


def in_a_pair(
    tmp_path: Path, parallel: str, how: str
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A training by two ranks, to whom something happens, and the file of its last words."""
    made = chain.build(tmp_path / "chain", until="train")
    left, job = tmp_path / "error", tmp_path / "job.json"
    compute = ComputeConfig(parallel=parallel)  # type: ignore[arg-type]
    wanted = chain.untrained(
        *(made, tmp_path),
        **{"compute": compute, "collective_timeout_seconds": WAIT_SECONDS, "error_file": str(left)},
    )
    job.write_text(json.dumps(to_json(wanted)))
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    ended = subprocess.run(
        [sys.executable, *line, str(job), how],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    return ended, left


if __name__ == "__main__":
    if sys.argv[2] == "hangs":
        hangs(Path(sys.argv[1]))
    plain, write, seal = train.corrupted, LocalStore.write_once, LocalStore.seal

    def slow_write(store: LocalStore, key: str, data: Any) -> bool:
        time.sleep(SLOW_SECONDS * key.endswith("-000001.json"))
        return write(store, key, data)

    def slow_seal(store: LocalStore, record: Any) -> Any:
        time.sleep(SLOW_SECONDS)
        return seal(store, record)

    def fails(run: train.Run, batch: train.Batch) -> train.Corrupted:
        if run.world.rank == 1 and run.images_seen == 128:
            if sys.argv[2] == "killed":
                os.kill(os.getpid(), 9)
            if sys.argv[2] == "stalled":
                time.sleep(600)
            # Not the last bit: rounding of later updates may swallow that, and then all is well.
            weights = max(run.names, key=torch.numel).detach().view(torch.int32)
            weights.view(-1)[0] ^= 1 << 22
        return plain(run, batch)

    if sys.argv[2] == "slow":
        LocalStore.write_once, LocalStore.seal = slow_write, slow_seal
    else:
        train.corrupted = fails
    sys.exit(train.main(sys.argv[1:2]))
