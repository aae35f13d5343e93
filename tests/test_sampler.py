"""Descent: the official trajectories, counted evaluations, stops, and samples that blow up."""

import math

import pytest
import torch
from reference import formulas, official
from torch.utils._python_dispatch import TorchDispatchMode

from eqm.config import ObjectiveConfig
from eqm.errors import ConfigError, DataError
from eqm.field import Field, guided
from eqm.objective import decay
from eqm.randomness import Stream, normal
from eqm.rules import (
    NAG,
    BarzilaiBorwein,
    GradientDescent,
    HeavyBall,
    Langevin,
    Move,
    Optimiser,
)
from eqm.sampler import (
    EXPLODED,
    GradientNormBelow,
    Known,
    Problem,
    descend,
    descend_in_slots,
    start_noise,
)

GD = GradientDescent(step_size=0.003)
NAG_OF_PAPER = NAG(step_size=0.003, momentum=0.3)
RULES = [GradientDescent(step_size=0.05), NAG(step_size=0.05, momentum=0.3)]


def noise(batch, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)


# -- equal to the official code -----------------------------------------------------------------

OFFICIAL = {
    "sample_gd": (GD, 1.0, None),
    "sample_nag": (NAG_OF_PAPER, 1.0, None),
    "sample_nag_cfg": (NAG_OF_PAPER, 1.5, 3),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_samples_are_the_official_ones_after_249_updates(name):
    numbers, (rule, scale, channels) = official.outputs(), OFFICIAL[name]
    field = Field(official.network())
    gradient = guided(field, numbers["y"], scale=scale, channels=channels)
    found = descend(gradient, numbers["start"], rule=rule, updates=249)
    assert official.error(found.latents, numbers[name]) < 1e-11
    assert found.evaluations.tolist() == [249] * 6
    assert not bool(found.diverged.any())


@pytest.mark.parametrize(
    ("name", "rule", "sign", "updates"),
    [
        ("sample_gd", GD, 1, 250),
        ("sample_gd", GD, -1, 249),
        ("sample_gd", NAG_OF_PAPER, 1, 249),
        ("sample_nag", GD, 1, 249),
        ("sample_nag", NAG(step_size=0.003, momentum=0.35), 1, 249),
        ("sample_nag_cfg", NAG_OF_PAPER, 1, 249),
    ],
)
def test_parity_notices_other_rules_signs_and_counts(name, rule, sign, updates):
    numbers, field = official.outputs(), Field(official.network())
    found = descend(
        lambda x: sign * field.gradient(x, numbers["y"]),
        numbers["start"],
        rule=rule,
        updates=updates,
    )
    assert official.error(found.latents, numbers[name]) > 1e-6


# -- rules --------------------------------------------------------------------------------------


def bowl(x):
    """Gradient of a quadratic with stiffnesses from 1 to 4."""
    return x * torch.linspace(1, 4, x[0].numel(), dtype=x.dtype).view_as(x[0])


def test_rules_are_those_that_keep_their_history():
    start = noise(3, 2, 4)
    for updates in (0, 1, 2, 17):
        found = descend(bowl, start, rule=RULES[0], updates=updates).latents
        expected = formulas.gradient_descent(bowl, start, 0.05, updates)
        assert torch.allclose(found, expected, rtol=1e-13, atol=0)
        found = descend(bowl, start, rule=RULES[1], updates=updates).latents
        assert torch.allclose(
            found, formulas.nag(bowl, start, 0.05, 0.3, updates), rtol=1e-13, atol=0
        )


def test_nag_without_momentum_is_gradient_descent_and_is_not_torchs_nesterov():
    start = noise(2, 5)
    plain = descend(bowl, start, rule=RULES[0], updates=20).latents
    still = NAG(step_size=0.05, momentum=0.0)
    assert torch.equal(descend(bowl, start, rule=still, updates=20).latents, plain)
    weight = start.clone()
    optimiser = torch.optim.SGD([weight], lr=0.05, momentum=0.3, nesterov=True)
    for _ in range(20):
        weight.grad = bowl(weight)
        optimiser.step()
    ours = descend(bowl, start, rule=RULES[1], updates=20).latents
    assert official.error(ours, weight) > 0.05


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientDescent(step_size=0.0), "step_size is 0"),
        (lambda: GradientDescent(step_size=math.nan), "step_size is nan"),
        (lambda: NAG(step_size=-1.0, momentum=0.3), "step_size is -1"),
        (lambda: NAG(step_size=0.1, momentum=1.0), "momentum is 1"),
        (lambda: NAG(step_size=0.1, momentum=-0.1), "momentum is -0.1"),
        (lambda: GradientNormBelow(0.0), "threshold is 0"),
        (lambda: descend(bowl, noise(1, 2), rule=GD, updates=-1), "updates is -1"),
        (lambda: descend(bowl, noise(1), rule=GD, updates=1)[0], "shape"),
        (lambda: descend(bowl, torch.ones(1, 2).long(), rule=GD, updates=1), "int64"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- the perfect field --------------------------------------------------------------------------

C = decay(ObjectiveConfig())


@pytest.mark.parametrize("rule", [GD, NAG_OF_PAPER])
def test_samples_of_a_perfect_field_are_data(rule):
    data = noise(3, 1, 4, 4, seed=1)
    gradient = Field(formulas.PerfectField(data, C, points=400)).gradient

    def distances(gradient):
        found = descend(gradient, noise(8, 1, 4, 4), rule=rule, updates=400)
        return torch.cdist(found.latents.flatten(1), data.flatten(1)).min(dim=1).values

    assert float(distances(gradient).max()) < 1e-3
    assert float(distances(lambda x: -gradient(x)).min()) > 1


@pytest.mark.parametrize(("updates", "left"), [(50, 0.40), (100, 0.0254), (150, 0.00115)])
def test_noise_left_under_a_perfect_field_is_what_the_step_size_gives(updates, left):
    datum, start = noise(1, 1, 16, 16, seed=1), noise(4, 1, 16, 16)
    gradient = Field(formulas.PerfectField(datum, C)).gradient
    found = descend(gradient, start, rule=GD, updates=updates).latents
    share = (found - datum).flatten(1).norm(dim=1) / (start - datum).flatten(1).norm(dim=1)
    assert torch.allclose(share, torch.tensor(left).double(), rtol=0.15)


@pytest.mark.parametrize(("step_size", "stable"), [(0.09, True), (0.11, False)])
def test_descent_is_stable_below_two_over_the_stiffness(step_size, stable):
    data = noise(2, 1, 4, 4, seed=1)
    gradient = Field(formulas.PerfectField(data, C)).gradient
    rule = GradientDescent(step_size=step_size)
    found = descend(gradient, data + 1e-4 * noise(2, 1, 4, 4), rule=rule, updates=30)
    near = float((found.latents - data).norm()) < 1e-4
    assert near == stable


# -- counting and stopping ----------------------------------------------------------------------


class Counting:
    def __init__(self, gradient):
        self.gradient, self.calls = gradient, 0

    def __call__(self, x):
        self.calls += 1
        return self.gradient(x)


def test_an_update_is_one_evaluation():
    counting = Counting(bowl)
    found = descend(counting, noise(3, 4), rule=RULES[1], updates=12)
    assert counting.calls == 12
    assert found.evaluations.tolist() == [12] * 3
    assert found.evaluations.dtype == torch.int64


def test_no_updates_are_a_copy_of_the_start():
    start = noise(2, 3)
    found = descend(bowl, start, rule=GD, updates=0)
    assert torch.equal(found.latents, start)
    assert found.latents.data_ptr() != start.data_ptr()
    assert found.evaluations.tolist() == [0, 0]
    assert bool(found.gradient_norms.isnan().all())


def test_samples_stop_where_the_norm_falls_below_the_threshold():
    start = torch.tensor([[8.0, 0.0], [0.5, 0.0], [0.0, 100.0], [0.0, 1.0]], dtype=torch.float64)
    rule, counting = GradientDescent(step_size=0.1), Counting(lambda x: x)
    found = descend(counting, start, rule=rule, updates=40, stop=GradientNormBelow(1.0))
    # |x_k| = 0.9**k |x_0|; the evaluation at x_k is number k + 1. A norm of 1 is not below 1.
    k = [math.ceil(math.log(1 / 8) / math.log(0.9)), 0, 40, 1]
    assert found.evaluations.tolist() == [k[0] + 1, 1, 40, 2]
    expected = torch.stack([x * 0.9**n for x, n in zip(start, k, strict=True)])
    assert torch.allclose(found.latents, expected, rtol=1e-12, atol=0)
    norms = expected.norm(dim=1)
    # The sample that never stopped was evaluated last before its last move.
    assert torch.allclose(found.gradient_norms[[0, 1, 3]], norms[[0, 1, 3]], rtol=1e-12, atol=0)
    assert float(found.gradient_norms[2]) == pytest.approx(float(norms[2]) / 0.9)
    assert counting.calls == 40


def test_the_loop_ends_when_all_have_stopped():
    counting, seen = Counting(lambda x: x), []
    found = descend(
        counting,
        torch.tensor([[2.0], [4.0]]),
        rule=GradientDescent(step_size=0.5),
        updates=1000,
        stop=GradientNormBelow(1.5),
        on_update=lambda k, x: seen.append((k, x.flatten().tolist())),
    )
    assert counting.calls == 3
    assert found.evaluations.tolist() == [2, 3]
    assert seen == [(0, [2.0, 4.0]), (1, [1.0, 2.0]), (2, [1.0, 1.0])]


def test_norms_of_nag_are_those_of_the_gradient_ahead():
    rule = NAG(step_size=0.1, momentum=0.5)
    found = descend(lambda x: x, torch.tensor([[1.0]]), rule=rule, updates=2)
    # x_1 = 0.9, moved by -0.1; the second gradient is taken at 0.9 - 0.05.
    assert float(found.gradient_norms) == pytest.approx(0.85)
    assert float(found.latents) == pytest.approx(0.9 - 0.085)


def test_on_update_sees_the_start_and_every_update():
    seen = {}
    start = noise(2, 3)
    descend(bowl, start, rule=RULES[0], updates=4, on_update=seen.__setitem__)
    assert sorted(seen) == [0, 1, 2, 3, 4]
    for k, latents in seen.items():
        expected = formulas.gradient_descent(bowl, start, 0.05, k)
        assert torch.allclose(latents, expected, rtol=1e-13, atol=0)


# -- samples that blow up, and their neighbours -------------------------------------------------


def wild(x):
    """A bowl for samples that begin with a positive number, an explosion for the others."""
    return torch.where(x[:, :1] > 0, x, -50 * x)


@pytest.mark.parametrize("rule", RULES)
def test_exploding_samples_are_marked_and_finite(rule):
    start = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [3.0, -1.0]])
    found = descend(wild, start, rule=rule, updates=200)
    assert found.diverged.tolist() == [False, True, False]
    assert bool(found.latents.isfinite().all())
    assert int(found.evaluations[1]) < 30
    assert found.evaluations[[0, 2]].tolist() == [200, 200]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_no_numbers_mark_their_sample_alone(bad):
    def broken(x):
        return torch.where(x[:, :1] < 0, torch.full_like(x, bad), x)

    start = torch.tensor([[1.0, 2.0], [-1.0, 2.0]])
    found = descend(broken, start, rule=RULES[0], updates=10)
    assert found.diverged.tolist() == [False, True]
    assert torch.equal(found.latents[1], start[1])
    assert found.evaluations.tolist() == [10, 1]
    assert not math.isfinite(float(found.gradient_norms[1]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_start_that_is_no_number_is_marked(bad):
    start = torch.tensor([[1.0, 2.0], [bad, 2.0]])
    for updates in (0, 5):
        found = descend(lambda x: x, start, rule=RULES[0], updates=updates)
        assert found.diverged.tolist() == [False, True]
        assert found.evaluations.tolist() == [updates, 0]
        assert math.isnan(float(found.gradient_norms[1]))


def test_large_data_are_not_called_diverged():
    start = 1e6 * noise(2, 3)
    assert not bool(descend(bowl, start, rule=RULES[0], updates=50).diverged.any())


def test_a_start_too_large_for_a_limit_still_diverges_when_it_overflows():
    start = torch.tensor([[1e37]])
    found = descend(lambda x: -x, start, rule=GradientDescent(step_size=2.0), updates=9)
    assert found.diverged.tolist() == [True]
    assert bool(found.latents.isfinite().all())


def test_a_stopped_sample_that_would_blow_up_is_sound():
    found = descend(
        lambda x: torch.full_like(x, 0.1),
        torch.ones(1, 2),
        rule=GradientDescent(step_size=1e9),
        updates=5,
        stop=GradientNormBelow(1.0),
    )
    assert found.diverged.tolist() == [False]
    assert torch.equal(found.latents, torch.ones(1, 2))


@pytest.mark.parametrize("stop", [None, GradientNormBelow(0.5)])
@pytest.mark.parametrize("rule", RULES)
def test_a_sample_does_not_depend_on_its_neighbours(rule, stop):
    start = 3 * noise(9, 2, 2)
    start[3] = math.nan
    start[4, 0] *= 100

    def gradient(x):
        return wild(x.flatten(1)).view_as(x)

    together = descend(gradient, start, rule=rule, updates=40, stop=stop)
    assert len(set(together.diverged.tolist())) == 2
    for i in range(9):
        alone = descend(gradient, start[i : i + 1], rule=rule, updates=40, stop=stop)
        for name in ("latents", "evaluations", "gradient_norms", "diverged"):
            a, b = getattr(alone, name)[0], getattr(together, name)[i]
            assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)), (i, name)


