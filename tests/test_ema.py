"""Moving averages: closed forms, lengths in images, states, reconstruction of any length."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eqm.ema import (
    EMA,
    LONGEST_SIGMA_REL,
    PowerEMA,
    Snapshot,
    gamma_to_sigma_rel,
    inner_product,
    plan_reconstruction,
    power_share,
    reconstruct,
    sigma_rel_to_gamma,
    weighted_sum,
)
from eqm.errors import ConfigError, DataError


def weights(value, dtype=torch.float32):
    return {"a": torch.full((3, 2), value, dtype=dtype), "b": torch.full((4,), -value, dtype=dtype)}


def test_closed_form_for_weights_that_stay():
    ema = EMA(weights(1.0, torch.float64), half_life_images=1000.0)
    for k in range(1, 40):
        ema.update(weights(5.0, torch.float64), images=64)
        expected = 5 - 4 * 0.5 ** (64 * k / 1000)
        assert torch.allclose(
            ema.state_dict()["a"], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
        )
        assert torch.allclose(
            ema.state_dict()["b"], torch.tensor(-expected, dtype=torch.float64), rtol=1e-12, atol=0
        )


def test_closed_form_for_weights_that_move():
    generator = torch.Generator().manual_seed(0)
    path = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    ema, d = EMA({"w": path[0]}, half_life_images=300.0), 0.5 ** (128 / 300)
    for point in path[1:]:
        ema.update({"w": point}, images=128)
    powers = d ** torch.arange(28, -1, -1, dtype=torch.float64)
    expected = d**29 * path[0] + (1 - d) * (powers[:, None] * path[1:]).sum(dim=0)
    assert torch.allclose(ema.state_dict()["w"], expected, rtol=1e-12, atol=0)


def test_half_is_forgotten_after_a_half_life():
    ema = EMA(weights(1.0), half_life_images=2560.0)
    for _ in range(10):
        ema.update(weights(0.0), images=256)
    assert torch.allclose(ema.state_dict()["a"], torch.tensor(0.5))


def test_memory_does_not_change_with_the_batch_size():
    small, large = (EMA(weights(1.0, torch.float64), half_life_images=500.0) for _ in range(2))
    for _ in range(8):
        small.update(weights(3.0, torch.float64), images=32)
    large.update(weights(3.0, torch.float64), images=256)
    assert torch.allclose(small.state_dict()["a"], large.state_dict()["a"], rtol=1e-12, atol=0)


def test_released_decay_is_a_half_life_of_1774_thousand_images():
    ema = EMA(weights(1.0, torch.float64), half_life_images=1.774e6)
    ema.update(weights(0.0, torch.float64), images=256)
    assert float(ema.state_dict()["a"][0, 0]) == pytest.approx(0.9999, abs=1e-7)


def test_starts_at_the_weights_and_is_a_copy():
    given = {name: w.requires_grad_(True) for name, w in weights(2.0).items()}
    ema = EMA(given, half_life_images=100.0)
    assert torch.equal(ema.state_dict()["a"], given["a"])
    with torch.no_grad():
        given["a"].zero_()
    assert float(ema.state_dict()["a"].sum()) == 12
    ema.update(given, images=100)
    assert not ema.state_dict()["a"].requires_grad
    assert not bool(given["a"].any())
    assert torch.allclose(ema.state_dict()["a"], torch.tensor(1.0))


def test_half_precision_weights_are_averaged_in_float32():
    ema = EMA(weights(1.0, torch.bfloat16), half_life_images=1e6)
    for _ in range(100):
        ema.update(weights(2.0, torch.bfloat16), images=256)
    found = ema.state_dict()["a"]
    assert found.dtype == torch.float32
    # In bfloat16 a share of 0.0002 would be rounded away, and nothing would ever move.
    assert torch.allclose(found, torch.tensor(2 - 0.5 ** (25_600 / 1e6)), rtol=1e-5, atol=0)


def test_a_restored_state_goes_on_to_the_bit():
    generator = torch.Generator().manual_seed(1)
    path = torch.randn(20, 7, generator=generator)
    whole, first = (EMA({"w": path[0]}, half_life_images=300.0) for _ in range(2))
    for point in path[:10]:
        whole.update({"w": point}, images=64)
        first.update({"w": point}, images=64)
    saved = {name: average.clone() for name, average in first.state_dict().items()}
    second = EMA({"w": path[5]}, half_life_images=300.0)
    second.load_state_dict(saved)
    for point in path[10:]:
        whole.update({"w": point}, images=64)
        second.update({"w": point}, images=64)
    assert torch.equal(whole.state_dict()["w"], second.state_dict()["w"])
    assert not torch.equal(saved["w"], second.state_dict()["w"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("a"), "a is missing"),
        (lambda s: s.update(c=torch.ones(1)), "c is not averaged"),
        (lambda s: s.update(a=torch.ones(2, 3)), "a has shape"),
    ],
)
def test_states_that_do_not_fit_are_refused_and_change_nothing(change, message):
    ema, state = EMA(weights(1.0), half_life_images=10.0), weights(7.0)
    change(state)
    with pytest.raises(ValueError, match=message):
        ema.load_state_dict(state)
    assert torch.equal(ema.state_dict()["a"], weights(1.0)["a"])
    assert torch.equal(ema.state_dict()["b"], weights(1.0)["b"])


def test_other_weights_and_no_half_life_are_refused():
    with pytest.raises(ValueError, match="b is missing"):
        EMA(weights(1.0), half_life_images=10.0).update({"a": torch.ones(3, 2)}, images=1)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="half_life_images is"):
            EMA(weights(1.0), half_life_images=wrong)


# -- power functions ----------------------------------------------------------------------------

LENGTHS = (0.05, 0.10)


def density(gamma, end, images):
    """Of the average that ends after ``end`` images, over each of them as a whole: float64 (N,)."""
    edges = torch.arange(images + 1, dtype=torch.float64).clamp(max=end) / end
    return (edges ** (gamma + 1)).diff()


def tracked(path, sizes, sigma_rel, dtype=torch.float64):
    """Weights (U, D) after updates on so many images each -> (images seen, average) after each."""
    average, seen, found = PowerEMA({"w": path[0].to(dtype)}, sigma_rel=sigma_rel), 0, []
    for point, images in zip(path.to(dtype), sizes, strict=True):
        average.update({"w": point}, images=images, images_seen=seen)
        seen += images
        found.append((seen, average.state_dict()["w"].clone()))
    return found


def walk(updates, *, seed=0, width=50):
    """Weights as training moves them: from a start, with noise, toward what they become."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(updates, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(updates, width, generator=generator, dtype=torch.float64)
    return 0.1 * steps.cumsum(dim=0) + noise


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def spaced(path, sizes, count=32, dtype=torch.float64):
    """Snapshots of both tracks, equally spaced, the last at the end."""
    every = len(path) // count
    return [
        Snapshot(sigma, seen, {"w": average})
        for sigma in LENGTHS
        for seen, average in tracked(path, sizes, sigma, dtype)[every - 1 :: every]
    ]


