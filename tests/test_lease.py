"""One holder a token: in races of processes, and when holders die, sleep or are cut off."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from eqm import lease
from eqm.errors import IntegrityError, StoreError
from eqm.lease import HeldByAnotherError, LostLeaseError, Terms, acquire
from eqm.storage import LocalStore, Store, open_store

KEY = "train/x/lease.json"
SECONDS = 0.5
RACERS = 12


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.services)])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "store")
    request.getfixturevalue("s3_environment")
    return f"s3://eqm/test-{tmp_path.name}"


def race(uri: str, notes: str, seconds: float, environment: dict[str, str]) -> None:
    """Take the lease, leave a note of it, and die with it or give it back."""
    # The server that forks racers may be older than the S3 that they are to use.
    os.environ.update(environment)
    store = open_store(uri)
    held = acquire(store, KEY, seconds=seconds)
    with open(notes, "a") as file:
        file.write(f"{held.token} {os.getpid()} begins\n")
        file.flush()
        time.sleep(0.01)
        file.write(f"{held.token} {os.getpid()} ends\n")
    if held.token % 3 == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    held.release()


def test_of_racing_processes_one_holds_each_token(uri: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["eqm.lease"])
    notes = tmp_path / "notes"
    # So long that only the end of its holder, in order or not, frees it.
    given = (uri, str(notes), 300, dict(os.environ))
    racers = [context.Process(target=race, args=given) for _ in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(120)
    told = [line.split() for line in notes.read_text().splitlines()]
    assert [int(token) for token, *_ in told] == [n for n in range(1, RACERS + 1) for _ in "be"]
    assert all(
        one[1:] == [other[1], "begins"] for one, other in zip(told[::2], told[1::2], strict=True)
    )
    assert set(Counter(pid for _, pid, _ in told).values()) == {2}
    found = lease.read(open_store(uri), KEY)
    assert found is not None
    assert found.token == RACERS


def test_a_lease_that_does_not_change_is_taken_over_and_its_holder_is_told(
    uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(uri)
    first = acquire(store, KEY, seconds=SECONDS)
    began = time.monotonic()
    second = acquire(store, KEY, seconds=SECONDS, fix=lambda _: Terms(accepted=("a", "b")))
    assert time.monotonic() - began >= SECONDS
    assert (first.token, second.token) == (1, 2)
    assert f"process {os.getpid()} on " in capsys.readouterr().err
    second.check()
    before = store.read(KEY)
    for act in (first.check, first.check):
        with pytest.raises(LostLeaseError, match=rf"process {os.getpid()} on .*\(token 2\)"):
            act()
    first.release()
    assert first.is_lost
    assert store.read(KEY) == before
    found = lease.read(store, KEY)
    assert found is not None
    assert found.accepted == ("a", "b")


def test_who_holds_it_is_told_after_a_bounded_wait(uri: str) -> None:
    store = open_store(uri)
    with lease.held(store, KEY, seconds=1.0) as holder:
        began = time.monotonic()
        with pytest.raises(HeldByAnotherError, match=rf"process {os.getpid()} on \S+ is at work"):
            acquire(store, KEY, seconds=1.0)
        assert time.monotonic() - began >= 1.0
        holder.check()


def test_one_that_was_given_back_is_free_at_once(uri: str) -> None:
    store = open_store(uri)
    for token in (1, 2, 3):
        with lease.held(store, KEY, seconds=600) as holder:
            assert holder.token == token


def test_the_holder_that_fails_gives_it_back(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with pytest.raises(KeyboardInterrupt), lease.held(store, KEY, seconds=600):
        raise KeyboardInterrupt
    assert acquire(store, KEY, seconds=600).token == 2


HOLDER = """
import sys, time
from eqm import lease
from eqm.storage import open_store
lease.acquire(open_store(sys.argv[1]), sys.argv[2], seconds=600)
print("held", flush=True)
time.sleep(600)
"""


def test_the_lease_of_a_killed_process_of_this_machine_is_free_at_once(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    line = [sys.executable, "-c", HOLDER, str(tmp_path), KEY]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        found = lease.read(store, KEY)
        assert found is not None
        assert found.process.pid == child.pid
        assert not lease.is_dead(found.process)
        child.send_signal(signal.SIGSTOP)
        assert not lease.is_dead(found.process)
        child.kill()
        deadline = time.monotonic() + 60
        # Its parent has not asked for it: a pid alone would say that it lives.
        while not lease.is_dead(found.process) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert Path(f"/proc/{child.pid}").exists()
        assert acquire(store, KEY, seconds=600).token == 2


def test_a_pid_is_not_taken_for_a_process() -> None:
    here = lease.this_process()
    assert not lease.is_dead(here)
    assert lease.is_dead(replace(here, started=here.started - 1))
    assert lease.is_dead(replace(here, pid=2**22 + 1))
    # What another machine's pids mean cannot be told from here.
    for elsewhere in ({"host": "elsewhere"}, {"kernel": "another boot"}):
        assert not lease.is_dead(replace(here, pid=2**22 + 1, **elsewhere))
    assert not lease.is_dead(replace(here, pid=2**22 + 1, kernel=""))


class Deaf(LocalStore):
    """A store whose answers to changes get lost, while they arrive."""

    deaf = False

    def replace(self, key: str, data: bytes, version: str) -> str | None:
        done = super().replace(key, data, version)
        if self.deaf:
            raise StoreError("no answer")
        return done


def test_a_renewal_whose_answer_was_lost_loses_nothing(tmp_path: Path) -> None:
    store = Deaf(tmp_path)
    holder = acquire(store, KEY, seconds=SECONDS)
    store.deaf = True
    with pytest.raises(StoreError, match="no answer"):
        holder.check()
    store.deaf = False
    holder.check()
    assert not holder.is_lost


def test_a_store_that_is_away_for_a_while_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Deaf(tmp_path)
    with lease.held(store, KEY, seconds=0.1) as holder:
        store.deaf = True
        said = ""
        deadline = time.monotonic() + 60
        while "tried again: no answer" not in said and time.monotonic() < deadline:
            said += capsys.readouterr().err
        store.deaf = False
        holder.check()
    assert "tried again: no answer" in said


def test_it_is_renewed_while_it_is_held(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with lease.held(store, KEY, seconds=0.1):
        deadline = time.monotonic() + 60
        while renewals(store) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert renewals(store) >= 3
    # Often enough for a renewal to fail, and be tried again, before it is anybody else's.
    with lease.held(store, KEY, seconds=3.0):
        time.sleep(2.0)
        assert renewals(store) >= 1
    assert not any(thread.name == "lease" for thread in threading.enumerate())


def renewals(store: Store) -> int:
    found = lease.read(store, KEY)
    return 0 if found is None else found.renewals


def test_a_deleted_lease_is_lost_and_no_token_comes_twice(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    holder = acquire(store, KEY, seconds=SECONDS, fix=lambda _: Terms(above=6))
    assert holder.token == 7
    store.delete(KEY)
    with pytest.raises(LostLeaseError, match=re.escape(KEY) + ".*somebody deleted it"):
        holder.check()


def test_a_lease_that_is_damaged_while_it_is_held_is_lost(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with lease.held(store, KEY, seconds=0.3) as mine:
        while store.replace(KEY, b"no lease", store.read_version(KEY)[1]) is None:
            pass
        deadline = time.monotonic() + 60
        while not mine.is_lost and time.monotonic() < deadline:
            time.sleep(0.01)
        assert mine.is_lost
        with pytest.raises(IntegrityError, match=KEY):
            mine.check()


def test_what_happens_while_terms_are_fixed_is_no_takeover(tmp_path: Path) -> None:
    """A holder that wakes up in between keeps it: nothing that it does after is overlooked."""
    store = LocalStore(tmp_path)
    holder = acquire(store, KEY, seconds=SECONDS)
    woken: list[int] = []

    def fix(_: lease.Lease | None) -> Terms:
        if not woken:
            woken.append(1)
            holder.check()
        return Terms()

    with pytest.raises(HeldByAnotherError):
        acquire(store, KEY, seconds=SECONDS, fix=fix)
    holder.check()


def test_a_damaged_lease_is_refused_by_name(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    acquire(store, KEY, seconds=SECONDS)
    path = tmp_path / KEY
    path.write_text(path.read_text().replace('"token": 1', '"token": 3'))
    with pytest.raises(IntegrityError, match=re.escape(KEY)):
        acquire(store, KEY, seconds=SECONDS)
