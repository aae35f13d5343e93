"""Autoencoders: round trips, three files and back, and weights of others that are checked first."""

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from eqm.autoencoder import (
    Autoencoder,
    autoencoder_from_bytes,
    autoencoder_to_bytes,
    check_pretrained,
    for_latents,
    fresh_network,
    identity,
    load_autoencoder,
    pretrained,
    sealed_autoencoder,
    signed,
    to_uint8,
)
from eqm.config import AutoencoderFit, PretrainedFile, SourceConfig, replace
from eqm.errors import ConfigError, DataError, IntegrityError, MissingError
from eqm.latents import mean_latents
from eqm.records import Record, sha256
from eqm.storage import LocalStore, open_store

SOURCE = SourceConfig(image_size_px=8, channels=3, kind="folder")
FIT = AutoencoderFit(widths=(8, 16), latent_channels=2)


def network(seed: int = 0) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fresh_network(FIT, SOURCE)


def a_kl(seed: int = 0) -> Autoencoder:
    return sealed_autoencoder(
        network(seed), SOURCE, name="test-kl", shift=(0.5, -1.0), scale=(2.0, 0.25)
    )


def pixels(count: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=draw)


# -- maps ---------------------------------------------------------------------------------------


def test_the_identity_loses_nothing_even_through_float16() -> None:
    source = SourceConfig(image_size_px=16)
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    moments = identity(source).encode(images)
    assert moments.shape == (1, 2, 16, 16)
    assert (moments[:, 1] == 0).all()
    assert moments[0, 0, 0, 0] == -1
    assert moments[0, 0, -1, -1] == 1
    stored = moments.half()
    latents = mean_latents(stored, identity(source).spec)
    assert torch.equal(identity(source).decode(latents), images)


def test_pixels_are_cut_off_and_not_rounded() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 0.0039, 1.0, 2.0])
    assert to_uint8(x).tolist() == [0, 0, 128, 128, 255, 255]
    assert signed(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_moments_are_those_of_the_network() -> None:
    found = a_kl().encode(pixels())
    assert found.shape == (3, 4, 4, 4)
    assert found.dtype == torch.float32
    with torch.no_grad():
        posterior = network().eval().encode(signed(pixels())).latent_dist
    assert torch.equal(found, torch.cat([posterior.mean, posterior.std], dim=1))


@pytest.mark.parametrize(("log_variance", "std"), [(-100.0, math.exp(-15)), (100.0, math.exp(10))])
def test_log_variances_are_held_where_diffusers_holds_them(log_variance: float, std: float) -> None:
    odd = network()
    with torch.no_grad():
        odd.quant_conv.weight[2:] = 0  # type: ignore[index, operator]
        odd.quant_conv.bias[2:] = log_variance  # type: ignore[index, operator]
    made = sealed_autoencoder(odd, SOURCE, name="odd", shift=(0.0,) * 2, scale=(1.0,) * 2)
    found = made.encode(pixels())[:, 2:]
    assert torch.allclose(found, torch.full_like(found, std), rtol=1e-5)
    theirs = made.network.encode(signed(pixels())).latent_dist.std  # type: ignore[union-attr, operator]
    assert torch.allclose(found, theirs, rtol=1e-5)


def test_decoding_undoes_the_whitening() -> None:
    kl = a_kl()
    raw = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    shift, scale = (torch.tensor(x).view(1, 2, 1, 1) for x in (kl.spec.shift, kl.spec.scale))
    with torch.no_grad():
        expected = to_uint8(network().eval().decode(raw).sample)
    found = kl.decode((raw - shift) * scale)
    assert found.dtype == torch.uint8
    assert (found.int() - expected.int()).abs().max() <= 1
    assert (found != expected).float().mean() < 0.01


def test_a_batch_is_its_images_one_by_one() -> None:
    kl, images = a_kl(), pixels(5)
    together = kl.encode(images)
    one_by_one = torch.cat([kl.encode(image[None]) for image in images])
    assert torch.allclose(together, one_by_one, atol=1e-5)


def test_bfloat16_computes_near_and_hands_out_float32() -> None:
    exact = a_kl()
    half = exact.in_precision("bfloat16")
    assert exact.in_precision("float32") is exact
    assert half.spec == exact.spec
    assert {p.dtype for p in exact.network.parameters()} == {torch.float32}  # type: ignore[union-attr]
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}  # type: ignore[union-attr]
    images = pixels(16)
    expected, found = exact.encode(images), half.encode(images)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.1 * expected[:, :2].std()
    # The exponential of the deviation is one of float32, with values that bfloat16 has not.
    assert (found[:, 2:].bfloat16().float() != found[:, 2:]).any()
    latents = mean_latents(expected, exact.spec)
    near = half.decode(latents).int() - exact.decode(latents).int()
    assert near.abs().max() <= 4
    assert identity(SOURCE).in_precision("bfloat16").encode(images).dtype == torch.float32
    with pytest.raises(ConfigError, match="precision is 'float16'; it must be float32 or bfloat16"):
        exact.in_precision("float16")


