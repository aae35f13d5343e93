"""The gate refuses for every reason it should, says why, and never promotes what is worse."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eqm.config import PolicyConfig
from eqm.errors import ConfigError
from eqm.gate import decide, differences
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


unit = st.floats(0, 1)
distances = st.floats(0, 1e6)


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
