"""Bytes of an image -> uint8 pixels (C, H, W); also images that are none of the data's. Pure.

What becomes of the kinds of picture there are, in this order:

* *Format*: PNG, JPEG, WebP or BMP by its bytes, whatever the name says; the first frame.
* *EXIF rotation* is ignored, as in the reference batches of the field, or applied before all else
  where ``exif_rotation`` says so.
* *16 bits*: gray is scaled (rounded v / 257); of colours Pillow keeps the upper byte.
* *Alpha*, a transparent palette entry too, is laid on white.
* *Palettes, bilevel, CMYK* are converted by Pillow; no colour profile is applied. Gray becomes RGB
  by repetition, RGB becomes gray by the luma of ITU-R 601.
* *Size*: ADM's centre crop, halved by box filter while at least twice as large, then bicubic, then
  the centre.

Called by image_sets, images and layouts. The only door to scikit-learn's images.
"""

import gzip
import importlib.util
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from eqm.randomness import permutation

FOREIGN = (".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".jp2", ".jfif")
"""Suffixes of pictures that are seldom of a kind in FORMATS: told, where they lie among images."""
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
"""Suffixes that count as images. The bytes decide which of these formats it is, and no other
decoder is ever asked: Pillow would run Ghostscript on an EPS that is named .png."""

LARGEST_IMAGE_PIXELS = 89_478_485
"""More than these many pixels are taken for a decompression bomb (a quarter GiB in RGB)."""

# Pillow has the same limit and only warns there; what passes it is refused below, in words.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

NARROWEST_IMAGE = 50
"""An image whose sides differ by more than this factor is refused: scaling its shorter side up to
the size that is wanted could fill the memory."""

UNDECODABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise on bytes that are not what they claim to be."""


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what shows the picture upright; nothing for 1 and what EXIF does not know."""

ORIENTATION = 0x0112

# -- pictures -> pixels -------------------------------------------------------------------------


def decode_picture(data: bytes, *, exif_rotation: bool = False) -> Image.Image:
    """Decode the first frame of a PNG, JPEG, WebP or BMP; raises one of UNDECODABLE.

    ``exif_rotation``: turn it upright where its EXIF says that it lies on a side.
    """
    if not data:
        raise ValueError("there are no bytes")
    kinds = sorted(set(FORMATS.values()))
    try:
        picture = Image.open(io.BytesIO(data), formats=kinds)
    except UnidentifiedImageError as error:
        # Pillow's own words name an address in memory.
        listed = ", ".join(kinds)
        raise ValueError(f"it is none of {listed}, or its beginning is damaged") from error
    width, height = picture.size
    if width * height > LARGEST_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} px is a decompression bomb")
    if max(width, height) > NARROWEST_IMAGE * min(width, height):
        raise ValueError(f"{width} x {height} px is too narrow to be cropped to a square")
    picture.load()
    return upright(picture) if exif_rotation else picture


