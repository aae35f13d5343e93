"""Samples are a function of the model and their seeds, made once each whatever happens."""

from pathlib import Path
from typing import Any

import chain
import pytest
import torch
from chain import store_of

import eqm
from eqm import generate
from eqm.checkpoint import tensors_from_bytes
from eqm.config import GenerateConfig, Job, SamplerConfig
from eqm.distributed import World
from eqm.errors import DataError, IntegrityError
from eqm.generate import Part, labels_of, parts_of
from eqm.records import Blob, Record, note_from_bytes, to_json
from eqm.stage import Context, job_digest, stage_config
from eqm.storage import Store, record_key


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.getbasetemp() / "chain", until="samples")


def fresh(tiny: chain.Chain, folder: Path, **changes: Any) -> Job:
    """The chain's job with other settings, in a store where nothing was generated."""
    store = chain.copied(tiny, folder / "store", without=("samples", "evaluation"))
    config = chain.tiniest({f"generate.{k.replace('__', '.')}": v for k, v in changes.items()})
    return chain.job(config, store, "samples", tiny.records)


def tensors(store: Store, record: Record, name: str) -> dict[str, torch.Tensor]:
    return tensors_from_bytes(store.get(record.outputs[f"{name}.safetensors"]))


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
        if args[-1].number == 2 and len(made) == 2:
            made.append("killed")
            raise KeyboardInterrupt
        made.append(args[-1].number)
        return make(*args)

    monkeypatch.setattr(generate, "make", killed_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        chain.run(job)
    first = {key: (store.root / key).stat().st_ino for key in store.list(folder)}
    assert [Path(key).stem for key in first] == ["000000", "000001"]
    assert store.record("samples", job_digest(job)) is None
    record = chain.run(job)
    assert made == [0, 1, "killed", 2]
    assert {key: (store.root / key).stat().st_ino for key in first} == first
    assert record.content == tiny["samples"].content


def test_ranks_share_the_parts(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = fresh(tiny, tmp_path)
    monkeypatch.setattr(World, "barrier", lambda _: None)
    for rank in (1, 0):
        outcome = generate.program(
            Context(
                job=job,
                config=stage_config("samples", job.config),
                store=store_of(job),
                world=World(rank, 2, torch.device("cpu")),
            )
        )
        assert (outcome is None) == (rank == 1)
        commits = len(store_of(job).list(f"samples/{job_digest(job)}/parts/"))
        assert commits == (1 if rank == 1 else 3)
    assert chain.run(job).content == tiny["samples"].content


def test_a_damaged_part_is_refused_and_a_lost_one_made_again(
    tiny: chain.Chain, tmp_path: Path
) -> None:
    store = chain.copied(tiny, tmp_path / "store", without=("evaluation",))
    job = chain.elsewhere(tiny.job("samples"), store.root)
    (store.root / record_key("samples", job_digest(job))).unlink()
    key = f"samples/{job_digest(job)}/parts/000001.json"
    file = store.root / note_from_bytes(Blob, store.read(key), "part").key
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(IntegrityError, match=r"damaged.*or delete it"):
        chain.run(job)
    file.unlink()
    assert chain.run(job).content == tiny["samples"].content


# -- what is made -------------------------------------------------------------------------------


def test_labels_are_balanced(tiny: chain.Chain) -> None:
    labels = tensors(tiny.store, tiny["samples"], "samples")["labels"]
    assert labels.tolist() == [s % 10 for s in range(50)]
    assert labels.bincount().tolist() == [5] * 10


def test_the_label_of_a_seed_does_not_depend_on_where_the_run_begins() -> None:
    config = GenerateConfig(samples=30, first_seed=7)
    labels = labels_of(config, Part(number=1, first=4, count=5), classes=10)
    assert labels.tolist() == [1, 2, 3, 4, 5]


def test_two_stores_hold_the_same(tiny: chain.Chain, tmp_path: Path) -> None:
    again = chain.run(fresh(tiny, tmp_path))
    assert again.outputs == tiny["samples"].outputs
    assert again.ref == tiny["samples"].ref


def test_a_sample_is_a_function_of_its_seed(tiny: chain.Chain, tmp_path: Path) -> None:
    """Other parts, another beginning: the same samples."""
    job = fresh(tiny, tmp_path, first_seed=13, samples=30, sampler__batch_size=7)
    record = chain.run(job)
    assert record.digest != tiny["samples"].digest
    mine = tensors(store_of(job), record, "samples")
    whole = tensors(tiny.store, tiny["samples"], "samples")
    assert mine.keys() == {
        *("features", "logits", "spatial"),
        *("labels", "evaluations", "gradient_norms"),
    }
    for name, value in mine.items():
        assert torch.allclose(value, whole[name][13:43], atol=1e-4), name
    images = tensors(store_of(job), record, "images")["images"].int()
    others = tensors(tiny.store, tiny["samples"], "images")["images"].int()
    assert (images[:27] - others[13:]).abs().max() <= 1


def test_samples_are_those_of_the_public_model(tiny: chain.Chain) -> None:
    trained = eqm.load(tiny.uri("train"), device="cpu")
    labels, rule = [s % 10 for s in range(40)], eqm.NAG(step_size=0.1, momentum=0.3)
    found = eqm.sample(trained, labels=labels, seeds=range(40), rule=rule, updates=5)
    kept = tensors(tiny.store, tiny["samples"], "images")["images"]
    assert (found.images().int() - kept.int()).abs().max() <= 1


def test_the_first_images_are_kept(tiny: chain.Chain) -> None:
    record = tiny["samples"]
    images = tensors(tiny.store, record, "images")["images"]
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (40, 1, 8, 8))
    assert record.values["images_kept"] == 40
    assert record.values["samples"] == 50
    assert record.values["mean_field_evaluations"] == 5.0
    assert len(tensors(tiny.store, record, "samples")["features"]) == 50


@pytest.mark.parametrize("keep", [0, 20, 30, 99])
def test_so_many_images_are_kept(tiny: chain.Chain, tmp_path: Path, keep: int) -> None:
    job = fresh(tiny, tmp_path, keep_images=keep)
    images = tensors(store_of(job), chain.run(job), "images")["images"]
    assert len(images) == min(keep, 50)
    all_kept = tensors(tiny.store, tiny["samples"], "images")["images"]
    assert torch.equal(images[:40], all_kept[: len(images)])


def test_the_trajectory_leads_from_noise_to_the_samples(tiny: chain.Chain) -> None:
    path = tensors(tiny.store, tiny["samples"], "trajectory")
    assert path["updates"].tolist() == [0, 2, 5]
    assert tuple(path["images"].shape) == (3, 10, 1, 8, 8)
    kept = tensors(tiny.store, tiny["samples"], "images")["images"]
    assert (path["images"][-1].int() - kept[:10].int()).abs().max() <= 1
    assert (path["images"][0].int() - kept[:10].int()).abs().max() > 20


def test_more_moments_than_updates_are_shown_once_each(tiny: chain.Chain) -> None:
    config = chain.tiniest({"generate.trajectory_points": 30}).generate
    path = generate.trajectory(config, eqm.load(tiny.uri("train"), device="cpu"))
    assert path["updates"].tolist() == [0, 1, 2, 3, 4, 5]
    assert len(path["images"]) == 6


def test_divergence_is_told_with_its_seeds(tiny: chain.Chain, tmp_path: Path) -> None:
    job = fresh(tiny, tmp_path, first_seed=3, sampler__step_size=1e9)
    with pytest.raises(DataError, match=r"20 of 20 samples diverged \(seeds 3, 4, 5, 6, 7.*lower"):
        chain.run(job)
    assert store_of(job).list(f"samples/{job_digest(job)}/") == []


def test_settings_of_the_sampler_are_in_the_digest(tiny: chain.Chain, tmp_path: Path) -> None:
    job = fresh(tiny, tmp_path, sampler__guidance=2.0)
    record = chain.run(job)
    assert record.digest != tiny["samples"].digest
    assert record.config == to_json(job.config)
    mine = tensors(store_of(job), record, "samples")["features"]
    assert not torch.equal(mine, tensors(tiny.store, tiny["samples"], "samples")["features"])