def test_steps_that_are_too_long_are_marked_although_nothing_flies_away():
    # Like a network, this spring says nothing larger than some bound: x swings, and stays finite.
    def gradient(x):
        return 30 * x.clamp(-1e3, 1e3)

    start = 0.1 * noise(2, 16)
    wild_rule, calm = GradientDescent(step_size=0.2), GradientDescent(step_size=0.05)
    assert descend(gradient, start, rule=wild_rule, updates=60).diverged.tolist() == [True] * 2
    assert descend(gradient, start, rule=calm, updates=60).diverged.tolist() == [False] * 2


def test_data_in_raw_units_are_not_called_diverged():
    # From unit noise down to pixels of 0 to 255, more than EXPLODED times as large.
    data = 255 * torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    gradient = Field(formulas.PerfectField(data, C, points=200)).gradient
    assert float(data.flatten(1).norm(dim=1).min()) > EXPLODED * 2 * 4
    rule = GradientDescent(step_size=0.01)
    found = descend(gradient, noise(4, 1, 4, 4), rule=rule, updates=300)
    assert found.diverged.tolist() == [False] * 4
    assert float(torch.cdist(found.latents.flatten(1), data.flatten(1)).min(dim=1).values.max()) < 1


def test_an_optimiser_that_swings_closely_around_what_it_found_is_sound():
    # RMSprop's moves do not shrink with the gradient: at rest they are lr, to and fro.
    data = noise(3, 1, 4, 4, seed=1)
    gradient = Field(formulas.PerfectField(data, C, points=200)).gradient
    rule = Optimiser(torch.optim.RMSprop, lr=0.1)
    found = descend(gradient, data + 0.01 * noise(3, 1, 4, 4), rule=rule, updates=150)
    assert found.diverged.tolist() == [False] * 3
    assert found.updates.tolist() == [150] * 3
    assert float((found.latents - data).square().mean()) < 0.1**2


