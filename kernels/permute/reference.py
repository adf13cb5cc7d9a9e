"""Specification of `permute` and `unpermute`: indexing that autograd differentiates."""

from __future__ import annotations

import torch
from torch import Tensor


def permute(x_TD: Tensor, order_R: Tensor, row_TK: Tensor) -> Tensor:
    """Row r is the token of choice order_R[r]."""
    return x_TD[order_R // row_TK.shape[1]]


def unpermute(y_RD: Tensor, weights_TK: Tensor, order_R: Tensor, row_TK: Tensor, kept_TK: Tensor | None = None) -> Tensor:
    """y_TD[t] = sum over k of weights_TK[t, k] * y_RD[row_TK[t, k]], kept choices only, summed in at least fp32."""
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    y_TKD = y_RD[row_TK].to(wide)
    if kept_TK is not None:
        y_TKD = torch.where(kept_TK[..., None], y_TKD, 0.0)
        weights_TK = torch.where(kept_TK, weights_TK, 0.0)
    return (y_TKD * weights_TK[..., None].to(wide)).sum(1).to(y_RD.dtype)
