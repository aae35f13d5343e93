"""Samples <-> the bytes of a WebDataset tar, and what is wrong with bytes that are not.

A tar here is a function of its samples alone: no times, no owners, members in one order. So a tar
is checked by comparing every byte with what it must be (arrays by CRC), and whatever differs is
told with member and offset; no lenient parser is ever asked. ``tar`` and stock ``webdataset`` read
these files, and webdataset's own writer gives the same bytes. Pure.

    number  of a sample in the whole set     view  an array of a sample: of the image, or its mirror
"""

import functools
import io
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from eqm.records import canonical_bytes

VIEWS = ("moments.npy", "mirror.npy")
"""Arrays of a sample: of the image, and of its mirror where the source has mirrors."""

BLOCK = 512
RECORD = 20 * BLOCK
"""A tar is filled up with zeros to a multiple of this."""

LARGEST_NUMBER = 99_999_999
"""Members are named by eight digits."""

Float16 = NDArray[np.float16]


class Facts(NamedTuple):
    """What a tar says of a sample beside its arrays."""

    number: int
    key: str
    """Name of the image in its source."""
    label: int
    held_out: bool

    @property
    def cls(self) -> bytes:
        """Member ``cls``."""
        return str(self.label).encode()

    @property
    def json(self) -> bytes:
        """Member ``json``."""
        return canonical_bytes({"key": self.key, "held_out": self.held_out})


class Placed(NamedTuple):
    """Where an array lies in a tar."""

    offset: int
    """First byte of its .npy file."""
    crc32: int
    """Over that file, header and all."""


class Flaw(NamedTuple):
    """One thing that is wrong with a tar."""

    number: int | None
    """The sample it belongs to; None for the tar as a whole."""
    offset: int
    reason: str


# -- writing ------------------------------------------------------------------------------------


def npy_size(shape: tuple[int, ...]) -> int:
    """Bytes of a .npy file with a float16 array."""
    return len(npy_header(shape)) + 2 * int(np.prod(shape))


@functools.lru_cache(maxsize=16)
def npy_header(shape: tuple[int, ...]) -> bytes:
    """What precedes the values of a float16 array in a .npy file."""
    stream = io.BytesIO()
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def pack(
    samples: Sequence[tuple[Facts, Sequence[Float16]]],
) -> tuple[bytes, list[list[Placed]]]:
    """The tar of samples with their views, and where each view lies in it."""
    parts: list[bytes] = []
    places: list[list[Placed]] = []
    at = 0
    for facts, views in samples:
        arrays = [npy_header(view.shape) + view.tobytes() for view in views]
        placed: dict[str, Placed] = {}
        for name, data in _members(facts, arrays):
            parts += [member_header(f"{facts.number:08d}.{name}", len(data)), data, _pad(len(data))]
            if name in VIEWS:
                placed[name] = Placed(at + BLOCK, crc32(data))
            at += BLOCK + len(data) + len(parts[-1])
        places.append([placed[name] for name in VIEWS[: len(views)]])
    return b"".join([*parts, ending(at)]), places


def _members(facts: Facts, arrays: Sequence[Any]) -> list[tuple[str, Any]]:
    """Members of a sample, in the order in which they lie in the tar: that of their names."""
    named = [("cls", facts.cls), ("json", facts.json), *zip(VIEWS, arrays, strict=False)]
    return sorted(named, key=lambda member: member[0])


@functools.cache
def _template() -> tuple[bytes, int]:
    """Header of a member with no name, time, owner or size, read-only; what it adds to checksums.

    The checksum counts its own field as spaces.
    """
    info = tarfile.TarInfo("")
    info.mode = 0o444
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return header, sum(header[:124]) + sum(header[136:148]) + 8 * ord(" ") + sum(header[156:])


