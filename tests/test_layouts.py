"""Images are found as they are distributed, here and in S3, with the labels they have."""

import dataclasses
import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
import torch
from PIL import Image

from eqm import images, layouts, rows
from eqm.config import SourceConfig, replace
from eqm.errors import ConfigError, DataError, IntegrityError
from eqm.files import LocalFiles
from eqm.images import ImageSource, checked_source, open_source
from eqm.listing import Named, listing_to_bytes
from eqm.pictures import centre_crop, to_tensor
from eqm.records import Ref
from eqm.s3 import Bucket

FOLDER = SourceConfig(kind="folder", image_size_px=8, channels=3, held_out_fraction=0.25)
IMAGENET = replace(FOLDER, kind="imagenet", held_out_fraction=0.0)
WEBDATASET = replace(FOLDER, kind="webdataset")
PARQUET = replace(FOLDER, kind="parquet")

Place = Callable[[Path], str]


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(seed: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    picture(seed).save(stream, kind)
    return stream.getvalue()


def packed(files: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.services)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Gives the address of a folder: its own, or that of a copy in S3."""
    if request.param == "s3":
        request.getfixturevalue("s3_environment")

    def put(root: Path) -> str:
        if request.param == "local":
            return str(root)
        for path in root.rglob("*"):
            if path.is_file():
                key = f"layouts-{tmp_path.name}/{path.relative_to(root)}"
                Bucket("eqm").client.put_object(Bucket="eqm", Key=key, Body=path.read_bytes())
        return f"s3://eqm/layouts-{tmp_path.name}"

    return put


def labels_of(source: ImageSource) -> dict[str, str]:
    return {entry.key: source.classes[entry.label] for entry in source.entries}


def pixels_of(source: ImageSource) -> dict[str, torch.Tensor]:
    return {entry.key: source.read(i) for i, entry in enumerate(source.entries)}


def expected(seed: int) -> torch.Tensor:
    return to_tensor(centre_crop(picture(seed), 8))


def ref_of(source: ImageSource) -> Ref:
    return Ref(stage="source", digest=source.digest, content=source.digest)


def survives(config: SourceConfig, uri: str, source: ImageSource) -> None:
    """A job finds the same source by hashing, and from the listing, and reads the same."""
    assert checked_source(config, uri, ref_of(source)).entries == source.entries
    again = checked_source(config, uri, ref_of(source), listing=source.listing_bytes())
    assert again.entries == source.entries
    assert (again.digest, again.classes) == (source.digest, source.classes)
    assert torch.equal(again.read(3), source.read(3))


# -- folders ------------------------------------------------------------------------------------


def make_folder(root: Path) -> Path:
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(12):
            (root / name / f"{i:03d}.png").write_bytes(encoded(100 * label + i))
    return root


def test_class_folders(tmp_path: Path, place: Place) -> None:
    root = make_folder(tmp_path / "data")
    uri = place(root)
    source = open_source(FOLDER, uri)
    assert source.digest == open_source(FOLDER, str(root)).digest
    assert labels_of(source)["dog/003.png"] == "dog"
    assert torch.equal(pixels_of(source)["dog/003.png"], expected(103))
    survives(FOLDER, uri, source)


@pytest.mark.services
@pytest.mark.usefixtures("s3_environment")
def test_an_empty_place_in_s3_is_refused() -> None:
    for config, message in (
        (FOLDER, "is empty: it must hold one folder"),
        (IMAGENET, r"ILSVRC2012_img_train.tar does not exist"),
        (WEBDATASET, r"holds no .tar"),
        (PARQUET, r"holds no .parquet"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(config, "s3://eqm/nothing/is/here")


def test_every_kind_refuses_other_addresses() -> None:
    for config in (FOLDER, IMAGENET, WEBDATASET, PARQUET):
        for uri in ("pipe:cat x.tar", "http://localhost/x.tar", "file:///x.parquet"):
            with pytest.raises(ConfigError, match="a folder on this machine or s3://"):
                open_source(config, uri)


# -- ImageNet -----------------------------------------------------------------------------------

SYNSETS = ("n01440764", "n01443537", "n02084071")
DEVKIT_IDS = {1: "n02084071", 2: "n01440764", 3: "n01443537"}
"""In an order of their own, as in the real devkit."""
TRUTH = [2, 3, 1, 1, 2]


def meta_mat(ids: Mapping[int, Any] = DEVKIT_IDS, **fields: Any) -> bytes:
    rows = [(float(number), synset, "a fish, a word") for number, synset in ids.items()]
    rows.append((float(len(ids) + 1), "n00001740", "entity"))  # an inner node, as the real one has
    kinds = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
    stream = io.BytesIO()
    table = np.array(rows, dtype=kinds).reshape(-1, 1)
    scipy.io.savemat(stream, {"synsets": table, **fields})
    return stream.getvalue()


def make_imagenet(root: Path, *, truth: list[int] = TRUTH, meta: bytes | None = None) -> Path:
    root.mkdir()
    # The outer tar is not in the order of the names either.
    inner = {
        f"{SYNSETS[k]}.tar": packed(
            {f"{SYNSETS[k]}_{i}.JPEG": encoded(100 * k + i, "JPEG") for i in range(6)}
        )
        for k in (1, 2, 0)
    }
    (root / "ILSVRC2012_img_train.tar").write_bytes(packed(inner))
    validation = {
        f"ILSVRC2012_val_{i:08d}.JPEG": encoded(1000 + i, "JPEG") for i in (3, 1, 2, 5, 4)
    }
    (root / "ILSVRC2012_img_val.tar").write_bytes(packed(validation))
    devkit = {
        "readme.txt": b"read me",
        "data/meta.mat": meta or meta_mat(),
        "data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{i}\n" for i in truth).encode(),
    }
    archive = packed({f"ILSVRC2012_devkit_t12/{name}": data for name, data in devkit.items()})
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(archive))
    return root


def jpeg(seed: int) -> torch.Tensor:
    with Image.open(io.BytesIO(encoded(seed, "JPEG"))) as opened:
        return to_tensor(centre_crop(opened.convert("RGB"), 8))


def test_imagenet_as_distributed(tmp_path: Path, place: Place) -> None:
    uri = place(make_imagenet(tmp_path / "data"))
    source = open_source(IMAGENET, uri)
    assert source.classes == SYNSETS
    assert len(source.entries) == 18 + 5
    held = {entry.key for entry in source.entries if entry.held_out}
    assert held == {f"val/ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 6)}
    assert source.holds_out
    labels, pixels = labels_of(source), pixels_of(source)
    assert labels["train/n02084071/n02084071_4.JPEG"] == "n02084071"
    assert torch.equal(pixels["train/n02084071/n02084071_4.JPEG"], jpeg(204))
    for i, number in enumerate(TRUTH, start=1):
        key = f"val/ILSVRC2012_val_{i:08d}.JPEG"
        assert labels[key] == DEVKIT_IDS[number]
        assert torch.equal(pixels[key], jpeg(1000 + i))
    # A sorted class index of the devkit's ids would be another labelling: the trap is set.
    wrong = [SYNSETS[number - 1] for number in TRUTH]
    assert wrong != [labels[f"val/ILSVRC2012_val_{i:08d}.JPEG"] for i in range(1, 6)]
    survives(IMAGENET, uri, source)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "data"]
    assert len(list((tmp_path / "data").iterdir())) == 3


def test_the_devkit_may_be_unpacked(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "data")
    one = open_source(IMAGENET, str(root)).digest
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz") as tar:
        tar.extractall(root, filter="data")
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert open_source(IMAGENET, str(root)).digest == one
    (root / "ILSVRC2012_devkit_t12" / "data").rename(root / "data")
    assert open_source(IMAGENET, str(root)).digest == one


def test_validation_images_and_a_share_are_a_contradiction(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "data")
    share = replace(IMAGENET, held_out_fraction=0.3)
    with pytest.raises(DataError, match=r"held_out_fraction is 0.3, and .*img_val.tar holds"):
        open_source(share, str(root))
    (root / "ILSVRC2012_img_val.tar").unlink()
    source = open_source(share, str(root))
    assert len(source.entries) == 18
    assert 0 < len(source.numbers(held_out=True)) < 18
    with pytest.raises(DataError, match=r"img_val.tar does not exist: .*hold out a share"):
        open_source(IMAGENET, str(root))


def test_validation_images_without_their_labels_are_refused(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "data")
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(DataError, match=r"devkit_t12.tar.gz does not exist, nor the folder"):
        open_source(IMAGENET, str(root))


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        (TRUTH[:4], "holds 5 images, and .* the labels of 4"),
        ([*TRUTH, 1], "holds 5 images, and .* the labels of 6"),
        ([2, 3, 1, 1, 9], "says '9', which is no id of data/meta.mat"),
        ([2, 3, 1, 1, 4], "is synset n00001740, but ILSVRC2012_img_train.tar has no n00001740"),
        ([2, 3, 1, 1, -1], "says '-1', which is no id"),
    ],
)
def test_ground_truth_that_does_not_fit_is_refused(
    tmp_path: Path, truth: list[int], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_source(IMAGENET, str(make_imagenet(tmp_path / "data", truth=truth)))


def other_mat(**fields: Any) -> bytes:
    stream = io.BytesIO()
    scipy.io.savemat(stream, fields)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (b"not a file of MATLAB", "is no table of synsets"),
        (meta_mat()[:300], "is no table of synsets"),
        (other_mat(other=1), "is no table of synsets"),
        (other_mat(synsets=np.eye(3)), "is no table of synsets"),
        (other_mat(synsets={"ILSVRC2012_ID": 1, "words": "x"}), "is no table of synsets"),
        (meta_mat({1: "n02084071", 2: "n02084071"}), "'n02084071' with id 2"),
        (meta_mat({1: "fish"}), "'fish' with id 1"),
        (meta_mat({1: 5.0}), "5.0 with id 1"),
        (meta_mat({0: "n02084071"}), "with id 0"),
        (meta_mat({1.5: "n02084071"}), "with id 1.5"),  # type: ignore[dict-item]
        (meta_mat({float("nan"): "n02084071"}), "with id nan"),  # type: ignore[dict-item]
    ],
)
def test_a_table_of_synsets_that_is_none_is_refused(
    tmp_path: Path, meta: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_source(IMAGENET, str(make_imagenet(tmp_path / "data", meta=meta)))


def test_a_table_of_one_synset_is_a_table() -> None:
    stream = io.BytesIO()
    scipy.io.savemat(stream, {"synsets": {"ILSVRC2012_ID": 1, "WNID": "n02084071"}})
    assert layouts.synsets_of(stream.getvalue(), "x") == {1: "n02084071"}


@pytest.mark.parametrize("compressed", [False, True])
def test_a_table_of_synsets_with_one_wrong_bit_is_read_or_refused(compressed: bool):
    """Scipy's reader dies of some of these, and the process with it."""
    whole = scipy.io.loadmat(io.BytesIO(meta_mat()))["synsets"]
    stream = io.BytesIO()
    scipy.io.savemat(stream, {"synsets": whole}, do_compression=compressed)
    good = stream.getvalue()
    assert layouts.synsets_of(good, "x") == {**DEVKIT_IDS, 4: "n00001740"}
    refused = 0
    for at in range(124, len(good)):
        for bit in range(8):
            wrong = bytearray(good)
            wrong[at] ^= 1 << bit
            try:
                layouts.synsets_of(bytes(wrong), "x")
            except DataError:
                refused += 1
    assert refused > len(good)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"n01440764.tar": packed({"n01443537_1.JPEG": b"x"})}, "no image of it"),
        ({"n01440764.tar": packed({"a/n01440764_1.JPEG": b"x"})}, "no image of it"),
        ({"n01440764.tar": packed({"n01440764_1.JPEG": b"x"})[:700]}, "n01440764.tar.*cut"),
        ({"cats.tar": packed({})}, "'cats.tar', no synset"),
        ({"n01440764_1.JPEG": b"x"}, "no synset"),
    ],
)
def test_a_training_tar_that_is_none_is_refused(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    root = make_imagenet(tmp_path / "data")
    (root / "ILSVRC2012_img_train.tar").write_bytes(packed(files))
    with pytest.raises(DataError, match=message):
        open_source(IMAGENET, str(root))


def test_a_training_tar_that_is_cut_between_synsets_is_refused(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "data")
    path = root / "ILSVRC2012_img_train.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1].offset
    os.truncate(path, last)
    with pytest.raises(DataError, match=rf"at byte {last}: the tar is cut: it has no end"):
        open_source(IMAGENET, str(root))


def test_a_devkit_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_imagenet(tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(layouts, "LARGEST_DEVKIT_BYTES", 1000)
        with pytest.raises(DataError, match="more than 1000 bytes unpacked"):
            open_source(IMAGENET, str(root))
    path = root / "ILSVRC2012_devkit_t12.tar.gz"
    for data in (b"no gzip", path.read_bytes()[:-20]):
        path.write_bytes(data)
        with pytest.raises(DataError, match="cannot be unpacked"):
            open_source(IMAGENET, str(root))


# -- WebDataset ---------------------------------------------------------------------------------


def make_tars(root: Path, *, names: tuple[str, ...] = ("0", "1", "2")) -> Path:
    (root / "below").mkdir(parents=True)
    for t, path in enumerate(("shard-0.tar", "below/shard-1.tar")):
        files = {}
        for i in range(12):
            files[f"{i:03d}.jpg" if i % 2 else f"dir.v1/{i:03d}.PNG"] = encoded(
                100 * t + i, "JPEG" if i % 2 else "PNG"
            )
            stem = f"{i:03d}" if i % 2 else f"dir.v1/{i:03d}"
            files[f"{stem}.txt"] = b"a caption"
            label = names[(i + t) % len(names)]
            if i % 3:
                files[f"{stem}.cls"] = f"{label}\n".encode()
            else:
                number = int(label) if label.isdigit() else label
                files[f"{stem}.json"] = json.dumps({"label": number, "more": [1]}).encode()
        files["._000.jpg"] = b"what some systems leave behind"
        (root / path).write_bytes(packed(files))
    return root


def test_tars_of_samples(tmp_path: Path, place: Place) -> None:
    uri = place(make_tars(tmp_path / "data"))
    source = open_source(WEBDATASET, uri)
    assert source.classes == ("0", "1", "2")
    labels, pixels = labels_of(source), pixels_of(source)
    assert len(labels) == 24
    assert labels["shard-0.tar/005.jpg"] == "2"
    assert labels["below/shard-1.tar/dir.v1/006.PNG"] == "1"
    assert torch.equal(pixels["below/shard-1.tar/dir.v1/006.PNG"], expected(106))
    assert torch.equal(pixels["shard-0.tar/005.jpg"], jpeg(5))
    survives(WEBDATASET, uri, source)
    one = open_source(WEBDATASET, f"{uri}/shard-0.tar")
    assert sorted(labels_of(one)) == sorted(key for key in labels if key.startswith("shard-0"))


def test_labels_may_be_names(tmp_path: Path) -> None:
    source = open_source(WEBDATASET, str(make_tars(tmp_path / "d", names=("emu", "cat", "犬 x"))))
    assert source.classes == ("cat", "emu", "犬 x")
    assert labels_of(source)["shard-0.tar/dir.v1/000.PNG"] == "emu"


def tar_source(folder: Path, files: Mapping[str, bytes]) -> ImageSource:
    (folder / "x.tar").write_bytes(packed(files))
    return open_source(replace(WEBDATASET, held_out_fraction=0.0), str(folder / "x.tar"))


def samples(*labels: str) -> dict[str, bytes]:
    files = {}
    for i, label in enumerate(labels):
        files |= {f"{i}.png": encoded(i), f"{i}.cls": label.encode()}
    return files


def test_where_there_are_both_the_cls_is_the_label(tmp_path: Path) -> None:
    files = samples("emu", "cat", "emu", "cat")
    files["0.json"] = b'{"label": "cat"}'
    files["1.json"] = b'{"width": 12}'
    found = labels_of(tar_source(tmp_path, dict(sorted(files.items()))))
    assert [found[f"x.tar/{i}.png"] for i in range(4)] == ["emu", "cat", "emu", "cat"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"b.png": b"x"}, "sample 'b' has no label"),
        ({"b.cls": b"0"}, "sample 'b' has 0 images"),
        ({"b.txt": b"0"}, "sample 'b' has 0 images"),
        ({"b.png": b"x", "b.jpg": b"x", "b.cls": b"0"}, "sample 'b' has 2 images"),
        ({"b.png": b"x", "b.cls": b""}, "sample 'b' has no label"),
        ({"b.png": b"x", "b.cls": b"\xff"}, "sample 'b' has no label"),
        ({"b.png": b"x", "b.cls": b"a\nb"}, "sample 'b' has no label"),
        ({"b.png": b"x", "b.json": b"{"}, "sample 'b' has no label"),
        ({"b.png": b"x", "b.json": b"[1]"}, "sample 'b' has no label"),
        ({"b.png": b"x", "b.json": b'{"label": true}'}, "sample 'b' has no label"),
        ({"b.png": b"x", "b.json": b'{"label": 1.5}'}, "sample 'b' has no label"),
        ({"b.png": b"x", "b.json": b'{"label": null}'}, "sample 'b' has no label"),
        ({"b.png": b"x", "b.json": b"[" * 100_000}, "sample 'b' has no label"),
        ({"b.png": b"x", "b.cls": b"9" * 2**21}, "b.cls' has 2097152 bytes"),
        ({"0.txt": b"again"}, "sample '0' is there twice"),
        ({"0.PNG": b"again"}, "sample '0' is there twice"),
        ({"b.pkl": b"x"}, "'b.pkl' is of a kind that other programs run"),
        ({"b.x.pyd": b"x"}, "other programs run"),
        ({"b.PTH": b"x"}, "other programs run"),
        ({"b.pickle": b"x"}, "other programs run"),
        ({"b.pt": b"x"}, "other programs run"),
    ],
)
def test_samples_that_are_not_whole_are_refused(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    assert len(tar_source(tmp_path, samples("0", "0", "1")).entries) == 3
    with pytest.raises(DataError, match=rf"x\.tar: .*{message}"):
        tar_source(tmp_path, {**samples("0", "0", "1"), **files})


def test_images_and_labels_of_one_sample_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample '0' is there twice"):
        tar_source(tmp_path, {**samples("0", "1"), "0.cls.x": b"", "0.json": b"{}"})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("0", "2", "2"), "up to 2, but no image of class 1"),
        (("1", "1", "2"), "no image of class 0"),
        (("0", "0", "99999999999999999999"), "no image of class 1"),
        (("0", "1", "cat"), "labels '0' and 'cat'"),
        (("0", "1", "01"), "labels '0' and '01'"),
        (("-1", "-1", "-1"), "a negative number stands for none"),
        (("a", "b", "c" * 201), "200 characters are the most"),
    ],
)
def test_labels_that_are_no_classes_are_refused(
    tmp_path: Path, labels: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        tar_source(tmp_path, samples(*labels))
    # One tar that was named is named, not the folder that it lies in.
    with pytest.raises(DataError, match=rf"{tmp_path}/x.tar has .*{message}"):
        open_source(WEBDATASET, str(tmp_path / "x.tar"))


def test_a_tar_without_images_is_refused(tmp_path: Path) -> None:
    tarfile.open(tmp_path / "x.tar", "w").close()
    with pytest.raises(DataError, match=r"x.tar holds no image: give another source_uri"):
        open_source(WEBDATASET, str(tmp_path / "x.tar"))


def test_ten_classes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    source = tar_source(tmp_path, samples(*(str(11 - i) for i in range(12))))
    assert source.classes == tuple(str(i) for i in range(12))
    assert labels_of(source)["x.tar/1.png"] == "10"


def test_links_in_tars_are_refused_by_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match=r"x.tar at byte 0: 'a.png' is a symbolic link"):
        open_source(WEBDATASET, str(tmp_path))


