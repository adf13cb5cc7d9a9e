"""Expert parallelism in two levels: a token crosses to a node once, however many of its experts live there.

The rows of the flat exchange are one for each (token, expert); between nodes only the pairs (token, node) differ. So a token goes
to the rank of the same place on each node that it wants (with the list of its experts there), and that rank deals it out inside
the node. On the way back the node's rows of a token are weighted and summed first: one row returns. For K experts drawn
evenly from N nodes that is N (1 - C(E - E/N, K) / C(E, K)) rows instead of K; DeepSeek-V3 (arXiv 2412.19437, 3.2.2) sends so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.backend import Backend
from ..kernels.permute import permute, unpermute
from ..moe.dispatch import Computing, Dispatcher, DispatchPlan, Flight, Pieces, make_plan
from .collectives import exchange_blocks
from .mesh import NodeGroups
from .recorder import CommRecorder, probe_for
from .transfer import Transfer, transfers
from .wire import Wire


def first_of_node(node_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
    """bool [T, K]: the first kept choice of a token for each node that it goes to."""
    K = node_TK.shape[1]
    earlier_KK = torch.ones(K, K, dtype=torch.bool, device=node_TK.device).tril(-1)
    same_TKK = (node_TK[:, :, None] == node_TK[:, None, :]) & earlier_KK
    if kept_TK is None:
        return ~same_TKK.any(-1)
    return kept_TK & ~(same_TKK & kept_TK[:, None, :]).any(-1)


class HierarchicalDispatcher(Dispatcher):
    """Sends each token once to each node, and lets `inner` do the rest there.

    Same results as `AllToAllDispatcher` up to rounding: sums inside a node come first. Rows at an expert are ordered by (place of
    the source rank on its node, source rank, token, k).

    Args:
        groups: see `NodeGroups`.
        inner: dispatcher among the ranks of a node, for the node's experts.
        num_experts: of the layer. pieces: see `Dispatcher`. recorder, layer: where its exchanges are recorded.
        wire: how rows travel between nodes; None = as they are. The notes on them always travel exactly.
    """

    def __init__(
        self,
        groups: NodeGroups,
        inner: Dispatcher,
        num_experts: int,
        device: torch.device,
        *,
        pieces: int | Pieces = 1,
        recorder: CommRecorder | None = None,
        layer: int | None = None,
        wire: Wire | None = None,
    ):
        self.groups, self.inner, self.pieces, self.wire = groups, inner, Pieces.of(pieces), wire
        experts_of_node = groups.levels.experts(num_experts)
        self.experts_per_node = len(experts_of_node[0])
        table_2E = torch.empty(2, num_experts, dtype=torch.int64)
        # a process group orders its ranks by number, which is not the order of nodes where these interleave
        seats = {rank: seat for seat, rank in enumerate(dist.get_process_group_ranks(groups.across))}
        for ranks, experts in zip(groups.levels.inside, experts_of_node, strict=True):
            node = next(seats[rank] for rank in ranks if rank in seats)
            for place, expert in enumerate(experts):
                table_2E[:, expert] = torch.tensor([node, place])
        self.node_E, self.place_E = table_2E.to(device)
        purposes = ("counts", "dispatch", "notes", "combine")
        self.probes = {what: probe_for(recorder, "across_nodes", groups.across, what, layer) for what in purposes}

    def start(self, xs_TD: Sequence[Tensor], plans: Sequence[DispatchPlan]) -> Sequence[Flight]:
        """Exchange the counts of all units between nodes, then rows and notes on them."""
        nodes = [self.node_E[plan.indices_TK] for plan in plans]
        ups = [self._first_level(plan, node_TK) for plan, node_TK in zip(plans, nodes, strict=True)]
        counts_NP = torch.stack([up.counts_E for up in ups], 1)
        received_NP = exchange_blocks(counts_NP, self.groups.across, self.probes["counts"])
        # a host synchronisation: the transport needs the split sizes
        send_PN, receive_PN = torch.stack([counts_NP.T, received_NP.T]).tolist()
        there, back = list(zip(send_PN, receive_PN, strict=True)), list(zip(receive_PN, send_PN, strict=True))
        across, probes = self.groups.across, self.probes
        rows = transfers(self.pieces, there, across, probes["dispatch"], [plan.counts_E for plan in plans], self.wire)
        notes = transfers(self.pieces, there, across, probes["notes"])
        home = transfers(self.pieces, back, across, probes["combine"], wire=self.wire)
        ups = [up.cut(sum(send)) for up, send in zip(ups, send_PN, strict=True)]
        each = zip(xs_TD, plans, nodes, ups, rows, notes, home, strict=True)
        return [NodeFlight(self, *unit) for unit in each]

    def _first_level(self, plan: DispatchPlan, node_TK: Tensor) -> DispatchPlan:
        """The plan between nodes: choices are nodes, and a token chooses each at most once."""
        first_TK = first_of_node(node_TK, plan.kept_TK)
        return make_plan(node_TK, plan.weights_TK, len(self.groups.levels.inside), first_TK, plan.kernels)

    def notes(self, plan: DispatchPlan, up: DispatchPlan, node_TK: Tensor) -> Tensor:
        """What travels with each row [R, 2 K]: the weight of each choice on the row's node (0 for others), and the expert's place
        there + 1 (0 for others). As numbers of the weights' type, so that one exchange takes both; places are exact in it."""
        token_R, here_R = up.order_R // node_TK.shape[1], node_TK.flatten()[up.order_R]
        others_RK = node_TK.index_select(0, token_R) != here_R[:, None]
        if plan.kept_TK is not None:
            others_RK |= ~plan.kept_TK.index_select(0, token_R)
        weights_RK = permute(plan.weights_TK, up.order_R, up.row_TK, up.kept_TK, plan.kernels)
        place_TK = (self.place_E + 1).to(weights_RK.dtype)[plan.indices_TK]
        both_R2K = torch.stack([weights_RK, place_TK.index_select(0, token_R)], 1)
        return both_R2K.masked_fill(others_RK[:, None], 0).flatten(1)

    def plan_inside(self, notes_MX: Tensor, kernels: Backend) -> DispatchPlan:
        """The plan of the second level, from the notes that arrived with the rows."""
        weights_MK, place_MK = notes_MX.chunk(2, dim=1)
        place_MK = place_MK.detach().long() - 1
        return make_plan(place_MK.clamp_min(0), weights_MK, self.experts_per_node, place_MK >= 0, kernels)


