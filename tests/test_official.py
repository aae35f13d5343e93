"""Official checkpoints: the same numbers at every size, bit for bit there and back, and no code."""

import argparse
import hashlib
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import official
from reference.official_forward import forward, random_weights, shapes
from safetensors.torch import load_file

from eqm.config import NetworkConfig, replace
from eqm.errors import ConfigError, DataError, EqmError, IntegrityError
from eqm.field import Field, guided
from eqm.network import Transformer
from eqm.official import import_official, read_official, to_official, write_official

TINY = {"width": 16, "depth": 2, "patch": 2, "channels": 3, "size": 4, "classes": 5}
# torch's remark on bare pickles, which are refused anyway.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

LAST = ("final_layer.linear.weight", "final_layer.linear.bias")


@pytest.fixture(scope="module")
def golden():
    return load_file(official.GOLDEN / "official_tiny_ema.safetensors")


def built(found, dtype=torch.float64):
    channels, height, _ = found.shape
    net = Transformer(found.network, size=height, channels=channels, classes=found.classes)
    net.load_state_dict(found.tensors)
    return net.to(dtype).requires_grad_(False)


def own_network(seed=0, *, shape=(3, 4, 4), classes=5, **flags):
    config = NetworkConfig(**{"width": 16, "depth": 2, "heads": 4, "patch": 2, **flags})
    net = Transformer(config, size=shape[1:], channels=shape[0], classes=classes)
    generator = torch.Generator().manual_seed(seed)
    for weight in net.requires_grad_(False).parameters():
        weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    return net


