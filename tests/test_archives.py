"""Tars are read to the byte, or refused: nothing that a lenient reader would pass over gets by."""

import contextlib
import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eqm import archives
from eqm.archives import BLOCK, Held, Member, Window, members
from eqm.errors import DataError
from eqm.files import open_files

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
FILES = {"a/one.jpg": b"1" * 700, "a/two.jpg": b"2" * 512, "b/empty.jpg": b"", "c.txt": b"3"}


def packed(
    files: dict[str, bytes] = FILES,
    form: int = tarfile.PAX_FORMAT,
    change: Callable[[tarfile.TarInfo], None] = lambda info: None,
) -> bytes:
    """A tar as tarfile writes it; ``change`` edits the header of every member."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            change(info)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def contents(tar: bytes) -> dict[str, bytes]:
    return {m.name: tar[m.offset : m.offset + m.size] for m in members(Held(tar), "x.tar")}


def refused(tar: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(members(Held(tar), "x.tar"))
    assert "x.tar at byte " in str(caught.value)


def end_of(tar: bytes) -> int:
    """Where the zeros begin that end a tar."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as read:
        last = read.getmembers()[-1]
    return last.offset_data + last.size + -last.size % BLOCK


# -- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_members_are_what_was_packed(form: int) -> None:
    long = {"/".join(["d" * 60] * 3) + "/x.jpg": b"deep"}
    assert contents(packed(FILES | long, form)) == FILES | long


@pytest.mark.parametrize("form", FORMATS[1:])
def test_names_longer_than_a_header_and_in_any_script(form: int) -> None:
    files = {"é" * 140 + ".jpg": b"x", "犬/" + "y" * 300 + ".jpg": b"z"}
    assert contents(packed(files, form)) == files


def test_folders_and_a_leading_dot_are_passed_over(tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "in", arcname=".")
    assert contents((tmp_path / "x.tar").read_bytes()) == FILES


def test_a_size_in_base_256_is_read() -> None:
    tar = bytearray(packed({"a": b"x" * 600}, tarfile.GNU_FORMAT))
    tar[124:136] = b"\x80" + (600).to_bytes(11, "big")
    assert contents(checked(tar)) == {"a": b"x" * 600}


def checked(tar: bytearray) -> bytes:
    """With the checksum of the first header set right."""
    tar[148:156] = b" " * 8
    tar[148:156] = b"%06o\0 " % sum(tar[:512])
    return bytes(tar)


@pytest.mark.parametrize("piece_bytes", [BLOCK, 1000, 2**20])
def test_a_tar_within_a_tar_has_offsets_of_the_outer(tmp_path: Path, piece_bytes: int) -> None:
    inner = packed()
    outer = packed({"first.tar": packed({"z": b"zz"}), "inner.tar": inner})
    (tmp_path / "outer.tar").write_bytes(outer)
    files = open_files(str(tmp_path))

    def within(start: int, end: int) -> list[Member]:
        window = Window(files, "outer.tar", start, end, piece_bytes=piece_bytes)
        return list(members(window, "outer.tar"))

    second = within(0, len(outer))[1]
    found = within(second.offset, second.offset + second.size)
    assert {m.name: outer[m.offset : m.offset + m.size] for m in found} == FILES


