"""What a page says of images that lie outside: every number in its place, every side in its colour.

A page is read by its columns, so a number that stands in another one is a wrong number.
"""

import re
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest

from eqm.figures import histogram_svg
from eqm.records import OODRow
from eqm.report_ood import ood_section

NUMBERS = (
    *("auroc", "auroc_low", "auroc_high"),
    *("aupr", "aupr_low", "aupr_high"),
    *("aupr_in", "aupr_in_low", "aupr_in_high"),
    *("fpr95_out", "fpr95_out_low", "fpr95_out_high"),
    *("fpr95_in", "fpr95_in_low", "fpr95_in_high"),
)
"""As the columns of a table have them."""


def row(score: str, role: Any, name: str = "gray", **changes: Any) -> OODRow:
    """All of whose numbers differ."""
    values = {of: (10 + i) / 32 for i, of in enumerate(NUMBERS)}
    given: dict[str, Any] = {**values, "count": 30, "held_out": 40, "gated": False, **changes}
    return OODRow(name=name, score=score, role=role, **given)


class Cells(HTMLParser):
    """Rows of tables by their captions: of each cell the exact numbers in it and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[tuple[list[str], str]]]] = {}
        self.caption, self.inside = "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "caption":
            self.caption, self.inside = "", "caption"
        if tag == "tr":
            self.tables.setdefault(self.caption, []).append([])
        if tag in ("td", "th"):
            self.tables[self.caption][-1].append(([], ""))
        if tag == "data":
            self.tables[self.caption][-1][-1][0].append(str(dict(attrs)["value"]))

    def handle_endtag(self, tag: str) -> None:
        self.inside = "" if tag == "caption" else self.inside

    def handle_data(self, data: str) -> None:
        if self.inside == "caption":
            self.caption += data
        elif self.tables.get(self.caption, [[]])[-1]:
            numbers, text = self.tables[self.caption][-1][-1]
            self.tables[self.caption][-1][-1] = (numbers, text + data)


def section(*rows: OODRow, **scores: dict[str, list[float]]) -> str:
    shown: Any = SimpleNamespace(evaluation=SimpleNamespace(ood=rows), ood_scores=scores)
    return str(ood_section(shown))


def test_every_number_stands_in_its_column() -> None:
    main = row("gradient_norm", "main")
    (heads, *found) = Cells(section(main)).tables["The main score"]
    named = [text for _, text in heads]
    assert named[3:5] == ["AUROC", ""]
    assert named[5:9] == ["AUPR, other", "AUPR, held-out", "FPR95, other", "FPR95, held-out"]
    (cells,) = found
    assert cells[2][0] == ["30", "40"]
    told = [number for i in (3, 5, 6, 7, 8) for number in cells[i][0]]
    assert told == [repr(getattr(main, name)) for name in NUMBERS]


def test_an_interval_is_drawn_from_end_to_end_about_its_value() -> None:
    drawn = section(row("energy", "main", auroc=0.75, auroc_low=0.5, auroc_high=0.875))
    assert '<line x1="50.00" x2="87.50" y1="7" y2="7" class="range"/>' in drawn
    assert '<circle cx="75.00"' in drawn


@pytest.mark.parametrize(("main", "baseline", "told"), [(0.8, 0.9, True), (0.9, 0.8, False)])
def test_a_baseline_that_tells_better_is_named(main: float, baseline: float, told: bool) -> None:
    rows = (
        row("gradient_norm", "main", auroc=main),
        row("pixel_pca", "baseline", auroc=baseline),
        row("pixel_gaussian", "baseline", auroc=0.1),
        # Of another set, and of the model: neither is a baseline of this one.
        row("pixel_pca", "baseline", name="other", auroc=1.0),
        row("energy", "score", auroc=1.0),
    )
    text = f"tells better: gray (PCA on pixels, {baseline:.3f})."
    assert (text in section(*rows)) == told
    assert ("tells better" in section(*rows)) == told


def test_held_out_images_lie_where_their_scores_do() -> None:
    low, high = [0.0] * 9 + [0.1], [0.9] + [1.0] * 9
    scores = {"gradient_norm": {"held-out": low, "gray": high}}
    drawn = section(row("gradient_norm", "main"), **scores)

    def places(kind: str) -> list[float]:
        """From left to right, where a filled outline of the map rises above its floor."""
        (points,) = re.findall(rf'<polygon points="([^"]*)" class="{kind}"/>', drawn)
        pairs = [tuple(map(float, pair.split(","))) for pair in points.split()]
        return [x for x, y in pairs if y < 40]

    assert 0 <= max(places("inside")) < 48 < min(places("outside")) <= 96


@pytest.mark.parametrize("auroc", [0.0, 0.3, 0.5])
def test_the_ground_of_what_tells_no_better_than_chance_is_bare(auroc: float) -> None:
    bare, dark = (section(row("energy", "main", auroc=value)) for value in (auroc, 1.0))
    assert 'class="ground" fill-opacity="0.000"' in bare
    assert 'class="ground" fill-opacity="0.400"' in dark


def test_a_histogram_has_held_out_images_in_the_colour_of_real_ones() -> None:
    svg = histogram_svg([0.0] * 5, [1.0] * 5, [0, 0.25, 0.5, 0.75, 1.0], title="t", label="s")
    middles = {}
    for path, style in re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', svg):
        colour = re.search(r"fill: var\(--(real|sample)", style)
        if colour is None:
            continue
        numbers = [float(n) for n in re.findall(r"-?[\d.]+", path)]
        points = list(zip(numbers[::2], numbers[1::2], strict=True))
        floor = max(y for _, y in points)
        high = [x for x, y in points if y < floor]
        middles[colour[1]] = sum(high) / len(high)
    assert middles["real"] < middles["sample"]
    assert len(middles) == 2
