"""Scores and baselines: of the right images, high outside, in rows that say what they are."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chain
import numpy as np
import pytest
import torch
from PIL import Image

import eqm
from eqm import dossier, image_sets, ood, outliers
from eqm.baselines import ROUNDING_VARIANCE, PrincipalComponents
from eqm.checkpoint import tensors_from_bytes
from eqm.config import OODConfig, OODSet, SamplerConfig, pipeline_config
from eqm.errors import ConfigError, DataError, IntegrityError
from eqm.features import CNNExtractor, SmallCNN, SmallCNNConfig
from eqm.images import open_source
from eqm.model import Model
from eqm.outliers import Subject, rows_of
from eqm.precision import products_in
from eqm.progress import Progress
from eqm.records import OODRow

SETS = ("photographs", "constant", "flipped", "shuffled", "interpolated")
BASELINES = ("pixel_gaussian", "pixel_pca", "feature_gaussian", "feature_neighbours")

MEASURES = {
    "auroc": "auroc",
    "aupr": "aupr_out",
    "aupr_in": "aupr_in",
    "fpr95_out": "fpr95_out",
    "fpr95_in": "fpr95_in",
}
"""As a row calls them -> as they are computed."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.getbasetemp() / "chain")


@pytest.fixture(scope="module")
def subject(tiny: chain.Chain) -> Subject:
    network = SmallCNN(SmallCNNConfig(channels=1, classes=10, width=8, dimension=8))
    return Subject(
        model=eqm.load(tiny.uri("train"), device="cpu"),
        sampler=SamplerConfig(step_size=0.1),
        source=open_source(tiny.config.source, None),
        extractor=CNNExtractor(network, "random"),
    )


def silent(label: str, total: int) -> Progress:
    return Progress(label, total=total, show=False)


def scored(config: OODConfig, subject: Subject) -> tuple[Any, Any]:
    return outliers.out_of_distribution(config, subject, silent)


def explicit(model: Model, kind: Any, **changes: Any) -> Any:
    """What is asked of a model to know which scores it has."""
    field = SimpleNamespace(kind=kind, conditioned=False)
    return SimpleNamespace(spec=model.spec, field=SimpleNamespace(**{**vars(field), **changes}))


# -- the sealed evaluation ----------------------------------------------------------------------


def test_every_score_of_every_set_has_a_row(tiny: chain.Chain) -> None:
    rows = dossier.evaluation_of(tiny["evaluation"]).ood
    found = {(row.score, row.name): row for row in rows}
    assert found.keys() == {
        (score, name) for score in ("gradient_norm", "descent_length", *BASELINES) for name in SETS
    }
    assert len(rows) == len(found)
    roles = {row.score: row.role for row in rows}
    assert roles["gradient_norm"] == "main"
    assert roles["descent_length"] == "score"
    assert {roles[name] for name in BASELINES} == {"baseline"}
    # Whatever a baseline tells, no policy may take it for the model's.
    gated = {(row.score, row.name) for row in rows if row.gated}
    assert gated == {
        (score, name)
        for score in ("gradient_norm", "descent_length")
        for name in ("photographs", "constant")
    }


def test_rows_are_measures_of_the_sealed_scores(tiny: chain.Chain) -> None:
    record = tiny["evaluation"]
    scores = tensors_from_bytes(tiny.store.get(record.outputs["ood-scores.safetensors"]))
    rows = dossier.evaluation_of(record).ood
    for row in rows:
        inside = scores[f"{row.score}/held-out"]
        outside = scores[f"{row.score}/{row.name}"]
        assert (row.count, row.held_out) == (len(outside), len(inside)) == (30, 30)
        wins = (outside[:, None] > inside).double() + (outside[:, None] == inside).double() / 2
        assert row.auroc == pytest.approx(float(wins.mean()))
        both = inside.numpy(), outside.numpy()
        assert row.aupr == ood.aupr(*both, positive="out")
        assert row.aupr_in == ood.aupr(*both, positive="in")
        assert row.fpr95_out == ood.fpr_at_95_tpr(*both, positive="out")
        assert row.fpr95_in == ood.fpr_at_95_tpr(*both, positive="in")
        told = ood.compare(*both)
        assert (row.auroc_low, row.auroc_high) == told.auroc_interval
        assert (row.aupr_low, row.aupr_high) == told.aupr_out_interval
        assert (row.aupr_in_low, row.aupr_in_high) == told.aupr_in_interval
        assert (row.fpr95_out_low, row.fpr95_out_high) == told.fpr95_out_interval
        assert (row.fpr95_in_low, row.fpr95_in_high) == told.fpr95_in_interval
        result = ood.compare(inside.numpy(), outside.numpy())
        for of_row, of_result in MEASURES.items():
            assert getattr(row, of_row) == getattr(result, of_result)
            low, high = getattr(result, f"{of_result}_interval")
            assert (getattr(row, f"{of_row}_low"), getattr(row, f"{of_row}_high")) == (low, high)
    # They can be computed again from what is sealed, to the last bit.
    nested: dict[str, dict[str, Any]] = {}
    for row in rows:
        for name in ("held-out", row.name):
            nested.setdefault(row.score, {})[name] = scores[f"{row.score}/{name}"].numpy()
    assert rows_of(tiny.config.evaluate.ood, nested) == rows