def inputs(found, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *found.shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(found.classes + 1, (batch,), generator=generator)


def bits(tensors):
    """Signs of zeros and all."""
    return {name: (t.dtype, tuple(t.shape), t.numpy().tobytes()) for name, t in tensors.items()}


# -- the golden numbers of the official code ----------------------------------------------------


def test_the_transcription_is_the_official_network(golden):
    numbers = official.outputs()
    x, null = numbers["x"], torch.full((6,), 10)
    assert official.error(forward(golden, x, numbers["y"], heads=4), numbers["field"]) < 1e-12
    assert official.error(forward(golden, x, null, heads=4), numbers["field_null"]) < 1e-12


def test_what_is_read_off_the_golden_weights(golden):
    found = import_official(golden, num_heads=4)
    assert found.network == official.empty_network().config
    assert (found.shape, found.classes) == ((4, 8, 8), 10)
    assert torch.equal(found.tensors["positions"], golden["pos_embed"])
    assert bits(found.tensors) == bits(official.weights())


@pytest.mark.parametrize(
    ("energy", "name"), [("implicit", "field"), ("dot", "dot_field"), ("l2", "l2_field")]
)
def test_gradient_is_the_official_field_with_the_sign_turned(golden, energy, name):
    numbers, net = official.outputs(), built(import_official(golden, num_heads=4))
    gradient = Field(net, energy=energy).gradient(numbers["x"], numbers["y"])
    assert official.error(-gradient, numbers[name]) < 1e-12
    assert official.error(gradient, numbers[name]) > 1


@pytest.mark.parametrize("energy", ["dot", "l2"])
def test_energy_is_the_official_one(golden, energy):
    numbers, net = official.outputs(), built(import_official(golden, num_heads=4))
    found = Field(net, energy=energy).energy(numbers["x"], numbers["y"])
    assert official.error(found, numbers[f"{energy}_energy"]) < 1e-12


def test_null_label_and_guidance_are_the_official_ones(golden):
    numbers, net = official.outputs(), built(import_official(golden, num_heads=4))
    null = Field(net).gradient(numbers["x"])
    assert official.error(-null, numbers["field_null"]) < 1e-12
    both = guided(Field(net), numbers["y"], scale=1.5, channels=3)(numbers["x"])
    assert official.error(-both, numbers["field_cfg"]) < 1e-12


WRONG = {
    "not turned": lambda w: {name: -w[name] for name in LAST},
    "bias not turned": lambda w: {LAST[1]: -w[LAST[1]]},
    "labels shifted": lambda w: {
        "y_embedder.embedding_table.weight": w["y_embedder.embedding_table.weight"].roll(1, 0)
    },
}


@pytest.mark.parametrize("name", WRONG)
def test_parity_notices(golden, name):
    numbers = official.outputs()
    net = built(import_official({**golden, **WRONG[name](golden)}, num_heads=4))
    assert official.error(-net(numbers["x"], numbers["y"]), numbers["field"]) > 1e-3


# -- any size -----------------------------------------------------------------------------------


@st.composite
def sizes(draw):
    patch = draw(st.sampled_from((1, 2, 4, 8)))
    return {
        "width": 8 * draw(st.integers(1, 3)),
        "depth": draw(st.integers(1, 3)),
        "patch": patch,
        "channels": draw(st.integers(1, 5)),
        "size": patch * draw(st.integers(1, 3)),
        "classes": draw(st.integers(1, 6)),
        "learn_sigma": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


def check_parity(weights, *, heads, batch=2, **flags):
    found = import_official(weights, **flags)
    x, labels = inputs(found, batch)
    expected = forward(weights, x, labels, heads=heads)
    assert official.error(-built(found)(x, labels), expected) < 1e-12
    assert official.error(built(found)(x, labels), expected) > 1


@given(sizes(), st.sampled_from((1, 2, 4)))
@settings(max_examples=30, deadline=None)
def test_any_official_network_gives_the_same_numbers_and_comes_back(drawn, heads):
    weights = random_weights(**drawn)
    check_parity(weights, heads=heads, num_heads=heads)
    found = import_official(weights, num_heads=heads)
    assert found.network.second_head is drawn["learn_sigma"]
    assert found.classes == drawn["classes"]
    assert found.shape == (drawn["channels"], drawn["size"], drawn["size"])
    assert bits(to_official(built(found, torch.float32))) == bits(weights)


@pytest.mark.parametrize(
    ("width", "patch", "heads"), [(384, 2, 6), (384, 8, 6), (768, 4, 12), (1152, 8, 16)]
)
def test_official_layouts_give_the_same_numbers(width, patch, heads):
    layout = {"width": width, "depth": 2, "patch": patch, "channels": 4, "size": 32}
    check_parity(random_weights(**layout, classes=1000), heads=heads, batch=1)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_weights_of_sit_hear_the_time(t):
    weights = random_weights(**TINY)
    found = import_official(weights, num_heads=2, time="conditioned")
    assert found.network.time == "conditioned"
    x, labels = inputs(found)
    gamma = torch.full((2,), t, dtype=torch.float64)
    expected = forward(weights, x, labels, heads=2, t=gamma)
    assert official.error(-built(found)(x, labels, gamma), expected) < 1e-12
    assert bits(to_official(built(found, torch.float32))) == bits(weights)


def test_heads_matter_and_are_known_for_official_widths():
    weights = random_weights(**{**TINY, "width": 384})
    assert import_official(weights).network.heads == 6
    assert import_official(weights, num_heads=4).network.heads == 4
    with pytest.raises(AssertionError):
        check_parity(weights, heads=6, num_heads=4)
    with pytest.raises(ConfigError, match=r"width 16.*384, 768, 1024, 1152.*num_heads"):
        import_official(random_weights(**TINY))
    for wrong in (3, 0, -4):
        with pytest.raises(ConfigError, match=f"num_heads is {wrong}.* 16"):
            import_official(random_weights(**TINY), num_heads=wrong)


# -- there and back -----------------------------------------------------------------------------


def test_round_trips_are_bit_equal_and_in_the_official_order(golden):
    weights = {name: w.clone() for name, w in golden.items()}
    weights["final_layer.linear.bias"][:3] = torch.tensor([0.0, -0.0, 1e-45])
    weights["pos_embed"] *= 1.25
    net = built(import_official(weights, num_heads=4), torch.float32)
    found = to_official(net)
    assert bits(found) == bits(weights)
    tiny = {"width": 64, "depth": 2, "patch": 2, "channels": 4, "size": 8, "classes": 10}
    assert list(found) == list(shapes(**tiny))
    assert {name: tuple(w.shape) for name, w in found.items()} == shapes(**tiny)
    again = import_official(found, num_heads=4)
    assert bits(again.tensors) == bits(net.state_dict())


def test_only_the_last_layer_is_turned(golden):
    found = to_official(built(import_official(golden, num_heads=4), torch.float32))
    raw = import_official({**golden, **{name: -golden[name] for name in LAST}}, num_heads=4)
    changed = to_official(built(raw, torch.float32))
    assert [name for name in found if not torch.equal(found[name], changed[name])] == list(LAST)


@pytest.mark.parametrize("second_head", [False, True])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_our_own_networks_give_the_official_code_the_same_numbers(patch, second_head):
    net = own_network(patch=patch, second_head=second_head).double()
    weights = to_official(net)
    assert {name: tuple(w.shape) for name, w in weights.items()} == shapes(
        **{**TINY, "patch": patch}
    )
    found = import_official(weights, num_heads=4)
    x, labels = inputs(found)
    # A wider matrix is multiplied in another order: with a head of the same size, bits are equal.
    assert official.error(built(found)(x, labels), net(x, labels)) <= (0 if second_head else 1e-12)
    assert official.error(-forward(weights, x, labels, heads=4), net(x, labels)) < 1e-12


def test_an_export_is_a_copy():
    net = own_network(time="constant", second_head=True)
    weights = to_official(net)
    for value in weights.values():
        value.zero_()
    assert all(bool(weight.any()) for weight in net.parameters())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"qk_norm": True}, "network.qk_norm is True"),
        ({"rope": True}, "network.rope is True"),
        ({"swiglu": True}, "network.swiglu is True"),
        ({"rms_norm": True}, "network.rms_norm is True"),
        ({"mlp_ratio": 2.0}, "network.mlp_ratio is 2.0, and there it is 4.0"),
        ({"shape": (3, 4, 8)}, "4 x 8"),
        ({"classes": None}, "no labels"),
        ({"rope": True, "classes": None}, "network.rope.*no labels"),
    ],
)
def test_what_the_official_code_cannot_hold_is_refused(flags, told):
    with pytest.raises(ConfigError, match=told):
        to_official(own_network(**flags))


