"""What crosses a boundary: frozen dataclasses, their JSON, and their digests.

A *record* is the seal of a stage (``<stage>/<digest>/record.json`` in the store). ``digest`` says
what was asked for (config, inputs, algorithm number) and is the address; ``content`` says what
came out (outputs, values) and is what the next stage builds on, so the records of a run form a
Merkle chain. Times, machines and git revisions are provenance: kept in the record, in neither
digest.

Pure: nothing here touches the world. Read by every module.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from eqm.errors import ConfigError, IntegrityError

T = TypeVar("T")
Json = Any
"""A JSON value: None, bool, int, float, str, list or dict of them."""
LATER = "later"
"""In the metadata of a field that came when there were digests already: where it has its default it
is left out of the JSON, so that what was sealed without it keeps its address."""
Table = Mapping[Any, Any]
Items = list[Any] | tuple[Any, ...]


# -- JSON and digests ---------------------------------------------------------------------------


def to_json(value: Any) -> Json:
    """Turn a dataclass tree into plain JSON values. Raises ConfigError for NaN and infinities."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {f.name: to_json(v) for f, v in fields.items() if not _is_unsaid(f, v)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in cast("Table", value).items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in cast("Items", value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{value} cannot be recorded: only finite numbers have a JSON form")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _is_unsaid(of: dataclasses.Field[Any], value: Any) -> bool:
    return bool(of.metadata.get(LATER)) and value == of.default


