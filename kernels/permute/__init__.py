"""Copy tokens into expert order, and sum experts' rows back into token order."""

from __future__ import annotations

from torch import Tensor

from .torch_impl import Permute, Unpermute


def permute(x_TD: Tensor, order_R: Tensor, row_TK: Tensor, kept_TK: Tensor | None = None) -> Tensor:
    """Tokens in expert order: x_RD[r] = x_TD[token of order_R[r]].

    Args:
        x_TD: tokens.
        order_R, row_TK: the plan of `sort_tokens`.
        kept_TK: bool; choices that do not travel pass no gradient back. Their rows (the last ones) hold the token all the same.

    Returns:
        x_RD with R = T * K.
    """
    return Permute.apply(x_TD, order_R, row_TK, kept_TK)


def unpermute(y_RD: Tensor, weights_TK: Tensor, order_R: Tensor, row_TK: Tensor, kept_TK: Tensor | None = None) -> Tensor:
    """Weighted sum of a token's rows: y_TD[t] = sum over k of weights_TK[t, k] * y_RD[row_TK[t, k]].

    Summed in the order of k in at least fp32, so that reruns are bitwise equal. Choices that are not kept add nothing,
    whatever their rows hold.
    """
    return Unpermute.apply(y_RD, weights_TK, order_R, row_TK, kept_TK)


__all__ = ["permute", "unpermute"]