# -- parquet ------------------------------------------------------------------------------------


def make_parquet(root: Path, *, image: str = "image", label: str = "label") -> Path:
    """Two files as Hugging Face writes them, in groups of 4 rows."""
    (root / "data").mkdir(parents=True)
    for t in range(2):
        pictures = [{"bytes": encoded(100 * t + i), "path": None} for i in range(10)]
        columns = {image: pictures, label: [(i + t) % 3 for i in range(10)], "more": ["x"] * 10}
        path = root / "data" / f"train-{t:05d}-of-00002.parquet"
        pq.write_table(pa.table(columns), path, row_group_size=4)
    return root


def test_parquet_as_hugging_face_writes_it(tmp_path: Path, place: Place) -> None:
    uri = place(make_parquet(tmp_path / "data"))
    source = open_source(PARQUET, uri)
    assert source.classes == ("0", "1", "2")
    labels, pixels = labels_of(source), pixels_of(source)
    assert len(labels) == 20
    for t in range(2):
        for i in range(10):
            key = f"data/train-{t:05d}-of-00002.parquet/{i}"
            assert labels[key] == str((i + t) % 3)
            assert torch.equal(pixels[key], expected(100 * t + i))
    survives(PARQUET, uri, source)
    one = open_source(PARQUET, f"{uri}/data/train-00001-of-00002.parquet")
    assert {entry.key for entry in one.entries} == {
        f"train-00001-of-00002.parquet/{i}" for i in range(10)
    }


