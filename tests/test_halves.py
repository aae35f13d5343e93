"""Products in float16: exact where they can be, else less wrong than bfloat16's; bits that stay."""

import contextlib
import itertools
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eqm.compute import check_halves, prepare
from eqm.config import ComputeConfig, NetworkConfig, ObjectiveConfig, TrainConfig
from eqm.errors import ConfigError
from eqm.kernels import halves
from eqm.learner import Learner, learn
from eqm.network import Attention, Transformer

CPU = torch.device("cpu")
NEEDED = pytest.mark.skipif(
    halves.lacking() is not None,
    reason="this processor has no AVX512-FP16",
)
HALVES = TrainConfig(batch_size=8, learning_rate=1e-3, precision="float16")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole_numbers(*shape, seed):
    """From -5 to 5: sums of 64 products are whole numbers that float16 has exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-5, 6, shape, generator=generator).float()


def product(a, b, bias=None, most_a=None, most_b=None):
    return halves._product(a, b, bias, most_a, most_b)[0]


def wrong(found, expected):
    """Relative error of a matrix."""
    return float((found.double() - expected).norm() / expected.norm())


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- one product --------------------------------------------------------------------------------

SIZES = st.integers(1, 40) | st.sampled_from([63, 64, 65, 95, 96, 97, 128, 193, 2047, 2049])


@NEEDED
@settings(max_examples=100, deadline=None)
@given(
    m=SIZES, n=SIZES, k=SIZES, seed=st.integers(0, 99), count=st.integers(1, 5),
    lies=st.tuples(st.booleans(), st.booleans()), biased=st.booleans(), power=st.integers(-30, 30),
)  # fmt: skip
def test_products_of_whole_numbers_are_exact_whatever_the_sizes(
    m, n, k, seed, count, lies, biased, power
):
    a = whole_numbers(k, m, seed=seed).t() if lies[0] else whole_numbers(m, k, seed=seed)
    b = whole_numbers(n, k, seed=seed + 1).t() if lies[1] else whole_numbers(k, n, seed=seed + 1)
    bias = whole_numbers(n, seed=seed + 2) * 2.0**power if biased else None
    expected = a @ b * 2.0**power + (0 if bias is None else bias)
    with threads(count):
        found, most = halves._product(a * 2.0**power, b, bias, None, None)
    assert torch.equal(found, expected)
    assert float(most) == float(a.abs().max()) * 2.0**power


@NEEDED
@pytest.mark.parametrize("mean", [0.0, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(300, 384, 200), (100, 4608, 64)])
def test_what_is_rounded_is_half_as_wrong_as_in_bfloat16(shape, mean):
    m, k, n = shape
    a, b = drawn(m, k) + mean, drawn(k, n, seed=1) + mean
    expected = a.double() @ b.double()
    ours, bfloat = wrong(product(a, b), expected), a.bfloat16() @ b.bfloat16()
    assert ours < 1.5e-3
    assert ours < 0.5 * wrong(bfloat, expected)


@NEEDED
@pytest.mark.parametrize("least", [1e-12, 1e-6])
def test_small_rows_are_as_exact_as_large_ones(least):
    # As gradients are, of images near the data and of noise.
    rows = torch.logspace(torch.tensor(least).log10(), 6, 64)
    a, b = drawn(64, 500) * rows[:, None], drawn(500, 100, seed=1)
    expected = a.double() @ b.double()
    found = product(a, b).double()
    assert float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 2e-3


@NEEDED
def test_the_largest_numbers_everywhere_do_not_leave_float16():
    for bits, scale in itertools.product((11, 20), (1.0, 1e-30, 1e30)):
        # The second rounds up, to the next power of two.
        nearly = torch.full((70, 700), 1 - 2.0**-bits)
        found = product(nearly * scale, nearly.t())
        # The worst there is: all roundings of a chunk go the same way.
        assert torch.allclose(found, torch.full((70, 70), 700.0 * scale), rtol=32 * 2.0**-12)


@NEEDED
@pytest.mark.parametrize(("left", "right"), [(-64, -63), (-100, -27), (90, -110), (110, -120)])
def test_sizes_far_from_1_are_as_exact(left, right):
    # Of numbers that float32 has, and whose scales back it does not have.
    a, b = drawn(9, 200), drawn(200, 70, seed=1)
    found = product(a * 2.0**left, b * 2.0**right).double() * 2.0 ** (-left - right)
    assert wrong(found, a.double() @ b.double()) < 2e-3
    huge, other = torch.tensor([[2.0**110, 0.0]]), torch.tensor([[0.0, 1.0], [2.0**25, 0.0]])
    assert torch.equal(product(huge, other), torch.tensor([[0.0, 2.0**110]]))


@NEEDED
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(odd):
    a, b = drawn(70, 300), drawn(300, 100, seed=1)
    a[33, 7] = odd
    found = product(a, b)
    assert not bool(found[33].isfinite().any())
    others = torch.arange(70) != 33
    assert torch.equal(found[others], product(a[others], b))
    assert not bool(product(a.t(), b[:70])[7].isfinite().any())
    b[5, 9] = odd
    assert not bool(product(drawn(70, 300), b)[:, 9].isfinite().any())


@NEEDED
def test_bits_do_not_depend_on_threads_and_rows_not_on_each_other():
    a, b = drawn(500, 700), drawn(700, 300, seed=1)
    tall, wide = product(a, b), product(a[:, :500].t(), a)
    for count in (1, 3, 4):
        with threads(count):
            assert torch.equal(product(a, b), tall)
            assert torch.equal(product(a[:, :500].t(), a), wide)
    assert torch.equal(product(a[123:150], b), tall[123:150])


@NEEDED
def test_a_largest_number_that_is_known_changes_no_bit():
    a, b = drawn(400, 300), drawn(400, 200, seed=1)
    known = [x.abs().max() for x in (a, b)]
    assert torch.equal(product(a.t(), b), product(a.t(), b, None, *known))


@NEEDED
def test_nothing_times_nothing_is_nothing():
    for m, k, n in ((0, 3, 4), (3, 4, 0)):
        assert product(torch.ones(m, k), torch.ones(k, n)).shape == (m, n)
    assert torch.equal(product(torch.ones(3, 0), torch.ones(0, 4), torch.ones(4)), torch.ones(3, 4))
    assert not bool(product(torch.zeros(9, 70), drawn(70, 8)).any())


# -- a layer ------------------------------------------------------------------------------------


@NEEDED
@pytest.mark.parametrize("needs", [True, False])
def test_a_layer_and_its_gradients_are_those_of_torch(needs):
    x, weight, bias = drawn(4, 50, 96), drawn(72, 96, seed=1) / 10, drawn(72, seed=2)
    dy = drawn(4, 50, 72, seed=3) * 1e-5
    found = [t.clone().requires_grad_() for t in (x, weight, bias)]
    found[0].requires_grad_(needs)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    y, expected = halves.linear(*found), torch.nn.functional.linear(*exact)
    assert y.shape == expected.shape
    assert wrong(y.detach(), expected.detach()) < 2e-3
    y.backward(dy)
    expected.backward(dy.double())
    for mine, other in zip(found, exact, strict=True):
        if mine.requires_grad:
            assert wrong(mine.grad, other.grad) < 2e-3
    # Of sums there is nothing in float16.
    assert wrong(found[2].grad, exact[2].grad) < 1e-6


@NEEDED
def test_custom_op_is_as_torch_wants_it():
    a, b = drawn(70, 30), drawn(30, 40)
    most = a.abs().max()
    for args in ((a, b, drawn(40), None, None), (b.t(), a.t(), None, most, most)):
        torch.library.opcheck(halves._product, args)


@NEEDED
@pytest.mark.slow
def test_a_compiled_layer_gives_the_same_numbers():
    x, weight, bias = drawn(200, 96), drawn(72, 96, seed=1), drawn(72, seed=2)
    compiled = torch.compile(lambda *given: halves.linear(*given).cos(), dynamic=False)
    grads = []
    for function in (compiled, lambda *given: halves.linear(*given).cos()):
        weights = [t.clone().requires_grad_() for t in (weight, bias)]
        y = function(x, *weights)
        y.sum().backward()
        grads.append((y.detach(), *(w.grad for w in weights)))
    assert torch.allclose(grads[0][0], grads[1][0], atol=1e-6)
    assert wrong(grads[0][1], grads[1][1].double()) < 1e-5


@NEEDED
def test_numbers_elsewhere_and_of_other_kinds_are_not_taken_for_others():
    x, weight, bias = drawn(30, 40), drawn(20, 80, seed=1), drawn(40, seed=2)
    apart = halves.linear(x, weight[:, ::2], bias[::2])
    assert torch.equal(apart, halves.linear(x, weight[:, ::2].clone(), bias[::2].clone()))
    assert halves.linear(x[:0].view(2, 0, 40), drawn(20, 40), bias[:20]).shape == (2, 0, 20)
    for given_ in ((x.double(), weight[:, :40]), (x, weight[:, :40].half())):
        with pytest.raises(TypeError, match=r"of float32 numbers, and not torch\.float(64|16)"):
            halves.linear(*given_, bias[:20])
    with pytest.raises(TypeError, match=r"not torch\.bfloat16"):
        halves.attention(drawn(1, 4, 24).bfloat16(), 2)


# -- attention ----------------------------------------------------------------------------------


def attended(qkv, heads):
    """torch's."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return found.transpose(1, 2).flatten(2)


