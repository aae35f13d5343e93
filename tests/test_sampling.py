"""What people do with a model: the official numbers through the front door, slots, compositions,
constraints, scores, and everything that is asked wrongly."""

import argparse
import contextlib
import dataclasses

import pytest
import torch
from reference import official
from safetensors.torch import load_file

import eqm
from eqm.autoencoder import fresh_network, identity
from eqm.config import (
    AutoencoderFit,
    NetworkConfig,
    ObjectiveConfig,
    SamplerConfig,
    SourceConfig,
)
from eqm.errors import ConfigError, DataError
from eqm.learner import learn
from eqm.model import Model
from eqm.network import Transformer
from eqm.precision import products_in
from eqm.rules import (
    NAG,
    BarzilaiBorwein,
    Euler,
    GradientDescent,
    HeavyBall,
    Heun,
    Langevin,
    Optimiser,
)
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
    assert model.spec.objective == ObjectiveConfig(c="constant", multiplier=1.0)
    assert loaded(checkpoint).spec.objective == ObjectiveConfig()
    with pytest.raises(ConfigError, match=r"end at gamma 0\.5, and flow matching has"):
        eqm.sample(model, labels=[1], seeds=[0], rule=Euler(step_size=0.1), updates=5)
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


@pytest.mark.parametrize("slots", [None, 1])
@pytest.mark.parametrize("kind", [Euler, Heun])
def test_flow_matching_that_would_end_elsewhere_is_refused(kind, slots):
    for time in ("conditioned", "none"):
        model = made(time=time, c="constant")
        settings = {"seeds": [0], "slots": slots}
        eqm.sample(model, rule=kind(step_size=0.143), updates=7, **settings)
        eqm.sample(model, rule=kind(step_size=0.1), updates=0, **settings)
        for updates, end in ((5, "0.5"), (11, "1.1")):
            message = (
                f"{updates} updates of step_size 0.1 end at gamma {end}, .* {1 / updates:.6g}$"
            )
            with pytest.raises(ConfigError, match=message):
                eqm.sample(model, rule=kind(step_size=0.1), updates=updates, **settings)
        with pytest.raises(ConfigError, match=r"end at gamma 1\.01, and flow matching"):
            eqm.sample(model, rule=kind(step_size=0.101), updates=10, **settings)
    # On a landscape nothing ends at a time.
    eqm.sample(made(), rule=kind(step_size=0.1), updates=5, seeds=[0], slots=slots)


def test_what_is_not_told_is_as_the_page_says(model):
    """NAG 0.003, 0.3, 249 updates, no guidance; scores from 100 of them."""
    asked = {"labels": [0, 2], "seeds": [3, 4]}
    told = eqm.sample(model, **asked, rule=PAPER, updates=249, guidance=1.0)
    assert torch.equal(eqm.sample(model, **asked).latents, told.latents)
    x = latents(2)
    way = eqm.sample(model, start=x, rule=PAPER, updates=100)
    assert torch.equal(eqm.score(model, x).descent_length, way.path_lengths)


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
        other = eqm.sample(model, **{**asked(mixed), **settings})
        for name in FOUND:
            a, b = getattr(other, name), getattr(plain, name)[mixed]
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
    # Of one shape, and yet not the same latents.
    scaled = dataclasses.replace(model.spec.latent, scale=(2.0,))
    other = Model(dataclasses.replace(model.spec, latent=scaled), model.network)
    with pytest.raises(DataError, match="their latents mean different things"):
        eqm.compose((model, 0, 1.0), (other, 0, 1.0))
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


@pytest.mark.parametrize("slots", [None, 3])
def test_a_mask_may_be_one_for_all_and_what_is_unknown_may_be_anything(model, slots):
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2] = True
    values = latents(7, seed=4)
    settings = {"seeds": range(7), "rule": GD, "updates": 5, "slots": slots}
    whole = eqm.sample(model, project=Known(mask.expand(7, 1, 4, 4), values), **settings)
    values = values.masked_fill(~mask, float("nan"))
    assert torch.equal(
        eqm.sample(model, project=Known(mask, values), **settings).latents, whole.latents
    )
    one = eqm.sample(model, project=Known(mask, values[0]), **settings)
    assert torch.equal(one.latents[:, 0, :2], values[0, 0, :2].expand(7, 2, 4))


