"""Training whose S3 fails in every way that it can: in the end the bits are the same.

A proxy spoils requests to a real S3 server (fault_proxy). Either a run ends in the bits of an
undisturbed one, or it says what to do and a second start does; no commit names what is not there.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import chain
import pytest
from fault_proxy import BODY, KINDS, Fault, FaultProxy

from eqm import checkpoint, s3
from eqm.config import Job, replace
from eqm.errors import EqmError, StoreError, TransferError
from eqm.records import Blob, to_json
from eqm.s3 import Bucket
from eqm.stage import job_digest
from eqm.storage import Store, open_store

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent
BATCH = 32
WRITES = "PUT|POST"
COMMITS = r"/checkpoints/[\d-]+\.json"
MOST_TRIES = 5 * s3.TRIES
"""Of one request: boto3 sends it five times, and we ask boto3 so often."""
CHECKPOINTS = 7
"""Of a training here."""

Proxied = Callable[..., FaultProxy]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.getbasetemp() / "chain", until="train")


@pytest.fixture
def proxied(
    s3_environment_once: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Proxied]:
    """Put a proxy with faults between this process and S3."""
    from botocore.retries.standard import ExponentialBackoff

    # Retries as many as ever, but without the seconds between them.
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.01)
    monkeypatch.setattr(s3, "REFUSED_SECONDS", 0.01)
    for name, value in s3_environment_once.items():
        monkeypatch.setenv(name, value)
    begun: list[FaultProxy] = []

    def begin(*faults: Fault, seed: int = 0) -> FaultProxy:
        proxy = FaultProxy(s3_environment_once["AWS_ENDPOINT_URL_S3"], *faults, seed=seed)
        begun.append(proxy.__enter__())
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        return proxy

    yield begin
    for proxy in begun:
        proxy.__exit__()


# -- one request --------------------------------------------------------------------------------


@dataclass
class Wire:
    """A bucket behind a proxy, the same without it, and a key of this test's own."""

    proxy: FaultProxy
    bucket: Bucket
    direct: Bucket
    key: str


@pytest.fixture(scope="module")
def direct(s3_environment_once: dict[str, str]) -> Bucket:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment_once.items():
            patch.setenv(name, value)
        return Bucket("eqm")


@pytest.fixture
def wire(proxied: Proxied, direct: Bucket, tmp_path: Path) -> Wire:
    return Wire(proxied(), Bucket("eqm"), direct, f"faults-{tmp_path.name}/a")


@pytest.mark.parametrize("kind", ["500 before", "503 before", "409 before", "412 before"])
def test_a_write_that_never_arrived_is_sent_again(wire: Wire, kind: str) -> None:
    wire.proxy.now(Fault(kind, "PUT", times=1))
    assert wire.bucket.create(wire.key, b"ours")
    assert wire.bucket.read(wire.key) == b"ours"
    assert wire.proxy.count(kind) == 1
    assert not wire.bucket.create(wire.key, b"theirs")


@pytest.mark.parametrize("kind", ["cut after", "silent after"])
def test_a_retry_that_meets_its_own_write_is_ours(
    wire: Wire, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "READ_SECONDS", 0.5)
    wire.proxy.now(Fault(kind, "PUT", times=1, seconds=1.0))
    assert Bucket("eqm").create(wire.key, b"ours")
    assert [one.status for one in wire.proxy.requests("PUT")] == [200, 412]


def test_a_retry_that_meets_the_write_of_another_is_not_ours(wire: Wire) -> None:
    wire.proxy.now(Fault("cut before", "PUT", times=1))

    def overtake(_: object) -> None:
        wire.direct.create(wire.key, b"them")

    with wire.proxy.watch("PUT", "/a", "before", overtake):
        assert not wire.bucket.create(wire.key, b"ours")
    assert wire.proxy.count("cut before") == 1
    assert wire.bucket.read(wire.key) == b"them"


@pytest.mark.parametrize("kind", BODY)
def test_a_body_that_is_cut_is_asked_for_again(wire: Wire, kind: str, tmp_path: Path) -> None:
    data = os.urandom(200_000)
    wire.bucket.create(wire.key, data)
    once = Fault(kind, "GET", times=1)
    wire.proxy.now(once)
    assert wire.bucket.read(wire.key) == data
    wire.proxy.now(once)
    assert wire.bucket.read(wire.key, 1000, 50_000) == data[1000:51_000]
    wire.proxy.now(once)
    assert [found.key for found in wire.bucket.list(wire.key)] == [wire.key]
    assert wire.proxy.count(kind) == 3
    wire.proxy.now(Fault(kind, "GET", most=None))
    with pytest.raises(TransferError, match=r"broke off.*run again"):
        wire.bucket.read(wire.key)
    with (tmp_path / "copy").open("wb") as file, pytest.raises(TransferError, match="broke off"):
        wire.bucket.download(wire.key, file)
    assert wire.proxy.most_asked() <= MOST_TRIES


