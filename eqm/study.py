"""Stage "study": evaluations of many models or samplers -> one table. ``python -m eqm.study JOB``

What the table holds is computed by eqm.study_table, and shown by eqm.study_page.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from eqm.config import StudyStage, study_input
from eqm.dossier import evaluation_of
from eqm.records import Evaluation, canonical_bytes, to_json
from eqm.stage import Context, Outcome, open_ref
from eqm.stage import main as stage_main
from eqm.study_table import summarise


@dataclass(frozen=True)
class Cell:
    """One repetition of one row."""

    evaluation: Evaluation
    seconds: float | None
    """What its sampler took; None where that was not kept."""


def program(context: Context) -> Outcome | None:
    """Put the evaluations into a table; one process does it."""
    if not context.world.is_first:
        return None
    asked: StudyStage = context.config
    cells = [
        [_cell(context, study_input(i, k)) for k in range(asked.seeds)]
        for i in range(len(asked.rows))
    ]
    table = summarise(asked, [[cell and cell.evaluation for cell in row] for row in cells])
    seconds = [_mean([cell and cell.seconds for cell in row]) for row in cells]
    return Outcome(
        outputs={"table.json": canonical_bytes(table)},
        values={"table": to_json(table)},
        # They differ from run to run, so they are no part of what came out.
        logs={"seconds.json": canonical_bytes(seconds)},
    )


def _cell(context: Context, name: str) -> Cell | None:
    """One cell; None where it failed, as the config says."""
    if name in context.config.failed:
        return None
    record = context.input(name)
    samples = open_ref(context.store, record.inputs["samples"])
    taken: dict[str, float] = samples.provenance.get("seconds") or {}
    return Cell(evaluation_of(record), taken.get("sampler"))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def main(argv: list[str]) -> int:
    """Run the stage program."""
    return stage_main(("study",), program, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
