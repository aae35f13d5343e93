"""The cache: verified, within its limit, shared, and none the worse for a crash."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest

from eqm import cache as caching
from eqm.cache import Cache
from eqm.disk import ASIDE
from eqm.errors import IntegrityError, TransferError
from eqm.records import Blob


def a_blob(i: int, size: int = 1000) -> tuple[bytes, Blob]:
    data = bytes([i]) * size
    return data, Blob.of(data)


def sends(data: bytes, log: list[int] | None = None) -> caching.Download:
    def download(file: BinaryIO) -> None:
        if log is not None:
            log.append(len(data))
        file.write(data)

    return download


def age(cache: Cache, blob: Blob, seconds: float) -> None:
    path = cache.path(blob)
    at = time.time_ns() - int(seconds * 1e9)
    os.utime(path, ns=(at, path.stat().st_mtime_ns))


def test_a_blob_is_downloaded_once(tmp_path: Path) -> None:
    cache, log = Cache(tmp_path), list[int]()
    data, blob = a_blob(1)
    for _ in range(3):
        assert cache.fetch(blob, sends(data, log), "x").read_bytes() == data
    assert Cache(tmp_path).found(blob, remembered=True) == cache.path(blob)
    assert log == [1000]


def test_many_at_once_download_once(tmp_path: Path) -> None:
    log: list[int] = []
    data, blob = a_blob(1, 10**6)

    def slow(file: BinaryIO) -> None:
        log.append(1)
        time.sleep(0.2)
        file.write(data)

    threads = [
        threading.Thread(target=lambda: Cache(tmp_path).fetch(blob, slow, "x")) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    assert Cache(tmp_path).fetch_unless_full(blob, slow, "x") == Cache(tmp_path).path(blob)
    for thread in threads:
        thread.join()
    assert log == [1]


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit_bytes=3000)
    blobs = [a_blob(i) for i in range(5)]
    for data, blob in blobs[:3]:
        cache.fetch(blob, sends(data), "x")
        cache.found(blob)  # hashed now: to read it later would be a use of its own to the kernel
    for i, seconds in enumerate((5000, 9000, 7000)):
        age(cache, blobs[i][1], seconds)
    cache.fetch(blobs[3][1], sends(blobs[3][0]), "x")
    assert [cache.path(blob).exists() for _, blob in blobs[:4]] == [True, False, True, True]
    cache.found(blobs[2][1])  # is used, so the other one goes
    cache.fetch(blobs[4][1], sends(blobs[4][0]), "x")
    assert [cache.path(blob).exists() for _, blob in blobs] == [False, False, True, True, True]


def test_what_is_in_use_stays_and_nothing_more_comes_in(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit_bytes=1500)
    (one, first), (two, second) = a_blob(1), a_blob(2)
    assert cache.fetch_unless_full(first, sends(one), "x") is not None
    assert cache.fetch_unless_full(second, sends(two), "x") is None
    assert cache.path(first).exists()
    # What must be there is there, whatever the limit.
    assert cache.fetch(second, sends(two), "x").read_bytes() == two
    age(cache, first, caching.IN_USE_SECONDS + 1)
    age(cache, second, caching.IN_USE_SECONDS + 1)
    three, third = a_blob(3)
    assert cache.fetch_unless_full(third, sends(three), "x") is not None


def test_what_there_is_no_room_for_is_verified_all_the_same(tmp_path: Path) -> None:
    cache, log = Cache(tmp_path, limit_bytes=1500), list[int]()
    (one, first), (two, second) = a_blob(1), a_blob(2)
    cache.check(first, sends(one, log), "x")
    cache.check(first, sends(one, log), "x")
    assert cache.path(first).exists()
    cache.check(second, sends(two, log), "x")
    assert log == [1000, 1000]
    assert not cache.path(second).exists()
    for wrong in (two[:-1], b"x" + two[1:], two + b"x", b""):
        with pytest.raises(IntegrityError, match="s3://b/k is damaged"):
            cache.check(second, sends(wrong), "s3://b/k")
    # One that is larger than all of the room as well, and no other goes for it.
    three, third = a_blob(3, 2000)
    age(cache, first, caching.IN_USE_SECONDS + 1)
    cache.check(third, sends(three), "x")
    assert sum(path.stat().st_size for path in (tmp_path / "sha256").iterdir()) == 1000


def test_a_transfer_that_breaks_off_is_tried_again(tmp_path: Path) -> None:
    data, blob = a_blob(1)
    tries: list[int] = []

    def breaks_twice(file: BinaryIO) -> None:
        tries.append(1)
        if len(tries) < 3:
            file.write(data[:10])
            raise TransferError("broke off")
        file.write(data)

    assert Cache(tmp_path).fetch(blob, breaks_twice, "x").read_bytes() == data
    assert list(tmp_path.rglob(f"{ASIDE}*")) == []


def test_damage_is_told_and_not_kept(tmp_path: Path) -> None:
    data, blob = a_blob(1)
    for wrong in (data[:-1], b"x" + data[1:], data + b"x", b""):
        with pytest.raises(IntegrityError, match="s3://b/k is damaged"):
            Cache(tmp_path).fetch(blob, sends(wrong), "s3://b/k")
    assert not Cache(tmp_path).path(blob).exists()


def test_a_copy_that_changed_is_fetched_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    data, blob = a_blob(1)
    path = cache.fetch(blob, sends(data), "x", remembered=True)
    path.chmod(0o644)
    path.write_bytes(b"z" * 1000)
    assert Cache(tmp_path).fetch(blob, sends(data), "x", remembered=True).read_bytes() == data


def test_a_memory_that_is_damaged_is_no_memory(tmp_path: Path) -> None:
    cache, log = Cache(tmp_path), list[int]()
    data, blob = a_blob(1)
    cache.fetch(blob, sends(data, log), "x")
    (tmp_path / "verified" / blob.sha256).write_bytes(b"\xff\xfe")
    assert cache.found(blob, remembered=True) is not None
    assert log == [1000]


KILLED = """
import sys, time
from pathlib import Path
from eqm.cache import Cache
from eqm.records import Blob
def slow(file):
    file.write(b"x" * 500); file.write(b"y" * 10**6); print("writing", flush=True); time.sleep(60)
