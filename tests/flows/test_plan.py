"""A plan: what a config asks for reaches the programs that do it."""

import contextlib
import functools
from pathlib import Path
from typing import Any

import needs
import pytest
import torch

from eqm import encode, fit
from eqm.config import ALGORITHMS, ComputeConfig, ExtractorFit, Job, replace
from eqm.errors import ConfigError, StageError, TrackingError
from eqm.recipes import recipes
from eqm.records import Record, Ref
from eqm.stage import run
from flows.checks import check_config, check_trainable, check_training
from flows.encode import encode_images, fit_autoencoder, left_out
from flows.evaluate import generate_samples, look_at_images
from flows.jobs import Plan, autoencoder_job, latents_job, list_source, source_ref, to_be_trained_on
from flows.plan import make_plan, read_config
from flows.settings import current_settings
from flows.train import train_model


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


@pytest.mark.parametrize(
    ("source", "store", "refused"),
    [
        ("s3://all", "s3://all/store", True),
        ("s3://all/images/", "s3://all/images", True),
        ("s3://all/images", "s3://all/images/a/store", True),
        ("s3://all/images", "s3://all/images-store", False),
        ("s3://all/images", "s3://all", False),
        ("s3://all/images", "s3://all/images/.store", False),
        ("s3://images", "images/store", False),
        ("images", "images/store", True),
    ],
)
def test_a_store_within_the_source_is_refused_wherever_both_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, store: str, refused: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EQM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EQM_STORE", store)
    config = read_config("tiny", {"source.kind": "folder", "source_uri": source})
    with (
        pytest.raises(ConfigError, match=f"EQM_STORE is .*{store}, which is (in )?the source")
        if refused
        else contextlib.nullcontext()
    ):
        check_config(config, current_settings())
    # Tars are looked for by their names, and no store has them.
    tars = read_config("tiny", {"source.kind": "webdataset", "source_uri": source})
    check_config(tars, current_settings())


def test_what_is_set_for_all_stages_is_told_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EQM_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("EQM_CACHE_SIZE", "1.5GB")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    changes = {"name": "mine", "threads": 3, "source_uri": "/data/mine"}
    plan = make_plan("demo", changes, tracked=False)
    for stage in ("latents", "train", "samples"):
        told = plan.runtime(stage)
        assert told.store == str(tmp_path / "store")
        assert told.cache == str(tmp_path / "home" / "cache")
        assert told.cache_bytes == 1_500_000_000
        assert (told.threads, told.source_uri) == (3, "/data/mine")
        assert (told.mlflow_experiment, told.run_name) == ("eqm-mine", "mine")
        assert told.grid_sampler == plan.config.generate.sampler
        # Only a training has a run of its own.
        assert told.mlflow_uri == ("http://127.0.0.1:5000" if stage == "train" else None)


