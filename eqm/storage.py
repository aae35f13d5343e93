"""Bytes in and out of the store: S3 or a local directory behind one small interface.

A store holds *blobs* (``blobs/sha256/<digest>``, named by what they are) and *keys* that are
written once and never changed; what must change all the same (a lease) is changed by
compare-and-set. Nothing read back is trusted until its digest matches. How S3 is spoken to is the
business of eqm.s3, copies on this machine are that of eqm.cache.
"""

import contextlib
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import urlsplit

from eqm.cache import TRIES, Cache, Download, Verified, damaged, is_blob
from eqm.disk import (
    ASIDE,
    disk_errors,
    hash_file,
    parts,
    sweep,
    sync_folder,
    written_aside,
)
from eqm.errors import ConfigError, IntegrityError, MissingError, StoreError, TransferError
from eqm.records import Blob, Record, record_from_bytes, record_to_bytes, sha256
from eqm.s3 import Bucket

WRITTEN_AT_ONCE_BYTES = 2**24
VERIFIED = ".verified"
"""Folder of a local store that remembers which files were hashed."""
FRESH_SECONDS = 3600.0
"""A blob that is stored again although it is there counts as written now, to this accuracy: whoever
deletes what is old and unnamed (eqm.clean) thereby leaves alone what is about to be named. Far less
than the least age at which that deletes."""
CHANGES = ".changes"
"""Folder of a local store with what came after the first bytes under keys that are changed."""


def open_store(uri: str, *, cache: Path | None = None, cache_bytes: int | None = None) -> "Store":
    """Open ``s3://bucket/prefix`` or a local directory (made if it is missing).

    ``cache`` is where verified copies of S3 blobs are kept on this machine, ``cache_bytes`` how
    much of them at most (None: no limit). S3 endpoint, region and credentials are those of boto3's
    own chain. Raises ConfigError for another kind of address.
    """
    split = urlsplit(uri)
    if split.scheme == "s3":
        if not split.netloc:
            raise ConfigError(f"store {uri!r} names no bucket: s3://bucket/prefix")
        kept = cache or Path.home() / ".cache" / "eqm"
        return S3Store(split.netloc, split.path.strip("/"), cache=Cache(kept, cache_bytes))
    if split.scheme or "://" in uri:
        raise ConfigError(f"store {uri!r}: only s3://bucket/prefix or a local directory")
    return LocalStore(Path(uri))


class Stored(NamedTuple):
    """One key of a listing."""

    key: str
    size_bytes: int
    modified: float
    """When it was written last, in seconds since 1970."""


