"""Feed-forward networks: the routed experts with stacked weights, and the network that every token passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.backend import Backend
from ..kernels.moe_mlp import LateGradients, act, moe_layer_mlp, moe_mlp
from .config import Activation, ModelConfig
from .dispatch import Computing, DispatchPlan, Experts


class FfnKind(NamedTuple):
    """What a feed-forward network computes: w2 (act(gate x) * (up x)) (Shazeer, arXiv 2002.05202), or without a gate
    w2 act(up x); biased: each projection has a bias."""

    activation: Activation = "silu"
    gated: bool = True
    biased: bool = False

    @staticmethod
    def of(config: ModelConfig) -> FfnKind:
        """That of all networks of a model."""
        return FfnKind(config.activation, config.ffn_gate, config.ffn_bias)

    @property
    def inner(self) -> int:
        """Projections before the activation: gate and up, or up alone."""
        return 2 if self.gated else 1


class GroupedExperts(nn.Module):
    """E independent networks with stacked weights.

    The gate and up projections are the two halves of one tensor [E, 2, F, D], so that sharding F never separates them; without a
    gate it is [E, 1, F, D]. The bias of the second projection is not here: it is the layer's, added where tokens are whole.
    """

    b13_E2F: nn.Parameter | None

    def __init__(self, num_experts: int, dim: int, expert_dim: int, kernels: Backend = "auto", kind: FfnKind | None = None):
        super().__init__()
        self.kernels, self.kind = kernels, kind or FfnKind()
        self.w13_E2FD = nn.Parameter(torch.empty(num_experts, self.kind.inner, expert_dim, dim))
        self.w2_EDF = nn.Parameter(torch.empty(num_experts, dim, expert_dim))
        biases = torch.empty(num_experts, self.kind.inner, expert_dim) if self.kind.biased else None
        self.b13_E2F = None if biases is None else nn.Parameter(biases)

    def forward(self, x_TD: Tensor, work: Callable[[Tensor, Experts], Tensor]) -> Tensor:
        """`work(x_TD, self)`, which calls `compute` as often as it likes.

        One forward pass whatever the pieces: what gathers sharded weights around a module's forward does so once.
        """
        return work(x_TD, self)

    def late(self) -> Computing:
        """These experts, for one call of `compute` on rows: in backward, the gradients of their weights are computed when
        everything is done that was made after this call, see `LateGradients`."""
        return _LateExperts(self)

    def compute(
        self,
        x: Tensor,
        counts_E: Tensor,
        plan: DispatchPlan | None = None,
        shared_TD: Tensor | None = None,
        *,
        by: _LateExperts | None = None,
    ) -> Tensor:
        """Rows [R, D] sorted by expert -> the experts' outputs, same shape; with a plan, tokens [T, D] -> the weighted sums of
        their experts' outputs, plus `shared_TD`. by: the view of these experts that is asked."""
        kernels, activation = self.kernels, self.kind.activation
        w13_E2FD, w2_EDF, biases = (self.w13_E2FD, self.w2_EDF, self.b13_E2F) if by is None else by.weights
        late = None if by is None else by.gradients
        if plan is None:
            return moe_mlp(x, w13_E2FD, w2_EDF, counts_E, kernels, activation, biases, late)
        rows = (plan.order_R, plan.row_TK, counts_E)
        weights = (w13_E2FD, w2_EDF)
        return moe_layer_mlp(x, plan.weights_TK, *rows, *weights, plan.kept_TK, shared_TD, kernels, activation, biases, late)


class _LateExperts:
    """`GroupedExperts.late`."""

    def __init__(self, experts: GroupedExperts):
        self.experts, self.gradients = experts, LateGradients()
        w13_E2FD, w2_EDF, b13_E2F = self.gradients.taken(experts.w13_E2FD, experts.w2_EDF, experts.b13_E2F)
        assert w13_E2FD is not None and w2_EDF is not None
        self.weights = (w13_E2FD, w2_EDF, b13_E2F)

    def compute(self, x: Tensor, counts_E: Tensor, plan: DispatchPlan | None = None, shared_TD: Tensor | None = None) -> Tensor:
        # by the experts' own method, around which recomputation, clocks and windows have put themselves
        return self.experts.compute(x, counts_E, plan, shared_TD, by=self)


class FeedForward(nn.Module):
    """A dense feed-forward network.

    The bias of its second projection, `b2_D`, is the block's to add: of a rank with a part of the hidden width the output is a
    part of a sum.
    """

    b13_2F: nn.Parameter | None
    b2_D: nn.Parameter | None

    def __init__(self, dim: int, hidden_dim: int, kind: FfnKind | None = None):
        super().__init__()
        self.kind = kind or FfnKind()
        self.w13_2FD = nn.Parameter(torch.empty(self.kind.inner, hidden_dim, dim))
        self.w2_DF = nn.Parameter(torch.empty(dim, hidden_dim))
        self.b13_2F = nn.Parameter(torch.empty(self.kind.inner, hidden_dim)) if self.kind.biased else None
        self.b2_D = nn.Parameter(torch.empty(dim)) if self.kind.biased else None

    def forward(self, x_D: Tensor) -> Tensor:
        """x [..., D] -> [..., D], without the second bias."""
        bias = None if self.b13_2F is None else self.b13_2F.flatten()
        gate_F, *up_F = F.linear(x_D, self.w13_2FD.flatten(0, 1), bias).chunk(self.kind.inner, dim=-1)
        hidden_F = act(gate_F, self.kind.activation)
        return F.linear(hidden_F * up_F[0] if up_F else hidden_F, self.w2_DF)


class SharedExperts(FeedForward):
    """The shared experts of a layer taken as one, where `gated` weighed by sigmoid(x . gate_D) for each token (Qwen2-MoE).

    Like the router, the gate is computed in at least fp32 from weights that are whole on every rank. So are those of the network,
    which is why its second bias is added here.
    """

    gate_D: nn.Parameter | None

    def __init__(self, dim: int, hidden_dim: int, kind: FfnKind | None = None, gated: bool = False):
        super().__init__(dim, hidden_dim, kind)
        self.gate_D = nn.Parameter(torch.empty(dim)) if gated else None

    def forward(self, x_D: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        y_D = super().forward(x_D)
        if self.b2_D is not None:
            y_D = y_D + self.b2_D
        if self.gate_D is None:
            return y_D
        wide = torch.promote_types(x_D.dtype, torch.float32)
        with torch.autocast(x_D.device.type, enabled=False):
            weight = torch.sigmoid(x_D.to(wide) @ self.gate_D.to(wide))
        return (y_D.to(wide) * weight[..., None]).to(y_D.dtype)
