"""moe_mlp on torch.nn.functional.grouped_mm: no host synchronisation; bf16 (fp16 and fp32 where torch supports them)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _ZeroTail(torch.autograd.Function):
    """Zero rows from `end` on, in both directions: grouped_mm leaves them uninitialised."""

    @staticmethod
    def forward(ctx: Any, x_RN: Tensor, end: Tensor) -> Tensor:
        ctx.save_for_backward(end)
        return x_RN.masked_fill((torch.arange(x_RN.shape[0], device=x_RN.device) >= end)[:, None], 0)

    @staticmethod
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor, None]:
        (end,) = ctx.saved_tensors
        return grad_RN.masked_fill((torch.arange(grad_RN.shape[0], device=grad_RN.device) >= end)[:, None], 0), None


def moe_mlp(x_RD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """As the public function, on grouped matrix products."""
    ends_E = counts_E.cumsum(0).to(torch.int32)
    x_RD = _ZeroTail.apply(x_RD, ends_E[-1])
    pre_RG = F.grouped_mm(x_RD, w13_E2FD.flatten(1, 2).transpose(1, 2), offs=ends_E)
    pre_RG = _ZeroTail.apply(pre_RG, ends_E[-1])
    gate_RF, up_RF = pre_RG.chunk(2, dim=-1)
    y_RD = F.grouped_mm(F.silu(gate_RF) * up_RF, w2_EDF.transpose(1, 2), offs=ends_E)
    return _ZeroTail.apply(y_RD, ends_E[-1])
