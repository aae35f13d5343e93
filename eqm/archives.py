"""Foreign tars, read by an index: where each member lies, so that it can be read by its range.

The walk is strict where common readers are lenient, because what they pass over is a silent loss of
images: a tar that is cut, that goes on behind its end, or whose members are anything but plain
files with safe names of their own is refused by name and byte. Nothing is ever unpacked. Offsets
are those of the outermost file, for a tar within a tar too. Our own shards are eqm.tars.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn, Protocol

from eqm.errors import DataError
from eqm.files import Files, checked_path

BLOCK = 512
ZEROS = bytes(BLOCK)
LONGEST_HEADER_BYTES = 2**16
"""An extended header holds a name and some times; a larger one is an attack or damage."""
PIECE_BYTES = 2**24

POSIX, GNU, OLD = b"ustar\x0000", b"ustar  \0", bytes(8)
FILES = (b"0", b"\0")
FOLDER, LONG_NAME, EXTENDED, GLOBAL = b"5", b"L", b"x", b"g"
REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a fifo",
    b"K": "a link (with a long name)",
    b"S": "a sparse file",
}
COPY_AGAIN = "copy it again from where it came from"
PACK_AGAIN = "pack the tar again from plain files"


class Member(NamedTuple):
    """A plain file in a tar."""

    name: str
    offset: int
    """First byte of its data in the outermost file."""
    size: int


class Span(Protocol):
    """Bytes start..end, of which parts are taken in order."""

    start: int
    end: int

    def take(self, offset: int, size: int) -> bytes:
        """Exactly these bytes; they lie within the span."""
        ...


class Held:
    """A span of bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self.data, self.start, self.end = data, 0, len(data)

    def take(self, offset: int, size: int) -> bytes:
        """Exactly these bytes."""
        return self.data[offset : offset + size]


class Window:
    """A span of a file that is read ahead in pieces: one pass over it where it is read in order."""

    def __init__(
        self, files: Files, path: str, start: int, end: int, *, piece_bytes: int = PIECE_BYTES
    ) -> None:
        self.files, self.path, self.start, self.end = files, path, start, end
        self.piece_bytes = piece_bytes
        self._at, self._piece = start, b""

    def take(self, offset: int, size: int) -> bytes:
        """Exactly these bytes."""
        if not self._at <= offset <= offset + size <= self._at + len(self._piece):
            length = min(max(size, self.piece_bytes), self.end - offset)
            self._at, self._piece = offset, self.files.read(self.path, offset, length)
        return self._piece[offset - self._at : offset - self._at + size]


def members(span: Span, where: str) -> Iterator[Member]:
    """Plain files of the tar that fills a span, in their order.

    ``where`` names the tar in messages. Raises DataError for anything that is not exactly one
    whole tar of plain files and folders with safe names, each of them once.
    """
    at, more, seen = span.start, _More(), set[str]()
    while (block := _block(span, at, where)) != ZEROS:
        header = _header(block, at, where)
        extends = header.kind in (LONG_NAME, EXTENDED, GLOBAL)
        size = header.size if extends or more.size is None else more.size
        data = at + BLOCK
        if data + size > span.end:
            _refuse(where, at, f"{header.name[:200]!r} is cut short", COPY_AGAIN)
        if extends:
            _extend(more, header, _payload(span, data, header, where), where)
        else:
            member = _member(header, more, data, size, where)
            if member is not None:
                if member.name in seen:
                    _refuse(where, at, f"{member.name!r} is there twice", PACK_AGAIN)
                seen.add(member.name)
                yield member
            more = _More()
        at = data + size + -size % BLOCK
    if more != _More():
        _refuse(where, at, "an extended header has no member", COPY_AGAIN)
    _check_end(span, at, where)


def _refuse(where: str, at: int, what: str, remedy: str) -> NoReturn:
    raise DataError(f"{where} at byte {at}: {what}: {remedy}")


def _block(span: Span, at: int, where: str) -> bytes:
    if at + BLOCK > span.end:
        _refuse(where, min(at, span.end), "the tar is cut: it has no end", COPY_AGAIN)
    return span.take(at, BLOCK)


def _check_end(span: Span, at: int, where: str) -> None:
    """After the last member: two blocks of zeros at least, and nothing else up to the end."""
    if at + 2 * BLOCK > span.end:
        _refuse(where, at, "the tar is cut: one block of zeros does not end it", COPY_AGAIN)
    while at < span.end:
        size = min(PIECE_BYTES, span.end - at)
        rest = span.take(at, size)
        if rest.count(0) != size:
            odd = at + size - len(rest.lstrip(b"\0"))
            what = "bytes follow the end of the tar (a block of zeros within, or a second tar)"
            _refuse(where, odd, what, "split it into whole tars, or copy it again")
        at += size


# -- headers ------------------------------------------------------------------------------------


class _Header(NamedTuple):
    name: str
    kind: bytes
    size: int
    at: int


