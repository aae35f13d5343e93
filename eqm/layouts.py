"""How images lie in files: class folders, ILSVRC2012 as distributed, WebDataset, parquet, digits.

A layout divides a source into *parts* (a tar, some files of a folder) that are scanned one by one
and remembered one by one, says what it found in all of them (keys, labels, places), and reads one
image of it. eqm.images scans, orders and splits.

    key of an image     folder      <class>/…/<file>
                        imagenet    train/<synset>/<file>, val/<file>
                        webdataset  <tar>/<sample>.<suffix>
                        parquet     <file>/<row>
"""

import functools
import gzip
import hashlib
import io
import json
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eqm.archives import BLOCK, Held, Member, Window, members
from eqm.config import SourceConfig
from eqm.errors import ConfigError, DataError
from eqm.files import File, Files, Tree, checked_path, open_files
from eqm.listing import Place, Places, Table, held_out
from eqm.matlab import struct_fields
from eqm.pictures import FOREIGN, FORMATS, decode_picture, digits, in_mode
from eqm.rows import Rows

LARGEST_MEMBER_BYTES = 2**29
"""An image of a tar is read at once: the largest that is decoded has 256 MiB of pixels."""
LARGEST_LABEL_BYTES = 2**20
LARGEST_DEVKIT_BYTES = 2**28
"""Unpacked; the official one is far smaller."""
FILES_A_PART = 1024
"""Files of a folder are remembered together, about so many at a time."""


@dataclass(frozen=True)
class Part:
    """Some of a source that is scanned, and remembered, as one."""

    name: str
    """Below the root of the source, for people."""
    files: tuple[File, ...]
    """The files it lies in: the part is scanned again when one of them changes."""
    start: int = 0
    """A tar within a tar: its first byte, and the one after its last."""
    end: int = 0

    @property
    def size_bytes(self) -> int:
        """How much there is to scan."""
        return self.end - self.start or sum(file.size_bytes for file in self.files)


class Raw(NamedTuple):
    """An image that is to be looked at; the columns of Table that a layout knows."""

    name: str
    label: str
    offset: int
    size: int
    read: Callable[[], bytes]


class Found(NamedTuple):
    """All images of a source, in the order of the parts and their tables; N of them."""

    classes: tuple[str, ...]
    keys: list[str]
    labels: NDArray[np.int32]
    places: Places | None


Remember = Callable[[Part, Callable[[], Table]], Table]
"""What was found in a part when it was scanned before, or else is found now."""


class Layout(ABC):
    """One kind of source. All methods raise DataError, of S3 StoreError too."""

    files: Files | None = None

    def __init__(self, config: SourceConfig) -> None:
        self.config = config

    @abstractmethod
    def parts(self, remember: Remember) -> list[Part]:
        """What there is to scan."""

    @abstractmethod
    def raw(self, part: Part) -> Iterator[Raw]:
        """Images of a part, in the order in which they lie there."""

    @abstractmethod
    def found(self, parts: Sequence[Part], tables: Sequence[Table]) -> Found:
        """All images, from what was found in the parts."""

    @abstractmethod
    def read(self, key: str, place: Place | None) -> bytes:
        """Bytes of an image as they lie in the source."""

    def decode(self, data: bytes) -> Image.Image:
        """Those bytes as a picture of the config's channels; raises one of UNDECODABLE."""
        picture = decode_picture(data, exif_rotation=self.config.exif_rotation)
        return in_mode(picture, self.config.channels)

    def is_held_out(self, key: str) -> bool:
        """Whether an image is kept from training: a function of its key."""
        return held_out(key, self.config.held_out_fraction, self.config.split_seed)


def layout_of(config: SourceConfig, uri: str | None) -> Layout:
    """The layout of a kind at an address. Raises ConfigError, DataError, StoreError."""
    if config.kind == "digits":
        return Digits(config)
    if uri is None:
        raise ConfigError(
            "source_uri is missing: give the folder that holds the images, on this machine or "
            "s3://bucket/prefix"
        )
    kinds: dict[str, tuple[type[FileLayout], str | None]] = {
        "folder": (Folder, None),
        "imagenet": (ImageNet, None),
        "webdataset": (WebDataset, ".tar"),
        "parquet": (Parquet, ".parquet"),
    }
    kind, single = kinds[config.kind]
    return kind(config, open_files(uri, single=single))


