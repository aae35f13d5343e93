"""Images that an earlier set of latents holds are copied to the bit; the others are encoded."""

import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from test_encode import (
    FOLDER,
    IMAGES,
    Encoders,
    Interrupted,
    a_job,
    in_range,
    make_folder,
    opened,
    seal_autoencoder,
    small_kl,
    until,
)

from eqm import autoencoder, clean, encode, readahead, stage
from eqm.config import EncodeConfig, Job, LatentsStage, SourceConfig, replace, stage_config
from eqm.earlier import Earlier, differences, open_earlier, rows_of
from eqm.errors import ConfigError, DataError, IntegrityError
from eqm.images import ImageSource, checked_source, open_source
from eqm.latent_set import LatentSet, open_manifest
from eqm.records import Blob, LatentSpec, Record, to_json
from eqm.stage import listing_key
from eqm.storage import LocalStore, Store
from eqm.walk import Batch, ShardPlan

NEW = 3
GONE = 2


def keep_listing(job: Job, store: Store) -> ImageSource:
    """The images of a job, their listing kept as the flows keep it."""
    config = stage_config("latents", job.config).source
    source = open_source(config, job.runtime.source_uri)
    store.write_once(listing_key(source.digest), source.listing_bytes())
    return source


def store_of(job: Job) -> LocalStore:
    return LocalStore(Path(job.runtime.store))


def change(folder: Path) -> None:
    """Three new pictures, two gone, one renamed and one that is of the other class now."""
    for i in range(NEW):
        pixels = np.random.default_rng((7, i)).integers(0, 256, (12, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "dog" / f"new-{i}.png")
    for i in range(GONE):
        (folder / "cat" / f"{i:03d}.png").unlink()
    (folder / "cat" / "005.png").rename(folder / "cat" / "five.png")
    (folder / "cat" / "006.png").rename(folder / "dog" / "006-was-a-cat.png")


def two_jobs(
    folder: Path,
    change: Callable[[Path], None] = change,
    *,
    make: Callable[[SourceConfig], autoencoder.Autoencoder] = autoencoder.identity,
    **settings: Any,
) -> tuple[Record, Job]:
    """An earlier set, and the job for changed images that may copy from it."""
    first = a_job(folder, make=make, **settings)
    store = store_of(first)
    keep_listing(first, store)
    earlier = stage.run(first, encode.program)
    change(folder / "data")
    later = a_job(folder, make=make, **settings)
    keep_listing(later, store)
    # The same images were fitted on, whatever is in the folder now.
    inputs = {**later.inputs, "autoencoder": first.inputs["autoencoder"], "earlier": earlier.ref}
    return earlier, replace(later, inputs=inputs)


def without_earlier(job: Job) -> Job:
    return replace(job, inputs={k: v for k, v in job.inputs.items() if k != "earlier"})


def moments_by_image(record: Record, store: Store, uri: str | None) -> dict[str, Any]:
    """SHA-256 of each image -> its moments, (V, 2C, H, W)."""
    ref = record.inputs["source"]
    asked, listing = stage_config("latents", record.config).source, listing_key(ref.digest)
    entries = checked_source(asked, uri, ref, listing=store.read(listing)).entries
    views = both_views(open_manifest(record, store)).swapaxes(0, 1)
    return {entry.sha256: view for entry, view in zip(entries, views, strict=True)}


def both_views(data: LatentSet) -> NDArray[np.float16]:
    numbers = np.arange(len(data))
    return np.stack([data.moments(numbers), data.moments(numbers, np.ones(len(data), dtype=bool))])


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of images that are decoded to be encoded."""
    seen, real = [], readahead._read_into

    def counted(slot: Any, at: int, source: ImageSource, image: int) -> None:
        seen.append(source.entries[image].key)
        real(slot, at, source, image)

    monkeypatch.setattr(readahead, "_read_into", counted)
    return seen


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what the autoencoder is shown."""
    sizes, real = [], autoencoder.Autoencoder.encode

    def counted(self: autoencoder.Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pixels))
        return real(self, pixels)

    monkeypatch.setattr(autoencoder.Autoencoder, "encode", counted)
    return sizes


