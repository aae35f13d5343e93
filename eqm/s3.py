"""One S3 bucket: conditional writes, ranged reads, listings, and errors in words.

What is written is create-once; what is read is not yet trusted: digests are the caller's business.
Of eqm the only module that imports boto3.
"""

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from eqm.disk import parts
from eqm.errors import AwayError, MissingError, StoreError, TransferError

PART_BYTES = 64 * 2**20
"""Objects larger than this travel in parts of this size."""

TRIES = 3
"""A body that breaks off is asked for again, boto3 itself retries no further than the headers; and
so is a write that is refused although nothing is there."""
REFUSED_SECONDS = 0.2
"""Wait after such a refusal, twice as long after the next."""
READ_SECONDS = 60
"""Silence after which a connection counts as dead."""

UNREACHABLE = (
    "S3 at {endpoint} cannot be reached ({error}): start the embedded services with `eqm up`, "
    "or check EQM_S3_ENDPOINT"
)
REFUSED = (
    "S3 at {endpoint} refuses these credentials ({error}): check AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or unset them to use those of `eqm up`"
)
FAILED = (
    "S3 at {endpoint} failed on {where} ({error}), also when it was asked again: look at the "
    "server (is its disk full?), then run again to go on"
)
NEITHER = (
    "S3 at {endpoint} refuses to write {where} as if another had been faster, but none was: run "
    "again to go on; if this stays, the server does not do conditional writes (If-None-Match, "
    "If-Match)"
)
SKEWED = (
    "S3 at {endpoint} refuses {where}, for its clock and that of this machine are too far apart "
    "({error}): set the clock (timedatectl)"
)
EXPIRED = (
    "the credentials for S3 at {endpoint} have expired ({error}): renew them, AWS_SESSION_TOKEN "
    "among them, and start the same command again: it goes on"
)
NOT_HAD = (
    "credentials for S3 at {endpoint} cannot be had ({error}): look at what gives them out, as the "
    "metadata service of this machine"
)
UNUSABLE = "S3 cannot be used: {error}; check the AWS_* variables"

TAKEN = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409", "NoSuchUpload")
"""What a conditional write is refused with. The last: an upload whose end was told before."""

BUSY = (429, "RequestTimeout", "TooManyRequests", "Throttling", "SlowDown", "InternalError")
"""Statuses and codes below 500 of a server that may answer in a while."""

T = TypeVar("T")


class Object(NamedTuple):
    """One object of a listing."""

    key: str
    size_bytes: int
    version: str
    """ETag: changes when the object does."""
    modified: float = 0.0
    """When it was written last, in seconds since 1970 by the clock of the S3."""


class KeyTakenError(StoreError):
    """A conditional write was refused: the key is taken, or another write of it is under way."""

    def __init__(self, message: str, *, retried: bool) -> None:
        super().__init__(message)
        self.retried = retried
        """Whether the answer to an earlier request was lost, which may have taken the key."""


