"""The field: one sign, true gradients in every grad mode, guidance as released and as meant."""

from collections import Counter

import pytest
import torch
from reference import official
from reference.formulas import PerfectField
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from eqm.config import NetworkConfig, ObjectiveConfig
from eqm.errors import ConfigError
from eqm.field import Field, compiled_part, composed, guided, guided_energy
from eqm.network import Transformer
from eqm.objective import decay, eqm_loss

EXPLICIT = ("dot", "l2")


@pytest.fixture(scope="module")
def numbers():
    return official.outputs()


@pytest.fixture(scope="module")
def net():
    return official.network()


def grad_modes():
    return {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
    }


# -- equal to the official code -----------------------------------------------------------------


@pytest.mark.parametrize("mode", grad_modes())
@pytest.mark.parametrize(
    ("energy", "name"), [("implicit", "field"), ("dot", "dot_field"), ("l2", "l2_field")]
)
def test_gradient_is_the_official_field_with_the_sign_turned(net, numbers, energy, name, mode):
    with grad_modes()[mode]():
        gradient = Field(net, energy=energy).gradient(numbers["x"], numbers["y"])
    assert official.error(-gradient, numbers[name]) < 1e-12
    assert official.error(gradient, numbers[name]) > 1


@pytest.mark.parametrize("energy", EXPLICIT)
def test_energy_is_the_official_one(net, numbers, energy):
    found = Field(net, energy=energy).energy(numbers["x"], numbers["y"])
    assert found.shape == (6,)
    assert official.error(found, numbers[f"{energy}_energy"]) < 1e-12
    with torch.inference_mode():
        again = Field(net, energy=energy).energy(numbers["x"], numbers["y"])
    assert official.error(again, numbers[f"{energy}_energy"]) < 1e-12


@pytest.mark.parametrize("energy", EXPLICIT)
def test_raw_output_is_not_the_gradient(net, numbers, energy):
    # What the released sampler uses for explicit energies: it must not pass for the gradient.
    raw = Field(net).gradient(numbers["x"], numbers["y"])
    assert official.error(-raw, numbers[f"{energy}_field"]) > 0.1


def test_sign_of_dot_follows_the_weights_and_that_of_l2_does_not(numbers):
    x, y = numbers["x"], numbers["y"]
    unflipped = official.network(flip=False)
    dot, l2 = (Field(unflipped, energy=kind).energy(x, y) for kind in EXPLICIT)
    assert official.error(-dot, numbers["dot_energy"]) < 1e-12
    assert official.error(l2, numbers["l2_energy"]) < 1e-12


# -- guidance -----------------------------------------------------------------------------------


def test_guidance_on_three_channels_is_the_released_one(net, numbers):
    def error(**settings):
        gradient = guided(Field(net), numbers["y"], **settings)
        return official.error(-gradient(numbers["x"]), numbers["field_cfg"])

    assert error(scale=1.5, channels=3) < 1e-12
    for wrong in (
        {"scale": 1.5},
        {"scale": 1.5, "channels": 4},
        {"scale": 1.5, "channels": 2},
        {"scale": 1.4, "channels": 3},
        {"scale": -0.5, "channels": 3},
        {"scale": 1.0},
    ):
        assert error(**wrong) > 1e-3, wrong


@pytest.mark.parametrize("energy", ["implicit", *EXPLICIT])
def test_guidance_of_all_channels_is_the_line_through_both_gradients(net, numbers, energy):
    field, x, y = Field(net, energy=energy), numbers["x"], numbers["y"]
    c, u = field.gradient(x, y), field.gradient(x)
    assert official.error(guided(field, y, scale=1.7)(x), u + 1.7 * (c - u)) < 1e-12
    assert official.error(guided(field, y, scale=0.0)(x), u) < 1e-12


