"""Every MLflow call: a run that mirrors training, and registered models with aliases.

MLflow shows; it does not decide. Training goes on while it is away, what a version points to is
checked against digests in the store, and the champion is what the history in the store says
(eqm.champion). The only module that imports mlflow, late: the import alone takes a second.
"""

import contextlib
import hmac
import http.client
import json
import math
import os
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqm.errors import EqmError, IntegrityError, MissingError, TrackingError
from eqm.events import CURVES, Event, EventLog
from eqm.records import Blob, canonical_bytes, from_json, sha256
from eqm.words import counted

UNREACHABLE = (
    "MLflow at {uri} cannot be reached ({error}): start the embedded services with `eqm up`, "
    "or check MLFLOW_TRACKING_URI"
)
RETRY_SECONDS = 3.0
POLL_SECONDS = 1.0
MOST_METRICS = 1000
"""Figures that MLflow takes in one call."""
PAGE = 1000
"""Experiments that are asked for at a time."""
MIRRORED = "eqm.mirrored"
"""Tag of a run: how far it has the log of the training."""
PROTOCOL = "eqm.protocol."
"""Begin of the tags of a run that say of what protocol the numbers under a name are."""
SHOWN_AS = {"mlflow.experimentKind": "custom_model_development"}
"""Tag of an experiment whose pages MLflow shows as those of trainings; else as of prompts."""
AMONG_TRAININGS = "workflowType=machine_learning"
"""The same for a link to a run, which does not ask the experiment."""
ABOUT = (
    "Every version points to a sealed training in the store. `champion` is the version that passed "
    "its policy last, `candidate` the newest one; `eqm history` verifies every move of the "
    "champion and the evidence for it."
)
"""Description of a registered model when it is made."""
NOTE = "mlflow.note.content"
"""Tag that holds what MLflow shows as the description of a run."""
NOTED = "eqm.noted"
"""Tag: digests of descriptions that are ours; another one is of a person."""
AWAY_SECONDS = 10.0
CLOSE_SECONDS = 60.0
"""How long the end of a run waits for what MLflow has not yet taken."""
NAME_LENGTH, VALUE_LENGTH = 250, 6000
"""Characters that MLflow takes of a parameter; it refuses a whole batch for one that is longer."""
INVALID = 1000
"""MLflow's number of INVALID_PARAMETER_VALUE."""
FOLDER = "eqm://"
"""Before the path of a record in a folder: MLflow takes bare paths for its own, and refuses."""


