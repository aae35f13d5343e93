"""What a night is compared with: the first one after its promotion, which nobody chose."""

import datetime
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eqm.records import Evaluation, Record, to_json
from eqm.storage import LocalStore
from flows.evaluate import _of_day, first_night
from flows.plan import read_config


def sealed(store: LocalStore, name: str, protocol: str = "ours") -> Record:
    found = Evaluation(
        protocol={"of": protocol}, samples=1, metrics={}, ood=(), mean_field_evaluations=1.0
    )
    values = {"evaluation": to_json(found)}
    return seal(store, Record(stage="evaluation", config={"of": name}, values=values, **BARE))


def seal(store: LocalStore, record: Record) -> Record:
    store.seal(record)
    return record


BARE: dict = {"algorithm": 1, "inputs": {}, "outputs": {}}


def look(store: LocalStore, promotion: Record, day: str, protocol: str = "ours") -> Record:
    """A night that was looked at; returns its evaluation."""
    evaluation = sealed(store, day, protocol)
    inputs = {"promotion": promotion.ref, "evaluation": evaluation.ref}
    night = {**BARE, "inputs": inputs}
    store.seal(Record(stage="night", config={"model": "m", "day": day}, values={}, **night))
    return evaluation


def test_nights_are_compared_with_the_first_one_after_the_promotion(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    promotion, other = sealed(store, "promotion"), sealed(store, "another")

    def before(day: int) -> tuple[Record, str] | None:
        return first_night(store, promotion, datetime.date(2026, 11, day))

    look(store, other, "2026-11-01")
    assert before(5) is None
    look(store, promotion, "2026-11-04", protocol="another sampler")
    second = look(store, promotion, "2026-11-06")
    first = look(store, promotion, "2026-11-05")
    # A night that is looked at again is what it was.
    assert before(5) is None
    assert before(6) == (first, "on 2026-11-05, the first night after its promotion")
    assert before(30) == before(6)
    assert second != first


@pytest.mark.parametrize("samples", [1, 400, 50_000])
def test_no_two_nights_and_no_promotion_share_a_seed(samples: int) -> None:
    """Drift takes the samples of two nights for independent."""
    config = read_config("tiny", {"generate.samples": samples})
    plan: Any = SimpleNamespace(config=config)
    first = datetime.date(2026, 2, 27)
    nights = [_of_day(plan, first + datetime.timedelta(days=k)).generate for k in range(4)]
    seeds = [range(0, samples), *(range(n.first_seed, n.first_seed + samples) for n in nights)]
    for earlier, later in itertools.pairwise(seeds):
        assert earlier.stop <= later.start
    assert {n.samples for n in nights} == {samples}
