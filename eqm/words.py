"""Numbers in sentences for people. Pure."""


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number and what it counts: "1 move", "1,797 moves"; ``many`` where it is not ``one``s."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"