def check(uri: str) -> None:
    """Ask MLflow whether it is there, without importing it. Raises TrackingError."""
    if not uri.startswith(("http://", "https://")):
        raise TrackingError(f"MLflow is at {_public(uri)!r}: it must be an http:// address")
    try:
        # Without what it holds of a user, which urllib takes for a part of the host and repeats.
        with urllib.request.urlopen(f"{_public(uri).rstrip('/')}/health", timeout=10) as answer:  # noqa: S310
            answer.read()
    except (http.client.HTTPException, urllib.error.URLError, OSError, ValueError) as error:
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
    """Shows the log of a run in MLflow while it runs, from a thread of its own.

    ``fetch`` reads what the log names in the store: grids of samples.

    It replays what durable checkpoints hold of the log, in order and with the log's own times, from
    the mark that it keeps in MLflow (tag ``eqm.mirrored``). So an outage of any length, from the
    first moment on, leaves neither gap nor double: the same run, found by the digest in its tags,
    is gone on with wherever its mark stands. Training never waits for it, but at its end, and there
    for CLOSE_SECONDS at most, or AWAY_SECONDS while MLflow does not answer.
    """

    def __init__(
        self,
        uri: str,
        *,
        experiment: str,
        run_name: str,
        digest: str,
        params: Mapping[str, Any],
        log: EventLog,
        fetch: Callable[[Blob], bytes],
    ) -> None:
        self.run_id: str | None = None
        self._uri, self._log, self._fetch = uri, log, fetch
        self._names, self._params = (experiment, run_name, digest), dict(params)
        self._wake = threading.Event()
        self._status: str | None = None
        self._deadline = math.inf
        self._sent = -1
        self._failure = ""
        self._warned = self._done = self._abandoned = False
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def close(self, status: str, *, seconds: float | None = None) -> None:
        """Send what is left and end the run as FINISHED, FAILED or KILLED.

        Waits for so many seconds at most; None: CLOSE_SECONDS.
        """
        began = time.monotonic()
        self._deadline = began + (CLOSE_SECONDS if seconds is None else seconds)
        self._status = status
        self._wake.set()
        while self._thread.is_alive() and time.monotonic() < self._deadline:
            self._thread.join(0.1)
            if self._failure and time.monotonic() > began + AWAY_SECONDS:
                self._deadline = time.monotonic()
        if not self._done:
            sys.stderr.write(
                f"warning: MLflow at {_public(self._uri)} did not take all of this run "
                f"({counted(len(self._points()), 'point')} left: "
                f"{self._failure or 'it did not answer in time'}); results are unaffected, and the "
                "points are sent when the same training is started again\n"
            )

    def abandon(self) -> None:
        """Send nothing more, and leave the run as it is shown: it is another process's by now."""
        self._abandoned, self._deadline = True, -math.inf
        self._wake.set()
        self._thread.join(AWAY_SECONDS)

    def _work(self) -> None:
        while time.monotonic() < self._deadline:
            try:
                check(self._uri)
                with _errors(self._uri):
                    self._show(_client(self._uri))
            except Exception as error:
                # The edge of a thread: what is not told here would be told to nobody. All that is
                # known of the other side is forgotten: what it has is read anew.
                self._failure = str(error) or type(error).__name__
                self._warn()
                self._wake.wait(RETRY_SECONDS)
                if self._status is not None:
                    time.sleep(min(RETRY_SECONDS, max(0.0, self._deadline - time.monotonic())))
            else:
                self._done = True
                return

    def _warn(self) -> None:
        """Say once that MLflow is away; the end of the run says what it missed."""
        if not self._warned and self._status is None:
            sys.stderr.write(
                f"warning: {self._failure}. Training goes on; MLflow is sent all that it misses "
                "when it is back\n"
            )
        self._warned = True

    def _show(self, client: Any) -> None:
        """Go on with the run in MLflow until this one is closed and all is sent."""
        run_id, mark = _open_run(client, *self._names, self._params)
        self.run_id = run_id
        kept = self._begin(mark)
        self._failure = ""
        while not self._abandoned:
            status = self._status
            self._send_points(client, run_id, beyond=kept)
            if status is not None:
                client.set_terminated(run_id, status=status)
                return
            self._wake.wait(POLL_SECONDS)

    def _begin(self, mark: "_Mark") -> int:
        """Find the place of the mark in the log; returns up to where MLflow keeps what it has.

        The mark of an attempt that this log knows nothing of (its checkpoint was deleted, or it ran
        in another store) leaves points in MLflow that cannot be taken away: they stand, and this
        log is shown behind them.
        """
        known = self._log.find(mark.number)
        if mark.images_seen < 0 or (known is not None and known.digest == mark.event):
            self._sent = mark.number
            return -1
        self._sent = -1
        return mark.images_seen

    def _points(self) -> list[Event]:
        return [event for event in self._log.committed(self._sent) if event.kind in CURVES]

    def _send_points(self, client: Any, run_id: str, *, beyond: int) -> None:
        for some in calls(self._points()):
            if self._abandoned:
                # There may be hours of them left.
                return
            new = [event for event in some if event.images_seen > beyond]
            if new:
                # Sent again after an answer that got lost, equal points with equal times are one.
                client.log_batch(run_id, metrics=_metrics(new))
                self._send_grids(client, run_id, new)
                client.set_tag(run_id, MIRRORED, _Mark.of(new[-1]).text)
            self._sent = some[-1].number

    def _send_grids(self, client: Any, run_id: str, events: Sequence[Event]) -> None:
        for event in events:
            for blob in event.blobs.values():
                try:
                    data = self._fetch(blob)
                except (IntegrityError, MissingError) as error:
                    # A picture that is gone holds up no curve.
                    sys.stderr.write(f"warning: MLflow is not sent a grid of samples: {error}\n")
                    continue
                _log_file(client, run_id, f"samples/{event.images_seen:012d}.png", data)


