"""Image sources -> uint8 pixels (C, H, W), and the listing that names every image by its content.

A source is scanned once when it is opened: every image is decoded, and what cannot be decoded is
told all together before anything is made of the rest. Pixels are cropped as in ADM: halved by box
filter while at least twice as large, then bicubic, then the centre. EXIF rotation is ignored, as in
the reference batches of the field. Nothing here knows of autoencoders or shards; fit, encode,
evaluate and the flows call it. The only door to scikit-learn's images.
"""

import functools
import hashlib
import io
import os
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eqm.config import SourceConfig
from eqm.errors import ConfigError, DataError
from eqm.progress import Progress
from eqm.randomness import permutation
from eqm.records import Ref, digest, sha256

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
"""Suffixes that count as images. The bytes decide which of these formats it is, and no other
decoder is ever asked: Pillow would run Ghostscript on an EPS that is named .png."""

LARGEST_IMAGE_PIXELS = 89_478_485
"""More than these many pixels are taken for a decompression bomb (a quarter GiB in RGB)."""

NARROWEST_IMAGE = 50
"""An image whose sides differ by more than this factor is refused: scaling its shorter side up to
the size that is wanted could fill the memory."""

LONGEST_KEY_BYTES = 1000
LARGE_FOLDER_IMAGES = 1000
"""From so many images on, a scan shows its progress."""
NAMED_AT_MOST = 10
BLOCK_IMAGES = 1024
READERS = 4
"""Threads that decode: Pillow lets go of the interpreter lock while it does."""

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


@dataclass(frozen=True)
class Entry:
    """One image of a listing."""

    key: str
    """Its name within the source, "/" between the parts."""
    label: int
    held_out: bool
    """Kept from training."""
    sha256: str
    """Of its bytes as they lie in the source."""


class Found(NamedTuple):
    """An image before it is scanned."""

    key: str
    label: int


class ImageSource(ABC):
    """A scanned source: ``entries`` in a fixed order that mixes the classes, and their pixels."""

    kind: str

    def __init__(self, config: SourceConfig, classes: tuple[str, ...]) -> None:
        self.config = config
        self.classes = classes
        """Names; a label is an index into them."""
        self.found: list[Found] = []
        """All images there are, before the scan."""
        self.entries: tuple[Entry, ...] = ()
        self.skipped: tuple[str, ...] = ()
        """Keys of images that cannot be decoded, where the config says to skip them."""

    @abstractmethod
    def read_bytes(self, key: str) -> bytes:
        """Bytes of an image as they lie in the source."""

    @abstractmethod
    def decode(self, data: bytes) -> Image.Image:
        """Those bytes as a picture of the config's channels; raises one of UNDECODABLE."""

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over kind, classes, keys, labels and content: equal wherever the images lie."""
        images = [[entry.key, entry.label, entry.sha256] for entry in self.entries]
        listing = {"kind": self.kind, "classes": self.classes, "images": images}
        return digest({**listing, "skipped": self.skipped})

    def numbers(self, *, held_out: bool) -> list[int]:
        """Numbers of the entries on one side of the split, in their order."""
        return [i for i, entry in enumerate(self.entries) if entry.held_out == held_out]

    def read(self, i: int) -> Tensor:
        """Pixels of entry i, uint8 (C, H, W). Raises DataError if it changed since the scan."""
        entry = self.entries[i]
        data = self.read_bytes(entry.key)
        if sha256(data) != entry.sha256:
            raise DataError(
                f"image {entry.key!r} was changed while it was in use: run the pipeline again"
            )
        return to_tensor(centre_crop(self.decode(data), self.config.image_size_px))

    def read_many(self, numbers: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """Batches uint8 (B, C, H, W) of the given entries; the next is read while one is used."""
        with ThreadPoolExecutor(READERS) as readers:
            coming: list[list[Any]] = []
            for batch in numbers:
                coming.append([readers.submit(self.read, i) for i in batch])
                if len(coming) > 1:
                    yield torch.stack([reading.result() for reading in coming.pop(0)])
            for batch in coming:
                yield torch.stack([reading.result() for reading in batch])


def open_source(config: SourceConfig, uri: str | None) -> ImageSource:
    """Scan the images of a source. Raises DataError, ConfigError.

    ``uri`` is the folder for kind "folder", and is not looked at for "digits".
    """
    return _scanned(_unscanned(config, uri), decode=True)


def checked_source(config: SourceConfig, uri: str | None, ref: Ref) -> ImageSource:
    """The source that a job was configured for; DataError if any of its images changed since.

    Images whose digests are those of the listing were decoded when it was made: they are hashed
    here, and decoded only if something differs.
    """
    source = _scanned(_unscanned(config, uri), decode=False)
    if source.digest != ref.digest:
        source = _scanned(_unscanned(config, uri), decode=True)
    if source.digest != ref.digest:
        raise DataError(
            f"the images changed since this run was configured (listing {source.digest[:12]}, "
            f"configured for {ref.digest[:12]}): run the pipeline again"
        )
    return source


def held_out(key: str, fraction: float, seed: int) -> bool:
    """Whether a key is kept from training: a function of the key, not of its neighbours."""
    number = int.from_bytes(hashlib.sha256(f"split/{seed}/{key}".encode()).digest()[:8], "big")
    return number < fraction * 2**64


def _unscanned(config: SourceConfig, uri: str | None) -> ImageSource:
    if config.kind == "digits":
        return Digits(config)
    if uri is None:
        raise ConfigError("source_uri is missing: give the folder that holds the class folders")
    return Folder(config, uri)


# -- the scan -----------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What a scan learns of one image."""

    found: Found
    sha256: str
    wrong: str | None
    """Why it cannot be decoded."""


