"""FSDP2 by two real processes: the losses of ddp, and checkpoints that either goes on from."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import chain
import pytest
import torch

from eqm import checkpoint, distributed, glimpse, gradients, train
from eqm.config import (
    ComputeConfig,
    Job,
    ObjectiveConfig,
    SamplerConfig,
    TrainStage,
    replace,
    with_settings,
)
from eqm.errors import ConfigError
from eqm.events import events_of
from eqm.latent_set import open_manifest
from eqm.model import from_record
from eqm.records import from_json, to_json
from eqm.sharding import check_shardable
from eqm.stage import job_digest, open_ref
from eqm.storage import LocalStore

ROOT = Path(__file__).parent.parent
BATCH, UPDATES = 32, 12
SEGMENT_BYTES = 4096
"""Of a gradient, for a network as small as this to have several."""
HALF = UPDATES // 2 * BATCH
SHARED = ComputeConfig(parallel="fsdp2")
EVERYTHING = {
    "images": UPDATES * BATCH,
    "gradient_clip": 1.0,
    "ema_tracks": [40],
    "ema_power": [0.1],
    "ema_snapshot_images": HALF,
}
FEW = SamplerConfig(updates=2)
PLAN: dict[str, list[tuple[ComputeConfig, int | None]]] = {
    "ddp": [(ComputeConfig(), None)],
    "ddp, in segments": [(ComputeConfig(), None)],
    "fsdp2": [(SHARED, None)],
    "ddp, then fsdp2": [(ComputeConfig(), HALF), (SHARED, None)],
    "fsdp2, then ddp": [(SHARED, HALF), (ComputeConfig(), None)],
    "fsdp2, then alone": [(SHARED, HALF)],
}
"""Name of a run -> the attempts that make it: how it computes, and where it is stopped."""
FURTHER: dict[str, list[tuple[ComputeConfig, int | None]]] = {
    "fsdp2, looked at": [(SHARED, HALF), (SHARED, None)],
    "ddp, dot": [(ComputeConfig(), None)],
    "fsdp2, dot": [(replace(SHARED, micro_batch=8, checkpointing=True), None)],
    "ddp, bf16": [(ComputeConfig(), None)],
    "fsdp2, bf16": [(SHARED, None)],
}
"""The same, of long tests."""


def settings(name: str, job: Job) -> Job:
    changed: dict[str, Any] = {t: dict(table) for t, table in job.config.items()}
    changed["train"] |= EVERYTHING
    if "dot" in name:
        changed["objective"]["energy"] = "dot"
    if "bf16" in name:
        changed["train"]["precision"] = "bfloat16"
    return replace(job, config=changed)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    return of_plan(PLAN, tmp_path_factory)


@pytest.fixture(scope="module")
def further(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    return of_plan(FURTHER, tmp_path_factory)


def of_plan(
    named: dict[str, list[tuple[ComputeConfig, int | None]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Job]:
    """All runs of a plan, by one pair of processes."""
    made = chain.build(tmp_path_factory.getbasetemp() / "chain", until="train")
    folder = tmp_path_factory.mktemp("pair")
    jobs, attempts = {}, []
    for number, (name, steps) in enumerate(named.items()):
        store = chain.copied(made, folder / str(number), without=("train", "samples", "evaluation"))
        jobs[name] = settings(name, chain.elsewhere(made.job("train"), store.root))
        looks = {"grid_every_images": 4 * BATCH, "grid_sampler": FEW} if "looked" in name else {}
        for compute, end in steps:
            runtime = replace(jobs[name].runtime, compute=compute, **looks)
            size = SEGMENT_BYTES if "segments" in name else gradients.SEGMENT_BYTES
            attempts.append([to_json(replace(jobs[name], runtime=runtime)), end, size])
    plan = folder / "plan.json"
    plan.write_text(json.dumps(attempts))
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, plan]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, *map(str, line)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return jobs


def found(job: Job) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """Curve and tensors of a sealed run."""
    store = LocalStore(Path(job.runtime.store))
    record = store.record("train", job_digest(job))
    assert record is not None
    tensors = {
        f"{name}/{key}": value
        for name, blob in record.outputs.items()
        if name.endswith("safetensors")
        for key, value in checkpoint.tensors_from_bytes(store.get(blob)).items()
    }
    return json.loads(store.get(record.outputs["history.json"])), tensors


def check_alike(job: Job, other: Job, *, loss: float = 1e-6, weights: float = 1e-5) -> None:
    (curve, tensors), (usual, expected) = found(job), found(other)
    assert len(curve["loss"]) == UPDATES
    assert curve["loss"] == pytest.approx(usual["loss"], rel=loss)
    assert curve["gradient_norm"] == pytest.approx(usual["gradient_norm"], rel=10 * loss)
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert torch.allclose(tensor, expected[key], rtol=weights, atol=weights), key


def test_shared_weights_train_as_whole_ones(runs: dict[str, Job]) -> None:
    check_alike(runs["fsdp2"], runs["ddp"])


def test_a_gradient_that_is_summed_while_it_is_computed_is_the_same(runs: dict[str, Job]) -> None:
    """To the last bit: two processes add two numbers, in whatever segments."""
    (curve, tensors), (usual, expected) = found(runs["ddp, in segments"]), found(runs["ddp"])
    assert curve == usual
    weights = sum(t.nbytes for key, t in expected.items() if key.startswith("ema.safetensors"))
    assert weights > 4 * SEGMENT_BYTES
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("name", ["ddp, then fsdp2", "fsdp2, then ddp"])
def test_either_goes_on_from_a_checkpoint_of_the_other(runs: dict[str, Job], name: str) -> None:
    job = runs[name]
    assert len(checkpoint.complete(LocalStore(Path(job.runtime.store)), job_digest(job))) == 2
    check_alike(job, runs["ddp"])


def test_one_process_goes_on_from_a_checkpoint_of_shared_weights(runs: dict[str, Job]) -> None:
    job = runs["fsdp2, then alone"]
    store = LocalStore(Path(job.runtime.store))
    (found,) = checkpoint.complete(store, job_digest(job))
    assert found.images_seen == HALF
    chain.run(job)
    check_alike(job, runs["ddp"], loss=1e-4, weights=1e-3)


@pytest.mark.slow
def test_an_energy_trains_by_differences_of_shared_weights(further: dict[str, Job]) -> None:
    check_alike(further["fsdp2, dot"], further["ddp, dot"], loss=1e-3, weights=1e-2)


@pytest.mark.slow
def test_shared_weights_in_half_precision_train_nearly_alike(further: dict[str, Job]) -> None:
    check_alike(further["fsdp2, bf16"], further["ddp, bf16"], loss=2e-2, weights=2e-2)


@pytest.mark.slow
def test_samples_of_shared_weights_are_looked_at_on_the_way(
    runs: dict[str, Job], further: dict[str, Job]
) -> None:
    """Two attempts, one of which ends between two looks: as if nobody had looked."""
    job = further["fsdp2, looked at"]
    check_alike(job, runs["fsdp2"])
    store = LocalStore(Path(job.runtime.store))
    record = store.record("train", job_digest(job))
    assert record is not None
    looks = [e for e in events_of(store.get(record.logs["events.jsonl"]), "log") if e.blobs]
    assert [event.images_seen for event in looks] == [4 * BATCH, 8 * BATCH, 12 * BATCH]
    # The last one is of what was sealed: whole weights, put together of both processes' rows.
    data = open_manifest(open_ref(store, record.inputs["latents"]), store)
    seen = glimpse.take(from_record(store, record), FEW, glimpse.reference(data, seed=0))
    assert store.get(looks[-1].blobs["grid.png"]) == seen.grid
    assert looks[-1].figures["latent_distance"] == pytest.approx(seen.distance, rel=1e-9)
    assert looks[0].figures["latent_distance"] != looks[-1].figures["latent_distance"]
    grids = {name for name in record.logs if name.endswith("grid.png")}
    assert grids == {f"samples-{event.images_seen:012d}-grid.png" for event in looks}


def test_provenance_says_how_it_was_computed(runs: dict[str, Job]) -> None:
    job = runs["fsdp2"]
    record = LocalStore(Path(job.runtime.store)).record("train", job_digest(job))
    assert record is not None
    assert record.provenance["compute"]["parallel"] == "fsdp2"
    assert job_digest(runs["ddp"]) == job_digest(runs["fsdp2"])


def test_what_shared_weights_cannot_train_is_refused_in_words() -> None:
    usual = ObjectiveConfig()
    check_shardable(usual, 2)
    with pytest.raises(ConfigError, match=r"there is one: set processes to 2 or more"):
        check_shardable(usual, 1)
    with pytest.raises(ConfigError, match=r"no double backward: .*'directional'"):
        check_shardable(replace(usual, energy="l2", backward="double"), 2)
    for change in ({"loss": "norms"}, {"dispersive_weight": 0.1}):
        with pytest.raises(ConfigError, match=r"with compute\.parallel 'fsdp2'"):
            check_shardable(replace(usual, **change), 2)


def test_how_a_pipeline_computes_is_a_setting_of_its_own() -> None:
    config = with_settings(chain.tiniest(), {"compute.parallel": "fsdp2", "processes": 2})
    assert config.compute == SHARED
    stage = TrainStage(network=config.network, objective=config.objective, train=config.train)
    assert "compute" not in to_json(stage)
    with pytest.raises(ConfigError, match=r"compute\.parallel is 'pipeline'"):
        with_settings(chain.tiniest(), {"compute.parallel": "pipeline"})


def reads_no_checkpoint(store: LocalStore, key: str) -> bytes:
    """A store's read, of a process that is not the first."""
    assert "/checkpoints/" not in key, f"{key} was read by a process that is given it"
    return READ(store, key)


READ = LocalStore.read


def in_pair(plan: str) -> None:
    """Run the attempts of a plan, as one of the processes."""
    step = train.step
    for data, end, gradients.SEGMENT_BYTES in json.loads(Path(plan).read_text()):

        def until(run: train.Run, batch: train.Batch, stop: bool, end: int | None = end) -> bool:
            stop = step(run, batch, stop or run.images_seen + BATCH == end)
            return stop and end is not None

        train.step = until
        try:
            chain.run(from_json(Job, data))
        except train.InterruptedTraining:
            assert end is not None


if __name__ == "__main__":
    with distributed.connect("cpu", threads=1) as pair:
        # One connection for all attempts: two in a row on one address may miss each other.
        distributed.connect = lambda *_, **__: contextlib.nullcontext(pair)  # type: ignore[assignment]
        if not pair.is_first:
            LocalStore.read = reads_no_checkpoint  # type: ignore[method-assign]
        in_pair(sys.argv[1])
