"""Linear layers and attention whose products a CPU takes in float16, by AVX512-FP16.

Twice as many multiplications an instruction as in float32, where instructions for bfloat16 do half
as many: halves.h says how, and how wrong that is. What goes in and out is float32. A linear layer
takes three products,

    y (T, O) = x W^T + b        dx (T, I) = dy W        dW (O, I) = dy^T x

and the sums of dy, which are the bias's, stay torch's; attending.cpp says what attention takes.
Called by compute and learner.
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
from eqm.network import Attention

SOURCES = tuple(Path(__file__).parent / name for name in ("products.cpp", "attending.cpp"))
EXTENSIONS = ("f", "bw", "vl", "dq", "fp16")
"""Parts of AVX-512 that it is compiled for."""


class _Unfit(Exception):
    """Why this machine cannot, as the end of a sentence."""


def lacking() -> str | None:
    """An instruction set that this processor lacks, as "avx512_fp16"; None for one that fits."""
    has = torch.cpu.get_capabilities()
    names = [f"avx512_{name}" for name in EXTENSIONS]
    return next((name for name in reversed(names) if not has.get(name, False)), None)


def check_machine() -> None:
    """Refuse a machine that cannot; else compile. Raises ConfigError."""
    try:
        _library()
    except _Unfit as error:
        raise ConfigError(f"train.precision is 'float16', {error}: use 'float32'") from error


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled products: a second, once a process. Raises _Unfit.

    Nothing is kept on the disk, so nothing there can be stale or somebody else's.
    """
    if (missing := lacking()) is not None:
        name = torch.cpu.get_capabilities().get("cpu_name") or "this one"
        raise _Unfit(f"which needs a processor with AVX512-FP16, and {name} lacks {missing}")
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
    found.attending_room.argtypes = [number, number, pointer]
    found.attend.argtypes = [*[pointer] * 3, *[number] * 4, pointer, number]
    found.attend_back.argtypes = [*[pointer] * 5, *[number] * 4, pointer, number]
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
    done = subprocess.run(
        [*command, *map(str, SOURCES)], check=False, capture_output=True, text=True
    )
    if done.returncode:
        first = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[0]
        raise _Unfit(f"but {compiler} cannot compile its products ({first}; g++ 12 or newer can)")


# -- products -----------------------------------------------------------------------------------


@torch.library.custom_op("eqm::product_in_halves", mutates_args=(), device_types="cpu")
def _product(
    a: Tensor, b: Tensor, bias: Tensor | None, most_a: Tensor | None, most_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """a (M, K) @ b (K, N) + bias (N,), and the largest absolute value in a, ().

    Numbers next to each other in rows or in columns; ``most_a``, ``most_b`` () where known.
    """
    _check_floats(a, b, *([] if bias is None else [bias]))
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


def _check_floats(*given: Tensor) -> None:
    # Others would be read as if they were, and past their end.
    for tensor in given:
        if tensor.dtype != torch.float32:
            raise TypeError(f"products in float16 are of float32 numbers, and not {tensor.dtype}")


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


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., I) @ weight (O, I)^T + bias (O,), products in float16, all else float32.

    Raises TypeError for others than float32.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = _Linear.apply(rows, weight.contiguous(), bias.contiguous())
    return cast(Tensor, y).view(*x.shape[:-1], len(weight))


# -- attention ----------------------------------------------------------------------------------


