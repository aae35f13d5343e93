"""Numbers about samples: right on cases that are known, the same wherever they are measured."""

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chain
import numpy as np
import pytest
import torch

from eqm import dossier, evaluate, images
from eqm.agreement import Reader, thumbnails
from eqm.checkpoint import tensors_from_bytes, tensors_to_bytes
from eqm.config import (
    EvaluationStage,
    GenerateConfig,
    OODConfig,
    OODSet,
    SamplerConfig,
    SourceConfig,
    replace,
    stage_config,
)
from eqm.errors import DataError
from eqm.evaluate import Split, grid_of, looked_through
from eqm.images import open_source
from eqm.records import LATER, Evaluation, Record, Ref, from_json, to_json
from eqm.report import render_json
from eqm.report_page import render_html
from eqm.stage import job_digest
from eqm.storage import LocalStore


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.getbasetemp() / "chain")


@pytest.fixture(scope="module")
def digits() -> dict[str, Split]:
    """Both sides of the split."""
    source = open_source(SourceConfig(image_size_px=8), None)
    return {
        name: evaluate.read(source, source.numbers(held_out=name == "held_out"))
        for name in ("training", "held_out")
    }


def measured(found: chain.Chain) -> Evaluation:
    return dossier.evaluation_of(found["evaluation"])


# -- the reader ---------------------------------------------------------------------------------


def test_the_reader_reads_digits(digits: dict[str, Split]) -> None:
    train, held = digits["training"], digits["held_out"]
    reader = Reader(train.images, train.labels)
    assert reader.agreement(held.images, held.labels) > 0.97
    assert reader.agreement(held.images, (held.labels + 1) % 10) < 0.03


def test_the_reader_reads_large_images_as_well(digits: dict[str, Split]) -> None:
    train, held = digits["training"], digits["held_out"]
    fivefold = np.ones((1, 1, 5, 5), dtype=np.uint8)
    reader = Reader(np.kron(train.images[:300], fivefold), train.labels[:300])
    enlarged = np.kron(held.images, fivefold)
    assert enlarged.shape[2:] == (40, 40)
    assert reader.agreement(enlarged, held.labels) > 0.9


def test_one_class_is_always_read(digits: dict[str, Split]) -> None:
    """A folder of one class can be trained on; there is nothing to tell apart."""
    pixels = digits["training"].images[:20]
    reader = Reader(pixels, np.zeros(20, dtype=np.int64))
    assert reader.agreement(pixels, np.zeros(20, dtype=np.int64)) == 1.0


# -- parts of the measurement -------------------------------------------------------------------


def test_a_grid_shows_the_first_images_of_each_class() -> None:
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 0], dtype=np.int64)
    pixels = np.arange(8, dtype=np.uint8).repeat(4).reshape(8, 1, 2, 2)
    split = Split(pixels, labels)
    grid = grid_of(split, classes=3, rows=5)
    assert tuple(grid["images"].shape) == (3, 3, 1, 2, 2)
    # Class 2 has two images, which costs the others none of theirs.
    assert grid["images"][:, :, 0, 0, 0].tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 0]]
    assert grid["counts"].tolist() == [3, 3, 2]
    assert tuple(grid_of(split, classes=3, rows=1)["images"].shape) == (3, 1, 1, 2, 2)


def test_real_images_beside_samples_are_held_out_ones(digits: dict[str, Split]) -> None:
    """Beside images that it was trained on, a model that copies would look like a good one."""
    source = open_source(SourceConfig(image_size_px=8), None)
    shown = evaluate.first_of_each_class(source, 3, 4)
    held = digits["held_out"]
    wanted = [held.images[held.labels == label][:4] for label in range(3)]
    np.testing.assert_array_equal(shown.images, np.concatenate(wanted))
    assert shown.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_class_without_images_is_black_and_counted_so() -> None:
    """So that a report can be made where a small class has no held-out image."""
    pixels = np.full((3, 1, 2, 2), 9, dtype=np.uint8)
    split = Split(pixels, np.array([0, 0, 2]))
    grid = grid_of(split, classes=3, rows=5)
    assert grid["images"][:, :, 0, 0, 0].tolist() == [[9, 9], [0, 0], [9, 0]]
    assert grid["counts"].tolist() == [2, 0, 1]
    none = grid_of(Split(pixels[:0], split.labels), classes=3, rows=5)
    assert tuple(none["images"].shape) == (3, 1, 1, 2, 2)
    assert not none["images"].any()
    assert none["counts"].tolist() == [0, 0, 0]