def test_other_networks_are_refused():
    with pytest.raises(ConfigError, match="Conv2d"):
        to_official(torch.nn.Conv2d(1, 1, 1))
    net = own_network()
    net.config = replace(net.config, kind="unet")
    with pytest.raises(ConfigError, match="'unet'"):
        to_official(net)


# -- weights that are no official network -------------------------------------------------------


def without(*names):
    return lambda w: {name: value for name, value in w.items() if name not in names}


def misshapen(name, *shape):
    return lambda w: {**w, name: torch.zeros(shape)}


ODD = {
    "no positions": (without("pos_embed"), "pos_embed is missing"),
    "positions flat": (misshapen("pos_embed", 4, 16), r"pos_embed has shape \[4, 16\]"),
    "no square": (misshapen("pos_embed", 1, 5, 16), "5 positions"),
    "no positions at all": (misshapen("pos_embed", 1, 0, 16), "at least 1"),
    "two sets of positions": (misshapen("pos_embed", 2, 4, 16), r"pos_embed .*\[1, 4, 16\]"),
    "other width": (misshapen("pos_embed", 1, 4, 32), r"x_embedder.proj.weight .*\[32, 3, 2, 2\]"),
    "oblong patch": (misshapen("x_embedder.proj.weight", 16, 3, 2, 4), r"\[16, 3, 2, 4\]"),
    "no class": (misshapen("y_embedder.embedding_table.weight", 1, 16), "classes is 0"),
    "odd head": (misshapen(LAST[0], 13, 16), r"linear.weight has shape \[13, 16\]"),
    "no bias": (without(LAST[1]), "final_layer.linear.bias is missing"),
    "no blocks": (lambda w: {n: t for n, t in w.items() if "blocks" not in n}, "depth is 0"),
    "a gap": (
        lambda w: {n.replace("blocks.1", "blocks.7"): t for n, t in w.items()},
        r"blocks\.1\.attn\.qkv\.weight is missing.*and 17 more",
    ),
    "half a block": (without("blocks.1.mlp.fc1.weight"), "blocks.1.mlp.fc1.weight is missing"),
    "one too many": (lambda w: {**w, "extra": torch.ones(1)}, "extra is one too many"),
}


@pytest.mark.parametrize("name", ODD)
def test_weights_of_other_networks_are_refused_by_name(name):
    change, told = ODD[name]
    with pytest.raises(DataError, match=rf"^odd\.pt.*{told}") as caught:
        import_official(change(random_weights(**TINY)), num_heads=4, where="odd.pt")
    assert len(str(caught.value)) < 400


def test_time_none_is_refused():
    with pytest.raises(ConfigError, match="'none'"):
        import_official(random_weights(**TINY), num_heads=4, time="none")


# -- files --------------------------------------------------------------------------------------


def both_formats(content, folder):
    """The format of today, and that of before torch 1.6."""
    for zipped in (True, False):
        path = folder / f"{zipped}.pt"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        yield path


def train_layout(ema, raw=None, **args):
    raw = raw or {name: 2 * w for name, w in ema.items()}
    given = argparse.Namespace(model="EqM-tiny", num_classes=10, uncond=True, **args)
    return {"model": raw, "ema": ema, "opt": {"state": {}, "param_groups": []}, "args": given}


