"""The transformer: equal to the official one, a function of its seed, sound at every size."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import formulas, official

from eqm.config import SIZES, NetworkConfig, replace
from eqm.network import (
    MLP,
    GatedMLP,
    Transformer,
    check_labels,
    layer_norm,
    position_embedding,
    rms_norm,
    rotary_angles,
    rotated,
    time_features,
)

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


def latents(batch, *shape, dtype=torch.float32, seed=0):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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


OFFICIAL = {
    ("S", 2): 32_963_360,
    ("S", 4): 32_945_024,
    ("S", 8): 33_148_160,
    ("B", 2): 130_512_416,
    ("B", 4): 130_475_648,
    ("B", 8): 130_881_536,
    ("L", 2): 458_102_816,
    ("L", 4): 458_053_760,
    ("L", 8): 458_594_816,
    ("XL", 2): 675_129_632,
    ("XL", 4): 675_074_432,
    ("XL", 8): 675_683_072,
}
"""Size, patch -> numbers in a state dict of the official code, with 1000 classes at 256 px."""


def weights_of(config):
    with torch.device("meta"):
        state = Transformer(config, size=32, channels=4, classes=1000).state_dict()
    return len(state), sum(weight.numel() for weight in state.values())


@pytest.mark.parametrize(("size", "patch"), OFFICIAL)
def test_official_sizes_have_the_official_number_of_weights(size, patch):
    config = replace(NetworkConfig.size(size, patch=patch), time="constant", second_head=True)
    assert weights_of(config) == (12 + 10 * config.depth, OFFICIAL[size, patch])


@pytest.mark.parametrize(("size", "patch"), OFFICIAL)
def test_without_what_eqm_does_not_use_there_are_fewer_weights(size, patch):
    width, depth, _ = SIZES[size]
    embedder = 256 * width + width + width * width + width
    unused_half = patch * patch * 4 * (width + 1)
    expected = OFFICIAL[size, patch] - embedder - unused_half
    assert weights_of(NetworkConfig.size(size, patch=patch)) == (8 + 10 * depth, expected)


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
    for flags in ({}, {"time": "constant"}):
        net = tiny(**flags)
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


# -- modern blocks ------------------------------------------------------------------------------

MODERN = ("qk_norm", "rope", "swiglu", "rms_norm")
BLOCKS = {name: {name: True} for name in MODERN} | {"all": dict.fromkeys(MODERN, True)}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("time", ["none", "conditioned"])
def test_modern_blocks_use_every_weight_and_keep_the_shape(name, time):
    net = tiny(size=(4, 8), time=time, **BLOCKS[name])
    gamma = torch.tensor([0.1, 0.4, 0.7, 1.0]) if net.conditioned else None
    f = net(latents(4, 3, 4, 8), torch.tensor([0, 1, 2, 5]), gamma)
    assert f.shape == (4, 3, 4, 8)
    f.square().sum().backward()
    for key, weight in net.named_parameters():
        assert bool(weight.grad.any()), key


@pytest.mark.parametrize("name", ["qk_norm", "rope", "rms_norm"])
def test_modern_blocks_are_another_function_of_the_same_weights(name):
    plain, modern, x = tiny(), tiny(**{name: True}), latents(2, 3, 8, 8)
    found = modern.load_state_dict(plain.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all(key.endswith(("q_scale", "k_scale")) for key in found.missing_keys)
    assert float((modern(x) - plain(x)).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("name", BLOCKS)
def test_f_is_zero_at_first_with_modern_blocks(name):
    net = Transformer(replace(TINY, **BLOCKS[name]), size=8, channels=3, classes=5)
    assert torch.equal(net(latents(2, 3, 8, 8)), torch.zeros(2, 3, 8, 8))
    net.initialise(0, zero_head=False)
    assert bool(net(latents(2, 3, 8, 8)).any())
    scales = {k: w for k, w in net.state_dict().items() if k.endswith("_scale")}
    assert len(scales) == (4 if name in ("qk_norm", "all") else 0)
    assert all(torch.equal(w, torch.ones(8)) for w in scales.values())


def test_queries_and_keys_are_normed_and_scaled():
    attention, tokens = tiny(qk_norm=True).blocks[0].attention.double(), latents(1, 16, 16)
    rows = attention.qkv(tokens.double())[0].detach()
    found = []
    for head in range(2):
        q, k, v = (
            [row[16 * part + 8 * head : 16 * part + 8 * head + 8].tolist() for row in rows]
            for part in range(3)
        )
        q = [formula_rms(row, attention.q_scale.tolist()) for row in q]
        k = [formula_rms(row, attention.k_scale.tolist()) for row in k]
        logits = torch.tensor([[sum(map(math.prod, zip(a, b, strict=True))) for b in k] for a in q])
        found.append((logits / math.sqrt(8)).double().softmax(dim=1) @ torch.tensor(v).double())
    expected = attention.out(torch.cat(found, dim=1))
    assert torch.allclose(attention(tokens.double())[0], expected, rtol=0, atol=1e-6)


def formula_rms(row, scale=None):
    """Zhang and Sennrich (2019), Eq. 4, on a list."""
    root = math.sqrt(sum(a * a for a in row) / len(row) + 1e-6)
    return [a / root * s for a, s in zip(row, scale or [1.0] * len(row), strict=True)]


def test_rms_norm_is_the_formula():
    rows = 3 * latents(4, 6, dtype=torch.float64)
    expected = torch.tensor([formula_rms(row) for row in rows.tolist()], dtype=torch.float64)
    assert torch.allclose(rms_norm(rows), expected, rtol=0, atol=1e-14)
    assert not torch.allclose(rms_norm(rows + 1), rms_norm(rows))
    assert torch.allclose(rms_norm(7 * rows), rms_norm(rows), atol=1e-5)


def test_norms_are_where_the_config_says():
    for flag in (False, True):
        net = tiny(rms_norm=flag)
        norms = {part.norm for part in (*net.blocks, net.head)}
        assert norms == {rms_norm if flag else layer_norm}


def test_swiglu_is_the_formula():
    net = tiny(swiglu=True)
    mlp, tokens = net.blocks[0].mlp.double(), latents(1, 2, 16, dtype=torch.float64)
    wide, narrow = mlp.up.weight.tolist(), mlp.down.weight.tolist()
    hidden = len(wide) // 2
    assert hidden == int(16 * 4 * 2 / 3)
    for row, found in zip(tokens[0].tolist(), mlp(tokens)[0], strict=True):
        up = affine(row, wide, mlp.up.bias.tolist())
        gated = [g / (1 + math.exp(-g)) * u for g, u in zip(up[:hidden], up[hidden:], strict=True)]
        expected = affine(gated, narrow, mlp.down.bias.tolist())
        assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def affine(row, matrix, bias):
    return [
        sum(w * a for w, a in zip(weights, row, strict=True)) + b
        for weights, b in zip(matrix, bias, strict=True)
    ]


@pytest.mark.parametrize("width", [384, 768, 1024, 1152])
def test_swiglu_has_as_many_weights(width):
    with torch.device("meta"):
        plain, gated = (
            sum(weight.numel() for weight in kind(NetworkConfig(width=width)).parameters())
            for kind in (MLP, GatedMLP)
        )
    assert abs(gated / plain - 1) < 0.01


ROWS, COLUMNS, HEAD = 5, 7, 8
places = st.tuples(st.integers(0, ROWS - 1), st.integers(0, COLUMNS - 1))


@given(q_at=places, k_at=places, seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_attention_with_rope_sees_relative_positions_alone(q_at, k_at, seed):
    angles = rotary_angles(ROWS, COLUMNS, HEAD)
    q, k = latents(2, HEAD, dtype=torch.float64, seed=seed)
    found = logit(q, k, angles, q_at, k_at)
    # Closed form (Su et al., Eq. 12): pairs are complex numbers that turn by the distance.
    down, across = q_at[0] - k_at[0], q_at[1] - k_at[1]
    turns, expected = (across, across / 100, down, down / 100), 0.0
    for i, turn in enumerate(turns):
        a, b = (complex(t[i], t[i + HEAD // 2]) for t in (q, k))
        expected += (a * b.conjugate() * cmath.exp(1j * turn)).real
    assert found == pytest.approx(expected, abs=1e-5)
    # The same distance elsewhere: both against the nearest edge.
    rows, columns = (min(a, b) for a, b in zip(q_at, k_at, strict=True))
    moved = [(row - rows, column - columns) for row, column in (q_at, k_at)]
    assert logit(q, k, angles, *moved) == pytest.approx(found, abs=1e-5)


def logit(q, k, angles, q_at, k_at):
    turned = []
    for vector, (row, column) in ((q, q_at), (k, k_at)):
        here = angles[row * COLUMNS + column][None]
        turned.append(rotated(vector.view(1, 1, 1, -1), here).flatten())
    return float(turned[0] @ turned[1])


def test_rope_keeps_lengths_and_leaves_the_first_place_alone():
    heads = latents(2, 3, ROWS * COLUMNS, HEAD, dtype=torch.float64)
    found = rotated(heads, rotary_angles(ROWS, COLUMNS, HEAD))
    assert torch.equal(found[:, :, 0], heads[:, :, 0])
    assert torch.allclose(found.norm(dim=3), heads.norm(dim=3), atol=1e-6)
    assert not torch.allclose(found[:, :, 1], heads[:, :, 1])
    assert not torch.allclose(found[:, :, COLUMNS], heads[:, :, COLUMNS])


def test_angles_of_rope_are_no_weights():
    assert tiny(rope=True).state_dict().keys() == tiny().state_dict().keys()
    net = tiny(rope=True)
    assert torch.equal(net.blocks[1].attention.turns, rotary_angles(4, 4, 8))


# -- sizes that are not square ------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 8), (8, 4), (2, 12)])
def test_output_has_the_shape_of_an_input_that_is_not_square(size):
    net = tiny(size=size)
    assert net.shape == (3, *size)
    assert net(latents(2, 3, *size)).shape == (2, 3, *size)
    with pytest.raises(ValueError, match="this network takes"):
        net(latents(2, 3, *reversed(size)))


@pytest.mark.parametrize(("rows", "columns"), [(2, 4), (4, 2), (1, 5), (5, 5)])
def test_positions_of_a_part_of_a_square_are_a_part_of_its_positions(rows, columns):
    whole = formulas.position_embedding(5, 24).view(5, 5, 24)
    found = position_embedding(rows, columns, 24).view(rows, columns, 24)
    assert torch.allclose(found.double(), whole[:rows, :columns], rtol=0, atol=1e-7)
    assert torch.equal(found[:, 0, :12], found[:1, 0, :12].expand(rows, -1))
    assert torch.equal(found[0, :, 12:], found[0, :1, 12:].expand(columns, -1))


@pytest.mark.parametrize("size", [(4, 8), (8, 4)])
def test_patches_go_back_where_they_came_from(size):
    net = Transformer(TINY, size=size, channels=3, classes=5)
    net.initialise(1, zero_head=False)  # blocks do nothing yet: each patch sees itself alone
    x = latents(1, 3, *size)
    for row in range(0, size[0], 2):
        for column in range(0, size[1], 2):
            other = x.clone()
            other[:, :, row : row + 2, column : column + 2] += 1
            changed = (net(other) != net(x))[0].any(dim=0).nonzero().tolist()
            assert changed == [[row + i, column + j] for i in (0, 1) for j in (0, 1)]


# -- time ---------------------------------------------------------------------------------------


def test_gamma_matters_where_it_is_known():
    net, x, labels = tiny(time="conditioned"), latents(2, 3, 8, 8), torch.tensor([0, 5])
    levels = [net(x, labels, torch.tensor([g, g])) for g in (0.0, 0.5, 1.0)]
    assert not torch.allclose(levels[0], levels[1], atol=1e-4)
    assert not torch.allclose(levels[1], levels[2], atol=1e-4)
    mixed = net(x, labels, torch.tensor([0.0, 1.0]))
    assert torch.allclose(mixed, torch.stack((levels[0][0], levels[2][1])), atol=1e-6)


def test_constant_time_is_gamma_zero():
    x, labels = latents(2, 3, 8, 8), torch.tensor([0, 5])
    constant, conditioned = tiny(time="constant"), tiny(time="conditioned")
    assert torch.allclose(
        constant(x, labels), conditioned(x, labels, torch.zeros(2)), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("time", ["none", "constant"])
def test_gamma_is_refused_where_it_is_hidden(time):
    net = tiny(time=time)
    assert not net.conditioned
    with pytest.raises(ValueError, match="blind to it: leave it out"):
        net(latents(2, 3, 8, 8), torch.tensor([0, 1]), torch.zeros(2))


def test_gamma_is_demanded_where_it_is_known():
    net, x, labels = tiny(time="conditioned"), latents(2, 3, 8, 8), torch.tensor([0, 1])
    assert net.conditioned
    with pytest.raises(ValueError, match=r"give gamma \(B,\), or sample with Euler or Heun"):
        net(x, labels)
    for wrong in (torch.zeros(()), torch.zeros(1), torch.zeros(3), torch.zeros(2, 1)):
        with pytest.raises(ValueError, match="for 2 latents"):
            net(x, labels, wrong)


def test_time_features_are_those_of_sit():
    zero = time_features(torch.zeros(1))
    assert zero.tolist() == [[1.0] * 128 + [0.0] * 128]
    for gamma in (0.0, 0.3, 1.0):
        angles = [gamma * math.exp(-math.log(10000) * i / 128) for i in range(128)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        found = time_features(torch.tensor([gamma], dtype=torch.float64))
        assert found.dtype == torch.float32
        assert found[0].tolist() == pytest.approx(expected, abs=1e-6)


# -- compiled -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_it_is_the_same_function():
    net = tiny(replace(TINY, depth=1), time="constant")
    x, labels = latents(2, 3, 8, 8), torch.tensor([0, 5])
    try:
        with torch.no_grad():
            found = torch.compile(net, fullgraph=True)(x, labels)
    finally:
        torch.compiler.reset()
    assert torch.allclose(found, net(x, labels), rtol=1e-4, atol=1e-5)


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
