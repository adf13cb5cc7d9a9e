"""The router: logits -> scores -> the top k experts of each token and their weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.topk_gate import GateRule, topk_gate
from .config import MoEConfig


@dataclass(frozen=True)
class Routing:
    """Where each token goes.

    indices_TK: int64, chosen experts, best first.
    weights_TK: combine weights, in the router's dtype (fp32, or fp64 for fp64 input); differentiable.
    scores_TE: softmax or sigmoid of the logits, without bias; differentiable.
    logits_TE: differentiable.
    z_T: logsumexp(logits)^2; differentiable.
    counts_E: int64, choices of valid tokens per expert, before any drop.
    """

    indices_TK: Tensor
    weights_TK: Tensor
    scores_TE: Tensor
    logits_TE: Tensor
    z_T: Tensor
    counts_E: Tensor


class TopKRouter(nn.Module):
    """Chooses top_k of num_experts for each token (Shazeer et al., arXiv 1701.06538; variants in `RouterConfig`)."""

    expert_bias_E: Tensor

    def __init__(self, dim: int, config: MoEConfig):
        super().__init__()
        self.rule = GateRule(top_k=config.top_k, **dataclasses.asdict(config.router))
        self.biased, self.kernels = config.balance.expert_bias, config.kernels
        self.weight_ED = nn.Parameter(torch.empty(config.num_experts, dim))
        if self.biased:
            # selection bias of loss-free balancing: fp32 always, moved by the training step, never by a gradient
            self.register_buffer("expert_bias_E", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None) -> Routing:
        """Route tokens x [T, D]; `valid_T` (bool) says which are counted, None = all."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.to(wide), self.weight_ED.to(wide))
            bias_E = self.expert_bias_E if self.biased else None
            gate = topk_gate(logits_TE, self.rule, bias_E, valid_T, self.kernels)
        return Routing(gate.indices_TK, gate.weights_TK, gate.scores_TE, logits_TE, gate.z_T, gate.counts_E)
