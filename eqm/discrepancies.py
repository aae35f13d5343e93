"""Where two results differ: values leaf by leaf, bytes at their first difference. Pure.

Called by recomputation, verification and flows.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from eqm.records import Json, canonical_bytes

Table = dict[Any, Any]

ABSENT = "(absent)"
CONTEXT_BYTES = 60
"""Bytes of a page that are shown before and after its first difference."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One place where what is sealed is not what it should be."""

    place: str
    """Dotted name of a value, or an address in the store."""
    sealed: Json
    """Nothing ("") beside what is told in words."""
    found: Json
    """What was computed, generated or rendered again; or what is wrong, in words."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was checked."""

    name: str
    text: str
    """How much of it, and how strictly."""
    differences: tuple[Difference, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing differs."""
        return not self.differences


def of_values(
    sealed: Json, again: Json, place: str = "", *, tolerance: float = 0.0
) -> list[Difference]:
    """Leaves of two JSON values that differ, each under its dotted name.

    Numbers with a fraction may differ by ``tolerance``, relative to the greater one or to 1; at 0,
    equal is what has the same JSON. Everything else must be equal.
    """
    # Equal text is equal JSON, and is seen at once; other text may only be in another order.
    if sealed == again and repr(sealed) == repr(again):
        return []
    if isinstance(sealed, dict) and isinstance(again, dict):
        left, right = cast("Table", sealed), cast("Table", again)
        dot = "." if place else ""
        return [
            found
            for name in sorted({*left, *right})
            for found in _of_entries(left, right, name, f"{place}{dot}{name}", tolerance)
        ]
    if isinstance(sealed, list) and isinstance(again, list):
        left, right = (dict(enumerate(cast("list[Any]", items))) for items in (sealed, again))
        return [
            found
            for i in sorted({*left, *right})
            for found in _of_entries(left, right, i, f"{place}[{i}]", tolerance)
        ]
    if _same(sealed, again) or _near(sealed, again, tolerance):
        return []
    return [Difference(place=place, sealed=sealed, found=again)]


def _of_entries(a: Table, b: Table, key: Any, place: str, tolerance: float) -> list[Difference]:
    if key not in a or key not in b:
        return [Difference(place=place, sealed=a.get(key, ABSENT), found=b.get(key, ABSENT))]
    return of_values(a[key], b[key], place, tolerance=tolerance)


def _same(a: Json, b: Json) -> bool:
    """Whether leaves have the same JSON: 1 is not 1.0, and 0.0 is not -0.0."""
    if type(a) is not type(b) or a != b:
        return False
    return not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b)


def _near(a: Json, b: Json, tolerance: float) -> bool:
    if not (tolerance and isinstance(a, float) and isinstance(b, float)):
        return False
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


def of_documents(sealed: bytes, again: bytes, place: str) -> list[Difference]:
    """Values of two JSON documents that differ; equal values in other bytes differ as well."""
    if sealed == again:
        return []
    try:
        found = of_values(json.loads(sealed), json.loads(again))
    except (ValueError, RecursionError) as error:
        return [Difference(place=place, sealed=f"no JSON ({error})", found="JSON")]
    return found or of_bytes(sealed, again, place)


def of_bytes(sealed: bytes, again: bytes, place: str) -> list[Difference]:
    """The first byte at which two texts differ, with what is around it."""
    if sealed == again:
        return []
    shorter = min(len(sealed), len(again))
    a, b = (np.frombuffer(data, dtype=np.uint8)[:shorter] for data in (sealed, again))
    at = int(next(iter(np.flatnonzero(a != b)), shorter))
    start = max(0, at - CONTEXT_BYTES)
    shown = [data[start : at + CONTEXT_BYTES].decode(errors="replace") for data in (sealed, again)]
    return [Difference(place=f"{place}, byte {at}", sealed=shown[0], found=shown[1])]


def apart(sealed: NDArray[Any], again: NDArray[Any]) -> float:
    """How far arrays are apart, in norms of the sealed one; infinite for other shapes or NaN."""
    if sealed.shape != again.shape:
        return math.inf
    a, b = (np.asarray(x, dtype=np.float64).ravel() for x in (sealed, again))
    distance, scale = float(np.linalg.norm(a - b)), float(np.linalg.norm(a))
    if math.isnan(distance):
        return math.inf
    return distance / scale if scale else (0.0 if distance == 0 else math.inf)


def told(differences: Sequence[Difference], most: int) -> list[str]:
    """Lines for people: the first ``most``, and how many more there are."""
    lines = [_line(one) for one in differences]
    more = len(lines) - most
    return lines[:most] + ([f"and {more} more"] if more > 0 else [])


def _line(one: Difference) -> str:
    if one.sealed == "" and isinstance(one.found, str):
        return f"{one.place}: {one.found}"
    return f"{one.place}: sealed {_shown(one.sealed)}, again {_shown(one.found)}"


def _shown(value: Json) -> str:
    text = value if isinstance(value, str) else canonical_bytes(value).decode()
    return text if len(text) <= 2 * CONTEXT_BYTES else text[: 2 * CONTEXT_BYTES] + "…"
