"""A checkpoint is complete or not there; a damaged one is refused by name."""

import dataclasses
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eqm import checkpoint, lease, patience
from eqm.checkpoint import Position, TrainState, Writer, lease_key, load, newest, save
from eqm.errors import AwayError, IntegrityError, StoreError
from eqm.lease import LostLeaseError
from eqm.patience import Patience
from eqm.records import digest, note_from_bytes, to_json
from eqm.storage import LocalStore, Store, open_store

RUN = "d" * 64


def a_state(images_seen: int = 128) -> TrainState:
    generator = torch.Generator().manual_seed(images_seen)

    def tensors() -> dict[str, torch.Tensor]:
        return {"a.weight": torch.randn(3, 2, generator=generator), "b": torch.zeros(())}

    return TrainState(
        images_seen=images_seen,
        parameters=tensors(),
        ema=tensors(),
        optimiser={f"exp_avg/{k}": v for k, v in tensors().items()},
        history={"images": [64.0], "loss": [0.1], "gradient_norm": [2.0]},
        pending=[[0.25, 1.5]],
    )


def with_averages() -> TrainState:
    averages = {name: a_state(k).ema for k, name in enumerate(("ema-2000.5", "power-0.05"))}
    return dataclasses.replace(a_state(), averages=averages)


KEPT = {0.05: a_state(1).ema, 0.1: a_state(2).ema}


def load_newest(store: LocalStore, run: str) -> TrainState | None:
    position = newest(store, run)
    return None if position is None else load(store, run, position)


def assert_same(left: TrainState, right: TrainState) -> None:
    assert (left.images_seen, left.history, left.pending) == (
        right.images_seen,
        right.history,
        right.pending,
    )
    for name in ("parameters", "ema", "optimiser"):
        one, other = getattr(left, name), getattr(right, name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)
    assert left.averages.keys() == right.averages.keys()
    for name, tensors in left.averages.items():
        assert tensors.keys() == right.averages[name].keys()
        assert all(torch.equal(a, right.averages[name][k]) for k, a in tensors.items())


def test_round_trip(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert load_newest(store, RUN) is None
    save(store, RUN, a_state())
    found = load_newest(store, RUN)
    assert found is not None
    assert_same(found, a_state())


def test_further_averages_come_back_under_their_names(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    save(store, RUN, with_averages())
    found = load_newest(store, RUN)
    assert found is not None
    assert_same(found, with_averages())


@pytest.mark.parametrize("file_bytes", [1, 24, 28, 60, 10_000])
def test_files_are_bounded_and_cut_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int
) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", file_bytes)
    stores = [LocalStore(tmp_path / name) for name in ("one", "other")]
    keys = {save(store, RUN, with_averages()) for store in stores}
    (key,) = keys
    assert len({store.read(key) for store in stores}) == 1
    files = note_from_bytes(checkpoint.Commit, stores[0].read(key), "commit").files
    held = {
        end: checkpoint.tensors_from_bytes(stores[0].read(key.replace("json", end)))
        for end in files.keys() - {checkpoint.CURVE}
    }
    for tensors in held.values():
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= file_bytes
    # 5 parts of one tensor of 24 bytes and one of 4.
    assert len(held) == {1: 10, 24: 10, 28: 5, 60: 3, 10_000: 1}[file_bytes]
    found = load_newest(stores[0], RUN)
    assert found is not None
    assert_same(found, with_averages())


def test_the_one_with_most_images_is_found(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    # The last has one digit more than names are filled up to.
    for images in (1000, 128, 99_999, 10**12 - 1, 10**12 + 8):
        save(store, RUN, a_state(images))
        found = load_newest(store, RUN)
        assert found is not None
        assert found.images_seen == max(images, 1000)


class Stops(LocalStore):
    """A store that dies at its write number ``at``."""

    def __init__(self, root: Path, at: int) -> None:
        super().__init__(root)
        self.left = at

    def write_once(self, key: str, data: bytes | Path) -> bool:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().write_once(key, data)


def test_files_without_their_commit_are_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 24)
    save(LocalStore(tmp_path), RUN, a_state(128))
    whole = len(note_from_bytes(checkpoint.Commit, commit_of(tmp_path, 128), "commit").files)
    for written in range(whole + 1):
        with pytest.raises(KeyboardInterrupt):
            save(Stops(tmp_path, written), RUN, a_state(256))
        assert newest(LocalStore(tmp_path), RUN) == Position(128, 1)
    # Started again, it uses what is there.
    save(LocalStore(tmp_path), RUN, a_state(256))
    assert newest(LocalStore(tmp_path), RUN) == Position(256, 1)
    assert_same(load(LocalStore(tmp_path), RUN, Position(256, 1)), a_state(256))


def commit_of(root: Path, images: int) -> bytes:
    return LocalStore(root).read(f"train/{RUN}/checkpoints/{images:012d}-000001.json")


@pytest.mark.parametrize("end", ["0000.safetensors", "0002.safetensors", checkpoint.CURVE])
def test_one_flipped_bit_is_refused_with_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 60)
    store = LocalStore(tmp_path)
    key = save(store, RUN, with_averages())
    path = store.root / key.replace("json", end)
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match=rf"{end} is damaged.*delete .*{key}"):
        load_newest(store, RUN)
    (store.root / key).unlink()
    assert load_newest(store, RUN) is None


