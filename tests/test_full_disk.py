"""Stages on a disk that is really full: they end in words, half-make nothing, and go on with room.

Real programs, on a few megabytes that are mounted for them alone (small_disk).
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import chain
import pytest
import small_disk

from eqm import checkpoint
from eqm.cache import is_blob
from eqm.config import Job, replace
from eqm.disk import ASIDE
from eqm.records import Blob, Record, to_json
from eqm.stage import job_digest, verify
from eqm.storage import LocalStore, open_store

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SIZE_BYTES = 48 * 2**20
MODULES = {"latents": "encode", "train": "train", "evaluation": "evaluate", "samples": "generate"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.getbasetemp() / "chain")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[small_disk.SmallDisk]:
    with small_disk.SmallDisk(tmp_path / "disk", SIZE_BYTES) as made:
        yield made


class OnDisk:
    """A job whose store is a folder of the small disk."""

    def __init__(self, disk: small_disk.SmallDisk, made: chain.Chain, name: str, **runtime: object):
        self.disk = disk
        without = chain.STAGES[chain.STAGES.index(name) :]
        shutil.copytree(
            made.store.root,
            disk.seen / "store",
            # Of other stages records and blobs stay; of this one nothing, as it was never begun.
            ignore=lambda folder, _: set(without) if Path(folder) == made.store.root else set(),
        )
        self.store = LocalStore(disk.seen / "store")
        forget(self.store, made, without)
        self.job = chain.elsewhere(made.job(name, **runtime), disk.folder / "store")

    def record(self) -> Record | None:
        return self.store.record(self.job.stage, job_digest(self.job))


def forget(store: LocalStore, made: chain.Chain, stages: tuple[str, ...]) -> None:
    """Delete the blobs that only these stages name."""
    kept = {
        blob
        for name, record in made.records.items()
        if name not in stages
        for blob in {**record.outputs, **record.logs}.values()
    }
    for name in stages:
        record = made.records[name]
        for blob in {*record.outputs.values(), *record.logs.values()} - kept:
            store.delete(blob.key)


def program(
    disk: small_disk.SmallDisk, job: Job, folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The program of a stage, among those who see the disk."""
    file = folder / "job.json"
    file.write_text(json.dumps(to_json(job)))
    return subprocess.run(
        [*disk.within(), sys.executable, "-m", f"eqm.{MODULES[job.stage]}", str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def refused(ended: subprocess.CompletedProcess[str], place: Path) -> None:
    """It ended by itself, and said what is full and what to do."""
    assert ended.returncode == 2, ended.stderr
    assert f"error: the disk is full at {place}" in ended.stderr, ended.stderr
    assert "free space and run again" in ended.stderr
    assert "Traceback" not in ended.stderr


def nothing_half_made(store: LocalStore) -> None:
    """Every blob has the bytes of its name, and no file is left aside."""
    for key, size_bytes in store.sizes("blobs/").items():
        blob = Blob(sha256=key.rpartition("/")[2], size_bytes=size_bytes)
        assert is_blob(store.root / key, blob), f"{key} is half-made"
    assert not list(store.root.rglob(f"{ASIDE}*"))


def goes_on(disk: small_disk.SmallDisk, job: Job, folder: Path) -> str:
    """The same command, with room; returns what it said."""
    disk.make_room()
    ended = program(disk, job, folder)
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def test_training_ends_and_goes_on_from_its_last_checkpoint(
    disk: small_disk.SmallDisk, tiny: chain.Chain, tmp_path: Path
) -> None:
    on = OnDisk(disk, tiny, "train", checkpoint_every_images=64, keep_checkpoints=100)
    own = f"train/{tiny['train'].digest}/checkpoints/"
    one_bytes = sum(tiny.store.sizes(own).values())
    disk.fill(left_bytes=int(3.5 * one_bytes))
    refused(program(disk, on.job, tmp_path), on.disk.folder / "store")
    assert on.record() is None
    nothing_half_made(on.store)
    digest = job_digest(on.job)
    whole = checkpoint.complete(on.store, digest)
    assert 1 <= len(whole) <= 3
    for at in whole:
        assert checkpoint.load(on.store, digest, at).images_seen == at.images_seen
    said = goes_on(disk, on.job, tmp_path)
    assert f"goes on from image {whole[-1].images_seen:,}" in said
    record = on.record()
    assert record is not None
    assert record.content == tiny["train"].content


@pytest.mark.services
def test_training_whose_cache_is_full_ends_or_reads_from_s3(
    disk: small_disk.SmallDisk,
    tiny: chain.Chain,
    tmp_path: Path,
    s3_environment: dict[str, str],
) -> None:
    cache = disk.folder / "cache"
    store = open_store(f"s3://eqm/{tmp_path.name}", cache=tmp_path / "elsewhere")
    for key in tiny.store.list(""):
        if not key.startswith(("train/", "samples/", "evaluation/")):
            store.write_once(key, tiny.store.read(key))
    job = tiny.job("train", cache=str(cache))
    job = replace(job, runtime=replace(job.runtime, store=store.uri))
    # Without the list of shards there is nothing to read.
    disk.fill(left_bytes=0)
    refused(program(disk, job, tmp_path), cache)
    assert store.list(f"train/{job_digest(job)}/checkpoints/") == []
    # With it, shards are read where they lie, image by image.
    disk.make_room()
    disk.fill(left_bytes=40_000)
    ended = program(disk, job, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert f"cannot be fetched yet (the disk is full at {cache}" in ended.stderr
    for copy in (disk.seen / "cache" / "sha256").iterdir():
        assert is_blob(copy, Blob(sha256=copy.name, size_bytes=copy.stat().st_size))
    record = store.record("train", job_digest(job))
    assert record is not None
    assert record.content == tiny["train"].content


def test_encoding_ends_and_keeps_the_shards_that_it_has(
    disk: small_disk.SmallDisk, tiny: chain.Chain, tmp_path: Path
) -> None:
    on = OnDisk(disk, tiny, "latents")
    folder = f"latents/{tiny['latents'].digest}/shards/"
    shards = shard_blobs(tiny)
    for blob in shards:
        on.store.delete(blob.key)
    disk.fill(left_bytes=int(1.7 * max(blob.size_bytes for blob in shards)))
    refused(program(disk, on.job, tmp_path), disk.folder / "store")
    assert on.record() is None
    nothing_half_made(on.store)
    assert len(on.store.list(folder)) < len(shards)
    goes_on(disk, on.job, tmp_path)
    record = on.record()
    assert record is not None
    assert record.content == tiny["latents"].content
    verify(on.store, record)


def shard_blobs(made: chain.Chain) -> list[Blob]:
    """The tars of the chain's latents."""
    tars = []
    for key in made.store.list("blobs/"):
        with (made.store.root / key).open("rb") as file:
            file.seek(257)
            if file.read(5) == b"ustar":
                tars.append(key)
    sizes = made.store.sizes("blobs/")
    return [Blob(sha256=key.rpartition("/")[2], size_bytes=sizes[key]) for key in tars]


@pytest.mark.parametrize("name", ["samples", "evaluation"])
def test_samples_and_evaluation_end_and_go_on(
    disk: small_disk.SmallDisk, tiny: chain.Chain, tmp_path: Path, name: str
) -> None:
    on = OnDisk(disk, tiny, name)
    disk.fill(left_bytes=8_192)
    refused(program(disk, on.job, tmp_path), disk.folder / "store")
    assert on.record() is None
    nothing_half_made(on.store)
    goes_on(disk, on.job, tmp_path)
    record = on.record()
    assert record is not None
    assert record.content == tiny[name].content
    verify(on.store, record)
