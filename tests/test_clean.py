"""What may be deleted from a store, and what must never be: a whole chain, aged, in pieces."""

import dataclasses
import datetime
import os
import threading
import time
from pathlib import Path

import boto3
import chain
import pytest
import torch

from eqm import checkpoint, clean, lease, train
from eqm.clean import survey, sweep
from eqm.config import SamplerConfig, replace
from eqm.errors import ConfigError, IntegrityError
from eqm.records import Record, note_from_bytes
from eqm.stage import job_digest, open_ref, verify
from eqm.storage import LocalStore, open_store

NOW = datetime.datetime.now(datetime.UTC)
MONTH = 30 * 24 * 3600.0


@pytest.fixture
def store(tmp_path: Path, tiny: chain.Chain) -> LocalStore:
    """A sealed chain that is 40 days old."""
    made = chain.copied(tiny, tmp_path / "store", without=())
    age(made)
    return made


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.getbasetemp() / "chain")


def age(store: LocalStore, *, days: float = 40) -> None:
    then = NOW.timestamp() - days * 24 * 3600
    for path in store.root.rglob("*"):
        os.utime(path, (then, then))


def look(store: LocalStore) -> clean.Survey:
    return survey(store, older_than_seconds=MONTH, now=NOW)


def whole(store: LocalStore, tiny: chain.Chain) -> None:
    """All that the chain sealed is there and undamaged, shards and all."""
    for sealed in tiny.records.values():
        found = open_ref(store, sealed.ref)
        verify(store, found)
    assert chain.run(chain.elsewhere(tiny.job("evaluation"), store.root)) == tiny["evaluation"]


def test_a_sealed_chain_is_kept_and_its_scaffolding_is_not(
    store: LocalStore, tiny: chain.Chain
) -> None:
    found = look(store)
    assert found.condemned["abandoned"] == ()
    folders = {
        one.key.split("/")[0] + "/" + one.key.split("/")[2]
        for one in found.condemned["scaffolding"]
    }
    assert folders == {"train/checkpoints", "samples/parts", "reference/parts"}
    before = set(store.list(""))
    gone = sweep(store, older_than_seconds=MONTH, now=NOW)
    assert set(gone.keys) == set(found.keys) == before - set(store.list(""))
    whole(store, tiny)
    # The parts of samples were blobs of their own: they go with what named them.
    assert gone.condemned["blobs"]
    assert look(store).keys == []


def test_shards_are_named_by_their_manifest_alone(store: LocalStore, tiny: chain.Chain) -> None:
    for key in store.list(f"latents/{tiny['latents'].digest}/shards/"):
        store.delete(key)
    sweep(store, older_than_seconds=MONTH, now=NOW)
    whole(store, tiny)


def test_what_nothing_names_goes_when_it_is_old(store: LocalStore) -> None:
    sweep(store, older_than_seconds=MONTH, now=NOW)
    old, young = store.put(b"of an attempt that was killed"), store.put(b"of one under way")
    then = NOW.timestamp() - MONTH - 60
    os.utime(store.root / old.key, (then, then))
    assert look(store).keys == [old.key]
    gone = sweep(store, older_than_seconds=MONTH, now=NOW + datetime.timedelta(seconds=1))
    assert gone.keys == [old.key]
    assert not store.holds(old)
    assert store.holds(young)
    notes = store.list("cleanings/")
    assert len(notes) == 2
    assert old.key in store.read(notes[-1]).decode()


def test_what_was_deleted_once_goes_again(store: LocalStore) -> None:
    sweep(store, older_than_seconds=MONTH, now=NOW)
    for hour in (1, 2):
        again = store.put(b"of an attempt that is killed every time")
        age(store)
        now = NOW + datetime.timedelta(hours=hour)
        assert sweep(store, older_than_seconds=MONTH, now=now).keys == [again.key]
        assert not store.holds(again)


