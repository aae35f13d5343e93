"""What only a GPU can show: ``pytest --noconftest -m gpu tests/test_gpu.py``.

Needs torch, numpy, safetensors, isal, Pillow and scikit-learn alone, and diffusers for the test of
encoding. Without a GPU these tests fail: they are asked for by name.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import chain
import pytest
import torch
from torch import Tensor

from eqm import checkpoint
from eqm.batches import batches, read_batch
from eqm.compute import is_replayed, prepare
from eqm.config import (
    ComputeConfig,
    Job,
    NetworkConfig,
    ObjectiveConfig,
    TrainConfig,
    replace,
)
from eqm.distributed import OnItsWay, Sum, World, connect, watch_of
from eqm.errors import ConfigError
from eqm.events import events_of
from eqm.field import Field
from eqm.gradients import FlatGradient
from eqm.latent_set import open_manifest
from eqm.latents import sample_latents
from eqm.learner import Learner
from eqm.network import Transformer
from eqm.precision import choose_products, deterministic, products_in
from eqm.randomness import Stream, bits, normal, uniform
from eqm.records import LatentSpec, Record, to_json
from eqm.rules import NAG
from eqm.sampler import Descent, GradientNormBelow, descend, start_noise
from eqm.sharding import Shards
from eqm.stage import job_digest
from eqm.storage import LocalStore

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda")
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"),
    *("-m", "eqm.train"),
]
SMALL = NetworkConfig(width=128, depth=3, heads=4, patch=2)
BATCH, CLASSES = 16, 10
SHAPE = (4, 16, 16)
LATENTS = LatentSpec(
    autoencoder="",
    image_size_px=16,
    image_channels=4,
    shape=SHAPE,
    shift=(0.5,) * 4,
    scale=(2.0,) * 4,
)
IMAGES = 9_600
"""Of a training that is to be killed before it ends."""


@pytest.fixture(autouse=True)
def _ieee() -> Iterator[None]:
    choose_products("float32", GPU)
    # Blocks compiled by tests before would count against those of this one.
    torch.compiler.reset()
    with deterministic(GPU):
        yield


def network(device: torch.device = GPU, *, config: NetworkConfig = SMALL) -> Transformer:
    """Weights that are zero nowhere, the same on every device."""
    found = Transformer(config, size=16, channels=4, classes=CLASSES)
    found.initialise(0, zero_head=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in found.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return found.to(device)


def data(device: torch.device = GPU) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(BATCH, 4, 16, 16, generator=generator)
    numbers = torch.arange(BATCH)
    return x.to(device), (numbers % CLASSES).to(device), numbers.to(device)


def settings(**changes: object) -> TrainConfig:
    return replace(TrainConfig(batch_size=BATCH, learning_rate=1e-3), **changes)


def learner(
    device: torch.device = GPU,
    *,
    objective: ObjectiveConfig | None = None,
    compute: ComputeConfig | None = None,
    **changes: object,
) -> Learner:
    asked, net = objective or ObjectiveConfig(), network(device)
    prepare(net, compute or ComputeConfig(), asked, device)
    again = is_replayed(compute or ComputeConfig(), asked, device)
    return Learner(net, asked, settings(**changes), device=device, replays=again)


def trained(of: Learner, updates: int = 4) -> list[Tensor]:
    """Losses of some updates, and all weights after them, on the CPU."""
    x, labels, numbers = data(of.device)
    losses = []
    for _ in range(updates):
        loss = of.backward(of.corrupted(x, labels, numbers)).mean()
        of.apply(of.gradient(), images_seen=0, loss=loss)
        losses.append(loss)
        numbers = numbers + BATCH
    return [torch.stack(losses).cpu(), *(w.detach().cpu() for w in of.trained.values())]


# -- numbers ------------------------------------------------------------------------------------


def test_random_integers_are_those_of_the_cpu_and_normals_nearly() -> None:
    numbers = torch.tensor([0, 1, 5, 2**33 + 7])
    there = numbers.to(GPU)
    assert torch.equal(bits(3, Stream.EPS, numbers, 99), bits(3, Stream.EPS, there, 99).cpu())
    here, far = (uniform(3, Stream.GAMMA, n, 99) for n in (numbers, there))
    assert torch.equal(here, far.cpu())
    here, far = (normal(3, Stream.EPS, n, (4, 32, 32)) for n in (numbers, there))
    assert float((here - far.cpu()).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["implicit", "dot", "l2"])
def test_float32_training_is_that_of_the_cpu(kind: str) -> None:
    objective = ObjectiveConfig(energy=kind)  # type: ignore[arg-type]
    ours, cpus = (trained(learner(device, objective=objective)) for device in (GPU, CPU))
    # A difference of energies loses digits, which are others on each device.
    assert torch.allclose(ours[0], cpus[0], rtol=1e-4 if kind == "implicit" else 5e-3)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"compile": True},
        {"fused": True},
        {"compile": True, "fused": True},
        {"fused": True, "attention": "torch"},
    ],
)
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_the_same_training_twice_has_the_same_bits(
    precision: str, asked: dict[str, object]
) -> None:
    choose_products(precision, GPU)
    compute = ComputeConfig(**asked)  # type: ignore[arg-type]
    one, other = (trained(learner(compute=compute, precision=precision)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("compile_", [True, False], ids=["compiled", "as-it-stands"])
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_a_step_that_is_replayed_has_the_bits_of_one_that_is_not(
    compile_: bool, micro_batch: int | None
) -> None:
    """Also with labels and noise that differ from update to update, in the loop of a training."""
    found = []
    for replay in ("auto", "never"):
        asked = ComputeConfig(compile=compile_, fused=True, replay=replay)  # type: ignore[arg-type]
        of = learner(compute=asked, precision="bfloat16")
        of.micro_batch = micro_batch
        assert (of._recorded is not None) == (replay == "auto")
        found.append(trained(of, updates=6))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(set(found[0][0].tolist())) == 6


@pytest.mark.parametrize("energy", ["implicit", "dot"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_many_tokens_have_the_same_gradient_every_time(
    energy: Literal["implicit", "dot"], precision: str
) -> None:
    """Of weights, and of an energy by x: attention's sums come from parts of the tokens."""
    net = Transformer(SMALL, size=64, channels=4, classes=CLASSES).to(GPU)
    net.initialise(0, zero_head=False)
    objective = ObjectiveConfig(energy=energy, backward="directional")
    of = Learner(net, objective, settings(precision=precision), device=GPU)
    x = torch.randn(BATCH, 4, 64, 64, device=GPU)
    numbers = torch.arange(BATCH, device=GPU)
    found = []
    for _ in range(6):
        of.backward(of.corrupted(x, None, numbers))
        with products_in(precision, GPU):
            slope = of.field.gradient(x)
        found.append((of.gradient().clone(), slope))
        of.gradients.clear()
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(one, found[0], strict=True))


