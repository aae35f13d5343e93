"""Encoding: the same shards whoever makes them and however often it was interrupted."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

from eqm import autoencoder, encode, images, stage
from eqm.config import (
    AutoencoderConfig,
    AutoencoderFit,
    AutoencoderStage,
    EncodeConfig,
    Job,
    LatentsStage,
    Runtime,
    SourceConfig,
    replace,
)
from eqm.encode import ShardPlan, shard_plans
from eqm.errors import DataError
from eqm.records import Record, Ref, to_json
from eqm.shards import ORIGINALS, LatentSet, open_manifest
from eqm.stage import Context, Outcome
from eqm.storage import LocalStore

DIGITS = SourceConfig(image_size_px=8)
FOLDER = SourceConfig(
    kind="folder", image_size_px=8, channels=3, mirror=True, held_out_fraction=0.25
)
IMAGES = 24


def make_folder(root: Path) -> Path:
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(IMAGES // 2):
            pixels = np.random.default_rng((label, i)).integers(0, 256, (9, 11, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03d}.png")
    return root


def seal_autoencoder(store: str, source: SourceConfig, made: autoencoder.Autoencoder) -> Ref:
    config = AutoencoderStage(source=source, autoencoder=AutoencoderConfig(kind="identity"))
    job = Job(
        stage="autoencoder",
        config=to_json(config),
        inputs={},
        runtime=Runtime(store=store, threads=1),
    )
    outputs = autoencoder.autoencoder_to_bytes(made)
    return stage.run(job, lambda _: Outcome(outputs=outputs)).ref


def a_job(
    folder: Path,
    *,
    source: SourceConfig = FOLDER,
    make: Callable[[SourceConfig], autoencoder.Autoencoder] = autoencoder.identity,
    store: str = "store",
    **settings: int,
) -> Job:
    """Everything that comes before encoding, and its job."""
    if source.kind == "folder" and not (folder / "data").exists():
        make_folder(folder / "data")
    uri = str(folder / "data") if source.kind == "folder" else None
    listing = images.open_source(source, uri).digest
    place = str(folder / store)
    encode_config = EncodeConfig(**{"shard_images": 5, "batch_size": 2, **settings})
    return Job(
        stage="latents",
        config=to_json(LatentsStage(source=source, encode=encode_config)),
        inputs={
            "source": Ref(stage="source", digest=listing, content=listing),
            "autoencoder": seal_autoencoder(place, source, make(source)),
        },
        runtime=Runtime(store=place, source_uri=uri, device="cpu", threads=1),
    )


def small_kl(source: SourceConfig) -> autoencoder.Autoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = autoencoder.fresh_network(
            AutoencoderFit(widths=(8, 16), latent_channels=2), source
        )
    return autoencoder.sealed_autoencoder(
        network, source, name="kl", shift=(0.0, 0.0), scale=(1.0, 1.0)
    )


def opened(job: Job, record: Record) -> LatentSet:
    return open_manifest(record, LocalStore(Path(job.runtime.store)))


def program_line(job: Job, path: Path) -> list[str]:
    path.write_text(json.dumps(to_json(job)))
    return [sys.executable, "-m", "eqm.encode", str(path)]


# -- the plan -----------------------------------------------------------------------------------


def test_plans_cover_every_image_once_and_batches_stay_inside() -> None:
    for count, size, batch in ((1, 5, 2), (5, 5, 5), (23, 5, 2), (23, 100, 7)):
        plans = shard_plans(count, EncodeConfig(shard_images=size, batch_size=batch))
        assert [plan.number for plan in plans] == list(range(len(plans)))
        found = [list(numbers) for plan in plans for numbers in plan.batches(batch)]
        assert [number for numbers in found for number in numbers] == list(range(count))
        assert max(map(len, found)) <= batch
        for plan in plans:
            for numbers in plan.batches(batch):
                assert plan.first <= numbers[0] <= numbers[-1] < plan.first + plan.count


# -- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [autoencoder.identity, small_kl])
def test_shards_hold_the_moments_of_every_image_and_its_mirror(
    tmp_path: Path, make: Callable[[SourceConfig], autoencoder.Autoencoder]
) -> None:
    job = a_job(tmp_path, make=make)
    record = stage.run(job, encode.program)
    data, source = opened(job, record), images.open_source(FOLDER, job.runtime.source_uri)
    data.verify()
    pixels = torch.stack([source.read(i) for i in range(IMAGES)])
    for mirror, shown in ((False, pixels), (True, pixels.flip(-1))):
        expected = make(FOLDER).encode(shown).numpy()
        found = data.moments(np.arange(IMAGES), mirror=np.full(IMAGES, mirror))
        assert np.abs(found - expected).max() < 2e-3
    assert data.keys == [entry.key for entry in source.entries]
    assert data.labels.tolist() == [entry.label for entry in source.entries]
    assert data.held_out_numbers.tolist() == source.numbers(held_out=True)


def test_the_manifest_says_what_is_in_the_shards(tmp_path: Path) -> None:
    job = a_job(tmp_path)
    record = stage.run(job, encode.program)
    data = opened(job, record)
    manifest = data.manifest
    assert manifest.count == IMAGES
    assert [shard.count for shard in manifest.shards] == [5, 5, 5, 5, 4]
    assert manifest.source == job.inputs["source"].digest
    assert manifest.mirrored
    assert np.add(manifest.train_per_class, manifest.held_out_per_class).tolist() == [12, 12]
    means = data.moments(data.train_numbers)[:, :3].astype(np.float64)
    assert np.allclose(manifest.channel_mean, means.mean(axis=(0, 2, 3)), atol=1e-9)
    assert np.allclose(manifest.channel_std, means.std(axis=(0, 2, 3)), atol=1e-9)
    assert record.values["images"] == IMAGES
    assert record.values["shards"] == 5
    assert record.values["train_images"] == len(data.train_numbers)
    named = {f"shard-{i:05d}.{kind}" for i in range(5) for kind in ("tar", "index")}
    beside = {"manifest.json", "index.safetensors", "keys.safetensors", "originals.safetensors"}
    assert record.outputs.keys() == {*beside, *named}
    assert manifest.lineage == job.inputs
    shown = safetensors.numpy.load(
        LocalStore(Path(job.runtime.store)).get(record.outputs[ORIGINALS])
    )
    source = images.open_source(FOLDER, job.runtime.source_uri)
    for number, pixels in zip(shown["numbers"].tolist(), shown["pixels"], strict=True):
        assert np.array_equal(pixels, source.read(number).numpy())
    assert len(shown["numbers"]) == IMAGES
    stage.verify(LocalStore(Path(job.runtime.store)), record)


def test_skipped_images_are_named_in_the_manifest(tmp_path: Path) -> None:
    make_folder(tmp_path / "data")
    (tmp_path / "data" / "cat" / "bad.png").write_bytes(b"?")
    job = a_job(tmp_path, source=replace(FOLDER, on_corrupt="skip"))
    manifest = opened(job, stage.run(job, encode.program)).manifest
    assert manifest.skipped == ("cat/bad.png",)
    assert manifest.count == IMAGES


def test_two_runs_give_the_same_bytes_and_so_do_other_batches(tmp_path: Path) -> None:
    one = stage.run(a_job(tmp_path, store="one"), encode.program)
    two = stage.run(a_job(tmp_path, store="two"), encode.program)
    assert (one.digest, one.outputs, one.values) == (two.digest, two.outputs, two.values)
    other = stage.run(a_job(tmp_path, store="one", shard_images=7), encode.program)
    assert other.digest != one.digest
    assert other.values["shards"] == 4


# -- interrupted --------------------------------------------------------------------------------


class Interrupted(Exception):
    """Stands for a machine that goes away."""


def test_an_interrupted_run_goes_on_and_makes_no_shard_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stage.run(a_job(tmp_path, store="whole"), encode.program)
    job, made = a_job(tmp_path), []
    real = encode.encode_shard

    def counted(plan: ShardPlan, *rest: Any) -> Any:
        if len(made) == 3:
            raise Interrupted
        made.append(plan.number)
        return real(plan, *rest)

    monkeypatch.setattr(encode, "encode_shard", counted)
    with pytest.raises(Interrupted):
        stage.run(job, encode.program)
    store = LocalStore(Path(job.runtime.store))
    assert store.record("latents", stage.job_digest(job)) is None
    assert len(store.list(f"latents/{stage.job_digest(job)}/shards/")) == 3
    made[:] = []
    record = stage.run(job, encode.program)
    assert made == [3, 4]
    assert (record.outputs, record.values) == (whole.outputs, whole.values)


def test_a_run_that_dies_between_blobs_and_commit_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = a_job(tmp_path)
    real = LocalStore.write_once

    def dies(self: LocalStore, key: str, data: Any) -> bool:
        if "/shards/00001" in key:
            raise Interrupted
        return real(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "write_once", dies)
        with pytest.raises(Interrupted):
            stage.run(job, encode.program)
    record = stage.run(job, encode.program)
    whole = stage.run(a_job(tmp_path, store="whole"), encode.program)
    assert record.outputs == whole.outputs


def test_a_shard_that_was_lost_is_made_again(tmp_path: Path) -> None:
    job = a_job(tmp_path)
    record = stage.run(job, encode.program)
    store = LocalStore(Path(job.runtime.store))
    (store.root / f"latents/{record.digest}/record.json").unlink()
    (store.root / record.outputs["shard-00002.tar"].key).unlink()
    again = stage.run(job, encode.program)
    assert again.outputs == record.outputs
    stage.verify(store, again)


def test_a_killed_program_goes_on_where_it_was(tmp_path: Path) -> None:
    job = a_job(tmp_path, source=DIGITS, shard_images=8)
    commits = tmp_path / "store" / "latents" / stage.job_digest(job) / "shards"
    running = subprocess.Popen(program_line(job, tmp_path / "job.json"), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while len(list(commits.glob("0*.json"))) < 5 and time.monotonic() < deadline:
        assert running.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait(timeout=30)
    done = {path: path.stat().st_mtime_ns for path in commits.glob("0*.json")}
    assert 5 <= len(done) < 225
    assert not (commits.parent / "record.json").exists()
    record = stage.run(job, encode.program)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert record.values["shards"] == 225
    opened(job, record).verify()


# -- several at once ----------------------------------------------------------------------------


def test_two_encoders_that_race_make_one_set(tmp_path: Path) -> None:
    job = a_job(tmp_path, source=DIGITS, shard_images=128)
    line = program_line(job, tmp_path / "job.json")
    both = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate(timeout=120)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    store = LocalStore(Path(job.runtime.store))
    record = store.record("latents", stage.job_digest(job))
    assert record is not None
    opened(job, record).verify()
    alone = stage.run(
        a_job(tmp_path, source=DIGITS, shard_images=128, store="alone"), encode.program
    )
    assert (record.outputs, record.values) == (alone.outputs, alone.values)


def test_the_loser_of_a_race_for_a_shard_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, real = a_job(tmp_path), encode.commit

    def beaten(context: Context, plan: ShardPlan, samples: Any) -> None:
        real(context, plan, samples)
        commits = Path(job.runtime.store) / f"latents/{context.digest}/shards"
        before = (commits / f"{plan.number:05d}.json").stat()
        real(context, plan, samples)
        assert (commits / f"{plan.number:05d}.json").stat() == before

    monkeypatch.setattr(encode, "commit", beaten)
    record = stage.run(job, encode.program)
    assert record.values["images"] == IMAGES


def test_processes_share_the_shards(tmp_path: Path) -> None:
    job = a_job(tmp_path, shard_images=3)
    line = program_line(job, tmp_path / "job.json")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, *line[1:]],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "encoding: 12 of 12 images" in done.stderr  # half of them for the first
    record = LocalStore(tmp_path / "store").record("latents", stage.job_digest(job))
    assert record is not None
    assert record.provenance["world_size"] == 2
    alone = stage.run(a_job(tmp_path, shard_images=3, store="alone"), encode.program)
    assert (record.outputs, record.values) == (alone.outputs, alone.values)


# -- what is refused ----------------------------------------------------------------------------


def test_images_that_changed_are_refused(tmp_path: Path) -> None:
    job = a_job(tmp_path)
    (tmp_path / "data" / "cat" / "000.png").unlink()
    with pytest.raises(DataError, match="the images changed since this run was configured"):
        stage.run(job, encode.program)


def test_an_autoencoder_for_other_images_is_refused(tmp_path: Path) -> None:
    other = replace(FOLDER, image_size_px=16)
    job = a_job(tmp_path, make=lambda _: autoencoder.identity(other))
    with pytest.raises(DataError, match="takes images of 16 px and 3 channels, the source gives 8"):
        stage.run(job, encode.program)


def test_moments_that_are_not_finite_seal_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = a_job(tmp_path)
    real = autoencoder.Autoencoder.encode

    def broken(self: autoencoder.Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
        moments = real(self, pixels)
        moments[-1, 0, 0, 0] = float("nan")
        return moments

    monkeypatch.setattr(autoencoder.Autoencoder, "encode", broken)
    with pytest.raises(DataError, match="is not finite as float16"):
        stage.run(job, encode.program)
    assert LocalStore(tmp_path / "store").list("latents/") == []


def test_the_program_refuses_in_words(tmp_path: Path) -> None:
    job = a_job(tmp_path)
    (tmp_path / "data" / "dog" / "new.png").write_bytes(b"?")
    line = program_line(job, tmp_path / "job.json")
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == stage.EXIT_REFUSED
    assert done.stderr.startswith("error: 1 of 25 images cannot be decoded: dog/new.png")
    assert "Traceback" not in done.stderr
