"""Training state <-> safetensors and JSON in the store, beside the training that goes on.

A checkpoint lies under ``train/<digest>/checkpoints/<images>-<token>.*``: tensors in files of
bounded size, the curve, and a commit (``.json``) that names them by digest and size. It is complete
when its commit exists, which is written last, create-once, under the lease of the run (eqm.lease).
Nothing is pickled, nothing is guessed: of the commits that the lease lets count, the one with the
most images is what training goes on from, and a damaged one is refused by name. Files are the
run's own and not shared blobs, so that old checkpoints can be deleted. Training calls it; other
stages take the form of sealed tensors alone from here (:func:`tensors_to_bytes`).
"""

import contextlib
import json
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eqm import lease
from eqm.cache import damaged
from eqm.errors import IntegrityError, MissingError
from eqm.patience import Patience
from eqm.records import Blob, note_from_bytes, note_to_bytes
from eqm.storage import Store
from eqm.threads import ahead
from eqm.words import counted

SCHEMA = "eqm-checkpoint/2"
SNAPSHOT_SCHEMA = "eqm-snapshot/1"
FILE_BYTES = 32 * 2**20
"""Tensors of one file, at most; one tensor that alone is larger has a file of its own. Training
waits for Python's lock while a file's bytes are put together: a tenth of a second for so many."""
AHEAD = 4
"""Files of a checkpoint that are read, or written, at once."""
CURVE = "curve.json"
CURVE_FIELDS = ("history", "pending")
"""Fields of TrainState that are JSON; all others are tensors."""


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
    token: int
    """Fencing token of the lease under which it was written."""
    files: dict[str, Blob]
    """Ends of names -> digest and size."""
    events: dict[str, Blob] = field(default_factory=dict)
    """Segments of the log up to here -> where they are kept, among the store's blobs."""


class Position(NamedTuple):
    """Which checkpoint of a run, or snapshot. They are ordered as they are read: last is newest."""

    images_seen: int
    token: int
    """Of its writer's lease; 0 for what was written before there were leases."""

    @property
    def name(self) -> str:
        """What its keys begin with."""
        return f"{self.images_seen:012d}" + (f"-{self.token:06d}" if self.token else "")

    @classmethod
    def named(cls, name: str) -> "Position | None":
        """The position of a name; None for one that is none of ours."""
        found = re.fullmatch(r"(\d{12,})(?:-(\d{6,}))?", name)
        return None if found is None else cls(int(found[1]), int(found[2] or 0))


# -- writing ------------------------------------------------------------------------------------


