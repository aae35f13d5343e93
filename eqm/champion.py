"""Which version is champion, how it became so, and the way back.

The truth is an append-only history in the store, ``history/<model>/<number>.json``, each entry
create-once: of two promotions that race, one writes the next number and the other is told.
MLflow's alias ``champion`` mirrors the newest entry and is set again from it whenever they differ.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from eqm.errors import DataError, EqmError
from eqm.records import Decision, Ref, note_from_bytes, note_to_bytes, to_json
from eqm.registry import Registry, Version
from eqm.stage import open_ref
from eqm.storage import Store

ALIAS = "champion"


class LostRaceError(EqmError):
    """Somebody else moved the champion between our reading and our writing."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One move of the champion."""

    number: int
    action: Literal["promote", "rollback"]
    version: int
    """Version of the registered model that is champion from here on."""
    train: Ref
    """Its sealed training record."""
    evaluation: Ref
    """The evidence."""
    decision: dict[str, Any]
    """The decision with its policy and reasons, as it stood."""
    report: str
    """Key of the report in the store."""
    at: str
    provenance: dict[str, Any] = field(default_factory=dict)


def history(store: Store, model: str) -> list[Entry]:
    """All moves of the champion of a model, oldest first. Raises StoreError."""
    keys = store.list(f"history/{model}/")
    return [note_from_bytes(Entry, store.read(key), store.where(key)) for key in keys]


def lineage(entries: list[Entry]) -> list[Entry]:
    """The champions that a rollback would go through: promotions that no rollback took back."""
    standing: list[Entry] = []
    for entry in entries:
        if entry.action == "promote":
            standing.append(entry)
        else:
            standing.pop()
    return standing


def withdrawn(entries: list[Entry]) -> dict[str, Entry]:
    """Models that were rolled back and stand no more: content -> the promotion taken back."""
    standing = {entry.train.content for entry in lineage(entries)}
    promoted = {e.train.content: e for e in entries if e.action == "promote"}
    return {content: e for content, e in promoted.items() if content not in standing}


def current(store: Store, model: str) -> Entry | None:
    """The standing champion's promotion; None before the first."""
    standing = lineage(history(store, model))
    return standing[-1] if standing else None


def promote(
    store: Store,
    registry: Registry,
    *,
    version: Version,
    train: Ref,
    decision: Decision,
    report: str,
) -> Entry:
    """Make a version champion on a positive decision.

    The bytes that were evaluated are verified once more. Raises DataError for a negative decision,
    IntegrityError for changed bytes, LostRaceError if the champion moved since it was judged.
    """
    if not decision.promote:
        failed = "; ".join(r.text for r in decision.reasons if not r.passed)
        raise DataError(
            f"version {version.number} of {version.model} may not be promoted: {failed}"
        )
    _verify(store, train)
    entries = history(store, version.model)
    standing = lineage(entries)
    judged = decision.champion and open_ref(store, decision.champion).inputs["train"]
    if judged != (standing[-1].train if standing else None):
        raise LostRaceError(
            f"the champion of {version.model} moved since this candidate was judged: judge again"
        )
    entry = Entry(
        number=len(entries) + 1,
        action="promote",
        version=version.number,
        train=train,
        evaluation=decision.candidate,
        decision=to_json(decision),
        report=report,
        at=_now(),
    )
    return _append(store, registry, version.model, entry)


def rollback(store: Store, registry: Registry, model: str) -> Entry:
    """Make the champion before this one champion again. Raises DataError if there is none."""
    entries = history(store, model)
    standing = lineage(entries)
    if len(standing) < 2:
        have = "only one champion so far" if standing else "no champion yet"
        raise DataError(f"{model} has {have}: there is nothing to roll back to")
    before = standing[-2]
    _verify(store, before.train)
    entry = Entry(
        number=len(entries) + 1,
        action="rollback",
        version=before.version,
        train=before.train,
        evaluation=before.evaluation,
        decision=before.decision,
        report=before.report,
        at=_now(),
        provenance={"from_version": standing[-1].version},
    )
    return _append(store, registry, model, entry)


def repair(store: Store, registry: Registry, model: str) -> str | None:
    """Set the alias again from the history; says what was wrong, None if nothing was."""
    standing = current(store, model)
    shown = registry.by_alias(model, ALIAS)
    if standing is None:
        if shown is None:
            return None
        registry.unpoint(model, ALIAS)
        return f"alias {ALIAS!r} pointed to version {shown.number}, which was never promoted"
    if shown is not None and shown.number == standing.version:
        return None
    registry.point(model, ALIAS, standing.version)
    was = f"version {shown.number}" if shown else "nothing"
    return f"alias {ALIAS!r} pointed to {was}; the history says version {standing.version}"


def _verify(store: Store, train: Ref) -> None:
    """Check the store's own bytes: copies cached on this machine say nothing about them."""
    for blob in open_ref(store, train).outputs.values():
        store.get(blob)


def _append(store: Store, registry: Registry, model: str, entry: Entry) -> Entry:
    key = f"history/{model}/{entry.number:08d}.json"
    data = note_to_bytes(entry)
    # Where the answer to a write was lost, the second try finds the first one's entry: ours.
    if not store.write_once(key, data) and store.read(key) != data:
        raise LostRaceError(
            f"somebody else moved the champion of {model} at the same moment "
            f"({store.where(key)}): look at `eqm status` and try again"
        )
    registry.point(model, ALIAS, entry.version)
    registry.tag(registry.by_number(model, entry.version), _tags(entry))
    return entry


def _tags(entry: Entry) -> Mapping[str, str]:
    return {
        "eqm.history": str(entry.number),
        "eqm.evaluation": entry.evaluation.digest,
        "eqm.report": entry.report,
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
