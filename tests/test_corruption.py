"""What loaders pass over in silence, done to a sealed set: each is refused by name.

Every case changes the bytes of the second of three shards, where they lie in the store. Verifying
names shard and sample; reading refuses as well, whether the shard was hashed before or not. And
what is no damage (few images for many ranks, odd sizes) is read as it is.
"""

import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sets import a_spec, seal, stored_set

from eqm import shards
from eqm.batches import batches
from eqm.damage import damages
from eqm.errors import ConfigError, DataError, IntegrityError
from eqm.latent_set import LatentSet, open_manifest
from eqm.records import Blob, Manifest, canonical_bytes
from eqm.shards import Sample, manifest_from_bytes
from eqm.storage import LocalStore
from eqm.tars import BLOCK, member_header, npy_header

SHAPE = (4, 4, 4)
FIRST = 5
"""Number of the first sample of the shard that is changed."""


def a_sample(i: int) -> Sample:
    moments = np.random.default_rng(i).normal(size=SHAPE)
    return Sample(f"class/{i}.png", i % 3, i % 5 == 4, moments, moments[..., ::-1])


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def manifest(store: LocalStore) -> Manifest:
    samples = [a_sample(i) for i in range(14)]
    files = stored_set(store, samples, 5, classes=("a", "b", "c"))
    return manifest_from_bytes(files[shards.MANIFEST], "m")


Members = list[tuple[str, bytes]]


