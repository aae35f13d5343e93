"""Verified copies of blobs on this machine, within a limit, shared by all its processes.

A copy appears under its digest in one step, after its bytes were hashed as they came in: a crash
leaves at most a file aside, which the next one sweeps. One process fetches a blob while the others
wait for it. Beyond the limit the copies that were used longest ago are deleted; those
of the last minutes never are, so jobs that share a cache do not take each other's away. A copy may
be deleted while somebody has it mapped: the mapping stays.
"""

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from eqm.disk import disk_errors, hash_file, locked, sweep, written_aside
from eqm.errors import IntegrityError, TransferError
from eqm.records import Blob

IN_USE_SECONDS = 600.0
"""A copy that was used within these is not deleted for want of room."""
TRIES = 3
"""A transfer that broke off or was damaged is tried again: the object itself may be well."""


@functools.lru_cache(maxsize=4096)
def _hash_of_inode(path: Path, inode: int, size_bytes: int, mtime_ns: int) -> str:
    """Hash a file once for as long as inode, size and time of change stay the same."""
    return hash_file(path)


def is_blob(path: Path, blob: Blob) -> bool:
    """Whether a file holds a blob; hashed once a process, as long as the file is not changed."""
    stat = path.stat()
    if stat.st_size != blob.size_bytes:
        return False
    return _hash_of_inode(path, stat.st_ino, stat.st_size, stat.st_mtime_ns) == blob.sha256


class Verified:
    """A memory, across processes, of files that were hashed: by inode, size and time of change.

    For files whose every read is checked by a CRC as well; what is parsed is hashed each time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def is_blob(self, path: Path, blob: Blob) -> bool:
        """As :func:`is_blob`, but hashed once a machine."""
        stat, note = path.stat(), self.folder / blob.sha256
        now = f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if stat.st_size == blob.size_bytes and note.read_text() == now:
                return True
        if not is_blob(path, blob):
            return False
        self.remember(path, blob)
        return True

    def remember(self, path: Path, blob: Blob) -> None:
        """Note that a file was hashed. A place that cannot be written costs time, nothing else."""
        stat = path.stat()
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_aside(self.folder) as (file, aside):
                file.write(f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}".encode())
                file.flush()
                os.replace(aside, self.folder / blob.sha256)


Download = Callable[[BinaryIO], None]
"""Writes a blob's bytes to a file."""


