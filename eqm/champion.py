"""Which version is champion, how it became so, and the way back.

The truth is an append-only history in the store, ``history/<model>/<number>.json``. Entries are
create-once: of two promotions that race, one writes the next number and the other is told. Each
holds the digests of its evidence and of the entry before, so that one that is changed, lost or put
in later is noticed; of the last one, which no entry names yet, MLflow's tags hold the digest. The
alias ``champion`` and the tags of versions mirror the history, and are set again from it whenever
they differ.
"""

import datetime
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from eqm.errors import DataError, EqmError, IntegrityError
from eqm.records import (
    Decision,
    Record,
    Ref,
    digest,
    note_from_bytes,
    note_to_bytes,
    sha256,
    to_json,
)
from eqm.registry import Registry, Version
from eqm.stage import open_ref
from eqm.storage import Store

ALIAS = "champion"
SCHEMA = "eqm-history/2"
Action = Literal["promote", "rollback"]
TAKEN_BACK_WITH = ("evaluation", "decision", "report", "evidence")
"""What a rollback takes over from the promotion that it goes back to."""


class LostRaceError(EqmError):
    """Somebody else moved the champion between our reading and our writing."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """SHA-256 of what a promotion rests on, beside the contents of training and evaluation."""

    weights: str
    """Of the averaged weights."""
    decision: str
    """Digest of the decision."""
    report: str
    """Of the report's page, which itself names that of its numbers."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One move of the champion."""

    schema: str = SCHEMA
    number: int
    action: Action
    version: int
    """Version of the registered model that is champion from here on."""
    train: Ref
    """Its sealed training record."""
    evaluation: Ref
    """The evaluation on which it was promoted."""
    decision: dict[str, Any]
    """The decision with its policy and reasons, as it stood."""
    report: str
    """Key of the report in the store."""
    evidence: Evidence | None
    """None for promotions of before digests of evidence were kept."""
    previous: str | None
    """SHA-256 of the entry before, as it lies in the store; None for the first."""
    at: str
    provenance: dict[str, Any] = field(default_factory=dict)
    """Who moved it, and from which revision of the program; ``from_version`` of a rollback."""


@dataclass(frozen=True, kw_only=True)
class EntryOne:
    """An entry as it was written before there was a chain; it is read for good."""

    number: int
    action: Action
    version: int
    train: Ref
    evaluation: Ref
    decision: dict[str, Any]
    report: str
    at: str
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class History:
    """All moves of the champion of a model, and what is wrong with them."""

    entries: list[Entry]
    digests: list[str]
    """SHA-256 of the bytes of each entry."""
    faults: list[str]
    """Where the chain is broken, in words; empty where it is whole."""


# -- reading ------------------------------------------------------------------------------------


def examine(store: Store, model: str) -> History:
    """Read the history, and say where it is broken. Raises StoreError."""
    found, before = History([], [], []), None
    standing: list[Entry] = []
    for number, key in enumerate(store.list(f"history/{model}/"), start=1):
        where = store.where(key)
        if key != _key(model, number):
            missing = store.where(_key(model, number))
            found.faults.append(
                f"{missing} is missing, and {where} is there: restore the entry from a copy"
            )
            return found
        data = store.read(key)
        try:
            entry = _entry(data, where)
        except IntegrityError as error:
            found.faults.append(str(error))
        else:
            wrong = _out_of_place(found, standing, entry, before)
            found.faults.extend(f"{where}: {w}" for w in wrong)
            if entry.number != number:
                found.faults.append(f"{where}: it says that it is move {entry.number}")
            found.entries.append(entry)
            found.digests.append(sha256(data))
            _move(standing, entry)
        before = sha256(data)
    return found


@functools.lru_cache(maxsize=1024)
def _entry(data: bytes, where: str) -> Entry:
    """An entry of any schema; the same bytes are the same one. Raises IntegrityError."""
    try:
        schema = json.loads(data).get("schema")
    except (ValueError, AttributeError) as error:
        raise IntegrityError(f"{where} is damaged ({error}): restore it from a copy") from error
    if schema == SCHEMA:
        entry = note_from_bytes(Entry, data, where)
        if entry.evidence is not None and entry.evidence.decision != digest(entry.decision):
            raise IntegrityError(
                f"{where}: its decision is not the one of its evidence: restore it from a copy"
            )
        return entry
    if schema is None:
        old = note_from_bytes(EntryOne, data, where)
        return Entry(**{**vars(old), "schema": "eqm-history/1", "evidence": None, "previous": None})
    raise IntegrityError(f"{where} is of schema {schema!r}: a newer eqm wrote it, and can read it")


