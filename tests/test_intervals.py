"""Intervals: how often they hold the truth, in simulations whose truth is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eqm.errors import ConfigError, DataError
from eqm.frechet import (
    Gaussian,
    class_scores,
    frechet_from_features,
    kernel_distance,
    precision_recall,
)
from eqm.intervals import (
    LEAST_SAMPLES,
    frechet_intervals,
    kernel_interval,
    median_interval,
    recall_interval,
    score_interval,
    share_interval,
)
from eqm.ood import NORMAL_975, wilson

RUNS = 60
ENOUGH = 0.9
"""Share of the intervals that must hold the truth; 95 % are meant to, and 60 runs vary by 3 %."""


def simulated(dimension, count, *, shift, stretch=1.1, runs=RUNS, even=False):
    """The true distance to a reference, and what so many sets of samples say of it."""
    generator = np.random.default_rng(dimension)
    mix = generator.normal(size=(dimension, dimension)) / np.sqrt(dimension)
    if even:
        mix = np.eye(dimension)
    reference = Gaussian(np.zeros(dimension), mix)
    truth = Gaussian(np.full(dimension, shift), mix * stretch).distance(reference)
    draws = (generator.normal(size=(count, dimension)) for _ in range(runs))
    sets = (draw @ mix.T * stretch + shift for draw in draws)
    return truth, [frechet_intervals(samples, reference) for samples in sets]


@pytest.mark.parametrize(
    ("dimension", "count"),
    [(6, 1500), (8, 800), (16, 512), (32, 500), (16, 128), (32, 128), (64, 128)],
)
def test_intervals_hold_the_truth(dimension, count):
    """From 0.01 to 0.5 dimensions a sample."""
    truth, found = simulated(dimension, count, shift=0.2)
    plain, endless = ([getattr(one, kind) for one in found] for kind in ("plain", "endless"))
    for ends, middle in ((plain, np.mean([one.value for one in plain])), (endless, truth)):
        assert np.mean([one.low <= middle <= one.high for one in ends]) >= ENOUGH
        # An interval that holds everything says nothing: widths are those of the spread.
        spread = 2 * NORMAL_975 * np.std([one.value for one in ends])
        assert 0.75 * spread < np.mean([one.high - one.low for one in ends]) < 2 * spread
    width = np.mean([one.high - one.low for one in plain])
    assert 3 * np.std([one.value for one in plain]) < width < 6 * np.std([o.value for o in plain])


@pytest.mark.parametrize(("dimension", "count"), [(32, 500), (32, 128), (64, 128)])
@pytest.mark.parametrize("shift", [0.05, 0.2])
def test_the_bias_of_few_samples_is_gone(dimension, count, shift):
    truth, found = simulated(dimension, count, shift=shift)
    bias = np.mean([one.plain.value for one in found]) - truth
    left = np.mean([one.endless.value for one in found]) - truth
    assert bias > 0.3
    assert abs(left) < 0.1 * bias


@pytest.mark.parametrize(("dimension", "count"), [(16, 512), (32, 128)])
def test_of_the_same_distribution_the_interval_holds_zero(dimension, count):
    truth, found = simulated(dimension, count, shift=0.0, stretch=1.0)
    assert truth == pytest.approx(0, abs=1e-12)
    assert np.mean([one.endless.low <= 0 <= one.endless.high for one in found]) >= ENOUGH
    # Cut off at 0, the mean would be above it by up to a third of the bias.
    values = np.array([one.endless.value for one in found])
    assert 0.2 < np.mean(values < 0) < 0.8
    assert abs(values.mean()) < 0.1 * np.mean([one.plain.value for one in found])


@pytest.mark.parametrize(("dimension", "count"), [(128, 256), (128, 300), (64, 128)])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_of_an_even_spectrum_the_interval_knows_what_is_left_of_the_bias(dimension, count, shift):
    """Of 2 samples a dimension halves are as many as dimensions, and the curve is no parabola."""
    truth, found = simulated(dimension, count, shift=shift, stretch=1.0, runs=12, even=True)
    assert all(one.endless.low <= truth <= one.endless.high for one in found)
    bias = np.mean([one.plain.value for one in found]) - truth
    assert abs(np.mean([one.endless.value for one in found]) - truth) < 0.17 * bias
    # Neither does it hold everything: the bias itself lies outside.
    assert all(one.endless.high < one.plain.value for one in found)
    assert np.mean([one.endless.high - one.endless.low for one in found]) < 0.8 * bias


@pytest.mark.parametrize(("count", "told"), [(159, False), (160, True)])
def test_below_2_samples_a_dimension_there_is_no_end(count, told):
    generator = np.random.default_rng(7)
    samples = generator.normal(size=(count, 80))
    found = frechet_intervals(samples, Gaussian(np.zeros(80), np.eye(80)))
    assert found.plain.low < found.plain.value < found.plain.high
    assert (found.endless is not None) is told


@pytest.mark.slow
@pytest.mark.parametrize(("dimension", "count"), [(8, 800), (16, 160), (64, 128)])
@pytest.mark.parametrize("shift", [0.2, 0.5])
def test_intervals_hold_the_truth_and_are_no_wider_than_that_takes(dimension, count, shift):
    """Of the distance without bias, with as many runs as it takes to tell."""
    runs = 300
    truth, found = simulated(dimension, count, shift=shift, stretch=0.9, runs=runs)
    values = np.array([one.endless.value for one in found])
    held = np.mean([one.endless.low <= truth <= one.endless.high for one in found])
    assert held >= 0.93
    width = np.mean([one.endless.high - one.endless.low for one in found])
    assert width < 2 * (np.quantile(values, 0.975) - np.quantile(values, 0.025))
    bias = np.mean([one.plain.value for one in found]) - truth
    # With few dimensions a sample the bias is less than what means of so many runs vary by.
    assert abs(values.mean() - truth) < 0.1 * bias + 2 * values.std() / np.sqrt(runs)


def test_a_plain_interval_would_miss_the_truth():
    truth, found = simulated(32, 500, shift=0.05)
    assert np.mean([one.plain.low <= truth <= one.plain.high for one in found]) < 0.1


@pytest.mark.parametrize("count", [200, 2000])
def test_the_middle_is_the_distance_itself(count):
    generator = np.random.default_rng(0)
    samples, real = generator.normal(size=(count, 20)), generator.normal(0.3, 1, (900, 20))
    found = frechet_intervals(samples, Gaussian.of(real))
    assert found.plain.value == pytest.approx(frechet_from_features(samples, real), rel=1e-9)


def test_a_distance_of_nothing_is_not_below_0():
    """A negative end would be no distance, and a policy refuses it."""
    rows = np.random.default_rng(0).normal(size=(400, 8))
    plain = frechet_intervals(rows, Gaussian.of(rows)).plain
    assert plain.low == 0 <= plain.value < 1e-9 < plain.high


def test_a_singular_covariance_has_intervals_too():
    samples = np.random.default_rng(0).normal(size=(400, 3)) @ np.ones((3, 8))
    found = frechet_intervals(samples, Gaussian.of(np.ones((50, 8))))
    assert 0 < found.plain.low < found.plain.value < found.plain.high
    assert found.endless.low < found.endless.high


def test_of_few_samples_nothing_is_said():
    few = np.random.default_rng(0).normal(size=(LEAST_SAMPLES - 1, 4))
    assert frechet_intervals(few, Gaussian.of(few)) is None
    assert kernel_interval(few, few) is None


def test_kernel_intervals_hold_the_truth():
    generator = np.random.default_rng(1)
    reference = generator.normal(size=(300, 4))
    truth = kernel_distance(generator.normal(0.3, 1, (8_000, 4)), reference).mean
    found = [kernel_interval(generator.normal(0.3, 1, (256, 4)), reference) for _ in range(RUNS)]
    assert np.mean([one.low <= truth <= one.high for one in found]) >= ENOUGH


def jackknifed(samples, statistic):
    """Ends of the interval by leaving out groups of samples, each number taken anew."""
    parts = np.array_split(samples, 16)
    left_out = [statistic(np.concatenate(parts[:k] + parts[k + 1 :])) for k in range(16)]
    return statistic(samples), 2.131449545559323 * np.sqrt(15 * np.var(left_out))


def test_kernel_sums_of_groups_are_those_of_the_samples():
    generator = np.random.default_rng(3)
    samples, real = generator.normal(0.3, 1, (203, 5)), generator.normal(size=(90, 5))
    value, reach = jackknifed(samples, lambda x: kernel_distance(x, real).mean)
    found = kernel_interval(samples, real)
    assert found.value == pytest.approx(value, rel=1e-10)
    assert found.high - found.value == pytest.approx(reach, rel=1e-8)


@pytest.mark.parametrize("repeats", [False, True])
def test_recall_without_a_group_is_that_of_the_others(repeats):
    generator = np.random.default_rng(4)
    samples, real = generator.normal(0.5, 0.8, (203, 3)), generator.normal(size=(150, 3))
    if repeats:
        samples, real = np.round(samples), np.round(real)
        # Copies side by side are left out together.
        samples = samples[np.lexsort(samples.T)]
    value, reach = jackknifed(samples, lambda x: precision_recall(real, x)[1])
    found = recall_interval(real, samples)
    assert found.value == value
    assert found.value - found.low == pytest.approx(reach, rel=1e-9)
    assert recall_interval(real, samples[: LEAST_SAMPLES - 1]) is None


def test_recall_intervals_hold_the_truth():
    generator = np.random.default_rng(5)
    real = generator.normal(size=(300, 4))
    sets = [generator.normal(0.4, 0.8, (256, 4)) for _ in range(RUNS)]
    found = [recall_interval(real, samples) for samples in sets]
    truth = np.mean([one.value for one in found])
    assert 0.2 < truth < 0.9
    assert np.mean([one.low <= truth <= one.high for one in found]) >= ENOUGH
    assert np.mean([one.high - one.low for one in found]) < 8 * np.std([o.value for o in found])


def test_a_recall_of_nothing_is_not_sure():
    generator = np.random.default_rng(7)
    far = recall_interval(generator.normal(size=(300, 4)), generator.normal(50, 0.1, (256, 4)))
    assert (far.value, far.low) == (0, 0)
    assert far.high == wilson(0.0, 300)[1]


def test_a_score_interval_is_students():
    """Of 1, 2, 3, 6: their mean is 3, its error sqrt(14 / 3 / 4), and t has 3 degrees: 3.1824."""
    found = score_interval([1.0, 2.0, 3.0, 6.0])
    reach = 3.182446305284263 * math.sqrt(14 / 3 / 4)
    assert (found.value, found.low, found.high) == pytest.approx((3, 3 - reach, 3 + reach))


def test_score_intervals_hold_the_truth():
    generator = np.random.default_rng(6)
    sets = [class_scores(generator.normal(size=(500, 6)) * 2) for _ in range(RUNS)]
    truth = np.mean(sets)
    found = [score_interval(scores) for scores in sets]
    assert np.mean([one.low <= truth <= one.high for one in found]) >= ENOUGH
    with pytest.raises(ConfigError, match="splits is 1; it must be 2 or more"):
        score_interval([1.0])


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_intervals_of_shares_hold_the_truth(share):
    counts = np.random.default_rng(2).binomial(200, share, 400)
    found = [share_interval(int(count), 200) for count in counts]
    assert np.mean([one.low <= share <= one.high for one in found]) >= 0.92


def test_a_share_of_all_is_not_certain():
    found = share_interval(50, 50)
    assert (found.value, found.high) == (1, 1)
    assert 0.9 < found.low < 0.95


@pytest.mark.parametrize(("count", "total"), [(-1, 5), (6, 5), (0, 0)])
def test_impossible_shares_are_refused(count, total):
    with pytest.raises(ConfigError, match="from 0 to"):
        share_interval(count, total)


def test_intervals_of_medians_hold_the_truth():
    generator = np.random.default_rng(3)
    found = [median_interval(generator.exponential(size=51)) for _ in range(4000)]
    assert np.mean([one.low <= np.log(2) <= one.high for one in found]) >= 0.94


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_a_median_lies_in_its_interval(values):
    found = median_interval(values)
    assert min(values) <= found.low <= found.value <= found.high <= max(values)


def test_a_median_of_nothing_is_refused():
    with pytest.raises(DataError, match="at least one"):
        median_interval([])
