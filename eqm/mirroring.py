"""A training's log in MLflow: while it trains, and what MLflow has missed of one that is sealed.

Called by train and flows.
"""

from collections.abc import Mapping
from typing import Any

from eqm.config import Runtime
from eqm.events import EVENTS, EventLog, log_of
from eqm.records import Record
from eqm.registry import RunMirror
from eqm.storage import Store

CATCH_UP_SECONDS = 600.0
"""How long MLflow may take for what it has missed of a sealed run, while it answers."""


def mirror_of(
    runtime: Runtime, config: Mapping[str, Any], digest: str, log: EventLog, store: Store
) -> RunMirror | None:
    """What shows a log in MLflow, where MLflow is given."""
    if runtime.mlflow_uri is None:
        return None
    return RunMirror(
        runtime.mlflow_uri,
        experiment=runtime.mlflow_experiment,
        run_name=f"{runtime.run_name or 'train'}-{digest[:8]}",
        digest=digest,
        params={f"{s}.{k}": v for s, table in config.items() for k, v in table.items()},
        log=log,
        fetch=store.get,
    )


def send_missed(store: Store, record: Record, runtime: Runtime) -> None:
    """Send MLflow what it has missed of a run that is sealed; nothing where it has it all."""
    if EVENTS not in record.logs:
        return
    log = log_of(store.get(record.logs[EVENTS]), f"{EVENTS} of {record.digest[:12]}")
    mirror = mirror_of(runtime, record.config, record.digest, log, store)
    if mirror is not None:
        mirror.close("FINISHED", seconds=CATCH_UP_SECONDS)