@pytest.mark.parametrize("compile_", [True, False], ids=["compiled", "as-it-stands"])
@pytest.mark.parametrize("attention", ["torch", "eqm"])
def test_fused_bfloat16_trains_as_float32_does(
    attention: Literal["torch", "eqm"], compile_: bool
) -> None:
    whole = trained(learner())[0]
    compute = ComputeConfig(compile=compile_, fused=True, attention=attention)
    half = trained(learner(compute=compute, precision="bfloat16"))[0]
    assert torch.allclose(whole, half, rtol=2e-2)


def test_parts_of_a_batch_and_recomputed_blocks_give_the_same_gradient() -> None:
    def gradient(**asked: object) -> Tensor:
        compute = ComputeConfig(**asked)  # type: ignore[arg-type]
        of = learner(compute=compute)
        of.micro_batch = compute.micro_batch
        of.backward(of.corrupted(*data()))
        return of.gradient().double()

    whole = gradient()
    kernels = {"fused": True}, {"fused": True, "compile": True}
    for asked in ({"micro_batch": 4}, {"checkpointing": True}, {"compile": True}, *kernels):
        assert float((gradient(**asked) - whole).norm() / whole.norm()) < 1e-5, asked


def test_our_attention_gives_the_gradient_of_torchs() -> None:
    """In bfloat16: both are as far from float32's gradient."""

    def gradient(precision: str, attention: Literal["torch", "eqm"]) -> Tensor:
        compute = ComputeConfig(fused=True, attention=attention)
        of = learner(compute=compute, precision=precision)
        of.backward(of.corrupted(*data()))
        return of.gradient().double()

    whole = gradient("float32", "torch")
    theirs, ours = (gradient("bfloat16", who) for who in ("torch", "eqm"))
    apart = [float((found - whole).norm() / whole.norm()) for found in (theirs, ours)]
    assert apart[1] < 1.2 * apart[0] < 2e-2


