"""permute and unpermute as autograd functions: gathers only, in both directions, so that reruns are bitwise equal.

Autograd's own backward of a gather is an indexed add, which is slow on CPU and uses float atomics on GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

# Rows handled at once on CPU: a block of them and its products stay in a core's cache.
BLOCK_ROWS = 256


def gather_sum(y_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None, kept_TK: Tensor | None) -> Tensor:
    """sum over the kept k, in order, of weights_TK[t, k] * y_RD[row_TK[t, k]], accumulated in at least fp32.

    Where a choice is not kept, neither its row nor its weight is used, and its row need not exist.
    """
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    if not y_RD.numel():
        return y_RD.new_zeros(row_TK.shape[0], y_RD.shape[1])
    if y_RD.device.type == "cpu":
        return _sum_of_bags(y_RD.detach().to(wide), row_TK, weights_TK, kept_TK).to(y_RD.dtype)
    out_TD = y_RD.new_zeros(row_TK.shape[0], y_RD.shape[1], dtype=wide)
    if kept_TK is not None:
        row_TK = row_TK.clamp_max(y_RD.shape[0] - 1)
        weights_TK = None if weights_TK is None else weights_TK.masked_fill(~kept_TK, 0)
    for k in range(row_TK.shape[1]):
        part_TD = y_RD.index_select(0, row_TK[:, k]).to(wide)
        if kept_TK is not None:
            # rows that did not travel hold no meaning: replace them, a product with 0 would keep their NaNs
            part_TD.masked_fill_(~kept_TK[:, k, None], 0)
        if weights_TK is None:
            out_TD += part_TD
        else:
            out_TD.addcmul_(part_TD, weights_TK[:, k, None].to(wide))
    return out_TD.to(y_RD.dtype)


def _sum_of_bags(y_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None, kept_TK: Tensor | None) -> Tensor:
    """`gather_sum` without a pass over memory for each k: a row is read once, and only if it is kept. Sums in y's dtype."""
    weights_TK = None if weights_TK is None else weights_TK.detach().to(y_RD.dtype)
    if kept_TK is None:
        return embedding_bag(row_TK, y_RD, mode="sum", per_sample_weights=weights_TK)
    lengths_T, choice_R = kept_TK.sum(1), kept_TK.flatten().nonzero().flatten()
    row_R = row_TK.flatten().index_select(0, choice_R)
    weights_R = None if weights_TK is None else weights_TK.flatten().index_select(0, choice_R)
    return embedding_bag(row_R, y_RD, lengths_T.cumsum(0) - lengths_T, mode="sum", per_sample_weights=weights_R)


def _clear_rows(grad_RD: Tensor, order_R: Tensor, kept_TK: Tensor | None) -> None:
    """Zeros in the rows of choices that are not kept, where the order has such rows."""
    if kept_TK is not None and len(order_R) == kept_TK.numel():
        grad_RD.masked_fill_(~kept_TK.flatten().index_select(0, order_R)[:, None], 0)


class Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, row_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
        ctx.save_for_backward(row_TK, kept_TK)
        return x_TD.index_select(0, order_R // row_TK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        row_TK, kept_TK = ctx.saved_tensors
        return gather_sum(grad_RD, row_TK, None, kept_TK), None, None, None


class SumRows(torch.autograd.Function):
    """The adjoint of `Permute`: a token's kept rows are summed."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, order_R: Tensor, row_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
        ctx.save_for_backward(order_R, kept_TK)
        ctx.choices = row_TK.shape[1]
        return gather_sum(y_RD, row_TK, None, kept_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        order_R, kept_TK = ctx.saved_tensors
        grad_RD = grad_TD.index_select(0, order_R // ctx.choices)
        _clear_rows(grad_RD, order_R, kept_TK)
        return grad_RD, None, None, None


class Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_TK: Tensor, order_R: Tensor, row_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
        ctx.save_for_backward(y_RD, weights_TK, order_R, kept_TK)
        return gather_sum(y_RD, row_TK, weights_TK, kept_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        y_RD, weights_TK, order_R, kept_TK = ctx.saved_tensors
        wide = torch.promote_types(y_RD.dtype, torch.float32)
        tokens_R, weights_R = order_R // weights_TK.shape[1], weights_TK.flatten().index_select(0, order_R).to(wide)
        grad_y_RD, grad_weights_R = torch.empty_like(y_RD), torch.empty_like(weights_R)
        block = BLOCK_ROWS if y_RD.device.type == "cpu" else max(1, len(order_R))
        for lo in range(0, len(order_R), block):
            rows = slice(lo, lo + block)
            grad_ND = grad_TD.index_select(0, tokens_R[rows]).to(wide)
            torch.mul(grad_ND, weights_R[rows, None], out=grad_y_RD[rows])
            torch.sum(grad_ND.mul_(y_RD[rows]), -1, out=grad_weights_R[rows])
        _clear_rows(grad_y_RD, order_R, kept_TK)
        _clear_rows(grad_weights_R[:, None], order_R, kept_TK)
        # from row order back to (token, k): a choice stands at one row at most, so that these writes never meet
        grad_weights_N = grad_weights_R.new_zeros(weights_TK.numel()).scatter_(0, order_R, grad_weights_R)
        return grad_y_RD, grad_weights_N.view(weights_TK.shape).to(weights_TK.dtype), None, None, None