def test_nothing_is_trained_and_no_knob_stays_turned() -> None:
    knob = torch.backends.mkldnn.conv  # type: ignore[attr-defined]
    before, kl = knob.fp32_precision, a_kl()
    kl.decode(mean_latents(kl.encode(pixels()), kl.spec))
    assert knob.fp32_precision == before
    assert not any(p.requires_grad for p in kl.network.parameters())  # type: ignore[union-attr]
    assert not kl.encode(pixels()).requires_grad
    assert kl.parameters == sum(p.numel() for p in network().parameters())
    assert identity(SOURCE).parameters == 0


def test_precision_chosen_for_training_does_not_reach_moments_and_images() -> None:
    """On a GPU: TF32 is on by default there, and no CPU would tell."""
    backends, kl, told = torch.backends, a_kl(), []
    knobs = (backends.cudnn.conv, backends.cuda.matmul)  # type: ignore[attr-defined]
    for part in (kl.network.encoder, kl.network.decoder):  # type: ignore[union-attr]
        part.register_forward_hook(lambda *_: told.append([k.fp32_precision for k in knobs]))
    before = [knob.fp32_precision for knob in knobs]
    try:
        for knob in knobs:
            knob.fp32_precision = "tf32"
        kl.decode(mean_latents(kl.encode(pixels()), kl.spec))
    finally:
        for knob, value in zip(knobs, before, strict=True):
            knob.fp32_precision = value
    assert told == [["ieee", "ieee"]] * 2


@pytest.mark.parametrize("make", [a_kl, lambda: identity(SOURCE)])
def test_images_and_latents_of_another_form_are_refused(make: object) -> None:
    made: Autoencoder = make()  # type: ignore[operator]
    for wrong in (pixels().float(), pixels()[:, :1], pixels()[..., :4], pixels()[0]):
        with pytest.raises(DataError, match=r"takes uint8 of shape \(B, 3, 8, 8\)"):
            made.encode(wrong)
    with pytest.raises(DataError, match="this autoencoder takes"):
        made.decode(torch.zeros(1, 5, 4, 4))


def test_sizes_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"image_size_px is 9; it must be a multiple of 2"):
        fresh_network(FIT, replace(SOURCE, image_size_px=9))


# -- three files and back -----------------------------------------------------------------------


@pytest.mark.parametrize("make", [a_kl, lambda: identity(SOURCE)])
def test_files_hold_all_of_it(make: object) -> None:
    made: Autoencoder = make()  # type: ignore[operator]
    files = autoencoder_to_bytes(made)
    assert files == autoencoder_to_bytes(make())  # type: ignore[operator]
    again = autoencoder_from_bytes(files)
    assert again.spec == made.spec
    assert torch.equal(again.encode(pixels()), made.encode(pixels()))
    assert autoencoder_to_bytes(again) == files


def test_loading_costs_no_random_number() -> None:
    files = autoencoder_to_bytes(a_kl())
    before = torch.random.get_rng_state()
    autoencoder_from_bytes(files)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_name_is_a_function_of_the_weights() -> None:
    assert a_kl(0).spec.autoencoder != a_kl(1).spec.autoencoder
    assert a_kl(0).spec.autoencoder.startswith("test-kl-")


