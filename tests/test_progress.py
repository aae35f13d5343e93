"""What long work says of itself where nobody sees a bar."""

import pytest

from eqm import progress
from eqm.progress import Progress


@pytest.mark.parametrize(
    ("left", "told"),
    [
        (59, "59 s"),
        (3569, "3569 s"),
        (3600, "1 h 0 min"),
        (7199, "2 h 0 min"),
        (172_740, "47 h 59 min"),
        (172_800, "2 d 0 h"),
        (30 * 86_400 + 5 * 3600, "30 d 5 h"),
    ],
)
def test_what_is_left_of_a_month_is_told_in_days(
    left: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    # Two images a second.
    with Progress("training", total=22 + 2 * left, done=0) as bar:
        bar.advance(0)
        now[0] += 11.0
        bar.advance(22)
        assert (
            capsys.readouterr().err
            == f"training: 22 of {22 + 2 * left:,} images, 2/s, {told} left\n"
        )
        bar.done = bar.total
    assert capsys.readouterr().err.endswith(f"{22 + 2 * left:,} images, {bar.per_second:,.0f}/s\n")
