"""What every stage program does around its own work: read the job, skip, run, seal, say why not.

``python -m eqm.encode CONFIG.json`` (alone or under torchrun) is an SPMD program that knows
nothing of Prefect. It is done when its record is sealed; started again after that it does nothing,
started again before that it goes on from whatever it had made durable.
"""

import contextlib
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from eqm import distributed
from eqm.config import ALGORITHMS, Job, stage_config
from eqm.disk import disk_errors
from eqm.distributed import World
from eqm.errors import (
    EXIT_REFUSED,
    AwayError,
    ConfigError,
    DataError,
    DivergedError,
    EqmError,
    IntegrityError,
    MissingError,
    StageError,
)
from eqm.patience import PASSING
from eqm.progress import Progress, unheard
from eqm.records import (
    Blob,
    Record,
    Ref,
    from_json,
    note_from_bytes,
    note_to_bytes,
    stage_digest,
    to_json,
)
from eqm.storage import Store, open_store
from eqm.threads import blas_kernels

AWAY = " (The store was away.)"
"""Behind the message that a program leaves for whoever started it: trying again may help."""

LESS_MEMORY = {
    "latents": "lower encode.batch_size",
    "train": "set compute.micro_batch, or lower it, or set compute.checkpointing to true",
    "samples": "lower generate.sampler.batch_size",
}
"""Stage -> what to do where memory is used up."""

NO_MEMORY, NO_THREAD = "can't allocate memory", "can't start new thread"
"""Of torch and of Python, where the system refuses."""