class Bucket:
    """A bucket of the S3 that boto3's own chain of settings leads to. Methods raise StoreError."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.client = _client()
        self._bare = False
        """Whether this server compares If-Match with an ETag without its quotes, as Ceph does."""

    def where(self, key: str) -> str:
        """Full address of a key, for people."""
        return f"s3://{self.name}/{key}"

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of an object from ``start`` on, all or ``length``. Raises MissingError."""
        if length == 0:
            return b""
        ranged = {} if start == 0 and length is None else {"Range": _range(start, length)}

        def ask() -> bytes:
            found = self.client.get_object(Bucket=self.name, Key=key, **ranged)
            with _body_errors(self.where(key)):
                data = found["Body"].read()
            promised = _promised(found)
            if promised is not None and len(data) != promised:
                raise TransferError(
                    f"{self.where(key)} broke off after {len(data)} of {promised} bytes: run again"
                )
            return data

        return self._asked(key, ask)

    def download(self, key: str, file: BinaryIO) -> None:
        """Write an object's bytes to a file. Raises MissingError, TransferError."""
        with self._errors(key):
            body = self.client.get_object(Bucket=self.name, Key=key)["Body"]
            with _body_errors(self.where(key)):
                for chunk in body.iter_chunks(2**20):
                    file.write(chunk)

    def size(self, key: str) -> int | None:
        """Bytes of an object; None if there is none."""
        head = self._head(key)
        return None if head is None else head["ContentLength"]

    def modified(self, key: str) -> float | None:
        """When an object was written, in seconds of Unix; None if there is none."""
        head = self._head(key)
        return None if head is None else head["LastModified"].timestamp()

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            with self._errors(key):
                return self.client.head_object(Bucket=self.name, Key=key)
        except MissingError:
            return None

    def list(self, prefix: str) -> Iterator[Object]:
        """All objects whose keys begin with a prefix, in the order of S3 (by bytes of the key)."""
        for page in self._pages(prefix):
            for item in page.get("Contents", ()):
                etag, modified = item["ETag"].strip('"'), item["LastModified"].timestamp()
                yield Object(item["Key"], item["Size"], etag, modified)

    def folders(self, prefix: str) -> Iterator[str]:
        """What stands before the next "/" in keys that begin with a prefix, each once."""
        for page in self._pages(prefix, Delimiter="/"):
            for item in page.get("CommonPrefixes", ()):
                yield item["Prefix"].removesuffix("/")

    def _pages(self, prefix: str, **more: str) -> Iterator[dict[str, Any]]:
        """Answers of a listing, a thousand items each."""
        asked = {"Bucket": self.name, "Prefix": prefix, **more}
        while True:
            page = self._asked(prefix, lambda: self.client.list_objects_v2(**asked))
            yield page
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def refresh(self, key: str, older_than_seconds: float) -> None:
        """Make an object as new as one that is written now, if it is older. Raises MissingError."""
        with self._errors(key):
            found = self.client.head_object(Bucket=self.name, Key=key)
            age = datetime.datetime.now(datetime.UTC) - found["LastModified"]
            if age.total_seconds() > older_than_seconds:
                # A copy onto itself, in parts where it is large, is refused unless metadata change.
                self.client.copy(
                    {"Bucket": self.name, "Key": key},
                    self.name,
                    key,
                    ExtraArgs={"MetadataDirective": "REPLACE"},
                )

    def create(self, key: str, data: bytes | Path) -> bool:
        """Create an object with If-None-Match; False, and nothing changed, if it exists.

        An answer may be lost on the way, and the request that is sent again then meets the object
        that the first one made: that is told by its bytes, and is True. A refusal where nothing is
        (409: another write was under way, and failed) is followed by another try.
        """
        size_bytes = data.stat().st_size if isinstance(data, Path) else len(data)
        if size_bytes > PART_BYTES and self.size(key) is not None:
            return False
        refused = False
        for number in range(TRIES):
            try:
                with self._errors(key):
                    self._send(key, data, size_bytes)
                return True
            except KeyTakenError as error:
                found = self.size(key)
                if found is not None:
                    may_be_ours = (refused or error.retried) and found == size_bytes
                    return may_be_ours and self._holds(key, data)
            refused = True
            time.sleep(REFUSED_SECONDS * 2**number)
        raise StoreError(
            NEITHER.format(endpoint=self.client.meta.endpoint_url, where=self.where(key))
        )

    def _holds(self, key: str, data: bytes | Path) -> bool:
        """Whether the object is these bytes."""
        start = 0
        for part in parts(data, PART_BYTES):
            if self.read(key, start, len(part)) != part:
                return False
            start += len(part)
        return True

    def read_version(self, key: str) -> tuple[bytes, str]:
        """Bytes of a small object and the version that they are of. Raises MissingError."""

        def ask() -> tuple[bytes, str]:
            found = self.client.get_object(Bucket=self.name, Key=key)
            with _body_errors(self.where(key)):
                return found["Body"].read(), found["ETag"]

        return self._asked(key, ask)

    def replace(self, key: str, data: bytes, version: str) -> str | None:
        """Change an object with If-Match; its new version, or None if it is another one by now.

        Like :meth:`create`, it knows its own write again when an answer was lost, and tries again
        where it was refused although nothing has changed: then also with the version in the other
        of the two forms that servers know.
        """
        for number in range(TRIES):
            try:
                with self._errors(key):
                    sent = {"Bucket": self.name, "Key": key, "Body": data}
                    match = version.strip('"') if self._bare else version
                    return self.client.put_object(**sent, IfMatch=match)["ETag"]
            except (KeyTakenError, MissingError):
                try:
                    found, there = self.read_version(key)
                except MissingError:
                    return None
                if found == data:
                    return there
                if there != version:
                    return None
                self._bare = not self._bare
            time.sleep(REFUSED_SECONDS * 2**number)
        raise StoreError(
            NEITHER.format(endpoint=self.client.meta.endpoint_url, where=self.where(key))
        )

    def delete(self, key: str) -> None:
        """Delete an object, if it is there."""
        with self._errors(key):
            self.client.delete_object(Bucket=self.name, Key=key)

    def _send(self, key: str, data: bytes | Path, size_bytes: int) -> None:
        if size_bytes > PART_BYTES:
            self._upload(key, data)
        else:
            self._put(key, data.read_bytes() if isinstance(data, Path) else data)

    def _put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data, IfNoneMatch="*")

    def _upload(self, key: str, data: bytes | Path) -> None:
        """Upload in parts; the key appears, create-once, when the last call succeeds."""
        target = {"Bucket": self.name, "Key": key}
        upload = self.client.create_multipart_upload(**target)["UploadId"]
        done = []
        try:
            for number, part in enumerate(parts(data, PART_BYTES), start=1):
                sent = self.client.upload_part(
                    **target, UploadId=upload, PartNumber=number, Body=part
                )
                done.append({"PartNumber": number, "ETag": sent["ETag"]})
            self.client.complete_multipart_upload(
                **target, UploadId=upload, MultipartUpload={"Parts": done}, IfNoneMatch="*"
            )
        except BaseException:
            # Interrupts too: parts of an abandoned upload cost storage and are seen by nobody.
            # What went wrong before is what is told, not that this fails as well: the server may
            # be away, or the upload complete and only the answer lost.
            with contextlib.suppress(Exception):
                self.client.abort_multipart_upload(**target, UploadId=upload)
            raise

    def _asked(self, key: str, ask: Callable[[], T]) -> T:
        """What a question is answered; asked again where the answer broke off."""
        for tries_left in reversed(range(TRIES)):
            try:
                with self._errors(key):
                    return ask()
            except TransferError:
                if not tries_left:
                    raise
        raise AssertionError("unreachable")

    def _errors(self, key: str) -> contextlib.AbstractContextManager[None]:
        return _in_words(self.client.meta.endpoint_url, self.name, self.where(key))