def with_gradient(function, qkv, heads, grad):
    """What comes out, and the gradient of qkv."""
    given_ = qkv.clone().requires_grad_()
    out = function(given_, heads)
    out.backward(grad)
    return out.detach(), given_.grad


@NEEDED
@settings(max_examples=30, deadline=None)
@given(
    images=st.integers(1, 3), tokens=st.integers(1, 40) | st.sampled_from([64, 65, 127, 256]),
    heads=st.integers(1, 3), width=st.integers(1, 40) | st.sampled_from([64, 72, 128]),
    seed=st.integers(0, 99), power=st.integers(-40, 20),
)  # fmt: skip
def test_attention_and_its_gradient_are_those_of_torch(images, tokens, heads, width, seed, power):
    qkv = drawn(images, tokens, 3 * heads * width, seed=seed)
    grad = drawn(images, tokens, heads * width, seed=seed + 1) * 2.0**power
    exact = with_gradient(attended, qkv.double(), heads, grad.double())
    found = with_gradient(halves.attention, qkv, heads, grad)
    assert wrong(found[0], exact[0]) < 6e-3
    # Of one token it is all in the values: that of queries and keys is 0.
    assert wrong(found[1], exact[1]) < 2e-2


@NEEDED
@pytest.mark.parametrize(("tokens", "shared"), [(64, 0), (256, 0), (64, 3)])
def test_attention_is_less_wrong_than_in_bfloat16(tokens, shared):
    qkv, grad = drawn(4, tokens, 3 * 128), drawn(4, tokens, 128, seed=1)
    # As by a bias: it makes scores large, and what tells keys apart small.
    qkv[..., : 2 * 128] += shared * drawn(2 * 128, seed=2)
    exact = with_gradient(attended, qkv.double(), 2, grad.double())
    found = with_gradient(halves.attention, qkv, 2, grad)
    bfloat = with_gradient(attended, qkv.bfloat16(), 2, grad.bfloat16())
    for mine, other, right in zip(found, bfloat, exact, strict=True):
        assert wrong(mine, right) < 0.8 * wrong(other, right)


