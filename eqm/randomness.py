"""Random numbers that belong to a sample, not to a rank: counter-based, the same on every device.

Every number drawn is a function of (seed, stream, number): the seed of the run, the use it is put
to (:class:`Stream`), and the training image or generated sample it belongs to. Batch size, order,
rank and device do not enter. The generator is Philox4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011). The integers are equal everywhere; normals go through log,
cos and sin, which are equal on one kind of device. Pure; not for secrets.

    B  numbers asked for     count  values for each of them     word  an unsigned 32-bit value
"""

import functools
import math
from enum import IntEnum

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
"""Of the first and the third word of the counter, in every round."""
WEYL = (0x9E3779B9, 0xBB67AE85)
"""Added to the key after every round."""
ROUNDS = 10
FEISTEL_ROUNDS = 10
FEISTEL_ROUNDS_SMALL = 24
"""Up to 64 things: 10 rounds leave permutations of 5 or 6 measurably uneven, 24 do not."""


class Stream(IntEnum):
    """What numbers are used for: one independent sequence a use. Values never change."""

    DATUM = 1
    """Which image: the permutation of each pass over the data."""
    MIRROR = 2
    POSTERIOR = 3
    """Noise of the autoencoder's posterior."""
    GAMMA = 4
    EPS = 5
    LABEL_DROP = 6
    SAMPLE_NOISE = 7
    """Where the descent of a generated sample starts."""
    SAMPLE_LABEL = 8
    FIT_DATUM = 9
    FIT_NOISE = 10
    """Fitting of autoencoders and extractors."""
    LANGEVIN = 11
    DIRECTION = 12
    """Of a projection, in which latents are looked at."""


# -- the generator ------------------------------------------------------------------------------


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of counter and two of key -> four random words.

    Tensors are int64 that hold words and broadcast against each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(MULTIPLIERS[0], c0)
        high1, low1 = _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a * b."""
    # The product has 64 bits: int64 may take the highest for a sign, and keeps them all.
    whole = b * a
    return (whole >> 32) & WORD, whole & WORD


def bits(seed: int, stream: int, numbers: Tensor, count: int) -> Tensor:
    """Random words, (B, count) int64 in [0, 2**32), for numbers (B,) int64.

    The first words are the same whatever ``count`` is. Raises ValueError for a seed outside
    0..2**63 - 1, a stream outside 0..2**32 - 1, a negative count, and numbers that are not int64.
    """
    _check(seed, stream, numbers, count)
    blocks = torch.arange(math.ceil(count / 4), device=numbers.device)
    number = numbers[:, None]
    counter = (blocks, number & WORD, (number >> 32) & WORD, torch.full_like(blocks, stream))
    words = torch.broadcast_tensors(*philox(counter, (seed & WORD, seed >> 32)))
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def _check(seed: int, stream: int, numbers: Tensor, count: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be from 0 to 2**63 - 1")
    if not 0 <= stream <= WORD:
        raise ValueError(f"stream is {stream}; use a member of Stream")
    if count < 0:
        raise ValueError(f"count is {count}; it must be 0 or greater")
    if numbers.dtype != torch.int64 or numbers.dim() != 1:
        raise ValueError(
            f"numbers are {numbers.dtype} of shape {tuple(numbers.shape)}; give (B,) int64"
        )


# -- distributions ------------------------------------------------------------------------------


def uniform(
    seed: int, stream: int, numbers: Tensor, count: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform values in [0, 1), (B, count), for numbers (B,) int64. Raises ValueError as bits do.

    They are multiples of 2**-24 in float32, of 2**-32 in float64: never rounded up to 1.
    """
    digits = min(32, 1 - round(math.log2(torch.finfo(dtype).eps)))
    leading = bits(seed, stream, numbers, count) >> (32 - digits)
    return leading.to(dtype) * 2.0**-digits


def normal(
    seed: int,
    stream: int,
    numbers: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal values, (B, *shape), for numbers (B,) int64. Raises ValueError as bits do.

    Box and Muller: sqrt(-2 ln u) times cos and sin of 2 pi v. Computed in float64 for float64 and
    in float32 for all other types, from the same integers; no value is beyond 6.8.
    """
    size = math.prod(shape)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    words = bits(seed, stream, numbers, 2 * math.ceil(size / 2)).to(exact)
    # Half a step away from 0, where the logarithm is infinite.
    u, v = ((words + 0.5) * 2.0**-32).unflatten(1, (-1, 2)).unbind(dim=2)
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=2)
    return pairs.flatten(1)[:, :size].reshape(len(numbers), *shape).to(dtype)


# -- permutations -------------------------------------------------------------------------------


def permutation(seed: int, epoch: int | Tensor, size: int, positions: Tensor) -> Tensor:
    """Where a random permutation of [0, size) takes the positions; int64 of their shape.

    Evaluated point by point, in constant memory: a Feistel network permutes the next power of
    two, and whatever lands outside [0, size) is permuted again until it lands inside (Black and
    Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). ``epoch`` chooses the
    permutation: one for all, or int64 of the shape of ``positions``. Raises ValueError for
    positions outside [0, size).
    """
    if size < 1:
        raise ValueError(f"size is {size}; there must be at least 1 thing to permute")
    outside = positions[(positions < 0) | (positions >= size)]
    if len(outside):
        raise ValueError(f"position {int(outside[0])} is outside 0 to {size - 1}")
    epochs = torch.as_tensor(epoch, dtype=torch.int64, device=positions.device)
    flat, width = positions.flatten(), (size - 1).bit_length()
    rounds = FEISTEL_ROUNDS if width > 6 else FEISTEL_ROUNDS_SMALL
    keys = bits(seed, Stream.DATUM, epochs.flatten(), rounds).expand(len(flat), -1)
    found = _feistel(flat, keys, width)
    while bool((astray := found >= size).any()):
        found[astray] = _feistel(found[astray], keys[astray], width)
    return found.view_as(positions)


BLOCK_IMAGES = 16_384
"""The order of so many images is computed, and kept, at once."""


def order(seed: int, size: int, numbers: Tensor) -> Tensor:
    """Which of ``size`` things each image of a run is, (B,) int64: every one once an epoch."""
    blocks = numbers // BLOCK_IMAGES
    places = torch.empty_like(numbers)
    for block in blocks.unique().tolist():
        here = blocks == block
        places[here] = _order_of_block(seed, size, block)[numbers[here] % BLOCK_IMAGES]
    return places


@functools.lru_cache(maxsize=8)
def _order_of_block(seed: int, size: int, block: int) -> Tensor:
    """``order`` of BLOCK_IMAGES consecutive images: a permutation costs much the same for one."""
    start = block * BLOCK_IMAGES
    numbers = torch.arange(start, start + BLOCK_IMAGES)
    return permutation(seed, numbers // size, size, numbers % size)


def _feistel(values: Tensor, keys: Tensor, width: int) -> Tensor:
    """Permute [0, 2**width): values (B,), keys (B, rounds)."""
    # The parts take turns: for an odd width they are one bit apart in length.
    right_width = width // 2
    left_width = width - right_width
    left, right = values >> right_width, values & ((1 << right_width) - 1)
    for key in keys.unbind(dim=1):
        left, right = right, left ^ (_mix(right, key) >> (32 - left_width))
        left_width, right_width = right_width, left_width
    return (left << right_width) | right


def _mix(values: Tensor, key: Tensor) -> Tensor:
    """A word that depends on every bit of values and key, by Philox's multiplications."""
    mixed = values ^ key
    for multiplier in MULTIPLIERS:
        high, low = _product(multiplier, mixed)
        mixed = high ^ low ^ key
    return mixed
