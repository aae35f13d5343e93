"""Our kernels alone, beside torch's own ways, on a GPU: ``python -m bench kernels``.

Each forward and backward, as a block of XL/2 and B/2 at 256 tokens has them in bfloat16, with
what stands around them in a step: attention from qkv to the gradient of qkv and of its bias, GELU
with its bias's gradient, norm and residual with theirs; torch's ways compiled. Counted is what the
GPU's kernels take, not the wait for the calls that start them. Then what a
program of attention's and of adaLN's kernels could compute at once: what eqm.kernels is set to
should be the quickest. And, of XL/2's products, ways to add the gradient of weights to its sum.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from bench.energies import DEVICE
from bench.timing import alternate, show
from eqm.compute import compiled
from eqm.network import layer_norm, modulate

IMAGES, TOKENS, ROUNDS, TIMES = 128, 256, 5, 10
SIZES = {"XL": (16, 72), "B": (12, 64)}
"""Size -> heads, and channels of one."""
TILES = [
    *((64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (32, 64, 4, 2)),
    *((64, 32, 4, 2), (64, 32, 4, 3), (32, 64, 4, 1), (32, 64, 4, 3), (64, 128, 4, 1)),
    *((64, 128, 4, 2), (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)),
    *((64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3), (128, 32, 4, 2)),
]
"""Queries, keys, warps, stages."""
PIECES = [
    *((8, 256, 16, 4), (8, 256, 8, 4), (8, 256, 32, 4), (4, 256, 16, 4), (4, 512, 16, 4)),
    *((2, 1024, 16, 4), (16, 256, 8, 8), (8, 512, 16, 8), (4, 256, 32, 2), (8, 128, 16, 2)),
    *((16, 128, 8, 4), (4, 512, 32, 8), (16, 256, 8, 4), (8, 512, 8, 4)),
]
"""Rows, columns, steps, warps of GELU's backward."""
WALKS = [(walk, warps) for walk in (8, 16, 32, 64) for warps in (2, 4, 8)]
"""Tokens of a program, warps."""

Way = Callable[..., Tensor | tuple[Tensor, ...]]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Noise that wants a gradient."""
    return torch.randn(*shape, device=DEVICE, dtype=dtype).requires_grad_()


def wait() -> None:
    """Until the GPU is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def both_ways(way: Way, *leaves: Tensor, summed: int | None = None) -> Callable[[], None]:
    """Forward and backward, TIMES over; of all that comes out.

    ``summed``: of which leaf the gradient's sum over tokens is taken, for the bias before it.
    """

    def outputs() -> tuple[Tensor, ...]:
        found = way(*leaves)
        return (found,) if isinstance(found, Tensor) else found

    slopes = [torch.randn_like(found) for found in outputs()]

    def run() -> None:
        for _ in range(TIMES):
            found = torch.autograd.grad(outputs(), leaves, slopes)
            if summed is not None:
                found[summed].sum(dim=(0, 1))

    return run


