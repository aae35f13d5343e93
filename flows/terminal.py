"""What a command prints: nothing of a table is cut away, and any terminal can show it."""

import io
import sys

from rich.console import Console
from rich.table import Column, Table

PIPE_COLUMNS = 10_000
"""A pipe has no edge: what reads it wants one line a row."""


def any_encoding() -> None:
    """Let output spell out, as in Python, what its encoding cannot write."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def table(*names: str, header: bool = True) -> Table:
    """A table without a frame, whose columns go on in the next line where they are too narrow."""
    columns = (Column(name, overflow="fold") for name in names)
    return Table(*columns, box=None, show_header=header)


def show(rows: Table, out: Console) -> None:
    """Print a table: as wide as the terminal, or as wide as it is where there is none."""
    if out.is_terminal:
        out.print(rows)
    else:
        Console(file=out.file, width=PIPE_COLUMNS, highlight=False).print(rows)
