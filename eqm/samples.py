"""A sealed set of samples: which sample lies where in it, and how it leaves as a file of the field.

Samples are sealed in parts of one batch, each a table (activations, labels, what the descent cost)
and, where images are kept, the images. Nothing here needs more of them in memory than it returns.
Written by eqm.generate; read by evaluate, reports and people.
"""

import contextlib
import functools
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from eqm.checkpoint import tensors_from_bytes
from eqm.config import GenerateConfig
from eqm.disk import disk_errors, written_aside
from eqm.errors import DataError
from eqm.randomness import Stream, bits
from eqm.records import Record, from_json
from eqm.storage import Store

IMAGES = "images"
NPY = "arr_0.npy"
"""Where the programs of the field look for images in an .npz."""
NPY_LABELS = "arr_1.npy"
ROUNDING_LEVELS = 2
"""Of 255, that a pixel may differ by where a batch was another."""
ROUNDING_OF_FEATURES = 0.02
"""Of their norm: what such pixels do to features. Those of another sample are about a norm away."""
ZIP_DATE = (1980, 1, 1, 0, 0, 0)
"""Of every member: equal samples make equal files."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A run of consecutive samples."""

    number: int
    first: int
    """Index of its first sample; its seed is first_seed + first."""
    count: int

    @property
    def table(self) -> str:
        """Name of its table among the outputs of a record."""
        return f"samples-{self.number:06d}.safetensors"

    @property
    def images(self) -> str:
        """Name of its images among the outputs of a record."""
        return f"{IMAGES}-{self.number:06d}.safetensors"


def parts_of(config: GenerateConfig) -> list[Part]:
    """Cut the samples into parts of one batch."""
    size = config.sampler.batch_size
    starts = range(0, config.samples, size)
    return [
        Part(number=i, first=s, count=min(size, config.samples - s)) for i, s in enumerate(starts)
    ]


def labels_of(config: GenerateConfig, seeds: Sequence[int], classes: int) -> Tensor:
    """Labels of samples, (B,) int64: functions of their seeds; 0 where there are no classes."""
    numbers = torch.tensor(list(seeds), dtype=torch.int64)
    if config.labels == "random":
        # The high half of a product: exact, and uneven by less than classes / 2**32.
        return (bits(0, Stream.SAMPLE_LABEL, numbers, 1)[:, 0] * classes) >> 32
    return numbers % max(1, classes)


def config_of(record: Record) -> GenerateConfig:
    """What a record of samples was asked for. Raises DataError for another record."""
    if record.stage != "samples":
        raise DataError(
            f"{record.stage} {record.digest[:12]} is no set of samples: give <store>/samples/"
            "<digest>"
        )
    return from_json(GenerateConfig, record.config["generate"], "samples")


# -- reading ------------------------------------------------------------------------------------


def columns(store: Store, record: Record, *names: str) -> dict[str, Tensor]:
    """What is known of all samples but their images, each (N, ...), in the order of the seeds.

    With ``names`` only those of it: features of many samples are large.
    """
    tables = [
        {name: table[name] for name in names or table}
        for part in parts_of(config_of(record))
        for table in [_read(store, record, part.table)]
    ]
    return {name: torch.cat([table[name] for table in tables]) for name in tables[0]}


def kept_images(store: Store, record: Record) -> Iterator[Tensor]:
    """The kept images, uint8 (B, C, H, W), part by part: those of the first seeds."""
    for part in parts_of(config_of(record)):
        if part.images in record.outputs:
            yield _read(store, record, part.images)[IMAGES]


def kept(store: Store, record: Record, seeds: Sequence[int]) -> dict[str, Tensor]:
    """What is sealed of some samples, (K, ...) each; images only where those of all are kept.

    Raises DataError for seeds that are not among the samples.
    """
    config = config_of(record)
    read = functools.cache(functools.partial(_read, store, record))
    rows: list[dict[str, Tensor]] = []
    for seed in seeds:
        part = part_of(config, seed)
        at = seed - config.first_seed - part.first
        row = {name: value[at] for name, value in read(part.table).items()}
        # The last part that keeps any images may not keep all of its own.
        if part.images in record.outputs and at < len(read(part.images)[IMAGES]):
            row[IMAGES] = read(part.images)[IMAGES][at]
        rows.append(row)
    names = set(rows[0]).intersection(*rows)
    return {name: torch.stack([row[name] for row in rows]) for name in sorted(names)}


