"""What is damaged in a sealed set of latents: every shard, sample and byte of it, by name.

Read from the store itself and from no cache. Training notices damage too, at the sample that it
reads; this looks at all of them.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from eqm.errors import IntegrityError, MissingError
from eqm.records import Blob, Manifest
from eqm.shards import INDEX, KEYS, read_index
from eqm.storage import Store
from eqm.tars import flaws

GONE = (MissingError, IntegrityError)

NAMED_A_SHARD = 20
"""So many flaws of one shard are named; a tar that lost a member is wrong from there on."""
VERIFIERS = 4


@dataclass(frozen=True)
class Damage:
    """Something of a sealed set that is not what it was."""

    place: str
    """Which file."""
    reason: str
    shard: int | None = None
    sample: int | None = None
    """Number of the sample in the set."""
    key: str | None = None
    """Name of its image."""
    offset: int | None = None
    """Byte in the tar."""

    @property
    def text(self) -> str:
        """For people: shard, sample, offset, reason."""
        shard = self.place if self.shard is None else f"shard {self.shard} ({self.place})"
        sample = "" if self.sample is None else f", sample {self.sample} ({self.key})"
        offset = "" if self.offset is None else f", byte {self.offset}"
        return f"{shard}{sample}{offset}: {self.reason}"


def damages(
    manifest: Manifest,
    store: Store,
    where: str,
    *,
    beside: Mapping[str, Blob] | None = None,
    done: Any = None,
) -> Iterator[Damage]:
    """All that is damaged in a set, read from the store itself and from no cache.

    ``beside``: files of its record that the manifest does not know of, by name
    (:func:`eqm.shards.beside_manifest`). ``done(count)`` is called as samples have been checked.
    Raises StoreError where the store cannot be reached; what is missing is damage.
    """
    for name, blob in sorted((beside or {}).items()):
        yield from _file_damage(store, blob, f"{where}/{name}")
    yield from _file_damage(store, manifest.index, f"{where}/{INDEX}")
    yield from _file_damage(store, manifest.keys, f"{where}/{KEYS}")
    with ThreadPoolExecutor(VERIFIERS) as checkers:
        checking: deque[Any] = deque()
        for number in range(len(manifest.shards)):
            checking.append(checkers.submit(_shard_damages, manifest, store, number))
            if len(checking) > VERIFIERS:  # bounds what is in memory
                yield from _told(checking.popleft(), done)
        while checking:
            yield from _told(checking.popleft(), done)


def _told(check: Any, done: Any) -> list[Damage]:
    count, found = check.result()
    if done is not None:
        done(count)
    return found


def _file_damage(store: Store, blob: Blob, place: str) -> Iterator[Damage]:
    try:
        store.get(blob)
    except GONE as error:
        yield Damage(place, str(error))


def _tar_damage(store: Store, tar: Blob, number: int) -> Iterator[Damage]:
    for found in _file_damage(store, tar, store.where(tar.key)):
        yield replace(found, shard=number)


def _shard_damages(manifest: Manifest, store: Store, number: int) -> tuple[int, list[Damage]]:
    shard = manifest.shards[number]
    place, first = store.where(shard.tar.key), number * manifest.shard_images
    try:
        index = read_index(store.get(shard.index), shard, f"shard {number}")
    except GONE as error:
        told = Damage(store.where(shard.index.key), str(error), shard=number)
        # Samples cannot be told apart without it, but the digest says whether the tar is sound.
        return shard.count, [told, *_tar_damage(store, shard.tar, number)]
    try:
        tar = store.read(shard.tar.key)
    except MissingError as error:
        return shard.count, [Damage(place, str(error), shard=number)]
    sound = Blob.of(tar) == shard.tar
    channels, height, width = manifest.spec.shape
    keys, found = index.keys, []
    checked = flaws(tar, index.samples(first), (2 * channels, height, width))
    for flaw in itertools.islice(checked, NAMED_A_SHARD):
        key = None if flaw.number is None else keys[flaw.number - first]
        found.append(Damage(place, flaw.reason, number, flaw.number, key, flaw.offset))
    rest = sum(1 for _ in checked)
    if rest:
        found.append(Damage(place, f"{rest} more places differ", shard=number))
    if not sound and not found:
        found.append(Damage(place, "the bytes do not match their SHA-256", shard=number))
    return shard.count, found
