"""Plain numeric arrays out of MATLAB 5 files, which others made.

Read here and not by scipy, whose reader dies of a segmentation fault, and the whole process with
it, where a single bit of a file is wrong. What is read is little: arrays of numbers. Of cells,
structs, objects and functions nothing is, and a size that a file claims is held against the bytes
that are there before anything is made of it. Pure. Called by image_sets.

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


def _array(content: memoryview, order: str, here: str) -> tuple[str, NDArray[Any]]:
    parts = _parts(content, order, here)
    flags, dimensions, name = (next(parts, None) for _ in range(3))
    if flags is None or flags.kind != UINT32 or len(flags.data) != 8:
        _refuse(here, "an array without flags")
    if dimensions is None or dimensions.kind != INT32 or name is None or name.kind != INT8:
        _refuse(here, "an array without dimensions or name")
    written = bytes(name.data)
    if not (0 < len(written) <= LONGEST_NAME and written.isascii() and written.isalnum()):
        _refuse(here, f"an array has the name {written[:80]!r}")
    shown = repr(written.decode())
    (bits, _) = struct.unpack(f"{order}II", flags.data)
    kind = bits & 0xFF
    if kind not in NUMERIC or bits & (COMPLEX | LOGICAL):
        known = "complex" if bits & COMPLEX else "logical" if bits & LOGICAL else OTHER.get(kind)
        raise DataError(
            f"{here}: {shown} is of class {known or kind!r}, and only plain numbers are read: save "
            "the numbers alone"
        )
    if len(dimensions.data) % 4 or not 2 <= len(dimensions.data) // 4 <= MOST_DIMENSIONS:
        _refuse(here, f"{shown} has dimensions of {len(dimensions.data)} bytes")
    shape = struct.unpack(f"{order}{len(dimensions.data) // 4}i", dimensions.data)
    numbers = next(parts, None)
    if numbers is None or numbers.kind not in STORED or next(parts, None) is not None:
        _refuse(here, f"{shown} is no array with one element of numbers")
    stored = np.dtype(f"{order}{STORED[numbers.kind]}")
    if min(shape) < 0 or math.prod(shape) * stored.itemsize != len(numbers.data):
        what = f"{shown} claims {math.prod(shape)} numbers of {stored.itemsize} bytes ({shape})"
        _refuse(here, f"{what}, and has {len(numbers.data)} bytes")
    values = np.frombuffer(numbers.data, dtype=stored).reshape(shape, order="F")
    return written.decode(), values.astype(NUMERIC[kind], copy=False)


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
