"""What flows make of evidence, without services: whom they compare, what they seal and tell."""

import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chain
import pytest
from contest import MemoryRegistry
from PIL import Image

from eqm import champion, dossier
from eqm.config import replace, with_settings
from eqm.errors import IntegrityError
from eqm.images import open_source
from eqm.records import Decision, Record, Ref, to_json
from eqm.stage import listing_key
from eqm.storage import LocalStore
from flows import evaluate, weekly
from flows.jobs import Plan
from flows.settings import current_settings

MODEL = "eqm-tiny"
NEVER_WORSE = 1e9
"""Ratio of distances that no successor passes."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.getbasetemp() / "chain")


class Bench:
    """Models that may become champion, judged and promoted without services."""

    def __init__(self, tiny: chain.Chain, store: LocalStore) -> None:
        self.tiny, self.store, self.registry = tiny, store, MemoryRegistry()
        changes = {"policy.minimum_samples": 10, "policy.maximum_distance_ratio": NEVER_WORSE}
        self.config = with_settings(tiny.config, changes)

    def plan(self, **changes: Any) -> Plan:
        config = with_settings(self.config, {k.replace("__", "."): v for k, v in changes.items()})
        return Plan(config, current_settings(), self.store, None)  # type: ignore[arg-type]

    def evaluated(self, name: str, **provenance: Any) -> Record:
        """The evaluation of another model, which is as good as that of the chain."""
        trained = self.tiny["train"]
        trained = self.store.seal(replace(trained, config={**trained.config, "of": name}))
        found = self.tiny["evaluation"]
        return self.store.seal(
            replace(
                found,
                inputs={**found.inputs, "train": trained.ref},
                provenance={**found.provenance, **provenance},
            )
        )

    def judged(self, evaluation: Record, *, despite: bool = False, **changes: Any) -> Decision:
        return evaluate.judge.fn(self.plan(**changes), evaluation, despite)

    def promotes(self, evaluation: Record, decision: Decision) -> champion.Entry:
        train = evaluation.inputs["train"]
        registry: Any = self.registry
        version = registry.register(
            MODEL,
            source=self.store.where(f"train/{train.digest}"),
            tags={"eqm.content": train.content},
            run_digest=train.digest,
        )
        self.store.write_once("reports/page.html", b"page")
        return champion.promote(
            self.store,
            registry,
            version=version,
            train=train,
            decision=decision,
            report="reports/page.html",
        )

    def rolls_back(self) -> None:
        registry: Any = self.registry
        champion.rollback(self.store, registry, MODEL)


@pytest.fixture
def bench(tiny: chain.Chain, tmp_path: Path) -> Bench:
    return Bench(tiny, chain.copied(tiny, tmp_path / "store", without=()))


def failed(decision: Decision) -> set[str]:
    return {reason.check for reason in decision.reasons if not reason.passed}


def test_a_candidate_is_held_against_the_champion_that_stands(bench: Bench) -> None:
    one, two = bench.evaluated("one"), bench.evaluated("two")
    first = bench.judged(one)
    assert (first.promote, first.champion) == (True, None)
    bench.promotes(one, first)
    second = bench.judged(two)
    assert (second.promote, second.champion) == (True, one.ref)
    bench.promotes(two, second)
    assert bench.judged(bench.evaluated("three")).champion == two.ref
    bench.rolls_back()
    assert bench.judged(bench.evaluated("four")).champion == one.ref
    # Judged again by the same policy, a champion is what it was; by another, it is judged.
    assert bench.judged(one) == first
    assert failed(bench.judged(one, policy__minimum_samples=10_000)) == {"samples", "champion"}
    three = bench.evaluated("three")
    assert failed(bench.judged(three, policy__maximum_distance_ratio=0.5)) == {"champion"}


def test_what_was_rolled_back_does_not_come_back_by_itself(bench: Bench) -> None:
    one, two = bench.evaluated("one"), bench.evaluated("two")
    for evaluation in (one, two):
        bench.promotes(evaluation, bench.judged(evaluation))
    bench.rolls_back()
    refused = bench.judged(two)
    assert not refused.promote
    assert failed(refused) == {"rollback"}
    assert "version 2 was rolled back" in refused.reasons[-1].text
    # Neither does it on other evidence; another model is nothing of the kind.
    again = bench.store.seal(replace(two, config={**two.config, "of": "another grid"}))
    assert failed(bench.judged(again)) == {"rollback"}
    assert bench.judged(bench.evaluated("three")).promote
    insisted = bench.judged(two, despite=True)
    assert insisted.promote
    bench.promotes(two, insisted)
    assert bench.judged(again).promote is True


def test_the_age_is_that_of_the_evaluation(bench: Bench) -> None:
    now = datetime.datetime.now(datetime.UTC)
    for days, fresh in ((0.5, True), (9.0, False)):
        ended = (now - datetime.timedelta(days=days)).isoformat()
        evaluation = bench.evaluated(f"{days}", ended=ended)
        assert dossier.ended(evaluation) is not None
        decision = bench.judged(evaluation, policy__maximum_age_days=7.0)
        assert failed(decision) == (set() if fresh else {"freshness"})


def test_a_champion_of_another_protocol_is_measured_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = bench.evaluated("one")
    bench.promotes(one, bench.judged(one))
    found = dossier.evaluation_of(one)
    other = replace(found, protocol={**found.protocol, "neighbours": 9})
    values = {**one.values, "evaluation": to_json(other)}
    two = bench.evaluated("two")
    two = bench.store.seal(replace(two, config={**two.config, "of": "other"}, values=values))
    measured = bench.store.seal(replace(one, config={**one.config, "of": "other"}, values=values))
    asked: list[Any] = []

    def again(plan: Any, evaluation: Record, standing: champion.Entry) -> Record:
        asked.append((evaluation.ref, standing.evaluation))
        return measured

    monkeypatch.setattr(evaluate, "under_same_protocol", again)
    decision = bench.judged(two)
    assert asked == [(two.ref, one.ref)]
    assert (decision.promote, decision.champion) == (True, measured.ref)


# -- nights -------------------------------------------------------------------------------------


def measured(evaluation: Record, distance: float, name: str) -> Record:
    """The same evaluation with another distance, sure to half a unit."""
    found = dossier.evaluation_of(evaluation)
    metric = replace(found.metrics["distance"], value=distance)
    sure = replace(metric, low=distance - 0.5, high=distance + 0.5)
    values = to_json(replace(found, metrics={**found.metrics, "distance": sure}))
    values = {**evaluation.values, "evaluation": values}
    return replace(evaluation, config={**evaluation.config, "of": name}, values=values)


def test_a_drift_is_sealed_and_raises_the_alarm(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(evaluate, "tell", lambda *given: told.append(given))
    promotion = bench.store.seal(measured(bench.evaluated("one"), 10.0, "promotion"))
    entry = bench.promotes(promotion, bench.judged(promotion))
    standing: Any = SimpleNamespace(evaluation=promotion, entry=entry)

    def night(day: int, distance: float) -> Any:
        today = bench.store.seal(measured(promotion, distance, f"night {day}"))
        when = datetime.date(2026, 3, day)
        found = evaluate.compare_days.fn(bench.plan(), standing, today, when)
        (sealed,) = [
            record
            for key in bench.store.list("night/")
            if (record := bench.store.record("night", key.split("/")[1]))
            and record.config == {"model": MODEL, "day": when.isoformat()}
        ]
        assert sealed.values["drift"] == to_json(found)
        assert sealed.inputs["evaluation"] == today.ref
        assert (sealed.inputs["promotion"], sealed.inputs["train"]) == (promotion.ref, entry.train)
        return found, sealed.inputs["before"]

    first, before = night(3, 10.4)
    assert (first.outcome, before) == ("none", promotion.ref)
    assert told == []
    # Held against the first night, and not against a promotion that was chosen for its luck.
    second, before = night(4, 11.0)
    assert (second.outcome, second.then) == ("none", 10.4)
    assert before != promotion.ref
    third, _ = night(5, 12.0)
    assert (third.outcome, third.difference) == ("drift", pytest.approx(1.6))
    ((event, model, payload),) = told
    assert (event, model) == ("eqm.champion.drifted", MODEL)
    assert (payload["version"], payload["day"]) == (entry.version, "2026-03-05")
    assert "**Drift** of version 1 on 2026-03-05: " in payload["text"]
    night(6, 9.0)
    assert len(told) == 2, "nearer than it was is another model too"


# -- weeks --------------------------------------------------------------------------------------


@pytest.fixture
def standing(bench: Bench) -> evaluate.Standing:
    record = bench.tiny["evaluation"]
    entry = bench.promotes(record, bench.judged(record))
    found = evaluate.find_champion.fn(bench.plan())
    assert found is not None
    assert (found.entry, found.evaluation.ref) == (entry, record.ref)
    return found


def test_all_that_is_behind_the_champion_is_verified(
    bench: Bench, standing: evaluate.Standing
) -> None:
    source, day = standing.evaluation.inputs["source"], datetime.date(2026, 3, 2)

    def look() -> Record:
        return weekly.verify_all.fn(bench.plan(), standing.entry, source, day)

    chain_ = dossier.chain_of(bench.store, standing.evaluation)
    files = {record.stage: next(iter(record.outputs.values())).key for record in chain_}
    assert len(files) == len(chain_) == 7
    for name, key in files.items():
        file = bench.store.root / key
        data = file.read_bytes()
        file.chmod(0o644)
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(IntegrityError, match="damaged"):
            look()
        assert bench.store.list("watch/") == [], name
        file.write_bytes(data)
    sealed = look()
    assert sealed.inputs["train"] == standing.entry.train
    blobs = {blob for record in chain_ for blob in record.outputs.values()}
    assert sealed.values == {"outcome": "nothing new", "records": 7, "files": len(blobs)}
    assert look() == sealed


def test_a_training_goes_on_from_the_champions_average(
    bench: Bench, standing: evaluate.Standing
) -> None:
    plan = bench.plan(continue_images=96)
    found = weekly.continued(plan, standing).config
    weights = standing.trained.outputs["ema.safetensors"]
    assert found.train.init_from is not None
    assert found.train.init_from.sha256 == weights.sha256
    assert found.train.init_from.uri == bench.store.where(weights.key)
    expected = replace(plan.config.train, images=96, init_from=found.train.init_from)
    assert found == replace(plan.config, train=expected)


def test_changed_images_are_new_and_gone(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "a").mkdir(parents=True)

    def draw(name: str, gray: int) -> None:
        Image.new("L", (8, 8), gray).save(folder / "a" / name)

    def listed() -> Ref:
        found = open_source(plan.config.source, str(folder))
        bench.store.write_once(listing_key(found.digest), found.listing_bytes())
        return Ref(stage="source", digest=found.digest, content=found.digest)

    changes = {"source__kind": "folder", "source__held_out_fraction": 0.0}
    plan = bench.plan(source_uri=str(folder), **changes)
    for i in range(5):
        draw(f"{i}.png", 10 * i)
    then = listed()
    draw("0.png", 200)
    (folder / "a" / "1.png").unlink()
    for i in range(5, 8):
        draw(f"{i}.png", 10 * i)
    counts = weekly.compare_listings.fn(plan, then, listed())
    assert counts == {"new_images": 4, "gone_images": 2}


@pytest.mark.parametrize("case", ["first", "nothing new", "continued"])
def test_what_is_new_decides_what_a_week_does(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known, other = (Ref(stage="source", digest=c * 64, content=c * 64) for c in "ab")
    done: list[Any] = []
    evaluation = SimpleNamespace(inputs={"source": known})
    entry = SimpleNamespace(version=1)
    champion_ = None if case == "first" else SimpleNamespace(entry=entry, evaluation=evaluation)
    listing = other if case == "continued" else known
    told = dict.fromkeys(("latents", "train", "evaluation", "version", "promoted"), 1)

    def trained(plan: Any, source: Ref, base: Any = None) -> dict[str, Any]:
        done.append(("trained", plan, source, base))
        return told

    def sealed(*given: Any) -> Any:
        done.append(("sealed", *given))
        return SimpleNamespace(digest="seal")

    for name, does in (
        ("list_images", lambda _: listing),
        ("find_champion", lambda _: champion_),
        ("verify_all", sealed),
        ("compare_listings", lambda *_: {"new_images": 4, "gone_images": 2}),
        ("base_of", lambda *given: f"base {given[2]}"),
        ("continued", lambda *_: "further plan"),
        ("images_to_decision", trained),
        ("seal_look", sealed),
        ("logged", lambda _: None),
    ):
        monkeypatch.setattr(weekly, name, does)
    plan: Any = SimpleNamespace(model_name=MODEL)
    monkeypatch.setattr(weekly, "open_plan", lambda *_: plan)
    result = weekly.weekly.fn(as_of="2026-03-02")
    day = datetime.date(2026, 3, 2)
    found = {"outcome": case, "new_images": 4, "gone_images": 2, **told}
    assert (result, done) == {
        "first": ({"outcome": case, **told}, [("trained", plan, known, None)]),
        "nothing new": (
            {"outcome": case, "watch": "seal"},
            [("sealed", plan, entry, known, day)],
        ),
        "continued": (
            {"outcome": case, **told},
            [
                ("trained", "further plan", other, "base False"),
                ("sealed", plan, entry, other, day, found),
            ],
        ),
    }[case]
