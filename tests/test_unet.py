"""The U-Net: a transformer's interface, true gradients of its energies, a function of its seed."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

from eqm.config import NetworkConfig, ObjectiveConfig, UNetConfig
from eqm.field import Field
from eqm.objective import decay, eqm_loss
from eqm.unet import TIMESTEPS, UNet

SHAPE = UNetConfig(widths=(8, 16, 24), layers=1, attention=(1,), head_width=8, groups=4)
MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def unet(*, shape=SHAPE, time="none", size=8, channels=2, classes=3, seed=1, zero_head=False):
    config = NetworkConfig(kind="unet", time=time, unet=shape)
    net = UNet(config, size=size, channels=channels, classes=classes)
    net.initialise(seed, zero_head=zero_head)
    return net


def latents(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def attentions(net):
    return {name: m for name, m in net.named_modules() if hasattr(m, "to_q")}


# -- what is built ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 16, (8, 16), (16, 4)])
@pytest.mark.parametrize("time", ["none", "conditioned"])
def test_output_has_the_shape_of_the_input(size, time):
    net = unet(size=size, time=time)
    x = latents(3, *net.shape)
    gamma = torch.rand(3) if net.conditioned else None
    assert net.shape[1:] == (size if isinstance(size, tuple) else (size, size))
    assert net(x, torch.tensor([0, 2, 3]), gamma).shape == x.shape
    assert net(x, None, gamma).shape == x.shape


def test_config_says_where_and_how_it_attends():
    net, seen = unet(size=16), {}
    for name, module in attentions(net).items():
        module.register_forward_hook(
            lambda m, given, _, name=name: seen.update({name: (*given[0].shape[1:], m.heads)})
        )
    net(latents(1, 2, 16, 16))
    assert seen == {
        "unet.down_blocks.1.attentions.0": (16, 8, 8, 2),
        "unet.mid_block.attentions.0": (24, 4, 4, 3),
        "unet.up_blocks.1.attentions.0": (16, 8, 8, 2),
        "unet.up_blocks.1.attentions.1": (16, 8, 8, 2),
    }
    assert not attentions(unet(shape=UNetConfig(widths=(8, 12), attention=(), groups=4)))
    lowest = UNetConfig(widths=(8, 16), layers=2, attention=(1,), head_width=4, groups=4)
    names = attentions(unet(shape=lowest))
    assert [name.split(".")[1] for name in names].count("up_blocks") == 3
    assert all("up_blocks.1" not in name for name in names)


def test_config_says_how_wide_and_deep_it_is():
    shape = UNetConfig(widths=(8, 24), layers=3, attention=(0,), head_width=8, groups=4)
    net = unet(shape=shape)
    norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
    assert {m.num_groups for m in norms} == {4}
    assert {m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)} == {2, 8, 24}
    assert [len(block.resnets) for block in net.unet.down_blocks] == [3, 3]
    assert not [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(m.p == 0 for m in net.modules() if isinstance(m, nn.Dropout))


def test_modes_of_training_and_evaluation_are_the_same_function():
    # Not to the bit: in training, diffusers makes a tensor contiguous first (its issue 12975).
    net, x = unet().double(), latents(2, 2, 8, 8, dtype=torch.float64)
    assert torch.allclose(net.train()(x), net.eval()(x), rtol=0, atol=1e-13)


# -- initial weights ----------------------------------------------------------------------------


def test_f_is_zero_at_first():
    net = UNet(NetworkConfig(kind="unet", unet=SHAPE), size=8, channels=2, classes=3)
    x = latents(2, 2, 8, 8)
    assert torch.equal(net(x, torch.tensor([0, 3])), torch.zeros_like(x))
    net.initialise(0, zero_head=False)
    assert bool(net(x).any())


def test_initial_weights_are_a_function_of_the_seed_alone():
    first, second = unet(seed=3), unet(seed=9).double()
    assert not torch.equal(first.unet.conv_in.weight, second.unet.conv_in.weight.float())
    with torch.no_grad():
        for weight in second.parameters():
            weight.fill_(7)
    torch.rand(3)
    second.initialise(3, zero_head=False)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight.double(), second.state_dict()[name]), name
    second.initialise(3)
    changed = {n for n, w in first.state_dict().items() if not w.equal(second.state_dict()[n])}
    assert changed == {"unet.conv_out.weight", "unet.conv_out.bias"}


def global_state():
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
    }


def test_global_state_of_torch_is_left_alone():
    before = global_state()
    net = UNet(NetworkConfig(kind="unet", unet=SHAPE), size=8, channels=2, classes=3)
    net.initialise(5, zero_head=False)
    gradient = Field(net, energy="dot").gradient(latents(2, 2, 8, 8), create_graph=True)
    gradient.square().sum().backward()
    assert global_state() == before


def test_on_meta_it_has_no_weights():
    with torch.device("meta"):
        net = UNet(NetworkConfig(kind="unet"), size=32, channels=3, classes=10)
    assert all(weight.is_meta for weight in net.state_dict().values())
    assert len(net.state_dict()) == len(list(net.parameters()))


def test_copies_and_files_are_the_same_function():
    net, x, labels = unet(), latents(2, 2, 8, 8), torch.tensor([1, 3])
    twin, other = copy.deepcopy(net), unet(seed=2)
    assert torch.equal(twin(x, labels), net(x, labels))
    assert not torch.equal(other(x, labels), net(x, labels))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x, labels), net(x, labels))
    twin.initialise(4)
    assert torch.equal(other(x, labels), net(x, labels))


# -- behaviour ----------------------------------------------------------------------------------


@pytest.mark.parametrize("time", ["constant", "conditioned"])
@pytest.mark.parametrize("classes", [None, 3])
def test_every_weight_is_used_except_biases_of_keys(time, classes):
    net = unet(time=time, classes=classes).double()
    labels = None if classes is None else torch.tensor([0, 1, 2, 3])
    gamma = torch.tensor([0.1, 0.4, 0.7, 1.0]) if net.conditioned else None
    net(latents(4, 2, 8, 8, dtype=torch.float64), labels, gamma).square().sum().backward()
    for name, weight in net.named_parameters():
        largest = float(weight.grad.abs().max())
        assert (largest < 1e-12) if name.endswith("to_k.bias") else (largest > 1e-6), name
    inputs = net.unet.time_embedding.linear_1.weight.grad.any(dim=0)
    assert inputs.tolist() == [True] * 4 + [net.conditioned] * 4


@pytest.mark.parametrize("groups", [4, 8])
def test_labels_matter_and_none_is_the_null_label(groups):
    # Groups of one channel (8 of 8): what is added before such a norm would be lost.
    shape = UNetConfig(widths=(8,), layers=1, attention=(), groups=groups)
    net, x = unet(shape=shape), latents(1, 2, 8, 8)
    found = [net(x, torch.tensor([label])).detach() for label in range(4)]
    for i in range(4):
        for j in range(i):
            assert float((found[i] - found[j]).abs().max()) > 1e-3
    assert torch.equal(net(x), found[3])
    assert net.unet.class_embedding.num_embeddings == 4
    assert unet(classes=None).unet.class_embedding is None


def test_a_sample_does_not_see_its_neighbours():
    net = unet(time="conditioned").double()
    x, labels = latents(5, 2, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    gamma = torch.linspace(0, 1, 5)
    together = net(x, labels, gamma)
    for i in range(5):
        alone = net(x[i : i + 1], labels[i : i + 1], gamma[i : i + 1])
        assert torch.allclose(alone[0], together[i], rtol=0, atol=1e-13)


def test_gamma_matters_where_it_is_known_and_only_there():
    x, labels = latents(2, 2, 8, 8), torch.tensor([0, 1])
    net = unet(time="conditioned")
    levels = [net(x, labels, torch.full((2,), g)) for g in (0.0, 0.001, 0.5, 1.0)]
    for first, second in itertools.pairwise(levels):
        assert not torch.allclose(first, second, rtol=0, atol=1e-4)
    for time in ("none", "constant"):
        assert torch.equal(unet(time=time)(x, labels), levels[0])
    seen = []
    net.unet.time_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    net(x, labels, torch.tensor([0.25, 1.0], dtype=torch.float64))
    assert seen[0].tolist() == [TIMESTEPS / 4, TIMESTEPS]


@pytest.mark.parametrize("mode", MODES)
def test_it_runs_in_every_grad_mode_and_in_double(mode):
    net, x = unet(), latents(2, 2, 8, 8)
    expected = net(x).detach()
    with MODES[mode]():
        assert torch.equal(net(x), expected)
        assert torch.allclose(net.double()(x.double()).float(), expected, rtol=0, atol=1e-5)


def test_arguments_are_left_alone():
    net, x, labels = unet(time="conditioned"), latents(2, 2, 8, 8), torch.tensor([0, 1])
    gamma = torch.tensor([0.25, 0.5])
    net(x, labels, gamma)
    assert torch.equal(x, latents(2, 2, 8, 8))
    assert (labels.tolist(), gamma.tolist()) == ([0, 1], [0.25, 0.5])


# -- energies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("energy", ["dot", "l2"])
@pytest.mark.parametrize("time", ["none", "conditioned"])
def test_gradient_is_the_slope_of_the_energy(energy, mode, time):
    field = Field(unet(time=time).double(), energy=energy)
    x, along = (latents(2, 2, 8, 8, dtype=torch.float64, seed=i) for i in (0, 1))
    given = torch.tensor([0, 3]), torch.tensor([0.3, 0.9])
    step = 1e-5
    with MODES[mode]():
        found = (field.gradient(x, *given) * along).flatten(1).sum(dim=1)
        high, low = (field.energy(x + s * step * along, *given) for s in (1, -1))
    slope = (high - low) / (2 * step)
    assert float(slope.detach().abs().min()) > 0.1
    assert torch.allclose(found, slope, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("energy", ["implicit", "dot", "l2"])
def test_loss_reaches_the_weights(energy):
    net = unet().double()
    field = Field(net, energy=energy)
    x, eps = (latents(2, 2, 8, 8, dtype=torch.float64, seed=i) for i in (0, 1))
    gamma, labels = torch.tensor([0.3, 0.9], dtype=torch.float64), torch.tensor([0, 3])

    def loss():
        losses = eqm_loss(
            field, x, eps, gamma, labels, c=decay(ObjectiveConfig()), create_graph=True
        )
        return losses.mean()

    loss().backward()
    for name in ("unet.conv_in.weight", "unet.mid_block.attentions.0.to_q.weight"):
        weight = net.get_parameter(name)
        place = int(weight.grad.abs().argmax())
        entry, step = weight.detach().view(-1), 1e-5
        found, before, values = float(weight.grad.view(-1)[place]), float(entry[place]), []
        for sign in (1, -1):
            entry[place] = before + sign * step
            values.append(float(loss().detach()))
        entry[place] = before
        assert found == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6), name


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 10}, "10 x 10 cannot be halved 2 times.* size that 4 divides"),
        ({"size": (8, 6)}, "8 x 6 cannot be halved 2 times.*fewer entries"),
        ({"size": 0}, r"shape \(2, 0, 0\)"),
        ({"classes": 0}, "classes is 0"),
        ({"size": 4, "shape": UNetConfig(widths=(8, 8, 8), attention=(), groups=8)}, "one pixel"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        unet(**settings)


def test_arguments_that_do_not_fit_are_refused():
    x, labels = latents(2, 2, 8, 8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"this network takes \(B, \*\(2, 8, 8\)\)"):
        unet()(latents(2, 2, 16, 16))
    with pytest.raises(ValueError, match="without labels"):
        unet(classes=None)(x, labels)
    with pytest.raises(ValueError, match="blind"):
        unet()(x, labels, torch.zeros(2))
    with pytest.raises(ValueError, match="give gamma"):
        unet(time="conditioned")(x, labels)
