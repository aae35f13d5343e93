"""Digests are stable and tell apart; what was changed after sealing is refused."""

import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eqm.config import NetworkConfig, PipelineConfig, SamplerConfig, demo, with_settings
from eqm.errors import ConfigError, IntegrityError
from eqm.records import (
    Blob,
    LatentSpec,
    Record,
    Ref,
    canonical_bytes,
    digest,
    from_json,
    record_from_bytes,
    record_to_bytes,
    to_json,
)

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


def a_record(**changes: object) -> Record:
    values = {
        "stage": "train",
        "algorithm": 1,
        "config": {"train": {"images": 10}},
        "inputs": {"latents": Ref(stage="latents", digest="a" * 64, content="b" * 64)},
        "outputs": {"ema.safetensors": Blob(sha256="c" * 64, size_bytes=7)},
        "values": {"images_seen": 10},
        "provenance": {"began": "2026-01-01"},
    }
    return Record(**{**values, **changes})  # type: ignore[arg-type]


@given(PLAIN)
def test_canonical_bytes_survive_a_round_trip(value: object) -> None:
    assert canonical_bytes(json.loads(canonical_bytes(value))) == canonical_bytes(value)


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_without_json_form_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="finite"):
        digest({"x": value})


def test_record_round_trip_and_known_digest() -> None:
    record = a_record()
    assert record_from_bytes(record_to_bytes(record), "here") == record
    # Golden: addresses of sealed results must not move when this code changes.
    assert record.digest == "4612456a82c41058b0745421b6c0416871d8f8d80635e74c73c8d1b278e5638c"
    assert record.content == "571022ce7e7e4ea4884624fc32824969f40bd277cdd88d8296cabce36d02f220"


def test_provenance_and_logs_are_in_no_digest() -> None:
    first = a_record()
    second = a_record(provenance={"began": "2027"}, logs={"t": Blob(sha256="0" * 64, size_bytes=1)})
    assert (first.digest, first.content) == (second.digest, second.content)


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": 2},
        {"config": {"train": {"images": 11}}},
        {"inputs": {"latents": Ref(stage="latents", digest="a" * 64, content="d" * 64)}},
    ],
)
def test_all_that_is_asked_for_is_in_the_digest(changes: dict[str, object]) -> None:
    assert a_record(**changes).digest != a_record().digest


def test_outputs_and_values_are_in_the_content() -> None:
    assert a_record(values={"images_seen": 11}).content != a_record().content
    other = {"ema.safetensors": Blob(sha256="d" * 64, size_bytes=7)}
    assert a_record(outputs=other).content != a_record().content


@pytest.mark.parametrize("name", ["images_seen", "algorithm", "size_bytes", "began"])
def test_an_edited_record_is_refused(name: str) -> None:
    text = record_to_bytes(a_record()).decode()
    lines = text.splitlines(keepends=True)
    edited = "".join(_other_value(line) if f'"{name}"' in line else line for line in lines)
    assert edited != text
    if name == "began":
        record_from_bytes(edited.encode(), "here")
        return
    with pytest.raises(IntegrityError, match="changed after it was sealed"):
        record_from_bytes(edited.encode(), "here")


def _other_value(line: str) -> str:
    return line.replace("1", "2").replace("7", "8")


def test_half_a_record_is_refused() -> None:
    with pytest.raises(IntegrityError, match="not a record"):
        record_from_bytes(record_to_bytes(a_record())[:40], "here")


def test_config_round_trip() -> None:
    assert from_json(PipelineConfig, json.loads(json.dumps(to_json(demo())))) == demo()


def test_a_setting_that_came_later_moves_no_digest_until_it_is_used() -> None:
    usual, other = SamplerConfig(), SamplerConfig(precision="bfloat16")
    assert "precision" not in to_json(usual)
    assert to_json(other) == {**to_json(usual), "precision": "bfloat16"}
    assert from_json(SamplerConfig, to_json(other)) == other
    assert from_json(SamplerConfig, {**to_json(usual), "precision": "float32"}) == usual
    assert digest(usual) != digest(other)
    changed = with_settings(demo(), {"generate.sampler.precision": "bfloat16"})
    assert changed.generate.sampler.precision == "bfloat16"


def test_unknown_keys_are_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(
        ConfigError, match="unknown setting 'witdh' in network: did you mean 'width'"
    ):
        from_json(NetworkConfig, {"witdh": 64}, "network")


@dataclass(frozen=True)
class Sample:
    number: int
    share: float = 0.5
    name: str | None = None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "lacks number"),
        ({"number": "3"}, "must be of type int"),
        ({"number": True}, "must be of type int"),
        ({"number": 3, "share": "x"}, "must be of type float"),
        ({"number": 3, "share": float("nan")}, "must be finite"),
        ({"number": 3, "name": 4}, "must be of type str"),
        ([1], "must be a table"),
    ],
)
def test_wrong_types_are_refused_by_name(data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_json(Sample, data)


def test_integers_serve_as_floats() -> None:
    assert from_json(Sample, {"number": 3, "share": 1}) == Sample(3, 1.0)


def test_latent_spec_refuses_the_wrong_number_of_channels() -> None:
    with pytest.raises(ConfigError, match="4 channels"):
        LatentSpec(
            autoencoder="x",
            image_size_px=16,
            image_channels=1,
            shape=(4, 8, 8),
            shift=(0.0,),
            scale=(1.0,) * 4,
        )