EVERYWHERE = torch.ones(2, 1, 4, 4, dtype=torch.bool)


@pytest.mark.parametrize("slots", [None, 2])
@pytest.mark.parametrize(
    ("mask", "values", "message"),
    [
        (
            EVERYWHERE[:, :, :2],
            latents(2),
            r"mask of Known has shape \(2, 1, 2, 4\): give \(2, 1, 4",
        ),
        (EVERYWHERE, latents(3), r"values of Known has shape \(3, 1, 4, 4\): give \(2, 1, 4, 4\)"),
        (EVERYWHERE, latents(2).float(), r"torch.float32, and latents torch.float64"),
        (EVERYWHERE, latents(2) / 0, "NaN or infinite entries where sample 0 of 2"),
    ],
)
def test_known_pixels_that_do_not_fit_are_refused(model, mask, values, message, slots):
    with pytest.raises(DataError, match=message):
        eqm.sample(model, seeds=[0, 1], updates=1, project=Known(mask, values), slots=slots)


def test_a_noisy_start_needs_no_noise_level(model):
    x, eps = latents(4), latents(4, seed=1)
    for gamma in (0.0, 0.4, 1.0):
        start = eqm.corrupt(x, eps, torch.full((4,), gamma))
        out = eqm.sample(model, start=start, rule=GD, updates=1)
        assert torch.equal(out.latents, start - 0.003 * model.gradient(start))


@pytest.mark.parametrize("slots", [None, 2])
def test_seeds_beside_a_start_number_the_noise_of_langevin(model, slots):
    rule, start = Langevin(step_size=0.003, temperature=0.1), latents(1).expand(3, 1, 4, 4)

    def found(seeds):
        settings = {"rule": rule, "updates": 4, "slots": slots}
        return eqm.sample(model, start=start, seeds=seeds, **settings).latents

    mixed = found([7, 2**42, 7])
    assert torch.equal(mixed[0], mixed[2])
    assert not torch.allclose(mixed[0], mixed[1])
    assert torch.allclose(found([2**42, 3, 7])[[0, 2]], mixed[[1, 0]], rtol=1e-12)
    assert torch.equal(found(None), found([0, 1, 2]))


INFERRED = [
    *(GD, PAPER, HeavyBall(step_size=0.003, momentum=0.3), BarzilaiBorwein(step_size=0.003)),
    *(Langevin(step_size=0.003, temperature=0.1), Euler(step_size=0.003), Heun(step_size=0.003)),
    Optimiser(torch.optim.Adam, lr=0.01),
    Optimiser(torch.optim.LBFGS, lr=0.1),
]


@pytest.mark.parametrize("slots", [None, 2])
@pytest.mark.parametrize("energy", ["implicit", "dot"])
def test_inference_mode_changes_no_sample(energy, slots):
    model, labels = made(energy=energy), [0, 1, 2]
    for rule in INFERRED:
        settings = {"labels": labels, "rule": rule, "updates": 3, "guidance": 1.5, "slots": slots}
        plain = eqm.sample(model, seeds=labels, **settings)
        with torch.inference_mode():
            within = eqm.sample(model, seeds=labels, **settings)
            assert torch.equal(model.gradient(within.latents), model.gradient(plain.latents))
        assert torch.equal(within.latents, plain.latents), rule
        # What comes out of it is of use outside.
        outside = eqm.sample(model, start=within.latents, **settings)
        assert torch.equal(
            outside.latents, eqm.sample(model, start=plain.latents, **settings).latents
        )
        scores = [eqm.score(model, x.latents) for x in (within, plain)]
        assert torch.equal(scores[0].gradient_norm, scores[1].gradient_norm)


