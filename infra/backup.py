"""Back-up and restore: the store, which is the truth, and the databases of MLflow and Prefect.

A place for back-ups is a folder or ``s3://bucket/prefix``. Every file lies there under its digest,
so the next back-up to the same place writes only what is new, and ``backups/<name>/manifest.json``,
written last, names the files of one moment. Services go on running meanwhile: see :func:`backup`.
Credentials are in no back-up; a restored home makes its own.
"""

import contextlib
import datetime
import re
import sqlite3
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from eqm.disk import disk_errors, hash_file
from eqm.errors import ConfigError, IntegrityError, MissingError, StoreError
from eqm.records import Blob, note_from_bytes, note_to_bytes
from eqm.storage import S3Store, Store, open_store
from eqm.words import counted
from infra.files import make_private_folder, write_private
from infra.stack import BUCKET, MLFLOW, PREFECT, S3, External, ServiceError
from infra.state import RESTORING

SCHEMA = "eqm.backup/1"
LISTINGS = 5
"""How often a store is listed until two listings agree."""
DATABASES = {MLFLOW: "mlflow/mlflow.db", PREFECT: "prefect/prefect.db"}
"""Where they lie in a home."""
BLOB = re.compile(r"(?:.*/)?blobs/sha256/([0-9a-f]{64})")
TAKEN = ("s3", *DATABASES.values(), "stack.json")
"""What a home has that was used."""

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of a back-up."""

    place: str
    """``bucket``, ``store``, ``artifacts`` or an address (:meth:`Home.places`), or ``database``."""
    key: str
    blob: Blob


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a back-up holds."""

    schema: str
    at: str
    store: str
    """EQM_STORE: MLflow's versions point into it."""
    versions: dict[str, str]
    """Packages that wrote the databases."""
    files: tuple[File, ...]


@dataclass(frozen=True)
class Home:
    """What is backed up, or restored."""

    root: Path
    store: str
    external: External
    also: tuple[str, ...] = ()
    """Further places, as the artifacts of an MLflow that is not ours."""

    def places(self) -> dict[str, Store]:
        """Where objects are: the whole bucket of our own S3; of another one only what is ours."""
        found: dict[str, Store] = {}
        if not self.external.replaces(S3):
            found["bucket"] = open_store(f"s3://{BUCKET}")
        elif not self.external.replaces(MLFLOW):
            found["artifacts"] = open_store(f"s3://{self.external.s3_bucket}/mlflow")
        if not (self.store.startswith(f"s3://{BUCKET}/") and "bucket" in found):
            found["store"] = open_store(self.store)
        return {**found, **{uri: open_store(uri) for uri in self.also}}

    def databases(self) -> dict[str, Path]:
        """Files of the databases that are ours."""
        ours = {name: path for name, path in DATABASES.items() if not self.external.replaces(name)}
        return {name: self.root / path for name, path in ours.items()}


# -- back-up ------------------------------------------------------------------------------------


def open_place(to: str) -> Store:
    """A place for back-ups; a folder that is missing is made, for its owner alone.

    One in S3 is reached with the AWS_* variables of this moment: open it before those of the
    embedded services take their place.
    """
    place = open_store(to)
    if "://" not in to:
        with disk_errors(to):
            make_private_folder(Path(to))
    return place


def backup(home: Home, target: Store, *, report: Report) -> str:
    """Copy everything to a place for back-ups, verified; returns the back-up's address.

    What is running may go on. Moves of the champion are listed first, then the databases are
    copied (SQLite's own online back-up), then objects: so whatever one of them names is in the
    back-up, because it was there before. Blobs are checked against their digests.
    Raises ConfigError, StoreError, IntegrityError.
    """
    places = home.places()
    _refuse_inside(target, places)
    before = {name: place.sizes("") for name, place in places.items()}
    files = []
    with tempfile.TemporaryDirectory(prefix="eqm-backup-") as folder:
        scratch = Path(folder) / "file"
        for name, path in home.databases().items():
            if path.is_file():
                _dump(path, scratch)
                files.append(File(place="database", key=name, blob=target.put(scratch)))
        for name in (MLFLOW, PREFECT):
            if home.external.replaces(name):
                report(f"{name}: not ours; back up its database by its own tools (infra/README.md)")
        for name, place in places.items():
            listed = _settled(place, before[name])
            report(f"{place.uri}: {counted(len(listed), 'object')}")
            for key, size in sorted(listed.items(), key=_data_first):
                if (blob := _copied(place, key, size, target, scratch)) is not None:
                    files.append(File(place=name, key=key, blob=blob))
    made = Manifest(
        schema=SCHEMA,
        at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        store=home.store,
        versions={name: metadata.version(name) for name in DATABASES},
        files=tuple(files),
    )
    return _seal(target, made)


