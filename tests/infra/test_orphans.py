"""Runs whose process is gone, in a real Prefect; what they run are programs that only sleep."""

import datetime
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from infra.deployments import PrefectApi
from infra.orphans import GONE_SECONDS, MOST_STARTS, Orphans, living_runs
from infra.stack import POOL

pytestmark = [pytest.mark.services, pytest.mark.timeout(200)]

WORKER = f"eqm-test-{uuid.uuid4().hex[:8]}"
LATER = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
"""As if the worker had been started after all that the tests make."""
EARLIER = LATER - datetime.timedelta(days=1)


@pytest.fixture
def api(all_environment: dict[str, str]) -> Iterator[PrefectApi]:
    """Of a pool that is paused: the worker of the session would begin with what is due again."""
    api = PrefectApi(all_environment["PREFECT_API_URL"], all_environment)
    api._send("PATCH", f"/work_pools/{POOL}", {"is_paused": True})
    yield api
    api._send("PATCH", f"/work_pools/{POOL}", {"is_paused": False})


@pytest.fixture
def orphans(api: PrefectApi) -> Orphans:
    return Orphans(api, WORKER, say=lambda _: None)


@pytest.fixture
def process() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Start a process of a run."""
    begun: list[subprocess.Popen[bytes]] = []

    def start(run: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PREFECT__FLOW_RUN_ID": run}
        line = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(300)"]
        begun.append(subprocess.Popen(line, env=environment, stdout=subprocess.PIPE))
        assert begun[-1].stdout is not None
        begun[-1].stdout.readline()
        return begun[-1]

    yield start
    for one in begun:
        one.kill()
        one.wait()


def taken(api: PrefectApi, state: str, *, worker: str | None = WORKER, starts: int = 1) -> str:
    """A run that a worker took; its id."""
    found = api._post("/deployments/filter", {"limit": 200})
    which = next(one for one in found if one["name"] == "promote")
    body: dict[str, Any] = {"state": {"type": "SCHEDULED"}, "work_queue_name": None}
    # Far away, so that the worker of the session does not begin with it.
    far = (LATER + datetime.timedelta(days=300)).isoformat()
    body["state"]["state_details"] = {"scheduled_time": far}
    run = api._post(f"/deployments/{which['id']}/create_flow_run", body)["id"]
    if worker is not None:
        api._send("PATCH", f"/flow_runs/{run}/labels", {"prefect.worker.name": worker})
    for _ in range(starts):
        api.set_state(run, kind="RUNNING", name="Running", message="")
        if state != "RUNNING":
            api.set_state(run, kind=state, name=state.title(), message="")
    return run


def shown(api: PrefectApi, run: str) -> tuple[str, str]:
    found = api._send("GET", f"/flow_runs/{run}", None)
    return found["state"]["type"], found["state"]["name"]


def finish(api: PrefectApi, *runs: str) -> None:
    for run in runs:
        api.set_state(run, kind="CANCELLED", name="Cancelled", message="")


def test_what_lost_its_process_is_started_again(
    api: PrefectApi, orphans: Orphans, process: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    running, pending, ending = (taken(api, s) for s in ("RUNNING", "PENDING", "CANCELLING"))
    unnamed = taken(api, "PENDING", worker=None)
    crashed, elsewhere = taken(api, "CRASHED"), taken(api, "RUNNING", worker="another-machine")
    living = taken(api, "RUNNING")
    program = process(living)
    assert living in set(living_runs())
    orphans.look(worker_since=LATER)
    again = {run: shown(api, run) for run in (running, pending, unnamed, crashed)}
    finish(api, running, pending, unnamed, crashed)
    assert set(again.values()) == {("SCHEDULED", "AwaitingRetry")}
    assert shown(api, ending) == ("CANCELLED", "Cancelled")
    assert shown(api, elsewhere) == ("RUNNING", "Running")
    assert shown(api, living) == ("RUNNING", "Running")
    # Its stage program, say: the flow itself need not live.
    program.kill()
    program.wait()
    orphans.look(worker_since=LATER)
    assert shown(api, living) == ("SCHEDULED", "AwaitingRetry")
    finish(api, living, elsewhere)


def test_what_may_only_be_slow_is_waited_for(
    api: PrefectApi, orphans: Orphans, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, pending = taken(api, "RUNNING"), taken(api, "PENDING")
    orphans.look(worker_since=EARLIER)
    assert shown(api, running) == ("RUNNING", "Running")
    now = time.monotonic()
    monkeypatch.setattr("infra.orphans.time.monotonic", lambda: now + GONE_SECONDS + 1)
    orphans.look(worker_since=EARLIER)
    assert shown(api, running) == ("SCHEDULED", "AwaitingRetry")
    assert shown(api, pending) == ("PENDING", "Pending")
    finish(api, running, pending)


def test_a_run_that_loses_its_process_every_time_is_left_to_people(
    api: PrefectApi, orphans: Orphans
) -> None:
    run = taken(api, "RUNNING", starts=MOST_STARTS)
    orphans.look(worker_since=LATER)
    assert shown(api, run) == ("CRASHED", "Crashed")
    orphans.look(worker_since=LATER)
    assert shown(api, run) == ("CRASHED", "Crashed")


def test_a_slot_is_free_again(api: PrefectApi, orphans: Orphans) -> None:
    """The run of a deployment with a limit, taken as a worker does it, by rule and not by force."""
    found = api._post("/deployments/filter", {"limit": 200})
    which = next(one for one in found if one["name"] == "clean")
    far = {"scheduled_time": (LATER + datetime.timedelta(days=300)).isoformat()}
    body = {"state": {"type": "SCHEDULED", "state_details": far}}
    run = api._post(f"/deployments/{which['id']}/create_flow_run", body)["id"]
    api._send("PATCH", f"/flow_runs/{run}/labels", {"prefect.worker.name": WORKER})
    api._post(f"/flow_runs/{run}/set_state", {"state": {"type": "PENDING", "name": "Pending"}})
    limit = which["global_concurrency_limit"]["id"]
    assert api._send("GET", f"/v2/concurrency_limits/{limit}", None)["active_slots"] == 1
    orphans.look(worker_since=LATER)
    free = api._send("GET", f"/v2/concurrency_limits/{limit}", None)["active_slots"]
    finish(api, run)
    assert free == 0


def test_what_a_lost_run_asked_for_is_cancelled(api: PrefectApi, orphans: Orphans) -> None:
    parent, other = taken(api, "RUNNING"), taken(api, "RUNNING", worker="another-machine")
    mine, begun, theirs = (child(api, run) for run in (parent, parent, other))
    api.set_state(begun, kind="RUNNING", name="Running", message="")
    orphans.look(worker_since=LATER)
    found = [shown(api, run) for run in (mine, begun, theirs)]
    finish(api, parent, other, mine, begun, theirs)
    assert found == [
        ("CANCELLED", "Cancelled"),
        ("CANCELLING", "Cancelling"),
        ("SCHEDULED", "Scheduled"),
    ]


def child(api: PrefectApi, parent: str) -> str:
    """A run that another asked for, as `run_deployment` makes it; its id."""
    task = {"flow_run_id": parent, "task_key": "asks", "dynamic_key": uuid.uuid4().hex}
    asked = api._post("/task_runs/", task)["id"]
    found = api._post("/deployments/filter", {"limit": 200})
    which = next(one for one in found if one["name"] == "encode-range")
    far = {"scheduled_time": (LATER + datetime.timedelta(days=300)).isoformat()}
    body = {
        "state": {"type": "SCHEDULED", "state_details": far},
        "parent_task_run_id": asked,
        "enforce_parameter_schema": False,
    }
    return api._post(f"/deployments/{which['id']}/create_flow_run", body)["id"]