@torch.library.custom_op("eqm::attention_in_halves", mutates_args=(), device_types="cpu")
def _attend(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """qkv (B, N, 3, H, d) -> (B, N, H, d), and logarithms of the weights' sums, (B, H, N).

    Those are of scores of keys less their mean (attending.cpp).
    """
    _check_floats(qkv)
    out, logs = _attend_fake(qkv)
    images, tokens, _, heads, width = qkv.shape
    threads, room = torch.get_num_threads(), _attending_room(tokens, width, 0)
    _library().attend(
        qkv.data_ptr(), out.data_ptr(), logs.data_ptr(),
        images, tokens, heads, width, room.data_ptr(), threads,
    )  # fmt: skip
    return out, logs


@_attend.register_fake
def _attend_fake(qkv: Tensor) -> tuple[Tensor, Tensor]:
    images, tokens, _, heads, width = qkv.shape
    return qkv.new_empty(images, tokens, heads, width), qkv.new_empty(images, heads, tokens)


@torch.library.custom_op("eqm::attention_in_halves_backward", mutates_args=(), device_types="cpu")
def _attend_back(qkv: Tensor, out: Tensor, logs: Tensor, grad: Tensor) -> Tensor:
    """Gradient of qkv, of what :func:`_attend` took and gave and ``grad`` (B, N, H, d)."""
    _check_floats(grad)
    dqkv = torch.empty_like(qkv)
    images, tokens, _, heads, width = qkv.shape
    threads, room = torch.get_num_threads(), _attending_room(tokens, width, 1)
    _library().attend_back(
        qkv.data_ptr(), out.data_ptr(), logs.data_ptr(), grad.data_ptr(), dqkv.data_ptr(),
        images, tokens, heads, width, room.data_ptr(), threads,
    )  # fmt: skip
    return dqkv


@_attend_back.register_fake
def _attend_back_fake(qkv: Tensor, out: Tensor, logs: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(qkv)


def _attending_room(tokens: int, width: int, way: int) -> Tensor:
    """Memory for all threads, on the way forward (0) or back (1)."""
    each = (ctypes.c_long * 2)()
    _library().attending_room(tokens, width, each)
    return torch.empty(each[way] * torch.get_num_threads(), dtype=torch.uint8)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        out, logs = _attend(qkv)
        ctx.save_for_backward(qkv, out, logs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _attend_back(*ctx.saved_tensors, grad.contiguous())


def attention(qkv: Tensor, heads: int) -> Tensor:
    """Of qkv (B, N, 3 * D), as a layer gives them, what a layer is given, (B, N, D).

    Raises TypeError for others than float32.
    """
    split = qkv.contiguous().view(*qkv.shape[:2], 3, heads, -1)
    return cast(Tensor, _Attention.apply(split)).flatten(2)


def allow_in_graph() -> None:
    """Have compiled code call both as they are, and not look into them.

    Decorators would do so where this is imported, and that takes a second of every program.
    """
    for function in (linear, attention):
        torch.compiler.allow_in_graph(function)


# -- a network in halves ------------------------------------------------------------------------


class HalvesLinear(nn.Linear):
    """A layer that computes :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return linear(x, self.weight, self.bias)


class HalvesAttention(Attention):
    """Attention that computes :func:`attention`, but torch's where queries are normed or turned."""

    def mixed(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        if self.q_scale is not None or self.turns is not None:
            return super().mixed(tokens)
        return attention(self.qkv(tokens), self.heads)


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: HalvesLinear,
    Attention: HalvesAttention,
}


def parts_of(network: nn.Module) -> Sequence[nn.Module]:
    """Layers and attention of a transformer's blocks: what tokens go through.

    Modulations stay in float32: they are of one row an image, and cost nothing. Raises ConfigError
    for networks without blocks, and for weights that are not float32 on a CPU.
    """
    found = [
        part
        for block in cast(nn.ModuleList, getattr(network, "blocks", ()))
        for half in (block.attention, block.mlp)
        for part in cast(nn.Module, half).modules()
        if type(part) in KINDS
    ]
    if not found:
        raise ConfigError(
            "train.precision is 'float16', which is for transformers, and this network has no "
            "blocks of one: use 'float32'"
        )
    weight = next(found[0].parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise ConfigError(
            "train.precision is 'float16', which is for float32 weights on a CPU, and these are "
            f"{weight.dtype} on {weight.device}: use 'float32', or 'bfloat16' on a GPU"
        )
    return found


@contextlib.contextmanager
def in_halves(parts: Sequence[nn.Module]) -> Iterator[None]:
    """These parts compute in float16 meanwhile. Their weights are not touched."""
    before = [type(part) for part in parts]
    for part, kind in zip(parts, before, strict=True):
        part.__class__ = KINDS[kind]
    try:
        yield
    finally:
        for part, kind in zip(parts, before, strict=True):
            part.__class__ = kind
