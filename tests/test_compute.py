"""How a step is computed changes what it costs and nothing else; bad updates change nothing."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import needs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eqm import compute
from eqm.compute import (
    bfloat16_blocks,
    bfloat16_products,
    check_for_training,
    check_kernels,
    check_micro_batch,
    is_replayed,
    prepare,
    quickest_precision,
    slow_bfloat16,
)
from eqm.config import ComputeConfig, NetworkConfig, ObjectiveConfig, TrainConfig, replace
from eqm.errors import ConfigError
from eqm.gradients import FlatGradient
from eqm.learner import Learner, parts
from eqm.network import Transformer
from eqm.precision import choose_products

CPU = torch.device("cpu")
CONFIG = NetworkConfig(width=32, depth=3, heads=2)
IMPLICIT = ObjectiveConfig()
DOT = {
    way: ObjectiveConfig(energy="dot", backward=way)  # type: ignore[arg-type]
    for way in ("double", "directional")
}
BATCH = 8
TRAIN = TrainConfig(batch_size=BATCH, learning_rate=1e-3, ema_half_life_images=20.0)


def learner(objective=IMPLICIT, train=TRAIN, compute=None, **more):
    net = Transformer(CONFIG, size=8, channels=1, classes=10)
    net.initialise(1, zero_head=False)
    for block in net.blocks:
        # As trained: at first, blocks add nothing, and nothing goes back through them.
        torch.nn.init.normal_(block.modulation.bias, generator=torch.Generator().manual_seed(3))
    if compute is not None:
        prepare(net, compute, objective, CPU)
    return Learner(net, objective, train, device=CPU, **more)


def given(found, first=0):
    x = torch.randn(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    return found.corrupted(x, torch.arange(BATCH), torch.arange(first, first + BATCH))


def gradient_of(found):
    losses = found.backward(given(found))
    return losses, found.gradient().clone()


def state(found):
    """Everything that an update may change."""
    tensors = [*found.names, *found.ema.state_dict().values()]
    for track in (*found.tracks.values(), *found.power.values()):
        tensors += track.state_dict().values()
    tensors += found.optimiser.state_dict().values()
    return [t.detach().clone() for t in tensors]


def same(ones, others):
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


# -- one buffer ---------------------------------------------------------------------------------


def test_gradients_are_views_of_one_buffer_through_every_update():
    found = learner()
    for seen in (0, BATCH):
        found.backward(given(found))
        flat = found.gradient()
        assert flat.data_ptr() == found.gradients.flat.data_ptr()
        assert bool(flat.any())
        start = flat.data_ptr()
        for weight in found.names:
            assert weight.grad.data_ptr() == start
            start += 4 * weight.numel()
        found.apply(flat, images_seen=seen)
        assert not bool(found.gradients.buffer.any())


def test_a_gradient_that_was_put_elsewhere_is_not_lost():
    found, usual = learner(), learner()
    found.network.zero_grad(set_to_none=True)
    for each in (found, usual):
        each.backward(given(each))
    assert torch.equal(found.gradient(), usual.gradient())
    assert all(w.grad is v for w, v in zip(found.names, found.gradients.views, strict=True))


def test_weights_of_two_dtypes_are_refused():
    weights = [torch.nn.Parameter(torch.ones(2, dtype=d)) for d in (torch.float32, torch.float64)]
    with pytest.raises(ValueError, match="weights are of 2 kinds"):
        FlatGradient(weights, room=0)


# -- parts of a share ---------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [IMPLICIT, *DOT.values()])
@pytest.mark.parametrize("size", [1, 4])
def test_parts_add_up_to_the_whole(objective, size):
    losses, whole = gradient_of(learner(objective))
    found, split = gradient_of(learner(objective, micro_batch=size))
    assert torch.allclose(found, losses, rtol=1e-5)
    assert float((split - whole).norm() / whole.norm()) < 1e-5 * (
        1 if objective is IMPLICIT else 10
    )


def test_parts_have_their_own_labels_and_levels():
    at = given(learner())
    split = list(parts(at, 3))
    assert [len(p.x) for p in split] == [3, 3, 2]
    for name in ("x", "goal", "gamma", "labels"):
        assert torch.equal(torch.cat([getattr(p, name) for p in split]), getattr(at, name))


def test_parts_that_do_not_make_up_the_share_are_refused():
    with pytest.raises(ConfigError, match=r"micro_batch is 3; .*divisor of the 8 images"):
        check_micro_batch(ComputeConfig(micro_batch=3), IMPLICIT, 8)
    with pytest.raises(ConfigError, match=r"micro_batch is 0; it must be greater than 0"):
        ComputeConfig(micro_batch=0)
    grouped = ObjectiveConfig(dispersive_weight=0.5, dispersive_group=4)
    check_micro_batch(ComputeConfig(micro_batch=4), grouped, 8)
    with pytest.raises(ConfigError, match=r"multiple of objective\.dispersive_group \(4\)"):
        check_micro_batch(ComputeConfig(micro_batch=2), grouped, 8)
    with pytest.raises(ConfigError, match=r"dispersive_group is 4; .*divisor of the 6 images"):
        check_micro_batch(ComputeConfig(), grouped, 6)
    check_micro_batch(ComputeConfig(), grouped, 8)
    check_micro_batch(ComputeConfig(), IMPLICIT, 6)


# -- blocks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [IMPLICIT, DOT["directional"]])
def test_blocks_computed_again_give_the_same_gradient(objective):
    calls = []
    found = learner(objective, compute=ComputeConfig(checkpointing=True))
    for block in found.network.blocks:
        block.mlp.register_forward_hook(lambda *_: calls.append(1))
    losses, whole = gradient_of(learner(objective))
    again, recomputed = gradient_of(found)
    assert torch.equal(again, losses)
    assert torch.allclose(recomputed, whole, rtol=1e-5, atol=1e-7)
    assert found.network.state_dict().keys() == learner().network.state_dict().keys()
    once = 1 if objective is IMPLICIT else 5
    assert len(calls) > once * CONFIG.depth


def test_blocks_computed_again_keep_less():
    def kept(compute):
        found, sizes = learner(compute=compute), []

        def note(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            found.network(given(found).x, None)
        return sum(sizes)

    assert kept(ComputeConfig(checkpointing=True)) < kept(None) / 3


def test_hidden_tokens_are_seen_once_in_blocks_computed_again():
    objective = ObjectiveConfig(dispersive_weight=0.5, dispersive_group=4)
    _, whole = gradient_of(learner(objective))
    _, found = gradient_of(learner(objective, compute=ComputeConfig(checkpointing=True)))
    assert torch.allclose(found, whole, rtol=1e-5, atol=1e-7)


@needs.compiler
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_same_gradient(checkpointing):
    compute = ComputeConfig(compile=True, checkpointing=checkpointing)
    losses, whole = gradient_of(learner())
    found, compiled = gradient_of(learner(compute=compute))
    assert torch.allclose(found, losses, rtol=1e-4)
    assert float((compiled - whole).norm() / whole.norm()) < 1e-5


@needs.compiler
def test_blocks_of_more_shapes_than_the_compiler_keeps_versions_of_do_not_run_uncompiled(
    monkeypatch,
):
    import torch._dynamo

    really = torch.compile
    # What is traced is what counts: no kernels are made of it.
    monkeypatch.setattr(
        "torch.compile", lambda forward, options, **asked: really(forward, backend="eager", **asked)
    )
    monkeypatch.setattr(compute, "_compiled", compute._compiled.__wrapped__)
    network = learner(compute=ComputeConfig(compile=True)).network
    x, labels = torch.ones(BATCH, 1, 8, 8), torch.arange(BATCH)
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        network(x, labels)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            network(x[1:], labels[1:])


@pytest.mark.parametrize("name", ["compile", "checkpointing"])
def test_blocks_that_a_double_backward_goes_through_stay_as_they_are(name):
    with pytest.raises(ConfigError, match=rf"compute\.{name} is true, .*'directional'"):
        learner(DOT["double"], compute=ComputeConfig(**{name: True}))


@pytest.mark.parametrize(
    ("compute", "objective", "device"),
    [
        ({"fused": False}, {}, "cuda"),
        ({"replay": "never"}, {}, "cuda"),
        ({"parallel": "fsdp2"}, {}, "cuda"),
        ({}, {"energy": "dot", "backward": "directional"}, "cuda"),
        ({}, {"loss": "norms"}, "cuda"),
        ({}, {"dispersive_weight": 0.5}, "cuda"),
        ({}, {}, "cpu"),
    ],
)
def test_a_step_is_replayed_where_it_is_always_the_same(compute, objective, device):
    usual = ComputeConfig(fused=True)
    assert is_replayed(usual, ObjectiveConfig(), torch.device("cuda"))
    asked = replace(usual, **compute), replace(ObjectiveConfig(), **objective)
    assert not is_replayed(*asked, torch.device(device))


LOADS = """
import sys
import torch
import eqm.evaluate, eqm.generate, eqm.serving, eqm.train, flows.pipeline
from eqm.config import NetworkConfig, TrainConfig
from eqm.learner import learn
from eqm.network import Transformer
from eqm.pictures import digits, sample_photographs
from eqm.precision import deterministic