class Digits(Layout):
    """The 1,797 digits of scikit-learn, 8 x 8 px with 17 levels of gray."""

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        self._pixels, self._labels = digits()

    def parts(self, remember: Remember) -> list[Part]:
        """One."""
        return [Part("digits", ())]

    def raw(self, part: Part) -> Iterator[Raw]:
        """All digits."""
        for i, label in enumerate(self._labels):
            key = f"digits/{i:05d}"
            yield Raw(key, str(label), 0, 64, functools.partial(self.read, key, None))

    def found(self, parts: Sequence[Part], tables: Sequence[Table]) -> Found:
        """All digits."""
        return Found(tuple("0123456789"), tables[0].names, self._labels.astype(np.int32), None)

    def read(self, key: str, place: Place | None) -> bytes:
        """The 64 pixels, scaled from 0..16 to 0..255."""
        return self._pixels[int(key.removeprefix("digits/"))].tobytes()

    def decode(self, data: bytes) -> Image.Image:
        """An 8 x 8 picture; never fails."""
        return in_mode(Image.frombytes("L", (8, 8), data), self.config.channels)


class FileLayout(Layout):
    """A layout of files."""

    files: Files

    def __init__(self, config: SourceConfig, files: Files) -> None:
        super().__init__(config)
        self.files = files

    def read(self, key: str, place: Place | None) -> bytes:
        """A range of a file."""
        if place is None:
            raise DataError(f"the listing does not say where {key!r} lies: list the source again")
        return self.files.read(place.file, place.offset, place.size)


# -- class folders ------------------------------------------------------------------------------


class Folder(FileLayout):
    """One folder of images a class, at any depth below it; suffixes as in FORMATS.

    Names that begin with a dot are passed over, as is any other file.
    """

    def parts(self, remember: Remember) -> list[Part]:
        """Some files of one class each; which ones does not change when others come and go."""
        # A picture that cannot be decoded is told, and not passed over for its name.
        tree = self.files.tree((*FORMATS, *FOREIGN))
        _check_classes(tree, self.files.where())
        parts: list[Part] = []
        block: list[File] = []
        for i, file in enumerate(tree.files):
            block.append(file)
            last = i + 1 == len(tree.files) or _class_of(tree.files[i + 1]) != _class_of(file)
            number = int.from_bytes(hashlib.sha256(file.path.encode()).digest()[:8], "big")
            if last or number % FILES_A_PART == 0:
                parts.append(Part(f"{_class_of(file)}, to {file.path}", tuple(block)))
                block = []
        return parts

    def raw(self, part: Part) -> Iterator[Raw]:
        """The files themselves."""
        for file in part.files:
            read = functools.partial(self.files.read, file.path)
            yield Raw(file.path, "", 0, file.size_bytes, read)

    def found(self, parts: Sequence[Part], tables: Sequence[Table]) -> Found:
        """All images; the folder in the root is the class."""
        names = [_class_of(part.files[0]) for part in parts]
        classes = tuple(sorted(set(names)))
        number = {name: label for label, name in enumerate(classes)}
        lengths = [len(table.names) for table in tables]
        labels = np.repeat(np.array([number[name] for name in names], dtype=np.int32), lengths)
        return Found(classes, _chained(tables, "names"), labels, None)

    def read(self, key: str, place: Place | None) -> bytes:
        """The file's bytes."""
        return self.files.read(key)


def _class_of(file: File) -> str:
    return file.path.partition("/")[0]


def _check_classes(tree: Tree, root: str) -> None:
    loose = [file.path for file in tree.files if "/" not in file.path]
    if loose:
        raise DataError(
            f"{loose[0]} lies in {root} itself, in no class"
            f"{f' (and {len(loose) - 1:,} more)' if len(loose) > 1 else ''}: put the "
            "images of each class into a folder of their own"
        )
    if not tree.folders:
        raise DataError(f"{root} is empty: it must hold one folder of images a class")
    filled = {_class_of(file) for file in tree.files}
    for name in tree.folders:
        if name not in filled:
            raise DataError(
                f"class folder {root}/{name} holds no image ({', '.join(FORMATS)}): add some, or "
                "remove the folder"
            )


