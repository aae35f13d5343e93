"""Every setting a user can get wrong is refused in words, before anything is begun."""

from typing import Any

import pytest

from eqm.config import (
    ALGORITHMS,
    PRESETS,
    PROGRAMS,
    NetworkConfig,
    ObjectiveConfig,
    PipelineConfig,
    TrainConfig,
    demo,
    demo_policy,
    method,
    pipeline_config,
    stage_config,
    with_settings,
)
from eqm.errors import ConfigError
from eqm.pictures import digits
from eqm.records import to_json


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name: str) -> None:
    assert pipeline_config({"preset": name}) == PRESETS[name]()
    assert pipeline_config(to_json(PRESETS[name]())) == PRESETS[name]()


def test_the_demo_judges_as_many_samples_as_there_are_digits_and_by_floors() -> None:
    """The demo's policy says how few samples it is content with; any other wants 50,000."""
    policy, config = demo_policy(), demo()
    assert config.policy == policy
    assert policy.name == "demo"
    assert policy.minimum_samples == config.generate.samples == len(digits()[1]) == 1797
    assert PipelineConfig().policy.minimum_samples == 50_000
    # Of ten classes and of two sets: what a model that has learnt nothing gets is far below.
    assert policy.minimum_label_agreement == 0.9
    assert policy.minimum_auroc == {"photographs": 0.75}
    assert min(policy.minimum_recall, policy.minimum_precision) >= 0.3
    assert config.generate.sampler.guidance == 1
    assert config.processes == 2, "torchrun is part of what the demo shows"


