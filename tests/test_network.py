"""The transformer: equal to the official one, a function of its seed, sound at every size."""

import math

import pytest
import torch
from reference import formulas, official

from eqm.config import NetworkConfig, replace
from eqm.network import Transformer, check_labels, position_embedding

TINY = NetworkConfig(width=16, depth=2, heads=2, patch=2)


def tiny(config=TINY, *, size=8, channels=3, classes=5, seed=1, **flags):
    config = replace(config, **flags)
    net = Transformer(config, size=size, channels=channels, classes=classes)
    net.initialise(seed, zero_head=False)
    # Modulations begin at zero, where blocks do nothing: stir them, or nothing would be tested.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in net.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return net


def latents(batch, *shape, dtype=torch.float32):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


# -- equal to the official code -----------------------------------------------------------------


@pytest.mark.parametrize(("name", "labelled"), [("field", True), ("field_null", False)])
def test_output_is_the_official_one_with_the_sign_turned(name, labelled):
    numbers = official.outputs()
    labels = numbers["y"] if labelled else None
    f = official.network()(numbers["x"], labels)
    assert official.error(-f, numbers[name]) < 1e-12
    assert official.error(f, numbers[name]) > 1


def test_the_null_label_is_the_row_after_the_classes():
    net, x = official.network(), official.outputs()["x"]
    assert torch.equal(net(x, None), net(x, torch.full((len(x),), 10)))


WRONG = {
    "positions transposed": lambda w: {"positions": _swap_halves(w["positions"])},
    "time left out": lambda w: {"time.2.weight": 0 * w["time.2.weight"]},
    "chunks in another order": lambda w: {
        "blocks.0.modulation.weight": w["blocks.0.modulation.weight"].roll(64, dims=0)
    },
    "queries and keys exchanged": lambda w: {
        "blocks.1.attention.qkv.weight": w["blocks.1.attention.qkv.weight"].roll(64, dims=0)
    },
    "channels of the head in another order": lambda w: {
        "head.linear.weight": w["head.linear.weight"].roll(1, dims=0)
    },
}


def _swap_halves(positions):
    return torch.cat(tuple(reversed(positions.chunk(2, dim=2))), dim=2)


@pytest.mark.parametrize("name", WRONG)
def test_parity_notices(name):
    numbers, right = official.outputs(), official.weights()
    net = official.empty_network()
    net.load_state_dict({**right, **WRONG[name](right)})
    f = net.double()(numbers["x"], numbers["y"])
    assert official.error(-f, numbers["field"]) > 1e-3