@dataclass(frozen=True)
class _Mark:
    """How far MLflow has the log: kept in MLflow itself."""

    number: int = -1
    images_seen: int = -1
    event: str = ""
    """Digest of the last event that it has."""

    @staticmethod
    def of(event: Event) -> "_Mark":
        return _Mark(event.number, event.images_seen, event.digest)

    @property
    def text(self) -> str:
        return canonical_bytes(self).decode()


def calls(points: Sequence[Event]) -> Iterator[list[Event]]:
    """Events with figures, in order, in parts that MLflow takes in one call."""
    some: list[Event] = []
    figures = 0
    for event in points:
        if some and figures + len(event.figures) > MOST_METRICS:
            yield some
            some, figures = [], 0
        some.append(event)
        figures += len(event.figures)
    if some:
        yield some


def _metrics(events: Sequence[Event]) -> list[Any]:
    from mlflow.entities import Metric

    return [
        Metric(name, value, event.at_ms, event.images_seen)
        for event in events
        for name, value in event.figures.items()
    ]


def _now(metrics: Mapping[str, float]) -> list[Any]:
    from mlflow.entities import Metric

    at_ms = int(time.time() * 1000)
    return [Metric(name, value, at_ms, 0) for name, value in metrics.items()]


def _open_run(
    client: Any, experiment: str, run_name: str, digest: str, params: Mapping[str, Any]
) -> tuple[str, _Mark]:
    """Find or create the run of a digest: (run id, how far it has the log)."""
    from mlflow.entities import Param

    experiment_id = _experiment(client, experiment)
    run = _first_run(client, [experiment_id], digest)
    if run is None:
        tags = {"eqm.digest": digest, MIRRORED: _Mark().text}
        run = client.create_run(experiment_id, tags=tags, run_name=run_name)
    else:
        client.update_run(run.info.run_id, status="RUNNING")
    # MLflow refuses another value, and what it shows may be of a program that wrote it otherwise.
    shown = run.data.params
    known = {_fitting(name, NAME_LENGTH): str(value) for name, value in params.items()}
    given = [Param(n, _fitting(v, VALUE_LENGTH)) for n, v in known.items() if n not in shown]
    for start in range(0, len(given), 100):
        # Each time: whoever made the run may have been stopped before this.
        client.log_batch(run.info.run_id, params=given[start : start + 100])
    return run.info.run_id, _mark_of(client, run)


def _fitting(text: str, length: int) -> str:
    """A text that MLflow takes; of a longer one the beginning, and a digest of all of it."""
    return text if len(text) <= length else f"{text[: length - 9]}-{sha256(text.encode())[:8]}"


def _first_run(client: Any, experiments: list[str], digest: str) -> Any:
    """The run of a digest; the older one, where an answer that got lost made two."""
    query, order = f"tags.`eqm.digest` = '{digest}'", ["attributes.start_time ASC"]
    found = client.search_runs(experiments, query, max_results=1, order_by=order)
    return found[0] if found else None


def _mark_of(client: Any, run: Any) -> _Mark:
    kept = run.data.tags.get(MIRRORED)
    if kept is None:
        # Of a program that kept no mark: what it showed is known by its positions.
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")]
        return _Mark(images_seen=max(steps, default=-1))
    try:
        return from_json(_Mark, json.loads(kept), MIRRORED)
    except ValueError as error:
        raise TrackingError(
            f"tag {MIRRORED} of MLflow run {run.info.run_id} is {kept[:80]!r}: it was edited; "
            "delete the run, and it is shown anew"
        ) from error


