"""Reference batches in the format of ADM (guided-diffusion), as the field hands them around: .npz.

They hold ``arr_0``, images (N, H, W, 3) uint8, and often moments of all training images under
Inception: ``mu`` and ``sigma`` of its features, ``mu_s`` and ``sigma_s`` of spatial ones. A file is
read only after its digest was checked, never unpickled, and nothing is allocated on the word of a
header alone.
"""

import io
import math
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from eqm.errors import DataError

LARGEST_SIDE_PX = 4096
MOST_IMAGES = 200_000
MOST_BYTES = 2**34
"""Of one array; ADM's largest, 10,000 images of 512 px, has 7.9e9."""
MOST_EXPANSION = 100
"""Of a compressed array over its bytes in the file: images and covariances are far from it."""
MOST_DIMENSIONS = 16_384

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class AdmBatch:
    """What a file holds."""

    images: NDArray[np.uint8] | None
    """(N, H, W, 3)"""
    features: tuple[Array, Array] | None
    """Mean (D,) and covariance (D, D)."""
    spatial: tuple[Array, Array] | None


def read_batch(data: bytes, where: str) -> AdmBatch:
    """Read a file whose digest was checked. Raises DataError for anything else than a batch."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            images = _images(archive, where)
            features = _moments(archive, "mu", "sigma", where)
            spatial = _moments(archive, "mu_s", "sigma_s", where)
    except (
        *(zipfile.BadZipFile, zlib.error, NotImplementedError),
        # What numpy lets through of a header that is no Python literal.
        *(ValueError, SyntaxError, tokenize.TokenError, EOFError, OSError),
    ) as error:
        raise DataError(f"{where} cannot be read as .npz ({error}): fetch it again") from error
    if images is None and features is None:
        raise DataError(
            f"{where} holds neither images (arr_0) nor moments (mu, sigma): give a reference batch "
            "of ADM"
        )
    return AdmBatch(images, features, spatial)


def _images(archive: zipfile.ZipFile, where: str) -> NDArray[np.uint8] | None:
    found = _array(archive, "arr_0", where, kinds="u1", axes=4)
    if found is None:
        return None
    count, height, width, channels = found.shape
    fits = 0 < count <= MOST_IMAGES and 0 < height == width <= LARGEST_SIDE_PX and channels == 3
    if not fits:
        raise DataError(f"{where}: arr_0 has shape {found.shape}, not (N, H, H, 3)")
    return found


def _moments(
    archive: zipfile.ZipFile, mean: str, covariance: str, where: str
) -> tuple[Array, Array] | None:
    mu = _array(archive, mean, where, kinds="f4 f8", axes=1, longest=MOST_DIMENSIONS)
    sigma = _array(archive, covariance, where, kinds="f4 f8", axes=2, longest=MOST_DIMENSIONS)
    if (mu is None) != (sigma is None):
        raise DataError(f"{where} holds only one of {mean} and {covariance}: give a whole file")
    if mu is None or sigma is None:
        return None
    if sigma.shape != (len(mu), len(mu)) or not len(mu):
        raise DataError(f"{where}: {mean} has shape {mu.shape}, {covariance} {sigma.shape}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise DataError(f"{where}: {mean} or {covariance} hold NaN or infinity: fetch it again")
    wide = sigma.astype(np.float64)
    if not np.allclose(wide, wide.T, rtol=1e-4, atol=1e-6 * float(np.abs(wide).max())):
        raise DataError(f"{where}: {covariance} is not symmetric, so it is no covariance")
    return mu.astype(np.float64), (wide + wide.T) / 2


def _array(
    archive: zipfile.ZipFile,
    name: str,
    where: str,
    *,
    kinds: str,
    axes: int,
    longest: int | None = None,
) -> NDArray[Any] | None:
    """An array of the archive, None if it is not there; its header must agree with its size."""
    member = f"{name}.npy"
    if member not in archive.namelist():
        return None
    info = archive.getinfo(member)
    size = info.file_size
    if size > MOST_EXPANSION * max(info.compress_size, 1):
        raise DataError(
            f"{where}: {name} would grow from {info.compress_size} to {size} bytes, more than "
            f"{MOST_EXPANSION} fold: this is no reference batch"
        )
    with archive.open(member) as file:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise DataError(f"{where}: {name} is of .npy version {version}, not 1.0 or 2.0")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)
        _check_header(f"{where}: {name}", shape, dtype, kinds, axes, longest)
        count = math.prod(shape)
        expected = count * dtype.itemsize
        # Of a compressed member this is what the archive says it holds: both must lie alike.
        if not 0 < expected == size - file.tell() <= MOST_BYTES:
            raise DataError(
                f"{where}: {name} says it holds {shape} {dtype}, {expected} bytes, but there are "
                f"{size - file.tell()}; fetch the file again"
            )
        data = file.read(expected)
    if len(data) != expected:
        raise DataError(f"{where}: {name} ends after {len(data)} of {expected} bytes")
    flat = np.frombuffer(data, dtype=dtype, count=count)
    return flat.reshape(shape, order="F" if fortran else "C")


def _check_header(
    place: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    kinds: str,
    axes: int,
    longest: int | None,
) -> None:
    if dtype.hasobject or dtype.str[1:] not in kinds.split():
        raise DataError(f"{place} is of type {dtype}, not {kinds.replace(' ', ' or ')}")
    wrong = len(shape) != axes or any(n < 0 for n in shape)
    if wrong or (longest is not None and max(shape) > longest):
        limit = f" of at most {longest}" if longest else ""
        raise DataError(f"{place} has shape {shape}; it must have {axes} axes{limit}")
