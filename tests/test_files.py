"""Files of this machine and of S3 behave alike, and lead nowhere but below their root."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from eqm.errors import ConfigError, DataError, StoreError
from eqm.files import File, Files, S3Files, checked_path, open_files
from eqm.s3 import Bucket, Object

TREE = {
    "cat/1.png": b"one",
    "cat/deep/2.JPEG": b"two!",
    "cat/.hidden.png": b"x",
    "dog/notes.txt": b"text",
    ".git/3.png": b"x",
    "loose.png": b"loose",
}

Place = Callable[[dict[str, bytes]], str]


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.services)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Puts files somewhere and gives the address of their folder."""
    if request.param == "s3":
        request.getfixturevalue("s3_environment")

    def put(files: dict[str, bytes]) -> str:
        for name, data in files.items():
            if request.param == "s3":
                Bucket("eqm").create(f"files-{tmp_path.name}/{name}", data)
            else:
                (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "root" / name).write_bytes(data)
        return f"s3://eqm/files-{tmp_path.name}" if request.param == "s3" else f"{tmp_path}/root"

    return put


def test_a_tree_is_listed_alike(place: Place) -> None:
    tree = open_files(place(TREE)).tree([".png", ".jpeg"])
    assert tree.folders == ("cat", "dog")
    found = [(file.path, file.size_bytes) for file in tree.files]
    assert found == [("cat/1.png", 3), ("cat/deep/2.JPEG", 4), ("loose.png", 5)]
    assert all(file.version for file in tree.files)


def test_bytes_are_read_whole_and_by_range(place: Place) -> None:
    files = open_files(place(TREE) + "/")
    assert files.read("cat/deep/2.JPEG") == b"two!"
    assert files.read("cat/deep/2.JPEG", 1, 2) == b"wo"
    assert files.read("cat/deep/2.JPEG", 4, 0) == b""
    assert files.find("cat/1.png") == files.tree([".png"]).files[0]
    assert files.find("cat/1.pn") is None


def test_what_is_not_there_or_too_short_is_refused(place: Place) -> None:
    files = open_files(place(TREE))
    with pytest.raises(DataError, match=r"cat/9.png cannot be read"):
        files.read("cat/9.png")
    with pytest.raises(DataError, match=r"2.JPEG ends at byte 4, before the 3 bytes from 2 on"):
        files.read("cat/deep/2.JPEG", 2, 3)


def test_one_file_is_listed_alone(place: Place) -> None:
    root = place({"in/a.tar": b"1", "in/a.tar.tar": b"2", "in/b.tar": b"3"})
    files = open_files(f"{root}/in/a.tar", single=".tar")
    assert [file.path for file in files.tree([".tar"]).files] == ["a.tar"]
    assert files.read("a.tar") == b"1"
    assert len(open_files(f"{root}/in", single=".tar").tree([".tar"]).files) == 3


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "a//b", "", "a\0b"])
def test_no_path_leads_out_of_the_root(place: Place, path: str) -> None:
    files = open_files(place(TREE))
    with pytest.raises(DataError, match="has a name"):
        files.read(path)


def test_a_file_that_changes_has_another_version(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"1")
    files = open_files(str(tmp_path))
    assert not files.is_settled(version(files))
    os.utime(tmp_path / "a.png", ns=(0, 10**18))
    before = version(files)
    assert before == File("a.png", 1, str(10**18))
    assert files.is_settled(before)
    os.utime(tmp_path / "a.png", ns=(0, 10**18 + 1))
    assert version(files) != before


def version(files: Files) -> File:
    (file,) = files.tree([".png"]).files
    return file


@pytest.mark.services
@pytest.mark.usefixtures("s3_environment")
def test_an_object_that_changes_has_another_version(tmp_path: Path) -> None:
    bucket, key = Bucket("eqm"), f"version-{tmp_path.name}/a.png"
    files = open_files(f"s3://eqm/version-{tmp_path.name}")
    seen = set()
    for data in (b"1", b"2", b"1"):
        bucket.client.put_object(Bucket="eqm", Key=key, Body=data)
        seen.add(version(files).version)
    assert len(seen) == 2


