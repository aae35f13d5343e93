"""Studies end to end: real stages on 8 x 8 digits, killed in the middle, and told as sealed."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import chain
import pytest
from PIL import Image

from eqm import studies, study
from eqm.config import Job, StudyRow, replace, with_settings
from eqm.errors import ConfigError, DataError, IntegrityError, StageError
from eqm.image_sets import digest_of
from eqm.records import to_json
from eqm.stage import job_digest, run
from eqm.storage import LocalStore
from eqm.studies import Base, Study
from eqm.study_table import table_of
from flows.jobs import Plan, study_job
from flows.plan import make_plan
from flows.study import run_study, sealed_studies, show, write_pages

SEEDS = 2
WITHOUT_OUTLIERS = {
    "evaluate.ood.sets": [],
    "evaluate.ood.baselines": [],
    "policy.minimum_auroc": {},
}
"""To look at them is half of an evaluation, and these studies tell nothing of it."""
PROGRAMS = {**chain.PROGRAMS, "study": study.program}


def rows(base: Base) -> list[StudyRow]:
    step = base.step_size
    return [
        StudyRow(label="base", changes={}, published=32.85),
        StudyRow(label="half as far", changes={"generate.sampler.step_size": step / 2}),
    ]


SMALL = Study(name="small", title="Small", asks="Which?", published_as="Table 0", rows=rows)


class InThisProcess:
    """Runs stages here, counts them, and is killed before a given one."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.begun: list[str] = []
        self.dies_at = dies_at

    def run(self, job: Job, *, processes: int) -> None:
        if len(self.begun) == self.dies_at:
            # Once: whoever goes on after it is found out.
            self.dies_at = None
            raise StageError("killed")
        self.begun.append(f"{job.stage} {job_digest(job)}")
        run(job, PROGRAMS[job.stage])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents and an extractor, as the session's chain has them."""
    made = chain.build(tmp_path_factory.getbasetemp() / "chain")
    folder = tmp_path_factory.mktemp("study") / "store"
    return Path(chain.copied(made, folder, without=("train", "samples", "evaluation")).root)


@pytest.fixture
def plan(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(studies, "STUDIES", (SMALL,))
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "EQM_S3_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EQM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EQM_STORE", str(store))
    config = chain.tiniest(WITHOUT_OUTLIERS)
    return make_plan({"preset": "tiny", **to_json(config)}, tracked=False)


def by(plan: Plan, launcher: InThisProcess) -> Plan:
    return Plan(plan.config, plan.settings, plan.store, launcher)


@pytest.mark.parametrize(
    ("base", "row", "words"),
    [
        ({}, {"train.images": -1}, r"train\.images is -1"),
        ({}, {"network.patch": 3}, "8 x 8 cannot be cut into patches of 3"),
        (
            {"compute.checkpointing": True, "objective.backward": "double"},
            {"objective.energy": "dot"},
            "compute.checkpointing is true, but what a double backward computes",
        ),
        ({}, {"generate.samples": 3}, r"generate\.samples is 3, and each sample has"),
        ({"source.held_out_fraction": 0.0}, {}, r"held_out_fraction is 0, which leaves no image"),
    ],
)
def test_a_row_that_cannot_be_measured_is_refused_before_anything_is_made(
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: dict[str, Any],
    row: dict[str, Any],
    words: str,
) -> None:
    wrong = StudyRow(label="wrong", changes=row)
    small = Study(**{**vars(SMALL), "rows": lambda of: [*rows(of), wrong]})
    monkeypatch.setattr(studies, "STUDIES", (small,))
    launcher, store = InThisProcess(), LocalStore(tmp_path / "empty")
    config = with_settings(plan.config, base)
    settings = replace(plan.settings, store=store.uri)
    with pytest.raises(ConfigError, match=words):
        run_study(Plan(config, settings, store, launcher), "small", seeds=3)
    assert launcher.begun == []


def test_a_study_that_is_killed_goes_on_and_starts_nothing_twice(plan: Plan) -> None:
    killed = InThisProcess(dies_at=5)
    with pytest.raises(StageError, match="killed"):
        run_study(by(plan, killed), "small", seeds=SEEDS)
    assert sealed_studies(plan, chain_train(plan, killed)) == {}

    going_on = InThisProcess()
    record = run_study(by(plan, going_on), "small", seeds=SEEDS)
    stages = Counter(line.split()[0] for line in killed.begun + going_on.begun)
    # Rows that change the sampler alone share a training.
    assert stages == {"train": 2, "samples": 4, "evaluation": 4, "study": 1}
    assert len({*killed.begun, *going_on.begun}) == stages.total()

    nothing = InThisProcess()
    assert run_study(by(plan, nothing), "small", seeds=SEEDS) == record
    assert nothing.begun == []

    table = table_of(record)
    assert [row.label for row in table.rows] == ["base", "half as far"]
    for row in table.rows:
        found = row.metrics["distance"]
        assert len(found.values) == SEEDS
        assert found.low is not None
        assert found.high is not None
        assert found.low <= found.value <= found.high
    assert table.protocols_differ_in == ("generate.sampler.step_size",)

    # Every model in it knows of it, and a model that is not knows of none.
    asked = [r for r in (line.split() for line in going_on.begun + killed.begun)]
    for digest in (digest for stage, digest in asked if stage == "train"):
        model = plan.store.record("train", digest)
        assert sealed_studies(plan, model) == {"small": record.ref}
    assert sealed_studies(plan, record.ref) == {}
    assert sealed_studies(plan) == {"small": record.ref}


