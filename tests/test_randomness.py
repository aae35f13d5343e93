"""Randomness: the published generator, functions of (seed, stream, number), true shapes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import formulas

from eqm import randomness
from eqm.randomness import WORD, Stream, bits, normal, permutation, philox, uniform

relaxed = settings(max_examples=60, deadline=None, derandomize=True)
words = st.integers(0, WORD)
seeds = st.integers(0, 2**63 - 1)

# Random123, examples/kat_vectors, the lines "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def numbers(*values):
    return torch.tensor(values, dtype=torch.int64)


def ours(counter, key):
    return tuple(int(word) for word in philox(tuple(numbers(w) for w in counter), key))


# -- the generator ------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter, key, result):
    assert ours(counter, key) == result
    assert formulas.philox(counter, key) == result


@pytest.mark.parametrize("name", ["MULTIPLIERS", "WEYL", "ROUNDS"])
def test_known_answers_notice_a_wrong_constant(name, monkeypatch):
    wrong = 9 if name == "ROUNDS" else tuple(c + 2 for c in getattr(randomness, name))
    monkeypatch.setattr(randomness, name, wrong)
    assert all(ours(counter, key) != result for counter, key, result in KNOWN_ANSWERS)


@relaxed
@given(st.tuples(words, words, words, words), st.tuples(words, words))
def test_equal_to_the_transcription_everywhere(counter, key):
    assert ours(counter, key) == formulas.philox(counter, key)


@relaxed
@given(seeds, words, st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4), st.integers(0, 9))
def test_bits_are_words_of_the_number_whatever_stands_beside_it(seed, stream, asked, count):
    found = bits(seed, stream, numbers(*asked), count)
    assert found.tolist() == [formulas.bits(seed, stream, n, count) for n in asked]


def test_streams_and_their_values_stay():
    assert {s.name: s.value for s in Stream} == {
        "DATUM": 1,
        "MIRROR": 2,
        "POSTERIOR": 3,
        "GAMMA": 4,
        "EPS": 5,
        "LABEL_DROP": 6,
        "SAMPLE_NOISE": 7,
        "SAMPLE_LABEL": 8,
        "FIT_DATUM": 9,
        "FIT_NOISE": 10,
        "LANGEVIN": 11,
        "DIRECTION": 12,
    }


def test_seed_stream_and_number_each_matter():
    near = [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (2**32, 1, 0), (0, 1, 2**32)]
    first = {tuple(bits(seed, stream, numbers(n), 4)[0].tolist()) for seed, stream, n in near}
    assert len(first) == len(near)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, numbers(0), 1), "seed is -1"),
        ((2**63, 0, numbers(0), 1), "2\\*\\*63 - 1"),
        ((0, 2**32, numbers(0), 1), "stream is"),
        ((0, 0, numbers(0), -1), "count is -1"),
        ((0, 0, torch.zeros(1), 1), "float32"),
        ((0, 0, torch.zeros(1, 1, dtype=torch.int64), 1), "shape"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(arguments, message):
    with pytest.raises(ValueError, match=message):
        bits(*arguments)


# -- distributions ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uniform_never_reaches_one_and_normal_is_always_finite(dtype, monkeypatch):
    def extremes(seed, stream, numbers, count):
        return torch.tensor([0, WORD] * count).expand(len(numbers), -1)[:, :count]

    monkeypatch.setattr(randomness, "bits", extremes)
    zero, most = uniform(0, 0, numbers(0), 2, dtype)[0].tolist()
    assert zero == 0
    assert 0.99 < most < 1
    extreme = normal(0, 0, numbers(0), (4,), dtype)
    assert extreme.dtype == dtype
    assert bool(extreme.isfinite().all())
    assert float(extreme.abs().max()) < 6.8


def test_normal_is_box_and_muller():
    found = normal(7, Stream.EPS, numbers(3, 2**40), (3, 5), torch.float64)
    for sample, number in zip(found, (3, 2**40), strict=True):
        expected = torch.tensor(formulas.normals(7, Stream.EPS, number, 15), dtype=torch.float64)
        assert torch.allclose(sample.flatten(), expected, rtol=0, atol=1e-13)


def test_float32_and_float64_are_the_same_numbers():
    many = torch.arange(500)
    narrow, wide = (normal(1, 2, many, (64,), d) for d in (torch.float32, torch.float64))
    difference = (narrow.double() - wide).abs()
    # Where the radius is near 0, float32 cannot tell u from 1.
    assert float(difference.max()) < 3e-4
    assert float(difference.mean()) < 3e-7
    narrow, wide = (uniform(1, 2, many, 64, d) for d in (torch.float32, torch.float64))
    assert 0 <= float((wide - narrow.double()).min()) <= float((wide - narrow).max()) < 2**-24


@relaxed
@given(seeds, st.lists(st.integers(0, 2**40), min_size=2, max_size=9), st.integers(1, 40))
def test_values_do_not_depend_on_the_batch(seed, asked, size):
    together = normal(seed, Stream.EPS, numbers(*asked), (size,))
    coins = uniform(seed, Stream.GAMMA, numbers(*asked), size)
    for i, number in enumerate(asked):
        assert torch.equal(together[i], normal(seed, Stream.EPS, numbers(number), (size,))[0])
        assert torch.equal(coins[i], uniform(seed, Stream.GAMMA, numbers(number), size)[0])


def test_values_do_not_depend_on_threads():
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(normal(3, Stream.EPS, torch.arange(101), (4, 13, 13)))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def chi_square_excess(counts, expected):
    """Standard deviations by which chi-square passes its mean."""
    freedom = counts.numel() - 1
    chi = float(((counts.double() - expected) ** 2 / expected).sum())
    return (chi - freedom) / math.sqrt(2 * freedom)


def test_uniform_is_uniform_and_no_word_of_a_number_is_another():
    drawn = uniform(11, Stream.GAMMA, torch.arange(20_000), 5)
    cells = (drawn * 256).long()
    for column in cells.unbind(dim=1):
        assert abs(chi_square_excess(torch.bincount(column, minlength=256), 20_000 / 256)) < 4
    for i in range(4):
        pairs = cells[:, i] // 16 * 16 + cells[:, i + 1] // 16
        assert abs(chi_square_excess(torch.bincount(pairs, minlength=256), 20_000 / 256)) < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_is_normal(dtype):
    drawn = normal(5, Stream.EPS, torch.arange(20_000), (6,), dtype).double()
    ordered = drawn.flatten().sort().values
    ranks = torch.arange(1, len(ordered) + 1) / len(ordered)
    # Kolmogorov and Smirnov: 1.95 / sqrt(n) is passed once in a thousand.
    distance = (torch.special.ndtr(ordered) - ranks).abs().max()
    assert float(distance) < 1.95 / math.sqrt(len(ordered))
    assert float((torch.corrcoef(drawn.T) - torch.eye(6)).abs().max()) < 5 / math.sqrt(20_000)
    neighbours = torch.corrcoef(torch.stack((drawn[:-1, 0], drawn[1:, 0])))[0, 1]
    assert abs(float(neighbours)) < 5 / math.sqrt(20_000)


# -- permutations -------------------------------------------------------------------------------


def is_bijection(seed, epoch, size):
    found = permutation(seed, epoch, size, torch.arange(size))
    return torch.equal(found.sort().values, torch.arange(size))


def test_every_small_size_is_a_bijection():
    assert all(is_bijection(0, 0, size) for size in range(1, 150))


@relaxed
@given(seeds, st.integers(0, 2**40), st.integers(1, 3000))
def test_any_size_is_a_bijection(seed, epoch, size):
    assert is_bijection(seed, epoch, size)


@pytest.mark.parametrize("size", [255, 256, 257, 2047, 2048, 2049, 3000])
def test_sizes_around_powers_of_two_are_bijections(size):
    assert is_bijection(1, 2, size)


@relaxed
@given(st.integers(1, 10**9), st.lists(st.integers(0, 2**30), min_size=1, max_size=20), seeds)
def test_pointwise_whatever_is_asked_beside_it_and_epochs_may_be_mixed(size, asked, seed):
    positions = numbers(*asked) % size
    epochs = torch.arange(len(positions)) % 3
    together = permutation(seed, epochs, size, positions)
    for position, epoch, found in zip(positions, epochs, together, strict=True):
        assert permutation(seed, int(epoch), size, position[None]).item() == found
        assert 0 <= found < size


def test_epochs_and_seeds_are_different_permutations_with_no_order_left():
    size = 1797
    positions = torch.arange(size)
    first, second = permutation(0, 0, size, positions), permutation(0, 1, size, positions)
    other = permutation(1, 0, size, positions)
    for a, b in ((first, second), (first, other), (first, positions)):
        # Random permutations agree in one place on average, Poisson.
        assert int((a == b).sum()) < 8
        assert abs(float(torch.corrcoef(torch.stack((a, b)).double())[0, 1])) < 4 / size**0.5
    steps = (first[1:] - first[:-1]) % size
    counts = torch.bincount(steps // 100, minlength=18)[:17]
    assert abs(chi_square_excess(counts, 100 * (size - 1) / size)) < 4


def unevenness(size, epochs):
    """Excess of chi-square over where the first two of a permutation go, together."""
    where = torch.arange(epochs)[:, None].expand(-1, 2)
    found = permutation(3, where, size, torch.arange(2).expand(epochs, -1))
    counts = torch.bincount(found[:, 0] * size + found[:, 1], minlength=size**2).view(size, size)
    different = counts[~torch.eye(size, dtype=torch.bool)]
    assert int(counts.diagonal().sum()) == 0
    return chi_square_excess(different, epochs / len(different))


@pytest.mark.parametrize("size", [3, 5, 6, 7, 16, 33, 65, 100])
def test_over_epochs_every_pair_is_equally_likely(size):
    assert abs(unevenness(size, 40_000)) < 4


def test_too_few_rounds_are_noticed(monkeypatch):
    monkeypatch.setattr(randomness, "FEISTEL_ROUNDS_SMALL", 10)
    assert unevenness(5, 40_000) > 8


@pytest.mark.parametrize(
    ("size", "position", "message"),
    [(0, 0, "size is 0"), (5, 5, "position 5 is outside 0 to 4"), (5, -1, "position -1")],
)
def test_positions_outside_are_refused(size, position, message):
    with pytest.raises(ValueError, match=message):
        permutation(0, 0, size, numbers(position))


def test_arguments_are_left_alone():
    positions, epochs = torch.arange(20), torch.arange(20)
    permutation(0, epochs, 21, positions)
    assert torch.equal(positions, torch.arange(20))
    assert torch.equal(epochs, torch.arange(20))
