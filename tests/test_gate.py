"""The gate refuses for every reason it should, says why, and never promotes what is worse."""

import dataclasses
import datetime
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from eqm.errors import ConfigError
from eqm.gate import decide, differences
from eqm.names import PREFIXES, further_key
from eqm.policy import MetricRule, OODRule, PolicyConfig
from eqm.records import Evaluation, Metric, OODRow, Ref, from_json, to_json

CANDIDATE = Ref(stage="evaluation", digest="a" * 64, content="b" * 64)
CHAMPION = Ref(stage="evaluation", digest="c" * 64, content="d" * 64)
PROTOCOL = {"generate": {"samples": 1797, "sampler": {"updates": 249}}, "neighbours": 3}
POLICY = PolicyConfig(
    minimum_samples=1797,
    maximum_distance=10.0,
    maximum_distance_ratio=1.05,
    minimum_recall=0.3,
    minimum_precision=0.5,
    minimum_label_agreement=0.9,
    minimum_auroc={"photographs": 0.9},
)
CHECKS = {
    "samples",
    "numbers",
    "distance",
    "recall",
    "precision",
    "label_agreement",
    "auroc photographs",
}
METRICS = {
    "distance": 6.0,
    "distance_held_out": 9.0,
    "kid": -0.001,
    "precision": 0.8,
    "recall": 0.7,
    "label_agreement": 0.95,
    "nearest": 20.0,
}


def row(name="photographs", auroc=0.95, gated=True):
    return OODRow(
        name=name,
        count=360,
        auroc=auroc,
        auroc_low=0.93,
        auroc_high=0.97,
        aupr=0.9,
        fpr95_in=0.1,
        gated=gated,
    )


def evaluation(*, samples=1797, protocol=PROTOCOL, ood=None, cost=249.0, lacking=(), **changes):
    values = {k: v for k, v in {**METRICS, **changes}.items() if k not in lacking}
    return Evaluation(
        protocol=protocol,
        samples=samples,
        metrics={k: Metric(name=f"{k}[x]-1797", value=v) for k, v in values.items()},
        ood=(row(), row("flipped", 0.2, gated=False)) if ood is None else ood,
        mean_field_evaluations=cost,
    )


def judged(candidate, champion=None, policy=POLICY):
    ref = None if champion is None else CHAMPION
    return decide(candidate, CANDIDATE, policy, champion=champion, champion_ref=ref)


def failed(decision):
    return {reason.check: reason.text for reason in decision.reasons if not reason.passed}


def test_a_good_candidate_becomes_the_first_champion():
    decision = judged(evaluation())
    assert decision.promote
    assert {r.check for r in decision.reasons} == {*CHECKS, "champion"}
    assert decision.reasons[-1].text == "there is no champion yet"
    assert (decision.candidate, decision.champion) == (CANDIDATE, None)
    assert from_json(PolicyConfig, decision.policy) == POLICY


def test_a_good_candidate_replaces_a_champion_within_the_ratio():
    decision = judged(evaluation(distance=6.29), evaluation())
    assert decision.promote
    assert decision.champion == CHAMPION
    text = decision.reasons[-1].text
    assert "6.29" in text
    assert "6.3" in text
    assert "1.05 times the champion's 6" in text


