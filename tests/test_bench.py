"""Benchmarks that are run on the one day when there is a GPU do not fail then for what can be seen
here."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_each_measurement_of_a_gpu_is_shown_as_it_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command there may be cut short."""
    monkeypatch.syspath_prepend(ROOT)
    import torch._dynamo

    from bench import train

    shown: list[int] = []

    def timed(*_: object) -> tuple[float, int]:
        shown.append(capsys.readouterr().out.count("images/s"))
        assert torch._dynamo.config.recompile_limit == 8 * len(train.SIDES)
        return 0.5, 2**30

    monkeypatch.setattr(train, "timed", timed)
    monkeypatch.setattr(train, "work", lambda _: 1.0)
    with torch._dynamo.config.patch(recompile_limit=8):
        train.compare_on_gpu("B", 256, 1e12)
    first, second, *others = shown
    # The largest batch of the plain side is looked for first.
    assert (first, second) == (0, 0)
    assert set(others) == {1}
    with pytest.raises(SystemExit, match="no size 'Q'; there are S, B on this machine"):
        train.main("Q")