def _out_of_place(
    found: History, standing: list[Entry], entry: Entry, before: str | None
) -> list[str]:
    """What does not fit with the entries before, of which ``standing`` is the lineage.

    ``before`` is the digest of the last one.
    """
    faults: list[str] = []
    if entry.schema == SCHEMA and entry.previous != before:
        faults.append(
            f"it follows entry {str(entry.previous)[:12]}, but the one before is "
            f"{str(before)[:12]}: one of them was put in later or changed; restore both from a copy"
        )
    if entry.schema != SCHEMA and found.entries and found.entries[-1].schema == SCHEMA:
        faults.append("it is of an older schema than the one before: it was put in later")
    if entry.decision.get("candidate") != to_json(entry.evaluation):
        faults.append("its decision is on another evaluation than the one it names: it was changed")
    if entry.action == "promote" or _stays(standing, entry):
        return faults
    if len(standing) < 2 or standing[-2].train != entry.train:
        faults.append("it goes back to a version that was not champion before")
    elif any(getattr(standing[-2], name) != getattr(entry, name) for name in TAKEN_BACK_WITH):
        faults.append("it goes back to a champion, but not to its evidence: it was changed")
    return faults


def history(store: Store, model: str) -> list[Entry]:
    """All moves of the champion, oldest first. Raises StoreError, IntegrityError."""
    return _whole(store, model).entries


def _whole(store: Store, model: str) -> History:
    found = examine(store, model)
    if found.faults:
        more = f" (and {len(found.faults) - 1} more faults)" if len(found.faults) > 1 else ""
        raise IntegrityError(f"the history of {model} is broken: {found.faults[0]}{more}")
    return found


def lineage(entries: list[Entry]) -> list[Entry]:
    """The champions that a rollback would go through: promotions that no rollback took back.

    A champion that was promoted again, on other evidence, is one champion: there is no way back
    from a model to itself.
    """
    standing: list[Entry] = []
    for entry in entries:
        _move(standing, entry)
    return standing


def _move(standing: list[Entry], entry: Entry) -> None:
    """Go on with a lineage by one move."""
    if entry.action == "promote":
        if _stays(standing, entry):
            standing.pop()
        standing.append(entry)
    elif not _stays(standing, entry):
        del standing[-1:]


def _stays(standing: list[Entry], entry: Entry) -> bool:
    """Whether the model of a move is champion already: rollbacks once went back to such ones."""
    return bool(standing) and standing[-1].train == entry.train


def withdrawn(entries: list[Entry]) -> dict[str, Entry]:
    """Models that were rolled back and stand no more: content -> the promotion taken back."""
    standing = {entry.train.content for entry in lineage(entries)}
    promoted = {e.train.content: e for e in entries if e.action == "promote"}
    return {content: e for content, e in promoted.items() if content not in standing}


def current(store: Store, model: str) -> Entry | None:
    """The standing champion's promotion; None before the first."""
    standing = lineage(history(store, model))
    return standing[-1] if standing else None


def missing_evidence(store: Store, entry: Entry) -> list[str]:
    """What of the evidence of an entry is gone or changed, in words."""
    faults: list[str] = []
    found: list[Record] = []
    for ref in (entry.train, entry.evaluation):
        try:
            found.append(open_ref(store, ref))
        except EqmError as error:
            faults.append(f"move {entry.number}: {error}")
    if not faults and found[1].inputs.get("train") != entry.train:
        faults.append(f"move {entry.number}: its evaluation is of another model: it was changed")
    weights = found[0].outputs.get("ema.safetensors") if not faults else None
    if entry.evidence and weights and entry.evidence.weights != weights.sha256:
        faults.append(
            f"move {entry.number}: its weights are not those of its model: it was changed"
        )
    try:
        page = store.read(entry.report)
    except EqmError as error:
        return [*faults, f"move {entry.number}: its report: {error}"]
    if entry.evidence is not None and sha256(page) != entry.evidence.report:
        where = store.where(entry.report)
        faults.append(f"move {entry.number}: {where} was changed after it: restore it from a copy")
    return faults