def test_bytes_are_verified_before_they_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    key = save(store, RUN, a_state())
    (store.root / key.replace("json", "0000.safetensors")).write_bytes(b"not safetensors")
    monkeypatch.setattr(checkpoint, "tensors_from_bytes", lambda _: pytest.fail("was parsed"))
    with pytest.raises(IntegrityError, match="15 bytes"):
        load_newest(store, RUN)


def test_another_schema_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    with monkeypatch.context() as older:
        older.setattr(checkpoint, "SCHEMA", "eqm-checkpoint/0")
        save(store, RUN, a_state())
    with pytest.raises(
        IntegrityError, match=r"schema 'eqm-checkpoint/0', this .* 'eqm-checkpoint/2', '.*/1'"
    ):
        load_newest(store, RUN)


def saved_by_schema_1(store: Store, state: TrainState) -> str:
    """What the program before leases and bounded files wrote."""
    parts = {"parameters": state.parameters, "ema": state.ema, "optimiser": state.optimiser}
    files = {name: store.put(checkpoint.tensors_to_bytes(t)) for name, t in parts.items()}
    files["curve"] = store.put(json.dumps([state.history, state.pending]).encode())
    if state.averages:
        flat = {f"{t}/{n}": a for t, named in state.averages.items() for n, a in named.items()}
        files["averages"] = store.put(checkpoint.tensors_to_bytes(flat))
    body = {"schema": "eqm-checkpoint/1", "images_seen": state.images_seen, "files": files}
    key = f"train/{RUN}/checkpoints/{state.images_seen:012d}.json"
    stated = {"digest": digest(body)}
    store.write_once(key, json.dumps({**to_json(body), **stated}, indent=1).encode())
    return key


@pytest.mark.parametrize("state", [a_state(), with_averages()], ids=["plain", "averages"])
def test_checkpoints_of_schema_1_are_read(tmp_path: Path, state: TrainState) -> None:
    store = LocalStore(tmp_path)
    key = saved_by_schema_1(store, state)
    assert newest(store, RUN) == Position(128, 0)
    assert_same(load(store, RUN, Position(128, 0)), state)
    named = json.loads(store.read(key))["files"]["ema"]["sha256"]
    (store.root / "blobs" / "sha256" / named).write_bytes(b"")
    with pytest.raises(IntegrityError, match=rf"{named} is damaged.*delete .*{key}"):
        load(store, RUN, Position(128, 0))


