"""Files that are only read: a folder, or one file, of this machine or of S3, behind one interface.

Every file has a *version* that changes when the file does. A reader holds nothing open, so it may
be used from any thread and after a fork. What the files mean is the business of eqm.layouts.
"""

import os
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

from eqm.errors import ConfigError, DataError, MissingError
from eqm.s3 import Bucket

SCHEME = "s3://"
LONGEST_PATH_BYTES = 1000
SETTLED_SECONDS = 2
"""Of the clocks of file systems that are in use, the slowest ticks so often."""


class File(NamedTuple):
    """One file of a listing."""

    path: str
    """Below the root, "/" between the parts."""
    size_bytes: int
    version: str
    """Time of change in nanoseconds on this machine, ETag in S3."""


class Files(ABC):
    """A tree of files. All methods raise DataError; those of S3 StoreError too."""

    only: str | None
    """The one file below the root that is meant; None: all of them."""

    @abstractmethod
    def where(self, path: str = "") -> str:
        """Full address of a file, or of the root, for people."""

    @property
    def address(self) -> str:
        """What was given: the root, or the one file of it."""
        return self.where(self.only or "")

    @abstractmethod
    def tree(self, suffixes: Collection[str]) -> "Tree":
        """Files of these suffixes (in any case) at any depth, and the folders of the root.

        Names that begin with a dot are passed over, of folders too.
        """

    @abstractmethod
    def find(self, path: str) -> File | None:
        """The file at a path; None if there is none."""

    def is_settled(self, file: File) -> bool:
        """Whether a change of the file from now on would show in its version."""
        return True

    @abstractmethod
    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of a file from ``start`` on, all or exactly ``length``."""


class Tree(NamedTuple):
    """What lies below a root; both sorted."""

    folders: tuple[str, ...]
    """Names of those that lie directly in it, with or without files of the suffixes."""
    files: list[File]


def open_files(uri: str, *, setting: str = "source_uri", single: str | None = None) -> Files:
    """The files of a folder of this machine or under ``s3://bucket/prefix``.

    ``setting``: what whoever gave the address calls it. ``single``: a suffix with which an address
    may also be that of one file; it is then listed alone. Raises ConfigError for other kinds of
    address, DataError for what does not exist.
    """
    if uri.startswith(SCHEME):
        bucket, _, prefix = uri.removeprefix(SCHEME).partition("/")
        if not bucket:
            raise ConfigError(f"{setting} {uri!r} names no bucket: s3://bucket/prefix")
        alone = single is not None and prefix.lower().endswith(single)
        folder, name = os.path.split(prefix) if alone else (prefix.strip("/"), None)
        return S3Files(bucket, folder, name)
    # Of "pipe:", "http:" and their like nothing is ever opened, not as a file name either.
    if ":" in uri.partition("/")[0]:
        raise ConfigError(
            f"{setting} is {uri!r}; it must be a folder on this machine or s3://bucket/prefix (a "
            "folder with a colon in its name: write ./ before it)"
        )
    return _local(Path(uri), setting, single)


def checked_path(path: str, where: str) -> str:
    """A path that is safe below any root and fits into an archive. Raises DataError by name."""
    # Bytes of a file name that are not UTF-8 come as surrogates, which have no encoding.
    length = len(path.encode(errors="ignore"))
    odd = length != len(path.encode(errors="surrogatepass"))
    if odd or any(ord(c) < 32 or ord(c) == 127 or c == "\\" for c in path):
        raise DataError(
            f"{where}: {path[:200]!r} has a name with characters that an archive cannot hold "
            "(control characters, backslashes, or bytes that are not UTF-8): rename it"
        )
    if length > LONGEST_PATH_BYTES:
        raise DataError(
            f"{where}: {path[:60]!r}… has a name of {length} bytes, {LONGEST_PATH_BYTES} are the "
            "most: rename it"
        )
    if not path or any(part in ("", ".", "..") for part in path.split("/")):
        raise DataError(
            f"{where}: {path!r} has a name that leads elsewhere (it begins with '/', or a part of "
            "it is empty, '.' or '..'): rename it"
        )
    return path


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


# -- this machine -------------------------------------------------------------------------------


def _local(path: Path, setting: str, single: str | None) -> "LocalFiles":
    if path.is_dir():
        return LocalFiles(path)
    if single is not None and path.is_file() and _suffix(path.name) == single:
        return LocalFiles(path.parent, path.name)
    wanted = "the folder" if single is None else f"the folder, or one {single} file"
    what = "is not a folder" if path.exists() else "does not exist"
    raise DataError(f"{setting} {path} {what}: give {wanted} that holds the images")


class LocalFiles(Files):
    """A folder, or one file of it alone."""

    def __init__(self, root: Path, only: str | None = None) -> None:
        self.root = root
        self.only = only

    def where(self, path: str = "") -> str:
        """Path on this machine."""
        return str(self.root / path)

    def tree(self, suffixes: Collection[str]) -> Tree:
        """All there is. Links lead to files at any depth, to folders only in the root."""
        folders = tuple(entry.name for entry in self._inside(self.root) if entry.is_dir())
        return Tree(folders, sorted(self._walk("", frozenset(suffixes))))

    def _walk(self, folder: str, suffixes: frozenset[str]) -> Iterator[File]:
        for entry in self._inside(self.root / folder):
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                if folder and entry.is_symlink():
                    raise DataError(
                        f"{entry.path} is a link to a folder, and such links are not followed: "
                        "put the folder itself there, or remove the link"
                    )
                yield from self._walk(path, suffixes)
            elif _suffix(entry.name) in suffixes:
                yield self._file(checked_path(path, self.where()))

    def _inside(self, folder: Path) -> list["os.DirEntry[str]"]:
        try:
            with os.scandir(folder) as found:
                kept = (entry for entry in found if not entry.name.startswith("."))
                return [e for e in sorted(kept, key=lambda e: e.name) if self._is_wanted(e.name)]
        except OSError as error:
            # A folder that cannot be listed would be left out without a word.
            raise DataError(
                f"folder {folder} cannot be read ({error.strerror}): give this user the right to, "
                "or remove it"
            ) from error

    def _is_wanted(self, name: str) -> bool:
        return self.only is None or name == self.only

    def _file(self, path: str) -> File:
        place = self.root / path
        try:
            found = place.stat()
        except OSError as error:
            if place.is_symlink():
                raise DataError(
                    f"{place} is a link to {os.readlink(place)}, which cannot be read "
                    f"({error.strerror}): put the file there, or remove the link"
                ) from error
            self._refuse(path, error)
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{place} is not a file: remove it or rename it")
        return File(path, found.st_size, str(found.st_mtime_ns))

    def find(self, path: str) -> File | None:
        """The file at a path."""
        return self._file(path) if os.path.lexists(self.root / path) else None

    def is_settled(self, file: File) -> bool:
        """Whether it was last changed some time ago: two changes can fall on one tick."""
        return time.time_ns() - int(file.version) > SETTLED_SECONDS * 10**9

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of a file. One that ends before the range does has been changed."""
        try:
            # Opened every time: as cheap as decoding a few rows, and nothing is shared by threads
            # or processes, or runs out when there are thousands of files.
            handle = os.open(self.root / checked_path(path, self.where()), os.O_RDONLY)
            try:
                wanted = os.fstat(handle).st_size - start if length is None else length
                data = _pread(handle, start, wanted)
            finally:
                os.close(handle)
        except OSError as error:
            self._refuse(path, error)
        return _whole(data, self.where(path), start, wanted)

    def _refuse(self, path: str, error: OSError) -> NoReturn:
        raise DataError(f"{self.root / path} cannot be read: {error.strerror}") from error