class Store(ABC):
    """Create-once keys and content-addressed blobs."""

    uri: str

    @abstractmethod
    def read(self, key: str) -> bytes:
        """Bytes under a key. Raises MissingError, StoreError."""

    @abstractmethod
    def write_once(self, key: str, data: bytes | Path) -> bool:
        """Create a key; False, and nothing changed, if it exists. Durable on return."""

    @abstractmethod
    def read_version(self, key: str) -> tuple[bytes, str]:
        """Bytes under a key and their version, for ``replace``. Raises MissingError, StoreError."""

    @abstractmethod
    def replace(self, key: str, data: bytes, version: str) -> str | None:
        """Change a key if it is still of a version; the new version, or None: nothing was changed.

        Bytes of one key must never repeat: a version is one of bytes. Durable on return.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete a key, if it is there. For keys that nothing else can name.

        Blobs are shared: only eqm.clean, which looks at everything, may delete one.
        """

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether a key is there."""

    @abstractmethod
    def holds(self, blob: Blob) -> bool:
        """Whether a blob is there, with as many bytes as it should have."""

    @abstractmethod
    def folders(self, prefix: str) -> list[str]:
        """All that stands before the next "/" in keys that begin with a prefix, sorted.

        What lies below is not looked at: of a thousand trainings it is a page or two.
        """

    @abstractmethod
    def list(self, prefix: str) -> list[str]:
        """All keys that begin with a prefix, sorted."""

    @abstractmethod
    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of every key that begins with a prefix, in the order of :meth:`list`."""

    @abstractmethod
    def download(self, key: str, file: BinaryIO) -> None:
        """Write the bytes under a key to a file, not verified. Raises MissingError, StoreError."""

    @abstractmethod
    def stored(self, prefix: str) -> Iterator[Stored]:
        """All keys that begin with a prefix, with their sizes and times."""

    @abstractmethod
    def modified(self, key: str) -> float | None:
        """The time of one key as :meth:`stored` tells it; None where it is not there."""

    @abstractmethod
    def refresh(self, blob: Blob) -> None:
        """Have a blob that is there count as written now. Raises MissingError."""

    @abstractmethod
    def fetch(self, blob: Blob, *, remembered: bool = False) -> Path:
        """Read-only local file with the blob's bytes, verified. Raises IntegrityError.

        It is hashed once a process; once a machine where ``remembered``, which is for files whose
        every read is checked by a CRC as well.
        """

    @abstractmethod
    def fetch_unless_full(self, blob: Blob) -> Path | None:
        """As ``fetch`` with ``remembered``; None where the cache has no room for it."""

    @property
    def copies_limit_bytes(self) -> int | None:
        """The most that is kept on this machine of what lies elsewhere; None: no limit."""
        return None

    @abstractmethod
    def check(self, blob: Blob) -> None:
        """Verify every byte of a blob as ``fetch`` does, also where the cache has no room for it.

        Raises MissingError, IntegrityError.
        """

    @abstractmethod
    def read_range(self, blob: Blob, start: int, length: int) -> bytes:
        """Part of a blob, not verified: the caller has a CRC of it. Raises MissingError."""

    @abstractmethod
    def touch(self, blob: Blob) -> None:
        """Mark this machine's copy of a blob as used now."""

    def where(self, key: str) -> str:
        """Full address of a key, for people."""
        return f"{self.uri}/{key}"

    def put(self, data: bytes | Path) -> Blob:
        """Store bytes or a file under their digest; equal bytes are stored once."""
        if isinstance(data, Path):
            blob = Blob(sha256=hash_file(data), size_bytes=data.stat().st_size)
        else:
            blob = Blob(sha256=sha256(data), size_bytes=len(data))
        while not self.write_once(blob.key, data):
            # One that is deleted in between is written again.
            with contextlib.suppress(MissingError):
                self.refresh(blob)
                break
        return blob

    def get(self, blob: Blob) -> bytes:
        """Bytes of a blob, verified before they are returned. Raises IntegrityError."""
        found = b""
        # What was damaged on the way may be well where it lies.
        for _ in range(TRIES):
            found = self.read(blob.key)
            if len(found) == blob.size_bytes and sha256(found) == blob.sha256:
                return found
        raise IntegrityError(damaged(blob, self.where(blob.key), len(found), sha256(found)))

    def record(self, stage: str, digest: str) -> Record | None:
        """The sealed record of a stage, verified; None if it is not sealed yet.

        Raises IntegrityError, StoreError.
        """
        key = record_key(stage, digest)
        try:
            record = record_from_bytes(self.read(key), self.where(key))
        except MissingError:
            return None
        if (record.stage, record.digest) != (stage, digest):
            raise IntegrityError(f"{self.where(key)} is the record of another result; restore it")
        return record

    def seal(self, record: Record) -> Record:
        """Write a record, create-once, and return the one that stands.

        Where another attempt was first, its record stands: both are right, and one is enough.
        """
        key = record_key(record.stage, record.digest)
        if self.write_once(key, record_to_bytes(record)):
            return record
        return record_from_bytes(self.read(key), self.where(key))


def record_key(stage: str, digest: str) -> str:
    """Where the record of a stage lies."""
    return f"{stage}/{digest}/record.json"


# -- a local directory --------------------------------------------------------------------------


