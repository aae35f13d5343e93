"""MLflow for real: registered versions, aliases, and the run that mirrors training."""

import contextlib
import http.server
import itertools
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from mlflow import MlflowClient

from eqm.errors import TrackingError
from eqm.registry import Registry, RunMirror, Version, check

pytestmark = [pytest.mark.services, pytest.mark.timeout(120)]

CLOSED = "http://127.0.0.1:9"
_numbers = itertools.count()


@pytest.fixture
def uri(mlflow_environment: dict[str, str]) -> str:
    return mlflow_environment["MLFLOW_TRACKING_URI"]


@pytest.fixture
def registry(uri: str) -> Registry:
    return Registry(uri)


@pytest.fixture
def model() -> str:
    return f"eqm-test-{os.getpid()}-{next(_numbers)}"


def tags(content: str) -> dict[str, str]:
    return {"eqm.content": content, "eqm.train": "a" * 64}


def registered(registry: Registry, model: str, content: str) -> Version:
    where = f"s3://eqm/store/train/{content}"
    return registry.register(model, source=where, tags=tags(content), run_digest="0" * 64)


# -- versions -----------------------------------------------------------------------------------


def test_equal_content_is_registered_once(registry: Registry, model: str) -> None:
    first = registered(registry, model, "c1")
    assert registered(registry, model, "c1") == first
    assert (first.number, first.source) == (1, "s3://eqm/store/train/c1")
    assert tags("c1").items() <= first.tags.items()
    assert registry.by_number(model, 1) == first
    assert registered(registry, model, "c2").number == 2


def test_equal_content_in_another_store_is_another_version(registry: Registry, model: str) -> None:
    registered(registry, model, "c1")
    where = "s3://eqm/moved/train/c1"
    moved = registry.register(model, source=where, tags=tags("c1"), run_digest="0" * 64)
    assert (moved.number, moved.source) == (2, where)


def test_a_record_in_a_folder_is_registered(registry: Registry, model: str) -> None:
    where = "/home/o'neil/a store/train/c1"
    for _ in range(2):
        version = registry.register(model, source=where, tags=tags("c1"), run_digest="0" * 64)
        assert (version.number, version.source) == (1, where)
    assert registry.by_alias(model, "candidate") == version


def test_registering_says_nothing(registry: Registry, model: str, capfd, caplog) -> None:
    with caplog.at_level("INFO"):
        registered(registry, model, "c1")
    assert [record.name for record in caplog.records if record.name.startswith("mlflow")] == []
    assert "".join(capfd.readouterr()) == ""


def test_candidate_is_what_was_registered_last(registry: Registry, model: str) -> None:
    registered(registry, model, "c1")
    second = registered(registry, model, "c2")
    assert registry.by_alias(model, "candidate") == second
    assert registered(registry, model, "c1").number == 1
    found = registry.by_alias(model, "candidate")
    assert found is not None
    assert found.number == 1


def test_an_alias_is_moved_and_taken_away(registry: Registry, model: str) -> None:
    assert registry.by_alias(model, "champion") is None
    version = registered(registry, model, "c1")
    assert registry.by_alias(model, "champion") is None
    registry.point(model, "champion", 1)
    assert registry.by_alias(model, "champion") == version
    registry.tag(version, {"eqm.history": "1"})
    assert registry.by_number(model, 1).tags["eqm.history"] == "1"
    registry.unpoint(model, "champion")
    assert registry.by_alias(model, "champion") is None


def test_a_version_that_is_not_there_is_named(registry: Registry, model: str) -> None:
    registered(registry, model, "c1")
    with pytest.raises(TrackingError, match=rf"refuses: .*{model}"):
        registry.by_number(model, 7)
    with pytest.raises(TrackingError, match="refuses"):
        registry.point(model, "champion", 7)


def test_two_at_once_register_one_model(registry: Registry, uri: str, model: str) -> None:
    for number in range(3):
        name = f"{model}-{number}"
        found = in_threads(
            lambda name=name: registered(registry, name, "c1"),
            lambda name=name: registered(Registry(uri), name, "c2"),
        )
        assert {version.number for version in found} == {1, 2}
        candidate = registry.by_alias(name, "candidate")
        assert candidate in found


def test_evidence_joins_the_run_of_the_training(registry: Registry, uri: str, model: str) -> None:
    assert registry.add_evidence("e" * 64, metrics={"eval/x": 1.0}, files={}) is None
    digest = f"{model}-digest"
    mirror = opened(uri, model, digest)
    mirror.close("FINISHED")
    where = "s3://eqm/store/train/c1"
    version = registry.register(model, source=where, tags=tags("c1"), run_digest=digest)
    assert MlflowClient(uri).get_model_version(model, "1").run_id == mirror.run_id
    files = {"report/report.html": b"<p>hello"}
    run_id = registry.add_evidence(digest, metrics={"eval/distance": 2.5}, files=files)
    assert run_id == mirror.run_id
    run = MlflowClient(uri).get_run(str(run_id))
    assert run.data.metrics["eval/distance"] == 2.5
    assert artifacts(uri, run_id, "report") == ["report/report.html"]
    page = registry.run_page(str(run_id))
    assert page.startswith(f"{uri}/#/experiments/")
    assert page.endswith(f"/runs/{run_id}")
    assert version.number == 1


