"""Rules of descent beside literal transcriptions, torch's own optimisers and known answers."""

import math

import pytest
import torch
from reference import formulas, official

from eqm.config import ObjectiveConfig
from eqm.randomness import Stream, normal
from eqm.rules import (
    NAG,
    BarzilaiBorwein,
    Euler,
    GradientDescent,
    HeavyBall,
    Heun,
    Langevin,
    Optimiser,
    refilled,
)
from eqm.sampler import descend

OPTIMISERS = {
    "adam": Optimiser(torch.optim.Adam, lr=0.05),
    "adamw": Optimiser(torch.optim.AdamW, lr=0.05, weight_decay=0.1),
    "nesterov": Optimiser(torch.optim.SGD, lr=0.05, momentum=0.3, nesterov=True),
    "rmsprop": Optimiser(torch.optim.RMSprop, lr=0.01, momentum=0.5),
    "rprop": Optimiser(torch.optim.Rprop, lr=0.05),
    "lbfgs": Optimiser(torch.optim.LBFGS, lr=0.5),
}


def noise(batch, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)


def bowl(x, gamma=None):
    """Gradient of a quadratic with stiffnesses from 1 to 4."""
    return x * torch.linspace(1, 4, x[0].numel(), dtype=x.dtype).view_as(x[0])


def close(found, expected):
    return torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


# -- against transcriptions ---------------------------------------------------------------------


@pytest.mark.parametrize("updates", [0, 1, 2, 17])
def test_heavy_ball_keeps_its_history(updates):
    start = noise(3, 2, 4)
    rule = HeavyBall(step_size=0.05, momentum=0.6)
    found = descend(bowl, start, rule=rule, updates=updates).latents
    assert close(found, formulas.heavy_ball(bowl, start, 0.05, 0.6, updates))


def test_the_three_rules_with_momentum_differ_and_agree_without_it():
    start, ends = noise(2, 5), []
    for rule in (
        NAG(step_size=0.05, momentum=0.5),
        HeavyBall(step_size=0.05, momentum=0.5),
        Optimiser(torch.optim.SGD, lr=0.05, momentum=0.5, nesterov=True),
    ):
        ends.append(descend(bowl, start, rule=rule, updates=20).latents)
    pairs = [(0, 1), (0, 2), (1, 2)]
    assert all(official.error(ends[a], ends[b]) > 1e-2 for a, b in pairs)
    still = HeavyBall(step_size=0.05, momentum=0.0)
    plain = descend(bowl, start, rule=GradientDescent(step_size=0.05), updates=20).latents
    assert close(descend(bowl, start, rule=still, updates=20).latents, plain)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_torch_optimiser_is_that_optimiser_on_each_sample_alone(name):
    rule, start = OPTIMISERS[name], noise(3, 6)
    found = descend(bowl, start, rule=rule, updates=25)
    assert found.evaluations.tolist() == [25] * 3
    for i in range(3):
        weight = start[i : i + 1].clone().requires_grad_(True)
        optimiser = rule.kind([weight], **dict(rule.settings))

        def closure(optimiser=optimiser, weight=weight):
            optimiser.zero_grad()
            energy = (bowl(weight) * weight).sum() / 2
            energy.backward()
            return energy

        for _ in range(25):
            optimiser.step(closure)
        assert torch.allclose(found.latents[i : i + 1], weight.detach(), rtol=1e-9, atol=1e-9)


def test_lbfgs_that_would_look_elsewhere_is_refused():
    for settings in ({"max_iter": 5}, {"line_search_fn": "strong_wolfe"}):
        with pytest.raises(ValueError, match="one evaluation an update"):
            Optimiser(torch.optim.LBFGS, **settings)


def test_settings_of_a_torch_optimiser_are_torchs_to_check():
    with pytest.raises(ValueError, match="learning rate"):
        descend(bowl, noise(1, 2), rule=Optimiser(torch.optim.Adam, lr=-1.0), updates=1)


# -- Barzilai and Borwein -----------------------------------------------------------------------


def test_barzilai_borwein_is_its_formula():
    start = noise(2, 4)
    rule = BarzilaiBorwein(step_size=0.05, shortest=1e-3, longest=10.0)
    found = descend(bowl, start, rule=rule, updates=12).latents
    for i in range(2):
        expected = formulas.barzilai_borwein(bowl, start[i : i + 1], 0.05, 12)
        assert close(found[i : i + 1], expected)


def test_barzilai_borwein_solves_a_spring_in_two_updates():
    rule = BarzilaiBorwein(step_size=0.003, longest=1.0)
    found = descend(lambda x: 20 * x, noise(3, 8), rule=rule, updates=2).latents
    assert float(found.abs().max()) < 1e-12


def test_barzilai_borwein_keeps_to_its_bounds():
    # A hill: curvature is negative everywhere, so every step after the first is the longest.
    rule = BarzilaiBorwein(step_size=0.01, longest=0.05)
    start = noise(1, 3)
    found = descend(lambda x: -x, start, rule=rule, updates=3).latents
    assert close(found, start * 1.01 * 1.05**2)
    rule = BarzilaiBorwein(step_size=0.5, shortest=0.5, longest=0.5)
    assert close(descend(bowl, start, rule=rule, updates=3).latents, start * _left(0.5, 3, start))


def test_default_bounds_of_barzilai_borwein_are_of_the_papers_spring():
    rule, c = BarzilaiBorwein(step_size=0.003), ObjectiveConfig()
    assert rule.longest == pytest.approx((1 - c.a) / c.multiplier)
    assert rule.shortest == 1e-4


def _left(step_size, updates, x):
    return (1 - step_size * bowl(torch.ones_like(x))) ** updates