@pytest.mark.parametrize("old", ["128", "sha256", '"size_bytes": ', '"token": 1'])
def test_a_changed_commit_is_refused(tmp_path: Path, old: str) -> None:
    store = LocalStore(tmp_path)
    key = save(store, RUN, a_state())
    path = store.root / key
    text = path.read_text()
    edited = text.replace(old, old.replace("128", "192").replace("sha", "shb") + "1" * (":" in old))
    assert edited != text
    path.chmod(0o644)
    path.write_text(edited)
    with pytest.raises(IntegrityError, match=rf"delete .*{key}"):
        load_newest(store, RUN)


def test_a_lost_file_is_told_with_the_way_on(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    key = save(store, RUN, a_state())
    (tmp_path / key.replace("json", "0000.safetensors")).unlink()
    with pytest.raises(IntegrityError, match=rf"does not exist.*delete .*{key}"):
        load_newest(store, RUN)


# -- back into place ----------------------------------------------------------------------------


class Counting(LocalStore):
    """A store that writes down what is read of it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.keys: list[str] = []

    def read(self, key: str) -> bytes:
        self.keys.append(key)
        return super().read(key)


def places(state: TrainState) -> dict[str, torch.Tensor]:
    """Tensors that a state fits into, with other numbers in them."""
    return {name: torch.full_like(t, -7.0) for name, t in checkpoint._flat(state).items()}


@pytest.mark.parametrize("file_bytes", [24, 60, 10_000])
def test_a_state_is_put_into_tensors_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int
) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", file_bytes)
    store = LocalStore(tmp_path)
    save(store, RUN, with_averages())
    there, asked = places(with_averages()), Counting(tmp_path)
    held = dict(there)
    with checkpoint.opened(asked, RUN, Position(128, 1)) as found:
        # Tensors are read when they are asked for, a few files at a time.
        assert len(asked.keys) == 2
        next(found.files)
        assert len(asked.keys) <= 2 + 1 + checkpoint.AHEAD
    # Whoever leaves in the middle leaves no thread behind.
    assert not [one for one in threading.enumerate() if one.name.startswith("checkpoint-files")]
    assert asked.keys == sorted(asked.keys, key=lambda key: key.endswith(".safetensors"))
    with checkpoint.opened(store, RUN, Position(128, 1)) as found:
        checkpoint.fill(there, found.files)
    assert (found.images_seen, found.curve) == (
        128,
        {"history": a_state().history, "pending": a_state().pending},
    )
    for name, tensor in checkpoint._flat(with_averages()).items():
        assert there[name] is held[name]
        assert torch.equal(there[name], tensor)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("ema/b"), r"it holds ema/b, and this run has none"),
        (
            lambda t: t.update({"ema/a.weight": torch.zeros(2, 3)}),
            r"a\.weight is float32 \(3, 2\), and this run has float32 \(2, 3\)",
        ),
        (lambda t: t.update({"ema/b": torch.zeros((), dtype=torch.float64)}), r"has float64 \(\)"),
        (
            lambda t: t.update({"ema/c": torch.zeros(1), "averages/x/c": torch.zeros(1)}),
            r"averages/x/c is not in it \(2 tensors\)",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_with_the_way_on(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], told: str
) -> None:
    store = LocalStore(tmp_path)
    key = save(store, RUN, a_state())
    there = places(a_state())
    change(there)
    with (
        pytest.raises(IntegrityError, match=rf"cannot be used: .*{told}.*delete .*{key}"),
        checkpoint.opened(store, RUN, Position(128, 1)) as found,
    ):
        checkpoint.fill(there, found.files)


# -- beside the training ------------------------------------------------------------------------


class Slow(LocalStore):
    """A store that lets nothing be written until it is told to, and then perhaps fails."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.go, self.full = threading.Event(), "nowhere"

    def write_once(self, key: str, data: bytes | Path) -> bool:
        assert self.go.wait(60)
        if key.startswith(self.full):
            raise StoreError("the disk is full")
        return super().write_once(key, data)


class Together(LocalStore):
    """Takes files of tensors three at a time, and no other way."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.meeting = threading.Barrier(3, timeout=20)

    def write_once(self, key: str, data: bytes) -> bool:
        if key.endswith(".safetensors"):
            self.meeting.wait()
        return super().write_once(key, data)


def test_files_are_written_several_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Six files.
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 16)
    save(Together(tmp_path), RUN, a_state())
    assert_same(load(LocalStore(tmp_path), RUN, Position(128, 1)), a_state())


def test_a_state_is_written_as_it_was_while_it_is_changed(tmp_path: Path) -> None:
    store = Slow(tmp_path)
    writer = Writer(store, RUN, keep=3)
    state = with_averages()
    writer.write(state)
    for tensors in (state.parameters, state.ema, state.optimiser, *state.averages.values()):
        for tensor in tensors.values():
            tensor.fill_(7)
    state.history["loss"].append(7.0)
    state.pending.append([7.0, 7.0])
    assert newest(store, RUN) is None
    store.go.set()
    writer.wait()
    writer.close()
    assert_same(load(store, RUN, Position(128, 1)), with_averages())


def test_the_next_write_waits_for_the_one_before_it(tmp_path: Path) -> None:
    store = Slow(tmp_path)
    writer = Writer(store, RUN, keep=3)
    writer.write(a_state(128))
    threading.Timer(0.2, store.go.set).start()
    writer.write(a_state(256))
    assert newest(store, RUN) is not None
    assert writer.stalled_seconds > 0.1
    writer.wait()
    for images in (128, 256):
        assert_same(load(store, RUN, Position(images, 1)), a_state(images))


def test_what_failed_in_the_background_is_raised_and_nothing_is_sealed_on_it(
    tmp_path: Path,
) -> None:
    store = Slow(tmp_path)
    writer = Writer(store, RUN, keep=3)
    writer.snapshot(128, KEPT)
    writer.write(a_state(128))
    assert not writer.failed
    # There is room for the checkpoint, but not for the snapshot before it.
    store.full = "blobs/"
    store.go.set()
    while not writer.failed:
        time.sleep(0.001)
    store.full = "nowhere"
    # Told where all processes of a training meet, which is at no snapshot.
    writer.snapshot(256, KEPT)
    for again in (lambda: writer.write(a_state(256)), writer.wait):
        with pytest.raises(StoreError, match="disk is full"):
            again()
    writer.close()
    assert LocalStore(tmp_path).list("train/") == []


class Away(LocalStore):
    """A store that fails twice at each of its keys, and otherwise for as long as it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.failed: Counter[str] = Counter()
        self.gone = False

    def write_once(self, key: str, data: bytes | Path) -> bool:
        if self.gone or self.failed[key] < 2:
            self.failed[key] += 1
            raise AwayError("S3 cannot be reached")
        return super().write_once(key, data)


def test_a_store_that_is_away_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FIRST_SECONDS", 0.001)
    store = Away(tmp_path)
    writer = Writer(store, RUN, keep=3, patience=Patience(60))
    writer.snapshot(128, KEPT)
    writer.write(with_averages())
    writer.wait()
    assert set(store.failed.values()) == {2}
    assert_same(load(store, RUN, Position(128, 1)), with_averages())
    assert len(checkpoint.read_snapshot(store, RUN, 128).tracks) == len(KEPT)


def test_whoever_ends_waits_for_no_store(tmp_path: Path) -> None:
    store = Away(tmp_path)
    store.gone = True
    writer = Writer(store, RUN, keep=3, patience=Patience(600))
    writer.write(a_state())
    while not store.failed:
        time.sleep(0.001)
    began = time.monotonic()
    writer.close()
    assert time.monotonic() - began < 10
    with pytest.raises(AwayError, match="cannot be reached"):
        writer.wait()


def test_who_lost_the_lease_while_the_store_was_away_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FIRST_SECONDS", 0.001)
    asked: list[str] = []

    def check() -> None:
        asked.append("")
        if len(asked) == 2:
            raise LostLeaseError("it is not ours any more")

    with pytest.raises(LostLeaseError):
        save(Away(tmp_path), RUN, a_state(), check=check, patience=Patience(60))
    assert newest(LocalStore(tmp_path), RUN) is None


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_patience_is_bounded_and_for_what_time_mends_alone(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FIRST_SECONDS", 0.01)
    asked: list[type[StoreError]] = []

    def fails(kind: type[StoreError]) -> None:
        asked.append(kind)
        raise kind("no")

    for kind in (StoreError, AwayError):
        with pytest.raises(kind):
            Patience(seconds)(lambda kind=kind: fails(kind))
    assert asked.count(StoreError) == 1
    assert (asked.count(AwayError) > 1) == (seconds > 0)


def test_a_store_that_says_nothing_is_waited_for_as_long_as_one_that_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes four minutes to fail once; the other ranks wait for ten, for twice the patience."""
    clock, patient = [0.0], Patience(300)
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    over = SimpleNamespace(wait=lambda seconds: passes(seconds), is_set=lambda: False)
    monkeypatch.setattr(patient, "_over", over)

    def passes(seconds: float) -> None:
        clock[0] += seconds

    def silent() -> None:
        passes(240)
        raise AwayError("S3 does not answer")

    with pytest.raises(AwayError):
        patient(silent)
    assert 300 <= clock[0] < 600


# -- more than one trainer ----------------------------------------------------------------------


def takes_over(store: Store) -> lease.Held:
    """The next holder of the run's lease, whose former one has given it back or is dead."""
    return lease.acquire(store, lease_key(RUN), seconds=1, fix=checkpoint.terms(store, RUN))


def write(store: Store, held: lease.Held, *positions: int, keep: int = 3) -> None:
    writer = Writer(store, RUN, keep=keep, mine=held)
    for images in positions:
        writer.write(a_state(images))
    writer.wait()
    writer.close()


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.services)])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return LocalStore(tmp_path)
    request.getfixturevalue("s3_environment")
    return open_store(f"s3://eqm/test-{tmp_path.name}", cache=tmp_path / "cache")


