"""The part of a report's page on what lies out of distribution.

Every cell of the map is a drawing of its own: histograms of one score for held-out images and for
one set over common bins, on a ground that is the darker the better the two are told apart.
Called by report_page and study_page.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from eqm import page
from eqm.config import IN_DISTRIBUTION
from eqm.figures import common_edges, histogram_svg
from eqm.page import DASH, PERCENT_95
from eqm.records import OODRow
from eqm.report import ReportInput

SCORE_NAMES = {
    "gradient_norm": "gradient norm",
    "descent_length": "descent length",
    "energy": "energy",
    "pixel_gaussian": "Gaussian on pixels",
    "pixel_pca": "PCA on pixels",
    "feature_gaussian": "Gaussian on features",
    "feature_neighbours": "nearest neighbours in features",
}
ROLES = {"main": "main score", "score": "score of the model", "baseline": "baseline"}


def ood_section(report: ReportInput) -> page.Html:
    """How well other images are told from held-out ones, by the model and by baselines."""
    rows = report.evaluation.ood
    if not rows:
        return page.section("Out of distribution", "No scores: the field has no unlabelled input.")
    main = [row for row in rows if row.role == "main"]
    named = _name_of(main[0].score) if main else DASH
    note = (
        f"How well a score tells other images from held-out ones; every score is high outside. The "
        f"main score of the model is its {named}. AUROC 0.5 is chance, below it the score has the "
        f"wrong sign. AUPR and FPR95 have two definitions, by the side that is called positive: "
        f"“other” (the other images are to be found) or “held-out” (those are to be let pass). "
        f"AUPR depends on how many images of each there are. Behind each number its "
        f"{PERCENT_95} interval. Sets that only inform are read by no policy. {_beaten(rows)}"
    )
    return page.section(
        "Out of distribution",
        note,
        page.table("The main score", _heads(), [_row(row) for row in main], "numbers dense"),
        _histograms(named, report.ood_scores.get(main[0].score, {}) if main else {}),
        _map(rows, report.ood_scores),
        page.el(
            "details",
            page.el("summary", "All measures of all scores"),
            page.table("All scores", _heads(), [_row(row) for row in rows], "numbers dense"),
        ),
    )


def _name_of(score: str) -> str:
    return SCORE_NAMES.get(score, score)


def _beaten(rows: Sequence[OODRow]) -> str:
    """Which sets a baseline tells better than the main score, in words."""
    told: list[str] = []
    for main in rows:
        others = [r for r in rows if r.role == "baseline" and r.name == main.name]
        if main.role == "main" and others:
            best = max(others, key=lambda r: r.auroc)
            if best.auroc > main.auroc:
                told.append(f"{main.name} ({_name_of(best.score)}, {best.auroc:.3f})")
    if not told:
        return ""
    return f"A baseline, which knows nothing of the model, tells better: {', '.join(told)}."


def _heads() -> tuple[str, ...]:
    return (
        "set",
        "score",
        "images",
        "AUROC",
        "",
        "AUPR, other",
        "AUPR, held-out",
        "FPR95, other",
        "FPR95, held-out",
        "policy",
    )


def _row(row: OODRow) -> Sequence[page.Child]:
    counts: page.Child = page.number(row.count)
    if row.held_out is not None:
        counts = (page.number(row.count), " : ", page.number(row.held_out))
    return (
        row.name,
        f"{_name_of(row.score)} ({ROLES[row.role]})",
        counts,
        _measure(row.auroc, row.auroc_low, row.auroc_high),
        _whisker(row),
        _measure(row.aupr, row.aupr_low, row.aupr_high),
        _measure(row.aupr_in, row.aupr_in_low, row.aupr_in_high),
        _measure(row.fpr95_out, row.fpr95_out_low, row.fpr95_out_high),
        _measure(row.fpr95_in, row.fpr95_in_low, row.fpr95_in_high),
        "may read" if row.gated else "informs",
    )


def _measure(value: float | None, low: float | None, high: float | None) -> page.Child:
    if value is None:
        return DASH
    if low is None or high is None:
        return page.number(value)
    ends = page.el("span", page.number(low), " to ", page.number(high), class_="small")
    return (page.number(value), " ", ends)


def _whisker(row: OODRow) -> page.Html:
    """The interval on a line from 0 to 1, with a tick at chance."""
    low, high, at = (f"{100 * v:.2f}" for v in (row.auroc_low, row.auroc_high, row.auroc))
    line = '<line x1="{}" x2="{}" y1="7" y2="7" class="{}"/>'
    return page.Html(
        '<svg class="whisker" viewBox="-4 0 108 14" aria-hidden="true">'
        + line.format(0, 100, "axis")
        + '<line x1="50" x2="50" y1="3" y2="11" class="axis"/>'
        + line.format(low, high, "range")
        + f'<circle cx="{at}" cy="7" r="3.2"/></svg>'
    )


# -- score by set -------------------------------------------------------------------------------


def _map(rows: Sequence[OODRow], scores: Mapping[str, Mapping[str, list[float]]]) -> page.Html:
    """AUROC of every score of every set, each over the two histograms that it is the measure of."""
    names = list(dict.fromkeys(row.score for row in rows))
    sets = list(dict.fromkeys(row.name for row in rows))
    cells = {(row.score, row.name): row for row in rows}
    edges = {s: common_edges(list(scores[s].values())) for s in names if scores.get(s)}
    table = []
    for score in names:
        role = next(row.role for row in rows if row.score == score)
        head = (_name_of(score), page.el("span", f" {ROLES[role]}", class_="small"))
        table.append(
            [head, *(_cell(cells.get((score, s)), scores.get(score, {}), edges) for s in sets)]
        )
    caption = page.el(
        "p",
        page.el("span", IN_DISTRIBUTION, class_="key real"),
        page.el("span", "the set of the column", class_="key sample"),
        class_="small",
    )
    return page.el(
        "div", page.table("AUROC of scores and baselines", ("score", *sets), table, "heat"), caption
    )


def _cell(
    row: OODRow | None, scores: Mapping[str, list[float]], edges: Mapping[str, list[float]]
) -> page.Child:
    if row is None:
        return DASH
    inside, outside = scores.get(IN_DISTRIBUTION), scores.get(row.name)
    drawn = ""
    if inside and outside:
        bins = edges[row.score]
        drawn = _area(inside, bins, "inside") + _area(outside, bins, "outside")
    ground = f'<rect width="96" height="40" class="ground" fill-opacity="{_depth(row.auroc):.3f}"/>'
    svg = page.Html(
        f'<svg class="cell" viewBox="0 0 96 40" aria-hidden="true">{ground}{drawn}</svg>'
    )
    return (svg, page.number(row.auroc))


def _depth(auroc: float) -> float:
    """Opacity of the ground: none at chance and below it."""
    return 0.4 * max(0.0, 2 * auroc - 1)


def _area(values: Sequence[float], edges: Sequence[float], kind: str) -> str:
    """A histogram as a filled outline; its highest bin reaches the top."""
    counts = np.histogram(values, bins=edges)[0]
    width, top = 96 / len(counts), max(int(counts.max()), 1)
    points = [(0.0, 40.0)]
    for i, count in enumerate(counts.tolist()):
        height = 40 - 38 * count / top
        points += [(i * width, height), ((i + 1) * width, height)]
    points.append((96.0, 40.0))
    path = " ".join(f"{x:.4g},{y:.4g}" for x, y in points)
    return f'<polygon points="{path}" class="{kind}"/>'


def _histograms(title: str, scores: Mapping[str, list[float]]) -> page.Html:
    """The main score of each set beside that of held-out images."""
    inside = scores.get(IN_DISTRIBUTION, [])
    others = {name: s for name, s in sorted(scores.items()) if name != IN_DISTRIBUTION and s}
    if not inside or not others:
        return page.Html("")
    edges = common_edges([inside, *others.values()])
    drawn = [
        page.el(
            "figure",
            page.Html(
                histogram_svg(inside, s, edges, title=f"{title}, held-out and {name}", label=title)
            ),
            page.el(
                "figcaption",
                page.el("span", IN_DISTRIBUTION, class_="key real"),
                page.el("span", name, class_="key sample"),
            ),
        )
        for name, s in others.items()
    ]
    return page.el("div", drawn, class_="panels")