@NEEDED
def test_attention_of_far_apart_scores_takes_the_largest():
    # Others are below what exp has: exactly 0.
    qkv = torch.zeros(1, 20, 3, 1, 16)
    qkv[0, :, 0], qkv[0, 7, 1] = 30.0, 30.0
    qkv[0, :, 2] = torch.arange(20.0)[:, None, None]
    found = halves.attention(qkv.flatten(2), 1)
    assert torch.equal(found, torch.full((1, 20, 16), 7.0))
    qkv[0, 3, 0, 0, 5] = float("nan")
    odd = halves.attention(qkv.flatten(2), 1).isfinite().all(dim=2)[0]
    assert odd.tolist() == [i != 3 for i in range(20)]


@NEEDED
def test_attention_gives_the_same_bits_by_any_threads_and_in_any_company():
    qkv, grad = drawn(4, 100, 3 * 96), drawn(4, 100, 96, seed=1)
    usual = with_gradient(halves.attention, qkv, 3, grad)
    for count in (1, 3):
        with threads(count):
            again = with_gradient(halves.attention, qkv, 3, grad)
        assert all(map(torch.equal, again, usual))
    alone = with_gradient(halves.attention, qkv[2:3], 3, grad[2:3])
    assert all(torch.equal(a, b[2:3]) for a, b in zip(alone, usual, strict=True))


