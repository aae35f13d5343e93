"""Sets of images: files of the true formats are read, broken ones refused by name and place."""

import dataclasses
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from eqm import image_sets
from eqm.config import SET_SPLITS, OODSet
from eqm.errors import ConfigError, DataError, IntegrityError
from eqm.image_sets import check_set, chosen, digest_of, read_set
from eqm.matlab import numeric_arrays

INSIDE = torch.arange(3 * 3 * 16 * 16, dtype=torch.int32).remainder(256).to(torch.uint8)
INSIDE = INSIDE.view(3, 3, 16, 16)


def a_set(kind, root, *, split=None, name="others"):
    """The set at a folder, with the digest of what lies there."""
    sha256 = digest_of(kind, str(root), split)
    return OODSet(name=name, kind=kind, uri=str(root), sha256=sha256, split=split)


def read(kind, root, *, split=None, count=100, inside=INSIDE):
    return read_set(a_set(kind, root, split=split), inside, count)


def pixels(count, seed=0, side=32):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def as_seen(images, size=16, channels=3):
    """What eqm.pictures makes of pixels (N, H, W, 3), without it: halved by averaging."""
    kind = "RGB" if channels == 3 else "L"
    made = [Image.fromarray(x).convert(kind) for x in images]
    arrays = [np.asarray(x.resize((size, size), Image.Resampling.BOX)) for x in made]
    return torch.from_numpy(np.stack(arrays).reshape(len(images), size, size, channels)).permute(
        0, 3, 1, 2
    )


# -- sets that are made -------------------------------------------------------------------------


def test_made_sets_have_the_form_of_the_images_inside():
    for kind in ("photographs", "constant", "flipped", "shuffled", "interpolated"):
        found = read_set(OODSet(name="x", kind=kind), INSIDE, 3)
        assert (found.dtype, found.shape) == (torch.uint8, INSIDE.shape), kind


def test_interpolated_images_lie_halfway_between_pairs():
    found = read_set(OODSet(name="x", kind="interpolated"), INSIDE, 3).int()
    for i in range(3):
        total = INSIDE[i].int() + INSIDE[(i + 1) % 3].int()
        assert ((2 * found[i] - total) % 2 == total % 2).all()
        assert ((2 * found[i] - total).abs() <= 1).all()


@pytest.mark.parametrize("kind", ["flipped", "shuffled", "interpolated", "constant"])
def test_a_set_has_no_more_images_than_are_asked_for(kind):
    inside = torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8)
    assert 2 <= len(read_set(OODSet(name="x", kind=kind), inside, 6)) <= 6


def test_a_set_of_one_image_is_refused():
    with pytest.raises(DataError, match="set 'x' has 1 image: give at least 2"):
        read_set(OODSet(name="x", kind="flipped"), INSIDE[:1], 5)


def test_images_are_spread_over_a_set_and_always_the_same():
    assert chosen(5, 9) == [0, 1, 2, 3, 4]
    some = chosen(10_000, 100)
    # A champion is judged by these: others would move its numbers.
    assert chosen(1000, 5) == [335, 635, 762, 886, 892]
    assert len(set(some)) == 100
    assert some == sorted(some)
    # Class folders are in order: the first hundred would be of one class.
    assert np.histogram(some, bins=4, range=(0, 10_000))[0].min() > 10


# -- CIFAR-10 -----------------------------------------------------------------------------------


def cifar(images, labels):
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([np.array(labels, np.uint8)[:, None], rows], axis=1).tobytes()


def cifar_folder(root: Path, count=4):
    for i in range(1, 6):
        (root / f"data_batch_{i}.bin").write_bytes(cifar(pixels(count, i), range(count)))
    (root / "test_batch.bin").write_bytes(cifar(pixels(count), range(count)))
    return root


def test_cifar10_is_read(tmp_path):
    root = cifar_folder(tmp_path)
    assert torch.equal(read("cifar10", root), as_seen(pixels(4)))
    train = read("cifar10", root, split="train")
    assert torch.equal(train[4:8], as_seen(pixels(4, 2)))
    assert len(train) == 20
    gray = read("cifar10", root, inside=INSIDE[:, :1])
    assert torch.equal(gray, as_seen(pixels(4), channels=1))
    assert len(read("cifar10", root, split="train", count=7)) == 7


