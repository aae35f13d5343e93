"""Every mode ends as the pixels a viewer shows; the crop is the field's, to the byte."""

import contextlib
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from eqm import pictures


def picture(seed: int, width: int = 12, height: int = 10) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_bomb_is_refused_in_our_words_alone() -> None:
    data = io.BytesIO()
    Image.new("1", (10_000, 9_900)).save(data, "PNG")
    program = (
        "import sys; from eqm.pictures import decode_picture\n"
        "try: decode_picture(sys.stdin.buffer.read())\n"
        "except ValueError as error: print(error)"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], input=data.getvalue(), capture_output=True, check=True
    )
    assert told.stdout == b"10000 x 9900 px is a decompression bomb\n"
    assert told.stderr == b""


# -- modes --------------------------------------------------------------------------------------


def read_one(
    folder: Path, save: Image.Image, name: str, channels: int, **how: object
) -> np.ndarray:
    """Pixels (C, H, W) of a picture that went through a file."""
    save.save(folder / name, **how)
    picture = pictures.in_mode(pictures.decode_picture((folder / name).read_bytes()), channels)
    return pictures.to_tensor(picture).numpy().astype(int)


@pytest.mark.parametrize("channels", [1, 3])
def test_gray_and_colour_files(tmp_path: Path, channels: int) -> None:
    colour = picture(5)
    found = read_one(tmp_path, colour, "rgb.png", channels)
    mode = "L" if channels == 1 else "RGB"
    assert np.array_equal(found, pictures.to_tensor(colour.convert(mode)).numpy())
    gray = read_one(tmp_path, colour.convert("L"), "l.png", channels)
    assert np.array_equal(gray[0], np.asarray(colour.convert("L")))
    assert read_one(tmp_path, colour.convert("1"), "bits.png", channels).max() == 255


def test_palettes_and_other_formats(tmp_path: Path) -> None:
    colour = picture(5).quantize(16)
    expected = pictures.to_tensor(colour.convert("RGB")).numpy()
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


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_rotation_tags_are_followed_where_that_is_asked_for(orientation: int, kind: str) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    stream = io.BytesIO()
    picture(5, 16, 8).save(stream, kind, exif=tags)
    ignored = pictures.decode_picture(stream.getvalue())
    found = pictures.decode_picture(stream.getvalue(), exif_rotation=True)
    assert ignored.size == (16, 8)
    assert found.size == ((8, 16) if orientation in (5, 6, 7, 8) else (16, 8))
    upright = ImageOps.exif_transpose(ignored)
    assert np.array_equal(np.asarray(found), np.asarray(upright))


def sixteen_bits(colour: int, pixels: list[list[int]], *more: tuple[bytes, bytes]) -> np.ndarray:
    """Values (W, 3) of a PNG of one row with 16 bits a value, which Pillow reads and cannot write.

    ``colour``: 0 gray, 2 RGB, 4 gray and alpha, 6 RGB and alpha.
    """
    header = struct.pack(">IIBBBBB", len(pixels), 1, 16, colour, 0, 0, 0)
    row = zlib.compress(b"\0" + np.array(pixels, dtype=">u2").tobytes())
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in ((b"IHDR", header), *more, (b"IDAT", row), (b"IEND", b""))
    )
    return np.asarray(pictures.in_mode(pictures.decode_picture(data), 3))[0]


def test_sixteen_bits_of_a_colour_lose_the_lower_byte() -> None:
    assert sixteen_bits(2, [[0x00FF, 0x0100, 0xFFFF]]).tolist() == [[0, 1, 255]]


def test_sixteen_bits_that_are_transparent_are_laid_on_white() -> None:
    clear = (b"tRNS", struct.pack(">H", 0x1234))
    found = sixteen_bits(0, [[0x8000], [0x1234], [0x1235]], clear)
    assert found[:, 0].tolist() == [128, 255, 18]
    assert sixteen_bits(4, [[0x8000, 0], [0x8000, 0xFFFF]])[:, 0].tolist() == [255, 128]
    assert sixteen_bits(6, [[0x80] * 3 + [0]])[0].tolist() == [255, 255, 255]


def test_the_bytes_and_not_the_name_say_what_a_file_is(tmp_path: Path) -> None:
    # One image of ILSVRC2012 is a PNG that is named .JPEG.
    picture(5).save(tmp_path / "x.JPEG", "PNG")
    found = pictures.decode_picture((tmp_path / "x.JPEG").read_bytes())
    assert np.array_equal(np.asarray(found), np.asarray(picture(5)))


def test_rotation_tags_are_ignored(tmp_path: Path) -> None:
    plain = picture(5, 16, 8)
    tags = Image.Exif()
    tags[0x0112] = 6
    one = read_one(tmp_path, plain, "turned.jpg", 3, quality=95, exif=tags)
    assert np.array_equal(one, read_one(tmp_path, plain, "plain.jpg", 3, quality=95))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_bytes_are_decoded_or_refused_and_never_crash(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(set(pictures.FORMATS.values()))))
    stream = io.BytesIO()
    picture(3).save(stream, kind)
    damaged = bytearray(stream.getvalue())
    for at in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=6)):
        damaged[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(*pictures.UNDECODABLE):
        pictures.in_mode(pictures.decode_picture(bytes(damaged)), 3)


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
@example(32, 40, 16)  # exactly twice as large: halved, and not scaled down
@example(64, 65, 16)
@example(16, 21, 16)
def test_the_crop_is_that_of_adm(width: int, height: int, size: int) -> None:
    found = pictures.to_tensor(pictures.centre_crop(picture(1, width, height), size))
    assert found.shape == (3, size, size)
    expected = adm_center_crop(picture(1, width, height), size).transpose(2, 0, 1)
    assert np.array_equal(found.numpy(), expected)


# -- images that are none of the data's ---------------------------------------------------------


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (32, 3), (600, 3)])
def test_photographs_are_always_the_same_and_never_twice(size: int, channels: int) -> None:
    count = 40 if size < 100 else 3
    one = pictures.sample_photographs(size, channels, count)
    assert one.shape == (count, channels, size, size)
    assert one.dtype == torch.uint8
    assert torch.equal(one, pictures.sample_photographs(size, channels, count))
    assert len({bytes(image.numpy().tobytes()) for image in one}) == count
    assert one.float().flatten(1).std(dim=1).median() > 10


def test_constants_span_black_to_white() -> None:
    found = pictures.constant_images(4, 3, 6)
    assert found.shape == (6, 3, 4, 4)
    assert found[:, 0, 0, 0].tolist() == [0, 51, 102, 153, 204, 255]
    assert (found == found[:, :1, :1, :1]).all()


def test_flipped_mirrored_and_shuffled() -> None:
    x = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    assert torch.equal(pictures.flipped(x)[0, 0, 0], x[0, 0, 3])
    assert torch.equal(pictures.mirrored(x)[0, 0, 0], x[0, 0, 0].flip(0))
    moved = pictures.shuffled(x, 0)
    assert not torch.equal(moved, x)
    assert torch.equal(moved, pictures.shuffled(x, 0))
    assert not torch.equal(moved, pictures.shuffled(x, 1))
    assert torch.equal(moved.flatten(2).sort().values, x.flatten(2))
    # One permutation for all images and channels.
    assert torch.equal(moved - moved[:1, :1], x - x[:1, :1])
