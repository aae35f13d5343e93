"""Rows of parquet files: an image's bytes and its label. The only door to pyarrow.

A file is read by row groups, and the last few are kept, since a group is the least that can be
read: images that are wanted in an order of their own cost a group each. Small groups (Hugging Face
writes 100 rows) are read fast.
"""

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from eqm.errors import DataError
from eqm.files import Files

KEPT_BYTES = 2**28
"""Row groups are kept up to so many bytes in each process."""
LARGEST_GROUP_BYTES = 2**31


class _Opened(NamedTuple):
    metadata: Any
    ends: NDArray[np.int64]
    """Rows up to the end of each row group."""


class _Process:
    """What one process keeps: Arrow's state and locks must not be shared with a fork."""

    def __init__(self) -> None:
        self.opened: dict[str, _Opened] = {}
        self.groups: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self.lock = threading.Lock()


class Rows:
    """Two columns of parquet files. Methods raise DataError, of S3 StoreError too."""

    def __init__(self, files: Files, image_column: str, label_column: str) -> None:
        self.files, self.image_column, self.label_column = files, image_column, label_column
        self._processes: dict[int, _Process] = {}

    def all(self, path: str) -> Iterator[tuple[bytes, str]]:
        """Image and label of every row of a file, in order; no bytes where the image is null."""
        opened = self._open(path)
        for group in range(len(opened.ends)):
            table = self._group(path, opened, group, [self.image_column, self.label_column])
            images, labels = self._images(table), table.column(self.label_column)
            for i in range(len(table)):
                row = i + (int(opened.ends[group - 1]) if group else 0)
                label = self._label(labels[i].as_py(), path, row)
                yield images[i].as_py() or b"", label

    def one(self, path: str, row: int) -> bytes:
        """The image of a row."""
        here = self._process()
        opened = here.opened.get(path)
        if opened is None:
            opened = here.opened[path] = self._open(path)
        group = int(np.searchsorted(opened.ends, row, side="right"))
        if row < 0 or group == len(opened.ends):
            raise DataError(
                f"{self.files.where(path)} has no row {row}: it was changed; run the pipeline again"
            )
        with here.lock:
            images = here.groups.pop((path, group), None)
        if images is None:
            images = self._images(self._group(path, opened, group, [self.image_column]))
        with here.lock:
            here.groups[path, group] = images
            while len(here.groups) > 1 and _bytes_of(here.groups) > KEPT_BYTES:
                here.groups.popitem(last=False)
        return images[row - (int(opened.ends[group - 1]) if group else 0)].as_py() or b""

    def _process(self) -> _Process:
        process = os.getpid()
        if process not in self._processes:
            self._processes = {process: _Process()}
        return self._processes[process]

    def _open(self, path: str) -> _Opened:
        file = self._file(path, None)
        self._check_columns(file.schema_arrow, path)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        for i, group in enumerate(groups):
            if group.total_byte_size > LARGEST_GROUP_BYTES:
                raise DataError(
                    f"{self.files.where(path)}: row group {i} has {group.total_byte_size} bytes, "
                    f"{LARGEST_GROUP_BYTES} are the most: write it with fewer rows in a group"
                )
        ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
        return _Opened(file.metadata, ends)

    def _file(self, path: str, metadata: Any) -> Any:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        try:
            return ParquetFile(
                _Ranged(self.files, path), metadata=metadata, page_checksum_verification=True
            )
        except DataError:
            raise
        except (ArrowException, OSError, ValueError) as error:
            self._refuse(path, "is no parquet file", error)

    def _group(self, path: str, opened: _Opened, group: int, columns: list[str]) -> Any:
        from pyarrow import ArrowException

        file = self._file(path, opened.metadata)
        try:
            # In this thread alone: a process that is forked has no others.
            return file.read_row_group(group, columns=columns, use_threads=False)
        except DataError:
            raise
        except (ArrowException, OSError, ValueError) as error:
            self._refuse(path, f"is damaged in row group {group}", error)

    def _refuse(self, path: str, what: str, error: Exception) -> NoReturn:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{self.files.where(path)} {what} ({reason}): copy it again") from error

    def _check_columns(self, schema: Any, path: str) -> None:
        for column, setting in (
            (self.image_column, "image_column"),
            (self.label_column, "label_column"),
        ):
            if schema.names.count(column) != 1:
                raise DataError(
                    f"{self.files.where(path)} has the columns {', '.join(schema.names)}, and not "
                    f"{column!r} once: set source.{setting}"
                )
        image, label = schema.field(self.image_column).type, schema.field(self.label_column).type
        if _bytes_type(image) is None:
            raise DataError(
                f"{self.files.where(path)}: column {self.image_column!r} is {image}; it must be "
                "binary, or a struct with a binary field 'bytes': set source.image_column"
            )
        if not _is_label(label):
            raise DataError(
                f"{self.files.where(path)}: column {self.label_column!r} is {label}; it must be "
                "of integers or text: set source.label_column"
            )

    def _images(self, table: Any) -> Any:
        """The binary column of a row group, as Arrow has it."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = table.column(self.image_column)
        if pa.types.is_struct(column.type):
            column = pc.struct_field(column, "bytes")  # type: ignore[attr-defined]
        return column

    def _label(self, value: Any, path: str, row: int) -> str:
        wrong = value is None or (isinstance(value, int) and value < 0) or value == ""
        if wrong:
            raise DataError(
                f"{self.files.where(path)}: row {row} has the label {value!r}, which is none: "
                "leave the row out (test sets are often written so), or give it one"
            )
        return str(value)


def _bytes_of(groups: OrderedDict[tuple[str, int], Any]) -> int:
    return sum(images.nbytes for images in groups.values())


def _bytes_type(kind: Any) -> Any:
    """The binary type of an image column; None where it is none."""
    import pyarrow as pa

    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return kind if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else None


def _is_label(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


class _Ranged(io.RawIOBase):
    """A file of Files, as pyarrow reads files: by position."""

    def __init__(self, files: Files, path: str) -> None:
        super().__init__()
        found = files.find(path)
        if found is None:
            raise DataError(f"{files.where(path)} cannot be read: it does not exist")
        self._files, self._path, self._size, self._at = files, path, found.size_bytes, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Position in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position, from the start, from here or from the end."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as far as the file goes."""
        length = max(0, min(len(buffer), self._size - self._at))
        buffer[:length] = self._files.read(self._path, self._at, length)
        self._at += length
        return length
