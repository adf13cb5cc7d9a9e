"""Expert parallelism by uneven all-to-all: counts first, then rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..moe.dispatch import Dispatched, RowDispatcher
from .collectives import ExchangeRows


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
class AllToAllState:
    """How the rows of one dispatch travelled; `combine` goes the same way back.

    rows: rows given to dispatch. blocks: rows for each expert-parallel rank. send, receive: rows to and from each rank of the
    joint group. index_X, inverse_X: order of the received rows by expert, and its inverse.
    """

    rows: int
    blocks: Sequence[int]
    send: Sequence[int]
    receive: Sequence[int]
    index_X: Tensor
    inverse_X: Tensor


class AllToAllDispatcher(RowDispatcher):
    """Sends rows to the ranks of their experts over the joint (ep, etp) group, in one uneven all-to-all per direction.

    With etp > 1 every rank of an expert holds a slice of its hidden width: each gets a copy of the row, and the copies' partial
    outputs are added at the source, in rank order. That moves as many bytes as gathering rows inside the expert's ranks after the
    all-to-all (arXiv 2504.14960, section 3.3), in one step, and keeps the row order (source rank, token, k).
    """

    def __init__(self, group: dist.ProcessGroup, ep: int, etp: int, num_experts: int):
        self.group, self.ep, self.etp = group, ep, etp
        self.local_experts = num_experts // ep

    def dispatch(self, rows_RD: Tensor, counts_E: Tensor) -> Dispatched:
        """Exchange counts, then rows. Every rank takes part, whether or not it has rows."""
        counts_PL = counts_E.view(self.ep, 1, -1).expand(-1, self.etp, -1).reshape(self.ep * self.etp, self.local_experts)
        counts_PL = counts_PL.contiguous()  # with one expert-parallel rank the copies are a view without strides
        received_PL = torch.empty_like(counts_PL)
        dist.all_to_all_single(received_PL, counts_PL, group=self.group)
        # the one host synchronisation of the layer: the transport needs the split sizes
        send, receive = torch.stack([counts_PL.sum(-1), received_PL.sum(-1)]).tolist()
        index_X, inverse_X = by_expert(received_PL, sum(receive))
        state = AllToAllState(rows_RD.shape[0], send[:: self.etp], send, receive, index_X, inverse_X)
        arrived_XD = ExchangeRows.apply(self._copy_per_slice(rows_RD, state), send, receive, self.group)
        return Dispatched(Reorder.apply(arrived_XD, index_X, inverse_X), received_PL.sum(0), state)

    def combine(self, rows_XD: Tensor, dispatched: Dispatched) -> Tensor:
        """Send the experts' outputs back to where the rows came from."""
        state = dispatched.state
        assert isinstance(state, AllToAllState)
        leaving_XD = Reorder.apply(rows_XD, state.inverse_X, state.index_X)
        back_RD = ExchangeRows.apply(leaving_XD, state.receive, state.send, self.group)
        rows_RD = self._sum_slices(back_RD, state)
        missing = state.rows - rows_RD.shape[0]
        return torch.cat([rows_RD, rows_RD.new_zeros(missing, rows_RD.shape[1])]) if missing else rows_RD

    def _copy_per_slice(self, rows_RD: Tensor, state: AllToAllState) -> Tensor:
        if self.etp == 1:
            return rows_RD
        blocks = rows_RD[: sum(state.blocks)].split(list(state.blocks))
        return torch.cat([block for block in blocks for _ in range(self.etp)])

    def _sum_slices(self, back_RD: Tensor, state: AllToAllState) -> Tensor:
        if self.etp == 1:
            return back_RD
        wide = torch.promote_types(back_RD.dtype, torch.float32)
        copies = back_RD.split(list(state.send))
        sums = [torch.stack([c.to(wide) for c in copies[i : i + self.etp]]).sum(0) for i in range(0, len(copies), self.etp)]
        return torch.cat(sums).to(back_RD.dtype)
