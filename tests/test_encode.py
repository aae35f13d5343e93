"""Encoding: the same shards whoever makes them and however often it was interrupted."""

import contextlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

from eqm import autoencoder, encode, images, stage, walk
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
from eqm.disk import ASIDE, hash_file
from eqm.errors import ConfigError, DataError, IntegrityError
from eqm.latent_set import LatentSet, open_manifest
from eqm.progress import Progress
from eqm.records import Record, Ref, to_json
from eqm.shards import ORIGINALS
from eqm.stage import Context, Outcome, listing_key
from eqm.storage import LocalStore, open_store
from eqm.walk import Commits, ShardPlan, Walk, shard_plans

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
    **settings: Any,
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


def test_originals_are_spread_over_a_large_set_and_belong_to_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "ORIGINAL_IMAGES", 7)
    source = images.open_source(FOLDER, str(make_folder(tmp_path / "data")))
    shown = safetensors.numpy.load(encode.originals(source))
    assert shown["numbers"].tolist() == [0, 3, 6, 10, 13, 17, 20]
    expected = torch.stack([source.read(i) for i in shown["numbers"].tolist()])
    assert np.array_equal(shown["pixels"], expected.numpy())


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
    real = encode.commit

    def counted(context: Context, plan: ShardPlan, *rest: Any) -> Any:
        if len(made) == 3:
            raise Interrupted
        made.append(plan.number)
        return real(context, plan, *rest)

    monkeypatch.setattr(encode, "commit", counted)
    with pytest.raises(Interrupted):
        stage.run(job, encode.program)
    store = LocalStore(Path(job.runtime.store))
    assert store.record("latents", stage.job_digest(job)) is None
    assert len(store.list(f"latents/{stage.job_digest(job)}/shards/")) == 3
    before, made[:] = set(made), []
    record = stage.run(job, encode.program)
    assert sorted(made) == sorted(set(range(5)) - before)
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


@pytest.mark.parametrize("kind", ["tar", "index"])
def test_a_shard_that_was_lost_is_made_again(tmp_path: Path, kind: str) -> None:
    job = a_job(tmp_path)
    record = stage.run(job, encode.program)
    store = LocalStore(Path(job.runtime.store))
    (store.root / f"latents/{record.digest}/record.json").unlink()
    (store.root / record.outputs[f"shard-00002.{kind}"].key).unlink()
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


@pytest.mark.slow
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

    def beaten(context: Context, plan: ShardPlan, *rest: Any) -> bool:
        assert real(context, plan, *rest)
        commits = Path(job.runtime.store) / f"latents/{context.digest}/shards"
        before = (commits / f"{plan.number:05d}.json").stat()
        assert not real(context, plan, *rest)
        assert (commits / f"{plan.number:05d}.json").stat() == before
        return False

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
    record = LocalStore(tmp_path / "store").record("latents", stage.job_digest(job))
    assert record is not None
    assert record.provenance["world_size"] == 2
    alone = stage.run(a_job(tmp_path, shard_images=3, store="alone"), encode.program)
    assert (record.outputs, record.values) == (alone.outputs, alone.values)


# -- who encodes what ---------------------------------------------------------------------------


class Done(Commits):
    """Commits in memory, with a count of how often they were listed."""

    def __init__(self) -> None:
        self.done: set[int] = set()
        self.listed = self.asked = 0

    def numbers(self) -> set[int]:
        self.listed += 1
        return set(self.done)

    def has(self, number: int) -> bool:
        self.asked += 1
        return number in self.done


def test_a_lone_walk_takes_every_shard_once_and_lists_twice() -> None:
    commits, plans = Done(), shard_plans(50, EncodeConfig(shard_images=1))
    taken = [batch.plan.number for batch in Walk(commits, plans, 20).batches(1)]
    assert taken == [*range(20, 50), *range(20)]
    assert commits.listed == 2  # to begin, and to see that nothing is left
    assert commits.asked == 50


def test_a_walk_skips_what_is_finished_before_it_and_while_it_goes() -> None:
    commits, plans = Done(), shard_plans(50, EncodeConfig(shard_images=1))
    commits.done = set(range(10))
    taken = []
    for batch in Walk(commits, plans, 20).batches(1):
        taken.append(batch.plan.number)
        commits.done |= {batch.plan.number, 30, 31, 32}
    assert sorted(taken) == [n for n in range(10, 50) if n not in (30, 31, 32)]


