"""Ranks that fail while others wait for them in collectives that a network makes of its own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import chain
import pytest
import torch

from eqm.config import ComputeConfig
from eqm.distributed import World
from eqm.errors import PeerError
from eqm.records import to_json

ROOT = Path(__file__).parent.parent
CUT = (
    "[/builds/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
    "[127.0.0.1]:31. This is typically caused by a remote worker crashing. GLHF!"
)


def test_what_breaks_off_is_told_and_what_is_wrong_is_not_taken_for_it() -> None:
    world = World(1, 2, torch.device("cpu"))
    told = r"^rank 1 of 2 waited for the others .* \(Connection closed by peer \[127.0.0.1\]:31\)"
    with pytest.raises(PeerError, match=told), world.together():
        raise RuntimeError(CUT)
    with pytest.raises(PeerError), world.together():
        raise torch.distributed.DistBackendError("NCCL error")
    with pytest.raises(RuntimeError, match=r"^shapes"), world.together():
        raise RuntimeError("shapes do not fit")
    with pytest.raises(torch.OutOfMemoryError), world.together():
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("how", ["killed", "stalled"])
def test_a_rank_that_is_gone_or_silent_is_named_within_the_time_out(
    tmp_path: Path, parallel: str, how: str
) -> None:
    made = chain.build(tmp_path / "chain", until="train")
    left, job = tmp_path / "error", tmp_path / "job.json"
    compute = ComputeConfig(parallel=parallel)  # type: ignore[arg-type]
    wanted = chain.untrained(
        *(made, tmp_path),
        **{"compute": compute, "collective_timeout_seconds": 5.0, "error_file": str(left)},
    )
    job.write_text(json.dumps(to_json(wanted)))
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, *line, str(job), how],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert ended.returncode != 0
    assert left.read_text().startswith("rank 0 of 2 waited"), ended.stderr
    assert "and rank 1 does not answer" in left.read_text()
    assert "Traceback" not in ended.stderr.partition("elastic")[0]
    # Torchrun gives a rank 30 s to end in.
    assert time.monotonic() - began < 120


if __name__ == "__main__":
    from eqm import train

    plain = train.corrupted

    def fails(run: train.Run, batch: train.Batch) -> train.Corrupted:
        if run.world.rank == 1 and run.images_seen == 128:
            if sys.argv[2] == "killed":
                os.kill(os.getpid(), 9)
            time.sleep(600)
        return plain(run, batch)

    train.corrupted = fails
    sys.exit(train.main(sys.argv[1:2]))