def _scanned(source: ImageSource, *, decode: bool) -> ImageSource:
    """Fill in entries and skipped, or say in words why the source cannot be used."""
    found = sorted(source.found, key=lambda image: _order(image.key))
    config = source.config
    show = decode and len(found) >= LARGE_FOLDER_IMAGES and source.kind != "digits"
    look = functools.partial(_look, source, decode)
    with Progress("scanning images", total=len(found), show=show) as bar:
        seen = list(_in_threads(look, found, bar))
    wrong = sorted((one for one in seen if one.wrong), key=lambda one: one.found.key)
    if wrong and config.on_corrupt == "refuse":
        raise DataError(_corrupt(wrong, len(seen)))
    source.skipped = tuple(one.found.key for one in wrong)
    source.entries = tuple(_entry(config, one) for one in seen if not one.wrong)
    _check_split(source)
    return source


def _order(key: str) -> bytes:
    # By hash: classes are mixed, and an image keeps its place among the others for ever.
    return hashlib.sha256(f"order/{key}".encode()).digest()


def _in_threads(
    look: Callable[[Found], Seen], found: Sequence[Found], bar: Progress
) -> Iterator[Seen]:
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(found), BLOCK_IMAGES):
            block = found[start : start + BLOCK_IMAGES]
            yield from readers.map(look, block)
            bar.advance(len(block))


def _look(source: ImageSource, decode: bool, found: Found) -> Seen:
    data = source.read_bytes(found.key)
    return Seen(found, sha256(data), _wrong_with(source, data) if decode else None)


def _wrong_with(source: ImageSource, data: bytes) -> str | None:
    if not data:
        return "the file is empty"
    try:
        source.decode(data)
    except UNDECODABLE as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def _entry(config: SourceConfig, seen: Seen) -> Entry:
    key, label = seen.found
    kept = held_out(key, config.held_out_fraction, config.split_seed)
    return Entry(key, label, kept, seen.sha256)


def _corrupt(wrong: list[Seen], total: int) -> str:
    named = "; ".join(f"{one.found.key} ({one.wrong})" for one in wrong[:NAMED_AT_MOST])
    more = f"; and {len(wrong) - NAMED_AT_MOST} more" if len(wrong) > NAMED_AT_MOST else ""
    return (
        f"{len(wrong)} of {total} images cannot be decoded: {named}{more}. Mend or remove them, or "
        "set source.on_corrupt to 'skip': what is skipped is named in the manifest"
    )


