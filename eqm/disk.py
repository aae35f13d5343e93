"""Files of this machine, written so that nobody ever sees half of one.

Everything that is kept is written aside, synced and put in place in one step; a full or read-only
disk is told in words. What lies where is the business of eqm.storage and eqm.cache.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eqm.errors import StoreError

ASIDE = ".aside-"
"""Names of files that are still being written begin with this."""
NO_FILE = (errno.ENOTDIR, errno.EISDIR)
"""What stands where a file should be, or where its folder should."""
YOUNG_SECONDS = 60.0
"""A file aside is left alone for so long after it was last written."""


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable, as fsync makes bytes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def written_aside(folder: Path) -> Iterator[tuple[Any, Path]]:
    """Give an open temporary file in a folder; it is gone afterwards, whatever happens.

    A process that is killed leaves the file; it is locked while it is written, so that
    :func:`sweep` can tell what was left from what is still being written.
    """
    handle, name = tempfile.mkstemp(prefix=ASIDE, dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file, Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def sweep(folder: Path) -> int:
    """Delete files that a killed process left half-written in a folder; returns how many."""
    swept = 0
    for path in folder.glob(f"{ASIDE}*"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # One that is a moment old may be about to be locked.
            if time.time() - os.fstat(file.fileno()).st_mtime > YOUNG_SECONDS:
                path.unlink()
                swept += 1
    return swept


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock that all processes of this machine see, once it is free.

    The lock is the kernel's: it ends with its process, however that ends. Raises BlockingIOError
    where it is not free and ``wait`` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


@contextlib.contextmanager
def disk_errors(place: str) -> Iterator[None]:
    """Turn a full or read-only disk into a StoreError that says where."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(f"the disk is full at {place}: free space and run again") from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, *NO_FILE):
            raise StoreError(
                f"{place} cannot be written ({error.strerror}): name another place, or mend its "
                "rights"
            ) from error
        raise


def parts(data: bytes | Path, size: int) -> Iterator[bytes]:
    """Bytes, or those of a file, in parts of a size; nothing for no bytes."""
    if isinstance(data, bytes):
        yield from (data[start : start + size] for start in range(0, len(data), size))
        return
    with data.open("rb") as file:
        while part := file.read(size):
            yield part
