"""How a command runs a flow: in this process, once its config is right and Prefect answers."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer
from rich.console import Console

from flows import settings

err = Console(stderr=True)


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
        return flow(config=config, changes=changes, **more)
    except KeyboardInterrupt:
        err.print("interrupted: the same command goes on where this one was", highlight=False)
        raise typer.Exit(130) from None
    except httpx.TransportError as error:
        # Of all that flows talk to, Prefect alone is asked by httpx; its client has waited by now.
        where = settings.current_settings().prefect_api_url or "its address before"
        raise ServiceError(
            f"Prefect at {where} went away while `{name}` ran ({error}): start it with `eqm up`; "
            "what is sealed is kept, and the same command goes on"
        ) from error