def _refuse_inside(target: Store, places: Mapping[str, Store]) -> None:
    for place in places.values():
        same = _endpoint(place) == _endpoint(target)
        if same and f"{target.uri.rstrip('/')}/".startswith(f"{place.uri.rstrip('/')}/"):
            raise ConfigError(
                f"--to is {target.uri}, inside of {place.uri} that is backed up: name another place"
            )


def _endpoint(store: Store) -> str:
    return store.bucket.client.meta.endpoint_url if isinstance(store, S3Store) else ""


def _settled(place: Store, before: Mapping[str, int]) -> dict[str, int]:
    """Keys of one moment, with their sizes: as soon as two listings in a row have the same.

    Whatever a key of the first refers to was written before it, and so is in the second. Where
    training goes on writing, checkpoints may differ, which come whole or not at all; records and
    history may not. Entries of the history are those of the very first listing.
    """
    known = {key for key in before if _is_history(key)}
    now = dict(before)
    for _ in range(LISTINGS):
        last, now = now, place.sizes("")
        if now.keys() == last.keys():
            break
    both = {key: size for key, size in now.items() if key in last}
    if {key for key in now if _is_sealed(key)} != {key for key in both if _is_sealed(key)}:
        raise StoreError(
            f"{place.uri} changes all the time: back up while fewer stages are sealed in it"
        )
    return {key: size for key, size in both.items() if not _is_history(key) or key in known}


def _is_history(key: str) -> bool:
    return "/history/" in f"/{key}"


def _is_sealed(key: str) -> bool:
    return key.endswith("/record.json")


def _data_first(item: tuple[str, int]) -> tuple[bool, str]:
    # A commit (JSON) that is still there after its files were copied names none that is missing:
    # when a checkpoint is deleted, its commit goes first.
    return item[0].endswith(".json"), item[0]


def _copied(place: Store, key: str, size: int, target: Store, scratch: Path) -> Blob | None:
    """Bring an object to the back-up; None if it was work in progress that is gone by now."""
    named = _blob_of(key, size)
    if named is not None and target.holds(named):
        return named
    try:
        with disk_errors(str(scratch)), scratch.open("wb") as file:
            place.download(key, file)
    except MissingError as error:
        if named is None and not _is_sealed(key) and not _is_history(key):
            return None
        raise StoreError(
            f"{place.where(key)} was deleted while it was backed up: run again, and not beside a "
            "clean-up of the store"
        ) from error
    found = Blob(sha256=hash_file(scratch), size_bytes=scratch.stat().st_size)
    if named is not None and found != named:
        raise IntegrityError(
            f"{place.where(key)} is damaged (its bytes have digest {found.sha256}): put it back "
            "from an earlier back-up before you make this one"
        )
    target.write_once(found.key, scratch)
    return found


def _blob_of(key: str, size: int) -> Blob | None:
    """What an object must be by its name; None where a name does not tell."""
    match = BLOB.fullmatch(key)
    return Blob(sha256=match[1], size_bytes=size) if match else None


def _dump(database: Path, to: Path) -> None:
    """A consistent copy of a database that may be in use."""
    to.unlink(missing_ok=True)
    try:
        with (
            contextlib.closing(sqlite3.connect(f"file:{database}?mode=rw", uri=True)) as original,
            contextlib.closing(sqlite3.connect(to)) as copy,
        ):
            original.backup(copy)
            (said,) = copy.execute("PRAGMA integrity_check").fetchone()
    except sqlite3.Error as error:
        raise ServiceError(f"database {database} cannot be backed up ({error})") from error
    if said != "ok":
        raise IntegrityError(f"database {database} is damaged ({said}): restore an earlier back-up")


def _seal(target: Store, made: Manifest) -> str:
    data = note_to_bytes(made)
    moment = re.sub(r"[-:]|\+.*", "", made.at)
    name = f"backups/{moment}Z-{Blob.of(data).sha256[:8]}"
    target.write_once(f"{name}/manifest.json", data)
    return target.where(name)


# -- restore ------------------------------------------------------------------------------------


def open_backup(address: str) -> tuple[Store, Manifest]:
    """The place and the manifest of a back-up by the address that :func:`backup` returned.

    Raises ConfigError, MissingError, IntegrityError.
    """
    base, _, name = address.rstrip("/").rpartition("/backups/")
    if not base or not name or "/" in name:
        raise ConfigError(f"{address!r} is no back-up: give PLACE/backups/NAME, as it was printed")
    place = open_store(base)
    key = f"backups/{name}/manifest.json"
    manifest = note_from_bytes(Manifest, place.read(key), place.where(key))
    if manifest.schema != SCHEMA:
        raise ConfigError(f"{address} is of schema {manifest.schema!r}, not {SCHEMA!r}")
    gone = [file for file in manifest.files if not place.holds(file.blob)]
    if gone:
        shown = ", ".join(f"{file.place} {file.key}" for file in gone[:3])
        raise MissingError(f"{address} lacks {len(gone)} of its files ({shown}): use another one")
    return place, manifest


