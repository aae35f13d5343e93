"""The whole story with real services and real stage programs: once, again, elsewhere, deployed."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import boto3
import mlflow
import numpy as np
import pytest
from deployed import ended, pictures, start_deployment
from mlflow import MlflowClient
from typer.testing import CliRunner

import eqm
from eqm import champion, dossier
from eqm.config import SamplerConfig, demo_policy, replace
from eqm.errors import IntegrityError
from eqm.latent_set import open_manifest
from eqm.model import version_of
from eqm.records import Decision, Record, digest, from_json, to_json
from eqm.stage import git_revision, open_ref, verify
from eqm.storage import Store, open_store
from flows import cli
from flows.plan import read_config
from infra.deployments import PrefectApi

pytestmark = [pytest.mark.services, pytest.mark.timeout(400)]

PROJECT = Path(__file__).resolve().parent.parent.parent
NAME = "test-run"
MODEL = f"eqm-{NAME}"
SMALL = f"""
preset = "tiny"
name = "{NAME}"

[source]
image_size_px = 8

[autoencoder]
kind = "identity"

[extractor.fit]
width = 8
dimension = 8
images = 128

[network]
width = 16
depth = 1
heads = 2

[train]
images = 512

[generate]
samples = 40

[generate.sampler]
updates = 4

[evaluate]
grid_rows = 1

[evaluate.ood]
images = 20
descent_updates = 2

[policy]
minimum_samples = 40
"""
MARKERS = {
    "HF_TOKEN": "marker-of-a-token",
    "DATABASE_URL": "postgresql://me:marker-of-a-password@host/x",
}
"""Secrets of whoever runs the pipeline, which are nobody else's business."""
FLOW = """
import json, sys
from pathlib import Path
from flows.settings import activate
activate()
from flows.pipeline import pipeline
{before}
result = pipeline(config=sys.argv[1])
Path(sys.argv[2]).write_text(json.dumps(result))
"""
STAGES_IN_THIS_PROCESS = """
import importlib
from eqm.config import PROGRAMS
from eqm.records import to_json
from flows.launch import LocalLauncher

def run(self, job, *, processes=1):
    self.folder.mkdir(parents=True, exist_ok=True)
    file = self.folder / f"{job.stage}.json"
    file.write_text(json.dumps(to_json(job)))
    assert importlib.import_module(PROGRAMS[job.stage]).main([str(file)]) == 0

LocalLauncher.run = run
"""


STUDY = """
import json, sys
from pathlib import Path
from flows.settings import activate
activate()
{before}
from eqm import studies
from eqm.config import StudyRow
from eqm.studies import Study
rows = [
    StudyRow(label="as it is", changes={{}}, published=32.85),
    StudyRow(label="one update", changes={{"generate.sampler.updates": 1}}),
]
studies.STUDIES = (
    Study(name="Small", title="Small", asks="Which?", published_as="T", rows=lambda base: rows),
)
from flows.study import study
result = study(name="Small", config=sys.argv[1], seeds=1)
Path(sys.argv[2]).write_text(json.dumps(result))
"""


class Ran:
    """A pipeline that has run once, from an empty store."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.config = folder / "small.toml"
        self.config.write_text(SMALL)
        self.home = Path(environment["EQM_HOME"])
        self.mlflow_uri = environment["MLFLOW_TRACKING_URI"]
        self.result = run_flow(self.config, folder / "result.json", {**os.environ, **MARKERS})

    @property
    def store(self) -> Store:
        return open_store("s3://eqm/store", cache=self.home / "cache")

    def standing(self) -> champion.Entry:
        found = champion.current(self.store, MODEL)
        assert found is not None
        return found

    def record(self, stage: str) -> Record:
        """Of a stage of the run, found from the champion's evidence."""
        entry = self.standing()
        if stage == "evaluation":
            return open_ref(self.store, entry.evaluation)
        if stage == "train":
            return open_ref(self.store, entry.train)
        if stage == "latents":
            return open_ref(self.store, self.record("train").inputs["latents"])
        return open_ref(self.store, self.record("evaluation").inputs[stage])

    def launched(self) -> dict[str, int]:
        """Job files, and when each was written: every launch writes one."""
        return {f.name: f.stat().st_mtime_ns for f in (self.home / "jobs").iterdir()}

    def pipeline(self) -> subprocess.CompletedProcess[str]:
        return eqm_command("pipeline", str(self.config))


