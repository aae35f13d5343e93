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

from eqm.errors import MissingError, TrackingError
from eqm.events import EventLog, log_of
from eqm.records import Blob
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


def test_a_run_is_found_behind_a_page_of_experiments(
    registry: Registry, uri: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more than a thousand experiments MLflow tells a page at a time."""
    monkeypatch.setattr("eqm.registry.PAGE", 2)
    client = MlflowClient(uri)
    runs: dict[str, str] = {}
    for number in range(4):
        experiment, digest = client.create_experiment(f"{model}-{number}"), f"{model}-{number}"
        run = client.create_run(experiment, tags={"eqm.digest": digest})
        runs[digest] = run.info.run_id
    for digest, run_id in runs.items():
        assert registry.add_evidence(digest, metrics={}, files={}) == run_id


def test_of_two_runs_of_a_training_the_older_one_counts(
    registry: Registry, uri: str, model: str
) -> None:
    """An answer that got lost made two; whoever asks must be told of the same one."""
    client = MlflowClient(uri)
    experiment, tags = client.create_experiment(model), {"eqm.digest": model}
    runs = [client.create_run(experiment, start_time=t, tags=tags) for t in (3000, 1000, 2000)]
    found = registry.add_evidence(model, metrics={}, files={})
    assert found == runs[1].info.run_id


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


def test_two_at_once_put_the_same_tags(registry: Registry, uri: str, model: str) -> None:
    """As two that mirror one move of the champion: of a new tag MLflow refuses one of them."""
    version, other = registered(registry, model, "c1"), Registry(uri)
    for round_ in range(6):
        given = {f"eqm.new-{round_}-{number}": "x" for number in range(5)}
        told = in_threads(
            lambda given=given: registry.tag(version, given),
            lambda given=given: other.tag(version, given),
        )
        assert told == [None, None]
        assert given.items() <= registry.by_number(model, 1).tags.items()


def test_two_at_once_name_one_protocol(registry: Registry, uri: str, model: str) -> None:
    MlflowClient(uri).create_run("0", tags={"eqm.digest": model})
    other, one = Registry(uri), "1" * 64
    for round_ in range(12):
        kind = f"eval{round_}"
        told = in_threads(
            lambda kind=kind: registry.name_for(model, kind, one),
            lambda kind=kind: other.name_for(model, kind, one),
        )
        assert told == [kind, kind]


def test_an_answer_that_got_lost_makes_no_second_version(
    registry: Registry, uri: str, model: str
) -> None:
    """MLflow commits and then answers 500: its client asks again, and all see the same version."""
    registered(registry, f"{model}-other", "c0")
    with relay(uri) as way:
        way.lose_answers_to = "model-versions/create"
        version = registered(Registry(way.uri), model, "c1")
    assert way.lost == 1
    assert version.number == 1
    assert registered(registry, model, "c1").number == 1
    candidate = registry.by_alias(model, "candidate")
    assert candidate is not None
    assert candidate.number == 1


def test_numbers_of_two_protocols_stand_under_two_names(
    registry: Registry, uri: str, model: str
) -> None:
    client, one, other = MlflowClient(uri), "1" * 64, "2" * 64
    assert registry.name_for(f"{model}-nowhere", "eval", one) == "eval"
    runs = [client.create_run("0", tags={"eqm.digest": f"{model}-{n}"}) for n in range(2)]
    for value, protocol, name in (
        (1.0, one, "eval"),
        (2.0, other, "eval-222222222222"),
        (3.0, one, "eval"),
    ):
        assert registry.name_for(f"{model}-0", "eval", protocol) == name
        registry.add_evidence(f"{model}-0", metrics={f"{name}/distance": value}, files={})
    assert registry.name_for(f"{model}-0", "nightly", other) == "nightly"
    shown = client.get_run(runs[0].info.run_id).data
    assert shown.metrics == {"eval/distance": 3.0, "eval-222222222222/distance": 2.0}
    assert {name: tag for name, tag in shown.tags.items() if "protocol" in name} == {
        "eqm.protocol.eval": one,
        "eqm.protocol.eval-222222222222": other,
        "eqm.protocol.nightly": other,
    }
    # What was shown without a tag is of nobody knows which.
    client.log_metric(runs[1].info.run_id, "eval/distance", 4.0)
    for _ in range(2):
        assert registry.name_for(f"{model}-1", "eval", one) == "eval-111111111111"


def test_evidence_joins_the_run_of_the_training(registry: Registry, uri: str, model: str) -> None:
    assert registry.add_evidence("e" * 64, metrics={"eval/x": 1.0}, files={}) is None
    digest = f"{model}-digest"
    mirror = opened(uri, model, digest)
    mirror.close("FINISHED")
    where = "s3://eqm/store/train/c1"
    version = registry.register(model, source=where, tags=tags("c1"), run_digest=digest)
    assert MlflowClient(uri).get_model_version(model, "1").run_id == mirror.run_id
    files = {"report/report.html": b"<p>hello"}
    ends = {"eval/distance.low": 2.25, "eval/distance.high": 2.75}
    # More than MLflow takes at once.
    figures = {"eval/distance": 2.5, **ends, **{f"eval/fd_{i}": float(i) for i in range(1000)}}
    run_id = registry.add_evidence(digest, metrics=figures, files=files)
    assert run_id == mirror.run_id
    run = MlflowClient(uri).get_run(str(run_id))
    assert run.data.metrics == figures
    assert artifacts(uri, run_id, "report") == ["report/report.html"]
    page = registry.run_page(str(run_id))
    assert page.startswith(f"{uri}/#/experiments/")
    assert page.endswith(f"/runs/{run_id}?workflowType=machine_learning")
    assert version.number == 1


def test_a_note_stands_where_nobody_wrote_another(
    registry: Registry, uri: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, where = f"{model}-digest", "s3://eqm/store/train/c1"
    mirror = opened(uri, model, digest)
    mirror.close("FINISHED")
    client = MlflowClient(uri)

    def told() -> tuple[str, str]:
        tags_of_run = client.get_run(str(mirror.run_id)).data.tags
        described = client.get_model_version(model, "1").description
        return described, tags_of_run.get("mlflow.note.content", "")

    def describe(note: str) -> tuple[str, str]:
        registry.describe(model, source=where, content="c1", run_digest=digest, note=note)
        return told()

    # Nothing is there yet, and nothing is made.
    registry.describe(model, source=where, content="c1", run_digest="f" * 64, note="one")
    registry.register(model, source=where, tags=tags("c1"), run_digest=digest)
    assert "eqm history" in client.get_registered_model(model).description
    assert describe("one") == ("one", "one")
    assert describe("two") == ("two", "two")
    with monkeypatch.context() as stopped:
        # Between the tag and the description.
        stopped.setattr(type(registry._client), "update_model_version", None)
        with pytest.raises(TypeError):
            describe("three")
    assert describe("four") == ("four", "four")
    client.update_model_version(model, "1", description="of a person")
    client.set_tag(str(mirror.run_id), "mlflow.note.content", "of another")
    assert describe("five") == ("of a person", "of another")


# -- the mirror of a run ------------------------------------------------------------------------


def test_points_and_files_arrive_with_the_times_of_the_log(uri: str, model: str, capfd) -> None:
    log = with_grid(a_log(64, 128))
    params = {"train.images": 1280, "train.betas": [0.9, 0.99]}
    mirror = opened(uri, model, "d", log, params=params | {f"p{k}": k for k in range(150)})
    mirror.close("FINISHED")
    run = MlflowClient(uri).get_run(str(mirror.run_id))
    assert run.info.status == "FINISHED"
    assert run.data.tags["eqm.digest"] == f"{model}-d"
    assert run.data.params.items() >= {"train.images": "1280", "train.betas": "[0.9, 0.99]"}.items()
    assert len(run.data.params) == 152
    assert shown(uri, mirror) == told(log)
    assert set(run.data.metrics) == {"loss", "images_per_second", "latent_distance"}
    assert artifacts(uri, mirror.run_id, "samples") == [GRID]
    assert "".join(capfd.readouterr()) == ""


def test_parameters_longer_than_mlflow_takes_are_shown_in_part(uri: str, model: str) -> None:
    names = ["n" * 250, "n" * 251, "n" * 300, "long"]
    params = {**dict.fromkeys(names, "x"), "long": "v" * 7000}
    mirror = opened(uri, model, "d", a_log(64), params=params)
    mirror.close("FINISHED")
    again = opened(uri, model, "d", a_log(64), params=params)
    again.close("FINISHED")
    found = MlflowClient(uri).get_run(str(mirror.run_id)).data.params
    assert len(found) == 4
    assert found["n" * 250] == "x"
    assert (len(found["long"]), found["long"][:5991]) == (6000, "v" * 5991)


def test_who_was_replaced_leaves_the_run_as_its_successor_shows_it(uri: str, model: str) -> None:
    log = a_log(64)
    sleeper = opened(uri, model, "d", log)
    wait_for(lambda: sleeper.run_id is not None and steps(uri, sleeper) == [64])
    other = EventLog(_clock.__next__)
    other._events, other._next = log.events, len(log.events)
    opened(uri, model, "d", more(other, 128)).close("FINISHED")
    sleeper.abandon()
    assert steps(uri, sleeper) == [64, 128]
    assert MlflowClient(uri).get_run(str(sleeper.run_id)).info.status == "FINISHED"


def test_what_no_checkpoint_holds_is_not_shown_yet(uri: str, model: str) -> None:
    log = a_log(64)
    mirror = opened(uri, model, "d", log)
    log.append("metrics", 128, {"loss": 1.0})
    wait_for(lambda: mirror.run_id is not None and steps(uri, mirror) == [64])
    commit(log)
    wait_for(lambda: steps(uri, mirror) == [64, 128])
    log.append("metrics", 192, {"loss": 1.0})
    mirror.close("KILLED")
    assert steps(uri, mirror) == [64, 128]


def test_the_same_digest_goes_on_in_the_same_run(registry: Registry, uri: str, model: str) -> None:
    def status() -> str:
        return MlflowClient(uri).get_run(str(first.run_id)).info.status

    log = a_log(64, 128)
    first = opened(uri, model, "d", log)
    first.close("KILLED")
    # One that has all of it is sent nothing more: this one has not.
    assert (status(), registry.has_finished(f"{model}-d")) == ("KILLED", False)
    again = opened(uri, model, "d", more(log, 192))
    wait_for(lambda: status() == "RUNNING")
    assert not registry.has_finished(f"{model}-d")
    again.close("FINISHED")
    assert (status(), registry.has_finished(f"{model}-d")) == ("FINISHED", True)
    assert again.run_id == first.run_id
    assert shown(uri, again) == told(log)
    other = opened(uri, model, "e", a_log(64))
    other.close("FINISHED")
    assert other.run_id != first.run_id


def test_behind_an_attempt_that_is_gone_points_go_on(uri: str, model: str) -> None:
    """Its checkpoints were deleted, or it ran in another store: what it showed stands."""
    first = opened(uri, model, "d", a_log(64, 128))
    first.close("KILLED")
    stood = shown(uri, first)
    log = a_log(64, 128, 192)
    again = opened(uri, model, "d", log)
    again.close("KILLED")
    assert steps(uri, again) == [64, 128, 192]
    assert stood < shown(uri, again)
    third = opened(uri, model, "d", more(log, 256))
    third.close("FINISHED")
    assert steps(uri, third) == [64, 128, 192, 256]


def test_runs_of_before_there_was_a_mark_are_gone_on_with(uri: str, model: str) -> None:
    client = MlflowClient(uri)
    tags = {"eqm.digest": f"{model}-d"}
    run = client.create_run(client.create_experiment(model), tags=tags)
    client.log_metric(run.info.run_id, "loss", 1.0, step=64)
    mirror = opened(uri, model, "d", a_log(64, 128))
    mirror.close("FINISHED")
    assert mirror.run_id == run.info.run_id
    assert steps(uri, mirror) == [64, 128]


def test_points_whose_mark_got_lost_are_sent_again_and_stand_once(uri: str, model: str) -> None:
    log = a_log(*range(64, 64 * 101, 64))
    first = opened(uri, model, "d", log)
    first.close("KILLED")
    assert steps(uri, first) == list(range(64, 64 * 101, 64))
    never = '{"event":"","images_seen":-1,"number":-1}'
    MlflowClient(uri).set_tag(str(first.run_id), "eqm.mirrored", never)
    again = opened(uri, model, "d", more(log, 6464))
    again.close("FINISHED")
    assert len(history(uri, again, "loss")) == 101
    assert shown(uri, again) == told(log)


def test_mlflow_that_goes_away_is_caught_up_with(
    uri: str, model: str, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setattr("eqm.registry.RETRY_SECONDS", 0.2)
    log = a_log(64)
    with relay(uri) as way:
        way.open = False
        mirror = opened(way.uri, model, "d", log)
        wait_for(lambda: mirror._warned)
        way.open = True
        wait_for(lambda: mirror.run_id is not None and steps(uri, mirror) == [64])
        way.open = False
        with_grid(more(log, 128))
        time.sleep(2)
        way.open = True
        mirror.close("FINISHED")
    assert shown(uri, mirror) == told(log)
    assert artifacts(uri, mirror.run_id, "samples") == [GRID]
    warned = capfd.readouterr().err
    assert warned.count("warning") == 1
    assert "Training goes on" in warned


def test_what_is_left_at_the_end_is_told_and_sent_by_the_next_start(
    uri: str, model: str, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eqm.registry.CLOSE_SECONDS", 2.0)
    log = with_grid(a_log(64, 128))
    mirror = opened(CLOSED, model, "d", log)
    wait_for(lambda: mirror._warned)
    mirror.close("FINISHED")
    warned = capfd.readouterr().err
    assert warned.count("Training goes on") == 1
    assert "did not take all of this run (3 points left" in warned
    assert "results are unaffected" in warned
    assert "Traceback" not in warned
    monkeypatch.undo()
    again = opened(uri, model, "d", log_of(log.to_bytes(), "log"))
    again.close("FINISHED")
    assert shown(uri, again) == told(log)
    assert artifacts(uri, again.run_id, "samples") == [GRID]


def test_a_grid_that_is_gone_holds_up_no_curve(uri: str, model: str, capfd) -> None:
    log = a_log(64)
    log.append("samples", 64, {"latent_distance": 2.0}, blobs={"grid.png": Blob.of(b"lost")})
    mirror = opened(uri, model, "d", commit(log))
    mirror.close("FINISHED")
    assert shown(uri, mirror) == told(log)
    assert artifacts(uri, mirror.run_id, "samples") == []
    assert "MLflow is not sent a grid of samples: lost" in capfd.readouterr().err


@pytest.mark.parametrize("make", [Registry, check])
def test_no_mlflow_is_one_message(make) -> None:
    with pytest.raises(TrackingError) as told:
        make(CLOSED)
    assert "127.0.0.1:9 cannot be reached" in str(told.value)
    assert "`eqm up`" in str(told.value)
    with pytest.raises(TrackingError, match="'nonsense': it must be an http:// address"):
        make("nonsense")


@pytest.mark.parametrize("where", ["127.0.0.1:9", "mlflow.invalid", "127.0.0.1:port"])
def test_passwords_are_not_told(where: str) -> None:
    with pytest.raises(TrackingError) as told:
        check(f"http://user:hidden@{where}")
    assert "hidden" not in str(told.value)


def test_an_address_with_a_user_is_asked(uri: str) -> None:
    check(uri.replace("http://", "http://user:hidden@"))


# -- helpers ------------------------------------------------------------------------------------


def opened(
    uri: str, model: str, digest: str, log: EventLog | None = None, params: dict | None = None
) -> RunMirror:
    full = digest if digest.startswith(model) else f"{model}-{digest}"
    return RunMirror(
        uri,
        experiment=model,
        run_name="run",
        digest=full,
        params=params or {},
        log=log or EventLog(),
        fetch=fetched,
    )


PICTURE = b"picture"
GRID = "samples/000000000128.png"


def fetched(blob: Blob) -> bytes:
    if blob != Blob.of(PICTURE):
        raise MissingError("lost")
    return PICTURE


def with_grid(log: EventLog) -> EventLog:
    log.append("samples", 128, {"latent_distance": 2.0}, blobs={"grid.png": Blob.of(PICTURE)})
    return commit(log)


_clock = itertools.count(1_790_000_000_000, 7)


def a_log(*positions: int) -> EventLog:
    """A log with points, which a checkpoint holds; no two logs have the same times."""
    log = EventLog(_clock.__next__)
    log.append("start", 0)
    return more(log, *positions)


def more(log: EventLog, *positions: int) -> EventLog:
    for images in positions:
        log.append("metrics", images, {"loss": 1.0 / images, "images_per_second": 10.0})
    return commit(log)


def commit(log: EventLog) -> EventLog:
    log.append("checkpoint", log.events[-1].images_seen)
    log.commit(log.segments())
    return log


Points = set[tuple[str, int, float, int]]
"""(name, step, value, time)."""


def told(log: EventLog) -> Points:
    return {
        (name, event.images_seen, value, event.at_ms)
        for event in log.events
        for name, value in event.figures.items()
    }


def shown(uri: str, mirror: RunMirror) -> Points:
    names = MlflowClient(uri).get_run(str(mirror.run_id)).data.metrics
    return {(m.key, m.step, m.value, m.timestamp) for n in names for m in history(uri, mirror, n)}


def history(uri: str, mirror: RunMirror, name: str) -> list:
    return list(MlflowClient(uri).get_metric_history(str(mirror.run_id), name))


def steps(uri: str, mirror: RunMirror) -> list[int]:
    return sorted(metric.step for metric in history(uri, mirror, "loss"))


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
    lose_answers_to: str = ""
    """The first answer to a call with this in its path is 500, though it was carried out."""
    lost: int = 0


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
            if way.lose_answers_to and way.lose_answers_to in self.path and not way.lost:
                way.lost += 1
                status, data = 500, b"{}"
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
