"""Baselines: as scikit-learn and scipy have them, high outside, defined where singular."""

import numpy as np
import pytest
from scipy.spatial import cKDTree
from scipy.stats import multivariate_normal
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA

from eqm.baselines import LEAST_ROWS, Gaussian, Neighbours, PrincipalComponents
from eqm.errors import ConfigError, DataError


def rows(count, dimension, seed=0):
    """Correlated rows with a mean."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(dimension, dimension))
    return generator.normal(size=(count, dimension)) @ mixing + np.arange(dimension)


@pytest.mark.parametrize(("count", "dimension"), [(300, 6), (20, 40), (5, 3)])
def test_the_gaussian_is_ledoit_and_wolfs(count, dimension):
    fitted, asked = rows(count, dimension), rows(11, dimension, 1)
    covariance, _ = ledoit_wolf(fitted)
    expected = -multivariate_normal(fitted.mean(axis=0), covariance).logpdf(asked)
    assert Gaussian(fitted).score(asked) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_the_density_under_pca_is_probabilistic_pcas(share):
    fitted, asked = rows(200, 8), rows(11, 8, 1)
    found = PrincipalComponents(fitted, share=share)
    reference = PCA(n_components=found.kept).fit(fitted)
    held = PCA(n_components=8).fit(fitted).explained_variance_ratio_.cumsum()
    assert held[found.kept - 1] >= share > (held[found.kept - 2] if found.kept > 1 else 0)
    assert found.score(asked) == pytest.approx(-reference.score_samples(asked), rel=1e-9)


@pytest.mark.parametrize("k", [1, 5])
def test_neighbours_are_those_of_a_tree(k):
    fitted, asked = rows(700, 5), rows(600, 5, 1)
    expected = np.atleast_2d(cKDTree(fitted).query(asked, k=[k])[0].T)[0]
    assert Neighbours(fitted, k=k).score(asked) == pytest.approx(expected, rel=1e-7)
    assert Neighbours(fitted, k=1).score(fitted).max() < 1e-5


def test_every_score_is_high_outside():
    fitted, inside = rows(400, 6), rows(100, 6, 1)
    for baseline in (
        Gaussian(fitted),
        PrincipalComponents(fitted, share=0.9),
        Neighbours(fitted, k=5),
    ):
        assert np.median(baseline.score(inside + 30)) > baseline.score(inside).max()


def test_pixels_that_never_vary_are_no_singularity():
    """The corners of digits are black in every one."""
    fitted = np.zeros((50, 6))
    fitted[:, :3] = np.random.default_rng(0).integers(0, 256, (50, 3))
    odd = fitted[:1] + np.array([0, 0, 0, 40, 0, 0])
    for baseline in (
        Gaussian(fitted),
        PrincipalComponents(fitted, share=0.99, least_variance=1 / 12),
    ):
        inside, outside = baseline.score(fitted), baseline.score(odd)
        assert np.isfinite(inside).all()
        assert np.isfinite(outside).all()
        assert outside[0] > inside[0]


def test_as_many_rows_as_are_told_are_enough():
    least = {Gaussian: {LEAST_ROWS["pixel_gaussian"], LEAST_ROWS["feature_gaussian"]}}
    least[lambda few: PrincipalComponents(few, share=0.95, least_variance=1 / 12)] = {
        LEAST_ROWS["pixel_pca"]
    }
    for fit, counts in least.items():
        (count,) = counts
        for dimension in (2, 64):
            fit(rows(count, dimension))
            with pytest.raises(DataError):
                fit(rows(count - 1, dimension))


def test_what_cannot_be_fitted_is_refused():
    same = np.ones((9, 4))
    with pytest.raises(DataError, match="the 9 rows that a Gaussian is fitted on do not vary"):
        Gaussian(same)
    with pytest.raises(DataError, match="the 2 rows that a Gaussian"):
        Gaussian(rows(2, 3))
    with pytest.raises(DataError, match="leave no variance"):
        PrincipalComponents(same, share=0.9)
    with pytest.raises(DataError, match="1 rows are too few to fit a baseline on: give 2"):
        Gaussian(same[:1])
    with pytest.raises(DataError, match="3 rows are too few to fit a baseline on: give 5"):
        Neighbours(same[:3], k=5)
    with pytest.raises(DataError, match="NaN or infinity"):
        Gaussian(np.full((3, 2), np.nan))
    with pytest.raises(DataError, match="rows have 3 numbers, 4 were fitted"):
        Neighbours(same, k=1).score(np.ones((1, 3)))
    with pytest.raises(DataError, match=r"rows have shape \(9,\)"):
        Gaussian(np.ones(9))
    with pytest.raises(ConfigError, match="share is 1; it must be between 0 and 1"):
        PrincipalComponents(rows(9, 3), share=1)
    with pytest.raises(ConfigError, match="k is 0"):
        Neighbours(same, k=0)
