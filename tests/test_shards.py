"""Shards: stock tools read them, equal samples give equal bytes, no damage goes unnoticed."""

import dataclasses
import io
import itertools
import json
import subprocess
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from sets import a_spec, seal, stored_set

import eqm
from eqm import latent_set, shards, tars
from eqm.batches import samples_of
from eqm.damage import damages
from eqm.errors import ConfigError, DataError, IntegrityError, MissingError, StoreError
from eqm.latent_set import LatentSet, as_webdataset, open_manifest
from eqm.records import Blob, Record, Shard, canonical_bytes, to_json
from eqm.shards import Index, Packed, Sample, read_index, seal_set, write_shard
from eqm.storage import LocalStore, open_store, record_key

SHAPE = (4, 3, 3)
CLASSES = ("a", "b", "c")


def a_sample(i: int, *, mirror: bool = False) -> Sample:
    draw = np.random.default_rng(i)
    moments = draw.normal(size=SHAPE).astype(np.float32)
    other = draw.normal(size=SHAPE).astype(np.float32) if mirror else None
    return Sample(f"k/{i}", i % 3, i % 4 == 3, moments, other)


def packed(count: int, *, first: int = 0, mirror: bool = False) -> Packed:
    samples = [a_sample(first + i, mirror=mirror) for i in range(count)]
    return write_shard(samples, first_number=first)


def a_record(
    folder: Path, counts: tuple[int, ...] = (5, 5, 3), *, mirror: bool = False, **changes: Any
) -> tuple[LocalStore, Record]:
    """A sealed set of latents in a local store."""
    store = LocalStore(folder / "store")
    samples = [a_sample(i, mirror=mirror) for i in range(sum(counts))]
    files = stored_set(store, samples, counts[0], classes=CLASSES)
    manifest = shards.manifest_from_bytes(files[shards.MANIFEST], "m")
    assert tuple(shard.count for shard in manifest.shards) == counts
    return store, seal(store, dataclasses.replace(manifest, **changes))


def a_set(folder: Path, counts: tuple[int, ...] = (5, 5, 3), *, mirror: bool = False) -> LatentSet:
    store, record = a_record(folder, counts, mirror=mirror)
    return open_manifest(record, store)