@pytest.mark.parametrize(("gpus", "started"), [(0, 4), (2, 2), (8, 4)])
def test_as_many_processes_as_asked_for_and_one_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, started: int
) -> None:
    monkeypatch.setenv("EQM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EQM_STORE", str(tmp_path / "store"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    begun: dict[str, int] = {}

    class Launched:
        def run(self, job: Job, *, processes: int) -> None:
            begun[job.stage] = processes
            raise StageError("launched")

    plan = replace(make_plan("demo", {"processes": 4}, tracked=False), launcher=Launched())
    source = Ref(stage="source", digest="0" * 64, content="0" * 64)
    made = Record(stage="x", algorithm=1, config={}, inputs={}, outputs={}, values={})
    for begin in (
        lambda: encode_images.fn(plan, source, made, to_train=False),  # type: ignore[attr-defined]
        lambda: train_model.fn(plan, made),  # type: ignore[attr-defined]
        lambda: generate_samples.fn(plan, made, made),  # type: ignore[attr-defined]
        lambda: look_at_images.fn(plan, source, made),  # type: ignore[attr-defined]
    ):
        with pytest.raises(StageError):
            begin()
    assert begun == dict.fromkeys(("latents", "train", "samples", "reference"), started)


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
        ({"network.kind": "unet", "train.precision": "float16"}, r"'transformer' with train\.prec"),
        ({"objective.energy": "dot", "train.precision": "float16"}, r"'implicit' with train\.prec"),
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
    check(plan := pixels("demo"))
    with pytest.raises(ConfigError, match=words):
        check(pixels("demo", **changes))
    assert plan.store.list("latents/") == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"network.patch": 3}, "8 x 8 cannot be cut into patches of 3"),
        ({"autoencoder.kind": "identity", "network.patch": 3}, "16 x 16 cannot be cut into patch"),
        ({"compute.fused": True}, r"compute\.fused is True; .* this trains on a CPU"),
    ],
)
def test_what_no_training_takes_is_refused_before_an_autoencoder_is_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], words: str
) -> None:
    monkeypatch.setenv("EQM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EQM_STORE", str(tmp_path / "store"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    begun: list[str] = []

    class Launched:
        def run(self, job: Job, *, processes: int) -> None:
            begun.append(job.stage)
            raise StageError("launched")

    plan = replace(make_plan("demo", changes, tracked=False), launcher=Launched())
    source = source_ref(list_source(plan))
    with pytest.raises(ConfigError, match=words):
        fit_autoencoder.fn(plan, source)  # type: ignore[attr-defined]
    assert begun == []
    # It may be fitted for others.
    with pytest.raises(StageError):
        fit_autoencoder.fn(plan, source, to_train=False)  # type: ignore[attr-defined]
    # What is there is asked for by those who only read, too.
    sealed = replace(plan.config.autoencoder, kind="identity")
    there = replace(plan, config=replace(plan.config, autoencoder=sealed))
    run(autoencoder_job(there, source), fit.program)
    fit_autoencoder.fn(there, source)  # type: ignore[attr-defined]
    assert begun == ["autoencoder"]


def test_a_size_that_an_autoencoder_cannot_halve_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"image_size_px is 33; .* multiple of 2, which the 2 en"):
        read_config("demo", {"source.image_size_px": 33})
    read_config("demo", {"source.image_size_px": 33, "autoencoder.kind": "identity"})


@pytest.mark.parametrize(
    ("file", "changes", "found"),
    [
        ("processes = 3", {"processes": 2}, {"processes": 2}),
        ("processes = 3", {"train.batch_size": 129}, {"processes": 3, "train.batch_size": 129}),
        # The batch is 128: neither is right without the other.
        ("", {"processes": 3, "train.batch_size": 129}, {"processes": 3}),
        ("", {"train.batch_size": 129, "processes": 3}, {"processes": 3}),
        ('[train]\nimages = "many"', {"train.images": 1280}, {"train.images": 1280}),
        ("[train]\nimags = 1", {"train": {"images": 1280}}, {"train.images": 1280}),
        (
            '[source]\nkind = "folder"\nmirror = true',
            {"source_uri": "pictures"},
            {"source_uri": "pictures"},
        ),
    ],
)
def test_changes_mend_a_file(
    tmp_path: Path, file: str, changes: dict[str, Any], found: dict[str, Any]
) -> None:
    (tmp_path / "run.toml").write_text(f'preset = "demo"\n{file}\n')
    config = read_config(str(tmp_path / "run.toml"), changes)
    for name, value in found.items():
        assert functools.reduce(getattr, name.split("."), config) == value


def test_changes_mend_the_file_of_a_policy(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("minimum_samples = 7\nminimum_recall = 2.0\n")
    (tmp_path / "run.toml").write_text('preset = "demo"\npolicy = "mine.toml"\n')
    policy = read_config(str(tmp_path / "run.toml"), {"policy.minimum_recall": 0.2}).policy
    assert (policy.minimum_samples, policy.minimum_recall) == (7, 0.2)
    assert policy.minimum_auroc == {}, "of the preset's floors none is meant"
    with pytest.raises(ConfigError, match=r"minimum_recall is 2\.0"):
        read_config(str(tmp_path / "run.toml"))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("processes = 3", {}, r"batch_size is 128; it must be a multiple of processes \(3\)"),
        ("processes = 3", {"processes": 5}, r"a multiple of processes \(5\)"),
        ("processes = 3", {"procesess": 2}, "unknown setting 'procesess' in config: did you mean"),
        ("[trian]\nimages = 1", {"train.images": 2}, "'trian' in config: did you mean 'train'"),
        ("", {"trian.images": 1}, "there is no table 'trian' to set 'images' in$"),
        ("train = 3", {"train.images": 1}, "no table 'train' to set 'images' in: it is 3"),
        ("", {"preset": "tiny"}, "unknown setting 'preset'"),
    ],
)
def test_what_stays_wrong_with_its_changes_is_named(
    tmp_path: Path, file: str, changes: dict[str, Any], words: str
) -> None:
    (tmp_path / "run.toml").write_text(f'preset = "demo"\n{file}\n')
    with pytest.raises(ConfigError, match=words):
        read_config(str(tmp_path / "run.toml"), changes)