# -- moving -------------------------------------------------------------------------------------


def promote(
    store: Store,
    registry: Registry,
    *,
    version: Version,
    train: Ref,
    decision: Decision,
    report: str,
    provenance: Mapping[str, Any] | None = None,
) -> Entry:
    """Make a version champion on a positive decision.

    ``report`` is the key of the page in the store. The bytes that were evaluated are verified once
    more. Raises DataError for a negative decision and for evidence of another model,
    IntegrityError for changed bytes, LostRaceError if the champion moved since it was judged, and
    TrackingError: what MLflow was not told then, it is told by :func:`repair`.
    """
    trained = _judged(store, version, train, decision)
    page = store.read(report)
    repair(store, registry, version.model)
    before = _whole(store, version.model)
    standing = lineage(before.entries)
    judged = decision.champion and open_ref(store, decision.champion).inputs["train"]
    if judged != (standing[-1].train if standing else None):
        raise LostRaceError(
            f"the champion of {version.model} moved since this candidate was judged: judge again"
        )
    entry = Entry(
        number=len(before.entries) + 1,
        action="promote",
        version=version.number,
        train=train,
        evaluation=decision.candidate,
        decision=to_json(decision),
        report=report,
        evidence=Evidence(
            weights=trained.outputs["ema.safetensors"].sha256,
            decision=digest(decision),
            report=sha256(page),
        ),
        previous=before.digests[-1] if before.digests else None,
        at=_now(),
        provenance=dict(provenance or {}),
    )
    return _append(store, registry, version.model, entry)


def _judged(store: Store, version: Version, train: Ref, decision: Decision) -> Record:
    """The training record of a version that may be promoted, verified. Raises as ``promote``."""
    name = f"version {version.number} of {version.model}"
    failed = [r.text for r in decision.reasons if not r.passed]
    if not decision.promote or failed:
        raise DataError(f"{name} may not be promoted: {'; '.join(failed)}")
    registered = version.tags.get("eqm.content")
    if registered != train.content:
        raise DataError(
            f"{name} was registered for content {str(registered)[:12]}, and content "
            f"{train.content[:12]} is to be promoted: register it again"
        )
    evaluated = open_ref(store, decision.candidate).inputs.get("train")
    if evaluated != train:
        other = "no model" if evaluated is None else f"train {evaluated.digest[:12]}"
        raise DataError(
            f"{name} is train {train.digest[:12]}, but evaluation "
            f"{decision.candidate.digest[:12]} is of {other}: evaluate this model"
        )
    return _verified(store, train)


def rollback(
    store: Store, registry: Registry, model: str, provenance: Mapping[str, Any] | None = None
) -> Entry:
    """Make the champion before this one champion again.

    Raises DataError if there is none or if MLflow has it no more, and as :func:`promote`.
    """
    repair(store, registry, model)
    before = _whole(store, model)
    standing = lineage(before.entries)
    if len(standing) < 2:
        have = "only one champion so far" if standing else "no champion yet"
        raise DataError(f"{model} has {have}: there is nothing to roll back to")
    back = standing[-2]
    _verified(store, back.train)
    shown = _shown(store, registry, model, back)
    if shown is None:
        raise DataError(
            f"version {back.version} of {model} was deleted in MLflow: run `eqm train` with its "
            "config, which registers it again, and then roll back"
        )
    entry = Entry(
        number=len(before.entries) + 1,
        action="rollback",
        version=shown.number,
        train=back.train,
        evaluation=back.evaluation,
        decision=back.decision,
        report=back.report,
        evidence=back.evidence,
        previous=before.digests[-1],
        at=_now(),
        provenance={**(provenance or {}), "from_version": standing[-1].version},
    )
    return _append(store, registry, model, entry)


def _verified(store: Store, train: Ref) -> Record:
    """Check the store's own bytes: copies cached on this machine say nothing about them."""
    record = open_ref(store, train)
    for blob in record.outputs.values():
        store.get(blob)
    return record


def _append(store: Store, registry: Registry, model: str, entry: Entry) -> Entry:
    key = _key(model, entry.number)
    data = note_to_bytes(entry)
    # Where the answer to a write was lost, the second try finds the first one's entry: ours.
    if not store.write_once(key, data) and store.read(key) != data:
        raise LostRaceError(
            f"somebody else moved the champion of {model} at the same moment "
            f"({store.where(key)}): look at `eqm history` and try again"
        )
    repair(store, registry, model)
    return entry


