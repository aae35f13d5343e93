"""Our kernels alone, beside torch's own ways, on a GPU: ``python -m bench kernels``.

Each forward and backward, as a block of XL/2 and B/2 at 256 tokens has them in bfloat16, with
what stands around them in a step: attention from qkv to the gradient of qkv and of its bias, GELU
with its bias's gradient, norm and residual with theirs. Compiled where torch is. Then the tiles
that attention could have: what eqm.kernels.attention is set to should be the quickest.
"""

import dataclasses
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.timing import alternate, show
from eqm.network import layer_norm, modulate

IMAGES, TOKENS, ROUNDS, TIMES = 128, 256, 5, 10
SIZES = {"XL": (16, 72), "B": (12, 64)}
"""Size -> heads, and channels of one."""
TILES = [
    *((128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 4, 2)),
    *((64, 128, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3)),
    *((64, 128, 8, 1), (64, 128, 8, 2), (64, 64, 8, 1), (64, 64, 8, 2), (64, 64, 4, 1)),
    *((32, 128, 8, 1), (32, 128, 8, 2), (32, 64, 4, 1), (32, 64, 4, 2), (32, 128, 4, 1)),
]
"""Queries, keys, warps, stages."""

Way = Callable[..., Tensor]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Noise that wants a gradient."""
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()


def both_ways(way: Way, *leaves: Tensor) -> Callable[[], None]:
    """Forward and backward, TIMES over, until the GPU is done."""
    slope = torch.randn_like(way(*leaves))

    def run() -> None:
        for _ in range(TIMES):
            torch.autograd.grad(way(*leaves), leaves, slope)
        torch.cuda.synchronize()

    return run


def by_torch(qkv: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Attention as eqm.network has it, of a product to which its bias is added here."""
    q, k, v = (qkv + bias).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def compare(size: str) -> None:
    """Print what each kernel takes, and torch's way."""
    from eqm.kernels.adaln import adaln
    from eqm.kernels.attention import attention
    from eqm.kernels.gelu import gelu

    heads, head = SIZES[size]
    width = heads * head
    qkv, bias = draw(IMAGES, TOKENS, 3 * width), draw(3 * width)
    u, up = draw(IMAGES, TOKENS, 4 * width), draw(4 * width)
    x = draw(IMAGES, TOKENS, width, dtype=torch.float32)
    y, out, parts = draw(IMAGES, TOKENS, width), draw(width), draw(IMAGES, 3 * width)

    def ours(qkv: Tensor, bias: Tensor) -> Tensor:
        return attention(qkv + bias.detach(), bias, heads)

    def plain_gelu(u: Tensor, bias: Tensor) -> Tensor:
        return functional.gelu(u + bias, approximate="tanh")

    def our_gelu(u: Tensor, bias: Tensor) -> Tensor:
        return gelu(u + bias.detach(), bias)

    def plain_norm(x: Tensor, y: Tensor, bias: Tensor, parts: Tensor) -> Tensor:
        gate, shift, scale = parts.unsqueeze(1).chunk(3, dim=2)
        x = x + gate * (y + bias)
        return torch.cat((x, modulate(layer_norm(x), shift, scale)), dim=2)

    def our_norm(x: Tensor, y: Tensor, bias: Tensor, parts: Tensor) -> Tensor:
        return torch.cat(adaln(x, y + bias.detach(), bias, *parts.chunk(3, dim=1)), dim=2)

    def backed(backend: SDPBackend) -> Callable[[], None]:
        def way(qkv: Tensor, bias: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return by_torch(qkv, bias, heads)

        return both_ways(torch.compile(way), qkv, bias)

    for name, leaves, sides in (
        ("attention", (qkv, bias), {"ours": ours}),
        ("GELU", (u, up), {"torch": plain_gelu, "ours": our_gelu}),
        ("norm", (x, y, out, parts), {"torch": plain_norm, "ours": our_norm}),
    ):
        runs = {side: both_ways(torch.compile(way), *leaves) for side, way in sides.items()}
        if name == "attention":
            kinds = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
            runs = {kind: backed(backend) for kind, backend in kinds.items()} | runs
        print(f"-- {size}/2, {name}, forward and backward of {IMAGES} images", flush=True)
        show(alternate(runs, rounds=ROUNDS), base=next(iter(runs)), unit="ms", scale=1e3 / TIMES)


def tile(size: str) -> None:
    """Print what attention's two kernels take by tiles."""
    from eqm.kernels import attention as kernels

    heads, head = SIZES[size]
    qkv = draw(IMAGES, TOKENS, 3 * heads * head).detach()
    out, mass = kernels._forward(qkv, heads)
    ways = {
        "FORWARD": lambda: kernels._forward(qkv, heads),
        "BACKWARD": lambda: kernels._backward(out, qkv, out, mass, heads),
    }
    for name, way in ways.items():
        usual, found = getattr(kernels, name), {}
        for numbers in TILES:
            tiles = kernels.Tiles(*numbers)
            setattr(kernels, name, tiles)
            try:
                found[tiles] = milliseconds(way)
            except Exception as error:
                print(f"   {dataclasses.astuple(tiles)}: {str(error).splitlines()[0][:70]}")
        setattr(kernels, name, usual)
        print(f"-- {size}/2, attention's {name}, ms by (queries, keys, warps, stages)")
        for tiles, value in sorted(found.items(), key=lambda pair: pair[1]):
            print(f"   {dataclasses.astuple(tiles)}: {value:.3f}{' <-' if tiles == usual else ''}")


def milliseconds(way: Callable[[], object]) -> float:
    """Of one call, in the mean of some after two."""
    way()
    way()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()  # type: ignore[no-untyped-call]
    for _ in range(TIMES):
        way()
    ended.record()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / TIMES


def main() -> None:
    """Measure and print."""
    if not torch.cuda.is_available():
        sys.exit("error: these kernels are for a GPU of NVIDIA, and torch finds none here")
    for size in SIZES:
        compare(size)
        tile(size)


if __name__ == "__main__":
    main()