def _check_split(source: ImageSource) -> None:
    """Refuse a split with too few images on a side, or with a class that is never trained."""
    config, skipped = source.config, len(source.skipped)
    total = [0] * len(source.classes)
    training = [0] * len(source.classes)
    for entry in source.entries:
        total[entry.label] += 1
        training[entry.label] += not entry.held_out
    for name, count in zip(source.classes, total, strict=True):
        if not count:
            why = f" that can be decoded ({skipped} images are skipped)" if skipped else ""
            raise DataError(f"class {name!r} has no image{why}: add some, or remove the class")
    if sum(training) < 2:
        raise DataError(
            f"{sum(training)} of {sum(total)} images are left for training, 2 are the least: add "
            f"images, or lower source.held_out_fraction ({config.held_out_fraction})"
        )
    for name, count in zip(source.classes, training, strict=True):
        if not count:
            raise DataError(
                f"all images of class {name!r} are held out, none is left for training: add "
                "images, lower source.held_out_fraction or change source.split_seed"
            )
    if config.held_out_fraction > 0 and sum(training) == sum(total):
        raise DataError(
            f"source.held_out_fraction is {config.held_out_fraction}, but none of the "
            f"{sum(total)} images falls on the held-out side: add images, or set it to 0"
        )


# -- kinds of source ----------------------------------------------------------------------------


class Digits(ImageSource):
    """The 1,797 digits of scikit-learn, 8 x 8 px with 17 levels of gray."""

    kind = "digits"

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config, tuple("0123456789"))
        self._pixels, labels = _digits()
        self.found = [Found(f"digits/{i:05d}", int(label)) for i, label in enumerate(labels)]

    def read_bytes(self, key: str) -> bytes:
        """The 64 pixels, scaled from 0..16 to 0..255."""
        return self._pixels[int(key.removeprefix("digits/"))].tobytes()

    def decode(self, data: bytes) -> Image.Image:
        """An 8 x 8 picture; never fails."""
        return in_mode(Image.frombytes("L", (8, 8), data), self.config.channels)


def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    return np.round(found.images * (255 / 16)).astype(np.uint8), found.target


class Folder(ImageSource):
    """One folder of images a class, at any depth below it; suffixes as in FORMATS.

    Names that begin with a dot are passed over, as is any other file.
    """

    kind = "folder"

    def __init__(self, config: SourceConfig, uri: str) -> None:
        if "://" in uri:
            raise ConfigError(f"source_uri is {uri!r}; it must be a folder on this machine")
        self.root = Path(uri)
        names = _class_names(self.root)
        super().__init__(config, names)
        self.found = [
            Found(key, label) for label, name in enumerate(names) for key in _keys(self.root, name)
        ]

    def read_bytes(self, key: str) -> bytes:
        """The file's bytes. Raises DataError if it cannot be read."""
        try:
            return (self.root / key).read_bytes()
        except OSError as error:
            raise DataError(f"{self.root / key} cannot be read: {error.strerror}") from error

    def decode(self, data: bytes) -> Image.Image:
        """The picture in the channels of the config."""
        return in_mode(decode_picture(data), self.config.channels)


def _class_names(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"source_uri {root} {what}: give the folder that holds the class folders")
    try:
        inside = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    except OSError as error:
        _unreadable(error)
    loose = [path.name for path in inside if path.suffix.lower() in FORMATS and path.is_file()]
    if loose:
        raise DataError(
            f"{len(loose)} images lie in {root} itself ({loose[0]}, …), in no class: put the "
            "images of each class into a folder of their own"
        )
    names = tuple(path.name for path in inside if path.is_dir())
    if not names:
        raise DataError(f"{root} is empty: it must hold one folder of images a class")
    return names


