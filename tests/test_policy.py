"""A policy is refused in words before anything is judged by it; a file of its own stands alone."""

from pathlib import Path
from typing import Any

import pytest

from eqm.config import pipeline_config
from eqm.errors import ConfigError
from eqm.policy import MetricRule, OODRule, PolicyConfig
from eqm.records import from_json, to_json
from flows.plan import read_config

EXAMPLE = Path(__file__).parent.parent / "docs" / "policy.toml"


def policy(**table: Any) -> PolicyConfig:
    return from_json(PolicyConfig, table, "policy")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"minimum_samples": 0}, r"policy\.minimum_samples is 0"),
        ({"minimum_sample": 5}, "did you mean 'minimum_samples'"),
        ({"metrics": {"fid": {}}}, r"policy\.metrics\.fid is {}; it must be a table with one of"),
        ({"metrics": {"fid": {"by": "interval"}}}, "a table with one of maximum, minimum"),
        ({"metrics": {"fid": {"maximun": 3}}}, "did you mean 'maximum'"),
        ({"metrics": {"fid": {"maximum": "3"}}}, "must be of type float"),
        ({"metrics": {"fid": {"maximum": 1.0, "by": "end"}}}, r"metrics\.fid\.by is 'end'"),
        ({"metrics": {"fid": {"maximum_ratio": 1, "against": "x"}}}, "must be one of 'point', "),
        ({"metrics": {"fid": {"maximum_ratio": 0}}}, r"maximum_ratio is 0\.0; .* greater than 0"),
        ({"metrics": {"fid": {"maximum_increase": -1}}}, r"maximum_increase is -1\.0; .* 0 or gr"),
        ({"metrics": {"a": {"minimum": 2, "maximum": 1}}}, r"a\.minimum is 2\.0; .* maximum \(1\)"),
        ({"metrics": {"a": {"maximum": float("inf")}}}, "must be finite"),
        (
            {"minimum_recall": 0.3, "metrics": {"recall": {"minimum": 0.4}}},
            r"recall\.minimum is 0\.4; .* or as policy\.minimum_recall, not as both",
        ),
        ({"ood": {"textures": {"minimum_auroc": 1.1}}}, r"ood\.textures\.minimum_auroc is 1\.1"),
        ({"ood": {"textures": {}}}, "lacks minimum_auroc"),
        (
            {"minimum_auroc": {"x": 0.9}, "ood": {"x": {"minimum_auroc": 0.9}}},
            "or as policy.minimum_auroc, not as both",
        ),
        ({"required_studies": ["a", "a"]}, "names, each once"),
        ({"required_studies": "a"}, "must be a list"),
        ({"maximum_age_days": 0}, r"policy\.maximum_age_days is 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy(**table)


def test_short_settings_and_tables_are_one_set_of_rules() -> None:
    found = policy(
        maximum_distance=9.0,
        minimum_recall=0.3,
        metrics={"distance": {"maximum_increase": 0.5}, "fid": {"maximum": 3}},
    )
    assert found.rules == {
        "distance": MetricRule(maximum=9.0, maximum_increase=0.5),
        "recall": MetricRule(minimum=0.3),
        "fid": MetricRule(maximum=3.0),
    }
    assert PolicyConfig().rules == {"distance": MetricRule(maximum_ratio=1.0)}
    assert policy(**to_json(found)) == found


def test_the_example_in_the_docs_is_a_policy() -> None:
    found = read_config("demo", {"policy": str(EXAMPLE)}).policy
    assert found.metrics["distance"] == MetricRule(
        maximum=12.0, by="interval", maximum_ratio=1.02, against="interval"
    )
    assert found.ood == {"photographs": OODRule(minimum_auroc=0.75, by="interval")}
    assert found.maximum_age_days == 30


def test_a_file_beside_the_config_stands_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("minimum_samples = 7\n")
    config = tmp_path / "config.toml"
    config.write_text('preset = "demo"\npolicy = "mine.toml"\n')
    assert pipeline_config({"preset": "demo"}).policy.minimum_recall > 0
    assert read_config(str(config)).policy == PolicyConfig(minimum_samples=7)
    changed = read_config(str(config), {"policy.minimum_samples": 8})
    assert changed.policy == PolicyConfig(minimum_samples=8)
    given = read_config("demo", {"policy": str(tmp_path / "mine.toml")})
    assert given.policy == PolicyConfig(minimum_samples=7)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy .*none\.toml cannot be read: No such file"):
        read_config("demo", {"policy": str(tmp_path / "none.toml")})
    (tmp_path / "odd.toml").write_text("minimum_samples == 7")
    with pytest.raises(ConfigError, match=r"policy .*odd\.toml is not TOML"):
        read_config("demo", {"policy": str(tmp_path / "odd.toml")})


def test_tables_of_a_config_replace_those_of_its_preset() -> None:
    rules = {"metrics": {"fid": {"maximum": 3.0}}, "ood": {"textures": {"minimum_auroc": 0.9}}}
    found = pipeline_config({"preset": "demo", "policy": rules}).policy
    assert found.metrics == {"fid": MetricRule(maximum=3.0)}
    assert found.minimum_recall == 0.3, "what the table leaves out is the preset's"
