"""Sums of one step over micro-batches and ranks: one all-reduce for the loss and all load statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..moe.balance import balance_value
from ..moe.load import Aux
from ..moe.stats import counts_by_domain, load_stats
from .collectives import all_reduce
from .mesh import Mesh
from .recorder import CommRecorder, probe_for


@dataclass(frozen=True)
class StepStats:
    """Figures of the global batch. Per-layer tensors are float64 or int64 on the mesh's device; None without MoE layers.

    loss: mean token loss. counts_LDE: choices per layer, domain and expert. balance_L: load-balancing loss, 1 at balance. z_L:
    mean router z. dropped_L: choices without a place. rows_sent_L: rows that travelled to experts. compress_error_L: of the
    sampled tokens, the length of the error of compression relative to that of the exact result; NaN where none was sampled.
    max_violation_micro_L: mean over micro-batches of the largest load ratio - 1. logit_max: largest |router logit|. vote:
    whether any rank wants to stop.
    """

    loss: float
    counts_LDE: Tensor | None = None
    balance_L: Tensor | None = None
    z_L: Tensor | None = None
    dropped_L: Tensor | None = None
    rows_sent_L: Tensor | None = None
    compress_error_L: Tensor | None = None
    max_violation_micro_L: Tensor | None = None
    logit_max: float = 0.0
    vote: bool = False

    @property
    def counts_LE(self) -> Tensor | None:
        return None if self.counts_LDE is None else self.counts_LDE.sum(1)


class StepSums:
    """Adds up what the micro-batches of a step report on this rank; `reduce` adds the ranks."""

    def __init__(self, mesh: Mesh, num_domains: int, recorder: CommRecorder | None = None):
        self.mesh, self.num_domains, self.recorder = mesh, num_domains, recorder
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
        single = [aux.z_B.sum(1), aux.dropped_B.sum(1), self._micro_violation(aux), aux.rows_sent, aux.error, aux.norm]
        columns = [by_domain_LDE.flatten(1), aux.probs_BE.sum(1), *(x_L[:, None] for x_L in single)]
        parts_LX = torch.cat([c.double() for c in columns], 1)
        self.layers = [parts_LX if not self.layers else self.layers[0] + parts_LX]
        self.logit_max = torch.maximum(self.logit_max, aux.logit_max.max().double())

    def _micro_violation(self, aux: Aux) -> Tensor:
        """Largest load ratio - 1 of the micro-batch [L], counted over the ranks that share it, divided so that ranks add up."""
        counts_LE = aux.counts_E
        if self.mesh.topology.tp > 1:
            probe = probe_for(self.recorder, "tp", self.mesh.tp_group, "statistics")
            counts_LE = all_reduce(counts_LE.clone(), self.mesh.tp_group, probe)
        return load_stats(counts_LE).max_violation / self.mesh.topology.world

    def reduce(self, tokens: int, vote: bool = False) -> StepStats:
        """Statistics of the step of `tokens` valid tokens. Collective."""
        # every tensor-parallel rank knows the whole loss of its sequences
        flat = [self.loss[None] / self.mesh.topology.tp, *(x.flatten() for x in self.layers)]
        packed = torch.cat(flat)
        largest = torch.stack([self.logit_max, torch.full_like(self.logit_max, float(vote))])
        if self.mesh.topology.world > 1:
            world = self.mesh.world_group
            probe = probe_for(self.recorder, "world", world, "statistics")
            all_reduce(packed, world, probe, direction="update")
            all_reduce(largest, world, probe, op=dist.ReduceOp.MAX, direction="update")
        logit_max, any_vote = largest.tolist()
        loss = float(packed[0]) / tokens
        if self.shape_LE is None:
            return StepStats(loss, vote=bool(any_vote))
        L, E = self.shape_LE
        D = self.num_domains
        counts_LX, probs_LE, *rest = packed[1:].view(L, -1).split([D * E, E, 1, 1, 1, 1, 1, 1], dim=1)
        z_L, dropped_L, violation_L, rows_L, error_L, norm_L = (column[:, 0] for column in rest)
        counts_LDE = counts_LX.round().to(torch.int64).view(L, D, E)
        return StepStats(
            loss=loss,
            counts_LDE=counts_LDE,
            balance_L=balance_value(counts_LDE.sum(1), probs_LE, tokens),
            z_L=z_L / tokens,
            dropped_L=dropped_L.round().to(torch.int64),
            rows_sent_L=rows_L.round().to(torch.int64),
            compress_error_L=(error_L / norm_L).sqrt(),
            max_violation_micro_L=violation_L / self.micros,
            logit_max=logit_max,
            vote=bool(any_vote),
        )
