"""``eqm backup``, ``eqm restore``, ``eqm secrets``: what a home is kept and made again with.

What is copied, and in which order, is in infra.backup; here is how it is asked for.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from eqm.words import counted
from flows.options import check_file, check_given

if TYPE_CHECKING:
    from infra.backup import Home

out = Console()
err = Console(stderr=True)


def backup(
    to: Annotated[str, typer.Option(metavar="PLACE", help="Folder or s3://bucket/prefix.")],
    also: Annotated[
        list[str] | None,
        typer.Option(help="A further place to copy: artifacts of an MLflow elsewhere. Repeatable."),
    ] = None,
) -> None:
    """Copy the store and the databases to a place for back-ups; services go on running."""
    from flows.settings import activate
    from infra import backup as backups

    check_given("--to", to)
    target = backups.open_place(to)
    activate()
    address = backups.backup(_home(*(also or ())), target, report=_say)
    out.print(address, highlight=False, soft_wrap=True)


def restore(
    address: Annotated[str, typer.Argument(help="PLACE/backups/NAME, as `eqm backup` printed it.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every digest of the back-up, and restore none.")
    ] = False,
) -> None:
    """Put a back-up into a home that was never used; refuses to write over anything."""
    from flows.settings import activate, current_home, start_services
    from infra import backup as backups
    from infra.files import make_private_folder

    if verify:
        count = backups.verify(address)
        out.print(
            f"{address}: {counted(count, 'file')} as they were", highlight=False, soft_wrap=True
        )
        return
    place, manifest = backups.open_backup(address)
    make_private_folder(current_home())
    also = backups.further(manifest)
    backups.prepare(_home(*also), address, manifest)
    start_services(report=_say, services=("s3",))
    activate()
    home = _home(*also)
    backups.restore(home, place, manifest, report=_say)
    out.print(f"{home.root} is restored: start it with `eqm up`", highlight=False, soft_wrap=True)


def secrets(
    to: Annotated[Path, typer.Option(metavar="FILE", help="File to make, as infra/.env.")],
) -> None:
    """Make the passwords of a compose or Kubernetes installation, in a file of mode 0600."""
    from eqm.errors import ConfigError
    from infra.credentials import environment_file
    from infra.files import create_private

    check_file("--to", to)
    if not create_private(to, environment_file().encode()):
        raise ConfigError(f"--to is {to}, which exists: passwords that are in use are not replaced")
    out.print(f"{to} is made: keep it, and keep it out of Git", highlight=False, soft_wrap=True)


def _home(*also: str) -> "Home":
    from flows.settings import current_settings, given_from_outside
    from infra.backup import Home

    settings = current_settings()
    return Home(settings.home, settings.store, given_from_outside(), also)


def _say(line: str) -> None:
    err.print(line, highlight=False, soft_wrap=True)