def why_undecodable(error: BaseException) -> str:
    """One line on why a picture cannot be decoded, of one of UNDECODABLE."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.encode(errors="replace").decode()


def upright(picture: Image.Image) -> Image.Image:
    """Turn and mirror a picture as its EXIF orientation says; itself where there is none."""
    turn = TURNS.get(picture.getexif().get(ORIENTATION, 1))
    return picture if turn is None else picture.transpose(turn)


def in_mode(picture: Image.Image, channels: int) -> Image.Image:
    """Gray (channels 1) or RGB (3), 8 bits; what is transparent is laid on white."""
    mode = "L" if channels == 1 else "RGB"
    if picture.mode.startswith("I"):  # 16 bits: Pillow alone would clip them, not scale them
        wide = np.asarray(picture, dtype=np.float64)
        gray = np.round(wide.clip(0, 65535) / 257).astype(np.uint8)
        # Of one gray that a PNG declares transparent Pillow knows only while there are 16 bits.
        gray[wide == picture.info.get("transparency", -1)] = 255
        picture = Image.fromarray(gray)
    if picture.has_transparency_data:
        clear = picture.convert("RGBA")
        white = Image.new("RGBA", clear.size, "white")
        picture = Image.alpha_composite(white, clear).convert("RGB")
    return picture.convert(mode)


def centre_crop(picture: Image.Image, size_px: int) -> Image.Image:
    """The largest centred square at size_px x size_px, resampled as in ADM (guided-diffusion)."""
    while min(picture.size) >= 2 * size_px:
        halved = (picture.width // 2, picture.height // 2)
        picture = picture.resize(halved, resample=Image.Resampling.BOX)
    scale = size_px / min(picture.size)
    scaled = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(scaled, resample=Image.Resampling.BICUBIC)
    left, top = (picture.width - size_px) // 2, (picture.height - size_px) // 2
    return picture.crop((left, top, left + size_px, top + size_px))


def to_tensor(picture: Image.Image) -> Tensor:
    """Pixels uint8 (C, H, W)."""
    pixels = np.array(picture, dtype=np.uint8)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()


# -- images that are none of the data's ---------------------------------------------------------


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The 1,797 of scikit-learn, (N, 8, 8) in 0..255, and what they show, (N,)."""
    with gzip.open(_of_scikit_learn("data/digits.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    pixels = table[:, :-1].reshape(-1, 8, 8)
    return np.round(pixels * (255 / 16)).astype(np.uint8), table[:, -1].astype(np.int64)


def sample_photographs(size_px: int, channels: int, count: int) -> Tensor:
    """Crops of scikit-learn's two photographs, uint8 (count, C, H, W); always the same ones."""
    photographs = [in_mode(Image.fromarray(pixels), channels) for pixels in _photographs()]
    crops = (_crop(photographs[i % len(photographs)], i, size_px) for i in range(count))
    return torch.stack([to_tensor(crop) for crop in crops])


def _photographs() -> list[NDArray[np.uint8]]:
    names = ("images/china.jpg", "images/flower.jpg")
    return [np.array(Image.open(_of_scikit_learn(name))) for name in names]


def _of_scikit_learn(name: str) -> Path:
    """A data file that it brings. To import its loaders takes every program two seconds."""
    found = importlib.util.find_spec("sklearn")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "datasets" / name


def _crop(photograph: Image.Image, i: int, size_px: int) -> Image.Image:
    # Multiples of the plastic number's powers: places and sizes spread evenly, with no generator
    # that another version could change.
    u, v, w = ((0.5 + (i + 1) * step) % 1 for step in (0.8191725134, 0.6710436067, 0.5497004779))
    largest = min(photograph.size)
    side = round(min(size_px, largest) + w * max(0, largest - size_px))
    left, top = int(u * (photograph.width - side)), int(v * (photograph.height - side))
    return centre_crop(photograph.crop((left, top, left + side, top + side)), size_px)


def constant_images(size_px: int, channels: int, count: int) -> Tensor:
    """One gray each, from black to white in even steps, uint8 (count, C, H, W)."""
    levels = torch.linspace(0, 255, count).round().to(torch.uint8)
    return levels.view(-1, 1, 1, 1).expand(-1, channels, size_px, size_px).contiguous()


def flipped(images: Tensor) -> Tensor:
    """Upside down, (N, C, H, W): mirrored left to right, many images are of their class still."""
    return images.flip(-2)


def interpolated(images: Tensor) -> Tensor:
    """Halfway from each image to the next, and from the last to the first, (N, C, H, W)."""
    return ((images.int() + images.roll(-1, dims=0).int() + 1) // 2).to(torch.uint8)


def mirrored(images: Tensor) -> Tensor:
    """Left to right, (..., W)."""
    return images.flip(-1)


def shuffled(images: Tensor, seed: int) -> Tensor:
    """All pixels moved by one permutation, the same for every image, (N, C, H, W)."""
    pixels = images.shape[-2] * images.shape[-1]
    order = permutation(seed, 0, pixels, torch.arange(pixels))
    return images.flatten(-2)[..., torch.as_tensor(order)].view_as(images)
