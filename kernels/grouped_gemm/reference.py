"""Specification of the ragged products: experts one after the other, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def source_rows(x: Tensor, order_R: Tensor | None, row_TK: Tensor | None) -> Tensor:
    """The rows in expert order: `x` itself, or for tokens the token of each choice in `order_R`."""
    return x if order_R is None or row_TK is None else x[order_R // row_TK.shape[1]]


def grouped_gemm(
    x: Tensor, w_END: Tensor, counts_E: Tensor, order_R: Tensor | None = None, row_TK: Tensor | None = None
) -> Tensor:
    """As the public function: y[r] = w[e] x[r] for the rows r of expert e."""
    x_RD = source_rows(x, order_R, row_TK)
    outputs, start = [], 0
    for e, count in enumerate(counts_E.tolist()):
        outputs.append(x_RD[start : start + count] @ w_END[e].T)
        start += count
    outputs.append(x_RD.new_zeros(x_RD.shape[0] - start, w_END.shape[1]))
    return torch.cat(outputs)


def grouped_swiglu(
    x: Tensor, w13_E2FD: Tensor, counts_E: Tensor, order_R: Tensor | None = None, row_TK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(pre_RF2, hidden_RF): the gate (pre[..., 0]) and up projections (pre[..., 1]), and silu(gate) * up."""
    pre_RF2 = grouped_gemm(x, w13_E2FD.transpose(1, 2).flatten(1, 2), counts_E, order_R, row_TK).unflatten(1, (-1, 2))
    return pre_RF2, F.silu(pre_RF2[..., 0]) * pre_RF2[..., 1]


def grouped_weight_grad(
    grad_RN: Tensor, x: Tensor, counts_E: Tensor, order_R: Tensor | None = None, row_TK: Tensor | None = None
) -> Tensor:
    """grad_w_END[e] = sum over the rows r of expert e of the outer product of grad[r] and x[r]; zeros for an empty expert."""
    x_RD = source_rows(x, order_R, row_TK)
    grads, start = [], 0
    for count in counts_E.tolist():
        grads.append(grad_RN[start : start + count].T @ x_RD[start : start + count])
        start += count
    return torch.stack(grads)
