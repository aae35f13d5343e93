"""What a run that nobody watches waits for, and what it never tries again."""

import ast
import datetime
import inspect
import signal
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prefect.exceptions import TerminationSignal
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import Failed

from eqm.errors import ConfigError, DataError, MissingError, StoreError, TrackingError
from flows import clean, evaluate, prefect_tools, study, weekly
from flows.encode import open_plan
from infra.deployments import PrefectApi


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (StoreError("S3 does not answer"), True),
        (TrackingError("MLflow does not answer"), True),
        (MissingError("it is not there"), False),
        (DataError("your images"), False),
        (ConfigError("your config"), False),
        (RuntimeError("a defect"), False),
    ],
)
def test_only_a_service_that_is_away_is_waited_for(
    error: Exception, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    condition = open_plan.retry_condition_fn  # type: ignore[attr-defined]
    assert not condition(None, None, Failed(data=error)), "whoever watches is told at once"
    monkeypatch.setattr(prefect_tools, "is_deployed", lambda: True)
    assert condition(None, None, Failed(data=error)) == waits


@pytest.mark.services
@pytest.mark.timeout(200)
def test_a_run_that_is_cancelled_and_one_whose_worker_goes_are_told_apart(
    all_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    api = PrefectApi(all_environment["PREFECT_API_URL"], all_environment)
    [found] = [
        one["id"] for one in api._post("/deployments/filter", {}) if one["name"] == "promote"
    ]
    far = {"scheduled_time": "2099-01-01T00:00:00+00:00"}
    asked = {"state": {"type": "SCHEDULED", "state_details": far}}
    run = api._post(f"/deployments/{found}/create_flow_run", asked)["id"]
    monkeypatch.setattr(prefect_tools, "is_deployed", lambda: True)
    monkeypatch.setattr(prefect_tools, "flow_run", SimpleNamespace(id=run))
    settings = {
        PREFECT_API_URL: all_environment["PREFECT_API_URL"],
        PREFECT_API_AUTH_STRING: all_environment["PREFECT_API_AUTH_STRING"],
    }
    end = TerminationSignal(signal.SIGTERM)
    with temporary_settings(settings):
        api.set_state(run, kind="RUNNING", name="Running", message="")
        assert prefect_tools.is_moved(end)
        assert not prefect_tools.is_moved(KeyboardInterrupt())
        api.set_state(run, kind="CANCELLING", name="Cancelling", message="")
        assert not prefect_tools.is_moved(end)
    monkeypatch.setattr(prefect_tools, "is_deployed", lambda: False)
    assert not prefect_tools.is_moved(end), "whoever started it by hand is ending it"


def test_a_day_is_that_on_which_a_run_was_due(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prefect_tools.day_due() == datetime.datetime.now(datetime.UTC).date()
    monkeypatch.setattr(prefect_tools, "is_deployed", lambda: True)
    east = datetime.timezone(datetime.timedelta(hours=2))
    due = datetime.datetime(2026, 3, 3, 1, 30, tzinfo=east)
    monkeypatch.setattr(prefect_tools, "flow_run", SimpleNamespace(scheduled_start_time=due))
    assert prefect_tools.day_due() == datetime.date(2026, 3, 2)


DATED = [weekly.weekly, evaluate.reevaluate_champion]


@pytest.mark.parametrize("as_of", ["2026-13-40", "2026-3-2", "20260302", "yesterday"])
@pytest.mark.parametrize("entry", DATED, ids=lambda one: one.name)
def test_a_day_that_is_none_is_refused_in_words(entry: Any, as_of: str) -> None:
    with pytest.raises(ConfigError, match=f"as_of is '{as_of}'; it must be a day, as 2026-01-31"):
        entry.fn("tiny", as_of=as_of)


DEPLOYED = yaml.safe_load((Path(__file__).parents[2] / "prefect.yaml").read_text())["deployments"]


@pytest.mark.parametrize("deployed", DEPLOYED, ids=lambda one: one["name"])
def test_every_deployment_ends_some_time_has_a_limit_and_schedules_in_utc(
    deployed: dict[str, Any],
) -> None:
    module, _, name = deployed["entrypoint"].partition(":")
    found = getattr(import_module(module.removesuffix(".py").replace("/", ".")), name)
    assert found.timeout_seconds >= 3600
    limit = deployed["concurrency_limit"]
    assert (limit["limit"], limit["collision_strategy"]) == (
        16 if deployed["name"] == "encode-range" else 1,
        "ENQUEUE",
    ), "one that is due meanwhile waits"
    assert found.retries == 0, "what may be tried again is tried by its stages"
    assert set(deployed.get("parameters", {})) <= set(found.parameters.properties)
    assert all(one["timezone"] == "UTC" for one in deployed.get("schedules", []))


SCHEDULED = (weekly.weekly, evaluate.reevaluate_champion, clean.clean_store, study.study)


@pytest.mark.parametrize("flow", SCHEDULED, ids=lambda flow: flow.name)
def test_what_a_scheduled_run_asks_of_the_store_it_asks_in_stages(flow: Any) -> None:
    """For a stage waits for a store that is away; what stands in the flow itself ends the run."""
    assert list(asked_of_the_store(flow.fn)) == []


def asked_of_the_store(function: Any) -> Iterator[str]:
    """Calls on the store, or that are given it, in a function of flows and those that it calls."""
    for call in ast.walk(ast.parse(inspect.getsource(function))):
        if not isinstance(call, ast.Call):
            continue
        name, given = ast.unparse(call.func), [ast.unparse(one) for one in call.args]
        asks = name.startswith("plan.store.") and name != "plan.store.where"
        called = function.__globals__.get(name)
        if asks or "plan.store" in given:
            yield f"{function.__name__}: {ast.unparse(call)}"
        elif inspect.isfunction(called) and called.__module__.startswith("flows."):
            yield from asked_of_the_store(called)


FIRES = {
    # Minute, hour, day of the month, month, day of the week; and days until it fires again.
    "weekly": ("0 3 * * 1", 7.0),
    "reevaluate-champion": ("30 1 * * *", 1.0),
    "clean": ("0 6 1 * *", 28.0),
    # After 28 to 31, and one at a time: in February a month's study may have to wait.
    "study": ("0 7 2 * *", 31.0),
}
"""As docs/operating.md says."""


@pytest.mark.parametrize("deployed", DEPLOYED, ids=lambda one: one["name"])
def test_what_fires_when_and_ends_before_it_fires_again(deployed: dict[str, Any]) -> None:
    schedules = deployed.get("schedules", [])
    assert (len(schedules) == 1) == (deployed["name"] in FIRES)
    if not schedules:
        return
    cron, days = FIRES[deployed["name"]]
    assert schedules[0]["cron"] == cron
    # Nobody pays for a study that nobody turned on.
    assert schedules[0].get("active", True) == (deployed["name"] != "study")
    module, _, name = deployed["entrypoint"].partition(":")
    found = getattr(import_module(module.removesuffix(".py").replace("/", ".")), name)
    assert found.timeout_seconds <= days * 24 * 3600
    # By itself nothing deletes.
    assert not deployed["parameters"].get("delete", False)


def test_a_service_may_be_away_for_so_long() -> None:
    assert round(sum(prefect_tools.AWAY_SECONDS) / 60) == 19
    assert open_plan.retries == len(prefect_tools.AWAY_SECONDS)  # type: ignore[attr-defined]
