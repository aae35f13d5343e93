"""An evaluation once more: its numbers from sealed features, some of its samples from their seeds.

Numbers are equal to the last bit on the kind of machine that made them, elsewhere within ELSEWHERE.
Called by verification.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eqm import evaluate, generate, samples
from eqm.checkpoint import tensors_from_bytes
from eqm.config import ALGORITHMS, Job, Runtime, replace, stage_config
from eqm.discrepancies import Check, Difference, apart, of_values
from eqm.distributed import connect
from eqm.errors import DataError, IntegrityError, MissingError
from eqm.records import Blob, Json, Record, to_json
from eqm.stage import Context, provenance
from eqm.storage import Store

ROUNDING = 1e-11
"""What arrays may differ by, in norms, also on the kind of machine that made them: products and
decompositions in float64 round as their memory happens to lie."""
ELSEWHERE = 1e-3
"""What numbers may differ by, relatively, on another kind of machine than made them."""
PIXEL_LEVELS = 1.0
"""What samples made again in another batch may differ by, in the mean over their pixels."""
FEATURES_APART = 0.02
"""What their features may differ by, in norms of the sealed ones."""
KIND_OF_MACHINE = ("device", "machine", "cpu_capability", "blas", "threads")


@dataclass(frozen=True, kw_only=True)
class Again:
    """What the inputs of an evaluation give when all is done once more."""

    values: Mapping[str, Json]
    outputs: Mapping[str, bytes]
    """By name, as the record has them."""
    same_kind: bool
    """Whether this is the kind of machine on which it was sealed."""
    remade: tuple[Check, ...]
    """Samples made again."""


def compute_again(
    store: Store, record: Record, runtime: Runtime, *, seeds: int, exact: bool
) -> Again:
    """Measure what the record of an evaluation measured, and make some of its samples again.

    Raises DataError for a record that another version of the stage sealed, or whose images are not
    to be had; StoreError, IntegrityError.
    """
    if record.algorithm != ALGORITHMS["evaluation"]:
        revision = record.provenance.get("git_revision") or "unknown"
        raise DataError(
            f"evaluation {record.digest[:12]} was sealed by algorithm {record.algorithm}, this is "
            f"number {ALGORITHMS['evaluation']}: verify it with the revision that sealed it "
            f"({revision})"
        )
    threads = record.provenance.get("threads")
    job = Job(
        stage="evaluation",
        config=record.config,
        inputs=record.inputs,
        runtime=replace(runtime, store=store.uri, threads=runtime.threads or threads),
    )
    config = stage_config("evaluation", record.config)
    some = [seeds] if seeds else []
    with connect(runtime.device, threads=job.runtime.threads) as world:
        context = Context(job=job, config=config, store=store, world=world)
        outcome = evaluate.program(context)
        here = provenance(world, "")
        made_from = context.input("samples")
        remade = [check_samples(store, made_from, n, str(world.device), exact=exact) for n in some]
    if outcome is None:
        raise DataError("a report is verified by one process: start it without torchrun")
    return Again(
        values=to_json(dict(outcome.values)),
        outputs={name: _read(store, data) for name, data in outcome.outputs.items()},
        same_kind=is_same_kind(record.provenance, here),
        remade=tuple(remade),
    )


def _read(store: Store, data: bytes | Path | Blob) -> bytes:
    if isinstance(data, Blob):
        return store.get(data)
    return data.read_bytes() if isinstance(data, Path) else data


def is_same_kind(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether results made there and here are equal to the last bit (provenance of a record).

    Records of before the library that multiplies was written down are taken to have this one's.
    """
    then = {"blas": now.get("blas"), **then}
    kinds = [
        [where.get(key) for key in KIND_OF_MACHINE]
        + [where.get("versions", {}).get(name) for name in ("torch", "numpy")]
        for where in (then, now)
    ]
    return kinds[0] == kinds[1]


