"""Rank functions with a mistake in them; a module of its own, because ranks that start afresh import it by name."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist

from moefold.launch import checkpoint, parity
from moefold.parallel import parity as machinery
from moefold.parallel.parity import RecordingEngine


class DoubledExperts(RecordingEngine):
    """Expert gradients come out twice as large, as where a mean is taken for a sum."""

    def _forward_backward(self, *args: Any) -> None:
        super()._forward_backward(*args)
        for p in self.parameters:
            if p.placement.kind == "expert" and p.local_grad is not None:
                p.local_grad.mul_(2)


def doubled_experts(rank: int, world: int, *args: Any) -> parity.RankResult:
    machinery.RecordingEngine = DoubledExperts  # type: ignore[misc]  # this process ends with the case
    return parity.on_rank(rank, world, *args)


def stale_checkpoint(rank: int, world: int, *args: Any) -> parity.RankResult:
    """Loading changes nothing."""
    checkpoint.Checkpointer.load = lambda *args, **settings: None  # type: ignore[assignment, method-assign, return-value]
    return parity.on_rank(rank, world, *args)


def fails_on_one(rank: int, world: int) -> int:
    if rank == 1:
        raise ValueError("no such luck")
    return rank


def dies_on_one(rank: int, world: int) -> int:
    if rank == 1:
        os._exit(3)
    return rank


def hangs_on_one(rank: int, world: int) -> int:
    if rank == 1:
        time.sleep(100)
    return rank


def sum_of_ranks(rank: int, world: int, factor: int) -> int:
    total = torch.tensor(rank * factor)
    dist.all_reduce(total)
    return int(total)
