"""Back-up and restore: what is copied while everything goes on, and what is refused."""

import hashlib
import itertools
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from mlflow import MlflowClient

from eqm import stage
from eqm.config import Job, Runtime
from eqm.errors import ConfigError, IntegrityError, MissingError, StoreError
from eqm.records import Record
from eqm.registry import Registry
from eqm.stage import Outcome
from eqm.storage import LocalStore, Store, open_store
from flows import recovery
from infra import backup, local
from infra.backup import Home
from infra.deployments import PrefectApi
from infra.stack import External, ServiceError, Stack

ELSEWHERE = External(s3_endpoint="http://s3.example", mlflow_uri="http://mlflow.example")
"""A store in a folder and Prefect's database: all that needs no service."""


def sealed(store: Store, seed: int) -> Record:
    """A training with a blob of its own."""
    config = {"network": {}, "objective": {}, "train": {"seed": seed}}
    runtime = Runtime(store=store.uri, device="cpu", threads=1)
    weights = hashlib.shake_128(str(seed).encode()).digest(5000)
    job = Job(stage="train", config=config, inputs={}, runtime=runtime)
    return stage.run(job, lambda _: Outcome(outputs={"ema.safetensors": weights}))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home", str(tmp_path / "store"), ELSEWHERE)
    (home.root / "prefect").mkdir(parents=True)
    with closing(sqlite3.connect(home.root / "prefect" / "prefect.db")) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE run (number INTEGER)")
        database.execute("INSERT INTO run VALUES (7)")
        database.commit()
    return home


@pytest.fixture
def store(home: Home) -> LocalStore:
    store = LocalStore(Path(home.store))
    sealed(store, 0)
    store.write_once("history/m/00000001.json", b"{}")
    return store


def make(home: Home, place: Path) -> str:
    return backup.backup(home, backup.open_place(str(place)), report=lambda _: None)


def put_back(home: Home, address: str) -> Home:
    """Restore into a fresh home, after what was there is gone."""
    fresh = replace(home, root=home.root.with_name("fresh"))
    shutil.rmtree(home.store, ignore_errors=True)
    place, manifest = backup.open_backup(address)
    fresh.root.mkdir(exist_ok=True)
    backup.prepare(fresh, address, manifest)
    backup.restore(fresh, place, manifest, report=lambda _: None)
    return fresh


def contents(folder: Path) -> dict[str, bytes]:
    store = LocalStore(folder)
    return {key: store.read(key) for key in store.list("")}


# -- what comes back ----------------------------------------------------------------------------


def test_everything_comes_back(home: Home, store: LocalStore, tmp_path: Path) -> None:
    before = contents(store.root)
    address = make(home, tmp_path / "backups")
    fresh = put_back(home, address)
    assert contents(store.root) == before
    with closing(sqlite3.connect(fresh.databases()["prefect"])) as database:
        assert database.execute("SELECT number FROM run").fetchall() == [(7,)]
    assert fresh.databases()["prefect"].stat().st_mode & 0o777 == 0o600
    assert not (fresh.root / "restoring").exists()
    assert (tmp_path / "backups").stat().st_mode & 0o777 == 0o700


def test_the_next_one_writes_only_what_is_new(
    home: Home, store: LocalStore, tmp_path: Path
) -> None:
    place = tmp_path / "backups"
    first = make(home, place)
    kept = set((place / "blobs" / "sha256").iterdir())
    sealed(store, 1)
    assert make(home, place) != first
    # The record, the log of it if there is one, and the weights; Prefect's database is as it was.
    assert 2 <= len(set((place / "blobs" / "sha256").iterdir()) - kept) <= 4
    assert backup.verify(first) < backup.verify(make(home, place))


def test_a_further_place_comes_back_too(home: Home, store: LocalStore, tmp_path: Path) -> None:
    artifacts = LocalStore(tmp_path / "artifacts")
    artifacts.write_once("1/run/artifacts/note.txt", b"a note")
    address = make(replace(home, also=(artifacts.uri,)), tmp_path / "backups")
    shutil.rmtree(artifacts.root)
    _, manifest = backup.open_backup(address)
    assert backup.further(manifest) == (artifacts.uri,)
    put_back(replace(home, also=backup.further(manifest)), address)
    assert artifacts.read("1/run/artifacts/note.txt") == b"a note"