def damage(path: Path, at: int) -> None:
    """Flip one bit of a file without changing its size."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.chmod(0o644)
    path.write_bytes(data)


# -- writing ------------------------------------------------------------------------------------


def test_equal_samples_give_equal_bytes() -> None:
    one, two = packed(4, mirror=True), packed(4, mirror=True)
    assert (one.tar, one.index) == (two.tar, two.index)
    assert one.count == 4


def test_members_carry_no_time_and_no_owner() -> None:
    with tarfile.open(fileobj=io.BytesIO(packed(3).tar)) as archive:
        for member in archive:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o444)
            assert (member.uname, member.gname) == ("", "")
            assert member.isreg()


def test_the_writer_of_webdataset_gives_the_same_bytes() -> None:
    from webdataset.writer import TarWriter

    stream = io.BytesIO()
    writer = TarWriter(stream, encoder=False, mtime=0, user="", group="", mode=0o444)
    for i in range(41, 45):
        sample = a_sample(i, mirror=True)
        views = {"moments.npy": sample.moments, "mirror.npy": sample.mirror}
        arrays = {name: io.BytesIO() for name in views}
        for name, view in views.items():
            np.save(arrays[name], view.astype(np.float16))  # type: ignore[union-attr]
        writer.write(
            {
                "__key__": f"{i:08d}",
                **{name: array.getvalue() for name, array in arrays.items()},
                "cls": str(sample.label).encode(),
                "json": canonical_bytes({"key": sample.key, "held_out": sample.held_out}),
            }
        )
    writer.close()
    assert packed(4, first=41, mirror=True).tar == stream.getvalue()


def test_tar_reads_a_shard(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(packed(2, first=41, mirror=True).tar)
    line = ["tar", "-tf", str(tmp_path / "x.tar")]
    found = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60)
    kinds = ("cls", "json", "mirror.npy", "moments.npy")
    numbers = ("00000041", "00000042")
    assert found.stdout.split() == [f"{n}.{k}" for n, k in itertools.product(numbers, kinds)]
    out = subprocess.run(
        [*line[:1], "-xOf", line[2], "00000042.json"], capture_output=True, check=True, timeout=60
    )
    assert json.loads(out.stdout) == {"key": "k/42", "held_out": False}


def test_webdataset_reads_a_shard(tmp_path: Path) -> None:
    import webdataset

    (tmp_path / "x.tar").write_bytes(packed(5, mirror=True).tar)
    data = webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False).decode()
    found = list(data)
    assert [sample["__key__"] for sample in found] == [f"{i:08d}" for i in range(5)]
    for i, sample in enumerate(found):
        expected = a_sample(i, mirror=True)
        assert sample["cls"] == expected.label
        assert sample["json"] == {"key": expected.key, "held_out": expected.held_out}
        assert np.array_equal(sample["moments.npy"], expected.moments.astype(np.float16))
        assert np.array_equal(sample["mirror.npy"], expected.mirror.astype(np.float16))
        assert sample["moments.npy"].dtype == np.float16


@pytest.mark.parametrize("view", ["moments", "mirror"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 70_000.0])
def test_values_that_float16_cannot_hold_are_refused(value: float, view: str) -> None:
    sample = a_sample(6, mirror=True)
    getattr(sample, view)[1, 2, 0] = value
    with pytest.raises(DataError, match=r"image 'k/6' reach .* not finite as float16"):
        write_shard([a_sample(5, mirror=True), sample], first_number=5)


def test_shards_that_make_no_sense_are_refused() -> None:
    with pytest.raises(DataError, match="at least one sample"):
        write_shard([], first_number=0)
    with pytest.raises(DataError, match="100,000,000 samples"):
        write_shard([a_sample(0)] * 2, first_number=99_999_999)
    odd = Sample("odd", 0, False, np.zeros((4, 3, 2), dtype=np.float32))
    with pytest.raises(DataError, match=r"'odd' has moments of shape \(4, 3, 2\)"):
        write_shard([a_sample(0), odd], first_number=0)
    with pytest.raises(DataError, match="either all samples"):
        write_shard([a_sample(0), a_sample(1, mirror=True)], first_number=0)


# -- sealing ------------------------------------------------------------------------------------


def read_back(store: LocalStore, samples: Sequence[Sample]) -> tuple[Shard, Index]:
    """A shard in a store, and its index."""
    made = write_shard(samples, first_number=0)
    shard = Shard(tar=store.put(made.tar), index=store.put(made.index), count=made.count)
    return shard, read_index(made.index, shard, "a shard")


def run_of(count: int, **changes: Any) -> list[Sample]:
    return [dataclasses.replace(a_sample(i), **changes) for i in range(count)]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "at least one shard"),
        ([run_of(3), run_of(2), run_of(3)], "shard 1 holds 2 samples, the first holds 3"),
        ([run_of(3), run_of(4)], "shard 1 holds 4 samples, the first holds 3"),
        ([run_of(3), run_of(3, mirror=a_sample(0).moments)], r"shape \(3, 2\), \(3, 1\) is needed"),
        ([run_of(3), run_of(3, moments=np.zeros((4, 9, 1)))], r"moments of shape \(4, 9, 1\)"),
        ([run_of(3), run_of(3, label=-1)], "shard 1 has a label outside 0 to 2"),
        ([run_of(3), run_of(3, label=3)], "shard 1 has a label outside 0 to 2"),
    ],
)
def test_shards_that_are_not_of_one_set_are_not_sealed(
    tmp_path: Path, parts: list[list[Sample]], message: str
) -> None:
    made = [read_back(LocalStore(tmp_path), samples) for samples in parts]
    with pytest.raises(DataError, match=message):
        seal_set(
            [shard for shard, _ in made],
            [index for _, index in made],
            spec=a_spec((2, 3, 3)),
            source="s",
            classes=CLASSES,
            mirrored=False,
        )


def test_a_set_counts_its_sides_and_averages_over_what_is_trained_on(tmp_path: Path) -> None:
    data = a_set(tmp_path)
    samples = [a_sample(i) for i in range(13)]
    manifest = data.manifest
    for held_out, counts in (
        (False, manifest.train_per_class),
        (True, manifest.held_out_per_class),
    ):
        labels = [sample.label for sample in samples if sample.held_out == held_out]
        assert counts == tuple(labels.count(label) for label in range(3))
    means = np.stack([s.moments[:2] for s in samples if not s.held_out]).astype(np.float16)
    over = (0, 2, 3)
    assert np.allclose(manifest.channel_mean, means.mean(axis=over, dtype=np.float64), atol=1e-12)
    assert np.allclose(manifest.channel_std, means.std(axis=over, dtype=np.float64), atol=1e-9)
    assert data.keys == [sample.key for sample in samples]


# -- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirror", [False, True])
def test_what_is_read_is_what_was_written(tmp_path: Path, mirror: bool) -> None:
    data = a_set(tmp_path, mirror=mirror)
    assert len(data) == 13
    assert data.keys == [f"k/{i}" for i in range(13)]
    assert data.labels.tolist() == [i % 3 for i in range(13)]
    assert data.held_out_numbers.tolist() == [3, 7, 11]
    assert sorted([*data.train_numbers, *data.held_out_numbers]) == list(range(13))
    numbers = np.array([12, 0, 5, 4, 12])
    expected = np.stack([a_sample(i, mirror=mirror).moments for i in numbers]).astype(np.float16)
    assert np.array_equal(data.moments(numbers), expected)
    assert data.moments(numbers).dtype == np.float16
    assert data.moments([]).shape == (0, *SHAPE)
    data.verify()


def test_mirrors_are_read_where_asked_for(tmp_path: Path) -> None:
    data = a_set(tmp_path, mirror=True)
    found = data.moments(np.arange(13), mirror=np.arange(13) % 2 == 1)
    for i in range(13):
        sample = a_sample(i, mirror=True)
        expected = sample.mirror if i % 2 else sample.moments
        assert np.array_equal(found[i], expected.astype(np.float16))


def test_samples_that_are_not_there_are_refused(tmp_path: Path) -> None:
    data = a_set(tmp_path)
    for number in (-1, 13):
        with pytest.raises(DataError, match=r"has samples 0 to 12, not"):
            data.moments([number])
    with pytest.raises(DataError, match="holds no mirror images"):
        data.moments([1], mirror=[True])
    assert len(data.moments([1], mirror=[False])) == 1


def test_a_set_is_opened_by_its_address(tmp_path: Path) -> None:
    store, record = a_record(tmp_path)
    address = f"{store.uri}/latents/{record.digest}"
    for where in (address, f"{address}/", f"{address}/record.json", Path(address)):
        assert len(eqm.open_manifest(where)) == 13
    assert len(eqm.open_manifest(record, store)) == 13


def test_addresses_that_name_no_set_are_refused(tmp_path: Path) -> None:
    store, record = a_record(tmp_path)
    with pytest.raises(ConfigError, match="give its store"):
        open_manifest(record)
    for bad in ("x", f"{store.uri}/train/{record.digest}", f"{store.uri}/latents/abc"):
        with pytest.raises(ConfigError, match="is no set of latents"):
            open_manifest(bad)
    for bad in ("pipe:cat", "http://169.254.169.254", "file:///etc"):
        with pytest.raises(ConfigError, match="only s3://bucket/prefix or a local directory"):
            open_manifest(f"{bad}://x/latents/{record.digest}")
    with pytest.raises(DataError, match="there is no store at"):
        open_manifest(str(tmp_path / "nowhere" / "latents" / record.digest))
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(DataError, match="is not sealed"):
        open_manifest(f"{store.uri}/latents/{'0' * 64}")


def test_the_record_of_another_stage_is_refused(tmp_path: Path) -> None:
    store, record = a_record(tmp_path)
    values = {**vars(record), "stage": "train"}
    with pytest.raises(DataError, match="is no set of latents"):
        open_manifest(Record(**values), store)


def test_a_large_set_keeps_no_file_open(tmp_path: Path) -> None:
    data = a_set(tmp_path, (1,) * 40)
    before = len(list(Path("/proc/self/fd").iterdir()))
    data.moments(np.arange(40))
    assert len(list(Path("/proc/self/fd").iterdir())) - before < 5


# -- damage -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_flipped_bit_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    store, record = a_record(folder, (3, 2), mirror=True)
    files = sorted(store.root / key for key in store.list(""))
    path = data.draw(st.sampled_from(files))
    damage(path, data.draw(st.integers(0, path.stat().st_size - 1)))
    with pytest.raises((IntegrityError, MissingError, DataError)):
        open_manifest(f"{store.uri}/latents/{record.digest}").verify()


def test_a_bit_that_flips_after_opening_is_noticed_at_the_read(tmp_path: Path) -> None:
    data = a_set(tmp_path)
    data.moments(np.arange(13))
    blob = data.manifest.shards[1].tar
    offset = int(data._offset[7, 0])
    path = tmp_path / "store" / blob.key
    path.chmod(0o644)
    with path.open("r+b") as file:  # in place: the mapping sees it
        file.seek(offset + 140)
        byte = file.read(1)
        file.seek(offset + 140)
        file.write(bytes([byte[0] ^ 1]))
    assert len(data.moments([6, 8])) == 2
    with pytest.raises(IntegrityError, match=rf"shard 1 of .*: sample 7 at byte {offset} "):
        data.moments([6, 7])


@pytest.mark.parametrize("keep", [0, 512, 1000, 2560])
def test_a_shard_that_was_cut_is_refused(tmp_path: Path, keep: int) -> None:
    data = a_set(tmp_path)
    path = tmp_path / "store" / data.manifest.shards[2].tar.key
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:keep])
    assert len(data.moments([0])) == 1
    with pytest.raises(IntegrityError, match=f"damaged: it holds {keep} bytes"):
        data.moments([12])


def test_a_shard_that_is_missing_is_refused(tmp_path: Path) -> None:
    data = a_set(tmp_path)
    (tmp_path / "store" / data.manifest.shards[0].tar.key).unlink()
    with pytest.raises(MissingError):
        data.moments([0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_per_class": (4, 3, 4)}, "states"),
        ({"held_out_per_class": (0, 0, 0)}, "states"),
        ({"classes": ("a", "b")}, "label outside 0 to 1"),
        ({"mirrored": True}, "with 1 views"),
    ],
)
def test_manifests_that_say_something_else_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    store, record = a_record(tmp_path, **changes)
    with pytest.raises(IntegrityError, match=message):
        open_manifest(record, store)


def test_a_spec_of_another_shape_is_refused(tmp_path: Path) -> None:
    store, record = a_record(tmp_path, spec=a_spec((1, 4, 4)))
    with pytest.raises(IntegrityError, match=r"have shape \(2, 4, 4\)"):
        open_manifest(record, store)


def test_an_index_of_another_shard_is_refused(tmp_path: Path) -> None:
    one, other = packed(3), packed(4)
    store = LocalStore(tmp_path)
    shard = Shard(tar=store.put(one.tar), index=store.put(other.index), count=3)
    with pytest.raises(IntegrityError, match="does not have 3 rows"):
        shards.read_index(other.index, shard, "shard 0")
    tensors = safetensors.numpy.load(one.index)
    tensors["offset"] = tensors["offset"] + 10**6
    with pytest.raises(IntegrityError, match="points outside its tar"):
        shards.read_index(safetensors.numpy.save(tensors), shard, "shard 0")
    tensors.pop("crc32")
    with pytest.raises(IntegrityError, match="holds"):
        shards.read_index(safetensors.numpy.save(tensors), shard, "shard 0")
    with pytest.raises(IntegrityError, match="cannot be read"):
        shards.read_index(b"no index", shard, "shard 0")


def test_a_manifest_that_is_not_json_is_refused() -> None:
    with pytest.raises(IntegrityError, match="is not JSON"):
        shards.manifest_from_bytes(b"{", "m")


def test_a_record_that_was_edited_is_refused(tmp_path: Path) -> None:
    store, record = a_record(tmp_path)
    path = store.root / record_key("latents", record.digest)
    body = json.loads(path.read_text())
    body["values"] = {"more": 1}
    path.chmod(0o644)
    path.write_text(json.dumps(body))
    with pytest.raises(IntegrityError, match="changed after it was sealed"):
        open_manifest(f"{store.uri}/latents/{record.digest}")


# -- the form of the tar: what stock readers pass over in silence ---------------------------------


def rebuilt(tar: bytes, change: object) -> bytes:
    """The tar with its list of (member, bytes) changed."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        members = [(m, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for member, data in change(members):  # type: ignore[operator]
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def renamed(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    return info


TARS = {
    "cut between two samples": (lambda ms: ms[:-3], 2, "a block of zeros"),
    "half a sample": (lambda ms: ms[:-1], 2, "a block of zeros"),
    "no label": (lambda ms: [m for m in ms if m[0].name != "00000001.cls"], 1, "00000001.json"),
    "a sample twice": (lambda ms: [*ms, *ms[-3:]], None, "member '00000002.cls'"),
    "out of order": (lambda ms: [*ms[3:6], *ms[:3], *ms[6:]], 0, "member '00000001.cls'"),
    "empty": (lambda ms: [], 0, "a block of zeros"),
    "a pickle": (
        lambda ms: [*ms, (renamed("00000003.pkl"), b"cos\nsystem\n(S'x'\ntR.")],
        None,
        "member '00000003.pkl'",
    ),
    "a path upwards": (lambda ms: [(renamed("../00000000.cls"), b"0"), *ms[1:]], 0, "'../0000"),
    "an absolute path": (lambda ms: [(renamed("/00000000.cls"), b"0"), *ms[1:]], 0, "'/0000"),
    "a link": (
        lambda ms: [(renamed("00000000.cls", tarfile.SYMTYPE), b""), *ms[1:]],
        0,
        "a symbolic link",
    ),
    "a fifo": (lambda ms: [*ms, (renamed("fifo", tarfile.FIFOTYPE), b"")], None, "a fifo"),
    "a long name": (lambda ms: [*ms, (renamed("n" * 300), b"")], None, "(PAX)"),
    "another array": (lambda ms: [*ms[:2], (ms[2][0], ms[5][1]), *ms[3:]], 0, "CRC"),
    "an object array": (
        lambda ms: [*ms[:2], (ms[2][0], ms[2][1].replace(b"'<f2'", b"'|O' ")), *ms[3:]],
        0,
        "CRC",
    ),
}


def an_index(made: Packed) -> shards.Index:
    shard = Shard(tar=Blob.of(made.tar), index=Blob.of(made.index), count=made.count)
    return shards.read_index(made.index, shard, "shard 0")


def found(tar: bytes, made: Packed) -> list[tars.Flaw]:
    return list(tars.flaws(tar, an_index(made).samples(0), SHAPE))


@pytest.mark.parametrize("name", TARS)
def test_tars_of_another_form_are_refused(name: str) -> None:
    made = packed(3)
    change, where, reason = TARS[name]
    assert found(made.tar, made) == []
    first = found(rebuilt(made.tar, change), made)[0]
    assert first.number == where
    assert reason in first.reason
    assert found(b"x" * 2000, made)[0].reason.startswith("no tar header")


def test_zeros_garbage_and_joined_tars_are_refused() -> None:
    made = packed(3)
    for start in (0, int(an_index(made).offset[0, 0]) + 512):
        tar = made.tar[:start] + bytes(1024) + made.tar[start + 1024 :]
        assert "a block of zeros stands where" in found(tar, made)[0].reason
        assert found(tar, made)[0].offset == start
    assert "goes on with member" in found(made.tar + made.tar, made)[0].reason
    assert "goes on with no tar header" in found(made.tar + b"x" * 512, made)[0].reason
    assert "goes on with a block of zeros" in found(made.tar + bytes(512), made)[0].reason
    for keep in (0, 100, 512, 700, int(an_index(made).offset.max()) + 512, len(made.tar) - 1):
        reason = found(made.tar[:keep], made)[0].reason
        assert any(word in reason for word in ("end of the file", "cut", "a rest of", "fill up"))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_other_byte_of_a_tar_is_named(data: st.DataObject) -> None:
    made = packed(3, mirror=True)
    at = data.draw(st.integers(0, len(made.tar) - 1))
    tar = bytearray(made.tar)
    tar[at] ^= data.draw(st.integers(1, 255))
    first = found(bytes(tar), made)[0]
    assert first.offset <= at
    after_last = int(an_index(made).offset.max()) + 512
    assert (first.number is None) == (at >= after_last)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.full(SHAPE, np.nan), "holds NaN or infinity"),
        (np.full(SHAPE, -np.inf), "holds NaN or infinity"),
        (np.zeros((3, 4, 3)), r"is no float16 array of shape (4, 3, 3)"),
    ],
)
def test_arrays_that_match_their_crc_and_are_wrong_are_told(array: Any, reason: str) -> None:
    """As somebody else's writer may have sealed them."""
    facts = tars.Facts(7, "k/7", 0, False)
    tar, (places,) = tars.pack([(facts, [array.astype("<f2")])])
    (flaw,) = tars.flaws(tar, [(facts, places)], SHAPE)
    assert flaw == tars.Flaw(7, places[0].offset, f"00000007.moments.npy {reason}")


