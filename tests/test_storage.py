"""Both stores keep the same promises: create-once, verified, nothing half-written."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from eqm import s3, storage
from eqm.config import PretrainedFile
from eqm.disk import ASIDE, disk_errors
from eqm.errors import ConfigError, IntegrityError, MissingError, StoreError
from eqm.first_weights import known_spec
from eqm.records import Blob, Record
from eqm.s3 import Bucket
from eqm.storage import LocalStore, S3Store, Store, open_store
from flows.addresses import sealed_by_digits, sealed_digests


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.services)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "store"))
    request.getfixturevalue("s3_environment")
    return open_store(f"s3://eqm/test-{tmp_path.name}", cache=tmp_path / "cache")


def damage(store: Store, blob: Blob) -> None:
    """Flip one bit of a stored blob, behind the store's back."""
    data = bytearray(store.read(blob.key))
    data[len(data) // 2] ^= 1
    if isinstance(store, LocalStore):
        path = store.root / blob.key
        path.write_bytes(bytes(data))
    else:
        store.bucket.client.put_object(  # type: ignore[attr-defined]
            Bucket=store.bucket.name, Key=store.name(blob.key), Body=bytes(data)
        )


def test_a_key_is_written_once(store: Store) -> None:
    assert store.write_once("a/b", b"first")
    assert not store.write_once("a/b", b"second")
    assert store.read("a/b") == b"first"


def test_of_many_writers_one_wins(store: Store) -> None:
    won: list[int] = []
    start = threading.Barrier(8)

    def write(number: int) -> None:
        start.wait()
        if store.write_once("race", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("race") == str(won[0]).encode()


def test_a_key_is_changed_only_by_who_knows_its_version(store: Store) -> None:
    assert store.replace("pointer", b"0", "any") is None
    store.write_once("pointer", b"1")
    data, first = store.read_version("pointer")
    assert data == b"1"
    second = store.replace("pointer", b"2", first)
    assert second is not None
    assert store.replace("pointer", b"3", first) is None
    assert store.read_version("pointer") == (b"2", second)
    assert store.list("") == ["pointer"]


@pytest.mark.services
@pytest.mark.usefixtures("s3_environment")
def test_a_server_that_knows_versions_without_their_quotes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ceph 18 compares If-Match with the bare ETag, and refuses one in the quotes of HTTP."""
    bucket, key = Bucket("eqm"), f"bare-{tmp_path.name}/a"
    real, asked = bucket.client.put_object, []

    def like_ceph(**sent: Any) -> Any:
        match = sent.get("IfMatch")
        asked.append(match)
        if match and match.startswith('"'):
            answer = {"Error": {"Code": "PreconditionFailed"}, "ResponseMetadata": {}}
            raise ClientError(answer, "PutObject")  # type: ignore[arg-type]
        return real(**{**sent, **({"IfMatch": f'"{match}"'} if match else {})})

    monkeypatch.setattr(bucket.client, "put_object", like_ceph)
    assert bucket.create(key, b"1")
    _, first = bucket.read_version(key)
    second = bucket.replace(key, b"2", first)
    assert second is not None
    assert bucket.replace(key, b"3", first) is None
    assert bucket.read_version(key) == (b"2", second)
    # It is asked in vain once.
    assert bucket.replace(key, b"4", second) is not None
    assert [match.startswith('"') for match in asked if match] == [True, False, False, False]


def test_what_was_sent_twice_is_ours_all_the_same(store: Store) -> None:
    store.write_once("pointer", b"1")
    _, first = store.read_version("pointer")
    second = store.replace("pointer", b"2", first)
    if not isinstance(store, LocalStore):
        # The first sending arrived, its answer did not, and boto3 sends it once more.
        assert store.replace("pointer", b"2", first) == second


def test_deleted_keys_are_gone(store: Store) -> None:
    store.write_once("a/b", b"1")
    for _ in range(2):
        store.delete("a/b")
        assert not store.exists("a/b")
    with pytest.raises(MissingError):
        store.read_version("a/b")


def test_listing_is_sorted_and_by_prefix(store: Store) -> None:
    for key in ("x/2", "x/10", "x/1", "y/1"):
        store.write_once(key, b"")
    assert store.list("x/") == ["x/1", "x/10", "x/2"]
    assert store.list("x/1") == ["x/1", "x/10"]
    assert store.list("z/") == []


def test_folders_are_told_without_what_lies_in_them(store: Store) -> None:
    for key in ("train/ab/record.json", "train/ab/checkpoints/1.json", "train/b/x", "train/c", "x"):
        store.write_once(key, b"1")
    blob = store.put(b"bytes")
    # What a store in a folder keeps for itself is none of it.
    store.fetch(blob, remembered=True)
    found = store.read_version("x")
    assert store.replace("x", b"2", found[1]) is not None
    assert store.folders("train/") == ["train/ab", "train/b"]
    assert store.folders("train/a") == ["train/ab"]
    assert store.folders("train/c") == store.folders("gone/") == []
    assert store.folders("") == ["blobs", "train"]


def test_a_store_on_a_disk_that_is_not_there_says_so(tmp_path: Path) -> None:
    (tmp_path / "usb").symlink_to(tmp_path / "gone")
    for place in ("usb", "usb/store"):
        with pytest.raises(StoreError, match=r"cannot be made .* link to a disk that is not there"):
            LocalStore(tmp_path / place).put(b"bytes")


class Shallow(LocalStore):
    """A store whose trainings are too large to be looked through."""

    def list(self, prefix: str) -> list[str]:
        raise AssertionError(f"all of {prefix} is listed")


def test_a_training_is_found_by_first_digits_without_looking_into_others(tmp_path: Path) -> None:
    store = Shallow(tmp_path)
    seals = [
        store.seal(
            Record(stage="train", algorithm=1, config={"n": n}, inputs={}, outputs={}, values={})
        )
        for n in range(3)
    ]
    store.write_once(f"train/{'0' * 64}/checkpoints/1.json", b"{}")
    assert sealed_digests(store, "train") == sorted(seal.digest for seal in seals)
    for seal in seals:
        assert sealed_by_digits(store, "train", seal.digest[:12]) == seal
    assert sealed_by_digits(store, "train", "0" * 12) is None
    with pytest.raises(ConfigError, match="begins 3 digests"):
        sealed_by_digits(store, "train", "")
    # Nor for what weights were trained as that another training goes on from.
    assert known_spec(PretrainedFile(uri=str(tmp_path / "w"), sha256="0" * 64), store) is None


def test_missing_keys_are_told(store: Store) -> None:
    assert not store.exists("nothing")
    with pytest.raises(MissingError, match="nothing does not exist"):
        store.read("nothing")


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_blobs_round_trip(store: Store, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    blob = store.put(data)
    assert store.put(tmp_path / "file") == blob
    assert store.get(blob) == data == store.fetch(blob).read_bytes()


def test_large_blobs_travel_in_parts(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    data = os.urandom(12 * 2**20)
    (tmp_path / "file").write_bytes(data)
    blob = store.put(tmp_path / "file")
    assert store.put(data) == blob
    assert store.fetch(blob).read_bytes() == data


@pytest.mark.services
@pytest.mark.usefixtures("s3_environment")
def test_an_upload_in_parts_takes_no_key_that_was_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks for the key before it begins; what counts is the condition on the last call."""
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    bucket, key = Bucket("eqm"), f"parts-{tmp_path.name}/a"
    real = bucket._upload

    def overtaken(key: str, data: bytes | Path) -> None:
        bucket._put(key, b"theirs")
        real(key, data)

    monkeypatch.setattr(bucket, "_upload", overtaken)
    assert not bucket.create(key, os.urandom(6 * 2**20))
    assert bucket.read(key) == b"theirs"
    assert left_over(bucket, key) == []


@pytest.mark.services
@pytest.mark.usefixtures("s3_environment")
def test_an_upload_in_parts_that_is_given_up_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    bucket, key = Bucket("eqm"), f"parts-{tmp_path.name}/b"

    def breaks(data: bytes, size: int) -> Iterator[bytes]:
        yield data[:size]
        assert len(left_over(bucket, key)) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(s3, "parts", breaks)
    with pytest.raises(KeyboardInterrupt):
        bucket.create(key, bytes(6 * 2**20))
    assert left_over(bucket, key) == []
    assert bucket.size(key) is None


def left_over(bucket: Bucket, key: str) -> list[str]:
    """Uploads of a key that were begun and neither completed nor given up."""
    found = bucket.client.list_multipart_uploads(Bucket=bucket.name, Prefix=key)
    return [upload["UploadId"] for upload in found.get("Uploads", ())]


@pytest.mark.services
@pytest.mark.usefixtures("s3_environment")
def test_a_listing_goes_on_to_its_last_page(tmp_path: Path) -> None:
    """A thousand keys are one page: what is behind it are images and shards like any other."""
    bucket, root = Bucket("eqm"), f"pages-{tmp_path.name}"
    real = bucket.client.list_objects_v2
    bucket.client.list_objects_v2 = lambda **asked: real(**asked, MaxKeys=2)
    keys = [f"{root}/{folder}/{i}" for folder in "abc" for i in range(3)]
    for key in keys:
        bucket.create(key, b"x")
    assert [found.key for found in bucket.list(f"{root}/")] == keys
    assert list(bucket.folders(f"{root}/")) == [f"{root}/{folder}" for folder in "abc"]


def test_a_blob_of_another_size_is_not_held(store: Store) -> None:
    blob = store.put(b"x" * 1000)
    assert store.holds(blob)
    assert not store.holds(Blob(sha256=blob.sha256, size_bytes=999))
    assert not store.holds(Blob.of(b"y"))


def test_of_two_large_writes_at_once_the_first_stands(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    first, second = b"1" * (6 * 2**20), b"2" * (6 * 2**20)
    assert store.write_once("large", first)
    if isinstance(store, S3Store):
        # The second looked when the first was not there yet.
        bucket, seen = store.bucket, [None]
        look = bucket.size
        monkeypatch.setattr(bucket, "size", lambda key: seen.pop() if seen else look(key))
    assert not store.write_once("large", second)
    assert store.read("large") == first


def test_one_flipped_bit_is_noticed(store: Store) -> None:
    blob = store.put(b"x" * 1000)
    damage(store, blob)
    with pytest.raises(IntegrityError, match=blob.sha256[:16]):
        store.get(blob)
    with pytest.raises(IntegrityError, match="damaged"):
        store.fetch(blob)


def test_a_damaged_copy_in_the_cache_is_replaced(store: Store) -> None:
    blob = store.put(b"y" * 1000)
    if isinstance(store, LocalStore):
        return
    path = store.fetch(blob)
    path.chmod(0o644)
    path.write_bytes(b"z" * 1000)
    os.utime(path, ns=(1, 1))
    assert store.fetch(blob).read_bytes() == b"y" * 1000


def test_the_first_seal_stands(store: Store) -> None:
    first = Record(stage="train", algorithm=1, config={}, inputs={}, outputs={}, values={"run": 1})
    second = Record(stage="train", algorithm=1, config={}, inputs={}, outputs={}, values={"run": 2})
    assert store.record("train", first.digest) is None
    assert store.seal(first) == first == store.seal(second) == store.record("train", first.digest)


def test_a_record_under_another_address_is_refused(store: Store) -> None:
    record = Record(stage="train", algorithm=1, config={}, inputs={}, outputs={}, values={})
    store.write_once(storage.record_key("train", "0" * 64), storage.record_to_bytes(record))
    with pytest.raises(IntegrityError, match="another result"):
        store.record("train", "0" * 64)


@pytest.mark.parametrize("uri", ["http://169.254.169.254/x", "file:///etc", "s3://", "pipe://x"])
def test_other_addresses_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="store"):
        open_store(uri)


@pytest.mark.parametrize("key", ["../outside", "/etc/passwd", "a/../../b"])
def test_keys_stay_inside_the_directory(tmp_path: Path, key: str) -> None:
    with pytest.raises(StoreError, match="leaves the store"):
        LocalStore(tmp_path / "store").write_once(key, b"")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="the disk is full"):
        store.write_once("a/b", b"data")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    old, fresh = tmp_path / "a" / f"{ASIDE}old", tmp_path / "a" / f"{ASIDE}fresh"
    old.parent.mkdir()
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    # It may belong to a writer that has not locked it yet.
    fresh.write_bytes(b"")
    store = open_store(str(tmp_path))
    assert store.write_once("a/b", b"whole")
    assert sorted(path.name for path in old.parent.iterdir()) == [fresh.name, "b"]
    assert store.list("a/") == ["a/b"]


def test_a_read_only_place_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(StoreError, match="cannot be written"),
        disk_errors(str(tmp_path)),
    ):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_an_unreachable_s3_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    _environment(monkeypatch, endpoint="http://127.0.0.1:9", key="a", secret="b")
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:9 cannot be reached.*eqm up"):
        open_store("s3://eqm/x").list("")


@pytest.mark.services
def test_wrong_credentials_are_one_message(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = s3_environment["AWS_ENDPOINT_URL_S3"]
    _environment(monkeypatch, endpoint=endpoint, key="nobody", secret="nothing")
    with pytest.raises(StoreError, match=r"refuses these credentials.*AWS_ACCESS_KEY_ID"):
        open_store("s3://eqm/x").read("key")


@pytest.mark.services
def test_a_missing_bucket_is_one_message(s3_environment: dict[str, str]) -> None:
    with pytest.raises(StoreError, match="no bucket 'elsewhere'"):
        open_store("s3://elsewhere/x").write_once("key", b"")


def _environment(monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", values["endpoint"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", values["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", values["secret"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
