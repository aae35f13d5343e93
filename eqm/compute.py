"""How a network is run in training: blocks kept or computed again, compiled, by kernels of ours.

Applied from outside: a network's module says what it computes, not how. Weights keep their names.
Called by encode, learner, train and flows, before what is trained is built.
"""

import functools
import math
import os
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from eqm.config import ComputeConfig, NetworkConfig, ObjectiveConfig, TrainConfig
from eqm.errors import ConfigError, require
from eqm.kernels.halves import allow_in_graph, check_machine, lacking

Forward = Callable[..., Any]

SLOW_PRODUCTS = 1.2
"""Products in bfloat16 that take so many times as long as in float32 are told; half the memory may
be worth less than that."""
FLOAT16_PRODUCTS = 0.6
"""Products in float16 over those in float32 where there are instructions for it (docs/LOG.md)."""
WIDEST_HEAD = 128
"""Channels of a head that our attention keeps in registers; more spill."""
PRODUCTS = 8
"""Products of each kind that are timed: together a tenth of a second."""
BLOCKS, MOST_IMAGES, BLOCK_FLOPS, MOST_FLOPS = 4, 8, 4e9, 2e10
"""Runs of a block in each precision, on so many images, of so many operations forward: together a
second. Where one image has more it takes some seconds, and of the last so many nobody waits for
it: products alone are timed, as they are most of what is done there."""
SHORTEST_SECONDS = 0.3
"""What is short is timed for so long: its least time is that of a moment when nobody disturbed."""


def prepare(
    network: nn.Module, compute: ComputeConfig, objective: ObjectiveConfig, device: torch.device
) -> None:
    """Make the blocks of a network run as asked, in place.

    Raises ConfigError for a network without blocks, for compiled blocks where there is no compiler,
    for kernels that are not of this device or network, and for what cannot be done with an energy
    that is differentiated twice.
    """
    check_double(compute, objective)
    check_kernels(network, compute, device)
    if compute.fused:
        fuse(network, compute, objective)
    for block in blocks_of(network, compute):
        if compute.compile:
            block.forward = compiled(cast(MethodType, block.forward).__func__).__get__(block)
        if compute.checkpointing:
            # Not around __call__: hooks on a block see its tokens once, and not again going back.
            block.forward = functools.partial(_recomputed, block.forward)


def check_double(compute: ComputeConfig, objective: ObjectiveConfig) -> None:
    """Refuse what an energy that is differentiated twice cannot go through. Raises ConfigError."""
    double = objective.energy != "implicit" and objective.backward == "double"
    for name, cannot in (
        ("compile", "compiled code has no double backward"),
        ("checkpointing", "what a double backward computes again is not what it had kept"),
        ("fused", "these kernels have no double backward"),
    ):
        if double and getattr(compute, name):
            raise ConfigError(
                f"compute.{name} is true, but {cannot}: train this energy with "
                f"objective.backward = 'directional', or leave compute.{name} false"
            )


def blocks_of(network: nn.Module, compute: ComputeConfig) -> list[nn.Module]:
    """The blocks that settings of ``compute`` are about. Raises ConfigError without any."""
    found = getattr(network, "blocks", None)
    if found is not None:
        return list(cast(nn.ModuleList, found))
    usual = {"checkpointing": False, "compile": False, "fused": False, "parallel": "ddp"}
    for name, default in usual.items():
        value = getattr(compute, name)
        rule = f"{default!r} for a U-Net: only transformers have the blocks it is about"
        require(value == default, f"compute.{name}", value, rule)
    return []


def compiled(forward: Forward) -> Any:
    """The compiled forward of blocks: one for all, for they differ in weights alone."""
    return _compiled(forward, torch.are_deterministic_algorithms_enabled())