class Writer:
    """Makes states durable in a thread, one at a time, while the caller changes their tensors.

    ``keep`` checkpoints stay, under a lease; without one (a program that has the run for itself)
    all do. ``durable`` is told of each, in that thread. Methods are for one thread. A store that is
    away is waited for with ``patience``; what fails in the background is raised by the next call.
    """

    def __init__(
        self,
        store: Store,
        digest: str,
        *,
        keep: int,
        mine: lease.Held | None = None,
        durable: Callable[[TrainState], None] = lambda _: None,
        patience: Patience | None = None,
    ) -> None:
        self.store, self.digest, self.keep, self.mine = store, digest, keep, mine
        self._durable, self._patience = durable, patience or Patience()
        self.stalled_seconds = 0.0
        """For so long callers were blocked: copies, and waiting for what was not yet durable."""
        self.written = 0
        self._copies = Copies()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._flying: dict[str, Future[str]] = {}

    @property
    def token(self) -> int:
        """What the writer's keys carry."""
        return 1 if self.mine is None else self.mine.token

    @property
    def busy(self) -> bool:
        """Whether something is under way."""
        return not all(flight.done() for flight in self._flying.values())

    @property
    def failed(self) -> bool:
        """Whether something failed in the background, or the lease is lost: calls will raise."""
        ended = [flight for flight in self._flying.values() if flight.done()]
        lost = self.mine is not None and self.mine.is_lost
        return lost or any(flight.exception() is not None for flight in ended)

    def write(self, state: TrainState) -> None:
        """Begin to make a state durable, once the one before it is. Raises as :func:`save`."""
        with self._stalled():
            self._end("checkpoint")
            self._begin("checkpoint", self._checkpoint, self._copies.of_state(state))
        self.written += 1

    def snapshot(self, images_seen: int, averages: Mapping[float, dict[str, Tensor]]) -> None:
        """Begin to make averages durable; checkpoints that are written later wait for them.

        What failed before is not raised here, but by :meth:`write` and :meth:`wait`: it fails what
        is begun now as well.
        """
        with self._stalled():
            if "snapshot" in self._flying:
                # Its copies may then be overwritten, however it ended.
                self._flying["snapshot"].exception()
            copied = {s: self._copies.of(tensors, f"{s}/") for s, tensors in averages.items()}
            self._begin("snapshot", self._snapshot, images_seen, copied)

    def wait(self) -> None:
        """Wait until all is durable. Raises as :func:`save`."""
        with self._stalled():
            for kind in tuple(self._flying):
                self._end(kind)

    def close(self) -> None:
        """Let what is under way end, well or not; a store that is away is waited for no more."""
        self._patience.end()
        self._thread.shutdown(wait=True)

    def _end(self, kind: str) -> None:
        """Wait for the last write of a kind, after which its copies may be overwritten."""
        if self.mine is not None and self.mine.is_lost:
            self.mine.check()
        if kind in self._flying:
            self._flying[kind].result()

    def _begin(self, kind: str, act: Callable[..., str], *arguments: object) -> None:
        earlier = tuple(self._flying.values())
        self._flying[kind] = self._thread.submit(_after, earlier, act, *arguments)

    def _checkpoint(self, state: TrainState) -> str:
        key = save(
            *(self.store, self.digest, state),
            token=self.token,
            check=partial(self._check, Position(state.images_seen, self.token).name),
            patience=self._patience,
        )
        # It counts: else MLflow would be shown what another process tells as well.
        self._patience(self._check)
        self._durable(state)
        mine = self.mine
        if mine is not None:
            self._patience(lambda: prune(self.store, self.digest, keep=self.keep, mine=mine))
        return key

    def _snapshot(self, images_seen: int, averages: Mapping[float, dict[str, Tensor]]) -> str:
        return save_snapshot(
            *(self.store, self.digest, images_seen, averages),
            token=self.token,
            check=self._check,
            patience=self._patience,
        )

    def _check(self, sealing: str | None = None) -> None:
        if self.mine is not None:
            self.mine.check(sealing=sealing)

    @contextlib.contextmanager
    def _stalled(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.stalled_seconds += time.monotonic() - began


def _after(earlier: tuple[Future[str], ...], act: Callable[..., str], *arguments: object) -> str:
    """Act, unless something before it failed: what is sealed later rests on what was earlier."""
    for flight in earlier:
        flight.result()
    return act(*arguments)


class Copies:
    """Copies of tensors in this machine's memory, which is used again by the next ones."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def of(self, tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Name -> copy, which stays as it is until the next call for the same names."""
        found = {name: self._copy(prefix + name, tensor) for name, tensor in tensors.items()}
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return found

    def of_state(self, state: TrainState) -> TrainState:
        """A state that shares nothing with one that is changed."""
        curve = {name: json.loads(json.dumps(getattr(state, name))) for name in CURVE_FIELDS}
        copied = self.of(_flat(state), "state/")
        return from_flat(copied, state.images_seen, curve, state.events)

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        kept = self._kept.get(key)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            # Pinned memory is several times as fast to copy to from a GPU.
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._kept[key] = kept
        return kept.copy_(tensor, non_blocking=True)


def save(
    store: Store,
    digest: str,
    state: TrainState,
    *,
    token: int = 1,
    check: Callable[[], None] = lambda: None,
    patience: Patience | None = None,
) -> str:
    """Make a checkpoint durable; returns the key of its commit. Idempotent.

    ``check`` is asked between the files and the commit, and raises to prevent it. A store that is
    away is waited for with ``patience``. Raises StoreError, and IntegrityError where another state
    is committed at this position.
    """
    at, ask = Position(state.images_seen, token), patience or Patience()

    def write(end: str, data: bytes) -> Blob:
        ask(lambda: store.write_once(_key(digest, at, end), data))
        return Blob.of(data)

    curve = {name: getattr(state, name) for name in CURVE_FIELDS}
    files = {CURVE: write(CURVE, json.dumps(curve).encode())}
    tensors = _flat(state)

    # Put together one after the other, in this thread, for that holds Python's lock; one connection
    # would be too slow for the time that whoever is told to end has left.
    parts = (
        (f"{number:04d}.safetensors", tensors_to_bytes({name: tensors[name] for name in names}))
        for number, names in enumerate(cut(tensors))
    )
    written = ahead(
        lambda part: (part[0], write(*part)), parts, threads=AHEAD, name="checkpoint-write"
    )
    files |= dict(written)
    commit = Commit(
        schema=SCHEMA,
        images_seen=at.images_seen,
        token=token,
        files=files,
        events=ask(lambda: _stored(store, state.events)),
    )
    key, data = _key(digest, at, "json"), note_to_bytes(commit)

    def seal() -> bool:
        # Each time: it may have been taken over while the store was away.
        check()
        return store.write_once(key, data) or store.read(key) == data

    if not ask(seal):
        raise IntegrityError(f"{store.where(key)} is there already, of another state: delete it")
    return key


def cut(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names by file, in order: a function of names and sizes alone."""
    files: list[list[str]] = []
    filled = FILE_BYTES
    for name in sorted(tensors):
        size_bytes = tensors[name].numel() * tensors[name].element_size()
        if not files or filled + size_bytes > FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size_bytes
    return files


def _stored(store: Store, events: Mapping[str, bytes | Blob]) -> dict[str, Blob]:
    return {n: e if isinstance(e, Blob) else store.put(e) for n, e in events.items()}


def prune(store: Store, digest: str, *, keep: int, mine: lease.Held) -> None:
    """Delete all checkpoints and parts of such but the newest ``keep`` that count.

    Also all snapshots but the one of the greatest token at each position, which is the only one
    that is read: what a replaced holder commits late is among the others, once this one has its
    own. Those of later holders are left alone, and those of schema 1, whose files are shared blobs.
    Raises LostLeaseError before anything is deleted, StoreError.
    """
    # What was committed before this is known to whoever takes the lease over after it.
    mine.check()
    kept = complete(store, digest)[-keep:]
    doomed: list[tuple[bool, str]] = []
    for at, end in _listed(store, digest):
        if at not in kept and 0 < at.token <= mine.token:
            doomed.append((end != "json", _key(digest, at, end)))
    for at in _superseded(store, digest, mine.token):
        doomed.append((False, _key(digest, at, "json", "snapshots")))
    for _, key in sorted(doomed):
        # Commits are first, so that no commit ever names a file that is gone.
        store.delete(key)


def _superseded(store: Store, digest: str, token: int) -> list[Position]:
    """Snapshots beside which one of a greater token stands, up to a token."""
    there = sorted(at for at, _ in _listed(store, digest, "snapshots") if 0 < at.token <= token)
    return [one for one, then in pairwise(there) if one.images_seen == then.images_seen]


# -- finding and reading ------------------------------------------------------------------------


def lease_key(digest: str) -> str:
    """Where the lease of a run lies."""
    return f"train/{digest}/lease.json"


def terms(store: Store, digest: str) -> lease.Fix:
    """What a new holder of the lease of a run accepts of former ones: all that counts then."""

    def fix(former: lease.Lease | None) -> lease.Terms:
        listed = _listed(store, digest)
        counting = _counting(store, digest, listed, former)
        snapshots = (at for at, _ in _listed(store, digest, "snapshots"))
        return lease.Terms(
            accepted=tuple(at.name for at in counting),
            above=max((at.token for at in (*(at for at, _ in listed), *snapshots)), default=0),
        )

    return fix


def complete(store: Store, digest: str) -> list[Position]:
    """Positions of the checkpoints that count, oldest first.

    What a former holder of the lease commits after it was replaced does not count.
    """
    return _counting(store, digest, _listed(store, digest), lease.read(store, lease_key(digest)))


def newest(store: Store, digest: str) -> Position | None:
    """Position of the complete checkpoint with the most images; None before the first."""
    return next(reversed(complete(store, digest)), None)


def _counting(
    store: Store, digest: str, listed: list[tuple[Position, str]], holder: lease.Lease | None
) -> list[Position]:
    there = {at for at, end in listed if end == "json"}
    if holder is None:
        return sorted(there)
    counting = {at for at in there if at.token == holder.token or at.name in holder.accepted}
    # A list may be behind: what the lease names is looked for by its name.
    unlisted = {at for at in map(Position.named, holder.accepted) if at is not None} - there
    return sorted(counting | {at for at in unlisted if store.exists(_key(digest, at, "json"))})


def _listed(store: Store, digest: str, folder: str = "checkpoints") -> list[tuple[Position, str]]:
    """Position and end of the name of every file of checkpoints, or of snapshots."""
    keys = store.list(f"train/{digest}/{folder}/")
    names = (key.rpartition("/")[2].partition(".") for key in keys)
    found = ((Position.named(name), end) for name, _, end in names)
    return [(at, end) for at, end in found if at is not None and end]


def _key(digest: str, at: Position, end: str, folder: str = "checkpoints") -> str:
    return f"train/{digest}/{folder}/{at.name}.{end}"


Wanted = Sequence[tuple[str, Blob | None]]
"""Keys of objects, and what their bytes must be; None where they tell it themselves."""
Read = Callable[[Wanted], Generator[bytes, None, None]]
"""The bytes of each, verified, in their order. Raises IntegrityError, MissingError, StoreError."""


@dataclass(frozen=True)
class Opened:
    """A checkpoint that is being read: all but its tensors is here."""

    images_seen: int
    curve: Mapping[str, Any]
    """CURVE_FIELDS of the state."""
    events: Mapping[str, bytes | Blob]
    files: Iterator[dict[str, Tensor]]
    """ "<part>/<name>" -> tensor, of one file after the other, each read when it is asked for."""


@contextlib.contextmanager
def opened(
    store: Store, digest: str, at: Position, *, read: Read | None = None
) -> Iterator[Opened]:
    """Read the checkpoint at a position, through ``read`` in place of :func:`read_ahead`.

    Raises IntegrityError, naming the commit to delete, if any file of it is damaged or lost, or
    whoever reads it finds that it does not fit.
    """
    where = store.where(_key(digest, at, "json"))
    try:
        with contextlib.ExitStack() as until_read:
            yield _open(store, digest, at, read or partial(read_ahead, store), until_read)
    except (IntegrityError, MissingError) as error:
        raise IntegrityError(
            f"checkpoint {where} cannot be used: {error}. To go on from the checkpoint before it, "
            f"delete {where}"
        ) from error


def read_ahead(store: Store, wanted: Wanted) -> Generator[bytes, None, None]:
    """Read objects, of which the next few are under way: one connection is seldom fast."""

    def verified(one: tuple[str, Blob | None]) -> bytes:
        key, blob = one
        data = store.read(key)
        if blob is not None and (found := Blob.of(data)) != blob:
            where = store.where(key)
            raise IntegrityError(damaged(blob, where, found.size_bytes, found.sha256))
        return data

    return ahead(verified, wanted, threads=AHEAD, name="checkpoint-files")


def load(store: Store, digest: str, at: Position) -> TrainState:
    """The whole state of the checkpoint at a position. Raises as :func:`opened`."""
    with opened(store, digest, at) as found:
        tensors = {name: tensor for file in found.files for name, tensor in file.items()}
        return from_flat(tensors, found.images_seen, found.curve, found.events)


@torch.no_grad()
def fill(
    tensors: Mapping[str, Tensor],
    files: Iterable[Mapping[str, Tensor]],
    own: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> None:
    """Copy what files hold into tensors "<part>/<name>", file by file.

    A state is several times as large as its network: whole, beside the one that is filled, it may
    be more than there is memory for. ``own`` takes of whole tensors what is kept here. Raises
    IntegrityError for tensors that are missing, unknown, or of another shape or dtype.
    """
    missing = set(tensors)
    for file in files:
        if unknown := file.keys() - tensors.keys():
            raise IntegrityError(f"it holds {min(unknown)}, and this run has none")
        for name, found in own(file).items():
            here = tensors[name]
            if (here.shape, here.dtype) != (found.shape, found.dtype):
                raise IntegrityError(f"{name} is {_form(found)}, and this run has {_form(here)}")
            here.copy_(found)
            missing.discard(name)
    if missing:
        raise IntegrityError(f"{min(missing)} is not in it ({counted(len(missing), 'tensor')})")


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _open(
    store: Store, digest: str, at: Position, read: Read, until_read: contextlib.ExitStack
) -> Opened:
    key = _key(digest, at, "json")
    (data,), where = read([(key, None)]), store.where(key)
    schema = _schema(data, where)
    if schema not in SCHEMAS:
        known = ", ".join(map(repr, SCHEMAS))
        raise IntegrityError(f"it is of schema {schema!r}, this program reads {known}")
    there = SCHEMAS[schema](digest, at, data, where)
    (curve,) = read([there.curve])
    found = json.loads(curve)
    begins, files = [begin for begin, _ in there.tensors], [file for _, file in there.tensors]
    coming = until_read.enter_context(contextlib.closing(read(files)))
    return Opened(
        images_seen=at.images_seen,
        curve=dict(zip(CURVE_FIELDS, found, strict=True)) if isinstance(found, list) else found,
        # A damaged log costs no training: whoever goes on with the log reads it, and tells.
        events=there.events,
        files=(
            {f"{begin}{name}": tensor for name, tensor in tensors_from_bytes(file).items()}
            for begin, file in zip(begins, coming, strict=True)
        ),
    )


def _schema(commit: bytes, where: str) -> str:
    try:
        return str(json.loads(commit)["schema"])
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{where} is damaged ({error}): restore it from a copy") from error


def _check_position(asked: Position, found: Position) -> None:
    if found != asked:
        raise IntegrityError(f"it holds the state of {found.name}, not this one")


# -- schemas ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """What a commit of any schema says there is to be read."""

    curve: tuple[str, Blob]
    """Key, and what its bytes must be."""
    tensors: list[tuple[str, tuple[str, Blob]]]
    """What names of tensors in a file are led by, and its key and bytes."""
    events: Mapping[str, Blob] = field(default_factory=dict)


def _contents(digest: str, at: Position, commit: bytes, where: str) -> Contents:
    found = note_from_bytes(Commit, commit, where)
    _check_position(at, Position(found.images_seen, found.token))
    files = {end: (_key(digest, at, end), blob) for end, blob in found.files.items()}
    curve = files.pop(CURVE)
    return Contents(curve, [("", file) for file in files.values()], found.events)


@dataclass(frozen=True, kw_only=True)
class Commit1:
    """Commit of schema 1: four or five blobs, and no lease."""

    schema: str
    images_seen: int
    files: dict[str, Blob]


def _contents_1(_: str, at: Position, commit: bytes, where: str) -> Contents:
    found = note_from_bytes(Commit1, commit, where)
    _check_position(at, Position(found.images_seen, 0))
    blobs = {part: (blob.key, blob) for part, blob in found.files.items()}
    curve = blobs.pop("curve")
    return Contents(curve, [(f"{part}/", blob) for part, blob in blobs.items()])


SCHEMAS: dict[str, Callable[[str, Position, bytes, str], Contents]] = {
    SCHEMA: _contents,
    "eqm-checkpoint/1": _contents_1,
}
"""Schema -> how commits of it are read: (run, position, bytes, address). Raises IntegrityError."""


# -- a state as one table of tensors ------------------------------------------------------------


def _flat(state: TrainState) -> dict[str, Tensor]:
    """ "<part>/<name>" -> tensor; "averages/<track>/<name>" for further tracks."""
    parts = {
        "parameters": state.parameters,
        "ema": state.ema,
        "optimiser": state.optimiser,
        **{f"averages/{track}": tensors for track, tensors in state.averages.items()},
    }
    return {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}


def from_flat(
    flat: Mapping[str, Tensor],
    images_seen: int,
    curve: Mapping[str, Any],
    events: Mapping[str, bytes | Blob],
) -> TrainState:
    """State of tensors "<part>/<name>" and the fields that are JSON."""
    parts: dict[str, dict[str, Tensor]] = {"parameters": {}, "ema": {}, "optimiser": {}}
    averages: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        part, _, name = key.partition("/")
        if part == "averages":
            track, _, name = name.partition("/")
            averages.setdefault(track, {})[name] = tensor
        else:
            parts[part][name] = tensor
    given = {name: curve[name] for name in CURVE_FIELDS if name in curve}
    return TrainState(
        images_seen=images_seen, averages=averages, events=dict(events), **parts, **given
    )


# -- snapshots of power-function averages -------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Track:
    """Averages of one length, in a snapshot."""

    sigma_rel: float
    tensors: Blob


@dataclass(frozen=True, kw_only=True)
class SnapshotCommit:
    """What makes a snapshot complete: ``train/<digest>/snapshots/<images>-<token>.json``."""

    schema: str
    images_seen: int
    tracks: tuple[Track, ...]


def save_snapshot(
    store: Store,
    digest: str,
    images_seen: int,
    averages: Mapping[float, dict[str, Tensor]],
    *,
    token: int = 1,
    check: Callable[[], None] = lambda: None,
    patience: Patience | None = None,
) -> str:
    """Make sigma_rel -> averages durable at a position; returns the key of its commit. Idempotent.

    Where one of the same token stands there already, it stays. ``check`` and ``patience`` as in
    :func:`save`.
    """
    ask = patience or Patience()
    tracks = tuple(
        Track(sigma_rel=sigma, tensors=ask(partial(store.put, tensors_to_bytes(tensors))))
        for sigma, tensors in averages.items()
    )
    commit = SnapshotCommit(schema=SNAPSHOT_SCHEMA, images_seen=images_seen, tracks=tracks)
    key = _key(digest, Position(images_seen, token), "json", "snapshots")

    def seal() -> None:
        check()
        store.write_once(key, note_to_bytes(commit))

    ask(seal)
    return key


def read_snapshot(store: Store, digest: str, images_seen: int) -> SnapshotCommit:
    """The snapshot at a position, of the greatest token, with its averages there to be read.

    Whoever goes on from before this position makes it again under a token of its own, so what a
    replaced process writes late is never read. Raises IntegrityError, naming what to delete, if it
    or a file of it is damaged or lost.
    """
    key = _key(digest, _read_at(store, digest, images_seen), "json", "snapshots")
    if not store.exists(key):
        # Another one took its place since it was listed, or it was never there ...
        key = _key(digest, _read_at(store, digest, images_seen), "json", "snapshots")
    if not store.exists(key):
        # ... or lists are behind.
        key = _unlisted(store, digest, images_seen) or key
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


def _read_at(store: Store, digest: str, images_seen: int) -> Position:
    """Which of the snapshots of a position is read."""
    there = [at for at, _ in _listed(store, digest, "snapshots") if at.images_seen == images_seen]
    return max(there, default=Position(images_seen, 0))


def _unlisted(store: Store, digest: str, images_seen: int) -> str | None:
    """Key of the snapshot that is read, looked for by every name that it may have."""
    holder = lease.read(store, lease_key(digest))
    tokens = range(1 if holder is None else holder.token, -1, -1)
    keys = (_key(digest, Position(images_seen, t), "json", "snapshots") for t in tokens)
    return next(filter(store.exists, keys), None)


# -- tensors <-> bytes --------------------------------------------------------------------------


def tensors_to_bytes(tensors: dict[str, Tensor]) -> bytes:
    """Safetensors bytes; the same for the same tensors."""
    from safetensors.torch import save

    return save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})


def tensors_from_bytes(data: bytes) -> dict[str, Tensor]:
    """Tensors of verified safetensors bytes."""
    from safetensors.torch import load

    return load(data)
