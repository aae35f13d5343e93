"""Fitting: one seed gives one set of weights, latents of unit variance, all sealed alike."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from eqm import fit, images, stage
from eqm.autoencoder import fresh_network, load_autoencoder
from eqm.config import (
    AutoencoderConfig,
    AutoencoderFit,
    AutoencoderStage,
    ExtractorConfig,
    ExtractorFit,
    ExtractorStage,
    Job,
    PretrainedFile,
    Runtime,
    SourceConfig,
    replace,
    tiny,
)
from eqm.errors import DataError, IntegrityError
from eqm.features import CNNExtractor, extractor_from_bytes, load_extractor
from eqm.latents import sample_latents
from eqm.records import Record, Ref, sha256, to_json
from eqm.storage import LocalStore
from eqm.vision_transformer import DINOv2

SOURCE = SourceConfig()
SMALL = AutoencoderFit(widths=(8,), images=640, batch_size=32, learning_rate=8e-3)


def a_job(
    folder: Path, config: AutoencoderConfig | ExtractorConfig, source: SourceConfig = SOURCE
) -> Job:
    listing = images.open_source(source, None).digest
    made: Any
    if isinstance(config, AutoencoderConfig):
        name, made = "autoencoder", AutoencoderStage(source=source, autoencoder=config)
    else:
        name, made = "extractor", ExtractorStage(source=source, extractor=config)
    return Job(
        stage=name,
        config=to_json(made),
        inputs={"source": Ref(stage="source", digest=listing, content=listing)},
        runtime=Runtime(store=str(folder / "store"), device="cpu", threads=1),
    )


def run(folder: Path, config: Any, source: SourceConfig = SOURCE) -> Record:
    return stage.run(a_job(folder, config, source), fit.program)


def pixels_of(source: images.ImageSource, *, held_out: bool) -> torch.Tensor:
    return torch.stack([source.read(i) for i in source.numbers(held_out=held_out)])


# -- autoencoder --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    folder = tmp_path_factory.mktemp("fitted")
    return folder, run(folder, AutoencoderConfig(fit=SMALL))


def test_a_fitted_autoencoder_reconstructs(fitted: tuple[Path, Record]) -> None:
    folder, record = fitted
    assert record.values["psnr_db"] > 17
    assert record.values["measured_on"] == "held-out images"
    assert record.values["measured_images"] == 365
    made = load_autoencoder(record, LocalStore(folder / "store"))
    assert record.values["parameters"] == made.parameters > 0
    assert made.spec.shape == (4, 16, 16)
    held = pixels_of(images.open_source(SOURCE, None), held_out=True)
    error = (fit.reconstructed(made, held).double() - held.double()).square().mean()
    assert abs(10 * np.log10(255**2 / float(error)) - record.values["psnr_db"]) < 1e-6


def test_its_latents_have_mean_0_and_variance_1(fitted: tuple[Path, Record]) -> None:
    folder, record = fitted
    made = load_autoencoder(record, LocalStore(folder / "store"))
    train = pixels_of(images.open_source(SOURCE, None), held_out=False)
    moments = made.encode(train)
    noise = torch.randn(len(train), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = sample_latents(moments, noise, made.spec)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.01
    assert (latents.var(dim=(0, 2, 3)) - 1).abs().max() < 0.01


def test_two_fits_give_the_same_bytes_whatever_the_generator_was_at(
    fitted: tuple[Path, Record], tmp_path: Path
) -> None:
    torch.manual_seed(12345)
    before = torch.random.get_rng_state()
    again = run(tmp_path, AutoencoderConfig(fit=SMALL))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (again.outputs, again.values) == (fitted[1].outputs, fitted[1].values)
    other = run(tmp_path, AutoencoderConfig(fit=replace(SMALL, seed=1)))
    assert other.outputs["weights.safetensors"] != again.outputs["weights.safetensors"]


def folder_job(folder: Path, config: Any, source: SourceConfig) -> Job:
    uri = str(folder / "data")
    listing = images.open_source(source, uri).digest
    job = a_job(folder, config)
    return replace(
        job,
        config={**job.config, "source": to_json(source)},
        inputs={"source": Ref(stage="source", digest=listing, content=listing)},
        runtime=Runtime(store=str(folder / "store"), source_uri=uri, device="cpu", threads=1),
    )


@pytest.mark.parametrize(
    "config",
    [
        AutoencoderConfig(fit=replace(SMALL, images=96)),
        ExtractorConfig(fit=ExtractorFit(width=8, dimension=8, images=96)),
    ],
)
def test_held_out_images_change_nothing_that_is_fitted(tmp_path: Path, config: Any) -> None:
    source = SourceConfig(kind="folder", image_size_px=8, channels=3, held_out_fraction=0.5)
    for i in range(40):
        name = tmp_path / "data" / ("cat", "dog")[i % 2] / f"{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (6 * i, 250 - 6 * i, 128)).save(name)
    one = stage.run(folder_job(tmp_path, config, source), fit.program)
    for entry in images.open_source(source, str(tmp_path / "data")).entries:
        if entry.held_out:
            Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "data" / entry.key)
    two = stage.run(folder_job(tmp_path, config, source), fit.program)
    assert one.digest != two.digest
    assert one.values != two.values  # what is measured on them does change
    assert one.outputs == two.outputs


def test_the_identity_is_sealed_the_same_way(tmp_path: Path) -> None:
    record = run(tmp_path, AutoencoderConfig(kind="identity"))
    assert record.outputs.keys() == {"config.json", "weights.safetensors", "spec.json"}
    assert record.values["psnr_db"] is None
    assert record.values["rms_error"] == 0
    assert record.values["parameters"] == 0
    made = load_autoencoder(record, LocalStore(tmp_path / "store"))
    assert made.spec.autoencoder == "identity"


def test_weights_of_others_are_sealed_the_same_way(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        network: Any = fresh_network(SMALL, SOURCE)
    network.save_pretrained(tmp_path / "vae")
    weights = (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    file = PretrainedFile(uri=str(tmp_path / "vae"), sha256=sha256(weights))
    record = run(tmp_path, AutoencoderConfig(kind="pretrained", pretrained=file))
    made = load_autoencoder(record, LocalStore(tmp_path / "store"))
    assert made.spec.scale == (0.18215,) * 4
    assert record.values["psnr_db"] < 20
    wrong = replace(file, sha256="0" * 64)
    with pytest.raises(IntegrityError, match=r"given with it is 0000"):
        run(tmp_path, AutoencoderConfig(kind="pretrained", pretrained=wrong))


def test_a_fit_that_diverges_is_refused(tmp_path: Path) -> None:
    wild = replace(SMALL, learning_rate=1e30, images=256)
    with pytest.raises(DataError, match=r"learning_rate"):
        run(tmp_path, AutoencoderConfig(fit=wild))
    assert LocalStore(tmp_path / "store").list("autoencoder/") == []


def test_images_that_changed_are_refused(tmp_path: Path) -> None:
    job = a_job(tmp_path, AutoencoderConfig(kind="identity"))
    other = replace(job, inputs={"source": Ref(stage="source", digest="0" * 64, content="0" * 64)})
    with pytest.raises(DataError, match="the images changed since this run was configured"):
        stage.run(other, fit.program)


def test_images_beyond_memory_are_read_again_for_each_use(
    tmp_path: Path, fitted: tuple[Path, Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "KEPT_BYTES", 1000)
    again = run(tmp_path, AutoencoderConfig(fit=SMALL))
    assert again.outputs == fitted[1].outputs


def test_without_held_out_images_the_training_images_are_measured(tmp_path: Path) -> None:
    source = replace(SOURCE, held_out_fraction=0.0, image_size_px=8)
    record = run(tmp_path, AutoencoderConfig(kind="identity"), source)
    assert record.values["measured_on"] == "training images"
    assert record.values["measured_images"] == 1797


# -- extractor ----------------------------------------------------------------------------------

QUICK = ExtractorFit(width=8, dimension=16, images=4000, batch_size=32, learning_rate=8e-3)


def test_an_extractor_learns_and_is_sealed(tmp_path: Path) -> None:
    record = run(tmp_path, ExtractorConfig(fit=QUICK))
    assert record.values["accuracy"] > 0.6
    assert record.values["name"] == "digits-cnn"
    assert record.values["dimension"] == 16
    store = LocalStore(tmp_path / "store")
    made = load_extractor(record, store, torch.device("cpu"))
    assert made.digest == record.values["digest"]
    files = [store.get(record.outputs[n]) for n in ("weights.safetensors", "config.json")]
    extractor = CNNExtractor(extractor_from_bytes(*files), "x")
    source = images.open_source(SOURCE, None)
    held = pixels_of(source, held_out=True)
    labels = torch.tensor([source.entries[i].label for i in source.numbers(held_out=True)])
    right = (extractor.logits(held).argmax(dim=1) == labels).double().mean()
    assert abs(float(right) - record.values["accuracy"]) < 1e-12


def test_two_extractors_are_the_same_bytes(tmp_path: Path) -> None:
    config = ExtractorConfig(fit=replace(QUICK, images=320))
    one, two = run(tmp_path / "one", config), run(tmp_path / "two", config)
    assert (one.outputs, one.values) == (two.outputs, two.values)
    other = run(tmp_path / "one", ExtractorConfig(fit=replace(QUICK, images=320, seed=1)))
    assert other.values["digest"] != one.values["digest"]


def test_inception_weights_are_checked_before_they_are_parsed(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors.torch.save({"x": torch.zeros(1)}))
    file = PretrainedFile(uri=str(path), sha256="0" * 64)
    with pytest.raises(IntegrityError, match=r"given with it is 0000"):
        run(tmp_path, ExtractorConfig(kind="inception", pretrained=file))
    right = replace(file, sha256=sha256(path.read_bytes()))
    with pytest.raises(DataError, match="these tensors are not the network's"):
        run(tmp_path, ExtractorConfig(kind="inception", pretrained=right))


def snapshot(folder: Path) -> tuple[Path, str]:
    """A model as the hub's own client keeps it: links to files that are named by their digests."""
    state = {
        k: torch.full_like(v, 0.01) for k, v in DINOv2(384, 1, gated=False).state_dict().items()
    }
    data = safetensors.torch.save(state)
    cached = folder / "models--somebody--dinov2-small"
    here, blob = cached / "snapshots" / ("c" * 40), cached / "blobs" / sha256(data)
    for made in (here, blob.parent):
        made.mkdir(parents=True)
    blob.write_bytes(data)
    (here / "model.safetensors").symlink_to(blob)
    return here, sha256(data)


