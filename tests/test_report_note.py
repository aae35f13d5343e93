"""A note says the verdict, why, and what was measured, and nothing in it is taken for Markdown."""

from dataclasses import replace

from test_report import HOSTILE, evaluation

from eqm.gate import decide
from eqm.policy import PolicyConfig
from eqm.records import Metric, Ref
from eqm.report_note import LONGEST, render_note

ADDRESS = Ref(stage="evaluation", digest="0123456789ab" + "0" * 52, content="c" * 64)


def note(measured=None, **policy):
    measured = measured or evaluation()
    asked = PolicyConfig(name="mine", minimum_samples=10, minimum_auroc={}, **policy)
    return render_note(measured, decide(measured, ADDRESS, asked), digest=ADDRESS.digest)


def test_a_note_tells_verdict_reasons_and_numbers() -> None:
    told = note().splitlines()
    assert told[0] == "Evaluation `0123456789ab`, 1,797 samples."
    assert "| FD\\[cnn\\]-1797 | 6.123 | &ndash; | 4.877 |" in told
    assert "| AUROC: photographs by gradient\\_norm | 0.9877 | 0.9765 to 0.9988 | &ndash; |" in told
    # Of each set one number, and none that nobody asks for first.
    assert not [line for line in told if "FPR95" in line or "AUPR" in line]


def test_of_scores_a_note_has_the_main_one() -> None:
    (main,) = evaluation().ood
    baseline = replace(main, score="pixel_pca", role="baseline", auroc=0.999)
    told = note(replace(evaluation(), ood=(main, baseline)))
    assert [line for line in told.splitlines() if "AUROC" in line and line.startswith("|")] == [
        "| AUROC: photographs by gradient\\_norm | 0.9877 | 0.9765 to 0.9988 | &ndash; |"
    ]


def test_a_verdict_is_that_of_the_decision() -> None:
    assert "**Passed**, by policy “mine”:" in note()
    failed = note(maximum_distance=1.0)
    assert "**Not promoted**, by policy “mine”:" in failed
    assert "- ✗ **failed** " in failed
    undecided = render_note(evaluation(), None, digest=ADDRESS.digest)
    assert "policy" not in undecided
    assert "| metric | value |" in undecided


def test_what_is_not_ours_is_text() -> None:
    told = note(evaluation(name=HOSTILE))
    (row,) = [line for line in told.splitlines() if "AUROC" in line]
    assert "<" not in row.replace("\\<", "")
    assert row.replace("\\|", "").count("|") == 5


def test_a_note_fits_where_mlflow_keeps_it() -> None:
    many = {f"metric-{k:03}": Metric(name=f"m{k:03} " + "x" * 90, value=1.0) for k in range(200)}
    told = note(replace(evaluation(), metrics={**evaluation().metrics, **many}))
    assert len(told) <= LONGEST
    assert told.endswith("There is more in the report.")
    assert "**Passed**" in told