def test_every_stage_has_a_program_and_a_number() -> None:
    assert ALGORITHMS.keys() == PROGRAMS.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trian": {}}, "did you mean 'train'"),
        ({"train": {"batchsize": 3}}, "did you mean 'batch_size'"),
        ({"preset": "demmo"}, "preset is 'demmo'"),
        ({"train": {"batch_size": 0}}, "train.batch_size is 0"),
        ({"train": {"images": -5}}, "train.images is -5"),
        ({"train": {"label_dropout": 1.0}}, "train.label_dropout"),
        ({"train": {"betas": [0.9, 1.0]}}, "train.betas"),
        ({"train": {"learning_rate": "fast"}}, "must be of type float"),
        ({"train": {"warmup_images": -1}}, "train.warmup_images"),
        ({"train": {"decay_fraction": 1.5}}, "train.decay_fraction"),
        ({"train": {"gradient_clip": 0}}, "train.gradient_clip"),
        ({"train": {"seed": -1}}, "train.seed"),
        ({"train": {"ema_tracks": [0]}}, r"train\.ema_tracks is 0\.0; it must be half-lives"),
        ({"train": {"ema_tracks": [8000, 8000.0]}}, "different ones, each named once"),
        ({"train": {"ema_tracks": 8000}}, r"train\.ema_tracks is 8000; it must be a list"),
        ({"train": {"ema_power": [0.05, 0.3]}}, r"train\.ema_power is 0\.3; .* at most 12"),
        ({"train": {"ema_power": [-0.05]}}, r"train\.ema_power is -0\.05"),
        ({"train": {"ema_power": [0.05, 0.05]}}, "different ones, each named once"),
        ({"train": {"ema_snapshot_images": 0}}, r"train\.ema_snapshot_images is 0"),
        ({"train": {"batch_size": 127}, "processes": 2}, "a multiple of processes"),
        ({"network": {"heads": 5}}, "network.width is 64"),
        ({"objective": {"c": "truncate"}}, "did you mean 'truncated'"),
        ({"objective": {"a": 1.0}}, "objective.a"),
        ({"objective": {"c": "piecewise", "a": 0}}, "objective.a"),
        ({"objective": {"multiplier": 0}}, "objective.multiplier"),
        ({"source": {"kind": "folder"}}, "source_uri is None"),
        ({"source": {"kind": "folder"}, "source_uri": ""}, "source_uri is ''; it must be where"),
        ({"source": {"channels": 2}}, "source.channels"),
        ({"source": {"mirror": True}}, "a mirrored digit"),
        ({"source": {"held_out_fraction": 1.0}}, "held_out_fraction"),
        ({"autoencoder": {"kind": "pretrained"}}, "give its uri and sha256"),
        ({"autoencoder": {"fit": {"widths": [12]}}}, "multiples of 8"),
        ({"extractor": {"kind": "inception"}}, "torch-fidelity"),
        (
            {"extractor": {"kind": "inception", "pretrained": {"uri": "x", "sha256": "1"}}},
            "64 hexadecimal digits",
        ),
        ({"generate": {"samples": 0}}, "generate.samples"),
        ({"generate": {"sampler": {"momentum": 1.0}}}, "sampler.momentum"),
        ({"generate": {"first_seed": -1}}, r"generate\.first_seed is -1; it must be 0 or greater"),
        (
            {"generate": {"first_seed": 2**43 - 100, "samples": 101}},
            "first_seed is 8796093022108; .* at most 8796093022107 with generate.samples 101: s",
        ),
        ({"generate": {"samples": 2**44}}, "samples is 17592186044416; it must be at most 87960"),
        ({"threads": 0}, "threads is 0; it must be from 1 to 1024, or null for all cores, shared"),
        ({"threads": 100_000}, "threads is 100000; it must be from 1 to 1024"),
        ({"policy": {"minimum_recall": 1.5}}, "policy.minimum_recall"),
        ({"name": "../etc"}, "letters, digits and dashes"),
    ],
)
def test_wrong_settings_are_refused_in_words(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline_config(changes)


def test_the_last_seeds_and_most_threads_are_taken() -> None:
    last = {"first_seed": 2**43 - 100, "samples": 100}
    config = pipeline_config({"generate": last, "threads": 1024})
    assert (config.generate.first_seed, config.threads) == (2**43 - 100, 1024)


def test_single_settings_by_dotted_name() -> None:
    changed = with_settings(demo(), {"train.images": 1000, "generate.sampler.updates": 5})
    assert (changed.train.images, changed.generate.sampler.updates) == (1000, 5)
    with pytest.raises(ConfigError, match="unknown setting 'imags'"):
        with_settings(demo(), {"train.imags": 1})
    with pytest.raises(ConfigError, match="no table 'trian'"):
        with_settings(demo(), {"trian.images": 1})


def test_sizes_of_the_paper() -> None:
    assert NetworkConfig.size("XL", patch=2) == NetworkConfig(width=1152, depth=28, heads=16)
    with pytest.raises(ConfigError, match="S, B, L, XL"):
        NetworkConfig.size("M", patch=2)


def test_updates_cover_all_images() -> None:
    assert TrainConfig(images=1000, batch_size=128).updates == 8


def test_moments_at_which_averages_are_kept() -> None:
    def kept(**settings: Any) -> tuple[int, ...]:
        return TrainConfig(batch_size=64, ema_power=(0.05,), **settings).snapshots

    assert TrainConfig(ema_snapshot_images=10).snapshots == ()
    # 32 a run, equally spaced, and all updates of a shorter one.
    assert kept(images=64 * 320) == tuple(range(640, 64 * 320 + 1, 640))
    assert kept(images=64 * 3) == (64, 128, 192)
    assert len(kept(images=64 * 1000)) == 32
    assert kept(images=64 * 1000)[-1] == 64 * 1000
    # The updates that reach a multiple, and the last one; of many in one update, once.
    assert kept(images=640, ema_snapshot_images=128) == (128, 256, 384, 512, 640)
    assert kept(images=600, ema_snapshot_images=200) == (256, 448, 640)
    assert kept(images=192, ema_snapshot_images=10) == (64, 128, 192)
    assert kept(images=192, ema_snapshot_images=10**9) == (192,)


def test_stage_config_is_typed() -> None:
    config = demo()
    asked = {k: to_json(getattr(config, k)) for k in ("network", "objective", "train")}
    assert stage_config("train", asked).train == config.train
    with pytest.raises(ConfigError, match="stage is 'trane'"):
        stage_config("trane", {})


def test_where_images_lie_is_in_no_stage_config() -> None:
    config = PipelineConfig(source=demo().source, source_uri="somewhere")
    assert "somewhere" not in str(to_json(config.source))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: TrainConfig(images=1e6), "train.images is 1000000.0; it must be a whole number"),
        (lambda: TrainConfig(images="10"), "train.images is '10'; it must be a whole number"),
        (lambda: TrainConfig(batch_size=True), "train.batch_size is True; it must be a whole"),
        (lambda: TrainConfig(gradient_clip="1"), "train.gradient_clip is '1'; it must be a number"),
        (lambda: NetworkConfig(depth=2.5), "network.depth is 2.5; it must be a whole number"),
        (lambda: ObjectiveConfig(a=None), "objective.a is None; it must be a number"),
    ],
)
def test_numbers_of_another_kind_are_refused_in_python_too(make: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make()


def test_a_model_is_called_by_the_names_of_the_papers_tables() -> None:
    names = {
        ("none", "truncated", "implicit"): "EqM",
        ("constant", "linear", "implicit"): "EqM",
        ("conditioned", "truncated", "implicit"): "noise-conditioned EqM",
        ("none", "truncated", "dot"): "EqM-E (dot)",
        ("none", "truncated", "l2"): "EqM-E (L2)",
        ("conditioned", "constant", "implicit"): "flow matching",
        ("none", "constant", "implicit"): "noise-unconditional flow matching",
    }
    for (time, c, energy), name in names.items():
        network = NetworkConfig(time=time)  # type: ignore[arg-type]
        objective = ObjectiveConfig(c=c, energy=energy)  # type: ignore[arg-type]
        assert method(network, objective) == name