def _experiment(client: Any, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, tags=SHOWN_AS)
        except MlflowException:
            # Somebody else was first; if it was another error, the next line tells.
            found = client.get_experiment_by_name(name)
    if found is None:
        raise TrackingError(f"MLflow experiment {name!r} can neither be found nor created")
    return found.experiment_id


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
                self._create(model, source, tags, run_digest)
                # Not the answer to that: where one got lost on the way, MLflow's client asked for
                # a second version, and of several the first one counts, for everybody.
                version = self._find(model, source, tags["eqm.content"])
            if version is None:
                raise TrackingError(
                    f"MLflow at {_public(self.uri)} made a version of {model} and does not find it"
                )
            self._set_alias(model, "candidate", version.number)
        return version

    def find(self, model: str, *, source: str, content: str) -> Version | None:
        """The version that points to a sealed record; None if there is none."""
        with _errors(self.uri):
            return self._find(model, source, content)

    def _find(self, model: str, source: str, content: str) -> Version | None:
        query = f"name = '{model}' and tags.`eqm.content` = '{content}'"
        found = map(_version, self._client.search_model_versions(query))
        # In another store, equal content is another version.
        same = (version for version in found if version.source == source)
        return min(same, key=lambda version: version.number, default=None)

    def _create(self, model: str, source: str, tags: Mapping[str, str], run_digest: str) -> None:
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):
            # It exists; were it another error, the next call would tell.
            self._client.create_registered_model(model, description=ABOUT)
        self._client.create_model_version(
            model,
            source=FOLDER + source if source.startswith("/") else source,
            run_id=self._run_of(run_digest),
            tags=dict(tags),
            # No files are copied, so it is ready at once; waiting for that is said in a log.
            await_creation_for=0,
        )

    def has_finished(self, run_digest: str) -> bool:
        """Whether MLflow shows the run of a training as ended, which it does once it has it all."""
        with _errors(self.uri):
            run = _first_run(self._client, self._experiments(), run_digest)
        return run is not None and run.info.status == "FINISHED"

    def _experiments(self) -> list[str]:
        """All of them: MLflow gives a page at a time, and a run may be of a later one."""
        found: list[str] = []
        token: str | None = None
        while True:
            page = self._client.search_experiments(max_results=PAGE, page_token=token)
            found += [experiment.experiment_id for experiment in page]
            token = page.token
            if not token:
                return found

    def _run_of(self, digest: str) -> str | None:
        run = _first_run(self._client, self._experiments(), digest)
        return None if run is None else run.info.run_id

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

    def find_number(self, model: str, number: int) -> Version | None:
        """One version; None if it is not there."""
        from mlflow.exceptions import MlflowException

        with _errors(self.uri):
            try:
                return _version(self._client.get_model_version(model, str(number)))
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
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
        set_ = self._client.set_registered_model_alias
        _twice("registered_model_aliases", lambda: set_(model, alias, str(number)))

    def unpoint(self, model: str, alias: str) -> None:
        """Remove an alias."""
        with _errors(self.uri):
            self._client.delete_registered_model_alias(model, alias)

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        """Put tags on a version."""
        with _errors(self.uri):
            where, set_ = (version.model, str(version.number)), self._client.set_model_version_tag
            for key, value in tags.items():
                _twice("model_version_tags", lambda of=(*where, key, value): set_(*of))

    def add_evidence(
        self, run_digest: str, *, metrics: Mapping[str, float], files: Mapping[str, bytes]
    ) -> str | None:
        """Add figures and files to the MLflow run of a training; returns the run's id."""
        with _errors(self.uri):
            run_id = self._run_of(run_digest)
            if run_id is not None:
                given = _now(metrics)
                for start in range(0, len(given), MOST_METRICS):
                    some = given[start : start + MOST_METRICS]
                    self._client.log_batch(run_id, metrics=some)
                for name, data in files.items():
                    _log_file(self._client, run_id, name, data)
        return run_id

    def describe(
        self, model: str, *, source: str, content: str, run_digest: str, note: str
    ) -> None:
        """Put Markdown on the pages of a version and of its run, but not over what people wrote."""
        with _errors(self.uri):
            version = self._find(model, source, content)
            if version is not None:
                self._note_version(version, note)
            run = _first_run(self._client, self._experiments(), run_digest)
            if run is not None:
                self._note_run(run, note)

    def _note_version(self, version: Version, note: str) -> None:
        number = str(version.number)
        there = self._client.get_model_version(version.model, number).description or ""
        noted = _noted(there, note, version.tags)
        if noted is not None:
            self.tag(version, {NOTED: noted})
            self._client.update_model_version(version.model, number, description=note)

    def _note_run(self, run: Any, note: str) -> None:
        noted = _noted(run.data.tags.get(NOTE, ""), note, run.data.tags)
        if noted is not None:
            for of in ((run.info.run_id, NOTED, noted), (run.info.run_id, NOTE, note)):
                _twice("INSERT INTO tags", lambda of=of: self._client.set_tag(*of))

    def name_for(self, run_digest: str, kind: str, protocol: str) -> str:
        """Under which name numbers of a kind and a protocol (its digest) stand on a run's page.

        ``kind`` itself is of the first protocol that is shown there, ``<kind>-<digest>`` of every
        other: no line of MLflow's leads from numbers of one protocol to those of another. The tag
        ``eqm.protocol.<name>`` says which one it is.
        """
        with _errors(self.uri):
            run = _first_run(self._client, self._experiments(), run_digest)
            if run is None:
                return kind
            known = run.data.tags.get(f"{PROTOCOL}{kind}")
            # Numbers of before there was such a tag are of nobody knows which protocol.
            untold = any(name.startswith(f"{kind}/") for name in run.data.metrics)
            name = kind
            if known != protocol and (known is not None or untold):
                name = f"{kind}-{protocol[:12]}"
            of = (run.info.run_id, f"{PROTOCOL}{name}", protocol)
            _twice("INSERT INTO tags", lambda: self._client.set_tag(*of))
        return name

    def run_page(self, run_id: str) -> str:
        """Address of a run's page."""
        with _errors(self.uri):
            experiment = self._client.get_run(run_id).info.experiment_id
        run = f"{_public(self.uri).rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
        return f"{run}?{AMONG_TRAININGS}"


