"""moe_mlp on torch.nn.functional.grouped_mm: no host synchronisation; bf16 (fp16 and fp32 where torch supports them)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import Activation, act


def zero_tail(x_RN: Tensor, end: Tensor) -> Tensor:
    """A copy with zeros from row `end` (a tensor) on; row-major, because grouped_mm takes no other strides."""
    return x_RN.contiguous().masked_fill((torch.arange(x_RN.shape[0], device=x_RN.device) >= end)[:, None], 0)


class _ZeroTail(torch.autograd.Function):
    """`zero_tail` in both directions: grouped_mm leaves these rows uninitialised."""

    @staticmethod
    def forward(ctx: Any, x_RN: Tensor, end: Tensor) -> Tensor:
        ctx.save_for_backward(end)
        return zero_tail(x_RN, end)

    @staticmethod
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor, None]:
        (end,) = ctx.saved_tensors
        return zero_tail(grad_RN, end), None


def moe_mlp(
    x_RD: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    counts_E: Tensor,
    activation: Activation = "silu",
    b13_E2F: Tensor | None = None,
) -> Tensor:
    """As the public function, on grouped matrix products."""
    ends_E = counts_E.cumsum(0).to(torch.int32)
    x_RD = _ZeroTail.apply(x_RD, ends_E[-1])
    pre_RG = F.grouped_mm(x_RD, w13_E2FD.contiguous().flatten(1, 2).transpose(1, 2), offs=ends_E)
    if b13_E2F is not None:
        rows_R = torch.arange(x_RD.shape[0], device=x_RD.device, dtype=torch.int32)
        # before the tail is cut off, so that the biases get no gradient of it
        expert_R = torch.searchsorted(ends_E, rows_R, right=True).clamp(max=ends_E.numel() - 1)
        pre_RG = pre_RG + F.embedding(expert_R, b13_E2F.flatten(1)).to(pre_RG.dtype)
    pre_RG = _ZeroTail.apply(pre_RG, ends_E[-1])
    gate_RF, *up_RF = pre_RG.chunk(w13_E2FD.shape[1], dim=-1)
    hidden_RF = act(gate_RF, activation)
    hidden_RF = hidden_RF * up_RF[0] if up_RF else hidden_RF
    y_RD = F.grouped_mm(hidden_RF, w2_EDF.contiguous().transpose(1, 2), offs=ends_E)
    return _ZeroTail.apply(y_RD, ends_E[-1])
