"""A plan: what a config asks for reaches the programs that do it."""

from pathlib import Path

import pytest

from eqm import fit
from eqm.errors import ConfigError, TrackingError
from eqm.recipes import recipes
from eqm.stage import run
from flows.plan import (
    autoencoder_job,
    check_network,
    check_training,
    list_source,
    make_plan,
    read_config,
    source_ref,
)


def test_how_training_runs_is_told_to_it_and_is_in_no_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EQM_STORE", str(tmp_path / "store"))
    changes = {
        "compute.timeout_seconds": 7.0,
        "compute.micro_batch": 16,
        "checkpoints.every_images": 512,
        "checkpoints.keep": 5,
        "checkpoints.grid_every_images": 1024,
    }
    told = make_plan("demo", changes, tracked=False).runtime("train")
    assert told.collective_timeout_seconds == 7.0
    assert told.compute.micro_batch == 16
    assert told.checkpoint_every_images == 512
    assert told.keep_checkpoints == 5
    assert told.grid_every_images == 1024
    assert read_config("demo", changes).train == read_config("demo").train


@pytest.mark.parametrize("name", ["checkpoints.every_images", "checkpoints.keep"])
def test_a_checkpoint_at_no_time_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0; it must be greater than 0"):
        read_config("demo", {name: 0})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compute.micro_batch": 7}, r"micro_batch is 7; .*divisor of the 64 images"),
        ({"compute.parallel": "fsdp2", "processes": 1}, r"'fsdp2'.*there is one: set processes"),
        ({"compute.parallel": "fsdp2", "objective.loss": "norms"}, r"with compute\.parallel"),
        (
            {"compute.compile": True, "objective.energy": "dot", "objective.backward": "double"},
            r"compute\.compile is true, but compiled code has no double backward",
        ),
        ({"network.kind": "unet", "compute.checkpointing": True}, r"False for a U-Net"),
    ],
)
def test_what_training_would_refuse_is_refused_before_images_are_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], words: str
) -> None:
    monkeypatch.setenv("EQM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EQM_STORE", str(tmp_path / "store"))
    with pytest.raises(ConfigError, match=words):
        make_plan("demo", changes, tracked=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"network.patch": 3}, "16 x 16 cannot be cut into patches of 3.* a network.patch that"),
        (
            {"network.kind": "unet", "network.unet": {"widths": [32] * 6, "attention": []}},
            "16 x 16 cannot be halved 5 times: give network.unet.widths fewer",
        ),
    ],
)
def test_a_network_that_latents_do_not_fit_is_refused_before_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], words: str
) -> None:
    monkeypatch.setenv("EQM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EQM_STORE", str(tmp_path / "store"))
    identity = {"autoencoder": {"kind": "identity"}}
    plan = make_plan("demo", identity, tracked=False)
    autoencoder = run(autoencoder_job(plan, source_ref(list_source(plan))), fit.program)
    check_network(plan, autoencoder)
    with pytest.raises(ConfigError, match=words):
        check_network(make_plan("demo", {**identity, **changes}, tracked=False), autoencoder)


def test_every_recipe_is_what_training_takes() -> None:
    for name in recipes():
        check_training(read_config(name))


def test_mlflow_that_is_away_ends_a_run_that_somebody_watches_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EQM_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9 cannot be reached"):
        make_plan("demo")
    monkeypatch.setattr("flows.prefect_tools.is_deployed", lambda: True)
    said: list[str] = []
    monkeypatch.setattr("flows.prefect_tools.logged", said.append)
    make_plan("demo")
    (line,) = said
    assert "127.0.0.1:9 cannot be reached" in line