def test_what_others_are_told_from_is_held_out(tiny: chain.Chain, subject: Subject) -> None:
    """Of images that it was trained on, a model that learnt them by heart would be sure."""
    record, source = tiny["evaluation"], subject.source
    scores = tensors_from_bytes(tiny.store.get(record.outputs["ood-scores.safetensors"]))
    numbers = [i for i, one in enumerate(source.entries) if one.held_out][:30]
    latents = outliers.latents_of(subject.model, torch.stack([source.read(i) for i in numbers]))
    norms = subject.model.gradient(latents).flatten(1).norm(dim=1)
    assert scores["gradient_norm/held-out"].numpy() == pytest.approx(norms.double().numpy())


def test_baselines_tell_photographs_from_digits(tiny: chain.Chain) -> None:
    """The model of this chain has learnt nothing; what is simple is not fooled."""
    rows = dossier.evaluation_of(tiny["evaluation"]).ood
    area = {(row.score, row.name): row.auroc for row in rows}
    for score in ("pixel_gaussian", "pixel_pca"):
        for name in ("photographs", "constant", "shuffled"):
            assert area[score, name] > 0.9, (score, name)


# -- scores of a model --------------------------------------------------------------------------


def test_scores_are_of_float32_whatever_the_process_computes_in(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    knob, seen = torch.backends.cuda.matmul, []
    usual = Model.gradient

    def gradient(*given: Any, **more: Any) -> torch.Tensor:
        seen.append(knob.fp32_precision)
        return usual(*given, **more)

    monkeypatch.setattr(Model, "gradient", gradient)
    with products_in("tf32", torch.device("cuda")):
        outliers.model_scores("gradient_norm", OODConfig(), subject, torch.zeros(2, 1, 8, 8))
        assert knob.fp32_precision == "tf32"
    assert seen == ["ieee"]


def test_scores_are_taken_at_mean_latents(subject: Subject) -> None:
    model = subject.model
    pixels = torch.from_numpy(np.arange(64 * 3, dtype=np.uint8).reshape(3, 1, 8, 8))
    latents = outliers.latents_of(model, pixels)
    spec = model.spec.latent
    x = ((pixels.float() - 127.5) / 127.5 - spec.shift[0]) * spec.scale[0]
    assert torch.allclose(latents, x, rtol=2e-3, atol=2e-3)
    found = outliers.model_scores("gradient_norm", OODConfig(), subject, latents)
    expected = model.gradient(latents).flatten(1).norm(dim=1)
    assert found == pytest.approx(expected.double().numpy())


def test_a_descent_length_is_that_of_the_stated_updates(subject: Subject) -> None:
    latents = outliers.latents_of(subject.model, torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
    one, four = (
        outliers.model_scores(
            "descent_length", OODConfig(descent_updates=updates), subject, latents
        )
        for updates in (1, 4)
    )
    norms = outliers.model_scores("gradient_norm", OODConfig(), subject, latents)
    assert one == pytest.approx(0.1 * norms, rel=1e-5)
    assert (four > one).all()


def test_an_energy_has_an_explicit_model_alone(subject: Subject) -> None:
    config = OODConfig(scores=("energy", "gradient_norm", "descent_length"))
    model = subject.model
    assert outliers.scores_of(config, model) == ("gradient_norm", "descent_length")
    for kind in ("dot", "l2"):
        assert outliers.scores_of(config, explicit(model, kind)) == config.scores
        conditioned = explicit(model, kind, conditioned=True)
        assert outliers.scores_of(config, conditioned) == ("gradient_norm",)
    with pytest.raises(DataError, match=r"this model \(implicit\) has none of them"):
        outliers.scores_of(OODConfig(scores=("energy",)), model)


@pytest.mark.parametrize("kind", ["dot", "l2"])
def test_energies_are_the_models_and_the_first_score_is_the_main_one(
    subject: Subject, kind: Any
) -> None:
    network = subject.model.network
    spec = dataclasses.replace(
        subject.model.spec,
        objective=dataclasses.replace(subject.model.spec.objective, energy=kind),
    )
    trained = Model(spec, network, autoencoder=lambda: subject.model.autoencoder)
    config = OODConfig(
        images=6,
        scores=("energy", "gradient_norm"),
        baselines=(),
        sets=(OODSet(name="gray", kind="constant"),),
    )
    rows, sealed = scored(config, dataclasses.replace(subject, model=trained))
    assert [(row.score, row.role) for row in rows] == [
        ("energy", "main"),
        ("gradient_norm", "score"),
    ]
    gray = image_sets.read_set(config.sets[0], torch.zeros(1, 1, 8, 8), 6)
    x = outliers.latents_of(trained, gray)
    expected = (x * trained.network(x, None)).flatten(1).sum(1) if kind == "never" else None
    assert expected is None
    assert sealed["energy/gray"].numpy() == pytest.approx(trained.energy(x).double().numpy())


def test_without_a_null_label_there_are_no_scores(subject: Subject) -> None:
    trained = subject.model
    spec = dataclasses.replace(trained.spec, null_label=False)
    plain = Model(spec, trained.network, autoencoder=lambda: trained.autoencoder)
    assert scored(OODConfig(), dataclasses.replace(subject, model=plain)) == ((), {})


def test_what_blew_up_is_farther_outside_than_all_else() -> None:
    inf = float("inf")
    found = outliers.finite({"held-out": np.array([1.0, 2.0]), "x": np.array([inf, 3.0, inf])})
    assert found["held-out"].tolist() == [1, 2]
    assert found["x"][1] == 3 < found["x"][0] == found["x"][2] < 3 + 1e-12
    result = ood.compare(found["held-out"], found["x"])
    assert result.auroc == 1
    nothing = outliers.finite({"held-out": np.array([inf]), "x": np.array([inf])})
    assert nothing["held-out"].tolist() == nothing["x"].tolist() == [0]
    lost = outliers.finite({"held-out": np.array([1.0, np.nan]), "x": np.array([3.0, inf])})
    with pytest.raises(DataError, match="1 of 2 in-distribution scores are NaN"):
        ood.compare(lost["held-out"], lost["x"])


# -- baselines ----------------------------------------------------------------------------------


def test_baselines_are_fitted_on_training_images_alone(subject: Subject) -> None:
    config = OODConfig(baselines=("pixel_gaussian", "feature_neighbours"), baseline_images=300)
    source = subject.source
    numbers = source.numbers(held_out=False)[:300]
    training = torch.stack([source.read(i) for i in numbers])
    fitted = outliers.fitted_baselines(config, subject, silent)
    rows = training.flatten(1).double().numpy()
    expected = outliers.Gaussian(rows).score(rows[:9])
    assert fitted["pixel_gaussian"](training[:9]) == pytest.approx(expected)
    features = subject.extractor(training).double().numpy()
    expected = outliers.Neighbours(features, k=5).score(features[:9])
    assert fitted["feature_neighbours"](training[:9]) == pytest.approx(expected, abs=1e-6)
    assert outliers.fitted_baselines(OODConfig(baselines=()), subject, silent) == {}


def test_baselines_are_fitted_as_the_config_says(subject: Subject) -> None:
    asked = OODConfig(
        baselines=("pixel_pca", "feature_neighbours"),
        baseline_images=120,
        pca_variance=0.6,
        neighbours=2,
    )
    source = subject.source
    numbers = source.numbers(held_out=False)[:120]
    training = torch.stack([source.read(i) for i in numbers])
    fitted = outliers.fitted_baselines(asked, subject, silent)
    rows = training.flatten(1).double().numpy()
    few = PrincipalComponents(rows, share=0.6, least_variance=ROUNDING_VARIANCE)
    assert fitted["pixel_pca"](training[:9]) == pytest.approx(few.score(rows[:9]))
    features = subject.extractor(training).double().numpy()
    second = np.sort(np.linalg.norm(features[:9, None] - features, axis=2), axis=1)[:, 1]
    assert fitted["feature_neighbours"](training[:9]) == pytest.approx(second, abs=1e-5)


def test_pixels_of_large_images_are_averaged() -> None:
    large = torch.arange(2 * 64 * 64, dtype=torch.int64).remainder(251).view(2, 1, 64, 64)
    found = outliers.pixel_rows(large.to(torch.uint8))
    assert found.shape == (2, 32 * 32)
    assert found[0, 0] == large[0, 0, :2, :2].double().mean()
    assert outliers.pixel_rows(torch.ones(2, 3, 8, 8, dtype=torch.uint8)).shape == (2, 192)


# -- sets in files ------------------------------------------------------------------------------


def test_a_set_in_files_is_scored_and_its_digest_checked(subject: Subject, tmp_path: Path) -> None:
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 9), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    sha256 = image_sets.digest_of("folder", str(tmp_path))
    noise = OODSet(name="noise", kind="folder", uri=str(tmp_path), sha256=sha256, gated=True)
    config = OODConfig(images=20, sets=(noise,), scores=("gradient_norm",), baselines=())
    (row,), sealed = scored(config, subject)
    assert (row.name, row.count, row.held_out, row.gated) == ("noise", 4, 20, True)
    assert sealed.keys() == {"gradient_norm/held-out", "gradient_norm/noise"}
    other = dataclasses.replace(config, sets=(dataclasses.replace(noise, sha256="0" * 64),))
    with pytest.raises(IntegrityError, match="set 'noise'"):
        scored(other, subject)


def test_where_files_lie_and_who_may_read_them_is_in_no_protocol() -> None:
    one = OODSet(name="a", kind="svhn", uri="/here", sha256="0" * 64)
    moved = dataclasses.replace(one, uri="/there", gated=True)
    of = [outliers.protocol(OODConfig(sets=(x,))) for x in (one, moved)]
    assert of[0] == of[1]
    for change in ({"sha256": "1" * 64}, {"split": "train"}, {"name": "b"}):
        changed = OODConfig(sets=(dataclasses.replace(one, **change),))
        assert outliers.protocol(changed) != of[0]
    assert outliers.protocol(OODConfig(images=7)) != outliers.protocol(OODConfig())


# -- configs ------------------------------------------------------------------------------------

HERE: dict[str, Any] = {"name": "a", "kind": "svhn", "uri": "x", "sha256": "0" * 64}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({**HERE, "name": "held-out"}, "name is 'held-out'; it must be lower-case letters"),
    ({**HERE, "name": "a/b"}, "name is 'a/b'"),
    ({**HERE, "kind": "mnist"}, "'mnist'"),
    ({**HERE, "uri": None}, "uri is None; it must be the folder of the files"),
    ({**HERE, "sha256": None}, "sha256 is None; it must be 64 .* `eqm data digest svhn x` prints"),
    ({**HERE, "split": "test1"}, "split is 'test1'; it must be one of test, train, extra"),
    ({**HERE, "kind": "folder", "split": "test"}, "left out: 'folder' has none"),
    ({"name": "a", "kind": "flipped", "uri": "x"}, "left out: 'flipped' lies in no files"),
]


