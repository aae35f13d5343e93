"""One S3 bucket: conditional writes, ranged reads, listings, and errors in words.

What is written is create-once; what is read is not yet trusted: digests are the caller's business.
The only module that imports boto3.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from eqm.disk import parts
from eqm.errors import MissingError, StoreError, TransferError

PART_BYTES = 64 * 2**20
"""Objects larger than this travel in parts of this size."""

TRIES = 3
"""A body that breaks off is asked for again; boto3 itself retries no further than the headers."""

UNREACHABLE = (
    "S3 at {endpoint} cannot be reached ({error}): start the embedded services with `eqm up`, "
    "or check EQM_S3_ENDPOINT"
)
REFUSED = (
    "S3 at {endpoint} refuses these credentials ({error}): check AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or unset them to use those of `eqm up`"
)


class Object(NamedTuple):
    """One object of a listing."""

    key: str
    size_bytes: int
    version: str
    """ETag: changes when the object does."""


class KeyTakenError(StoreError):
    """A conditional write found the key taken."""


class Bucket:
    """A bucket of the S3 that boto3's own chain of settings leads to. Methods raise StoreError."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.client = _client()

    def where(self, key: str) -> str:
        """Full address of a key, for people."""
        return f"s3://{self.name}/{key}"

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of an object from ``start`` on, all or ``length``. Raises MissingError."""
        if length == 0:
            return b""
        ranged = {} if start == 0 and length is None else {"Range": _range(start, length)}
        for tries_left in reversed(range(TRIES)):
            try:
                with self._errors(key):
                    found = self.client.get_object(Bucket=self.name, Key=key, **ranged)
                    return found["Body"].read()
            except TransferError:
                if not tries_left:
                    raise
        raise AssertionError("unreachable")

    def download(self, key: str, file: BinaryIO) -> None:
        """Write an object's bytes to a file. Raises MissingError, TransferError."""
        with self._errors(key):
            body = self.client.get_object(Bucket=self.name, Key=key)["Body"]
            for chunk in body.iter_chunks(2**20):
                file.write(chunk)

    def size(self, key: str) -> int | None:
        """Bytes of an object; None if there is none."""
        try:
            with self._errors(key):
                return self.client.head_object(Bucket=self.name, Key=key)["ContentLength"]
        except MissingError:
            return None

    def list(self, prefix: str) -> Iterator[Object]:
        """All objects whose keys begin with a prefix, in the order of S3 (by bytes of the key)."""
        with self._errors(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.name, Prefix=prefix
            )
            for page in pages:
                for item in page.get("Contents", ()):
                    yield Object(item["Key"], item["Size"], item["ETag"].strip('"'))

    def create(self, key: str, data: bytes | Path) -> bool:
        """Create an object with If-None-Match; False, and nothing changed, if it exists."""
        size_bytes = data.stat().st_size if isinstance(data, Path) else len(data)
        try:
            if size_bytes > PART_BYTES and self.size(key) is not None:
                return False
            with self._errors(key):
                if size_bytes > PART_BYTES:
                    self._upload(key, data)
                else:
                    self._put(key, data.read_bytes() if isinstance(data, Path) else data)
        except KeyTakenError:
            return False
        return True

    def read_version(self, key: str) -> tuple[bytes, str]:
        """Bytes of a small object and the version that they are of. Raises MissingError."""
        with self._errors(key):
            found = self.client.get_object(Bucket=self.name, Key=key)
            return found["Body"].read(), found["ETag"]

    def replace(self, key: str, data: bytes, version: str) -> str | None:
        """Change an object with If-Match; its new version, or None if it is another one by now."""
        try:
            with self._errors(key):
                done = self.client.put_object(Bucket=self.name, Key=key, Body=data, IfMatch=version)
        except (KeyTakenError, MissingError):
            return self._if_ours(key, data)
        return done["ETag"]

    def _if_ours(self, key: str, data: bytes) -> str | None:
        """Version of an object that was written, but refused when boto3 sent it once more."""
        try:
            found, version = self.read_version(key)
        except MissingError:
            return None
        return version if found == data else None

    def delete(self, key: str) -> None:
        """Delete an object, if it is there."""
        with self._errors(key):
            self.client.delete_object(Bucket=self.name, Key=key)

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
            self.client.abort_multipart_upload(**target, UploadId=upload)
            raise

    def _errors(self, key: str) -> contextlib.AbstractContextManager[None]:
        return _in_words(self.client.meta.endpoint_url, self.name, self.where(key))


def _range(start: int, length: int | None) -> str:
    return f"bytes={start}-" if length is None else f"bytes={start}-{start + length - 1}"


def _client() -> Any:
    import boto3.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    settings = Config(
        retries={"mode": "standard", "max_attempts": 4},
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=64,
        s3={"addressing_style": "path"},
    )
    # A session of our own: the default one keeps the first credentials that it ever saw.
    try:
        return boto3.session.Session().client("s3", config=settings)
    except (BotoCoreError, ValueError) as error:
        raise StoreError(f"S3 cannot be used: {error}; check the AWS_* variables") from error


@contextlib.contextmanager
def _in_words(endpoint: str, bucket: str, where: str) -> Iterator[None]:
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        raise _from_client_error(error, endpoint, bucket, where) from error
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise StoreError(REFUSED.format(endpoint=endpoint, error=error)) from error
    except (exceptions.IncompleteReadError, exceptions.ResponseStreamingError) as error:
        raise TransferError(f"{where} broke off while it was read ({error}): run again") from error
    except (exceptions.ConnectionError, exceptions.HTTPClientError) as error:
        reason = type(error).__name__
        raise StoreError(UNREACHABLE.format(endpoint=endpoint, error=reason)) from error


def _from_client_error(error: Any, endpoint: str, bucket: str, where: str) -> StoreError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    if code in ("NoSuchKey", "404", "NotFound"):
        return MissingError(f"{where} does not exist")
    if code == "NoSuchBucket":
        return StoreError(f"S3 at {endpoint} has no bucket {bucket!r}: create it")
    if code in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
        return KeyTakenError(f"{where} exists already")
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "403", "Forbidden"):
        return StoreError(REFUSED.format(endpoint=endpoint, error=code))
    return StoreError(f"S3 at {endpoint} failed on {where}: {error}")
