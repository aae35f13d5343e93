"""``eqm report``: the words it is asked with, and its exit status."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import chain
import pytest
from typer.testing import CliRunner

from eqm import champion, dossier, gate, layouts, verification
from eqm.config import Runtime, with_settings
from eqm.discrepancies import Check, Difference
from eqm.errors import ConfigError, DataError, EqmError
from eqm.images import open_source
from eqm.recomputation import compute_again
from eqm.records import note_to_bytes, to_json
from eqm.report import render_json, report_key
from eqm.report_page import render_html
from eqm.stage import listing_key
from eqm.storage import LocalStore
from flows import cli, evaluate
from flows.jobs import Plan
from flows.settings import current_settings

MODEL = "eqm-tiny"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.getbasetemp() / "chain")


@pytest.fixture
def store(tiny, tmp_path, monkeypatch) -> Iterator[LocalStore]:
    """A store with a report and a champion in it, and this process pointed at it."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("EQM_", "AWS_", "MLFLOW_", "PREFECT_")):
            monkeypatch.delenv(name)
    store = chain.copied(tiny, tmp_path / "store", without=())
    os.environ["EQM_HOME"], os.environ["EQM_STORE"] = str(tmp_path / "home"), store.uri
    record = tiny["evaluation"]
    decision = gate.decide(dossier.evaluation_of(record), record.ref, tiny.config.policy)
    content = dossier.collect(store, record, title="t", model_name=MODEL, decision=decision)
    key = report_key(record.digest, "t", MODEL, decision)
    store.write_once(f"{key}.json", render_json(content))
    store.write_once(f"{key}.html", render_html(content))
    entry = champion.Entry(
        number=1,
        action="promote",
        version=3,
        train=record.inputs["train"],
        evaluation=record.ref,
        decision=to_json(decision),
        report=f"{key}.html",
        evidence=None,
        previous=None,
        at="2026-01-01T00:00:00+00:00",
    )
    store.write_once(f"history/{MODEL}/00000001.json", note_to_bytes(entry))
    yield store
    os.environ.clear()
    os.environ.update(before)


def test_a_champion_is_measured_again_by_as_many_processes_as_a_candidate(
    tiny, store, monkeypatch
) -> None:
    record, launched = tiny["evaluation"], []
    found = dossier.evaluation_of(record)
    other = replace(found, protocol={**found.protocol, "neighbours": 9})
    values = {**record.values, "evaluation": to_json(other)}
    then = store.seal(replace(record, config={"of": "another night"}, values=values))
    entry = replace(champion.current(store, MODEL), evaluation=then.ref)

    def ensured(_: Any, job: Any, *, say: Any, processes: int = 1) -> Any:
        launched.append((job.stage, processes))
        return tiny["samples"] if job.stage == "samples" else record

    monkeypatch.setattr(evaluate, "ensure", ensured)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    config = with_settings(tiny.config, {"processes": 2})
    plan = Plan(config, current_settings(), store, None)  # type: ignore[arg-type]
    assert evaluate.under_same_protocol(plan, record, entry) == record
    assert launched == [("samples", 2), ("evaluation", 1)]


def eqm(*words: str):
    return CliRunner().invoke(cli.app, ["report", *words])


@pytest.fixture
def computed_once(tiny, store, monkeypatch) -> None:
    again = compute_again(
        store, tiny["evaluation"], tiny.job("evaluation").runtime, seeds=0, exact=False
    )
    monkeypatch.setattr(verification, "compute_again", lambda *_, **__: again)


