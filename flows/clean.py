"""Storage clean-up: what nothing names any more. Locally: ``eqm clean``; deployed: every month.

Wraps eqm.clean. The schedule only looks; deleting is asked for by people.
"""

import datetime
from typing import Any

from prefect import flow

from eqm import clean
from eqm.words import counted
from flows.plan import store_of
from flows.prefect_tools import logged, page, stage
from flows.settings import current_settings

CLEAN_SECONDS = 12 * 3600.0
MOST_SHOWN = 50


@flow(name="clean", timeout_seconds=CLEAN_SECONDS)
def clean_store(older_than: str = "30d", delete: bool = False) -> dict[str, Any]:
    """Find, and with ``delete`` delete, what nothing names any more and is older than an age."""
    return look(clean.seconds_of(older_than), delete)


@stage
def look(older_than_seconds: float, delete: bool) -> dict[str, Any]:
    """Survey the store, or sweep it, and show what and how much."""
    store, now = store_of(current_settings()), datetime.datetime.now(datetime.UTC)
    work = clean.sweep if delete else clean.survey
    found = work(store, older_than_seconds=older_than_seconds, now=now)
    verb = "deleted" if delete else "could be deleted"
    lines = [f"{counted(len(found.keys), 'object')} {verb} in {store.uri}", *found.lines()]
    for line in lines:
        logged(line)
    shown = "\n".join(f"* `{key}`" for key in found.keys[:MOST_SHOWN])
    page("eqm-clean", "\n\n".join([*lines, shown]), f"What {verb}")
    return {"objects": len(found.keys), "bytes": found.size_bytes, "deleted": delete}