def chain_train(plan: Plan, launcher: InThisProcess):
    digest = next(line.split()[1] for line in launcher.begun if line.startswith("train"))
    return plan.store.record("train", digest)


def test_the_pages_of_a_study_are_made_once_and_are_the_same(plan: Plan, tmp_path: Path) -> None:
    record = run_study(by(plan, InThisProcess()), "small", seeds=SEEDS)
    shown, again = show(plan, record), show(plan, record)
    assert shown == again
    page = shown.texts["md"].decode()
    assert "![" in page
    assert "| half as far |" in page
    assert "another protocol: Table 0" in " ".join(page.split())
    assert json.loads(shown.texts["json"])["study"] == record.digest
    folder = tmp_path / "pages"
    folder.mkdir()
    assert {p.name for p in write_pages(plan, record, folder)} == {
        "small.md",
        "small.svg",
        "small.json",
    }
    assert "(small.svg)" in (folder / "small.md").read_text()


class Told(InThisProcess):
    """Whose failures come as those of a launched program do, in words alone."""

    def run(self, job: Job, *, processes: int) -> None:
        try:
            super().run(job, processes=processes)
        except DataError as error:
            raise StageError(str(error)) from None


def test_rows_that_diverge_are_told_and_the_others_go_on(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = [
        StudyRow(label="training runs off", changes={"train.learning_rate": 1e30}),
        StudyRow(label="samples run off", changes={"generate.sampler.step_size": 1e6}),
    ]

    def all_rows(base: Base) -> list[StudyRow]:
        first, second = rows(base)
        return [first, *wild, second]

    mixed = Study(**{**vars(SMALL), "name": "mixed", "rows": all_rows})
    monkeypatch.setattr(studies, "STUDIES", (mixed,))
    record = run_study(by(plan, Told()), "mixed", seeds=1)
    table = table_of(record)
    base, training, samples, half = table.rows
    assert base.metrics
    assert half.metrics
    assert half.against_first is not None
    assert list(training.failed) == list(samples.failed) == ["1"]
    assert "train: " in training.failed["1"]
    assert "training has diverged" in training.failed["1"]
    assert "samples: 20 of 20 samples diverged" in samples.failed["1"]
    assert record.config["failed"] == {
        "01-00": training.failed["1"],
        "02-00": samples.failed["1"],
    }
    assert set(record.inputs) == {"00-00", "03-00"}
    assert "| training runs off | diverged in 1 of 1 |" in show(plan, record).texts["md"].decode()

    again = Told()
    assert run_study(by(plan, again), "mixed", seeds=1) == record
    assert again.begun == []


def test_a_sealed_study_needs_nothing_any_more(
    plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outside = tmp_path / "set"
    for k in range(2):
        outside.mkdir(exist_ok=True)
        Image.new("L", (8, 8), 90 * k).save(outside / f"{k}.png")
    files = {"kind": "folder", "uri": str(outside)}
    own = {"evaluate.ood.sets": [{"name": "mine", **files, "sha256": digest_of(**files)}]}
    with_set = replace(by(plan, InThisProcess()), config=with_settings(plan.config, own))
    caplog.set_level("INFO")
    record = run_study(with_set, "small", seeds=1)
    assert "policy" not in caplog.text, "nothing is judged"
    shutil.rmtree(outside)
    again = InThisProcess()
    assert run_study(by(with_set, again), "small", seeds=1) == record
    assert again.begun == []
    # One that lacks a cell is told what its evaluation will need.
    with pytest.raises(DataError, match=r"sets\['mine'\]\.uri .* does not exist"):
        run_study(by(with_set, again), "small", seeds=2)
    assert again.begun == []


def test_a_failure_that_is_no_divergence_ends_a_study(plan: Plan) -> None:
    config = with_settings(plan.config, {"train.seed": 77})
    launcher = InThisProcess(dies_at=0)
    other = Plan(config, plan.settings, plan.store, launcher)
    with pytest.raises(StageError, match="killed"):
        run_study(other, "small", seeds=1)
    assert launcher.begun == []


def test_a_study_of_more_seeds_is_the_one_that_counts(plan: Plan, tmp_path: Path) -> None:
    more = run_study(by(plan, InThisProcess()), "small", seeds=SEEDS)
    run_study(by(plan, InThisProcess()), "small", seeds=1)
    assert sealed_studies(plan)["small"] == more.ref


def test_a_damaged_seal_counts_for_nothing(plan: Plan, store: Path, tmp_path: Path) -> None:
    record = run_study(by(plan, InThisProcess()), "small", seeds=SEEDS)
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    path = copy / "study" / record.digest / "record.json"
    text = path.read_text().replace('"label": "base"', '"label": "bass"')
    path.unlink()
    path.write_text(text)
    elsewhere = Plan(plan.config, plan.settings, type(plan.store)(copy), plan.launcher)
    with pytest.raises(IntegrityError):
        sealed_studies(elsewhere)


def test_a_job_of_a_study_knows_its_cells(plan: Plan) -> None:
    base = Base(config=plan.config, latent_shape=(1, 8, 8))
    one, two = (study_job(plan, SMALL.stage(base, seeds), {}) for seeds in (1, 2))
    assert job_digest(one) != job_digest(two)
