"""The champion's history in a store, its alias in a real MLflow, and who wins a race."""

import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from contest import CANDIDATES, RACES, Bench, Schedule, race_all
from mlflow import MlflowClient

from eqm import champion, stage
from eqm.champion import Evidence, LostRaceError
from eqm.errors import DataError, IntegrityError, TrackingError
from eqm.records import digest, sha256
from eqm.registry import Registry
from eqm.storage import LocalStore, open_store

pytestmark = [pytest.mark.services, pytest.mark.timeout(120)]

_numbers = itertools.count()


def new_bench(folder: Path, uri: str) -> Bench:
    model = f"eqm-champion-{os.getpid()}-{next(_numbers)}"
    return Bench(LocalStore(folder / "store"), Registry(uri), model)


@pytest.fixture
def bench(mlflow_environment: dict[str, str], tmp_path: Path) -> Bench:
    return new_bench(tmp_path, mlflow_environment["MLFLOW_TRACKING_URI"])


# -- promotion ----------------------------------------------------------------------------------


def test_the_first_promotion(bench: Bench) -> None:
    assert champion.current(bench.store, bench.model) is None
    assert bench.repairs() == []
    version = bench.trains()
    decision = bench.judged(version)
    entry = bench.promotes(version, decision)
    assert champion.history(bench.store, bench.model) == [entry]
    assert champion.current(bench.store, bench.model) == entry
    assert (entry.number, entry.action, entry.version) == (1, "promote", 1)
    assert entry.train == bench.trained[1].ref
    assert entry.evaluation == bench.evidence(1)
    assert entry.decision["reasons"][0]["text"] == "distance is 9; at most 5"
    assert bench.shown() == 1
    tags = bench.registry.by_number(bench.model, 1).tags
    assert tags["eqm.history"] == "1"
    assert tags["eqm.evaluation"] == bench.evidence(1).digest
    assert tags["eqm.report"] == "reports/1.html"
    assert tags["eqm.status"] == "champion"
    page = sha256(bench.store.read("reports/1.html"))
    weights = bench.trained[1].outputs["ema.safetensors"].sha256
    assert entry.evidence == Evidence(weights=weights, decision=digest(decision), report=page)
    assert (tags["eqm.decision"], tags["eqm.report_sha256"]) == (digest(decision), page)
    assert (entry.previous, entry.provenance) == (None, {"by": "a test"})


def test_the_history_of_a_model_is_its_own(bench: Bench) -> None:
    bench.promotes(bench.trains())
    assert champion.history(bench.store, bench.model[:-1]) == []
    assert champion.history(bench.store, f"{bench.model}0") == []


def test_changed_bytes_are_not_promoted(bench: Bench) -> None:
    version = bench.trains()
    blob = bench.trained[version.number].outputs["ema.safetensors"]
    path = bench.store.root / blob.key
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=rf"{blob.sha256} is damaged"):
        bench.promotes(version)
    assert bench.moves() == []
    assert bench.shown() is None


def test_a_copy_on_this_machine_vouches_for_nothing(bench: Bench, tmp_path: Path) -> None:
    bench.store = open_store(f"s3://eqm/{bench.model}", cache=tmp_path / "cache")
    version = bench.trains()
    record = bench.trained[version.number]
    stage.verify(bench.store, record)
    blob = record.outputs["ema.safetensors"]
    name = f"{bench.model}/{blob.key}"
    boto3.client("s3").put_object(Bucket="eqm", Key=name, Body=b"something")
    with pytest.raises(IntegrityError, match=rf"{blob.sha256} is damaged"):
        bench.promotes(version)
    assert bench.moves() == []


# -- the way back -------------------------------------------------------------------------------


def test_back_and_further_back(bench: Bench) -> None:
    for _ in range(3):
        bench.promotes(bench.trains())
    back = bench.rolls_back()
    assert (back.number, back.action, back.version) == (4, "rollback", 2)
    assert back.provenance == {"by": "a test", "from_version": 3}
    assert (back.train, back.evaluation) == (bench.trained[2].ref, bench.evidence(2))
    assert bench.shown() == 2
    assert bench.rolls_back().version == 1
    assert bench.shown() == 1
    with pytest.raises(DataError, match="only one champion so far: there is nothing to roll back"):
        bench.rolls_back()
    moves = [(n, "promote", n) for n in (1, 2, 3)]
    assert bench.moves() == [*moves, (4, "rollback", 2), (5, "rollback", 1)]
    # And forward again, from where the way back ended.
    assert bench.promotes(bench.trains()).number == 6
    assert bench.rolls_back().version == 1