def _chained(tables: Sequence[Table], column: str) -> list[str]:
    return [text for table in tables for text in getattr(table, column)]


def _places(parts: Sequence[Part], tables: Sequence[Table]) -> Places:
    """Where the images of parts of one file each lie."""
    paths = [part.files[0].path for part in parts]
    files = tuple(dict.fromkeys(paths))
    number = {path: i for i, path in enumerate(files)}
    numbers = np.array([number[path] for path in paths], dtype=np.int32)
    return Places(
        files,
        np.repeat(numbers, [len(table.names) for table in tables]),
        np.concatenate([table.offset for table in tables]),
        np.concatenate([table.size for table in tables]),
    )


def _taken(window: Window, member: Member, where: str) -> bytes:
    if member.size > LARGEST_MEMBER_BYTES:
        raise DataError(
            f"{where}: {member.name!r} has {member.size} bytes, {LARGEST_MEMBER_BYTES} are the "
            "most for an image: remove it"
        )
    return window.take(member.offset, member.size)


# -- ImageNet -----------------------------------------------------------------------------------

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
SYNSET = re.compile(r"(n\d{8})\.tar")
TRAIN_IMAGE = re.compile(r"(n\d{8})_\d+\.JPEG")
VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
AS_DISTRIBUTED = "give the files as ILSVRC distributes them"