def test_the_manifest_survives_its_json(tmp_path: Path) -> None:
    manifest = a_set(tmp_path).manifest
    again = shards.manifest_from_bytes(canonical_bytes(manifest), "m")
    assert again == manifest
    assert to_json(again)["shards"][0]["count"] == 5


# -- a set in S3 --------------------------------------------------------------------------------


def in_s3(folder: Path, counts: tuple[int, ...] = (5, 5, 3)) -> str:
    """A sealed set in the embedded S3; its address."""
    local, record = a_record(folder, counts)
    store = open_store(f"s3://eqm/test-{folder.name}", cache=folder / "made")
    for key in local.list("blobs/"):
        store.write_once(key, local.read(key))
    return store.where(f"latents/{store.seal(record).digest}")


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def equal(data: LatentSet, numbers: Sequence[int]) -> bool:
    expected = np.stack([a_sample(i).moments for i in numbers]).astype(np.float16)
    return np.array_equal(data.moments(numbers), expected)


@pytest.mark.services
def test_shards_come_from_s3_in_the_background(
    s3_environment: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = open_manifest(in_s3(tmp_path), cache=tmp_path / "cache")
    assert data.resident == 0
    assert equal(data, [12, 0, 7, 7, 3])  # at once, by range
    until(lambda: data.resident == 1)
    assert equal(data, range(13))
    # Another set over the same cache, at the same time: nobody is told that it is full.
    others = [open_manifest(data.where, cache=tmp_path / "new") for _ in range(3)]
    assert all(equal(other, [1]) for other in others)
    until(lambda: all(other.resident == 1 for other in others))
    assert capfd.readouterr().err == ""
    for one in (data, *others):
        one.close()


@pytest.mark.services
def test_a_cache_that_is_full_costs_time_and_nothing_else(
    s3_environment: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    where = in_s3(tmp_path)
    size = max(shard.tar.size_bytes for shard in eqm.open_manifest(where).manifest.shards)
    data = open_manifest(where, cache=tmp_path / "cache", cache_bytes=size + 4000)
    for _ in range(3):
        assert equal(data, [12, 0, 7, 3])
        until(lambda: data.resident > 0)
    time.sleep(0.3)
    assert data.resident < 1
    assert "the rest is read by range" in capfd.readouterr().err
    with pytest.raises(
        ConfigError, match=rf"cache_bytes is {size + 4000:,}, and the .* needs all of"
    ):
        as_webdataset(data)
    data.close()


@pytest.mark.services
def test_damage_in_s3_is_noticed_by_range_and_by_shard(
    s3_environment: dict[str, str], tmp_path: Path
) -> None:
    where = in_s3(tmp_path)
    store = open_manifest(where, cache=tmp_path / "cache")._store
    data = open_manifest(where, cache=tmp_path / "cache")
    blob, offset = data.manifest.shards[1].tar, int(data._offset[7, 0])
    tar = bytearray(store.read(blob.key))
    tar[offset + 150] ^= 1
    store.bucket.client.put_object(  # type: ignore[attr-defined]
        Bucket="eqm",
        Key=store.name(blob.key),  # type: ignore[attr-defined]
        Body=bytes(tar),
    )
    until(lambda: len(data.moments([0])) == 1 and data.resident > 0.6)
    with pytest.raises(IntegrityError, match=f"sample 7 at byte {offset} "):
        data.moments([7])
    assert equal(data, [5, 6, 8, 12])
    found = list(damages(data.manifest, store, where))
    assert [(one.shard, one.sample, one.key, one.offset) for one in found] == [
        (1, 7, "k/7", offset)
    ]
    assert "does not match its CRC" in found[0].text
    data.close()


@pytest.mark.services
def test_a_shard_that_s3_lost_is_told(s3_environment: dict[str, str], tmp_path: Path) -> None:
    where = in_s3(tmp_path)
    data = open_manifest(where, cache=tmp_path / "cache")
    blob = data.manifest.shards[2].tar
    store = data._store
    store.bucket.client.delete_object(Bucket="eqm", Key=store.name(blob.key))  # type: ignore[attr-defined]
    with pytest.raises(MissingError, match=blob.sha256):
        data.moments([12])
    (found,) = damages(data.manifest, store, where)
    assert (found.shard, "does not exist" in found.text) == (2, True)
    data.close()


class Far:
    """A store that is not on this machine, and whose cache gives what a test says."""

    def __init__(self, store: LocalStore) -> None:
        self.store = store
        self.answers: dict[str, list[Any]] = {}
        """By digest: what is said before the shard is given. Errors are raised."""
        self.touched: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def fetch_unless_full(self, blob: Blob) -> Path | None:
        answers = self.answers.setdefault(blob.sha256, [])
        if not answers:
            return self.store.fetch(blob)
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def touch(self, blob: Blob) -> None:
        self.touched.add(blob.sha256)


@pytest.mark.parametrize(
    "answers", [[StoreError("S3 is away")] * 3, [OSError(5, "disk")], [None] * 3], ids=str
)
def test_a_shard_that_could_not_be_had_at_first_is_fetched_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[Any]
) -> None:
    monkeypatch.setattr(latent_set, "AGAIN_SECONDS", 0.001)
    near = a_set(tmp_path)
    store = Far(LocalStore(tmp_path / "store"))
    # The last shard has no other after it that would bring the fetchers round.
    for shard in near.manifest.shards:
        store.answers[shard.tar.sha256] = list(answers)
    data = LatentSet(near.manifest, store, "the set")  # type: ignore[arg-type]
    assert equal(data, range(13))
    until(lambda: data.resident == 1)
    assert equal(data, range(13))
    data.close()


def test_a_store_that_fails_for_days_is_still_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 to the power of 1024 failures is no number of seconds."""
    monkeypatch.setattr(latent_set, "AGAIN_SECONDS", 0.0)
    near = a_set(tmp_path, (5,))
    store = Far(LocalStore(tmp_path / "store"))
    store.answers[near.manifest.shards[0].tar.sha256] = [StoreError("S3 is away")] * 6000
    data = LatentSet(near.manifest, store, "the set")  # type: ignore[arg-type]
    assert equal(data, [0])
    until(lambda: data.resident == 1)
    data.close()


def test_what_is_mapped_is_marked_as_used_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_set, "AGAIN_SECONDS", 0.001)
    monkeypatch.setattr(latent_set, "TOUCH_SECONDS", 0.0)
    near = a_set(tmp_path)
    store = Far(LocalStore(tmp_path / "store"))
    tars = [shard.tar.sha256 for shard in near.manifest.shards]
    store.answers[tars[1]] = [None] * 10**6
    data = LatentSet(near.manifest, store, "the set")  # type: ignore[arg-type]
    assert equal(data, [0])
    until(lambda: store.touched == {tars[0], tars[2]})
    time.sleep(0.05)
    data.close()
    assert store.touched == {tars[0], tars[2]}
    assert data.resident == 2 / 3


def test_a_reader_takes_no_memory_for_its_index(tmp_path: Path) -> None:
    count, size = 100_000, 10_000
    made, samples = [], [a_sample(0, mirror=True)] * 2
    shard, index = read_back(LocalStore(tmp_path), samples)
    for first in range(0, count, size):
        repeated = {name: np.repeat(getattr(index, name)[:1], size, axis=0)
                    for name in ("offset", "crc32", "label", "held_out")}  # fmt: skip
        repeated["held_out"] = np.arange(first, first + size) % 10 == 0
        keys, ends = np.zeros(size, dtype=np.uint8), np.arange(1, size + 1)
        made.append(dataclasses.replace(index, key_bytes=keys, key_end=ends, **repeated))
    store = LocalStore(tmp_path)
    sealed = seal_set(
        [dataclasses.replace(shard, count=size)] * len(made),
        made,
        spec=a_spec((2, 3, 3)),
        source="s",
        classes=CLASSES,
        mirrored=True,
    )
    for data in sealed.files.values():
        store.put(data)
    assert len(sealed.index) > 20 * count
    samples_of(a_set(tmp_path / "first"), 0, np.arange(5))  # what is imported and kept once
    tracemalloc.start()
    try:
        found = LatentSet(sealed.manifest, store, "m")
        numbers = samples_of(found, 0, np.arange(987_654_321, 987_654_321 + 256))
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(numbers.tolist())) == 256
    assert not found.held_out[numbers].any()
    # Pieces that are hashed and counted, and no column.
    assert taken < len(sealed.index) / 2


def test_stock_webdataset_reads_a_verified_set(tmp_path: Path) -> None:
    data = a_set(tmp_path, mirror=True)
    samples = list(as_webdataset(data))
    assert [sample["__key__"] for sample in samples] == [f"{i:08d}" for i in range(13)]
    assert np.array_equal(
        np.stack([sample["moments.npy"] for sample in samples]), data.moments(range(13))
    )
