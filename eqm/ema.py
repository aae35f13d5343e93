"""provisional"""

import torch


class EMA:
    def __init__(self, parameters, *, half_life_images):
        self.half = half_life_images
        self.values = {n: p.detach().clone() for n, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters, *, images):
        d = 0.5 ** (images / self.half)
        torch._foreach_lerp_(
            list(self.values.values()), [parameters[n].detach() for n in self.values], 1 - d
        )

    def state_dict(self):
        return {n: v.clone() for n, v in self.values.items()}

    def load_state_dict(self, s):
        for n, v in self.values.items():
            v.copy_(s[n])
