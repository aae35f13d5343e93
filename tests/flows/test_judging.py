"""What a flow makes of evidence: who is compared with whom, and what was rolled back."""

import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chain
import pytest
from contest import MemoryRegistry

from eqm import champion, dossier
from eqm.config import replace, with_settings
from eqm.records import Decision, Record, to_json
from eqm.storage import LocalStore
from flows import evaluate

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

    def plan(self, **changes: Any) -> Any:
        config = with_settings(self.config, {k.replace("__", "."): v for k, v in changes.items()})
        return SimpleNamespace(config=config, store=self.store, model_name=MODEL)

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
    # Judged again by the same policy, a champion is what it was; by another, it is judged.
    assert bench.judged(one) == first
    assert failed(bench.judged(one, policy__minimum_samples=10_000)) == {"samples", "champion"}
    assert failed(bench.judged(two, policy__maximum_distance_ratio=0.5)) == {"champion"}


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