def test_many_go_at_once_but_data_after_what_names_them(
    store: LocalStore, tiny: chain.Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsealed(store, tiny)
    gone: list[str] = []
    beside, most, lock = 0, 0, threading.Lock()

    def slowly(self: LocalStore, key: str) -> None:
        nonlocal beside, most
        with lock:
            beside += 1
            most = max(most, beside)
        time.sleep(0.005)
        with lock:
            beside -= 1
            gone.append(key)

    monkeypatch.setattr(LocalStore, "delete", slowly)
    found = sweep(store, older_than_seconds=MONTH, now=NOW)
    assert sorted(gone) == sorted(found.keys)
    assert most > 1
    abandoned = [one.key for one in found.condemned["abandoned"]]
    kinds = [key.endswith(".json") for key in gone if key in abandoned]
    assert kinds == sorted(kinds, reverse=True)
    assert {True, False} == set(kinds)


def test_what_is_stored_again_is_new(store: LocalStore) -> None:
    blob = store.put(b"of an attempt that was killed")
    then = NOW.timestamp() - MONTH - 60
    os.utime(store.root / blob.key, (then, then))
    assert blob.key in look(store).keys
    assert store.put(b"of an attempt that was killed") == blob
    assert blob.key not in look(store).keys


def test_what_is_named_while_the_first_look_is_taken_stays(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = store.put(b"sealed in the last moment")
    then = NOW.timestamp() - MONTH - 60
    os.utime(store.root / blob.key, (then, then))
    looked = clean.survey

    def seals_afterwards(*given: object, **more: object) -> clean.Survey:
        found = looked(*given, **more)  # type: ignore[arg-type]
        store.seal(named("study", blob.sha256))
        return found

    monkeypatch.setattr(clean, "survey", seals_afterwards)
    gone = sweep(store, older_than_seconds=MONTH, now=NOW)
    assert blob.key not in gone.keys
    assert store.holds(blob)


def test_scaffolding_that_is_partly_young_stays_whole(store: LocalStore, tiny: chain.Chain) -> None:
    """Half of a checkpoint serves nobody who reads it just now."""
    folder = f"train/{tiny['train'].digest}/checkpoints/"
    before = store.list(folder)
    assert len(before) > 1
    os.utime(store.root / before[-1])
    sweep(store, older_than_seconds=MONTH, now=NOW)
    assert store.list(folder) == before


def test_what_is_stored_again_while_others_go_stays(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(store, older_than_seconds=MONTH, now=NOW)
    monkeypatch.setattr(clean, "READERS", 1)
    first, last = sorted((store.put(b"one"), store.put(b"another")), key=lambda blob: blob.key)
    age(store)
    deleted = LocalStore.delete

    def stores_again(self: LocalStore, key: str) -> None:
        deleted(self, key)
        store.refresh(last)

    monkeypatch.setattr(LocalStore, "delete", stores_again)
    gone = sweep(store, older_than_seconds=MONTH, now=NOW + datetime.timedelta(seconds=1))
    assert gone.keys == [first.key]
    assert store.holds(last)
    # The note of this sweep came later.
    assert gone.kept == len(store.list("")) - 1


def test_what_a_training_may_name_stays_where_it_goes_on_meanwhile(
    store: LocalStore, tiny: chain.Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsealed(store, tiny)
    monkeypatch.setattr(clean, "READERS", 1)
    names, *later = clean._in_turn(look(store).keys)
    rest = {key for turn in later for key in turn}
    assert len(names) > 1
    assert names[-1].endswith(".json")
    assert rest
    deleted = LocalStore.delete

    def goes_on(self: LocalStore, key: str) -> None:
        deleted(self, key)
        if (self.root / names[-1]).exists():
            os.utime(self.root / names[-1])

    monkeypatch.setattr(LocalStore, "delete", goes_on)
    gone = sweep(store, older_than_seconds=MONTH, now=NOW)
    assert not rest & set(gone.keys)
    assert rest | {names[-1]} <= set(store.list(""))


def named(stage: str, digest: str) -> Record:
    """A record of a kind that nobody knows, which names a blob among its values."""
    values = {"found": {"at": f"blobs/sha256/{digest}"}}
    return Record(stage=stage, algorithm=1, config={}, inputs={}, outputs={}, values=values)


def test_any_record_keeps_what_it_names_anywhere(store: LocalStore) -> None:
    blob = store.put(b"of a stage that is yet to be invented")
    store.seal(named("invention", blob.sha256))
    age(store)
    assert blob.key not in look(store).keys


@pytest.mark.parametrize("where", ["outputs", "logs"])
def test_what_a_list_of_a_record_names_stays(store: LocalStore, where: str) -> None:
    """A list is no part of what came out where it differs from run to run; what it names is kept.

    The names stand in its bytes alone, and not in the record.
    """
    sweep(store, older_than_seconds=MONTH, now=NOW)
    named_by_list = store.put(b"a picture of a training")
    listed = store.put(f'{{"picture": "{named_by_list.sha256}"}}'.encode())
    record = named("invention", "0" * 64)
    store.seal(dataclasses.replace(record, **{where: {"events.json": listed}}))
    age(store)
    assert look(store).keys == []


def test_what_is_stored_again_is_not_nearly_old(store: LocalStore) -> None:
    """At the least age there is: whoever stored it has yet to name it."""
    blob = store.put(b"about to be named")
    then = time.time() - clean.LEAST_SECONDS + 60
    os.utime(store.root / blob.key, (then, then))
    assert store.put(b"about to be named") == blob
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=10)
    found = survey(store, older_than_seconds=clean.LEAST_SECONDS, now=later)
    assert blob.key not in found.keys


def test_what_checkpoints_name_stays_though_they_are_replaced_while_it_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that lives: by the time that its commits are read, others are in their place."""
    store, digest = LocalStore(tmp_path), "0" * 64
    picture = store.put(b"a picture of last month")
    named = f'{{"sha256": "{picture.sha256}"}}'.encode()
    segment = {"events-000000000000..000000000000": store.put(named)}
    age(store)
    with lease.held(store, checkpoint.lease_key(digest), seconds=30) as mine:
        moved = iter(range(1, 100))

        def move_on() -> None:
            weights = [{"w": torch.zeros(1)} for _ in range(3)]
            state = checkpoint.TrainState(next(moved), *weights, {}, [])
            state = dataclasses.replace(state, events=segment)
            checkpoint.save(store, digest, state, token=mine.token)
            checkpoint.prune(store, digest, keep=1, mine=mine)

        by_stage = clean._by_stage
        monkeypatch.setattr(clean, "_by_stage", lambda keys: move_on() or by_stage(keys))
        move_on()
        assert sweep(store, older_than_seconds=MONTH, now=NOW).keys == []
    assert store.holds(picture)


# -- stages that are not sealed -----------------------------------------------------------------


def unsealed(store: LocalStore, tiny: chain.Chain) -> str:
    """The training as it was before its seal; its folder."""
    folder = f"train/{tiny['train'].digest}"
    for name in ("train", "samples", "evaluation"):
        store.delete(f"{name}/{tiny[name].digest}/record.json")
    return folder


def test_an_abandoned_training_goes_and_one_that_lives_stays(
    store: LocalStore, tiny: chain.Chain
) -> None:
    folder = unsealed(store, tiny)
    condemned = {one.key for one in look(store).condemned["abandoned"]}
    assert {key for key in condemned if key.startswith("train/")} == set(store.list(folder))
    # Its lease is renewed, though no checkpoint was written for long.
    digest = tiny["train"].digest
    fix = checkpoint.terms(store, digest)
    with lease.held(store, checkpoint.lease_key(digest), seconds=30, fix=fix) as mine:
        mine.check()
        assert not any(key.startswith("train/") for key in look(store).keys)
        sweep(store, older_than_seconds=MONTH, now=NOW)
        assert checkpoint.complete(store, digest)
    age(store)
    sweep(store, older_than_seconds=MONTH, now=NOW + datetime.timedelta(seconds=1))
    assert store.list(folder) == []
    # What it was built on is as it was, and it begins anew.
    again = replace(tiny.job("train"), runtime=replace(tiny.job("train").runtime, store=store.uri))
    assert chain.run(again).content == tiny["train"].content


def test_pictures_of_a_training_that_lives_stay(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = chain.untrained(
        *(tiny, tmp_path), grid_every_images=64, grid_sampler=SamplerConfig(updates=1)
    )
    step = train.step
    with monkeypatch.context() as patch:
        patch.setattr(train, "step", lambda run, batch, _: step(run, batch, run.images_seen >= 64))
        with pytest.raises(train.InterruptedTraining):
            chain.run(job)
    store, digest = chain.store_of(job), job_digest(job)
    age(store)
    fix = checkpoint.terms(store, digest)
    with lease.held(store, checkpoint.lease_key(digest), seconds=30, fix=fix) as mine:
        mine.check()
        assert sweep(store, older_than_seconds=MONTH, now=NOW).condemned["abandoned"] == ()
    record = chain.run(job)
    pictures = {name for name in record.logs if name.endswith(".png")}
    assert len(pictures) == 10
    verify(store, record)
    for name in pictures:
        assert store.get(record.logs[name]).startswith(b"\x89PNG")


def test_a_log_that_is_lost_ends_it(store: LocalStore, tiny: chain.Chain) -> None:
    folder = unsealed(store, tiny)
    (*_, commit) = [key for key in store.list(f"{folder}/checkpoints/") if clean.COMMIT.match(key)]
    for blob in note_from_bytes(checkpoint.Commit, store.read(commit), commit).events.values():
        store.delete(blob.key)
    store.write_once(f"{folder}/alive.json", b"{}")
    with pytest.raises(IntegrityError, match=r"named by train/.* is gone.*restore it"):
        sweep(store, older_than_seconds=MONTH, now=NOW)


def test_a_commit_that_is_damaged_ends_it(store: LocalStore, tiny: chain.Chain) -> None:
    folder = unsealed(store, tiny)
    (*_, commit) = [key for key in store.list(f"{folder}/checkpoints/") if clean.COMMIT.match(key)]
    store.write_once(f"{folder}/alive.json", b"{}")
    for damaged in (b"[]", b"{", b'{"events": {"events-0..1": 7}}'):
        (store.root / commit).chmod(0o644)
        (store.root / commit).write_bytes(damaged)
        with pytest.raises(IntegrityError, match=r"train/.*json is damaged .*restore it"):
            sweep(store, older_than_seconds=MONTH, now=NOW)


def test_snapshots_go_with_the_seal_but_not_what_they_hold(
    tiny: chain.Chain, tmp_path: Path
) -> None:
    job = chain.untrained(tiny, tmp_path)
    averages = {"ema_power": [0.1], "ema_snapshot_images": 320}
    config = {**job.config, "train": {**job.config["train"], **averages}}
    job = dataclasses.replace(job, config=config)
    record, store = chain.run(job), chain.store_of(job)
    folder = f"train/{record.digest}/snapshots/"
    late = {0.1: {"a": torch.zeros(3)}}
    key = checkpoint.save_snapshot(store, record.digest, 640, late, token=7)
    ours = checkpoint.read_snapshot(store, record.digest, 640).tracks[0].tensors
    age(store)
    gone = sweep(store, older_than_seconds=MONTH, now=NOW)
    assert key in gone.keys
    assert store.list(folder) == []
    assert not store.holds(ours)
    verify(store, record)
    named = [blob for name, blob in record.outputs.items() if name.startswith("snapshots/")]
    assert len(named) == 2
    assert all(store.holds(blob) for blob in named)


def test_commits_go_before_what_they_name(store: LocalStore, tiny: chain.Chain) -> None:
    unsealed(store, tiny)
    ends = [one.key.rpartition(".")[2] for one in look(store).condemned["abandoned"]]
    assert ends == sorted(ends, key=lambda end: end != "json")
    assert "safetensors" in ends
    assert list(look(store).condemned)[-1] == "blobs"


# -- what ends it -------------------------------------------------------------------------------


def test_less_than_a_day_is_refused(store: LocalStore) -> None:
    with pytest.raises(ConfigError, match="must be a day or more"):
        survey(store, older_than_seconds=3600, now=NOW)


def test_ages_are_a_number_and_a_unit() -> None:
    assert clean.seconds_of("30d") == MONTH
    assert clean.seconds_of("36h") == 36 * 3600
    for odd in ("30", "d", "-3d", "1.5d", "30 days"):
        with pytest.raises(ConfigError, match="as 30d"):
            clean.seconds_of(odd)


@pytest.mark.parametrize("lost", ["record", "manifest"])
def test_damage_ends_it_before_anything_is_deleted(
    store: LocalStore, tiny: chain.Chain, lost: str
) -> None:
    if lost == "record":
        path = store.root / f"latents/{tiny['latents'].digest}/record.json"
        path.write_bytes(path.read_bytes().replace(b"shard", b"shart", 1))
    else:
        (store.root / tiny["latents"].outputs["manifest.json"].key).unlink()
    before = store.list("")
    with pytest.raises(IntegrityError, match="restore it"):
        sweep(store, older_than_seconds=MONTH, now=NOW)
    assert store.list("") == before


@pytest.mark.services
def test_s3_tells_ages_and_renews_them(s3_environment: dict[str, str], tmp_path: Path) -> None:
    store = open_store("s3://eqm/clean", cache=tmp_path)
    blob = store.put(b"of an attempt that was killed")
    later = NOW + datetime.timedelta(days=31)
    assert survey(store, older_than_seconds=MONTH, now=later).keys == [blob.key]
    (before,) = store.stored("")
    time.sleep(1.1)  # it tells whole seconds
    store.bucket.refresh(f"clean/{blob.key}", 0)  # type: ignore[attr-defined]
    (after,) = store.stored("")
    assert after.modified > before.modified
    # Of one object it tells whole seconds; listings of other servers have parts of them.
    assert store.modified(blob.key) == int(after.modified)
    assert store.modified("blobs/none") is None
    assert store.get(blob) == b"of an attempt that was killed"
    sealed = store.seal(named("invention", blob.sha256))
    assert survey(store, older_than_seconds=MONTH, now=later).keys == []
    boto3.client("s3").delete_object(
        Bucket="eqm", Key=f"clean/invention/{sealed.digest}/record.json"
    )
    assert sweep(store, older_than_seconds=MONTH, now=later).keys == [blob.key]
    assert not store.holds(blob)
