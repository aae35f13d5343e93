"""A rank and then torchrun are killed while a checkpoint is being made: the same bits, and nobody
left. The long form, with everything killed at every moment, is ``make chaos``; that it asks for all
of them, and counts, is tested here."""

from pathlib import Path

import chaos
import pytest
from chaos import Row, Strike


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(900)
def test_killed_twice_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    made = chaos.make_chain(tmp_path / "chain", updates=120)
    # It starts S3 by chaos.serve, with local.up: in the process of those who need services.
    strikes = [Strike("rank", "files there, no seal"), Strike("agent", "sealed, answer lost")]
    rows = chaos.run(made, 2, strikes, folder=tmp_path, seed=0)
    assert [row.strike for row in rows] == strikes
    assert 0 < rows[0].position < rows[1].position
    # Each was a real end of the run, and each next start went on from where it was.
    assert all(chaos.resumed(row.next) for row in rows), chaos.table(rows)


@pytest.mark.parametrize("rounds", [1, 3])
def test_every_victim_is_struck_at_every_place(rounds: int) -> None:
    for seed in range(5):
        strikes = chaos.all_strikes(seed, rounds)
        assert len(strikes) == len(set(strikes)) == rounds * len(chaos.VICTIMS) * len(chaos.MOMENTS)
        # Whoever is left without its flow is ended before the next one is struck.
        for one, then in zip(strikes, [*strikes[1:], None], strict=True):
            if one.victim == "flow":
                assert then is not None
                assert then.victim in ("rank", "agent")


def test_too_few_kills_are_told() -> None:
    rows = [Row(strike, 0, 0, killed=[1]) for strike in chaos.all_strikes(0, 3)]
    assert chaos.tally(rows, 3).count(" 3") == len(chaos.VICTIMS) * len(chaos.MOMENTS)
    rows[-1].killed = []
    with pytest.raises(
        AssertionError, match=f"{rows[-1].strike.moment}: .*{rows[-1].strike.victim}"
    ):
        chaos.tally(rows, 3)
