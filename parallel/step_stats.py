"""Sums of one step over micro-batches and ranks: one all-reduce for the loss and all load statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..moe.balance import balance_value
from ..moe.load import Aux
from ..moe.stats import counts_by_domain, load_stats
from .mesh import Mesh


@dataclass(frozen=True)
class StepStats:
    """Figures of the global batch. Per-layer tensors are float64 or int64 on the mesh's device; None without MoE layers.

    loss: mean token loss. counts_LDE: choices per layer, domain and expert. balance_L: load-balancing loss, 1 at balance. z_L:
    mean
    router z. dropped_L: choices without a place. max_violation_micro_L: mean over micro-batches of the largest load ratio - 1.
    logit_max: largest |router logit|. vote: whether any rank wants to stop.
    """

    loss: float
    counts_LDE: Tensor | None = None
    balance_L: Tensor | None = None
    z_L: Tensor | None = None
    dropped_L: Tensor | None = None
    max_violation_micro_L: Tensor | None = None
    logit_max: float = 0.0
    vote: bool = False

    @property
    def counts_LE(self) -> Tensor | None:
        return None if self.counts_LDE is None else self.counts_LDE.sum(1)


class StepSums:
    """Adds up what the micro-batches of a step report on this rank; `reduce` adds the ranks."""

    def __init__(self, mesh: Mesh, num_domains: int):
        self.mesh, self.num_domains = mesh, num_domains
        self.loss = torch.zeros((), dtype=torch.float64, device=mesh.device)
        self.layers: list[Tensor] = []
        self.logit_max = torch.zeros((), dtype=torch.float64, device=mesh.device)
        self.micros = 0
        self.shape_LE: tuple[int, int] | None = None

    @torch.no_grad()
    def add(self, loss_sum: Tensor, aux: Aux | None, domain_B: Tensor | None) -> None:
        """Add one micro-batch; with sequence parallelism `aux` covers this rank's positions."""
        self.loss += loss_sum
        self.micros += 1
        if aux is None:
            return
        L, B, E = aux.counts_BE.shape
        self.shape_LE = (L, E)
        domain_B = torch.zeros(B, dtype=torch.int64, device=aux.counts_BE.device) if domain_B is None else domain_B
        by_domain_LDE = counts_by_domain(aux.counts_BE, domain_B, self.num_domains)
        columns = [by_domain_LDE.flatten(1), aux.probs_BE.sum(1), aux.z_B.sum(1)[:, None], aux.dropped_B.sum(1)[:, None]]
        parts_LX = torch.cat([c.double() for c in columns] + [self._micro_violation(aux)[:, None]], 1)
        self.layers = [parts_LX if not self.layers else self.layers[0] + parts_LX]
        self.logit_max = torch.maximum(self.logit_max, aux.logit_max.max().double())

    def _micro_violation(self, aux: Aux) -> Tensor:
        """Largest load ratio - 1 of the micro-batch [L], counted over the ranks that share it, divided so that ranks add up."""
        counts_LE = aux.counts_E
        if self.mesh.topology.tp > 1:
            counts_LE = counts_LE.clone()
            dist.all_reduce(counts_LE, group=self.mesh.tp_group)
        return load_stats(counts_LE).max_violation / self.mesh.topology.world

    def reduce(self, tokens: int, vote: bool = False) -> StepStats:
        """Statistics of the step of `tokens` valid tokens. Collective."""
        # every tensor-parallel rank knows the whole loss of its sequences
        flat = [self.loss[None] / self.mesh.topology.tp, *(x.flatten() for x in self.layers)]
        packed = torch.cat(flat)
        largest = torch.stack([self.logit_max, torch.full_like(self.logit_max, float(vote))])
        if self.mesh.topology.world > 1:
            dist.all_reduce(packed, group=self.mesh.world_group)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.mesh.world_group)
        logit_max, any_vote = largest.tolist()
        loss = float(packed[0]) / tokens
        if self.shape_LE is None:
            return StepStats(loss, vote=bool(any_vote))
        L, E = self.shape_LE
        D = self.num_domains
        columns = packed[1:].view(L, -1).split([D * E, E, 1, 1, 1], dim=1)
        counts_LDE = columns[0].round().to(torch.int64).view(L, D, E)
        return StepStats(
            loss=loss,
            counts_LDE=counts_LDE,
            balance_L=balance_value(counts_LDE.sum(1), columns[1], tokens),
            z_L=columns[2][:, 0] / tokens,
            dropped_L=columns[3][:, 0].round().to(torch.int64),
            max_violation_micro_L=columns[4][:, 0] / self.micros,
            logit_max=logit_max,
            vote=bool(any_vote),
        )
