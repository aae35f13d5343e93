"""Every MLflow call: a run that mirrors training, and registered models with aliases.

MLflow shows; it does not decide. Training goes on while it is away, what a version points to is
checked against digests in the store, and the champion is what the history in the store says
(eqm.champion). The only module that imports mlflow, late: the import alone takes a second.
"""

import contextlib
import os
import queue
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqm.errors import TrackingError

UNREACHABLE = (
    "MLflow at {uri} cannot be reached ({error}): start the embedded services with `eqm up`, "
    "or check MLFLOW_TRACKING_URI"
)
RETRY_SECONDS = 3.0
CLOSE_SECONDS = 60.0
"""How long the end of a run waits for what MLflow has not yet taken."""
FOLDER = "eqm://"
"""Before the path of a record in a folder: MLflow takes bare paths for its own, and refuses."""


def check(uri: str) -> None:
    """Ask MLflow whether it is there, without importing it. Raises TrackingError."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10) as answer:
            answer.read()
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TrackingError(UNREACHABLE.format(uri=_public(uri), error=reason)) from error


def default_uri() -> str:
    """The tracking server of this environment (MLFLOW_TRACKING_URI). Raises TrackingError."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise TrackingError(
            "no MLflow is given: start it with `eqm up`, pass mlflow_uri, or set "
            "MLFLOW_TRACKING_URI (`eqm env` prints it)"
        )
    return uri


def _without_password(text: str, uri: str) -> str:
    """What somebody else says, without the user and password of the address."""
    held, at, _ = uri.partition("://")[2].rpartition("@")
    return text.replace(held + at, "") if at else text


def _public(uri: str) -> str:
    """An address without the user and password that it may hold."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _client(uri: str) -> Any:
    # Few and short retries: whoever waits for MLflow here has its own plan for its absence.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    # What is printed is ours to say: links to a run stand at the end of a flow.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextlib.contextmanager
def _errors(uri: str) -> Iterator[None]:
    import requests
    from mlflow.exceptions import MlflowException

    try:
        yield
    except requests.exceptions.RequestException as error:
        reason = type(error).__name__
        raise TrackingError(UNREACHABLE.format(uri=_public(uri), error=reason)) from error
    except MlflowException as error:
        if "Max retries exceeded" in str(error) or "failed with" in str(error).split("\n")[0]:
            first = _without_password(str(error), uri).split("\n")[0][:120]
            raise TrackingError(UNREACHABLE.format(uri=_public(uri), error=first)) from error
        said = _without_password(str(error), uri)
        raise TrackingError(f"MLflow at {_public(uri)} refuses: {said}") from None


# -- a run that mirrors training ----------------------------------------------------------------


class RunMirror:
    """Shows a stage in MLflow while it runs, from a thread of its own.

    The same stage started again continues the same MLflow run: it is found by the digest in its
    tags. What MLflow does not take now is sent again later; the training loop never waits for it.
    """

    def __init__(
        self, uri: str, *, experiment: str, run_name: str, digest: str, params: Mapping[str, Any]
    ) -> None:
        check(uri)
        self._uri = uri
        self._params = dict(params)
        self._names = (experiment, run_name, digest)
        self._events: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._failure = ""
        self.run_id: str | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def metrics(self, images_seen: int, figures: Mapping[str, float]) -> None:
        """Show figures at a position of the run (images seen)."""
        self._events.put(("metrics", (images_seen, dict(figures))))

    def file(self, name: str, data: bytes) -> None:
        """Keep bytes as an artifact of the run, under a relative path."""
        self._events.put(("file", (name, data)))

    def close(self, status: str) -> None:
        """Send what is left and end the run as FINISHED, FAILED or KILLED."""
        self._events.put(("close", status))
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive() or self._failure:
            left = self._failure or "it did not answer in time"
            sys.stderr.write(
                f"warning: MLflow at {_public(self._uri)} did not take all of this run ({left}); "
                "results are unaffected\n"
            )

    def _work(self) -> None:
        try:
            client = _client(self._uri)
            with _errors(self._uri):
                run_id, seen = _open_run(client, *self._names, self._params)
            self.run_id = run_id
            kind = ""
            while kind != "close":
                kind, what = self._events.get()
                self._send(client, run_id, seen, kind, what)
        except Exception as error:
            # The edge of a thread: what is not told here would be told to nobody.
            self._failure = f"{type(error).__name__}: {error}"

    def _send(self, client: Any, run_id: str, seen: int, kind: str, what: Any) -> None:
        """Send one event; where MLflow is away, again until the run is closed and time is up."""
        while True:
            try:
                with _errors(self._uri):
                    if kind == "close":
                        client.set_terminated(run_id, status=what)
                    if kind == "metrics" and what[0] > seen:
                        _log_metrics(client, run_id, *what)
                    if kind == "file":
                        _log_file(client, run_id, *what)
            except TrackingError as error:
                self._failure = str(error)
                time.sleep(RETRY_SECONDS)
            else:
                self._failure = ""
                return


def _open_run(
    client: Any, experiment: str, run_name: str, digest: str, params: Mapping[str, Any]
) -> tuple[str, int]:
    """Find or create the run of a digest: (run id, position of its newest metric)."""
    experiment_id = _experiment(client, experiment)
    found = client.search_runs([experiment_id], f"tags.`eqm.digest` = '{digest}'", max_results=1)
    if found:
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
        seen = [metric.step for metric in client.get_metric_history(run_id, "loss")]
        return run_id, max(seen, default=-1)
    run = client.create_run(experiment_id, tags={"eqm.digest": digest}, run_name=run_name)
    for name, value in params.items():
        client.log_param(run.info.run_id, name, str(value)[:6000])
    return run.info.run_id, -1


def _experiment(client: Any, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name)
        except MlflowException:
            # Somebody else was first; if it was another error, the next line tells.
            found = client.get_experiment_by_name(name)
    if found is None:
        raise TrackingError(f"MLflow experiment {name!r} can neither be found nor created")
    return found.experiment_id


def _log_metrics(client: Any, run_id: str, images_seen: int, figures: dict[str, float]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, images_seen) for name, value in figures.items()]
    client.log_batch(run_id, metrics=metrics)


def _log_file(client: Any, run_id: str, name: str, data: bytes) -> None:
    folder, _, file = name.rpartition("/")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / file
        path.write_bytes(data)
        client.log_artifact(run_id, str(path), artifact_path=folder or None)


# -- registered models --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version of a registered model."""

    model: str
    number: int
    source: str
    """Address of the sealed record it points to."""
    tags: dict[str, str]


