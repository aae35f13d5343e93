"""Benchmarks that are run on the one day when there is a GPU do not fail then for what can be seen
here."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

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


def test_kernels_are_measured_without_an_error() -> None:
    """Of few numbers, in a process whose Triton interprets."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    titles = [line for line in done.stdout.splitlines() if line.startswith("-- ")]
    assert [title.partition(", ")[2].partition(",")[0] for title in titles] == [
        *("attention", "GELU", "norm"),
        *("attention's FORWARD", "attention's TO_QUERIES", "attention's TO_KEYS"),
        "GELU's backward",
        *("adaLN's forward", "adaLN's backward"),
        "gradients of a block's weights of 1 images",
    ]
    assert "one product  " in done.stdout
    # What is set is among what was tried, and nothing that was tried failed.
    assert done.stdout.count("<-") == 6
    assert done.stdout.count(": ") == 2 + 2 + 1 + 2 + 2 * 2


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_product_adds_to_its_sum(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """On a CPU the numbers; by the GPU's call, that torch knows it by these arguments."""
    monkeypatch.syspath_prepend(ROOT)
    from bench.kernels import add_product

    torch.manual_seed(0)
    dy, x, onto = (torch.randn(*s, device=device) for s in ((7, 3), (7, 5), (3, 5)))
    dy, x = dy.bfloat16(), x.bfloat16()
    wanted = onto.double() + dy.double().t() @ x.double()
    add_product(onto, dy, x)
    assert (onto.dtype, onto.shape) == (torch.float32, wanted.shape)
    if device == "cpu":
        assert torch.allclose(onto.double(), wanted, atol=1e-5)


# -- in the process that interprets -------------------------------------------------------------


def few(kernels: ModuleType) -> None:
    """So little of all that it takes seconds here, by kernels that torch has for a CPU."""
    from eqm.kernels import adaln, attention, gelu

    kernels.IMAGES, kernels.TOKENS, kernels.ROUNDS, kernels.TIMES = 1, 5, 1, 1
    kernels.SIZES = {"XL": (1, 24)}
    usual = (attention.FORWARD, attention.TO_QUERIES)
    kernels.TILES = [(tiles.queries, tiles.keys, tiles.warps, tiles.stages) for tiles in usual]
    kernels.WALKS = [(8, 4), (adaln.WALK, adaln.WARPS)]
    kernels.PIECES = [(2, 16, 2, 4), (gelu.ROWS, gelu.COLUMNS, gelu.STEPS, gelu.WARPS)]
    kernels.compiled = lambda way: way
    # There are no kernels of a GPU to count here.
    kernels.of_kernels = lambda runs: kernels.alternate(runs, rounds=1)
    kernels.sdpa_kernel = lambda _: contextlib.nullcontext()
    torch.manual_seed(0)


def main() -> None:
    from bench import kernels

    few(kernels)
    for part in (kernels.compare, kernels.tile, kernels.accumulate):
        part("XL")


if __name__ == "__main__":
    main()