def test_the_newest_stay_and_what_is_left_of_others_goes(any_store: Store) -> None:
    store = any_store
    old = saved_by_schema_1(store, a_state(64))
    shared = store.put(b"a blob of another run")
    store.write_once(
        f"train/{RUN}/checkpoints/{99:012d}-000001.0000.safetensors", b"left of a kill"
    )
    checkpoint.save_snapshot(store, RUN, 128, KEPT)
    held = takes_over(store)
    assert held.token == 2
    write(store, held, 128, 192, 256, 320, 384, keep=2)
    assert checkpoint.complete(store, RUN) == [(64, 0), (320, 2), (384, 2)]
    found = {key.rpartition("/")[2] for key in store.list(f"train/{RUN}/checkpoints/")}
    ends = ("json", "curve.json", "0000.safetensors")
    new = {f"{images:012d}-000002.{end}" for images in (320, 384) for end in ends}
    assert found == {old.rpartition("/")[2], *new}
    assert_same(load(store, RUN, Position(64, 0)), a_state(64))
    assert_same(load(store, RUN, Position(384, 2)), a_state(384))
    assert store.get(shared)
    checkpoint.read_snapshot(store, RUN, 128)


class Sleeps(LocalStore):
    """The store of a process that falls asleep right before it commits an image."""

    def __init__(self, root: Path, image: int, meanwhile: Callable[[], None]) -> None:
        super().__init__(root)
        self.image, self.meanwhile = image, meanwhile

    def write_once(self, key: str, data: bytes | Path) -> bool:
        if re.search(rf"{self.image:012d}-\d+\.json", key):
            self.meanwhile()
        return super().write_once(key, data)