@settings(deadline=None)
@given(st.floats(1e-4, LONGEST_SIGMA_REL))
def test_the_exponent_is_that_of_the_length(sigma):
    gamma = sigma_rel_to_gamma(sigma)
    assert gamma >= 0
    assert gamma_to_sigma_rel(gamma) == pytest.approx(sigma, rel=1e-12)


def test_the_length_is_the_standard_deviation_of_the_density():
    # Published exponents of the two lengths that EDM2 tracks (arXiv 2312.02696, section 3.2).
    assert sigma_rel_to_gamma(0.05) == pytest.approx(16.97, abs=5e-3)
    assert sigma_rel_to_gamma(0.10) == pytest.approx(6.94, abs=5e-3)
    middle = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for sigma in (0.05, 0.1, 0.2, LONGEST_SIGMA_REL):
        p = density(sigma_rel_to_gamma(sigma), 200_000, 200_000)
        mean = (p * middle).sum()
        assert float((p * (middle - mean) ** 2).sum().sqrt()) == pytest.approx(sigma, rel=1e-6)


@pytest.mark.parametrize("wrong", [0.0, -0.1, 0.2887, 0.5, float("nan"), float("inf")])
def test_lengths_that_no_power_function_has_are_refused(wrong):
    for asked in (
        lambda: sigma_rel_to_gamma(wrong),
        lambda: PowerEMA(weights(1.0), sigma_rel=wrong),
        lambda: plan_reconstruction([(0.05, 10), (0.1, 10)], wrong),
    ):
        with pytest.raises(ConfigError, match=r"sigma_rel is .* at most 0\.2887"):
            asked()


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=30),
    st.floats(0.01, LONGEST_SIGMA_REL),
    st.integers(0, 99),
)
def test_the_average_is_the_sum_over_images_whatever_the_updates(sizes, sigma, seed):
    path, total = walk(len(sizes), seed=seed, width=3), sum(sizes)
    of_each_image = path.repeat_interleave(torch.tensor(sizes), dim=0)
    p = density(sigma_rel_to_gamma(sigma), total, total)
    assert float(p.sum()) == pytest.approx(1, rel=1e-12)
    expected = (p[:, None] * of_each_image).sum(dim=0)
    torch.testing.assert_close(tracked(path, sizes, sigma)[-1][1], expected, rtol=1e-9, atol=1e-11)