# -- the mirror of a run ------------------------------------------------------------------------


def test_metrics_and_files_arrive(uri: str, model: str, capfd) -> None:
    mirror = opened(uri, model, "d", params={"train.images": 1280, "train.betas": [0.9, 0.99]})
    for images in (64, 128):
        mirror.metrics(images, {"loss": 1.0 / images, "images_per_second": 10.0})
    mirror.file("grids/128.png", b"picture")
    mirror.close("FINISHED")
    run = MlflowClient(uri).get_run(str(mirror.run_id))
    assert run.info.status == "FINISHED"
    assert run.data.tags["eqm.digest"] == f"{model}-d"
    assert run.data.params == {"train.images": "1280", "train.betas": "[0.9, 0.99]"}
    assert steps(uri, mirror) == [64, 128]
    assert set(run.data.metrics) == {"loss", "images_per_second"}
    assert artifacts(uri, mirror.run_id, "grids") == ["grids/128.png"]
    assert "".join(capfd.readouterr()) == ""


def test_the_same_digest_goes_on_in_the_same_run(uri: str, model: str) -> None:
    first = opened(uri, model, "d")
    for images in (64, 128):
        first.metrics(images, {"loss": 1.0})
    first.close("KILLED")
    # Training goes back to its checkpoint, and shows again what was shown before it ended.
    again = opened(uri, model, "d")
    for images in (128, 192):
        again.metrics(images, {"loss": 2.0})
    again.close("FINISHED")
    assert again.run_id == first.run_id
    assert steps(uri, again) == [64, 128, 192]
    other = opened(uri, model, "e")
    other.close("FINISHED")
    assert other.run_id != first.run_id


def test_mlflow_that_goes_away_stops_no_training(
    uri: str, model: str, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with relay(uri) as way:
        mirror = opened(way.uri, model, "d")
        mirror.metrics(64, {"loss": 1.0})
        wait_for(lambda: mirror.run_id is not None and steps(uri, mirror) == [64])
        way.open = False
        mirror.metrics(128, {"loss": 0.5})
        mirror.file("grids/128.png", b"picture")
        mirror.close("FINISHED")
    warned = capfd.readouterr().err
    assert "did not take all of this run" in warned
    assert "results are unaffected" in warned
    assert "Traceback" not in warned
    assert steps(uri, mirror) == [64]


@pytest.mark.parametrize("make", [Registry, check])
def test_no_mlflow_is_one_message(make) -> None:
    with pytest.raises(TrackingError) as told:
        make(CLOSED)
    assert "127.0.0.1:9 cannot be reached" in str(told.value)
    assert "`eqm up`" in str(told.value)
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI"):
        make("nonsense")


def test_no_mlflow_at_the_start_of_a_run_is_one_message() -> None:
    with pytest.raises(TrackingError, match="cannot be reached"):
        RunMirror(CLOSED, experiment="e", run_name="r", digest="d", params={})


def test_passwords_are_not_told() -> None:
    with pytest.raises(TrackingError) as told:
        check("http://user:hidden@127.0.0.1:9")
    assert "hidden" not in str(told.value)


# -- helpers ------------------------------------------------------------------------------------


def opened(uri: str, model: str, digest: str, params: dict | None = None) -> RunMirror:
    full = digest if digest.startswith(model) else f"{model}-{digest}"
    return RunMirror(uri, experiment=model, run_name="run", digest=full, params=params or {})


def steps(uri: str, mirror: RunMirror) -> list[int]:
    history = MlflowClient(uri).get_metric_history(str(mirror.run_id), "loss")
    return sorted(metric.step for metric in history)


def artifacts(uri: str, run_id: str | None, folder: str) -> list[str]:
    return [found.path for found in MlflowClient(uri).list_artifacts(str(run_id), folder)]


def wait_for(what) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def in_threads(*programs) -> list:
    found: list = []
    threads = [threading.Thread(target=lambda p=p: found.append(p())) for p in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@dataclass
class Way:
    uri: str
    open: bool = True


@contextlib.contextmanager
def relay(uri: str) -> Iterator[Way]:
    """An address that leads to MLflow for as long as the way is open."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def pass_on(self) -> None:
            if not way.open:
                self.close_connection = True
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kept = {k: v for k, v in self.headers.items() if k in ("Content-Type", "Accept")}
            request = urllib.request.Request(
                uri + self.path, data=body or None, headers=kept, method=self.command
            )
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    status, data, kind = answer.status, answer.read(), answer.headers
            except urllib.error.HTTPError as error:
                status, data, kind = error.code, error.read(), error.headers
            self.send_response(status)
            self.send_header("Content-Type", kind.get("Content-Type", "text/plain"))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = pass_on

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    way = Way(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield way
    finally:
        server.shutdown()
        server.server_close()