@pytest.mark.usefixtures("computed_once")
def test_a_report_is_verified_by_config_digest_and_file(tiny, store, tmp_path):
    digest, page, numbers = tiny["evaluation"].digest, tmp_path / "r.html", tmp_path / "r.json"
    for words in (["tiny", "--to", str(page)], ["fetch", "tiny", "--to", str(numbers)]):
        assert eqm(*words).exit_code == 0
    (stored,) = verification.stored_reports(store, digest)
    assert (page.read_bytes(), numbers.read_bytes()) == (stored.page, stored.data)
    addresses = [store.where(f"evaluation/{digest}"), store.where(f"reports/{digest}/")]
    # One that somebody copied as it lies in a store, without that.
    copied = tmp_path / "mail" / "reports" / digest / "r.html"
    copied.parent.mkdir(parents=True)
    copied.write_bytes(stored.page)
    addresses += [str(copied)]
    addresses += [f"{store.where(stored.key)}{end}" for end in (".html", ".json", "")]
    for target in ("tiny", digest, digest[:8], digest[:4], str(page), str(numbers), *addresses):
        told = eqm("verify", target)
        assert told.exit_code == 0, told.output
        assert "nothing differs" in told.output
        assert "differs " not in told.output

    body = json.loads(numbers.read_bytes())
    body["evaluation"]["metrics"]["distance"]["value"] += 1
    numbers.write_text(json.dumps(body))
    told = eqm("verify", str(numbers))
    assert told.exit_code == 1
    assert "evaluation.metrics.distance.value: sealed" in told.output
    assert "docs/reports.md" in told.output
    machine = eqm("verify", str(numbers), "--json")
    assert machine.exit_code == 1
    found = json.loads(machine.stdout)
    assert not found["passed"]
    failed = [check for check in found["checks"] if not check["passed"]]
    assert [c["name"] for c in failed] == ["file"]
    assert failed[0]["differences"][0]["place"] == "evaluation.metrics.distance.value"


def test_what_is_asked_for_must_be_there(store, tmp_path):
    for words, text in (
        (["verify", "ffffffff"], "`eqm history` shows those of champions"),
        (["verify", str(tmp_path / "none.json")], "does not exist"),
        (["verify", "nonsense"], "neither a preset"),
        (["verify", store.where(f"reports/{'f' * 64}")], "no such evaluation is sealed in"),
        (["verify", store.where(f"reports/{'f' * 64}/a.html")], "no such evaluation is sealed in"),
        (["demo"], "no champion yet"),
        (["verify", "demo"], "no champion yet"),
        (
            ["tiny", "--to", str(tmp_path / "gone" / "r.html")],
            f"there is no folder {tmp_path}/gone",
        ),
    ):
        told = eqm(*words)
        assert told.exit_code != 0
        assert text in str(told.exception), words


def test_what_this_machine_lacks_is_no_difference(tiny, store, tmp_path) -> None:
    """Exit status 1 says that a report is wrong, and a script may act on it; an error gives 2."""
    record = tiny["evaluation"]
    told = eqm("verify", record.digest, "--device", "tpu")
    assert isinstance(told.exception, ConfigError), told.output
    assert "must be auto, cpu or cuda" in str(told.exception)
    source = {**record.config["source"], "kind": "folder"}
    elsewhere = store.seal(replace(record, config={**record.config, "source": source})).digest
    for place, text in (
        (None, "--source-uri is missing: give the folder or file .*'folder'"),
        ("nowhere", "nowhere does not exist"),
    ):
        runtime = Runtime(store=store.uri, source_uri=place and str(tmp_path / place))
        with pytest.raises(EqmError, match=text):
            verification.verify(store, elsewhere, runtime, reports=[], seeds=0)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("read", ["other", "gone"])
def test_other_images_than_were_listed_are_no_difference(
    tiny, store, monkeypatch, read: str, listed: bool
) -> None:
    record = tiny["evaluation"]
    source = open_source(tiny.config.source, None)
    if listed:
        key = listing_key(record.inputs["source"].digest)
        store.write_once(key, source.listing_bytes())

    def read_now(*_: Any) -> bytes:
        if read == "gone":
            raise DataError("/elsewhere/1.png cannot be read: No such file")
        return bytes(64)

    monkeypatch.setattr(layouts.Digits, "read", read_now)
    why = {
        ("other", True): r"image 'digits/\d+' has other bytes than when it was listed",
        ("other", False): r"the images changed since this run .* configured for [0-9a-f]{12}\)",
    }.get((read, listed), "/elsewhere/1.png cannot be read: No such file")
    wrong = eqm("verify", record.digest, "--seeds", "0")
    assert isinstance(wrong.exception, DataError), wrong.output
    told = rf"^these are not the images of evaluation {record.digest[:12]} \({why}\): give --so"
    assert re.search(told, str(wrong.exception))
    assert "run the pipeline" not in str(wrong.exception)
    # Where more is wrong they may be another difference.
    broken = Check(name="chain", text="", differences=(Difference(place="", sealed="", found=""),))
    monkeypatch.setattr(verification, "check_chain", lambda *_: broken)
    wrong = eqm("verify", record.digest, "--seeds", "0")
    assert wrong.exit_code == 1
    assert re.search(f"numbers: {why}", wrong.output), "what is told in words has nothing sealed"