@pytest.mark.parametrize("kind", ["dot", "l2"])
def test_the_directional_way_is_the_double_one(kind: str) -> None:
    found = []
    for way in ("double", "directional"):
        objective = ObjectiveConfig(energy=kind, backward=way)  # type: ignore[arg-type]
        of = learner(objective=objective)
        of.backward(of.corrupted(*data()))
        found.append(of.gradient().double())
    assert float(torch.cosine_similarity(*found, dim=0)) > 0.9999


# -- nobody waits -------------------------------------------------------------------------------


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
@pytest.mark.parametrize("fused", [False, True])
def test_an_update_never_waits_for_the_device(on_nonfinite: str, fused: bool) -> None:
    compute, bound = ComputeConfig(fused=fused), {"gradient_clip": 1.0}
    of = learner(compute=compute, on_nonfinite=on_nonfinite, precision="bfloat16", **bound)
    x, labels, numbers = data()
    moments, spec = torch.cat([x, x.abs()], dim=1).half(), LATENTS
    sample_latents(moments, x, spec)
    trained(of, updates=3)
    with no_waiting():
        noise = normal(0, Stream.POSTERIOR, numbers, SHAPE)
        x = sample_latents(moments, noise, spec)
        loss = of.backward(of.corrupted(x, labels, numbers)).mean()
        of.apply(of.gradient(), images_seen=0, loss=loss)
        told = OnItsWay(loss)
    assert told.value() == float(loss)


def field_of(device: torch.device = GPU) -> Field:
    return Field(network(device).eval().requires_grad_(False))


def down(device: torch.device, *, below: float | None = None) -> Descent:
    field, (_, labels, numbers) = field_of(device), data(device)
    return descend(
        lambda at: field.gradient(at, labels),
        start_noise(numbers, SHAPE, device=device),
        rule=NAG(step_size=0.02, momentum=0.3),
        updates=8,
        stop=None if below is None else GradientNormBelow(below),
    )


def test_a_descent_without_a_stop_rule_never_waits_for_the_device() -> None:
    field, (_, labels, numbers) = field_of(), data()
    start = start_noise(numbers, SHAPE, device=GPU)

    def once() -> Descent:
        return descend(
            lambda at: field.gradient(at, labels),
            start,
            rule=NAG(step_size=0.02, momentum=0.3),
            updates=3,
        )

    once()
    with no_waiting():
        once()


@pytest.mark.parametrize("stops", [False, True])
def test_descents_are_those_of_the_cpu(stops: bool) -> None:
    norms = down(CPU).gradient_norms
    below = float(norms.median()) if stops else None
    here, there = (down(device, below=below) for device in (CPU, GPU))
    assert torch.equal(here.evaluations, there.evaluations.cpu())
    assert torch.allclose(here.latents, there.latents.cpu(), atol=1e-4)


