"""The champion's history on a registry in memory: who may move it, and what is noticed of edits."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from contest import Bench, MemoryRegistry

from eqm import champion
from eqm.errors import DataError, IntegrityError
from eqm.records import digest, note_to_bytes, sha256, to_json
from eqm.storage import LocalStore


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(LocalStore(tmp_path / "store"), MemoryRegistry(), "eqm-test")


# -- what is no evidence ------------------------------------------------------------------------


def test_a_negative_decision_moves_nothing(bench: Bench) -> None:
    version = bench.trains()
    with pytest.raises(DataError, match=r"may not be promoted: distance is 9; at most 5$"):
        bench.promotes(version, bench.judged(version, promote=False))
    assert bench.moves() == []
    assert bench.shown() is None


def test_another_content_than_was_registered_is_not_promoted(bench: Bench) -> None:
    version = bench.trains()
    other = dataclasses.replace(bench.trained[version.number].ref, content="0" * 64)
    with pytest.raises(DataError, match=r"registered for content .* 000000000000 is to be"):
        bench.promotes(version, train=other)
    lying = dataclasses.replace(version, tags={"eqm.content": "0" * 64})
    with pytest.raises(DataError, match="evaluate this model"):
        bench.promotes(lying, train=other)
    assert bench.moves() == []


def test_the_evaluation_of_another_model_is_no_evidence(bench: Bench) -> None:
    one, two = bench.trains(), bench.trains()
    with pytest.raises(DataError, match=r"version 2 .* is of train .*: evaluate this model"):
        bench.promotes(two, bench.judged(one))
    assert bench.moves() == []
    assert bench.shown() is None


def test_edited_metrics_are_no_evidence(bench: Bench) -> None:
    version = bench.trains()
    decision = bench.judged(version)
    path = bench.store.root / f"evaluation/{decision.candidate.digest}/record.json"
    path.write_text(path.read_text().replace('"number": 1', '"number": 2'))
    with pytest.raises(IntegrityError, match="does not match its own digest"):
        bench.promotes(version, decision)
    assert bench.moves() == []


def test_a_decision_that_contradicts_its_reasons_is_none(bench: Bench) -> None:
    version = bench.trains()
    lying = dataclasses.replace(bench.judged(version, promote=False), promote=True)
    with pytest.raises(DataError, match="may not be promoted: distance is 9"):
        bench.promotes(version, lying)
    assert bench.moves() == []


@pytest.mark.parametrize("name", ["ema.safetensors", "model.json"])
def test_changed_bytes_are_neither_promoted_nor_gone_back_to(bench: Bench, name: str) -> None:
    """What was evaluated is read once more, whatever was said of it."""
    first, second = bench.trains(), bench.trains()
    bench.promotes(first)
    blob = bench.trained[second.number].outputs[name]
    file = bench.store.root / blob.key

    def damage(path: Path) -> bytes:
        data = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        return data

    whole = damage(file)
    with pytest.raises(IntegrityError, match=rf"{blob.sha256} is damaged"):
        bench.promotes(second)
    assert (len(bench.moves()), bench.shown()) == (1, 1)
    file.write_bytes(whole)
    bench.promotes(second)
    damage(bench.store.root / bench.trained[1].outputs[name].key)
    with pytest.raises(IntegrityError, match="is damaged"):
        bench.rolls_back()
    assert (len(bench.moves()), bench.shown()) == (2, 2)


def test_tags_say_what_became_of_every_version(bench: Bench) -> None:
    for _ in range(3):
        bench.promotes(bench.trains())
    back = bench.rolls_back()
    assert back.provenance["from_version"] == 3
    tags = [bench.registry.by_number(bench.model, n).tags for n in (1, 2, 3)]
    status = [tag["eqm.status"] for tag in tags]
    assert status == ["earlier champion", "champion", "rolled back"]
    assert [tag["eqm.history"] for tag in tags] == ["1", "4", "3"]
    assert {tag["eqm.report"] for tag in tags} == {f"reports/{n}.html" for n in (1, 2, 3)}
    moves = champion.history(bench.store, bench.model)
    contents = [move.evaluation.content for move in moves[:3]]
    assert [tag["eqm.evaluation_content"] for tag in tags] == contents


def test_a_number_that_is_another_training_s_by_now_is_not_pointed_to(bench: Bench) -> None:
    """A model that was deleted in MLflow and registered anew counts from 1 again."""
    champion_, other = bench.trains(), bench.trains()
    bench.promotes(champion_)
    bench.registry.versions[bench.model].clear()
    bench.registry.aliases.clear()
    bench.registers(bench.trained[other.number])
    bench.registers(bench.trained[champion_.number])
    champion.repair(bench.store, bench.registry, bench.model)
    assert bench.shown() == 2
    assert bench.registry.by_number(bench.model, 2).source == champion_.source
    assert "eqm.status" not in bench.registry.by_number(bench.model, 1).tags


def test_what_was_rolled_back_is_known_as_such(bench: Bench) -> None:
    for _ in range(3):
        bench.promotes(bench.trains())
    bench.rolls_back()

    def taken_back() -> dict[str, int]:
        entries = champion.history(bench.store, bench.model)
        return {content: e.version for content, e in champion.withdrawn(entries).items()}

    assert taken_back() == {bench.trained[3].content: 3}
    bench.rolls_back()
    assert set(taken_back().values()) == {2, 3}
    bench.promotes(bench.registry.by_number(bench.model, 3))
    assert set(taken_back().values()) == {2}, "promoted again, it stands"


def test_there_is_no_way_back_from_a_model_to_itself(bench: Bench) -> None:
    """Judged again on other evidence, a champion is promoted again; it is still one champion."""
    bench.promotes(bench.trains())
    second = bench.trains()
    first_evidence = bench.promotes(second).evaluation
    bench.evaluated[2] = bench.evaluates(2, grid=8)
    again = bench.promotes(second)
    assert again.evaluation != first_evidence
    standing = champion.lineage(champion.history(bench.store, bench.model))
    assert [(e.version, e.number) for e in standing] == [(1, 1), (2, 3)]
    assert bench.rolls_back().version == 1
    assert bench.shown() == 1
    with pytest.raises(DataError, match="only one champion so far"):
        bench.rolls_back()


def test_a_rollback_to_the_same_model_is_read(bench: Bench) -> None:
    """As they were written when a model that was promoted twice stood there twice."""
    bench.promotes(bench.trains())
    second = bench.trains()
    before = bench.promotes(second)
    bench.promotes(second)
    folder = bench.store.root / f"history/{bench.model}"
    same = dataclasses.replace(
        before,
        number=4,
        action="rollback",
        previous=sha256((folder / "00000003.json").read_bytes()),
    )
    (folder / "00000004.json").write_bytes(note_to_bytes(same))
    assert bench.moves()[-1] == (4, "rollback", 2)
    assert champion.lineage(champion.history(bench.store, bench.model))[-1].version == 2
    assert bench.rolls_back().version == 1


def test_a_changed_entry_is_refused(bench: Bench) -> None:
    bench.promotes(bench.trains())
    bench.promotes(bench.trains())
    path = bench.store.root / f"history/{bench.model}/00000002.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(IntegrityError, match=r"00000002\.json does not match its own digest"):
        bench.repairs()


# -- the chain ----------------------------------------------------------------------------------


def moved(bench: Bench, count: int = 4) -> list[Path]:
    for _ in range(count):
        bench.promotes(bench.trains())
    return sorted((bench.store.root / f"history/{bench.model}").iterdir())


def rewritten(path: Path, **changes: Any) -> None:
    """An entry changed by somebody who knows how digests are made."""
    body = json.loads(path.read_bytes())
    del body["digest"]
    path.write_bytes(note_to_bytes({**body, **changes}))


def fault(bench: Bench) -> str:
    found = champion.examine(bench.store, bench.model)
    with pytest.raises(IntegrityError, match="is broken") as told:
        champion.history(bench.store, bench.model)
    assert found.faults[0] in str(told.value)
    before = bench.shown()
    with pytest.raises(IntegrityError):
        bench.rolls_back()
    assert bench.shown() == before
    return found.faults[0]


def test_a_long_history_is_gone_through_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(16):
        bench.promotes(bench.trains())
    bench.rolls_back()
    stays, asked = champion._stays, []

    def counted(standing: Any, entry: champion.Entry) -> bool:
        asked.append(entry.number)
        return stays(standing, entry)

    monkeypatch.setattr(champion, "_stays", counted)
    assert len(champion.history(bench.store, bench.model)) == 17
    assert len(asked) <= 2 * 17


def test_every_entry_holds_the_digest_of_the_one_before(bench: Bench) -> None:
    paths = moved(bench)
    entries = champion.history(bench.store, bench.model)
    before = [None, *(sha256(path.read_bytes()) for path in paths)]
    assert [entry.previous for entry in entries] == before[:-1]


def test_an_entry_rewritten_with_its_digest_breaks_the_chain(bench: Bench) -> None:
    paths = moved(bench)
    rewritten(paths[1], at="2020-01-01T00:00:00+00:00")
    assert "00000003.json: it follows entry" in fault(bench)


def test_a_lost_entry_is_missed(bench: Bench) -> None:
    moved(bench)[1].unlink()
    told = fault(bench)
    assert "00000002.json is missing" in told
    assert "restore the entry from a copy" in told


def test_an_entry_under_another_number_is_noticed(bench: Bench) -> None:
    paths = moved(bench)
    rewritten(paths[3], number=7)
    assert "00000004.json: it says that it is move 7" in fault(bench)


def test_another_decision_is_not_the_one_of_the_evidence(bench: Bench) -> None:
    paths = moved(bench)
    decision = json.loads(paths[3].read_bytes())["decision"]
    rewritten(paths[3], decision={**decision, "policy": {"name": "lenient"}})
    assert "its decision is not the one of its evidence" in fault(bench)


def test_the_last_entry_names_one_model(bench: Bench) -> None:
    """No entry after it holds its digest, so it is held against what it names."""
    paths = moved(bench, 2)
    whole = paths[1].read_bytes()
    first, second = champion.history(bench.store, bench.model)
    assert champion.missing_evidence(bench.store, second) == []

    def told(**changes: Any) -> str:
        paths[1].write_bytes(whole)
        rewritten(paths[1], **changes)
        found = champion.examine(bench.store, bench.model)
        faults = [*found.faults, *champion.missing_evidence(bench.store, found.entries[-1])]
        return "; ".join(faults)

    assert "evaluation is of another model" in told(train=to_json(first.train), version=1)
    assert "on another evaluation than" in told(evaluation=to_json(first.evaluation))
    assert second.evidence is not None
    others = {**to_json(second.evidence), "weights": "0" * 64}
    assert "its weights are not those of its model" in told(evidence=others)


def test_a_rollback_takes_its_evidence_along(bench: Bench) -> None:
    moved(bench, 2)
    bench.rolls_back()
    path = bench.store.root / f"history/{bench.model}/00000003.json"
    whole = path.read_bytes()
    body = json.loads(whole)
    decision = {**body["decision"], "policy": {"name": "lenient"}}
    for changes in (
        {"report": "reports/2.html"},
        {"evidence": {**body["evidence"], "report": "0" * 64}},
        # With the digest that it has now.
        {
            "decision": decision,
            "evidence": {**body["evidence"], "decision": digest(decision)},
        },
    ):
        rewritten(path, **changes)
        assert "but not to its evidence" in fault(bench), changes
        path.write_bytes(whole)
    assert champion.examine(bench.store, bench.model).faults == []


def test_what_no_program_wrote_is_named(bench: Bench) -> None:
    paths = moved(bench, 2)
    paths[1].write_bytes(b"[]")
    assert "00000002.json is damaged" in fault(bench)
    rewritten(paths[0], schema="eqm-history/9")
    assert "a newer eqm wrote it" in fault(bench)


def test_evidence_that_is_gone_or_changed_is_told(bench: Bench) -> None:
    moved(bench, 2)
    first, second = champion.history(bench.store, bench.model)
    assert champion.missing_evidence(bench.store, first) == []
    (bench.store.root / first.report).write_bytes(b"<p>better")
    (told,) = champion.missing_evidence(bench.store, first)
    assert "reports/1.html was changed after it" in told
    (bench.store.root / second.report).unlink()
    (bench.store.root / f"evaluation/{second.evaluation.digest}/record.json").unlink()
    assert len(champion.missing_evidence(bench.store, second)) == 2


# -- entries of before there was a chain --------------------------------------------------------


def as_before(path: Path) -> None:
    """Rewrite an entry as the first schema had it."""
    body = json.loads(path.read_bytes())
    for name in ("digest", "schema", "evidence", "previous"):
        del body[name]
    path.write_bytes(note_to_bytes(body))


def test_old_entries_are_read_and_gone_on_from(bench: Bench) -> None:
    paths = moved(bench, 2)
    for path in paths:
        as_before(path)
    entries = champion.history(bench.store, bench.model)
    assert [(e.schema, e.evidence, e.previous) for e in entries] == [
        ("eqm-history/1", None, None)
    ] * 2
    entry = bench.promotes(bench.trains())
    assert entry.previous == sha256(paths[1].read_bytes())
    assert bench.rolls_back().version == 2
    assert bench.shown() == 2
    assert bench.repairs(every=True) == []
    # One that is put in later, in the old form, is noticed all the same.
    as_before(bench.store.root / f"history/{bench.model}/00000003.json")
    assert "follows entry" in fault(bench)


def test_an_old_entry_behind_a_new_one_is_refused(bench: Bench) -> None:
    as_before(moved(bench, 2)[1])
    assert "it is of an older schema than the one before" in fault(bench)
