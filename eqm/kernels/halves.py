"""Linear layers whose products a CPU takes in float16, for processors with AVX512-FP16.

Twice as many multiplications an instruction as in float32, where instructions for bfloat16 do half
as many: halves.cpp says how, and why its sums are less wrong than those of bfloat16. What goes in
and out is float32. A linear layer takes three products,

    y (T, O) = x W^T + b        dx (T, I) = dy W        dW (O, I) = dy^T x

and the sums of dy, which are the bias's, stay torch's. Called by learner.
"""

import contextlib
import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from eqm.errors import ConfigError

SOURCES = tuple(Path(__file__).parent / name for name in ("products.cpp",))
EXTENSIONS = ("f", "bw", "vl", "dq", "fp16")
"""Parts of AVX-512 that it is compiled for."""


class _Unfit(Exception):
    """Why this machine cannot, as the end of a sentence."""


def check_machine(setting: str = "train.precision") -> None:
    """Refuse a machine that cannot; else compile. Raises ConfigError, which names the setting."""
    try:
        _library()
    except _Unfit as error:
        raise ConfigError(f"{setting} is 'float16', {error}: use 'float32'") from error


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled products: a second, once a process. Raises _Unfit.

    Nothing is kept on the disk, so nothing there can be stale or somebody else's.
    """
    has = torch.cpu.get_capabilities()
    missing = [name for name in EXTENSIONS if not has.get(f"avx512_{name}", False)]
    if missing:
        name = has.get("cpu_name") or "this one"
        raise _Unfit(
            f"which needs a processor with AVX512-FP16, and {name} lacks avx512_{missing[-1]}"
        )
    with tempfile.TemporaryDirectory(prefix="eqm-halves-") as folder:
        made = Path(folder) / "halves.so"
        _compile(made)
        try:
            found = ctypes.CDLL(str(made))
        except OSError as error:
            raise _Unfit(
                f"but its products cannot be loaded ({error}; TMPDIR names a folder that allows it)"
            ) from error
    pointer, number = ctypes.c_void_p, ctypes.c_long
    matrix, sizes = [pointer, number, number], [number] * 3
    found.product.argtypes = [*matrix, *matrix, *[pointer] * 2, *sizes, *[pointer] * 4, number]
    found.room.argtypes = [number, number, ctypes.c_bool, number, pointer]
    found.product.restype = found.room.restype = None
    return found


def _compile(made: Path) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise _Unfit(
            "which needs a C++ compiler, and there is none here (install g++ 12 or newer)"
        ) from error
    flags = ("-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-w", "-mfma")
    command = [compiler, *flags, *(f"-mavx512{name}" for name in EXTENSIONS), "-o", str(made)]
    done = subprocess.run([*command, *map(str, SOURCES)], check=False, capture_output=True, text=True)
    if done.returncode:
        first = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[0]
        raise _Unfit(f"but {compiler} cannot compile its products ({first}; g++ 12 or newer can)")


@torch.library.custom_op("eqm::product_in_halves", mutates_args=(), device_types="cpu")
def _product(
    a: Tensor, b: Tensor, bias: Tensor | None, most_a: Tensor | None, most_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """a (M, K) @ b (K, N) + bias (N,), and the largest absolute value in a, ().

    Numbers next to each other in rows or in columns; ``most_a``, ``most_b`` () where known.
    """
    c, most = _product_fake(a, b, bias, most_a, most_b)
    most.fill_(-1.0) if most_a is None else most.copy_(most_a)
    (m, k), n, threads = a.shape, b.shape[1], torch.get_num_threads()
    if not c.numel() or not k:
        return (c.zero_() if bias is None else c.copy_(bias.expand_as(c))), most.clamp_(min=0)
    known = torch.tensor(-1.0) if most_b is None else most_b
    bytes_ = (ctypes.c_long * 2)()
    _library().room(n, k, a.stride(1) != 1, threads, bytes_)
    room_a, room_b = (torch.empty(count, dtype=torch.uint8) for count in bytes_)
    _library().product(
        a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(),
        None if bias is None else bias.data_ptr(), c.data_ptr(), m, n, k,
        most.data_ptr(), known.data_ptr(), room_a.data_ptr(), room_b.data_ptr(), threads,
    )  # fmt: skip
    return c, most


@_product.register_fake
def _product_fake(
    a: Tensor, b: Tensor, bias: Tensor | None, most_a: Tensor | None, most_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape[0], b.shape[1]), a.new_empty(())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, most = _product(x, weight.t(), bias, None, None)
        ctx.save_for_backward(x, weight, most)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight, most_x = ctx.saved_tensors
        dy = dy.contiguous()
        dx, most = None, None
        if ctx.needs_input_grad[0]:
            dx, most = _product(dy, weight, None, None, None)
        dw, _ = _product(dy.t(), x, None, most, most_x)
        return dx, dw, dy.sum(dim=0)


@torch.compiler.allow_in_graph
def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., I) @ weight (O, I)^T + bias (O,), products in float16, all else float32."""
    y = _Linear.apply(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias)
    return cast(Tensor, y).view(*x.shape[:-1], -1)


class HalvesLinear(nn.Linear):
    """A layer that computes :func:`linear`. Layers become such, and plain ones again."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return linear(x, self.weight, self.bias)


def layers_of(network: nn.Module, setting: str = "train.precision") -> Sequence[nn.Linear]:
    """The layers of a transformer's blocks that tokens go through.

    Modulations stay in float32: they are of one row an image, and cost nothing. Raises ConfigError,
    which names the setting, for networks without blocks, and weights that are not float32 on a CPU.
    """
    found = [
        layer
        for block in cast(nn.ModuleList, getattr(network, "blocks", ()))
        for part in (block.attention, block.mlp)
        for layer in cast(nn.Module, part).modules()
        if type(layer) is nn.Linear
    ]
    if not found:
        raise ConfigError(
            f"{setting} is 'float16', which is for transformers, and this network has no blocks of "
            "one: use 'float32'"
        )
    weight = found[0].weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise ConfigError(
            f"{setting} is 'float16', which is for float32 weights on a CPU, and these are "
            f"{weight.dtype} on {weight.device}: use 'float32', or 'bfloat16' on a GPU"
        )
    return found


@contextlib.contextmanager
def in_halves(layers: Sequence[nn.Module]) -> Iterator[None]:
    """These linear layers take their products in float16 meanwhile."""
    for layer in layers:
        layer.__class__ = HalvesLinear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear
