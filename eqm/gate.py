"""Whether a candidate may become champion: two evaluations and a policy in, reasons out.

Every check is made and told, also after one has failed, so that all of a refusal can be acted upon
at once. What is absent, not finite or not comparable fails: for want of evidence, nothing is
promoted. Rows that only inform (``gated`` is False) are never read. Pure; called by flows before a
promotion.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, cast

from eqm.config import PolicyConfig
from eqm.records import Decision, Evaluation, Metric, OODRow, Reason, Ref, to_json

NEVER_NEGATIVE = ("distance", "distance_endless", "distance_held_out", "nearest")
"""Metrics that are distances; the unbiased kernel distance (KID) may be negative."""
FRACTIONS = ("precision", "recall", "label_agreement")
MEASURES = ("auroc", "aupr", "fpr95")
"""How the names of a row's measures begin."""
MOST_KEYS_TOLD = 8


def decide(
    candidate: Evaluation,
    candidate_ref: Ref,
    policy: PolicyConfig,
    *,
    champion: Evaluation | None = None,
    champion_ref: Ref | None = None,
) -> Decision:
    """Hold a candidate against the policy and the champion; it is promoted if every check passes.

    ``champion`` and its ref come together. Raises ValueError if only one of them is given.
    """
    if (champion is None) != (champion_ref is None):
        raise ValueError("champion and champion_ref go together: give both, or neither")
    reasons = (
        _samples(candidate, policy),
        _numbers(candidate),
        *_distance(candidate, policy),
        *_floors(candidate, policy),
        *_separations(candidate, policy),
        *_against(candidate, candidate_ref, policy, champion, champion_ref),
    )
    return Decision(
        promote=all(reason.passed for reason in reasons),
        policy=to_json(policy),
        candidate=candidate_ref,
        champion=champion_ref,
        reasons=reasons,
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


def _range_of(key: str) -> Callable[[float], bool]:
    if key in FRACTIONS:
        return _fraction
    return _not_negative if key in NEVER_NEGATIVE else math.isfinite


def _not_negative(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _fraction(value: float) -> bool:
    return 0 <= value <= 1


def _distance(candidate: Evaluation, policy: PolicyConfig) -> Iterator[Reason]:
    metric, most = candidate.metrics.get("distance"), policy.maximum_distance
    if metric is None:
        # Without it, neither this champion nor the next candidate could be compared with any other.
        yield _lacking("distance")
    elif most is not None:
        have, limit = _apart(metric.value, most)
        text = f"{metric.name} is {have}; the policy allows at most {limit}"
        yield Reason(check="distance", passed=metric.value <= most, text=text)


def _floors(candidate: Evaluation, policy: PolicyConfig) -> Iterator[Reason]:
    floors = {
        "recall": policy.minimum_recall,
        "precision": policy.minimum_precision,
        "label_agreement": policy.minimum_label_agreement,
    }
    for key, least in floors.items():
        if least == 0:
            continue
        metric = candidate.metrics.get(key)
        yield _lacking(key) if metric is None else _at_least(key, metric, least)


def _at_least(key: str, metric: Metric, least: float) -> Reason:
    have, limit = _apart(metric.value, least)
    text = f"{metric.name} is {have}; the policy asks for at least {limit}"
    return Reason(check=key, passed=metric.value >= least, text=text)


def _lacking(key: str) -> Reason:
    text = f"the policy needs {key}, and the evaluation has no such metric"
    return Reason(check=key, passed=False, text=text)


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
        yield _ratio(candidate.metrics.get("distance"), champion.metrics.get("distance"), policy)


def _incomparable(candidate: Evaluation, champion: Evaluation) -> str:
    keys = differences(candidate.protocol, champion.protocol)
    more = len(keys) - MOST_KEYS_TOLD
    told = ", ".join(keys[:MOST_KEYS_TOLD]) + (f" and {more} more" if more > 0 else "")
    return (
        f"cannot be compared: protocols differ in {told}: "
        "re-evaluate the champion under this protocol"
    )


def _ratio(candidate: Metric | None, champion: Metric | None, policy: PolicyConfig) -> Reason:
    if candidate is None or champion is None:
        who = "candidate" if candidate is None else "champion"
        text = f"cannot be compared: the {who} has no distance"
    elif not _not_negative(champion.value):
        text = f"cannot be compared: the champion's {champion.name} is {champion.value!r}"
    elif candidate.name != champion.name:
        text = f"cannot be compared: {candidate.name} is not {champion.name}"
    else:
        # A product, not a quotient: a champion at distance 0 is compared as well.
        limit = policy.maximum_distance_ratio * champion.value
        have, most = _apart(candidate.value, limit)
        text = (
            f"{candidate.name} is {have}; the policy allows at most {most}, "
            f"{policy.maximum_distance_ratio:g} times the champion's {champion.value:.4g}"
        )
        return Reason(check="champion", passed=candidate.value <= limit, text=text)
    return Reason(check="champion", passed=False, text=text)


def _apart(a: float, b: float) -> tuple[str, str]:
    """Both numbers with as many digits as it takes to tell them apart."""
    pairs = ((f"{a:.{digits}g}", f"{b:.{digits}g}") for digits in (4, 6, 9, 12))
    return next((pair for pair in pairs if pair[0] != pair[1]), (repr(a), repr(b)))
