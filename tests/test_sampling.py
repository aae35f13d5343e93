"""What people do with a model: the official numbers through the front door, slots, compositions,
constraints, scores, and everything that is asked wrongly."""

import argparse

import pytest
import torch
from reference import official
from safetensors.torch import load_file

import eqm
from eqm.autoencoder import identity
from eqm.config import NetworkConfig, ObjectiveConfig, SamplerConfig, SourceConfig
from eqm.errors import ConfigError, DataError
from eqm.learner import learn
from eqm.model import Model
from eqm.network import Transformer
from eqm.rules import NAG, Euler, GradientDescent, Heun, Langevin
from eqm.sampler import GradientNormBelow, Known
from eqm.sampling import rule_of, stop_of

GD = GradientDescent(step_size=0.003)
PAPER = NAG(step_size=0.003, momentum=0.3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The official tiny model as train.py writes it."""
    weights = load_file(official.GOLDEN / "official_tiny_ema.safetensors")
    raw = {name: w + 0.01 for name, w in weights.items()}
    content = {"model": raw, "ema": weights, "opt": {}, "args": argparse.Namespace(ebm="none")}
    path = tmp_path_factory.mktemp("official") / "0400000.pt"
    torch.save(content, path)
    return path


def loaded(checkpoint, **settings):
    return eqm.load(checkpoint, num_heads=4, device="cpu", **settings).to(torch.float64)


def made(*, energy="implicit", classes=3, time="none", c="truncated", seed=0, null_label=True):
    """A small model of 1 x 4 x 4 pixels that has learnt a few things, in float64."""
    network = NetworkConfig(width=16, depth=2, heads=2, patch=2, time=time)
    objective = ObjectiveConfig(c=c, energy=energy)
    net = Transformer(network, size=4, channels=1, classes=classes)
    net.initialise(seed, zero_head=False)
    with torch.no_grad():
        for weight in net.parameters():
            weight += 0.05 * torch.randn(
                weight.shape, generator=torch.Generator().manual_seed(seed)
            )
    model = Model.of(
        net,
        objective=objective,
        null_label=null_label,
        autoencoder=identity(SourceConfig(image_size_px=4)),
    )
    return model.to(torch.float64)


@pytest.fixture(scope="module")
def model():
    return made()


def latents(count, *, seed=0, shape=(1, 4, 4)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64)


# -- the official numbers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("energy", "name"), [("implicit", "field"), ("dot", "dot_field"), ("l2", "l2_field")]
)
def test_a_loaded_checkpoint_has_the_official_field(checkpoint, energy, name):
    numbers = official.outputs()
    model = loaded(checkpoint, energy=energy)
    assert official.error(-model.gradient(numbers["x"], numbers["y"]), numbers[name]) < 1e-12
    if energy != "implicit":
        found = model.energy(numbers["x"], numbers["y"])
        assert official.error(found, numbers[f"{energy}_energy"]) < 1e-12
    raw = loaded(checkpoint, energy=energy, weights="raw")
    assert official.error(-raw.gradient(numbers["x"], numbers["y"]), numbers[name]) > 1e-4


def test_a_loaded_checkpoint_has_the_official_null_and_guided_field(checkpoint):
    numbers, model = official.outputs(), loaded(checkpoint)
    assert official.error(-model.gradient(numbers["x"]), numbers["field_null"]) < 1e-12
    guided = model.gradient_of(numbers["y"], guidance=1.5, channels=3)
    assert official.error(-guided(numbers["x"]), numbers["field_cfg"]) < 1e-12


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sample_gd", {"rule": GD}),
        ("sample_nag", {"rule": PAPER}),
        ("sample_nag_cfg", {"rule": PAPER, "guidance": 1.5, "guidance_channels": 3}),
    ],
)
@pytest.mark.parametrize("slots", [None, 4])
def test_samples_of_a_loaded_checkpoint_are_the_official_ones(checkpoint, name, settings, slots):
    numbers = official.outputs()
    out = eqm.sample(
        loaded(checkpoint), labels=numbers["y"], start=numbers["start"], slots=slots, **settings
    )
    assert official.error(out.latents, numbers[name]) < 1e-11
    assert out.evaluations.tolist() == [249] * 6


def test_how_a_checkpoint_is_read_is_asked_of_checkpoints_alone(checkpoint, tmp_path, model):
    with pytest.raises(ConfigError, match="give num_heads"):
        eqm.load(checkpoint)
    with pytest.raises(ValueError, match="energy is 'dog'"):
        eqm.load(checkpoint, num_heads=4, energy="dog")
    model.save(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"are for \.pt files"):
        eqm.load(tmp_path / "saved", energy="dot")


def test_a_model_without_autoencoder_says_so_and_takes_one(checkpoint, tmp_path):
    model = loaded(checkpoint)
    out = eqm.sample(model, seeds=[0], updates=1)
    with pytest.raises(DataError, match="came without its autoencoder"):
        out.images()
    model.save(tmp_path / "saved")
    again = eqm.load(tmp_path / "saved", device="cpu", dtype=torch.float64)
    x = latents(2, shape=(4, 8, 8))
    assert torch.equal(again.gradient(x), model.gradient(x))
    with pytest.raises(DataError, match="came without its autoencoder"):
        again.autoencoder  # noqa: B018


def test_a_sit_is_loaded_as_flow_matching(checkpoint):
    model = loaded(checkpoint, flow_matching=True)
    assert model.field.conditioned
    with pytest.raises(DataError, match="conditioned on the noise level"):
        eqm.sample(model, labels=[1], seeds=[0])
    with pytest.raises(DataError, match="give gamma"):
        model.gradient(latents(1, shape=(4, 8, 8)))
    found = [
        eqm.sample(model, labels=[1], seeds=[0], rule=rule, updates=updates)
        for rule, updates in ((Euler(step_size=1 / 64), 64), (Heun(step_size=1 / 32), 32))
    ]
    assert found[0].evaluations.tolist() == found[1].evaluations.tolist() == [64]
    assert official.error(found[0].latents, found[1].latents) < 0.05


# -- slots --------------------------------------------------------------------------------------

FOUND = ("latents", "evaluations", "gradient_norms", "path_lengths", "energy_changes", "stopped")


def asked(order):
    return {"labels": [k % 3 for k in order], "seeds": order, "rule": PAPER, "updates": 60}


def stop(look):
    """Ends some samples early, some late and some never."""
    return look.updates > 5 + 40 * look.x[:, 0, 0, 0].abs()


@pytest.mark.parametrize("rule", [PAPER, Langevin(step_size=0.003, temperature=1e-3)])
def test_bits_of_a_sample_do_not_depend_on_its_neighbours_or_its_turn(rule):
    model = made().to(torch.float32)
    settings = {"rule": rule, "updates": 60, "slots": 6, "stop": stop}
    order = list(range(20))
    plain = eqm.sample(model, **{**asked(order), **settings})
    assert len(set(plain.evaluations.tolist())) > 3
    for mixed in (order[::-1], [7, 3, 19], [11]):
        labels = {**asked(mixed), **settings, "slots": 6}
        # Fewer samples than slots would be another shape: repeat some of them.
        filler = [k for k in order if k not in mixed][: max(0, 6 - len(mixed))]
        other = eqm.sample(model, **{**labels, **asked(mixed + filler), **settings})
        for name in FOUND:
            a, b = getattr(other, name)[: len(mixed)], getattr(plain, name)[mixed]
            assert torch.equal(a, b), (name, mixed)


def test_samples_agree_to_rounding_over_slot_counts(model):
    together = eqm.sample(model, **asked(list(range(20))), stop=stop)
    for slots in (1, 3, 20, 64):
        found = eqm.sample(model, **asked(list(range(20))), stop=stop, slots=slots)
        for name in FOUND:
            a, b = getattr(found, name).double(), getattr(together, name).double()
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9), (name, slots)


def test_what_slots_cannot_show_is_refused(model):
    for more in ({"on_update": print}, {"trace_every": 3}):
        with pytest.raises(DataError, match="no common update"):
            eqm.sample(model, seeds=[0], slots=1, updates=1, **more)


# -- composition --------------------------------------------------------------------------------


def test_a_composition_is_the_weighted_sum(model):
    other, x = made(seed=1), latents(4)
    both = eqm.compose((model, 0, 0.7), (other, 2, -0.2), (model, None, 0.5))
    zero, two = torch.tensor([0] * 4), torch.tensor([2] * 4)
    expected = (
        0.7 * model.gradient(x, zero) - 0.2 * other.gradient(x, two) + 0.5 * model.gradient(x)
    )
    assert official.error(both.gradient(x), expected) < 1e-12
    out = eqm.sample(both, start=x, rule=GD, updates=1)
    assert official.error(out.latents, x - 0.003 * expected) < 1e-12
    assert out.images().shape == (4, 1, 4, 4)


def test_guidance_is_a_composition_with_the_null_label(model):
    x = latents(3)
    both = eqm.compose((model, 1, 1.5), (model, None, -0.5))
    guided = model.gradient_of(torch.tensor([1] * 3), guidance=1.5)
    assert official.error(both.gradient(x), guided(x)) < 1e-12


@pytest.mark.parametrize("energy", ["dot", "l2"])
def test_energies_are_composed_and_their_gradient_is_the_slope(energy):
    both = eqm.compose((made(energy=energy), 0, 0.6), (made(energy=energy, seed=1), 1, 0.4))
    x, direction = latents(2), latents(2, seed=1)
    slope = (both.energy(x + 1e-5 * direction) - both.energy(x - 1e-5 * direction)) / 2e-5
    expected = (both.gradient(x) * direction).flatten(1).sum(dim=1)
    assert torch.allclose(slope, expected, rtol=1e-6)


def test_compositions_in_slots(model):
    both = eqm.compose((model, 0, 1.0), (model, 1, 1.0))
    plain, slots = (
        eqm.sample(both, seeds=range(7), rule=GD, updates=9, slots=s).latents for s in (None, 3)
    )
    assert torch.allclose(plain, slots, rtol=1e-12)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda model: [], "at least one"),
        (lambda model: [(model, 5, 1.0)], "label 5"),
        (lambda model: [(model, 1, float("nan"))], "weight is nan"),
        (lambda model: [(model, 1, 1.0), (made().to(torch.float32), 1, 1.0)], "dtype"),
    ],
)
def test_compositions_that_cannot_be_are_refused(model, parts, message):
    with pytest.raises(DataError, match=message):
        eqm.compose(*parts(model))


def test_models_of_other_latents_are_not_composed(model, checkpoint):
    with pytest.raises(DataError, match="cannot be composed"):
        eqm.compose((model, 0, 1.0), (loaded(checkpoint), 0, 1.0))
    both = eqm.compose((model, 0, 1.0))
    for wrong, message in (({"labels": [1]}, "leave them out"), ({"guidance": 2.0}, "weights")):
        with pytest.raises(DataError, match=message):
            eqm.sample(both, seeds=[0], updates=1, **wrong)


# -- constraints and starts ---------------------------------------------------------------------


@pytest.mark.parametrize("slots", [None, 3])
def test_known_pixels_are_kept_for_each_sample(model, slots):
    mask = torch.zeros(7, 1, 4, 4, dtype=torch.bool)
    mask[..., :2, :] = True
    values = latents(7, seed=4)
    out = eqm.sample(
        model, seeds=range(7), rule=GD, updates=5, project=Known(mask, values), slots=slots
    )
    assert torch.equal(out.latents[mask], values[mask])
    free = eqm.sample(model, seeds=range(7), rule=GD, updates=5, slots=slots)
    assert not torch.equal(out.latents[~mask], free.latents[~mask])


def test_a_noisy_start_needs_no_noise_level(model):
    x, eps = latents(4), latents(4, seed=1)
    for gamma in (0.0, 0.4, 1.0):
        start = eqm.corrupt(x, eps, torch.full((4,), gamma))
        out = eqm.sample(model, start=start, rule=GD, updates=1)
        assert torch.equal(out.latents, start - 0.003 * model.gradient(start))


def test_a_trace_of_an_explicit_energy_has_its_energies():
    model = made(energy="dot")
    out = eqm.sample(model, labels=[0, 1], seeds=[0, 1], rule=GD, updates=6, trace_every=3)
    labels = torch.tensor([0, 1])
    assert out.trace.updates.tolist() == [0, 3, 6]
    assert torch.allclose(out.trace.energies[2], model.energy(out.latents, labels), rtol=1e-12)
    assert bool((out.energy_changes < 0).all())
    plain = eqm.sample(made(), seeds=[0], updates=2, trace_every=1).trace
    assert plain.energies is None
    assert plain.path_lengths.shape == (3, 1)


# -- scores -------------------------------------------------------------------------------------


def test_scores_are_high_outside_of_what_was_learnt():
    data = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    for energy in ("implicit", "dot"):
        model = made(energy=energy, classes=None).to(torch.float32)
        net = model.network.requires_grad_(True)
        train = eqm.TrainConfig(images=64 * 300, batch_size=64, learning_rate=4e-3)
        learn(net, data, objective=ObjectiveConfig(energy=energy), train=train)
        inside, outside = (eqm.score(model, x) for x in (data, 3 * latents(6, seed=9).float()))
        assert float(inside.gradient_norm.mean()) < 0.8 * float(outside.gradient_norm.mean())
        assert float(inside.descent_length.mean()) < 0.8 * float(outside.descent_length.mean())
        if energy == "dot":
            assert float(inside.energy.mean()) < float(outside.energy.mean())
        else:
            assert inside.energy is None


def test_scores_are_what_they_say(model):
    x, labels = latents(3), torch.tensor([0, 1, 2])
    scores = eqm.score(model, x, labels, rule=GD, updates=7)
    assert torch.allclose(scores.gradient_norm, model.gradient(x, labels).flatten(1).norm(dim=1))
    out = eqm.sample(model, start=x, labels=labels, rule=GD, updates=7)
    assert torch.equal(scores.descent_length, out.path_lengths)
    with pytest.raises(DataError, match="no score"):
        eqm.score(made(time="conditioned", c="constant"), x)


# -- configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["gd", "nag", "heavy-ball", "barzilai-borwein", "adam", "euler", "heun"]
)
def test_every_rule_of_a_config_descends(name, model):
    rule = rule_of(SamplerConfig(rule=name, step_size=0.01))
    out = eqm.sample(model, labels=[0, 1], seeds=[0, 1], rule=rule, updates=3)
    assert bool(out.latents.isfinite().all())
    assert out.evaluations.tolist() == [6 if name == "heun" else 3] * 2


def test_a_config_may_stop_samples():
    assert stop_of(SamplerConfig()) is None
    assert stop_of(SamplerConfig(stop_below=2.5)) == GradientNormBelow(2.5)


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": [3 + 1]}, "label 4"),
        ({"labels": [-1]}, "label -1"),
        ({"labels": [1.9]}, "float32"),
        ({"guidance": 2.0}, "no labels are given"),
        ({"seeds": [0.5]}, "whole numbers"),
        ({"seeds": []}, "seeds are empty"),
        ({"labels": [0, 1]}, "2 labels"),
        ({"seeds": [-1]}, "seed -1 is out of range"),
        ({"seeds": [2**43]}, "is out of range"),
        ({"start": latents(1)}, "either seeds or start"),
    ],
)
def test_samples_that_are_asked_wrongly_are_refused(model, settings, message):
    with pytest.raises(DataError, match=message):
        eqm.sample(model, **{"seeds": [0], "updates": 1, **settings})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (latents(2).float(), r"float32.*float64"),
        (latents(2)[:, :, :3], r"shape \(2, 1, 3, 4\)"),
        (latents(2)[0], "shape"),
        (latents(2) * torch.tensor([1, float("nan")]).view(2, 1, 1, 1), "latent 1 of 2 has NaN"),
        (latents(2) / torch.tensor([0.0, 1]).view(2, 1, 1, 1), "latent 0 of 2 has NaN"),
    ],
)
def test_latents_that_do_not_fit_are_refused_everywhere(model, x, message):
    uses = model.gradient, lambda x: eqm.sample(model, start=x), lambda x: eqm.score(model, x)
    for use in uses:
        with pytest.raises(DataError, match=message):
            use(x)


@pytest.mark.parametrize(("step_size", "diverged"), [(0.01, False), (5.0, True)])
def test_a_step_that_is_too_long_for_a_trained_model_is_marked(step_size, diverged):
    model = made(classes=None).to(torch.float32)
    data = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    train = eqm.TrainConfig(images=64 * 150, batch_size=64, learning_rate=4e-3)
    learn(model.network.requires_grad_(True), data, train=train)
    rule = GradientDescent(step_size=step_size)
    out = eqm.sample(model, seeds=range(8), rule=rule, updates=200)
    assert out.diverged.tolist() == [diverged] * 8
    assert bool(out.latents.isfinite().all())


def test_a_model_without_labels_takes_none():
    model = made(classes=None)
    assert eqm.sample(model, seeds=[0, 1], updates=2).latents.shape == (2, 1, 4, 4)
    with pytest.raises(DataError, match="without labels"):
        eqm.sample(model, labels=[0], seeds=[0], updates=1)
    with pytest.raises(DataError, match="no labels are given"):
        eqm.sample(model, seeds=[0], updates=1, guidance=2.0)
