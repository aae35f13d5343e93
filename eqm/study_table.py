"""The arithmetic of a study: evaluations by row and repetition in, a table out.

Over repetitions (another training, other noise) a number has the mean and Student's 95 % interval;
a single repetition has the metric's own interval, which tells what other samples of the same model
would give, and says nothing of other trainings. Rows are held against the first one in pairs, for
the rows of one repetition start from the same noise. Pure. Called by study.
"""

import math
from collections.abc import Sequence

from eqm.config import StudyStage
from eqm.errors import DataError
from eqm.gate import differences
from eqm.records import Estimate, Evaluation, Record, StudyTable, StudyTableRow, from_json

SHOWN = ("distance", "distance_endless", "kid", "precision", "recall", "label_agreement")
"""Metrics of an evaluation that a table has, where they were measured."""
MAIN = "distance"
"""What rows are held against each other by."""


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean with Student's 95 % interval: value, low, high; of one value there is no interval."""
    from scipy.stats import t

    count = len(values)
    if not count:
        raise DataError("there are no values to take the mean of: give at least one")
    mean = math.fsum(values) / count
    if count == 1:
        return mean, None, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    reach = float(t.ppf(0.975, count - 1)) * math.sqrt(variance / count)
    return mean, mean - reach, mean + reach


def summarise(asked: StudyStage, evaluations: Sequence[Sequence[Evaluation]]) -> StudyTable:
    """The table of evaluations by row and repetition. Raises DataError where they do not fit."""
    first = evaluations[0][0]
    keys = [key for key in SHOWN if all(key in e.metrics for row in evaluations for e in row)]
    if MAIN not in keys:
        raise DataError(f"study {asked.study}: an evaluation has no {MAIN}: evaluate it again")
    varied = _varied(asked, first, evaluations)
    rows = [
        StudyTableRow(
            label=row.label,
            metrics={key: _estimate(cells, key) for key in keys},
            evaluations=_of([cell.mean_field_evaluations for cell in cells]),
            against_first=None if i == 0 else _against(cells, evaluations[0]),
        )
        for i, (row, cells) in enumerate(zip(asked.rows, evaluations, strict=True))
    ]
    return StudyTable(
        study=asked.study,
        seeds=asked.seeds,
        names={key: first.metrics[key].name for key in keys},
        rows=tuple(rows),
        protocols_differ_in=tuple(varied),
    )


def _varied(
    asked: StudyStage, first: Evaluation, evaluations: Sequence[Sequence[Evaluation]]
) -> list[str]:
    """Settings in which protocols of rows differ; all must be ones that rows change."""
    found = sorted(
        {
            name
            for row in evaluations
            for e in row
            for name in differences(first.protocol, e.protocol)
        }
    )
    meant = {dotted for row in asked.rows for dotted in row.changes}
    odd = [name for name in found if name not in meant]
    if odd:
        raise DataError(
            f"study {asked.study}: protocols differ in {', '.join(odd)}, which no row changes, so "
            "its numbers cannot stand in one table: run the study again"
        )
    return found


def _estimate(cells: Sequence[Evaluation], key: str) -> Estimate:
    metrics = [cell.metrics[key] for cell in cells]
    found = _of([metric.value for metric in metrics])
    beside = metrics[0].beside
    if len(metrics) == 1:
        return Estimate(
            value=found.value,
            low=metrics[0].low,
            high=metrics[0].high,
            values=found.values,
            beside=beside,
        )
    return Estimate(
        value=found.value,
        low=found.low,
        high=found.high,
        values=found.values,
        lows=tuple(metric.low for metric in metrics),
        highs=tuple(metric.high for metric in metrics),
        beside=beside,
    )


def _of(values: Sequence[float]) -> Estimate:
    mean, low, high = mean_interval(values)
    return Estimate(value=mean, low=low, high=high, values=tuple(values))


def _against(cells: Sequence[Evaluation], first: Sequence[Evaluation]) -> Estimate:
    pairs = zip(cells, first, strict=True)
    return _of([a.metrics[MAIN].value - b.metrics[MAIN].value for a, b in pairs])


def table_of(record: Record) -> StudyTable:
    """The typed table in the record of a study."""
    return from_json(StudyTable, record.values["table"], f"study {record.digest[:12]}")