def test_weights_of_an_extractor_come_from_a_folder_of_the_hub(tmp_path: Path) -> None:
    here, digest = snapshot(tmp_path)
    found = {}
    # The folder, the file in it, and the bare blob, whose name does not say what it is.
    for place in (here, here / "model.safetensors", (here / "model.safetensors").resolve()):
        file = PretrainedFile(uri=str(place), sha256=digest)
        record = run(tmp_path / "made", ExtractorConfig(kind="dinov2", pretrained=file))
        found[record.digest] = (record.values, record.outputs)
    assert len(found) == 3
    values, outputs = next(iter(found.values()))
    assert all(one == (values, outputs) for one in found.values())
    assert values["name"] == "dinov2-vit-s-14"
    assert outputs["weights.safetensors"].sha256 == digest
    wrong = PretrainedFile(uri=str(here), sha256="0" * 64)
    with pytest.raises(IntegrityError, match=r"given with it is 0000"):
        run(tmp_path, ExtractorConfig(kind="dinov2", pretrained=wrong))


def test_a_folder_with_pickled_weights_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"x")
    file = PretrainedFile(uri=str(tmp_path / "old"), sha256="0" * 64)
    told = r"no model\.safetensors \(it has pytorch_model\.bin\): pickled weights .* are not read"
    with pytest.raises(DataError, match=told):
        run(tmp_path, ExtractorConfig(kind="clip", pretrained=file))


