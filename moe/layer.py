"""A Mixture-of-Experts layer: follow one token through `MoELayer.forward`, top to bottom."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .capacity import keep_within_capacity
from .compress import LSHCodec
from .config import Activation, MoEConfig
from .dispatch import Dispatcher, LocalDispatcher, make_plan
from .experts import GroupedExperts, SharedExperts
from .init import init_weights
from .load import Aux, measure_load
from .peers import NoPeers, Peers
from .router import Routing, TopKRouter


class MoELayer(nn.Module):
    """Routed experts plus shared experts (DeepSeekMoE, arXiv 2401.06066, eq. 9-11; Mixtral and others as special cases).

    Args:
        dim: width D of the tokens.
        config: see `MoEConfig`.
        activation: of the experts' gates, see `ModelConfig`.
        init: fill the weights (seed 0); False leaves them for a loader or `init_weights`.

    `dispatcher` and `peers` are where parallelism is attached from outside; alone they do nothing.
    """

    def __init__(self, dim: int, config: MoEConfig, *, activation: Activation = "silu", init: bool = True):
        super().__init__()
        self.config = config
        self.router = TopKRouter(dim, config)
        self.experts = GroupedExperts(config.num_experts, dim, config.expert_dim, config.kernels, activation)
        width = config.shared_width
        self.shared_expert = SharedExperts(dim, width, activation, config.shared_gate) if width else None
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