def test_what_is_replaced_by_compare_and_set_is_its_newest(
    home: Home, store: LocalStore, tmp_path: Path
) -> None:
    store.write_once("train/x/lease.json", b'{"token": 1}')
    _, version = store.read_version("train/x/lease.json")
    assert store.replace("train/x/lease.json", b'{"token": 2}', version)
    put_back(home, make(home, tmp_path / "backups"))
    assert LocalStore(store.root).read("train/x/lease.json") == b'{"token": 2}'


class Busy(LocalStore):
    """A store in which something happens in the middle of a listing, and after a download."""

    def __init__(
        self, root: Path, *, listing: Callable[[], object], after: Callable[[str], object]
    ):
        super().__init__(root)
        self.listing, self.after = listing, after

    def sizes(self, prefix: str) -> dict[str, int]:
        # As S3 does: page by page, in the order of keys.
        blobs = super().sizes("blobs/")
        self.listing()
        return {**blobs, **{k: v for k, v in super().sizes("").items() if k[:6] != "blobs/"}}

    def download(self, key: str, file: BinaryIO) -> None:
        super().download(key, file)
        self.after(key)


class BusyHome(Home):
    """A home with such a store."""

    busy: Busy

    def places(self) -> dict[str, Store]:
        return {"store": self.busy}


def busy_home(home: Home, **happens: Any) -> BusyHome:
    made = BusyHome(home.root, home.store, home.external)
    nothing = {"listing": lambda: None, "after": lambda _: None}
    object.__setattr__(made, "busy", Busy(Path(home.store), **{**nothing, **happens}))
    return made


def test_a_record_that_is_sealed_meanwhile_has_its_blobs_or_is_left_out(
    home: Home, store: LocalStore, tmp_path: Path
) -> None:
    seeds = iter((1, 2))
    busy = busy_home(home, listing=lambda: [sealed(store, seed) for seed in [*seeds][:1]])
    _, manifest = backup.open_backup(make(busy, tmp_path / "backups"))
    keys = {file.key for file in manifest.files}
    records = [key for key in keys if key.endswith("/record.json")]
    assert len(records) == 2
    for key in records:
        record = store.record("train", key.split("/")[1])
        assert record is not None
        assert {blob.key for blob in record.outputs.values()} <= keys


def test_a_store_in_which_stages_are_sealed_all_the_time_is_told(
    home: Home, store: LocalStore, tmp_path: Path
) -> None:
    seeds = itertools.count(1)
    busy = busy_home(home, listing=lambda: sealed(store, next(seeds)))
    with pytest.raises(StoreError, match="changes all the time"):
        make(busy, tmp_path / "backups")


def test_a_checkpoint_that_is_deleted_meanwhile_leaves_no_commit_without_its_files(
    home: Home, store: LocalStore, tmp_path: Path
) -> None:
    ends = ("0.tensors", "json")
    for end in ends:
        store.write_once(f"train/t/checkpoints/000001.{end}", end.encode())

    def prune(key: str) -> None:
        if "checkpoints" in key:
            for end in reversed(ends):
                store.delete(f"train/t/checkpoints/000001.{end}")

    _, manifest = backup.open_backup(make(busy_home(home, after=prune), tmp_path / "backups"))
    kept = {file.key for file in manifest.files if "checkpoints" in file.key}
    assert kept == {"train/t/checkpoints/000001.0.tensors"}


def test_a_move_of_the_champion_that_mlflow_may_not_have_is_left_to_the_next(
    home: Home, store: LocalStore, tmp_path: Path
) -> None:
    moves = iter(range(2, 9))

    def move() -> None:
        store.write_once(f"history/m/{next(moves):08d}.json", b"{}")

    busy = busy_home(home, listing=move)
    _, manifest = backup.open_backup(make(busy, tmp_path / "backups"))
    kept = {file.key for file in manifest.files if "history" in file.key}
    # The second was there before the databases were copied.
    assert kept == {"history/m/00000001.json", "history/m/00000002.json"}


