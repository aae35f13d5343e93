"""The gradient field of a network, and THE ONE SIGN.

    The gradient points from data to noise, (eps - x) c(gamma). Samplers subtract it. Energies rise
    toward noise.

Nothing else in this project decides a sign. A network f is read in one of three ways (sections 3.1,
3.4 of the paper):

    implicit    gradient f(x)                                  no energy
    dot         gradient of g(x) = x . f(x)
    l2          gradient of g(x) = 1/2 ||f(x)||^2              (the sign of the released code)

    x  latents (B, C, H, W)      f  the network       g  the energy, (B,)
    u, c  gradients without and with labels           s  scale of guidance
    gamma  noise level (B,): only networks that are conditioned on it ever see it

The gradient of an energy is always its true gradient, whatever grad mode the caller is in:
autograd is switched on here, or there is an error. The l2 energy of a network whose head is zero
has gradient zero in every weight: train it from other weights, or with ``initialise(seed,
zero_head=False)``.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from eqm.errors import ConfigError, DataError
from eqm.network import check_labels
from eqm.precision import deterministic, without_order

Energy = Literal["implicit", "dot", "l2"]


class Gradient(Protocol):
    """A gradient as samplers see it: a function of x, and of a noise level that EqM ignores."""

    def __call__(self, x: Tensor, gamma: Tensor | None = None) -> Tensor:
        """Map x (B, ...) and gamma (B,) to the gradient (B, ...)."""
        ...


class Network(Protocol):
    """What a field is made of: a function of latents and labels."""

    classes: int | None
    """Labels go from 0 to classes - 1, and classes is the null label; None: no labels."""
    conditioned: bool
    """Whether it must be told the noise level."""

    def __call__(
        self, x: Tensor, labels: Tensor | None = None, gamma: Tensor | None = None
    ) -> Tensor:
        """Map (B, C, H, W), (B,) int64 and, where it is conditioned, (B,) to (B, C, H, W)."""
        ...


class Field:
    """A network read as a gradient field. Raises ConfigError for an unknown kind of energy."""

    def __init__(self, network: Network, *, energy: Energy = "implicit") -> None:
        if energy not in get_args(Energy):
            raise ConfigError(f"energy is {energy!r}; it must be one of {get_args(Energy)}")
        self.network = network
        self.kind = energy

    def gradient(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        gamma: Tensor | None = None,
        *,
        create_graph: bool = False,
    ) -> Tensor:
        """Gradient at x, (B, C, H, W): from data to noise; x itself is left alone.

        Detached, unless ``create_graph`` keeps what a loss needs to reach the weights (and x, if
        that requires a gradient). ``gamma`` reaches only a network that is conditioned on it.
        Raises ValueError where a graph is asked for and grad mode is off, and for explicit energies
        ConfigError where a graph of compiled code is asked for, weights that autograd cannot record
        were made under inference_mode, or an operation on a GPU adds in no fixed order.
        """
        if create_graph and not torch.is_grad_enabled():
            raise ValueError(
                "create_graph=True keeps no graph under no_grad or inference_mode: leave them"
            )
        if self.kind != "implicit":
            return self._energy_gradient(x, labels, gamma, create_graph)
        with torch.set_grad_enabled(create_graph):
            return self.f(x, labels, gamma)

    def energy(
        self, x: Tensor, labels: Tensor | None = None, gamma: Tensor | None = None
    ) -> Tensor:
        """Energy at x, (B,): rises toward noise. Raises DataError for an implicit field."""
        if self.kind == "implicit":
            raise DataError(
                "this field is implicit: it has a gradient and no energy. Use the norm of the "
                "gradient, or train with energy 'dot' or 'l2'"
            )
        f = self.f(x, labels, gamma)
        other = x if self.kind == "dot" else f / 2
        return (other * f).flatten(1).sum(dim=1)

    def f(self, x: Tensor, labels: Tensor | None, gamma: Tensor | None) -> Tensor:
        """What the network says, (B, C, H, W); it hears gamma if it is conditioned on it."""
        return self.network(x, labels, gamma) if self.conditioned else self.network(x, labels)

    def gradient_of(
        self, labels: Tensor | None = None, *, scale: float = 1.0, channels: int | None = None
    ) -> "Gradient":
        """The gradient of samples with these labels as a function of x; see :func:`guided`."""
        return guided(self, labels, scale=scale, channels=channels)

    @property
    def conditioned(self) -> bool:
        """Whether the network must be told the noise level: baselines only."""
        return self.network.conditioned

    def _energy_gradient(
        self, x: Tensor, labels: Tensor | None, gamma: Tensor | None, create_graph: bool
    ) -> Tensor:
        if create_graph and (name := compiled_part(self.network)) is not None:
            raise ConfigError(
                f"{name} is compiled, and compiled code has no double backward: train this energy "
                "with objective.backward = 'directional', or leave the network uncompiled"
            )
        # Autograd cannot record inference tensors, and enable_grad alone does not end that mode.
        fixed = deterministic(x.device) if x.is_cuda else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), _attention(create_graph), fixed:
            tracked = create_graph and x.requires_grad
            at = x if tracked else x.detach().clone().requires_grad_(True)
            given = (None if t is None else t.clone() for t in (labels, gamma))
            try:
                g = self.energy(at, *given)
                return torch.autograd.grad(g.sum(), at, create_graph=create_graph)[0]
            except RuntimeError as error:
                if (said := without_order(error)) is not None:
                    raise ConfigError(said) from error
                # Asked only now: a look at every weight costs each evaluation.
                if (name := _inference_weight(self.network)) is None:
                    raise
                raise ConfigError(
                    f"weight {name} was made under torch.inference_mode, so autograd cannot "
                    "differentiate this energy: build or load the network outside of that mode "
                    "(sampling may be inside)"
                ) from error


def compiled_part(network: object) -> str | None:
    """Name of a part of a network that torch.compile has compiled; None where there is none.

    ``torch.compile(net)``, ``net.compile()``, a compiled ``net.forward``, and the same of any
    module within.
    """
    if not isinstance(network, nn.Module):
        return None
    for name, part in network.named_modules():
        # What torch.compile(part) returns has a forward of its own, as has a part given one.
        call, forward = (vars(part).get(key) for key in ("_compiled_call_impl", "forward"))
        if call is not None or hasattr(forward, "_torchdynamo_orig_callable"):
            return f"part {name} of the network" if name else "the network"
    return None


def _inference_weight(network: object) -> str | None:
    """Name of a weight or buffer that was made under inference_mode."""
    if not isinstance(network, nn.Module):
        return None
    kept = (*network.named_parameters(), *network.named_buffers())
    return next((name for name, value in kept if value.is_inference()), None)


def _attention(create_graph: bool) -> AbstractContextManager[object]:
    """Attention that can be differentiated as often as needed: fused kernels can only once."""
    return sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext()


def guided(
    field: Field, labels: Tensor | None, *, scale: float = 1.0, channels: int | None = None
) -> Gradient:
    """The gradient with classifier-free guidance, u + s (c - u), as a function of x alone.

    ``channels`` guides only the first so many and leaves c in the others; None guides all. Both
    parts are one call of the network, and scale 1 needs c alone. Raises DataError for labels out
    of range, and for guidance without labels, ConfigError for a scale that is not finite and for
    fewer than 1 channel.
    """
    if not math.isfinite(scale):
        raise ConfigError(f"guidance is {scale}; it must be a finite number, and 1 is none")
    classes = field.network.classes
    if labels is not None and classes is not None:
        check_labels(labels, classes=classes)
    if scale == 1.0:
        return lambda x, gamma=None: field.gradient(x, labels, gamma)
    if labels is None or classes is None:
        raise DataError(f"guidance of scale {scale} needs labels: give them, or use scale 1")
    if channels is not None and channels < 1:
        raise ConfigError(f"channels is {channels}; guide at least 1, or None for all")
    both = torch.cat((labels, torch.full_like(labels, classes)))

    def gradient(x: Tensor, gamma: Tensor | None = None) -> Tensor:
        levels = None if gamma is None else gamma.repeat(2)
        c, u = field.gradient(torch.cat((x, x)), both, levels).chunk(2)
        k = x.shape[1] if channels is None else channels
        return torch.cat((u[:, :k] + scale * (c[:, :k] - u[:, :k]), c[:, k:]), dim=1)

    return gradient


def guided_energy(
    field: Field, labels: Tensor | None, *, scale: float = 1.0, channels: int | None = None
) -> Callable[[Tensor], Tensor] | None:
    """The energy that :func:`guided` descends, E_u + s (E_c - E_u), (B,), as a function of x.

    None where there is none: an implicit field, a network that is conditioned on the noise level,
    and guidance of some of the channels, which is the gradient of nothing. Raises as :func:`guided`
    does.
    """
    guided(field, labels, scale=scale, channels=channels)
    if field.kind == "implicit" or field.conditioned:
        return None
    if scale == 1.0:
        return lambda x: field.energy(x, labels)
    if channels is not None or labels is None or field.network.classes is None:
        return None
    both = torch.cat((labels, torch.full_like(labels, field.network.classes)))

    def energy(x: Tensor) -> Tensor:
        c, u = field.energy(torch.cat((x, x)), both).chunk(2)
        return u + scale * (c - u)

    return energy


def composed(gradients: Sequence[Gradient], *, weights: Sequence[float] | None = None) -> Gradient:
    """The gradient of a weighted sum of energies: the sum of their gradients. Weights are 1.

    Raises DataError where there is nothing to add, or not one weight for each gradient,
    ConfigError for weights that are not finite.
    """
    factors = [1.0] * len(gradients) if weights is None else list(weights)
    if not gradients or len(factors) != len(gradients):
        raise DataError(f"{len(factors)} weights for {len(gradients)} gradients: give one each")
    odd = [w for w in factors if not math.isfinite(w)]
    if odd:
        raise ConfigError(f"weight is {odd[0]}; it must be a finite number")

    def gradient(x: Tensor, gamma: Tensor | None = None) -> Tensor:
        parts = [w * g(x, gamma) for w, g in zip(factors, gradients, strict=True)]
        return torch.stack(parts).sum(dim=0)

    return gradient