@pytest.mark.parametrize(("precision", "near"), [("tf32", 2e-3), ("bfloat16", 2e-2)])
def test_samples_in_less_precision_are_those_of_float32_nearly(
    precision: Literal["tf32", "bfloat16"], near: float
) -> None:
    seen = []
    for chosen in ("float32", precision):
        with products_in(chosen, GPU):
            seen.append(down(GPU).latents)
    whole, fewer = seen
    assert 0 < float((fewer.float() - whole).norm() / whole.norm()) < near


# -- NCCL ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in address.items():
        monkeypatch.setenv(name, str(value))
    with connect("cuda") as world:
        yield world


def test_one_rank_joins_nccl_and_its_collectives_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with one_rank(monkeypatch) as world:
        assert torch.distributed.get_backend() == "nccl"
        assert world.group is not None
        world.barrier()
        assert world.first_says(7) == 7
        assert world.sum_(torch.ones(5, device=GPU)).tolist() == [1] * 5
        assert world.first_gives(b"bytes") == b"bytes"


def test_nccl_is_looked_after_and_told_by_a_thread_that_the_first_rank_is_at_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stalled: list[str] = []
    with one_rank(monkeypatch) as world:
        assert world.watch is not None
        quick = replace(world, size=2, timeout_seconds=0.5)
        with contextlib.closing(watch_of(quick, stalled.append)) as watch:
            among = replace(quick, watch=watch)
            with among.first_at_work():
                until, x = time.monotonic() + 1.5, torch.ones(512, 512, device=GPU)
                while time.monotonic() < until:
                    x = (x @ x).clamp(max=1.0)
                    x.sum().item()
            time.sleep(0.2)
            # All that was begun has ended, and is known to have.
            assert len(watch._under_way) == 0
    assert stalled == []


@pytest.mark.parametrize("compile", [False, True])
def test_nccl_sums_a_gradient_while_it_is_computed(
    monkeypatch: pytest.MonkeyPatch, compile: bool
) -> None:
    usual = learner()
    usual.backward(usual.corrupted(*data()))
    with one_rank(monkeypatch) as world:
        of = learner(compute=ComputeConfig(compile=compile))
        of.gradients = FlatGradient(tuple(of.trained.values()), room=2, segment_bytes=2**16)
        sums: list[Sum] = []
        of.backward(of.corrupted(*data()), lambda part: sums.append(world.begin_sum(part)))
        assert len(sums) == len(of.gradients.segments) - 1 > 3
        for begun in sums:
            begun.wait()
        found, wanted = of.gradient(), usual.gradient()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_shared_weights_train_as_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = trained(learner(precision="bfloat16"))[0]
    with one_rank(monkeypatch) as world:
        net = network()
        shards = Shards(net, list(net.blocks), world, half=True)
        of = Learner(
            net, ObjectiveConfig(), settings(precision="bfloat16"), device=GPU, shards=shards
        )
        together = trained(of)[0]
    assert torch.allclose(alone, together, rtol=1e-2)


def test_a_rank_without_a_gpu_of_its_own_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(ConfigError, match="has no GPU: this machine has"), connect("cuda"):
        pass


# -- the program --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    """Latents of the digits, made on the CPU, and one training there."""
    return chain.build(tmp_path_factory.mktemp("chain"), until="train")


def on_gpu(tiny: chain.Chain, folder: Path, **compute: object) -> Job:
    job = chain.untrained(tiny, folder, device="cuda", checkpoint_every_images=320)
    changes = {"precision": "bfloat16", "images": IMAGES}
    config = {**job.config, "train": {**job.config["train"], **changes}}
    asked = ComputeConfig(**compute)  # type: ignore[arg-type]
    return replace(job, config=config, runtime=replace(job.runtime, compute=asked))