def test_a_blob_that_is_cleaned_up_meanwhile_is_told(
    home: Home, store: LocalStore, tmp_path: Path
) -> None:
    def clean(key: str) -> None:
        for blob in store.list("blobs/"):
            if blob != key:
                (store.root / blob).unlink()

    sealed(store, 1)
    with pytest.raises(StoreError, match="not beside a clean-up"):
        make(busy_home(home, after=clean), tmp_path / "backups")


# -- what is refused ----------------------------------------------------------------------------


def test_damage_is_found_when_it_is_backed_up(
    home: Home, store: LocalStore, tmp_path: Path
) -> None:
    blob = next((store.root / "blobs" / "sha256").iterdir())
    blob.chmod(0o644)
    blob.write_bytes(b"other")
    with pytest.raises(IntegrityError, match=blob.name):
        make(home, tmp_path / "backups")
    assert not (tmp_path / "backups" / "backups").exists()


def test_a_damaged_database_is_found(home: Home, store: LocalStore, tmp_path: Path) -> None:
    file = home.root / "prefect" / "prefect.db"
    with closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = bytearray(file.read_bytes())
    data[4096:4196] = bytes(range(100))
    file.write_bytes(data)
    with pytest.raises((IntegrityError, ServiceError), match=r"prefect\.db"):
        make(home, tmp_path / "backups")


@pytest.mark.parametrize("harm", ["change", "cut", "lose"])
def test_a_damaged_backup_is_refused_and_restores_nothing_of_it(
    home: Home, store: LocalStore, tmp_path: Path, harm: str
) -> None:
    address = make(home, tmp_path / "backups")
    _, manifest = backup.open_backup(address)
    (file,) = [file for file in manifest.files if file.place == "database"]
    path = tmp_path / "backups" / file.blob.key
    path.chmod(0o644)
    if harm == "lose":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-1] if harm == "cut" else b"x" + data[1:])
    with pytest.raises((IntegrityError, MissingError), match=r"prefect"):
        backup.verify(address)
    with pytest.raises((IntegrityError, MissingError), match=r"prefect"):
        put_back(home, address)
    assert not (tmp_path / "fresh" / "prefect" / "prefect.db").exists()


def test_a_changed_manifest_is_refused(home: Home, store: LocalStore, tmp_path: Path) -> None:
    address = make(home, tmp_path / "backups")
    path = Path(address) / "manifest.json"
    path.chmod(0o644)
    path.write_text(path.read_text().replace("history/m/", "history/n/"))
    with pytest.raises(IntegrityError, match="digest"):
        backup.open_backup(address)


def test_nothing_is_restored_over_what_exists(
    home: Home, store: LocalStore, tmp_path: Path
) -> None:
    address = make(home, tmp_path / "backups")
    place, manifest = backup.open_backup(address)
    with pytest.raises(ServiceError, match="has been used"):
        backup.prepare(home, address, manifest)
    fresh = replace(home, root=tmp_path / "fresh")
    fresh.root.mkdir()
    with pytest.raises(ConfigError, match="EQM_STORE"):
        backup.prepare(replace(fresh, store=str(tmp_path / "other")), address, manifest)
    sealed(store, 1)
    backup.prepare(fresh, address, manifest)
    with pytest.raises(ServiceError, match="nothing is restored over it"):
        backup.restore(fresh, place, manifest, report=lambda _: None)


