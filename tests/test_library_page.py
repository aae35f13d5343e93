"""docs/library.md: its examples run as they stand, one after the other, and say what it says."""

import re
from pathlib import Path

import pytest
import torch

from eqm.config import ObjectiveConfig, TrainConfig
from eqm.recipes import HALF_LIFE, recipe

PAGE = Path(__file__).resolve().parent.parent / "docs" / "library.md"


@pytest.fixture(scope="module")
def told() -> dict:
    """All names that the examples leave behind."""
    names: dict = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small networks lose all of a second one where others work too
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    torch.set_num_threads(threads)
    return names


def test_its_examples_learn_and_sample(told: dict) -> None:
    assert told["learnt"].losses[-10:].mean() < 0.6 * told["learnt"].losses[:10].mean()
    x, label = told["held_out"], told["labels"][1500:]
    assert torch.equal(told["again"].gradient(x, label), told["model"].gradient(x, label))
    assert told["result"].auroc > 0.95
    made = told["reconstruct"](told["kept"], 0.08)
    assert made.expected_error < 0.01


def test_its_table_of_defaults_is_true(told: dict) -> None:
    ours, paper = TrainConfig(), told["paper"].train
    assert recipe("b2-256").config.train == paper
    assert (paper.learning_rate, paper.batch_size, paper.label_dropout) == (1e-4, 256, 0.1)
    assert (ours.learning_rate, ours.batch_size, ours.images) == (1e-3, 128, 200_000)
    assert (ours.ema_half_life_images, ours.label_dropout, ours.precision) == (1e4, 0.1, "float32")
    assert round(HALF_LIFE) == round(paper.ema_half_life_images) == 1_774_368
    c = ObjectiveConfig()
    assert (c.c, c.a, c.multiplier) == ("truncated", 0.8, 4.0)
    page = PAGE.read_text()
    for said in ("1,774,368", "10,000 images", "200,000", "1e-3, constant", "1e-4, constant"):
        assert said in page