class ImageNet(FileLayout):
    """ILSVRC2012 as distributed: a tar of one tar a synset, a tar of validation images, a devkit.

    Classes are the synsets, sorted. With ``held_out_fraction`` 0 the validation images are held
    out, and their labels are those of the devkit, through its meta.mat: it numbers synsets in an
    order of its own. With a share there must be no validation images.
    """

    def parts(self, remember: Remember) -> list[Part]:
        """The tar of each synset, and the validation tar."""
        train = self._file(TRAIN)
        whole = Part(TRAIN, (train,), 0, train.size_bytes)
        table = remember(whole, functools.partial(self._synsets, whole))
        rows = zip(table.names, table.offset.tolist(), table.size.tolist(), strict=True)
        parts = [Part(f"{TRAIN}/{n}", (train,), at, at + size) for n, at, size in rows]
        validation = self.files.find(VALIDATION)
        share = self.config.held_out_fraction
        if share > 0 and validation is not None:
            raise DataError(
                f"source.held_out_fraction is {share}, and {self.files.where(VALIDATION)} holds "
                "the official validation images: set it to 0 to hold those out, or give a folder "
                f"with {TRAIN} alone to hold out training images"
            )
        if share == 0:
            file = self._file(VALIDATION)
            parts.append(Part(VALIDATION, (file,), 0, file.size_bytes))
        return parts

    def _file(self, name: str) -> File:
        file = self.files.find(name)
        if file is None:
            more = "" if name == TRAIN else ", or hold out a share with source.held_out_fraction"
            raise DataError(
                f"{self.files.where(name)} does not exist: {AS_DISTRIBUTED} (ILSVRC2012, task 1 "
                f"and 2){more}"
            )
        return file

    def _synsets(self, whole: Part) -> Table:
        """Names and places of the tars within; nothing of them is looked at."""
        where = self.files.where(TRAIN)
        # Headers lie a hundred megabytes apart: nothing is read ahead.
        window = Window(self.files, TRAIN, whole.start, whole.end, piece_bytes=BLOCK)
        found = list(members(window, where))
        for member in found:
            if not SYNSET.fullmatch(member.name):
                raise DataError(f"{where} holds {member.name!r}, no synset: {AS_DISTRIBUTED}")
        if not found:
            raise DataError(f"{where} holds no synset: {AS_DISTRIBUTED}")
        return Table(
            names=[member.name for member in found],
            labels=[""] * len(found),
            offset=np.array([member.offset for member in found], dtype=np.int64),
            size=np.array([member.size for member in found], dtype=np.int64),
            sha256=np.zeros((len(found), 32), dtype=np.uint8),
            wrong=[""] * len(found),
        )

    def raw(self, part: Part) -> Iterator[Raw]:
        """Members of one tar."""
        where = self.files.where(part.name)
        window = Window(self.files, part.files[0].path, part.start, part.end)
        synset = _synset_of(part)
        for member in members(window, where):
            name = (TRAIN_IMAGE if synset else VALIDATION_IMAGE).fullmatch(member.name)
            if name is None or (synset and name[1] != synset):
                raise DataError(f"{where} holds {member.name!r}, no image of it: {AS_DISTRIBUTED}")
            data = _taken(window, member, where)
            yield Raw(member.name, "", member.offset, member.size, functools.partial(bytes, data))

    def found(self, parts: Sequence[Part], tables: Sequence[Table]) -> Found:
        """All images, with the labels of their synsets."""
        classes = tuple(sorted(filter(None, map(_synset_of, parts))))
        number = {synset: label for label, synset in enumerate(classes)}
        keys: list[str] = []
        labels: list[NDArray[np.int32]] = []
        for part, table in zip(parts, tables, strict=True):
            synset = _synset_of(part)
            folder = f"train/{synset}" if synset else "val"
            keys += [f"{folder}/{name}" for name in table.names]
            labels.append(
                np.full(len(table.names), number[synset], dtype=np.int32)
                if synset
                else self._truth(table.names, number)
            )
        return Found(classes, keys, np.concatenate(labels), _places(parts, tables))

    def is_held_out(self, key: str) -> bool:
        """The validation images; a share of the training images where there are none."""
        return key.startswith("val/") or super().is_held_out(key)

    def _truth(self, names: Sequence[str], number: dict[str, int]) -> NDArray[np.int32]:
        """Labels of validation images: by the number in the name, never by their order."""
        where, meta, truth = self._devkit()
        synsets = synsets_of(meta, f"{where}/{META}")
        lines = truth.decode(errors="replace").split()
        images = [int(name[-13:-5]) for name in names]
        if sorted(images) != list(range(1, len(lines) + 1)):
            raise DataError(
                f"{self.files.where(VALIDATION)} holds {len(images)} images, and {where}/{TRUTH} "
                f"the labels of {len(lines)}; each must have its own: {AS_DISTRIBUTED}"
            )
        labels = [_label(line, synsets, number, f"{where}/{TRUTH}") for line in lines]
        return np.array([labels[image - 1] for image in images], dtype=np.int32)

    def _devkit(self) -> tuple[str, bytes, bytes]:
        """Where it lies, meta.mat and the ground truth."""
        archive = f"{DEVKIT}.tar.gz"
        for root in (f"{DEVKIT}/", ""):
            if self.files.find(root + META) is not None:
                where = self.files.where(root.rstrip("/"))
                return where, self.files.read(root + META), self.files.read(root + TRUTH)
        where = self.files.where(archive)
        if self.files.find(archive) is None:
            raise DataError(
                f"{where} does not exist, nor the folder {DEVKIT}: the labels of the validation "
                f"images are in it; {AS_DISTRIBUTED}"
            )
        data = unpacked_gzip(self.files.read(archive), where)
        held = {member.name: member for member in members(Held(data), where)}
        found = []
        for name in (META, TRUTH):
            member = held.get(f"{DEVKIT}/{name}") or held.get(name)
            if member is None:
                raise DataError(f"{where} holds no {name}: {AS_DISTRIBUTED}")
            found.append(data[member.offset : member.offset + member.size])
        return where, found[0], found[1]


def _synset_of(part: Part) -> str | None:
    """The synset of a part of the training tar; None for the validation tar."""
    name = SYNSET.fullmatch(part.name.removeprefix(f"{TRAIN}/"))
    return name[1] if name else None


def _label(line: str, synsets: dict[int, str], number: dict[str, int], where: str) -> int:
    synset = synsets.get(int(line)) if line.isdecimal() else None
    if synset is None:
        raise DataError(f"{where} says {line[:40]!r}, which is no id of {META}: {AS_DISTRIBUTED}")
    if synset not in number:
        raise DataError(
            f"{where} says {line}, which is synset {synset}, but {TRAIN} has no {synset}.tar: "
            f"{AS_DISTRIBUTED}"
        )
    return number[synset]


