"""The objective: the official numbers, the paper's table of c, the perfect field as its optimum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import formulas, official

from eqm.config import ObjectiveConfig
from eqm.errors import ConfigError, DataError
from eqm.field import Field
from eqm.objective import (
    check_decay,
    corrupt,
    corrupted,
    decay,
    eqm_loss,
    loss_per_sample,
    target,
)

relaxed = settings(max_examples=100, deadline=None, derandomize=True)
KINDS = ("constant", "linear", "truncated", "piecewise")
PAPER = ObjectiveConfig(c="truncated", a=0.8, multiplier=4.0)


@pytest.fixture(scope="module")
def numbers():
    return official.outputs()


def one(value):
    return torch.tensor([value], dtype=torch.float64)


# -- equal to the official code -----------------------------------------------------------------


def test_corruption_and_c_are_the_official_ones(numbers):
    data, noise, gamma = numbers["data"], numbers["noise"], numbers["gamma"]
    assert official.error(corrupt(data, noise, gamma), numbers["corrupted"]) < 1e-12
    assert official.error(corrupt(noise, data, gamma), numbers["corrupted"]) > 0.1
    assert official.error(decay(PAPER)(gamma), numbers["c"]) < 1e-12
    assert official.error(decay(ObjectiveConfig(a=0.7))(gamma), numbers["c"]) > 1e-3


def test_target_is_the_official_one_with_the_sign_turned(numbers):
    data, noise, gamma = numbers["data"], numbers["noise"], numbers["gamma"]
    found = target(data, noise, gamma, decay(PAPER))
    assert official.error(-found, numbers["target"]) < 1e-12
    assert official.error(found, numbers["target"]) > 1


def test_loss_is_the_official_one_and_a_wrong_sign_is_not(numbers):
    given = [numbers[name] for name in ("data", "noise", "gamma", "y")]

    def error(flip, config=PAPER):
        field = Field(official.network(flip))
        found = eqm_loss(field, *given, c=decay(config), create_graph=False)
        return official.error(found, numbers["loss_per_sample"])

    assert error(flip=True) < 1e-12
    assert error(flip=False) > 1e-3
    assert error(flip=True, config=ObjectiveConfig(multiplier=3.9)) > 1e-3


# -- c ------------------------------------------------------------------------------------------


def test_c_of_the_paper_at_tenths():
    found = decay(PAPER)(torch.arange(11, dtype=torch.float64) / 10)
    expected = torch.tensor([4, 4, 4, 4, 4, 4, 4, 4, 4, 2, 0], dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=0, atol=1e-14)


@relaxed
@given(
    st.sampled_from(KINDS),
    st.floats(0, 1),
    st.floats(0.01, 0.99),
    st.floats(0, 5),
    st.floats(0.1, 10),
)
def test_c_is_the_formula(kind, gamma, a, b, multiplier):
    c = decay(ObjectiveConfig(c=kind, a=a, b=b, multiplier=multiplier))
    expected = formulas.c(gamma, kind, a, b, multiplier)
    assert float(c(one(gamma))) == pytest.approx(expected, rel=1e-12, abs=1e-14)


@relaxed
@given(st.floats(0.01, 0.99), st.floats(0, 5))
def test_piecewise_starts_at_b_reaches_one_at_a_and_vanishes(a, b):
    c = decay(ObjectiveConfig(c="piecewise", a=a, b=b, multiplier=1.0))
    assert float(c(one(0.0))) == b
    assert float(c(one(a))) == pytest.approx(1)
    assert float(c(one(a + 1e-12))) == pytest.approx(1)
    assert float(c(one(1.0))) == 0


def test_truncated_at_zero_is_linear():
    gamma = torch.linspace(0, 1, 101, dtype=torch.float64)
    truncated = decay(ObjectiveConfig(c="truncated", a=0.0))(gamma)
    assert torch.equal(truncated, decay(ObjectiveConfig(c="linear"))(gamma))


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_constant_c_is_refused(kind):
    c = decay(ObjectiveConfig(c=kind))
    if kind != "constant":
        return check_decay(c)
    with pytest.raises(ValueError, match=r"c\(1\) is 4.0; .* needs c\(1\) = 0"):
        check_decay(c)
    return None


def test_a_c_that_nearly_vanishes_at_the_data_is_refused_and_rounding_is_not():
    check_decay(lambda gamma: torch.cos(gamma * torch.pi / 2))
    for left in (1e-7, 1e-3):
        with pytest.raises(ConfigError, match=r"c\(1\) is .* needs c\(1\) = 0"):
            check_decay(lambda gamma, left=left: 1 - gamma + left)


# -- the loss -----------------------------------------------------------------------------------


class Spring:
    """f(x) = 2 x + 1."""

    classes, conditioned = None, False

    def __call__(self, x, labels=None):
        return 2 * x + 1


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_formula_number_by_number(kind):
    config = ObjectiveConfig(c=kind, b=1.4)
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 7, 2, 3, 3, generator=generator, dtype=torch.float64)
    gamma = torch.linspace(0, 1, 7, dtype=torch.float64)
    kept = x.clone(), eps.clone(), gamma.clone()
    found = eqm_loss(Field(Spring()), x, eps, gamma, None, c=decay(config), create_graph=False)
    assert found.shape == (7,)
    for i, level in enumerate(gamma.tolist()):
        at_level = formulas.c(level, kind, config.a, config.b, config.multiplier)
        lists = x[i].flatten().tolist(), eps[i].flatten().tolist()
        expected = formulas.loss(lambda v: [2 * n + 1 for n in v], *lists, level, at_level)
        assert float(found[i]) == pytest.approx(expected, rel=1e-12)
    assert all(torch.equal(a, b) for a, b in zip((x, eps, gamma), kept, strict=True))


def test_loss_of_the_target_is_zero_and_a_mean_over_entries():
    goal = torch.ones(3, 2, 4, 4)
    assert loss_per_sample(goal, goal).tolist() == [0, 0, 0]
    assert loss_per_sample(goal + torch.tensor([0, 1, 3.0]).view(3, 1, 1, 1), goal).tolist() == [
        0,
        1,
        9,
    ]


def test_half_precision_data_take_gamma_of_float32():
    x, eps = torch.ones(2, 1, 2, 2, dtype=torch.bfloat16), torch.zeros(2, 1, 2, 2).bfloat16()
    assert corrupt(x, eps, torch.tensor([0.0, 0.5])).dtype == torch.bfloat16
    assert target(x, eps, torch.tensor([0.0, 0.5]), decay(PAPER)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("gamma", "message"),
    [
        ([0.5, float("nan")], r"gamma is nan; give levels from 0"),
        ([0.5, 1.001], r"gamma is 1\.00"),
        ([-0.1, 0.5], r"gamma is -0\.1"),
        ([0.5, 0.5, 0.5], r"gamma has shape \(3,\) for 2 latents: give one level each"),
    ],
)
def test_levels_that_cannot_be_are_refused(gamma, message):
    x, eps = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    given, c = (x, eps, torch.tensor(gamma)), decay(PAPER)
    for refusing in (
        lambda: corrupt(*given),
        lambda: corrupted(*given, None, c=c),
        lambda: eqm_loss(Field(Spring()), *given, None, c=c, create_graph=False),
    ):
        with pytest.raises(DataError, match=message):
            refusing()
    assert corrupt(x, eps, torch.tensor([0.0, 1.0])).mean(dim=(1, 2, 3)).tolist() == [0, 1]


# -- the perfect field --------------------------------------------------------------------------


def perfect(points=2000):
    generator = torch.Generator().manual_seed(8)
    data = torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64)
    return data, formulas.PerfectField(data, decay(PAPER), points)


def test_perfect_field_is_a_spring_of_stiffness_twenty_at_the_data():
    data, f = perfect()
    generator = torch.Generator().manual_seed(9)
    away = 1e-3 * torch.randn(data.shape, generator=generator, dtype=torch.float64)
    assert official.error(f(data + away), 4 / (1 - 0.8) * away) < 1e-6
    assert float(f(data).norm()) < 1e-6


@pytest.mark.parametrize(("a", "multiplier"), [(0.8, 4.0), (0.5, 1.0), (0.0, 2.0)])
def test_jacobian_of_the_perfect_field_at_a_datum_is_the_springs_stiffness(a, multiplier):
    data, _ = perfect(points=10)
    c = decay(ObjectiveConfig(a=a, multiplier=multiplier))
    f = formulas.PerfectField(data, c)
    jacobian = torch.func.jacrev(lambda x: f(x.view(1, 1, 4, 4)).flatten())(data[0].flatten())
    expected = multiplier / (1 - a) * torch.eye(16, dtype=torch.float64)
    assert official.error(jacobian, expected) < 1e-3


def test_perfect_field_has_the_least_loss():
    data, f = perfect(points=300)
    generator = torch.Generator().manual_seed(10)
    which = torch.randint(3, (4000,), generator=generator)
    eps = torch.randn(4000, 1, 4, 4, generator=generator, dtype=torch.float64)
    gamma = torch.rand(4000, generator=generator, dtype=torch.float64)

    class Scaled:
        classes, conditioned = None, False

        def __init__(self, factor):
            self.factor = factor

        def __call__(self, x, labels=None):
            return self.factor * f(x)

    def loss(factor):
        given = data[which], eps, gamma, None
        field = Field(Scaled(factor))
        return float(eqm_loss(field, *given, c=decay(PAPER), create_graph=False).mean())

    best = loss(1.0)
    assert best < min(loss(0.95), loss(1.05))
    assert loss(-1.0) > 10 * best
