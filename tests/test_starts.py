"""Samples that start at held-out images, partly noised (Figure 10)."""

from pathlib import Path

import chain
import numpy as np
import pytest
import torch

import eqm
from eqm import generate, samples, starts
from eqm.config import demo, with_settings
from eqm.errors import ConfigError, DataError
from eqm.latents import mean_latents
from eqm.sampler import start_noise


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.getbasetemp() / "chain", until="samples")


def test_a_start_is_the_image_at_level_0_and_mixes_evenly(tiny: chain.Chain) -> None:
    held = starts.held_out_of(tiny.store, tiny["train"], 0.5)
    assert held is not None
    model = eqm.load(tiny.uri("train"), device="cpu")
    count = len(held.held_out_numbers)
    seeds = [0, 3, count + 3]
    numbers = held.held_out_numbers[[0, 3, 3]]
    images = mean_latents(torch.from_numpy(held.moments(numbers)), held.manifest.spec)
    noise = start_noise(torch.tensor(seeds), tuple(images.shape[1:]))
    assert torch.equal(starts.partly_noised(held, model, seeds, 0.0), images)
    # The same image twice, and noise of each sample's own: the noise it would start from alone.
    mixed = starts.partly_noised(held, model, seeds, 0.25)
    assert torch.equal(mixed, 0.75 * images + 0.25 * noise)
    assert not torch.equal(mixed[1], mixed[2])
    labels = starts.labels_of_held_out(held, seeds)
    assert labels.tolist() == held.labels[numbers].tolist()
    assert np.all(held.held_out[numbers])


def test_noise_alone_asks_for_no_images(tiny: chain.Chain) -> None:
    assert starts.held_out_of(tiny.store, tiny["train"], 1.0) is None


def test_the_stage_starts_there_and_makes_samples_again_to_the_bit(
    tiny: chain.Chain, tmp_path: Path
) -> None:
    config = with_settings(tiny.config, {"generate.noise_level": 0.25})
    store = chain.copied(tiny, tmp_path / "store", without=("samples", "evaluation"))
    record = chain.run(chain.job(config, store, "samples", tiny.records))
    held = starts.held_out_of(store, tiny["train"], 0.25)
    assert held is not None
    seeds = [1, 21, 47]
    sealed = samples.columns(store, record)
    assert sealed["labels"][seeds].tolist() == starts.labels_of_held_out(held, seeds).tolist()
    again = generate.remake(store, record, seeds, exact=True)
    kept = samples.kept(store, record, seeds)
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    noise_alone = samples.columns(tiny.store, tiny["samples"])
    assert not torch.equal(sealed["gradient_norms"], noise_alone["gradient_norms"])


def test_samples_that_start_at_the_same_image_are_told_of(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    held = starts.held_out_of(tiny.store, tiny["train"], 0.25)
    assert held is not None
    count = len(held.held_out_numbers)
    assert starts.told_of_repeats(held, count, 0.25) is None
    assert starts.told_of_repeats(None, count + 1, 1.0) is None
    told = starts.told_of_repeats(held, count + 1, 0.0)
    assert told is not None
    assert f"samples is {count + 1}, and there are {count} held-out images" in told
    assert "are exact copies" in told
    # The stage says so, and goes on.
    config = with_settings(tiny.config, {"generate.noise_level": 0.25})
    held.held_out_numbers = held.held_out_numbers[: config.generate.samples - 1]
    monkeypatch.setattr(starts, "open_manifest", lambda record, store: held)
    store = chain.copied(tiny, tmp_path / "store", without=("samples", "evaluation"))
    chain.run(chain.job(config, store, "samples", tiny.records))
    assert "warning: generate.samples is" in capfd.readouterr().err


def test_a_set_without_held_out_images_is_refused(
    tiny: chain.Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = starts.held_out_of(tiny.store, tiny["train"], 0.5)
    assert held is not None
    held.held_out_numbers = held.held_out_numbers[:0]
    monkeypatch.setattr(starts, "open_manifest", lambda record, store: held)
    with pytest.raises(DataError, match=r"noise_level is 0\.5, which needs held-out images"):
        starts.held_out_of(tiny.store, tiny["train"], 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generate.noise_level": 1.5}, r"generate\.noise_level is 1\.5; it must be from 0 to 1"),
        (
            {"generate.noise_level": 0.5, "generate.sampler.stop_below": 1.0},
            r"noise_level is 0\.5; it must be 1 for samples that stop",
        ),
    ],
)
def test_levels_that_cannot_be_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_settings(demo(), changes)
