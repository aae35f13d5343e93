"""The little that all flows share of Prefect.

A stage is a task without result cache or stored result: whether it is done is a sealed record's to
say, so it may be run again at any time. It is where the store or MLflow is away for a while and
nobody is there to see to it: in a run of a deployment. Errors that a person can mend end a run with
one line instead of a traceback.
"""

import datetime
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

from prefect import get_client, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import MissingContextError, TerminationSignal
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelling

from eqm.config.checks import is_day
from eqm.errors import EqmError, MissingError, StoreError, TrackingError, require

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


AWAY_SECONDS = [5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0]
"""How long a run of a deployment waits, in turn, for a service that is away: 19 minutes in all."""


MONTH_SECONDS = 31 * 24 * 3600.0
"""A run that somebody asked for and that does not end is ended then: six times what the longest
recipe takes on eight H100. What it has trained by then is not lost."""


def stage(function: Callable[P, R]) -> Callable[P, R]:
    """Make a stage visible as a task of the flow run."""
    return task(  # type: ignore[return-value]
        function,  # type: ignore[arg-type]
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=len(AWAY_SECONDS),
        retry_delay_seconds=AWAY_SECONDS,
        retry_condition_fn=_is_worth_waiting,
    )


def _is_worth_waiting(_task: Any, _run: Any, state: Any) -> bool:
    """Whether a service is away that may come back, in a run that nobody watches."""
    error = state.data
    away = isinstance(error, StoreError | TrackingError) and not isinstance(error, MissingError)
    return away and is_deployed()


def is_deployed() -> bool:
    """Whether this is a run of a deployment, which nobody need be watching."""
    return deployment.id is not None


def day_due() -> datetime.date:
    """Day (UTC) on which this run was due, which may be before the one on which it is run."""
    due = flow_run.scheduled_start_time if is_deployed() else None
    return (due or datetime.datetime.now(datetime.UTC)).astimezone(datetime.UTC).date()


def day_asked(as_of: str | None) -> datetime.date:
    """The day that a run is asked for (YYYY-MM-DD), else ``day_due``. Raises ConfigError."""
    if not as_of:
        return day_due()
    require(is_day(as_of), "as_of", as_of, "a day, as 2026-01-31")
    return datetime.date.fromisoformat(as_of)


def run_id() -> UUID | None:
    """Id of the flow run that this is; None outside of one."""
    return UUID(flow_run.id) if flow_run.id else None


def is_moved(error: BaseException) -> bool:
    """Whether this process of a deployment's run is told to end, and the run itself is not.

    A worker that is replaced, or whose node is drained, tells its runs by SIGTERM, and they are
    started again. One that is cancelled is told the same way; its state says which. Of a server
    that does not answer, the run goes on.
    """
    if not isinstance(error, TerminationSignal) or not is_deployed():
        return False
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(flow_run.id)).state
    except Exception as unanswered:
        logged(f"warning: Prefect does not say whether this run was cancelled ({unanswered})")
        return True
    return state is None or state.type.value not in ("CANCELLING", "CANCELLED")


UNFINISHED = ("SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING")


def unfinished_children(parent: UUID | None) -> list[FlowRun]:
    """Runs that a run asked for, and that have not ended; none outside of a flow run."""
    if parent is None:
        return []
    asked = {"parent_flow_run_id": {"any_": [parent]}, "state": {"type": {"any_": UNFINISHED}}}
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(asked))


def cancel_children(parent: UUID | None) -> None:
    """Cancel what a run asked for and what has not ended; it ends a little later."""
    with get_client(sync_client=True) as client:
        for child in unfinished_children(parent):
            if child.state is None or child.state.type.value != "CANCELLING":
                logged(f"run {child.name} ({child.id}) is cancelled with the run that asked for it")
                client.set_flow_run_state(child.id, Cancelling(message="Its parent has ended."))


def page(key: str, markdown: str, text: str) -> None:
    """Show a text among the flow run's artifacts; nothing outside of a flow run."""
    from prefect.artifacts import create_markdown_artifact
    from prefect.context import FlowRunContext

    if FlowRunContext.get() is not None:
        create_markdown_artifact(markdown=markdown, key=key.lower(), description=text)


def tell(event: str, model: str, payload: dict[str, Any]) -> None:
    """Emit an event about a model, for automations (infra.alarms has the names)."""
    from prefect.events import emit_event

    resource = {"prefect.resource.id": f"eqm.model.{model}", "prefect.resource.name": model}
    emit_event(event=event, resource=resource, payload=payload)


def link(key: str, address: str, text: str) -> None:
    """Link an address from the flow run's artifacts; nothing outside of a flow run."""
    from prefect.artifacts import create_link_artifact
    from prefect.context import FlowRunContext

    if FlowRunContext.get() is not None:
        create_link_artifact(link=address, link_text=text, key=key.lower(), description=text)
