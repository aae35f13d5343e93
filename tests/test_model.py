"""The public face: what is loaded was checked first, and what is asked wrongly is told in words."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import chain
import pytest
import torch
from safetensors.torch import load_file

import eqm
from eqm import model, sampling
from eqm.checkpoint import tensors_from_bytes, tensors_to_bytes
from eqm.config import ObjectiveConfig, PretrainedFile, SamplerConfig, TrainStage, UNetConfig
from eqm.errors import ConfigError, DataError, IntegrityError
from eqm.first_weights import first_network
from eqm.model import Model
from eqm.records import from_json
from eqm.registry import Version
from eqm.rules import NAG, GradientDescent
from eqm.sampler import GradientNormBelow

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.getbasetemp() / "chain", until="train")


@pytest.fixture(scope="module")
def trained(tiny: chain.Chain) -> Model:
    return eqm.load(tiny.uri("train"), device="cpu")


@pytest.fixture
def saved(trained: Model, tmp_path: Path) -> Path:
    trained.save(tmp_path / "saved")
    return tmp_path / "saved"


def some_latents(count: int = 3) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def unlabelled(trained: Model) -> Model:
    """The same weights, as if trained without label dropout."""
    spec = dataclasses.replace(trained.spec, null_label=False)
    return Model(spec, trained.network, autoencoder=lambda: trained.autoencoder)


def with_energy(trained: Model, energy: str) -> Model:
    objective = ObjectiveConfig(energy=energy)  # type: ignore[arg-type]
    spec = dataclasses.replace(trained.spec, objective=objective)
    return Model(spec, trained.network, autoencoder=lambda: trained.autoencoder)


# -- loading ------------------------------------------------------------------------------------


def test_a_record_holds_averaged_and_raw_weights(tiny: chain.Chain, trained: Model) -> None:
    raw = eqm.load(tiny.uri("train"), weights="raw", device="cpu")
    for found, name in ((trained, "ema.safetensors"), (raw, "raw.safetensors")):
        sealed = tensors_from_bytes(tiny.store.get(tiny["train"].outputs[name]))
        weights = found.network.state_dict()
        assert weights.keys() == sealed.keys()
        assert all(torch.equal(weights[key], sealed[key]) for key in sealed)
    x = some_latents()
    assert not torch.equal(trained.gradient(x), raw.gradient(x))


@pytest.mark.parametrize("ending", ["/", "/record.json"])
def test_the_address_of_a_record_may_be_longer(
    tiny: chain.Chain, trained: Model, ending: str
) -> None:
    same = eqm.load(tiny.uri("train") + ending, device="cpu")
    assert torch.equal(same.gradient(some_latents()), trained.gradient(some_latents()))


def test_a_saved_model_is_the_same_model(trained: Model, saved: Path) -> None:
    again = eqm.load(str(saved), device="cpu")
    assert again.spec == trained.spec
    x, labels = some_latents(), torch.tensor([0, 4, 9])
    assert torch.equal(again.gradient(x, labels), trained.gradient(x, labels))
    assert torch.equal(again.autoencoder.decode(x), trained.autoencoder.decode(x))


def test_a_compiled_network_is_saved_under_its_own_names(trained: Model, tmp_path: Path) -> None:
    net = torch.compile(trained.network, backend="eager")
    compiled = Model(trained.spec, net, autoencoder=lambda: trained.autoencoder)
    compiled.save(tmp_path / "compiled")
    again = eqm.load(tmp_path / "compiled", device="cpu")
    x = some_latents()
    assert torch.equal(again.gradient(x), trained.gradient(x))
    assert torch.equal(compiled.gradient(x), trained.gradient(x))
    assert compiled.field.network is net


def test_a_directory_is_never_overwritten(trained: Model, saved: Path) -> None:
    with pytest.raises(ConfigError, match="exists: name a directory that does not"):
        trained.save(saved)


def test_a_flipped_bit_in_a_directory_is_refused(saved: Path) -> None:
    file = saved / "ema.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match=r"ema\.safetensors does not match.*damaged"):
        eqm.load(str(saved))


def test_a_flipped_bit_in_a_store_is_refused(tiny: chain.Chain, tmp_path: Path) -> None:
    store = chain.copied(tiny, tmp_path / "store", without=())
    file = store.root / tiny["train"].outputs["ema.safetensors"].key
    file.chmod(0o600)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="damaged"):
        eqm.load(f"{store.uri}/train/{tiny['train'].digest}")
    raw = eqm.load(f"{store.uri}/train/{tiny['train'].digest}", weights="raw", device="cpu")
    assert isinstance(raw, Model)


def test_a_directory_that_lacks_a_file_is_refused(saved: Path) -> None:
    (saved / "ema.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"ema\.safetensors is missing"):
        eqm.load(str(saved))


def edited(saved: Path, name: str, data: bytes) -> None:
    """Change a file of a directory, and its digest with it."""
    (saved / name).write_bytes(data)
    if name != "digests.json":
        known = json.loads((saved / "digests.json").read_text())
        known[name] = hashlib.sha256(data).hexdigest()
        (saved / "digests.json").write_text(json.dumps(known))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("ema.safetensors", b"\x10", r"ema\.safetensors cannot be read as safetensors .*restore"),
        ("model.json", b"{", r"model\.json is not JSON .*restore"),
        ("model.json", b"\xff\xfe", r"model\.json is not JSON .*restore"),
        ("model.json", b"[]", r"model\.json must be a table of settings, not \[\]"),
        ("model.json", b'{"scheme": 1}', r"unknown setting 'scheme' in .*model\.json"),
        ("digests.json", b"{", r"digests\.json is missing or no JSON .*restore"),
        ("digests.json", b"\xff", r"digests\.json is missing or no JSON .*restore"),
        ("digests.json", b"[1]", r"digests\.json must hold file names and their SHA-256"),
        ("digests.json", b'{"model.json": 3}', r"must hold file names and their SHA-256"),
        ("digests.json", b"{}", r"digests\.json lacks model\.json, ema\.safetensors: restore"),
        (
            "digests.json",
            b'{"model.json": "", "ema.safetensors": "", "../x": ""}',
            r"digests\.json names '\.\./x', which is no file beside it",
        ),
    ],
)
def test_a_directory_that_was_edited_by_hand_is_refused_in_words(
    saved: Path, name: str, data: bytes, message: str
) -> None:
    edited(saved, name, data)
    with pytest.raises((IntegrityError, ConfigError), match=message):
        eqm.load(saved, device="cpu")


def test_a_directory_without_digests_is_refused(saved: Path) -> None:
    (saved / "digests.json").unlink()
    with pytest.raises(IntegrityError, match=r"digests\.json is missing"):
        eqm.load(saved)


def test_an_autoencoder_that_lacks_a_file_is_told_with_its_place(saved: Path) -> None:
    known = json.loads((saved / "digests.json").read_text())
    del known["spec.json"]
    (saved / "digests.json").write_text(json.dumps(known))
    with pytest.raises(DataError, match=r"saved lacks spec\.json: restore it"):
        _ = eqm.load(saved, device="cpu").autoencoder


def test_weights_that_are_not_finite_are_refused(saved: Path) -> None:
    tensors = tensors_from_bytes((saved / "ema.safetensors").read_bytes())
    tensors["head.linear.bias"][0] = float("nan")
    edited(saved, "ema.safetensors", tensors_to_bytes(tensors))
    with pytest.raises(DataError, match=r"ema\.safetensors: weight head\.linear\.bias has NaN"):
        eqm.load(saved, device="cpu")


def test_an_official_file_is_known_by_its_suffix_in_any_case(tmp_path: Path) -> None:
    weights = load_file(Path(__file__).parent / "golden" / "official_tiny_ema.safetensors")
    for name in ("tiny.pt", "TINY.PT"):
        torch.save(weights, tmp_path / name)
        assert eqm.load(tmp_path / name, num_heads=4, device="cpu").spec.network.width == 64


def test_a_directory_has_no_raw_weights(saved: Path) -> None:
    with pytest.raises(ConfigError, match="averaged weights alone"):
        eqm.load(str(saved), weights="raw")


def test_weights_of_another_network_are_refused_by_name(tiny: chain.Chain) -> None:
    data = tiny.store.get(tiny["train"].outputs["model.json"])
    spec = model.spec_from_bytes(data, "here")
    tensors = tensors_from_bytes(tiny.store.get(tiny["train"].outputs["ema.safetensors"]))
    wider = dataclasses.replace(spec, network=dataclasses.replace(spec.network, mlp_ratio=2.0))
    with pytest.raises(IntegrityError, match=r"mlp.* has shape \(16, 64\), .*has \(16, 32"):
        model.filled(wider.build(), tensors, "here")
    name = sorted(tensors)[0]
    kept = {key: value for key, value in tensors.items() if key != name}
    with pytest.raises(IntegrityError, match=f"weight {name} has shape none"):
        model.filled(spec.build(), kept, "here")
    with pytest.raises(IntegrityError, match=r"weight zz has shape \(1,\), this network has none"):
        model.filled(spec.build(), {**tensors, "zz": torch.zeros(1)}, "here")


def test_a_spec_of_another_schema_is_refused(trained: Model) -> None:
    data = json.loads(model.spec_to_bytes(trained.spec))
    assert model.spec_from_bytes(json.dumps(data).encode(), "here") == trained.spec
    data["schema"] = "eqm-model/9"
    with pytest.raises(ConfigError, match="schema 'eqm-model/9'; this program reads"):
        model.spec_from_bytes(json.dumps(data).encode(), "here")


def test_what_is_no_model_is_refused(tiny: chain.Chain) -> None:
    with pytest.raises(ConfigError, match="is no model: give"):
        eqm.load("nowhere")
    with pytest.raises(ConfigError, match="all 64 digits"):  # logs shorten it
        eqm.load(tiny.uri("train")[:-52])
    with pytest.raises(ConfigError, match=r"latents .* is no trained model"):
        eqm.load(tiny.uri("latents"))
    with pytest.raises(DataError, match="is not sealed"):
        eqm.load(f"{tiny.store.uri}/train/{'0' * 64}")
    with pytest.raises(ConfigError, match="weights is 'best'"):
        eqm.load(tiny.uri("train"), weights="best")


# -- averages of any length ---------------------------------------------------------------------

LONGER = {"train.images": 160 * 8, "train.batch_size": 8}


@pytest.fixture(scope="module")
def two_tracks(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    """A real training of 160 updates that left 32 snapshots of two power-function averages."""
    changes = {**LONGER, "train.ema_power": [0.05, 0.1], "train.ema_tracks": [40]}
    return chain.build(tmp_path_factory.mktemp("two"), changes, until="train")


def test_any_length_is_made_after_a_real_training(two_tracks: chain.Chain, tmp_path: Path) -> None:
    """The bar: below 1e-3 of the same training that tracked that length itself."""
    lengths = (0.06, 0.075, 0.09)
    direct = chain.build(tmp_path, {**LONGER, "train.ema_power": list(lengths)}, until="train")
    assert (
        direct["train"].outputs["raw.safetensors"] == two_tracks["train"].outputs["raw.safetensors"]
    )
    for sigma in lengths:
        found, plan = model.reconstructed(two_tracks.uri("train"), sigma_rel=sigma)
        wanted = eqm.load(direct.uri("train"), weights=f"power-{sigma}", device="cpu")
        for name, value in wanted.network.state_dict().items():
            error = (found.network.state_dict()[name] - value).norm()
            assert float(error) <= 1e-3 * float(value.norm()), (sigma, name)
        assert plan.expected_error < 1e-3
        assert plan.images_seen == 1280
        x = some_latents()
        torch.testing.assert_close(found.gradient(x), wanted.gradient(x), rtol=1e-3, atol=1e-4)
        nearest = eqm.load(two_tracks.uri("train"), weights="power-0.05", device="cpu")
        assert (nearest.gradient(x) - wanted.gradient(x)).norm() > 1e-3 * wanted.gradient(x).norm()


def test_moments_on_the_way_and_poor_reconstructions(two_tracks: chain.Chain) -> None:
    uri = two_tracks.uri("train")
    _, plan = model.reconstructed(uri, sigma_rel=0.08, images_seen=640)
    assert plan.images_seen == 640
    assert len(plan.factors) == 32
    _, between = model.reconstructed(uri, sigma_rel=0.08, images_seen=650)
    assert between.expected_error > plan.expected_error
    with pytest.raises(ConfigError, match=r"at image 1,280 would .* those tracked \(0\.05, 0\.1\)"):
        model.reconstructed(uri, sigma_rel=0.28, maximum_error=0.01)
    with pytest.raises(DataError, match=r"last snapshot at image 1,280, with which"):
        model.reconstructed(uri, sigma_rel=0.08, images_seen=1281)
    with pytest.raises(DataError, match="first snapshot at image 40, after the moment wanted"):
        model.reconstructed(uri, sigma_rel=0.08, images_seen=39)
    with pytest.raises(ConfigError, match=r"sigma_rel is 0\.3; it must be"):
        model.reconstructed(uri, sigma_rel=0.3)


def test_a_training_without_snapshots_and_a_directory_give_no_other_length(
    tiny: chain.Chain, saved: Path
) -> None:
    with pytest.raises(DataError, match=r"no snapshots .* train\.ema_power"):
        model.reconstructed(tiny.uri("train"), sigma_rel=0.08)
    with pytest.raises(ConfigError, match="is no model: give"):
        model.reconstructed(str(saved), sigma_rel=0.08)


def test_further_averages_are_loaded_by_name(two_tracks: chain.Chain) -> None:
    uri, store = two_tracks.uri("train"), two_tracks.store
    for name in ("ema-40", "power-0.05"):
        sealed = store.get(two_tracks["train"].outputs[f"{name}.safetensors"])
        found = eqm.load(uri, weights=name, device="cpu").network.state_dict()
        for key, value in tensors_from_bytes(sealed).items():
            assert torch.equal(found[key], value)
    with pytest.raises(ConfigError, match=r"has ema, ema-40, power-0\.05, power-0\.1, raw"):
        eqm.load(uri, weights="ema-50")


# -- weights to begin from ----------------------------------------------------------------------


def begun(tiny: chain.Chain, path: Path, **network: object) -> torch.nn.Module:
    """The network with which a training begins, from weights in a file."""
    data = path.read_bytes()
    found = PretrainedFile(uri=str(path), sha256=hashlib.sha256(data).hexdigest())
    job = tiny.job("train")
    stage = from_json(TrainStage, job.config)
    stage = dataclasses.replace(
        stage,
        network=dataclasses.replace(stage.network, **network),
        train=dataclasses.replace(stage.train, init_from=found),
    )
    sealed = model.spec_from_bytes(tiny.store.get(tiny["train"].outputs["model.json"]), "here")
    spec = dataclasses.replace(sealed, network=stage.network)
    return first_network(stage, spec, tiny.store)


@pytest.mark.parametrize("name", ["ema.safetensors", "raw.safetensors"])
def test_weights_of_a_sealed_training_are_known_wherever_they_lie(
    tiny: chain.Chain, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "copy.safetensors"
    path.write_bytes(tiny.store.get(tiny["train"].outputs[name]))
    assert begun(tiny, path).config == tiny.config.network
    heads = tiny.config.network.heads
    message = rf"copy\.safetensors .*: network\.heads was {heads}, and is {heads // 2}\. Begin"
    with pytest.raises(ConfigError, match=message):
        begun(tiny, path, heads=heads // 2)


def test_weights_of_a_directory_are_known_by_it(
    tiny: chain.Chain, trained: Model, tmp_path: Path
) -> None:
    # Other weights than any that the store has sealed.
    net = trained.spec.build()
    shifted = dataclasses.replace(trained.spec.latent, shift=(0.25,), autoencoder="kl-0123")
    for name, latent in (("same", trained.spec.latent), ("other", shifted)):
        Model(dataclasses.replace(trained.spec, latent=latent), net).save(tmp_path / name)
    same, other = (tmp_path / name / "ema.safetensors" for name in ("same", "other"))
    begun(tiny, same)
    with pytest.raises(ConfigError, match=r"network\.rope was False, and is True"):
        begun(tiny, same, rope=True)
    message = r"latent\.autoencoder was 'kl-0123', and is 'identity'; latent\.shift was \(0\.25,\)"
    with pytest.raises(ConfigError, match=message):
        begun(tiny, other)
    # A copy without what was beside it: nobody knows, and shapes fit.
    (tmp_path / "alone.safetensors").write_bytes(other.read_bytes())
    begun(tiny, tmp_path / "alone.safetensors")


def test_only_what_is_known_of_weights_is_compared(trained: Model) -> None:
    def with_latent(**changes: object) -> model.ModelSpec:
        latent = dataclasses.replace(trained.spec.latent, **changes)
        return dataclasses.replace(trained.spec, latent=latent)

    in_memory = with_latent(autoencoder=model.NO_AUTOENCODER, scale=(2.0,))
    official = with_latent(autoencoder=model.SD_VAE)
    for known in (trained.spec, in_memory, official):
        model.check_same(known, trained.spec, "here")
    unused = dataclasses.replace(trained.spec.network, unet=UNetConfig(layers=7))
    model.check_same(dataclasses.replace(trained.spec, network=unused), trained.spec, "here")
    with pytest.raises(ConfigError, match=r"latent\.scale was \(2\.0,\), and is \(1\.0,\)"):
        model.check_same(with_latent(autoencoder=model.SD_VAE, scale=(2.0,)), trained.spec, "here")


# -- gradient and energy ------------------------------------------------------------------------


def test_gradient_is_a_function_of_latents_and_labels(trained: Model) -> None:
    x = some_latents()
    nulls = torch.full((3,), 10)
    assert torch.equal(trained.gradient(x), trained.gradient(x, nulls))
    assert not torch.equal(trained.gradient(x), trained.gradient(x, torch.tensor([0, 1, 2])))
    assert trained.gradient(x).shape == x.shape
    assert not trained.gradient(x).requires_grad


def test_an_implicit_model_has_no_energy(trained: Model) -> None:
    with pytest.raises(ValueError, match="implicit: it has a gradient and no energy"):
        trained.energy(some_latents())


@pytest.mark.parametrize("energy", ["dot", "l2"])
def test_an_energy_and_its_gradient_belong_together(trained: Model, energy: str) -> None:
    found = with_energy(trained, energy).to(dtype=torch.float64)
    try:
        x = some_latents().double()
        step = 1e-5 * torch.randn_like(x)
        change = found.energy(x + step) - found.energy(x - step)
        slope = (found.gradient(x) * step).flatten(1).sum(dim=1)
        assert torch.allclose(change, 2 * slope, rtol=1e-5, atol=0)
    finally:
        found.to(dtype=torch.float32)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 11], "label 11 is given, and labels of this model go from 0 to 9"),
        ([0, -1, 2], "label -1 is given"),
        ([0, 1], "2 labels for 3 latents: give one each"),
        ([0], "1 label for 3 latents"),
        ([[0, 1, 2]], r"labels .* of shape \(1, 3\)"),
        ([0.0, 1.0, 2.0], r"labels are torch\.float32"),
        (5, r"labels .* of shape \(\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(trained: Model, labels: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        trained.gradient(some_latents(), torch.tensor(labels))


def test_latents_that_do_not_fit_are_refused(trained: Model) -> None:
    for wrong in (torch.zeros(2, 1, 8, 9), torch.zeros(2, 4, 8, 8), torch.zeros(1, 8, 8)):
        with pytest.raises(DataError, match=r"this model takes \(B, 1, 8, 8\)"):
            trained.gradient(wrong)


def test_levels_that_cannot_be_are_refused(trained: Model) -> None:
    for wrong, message in (
        ([0.5, float("nan"), 1.0], "gamma is nan; give levels from 0"),
        ([0.5, 2.0, 1.0], r"gamma is 2\.0"),
        ([0.5], r"gamma has shape \(1,\) for 3 latents"),
    ):
        with pytest.raises(DataError, match=message):
            trained.gradient(some_latents(), gamma=torch.tensor(wrong))


def test_without_a_null_label_labels_are_needed(trained: Model) -> None:
    plain = unlabelled(trained)
    labels = torch.tensor([0, 4, 9])
    assert torch.equal(
        plain.gradient(some_latents(), labels), trained.gradient(some_latents(), labels)
    )
    with pytest.raises(DataError, match="no null label: give labels"):
        plain.gradient(some_latents())
    with pytest.raises(DataError, match=r"label 10 is given, .* from 0 to 9"):
        plain.gradient(some_latents(), torch.tensor([0, 4, 10]))
    with pytest.raises(DataError, match="guidance needs a null label"):
        eqm.sample(plain, labels=[1], seeds=[0], updates=1, guidance=2.0)


# -- sampling -----------------------------------------------------------------------------------


def test_the_readme_works(trained: Model) -> None:
    out = eqm.sample(trained, labels=[0, 1, 2], seeds=[7, 8, 9], updates=5)
    images = out.images()
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (3, 1, 8, 8))
    assert trained.gradient(out.latents).shape == out.latents.shape
    assert out.evaluations.tolist() == [5, 5, 5]
    assert not out.diverged.any()


def test_the_same_seeds_give_the_same_bits(trained: Model) -> None:
    one, other = (eqm.sample(trained, labels=[3, 4], seeds=[1, 2], updates=5) for _ in range(2))
    assert torch.equal(one.latents, other.latents)
    assert not torch.equal(one.latents[0], one.latents[1])


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_sample_does_not_depend_on_its_neighbours(trained: Model, guidance: float) -> None:
    few = eqm.sample(trained, labels=[3], seeds=[41], updates=8, guidance=guidance)
    many = eqm.sample(
        trained, labels=[1, 3, 10, 5, 2], seeds=[7, 41, 0, 3, 9], updates=8, guidance=guidance
    )
    assert torch.allclose(many.latents[1], few.latents[0], atol=1e-5)
    assert not torch.allclose(many.latents[0], few.latents[0], atol=1e-1)


def test_a_version_is_loaded_with_the_content_that_it_was_registered_for(
    tiny: chain.Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = {"eqm.content": tiny["train"].content}
    version = Version(model="m", number=3, source=tiny.uri("train"), tags=tags)
    monkeypatch.setattr(model, "version_of", lambda *_: version)
    assert eqm.load("models:/m@champion", device="cpu").spec.classes
    for other in ({}, {"eqm.content": "0" * 64}):
        changed = dataclasses.replace(version, tags=other)
        monkeypatch.setattr(model, "version_of", lambda *_, of=changed: of)
        with pytest.raises(IntegrityError, match="version 3 was registered for content"):
            eqm.load("models:/m@champion", device="cpu")


def test_guidance_reaches_the_descent(trained: Model) -> None:
    def at(scale: float) -> torch.Tensor:
        return eqm.sample(trained, labels=[3], seeds=[0], updates=20, guidance=scale).latents

    assert not torch.equal(at(1.0), at(3.0))
    unguided = eqm.sample(trained, labels=None, seeds=[0], updates=20).latents
    assert torch.allclose(at(0.0), unguided, atol=1e-5)


def test_descent_may_start_anywhere(trained: Model) -> None:
    start = some_latents()
    before = start.clone()
    rule = GradientDescent(step_size=0.01)
    found = eqm.sample(trained, labels=[0, 1, 2], start=start, rule=rule, updates=1)
    assert torch.equal(start, before)
    expected = start - 0.01 * trained.gradient(start, torch.tensor([0, 1, 2]))
    assert torch.allclose(found.latents, expected, atol=1e-6)
    still = eqm.sample(trained, start=start, updates=0)
    assert torch.equal(still.latents, start)


def test_two_halves_of_a_descent_are_the_whole(trained: Model) -> None:
    rule = GradientDescent(step_size=0.01)
    half = eqm.sample(trained, seeds=[3, 4], rule=rule, updates=4)
    rest = eqm.sample(trained, start=half.latents, rule=rule, updates=4)
    whole = eqm.sample(trained, seeds=[3, 4], rule=rule, updates=8)
    assert torch.equal(rest.latents, whole.latents)


def test_a_stop_and_a_look_reach_the_sampler(trained: Model) -> None:
    seen: list[int] = []
    eqm.sample(trained, seeds=[0], updates=3, on_update=lambda k, _: seen.append(k))
    assert seen == [0, 1, 2, 3]
    found = eqm.sample(trained, seeds=[0], updates=9, stop=GradientNormBelow(1e9))
    assert found.evaluations.tolist() == [1]


def test_the_rule_is_the_one_of_the_config() -> None:
    gd = SamplerConfig(rule="gd", step_size=0.02)
    assert sampling.rule_of(gd) == GradientDescent(step_size=0.02)
    assert sampling.rule_of(SamplerConfig()) == NAG(step_size=0.003, momentum=0.3)


def test_a_start_or_seeds_or_both(trained: Model) -> None:
    with pytest.raises(DataError, match="give seeds, or start, or both"):
        eqm.sample(trained, updates=1)
    with pytest.raises(DataError, match="2 seeds"):
        eqm.sample(trained, seeds=[0, 1], start=some_latents(1), updates=1)
    with pytest.raises(DataError, match="this model takes"):
        eqm.sample(trained, start=torch.zeros(2, 3, 8, 8), updates=1)
    with pytest.raises(DataError, match="2 labels for 1 latent: give one each"):
        eqm.sample(trained, seeds=[0], labels=[1, 2], updates=1)


def test_half_precision_samples(tiny: chain.Chain) -> None:
    half = eqm.load(tiny.uri("train"), device="cpu", dtype=torch.bfloat16)
    found = eqm.sample(half, labels=[0, 1], seeds=[0, 1], updates=2)
    assert found.latents.dtype == torch.bfloat16
    assert found.images().dtype == torch.uint8


# -- the package --------------------------------------------------------------------------------


def test_importing_the_package_costs_nothing() -> None:
    code = "import sys, eqm; assert not {'torch', 'numpy'} & set(sys.modules), 'slow'; dir(eqm)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_public_names_are_there() -> None:
    for name in eqm.__all__:
        assert getattr(eqm, name) is not None
        assert name in dir(eqm)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = eqm.nothing
