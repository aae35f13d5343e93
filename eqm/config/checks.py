"""What the fields of a config are held against when it is built."""

import datetime
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

from eqm.errors import require


def known(config: Any, section: str) -> None:
    """Refuse what is none of a field's choices, or no number: Python itself would let it pass."""
    kind: type[Any] = config.__class__
    for name, hint in get_type_hints(kind).items():
        place, value = f"{section}.{name}", getattr(config, name)
        if get_origin(hint) is Literal:
            choices = get_args(hint)
            require(value in choices, place, value, f"one of {choices}")
        elif hint in (int, int | None):
            ok = (value is None and hint is not int) or is_number(value, int)
            require(ok, place, value, "a whole number")
        elif hint in (float, float | None):
            ok = (value is None and hint is not float) or is_number(value, (int, float))
            require(ok, place, value, "a number")


def is_number(value: object, kinds: type | tuple[type, ...]) -> bool:
    """Whether it is one, and True and False are none."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def positive(config: Any, section: str, *names: str) -> None:
    """Refuse fields that are not greater than 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name}", value, "greater than 0")


def fraction(config: Any, section: str, *names: str) -> None:
    """Refuse fields that are no share, 1 itself among them."""
    for name in names:
        value = getattr(config, name)
        require(0 <= value < 1, f"{section}.{name}", value, "at least 0 and less than 1")


def is_day(text: str) -> bool:
    """Whether it is a date as 2026-01-31."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def is_sha256(text: str) -> bool:
    """Whether it is a digest in hexadecimal digits."""
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)


def is_plain_name(text: str) -> bool:
    """Whether it is of lower-case letters, digits and dashes, and short."""
    return bool(re.fullmatch("[a-z0-9]([a-z0-9-]{0,39})", text))


LARGEST_SAMPLE_SEED = 2**43 - 1
"""The noise of an update is numbered by its sample and, in 20 bits more, itself (eqm.rules)."""


def seed_in_range(config: Any, section: str, name: str = "seed") -> None:
    """Refuse a seed that generators do not take."""
    value = getattr(config, name)
    require(0 <= value < 2**63, f"{section}.{name}", value, "from 0 to 2**63 - 1")