@dataclass
class _More:
    """What extended headers say of the member that follows."""

    name: str | None = None
    size: int | None = None
    sparse: bool = False
    keys: set[str] = field(default_factory=set)


def _header(block: bytes, at: int, where: str) -> _Header:
    magic = block[257:265]
    if magic not in (POSIX, GNU, OLD):
        _refuse(where, at, "no tar header (damaged, or a compressed tar)", COPY_AGAIN)
    # The checksum counts its own field as spaces.
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if _number(block[148:156], at, where) != total:
        _refuse(where, at, "a tar header that does not match its checksum", COPY_AGAIN)
    name = _text(_terminated(block[:100], at, where), at, where)
    if magic == POSIX and (prefix := _text(_terminated(block[345:500], at, where), at, where)):
        name = f"{prefix}/{name}"
    return _Header(name, block[156:157], _number(block[124:136], at, where), at)


def _number(data: bytes, at: int, where: str) -> int:
    if data[0] == 0x80:  # GNU's base 256, for files of 8 GiB and more
        return int.from_bytes(data[1:], "big")
    digits = data.strip(b" \0")
    if digits.strip(b"01234567") or not digits:
        _refuse(where, at, f"{data!r} is no number of a tar header", COPY_AGAIN)
    return int(digits, 8)


def _terminated(data: bytes, at: int, where: str) -> bytes:
    text, _, rest = data.partition(b"\0")
    if rest.strip(b"\0"):
        _refuse(where, at, f"a name with a NUL in it ({data[:80]!r})", PACK_AGAIN)
    return text


def _text(data: bytes, at: int, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        _refuse(where, at, f"a name that is not UTF-8 ({data[:80]!r})", PACK_AGAIN)


def _payload(span: Span, data: int, header: _Header, where: str) -> bytes:
    if header.size > LONGEST_HEADER_BYTES:
        what = f"an extended header of {header.size} bytes, {LONGEST_HEADER_BYTES} are the most"
        _refuse(where, header.at, what, PACK_AGAIN)
    return span.take(data, header.size)


def _extend(more: _More, header: _Header, payload: bytes, where: str) -> None:
    at = header.at
    if header.kind == LONG_NAME:
        pairs = [("path", _terminated(payload, at, where))]
    else:
        pairs = list(_records(payload, at, where))
    for key, value in pairs:
        if header.kind == GLOBAL:
            if key in ("path", "size", "linkpath") or key.startswith("GNU.sparse"):
                _refuse(where, at, f"a global header that sets {key!r}", PACK_AGAIN)
            continue
        if key in more.keys:
            _refuse(where, at, f"extended headers say {key!r} twice of one member", PACK_AGAIN)
        more.keys.add(key)
        if key == "path":
            more.name = _text(value, at, where)
        elif key == "size":
            more.size = _decimal(value, at, where)
        elif key.startswith("GNU.sparse"):
            more.sparse = True


def _records(payload: bytes, at: int, where: str) -> Iterator[tuple[str, bytes]]:
    """Pairs of a PAX header: ``<length of the record> <key>=<value>\\n``, one after another."""
    while payload:
        digits, _, _ = payload.partition(b" ")
        length = _decimal(digits, at, where)
        record, payload = payload[len(digits) + 1 : length], payload[length:]
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        whole = len(record) == length - len(digits) - 1
        if not (whole and record.endswith(b"\n") and equals):
            _refuse(where, at, "a damaged extended header", COPY_AGAIN)
        yield _text(key, at, where), value


def _decimal(digits: bytes, at: int, where: str) -> int:
    if not digits.isdigit() or len(digits) > 20:
        _refuse(where, at, f"{digits[:40]!r} is no number of an extended header", COPY_AGAIN)
    return int(digits)


def _member(header: _Header, more: _More, data: int, size: int, where: str) -> Member | None:
    """The plain file that a header announces; None for a folder."""
    name = header.name if more.name is None else more.name
    shown = f"{name[:200]!r}"
    if more.sparse or header.kind not in (*FILES, FOLDER):
        what = "a sparse file" if more.sparse else REFUSED.get(header.kind)
        _refuse(where, header.at, f"{shown} is {what or f'of type {header.kind!r}'}", PACK_AGAIN)
    if "\0" in name:
        _refuse(where, header.at, f"{shown} has a NUL in its name", PACK_AGAIN)
    # Tars of before 1988 have no type for folders: the name ends in "/".
    is_folder = header.kind == FOLDER or name.endswith("/")
    if is_folder and size:
        _refuse(where, header.at, f"{shown} is a folder of {size} bytes", COPY_AGAIN)
    # What `tar -C folder .` writes.
    name = name.removeprefix("./")
    if is_folder and name.rstrip("/") in ("", "."):
        return None
    checked_path(name.removesuffix("/") if is_folder else name, f"{where} at byte {header.at}")
    return None if is_folder else Member(name, data, size)