@pytest.mark.parametrize("keep", [1, 3])
def test_what_a_replaced_holder_commits_late_is_never_read(tmp_path: Path, keep: int) -> None:
    store = LocalStore(tmp_path)
    successors: list[lease.Held] = []
    # It sleeps after it has checked its lease, for longer than that lasts.
    sleeper = Sleeps(tmp_path, 256, lambda: successors.append(takes_over(store)))
    old = takes_over(sleeper)
    write(sleeper, old, 128, keep=keep)
    with pytest.raises(lease.LostLeaseError, match=r"process \d+ on .* took it over \(token 2\)"):
        write(sleeper, old, 256, keep=keep)
    late = f"train/{RUN}/checkpoints/{256:012d}-000001.json"
    assert store.exists(late)
    # Neither before the new holder wrote anything, nor for whoever comes after it.
    assert newest(store, RUN) == Position(128, 1)
    (new,) = successors
    new.release()
    third = takes_over(store)
    assert newest(store, RUN) == Position(128, 1)
    write(store, third, 192)
    assert newest(store, RUN) == Position(192, 3)
    assert not store.exists(late)


def test_what_a_replaced_holder_commits_late_is_shown_by_nobody(tmp_path: Path) -> None:
    store, shown = LocalStore(tmp_path), list[int]()
    sleeper = Sleeps(tmp_path, 256, lambda: takes_over(store) and None)
    old = takes_over(sleeper)
    writer = Writer(
        *(sleeper, RUN), keep=3, mine=old, durable=lambda state: shown.append(state.images_seen)
    )
    writer.write(a_state(128))
    writer.write(a_state(256))
    with pytest.raises(lease.LostLeaseError):
        writer.wait()
    writer.close()
    assert newest(store, RUN) == Position(128, 1)
    assert shown == [128]


