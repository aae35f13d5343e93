"""Whether a model that stands still gives other samples than on the day it was promoted.

Two evaluations of one model under one protocol, with other seeds: their distances to the same
reference differ by chance alone, unless something moved (a library, a kernel, a machine, the
bytes). The samples are independent, so the squares of the reaches of both intervals add up, each
by a jackknife over groups (eqm.intervals). An alarm is a difference whose 95 % interval excludes
zero. Pure; called by flows every night.

A champion is the best of several candidates, so the samples of its promotion were lucky, and every
night looks worse than they: of the best of 26, up to one night in five raised an alarm in
simulations. The first night after a promotion was chosen for nothing. It is compared with the
promotion, and later nights with it. All of them share it, so alarms come several in a row.
"""

import math
from dataclasses import dataclass
from typing import Literal

from eqm.intervals import Interval
from eqm.records import Evaluation, Metric

METRIC = "distance"


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What a night has to say of the champion."""

    outcome: Literal["none", "drift", "unknown"]
    """"unknown": the two cannot be compared, or nothing tells how sure the numbers are."""
    text: str
    now: float | None = None
    then: float | None = None
    difference: float | None = None
    """Of the distances, now less then."""
    low: float | None = None
    """Lower end of its 95 % interval."""
    high: float | None = None

    @property
    def alarm(self) -> bool:
        """Whether somebody should look."""
        return self.outcome == "drift"


def difference(now: Interval, then: Interval) -> Interval:
    """Interval of the difference of two independent estimates.

    Reaches are taken upwards: a lower end may have been cut off at 0. Both are reaches of Student's
    t with the degrees of freedom of one, of which the difference has more: it is a little too wide.
    """
    value = now.value - then.value
    reach = math.hypot(now.high - now.value, then.high - then.value)
    return Interval(value, value - reach, value + reach)


def between(then: Evaluation, now: Evaluation, *, when: str = "at promotion") -> Drift:
    """Drift from one evaluation of a model to another with other seeds.

    ``when``: what to call the first one.
    """
    before, after = then.metrics.get(METRIC), now.metrics.get(METRIC)
    if before is None or after is None:
        which = when if before is None else "of the night"
        return Drift(outcome="unknown", text=f"the evaluation {which} has no {METRIC}")
    if then.protocol_digest != now.protocol_digest:
        return Drift(
            outcome="unknown",
            text=f"{after.name} is {after.value:.4g}; the evaluation {when} was of another "
            "protocol (other images, another sampler), and is not comparable",
            now=after.value,
            then=before.value,
        )
    ends = _interval(after), _interval(before)
    if ends[0] is None or ends[1] is None:
        return Drift(
            outcome="unknown",
            text=f"{after.name} is {after.value:.4g}, {before.value:.4g} {when}; for want of "
            "samples there is no interval: raise generate.samples",
            now=after.value,
            then=before.value,
        )
    found = difference(ends[0], ends[1])
    drifted = found.low > 0 or found.high < 0
    verdict = "which excludes zero" if drifted else "which holds zero"
    return Drift(
        outcome="drift" if drifted else "none",
        text=f"{after.name} is {after.value:.4g}, {before.value:.4g} {when}; the difference "
        f"is {found.value:.3g}, its 95 % interval {found.low:.3g} to {found.high:.3g}, {verdict}",
        now=after.value,
        then=before.value,
        difference=found.value,
        low=found.low,
        high=found.high,
    )


def _interval(metric: Metric) -> Interval | None:
    if metric.low is None or metric.high is None:
        return None
    return Interval(metric.value, metric.low, metric.high)