def test_a_write_whose_answer_was_lost_is_no_lost_race(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_once = LocalStore.write_once

    def answer_lost(store: LocalStore, key: str, data: bytes) -> bool:
        write_once(store, key, data)
        return write_once(store, key, data)

    monkeypatch.setattr(LocalStore, "write_once", answer_lost)
    assert bench.promotes(bench.trains()).number == 1


def test_nothing_to_go_back_to(bench: Bench) -> None:
    with pytest.raises(DataError, match="no champion yet: there is nothing to roll back to"):
        bench.rolls_back()
    bench.promotes(bench.trains())
    with pytest.raises(DataError, match="only one champion so far"):
        bench.rolls_back()


def test_back_to_damaged_bytes_is_refused(bench: Bench) -> None:
    for _ in range(2):
        bench.promotes(bench.trains())
    blob = bench.trained[1].outputs["ema.safetensors"]
    (bench.store.root / blob.key).write_bytes(b"something")
    with pytest.raises(IntegrityError, match="damaged"):
        bench.rolls_back()
    assert bench.shown() == 2
    assert len(bench.moves()) == 2


# -- races --------------------------------------------------------------------------------------


def test_of_two_promotions_from_one_state_one_wins(bench: Bench) -> None:
    bench.promotes(bench.trains())
    one, two = bench.trains(), bench.trains()
    judged = bench.judged(one), bench.judged(two)
    bench.promotes(one, judged[0])
    with pytest.raises(LostRaceError, match="moved since this candidate was judged: judge again"):
        bench.promotes(two, judged[1])
    assert bench.shown() == one.number
    assert len(bench.moves()) == 2
    # Judged again, against the champion that stands now, it may win.
    bench.promotes(two)
    assert bench.shown() == two.number


@pytest.mark.parametrize("moves", ["two promotions", "promotion and rollback"])
def test_a_race_for_one_number_has_one_winner(
    bench: Bench, moves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        bench.promotes(bench.trains())
    one, two = bench.trains(), bench.trains()
    judged = bench.judged(one), bench.judged(two)
    together = threading.Barrier(2)
    write_once = LocalStore.write_once

    def at_the_same_moment(store: LocalStore, key: str, data: bytes) -> bool:
        if key.startswith("history/"):
            together.wait(30)
        return write_once(store, key, data)

    monkeypatch.setattr(LocalStore, "write_once", at_the_same_moment)
    first = lambda: bench.promotes(one, judged[0])  # noqa: E731
    second = (
        bench.rolls_back if moves != "two promotions" else lambda: bench.promotes(two, judged[1])
    )
    ended = in_threads(first, second)
    (won,) = [e for e in ended if isinstance(e, champion.Entry)]
    (lost,) = [e for e in ended if isinstance(e, LostRaceError)]
    assert "somebody else moved the champion" in str(lost)
    assert "00000003.json" in str(lost)
    assert champion.history(bench.store, bench.model)[2:] == [won]
    assert bench.shown() == won.version


def test_schedules_on_real_services(mlflow_environment: dict[str, str], tmp_path: Path) -> None:
    """As those of tests/test_promotion.py, on S3 and MLflow themselves."""
    registry = Registry(mlflow_environment["MLFLOW_TRACKING_URI"])
    model = f"eqm-contest-{os.getpid()}"
    store = open_store(f"s3://eqm/{model}", cache=tmp_path / "cache")
    first = Bench(store, registry, model)
    for _ in range(CANDIDATES):
        first.trains()
    for seed in (3, 4, 9):
        bench = first.beside(f"{model}-{seed}")
        Schedule(seed, bench, set()).run()
        assert bench.moves()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_races_of_processes_on_real_services(
    mlflow_environment: dict[str, str], tmp_path: Path
) -> None:
    """As the fifty of tests/test_promotion.py, on S3 and MLflow themselves."""
    uri = mlflow_environment["MLFLOW_TRACKING_URI"]
    model = f"eqm-raced-{os.getpid()}"
    first = Bench(open_store(f"s3://eqm/{model}", cache=tmp_path / "cache"), Registry(uri), model)
    for _ in range(2):
        first.trains()
    benches = [first.beside(f"{model}-{race}") for race in range(RACES)]
    assert race_all(benches, registry=uri), "in no race did both find the same history"


# -- the alias mirrors the history --------------------------------------------------------------


def test_an_alias_edited_by_hand_is_repaired_and_told(bench: Bench) -> None:
    bench.promotes(bench.trains())
    bench.promotes(bench.trains())
    assert bench.repairs() == []
    by_hand = MlflowClient(bench.registry.uri)
    by_hand.set_registered_model_alias(bench.model, "champion", "1")
    told = bench.repairs()
    assert told == ["alias 'champion' pointed to version 1; the history says version 2"]
    assert bench.shown() == 2
    by_hand.delete_registered_model_alias(bench.model, "champion")
    assert bench.repairs() == ["alias 'champion' pointed to nothing; the history says version 2"]
    assert bench.shown() == 2
    assert bench.repairs() == []


def test_an_alias_that_was_never_promoted_is_taken_away(bench: Bench) -> None:
    bench.trains()
    MlflowClient(bench.registry.uri).set_registered_model_alias(bench.model, "champion", "1")
    assert bench.repairs() == ["alias 'champion' pointed to version 1, which was never promoted"]
    assert bench.shown() is None


def test_a_promotion_that_mlflow_does_not_hear_of_is_repaired(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = bench.trains()
    with monkeypatch.context() as away:

        def gone(*_: object) -> None:
            raise TrackingError("MLflow cannot be reached")

        away.setattr(Registry, "point", gone)
        with pytest.raises(TrackingError):
            bench.promotes(version)
    standing = champion.current(bench.store, bench.model)
    assert standing is not None
    assert standing.version == 1
    assert bench.shown() is None
    assert bench.repairs() == ["alias 'champion' pointed to nothing; the history says version 1"]
    assert bench.shown() == 1


def test_a_write_that_comes_late_does_not_leave_the_alias_behind(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first one's entry and its alias, a second promotion goes all the way."""
    bench.promotes(bench.trains())
    first, second = bench.trains(), bench.trains()
    point = Registry.point

    def late(registry: Registry, model: str, alias: str, number: int) -> None:
        if number == first.number:
            monkeypatch.setattr(Registry, "point", point)
            bench.promotes(second)
            assert bench.shown() == second.number
        point(registry, model, alias, number)

    monkeypatch.setattr(Registry, "point", late)
    bench.promotes(first)
    assert bench.shown() == second.number
    assert bench.repairs(every=True) == []


def test_tags_edited_by_hand_are_set_again_and_told(bench: Bench) -> None:
    for _ in range(2):
        bench.promotes(bench.trains())
    by_hand = MlflowClient(bench.registry.uri)
    by_hand.set_model_version_tag(bench.model, "2", "eqm.report", "elsewhere.html")
    by_hand.set_model_version_tag(bench.model, "1", "eqm.status", "champion")
    assert bench.repairs() == [
        "tag eqm.status of version 1 was 'champion'; the history says 'earlier champion'",
        "tag eqm.report of version 2 was 'elsewhere.html'; the history says 'reports/2.html'",
    ]
    by_hand.delete_model_version_tag(bench.model, "1", "eqm.history")
    assert bench.repairs() == [], "older versions are looked at when asked for"
    assert bench.repairs(every=True) == [
        "tag eqm.history of version 1 was None; the history says '1'"
    ]
    assert bench.repairs(every=True) == []


def test_the_pages_show_what_became_of_every_version(bench: Bench) -> None:
    for _ in range(3):
        bench.promotes(bench.trains())
    bench.rolls_back()
    shown = [bench.registry.by_number(bench.model, n).tags["eqm.status"] for n in (1, 2, 3)]
    assert shown == ["earlier champion", "champion", "rolled back"]


def test_a_version_that_was_deleted_is_found_again_under_its_new_number(bench: Bench) -> None:
    for _ in range(2):
        bench.promotes(bench.trains())
    by_hand = MlflowClient(bench.registry.uri)
    for number in ("1", "2"):
        by_hand.delete_model_version(bench.model, number)
    assert bench.shown() is None
    (told,) = bench.repairs()
    assert "version 2" in told
    assert "was deleted in MLflow: run `eqm train` with its config" in told
    with pytest.raises(DataError, match=r"version 1 .* was deleted in MLflow: run `eqm train`"):
        bench.rolls_back()
    assert len(bench.moves()) == 2
    again = bench.registers(bench.trained[2])
    assert again.number == 3
    assert "alias 'champion' pointed to nothing; the history says version 3" in bench.repairs()
    assert bench.registers(bench.trained[1]).number == 4
    assert bench.rolls_back().version == 4
    assert bench.shown() == 4
    assert bench.moves()[-1] == (3, "rollback", 4)


def in_threads(*programs: Callable[[], Any]) -> list[Any]:
    ended: list[Any] = []

    def run(program: Callable[[], Any]) -> None:
        try:
            ended.append(program())
        except LostRaceError as error:
            ended.append(error)

    threads = [threading.Thread(target=run, args=(program,)) for program in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended
