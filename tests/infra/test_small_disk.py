"""The embedded S3 on a disk that is really full says so, loses nothing, and goes on with room."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_disk

from infra.services import LEAST_FREE_MB

pytestmark = [pytest.mark.slow, pytest.mark.services]
ROOT = Path(__file__).parent.parent.parent
MIB = 2**20
SIZE_BYTES = (LEAST_FREE_MB + 700) * MIB
LOOKS_SECONDS = 60
"""How often SeaweedFS looks at what is free."""

PROGRAM = """
import json, os, sys
from pathlib import Path
from eqm.errors import AwayError
from eqm.s3 import Bucket
from infra import local
from infra.stack import External

home, verb, name = Path(sys.argv[1]), *sys.argv[2:]
told = []
if verb == "up":
    local.up(
        home, external=External(worker=False), environ=dict(os.environ), report=told.append,
        services=("s3",),
    )
elif verb == "down":
    local.down(home, report=told.append)
else:
    stack = local.load(home)
    told = [next(s.state for s in local.status(home)), local.shortage(home)]
if verb in ("write", "read"):
    os.environ.update(stack.environment())
    bucket = Bucket(stack.s3_bucket)
    try:
        if verb == "write":
            told.append(bucket.create(name, name.encode() * 2**17))
        else:
            told.append(bucket.read(name) == name.encode() * 2**17)
    except AwayError as error:
        told.append(str(error))
print(json.dumps(told))
"""


class Home:
    """A home of services on the small disk, which each of its verbs enters."""

    def __init__(self, disk: small_disk.SmallDisk) -> None:
        self.disk = disk

    def __call__(self, verb: str, name: str = "") -> list[Any]:
        taken = ("EQM_", "AWS_", "MLFLOW_", "PREFECT_")
        environ = {k: v for k, v in os.environ.items() if not k.startswith(taken)}
        line = [sys.executable, "-c", PROGRAM, str(self.disk.folder / "eqm"), verb, name]
        done = subprocess.run(
            [*self.disk.within(), *line],
            env=environ, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def until(self, wanted: bool) -> Any:
        """Write until that succeeds, or until it does not; what the other one was told."""
        ends = time.monotonic() + LOOKS_SECONDS + 30
        while time.monotonic() < ends:
            *_, told = self("write", f"key-{time.monotonic_ns()}")
            if (told is True) == wanted:
                return told
            time.sleep(2)
        raise AssertionError(f"writes still {'fail' if wanted else 'succeed'}: {told}")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with small_disk.SmallDisk(tmp_path / "disk", SIZE_BYTES) as disk:
        made = Home(disk)
        made("up")
        yield made
        made("down")


@pytest.mark.parametrize("left_mb", [0, LEAST_FREE_MB // 2])
def test_it_is_told_and_goes_on_with_room(home: Home, left_mb: int) -> None:
    assert home("write", "before") == ["running", None, True]
    home.disk.fill(left_bytes=left_mb * MIB)
    state, short = home("status")
    assert state == "full"
    assert f"{home.disk.folder}/eqm has {left_mb} MiB left" in short
    if left_mb:
        assert short in home("up")
    said = home.until(False)
    assert "look at the server (is its disk full?), then run again to go on" in said
    # What was there is read all the same.
    assert home("read", "before")[-1] is True
    home.disk.make_room()
    assert home("status") == ["running", None]
    assert home.until(True) is True
    assert home("read", "before")[-1] is True
    assert home("write", "before")[-1] is False


def test_it_can_be_stopped_and_keeps_what_it_has(home: Home) -> None:
    assert home("write", "before")[-1] is True
    home.disk.fill(left_bytes=0)
    *_, said = home("down")
    assert said.endswith("cannot be written (No space left on device); all is stopped all the same")
    assert home("status") == ["stopped", home("status")[1]]
    home.disk.make_room()
    home("up")
    assert home("read", "before") == ["running", None, True]
