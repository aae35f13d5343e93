"""Training state <-> safetensors and JSON in the store.

A checkpoint is complete when its commit ``train/<digest>/checkpoints/<images>.json`` exists; the
commit is written last, create-once, and names its files by digest. Nothing is pickled, nothing is
guessed: the commit with the most images is the one that training goes on from, and a damaged one
is refused by name. Called by train.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eqm.errors import IntegrityError, MissingError
from eqm.events import PREFIX
from eqm.records import Blob, note_from_bytes, note_to_bytes
from eqm.storage import Store

SCHEMA = "eqm-checkpoint/1"
SNAPSHOT_SCHEMA = "eqm-snapshot/1"


@dataclass(frozen=True)
class TrainState:
    """All that the rest of a run is a function of (with its config and data)."""

    images_seen: int
    """The whole data position."""
    parameters: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimiser: dict[str, Tensor]
    """"<moment>/<parameter>" -> tensor."""
    history: dict[str, list[float]]
    """Training curve so far."""
    pending: list[list[float]]
    """(loss, gradient norm) of the updates since the last point of the curve."""
    averages: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Of further tracks, by their names."""
    events: Mapping[str, bytes | Blob] = field(default_factory=dict)
    """The log up to here in segments (eqm.events): bytes, or blobs that are stored already."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What makes a checkpoint complete."""

    schema: str
    images_seen: int
    files: dict[str, Blob]


def save(store: Store, digest: str, state: TrainState) -> str:
    """Make a checkpoint durable; returns the key of its commit. Idempotent."""
    files = {
        "parameters": store.put(tensors_to_bytes(state.parameters)),
        "ema": store.put(tensors_to_bytes(state.ema)),
        "optimiser": store.put(tensors_to_bytes(state.optimiser)),
        "curve": store.put(json.dumps([state.history, state.pending]).encode()),
    }
    if state.averages:
        # A file that is there only where it is needed: checkpoints without it are as ever.
        files["averages"] = store.put(tensors_to_bytes(_flat(state.averages)))
    for name, lines in state.events.items():
        files[name] = lines if isinstance(lines, Blob) else store.put(lines)
    commit = Commit(schema=SCHEMA, images_seen=state.images_seen, files=files)
    key = _key(digest, state.images_seen)
    store.write_once(key, note_to_bytes(commit))
    return key


def newest(store: Store, digest: str) -> int | None:
    """Position of the complete checkpoint with the most images; None before the first."""
    keys = store.list(f"train/{digest}/checkpoints/")
    return int(keys[-1].rpartition("/")[2].removesuffix(".json")) if keys else None


def load(store: Store, digest: str, images_seen: int) -> TrainState:
    """State of the checkpoint at a position.

    Raises IntegrityError, naming the commit to delete, if any file of it is damaged or lost.
    """
    key = _key(digest, images_seen)
    where = store.where(key)
    try:
        return _load(store, digest, key)
    except (IntegrityError, MissingError) as error:
        raise IntegrityError(
            f"checkpoint {where} cannot be used: {error}. To go on from the checkpoint before it, "
            f"delete {where}"
        ) from error


def _load(store: Store, digest: str, key: str) -> TrainState:
    where = store.where(key)
    commit = note_from_bytes(Commit, store.read(key), where)
    if commit.schema != SCHEMA:
        raise IntegrityError(f"it is of schema {commit.schema!r}, this program reads {SCHEMA!r}")
    if key != _key(digest, commit.images_seen):
        raise IntegrityError(f"it holds the state at image {commit.images_seen}, not this one")
    # A damaged log costs no training: whoever goes on with the log reads it, and tells.
    events = {name: b for name, b in commit.files.items() if name.startswith(PREFIX)}
    data = {n: store.get(blob) for n, blob in commit.files.items() if n not in events}
    history, pending = json.loads(data["curve"])
    return TrainState(
        images_seen=commit.images_seen,
        parameters=tensors_from_bytes(data["parameters"]),
        ema=tensors_from_bytes(data["ema"]),
        optimiser=tensors_from_bytes(data["optimiser"]),
        history=history,
        pending=pending,
        averages=_by_track(tensors_from_bytes(data["averages"])) if "averages" in data else {},
        events=events,
    )