@pytest.mark.parametrize("temperature", [1.0, 1e4])
@pytest.mark.parametrize("turning", [0.1, 0.5, 1.5])
def test_hot_langevin_at_rest_is_sound(temperature, turning):
    # turning is step size x stiffness: above 1 every gradient turns, and below 2 that is stable.
    stiffness, rule = turning / 0.003, Langevin(step_size=0.003, temperature=temperature)
    for entries in (2, 64):
        found = descend(lambda x: stiffness * x, 0.1 * noise(10, entries), rule=rule, updates=150)
        assert found.diverged.tolist() == [False] * 10


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1e-2])
def test_langevin_whose_steps_are_too_long_is_marked(temperature):
    rule = Langevin(step_size=0.2, temperature=temperature)
    found = descend(lambda x: 30 * x.clamp(-1, 1), noise(4, 64), rule=rule, updates=60)
    assert found.diverged.tolist() == [True] * 4
    rule = Langevin(step_size=1.0, temperature=temperature)
    found = descend(lambda x: -x, noise(4, 64), rule=rule, updates=60)
    assert found.diverged.tolist() == [True] * 4


def test_a_sample_that_swings_while_it_settles_is_sound():
    # 1.8 of 2: every gradient turns, and each is shorter than the one before.
    rule = GradientDescent(step_size=1.8)
    found = descend(lambda x: x, 5 * noise(2, 4), rule=rule, updates=200)
    assert found.diverged.tolist() == [False, False]
    assert float(found.latents.abs().max()) < 1e-6


