"""Draw the gallery, or the pictures that are named: ``python -m bench.gallery [circle moons ...]``.

The page is written when all are drawn.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.gallery import descents, landscape, outside, page, plane, uses
from bench.gallery.drawing import Picture

FOLDER = Path("docs")
PICTURES: dict[str, Callable[[], Picture]] = {
    "circle": plane.circle_picture,
    "moons": plane.moons_picture,
    "landscape": landscape.picture,
    "proceeding": descents.proceeding,
    "adaptive": descents.adaptive,
    "composition": uses.composition,
    "cleaning": uses.cleaning,
    "inpainting": uses.inpainting,
    "outside": outside.picture,
}


def make(name: str) -> Picture:
    """Run, draw, write one picture."""
    print(f"== {name}", flush=True)
    began = time.monotonic()
    picture = PICTURES[name]()
    path = FOLDER / "gallery" / f"{picture.name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture.png)
    taken = time.monotonic() - began
    print(f"   {path}: {len(picture.png) / 1e3:.0f} kB, {taken:.0f} s", flush=True)
    return picture


def main() -> None:
    """Draw what is asked for."""
    torch.set_num_threads(1)
    names = sys.argv[1:] or list(PICTURES)
    odd = [name for name in names if name not in PICTURES]
    if odd:
        sys.exit(f"error: no picture {odd[0]!r}; there are {', '.join(PICTURES)}")
    pictures = [make(name) for name in names]
    if not sys.argv[1:]:
        (FOLDER / "gallery.md").write_text(page.markdown(pictures), encoding="utf-8")
        print(f"   {FOLDER / 'gallery.md'}")


main()
