"""Nights of a model that stands still, and of one that moved."""

from typing import Any

import numpy as np
import pytest

from eqm import drift
from eqm.frechet import Gaussian, Moments
from eqm.intervals import Interval, frechet_intervals
from eqm.records import Evaluation, Metric

DIMENSION, SAMPLES = 4, 320
REFERENCE = Gaussian.of_moments(
    Moments.of(np.random.default_rng(0).standard_normal((20_000, DIMENSION)))
)


def night(seed: int, *, shift: float = 0.0, **protocol: Any) -> Evaluation:
    """Samples of a model at some distance of the reference, with seeds of their own."""
    random = np.random.default_rng(seed)
    found = frechet_intervals(0.5 + shift + random.standard_normal((SAMPLES, DIMENSION)), REFERENCE)
    assert found is not None
    return evaluation(found.plain, **protocol)


def evaluation(plain: Interval | None, **protocol: Any) -> Evaluation:
    metrics = {}
    if plain is not None:
        metrics["distance"] = Metric(
            name="FD[test]-320", value=plain.value, low=plain.low, high=plain.high
        )
    return Evaluation(
        protocol={"images": "digits", **protocol},
        samples=SAMPLES,
        metrics=metrics,
        ood=(),
        mean_field_evaluations=1.0,
    )


def alarms(pairs: int, *, shift: float) -> float:
    """Share of nights with an alarm, each beside a promotion of its own."""
    found = [
        drift.between(night(2 * i + 1), night(2 * i + 2, shift=shift)).alarm for i in range(pairs)
    ]
    return sum(found) / pairs


def test_a_model_that_stands_still_raises_an_alarm_in_one_night_of_twenty() -> None:
    # Three standard errors of a share of 5 % over 200 nights are 4.6 %.
    assert 0.005 <= alarms(200, shift=0.0) <= 0.096


def test_a_model_that_moved_is_noticed() -> None:
    assert alarms(30, shift=0.2) > 0.9


def test_it_is_told_in_which_direction() -> None:
    worse = drift.between(night(1), night(2, shift=0.3))
    assert worse.outcome == "drift"
    assert worse.low is not None
    assert worse.low > 0
    better = drift.between(night(1, shift=0.3), night(2))
    assert better.outcome == "drift"
    assert better.high is not None
    assert better.high < 0
    assert "which excludes zero" in better.text
    assert "which holds zero" in drift.between(night(1), night(1)).text


def test_reaches_add_as_squares_and_a_cut_end_does_not_count() -> None:
    now, then = Interval(9.0, 6.0, 12.0), Interval(2.0, 0.0, 6.0)
    assert drift.difference(now, then) == Interval(7.0, 2.0, 12.0)


@pytest.mark.parametrize(
    ("then", "now", "why"),
    [
        (evaluation(None), night(1), "evaluation at promotion has no distance"),
        (night(1), evaluation(None), "evaluation of the night has no distance"),
        (night(1), night(2, images="others"), "another protocol"),
    ],
)
def test_what_cannot_be_compared_is_no_alarm(then: Evaluation, now: Evaluation, why: str) -> None:
    found = drift.between(then, now)
    assert found.outcome == "unknown"
    assert not found.alarm
    assert why in found.text


def test_without_an_interval_nothing_is_known() -> None:
    few = Evaluation(
        protocol={"images": "digits"},
        samples=20,
        metrics={"distance": Metric(name="FD[test]-20", value=3.0)},
        ood=(),
        mean_field_evaluations=1.0,
    )
    found = drift.between(few, night(1))
    assert (found.outcome, found.then) == ("unknown", 3.0)
    assert "raise generate.samples" in found.text