def run_flow(
    config: Path, to: Path, environ: Any, *, before: str = "", flow: str = FLOW
) -> dict[str, Any]:
    line = [sys.executable, "-c", flow.format(before=before), str(config), str(to)]
    told = subprocess.run(
        line, cwd=PROJECT, env=dict(environ), capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stdout + told.stderr
    return json.loads(to.read_text())


def eqm_command(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "flows.cli", *words]
    return subprocess.run(line, cwd=PROJECT, capture_output=True, text=True, check=False)


_ran: dict[str, Ran] = {}


@pytest.fixture
def ran(all_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    if not _ran:
        _ran["once"] = Ran(tmp_path_factory.mktemp("pipeline"), all_environment)
    return _ran["once"]


# -- once ---------------------------------------------------------------------------------------


def test_images_to_champion(ran: Ran) -> None:
    result = ran.result
    assert (result["model"], result["version"], result["promoted"]) == (MODEL, 1, True)
    report = Path(result["report"]).read_bytes()
    assert report.startswith(b"<!doctype html>") or report.startswith(b"<!DOCTYPE html>")
    assert NAME.encode() in report
    assert result["run_page"].startswith(f"{ran.mlflow_uri}/#/experiments/")
    for stage in ("latents", "train", "samples", "evaluation"):
        assert ran.record(stage).content == result[stage]
        verify(ran.store, ran.record(stage))
    launched = {name.partition("-")[0] for name in ran.launched()}
    assert {"autoencoder", "extractor", "latents", "train", "samples", "evaluation"} <= launched
    entry = ran.standing()
    assert ran.store.read(entry.report) == report
    assert json.loads(ran.store.read(entry.report.replace(".html", ".json")))


def test_mlflow_shows_the_run_and_the_model(ran: Ran) -> None:
    client = MlflowClient(ran.mlflow_uri)
    train = ran.record("train")
    version = client.get_model_version_by_alias(MODEL, "champion")
    assert version.version == client.get_model_version_by_alias(MODEL, "candidate").version
    assert version.source == f"s3://eqm/store/train/{train.digest}"
    assert version.tags["eqm.train"] == train.digest
    assert version.tags["eqm.content"] == train.content
    assert version.tags["eqm.weights"] == train.outputs["ema.safetensors"].sha256
    assert version.tags["eqm.data"] == ran.result["latents"]
    assert version.tags["eqm.evaluation"] == ran.record("evaluation").digest
    lineage = {"eqm.config": digest(read_config(str(ran.config))), "eqm.history": "1"}
    lineage |= {"eqm.git_revision": git_revision() or "unknown"}
    lineage |= {"eqm.report": ran.standing().report}
    assert {name: version.tags[name] for name in lineage} == lineage

    run = client.get_run(str(version.run_id))
    assert run.info.status == "FINISHED"
    # What is seen first is what it came to.
    evaluated = ran.record("evaluation").digest[:12]
    assert version.description.startswith(f"Evaluation `{evaluated}`, 40 samples.\n\n**Passed**")
    assert run.data.tags["mlflow.note.content"] == version.description
    shown_as = client.get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"]
    assert shown_as == "custom_model_development"
    assert run.data.tags["eqm.digest"] == train.digest
    assert {"loss", "gradient_norm", "images_per_second"} <= set(run.data.metrics)
    assert client.get_metric_history(run.info.run_id, "loss")[-1].step == 512
    assert run.data.params["train.images"] == "512"
    measured = dossier.evaluation_of(ran.record("evaluation"))
    assert run.data.tags["eqm.protocol.eval"] == measured.protocol_digest
    shown = run.data.metrics
    assert shown["eval/distance"] == measured.metrics["distance"].value
    for key, metric in measured.metrics.items():
        ends = (shown.get(f"eval/{key}.low"), shown.get(f"eval/{key}.high"))
        assert ends == (metric.low, metric.high)
    assert shown["eval/precision.low"] < shown["eval/precision.high"]
    for row in measured.ood:
        if row.role == "main":
            assert shown[f"eval/auroc_{row.name}.low"] == row.auroc_low
    kept = artifacts(client, run.info.run_id)
    assert any(path.endswith(".png") for path in kept), kept
    assert {"report/report.html", "report/report.json"} <= set(kept)


def test_prefect_links_the_report_and_shows_its_numbers(ran: Ran) -> None:
    api = PrefectApi(os.environ["PREFECT_API_URL"], os.environ)
    shown = {
        one: api._post("/artifacts/filter", {"artifacts": {"key": {"any_": [f"{MODEL}-{one}"]}}})
        for one in ("report", "evaluation")
    }
    client = MlflowClient(ran.mlflow_uri)
    version = client.get_model_version_by_alias(MODEL, "champion")
    assert f"]({ran.mlflow_uri}/#/experiments/" in shown["report"][0]["data"]
    assert str(version.run_id) in shown["report"][0]["data"]
    assert shown["evaluation"][0]["data"] == version.description


def test_mlflow_shows_the_signature_and_loads_the_model(
    ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = f"name={MODEL}&version=1&path=MLmodel"
    with urllib.request.urlopen(f"{ran.mlflow_uri}/model-versions/get-artifact?{asked}") as page:
        described = json.loads(page.read())
    assert '"name": "labels"' in described["signature"]["inputs"]
    assert "[-1, 1, 8, 8]" in described["signature"]["outputs"]
    assert described["metadata"]["eqm.content"] == ran.result["train"]

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    served = mlflow.pyfunc.load_model(f"models:/{MODEL}@champion")
    labels, seeds = np.array([3, 7]), np.array([0, 1])
    images = served.predict({"labels": labels, "seeds": seeds}, params={"updates": 2})
    model = eqm.load(f"models:/{MODEL}@champion", mlflow_uri=ran.mlflow_uri)
    settings = open_ref(ran.store, ran.record("samples").ref).config["generate"]["sampler"]
    rule = eqm.NAG(step_size=settings["step_size"], momentum=settings["momentum"])
    expected = eqm.sample(model, labels=[3, 7], seeds=[0, 1], updates=2, rule=rule)
    np.testing.assert_array_equal(images, expected.images().cpu().numpy())


def test_a_champion_is_sampled_as_it_was_for_its_evaluation(ran: Ran, tmp_path: Path) -> None:
    judged = f"models:/{MODEL}@champion"
    version = version_of(judged, ran.mlflow_uri)
    sampler = dossier.sampler_of(ran.store, version)
    assert to_json(sampler) == ran.record("samples").config["generate"]["sampler"]
    assert sampler != SamplerConfig()
    words = ["sample", judged, "--seeds", "0", "--labels", "0", "--to", str(tmp_path / "grid.png")]
    told = CliRunner().invoke(cli.app, words)
    assert told.exit_code == 0, told.output
    assert "nag, step size 0.003, 4 updates, momentum 0.3 (as for its evaluation)" in told.stderr
    told = CliRunner().invoke(cli.app, [*words, "--step-size", "0.01", "--updates", "2"])
    assert "nag, step size 0.01, 2 updates, momentum 0.3 (as asked for)" in told.stderr

    other = replace(version, source=version.source[:-64] + 64 * "0")
    with pytest.raises(IntegrityError, match=r"names evaluation .*itself is training 000000000000"):
        dossier.sampler_of(ran.store, other)
    torn = {**version.tags, "eqm.evaluation_content": 64 * "0"}
    with pytest.raises(IntegrityError, match="has content"):
        dossier.sampler_of(ran.store, replace(version, tags=torn))
    assert dossier.sampler_of(ran.store, replace(version, tags={})) is None


def test_the_history_of_the_pipeline_is_whole(ran: Ran) -> None:
    found = champion.examine(ran.store, MODEL)
    assert found.faults == []
    for entry in found.entries:
        assert champion.missing_evidence(ran.store, entry) == []
        assert {"by", "machine", "flow_run", "git_revision"} <= set(entry.provenance)
        assert entry.provenance["flow_run"]
    assert ran.standing().evidence is not None


@pytest.mark.slow
def test_a_study_of_the_model_is_shown_by_mlflow_and_prefect(ran: Ran, tmp_path: Path) -> None:
    before = ran.launched()
    result = run_flow(
        ran.config, tmp_path / "told.json", os.environ, before=STAGES_IN_THIS_PROCESS, flow=STUDY
    )
    # The row that changes nothing is the pipeline's own model, samples and evaluation.
    assert set(ran.launched()) - set(before) <= {"samples.json", "evaluation.json", "study.json"}
    record = ran.store.record("study", result["study"])
    assert record is not None
    assert record.inputs["00-00"].content == ran.result["evaluation"]
    page = ran.store.read(result["page"].removeprefix("s3://eqm/store/"))
    client = MlflowClient(ran.mlflow_uri)
    run = client.get_run(str(client.get_model_version_by_alias(MODEL, "champion").run_id))
    assert "study/Small/01/distance" in run.data.metrics
    kept = client.download_artifacts(run.info.run_id, "studies/Small.md", str(tmp_path))
    assert Path(kept).read_bytes() == page
    api = PrefectApi(os.environ["PREFECT_API_URL"], os.environ)
    shown = api._post("/artifacts/filter", {"artifacts": {"key": {"any_": ["study-small"]}}})
    assert [one["data"] for one in shown] == [page.decode()]


def artifacts(client: MlflowClient, run_id: str, folder: str | None = None) -> list[str]:
    found = client.list_artifacts(run_id, folder)
    inner = [path for one in found if one.is_dir for path in artifacts(client, run_id, one.path)]
    return [one.path for one in found if not one.is_dir] + inner


def test_the_champion_is_loaded_by_its_alias(ran: Ran) -> None:
    model = eqm.load(f"models:/{MODEL}@champion", mlflow_uri=ran.mlflow_uri)
    assert model.spec.latent.shape == (1, 8, 8)
    found = eqm.sample(model, labels=[0, 1], seeds=[0, 1], updates=2)
    assert found.images().shape == (2, 1, 8, 8)


def test_no_secret_is_written_anywhere(ran: Ran) -> None:
    """Not in logs, parameters, tags, databases, job files, artifacts, records or reports."""
    made = json.loads((ran.home / "credentials.json").read_text())
    password = made["prefect_auth"].partition(":")[2]
    header = base64.b64encode(made["prefect_auth"].encode()).decode()
    secrets = [made[name] for name in made if name.endswith(("secret_key", "write_key"))]
    secrets += [password, header, made["grpc_key"].splitlines()[1], *MARKERS.values()]
    written = {str(path.relative_to(ran.home)): path.read_bytes() for path in written_by(ran.home)}
    s3 = boto3.client("s3")
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket="eqm"):
        for one in page["Contents"]:
            written[one["Key"]] = s3.get_object(Bucket="eqm", Key=one["Key"])["Body"].read()
    written["report"] = Path(ran.result["report"]).read_bytes()
    places = ("logs/", "jobs/", "mlflow/mlflow.db", "prefect/prefect.db", "store/train/", "mlflow/")
    assert not [place for place in places if not any(name.startswith(place) for name in written)]
    assert sum(NAME.encode() in data for data in written.values()) > 5
    shown = [
        (name, number)
        for number, secret in enumerate(secrets)
        for name, data in written.items()
        if secret.encode() in data
    ]
    assert shown == []


def written_by(home: Path) -> list[Path]:
    """Files of a home but for its credentials, and S3's own: objects are read through S3."""
    kept = {home / "credentials.json", home / "lock"}
    files = (path for path in home.rglob("*") if path.is_file() and path not in kept)
    return [path for path in files if path.relative_to(home).parts[0] not in ("s3", "cache")]


# -- again --------------------------------------------------------------------------------------


def test_the_second_run_launches_nothing(ran: Ran) -> None:
    before, report = ran.launched(), Path(ran.result["report"]).read_bytes()
    page = ran.result["run_page"]
    history = champion.history(ran.store, MODEL)
    keys = ran.store.list("")
    told = ran.pipeline()
    said = told.stdout + told.stderr
    assert told.returncode == 0, said
    assert ran.launched() == before
    assert "starting" not in said
    assert said.count("sealed and verified, skipped") == 7
    assert f"{MODEL} version 1: champion" in told.stdout
    assert page in told.stdout
    assert Path(ran.result["report"]).read_bytes() == report
    assert champion.history(ran.store, MODEL) == history
    assert ran.store.list("") == keys
    for noise in ("Traceback", "Waiting up to", "View run", "Warning"):
        assert noise not in said


def test_one_changed_bit_is_refused(ran: Ran) -> None:
    blob = ran.record("train").outputs["ema.safetensors"]
    s3 = boto3.client("s3")
    where = {"Bucket": "eqm", "Key": f"store/{blob.key}"}
    sealed = s3.get_object(**where)["Body"].read()
    changed = bytearray(sealed)
    changed[len(changed) // 2] ^= 1
    before = ran.launched()
    # As on a machine that has no copies of its own.
    shutil.rmtree(ran.home / "cache")
    s3.put_object(Body=bytes(changed), **where)
    try:
        with pytest.raises(IntegrityError, match=rf"{blob.sha256} is damaged"):
            eqm.load(f"models:/{MODEL}@champion", mlflow_uri=ran.mlflow_uri)
        told = ran.pipeline()
    finally:
        s3.put_object(Body=sealed, **where)
    assert told.returncode == 2
    assert f"error: s3://eqm/store/{blob.key} is damaged" in told.stderr
    assert "restore it from a copy" in told.stderr
    assert "Traceback" not in told.stdout + told.stderr
    assert ran.launched() == before
    eqm.load(f"models:/{MODEL}@champion", mlflow_uri=ran.mlflow_uri)


@pytest.mark.slow
def test_a_night_looks_at_the_champion_once(ran: Ran, tmp_path: Path) -> None:
    standing, client = ran.standing(), MlflowClient(ran.mlflow_uri)
    run_id = client.get_model_version_by_alias(MODEL, "champion").run_id
    before = client.get_run(run_id).data.metrics
    night = """
from flows.evaluate import reevaluate_champion
def pipeline(config):
    return {"at": reevaluate_champion(config=config, as_of="2026-01-02")}
"""
    first = run_flow(
        ran.config, tmp_path / "1.json", os.environ, before=STAGES_IN_THIS_PROCESS + night
    )
    refuse = "from flows.launch import LocalLauncher\nLocalLauncher.run = None\n"
    again = run_flow(ran.config, tmp_path / "2.json", os.environ, before=refuse + night)
    assert first == again, "the same day asks for the same thing"

    digest = first["at"].split("/")[-2]
    looked = ran.store.record("evaluation", digest)
    assert looked is not None
    assert looked.inputs["train"] == standing.train
    assert looked.values["protocol_digest"] == ran.record("evaluation").values["protocol_digest"]
    samples = open_ref(ran.store, looked.inputs["samples"])
    assert samples.config["generate"]["first_seed"] > 0
    assert ran.standing() == standing, "a nightly look promotes nothing"
    after = client.get_run(run_id).data.metrics
    assert {k: after[k] for k in before} == before, "the numbers of the promotion stay"
    assert "nightly/distance" in after


# -- elsewhere ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_empty_store_gets_the_same_contents(ran: Ran, tmp_path: Path) -> None:
    config = tmp_path / "other.toml"
    config.write_text(SMALL.replace(NAME, "test-other"))
    environ = {**os.environ, "EQM_STORE": "s3://eqm/other"}
    result = run_flow(config, tmp_path / "result.json", environ, before=STAGES_IN_THIS_PROCESS)
    for stage in ("latents", "train", "samples", "evaluation"):
        assert result[stage] == ran.result[stage], stage
    found = MlflowClient(ran.mlflow_uri).get_model_version_by_alias("eqm-test-other", "champion")
    assert found.source.startswith("s3://eqm/other/train/")


# -- deployed -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_deployed_run_encodes_a_folder_of_pictures(
    all_environment: dict[str, str], tmp_path: Path
) -> None:
    # Of its own: whoever had encoded the same ones would leave nothing to do.
    pictures(tmp_path / "pictures", seed=4)
    config = {
        "preset": "tiny",
        "name": "test-folder",
        "source_uri": str(tmp_path / "pictures"),
        "source": {"kind": "folder", "image_size_px": 8, "channels": 3},
        "autoencoder": {"kind": "identity"},
    }
    api = PrefectApi(all_environment["PREFECT_API_URL"], all_environment)
    home = Path(all_environment["EQM_HOME"])
    state = ended(api, start_deployment(api, "encode", {"config": config}))
    assert state["type"] == "COMPLETED", (home / "logs" / "worker.log").read_text()
    (job,) = [
        job
        for file in (home / "jobs").glob("latents-*.json")
        if (job := json.loads(file.read_text()))["runtime"]["source_uri"] == config["source_uri"]
    ]
    store = open_store(job["runtime"]["store"], cache=home / "cache")
    (record,) = [
        record
        for key in store.list("latents/")
        if key.endswith("record.json")
        and (record := from_json_record(store, key)).inputs["source"].digest
        == job["inputs"]["source"]["digest"]
    ]
    manifest = open_manifest(record, store).manifest
    assert manifest.classes == ("circles", "squares")
    assert manifest.count == 24
    assert manifest.spec.shape == (3, 8, 8)


def test_a_cancelled_run_leaves_no_program(all_environment: dict[str, str]) -> None:
    api = PrefectApi(all_environment["PREFECT_API_URL"], all_environment)
    home = Path(all_environment["EQM_HOME"])
    endless = {"preset": "tiny", "autoencoder": {"fit": {"images": 10**9}}}
    run = start_deployment(api, "encode", {"config": endless})
    deadline = time.monotonic() + 120
    while not programs("eqm.fit", home):
        assert time.monotonic() < deadline, (home / "logs" / "worker.log").read_text()
        time.sleep(0.2)
    api._post(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    state = ended(api, run)
    assert state["type"] == "CANCELLED", (home / "logs" / "worker.log").read_text()
    while programs("eqm.fit", home):
        assert time.monotonic() < deadline, programs("eqm.fit", home)
        time.sleep(0.2)


def programs(module: str, home: Path) -> list[str]:
    """Processes of a stage program that were given a job of these services."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = entry.joinpath("cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if module.encode() in line and any(os.fsencode(home) in word for word in line):
                found.append(entry.name)
    return found


def from_json_record(store: Store, key: str) -> Record:
    body = json.loads(store.read(key))
    return from_json(Record, {k: v for k, v in body.items() if k not in ("digest", "content")}, key)


# -- the demo -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_becomes_champion_by_its_own_policy(all_environment: dict[str, str]) -> None:
    """What `make demo` runs, at its full size: minutes."""
    told = eqm_command("pipeline", "demo", "--set", "name=test-demo")
    assert told.returncode == 0, told.stdout + told.stderr
    assert "eqm-test-demo version 1: champion" in told.stdout
    store = open_store("s3://eqm/store", cache=Path(all_environment["EQM_HOME"]) / "cache")
    entry = champion.current(store, "eqm-test-demo")
    assert entry is not None
    assert from_json(Decision, entry.decision).policy == to_json(demo_policy())
    measured = dossier.evaluation_of(open_ref(store, entry.evaluation))
    assert measured.samples == 1797
    agreement, near = measured.metrics["label_agreement"], measured.metrics["nearest"]
    assert agreement.value >= 0.9
    # The reader itself is right of nearly all real digits.
    assert agreement.beside is not None
    assert agreement.beside > 0.95
    # Samples are no copies: not nearer to what was trained on than real images are.
    assert near.beside is not None
    assert near.value > near.beside
    distance = measured.metrics["distance"]
    assert distance.beside is not None
    assert distance.value < distance.beside + 2


# -- a successor, and the way back --------------------------------------------------------------


@pytest.mark.slow
def test_a_successor_is_compared_under_its_own_protocol_and_stays_rolled_back(
    ran: Ran, tmp_path: Path
) -> None:
    changed = """
from flows import pipeline as module
from flows.promote import promote, rollback
CHANGES = {
    "train.seed": 1,
    "generate.sampler.updates": 5,
    "policy.maximum_distance_ratio": 1000.0,
}
def pipeline(config):
    first = module.pipeline(config, CHANGES)
    back = rollback(config)
    again = module.pipeline(config, CHANGES)
    asked = promote(config, CHANGES)
    insisted = promote(config, CHANGES, despite_rollback=True)
    return [first["promoted"], back, again["promoted"], asked, insisted]
"""
    ended = run_flow(
        ran.config, tmp_path / "1.json", os.environ, before=STAGES_IN_THIS_PROCESS + changed
    )
    assert ended == [True, 1, False, False, True]
    entries = champion.history(ran.store, MODEL)
    assert [e.action for e in entries] == ["promote", "promote", "rollback", "promote"]
    decision = from_json(Decision, entries[1].decision)
    assert decision.champion is not None, "the first champion was measured again, and compared"
    measured = open_ref(ran.store, decision.champion)
    assert measured.inputs["train"] == entries[0].train
    assert measured.ref != entries[0].evaluation
    candidate = open_ref(ran.store, decision.candidate)
    assert measured.values["protocol_digest"] == candidate.values["protocol_digest"]