def started(job: Job, folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    path = folder / "job.json"
    path.write_text(json.dumps(to_json(job)))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(
        [*TORCHRUN, str(path)],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(job: Job, folder: Path) -> Record:
    child = started(job, folder)
    _, said = child.communicate(timeout=300)
    assert child.returncode == 0, said
    found = chain.store_of(job).record("train", job_digest(job))
    assert found is not None
    return found


def killed_midway(job: Job, folder: Path) -> None:
    """Kill rank and launcher with -9 as soon as there is a checkpoint."""
    store, digest = chain.store_of(job), job_digest(job)
    child, until = started(job, folder), time.monotonic() + 240
    while checkpoint.newest(store, digest) is None:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert store.record("train", digest) is None


@pytest.mark.parametrize("fused", [False, True])
def test_one_nccl_rank_killed_and_started_again_has_the_same_bits(
    tiny: chain.Chain, tmp_path: Path, fused: bool
) -> None:
    """A step that is replayed begins anew with some that are not."""
    whole, cut = (on_gpu(tiny, tmp_path / name, fused=fused) for name in ("whole", "cut"))
    undisturbed = ended(whole, tmp_path / "whole")
    store, digest = chain.store_of(cut), job_digest(cut)
    killed_midway(cut, tmp_path / "cut")
    assert store.record("train", digest) is None
    again = ended(cut, tmp_path / "cut")
    assert again.content == undisturbed.content
    assert again.provenance["device"].startswith("cuda")


def test_training_on_a_gpu_is_told_in_figures(tiny: chain.Chain, tmp_path: Path) -> None:
    job = on_gpu(tiny, tmp_path, compile=True, fused=True)
    record = ended(job, tmp_path)
    log = events_of(chain.store_of(job).get(record.logs["events.jsonl"]), "log")
    figures = next(e.figures for e in reversed(log) if e.kind == "metrics")
    assert figures["gpu_memory_peak_bytes"] > 0
    assert 0 < figures["mfu"] < 1


def test_the_cpu_goes_on_where_the_gpu_was_killed(tiny: chain.Chain, tmp_path: Path) -> None:
    """A device is no part of a run: a checkpoint is read by whoever comes next."""
    job = on_gpu(tiny, tmp_path)
    killed_midway(job, tmp_path)
    record = chain.run(replace(job, runtime=replace(job.runtime, device="cpu")))
    assert record.values["images_seen"] == IMAGES


# -- encoding and sampling, as stages -----------------------------------------------------------


def test_latents_and_samples_made_on_the_gpu_are_those_of_the_cpu(tmp_path: Path) -> None:
    """By the small autoencoder, whose convolutions are taken in float32 on both."""
    changes = {
        "autoencoder.kind": "fit",
        "autoencoder.fit.images": 640,
        "source.image_size_px": 16,
        "generate.samples": 20,
    }
    made = chain.build(tmp_path / "cpu", changes, until="samples")
    found = {}
    for name in ("latents", "samples"):
        store = chain.copied(made, tmp_path / name, without=(name, "evaluation"))
        found[name] = chain.run(chain.elsewhere(made.job(name, device="cuda"), store.root))
        assert found[name].provenance["device"].startswith("cuda")
    assert found["samples"].values["samples"] == made["samples"].values["samples"]
    here, there = (
        read_batch(open_manifest(record, store), 0, 0, 64).moments.float()
        for record, store in (
            (made["latents"], made.store),
            (found["latents"], LocalStore(tmp_path / "latents")),
        )
    )
    assert float((here - there).abs().max()) < 1e-2


def test_batches_come_in_page_locked_memory(tiny: chain.Chain) -> None:
    data = open_manifest(tiny["latents"], tiny.store)
    coming = batches(data, batch_size=8, seed=0, pin=True)
    batch = next(coming)
    coming.close()  # type: ignore[attr-defined]
    assert batch.moments.is_pinned()
    assert torch.equal(batch.to(GPU).moments.cpu(), batch.moments)
