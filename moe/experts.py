"""Feed-forward networks: the routed experts with stacked weights, and the SwiGLU that every token passes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.backend import Backend
from ..kernels.moe_mlp import moe_layer_mlp, moe_mlp
from .dispatch import DispatchPlan, Experts


class GroupedExperts(nn.Module):
    """E independent SwiGLU networks (Shazeer, arXiv 2002.05202) with stacked weights.

    The gate and up projections are the two halves of one tensor [E, 2, F, D], so that sharding F never separates them.
    """

    def __init__(self, num_experts: int, dim: int, expert_dim: int, kernels: Backend = "auto"):
        super().__init__()
        self.kernels = kernels
        self.w13_E2FD = nn.Parameter(torch.empty(num_experts, 2, expert_dim, dim))
        self.w2_EDF = nn.Parameter(torch.empty(num_experts, dim, expert_dim))

    def forward(self, x_TD: Tensor, work: Callable[[Tensor, Experts], Tensor]) -> Tensor:
        """`work(x_TD, self)`, which calls `compute` as often as it likes.

        One forward pass whatever the pieces: what gathers sharded weights around a module's forward does so once.
        """
        return work(x_TD, self)

    def compute(self, x: Tensor, counts_E: Tensor, plan: DispatchPlan | None = None, shared_TD: Tensor | None = None) -> Tensor:
        """Rows [R, D] sorted by expert -> the experts' outputs, same shape; with a plan, tokens [T, D] -> the weighted sums of
        their experts' outputs, plus `shared_TD`."""
        if plan is None:
            return moe_mlp(x, self.w13_E2FD, self.w2_EDF, counts_E, self.kernels)
        rows = (plan.order_R, plan.row_TK, counts_E)
        weights = (self.w13_E2FD, self.w2_EDF)
        return moe_layer_mlp(x, plan.weights_TK, *rows, *weights, plan.kept_TK, shared_TD, self.kernels)


class SwiGLU(nn.Module):
    """A dense feed-forward network, also the shared experts of a layer taken as one."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w13_2FD = nn.Parameter(torch.empty(2, hidden_dim, dim))
        self.w2_DF = nn.Parameter(torch.empty(dim, hidden_dim))

    def forward(self, x_D: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        gate_F, up_F = F.linear(x_D, self.w13_2FD.flatten(0, 1)).chunk(2, dim=-1)
        return F.linear(F.silu(gate_F) * up_F, self.w2_DF)