def test_both_layouts_are_read_in_both_formats(golden, tmp_path):
    for path in both_formats(train_layout(golden), tmp_path):
        assert bits(read_official(path)) == bits(golden)
        raw = read_official(str(path), weights="raw")
        assert bits(raw) == bits({name: 2 * w for name, w in golden.items()})
    for path in both_formats(golden, tmp_path):
        assert bits(read_official(path)) == bits(golden)
        with pytest.raises(DataError, match=r"\.pt has no raw weights"):
            read_official(path, weights="raw")
    for path in both_formats({"model": golden}, tmp_path):
        assert bits(read_official(path)) == bits(read_official(path, weights="raw")) == bits(golden)


def test_what_was_read_does_not_change_with_the_file(golden, tmp_path):
    (path, _) = both_formats(golden, tmp_path)
    found = read_official(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert bits(found) == bits(golden)


def test_a_digest_is_checked_before_anything_is_parsed(golden, tmp_path):
    for path in both_formats(golden, tmp_path):
        right = hashlib.sha256(path.read_bytes()).hexdigest()
        assert bits(read_official(path, sha256=right)) == bits(golden)
    for path in both_formats(Malice(os.system, "true"), tmp_path):
        with pytest.raises(IntegrityError, match=r"has SHA-256 [0-9a-f]{64}, but 0{64}"):
            read_official(path, sha256="0" * 64)


def test_wrong_arguments_are_told(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.pt: there is no such file"):
        read_official(tmp_path / "nowhere.pt")
    with pytest.raises(DataError, match="there is no such file"):
        read_official(tmp_path)
    with pytest.raises(ConfigError, match="'both'"):
        read_official(tmp_path / "nowhere.pt", weights="both")


class Malice:
    """Runs when it is unpickled by pickle itself."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


def harmful(mark):
    """Objects that create a file when they are unpickled, and what they ask for."""
    yield Malice(os.system, f"touch {mark}"), "posix.system"
    yield Malice(eval, f"open({str(mark)!r}, 'w').close()"), "eval"
    yield Malice(exec, f"open({str(mark)!r}, 'w').close()"), "exec"


def places(one, golden):
    yield one
    yield {"ema": golden, "model": one}
    yield {**golden, "pos_embed": one}
    yield train_layout(golden, hook=one)
    yield train_layout(golden, hook=[{"deep": (one,)}])


def test_code_in_a_file_is_named_and_never_run(golden, tmp_path):
    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(next(harmful(mark))[0]))
    assert mark.exists(), "these would run"
    mark.unlink()
    for one, asked in harmful(mark):
        for content in places(one, golden):
            for path in both_formats(content, tmp_path):
                with pytest.raises(IntegrityError, match=rf"{path.name} asks for {asked}, and"):
                    read_official(path)
    assert not mark.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_bare_pickles_are_never_run(tmp_path, protocol):
    mark, path = tmp_path / "ran", tmp_path / "bare.pt"
    path.write_bytes(pickle.dumps(Malice(os.system, f"touch {mark}"), protocol=protocol))
    with pytest.raises(IntegrityError, match=r"bare\.pt"):
        read_official(path)
    assert not mark.exists()


def test_other_classes_are_refused_and_namespace_stays_unknown_elsewhere(golden, tmp_path):
    for path in both_formats(train_layout(golden, results=tmp_path), tmp_path):
        with pytest.raises(IntegrityError, match=r"asks for pathlib\.[\w.]*Path"):
            read_official(path)
    for path in both_formats(train_layout(golden), tmp_path):
        read_official(path)
        with pytest.raises(pickle.UnpicklingError, match="Namespace"):
            torch.load(path, weights_only=True)


def test_nobody_is_advised_to_trust_a_file(tmp_path):
    path = tmp_path / "bare.pt"
    path.write_bytes(pickle.dumps(Malice(os.system, "true"), protocol=4))
    with pytest.raises(IntegrityError) as caught:
        read_official(path)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_told(golden, tmp_path, share):
    for path in both_formats(golden, tmp_path):
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(IntegrityError, match=rf"{path.name} is damaged"):
            read_official(path)


def test_a_bit_that_turned_is_noticed(golden, tmp_path):
    (path, _) = both_formats(golden, tmp_path)
    data = bytearray(path.read_bytes())
    data[data.index(golden["pos_embed"].numpy().tobytes()) + 100] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    with pytest.raises(IntegrityError, match="damaged"):
        read_official(path)


@given(st.randoms(use_true_random=False), st.booleans())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_damage_is_told_in_words(tmp_path, random, zipped):
    path = tmp_path / "damaged.pt"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=zipped)
    data = bytearray(path.read_bytes())
    for _ in range(random.randint(1, 8)):
        data[random.randrange(len(data))] = random.randrange(256)
    path.write_bytes(data)
    try:
        read_official(path)
    except EqmError as error:
        assert str(path) in str(error)  # noqa: PT017


def with_one(value, name="pos_embed"):
    return lambda w: {**w, name: value}


NOT_WEIGHTS = {
    "a tensor": (lambda _: torch.ones(3), "holds no dict of tensors"),
    "nothing": (lambda _: {}, "holds no dict of tensors"),
    "ema is a list": (lambda w: {"ema": list(w.values())}, "holds no dict of tensors"),
    "a list among them": (with_one([1.0]), "'pos_embed' is a list"),
    "a tensor without a name": (lambda w: {**w, 3: w["pos_embed"]}, "weight 3"),
    "sparse": (with_one(torch.eye(3).to_sparse()), "'pos_embed' is a Tensor"),
    "integers": (with_one(torch.ones(3, dtype=torch.int64)), "'pos_embed' is torch.int64"),
    "complex numbers": (with_one(torch.ones(3) * 1j), "'pos_embed' is torch.complex64"),
    "no values": (with_one(torch.ones(3, device="meta")), "on meta"),
    "NaN": (with_one(torch.tensor([0.0, torch.nan])), "'pos_embed' is not finite"),
    "infinity": (with_one(torch.tensor([0.0, -torch.inf])), "'pos_embed' is not finite"),
    "more than there is": (with_one(torch.ones(1, 1).expand(10**7, 10**7)), "claims more"),
    "DistributedDataParallel": (
        lambda w: {f"module.{name}": value for name, value in w.items()},
        r"'module\.pos_embed' has the prefix",
    ),
}


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_what_is_no_weight_is_told_by_file_and_name(name, tmp_path):
    change, told = NOT_WEIGHTS[name]
    for path in both_formats(change(random_weights(**TINY)), tmp_path):
        with pytest.raises(DataError, match=rf"{path.name}.*{told}"):
            read_official(path)


# -- writing ------------------------------------------------------------------------------------


def test_a_flat_file_is_written_once(golden, tmp_path):
    path = tmp_path / "new" / "flat.pt"
    write_official(path, golden)
    assert bits(torch.load(path, weights_only=True)) == bits(golden)
    assert bits(read_official(path)) == bits(golden)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"flat\.pt exists"):
        write_official(path, random_weights(**TINY))
    assert path.read_bytes() == before
    assert [one.name for one in path.parent.iterdir()] == ["flat.pt"]
    assert zipfile.ZipFile(path).testzip() is None


def test_a_checkpoint_of_train_is_written_as_the_official_code_does(golden, tmp_path):
    raw = {name: 2 * w for name, w in golden.items()}
    write_official(tmp_path / "train.pt", golden, raw=raw, args={"ebm": "dot", "image_size": 64})
    assert bits(read_official(tmp_path / "train.pt")) == bits(golden)
    assert bits(read_official(tmp_path / "train.pt", weights="raw")) == bits(raw)
    found = torch.load(tmp_path / "train.pt", weights_only=False)
    assert list(found) == ["model", "ema", "opt", "args"]
    assert found["opt"] == {"state": {}, "param_groups": []}
    assert vars(found["args"]) == {
        "num_classes": 10,
        "ebm": "dot",
        "uncond": True,
        "image_size": 64,
    }
    with pytest.raises(ConfigError, match="give raw"):
        write_official(tmp_path / "flat.pt", golden, args={"ebm": "dot"})
    assert not (tmp_path / "flat.pt").exists()


@pytest.mark.parametrize(("patch", "name"), [(4, "EqM-S/4"), (1, None)])
def test_official_sizes_are_called_by_their_name(tmp_path, patch, name):
    sizes = shapes(**{**TINY, "width": 384, "depth": 12, "patch": patch})
    weights = {key: torch.zeros(1).expand(shape) for key, shape in sizes.items()}
    write_official(tmp_path / "named.pt", weights, raw=weights)
    found = torch.load(tmp_path / "named.pt", weights_only=False)["args"]
    assert getattr(found, "model", None) == name
    assert (found.num_classes, found.ebm, found.uncond) == (5, "none", True)
