"""Recipes load, build the paper's networks, and cost what docs/recipes.md says."""

import math
import tomllib
from pathlib import Path

import pytest

from bench import recipes as costs
from eqm.config import INCEPTION_SHA256, PipelineConfig, pipeline_config
from eqm.errors import ConfigError
from eqm.recipes import UNKNOWN_DIGEST, recipe, recipes, to_toml
from flows.plan import read_config

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
PAPER = {
    "EqM-S/2": 32_963_360,
    "EqM-S/4": 32_945_024,
    "EqM-S/8": 33_148_160,
    "EqM-B/2": 130_512_416,
    "EqM-B/4": 130_475_648,
    "EqM-B/8": 130_881_536,
    "EqM-L/2": 458_102_816,
    "EqM-L/4": 458_053_760,
    "EqM-L/8": 458_594_816,
    "EqM-XL/2": 675_129_632,
    "EqM-XL/4": 675_074_432,
    "EqM-XL/8": 675_683_072,
}
"""Of the released code, with its table of positions."""


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_survives_its_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(to_toml(recipe(name)))
    assert read_config(str(file)) == recipe(name).config
    assert pipeline_config(tomllib.loads(file.read_text())) == recipe(name).config


def test_a_file_says_what_to_expect_and_what_to_edit() -> None:
    text = to_toml(recipe("b2-256"))
    assert "# Expect: FID 32.85, Table 4" in text
    for key in ("source_uri", "uri", "sha256"):
        assert any(line.startswith(f"{key} =") and "  # " in line for line in text.splitlines())
    assert UNKNOWN_DIGEST in text
    assert max(map(len, to_toml(recipe("cifar10")).splitlines())) < 140


def test_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"recipe is 'b2'; it must be one of .*b2-256"):
        recipe("b2")


def test_all_models_of_the_paper_are_there_with_its_settings() -> None:
    small = {r.title: r for r in recipes().values() if r.name.endswith("-256")}
    assert small.keys() == PAPER.keys()
    for one in recipes().values():
        config: PipelineConfig = one.config
        if config.source.kind != "imagenet":
            continue
        train, objective = config.train, config.objective
        assert (train.batch_size, train.learning_rate, train.label_dropout) == (256, 1e-4, 0.1)
        assert (train.betas, train.weight_decay, train.warmup_images) == ((0.9, 0.999), 0, 0)
        assert 0.5 ** (256 / train.ema_half_life_images) == pytest.approx(0.9999, abs=1e-12)
        assert (objective.c, objective.a, objective.multiplier) == ("truncated", 0.8, 4.0)
        epochs = 1400 if one.name == "xl2-256-1400" else 80
        assert train.updates == epochs * 5004
        assert (config.generate.samples, config.generate.sampler.updates) == (50_000, 249)
        # What a recipe says of itself, and all 1,281,167 images: the others are held out.
        assert (train.precision, config.generate.sampler.precision) == ("bfloat16", "tf32")
        assert (config.source.mirror, config.source.held_out_fraction) == (True, 0.0)
        assert config.extractor.pretrained.sha256 == INCEPTION_SHA256


EXPECTED = {
    "s2-256": "61.0",
    "b2-256": "32.85",
    "b4-256": "57.54",
    "b8-256": "104.2",
    "l2-256": "17.7",
    "xl2-256": "15.6",
    "xl2-256-1400": "1.90",
}
"""FIDs of the paper: Figure 3, Tables 1, 4 and 5."""


def test_samplers_and_figures_are_those_of_the_paper() -> None:
    """XL/2 by NAG 0.0017 and 0.3, guided by 1.5 on three channels; the others by GD."""
    for one in recipes().values():
        config = one.config
        if config.source.kind != "imagenet":
            continue
        sampler, network = config.generate.sampler, config.network
        headline, large = one.name == "xl2-256-1400", one.title.startswith("EqM-XL")
        assert sampler.rule == ("nag" if headline else "gd"), one.name
        assert sampler.step_size == (0.0017 if large else 0.003), one.name
        assert not headline or sampler.momentum == 0.3
        guided = (1.5, 3) if headline else (1.0, None)
        assert (sampler.guidance, sampler.guidance_channels) == guided, one.name
        assert sampler.stop_below is None
        assert (network.time, network.second_head) == ("constant", True)
        fid = EXPECTED.get(one.name)
        told = f"FID {fid}," if fid else "not published"
        assert one.expected.startswith(told), one.name


def test_every_network_has_as_many_weights_as_said() -> None:
    for one in recipes().values():
        net = costs.network(one.config)
        assert costs.parameters(net) == one.parameters, one.name
        if one.name.endswith("-256"):
            assert one.parameters == PAPER[one.title]


def test_flops_are_those_of_the_formula() -> None:
    """Multiply-adds of a forward, layer by layer, written out."""
    net = costs.network(recipe("b2-256").config)
    width, depth, tokens, patch = 768, 12, 256, 4 * 2 * 2
    block = tokens * 12 * width**2 + 2 * tokens**2 * width + 6 * width**2
    ends = tokens * patch * width * 3 + 2 * width**2 + 256 * width + width**2
    assert costs.forward_flops(net) == 2 * (depth * block + ends)


def test_latents_are_as_large_as_their_arrays() -> None:
    one_mirror = 1_281_167 * 16 * 1024
    assert costs.latents_bytes(recipe("b2-256").config) == 2 * one_mirror
    assert costs.latents_bytes(recipe("b2-512").config) == 8 * one_mirror


def test_hours_are_flops_over_rate() -> None:
    hours = costs.gpu_hours(1_793_433_600, 237_200_000_000, 0.44)
    assert math.isclose(hours, 1_793_433_600 * 711.6e9 / (0.44 * 989e12) / 3600)


@pytest.mark.parametrize(
    ("name", "images_per_second"), [("s2-256", 7_196), ("b2-256", 2_851), ("xl2-256", 612)]
)
def test_hours_are_those_of_the_measured_rates(name: str, images_per_second: float) -> None:
    """docs/LOG.md, an H100: `python -m bench train`."""
    one = recipe(name)
    said = float(costs.hours(one, costs.forward_flops(costs.network(one.config))))
    assert said == pytest.approx(one.config.train.images / images_per_second / 3600, rel=0.02)


def test_what_was_not_measured_is_said_to_cost_more() -> None:
    for one in recipes().values():
        said = costs.hours(one, costs.forward_flops(costs.network(one.config)))
        known = one.name in {"s2-256", "b2-256", "xl2-256", "xl2-256-1400"}
        assert (said[0] not in "<>") == known, one.name


def test_the_page_has_the_table() -> None:
    assert costs.table() in PAGE.read_text(), (
        "docs/recipes.md is not what `python -m bench recipes` prints: put that in its place"
    )
