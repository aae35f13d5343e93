"""Stage "samples": a trained model and seeds -> samples. ``python -m eqm.generate CONFIG.json``

Decoder output streams into feature extraction, by every extractor in the same pass; activations of
all samples and the first images are sealed. Work is cut into parts of one batch, each committed
create-once: interrupted, it goes on at the part where it was. Sample s is a function of (model, s),
so parts may be made anywhere, in any order, and any sample can be made again (:func:`remake`). What
is sealed is read by eqm.samples.
"""

import contextlib
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from eqm import model, sampling, starts
from eqm.checkpoint import tensors_from_bytes, tensors_to_bytes
from eqm.config import GenerateConfig, replace
from eqm.errors import DataError, DivergedError
from eqm.features import FeatureExtractor, load_extractors
from eqm.latent_set import LatentSet
from eqm.model import Model
from eqm.records import Blob, Record, note_from_bytes, note_to_bytes
from eqm.sampler import Descent
from eqm.samples import IMAGES, Part, config_of, labels_of, part_of, parts_of
from eqm.sampling import Samples
from eqm.stage import Context, Outcome, open_ref
from eqm.stage import main as stage_main
from eqm.storage import Store

T = TypeVar("T")

TRAJECTORIES = 10
"""Samples whose way down is shown, one for each of the first classes."""
PIXELS_AT_ONCE = 2**21
"""A decoder holds a thousand bytes a pixel: 32 images of 256 px at once, whatever the batch."""
BEHIND = 2
"""Parts that may wait to be made durable while the next is made."""


@dataclass(frozen=True, kw_only=True)
class Committed:
    """Where a finished part lies."""

    table: Blob
    images: Blob | None
    """None where none of its images are kept."""
    seconds: dict[str, float]
    """How long it took: "sampler", "decoder", "extractor"."""


def program(context: Context) -> Outcome | None:
    """Generate what is missing; the first rank returns the outcome."""
    config: GenerateConfig = context.config.generate
    trained = model.from_record(context.store, context.input("train")).to(context.world.device)
    extractors = load_extractors(context.job.inputs, context.store, context.world.device)
    held = starts.held_out_of(context.store, context.input("train"), config.noise_level)
    told = starts.told_of_repeats(held, config.samples, config.noise_level)
    if told is not None and context.world.is_first:
        sys.stderr.write(f"warning: {told}\n")
    parts = parts_of(config)
    mine = parts[context.world.rank :: context.world.size]
    missing = [part for part in mine if committed(context, part) is None]
    total, left = (sum(part.count for part in some) for some in (mine, missing))
    clock = Clock(context.world.device)
    with (
        context.progress("generating", total, unit="samples", done=total - left) as bar,
        Commits(context) as commits,
    ):
        for part, found in clock.within("sampler", found_in_parts(config, trained, missing, held)):
            made = make(config, trained, extractors, seeds_of(config, part), found, clock, held)
            made[IMAGES] = made[IMAGES][: max(0, config.keep_images - part.first)]
            commits.add(part, made, clock.take())
            bar.advance(part.count)
    folder = _commit_folder(context)
    context.world.barrier(left=lambda: len(parts) - len(context.store.list(folder)))
    with context.world.first_at_work():
        return gather(context, config, trained, parts, held) if context.world.is_first else None


# -- a part -------------------------------------------------------------------------------------


def found_in_parts(
    config: GenerateConfig, trained: Model, parts: Sequence[Part], held: LatentSet | None = None
) -> Iterator[tuple[Part, Samples]]:
    """Descend to the samples of some parts, and give each part when all of it is found.

    Without a stop rule a part is one batch. With one, samples of all parts go through as many slots
    as a batch has: one that has stopped makes room for the next, be that of the next part.
    """
    if config.sampler.stop_below is None:
        for part in parts:
            yield part, descend(config, trained, seeds_of(config, part), held)
        return
    seeds = [seed for part in parts for seed in seeds_of(config, part)]
    if not seeds:
        return
    found = sampling.samples_as_found(
        trained,
        labels=_model_labels(config, trained, seeds, held),
        seeds=seeds,
        # As many for few parts as for all: a sample's bits depend on this.
        slots=min(config.sampler.batch_size, config.samples),
        **_how(config),
    )
    yield from _put_together(found, parts)


