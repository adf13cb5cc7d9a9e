"""Copy tokens into expert order, and sum experts' rows back into token order."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Backend, choose
from .torch_impl import Permute, SumRows, Unpermute


def permute(x_TD: Tensor, order_R: Tensor, row_TK: Tensor, kept_TK: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """Tokens in expert order: x_RD[r] = x_TD[token of order_R[r]].

    Args:
        x_TD: tokens.
        order_R, row_TK: the plan of `sort_tokens`. Who knows on the host how many choices are kept may cut order_R behind them.
        kept_TK: bool; choices that do not travel pass no gradient back. Their rows, the last ones where order_R has them, hold
            the token all the same.
        backend: "torch", or "triton" for CUDA tensors; "auto" as `backend.rule` says.

    Returns:
        x_RD with as many rows as order_R: R = T * K, or the kept ones.
    """
    if choose("permute", backend, x_TD) == "triton":
        from . import triton_impl

        return triton_impl.permute(x_TD, order_R, row_TK, kept_TK)
    return Permute.apply(x_TD, order_R, row_TK, kept_TK)


def unpermute(
    y_RD: Tensor,
    weights_TK: Tensor | None,
    order_R: Tensor,
    row_TK: Tensor,
    kept_TK: Tensor | None = None,
    shared_TD: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Weighted sum of a token's rows: y_TD[t] = sum over k of weights_TK[t, k] * y_RD[row_TK[t, k]].

    Summed in the order of k in at least fp32, so that reruns are bitwise equal. Choices that are not kept add nothing,
    whatever their rows hold, or without rows where `order_R` was cut (see `permute`); y has as many rows as it. Without weights
    the rows are summed as they are. `shared_TD` (the shared experts' output, or a residual, in y's dtype) is added at the end; in
    Triton before the sum is rounded, and without another pass over memory. `backend`: as for `permute`.
    """
    if choose("unpermute", backend, y_RD) == "triton":
        from . import triton_impl

        weights_TK = y_RD.new_ones(row_TK.shape, dtype=torch.float32) if weights_TK is None else weights_TK
        return triton_impl.unpermute(y_RD, weights_TK, order_R, row_TK, kept_TK, shared_TD=shared_TD)
    if weights_TK is None:
        y_TD = SumRows.apply(y_RD, order_R, row_TK, kept_TK)
    else:
        y_TD = Unpermute.apply(y_RD, weights_TK, order_R, row_TK, kept_TK)
    return y_TD if shared_TD is None else y_TD + shared_TD


__all__ = ["Backend", "permute", "unpermute"]