config, like = NetworkConfig(width=32, depth=1, heads=2), {"size": 8, "channels": 1, "classes": 10}
with deterministic(torch.device("cpu")), torch.inference_mode():
    Transformer(config, **like)(torch.zeros(1, 1, 8, 8), torch.tensor([0]))
with torch.device("meta"):
    Transformer(config, **like)
short = TrainConfig(images=32, batch_size=16, ema_half_life_images=1.0)
learn(Transformer(config, **like), torch.zeros(16, 1, 8, 8), train=short)
digits(), sample_photographs(8, 1, 2)
heavy = ("torch._dynamo", "torch._inductor", "sympy", "sklearn", "scipy.stats", "pandas")
print([name for name in heavy if name in sys.modules])
"""


def test_what_does_not_compile_loads_no_compiler():
    """A second and a half, of every program."""
    line = [sys.executable, "-c", LOADS]
    told = subprocess.run(line, capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


def test_compiled_blocks_without_a_compiler_are_refused():
    code = (
        "import torch\n"
        "from eqm.compute import check_compiler\n"
        "check_compiler(torch.device('cpu'))\n"
    )
    root = str(Path(__file__).parent.parent)
    nothing = {"PATH": "/nowhere", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code], env=nothing, capture_output=True, text=True, check=False
    )
    assert "there is no C++ compiler here" in done.stderr


@pytest.mark.parametrize("asking", ["compile", "fused"])
def test_what_triton_needs_on_a_gpu_is_asked_for_before_anything_is_built(
    asking, monkeypatch, tmp_path
):
    """Else its own error comes with the first step, which may be after days of encoding."""
    gpu = torch.device("cuda")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    network = Transformer(CONFIG, size=8, channels=1, classes=10)
    settings = ComputeConfig(**{asking: True})
    with pytest.raises(ConfigError, match=f"compute.{asking} is true.* C compiler.*install gcc"):
        check_kernels(network, settings, gpu)
    gcc = tmp_path / "gcc"
    gcc.touch()
    gcc.chmod(0o755)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs \S+/Python.h, which is not there"):
        check_kernels(network, settings, gpu)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("subprocess.check_output", lambda _: b"libm.so.6 => /lib/libm.so.6")
    with pytest.raises(ConfigError, match=r"needs libcuda.so.1, .* TRITON_LIBCUDA_PATH"):
        check_for_training(settings, gpu)
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    check_kernels(network, settings, gpu)
    check_for_training(settings, gpu)


@pytest.mark.parametrize("name", ["TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"])
def test_compiled_kernels_must_be_in_a_folder_from_which_they_can_be_loaded(
    name, monkeypatch, tmp_path
):
    gpu, really = torch.device("cuda"), os.statvfs
    monkeypatch.setattr("eqm.compute._missing_for_triton", lambda: None)
    (tmp_path / "hard").mkdir()

    def mounted(folder):
        # As /tmp is on hardened machines, and in a tmpfs of Docker.
        hard = folder == tmp_path / "hard"
        return SimpleNamespace(f_flag=os.ST_NOEXEC) if hard else really(folder)

    monkeypatch.setattr("os.statvfs", mounted)
    monkeypatch.setenv(name, str(tmp_path / "hard" / "kernels"))
    rule = rf"compute.fused is true.* in /\S+/kernels, which is mounted noexec: .* in {name}"
    with pytest.raises(ConfigError, match=rule):
        check_for_training(ComputeConfig(fused=True), gpu)
    check_for_training(ComputeConfig(fused=True), CPU)
    check_for_training(ComputeConfig(), gpu)
    monkeypatch.setenv(name, str(tmp_path / "kernels"))
    check_for_training(ComputeConfig(fused=True), gpu)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match="which cannot be written to: name another folder in"):
        check_for_training(ComputeConfig(fused=True), gpu)


@pytest.mark.parametrize(
    "asked", [pytest.param({"compile": True}, marks=needs.compiler), {"checkpointing": True}]
)
def test_a_network_without_blocks_is_refused(asked):
    unet = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="for a U-Net: only transformers have the blocks"):
        prepare(unet, ComputeConfig(**asked), IMPLICIT, CPU)
    prepare(unet, ComputeConfig(), IMPLICIT, CPU)


# -- numbers ------------------------------------------------------------------------------------


def test_products_of_float32_are_chosen_and_tf32_is_of_gpus():
    knobs = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [knob.fp32_precision for knob in knobs]
    try:
        choose_products("float32", CPU)
        assert [knob.fp32_precision for knob in knobs] == ["ieee", "ieee"]
        with pytest.raises(ConfigError, match=r"'tf32', which only GPUs .* use 'float32'"):
            choose_products("tf32", CPU)
    finally:
        # It holds for the whole process.
        for knob, value in zip(knobs, before, strict=True):
            knob.fp32_precision = value


def test_bfloat16_that_is_slower_is_told(monkeypatch):
    half, net = TrainConfig(precision="bfloat16"), torch.nn.Module()
    monkeypatch.setattr(compute, "bfloat16_products", lambda: 2.9)
    monkeypatch.setattr(compute, "lacking", lambda: "avx512_fp16")
    told = slow_bfloat16(half, net, CPU)
    assert told is not None
    assert "takes 2.9 times as long as float32 for this network" in told
    assert told.endswith("more exact")
    monkeypatch.setattr(compute, "lacking", lambda: None)
    told = slow_bfloat16(half, net, CPU)
    assert told is not None
    assert told.endswith("more exact, and 'float16' faster still for wide ones")
    assert slow_bfloat16(TrainConfig(), net, CPU) is None
    assert slow_bfloat16(half, net, torch.device("cuda")) is None
    monkeypatch.setattr(compute, "bfloat16_products", lambda: 0.6)
    assert slow_bfloat16(half, net, CPU) is None


def test_of_a_transformer_its_own_blocks_are_timed(monkeypatch):
    net = Transformer(NetworkConfig(width=32, depth=1, heads=2), size=8, channels=3, classes=2)
    monkeypatch.setattr(compute, "_over", timed := Timed())
    assert slow_bfloat16(TrainConfig(precision="bfloat16"), net, CPU) is not None
    (half, whole) = timed.seen
    for run, linear in ((half, torch.bfloat16), (whole, torch.float32)):
        with Linear() as seen:
            run()
        assert seen.found == {linear}
    assert all(weight.grad is None for weight in net.parameters())


def test_nobody_waits_for_blocks_that_take_long(monkeypatch):
    monkeypatch.setattr(compute, "bfloat16_products", lambda: 5.0)
    with torch.device("meta"):
        config = NetworkConfig(width=64, depth=1, heads=1, patch=1)
        net = Transformer(config, size=128, channels=4, classes=2)
    assert bfloat16_blocks(net) == 5.0


class Timed:
    """In place of what measures: the first takes twice as long."""

    def __call__(self, one, other, **_):
        self.seen = one, other
        return 2.0


class Linear(TorchDispatchMode):
    """What products are made of."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::addmm", "aten::mm"):
            self.found.add(args[1].dtype)
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.found = set()
        return super().__enter__()