def member_header(name: str, size: int) -> bytes:
    """The ustar header of a plain member."""
    encoded, digits = name.encode(), b"%011o\0" % size
    template, rest = _template()
    checksum = b"%06o\0 " % (rest + sum(encoded) + sum(digits))
    name_field = encoded + template[len(encoded) : 124]
    return b"".join((name_field, digits, template[136:148], checksum, template[156:]))


def _pad(size: int) -> bytes:
    return bytes(-size % BLOCK)


def ending(at: int) -> bytes:
    """The zeros that end a tar whose members end at a byte."""
    return bytes(2 * BLOCK + -(at + 2 * BLOCK) % RECORD)


# -- checking -----------------------------------------------------------------------------------


def flaws(
    tar: bytes, samples: Sequence[tuple[Facts, Sequence[Placed]]], shape: tuple[int, ...]
) -> Iterator[Flaw]:
    """All that differs between a tar and what samples and their places say it is, byte for byte.

    ``shape`` is that of an array, (2C, H, W). Nothing for a sound tar.
    """
    at = 0
    for facts, places in samples:
        for name, crc in _expected(facts, places):
            known = facts.cls if name == "cls" else facts.json if name == "json" else None
            size = npy_size(shape) if known is None else len(known)
            member = f"{facts.number:08d}.{name}"
            header = tar[at : at + BLOCK]
            if header != member_header(member, size):
                yield Flaw(facts.number, at, f"{describe(header)} stands where {member} begins")
            at += BLOCK
            wrong = _wrong_data(tar[at : at + size], known, size, crc, shape)
            if wrong:
                yield Flaw(facts.number, at, f"{member} {wrong}")
            at += size
            pad = _pad(size)
            if tar[at : at + len(pad)] != pad:
                yield Flaw(facts.number, at, f"no zeros fill up {member}")
            at += len(pad)
    tail = ending(at)
    if tar[at:] != tail:
        yield Flaw(None, *_wrong_tail(tar[at:], tail, at))


def _expected(facts: Facts, places: Sequence[Placed]) -> list[tuple[str, int | None]]:
    return _members(facts, [place.crc32 for place in places])


def _wrong_data(
    data: bytes, known: bytes | None, size: int, crc: Any, shape: tuple[int, ...]
) -> str:
    if len(data) < size:
        return f"is cut after {len(data)} of {size} bytes"
    if known is not None:
        return "" if data == known else f"holds {data[:60]!r}, the index says {known[:60]!r}"
    if crc32(data) != crc:
        return "does not match its CRC"
    if not data.startswith(npy_header(shape)):
        return f"is no float16 array of shape {shape}"
    values = np.frombuffer(data, dtype="<f2", offset=len(npy_header(shape)))
    return "" if np.isfinite(values).all() else "holds NaN or infinity"


def _wrong_tail(found: bytes, expected: bytes, at: int) -> tuple[int, str]:
    if found.startswith(expected):
        end = at + len(expected)
        return end, f"the tar goes on with {describe(found[len(expected) :][:BLOCK])}"
    if expected.startswith(found):
        return at, f"the tar is cut: of {len(expected)} bytes that end it {len(found)} are there"
    begins = next(i for i in range(0, len(found), BLOCK) if any(found[i : i + BLOCK]))
    block = describe(found[begins : begins + BLOCK])
    return at + begins, f"{block} stands where zeros end the tar"


KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a fifo",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.GNUTYPE_LONGNAME: "a long name (GNU)",
    tarfile.GNUTYPE_LONGLINK: "a long link (GNU)",
    tarfile.XHDTYPE: "an extended header (PAX)",
    tarfile.XGLTYPE: "a global extended header (PAX)",
}


def describe(header: bytes) -> str:
    """What a block is that was to be the header of a member, in words."""
    if len(header) < BLOCK:
        return "the end of the file" if not header else f"a rest of {len(header)} bytes"
    if not any(header):
        return "a block of zeros"
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return "no tar header"
    kind = KINDS.get(found.type, "member")
    return f"{kind} {ascii(found.name)[:80]} of {found.size} bytes"
