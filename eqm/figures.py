"""Pictures of a report: arrays in, PNG or SVG out; the same bytes for the same input.

SVG is made to be put into a page: no size, no fonts, no ids but those it uses itself, and colours
that are variables of the page (``--ink``, ``--faint``, ``--sample``, ``--real``), so that one
drawing serves light and dark. Names that others chose are in its label alone.

Legend: N images, K classes, R samples of each, C H W one image.
"""

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eqm.errors import DataError

Images = NDArray[np.uint8]

GRID_GAP_PX = 4
GRID_FONT_PX = 13
GRID_LONGEST_NAME = 24
STRIP_GAP_SHARE = 16
"""A gap of a strip is this part of a cell."""

# Colours are drawn as these and replaced by variables: a fallback serves a drawing without a page.
INK, FAINT, SAMPLE, REAL = "#010101", "#020202", "#030303", "#040404"
VARIABLES = {
    INK: "var(--ink, #333)",
    FAINT: "var(--faint, #888)",
    SAMPLE: "var(--sample, #4454c8)",
    REAL: "var(--real, #b06a00)",
}
SETTINGS = {
    "svg.fonttype": "none",
    "font.size": 7.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.size": 0.0,
    "xtick.minor.bottom": False,
    "ytick.minor.left": False,
}
LOG_FROM_RATIO = 20
"""Positive values whose largest is so many times the smallest are drawn on a logarithmic axis."""
BINS = 48
LEGEND_SHARE = 0.25
"""Room above lines for their names, as a share of the height."""


# -- PNG ----------------------------------------------------------------------------------------