class Behind(LocalStore):
    """A store whose lists lack what has just been written."""

    lacking = "nothing"

    def list(self, prefix: str) -> list[str]:
        return [key for key in super().list(prefix) if self.lacking not in key]


def test_a_list_that_is_behind_costs_no_checkpoint(tmp_path: Path) -> None:
    store = Behind(tmp_path)
    old = takes_over(store)
    write(store, old, 128, 192)
    old.release()
    store.lacking = f"{192:012d}"
    for _ in range(2):
        held = takes_over(store)
        assert newest(store, RUN) == Position(192, 1)
        held.release()
    # Nor do those that what its holder seals next lets go.
    held = takes_over(store)
    write(store, held, 224, 256, keep=2)
    store.lacking = "nothing"
    there = lease.read(store, lease_key(RUN))
    assert there is not None
    # Of its own the last one: no more names than checkpoints that are kept.
    assert there.accepted == tuple(
        at.name for at in (Position(128, 1), Position(192, 1), Position(256, held.token))
    )
    # What no list names cannot be deleted either.
    own = held.token
    assert checkpoint.complete(store, RUN) == [(192, 1), (224, own), (256, own)]
    assert_same(load(store, RUN, Position(192, 1)), a_state(192))


def test_a_checkpoint_that_was_only_about_to_be_sealed_is_none(tmp_path: Path) -> None:
    store = Behind(tmp_path)
    old = takes_over(store)
    write(store, old, 128)
    old.check(sealing=Position(192, old.token).name)
    old.release()
    new = takes_over(store)
    # It comes as late as that: nobody is to read it.
    checkpoint.save(store, RUN, a_state(192), token=old.token)
    assert newest(store, RUN) == Position(128, 1)
    new.release()
    takes_over(store)
    assert newest(store, RUN) == Position(128, 1)


def test_a_snapshot_is_found_though_lists_are_behind(tmp_path: Path) -> None:
    store = Behind(tmp_path)
    for _ in range(3):
        held = takes_over(store)
        held.release()
    checkpoint.save_snapshot(store, RUN, 128, KEPT, token=1)
    checkpoint.save_snapshot(store, RUN, 128, {0.1: a_state(9).ema}, token=3)
    store.lacking = f"{128:012d}"
    assert len(checkpoint.read_snapshot(store, RUN, 128).tracks) == 1