class Scripted:
    """A rule whose moves and gradients are written down: along the first of four entries."""

    evaluations = 1

    def __init__(self, places, gradients, noise=0.0):
        self.steps, self.noise = iter(zip(places, gradients, strict=True)), noise

    def begin(self, x, numbers):
        return {}

    def move(self, gradient, x, memory):
        place, g = (torch.tensor([[value, 0, 0, 0.0]]) for value in next(self.steps))
        return Move(place, g, memory, self.noise)


def swinging(count, *, reach=0.6, first=3.0, shrink=1.0):
    """So many gradients after the first, each against the one before; moves of such a length."""
    gradients = [first * (-shrink) ** k for k in range(count + 1)]
    return {"places": [reach * (k % 2) for k in range(1, count + 2)], "gradients": gradients}


@pytest.mark.parametrize(
    ("script", "marked"),
    [
        # Unit noise of four entries has norm 2. Places: 50 x 2 + 10 x the first gradient.
        ({"places": [1.0, 129], "gradients": [3.0, 3]}, False),
        ({"places": [1.0, 131], "gradients": [3.0, 3]}, True),
        ({"places": [129.0], "gradients": [3.0]}, False),
        # The noise of a rule counts as unit noise does, times itself.
        ({"places": [1.0, 179], "gradients": [3.0, 3], "noise": 0.5}, False),
        ({"places": [1.0, 181], "gradients": [3.0, 3], "noise": 0.5}, True),
        # Gradients: 10 x (the first + 2).
        ({"places": [1.0, 1], "gradients": [3.0, 49]}, False),
        ({"places": [1.0, 1], "gradients": [3.0, 51]}, True),
        ({"places": [1.0, 1], "gradients": [3.0, 59], "noise": 0.5}, False),
        ({"places": [1.0, 1], "gradients": [3.0, 61], "noise": 0.5}, True),
        # Ten swings in a row, of moves beyond a quarter of unit noise.
        (swinging(9), False),
        (swinging(10), True),
        (swinging(20, reach=0.45), False),
        (swinging(10, reach=0.55), True),
        # Not those that shorten by a hundredth each.
        (swinging(20, first=10.0, shrink=0.988), False),
        (swinging(10, first=10.0, shrink=0.992), True),
        # Nor those below half of the first gradient plus unit noise.
        (swinging(20, first=1.95), False),
        (swinging(10, first=2.05), True),
    ],
)
def test_bounds_of_what_is_marked(script, marked):
    count = len(script["places"])
    found = descend(bowl, torch.zeros(1, 4), rule=Scripted(**script), updates=count)
    assert found.diverged.tolist() == [marked]
    assert found.updates.tolist() == [count - marked]


def test_noise_of_langevin_is_what_its_gradients_may_be_by_it_alone():
    rule, start = Langevin(step_size=0.5, temperature=2.0), noise(1, 4)
    move = rule.move(bowl, start, rule.begin(start, torch.tensor([0])))
    assert move.noise == pytest.approx(3 * (2.0 / 0.5) ** 0.5)


# -- stop rules of the user's -------------------------------------------------------------------


def test_any_function_of_a_look_is_a_stop_rule():
    looks = []

    def stop(look):
        looks.append((look.updates.tolist(), look.gradient_norms.tolist()))
        return look.x[:, 0] < 0.5

    start = torch.tensor([[1.0], [0.2], [4.0]])
    found = descend(lambda x: x, start, rule=GradientDescent(step_size=0.5), updates=9, stop=stop)
    assert found.latents.flatten().tolist() == pytest.approx([0.25, 0.2, 0.25])
    assert found.updates.tolist() == [2, 0, 4]
    assert found.evaluations.tolist() == [3, 1, 5]
    assert found.stopped.tolist() == [True] * 3
    assert looks[1] == ([1, 0, 1], [0.5, pytest.approx(0.2), 2.0])


