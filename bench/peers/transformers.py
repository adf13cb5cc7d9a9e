"""Hugging Face transformers: the experts of Qwen3-MoE, as a loop and by grouped matrix products."""

from __future__ import annotations

import torch
from torch import nn

from ..protocol.contender import Contender, Named, Problem, Raw, by_autograd


def eager(name: str, problem: Problem) -> Contender:
    """A loop over the experts that were hit; their number is read on the host."""
    return _experts(name, problem, "eager")


def grouped_mm(name: str, problem: Problem) -> Contender:
    """Sort, gather, torch's grouped_mm, gather back, sum over k."""
    return _experts(name, problem, "grouped_mm")


def _experts(name: str, problem: Problem, implementation: str) -> Contender:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

    shape = problem.shape
    config = Qwen3MoeConfig(hidden_size=shape.H, moe_intermediate_size=shape.F, num_experts=shape.E, num_experts_per_tok=shape.K)
    config._experts_implementation = implementation
    with torch.device("meta"):  # the weights are replaced by views of ours
        experts = Qwen3MoeExperts(config)
    x_TD, w13, w2, weights_TK = problem.leaves().values()
    experts.gate_up_proj = nn.Parameter(w13.detach().flatten(1, 2))
    experts.down_proj = nn.Parameter(w2.detach())
    # as their router returns them
    weights_TK = weights_TK.detach().to(problem.dtype).requires_grad_()
    leaves = {"dX": x_TD, "dW13": experts.gate_up_proj, "dW2": experts.down_proj, "dS": weights_TK}

    def gradients(raw: Raw) -> Named:
        named = {key: grad for key, grad in zip(leaves, raw, strict=True) if grad is not None}
        return {**named, "dW13": named["dW13"].view(problem.w13_E2FD.shape)}

    def forward() -> torch.Tensor:
        return experts(x_TD, problem.indices_TK, weights_TK)

    return by_autograd(name, forward, leaves, problem.direction_TD, gradients=gradients)