def test_cifar10_that_is_broken_is_refused(tmp_path):
    root = cifar_folder(tmp_path)
    whole = (root / "test_batch.bin").read_bytes()
    broken = {
        "cut": (whole[:-1], "has 12291 bytes, no multiple of the 3073"),
        "empty": (b"", "has 0 bytes"),
        # CIFAR-100 has two bytes of label.
        "cifar-100": (bytes(3074 * 4), "has 12296 bytes, no multiple"),
        "label": (cifar(pixels(4), [0, 1, 10, 3]), "at byte 6146: image 2 has label 10"),
    }
    for data, words in broken.values():
        (root / "test_batch.bin").write_bytes(data)
        with pytest.raises(DataError, match=words) as error:
            read("cifar10", root)
        assert "test_batch.bin" in str(error.value)
    (root / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin does not exist: give the folder that"):
        digest_of("cifar10", str(root), "train")


# -- SVHN ---------------------------------------------------------------------------------------


def svhn(root: Path, *, name="test_32x32.mat", compressed=True, **arrays):
    made = {
        "X": pixels(5).transpose(1, 2, 3, 0),
        "y": np.array([[1], [10], [3], [4], [5]], dtype=np.uint8),
        **arrays,
    }
    kept = {k: v for k, v in made.items() if v is not None}
    savemat(root / name, kept, do_compression=compressed)
    return root


@pytest.mark.parametrize("compressed", [True, False])
def test_svhn_is_read(tmp_path, compressed):
    root = svhn(tmp_path, compressed=compressed)
    assert torch.equal(read("svhn", root), as_seen(pixels(5)))
    svhn(root, name="train_32x32.mat", y=np.ones((5, 1)))
    assert len(read("svhn", root, split="train", count=3)) == 3


def test_svhn_of_other_arrays_is_refused(tmp_path):
    objects = np.empty((2,), dtype=object)
    objects[:] = ["a", {"b": 1}]
    broken = {
        "no labels": ({"y": None}, "holds 'X', and no array 'y'"),
        "scalar": ({"X": 3.0}, "X is float64 of shape"),
        "label 0": ({"y": np.array([[1], [2], [0], [4], [5]])}, "y has 0 for image 2"),
        "label 11": ({"y": np.array([[1], [2], [3], [4], [11]])}, "y has 11 for image 4"),
        "label nan": ({"y": np.array([[1], [2], [3], [4], [np.nan]])}, "y has nan for image 4"),
        "fewer labels": ({"y": np.ones((4, 1))}, "X has 5 images, and y 4 labels"),
        "floats": ({"X": np.zeros((32, 32, 3, 5))}, "X is float64 of shape"),
        "order": ({"X": pixels(5)}, r"X is uint8 of shape \(5, 32, 32, 3\)"),
        "cells": ({"y": objects}, "'y' is of class 'cell', and only plain numbers are read"),
        "struct beside": ({"z": {"a": 1}}, "'z' is of class 'struct'"),
        "text beside": ({"z": "text"}, "'z' is of class 'char'"),
    }
    for arrays, words in broken.values():
        with pytest.raises(DataError, match=words) as error:
            read("svhn", svhn(tmp_path, **arrays))
        assert "test_32x32.mat" in str(error.value)


def mat(*elements, version=b"\x00\x01", mark=b"IM"):
    return b"MATLAB 5.0 MAT-file".ljust(124) + version + mark + b"".join(elements)


def element(kind, data, size=None):
    return struct.pack("<II", kind, len(data) if size is None else size) + data


def array(shape, data, *, name=b"X", kind=9, size=None):
    """An array of bytes as MATLAB lays it out; ``size``: what its data claims to have."""
    dims = struct.pack(f"<{len(shape)}i", *shape)
    parts = (
        element(6, struct.pack("<II", kind, 0)),
        element(5, dims) + bytes(-len(dims) % 8),
        element(1, name) + bytes(-len(name) % 8),
        element(2, data, size) + bytes(-len(data) % 8),
    )
    return element(14, b"".join(parts))


def test_files_that_are_no_matlab_5_are_refused(tmp_path):
    good = (svhn(tmp_path) / "test_32x32.mat").read_bytes()
    x = array((32, 32, 3, 2), bytes(6144))
    y = array((2, 1), b"\1\2", name=b"y")
    assert len(read("svhn", written(tmp_path, mat(x, y)))) == 2
    bomb = array((32, 32, 3, 700_000_000), bytes(3072))
    inner = array((32, 32, 3, 1), bytes(3072), size=2**32 - 8)
    huge = struct.pack("<II", 14, 2**32 - 8) + bytes(99)
    packed = zlib.compress(x)
    broken = {
        "7.3": (b"MATLAB 7.3 MAT-file".ljust(512, b"\0") + b"\x89HDF\r\n\x1a\n", r"\(HDF5\)"),
        "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "save its arrays with -v7"),
        "text": (b"<html>404</html>", "does not begin as a MATLAB 5 file"),
        "version": (mat(x, y, version=b"\x00\x02"), "does not begin as"),
        "matlab 4": (bytes(4) + mat(x, y)[4:], "does not begin as"),
        "cut": (good[:-10], "an element of .* bytes is cut short"),
        "cut in a tag": (mat(x, y)[: 128 + len(x) + 5], f"byte {128 + len(x)}: .*within a tag"),
        "type": (mat(element(9, b"12345678")), "byte 128: an element of type 9"),
        "header bomb": (mat(bomb, y), "byte 128: 'X' claims 2150400000000 numbers of 1 bytes"),
        "packed bomb": (mat(element(15, zlib.compress(bomb)), y), "claims 2150400000000 numbers"),
        "inner bomb": (mat(inner, y), "a part of 4294967288 bytes is longer than its array"),
        "tag bomb": (mat(element(15, zlib.compress(huge)), y), "type 14 and 4294967288 bytes"),
        "longer": (mat(element(15, zlib.compress(x + bytes(2**24))), y), "unpacks to other than"),
        "zlib": (mat(element(15, b"nothing that zlib made"), y), "compressed array is damaged"),
        "zlib cut": (mat(element(15, packed[:-9]), y), "a compressed array unpacks to other"),
        "negative": (
            mat(array((-32, -32, 3, 2), bytes(6144)), y),
            "has dimensions .-32, -32, 3, 2",
        ),
        "complex": (mat(array((1, 2), b"12", kind=9 | 0x800), y), "'X' is of class 'complex'"),
        "logical": (mat(array((1, 2), b"12", kind=9 | 0x200), y), "'X' is of class 'logical'"),
        "function": (mat(array((1, 2), b"12", kind=16), y), "'X' is of class 'function'"),
        "twice": (mat(x, x), "an array 'X' is there twice"),
        "no name": (mat(array((1, 2), b"12", name=b""), y), "an array has the name b''"),
        "empty": (mat(), "holds nothing, and no array 'X'"),
        "no parts": (mat(element(14, b"")), "an array without flags"),
    }
    for data, words in broken.values():
        with pytest.raises(DataError, match=words) as error:
            read("svhn", written(tmp_path, data))
        assert "test_32x32.mat" in str(error.value)


@pytest.mark.parametrize("compressed", [True, False])
def test_arrays_are_those_that_scipy_wrote(compressed):
    generator = np.random.default_rng(0)
    arrays = {
        f"a{i}": (100 * generator.normal(size=(2, 3, 4))).astype(kind)
        for i, kind in enumerate(("f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"))
    }
    arrays["small"] = np.array([[7]], dtype=np.uint8)
    buffer = io.BytesIO()
    savemat(buffer, arrays, do_compression=compressed)
    found = numeric_arrays(buffer.getvalue(), "it", names=tuple(arrays))
    for name, values in arrays.items():
        assert found[name].dtype == values.dtype, name
        assert np.array_equal(found[name], values), name
    # Whole doubles that MATLAB stores as bytes, in the order of another kind of machine.
    stored = element(14, b"".join(big_endian_parts()))
    swapped = mat(swap_tag(stored), version=b"\x01\x00", mark=b"MI")
    assert numeric_arrays(swapped, "it", names=("y",))["y"].tolist() == [[1.0], [10.0]]


def big_endian_parts():
    def part(kind, data):
        return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)

    yield part(6, struct.pack(">II", 6, 0))
    yield part(5, struct.pack(">ii", 2, 1))
    yield struct.pack(">I", 1 << 16 | 1) + b"y\0\0\0"
    yield struct.pack(">I", 2 << 16 | 2) + b"\x01\x0a\0\0"