def sample_grid(images: Images, class_names: Sequence[str], scale: int) -> bytes:
    """PNG of images (K, R, C, H, W), a labelled row for each class, each pixel ``scale`` wide.

    The last cell ends a gap (GRID_GAP_PX) before the right and lower edge; names are to the left.
    Raises DataError for images that are not uint8 with 1 or 3 channels.
    """
    from PIL import Image, ImageDraw, ImageFont

    check_images(images, 5, "sample grid")
    if len(class_names) != len(images):
        raise DataError(f"a grid of {len(images)} classes was given {len(class_names)} names")
    k, r = images.shape[:2]
    h, w = (side * scale + GRID_GAP_PX for side in images.shape[3:])
    font = ImageFont.load_default(GRID_FONT_PX)
    names = [_printable(name) for name in class_names]
    left = 2 * GRID_GAP_PX + int(max((font.getlength(name) for name in names), default=0))
    sheet = Image.new("RGB", (left + r * w + GRID_GAP_PX, k * h + GRID_GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for row in range(k):
        top = GRID_GAP_PX + row * h
        middle = (left - GRID_GAP_PX, top + (h - GRID_GAP_PX) // 2)
        draw.text(middle, names[row], fill="#333333", font=font, anchor="rm")
        for column in range(r):
            cell = _enlarged(images[row, column], scale)
            sheet.paste(Image.fromarray(cell), (left + GRID_GAP_PX + column * w, top))
    return _png(sheet)


def strip_png(images: Images, *, cell_px: int, down: bool = False) -> bytes:
    """PNG of images (N, C, H, W) side by side, or below each other, with clear gaps between.

    Small images are enlarged by whole pixels, large ones averaged down, to at most ``cell_px``.
    """
    from PIL import Image

    cells = [_fitted(image, cell_px) for image in images]
    gap = max(1, cell_px // STRIP_GAP_SHARE)
    h, w = cells[0].shape[:2]
    step = (0, h + gap) if down else (w + gap, 0)
    last = (step[0] * (len(cells) - 1), step[1] * (len(cells) - 1))
    sheet = Image.new("RGBA", (last[0] + w, last[1] + h))
    for i, cell in enumerate(cells):
        sheet.paste(Image.fromarray(cell), (i * step[0], i * step[1]))
    return _png(sheet)


def check_images(images: Images, dimensions: int, what: str) -> None:
    """Refuse arrays that are not images. Raises DataError."""
    channels = images.shape[-3] if images.ndim >= 3 else 0
    if images.dtype != np.uint8 or images.ndim != dimensions or channels not in (1, 3):
        raise DataError(
            f"{what}: images are {images.dtype} {images.shape}; they must be uint8, "
            f"{dimensions} dimensions, 1 or 3 channels before height and width"
        )
    if 0 in images.shape:
        raise DataError(f"{what}: there are no images in an array of shape {images.shape}")


def _printable(name: str) -> str:
    clean = "".join(c if c.isprintable() else "?" for c in name)
    return clean if len(clean) <= GRID_LONGEST_NAME else clean[: GRID_LONGEST_NAME - 1] + "…"


def _enlarged(image: Images, scale: int) -> Images:
    """(C, H, W) -> (H * scale, W * scale, 3), nearest neighbour."""
    pixels = np.broadcast_to(image.transpose(1, 2, 0), (*image.shape[1:], 3))
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def _fitted(image: Images, cell_px: int) -> Images:
    from PIL import Image

    side = max(image.shape[1:])
    pixels = _enlarged(image, max(1, cell_px // side))
    if side <= cell_px:
        return pixels
    h, w = (max(1, round(n * cell_px / side)) for n in image.shape[1:])
    return np.asarray(Image.fromarray(pixels).resize((w, h), Image.Resampling.BOX))


def _png(sheet: Any) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


# -- SVG ----------------------------------------------------------------------------------------


def curve_svg(
    x: Sequence[float], y: Sequence[float], *, title: str, x_label: str, y_label: str
) -> str:
    """One line; logarithmic upwards where the values span more than LOG_FROM_RATIO."""

    def draw(axes: Any) -> None:
        axes.plot(x, y, color=SAMPLE, linewidth=1.4, marker="o" if len(x) == 1 else None)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _short_ticks(axes.xaxis)
        if _spans_orders(y):
            _logarithmic(axes, "y")
        else:
            _short_ticks(axes.yaxis)

    return _svg(draw, title)


Panel = tuple[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]
"""Title -> lines by name, each (x, y)."""


def panels_png(
    panels: Sequence[Panel],
    *,
    x_label: str,
    marks: Sequence[float] = (),
    logarithmic: Sequence[str] = (),
) -> bytes:
    """PNG of small plots, two a row.

    ``marks`` are places on the x axis where something happened: a dashed line in each plot. Those
    of ``logarithmic`` titles are so upwards where their values span orders of magnitude.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: dict[Any, Any] = {**SETTINGS, "axes.edgecolor": "#888", "grid.color": "#888"}
        matplotlib.rcParams.update(settings)
        rows = -(-len(panels) // 2)
        figure = Figure(figsize=(8.4, 2.2 * rows), layout="constrained", dpi=150)
        for at, (title, lines) in enumerate(panels):
            axes = figure.add_subplot(rows, 2, at + 1)
            for name, (x, y) in lines.items():
                main = name == title
                colour = "#333333" if main else None
                axes.plot(x, y, label=name, color=colour, linewidth=1.6 if main else 1.0)
            for mark in marks:
                axes.axvline(mark, color="#b06a00", linewidth=0.7, linestyle="--")
            axes.set_title(title, fontsize=8)
            axes.set_xlabel(x_label)
            _short_ticks(axes.xaxis)
            values = [value for _, y in lines.values() for value in y]
            if title in logarithmic and _spans_orders(values):
                _logarithmic(axes, "y")
            else:
                _short_ticks(axes.yaxis)
            if len(lines) > 1:
                low, high = axes.get_ylim()
                axes.set_ylim(low, high + LEGEND_SHARE * (high - low))
                axes.legend(fontsize=6, frameon=False, loc="upper right", ncol=3)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def histogram_svg(
    inside: Sequence[float],
    outside: Sequence[float],
    edges: Sequence[float],
    *,
    title: str,
    label: str,
) -> str:
    """Scores of held-out images and of others over common bins, as shares of each set."""

    def draw(axes: Any) -> None:
        for scores, colour in ((inside, REAL), (outside, SAMPLE)):
            share = np.full(len(scores), 1 / max(1, len(scores)))
            style = {"histtype": "stepfilled", "linewidth": 1.2, "edgecolor": colour}
            axes.hist(scores, bins=edges, weights=share, facecolor=(colour, 0.35), **style)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel(label)
        axes.set_ylabel("share of images")
        if _is_geometric(edges):
            _logarithmic(axes, "x")
        else:
            _short_ticks(axes.xaxis)

    return _svg(draw, title)


def common_edges(scores: Sequence[Sequence[float]]) -> list[float]:
    """Edges of bins that serve all sets; geometric where the scores span orders of magnitude."""
    whole = np.concatenate([np.asarray(s, dtype=np.float64) for s in scores])
    low, high = float(whole.min()), float(whole.max())
    if low == high:
        margin = max(abs(low), 1.0) / 2
        low, high = low - margin, high + margin
    space = np.geomspace if _spans_orders([low, high]) else np.linspace
    return space(low, high, BINS + 1).tolist()


def _spans_orders(values: Sequence[float]) -> bool:
    low = min(values)
    return low > 0 and max(values) / low > LOG_FROM_RATIO


def _is_geometric(edges: Sequence[float]) -> bool:
    return _spans_orders([edges[0], edges[-1]])


def _logarithmic(axes: Any, side: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    (axes.set_xscale if side == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_short)


def _short_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=5))
    axis.set_major_formatter(_short)


def _short(value: float, _: int) -> str:
    """40000 -> 40k, as people write it."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:.4g}"


def _svg(draw: Callable[[Any], None], title: str) -> str:
    return figure_svg(lambda figure: draw(figure.add_subplot()), title, size=(4.2, 2.35))


def figure_svg(draw: Callable[[Any], None], title: str, *, size: tuple[float, float]) -> str:
    """What ``draw`` puts on an empty matplotlib figure of so many inches, in the colours above."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        # A person's own matplotlib settings must not change a sealed report.
        matplotlib.rcdefaults()
        # The salt makes ids that differ between the drawings of a page.
        settings: dict[Any, Any] = {**SETTINGS, "svg.hashsalt": title}
        matplotlib.rcParams.update(settings)
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Type", "Format"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return _for_a_page(buffer.getvalue().decode(), title)


def _for_a_page(svg: str, title: str) -> str:
    svg = svg[svg.index("<svg ") :].strip()
    # matplotlib's style rule would hold for the whole page.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([^\")]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r' (transform="rotate\(-0 [^"]*"|xmlns(:xlink)?="[^"]*")', "", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for drawn, variable in VARIABLES.items():
        svg = svg.replace(drawn, variable)
    label = html.escape(title)
    box = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg role="img" aria-label="{label}" {box[0] if box else ""}>'
    svg = re.sub(r"<svg [^>]*>", lambda _: opening, svg, count=1)
    return svg.replace("xlink:href", "href")