def test_samples_that_used_all_their_updates_were_not_stopped():
    found = descend(bowl, noise(2, 3), rule=RULES[0], updates=5, stop=GradientNormBelow(1e-9))
    assert found.stopped.tolist() == [False, False]
    assert found.updates.tolist() == [5, 5]


def test_looking_less_often_changes_no_sample():
    start, stop = 3 * noise(6, 4), GradientNormBelow(0.5)
    often, rarely = (
        descend(bowl, start, rule=RULES[1], updates=80, stop=stop, check_every=k) for k in (1, 7)
    )
    for name in ("latents", "evaluations", "updates", "gradient_norms", "path_lengths"):
        assert torch.equal(getattr(often, name), getattr(rarely, name)), name


# -- length, work, trace ------------------------------------------------------------------------


def test_length_and_work_are_those_of_the_path():
    start, places = noise(3, 2, 2), []
    found = descend(bowl, start, rule=RULES[0], updates=30, on_update=lambda k, x: places.append(x))
    steps = torch.stack(places).diff(dim=0)
    lengths = steps.flatten(2).norm(dim=2)
    works = (torch.stack([bowl(x) for x in places[:-1]]) * steps).flatten(2).sum(dim=2)
    assert torch.allclose(found.path_lengths, lengths.sum(dim=0), rtol=1e-12)
    assert torch.allclose(found.energy_changes, works.sum(dim=0), rtol=1e-12)


def test_work_tends_to_the_change_of_energy():
    def energy(x):
        return (bowl(x) * x).flatten(1).sum(dim=1) / 2

    start, errors = noise(3, 4), []
    for updates in (100, 200):
        rule = GradientDescent(step_size=1 / updates)
        found = descend(bowl, start, rule=rule, updates=updates)
        errors.append(found.energy_changes - (energy(found.latents) - energy(start)))
    assert torch.allclose(errors[0] / errors[1], torch.full((3,), 2.0).double(), rtol=0.05)


def test_a_trace_has_the_points_asked_for():
    start = noise(3, 4)
    found = descend(
        bowl,
        start,
        rule=RULES[0],
        updates=10,
        trace_every=4,
        energy=lambda x: x.square().sum(dim=1),
    )
    trace = found.trace
    assert trace.updates.tolist() == [0, 4, 8]
    part = descend(bowl, start, rule=RULES[0], updates=8)
    assert torch.equal(trace.path_lengths[2], part.path_lengths)
    assert torch.equal(trace.energy_changes[2], part.energy_changes)
    assert torch.equal(trace.energies[0], start.square().sum(dim=1))
    assert torch.equal(trace.energies[2], part.latents.square().sum(dim=1))
    assert bool(trace.gradient_norms[0].isnan().all())
    assert descend(bowl, start, rule=RULES[0], updates=3).trace is None


def test_least_gradient_of_a_smooth_energy_obeys_statement_3():
    """min ||g||^2 <= 2 (E_0 - E_inf) / (eta K) for eta <= 1 / L."""
    start = 3 * noise(8, 6)
    energy = (bowl(start) * start).sum(dim=1) / 2
    for updates in (1, 5, 50):
        norms = []
        descend(
            bowl,
            start,
            rule=GradientDescent(step_size=0.25),
            updates=updates,
            on_update=lambda k, x, norms=norms: norms.append(bowl(x).norm(dim=1)),
        )
        least = torch.stack(norms[:-1]).min(dim=0).values.square()
        assert bool((least <= 2 * energy / (0.25 * updates)).all())


# -- constraints --------------------------------------------------------------------------------


def test_what_is_known_stays_and_the_rest_descends():
    mask = torch.tensor([[True, False, False, True]])
    values = torch.tensor([[5.0, 0.0, 0.0, -5.0]]).double()
    start = noise(3, 4)
    found = descend(bowl, start, rule=RULES[1], updates=200, project=Known(mask, values)).latents
    assert found[:, [0, 3]].tolist() == [[5.0, -5.0]] * 3
    assert float(found[:, 1:3].abs().max()) < 1e-4


COUPLED = torch.tensor(
    [[3.0, 0.5, 1.0, 0.0], [0.5, 2.0, 0.3, -1.0], [1.0, 0.3, 4.0, 0.2], [0.0, -1.0, 0.2, 1.5]]
).double()
"""Stiffness of a spring whose entries pull at each other."""

HOLDING = [
    *RULES,
    HeavyBall(step_size=0.05, momentum=0.5),
    BarzilaiBorwein(step_size=0.05),
    Optimiser(torch.optim.Adam, lr=0.1),
    Optimiser(torch.optim.LBFGS, lr=0.5),
]


@pytest.mark.parametrize("rule", HOLDING, ids=lambda rule: type(rule).__name__)
def test_a_descent_with_known_entries_is_that_of_the_others_alone(rule):
    mask, values = torch.tensor([True, False, True, False]), torch.tensor([2.0, 0, -3, 0]).double()
    start = noise(3, 4)
    settings = {"rule": rule, "updates": 40, "stop": GradientNormBelow(0.02)}
    whole = descend(lambda x: x @ COUPLED, start, project=Known(mask, values), **settings)

    def gradient(free):
        x = values.expand(len(free), 4).masked_scatter(~mask, free)
        return (x @ COUPLED)[:, ~mask]

    part = descend(gradient, start[:, ~mask], **settings)
    assert torch.allclose(whole.latents[:, ~mask], part.latents, rtol=1e-10)
    assert torch.equal(whole.latents[:, mask], values[mask].expand(3, 2))
    for name in ("evaluations", "stopped", "diverged"):
        assert torch.equal(getattr(whole, name), getattr(part, name)), name
    for name in ("gradient_norms", "path_lengths", "energy_changes"):
        assert torch.allclose(getattr(whole, name), getattr(part, name), rtol=1e-9), name