def swap_tag(stored):
    return struct.pack(">II", *struct.unpack("<II", stored[:8])) + stored[8:]


def written(root: Path, data: bytes) -> Path:
    (root / "test_32x32.mat").write_bytes(data)
    return root


@pytest.mark.parametrize("compressed", [True, False])
def test_a_matlab_file_that_is_cut_anywhere_is_refused_in_words(compressed):
    buffer = io.BytesIO()
    savemat(buffer, {"X": pixels(1), "y": np.ones((1, 1))}, do_compression=compressed)
    data = buffer.getvalue()
    for end in [*range(260), *range(260, len(data), 37)]:
        with pytest.raises(DataError, match=r"^a\.mat"):
            numeric_arrays(data[:end], "a.mat", names=("X", "y"))


@pytest.mark.parametrize("compressed", [True, False])
def test_damage_anywhere_is_refused_in_words_or_changes_numbers_alone(compressed):
    """scipy's own reader ends the process at one of these bits."""
    buffer = io.BytesIO()
    arrays = {"X": np.arange(60.0).reshape(3, 4, 5), "y": np.ones((5, 1), np.uint8)}
    savemat(buffer, arrays, do_compression=compressed)
    data = buffer.getvalue()
    for at in range(len(data)):
        for bit in range(8):
            damaged = data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
            try:
                found = numeric_arrays(damaged, "a.mat", names=("X", "y"))
            except DataError as error:
                assert str(error).startswith("a.mat")  # noqa: PT017
            else:
                assert found["X"].size == 60