class Recorder(nn.Module):
    """Remembers what it was asked."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.calls, self.conditioned = classes, [], False

    def forward(self, x, labels):
        self.calls.append((x.shape, None if labels is None else labels.tolist()))
        return 2 * x


def test_guidance_is_one_call_and_scale_one_needs_the_labels_alone():
    recorder = Recorder(classes=7)
    field, x, labels = Field(recorder), torch.ones(2, 1, 2, 2), torch.tensor([3, 7])
    guided(field, labels, scale=1.5)(x)
    guided(field, labels, scale=1.0)(x)
    guided(field, None, scale=1.0)(x)
    assert recorder.calls == [
        ((4, 1, 2, 2), [3, 7, 7, 7]),
        ((2, 1, 2, 2), [3, 7]),
        ((2, 1, 2, 2), None),
    ]


def test_guidance_tells_each_sample_its_own_noise_level():
    class Timed(nn.Module):
        classes, conditioned = 5, True

        def forward(self, x, labels, gamma):
            return x * gamma.view(-1, 1, 1, 1) + labels.view(-1, 1, 1, 1)

    x, gamma = torch.ones(3, 1, 2, 2).double(), torch.tensor([0.1, 0.5, 0.9]).double()
    labels = torch.tensor([0, 1, 2])
    for scale in (1.0, 1.5):
        found = guided(Field(Timed()), labels, scale=scale)(x, gamma)[:, 0, 0, 0]
        assert torch.allclose(found, gamma + 5 + scale * (labels - 5.0), rtol=1e-12)


@pytest.mark.parametrize(
    ("classes", "labels", "settings", "message"),
    [
        (7, [8], {"scale": 1.0}, "label 8 is out of range"),
        (7, [-1], {"scale": 1.5}, "label -1 is out of range"),
        (7, None, {"scale": 1.5}, "needs labels"),
        (None, [0], {"scale": 1.5}, "needs labels"),
        (7, [0], {"scale": 1.5, "channels": 0}, "channels is 0"),
        (7, [0], {"scale": float("nan")}, "guidance is nan"),
        (7, [0], {"scale": float("inf")}, "guidance is inf"),
        (7, [0], {"scale": -float("inf")}, "guidance is -inf"),
    ],
)
def test_guidance_that_cannot_be_is_refused(classes, labels, settings, message):
    given = None if labels is None else torch.tensor(labels)
    with pytest.raises(ValueError, match=message):
        guided(Field(Recorder(classes)), given, **settings)


def test_composition_adds_gradients(net, numbers):
    field, x = Field(net), numbers["x"]
    first = guided(field, numbers["y"], scale=1.0)
    second = guided(field, (numbers["y"] + 1) % 10, scale=1.5)
    assert torch.allclose(composed([first, second])(x), first(x) + second(x), rtol=1e-13, atol=0)
    weighted = composed([first, second], weights=[0.5, 2])(x)
    assert torch.allclose(weighted, 0.5 * first(x) + 2 * second(x), rtol=1e-13, atol=0)
    for parts, weights in (([], None), ([first], [1.0, 2.0])):
        with pytest.raises(ValueError, match="gradients: give one each"):
            composed(parts, weights=weights)
    with pytest.raises(ConfigError, match="weight is nan"):
        composed([first, second], weights=[1.0, float("nan")])


@pytest.mark.parametrize("energy", EXPLICIT)
def test_the_guided_energy_is_that_of_the_guided_gradient(net, numbers, energy):
    field, y = Field(net, energy=energy), numbers["y"]
    x, step = numbers["x"], 1e-5
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
    for scale in (1.0, 1.7, 0.0):
        found = guided_energy(field, y, scale=scale)
        slope = (found(x + step * direction) - found(x - step * direction)) / (2 * step)
        along = (guided(field, y, scale=scale)(x) * direction).flatten(1).sum(dim=1)
        assert official.error(slope, along) < 1e-7, scale
    c, u = field.energy(x, y), field.energy(x)
    assert official.error(guided_energy(field, y, scale=1.7)(x), u + 1.7 * (c - u)) < 1e-12


def test_what_has_no_guided_energy_gives_none(net, numbers):
    y = numbers["y"]
    assert guided_energy(Field(net), y, scale=1.5) is None
    assert guided_energy(Field(net, energy="dot"), y, scale=1.5, channels=3) is None
    with pytest.raises(ValueError, match="needs labels"):
        guided_energy(Field(net, energy="dot"), None, scale=1.5)


# -- true gradients -----------------------------------------------------------------------------


def differences(field, x, labels, directions, step=1e-5):
    """Central differences of the energy along unit directions, (B, number of directions)."""
    ends = [field.energy(x + h * d, labels) for d in directions for h in (step, -step)]
    return torch.stack([(a - b) / (2 * step) for a, b in zip(ends[::2], ends[1::2], strict=True)])


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
@pytest.mark.parametrize("energy", EXPLICIT)
def test_gradient_is_that_of_the_energy_by_finite_differences(net, numbers, energy, mode):
    field, labels = Field(net, energy=energy), numbers["y"]
    generator = torch.Generator().manual_seed(0)
    with grad_modes()[mode]():
        x = numbers["x"] + 0
        directions = torch.randn(5, *x.shape, generator=generator, dtype=x.dtype)
        expected = differences(field, x, labels, directions)
        along = torch.stack([(field.gradient(x, labels) * d).sum((1, 2, 3)) for d in directions])
        raw = torch.stack([(net(x, labels) * d).sum((1, 2, 3)) for d in directions])
    assert official.error(along, expected) < 1e-7
    assert official.error(-along, expected) > 1
    assert official.error(raw, expected) > 0.1


@pytest.mark.parametrize("energy", ["implicit", *EXPLICIT])
@pytest.mark.parametrize("mode", grad_modes())
def test_nothing_of_the_callers_is_touched(numbers, energy, mode):
    trained = official.network().requires_grad_(True)
    with grad_modes()[mode]():
        x, labels = numbers["x"].clone(), numbers["y"].clone()
        gradient = Field(trained, energy=energy).gradient(x, labels)
        assert not gradient.requires_grad
        assert not x.requires_grad
        assert torch.equal(x, numbers["x"])
        assert torch.equal(labels, numbers["y"])
    assert x.grad is None
    assert all(weight.grad is None for weight in trained.parameters())


@pytest.mark.parametrize("energy", ["implicit", *EXPLICIT])
def test_a_leaf_that_requires_grad_gets_none(net, numbers, energy):
    x = numbers["x"].clone().requires_grad_(True)
    assert not Field(net, energy=energy).gradient(x, numbers["y"]).requires_grad
    assert x.grad is None
    assert x.requires_grad


@pytest.mark.parametrize("energy", ["implicit", *EXPLICIT])
def test_a_graph_reaches_x_where_x_requires_a_gradient(net, numbers, energy):
    x = numbers["x"][:1].clone().requires_grad_(True)
    labels = numbers["y"][:1]
    field, step = Field(net, energy=energy), 1e-5
    gradient = field.gradient(x, labels, create_graph=True)
    (slope,) = torch.autograd.grad(gradient.square().sum(), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    ends = [field.gradient(x.detach() + h * direction, labels) for h in (step, -step)]
    expected = (ends[0].square().sum() - ends[1].square().sum()) / (2 * step)
    assert float((slope * direction).sum()) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
@pytest.mark.parametrize("energy", ["implicit", *EXPLICIT])
def test_a_graph_that_cannot_be_is_refused(net, numbers, energy, mode):
    with grad_modes()[mode](), pytest.raises(ValueError, match="leave them"):
        Field(net, energy=energy).gradient(numbers["x"], create_graph=True)


def compiled_networks():
    """Each way to compile a network or a part of it; nothing is run, so no compiler is needed."""
    whole, itself, part, wrapped, forward = (
        small_network(zero_head=False, depth=2) for _ in range(5)
    )
    itself.compile()
    part.blocks[0].compile()
    wrapped.blocks[1] = torch.compile(wrapped.blocks[1])
    forward.forward = torch.compile(forward.forward)
    return {
        "the network": [torch.compile(whole), itself, forward],
        "part blocks.0 of the network": [part],
        "part blocks.1 of the network": [wrapped],
    }


@pytest.mark.parametrize("energy", EXPLICIT)
def test_a_graph_of_compiled_code_is_refused_however_it_was_compiled(energy):
    x = torch.zeros(1, 2, 4, 4).double()
    for name, networks in compiled_networks().items():
        for network in networks:
            with pytest.raises(ConfigError, match=f"^{name} is compiled, and"):
                Field(network, energy=energy).gradient(x, create_graph=True)
    assert compiled_part(small_network(zero_head=False)) is None
    assert compiled_part(lambda x, labels: x) is None


@pytest.mark.parametrize("energy", ["implicit", *EXPLICIT])
def test_weights_made_under_inference_mode_work_or_are_refused_in_words(energy):
    with torch.inference_mode():
        made = small_network(zero_head=False)
        x = torch.ones(2, 2, 4, 4).double()
    field = Field(made.requires_grad_(False), energy=energy)
    for mode in grad_modes().values():
        with mode():
            if energy == "implicit":
                assert bool(field.gradient(x).isfinite().all())
                continue
            with pytest.raises(ConfigError, match=r"weight .* was made under torch.inference_mode"):
                field.gradient(x)
            with torch.no_grad():
                assert bool(field.energy(x).isfinite().all())


def test_other_errors_of_a_network_are_its_own():
    class Broken(Recorder):
        def forward(self, x, labels):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Field(Broken(classes=None), energy="dot").gradient(torch.zeros(1, 1, 2, 2))


def test_implicit_has_no_energy_and_unknown_kinds_are_refused(net, numbers):
    with pytest.raises(ValueError, match="this field is implicit"):
        Field(net).energy(numbers["x"])
    with pytest.raises(ValueError, match="energy is 'mean'"):
        Field(net, energy="mean")


def test_kinds_differ(net, numbers):
    found = [Field(net, energy=e).gradient(numbers["x"]) for e in ("implicit", *EXPLICIT)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert official.error(found[i], found[j]) > 0.1


# -- training through the gradient --------------------------------------------------------------

C = decay(ObjectiveConfig())


def small_network(*, zero_head, dtype=torch.float64, depth=1):
    config = NetworkConfig(width=16, depth=depth, heads=2, patch=2)
    net = Transformer(config, size=4, channels=2, classes=3)
    net.initialise(3, zero_head=zero_head)
    if not zero_head:
        # Modulations as well, or blocks would add nothing.
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for block in net.blocks:
                bias = block.modulation.bias
                bias.copy_(torch.randn(len(bias), generator=generator) / 2)
    return net.to(dtype)


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 5, 2, 4, 4, generator=generator, dtype=dtype)
    return x, eps, torch.linspace(0, 1, 5, dtype=dtype), torch.tensor([0, 1, 2, 3, 0])


@pytest.mark.parametrize("energy", ["implicit", *EXPLICIT])
def test_weights_are_told_the_slope_of_the_loss(energy):
    net = small_network(zero_head=False)
    field, step = Field(net, energy=energy), 1e-6

    def loss(create_graph):
        return eqm_loss(field, *batch(), c=C, create_graph=create_graph).sum()

    loss(create_graph=True).backward()
    for name in ("patches.weight", "blocks.0.attention.qkv.weight", "head.linear.weight"):
        weight = net.get_parameter(name)
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).double()
        ends = []
        for h in (step, -2 * step):
            weight.data += h * direction
            ends.append(float(loss(create_graph=False)))
        weight.data += step * direction
        expected = (ends[0] - ends[1]) / (2 * step)
        assert float((weight.grad * direction).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(("energy", "learns"), [("implicit", True), ("dot", True), ("l2", False)])
def test_only_l2_has_no_slope_at_the_zero_head(energy, learns):
    net = small_network(zero_head=True)
    eqm_loss(Field(net, energy=energy), *batch(), c=C, create_graph=True).sum().backward()
    assert any(bool(w.grad.any()) for w in net.parameters() if w.grad is not None) == learns
    drawn = small_network(zero_head=False)
    eqm_loss(Field(drawn, energy=energy), *batch(), c=C, create_graph=True).sum().backward()
    assert bool(drawn.head.linear.weight.grad.any())


# -- the one sign -------------------------------------------------------------------------------


def steps_toward_the_datum(gradient, datum, eps):
    """Share of the noises from which one small step of a sampler comes closer to the datum."""
    after = eps - 1e-3 * gradient(eps)
    nearer = (after - datum).flatten(1).norm(dim=1) < (eps - datum).flatten(1).norm(dim=1)
    return float(nearer.double().mean())


def test_perfect_training_points_from_the_datum_to_noise():
    generator = torch.Generator().manual_seed(4)
    datum = torch.randn(1, 1, 4, 4, generator=generator, dtype=torch.float64)
    eps = torch.randn(20, 1, 4, 4, generator=generator, dtype=torch.float64)
    field = Field(PerfectField(datum, C))
    assert steps_toward_the_datum(field.gradient, datum, eps) == 1
    assert steps_toward_the_datum(lambda x: -field.gradient(x), datum, eps) == 0


@pytest.mark.parametrize("energy", ["implicit", *EXPLICIT])
def test_a_trained_field_points_from_the_datum_to_noise(energy):
    net = small_network(zero_head=energy != "l2", dtype=torch.float32)
    field = Field(net, energy=energy)
    generator = torch.Generator().manual_seed(5)
    datum = torch.randn(1, 2, 4, 4, generator=generator)
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(150):
        eps = torch.randn(64, 2, 4, 4, generator=generator)
        gamma = torch.rand(64, generator=generator)
        x, labels = datum.expand_as(eps), torch.zeros(64, dtype=torch.int64)
        eqm_loss(field, x, eps, gamma, labels, c=C, create_graph=True).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    eps, labels = torch.randn(100, 2, 4, 4, generator=generator), torch.zeros(100).long()
    assert steps_toward_the_datum(lambda x: field.gradient(x, labels), datum, eps) > 0.95
    if energy != "implicit":
        rises = field.energy(eps, labels) > field.energy(datum.expand_as(eps), labels)
        assert float(rises.double().mean()) > 0.95


@pytest.mark.parametrize("energy", ["implicit", "dot"])
def test_attention_of_a_training_is_flash(energy):
    """Chosen by torch on a CPU as on a GPU, unless a graph through the gradient is asked for."""
    net = Transformer(NetworkConfig(width=32, depth=1, heads=2), size=8, channels=1, classes=None)
    net.initialise(0, zero_head=False)
    seen = Counter()

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen[function.overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    x = torch.randn(2, 1, 8, 8)
    with Watching():
        if energy == "implicit":
            Field(net).gradient(x, create_graph=True).square().sum().backward()
        else:
            Field(net, energy=energy).gradient(x)
    assert seen["_scaled_dot_product_flash_attention_for_cpu"] == 1
    assert seen["_scaled_dot_product_flash_attention_for_cpu_backward"] == 1
    assert not seen["_scaled_dot_product_attention_math"]