REFUSED = {
    "too few samples": (evaluation(samples=1796), "samples", ["1,796", "1,797"]),
    "nan distance": (evaluation(distance=math.nan), "numbers", ["distance is nan"]),
    "nan distance too": (evaluation(distance=math.nan), "distance", ["nan"]),
    "infinite kid": (evaluation(kid=-math.inf), "numbers", ["kid is -inf"]),
    "negative distance": (evaluation(distance=-0.1), "numbers", ["distance is -0.1"]),
    "negative nearest": (evaluation(nearest=-1.0), "numbers", ["nearest is -1"]),
    "recall above one": (evaluation(recall=1.2), "numbers", ["recall is 1.2"]),
    "nan cost": (evaluation(cost=math.nan), "numbers", ["mean_field_evaluations is nan"]),
    "nan auroc": (evaluation(ood=(row(auroc=math.nan),)), "numbers", ["auroc of photographs"]),
    "distance too large": (evaluation(distance=10.5), "distance", ["10.5", "at most 10"]),
    "distance missing": (evaluation(lacking=["distance"]), "distance", ["no such metric"]),
    "recall too low": (evaluation(recall=0.2), "recall", ["0.2", "at least 0.3"]),
    "recall missing": (evaluation(lacking=["recall"]), "recall", ["recall", "no such metric"]),
    "precision too low": (evaluation(precision=0.4), "precision", ["0.4", "at least 0.5"]),
    "precision missing": (evaluation(lacking=["precision"]), "precision", ["no such metric"]),
    "labels too low": (evaluation(label_agreement=0.8), "label_agreement", ["0.8", "0.9"]),
    "labels missing": (
        evaluation(lacking=["label_agreement"]),
        "label_agreement",
        ["no such metric"],
    ),
    "hardly below": (evaluation(recall=0.2999999), "recall", ["0.2999999", "0.3"]),
    "auroc too low": (evaluation(ood=(row(auroc=0.85),)), "auroc photographs", ["0.85", "0.9"]),
    "auroc missing": (evaluation(ood=()), "auroc photographs", ["photographs", "0 such rows"]),
    "auroc twice": (evaluation(ood=(row(), row())), "auroc photographs", ["2 such rows"]),
    "auroc not gated": (
        evaluation(ood=(row(gated=False),)),
        "auroc photographs",
        ["only informs"],
    ),
}


def test_a_policy_reads_the_main_score_or_the_one_that_it_names():
    def scored(score, role, auroc):
        return dataclasses.replace(row(auroc=auroc), score=score, role=role)

    candidate = evaluation(
        ood=(
            scored("gradient_norm", "main", 0.95),
            scored("energy", "score", 0.6),
            dataclasses.replace(scored("pixel_pca", "baseline", 0.2), gated=False),
        )
    )
    assert judged(candidate).promote
    for name, passes in (
        ("photographs", True),
        ("photographs/gradient_norm", True),
        ("photographs/energy", False),
        ("photographs/descent_length", False),
    ):
        policy = dataclasses.replace(POLICY, minimum_auroc={name: 0.9})
        decision = judged(candidate, policy=policy)
        assert decision.promote == passes, name
        assert passes or set(failed(decision)) == {f"auroc {name}"}
    with pytest.raises(ConfigError, match="'photographs/pixel_pca'; it must be the name of a set"):
        PolicyConfig(minimum_auroc={"photographs/pixel_pca": 0.9})


def test_every_measure_of_a_row_must_be_a_fraction():
    good = dataclasses.replace(row(), aupr_in=0.5, fpr95_out_low=0.0, fpr95_out_high=1.0)
    assert judged(evaluation(ood=(good,))).promote
    for name in ("aupr_in", "fpr95_out_high", "aupr_low"):
        bad = dataclasses.replace(good, score="energy", role="score", **{name: math.nan})
        told = failed(judged(evaluation(ood=(row(), bad))))
        assert told == {"numbers": f"{name} of photographs/energy is nan"}


