"""How a command runs a flow: in this process, once its config is right and Prefect answers."""

import contextlib
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import typer
from rich.console import Console

from flows import settings

err = Console(stderr=True)


@contextlib.contextmanager
def interrupts_told() -> Iterator[None]:
    """Say what Ctrl-C leaves of the stages that run inside, and exit as shells expect."""
    try:
        yield
    except KeyboardInterrupt as error:
        from flows.launch import InterruptedTwiceError

        told = "interrupted: what is done is kept, and the same command goes on from there"
        if isinstance(error, InterruptedTwiceError):
            told = (
                "interrupted twice: it was ended at once. Stages that are done are kept, and the "
                "same command goes on with a training from its last checkpoint"
            )
        err.print(told, highlight=False)
        raise typer.Exit(130) from None


def run_flow(module: str, name: str, config: str, changes: dict[str, Any], /, **more: Any) -> Any:
    """Run a flow here, in this process, once its config is right and Prefect answers.

    ``more`` are its own arguments, of whatever name. Raises ConfigError, and ServiceError where
    Prefect does not answer or goes away.
    """
    import httpx

    from flows.plan import read_config
    from infra.stack import ServiceError

    read_config(config, changes)
    settings.activate()
    settings.check_prefect()
    flow: Callable[..., Any] = getattr(import_module(module), name)
    try:
        with interrupts_told():
            return flow(config=config, changes=changes, **more)
    except httpx.TransportError as error:
        # Of all that flows talk to, Prefect alone is asked by httpx; its client has waited by now.
        where = settings.current_settings().prefect_api_url or "its address before"
        raise ServiceError(
            f"Prefect at {where} went away while `{name}` ran ({error}): start it with `eqm up`; "
            "what is sealed is kept, and the same command goes on"
        ) from error
