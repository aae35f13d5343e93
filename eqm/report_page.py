"""A report -> one HTML page; same input, same bytes.

The page refers to nothing outside itself and needs no script. Every string is escaped unless it is
:class:`eqm.page.Html`: names of classes and models are other people's input. Called by
verification and flows.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eqm import page, published
from eqm.figures import Images, curve_svg, strip_png
from eqm.gate import differences
from eqm.names import kind_of
from eqm.page import DASH, MINUS, PERCENT_95
from eqm.records import Decision, Evaluation, Metric, Record, Ref, canonical_bytes, sha256
from eqm.report import (
    SCHEMA,
    Change,
    ReportInput,
    better_of,
    changes,
    extractor_of,
    render_json,
    story_order,
)
from eqm.report_ood import ood_section
from eqm.words import counted

CELL_PX = 96
TIMES = "\N{MULTIPLICATION SIGN}"
TILES = ("precision", "recall", "label_agreement", "kid")


def render_html(report: ReportInput) -> bytes:
    """The page. Raises ConfigError for NaN and infinities."""
    numbers = render_json(report)
    main = page.el(
        "main",
        _header(report),
        _decision(report),
        _samples(report),
        _descent(report),
        _metrics(report),
        _champion(report),
        ood_section(report),
        _training(report),
        _published(report),
        _chain(report),
        _protocol(report),
    )
    footer = page.el(
        "footer",
        page.el("p", "The same sealed records give this page again, byte for byte. "),
        page.el("p", f"Numbers in full: {SCHEMA}, SHA-256 ", page.code(sha256(numbers))),
    )
    head = (
        page.el("meta", charset="utf-8"),
        page.el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        page.el("meta", name="color-scheme", content="light dark"),
        page.el("meta", http_equiv="Content-Security-Policy", content=page.POLICY),
        [page.el("meta", name="eqm-evaluation", content=r.digest) for r in report.chain[-1:]],
        page.el("title", f"{report.title} · {report.model_name}"),
        page.el("style", page.Html(page.STYLE)),
    )
    whole = page.el("html", page.el("head", head), page.el("body", main, footer), lang="en")
    return f"<!doctype html>\n{whole}\n".encode()


def _header(report: ReportInput) -> page.Html:
    evaluation = report.evaluation
    shown = [evaluation.metrics[k] for k in TILES if k in evaluation.metrics]
    shown += [m for k, m in sorted(evaluation.metrics.items()) if _is_further_distance(k)]
    shown.append(Metric(name="samples", value=evaluation.samples))
    shown.append(Metric(name="field evaluations a sample", value=evaluation.mean_field_evaluations))
    tiles = page.el("div", [_tile(metric) for metric in shown], class_="tiles")
    return page.el(
        "header",
        page.el("p", "Evaluation of ", page.el("b", report.model_name), class_="eyebrow"),
        page.el("h1", report.title),
        _verdict(report.decision),
        page.el("div", _headline(evaluation), tiles, class_="figures"),
    )


def _is_further_distance(key: str) -> bool:
    kind, extractor = kind_of(key)
    return kind == "distance" and extractor is not None


def _verdict(decision: Decision | None) -> page.Html:
    if decision is None:
        return _banner("none", "No decision", "This evaluation was not held against a policy.")
    policy = decision.policy.get("name", "")
    failed = sum(not reason.passed for reason in decision.reasons)
    count = len(decision.reasons)
    if decision.promote:
        return _banner("pass", "Passed", f"All {count} checks of policy “{policy}” passed.")
    stays = " The champion stays." if decision.champion else ""
    text = f"{failed} of {count} checks of policy “{policy}” failed.{stays}"
    return _banner("fail", "Not promoted", text)


def _banner(kind: str, verdict: str, text: str) -> page.Html:
    return page.el(
        "p", page.el("strong", verdict, class_=f"pill {kind}"), " ", text, class_="verdict"
    )


def _headline(evaluation: Evaluation) -> page.Html:
    metric = evaluation.metrics.get("distance")
    if metric is None:
        return page.el(
            "div", page.el("p", "no distance was measured", class_="label"), class_="tile lead"
        )
    return _tile(metric, page.el("p", metric.note, class_="small"), kind="tile lead")


def _tile(metric: Metric, *more: page.Child, kind: str = "tile") -> page.Html:
    real: page.Child = ()
    if metric.beside is not None:
        real = page.el("p", "real images ", page.number(metric.beside), class_="small real")
    value = page.el("p", page.number(metric.value), class_="big")
    sure: page.Child = ()
    if metric.low is not None:
        sure = page.el("p", f"{PERCENT_95} interval ", _interval(metric), class_="small")
    return page.el(
        "div", page.el("p", metric.name, class_="label"), value, sure, real, *more, class_=kind
    )


def _decision(report: ReportInput) -> page.Html:
    if report.decision is None:
        return page.Html("")
    items = []
    for reason in report.decision.reasons:
        kind, mark, word = ("pass", "✓", "passed") if reason.passed else ("fail", "✗", "failed")
        sign = page.el("span", mark, class_=f"mark {kind}", role="img", aria_label=word)
        items.append(
            page.el(
                "li",
                sign,
                page.el("div", page.el("b", reason.check), " ", page.el("span", reason.text)),
            )
        )
    return page.section("Decision", "", page.el("ul", items, class_="reasons"))


# -- pictures -----------------------------------------------------------------------------------


def _samples(report: ReportInput) -> page.Html:
    note = (
        "Samples beside held-out images, which the model has never seen. Neither side is chosen: "
        "they are the first of each class."
    )
    triples = zip(report.class_names, report.sample_images, report.real_images, strict=True)
    rows = [
        (
            name,
            (
                _strip(_there(made, report.sample_counts, k), "sample", name, "none was made"),
                _seeds(report, k),
            ),
            _strip(_there(real, report.real_counts, k), "real image", name, "none is held out"),
        )
        for k, (name, made, real) in enumerate(triples)
    ]
    heads = ("class", "samples", "real, held out")
    table = page.table("Samples and real images by class", heads, rows, "grid")
    return page.section("Samples", note, table, _command(report))


def _there(images: Images, counts: Sequence[int], k: int) -> Images:
    """Pictures of class k without those that stand for none."""
    if not counts:
        # Of an evaluation that did not count them: all, or black for none.
        return images if images.any() else images[:0]
    return images[: counts[k]]


def _strip(images: Images, what: str, name: str, none: str) -> page.Html:
    if not len(images):
        return page.el("p", none, class_="small")
    alt = f"{counted(len(images), what)} of class {name}"
    return page.picture(strip_png(images, cell_px=CELL_PX), alt)


def _seeds(report: ReportInput, row: int) -> page.Html:
    """Seeds of the samples of a row, from left to right."""
    if row >= len(report.sample_seeds):
        return page.Html("")
    return page.el("p", "seeds ", ", ".join(map(str, report.sample_seeds[row])), class_="small")


def _command(report: ReportInput) -> page.Html:
    """How any of the samples is made again."""
    samples = next((record for record in report.chain if record.stage == "samples"), None)
    if samples is None or not report.sample_seeds:
        return page.Html("")
    line = f"eqm samples remake {samples.digest[:16]} --seed SEED"
    return page.el("p", "Any of the samples is made again by ", page.code(line), class_="small")


def _descent(report: ReportInput) -> page.Html:
    if report.trajectory is None:
        return page.Html("")
    note = "One sample of each class on its way from noise down the field, by updates made."
    frames = [
        page.el(
            "figure",
            page.picture(
                strip_png(frame, cell_px=CELL_PX, down=True),
                f"one sample of each class after {updates} updates",
            ),
            page.el("figcaption", f"{updates:,}"),
        )
        for frame, updates in zip(report.trajectory, report.trajectory_updates, strict=True)
    ]
    return page.section("Descent", note, page.el("div", frames, class_="film"))


def _training(report: ReportInput) -> page.Html:
    x = report.history.get("images", [])
    names = {"loss": "loss", "gradient_norm": "gradient norm"}
    drawn = []
    for key, name in names.items():
        y = report.history.get(key, [])
        if x and len(x) == len(y):
            title = f"{name} by training images seen"
            picture = curve_svg(x, y, title=title, x_label="images seen", y_label=name)
            drawn.append(
                page.el(
                    "figure",
                    page.Html(picture),
                    page.el("figcaption", f"{name}, last ", page.number(y[-1])),
                )
            )
    if not drawn:
        return page.section("Training", "No training curve was recorded.")
    return page.section("Training", "", page.el("div", drawn, class_="panels"))


# -- numbers ------------------------------------------------------------------------------------


def _metrics(report: ReportInput) -> page.Html:
    rows = [
        (
            (metric.name, _extractor(report.evaluation, key)),
            page.number(metric.value),
            _interval(metric),
            page.number(report.evaluation.samples if metric.n is None else metric.n),
            DASH if metric.beside is None else page.number(metric.beside),
            better_of(key) or DASH,
            metric.note,
        )
        for key, metric in sorted(report.evaluation.metrics.items(), key=story_order)
    ]
    note = (
        f"{report.evaluation.samples:,} samples. The column of real images is the same quantity "
        "for held-out images: about what a perfect model would show with as many samples. "
        "Intervals tell what other samples of the same model would give; the images they are "
        "compared with are taken as given."
    )
    heads = ("metric", "value", f"{PERCENT_95} interval", "n", "real images", "better", "note")
    return page.section(
        "Metrics", note, page.table("Metrics of the samples", heads, rows, "numbers")
    )


def _extractor(evaluation: Evaluation, key: str) -> page.Child:
    """What features a number is of, where a report has several."""
    found = extractor_of(evaluation, key)
    if found is None:
        return ()
    return page.el("p", found["name"], " ", page.code(found["digest"][:12]), class_="small")


def _interval(metric: Metric) -> page.Child:
    if metric.low is None or metric.high is None:
        return DASH
    return _ends((metric.low, metric.high))


def _ends(interval: tuple[float, float] | None) -> page.Child:
    if interval is None:
        return DASH
    return (page.number(interval[0]), " to ", page.number(interval[1]))


# -- beside others ------------------------------------------------------------------------------


def _champion(report: ReportInput) -> page.Html:
    if report.champion is None:
        return page.Html("")
    heading = "Against the champion"
    keys = differences(report.evaluation.protocol, report.champion.protocol)
    if keys:
        note = f"The numbers are not compared: the protocols differ in {', '.join(keys)}."
        return page.section(heading, note)
    note = (
        f"Both were measured under the same protocol. Differences are this model less the "
        f"champion; their {PERCENT_95} intervals take both for independent, so they are rather "
        "too wide where seeds are shared. A number is called better or worse only where its "
        "interval excludes zero, each for itself: of several numbers, one may do so by chance."
    )
    rows = [
        (
            change.mine.name,
            page.number(change.mine.value),
            page.number(change.champion.value),
            _difference(change),
            _ends(change.interval),
            _reading(change),
        )
        for change in changes(report)
    ]
    heads = ("metric", "this model", "champion", "difference", f"{PERCENT_95} interval", "reads as")
    return page.section(
        heading, note, page.table("This model and the champion", heads, rows, "numbers")
    )


def _difference(change: Change) -> page.Child:
    shown = "±0" if change.difference == 0 else f"{change.difference:+.3g}".replace("-", MINUS)
    mine, other = change.mine.value, change.champion.value
    relative = f" ({TIMES} {mine / other:.3f})" if other > 0 and mine >= 0 else ""
    return (page.exact(change.difference, shown), relative)


def _reading(change: Change) -> page.Child:
    """Whether the difference is one, and to which side."""
    if change.interval is None or change.mine.better is None:
        return DASH
    low, high = change.interval
    if low <= 0 <= high:
        return "not told apart"
    good = (high < 0) == (change.mine.better == "lower")
    word, kind = ("better", "pass") if good else ("worse", "fail")
    return page.el("span", word, class_=kind)


def _published(report: ReportInput) -> page.Html:
    departures = published.departures(report.evaluation)
    note: list[page.Child] = [f"Published numbers, not measured here: {published.PROTOCOL}. "]
    rows: list[Sequence[page.Child]] = [
        (s.system, s.family, f"{s.fid:.2f}", s.sampler, s.guidance, s.source)
        for s in published.SYSTEMS
    ]
    measured = report.evaluation.metrics.get("distance")
    if departures:
        apart = (
            "None of this evaluation's numbers may be compared with them: its protocol is another"
        )
        note += [page.el("b", apart), " (", "; ".join(departures), ")."]
    else:
        same = "This evaluation was made under that protocol: its FID may be compared with them."
        note.append(page.el("b", same))
    if not departures and measured is not None:
        value = (page.number(measured.value), " (", _interval(measured), ")")
        how = "as under Protocol, below"
        rows.insert(0, (report.model_name, "this report", value, how, how, "measured here"))
    heads = ("system", "family", "FID", "sampler", "guidance", "source")
    table = page.table("Published systems", heads, rows, "numbers published")
    return page.section("Published systems", note, table)


# -- lineage and protocol -----------------------------------------------------------------------


def _chain(report: ReportInput) -> page.Html:
    note = (
        "Each stage is sealed under the digest of what was asked for; its content is the digest of "
        "what came out, and is checked before the next stage builds on it."
    )
    heads = ("stage", "digest: asked for", "content: came out", "algorithm", "built on")
    rows = [_chain_row(ref, DASH, {}) for ref in _origins(report.chain)]
    rows += [_chain_row(r.ref, str(r.algorithm), r.inputs) for r in report.chain]
    return page.section(
        "Lineage", note, page.table("Chain of sealed records", heads, rows, "chain")
    )


def _origins(chain: Sequence[Record]) -> list[Ref]:
    """What the chain builds on and does not contain: the listing of the images."""
    known = {record.digest for record in chain}
    used = {ref.digest: ref for record in chain for ref in record.inputs.values()}
    return [ref for digest, ref in sorted(used.items()) if digest not in known]


def _chain_row(ref: Ref, algorithm: str, inputs: Mapping[str, Ref]) -> Sequence[page.Child]:
    stage = page.el("span", ref.stage, id=f"r-{ref.digest}")
    links = [_link(name, used) for name, used in sorted(inputs.items())]
    built_on = page.el("ul", links) if links else DASH
    return (stage, page.code(ref.digest), page.code(ref.content), algorithm, built_on)


def _link(name: str, ref: Ref) -> page.Html:
    return page.el(
        "li", page.el("a", name, href=f"#r-{ref.digest}"), " ", page.code(ref.digest[:12])
    )


def _protocol(report: ReportInput) -> page.Html:
    evaluation = report.evaluation
    note = (
        "Numbers are compared under equal protocols only. ",
        page.code(evaluation.protocol_digest),
    )
    heads = ("setting", "value")
    tables = [
        page.table("Protocol", heads, list(_flat(evaluation.protocol)), "settings"),
        page.table(
            "How the samples were made", heads, list(_flat(report.generated_with)), "settings"
        ),
    ]
    if report.decision is not None:
        rows = list(_flat(report.decision.policy))
        tables.append(page.table("Policy", heads, rows, "settings"))
    return page.section("Protocol", note, page.el("div", tables, class_="tables"))


def _flat(settings: Mapping[str, Any], within: str = "") -> Iterable[tuple[str, str]]:
    for key, value in sorted(settings.items()):
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{within}{key}.")
        else:
            yield within + key, value if isinstance(value, str) else canonical_bytes(value).decode()
