"""The moving average: closed forms, half-lives in images, states."""

import pytest
import torch

from eqm.ema import EMA


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