@NEEDED
def test_exponentials_are_those_of_float32():
    # Of scores that float16 has: what is left is their exponentials'.
    qkv = torch.zeros(1, 64, 3, 1, 16)
    qkv[0, :, 0, 0, 0] = torch.arange(64) / 8
    qkv[0, ::2, 1], qkv[0, 1::2, 1] = 1, -1
    scores = qkv[0, :, 0, 0, 0].double() / 4
    expected = (32 * (scores.exp() + (-scores).exp())).log()
    assert torch.allclose(halves._attend(qkv)[1][0, 0].double(), expected, rtol=1e-6)


@NEEDED
def test_a_gradient_that_is_one_number_everywhere_is_read_as_such():
    x, weight, bias = drawn(2, 9, 32), drawn(24, 32, seed=1), drawn(24, seed=2)
    for function in (
        lambda x: halves.linear(x, weight, bias),
        # Of columns, which are no piece of memory.
        lambda x: halves.attention(x[..., :24], 2),
    ):
        found, one = [], torch.ones(())
        for spread in (True, False):
            given_ = x.clone().requires_grad_()
            y = function(given_)
            y.backward(one.expand(y.shape) if spread else one.expand(y.shape).contiguous())
            found.append(given_.grad)
        assert torch.equal(*found)
        assert bool(found[0].any())
    parts = x[..., :24]
    assert torch.equal(halves.attention(parts, 2), halves.attention(parts.clone(), 2))


@NEEDED
def test_custom_ops_of_attention_are_as_torch_wants_them():
    qkv = drawn(2, 30, 3, 2, 16)
    torch.library.opcheck(halves._attend, (qkv,))
    out, logs = halves._attend(qkv)
    torch.library.opcheck(halves._attend_back, (qkv, out, logs, torch.ones_like(out)))
    keys = qkv[:, :, 1] - qkv[:, :, 1].mean(dim=1, keepdim=True)
    expected = (qkv[:, :, 0].transpose(1, 2) @ keys.permute(0, 2, 3, 1) / 4).logsumexp(3)
    assert torch.allclose(logs, expected, atol=5e-3)


# -- training -----------------------------------------------------------------------------------


def network(**settings):
    net = Transformer(
        NetworkConfig(width=32, depth=2, heads=2, **settings), size=8, channels=1, classes=10
    )
    net.initialise(1, zero_head=False)
    for number, block in enumerate(net.blocks):
        # As trained: at first, blocks add nothing.
        bias = block.modulation.bias
        bias.data.copy_(drawn(len(bias), seed=number) / 2)
    return net


def gradient(net, train, objective=None, **more):
    found = Learner(net, objective or ObjectiveConfig(), train, device=CPU, **more)
    at = found.corrupted(drawn(8, 1, 8, 8), torch.arange(8), torch.arange(8))
    return found.backward(at), found.gradient().clone()


OBJECTIVES = {
    "eqm": ObjectiveConfig(),
    "norms": ObjectiveConfig(loss="norms"),
    "dispersive": ObjectiveConfig(dispersive_weight=0.5, dispersive_group=4),
}


@NEEDED
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("other", [{}, {"swiglu": True}, {"qk_norm": True}, {"rope": True}])
def test_a_step_in_float16_is_nearly_that_in_float32(objective, other):
    exact = gradient(network(**other), replace(HALVES, precision="float32"), objective)
    found = gradient(network(**other), HALVES, objective)
    assert not torch.equal(found[1], exact[1])
    assert torch.allclose(found[0], exact[0], rtol=5e-3)
    cosine = torch.nn.functional.cosine_similarity(found[1], exact[1], dim=0)
    assert float(cosine) > 1 - 1e-5


@NEEDED
def test_computed_again_or_in_parts_it_is_the_same_step():
    losses, whole = gradient(network(), HALVES)
    for settings_, more in (
        (ComputeConfig(checkpointing=True), {}),
        (ComputeConfig(), {"micro_batch": 4}),
    ):
        net = network()
        prepare(net, settings_, ObjectiveConfig(), CPU)
        again, found = gradient(net, HALVES, **more)
        # Rows do not depend on each other: the way forward is the same to the bit.
        assert torch.allclose(again, losses, rtol=1e-6)
        assert wrong(found, whole.double()) < (1e-6 if not more else 2e-3)


