"""Attention of few tokens, from the product that makes q, k and v to the one that reads its output.

    out = softmax(q k^T / sqrt(d)) v            of each head of each image

Other kernels give the gradients of q, k and v apart, to be put together for the product before,
whose bias asks for their sums; here they are written where they belong, and summed. Two kernels go
back, one for queries and one for keys and values: scores are computed in both, but neither waits
for the other's sums or needs more than a part of a processor's registers, so that several programs
are at work on one. Of these biases only those of q and v get a gradient: k's adds the same to all
scores of a query, which softmax takes away.

A head of 72 channels is 64 and the rest of them, 8, which products take as 16: padded to 128, as
one power of two, it would cost 1.6 times as much.

    B  batch    N  tokens    D  width    d  channels of a head, D / heads
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Tiles:
    """What a program computes at once. ``bench.kernels`` tries others."""

    queries: int
    keys: int
    warps: int
    stages: int
    """Parts that are fetched ahead of the one that is computed, and itself."""


FORWARD = Tiles(queries=64, keys=64, warps=4, stages=3)
TO_QUERIES = Tiles(queries=64, keys=32, warps=4, stages=3)
TO_KEYS = Tiles(queries=64, keys=64, warps=4, stages=3)
LEAST = 16
"""Rows and columns that products of tiles have at least."""


@triton.jit
def _load(
    at, rows, row, tokens,
    HEAD: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Rows of a head that lie ``row`` apart, in two parts; zeros beyond tokens and channels."""
    wide, rest = tl.arange(0, WIDE), WIDE + tl.arange(0, REST)
    if WHOLE and WIDE <= HEAD:
        found = tl.load(at + rows[:, None] * row + wide[None, :])
    else:
        found = _load_some(at, rows, row, wide, tokens, HEAD)
    return found, _load_some(at, rows, row, rest, tokens, HEAD)