def descend(
    config: GenerateConfig,
    trained: Model,
    seeds: Sequence[int],
    held: LatentSet | None = None,
    **more: Any,
) -> Samples:
    """Descent of samples together as the config has it, but for what ``more`` says.

    From images of ``held``, if given.
    """
    labels = _model_labels(config, trained, seeds, held)
    level = config.noise_level
    start = None if held is None else starts.partly_noised(held, trained, seeds, level)
    how = {**_how(config), **more}
    return sampling.sample(trained, labels=labels, seeds=seeds, start=start, **how)


def seeds_of(config: GenerateConfig, part: Part) -> range:
    """Seeds of the samples of a part."""
    first = config.first_seed + part.first
    return range(first, first + part.count)


def _labels(
    config: GenerateConfig, trained: Model, seeds: Sequence[int], held: LatentSet | None
) -> Tensor:
    if held is not None:
        return starts.labels_of_held_out(held, seeds)
    return labels_of(config, seeds, len(trained.spec.classes))


def _model_labels(
    config: GenerateConfig, trained: Model, seeds: Sequence[int], held: LatentSet | None
) -> Tensor | None:
    """Labels as the model takes them: none where it has no classes."""
    return _labels(config, trained, seeds, held) if trained.spec.classes else None


def _how(config: GenerateConfig) -> dict[str, Any]:
    settings = config.sampler
    return {
        "rule": sampling.rule_of(settings),
        "updates": settings.updates,
        "stop": sampling.stop_of(settings),
        "guidance": settings.guidance,
        "guidance_channels": settings.guidance_channels,
        "precision": settings.precision,
    }


def _put_together(
    found: Iterator[tuple[list[int], Samples]], parts: Sequence[Part]
) -> Iterator[tuple[Part, Samples]]:
    """Samples, which come by their places among those of all parts, part by part."""
    owner = [(part, row) for part in parts for row in range(part.count)]
    begun: dict[int, list[tuple[int, Samples, int]]] = {}
    for places, some in found:
        for at, place in enumerate(places):
            part, row = owner[place]
            rows = begun.setdefault(part.number, [])
            rows.append((row, some, at))
            if len(rows) == part.count:
                yield part, _joined(begun.pop(part.number))


def _joined(rows: list[tuple[int, Samples, int]]) -> Samples:
    """One of (row, samples that it is among, its place there), in the order of the rows."""
    ordered = sorted(rows, key=lambda one: one[0])
    whole: dict[str, Any] = {
        f.name: torch.stack([getattr(some, f.name)[at] for _, some, at in ordered])
        for f in fields(Descent)
        if f.name != "trace"
    }
    return Samples(**whole, model=ordered[0][1].model)


def make(
    config: GenerateConfig,
    trained: Model,
    extractors: Mapping[str, FeatureExtractor],
    seeds: Sequence[int],
    found: Samples,
    clock: "Clock",
    held: LatentSet | None = None,
) -> dict[str, Tensor]:
    """Samples from where their descents ended: activations, images, labels and what they cost."""
    _check_sound(config, seeds, found)
    return {
        **look_at(trained, extractors, found.latents, clock),
        "labels": _labels(config, trained, seeds, held),
        "evaluations": found.evaluations,
        "gradient_norms": found.gradient_norms,
    }


