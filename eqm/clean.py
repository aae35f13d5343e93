"""What in a store nothing names any more, and its deletion: mark from all that is kept, then sweep.

Every sealed record is kept for good, and so is whatever a kept key names: records, history,
reports, studies, checkpoints and commits of stages that are under way. What can go, once it is old
enough:

* *blobs* that nothing names: an attempt was killed before it sealed, or lost a race;
* *abandoned* stages: not sealed, and nothing of them written since, not even their lease;
* *scaffolding* of sealed stages: checkpoints and commits of snapshots of a training, parts
  of samples, and parts of a look at real images. What they hold is in the record.

A name is any digest that stands anywhere in a kept JSON, so a kind of record that this module has
never heard of keeps its blobs too; or in a list that such a JSON names: a manifest names shards,
the log of a training that is under way names pictures. A stage that stores bytes which are there
already makes them count as new (``Store.put``), so what is about to be named is never old. Called
by flows.
"""

import datetime
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from eqm.config import ALGORITHMS
from eqm.errors import ConfigError, IntegrityError, MissingError
from eqm.records import Blob, from_json, note_to_bytes, record_from_bytes
from eqm.storage import Store, Stored
from eqm.words import counted

SCHEMA = "eqm-cleaning/1"
LEAST_SECONDS = 24 * 3600.0
"""Younger than this nothing is touched: a stage may be about to name it."""
BLOBS = "blobs/sha256/"
CLEANINGS = "cleanings/"
"""What was deleted, and when: these lists keep nothing."""
SCAFFOLDING = {
    "train": ("checkpoints", "snapshots"),
    "samples": ("parts",),
    "reference": ("parts",),
}
"""Stage -> folders that serve until its seal."""
UNITS = {"h": 3600.0, "d": 24 * 3600.0, "w": 7 * 24 * 3600.0}
READERS = 16
"""Keys that are read at once."""
COMMIT = re.compile(r"train/[0-9a-f]{64}/checkpoints/[\d-]+\.json")
NAME = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


def seconds_of(age: str) -> float:
    """Seconds of an age as 36h, 30d or 4w. Raises ConfigError."""
    found = re.fullmatch(r"(\d+)([hdw])", age.strip())
    if found is None:
        raise ConfigError(f"older_than is {age!r}: give a number and h, d or w, as 30d")
    return int(found[1]) * UNITS[found[2]]


@dataclass(frozen=True)
class Survey:
    """What could be deleted, by the reason why, and what is left."""

    condemned: Mapping[str, tuple[Stored, ...]]
    """"blobs", "abandoned", "scaffolding" -> keys, in the order in which they are to go."""
    kept: int
    kept_bytes: int

    @property
    def keys(self) -> list[str]:
        """All that could be deleted."""
        return [one.key for found in self.condemned.values() for one in found]

    @property
    def size_bytes(self) -> int:
        """Bytes that would be free."""
        return sum(one.size_bytes for found in self.condemned.values() for one in found)

    def lines(self) -> list[str]:
        """What and how much, for people."""
        told = [
            f"{why}: {counted(len(found), 'object')}, {_size(sum(one.size_bytes for one in found))}"
            for why, found in self.condemned.items()
        ]
        return [*told, f"kept: {counted(self.kept, 'object')}, {_size(self.kept_bytes)}"]


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """What is written down before anything is deleted."""

    schema: str
    at: str
    older_than_seconds: float
    deleted: dict[str, int] = field(default_factory=dict)
    """Key -> its size in bytes; what was stored again before its turn came stays all the same."""