@pytest.mark.parametrize(
    ("bfloat16", "lacks", "quickest"),
    [
        (0.25, None, "bfloat16"),
        (0.25, "avx512_fp16", "bfloat16"),
        (0.65, None, "float16"),
        (0.65, "avx512_fp16", "bfloat16"),
        (0.9, "avx512_fp16", "float32"),
        (2.0, "avx512_fp16", "float32"),
        (2.0, None, "float16"),
    ],
)
def test_the_quickest_precision_of_a_cpu(monkeypatch, bfloat16, lacks, quickest):
    monkeypatch.setattr(compute, "lacking", lambda: lacks)
    assert quickest_precision(bfloat16) == quickest


def test_products_are_timed_on_this_machine():
    assert 0.01 < bfloat16_products() < 100


# -- updates that are not finite ----------------------------------------------------------------

EVERY_AVERAGE = TrainConfig(
    batch_size=BATCH,
    gradient_clip=1.0,
    weight_decay=0.1,
    ema_tracks=(5.0,),
    ema_power=(0.1,),
    on_nonfinite="skip",
)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_an_update_that_is_not_finite_changes_nothing(bad, where):
    found = learner(train=EVERY_AVERAGE)
    found.backward(given(found))
    found.apply(found.gradient(), images_seen=0)
    before, loss = state(found), torch.tensor(1.0)
    found.backward(given(found, first=BATCH))
    if where == "gradient":
        found.gradient()[7] = bad
    else:
        loss = torch.tensor(bad)
    found.apply(found.gradient(), images_seen=BATCH, loss=loss)
    assert same(state(found), before)
    assert not bool(found.gradients.buffer.any())
    found.backward(given(found, first=BATCH))
    found.apply(found.gradient(), images_seen=BATCH, loss=torch.tensor(1.0))
    assert not any(torch.equal(a, b) for a, b in zip(state(found), before, strict=True))


def test_training_to_stop_or_to_skip_is_the_same_where_all_is_finite():
    ends = []
    for asked in ("stop", "skip"):
        found = learner(train=TrainConfig(batch_size=BATCH, on_nonfinite=asked, ema_power=(0.1,)))
        for seen in range(0, 3 * BATCH, BATCH):
            found.backward(given(found, first=seen))
            found.apply(found.gradient(), images_seen=seen)
        ends.append(state(found))
    for a, b in zip(*ends, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)