def test_changes_reach_tables_that_a_file_leaves_out(tmp_path: Path) -> None:
    given = {"preset": "tiny", "further": {"wide": {"extractor": {"kind": "fit"}}}}
    changes = {"further.wide.reference.keep_features": 20, "further.wide.extractor.fit.width": 16}
    found = read_config(given, changes).further["wide"]
    assert (found.reference.keep_features, found.extractor.fit.width) == (20, 16)
    assert found.extractor.fit.dimension == ExtractorFit().dimension
    assert given["further"] == {"wide": {"extractor": {"kind": "fit"}}}, "the caller's own stays"
    with pytest.raises(ConfigError, match=r"no table 'further\.wide\.extractor\.pretrained'"):
        read_config(given, {"further.wide.extractor.pretrained.uri": "x"})
    with pytest.raises(ConfigError, match=r"no table 'further\.none\.extractor'"):
        read_config(given, {"further.none.extractor.kind": "fit"})


@pytest.mark.parametrize("place", ["pictures", "pictures/store"])
def test_a_store_among_the_images_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "link").symlink_to("pictures")
    monkeypatch.setenv("EQM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EQM_STORE", place)
    for source in (str(tmp_path / "pictures"), "pictures", "link"):
        changes = {"source.kind": "folder", "source.channels": 3, "source_uri": source}
        with pytest.raises(ConfigError, match=r"^EQM_STORE is .*the source .*place outside of it"):
            make_plan("demo", changes, tracked=False)
    # They are of scikit-learn, wherever an address leads.
    make_plan("demo", {"source_uri": "pictures"}, tracked=False)
    monkeypatch.setenv("EQM_STORE", "pictures2")
    make_plan("demo", changes, tracked=False)


