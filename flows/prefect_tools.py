"""The little that all flows share of Prefect.

A stage is a task without result cache, retry or stored result: whether it is done is a sealed
record's to say. Errors that a person can mend end a run with one line instead of a traceback.
"""

import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import MissingContextError

from eqm.errors import EqmError

P = ParamSpec("P")
R = TypeVar("R")


class OneLineErrors(logging.Filter):
    """Say an error that a person can mend once, in its own words, in the log of the flow run.

    Prefect would say it four times and with a traceback: for the task, for the flow, and as the
    state that each of them ends in.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is kept; the one that is kept is the error's message."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, EqmError):
            record.msg, record.args = str(error), ()
            record.exc_info = record.exc_text = None
            return record.name == "prefect.flow_runs"
        return not record.getMessage().startswith("Finished in state Failed(")


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(OneLineErrors())


def logged(line: str) -> None:
    """Say a line in the log of the flow run, or plainly outside of one."""
    try:
        get_run_logger().info(line)
    except MissingContextError:
        logging.getLogger("eqm.flows").info(line)


def stage(function: Callable[P, R]) -> Callable[P, R]:
    """Make a stage visible as a task of the flow run."""
    return task(function, cache_policy=NO_CACHE, persist_result=False, retries=0)  # type: ignore[return-value]


def link(key: str, address: str, text: str) -> None:
    """Link an address from the flow run's artifacts; nothing outside of a flow run."""
    from prefect.artifacts import create_link_artifact
    from prefect.context import FlowRunContext

    if FlowRunContext.get() is not None:
        create_link_artifact(link=address, link_text=text, key=key.lower(), description=text)


def markdown(key: str, text: str, description: str) -> None:
    """Show a page among the flow run's artifacts; nothing outside of a flow run."""
    from prefect.artifacts import create_markdown_artifact
    from prefect.context import FlowRunContext

    if FlowRunContext.get() is not None:
        create_markdown_artifact(markdown=text, key=key.lower(), description=description)