def test_a_restore_that_was_interrupted_goes_on(
    home: Home, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(store.root)
    address = make(home, tmp_path / "backups")
    pull, pulls = backup._pull, iter(range(100))

    def breaks_off(*words) -> None:
        if next(pulls) == 2:
            raise KeyboardInterrupt
        pull(*words)

    monkeypatch.setattr(backup, "_pull", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        put_back(home, address)
    monkeypatch.undo()
    fresh = replace(home, root=tmp_path / "fresh")
    with pytest.raises(ServiceError, match=f"eqm restore {address}"):
        local.up(fresh.root, external=External(), environ={}, report=lambda _: None)
    with pytest.raises(ServiceError, match="is being restored from"):
        backup.prepare(fresh, f"{address}0", backup.open_backup(address)[1])
    place, manifest = backup.open_backup(address)
    backup.prepare(fresh, address, manifest)
    backup.restore(fresh, place, manifest, report=lambda _: None)
    assert contents(store.root) == before


@pytest.mark.parametrize("address", ["somewhere", "a/backups/", "/backups/x", "a/backups/x/y"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is no back-up"):
        backup.open_backup(address)


def test_a_backup_into_what_is_backed_up_is_refused(home: Home, store: LocalStore) -> None:
    with pytest.raises(ConfigError, match="inside of"):
        make(home, store.root / "backups")


# -- the services themselves --------------------------------------------------------------------


class Machine:
    """A home with embedded services, and this process pointed at them."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.patch = root, patch
        for name in [n for n in os.environ if n.startswith(("EQM_", "AWS_", "MLFLOW_", "PREF"))]:
            patch.delenv(name)
        patch.setenv("EQM_HOME", str(root))

    def up(self, *services: str) -> Stack:
        stack = local.up(
            self.root,
            external=External(worker=False),
            environ=dict(os.environ),
            report=lambda _: None,
            services=services,
        )
        for name, value in stack.environment().items():
            self.patch.setenv(name, value)
        return stack

    def down(self) -> None:
        local.down(self.root, report=lambda _: None)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Machine]]:
    made: list[Machine] = []

    def start(name: str) -> Machine:
        made.append(Machine(tmp_path / name, monkeypatch))
        return made[-1]

    yield start
    for one in made:
        one.down()


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(300)
def test_a_home_is_destroyed_and_comes_back_on_other_ports(
    machine: Callable[[str], Machine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = machine("old")
    stack = old.up("s3", "mlflow", "prefect")
    record, run = _work(stack)
    recovery.backup(str(tmp_path / "backups"), also=None)
    address = capsys.readouterr().out.strip().splitlines()[-1]
    old.down()
    shutil.rmtree(old.root)

    new = machine("new")
    recovery.restore(address, verify=True)
    recovery.restore(address, verify=False)
    again = new.up("s3", "mlflow")
    assert again.s3_secret_key != stack.s3_secret_key
    store = open_store("s3://eqm/store", cache=tmp_path / "cache")
    assert store.record("train", record.digest) == record
    stage.verify(store, record)
    assert store.read("history/eqm-backup/00000001.json") == b"{}"
    version = Registry(str(again.mlflow_uri)).by_alias("eqm-backup", "champion")
    assert version is not None
    assert version.source == f"s3://eqm/store/train/{record.digest}"
    assert version.tags["eqm.content"] == record.content
    client = MlflowClient(again.mlflow_uri)
    assert [point.value for point in client.get_metric_history(run, "loss")] == [3.0, 2.0]
    folder = client.download_artifacts(run, "note.txt", dst_path=str(tmp_path))
    assert Path(folder).read_text() == "a note"
    with closing(sqlite3.connect(new.root / "prefect" / "prefect.db")) as database:
        assert database.execute("SELECT name FROM flow").fetchall() == [("kept",)]

    with pytest.raises(ServiceError, match="has been used"):
        recovery.restore(address, verify=False)


def _work(stack: Stack) -> tuple[Record, str]:
    """A sealed record, a champion in MLflow with a run and an artifact, a flow in Prefect."""
    store = open_store("s3://eqm/store")
    record = sealed(store, 0)
    store.write_once("history/eqm-backup/00000001.json", b"{}")
    client = MlflowClient(stack.mlflow_uri)
    run = client.create_run(client.create_experiment("kept"), tags={"eqm.digest": record.digest})
    for step, loss in enumerate((3.0, 2.0)):
        client.log_metric(run.info.run_id, "loss", loss, step=step)
    client.log_text(run.info.run_id, "a note", "note.txt")
    registry = Registry(str(stack.mlflow_uri))
    source = store.where(f"train/{record.digest}")
    tags = {"eqm.content": record.content}
    version = registry.register("eqm-backup", source=source, tags=tags, run_digest=record.digest)
    registry.point("eqm-backup", "champion", version.number)
    api = PrefectApi(str(stack.prefect_api_url), stack.environment())
    api._post("/flows/", {"name": "kept"})
    return record, run.info.run_id


def test_a_manifest_names_what_wrote_the_databases(
    home: Home, store: LocalStore, tmp_path: Path
) -> None:
    address = make(home, tmp_path / "backups")
    told = json.loads((Path(address) / "manifest.json").read_text())
    assert set(told["versions"]) == {"mlflow", "prefect"}
    assert told["store"] == home.store