@triton.jit
def _load_some(at, rows, row, columns, tokens, HEAD: tl.constexpr):
    inside = (rows < tokens)[:, None] & (columns < HEAD)[None, :]
    return tl.load(at + rows[:, None] * row + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(
    at, rows, row, tokens, wide, rest,
    HEAD: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    _store_part(at, rows, row, tl.arange(0, WIDE), tokens, HEAD, wide)
    if HEAD > WIDE:
        _store_part(at, rows, row, WIDE + tl.arange(0, REST), tokens, HEAD, rest)


@triton.jit
def _store_part(at, rows, row, columns, tokens, HEAD: tl.constexpr, tile):
    inside = (rows < tokens)[:, None] & (columns < HEAD)[None, :]
    here = at + rows[:, None] * row + columns[None, :]
    tl.store(here, tile.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _store_sums(at, wide, rest, HEAD: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr):
    """Sums over the rows of both parts."""
    column, further = tl.arange(0, WIDE), WIDE + tl.arange(0, REST)
    tl.store(at + column, tl.sum(wide, axis=0), mask=column < HEAD)
    if HEAD > WIDE:
        tl.store(at + further, tl.sum(rest, axis=0), mask=further < HEAD)


@triton.jit
def _over_channels(a, a_rest, b, b_rest, HEAD: tl.constexpr, WIDE: tl.constexpr):
    """a b^T."""
    found = tl.dot(a, tl.trans(b), input_precision="ieee")
    if HEAD > WIDE:
        found = tl.dot(a_rest, tl.trans(b_rest), found, input_precision="ieee")
    return found


@triton.jit
def _over_tokens(p, b, b_rest, onto, onto_rest, HEAD: tl.constexpr, WIDE: tl.constexpr):
    """onto + p b."""
    onto = tl.dot(p, b, onto, input_precision="ieee")
    if HEAD > WIDE:
        onto_rest = tl.dot(p, b_rest, onto_rest, input_precision="ieee")
    return onto, onto_rest


@triton.jit
def _zeros(rows: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr):
    return tl.zeros([rows, WIDE], dtype=tl.float32), tl.zeros([rows, REST], dtype=tl.float32)


@triton.jit
def _place(tokens, heads, ROWS: tl.constexpr, HEAD: tl.constexpr):
    """Number of a program's head, its rows, and where in qkv, in out and in sums it is."""
    parts = tl.cdiv(tokens, ROWS)
    number, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    image, width = number // heads, heads * HEAD
    column = number % heads * HEAD
    in_out = image * tokens * width + column
    in_sums = (image * parts + part) * width + column
    return number, part * ROWS + tl.arange(0, ROWS), 3 * in_out - 2 * column, in_out, in_sums


@triton.jit
def _forward_kernel(
    qkv_at, out_at, mass_at, tokens, heads, slope,
    HEAD: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Some queries of a head: out (B, N, D), and log2 of what softmax divides by, (B heads, N)."""
    width = heads * HEAD
    row = 3 * width
    number, query, in_qkv, in_out, _ = _place(tokens, heads, QUERIES, HEAD)  # pyright: ignore[reportGeneralTypeIssues]
    qkv_at += in_qkv
    out_at += in_out
    q, q_rest = _load(qkv_at, query, row, tokens, HEAD, WIDE, REST, WHOLE)
    out, out_rest = _zeros(QUERIES, WIDE, REST)
    top = tl.full([QUERIES], -float("inf"), dtype=tl.float32)
    total = tl.zeros([QUERIES], dtype=tl.float32)
    for start in tl.range(0, tokens, KEYS, num_stages=STAGES):
        key = start + tl.arange(0, KEYS)
        k, k_rest = _load(qkv_at + width, key, row, tokens, HEAD, WIDE, REST, WHOLE)
        scores = _over_channels(q, q_rest, k, k_rest, HEAD, WIDE) * slope
        if not WHOLE:
            scores = tl.where((key < tokens)[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        top = higher
        out, out_rest = out * shrink[:, None], out_rest * shrink[:, None]
        v, v_rest = _load(qkv_at + 2 * width, key, row, tokens, HEAD, WIDE, REST, WHOLE)
        out, out_rest = _over_tokens(p.to(v.dtype), v, v_rest, out, out_rest, HEAD, WIDE)
    out, out_rest = out / total[:, None], out_rest / total[:, None]
    _store(out_at, query, width, tokens, out, out_rest, HEAD, WIDE, REST)
    tl.store(mass_at + number * tokens + query, top + tl.log2(total), mask=query < tokens)


@triton.jit
def _to_queries_kernel(
    qkv_at, out_at, dout_at, mass_at, delta_at, dqkv_at, sums_at, tokens, heads, slope, scale,
    HEAD: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Some queries of a head: their gradients in dqkv (B, N, 3 D), and the sum of those.

    And delta, the sum of dout out over a query's channels, (B heads, N), for the keys.
    """
    width = heads * HEAD
    row = 3 * width
    number, query, in_qkv, in_out, in_sums = _place(tokens, heads, QUERIES, HEAD)  # pyright: ignore[reportGeneralTypeIssues]
    qkv_at += in_qkv
    dqkv_at += in_qkv
    out_at += in_out
    dout_at += in_out
    q, q_rest = _load(qkv_at, query, row, tokens, HEAD, WIDE, REST, WHOLE)
    dout, dout_rest = _load(dout_at, query, width, tokens, HEAD, WIDE, REST, WHOLE)
    out, out_rest = _load(out_at, query, width, tokens, HEAD, WIDE, REST, WHOLE)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    if HEAD > WIDE:
        delta += tl.sum(dout_rest.to(tl.float32) * out_rest.to(tl.float32), axis=1)
    tl.store(delta_at + number * tokens + query, delta, mask=query < tokens)
    mass = tl.load(mass_at + number * tokens + query, mask=query < tokens, other=0.0)
    dq, dq_rest = _zeros(QUERIES, WIDE, REST)
    for start in tl.range(0, tokens, KEYS, num_stages=STAGES):
        key = start + tl.arange(0, KEYS)
        k, k_rest = _load(qkv_at + width, key, row, tokens, HEAD, WIDE, REST, WHOLE)
        v, v_rest = _load(qkv_at + 2 * width, key, row, tokens, HEAD, WIDE, REST, WHOLE)
        scores = _over_channels(q, q_rest, k, k_rest, HEAD, WIDE) * slope
        dp = _over_channels(dout, dout_rest, v, v_rest, HEAD, WIDE)
        if not WHOLE:
            # Of score 0 a key beyond would weigh, for a query of low scores, infinity, times 0.
            scores = tl.where((key < tokens)[None, :], scores, -float("inf"))
        ds = (tl.exp2(scores - mass[:, None]) * (dp - delta[:, None])).to(k.dtype)
        dq, dq_rest = _over_tokens(ds, k, k_rest, dq, dq_rest, HEAD, WIDE)
    dq, dq_rest = dq * scale, dq_rest * scale
    _store(dqkv_at, query, row, tokens, dq, dq_rest, HEAD, WIDE, REST)
    _store_sums(sums_at + in_sums, dq, dq_rest, HEAD, WIDE, REST)


@triton.jit
def _to_keys_kernel(
    qkv_at, dout_at, mass_at, delta_at, dqkv_at, sums_at, tokens, heads, slope, scale,
    HEAD: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Some keys of a head: gradients of them and of their values in dqkv, and the values' sum."""
    width = heads * HEAD
    row = 3 * width
    number, key, in_qkv, in_out, in_sums = _place(tokens, heads, KEYS, HEAD)  # pyright: ignore[reportGeneralTypeIssues]
    qkv_at += in_qkv
    dqkv_at += in_qkv
    dout_at += in_out
    mass_at += number * tokens
    delta_at += number * tokens
    k, k_rest = _load(qkv_at + width, key, row, tokens, HEAD, WIDE, REST, WHOLE)
    v, v_rest = _load(qkv_at + 2 * width, key, row, tokens, HEAD, WIDE, REST, WHOLE)
    dk, dk_rest = _zeros(KEYS, WIDE, REST)
    dv, dv_rest = _zeros(KEYS, WIDE, REST)
    for start in tl.range(0, tokens, QUERIES, num_stages=STAGES):
        # Keys down and queries across: p and ds then are left sides of products as they are.
        query = start + tl.arange(0, QUERIES)
        q, q_rest = _load(qkv_at, query, row, tokens, HEAD, WIDE, REST, WHOLE)
        dout, dout_rest = _load(dout_at, query, width, tokens, HEAD, WIDE, REST, WHOLE)
        # Beyond the tokens, queries weigh 1 and meet zeros in dout and q.
        mass = tl.load(mass_at + query, mask=query < tokens, other=0.0)
        delta = tl.load(delta_at + query, mask=query < tokens, other=0.0)
        scores = _over_channels(k, k_rest, q, q_rest, HEAD, WIDE) * slope
        dp = _over_channels(v, v_rest, dout, dout_rest, HEAD, WIDE)
        if not WHOLE:
            scores = tl.where((key < tokens)[:, None], scores, -float("inf"))
        p = tl.exp2(scores - mass[None, :])
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dv, dv_rest = _over_tokens(p.to(dout.dtype), dout, dout_rest, dv, dv_rest, HEAD, WIDE)
        dk, dk_rest = _over_tokens(ds, q, q_rest, dk, dk_rest, HEAD, WIDE)
    dk, dk_rest = dk * scale, dk_rest * scale
    _store(dqkv_at + width, key, row, tokens, dk, dk_rest, HEAD, WIDE, REST)
    _store(dqkv_at + 2 * width, key, row, tokens, dv, dv_rest, HEAD, WIDE, REST)
    _store_sums(sums_at + in_sums, dv, dv_rest, HEAD, WIDE, REST)


def _power(count: int) -> int:
    """The least power of two that is no less; 1 for none."""
    return 2 ** math.ceil(math.log2(max(1, count)))


def _shapes(qkv: Tensor, heads: int, tiles: Tiles) -> dict[str, int]:
    """What kernels are compiled for: parts of a head, and tiles no larger than there are tokens."""
    head, tokens = qkv.shape[2] // (3 * heads), max(LEAST, _power(qkv.shape[1]))
    wide = max(LEAST, 2 ** int(math.log2(head)))
    queries, keys = min(tiles.queries, tokens), min(tiles.keys, tokens)
    return {
        "HEAD": head,
        "WIDE": wide,
        "REST": max(LEAST, _power(head - wide)),
        "QUERIES": queries,
        "KEYS": keys,
        "STAGES": tiles.stages,
        "WHOLE": not (qkv.shape[1] % queries or qkv.shape[1] % keys),
        "num_warps": tiles.warps,
    }


@torch.library.custom_op("eqm::attention", mutates_args=())
def _forward(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Output (B, N, D), and log2 of what each query's softmax divides by, (B heads, N)."""
    shapes = _shapes(qkv, heads, FORWARD)
    out, mass = _forward_fake(qkv, heads)
    # Programs of one head follow each other: the second finds its keys and values in the cache.
    grid = (triton.cdiv(qkv.shape[1], shapes["QUERIES"]) * len(mass),)
    slope = math.log2(math.e) / math.sqrt(shapes["HEAD"])
    cast(Any, _forward_kernel)[grid](qkv, out, mass, qkv.shape[1], heads, slope, **shapes)
    return out, mass


@_forward.register_fake
def _forward_fake(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, tokens, three = qkv.shape
    mass = qkv.new_empty(batch * heads, tokens, dtype=torch.float32)
    return qkv.new_empty(batch, tokens, three // 3), mass


@torch.library.custom_op("eqm::attention_backward", mutates_args=())
def _backward(
    dout: Tensor, qkv: Tensor, out: Tensor, mass: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """Gradient of qkv (B, N, 3 D), and sums of q's and v's over some tokens, (2, B parts, D)."""
    tokens = qkv.shape[1]
    scale = 1 / math.sqrt(qkv.shape[2] // (3 * heads))
    slope = math.log2(math.e) * scale
    queries, keys = _shapes(qkv, heads, TO_QUERIES), _shapes(qkv, heads, TO_KEYS)
    dqkv, sums = _backward_fake(dout, qkv, out, mass, heads)
    delta, programs = torch.empty_like(mass), (sums.shape[1] * heads,)
    cast(Any, _to_queries_kernel)[programs](
        qkv, out, dout, mass, delta, dqkv, sums[0], tokens, heads, slope, scale, **queries
    )
    cast(Any, _to_keys_kernel)[programs](
        qkv, dout, mass, delta, dqkv, sums[1], tokens, heads, slope, scale, **keys
    )
    return dqkv, sums


@_backward.register_fake
def _backward_fake(
    dout: Tensor, qkv: Tensor, out: Tensor, mass: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = out.shape
    assert TO_QUERIES.queries == TO_KEYS.keys, "both have as many programs"
    parts = -(-tokens // _shapes(qkv, heads, TO_KEYS)["KEYS"])
    return torch.empty_like(qkv), out.new_empty(2, batch * parts, width, dtype=torch.float32)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, heads: int) -> Tensor:
        qkv = qkv.contiguous()
        out, mass = _forward(qkv, heads)
        ctx.save_for_backward(qkv, out, mass)
        ctx.heads, ctx.dtype = heads, bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, mass = ctx.saved_tensors
        dqkv, sums = _backward(dout.contiguous(), qkv, out, mass, ctx.heads)
        dbias = sums.new_zeros(3, sums.shape[2])
        dbias[::2] = sums.sum(dim=1)
        return dqkv, dbias.flatten().to(ctx.dtype), None


@torch.compiler.allow_in_graph
def attention(qkv: Tensor, bias: Tensor, heads: int) -> Tensor:
    """(B, N, D) of qkv (B, N, 3 D): q, then k, then v, each of them head by head.

    qkv already has its bias (3 D,), which is here for its gradient alone.
    """
    return cast(Tensor, _Attention.apply(qkv, bias, heads))