@pytest.mark.parametrize("walkers", [2, 5])
def test_walks_that_begin_together_do_little_twice(walkers: int) -> None:
    """In lockstep, the worst there is: whoever commits second leaps, as the committer makes it."""
    commits, plans = Done(), shard_plans(200, EncodeConfig(shard_images=1))
    walks = [Walk(commits, plans, 7) for _ in range(walkers)]
    going = {i: walk.batches(1) for i, walk in enumerate(walks)}
    encoded = 0
    while going:
        at = {i: next(batches, None) for i, batches in going.items()}
        for i, batch in at.items():
            if batch is None:
                del going[i]
                continue
            encoded += 1
            if batch.plan.number in commits.done:
                walks[i].leap()
            commits.done.add(batch.plan.number)
    assert commits.done == set(range(200))
    # By chance a leap lands on another's shard; at the end the last ones are tried by all.
    assert encoded <= 200 + 20 * (walkers - 1)


def test_a_shard_that_another_finishes_first_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "LOOK_SECONDS", 0.0)
    commits, plans = Done(), shard_plans(8, EncodeConfig(shard_images=4))
    going = Walk(commits, plans, 0)
    batches = going.batches(1)
    assert [next(batches).numbers[0] for _ in range(2)] == [0, 1]
    commits.done.add(0)
    assert [batch.numbers[0] for batch in batches] == [4, 5, 6, 7]
    assert going.overtaken == {0}


def test_a_bar_counts_every_image_once_whoever_encodes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "LOOK_SECONDS", 0.0)
    commits, plans = Done(), shard_plans(14, EncodeConfig(shard_images=4))
    commits.done = {0}
    going = Walk(commits, plans, 1)
    bar = Progress("encoding", total=going.images, done=going.count(going.finished), show=False)
    counter, seen = encode.Counter(going, bar), []
    for batch in going.batches(2):
        if batch.plan.number == 2:
            commits.done.add(2)  # by another, after one of its batches was encoded here
        counter.count(batch)
        if batch.is_last:
            commits.done.add(batch.plan.number)
        seen.append((batch.plan.number, bar.done))
    assert seen[:3] == [(1, 6), (1, 8), (2, 10)]
    assert seen[3:] == [(3, 14)]


# -- ranges -------------------------------------------------------------------------------------


def in_range(job: Job, *shards: int) -> Job:
    return replace(job, runtime=replace(job.runtime, shards=shards))


def test_ranges_make_a_set_in_parts(tmp_path: Path) -> None:
    """As programs that know nothing of each other; only the last one seals."""
    job = a_job(tmp_path)
    store = LocalStore(Path(job.runtime.store))
    said = []
    for shards in ((3, 5), (0, 2), (2, 3)):
        line = program_line(in_range(job, *shards), tmp_path / "job.json")
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
        commits = store.list(f"latents/{stage.job_digest(job)}/shards/")
        assert len(commits) == {(3, 5): 2, (0, 2): 4, (2, 3): 5}[shards]
        assert (store.record("latents", stage.job_digest(job)) is None) == (len(commits) < 5)
    assert "range done, 3 shards of the set still missing" in said[0]
    assert "range done, 1 shard of the set still missing" in said[1]
    record = store.record("latents", stage.job_digest(job))
    whole = stage.run(a_job(tmp_path, store="whole"), encode.program)
    assert record is not None
    assert (record.outputs, record.values) == (whole.outputs, whole.values)


def test_a_range_of_no_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the images fill 5 shards"):
        stage.run(in_range(a_job(tmp_path), 3, 6), encode.program)
    with pytest.raises(ConfigError, match=r"runtime.shards is \(3, 3\)"):
        in_range(a_job(tmp_path), 3, 3)


# -- killed -------------------------------------------------------------------------------------


ZYGOTE = """
import os, sys
import sklearn.datasets
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from eqm import encode

for line in sys.stdin:
    word, _, what = line.strip().partition(" ")
    if word == "wait":
        print(os.waitstatus_to_exitcode(os.waitpid(int(what), 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        status = 1
        try:
            status = encode.main([what])
        finally:
            os._exit(status)
"""
"""Starts the program as a real process without its seconds of imports."""


