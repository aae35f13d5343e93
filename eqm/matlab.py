"""Plain numbers, and structs of numbers and lines of text, out of MATLAB 5 files that others made.

Read here and not by scipy, whose reader dies of a segmentation fault, and the whole process with
it, where a single bit of a file is wrong. What is read is little; of cells, objects and functions
nothing is, and a size that a file claims is held against the bytes that are there before anything
is made of it. Pure. Called by image_sets and layouts.

    file      128 bytes of header, then elements
    element   type and size (uint32 each), data; within an array padded to 8 bytes, and of at most
              4 bytes in the small form: size << 16 | type (uint32), data
    array     an element of type 14 whose elements are flags, dimensions, name, numbers; or one of
              type 15 that zlib unpacks to it
"""

import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from eqm.errors import DataError

HEADER_BYTES = 128
HDF5 = b"\x89HDF\r\n\x1a\n"
INT8, INT32, UINT32, MATRIX, COMPRESSED = 1, 5, 6, 14, 15
STORED = {
    **{1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4"},
    **{7: "f4", 9: "f8", 12: "i8", 13: "u8"},
}
"""Type of an element of numbers -> how they lie in it; whole doubles may lie there as bytes."""
NUMERIC = {
    **{6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2"},
    **{12: "i4", 13: "u4", 14: "i8", 15: "u8"},
}
"""Class of an array -> what its numbers are."""
OTHER = {
    **{1: "cell", 2: "struct", 3: "object", 4: "char", 5: "sparse", 16: "function", 17: "opaque"},
}
STRUCT, CHAR = 2, 4
TEXT = {2: "u1", 4: "u2", 16: "u1", 17: "u2"}
"""Type of an element of text -> how a code unit lies in it."""
COMPLEX, LOGICAL = 0x0800, 0x0200
LARGEST_ARRAY_BYTES = 2**31
LONGEST_NAME = 63
MOST_DIMENSIONS = 8
COPY_AGAIN = "copy it again from where it came from"


def numeric_arrays(data: bytes, where: str, *, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The arrays of these names, from the bytes of a file. Raises DataError.

    Refused: files of other versions of MATLAB, files that are cut or damaged, arrays of any name
    that are not plain real numbers, two of one name, sizes that do not fit.
    """
    order = _byte_order(data, where)
    found: dict[str, NDArray[Any]] = {}
    for at, payload in _arrays(data, order, where):
        name, values = _array(payload, order, f"{where} at byte {at}")
        if name in found:
            _refuse(f"{where} at byte {at}", f"an array {name!r} is there twice")
        found[name] = values
    lacking = [name for name in names if name not in found]
    if lacking:
        held = ", ".join(map(repr, found)) or "nothing"
        raise DataError(f"{where} holds {held}, and no array {lacking[0]!r}: {COPY_AGAIN}")
    return {name: found[name] for name in names}


def _byte_order(data: bytes, where: str) -> str:
    if data[:8] == HDF5 or data[512:520] == HDF5:
        raise DataError(
            f"{where} is a MATLAB 7.3 file (HDF5), which is not read here: save its arrays with "
            "-v7, or give the file as it was distributed"
        )
    for order, version in (("<", b"\x00\x01IM"), (">", b"\x01\x00MI")):
        # A file of MATLAB 4 begins with a zero.
        if data[124:HEADER_BYTES] == version and all(data[:4]):
            return order
    raise DataError(f"{where} does not begin as a MATLAB 5 file does: {COPY_AGAIN}")


def _arrays(data: bytes, order: str, where: str) -> Iterator[tuple[int, memoryview]]:
    """The content of each array, and the byte of the file at which its element begins."""
    at, view = HEADER_BYTES, memoryview(data)
    while at < len(data):
        here = f"{where} at byte {at}"
        if at + 8 > len(data):
            _refuse(here, "the file is cut within a tag")
        kind, size = struct.unpack_from(f"{order}II", data, at)
        if at + 8 + size > len(data):
            _refuse(here, f"an element of {size} bytes is cut short")
        content = view[at + 8 : at + 8 + size]
        if kind == COMPRESSED:
            content = _unpacked(content, order, here)
        elif kind != MATRIX:
            _refuse(here, f"an element of type {kind} where an array must be")
        yield at, content
        at += 8 + size


def _unpacked(packed: memoryview, order: str, here: str) -> memoryview:
    """What an array was before it was compressed: as much as its own tag says, and no more."""
    unpacker = zlib.decompressobj()
    try:
        tag = unpacker.decompress(packed, 8)
        kind, size = struct.unpack(f"{order}II", tag) if len(tag) == 8 else (0, 0)
        if kind != MATRIX or size > LARGEST_ARRAY_BYTES:
            _refuse(here, f"an element of type {kind} and {size} bytes is compressed")
        # One byte more than there must be, by which a longer one is known.
        content = unpacker.decompress(unpacker.unconsumed_tail, size + 1)
    except zlib.error as error:
        raise DataError(f"{here}: a compressed array is damaged ({error}): {COPY_AGAIN}") from error
    if len(content) != size or not unpacker.eof:
        _refuse(here, f"a compressed array unpacks to other than the {size} bytes that it says")
    return memoryview(content)


# -- one array ----------------------------------------------------------------------------------


class _Part(NamedTuple):
    kind: int
    data: memoryview


class _Head(NamedTuple):
    """What every array begins with."""

    kind: int
    special: str
    """"complex" or "logical"; empty for others."""
    shape: tuple[int, ...]
    name: str
    """Empty within a struct."""


def _head(parts: Iterator[_Part], order: str, here: str) -> _Head:
    flags, dimensions, name = (next(parts, None) for _ in range(3))
    if flags is None or flags.kind != UINT32 or len(flags.data) != 8:
        _refuse(here, "an array without flags")
    if dimensions is None or dimensions.kind != INT32 or name is None or name.kind != INT8:
        _refuse(here, "an array without dimensions or name")
    written = bytes(name.data)
    if len(written) > LONGEST_NAME or not (
        (written.isascii() and written.isalnum()) or not written
    ):
        _refuse(here, f"an array has the name {written[:80]!r}")
    shown = repr(written.decode())
    if len(dimensions.data) % 4 or not 2 <= len(dimensions.data) // 4 <= MOST_DIMENSIONS:
        _refuse(here, f"{shown} has dimensions of {len(dimensions.data)} bytes")
    shape = struct.unpack(f"{order}{len(dimensions.data) // 4}i", dimensions.data)
    if min(shape) < 0:
        _refuse(here, f"{shown} has dimensions {shape}")
    (bits, _) = struct.unpack(f"{order}II", flags.data)
    special = "complex" if bits & COMPLEX else "logical" if bits & LOGICAL else ""
    return _Head(bits & 0xFF, special, shape, written.decode())


def _array(content: memoryview, order: str, here: str) -> tuple[str, NDArray[Any]]:
    """Name and numbers of an array that stands in the file itself."""
    parts = _parts(content, order, here)
    head = _head(parts, order, here)
    if not head.name:
        _refuse(here, "an array has the name b''")
    return head.name, _numbers(head, parts, order, here)


def _numbers(head: _Head, parts: Iterator[_Part], order: str, here: str) -> NDArray[Any]:
    shown = repr(head.name)
    if head.kind not in NUMERIC or head.special:
        known = head.special or OTHER.get(head.kind, head.kind)
        raise DataError(
            f"{here}: {shown} is of class {known!r}, and only plain numbers are read: save the "
            "numbers alone"
        )
    stored, data = _values(head, parts, order, here)
    return (
        np.frombuffer(data, stored)
        .reshape(head.shape, order="F")
        .astype(NUMERIC[head.kind], copy=False)
    )


def _values(
    head: _Head, parts: Iterator[_Part], order: str, here: str
) -> tuple[np.dtype[Any], memoryview]:
    """How the values of an array are stored, and their bytes: the last part, of its size."""
    shown, values = repr(head.name), next(parts, None)
    known = TEXT if head.kind == CHAR else STORED
    if values is None or values.kind not in known or next(parts, None) is not None:
        _refuse(here, f"{shown} is no array with one element of numbers")
    stored = np.dtype(f"{order}{known[values.kind]}")
    if math.prod(head.shape) * stored.itemsize != len(values.data):
        claims = f"{math.prod(head.shape)} numbers of {stored.itemsize} bytes ({head.shape})"
        _refuse(here, f"{shown} claims {claims}, and has {len(values.data)} bytes")
    return stored, values.data


# -- an array of structs ------------------------------------------------------------------------


def struct_fields(
    data: bytes, where: str, *, name: str, fields: tuple[str, ...]
) -> list[tuple[float | str, ...]]:
    """These fields, each one number or a line of text, of every struct of an array of structs.

    What other fields hold, and other arrays, is passed over unread. Raises DataError.
    """
    order = _byte_order(data, where)
    for at, content in _arrays(data, order, where):
        here = f"{where} at byte {at}"
        parts = _parts(content, order, here)
        head = _head(parts, order, here)
        if head.name == name:
            return _structs(head, parts, order, here, fields)
    raise DataError(f"{where} holds no array {name!r}: {COPY_AGAIN}")


def _structs(
    head: _Head, parts: Iterator[_Part], order: str, here: str, fields: tuple[str, ...]
) -> list[tuple[float | str, ...]]:
    if head.kind != STRUCT:
        _refuse(here, f"{head.name!r} is no array of structs")
    length, names = next(parts, None), next(parts, None)
    if length is None or length.kind != INT32 or len(length.data) != 4:
        _refuse(here, f"{head.name!r} does not say how long the names of its fields are")
    (width,) = struct.unpack(f"{order}i", length.data)
    if names is None or names.kind != INT8 or width < 1 or len(names.data) % width:
        _refuse(here, f"{head.name!r} has fields without names")
    raw = bytes(names.data)
    known = [raw[i : i + width].split(b"\0")[0] for i in range(0, len(raw), width)]
    try:
        places = [known.index(field.encode()) for field in fields]
    except ValueError:
        held = ", ".join(field.decode("ascii", "replace") for field in known)
        _refuse(here, f"the structs of {head.name!r} have the fields {held[:200]}")
    values = list(parts)
    if len(values) != math.prod(head.shape) * len(known):
        _refuse(here, f"{head.name!r} has {len(values)} values of {len(known)} fields")
    rows = range(0, len(values), len(known))
    return [tuple(_scalar(values[row + at], order, here) for at in places) for row in rows]


def _scalar(part: _Part, order: str, here: str) -> float | str:
    if part.kind != MATRIX:
        _refuse(here, f"a field of type {part.kind}")
    parts = _parts(part.data, order, here)
    head = _head(parts, order, here)
    if head.kind == CHAR and not head.special and head.shape[0] == 1:
        stored, data = _values(head, parts, order, here)
        # One code unit a character in all of these, as long as it is ASCII.
        codes = np.frombuffer(data, stored)
        if len(codes) and codes.max() > 127:
            _refuse(here, "a text with other characters than ASCII's")
        return "".join(map(chr, codes.tolist()))
    numbers = _numbers(head, parts, order, here)
    if numbers.size != 1:
        _refuse(here, f"a field of {numbers.size} numbers where one must be")
    return float(numbers.reshape(()))


def _parts(content: memoryview, order: str, here: str) -> Iterator[_Part]:
    at = 0
    while at < len(content):
        if at + 8 > len(content):
            _refuse(here, "an array is cut within a tag")
        first, size = struct.unpack_from(f"{order}II", content, at)
        start = at + 8
        if first >> 16:
            first, size, start = first & 0xFFFF, first >> 16, at + 4
        if size > (4 if start == at + 4 else len(content) - start):
            _refuse(here, f"a part of {size} bytes is longer than its array")
        yield _Part(first, content[start : start + size])
        at = start + size + -size % 8 if start == at + 8 else at + 8


def _refuse(here: str, what: str) -> NoReturn:
    raise DataError(f"{here}: {what}: {COPY_AGAIN}")