def _keys(root: Path, name: str) -> list[str]:
    """Sorted keys of all images of a class. Raises DataError."""
    keys = []
    for folder, below, files in os.walk(root / name, onerror=_unreadable):
        below[:] = sorted(one for one in below if not one.startswith("."))
        for one in below:
            if (Path(folder) / one).is_symlink():
                raise DataError(
                    f"{Path(folder) / one} is a link to a folder, and such links are not "
                    "followed: put the folder itself there, or remove the link"
                )
        images = (one for one in files if not one.startswith("."))
        paths = (Path(folder) / one for one in images if Path(one).suffix.lower() in FORMATS)
        keys.extend(_checked_key(path.relative_to(root).as_posix()) for path in paths)
    if not keys:
        raise DataError(
            f"class folder {root / name} holds no image ({', '.join(FORMATS)}): add some, or "
            "remove the folder"
        )
    return sorted(keys)


def _unreadable(error: OSError) -> NoReturn:
    """A folder that cannot be listed would be left out without a word."""
    raise DataError(
        f"folder {error.filename} cannot be read ({error.strerror}): give this user the right to, "
        "or remove it"
    ) from error


def _checked_key(key: str) -> str:
    # Bytes of a file name that are not UTF-8 come as surrogates, which have no encoding.
    length = len(key.encode(errors="ignore"))
    odd = length != len(key.encode(errors="surrogatepass"))
    if odd or any(ord(c) < 32 or ord(c) == 127 or c == "\\" for c in key):
        raise DataError(
            f"image {key!r} has a name with characters that an archive cannot hold (control "
            "characters, backslashes, or bytes that are not UTF-8): rename it"
        )
    if length > LONGEST_KEY_BYTES:
        raise DataError(
            f"image {key[:60]!r}… has a name of {length} bytes, {LONGEST_KEY_BYTES} are the most: "
            "rename it"
        )
    return key


# -- pictures -> pixels -------------------------------------------------------------------------


def decode_picture(data: bytes) -> Image.Image:
    """Decode the first frame of a PNG, JPEG, WebP or BMP; raises one of UNDECODABLE."""
    picture = Image.open(io.BytesIO(data), formats=sorted(set(FORMATS.values())))
    width, height = picture.size
    if width * height > LARGEST_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} px is a decompression bomb")
    if max(width, height) > NARROWEST_IMAGE * min(width, height):
        raise ValueError(f"{width} x {height} px is too narrow to be cropped to a square")
    picture.load()
    return picture


def in_mode(picture: Image.Image, channels: int) -> Image.Image:
    """Gray (channels 1) or RGB (3), 8 bits; what is transparent is laid on white."""
    mode = "L" if channels == 1 else "RGB"
    if picture.mode.startswith("I"):  # 16 bits: Pillow alone would clip them, not scale them
        wide = np.asarray(picture, dtype=np.float64)
        picture = Image.fromarray(np.round(wide.clip(0, 65535) / 257).astype(np.uint8))
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


def sample_photographs(size_px: int, channels: int, count: int) -> Tensor:
    """Crops of scikit-learn's two photographs, uint8 (count, C, H, W); always the same ones."""
    photographs = [in_mode(Image.fromarray(pixels), channels) for pixels in _photographs()]
    crops = (_crop(photographs[i % len(photographs)], i, size_px) for i in range(count))
    return torch.stack([to_tensor(crop) for crop in crops])


def _photographs() -> list[NDArray[np.uint8]]:
    from sklearn.datasets import load_sample_image

    return [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]


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


def mirrored(images: Tensor) -> Tensor:
    """Left to right, (..., W)."""
    return images.flip(-1)


def shuffled(images: Tensor, seed: int) -> Tensor:
    """All pixels moved by one permutation, the same for every image, (N, C, H, W)."""
    pixels = images.shape[-2] * images.shape[-1]
    order = permutation(seed, 0, pixels, torch.arange(pixels))
    return images.flatten(-2)[..., torch.as_tensor(order)].view_as(images)
