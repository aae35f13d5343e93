"""The U-Net f, for small pixel images: diffusers' UNet2DModel behind the Transformer's interface.

EqM hides the noise level, but UNet2DModel always embeds a timestep. It is fed 0, whose embedding
is a learned constant; only networks that are conditioned on gamma are told it. Labels are added to
that embedding, and group norms are modulated by their sum (ADM: Dhariwal and Nichol, 2021). Read by
eqm.field, like every network; like eqm.network, this module knows neither the sign nor the loss.

    B  batch      C  channels     H, W  height, width     K  classes
    gamma  noise level, (B,): 0 is noise, 1 is data

Three kinds of weights never learn, because nothing depends on them: the biases of attention's keys
(softmax cancels them); the columns of ``time_embedding.linear_1`` that read sin(0), where time is
constant; the bias of a convolution right before a group norm whose groups are one channel.
"""

from typing import Any

import torch
from torch import Tensor

from eqm.config import NetworkConfig, UNetConfig, replace
from eqm.errors import ConfigError
from eqm.network import Labelled

TIMESTEPS = 1000.0
"""Timesteps from gamma = 0 to 1: the sinusoids turn by at most one radian a timestep."""


class UNet(Labelled):
    """f(x, labels): (B, C, H, W) -> (B, C, H, W), with labels (B,) int64.

    ``size`` is (H, W), or one number for both. ``config.unet`` is its shape; of the rest of
    ``config`` only ``time`` counts: "none" and "constant" are the same here, "conditioned" feeds
    gamma. The middle attends if any resolution does. Without dropout; built on torch's default
    device, with ``initialise(0)`` (on "meta": without weights). Raises ConfigError for sizes that
    cannot be halved as often as ``unet.widths`` asks, and for heads that do not fit the middle.
    """

    def __init__(
        self,
        config: NetworkConfig,
        *,
        size: int | tuple[int, int],
        channels: int,
        classes: int | None,
    ) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        super().__init__((channels, height, width), classes, timed=config.time == "conditioned")
        _check_fits(config.unet, height, width)
        self.config = replace(config, kind="unet")
        with torch.device("meta"):  # takes no number from torch's global generator
            bare = self._drawn()
        self.unet = bare.to_empty(device=torch.get_default_device())
        if not self.unet.conv_in.weight.is_meta:
            self.initialise(0)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, gamma: Tensor | None = None
    ) -> Tensor:
        """Apply f to x (B, C, H, W) with labels (B,) int64; None takes the null label.

        ``gamma`` (B,) is for networks that are conditioned on it, and for no others. Raises
        DataError for what does not fit. Labels out of range are the caller's to find.
        """
        fitting = self.fitting_labels(x, labels)
        level = self.fitting_gamma(x, gamma)
        time = x.new_zeros(1) if level is None else TIMESTEPS * level.float()
        return self.unet(x, time, None if self.classes is None else fitting, return_dict=False)[0]

    @torch.no_grad()
    def initialise(self, seed: int, *, zero_head: bool = True) -> None:
        """Draw all weights anew, in place: a function of the seed alone, by torch's own rules.

        The last convolution is 0, so that f == 0 at first. The energy 1/2 ||f||^2 has no gradient
        there and would never train: ``zero_head=False`` draws it as well.
        """
        with torch.random.fork_rng(devices=()), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach GPUs too
            self.unet.load_state_dict(self._drawn().state_dict())
        if zero_head:
            for weight in self.unet.conv_out.parameters():
                weight.zero_()

    def _drawn(self) -> Any:
        """A UNet2DModel on torch's default device, with weights from its global generator."""
        from diffusers.models.unets.unet_2d import UNet2DModel

        rows = None if self.classes is None else self.classes + 1
        return UNet2DModel(
            sample_size=self.shape[1:],
            in_channels=self.shape[0],
            out_channels=self.shape[0],
            num_class_embeds=rows,
            **_settings(self.config.unet),
        )


def _settings(config: UNetConfig) -> dict[str, Any]:
    """Our names of a U-Net's shape -> diffusers'. Up blocks begin at the last resolution."""
    kinds = ["Attn" if i in config.attention else "" for i in range(len(config.widths))]
    return {
        "block_out_channels": config.widths,
        "layers_per_block": config.layers,
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        "add_attention": bool(config.attention),
        "attention_head_dim": config.head_width,
        "norm_num_groups": config.groups,
        "attn_norm_num_groups": config.groups,
        # Added before a norm, labels would vanish in groups of one channel.
        "resnet_time_scale_shift": "scale_shift",
    }


def _check_fits(config: UNetConfig, height: int, width: int) -> None:
    factor, last = 2 ** (len(config.widths) - 1), config.widths[-1]
    if height % factor or width % factor:
        raise ConfigError(
            f"images of {height} x {width} cannot be halved {len(config.widths) - 1} times: give "
            f"network.unet.widths fewer entries, or choose a size that {factor} divides"
        )
    if height * width == factor**2 and last == config.groups:
        raise ConfigError(
            f"images of {height} x {width} come down to one pixel, where {config.groups} groups of "
            f"{last} channels norm every number to 0: lower network.unet.groups"
        )
