"""Reference batches of ADM: what is read, and what is refused before it costs anything."""

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy

from eqm.adm import read_batch
from eqm.errors import DataError

IMAGES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
SIGMA = np.array([[2.0, 0.5], [0.5, 1.0]])


def npz(save: Any = np.savez, **arrays: Any) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def header(shape: tuple[int, ...], kind: str) -> bytes:
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": kind})
    return file.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_batch_is_read(save: Any, kind: Any) -> None:
    mu, sigma = np.array([1, 2], dtype=kind), SIGMA.astype(kind)
    found = read_batch(npz(save, arr_0=IMAGES, mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma), "x")
    assert np.array_equal(found.images, IMAGES)  # type: ignore[arg-type]
    for pair in (found.features, found.spatial):
        assert pair is not None
        assert pair[0].dtype == pair[1].dtype == np.float64
        assert pair[0].tolist() == [1, 2]
        assert pair[1].tolist() == SIGMA.tolist()


def test_either_half_will_do() -> None:
    assert read_batch(npz(arr_0=IMAGES), "x").features is None
    fortran = np.asfortranarray(np.array([[2.0, 0.5, 0], [0.5, 1, 0], [0, 0, 3]]))
    found = read_batch(npz(mu=np.zeros(3), sigma=fortran), "x")
    assert (found.images, found.spatial) == (None, None)
    assert found.features is not None
    assert np.array_equal(found.features[1], fortran)


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    data = npz(arr_0=np.array([Bomb(trace)], dtype=object))
    with pytest.raises(DataError, match="arr_0 is of type object"):
        read_batch(data, "x")
    assert not trace.exists()
    np.load(io.BytesIO(data), allow_pickle=True)["arr_0"]
    assert trace.exists()  # the bomb is one


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (zipped(arr_0=header((10**9, 512, 512, 3), "|u1")), "says it holds .* but there are 0"),
        (zipped(mu=header((10**12,), "<f8")), r"mu has shape .* of at most"),
        (zipped(arr_0=header((1, 9, 9, 3), "|u1") + bytes(242)), "243 bytes, but there are 242"),
        (
            zipped(arr_0=header((9, 64, 64, 3), "|u1") + bytes(9 * 64 * 64 * 3)),
            "more than 100 fold",
        ),
        (npz(arr_0=IMAGES[..., :2]), r"arr_0 has shape \(2, 4, 4, 2\), not \(N, H, H, 3\)"),
        (npz(arr_0=IMAGES[:0]), "says it holds"),
        (npz(arr_0=IMAGES.astype(np.float64)), "arr_0 is of type float64, not u1"),
        (npz(mu=np.zeros(2)), "only one of mu and sigma"),
        (npz(mu=np.zeros(3), sigma=SIGMA), r"mu has shape \(3,\), sigma \(2, 2\)"),
        (npz(mu=np.zeros(2), sigma=SIGMA * np.nan), "NaN or infinity"),
        (npz(mu=np.zeros(2), sigma=np.array([[1.0, 0.9], [0, 1]])), "not symmetric"),
        (npz(mu=np.zeros((2, 1)), sigma=SIGMA), r"mu has shape \(2, 1\); it must have 1 axes"),
        (npz(other=np.zeros(2)), "neither images"),
        (b"PK no zip", "cannot be read as"),
        (zipped(arr_0=b"\x93NUMPY"), "cannot be read as"),
        (zipped(arr_0=b"\x93NUMPY\x03\x00"), "version"),
        (
            zipped(arr_0=b"\x93NUMPY\x01\x00" + struct.pack("<H", 9) + b"__import("),
            "cannot be read",
        ),
    ],
)
def test_what_is_no_batch_is_refused_in_words(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        read_batch(data, "file.npz")
    assert str(refused.value).startswith("file.npz")


def test_a_damaged_file_is_refused() -> None:
    data = bytearray(npz(arr_0=IMAGES))
    place = data.index(IMAGES.tobytes())
    data[place] ^= 1
    with pytest.raises(DataError, match="cannot be read as"):
        read_batch(bytes(data), "x")
