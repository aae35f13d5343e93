"""Whether a candidate may become champion: two evaluations and a policy in, reasons out.

Every check is made and told, also after one has failed, so that all of a refusal can be acted upon
at once. What is absent, not finite or not comparable fails: for want of evidence, nothing is
promoted. Rows that only inform (``gated`` is False) are never read. Pure. Called by report,
report_page, study_table, verification, and by flows before a promotion.
"""

import datetime
import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, cast

from eqm.intervals import Interval, difference_interval
from eqm.names import kind_of
from eqm.policy import MetricRule, OODRule, PolicyConfig
from eqm.records import Decision, Evaluation, Metric, OODRow, Reason, Ref, to_json

NEVER_NEGATIVE = ("distance", "distance_held_out", "spatial_distance", "nearest")
"""Metrics that are distances; those without bias, FID-infinity and KID, may be negative."""
FRACTIONS = ("precision", "recall", "label_agreement", "copies")
MEASURES = ("auroc", "aupr", "fpr95")
"""How the names of a row's measures begin."""
MOST_KEYS_TOLD = 8
MOST_CLOCKS_DIFFER_DAYS = 1 / 24


def decide(
    candidate: Evaluation,
    candidate_ref: Ref,
    policy: PolicyConfig,
    *,
    champion: Evaluation | None = None,
    champion_ref: Ref | None = None,
    studies: Mapping[str, Ref] | None = None,
    evaluated: datetime.datetime | None = None,
    now: datetime.datetime | None = None,
) -> Decision:
    """Hold a candidate against the policy and the champion; it is promoted if every check passes.

    ``champion`` and its ref come together. ``studies`` are those that are sealed for the candidate,
    by name. ``evaluated`` and ``now``, both with a time zone, say how old the evaluation is. Raises
    ValueError if only one of champion and its ref is given.
    """
    if (champion is None) != (champion_ref is None):
        raise ValueError("champion and champion_ref go together: give both, or neither")
    sealed = {name: ref for name, ref in (studies or {}).items() if name in policy.required_studies}
    reasons = (
        _samples(candidate, policy),
        _numbers(candidate),
        *_bounds(candidate, policy),
        *_separations(candidate, policy),
        *_floors(candidate, policy),
        *_studies(sealed, policy),
        *_freshness(policy, evaluated, now),
        *_against(candidate, candidate_ref, policy, champion, champion_ref),
    )
    return Decision(
        promote=all(reason.passed for reason in reasons),
        policy=to_json(policy),
        candidate=candidate_ref,
        champion=champion_ref,
        reasons=reasons,
        studies=sealed,
    )


def differences(one: Mapping[str, Any], other: Mapping[str, Any], within: str = "") -> list[str]:
    """Dotted names of the settings in which two protocols differ, sorted."""
    found: list[str] = []
    for key in sorted({*one, *other}):
        if key not in one or key not in other:
            found.append(within + key)
            continue
        a, b = one[key], other[key]
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            inner = cast("tuple[Mapping[str, Any], Mapping[str, Any]]", (a, b))
            found.extend(differences(*inner, f"{within}{key}."))
        elif to_json(a) != to_json(b):
            found.append(within + key)
    return found


# -- the candidate alone ------------------------------------------------------------------------


def _samples(candidate: Evaluation, policy: PolicyConfig) -> Reason:
    have, need = candidate.samples, policy.minimum_samples
    text = f"{have:,} samples were judged; the policy asks for at least {need:,}"
    return Reason(check="samples", passed=have >= need, text=text)


def _numbers(candidate: Evaluation) -> Reason:
    checked = list(_values(candidate))
    wrong = [f"{name} is {value!r}" for name, value, valid in checked if not valid(value)]
    wrong += list(_intervals(candidate))
    text = "; ".join(wrong) if wrong else f"all {len(checked)} numbers are finite and in range"
    return Reason(check="numbers", passed=not wrong, text=text)


def _values(candidate: Evaluation) -> Iterator[tuple[str, float, Callable[[float], bool]]]:
    """Every number that may be read, with its name and its range."""
    yield "mean_field_evaluations", candidate.mean_field_evaluations, _not_negative
    for key, metric in candidate.metrics.items():
        yield key, metric.value, _range_of(key)
        for name, value in (
            (f"{key} of real images", metric.beside),
            (f"lower end of {key}", metric.low),
            (f"upper end of {key}", metric.high),
        ):
            if value is not None:
                yield name, value, _range_of(key)
    for row in candidate.ood:
        if row.gated:
            for name, value in _measures(row).items():
                yield f"{name} of {_read_as(row)}", value, _fraction


