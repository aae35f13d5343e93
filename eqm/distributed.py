"""Rank, world size, device and collectives: the only reader of RANK and friends.

A program asks :func:`connect` once. Alone it is a world of one; under ``torchrun`` it joins the
others (NCCL on CUDA, gloo on CPU). Collectives here carry tensors only: nothing is pickled.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from eqm.errors import ConfigError


@dataclass(frozen=True)
class World:
    """Where this process stands among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0: the one that speaks, writes and seals."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for everybody."""
        if self.size > 1:
            dist.barrier()

    def sum_(self, flat: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all ranks, in place, in one call: the order of addition is fixed."""
        if self.size > 1:
            dist.all_reduce(flat)
        return flat

    def first_says(self, number: int) -> int:
        """The number that the first rank has, for all ranks: what it saw is what all go by."""
        told = torch.tensor(int(number) if self.is_first else 0, device=self.device)
        return int(self.sum_(told))

    def first_tells(self, text: str) -> str:
        """The text that the first rank has, for all ranks; "" for none."""
        if self.size == 1:
            return text
        size = self.first_says(len(text.encode()))
        told = torch.zeros(size, dtype=torch.int64, device=self.device)
        if self.is_first:
            told += torch.tensor(list(text.encode()), dtype=torch.int64, device=self.device)
        return bytes(self.sum_(told).tolist()).decode() if size else ""


@contextlib.contextmanager
def connect(device: str = "auto", *, threads: int | None = None) -> Iterator[World]:
    """Join the world this process was started in, and leave it in order.

    ``device`` is "auto", "cpu" or "cuda". ``threads`` bounds the CPU threads of this process; None
    shares the cores among the processes of this machine. Raises ConfigError.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    chosen = pick_device(device, local)
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // here))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    try:
        yield World(rank, size, chosen)
    finally:
        if size > 1:
            dist.destroy_process_group()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Turn "auto", "cpu" or "cuda" into a device. Raises ConfigError if it is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; it must be auto, cpu or cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError(
            "device is 'cuda', but torch sees no GPU: check the driver with nvidia-smi, "
            "or set device to 'auto'"
        )
    if name == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            "start fewer processes"
        )
    return torch.device("cuda", local_rank)