def _noted(there: str, note: str, tags: Mapping[str, str]) -> str | None:
    """Tag that is set before a description is replaced; None if a person wrote what is there.

    It names what is there as well: whoever is stopped before the new one stands goes on later.
    """
    old, new = (sha256(text.encode()) for text in (there, note))
    return None if there and old not in tags.get(NOTED, "").split() else f"{old} {new}"


def _twice(table: str, call: Callable[[], Any]) -> None:
    """Of two that make the same row of a table at the same moment MLflow fails one: it asks again.

    The row exists then, and is replaced.
    """
    from mlflow.exceptions import MlflowException

    try:
        call()
    except MlflowException as error:
        if table not in str(error):
            raise
        call()


def _version(entity: Any) -> Version:
    return Version(
        model=entity.name,
        number=int(entity.version),
        source=entity.source.removeprefix(FOLDER),
        tags=dict(entity.tags),
    )


# -- scoring ------------------------------------------------------------------------------------


def scoring_application(folder: Path, *, token: str | None, check: Callable[[object], None]) -> Any:
    """MLflow's scoring server of the model in a folder, as an ASGI application.

    ``check`` is given the JSON of each call, and raises EqmError for one that is to be refused.
    With ``token``, calls must bring it as ``Authorization: Bearer TOKEN``.
    """
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    from mlflow.pyfunc import load_model, scoring_server
    from starlette.responses import JSONResponse, PlainTextResponse

    application = scoring_server.init(load_model(str(folder)))

    @application.middleware("http")
    async def only_what_is_meant(request: Any, call_next: Any) -> Any:
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind == scoring_server.CONTENT_TYPE_PARQUET:
            # A table whose further columns MLflow would pass over.
            told = {"error_code": "BAD_REQUEST", "message": f"{kind} is not read here: send JSON"}
            return JSONResponse(told, status_code=415)
        # What is no JSON is MLflow's to refuse.
        with contextlib.suppress(ValueError):
            body = json.loads(await request.body())
            try:
                check(body)
            except EqmError as error:
                told = {"error_code": "INVALID_PARAMETER_VALUE", "message": str(error)}
                return JSONResponse(told, status_code=400)
        return await call_next(request)

    if token is not None:

        @application.middleware("http")
        async def only_with_token(request: Any, call_next: Any) -> Any:
            brought = request.headers.get("authorization", "").encode()
            if not hmac.compare_digest(brought, f"Bearer {token}".encode()):
                told = "bring the token, as Authorization: Bearer TOKEN\n"
                return PlainTextResponse(told, status_code=401)
            return await call_next(request)

    return application


def refusal(error: EqmError) -> Exception:
    """What a scoring server answers with status 400 and the words of an error."""
    from mlflow.exceptions import MlflowException

    return MlflowException(str(error), error_code=INVALID)