def _measures(row: OODRow) -> dict[str, float]:
    """The numbers of a row that were measured; all of them are fractions."""
    values = {f.name: getattr(row, f.name) for f in fields(row)}
    return {k: v for k, v in values.items() if k.startswith(MEASURES) and v is not None}


def _read_as(row: OODRow) -> str:
    """What a policy calls a row."""
    return row.name if row.role == "main" else f"{row.name}/{row.score}"


def _intervals(candidate: Evaluation) -> Iterator[str]:
    """What is wrong with the intervals themselves."""
    for key, metric in candidate.metrics.items():
        if (metric.low is None) != (metric.high is None):
            yield f"the interval of {key} has one end"
        elif metric.low is not None and metric.high is not None and metric.low > metric.high:
            yield f"the interval of {key} goes from {metric.low!r} down to {metric.high!r}"


def _range_of(key: str) -> Callable[[float], bool]:
    key, _ = kind_of(key)
    if key in FRACTIONS:
        return _fraction
    return _not_negative if key in NEVER_NEGATIVE else math.isfinite


def _not_negative(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _fraction(value: float) -> bool:
    return 0 <= value <= 1


def _bounds(candidate: Evaluation, policy: PolicyConfig) -> Iterator[Reason]:
    """The absolute bounds of every metric that the policy names."""
    for key, rule in sorted(policy.rules.items()):
        metric = candidate.metrics.get(key)
        if metric is None:
            # Without a distance, neither this champion nor the next candidate could be compared.
            yield _lacking(key, candidate)
            continue
        if rule.maximum is not None:
            yield _at_most(key, metric, rule.maximum, rule)
        if rule.minimum is not None:
            yield _at_least(key, metric, rule.minimum, rule)


def _at_most(key: str, metric: Metric, most: float, rule: MetricRule) -> Reason:
    value, what = (metric.value, metric.name) if rule.by == "point" else _end(metric, "upper")
    if value is None:
        return Reason(check=key, passed=False, text=what)
    have, limit = _apart(value, most)
    text = f"{what} is {have}; the policy allows at most {limit}"
    return Reason(check=key, passed=value <= most, text=text)


def _at_least(key: str, metric: Metric, least: float, rule: MetricRule) -> Reason:
    value, what = (metric.value, metric.name) if rule.by == "point" else _end(metric, "lower")
    if value is None:
        return Reason(check=key, passed=False, text=what)
    have, limit = _apart(value, least)
    text = f"{what} is {have}; the policy asks for at least {limit}"
    return Reason(check=key, passed=value >= least, text=text)


def _end(metric: Metric, which: str) -> tuple[float | None, str]:
    """An end of the interval of a metric, and what to call it; None and why, if there is none."""
    value = metric.high if which == "upper" else metric.low
    if value is None:
        return None, _no_interval(metric)
    return value, f"the {which} end of the 95 % interval of {metric.name}"


def _no_interval(metric: Metric) -> str:
    return f"the policy reads the interval of {metric.name}, and it has none"


def _lacking(key: str, candidate: Evaluation) -> Reason:
    hint = _closest(key, candidate.metrics)
    text = f"the policy needs {key}, and the evaluation has no such metric ({hint})"
    return Reason(check=key, passed=False, text=text)


def _closest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"it has {', '.join(names) or 'none'}"


def _separations(candidate: Evaluation, policy: PolicyConfig) -> Iterator[Reason]:
    for name, least in sorted(policy.minimum_auroc.items()):
        rows = [row for row in candidate.ood if name in _names(row)]
        yield _separation(name, rows, least)


def _names(row: OODRow) -> set[str]:
    """Under which a policy finds a row; the main score by the name of the set alone too."""
    return {_read_as(row), f"{row.name}/{row.score}"}


def _separation(name: str, rows: list[OODRow], least: float) -> Reason:
    check = f"auroc {name}"
    if len(rows) != 1:
        text = f"the policy needs the AUROC of {name}, and the evaluation has {len(rows)} such rows"
        return Reason(check=check, passed=False, text=text)
    if not rows[0].gated:
        text = f"the row {name} only informs: a policy may not read it"
        return Reason(check=check, passed=False, text=text)
    have, limit = _apart(rows[0].auroc, least)
    text = f"the AUROC of {name} is {have}; the policy asks for at least {limit}"
    return Reason(check=check, passed=rows[0].auroc >= least, text=text)


def _floors(candidate: Evaluation, policy: PolicyConfig) -> Iterator[Reason]:
    """The floors of OOD sets, by the lower end of the interval unless the policy says otherwise."""
    for name, floor in sorted(policy.ood.items()):
        rows = [row for row in candidate.ood if name in _names(row)]
        if floor.by == "point":
            yield _separation(name, rows, floor.minimum_auroc)
        else:
            yield _surely_apart(name, rows, floor)


def _surely_apart(name: str, rows: list[OODRow], floor: OODRule) -> Reason:
    plain = _separation(name, rows, floor.minimum_auroc)
    if len(rows) != 1 or not rows[0].gated:
        return plain
    have, limit = _apart(rows[0].auroc_low, floor.minimum_auroc)
    text = (
        f"the lower end of the 95 % interval of the AUROC of {name} is {have}; the policy asks for "
        f"at least {limit}"
    )
    return Reason(check=plain.check, passed=rows[0].auroc_low >= floor.minimum_auroc, text=text)


# -- evidence beside the evaluation -------------------------------------------------------------


def _studies(sealed: Mapping[str, Ref], policy: PolicyConfig) -> Iterator[Reason]:
    for name in policy.required_studies:
        ref = sealed.get(name)
        text = (
            f"the policy needs study {name}, which is not sealed for this model: run "
            f"`eqm study {name}`"
            if ref is None
            else f"study {name} is sealed for this model ({ref.digest[:12]})"
        )
        yield Reason(check=f"study {name}", passed=ref is not None, text=text)


def _freshness(
    policy: PolicyConfig, evaluated: datetime.datetime | None, now: datetime.datetime | None
) -> Iterator[Reason]:
    most = policy.maximum_age_days
    if most is None:
        return
    check = "freshness"
    if evaluated is None or now is None:
        text = "the policy limits the age of an evaluation, and nobody knows when this one was made"
        yield Reason(check=check, passed=False, text=text)
        return
    days = (now - evaluated) / datetime.timedelta(days=1)
    # Clocks of two machines may differ a little; a date far ahead says nothing about age.
    if days < -MOST_CLOCKS_DIFFER_DAYS:
        text = f"the evaluation is dated {evaluated:%Y-%m-%d}, which is yet to come: mend the clock"
        yield Reason(check=check, passed=False, text=text)
        return
    # Whole days: a decision that is made again on the same day is the same decision.
    text = (
        f"the evaluation is of {evaluated:%Y-%m-%d}, judged on {now:%Y-%m-%d}; the policy allows "
        f"{most:g} days"
    )
    yield Reason(check=check, passed=days <= most, text=text)


# -- against the champion -----------------------------------------------------------------------


def _against(
    candidate: Evaluation,
    candidate_ref: Ref,
    policy: PolicyConfig,
    champion: Evaluation | None,
    champion_ref: Ref | None,
) -> Iterator[Reason]:
    if champion is None or champion_ref is None:
        yield Reason(check="champion", passed=True, text="there is no champion yet")
    elif champion_ref.content == candidate_ref.content:
        yield Reason(check="champion", passed=False, text="the candidate is the champion already")
    elif candidate.protocol_digest != champion.protocol_digest:
        yield Reason(check="protocol", passed=False, text=_incomparable(candidate, champion))
    else:
        text = f"both were measured under protocol {candidate.protocol_digest[:12]}"
        yield Reason(check="protocol", passed=True, text=text)
        for key, rule in sorted(policy.rules.items()):
            yield from _comparisons(key, rule, candidate, champion)


def _incomparable(candidate: Evaluation, champion: Evaluation) -> str:
    keys = differences(candidate.protocol, champion.protocol)
    more = len(keys) - MOST_KEYS_TOLD
    told = ", ".join(keys[:MOST_KEYS_TOLD]) + (f" and {more} more" if more > 0 else "")
    return (
        f"cannot be compared: protocols differ in {told}: "
        "re-evaluate the champion under this protocol"
    )


def _comparisons(
    key: str, rule: MetricRule, candidate: Evaluation, champion: Evaluation
) -> Iterator[Reason]:
    check = "champion" if key == "distance" else f"champion {key}"
    mine, theirs = candidate.metrics.get(key), champion.metrics.get(key)
    for bound, value in rule.comparisons.items():
        passed, text = _compared(key, mine, theirs, bound, value, rule.against)
        yield Reason(check=check, passed=passed, text=text)


def _compared(
    key: str,
    candidate: Metric | None,
    champion: Metric | None,
    bound: str,
    value: float,
    against: str,
) -> tuple[bool, str]:
    """Whether a candidate's metric is within a bound that the champion sets, and why."""
    if candidate is None or champion is None:
        who = "candidate" if candidate is None else "champion"
        return False, f"cannot be compared: the {who} has no {key}"
    if candidate.name != champion.name:
        return False, f"cannot be compared: {candidate.name} is not {champion.name}"
    lower = bound in ("maximum_ratio", "maximum_increase")
    mine, what = candidate.value, candidate.name
    base, whose = champion.value, "the champion's"
    if against == "interval":
        return _surely_within(key, candidate, champion, bound, value)
    if against == "apart":
        worse, what = _end(candidate, "upper" if lower else "lower")
        if worse is None:
            return False, what
        mine = worse
        better, told = _end(champion, "lower" if lower else "upper")
        if better is None:
            return False, f"cannot be compared: of the champion, {told}"
        base, whose = better, f"the {'lower' if lower else 'upper'} end of the champion's,"
    if not _range_of(key)(base):
        return False, f"cannot be compared: the champion's {champion.name} is {base!r}"
    if bound.endswith("ratio") and base < 0:
        return False, _NO_RATIO.format(whose=whose, base=base)
    # A product, not a quotient: a champion at distance 0 is compared as well.
    sign = -1 if bound == "maximum_decrease" else 1
    limit = value * base if bound.endswith("ratio") else base + sign * value
    have, told_limit = _apart(mine, limit)
    told_bound = f"{value:g} times" if bound.endswith("ratio") else f"{value:g} {_SIDE[sign]}"
    asked = "allows at most" if lower else "asks for at least"
    text = f"{what} is {have}; the policy {asked} {told_limit}, {told_bound} {whose} {base:.4g}"
    strict = against == "apart"
    if lower:
        return (mine < limit if strict else mine <= limit), text
    return (mine > limit if strict else mine >= limit), text


def _surely_within(
    key: str, candidate: Metric, champion: Metric, bound: str, value: float
) -> tuple[bool, str]:
    """Whether the worse end of the interval of the difference is within the bound, and why.

    The champion was measured with as much noise as the candidate. Seeds that both share make the
    interval too wide, and so the answer no.
    """
    intervals: list[Interval] = []
    for metric, of, whose in (
        (candidate, "", "the candidate's"),
        (champion, "of the champion, ", "the champion's"),
    ):
        if metric.low is None or metric.high is None:
            return False, f"cannot be compared: {of}{_no_interval(metric)}"
        found = Interval(metric.value, metric.low, metric.high)
        if not all(map(_range_of(key), (found.value, found.low, found.high))):
            told = f"{found.value!r}, from {found.low!r} to {found.high!r}"
            return False, f"cannot be compared: {whose} {metric.name} is {told}"
        intervals.append(found)
    mine, base = intervals
    lower, ratio = bound in ("maximum_ratio", "maximum_increase"), bound.endswith("ratio")
    if ratio and champion.value < 0:
        return False, _NO_RATIO.format(whose="the champion's", base=champion.value)
    times, sign = (value if ratio else 1.0), (-1 if bound == "maximum_decrease" else 1)
    limit = 0.0 if ratio else sign * value
    theirs = Interval(times * base.value, times * base.low, times * base.high)
    difference = difference_interval(mine, theirs)
    end = difference.high if lower else difference.low
    have, told_limit = _apart(end, limit)
    than = f"{value:g} times the champion's" if ratio else "the champion's"
    text = (
        f"the {'upper' if lower else 'lower'} end of the 95 % interval of {candidate.name}, "
        f"{candidate.value:.4g}, less {than}, {champion.value:.4g}, is {have}; the policy "
        f"{'allows at most' if lower else 'asks for at least'} {told_limit}"
    )
    return (end <= limit if lower else end >= limit), text


_NO_RATIO = (
    "cannot be compared: {whose} {base:.4g} is below 0, of which no ratio can be asked; let the "
    "policy give a margin"
)
_SIDE = {1: "above", -1: "below"}


def _apart(a: float, b: float) -> tuple[str, str]:
    """Both numbers with as many digits as it takes to tell them apart."""
    pairs = ((f"{a:.{digits}g}", f"{b:.{digits}g}") for digits in (4, 6, 9, 12))
    return next((pair for pair in pairs if pair[0] != pair[1]), (repr(a), repr(b)))
