"""The part of a report's page on what lies out of distribution. Called by report_page."""

from collections.abc import Mapping, Sequence

from eqm import page
from eqm.figures import common_edges, histogram_svg
from eqm.page import PERCENT_95
from eqm.records import OODRow
from eqm.report import ReportInput

HELD_OUT = "held-out"
"""Name of the in-distribution scores."""


def ood_section(report: ReportInput) -> page.Html:
    """A table of how well other images are told from held-out ones, and histograms of scores."""
    rows = [_ood_row(row) for row in report.evaluation.ood]
    if not rows:
        return page.section("Out of distribution", "No scores: the field has no unlabelled input.")
    note = (
        f"How well the norm of the gradient tells other images from held-out ones. AUROC with its "
        f"{PERCENT_95} interval; 0.5 is chance. AUPR: the other images are the positive class. "
        f"FPR95: share of them under the threshold that {PERCENT_95} of held-out images are under. "
        "Sets that only inform are read by no policy."
    )
    heads = ("set", "images", "AUROC", f"{PERCENT_95} interval", "", "AUPR", "FPR95", "policy")
    table = page.table("Out-of-distribution detection", heads, rows, "numbers")
    return page.section("Out of distribution", note, table, _histograms(report.ood_scores))


def _ood_row(row: OODRow) -> Sequence[page.Child]:
    interval = (page.number(row.auroc_low), " to ", page.number(row.auroc_high))
    use = "may read" if row.gated else "informs"
    values = (page.number(row.auroc), interval, _whisker(row))
    return (
        row.name,
        page.number(row.count),
        *values,
        page.number(row.aupr),
        page.number(row.fpr95_in),
        use,
    )


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


def _histograms(scores: Mapping[str, list[float]]) -> page.Html:
    inside = scores.get(HELD_OUT, [])
    others = {name: s for name, s in sorted(scores.items()) if name != HELD_OUT and s}
    if not inside or not others:
        return page.Html("")
    edges = common_edges([inside, *others.values()])
    drawn = [
        page.el(
            "figure",
            page.Html(
                histogram_svg(inside, s, edges, title=f"gradient norms, held-out and {name}")
            ),
            page.el(
                "figcaption",
                page.el("span", "held-out", class_="key real"),
                page.el("span", name, class_="key sample"),
            ),
        )
        for name, s in others.items()
    ]
    return page.el("div", drawn, class_="panels")
