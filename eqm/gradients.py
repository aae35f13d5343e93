"""The gradient of all weights in one buffer, allocated once. Pure; called by learner.

Each parameter's ``.grad`` is a view of it, which autograd adds to in place: so the norm, and the
sum over processes, are one call on one tensor, in an order that never changes, and nothing is ever
copied together for them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FlatGradient:
    """Gradient of ``weights``, in their order, and behind it ``room`` numbers that go along.

    Raises ValueError for weights of several dtypes or devices.
    """

    def __init__(self, weights: Sequence[nn.Parameter], *, room: int) -> None:
        kinds = {(w.dtype, w.device) for w in weights}
        if len(kinds) != 1:
            raise ValueError(
                f"weights are of {len(kinds)} kinds ({', '.join(map(str, kinds))}): give them one "
                "dtype and device"
            )
        self.weights = tuple(weights)
        self.size = sum(w.numel() for w in weights)
        self.buffer = torch.zeros(
            self.size + room, dtype=weights[0].dtype, device=weights[0].device
        )
        pieces = self.buffer[: self.size].split([w.numel() for w in weights])
        self.views = tuple(p.view_as(w) for p, w in zip(pieces, weights, strict=True))
        self.attach()

    @property
    def flat(self) -> Tensor:
        """The gradient, (P,): the buffer itself."""
        return self.buffer[: self.size]

    @property
    def beside(self) -> Tensor:
        """The numbers that are summed over processes with it, (room,): the buffer itself."""
        return self.buffer[self.size :]

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
        for weight, view in zip(self.weights, self.views, strict=True):
            if weight.grad is not view:
                view.zero_() if weight.grad is None else view.copy_(weight.grad)
                weight.grad = view
        return self.flat

    def clear(self) -> None:
        """Begin the next sum."""
        self.buffer.zero_()
