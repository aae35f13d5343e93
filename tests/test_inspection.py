"""What is told of a set of latents: each figure from numbers that are known, each warning alone."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image
from sets import a_spec, stored_set

from eqm import autoencoder, inspection
from eqm.config import SourceConfig
from eqm.inspection import preview, statistics
from eqm.latent_set import LatentSet
from eqm.records import Record
from eqm.shards import MANIFEST, ORIGINALS, Sample, manifest_from_bytes
from eqm.storage import LocalStore

SHAPE = (4, 2, 2)
CLASSES = ("a", "b", "c")


def some(count: int = 20) -> list[Sample]:
    """Means of two channels with spreads of their own, standard deviations beside them."""
    draw = np.random.default_rng(0)
    means = draw.normal([[[[1.0]], [[-2.0]]]], [[[[0.5]], [[3.0]]]], (count, 2, 2, 2))
    stds = draw.uniform(0.1, 0.3, (count, 2, 2, 2))
    moments = np.concatenate([means, stds], axis=1).astype(np.float16)
    return [Sample(f"k/{i}", i % 3, i % 5 == 4, moments[i]) for i in range(count)]


def a_set(folder: Path, samples: list[Sample], **changes: Any) -> LatentSet:
    store = LocalStore(folder)
    files = stored_set(store, samples, 6, classes=CLASSES)
    manifest = manifest_from_bytes(files[MANIFEST], "m")
    return LatentSet(dataclasses.replace(manifest, **changes), store, "the set")


def warnings_of(folder: Path, samples: list[Sample], **changes: Any) -> tuple[str, ...]:
    # Channel 1 has a spread of 3: with this scale all is well.
    scaled = a_spec((2, 2, 2), scale=(1.0, 0.25))
    return statistics(a_set(folder, samples, **{"spec": scaled, **changes})).warnings


def test_figures_are_those_of_all_samples(tmp_path: Path) -> None:
    samples = some()
    spec = a_spec((2, 2, 2), shift=(1.0, -2.0), scale=(2.0, 0.25))
    found = statistics(a_set(tmp_path, samples, spec=spec))
    moments = np.stack([sample.moments for sample in samples]).astype(np.float64)
    means, stds, over = moments[:, :2], moments[:, 2:], (0, 2, 3)
    assert found.looked_at == found.images == 20
    assert (found.train, found.held_out, found.classes) == (16, 4, 3)
    assert (found.smallest, found.largest) == (("b", 5), ("a", 6))
    assert np.allclose(found.mean, means.mean(over), rtol=1e-6)
    assert np.allclose(found.std, means.std(over), rtol=1e-6)
    assert np.allclose(found.low, means.min(over))
    assert np.allclose(found.high, means.max(over))
    assert np.allclose(found.posterior_std, stds.mean(over), rtol=1e-6)
    assert np.allclose(found.whitened_std, means.std(over) * [2.0, 0.25], rtol=1e-6)
    assert found.saturated == 0
    assert found.warnings == ()


def test_of_a_large_set_some_are_looked_at_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "LOOKED_AT", 10)
    monkeypatch.setattr(inspection, "READ_AT_ONCE", 4)
    asked: list[int] = []
    real = LatentSet.moments

    def seen(self: LatentSet, numbers: Any, mirror: Any = None) -> Any:
        asked.extend(numbers.tolist())
        return real(self, numbers, mirror)

    monkeypatch.setattr(LatentSet, "moments", seen)
    found = statistics(a_set(tmp_path, some()))
    assert found.looked_at == len(set(asked)) == len(asked) == 10
    assert max(asked) > 10
    assert found.images == 20


def changed(at: tuple[int, int, int], value: float) -> list[Sample]:
    samples = some()
    samples[7].moments[at] = value
    return samples


@pytest.mark.parametrize(
    ("at", "value", "told"),
    [
        ((0, 1, 1), 20_000.0, True),
        ((1, 0, 0), -20_000.0, True),
        ((0, 1, 1), 100.0, False),
        ((2, 0, 1), 5e-7, True),
        ((3, 0, 1), 20_000.0, True),
        ((2, 0, 1), 0.0, False),
        ((2, 0, 1), 1e-4, False),
    ],
)
def test_moments_near_the_ends_of_their_range_are_told(
    tmp_path: Path, at: tuple[int, int, int], value: float, told: bool
) -> None:
    warnings = warnings_of(tmp_path, changed(at, value))
    ends = [line for line in warnings if "0.62% of the moments are near the ends" in line]
    # 1 of 20 x 2 x 2 x 2 pairs of mean and standard deviation.
    assert len(ends) == told


def test_channels_that_are_constant_or_badly_scaled_are_told(tmp_path: Path) -> None:
    def told(folder: str, factor: float, scale: float) -> tuple[str, ...]:
        samples = some()
        for sample in samples:
            sample.moments[0] = 1 + factor * (sample.moments[0] - 1)
        return warnings_of(tmp_path / folder, samples, spec=a_spec((2, 2, 2), scale=(scale, 0.25)))

    assert told("well", 1.0, 1.0) == ()
    (constant,) = told("constant", 0.0, 1.0)
    assert constant.startswith("channel 0 is constant (standard deviation 0)")
    for scale in (0.1, 20.0):
        (badly,) = told(f"scale {scale}", 1.0, scale)
        assert badly.startswith("channel 0 has standard deviation")
        assert "after whitening, about 1 is expected" in badly


def of_classes(*counts: int) -> list[Sample]:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return [
        dataclasses.replace(sample, label=label, held_out=False)
        for sample, label in zip(some(len(labels)), labels, strict=True)
    ]


def test_classes_that_are_small_or_empty_and_what_was_left_out_are_told(tmp_path: Path) -> None:
    assert warnings_of(tmp_path / "10", of_classes(20, 5, 2)) == ()
    (told,) = warnings_of(tmp_path / "11", of_classes(22, 5, 2))
    assert told.startswith("the largest class has 11 times the images of the smallest")
    (told,) = warnings_of(tmp_path / "0", of_classes(6, 0, 6))
    assert told == "classes without a training image: b"
    (told,) = warnings_of(tmp_path / "skip", some(), skipped=("x", "y"))
    assert told == "2 images left out that could not be decoded"


# -- the picture --------------------------------------------------------------------------------


def test_a_preview_has_each_image_above_what_its_own_latents_show(tmp_path: Path) -> None:
    """Pixels of the identity, mirrors too: each band is image, the same, and the same mirrored."""
    source = SourceConfig(kind="folder", image_size_px=8, channels=3, mirror=True)
    identity, store = autoencoder.identity(source), LocalStore(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3, 8, 8), dtype=np.uint8)
    moments = _encoded(identity, pixels)
    mirrors = _encoded(identity, pixels[..., ::-1].copy())
    samples = [Sample(f"{i}", i % 3, False, moments[i], mirrors[i]) for i in range(10)]
    files = stored_set(store, samples, 4, classes=CLASSES)
    made = store.seal(_record("autoencoder", autoencoder.autoencoder_to_bytes(identity), store))
    manifest = dataclasses.replace(
        manifest_from_bytes(files[MANIFEST], "m"),
        spec=identity.spec,
        lineage={"autoencoder": made.ref},
    )
    shown = {"numbers": np.array([1, 4, 6, 9]), "pixels": pixels[[1, 4, 6, 9]]}
    data = LatentSet(manifest, store, "the set")
    drawn: list[tuple[np.ndarray, list[str], int]] = []
    real = inspection.sample_grid
    record = _record("latents", {ORIGINALS: safetensors.numpy.save(shown)}, store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspection, "sample_grid", lambda *given: drawn.append(given) or real(*given))
        png = preview(data, record, store, columns=2)
    assert Image.open(io.BytesIO(png)).width > 2 * 96
    ((grid, names, scale),) = drawn
    assert (names, scale) == (["image", "decoded", "mirror"] * 2, 12)
    for band, numbers in enumerate(([1, 4], [6, 9])):
        image, decoded, mirror = grid[3 * band : 3 * band + 3]
        assert np.array_equal(image, pixels[numbers])
        assert np.array_equal(decoded, pixels[numbers])
        assert np.array_equal(mirror, pixels[numbers][..., ::-1])


def _encoded(made: autoencoder.Autoencoder, pixels: np.ndarray) -> np.ndarray:
    return made.encode(torch.from_numpy(pixels)).numpy()


def _record(stage: str, files: dict[str, bytes], store: LocalStore) -> Record:
    outputs = {name: store.put(data) for name, data in files.items()}
    return Record(stage=stage, algorithm=1, config={}, inputs={}, outputs=outputs, values={})
