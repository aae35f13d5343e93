"""What programs before this one have kept is read by this one, and would be written alike.

Every small thing that lies in a store for longer than a process lives has bytes here, as they were
written once. Whoever gives one of them a new field reads about ``eqm.records.LATER`` first; a new
kind of thing is added with ``PYTHONPATH=tests python tests/test_kept.py``, which changes no other.
"""

import dataclasses
import json
import typing
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from eqm import champion, checkpoint, encode, generate, lease, reference, serving, stage
from eqm.events import Event
from eqm.records import LATER, note_from_bytes, note_to_bytes
from flows import study
from infra import backup

GOLDEN = Path(__file__).parent / "golden" / "kept.json"
KINDS: tuple[type[Any], ...] = (
    *(checkpoint.Commit, checkpoint.Commit1, checkpoint.SnapshotCommit, lease.Lease),
    *(champion.Entry, champion.EntryOne, encode.Shard, generate.Committed, reference.Made),
    *(serving.Pointer, stage.Divergence, study.StudyOf, backup.Manifest, Event),
)


def example(hint: Any, name: str = "") -> Any:
    """A value of a type, always the same, with all that it may hold."""
    origin, inside = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        there = [f for f in dataclasses.fields(hint) if f.init and not f.metadata.get(LATER)]
        return hint(**{f.name: example(hints[f.name], f.name) for f in there})  # type: ignore[misc]
    if origin is Literal:
        return inside[0]
    if origin in (UnionType, typing.Union):
        return example(next(one for one in inside if one is not NoneType), name)
    if origin in (tuple, list):
        length = (example(inside[0], name),) * 2
        return (
            origin(length)
            if Ellipsis in inside or origin is list
            else origin(example(one, name) for one in inside)
        )
    if origin is not None:
        return {"one": example(inside[1], name)}
    return {bool: True, int: 7, float: 0.25, str: "ab" * 32 if name == "sha256" else name}.get(
        hint, {"any": [1]}
    )


def name_of(kind: type[Any]) -> str:
    return f"{kind.__module__}.{kind.__name__}"


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_what_was_kept_is_read_and_would_be_written_alike(kind: type[Any]) -> None:
    kept, made = json.loads(GOLDEN.read_text())[name_of(kind)].encode(), example(kind)
    assert note_from_bytes(kind, kept, "there") == made
    assert note_to_bytes(made) == kept


if __name__ == "__main__":
    before = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    now = {name_of(kind): note_to_bytes(example(kind)).decode() for kind in KINDS}
    GOLDEN.write_text(json.dumps({**now, **before}, indent=1, sort_keys=True) + "\n")
