"""Who is told: addresses that are refused, and a real Prefect that posts to a server of ours."""

import datetime
import json
import queue
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from infra.alarms import ALARMS, PRIVATE, WEBHOOK, Target, alarms_digest, register, target_of
from infra.deployments import PrefectApi
from infra.stack import JOBS_POOL, ServiceError


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://127.0.0.1/hook", "which is 127.0.0.1: an address of this machine"),
        ("https://localhost/hook", "an address of this machine or of a private network"),
        ("https://169.254.169.254/latest/meta-data", "169.254.169.254"),
        ("https://[fe80::1]/hook", "fe80::1"),
        ("https://[::ffff:10.0.0.1]/hook", "10.0.0.1"),
        ("https://192.168.1.5:8443/hook", "private network"),
        ("https://100.64.0.1/hook", "private network"),
        ("https://0.0.0.0/hook", "0.0.0.0"),
        ("http://8.8.8.8/hook", "no https:// address"),
        ("file:///etc/passwd", "no https:// address"),
        ("https:///hook", "names no host"),
        ("https://no-such-host.invalid/hook", "is not found"),
    ],
)
def test_an_address_that_is_not_public_is_refused(url: str, why: str) -> None:
    with pytest.raises(ServiceError, match=WEBHOOK) as told:
        target_of({WEBHOOK: url})
    assert why in str(told.value)
    assert "/hook" not in str(told.value), "the path is a secret"


def test_a_private_one_is_asked_where_that_is_said() -> None:
    assert target_of({}) is None
    target = target_of({WEBHOOK: "http://10.0.0.1/T0/secret", PRIVATE: "allow"})
    assert target == Target("http://10.0.0.1/T0/secret", private=True)
    assert "secret" not in repr(target)
    assert target_of({WEBHOOK: "https://8.8.8.8/hook"}) == Target("https://8.8.8.8/hook", False)
    with pytest.raises(ServiceError, match="it must be allow"):
        target_of({PRIVATE: "yes"})


def test_another_address_is_another_digest() -> None:
    digests = [alarms_digest({}), alarms_digest({WEBHOOK: "a"}), alarms_digest({WEBHOOK: "b"})]
    assert len(set(digests)) == 3


class Hook(BaseHTTPRequestHandler):
    """Keeps what is posted."""

    posted: "queue.Queue[tuple[str, bytes]]" = queue.Queue()

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.posted.put((self.path, self.rfile.read(length)))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/T0/secret"
    server.shutdown()
    server.server_close()


@pytest.mark.services
@pytest.mark.timeout(200)
def test_a_drift_and_a_failure_are_posted(all_environment: dict[str, str], hook: str) -> None:
    api = PrefectApi(all_environment["PREFECT_API_URL"], all_environment)
    names = [f"eqm: {alarm.name}" for alarm in ALARMS]
    found = api._post("/automations/filter", {})
    assert sorted(one["name"] for one in found) == sorted(names)
    try:
        register(api, Target(hook, private=True))
        register(api, Target(hook, private=True))
        again = api._post("/automations/filter", {})
        assert sorted(one["id"] for one in again) == sorted(one["id"] for one in found)
        assert hook not in json.dumps(again)
        block = api._send("GET", "/block_types/slug/webhook/block_documents/name/eqm-alarms", None)
        assert "secret" not in json.dumps(block["data"])

        odd = 'a "quoted" \\ name {{ 1 }}'
        post_event(api, "eqm.champion.drifted", f"eqm.model.{odd}", odd, {"text": odd})
        path, data = Hook.posted.get(timeout=60)
        told = json.loads(data)
        assert path == "/T0/secret"
        assert told["event"] == "eqm.champion.drifted"
        assert told["resource"] == f"eqm.model.{odd}"
        assert told["text"] == f"eqm: a champion drifted: {odd}"
        assert told["payload"] == {"text": odd}

        # Of our pool, as the server itself tells it of a run.
        run = api._post(f"/deployments/{deployment(api)}/create_flow_run", FAR)["id"]
        api.set_state(run, kind="FAILED", name="Failed", message="")
        told = json.loads(Hook.posted.get(timeout=60)[1])
        assert (told["event"], told["resource"]) == (
            "prefect.flow-run.Failed",
            f"prefect.flow-run.{run}",
        )
        # And of the pool whose runs are Jobs of Kubernetes, which nothing starts again.
        run = api._post(f"/deployments/{in_pool(api, JOBS_POOL)}/create_flow_run", FAR)["id"]
        api.set_state(run, kind="CRASHED", name="Crashed", message="")
        told = json.loads(Hook.posted.get(timeout=60)[1])
        assert told["resource"] == f"prefect.flow-run.{run}"
        home = Path(all_environment["EQM_HOME"])
        assert written(home, b"eqm.champion.drifted")
        assert written(home, b"T0/secret") == []
    finally:
        register(api, None)
        api._send("DELETE", f"/work_pools/{JOBS_POOL}", None)


def in_pool(api: PrefectApi, pool: str) -> str:
    """A deployment of a pool, both new."""
    api._post("/work_pools/", {"name": pool, "type": "process"}, accept=(409,))
    flow = api._post("/flows/", {"name": "a-flow"})["id"]
    body = {"name": "of-jobs", "flow_id": flow, "work_pool_name": pool, "entrypoint": "x.py:x"}
    return api._post("/deployments/", body)["id"]


def written(home: Path, secret: bytes) -> list[str]:
    """Files of a home that hold a secret."""
    files = [path for path in home.rglob("*") if path.is_file() and "s3" not in path.parts]
    return [str(path) for path in files if secret in path.read_bytes()]


FAR: dict[str, Any] = {
    "state": {
        "type": "SCHEDULED",
        "state_details": {"scheduled_time": "2099-01-01T00:00:00+00:00"},
    }
}


def deployment(api: PrefectApi) -> str:
    found = api._post("/deployments/filter", {"limit": 200})
    return next(one["id"] for one in found if one["name"] == "promote")


def post_event(
    api: PrefectApi, event: str, resource: str, name: str, payload: dict[str, Any]
) -> None:
    body = {
        "id": str(uuid.uuid4()),
        "occurred": datetime.datetime.now(datetime.UTC).isoformat(),
        "event": event,
        "resource": {"prefect.resource.id": resource, "prefect.resource.name": name},
        "payload": payload,
    }
    api._send("POST", "/events", [body])  # type: ignore[arg-type]
