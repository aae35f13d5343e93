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


class WithoutTraceback(logging.Filter):
    """Take the traceback off log lines about errors that a person can mend."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every line; change some."""
        if record.exc_info and isinstance(record.exc_info[1], EqmError):
            record.exc_info = None
            record.exc_text = None
        return True


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(WithoutTraceback())


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
