"""All that a report shows, and its JSON; same input, same bytes.

It holds configs, digests and values alone: no times and no machines, which differ from run to run.
The page for people is that of eqm.report_page. Called by dossier, report_note, report_ood,
report_page, verification and flows.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from eqm import published
from eqm.errors import DataError
from eqm.figures import Images, check_images
from eqm.gate import differences
from eqm.intervals import Interval, difference_interval
from eqm.names import kind_of
from eqm.records import (
    Decision,
    Evaluation,
    Json,
    Metric,
    OODRow,
    Record,
    canonical_bytes,
    digest,
    to_json,
)

SCHEMA = "eqm-report/2"
"""Described by eqm/schemas/report-2.json; the number is raised when a field changes its meaning."""
LEVEL = 0.95
"""Of every interval."""
Better = Literal["lower", "higher"]
BETTER: dict[str, Better] = {
    "distance": "lower",
    "distance_endless": "lower",
    "distance_held_out": "lower",
    "spatial_distance": "lower",
    "kid": "lower",
    "score": "higher",
    "precision": "higher",
    "recall": "higher",
    "label_agreement": "higher",
}
"""Which way a metric improves, by its kind; how near samples are to training images has no better
side."""
ON_PIXELS = ("label_agreement", "nearest", "copies")
"""Metrics that no extractor has a part in."""
OOD_NAMES: dict[str, tuple[str, Better]] = {
    "auroc": ("AUROC", "higher"),
    "aupr": ("AUPR, other images positive", "higher"),
    "aupr_in": ("AUPR, held-out positive", "higher"),
    "fpr95_out": ("FPR95, other images positive", "lower"),
    "fpr95_in": ("FPR95, held-out positive", "lower"),
}
"""Measures of a row, and which way they improve."""


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
    sample_counts: Sequence[int] = ()
    """How many of them there are of each class, where not all are: black ones stand for none."""
    real_counts: Sequence[int] = ()
    class_names: Sequence[str]
    ood_scores: Mapping[str, Mapping[str, list[float]]]
    """Score -> set -> scores; "held-out" is among the sets of each."""
    trajectory: Images | None = None
    """(T, K, C, H, W): one image of each class along the descent."""
    trajectory_updates: Sequence[int] = ()
    generated_with: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the sampler, and seeds."""
    sample_seeds: Sequence[Sequence[int]] = ()
    """Seeds of the samples of each class that is shown."""

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


# -- comparisons --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Number:
    """One measured number, by itself."""

    key: str
    """"metrics.distance", "ood.constant.gradient_norm.auroc": where it stands in the evaluation."""
    name: str
    value: float
    interval: tuple[float, float] | None
    """95 %: what other samples, or other images of the same kind, would give."""
    n: int
    """Samples or images that it is of."""
    beside: float | None
    """The same quantity for real held-out images."""
    better: Literal["lower", "higher"] | None
    extractor: Mapping[str, str] | None = None
    """Name and digest of what features it is of, where an evaluation has several extractors."""


def numbers_of(evaluation: Evaluation) -> list[Number]:
    """Every measured number of an evaluation, in the order of the story."""
    metrics = [
        Number(
            key=f"metrics.{key}",
            name=metric.name,
            value=metric.value,
            interval=_ends(metric.low, metric.high),
            n=evaluation.samples if metric.n is None else metric.n,
            beside=metric.beside,
            better=better_of(key),
            extractor=extractor_of(evaluation, key),
        )
        for key, metric in sorted(evaluation.metrics.items(), key=story_order)
    ]
    return metrics + [number for row in evaluation.ood for number in _separations(row)]


def _ends(low: float | None, high: float | None) -> tuple[float, float] | None:
    return None if low is None or high is None else (low, high)


def _separations(row: OODRow) -> Iterator[Number]:
    for key, (measure, better) in OOD_NAMES.items():
        value: float | None = getattr(row, key)
        if value is not None:
            yield Number(
                key=f"ood.{row.name}.{row.score}.{key}",
                name=f"{measure}: {row.name} by {row.score}",
                value=value,
                interval=_ends(getattr(row, f"{key}_low"), getattr(row, f"{key}_high")),
                n=row.count,
                beside=None,
                better=better,
            )


def story_order(item: tuple[str, Metric]) -> tuple[str, int, str]:
    """Sorts the metrics of an evaluation: known ones first, in their order.

    Those under further extractors follow, one extractor after the other.
    """
    kind, extractor = kind_of(item[0])
    order = list(BETTER)
    return (extractor or "", order.index(kind) if kind in order else len(order), item[0])


def better_of(key: str) -> Better | None:
    """Which way a metric improves; None where it has no better side."""
    return BETTER.get(kind_of(key)[0])


