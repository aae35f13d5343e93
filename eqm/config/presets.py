"""Configs that have names, and configs from tables of settings."""

import dataclasses
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from eqm.config.data import AutoencoderConfig, AutoencoderFit, ExtractorConfig, ExtractorFit
from eqm.config.evaluation import EvaluateConfig, GenerateConfig, OODConfig, SamplerConfig
from eqm.config.model import NetworkConfig, TrainConfig
from eqm.config.pipeline import PipelineConfig
from eqm.errors import ConfigError, require
from eqm.policy import PolicyConfig
from eqm.records import from_json, to_json


def demo() -> PipelineConfig:
    """The 1,797 digits of scikit-learn through a small fitted autoencoder, minutes on two cores."""
    return PipelineConfig(
        name="digits",
        train=TrainConfig(
            images=240_000,
            learning_rate=2e-3,
            warmup_images=6_400,
            decay_fraction=0.5,
            ema_half_life_images=8_000.0,
        ),
        # 100 updates of twice the paper's step: no worse on digits, and done in less than half.
        generate=GenerateConfig(sampler=SamplerConfig(step_size=0.006, updates=100)),
        policy=demo_policy(),
        processes=2,
        # Such small networks gain little from more, and lose all of it on a machine that is shared.
        threads=1,
    )


def demo_policy() -> PolicyConfig:
    """As many samples as there are digits, and floors that a broken model misses."""
    return PolicyConfig(
        name="demo",
        minimum_samples=1797,
        maximum_distance_ratio=1.05,
        minimum_recall=0.3,
        minimum_precision=0.5,
        minimum_label_agreement=0.9,
        minimum_auroc={"photographs": 0.75},
    )


def tiny() -> PipelineConfig:
    """The demo in seconds: every stage real, nothing learnt. For tests and first contact."""
    return PipelineConfig(
        name="tiny",
        autoencoder=AutoencoderConfig(fit=AutoencoderFit(widths=(8, 16), images=640)),
        extractor=ExtractorConfig(fit=ExtractorFit(width=8, dimension=16, images=640)),
        network=NetworkConfig(width=16, depth=1, heads=2),
        train=TrainConfig(images=1280, batch_size=64, ema_half_life_images=320.0),
        generate=GenerateConfig(samples=100, sampler=SamplerConfig(updates=5)),
        evaluate=EvaluateConfig(ood=OODConfig(images=40, descent_updates=3), grid_rows=2),
        policy=PolicyConfig(name="tiny", minimum_samples=100),
    )


OPEN_TABLES = {"minimum_auroc", "metrics", "ood", "further"}


PRESETS: dict[str, Callable[[], PipelineConfig]] = {
    "demo": demo,
    "tiny": tiny,
    # What recipes change: every default as it stands.
    "defaults": PipelineConfig,
}


def pipeline_config(
    data: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> PipelineConfig:
    """Build a pipeline config from a table; ``preset`` names the one it changes (else "demo").

    ``settings`` are changed as by :func:`with_settings`, before anything is checked: they may mend
    what the table has wrong. Raises ConfigError for unknown keys, wrong types and values out of
    range.
    """
    changes = dict(data)
    preset = changes.pop("preset", "demo")
    require(preset in PRESETS, "preset", preset, f"one of {', '.join(PRESETS)}")
    merged = _merged(to_json(PRESETS[preset]()), changes)
    return from_json(PipelineConfig, _changed(merged, settings or {}))


Table = Mapping[str, Any]


def _merged(base: Table, changes: Table) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        inner = merged.get(key)
        # A table with keys of the user's own is given whole, or none of them could be taken out.
        if isinstance(inner, dict) and isinstance(value, Mapping) and key not in OPEN_TABLES:
            merged[key] = _merged(cast("Table", inner), cast("Table", value))
        else:
            merged[key] = value
    return merged


def with_settings(config: PipelineConfig, settings: Mapping[str, Any]) -> PipelineConfig:
    """Change single settings by dotted name, as ``{"train.images": 1000}``. Raises ConfigError."""
    return from_json(PipelineConfig, _changed(to_json(config), settings))


def _changed(data: Table, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A table of a pipeline config with some settings of other values, unchecked."""
    # What was not merged is the caller's own.
    changed = _copied(data)
    for dotted, value in settings.items():
        *path, last = dotted.split(".")
        table, kind = changed, PipelineConfig
        for part in path:
            table, kind = _inner(table, kind, part)
        # Tables may be extended by a misspelt key here; from_json refuses it by name.
        if not isinstance(table, dict):
            was = "" if table is None else f": it is {table!r}"
            raise ConfigError(f"there is no table {'.'.join(path)!r} to set {last!r} in{was}")
        table[last] = _copied(value)
    return changed


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in cast("Table", value).items()}
    return value


def _inner(table: Any, kind: Any, part: str) -> tuple[Any, Any]:
    """What has a name in a table of a class, and its own class; what is left out has its default.

    None for both where there is none.
    """
    if not isinstance(table, dict):
        return None, None
    found, hint = cast("dict[str, Any]", table), None
    if dataclasses.is_dataclass(kind):
        hint = get_type_hints(kind).get(part)
        default = next(
            (f.default_factory for f in dataclasses.fields(kind) if f.name == part), None
        )
        if part not in found and callable(default):
            found[part] = to_json(default())
    elif get_origin(kind) is dict:
        hint = get_args(kind)[1]
    # Of a table that may be null.
    choices = [one for one in get_args(hint) if dataclasses.is_dataclass(one)]
    optional = get_origin(hint) in (Union, UnionType) and len(choices) == 1
    return found.get(part), choices[0] if optional else hint


def replace(config: Any, /, **changes: Any) -> Any:
    """Copy of a frozen config with some fields changed, checked again."""
    return dataclasses.replace(config, **changes)