@needs.compiler
def test_latents_that_nobody_trains_on_here_are_made_whatever_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EQM_STORE", str(tmp_path / "store"))
    begun: list[tuple[str, bool]] = []

    class Launched:
        def run(self, job: Job, *, processes: int) -> None:
            begun.append((job.stage, job.runtime.compute.compile))
            raise StageError("launched")

    changes = {"network.patch": 3, "compute.compile": True}
    plan = replace(pixels("demo", **changes), launcher=Launched())
    source = source_ref(list_source(plan))
    autoencoder = run(autoencoder_job(plan, source), fit.program)
    with pytest.raises(ConfigError, match="cannot be cut into patches"):
        encode_images.fn(plan, source, autoencoder)  # type: ignore[attr-defined]
    assert begun == []
    with pytest.raises(StageError):
        encode_images.fn(plan, source, autoencoder, to_train=False)  # type: ignore[attr-defined]
    # Nor does their program look for what a training would compile with.
    assert begun == [("latents", False)]
    asked = replace(plan.config, network=replace(plan.config.network, patch=2))
    with pytest.raises(StageError):
        encode_images.fn(replace(plan, config=asked), source, autoencoder)  # type: ignore[attr-defined]
    assert begun[1:] == [("latents", True)]

    def refuses(compute: ComputeConfig, device: torch.device) -> None:
        raise ConfigError(f"compile is {compute.compile} on {device.type}")

    monkeypatch.setattr("eqm.encode.check_for_training", refuses)
    job = to_be_trained_on(plan, latents_job(plan, source, autoencoder))
    with pytest.raises(ConfigError, match="compile is True on cpu"):
        run(job, encode.program)


def pixels(config: str, **changes: object) -> Plan:
    """The plan of a config whose latents are the pixels of digits."""
    digits = {"source": {"image_size_px": 16}, "autoencoder": {"kind": "identity"}}
    return make_plan(config, {**digits, "network.patch": 2, **changes}, tracked=False)


def check(plan: Plan) -> Job:
    """See whether a plan can be trained, before it has latents; the job that would make them."""
    source = source_ref(list_source(plan))
    autoencoder = run(autoencoder_job(plan, source), fit.program)
    job = latents_job(plan, source, autoencoder)
    check_trainable(plan, autoencoder, job)
    return job


MACHINE = [
    (0, {"compute.fused": True}, r"compute\.fused is True; .* this trains on a CPU"),
    (0, {"train.precision": "tf32"}, r"train\.precision is 'tf32', .* device is cpu: use"),
    (0, {"generate.sampler.precision": "tf32"}, r"generate\.sampler\.precision is 'tf32', .* cpu"),
    (
        1,
        {"compute.parallel": "fsdp2", "processes": 2},
        "processes is 2, but this machine has 1 GPU, .*'fsdp2'.*set it to 'ddp'",
    ),
    (
        3,
        {"train.batch_size": 64, "processes": 4},
        "processes is 4, .* has 3 GPUs, .* cannot share a train.batch_size of 64 equally",
    ),
    (
        2,
        {"train.batch_size": 72, "processes": 4, "compute.micro_batch": 9},
        None,
    ),
    (
        3,
        {"train.batch_size": 72, "processes": 4, "compute.micro_batch": 9},
        r"cannot share a train.batch_size of 72 in parts of compute\.micro_batch \(9\) equally",
    ),
]


@pytest.mark.parametrize(("gpus", "changes", "words"), MACHINE)
def test_what_this_machine_cannot_train_is_refused_before_latents_are_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    changes: dict[str, object],
    words: str | None,
) -> None:
    """Of fewer GPUs than processes one is started on each."""
    monkeypatch.setenv("EQM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EQM_STORE", str(tmp_path / "store"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    plan = pixels("demo", **changes)
    if words is None:
        check(plan)
        return
    with pytest.raises(ConfigError, match=words):
        check(plan)
    # A cluster has machines of its own.
    cluster: Any = object()
    elsewhere = replace(plan, settings=replace(plan.settings, cluster=cluster))
    job = check(elsewhere)
    # Where the latents are there, so may be the model, and this one only reads it.
    plan.store.seal(
        Record(
            stage="latents",
            algorithm=ALGORITHMS["latents"],
            config=job.config,
            inputs=job.inputs,
            outputs={},
            values={},
        )
    )
    check(plan)


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


def test_images_that_are_left_out_are_named_where_they_are_listed() -> None:
    assert left_out([]) == ""
    assert left_out(["a/1.jpg"]) == "; corrupt, and left out: a/1.jpg"
    assert left_out([f"a/{n}.jpg" for n in range(5)]).endswith("a/1.jpg, a/2.jpg and 2 more")
