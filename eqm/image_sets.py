"""Sets of images that are none of the data's, for tests of what lies out of distribution.

A set is made (crops of photographs, constant grays), made of held-out images (upside down,
shuffled, interpolated), or read from files as they are distributed:

    folder    images (png, jpg, webp, bmp) at any depth
    cifar10   data_batch_1.bin … data_batch_5.bin, test_batch.bin  (CIFAR-10 binary version)
    svhn      train_32x32.mat, test_32x32.mat, extra_32x32.mat     (cropped digits, MATLAB 5)
    dtd       images/<class>/*.jpg, labels/<split>.txt             (Describable Textures)

Files of a config are trusted no further than their digest, which is checked before any image is
parsed (the list of a split of dtd is read first: it says what the files are); what is malformed is
refused by name and place, and nothing in a file is ever executed. Of a set that has more images
than are asked for, some are taken that are spread over all of it, always the same ones. Called by
outliers and flows.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eqm.config import IN_DISTRIBUTION, SET_SPLITS, OODSet
from eqm.cores import cores
from eqm.errors import DataError, IntegrityError, require
from eqm.files import File, Files, checked_path, open_files
from eqm.matlab import numeric_arrays
from eqm.pictures import (
    FORMATS,
    UNDECODABLE,
    centre_crop,
    constant_images,
    decode_picture,
    flipped,
    in_mode,
    interpolated,
    sample_photographs,
    shuffled,
    to_tensor,
    why_undecodable,
)
from eqm.progress import Progress
from eqm.randomness import permutation
from eqm.records import digest, sha256
from eqm.threads import ahead
from eqm.words import counted, first_of

SHUFFLE_SEED = 0
CHOICE_SEED = 0
LEAST_IMAGES = 2
"""Of any set: fewer have no interval."""
NAMED_AT_MOST = 10
MOST_DECODERS = 16
"""Threads: Pillow lets go of the interpreter lock while it decodes."""
MANY_IMAGES = 2_000
"""From so many on, it shows how far decoding is."""
LARGEST_FILE_BYTES = 2**31
LARGEST_SPLIT_BYTES = 2**20
"""Of a list of images: the largest of DTD has 60 kB."""
COPY_AGAIN = "copy it again from where it came from"

Pixels = NDArray[np.uint8]
Read = Callable[[str], bytes]
"""Bytes of a file by its path in the set, the same that were digested."""


def read_set(asked: OODSet, inside: Tensor, count: int) -> Tensor:
    """Images of a set, uint8 (N, C, H, W) with N at most ``count``.

    ``inside``: the held-out images (K, C, H, W) whose size and channels the set's take, and of
    which some sets are made. Raises DataError, IntegrityError (another digest), StoreError.
    """
    channels, size = inside.shape[1], inside.shape[3]
    some = inside[:count]
    made: dict[str, Callable[[], Tensor]] = {
        "photographs": lambda: sample_photographs(size, channels, count),
        "constant": lambda: constant_images(size, channels, count),
        "flipped": lambda: flipped(some),
        "shuffled": lambda: shuffled(some, SHUFFLE_SEED),
        "interpolated": lambda: interpolated(some),
    }
    if asked.kind in made:
        found = made[asked.kind]()
    else:
        reader, digested = _checked(asked)
        pictures = reader.pictures(digested.read, count)
        found = torch.stack(
            [to_tensor(centre_crop(in_mode(one, channels), size)) for one in pictures]
        )
    _check_number(asked, len(found))
    return found


def _check_number(asked: OODSet, found: int) -> None:
    if found < LEAST_IMAGES:
        raise DataError(
            f"set {asked.name!r} has {counted(found, 'image')}: give at least {LEAST_IMAGES}, or "
            f"leave it out of evaluate.ood.sets (it is told from {IN_DISTRIBUTION} images)"
        )


def digest_of(kind: str, uri: str, split: str | None = None, *, setting: str = "uri") -> str:
    """SHA-256 over names and bytes of the files of a set, wherever they lie; `OODSet.sha256`.

    Every image is decoded: a digest vouches for a set that can be read. ``setting``: what whoever
    gave the address calls it. Raises ConfigError for a kind that lies in no files, DataError,
    StoreError.
    """
    reader, digested = _opened(kind, uri, split, setting)
    _count(reader.pictures(digested.read, sys.maxsize))
    return digested.digest


def check_set(asked: OODSet, count: int) -> None:
    """Refuse a set whose files are not there, not those that were meant, or cannot be decoded.

    For flows, before a training that would be judged by ``count`` of its images: only those are
    decoded. Raises DataError, IntegrityError, StoreError.
    """
    if asked.kind in SET_SPLITS:
        reader, digested = _checked(asked)
        _check_number(asked, _count(reader.pictures(digested.read, count)))


def _count(pictures: Iterator[Image.Image]) -> int:
    return sum(1 for _ in pictures)


def _checked(asked: OODSet) -> tuple["Reader", "Digested"]:
    # What OODSet has checked: a kind that lies in files has an address.
    reader, digested = _opened(
        asked.kind, asked.uri or "", asked.split, f"evaluate.ood.sets[{asked.name!r}].uri"
    )
    if digested.digest != asked.sha256:
        raise IntegrityError(
            f"set {asked.name!r} at {asked.uri} has digest {digested.digest}, and {asked.sha256} "
            "is expected: copy the files again, or correct evaluate.ood.sets if you trust these"
        )
    return reader, digested


def _opened(kind: str, uri: str, split: str | None, setting: str) -> tuple["Reader", "Digested"]:
    readers: dict[str, type[Reader]] = {
        "folder": Folder,
        "cifar10": Cifar10,
        "svhn": StreetNumbers,
        "dtd": Textures,
    }
    require(kind in readers, "kind", kind, f"one of {', '.join(readers)}")
    splits = SET_SPLITS[kind]
    rule = f"one of {', '.join(splits)}" if splits else f"left out: {kind!r} has none"
    require(split is None or split in splits, "split", split, rule)
    files = open_files(uri, setting=setting)
    reader = readers[kind](files, split or (splits[0] if splits else ""))
    return reader, Digested(files, reader.paths())


class Digested:
    """Files with the digest of each: what is read later is what was digested."""

    def __init__(self, files: Files, paths: list[str]) -> None:
        self._files = files
        self._sha256 = {path: sha256(files.read(path)) for path in paths}

    @property
    def digest(self) -> str:
        """SHA-256 over names and digests."""
        return digest(sorted(self._sha256.items()))

    def read(self, path: str) -> bytes:
        """Bytes of one of the files. Raises DataError if they changed since they were digested."""
        data = self._files.read(path)
        if sha256(data) != self._sha256[path]:
            raise DataError(
                f"{self._files.where(path)} was changed while it was in use: run the stage again"
            )
        return data


def chosen(total: int, count: int) -> list[int]:
    """Which of ``total`` images are taken, at most ``count``: spread over all, in their order."""
    if total <= count:
        return list(range(total))
    return sorted(permutation(CHOICE_SEED, 0, total, torch.arange(count)).tolist())


# -- sets in files ------------------------------------------------------------------------------


class Reader(ABC):
    """One kind of set in files. Methods raise DataError, of S3 StoreError too."""

    def __init__(self, files: Files, split: str) -> None:
        self.files, self.split = files, split

    @abstractmethod
    def paths(self) -> list[str]:
        """The files that the set is made of; no image of them is parsed."""

    @abstractmethod
    def pictures(self, read: Read, count: int) -> Iterator[Image.Image]:
        """At most ``count`` of the images, each as it was stored."""

    def _there(self, path: str, remedy: str, *, most_bytes: int = LARGEST_FILE_BYTES) -> File:
        file = self.files.find(path)
        where = self.files.where(path)
        if file is None:
            raise DataError(f"{where} does not exist: {remedy}")
        if file.size_bytes > most_bytes:
            raise DataError(
                f"{where} has {file.size_bytes} bytes, {most_bytes} are the most that such a file "
                f"may have: {remedy}"
            )
        return file


class Folder(Reader):
    """Images of a folder, at any depth, in whatever folders; names with a dot first are not."""

    def paths(self) -> list[str]:
        """Every file with the suffix of an image."""
        found = [file.path for file in self.files.tree(FORMATS).files]
        if not found:
            raise DataError(
                f"{self.files.where()} holds no image ({', '.join(FORMATS)}): give the folder of "
                "the images"
            )
        return found

    def pictures(self, read: Read, count: int) -> Iterator[Image.Image]:
        """Images of some of the files."""
        yield from _decoded(self.files, self.paths(), read, count)


def _decoded(files: Files, paths: list[str], read: Read, count: int) -> Iterator[Image.Image]:
    """Pictures of some of the files. Raises DataError, once all were tried, for those that fail."""
    taken = [paths[number] for number in chosen(len(paths), count)]

    def look(path: str) -> tuple[Image.Image | None, str]:
        data = read(path)
        try:
            return decode_picture(data), ""
        except UNDECODABLE as error:
            return None, f"{path} ({why_undecodable(error)})"

    bad: list[str] = []
    threads = min(MOST_DECODERS, cores())
    show = len(taken) >= MANY_IMAGES
    with Progress("decoding images of a set", total=len(taken), show=show) as bar:
        for picture, wrong in ahead(look, taken, threads=threads, name="eqm-sets"):
            bar.advance(1)
            if picture is None:
                bad.append(wrong)
            elif not bad:
                yield picture
    if bad:
        raise DataError(
            f"{len(bad)} of {counted(len(taken), 'image')} of {files.where()} cannot be decoded: "
            f"{first_of(bad, NAMED_AT_MOST)}. Copy them again from where they came from, or remove "
            "them"
        )


class Cifar10(Reader):
    """CIFAR-10, binary version: a byte of label, then 32 x 32 of red, of green and of blue."""

    REMEDY = "give the folder that cifar-10-binary.tar.gz unpacks to"
    RECORD_BYTES = 1 + 3 * 32 * 32
    CLASSES = 10

    def paths(self) -> list[str]:
        """The files of the split, each of which must be there."""
        train = [f"data_batch_{i}.bin" for i in range(1, 6)]
        names = train if self.split == "train" else ["test_batch.bin"]
        return [self._there(name, self.REMEDY).path for name in names]

    def pictures(self, read: Read, count: int) -> Iterator[Image.Image]:
        """Images of all files, once all of their labels have been found to be labels."""
        records = np.concatenate([self._records(path, read(path)) for path in self.paths()])
        for number in chosen(len(records), count):
            pixels = records[number, 1:].reshape(3, 32, 32).transpose(1, 2, 0)
            yield Image.fromarray(np.ascontiguousarray(pixels))

    def _records(self, path: str, data: bytes) -> Pixels:
        where, size = self.files.where(path), self.RECORD_BYTES
        if not data or len(data) % size:
            raise DataError(
                f"{where} has {len(data)} bytes, no multiple of the {size} of an image: it is cut, "
                f"or no CIFAR-10 in the binary version; {self.REMEDY}"
            )
        records = np.frombuffer(data, dtype=np.uint8).reshape(-1, size)
        odd = np.flatnonzero(records[:, 0] >= self.CLASSES)
        if len(odd):
            raise DataError(
                f"{where} at byte {odd[0] * size}: image {odd[0]} has label "
                f"{records[odd[0], 0]}, and labels are 0 to {self.CLASSES - 1}: {COPY_AGAIN}"
            )
        return records


class StreetNumbers(Reader):
    """SVHN, cropped digits: X uint8 (32, 32, 3, N) and y (N, 1), 1 to 10, in a MATLAB 5 file."""

    REMEDY = "give the folder of train_32x32.mat and test_32x32.mat as they are distributed"

    def paths(self) -> list[str]:
        """The file of the split."""
        return [self._there(f"{self.split}_32x32.mat", self.REMEDY).path]

    def pictures(self, read: Read, count: int) -> Iterator[Image.Image]:
        """Images of the file, once all of its labels have been found to be labels."""
        (path,) = self.paths()
        pixels = self._pixels(self.files.where(path), read(path))
        for number in chosen(pixels.shape[3], count):
            yield Image.fromarray(np.ascontiguousarray(pixels[..., number]))

    def _pixels(self, where: str, data: bytes) -> Pixels:
        arrays = numeric_arrays(data, where, names=("X", "y"))
        x, y = arrays["X"], arrays["y"].ravel()
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (32, 32, 3):
            raise DataError(
                f"{where}: X is {x.dtype} of shape {x.shape}, and must be uint8 of (32, 32, 3, N): "
                f"{self.REMEDY}"
            )
        if len(y) != x.shape[3]:
            raise DataError(
                f"{where}: X has {x.shape[3]} images, and y {len(y)} labels: {COPY_AGAIN}"
            )
        odd = np.flatnonzero(~np.isin(y, np.arange(1, 11)))
        if len(odd):
            raise DataError(
                f"{where}: y has {y[odd[0]]} for image {odd[0]}, and labels are 1 to 10: "
                f"{COPY_AGAIN}"
            )
        return x


class Textures(Reader):
    """Describable Textures: the images that a file of ``labels/`` names."""

    REMEDY = "give the folder dtd of dtd-r1.0.1.tar.gz, which holds images and labels"

    def paths(self) -> list[str]:
        """The list of the split, and the images that it names."""
        return [self._list, *self._images(self.files.read(self._list))]

    @property
    def _list(self) -> str:
        path = f"labels/{self.split}.txt"
        return self._there(path, self.REMEDY, most_bytes=LARGEST_SPLIT_BYTES).path

    def pictures(self, read: Read, count: int) -> Iterator[Image.Image]:
        """Some of the images that are named."""
        yield from _decoded(self.files, self._images(read(self._list)), read, count)

    def _images(self, listed: bytes) -> list[str]:
        where = self.files.where(f"labels/{self.split}.txt")
        try:
            lines = listed.decode().splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is no text ({error}): {COPY_AGAIN}") from error
        there = {file.path for file in self.files.tree(FORMATS).files}
        found: dict[str, int] = {}
        for number, line in enumerate(lines, start=1):
            at = f"{where}, line {number}"
            path = PurePosixPath("images", checked_path(line.strip(), at))
            if len(path.parts) != 3 or not path.name.startswith(f"{path.parent.name}_"):
                raise DataError(
                    f"{at}: {line[:80]!r} is no image of a class, as banded/banded_0002.jpg is: "
                    f"{COPY_AGAIN}"
                )
            if str(path) in found:
                raise DataError(f"{at}: {line[:80]!r} is there twice: {COPY_AGAIN}")
            if str(path) not in there:
                raise DataError(
                    f"{at}: {line[:80]!r} is named, and {self.files.where(str(path))} does not "
                    f"exist: {self.REMEDY}"
                )
            found[str(path)] = number
        if not found:
            raise DataError(f"{where} names no image: {COPY_AGAIN}")
        return list(found)