def test_positions_are_the_official_ones_and_the_formula():
    assert torch.equal(position_embedding(4, 4, 64), official.weights()["positions"])
    expected = formulas.position_embedding(5, 24)
    assert torch.allclose(position_embedding(5, 5, 24).double(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("size", "patch", "parameters"),
    [("S", 2, 32_963_360), ("S", 8, 33_148_160), ("B", 4, 130_475_648), ("XL", 2, 675_129_632)],
)
def test_official_sizes_have_the_official_number_of_weights(size, patch, parameters):
    config = replace(NetworkConfig.size(size, patch=patch), time="constant", second_head=True)
    with torch.device("meta"):
        net = Transformer(config, size=32, channels=4, classes=1000)
    state = net.state_dict()
    assert sum(weight.numel() for weight in state.values()) == parameters
    assert len(state) == 12 + 10 * config.depth


# -- initial weights ----------------------------------------------------------------------------


def test_f_is_zero_at_first():
    net = Transformer(TINY, size=8, channels=3, classes=5)
    assert torch.equal(net(latents(2, 3, 8, 8), torch.tensor([0, 5])), torch.zeros(2, 3, 8, 8))


def test_initial_weights_are_a_function_of_the_seed_alone():
    before = torch.get_rng_state()
    first, second = (Transformer(TINY, size=8, channels=3, classes=5) for _ in range(2))
    second.initialise(9)
    assert not torch.equal(first.blocks[0].mlp.up.weight, second.blocks[0].mlp.up.weight)
    torch.rand(3)
    first.initialise(9)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    torch.set_rng_state(before)
    Transformer(TINY, size=8, channels=3, classes=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_weights_have_the_shapes_of_the_papers_code():
    config = NetworkConfig(width=96, depth=1, heads=2, patch=2, time="constant")
    net = Transformer(config, size=8, channels=3, classes=50)
    for name, weight in net.requires_grad_(False).named_parameters():
        if name.endswith("bias") or "modulation" in name or name == "head.linear.weight":
            assert not bool(weight.any()), name
        elif name.startswith(("labels", "time")):
            assert abs(float(weight.std()) / 0.02 - 1) < 0.05, name
        else:
            bound = math.sqrt(6 / (weight.shape[0] + weight[0].numel()))
            assert 0.95 * bound < float(weight.abs().max()) <= bound, name
            assert abs(float(weight.std()) * math.sqrt(3) / bound - 1) < 0.05, name
    net.initialise(0, zero_head=False)
    assert bool(net.head.linear.weight.any())


# -- behaviour ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("patch", "size"), [(1, 5), (2, 6), (3, 9), (4, 8), (7, 7)])
@pytest.mark.parametrize("settings", [{}, {"time": "constant", "second_head": True}])
def test_output_has_the_shape_of_the_input(patch, size, settings):
    config = NetworkConfig(width=8, depth=1, heads=2, patch=patch)
    net = tiny(config, size=size, channels=2, **settings)
    assert net(latents(3, 2, size, size), torch.tensor([0, 4, 5])).shape == (3, 2, size, size)
    outputs = net.head.linear.out_features
    assert outputs == patch**2 * 2 * (2 if settings else 1)


def test_every_weight_is_used_and_the_second_head_is_not():
    for settings in ({}, {"time": "constant"}):
        net = tiny(**settings)
        net(latents(4, 3, 8, 8), torch.tensor([0, 1, 2, 5])).square().sum().backward()
        for name, weight in net.named_parameters():
            assert bool(weight.grad.any()), name
    net = tiny(second_head=True)
    net(latents(2, 3, 8, 8)).sum().backward()
    used = net.head.linear.bias.grad.view(4, 6).any(dim=0)
    assert used.tolist() == [True] * 3 + [False] * 3


def test_a_sample_does_not_see_its_neighbours():
    net, x = tiny().double(), latents(5, 3, 8, 8, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 5])
    together = net(x, labels)
    for i in range(5):
        alone = net(x[i : i + 1], labels[i : i + 1])
        assert torch.allclose(alone[0], together[i], rtol=0, atol=1e-13)


def test_labels_matter_and_positions_matter():
    net, x = tiny(), latents(1, 3, 8, 8)
    assert not torch.allclose(net(x, torch.tensor([0])), net(x, torch.tensor([1])))
    shifted = net(x.roll(2, dims=3)).roll(-2, dims=3)
    assert not torch.allclose(shifted, net(x), atol=1e-3)


def test_without_labels_there_is_one_vector():
    net = tiny(classes=None)
    assert net.labels.weight.shape == (1, 16)
    assert net(latents(2, 3, 8, 8)).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="without labels"):
        net(latents(2, 3, 8, 8), torch.tensor([0, 0]))


def test_arguments_are_left_alone():
    net, x, labels = tiny(), latents(2, 3, 8, 8), torch.tensor([0, 1])
    net(x, labels)
    assert torch.equal(x, latents(2, 3, 8, 8))
    assert labels.tolist() == [0, 1]
    assert not x.requires_grad


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 7}, "7 x 7 cannot be cut into patches of 2"),
        ({"size": 0}, r"shape \(3, 0, 0\)"),
        ({"channels": 0}, r"shape \(0, 8, 8\)"),
        ({"classes": 0}, "classes is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Transformer(TINY, **{"size": 8, "channels": 3, "classes": 5, **settings})


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 3, 8, 6), (2, 3, 4, 4), (3, 8, 8)])
def test_latents_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"this network takes \(B, \*\(3, 8, 8\)\)"):
        tiny()(torch.zeros(shape))


def test_one_label_each():
    with pytest.raises(ValueError, match="for 2 latents"):
        tiny()(latents(2, 3, 8, 8), torch.tensor([1]))


def test_labels_out_of_range_are_named():
    check_labels(torch.tensor([0, 4, 5]), classes=5)
    for wrong in (-1, 6):
        with pytest.raises(ValueError, match=f"label {wrong} is out of range"):
            check_labels(torch.tensor([0, wrong]), classes=5)
    with pytest.raises(ValueError, match="float32"):
        check_labels(torch.zeros(2), classes=5)
