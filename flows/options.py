"""Arguments and options that several commands of ``eqm`` have."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigArgument = Annotated[
    str,
    typer.Argument(
        help="A preset (demo, tiny), one of `eqm recipes`, or a TOML file of what differs."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one setting: --set train.images=50000. Repeatable."),
]


def check_given(option: str, value: str | None) -> None:
    """Refuse an empty word: a variable of the shell that is not set. Raises ConfigError.

    As a path it would be the folder that one stands in.
    """
    from eqm.errors import ConfigError

    if value is not None and not value.strip():
        raise ConfigError(f"{option} is empty: name what is meant (is a variable not set?)")


def check_file(option: str, made: Path) -> None:
    """Refuse a file that cannot be written, before the work that it is for. Raises ConfigError."""
    from eqm.errors import ConfigError

    if made.is_dir():
        raise ConfigError(f"{option} is {made}, which is a folder: name a file, as {made / 'NAME'}")
    if made.is_symlink() and not made.exists():
        raise ConfigError(
            f"{option} is {made}, a link to {os.readlink(made)}, which is not there: name another "
            "file, or remove the link"
        )
    _check_folder(option, made)
    if not os.access(made if made.exists() else made.absolute().parent, os.W_OK):
        raise ConfigError(f"{option} is {made}, which this user may not write: name another file")


def check_new_folder(option: str, made: Path) -> None:
    """Refuse a folder to make that exists, or whose own folder does not. Raises ConfigError."""
    from eqm.errors import ConfigError

    if made.exists():
        raise ConfigError(f"{option} is {made}, which exists: name a directory that does not")
    _check_folder(option, made)


def _check_folder(option: str, made: Path) -> None:
    from eqm.errors import ConfigError

    folder = made.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{option} is {made}, but there is no folder {folder}: make it first")


def changes_of(settings: list[str] | None) -> dict[str, Any]:
    """``name=value`` of --set, values as JSON or bare words. Raises ConfigError."""
    from eqm.errors import ConfigError

    changes: dict[str, Any] = {}
    for item in settings or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item!r} must look like name=value")
        try:
            changes[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            # A bare word is a string, as in --set source.kind=folder.
            changes[name.strip()] = value
    return changes