@pytest.mark.parametrize("call", ["[?]uploads", "partNumber", "[?]uploadId=[^&]*$"])
def test_an_upload_in_parts_survives(
    wire: Wire, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    data = os.urandom(6 * 2**20)
    for kind in ("503 before", "cut before", "cut after"):
        wire.proxy.now(Fault(kind, WRITES, key=call, times=1))
        assert wire.bucket.create(f"{wire.key}-{kind}", data)
        assert wire.proxy.count(kind) == 1
        assert wire.direct.read(f"{wire.key}-{kind}") == data


def test_a_server_that_refuses_for_nothing_is_told(wire: Wire) -> None:
    wire.proxy.now(Fault("412 before", "PUT", most=None))
    with pytest.raises(StoreError, match="as if another had been faster, but none was: run again"):
        wire.bucket.create(wire.key, b"ours")
    assert wire.proxy.most_asked() <= MOST_TRIES


def test_a_failing_server_is_told_after_few_tries(wire: Wire) -> None:
    wire.proxy.now(Fault("503 before", most=None))
    with pytest.raises(StoreError, match=r"failed on s3://eqm/.*run again to go on"):
        wire.bucket.create(wire.key, b"ours")
    assert wire.proxy.most_asked() == 5


# -- a training ---------------------------------------------------------------------------------


def training(tiny: chain.Chain, folder: Path) -> Job:
    """The training job of the chain in S3, where it was never begun."""
    store = open_store(f"s3://eqm/faults-{folder.name}", cache=folder / "cache")
    for key in tiny.store.list(""):
        if not key.startswith("train/"):
            store.write_once(key, tiny.store.read(key))
    cache = str(folder / "cache")
    asked = tiny.job("train", cache=cache, checkpoint_every_images=100, patience_seconds=0)
    return replace(asked, runtime=replace(asked.runtime, store=store.uri))


def store_of(job: Job, cache: Path) -> Store:
    return open_store(job.runtime.store, cache=cache)


def commits(store: Store, job: Job) -> list[str]:
    return [k for k in store.list(f"train/{job_digest(job)}/") if re.search(COMMITS, k)]


def check_commits(store: Store, job: Job) -> None:
    """Every commit names files that are there, undamaged."""
    found = checkpoint.complete(store, job_digest(job))
    assert found
    for at in found:
        state = checkpoint.load(store, job_digest(job), at)
        assert state.events
        for blob in state.events.values():
            assert isinstance(blob, Blob)
            store.get(blob)


ENDURED = {
    "refusals": (
        Fault("500 before", probability=0.15),
        Fault("503 before", probability=0.15),
        Fault("409 before", "PUT", probability=0.15),
        Fault("412 before", "PUT", probability=0.15),
    ),
    "lost answers": (
        Fault("silent after", "PUT", COMMITS, times=1, seconds=3),
        Fault("409 after", "PUT", probability=0.15),
        Fault("412 after", "PUT", probability=0.15),
        Fault("cut before", probability=0.15),
        Fault("cut after", probability=0.15),
    ),
    "bodies": (
        Fault("short", "GET", probability=0.2),
        Fault("short, framed", "GET", probability=0.2),
        Fault("short, unframed", "GET", probability=0.2),
        Fault("slow", probability=0.2),
    ),
}


@pytest.mark.parametrize("name", ENDURED)
def test_training_endures(
    tiny: chain.Chain, tmp_path: Path, proxied: Proxied, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(s3, "READ_SECONDS", 2)
    proxy = proxied()
    job = training(tiny, tmp_path)
    proxy.now(*ENDURED[name])
    assert chain.run(job).content == tiny["train"].content
    assert all(proxy.count(fault.kind) >= 1 for fault in ENDURED[name]), proxy.seen
    assert proxy.most_asked() <= MOST_TRIES
    assert proxy.most_asked(again=True) <= CHECKPOINTS * MOST_TRIES
    proxy.now()
    check_commits(store_of(job, tmp_path / "other"), job)


def test_every_kind_of_fault_is_tried() -> None:
    tried = {fault.kind for faults in ENDURED.values() for fault in faults}
    assert {*tried, "stale"} == set(KINDS)


def test_a_checkpoint_that_is_not_read_whole_is_no_other_and_one_that_is_not_listed_is_found(
    tiny: chain.Chain, tmp_path: Path, proxied: Proxied, capfd: pytest.CaptureFixture[str]
) -> None:
    proxy = proxied()
    job = training(tiny, tmp_path)
    # Stopped by a server that fails at the seal; by then all checkpoints are there.
    proxy.now(Fault("503 before", "PUT", "record.json", most=None))
    with pytest.raises(StoreError, match="run again"):
        chain.run(job)
    held = checkpoint.newest(store_of(job, tmp_path / "cache"), job_digest(job))
    assert held is not None
    for kind in BODY:
        proxy.now(Fault(kind, "GET", COMMITS, most=None))
        with pytest.raises(EqmError, match=r"broke off.*run again"):
            chain.run(job)
    proxy.now(Fault("stale", key="list-type.*/checkpoints/", most=None))
    capfd.readouterr()
    assert chain.run(job).content == tiny["train"].content
    assert proxy.count("stale") >= 1
    assert f"goes on from image {held.images_seen:,}" in capfd.readouterr().err
    proxy.now()
    found = checkpoint.newest(store_of(job, tmp_path / "other"), job_digest(job))
    assert found is not None
    assert found.images_seen == held.images_seen
    check_commits(store_of(job, tmp_path / "other"), job)


FATAL = {
    "failing": Fault("503 before", "PUT", COMMITS, most=None),
    "gone": Fault("cut before", "PUT", "/sha256/", most=None),
    "lying": Fault("412 before", "PUT", COMMITS, most=None),
    "mute": Fault("cut after", "PUT", COMMITS, most=None),
}


def test_what_is_not_endured_is_told_and_a_second_start_ends_well(
    tiny: chain.Chain, tmp_path: Path, proxied: Proxied
) -> None:
    proxy = proxied()
    job = training(tiny, tmp_path)
    store = store_of(job, tmp_path / "other")
    for kind, fault in FATAL.items():
        proxy.now(fault)
        with pytest.raises(EqmError, match=r"run again to go on|check EQM_S3_ENDPOINT"):
            chain.run(job)
        proxy.now()
        assert store.record("train", job_digest(job)) is None
        # A commit whose answer was lost is one that stands.
        assert len(commits(store, job)) == (1 if kind == "mute" else 0), kind
    # Of each of the four starts.
    assert proxy.most_asked() <= len(FATAL) * MOST_TRIES
    assert proxy.most_asked(again=True) <= len(FATAL) * CHECKPOINTS * MOST_TRIES
    assert chain.run(job).content == tiny["train"].content
    check_commits(store, job)


def test_a_store_that_is_away_for_a_while_ends_no_training(
    tiny: chain.Chain, tmp_path: Path, proxied: Proxied, capfd: pytest.CaptureFixture[str]
) -> None:
    """What boto3 itself tries again is over at once here; all requests fail, the lease's too."""
    proxy = proxied()
    job = training(tiny, tmp_path)
    patient = replace(job, runtime=replace(job.runtime, patience_seconds=60.0))
    back = threading.Timer(1.5, proxy.now)

    def goes_away(_: object) -> None:
        if not back.is_alive() and not proxy.count("503 before"):
            proxy.now(Fault("503 before", most=None))
            back.start()

    with proxy.watch("PUT", COMMITS, "after", goes_away):
        assert chain.run(patient).content == tiny["train"].content
    back.join()
    said = capfd.readouterr().err
    assert re.search(r"run again to go on\. It is asked again for (5\d|60) s", said)
    assert "the store answers again, after " in said
    assert proxy.count("503 before") > 5
    check_commits(store_of(job, tmp_path / "other"), job)


MIX = (
    Fault("503 before", probability=0.05),
    Fault("cut before", probability=0.05),
    Fault("cut after", probability=0.05),
    Fault("409 before", "PUT", probability=0.05),
    Fault("412 after", "PUT", probability=0.05),
    Fault("short", "GET", probability=0.1),
    Fault("short, framed", "GET", probability=0.1),
    Fault("stale", probability=0.3),
    Fault("slow", probability=0.1),
)


@pytest.mark.slow
def test_a_process_that_is_stopped_among_faults_of_all_kinds(
    tiny: chain.Chain, tmp_path: Path, proxied: Proxied
) -> None:
    """What it says is durable is there, and is what the next one goes on from."""
    proxy = proxied(seed=1)
    job = training(tiny, tmp_path)
    file = tmp_path / "job.json"
    file.write_text(json.dumps(to_json(job)))
    proxy.now(*MIX)

    def start() -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "eqm.train", str(file)]
        return subprocess.Popen(
            line, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
        )

    child = start()
    with proxy.watch("PUT", COMMITS, "after", lambda _: child.send_signal(signal.SIGTERM)):
        _, said = child.communicate(timeout=240)
    told = re.search(r"stopped at image ([\d,]+) of 640, with a checkpoint there", said)
    assert child.returncode == 2, said
    assert told, said
    position = int(told[1].replace(",", ""))
    proxy.now()
    store = store_of(job, tmp_path / "other")
    found = checkpoint.newest(store, job_digest(job))
    assert found is not None
    assert found.images_seen == position
    check_commits(store, job)
    proxy.now(*MIX)
    child = start()
    _, said = child.communicate(timeout=240)
    assert child.returncode == 0, said
    assert f"goes on from image {position}" in said
    proxy.now()
    record = store.record("train", job_digest(job))
    assert record is not None
    assert record.content == tiny["train"].content
    check_commits(store, job)
    assert sum(proxy.count(kind) > 0 for kind in KINDS) >= 5
    assert proxy.most_asked() <= MOST_TRIES
    assert proxy.most_asked(again=True) <= CHECKPOINTS * MOST_TRIES


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