# -- Langevin -----------------------------------------------------------------------------------


def test_cold_langevin_is_gradient_descent():
    start = noise(2, 5)
    cold = descend(bowl, start, rule=Langevin(step_size=0.05, temperature=0.0), updates=9).latents
    plain = descend(bowl, start, rule=GradientDescent(step_size=0.05), updates=9).latents
    assert torch.equal(cold, plain)


def test_langevin_reaches_the_boltzmann_distribution_of_a_spring():
    # x <- (1 - eta k) x + sqrt(2 eta T) xi has variance 2 eta T / (1 - (1 - eta k)^2) at rest.
    eta, stiffness, temperature = 0.1, 2.0, 0.7
    rule = Langevin(step_size=eta, temperature=temperature)
    found = descend(
        lambda x: stiffness * x, torch.zeros(4000, 5).double(), rule=rule, updates=60
    ).latents
    expected = 2 * eta * temperature / (1 - (1 - eta * stiffness) ** 2)
    count = found.numel()
    assert float(found.var()) == pytest.approx(expected, rel=4 * math.sqrt(2 / count))
    assert abs(float(found.mean())) < 4 * math.sqrt(expected / count)


def test_langevin_noise_is_a_function_of_sample_and_update():
    rule = Langevin(step_size=0.5, temperature=1.0)
    start = torch.zeros(2, 3).double()
    numbers = torch.tensor([7, 2**42])
    found = descend(lambda x: 0 * x, start, rule=rule, updates=2, numbers=numbers).latents
    xi = [normal(0, Stream.LANGEVIN, numbers * 2**20 + k, (3,), torch.float64) for k in (0, 1)]
    expected = xi[0] + xi[1]
    assert close(found, expected)


def test_langevin_noise_never_comes_back_on_a_long_way():
    rule, places = Langevin(step_size=0.5, temperature=1.0), []
    start = torch.zeros(1, 3).double()
    descend(lambda x: 0 * x, start, rule=rule, updates=600, on_update=lambda k, x: places.append(x))
    steps = torch.cat(places).diff(dim=0)
    assert len(steps.unique(dim=0)) == 600
    apart = torch.cdist(steps, steps) + 10 * torch.eye(600)
    assert float(apart.min()) > 1e-6


# -- the ODE ------------------------------------------------------------------------------------


def flow(x, gamma):
    """A velocity whose ODE is solved by x(gamma) = x(0) + 2 gamma^2 + gamma (sign: gradient)."""
    return -(4 * gamma + 1).view(-1, 1).expand_as(x)


def test_heun_is_exact_where_the_slope_is_linear_and_euler_is_not():
    start = noise(3, 4)
    heun = descend(flow, start, rule=Heun(step_size=0.1), updates=10)
    euler = descend(flow, start, rule=Euler(step_size=0.1), updates=10)
    assert torch.allclose(heun.latents, start + 3, rtol=0, atol=1e-12)
    assert torch.allclose(euler.latents, start + 1 + 4 * 0.45, rtol=0, atol=1e-12)
    assert heun.evaluations.tolist() == [20] * 3
    assert euler.evaluations.tolist() == [10] * 3


@pytest.mark.parametrize(("kind", "order"), [(Euler, 1), (Heun, 2)])
def test_integrators_have_their_order(kind, order):
    # dx/dgamma = x: x(1) = e x(0).
    start = torch.ones(1, 1).double()

    def error(updates):
        rule = kind(step_size=1 / updates)
        found = descend(lambda x, gamma: -x, start, rule=rule, updates=updates).latents
        return abs(float(found) - math.e)

    rate = math.log2(error(40) / error(80))
    assert rate == pytest.approx(order, abs=0.1)


def test_euler_on_a_landscape_is_gradient_descent():
    start = noise(2, 4)
    euler = descend(bowl, start, rule=Euler(step_size=0.03), updates=11).latents
    assert torch.equal(
        euler, descend(bowl, start, rule=GradientDescent(step_size=0.03), updates=11).latents
    )


def test_gamma_goes_from_zero_to_one_and_not_past_it():
    seen = []

    def gradient(x, gamma):
        seen.append(gamma.tolist())
        return 0 * x

    descend(gradient, noise(2, 3), rule=Heun(step_size=0.4), updates=3)
    assert [g for g, _ in seen] == pytest.approx([0, 0.4, 0.4, 0.8, 0.8, 1])


# -- memory -------------------------------------------------------------------------------------


def test_memory_is_refilled_slot_by_slot():
    memory = {"moved": torch.zeros(3, 2), "optimisers": ["a", "b", "c"]}
    fresh = {"moved": torch.ones(2, 2), "optimisers": ["x", "y"]}
    found = refilled(memory, torch.tensor([2, 0]), fresh)
    assert found["optimisers"] == ["y", "b", "x"]
    assert found["moved"][:, 0].tolist() == [1, 0, 1]
    assert float(memory["moved"].sum()) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeavyBall(step_size=0.1, momentum=1.0), "momentum is 1"),
        (lambda: BarzilaiBorwein(step_size=0.0), "step_size is 0"),
        (lambda: BarzilaiBorwein(step_size=0.1, shortest=0.2, longest=0.1), "shortest is 0.2"),
        (lambda: Langevin(step_size=0.1, temperature=-1.0), "temperature is -1"),
        (lambda: Euler(step_size=-0.1), "step_size is -0.1"),
        (lambda: Heun(step_size=math.nan), "step_size is nan"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_optimiser_is_a_class_and_its_settings():
    made = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=r"kind is a Adam: give a class of torch\.optim"):
        Optimiser(made)
