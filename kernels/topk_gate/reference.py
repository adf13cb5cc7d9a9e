"""Specification of `topk_gate`: torch operations that autograd differentiates; the way on CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .rule import Gate, GateRule


def first_top_k(scores_TN: Tensor, k: int) -> Tensor:
    """Indices [T, k] of the k largest, largest first; equal ones resolve to the lowest index.

    torch.topk leaves the order of ties open, so that two back ends may route differently; a stable sort does not.
    """
    if scores_TN.device.type == "cpu":
        # several times faster than sorting, and the same wherever no two of the k + 1 best are equal; the check is free on CPU
        best = scores_TN.topk(min(k + 1, scores_TN.shape[-1]), dim=-1)
        if not (best.values[:, 1:] == best.values[:, :-1]).any():
            return best.indices[:, :k]
    return torch.sort(scores_TN, dim=-1, descending=True, stable=True).indices[:, :k]


def within_groups(ranking_TE: Tensor, rule: GateRule) -> Tensor:
    """The ranking with -inf outside each token's best groups (DeepSeek-V2, arXiv 2405.04434, 2.2.2; V3, 2412.19437, 2.1.2).

    -inf and not 0, because a biased score may be negative.
    """
    if rule.num_groups == 1:
        return ranking_TE
    ranking_TGN = ranking_TE.unflatten(-1, (rule.num_groups, -1))
    best = 1 if rule.group_score == "max" else 2
    groups_TG = first_top_k(ranking_TGN.topk(best, dim=-1).values.sum(-1), rule.top_groups)
    open_TG = torch.zeros(ranking_TGN.shape[:2], dtype=torch.bool, device=ranking_TE.device).scatter_(-1, groups_TG, True)
    return ranking_TGN.masked_fill(~open_TG[..., None], -torch.inf).flatten(-2)


def topk_gate(logits_TE: Tensor, rule: GateRule, bias_E: Tensor | None = None, valid_T: Tensor | None = None) -> Gate:
    """As the public function."""
    late, E = rule.order == "topk_softmax", logits_TE.shape[1]
    scores_TE = torch.sigmoid(logits_TE) if rule.score == "sigmoid" else torch.softmax(logits_TE, -1)
    ranking_TE = (logits_TE if late else scores_TE).detach()
    if bias_E is not None:
        ranking_TE = ranking_TE + bias_E.to(ranking_TE.dtype)
    indices_TK = first_top_k(within_groups(ranking_TE, rule), rule.top_k)
    if late:
        weights_TK = torch.softmax(logits_TE.gather(-1, indices_TK), -1)
    else:
        weights_TK = scores_TE.gather(-1, indices_TK)
        if rule.renormalize:
            # sigmoid scores may all underflow; the smallest normal number keeps the division finite
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(torch.finfo(weights_TK.dtype).tiny)
    counted_TK = indices_TK if valid_T is None else torch.where(valid_T[:, None], indices_TK, E)
    counts_E = counted_TK.new_zeros(E + 1).scatter_add_(0, counted_TK.flatten(), torch.ones_like(counted_TK).flatten())[:E]
    return Gate(indices_TK, weights_TK * rule.scaling_factor, scores_TE, torch.logsumexp(logits_TE, -1).square(), counts_E)
