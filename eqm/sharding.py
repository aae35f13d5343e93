"""FSDP2: each process holds its share of every weight, and of what training keeps beside it.

Torch's fully_shard is put around each block and the whole, from outside. What the optimiser, the
averages and checkpoints see are plain tensors: ``pieces``, this process's rows of each weight.
Checkpoints hold whole tensors, so they are the same whoever wrote them. Built by train for learner.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import ProcessGroup
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from eqm.config import ObjectiveConfig
from eqm.distributed import World
from eqm.errors import ConfigError, require


class Shards:
    """A network that is shared among processes, from now on.

    ``half``: blocks are sent round in bfloat16, and computed in it. Whole again they are only while
    they compute. Every method but :meth:`cut` is called by all processes at the same moment.
    """

    def __init__(
        self, network: nn.Module, blocks: Sequence[nn.Module], world: World, *, half: bool
    ) -> None:
        # The gradient's slice of the output is a view, which nothing here changes in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        self.world = world
        # Over the group of all ranks that has the time-out which was asked for.
        self.mesh = DeviceMesh.from_group(cast("ProcessGroup", world.group), world.device.type)
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for part in (*blocks, network):
            fully_shard(part, mesh=self.mesh, mp_policy=policy)
        for part in network.modules():
            if isinstance(part, FSDPModule):
                # Losses are scaled to add up over processes; gloo knows no other factor than 1.
                part.set_force_sum_reduction_for_comms(True)
                part.set_gradient_divide_factor(1.0)
                # Whole weights are made when first needed and then ask for gradients as the shares
                # do at that moment, which may be one where all are frozen.
                part.unshard()
                part.reshard()
        named = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self._shares = cast(dict[str, DTensor], named)
        with torch.no_grad():
            self.pieces = {n: nn.Parameter(p.to_local()) for n, p in self._shares.items()}
        """Name -> this process's rows: the memory itself of the network's weights."""

    def attach(self, views: Sequence[Tensor]) -> None:
        """Let gradients be summed over processes into these, one of each of ``pieces``."""
        for (name, share), view in zip(self._shares.items(), views, strict=True):
            share.grad = self._share(name, view)

    def norm(self, pieces: Tensor) -> Tensor:
        """Norm () of what all processes hold together."""
        return self.world.sum_(pieces.square().sum()).sqrt()

    @torch.no_grad()
    def whole(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors of "<anything>/<name of a weight>" -> rows; empty but on the first process.

        One after the other, and on the CPU, for together they may not fit on a device. Numbers that
        have no rows are as they are.
        """
        found = {}
        for key, piece in pieces.items():
            name = key.rpartition("/")[2]
            with self.world.together():
                full = self._share(name, piece).full_tensor() if piece.dim() else piece
            if self.world.is_first:
                found[key] = full.cpu()
        return found

    @torch.no_grad()
    def cut(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's rows of whole tensors: what :meth:`whole` puts together."""
        return {key: self._rows(key.rpartition("/")[2], t) for key, t in tensors.items()}

    def _rows(self, name: str, whole: Tensor) -> Tensor:
        if not whole.dim():
            return whole
        at = whole.to(self.world.device)
        placements = self._shares[name].placements
        return distribute_tensor(at, self.mesh, placements, src_data_rank=None).to_local().clone()

    def _share(self, name: str, piece: Tensor) -> DTensor:
        like = self._shares[name]
        return DTensor.from_local(
            piece.detach(),
            self.mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )


def check_shardable(objective: ObjectiveConfig, processes: int) -> None:
    """Refuse what FSDP2 cannot train with so many processes. Raises ConfigError."""
    if processes == 1:
        raise ConfigError(
            "compute.parallel is 'fsdp2', which shares weights among processes, and there is one: "
            "set processes to 2 or more, or compute.parallel to 'ddp'"
        )
    if objective.energy != "implicit" and objective.backward == "double":
        raise ConfigError(
            "compute.parallel is 'fsdp2', but shared weights have no double backward: train this "
            "energy with objective.backward = 'directional', or set compute.parallel to 'ddp'"
        )
    rule = "'gradient' with compute.parallel 'fsdp2': the ablations look into the network"
    require(objective.loss == "gradient", "objective.loss", objective.loss, rule)
    weight = objective.dispersive_weight
    require(weight == 0, "objective.dispersive_weight", weight, "0 with compute.parallel 'fsdp2'")