def members_of(tar: bytes) -> Members:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return [(m.name, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]


def tar_of(members: Members, header: Callable[[str, int], bytes] = member_header) -> bytes:
    parts = [header(name, len(data)) + data + bytes(-len(data) % BLOCK) for name, data in members]
    joined = b"".join(parts)
    return joined + bytes(1024) + bytes(-(len(joined) + 1024) % 10240)


def of_kind(kind: bytes) -> Callable[[bytes], bytes]:
    """The first member becomes a link, a device, ..."""

    def change(tar: bytes) -> bytes:
        info = tarfile.TarInfo(f"{FIRST:08d}.cls")
        info.type, info.linkname, info.size = kind, "/etc/passwd", 1
        return info.tobuf(tarfile.GNU_FORMAT) + tar[BLOCK:]

    return change


def named(name: str) -> Callable[[bytes], bytes]:
    """The first member has another name."""

    def change(tar: bytes) -> bytes:
        info = tarfile.TarInfo(name)
        info.size = 1
        return info.tobuf(tarfile.PAX_FORMAT) + tar[BLOCK:]

    return change


def with_member(name: str, data: bytes) -> Callable[[bytes], bytes]:
    return lambda tar: tar_of([*members_of(tar), (name, data)])


def array(header: bytes, payload: bytes = b"") -> Callable[[bytes], bytes]:
    """The first array is another .npy file."""

    def change(tar: bytes) -> bytes:
        members = members_of(tar)
        at = next(i for i, (name, _) in enumerate(members) if name.endswith("mirror.npy"))
        members[at] = (members[at][0], header + payload)
        return tar_of(members)

    return change


def npy(descr: str, shape: tuple[int, ...]) -> bytes:
    text = str({"descr": descr, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda tar: tar[:at] + bytes([tar[at] ^ 1]) + tar[at + 1 :]


def sample_bytes(tar: bytes) -> int:
    """Bytes of one sample with its headers."""
    return tar.index(member_header(f"{FIRST + 1:08d}.cls", 1))


NAN = np.full(SHAPE, np.nan, dtype="<f2").tobytes()
CASES: dict[str, tuple[Callable[[bytes], bytes], int | None, str]] = {
    "T1 cut at a member boundary": (lambda t: t[: 2 * sample_bytes(t)], FIRST + 2, "end of the"),
    "T1 cut and ended well": (lambda t: tar_of(members_of(t)[:-4]), FIRST + 4, "block of zeros"),
    "T1 cut in a payload": (lambda t: t[: sample_bytes(t) + 2600], FIRST + 1, "cut after"),
    "T1 cut between cls and npy": (lambda t: t[: sample_bytes(t) + 1024], FIRST + 1, "end of the"),
    "T2 zeros in a header": (lambda t: bytes(1024) + t[1024:], FIRST, "a block of zeros"),
    "T2 trailing garbage": (lambda t: t + b"x" * 512, None, "goes on with no tar header"),
    "T2 concatenated": (lambda t: t + t, None, f"goes on with member '{FIRST:08d}.cls'"),
    "T3 a bit of a payload": (flipped(2700), FIRST, "does not match its CRC"),
    "T3 a bit of a header": (flipped(3), FIRST, f"stands where {FIRST:08d}.cls begins"),
    "T4 empty": (lambda t: b"", FIRST, "the end of the file"),
    "T4 no sample": (lambda t: tar_of([]), FIRST, "a block of zeros"),
    "T4 larger than declared": (lambda t: t + bytes(10240), None, "goes on with a block of zeros"),
    "T5 a sample twice": (lambda t: tar_of([*members_of(t), *members_of(t)[:4]]), None, "member"),
    "T5 upwards": (named("../../etc/passwd"), FIRST, "'../../etc/passwd'"),
    "T5 absolute": (named("/etc/passwd"), FIRST, "'/etc/passwd'"),
    "T5 300 characters": (named("n" * 300), FIRST, "extended header (PAX)"),
    "T5 a symbolic link": (of_kind(tarfile.SYMTYPE), FIRST, "a symbolic link"),
    "T5 a hard link": (of_kind(tarfile.LNKTYPE), FIRST, "a hard link"),
    "T5 a device": (of_kind(tarfile.CHRTYPE), FIRST, "a device"),
    "T5 a fifo": (of_kind(tarfile.FIFOTYPE), FIRST, "a fifo"),
    "T5 sparse": (of_kind(tarfile.GNUTYPE_SPARSE), FIRST, "a sparse file"),
    "T5 a long name of GNU": (of_kind(tarfile.GNUTYPE_LONGNAME), FIRST, "a long name (GNU)"),
    "T6 a pickle": (with_member("00000010.pkl", b"cos\nsystem\n(S'x'\ntR."), None, "00000010.pkl"),
    "T6 a module": (with_member("00000010.pyd", b"import os"), None, "00000010.pyd"),
    "T6 objects": (array(npy("|O", SHAPE), b"\x80\x04N."), FIRST, "stands where"),
    "T6 a header bomb": (array(npy("<f2", (2**40,))), FIRST, "stands where"),
    "T7 NaN": (array(npy_header(SHAPE), NAN), FIRST, "does not match its CRC"),
    "T7 big-endian": (array(npy(">f2", SHAPE), NAN), FIRST, "does not match its CRC"),
    "T7 float32": (array(npy("<f4", SHAPE), NAN * 2), FIRST, "stands where"),
    "T7 a label out of range": (
        lambda t: tar_of([(members_of(t)[0][0], b"7"), *members_of(t)[1:]]),
        FIRST,
        "holds b'7'",
    ),
}


def test_all_kinds_of_the_list_are_there() -> None:
    assert {name[:2] for name in CASES} == {f"T{i}" for i in range(1, 8)}


@pytest.mark.parametrize("name", CASES)
def test_damage_is_refused_with_shard_sample_and_reason(
    store: LocalStore, manifest: Manifest, name: str
) -> None:
    change, sample, reason = CASES[name]
    path = store.root / manifest.shards[1].tar.key
    sound = path.read_bytes()
    used = LatentSet(manifest, store, "used")
    path.chmod(0o644)
    path.write_bytes(change(sound))
    assert path.read_bytes() != sound
    found = list(damages(manifest, store, "the set"))
    assert {one.shard for one in found} == {1}
    assert found[0].sample == sample
    assert reason in found[0].reason
    if sample is not None:
        assert f"shard 1 ({path}), sample {sample} (class/{sample}.png)" in found[0].text
    for reader in (used, LatentSet(manifest, store, "opened after")):
        assert len(reader.moments([0, 13])) == 2
        with pytest.raises(IntegrityError, match="is damaged"):
            reader.moments([7])
    with pytest.raises(IntegrityError, match="shard 1"):
        used.verify()


def test_t3_a_bit_of_an_index_is_refused(store: LocalStore, manifest: Manifest) -> None:
    for blob, word in ((manifest.index, "index.safe"), (manifest.shards[2].index, "shard 2")):
        path = store.root / blob.key
        sound = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(flipped(len(sound) // 2)(sound))
        (found,) = damages(manifest, store, "the set")
        assert word in found.text
        path.write_bytes(sound)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_t7_values_that_are_not_finite_are_never_written(value: float) -> None:
    moments = np.full(SHAPE, value)
    with pytest.raises(DataError, match="'k' reach"):
        shards.write_shard([Sample("k", 0, False, moments)], first_number=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spec": a_spec((2, 8, 8))}, r"have shape \(4, 8, 8\)"),
        ({"spec": a_spec((4, 4, 4))}, r"have shape \(8, 4, 4\)"),
        ({"mirrored": False}, "the manifest says 14 with 1"),
        ({"classes": ("a", "b")}, "label outside 0 to 1"),
    ],
)
def test_t8_manifests_of_other_latents_are_refused(
    store: LocalStore, manifest: Manifest, changes: dict[str, object], message: str
) -> None:
    from dataclasses import replace

    record = seal(store, replace(manifest, **changes))  # type: ignore[arg-type]
    with pytest.raises(IntegrityError, match=message):
        open_manifest(record, store)


@pytest.mark.parametrize(
    "where", ["pipe:cat /etc/passwd", "http://169.254.169.254/x", "file:///etc/passwd", "gs://b/x"]
)
def test_t9_other_places_are_refused(store: LocalStore, manifest: Manifest, where: str) -> None:
    with pytest.raises((ConfigError, DataError)):
        open_manifest(f"{where}/latents/{'0' * 64}")
    # A manifest names no places at all, only digests, and a digest is no path.
    body = canonical_bytes(manifest).decode()
    digest = manifest.shards[0].tar.sha256
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        manifest_from_bytes(body.replace(digest, where).encode(), "m")
    with pytest.raises(ConfigError, match="unknown setting 'url'"):
        manifest_from_bytes(body.replace('"count"', '"url"', 1).encode(), "m")


@pytest.mark.parametrize(
    "sha256", ["../" * 21 + "x", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n"]
)
def test_t9_a_digest_is_no_path(sha256: str) -> None:
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        Blob(sha256=sha256, size_bytes=1)


@pytest.mark.parametrize("shard_images", [1, 3, 14, 100])
@pytest.mark.parametrize("world", [1, 2, 7, 16])
def test_t10_few_shards_and_many_ranks_read_the_same(
    store: LocalStore, shard_images: int, world: int
) -> None:
    samples = [a_sample(i) for i in range(14)]
    files = stored_set(store, samples, shard_images, classes=("a", "b", "c"))
    data = LatentSet(manifest_from_bytes(files[shards.MANIFEST], "m"), store, "the set")
    size = 112  # shared by any of these worlds
    shares = [
        next(batches(data, batch_size=size, seed=3, rank=rank, world=world))
        for rank in range(world)
    ]
    found = np.concatenate([share.sample_numbers.numpy() for share in shares])
    moments = np.concatenate([share.moments.numpy() for share in shares])
    whole = next(batches(data, batch_size=size, seed=3))
    assert np.array_equal(found, whole.sample_numbers.numpy())
    assert np.array_equal(moments, whole.moments.numpy())
    epoch = len(data.train_numbers)
    assert sorted(found[:epoch]) == data.train_numbers.tolist()