class NodeFlight(Flight):
    """One row for each (token, node)."""

    def __init__(
        self,
        by: HierarchicalDispatcher,
        x_TD: Tensor,
        plan: DispatchPlan,
        node_TK: Tensor,
        up: DispatchPlan,
        rows: Transfer,
        notes: Transfer,
        home: Transfer,
    ):
        self.by, self.plan, self.up, self.rows, self.notes, self.home = by, plan, up, rows, notes, home
        rows_RD = permute(x_TD, up.order_R, up.row_TK, up.kept_TK, plan.kernels)
        self.arriving_MX = notes.start(by.notes(plan, up, node_TK))
        self.arriving_MD = rows.start(rows_RD)

    def land(self, experts: Computing) -> None:
        inside = self.by.plan_inside(self.notes.finish(self.arriving_MX), self.plan.kernels)
        [flight] = self.by.inner.start([self.rows.finish(self.arriving_MD)], [inside])
        flight.land(experts)
        self.returning_RD = self.home.start(flight.finish())

    def finish(self, shared_TD: Tensor | None = None) -> Tensor:
        back_RD, up = self.home.finish(self.returning_RD), self.up
        return unpermute(back_RD, None, up.order_R, up.row_TK, up.kept_TK, shared_TD, self.plan.kernels)
