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
    if kept_TK is None:
        y_TKD = y_RD[row_TK].to(wide)
    else:
        # the others may have no row
        zeros_TKD = y_RD.new_zeros(*row_TK.shape, y_RD.shape[1], dtype=wide)
        y_TKD = zeros_TKD.index_put((kept_TK,), y_RD[row_TK[kept_TK]].to(wide))
        weights_TK = torch.where(kept_TK, weights_TK, 0.0)
    return (y_TKD * weights_TK[..., None].to(wide)).sum(1).to(y_RD.dtype)
