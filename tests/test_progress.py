"""What long work says of itself where nobody sees a bar."""

import io
import sys

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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("count", "rate"), [(30_000, "3,000/s"), (125, "12/s"), (40, "4/s"), (3, "0.3/s")]
)
@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_the_rate_is_told_in_a_terminal_and_elsewhere(
    count: int, rate: str, kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, shown = [100.0], kind()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", shown)
    for name, value in (("TERM", "xterm"), ("COLUMNS", "200"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    # What was there before is no work of this run.
    with Progress("encoding", total=10**6, done=5000) as bar:
        bar.advance(0)
        now[0] += 10.0
        bar.advance(count)
    told = shown.getvalue()
    assert f" {rate}" in told
    assert f"{5000 + count:,}" in told.replace(f"{5000 + count}/", f"{5000 + count:,}/")