def of_kernels(runs: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds that the GPU's kernels take of each run, in turn, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS + 1):
        for name, run in runs.items():
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                run()
                wait()
            if number:
                spans = (e.time_range for e in found.events() if e.device_type == DeviceType.CUDA)
                seconds[name].append(sum(span.elapsed_us() for span in spans) / 1e6)
    return seconds


def by_torch(qkv: Tensor, heads: int) -> Tensor:
    """Attention as eqm.network has it."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def compare(size: str) -> None:
    """Print what each kernel takes, and torch's way; of what products give, their bias within."""
    from eqm.kernels.adaln import adaln
    from eqm.kernels.attention import attention
    from eqm.kernels.gelu import gelu

    heads, head = SIZES[size]
    width = heads * head
    qkv, bias = draw(IMAGES, TOKENS, 3 * width), draw(3 * width)
    u, up = draw(IMAGES, TOKENS, 4 * width), draw(4 * width)
    x = draw(IMAGES, TOKENS, width, dtype=torch.float32)
    y, out, parts = draw(IMAGES, TOKENS, width), draw(width), draw(IMAGES, 3 * width)

    def plain_gelu(u: Tensor) -> Tensor:
        return functional.gelu(u, approximate="tanh")

    # Both leave x' and h to whoever reads them, the residual and the next product.
    def plain_norm(x: Tensor, y: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
        gate, shift, scale = parts.unsqueeze(1).chunk(3, dim=2)
        x = x + gate * y
        return x, modulate(layer_norm(x), shift, scale).to(parts.dtype)

    def our_norm(x: Tensor, y: Tensor, bias: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
        return adaln(x, y, bias, *parts.chunk(3, dim=1))

    def backed(backend: SDPBackend) -> Callable[[], None]:
        def way(qkv: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return by_torch(qkv, heads)

        return both_ways(compiled(way), qkv, summed=0)

    for name, runs in {
        "attention": {
            "cuDNN": backed(SDPBackend.CUDNN_ATTENTION),
            "flash": backed(SDPBackend.FLASH_ATTENTION),
            "ours": both_ways(lambda qkv, bias: attention(qkv, bias, heads), qkv, bias),
        },
        "GELU": {
            "torch": both_ways(compiled(plain_gelu), u, summed=0),
            "ours": both_ways(gelu, u, up),
        },
        "norm": {
            "torch": both_ways(compiled(plain_norm), x, y, parts, summed=1),
            "ours": both_ways(our_norm, x, y, out, parts),
        },
    }.items():
        print(f"-- {size}/2, {name}, forward and backward of {IMAGES} images", flush=True)
        show(of_kernels(runs), base=next(iter(runs)), unit="ms", scale=1e3 / TIMES)


def tile(size: str) -> None:
    """Print what kernels take by what one of their programs computes at once."""
    from eqm.kernels import adaln, gelu
    from eqm.kernels import attention as kernels

    heads, head = SIZES[size]
    width = heads * head
    qkv = draw(IMAGES, TOKENS, 3 * width).detach()
    out, mass = kernels._forward(qkv, heads)
    of = "by (queries, keys, warps, stages)"
    tiles, back = [kernels.Tiles(*numbers) for numbers in TILES], kernels._backward
    # Both of the backward have as many programs: what the other one has is not tried.
    for name, tried, way in (
        ("FORWARD", tiles, lambda: kernels._forward(qkv, heads)),
        (
            "TO_QUERIES",
            [t for t in tiles if t.queries == kernels.TO_KEYS.keys],
            lambda: back(out, qkv, out, mass, heads),
        ),
        (
            "TO_KEYS",
            [t for t in tiles if t.keys == kernels.TO_QUERIES.queries],
            lambda: back(out, qkv, out, mass, heads),
        ),
    ):
        choices = [(tile,) for tile in tried]
        choose(f"{size}/2, attention's {name}, ms {of}", kernels, (name,), choices, way)
    u, up = (draw(IMAGES, TOKENS, 4 * width).detach() for _ in range(2))
    names, title = ("ROWS", "COLUMNS", "STEPS", "WARPS"), f"{size}/2, GELU's backward, ms by "
    title += "(rows, columns, steps, warps)"
    choose(title, gelu, names, PIECES, lambda: gelu._backward(up, u))
    x = draw(IMAGES, TOKENS, width, dtype=torch.float32).detach()
    parts = draw(IMAGES, 3 * width).detach().chunk(3, dim=1)
    sums, h, mean, rstd = adaln._forward(x, out, *parts)
    warps = sorted({(warps,) for _, warps in WALKS})
    title = f"{size}/2, adaLN's forward, ms by (warps)"
    choose(title, adaln, ("WARPS",), warps, lambda: adaln._forward(x, out, *parts))
    title = f"{size}/2, adaLN's backward, ms by (tokens, warps)"
    given = h, x, sums, out, parts[0], parts[2], mean, rstd
    choose(title, adaln, ("WALK", "WARPS"), WALKS, lambda: adaln._backward(*given))


def accumulate(size: str) -> None:
    """Print what it takes to add a block's weight gradients, dy^T x, to their float32 sums.

    As training does, a product in bfloat16 is made float32 and then added; or it is added as it is;
    or the product itself adds to the sum, and rounds nothing to bfloat16. Torch has that for GPUs
    alone, and newer ones: others refuse a float32 sum, and say so here.
    """
    heads, head = SIZES[size]
    width, rows = heads * head, IMAGES * TOKENS
    triples = [
        (
            torch.zeros(outputs, inputs, device=DEVICE),
            draw(rows, outputs).detach(),
            draw(rows, inputs).detach(),
        )
        for outputs, inputs in (
            *((3 * width, width), (width, width)),
            *((4 * width, width), (width, 4 * width)),
        )
    ]
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
        "product, float32, sum": lambda onto, dy, x: onto.add_((dy.t() @ x).float()),
        "product, sum": lambda onto, dy, x: onto.add_(dy.t() @ x),
        "one product": add_product,
    }
    print(f"-- {size}/2, gradients of a block's weights of {IMAGES} images, added to their sums")
    runs = {}
    for name, way in ways.items():
        run = over(way, triples)
        try:
            run()
        except (NotImplementedError, RuntimeError) as error:
            print(f"   {name}: {str(error).splitlines()[0][:70]}")
        else:
            runs[name] = run
    base, *_ = runs
    show(alternate(runs, rounds=ROUNDS), base=base, unit="ms", scale=1e3 / TIMES)


def add_product(onto: Tensor, dy: Tensor, x: Tensor) -> None:
    """onto (O, I) float32 + dy (T, O)^T x (T, I), in place; in float32 on a CPU."""
    if onto.is_cpu:
        onto.addmm_(dy.t().float(), x.float())
    else:
        torch.addmm(onto, dy.t(), x, out_dtype=torch.float32, out=onto)


def over(
    way: Callable[[Tensor, Tensor, Tensor], object], triples: Sequence[tuple[Tensor, ...]]
) -> Callable[[], None]:
    """A way of all triples, TIMES over, until the GPU is done."""

    def run() -> None:
        for _ in range(TIMES):
            for triple in triples:
                way(*triple)
        wait()

    return run


def choose(
    title: str,
    kernels: ModuleType,
    names: Sequence[str],
    tried: Sequence[tuple[object, ...]],
    way: Callable[[], object],
) -> None:
    """Print what a way takes by the values of some names of a module, the quickest first."""
    usual, found = tuple(getattr(kernels, name) for name in names), {}
    for values in tried:
        _set(kernels, names, values)
        try:
            found[values] = milliseconds(way)
        except Exception as error:
            print(f"   {_numbers(values)}: {str(error).splitlines()[0][:70]}")
    _set(kernels, names, usual)
    print(f"-- {title}")
    for values, value in sorted(found.items(), key=lambda pair: pair[1]):
        print(f"   {_numbers(values)}: {value:.3f}{' <-' if values == usual else ''}", flush=True)


def _set(kernels: ModuleType, names: Sequence[str], values: Sequence[object]) -> None:
    for name, value in zip(names, values, strict=True):
        setattr(kernels, name, value)


def _numbers(values: Sequence[object]) -> tuple[object, ...]:
    (first, *others) = values
    return (first, *others) if isinstance(first, int) else dataclasses.astuple(first)  # type: ignore[call-overload]


def milliseconds(way: Callable[[], object]) -> float:
    """Of one call, in the mean of some after two."""
    way()
    way()
    wait()
    began = time.perf_counter()
    for _ in range(TIMES):
        way()
    wait()
    return (time.perf_counter() - began) / TIMES * 1e3


def main() -> None:
    """Measure and print."""
    if not torch.cuda.is_available():
        sys.exit("error: these kernels are for a GPU of NVIDIA, and torch finds none here")
    for size in SIZES:
        # Shapes of one size are no versions of the other's.
        torch.compiler.reset()
        compare(size)
        tile(size)
    accumulate("XL")


if __name__ == "__main__":
    main()
