"""Arguments and options that several commands of ``eqm`` have."""

from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[
    str, typer.Argument(help="A preset (demo, tiny) or a TOML file with what differs from it.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one setting: --set train.images=50000. Repeatable."),
]


def check_folder(option: str, file: Path) -> None:
    """Refuse a file to write whose folder is not there, before it is made. Raises ConfigError."""
    from eqm.errors import ConfigError

    folder = file.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{option} is {file}, but there is no folder {folder}")