def within(x):
    """The nearest point of the unit ball."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1)


@pytest.mark.parametrize("rule", [RULES[1], HeavyBall(step_size=0.05, momentum=0.8)])
def test_momentum_is_that_of_the_projected_path(rule):
    """Written out: x_k and x_{k-1} are where samples really were, within the constraint."""

    def gradient(x):
        return (x - 3) @ COUPLED

    start, mu = 4 * noise(3, 4), rule.momentum
    x = [within(start)] * 2
    for _ in range(25):
        push = mu * (x[-1] - x[-2])
        ahead, kept = (push, 0) if isinstance(rule, NAG) else (0, push)
        x.append(within(x[-1] + kept - 0.05 * gradient(x[-1] + ahead)))
    found = descend(gradient, start, rule=rule, updates=25, project=within)
    assert torch.allclose(found.latents, x[-1], rtol=1e-12)
    held = Problem(
        start=lambda at: start[at], gradient=lambda at: gradient, project=lambda at: within
    )
    slots = descend_in_slots(held, 3, slots=2, rule=rule, updates=25)
    assert torch.allclose(slots.latents, x[-1], rtol=1e-12)


def test_an_optimiser_goes_on_from_where_a_constraint_put_the_sample():
    start, rule = 2 * noise(2, 4), Optimiser(torch.optim.Adam, lr=0.1)
    found = descend(lambda x: (x - 3) @ COUPLED, start, rule=rule, updates=25, project=within)
    for row, one in zip(found.latents, within(start), strict=True):
        weight = one.clone()
        optimiser = torch.optim.Adam([weight], lr=0.1)
        for _ in range(25):
            weight.grad = (weight - 3) @ COUPLED
            optimiser.step()
            weight.copy_(within(weight))
        assert torch.allclose(row, weight, rtol=1e-12)


def restless(x):
    """A bowl, but for an entry whose gradient is long and turns at every look."""
    restless.sign = -restless.sign
    return torch.cat((torch.full_like(x[:, :1], 100 * restless.sign), x[:, 1:]), dim=1)


restless.sign = 1


@pytest.mark.parametrize("slots", [None, 2])
def test_what_is_held_neither_stops_nor_marks_a_sample(slots):
    mask = torch.tensor([[True, False, False]]).expand(3, 3)
    looks, start = [], noise(3, 3)

    def stop(look):
        looks.append(look.gradient[:, 0].abs().max())
        return look.gradient_norms < 0.1

    settings = {"rule": GradientDescent(step_size=0.1), "updates": 90, "stop": stop}
    known = Known(mask, torch.full((3, 3), 1e6).double())
    if slots is None:
        found = descend(restless, start, project=known, **settings)
    else:
        asked = Problem(
            start=lambda at: start[at], gradient=lambda at: restless, project=lambda at: known[at]
        )
        found = descend_in_slots(asked, 3, slots=slots, **settings)
    assert found.stopped.tolist() == [True] * 3
    assert found.diverged.tolist() == [False] * 3
    assert float(torch.stack(looks).max()) == 0
    # The same function without its word for what it holds: norms are of all entries.
    found = descend(restless, start, project=lambda x: known(x), **settings)
    assert found.stopped.tolist() == [False] * 3
    assert bool((found.gradient_norms >= 100).all())


def test_free_entries_that_blow_up_are_marked_however_large_and_many_the_held_ones_are():
    mask, values = torch.ones(1, 400, dtype=torch.bool), torch.full((1, 400), 1e6).double()
    mask[:, 0] = False
    start = noise(2, 400)
    rule = GradientDescent(step_size=0.5)
    found = descend(lambda x: -x, start, rule=rule, updates=20, project=Known(mask, values))
    assert found.diverged.tolist() == [True, True]
    # A gradient that never grows: only where it is tells that a sample has flown away.
    settings = {"rule": GradientDescent(step_size=10.0), "updates": 60}
    found = descend(lambda x: -x.sign(), start, project=Known(mask, values), **settings)
    assert found.diverged.tolist() == [True, True]
    # 400 entries of unit noise make bounds that one entry would not reach by swinging.
    spring = lambda x: 30 * x.clamp(-0.2, 0.2)  # noqa: E731
    settings = {"rule": GradientDescent(step_size=0.2), "updates": 60}
    found = descend(spring, start, project=Known(mask, values), **settings)
    assert found.diverged.tolist() == [True, True]


@pytest.mark.parametrize(
    ("mask", "values", "message"),
    [
        (torch.ones(3, 4), noise(3, 4), "mask of Known is torch.float32.*bool"),
        ([[True]], noise(3, 4), "mask of Known is list"),
        (torch.ones(3, 4).bool(), torch.ones(3, 4).long(), "values of Known are torch.int64"),
        (torch.ones(3, 4).bool(), noise(3, 4).float(), "values of Known are torch.float32.*64"),
        (torch.ones(2, 4).bool(), noise(3, 4), r"mask of Known has shape \(2, 4\): give \(3, 4\)"),
        (torch.ones(3, 4).bool(), noise(3, 5), r"values of Known has shape \(3, 5\)"),
        (torch.ones(1, 3, 4).bool(), noise(3, 4), r"mask of Known has shape \(1, 3, 4\)"),
    ],
)
def test_known_entries_that_do_not_fit_are_refused(mask, values, message):
    with pytest.raises(DataError, match=message):
        descend(bowl, noise(3, 4), rule=GD, updates=1, project=Known(mask, values))


class Says:
    def __init__(self, free, there=lambda x: x):
        self.free, self.there = free, there

    def __call__(self, x):
        return self.there(x)


@pytest.mark.parametrize(
    ("project", "message"),
    [
        (Says(torch.ones(3, 4)), r"project.free says is torch.float32 of shape \(3, 4\)"),
        (Says(torch.ones(4, 3).bool()), r"shape \(4, 3\): give bool that broadcasts to \(3, 4\)"),
        (Says("all"), "project.free says is 'all'"),
        (lambda x: x[:1], r"project maps .*\(3, 4\) to .*\(1, 4\)"),
        (lambda x: x.float(), "project maps torch.float64 .* to torch.float32"),
    ],
)
def test_projections_that_do_not_fit_are_refused(project, message):
    with pytest.raises(ConfigError, match=message):
        descend(bowl, noise(3, 4), rule=GD, updates=1, project=project)


def test_the_start_is_projected_too():
    box = lambda x: x.clamp(-0.1, 0.1)  # noqa: E731
    found = descend(bowl, noise(3, 4), rule=RULES[0], updates=0, project=box).latents
    assert float(found.abs().max()) <= 0.1


# -- slots --------------------------------------------------------------------------------------

STATIONS = noise(23, 6, seed=5) * torch.linspace(0.5, 6, 23).double().view(-1, 1)
"""Starts from near to far: samples that take very different numbers of updates."""


def problem(order=None, seen=None):
    """23 samples in an order of choice; each has a stiffness of its own, as a label would be."""
    order = torch.arange(23) if order is None else order

    def gradient(at):
        stiffness = 1 + (order[at] % 3).double().view(-1, 1)
        if seen is not None:
            seen.append(len(at))
        return lambda x, gamma=None: stiffness * bowl(x)

    return Problem(
        start=lambda at: STATIONS[order[at]],
        gradient=gradient,
        numbers=lambda at: order[at],
    )


SLOT_RULES = [
    *RULES,
    HeavyBall(step_size=0.02, momentum=0.5),
    BarzilaiBorwein(step_size=0.01, longest=0.1),
    Langevin(step_size=0.02, temperature=1e-4),
    Optimiser(torch.optim.Adam, lr=0.1),
]
FOUND = ("latents", "evaluations", "updates", "gradient_norms", "path_lengths", "energy_changes")


@pytest.mark.parametrize("rule", SLOT_RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("slots", [1, 4, 23, 40])
def test_slots_find_what_descending_together_finds(rule, slots):
    stop = GradientNormBelow(0.3)
    together = descend(
        problem().gradient(torch.arange(23)), STATIONS, rule=rule, updates=60, stop=stop
    )
    found = descend_in_slots(problem(), 23, slots=slots, rule=rule, updates=60, stop=stop)
    assert len(set(found.evaluations.tolist())) > 3
    assert found.stopped.tolist() == together.stopped.tolist()
    for name in ("evaluations", "updates", "diverged"):
        assert torch.equal(getattr(found, name), getattr(together, name)), name
    for name in FOUND:
        a, b = getattr(found, name), getattr(together, name)
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("check_every", [1, 5])
@pytest.mark.parametrize("rule", SLOT_RULES, ids=lambda rule: type(rule).__name__)
def test_a_sample_in_a_slot_does_not_depend_on_order_or_neighbours(rule, check_every):
    stop = GradientNormBelow(0.3)
    settings = {"slots": 5, "rule": rule, "updates": 60, "stop": stop, "check_every": check_every}
    plain = descend_in_slots(problem(), 23, **settings)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(2))
    mixed = descend_in_slots(problem(order), 23, **settings)
    few = descend_in_slots(problem(order), 7, **settings)
    for name in FOUND:
        assert torch.equal(getattr(mixed, name), getattr(plain, name)[order]), name
        assert torch.equal(getattr(few, name), getattr(plain, name)[order[:7]]), name


def test_slots_keep_the_shape_of_the_batch_and_save_calls():
    shapes, calls = [], [0]

    def gradient(at):
        def g(x, gamma=None):
            calls[0] += 1
            shapes.append(tuple(x.shape))
            return bowl(x)

        return g

    told = []
    found = descend_in_slots(
        Problem(start=lambda at: STATIONS[at], gradient=gradient),
        23,
        slots=4,
        rule=RULES[0],
        updates=500,
        stop=GradientNormBelow(0.3),
        on_finished=told.append,
    )
    assert set(shapes) == {(4, 6)}
    assert told[-1] == 23
    assert told == sorted(told)
    ideal = int(found.evaluations.sum()) / 4
    assert ideal <= calls[0] <= ideal + int(found.evaluations.max())


def test_a_constraint_belongs_to_its_sample():
    values = torch.arange(23.0).double().view(-1, 1).expand(23, 6)
    mask = torch.zeros(23, 6, dtype=torch.bool)
    mask[:, 2] = True
    plain = problem()
    found = descend_in_slots(
        Problem(
            start=plain.start,
            gradient=plain.gradient,
            project=lambda at: Known(mask[at], values[at]),
        ),
        23,
        slots=4,
        rule=RULES[0],
        updates=30,
        stop=lambda look: look.updates >= 3 + (look.x[:, 2].long() % 5),
    )
    assert torch.equal(found.latents[:, 2], torch.arange(23.0).double())
    assert found.updates.tolist() == [3 + n % 5 for n in range(23)]


def test_samples_that_blow_up_leave_their_slot():
    found = descend_in_slots(
        Problem(
            start=lambda at: torch.where(at.view(-1, 1) % 3 == 0, -1.0, 1.0).expand(-1, 2),
            gradient=lambda at: lambda x, gamma=None: wild(x),
        ),
        9,
        slots=2,
        rule=RULES[0],
        updates=50,
    )
    assert found.diverged.tolist() == [n % 3 == 0 for n in range(9)]


@pytest.mark.parametrize(
    ("count", "settings", "message"),
    [
        (0, {"slots": 1}, "count is 0"),
        (1, {"slots": 0}, "slots is 0"),
        (1, {"slots": 1, "check_every": 0}, "interval is 0"),
        (1, {"slots": 1, "updates": -1}, "updates is -1"),
    ],
)
def test_slots_that_cannot_be_are_refused(count, settings, message):
    with pytest.raises(ValueError, match=message):
        descend_in_slots(problem(), count, **{"rule": RULES[0], "updates": 1, **settings})


# -- devices, modes, types ----------------------------------------------------------------------


def test_without_a_stop_rule_nothing_waits_for_the_device():
    # A meta tensor has no values: reading one is an error.
    start = torch.empty(4, 3, device="meta")
    found = descend(lambda x: 2 * x, start, rule=RULES[1], updates=5)
    assert found.latents.shape == (4, 3)
    with pytest.raises(RuntimeError, match="meta tensors"):
        descend(lambda x: 2 * x, start, rule=GD, updates=5, stop=GradientNormBelow(1.0))


class Waits(TorchDispatchMode):
    """Counts how often a value is read off the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("check_every", "waits"), [(1, 69), (7, 9), (100, 0)])
