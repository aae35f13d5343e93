"""The arithmetic of a study: evaluations by row and repetition in, a table out.

Over repetitions (another training, other noise) a number has the mean and Student's 95 % interval;
a single repetition has the metric's own interval, which tells what other samples of the same model
would give, and says nothing of other trainings. Rows are held against the first one in pairs, for
the rows of one repetition start from the same noise. A row of which a repetition diverged has no
means: those of the others alone would flatter it. Pure. Called by study, study_page and
flows.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

from eqm.config import StudyStage, study_input
from eqm.errors import DataError
from eqm.gate import differences
from eqm.records import (
    Estimate,
    Evaluation,
    OODRow,
    Record,
    StudyScore,
    StudyTable,
    StudyTableRow,
    from_json,
)

Cells: TypeAlias = Sequence[Evaluation | None]
"""Repetitions of one row; None where one diverged."""

SHOWN = ("distance", "distance_endless", "kid", "precision", "recall", "label_agreement")
"""Metrics of an evaluation that a table has, where they were measured."""
MAIN = "distance"
"""What rows are held against each other by."""


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean with Student's 95 % interval: value, low, high; of one value there is no interval.

    Raises DataError for no values.
    """
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


def summarise(asked: StudyStage, evaluations: Sequence[Cells]) -> StudyTable:
    """The table of evaluations by row and repetition.

    Raises DataError where they do not fit, or where no row is whole.
    """
    whole = [_whole(row) for row in evaluations]
    first = next((row[0] for row in whole if row), None)
    if first is None:
        raise DataError(
            f"study {asked.study}: no row has all its repetitions, so there is no table; the first "
            f"that failed: {next(iter(asked.failed.values()), 'unknown')}"
        )
    present = [cell for row in evaluations for cell in row if cell is not None]
    keys = [key for key in SHOWN if all(key in cell.metrics for cell in present)]
    if MAIN not in keys:
        raise DataError(f"study {asked.study}: an evaluation has no {MAIN}: evaluate it again")
    varied = _varied(asked, first, present)
    return StudyTable(
        study=asked.study,
        seeds=asked.seeds,
        names={key: first.metrics[key].name for key in keys},
        rows=tuple(_row(asked, i, evaluations, keys) for i in range(len(asked.rows))),
        protocols_differ_in=tuple(varied),
        outliers=tuple(_scores(asked, whole)) if asked.outliers else (),
    )


def _whole(row: Cells) -> list[Evaluation]:
    """The repetitions of a row, none where one of them failed."""
    found = [cell for cell in row if cell is not None]
    return found if len(found) == len(row) else []


def _row(
    asked: StudyStage, number: int, evaluations: Sequence[Cells], keys: Sequence[str]
) -> StudyTableRow:
    label, row = asked.rows[number].label, evaluations[number]
    cells, first = _whole(row), _whole(evaluations[0])
    if not cells:
        inputs = [study_input(number, k) for k in range(asked.seeds)]
        return StudyTableRow(
            label=label,
            metrics={},
            evaluations=None,
            against_first=None,
            failed={
                str(k + 1): asked.failed[name]
                for k, name in enumerate(inputs)
                if name in asked.failed
            },
            distances=tuple(None if cell is None else cell.metrics[MAIN].value for cell in row),
        )
    return StudyTableRow(
        label=label,
        metrics={key: _estimate(cells, key) for key in keys},
        evaluations=_of([cell.mean_field_evaluations for cell in cells]),
        against_first=_against(cells, first) if number and first else None,
    )


def _varied(asked: StudyStage, first: Evaluation, present: Sequence[Evaluation]) -> list[str]:
    """Settings in which protocols of rows differ; all must be ones that rows change."""
    found = sorted({name for e in present for name in differences(first.protocol, e.protocol)})
    meant = {dotted for row in asked.rows for dotted in row.changes}
    odd = [name for name in found if name not in meant]
    if odd:
        raise DataError(
            f"study {asked.study}: protocols differ in {', '.join(odd)}, which no row changes, so "
            "its numbers cannot stand in one table: run the study again"
        )
    return found


def _scores(asked: StudyStage, whole: Sequence[Sequence[Evaluation]]) -> list[StudyScore]:
    """Scores of the models of each whole row, then baselines, which are the same for all of them.

    Raises DataError where repetitions have different scores or sets.
    """
    found: list[StudyScore] = []
    baselines: list[StudyScore] = []
    for row, cells in zip(asked.rows, whole, strict=True):
        if not cells:
            continue
        by_cell = [{(one.score, one.name): one for one in cell.ood} for cell in cells]
        if any(list(one) != list(by_cell[0]) for one in by_cell):
            raise DataError(
                f"study {asked.study}: repetitions of row {row.label!r} were scored by different "
                "scores or sets: run the study again"
            )
        for (score, name), one in by_cell[0].items():
            of_model = one.role != "baseline"
            auroc = _auroc([cell[score, name] for cell in by_cell])
            made = StudyScore(
                row=row.label if of_model else "", score=score, name=name, auroc=auroc
            )
            if of_model:
                found.append(made)
            elif made.score not in {b.score for b in baselines if b.name == name}:
                baselines.append(made)
    return found + baselines


def _auroc(rows: Sequence[OODRow]) -> Estimate:
    """Over repetitions; what no repetition changes has its own interval, of other images."""
    values = tuple(row.auroc for row in rows)
    if len(set(values)) == 1:
        mean, low, high = values[0], rows[0].auroc_low, rows[0].auroc_high
    else:
        mean, low, high = mean_interval(values)
        # Student's interval knows of no bounds, and a share has them.
        low, high = (None if end is None else min(max(end, 0.0), 1.0) for end in (low, high))
    return Estimate(
        value=mean,
        low=low,
        high=high,
        values=values,
        lows=tuple(row.auroc_low for row in rows),
        highs=tuple(row.auroc_high for row in rows),
    )


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
