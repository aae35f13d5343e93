"""Small private files: written whole or not at all, readable by their owner alone."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from infra.stack import ServiceError


def make_private_folder(path: Path) -> Path:
    """Make a folder that only its owner can look into, if it is missing. Raises ServiceError."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise ServiceError(
            f"folder {path} cannot be made ({error.strerror}): name another one, or mend the rights"
        ) from error
    return path


def open_private(path: Path) -> BinaryIO:
    """Open a file to write at its end; made with mode 0600 if it is missing."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")


def write_private(path: Path, data: bytes) -> None:
    """Replace a file in one step, with mode 0600 from its first byte on."""
    make_private_folder(path.parent)
    with _written_aside(path, data) as temporary:
        temporary.replace(path)


def create_private(path: Path, data: bytes) -> bool:
    """Create a file in one step, with mode 0600; False, and nothing changed, if there is one."""
    with _written_aside(path, data) as temporary:
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            return False
    return True


@contextlib.contextmanager
def _written_aside(path: Path, data: bytes) -> Iterator[Path]:
    # mkstemp creates with 0600; there is no moment at which others could open it.
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