@pytest.mark.parametrize("energy", ["implicit", "dot"])
def test_a_model_made_under_inference_mode_works_or_says_why_not(energy):
    with torch.inference_mode():
        model = made(energy=energy)
    if energy == "implicit":
        assert not bool(eqm.sample(model, seeds=[0], updates=2).diverged.any())
        return
    assert model.energy(latents(1)).shape == (1,)
    with pytest.raises(
        ConfigError, match=r"made under torch.inference_mode.* outside of that mode"
    ):
        eqm.sample(model, seeds=[0], updates=2)


def test_a_trace_of_an_explicit_energy_has_its_energies():
    model = made(energy="dot")
    out = eqm.sample(model, labels=[0, 1], seeds=[0, 1], rule=GD, updates=6, trace_every=3)
    labels = torch.tensor([0, 1])
    assert out.trace.updates.tolist() == [0, 3, 6]
    assert torch.allclose(out.trace.energies[2], model.energy(out.latents, labels), rtol=1e-12)
    assert bool((out.energy_changes < 0).all())
    assert torch.allclose(
        out.trace.energies[2] - out.trace.energies[0], out.energy_changes, rtol=0.1
    )
    plain = eqm.sample(made(), seeds=[0], updates=2, trace_every=1).trace
    assert plain.energies is None
    assert plain.path_lengths.shape == (3, 1)


@pytest.mark.parametrize("energy", ["dot", "l2"])
def test_a_trace_has_the_energy_that_is_descended(energy):
    model, other, labels = made(energy=energy), made(energy=energy, seed=1), torch.tensor([0, 1])
    settings = {"seeds": [0, 1], "rule": GD, "updates": 4, "trace_every": 4}

    def guided(x):
        c, u = model.energy(x, labels), model.energy(x)
        return u + 2.5 * (c - u)

    both = eqm.compose((model, 0, 1.5), (other, None, -0.5))
    for ask, more, expected in (
        (model, {"labels": labels, "guidance": 2.5}, guided),
        (model, {"labels": labels, "guidance": 2.5, "guidance_channels": 1}, guided),
        (both, {}, both.energy),
    ):
        out = eqm.sample(ask, **settings, **more)
        assert torch.allclose(out.trace.energies[1], expected(out.latents), rtol=1e-12)
        assert not torch.allclose(out.trace.energies[1], model.energy(out.latents, labels))


def test_a_trace_of_what_has_no_energy_has_none(checkpoint):
    settings = {"seeds": [0], "updates": 1, "trace_every": 1}
    some = {"labels": [0], "guidance": 2.0, "guidance_channels": 3}
    model = loaded(checkpoint, energy="dot")
    assert eqm.sample(model, **settings, **some).trace.energies is None
    mixed = eqm.compose((made(energy="dot"), 0, 1.0), (made(), 0, 1.0))
    assert eqm.sample(mixed, **settings).trace.energies is None


# -- scores -------------------------------------------------------------------------------------


def test_scores_are_high_outside_of_what_was_learnt():
    data = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    for energy in ("implicit", "dot"):
        model = made(energy=energy, classes=None).to(torch.float32)
        net = model.network.requires_grad_(True)
        train = eqm.TrainConfig(images=64 * 300, batch_size=64, learning_rate=4e-3)
        learn(net, data, objective=ObjectiveConfig(energy=energy), train=train)
        near = data + 0.05 * latents(6, seed=8).float()
        inside, outside = (eqm.score(model, x) for x in (near, 3 * latents(6, seed=9).float()))
        names = ("gradient_norm", "descent_length", *(["energy"] if energy == "dot" else []))
        for name in names:
            # Every one outside, and not their mean alone, scores above every one inside.
            a, b = getattr(inside, name), getattr(outside, name)
            assert float(a.max()) < float(b.min()), (energy, name)
        assert (inside.energy is None) == (energy == "implicit")


def test_scores_are_what_they_say(model):
    x, labels = latents(3), torch.tensor([0, 1, 2])
    scores = eqm.score(model, x, labels, rule=GD, updates=7)
    assert torch.allclose(scores.gradient_norm, model.gradient(x, labels).flatten(1).norm(dim=1))
    out = eqm.sample(model, start=x, labels=labels, rule=GD, updates=7)
    assert torch.equal(scores.descent_length, out.path_lengths)
    assert torch.equal(scores.diverged, out.diverged)
    assert scores.diverged.tolist() == [False] * 3
    wild = eqm.score(model, x, labels, rule=GradientDescent(step_size=1e9), updates=7)
    assert wild.diverged.tolist() == [True] * 3
    assert wild.descent_length.tolist() == [float("inf")] * 3
    with pytest.raises(DataError, match="no score"):
        eqm.score(made(time="conditioned", c="constant"), x)


