"""Samples are a function of the model and their seeds, made once each whatever happens."""

import contextlib
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chain
import numpy as np
import pytest
import torch
from chain import store_of

import eqm
from eqm import generate
from eqm.checkpoint import tensors_from_bytes
from eqm.config import GenerateConfig, Job, SamplerConfig, replace
from eqm.distributed import World
from eqm.errors import DataError, IntegrityError, StoreError
from eqm.generate import Committed
from eqm.records import Record, note_from_bytes, to_json
from eqm.samples import (
    columns,
    config_of,
    difference,
    export_npz,
    kept,
    kept_images,
    labels_of,
    parts_of,
)
from eqm.stage import Context, divergence_key, job_digest, stage_config
from eqm.storage import Store, record_key

PINNED = [8, 5, 2, 7, 0, 4, 5, 5, 7, 3, 7, 7]
"""Labels of the first seeds with ten classes: what is drawn for a seed never changes."""

STOP_BELOW = 4.45
"""A norm that samples of the chain's model reach at different times, by steps of 0.5."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.getbasetemp() / "chain", until="samples")


def fresh(tiny: chain.Chain, folder: Path, **changes: Any) -> Job:
    """The chain's job with other settings, in a store where nothing was generated."""
    store = chain.copied(tiny, folder / "store", without=("samples", "evaluation"))
    config = chain.tiniest({f"generate.{k.replace('__', '.')}": v for k, v in changes.items()})
    return chain.job(config, store, "samples", tiny.records)


def in_world(job: Job, rank: int, size: int) -> Context:
    """What a rank works with."""
    world = World(rank, size, torch.device("cpu"))
    config = stage_config("samples", job.config)
    return Context(job=job, config=config, store=store_of(job), world=world)


def images_of(store: Store, record: Record) -> torch.Tensor:
    return torch.cat(list(kept_images(store, record)))


def path_of(store: Store, record: Record) -> dict[str, torch.Tensor]:
    return tensors_from_bytes(store.get(record.outputs["trajectory.safetensors"]))


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether images are equal but for rounding."""
    return bool((a.int() - b.int()).abs().max() <= 1)


# -- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "size"), [(1, 1), (50, 20), (40, 20), (7, 100), (5, 2)])
def test_parts_hold_every_sample_once(samples: int, size: int) -> None:
    parts = parts_of(GenerateConfig(samples=samples, sampler=SamplerConfig(batch_size=size)))
    seen = [s for part in parts for s in range(part.first, part.first + part.count)]
    assert seen == list(range(samples))
    assert [part.number for part in parts] == list(range(len(parts)))
    assert max(part.count for part in parts) <= size


def test_a_killed_run_goes_on_at_the_part_where_it_was(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = fresh(tiny, tmp_path)
    store, folder = store_of(job), f"samples/{job_digest(job)}/parts/"
    make, made = generate.make, []

    def killed_at_the_last(*args: Any) -> dict[str, torch.Tensor]:
        first = args[3][0]
        if first == 40 and len(made) == 2:
            made.append("killed")
            raise KeyboardInterrupt
        made.append(first)
        return make(*args)

    monkeypatch.setattr(generate, "make", killed_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        chain.run(job)
    first = {key: (store.root / key).stat().st_ino for key in store.list(folder)}
    assert [Path(key).stem for key in first] == ["000000", "000001"]
    assert store.record("samples", job_digest(job)) is None
    record = chain.run(job)
    assert made == [0, 20, "killed", 40]
    assert {key: (store.root / key).stat().st_ino for key in first} == first
    assert record.content == tiny["samples"].content


def test_ranks_share_the_parts(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = fresh(tiny, tmp_path)
    lefts: list[int] = []
    monkeypatch.setattr(World, "barrier", lambda _, left=None: left and lefts.append(left()))
    monkeypatch.setattr(World, "first_at_work", lambda _: contextlib.nullcontext())
    for rank in (1, 0):
        outcome = generate.program(in_world(job, rank, 2))
        assert (outcome is None) == (rank == 1)
        commits = len(store_of(job).list(f"samples/{job_digest(job)}/parts/"))
        assert commits == (1 if rank == 1 else 3)
    # Whoever is done is told what others have to do, and goes on waiting while that falls.
    assert lefts == [2, 0]
    assert chain.run(job).content == tiny["samples"].content


def test_a_slow_rank_is_waited_for_and_a_silent_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of another speed would end the others, at their barrier, minutes before the end."""
    met: list[float] = []
    monkeypatch.setattr(World, "sum_", lambda _, flat: met.append(time.monotonic()) or flat)
    world = World(0, 2, torch.device("cpu"), timeout_seconds=0.4)
    began = time.monotonic()
    # Five parts of a fifth of a second: longer than the time-out together, and none of them alone.
    world.barrier(left=lambda: 5 - int((time.monotonic() - began) / 0.2))
    assert 1.0 <= met[0] - began < 5
    began = time.monotonic()
    world.barrier(left=lambda: 3)
    assert 0.4 <= met[1] - began < 5


