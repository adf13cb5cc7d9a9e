"""A Mixture-of-Experts layer: follow one token through `MoELayer.forward`, top to bottom."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .capacity import keep_within_capacity
from .compress import LSHCodec
from .config import MoEConfig
from .dispatch import Dispatcher, DispatchPlan, LocalDispatcher, make_plan
from .experts import FfnKind, GroupedExperts, SharedExperts
from .init import init_weights
from .load import Aux, measure_load
from .peers import NoPeers, Peers
from .router import Routing, TopKRouter


class MoELayer(nn.Module):
    """Routed experts plus shared experts (DeepSeekMoE, arXiv 2401.06066, eq. 9-11; Mixtral and others as special cases).

    Args:
        dim: width D of the tokens.
        config: see `MoEConfig`.
        kind: of network that experts are; None = SwiGLU.
        init: fill the weights (seed 0); False leaves them for a loader or `init_weights`.

    `dispatcher` and `peers` are where parallelism is attached from outside; alone they do nothing.
    """

    b2_ED: nn.Parameter | None
    """Biases of the experts' second projections, whole on every rank like the router: they are added where tokens are at home, so
    that neither the parts of a sum, as hidden widths are split, nor rows that stand for several tokens have them."""

    def __init__(self, dim: int, config: MoEConfig, *, kind: FfnKind | None = None, init: bool = True):
        super().__init__()
        self.config = config
        kind = kind or FfnKind()
        self.router = TopKRouter(dim, config)
        self.experts = GroupedExperts(config.num_experts, dim, config.expert_dim, config.kernels, kind)
        self.b2_ED = nn.Parameter(torch.empty(config.num_experts, dim)) if kind.biased else None
        width = config.shared_width
        self.shared_expert = SharedExperts(dim, width, kind, config.shared_gate) if width else None
        self.codec = LSHCodec(dim, config) if config.compress.method == "lsh" else None
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.peers: Peers = NoPeers()
        if init:
            init_weights(self, seed=0)

    def forward(self, x_BSD: Tensor, valid_BS: Tensor | None = None) -> tuple[Tensor, Aux]:
        """Send each token to its experts and sum what they return.

        Args:
            x_BSD: tokens; with sequence parallelism, this rank's positions.
            valid_BS: bool, False for padding: it is not routed (its output is that of the shared experts), not counted, and takes
                no capacity. None = all valid.

        Returns:
            y_BSD, and `Aux` with losses, counts and the routing.
        """
        B, S, D = x_BSD.shape
        x_TD = x_BSD.reshape(B * S, D)
        valid_T = None if valid_BS is None else valid_BS.reshape(B * S)

        routing = self.router(x_TD, valid_T)
        kept_TK = self.keep(routing, valid_BS, B)
        plan = make_plan(routing.indices_TK, routing.weights_TK, self.config.num_experts, kept_TK, self.config.kernels)
        # to the experts, which see rows in the order of the plan, and back as one row per token
        if self.codec is None:
            y_TD, sent = self.dispatcher(x_TD, plan, self.experts, self.shared_expert), None
        else:
            y_TD, sent = self.codec(self.dispatcher, x_TD, plan, self.experts, self.shared_expert)
        if self.b2_ED is not None:
            y_TD = y_TD + weighted_rows(self.b2_ED, plan).to(y_TD.dtype)
        return y_TD.view(B, S, D), measure_load(routing, valid_BS, kept_TK, B, sent)

    def keep(self, routing: Routing, valid_BS: Tensor | None, batch: int) -> Tensor | None:
        """Choices that travel, bool [T, K]: those of valid tokens within capacity. None = all, without a mask to apply."""
        K = self.config.top_k
        if self.config.capacity_factor is None:
            return None if valid_BS is None else valid_BS.reshape(-1, 1).expand(-1, K)
        indices_BSK, weights_BSK = routing.indices_TK.view(batch, -1, K), routing.weights_TK.detach().view(batch, -1, K)
        if valid_BS is None:
            valid_BS = torch.ones(indices_BSK.shape[:2], dtype=torch.bool, device=indices_BSK.device)
        # capacity is a matter of whole sequences: with sequence parallelism every rank decides for all positions, alike
        everywhere = self.peers.gather_sequence
        kept_BSK = keep_within_capacity(everywhere(indices_BSK), everywhere(weights_BSK), everywhere(valid_BS), self.config)
        return self.peers.shard_sequence(kept_BSK).reshape(-1, K)


def weighted_rows(rows_ED: Tensor, plan: DispatchPlan) -> Tensor:
    """y_TD[t] = sum over the kept choices k of weights_TK[t, k] * rows_ED[indices_TK[t, k]], in at least fp32. Differentiable.

    A product with the weights of all experts, most of them 0: as dear as the router, and in one order whatever the machine.
    """
    weights_TK = plan.weights_TK if plan.kept_TK is None else plan.weights_TK * plan.kept_TK
    wide = torch.promote_types(weights_TK.dtype, torch.float32)
    with torch.autocast(rows_ED.device.type, enabled=False):
        weights_TE = weights_TK.new_zeros(weights_TK.shape[0], rows_ED.shape[0], dtype=wide)
        return weights_TE.scatter(1, plan.indices_TK, weights_TK.to(wide)) @ rows_ED.to(wide)