def extractor_of(evaluation: Evaluation, key: str) -> Mapping[str, str] | None:
    """Name and digest of the extractor whose features a metric is of.

    None where there is but one, which the protocol names, and for metrics of pixels.
    """
    kind, name = kind_of(key)
    further: Mapping[str, Any] = evaluation.protocol.get("further", {})
    if not further or kind in ON_PIXELS:
        return None
    return evaluation.protocol["extractor"] if name is None else further[name]["extractor"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One number of this model beside the champion's."""

    mine: Number
    champion: Number
    difference: float
    interval: tuple[float, float] | None
    """95 % of the difference; None where one of both has none."""


def changes(report: ReportInput) -> list[Change]:
    """Numbers that this model and the champion both have; none under different protocols.

    Of scores the main one's alone: baselines know nothing of either model.
    """
    champion = report.champion
    if champion is None or report.evaluation.protocol_digest != champion.protocol_digest:
        return []
    theirs = {number.key: number for number in numbers_of(_of_main(champion))}
    mine = numbers_of(_of_main(report.evaluation))
    pairs = [(number, theirs.get(number.key)) for number in mine]
    # A key that is called otherwise holds another quantity.
    return [_change(a, b) for a, b in pairs if b is not None and a.name == b.name]


def _of_main(evaluation: Evaluation) -> Evaluation:
    rows = tuple(row for row in evaluation.ood if row.role == "main")
    return replace(evaluation, ood=rows)


def _change(mine: Number, champion: Number) -> Change:
    interval = None
    if mine.interval is not None and champion.interval is not None:
        found = difference_interval(_interval(mine), _interval(champion))
        interval = found.low, found.high
    difference = mine.value - champion.value
    return Change(mine=mine, champion=champion, difference=difference, interval=interval)


def _interval(number: Number) -> Interval:
    low, high = number.interval or (number.value, number.value)
    return Interval(number.value, low, high)


# -- JSON ---------------------------------------------------------------------------------------


def render_json(report: ReportInput) -> bytes:
    """All numbers, the decision and the chain, as eqm/schemas/report-2.json describes them.

    Raises ConfigError for NaN and infinities.
    """
    return canonical_bytes(_document(report)) + b"\n"


def _document(report: ReportInput) -> Json:
    evaluation = report.evaluation
    return {
        "schema": SCHEMA,
        "title": report.title,
        "model": report.model_name,
        "evaluation": _evaluation_json(evaluation),
        "numbers": [_number_json(number) for number in numbers_of(evaluation)],
        "decision": to_json(report.decision),
        "champion": _evaluation_json(report.champion) if report.champion else None,
        "comparison": _comparison_json(report),
        "published": {
            "protocol": published.PROTOCOL,
            "departures": list(published.departures(evaluation)),
            "systems": to_json(published.SYSTEMS),
        },
        "chain": [_record_json(record) for record in report.chain],
        "history": to_json(report.history),
        "ood_scores": to_json(report.ood_scores),
        "classes": list(report.class_names),
        "generated_with": to_json(report.generated_with),
        "trajectory_updates": list(report.trajectory_updates),
        "images": {name: _picture_json(images) for name, images in _pictures(report)},
    }


def _pictures(report: ReportInput) -> Iterator[tuple[str, Images]]:
    yield "samples", report.sample_images
    yield "real", report.real_images
    if report.trajectory is not None:
        yield "trajectory", report.trajectory


def _evaluation_json(evaluation: Evaluation) -> Json:
    return {**to_json(evaluation), "protocol_digest": evaluation.protocol_digest}


def _number_json(number: Number) -> Json:
    found = {**to_json(number), "interval": _interval_json(number.interval)}
    if number.extractor is None:
        del found["extractor"]
    return found


def _interval_json(ends: tuple[float, float] | None) -> Json:
    return None if ends is None else {"level": LEVEL, "low": ends[0], "high": ends[1]}


def _comparison_json(report: ReportInput) -> Json:
    if report.champion is None:
        return None
    differ = differences(report.evaluation.protocol, report.champion.protocol)
    rows = [
        {
            "key": change.mine.key,
            "name": change.mine.name,
            "value": change.mine.value,
            "champion": change.champion.value,
            "difference": change.difference,
            "interval": _interval_json(change.interval),
            "better": change.mine.better,
        }
        for change in changes(report)
    ]
    return {"comparable": not differ, "protocols_differ_in": differ, "changes": rows}


def _record_json(record: Record) -> Json:
    body = to_json(record)
    sealed = {k: v for k, v in body.items() if k not in ("logs", "provenance")}
    return {"digest": record.digest, "content": record.content, **sealed}


def _picture_json(images: Images) -> Json:
    return {"shape": list(images.shape), "sha256": hashlib.sha256(images.tobytes()).hexdigest()}


def report_key(evaluation: str, title: str, model_name: str, decision: Decision | None) -> str:
    """Where a report lies in the store, without its suffix.

    All of it is a function of the evaluation (its digest) and of what else is named here, so it
    has one name, and cannot stand under the name of another.
    """
    asked = digest({"title": title, "model": model_name, "decision": decision})
    return f"reports/{evaluation}/{asked[:16]}"
