"""Bytes in and out of the store: S3 or a local directory behind one small interface.

A store holds *blobs* (``blobs/sha256/<digest>``, named by what they are) and *keys* that are
written once and never changed. Nothing read back is trusted until its digest matches. The only
module that imports boto3.
"""

import contextlib
import errno
import functools
import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from eqm.errors import ConfigError, IntegrityError, MissingError, StoreError
from eqm.records import Blob, Record, record_from_bytes, record_to_bytes, sha256

PART_BYTES = 64 * 2**20
"""Objects larger than this travel in parts of this size."""

UNREACHABLE = (
    "S3 at {endpoint} cannot be reached ({error}): start the embedded services with `eqm up`, "
    "or check EQM_S3_ENDPOINT"
)
REFUSED = (
    "S3 at {endpoint} refuses these credentials ({error}): check AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or unset them to use those of `eqm up`"
)


def open_store(uri: str, *, cache: Path | None = None) -> "Store":
    """Open ``s3://bucket/prefix`` or a local directory (made if it is missing).

    ``cache`` is where verified copies of S3 blobs are kept on this machine. S3 endpoint, region and
    credentials are those of boto3's own chain. Raises ConfigError for another kind of address.
    """
    parts = urlsplit(uri)
    if parts.scheme == "s3":
        if not parts.netloc:
            raise ConfigError(f"store {uri!r} names no bucket: s3://bucket/prefix")
        kept = cache or Path.home() / ".cache" / "eqm"
        return S3Store(parts.netloc, parts.path.strip("/"), cache=kept)
    if parts.scheme or "://" in uri:
        raise ConfigError(f"store {uri!r}: only s3://bucket/prefix or a local directory")
    return LocalStore(Path(uri))


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=4096)
def _hash_of_inode(path: Path, inode: int, size_bytes: int, mtime_ns: int) -> str:
    """Hash a file once for as long as inode, size and time of change stay the same."""
    return hash_file(path)


def _is(path: Path, blob: Blob) -> bool:
    stat = path.stat()
    if stat.st_size != blob.size_bytes:
        return False
    return _hash_of_inode(path, stat.st_ino, stat.st_size, stat.st_mtime_ns) == blob.sha256


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
    def exists(self, key: str) -> bool:
        """Whether a key is there."""

    @abstractmethod
    def holds(self, blob: Blob) -> bool:
        """Whether a blob is there, with as many bytes as it should have."""

    @abstractmethod
    def list(self, prefix: str) -> list[str]:
        """All keys that begin with a prefix, sorted."""

    @abstractmethod
    def fetch(self, blob: Blob) -> Path:
        """Read-only local file with the blob's bytes, verified. Raises IntegrityError."""

    def where(self, key: str) -> str:
        """Full address of a key, for people."""
        return f"{self.uri}/{key}"

    def put(self, data: bytes | Path) -> Blob:
        """Store bytes or a file under their digest; equal bytes are stored once."""
        if isinstance(data, Path):
            blob = Blob(sha256=hash_file(data), size_bytes=data.stat().st_size)
        else:
            blob = Blob(sha256=sha256(data), size_bytes=len(data))
        self.write_once(blob.key, data)
        return blob

    def get(self, blob: Blob) -> bytes:
        """Bytes of a blob, verified before they are returned. Raises IntegrityError."""
        data = self.read(blob.key)
        if len(data) != blob.size_bytes or sha256(data) != blob.sha256:
            raise IntegrityError(self._damaged(blob, len(data), sha256(data)))
        return data

    def record(self, stage: str, digest: str) -> Record | None:
        """The sealed record of a stage, verified; None if it is not sealed yet."""
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

    def _damaged(self, blob: Blob, size_bytes: int, found: str) -> str:
        return (
            f"{self.where(blob.key)} is damaged: it holds {size_bytes} bytes with SHA-256 "
            f"{found[:16]}…, sealed were {blob.size_bytes} bytes with {blob.sha256[:16]}…; "
            "restore it from a copy, or delete it and the record that names it and run again"
        )


def record_key(stage: str, digest: str) -> str:
    """Where the record of a stage lies."""
    return f"{stage}/{digest}/record.json"


# -- a local directory --------------------------------------------------------------------------