def _key(digest: str, images_seen: int) -> str:
    return f"train/{digest}/checkpoints/{images_seen:012d}.json"


def _flat(averages: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """ "<track>/<parameter>" -> tensor."""
    return {f"{t}/{name}": a for t, tensors in averages.items() for name, a in tensors.items()}


def _by_track(flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, average in flat.items():
        track, _, name = key.partition("/")
        found.setdefault(track, {})[name] = average
    return found


# -- snapshots of power-function averages -------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Track:
    """Averages of one length, in a snapshot."""

    sigma_rel: float
    tensors: Blob


@dataclass(frozen=True, kw_only=True)
class SnapshotCommit:
    """What makes a snapshot complete: ``train/<digest>/snapshots/<images>.json``."""

    schema: str
    images_seen: int
    tracks: tuple[Track, ...]


def save_snapshot(
    store: Store, digest: str, images_seen: int, averages: Mapping[float, dict[str, Tensor]]
) -> str:
    """Make sigma_rel -> averages durable at a position; returns the key of its commit. Idempotent.

    Where one stands there already, of an attempt that was stopped, it stays.
    """
    tracks = tuple(
        Track(sigma_rel=sigma, tensors=store.put(tensors_to_bytes(tensors)))
        for sigma, tensors in averages.items()
    )
    commit = SnapshotCommit(schema=SNAPSHOT_SCHEMA, images_seen=images_seen, tracks=tracks)
    key = _snapshot_key(digest, images_seen)
    store.write_once(key, note_to_bytes(commit))
    return key


def read_snapshot(store: Store, digest: str, images_seen: int) -> SnapshotCommit:
    """The snapshot at a position, with its averages there to be read.

    Raises IntegrityError, naming what to delete, if it or a file of it is damaged or lost.
    """
    key = _snapshot_key(digest, images_seen)
    where = store.where(key)
    try:
        commit = note_from_bytes(SnapshotCommit, store.read(key), where)
        if (commit.schema, commit.images_seen) != (SNAPSHOT_SCHEMA, images_seen):
            raise IntegrityError(
                f"it is of schema {commit.schema!r} and image {commit.images_seen}, not of "
                f"{SNAPSHOT_SCHEMA!r} and {images_seen}"
            )
        for track in commit.tracks:
            store.fetch(track.tensors)
    except (IntegrityError, MissingError) as error:
        raise IntegrityError(
            f"snapshot {where} cannot be used: {error}. To make it again, delete it and the run's "
            f"checkpoints from image {images_seen:,} on, and start the run again"
        ) from error
    return commit


def _snapshot_key(digest: str, images_seen: int) -> str:
    return f"train/{digest}/snapshots/{images_seen:012d}.json"


# -- tensors <-> bytes --------------------------------------------------------------------------


def tensors_to_bytes(tensors: dict[str, Tensor]) -> bytes:
    """Safetensors bytes; the same for the same tensors."""
    from safetensors.torch import save

    return save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})


def tensors_from_bytes(data: bytes) -> dict[str, Tensor]:
    """Tensors of verified safetensors bytes."""
    from safetensors.torch import load

    return load(data)


def optimiser_to_tensors(
    optimiser: torch.optim.Optimizer, names: dict[Tensor, str]
) -> dict[str, Tensor]:
    """Moments of an optimiser under the names of its parameters (cloned)."""
    return {
        f"{moment}/{names[parameter]}": value.detach().clone()
        for parameter, moments in optimiser.state.items()
        for moment, value in moments.items()
    }


def tensors_to_optimiser(
    tensors: dict[str, Tensor], optimiser: torch.optim.Optimizer, names: dict[Tensor, str]
) -> None:
    """Put saved moments back. Raises IntegrityError if a parameter has none."""
    by_name: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        moment, _, name = key.partition("/")
        by_name.setdefault(name, {})[moment] = value
    if set(by_name) != set(names.values()):
        odd = sorted(set(by_name) ^ set(names.values()))[:3]
        raise IntegrityError(f"optimiser state and parameters do not match at {', '.join(odd)}")
    for parameter, name in names.items():
        # The step counter of a fused optimiser lives where its parameter lives.
        moved = {m: v.to(parameter.device).clone() for m, v in by_name[name].items()}
        optimiser.state[parameter] = moved