VERSIONS_OF = ("torch", "numpy", "diffusers", "webdataset", "torch-fidelity", "mlflow", "prefect")


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a stage works with."""

    job: Job
    config: Any
    """Typed config of the stage (config.stage_config)."""
    store: Store
    world: World
    until_sealed: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """What a stage holds until its record is sealed, or it has failed."""

    @property
    def digest(self) -> str:
        """Address under which the result will be sealed."""
        return job_digest(self.job)

    def input(self, name: str) -> Record:
        """Record of an input, verified against what the job expects of it.

        Raises ConfigError for an input that the job does not have, and as :func:`open_ref`.
        """
        if name not in self.job.inputs:
            raise ConfigError(f"stage {self.job.stage} was given no input {name!r}")
        return open_ref(self.store, self.job.inputs[name])

    def listing(self) -> bytes | None:
        """The kept listing of the source that the job builds on; None where none was kept."""
        try:
            return self.store.read(listing_key(self.job.inputs["source"].digest))
        except MissingError:
            return None

    def progress(self, label: str, total: int, *, unit: str = "images", done: int = 0) -> Progress:
        """Progress that only the first rank shows."""
        return Progress(label, total=total, unit=unit, done=done, show=self.world.is_first)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a stage leaves behind; bytes and files become blobs."""

    outputs: Mapping[str, bytes | Path | Blob]
    values: Mapping[str, Any] = field(default_factory=dict)
    logs: Mapping[str, bytes | Path | Blob] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How it was made, beside what is known of every stage: in no digest."""


@dataclass(frozen=True)
class Unfinished:
    """A part of a stage is done that was asked for, but not all that its record must name."""

    message: str


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """That a stage ran off to infinity, in its own words."""

    message: str
    facts: dict[str, Any] = field(default_factory=dict)
    """Of a training: first images of the updates that were not finite, and numbers of the samples
    that they were given."""


Program = Callable[[Context], Outcome | Unfinished | None]
"""The work of a stage; ranks other than the first may return None."""
Afterwards = Callable[[Context, Record], None]
"""What is left to do for a stage that is found sealed; changes nothing of it."""


def listing_key(digest: str) -> str:
    """Where the listing of a source is kept for jobs, so that none of them scans it again."""
    return f"source/{digest}/listing"


def job_digest(job: Job) -> str:
    """Address of what a job asks for. Raises ConfigError for an unknown stage."""
    if job.stage not in ALGORITHMS:
        raise ConfigError(f"stage is {job.stage!r}; it must be one of {', '.join(ALGORITHMS)}")
    return stage_digest(job.stage, ALGORITHMS[job.stage], job.config, job.inputs)


def divergence(store: Store, job: Job) -> str | None:
    """Why a job that is not sealed diverged, in its own words; None where it never did.

    It is kept beside what the stage left, so whoever launched it learns of it, wherever it ran.
    Raises IntegrityError, StoreError.
    """
    digest = job_digest(job)
    if store.record(job.stage, digest) is not None:
        return None
    key = divergence_key(job.stage, digest)
    try:
        return note_from_bytes(Divergence, store.read(key), store.where(key)).message
    except MissingError:
        return None


def divergence_key(stage: str, digest: str) -> str:
    """Where a stage that diverged says so."""
    return f"{stage}/{digest}/diverged.json"


def open_ref(store: Store, ref: Ref) -> Record:
    """Record of a reference.

    Raises DataError where it is not sealed, IntegrityError where its content is another one.
    """
    record = store.record(ref.stage, ref.digest)
    if record is None:
        raise DataError(
            f"{ref.stage} {ref.digest[:12]} is not sealed in {store.uri}: run that stage first"
        )
    if record.content != ref.content:
        raise IntegrityError(
            f"{ref.stage} {ref.digest[:12]} in {store.uri} has content {record.content[:12]}, but "
            f"this job builds on content {ref.content[:12]}: it was made again elsewhere; run the "
            "pipeline again to build on what is there"
        )
    return record


def verify(store: Store, record: Record) -> None:
    """Check every blob that a record names: there, and undamaged as it would be used.

    Bytes are read from this machine's cache where it has them, for what is read there is what a
    stage would use. Raises IntegrityError, StoreError.
    """
    for blob in [*record.outputs.values(), *record.logs.values()]:
        # A good copy on this machine says nothing about whether others can still get the bytes.
        if not store.holds(blob):
            raise IntegrityError(
                f"{store.where(blob.key)}, named by {record.stage} {record.digest[:12]}, is gone "
                "or of another size: restore it, or delete the record and run the stage again"
            )
        store.check(blob)


def main(
    stages: tuple[str, ...],
    program: Program,
    argv: list[str],
    *,
    sealed: Afterwards | None = None,
) -> int:
    """Run a stage program from its command line; returns the exit status."""
    if len(argv) != 1 or argv[0].startswith("-"):
        names = " or ".join(stages)
        sys.stderr.write(f"usage: python -m {_module()} CONFIG.json  (seals stage {names})\n")
        return EXIT_REFUSED
    with unheard():
        return _main(stages, program, Path(argv[0]), sealed)


def _main(stages: tuple[str, ...], program: Program, path: Path, sealed: Afterwards | None) -> int:
    job = None
    try:
        job = read_job(path, stages)
        run_part(job, program, afterwards=sealed)
    except EqmError as error:
        return _refuse(error, job)
    except OSError as error:
        try:
            with disk_errors(str(error.filename or "this machine")):
                raise
        except EqmError as told:
            return _refuse(told, job)
    except Exception as error:
        if (told := _used_up(error, job)) is not None:
            return _refuse(told, job)
        # A defect of ours keeps its traceback. Whoever started it learns what it was, and not only
        # what other ranks make of it.
        kind = type(error).__name__
        _leave(f"{kind}: {error} (the traceback is in the program's output)", job)
        raise
    return 0


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else "eqm.STAGE"


def _used_up(error: Exception, job: Job | None) -> EqmError | None:
    """What to say where memory or threads are used up; None for anything else."""
    import torch

    remedy = LESS_MEMORY.get("" if job is None else job.stage, "use one with more memory")
    if isinstance(error, torch.OutOfMemoryError):
        # Behind it are a dozen figures of the allocator.
        said = ". ".join(str(error).split(". ")[:2]).rstrip(".")
        return StageError(f"{said}: {remedy}; see with nvidia-smi that nobody else uses this GPU")
    torch_says = isinstance(error, RuntimeError) and NO_MEMORY in str(error)
    if torch_says or isinstance(error, MemoryError):
        said = str(error).rpartition(NO_MEMORY)[2].strip(" :.") or type(error).__name__
        return StageError(
            f"this process is given no more memory ({said}): {remedy}; or raise its limit (a "
            "container's or job's, ulimit -v)"
        )
    if isinstance(error, RuntimeError) and str(error) == NO_THREAD:
        return StageError(
            "this process may start no more threads: raise the limit of processes (ulimit -u, a "
            "container's limit of pids); a stage needs some dozens for each of its processes"
        )
    return None


def _refuse(error: EqmError, job: Job | None) -> int:
    # First for whoever started it: the other may have nobody who reads it.
    _leave(f"{error}{AWAY if isinstance(error, PASSING) else ''}", job)
    sys.stderr.write(f"error: {error}\n")
    return EXIT_REFUSED


def _leave(words: str, job: Job | None) -> None:
    """Leave a message for whoever started the program."""
    if job is not None and job.runtime.error_file:
        file = Path(job.runtime.error_file)
        # Of several ranks the first one has the cause, the others what followed from it.
        if not file.exists() or not file.read_text():
            file.write_text(words)


def _end(words: str, job: Job) -> None:
    """Leave a message, and end at once: the main thread waits for a GPU, and can raise nothing."""
    _leave(words, job)
    distributed.end_at_once(words)


def failure(message: str) -> EqmError:
    """What to raise for a program that left a message: AwayError, or else StageError."""
    return AwayError(message) if message.endswith(AWAY) else StageError(message)


def read_job(path: Path, stages: tuple[str, ...]) -> Job:
    """Read CONFIG.json. Raises ConfigError."""
    try:
        job = from_json(Job, json.loads(path.read_text()), path.name)
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a job ({error})") from error
    if job.stage not in stages:
        raise ConfigError(f"{path} is a job for stage {job.stage!r}, not {' or '.join(stages)}")
    return job


def run(job: Job, program: Program) -> Record:
    """Run a job unless it is sealed; returns the sealed record. Raises DataError without one."""
    record = run_part(job, program)
    return record if record is not None else open_sealed(open_store(job.runtime.store), job)


def run_part(job: Job, program: Program, *, afterwards: Afterwards | None = None) -> Record | None:
    """Run a job unless it is sealed; the sealed record, or None while parts of it are missing."""
    runtime = job.runtime
    config = stage_config(job.stage, job.config)
    cache = Path(runtime.cache) if runtime.cache else None
    store = open_store(runtime.store, cache=cache, cache_bytes=runtime.cache_bytes)
    connection = distributed.connect(
        runtime.device,
        threads=runtime.threads,
        timeout_seconds=runtime.collective_timeout_seconds,
        on_stall=lambda words: _end(words, job),
    )
    with connection as world, contextlib.ExitStack() as until_sealed:
        context = Context(
            job=job, config=config, store=store, world=world, until_sealed=until_sealed
        )
        sealed = store.record(job.stage, job_digest(job))
        # One rank may see a seal that another was too early for: the first one's word counts.
        if world.first_says(sealed is not None):
            _say(f"{job.stage} {job_digest(job)[:12]} is sealed already")
            record = open_sealed(store, job)
            if afterwards is not None:
                afterwards(context, record)
            return record
        began = _now()
        try:
            outcome = program(context)
        except DivergedError as error:
            # Of several ranks whichever is first: each tells of its own samples.
            note = note_to_bytes(Divergence(message=str(error), facts=error.facts))
            store.write_once(divergence_key(job.stage, context.digest), note)
            raise
        if world.is_first and outcome is None:
            raise AssertionError("the first rank must return what the stage made")
        if world.first_says(isinstance(outcome, Unfinished)):
            if isinstance(outcome, Unfinished):
                _say(f"{job.stage} {context.digest[:12]}: {outcome.message}")
            return None
        record = None
        with world.first_at_work():
            if world.is_first and isinstance(outcome, Outcome):
                record = store.seal(_record(context, outcome, began))
                _say(f"{job.stage} {record.digest[:12]} sealed, content {record.content[:12]}")
    return record if record is not None else open_sealed(store, job)


def open_sealed(store: Store, job: Job) -> Record:
    """Record of a job that has been sealed by somebody else. Raises DataError."""
    record = store.record(job.stage, job_digest(job))
    if record is None:
        raise DataError(f"{job.stage} {job_digest(job)[:12]} was not sealed in {store.uri}")
    return record


def _record(context: Context, outcome: Outcome, began: str) -> Record:
    job, store = context.job, context.store
    return Record(
        stage=job.stage,
        algorithm=ALGORITHMS[job.stage],
        config=job.config,
        inputs=job.inputs,
        outputs={name: _blob(store, data) for name, data in outcome.outputs.items()},
        values=to_json(dict(outcome.values)),
        logs={name: _blob(store, data) for name, data in outcome.logs.items()},
        provenance={
            **provenance(context.world, began),
            **to_json(dict(outcome.provenance)),
            **({"compute": to_json(job.runtime.compute)} if job.stage == "train" else {}),
        },
    )


def _blob(store: Store, data: bytes | Path | Blob) -> Blob:
    return data if isinstance(data, Blob) else store.put(data)


def provenance(world: World, began: str) -> dict[str, Any]:
    """Where, when and with what a result was made. Names no user, no path, no secret."""
    import torch

    return {
        "began": began,
        "ended": _now(),
        "world_size": world.size,
        "device": str(world.device.type),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "blas": blas_kernels(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {name: _version(name) for name in VERSIONS_OF},
        "git_revision": git_revision(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_revision(root: Path | None = None) -> str | None:
    """Commit of the source tree this runs from; None outside a git checkout."""
    git = (root or Path(__file__).resolve().parent.parent) / ".git"
    try:
        if git.is_file():
            # Of a second working tree: a line that says where its HEAD is.
            git = git.parent / git.read_text().removeprefix("gitdir: ").strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        branch = head.removeprefix("ref: ")
        # All working trees share their branches.
        common = git / "commondir"
        shared = git / common.read_text().strip() if common.exists() else git
        if (shared / branch).exists():
            return (shared / branch).read_text().strip()
        packed = (shared / "packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {branch}")), None)
    except OSError:
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # noqa: TID251  before a world is connected
        sys.stderr.write(line + "\n")