def look_at(
    trained: Model, extractors: Mapping[str, FeatureExtractor], latents: Tensor, clock: "Clock"
) -> dict[str, Tensor]:
    """Images of latents, and what each extractor makes of them under its prefix; some at a time."""
    pieces: list[dict[str, Tensor]] = []
    for some in latents.split(max(1, PIXELS_AT_ONCE // trained.spec.latent.image_size_px**2)):
        with clock.counting("decoder"):
            images = trained.autoencoder.decode(some.float())
        with clock.counting("extractor"):
            pieces.append({IMAGES: images, **_activations(extractors, images)})
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _activations(extractors: Mapping[str, FeatureExtractor], images: Tensor) -> dict[str, Tensor]:
    return {
        f"{prefix}{name}": values
        for prefix, extractor in extractors.items()
        for name, values in extractor.activations(images).tensors().items()
    }


def _check_sound(config: GenerateConfig, seeds: Sequence[int], found: Samples) -> None:
    """Refuse samples that blew up. Raises DivergedError."""
    odd = [seeds[int(i)] for i in found.diverged.nonzero()]
    if odd:
        more = "…" if len(odd) > 5 else ""
        raise DivergedError(
            f"{len(odd)} of {len(seeds)} samples diverged (seeds "
            f"{', '.join(map(str, odd[:5]))}{more}): lower generate.sampler.step_size "
            f"({config.sampler.step_size}); GD is stable below 2 (1 - a) / multiplier"
        )


class Clock:
    """Seconds of each kind of work; waits for the device, or they would be counted to another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Count what happens meanwhile."""
        began = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def within(self, name: str, things: Iterable[T]) -> Iterator[T]:
        """The same things; time until each of them is there is counted."""
        coming = iter(things)
        while True:
            with self.counting(name):
                thing = next(coming, None)
            if thing is None:
                return
            yield thing

    def take(self) -> dict[str, float]:
        """What was counted since this was asked before."""
        taken, self._seconds = self._seconds, {}
        return {name: round(value, 6) for name, value in taken.items()}


# -- what is durable ----------------------------------------------------------------------------


def _commit_folder(context: Context) -> str:
    return f"samples/{context.digest}/parts/"


def _commit_key(context: Context, part: Part) -> str:
    return f"{_commit_folder(context)}{part.number:06d}.json"


def committed(context: Context, part: Part) -> Committed | None:
    """Where a finished part lies; None if it must still be made."""
    key = _commit_key(context, part)
    if not context.store.exists(key):
        return None
    found = note_from_bytes(Committed, context.store.read(key), context.store.where(key))
    blobs = [found.table] if found.images is None else [found.table, found.images]
    # A blob that was lost since is made again: equal bytes come back under the same name.
    return found if all(context.store.exists(blob.key) for blob in blobs) else None


def commit(
    context: Context, part: Part, tensors: dict[str, Tensor], seconds: dict[str, float]
) -> None:
    """Make a part durable; the blobs first, what names them last."""
    table = {name: value for name, value in tensors.items() if name != IMAGES}
    images = tensors[IMAGES]
    # That of the first part is there in any case: it tells the shape that images would have.
    kept = len(images) > 0 or part.number == 0
    done = Committed(
        table=context.store.put(tensors_to_bytes(table)),
        images=context.store.put(tensors_to_bytes({IMAGES: images})) if kept else None,
        seconds=seconds,
    )
    context.store.write_once(_commit_key(context, part), note_to_bytes(done))


class Commits:
    """Makes parts durable beside the work on the next; all that were added are, once it is left."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._writer = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> "Commits":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Also where the work on another part has failed: what is made is kept.
        self._writer.shutdown(wait=True)
        if error is None:
            self._wait_for(0)

    def add(self, part: Part, tensors: dict[str, Tensor], seconds: dict[str, float]) -> None:
        """Take a part; waits where too many are waiting. Raises what an earlier one failed with."""
        self._wait_for(BEHIND - 1)
        # Off the device now, or the writer would wait for what the device is given next.
        here = {name: value.cpu() for name, value in tensors.items()}
        self._waiting.append(self._writer.submit(commit, self._context, part, here, seconds))

    def _wait_for(self, most: int) -> None:
        while len(self._waiting) > most:
            self._waiting.popleft().result()


def gather(
    context: Context,
    config: GenerateConfig,
    trained: Model,
    parts: list[Part],
    held: LatentSet | None,
) -> Outcome:
    """Name all parts in the order of their samples; what they hold is looked at one by one."""
    outputs: dict[str, bytes | Path | Blob] = {}
    costs: dict[str, list[Tensor]] = {"evaluations": [], "gradient_norms": []}
    seconds: Counter[str] = Counter()
    for part in parts:
        found = committed(context, part)
        if found is None:
            raise DataError(
                f"part {part.number} is not in {context.store.uri} although it was generated: "
                f"something deletes from the store; delete {_commit_key(context, part)} too and "
                "run again"
            )
        outputs[part.table] = found.table
        if found.images is not None:
            outputs[part.images] = found.images
        seconds.update(found.seconds)
        table = tensors_from_bytes(context.store.get(found.table))
        for name, values in costs.items():
            values.append(table[name])
    outputs["trajectory.safetensors"] = tensors_to_bytes(trajectory(config, trained, held))
    whole = {name: torch.cat(values).double() for name, values in costs.items()}
    return Outcome(
        outputs=outputs,
        values={
            "samples": config.samples,
            "images_kept": min(config.samples, config.keep_images),
            "mean_field_evaluations": float(whole["evaluations"].mean()),
            "median_gradient_norm": float(whole["gradient_norms"].median()),
        },
        provenance={"seconds": {name: round(value, 3) for name, value in seconds.items()}},
    )


def trajectory(
    config: GenerateConfig, trained: Model, held: LatentSet | None = None
) -> dict[str, Tensor]:
    """Images along the descent of one sample a class: (T, K, C, H, W) uint8, and its updates."""
    seeds = range(max(1, min(TRAJECTORIES, len(trained.spec.classes))))
    shown = np.linspace(0, config.sampler.updates, config.trajectory_points).round().astype(int)
    wanted = set(shown.tolist())
    frames: dict[int, Tensor] = {}

    def look(update: int, latents: Tensor) -> None:
        if update in wanted:
            frames[update] = trained.autoencoder.decode(latents.float())

    # One of each class, whatever the rule of labels is; and no farther than is shown.
    balanced = replace(config, labels="balanced")
    found = descend(balanced, trained, seeds, held, updates=max(wanted), on_update=look)
    # With a stop rule the last of them may end before the last moment that was to be shown.
    frames.setdefault(int(found.updates.max()), found.images())
    updates = sorted(frames)
    return {"images": torch.stack([frames[k] for k in updates]), "updates": torch.tensor(updates)}


# -- once more ----------------------------------------------------------------------------------


def remake(
    store: Store,
    record: Record,
    seeds: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    exact: bool = False,
) -> dict[str, Tensor]:
    """Make samples of a sealed record again, by its model, its sampler and its rule of labels.

    ``images`` (K, C, H, W) uint8 and all that eqm.samples.kept reads, (K, ...) each, in the order
    of the seeds. They equal the sealed ones up to rounding, for another batch adds in another
    order. With ``exact``, the parts in which they lie are made again as they were: every bit is the
    same on the same kind of device with as many threads, and it takes as long as whole batches do.
    What was made in TF32 is made in float32 on a CPU, which is more exact, and not with ``exact``.
    Seeds beyond those of the record are made too, but not with ``exact``. Raises DataError for
    them, for a record of something else, for no seeds, and for samples that blow up.
    """
    config = config_of(record)
    if not len(seeds):
        raise DataError("there are no seeds to make samples of: give at least one")
    place = torch.device(device)
    if config.sampler.precision == "tf32" and place.type != "cuda":
        if exact:
            raise DataError(
                f"samples {record.digest[:12]} were made in 'tf32', which only GPUs of NVIDIA "
                f"have: their bits cannot be made again on a {place.type}; leave exact out, or "
                "make them on a GPU"
            )
        config = replace(config, sampler=replace(config.sampler, precision="float32"))
    train = open_ref(store, record.inputs["train"])
    trained = model.from_record(store, train).to(place)
    extractors = load_extractors(record.inputs, store, place)
    held = starts.held_out_of(store, train, config.noise_level)
    found = (_whole_parts if exact else _batches)(config, trained, seeds, held)
    rows: dict[int, dict[str, Tensor]] = {}
    for names, some in found:
        made = make(config, trained, extractors, names, some, Clock(place), held)
        for at, seed in enumerate(names):
            if seed in seeds:
                rows[seed] = {name: value[at].cpu() for name, value in made.items()}
    return {name: torch.stack([rows[seed][name] for seed in seeds]) for name in rows[seeds[0]]}


def _whole_parts(
    config: GenerateConfig, trained: Model, seeds: Sequence[int], held: LatentSet | None
) -> Iterator[tuple[Sequence[int], Samples]]:
    parts = {part.number: part for part in (part_of(config, seed) for seed in seeds)}
    for part, found in found_in_parts(config, trained, [parts[n] for n in sorted(parts)], held):
        yield seeds_of(config, part), found


def _batches(
    config: GenerateConfig, trained: Model, seeds: Sequence[int], held: LatentSet | None
) -> Iterator[tuple[Sequence[int], Samples]]:
    size = config.sampler.batch_size
    for start in range(0, len(seeds), size):
        some = seeds[start : start + size]
        yield some, descend(config, trained, some, held)


def main(argv: list[str]) -> int:
    """Run the stage program."""
    return stage_main(("samples",), program, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