class LocalStore(Store):
    """A directory on this machine; for work without services and for tests."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)
        self._verified = Verified(root / VERIFIED)
        self._swept: set[Path] = set()

    def _sweep_once(self, folder: Path) -> None:
        """Delete what killed processes left in a folder, before the first write there."""
        if folder not in self._swept:
            self._swept.add(folder)
            sweep(folder)

    def _path(self, key: str) -> Path:
        path = self.root / key
        if ".." in Path(key).parts or Path(key).is_absolute():
            raise StoreError(f"key {key!r} leaves the store {self.uri}")
        return path

    def read(self, key: str) -> bytes:
        """Bytes under a key. Raises MissingError."""
        return self._read(key)[0]

    def _read(self, key: str) -> tuple[bytes, int]:
        """Bytes under a key, and how often they were replaced."""
        while True:
            try:
                first = self._path(key).read_bytes()
            except FileNotFoundError as error:
                raise MissingError(f"{self.where(key)} does not exist") from error
            number = _newest(self._successors(key, first)) if self._changes(key).is_dir() else 0
            if not number:
                return first, 0
            # One that is gone by now has a successor.
            with contextlib.suppress(FileNotFoundError):
                return (self._successors(key, first) / _numbered(number)).read_bytes(), number

    def _changes(self, key: str) -> Path:
        return self.root / CHANGES / sha256(key.encode())

    def _successors(self, key: str, first: bytes) -> Path:
        """Folder of what came after the first bytes under a key."""
        # A key that is deleted by hand and made again begins anew.
        return self._changes(key) / sha256(first)

    def write_once(self, key: str, data: bytes | Path) -> bool:
        """Create a key; False if it exists. Written aside, synced, then linked into place."""
        path = self._path(key)
        with disk_errors(str(self.root)):
            if path.exists():
                return False
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, FileNotFoundError) as error:
                raise StoreError(
                    f"store {self.root}: {error.filename} cannot be made ({error.strerror}): a "
                    "file, or a link to a disk that is not there, is in its place"
                ) from error
            self._sweep_once(path.parent)
            with written_aside(path.parent) as (file, aside):
                _fill(file, aside, data)
                try:
                    os.link(aside, path)
                except FileExistsError:
                    return False
            sync_folder(path.parent)
        return True

    def read_version(self, key: str) -> tuple[bytes, str]:
        """Bytes under a key, and their number and digest as version. Raises MissingError."""
        data, number = self._read(key)
        return data, _version(number, data)

    def replace(self, key: str, data: bytes, version: str) -> str | None:
        """Change a key by making the next of its successors, create-once: no lock is held.

        A process that is stopped in the middle therefore stops nobody else; one that comes too late
        finds its number taken or, where that has been deleted meanwhile, a greater one.
        """
        with disk_errors(str(self.root)):
            try:
                _, there = self.read_version(key)
            except MissingError:
                return None
            if there != version:
                return None
            number = int(version.partition("-")[0]) + 1
            folder = self._successors(key, self._path(key).read_bytes())
            folder.mkdir(parents=True, exist_ok=True)
            self._sweep_once(folder)
            with written_aside(folder) as (file, aside):
                _fill(file, aside, data)
                try:
                    os.link(aside, folder / _numbered(number))
                except FileExistsError:
                    return None
            if _newest(folder) != number:
                return None
            sync_folder(folder)
            for path in folder.iterdir():
                # The last one stays, for whoever reads it just now.
                if path.name.isdigit() and int(path.name) < number - 1:
                    path.unlink(missing_ok=True)
        return _version(number, data)

    def delete(self, key: str) -> None:
        """Delete a file, if it is there."""
        with disk_errors(str(self.root)):
            self._path(key).unlink(missing_ok=True)
            if self._changes(key).is_dir():
                shutil.rmtree(self._changes(key), ignore_errors=True)

    def exists(self, key: str) -> bool:
        """Whether a key is there."""
        return self._path(key).is_file()

    def holds(self, blob: Blob) -> bool:
        """Whether a blob is there, with as many bytes as it should have."""
        path = self._path(blob.key)
        return path.is_file() and path.stat().st_size == blob.size_bytes

    def folders(self, prefix: str) -> list[str]:
        """Sub-folders of a folder whose names begin as the prefix says, sorted."""
        folder, _, start = prefix.rpartition("/")
        place = self._path(folder or ".")
        if not place.is_dir():
            return []
        found = (path.name for path in place.iterdir() if path.is_dir())
        ours = (VERIFIED, CHANGES) if not folder else ()
        names = sorted(name for name in found if name.startswith(start) and name not in ours)
        return [f"{folder}/{name}" if folder else name for name in names]

    def list(self, prefix: str) -> list[str]:
        """All keys that begin with a prefix, sorted."""
        folder = self._path(prefix.rpartition("/")[0] or ".")
        files = (path for path in folder.rglob("*") if path.is_file())
        keys = (path.relative_to(self.root).as_posix() for path in files)
        return sorted(k for k in keys if k.startswith(prefix) and not _is_ours(k))

    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of every key that begins with a prefix, sorted by key."""
        found = {}
        for key in self.list(prefix):
            # One that is deleted meanwhile is none.
            with contextlib.suppress(FileNotFoundError):
                found[key] = self._path(key).stat().st_size
        return found

    def download(self, key: str, file: BinaryIO) -> None:
        """Copy the bytes under a key to a file. Raises MissingError."""
        if self._changes(key).is_dir():
            file.write(self.read(key))
            return
        try:
            with self._path(key).open("rb") as original:
                shutil.copyfileobj(original, file, WRITTEN_AT_ONCE_BYTES)
        except FileNotFoundError as error:
            raise MissingError(f"{self.where(key)} does not exist") from error

    def stored(self, prefix: str) -> Iterator[Stored]:
        """All keys that begin with a prefix, with their sizes and times."""
        for key in self.list(prefix):
            # One that is gone by now is none.
            with contextlib.suppress(FileNotFoundError):
                size_bytes, modified = self._seen(key)
                yield Stored(key, size_bytes, modified)

    def modified(self, key: str) -> float | None:
        """The time of one key; None where it is not there."""
        try:
            return self._seen(key)[1]
        except FileNotFoundError:
            return None

    def _seen(self, key: str) -> tuple[int, float]:
        """Size and time of a key. Raises FileNotFoundError."""
        found = self._path(key).stat()
        # Whose times we cannot renew in `refresh` must never look old.
        modified = found.st_mtime if found.st_uid == os.geteuid() else time.time()
        return found.st_size, max(modified, self._changed(key))

    def _changed(self, key: str) -> float:
        """When a key was replaced last; 0 for never."""
        changes = (path.stat().st_mtime for path in self._changes(key).rglob("*"))
        return max(changes, default=0.0)

    def refresh(self, blob: Blob) -> None:
        """Have a blob that is there count as written now. Raises MissingError."""
        try:
            path = self._path(blob.key)
            if time.time() - path.stat().st_mtime > FRESH_SECONDS:
                with contextlib.suppress(PermissionError):
                    os.utime(path)
        except FileNotFoundError as error:
            raise MissingError(f"{self.where(blob.key)} does not exist") from error

    def fetch(self, blob: Blob, *, remembered: bool = False) -> Path:
        """The file itself, verified. Raises MissingError, IntegrityError."""
        path = self._path(blob.key)
        if not path.exists():
            raise MissingError(f"{self.where(blob.key)} does not exist")
        good = self._verified.is_blob(path, blob) if remembered else is_blob(path, blob)
        if not good:
            size, found = path.stat().st_size, hash_file(path)
            raise IntegrityError(damaged(blob, self.where(blob.key), size, found))
        return path

    def fetch_unless_full(self, blob: Blob) -> Path | None:
        """The file itself, verified."""
        return self.fetch(blob, remembered=True)

    def check(self, blob: Blob) -> None:
        """Verify the file. Raises MissingError, IntegrityError."""
        self.fetch(blob)

    def read_range(self, blob: Blob, start: int, length: int) -> bytes:
        """Part of the file. Raises MissingError."""
        try:
            with self._path(blob.key).open("rb") as file:
                file.seek(start)
                return file.read(length)
        except FileNotFoundError as error:
            raise MissingError(f"{self.where(blob.key)} does not exist") from error

    def touch(self, blob: Blob) -> None:
        """Nothing: the file is the original, and no copy."""