def test_scores_are_of_the_labels_and_the_stop_that_are_asked_for():
    model, x, labels = made(energy="dot"), latents(3), torch.tensor([0, 1, 2])
    scores = eqm.score(model, x, labels, rule=GD, updates=9, stop=lambda look: look.updates >= 4)
    assert torch.equal(scores.energy, model.energy(x, labels))
    assert not torch.allclose(scores.energy, model.energy(x))
    way = eqm.sample(model, start=x, labels=labels, rule=GD, updates=4)
    assert torch.equal(scores.descent_length, way.path_lengths)


# -- configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["gd", "nag", "heavy-ball", "barzilai-borwein", "adam", "euler", "heun"]
)
def test_every_rule_of_a_config_descends(name, model):
    rule = rule_of(SamplerConfig(rule=name, step_size=0.01))
    out = eqm.sample(model, labels=[0, 1], seeds=[0, 1], rule=rule, updates=3)
    assert bool(out.latents.isfinite().all())
    assert out.evaluations.tolist() == [6 if name == "heun" else 3] * 2


def test_a_config_names_its_rule_with_its_settings():
    named = {
        "gd": GradientDescent(step_size=0.02),
        "nag": NAG(step_size=0.02, momentum=0.7),
        "heavy-ball": HeavyBall(step_size=0.02, momentum=0.7),
        "barzilai-borwein": BarzilaiBorwein(step_size=0.02),
        "adam": Optimiser(torch.optim.Adam, lr=0.02),
        "euler": Euler(step_size=0.02),
        "heun": Heun(step_size=0.02),
    }
    for name, rule in named.items():
        found = rule_of(SamplerConfig(rule=name, step_size=0.02, momentum=0.7))
        assert type(found) is type(rule), name
        assert found == rule, name


@pytest.mark.parametrize("energy", ["implicit", "dot"])
@pytest.mark.parametrize("slots", [None, 2])
def test_in_bfloat16_the_network_alone_is(energy, slots):
    """Against the descent written out; what is added up stays float32."""
    model = made(energy=energy).to(torch.float32)
    start, labels = latents(4).float(), torch.tensor([0, 1, 2, 1])
    how = {"rule": GradientDescent(step_size=0.01), "updates": 5, "slots": slots}
    found = eqm.sample(model, labels=labels, start=start, precision="bfloat16", **how)
    x = start
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            gradient = model.gradient(x, labels)
        x = x - 0.01 * gradient.float()
    assert found.latents.dtype == torch.float32
    assert torch.allclose(found.latents, x, rtol=0, atol=1e-6 if slots is None else 1e-3)
    usual = eqm.sample(model, labels=labels, start=start, **how).latents
    assert 0 < float((found.latents - usual).norm() / (usual - start).norm()) < 2e-2
    same = eqm.sample(model, labels=labels, start=start, precision="float32", **how).latents
    assert torch.equal(same, usual)


def test_a_precision_that_cannot_be_is_refused(model):
    single = made().to(torch.float32)
    with pytest.raises(ConfigError, match="precision is 'tf32', which only GPUs of NVIDIA have"):
        eqm.sample(single, seeds=[0], precision="tf32")
    with pytest.raises(ConfigError, match=r"is 'bfloat16', and weights are torch\.float64"):
        eqm.sample(model, seeds=[0], precision="bfloat16")


