"""Distances: known answers, torch-fidelity's answers, invariances, formulas that must fail."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

import eqm.frechet
from eqm.errors import ConfigError, DataError
from eqm.frechet import (
    KernelDistance,
    Moments,
    class_scores,
    frechet_distance,
    frechet_distance_from_features,
    frechet_from_features,
    kernel_distance,
    merge,
    nearest_distances,
    precision_recall,
)

D = 12


def draw(seed, count, dimension=D, *, shift=0.0, stretch=1.0):
    generator = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(dimension, dimension))
    return generator.normal(size=(count, dimension)) @ mix * stretch + shift


def gaussian(mean, covariance):
    """Moments with exactly this mean and covariance."""
    mean, covariance = np.asarray(mean, float), np.asarray(covariance, float)
    return Moments(1001, mean, covariance * 1000)


def moments_distance(a, b):
    return frechet_distance(Moments.of(a), Moments.of(b))


def fidelity_frechet(a, b):
    left, right = (fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b))
    return fid_statistics_to_metric(left, right, False)["frechet_inception_distance"]


# -- Frechet: known answers ---------------------------------------------------------------------


def test_distance_of_commuting_gaussians_has_a_closed_form():
    a = gaussian([0, 0, 0], np.diag([1.0, 4.0, 9.0]))
    b = gaussian([1, 2, 2], np.diag([4.0, 4.0, 1.0]))
    # |shift|^2 + sum of (standard deviations' differences)^2
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 0 + 4, rel=1e-14)


def test_distance_of_gaussians_that_do_not_commute():
    s, t = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 4.0]])
    # tr sqrt(M) = sqrt(tr M + 2 sqrt det M) for 2 x 2.
    trace_root = np.sqrt(np.trace(s @ t) + 2 * np.sqrt(np.linalg.det(s @ t)))
    found = frechet_distance(gaussian([0, 0], s), gaussian([0, 0], t))
    assert found == pytest.approx(4 + 5 - 2 * trace_root, rel=1e-13)


def wrong_without_root(a, b):
    s, t = a.covariance(), b.covariance()
    return np.sum((a.mean - b.mean) ** 2) + np.trace(s + t - 2 * s @ t)


def wrong_without_two(a, b):
    return (
        frechet_distance(a, b)
        + (
            np.trace(a.covariance() + b.covariance())
            + np.sum((a.mean - b.mean) ** 2)
            - frechet_distance(a, b)
        )
        / 2
    )


def wrong_unsquared_mean(a, b):
    shift = a.mean - b.mean
    return frechet_distance(a, b) - shift @ shift + np.sqrt(shift @ shift)


def wrong_elementwise_root(a, b):
    s, t = a.covariance(), b.covariance()
    shift = np.sum((a.mean - b.mean) ** 2)
    return shift + np.trace(s + t) - 2 * np.trace(np.sqrt(np.abs(s @ t)))


@pytest.mark.parametrize(
    "wrong",
    [wrong_without_root, wrong_without_two, wrong_unsquared_mean, wrong_elementwise_root],
)
def test_wrong_formulas_fail_the_check_that_the_right_one_passes(wrong):
    a, b = draw(0, 400), draw(1, 500, shift=0.7, stretch=1.3)
    truth = fidelity_frechet(a, b)
    assert moments_distance(a, b) == pytest.approx(truth, rel=1e-6)
    assert wrong(Moments.of(a), Moments.of(b)) != pytest.approx(truth, rel=1e-2)


@pytest.mark.parametrize(("count", "other"), [(600, 400), (60, 50), (13, 9), (8, 2)])
def test_every_formula_equals_torch_fidelity(count, other):
    a, b = draw(0, count), draw(1, other, shift=0.4, stretch=1.2)
    truth = fidelity_frechet(a, b)
    for formula in (moments_distance, frechet_distance_from_features, frechet_from_features):
        assert formula(a, b) == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize(
    ("count", "other", "dimension"), [(900, 300, 40), (50, 45, 40), (20, 25, 40), (20, 900, 40)]
)
def test_formulas_agree_also_for_singular_covariances(count, other, dimension):
    a = draw(0, count, dimension) * np.geomspace(1, 1e-3, dimension)
    b = draw(1, other, dimension, shift=0.1) * np.geomspace(1, 1e-3, dimension)
    truth = frechet_distance_from_features(a, b)
    assert moments_distance(a, b) == pytest.approx(truth, rel=1e-11)
    assert frechet_from_features(a, b) == pytest.approx(truth, rel=1e-11)


def test_dispatcher_goes_by_samples_a_dimension(monkeypatch):
    used = []
    factor = eqm.frechet._factor

    def counted(covariance):
        used.append(len(covariance))
        return factor(covariance)

    monkeypatch.setattr(eqm.frechet, "_factor", counted)
    frechet_from_features(draw(0, 4 * D), draw(1, 4 * D))
    assert len(used) == 2
    frechet_from_features(draw(0, 4 * D - 1), draw(1, 4 * D))
    assert len(used) == 3
    frechet_distance_from_features(draw(0, 9 * D), draw(1, 9 * D))
    assert len(used) == 3


def test_constant_features_have_the_distance_of_their_means():
    a = np.ones((6 * D, D))
    for formula in (moments_distance, frechet_distance_from_features, frechet_from_features):
        assert formula(a, 3 * a) == pytest.approx(4 * D, rel=1e-14)
    spread = draw(0, 5 * D)
    expected = np.sum((spread.mean(axis=0) - 1) ** 2) + np.trace(np.cov(spread, rowvar=False))
    assert moments_distance(a, spread) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("count", [200, 7])
def test_distance_ignores_rotation_order_and_a_common_shift(count):
    a, b = draw(0, count), draw(1, count, shift=0.3)
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(D, D)))[0]
    shuffled = a[np.random.default_rng(6).permutation(count)]
    for formula in (moments_distance, frechet_distance_from_features):
        truth = formula(a, b)
        assert formula(a @ rotation, b @ rotation) == pytest.approx(truth, rel=1e-10)
        assert formula(shuffled, b) == pytest.approx(truth, rel=1e-10)
        assert formula(a + 1e3, b + 1e3) == pytest.approx(truth, rel=1e-8)
        assert formula(3 * a, 3 * b) == pytest.approx(9 * truth, rel=1e-10)


def test_torch_tensors_are_features_too():
    a, b = draw(0, 60).astype(np.float32), draw(1, 60).astype(np.float32)
    assert frechet_from_features(torch.from_numpy(a), torch.from_numpy(b)) == frechet_from_features(
        a, b
    )


# -- moments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("batch", [1, 7, 64, 500])
def test_streaming_moments_do_not_depend_on_the_batches(batch, offset):
    rows = draw(0, 500, shift=offset)
    whole = Moments.of(rows)
    streamed = Moments.of(rows[:batch])
    for first in range(batch, 500, batch):
        streamed = merge(streamed, Moments.of(rows[first : first + batch]))
    assert streamed.count == 500
    np.testing.assert_allclose(streamed.mean, whole.mean, rtol=1e-12, atol=1e-12)
    scale = np.abs(whole.scatter).max()
    np.testing.assert_allclose(streamed.scatter, whole.scatter, rtol=0, atol=1e-10 * scale)
    np.testing.assert_allclose(whole.covariance(), np.cov(rows, rowvar=False), rtol=1e-10)


@pytest.mark.parametrize("spectrum", ["even", "steep", "singular", "far from zero"])
def test_the_distance_does_not_depend_on_batches_or_ranks(spectrum):
    """Within 1e-10 from 4 samples a dimension on, in parts of any size, dealt to any ranks."""
    d = 24
    scale = np.geomspace(1, 1e-7, d) if spectrum == "steep" else np.ones(d)
    if spectrum == "singular":
        scale[d // 2 :] = 0
    offset = 1e3 if spectrum == "far from zero" else 0.0
    # As an extractor gives them.
    made, real = (
        (draw(seed, count, d) @ np.diag(scale) + offset).astype(np.float32)
        for seed, count in ((0, 4 * d), (1, 7 * d))
    )
    noise = np.random.default_rng(2).normal(size=(300, d))
    for other in (real, noise):
        truth = moments_distance(made, other)
        for size, ranks in ((1, 3), (7, 2), (7, 5), (4 * d, 1)):
            parts = [Moments.of(made[k : k + size]) for k in range(0, 4 * d, size)]
            dealt = [part for rank in range(ranks) for part in parts[rank::ranks]]
            found = frechet_distance(functools.reduce(merge, dealt), Moments.of(other))
            assert found == pytest.approx(truth, rel=1e-10)


def test_uncentred_sums_would_fail_where_merge_does_not():
    rows = draw(0, 500, shift=1e7)
    uncentred = rows.T @ rows - 500 * np.outer(rows.mean(axis=0), rows.mean(axis=0))
    halves = merge(Moments.of(rows[:250]), Moments.of(rows[250:]))
    scale = np.abs(halves.scatter).max()
    assert np.abs(halves.scatter - Moments.of(rows).scatter).max() < 1e-8 * scale
    assert np.abs(uncentred - Moments.of(rows).scatter).max() > 1e-3 * scale


feature_sets = st.builds(
    draw,
    st.integers(0, 10_000),
    st.integers(2, 30),
    st.just(5),
    shift=st.floats(-50, 50),
    stretch=st.floats(0.01, 20),
)
relaxed = settings(max_examples=60, deadline=None, derandomize=True)


@relaxed
@given(feature_sets, feature_sets, feature_sets)
def test_merge_is_associative_and_commutative(x, y, z):
    a, b, c = Moments.of(x), Moments.of(y), Moments.of(z)
    whole = Moments.of(np.concatenate([x, y, z]))
    scale = np.abs(whole.scatter).max()
    for merged in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(b, a))):
        assert merged.count == whole.count
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=0, atol=1e-11 * scale)


@relaxed
@given(feature_sets, feature_sets)
def test_distance_is_symmetric_and_not_negative(x, y):
    scale = np.trace(Moments.of(x).covariance() + Moments.of(y).covariance())
    for formula in (moments_distance, frechet_distance_from_features, frechet_from_features):
        assert formula(x, y) >= 0
        assert formula(x, y) == pytest.approx(formula(y, x), rel=1e-9, abs=1e-12 * scale)


@relaxed
@given(feature_sets)
def test_distance_to_itself_is_zero(x):
    scale = np.trace(Moments.of(x).covariance())
    for formula in (moments_distance, frechet_distance_from_features, frechet_from_features):
        assert formula(x, x) <= 1e-12 * scale


# -- kernel distance ----------------------------------------------------------------------------


def fidelity_kernel(a, b, **options):
    left, right = torch.from_numpy(a), torch.from_numpy(b)
    found = kid_features_to_metric(left, right, verbose=False, **options)
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


@pytest.mark.parametrize("count", [40, 700])
def test_kernel_distance_of_full_sets_equals_torch_fidelity(count):
    a, b = draw(0, count), draw(1, count, shift=0.2)
    mean, _ = fidelity_kernel(a, b, kid_subsets=1, kid_subset_size=count)
    assert kernel_distance(a, b) == KernelDistance(pytest.approx(mean, rel=1e-6), None)


def test_kernel_distance_over_subsets_draws_what_torch_fidelity_draws():
    a, b = draw(0, 300), draw(1, 260, shift=0.2)
    mean, std = fidelity_kernel(a, b, kid_subsets=20, kid_subset_size=100)
    found = kernel_distance(a, b, subsets=20, subset_size=100)
    assert (found.mean, found.std) == (pytest.approx(mean, rel=1e-6), pytest.approx(std, rel=1e-6))
    assert kernel_distance(a, b, subsets=20, subset_size=100, seed=1).mean != found.mean


def test_kernel_distance_of_unequal_sets_equals_the_sums_of_its_definition():
    a, b = draw(0, 30), draw(1, 50, shift=0.2)

    def kernel(x, y):
        return (x @ y / D + 1) ** 3

    within_a = np.mean([kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    within_b = np.mean([kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    between = np.mean([kernel(x, y) for x in a for y in b])
    truth = within_a + within_b - 2 * between
    assert kernel_distance(a, b).mean == pytest.approx(truth, rel=1e-10)
    biased = truth + np.mean([kernel(x, x) for x in a]) / 30
    assert biased != pytest.approx(truth, rel=1e-2)


def test_kernel_distance_is_unbiased():
    draws = [kernel_distance(draw(s, 40, 4), draw(s + 1000, 40, 4)).mean for s in range(200)]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / np.sqrt(len(draws))


# -- classes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "splits"), [(1000, 10), (203, 7), (10, 10)])
def test_class_scores_equal_torch_fidelity(count, splits):
    logits = 3 * draw(0, count, 12).astype(np.float32)
    found = class_scores(logits, splits=splits)
    truth = isc_features_to_metric(torch.from_numpy(logits), splits=splits)
    assert len(found) == splits
    assert found.mean() == pytest.approx(truth["inception_score_mean"], rel=1e-10)
    assert found.std() == pytest.approx(truth["inception_score_std"], rel=1e-8, abs=1e-12)


def test_class_scores_have_closed_forms():
    certain = 1e4 * np.eye(5)[np.arange(500) % 5]
    assert class_scores(certain, splits=1) == pytest.approx([5.0], rel=1e-12)
    assert class_scores(np.zeros((50, 5))) == pytest.approx(np.ones(10), rel=1e-12)
    # A class that nobody is given has a share of 0, whose logarithm is no number.
    assert class_scores(certain - [0, 0, 0, 0, 1e6], splits=1) == pytest.approx([4.0], rel=0.3)
    with pytest.raises(DataError, match="logits hold 9 samples: give at least 10"):
        class_scores(certain[:9])


# -- precision, recall, nearest -----------------------------------------------------------------


def fidelity_precision_recall(real, fake, neighbours):
    left, right = torch.from_numpy(fake), torch.from_numpy(real)
    found = prc_features_to_metric(left, right, prc_neighborhood=neighbours, verbose=False)
    return found["precision"], found["recall"]


@pytest.mark.parametrize("neighbours", [1, 3, 10])
@pytest.mark.parametrize("kind", ["normal", "narrow", "whole numbers with repeats"])
def test_precision_and_recall_equal_torch_fidelity(kind, neighbours):
    real, fake = draw(0, 700), draw(1, 600, shift=0.3, stretch=0.6 if kind == "narrow" else 1.1)
    if kind.startswith("whole"):
        real, fake = np.round(real[:, :3] / 2), np.round(fake[:, :3] / 2)
    precision, recall = fidelity_precision_recall(real, fake, neighbours)
    found = precision_recall(real, fake, neighbours=neighbours)
    assert found == (pytest.approx(precision, rel=1e-6), pytest.approx(recall, rel=1e-6))
    assert precision != recall


def test_precision_and_recall_of_mode_collapse_and_of_noise():
    real = draw(0, 300, 2)
    collapsed = real[:1] + 1e-3 * draw(1, 50, 2)
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1
    assert recall < 0.05
    assert precision_recall(real, real + 1e4) == (0, 0)
    assert precision_recall(real, real) == (1, 1)


@pytest.mark.parametrize("count", [4, 5, 9, 30])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_copies_of_repeated_features_are_inside_however_products_are_rounded(count, offset):
    # Reach is 0 where a feature occurs four times; products of few rows are rounded in other ways.
    single = draw(0, 30, 64, shift=offset)
    repeated = np.repeat(single, 4, axis=0)
    assert precision_recall(repeated, single[:count])[0] == 1
    assert precision_recall(repeated, single[:count] + 1e-3)[0] == 0


def test_nearest_distances_equal_differences_taken_one_by_one():
    queries, references = draw(0, 600), draw(1, 350)
    truth = np.array([np.linalg.norm(references - q, axis=1).min() for q in queries])
    np.testing.assert_allclose(nearest_distances(queries, references), truth, rtol=1e-13)


def test_nearest_distance_to_a_copy_is_exactly_zero():
    references = draw(0, 500, shift=1e3)
    assert (nearest_distances(references[::-1], references) == 0).all()
    moved = references + 1e-4
    np.testing.assert_allclose(nearest_distances(moved, references), 1e-4 * np.sqrt(D), rtol=1e-6)


@pytest.mark.parametrize("count", [3, 4, 5, 8, 9])
def test_every_reference_is_looked_at_however_they_come(monkeypatch, count):
    """Also one that is alone in the last block."""
    monkeypatch.setattr(eqm.frechet, "BLOCK_REFERENCES", 4)
    known = np.random.default_rng(count).normal(size=(2 * count, 3))
    number, distance = eqm.frechet.nearest(known + 1e-9, [known[:count], known[count:]])
    assert number.tolist() == list(range(2 * count))
    assert distance.max() < 1e-8


@pytest.mark.parametrize("rows", [1, 64, 10_000])
def test_blocks_change_nothing_but_memory(monkeypatch, rows):
    a, b = draw(0, 300), draw(1, 280, shift=0.2)
    kernel, shares, nearest = kernel_distance(a, b), precision_recall(a, b), nearest_distances(a, b)
    monkeypatch.setattr(eqm.frechet, "BLOCK_ROWS", rows)
    monkeypatch.setattr(eqm.frechet, "BLOCK_REFERENCES", rows)
    assert kernel_distance(a, b).mean == pytest.approx(kernel.mean, rel=1e-10)
    assert precision_recall(a, b) == shares
    np.testing.assert_array_equal(nearest_distances(a, b), nearest)


# -- refusals -----------------------------------------------------------------------------------

TWO_SIDED = [
    frechet_distance_from_features,
    frechet_from_features,
    kernel_distance,
    precision_recall,
    nearest_distances,
    moments_distance,
]


@pytest.mark.parametrize("function", TWO_SIDED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused(function, bad):
    good, broken = draw(0, 20), draw(1, 20)
    broken[7, 3] = bad
    for pair in ((good, broken), (broken, good)):
        with pytest.raises(DataError, match=r"NaN or infinity in 1 of 20 rows, first row 7"):
            function(*pair)


@pytest.mark.parametrize("function", TWO_SIDED)
def test_features_of_the_wrong_shape_are_refused(function):
    good = draw(0, 20)
    with pytest.raises(DataError, match=r"shape \(20,\): give an array \(N, D\)"):
        function(good, good[:, 0])
    with pytest.raises(DataError, match="12 and of 11 dimensions"):
        function(good, good[:, :-1])
    with pytest.raises(DataError, match=r"hold 0 samples: give at least"):
        function(good[:0], good)


@pytest.mark.parametrize("function", [f for f in TWO_SIDED if f is not nearest_distances])
def test_too_few_samples_are_refused(function):
    with pytest.raises(DataError, match="give at least"):
        function(draw(0, 1), draw(1, 20))


def test_precision_needs_more_samples_than_neighbours():
    with pytest.raises(DataError, match="real features hold 5 samples: give at least 6"):
        precision_recall(draw(0, 5), draw(1, 20), neighbours=5)
    with pytest.raises(ConfigError, match="neighbours is 0"):
        precision_recall(draw(0, 5), draw(1, 20), neighbours=0)


@pytest.mark.parametrize(
    "options", [{"subsets": 0}, {"subsets": 3, "subset_size": 21}, {"subsets": 3, "seed": -1}]
)
def test_impossible_subsets_are_refused(options):
    with pytest.raises(ConfigError, match="it must be"):
        kernel_distance(draw(0, 20), draw(1, 30), **{"subset_size": 20, **options})


def test_broken_moments_are_refused():
    with pytest.raises(DataError, match="these are no moments"):
        Moments(3, np.zeros(2), np.zeros((3, 3)))
    with pytest.raises(DataError, match="NaN or infinity"):
        Moments(3, np.full(2, np.nan), np.zeros((2, 2)))
    with pytest.raises(DataError, match="2 and of 3 dimensions"):
        merge(Moments.of(np.ones((3, 2))), Moments.of(np.ones((3, 3))))
