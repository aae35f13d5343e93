"""Stage "samples": a trained model and seeds -> samples. ``python -m eqm.generate CONFIG.json``

Decoder output streams into feature extraction; features of all samples and the first images are
sealed. Work is cut into parts of one batch, each committed create-once: interrupted, it goes on at
the part where it was. Sample s is a function of (model, s), so parts may be made anywhere, in any
order.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eqm import model, sampling
from eqm.checkpoint import tensors_from_bytes, tensors_to_bytes
from eqm.config import GenerateConfig
from eqm.errors import DataError
from eqm.features import FeatureExtractor, load_extractor
from eqm.model import Model
from eqm.records import Blob, note_from_bytes, note_to_bytes
from eqm.sampling import Samples
from eqm.stage import Context, Outcome
from eqm.stage import main as stage_main

TRAJECTORIES = 10
"""Samples whose way down is shown, one for each of the first classes."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A run of consecutive samples."""

    number: int
    first: int
    """Index of its first sample; its seed is first_seed + first."""
    count: int


def parts_of(config: GenerateConfig) -> list[Part]:
    """Cut the samples into parts of one batch."""
    size = config.sampler.batch_size
    starts = range(0, config.samples, size)
    return [
        Part(number=i, first=s, count=min(size, config.samples - s)) for i, s in enumerate(starts)
    ]


def labels_of(config: GenerateConfig, part: Part, classes: int) -> Tensor:
    """Labels of a part, (count,) int64: balanced, sample s has label s modulo classes."""
    first = config.first_seed + part.first
    return torch.arange(first, first + part.count) % classes


def program(context: Context) -> Outcome | None:
    """Generate what is missing; the first rank returns the outcome."""
    config: GenerateConfig = context.config.generate
    trained = model.from_record(context.store, context.input("train")).to(context.world.device)
    extractor = load_extractor(context.input("extractor"), context.store, context.world.device)
    parts = parts_of(config)
    mine = parts[context.world.rank :: context.world.size]
    with context.progress("generating", sum(p.count for p in mine), unit="samples") as bar:
        for part in mine:
            if committed(context, part) is None:
                commit(context, part, make(config, trained, extractor, part))
            bar.advance(part.count)
    context.world.barrier()
    return gather(context, config, trained, parts) if context.world.is_first else None


def make(
    config: GenerateConfig, trained: Model, extractor: FeatureExtractor, part: Part
) -> dict[str, Tensor]:
    """Samples of one part: activations, images, labels and what their descent cost."""
    first = config.first_seed + part.first
    labels = labels_of(config, part, len(trained.spec.classes))
    found = descend(config, trained, labels, range(first, first + part.count))
    if bool(found.diverged.any()):
        odd = [first + int(i) for i in found.diverged.nonzero()[:5]]
        raise DataError(
            f"{int(found.diverged.sum())} of {part.count} samples diverged (seeds "
            f"{', '.join(map(str, odd))}…): lower generate.sampler.step_size "
            f"({config.sampler.step_size}); GD is stable below 2 (1 - a) / multiplier"
        )
    images = found.images()
    return {
        **extractor.activations(images).tensors(),
        "images": images[: max(0, config.keep_images - part.first)],
        "labels": labels,
        "evaluations": found.evaluations,
        "gradient_norms": found.gradient_norms,
    }


def descend(
    config: GenerateConfig, trained: Model, labels: Tensor, seeds: range, **more: object
) -> Samples:
    """Descent as the config has it."""
    settings = config.sampler
    return sampling.sample(
        trained,
        labels=labels,
        seeds=seeds,
        rule=sampling.rule_of(settings),
        updates=settings.updates,
        stop=sampling.stop_of(settings),
        guidance=settings.guidance,
        guidance_channels=settings.guidance_channels,
        **more,  # type: ignore[arg-type]
    )


def _commit(context: Context, part: Part) -> str:
    return f"samples/{context.digest}/parts/{part.number:06d}.json"


def committed(context: Context, part: Part) -> Blob | None:
    """Where a finished part lies; None if it must still be made."""
    key = _commit(context, part)
    if not context.store.exists(key):
        return None
    blob = note_from_bytes(Blob, context.store.read(key), context.store.where(key))
    # A blob that was lost since is made again: equal bytes come back under the same name.
    return blob if context.store.exists(blob.key) else None


def commit(context: Context, part: Part, tensors: dict[str, Tensor]) -> None:
    """Make a part durable; the blob first, what names it last."""
    blob = context.store.put(tensors_to_bytes(tensors))
    context.store.write_once(_commit(context, part), note_to_bytes(blob))


def gather(context: Context, config: GenerateConfig, trained: Model, parts: list[Part]) -> Outcome:
    """Put the parts together in the order of their samples."""
    pieces: list[dict[str, Tensor]] = []
    for part in parts:
        blob = committed(context, part)
        if blob is None:
            raise DataError(
                f"part {part.number} is not in {context.store.uri} although it was generated: "
                f"something deletes from the store; delete {_commit(context, part)} too and run "
                "again"
            )
        pieces.append(tensors_from_bytes(context.store.get(blob)))
    whole = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    images = whole.pop("images")
    return Outcome(
        outputs={
            "samples.safetensors": tensors_to_bytes(whole),
            "images.safetensors": tensors_to_bytes({"images": images}),
            "trajectory.safetensors": tensors_to_bytes(trajectory(config, trained)),
        },
        values={
            "samples": config.samples,
            "images_kept": len(images),
            "mean_field_evaluations": float(whole["evaluations"].double().mean()),
            "median_gradient_norm": float(whole["gradient_norms"].double().median()),
        },
    )


def trajectory(config: GenerateConfig, trained: Model) -> dict[str, Tensor]:
    """Images along the descent of one sample a class: (T, K, C, H, W) uint8, and its updates."""
    classes = min(TRAJECTORIES, len(trained.spec.classes))
    shown = np.linspace(0, config.sampler.updates, config.trajectory_points).round().astype(int)
    wanted = set(shown.tolist())
    frames: list[Tensor] = []

    def look(update: int, latents: Tensor) -> None:
        if update in wanted:
            frames.append(trained.autoencoder.decode(latents.float()))

    labels = torch.arange(classes)
    descend(config, trained, labels, range(classes), on_update=look)
    return {"images": torch.stack(frames), "updates": torch.tensor(sorted(wanted))}


def main(argv: list[str]) -> int:
    """Run the stage program."""
    return stage_main(("samples",), program, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
