"""Evaluation, decision and lineage -> one HTML page and one JSON; same input, same bytes.

The page refers to nothing outside itself and needs no script. It shows configs, digests and values
alone: no times and no machines, which differ from run to run. Every string is escaped unless it is
:class:`Html`, because names of classes and models are other people's input. Called by flows.
"""

import base64
import hashlib
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from eqm.errors import DataError
from eqm.figures import (
    Images,
    check_images,
    common_edges,
    curve_svg,
    histogram_svg,
    sample_grid,
    strip_png,
)
from eqm.gate import differences
from eqm.records import (
    Decision,
    Evaluation,
    Json,
    Metric,
    OODRow,
    Record,
    Ref,
    canonical_bytes,
    sha256,
    to_json,
)

__all__ = ["ReportInput", "curve_svg", "render_html", "render_json", "sample_grid"]

SCHEMA = "eqm-report/1"
HELD_OUT = "held-out"
"""Name of the in-distribution scores."""
CELL_PX = 96
BETTER: dict[str, Literal["lower", "higher"]] = {
    "distance": "lower",
    "distance_held_out": "lower",
    "kid": "lower",
    "precision": "higher",
    "recall": "higher",
    "label_agreement": "higher",
}
"""Which way a metric improves; the distance to the nearest training image has no better side."""
MINUS, DASH, TIMES = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
PERCENT_95 = "95\N{NO-BREAK SPACE}%"
TILES = ("precision", "recall", "label_agreement", "kid")


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportInput:
    """All that a report shows. Raises DataError where its parts do not belong together."""

    title: str
    model_name: str
    evaluation: Evaluation
    decision: Decision | None = None
    champion: Evaluation | None = None
    """What was measured of the champion that stood when this was judged."""
    chain: tuple[Record, ...]
    """The evaluation and all that it was built on, in the order of the story."""
    history: Mapping[str, list[float]]
    """Training curve: lists "images", "loss", "gradient_norm"."""
    sample_images: Images
    """(K, R, C, H, W): R samples of each of K classes."""
    real_images: Images
    """(K, R, C, H, W): held-out images of the same classes."""
    class_names: Sequence[str]
    ood_scores: Mapping[str, list[float]]
    """Set -> scores; "held-out" is among them unless there are none."""
    trajectory: Images | None = None
    """(T, K, C, H, W): one image of each class along the descent."""
    trajectory_updates: Sequence[int] = ()
    generated_with: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the sampler, and seeds."""

    def __post_init__(self) -> None:
        check_images(self.sample_images, 5, "samples")
        check_images(self.real_images, 5, "real images")
        counts = len(self.sample_images), len(self.real_images), len(self.class_names)
        if len(set(counts)) != 1:
            raise DataError(
                f"{counts[0]} classes of samples, {counts[1]} of real images, {counts[2]} names: "
                "give as many of each"
            )
        if self.trajectory is not None:
            check_images(self.trajectory, 5, "trajectory")
            if len(self.trajectory) != len(self.trajectory_updates):
                raise DataError(
                    f"{len(self.trajectory)} moments of the descent have "
                    f"{len(self.trajectory_updates)} numbers of updates: give one for each"
                )
        if self.decision and self.chain and self.decision.candidate != self.chain[-1].ref:
            raise DataError(
                f"the decision judges evaluation {self.decision.candidate.digest[:12]}, the chain "
                f"ends in {self.chain[-1].digest[:12]}: judge again"
            )


# -- JSON ---------------------------------------------------------------------------------------


def render_json(report: ReportInput) -> bytes:
    """All numbers, the decision and the chain. Raises ConfigError for NaN and infinities."""
    return canonical_bytes(_document(report)) + b"\n"


def _document(report: ReportInput) -> Json:
    pictures = {"samples": report.sample_images, "real": report.real_images}
    if report.trajectory is not None:
        pictures["trajectory"] = report.trajectory
    return {
        "schema": SCHEMA,
        "title": report.title,
        "model": report.model_name,
        "evaluation": _evaluation_json(report.evaluation),
        "decision": to_json(report.decision),
        "champion": _evaluation_json(report.champion) if report.champion else None,
        "chain": [_record_json(record) for record in report.chain],
        "history": to_json(report.history),
        "ood_scores": to_json(report.ood_scores),
        "classes": list(report.class_names),
        "generated_with": to_json(report.generated_with),
        "trajectory_updates": list(report.trajectory_updates),
        "images": {name: _picture_json(images) for name, images in pictures.items()},
    }


def _evaluation_json(evaluation: Evaluation) -> Json:
    return {**to_json(evaluation), "protocol_digest": evaluation.protocol_digest}


def _record_json(record: Record) -> Json:
    body = to_json(record)
    sealed = {k: v for k, v in body.items() if k not in ("logs", "provenance")}
    return {"digest": record.digest, "content": record.content, **sealed}


def _picture_json(images: Images) -> Json:
    return {"shape": list(images.shape), "sha256": hashlib.sha256(images.tobytes()).hexdigest()}


# -- markup -------------------------------------------------------------------------------------


class Html(str):
    """Markup; any other string is text and is escaped."""

    __slots__ = ()


Child = str | Iterable["Child"]


def el(tag: str, *children: Child, **attributes: str) -> Html:
    """One element; ``class_`` is its class. Text and attributes are escaped."""
    named = ((k.rstrip("_").replace("_", "-"), v) for k, v in attributes.items())
    opening = "".join(f' {name}="{html.escape(value)}"' for name, value in named)
    if tag in ("img", "meta"):
        return Html(f"<{tag}{opening}>")
    return Html(f"<{tag}{opening}>{_markup(children)}</{tag}>")


def _markup(child: Child) -> str:
    if isinstance(child, Html):
        return child
    return html.escape(child) if isinstance(child, str) else "".join(map(_markup, child))


def _number(value: float) -> Html:
    """Four digits to read, all of them for machines."""
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return el("data", shown.replace("-", MINUS), value=repr(value))


def _picture(png: bytes, alt: str) -> Html:
    return el("img", src=f"data:image/png;base64,{base64.b64encode(png).decode()}", alt=alt)


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[Child]], kind: str) -> Html:
    """A table whose first column heads its rows; narrow pages show each row as a block."""
    top = el("tr", [el("th", head, scope="col") for head in heads])
    body = [
        el(
            "tr",
            el("th", row[0], scope="row"),
            [el("td", c, data_head=h) for h, c in zip(heads[1:], row[1:], strict=True)],
        )
        for row in rows
    ]
    table = el("table", el("caption", caption), el("thead", top), el("tbody", body), class_=kind)
    return el("div", table, class_="scroll")


def _section(heading: str, note: Child, *content: Child) -> Html:
    intro = el("p", note, class_="note") if note else Html("")
    return el("section", el("h2", heading), intro, *content)


def _code(digest: str) -> Html:
    return el("code", digest)


def _flat(settings: Mapping[str, Any], within: str = "") -> Iterable[tuple[str, str]]:
    for key, value in sorted(settings.items()):
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{within}{key}.")
        else:
            yield within + key, value if isinstance(value, str) else canonical_bytes(value).decode()


# -- the page -----------------------------------------------------------------------------------


def render_html(report: ReportInput) -> bytes:
    """The page. Raises ConfigError for NaN and infinities."""
    numbers = render_json(report)
    main = el(
        "main",
        _header(report),
        _decision(report),
        _samples(report),
        _descent(report),
        _metrics(report),
        _champion(report),
        _ood(report),
        _training(report),
        _chain(report),
        _protocol(report),
    )
    footer = el(
        "footer",
        el("p", "The same sealed records give this page again, byte for byte. "),
        el("p", f"Numbers in full: {SCHEMA}, SHA-256 ", _code(sha256(numbers))),
    )
    head = (
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("title", f"{report.title} · {report.model_name}"),
        el("style", Html(STYLE)),
    )
    page = el("html", el("head", head), el("body", main, footer), lang="en")
    return f"<!doctype html>\n{page}\n".encode()


def _header(report: ReportInput) -> Html:
    evaluation = report.evaluation
    shown = [evaluation.metrics[k] for k in TILES if k in evaluation.metrics]
    shown.append(Metric(name="samples", value=evaluation.samples))
    shown.append(Metric(name="field evaluations a sample", value=evaluation.mean_field_evaluations))
    tiles = el("div", [_tile(metric) for metric in shown], class_="tiles")
    return el(
        "header",
        el("p", "Evaluation of ", el("b", report.model_name), class_="eyebrow"),
        el("h1", report.title),
        _verdict(report.decision),
        el("div", _headline(evaluation), tiles, class_="figures"),
    )


def _verdict(decision: Decision | None) -> Html:
    if decision is None:
        return _banner("none", "No decision", "This evaluation was not held against a policy.")
    policy = decision.policy.get("name", "")
    failed = sum(not reason.passed for reason in decision.reasons)
    count = len(decision.reasons)
    if decision.promote:
        return _banner("pass", "Promoted", f"All {count} checks of policy “{policy}” passed.")
    stays = " The champion stays." if decision.champion else ""
    text = f"{failed} of {count} checks of policy “{policy}” failed.{stays}"
    return _banner("fail", "Not promoted", text)


def _banner(kind: str, verdict: str, text: str) -> Html:
    return el("p", el("strong", verdict, class_=f"pill {kind}"), " ", text, class_="verdict")


def _headline(evaluation: Evaluation) -> Html:
    metric = evaluation.metrics.get("distance")
    if metric is None:
        return el("div", el("p", "no distance was measured", class_="label"), class_="tile lead")
    return _tile(metric, el("p", metric.note, class_="small"), kind="tile lead")


def _tile(metric: Metric, *more: Child, kind: str = "tile") -> Html:
    real: Child = ()
    if metric.beside is not None:
        real = el("p", "real images ", _number(metric.beside), class_="small real")
    value = el("p", _number(metric.value), class_="big")
    return el("div", el("p", metric.name, class_="label"), value, real, *more, class_=kind)


def _decision(report: ReportInput) -> Html:
    if report.decision is None:
        return Html("")
    items = []
    for reason in report.decision.reasons:
        kind, mark, word = ("pass", "✓", "passed") if reason.passed else ("fail", "✗", "failed")
        sign = el("span", mark, class_=f"mark {kind}", role="img", aria_label=word)
        items.append(el("li", sign, el("div", el("b", reason.check), " ", el("span", reason.text))))
    return _section("Decision", "", el("ul", items, class_="reasons"))


# -- pictures -----------------------------------------------------------------------------------


def _samples(report: ReportInput) -> Html:
    note = (
        "Samples beside held-out images, which the model has never seen. Neither side is chosen: "
        "they are the first of each class."
    )
    triples = zip(report.class_names, report.sample_images, report.real_images, strict=True)
    rows = [
        (
            name,
            _picture(strip_png(made, cell_px=CELL_PX), f"{len(made)} samples of class {name}"),
            _picture(strip_png(real, cell_px=CELL_PX), f"{len(real)} real images of class {name}"),
        )
        for name, made, real in triples
    ]
    heads = ("class", "samples", "real, held out")
    return _section(
        "Samples", note, _table("Samples and real images by class", heads, rows, "grid")
    )


def _descent(report: ReportInput) -> Html:
    if report.trajectory is None:
        return Html("")
    note = "One sample of each class on its way from noise down the field, by updates made."
    frames = [
        el(
            "figure",
            _picture(
                strip_png(frame, cell_px=CELL_PX, down=True),
                f"one sample of each class after {updates} updates",
            ),
            el("figcaption", f"{updates:,}"),
        )
        for frame, updates in zip(report.trajectory, report.trajectory_updates, strict=True)
    ]
    return _section("Descent", note, el("div", frames, class_="film"))


def _training(report: ReportInput) -> Html:
    x = report.history.get("images", [])
    names = {"loss": "loss", "gradient_norm": "gradient norm"}
    drawn = []
    for key, name in names.items():
        y = report.history.get(key, [])
        if x and len(x) == len(y):
            title = f"{name} by training images seen"
            picture = curve_svg(x, y, title=title, x_label="images seen", y_label=name)
            drawn.append(
                el("figure", Html(picture), el("figcaption", f"{name}, last ", _number(y[-1])))
            )
    if not drawn:
        return _section("Training", "No training curve was recorded.")
    return _section("Training", "", el("div", drawn, class_="panels"))


# -- numbers ------------------------------------------------------------------------------------


def _metrics(report: ReportInput) -> Html:
    rows = [
        (
            metric.name,
            _number(metric.value),
            DASH if metric.beside is None else _number(metric.beside),
            BETTER.get(key, DASH),
            metric.note,
        )
        for key, metric in sorted(report.evaluation.metrics.items(), key=_story_order)
    ]
    note = (
        f"{report.evaluation.samples:,} samples. The column of real images is the same quantity "
        "for held-out images: what a perfect model would show."
    )
    heads = ("metric", "samples", "real images", "better", "note")
    return _section("Metrics", note, _table("Metrics of the samples", heads, rows, "numbers"))


def _story_order(item: tuple[str, Metric]) -> tuple[int, str]:
    order = list(BETTER)
    return (order.index(item[0]) if item[0] in order else len(order), item[0])


def _champion(report: ReportInput) -> Html:
    if report.champion is None:
        return Html("")
    mine, other = report.evaluation, report.champion
    if mine.protocol_digest != other.protocol_digest:
        keys = ", ".join(differences(mine.protocol, other.protocol))
        note = f"The numbers are not compared: the protocols differ in {keys}."
        return _section("Against the champion", note)
    pairs = [
        (metric.name, metric.value, other.metrics[key].value)
        for key, metric in sorted(mine.metrics.items(), key=_story_order)
        if key in other.metrics
    ]
    theirs = {row.name: row.auroc for row in other.ood}
    pairs += [(f"AUROC {r.name}", r.auroc, theirs[r.name]) for r in mine.ood if r.name in theirs]
    rows = [(name, _number(a), _number(b), _change(a, b)) for name, a, b in pairs]
    heads = ("metric", "this model", "champion", "change")
    table = _table("This model and the champion", heads, rows, "numbers")
    return _section("Against the champion", "Both were measured under the same protocol.", table)


def _change(mine: float, other: float) -> str:
    sign = "±" if mine == other else ""
    difference = f"{sign}{mine - other:+.3g}".replace("±+", "±").replace("-", MINUS)
    relative = f" ({TIMES} {mine / other:.3f})" if other > 0 and mine >= 0 else ""
    return difference + relative


def _ood(report: ReportInput) -> Html:
    rows = [_ood_row(row) for row in report.evaluation.ood]
    if not rows:
        return _section("Out of distribution", "No scores: the field has no unlabelled input.")
    note = (
        f"How well the norm of the gradient tells other images from held-out ones. AUROC with its "
        f"{PERCENT_95} interval; 0.5 is chance. AUPR: the other images are the positive class. "
        f"FPR95: share of them under the threshold that {PERCENT_95} of held-out images are under. "
        "Sets that only inform are read by no policy."
    )
    heads = ("set", "images", "AUROC", f"{PERCENT_95} interval", "", "AUPR", "FPR95", "policy")
    table = _table("Out-of-distribution detection", heads, rows, "numbers")
    return _section("Out of distribution", note, table, _histograms(report.ood_scores))


def _ood_row(row: OODRow) -> Sequence[Child]:
    interval = (_number(row.auroc_low), " to ", _number(row.auroc_high))
    use = "may read" if row.gated else "informs"
    values = (_number(row.auroc), interval, _whisker(row))
    return (row.name, _number(row.count), *values, _number(row.aupr), _number(row.fpr95_in), use)


def _whisker(row: OODRow) -> Html:
    """The interval on a line from 0 to 1, with a tick at chance."""
    low, high, at = (f"{100 * v:.2f}" for v in (row.auroc_low, row.auroc_high, row.auroc))
    line = '<line x1="{}" x2="{}" y1="7" y2="7" class="{}"/>'
    return Html(
        '<svg class="whisker" viewBox="-4 0 108 14" aria-hidden="true">'
        + line.format(0, 100, "axis")
        + '<line x1="50" x2="50" y1="3" y2="11" class="axis"/>'
        + line.format(low, high, "range")
        + f'<circle cx="{at}" cy="7" r="3.2"/></svg>'
    )


def _histograms(scores: Mapping[str, list[float]]) -> Html:
    inside = scores.get(HELD_OUT, [])
    others = {name: s for name, s in sorted(scores.items()) if name != HELD_OUT and s}
    if not inside or not others:
        return Html("")
    edges = common_edges([inside, *others.values()])
    drawn = [
        el(
            "figure",
            Html(histogram_svg(inside, s, edges, title=f"gradient norms, held-out and {name}")),
            el(
                "figcaption",
                el("span", "held-out", class_="key real"),
                el("span", name, class_="key sample"),
            ),
        )
        for name, s in others.items()
    ]
    return el("div", drawn, class_="panels")


# -- lineage and protocol -----------------------------------------------------------------------


def _chain(report: ReportInput) -> Html:
    note = (
        "Each stage is sealed under the digest of what was asked for; its content is the digest of "
        "what came out, and is checked before the next stage builds on it."
    )
    heads = ("stage", "digest: asked for", "content: came out", "algorithm", "built on")
    rows = [_chain_row(ref, DASH, {}) for ref in _origins(report.chain)]
    rows += [_chain_row(r.ref, str(r.algorithm), r.inputs) for r in report.chain]
    return _section("Lineage", note, _table("Chain of sealed records", heads, rows, "chain"))


def _origins(chain: Sequence[Record]) -> list[Ref]:
    """What the chain builds on and does not contain: the listing of the images."""
    known = {record.digest for record in chain}
    used = {ref.digest: ref for record in chain for ref in record.inputs.values()}
    return [ref for digest, ref in sorted(used.items()) if digest not in known]


def _chain_row(ref: Ref, algorithm: str, inputs: Mapping[str, Ref]) -> Sequence[Child]:
    stage = el("span", ref.stage, id=f"r-{ref.digest}")
    links = [_link(name, used) for name, used in sorted(inputs.items())]
    built_on = el("ul", links) if links else DASH
    return (stage, _code(ref.digest), _code(ref.content), algorithm, built_on)


def _link(name: str, ref: Ref) -> Html:
    return el("li", el("a", name, href=f"#r-{ref.digest}"), " ", _code(ref.digest[:12]))


def _protocol(report: ReportInput) -> Html:
    evaluation = report.evaluation
    note = ("Numbers are compared under equal protocols only. ", _code(evaluation.protocol_digest))
    heads = ("setting", "value")
    tables = [
        _table("Protocol", heads, list(_flat(evaluation.protocol)), "settings"),
        _table("How the samples were made", heads, list(_flat(report.generated_with)), "settings"),
    ]
    if report.decision is not None:
        rows = list(_flat(report.decision.policy))
        tables.append(_table("Policy", heads, rows, "settings"))
    return _section("Protocol", note, el("div", tables, class_="tables"))


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load: nothing but what is in the page."""
STYLE = """
:root {
  --paper: #fbfaf7; --card: #fff; --ink: #1d1f24; --soft: #5b606b; --faint: #8d929c;
  --line: #e3e0d8; --sample: #3f51c4; --real: #a85f00; --pass: #146c37; --fail: #b3261e;
  --pass-bg: #e0f2e6; --fail-bg: #fbe5e2; --none-bg: #ecebe6;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #14161a; --card: #1c1f25; --ink: #e9e8e4; --soft: #a9adb6; --faint: #838995;
  --line: #30343c; --sample: #93a4ff; --real: #f0a94b; --pass: #7ddb9d; --fail: #ff9a90;
  --pass-bg: #17351f; --fail-bg: #431c19; --none-bg: #2a2d34;
} }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding: 44px 0 8px; }
h1 { margin: 0; font-size: clamp(26px, 4.5vw, 40px); line-height: 1.15; letter-spacing: -.02em;
  overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 20px; letter-spacing: -.01em; }
section { margin: 44px 0 0; }
p { margin: 0; }
.eyebrow { color: var(--soft); margin-bottom: 6px; overflow-wrap: anywhere; }
.note { color: var(--soft); max-width: 74ch; margin-bottom: 14px; overflow-wrap: anywhere; }
.small { color: var(--soft); font-size: 13px; }
.verdict { margin: 14px 0 22px; }
.pill { display: inline-block; padding: 3px 13px; border-radius: 99px; margin-right: 6px; }
.pass { color: var(--pass); } .pill.pass { background: var(--pass-bg); }
.fail { color: var(--fail); } .pill.fail { background: var(--fail-bg); }
.pill.none { background: var(--none-bg); }
.figures { display: grid; gap: 12px; grid-template-columns: minmax(300px, 2fr) 3fr; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 14px 16px; overflow-wrap: anywhere; }
.tile .big { font-size: 26px; font-weight: 650; letter-spacing: -.02em; line-height: 1.3; }
.tiles .tile { display: flex; flex-direction: column; }
.tiles .big { order: -1; }
.tile .big data { white-space: nowrap; }
.tile .label { font-size: 13px; color: var(--soft); }
.tile.lead { padding: 20px 24px; align-content: center; }
.tile.lead .big { font-size: clamp(48px, 8vw, 72px); line-height: 1.15; color: var(--sample); }
.tile.lead .label { font-size: 16px; font-weight: 600; color: var(--ink); }
.tile.lead .small { font-size: 14px; }
.small.real data { color: var(--real); font-weight: 600; }
data, td, code { font-variant-numeric: tabular-nums; }
.reasons { list-style: none; margin: 10px 0 0; padding: 0; background: var(--card);
  border: 1px solid var(--line); border-radius: 12px; }
.reasons li { display: flex; gap: 12px; padding: 9px 16px; overflow-wrap: anywhere; }
.reasons li + li { border-top: 1px solid var(--line); }
.reasons b { display: inline-block; min-width: 12.5em; }
.mark { font-weight: 700; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { text-align: left; padding: 8px 14px 8px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; white-space: nowrap; }
tbody th { font-weight: 600; }
.numbers td:not(:last-child) { white-space: nowrap; }
.numbers td:last-child { color: var(--soft); }
.grid tbody th { width: 1%; overflow-wrap: break-word; padding-right: 18px;
  vertical-align: middle; }
.grid td { width: 50%; vertical-align: middle; padding: 4px 11px 4px 0; border: 0; }
.grid th { border: 0; } .grid td + td { padding: 4px 0 4px 11px; }
.grid thead th:last-child { padding-left: 11px; }
img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; }
.grid img { width: 100%; max-width: 640px; }
figure { margin: 0; min-width: 0; }
figcaption { color: var(--soft); font-size: 13px; }
.film { display: flex; gap: clamp(3px, 1vw, 12px); }
.film figure { flex: 0 1 64px; } .film figcaption { text-align: center; margin-top: 4px; }
.panels { display: grid; gap: 22px 32px; margin-top: 18px;
  grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); }
figure svg { width: 100%; height: auto; }
.key { margin-right: 16px; overflow-wrap: anywhere; }
.key::before { content: ""; display: inline-block; width: 10px; height: 10px; margin-right: 6px;
  border-radius: 3px; background: var(--sample); }
.key.real::before { background: var(--real); }
.whisker { width: 108px; height: 14px; display: block; margin-top: 4px; }
.whisker .axis { stroke: var(--faint); stroke-width: 1; opacity: .55; }
.whisker .range { stroke: var(--sample); stroke-width: 3; stroke-linecap: round; }
.whisker circle { fill: var(--sample); }
code { font: 11.5px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
.chain td code { display: inline-block; max-width: 33ch; word-break: break-all; }
.chain ul { margin: 0; padding: 0; list-style: none; }
.chain tr:has(:target) { background: var(--none-bg); }
a { color: var(--sample); text-underline-offset: 2px; }
.settings caption { position: static; width: auto; height: auto; clip-path: none; text-align: left;
  font-weight: 600; padding-bottom: 4px; font-size: 15px; }
.settings thead { display: none; }
.tables { columns: 2 400px; column-gap: 32px; }
.tables .scroll { break-inside: avoid; margin-bottom: 22px; }
.settings th { font-weight: 400; color: var(--soft); width: 48%; overflow-wrap: break-word; }
.settings :is(th, td) { padding-block: 5px; }
footer { margin-top: 56px; padding-block: 18px 48px; color: var(--soft); font-size: 13px;
  border-top: 1px solid var(--line); }
@media (max-width: 720px) {
  .figures { grid-template-columns: 1fr; }
  .tiles { grid-template-columns: 1fr 1fr; }
  main, footer { padding-inline: 16px; }
  header { padding-top: 28px; }
  .numbers thead, .chain thead { position: absolute; clip-path: inset(50%); }
  .numbers tr, .chain tr { display: block; padding: 10px 0; border-bottom: 1px solid var(--line); }
  .numbers :is(th, td), .chain :is(th, td) { display: flex; gap: 12px; border: 0; padding: 2px 0; }
  .numbers td, .chain td { white-space: normal !important; }
  :is(.numbers, .chain) td::before { content: attr(data-head); flex: 0 0 8.5em;
    color: var(--soft); }
  .grid thead { position: absolute; clip-path: inset(50%); }
  .grid :is(tbody, tr, th, td) { display: block; width: auto !important; padding: 0; }
  .grid tbody :is(th, td + td) { padding: 6px 0 2px; }
  .grid td::before { content: attr(data-head); color: var(--soft); font-size: 12px; }
  td:empty { display: none !important; }
  .reasons b { display: block; }
}
@media print {
  :root { --paper: #fff; --card: #fff; }
  body { font-size: 11px; } main, footer { max-width: none; padding: 0; }
  section { margin-top: 26px; } h2 { break-after: avoid; }
  figure, tr, .tile, .reasons li { break-inside: avoid; }
  .scroll { overflow: visible; }
}
"""
