"""Arguments and options that several commands of ``eqm`` have."""

from typing import Annotated

import typer

ConfigArgument = Annotated[
    str, typer.Argument(help="A preset (demo, tiny) or a TOML file with what differs from it.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one setting: --set train.images=50000. Repeatable."),
]