@pytest.mark.parametrize("rule", [RULES[1], BarzilaiBorwein(step_size=0.01)])
def test_the_device_is_waited_for_by_the_stop_test_alone(rule, check_every, waits):
    start, stop = noise(4, 3), GradientNormBelow(1e-300)
    with Waits() as seen:
        descend(bowl, start, rule=rule, updates=70, stop=stop, check_every=check_every)
    assert seen.count == waits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_latents_keep_their_dtype_and_norms_do_not_overflow(dtype):
    start = torch.full((1, 256, 256), 300.0, dtype=dtype)
    found = descend(lambda x: x, start, rule=RULES[1], updates=2)
    assert found.latents.dtype == dtype
    assert not bool(found.diverged.any())
    assert bool(found.gradient_norms.isfinite().all())


def test_the_start_is_left_alone_and_no_graph_is_kept():
    start = noise(2, 3).requires_grad_(True)
    kept = start.detach().clone()
    found = descend(bowl, start, rule=RULES[1], updates=3)
    assert not found.latents.requires_grad
    assert torch.equal(start, kept)
    assert start.grad is None
    with torch.inference_mode():
        again = descend(bowl, kept, rule=RULES[1], updates=3).latents
    assert torch.equal(again, found.latents)


@pytest.mark.parametrize("energy", ["dot", "l2"])
def test_explicit_energies_are_descended_by_their_true_gradient(energy):
    numbers = official.outputs()
    field = Field(official.network(), energy=energy)
    gradient = guided(field, numbers["y"], scale=1.0)
    rule = GradientDescent(step_size=0.003)
    found = descend(gradient, numbers["start"], rule=rule, updates=20).latents
    expected = numbers["start"]
    for _ in range(20):
        at = expected.clone().requires_grad_(True)
        field.energy(at, numbers["y"]).sum().backward()
        expected = expected - 0.003 * at.grad
    assert official.error(found, expected) < 1e-12
    energies = [field.energy(x, numbers["y"]) for x in (numbers["start"], found)]
    assert bool((energies[1] < energies[0]).all())


# -- where samples start ------------------------------------------------------------------------


def test_start_noise_is_a_function_of_the_number_of_the_sample():
    settings = {"dtype": torch.float32, "device": torch.device("cpu")}
    together = start_noise(torch.tensor([5, 0, 2**40]), (4, 8, 8), **settings)
    alone = start_noise(torch.tensor([2**40]), (4, 8, 8), **settings)
    assert together.shape == (3, 4, 8, 8)
    assert torch.equal(alone[0], together[2])
    expected = normal(0, Stream.SAMPLE_NOISE, torch.tensor([5]), (4, 8, 8))
    assert torch.equal(together[0], expected[0])
    assert not torch.equal(together[0], together[1])
