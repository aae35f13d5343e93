"""A study for people: Markdown with its table, an SVG that stands alone, and JSON of both.

The same bytes for the same record. What was published is drawn in a panel and a column of its own,
under a heading that says that it is of another protocol. Called by flows.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from eqm.config import StudyRow, StudyStage
from eqm.figures import FAINT, INK, REAL, SAMPLE, figure_svg
from eqm.records import Estimate, Record, StudyTable, from_json, to_json
from eqm.report_ood import SCORE_NAMES
from eqm.study_table import MAIN, table_of

SCHEMA = 1
"""Of the JSON."""
HEADS = {
    "distance": "FD",
    "distance_endless": "FD, endless",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "label_agreement": "read as their class",
}
MINUS = "\N{MINUS SIGN}"
ROW_INCHES = 0.27
SERIES_APART = 0.018
"""Of the width of a picture with lines."""
LIGHT = "--ink: #333; --faint: #888; --sample: #4454c8; --real: #b06a00"
DARK = "--ink: #ddd; --faint: #999; --sample: #93a4ff; --real: #f0a94b"


def render(record: Record, seconds: Sequence[float | None], *, picture: str) -> dict[str, bytes]:
    """Suffix -> bytes: "md", "svg" and "json". ``picture`` is how the page calls the SVG.

    ``seconds``: mean wall-clock of each row's sampler, from the log of the record.
    """
    asked = from_json(StudyStage, record.config, f"study {record.digest[:12]}")
    table = table_of(record)
    whole = {
        "schema": SCHEMA,
        "study": record.digest,
        "content": record.content,
        "asked": to_json(asked),
        "table": to_json(table),
        "seconds": list(seconds),
        "evaluations": {name: ref.digest for name, ref in sorted(record.inputs.items())},
    }
    return {
        "md": "\n".join(_markdown(record, asked, table, seconds, picture)).encode(),
        "svg": _standing_alone(draw(asked, table)).encode(),
        "json": json.dumps(whole, indent=1, sort_keys=True).encode() + b"\n",
    }


# -- words and tables ---------------------------------------------------------------------------


def _markdown(
    record: Record,
    asked: StudyStage,
    table: StudyTable,
    seconds: Sequence[float | None],
    picture: str,
) -> Iterator[str]:
    name = table.names[MAIN]
    yield from (f"# {asked.title}", "", asked.asks, "", f"![{name} of each row]({picture})", "")
    yield from _verdict(table)
    yield from ("## Numbers", "", *_numbers(asked, table, seconds), "")
    beside = _beside(table)
    floor = "" if beside is None else f" Real held-out images have {_figure(beside)}."
    yield f"FD is {name}: lower is better.{floor} {_intervals(table.seeds)}"
    yield ""
    yield from _failures(table)
    if any(row.published is not None for row in asked.rows) or asked.others:
        yield (
            f"**Published** figures are of another protocol: {asked.published_as}. Data, models, "
            "features and numbers of samples differ from those here, so only the order of rows "
            "can be held against ours, and no figure against another."
        )
        yield ""
    for note in asked.notes:
        yield f"* {note}"
    if table.outliers:
        yield from ("", "## Out of distribution", "", *_outliers(table))
    yield from ("", "## What was run", "", *_base(asked), "", *_changes(asked.rows), "")
    if table.protocols_differ_in:
        different = ", ".join(f"`{n}`" for n in table.protocols_differ_in)
        yield f"Protocols of the rows differ in {different}, and in nothing else."
        yield ""
    if table.seeds > 1:
        yield from ("## Each repetition", "", *_repetitions(table), "")
    yield f"Sealed as study `{record.digest[:16]}`, content `{record.content[:16]}`."
    yield ""


def _intervals(seeds: int) -> str:
    if seeds == 1:
        return (
            "Intervals are 95 %, of other samples of the same models; one training a row says "
            "nothing of other trainings."
        )
    return (
        f"Means of {seeds} repetitions (other trainings, other noise) with Student's 95 % "
        "intervals; differences are in pairs, repetition by repetition."
    )


def _beside(table: StudyTable) -> float | None:
    """What real held-out images have; the same for all rows."""
    return next((row.metrics[MAIN].beside for row in table.rows if row.metrics), None)


def _failures(table: StudyTable) -> Iterator[str]:
    """Which cells diverged, and what they said of it."""
    told = [(row.label, k, why) for row in table.rows for k, why in row.failed.items()]
    if told:
        yield "**Diverged**, so that their rows have no means:"
        yield ""
        yield from (f"* {label}, repetition {k}: {why}" for label, k, why in told)
        yield ""


def _verdict(table: StudyTable) -> Iterator[str]:
    """Which rows can be told from the first, by the intervals of their differences."""
    if table.rows[0].failed:
        yield f"The first row, {table.rows[0].label}, diverged: no row is held against it."
        yield ""
        return
    found = {"lower (better)": [], "higher (worse)": [], "not told apart from it": []}
    for row in table.rows[1:]:
        difference = row.against_first
        if row.failed:
            found.setdefault("diverged", []).append(row.label)
            continue
        if difference is None or difference.low is None or difference.high is None:
            return
        below, above = difference.high < 0, difference.low > 0
        where = (
            "lower (better)" if below else "higher (worse)" if above else "not told apart from it"
        )
        found[where].append(row.label)
    if len(table.rows) < 2:
        return
    yield (
        f"Against the first row, {table.rows[0].label}, by 95 % intervals of the differences, each "
        "for itself:"
    )
    yield ""
    for what, labels in found.items():
        yield f"* {what}: {'; '.join(labels) if labels else 'none'}"
    yield ""


def _numbers(
    asked: StudyStage, table: StudyTable, seconds: Sequence[float | None]
) -> Iterator[str]:
    keys = list(table.names)
    timed = any(value is not None for value in seconds)
    heads = ["row", HEADS[MAIN], "less the first row's"]
    heads += [HEADS[key] for key in keys if key != MAIN] + ["field evaluations"]
    heads += ["sampler, s"] if timed else []
    heads += ["published, another protocol"]
    yield _line(heads)
    yield _line(["---"] + ["--:"] * (len(heads) - 1))
    for row, found, took in zip(asked.rows, table.rows, seconds, strict=True):
        published = "" if row.published is None else f"{row.published:g}"
        if found.failed:
            many = f"diverged in {len(found.failed)} of {table.seeds}"
            yield _line([row.label, many, *[""] * (len(heads) - 3), published])
            continue
        cells = [row.label, _within(found.metrics[MAIN])]
        cells.append("" if found.against_first is None else _within(found.against_first, sign=True))
        cells += [_figure(found.metrics[key].value) for key in keys if key != MAIN]
        cells.append("" if found.evaluations is None else _figure(found.evaluations.value))
        if timed:
            cells.append("" if took is None else f"{took:.1f}")
        cells.append(published)
        yield _line(cells)
    for other in asked.others:
        cells = [f"{other.label} (published alone)"] + [""] * (len(heads) - 2)
        yield _line([*cells, f"{other.published:g}"])


def _base(asked: StudyStage) -> Iterator[str]:
    source, network = asked.base["source"], asked.base["network"]
    train, generate = asked.base["train"], asked.base["generate"]
    sampler = generate["sampler"]
    yield f"* images: {source['kind']}, {source['image_size_px']} px"
    shape = (
        f"transformer of width {network['width']}, depth {network['depth']}, patch "
        f"{network['patch']}"
        if network["kind"] == "transformer"
        else f"U-Net of widths {network['unet']['widths']}"
    )
    yield f"* network: {shape}"
    yield (
        f"* training: {train['images']:,} images in batches of {train['batch_size']}, rate "
        f"{train['learning_rate']:g}, half-life of the average {train['ema_half_life_images']:,.0f}"
    )
    yield (
        f"* samples: {generate['samples']:,} a cell, by {sampler['rule']} with step size "
        f"{sampler['step_size']:g}, {sampler['updates']} updates, guidance "
        f"{sampler['guidance']:g}, unless a row says otherwise"
    )


def _changes(rows: Sequence[StudyRow]) -> Iterator[str]:
    yield _line(["row", "settings that it changes"])
    yield _line(["---", "---"])
    for row in rows:
        settings = ", ".join(f"`{k} = {json.dumps(_short(v))}`" for k, v in row.changes.items())
        yield _line([row.label, settings or "none"])


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _outliers(table: StudyTable) -> Iterator[str]:
    """A line for each score of each row and each baseline, a column for each set."""
    intervals = (
        f"Means of {table.seeds} repetitions with Student's 95 % intervals; a baseline, which "
        "knows of no model, has DeLong's, of other images."
        if table.seeds > 1
        else "Intervals are DeLong's, of other images (95 %)."
    )
    yield (
        "AUROC of held-out images against other sets: 0.5 is chance, below it a score has the "
        f"wrong sign. {intervals}"
    )
    yield ""
    sets = list(dict.fromkeys(one.name for one in table.outliers))
    yield _line(["models", "score", *sets])
    yield _line(["---", "---"] + ["--:"] * len(sets))
    found = {(one.row, one.score, one.name): one.auroc for one in table.outliers}
    for row, score in dict.fromkeys((one.row, one.score) for one in table.outliers):
        cells = [found.get((row, score, name)) for name in sets]
        shown = ["" if cell is None else _share(cell) for cell in cells]
        yield _line([row or "baseline", SCORE_NAMES.get(score, score), *shown])


def _share(found: Estimate) -> str:
    if found.low is None or found.high is None:
        return f"{found.value:.2f}"
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def _repetitions(table: StudyTable) -> Iterator[str]:
    yield f"{table.names[MAIN]}, each with what other samples of the same model would give (95 %)."
    yield ""
    yield _line(["row", *(str(k + 1) for k in range(table.seeds))])
    yield _line(["---"] + ["--:"] * table.seeds)
    for row in table.rows:
        if row.failed:
            left = ("diverged" if value is None else _figure(value) for value in row.distances)
            yield _line([row.label, *left])
            continue
        found = row.metrics[MAIN]
        ends = zip(found.values, found.lows, found.highs, strict=True)
        yield _line([row.label, *(_span(v, low, high) for v, low, high in ends)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _within(found: Estimate, *, sign: bool = False) -> str:
    return _span(found.value, found.low, found.high, sign=sign)


def _span(value: float, low: float | None, high: float | None, *, sign: bool = False) -> str:
    shown = _figure(value, sign=sign)
    if low is None or high is None:
        return shown
    return f"{shown} ({_figure(low, sign=sign)} to {_figure(high, sign=sign)})"


def _figure(value: float, *, sign: bool = False) -> str:
    return format(value, "+.3g" if sign else ".4g").replace("-", MINUS)


# -- the picture --------------------------------------------------------------------------------


def draw(asked: StudyStage, table: StudyTable) -> str:
    """Ours to the left, what was published to the right, each on an axis of its own."""
    lined = bool(asked.x_label)
    published = any(row.published is not None for row in asked.rows)
    height = 2.6 if lined else 0.9 + ROW_INCHES * len(asked.rows)

    def put(figure: Any) -> None:
        panels = figure.subplots(1, 1 + published, squeeze=False, sharey=not lined)[0]
        (_lines if lined else _rows)(panels[0], asked, table)
        panels[0].set_title(f"here: {table.names[MAIN]}", fontsize=7.5, color=INK)
        if published:
            (_published_lines if lined else _published_rows)(panels[1], asked)
            if lined:
                panels[1].set_xlim(panels[0].get_xlim())
            panels[1].set_title("published: FID, another protocol", fontsize=7.5, color=INK)

    return figure_svg(put, f"{asked.title}: {table.names[MAIN]}", size=(7.2, height))


def _floor(table: StudyTable, line: Any) -> None:
    beside = _beside(table)
    if beside is not None:
        line(beside, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))


def _rows(axis: Any, asked: StudyStage, table: StudyTable) -> None:
    places = range(len(table.rows))
    for place, row in zip(places, table.rows, strict=True):
        if row.failed:
            at = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 7}
            axis.text(0.02, place, "diverged", color=FAINT, **at)
            continue
        found = row.metrics[MAIN]
        if found.low is not None and found.high is not None:
            axis.plot([found.low, found.high], [place, place], color=SAMPLE, linewidth=1.2)
        axis.plot(found.values, [place] * len(found.values), "|", color=FAINT, markersize=7)
        axis.plot([found.value], [place], "o", color=SAMPLE, markersize=4)
    _floor(table, axis.axvline)
    axis.set_yticks(list(places), [row.label for row in asked.rows])
    axis.set_ylim(len(table.rows) - 0.5, -0.5)
    axis.set_xlabel("dashed: real held-out images")
    axis.grid(axis="x")


def _published_rows(axis: Any, asked: StudyStage) -> None:
    known = [(row.published, i) for i, row in enumerate(asked.rows) if row.published is not None]
    axis.plot([value for value, _ in known], [i for _, i in known], "D", color=INK, markersize=3.5)
    axis.grid(axis="x")


def _lines(axis: Any, asked: StudyStage, table: StudyTable) -> None:
    apart = _apart(asked)
    for series, colour in _series(asked):
        mine = [
            ((row.x or 0.0) + apart[series], found.metrics[MAIN])
            for row, found in zip(asked.rows, table.rows, strict=True)
            if row.series == series and not found.failed
        ]
        mine.sort(key=lambda point: point[0])
        x, y = [at for at, _ in mine], [found.value for _, found in mine]
        axis.plot(x, y, color=colour, linewidth=1.2, marker="o", markersize=3.5, label=series)
        for at, found in mine:
            if found.low is not None and found.high is not None:
                axis.plot([at, at], [found.low, found.high], color=colour, linewidth=0.8)
            marks = {"color": colour, "alpha": 0.6, "markersize": 5}
            axis.plot([at] * len(found.values), found.values, "_", **marks)
        lost = [
            (row.x or 0.0) + apart[series]
            for row, found in zip(asked.rows, table.rows, strict=True)
            if row.series == series and found.failed
        ]
        for at in lost:
            # At the top: where they ran off to.
            top = {"transform": axis.get_xaxis_transform(), "clip_on": False}
            axis.plot([at], [1.0], "x", color=colour, markersize=5, **top)
    _floor(table, axis.axhline)
    crosses = "; x: diverged" if any(row.failed for row in table.rows) else ""
    axis.set_xlabel(f"{asked.x_label} (dashed: real held-out images{crosses})")
    _legend(axis, asked)


def _apart(asked: StudyStage) -> dict[str, float]:
    """How far the points of a series stand beside their place, or intervals would hide others."""
    places = [row.x or 0.0 for row in asked.rows]
    names = [name for name, _ in _series(asked)]
    step = SERIES_APART * (max(places) - min(places))
    return {name: step * (i - (len(names) - 1) / 2) for i, name in enumerate(names)}


def _published_lines(axis: Any, asked: StudyStage) -> None:
    for series, colour in _series(asked):
        mine = [
            (row.x or 0.0, row.published)
            for row in asked.rows
            if row.series == series and row.published is not None
        ]
        mine.sort()
        x, y = [at for at, _ in mine], [value for _, value in mine]
        axis.plot(x, y, color=colour, linewidth=1.2, marker="D", markersize=3.5, label=series)
    axis.set_xlabel(asked.x_label)
    _legend(axis, asked)


def _legend(axis: Any, asked: StudyStage) -> None:
    if len(_series(asked)) > 1:
        axis.legend(frameon=False, labelcolor=INK)


def _series(asked: StudyStage) -> list[tuple[str, str]]:
    names = list(dict.fromkeys(row.series for row in asked.rows))
    return list(zip(names, (SAMPLE, REAL, INK, FAINT), strict=False))


def _standing_alone(svg: str) -> str:
    """A drawing that was made for a page, as a file: with a name space and colours of its own."""
    style = (
        f"<style>:root {{ {LIGHT} }} @media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }} "
    )
    style += "text { font-family: system-ui, sans-serif; }</style>"
    opening = re.match(r"<svg ([^>]*)>", svg)
    if opening is None:
        raise AssertionError("a drawing begins with its svg element")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {opening[1]}>'
    return head + style + svg[opening.end() :] + "\n"
