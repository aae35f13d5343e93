"""Images: every mode ends as the pixels a viewer shows, every broken file is told by name."""

import contextlib
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
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
    with pytest.raises(DataError, match=r"class 'emu' has no image .*1 images are skipped"):
        open_source(replace(FOLDER, on_corrupt="skip"), str(root))


def test_folders_that_are_no_source_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="source_uri is missing"):
        open_source(FOLDER, None)
    for uri in ("s3://bucket/x", "http://169.254.169.254/", "file:///etc"):
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
    with pytest.raises(DataError, match=r"1 images lie in .* itself \(loose.png"):
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


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_bytes_are_decoded_or_refused_and_never_crash(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(set(images.FORMATS.values()))))
    stream = io.BytesIO()
    picture(3).save(stream, kind)
    damaged = bytearray(stream.getvalue())
    for at in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=6)):
        damaged[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(*images.UNDECODABLE):
        images.in_mode(images.decode_picture(bytes(damaged)), 3)


# -- modes --------------------------------------------------------------------------------------


def read_one(
    folder: Path, save: Image.Image, name: str, channels: int, **how: object
) -> np.ndarray:
    """Pixels (C, H, W) of a picture that went through a file."""
    save.save(folder / name, **how)
    picture = images.in_mode(images.decode_picture((folder / name).read_bytes()), channels)
    return images.to_tensor(picture).numpy().astype(int)


@pytest.mark.parametrize("channels", [1, 3])
def test_gray_and_colour_files(tmp_path: Path, channels: int) -> None:
    colour = picture(5)
    found = read_one(tmp_path, colour, "rgb.png", channels)
    mode = "L" if channels == 1 else "RGB"
    assert np.array_equal(found, images.to_tensor(colour.convert(mode)).numpy())
    gray = read_one(tmp_path, colour.convert("L"), "l.png", channels)
    assert np.array_equal(gray[0], np.asarray(colour.convert("L")))
    assert read_one(tmp_path, colour.convert("1"), "bits.png", channels).max() == 255


def test_palettes_and_other_formats(tmp_path: Path) -> None:
    colour = picture(5).quantize(16)
    expected = images.to_tensor(colour.convert("RGB")).numpy()
    assert np.array_equal(read_one(tmp_path, colour, "p.png", 3), expected)
    assert np.array_equal(read_one(tmp_path, picture(5), "x.bmp", 3), read_rgb(picture(5)))
    assert np.array_equal(
        read_one(tmp_path, picture(5), "x.webp", 3, lossless=True), read_rgb(picture(5))
    )


def read_rgb(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).transpose(2, 0, 1)


def test_what_is_transparent_is_laid_on_white(tmp_path: Path) -> None:
    for mode, colour in (("RGBA", (200, 0, 0, 0)), ("LA", (7, 0))):
        found = read_one(tmp_path, Image.new(mode, (4, 4), colour), f"{mode}.png", 3)
        assert (found == 255).all()
    half = read_one(tmp_path, Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "half.png", 1)
    assert (half == 127).all()
    palette = Image.new("RGB", (4, 4), (9, 9, 9)).quantize(2)
    index = int(np.asarray(palette)[0, 0])
    assert (read_one(tmp_path, palette, "p.png", 3, transparency=index) == 255).all()


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    wide = np.array([[0, 257, 300, 32768, 65278, 65535]], dtype=np.uint16)
    found = read_one(tmp_path, Image.fromarray(wide), "16.png", 1)
    assert found[0, 0].tolist() == [0, 1, 1, 128, 254, 255]


def test_cmyk_is_shown_as_colours(tmp_path: Path) -> None:
    solid = Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK")
    found = read_one(tmp_path, solid, "cmyk.jpg", 3, quality=95)
    assert np.abs(found.reshape(3, -1).mean(1) - np.array([200, 30, 60])).max() < 6


def test_rotation_tags_are_ignored(tmp_path: Path) -> None:
    plain = picture(5, 16, 8)
    tags = Image.Exif()
    tags[0x0112] = 6
    one = read_one(tmp_path, plain, "turned.jpg", 3, quality=95, exif=tags)
    assert np.array_equal(one, read_one(tmp_path, plain, "plain.jpg", 3, quality=95))


def test_long_text_in_a_png_is_corrupt_and_not_memory(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("bomb", "x" * 70_000_000, zip=True)
    root = make_folder(tmp_path / "data")
    picture(2).save(root / "cat" / "text.png", pnginfo=text)
    with pytest.raises(DataError, match=r"1 of 25 images cannot be decoded: cat/text.png"):
        open_source(FOLDER, str(root))


# -- the crop -----------------------------------------------------------------------------------


def adm_center_crop(picture: Image.Image, size: int) -> np.ndarray:
    """Transcribed from the description of ADM's preprocessing, array at the end."""
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(x // 2 for x in picture.size), Image.BOX)
    scale = size / min(*picture.size)
    picture = picture.resize(tuple(round(x * scale) for x in picture.size), Image.BICUBIC)
    pixels = np.array(picture)
    y, x = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[y : y + size, x : x + size]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(4, 24))
def test_the_crop_is_that_of_adm(width: int, height: int, size: int) -> None:
    found = images.to_tensor(images.centre_crop(picture(1, width, height), size))
    assert found.shape == (3, size, size)
    expected = adm_center_crop(picture(1, width, height), size).transpose(2, 0, 1)
    assert np.array_equal(found.numpy(), expected)


# -- images that are none of the data's ---------------------------------------------------------


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (32, 3), (600, 3)])
def test_photographs_are_always_the_same_and_never_twice(size: int, channels: int) -> None:
    count = 40 if size < 100 else 3
    one = images.sample_photographs(size, channels, count)
    assert one.shape == (count, channels, size, size)
    assert one.dtype == torch.uint8
    assert torch.equal(one, images.sample_photographs(size, channels, count))
    assert len({bytes(image.numpy().tobytes()) for image in one}) == count
    assert one.float().flatten(1).std(dim=1).median() > 10


def test_constants_span_black_to_white() -> None:
    found = images.constant_images(4, 3, 6)
    assert found.shape == (6, 3, 4, 4)
    assert found[:, 0, 0, 0].tolist() == [0, 51, 102, 153, 204, 255]
    assert (found == found[:, :1, :1, :1]).all()


def test_flipped_mirrored_and_shuffled() -> None:
    x = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    assert torch.equal(images.flipped(x)[0, 0, 0], x[0, 0, 3])
    assert torch.equal(images.mirrored(x)[0, 0, 0], x[0, 0, 0].flip(0))
    moved = images.shuffled(x, 0)
    assert not torch.equal(moved, x)
    assert torch.equal(moved, images.shuffled(x, 0))
    assert not torch.equal(moved, images.shuffled(x, 1))
    assert torch.equal(moved.flatten(2).sort().values, x.flatten(2))
    # One permutation for all images and channels.
    assert torch.equal(moved - moved[:1, :1], x - x[:1, :1])