@NEEDED
def test_layers_are_plain_outside_of_the_step():
    net = network()
    names = list(net.state_dict())
    found = Learner(net, ObjectiveConfig(), HALVES, device=CPU)
    assert len(found.halves) == 2 * 5
    kinds = []
    block = net.blocks[0]
    inner = (block.attention, block.mlp.up, block.modulation)
    handle = block.register_forward_hook(lambda *_: kinds.extend(map(type, inner)))
    found.backward(found.corrupted(drawn(8, 1, 8, 8), torch.arange(8), torch.arange(8)))
    handle.remove()
    assert kinds == [halves.HalvesAttention, halves.HalvesLinear, torch.nn.Linear]
    assert list(map(type, inner)) == [Attention, torch.nn.Linear, torch.nn.Linear]
    assert list(net.state_dict()) == names
    with pytest.raises(RuntimeError, match="on purpose"), halves.in_halves(found.halves):
        raise RuntimeError("on purpose")
    assert type(net.blocks[0].mlp.up) is torch.nn.Linear


@NEEDED
def test_learning_in_float16_gives_the_same_bits_again_and_nearly_the_loss_of_float32():
    x = drawn(64, 1, 8, 8)
    train = replace(HALVES, images=8 * 40)
    curves = [learn(network(), x, train=train).losses for _ in range(2)]
    assert torch.equal(*curves)
    exact = learn(network(), x, train=replace(train, precision="float32")).losses
    assert torch.allclose(curves[0], exact, rtol=1e-2)


def test_what_is_compiled_is_installed():
    here = Path(halves.__file__).parent
    root = here.parents[1]
    packed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {path for glob in packed["package-data"]["eqm"] for path in (root / "eqm").glob(glob)}
    assert {path for path in here.iterdir() if path.suffix in {".cpp", ".h"}} <= found
    assert set(halves.SOURCES) < found


# -- refusals -----------------------------------------------------------------------------------


@NEEDED
def test_what_it_is_not_for_is_refused_in_words():
    for energy in ("dot", "l2"):
        with pytest.raises(ConfigError, match=rf"energy is '{energy}'; it must be 'implicit' with"):
            Learner(network(), ObjectiveConfig(energy=energy), HALVES, device=CPU)
    with pytest.raises(
        ConfigError, match=r"float32 weights on a CPU, and these are torch\.float64"
    ):
        Learner(network().double(), ObjectiveConfig(), HALVES, device=CPU)
    plain = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(ConfigError, match="this network has no blocks of one: use 'float32'"):
        Learner(plain, ObjectiveConfig(), HALVES, device=CPU)
    with pytest.raises(
        ConfigError, match=r"network\.kind is 'unet'; it must be 'transformer' with"
    ):
        check_halves(HALVES, ObjectiveConfig(), NetworkConfig(kind="unet"))
    with pytest.raises(ConfigError, match=r"train\.precision is 'float16'; .*'bfloat16' on cuda"):
        check_halves(HALVES, ObjectiveConfig(), device=torch.device("cuda"))


@pytest.fixture
def fresh(monkeypatch):
    """As a process that has not compiled yet."""
    halves._library.cache_clear()
    yield monkeypatch
    halves._library.cache_clear()


def test_a_processor_without_the_instructions_is_named(fresh):
    has = {"avx512_f": True, "cpu_name": "Old One"}
    fresh.setattr(torch.cpu, "get_capabilities", lambda: has)
    with pytest.raises(ConfigError, match=r"which needs .* and Old One lacks avx512_fp16"):
        halves.check_machine()


@NEEDED
def test_a_machine_without_a_fit_compiler_is_told(fresh, tmp_path):
    old = tmp_path / "g++"
    old.write_text("#!/bin/sh\necho \"error: unrecognized option '-mavx512fp16'\" >&2\nexit 1\n")
    old.chmod(0o755)
    fresh.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: str(old))
    with pytest.raises(ConfigError, match=r"cannot compile its products \(error: unrecognized"):
        halves.check_machine()
    old.write_text(
        '#!/bin/sh\nfor last; do :; done\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n'
    )
    with pytest.raises(ConfigError, match=r"cannot be loaded .*TMPDIR names a folder"):
        halves.check_machine()


@NEEDED
@pytest.mark.slow
def test_without_any_compiler_one_is_asked_for():
    code = (
        "from eqm.kernels import halves\nfrom eqm.errors import ConfigError\n"
        "try: halves.check_machine()\nexcept ConfigError as e: print(e)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"PATH": "/nowhere", "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert "there is none here (install g++ 12 or newer): use 'float32'" in said.stdout