def test_a_damaged_part_is_refused_and_a_lost_one_made_again(
    tiny: chain.Chain, tmp_path: Path
) -> None:
    store = chain.copied(tiny, tmp_path / "store", without=("evaluation",))
    job = chain.elsewhere(tiny.job("samples"), store.root)
    (store.root / record_key("samples", job_digest(job))).unlink()
    key = f"samples/{job_digest(job)}/parts/000001.json"
    file = store.root / note_from_bytes(Committed, store.read(key), "part").table.key
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(IntegrityError, match=r"damaged.*or delete it"):
        chain.run(job)
    file.unlink()
    assert chain.run(job).content == tiny["samples"].content


@pytest.mark.parametrize("stop_below", [None, STOP_BELOW])
def test_samples_are_equal_for_any_batch_and_number_of_ranks(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_below: float | None
) -> None:
    monkeypatch.setattr(World, "barrier", lambda *_, **__: None)
    monkeypatch.setattr(World, "first_at_work", lambda _: contextlib.nullcontext())
    found = {}
    for size, ranks in ((20, 1), (20, 2), (7, 1), (50, 1)):
        changes = {
            "sampler__stop_below": stop_below,
            "sampler__updates": 12,
            "sampler__step_size": 0.5,
        }
        job = fresh(tiny, tmp_path / f"{size}-{ranks}", sampler__batch_size=size, **changes)
        outcomes = [generate.program(in_world(job, rank, ranks)) for rank in range(ranks)[::-1]]
        found[size, ranks] = outcomes[-1], store_of(job), chain.run(job)
    outcome, store, record = found[20, 1]
    assert found[20, 2][0].outputs == outcome.outputs
    whole, images = columns(store, record), images_of(store, record)
    assert (len(set(whole["evaluations"].tolist())) > 3) == (stop_below is not None)
    for _, other_store, other in found.values():
        for name, value in columns(other_store, other).items():
            assert torch.allclose(value, whole[name], atol=1e-3), name
        assert near(images_of(other_store, other), images)


def test_slots_are_refilled_across_parts(tiny: chain.Chain, monkeypatch: Any) -> None:
    """Half of the updates is not spent waiting for the slowest of each batch."""
    config = chain.tiniest({"generate.sampler.batch_size": 5}).generate
    settings = replace(config.sampler, stop_below=STOP_BELOW, step_size=0.5, updates=12)
    config = replace(config, sampler=settings)
    trained, batches = eqm.load(tiny.uri("train"), device="cpu"), []
    gradient = trained.field.gradient
    monkeypatch.setattr(
        trained.field, "gradient", lambda x, *a, **k: batches.append(len(x)) or gradient(x, *a, **k)
    )
    found = dict(generate.found_in_parts(config, trained, parts_of(config)))
    assert sorted(part.first for part in found) == list(range(0, 50, 5))
    assert set(batches) == {5}
    spent = torch.cat([samples.evaluations for samples in found.values()])
    together = sum(int(samples.evaluations.max()) for samples in found.values())
    assert len(batches) <= int(spent.sum()) / 5 + 12
    assert len(batches) < together