# -- what comes out -----------------------------------------------------------------------------


def test_only_new_images_are_encoded(
    tmp_path: Path,
    looked_at: list[str],
    shown: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    earlier, job = two_jobs(tmp_path, make=small_kl)
    job = replace(job, runtime=replace(job.runtime, workers=0))
    looked_at.clear()
    shown.clear()
    capsys.readouterr()
    record = stage.run(job, encode.program)
    assert sorted(looked_at) == [f"dog/new-{i}.png" for i in range(NEW)]
    assert sum(shown) == 2 * NEW, "each and its mirror"
    assert 0 not in shown
    total = IMAGES + NEW - GONE
    assert record.values["images"] == total
    assert record.values["copied"] == total - NEW
    told = f"encoding: {total} of {total} images ({NEW} new, {total - NEW} copied)"
    assert told in capsys.readouterr().err
    data = opened(job, record)
    data.verify()
    assert data.manifest.lineage["earlier"] == earlier.ref

    scratch = opened(job, stage.run(without_earlier(job), encode.program))
    assert (data.keys, data.labels.tolist()) == (scratch.keys, scratch.labels.tolist())
    assert data.held_out.tolist() == scratch.held_out.tolist()
    found, expected = both_views(data), both_views(scratch)
    # In batches of other sizes float32 rounds otherwise, by some 1e-6, which may turn a value that
    # lies between two of float16 to its other neighbour, and no further.
    assert (np.abs(found.astype(np.float64) - expected) <= np.abs(np.spacing(expected))).all()
    then, now = (
        moments_by_image(one, store_of(job), job.runtime.source_uri) for one in (earlier, record)
    )
    assert len(now.keys() & then.keys()) == total - NEW
    assert all(np.array_equal(now[name], then[name]) for name in now.keys() & then.keys())
    assert np.allclose(data.manifest.channel_std, scratch.manifest.channel_std, rtol=1e-3)


@pytest.mark.parametrize("workers", [0, 2])
def test_sets_of_several_earlier_ones_are_equal(tmp_path: Path, workers: int) -> None:
    """Shards, batches and split may differ; who decodes is no matter."""
    _, job = two_jobs(tmp_path, shard_images=7, batch_size=4)
    asked = replace(FOLDER, held_out_fraction=0.5, split_seed=3)
    config = LatentsStage(source=asked, encode=EncodeConfig(shard_images=5, batch_size=2))
    job = replace(job, config=to_json(config))
    job = replace(job, runtime=replace(job.runtime, workers=workers))
    record = stage.run(job, encode.program)
    scratch = stage.run(without_earlier(job), encode.program)
    # Pixels are their own latents, without any rounding of sums: all bytes are equal.
    shards = [name for name in scratch.outputs if name != "manifest.json"]
    assert {n: record.outputs[n] for n in shards} == {n: scratch.outputs[n] for n in shards}
    again = replace(job, inputs={**job.inputs, "earlier": record.ref})
    assert stage.job_digest(again) != record.digest
    third = stage.run(again, encode.program)
    assert third.values["copied"] == third.values["images"]
    assert {n: third.outputs[n] for n in shards} == {n: scratch.outputs[n] for n in shards}


def test_nothing_new_decodes_nothing(
    tmp_path: Path, looked_at: list[str], shown: list[int]
) -> None:
    def only_fewer(folder: Path) -> None:
        (folder / "cat" / "000.png").unlink()
        (folder / "cat" / "001.png").rename(folder / "dog" / "a-dog-after-all.png")

    _, job = two_jobs(tmp_path, only_fewer)
    job = replace(job, runtime=replace(job.runtime, workers=0))
    looked_at.clear()
    shown.clear()
    record = stage.run(job, encode.program)
    assert (looked_at, shown) == ([], [])
    assert record.values["copied"] == record.values["images"] == IMAGES - 1
    scratch = stage.run(without_earlier(job), encode.program)
    assert record.outputs["shard-00000.tar"] == scratch.outputs["shard-00000.tar"]
    assert "copied" not in scratch.values


def test_a_source_of_which_nothing_was_in_it(tmp_path: Path) -> None:
    def other(folder: Path) -> None:
        for file in folder.rglob("*.png"):
            file.unlink()
        make_folder(folder / "more")
        for file in sorted((folder / "more").rglob("*.png")):
            Image.open(file).transpose(Image.Transpose.ROTATE_180).save(
                folder / file.parent.name / file.name
            )
            file.unlink()
        for empty in (folder / "more" / "cat", folder / "more" / "dog", folder / "more"):
            empty.rmdir()

    _, job = two_jobs(tmp_path, other)
    record = stage.run(job, encode.program)
    assert (record.values["images"], record.values["copied"]) == (IMAGES, 0)


# -- interrupted, shared ------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_at: list[str]
) -> None:
    _, job = two_jobs(tmp_path, make=small_kl)
    job = replace(job, runtime=replace(job.runtime, workers=0))
    made, real = [], encode.commit

    def counted(context: stage.Context, plan: ShardPlan, *rest: Any) -> Any:
        if len(made) == 3:
            raise Interrupted
        made.append(plan)
        return real(context, plan, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "commit", counted)
        with pytest.raises(Interrupted):
            stage.run(job, encode.program)
    looked_at.clear()
    record = stage.run(job, encode.program)
    assert len(looked_at) == NEW - sum(len(plan.new) for plan in made)
    # Elsewhere, without a break, from a copy of what was there before.
    whole = LocalStore(tmp_path / "whole")
    for key in store_of(job).list(""):
        if not key.startswith(f"latents/{record.digest}/"):
            whole.write_once(key, store_of(job).read(key))
    alone = stage.run(
        replace(job, runtime=replace(job.runtime, store=str(whole.root), threads=2)),
        encode.program,
    )
    assert (record.outputs, record.values) == (alone.outputs, alone.values)
    # A shard that is lost is made again, copied images and all.
    (store_of(job).root / f"latents/{record.digest}/record.json").unlink()
    (store_of(job).root / record.outputs["shard-00001.tar"].key).unlink()
    assert stage.run(job, encode.program).outputs == alone.outputs