Cache(Path(sys.argv[1]), 10**9).fetch(Blob.of(b"x" * 1000), slow, "x")
"""


def test_a_process_that_is_killed_leaves_nothing_that_lasts(tmp_path: Path) -> None:
    line = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(line, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    (left,) = tmp_path.rglob(f"{ASIDE}*")
    os.utime(left, (0, 0))
    cache = Cache(tmp_path, 10**9)
    data = b"x" * 1000
    # The lock went with its process: this neither waits nor finds half a copy.
    assert cache.fetch(Blob.of(data), sends(data), "x").read_bytes() == data
    assert list(tmp_path.rglob(f"{ASIDE}*")) == []


def test_room_is_taken_as_a_download_begins(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit_bytes=1500)
    (one, first), (two, second) = a_blob(1), a_blob(2)
    beside: list[Path | None] = []

    def meanwhile(file: BinaryIO) -> None:
        # Another process, before a byte of the first is here.
        beside.append(Cache(tmp_path, 1500).fetch_unless_full(second, sends(two), "x"))
        file.write(one)

    assert cache.fetch_unless_full(first, meanwhile, "x") == cache.path(first)
    assert beside == [None]


def test_of_two_that_look_for_room_at_once_one_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Cache._make_room

    def slow(self: Cache, size_bytes: int) -> bool:
        there_is = real(self, size_bytes)
        time.sleep(0.1)
        return there_is

    monkeypatch.setattr(Cache, "_make_room", slow)
    with ThreadPoolExecutor(2) as pool:
        given = pool.map(
            lambda i: Cache(tmp_path, 1500).fetch_unless_full(
                a_blob(i)[1], sends(a_blob(i)[0]), "x"
            ),
            (1, 2),
        )
        assert sorted(path is None for path in given) == [False, True]


def test_a_copy_is_hashed_once_a_machine_however_often_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, blob = a_blob(1)
    path = Cache(tmp_path).fetch(blob, sends(data), "x", remembered=True)
    assert not path.stat().st_mode & 0o222
    monkeypatch.setattr(caching, "is_blob", lambda *_: pytest.fail("it was hashed again"))
    for _ in range(3):
        Cache(tmp_path).touch(blob)
        assert Cache(tmp_path).found(blob, remembered=True) == path
