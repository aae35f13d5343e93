"""The arithmetic of studies in closed form, what stands in one table, and how it looks."""

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import recipes as costs
from eqm import studies, study, study_page
from eqm.config import (
    ObjectiveConfig,
    PipelineConfig,
    SamplerConfig,
    StudyRow,
    StudyStage,
    demo,
    replace,
    tiny,
    with_settings,
)
from eqm.errors import ConfigError, DataError
from eqm.recipes import latent_shape, recipe
from eqm.records import Evaluation, Metric, OODRow, Record, StudyTable, to_json
from eqm.studies import Base
from eqm.study_table import mean_interval, summarise

GOLDEN = Path(__file__).parent / "golden" / "study.md"
T_975_OF_2 = 0.95 * math.sqrt(2 / (1 - 0.95**2))
"""97.5 % point of Student's t with 2 degrees of freedom, where it has a closed form."""


def evaluation(value: float, *, step: float = 0.1, **more: float) -> Evaluation:
    metrics = {
        "distance": Metric(
            name="FD[toy]-10", value=value, beside=0.5, low=value - 0.25, high=value + 0.25
        ),
        "recall": Metric(name="recall[toy]-10", value=0.75),
    }
    return Evaluation(
        protocol={"generate": {"sampler": {"step_size": step}, **more}},
        samples=10,
        metrics=metrics,
        ood=(),
        mean_field_evaluations=99.0,
    )


def asked(seeds: int) -> StudyStage:
    return StudyStage(
        study="toy",
        title="Toys",
        asks="Which toy?",
        published_as="Table 0: FID of nobody's model",
        notes=("A note.",),
        x_label="",
        others=(),
        rows=(
            StudyRow(label="one", changes={}, published=32.85),
            StudyRow(label="a|b", changes={"generate.sampler.step_size": 0.2}),
        ),
        seeds=seeds,
        base={k: v for k, v in to_json(demo()).items() if k in BASE},
    )


BASE = ("source", "network", "objective", "train", "generate")


# -- arithmetic ---------------------------------------------------------------------------------


def test_a_mean_has_students_interval() -> None:
    mean, low, high = mean_interval([1.0, 2.0, 6.0])
    # Variance 7 of three values: the standard error is the root of 7 / 3.
    reach = T_975_OF_2 * math.sqrt(7 / 3)
    assert mean == 3.0
    assert low == pytest.approx(3.0 - reach, rel=1e-12)
    assert high == pytest.approx(3.0 + reach, rel=1e-12)


def test_the_time_of_a_row_is_that_of_all_its_repetitions_or_none() -> None:
    assert study._mean([2.0, 4.0]) == 3.0
    assert study._mean([2.0, None]) is None
    assert study._mean([]) is None


def test_one_value_has_no_interval_and_none_is_refused() -> None:
    assert mean_interval([4.0]) == (4.0, None, None)
    with pytest.raises(DataError, match="no values"):
        mean_interval([])


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9), st.floats(-10, 10))
def test_an_interval_moves_and_scales_with_its_values(values: list[float], by: float) -> None:
    mean, low, high = mean_interval(values)
    assert low is not None
    assert high is not None
    assert low <= mean <= high
    moved = mean_interval([2 * v + by for v in values])
    assert moved == pytest.approx((2 * mean + by, 2 * low + by, 2 * high + by), abs=1e-8)


def test_rows_are_held_against_the_first_in_pairs() -> None:
    first = [evaluation(v) for v in (1.0, 5.0, 9.0)]
    second = [evaluation(v, step=0.2) for v in (2.0, 6.5, 10.5)]
    table = summarise(asked(3), [first, second])
    found = table.rows[1].against_first
    assert found is not None
    assert found.values == (1.0, 1.5, 1.5)
    # Repetitions differ by far more than rows do: pairs alone tell them apart.
    assert found.low is not None
    assert found.low > 0
    distance = table.rows[1].metrics["distance"]
    assert distance.low is not None
    assert distance.low < 1.0
    assert distance.lows == (1.75, 6.25, 10.25)
    assert table.rows[0].against_first is None
    assert table.protocols_differ_in == ("generate.sampler.step_size",)


def test_one_repetition_has_the_metrics_own_interval() -> None:
    table = summarise(asked(1), [[evaluation(2.0)], [evaluation(3.0, step=0.2)]])
    found = table.rows[0].metrics["distance"]
    assert (found.value, found.low, found.high, found.beside) == (2.0, 1.75, 2.25, 0.5)
    assert table.rows[1].against_first is not None
    assert table.rows[1].against_first.low is None