def test_of_two_at_one_position_the_greater_token_is_read(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for _ in range(2):
        held = takes_over(store)
        write(store, held, 128)
        held.release()
    assert checkpoint.complete(store, RUN) == [(128, 1), (128, 2)]
    assert newest(store, RUN) == Position(128, 2)


def test_snapshots_of_the_greater_token_are_read(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    other = {sigma: a_state(9).ema for sigma in KEPT}
    for token, averages in ((2, KEPT), (1, other)):
        checkpoint.save_snapshot(store, RUN, 128, averages, token=token)
    for track in checkpoint.read_snapshot(store, RUN, 128).tracks:
        found = checkpoint.tensors_from_bytes(store.get(track.tensors))
        assert all(torch.equal(found[name], a) for name, a in KEPT[track.sigma_rel].items())


def keep_snapshots(store: Store, held: lease.Held, images: int, sigma: float) -> None:
    """Make a snapshot durable as a training does, without the checkpoint after it."""
    writer = Writer(store, RUN, keep=1, mine=held)
    writer.snapshot(images, {sigma: a_state(images).ema})
    writer.wait()
    writer.close()


def test_snapshots_that_a_replaced_holder_commits_late_go_once_there_are_others(
    any_store: Store,
) -> None:
    store = any_store
    first = takes_over(store)
    keep_snapshots(store, first, 64, 0.1)
    write(store, first, 64)
    first.release()
    second = takes_over(store)
    # It slept, and writes on by the token that it had: an older position, and one to come.
    zombie = a_state(9).ema
    for images in (128, 192):
        checkpoint.save_snapshot(store, RUN, images, {0.1: zombie}, token=first.token)
    keep_snapshots(store, second, 128, 0.1)
    write(store, second, 128)
    left = [key.rpartition("/")[2] for key in store.list(f"train/{RUN}/snapshots/")]
    # The first stands, though its writer is gone: no other has it. So does the last, unread yet.
    assert left == [f"{64:012d}-000001.json", f"{128:012d}-000002.json", f"{192:012d}-000001.json"]
    # Also one that is written after its position was passed goes, with the next checkpoint.
    checkpoint.save_snapshot(store, RUN, 128, {0.1: zombie}, token=first.token)
    keep_snapshots(store, second, 192, 0.1)
    write(store, second, 192)
    left = [key.rpartition("/")[2] for key in store.list(f"train/{RUN}/snapshots/")]
    assert left == [f"{64:012d}-000001.json", f"{128:012d}-000002.json", f"{192:012d}-000002.json"]
    for images in (64, 128, 192):
        (track,) = checkpoint.read_snapshot(store, RUN, images).tracks
        assert store.get(track.tensors) == checkpoint.tensors_to_bytes(a_state(images).ema)


def test_what_later_holders_wrote_is_left_alone_and_commits_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is stopped between two deletes leaves no commit that names a file that is gone."""
    store, gone = LocalStore(tmp_path), []
    held = takes_over(store)
    for images in (64, 128, 192):
        save(store, RUN, a_state(images))
    later = f"train/{RUN}/checkpoints/{64:012d}-000009.curve.json"
    store.write_once(later, b"of one who took over just now")
    monkeypatch.setattr(store, "delete", gone.append)
    checkpoint.prune(store, RUN, keep=1, mine=held)
    assert later not in gone
    commits = [re.search(r"-000001\.json$", key) is not None for key in gone]
    assert commits == [True, True, *[False] * (len(gone) - 2)]
    assert len(gone) > 4


def test_a_snapshot_is_as_it_was_though_the_next_one_comes_before_it_is_written(
    tmp_path: Path,
) -> None:
    store = Slow(tmp_path)
    writer = Writer(store, RUN, keep=3)
    writer.snapshot(128, KEPT)
    threading.Timer(0.2, store.go.set).start()
    writer.snapshot(256, {s: {n: t + 1 for n, t in some.items()} for s, some in KEPT.items()})
    writer.wait()
    for track in checkpoint.read_snapshot(store, RUN, 128).tracks:
        kept = checkpoint.tensors_from_bytes(store.get(track.tensors))
        assert all(torch.equal(kept[n], t) for n, t in KEPT[track.sigma_rel].items())


def test_a_lost_lease_ends_a_training_before_the_next_write(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    held = takes_over(store)
    writer = Writer(store, RUN, keep=3, mine=held)
    assert not writer.failed
    store.delete(lease_key(RUN))
    with pytest.raises(lease.LostLeaseError):
        held.check()
    assert writer.failed
    with pytest.raises(lease.LostLeaseError):
        writer.write(a_state(128))
    assert store.list(f"train/{RUN}/checkpoints/") == []


def test_a_replaced_holder_deletes_no_snapshot(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    old = takes_over(store)
    checkpoint.save_snapshot(store, RUN, 128, KEPT, token=1)
    old.release()
    new = takes_over(store)
    checkpoint.save_snapshot(store, RUN, 128, KEPT, token=new.token)
    before = store.list("")
    with pytest.raises(lease.LostLeaseError):
        checkpoint.prune(store, RUN, keep=1, mine=old)
    assert store.list("") == before


def test_a_snapshot_that_is_replaced_while_it_is_looked_for_is_found(tmp_path: Path) -> None:
    class Replaced(LocalStore):
        def list(self, prefix: str) -> list[str]:
            found = super().list(prefix)
            if f"{prefix}{128:012d}-000001.json" in found:
                checkpoint.save_snapshot(LocalStore(self.root), RUN, 128, KEPT, token=2)
                self.delete(f"{prefix}{128:012d}-000001.json")
            return found

    store = Replaced(tmp_path)
    checkpoint.save_snapshot(store, RUN, 128, {0.1: a_state(9).ema}, token=1)
    assert len(checkpoint.read_snapshot(store, RUN, 128).tracks) == len(KEPT)


# -- snapshots ----------------------------------------------------------------------------------


def test_snapshots_come_back_and_the_first_of_a_position_stands(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    key = checkpoint.save_snapshot(store, RUN, 128, KEPT)
    assert key == f"train/{RUN}/snapshots/000000000128-000001.json"
    again = {sigma: a_state(7).ema for sigma in KEPT}
    assert checkpoint.save_snapshot(store, RUN, 128, again) == key
    commit = checkpoint.read_snapshot(store, RUN, 128)
    assert [track.sigma_rel for track in commit.tracks] == [0.05, 0.1]
    for track in commit.tracks:
        found = checkpoint.tensors_from_bytes(store.get(track.tensors))
        assert all(torch.equal(found[name], a) for name, a in KEPT[track.sigma_rel].items())
    assert newest(store, RUN) is None


@pytest.mark.parametrize("harm", ["flip", "lose", "edit", "move", "never"])
def test_snapshots_that_cannot_be_used_are_told_with_the_way_on(tmp_path: Path, harm: str) -> None:
    store = LocalStore(tmp_path)
    key = checkpoint.save_snapshot(store, RUN, 128, KEPT)
    commit = store.root / key
    (blob,) = (
        store.root / track.tensors.key
        for track in checkpoint.read_snapshot(store, RUN, 128).tracks
        if track.sigma_rel == 0.1
    )
    data = blob.read_bytes()
    for path in (blob, commit):
        path.chmod(0o644)
    if harm == "flip":
        blob.write_bytes(data[:-1] + bytes([data[-1] ^ 4]))
    elif harm == "lose":
        blob.unlink()
    elif harm == "edit":
        commit.write_text(commit.read_text().replace("0.05", "0.06"))
    elif harm == "never":
        commit.unlink()
    else:
        commit.rename(commit.with_name("000000000192-000001.json"))
    images = 192 if harm == "move" else 128
    with pytest.raises(
        IntegrityError, match=rf"snapshot .*/0*{images}(-000001)?\.json cannot .* from image"
    ):
        checkpoint.read_snapshot(LocalStore(tmp_path), RUN, images)