def test_a_window_reads_once_what_is_taken_in_order(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    (tmp_path / "x").write_bytes(data)
    read: list[int] = []
    files = open_files(str(tmp_path))
    plain = files.read

    def counted(path: str, start: int = 0, length: int | None = None) -> bytes:
        read.append(length or 0)
        return plain(path, start, length)

    files.read = counted  # type: ignore[method-assign]
    window = Window(files, "x", 0, len(data), piece_bytes=1024)
    assert b"".join(window.take(at, 64) for at in range(0, len(data), 64)) == data
    assert sum(read) == len(data)
    assert len(read) == 10
    assert window.take(100, 3000) == data[100:3100]


# -- what is cut, damaged or goes on ------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_a_tar_that_is_cut_anywhere_is_refused(form: int) -> None:
    whole = packed(form=form)
    end = end_of(whole)
    for size in [*range(0, end + 2 * BLOCK, 61), *range(0, end + 2 * BLOCK, BLOCK)]:
        refused(whole[:size], "cut")
    assert contents(whole[: end + 2 * BLOCK]) == FILES


def test_a_block_of_zeros_within_is_refused() -> None:
    whole = packed(form=tarfile.USTAR_FORMAT)
    with tarfile.open(fileobj=io.BytesIO(whole)) as read:
        second = read.getmembers()[1].offset
    for zeros in (BLOCK, 2 * BLOCK, 20 * BLOCK):
        refused(whole[:second] + bytes(zeros) + whole[second:], "bytes follow the end of the tar")
    # The byte that is told is the first that is not zero.
    message = message_of(whole[:second] + bytes(BLOCK) + whole[second:])
    assert f"at byte {second + BLOCK}:" in message


def message_of(tar: bytes) -> str:
    with pytest.raises(DataError) as caught:
        list(members(Held(tar), "x.tar"))
    return str(caught.value)


def test_what_follows_the_end_is_refused() -> None:
    refused(packed() + packed(), "a second tar")
    refused(packed() + b"\0" * 100 + b"x", "bytes follow the end of the tar")
    assert f"at byte {len(packed()) + 100}:" in message_of(packed() + b"\0" * 100 + b"x")
    large = packed() + bytes(archives.PIECE_BYTES + 5) + b"x"
    refused(large, f"at byte {len(large) - 1}: bytes follow")


def test_a_header_with_any_bit_changed_is_refused() -> None:
    whole = packed(form=tarfile.USTAR_FORMAT)
    for at in range(BLOCK):
        changed = bytearray(whole)
        changed[at] ^= 1
        refused(bytes(changed), "header|NUL|UTF-8|cut|number")


def test_a_compressed_tar_is_no_tar() -> None:
    noise = np.random.default_rng(0).bytes(4096)
    refused(gzip.compress(packed({"a": noise})), "a compressed tar")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_tars_are_read_or_refused_and_never_crash(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(FORMATS))
    tar = bytearray(packed({"é" * 40 + "/" + "é" * 40: b"x", **FILES}, form))
    for at in data.draw(st.lists(st.integers(0, 4000), min_size=1, max_size=5)):
        tar[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        checked(tar)
    with contextlib.suppress(DataError):
        for member in members(Held(bytes(tar)), "x.tar"):
            assert 0 <= member.offset <= member.offset + member.size <= len(tar)


# -- members that are refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/etc/passwd", "leads elsewhere"),
        ("../up.jpg", "leads elsewhere"),
        ("a/../../up.jpg", "leads elsewhere"),
        ("a//b.jpg", "leads elsewhere"),
        ("a/./b.jpg", "leads elsewhere"),
        ("back\\slash.jpg", "an archive cannot hold"),
        ("new\nline.jpg", "an archive cannot hold"),
        ("n" * 1001, "1000 are the most"),
        ("n" * 70_000, "an extended header of"),
    ],
)
def test_unsafe_names_are_refused(name: str, message: str) -> None:
    for form in FORMATS if len(name) < 100 else FORMATS[1:]:
        refused(packed({"ok.jpg": b"1", name: b"x"}, form), message)


def test_a_folder_with_an_unsafe_name_is_refused() -> None:
    def folder(info: tarfile.TarInfo) -> None:
        info.type = tarfile.DIRTYPE

    refused(packed({"../up": b""}, change=folder), "leads elsewhere")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.LNKTYPE, "'a.jpg' is a hard link"),
        (tarfile.SYMTYPE, "'a.jpg' is a symbolic link"),
        (tarfile.CHRTYPE, "'a.jpg' is a device"),
        (tarfile.BLKTYPE, "'a.jpg' is a device"),
        (tarfile.FIFOTYPE, "'a.jpg' is a fifo"),
        (tarfile.GNUTYPE_SPARSE, "'a.jpg' is a sparse file"),
        (tarfile.CONTTYPE, "'a.jpg' is of type b'7'"),
        (b"Z", "'a.jpg' is of type b'Z'"),
    ],
)
def test_members_that_are_no_plain_files_are_refused(kind: bytes, message: str) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname = kind, "/etc/passwd"

    for form in FORMATS:
        refused(packed({"a.jpg": b""}, form, change), message)


def test_what_extended_headers_hide_is_refused() -> None:
    for headers, message in (
        ({"GNU.sparse.map": "0,1"}, "is a sparse file"),
        ({"path": "../up.jpg"}, "leads elsewhere"),
        ({"path": "/etc/passwd"}, "leads elsewhere"),
        ({"path": "a\0b.jpg"}, "NUL"),
    ):

        def change(info: tarfile.TarInfo, headers: dict[str, str] = headers) -> None:
            info.pax_headers = dict(headers)

        refused(packed({"a.jpg": b"x"}, change=change), message)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", pax_headers={"path": "z"}) as tar:
        tar.addfile(tarfile.TarInfo("a"))
    refused(stream.getvalue(), "a global header that sets 'path'")


def test_a_comment_for_all_members_is_fine() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", pax_headers={"comment": "as git writes"}) as tar:
        tar.addfile(tarfile.TarInfo("a"))
    assert contents(stream.getvalue()) == {"a": b""}


def test_a_name_that_is_there_twice_is_refused() -> None:
    one, two = packed({"a.jpg": b"1"}), packed({"a.jpg": b"2"})
    refused(one[: end_of(one)] + two, "'a.jpg' is there twice")
    dotted = packed({"./a.jpg": b"2"})
    refused(one[: end_of(one)] + dotted, "'a.jpg' is there twice")


def test_a_nul_or_bytes_that_are_no_text_in_a_name_are_refused() -> None:
    for name, message in ((b"a\0b.jpg", "NUL in it"), (b"caf\xe9.jpg", "not UTF-8")):
        tar = bytearray(packed(form=tarfile.USTAR_FORMAT))
        tar[: len(name)] = name
        refused(checked(tar), message)


def test_a_header_without_its_member_is_refused() -> None:
    tar = packed({"n" * 200: b""}, tarfile.GNU_FORMAT)
    # The long name and its data, and then the end.
    refused(tar[: 2 * BLOCK] + bytes(2 * BLOCK), "has no member")