@pytest.mark.parametrize(("candidate", "check", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(candidate, check, words):
    decision = judged(candidate)
    assert not decision.promote
    assert all(word in failed(decision)[check] for word in words), failed(decision)


def test_numbers_beside_are_checked_too():
    good = evaluation()
    broken = dataclasses.replace(good.metrics["distance"], beside=math.nan)
    metrics = {**good.metrics, "distance": broken}
    decision = judged(dataclasses.replace(good, metrics=metrics))
    assert "distance of real images is nan" in failed(decision)["numbers"]


@pytest.mark.parametrize(
    ("kind", "below", "above"),
    [
        *[(kind, True, False) for kind in ("distance", "distance_held_out", "spatial_distance")],
        ("nearest", True, False),
        *[(kind, False, False) for kind in ("kid", "distance_endless", "score")],
        *[(kind, True, True) for kind in ("precision", "recall", "label_agreement", "copies")],
    ],
)
def test_every_metric_has_its_range(kind, below, above):
    """A share of 1.2 or a distance of -1 is no number to decide by, nor is an end of its interval.

    A kernel distance, and one without bias, may be below 0.
    """
    lenient = PolicyConfig(minimum_samples=1)
    for key in (kind, further_key(kind, "clip")) if kind in PREFIXES else (kind,):
        for value, wrong in ((-0.2, below), (1.2, above), (0.5, False)):
            for part in ("value", "low", "high", "beside"):
                sound = {"value": 0.5, "low": 0.5, "high": 0.5, "beside": 0.5}
                ends = {**sound, part: value}
                if part == "low":
                    ends["high"] = max(value, 0.5)
                if part == "high":
                    ends["low"] = min(value, 0.5)
                found = evaluation(lacking=[kind])
                metrics = {**found.metrics, key: Metric(name=key, **ends)}
                if kind == "distance" and key != kind:
                    metrics["distance"] = Metric(name="distance", value=1.0)
                decision = judged(dataclasses.replace(found, metrics=metrics), policy=lenient)
                assert ("numbers" in failed(decision)) == wrong, (key, part, value)


def test_every_check_is_told_after_one_failed():
    decision = judged(evaluation(samples=1, recall=0.1, ood=()))
    assert set(failed(decision)) == {"samples", "recall", "auroc photographs"}
    assert {r.check for r in decision.reasons} == {*CHECKS, "champion"}


def test_rows_that_only_inform_are_never_read():
    ood = (row(), row("flipped", math.nan, gated=False))
    assert judged(evaluation(ood=ood)).promote


def test_a_floor_of_zero_is_no_check():
    lenient = PolicyConfig(minimum_samples=1)
    bare = evaluation(lacking=[k for k in METRICS if k != "distance"], ood=())
    decision = judged(bare, policy=lenient)
    assert decision.promote
    assert [r.check for r in decision.reasons] == ["samples", "numbers", "champion"]


def test_protocols_must_be_equal():
    other = {"generate": {"samples": 1797, "sampler": {"updates": 100}}, "neighbours": 3, "x": 1}
    decision = judged(evaluation(), evaluation(protocol=other, distance=100.0))
    assert failed(decision) == {
        "protocol": "cannot be compared: protocols differ in generate.sampler.updates, x: "
        "re-evaluate the champion under this protocol"
    }


def test_many_differences_are_counted():
    decision = judged(evaluation(), evaluation(protocol={f"k{i}": i for i in range(20)}))
    assert "and 14 more:" in failed(decision)["protocol"]


WORSE = {
    "beyond the ratio": (evaluation(distance=6.31), evaluation(), ["6.31", "6.3"]),
    "champion without": (evaluation(), evaluation(lacking=["distance"]), ["champion has no"]),
    "champion nan": (evaluation(), evaluation(distance=math.nan), ["is nan"]),
    "champion negative": (evaluation(), evaluation(distance=-2.0), ["is -2.0"]),
    "candidate without": (evaluation(lacking=["distance"]), evaluation(), ["candidate has no"]),
    "champion perfect": (evaluation(), evaluation(distance=0.0), ["at most 0"]),
}


@pytest.mark.parametrize(("candidate", "champion", "words"), WORSE.values(), ids=WORSE.keys())
def test_refusals_against_a_champion(candidate, champion, words):
    decision = judged(candidate, champion)
    assert not decision.promote
    assert all(word in failed(decision)["champion"] for word in words), failed(decision)


def test_distances_of_other_names_are_not_compared():
    champion = evaluation()
    metrics = {**champion.metrics, "distance": Metric(name="FID", value=99.0)}
    decision = judged(evaluation(), dataclasses.replace(champion, metrics=metrics))
    assert failed(decision) == {"champion": "cannot be compared: distance[x]-1797 is not FID"}


def test_the_champion_itself_is_not_promoted_again():
    same = dataclasses.replace(CANDIDATE, digest="e" * 64)
    decision = decide(evaluation(), CANDIDATE, POLICY, champion=evaluation(), champion_ref=same)
    assert failed(decision) == {"champion": "the candidate is the champion already"}


def test_champion_and_its_ref_go_together():
    with pytest.raises(ValueError, match="go together"):
        decide(evaluation(), CANDIDATE, POLICY, champion=evaluation())
    with pytest.raises(ValueError, match="go together"):
        decide(evaluation(), CANDIDATE, POLICY, champion_ref=CHAMPION)


def test_differences_name_the_setting():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": None}) == ["a.c", "d"]
    assert differences({"a": (1, 2)}, {"a": [1, 2]}) == []
    assert differences({"a": {"b": 1}}, {"a": 1}) == ["a"]


# -- any metric, with intervals -----------------------------------------------------------------


def measured(**values):
    """An evaluation whose metrics are (low, value, high), or values alone."""
    metrics = {"distance": Metric(name="FD", value=6.0)}
    for key, value in values.items():
        low, point, high = value if isinstance(value, tuple) else (None, value, None)
        metrics[key] = Metric(name=key.upper(), value=point, low=low, high=high)
    return dataclasses.replace(evaluation(), metrics=metrics)


def ruled(candidate, champion=None, **rule):
    rule = MetricRule(**rule)
    policy = PolicyConfig(minimum_samples=1, maximum_distance_ratio=2.0, metrics={"fid": rule})
    decision = judged(candidate, champion, policy)
    assert decision.promote == (not failed(decision))
    return failed(decision)


ABSOLUTE = {
    "value below": ({"maximum": 5.0}, (4.0, 5.0, 6.0), None),
    "value above": ({"maximum": 4.9}, (4.0, 5.0, 6.0), "FID is 5; the policy allows at most 4.9"),
    "upper end below": ({"maximum": 6.0, "by": "interval"}, (4.0, 5.0, 6.0), None),
    "upper end above": (
        {"maximum": 5.5, "by": "interval"},
        (4.0, 5.0, 6.0),
        "the upper end of the 95 % interval of FID is 6; the policy allows at most 5.5",
    ),
    "lower end below": (
        {"minimum": 4.5, "by": "interval"},
        (4.0, 5.0, 6.0),
        "the lower end of the 95 % interval of FID is 4; the policy asks for at least 4.5",
    ),
    "value above least": ({"minimum": 4.5}, (4.0, 5.0, 6.0), None),
    "no interval": ({"minimum": 1.0, "by": "interval"}, 5.0, "interval of FID, and it has none"),
}


@pytest.mark.parametrize(("rule", "value", "text"), ABSOLUTE.values(), ids=ABSOLUTE.keys())
def test_bounds_of_any_metric(rule, value, text):
    told = ruled(measured(fid=value), **rule)
    assert (told == {}) if text is None else (text in told["fid"])


MINE, WIDE, TIGHT = (5.0, 5.2, 5.4), (4.0, 5.0, 6.0), (4.9, 5.0, 5.1)
AGAINST = {
    "no worse by value": ({"maximum_ratio": 1.1}, MINE, 5.0, None),
    "worse by value": ({"maximum_ratio": 1.0}, MINE, 5.0, "at most 5, 1 times the champion's 5"),
    "surely no worse": ({"maximum_ratio": 1.1, "against": "interval"}, MINE, TIGHT, None),
    "not surely": (
        {"maximum_ratio": 1.05, "against": "interval"},
        MINE,
        TIGHT,
        # 5.2 - 5.25, and the root of 0.2^2 + (1.05 * 0.1)^2 beside it.
        "the upper end of the 95 % interval of FID, 5.2, less 1.05 times the champion's, 5, is "
        "0.1759; the policy allows at most 0",
    ),
    "not surely, of a noisy champion": (
        {"maximum_ratio": 1.1, "against": "interval"},
        MINE,
        WIDE,
        "is 0.818; the policy allows at most 0",
    ),
    "surely within a margin": ({"maximum_increase": 0.5, "against": "interval"}, MINE, TIGHT, None),
    "a champion of nothing": (
        {"maximum_ratio": 1.1, "against": "interval"},
        MINE,
        5.0,
        "of the champion, the policy reads the interval of FID, and it has none",
    ),
    "an end that is no number": (
        {"maximum_ratio": 1.1, "against": "interval"},
        MINE,
        (4.9, 5.0, math.inf),
        "the champion's FID is 5.0, from 4.9 to inf",
    ),
    "surely of a negative": (
        {"maximum_ratio": 1.1, "against": "interval"},
        MINE,
        (-0.3, -0.1, 0.1),
        "the champion's -0.1 is below 0",
    ),
    "within a margin": ({"maximum_increase": 0.2}, MINE, 5.0, None),
    "beyond it": ({"maximum_increase": 0.1}, MINE, 5.0, "5.1, 0.1 above the champion's 5"),
    "margin of nothing": ({"maximum_increase": 0.0}, 5.0, 5.0, None),
    "apart": ({"maximum_ratio": 1.0, "against": "apart"}, (3.0, 3.5, 3.9), WIDE, None),
    "touching": (
        {"maximum_ratio": 1.0, "against": "apart"},
        (3.0, 3.5, 4.0),
        WIDE,
        "1 times the lower end of the champion's, 4",
    ),
    "overlapping": ({"maximum_ratio": 1.0, "against": "apart"}, MINE, WIDE, "5.4; the policy"),
    "champion without": (
        {"maximum_ratio": 1.0, "against": "apart"},
        MINE,
        5.0,
        "of the champion, the policy reads the interval of FID, and it has none",
    ),
    "candidate without": (
        {"maximum_ratio": 1.0, "against": "interval"},
        5.0,
        WIDE,
        "the policy reads the interval of FID, and it has none",
    ),
    "higher is better": ({"minimum_ratio": 1.0}, MINE, 5.0, None),
    "and is not": ({"minimum_ratio": 1.1}, MINE, 5.0, "asks for at least 5.5, 1.1 times"),
    "a little lower": ({"maximum_decrease": 0.5}, (4.4, 4.6, 4.8), 5.0, None),
    "too low by its end": (
        {"maximum_decrease": 0.5, "against": "interval"},
        (4.4, 4.6, 4.8),
        TIGHT,
        "the lower end of the 95 % interval of FID, 4.6, less the champion's, 5, is -0.6236; the "
        "policy asks for at least -0.5",
    ),
    "of a negative": ({"maximum_ratio": 1.0}, 0.1, -0.1, "let the policy give a margin"),
    "champion without it": ({"maximum_ratio": 1.0}, 5.0, math.nan, "champion's FID is nan"),
}


@pytest.mark.parametrize(("rule", "mine", "theirs", "text"), AGAINST.values(), ids=AGAINST.keys())
def test_any_metric_against_the_champion(rule, mine, theirs, text):
    told = ruled(measured(fid=mine), measured(fid=theirs), **rule)
    assert (told == {}) if text is None else (text in told["champion fid"]), told


def test_unknown_metrics_are_refused_with_a_hint():
    assert "did you mean 'fid'?" in ruled_by(measured(fid=5.0), "fdi")["fdi"]
    assert "it has distance, fid" in ruled_by(measured(fid=5.0), "precision")["precision"]


def ruled_by(candidate, key):
    policy = PolicyConfig(minimum_samples=1, metrics={key: MetricRule(maximum=1.0)})
    return failed(judged(candidate, None, policy))


def test_a_champion_without_the_metric_is_told():
    told = ruled(measured(fid=5.0), measured(), maximum_ratio=1.0)
    assert told == {"champion fid": "cannot be compared: the champion has no fid"}


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [(4.0, None, "has one end"), (6.0, 4.0, "goes from 6.0 down to 4.0"), (math.nan, 6.0, "nan")],
)
def test_an_interval_must_be_one(low, high, text):
    assert text in ruled(measured(fid=(low, 5.0, high)), maximum=9.0)["numbers"]


def test_a_comparison_in_the_table_takes_the_place_of_the_short_one():
    rule = MetricRule(maximum_increase=1.0)
    policy = PolicyConfig(minimum_samples=1, metrics={"distance": rule})
    decision = judged(evaluation(distance=6.9), evaluation(distance=6.0), policy)
    assert decision.promote
    assert [r.check for r in decision.reasons].count("champion") == 1


distances = st.floats(0, 1e6)
ends = st.tuples(distances, distances, distances).map(lambda three: tuple(sorted(three)))


@given(mine=ends, theirs=ends, ratio=st.floats(0.1, 3))
def test_intervals_only_make_it_harder(mine, theirs, ratio):
    """What is shown to be better is not worse, and what is shown not to be worse has a value so."""
    # Not where rounding decides.
    assume(abs(mine[2] - ratio * theirs[0]) > 1e-9 * mine[2])
    ways = {
        way: not ruled(measured(fid=mine), measured(fid=theirs), maximum_ratio=ratio, against=way)
        for way in ("point", "interval", "apart")
    }
    assert ways["apart"] <= ways["interval"] <= ways["point"]
    assert ways["apart"] == (mine[2] < ratio * theirs[0])


# -- floors by interval, studies, age -----------------------------------------------------------


def test_floors_are_held_by_the_lower_end():
    def asked(least, by="interval", **changes):
        rule = {"photographs": OODRule(minimum_auroc=least, by=by)}
        policy = PolicyConfig(minimum_samples=1, ood=rule)
        return failed(judged(evaluation(**changes), None, policy))

    assert asked(0.93) == {}
    assert "lower end" in asked(0.94)["auroc photographs"]
    assert asked(0.94, by="point") == {}
    assert "0 such rows" in asked(0.5, ood=())["auroc photographs"]
    informs = (row(gated=False),)
    assert "only informs" in asked(0.5, ood=informs)["auroc photographs"]


def test_required_studies_are_evidence():
    policy = PolicyConfig(minimum_samples=1, required_studies=("samplers", "ablation"))
    sealed = Ref(stage="study", digest="5" * 64, content="6" * 64)
    studies = {"samplers": sealed, "other": sealed}
    decision = decide(evaluation(), CANDIDATE, policy, studies=studies)
    assert not decision.promote
    assert failed(decision) == {
        "study ablation": "the policy needs study ablation, which is not sealed for this model: "
        "run `eqm study ablation`"
    }
    assert decision.studies == {"samplers": sealed}
    both = decide(evaluation(), CANDIDATE, policy, studies={**studies, "ablation": sealed})
    assert both.promote
    assert from_json(type(both), to_json(both)) == both


NOON = datetime.datetime(2026, 3, 10, 12, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("days", "text"),
    [
        (0.0, None),
        (7.0, None),
        (7.01, "is of 2026-03-03, judged on 2026-03-10; the policy allows 7 days"),
        (-0.02, None),
        (-2.0, "is dated 2026-03-12, which is yet to come"),
        (None, "nobody knows when"),
    ],
)
def test_age(days, text):
    policy = PolicyConfig(minimum_samples=1, maximum_age_days=7)
    when = None if days is None else NOON - datetime.timedelta(days=days)
    decision = decide(evaluation(), CANDIDATE, policy, evaluated=when, now=NOON)
    assert decision.promote == (text is None)
    assert text is None or text in failed(decision)["freshness"]


def test_age_is_not_asked_for_unless_the_policy_does():
    assert "freshness" not in {r.check for r in judged(evaluation()).reasons}


unit = st.floats(0, 1)


@given(mine=distances, other=distances, ratio=st.floats(0.1, 3))
def test_a_worse_candidate_is_never_promoted(mine, other, ratio):
    policy = PolicyConfig(minimum_samples=1, maximum_distance_ratio=ratio)
    decision = judged(evaluation(distance=mine), evaluation(distance=other), policy)
    assert decision.promote == (mine <= ratio * other)


@given(distance=distances, recall=unit, precision=unit, agreement=unit, auroc=unit)
def test_promoted_if_and_only_if_every_floor_is_met(distance, recall, precision, agreement, auroc):
    candidate = evaluation(
        distance=distance,
        recall=recall,
        precision=precision,
        label_agreement=agreement,
        ood=(row(auroc=auroc),),
    )
    good = (
        distance <= 10 and recall >= 0.3 and precision >= 0.5 and agreement >= 0.9 and auroc >= 0.9
    )
    decision = judged(candidate)
    assert decision.promote == good == (not failed(decision))


@given(
    key=st.sampled_from(sorted(METRICS)),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    with_champion=st.booleans(),
)
def test_what_is_not_finite_is_never_promoted(key, value, with_champion):
    lenient = PolicyConfig(minimum_samples=1)
    champion = evaluation(distance=1e9) if with_champion else None
    assert not judged(evaluation(**{key: value}), champion, lenient).promote


def test_a_decision_survives_json():
    decision = judged(evaluation(recall=0.1), evaluation())
    assert from_json(type(decision), to_json(decision)) == decision