def test_protocols_that_differ_in_what_no_row_changes_are_no_table() -> None:
    with pytest.raises(DataError, match=r"protocols differ in generate\.noise, which no row"):
        summarise(asked(1), [[evaluation(2.0)], [evaluation(3.0, noise=1.0)]])


FAILED = "train: loss nan: training has diverged"


def with_a_failure(number: int = 1) -> tuple[StudyStage, StudyTable]:
    """Three repetitions of two rows; the second repetition of one row diverged."""
    stage = replace(asked(3), failed={f"0{number}-01": FAILED})
    cells = [
        [evaluation(v) for v in (1.0, 5.0, 9.0)],
        [evaluation(v, step=0.2) for v in (2.0, 6.5, 10.5)],
    ]
    row = [cell if k != 1 else None for k, cell in enumerate(cells[number])]
    return stage, summarise(stage, [row if i == number else cells[i] for i in range(2)])


def test_a_row_that_diverged_has_no_mean_and_the_others_have_theirs() -> None:
    _, table = with_a_failure()
    whole, failed = table.rows
    assert whole.metrics["distance"].value == 5.0
    assert (failed.metrics, failed.evaluations, failed.against_first) == ({}, None, None)
    assert failed.failed == {"2": FAILED}
    assert failed.distances == (2.0, None, 10.5)


def test_nothing_is_held_against_a_first_row_that_diverged() -> None:
    _, table = with_a_failure(0)
    assert table.rows[0].failed == {"2": FAILED}
    assert table.rows[1].against_first is None
    assert table.names == {"distance": "FD[toy]-10", "recall": "recall[toy]-10"}


def test_a_study_of_which_all_rows_diverged_is_refused_with_the_reason() -> None:
    stage = replace(asked(1), failed={"00-00": FAILED, "01-00": FAILED})
    with pytest.raises(DataError, match=rf"no row has all its repetitions.*{FAILED}"):
        summarise(stage, [[None], [None]])


def scored(*areas: float) -> list[Evaluation]:
    """Evaluations of several repetitions, whose energy has these areas; a baseline has 0.75."""
    fields = {f.name: 0.5 for f in dataclasses.fields(OODRow) if f.type in (float, "float")}
    common = {**fields, "name": "constant", "count": 30, "held_out": 30, "gated": False}

    def one(score: str, role: str, area: float) -> OODRow:
        ends = {"auroc": area, "auroc_low": area - 0.125, "auroc_high": area + 0.125}
        return OODRow(**{**common, "score": score, "role": role, **ends})

    return [
        replace(
            evaluation(1.0),
            ood=(one("energy", "main", area), one("pixel_gaussian", "baseline", 0.75)),
        )
        for area in areas
    ]


def test_what_lies_outside_is_told_for_each_row_and_once_for_baselines() -> None:
    stage = replace(asked(3), outliers=True)
    table = summarise(stage, [scored(0.5, 0.625, 0.75), scored(0.875, 1.0, 0.9375)])
    found = {(one.row, one.score): one.auroc for one in table.outliers}
    assert list(found) == [("one", "energy"), ("a|b", "energy"), ("", "pixel_gaussian")]
    energy, wide, baseline = found.values()
    assert (energy.value, energy.values) == (0.625, (0.5, 0.625, 0.75))
    reach = T_975_OF_2 * 0.125 / math.sqrt(3)
    assert energy.low == pytest.approx(0.625 - reach)
    assert energy.lows == (0.375, 0.5, 0.625)
    assert wide.high == 1.0
    # No repetition changes it, so its interval is that of other images.
    assert (baseline.value, baseline.low, baseline.high) == (0.75, 0.625, 0.875)
    assert summarise(asked(3), [scored(0.5, 0.6, 0.7)] * 2).outliers == ()


def test_every_score_of_a_model_is_told_for_its_row() -> None:
    """Also one that is not the main one: it is no baseline, which all rows have in common."""
    stage = replace(asked(1), outliers=True)

    def with_length(cell: Evaluation, area: float) -> Evaluation:
        (main, baseline) = cell.ood
        length = replace(main, score="descent_length", role="score", auroc=area)
        return replace(cell, ood=(main, length, baseline))

    rows = [[with_length(scored(0.5)[0], area)] for area in (0.6, 0.7)]
    found = summarise(stage, rows).outliers
    told = [(one.row, one.auroc.value) for one in found if one.score == "descent_length"]
    assert told == [("one", 0.6), ("a|b", 0.7)]