class Cache:
    """Copies of blobs under ``folder``, not more than ``limit_bytes`` of them; None: no limit."""

    def __init__(self, folder: Path, limit_bytes: int | None = None) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.verified = Verified(folder / "verified")

    def path(self, blob: Blob) -> Path:
        """Where the copy of a blob lies, if there is one."""
        return self.folder / "sha256" / blob.sha256

    def found(self, blob: Blob, *, remembered: bool = False) -> Path | None:
        """The copy of a blob, verified and marked as used; None if there is no good one.

        ``remembered``: hashed once a machine, not once a process (:class:`Verified`).
        """
        path = self.path(blob)
        try:
            good = self.verified.is_blob(path, blob) if remembered else is_blob(path, blob)
        except FileNotFoundError:
            return None
        if not good:
            return None
        self.touch(blob)
        return path

    def touch(self, blob: Blob) -> None:
        """Mark a copy as used now."""
        path = self.path(blob)
        with contextlib.suppress(OSError):
            # The time of access alone: the time of change is what the copy is known by.
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))

    def fetch(
        self, blob: Blob, download: Download, where: str, *, remembered: bool = False
    ) -> Path:
        """The verified copy of a blob, downloaded if there is none.

        Raises IntegrityError where what comes is not the blob, StoreError for a full disk.
        """
        found = self.found(blob, remembered=remembered)
        if found is not None:
            return found
        with disk_errors(str(self.folder)), locked(self._lock(blob)):
            # Another process may have fetched it while this one waited.
            found = self.found(blob, remembered=remembered) or self._download(blob, download, where)
            assert found is not None
            return found

    def fetch_unless_full(
        self, blob: Blob, download: Download, where: str, *, remembered: bool = True
    ) -> Path | None:
        """As ``fetch``; None where there is no room for it."""
        found = self.found(blob, remembered=remembered)
        if found is not None:
            return found
        with disk_errors(str(self.folder)), locked(self._lock(blob)):
            found = self.found(blob, remembered=remembered)
            return found or self._download(blob, download, where, unless_full=True)

    def check(self, blob: Blob, download: Download, where: str) -> None:
        """Verify a blob, as this machine would use it, and keep a copy where there is room.

        What is larger than the room is read and hashed all the same. Raises as ``fetch``.
        """
        if self.fetch_unless_full(blob, download, where, remembered=False) is None:
            with open(os.devnull, "wb") as nowhere:
                _transfer(lambda: nowhere, blob, download, where)

    def _lock(self, blob: Blob) -> Path:
        # Few lock files for many blobs: two that share one wait for each other, and that is all.
        return self.folder / "locks" / blob.sha256[:2]

    def _download(
        self, blob: Blob, download: Download, where: str, *, unless_full: bool = False
    ) -> Path | None:
        if unless_full and self.limit_bytes is not None and blob.size_bytes > self.limit_bytes:
            # Nor would there be if all others went.
            return None
        path = self.path(blob)
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as kept:
            with locked(self.folder / "locks" / "room"):
                if not self._make_room(blob.size_bytes) and unless_full:
                    return None
                file, aside = kept.enter_context(written_aside(path.parent))
                # Takes its room at once: others count it before it is there.
                file.truncate(blob.size_bytes)

            def begin() -> Any:
                file.seek(0)
                file.truncate(blob.size_bytes)
                return file

            _transfer(begin, blob, download, where)
            file.flush()
            os.fsync(file.fileno())
            aside.chmod(0o444)
            # Replaces a damaged copy; equal bytes otherwise.
            os.replace(aside, path)
            self.verified.remember(path, blob)
        return path

    def _make_room(self, size_bytes: int) -> bool:
        """Delete what was used longest ago until so much fits; whether it does."""
        folder = self.folder / "sha256"
        sweep(folder)
        if self.limit_bytes is None:
            return True
        copies = sorted(_copies(folder))
        used = sum(size for _, size, _ in copies)
        recently = time.time() - IN_USE_SECONDS
        for at, size, path in copies:
            if used + size_bytes <= self.limit_bytes or at > recently:
                break
            path.unlink(missing_ok=True)
            (self.verified.folder / path.name).unlink(missing_ok=True)
            used -= size
        return used + size_bytes <= self.limit_bytes


def _transfer(begin: Callable[[], Any], blob: Blob, download: Download, where: str) -> None:
    """Download to what ``begin`` gives, until the digest is right; raises after TRIES."""
    for tries_left in reversed(range(TRIES)):
        hashing = _Hashing(begin())
        try:
            download(hashing)  # type: ignore[arg-type]
        except TransferError:
            if not tries_left:
                raise
            continue
        if (hashing.size_bytes, hashing.sha256) == (blob.size_bytes, blob.sha256):
            return
        if not tries_left:
            raise IntegrityError(damaged(blob, where, hashing.size_bytes, hashing.sha256))


def _copies(folder: Path) -> list[tuple[float, int, Path]]:
    """(time of last use, bytes, path) of each copy."""
    found = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            stat = entry.stat()
            found.append((stat.st_atime, stat.st_size, Path(entry.path)))
    return found


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: Any) -> None:
        self._file, self._hash, self.size_bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size_bytes += len(data)
        return self._file.write(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def damaged(blob: Blob, where: str, size_bytes: int, found: str) -> str:
    """What is said of bytes that are not the blob they should be."""
    return (
        f"{where} is damaged: it holds {size_bytes} bytes with SHA-256 "
        f"{found[:16]}…, sealed were {blob.size_bytes} bytes with {blob.sha256[:16]}…; "
        "restore it from a copy, or delete it and the record that names it and run again"
    )