def test_kept_images_are_looked_through_part_by_part() -> None:
    """What is measured and shown of them is what it is of all at once."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (23, 3, 40, 40), dtype=np.uint8)
    labels = generator.integers(0, 5, 60)
    held = []

    def parts() -> Iterator[torch.Tensor]:
        for start in range(0, 23, 4):
            part = torch.from_numpy(pixels[start : start + 4])
            held.append(weakref.ref(part))
            yield part
            del part
            # Whatever is kept of a part, it is not the part.
            assert all(one() is None for one in held[:-1])

    small, shown = looked_through(parts(), labels, classes=3, rows=2)
    assert np.array_equal(small, thumbnails(pixels))
    assert len(shown.images) <= 6
    whole = grid_of(Split(pixels, labels), classes=3, rows=2)
    assert torch.equal(grid_of(shown, classes=3, rows=2)["images"], whole["images"])
    small, shown = looked_through([torch.from_numpy(pixels[:0])], labels, classes=3, rows=2)
    assert (len(small), shown.images.shape) == (0, (0, 3, 40, 40))


# -- what belongs together ----------------------------------------------------------------------


def evaluated_of(tiny: chain.Chain, folder: Path, **inputs: Ref) -> Record:
    """An evaluation of other inputs than those of the chain, in a store of its own."""
    store = chain.copied(tiny, folder / "store", without=("evaluation",))
    for name in inputs:
        store.seal(OTHERS[name](tiny[name]))
    asked = tiny.job("evaluation")
    asked = dataclasses.replace(asked, inputs={**asked.inputs, **inputs})
    return chain.run(chain.elsewhere(asked, store.root))


OTHERS: dict[str, Callable[[Record], Record]] = {
    "train": lambda r: dataclasses.replace(r, config={**r.config, "of": "another"}),
    "extractor": lambda r: dataclasses.replace(r, config={**r.config, "of": "another"}),
    "reference": lambda r: dataclasses.replace(
        r, inputs={**r.inputs, "source": Ref(stage="source", digest="d" * 64, content="d" * 64)}
    ),
}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("train", r"samples .* are of train .* is to be evaluated: generate from this model"),
        ("extractor", r"samples .* are of extractor .* is to be evaluated"),
        ("reference", r"reference .* is of images dddddddddddd, .* make a reference of them"),
    ],
)
def test_samples_of_another_model_are_no_evidence(
    tiny: chain.Chain, tmp_path: Path, name: str, told: str
) -> None:
    with pytest.raises(DataError, match=told):
        evaluated_of(tiny, tmp_path, **{name: OTHERS[name](tiny[name]).ref})


def test_what_samples_cost_is_counted_and_not_believed(tiny: chain.Chain, tmp_path: Path) -> None:
    store = chain.copied(tiny, tmp_path / "store", without=("samples", "evaluation"))
    honest = tiny["samples"]
    lying = store.seal(
        dataclasses.replace(honest, values={**honest.values, "mean_field_evaluations": 1.0})
    )
    asked = tiny.job("evaluation")
    asked = dataclasses.replace(asked, inputs={**asked.inputs, "samples": lying.ref})
    found = dossier.evaluation_of(chain.run(chain.elsewhere(asked, store.root)))
    assert found.mean_field_evaluations == honest.values["mean_field_evaluations"] > 1
    assert found == measured(tiny)


def test_a_few_dear_samples_are_in_the_mean_cost(tiny: chain.Chain, tmp_path: Path) -> None:
    store = chain.copied(tiny, tmp_path / "store", without=("samples", "evaluation"))
    name = "samples-000000.safetensors"
    table = tensors_from_bytes(store.get(tiny["samples"].outputs[name]))
    table["evaluations"][0] += 100
    outputs = {**tiny["samples"].outputs, name: store.put(tensors_to_bytes(table))}
    dear = store.seal(dataclasses.replace(tiny["samples"], outputs=outputs))
    asked = tiny.job("evaluation")
    asked = dataclasses.replace(asked, inputs={**asked.inputs, "samples": dear.ref})
    found = dossier.evaluation_of(chain.run(chain.elsewhere(asked, store.root)))
    assert found.mean_field_evaluations == 5.0 + 100 / 50


# -- the protocol -------------------------------------------------------------------------------


def protocol_digest(tiny: chain.Chain, extractor: str = "e" * 64, **changes: Any) -> str:
    config = chain.tiniest({k.replace("__", "."): v for k, v in changes.items()})
    stages = {
        name: chain.job(config, tiny.store, name, tiny.records).config
        for name in ("samples", "evaluation")
    }
    stage: EvaluationStage = stage_config("evaluation", stages["evaluation"])
    samples = dataclasses.replace(tiny["samples"], config=stages["samples"])
    looked = {**tiny["reference"].values, "extractor": {"name": "cnn", "digest": extractor}}
    looked |= {"keep_features": config.reference.keep_features}
    reference = dataclasses.replace(tiny["reference"], values=looked)
    return Evaluation(
        protocol=evaluate.protocol(stage, reference, samples, "s" * 64),
        samples=50,
        metrics={},
        ood=(),
        mean_field_evaluations=5.0,
    ).protocol_digest


@pytest.mark.parametrize(
    "changes",
    [
        {"generate__first_seed": 9},
        {"generate__sampler__batch_size": 7},
        {"generate__keep_images": 3},
        {"generate__trajectory_points": 2},
        {"evaluate__grid_rows": 1},
        {"train__seed": 3},
        {"evaluate__as_of": "2031-01-01"},
    ],
)
def test_the_protocol_does_not_depend_on(tiny: chain.Chain, changes: dict[str, Any]) -> None:
    assert protocol_digest(tiny, **changes) == protocol_digest(tiny)


@pytest.mark.parametrize(
    "changes",
    [
        {"generate__sampler__updates": 6},
        {"generate__sampler__step_size": 0.2},
        {"generate__sampler__guidance": 1.5},
        {"generate__samples": 51},
        {"evaluate__neighbours": 4},
        {"evaluate__ood__images": 29},
        {"source__split_seed": 1},
        {"reference__keep_features": 9},
        {"extractor": "f" * 64},
    ],
)
def test_the_protocol_changes_with(tiny: chain.Chain, changes: dict[str, Any]) -> None:
    assert protocol_digest(tiny, **changes) != protocol_digest(tiny)


NOT_OF_THE_PROTOCOL = {
    GenerateConfig: {"keep_images", "trajectory_points", "first_seed"},
    SamplerConfig: {"batch_size"},
    OODConfig: set[str](),
    OODSet: {"uri", "gated"},
}


def test_every_other_setting_is_of_the_protocol(tiny: chain.Chain) -> None:
    """Also one that does not exist yet: numbers that it changes must not be compared."""
    found = measured(tiny).protocol
    told = {
        GenerateConfig: found["generate"],
        SamplerConfig: found["generate"]["sampler"],
        OODConfig: found["ood"],
        OODSet: found["ood"]["sets"][0],
    }
    for config, left_out in NOT_OF_THE_PROTOCOL.items():
        names = {field.name for field in dataclasses.fields(config)}
        # Settings that came later are in no digest while they have their first value.
        later = {f.name for f in dataclasses.fields(config) if f.metadata.get(LATER)}
        assert names - left_out - later <= told[config].keys() <= names - left_out, config
    assert found["images"]["source"] == tiny.job("evaluation").inputs["source"].digest
    assert found["reference_images"].keys() == {"images", "keep_features", "file"}


def test_settings_of_the_protocol_are_told_as_they_are(tiny: chain.Chain) -> None:
    changes = {
        "generate.labels": "random",
        "generate.noise_level": 0.5,
        "generate.sampler.rule": "gd",
        "generate.sampler.precision": "bfloat16",
    }
    plain = protocol_digest(tiny)
    for name, value in changes.items():
        assert protocol_digest(tiny, **{name.replace(".", "__"): value}) != plain, name


# -- the whole stage ----------------------------------------------------------------------------


def test_every_number_is_there(tiny: chain.Chain) -> None:
    found = measured(tiny)
    assert found.samples == 50
    assert found.mean_field_evaluations == 5.0
    assert found.metrics.keys() == {
        *("distance", "distance_held_out", "spatial_distance", "kid", "score"),
        *("precision", "recall", "label_agreement", "nearest", "copies"),
    }
    for name, metric in found.metrics.items():
        assert np.isfinite(metric.value), name
        assert (metric.beside is None) == (name == "distance_held_out")
    # An untrained model is far from the data; held-out images are near.
    for name, better in (
        *(("distance", "less"), ("kid", "less"), ("spatial_distance", "less")),
        *(("precision", "more"), ("score", "more")),
    ):
        metric = found.metrics[name]
        assert metric.beside is not None
        assert (metric.beside < metric.value) == (better == "less"), name
    assert found.metrics["label_agreement"].beside == pytest.approx(0.99, abs=0.01)
    assert tiny["evaluation"].values["protocol_digest"] == found.protocol_digest


def test_numbers_tell_how_sure_they_are(tiny: chain.Chain) -> None:
    found = measured(tiny).metrics
    sure = {name: m for name, m in found.items() if m.low is not None and m.high is not None}
    # 50 samples are too few for the intervals of distances: nothing is said of them.
    assert sure.keys() == {"score", "precision", "label_agreement", "nearest", "copies"}
    for metric in sure.values():
        assert metric.low <= metric.value <= metric.high  # type: ignore[operator]


def test_two_stores_hold_the_same(tiny: chain.Chain, tmp_path: Path) -> None:
    store = chain.copied(tiny, tmp_path / "store", without=("evaluation",))
    again = chain.run(chain.elsewhere(tiny.job("evaluation"), store.root))
    assert again.outputs == tiny["evaluation"].outputs
    assert again.ref == tiny["evaluation"].ref


def test_images_that_changed_are_refused(tiny: chain.Chain) -> None:
    job = tiny.job("evaluation")
    other = Ref(stage="source", digest="0" * 64, content="0" * 64)
    job = replace(job, inputs={**job.inputs, "source": other})
    with pytest.raises(DataError, match="images changed since this run was configured"):
        chain.run(job)
    assert tiny.store.record("evaluation", job_digest(job)) is None


def test_a_reference_of_another_extractor_is_refused(tiny: chain.Chain, tmp_path: Path) -> None:
    other = dataclasses.replace(
        tiny["reference"],
        inputs={
            **tiny["reference"].inputs,
            "extractor": Ref(stage="extractor", digest="0" * 64, content="0" * 64),
        },
    )
    store = chain.copied(tiny, tmp_path / "store", without=("evaluation",))
    job = chain.elsewhere(tiny.job("evaluation"), store.root)
    job = replace(job, inputs={**job.inputs, "reference": store.seal(other).ref})
    with pytest.raises(DataError, match=r"with extractor 000000000000, .* cannot be compared"):
        chain.run(job)
    assert store.record("evaluation", job_digest(job)) is None


# -- what a report is made of -------------------------------------------------------------------


def page_of(found: chain.Chain) -> bytes:
    store = LocalStore(found.store.root)
    report = dossier.collect(
        store, found["evaluation"], title="A tiny model", model_name="eqm-tiny", decision=None
    )
    assert render_json(report) == render_json(report)
    return render_html(report)


def test_a_report_of_sealed_records_is_the_same_twice(tiny: chain.Chain) -> None:
    page = page_of(tiny)
    assert page == page_of(tiny)
    text = page.decode()
    assert text.startswith("<!doctype html>")
    for name in chain.STAGES:
        assert tiny[name].digest[:12] in text, name


def test_a_report_says_how_its_samples_were_made(tiny: chain.Chain) -> None:
    found = dossier.collect(
        tiny.store, tiny["evaluation"], title="t", model_name="m", decision=None
    ).generated_with
    sampler = to_json(tiny.config.generate.sampler)
    assert found == {**sampler, "labels": "balanced", "seeds": "0 to 49"}


def test_the_chain_is_told_in_the_order_of_the_story(tiny: chain.Chain) -> None:
    found = dossier.chain_of(tiny.store, tiny["evaluation"])
    assert [record.stage for record in found] == list(dossier.STORY)
    assert {record.digest for record in found} == {r.digest for r in tiny.records.values()}


def test_a_report_can_do_without_pictures_and_scores(tmp_path: Path) -> None:
    """No image kept, no null label: fewer numbers, and still a page."""
    bare = chain.build(
        tmp_path / "store",
        {
            "train.label_dropout": 0.0,
            "train.images": 64,
            "train.decay_fraction": 0.0,
            "generate.keep_images": 0,
            "generate.samples": 5,
            "generate.trajectory_points": 1,
        },
    )
    found = measured(bare)
    assert found.ood == ()
    assert "label_agreement" not in found.metrics
    assert page_of(bare) == page_of(bare)


def test_the_evaluation_survives_json(tiny: chain.Chain) -> None:
    values = tiny["evaluation"].values
    assert from_json(Evaluation, values["evaluation"]) == measured(tiny)
    assert values["classes"] == [str(k) for k in range(10)]
    assert images.open_source(tiny.config.source, None).digest in str(values)
