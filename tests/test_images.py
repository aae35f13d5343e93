"""Images: every mode ends as the pixels a viewer shows, every broken file is told by name."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from eqm import images
from eqm.config import SourceConfig, replace
from eqm.errors import ConfigError, DataError
from eqm.images import ImageSource, checked_source, open_source
from eqm.records import Ref

DIGITS = SourceConfig()
FOLDER = SourceConfig(kind="folder", image_size_px=8, channels=3, held_out_fraction=0.25)


def picture(seed: int, width: int = 12, height: int = 10) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 12) -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            picture(100 * label + i).save(root / name / f"{i:03d}.png")
    return root


def ref_of(source: ImageSource) -> Ref:
    return Ref(stage="source", digest=source.digest, content=source.digest)


# -- digits -------------------------------------------------------------------------------------


def test_digits_are_all_there_and_mixed() -> None:
    source = open_source(DIGITS, None)
    assert len(source.entries) == 1797
    assert len(source.numbers(held_out=True)) + len(source.numbers(held_out=False)) == 1797
    assert 300 < len(source.numbers(held_out=True)) < 420
    first = [entry.label for entry in source.entries[:200]]
    assert min(np.bincount(first, minlength=10)) >= 8
    assert len({entry.key for entry in source.entries}) == 1797


def test_digits_are_what_scikit_learn_shows() -> None:
    from sklearn.datasets import load_digits

    source = open_source(replace(DIGITS, image_size_px=8), None)
    for i in (0, 700, 1796):
        number = int(source.entries[i].key.removeprefix("digits/"))
        expected = np.round(load_digits().images[number] * 255 / 16)
        assert torch.equal(source.read(i)[0], torch.from_numpy(expected).to(torch.uint8))
        assert source.entries[i].label == load_digits().target[number]


def test_digits_have_the_size_and_channels_asked_for() -> None:
    pixels = open_source(replace(DIGITS, image_size_px=20, channels=3), None).read(5)
    assert pixels.shape == (3, 20, 20)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels[0], pixels[2])


def test_the_listing_of_digits_never_changes() -> None:
    # A change here changes the address of everything that was ever sealed of the digits.
    found = open_source(DIGITS, None)
    assert found.digest == "af8f9549fe23cd3daddf8f8073dcc74ce161a26e25646d66f4f2dd285ed638be"
    assert found.entries[0].key == "digits/00847"


# -- the split ----------------------------------------------------------------------------------


@given(st.text(min_size=1, max_size=30), st.floats(0, 0.99), st.integers(0, 2**63 - 1))
def test_a_key_that_is_held_out_stays_so_as_the_share_grows(
    key: str, fraction: float, seed: int
) -> None:
    if images.held_out(key, fraction, seed):
        assert images.held_out(key, (1 + fraction) / 2, seed)
    assert not images.held_out(key, 0.0, seed)


def test_the_split_has_the_share_asked_for_and_depends_on_the_seed() -> None:
    keys = [f"k/{i}" for i in range(4000)]
    one, two = ([images.held_out(key, 0.3, seed) for key in keys] for seed in (0, 1))
    assert abs(sum(one) / 4000 - 0.3) < 0.03
    assert 0.3 < np.mean(np.array(one) == np.array(two)) < 0.7


def test_a_new_image_moves_no_other_to_the_other_side(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    before = {entry.key: entry for entry in open_source(FOLDER, str(root)).entries}
    picture(999).save(root / "cat" / "new.png")
    after = {entry.key: entry for entry in open_source(FOLDER, str(root)).entries}
    assert {key: after[key] for key in before} == before
    assert after.keys() - before.keys() == {"cat/new.png"}


# -- the listing --------------------------------------------------------------------------------


def test_the_digest_is_of_the_images_and_not_of_the_place(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    one = open_source(FOLDER, str(root))
    shutil.copytree(root, tmp_path / "elsewhere" / "copy")
    assert open_source(FOLDER, str(tmp_path / "elsewhere" / "copy")).digest == one.digest
    picture(500).save(root / "cat" / "000.png")
    assert open_source(FOLDER, str(root)).digest != one.digest


def test_keys_are_paths_below_the_root_at_any_depth(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    (root / "dog" / "a" / "b").mkdir(parents=True)
    picture(7).save(root / "dog" / "a" / "b" / "deep.JPEG")
    (root / "dog" / "notes.txt").write_text("no image")
    (root / "dog" / "._x.png").write_bytes(b"what some systems leave behind")
    (root / ".hidden").mkdir()
    source = open_source(FOLDER, str(root))
    found = {entry.key: entry.label for entry in source.entries}
    assert found["dog/a/b/deep.JPEG"] == 1
    assert len(found) == 25
    assert source.classes == ("cat", "dog")


def test_a_job_refuses_images_that_changed(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    ref = ref_of(open_source(FOLDER, str(root)))
    assert checked_source(FOLDER, str(root), ref).digest == ref.digest
    picture(77).save(root / "dog" / "003.png")
    with pytest.raises(DataError, match="the images changed since this run was configured"):
        checked_source(FOLDER, str(root), ref)


def test_a_job_finds_skipped_images_again(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    (root / "cat" / "bad.png").write_bytes(b"x")
    config = replace(FOLDER, on_corrupt="skip")
    source = open_source(config, str(root))
    again = checked_source(config, str(root), ref_of(source))
    assert again.skipped == source.skipped == ("cat/bad.png",)
    assert again.digest == source.digest


def test_an_image_that_changes_while_it_is_used_is_refused(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    source = open_source(FOLDER, str(root))
    picture(77).save(root / source.entries[4].key)
    with pytest.raises(DataError, match="changed while it was in use"):
        source.read(4)
    (root / source.entries[5].key).unlink()
    with pytest.raises(DataError, match="cannot be read"):
        source.read(5)


def test_batches_come_in_the_order_asked_for(tmp_path: Path) -> None:
    source = open_source(FOLDER, str(make_folder(tmp_path / "data")))
    wanted = [[3, 1, 4], [], [1, 5], [9]]
    found = list(source.read_many(numbers for numbers in wanted if numbers))
    assert [len(batch) for batch in found] == [3, 2, 1]
    assert torch.equal(torch.cat(found), torch.stack([source.read(i) for i in (3, 1, 4, 1, 5, 9)]))


# -- what is refused ----------------------------------------------------------------------------


def corrupt_files(folder: Path) -> set[str]:
    """Write files that cannot be decoded; returns their names."""
    good = folder / "000.png"
    png = good.read_bytes()
    picture(1, 64, 64).save(folder / "whole.jpg")
    jpeg = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    bomb = Image.new("1", (20_000, 20_000))
    bomb.save(folder / "bomb.png")
    Image.new("L", (4000, 2)).save(folder / "narrow.png")
    picture(2).save(folder / "another-format.png", "GIF")
    broken = {
        "empty.png": b"",
        "cut.png": png[: len(png) // 2],
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "text.jpg": b"this is not an image",
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\nshowpage\n",
        "flipped.png": png[:60] + bytes([png[60] ^ 255]) + png[61:],
    }
    for name, data in broken.items():
        (folder / name).write_bytes(data)
    return {*broken, "bomb.png", "narrow.png", "another-format.png"}


def test_corrupt_images_are_counted_and_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    names = corrupt_files(root / "cat")
    with pytest.raises(DataError, match=f"^{len(names)} of {24 + len(names)} images") as refused:
        open_source(FOLDER, str(root))
    for name in names:
        assert f"cat/{name} (" in str(refused.value)
    assert "another-format.png (it is none of BMP, JPEG, PNG, WEBP" in str(refused.value)
    assert "0x" not in str(refused.value)  # what is said of equal bytes is equal
    assert "source.on_corrupt to 'skip'" in str(refused.value)


def test_corrupt_images_are_skipped_where_that_is_asked_for(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    clean = open_source(FOLDER, str(root))
    names = corrupt_files(root / "cat")
    source = open_source(replace(FOLDER, on_corrupt="skip"), str(root))
    assert source.skipped == tuple(sorted(f"cat/{name}" for name in names))
    assert source.entries == clean.entries
    assert source.digest != clean.digest  # the manifest names them


def test_many_corrupt_images_are_named_up_to_ten(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    for i in range(14):
        (root / "dog" / f"bad{i:02d}.png").write_bytes(b"?")
    with pytest.raises(DataError, match=r"14 of 38 images .*bad09.*; and 4 more") as refused:
        open_source(FOLDER, str(root))
    assert "bad10" not in str(refused.value)


def test_a_class_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    (root / "emu").mkdir()
    (root / "emu" / "a.png").write_bytes(b"?")
    with pytest.raises(DataError, match=r"class 'emu' has no image .*1 image skipped"):
        open_source(replace(FOLDER, on_corrupt="skip"), str(root))


def test_folders_that_are_no_source_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="source_uri is missing"):
        open_source(FOLDER, None)
    for uri in ("http://169.254.169.254/", "file:///etc", "pipe:cat x", "S3://b/x", "gs://b/x"):
        with pytest.raises(ConfigError, match="a folder on this machine"):
            open_source(FOLDER, uri)
    with pytest.raises(DataError, match="does not exist"):
        open_source(FOLDER, str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is not a folder"):
        open_source(FOLDER, str(tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is empty"):
        open_source(FOLDER, str(tmp_path / "empty"))
    root = make_folder(tmp_path / "data")
    (root / "emu").mkdir()
    with pytest.raises(DataError, match=r"emu holds no image \(.png, "):
        open_source(FOLDER, str(root))
    picture(1).save(root / "loose.png")
    with pytest.raises(DataError, match=r"loose.png lies in .* itself, in no class: put"):
        open_source(FOLDER, str(root))


def test_pictures_of_kinds_that_are_not_read_are_told(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    picture(1).save(root / "cat" / "scan.tiff")
    with pytest.raises(DataError, match=r"1 of 25 images .*cat/scan.tiff \(it is none of BMP"):
        open_source(FOLDER, str(root))
    source = open_source(replace(FOLDER, on_corrupt="skip"), str(root))
    assert (len(source.entries), source.skipped) == (24, ("cat/scan.tiff",))


@pytest.mark.parametrize(
    "suffix", ["tif", "tiff", "TIF", "gif", "avif", "heic", "heif", "jp2", "jfif"]
)
def test_no_suffix_of_a_picture_is_passed_over(tmp_path: Path, suffix: str) -> None:
    root = make_folder(tmp_path / "data", each=2)
    (root / "cat" / f"x.{suffix}").write_bytes(b"none")
    with pytest.raises(DataError, match=rf"1 of 5 images .*cat/x.{suffix}"):
        open_source(FOLDER, str(root))


def test_splits_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    one = make_folder(tmp_path / "one", ("cat",), each=1)
    with pytest.raises(DataError, match="1 of 1 images are left for training"):
        open_source(replace(FOLDER, held_out_fraction=0.0), str(one))
    few = make_folder(tmp_path / "few", ("cat",), each=3)
    seed = next(
        s
        for s in range(1000)
        if not any(images.held_out(f"cat/{i:03d}.png", 0.25, s) for i in range(3))
    )
    with pytest.raises(DataError, match="none of the 3 images falls on the held-out side"):
        open_source(replace(FOLDER, split_seed=seed), str(few))
    lone = make_folder(tmp_path / "lone", ("cat", "dog"), each=4)
    for i in range(1, 4):
        (lone / "dog" / f"{i:03d}.png").unlink()
    seed = next(s for s in range(1000) if images.held_out("dog/000.png", 0.25, s))
    with pytest.raises(DataError, match="all images of class 'dog' are held out"):
        open_source(replace(FOLDER, split_seed=seed), str(lone))


@pytest.mark.parametrize("name", [b"new\nline.png", b"back\\slash.png", b"latin\xe9.png"])
def test_names_that_an_archive_cannot_hold_are_refused(tmp_path: Path, name: bytes) -> None:
    root = make_folder(tmp_path / "data")
    shutil.copy(root / "cat" / "000.png", os.fsencode(root / "cat") + b"/" + name)
    with pytest.raises(DataError, match="a name with characters"):
        open_source(FOLDER, str(root))


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    deep = root / "cat" / Path(*["d" * 200] * 5)
    deep.mkdir(parents=True)
    picture(3).save(deep / "a.png")
    with pytest.raises(DataError, match=r"a name of 10.. bytes"):
        open_source(FOLDER, str(root))


def test_names_in_any_script_are_fine(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", ("Katze ä", "犬"))
    assert open_source(FOLDER, str(root)).classes == ("Katze ä", "犬")


def test_links_are_followed_to_files_and_not_to_folders(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    (root / "cat" / "link.png").symlink_to(root / "dog" / "000.png")
    assert len(open_source(FOLDER, str(root)).entries) == 25
    (root / "cat" / "below").symlink_to(root)  # would never end
    with pytest.raises(DataError, match="a link to a folder"):
        open_source(FOLDER, str(root))


def test_long_text_in_a_png_is_corrupt_and_not_memory(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("bomb", "x" * 70_000_000, zip=True)
    root = make_folder(tmp_path / "data")
    picture(2).save(root / "cat" / "text.png", pnginfo=text)
    with pytest.raises(DataError, match=r"1 of 25 images cannot be decoded: cat/text.png"):
        open_source(FOLDER, str(root))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exif_rotation": True}, "source.exif_rotation is True; .* they have no EXIF"),
        ({"image_column": "img"}, "source.image_column is 'img'; .* source.kind 'parquet'"),
        ({"kind": "folder", "label_column": "cls"}, "source.label_column is 'cls'"),
        ({"kind": "parquet", "image_column": ""}, "source.image_column is ''"),
        ({"kind": "parquet", "image_column": "label"}, "must be another column"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(DIGITS, **changes)
