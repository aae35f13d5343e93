"""OOD measures: equal to scikit-learn including ties, both conventions, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from scipy.stats import kurtosis, norm
from scipy.stats import t as student
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from eqm.errors import ConfigError, DataError
from eqm.ood import aupr, auroc, compare, fpr_at_95_tpr, fpr_interval, wilson

rng = np.random.default_rng


def scores(seed, inside=200, outside=150, *, apart=1.0, decimals=None):
    generator = np.random.default_rng(seed)
    sides = generator.normal(size=inside), generator.normal(apart, 1.5, size=outside)
    return sides if decimals is None else tuple(np.round(side, decimals) for side in sides)


def reference(inside, outside, positive):
    """AUROC, average precision and FPR at 95 % TPR as scikit-learn has them."""
    both = np.concatenate([inside, outside])
    truth = np.concatenate([np.zeros(len(inside)), np.ones(len(outside))])
    if positive == "in":
        both, truth = -both, 1 - truth
    false, true, _ = roc_curve(truth, both, drop_intermediate=False)
    first = np.argmax(true >= 0.95)
    return roc_auc_score(truth, both), average_precision_score(truth, both), false[first]


def assert_equals_reference(inside, outside):
    for positive in ("out", "in"):
        area, precision, false = reference(inside, outside, positive)
        assert auroc(inside, outside) == pytest.approx(area, abs=1e-12)
        assert aupr(inside, outside, positive=positive) == pytest.approx(precision, abs=1e-12)
        assert fpr_at_95_tpr(inside, outside, positive=positive) == pytest.approx(false, abs=1e-12)


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("apart", [-1.0, 0.0, 2.0])
@pytest.mark.parametrize(("inside", "outside"), [(200, 150), (20, 1000), (1, 40), (40, 1)])
def test_equal_to_scikit_learn_with_and_without_ties(inside, outside, apart, decimals):
    assert_equals_reference(*scores(3, inside, outside, apart=apart, decimals=decimals))


levels = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=25)
numbers = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=25)
relaxed = settings(max_examples=150, deadline=None, derandomize=True)


@relaxed
@given(st.one_of(levels, numbers), st.one_of(levels, numbers))
def test_equal_to_scikit_learn_for_any_scores(inside, outside):
    assert_equals_reference(np.array(inside), np.array(outside))


@relaxed
@given(levels, levels)
def test_swapping_the_sides_and_the_sign_changes_names_only(inside, outside):
    inside, outside = np.array(inside), np.array(outside)
    assert auroc(inside, outside) == pytest.approx(1 - auroc(outside, inside), abs=1e-15)
    for measure in (aupr, fpr_at_95_tpr):
        swapped = measure(-outside, -inside, positive="in")
        assert measure(inside, outside, positive="out") == swapped


def test_the_out_of_distribution_side_has_the_higher_score():
    result = compare([0.0, 1.0, 2.0], [3.0, 4.0])
    assert (result.auroc, result.aupr_out, result.aupr_in) == (1, 1, 1)
    assert (result.fpr95_out, result.fpr95_in) == (0, 0)
    assert auroc([3.0, 4.0], [0.0, 1.0, 2.0]) == 0


def test_ties_count_one_half_and_not_none_or_all():
    inside, outside = [0.0, 1.0, 1.0], [1.0, 2.0]
    assert auroc(inside, outside) == pytest.approx((3 + 1 + 2 * 0.5) / 6)
    assert auroc([1.0, 1.0], [1.0, 1.0]) == 0.5


def test_the_two_conventions_of_fpr95_differ():
    inside, outside = np.arange(20.0), np.array([*[30.0] * 19, 0.5])
    # 19 of 20 OOD images are flagged at 30, and no other image is.
    assert fpr_at_95_tpr(inside, outside, positive="out") == 0
    # Passing 19 of 20 in-distribution images, up to 18, passes the OOD image at 0.5.
    assert fpr_at_95_tpr(inside, outside, positive="in") == 1 / 20


@pytest.mark.parametrize("outside", [19, 20, 21, 99, 100, 101])
def test_ninety_five_percent_is_met_exactly(outside):
    inside, out = scores(5, 60, outside)
    assert fpr_at_95_tpr(inside, out, positive="out") == reference(inside, out, "out")[2]


def test_delong_equals_its_definition():
    inside, outside = scores(1, 40, 25, decimals=1)
    wins = np.heaviside(outside[:, None] - inside[None, :], 0.5)
    placed = wins.mean(axis=1), wins.mean(axis=0)
    parts = [side.var(ddof=1) / len(side) for side in placed]
    freedom = [2 * len(side) / (kurtosis(side, fisher=False) - 1) for side in placed]
    whole = sum(parts) ** 2 / sum(p**2 / f for p, f in zip(parts, freedom, strict=True))
    area = wins.mean()
    reach = student.ppf(0.975, whole / 2) * np.sqrt(sum(parts)) / (area * (1 - area))
    ends = expit(logit(area) + np.array([-reach, reach]))
    assert compare(inside, outside).auroc_interval == pytest.approx(tuple(ends), rel=1e-12)


def test_delong_interval_covers_the_true_area():
    truth = 0.7602499389065233  # Phi(1 / sqrt 2): two normals of unit variance, one apart
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        low, high = compare(generator.normal(size=80), generator.normal(1, size=80)).auroc_interval
        covered += low <= truth <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_result_names_its_counts_and_agrees_with_the_functions():
    inside, outside = scores(2, 30, 50, decimals=1)
    result = compare(inside, outside)
    assert (result.in_count, result.out_count) == (30, 50)
    assert result.auroc == auroc(inside, outside)
    assert result.aupr_in == aupr(inside, outside, positive="in")
    assert result.aupr_out == aupr(inside, outside, positive="out")
    assert result.fpr95_in == fpr_at_95_tpr(inside, outside, positive="in")
    assert result.fpr95_out == fpr_at_95_tpr(inside, outside, positive="out")


# -- intervals ----------------------------------------------------------------------------------

MEASURES = ("auroc", "aupr_out", "aupr_in", "fpr95_out", "fpr95_in")


def truths(apart, share_out, spread=1.5):
    """The measures of endless images: N(0, 1) inside, N(apart, spread^2) outside."""
    t = np.linspace(30, -30, 200_001)
    flagged, false = norm.sf(t, apart, spread), norm.sf(t)

    def area(right, wrong, share):
        precision = share * right / np.maximum(share * right + (1 - share) * wrong, 1e-300)
        return float(np.sum(np.diff(right) * (precision[1:] + precision[:-1]) / 2))

    return {
        "auroc": norm.cdf(apart / np.hypot(1, spread)),
        "aupr_out": area(flagged, false, share_out),
        "aupr_in": area(1 - false[::-1], 1 - flagged[::-1], 1 - share_out),
        "fpr95_out": norm.sf(norm.isf(0.95, apart, spread)),
        "fpr95_in": norm.cdf(norm.ppf(0.95), apart, spread),
    }


@pytest.mark.parametrize(
    ("inside", "outside", "apart"),
    [
        *[(100, 100, 0.5), (100, 100, 3.0), (60, 200, 1.5), (200, 60, 4.0), (360, 360, 5.0)],
        # Reversed scores, where the areas under precision and recall are surer than their sums.
        *[(100, 100, -4.0), (60, 200, -3.0), (200, 60, -1.5), (600, 600, -3.0)],
    ],
)
def test_intervals_hold_the_truth(inside, outside, apart):
    """Each in 90 % of cases at least."""
    truth, generator, runs = truths(apart, outside / (inside + outside)), rng(1), 200
    held = dict.fromkeys(MEASURES, 0)
    for _ in range(runs):
        found = compare(generator.normal(size=inside), generator.normal(apart, 1.5, size=outside))
        for name in MEASURES:
            low, high = getattr(found, f"{name}_interval")
            assert 0 <= low <= getattr(found, name) <= high <= 1
            held[name] += low <= truth[name] <= high
    for name, count in held.items():
        assert count / runs >= 0.9, (name, count / runs)
    assert np.mean(list(held.values())) / runs >= 0.94


def test_errors_of_areas_are_those_of_a_stratified_bootstrap():
    inside, outside = scores(4, 1200, 900, apart=1.0, decimals=1)
    generator = rng(0)
    drawn = {"aupr_out": [], "aupr_in": []}
    for _ in range(800):
        pair = generator.choice(inside, 1200), generator.choice(outside, 900)
        for side in ("out", "in"):
            drawn[f"aupr_{side}"].append(aupr(*pair, positive=side))
    found = compare(inside, outside)
    for name, areas in drawn.items():
        value, (low, high) = getattr(found, name), getattr(found, f"{name}_interval")
        reach = (logit(high) - logit(low)) / 2
        assert reach / 1.959964 * value * (1 - value) == pytest.approx(np.std(areas), rel=0.1)


def test_separated_sets_are_not_told_to_be_so_for_sure():
    """As many images out of order as none in so many excludes, by Wilson."""
    found = compare(np.arange(50.0), 100 + np.arange(20.0))
    missed = wilson(0.0, 20)[1]
    assert found.auroc_interval == (pytest.approx(1 - missed / 2), 1)
    for name in ("aupr_out", "aupr_in"):
        low, high = getattr(found, f"{name}_interval")
        assert 0.8 < low < 0.96
        assert high == 1
    # Of 20 images the score that 95 % pass may lie anywhere below them all; of 60 it is there.
    assert found.fpr95_out_interval == (0, 1)
    more = compare(np.arange(50.0), 100 + np.arange(60.0))
    assert more.fpr95_out_interval == (0, pytest.approx(wilson(0.0, 50)[1]))
    reversed_sign = compare(100 + np.arange(20.0), np.arange(50.0))
    assert reversed_sign.auroc_interval == (0, pytest.approx(missed / 2))
    assert reversed_sign.fpr95_out == reversed_sign.fpr95_in == 1
    assert reversed_sign.fpr95_in_interval[1] == 1


@pytest.mark.parametrize("count", [5, 20, 58])
def test_few_positive_images_say_little_of_a_threshold(count):
    generator, held = rng(3), 0
    truth = norm.sf(norm.isf(0.95, 1.0))
    for _ in range(200):
        inside, outside = generator.normal(size=500), generator.normal(1, 1, size=count)
        low, high = fpr_interval(inside, outside, "out")
        held += low <= truth <= high
    assert held >= 188  # 94 %; by the least image alone 50 of 200 for 5, and 140 for 20


def test_a_share_of_none_or_all_is_the_end_of_its_interval():
    for total in range(1, 5001):
        assert wilson(0.0, total)[0] == 0
        assert wilson(1.0, total)[1] == 1


def test_separated_intervals_hold_the_truth_as_well():
    truth, generator, held = truths(7.0, 0.5), rng(2), dict.fromkeys(MEASURES, 0)
    for _ in range(200):
        found = compare(generator.normal(size=100), generator.normal(7, 1.5, size=100))
        for name in MEASURES:
            low, high = getattr(found, f"{name}_interval")
            held[name] += low <= truth[name] <= high
    assert min(held.values()) / 200 >= 0.9, held


def test_a_score_that_is_the_same_for_all_says_nothing():
    found = compare(np.zeros(30), np.zeros(10))
    assert (found.auroc, found.auroc_interval) == (0.5, (0.5, 0.5))
    assert found.aupr_out == pytest.approx(10 / 40)
    assert found.aupr_in == pytest.approx(30 / 40)
    assert found.aupr_out_interval == pytest.approx((0.25, 0.25))
    assert found.fpr95_out == found.fpr95_in == 1


def test_a_reversed_sign_turns_the_area_round():
    inside, outside = scores(6, apart=2.0)
    right, wrong = compare(inside, outside), compare(-inside, -outside)
    assert wrong.auroc == pytest.approx(1 - right.auroc)
    assert wrong.auroc_interval == pytest.approx(tuple(1 - x for x in right.auroc_interval[::-1]))
    assert wrong.fpr95_out > 0.9 > right.fpr95_out


def test_the_ratio_of_the_sets_changes_precision_and_nothing_else():
    inside, outside = scores(7, 100, 50, apart=1.0)
    once, tenfold = compare(inside, outside), compare(inside, np.tile(outside, 10))
    for name in ("auroc", "fpr95_out", "fpr95_in"):
        assert getattr(tenfold, name) == pytest.approx(getattr(once, name), abs=1e-12)
    assert tenfold.aupr_out > once.aupr_out + 0.1
    assert tenfold.aupr_in < once.aupr_in - 0.1
    assert (tenfold.in_count, tenfold.out_count) == (100, 500)


def test_one_class_alone_is_refused():
    for pair in (([], [1.0, 2.0]), ([1.0, 2.0], [])):
        for measure in (compare, auroc):
            with pytest.raises(DataError, match=r"0 .*scores: give at least"):
                measure(*pair)


def test_scores_that_are_no_number_are_refused():
    good, broken = np.arange(5.0), np.array([0.0, 1.0, np.nan])
    for pair, side in (((good, broken), "out-of-distribution"), ((broken, good), "in-distrib")):
        with pytest.raises(DataError, match=f"1 of 3 {side}.*NaN, number 2 the first"):
            compare(*pair)
        with pytest.raises(DataError, match="NaN"):
            auroc(*pair)


def test_infinite_scores_share_the_first_rank():
    inside, outside = rng(4).normal(size=50), rng(5).normal(1, 1, size=40)
    inside[:2] = outside[:10] = np.inf
    finite = [np.where(side == np.inf, 1e9, side) for side in (inside, outside)]
    assert compare(inside, outside) == compare(*finite)
    assert auroc([0.0, 1.0], [np.inf, np.inf]) == 1


def test_empty_few_and_misshapen_scores_are_refused():
    with pytest.raises(DataError, match="0 out-of-distribution scores: give at least 1"):
        auroc([1.0], [])
    with pytest.raises(DataError, match="1 in-distribution scores: give at least 2"):
        compare([1.0], [1.0, 2.0])
    with pytest.raises(DataError, match=r"shape \(2, 1\): give one number an image"):
        auroc([1.0], [[1.0], [2.0]])


@pytest.mark.parametrize("measure", [aupr, fpr_at_95_tpr])
def test_an_unknown_side_is_refused(measure):
    with pytest.raises(ConfigError, match="positive is 'ood'; it must be 'out' or 'in'"):
        measure([1.0, 2.0], [3.0], positive="ood")
