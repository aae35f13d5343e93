"""Pictures of pages stay small and keep their shape."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from bench import pages


def test_a_picture_is_made_small_enough(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, size=(900, 1280, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, "PNG")
    size = pages.save(data.getvalue(), tmp_path / "new" / "noise.png")
    assert size == (tmp_path / "new" / "noise.png").stat().st_size <= pages.LARGEST_BYTES
    with Image.open(tmp_path / "new" / "noise.png") as picture:
        assert abs(picture.size[0] / picture.size[1] - 1280 / 900) < 0.02


def test_a_page_of_few_colours_keeps_its_size(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (1280, 860), "white").save(data, "PNG")
    assert pages.save(data.getvalue(), tmp_path / "x.png") < 5000
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (1280, 860)