@pytest.mark.parametrize(("values", "words"), REFUSED)
def test_sets_that_cannot_be_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        OODSet(**values)


def test_sections_that_cannot_be_are_refused() -> None:
    twice = (OODSet(name="a", kind="flipped"), OODSet(name="a", kind="shuffled"))
    for values, words in (
        ({"sets": twice}, r"sets is \('a', 'a'\); it must be different names"),
        ({"scores": ()}, "at least one score"),
        ({"scores": ("energy", "energy")}, "each once"),
        ({"scores": ("loss",)}, "some of .'gradient_norm'"),
        ({"baselines": ("kde",)}, "some of .'pixel_gaussian'"),
        ({"images": 1}, "images is 1; it must be at least 2"),
        ({"pca_variance": 1.0}, "between 0 and 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            OODConfig(**values)


def test_sets_are_given_in_a_file_and_a_policy_reads_gated_ones() -> None:
    table = {
        "preset": "tiny",
        "evaluate": {"ood": {"sets": [{**HERE, "name": "street", "gated": True}]}},
        "policy": {"minimum_auroc": {"street": 0.6, "street/energy": 0.5}},
    }
    assert pipeline_config(table).evaluate.ood.sets[0].split is None
    for name in ("flipped", "photographs/energy"):
        table["policy"] = {"minimum_auroc": {name: 0.5}}
        with pytest.raises(ConfigError, match=r"of a gated set of evaluate\.ood\.sets \(street\)"):
            pipeline_config(table)


def test_rows_of_before_there_were_scores_are_read() -> None:
    old = OODRow(
        name="x",
        count=3,
        auroc=0.5,
        auroc_low=0.4,
        auroc_high=0.6,
        aupr=0.5,
        fpr95_in=1,
        gated=True,
    )
    assert (old.score, old.role, old.aupr_in, old.held_out) == ("gradient_norm", "main", None, None)