def test_other_products_are_as_before_afterwards():
    knobs = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [knob.fp32_precision for knob in knobs]
    cuda = torch.device("cuda")
    with products_in("tf32", cuda):
        assert [knob.fp32_precision for knob in knobs] == ["tf32", "tf32"]
        with contextlib.suppress(KeyError), products_in("float32", cuda):
            assert [knob.fp32_precision for knob in knobs] == ["ieee", "ieee"]
            raise KeyError
        assert [knob.fp32_precision for knob in knobs] == ["tf32", "tf32"]
    assert [knob.fp32_precision for knob in knobs] == before


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
        ({"start": latents(2)}, "1 seeds for 2 latents of start"),
        ({"seeds": None}, "give seeds, or start, or both"),
    ],
)
def test_samples_that_are_asked_wrongly_are_refused(model, settings, message):
    with pytest.raises(DataError, match=message):
        eqm.sample(model, **{"seeds": [0], "updates": 1, **settings})


def test_a_guidance_or_level_that_is_no_number_is_refused(model):
    for guidance in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ConfigError, match=f"guidance is {guidance}"):
            eqm.sample(model, labels=[0], seeds=[0], updates=1, guidance=guidance)
    for level in (float("nan"), -0.1, 1.5):
        gamma = torch.tensor([0.5, level]).double()
        with pytest.raises(DataError, match=f"gamma is {level}"):
            made(time="conditioned").gradient(latents(2), None, gamma)


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


@pytest.fixture(scope="module")
def trained():
    """A model that has learnt two data well, and the data (2, 1, 4, 4)."""
    model = made(classes=None).to(torch.float32)
    data = latents(2, seed=2).float()
    train = eqm.TrainConfig(
        images=64 * 400, batch_size=64, learning_rate=4e-3, ema_half_life_images=640
    )
    learn(model.network.requires_grad_(True), data, train=train)
    return model, data


@pytest.mark.parametrize("step_size", [0.01, 0.1])
def test_samples_of_a_trained_model_are_its_data(trained, step_size):
    model, data = trained
    rule = GradientDescent(step_size=step_size)
    out = eqm.sample(model, seeds=range(8), rule=rule, updates=200)
    assert out.diverged.tolist() == [False] * 8
    away = torch.cdist(out.latents.flatten(1), data.flatten(1)).min(dim=1).values
    assert float(away.max()) < 0.1 * float(torch.dist(*data))


@pytest.mark.parametrize("step_size", [0.3, 0.5, 2.0, 5.0])
def test_a_step_that_is_too_long_for_a_trained_model_is_marked(trained, step_size):
    rule = GradientDescent(step_size=step_size)
    out = eqm.sample(trained[0], seeds=range(8), rule=rule, updates=200)
    assert out.diverged.tolist() == [True] * 8
    assert bool(out.latents.isfinite().all())


def test_a_model_without_labels_takes_none():
    model = made(classes=None)
    assert eqm.sample(model, seeds=[0, 1], updates=2).latents.shape == (2, 1, 4, 4)
    with pytest.raises(DataError, match="without labels"):
        eqm.sample(model, labels=[0], seeds=[0], updates=1)
    with pytest.raises(DataError, match="no labels are given"):
        eqm.sample(model, seeds=[0], updates=1, guidance=2.0)


# -- what is no argument of the kind asked for ---------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"rule": "nag"}, "rule is 'nag': give a rule, as eqm.NAG"),
        ({"rule": NAG}, "rule is <class .*: give a rule, as eqm.NAG"),
        ({"stop": 10.0}, r"stop is 10.0: give eqm.GradientNormBelow\(10.0\)"),
        ({"updates": 2.5}, "updates is 2.5; it must be a whole number"),
        ({"stop": lambda look: True}, "stop rule says bool: it must say for each of 2"),
        ({"stop": lambda look: look.gradient_norms}, "stop rule says torch.float32"),
        ({"stop": lambda look: (look.gradient_norms < 1).all()}, "stop rule says bool of shape"),
    ],
)
def test_what_is_no_rule_stop_rule_or_number_is_told(model, wrong, told):
    with pytest.raises(ConfigError, match=told):
        eqm.sample(model.to(torch.float32), seeds=[0, 1], **{"updates": 2, **wrong})