def unpacked_gzip(data: bytes, where: str) -> bytes:
    """Bytes of a .gz. Raises DataError, also where they would fill the memory."""
    try:
        with gzip.open(io.BytesIO(data)) as file:
            found = file.read(LARGEST_DEVKIT_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{where} cannot be unpacked ({error}): copy it again") from error
    if len(found) > LARGEST_DEVKIT_BYTES:
        raise DataError(
            f"{where} has more than {LARGEST_DEVKIT_BYTES} bytes unpacked: {AS_DISTRIBUTED}"
        )
    return found


def synsets_of(meta: bytes, where: str) -> dict[int, str]:
    """Devkit id -> WordNet id, from the bytes of meta.mat. Raises DataError."""
    try:
        pairs = struct_fields(meta, where, name="synsets", fields=("ILSVRC2012_ID", "WNID"))
    except DataError as error:
        raise DataError(f"{where} is no table of synsets: {error}") from error
    synsets: dict[int, str] = {}
    for number, synset in pairs:
        whole = isinstance(number, float) and number.is_integer() and number > 0
        named = isinstance(synset, str) and SYNSET.fullmatch(f"{synset}.tar") is not None
        if not whole or not named or int(number) in synsets or synset in synsets.values():
            raise DataError(
                f"{where} has synset {synset!r} with id {number!r}; ids are different whole "
                f"numbers, synsets like n01440764: {AS_DISTRIBUTED}"
            )
        synsets[int(number)] = str(synset)
    return synsets


# -- labels that a source writes ----------------------------------------------------------------

NUMBER = re.compile(r"0|[1-9][0-9]*", re.ASCII)
NEGATIVE = re.compile(r"-[0-9]+", re.ASCII)
LONGEST_LABEL = 200


def labelled(labels: Sequence[str], where: str) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """Classes and the label of each image (N,), from what a source writes.

    Numbers must be 0 to the largest, each of them there, and name their classes themselves; names
    are sorted. Raises DataError where some are numbers and some are names.
    """
    names = sorted(set(labels))
    odd = [name for name in names if len(name) > LONGEST_LABEL or NEGATIVE.fullmatch(name)]
    if odd:
        raise DataError(
            f"{where} has the label {odd[0][:80]!r}, which is no class (a negative number stands "
            f"for none, {LONGEST_LABEL} characters are the most): leave such images out"
        )
    numbers = [name for name in names if NUMBER.fullmatch(name)]
    if numbers and len(numbers) < len(names):
        odd = next(name for name in names if not NUMBER.fullmatch(name))
        raise DataError(
            f"{where} has the labels {numbers[0]!r} and {odd[:80]!r}: all must be numbers from 0, "
            "or all names of classes"
        )
    if numbers:
        names = [str(i) for i in range(len(names))]
        missing = sorted(set(names) - set(numbers), key=int)
        if missing:
            largest = max(numbers, key=int)
            raise DataError(
                f"{where} has labels up to {largest[:20]}, but no image of class {missing[0]}: "
                "number the classes from 0 with none left out"
            )
    number = {name: label for label, name in enumerate(names)}
    return tuple(names), np.array([number[label] for label in labels], dtype=np.int32)


# -- WebDataset ---------------------------------------------------------------------------------

CODE = (".pyd", ".pkl", ".pickle", ".pth", ".pt")
"""Members that other readers unpickle, which runs whatever they hold."""


class WebDataset(FileLayout):
    """Tars of samples, ``<key>.<image suffix>`` and ``<key>.cls`` (or ``.json`` with a label).

    The key is the name up to the first dot after the last "/". Members of a sample lie side by
    side. Other members (texts, boxes) and names that begin with a dot are passed over.
    """

    def parts(self, remember: Remember) -> list[Part]:
        """The tars."""
        tars = self.files.tree([".tar"]).files
        if not tars:
            raise DataError(f"{self.files.where()} holds no .tar: give the folder of the tars")
        return [Part(tar.path, (tar,), 0, tar.size_bytes) for tar in tars]

    def raw(self, part: Part) -> Iterator[Raw]:
        """The samples of one tar."""
        where = self.files.where(part.name)
        window = Window(self.files, part.name, part.start, part.end)
        seen: set[str] = set()
        sample: dict[str, tuple[Member, bytes]] = {}
        last = None
        for member in members(window, where):
            if PurePosixPath(member.name).name.startswith("."):
                continue
            key, suffix = _sample_of(member.name)
            if suffix.endswith(CODE):
                raise DataError(
                    f"{where}: {member.name!r} is of a kind that other programs run when they "
                    "read it: remove it"
                )
            if key != last and last is not None:
                yield _sample(sample, last, where)
            if key != last:
                sample, last = {}, key
                if key in seen:
                    raise DataError(f"{where}: sample {key!r} is there twice: rename one of them")
                seen.add(key)
            if suffix in FORMATS or suffix in (".cls", ".json"):
                sample[suffix] = (member, _of_sample(window, member, suffix, where))
        if last is not None:
            yield _sample(sample, last, where)

    def found(self, parts: Sequence[Part], tables: Sequence[Table]) -> Found:
        """All samples of all tars."""
        classes, labels = labelled(_chained(tables, "labels"), self.files.address)
        named = zip(parts, tables, strict=True)
        keys = [
            checked_path(f"{part.name}/{name}", self.files.where())
            for part, table in named
            for name in table.names
        ]
        return Found(classes, keys, labels, _places(parts, tables))


def _sample_of(name: str) -> tuple[str, str]:
    """Key and suffix of a member: the name up to the first dot of its last part, and the rest."""
    folder, slash, last = name.rpartition("/")
    first, dot, rest = last.partition(".")
    return f"{folder}{slash}{first}", f"{dot}{rest}".lower()


def _of_sample(window: Window, member: Member, suffix: str, where: str) -> bytes:
    if suffix not in FORMATS and member.size > LARGEST_LABEL_BYTES:
        raise DataError(
            f"{where}: {member.name!r} has {member.size} bytes, {LARGEST_LABEL_BYTES} are the most "
            "for a label: make it smaller"
        )
    return _taken(window, member, where)


def _sample(sample: dict[str, tuple[Member, bytes]], key: str, where: str) -> Raw:
    """The image of a sample, with its label."""
    images = [suffix for suffix in sample if suffix in FORMATS]
    if len(images) != 1:
        raise DataError(
            f"{where}: sample {key!r} has {len(images)} images ({', '.join(FORMATS)}); it must "
            "have one: remove the sample, or mend it"
        )
    label = _written_label({s: data for s, (_, data) in sample.items()}, key, where)
    member, data = sample[images[0]]
    return Raw(member.name, label, member.offset, member.size, functools.partial(bytes, data))


def _written_label(sample: dict[str, bytes], key: str, where: str) -> str:
    """Text of the .cls, or else what "label" says in the .json."""
    label: Any = None
    try:
        if ".cls" in sample:
            label = sample[".cls"].decode().strip()
        elif ".json" in sample:
            label = json.loads(sample[".json"])["label"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        label = error
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    if not isinstance(label, str) or not label or not label.isprintable():
        raise DataError(
            f"{where}: sample {key!r} has no label ({label!r:.100}); its .cls must hold a number "
            'or the name of a class, or its .json {"label": …}: add it, or remove the sample'
        )
    return label


# -- parquet ------------------------------------------------------------------------------------


class Parquet(FileLayout):
    """Parquet files with a column of image bytes and one of labels, one image a row."""

    def __init__(self, config: SourceConfig, files: Files) -> None:
        super().__init__(config, files)
        self._rows = Rows(files, config.image_column, config.label_column)

    def parts(self, remember: Remember) -> list[Part]:
        """The files."""
        found = self.files.tree([".parquet"]).files
        if not found:
            raise DataError(f"{self.files.where()} holds no .parquet: give the folder of the files")
        return [Part(file.path, (file,)) for file in found]

    def raw(self, part: Part) -> Iterator[Raw]:
        """The rows of one file."""
        for row, (image, label) in enumerate(self._rows.all(part.files[0].path)):
            yield Raw(f"{row}", label, row, len(image), functools.partial(bytes, image))

    def found(self, parts: Sequence[Part], tables: Sequence[Table]) -> Found:
        """All rows of all files."""
        classes, labels = labelled(_chained(tables, "labels"), self.files.address)
        named = zip(parts, tables, strict=True)
        keys = [f"{part.name}/{name}" for part, table in named for name in table.names]
        return Found(classes, keys, labels, _places(parts, tables))

    def read(self, key: str, place: Place | None) -> bytes:
        """The bytes in a row."""
        if place is None:
            raise DataError(f"the listing does not say where {key!r} lies: list the source again")
        return self._rows.one(place.file, place.offset)