def test_repetitions_that_were_scored_otherwise_are_no_table() -> None:
    stage = replace(asked(2), outliers=True)
    one, other = scored(0.5, 0.75)
    with pytest.raises(DataError, match="different scores or sets"):
        summarise(stage, [[one, replace(other, ood=other.ood[:1])], [one, other]])


# -- what rows are asked ------------------------------------------------------------------------


def base_of(config: PipelineConfig) -> Base:
    return Base(config=config, latent_shape=latent_shape(config))


@pytest.mark.parametrize("base", ["tiny", "demo", "b2-256", "xl2-256-1400", "b2-512", "cifar10"])
@pytest.mark.parametrize("name", studies.studies())
def test_every_row_of_every_study_is_a_config(name: str, base: str) -> None:
    config = tiny() if base == "tiny" else recipe(base).config
    stage = studies.study(name).stage(base_of(config), seeds=2)
    made = [
        with_settings(config, {**row.changes, **studies.of_seed(config, 1)}) for row in stage.rows
    ]
    assert len({str(to_json(one)) for one in made}) == len(made) >= 2
    for one in made:
        sampler, objective = one.generate.sampler, one.objective
        if sampler.rule in ("gd", "nag") and config.generate.sampler.updates >= 100:
            assert_stable(sampler, objective)
        if not objective.is_equilibrium:
            assert sampler.updates * sampler.step_size == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("base", ["tiny", "b4-256", "cifar10"])
def test_sizes_and_patches_are_of_different_networks(base: str) -> None:
    """Weights and work of each row are its own, also where a setting is another's to read."""
    config = tiny() if base == "tiny" else recipe(base).config
    rows = studies.study("sizes-patches").rows(base_of(config))
    made = [costs.network(with_settings(config, row.changes)) for row in rows]
    assert len({costs.parameters(net) for net in made}) == len(rows) >= 3


def assert_stable(sampler: SamplerConfig, objective: ObjectiveConfig) -> None:
    """Below the edge of the spring that a datum is: 2 (1 - a) / lambda, less for NAG."""
    stiffness = objective.multiplier / (1 - objective.a if objective.c != "linear" else 1.0)
    assert sampler.step_size * stiffness < (1.2 if sampler.rule == "nag" else 2.0)


GD_BY_STEPS = {25: 56.12, 50: 43.34, 100: 38.98, 250: None}
NAG_BY_STEPS = {25: 49.41, 50: 41.07, 100: 38.0, 250: None}
"""Figure 6 of the paper; its steps are one more than updates."""


def test_at_full_size_rows_are_the_papers() -> None:
    base = base_of(recipe("b2-256").config)
    adaptive = studies.study("adaptive").rows(base)
    chosen = next(row for row in adaptive if row.published == 33.79)
    assert chosen.changes == {"generate.sampler.stop_below": 10.0}
    steps = {row.x: row.changes for row in studies.study("step-sizes").rows(base)}
    assert steps[0.7]["generate.sampler.step_size"] == pytest.approx(0.0028, rel=5e-3)
    few = {
        (row.series, row.x): (row.published, row.changes["generate.sampler.updates"])
        for row in studies.study("steps").rows(base)
    }
    assert few == {
        **{("GD", n - 1): (fid, n - 1) for n, fid in GD_BY_STEPS.items()},
        **{("NAG", n - 1): (fid, n - 1) for n, fid in NAG_BY_STEPS.items()},
    }
    assert [row.published for row in studies.study("noise-conditioning").rows(base)] == [
        32.85,
        40.81,
        36.68,
        41.89,
    ]
    sizes = studies.study("sizes-patches").rows(base)
    assert [row.published for row in sizes] == [61.0, 34.4, 17.7, 15.6, None, 57.5, 104.2]
    small = studies.study("sizes-patches").rows(base_of(recipe("b4-256").config))
    published = {row.label: row.published for row in small}
    assert published["B, patch 4"] == 57.5
    assert published["patch 2"] == 34.4
    assert published["S, patch 4"] is None


PUBLISHED = {
    "samplers": (1.93, 1.90, 1.93),
    "step-sizes": (33.24, 32.85, 32.96, 33.62, 34.59, 35.81),
    "steps": (56.12, 43.34, 38.98, 49.41, 41.07, 38.00),
    "adaptive": (32.85, 33.79),
    "partly-noised": (59.6, 54.0, 29.5, 7.6, 4.4, 59.6, 148.5, 134.0, 152.5, 168.5),
    "c-gamma": (38.34, 38.98, 41.22, 50.47, 38.84, 38.75, 40.81),
    "multiplier": (32.85, 38.3, 35.0, 34.6, 34.7, 35.6),
    "noise-conditioning": (32.85, 40.81, 36.68, 41.89),
    "energies": (57.54, 73.40, 75.53),
    "sizes-patches": (61.0, 34.4, 17.7, 15.6, 57.5, 104.2),
    "eqm-vs-flow": (1.90, 2.10),
}
"""FIDs of the paper's tables and figures, in the order of the rows that have one."""


