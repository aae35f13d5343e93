"""Slow literal transcriptions of published formulas: Python numbers and loops, nothing clever."""

import math

import torch

# -- Philox4x32-10, as Salmon et al. print it ----------------------------------------------------


def philox(counter, key):
    """Four words and two words -> four words, in Python's unbounded integers."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for round_number in range(10):
        if round_number > 0:
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        p, q = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (q // 2**32) ^ x1 ^ k0, q % 2**32, (p // 2**32) ^ x3 ^ k1, p % 2**32
    return x0, x1, x2, x3


def bits(seed, stream, number, count):
    """The first words of one number's sequence."""
    words = []
    for block in range(math.ceil(count / 4)):
        counter = (block, number % 2**32, number // 2**32, stream)
        words += philox(counter, (seed % 2**32, seed // 2**32))
    return words[:count]


def normals(seed, stream, number, count):
    """Box and Muller on consecutive pairs of words."""
    words, found = bits(seed, stream, number, count + count % 2), []
    for i in range(0, len(words), 2):
        u, v = ((word + 0.5) / 2**32 for word in words[i : i + 2])
        radius = math.sqrt(-2 * math.log(u))
        found += [radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)]
    return found[:count]


# -- the objective, one number at a time ---------------------------------------------------------


def c(gamma, kind, a, b, multiplier):
    """Eqs. 4-6."""
    if kind == "constant":
        return multiplier
    if kind == "linear":
        return multiplier * (1 - gamma)
    if gamma > a:
        return multiplier * (1 - gamma) / (1 - a)
    return multiplier * (1 if kind == "truncated" else b - ((b - 1) / a) * gamma)


def loss(f, x, eps, gamma, c_gamma):
    """Eq. 3 for one sample, the mean over its entries; x, eps lists; f a function of a list."""
    x_gamma = [gamma * xi + (1 - gamma) * ei for xi, ei in zip(x, eps, strict=True)]
    errors = zip(f(x_gamma), x, eps, strict=True)
    return sum((fi - (ei - xi) * c_gamma) ** 2 for fi, xi, ei in errors) / len(x)


# -- positions of patches ------------------------------------------------------------------------


def position_embedding(grid, width):
    """Row by row; the first half of each encodes the column, the second the row."""
    rows = []
    for row in range(grid):
        for column in range(grid):
            vector = []
            for index in (column, row):
                angles = [index / 10000 ** (i / (width // 4)) for i in range(width // 4)]
                vector += [math.sin(t) for t in angles] + [math.cos(t) for t in angles]
            rows.append(vector)
    return torch.tensor([rows], dtype=torch.float64)


# -- samplers that keep their whole history ------------------------------------------------------


def gradient_descent(gradient, start, step_size, updates):
    """x_{k+1} = x_k - eta gradient(x_k)."""
    x = [start]
    for k in range(updates):
        x.append(x[k] - step_size * gradient(x[k]))
    return x[-1]


def nag(gradient, start, step_size, momentum, updates):
    """x_{k+1} = x_k - eta gradient(x_k + mu (x_k - x_{k-1})), with x_{-1} = x_0."""
    x = [start, start]
    for _ in range(updates):
        ahead = x[-1] + momentum * (x[-1] - x[-2])
        x.append(x[-1] - step_size * gradient(ahead))
    return x[-1]


def heavy_ball(gradient, start, step_size, momentum, updates):
    """x_{k+1} = x_k - eta gradient(x_k) + mu (x_k - x_{k-1}), with x_{-1} = x_0."""
    x = [start, start]
    for _ in range(updates):
        x.append(x[-1] - step_size * gradient(x[-1]) + momentum * (x[-1] - x[-2]))
    return x[-1]


def barzilai_borwein(gradient, start, step_size, updates):
    """x_{k+1} = x_k - (s.s / s.y) gradient(x_k), s and y the last changes of x and gradient."""
    x = [start]
    for k in range(updates):
        g = gradient(x[k])
        if k:
            s, y = x[k] - x[k - 1], g - gradient(x[k - 1])
            step_size = float((s * s).sum() / (s * y).sum())
        x.append(x[k] - step_size * g)
    return x[-1]


# -- the field of perfect training ---------------------------------------------------------------


class PerfectField:
    """E[c(gamma) (eps - x) | x_gamma], for finitely many equally likely data (D, ...).

    eps - x is (x_gamma - x) / (1 - gamma), and the posterior of datum i and gamma is proportional
    to (1 - gamma)^-d exp(-|x_gamma - gamma x_i|^2 / (2 (1 - gamma)^2)). The integral over gamma is
    a sum over points spaced evenly in log(1 - gamma). Looks like a network without labels.
    """

    classes, conditioned = None, False

    def __init__(self, data, c, points=2000):
        self.data, self.c = data.double(), c
        self.left = torch.logspace(-9, 0, points, dtype=torch.float64)
        """1 - gamma."""

    def __call__(self, x, labels=None):
        gamma = (1 - self.left).view(1, 1, -1, 1)
        left = self.left.view(1, 1, -1, 1)
        data = self.data.flatten(1)[None, :, None]
        at = x.double().flatten(1)[:, None, None]
        squared = (at - gamma * data).square().sum(dim=3)
        # The last term is the width of a cell: points are even in the logarithm.
        logs = -squared / (2 * self.left**2) - at.shape[3] * self.left.log() + self.left.log()
        share = torch.softmax(logs.flatten(1), dim=1).view_as(logs)
        pull = self.c(1 - self.left).view(1, 1, -1, 1) / left * (at - data)
        return (share[..., None] * pull).sum(dim=(1, 2)).view_as(x).to(x.dtype)