def survey(store: Store, *, older_than_seconds: float, now: datetime.datetime) -> Survey:
    """Look at everything. Raises ConfigError for too short an age, IntegrityError, StoreError.

    A record that is damaged ends it: what it named cannot be told.
    """
    if older_than_seconds < LEAST_SECONDS:
        raise ConfigError(
            f"older_than is {older_than_seconds:g} s; it must be a day or more: a stage may be "
            "about to name what is younger"
        )
    cutoff = now.timestamp() - older_than_seconds
    everything = list(store.stored(""))
    blobs = [one for one in everything if one.key.startswith(BLOBS)]
    others = [one for one in everything if not one.key.startswith(BLOBS)]
    stages = _by_stage(others)
    abandoned = [
        one
        for (stage, digest), keys in sorted(stages.items())
        if _is_abandoned(stage, digest, keys, cutoff)
        for one in keys
    ]
    scaffolding = [
        one
        for (stage, digest), keys in sorted(stages.items())
        if _is_sealed(stage, digest, keys)
        for one in _scaffolding(stage, digest, keys, cutoff)
    ]
    going = {one.key for one in (*abandoned, *scaffolding)}
    named = _named(store, [one for one in others if one.key not in going])
    unnamed = [
        one for one in blobs if one.modified < cutoff and one.key.removeprefix(BLOBS) not in named
    ]
    condemned = {
        # What names bytes goes before them.
        "abandoned": _commits_first(abandoned),
        "scaffolding": _commits_first(scaffolding),
        "blobs": tuple(unnamed),
    }
    lost = going | {one.key for one in unnamed}
    left = [one for one in everything if one.key not in lost]
    return Survey(condemned, len(left), sum(one.size_bytes for one in left))


def sweep(store: Store, *, older_than_seconds: float, now: datetime.datetime) -> Survey:
    """Delete what a survey condemns and a second one condemns again; returns what went.

    What is to go is written down first, under ``cleanings/``. Bytes that were stored again since
    stay all the same: each is looked at once more before it goes. Where a stage went on meanwhile,
    whatever it may name stays too. Raises as :func:`survey`.
    """
    first = survey(store, older_than_seconds=older_than_seconds, now=now)
    if not first.keys:
        return first
    # Much may have been named while the first one looked.
    again = set(survey(store, older_than_seconds=older_than_seconds, now=now).keys)
    condemned = {
        why: tuple(one for one in found if one.key in again)
        for why, found in first.condemned.items()
    }
    agreed = Survey(condemned, first.kept, first.kept_bytes)
    at = now.astimezone(datetime.UTC).isoformat(timespec="microseconds")
    sizes = {one.key: one.size_bytes for found in condemned.values() for one in found}
    note = Cleaning(schema=SCHEMA, at=at, older_than_seconds=older_than_seconds, deleted=sizes)
    store.write_once(f"{CLEANINGS}{at}.json", note_to_bytes(note))
    cutoff = now.timestamp() - older_than_seconds
    stayed: set[str] = set()
    with ThreadPoolExecutor(READERS) as threads:
        for ready in _in_turn(agreed.keys):
            if stayed:
                # What names bytes was written anew, and may name old ones.
                stayed |= set(ready)
                continue
            went = threads.map(lambda key: _delete_old(store, key, cutoff), ready)
            stayed |= {key for key, gone in zip(ready, went, strict=True) if not gone}
    return _without(agreed, stayed)


def _delete_old(store: Store, key: str, cutoff: float) -> bool:
    """Delete a key; False, and it stays, where it was written or stored again meanwhile.

    A sweep takes minutes, in which a stage may store bytes that it is about to name.
    """
    modified = store.modified(key)
    if modified is not None and modified >= cutoff:
        return False
    store.delete(key)
    return True


def _without(found: Survey, stayed: set[str]) -> Survey:
    """A survey of what went, without what stayed."""
    if not stayed:
        return found
    went = {
        why: tuple(one for one in some if one.key not in stayed)
        for why, some in found.condemned.items()
    }
    left = [
        one.size_bytes for some in found.condemned.values() for one in some if one.key in stayed
    ]
    return Survey(went, found.kept + len(left), found.kept_bytes + sum(left))


def _in_turn(keys: list[str]) -> list[list[str]]:
    """Keys in parts, of which each is to be gone before the next: what names is apart from data."""
    parts = itertools.groupby(keys, key=lambda key: key.endswith(".json"))
    return [list(part) for _, part in parts]


# -- stages -------------------------------------------------------------------------------------


