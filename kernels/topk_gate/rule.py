"""What a gate does with its logits, and what it returns: plain records that every back end shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GateRule:
    """How a token's logits become experts and weights."""

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Over the logits of all experts, or of each expert alone."""
    order: Literal["softmax_topk", "topk_softmax"] = "softmax_topk"
    """Rank scores and weigh by them; or rank logits and weigh by the softmax of the chosen ones."""
    renormalize: bool = True
    """Divide the chosen scores by their sum (`softmax_topk` only)."""
    scaling_factor: float = 1.0
    """Multiplies the weights at the end."""
    num_groups: int = 1
    """Equal groups of neighbouring experts; 1 = no group limit."""
    top_groups: int = 1
    """Best groups that a token may choose from."""
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    """Score of a group: sum of its two best experts, or its best one."""

    def check(self, num_experts: int) -> None:
        """Raise ValueError with everything that `num_experts` experts do not allow."""
        problems = []
        if self.num_groups < 1 or num_experts % self.num_groups:
            problems.append(f"{self.num_groups} groups do not divide {num_experts} experts")
        elif not 1 <= self.top_groups <= self.num_groups:
            problems.append(f"{self.top_groups} of {self.num_groups} groups cannot be chosen")
        elif not 1 <= self.top_k <= self.top_groups * num_experts // self.num_groups:
            reach = self.top_groups * num_experts // self.num_groups
            problems.append(f"top_k = {self.top_k} of {reach} experts in reach cannot be chosen")
        elif self.num_groups > 1 and self.group_score == "top2_sum" and num_experts == self.num_groups:
            problems.append("groups of one expert have no two best; use group_score = 'max'")
        if self.score not in ("softmax", "sigmoid"):
            problems.append(f"score {self.score!r} is neither 'softmax' nor 'sigmoid'")
        if self.order not in ("softmax_topk", "topk_softmax"):
            problems.append(f"order {self.order!r} is neither 'softmax_topk' nor 'topk_softmax'")
        if self.group_score not in ("top2_sum", "max"):
            problems.append(f"group_score {self.group_score!r} is neither 'top2_sum' nor 'max'")
        if self.score == "sigmoid" and self.order == "topk_softmax":
            problems.append("order 'topk_softmax' needs score 'softmax'")
        if problems:
            raise ValueError(f"topk_gate: {'; '.join(problems)}")


class Gate(NamedTuple):
    """Where each token goes. Weights, scores and z are differentiable and have the logits' dtype.

    indices_TK: int64, chosen experts, best first; equal ranks resolve to the lowest index.
    weights_TK: combine weights. The bias never enters them.
    scores_TE: softmax or sigmoid of the logits, without bias.
    z_T: logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5).
    counts_E: int64, choices of valid tokens per expert.
    """

    indices_TK: Tensor
    weights_TK: Tensor
    scores_TE: Tensor
    z_T: Tensor
    counts_E: Tensor