def canonical_bytes(value: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, UTF-8."""
    text = json.dumps(
        to_json(value), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    )
    return text.encode()


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value, in hexadecimal."""
    return sha256(canonical_bytes(value))


def sha256(data: bytes) -> str:
    """SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def from_json(cls: type[T], data: Json, where: str = "config") -> T:
    """Build a dataclass from JSON; unknown keys and wrong types are refused by name.

    ``where`` names the place in messages ("train.batch_size"). Raises ConfigError.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be a table of settings, not {data!r}")
    table = cast("Table", data)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise ConfigError(_unknown_key(str(key), where, list(known)))
    hints = _hints(cls)
    values = {key: _decode(hints[key], item, f"{where}.{key}") for key, item in table.items()}
    missing = [
        name
        for name, f in known.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}: add it")
    return cls(**values)


_hints = functools.cache(get_type_hints)


def _unknown_key(key: str, where: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    return f"unknown setting {key!r} in {where}: {hint}"


def _decode(hint: Any, value: Json, where: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _decode_union(get_args(hint), value, where)
    if origin is Literal:
        return _decode_literal(get_args(hint), value, where)
    if origin is tuple:
        return _decode_tuple(get_args(hint), value, where)
    if origin is dict:
        return _decode_dict(get_args(hint), value, where)
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)  # type: ignore[arg-type]
    return _decode_scalar(hint, value, where)


def _decode_union(options: tuple[Any, ...], value: Json, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    (inner,) = (option for option in options if option is not type(None))
    return _decode(inner, value, where)


def _decode_literal(options: tuple[Any, ...], value: Json, where: str) -> Any:
    if value in options:
        return value
    close = difflib.get_close_matches(str(value), [str(o) for o in options], n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ConfigError(
        f"{where} is {value!r}; it must be one of {', '.join(map(repr, options))}{hint}"
    )


def _decode_tuple(args: tuple[Any, ...], value: Json, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where} is {value!r}; it must be a list")
    items = cast("Items", value)
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(items)
    if len(args) != len(items):
        raise ConfigError(f"{where} has {len(items)} entries; it must have {len(args)}")
    pairs = enumerate(zip(args, items, strict=True))
    return tuple(_decode(arg, item, f"{where}[{i}]") for i, (arg, item) in pairs)


def _decode_dict(args: tuple[Any, ...], value: Json, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {value!r}; it must be a table")
    pairs = cast("Table", value).items()
    return {str(key): _decode(args[1], item, f"{where}.{key}") for key, item in pairs}


def _decode_scalar(hint: Any, value: Json, where: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not right:
        raise ConfigError(f"{where} is {value!r}; it must be of type {hint.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} is {value!r}; it must be finite")
    return value


# -- what stages leave behind -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Blob:
    """Bytes in the store, named by what they are."""

    sha256: str
    """Digest of the bytes, hexadecimal."""
    size_bytes: int

    def __post_init__(self) -> None:
        # It becomes part of a path.
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ConfigError(f"sha256 is {self.sha256[:80]!r}; it must be 64 hexadecimal digits")

    @staticmethod
    def of(data: bytes) -> "Blob":
        """The name of bytes."""
        return Blob(sha256=sha256(data), size_bytes=len(data))

    @property
    def key(self) -> str:
        """Where the bytes lie in the store."""
        return f"blobs/sha256/{self.sha256}"


@dataclass(frozen=True, kw_only=True)
class Ref:
    """A sealed result that another one builds on."""

    stage: str
    digest: str
    """Address: what was asked for."""
    content: str
    """What came out; checked before anything of it is used."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The seal of a stage."""

    stage: str
    algorithm: int
    """Raised when the stage's output for the same input would change."""
    config: dict[str, Any]
    inputs: dict[str, Ref]
    outputs: dict[str, Blob]
    """Reproducible bytes: part of ``content``."""
    values: dict[str, Any]
    """Reproducible small results (numbers, names): part of ``content``."""
    logs: dict[str, Blob] = field(default_factory=dict)
    """Bytes that differ from run to run (timings)."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Times, versions, machine, git revision: in no digest."""

    @property
    def digest(self) -> str:
        """What was asked for: the address of this record."""
        return stage_digest(self.stage, self.algorithm, self.config, self.inputs)

    @property
    def content(self) -> str:
        """What came out."""
        return digest({"digest": self.digest, "outputs": self.outputs, "values": self.values})

    @property
    def ref(self) -> Ref:
        """How another stage names this one."""
        return Ref(stage=self.stage, digest=self.digest, content=self.content)


def stage_digest(
    stage: str, algorithm: int, config: Mapping[str, Any], inputs: Mapping[str, Ref]
) -> str:
    """Address of the result of a stage: SHA-256 over all that its output is a function of."""
    return digest({"stage": stage, "algorithm": algorithm, "config": config, "inputs": inputs})


def record_to_bytes(record: Record) -> bytes:
    """JSON of a record, with both digests in it for readers and for the check on the way back."""
    body = {"digest": record.digest, "content": record.content, **to_json(record)}
    return json.dumps(body, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def record_from_bytes(data: bytes, where: str) -> Record:
    """Read a record and check both of its digests. Raises IntegrityError."""
    try:
        body = json.loads(data)
        stated = (body.pop("digest"), body.pop("content"))
        record = from_json(Record, body, where)
    except (ValueError, KeyError, AttributeError) as error:
        raise IntegrityError(f"{where} is not a record ({error}); it must not be edited") from error
    if stated != (record.digest, record.content):
        raise IntegrityError(
            f"{where} does not match its own digest: it was changed after it was sealed; "
            "restore it or delete it and run the stage again"
        )
    return record


def note_to_bytes(value: Any) -> bytes:
    """JSON of a small thing that is kept (a commit, an entry), with its own digest in it."""
    body = {**to_json(value), "digest": digest(value)}
    return json.dumps(body, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def note_from_bytes(cls: type[T], data: bytes, where: str) -> T:
    """Read what :func:`note_to_bytes` wrote. Raises IntegrityError if anything of it changed."""
    try:
        body = json.loads(data)
        stated = body.pop("digest")
        value = from_json(cls, body, where)
    except (ValueError, KeyError, AttributeError) as error:
        raise IntegrityError(f"{where} is damaged ({error}): restore it from a copy") from error
    if digest(value) != stated:
        raise IntegrityError(
            f"{where} does not match its own digest: it was changed after it was written; restore "
            "it from a copy, or delete it and what it stands for is made again"
        )
    return value


# -- latents and their manifest -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """What stored moments mean: which autoencoder made them, and how they become latents.

    latents = (mean + std * noise - shift) * scale, per channel. A model trained under one spec
    refuses data of another.
    """

    autoencoder: str
    """Name and digest of the autoencoder, "identity" for pixels."""
    image_size_px: int
    image_channels: int
    shape: tuple[int, int, int]
    """(C, H, W) of one latent."""
    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        channels = self.shape[0]
        if len(self.shift) != channels or len(self.scale) != channels:
            raise ConfigError(
                f"latent spec has {channels} channels, but {len(self.shift)} shifts "
                f"and {len(self.scale)} scales"
            )


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of latents and the index into it."""

    tar: Blob
    index: Blob
    count: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A sealed set of latents: the order of shards and samples is part of it."""

    spec: LatentSpec
    source: str
    """Digest of the listing of images."""
    classes: tuple[str, ...]
    mirrored: bool
    """Whether each sample holds the moments of the mirror image as well."""
    shards: tuple[Shard, ...]
    shard_images: int
    """Samples of every shard but the last, which may hold fewer."""
    index: Blob
    """Columns of all shards' indices, joined; what a reader maps."""
    keys: Blob
    """Names of all images."""
    train_per_class: tuple[int, ...]
    held_out_per_class: tuple[int, ...]
    channel_mean: tuple[float, ...]
    """Of the stored means over the training split, per latent channel."""
    channel_std: tuple[float, ...]
    skipped: tuple[str, ...] = ()
    """Keys of corrupt images that were left out."""
    lineage: dict[str, Ref] = field(default_factory=dict)
    """What the set was made of: "source" and "autoencoder", "earlier" if images were copied."""

    def __post_init__(self) -> None:
        whole, last = self.shards[:-1], self.shards[-1:]
        equal = all(shard.count == self.shard_images for shard in whole)
        if not last or not equal or not 0 < last[0].count <= self.shard_images:
            counts = [shard.count for shard in self.shards]
            raise ConfigError(
                f"manifest has shards of {counts[:5]} … {counts[-1:]} samples; all but the last "
                f"must hold shard_images ({self.shard_images}), and the last at least 1"
            )

    @property
    def count(self) -> int:
        """Samples in all, training and held-out."""
        return sum(shard.count for shard in self.shards)


# -- evaluation and decision --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number, under a name that tells what it is."""

    name: str
    """For people and for comparison: "FD[digits-cnn]-1797" is neither an FID nor on 50,000."""
    value: float
    beside: float | None = None
    """The same quantity for real held-out images: about what a perfect model would show with as
    many samples."""
    low: float | None = None
    """Lower end of its 95 % interval: what other samples of the model would give."""
    high: float | None = None
    """Upper end; both are there or neither."""
    n: int | None = None
    """How many samples it is of; None: all of the evaluation's."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class OODRow:
    """How well one score tells one set of images from held-out ones (eqm.ood); with intervals.

    What is None was not measured when the row was written.
    """

    name: str
    """Of the set."""
    score: str = "gradient_norm"
    """Of the images; every score is high outside (eqm.outliers)."""
    role: Literal["main", "score", "baseline"] = "main"
    """"main": the model's score that a policy means by the name of the set alone; "score": another
    of the model's; "baseline": nothing of the model is in it."""
    count: int
    held_out: int | None = None
    """Images in distribution; areas under precision and recall are at the ratio of the two."""
    auroc: float
    auroc_low: float
    auroc_high: float
    aupr: float
    """Area under precision and recall, the other images being the positive class."""
    aupr_low: float | None = None
    aupr_high: float | None = None
    aupr_in: float | None = None
    """The same with held-out images being the positive class."""
    aupr_in_low: float | None = None
    aupr_in_high: float | None = None
    fpr95_in: float
    """Share of the other images below the score under which 95 % of the held-out ones lie."""
    fpr95_in_low: float | None = None
    fpr95_in_high: float | None = None
    fpr95_out: float | None = None
    """Share of the held-out images above the score over which 95 % of the other ones lie."""
    fpr95_out_low: float | None = None
    fpr95_out_high: float | None = None
    gated: bool
    """Whether a policy may read this row; rows that only inform are never gated."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured of one model, and under which protocol."""

    protocol: dict[str, Any]
    """All that must be equal for two evaluations to be comparable; not the model."""
    samples: int
    metrics: dict[str, Metric]
    """By key: distance, distance_endless, distance_held_out, spatial_distance, kid, score,
    precision, recall, label_agreement, nearest, copies (eqm.measures); under further extractors
    fd_NAME, fd_endless_NAME and so on (eqm.names)."""
    ood: tuple[OODRow, ...]
    mean_field_evaluations: float

    @property
    def protocol_digest(self) -> str:
        """Numbers with different protocol digests are never compared."""
        return digest(self.protocol)


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One check of a policy, and how it came out."""

    check: str
    passed: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether a candidate becomes champion, with every reason."""

    promote: bool
    policy: dict[str, Any]
    """The policy as it stood (policy.PolicyConfig)."""
    candidate: Ref
    """Evaluation record of the candidate."""
    champion: Ref | None
    """Evaluation record of the champion it was compared with."""
    reasons: tuple[Reason, ...]
    studies: dict[str, Ref] = field(default_factory=dict)
    """Sealed studies of the candidate that the policy asked for, by name."""


# -- studies ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number over the repetitions of a row."""

    value: float
    """Mean over repetitions."""
    low: float | None
    """Lower end of its 95 % interval: Student's over repetitions, or the metric's own of one."""
    high: float | None
    values: tuple[float, ...]
    """Of each repetition."""
    lows: tuple[float | None, ...] = ()
    """Ends of the metric's own interval in each repetition, where there are several."""
    highs: tuple[float | None, ...] = ()
    beside: float | None = None
    """The same quantity for real held-out images."""


@dataclass(frozen=True, kw_only=True)
class StudyTableRow:
    """One row of a study's table."""

    label: str
    metrics: dict[str, Estimate]
    """Empty where a repetition failed: a mean of those that went well would flatter the row."""
    evaluations: Estimate | None
    """Field evaluations a sample."""
    against_first: Estimate | None
    """Distance less that of the first row, in pairs; None for the first row itself."""
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """Number of a repetition, from 1 -> why it diverged."""
    distances: tuple[float | None, ...] = ()
    """Of a row that failed: those of its other repetitions."""


@dataclass(frozen=True, kw_only=True)
class StudyScore:
    """How well one score of one row's models tells one set of images from held-out ones."""

    row: str
    """Label of the row; empty for a baseline, which knows of no model."""
    score: str
    name: str
    """Of the set."""
    auroc: Estimate


@dataclass(frozen=True, kw_only=True)
class StudyTable:
    """What a study found."""

    study: str
    seeds: int
    names: dict[str, str]
    """Key of a metric -> its name, which tells what it is."""
    rows: tuple[StudyTableRow, ...]
    protocols_differ_in: tuple[str, ...]
    """Settings that rows change and protocols name; all else of the protocols is equal."""
    outliers: tuple[StudyScore, ...] = ()
    """What lies out of distribution, where the study asks for it."""