def _fill(file: BinaryIO, path: Path, data: bytes | Path) -> None:
    """Write a file aside and make its bytes durable, before it gets its name."""
    for part in parts(data, WRITTEN_AT_ONCE_BYTES):
        file.write(part)
    file.flush()
    os.fsync(file.fileno())
    # Temporary files are private; a store in a folder may be shared.
    path.chmod(0o644)


def _numbered(number: int) -> str:
    return f"{number:012d}"


def _newest(folder: Path) -> int:
    """Number of the last successor; 0 for none."""
    if not folder.is_dir():
        return 0
    return max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)


def _version(number: int, data: bytes) -> str:
    return f"{number}-{sha256(data)}"


def _is_ours(key: str) -> bool:
    """Whether a file is one that the store keeps for itself."""
    return key.rpartition("/")[2].startswith(ASIDE) or key.startswith(
        (f"{VERIFIED}/", f"{CHANGES}/")
    )


# -- S3 -----------------------------------------------------------------------------------------


class S3Store(Store):
    """A prefix of an S3 bucket, with conditional writes and a verified local cache of blobs."""

    def __init__(self, bucket: str, prefix: str, *, cache: Cache) -> None:
        self.bucket = Bucket(bucket)
        self.prefix = prefix
        self.cache = cache
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    @property
    def copies_limit_bytes(self) -> int | None:
        """The most that the cache keeps; None: no limit."""
        return self.cache.limit_bytes

    def name(self, key: str) -> str:
        """Key of an object in the bucket."""
        return f"{self.prefix}/{key}" if self.prefix else key

    def read(self, key: str) -> bytes:
        """Bytes under a key. Raises MissingError, StoreError."""
        return self.bucket.read(self.name(key))

    def read_range(self, blob: Blob, start: int, length: int) -> bytes:
        """Part of a blob. Raises MissingError, StoreError."""
        return self.bucket.read(self.name(blob.key), start, length)

    def exists(self, key: str) -> bool:
        """Whether a key is there."""
        return self.bucket.size(self.name(key)) is not None

    def holds(self, blob: Blob) -> bool:
        """Whether a blob is there, with as many bytes as it should have."""
        return self.bucket.size(self.name(blob.key)) == blob.size_bytes

    def folders(self, prefix: str) -> list[str]:
        """What stands before the next "/" in keys that begin with a prefix, sorted."""
        cut = len(self.prefix) + 1 if self.prefix else 0
        return sorted(found[cut:] for found in self.bucket.folders(self.name(prefix)))

    def list(self, prefix: str) -> list[str]:
        """All keys that begin with a prefix, sorted."""
        cut = len(self.prefix) + 1 if self.prefix else 0
        return sorted(found.key[cut:] for found in self.bucket.list(self.name(prefix)))

    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of every key that begins with a prefix, sorted by key."""
        cut = len(self.prefix) + 1 if self.prefix else 0
        found = {one.key[cut:]: one.size_bytes for one in self.bucket.list(self.name(prefix))}
        return dict(sorted(found.items()))

    def download(self, key: str, file: BinaryIO) -> None:
        """Write an object's bytes to a file; asked for again where they break off."""
        for tries_left in reversed(range(TRIES)):
            try:
                self.bucket.download(self.name(key), file)
            except TransferError:
                if not tries_left:
                    raise
                file.seek(0)
                file.truncate()
            else:
                return

    def stored(self, prefix: str) -> Iterator[Stored]:
        """All keys that begin with a prefix, with their sizes and times."""
        cut = len(self.prefix) + 1 if self.prefix else 0
        for found in self.bucket.list(self.name(prefix)):
            yield Stored(found.key[cut:], found.size_bytes, found.modified)

    def modified(self, key: str) -> float | None:
        """The time of one key, in whole seconds; None where it is not there."""
        return self.bucket.modified(self.name(key))

    def refresh(self, blob: Blob) -> None:
        """Have a blob that is there count as written now. Raises MissingError."""
        self.bucket.refresh(self.name(blob.key), FRESH_SECONDS)

    def write_once(self, key: str, data: bytes | Path) -> bool:
        """Create a key with If-None-Match; False if it exists."""
        return self.bucket.create(self.name(key), data)

    def read_version(self, key: str) -> tuple[bytes, str]:
        """Bytes under a key and their ETag. Raises MissingError, StoreError."""
        return self.bucket.read_version(self.name(key))

    def replace(self, key: str, data: bytes, version: str) -> str | None:
        """Change a key with If-Match."""
        return self.bucket.replace(self.name(key), data, version)

    def delete(self, key: str) -> None:
        """Delete a key, if it is there."""
        self.bucket.delete(self.name(key))

    def fetch(self, blob: Blob, *, remembered: bool = False) -> Path:
        """Verified copy of a blob in the local cache."""
        return self.cache.fetch(
            blob, self._download(blob), self.where(blob.key), remembered=remembered
        )

    def fetch_unless_full(self, blob: Blob) -> Path | None:
        """Verified copy of a blob in the local cache, if there is room for it."""
        return self.cache.fetch_unless_full(blob, self._download(blob), self.where(blob.key))

    def check(self, blob: Blob) -> None:
        """Verify the copy of this machine, or what S3 sends."""
        self.cache.check(blob, self._download(blob), self.where(blob.key))

    def touch(self, blob: Blob) -> None:
        """Mark the copy in the cache as used now."""
        self.cache.touch(blob)

    def _download(self, blob: Blob) -> Download:
        return lambda file: self.bucket.download(self.name(blob.key), file)
