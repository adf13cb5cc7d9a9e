"""Feed-forward networks: the routed experts with stacked weights, and the network that every token passes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.backend import Backend
from ..kernels.moe_mlp import act, moe_layer_mlp, moe_mlp
from .config import Activation
from .dispatch import DispatchPlan, Experts


class GroupedExperts(nn.Module):
    """E independent gated networks (Shazeer, arXiv 2002.05202; SwiGLU by default) with stacked weights.

    The gate and up projections are the two halves of one tensor [E, 2, F, D], so that sharding F never separates them.
    """

    def __init__(self, num_experts: int, dim: int, expert_dim: int, kernels: Backend = "auto", activation: Activation = "silu"):
        super().__init__()
        self.kernels, self.activation = kernels, activation
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
            return moe_mlp(x, self.w13_E2FD, self.w2_EDF, counts_E, self.kernels, self.activation)
        rows = (plan.order_R, plan.row_TK, counts_E)
        weights = (self.w13_E2FD, self.w2_EDF)
        return moe_layer_mlp(x, plan.weights_TK, *rows, *weights, plan.kept_TK, shared_TD, self.kernels, self.activation)


class SwiGLU(nn.Module):
    """A dense feed-forward network with a gate, by default SiLU's."""

    def __init__(self, dim: int, hidden_dim: int, activation: Activation = "silu"):
        super().__init__()
        self.activation = activation
        self.w13_2FD = nn.Parameter(torch.empty(2, hidden_dim, dim))
        self.w2_DF = nn.Parameter(torch.empty(dim, hidden_dim))

    def forward(self, x_D: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        gate_F, up_F = F.linear(x_D, self.w13_2FD.flatten(0, 1)).chunk(2, dim=-1)
        return F.linear(act(gate_F, self.activation) * up_F, self.w2_DF)


class SharedExperts(SwiGLU):
    """The shared experts of a layer taken as one, where `gated` weighed by sigmoid(x . gate_D) for each token (Qwen2-MoE).

    Like the router, the gate is computed in at least fp32 from weights that are whole on every rank.
    """

    gate_D: nn.Parameter | None

    def __init__(self, dim: int, hidden_dim: int, activation: Activation = "silu", gated: bool = False):
        super().__init__(dim, hidden_dim, activation)
        self.gate_D = nn.Parameter(torch.empty(dim)) if gated else None

    def forward(self, x_D: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        y_D = super().forward(x_D)
        if self.gate_D is None:
            return y_D
        wide = torch.promote_types(x_D.dtype, torch.float32)
        with torch.autocast(x_D.device.type, enabled=False):
            weight = torch.sigmoid(x_D.to(wide) @ self.gate_D.to(wide))
        return (y_D.to(wide) * weight[..., None]).to(y_D.dtype)