def _pread(handle: int, start: int, length: int) -> bytes:
    """Up to ``length`` bytes: the kernel gives fewer at once than may be asked for."""
    parts = []
    while length > 0 and (part := os.pread(handle, length, start)):
        parts.append(part)
        start, length = start + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _whole(data: bytes, where: str, start: int, wanted: int) -> bytes:
    if len(data) != wanted:
        raise DataError(
            f"{where} ends at byte {start + len(data)}, before the {wanted} bytes from {start} on: "
            "it was cut or changed; run the pipeline again"
        )
    return data


# -- S3 -----------------------------------------------------------------------------------------


class S3Files(Files):
    """What lies under a prefix of a bucket, taken for a folder; or one object of it alone."""

    def __init__(self, bucket: str, prefix: str, only: str | None = None) -> None:
        self.name = bucket
        self.prefix = prefix
        self.only = only
        self._buckets: dict[int, Bucket] = {}

    def where(self, path: str = "") -> str:
        """s3://bucket/key."""
        return f"{SCHEME}{self.name}/{self._key(path)}".rstrip("/")

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path

    def _bucket(self) -> Bucket:
        # Connections must not be shared with a process that was forked: one client each.
        process = os.getpid()
        if process not in self._buckets:
            self._buckets = {process: Bucket(self.name)}
        return self._buckets[process]

    def tree(self, suffixes: Collection[str]) -> Tree:
        """All keys below the prefix; empty objects that end in "/" mark folders."""
        folders, files = set(), []
        for file in self._all():
            first, slash, _ = file.path.partition("/")
            if slash:
                folders.add(first)
            if _suffix(file.path) in suffixes and not file.path.endswith("/"):
                checked_path(file.path, self.where())
                files.append(file)
        return Tree(tuple(sorted(folders)), sorted(files))

    def _all(self) -> Iterator[File]:
        root = f"{self.prefix}/" if self.prefix else ""
        for item in self._bucket().list(root + (self.only or "")):
            path = item.key[len(root) :]
            # "." and ".." are names that hide nothing: they are refused where they are used.
            parts = (part for part in path.split("/") if part not in (".", ".."))
            if path and self.only in (None, path) and not any(p.startswith(".") for p in parts):
                yield File(path, item.size_bytes, item.version)

    def find(self, path: str) -> File | None:
        """The object at a path."""
        key = self._key(path)
        for item in self._bucket().list(key):
            if item.key == key:
                return File(path, item.size_bytes, item.version)
        return None

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of an object, by one request."""
        key = self._key(checked_path(path, self.where()))
        try:
            data = self._bucket().read(key, start, length)
        except MissingError as error:
            raise DataError(f"{self.where(path)} cannot be read: it does not exist") from error
        return data if length is None else _whole(data, self.where(path), start, length)
