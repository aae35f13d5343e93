"""What a keeper does when it is told to end, with a worker and a program that only sleep."""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from flows import launch
from infra import orphans

PROJECT = Path(__file__).parents[2]
PROGRAM = """
import pathlib, signal, sys, time
def end(*_):
    time.sleep(0.5)
    pathlib.Path("checkpoint").touch()
    sys.exit()
signal.signal(signal.SIGTERM, end)
pathlib.Path("begun").touch()
time.sleep(60)
"""
WORKER = """
import os, signal, subprocess, sys, time
run = {**os.environ, "PREFECT__FLOW_RUN_ID": sys.argv[1], "_EQM_PROGRAM": "a"}
program = subprocess.Popen([sys.executable, "program.py"], env=run)
def end(*_):
    if sys.argv[2] == "tells":
        program.terminate()
    os._exit(0)
signal.signal(signal.SIGTERM, end)
time.sleep(60)
"""


@pytest.mark.parametrize("worker", ["tells", "leaves"])
def test_programs_may_make_their_checkpoints(worker: str, tmp_path: Path) -> None:
    """A keeper is the first process of a container: when it ends, all others are killed.

    Prefect's worker tells nobody: it kills the flow, and the flow's program learns nothing of it.
    """
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "worker.py").write_text(WORKER)
    # Programs of other workers of this machine are not waited for, and `eqm down` tells its own.
    mine = {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    if worker == "tells":
        mine["_EQM_SERVICE"] = uuid.uuid4().hex
    command = [sys.executable, "worker.py", str(uuid.uuid4()), worker]
    keeper = subprocess.Popen(
        [sys.executable, "-m", "infra.keeper", "a", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT), **mine},
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    keeper.terminate()
    assert keeper.wait(20) == 0
    assert (tmp_path / "checkpoint").exists()


def test_programs_are_known_by_what_their_flows_give_them() -> None:
    assert f"{launch.MARK}=".encode() == orphans.PROGRAM