def parquet_source(folder: Path, columns: Mapping[str, Any], **how: Any) -> ImageSource:
    config = replace(PARQUET, held_out_fraction=0.0, **how)
    pq.write_table(pa.table(dict(columns)), folder / "x.parquet")
    return open_source(config, str(folder / "x.parquet"))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_columns_of_bytes_and_of_names(tmp_path: Path, kind: Any) -> None:
    columns = {
        "jpg": pa.array([encoded(i) for i in range(4)], kind),
        "class": pa.array(["b", "a", "b", "a"]).dictionary_encode(),
    }
    source = parquet_source(tmp_path, columns, image_column="jpg", label_column="class")
    assert source.classes == ("a", "b")
    assert labels_of(source)["x.parquet/2"] == "b"
    assert torch.equal(pixels_of(source)["x.parquet/2"], expected(2))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"img": [b"x"], "label": [0]}, r"has the columns img, label, and not 'image' once: set"),
        ({"image": [b"x"], "cls": [0]}, r"not 'label' once: set source.label_column"),
        ({"image": ["text"], "label": [0]}, "column 'image' is string; it must be binary"),
        ({"image": [{"path": "x"}], "label": [0]}, "it must be binary, or a struct"),
        ({"image": [b"x"], "label": [0.5]}, "column 'label' is double; it must be of integers"),
        ({"image": [b"x"], "label": [True]}, "it must be of integers"),
        ({"image": [b"x"], "label": pa.array([None], pa.int64())}, "row 0 has the label None"),
        ({"image": [b"x"], "label": [-1]}, "row 0 has the label -1, which is none"),
        ({"image": [b"x"], "label": [""]}, "row 0 has the label ''"),
        ({"image": pa.array([None], pa.binary()), "label": [0]}, r"x.parquet/0 \(it is empty"),
    ],
)
def test_rows_that_are_no_images_are_refused(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        parquet_source(tmp_path, columns)


def test_parquet_files_that_are_none_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_parquet(tmp_path / "data")
    path = root / "data" / "train-00000-of-00002.parquet"
    whole = path.read_bytes()
    for data in (b"", b"no parquet", whole[:-10], whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(DataError, match="is no parquet file"):
            open_source(PARQUET, str(root))
    path.write_bytes(whole[:4] + bytes(400) + whole[404:])
    with pytest.raises(DataError, match="is damaged in row group 0"):
        open_source(PARQUET, str(root))
    path.write_bytes(whole)
    monkeypatch.setattr(rows, "LARGEST_GROUP_BYTES", 100)
    with pytest.raises(DataError, match="write it with fewer rows in a group"):
        open_source(PARQUET, str(root))


def test_a_label_that_no_longer_matches_the_checksum_of_its_page_is_refused(
    tmp_path: Path,
) -> None:
    table = pa.table({"image": [encoded(i) for i in range(4)], "label": ["ant", "bee"] * 2})
    path = tmp_path / "x.parquet"
    pq.write_table(
        table, path, write_page_checksum=True, compression="none", use_dictionary=False,
        write_statistics=False,
    )  # fmt: skip
    asked = replace(PARQUET, held_out_fraction=0.0)
    assert open_source(asked, str(path)).classes == ("ant", "bee")
    path.write_bytes(path.read_bytes().replace(b"bee", b"ben"))
    with pytest.raises(DataError, match=r"x\.parquet.*is damaged"):
        open_source(asked, str(path))


def test_row_groups_are_read_when_wanted_and_few_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_parquet(tmp_path / "data")
    found = rows.Rows(LocalFiles(root / "data"), "image", "label")
    read: list[int] = []
    plain = rows.Rows._group

    def counted(self: rows.Rows, path: str, opened: Any, group: int, columns: list[str]) -> Any:
        read.append(group)
        return plain(self, path, opened, group, columns)

    monkeypatch.setattr(rows.Rows, "_group", counted)
    name = "train-00000-of-00002.parquet"
    assert [found.one(name, row) for row in (9, 8, 0, 3)] == [encoded(i) for i in (9, 8, 0, 3)]
    assert read == [2, 0]
    monkeypatch.setattr(rows, "KEPT_BYTES", 1)
    for row in (5, 0, 5):
        assert found.one(name, row) == encoded(row)
    assert read == [2, 0, 1, 0, 1]
    for row in (10, -1):
        with pytest.raises(DataError, match="has no row"):
            found.one(name, row)


# -- all kinds ----------------------------------------------------------------------------------

KINDS = {
    "folder": (FOLDER, make_folder),
    "imagenet": (IMAGENET, make_imagenet),
    "webdataset": (WEBDATASET, make_tars),
    "parquet": (PARQUET, make_parquet),
}


@pytest.mark.parametrize("kind", KINDS)
def test_reading_goes_on_after_a_fork(tmp_path: Path, kind: str) -> None:
    config, make = KINDS[kind]
    source = open_source(config, str(make(tmp_path / "data")))
    before = [source.read(i) for i in (0, 5)]
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            same = all(torch.equal(source.read(i), x) for i, x in zip((0, 5), before, strict=True))
            os.write(write, str(same).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 10) == b"True"


@pytest.mark.parametrize("kind", KINDS)
def test_what_changed_since_the_listing_is_refused_when_it_is_read(
    tmp_path: Path, kind: str
) -> None:
    config, make = KINDS[kind]
    root = make(tmp_path / "data")
    source = open_source(config, str(root))
    data = source.listing_bytes()
    # Every file has one bit of its images changed, and no size.
    for path in root.rglob("*"):
        if path.is_file() and path.suffix != ".gz":
            content = bytearray(path.read_bytes())
            content[content.find(b"\xff\xda" if kind == "imagenet" else b"IDAT") + 20] ^= 1
            path.write_bytes(bytes(content))
    again = checked_source(config, str(root), ref_of(source), listing=data)
    assert again.entries == source.entries
    said = [complaint(again, i) for i in range(len(again.entries))]
    assert any(said)
    assert all("changed while it was in use" in x or "is damaged" in x for x in said if x)
    with pytest.raises(DataError):
        checked_source(config, str(root), ref_of(source))


def complaint(source: ImageSource, i: int) -> str:
    try:
        source.read(i)
    except DataError as error:
        return str(error)
    return ""


# -- what scans remember ------------------------------------------------------------------------


def settle(root: Path, when: int = 10**18) -> None:
    """Make files look as if they had last been changed long ago."""
    for path in root.rglob("*"):
        if path.is_file():
            os.utime(path, ns=(when, when))


def flip(root: Path, name: str) -> None:
    """Change a bit of an image in a file, and neither its size nor its time."""
    path, marks = root / name, (b"IDAT", b"\xff\xda")
    before, data = path.stat(), bytearray(path.read_bytes())
    data[max(data.find(mark) for mark in marks) + 20] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


FIRST = {
    "folder": "cat/000.png",
    "imagenet": "ILSVRC2012_img_val.tar",
    "webdataset": "shard-0.tar",
    "parquet": "data/train-00000-of-00002.parquet",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_did_not_change_is_not_read_again(tmp_path: Path, kind: str) -> None:
    config, make = KINDS[kind]
    config = replace(config, on_corrupt="skip")
    root, memory = make(tmp_path / "data"), tmp_path / "m"
    settle(root)
    one = open_source(config, str(root), memory=memory)
    assert one.digest == open_source(config, str(root)).digest
    # A change that no listing shows tells who reads the files.
    flip(root, FIRST[kind])
    again = open_source(config, str(root), memory=memory)
    assert (again.digest, again.entries) == (one.digest, one.entries)
    assert open_source(config, str(root)).digest != one.digest
    os.utime(root / FIRST[kind], ns=(10**18, 10**18 + 1))
    assert open_source(config, str(root), memory=memory).digest != one.digest


@pytest.mark.parametrize("kind", KINDS)
def test_what_changed_a_moment_ago_is_not_remembered(tmp_path: Path, kind: str) -> None:
    config, make = KINDS[kind]
    config = replace(config, on_corrupt="skip")
    root, memory = make(tmp_path / "data"), tmp_path / "m"
    one = open_source(config, str(root), memory=memory)
    flip(root, FIRST[kind])
    assert open_source(config, str(root), memory=memory).digest != one.digest


def test_a_damaged_memory_is_as_good_as_none(tmp_path: Path) -> None:
    root, memory = make_folder(tmp_path / "data"), tmp_path / "m"
    settle(root)
    one = open_source(FOLDER, str(root), memory=memory)
    kept = {path: path.read_bytes() for path in memory.iterdir()}
    assert len(kept) == 2
    for damage in (lambda x: x[:-1], lambda x: x[:-1] + bytes([x[-1] ^ 1]), lambda _: b""):
        for path, data in kept.items():
            path.write_bytes(damage(data))
        assert open_source(FOLDER, str(root), memory=memory).digest == one.digest
        assert {path: path.read_bytes() for path in memory.iterdir()} == kept


def test_other_settings_do_not_share_a_memory(tmp_path: Path) -> None:
    root, memory = make_folder(tmp_path / "data"), tmp_path / "m"
    settle(root)
    seen = set()
    for changes in ({}, {"channels": 1}, {"exif_rotation": True}):
        open_source(replace(FOLDER, **changes), str(root), memory=memory)
        seen.add(len(list(memory.iterdir())))
    assert seen == {2, 4, 6}
    # The size and the split come after the scan.
    open_source(replace(FOLDER, image_size_px=16, split_seed=1), str(root), memory=memory)
    assert len(list(memory.iterdir())) == 6


def test_another_decoder_or_way_to_look_does_not_share_a_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, memory = make_folder(tmp_path / "data"), tmp_path / "m"
    settle(root)
    open_source(FOLDER, str(root), memory=memory)
    monkeypatch.setattr(images.PIL, "__version__", "0.0")
    open_source(FOLDER, str(root), memory=memory)
    assert len(list(memory.iterdir())) == 4
    monkeypatch.setattr(images, "LOOK", images.LOOK + 1)
    open_source(FOLDER, str(root), memory=memory)
    assert len(list(memory.iterdir())) == 6


def test_other_columns_of_a_parquet_file_do_not_share_a_memory(tmp_path: Path) -> None:
    columns = {
        "image": [encoded(i) for i in range(4)],
        "small": [encoded(10 + i) for i in range(4)],
        "label": [0, 1, 0, 1],
        "kind": ["b", "b", "a", "a"],
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    settle(tmp_path)
    config = replace(PARQUET, held_out_fraction=0.0)
    for changes in ({}, {"image_column": "small"}, {"label_column": "kind"}):
        asked = replace(config, **changes)
        fresh = open_source(asked, str(tmp_path))
        assert open_source(asked, str(tmp_path), memory=tmp_path / "m").digest == fresh.digest


def test_what_was_scanned_before_something_was_refused_is_kept(tmp_path: Path) -> None:
    root, memory = make_tars(tmp_path / "data"), tmp_path / "m"
    whole = (root / "shard-0.tar").read_bytes()
    (root / "shard-0.tar").write_bytes(whole[:3000])
    settle(root)
    with pytest.raises(DataError, match=r"shard-0.tar.*cut"):
        open_source(WEBDATASET, str(root), memory=memory)
    assert len(list(memory.iterdir())) == 1
    (root / "shard-0.tar").write_bytes(whole)
    flip(root, "below/shard-1.tar")
    source = open_source(WEBDATASET, str(root), memory=memory)
    assert len(source.entries) == 24


def test_a_new_image_costs_a_look_at_its_neighbours_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "FILES_A_PART", 4)
    root, memory = make_folder(tmp_path / "data"), tmp_path / "m"
    settle(root)
    open_source(FOLDER, str(root), memory=memory)
    before = set(memory.iterdir())
    assert len(before) > 3
    (root / "cat" / "0055.png").write_bytes(encoded(7))
    settle(root)
    source = open_source(FOLDER, str(root), memory=memory)
    assert len(source.entries) == 25
    assert 1 <= len(set(memory.iterdir()) - before) <= 2


@pytest.mark.services
@pytest.mark.usefixtures("s3_environment")
def test_what_did_not_change_in_s3_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, root = Bucket("eqm"), f"memory-{tmp_path.name}"
    uri, memory = f"s3://eqm/{root}", tmp_path / "m"
    for path in make_tars(tmp_path / "data").rglob("*.tar"):
        bucket.create(f"{root}/{path.name}", path)
    one = open_source(WEBDATASET, uri, memory=memory)
    with monkeypatch.context() as patch:
        patch.delattr(Bucket, "read")
        assert open_source(WEBDATASET, uri, memory=memory).digest == one.digest
    tar = packed(samples("0", "1", "2"))
    bucket.client.put_object(Bucket="eqm", Key=f"{root}/shard-0.tar", Body=tar)
    again = open_source(WEBDATASET, uri, memory=memory)
    assert len(again.entries) == 12 + 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_with_the_listing_looks_at_nothing_when_it_begins(tmp_path: Path, kind: str) -> None:
    config, make = KINDS[kind]
    root = make(tmp_path / "data")
    source = open_source(config, str(root))
    ref, data = ref_of(source), source.listing_bytes()
    for path in [path for path in root.rglob("*") if path.is_file()]:
        path.unlink()
    again = checked_source(config, str(root), ref, listing=data)
    assert again.entries == source.entries
    with pytest.raises(DataError, match="cannot be read"):
        again.read(0)
    other = Ref(stage="source", digest="0" * 64, content="0" * 64)
    with pytest.raises(IntegrityError, match="lists other images"):
        checked_source(config, str(root), other, listing=data)


def test_a_listing_leads_to_no_file_outside_the_source(tmp_path: Path) -> None:
    source = open_source(WEBDATASET, str(make_tars(tmp_path / "data")))
    places = source.entries.places
    assert places is not None
    (tmp_path / "outside").write_bytes(b"secret")
    moved = dataclasses.replace(places, files=tuple("../outside" for _ in places.files))
    listing = dataclasses.replace(source.entries, places=moved)
    data = listing_to_bytes(Named(source.classes, source.skipped, listing))
    again = checked_source(WEBDATASET, str(tmp_path / "data"), ref_of(source), listing=data)
    with pytest.raises(DataError, match="leads elsewhere"):
        again.read(0)