def test_files_that_do_not_belong_together_are_refused() -> None:
    one, two = autoencoder_to_bytes(a_kl(0)), autoencoder_to_bytes(a_kl(1))
    for name in ("weights.safetensors", "spec.json"):
        with pytest.raises(IntegrityError, match="restore all three"):
            autoencoder_from_bytes({**one, name: two[name]})
    with pytest.raises(IntegrityError, match="belongs to autoencoder 'identity'"):
        autoencoder_from_bytes(
            {**one, "spec.json": autoencoder_to_bytes(identity(SOURCE))["spec.json"]}
        )
    for name in one:
        with pytest.raises(DataError, match=f"lacks {name}"):
            autoencoder_from_bytes({k: v for k, v in one.items() if k != name})


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors"])
def test_a_flipped_bit_is_noticed_by_the_name_in_the_spec(name: str) -> None:
    files = autoencoder_to_bytes(a_kl())
    for at in range(0, len(files[name]), max(1, len(files[name]) // 40)):
        bad = bytearray(files[name])
        bad[at] ^= 1
        with pytest.raises((IntegrityError, DataError)):
            autoencoder_from_bytes({**files, name: bytes(bad)})


def test_a_sealed_record_is_loaded_and_damage_to_it_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    outputs = {name: store.put(data) for name, data in autoencoder_to_bytes(a_kl()).items()}
    values = {"algorithm": 1, "config": {}, "inputs": {}, "outputs": outputs, "values": {}}
    record = store.seal(Record(stage="autoencoder", **values))
    assert torch.equal(load_autoencoder(record, store).encode(pixels()), a_kl().encode(pixels()))
    with pytest.raises(DataError, match="is no autoencoder"):
        load_autoencoder(Record(stage="train", **values), store)
    path = tmp_path / outputs["weights.safetensors"].key
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match="damaged"):
        load_autoencoder(record, store)


# -- weights that somebody else made ------------------------------------------------------------


def written(folder: Path, **changes: object) -> PretrainedFile:
    """A folder as diffusers writes it, with some settings of its config changed."""
    network().save_pretrained(folder)  # type: ignore[operator]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    weights = folder / "diffusion_pytorch_model.safetensors"
    return PretrainedFile(uri=str(folder), sha256=sha256(weights.read_bytes()))


def test_a_folder_of_diffusers_is_loaded(tmp_path: Path) -> None:
    file = written(tmp_path / "vae")
    found = pretrained(file, SOURCE)
    assert torch.equal(found.encode(pixels()), a_kl().encode(pixels()))
    assert found.spec.scale == (0.18215, 0.18215)
    assert found.spec.shift == (0.0, 0.0)
    assert found.spec.shape == (2, 4, 4)
    weights = replace(file, uri=f"{file.uri}/diffusion_pytorch_model.safetensors")
    assert pretrained(weights, SOURCE).spec == found.spec
    again = autoencoder_from_bytes(autoencoder_to_bytes(found))
    assert again.spec == found.spec


def test_latents_find_their_autoencoder_on_this_machine(tmp_path: Path) -> None:
    file = written(tmp_path / "vae")
    for place in (tmp_path / "vae", f"{file.uri}/diffusion_pytorch_model.safetensors"):
        found = for_latents(place, (2, 4, 4))
        assert found.spec == pretrained(file, SOURCE).spec
        assert torch.equal(found.encode(pixels()), a_kl().encode(pixels()))
    assert for_latents("identity", (3, 8, 8)).spec.image_size_px == 8
    with pytest.raises(DataError, match=r"shape \(1, 4, 12\) are not square, .* 127\.5 x \+ 128"):
        for_latents("identity", (1, 4, 12))
    with pytest.raises(ConfigError, match=r"makes latents of shape \(2, 4, 4\), and those"):
        for_latents(tmp_path / "vae", (4, 4, 4))
    with pytest.raises(DataError, match=r"there is no .*/nowhere; give 'identity'"):
        for_latents(tmp_path / "nowhere", (2, 4, 4))


def test_whitening_is_what_the_config_says(tmp_path: Path) -> None:
    one = pretrained(written(tmp_path / "a", scaling_factor=0.5, shift_factor=0.25), SOURCE)
    assert (one.spec.shift, one.spec.scale) == ((0.25, 0.25), (0.5, 0.5))
    each = written(
        tmp_path / "b", scaling_factor=3.0, latents_mean=[1.0, 2.0], latents_std=[4.0, 0.5]
    )
    two = pretrained(each, SOURCE)
    assert (two.spec.shift, two.spec.scale) == ((1.0, 2.0), (0.75, 6.0))
    with pytest.raises(DataError, match="does not say how 2 channels"):
        pretrained(written(tmp_path / "c", latents_std=[1.0]), SOURCE)


def test_names_that_attentions_had_before_are_understood(tmp_path: Path) -> None:
    file = written(tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    # Written out: a mapping of one's own, read backwards, undoes its mistakes.
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in safetensors.torch.load(path.read_bytes()).items():
        for new, short in old.items():
            if f".{new}." in name:
                name = name.replace(f".{new}.", f".{short}.")
        tensors[name] = value
    assert any(".query." in name for name in tensors)
    path.write_bytes(safetensors.torch.save(tensors))
    found = pretrained(replace(file, sha256=sha256(path.read_bytes())), SOURCE)
    assert torch.equal(found.encode(pixels()), a_kl().encode(pixels()))


def test_the_digest_is_checked_before_anything_is_parsed(tmp_path: Path) -> None:
    file = written(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(
        IntegrityError, match=rf"has SHA-256 .*, but the sha256 given with it is {file.sha256}"
    ):
        pretrained(file, SOURCE)
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        pretrained(replace(file, sha256=sha256(weights.read_bytes())), SOURCE)


def test_places_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    none = "0" * 64
    with pytest.raises(DataError, match=r"there is no such file or folder$"):
        pretrained(PretrainedFile(uri=str(tmp_path / "x"), sha256=none), SOURCE)
    with pytest.raises(DataError, match=r"to take it from the hub, give its revision"):
        pretrained(PretrainedFile(uri="owner/name", sha256=none), SOURCE)
    with pytest.raises(ConfigError, match="a path, s3://"):
        pretrained(PretrainedFile(uri="https://host/x.safetensors", sha256=none), SOURCE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match="does not exist"):
        pretrained(PretrainedFile(uri=str(tmp_path / "empty"), sha256=none), SOURCE)


@pytest.mark.parametrize("uri", ["local", pytest.param("s3", marks=pytest.mark.services)])
def test_a_file_is_checked_without_being_kept(
    uri: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path)
    if uri == "s3":
        request.getfixturevalue("s3_environment")
        root = f"s3://eqm/test-{tmp_path.name}"
    data, name = b"weights", "w.safetensors"
    open_store(root).write_once(name, data)
    check_pretrained(PretrainedFile(uri=f"{root}/{name}", sha256=sha256(data)))
    for file, why in (
        (PretrainedFile(uri=f"{root}/none.safetensors", sha256=sha256(data)), "there is no such"),
        (PretrainedFile(uri=f"{root}/{name}", sha256="0" * 64), "has SHA-256"),
    ):
        # A bucket's bytes are read once, by whoever needs them.
        if uri == "local" or why != "has SHA-256":
            with pytest.raises((DataError, IntegrityError), match=why):
                check_pretrained(file)


def test_a_hub_that_cannot_be_reached_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no way out")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    file = PretrainedFile(uri="owner/name/vae", sha256="0" * 64, revision="abc")
    with pytest.raises(DataError, match=r"of owner/name/vae@abc cannot be had .*no way out"):
        pretrained(file, SOURCE)


def test_the_hub_is_asked_for_that_revision_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    file = written(tmp_path / "vae")
    asked = []

    def served(repository: str, name: str, *, revision: str, repo_type: str) -> str:
        asked.append((repository, name, revision, repo_type))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", served)
    found = pretrained(replace(file, uri="owner/name/vae", revision="r1"), SOURCE)
    assert found.spec.shape == (2, 4, 4)
    assert asked[0] == ("owner/name", "vae/diffusion_pytorch_model.safetensors", "r1", "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 1}, "source.channels is 1, but .* has in_channels 3"),
        ({"image_size_px": 9}, "it must be a multiple of 2"),
    ],
)
def test_images_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pretrained(written(tmp_path / "vae"), replace(SOURCE, **changes))


def test_an_autoencoder_of_other_pictures_out_than_in_is_refused(tmp_path: Path) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    AutoencoderKL(**{**network().config, "out_channels": 1}).save_pretrained(tmp_path / "vae")  # type: ignore[dict-item]
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    file = PretrainedFile(uri=str(weights.parent), sha256=sha256(weights.read_bytes()))
    with pytest.raises(ConfigError, match=r"source\.channels is 3, but .* has out_channels 1"):
        pretrained(file, SOURCE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 3}, "weight .* has shape"),
        ({"block_out_channels": [8, 2**14]}, "weight .* has shape"),
        ({"block_out_channels": [8, 2**40]}, "is not the config of an AutoencoderKL"),
        ({"layers_per_block": 2}, "has shape none"),
        ({"what": 1}, "is not the config of an AutoencoderKL"),
        ({"norm_num_groups": 7}, "is not the config of an AutoencoderKL"),
    ],
)
def test_a_config_of_other_weights_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        pretrained(written(tmp_path / "vae", **changes), SOURCE)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    tensors["quant_conv.bias"][0] = float("nan")
    path.write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(DataError, match=r"'quant_conv.bias' .* holds NaN"):
        pretrained(replace(file, sha256=sha256(path.read_bytes())), SOURCE)
