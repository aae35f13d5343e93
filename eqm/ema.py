"""Exponential moving average of weights, with a half-life in images.

    average <- d average + (1 - d) weights,   d = 2 ** -(images of the update / half-life)

so that its memory does not change with the batch size. It starts at the initial weights, as in the
paper; there is no bias correction. The 0.9999 an update of the released code, at 256 images an
update, is a half-life of 1.774 million images.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class EMA:
    """Averages of named weights, kept in float32, or in float64 for weights of float64."""

    def __init__(self, weights: Mapping[str, Tensor], *, half_life_images: float) -> None:
        if not half_life_images > 0:
            raise ValueError(f"half_life_images is {half_life_images}; it must be greater than 0")
        self.half_life_images = half_life_images
        self._averages = {name: _wide(w.detach()).clone() for name, w in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], *, images: int) -> None:
        """Move the averages toward the weights, after an update on so many images.

        Raises ValueError for names that are not those of the averages.
        """
        self._check_names(weights)
        share = -math.expm1(-math.log(2) * images / self.half_life_images)
        news = [_wide(weights[name]) for name in self._averages]
        averages = list(self._averages.values())
        torch._foreach_lerp_(averages, news, share)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> average: the tensors themselves, which the next update changes."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy averages in. Raises ValueError for names or shapes that are not those we have."""
        self._check_names(state)
        for name, average in self._averages.items():
            if state[name].shape != average.shape:
                raise ValueError(
                    f"average {name} has shape {tuple(state[name].shape)}; "
                    f"the weight has {tuple(average.shape)}"
                )
        for name, average in self._averages.items():
            average.copy_(state[name])

    def _check_names(self, found: Mapping[str, Tensor]) -> None:
        odd = sorted(found.keys() ^ self._averages.keys())
        if odd:
            where = "is not averaged" if odd[0] in found else "is missing"
            raise ValueError(f"{odd[0]} {where}: averages are of {len(self._averages)} weights")


def _wide(weight: Tensor) -> Tensor:
    """At least float32: a small share of a half-precision number is rounded away."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