@settings(deadline=None)
@given(st.integers(1, 10**9), st.integers(1, 10**6), st.integers(1, 10**6), st.floats(0.01, 0.28))
def test_two_updates_forget_as_much_as_one_of_both(before, one, other, sigma):
    gamma = sigma_rel_to_gamma(sigma)
    kept = (1 - power_share(gamma, images=one, images_seen=before)) * (
        1 - power_share(gamma, images=other, images_seen=before + one)
    )
    at_once = power_share(gamma, images=one + other, images_seen=before)
    assert 1 - kept == pytest.approx(at_once, rel=1e-9, abs=1e-15)


def test_one_image_an_update_is_the_published_rule():
    gamma = sigma_rel_to_gamma(0.1)
    for t in (1, 2, 3, 10, 1000):
        beta = (1 - 1 / t) ** (gamma + 1)
        share = power_share(gamma, images=1, images_seen=t - 1)
        assert share == pytest.approx(1 - beta, rel=1e-12)


def test_the_longest_average_is_the_mean_of_all_weights():
    path = walk(40)
    found = tracked(path, [64] * 40, LONGEST_SIGMA_REL)[-1][1]
    assert torch.allclose(found, path.mean(dim=0), rtol=1e-12)


def test_initial_weights_are_forgotten_at_the_first_update():
    average = PowerEMA(weights(7.0), sigma_rel=0.1)
    assert torch.equal(average.state_dict()["a"], weights(7.0)["a"])
    average.update(weights(2.0), images=64, images_seen=0)
    assert torch.equal(average.state_dict()["a"], weights(2.0)["a"])
    for images, seen in ((0, 64), (64, -1)):
        with pytest.raises(ValueError, match="it must be on at least 1"):
            average.update(weights(2.0), images=images, images_seen=seen)
    with pytest.raises(ValueError, match="b is missing"):
        average.update({"a": torch.ones(3, 2)}, images=1, images_seen=64)


def test_an_update_that_was_left_out_moves_no_average():
    start, now = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    for made in (EMA(start, half_life_images=64), PowerEMA(start, sigma_rel=0.1)):
        further = {"images_seen": 64} if isinstance(made, PowerEMA) else {}
        made.update(now, images=64, happened=torch.tensor(0.0), **further)
        assert made.state_dict()["w"].tolist() == [0, 0, 0]
        made.update(now, images=64, happened=torch.tensor(1.0), **further)
        assert (made.state_dict()["w"] > 0.4).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_power_functions_are_averaged_in_float32_at_least(dtype):
    path = walk(400).to(dtype)
    average, exact = PowerEMA({"w": path[0]}, sigma_rel=0.05), tracked(path, [256] * 400, 0.05)
    for k, point in enumerate(path):
        average.update({"w": point}, images=256, images_seen=256 * k)
    found = average.state_dict()["w"]
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert relative(found.double(), exact[-1][1]) < (1e-15 if dtype == torch.float64 else 1e-6)