@functools.cache
def _compiled(forward: Forward, deterministic: bool) -> Any:
    allow_in_graph()
    options: dict[str, Any] = {
        # On CPUs, torch 2.13 would fuse loops that depend on each other: gradients through a
        # modulated layer norm came out wrong, by 1 to 30 %.
        "cpp.max_horizontal_fusion_size": 1,
        # The compiler's own: precision.choose_deterministic does not load it.
        "deterministic": deterministic,
    }
    # The whole block or an error. Else a block of more shapes than the compiler keeps versions of
    # would run uncompiled, which a warning alone tells; a setting of the compiler's against that
    # is of one thread, and on a GPU blocks are computed again in one of autograd's.
    return torch.compile(forward, dynamic=False, fullgraph=True, options=options)


def check_kernels(network: nn.Module, compute: ComputeConfig, device: torch.device) -> None:
    """Refuse kernels that are not of a device or network, ours or compiled. Raises ConfigError.

    Ours are for layer norm and GPUs of NVIDIA.
    """
    if compute.compile:
        check_compiler(device)
    if not compute.fused or not blocks_of(network, compute):
        return
    rule = "false, as these kernels are written for GPUs of NVIDIA, and this trains on a CPU"
    require(device.type == "cuda", "compute.fused", True, rule)
    config = cast(NetworkConfig, network.config)
    rule = "false with network.rms_norm: these kernels are of layer norm"
    require(not config.rms_norm, "compute.fused", True, rule)
    check_compiler(device, "fused")


def fuse(network: nn.Module, compute: ComputeConfig, objective: ObjectiveConfig) -> None:
    """Have a transformer's blocks, what is before and after them, computed our way, in place."""
    blocks = blocks_of(network, compute)
    # Its compiler is not everywhere where torch is, and takes a second.
    from eqm.kernels.blocks import block_forward, head_forward, patches_forward

    # The dispersive loss looks at tokens as they leave a block.
    config = cast(NetworkConfig, network.config)
    attends = compute.attention != "torch" and not unknown_to_attention(config)
    forward = block_forward(attends=attends, carries=not objective.dispersive_weight)
    for block in blocks:
        block.forward = forward.__get__(block)
    for part, way in (("patches", patches_forward), ("head", head_forward)):
        module = cast(nn.Module, getattr(network, part))
        module.forward = way.__get__(module)


def _recomputed(forward: Forward, *args: object) -> Any:
    # Nothing in a block is drawn at random.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)


def check_for_training(compute: ComputeConfig, device: torch.device) -> None:
    """Refuse what a training on this GPU would, while there is nothing that it could train on.

    Where stages are jobs of a cluster, only they see its machines. Raises ConfigError.
    """
    for asking in ("compile", "fused"):
        if device.type == "cuda" and getattr(compute, asking):
            check_compiler(device, asking)


def check_compiler(device: torch.device, asking: str = "compile") -> None:
    """Refuse a setting of ``compute`` for which nothing can compile here. Raises ConfigError.

    Or for which nothing that was compiled could be loaded.
    """
    _check_compiler(device, asking)
    if device.type in ("cpu", "cuda") and (unfit := _unfit_folder(device)) is not None:
        raise ConfigError(
            f"compute.{asking} is true, but compiled kernels are kept in {unfit}; or set "
            "compute.compile and compute.fused to false"
        )


def _check_compiler(device: torch.device, asking: str) -> None:
    if device.type == "cuda":
        if (missing := _missing_for_triton()) is not None:
            raise ConfigError(
                f"compute.{asking} is true, but Triton, which makes the kernels of a GPU, needs "
                f"{missing}; or set compute.compile and compute.fused to false"
            )
        return
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            "compute.compile is true, but there is no C++ compiler here, which torch.compile needs "
            "on a CPU: install g++, or set compute.compile to false"
        ) from error


