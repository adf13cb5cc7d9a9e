"""The ranks behind a layer's `Peers` door."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from ..moe.peers import Scope, Wait
from .collectives import all_gather_dim


class MeshPeers:
    """Sequence-parallel ranks hold the other positions of a sequence; all ranks together hold the tokens of a step.

    tp_group: ranks that split the same micro-batch along the sequence; world_group: every rank (each holds different tokens).
    """

    def __init__(self, tp_group: dist.ProcessGroup, world_group: dist.ProcessGroup):
        self.tp_group, self.world_group = tp_group, world_group

    def shard_sequence(self, x_BS: Tensor) -> Tensor:
        size = dist.get_world_size(self.tp_group)
        return x_BS if size == 1 else x_BS.chunk(size, dim=1)[dist.get_rank(self.tp_group)].contiguous()

    def gather_sequence(self, x_BS: Tensor) -> Tensor:
        if x_BS.dtype.is_floating_point or dist.get_world_size(self.tp_group) == 1:
            return all_gather_dim(x_BS.detach(), 1, self.tp_group)
        # not every back end gathers bool
        return all_gather_dim(x_BS.long(), 1, self.tp_group).to(x_BS.dtype)

    def start_sum(self, counts: Tensor, scope: Scope) -> Wait:
        group = self.tp_group if scope == "micro" else self.world_group
        if dist.get_world_size(group) == 1:
            return lambda: counts
        total = counts.clone()
        work = dist.all_reduce(total, group=group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return total

        return wait