class LocalStore(Store):
    """A directory on this machine; for work without services and for tests."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)

    def _path(self, key: str) -> Path:
        path = self.root / key
        if ".." in Path(key).parts or Path(key).is_absolute():
            raise StoreError(f"key {key!r} leaves the store {self.uri}")
        return path

    def read(self, key: str) -> bytes:
        """Bytes under a key. Raises MissingError."""
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError as error:
            raise MissingError(f"{self.where(key)} does not exist") from error

    def write_once(self, key: str, data: bytes | Path) -> bool:
        """Create a key; False if it exists. Written aside, synced, then linked into place."""
        path = self._path(key)
        with disk_errors(str(self.root)):
            if path.exists():
                return False
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(path.parent) as (file, aside):
                for part in _parts(data):
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
                # Temporary files are private; a store in a folder may be shared.
                aside.chmod(0o644)
                try:
                    os.link(aside, path)
                except FileExistsError:
                    return False
            _sync_folder(path.parent)
        return True

    def exists(self, key: str) -> bool:
        """Whether a key is there."""
        return self._path(key).is_file()

    def holds(self, blob: Blob) -> bool:
        """Whether a blob is there, with as many bytes as it should have."""
        path = self._path(blob.key)
        return path.is_file() and path.stat().st_size == blob.size_bytes

    def list(self, prefix: str) -> list[str]:
        """All keys that begin with a prefix, sorted."""
        folder = self._path(prefix.rpartition("/")[0] or ".")
        files = (path for path in folder.rglob("*") if path.is_file())
        keys = (path.relative_to(self.root).as_posix() for path in files)
        return sorted(k for k in keys if k.startswith(prefix) and not _is_aside(k))

    def fetch(self, blob: Blob) -> Path:
        """The file itself, verified."""
        path = self._path(blob.key)
        if not path.exists():
            raise MissingError(f"{self.where(blob.key)} does not exist")
        if not _is(path, blob):
            raise IntegrityError(self._damaged(blob, path.stat().st_size, hash_file(path)))
        return path


def _sync_folder(folder: Path) -> None:
    """Make names in a folder durable, as fsync makes bytes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_aside(key: str) -> bool:
    return key.rpartition("/")[2].startswith(".aside-")