def _missing_for_triton() -> str | None:
    """What Triton builds its launchers with, and is not here: that, and how to get it."""
    named = os.environ.get("CC")  # noqa: TID251  as Triton does
    if not (named or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler, and there is none here: install gcc, or name one in CC"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"{header}, which is not there: install the headers of Python (as python3-dev)"
    from triton.backends.nvidia.driver import libcuda_dirs

    try:
        libcuda_dirs.__wrapped__()
    except (AssertionError, OSError, subprocess.CalledProcessError):
        return (
            "libcuda.so.1, which `/sbin/ldconfig -p` does not show: run /sbin/ldconfig as root, or "
            "name its folder in TRITON_LIBCUDA_PATH"
        )
    return None


def _unfit_folder(device: torch.device) -> str | None:
    """A folder for compiled kernels from which none can be loaded: that, and how to have another.

    Hardened machines mount /tmp so, and homes are full or not there for users of containers.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    environ = os.environ  # noqa: TID251  as Triton and torch do
    places = {"TORCHINDUCTOR_CACHE_DIR": default_cache_dir()}
    if device.type == "cuda":
        home = environ.get("TRITON_HOME") or os.path.expanduser("~")
        places["TRITON_CACHE_DIR"] = f"{home}/.triton/cache"
    for name, usual in places.items():
        folder = Path(environ.get(name) or usual).absolute()
        there = next(one for one in (folder, *folder.parents) if one.exists())
        if os.statvfs(there).f_flag & os.ST_NOEXEC:
            return f"{folder}, which is mounted noexec: name another folder in {name}"
        if not os.access(there, os.W_OK | os.X_OK):
            return f"{folder}, which cannot be written to: name another folder in {name}"
    return None


def check_micro_batch(compute: ComputeConfig, objective: ObjectiveConfig, share: int) -> None:
    """Refuse parts that do not make up a process's ``share`` of the batch. Raises ConfigError.

    And groups of a dispersive loss that do not fill such a part.
    """
    size, group = compute.micro_batch, objective.dispersive_group
    whole = not objective.dispersive_weight or (size or share) % group == 0
    rule = f"a divisor of the {share} images of a process (train.batch_size over processes)"
    if size is None:
        require(whole, "objective.dispersive_group", group, rule)
        return
    require(share % size == 0, "compute.micro_batch", size, rule)
    rule = f"a multiple of objective.dispersive_group ({group})"
    require(whole, "compute.micro_batch", size, rule)


def is_replayed(compute: ComputeConfig, objective: ObjectiveConfig, device: torch.device) -> bool:
    """Whether the backward of a learner is recorded once and replayed (eqm.recorded).

    That of Eq. 3 alone, by kernels of ours: it makes no choice by numbers, and nothing hooks it.
    """
    plain = objective.loss == "gradient" and not objective.dispersive_weight
    ours = compute.fused and compute.parallel == "ddp" and device.type == "cuda"
    return compute.replay == "auto" and ours and plain and objective.energy == "implicit"


def check_attention(compute: ComputeConfig, network: NetworkConfig, config: TrainConfig) -> None:
    """Refuse our attention for what it is not for. Raises ConfigError."""
    if compute.attention != "eqm":
        return
    unknown = unknown_to_attention(network)
    rule = f"'auto' or 'torch' with {unknown}, which ours is not for"
    require(unknown is None, "compute.attention", compute.attention, rule)
    rule = f"'auto' with train.precision {config.precision!r}: ours is quick in 'bfloat16' alone"
    require(config.precision == "bfloat16", "compute.attention", compute.attention, rule)


def unknown_to_attention(network: NetworkConfig) -> str | None:
    """What our attention knows nothing of in a network; None for a network that it is for."""
    if network.qk_norm or network.rope:
        return "network.qk_norm or network.rope"
    head = network.width // network.heads
    return None if head <= WIDEST_HEAD else f"heads of {head} channels (network.width over heads)"


def check_halves(
    config: TrainConfig,
    objective: ObjectiveConfig,
    network: NetworkConfig | None = None,
    device: torch.device | None = None,
) -> None:
    """Refuse train.precision "float16" for what it is not for. Raises ConfigError.

    Objectives that go through a network's derivative, U-Nets, GPUs, and machines without the
    instructions or a compiler (:func:`eqm.kernels.halves.check_machine`).
    """
    if config.precision != "float16":
        return
    energy = objective.energy
    rule = "'implicit' with train.precision 'float16', whose products are differentiated once"
    require(energy == "implicit", "objective.energy", energy, rule)
    if network is not None:
        rule = "'transformer' with train.precision 'float16', which is for the layers of its blocks"
        require(network.kind == "transformer", "network.kind", network.kind, rule)
    if device is not None:
        rule = f"'bfloat16' on {device.type}: 'float16' is for the instructions of a CPU"
        require(device.type == "cpu", "train.precision", config.precision, rule)
        check_machine()


def slow_bfloat16(config: TrainConfig, network: nn.Module, device: torch.device) -> str | None:
    """What to tell a user whose processor is quicker in float32; None elsewhere.

    It is measured: some processors have instructions for bfloat16 that do half of what those for
    float32 do, some have none, so that it is emulated, and small networks gain less by quick
    products than they lose by what is cast around them.
    """
    if config.precision != "bfloat16" or device.type != "cpu":
        return None
    ratio = bfloat16_blocks(network) if hasattr(network, "blocks") else bfloat16_products()
    if ratio <= SLOW_PRODUCTS:
        return None
    faster = ", and 'float16' faster still for wide ones" if lacking() is None else ""
    return (
        f"train.precision is 'bfloat16', but it takes {ratio:.1f} times as long as float32 for "
        "this network on this processor: 'float32' is faster here, and more exact" + faster
    )


def bfloat16_blocks(network: nn.Module) -> float:
    """Seconds of a block of a transformer, there and back, in bfloat16 over those in float32.

    Of blocks that take long alone, those of products.
    """
    block = cast(nn.ModuleList, network.blocks)[0]
    count, width = cast(torch.Tensor, network.positions).shape[-2:]
    one = 24 * count * width**2 + 4 * count**2 * width
    if one > MOST_FLOPS:
        return bfloat16_products()
    images = int(max(1, min(MOST_IMAGES, BLOCK_FLOPS / one)))
    tokens = torch.zeros(images, count, width, requires_grad=True)
    given = (tokens, *block.parameters())

    def run(half: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = block(tokens, torch.zeros(images, width))
        torch.autograd.grad(out.sum(), given)

    return _over(lambda: run(True), lambda: run(False), rounds=BLOCKS)


def quickest_precision(bfloat16: float) -> str:
    """The ``train.precision`` that trains transformers quickest on this CPU.

    ``bfloat16`` is what :func:`bfloat16_products` says. What is not clearly less than float32's
    time is not worth digits.
    """
    float16 = FLOAT16_PRODUCTS if lacking() is None else 1.0
    if bfloat16 < min(float16, 1 / SLOW_PRODUCTS):
        return "bfloat16"
    return "float32" if float16 == 1 else "float16"


def bfloat16_products() -> float:
    """Seconds of a product in bfloat16 over seconds of the same in float32, on this CPU.

    The least of a few of each, taken in turn: what else the machine does falls on both.
    """
    half, whole = (torch.ones(768, 768, dtype=t) for t in (torch.bfloat16, torch.float32))
    return _over(lambda: torch.mm(half, half), lambda: torch.mm(whole, whole), rounds=PRODUCTS)


def _over(one: Callable[[], object], other: Callable[[], object], *, rounds: int) -> float:
    """The least time of one over the least of the other, taken in turn, so often or a while."""
    least, began = [math.inf, math.inf], time.perf_counter()
    while rounds > 0 or time.perf_counter() - began < SHORTEST_SECONDS:
        rounds -= 1
        for k, act in enumerate((one, other)):
            at = time.perf_counter()
            act()
            least[k] = min(least[k], time.perf_counter() - at)
    return least[0] / least[1]
