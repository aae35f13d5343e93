"""The work pool and the deployments of ``prefect.yaml`` in a Prefect server.

The server is asked over HTTP, so that looking costs milliseconds; registering is left to
``prefect deploy``, as by hand.
"""

import base64
import datetime
import http.client
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from infra.files import make_private_folder, open_private, write_private
from infra.processes import last_lines
from infra.stack import JOBS_POOL, LOOPBACK, POOL, ServiceError, Stack, digest_of

DEPLOY_SECONDS = 180.0

ANSWER_SECONDS = 30.0
BUSY = 503
BUSY_WAITS_SECONDS = (0.5, 1.0, 2.0, 4.0)


class PrefectApi:
    """The few questions that we ask a Prefect server."""

    def __init__(self, url: str, environment: Mapping[str, str]) -> None:
        self.url = url
        self._headers = {"Content-Type": "application/json", **_authorisation(environment)}
        local = urlsplit(url).hostname in LOOPBACK
        handlers = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(*handlers)

    def check(self) -> None:
        """See that it answers and lets us in. Raises ServiceError."""
        self._post("/work_pools/filter", {"limit": 1})

    def make_pool(self) -> None:
        """Make the process work pool, if it is missing."""
        self._post("/work_pools/", {"name": POOL, "type": "process"}, accept=(409,))

    def make_jobs_pool(self, template: Mapping[str, Any]) -> None:
        """Make the pool whose runs are Jobs of Kubernetes, or give it another template."""
        body = {"name": JOBS_POOL, "type": "kubernetes", "base_job_template": dict(template)}
        if self._post("/work_pools/", body, accept=(409,)) is None:
            changed = {"base_job_template": dict(template)}
            self._send("PATCH", f"/work_pools/{JOBS_POOL}", changed, accept=())

    def heard_of_worker(self, name: str) -> str | None:
        """When a worker was last heard of, by the clock of the server."""
        found = self._post(f"/work_pools/{POOL}/workers/filter", {})
        times = [one["last_heartbeat_time"] for one in found if one["name"] == name]
        return times[0] if times else None

    def deployment_names(self) -> set[str]:
        """Names of all deployments."""
        return {found["name"] for found in self._post("/deployments/filter", {"limit": 200})}

    def unfinished_runs(self, *, crashed_since: datetime.datetime) -> list[dict[str, Any]]:
        """Runs of the pool that somebody took, and those that crashed since a moment."""
        pool = {"work_pools": {"name": {"any_": [POOL]}}}
        taken = {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}
        crashed = {
            "state": {"type": {"any_": ["CRASHED"]}},
            "end_time": {"after_": crashed_since.isoformat()},
        }
        return [
            run
            for which in (taken, crashed)
            for run in self._post("/flow_runs/filter", {**pool, "flow_runs": which})
        ]

    def set_state(self, run: str, *, kind: str, name: str, message: str) -> None:
        """Say how a run stands, whatever it stood at; a scheduled one is due now."""
        details = {"scheduled_time": datetime.datetime.now(datetime.UTC).isoformat()}
        state = {
            "type": kind,
            "name": name,
            "message": message,
            "state_details": details if kind == "SCHEDULED" else {},
        }
        self._post(f"/flow_runs/{run}/set_state", {"state": state, "force": True})

    def cancel_children(self, run: str) -> list[str]:
        """Cancel what a run asked for and what has not ended; the names of those runs."""
        unfinished = {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "PAUSED"]}}
        asked = {"parent_flow_run_id": {"any_": [run]}, "state": unfinished}
        found = self._post("/flow_runs/filter", {"flow_runs": asked})
        state = {"type": "CANCELLING", "message": "Found by eqm: the process of its parent is gone"}
        for child in found:
            # By rule, not by force: what has not begun is cancelled at once.
            self._post(f"/flow_runs/{child['id']}/set_state", {"state": state})
        return [child["name"] for child in found]

    def make_block(self, name: str, *, kind: str, data: Mapping[str, Any]) -> str:
        """Make a block document, or give it other data; its id."""
        found = self._send("GET", f"/block_types/slug/{kind}/block_documents/name/{name}", None)
        if found is not None:
            self._send("PATCH", f"/block_documents/{found['id']}", {"data": dict(data)})
            return found["id"]
        type_ = self._send("GET", f"/block_types/slug/{kind}", None, accept=())
        which = {"block_schemas": {"block_type_id": {"any_": [type_["id"]]}}}
        schema = self._post("/block_schemas/filter", which)[0]
        body = {
            "name": name,
            "data": dict(data),
            "block_type_id": type_["id"],
            "block_schema_id": schema["id"],
        }
        return self._post("/block_documents/", body)["id"]

    def make_automation(self, automation: Mapping[str, Any]) -> None:
        """Make an automation, or make the one of its name as it should be."""
        which = {"automations": {"name": {"any_": [automation["name"]]}}}
        found = self._post("/automations/filter", which)
        if found:
            # Whether it is switched off is for people to say.
            body = {**automation, "enabled": found[0]["enabled"]}
            self._send("PUT", f"/automations/{found[0]['id']}", body)
        else:
            self._post("/automations/", dict(automation))

    def _open(self, request: urllib.request.Request) -> Any:
        """Ask; again where the server is busy, as its own client does.

        SQLite was locked (503), or the whole machine is so busy that no answer comes in time. Every
        question that we ask may be asked twice.
        """
        for wait_seconds in BUSY_WAITS_SECONDS:
            try:
                return self._opener.open(request, timeout=ANSWER_SECONDS)
            except urllib.error.HTTPError as error:
                if error.code != BUSY:
                    raise
            except TimeoutError:
                pass
            time.sleep(wait_seconds)
        return self._opener.open(request, timeout=ANSWER_SECONDS)

    def _post(self, path: str, body: dict[str, Any], *, accept: tuple[int, ...] = ()) -> Any:
        return self._send("POST", path, body, accept=accept)

    def _send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        *,
        accept: tuple[int, ...] = (404,),
    ) -> Any:
        """What it answers; None for one of the statuses that are an answer as well."""
        request = urllib.request.Request(  # noqa: S310
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers=self._headers,
            method=method,
        )
        try:
            with self._open(request) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            if error.code in accept:
                return None
            raise ServiceError(
                f"Prefect at {self.url} refuses {path} ({error.code}): check PREFECT_API_URL and "
                "PREFECT_API_KEY or PREFECT_API_AUTH_STRING"
            ) from error
        # A server that goes while it answers leaves half an answer.
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ServiceError(
                f"Prefect at {self.url} cannot be reached ({error}): start it with `eqm up`, or "
                "check PREFECT_API_URL"
            ) from error