@pytest.mark.services
@pytest.mark.usefixtures("s3_environment")
def test_objects_that_mark_folders_are_no_files(tmp_path: Path) -> None:
    bucket, root = Bucket("eqm"), f"odd-{tmp_path.name}"
    bucket.create(f"{root}/cat.png/", b"")
    bucket.create(f"{root}/cat.png/a.png", b"1")
    tree = open_files(f"s3://eqm/{root}").tree([".png"])
    assert (tree.folders, [f.path for f in tree.files]) == (("cat.png",), ["cat.png/a.png"])


@pytest.mark.services
@pytest.mark.usefixtures("s3_environment")
@pytest.mark.parametrize("key", ["../x.png", "cat//x.png", "cat/./x.png", "cat/a\\b.png"])
def test_keys_that_lead_elsewhere_are_refused(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    # SeaweedFS tidies such keys; other servers list them.
    listed = Object(f"data/{key}", 3, "etag")
    monkeypatch.setattr(Bucket, "list", lambda _, prefix: iter([listed]))
    with pytest.raises(DataError, match=r"s3://eqm/data: .* has a name"):
        open_files("s3://eqm/data").tree([".png"])


@pytest.mark.services
@pytest.mark.usefixtures("s3_environment")
def test_a_forked_process_opens_a_connection_of_its_own(tmp_path: Path) -> None:
    Bucket("eqm").create(f"fork-{tmp_path.name}/a", b"data")
    files = S3Files("eqm", f"fork-{tmp_path.name}")
    assert files.read("a") == b"data"
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            ours = files._bucket()
            os.write(write, files.read("a") + str(ours in files._buckets.values()).encode())
            os.write(write, str(list(files._buckets) == [os.getpid()]).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100) == b"dataTrueTrue"
    assert list(files._buckets) == [os.getpid()]


@pytest.mark.services
@pytest.mark.usefixtures("s3_environment")
def test_a_bucket_that_is_not_there_is_told() -> None:
    with pytest.raises(StoreError, match="has no bucket 'nowhere-at-all'"):
        open_files("s3://nowhere-at-all/x").tree([".png"])


@pytest.mark.parametrize(
    "uri",
    [
        *("pipe:cat /etc/passwd", "http://169.254.169.254/", "https://x/y.tar", "file:///etc"),
        *("gs://b/x", "S3://b/x", "hdfs:x", "ftp://x", "data:,x", "s3:/b/x"),
    ],
)
def test_other_kinds_of_address_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="a folder on this machine or s3://bucket/prefix"):
        open_files(uri, single=".tar")


def test_addresses_that_name_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no bucket"):
        open_files("s3:///x")
    with pytest.raises(DataError, match=r"does not exist: give the folder, or one \.tar file"):
        open_files(str(tmp_path / "x.tar"), single=".tar")
    (tmp_path / "x.zip").write_bytes(b"1")
    with pytest.raises(DataError, match="is not a folder"):
        open_files(str(tmp_path / "x.zip"), single=".tar")
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "x.png").write_bytes(b"1")
    assert len(open_files(f"{tmp_path}/a:b").tree([".png"]).files) == 1


def test_links_are_followed_to_files_and_folders_of_the_root_alone(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "1.png").write_bytes(b"1")
    root = tmp_path / "root"
    (root / "cat").mkdir(parents=True)
    (root / "dog").symlink_to(tmp_path / "far")
    (root / "cat" / "2.png").symlink_to(tmp_path / "far" / "1.png")
    files = open_files(str(root))
    assert [file.path for file in files.tree([".png"]).files] == ["cat/2.png", "dog/1.png"]
    (root / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone.png is a link to .*nowhere, .* remove the link"):
        files.tree([".png"])
    (root / "cat" / "gone.png").unlink()
    (root / "loop").symlink_to(root)
    with pytest.raises(DataError, match="a link to a folder"):
        files.tree([".png"])


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"pipe.png is not a file"):
        open_files(str(tmp_path)).tree([".png"])


def test_a_safe_path_comes_back_as_it_is() -> None:
    for path in ("a", "a/b.c", "犬/ä b.png", "..a/b..", "a" * 1000):
        assert checked_path(path, "here") == path
    with pytest.raises(DataError, match=r"here: .* has a name of 1001 bytes"):
        checked_path("ä" * 500 + "x", "here")
