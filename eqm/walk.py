"""Which images go into which shard of a set of latents, and who encodes it.

Encoders need not know of each other: each walks the open shards from a place of its own and skips
what is committed, so any number of them, in one program or in many, share the work. Two that meet
may encode one shard twice; the first commit stands. Called by encode and flows.
"""

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eqm.config import EncodeConfig
from eqm.stage import Context

LOOK_SECONDS = 0.5
"""How often an encoder looks whether another one was faster."""


# -- the plan -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """A run of consecutive images that become one shard."""

    number: int
    first: int
    """Number of its first image in the listing, and of its first sample."""
    count: int
    new: Sequence[int]
    """Numbers of its images that are encoded, ascending; the others are copied."""

    @property
    def copied(self) -> list[int]:
        """Numbers of its images that are copied from an earlier set."""
        return sorted(set(range(self.first, self.first + self.count)).difference(self.new))

    def batches(self, size: int) -> Iterator[Sequence[int]]:
        """Image numbers of each call of the autoencoder; one of none where nothing is new."""
        for start in range(0, max(1, len(self.new)), size):
            yield self.new[start : start + size]


def shard_plans(
    images: int, config: EncodeConfig, is_new: NDArray[np.bool_] | None = None
) -> list[ShardPlan]:
    """Cut a listing into shards; all but the last have config.shard_images.

    ``is_new`` (images,): those to encode; None: all.
    """
    plans = []
    for number, first in enumerate(range(0, images, config.shard_images)):
        numbers = range(first, min(first + config.shard_images, images))
        new = numbers if is_new is None else tuple(n for n in numbers if is_new[n])
        plans.append(ShardPlan(number=number, first=first, count=len(numbers), new=new))
    return plans


# -- who encodes what ---------------------------------------------------------------------------


def commit_prefix(context: Context) -> str:
    """Where the commits of a set lie."""
    return f"latents/{context.digest}/shards/"


def commit_key(context: Context, number: int) -> str:
    """Where the commit of a shard lies."""
    return f"{commit_prefix(context)}{number:05d}.json"


class Commits:
    """The shards that are finished, in the store."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def numbers(self) -> set[int]:
        """Numbers of all of them, by one listing."""
        prefix = commit_prefix(self._context)
        keys = self._context.store.list(prefix)
        return {int(key.removeprefix(prefix).removesuffix(".json")) for key in keys}

    def has(self, number: int) -> bool:
        """Whether a shard is finished."""
        return self._context.store.exists(commit_key(self._context, number))


class NoCommits(Commits):
    """For shards whose commits stand although their bytes are gone."""

    def __init__(self) -> None:
        pass

    def numbers(self) -> set[int]:
        """None of them."""
        return set()

    def has(self, number: int) -> bool:
        """Never."""
        return False


class Walk:
    """The open shards in an order of this encoder's own: upwards, until it meets another one.

    Where the next shard is finished, or another encoder was faster, it leaps to any open one:
    two that went on side by side would do everything twice. The shards that others are at are
    open too, so the last of them may be encoded twice, by who has nothing else to do; none waits
    for one that may be dead.
    """

    def __init__(self, commits: Commits, plans: list[ShardPlan], start: int) -> None:
        self._commits = commits
        self._plans = {plan.number: plan for plan in plans}
        self._taken: set[int] = set()
        self._next = plans[start % len(plans)].number
        self._looked = time.monotonic()
        self._random = random.SystemRandom()
        self.overtaken: set[int] = set()
        """Shards that another one finished while they were being encoded here."""
        self.finished = commits.numbers() & self._plans.keys()

    @property
    def images(self) -> int:
        """Images of all shards it may walk over."""
        return sum(plan.count for plan in self._plans.values())

    @property
    def unit(self) -> str:
        """What its images are, for people."""
        new = sum(len(plan.new) for plan in self._plans.values())
        copied = self.images - new
        return f"images ({new:,} new, {copied:,} copied)" if copied else "images"

    @property
    def left(self) -> list[ShardPlan]:
        """Shards that are not finished."""
        return [plan for number, plan in self._plans.items() if number not in self.finished]

    def count(self, numbers: Iterable[int]) -> int:
        """Images of some shards."""
        return sum(self._plans[number].count for number in numbers)

    def batches(self, size: int) -> Iterator["Batch"]:
        """Batches of the shards that are taken, one shard after another."""
        while (plan := self._take()) is not None:
            for numbers in plan.batches(size):
                if self._is_overtaken(plan):
                    break
                yield Batch(plan=plan, numbers=numbers)

    def leap(self) -> None:
        """Another encoder goes the same way: go on elsewhere."""
        self._next = -1

    def _take(self) -> ShardPlan | None:
        number = self._next
        if number not in self._open or self._commits.has(number):
            self.finished |= self._commits.numbers() & self._plans.keys()
            if not self._open:
                return None
            number = self._random.choice(sorted(self._open))
        self._taken.add(number)
        self._next = number + 1 if number + 1 in self._plans else min(self._plans)
        self._looked = time.monotonic()
        return self._plans[number]

    @property
    def _open(self) -> set[int]:
        return self._plans.keys() - self.finished - self._taken

    def _is_overtaken(self, plan: ShardPlan) -> bool:
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            if self._commits.has(plan.number):
                self.overtaken.add(plan.number)
                self.finished.add(plan.number)
                self.leap()
        return plan.number in self.overtaken


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images of one call of the autoencoder."""

    plan: ShardPlan
    numbers: Sequence[int]

    @property
    def is_last(self) -> bool:
        """Whether its shard is whole with it."""
        return self.numbers[-1:] == self.plan.new[-1:]
