"""Keys of metrics, and names of inputs, that say which further extractor they belong to.

Samples are measured under a main extractor and, where a config has them, under further ones
(``[further.NAME]``). A metric of the main one has its kind for a name ("distance"), one of
another a short kind and that extractor's name ("fd_dinov2"). Pure.
"""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

PREFIXES = {
    "distance": "fd",
    "distance_endless": "fd_endless",
    "distance_held_out": "fd_held_out",
    "spatial_distance": "sfd",
    "kid": "kid",
    "score": "score",
    "precision": "precision",
    "recall": "recall",
}
"""Metric on features -> how its key begins under a further extractor."""
KINDS = {prefix: kind for kind, prefix in PREFIXES.items()}


def further_key(kind: str, extractor: str) -> str:
    """Key of a metric on features under a further extractor: ("distance", "dinov2") -> fd_dinov2.

    Neither kind nor name of the other extractors can make the same key: names of extractors have no
    underscores.
    """
    return f"{PREFIXES[kind]}_{extractor}"


def kind_of(key: str) -> tuple[str, str | None]:
    """Kind of a metric, and the further extractor that it is under; None for the main one."""
    prefix, _, extractor = key.rpartition("_")
    kind = KINDS.get(prefix)
    return (key, None) if kind is None or not extractor else (kind, extractor)


def further_input(stage: str, extractor: str) -> str:
    """Name of the input of a stage that belongs to a further extractor."""
    return f"{stage}-{extractor}"


def further_inputs(inputs: Mapping[str, T], stage: str) -> dict[str, T]:
    """Name of further extractor -> input of a stage, in the order of the names."""
    start = further_input(stage, "")
    return {
        name.removeprefix(start): inputs[name] for name in sorted(inputs) if name.startswith(start)
    }