def check_numbers(store: Store, record: Record, again: Again) -> Check:
    """Every value and every output of an evaluation against what its inputs give."""
    tolerance = 0.0 if again.same_kind else ELSEWHERE
    wrong = of_values(record.values, again.values, tolerance=tolerance)
    for name in sorted({*record.outputs, *again.outputs}):
        data, blob = again.outputs.get(name), record.outputs.get(name)
        if blob is None or data is None:
            there = "absent" if data is None else "there"
            wrong.append(Difference(place=f"outputs.{name}", sealed=to_json(blob), found=there))
        elif blob != Blob.of(data):
            within = ROUNDING if again.same_kind else ELSEWHERE
            wrong += _of_arrays(store, blob, data, f"outputs.{name}", within)
    strictness = (
        f"to the last bit, and arrays within {ROUNDING:g}"
        if again.same_kind
        else f"within {ELSEWHERE:g}, for this is another kind of machine"
    )
    text = f"{len(list(_leaves(again.values)))} values, computed again: equal {strictness}"
    return Check(name="numbers", text=text, differences=tuple(wrong))


def _of_arrays(
    store: Store, blob: Blob, data: bytes, place: str, tolerance: float
) -> list[Difference]:
    try:
        sealed, made = tensors_from_bytes(store.get(blob)), tensors_from_bytes(data)
    except (IntegrityError, MissingError) as error:
        return [Difference(place=place, sealed=blob.sha256, found=str(error))]
    found = of_values(sorted(sealed), sorted(made), place)
    rounded = False
    for name in sorted({*sealed, *made}) if not found else []:
        far = apart(sealed[name].numpy(), made[name].numpy())
        rounded = rounded or far > 0
        if far > tolerance:
            text = f"{far:.3g} of its norm away"
            found.append(Difference(place=f"{place}: {name}", sealed="", found=text))
    # Equal tensors in other bytes were not written by this program.
    return found or ([] if rounded else of_values(to_json(blob), to_json(Blob.of(data)), place))


def _leaves(value: Json) -> list[Json]:
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


# -- samples ------------------------------------------------------------------------------------


def check_samples(store: Store, record: Record, count: int, device: str, *, exact: bool) -> Check:
    """Samples of some seeds, spread over all, made again and held against the sealed ones."""
    config = samples.config_of(record)
    spread = np.linspace(0, config.samples - 1, min(count, config.samples)).round().astype(int)
    seeds = [config.first_seed + int(i) for i in sorted(set(spread.tolist()))]
    made = generate.remake(store, record, seeds, device=device, exact=exact)
    wrong: list[Difference] = []
    for row, seed in enumerate(seeds):
        sealed = samples.kept(store, record, [seed])
        for name, values in sealed.items():
            wrong += _against(f"seed {seed}: {name}", values[0], made[name][row], exact=exact)
    strictness = (
        "to the last bit"
        if exact
        else f"images within {PIXEL_LEVELS:g} level, features within {FEATURES_APART:.0%}"
    )
    text = f"seeds {', '.join(map(str, seeds))}, made again: equal {strictness}"
    return Check(name="samples", text=text, differences=tuple(wrong))


def _against(
    place: str, sealed: torch.Tensor, made: torch.Tensor, *, exact: bool
) -> list[Difference]:
    """One quantity of one sample."""
    if sealed.shape == made.shape and torch.equal(sealed, made):
        return []
    if exact or sealed.dtype == torch.int64:
        return [Difference(place=place, sealed=_short(sealed), found=_short(made))]
    if sealed.dtype == torch.uint8:
        levels = float((sealed.double() - made.double()).abs().mean())
        text = f"{levels:.3g} levels away in the mean"
        return [] if levels <= PIXEL_LEVELS else [Difference(place=place, sealed="", found=text)]
    # A number alone (what a descent cost, the norm where it ended) turns on one step of many.
    far = apart(sealed.numpy(), made.numpy()) if sealed.ndim else 0.0
    text = f"{far:.3g} of its norm away"
    return [] if far <= FEATURES_APART else [Difference(place=place, sealed="", found=text)]


def _short(values: torch.Tensor) -> Json:
    return values.flatten()[:4].tolist()
