"""The gradient of all weights in one buffer, allocated once. Pure; called by learner and kernels.

Each parameter's ``.grad`` is a view of it, which autograd adds to in place: so the norm, and the
sum over processes, are calls on one tensor, in an order that never changes, and nothing is ever
copied together for them. The sum is of segments, which a backward ends with one after the other,
the last layers' first: those that are done are summed while it goes on.

A product that makes a weight's gradient may add to the buffer itself (:class:`Update`).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

SEGMENT_BYTES = 25 * 2**20
"""Of a segment, at least: less would be calls that wait for answers alone. As torch's DDP."""
ALIGNED = 64
"""Numbers of which the weights' part begins at a multiple."""


class Update:
    """What the backwards of one update share: sums, and weights in a product's number type.

    A product that makes a weight's gradient may add it to ``sum_of(weight)`` itself, and give None
    to autograd.
    """

    def __init__(self, gradient: "FlatGradient") -> None:
        self._gradient = gradient
        self._numbers = {id(w): number for number, w in enumerate(gradient.weights)}
        self._cast: dict[tuple[int, torch.dtype], Tensor] = {}

    def sum_of(self, weight: Tensor) -> Tensor | None:
        """Where the gradients of a weight are summed; None of one that is not among them."""
        number = self._numbers.get(id(weight))
        return None if number is None else self._gradient.sum_of(number)

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """A weight in another number type, cast once."""
        if id(weight) not in self._numbers:
            return weight.to(dtype)
        key = id(weight), dtype
        if key not in self._cast:
            self._cast[key] = weight.detach().to(dtype)
        return self._cast[key]


_under_way: Update | None = None


def update_under_way() -> Update | None:
    """Of this process, whose backward may run in a thread of autograd's."""
    return _under_way


class FlatGradient:
    """Gradient of ``weights``, in their order, and before it ``room`` numbers that go along.

    A segment has at least ``segment_bytes``, but for the last one. Raises ValueError for weights of
    several dtypes or devices.
    """

    def __init__(
        self, weights: Sequence[nn.Parameter], *, room: int, segment_bytes: int | None = None
    ) -> None:
        kinds = {(w.dtype, w.device) for w in weights}
        if len(kinds) != 1:
            raise ValueError(
                f"weights are of {len(kinds)} kinds ({', '.join(map(str, kinds))}): give them one "
                "dtype and device"
            )
        self.weights = tuple(weights)
        self.room, self.begin = room, -(-room // ALIGNED) * ALIGNED
        counts = [w.numel() for w in weights]
        self.buffer = torch.zeros(
            self.begin + sum(counts), dtype=weights[0].dtype, device=weights[0].device
        )
        pieces = self.flat.split(counts)
        self.views = tuple(p.view_as(w) for p, w in zip(pieces, weights, strict=True))
        size = SEGMENT_BYTES if segment_bytes is None else segment_bytes
        self._firsts = cut(counts, max(1, size // self.buffer.element_size()))
        starts = [self.begin + sum(counts[:first]) for first in self._firsts]
        ends = [len(self.buffer), *starts]
        # The last one has the numbers that go along.
        starts[-1] = 0
        self.segments = tuple(self.buffer[a:b] for a, b in zip(starts, ends, strict=False))
        """The whole buffer in parts, in the order in which a backward ends with them."""
        self._waits: list[int] = []
        """Weights of each segment that the backward has yet to add to."""
        self._take: Callable[[Tensor], None] = _nobody
        self._handed, self._hooked = 0, False
        self.attach()

    @property
    def flat(self) -> Tensor:
        """The gradient, (P,): the buffer itself."""
        return self.buffer[self.begin :]

    @property
    def beside(self) -> Tensor:
        """The numbers that are summed over processes with it, (room,): the buffer itself."""
        return self.buffer[: self.room]

    def attach(self) -> None:
        """Let autograd add to the buffer."""
        for weight, view in zip(self.weights, self.views, strict=True):
            weight.grad = view

    def release(self) -> None:
        """Take it away from the weights, which then hold no gradient."""
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def collect(self) -> Tensor:
        """:attr:`flat`, with what lies in gradients that others have put in the views' place."""
        for number in range(len(self.weights)):
            self._collect(number)
        return self.flat

    @contextlib.contextmanager
    def adding(self) -> Iterator[None]:
        """One update: within, products may add to the sums. All that goes backward is summed."""
        global _under_way
        before, _under_way = _under_way, Update(self)
        try:
            yield
        finally:
            _under_way = before

    def sum_of(self, number: int) -> Tensor:
        """Where autograd adds the gradients of a weight, and others may."""
        self._collect(number)
        return self.views[number]

    def _collect(self, number: int) -> None:
        weight, view = self.weights[number], self.views[number]
        if weight.grad is not view:
            view.zero_() if weight.grad is None else view.copy_(weight.grad)
            weight.grad = view

    @contextlib.contextmanager
    def handing(self, take: Callable[[Tensor], None]) -> Iterator[None]:
        """Hand segments to ``take`` as soon as the one backward within is done with them.

        All but the last, in their order, which does not depend on the backward's: what is not ready
        in its turn is waited for, at the latest until the backward has ended. The last segment is
        the caller's, who has numbers to put beside it.
        """
        if len(self.segments) == 1:
            yield
            return
        self._watch()
        ends = [len(self.weights), *self._firsts]
        self._waits = [b - a for a, b in zip(self._firsts, ends, strict=False)]
        self._take, self._handed = take, 0
        try:
            yield
        finally:
            self._waits = []
        self.collect()
        for segment in self.segments[self._handed : -1]:
            take(segment)

    def _watch(self) -> None:
        """Be told of every weight whose gradient a backward has added to."""
        if self._hooked:
            return
        self._hooked = True
        ends = [len(self.weights), *self._firsts]
        for segment, (first, end) in enumerate(zip(self._firsts, ends, strict=False)):
            for number in range(first, end):
                # Told of a gradient that is None, too: a product has added it to the sum then.
                self.weights[number].register_post_accumulate_grad_hook(self._told(number, segment))

    def _told(self, number: int, segment: int) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def told(_: Tensor) -> None:
            if not self._waits:
                return
            self._collect(number)
            self._waits[segment] -= 1
            while self._handed < len(self.segments) - 1 and not self._waits[self._handed]:
                self._take(self.segments[self._handed])
                self._handed += 1

        return told

    def clear(self) -> None:
        """Begin the next sum."""
        self.buffer.zero_()


def _nobody(segment: Tensor) -> None:
    """Take a segment and do nothing with it."""


def cut(counts: Sequence[int], least: int) -> list[int]:
    """Where segments of weights of so many numbers begin: the last weights' first, 0 at the end.

    Each has at least ``least`` numbers, but for that of the first weights.
    """
    found, have = [], 0
    for number in range(len(counts) - 1, -1, -1):
        have += counts[number]
        if have >= least and number:
            found.append(number)
            have = 0
    return [*found, 0]
