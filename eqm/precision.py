"""Numerics that must not depend on what others have chosen.

Called by autoencoder, encode, features, field, fit, learner, outliers, sampling, train and flows.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from eqm.errors import ConfigError


def check_products(
    precision: str, device: torch.device, *, setting: str = "train.precision"
) -> None:
    """Refuse TF32 where it is not. Raises ConfigError, which names the setting."""
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError(
            f"{setting} is 'tf32', which only GPUs of NVIDIA have, and the device is "
            f"{device.type}: use 'float32'"
        )


def choose_products(
    precision: str, device: torch.device, *, setting: str = "train.precision"
) -> None:
    """Set what CUDA takes products of float32 in, for this process: TF32 for "tf32", else IEEE.

    Torch's own choices differ between products and convolutions, and between versions. Raises as
    :func:`check_products`.
    """
    check_products(precision, device, setting=setting)
    chosen = "tf32" if precision == "tf32" else "ieee"
    backends: Any = torch.backends
    backends.cuda.matmul.fp32_precision = backends.cudnn.conv.fp32_precision = chosen


@contextlib.contextmanager
def products_in(
    precision: str, device: torch.device, *, setting: str = "precision"
) -> Iterator[None]:
    """Take products of float32 in "float32", "tf32" or "bfloat16" meanwhile.

    Raises as :func:`check_products`.
    """
    if precision == "bfloat16":
        with torch.autocast(device.type, torch.bfloat16):
            yield
        return
    backends: Any = torch.backends
    with _put_back(backends.cuda.matmul, backends.cudnn.conv):
        choose_products(precision, device, setting=setting)
        yield


@contextlib.contextmanager
def _put_back(*knobs: Any) -> Iterator[None]:
    """What these were set to before is what they are set to afterwards."""
    before = [knob.fp32_precision for knob in knobs]
    try:
        yield
    finally:
        for knob, value in zip(knobs, before, strict=True):
            knob.fp32_precision = value


def choose_deterministic(device: torch.device) -> None:
    """Choose, for this process, kernels that add in a fixed order.

    On a GPU what has none raises RuntimeError. For cuBLAS that takes a setting of the environment
    as well, which distributed.connect makes.
    """
    # Nothing reads memory that it did not write; to fill it all the same took 1.3 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Where others are only warned of, attention goes back by them: on an H100 the same gradient
    # had other bits in every second call, of float32 and of more than 256 tokens in bfloat16.
    # (torch.use_deterministic_algorithms loads a compiler, for a second.)
    torch.set_deterministic_debug_mode("error" if device.type == "cuda" else "warn")


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """:func:`choose_deterministic`, and what was chosen before it afterwards.

    The choice is one of the process: where several threads are within, it is that of the strictest,
    and put back by the last.
    """
    global _before
    with _CHOOSING:
        if not _within:
            _before = torch.get_deterministic_debug_mode(), _fills()
        choose_deterministic(device)
        mine = torch.get_deterministic_debug_mode()
        _within.append(mine)
        _choose_strictest()
    try:
        yield
    finally:
        with _CHOOSING:
            _within.remove(mine)
            _choose_strictest()
            if not _within:
                torch.utils.deterministic.fill_uninitialized_memory = _before[1]  # type: ignore[attr-defined]


_CHOOSING = threading.Lock()
_within: list[int] = []
"""Modes of those who are within :func:`deterministic`."""
_before = 0, True
"""Mode, and whether fresh memory was filled, before the first of them."""


def _fills() -> bool:
    return torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


def _choose_strictest() -> None:
    torch.set_deterministic_debug_mode(max(_before[0], *_within, 0))


def without_order(error: RuntimeError) -> str | None:
    """What to say of an operation that has no kernel of a fixed order; None of other errors."""
    operation, told, _ = str(error).partition(" does not have a deterministic implementation")
    if not told:
        return None
    return (
        f"{operation}, which this network goes through, has no kernel that adds in a fixed order "
        "on this device: results would differ every time. Use another operation, or the CPU"
    )


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """IEEE float32 whatever training has chosen: TF32, on by default, moves features by 1e-3."""
    backends: Any = torch.backends
    cuda = (backends.cudnn.conv, backends.cuda.matmul)
    knobs = (*cuda, backends.mkldnn.conv, backends.mkldnn.matmul)
    with _put_back(*knobs):
        for knob in knobs:
            knob.fp32_precision = "ieee"
        yield