# -- Describable Textures, folders --------------------------------------------------------------


def jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG")
    return buffer.getvalue()


def dtd(root: Path, lines=("banded/banded_0002.jpg", "dotted/dotted_0001.jpg"), split="test1"):
    for name in ("banded/banded_0002.jpg", "banded/banded_0004.jpg", "dotted/dotted_0001.jpg"):
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(pixels(1, len(name), 40)[0]))
    (root / "labels").mkdir(exist_ok=True)
    (root / "labels" / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines))
    return root


def test_textures_of_a_split_are_read(tmp_path):
    root = dtd(tmp_path)
    assert read("dtd", root).shape == (2, 3, 16, 16)
    dtd(root, ["banded/banded_0002.jpg", "banded/banded_0004.jpg"], "val3")
    assert digest_of("dtd", str(root), "val3") != digest_of("dtd", str(root))
    # An image that is in no list of the split is none of the set.
    before = digest_of("dtd", str(root))
    (root / "images/banded/banded_0004.jpg").write_bytes(b"x")
    assert digest_of("dtd", str(root)) == before


def test_textures_that_are_broken_are_refused(tmp_path):
    good = "banded/banded_0002.jpg"
    broken = {
        "class": (["zigzagged/zigzagged_0001.jpg", good], "line 1: .*does not exist"),
        "name": ([good, "banded/dotted_0001.jpg"], "line 2: .* is no image of a class"),
        "depth": ([good, "banded_0002.jpg"], "line 2: .* is no image of a class"),
        "up": ([good, "../images/banded/banded_0002.jpg"], "line 2: .* leads elsewhere"),
        "absolute": (["/etc/passwd"], "line 1: .* leads elsewhere"),
        "blank": ([good, "", good], "line 2: .* leads elsewhere"),
        "twice": ([good, good], "line 2: .* is there twice"),
        "missing": ([good, "banded/banded_0009.jpg"], "line 2: .*banded_0009.jpg does not exist"),
        "none": ([], "names no image"),
    }
    for lines, words in broken.values():
        with pytest.raises(DataError, match=words) as error:
            read("dtd", dtd(tmp_path, lines))
        assert "test1.txt" in str(error.value)
    (tmp_path / "labels/test1.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"test1\.txt is no text"):
        digest_of("dtd", str(tmp_path))
    with pytest.raises(DataError, match=r"test2\.txt does not exist: give the folder dtd"):
        digest_of("dtd", str(tmp_path), "test2")
    (dtd(tmp_path) / "images" / good).write_bytes(jpeg(pixels(1)[0])[:300])
    with pytest.raises(DataError, match=r"1 of 2 images of .*: images/banded/banded_0002\.jpg \("):
        read("dtd", tmp_path)


def test_a_list_of_textures_is_not_read_whatever_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sets, "LARGEST_SPLIT_BYTES", 20)
    with pytest.raises(DataError, match="has 46 bytes, 20 are the most"):
        digest_of("dtd", str(dtd(tmp_path)))