class Registry:
    """Registered models, their versions, aliases and evidence."""

    def __init__(self, uri: str) -> None:
        check(uri)
        self.uri = uri
        self._client = _client(uri)

    def register(
        self, model: str, *, source: str, tags: Mapping[str, str], run_digest: str
    ) -> Version:
        """Make a version that points to a sealed record; the one that is there if it exists.

        The alias ``candidate`` moves to it.
        """
        with _errors(self.uri):
            version = self._find(model, source, tags["eqm.content"])
            if version is None:
                version = self._create(model, source, tags, run_digest)
            self._set_alias(model, "candidate", version.number)
        return version

    def _find(self, model: str, source: str, content: str) -> Version | None:
        query = f"name = '{model}' and tags.`eqm.content` = '{content}'"
        found = map(_version, self._client.search_model_versions(query))
        # In another store, equal content is another version.
        return next((version for version in found if version.source == source), None)

    def _create(self, model: str, source: str, tags: Mapping[str, str], run_digest: str) -> Version:
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):
            # It exists; were it another error, the next call would tell.
            self._client.create_registered_model(model)
        made = self._client.create_model_version(
            model,
            source=FOLDER + source if source.startswith("/") else source,
            run_id=self._run_of(run_digest),
            tags=dict(tags),
            # No files are copied, so it is ready at once; waiting for that is said in a log.
            await_creation_for=0,
        )
        return _version(made)

    def _run_of(self, digest: str) -> str | None:
        experiments = [e.experiment_id for e in self._client.search_experiments()]
        query = f"tags.`eqm.digest` = '{digest}'"
        found = self._client.search_runs(experiments, query, max_results=1)
        return found[0].info.run_id if found else None

    def by_alias(self, model: str, alias: str) -> Version | None:
        """The version an alias points to; None if there is no such model or alias."""
        from mlflow.exceptions import MlflowException

        with _errors(self.uri):
            try:
                return _version(self._client.get_model_version_by_alias(model, alias))
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise

    def by_number(self, model: str, number: int) -> Version:
        """One version. Raises TrackingError if it is not there."""
        with _errors(self.uri):
            return _version(self._client.get_model_version(model, str(number)))

    def point(self, model: str, alias: str, number: int) -> None:
        """Move an alias."""
        with _errors(self.uri):
            self._set_alias(model, alias, number)

    def _set_alias(self, model: str, alias: str, number: int) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.set_registered_model_alias(model, alias, str(number))
        except MlflowException as error:
            if "registered_model_aliases" not in str(error):
                raise
            # Of two that make a new alias at the same moment, MLflow fails one; now it exists.
            self._client.set_registered_model_alias(model, alias, str(number))

    def unpoint(self, model: str, alias: str) -> None:
        """Remove an alias."""
        with _errors(self.uri):
            self._client.delete_registered_model_alias(model, alias)

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        """Put tags on a version."""
        with _errors(self.uri):
            for key, value in tags.items():
                self._client.set_model_version_tag(version.model, str(version.number), key, value)

    def add_evidence(
        self, run_digest: str, *, metrics: Mapping[str, float], files: Mapping[str, bytes]
    ) -> str | None:
        """Add figures and files to the MLflow run of a training; returns the run's id."""
        with _errors(self.uri):
            run_id = self._run_of(run_digest)
            if run_id is not None:
                for name, value in metrics.items():
                    self._client.log_metric(run_id, name, value)
                for name, data in files.items():
                    _log_file(self._client, run_id, name, data)
        return run_id

    def run_page(self, run_id: str) -> str:
        """Address of a run's page."""
        with _errors(self.uri):
            experiment = self._client.get_run(run_id).info.experiment_id
        return f"{_public(self.uri).rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"


def _version(entity: Any) -> Version:
    return Version(
        model=entity.name,
        number=int(entity.version),
        source=entity.source.removeprefix(FOLDER),
        tags=dict(entity.tags),
    )