def _authorisation(environment: Mapping[str, str]) -> dict[str, str]:
    if pair := environment.get("PREFECT_API_AUTH_STRING"):
        return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
    if key := environment.get("PREFECT_API_KEY"):
        return {"Authorization": f"Bearer {key}"}
    return {}


def has_deployments(project: Path) -> bool:
    """Whether this folder declares deployments."""
    return (project / "prefect.yaml").is_file()


def deployments_digest(project: Path, stack: Stack) -> str:
    """Changes when the deployments would have to be registered again."""
    files = [project / "prefect.yaml", *sorted((project / "flows").glob("*.py"))]
    # Deployed runs start in the project's folder: a clone that moves is deployed again.
    parts: list[bytes | str] = [str(project), stack.prefect_api_url or ""]
    for file in files:
        parts += [file.name, file.read_bytes()]
    return digest_of(parts)


def declared_names(project: Path) -> set[str]:
    """Names of the deployments in prefect.yaml. Raises ServiceError."""
    import yaml

    path = project / "prefect.yaml"
    try:
        declared = yaml.safe_load(path.read_text())["deployments"]
        return {deployment["name"] for deployment in declared}
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ServiceError(f"{path} declares no deployments that can be read ({error})") from error


def in_pool(project: Path, pool: str, folder: Path) -> Path:
    """A prefect.yaml whose deployments are of another pool: with --all, --pool is ignored."""
    import yaml

    declared = yaml.safe_load((project / "prefect.yaml").read_text())
    for deployment in declared["deployments"]:
        deployment["work_pool"] = {**deployment["work_pool"], "name": pool}
    made = folder / f"prefect-{pool}.yaml"
    write_private(made, yaml.safe_dump(declared, sort_keys=False).encode())
    return made


def deploy_all(
    project: Path, *, log: Path, environment: Mapping[str, str], pool: str = POOL
) -> None:
    """``prefect deploy --all`` in the project's folder. Raises ServiceError with what it said."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    make_private_folder(log.parent)
    if pool != POOL:
        command += ["--prefect-file", str(in_pool(project, pool, log.parent))]
    log.unlink(missing_ok=True)
    with open_private(log) as output:
        try:
            ended = subprocess.run(
                command,
                cwd=project,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=DEPLOY_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ServiceError(
                f"`prefect deploy --all` does not end within {DEPLOY_SECONDS:.0f} s: see {log}"
            ) from error
    if ended.returncode != 0:
        raise ServiceError(
            f"`prefect deploy --all` in {project} failed; {log} ends:\n{last_lines(log)}"
        )
