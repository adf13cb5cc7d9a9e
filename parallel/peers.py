"""The ranks behind a layer's `Peers` door."""

from __future__ import annotations

import functools

import torch.distributed as dist
from torch import Tensor

from ..moe.peers import Scope, Wait
from .collectives import all_gather_dim
from .recorder import CommRecorder, launched, probe_for


class MeshPeers:
    """Sequence-parallel ranks hold the other positions of a sequence; all ranks together hold the tokens of a step.

    tp_group: ranks that split the same micro-batch along the sequence; world_group: every rank (each holds different tokens).
    layer: index of the block, for the recorder.
    """

    def __init__(
        self,
        tp_group: dist.ProcessGroup,
        world_group: dist.ProcessGroup,
        recorder: CommRecorder | None = None,
        layer: int | None = None,
    ):
        self.tp_group, self.world_group = tp_group, world_group
        self._gather = probe_for(recorder, "tp", tp_group, "capacity", layer)
        self._sum_micro = probe_for(recorder, "tp", tp_group, "balance")
        self._sum_global = probe_for(recorder, "world", world_group, "balance")

    def shard_sequence(self, x_BS: Tensor) -> Tensor:
        size = dist.get_world_size(self.tp_group)
        return x_BS if size == 1 else x_BS.chunk(size, dim=1)[dist.get_rank(self.tp_group)].contiguous()

    def gather_sequence(self, x_BS: Tensor) -> Tensor:
        if x_BS.dtype.is_floating_point or dist.get_world_size(self.tp_group) == 1:
            return all_gather_dim(x_BS.detach(), 1, self.tp_group, self._gather)
        # not every back end gathers bool
        return all_gather_dim(x_BS.long(), 1, self.tp_group, self._gather).to(x_BS.dtype)

    def start_sum(self, counts: Tensor, scope: Scope) -> Wait:
        group, probe = (self.tp_group, self._sum_micro) if scope == "micro" else (self.world_group, self._sum_global)
        if dist.get_world_size(group) == 1:
            return lambda: counts
        total = counts.clone()
        start = functools.partial(dist.all_reduce, total, group=group, async_op=True)
        done = launched(start, probe, "all_reduce", total)

        def wait() -> Tensor:
            done()
            return total

        return wait