def _by_stage(keys: list[Stored]) -> dict[tuple[str, str], list[Stored]]:
    found: dict[tuple[str, str], list[Stored]] = {}
    for one in keys:
        parts = one.key.split("/")
        # Other folders (history, reports, source) are nobody's scaffolding.
        if len(parts) > 2 and parts[0] in ALGORITHMS:
            found.setdefault((parts[0], parts[1]), []).append(one)
    return found


def _is_sealed(stage: str, digest: str, keys: list[Stored]) -> bool:
    return any(one.key == f"{stage}/{digest}/record.json" for one in keys)


def _is_abandoned(stage: str, digest: str, keys: list[Stored], cutoff: float) -> bool:
    # A training that is alive renews its lease, one of these keys, several times a minute.
    return not _is_sealed(stage, digest, keys) and all(one.modified < cutoff for one in keys)


def _scaffolding(stage: str, digest: str, keys: list[Stored], cutoff: float) -> list[Stored]:
    folders = tuple(f"{stage}/{digest}/{name}/" for name in SCAFFOLDING.get(stage, ()))
    found = [one for one in keys if folders and one.key.startswith(folders)]
    # All or nothing: half of a checkpoint serves nobody.
    return found if all(one.modified < cutoff for one in keys) else []


def _commits_first(keys: list[Stored]) -> tuple[Stored, ...]:
    return tuple(sorted(keys, key=lambda one: (not one.key.endswith(".json"), one.key)))


# -- names --------------------------------------------------------------------------------------


def _named(store: Store, keys: list[Stored]) -> set[str]:
    """Every digest that stands in a JSON that is kept, or in one that a record names."""
    # What was deleted once, and was stored again, is not needed for that.
    wanted = [one.key for one in keys if _is_json(one.key) and not one.key.startswith(CLEANINGS)]
    found: set[str] = set()
    with ThreadPoolExecutor(READERS) as threads:
        while wanted:
            replaced: set[str] = set()
            read = threads.map(lambda key: _names_in(store, key), wanted)
            for key, names in zip(wanted, read, strict=True):
                if names is None:
                    replaced.add(key.rpartition("/")[0] + "/")
                else:
                    found |= names
            # A checkpoint that was pruned while we looked. The one that took its place is new, but
            # not all that it names: it stands nowhere else by now.
            wanted = [
                key for folder in sorted(replaced) for key in store.list(folder) if _is_json(key)
            ]
    return found


def _is_json(key: str) -> bool:
    return key.endswith(".json")


def _names_in(store: Store, key: str) -> set[str] | None:
    """Digests in a JSON; None where it is gone."""
    try:
        data = store.read(key)
    except MissingError:
        return None
    found = {name.decode() for name in NAME.findall(data)}
    for blob in _lists_of(key, data, store.where(key)):
        found |= {name.decode() for name in NAME.findall(_listed(store, blob, key))}
    return found


def _lists_of(key: str, data: bytes, where: str) -> Iterator[Blob]:
    """Blobs that name others: JSON of a record, as a manifest; the log that a checkpoint keeps."""
    if key.endswith("/record.json"):
        record = record_from_bytes(data, where)
        named = {**record.outputs, **record.logs}
        yield from (blob for name, blob in named.items() if name.endswith(".json"))
    elif COMMIT.fullmatch(key):
        yield from _log_of(data, where)


def _log_of(commit: bytes, where: str) -> list[Blob]:
    """Segments of the log up to a checkpoint (eqm.checkpoint); the first schema kept none."""
    try:
        named = json.loads(commit).get("events", {})
        return [from_json(Blob, blob, where) for blob in named.values()]
    except (ValueError, AttributeError) as error:
        raise IntegrityError(f"{where} is damaged ({error}): restore it from a copy") from error


def _listed(store: Store, blob: Blob, key: str) -> bytes:
    try:
        return store.get(blob)
    except MissingError as error:
        raise IntegrityError(
            f"{store.where(blob.key)}, named by {key}, is gone, so that what it named cannot be "
            "told: restore it, or delete the other, before anything is cleaned"
        ) from error


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