@pytest.mark.parametrize("name", studies.studies())
def test_published_figures_are_the_papers(name: str) -> None:
    rows = studies.study(name).rows(base_of(recipe("b2-256").config))
    assert tuple(row.published for row in rows if row.published is not None) == PUBLISHED[name]


def test_repetitions_share_no_training_and_no_noise() -> None:
    config = demo()
    assert studies.of_seed(config, 0) == {"train.seed": 0, "generate.first_seed": 0}
    assert studies.of_seed(config, 2) == {
        "train.seed": 2,
        "generate.first_seed": 2 * config.generate.samples,
    }


def test_rows_may_not_change_what_numbers_are_measured_with() -> None:
    row = StudyRow(label="x", changes={"extractor.fit.width": 4})
    made = studies.Study(name="x", title="", asks="", published_as="", rows=lambda _: [row])
    with pytest.raises(ConfigError, match="no setting of source"):
        made.stage(Base(config=demo(), latent_shape=(4, 8, 8)), 1)


def test_an_unknown_study_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"study is 'sampler'; it must be one of samplers"):
        studies.study("sampler")


# -- how it looks -------------------------------------------------------------------------------


def record() -> Record:
    first = [evaluation(v) for v in (1.0, 5.0, 9.0)]
    second = [evaluation(v, step=0.2) for v in (2.0, 6.5, 10.5)]
    table = summarise(asked(3), [first, second])
    return Record(
        stage="study",
        algorithm=1,
        config=to_json(asked(3)),
        inputs={},
        outputs={},
        values={"table": to_json(table)},
    )


def test_a_page_is_the_golden_one() -> None:
    made = study_page.render(record(), [1.25, None], picture="toy.svg")
    assert made["md"].decode() == GOLDEN.read_text()


def test_a_picture_stands_alone_and_carries_no_date() -> None:
    one, two = (study_page.render(record(), [None, None], picture="x.svg") for _ in range(2))
    assert one == two
    svg = one["svg"].decode()
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "another protocol" in svg
    assert "matplotlib" not in svg


def page_of(stage: StudyStage, table: StudyTable) -> dict[str, bytes]:
    made = replace(record(), config=to_json(stage), values={"table": to_json(table)})
    return study_page.render(made, [None, None], picture="x.svg")


@pytest.mark.parametrize("x_label", ["", "steps"])
def test_a_page_says_what_diverged_and_shows_the_rest(x_label: str) -> None:
    stage, table = with_a_failure()
    rows = tuple(replace(row, x=1.0 + i, series="GD") for i, row in enumerate(stage.rows))
    made = page_of(replace(stage, x_label=x_label, rows=rows), table)
    page = made["md"].decode()
    heads = next(line for line in page.splitlines() if line.startswith("| row | FD"))
    row = next(
        line for line in page.splitlines() if line.startswith("| a\\|b | diverged in 1 of 3")
    )
    assert row.count(" | ") + row.count("|  |") >= 1
    assert len(row.replace("\\|", "").split("|")) == len(heads.split("|"))
    assert f"* a|b, repetition 2: {FAILED}" in page
    assert "| a\\|b | 2 | diverged | 10.5 |" in page
    assert "* diverged: a|b" in page
    assert "diverged" in made["svg"].decode()


def test_a_page_whose_first_row_diverged_holds_nothing_against_it() -> None:
    page = page_of(*with_a_failure(0))["md"].decode()
    assert "The first row, one, diverged: no row is held against it." in page
    assert "lower (better)" not in page
    assert "Real held-out images have 0.5" in page


def test_a_page_shows_what_lies_outside() -> None:
    stage = replace(asked(3), outliers=True)
    table = summarise(stage, [scored(0.5, 0.625, 0.75), scored(0.875, 1.0, 0.9375)])
    page = page_of(stage, table)["md"].decode()
    assert "| models | score | constant |" in page
    assert "| one | energy | 0.62 (0.31 to 0.94) |" in page
    assert "| baseline | Gaussian on pixels | 0.75 (0.62 to 0.88) |" in page
    assert "Out of distribution" not in page_of(*with_a_failure())["md"].decode()