def test_seeds_and_labels_may_be_any_sequence_of_whole_numbers(model):
    model.to(torch.float64)
    x, labels = latents(3), [0, 1, 2]
    as_tensor = torch.tensor(labels)
    assert torch.equal(model.gradient(x, labels), model.gradient(x, as_tensor))
    one, other = (eqm.score(model, x, given, updates=2) for given in (labels, as_tensor))
    assert torch.equal(one.descent_length, other.descent_length)
    with pytest.raises(DataError, match=r"as range\(8\) or \[3\]"):
        eqm.sample(model, seeds=3, updates=1)
    with pytest.raises(DataError, match="labels are no whole numbers"):
        eqm.sample(model, seeds=[0], labels=["3"], updates=1)


def vae(folder, **changes):
    """A folder as diffusers writes SD-VAE: 4 channels, 8 pixels a latent."""
    source, fit = SourceConfig(image_size_px=64, channels=3), AutoencoderFit(widths=(8,) * 4)
    network = fresh_network(fit, source)
    network.register_to_config(**changes)
    network.save_pretrained(folder)
    return folder


def test_an_official_checkpoint_is_decoded_by_the_autoencoder_that_is_given(checkpoint, tmp_path):
    folder = vae(tmp_path / "vae", scaling_factor=0.18215)
    model = eqm.load(checkpoint, num_heads=4, device="cpu", autoencoder=folder)
    side = model.spec.latent.shape[1]
    assert eqm.sample(model, seeds=[0], updates=1).images().shape == (1, 3, 8 * side, 8 * side)
    model.save(tmp_path / "kept")
    again = eqm.load(tmp_path / "kept", device="cpu")
    assert again.spec == model.spec
    x = latents(1, shape=model.spec.latent.shape).float()
    assert torch.equal(again.autoencoder.decode(x), model.autoencoder.decode(x))


def test_an_autoencoder_of_other_latents_is_refused(checkpoint, tmp_path, model):
    other = vae(tmp_path / "other", scaling_factor=0.13025)
    with pytest.raises(ConfigError, match=r"latent.scale was .*0\.18215.*is .*0\.13025"):
        eqm.load(checkpoint, num_heads=4, device="cpu", autoencoder=other)
    with pytest.raises(ConfigError, match=r"autoencoder .* makes latents of shape"):
        model.with_autoencoder(identity(SourceConfig(image_size_px=8)))


def test_pixels_that_were_learnt_in_memory_become_images():
    network = Transformer(NetworkConfig(width=16, depth=1, heads=2), size=4, channels=1, classes=3)
    plain = Model.of(network, objective=ObjectiveConfig())
    with pytest.raises(DataError, match="'identity' for pixels"):
        eqm.sample(plain, seeds=[0], updates=1).images()
    seen = eqm.sample(plain.with_autoencoder("identity"), seeds=[0], updates=1)
    shown = (127.5 * seen.latents + 128).clamp(0, 255).to(torch.uint8)
    assert torch.equal(seen.images(), shown)


# -- what is asked for wrongly ------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["float16", "bf16", "half", "", "float64"])
def test_a_precision_that_nobody_knows_is_no_other_one(model, wrong):
    with pytest.raises(ConfigError, match=f"precision is '{wrong}'; it must be one of float32, "):
        eqm.sample(model, seeds=[0], updates=1, precision=wrong)


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"slots": 0}, ConfigError),
        ({"updates": -3}, ConfigError),
        ({"check_every": 0, "stop": GradientNormBelow(1.0)}, ConfigError),
        ({"guidance": 2.0, "guidance_channels": 0, "labels": [1]}, ConfigError),
        ({"labels": [99]}, DataError),
    ],
)
def test_every_wrong_value_is_an_error_of_ours(model, wrong, kind):
    with pytest.raises(kind):
        eqm.sample(model, **{"seeds": [0], "updates": 1, **wrong})


def test_half_a_rule_is_no_rule(model):
    class Half:
        def move(self, *given):
            raise AssertionError

    with pytest.raises(ConfigError, match="give a rule"):
        eqm.sample(model, seeds=[0], updates=1, rule=Half())


def test_a_composition_has_no_scores(model):
    both = eqm.compose((model, 0, 1.0), (model, 1, 1.0))
    with pytest.raises(DataError, match="give score one of its models"):
        eqm.score(both, torch.zeros(1, *model.spec.latent.shape))
