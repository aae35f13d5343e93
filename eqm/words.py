"""Numbers in sentences for people. Pure."""

from collections.abc import Sequence


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number and what it counts: "1 move", "1,797 moves"; ``many`` where it is not ``one``s."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def first_of(things: Sequence[str], most: int) -> str:
    """At most so many of things, and how many more there are: "a; b; and 3 more"."""
    more = len(things) - most
    return "; ".join([*things[:most], *([f"and {more:,} more"] if more > 0 else [])])