def part_of(config: GenerateConfig, seed: int) -> Part:
    """The part in which the sample of a seed lies. Raises DataError."""
    index = seed - config.first_seed
    if not 0 <= index < config.samples:
        last = config.first_seed + config.samples - 1
        raise DataError(f"seed {seed} is not among the samples: {config.first_seed} to {last} are")
    return parts_of(config)[index // config.sampler.batch_size]


def _read(store: Store, record: Record, name: str) -> dict[str, Tensor]:
    return tensors_from_bytes(store.get(record.outputs[name]))


# -- comparing ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a sample that was made again is from the sealed one."""

    bits: bool
    """Whether any bit differs, of the image or of its row in the table."""
    levels: int | None
    """Largest difference of a pixel value, of 255; None where the image was not kept."""
    values: int | None
    """How many pixel values differ."""
    features: float
    """Distance of the features over the norm of the sealed ones."""

    @property
    def is_rounding(self) -> bool:
        """Whether it is no more than another order of additions makes."""
        return (self.levels or 0) <= ROUNDING_LEVELS and self.features <= ROUNDING_OF_FEATURES


def difference(made: dict[str, Tensor], sealed: dict[str, Tensor]) -> Difference:
    """Compare one sample, as a row of :func:`kept` and of eqm.generate.remake."""
    levels = values = None
    if IMAGES in sealed:
        apart = (made[IMAGES].int() - sealed[IMAGES].int()).abs()
        levels, values = int(apart.max()), int((apart > 0).sum())
    features = sealed["features"].double()
    distance = (made["features"].double() - features).norm() / features.norm().clamp_min(1e-12)
    return Difference(
        bits=any(not torch.equal(made[name], value) for name, value in sealed.items()),
        levels=levels,
        values=values,
        features=float(distance),
    )


# -- writing ------------------------------------------------------------------------------------


def export_npz(store: Store, record: Record, to: Path, *, count: int | None = None) -> int:
    """Write the first ``count`` kept images (all unless given) as an .npz; returns how many.

    As ADM's evaluator reads it: ``arr_0`` uint8 (N, H, W, 3), gray images three times the same;
    ``arr_1`` int64 (N,) holds labels, as ADM's sampler writes them. The file appears when it is
    whole. Raises DataError where fewer images are kept than are asked for.
    """
    config = config_of(record)
    wanted, there = count or config.samples, int(record.values["images_kept"])
    if wanted > there:
        raise DataError(
            f"samples {record.digest[:12]} keep {there} of their {config.samples} images, and "
            f"{wanted} are asked for: ask for {there} (--count), or set generate.keep_images to "
            f"{wanted} and generate again"
        )
    folder = to.absolute().parent
    if not folder.is_dir():
        raise DataError(f"{to} cannot be written: there is no folder {folder}")
    with disk_errors(str(to)), written_aside(folder) as (file, aside):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            _write_images(archive, _first(kept_images(store, record), wanted), wanted)
            with _member(archive, NPY_LABELS) as member:
                labels = columns(store, record, "labels")["labels"][:wanted].numpy()
                np.lib.format.write_array(member, labels, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
        aside.chmod(0o644)
        aside.replace(to)
    return wanted


def _write_images(archive: zipfile.ZipFile, batches: Iterator[Tensor], count: int) -> None:
    with _member(archive, NPY) as member:
        for number, batch in enumerate(batches):
            # RGB is what the field compares: a gray image is one of three equal channels.
            pixels = batch.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
            if number == 0:
                shape = (count, *pixels.shape[1:])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
            member.write(pixels.data)


@contextlib.contextmanager
def _member(archive: zipfile.ZipFile, name: str) -> Iterator[IO[bytes]]:
    with archive.open(zipfile.ZipInfo(name, ZIP_DATE), "w", force_zip64=True) as member:
        yield member


def _first(batches: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    """So many images of all batches."""
    for batch in batches:
        if count <= 0:
            return
        yield batch[:count]
        count -= len(batch)