def further(manifest: Manifest) -> tuple[str, ...]:
    """Places of a back-up that were named for it (``Home.also``)."""
    standard = ("bucket", "store", "artifacts", "database")
    return tuple(sorted({file.place for file in manifest.files} - set(standard)))


def verify(address: str) -> int:
    """Read every file of a back-up and check its digest; how many there are."""
    place, manifest = open_backup(address)
    with tempfile.TemporaryDirectory(prefix="eqm-backup-") as folder:
        for file in manifest.files:
            _pull(place, file, Path(folder) / "file")
    return len(manifest.files)


def prepare(home: Home, address: str, manifest: Manifest) -> None:
    """Refuse a home that was used, and mark a fresh one as being restored.

    A restore that was interrupted goes on when it is started again with the same address. Raises
    ServiceError, ConfigError.
    """
    marker = home.root / RESTORING
    if marker.is_file():
        if marker.read_text() != address:
            raise ServiceError(
                f"{home.root} is being restored from {marker.read_text()}: finish that with "
                f"`eqm restore {marker.read_text()}`, or delete the folder"
            )
    elif taken := [name for name in TAKEN if (home.root / name).exists()]:
        raise ServiceError(
            f"{home.root} has been used ({', '.join(taken)}), and nothing is restored over it: set "
            "EQM_HOME to a folder that does not exist"
        )
    if home.store != manifest.store:
        raise ConfigError(
            f"EQM_STORE is {home.store}, but {address} is of {manifest.store}, to which the models "
            f"in MLflow point: set EQM_STORE={manifest.store}"
        )
    wanted = {file.place for file in manifest.files} - {"database"}
    if extra := wanted - set(home.places()):
        raise ConfigError(
            f"{address} holds {sorted(extra)}, for which there is no place here: set "
            "EQM_S3_ENDPOINT and MLFLOW_TRACKING_URI as they were when it was made"
        )
    ours = set(home.databases())
    if extra := {file.key for file in manifest.files if file.place == "database"} - ours:
        raise ConfigError(f"{address} holds databases of {sorted(extra)}: unset their addresses")
    write_private(marker, address.encode())


def restore(home: Home, place: Store, manifest: Manifest, *, report: Report) -> None:
    """Put a back-up into a home that :func:`prepare` marked and whose S3 runs.

    Every file is verified before it is written, databases come last. Raises ServiceError where
    something else is there already, IntegrityError for a damaged back-up.
    """
    objects = [file for file in manifest.files if file.place != "database"]
    places = home.places()
    _refuse_strangers(places, objects)
    with tempfile.TemporaryDirectory(prefix="eqm-restore-") as folder:
        scratch = Path(folder) / "file"
        for file in sorted(objects, key=lambda file: (file.key.endswith(".json"), file.key)):
            _pull(place, file, scratch)
            if not places[file.place].write_once(file.key, scratch):
                _same(places[file.place], file, scratch)
        report(f"{counted(len(objects), 'object')} restored")
        for file in manifest.files:
            if file.place == "database":
                _put_database(place, file, home.databases()[file.key])
                report(f"database of {file.key} restored")
    for name, version in manifest.versions.items():
        if (here := metadata.version(name)) != version:
            report(f"{name} is {here} here and was {version}: see infra/README.md on upgrades")
    (home.root / RESTORING).unlink()


def _put_database(place: Store, file: File, path: Path) -> None:
    aside = make_private_folder(path.parent) / f".{path.name}.restoring"
    _pull(place, file, aside)
    aside.chmod(0o600)
    aside.replace(path)


def _refuse_strangers(places: Mapping[str, Store], objects: list[File]) -> None:
    for name, there in places.items():
        known = {file.key for file in objects if file.place == name}
        if strangers := sorted(set(there.sizes("")) - known):
            more = f" and {len(strangers) - 1:,} more" if len(strangers) > 1 else ""
            raise ServiceError(
                f"{there.uri} holds what is not of the back-up "
                f"({strangers[0]}{more}), and nothing is restored over it: name an empty one"
            )


def _same(there: Store, file: File, scratch: Path) -> None:
    with scratch.open("wb") as copy:
        there.download(file.key, copy)
    if hash_file(scratch) != file.blob.sha256:
        raise ServiceError(
            f"{there.where(file.key)} exists and is not that of the back-up: name an empty place"
        )


def _pull(place: Store, file: File, scratch: Path) -> None:
    """A file of a back-up, verified."""
    with disk_errors(str(scratch)), scratch.open("wb") as copy:
        place.download(file.blob.key, copy)
    if (scratch.stat().st_size, hash_file(scratch)) != (file.blob.size_bytes, file.blob.sha256):
        raise IntegrityError(
            f"{place.where(file.blob.key)} ({file.place} {file.key}) is damaged: use another "
            "back-up"
        )
