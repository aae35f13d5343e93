"""Numerics that must not depend on what others have chosen. Called by autoencoder and features."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """IEEE float32 whatever training has chosen: TF32, on by default, moves features by 1e-3."""
    backends: Any = torch.backends
    cuda = (backends.cudnn.conv, backends.cuda.matmul)
    knobs = (*cuda, backends.mkldnn.conv, backends.mkldnn.matmul)
    before = [knob.fp32_precision for knob in knobs]
    try:
        for knob in knobs:
            knob.fp32_precision = "ieee"
        yield
    finally:
        for knob, value in zip(knobs, before, strict=True):
            knob.fp32_precision = value
