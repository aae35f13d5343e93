"""What an evaluation came to, in some lines of Markdown; the report has the rest.

For pages that others draw: a run and a version in MLflow, a flow run in Prefect. Called by flows.
"""

from collections.abc import Iterator

from eqm.records import Decision, Evaluation
from eqm.report import LEVEL, Number, numbers_of

LONGEST = 4900
"""Characters; MLflow keeps 5,000 of a version's description."""
DASH = "&ndash;"


def render_note(evaluation: Evaluation, decision: Decision | None, *, digest: str) -> str:
    """Markdown: the verdict, why, and the numbers; ``digest``: of the evaluation.

    Of separations the AUROC of main scores alone. What would pass LONGEST is left out from the end,
    with a word of that.
    """
    lines = list(_lines(evaluation, decision, digest))
    rest = "\n\nThere is more in the report."
    kept = len(lines)
    while len("\n".join(lines[:kept])) > LONGEST - len(rest):
        kept -= 1
    return "\n".join(lines[:kept]) + (rest if kept < len(lines) else "")


def _lines(evaluation: Evaluation, decision: Decision | None, digest: str) -> Iterator[str]:
    yield f"Evaluation `{digest[:12]}`, {evaluation.samples:,} samples."
    if decision is not None:
        policy = _plain(str(decision.policy.get("name", "")))
        yield ""
        yield f"**{'Passed' if decision.promote else 'Not promoted'}**, by policy “{policy}”:"
        yield ""
        for reason in decision.reasons:
            mark = "✓" if reason.passed else "✗ **failed**"
            yield f"- {mark} {_plain(reason.check)}: {_plain(reason.text)}"
    yield ""
    yield f"| metric | value | {100 * LEVEL:.0f} % interval | real images |"
    yield "| --- | ---: | :---: | ---: |"
    main = {f"ood.{row.name}.{row.score}.auroc" for row in evaluation.ood if row.role == "main"}
    for number in numbers_of(evaluation):
        if number.key.startswith("metrics.") or number.key in main:
            yield _row(number)


def _row(number: Number) -> str:
    interval = DASH
    if number.interval is not None:
        interval = f"{_shown(number.interval[0])} to {_shown(number.interval[1])}"
    beside = DASH if number.beside is None else _shown(number.beside)
    return f"| {_plain(number.name)} | {_shown(number.value)} | {interval} | {beside} |"


def _shown(value: float) -> str:
    return f"{value:.4g}"


def _plain(text: str) -> str:
    """Text that Markdown shows as it stands: it may name a class, a file or a set."""
    told = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#~!$" else c for c in told)