def test_a_hub_id_needs_a_revision_and_a_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = PretrainedFile(uri="somebody/dinov2-small", sha256="0" * 64)
    with pytest.raises(DataError, match=r"no such file or folder; to take it .* give its revision"):
        run(tmp_path, ExtractorConfig(kind="dinov2", pretrained=bare))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    away = replace(bare, revision="c" * 40)
    with pytest.raises(
        DataError,
        match=r"(?s)model\.safetensors of somebody/dinov2-small@c.* cannot be had .*give its path",
    ):
        run(tmp_path, ExtractorConfig(kind="dinov2", pretrained=away))


def test_a_file_of_the_hub_is_taken_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights as their authors released them, wherever somebody keeps a copy."""
    here, _ = snapshot(tmp_path)
    state = safetensors.torch.load_file(here / "model.safetensors")
    (here / "released").mkdir()
    torch.save(state, here / "released" / "small.pth")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    file = PretrainedFile(
        uri="somebody/dinov2-small/released/small.pth",
        sha256=sha256((here / "released" / "small.pth").read_bytes()),
        revision="c" * 40,
    )
    record = run(tmp_path / "made", ExtractorConfig(kind="dinov2", pretrained=file))
    assert record.outputs["weights.pth"].sha256 == file.sha256
    assert record.values["name"] == "dinov2-vit-s-14"
    wrong = replace(file, sha256="0" * 64)
    with pytest.raises(IntegrityError, match=r"given with it is 0000"):
        run(tmp_path, ExtractorConfig(kind="dinov2", pretrained=wrong))
    gone = replace(file, uri="somebody/dinov2-small/released/large.pth")
    told = r"large\.pth of somebody/dinov2-small/released@c.* cannot be had from the hub"
    with pytest.raises(DataError, match=told):
        run(tmp_path, ExtractorConfig(kind="dinov2", pretrained=gone))


def test_one_class_gives_nothing_to_tell_apart(tmp_path: Path) -> None:
    (tmp_path / "data" / "only").mkdir(parents=True)
    for i in range(8):
        Image.new("L", (16, 16), i).save(tmp_path / "data" / "only" / f"{i}.png")
    source = replace(SOURCE, kind="folder", held_out_fraction=0.0)
    job = folder_job(tmp_path, ExtractorConfig(fit=QUICK), source)
    with pytest.raises(DataError, match="the source has only only"):
        stage.run(job, fit.program)


# -- the parts ----------------------------------------------------------------------------------


def drawn(count: int, size: int = 32) -> fit.Drawn:
    ramp = torch.arange(size * size).view(1, 1, size, size).expand(count, 2, -1, -1) % 251
    return fit.Drawn(torch.arange(count), ramp.to(torch.uint8), torch.zeros(count).long())


def test_augmented_images_are_moved_by_whole_pixels_and_no_further() -> None:
    given = drawn(200)
    found = fit.augmented(given, 0, mirror=False)
    moves = set()
    for image in found[:, 0]:
        here = [
            (y, x)
            for y in range(-2, 3)
            for x in range(-2, 3)
            if torch.equal(image[4:-4, 4:-4], given.images[0, 0].roll((y, x), (0, 1))[4:-4, 4:-4])
        ]
        assert len(here) == 1
        moves.add(here[0])
    assert len(moves) == 25
    assert torch.equal(found[:, 0], found[:, 1])
    assert torch.equal(found, fit.augmented(given, 0, mirror=False))


def test_mirrors_are_seen_where_they_are_of_the_class() -> None:
    given = drawn(400)
    plain, found = (fit.augmented(given, 0, mirror=m) for m in (False, True))
    same = (plain == found).flatten(1).all(dim=1)
    assert 0.4 < same.double().mean() < 0.6
    assert torch.equal(found[~same], plain[~same].flip(-1))


@pytest.mark.parametrize("mirror", [True, False])
def test_an_extractor_sees_mirrors_only_where_its_source_says_so(
    mirror: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    augmented = fit.augmented
    monkeypatch.setattr(
        fit,
        "augmented",
        lambda drawn, seed, *, mirror: told.append(mirror) or augmented(drawn, seed, mirror=mirror),
    )
    source = SourceConfig(kind="folder", image_size_px=8, channels=3, mirror=mirror)
    for i in range(40):
        name = tmp_path / "data" / ("cat", "dog")[i % 2] / f"{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 6 * i, dtype=np.uint8)).save(name)
    small = ExtractorFit(width=8, dimension=8, images=64)
    stage.run(folder_job(tmp_path, ExtractorConfig(fit=small), source), fit.program)
    assert set(told) == {mirror}


def test_every_image_is_drawn_once_an_epoch_in_an_order_of_the_seed() -> None:
    class Ten:
        labels = torch.arange(10)

        def __len__(self) -> int:
            return 10

        def at(self, positions: Any) -> torch.Tensor:
            return torch.from_numpy(positions)

    def epochs(seed: int) -> list[list[int]]:
        settings: Any = AutoencoderFit(batch_size=5, seed=seed)
        batches = [fit.draw(Ten(), settings, update) for update in range(4)]  # type: ignore[arg-type]
        assert [batch.numbers.tolist() for batch in batches][1] == [5, 6, 7, 8, 9]
        assert all(torch.equal(batch.images, batch.labels) for batch in batches)
        found = torch.cat([batch.labels for batch in batches]).tolist()
        return [found[:10], found[10:]]

    first, second = epochs(0)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert epochs(1) != epochs(0) == [first, second]


def test_the_rate_rises_and_falls() -> None:
    rates = [fit.rate(u, 200) for u in range(200)]
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert max(rates) > 0.98
    assert rates.index(max(rates)) in range(8, 12)
    assert 0 < rates[-1] < 1e-3
    assert fit.rate(0, 1) == 1.0


def test_the_loss_is_that_of_a_variational_autoencoder() -> None:
    class Known:
        """Mean 0.5, standard deviation 2; decodes to zeros."""

        def encode(self, x: torch.Tensor) -> Any:
            mean, var = torch.full((len(x), 1, 2, 2), 0.5), torch.full((len(x), 1, 2, 2), 4.0)
            posterior = type("P", (), {"mean": mean, "std": var.sqrt(), "var": var})
            posterior.logvar = var.log()  # type: ignore[attr-defined]
            return type("E", (), {"latent_dist": posterior})

        def decode(self, _: torch.Tensor) -> Any:
            return type("D", (), {"sample": torch.zeros(3, 1, 4, 4)})

    given = fit.Drawn(
        torch.arange(3), torch.full((3, 1, 4, 4), 255, dtype=torch.uint8), torch.zeros(3)
    )
    network: Any = Known()
    loss = fit.autoencoder_loss(network, given, replace(SMALL, kl_weight=0.1))
    divergence = 0.5 * (0.25 + 4 - 1 - np.log(4))
    assert float(loss) == pytest.approx(1 + 0.1 * divergence, rel=1e-6)


def test_the_program_runs_as_a_program(tmp_path: Path) -> None:
    job = a_job(tmp_path, ExtractorConfig(fit=tiny().extractor.fit))
    path = tmp_path / "job.json"
    path.write_text(json.dumps(to_json(job)))
    line = [sys.executable, "-m", "eqm.fit", str(path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    record = LocalStore(tmp_path / "store").record("extractor", stage.job_digest(job))
    assert record is not None
    assert record == stage.run(job, fit.program)