def test_what_cannot_be_made_durable_is_told(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, commit = fresh(tiny, tmp_path), generate.commit

    def full(context: Context, part: Any, *more: Any) -> None:
        if part.number == 1:
            raise StoreError("the disk is full")
        commit(context, part, *more)

    monkeypatch.setattr(generate, "commit", full)
    with pytest.raises(StoreError, match="the disk is full"):
        chain.run(job)
    monkeypatch.undo()
    assert chain.run(job).content == tiny["samples"].content


def test_how_long_it_took_is_kept_and_in_no_digest(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else two runs may have taken the same milliseconds.
    slow = SimpleNamespace(perf_counter=lambda: 1000 * time.perf_counter())
    monkeypatch.setattr(generate, "time", slow)
    first, again = tiny["samples"], chain.run(fresh(tiny, tmp_path))
    for record in (first, again):
        assert record.provenance["seconds"].keys() == {"sampler", "decoder", "extractor"}
        assert all(value > 0 for value in record.provenance["seconds"].values())
    assert first.provenance["seconds"] != again.provenance["seconds"]
    assert first.content == again.content


# -- what is made -------------------------------------------------------------------------------


def test_labels_are_balanced(tiny: chain.Chain) -> None:
    found = columns(tiny.store, tiny["samples"], "labels")
    assert found.keys() == {"labels"}
    labels = found["labels"]
    assert labels.tolist() == [s % 10 for s in range(50)]
    assert labels.bincount().tolist() == [5] * 10


@pytest.mark.parametrize("rule", ["balanced", "random"])
def test_the_label_of_a_seed_does_not_depend_on_where_the_run_begins(rule: Any) -> None:
    config = GenerateConfig(labels=rule)
    whole = labels_of(config, range(60), 7)
    assert torch.equal(labels_of(config, [59, 3, 17], 7), whole[[59, 3, 17]])
    assert torch.equal(labels_of(replace(config, first_seed=9), range(9, 20), 7), whole[9:20])


def test_random_labels_are_drawn_evenly_and_independently() -> None:
    labels = labels_of(GenerateConfig(labels="random"), range(50_000), 10)
    counts = labels.bincount(minlength=10).double()
    # Chi-squared with 9 degrees of freedom: beyond 27.9 once in a thousand.
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 27.9
    pairs = (10 * labels[:-1] + labels[1:]).bincount(minlength=100).double()
    assert float(((pairs - 500) ** 2 / 500).sum()) < 149
    assert labels[:12].tolist() == PINNED
    assert labels_of(GenerateConfig(labels="random"), range(5), 0).tolist() == [0] * 5


def test_random_labels_are_what_the_samples_have(tiny: chain.Chain, tmp_path: Path) -> None:
    job = fresh(tiny, tmp_path, labels="random")
    record = chain.run(job)
    labels = columns(store_of(job), record)["labels"]
    assert torch.equal(labels, labels_of(config_of(record), range(50), 10))
    trained = eqm.load(tiny.uri("train"), device="cpu")
    rule = eqm.NAG(step_size=0.1, momentum=0.3)
    found = eqm.sample(trained, labels=labels[:40], seeds=range(40), rule=rule, updates=5)
    assert near(found.images(), images_of(store_of(job), record))


def test_two_stores_hold_the_same(tiny: chain.Chain, tmp_path: Path) -> None:
    again = chain.run(fresh(tiny, tmp_path))
    assert again.outputs == tiny["samples"].outputs
    assert again.ref == tiny["samples"].ref


def test_a_sample_is_a_function_of_its_seed(tiny: chain.Chain, tmp_path: Path) -> None:
    """Other parts, another beginning: the same samples."""
    job = fresh(tiny, tmp_path, first_seed=13, samples=30, sampler__batch_size=7)
    record = chain.run(job)
    assert record.digest != tiny["samples"].digest
    mine = columns(store_of(job), record)
    whole = columns(tiny.store, tiny["samples"])
    assert mine.keys() == {
        *("features", "logits", "spatial"),
        *("labels", "evaluations", "gradient_norms"),
    }
    for name, value in mine.items():
        assert torch.allclose(value, whole[name][13:43], atol=1e-4), name
    assert near(images_of(store_of(job), record)[:27], images_of(tiny.store, tiny["samples"])[13:])


def test_samples_are_those_of_the_public_model(tiny: chain.Chain) -> None:
    trained = eqm.load(tiny.uri("train"), device="cpu")
    labels, rule = [s % 10 for s in range(40)], eqm.NAG(step_size=0.1, momentum=0.3)
    found = eqm.sample(trained, labels=labels, seeds=range(40), rule=rule, updates=5)
    assert near(found.images(), images_of(tiny.store, tiny["samples"]))


def test_the_first_images_are_kept(tiny: chain.Chain) -> None:
    record = tiny["samples"]
    images = images_of(tiny.store, record)
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (40, 1, 8, 8))
    assert record.values["images_kept"] == 40
    assert record.values["samples"] == 50
    assert record.values["mean_field_evaluations"] == 5.0
    assert len(columns(tiny.store, record)["features"]) == 50
    assert {name for name in record.outputs if name.startswith("images")} == {
        "images-000000.safetensors",
        "images-000001.safetensors",
    }


@pytest.mark.parametrize("keep", [0, 20, 30, 99])
def test_so_many_images_are_kept(tiny: chain.Chain, tmp_path: Path, keep: int) -> None:
    job = fresh(tiny, tmp_path, keep_images=keep)
    images = images_of(store_of(job), chain.run(job))
    assert tuple(images.shape) == (min(keep, 50), 1, 8, 8)
    all_kept = images_of(tiny.store, tiny["samples"])
    assert torch.equal(images[:40], all_kept[: len(images)])


def test_the_trajectory_leads_from_noise_to_the_samples(tiny: chain.Chain) -> None:
    path = path_of(tiny.store, tiny["samples"])
    assert path["updates"].tolist() == [0, 2, 5]
    assert tuple(path["images"].shape) == (3, 10, 1, 8, 8)
    samples = images_of(tiny.store, tiny["samples"])[:10]
    assert near(path["images"][-1], samples)
    assert (path["images"][0].int() - samples.int()).abs().max() > 20


def test_more_moments_than_updates_are_shown_once_each(tiny: chain.Chain) -> None:
    config = chain.tiniest({"generate.trajectory_points": 30}).generate
    path = generate.trajectory(config, eqm.load(tiny.uri("train"), device="cpu"))
    assert path["updates"].tolist() == [0, 1, 2, 3, 4, 5]
    assert len(path["images"]) == 6


def test_a_descent_that_stops_early_is_shown_to_its_end(tiny: chain.Chain) -> None:
    config = chain.tiniest({"generate.trajectory_points": 4}).generate
    settings = replace(config.sampler, stop_below=STOP_BELOW, step_size=0.5, updates=60)
    trained = eqm.load(tiny.uri("train"), device="cpu")
    path = generate.trajectory(replace(config, sampler=settings), trained)
    last = int(path["updates"][-1])
    assert path["updates"].tolist()[:-1] == [u for u in (0, 20, 40) if u < last]
    assert last < 60
    assert len(path["images"]) == len(path["updates"])


def test_the_descent_is_as_the_config_says_in_every_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(generate.sampling, "sample", lambda _, **how: asked.append(how))
    sampler = SamplerConfig(
        rule="heavy-ball",
        step_size=0.02,
        momentum=0.4,
        updates=7,
        guidance=1.5,
        guidance_channels=3,
        precision="bfloat16",
    )
    trained: Any = SimpleNamespace(spec=SimpleNamespace(classes=("a", "b", "c")))
    generate.descend(GenerateConfig(sampler=sampler), trained, [4, 5])
    (how,) = asked
    assert how.pop("labels").tolist() == [1, 2]
    assert how == {
        "seeds": [4, 5],
        "start": None,
        "rule": eqm.HeavyBall(step_size=0.02, momentum=0.4),
        "updates": 7,
        "stop": None,
        "guidance": 1.5,
        "guidance_channels": 3,
        "precision": "bfloat16",
    }


def test_what_samples_cost_and_where_they_ended_is_of_all_of_them(
    tiny: chain.Chain, tmp_path: Path
) -> None:
    changes = {"stop_below": STOP_BELOW, "updates": 12, "step_size": 0.5}
    job = fresh(tiny, tmp_path, **{f"sampler__{name}": value for name, value in changes.items()})
    record = chain.run(job)
    found = columns(store_of(job), record, "evaluations", "gradient_norms")
    spent, norms = found["evaluations"].double(), found["gradient_norms"].double()
    assert record.values["mean_field_evaluations"] == float(spent.mean()) != float(spent.median())
    assert record.values["median_gradient_norm"] == float(norms.median()) != float(norms.mean())


def test_a_trajectory_has_one_of_each_class_whatever_the_labels(
    tiny: chain.Chain, tmp_path: Path
) -> None:
    job = fresh(tiny, tmp_path, labels="random")
    found = chain.run(job)
    assert columns(store_of(job), found, "labels")["labels"][:10].tolist() == PINNED[:10]
    name = "trajectory.safetensors"
    assert found.outputs[name] == tiny["samples"].outputs[name]


def test_divergence_is_told_with_its_seeds(tiny: chain.Chain, tmp_path: Path) -> None:
    job = fresh(tiny, tmp_path, first_seed=3, sampler__step_size=1e9)
    with pytest.raises(DataError, match=r"20 of 20 samples diverged \(seeds 3, 4, 5, 6, 7.*lower"):
        chain.run(job)
    # Nothing of the samples, and why.
    note = divergence_key("samples", job_digest(job))
    assert store_of(job).list(f"samples/{job_digest(job)}/") == [note]


def test_settings_of_the_sampler_are_in_the_digest(tiny: chain.Chain, tmp_path: Path) -> None:
    job = fresh(tiny, tmp_path, sampler__guidance=2.0)
    record = chain.run(job)
    assert record.digest != tiny["samples"].digest
    assert record.config == to_json(job.config)
    mine = columns(store_of(job), record)["features"]
    assert not torch.equal(mine, columns(tiny.store, tiny["samples"])["features"])


@pytest.mark.parametrize("stop_below", [None, 1.5])
def test_every_setting_of_the_sampler_reaches_the_descent(
    monkeypatch: pytest.MonkeyPatch, stop_below: float | None
) -> None:
    given: dict[str, Any] = {}

    def descent(_model: object, **how: Any) -> tuple[()]:
        given.update(how)
        return ()

    monkeypatch.setattr(generate.sampling, "sample", descent)
    monkeypatch.setattr(generate.sampling, "samples_as_found", descent)
    how = {"guidance": 2.0, "guidance_channels": 3, "updates": 7, "precision": "bfloat16"}
    rule = {"rule": "heavy-ball", "step_size": 0.5, "momentum": 0.2}
    sampler = SamplerConfig(**how, **rule, stop_below=stop_below, batch_size=4)  # type: ignore[arg-type]
    config = GenerateConfig(samples=6, first_seed=10, keep_images=0, sampler=sampler)
    model: Any = SimpleNamespace(spec=SimpleNamespace(classes=("a", "b", "c")))
    list(generate.found_in_parts(config, model, parts_of(config)[1:]))
    assert {name: given[name] for name in how} == how
    assert given["rule"] == eqm.HeavyBall(step_size=0.5, momentum=0.2)
    assert given["stop"] == (None if stop_below is None else eqm.GradientNormBelow(stop_below))
    assert (list(given["seeds"]), given["labels"].tolist()) == ([14, 15], [2, 0])
    assert given.get("slots", 4) == 4


def test_the_precision_of_the_descent_is_in_the_digest_and_moves_samples_little(
    tiny: chain.Chain, tmp_path: Path
) -> None:
    job = fresh(tiny, tmp_path, sampler__precision="bfloat16")
    record = chain.run(job)
    assert record.digest != tiny["samples"].digest
    mine, usual = images_of(store_of(job), record), images_of(tiny.store, tiny["samples"])
    assert not torch.equal(mine, usual)
    assert float((mine.float() - usual.float()).abs().mean()) < 8
    again = generate.remake(store_of(job), record, [3], exact=True)
    assert torch.equal(again["images"][0], mine[3])


# -- once more ----------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_samples_are_made_again_from_their_record(tiny: chain.Chain, exact: bool) -> None:
    seeds = [31, 2, 39]
    sealed = kept(tiny.store, tiny["samples"], seeds)
    again = generate.remake(tiny.store, tiny["samples"], seeds, exact=exact)
    assert again.keys() == sealed.keys()
    assert near(again["images"], sealed["images"])
    for name, value in sealed.items():
        assert torch.allclose(again[name].double(), value.double(), atol=1.0), name
        assert not exact or torch.equal(again[name], value), name


def test_a_seed_beyond_the_record_is_made_and_only_exactly_refused(tiny: chain.Chain) -> None:
    made = generate.remake(tiny.store, tiny["samples"], [77])
    assert made["labels"].tolist() == [7]
    with pytest.raises(DataError, match="seed 77 is not among the samples: 0 to 49 are"):
        generate.remake(tiny.store, tiny["samples"], [77], exact=True)
    with pytest.raises(DataError, match="no seeds"):
        generate.remake(tiny.store, tiny["samples"], [])
    with pytest.raises(DataError, match="is no set of samples"):
        generate.remake(tiny.store, tiny["train"], [0])


def test_what_a_gpu_made_in_tf32_is_made_again_on_a_cpu_but_not_its_bits(tiny: chain.Chain) -> None:
    made = replace(tiny["samples"], config=json.loads(json.dumps(tiny["samples"].config)))
    made.config["generate"]["sampler"]["precision"] = "tf32"
    usual = generate.remake(tiny.store, tiny["samples"], [5])
    assert torch.equal(generate.remake(tiny.store, made, [5])["images"], usual["images"])
    with pytest.raises(DataError, match="were made in 'tf32', which only GPUs of NVIDIA have"):
        generate.remake(tiny.store, made, [5], exact=True)


def test_images_of_samples_without_one_are_not_made_up(tiny: chain.Chain) -> None:
    """40 of the 50 images are kept."""
    assert "images" in kept(tiny.store, tiny["samples"], [39])
    assert "images" not in kept(tiny.store, tiny["samples"], [39, 40])


def test_another_sample_is_told_from_rounding(tiny: chain.Chain) -> None:
    sealed, other = (kept(tiny.store, tiny["samples"], [seed]) for seed in (31, 21))
    found = difference(sealed, sealed)
    assert (found.bits, found.levels, found.values, found.features) == (False, 0, 0, 0.0)
    assert found.is_rounding
    off = {**sealed, "images": sealed["images"].bitwise_xor(1)}
    found = difference(off, sealed)
    assert (found.bits, found.levels, found.values) == (True, 1, 64)
    assert found.is_rounding
    assert not difference(other, sealed).is_rounding
    # One pixel that is far away is another picture, however near the mean is.
    one = {**sealed, "images": sealed["images"].clone()}
    one["images"][0, 0, 4, 4] ^= 64
    found = difference(one, sealed)
    assert (found.levels, found.values, found.is_rounding) == (64, 1, False)
    # Without an image it is the features that tell.
    without = {name: value for name, value in sealed.items() if name != "images"}
    assert difference(other, without).levels is None
    assert not difference(other, without).is_rounding


# -- files of the field -------------------------------------------------------------------------


def test_images_are_exported_as_adm_reads_them(tiny: chain.Chain, tmp_path: Path) -> None:
    file = tmp_path / "samples.npz"
    file.write_text("what was there before")
    assert export_npz(tiny.store, tiny["samples"], file, count=33) == 33
    with np.load(file, allow_pickle=False) as archive:
        pixels, labels = archive["arr_0"], archive["arr_1"]
    assert (pixels.dtype, pixels.shape) == (np.uint8, (33, 8, 8, 3))
    images = images_of(tiny.store, tiny["samples"])[:33]
    assert np.array_equal(pixels, images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy())
    assert labels.tolist() == [s % 10 for s in range(33)]
    again = tmp_path / "again.npz"
    export_npz(tiny.store, tiny["samples"], again, count=33)
    assert again.read_bytes() == file.read_bytes()


def test_images_that_were_not_kept_are_not_exported(tiny: chain.Chain, tmp_path: Path) -> None:
    file = tmp_path / "samples.npz"
    for count in (None, 41):
        with pytest.raises(DataError, match=r"keep 40 of their 50 images.*generate.keep_images"):
            export_npz(tiny.store, tiny["samples"], file, count=count)
    with pytest.raises(DataError, match="there is no folder"):
        export_npz(tiny.store, tiny["samples"], tmp_path / "nowhere" / "samples.npz", count=1)
    assert list(tmp_path.iterdir()) == []
