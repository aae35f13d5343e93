"""AdamW of named weights: torch's fused kernel, and a state that is there from the start.

torch.optim.AdamW makes its state at its first update, keeps it by tensors, and imports a compiler
when it is made, for more than a second of every program that trains. Pure; called by learner.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

EPSILON = 1e-8
"""Added to the root of the second moment, as of torch and of the released code."""


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter, 2019) of weights by their names."""

    def __init__(
        self, weights: Mapping[str, Tensor], *, betas: tuple[float, float], weight_decay: float
    ) -> None:
        self.weights, self.betas, self.weight_decay = dict(weights), betas, weight_decay
        # The count lives where its weight lives, for the kernel that reads it is there.
        self._counts = {
            name: torch.zeros((), dtype=torch.float32, device=weight.device)
            for name, weight in weights.items()
        }
        self._first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self._second = {name: torch.zeros_like(weight) for name, weight in weights.items()}

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], *, learning_rate: float, happened: Tensor) -> None:
        """One update by gradients of all weights, in their order.

        ``happened`` () is 1.0, or 0.0 where everything is to stay as it is. The kernel looks at it
        on the device: the host does not wait for it.
        """
        adamw(
            list(self.weights.values()),
            list(gradients),
            list(self._first.values()),
            list(self._second.values()),
            [],
            list(self._counts.values()),
            fused=True,
            found_inf=1 - happened,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=learning_rate,
            weight_decay=self.weight_decay,
            eps=EPSILON,
            maximize=False,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """ "<moment>/<name>" -> the tensors themselves, which the next update changes.

        Moments are named as torch's: "step", "exp_avg" and "exp_avg_sq".
        """
        moments = {"step": self._counts, "exp_avg": self._first, "exp_avg_sq": self._second}
        return {f"{m}/{name}": t for m, named in moments.items() for name, t in named.items()}
