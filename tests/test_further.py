"""Several extractors in one evaluation: each number is what it would be if its own were alone."""

import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import chain
import numpy as np
import pytest
import safetensors.torch
import torch
from jsonschema import Draft202012Validator
from PIL import Image
from torch_fidelity.feature_extractor_clip import CLIPVisual
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import eqm
from eqm import dossier, gate, names, recomputation
from eqm.config import ALGORITHMS, Job, PipelineConfig, Runtime, pipeline_config, replace
from eqm.errors import ConfigError, DataError
from eqm.features import load_extractor
from eqm.policy import MetricRule, PolicyConfig
from eqm.records import Evaluation, Record, Ref, sha256, stage_digest
from eqm.report import numbers_of, render_json
from eqm.report_page import render_html
from eqm.samples import columns, kept_images
from eqm.stage import job_digest
from eqm.storage import LocalStore
from eqm.vision_transformer import DINOv2
from flows import jobs
from flows.evaluate import figures

SAMPLES = 136
"""Enough for intervals."""
KEYS = ("distance", "distance_endless", "distance_held_out", "kid", "precision", "recall")


def seeded(state: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(value: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(value.shape, generator=generator)
        return noise / value[0].numel() ** 0.5 if value.ndim > 1 else 1 + 0.1 * noise

    return {name: drawn(value) for name, value in state.items()}


def written(file: Path, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """A table ``pretrained`` of a file with these weights."""
    safetensors.torch.save_file(dict(state), file)
    return {"uri": str(file), "sha256": sha256(file.read_bytes())}


def clip(folder: Path, seed: int = 0) -> dict[str, Any]:
    """CLIP's layout, as narrow and shallow as there is a head."""
    network = CLIPVisual(16, 224, 1, 64, 32)
    file = folder / f"clip-{seed}.safetensors"
    return {"kind": "clip", "pretrained": written(file, seeded(network.state_dict(), seed))}


def dinov2(folder: Path) -> dict[str, Any]:
    """DINOv2's smallest width, one block deep."""
    state = seeded(DINOv2(384, 1, gated=False).state_dict(), 1)
    return {"kind": "dinov2", "pretrained": written(folder / "dino.safetensors", state)}


def inception(folder: Path) -> dict[str, Any]:
    """Inception's layout as it is initialised; its sizes are fixed."""

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> Any:
            return None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    state = Blank("blank", ["2048"], feature_extractor_weights_path=empty).state_dict()
    return {"kind": "inception", "pretrained": written(folder / "inc.safetensors", state)}


def pictures(folder: Path) -> str:
    random = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 160)):
        (folder / name).mkdir(parents=True)
        for number in range(30):
            pixels = level + random.integers(0, 60, size=(8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")
    return str(folder)


class Measured:
    """An evaluation and all that it stands on, made in this process."""

    def __init__(self, config: PipelineConfig, store: LocalStore, source: Ref) -> None:
        self.config, self.store, self.source = config, store, source
        autoencoder = self.run(jobs.autoencoder_job(self.plan, source))
        latents = self.run(jobs.latents_job(self.plan, source, autoencoder))
        self.trained = self.run(jobs.train_job(self.plan, latents))
        self.extractor = self.run(jobs.extractor_job(self.plan, source))
        self.further = {
            name: self.run(jobs.extractor_job(self.plan, source, name)) for name in config.further
        }
        job = jobs.samples_job(self.plan, self.trained, self.extractor, self.further)
        self.samples = self.run(job)
        self.reference = self.run(jobs.reference_job(self.plan, source, self.extractor))
        self.references = {
            name: self.run(jobs.reference_job(self.plan, source, one, name))
            for name, one in self.further.items()
        }
        self.record = self.run(self.job())
        self.evaluation = dossier.evaluation_of(self.record)

    @property
    def plan(self) -> Any:
        return self

    def runtime(self, stage: str) -> Runtime:
        uri = self.config.source_uri
        return Runtime(store=self.store.uri, device="cpu", threads=1, source_uri=uri)

    def run(self, job: Job) -> Record:
        return chain.run(job)

    def job(self, references: Mapping[str, Record] | None = None) -> Job:
        return jobs.evaluation_job(
            self.plan,
            self.source,
            self.trained,
            self.extractor,
            self.samples,
            self.reference,
            self.references if references is None else references,
        )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    return pipeline_config(
        {
            "preset": "tiny",
            "source_uri": pictures(tmp_path_factory.mktemp("pictures") / "two"),
            "source": {
                "kind": "folder",
                "image_size_px": 8,
                "channels": 3,
                "held_out_fraction": 0.4,
            },
            "autoencoder": {"kind": "identity"},
            "extractor": {"fit": {"width": 8, "dimension": 4, "images": 64}},
            "network": {"width": 16, "depth": 1, "heads": 2},
            "train": {"images": 64, "batch_size": 32},
            "generate": {"samples": SAMPLES, "keep_images": 20, "sampler": {"updates": 2}},
            "evaluate": {"grid_rows": 1, "ood": {"images": 8, "sets": [], "baselines": []}},
            "policy": {"minimum_auroc": {}},
        }
    )


@pytest.fixture(scope="module")
def both(base: PipelineConfig, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Under the fitted extractor, CLIP and another fitted one."""
    wide = {"fit": {"width": 16, "dimension": 4, "images": 64, "seed": 3}}
    further = {
        "clip": {"extractor": clip(weights), "reference": {"keep_features": 20}},
        "wide": {"extractor": wide},
    }
    return measured(base, further, tmp_path_factory)


def measured(
    base: PipelineConfig, further: dict[str, Any], factory: pytest.TempPathFactory
) -> Measured:
    config = pipeline_config(
        {**eqm.records.to_json(base), "preset": "defaults", "further": further}
    )
    store = LocalStore(factory.getbasetemp() / "further")
    return Measured(config, store, chain.listing(config.source, config.source_uri))


@pytest.fixture(scope="module")
def alone(both: Measured, base: PipelineConfig) -> Measured:
    """The first extractor by itself."""
    return Measured(base, both.store, both.source)


def under(measured: Measured, name: str) -> dict[str, Any]:
    """Kind -> metric under an extractor."""
    found = measured.evaluation.metrics.items()
    return {names.kind_of(k)[0]: m for k, m in found if names.kind_of(k)[1] == name}


def test_each_number_is_what_it_is_under_its_extractor_alone(
    both: Measured, base: PipelineConfig
) -> None:
    """Another extractor is the main one of another evaluation; bit for bit, interval and all."""
    for name in ("clip", "wide"):
        one = both.config.further[name]
        config = replace(base, extractor=one.extractor, reference=one.reference)
        itself = Measured(config, both.store, both.source).evaluation
        found = under(both, name)
        assert {"distance", "kid", "precision", "recall"} <= set(found)
        assert found == {k: m for k, m in itself.metrics.items() if k in names.PREFIXES}
        assert found["distance"].low < found["distance"].value < found["distance"].high
    assert under(both, "clip")["distance"].name == f"FD[clip-vit-b-32]-{SAMPLES}"


def test_a_further_extractor_changes_nothing_for_the_main_one(
    both: Measured, alone: Measured
) -> None:
    mine = {k: m for k, m in both.evaluation.metrics.items() if names.kind_of(k)[1] is None}
    assert mine == dict(alone.evaluation.metrics)
    assert {k: v for k, v in both.evaluation.protocol.items() if k != "further"} == dict(
        alone.evaluation.protocol
    )


def test_without_further_extractors_nothing_is_asked_that_was_not_before(alone: Measured) -> None:
    """So that what was sealed before there were any is found again."""
    samples = jobs.samples_job(alone.plan, alone.trained, alone.extractor)
    assert set(samples.inputs) == {"train", "extractor"}
    evaluation = alone.job({})
    assert set(evaluation.inputs) == {"source", "train", "extractor", "samples", "reference"}
    for job in (samples, evaluation):
        assert "further" not in json.dumps(job.config)
        by_hand = stage_digest(job.stage, ALGORITHMS[job.stage], job.config, job.inputs)
        assert job_digest(job) == by_hand
    assert "further" not in alone.evaluation.protocol
    assert all(number.extractor is None for number in numbers_of(alone.evaluation))


def test_samples_are_seen_by_all_extractors_in_one_pass(both: Measured) -> None:
    sealed = columns(both.store, both.samples)
    images = torch.cat(list(kept_images(both.store, both.samples)))
    for name, record in both.further.items():
        extractor = load_extractor(record, both.store, torch.device("cpu"))
        assert sealed[f"{name}/features"].shape == (SAMPLES, extractor.dimension)
        seen = extractor(images)
        torch.testing.assert_close(sealed[f"{name}/features"][:20], seen, rtol=1e-4, atol=1e-4)


def test_a_sealed_number_of_any_extractor_is_computed_again(both: Measured) -> None:
    again = recomputation.compute_again(
        both.store, both.record, both.runtime("evaluation"), seeds=2, exact=False
    )
    assert recomputation.check_numbers(both.store, both.record, again).passed
    (samples,) = again.remade
    assert samples.passed
    values = json.loads(json.dumps(both.record.values))
    values["evaluation"]["metrics"]["fd_clip"]["value"] += 1e-9
    forged = dataclasses.replace(both.record, values=values)
    found = recomputation.check_numbers(both.store, forged, again).differences
    assert [one.place for one in found] == ["evaluation.metrics.fd_clip.value"]


def page_and_json(found: Measured, champion: Evaluation | None = None) -> tuple[str, bytes]:
    content = dossier.collect(
        found.store, found.record, title="t", model_name="eqm-t", decision=None
    )
    content = dataclasses.replace(content, champion=champion)
    return render_html(content).decode(), render_json(content)


def test_a_report_shows_all_and_says_whose_each_is(both: Measured) -> None:
    page, data = page_and_json(both)
    schema = json.loads((Path(eqm.__file__).parent / "schemas/report-2.json").read_text())
    Draft202012Validator(schema).validate(json.loads(data))
    rows = {one["key"]: one for one in json.loads(data)["numbers"]}
    for key, record in (
        ("distance", both.extractor),
        ("fd_clip", both.further["clip"]),
        ("recall_wide", both.further["wide"]),
    ):
        digest = record.values["digest"]
        assert rows[f"metrics.{key}"]["extractor"]["digest"] == digest
        assert digest[:12] in page
    assert "extractor" not in rows["metrics.nearest"]
    assert page.count(f"FD[clip-vit-b-32]-{SAMPLES}") >= 2
    assert rows["metrics.fd_clip"]["better"] == "lower"
    assert rows["metrics.recall_wide"]["better"] == "higher"
    order = [one.key for one in numbers_of(both.evaluation)]
    assert order.index("metrics.nearest") < order.index("metrics.fd_clip")
    assert order.index("metrics.recall_clip") < order.index("metrics.fd_wide")


def test_numbers_of_different_extractors_are_never_compared(both: Measured) -> None:
    """The same name and kind, other weights: whoever compared the two would be wrong."""
    protocol = json.loads(json.dumps(both.evaluation.protocol))
    protocol["further"]["clip"]["extractor"]["digest"] = "0" * 64
    other = dataclasses.replace(both.evaluation, protocol=protocol)
    page, data = page_and_json(both, other)
    assert json.loads(data)["comparison"]["changes"] == []
    assert "protocols differ in further.clip.extractor.digest" in page
    same = json.loads(page_and_json(both, both.evaluation)[1])["comparison"]["changes"]
    assert {"metrics.distance", "metrics.fd_clip"} <= {one["key"] for one in same}
    policy = PolicyConfig(minimum_samples=10, metrics={"fd_clip": MetricRule(maximum_ratio=9.0)})
    for champion, passed in ((other, False), (both.evaluation, True)):
        decision = gate.decide(
            both.evaluation,
            both.record.ref,
            policy,
            champion=champion,
            champion_ref=Ref(stage="evaluation", digest="d" * 64, content="c" * 64),
        )
        assert decision.promote is passed


def test_a_policy_may_name_metrics_of_any_extractor(both: Measured) -> None:
    value = both.evaluation.metrics["fd_clip"].value
    for most, passed in ((value * 1.01, True), (value * 0.99, False)):
        rules = {"fd_clip": MetricRule(maximum=most), "recall_wide": MetricRule(minimum=0.0)}
        policy = PolicyConfig(minimum_samples=10, metrics=rules)
        decision = gate.decide(both.evaluation, both.record.ref, policy)
        assert decision.promote is passed
        assert {"fd_clip", "recall_wide"} <= {reason.check for reason in decision.reasons}
    broken = {
        **both.evaluation.metrics,
        "recall_wide": dataclasses.replace(both.evaluation.metrics["recall_wide"], value=1.5),
    }
    odd = dataclasses.replace(both.evaluation, metrics=broken)
    decision = gate.decide(odd, both.record.ref, PolicyConfig(minimum_samples=10))
    assert "recall_wide is 1.5" in " ".join(reason.text for reason in decision.reasons)


def test_a_policy_on_an_extractor_that_is_not_there_is_refused_before_a_training() -> None:
    table = {"preset": "tiny", "policy": {"metrics": {"fd_dinov2": {"maximum": 9.0}}}}
    with pytest.raises(ConfigError, match=r"fd_dinov2.*extractor of \[further\] \(there are none"):
        pipeline_config(table)
    further = {"dinov2": {"extractor": {"kind": "fit"}}}
    assert pipeline_config({**table, "further": further}).further["dinov2"].extractor.kind == "fit"
    with pytest.raises(ConfigError, match="further is 'DINO_v2'; it must be lower-case"):
        pipeline_config({"preset": "tiny", "further": {"DINO_v2": further["dinov2"]}})


def test_figures_of_all_extractors_and_their_intervals_go_to_mlflow(both: Measured) -> None:
    shown = figures(both.evaluation, "eval")
    for key in ("distance", "fd_clip", "kid_wide"):
        metric = both.evaluation.metrics[key]
        assert shown[f"eval/{key}"] == metric.value
        assert (shown[f"eval/{key}.low"], shown[f"eval/{key}.high"]) == (metric.low, metric.high)
    assert "eval/fd_held_out_clip" in shown
    assert "eval/fd_held_out_clip.low" not in shown


def test_what_was_not_seen_by_an_extractor_is_refused(both: Measured, alone: Measured) -> None:
    with pytest.raises(
        DataError, match=r"not looked at by further extractor 'clip'.*\[further.clip"
    ):
        chain.run(alone.job(both.references))
    swapped = {"clip": both.references["wide"], "wide": both.references["clip"]}
    with pytest.raises(DataError, match="their features cannot be compared"):
        chain.run(both.job(swapped))


@pytest.mark.parametrize("kind", names.PREFIXES)
@pytest.mark.parametrize("extractor", ["dinov2", "endless", "held-out", "a"])
def test_keys_say_what_they_are_of(kind: str, extractor: str) -> None:
    assert names.kind_of(names.further_key(kind, extractor)) == (kind, extractor)
    assert names.kind_of(kind) == (kind, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "metrics"),
    [
        (dinov2, "FD[dinov2-vit-s-14]-20", KEYS),
        (inception, "FD[inception-v3-{}]-20", (*KEYS, "spatial_distance", "score")),
    ],
)
def test_large_extractors_beside_the_main_one(
    kind: Callable[[Path], dict[str, Any]],
    name: str,
    metrics: Sequence[str],
    base: PipelineConfig,
    weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    config = replace(base, generate=replace(base.generate, samples=20))
    table = kind(weights)
    found = under(measured(config, {"large": {"extractor": table}}, tmp_path_factory), "large")
    assert set(found) == set(metrics) - {"distance_endless"}
    assert found["distance"].name == name.format(table["pretrained"]["sha256"][:8])
    assert all(np.isfinite(metric.value) for metric in found.values())
    assert found["distance"].value > 0