def _range(start: int, length: int | None) -> str:
    return f"bytes={start}-" if length is None else f"bytes={start}-{start + length - 1}"


def _promised(answer: dict[str, Any]) -> int | None:
    """Bytes that a ranged answer says it holds ("bytes 0-9/5000"); None for a whole object."""
    span, _, _ = answer.get("ContentRange", "").removeprefix("bytes ").partition("/")
    first, _, last = span.partition("-")
    return int(last) - int(first) + 1 if first.isdigit() and last.isdigit() else None


@contextlib.contextmanager
def _body_errors(where: str) -> Iterator[None]:
    """A body that stops in the middle is worth another try; boto3 sees it as a dead server."""
    from botocore.exceptions import ReadTimeoutError

    try:
        yield
    except ReadTimeoutError as error:
        raise TransferError(f"{where} broke off while it was read ({error}): run again") from error


def _client() -> Any:
    import boto3.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    settings = Config(
        retries={"mode": "standard", "max_attempts": 4},
        connect_timeout=5,
        read_timeout=READ_SECONDS,
        max_pool_connections=64,
        s3={"addressing_style": "path"},
    )
    # A session of our own: the default one keeps the first credentials that it ever saw.
    try:
        return boto3.session.Session().client("s3", config=settings)
    except (BotoCoreError, ValueError) as error:
        raise StoreError(UNUSABLE.format(error=error)) from error


@contextlib.contextmanager
def _in_words(endpoint: str, bucket: str, where: str) -> Iterator[None]:
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    broken_off = (
        exceptions.IncompleteReadError,
        exceptions.ResponseStreamingError,
        # A body that was cut and looks whole: its CRC, or the end of its XML, is what tells.
        exceptions.FlexibleChecksumError,
        ResponseParserError,
    )
    not_had = (
        exceptions.CredentialRetrievalError,
        exceptions.MetadataRetrievalError,
        exceptions.TokenRetrievalError,
    )
    try:
        yield
    except exceptions.ClientError as error:
        raise _from_client_error(error, endpoint, bucket, where) from error
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise StoreError(REFUSED.format(endpoint=endpoint, error=error)) from error
    except broken_off as error:
        raise TransferError(f"{where} broke off while it was read ({error}): run again") from error
    except (exceptions.ConnectionError, exceptions.HTTPClientError) as error:
        reason = type(error).__name__
        raise AwayError(UNREACHABLE.format(endpoint=endpoint, error=reason)) from error
    except not_had as error:
        # They are given out for hours, and asked for again before those are over.
        raise AwayError(NOT_HAD.format(endpoint=endpoint, error=error)) from error
    except exceptions.BotoCoreError as error:
        raise StoreError(UNUSABLE.format(error=error)) from error


def _from_client_error(error: Any, endpoint: str, bucket: str, where: str) -> StoreError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    if code in ("NoSuchKey", "404", "NotFound"):
        return MissingError(f"{where} does not exist")
    if code == "NoSuchBucket":
        return StoreError(f"S3 at {endpoint} has no bucket {bucket!r}: create it")
    if code in TAKEN:
        told = error.response.get("ResponseMetadata", {})
        return KeyTakenError(f"{where} exists already", retried=told.get("RetryAttempts", 0) > 0)
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "403", "Forbidden"):
        return StoreError(REFUSED.format(endpoint=endpoint, error=code))
    if code == "RequestTimeTooSkewed":
        # Not for long, where something sets the clock that has jumped.
        return AwayError(SKEWED.format(endpoint=endpoint, where=where, error=code))
    if code.startswith("ExpiredToken"):
        return StoreError(EXPIRED.format(endpoint=endpoint, error=code))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status >= 500 or status in BUSY or code in BUSY:
        return AwayError(FAILED.format(endpoint=endpoint, where=where, error=error))
    return StoreError(f"S3 at {endpoint} failed on {where}: {error}")
