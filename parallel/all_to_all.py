"""Expert parallelism by uneven all-to-all: counts first, then rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.permute import permute, unpermute
from ..moe.dispatch import Computing, Dispatcher, DispatchPlan, Flight, Pieces
from .collectives import exchange_blocks
from .recorder import CommRecorder, probe_for
from .transfer import Transfer, transfers
from .wire import Wire


class Reorder(torch.autograd.Function):
    """x[index], where `inverse` undoes `index`: a gather in both directions."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, index_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return x_RD.index_select(0, index_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return grad_RD.index_select(0, inverse_R), None, None


def by_expert(counts_NL: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Order that turns rows in blocks (source, expert) into blocks (expert, source), and its inverse; both int64 [total].

    counts_NL: rows of each block. `total` is their sum, known on the host, so that no length has to be read from the device.
    """
    start_NL = (counts_NL.flatten().cumsum(0) - counts_NL.flatten()).view(counts_NL.shape)
    lengths_B = counts_NL.T.flatten()
    shift_B = start_NL.T.flatten() - (lengths_B.cumsum(0) - lengths_B)
    here_R = torch.arange(total, device=counts_NL.device)
    index_R = here_R + torch.repeat_interleave(shift_B, lengths_B, output_size=total)
    inverse_R = torch.empty_like(index_R)
    inverse_R[index_R] = here_R
    return index_R, inverse_R


@dataclass(frozen=True)
class Splits:
    """How the rows of one unit are split: rows for each expert-parallel rank (blocks), to and from each rank of the joint group,
    and of each local expert by source [P, L]."""

    blocks: Sequence[int]
    send: Sequence[int]
    receive: Sequence[int]
    received_PL: Tensor


class AllToAllDispatcher(Dispatcher):
    """Sends rows to the ranks of their experts over the joint (ep, etp) group, in one uneven all-to-all per direction.

    Rows at an expert are ordered by (source rank, token, k). With etp > 1 every rank of an expert holds a slice of its hidden
    width: each gets a copy of the row, and the copies' partial outputs are added at the source, in rank order. That moves as many
    bytes as gathering rows inside the expert's ranks after the all-to-all (arXiv 2504.14960, section 3.3), in one step, and keeps
    the row order.

    Args:
        group: the joint group. ep, etp: its degrees. num_experts: of the layer.
        pieces: see `Dispatcher`. recorder, axis, layer: where its exchanges are recorded, with the rows of each expert if
        `counts_rows`.
        wire: how its rows travel; None = as they are.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        ep: int,
        etp: int,
        num_experts: int,
        *,
        pieces: int | Pieces = 1,
        axis: str = "ep_etp",
        counts_rows: bool = True,
        recorder: CommRecorder | None = None,
        layer: int | None = None,
        wire: Wire | None = None,
    ):
        self.group, self.ep, self.etp, self.counts_rows, self.wire = group, ep, etp, counts_rows, wire
        self.pieces = Pieces.of(pieces)
        self.local_experts = num_experts // ep
        self.probes = {what: probe_for(recorder, axis, group, what, layer) for what in ("counts", "dispatch", "combine")}

    def start(self, xs_TD: Sequence[Tensor], plans: Sequence[DispatchPlan]) -> Sequence[Flight]:
        """Exchange the counts of all units, then rows. Every rank takes part, whether or not it has rows."""
        counts = [plan.counts_E for plan in plans]
        splits = self.split(counts)
        there = [(s.send, s.receive) for s in splits]
        back = [(s.receive, s.send) for s in splits]
        away = transfers(self.pieces, there, self.group, self.probes["dispatch"], counts if self.counts_rows else None, self.wire)
        home = transfers(self.pieces, back, self.group, self.probes["combine"], wire=self.wire)
        return [RowFlight(self.etp, *each) for each in zip(xs_TD, plans, splits, away, home, strict=True)]

    def split(self, counts: Sequence[Tensor]) -> list[Splits]:
        """Tell every rank the rows of its experts, for each unit's counts [E]."""
        counts_NPL = torch.stack(list(counts)).view(-1, self.ep, 1, self.local_experts).expand(-1, -1, self.etp, -1).flatten(1, 2)
        counts_PNL = counts_NPL.transpose(0, 1).contiguous()
        received_PNL = exchange_blocks(counts_PNL, self.group, self.probes["counts"])
        # the one host synchronisation of the layer: the transport needs the split sizes
        send_NP, receive_NP = torch.stack([counts_PNL.sum(-1).T, received_PNL.sum(-1).T]).tolist()
        units = zip(send_NP, receive_NP, received_PNL.unbind(1), strict=True)
        return [Splits(send[:: self.etp], send, receive, received_PL) for send, receive, received_PL in units]


class RowFlight(Flight):
    """One row for each kept choice, sorted by expert."""

    def __init__(self, etp: int, x_TD: Tensor, plan: DispatchPlan, splits: Splits, away: Transfer, home: Transfer):
        plan = plan.cut(sum(splits.blocks))
        self.etp, self.plan, self.splits, self.away, self.home = etp, plan, splits, away, home
        rows_RD = permute(x_TD, plan.order_R, plan.row_TK, plan.kept_TK, plan.kernels)
        self.arriving_XD = away.start(self._copy_per_slice(rows_RD))

    def land(self, experts: Computing) -> None:
        received_PL = self.splits.received_PL
        index_X, inverse_X = by_expert(received_PL, sum(self.splits.receive))
        rows_XD = Reorder.apply(self.away.finish(self.arriving_XD), index_X, inverse_X)
        leaving_XD = Reorder.apply(experts.compute(rows_XD, received_PL.sum(0)), inverse_X, index_X)
        self.returning_RD = self.home.start(leaving_XD)

    def finish(self, shared_TD: Tensor | None = None) -> Tensor:
        rows_RD, p = self._sum_slices(self.home.finish(self.returning_RD)), self.plan
        return unpermute(rows_RD, p.weights_TK, p.order_R, p.row_TK, p.kept_TK, shared_TD, p.kernels)

    def _copy_per_slice(self, rows_RD: Tensor) -> Tensor:
        if self.etp == 1:
            return rows_RD
        blocks = rows_RD.split(list(self.splits.blocks))
        return torch.cat([block for block in blocks for _ in range(self.etp)])

    def _sum_slices(self, back_RD: Tensor) -> Tensor:
        etp = self.etp
        if etp == 1:
            return back_RD
        wide = torch.promote_types(back_RD.dtype, torch.float32)
        copies = back_RD.split(list(self.splits.send))
        sums = [torch.stack([c.to(wide) for c in copies[i : i + etp]]).sum(0) for i in range(0, len(copies), etp)]
        return torch.cat(sums).to(back_RD.dtype)