# -- mirroring ----------------------------------------------------------------------------------


def repair(store: Store, registry: Registry, model: str, *, every: bool = False) -> list[str]:
    """Set the alias and the tags of versions again from the history; says what was wrong.

    Older versions than the champion are looked at where the champion's own tags are not as they
    should be, for then a move was not told to the end, and with ``every``. Whoever moved the alias
    reads the history once more: of two that mirror at the same time, the later one is right.
    """
    told: list[str] = []
    while True:
        found = _whole(store, model)
        told += _mirror(store, registry, model, found, every)
        if len(store.list(f"history/{model}/")) == len(found.entries):
            return told
        # What was just written may have come after what somebody else wrote of a later move.
        every = True


def _mirror(store: Store, registry: Registry, model: str, found: History, every: bool) -> list[str]:
    shown = registry.by_alias(model, ALIAS)
    standing = lineage(found.entries)
    if not standing:
        if shown is None:
            return []
        registry.unpoint(model, ALIAS)
        return [f"alias {ALIAS!r} pointed to version {shown.number}, which was never promoted"]
    champion = _shown(store, registry, model, standing[-1])
    told: list[str] = []
    tags = _tags(found)
    wanted = tags.pop(standing[-1].train)
    if every or champion is None or not wanted.items() <= champion.tags.items():
        # Older ones first: where this is stopped in the middle, the champion still shows it.
        for entry in {e.train: e for e in found.entries if e.train in tags}.values():
            older = _shown(store, registry, model, entry)
            if older is not None:
                told += _tell(registry, older, tags[entry.train])
            elif every:
                told.append(_deleted(model, entry))
        told += [_deleted(model, standing[-1])] if champion is None else []
        told += _tell(registry, champion, wanted) if champion is not None else []
    if champion is not None and (shown is None or shown.number != champion.number):
        registry.point(model, ALIAS, champion.number)
        was = f"version {shown.number}" if shown else "nothing"
        told.append(f"alias {ALIAS!r} pointed to {was}; the history says version {champion.number}")
    return told


def _shown(store: Store, registry: Registry, model: str, entry: Entry) -> Version | None:
    """The version of an entry as MLflow has it now; None where it was deleted.

    One that was deleted and registered again has another number.
    """
    source = store.where(f"train/{entry.train.digest}")
    version = registry.find_number(model, entry.version)
    if version is not None and version.source == source:
        return version
    return registry.find(model, source=source, content=entry.train.content)


def _deleted(model: str, entry: Entry) -> str:
    return (
        f"version {entry.version} of {model} was deleted in MLflow: run `eqm train` with its "
        "config, which registers it again"
    )


def _tell(registry: Registry, version: Version, wanted: Mapping[str, str]) -> list[str]:
    """Set the tags of a version that are not as they should be; says which had been changed."""
    wrong = {k: v for k, v in wanted.items() if version.tags.get(k) != v}
    registry.tag(version, wrong)
    return [
        f"tag {name} of version {version.number} was {version.tags.get(name)!r}; the history says "
        f"{value!r}"
        for name, value in wrong.items()
    ]


def _tags(found: History) -> dict[Ref, dict[str, str]]:
    """Training -> tags of its version, by the last entry that names it."""
    standing = [entry.train for entry in lineage(found.entries)]
    earlier, tags = set(standing), dict[Ref, dict[str, str]]()
    for entry, key in zip(found.entries, found.digests, strict=True):
        status = "earlier champion" if entry.train in earlier else "rolled back"
        tags[entry.train] = {
            "eqm.status": "champion" if entry.train == standing[-1] else status,
            "eqm.history": str(entry.number),
            "eqm.history_sha256": key,
            "eqm.evaluation": entry.evaluation.digest,
            "eqm.evaluation_content": entry.evaluation.content,
            "eqm.report": entry.report,
            "eqm.content": entry.train.content,
        }
        if entry.evidence is not None:
            tags[entry.train]["eqm.decision"] = entry.evidence.decision
            tags[entry.train]["eqm.report_sha256"] = entry.evidence.report
    return tags


def _key(model: str, number: int) -> str:
    return f"history/{model}/{number:08d}.json"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