@contextlib.contextmanager
def written_aside(folder: Path) -> Iterator[tuple[Any, Path]]:
    """Give an open temporary file in a folder; it is gone afterwards, whatever happens."""
    handle, name = tempfile.mkstemp(prefix=".aside-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file, Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(place: str) -> Iterator[None]:
    """Turn a full or read-only disk into a StoreError that says where."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(f"the disk is full at {place}: free space and run again") from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            raise StoreError(f"{place} cannot be written ({error.strerror})") from error
        raise


def _parts(data: bytes | Path) -> Iterator[bytes]:
    if isinstance(data, bytes):
        yield data
        return
    with data.open("rb") as file:
        while part := file.read(PART_BYTES):
            yield part


# -- S3 -----------------------------------------------------------------------------------------


class S3Store(Store):
    """A prefix of an S3 bucket, with conditional writes and a verified local cache of blobs."""

    def __init__(self, bucket: str, prefix: str, *, cache: Path) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.cache = cache
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self.client = _client()

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _errors(self, key: str) -> contextlib.AbstractContextManager[None]:
        return _s3_errors(self.client.meta.endpoint_url, self.bucket, self.where(key))

    def read(self, key: str) -> bytes:
        """Bytes under a key. Raises MissingError, StoreError."""
        with self._errors(key):
            response = self.client.get_object(Bucket=self.bucket, Key=self._name(key))
            return response["Body"].read()

    def exists(self, key: str) -> bool:
        """Whether a key is there."""
        return self._size(key) is not None

    def holds(self, blob: Blob) -> bool:
        """Whether a blob is there, with as many bytes as it should have."""
        return self._size(blob.key) == blob.size_bytes

    def _size(self, key: str) -> int | None:
        try:
            with self._errors(key):
                head = self.client.head_object(Bucket=self.bucket, Key=self._name(key))
        except MissingError:
            return None
        return head["ContentLength"]

    def list(self, prefix: str) -> list[str]:
        """All keys that begin with a prefix, sorted."""
        cut = len(self.prefix) + 1 if self.prefix else 0
        with self._errors(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._name(prefix)
            )
            return sorted(item["Key"][cut:] for page in pages for item in page.get("Contents", ()))

    def write_once(self, key: str, data: bytes | Path) -> bool:
        """Create a key with If-None-Match; False if it exists."""
        size_bytes = data.stat().st_size if isinstance(data, Path) else len(data)
        try:
            if size_bytes > PART_BYTES and self.exists(key):
                return False
            with self._errors(key):
                if size_bytes > PART_BYTES:
                    self._upload(key, data)
                else:
                    self._put(key, b"".join(_parts(data)))
        except _KeyTakenError:
            return False
        return True

    def _put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self._name(key), Body=data, IfNoneMatch="*")

    def _upload(self, key: str, data: bytes | Path) -> None:
        """Upload in parts; the key appears, create-once, when the last call succeeds."""
        target = {"Bucket": self.bucket, "Key": self._name(key)}
        upload = self.client.create_multipart_upload(**target)["UploadId"]
        done = []
        try:
            for number, part in enumerate(_slices(data), start=1):
                sent = self.client.upload_part(
                    **target, UploadId=upload, PartNumber=number, Body=part
                )
                done.append({"PartNumber": number, "ETag": sent["ETag"]})
            self.client.complete_multipart_upload(
                **target, UploadId=upload, MultipartUpload={"Parts": done}, IfNoneMatch="*"
            )
        except BaseException:
            # Interrupts too: parts of an abandoned upload cost storage and are seen by nobody.
            self.client.abort_multipart_upload(**target, UploadId=upload)
            raise

    def fetch(self, blob: Blob) -> Path:
        """Verified copy of a blob in the local cache."""
        path = self.cache / "sha256" / blob.sha256
        with disk_errors(str(self.cache)):
            if path.exists() and _is(path, blob):
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(path.parent) as (file, aside), self._errors(blob.key):
                response = self.client.get_object(Bucket=self.bucket, Key=self._name(blob.key))
                for chunk in response["Body"].iter_chunks(2**20):
                    file.write(chunk)
                file.flush()
                if not _is(aside, blob):
                    size_bytes, found = aside.stat().st_size, hash_file(aside)
                    raise IntegrityError(self._damaged(blob, size_bytes, found))
                aside.chmod(0o444)
                # Replaces a damaged copy; equal bytes otherwise.
                os.replace(aside, path)
        return path


def _slices(data: bytes | Path) -> Iterator[bytes]:
    if isinstance(data, Path):
        yield from _parts(data)
        return
    for start in range(0, len(data), PART_BYTES):
        yield data[start : start + PART_BYTES]


class _KeyTakenError(StoreError):
    """A conditional write found the key taken."""


def _client() -> Any:
    import boto3.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    settings = Config(
        retries={"mode": "standard", "max_attempts": 4},
        connect_timeout=5,
        read_timeout=60,
        s3={"addressing_style": "path"},
    )
    # A session of our own: the default one keeps the first credentials that it ever saw.
    try:
        return boto3.session.Session().client("s3", config=settings)
    except (BotoCoreError, ValueError) as error:
        raise StoreError(f"S3 cannot be used: {error}; check the AWS_* variables") from error


@contextlib.contextmanager
def _s3_errors(endpoint: str, bucket: str, where: str) -> Iterator[None]:
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        raise _from_client_error(error, endpoint, bucket, where) from error
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise StoreError(REFUSED.format(endpoint=endpoint, error=error)) from error
    except _unreachable() as error:
        reason = type(error).__name__
        raise StoreError(UNREACHABLE.format(endpoint=endpoint, error=reason)) from error


def _unreachable() -> tuple[type[Exception], ...]:
    from botocore import exceptions

    return (
        exceptions.ConnectionError,
        exceptions.HTTPClientError,
        exceptions.ResponseStreamingError,
    )


def _from_client_error(error: Any, endpoint: str, bucket: str, where: str) -> StoreError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    if code in ("NoSuchKey", "404", "NotFound"):
        return MissingError(f"{where} does not exist")
    if code == "NoSuchBucket":
        return StoreError(f"S3 at {endpoint} has no bucket {bucket!r}: create it")
    if code in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
        return _KeyTakenError(f"{where} exists already")
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "403", "Forbidden"):
        return StoreError(REFUSED.format(endpoint=endpoint, error=code))
    return StoreError(f"S3 at {endpoint} failed on {where}: {error}")