def test_plain_folders_are_read_at_any_depth(tmp_path):
    for i, name in enumerate(("a.png", "deep/er/b.PNG", "deep/c.bmp")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(1, i)[0]).save(path)
    (tmp_path / "notes.txt").write_text("no image")
    found = read("folder", tmp_path)
    assert torch.equal(found, as_seen(np.concatenate([pixels(1, i) for i in (0, 2, 1)])))
    (tmp_path / "deep/c.bmp").write_bytes(b"BM")
    with pytest.raises(DataError, match=r"1 of 3 images of .* cannot be decoded: deep/c\.bmp \("):
        read("folder", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty/? holds no image"):
        digest_of("folder", str(tmp_path / "empty"))


def test_all_pictures_that_cannot_be_decoded_are_told_at_once(tmp_path):
    for i in range(30):
        Image.fromarray(pixels(1, i)[0]).save(tmp_path / f"{i:02d}.png")
    asked = a_set("folder", tmp_path)
    check_set(asked, 100)
    whole = (tmp_path / "00.png").read_bytes()
    for i in range(12):
        (tmp_path / f"{2 * i:02d}.png").write_bytes(whole[: 60 + i])
    told = (
        r"12 of 30 images of .* cannot be decoded: 00\.png \(.*; 18\.png \(.*\); and 2 more\. Copy"
    )
    with pytest.raises(DataError, match=told):
        digest_of("folder", str(tmp_path))
    broken = dataclasses.replace(asked, sha256=digest_without_decoding(tmp_path))
    for refuse in (lambda: check_set(broken, 100), lambda: read_set(broken, INSIDE, 100)):
        with pytest.raises(DataError, match=told):
            refuse()
    # Those that are not taken are of no concern.
    (tmp_path / "00.png").write_bytes(whole)
    for i in set(range(30)) - set(chosen(30, 5)):
        (tmp_path / f"{i:02d}.png").write_bytes(b"x")
    for i in chosen(30, 5):
        (tmp_path / f"{i:02d}.png").write_bytes(whole)
    some = dataclasses.replace(asked, sha256=digest_without_decoding(tmp_path))
    check_set(some, 5)
    with pytest.raises(DataError, match="25 of 30 images"):
        check_set(some, 30)


def digest_without_decoding(root):
    files = image_sets.open_files(str(root))
    return image_sets.Digested(files, [path.name for path in root.iterdir()]).digest


def test_a_set_that_could_not_be_read_is_refused_before_a_training(tmp_path):
    Image.fromarray(pixels(1)[0]).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="set 'others' has 1 image: give at least 2"):
        check_set(a_set("folder", tmp_path), 100)
    (tmp_path / "cifar").mkdir()
    root = cifar_folder(tmp_path / "cifar")
    asked = a_set("cifar10", root)
    (root / "test_batch.bin").write_bytes(b"x")
    files = image_sets.open_files(str(root))
    sha256 = image_sets.Digested(files, ["test_batch.bin"]).digest
    with pytest.raises(DataError, match="has 1 bytes, no multiple"):
        check_set(dataclasses.replace(asked, sha256=sha256), 100)


# -- digests ------------------------------------------------------------------------------------


def test_files_of_another_digest_are_not_parsed(tmp_path):
    asked = a_set("svhn", svhn(tmp_path))
    written(tmp_path, b"not even MATLAB")
    with pytest.raises(IntegrityError, match=f"set 'others' .*{asked.sha256} is expected"):
        read_set(asked, INSIDE, 5)


def test_a_digest_is_of_names_and_bytes_wherever_they_lie(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first = digest_of("cifar10", str(cifar_folder(tmp_path / "one")))
    assert digest_of("cifar10", str(cifar_folder(tmp_path / "two"))) == first
    (tmp_path / "two/test_batch.bin").write_bytes(cifar(pixels(4, 9), range(4)))
    assert digest_of("cifar10", str(tmp_path / "two")) != first
    # Names decide which images are taken, and in what order.
    plain = tmp_path / "plain"
    plain.mkdir()
    for i in range(2):
        Image.fromarray(pixels(1, i)[0]).save(plain / f"{i}.png")
    before = digest_of("folder", str(plain))
    (plain / "1.png").rename(plain / "2.png")
    assert digest_of("folder", str(plain)) != before


def test_files_that_change_after_their_digest_are_refused(tmp_path):
    files = image_sets.open_files(str(cifar_folder(tmp_path)))
    digested = image_sets.Digested(files, ["test_batch.bin"])
    (tmp_path / "test_batch.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"test_batch\.bin was changed while it was in use"):
        digested.read("test_batch.bin")


def test_a_digest_is_asked_of_what_lies_in_files_alone(tmp_path):
    with pytest.raises(ConfigError, match="kind is 'constant'; it must be one of folder, cifar10"):
        digest_of("constant", str(tmp_path))
    with pytest.raises(ConfigError, match="split is 'dev'; it must be one of test, train"):
        digest_of("cifar10", str(tmp_path), "dev")
    assert set(SET_SPLITS) == {"folder", "cifar10", "svhn", "dtd"}
