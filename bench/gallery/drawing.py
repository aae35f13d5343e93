"""How the gallery draws: one style, and PNGs that depend on nothing but what is drawn."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

# Okabe and Ito's colours, which people who are colour-blind tell apart.
BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, INK, GREY = "#CC79A7", "#56B4E9", "#222222", "#8a8a8a"
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.labelsize": 10.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 10.0,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "eqm",
}
DPI = 120
GAP_PX = 1
"""Between images of a sheet, in pixels of theirs."""


@dataclass(frozen=True)
class Table:
    """What a run measured."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture and what is said of it."""

    name: str
    """Of the file, without its ending."""
    title: str
    seen: str
    """A sentence or two."""
    table: Table
    code: str
    """The lines that make it."""
    png: bytes


def drawn(draw: Callable[[Figure], None], *, width: float, height: float) -> bytes:
    """PNG of what ``draw`` puts on a figure of so many inches."""
    with matplotlib.rc_context():
        # A person's own settings must change nothing.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return _smaller(buffer.getvalue())


def _smaller(png: bytes) -> bytes:
    """The same picture without its alpha, packed as well as it can be."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def percent(share: float, *, digits: int = 0) -> str:
    """As people write it."""
    return f"{100 * share:.{digits}f} %"


# -- sheets of digits ---------------------------------------------------------------------------


def sheet(rows: Sequence[Sequence[Tensor]]) -> NDArray[np.float64]:
    """Images (1, H, W) uint8 in rows, NaN between them."""
    h, w = rows[0][0].shape[-2:]
    found = np.full(
        (len(rows) * (h + GAP_PX) - GAP_PX, len(rows[0]) * (w + GAP_PX) - GAP_PX), np.nan
    )
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = i * (h + GAP_PX), j * (w + GAP_PX)
            found[top : top + h, left : left + w] = image[0].double().numpy()
    return found


def show_sheet(
    axes: Any,
    rows: Sequence[Sequence[Tensor]],
    *,
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
) -> None:
    """Draw a sheet with names at its left and upper edge."""
    axes.imshow(sheet(rows), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    size = rows[0][0].shape[-1]
    middle = [i * (size + GAP_PX) + (size - 1) / 2 for i in range(max(len(rows), len(rows[0])))]
    axes.set_xticks(middle[: len(column_names)], column_names)
    axes.set_yticks(middle[: len(row_names)], row_names)
    axes.xaxis.set_ticks_position("top")
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0)
    for side in ("left", "bottom", "top", "right"):
        axes.spines[side].set_visible(False)
