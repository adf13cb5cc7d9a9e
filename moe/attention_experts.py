"""Attention experts: several attention blocks of one layer, mixed for each token by a router over all of them."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention
from .config import ModelConfig


class AttentionRouter(nn.Module):
    """The softmax of a linear map over all attention experts, computed in at least fp32."""

    def __init__(self, dim: int, experts: int):
        super().__init__()
        self.weight_ND = nn.Parameter(torch.empty(experts, dim))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """x [B, S, D] -> weights [B, S, N] that sum to 1, in at least fp32."""
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        with torch.autocast(x_BSD.device.type, enabled=False):
            return F.linear(x_BSD.to(wide), self.weight_ND.to(wide)).softmax(-1)


class AttentionExperts(Attention):
    """N attention blocks that all see every token; their outputs, and output biases, are summed with the router's weights (soft
    routing: BAM, Zhang et al., arXiv 2408.08274, here before the feed-forward network as in other models, not beside it).

    With `attention_expert_kv = "own"` a member is an attention of its own; with "shared" the keys and values of this module serve
    the queries of all. Router and output biases are whole on ranks that hold some of the heads.
    """

    def __init__(self, config: ModelConfig):
        shared = config.attention_expert_kv == "shared"
        super().__init__(config, holds="kv" if shared else "")
        self.shared = shared
        self.router = AttentionRouter(config.dim, config.attention_experts)
        held = "qo" if shared else "qkvo"
        self.members = nn.ModuleList(Attention(config, held) for _ in range(config.attention_experts))

    @property
    def experts(self) -> list[Attention]:
        """The members, typed."""
        return cast(list[Attention], list(self.members))

    def forward(self, x_BSD: Tensor, document_BS: Tensor | None = None) -> Tensor:
        """x [B, S, D] -> [B, S, D] without output biases; `document_BS` (ids) keeps attention inside each document."""
        at, weights_BSN = self.positions(x_BSD, document_BS), self.router(x_BSD)
        common = self.keys_values(x_BSD, at) if self.shared else None
        outputs = (e.attend(x_BSD, *(common or e.keys_values(x_BSD, at)), at) for e in self.experts)
        # weights are wide, and so is the sum
        mixed = sum(weight * y_BSD for weight, y_BSD in zip(weights_BSN.split(1, dim=-1), outputs, strict=True))
        return cast(Tensor, mixed).to(x_BSD.dtype)

    def output_bias(self, x_BSD: Tensor) -> Tensor | None:
        """The members' biases with the weights of each token of x [B, S, D]; None where they have none."""
        biases: list[Tensor] = [e.bo_D for e in self.experts if e.bo_D is not None]
        if not biases:
            return None
        weights_BSN = self.router(x_BSD)
        return (weights_BSN @ torch.stack(biases).to(weights_BSN.dtype)).to(x_BSD.dtype)


def make_attention(config: ModelConfig) -> Attention:
    """The attention of one layer: a plain one, or several experts."""
    return Attention(config) if config.attention_experts == 1 else AttentionExperts(config)
