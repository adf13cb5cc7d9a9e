"""The router: logits -> scores -> the top k experts of each token and their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.sort_tokens import count_choices
from .config import MoEConfig, RouterConfig


@dataclass(frozen=True)
class Routing:
    """Where each token goes.

    indices_TK: int64, chosen experts, best first.
    weights_TK: combine weights, in the router's dtype (fp32, or fp64 for fp64 input); differentiable.
    scores_TE: softmax or sigmoid of the logits, without bias; differentiable.
    logits_TE: differentiable.
    counts_E: int64, choices of valid tokens per expert, before any drop.
    """

    indices_TK: Tensor
    weights_TK: Tensor
    scores_TE: Tensor
    logits_TE: Tensor
    counts_E: Tensor


def first_top_k(scores_TE: Tensor, k: int) -> Tensor:
    """Indices [T, k] of the k largest scores, largest first; equal scores resolve to the lowest index.

    torch.topk leaves the order of ties open, so that two back ends may route differently; a stable sort does not.
    """
    if scores_TE.device.type == "cpu":
        # several times faster than sorting, and the same wherever no two of the k + 1 best are equal; the check is free on CPU
        best = scores_TE.topk(min(k + 1, scores_TE.shape[-1]), dim=-1)
        if not (best.values[:, 1:] == best.values[:, :-1]).any():
            return best.indices[:, :k]
    return torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[:, :k]


def mask_groups(scores_TE: Tensor, config: RouterConfig) -> Tensor:
    """Scores with -inf for experts outside a token's best groups (DeepSeek-V2, arXiv 2405.04434, 2.2.2; V3, 2412.19437, 2.1.2).

    -inf and not 0, because a biased score may be negative.
    """
    if config.num_groups == 1:
        return scores_TE
    scores_TGN = scores_TE.unflatten(-1, (config.num_groups, -1))
    if config.group_score == "max":
        group_TG = scores_TGN.amax(-1)
    else:
        group_TG = scores_TGN.topk(2, dim=-1).values.sum(-1)
    allowed_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(-1, first_top_k(group_TG, config.top_groups), True)
    return scores_TGN.masked_fill(~allowed_TG[..., None], -torch.inf).flatten(-2)


class TopKRouter(nn.Module):
    """Chooses top_k of num_experts for each token (Shazeer et al., arXiv 1701.06538; variants in `RouterConfig`)."""

    expert_bias_E: Tensor

    def __init__(self, dim: int, config: MoEConfig):
        super().__init__()
        self.config = config.router
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self.biased = config.balance.expert_bias
        self.weight_ED = nn.Parameter(torch.empty(config.num_experts, dim))
        if self.biased:
            # selection bias of loss-free balancing: fp32 always, moved by the training step, never by a gradient
            self.register_buffer("expert_bias_E", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None) -> Routing:
        """Route tokens x [T, D]; `valid_T` (bool) says which are counted, None = all."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.to(wide), self.weight_ED.to(wide))
            scores_TE = torch.sigmoid(logits_TE) if self.config.score == "sigmoid" else torch.softmax(logits_TE, -1)
            indices_TK = self.select(logits_TE.detach(), scores_TE.detach())
            weights_TK = self.weigh(logits_TE, scores_TE, indices_TK)
        counted_TK = indices_TK if valid_T is None else torch.where(valid_T[:, None], indices_TK, self.num_experts)
        counts_E = count_choices(counted_TK.flatten(), self.num_experts + 1)[: self.num_experts]
        return Routing(indices_TK, weights_TK, scores_TE, logits_TE, counts_E)

    def select(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """The chosen experts [T, K]: by score, or by logit before a late softmax, plus bias, within the best groups."""
        ranking_TE = logits_TE if self.config.order == "topk_softmax" else scores_TE
        if self.biased:
            ranking_TE = ranking_TE + self.expert_bias_E.to(ranking_TE.dtype)
        return first_top_k(mask_groups(ranking_TE, self.config), self.top_k)

    def weigh(self, logits_TE: Tensor, scores_TE: Tensor, indices_TK: Tensor) -> Tensor:
        """Combine weights [T, K] of the chosen experts; the bias never enters them."""
        if self.config.order == "topk_softmax":
            weights_TK = torch.softmax(logits_TE.gather(-1, indices_TK), -1)
        else:
            weights_TK = scores_TE.gather(-1, indices_TK)
            if self.config.renormalize:
                # sigmoid scores may all underflow; the smallest normal number keeps the division finite
                total_T1 = weights_TK.sum(-1, keepdim=True).clamp_min(torch.finfo(weights_TK.dtype).tiny)
                weights_TK = weights_TK / total_T1
        return weights_TK * self.config.scaling_factor