def test_two_ranges_make_one_set(tmp_path: Path) -> None:
    _, job = two_jobs(tmp_path, make=small_kl)
    assert stage.run_part(in_range(job, 3, 5), encode.program) is None
    record = stage.run_part(in_range(job, 0, 3), encode.program)
    assert record is not None
    fresh = store_of(job)
    for key in [*fresh.list(f"latents/{record.digest}/")]:
        fresh.delete(key)
    whole = stage.run(job, encode.program)
    assert (record.outputs, record.values) == (whole.outputs, whole.values)


@pytest.mark.slow
def test_one_of_two_that_race_is_killed(tmp_path: Path) -> None:
    _, job = two_jobs(tmp_path, make=small_kl, shard_images=1)
    encoders = Encoders(job, tmp_path)
    try:
        until(lambda: len(encoders.commits()) > 2)
        encoders.kill_one_and_start_another(0)
        time.sleep(0.1)
        encoders.kill_one_and_start_another(1)
        assert encoders.end() == [0, 0], (tmp_path / "zygote.log").read_text()
    finally:
        encoders.close()
    record = store_of(job).record("latents", stage.job_digest(job))
    assert record is not None
    stage.verify(store_of(job), record)
    for key in store_of(job).list(f"latents/{record.digest}/"):
        store_of(job).delete(key)
    alone = stage.run(job, encode.program)
    assert (record.outputs, record.values) == (alone.outputs, alone.values)


