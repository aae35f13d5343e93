"""A rank and then torchrun are killed while a checkpoint is being made: the same bits, and nobody
left. The long form, with everything killed at every moment, is ``make chaos``."""

from pathlib import Path

import chaos
import pytest
from chaos import Strike

pytestmark = [pytest.mark.slow, pytest.mark.services, pytest.mark.timeout(900)]


def test_killed_twice_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    made = chaos.make_chain(tmp_path / "chain", updates=60)
    # It starts S3 by chaos.serve, with local.up: in the process of those who need services.
    strikes = [Strike("rank", "files there, no seal"), Strike("agent", "sealed, answer lost")]
    rows = chaos.run(made, 2, strikes, folder=tmp_path, seed=0)
    assert [row.strike for row in rows] == strikes
    assert 0 < rows[0].position < rows[1].position
    # Each was a real end of the run, and each next start went on from where it was.
    assert all(chaos.resumed(row.next) for row in rows), chaos.table(rows)