class Encoders:
    """Programs that run the same job at the same time."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.file = job, folder / "job.json"
        self.file.write_text(json.dumps(to_json(job)))
        self.store = open_store(job.runtime.store, cache=folder / "look")
        with (folder / "zygote.log").open("w") as log:
            self.zygote = subprocess.Popen(
                [sys.executable, "-c", ZYGOTE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.running = [self.asked("start", self.file) for _ in range(2)]

    def asked(self, *words: object) -> int:
        assert self.zygote.stdin is not None
        assert self.zygote.stdout is not None
        self.zygote.stdin.write(" ".join(map(str, words)) + "\n")
        self.zygote.stdin.flush()
        return int(self.zygote.stdout.readline())

    def commits(self) -> list[str]:
        return self.store.list(f"latents/{stage.job_digest(self.job)}/shards/")

    def kill_one_and_start_another(self, which: int) -> None:
        os.kill(self.running[which], signal.SIGKILL)
        assert self.asked("wait", self.running[which]) == -signal.SIGKILL
        self.running[which] = self.asked("start", self.file)

    def end(self) -> list[int]:
        return [self.asked("wait", program) for program in self.running]

    def close(self) -> None:
        for program in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(program, signal.SIGKILL)
        self.zygote.kill()
        self.zygote.wait(30)


def killed_ten_times(job: Job, folder: Path, seed: int) -> list[int]:
    """Two programs race; ten times one is killed and another started. Commits at each kill."""
    chance, encoders, found = random.Random(seed), Encoders(job, folder), [0]
    try:
        for number in range(10):
            # One of them has done something since, so that it is not always killed at its start.
            until(lambda: len(encoders.commits()) > found[-1])
            time.sleep(chance.random() * 0.1)
            encoders.kill_one_and_start_another(number % 2)
            found.append(len(encoders.commits()))
        assert encoders.end() == [0, 0], (folder / "zygote.log").read_text()
    finally:
        encoders.close()
    return found[1:]


def blobs(store: LocalStore) -> set[str]:
    """Digests of what lies among the blobs, as they are, not as they are called."""
    files = [path for path in (store.root / "blobs").rglob("*") if path.is_file()]
    kept = [path for path in files if not path.name.startswith(ASIDE)]
    assert all(hash_file(path) == path.name for path in kept)
    return {path.name for path in kept}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", pytest.param("s3", marks=pytest.mark.services)])
def test_ten_kills_of_two_that_race_change_no_bit(
    tmp_path: Path, place: str, request: pytest.FixtureRequest
) -> None:
    settings: dict[str, Any] = {
        "source": DIGITS,
        "make": small_kl,
        "shard_images": 4,
        "batch_size": 2,
    }
    whole = stage.run(a_job(tmp_path, store="alone", **settings), encode.program)
    job = a_job(tmp_path, **settings)
    if place == "s3":
        request.getfixturevalue("s3_environment")
        uri, cache = f"s3://eqm/{secrets.token_hex(4)}", str(tmp_path / "cache")
        runtime = replace(job.runtime, store=uri, cache=cache)
        ref = seal_autoencoder(uri, DIGITS, small_kl(DIGITS))
        job = replace(job, runtime=runtime, inputs={**job.inputs, "autoencoder": ref})
    store = open_store(job.runtime.store, cache=tmp_path / "cache")
    source = images.open_source(DIGITS, None)
    store.write_once(listing_key(source.digest), source.listing_bytes())
    commits = killed_ten_times(job, tmp_path, seed=0)
    assert commits[0] > 0
    assert commits[-1] < 450
    record = store.record("latents", stage.job_digest(job))
    assert record is not None
    assert (record.outputs, record.values) == (whole.outputs, whole.values)
    names = store.list(f"latents/{stage.job_digest(job)}/shards/")
    assert [name[-10:] for name in names] == [f"{i:05d}.json" for i in range(450)]
    stage.verify(store, record)
    if isinstance(store, LocalStore):
        # What two encoders made of one shard at different times is one blob: the same bytes.
        assert blobs(store) == blobs(LocalStore(tmp_path / "alone"))


# -- workers that decode ------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, workers: int) -> None:
    job = a_job(tmp_path, make=small_kl)
    job = replace(job, runtime=replace(job.runtime, workers=workers))
    record = stage.run(job, encode.program)
    other = a_job(tmp_path, make=small_kl, store="other")
    other = replace(other, runtime=replace(other.runtime, threads=2))
    assert stage.run(other, encode.program).outputs == record.outputs


def test_calls_of_the_autoencoder_are_the_same_on_any_number_of_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last bits depend on how many images a call takes: the config alone decides that."""
    monkeypatch.setattr(encode, "PIECE_PIXELS", 3 * 8 * 8)
    real, calls = autoencoder.Autoencoder.encode, list[int]()

    def counted(self: autoencoder.Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        return real(self, pixels)

    monkeypatch.setattr(autoencoder.Autoencoder, "encode", counted)
    found = []
    for threads in (1, 4):
        job = a_job(tmp_path, store=f"store-{threads}", shard_images=10, batch_size=8)
        stage.run(replace(job, runtime=replace(job.runtime, threads=threads)), encode.program)
        found.append(sorted(calls))
        calls.clear()
    assert found[0] == found[1]
    # 24 images in shards of 10, 10 and 4: batches of 8 and 2, 8 and 2, 4; each with its mirrors.
    assert found[0] == sorted(2 * [3, 3, 2, 2, 3, 3, 2, 2, 3, 1])


def decoders_of(pid: int) -> list[int]:
    """Worker processes of a program: forked, so they are called what it is called."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    with contextlib.suppress(OSError):
        name = Path(f"/proc/{pid}/cmdline").read_bytes()
        found = [int(child) for child in children.read_text().split()]
        return [child for child in found if Path(f"/proc/{child}/cmdline").read_bytes() == name]
    return []


@contextlib.contextmanager
def slow_program(job: Job, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """The program on images that decode for ever so long."""
    path = folder / "job.json"
    path.write_text(json.dumps(to_json(job)))
    code = (
        "import sys, time; from eqm import encode; from eqm.images import ImageSource\n"
        "read = ImageSource.read\n"
        "def slow(self, i):\n    time.sleep(0.3); return read(self, i)\n"
        "ImageSource.read = slow\n"
        "sys.exit(encode.main([sys.argv[1]]))"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stderr=subprocess.PIPE, text=True
    )
    try:
        yield running
    finally:
        running.kill()
        running.wait(30)


def until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.01)
    raise AssertionError("it did not come")


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_worker_that_is_killed_is_told_with_its_image(tmp_path: Path) -> None:
    job = a_job(tmp_path)
    job = replace(job, runtime=replace(job.runtime, workers=2))
    with slow_program(job, tmp_path) as running:
        first, _ = until(lambda: len(found := decoders_of(running.pid)) == 2 and found)
        time.sleep(0.2)
        os.kill(first, signal.SIGKILL)
        _, said = running.communicate(timeout=60)
    assert running.returncode == stage.EXIT_REFUSED, said
    assert "error: a worker process that decodes images was killed by SIGKILL at image '" in said
    assert "lower runtime.workers or encode.batch_size" in said
    assert "Traceback" not in said


def test_workers_do_not_outlive_a_program_that_is_killed(tmp_path: Path) -> None:
    job = a_job(tmp_path)
    job = replace(job, runtime=replace(job.runtime, workers=3))
    with slow_program(job, tmp_path) as running:
        workers = until(lambda: len(found := decoders_of(running.pid)) == 3 and found)
        running.kill()
        running.wait(30)
        until(lambda: not any(map(is_alive, workers)))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_changed_is_named(tmp_path: Path, workers: int) -> None:
    """The listing is kept, so no image is looked at before its turn comes."""
    job = a_job(tmp_path)
    source = images.open_source(FOLDER, job.runtime.source_uri)
    store = LocalStore(Path(job.runtime.store))
    store.write_once(listing_key(source.digest), source.listing_bytes())
    bad = tmp_path / "data" / "dog" / "007.png"
    bad.write_bytes((tmp_path / "data" / "cat" / "000.png").read_bytes())
    job = replace(job, runtime=replace(job.runtime, workers=workers))
    with pytest.raises(DataError, match=r"image 'dog/007\.png' has other bytes.*changed while"):
        stage.run(job, encode.program)


def test_a_kept_listing_of_other_images_is_refused(tmp_path: Path) -> None:
    job = a_job(tmp_path)
    store = LocalStore(Path(job.runtime.store))
    other = images.open_source(replace(FOLDER, on_corrupt="skip"), job.runtime.source_uri)
    listing = bytearray(other.listing_bytes())
    listing[-1] ^= 1
    store.write_once(listing_key(job.inputs["source"].digest), bytes(listing))
    with pytest.raises(IntegrityError, match="lists other images"):
        stage.run(job, encode.program)


def test_a_defect_in_a_worker_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: images.ImageSource, i: int) -> torch.Tensor:
        raise ZeroDivisionError(f"at {i}")

    job = a_job(tmp_path)
    monkeypatch.setattr(images.ImageSource, "read", broken)
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*ZeroDivisionError: at "):
        stage.run(job, encode.program)


# -- precision ----------------------------------------------------------------------------------


def test_bfloat16_is_another_result_that_is_near(tmp_path: Path) -> None:
    full = a_job(tmp_path, make=small_kl)
    half = a_job(tmp_path, make=small_kl, precision="bfloat16")
    assert stage.job_digest(full) != stage.job_digest(half)
    one, two = (opened(job, stage.run(job, encode.program)) for job in (full, half))
    numbers = np.arange(IMAGES)
    exact, near = (data.moments(numbers).astype(np.float64) for data in (one, two))
    error = np.abs(near - exact)
    assert 0 < error.max() < 0.1 * exact[:, :2].std()


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