def test_only_shards_that_are_needed_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they lie in S3, each encoder brings them to its own machine."""
    earlier, job = two_jobs(tmp_path)
    fetched, real = [], LocalStore.fetch

    def counted(self: LocalStore, blob: Blob, *, remembered: bool = False) -> Path:
        fetched.append(blob)
        return real(self, blob, remembered=remembered)

    monkeypatch.setattr(LocalStore, "fetch", counted)
    assert stage.run_part(in_range(job, 3, 5), encode.program) is None
    tars = [shard.tar for shard in opened(job, earlier).manifest.shards]
    found = [tars.index(blob) for blob in fetched if blob in tars]
    assert 0 not in found
    assert 4 in found
    assert len(found) == len(set(found)), "each of them once"


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("encode", {"precision": "bfloat16"}, "encode.precision is 'bfloat16', it was 'float32'"),
        ("source", {"mirror": False}, "source.mirror is False, it was True"),
        ("source", {"image_size_px": 16}, "source.image_size_px is 16, it was 8"),
        ("source", {"channels": 1}, "source.channels is 1, it was 3"),
        ("source", {"exif_rotation": True}, "source.exif_rotation is True, it was False"),
    ],
)
def test_settings_that_decide_moments_must_be_equal(
    made: tuple[Record, Job], section: str, changes: dict[str, Any], message: str
) -> None:
    _, job = made
    asked = stage_config("latents", job.config)
    asked = replace(asked, **{section: replace(getattr(asked, section), **changes)})
    with pytest.raises(DataError, match=message) as told:
        stage.run(replace(job, config=to_json(asked)), encode.program)
    assert "encode all images, without the input 'earlier'" in str(told.value)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Job]:
    """For tests that change nothing."""
    return two_jobs(tmp_path_factory.mktemp("earlier"))


def test_settings_that_decide_no_moments_may_differ(made: tuple[Record, Job]) -> None:
    earlier, job = made
    asked = stage_config("latents", job.config)
    source = replace(
        asked.source, kind="webdataset", split_seed=9, held_out_fraction=0.1, on_corrupt="skip"
    )
    asked = LatentsStage(source=source, encode=EncodeConfig(shard_images=9, batch_size=9))
    assert differences(earlier, asked, job.inputs["autoencoder"]) == []


def test_another_autoencoder_or_algorithm_is_refused(made: tuple[Record, Job]) -> None:
    earlier, job = made
    other = seal_autoencoder(
        job.runtime.store, replace(FOLDER, on_corrupt="skip"), small_kl(FOLDER)
    )
    with pytest.raises(DataError, match=f"the autoencoder is {other.content[:12]}, it was "):
        stage.run(replace(job, inputs={**job.inputs, "autoencoder": other}), encode.program)
    asked, ref = stage_config("latents", job.config), job.inputs["autoencoder"]
    older = replace(earlier, algorithm=1, config={"of": "long ago"})
    assert differences(older, asked, ref) == ["the algorithm is number 2, it was 1"]


def test_moments_of_another_spec_are_refused(made: tuple[Record, Job]) -> None:
    earlier, job = made
    data = opened(job, earlier)
    spec = data.manifest.spec
    set_ = Earlier(data, store_of(job), np.zeros(3, dtype=np.int64))
    set_.check(spec)
    with pytest.raises(DataError, match="its moments are not those of autoencoder other"):
        set_.check(replace(spec, autoencoder="other"))


def test_the_spec_is_compared_before_anything_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, job = two_jobs(tmp_path)

    def refuse(self: Earlier, spec: LatentSpec) -> None:
        raise DataError(f"asked of {spec.autoencoder}")

    monkeypatch.setattr(Earlier, "check", refuse)
    with pytest.raises(DataError, match="asked of identity"):
        stage.run(job, encode.program)
    assert store_of(job).list(f"latents/{stage.job_digest(job)}/") == []


def test_what_is_no_set_is_refused(made: tuple[Record, Job]) -> None:
    _, job = made
    wrong = {**job.inputs, "earlier": job.inputs["autoencoder"]}
    with pytest.raises(ConfigError, match="'earlier' is of stage autoencoder"):
        stage.run(replace(job, inputs=wrong), encode.program)


@pytest.mark.parametrize("lost", ["record", "listing", "index", "shard"])
def test_what_is_gone_is_named_before_anything_is_encoded(
    tmp_path: Path, lost: str, looked_at: list[str]
) -> None:
    earlier, job = two_jobs(tmp_path)
    job = replace(job, runtime=replace(job.runtime, workers=0))
    key = {
        "record": f"latents/{earlier.digest}/record.json",
        "listing": listing_key(earlier.inputs["source"].digest),
        "index": earlier.outputs["index.safetensors"].key,
        "shard": earlier.outputs["shard-00003.tar"].key,
    }[lost]
    store_of(job).delete(key)
    looked_at.clear()
    named = f"latents/{earlier.digest}, to copy" if lost == "record" else key
    with pytest.raises((DataError, IntegrityError), match=named) as told:
        stage.run(job, encode.program)
    assert "encode all images, without the input 'earlier'" in str(told.value)
    assert looked_at == []
    assert store_of(job).list(f"latents/{stage.job_digest(job)}/") == []


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    earlier, job = two_jobs(tmp_path)
    path = store_of(job).root / earlier.outputs["shard-00003.tar"].key
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=f"{path.name} is damaged") as told:
        stage.run(job, encode.program)
    assert f"images cannot be copied from {store_of(job).uri}" in str(told.value)
    assert store_of(job).record("latents", stage.job_digest(job)) is None


def test_cleaning_keeps_what_images_are_copied_from(tmp_path: Path) -> None:
    earlier, job = two_jobs(tmp_path)
    store = store_of(job)
    now = datetime.datetime.now(datetime.UTC)
    for path in store.root.rglob("*"):
        os.utime(path, (0, 0))
    clean.sweep(store, older_than_seconds=30 * 24 * 3600.0, now=now)
    record = stage.run(job, encode.program)
    for path in store.root.rglob("*"):
        os.utime(path, (0, 0))
    assert clean.sweep(store, older_than_seconds=30 * 24 * 3600.0, now=now).keys == []
    for one in (earlier, record):
        stage.verify(store, one)


# -- parts --------------------------------------------------------------------------------------


def test_rows_are_found_whatever_bytes_they_are_of() -> None:
    random = np.random.default_rng(0)
    known = random.integers(0, 2, (300, 32)).astype(np.uint8) * random.integers(
        0, 256, (300, 1), dtype=np.uint8
    )
    known[7:9, 20:] = 0  # zeros at the end
    known[8] = known[7]
    wanted = np.concatenate([random.integers(0, 256, (50, 32), dtype=np.uint8), known[::-1]])
    first: dict[bytes, int] = {}
    for number, row in enumerate(known):
        first.setdefault(row.tobytes(), number)
    expected = [first.get(row.tobytes(), -1) for row in wanted]
    assert rows_of(wanted, known).tolist() == expected
    assert rows_of(wanted[:2], known[:0]).tolist() == [-1, -1]


def test_a_set_holds_no_more_shards_than_are_read(made: tuple[Record, Job]) -> None:
    earlier, job = made
    data = opened(job, earlier)
    assert data.resident == 0
    data.bring([0, 4, 5])
    assert data.resident == 2 / 5
    data.bring([6, 23])
    assert data.resident == 2 / 5
    data.bring([])
    assert data.resident == 0
    copying = Earlier(data, store_of(job), np.arange(IMAGES)[::-1])
    for first in range(4, IMAGES, 5):
        means, _ = copying.moments(range(first, first + 5))
        assert data.resident == 1 / 5
        assert np.array_equal(means[0], both_views(opened(job, earlier))[0, -1 - first])


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_decoded_in_any_order(made: tuple[Record, Job], workers: int) -> None:
    _, job = made
    source = open_source(FOLDER, job.runtime.source_uri)
    plan = ShardPlan(number=0, first=0, count=IMAGES, new=(5, 1, 17, 3, 4, 20, 0, 11))
    batches = [Batch(plan=plan, numbers=numbers) for numbers in plan.batches(8)]
    with readahead.open_readers(source, 8, workers=workers) as readers:
        for batch, pixels in readers.read(batches):
            assert torch.equal(pixels, torch.stack([source.read(i) for i in batch.numbers]))


def test_a_job_that_names_no_set_has_none(made: tuple[Record, Job]) -> None:
    _, job = made
    context: Any = stage.Context(
        job=without_earlier(job),
        config=None,
        store=store_of(job),
        world=None,  # type: ignore[arg-type]
    )
    assert open_earlier(context, None) is None  # type: ignore[arg-type]