# -- reconstruction -----------------------------------------------------------------------------


def test_inner_products_are_those_of_direct_summation():
    images = 200_000
    cases = [
        (17.0, 1.0, 6.9, 1.0),
        (17.0, 0.3, 6.9, 0.8),
        (17.0, 0.8, 6.9, 0.3),
        (0.0, 0.5, 3.0, 1.0),
    ]
    for gamma, t, other_gamma, other_t in cases:
        one = density(gamma, t * images, images)
        other = density(other_gamma, other_t * images, images)
        direct = float((one * other).sum()) * images
        closed = inner_product(*map(np.array, (gamma, t, other_gamma, other_t)))
        assert float(closed) == pytest.approx(direct, rel=1e-6)
        assert float(inner_product(*map(np.array, (other_gamma, other_t, gamma, t)))) == closed


@pytest.mark.parametrize("sigma", [0.05, 0.06, 0.075, 0.08, 0.09, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_length_between_two_tracks_is_reconstructed(sigma, dtype):
    """The bar: below 1e-3 of an average that was tracked, from 32 snapshots of two tracks."""
    path, sizes = walk(1600), [128] * 1600
    found = reconstruct(spaced(path, sizes, dtype=dtype), sigma)
    expected = tracked(path, sizes, sigma)[-1][1]
    assert found.tensors["w"].dtype == dtype
    assert relative(found.tensors["w"].double(), expected) < (
        1e-3 if sigma not in LENGTHS else 1e-6
    )
    assert found.expected_error < 1e-3
    # What a user without snapshots would take instead is nowhere near.
    nearest = min(LENGTHS, key=lambda tracked_one: abs(tracked_one - sigma))
    if sigma not in LENGTHS:
        assert relative(tracked(path, sizes, nearest)[-1][1], expected) > 1e-2


def test_updates_of_different_sizes_are_reconstructed_alike():
    sizes = torch.randint(1, 500, (1600,), generator=torch.Generator().manual_seed(0)).tolist()
    path = walk(1600, seed=1)
    found = reconstruct(spaced(path, sizes), 0.08)
    assert relative(found.tensors["w"], tracked(path, sizes, 0.08)[-1][1]) < 1e-3


def test_moments_on_the_way_are_reconstructed():
    path, sizes = walk(1600), [128] * 1600
    kept = [s for s in spaced(path, sizes) if s.images_seen <= 1200 * 128]
    found = reconstruct(kept, 0.08, images_seen=1200 * 128)
    assert relative(found.tensors["w"], tracked(path, sizes, 0.08)[1199][1]) < 3e-3
    with pytest.raises(DataError, match=r"after the moment wanted \(153,600\): leave it out"):
        reconstruct(spaced(path, sizes), 0.08, images_seen=1200 * 128)


def test_the_expected_error_is_that_of_weights_that_are_noise():
    """From image to image independent: then the error is as told, and a poor one is told."""
    generator = torch.Generator().manual_seed(2)
    path = torch.randn(2000, 400, generator=generator, dtype=torch.float64)
    sizes = [1] * len(path)
    for count, sigma in ((4, 0.08), (8, 0.2), (8, 0.03), (2, 0.25)):
        found = reconstruct(spaced(path, sizes, count=count), sigma)
        error = relative(found.tensors["w"], tracked(path, sizes, sigma)[-1][1])
        assert found.expected_error > 1e-2
        assert error == pytest.approx(found.expected_error, rel=0.1)


def test_direct_summation_gives_the_expected_error():
    moments = [(sigma, k * 12_500) for sigma in LENGTHS for k in range(1, 9)]
    plan, images = plan_reconstruction(moments, 0.15), 100_000
    made = sum(
        factor * density(sigma_rel_to_gamma(sigma), seen, images)
        for factor, (sigma, seen) in zip(plan.factors, moments, strict=True)
    )
    wanted = density(sigma_rel_to_gamma(0.15), images, images)
    assert relative(made, wanted) == pytest.approx(plan.expected_error, rel=1e-4)
    assert sum(plan.factors) == pytest.approx(1, rel=1e-12)
    # Least squares: no step that keeps the sum of factors comes closer.
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = torch.randn(len(moments), generator=generator, dtype=torch.float64)
        step -= step.mean()
        moved = made + 1e-3 * sum(
            float(s) * density(sigma_rel_to_gamma(sigma), seen, images)
            for s, (sigma, seen) in zip(step, moments, strict=True)
        )
        assert relative(moved, wanted) > plan.expected_error


def test_weights_that_stand_still_come_back_exactly():
    kept = [Snapshot(0.05, 500, {"w": torch.full((2,), 3.0)})]
    kept += [Snapshot(0.10, 1000, {"w": torch.full((2,), 3.0)})]
    found = reconstruct(kept, 0.2)
    assert found.expected_error > 0.2
    assert torch.allclose(found.tensors["w"], torch.tensor(3.0), rtol=1e-6)


def test_a_snapshot_that_is_wanted_is_given_back_to_the_bit():
    path, sizes = walk(320), [128] * 320
    kept = spaced(path, sizes, dtype=torch.float32)
    for one in (kept[31], kept[63]):
        found = reconstruct(kept, one.sigma_rel)
        assert torch.equal(found.tensors["w"], one.tensors["w"])
        assert found.expected_error < 1e-7
        assert torch.equal(reconstruct([one], one.sigma_rel).tensors["w"], one.tensors["w"])
        # No other snapshot need be read.
        plan = plan_reconstruction([(s.sigma_rel, s.images_seen) for s in kept], one.sigma_rel)
        assert sorted(plan.factors) == [0.0] * 63 + [1.0]


def test_sums_are_taken_in_float64():
    terms = [(1.0, 2.0**25), (1.0, 1.0), (1.0, 1.0), (-1.0, 2.0**25)]
    found = weighted_sum((factor, {"w": torch.tensor([value])}) for factor, value in terms)
    assert found["w"].dtype == torch.float32
    assert float(found["w"]) == 2


def test_snapshots_given_twice_and_very_many_change_nothing():
    path, sizes = walk(1600), [128] * 1600
    expected = tracked(path, sizes, 0.08)[-1][1]
    once, many = spaced(path, sizes), spaced(path, sizes, count=800)
    assert relative(reconstruct(once + once, 0.08).tensors["w"], expected) < 1e-3
    found = reconstruct(many, 0.08)
    assert relative(found.tensors["w"], expected) < 1e-5
    assert found.expected_error < 1e-5


def test_snapshots_that_do_not_suffice_are_refused():
    one, other = {"w": torch.ones(3)}, {"w": torch.ones(3)}
    with pytest.raises(DataError, match=r"no snapshots .* train\.ema_power"):
        reconstruct([], 0.08)
    with pytest.raises(DataError, match=r"one snapshot, of sigma_rel 0\.05 at image 64, gives no"):
        reconstruct([Snapshot(0.05, 64, one)] * 2, 0.08)
    with pytest.raises(DataError, match="a snapshot is of image 0"):
        reconstruct([Snapshot(0.05, 0, one), Snapshot(0.1, 64, other)], 0.08)
    # Whether or not the one that is wanted stands before it.
    kept = [Snapshot(0.05, 64, one), Snapshot(0.05, 128, other)]
    for some in (kept, kept[::-1]):
        with pytest.raises(DataError, match=r"of image 128, after the moment wanted \(64\)"):
            reconstruct(some, 0.05, images_seen=64)
    with pytest.raises(DataError, match=r"w has shape \(3,\) in one and \(2,\) in another"):
        reconstruct([Snapshot(0.05, 64, one), Snapshot(0.1, 64, {"w": torch.ones(2)})], 0.08)
    with pytest.raises(DataError, match=r"v has shape none in one and \(3,\) in another"):
        reconstruct([Snapshot(0.05, 64, one), Snapshot(0.1, 64, {**one, "v": torch.ones(3)})], 0.08)
    with pytest.raises(DataError, match="give snapshots that hold weights"):
        reconstruct([Snapshot(0.05, 64, {}), Snapshot(0.1, 64, {})], 0.08)
