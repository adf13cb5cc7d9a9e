"""The experts' computation as one autograd function over ragged products in Triton.

Saved for backward are the input rows and the pre-activation: 2 D + 4 F bytes per row in 16 bits. The experts' outputs and
their gradients by row are never needed: d hidden = grad W2, and the gradient of a router weight is <d hidden, hidden>, which
the kernel that forms d hidden sums over its columns (the identity is that of SonicMoE, arXiv 2512.14080).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..grouped_gemm.checks import check_inputs, check_rows
from ..grouped_gemm.launch import Plan, Weights, rows_times_weights, swiglu_grad, weight_grad
from ..grouped_gemm.tiles import Tiles
from ..grouped_gemm.triton_impl import check_dtype, plan_for, swiglu_weights, swiglu_weights_transposed
from ..permute.triton_impl import gather_sum
from ..triton_support import check_devices
from .late import Grads, LateGradients


def _forward(x: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, plan: Plan, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """(pre_RG, y_RD): the pre-activation, gate and up next to each other, and the experts' outputs by row."""
    _, D, F = w2_EDF.shape
    weights = swiglu_weights(w13_E2FD)
    pre_RG, hidden_RF = rows_times_weights(x, weights, plan, tiles.rows, tiles.swiglu, swiglu=True)
    rows = plan._replace(order_R=None)
    return pre_RG, rows_times_weights(hidden_RF, Weights(w2_EDF, D, F, F, 1), rows, tiles.rows, tiles.plain)[0]


def _backward(
    ctx: Any, grad: Tensor, x: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, pre_RG: Tensor, scale: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the rows of x, w13, w2 and `scale` by row. With `scale`, grad and x are by token."""
    plan, tiles, late = ctx.plan, ctx.tiles, ctx.late
    wanted_x, wanted_w13, wanted_w2 = (ctx.needs_input_grad[i] for i in ctx.places)
    grad_pre_RG, hidden_RF, grad_scale_R = swiglu_grad(grad, w2_EDF, pre_RG, scale, plan, tiles.rows, tiles.swiglu_grad)

    def of_w2(hidden_RF: Tensor) -> Tensor:
        return weight_grad(grad, hidden_RF, torch.empty_like(w2_EDF), plan, tiles, "" if scale is None else "a")

    def of_w13() -> Tensor:
        gather = "" if scale is None else "b"
        return weight_grad(grad_pre_RG, x, torch.empty_like(w13_E2FD), plan, tiles, gather, paired=True)

    late = late if wanted_w13 and wanted_w2 else None
    grad_w2 = of_w2(hidden_RF) if wanted_w2 and late is None else None
    held_RF = None if late is None else hidden_RF
    # freed before the next large tensor is made
    del hidden_RF
    grad_x = None
    if wanted_x:
        weights, rows = swiglu_weights_transposed(w13_E2FD), plan._replace(order_R=None)
        grad_x = rows_times_weights(grad_pre_RG, weights, rows, tiles.rows, tiles.plain)[0]
    if late is None:
        return grad_x, of_w13() if wanted_w13 else None, grad_w2, grad_scale_R

    def of_both() -> Grads:
        assert held_RF is not None
        return of_w13(), of_w2(held_RF)

    return grad_x, *late.put(of_both, (w13_E2FD, w2_EDF)), grad_scale_R


class _MoeMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        w13_E2FD: Tensor,
        w2_EDF: Tensor,
        counts_E: Tensor,
        tiles: Tiles | None,
        late: LateGradients | None,
    ) -> Tensor:
        w13_E2FD, w2_EDF = w13_E2FD.contiguous(), w2_EDF.contiguous()
        plan, tiles = plan_for(x_RD, counts_E, None, None, tiles)
        pre_RG, y_RD = _forward(x_RD, w13_E2FD, w2_EDF, plan, tiles)
        ctx.save_for_backward(x_RD, w13_E2FD, w2_EDF, pre_RG)
        ctx.plan, ctx.tiles, ctx.places, ctx.late = plan, tiles, (0, 1, 2), late
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, w13_E2FD, w2_EDF, pre_RG = ctx.saved_tensors
        grad_x, grad_w13, grad_w2, _ = _backward(ctx, grad_RD, x_RD, w13_E2FD, w2_EDF, pre_RG, None)
        return grad_x, grad_w13, grad_w2, None, None, None


class _MoeLayerMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        order_R: Tensor,
        row_TK: Tensor,
        counts_E: Tensor,
        w13_E2FD: Tensor,
        w2_EDF: Tensor,
        shared_TD: Tensor | None,
        tiles: Tiles | None,
        late: LateGradients | None,
    ) -> Tensor:
        w13_E2FD, w2_EDF, weights_TK = w13_E2FD.contiguous(), w2_EDF.contiguous(), weights_TK.contiguous()
        plan, tiles = plan_for(x_TD, counts_E, order_R, row_TK, tiles)
        pre_RG, y_RD = _forward(x_TD, w13_E2FD, w2_EDF, plan, tiles)
        ctx.save_for_backward(x_TD, weights_TK, row_TK, w13_E2FD, w2_EDF, pre_RG)
        ctx.plan, ctx.tiles, ctx.places, ctx.late = plan, tiles, (0, 5, 6), late
        return gather_sum(y_RD, row_TK, weights_TK, shared_TD=shared_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, row_TK, w13_E2FD, w2_EDF, pre_RG = ctx.saved_tensors
        grads = _backward(ctx, grad_TD, x_TD, w13_E2FD, w2_EDF, pre_RG, weights_TK)
        grad_x_RD, grad_w13, grad_w2, grad_scale_R = grads
        grad_x_TD = None if grad_x_RD is None else gather_sum(grad_x_RD, row_TK)
        assert grad_scale_R is not None
        grad_weights_TK = grad_scale_R[row_TK].to(weights_TK.dtype)
        grad_shared = grad_TD if ctx.needs_input_grad[7] else None
        return grad_x_TD, grad_weights_TK, None, None, None, grad_w13, grad_w2, grad_shared, None, None


def _check(
    op: str, x: Tensor, w13: Tensor, w2: Tensor, counts_E: Tensor, order_R: Tensor | None = None, row_TK: Tensor | None = None
) -> None:
    check_inputs(op, {"rows": x}, {"w13": w13, "w2": w2}, counts_E, order_R, row_TK)
    E, D = counts_E.numel(), x.shape[1]
    if w13.ndim != 4 or w13.shape[1] != 2 or w13.shape[3] != D or w2.shape != (E, D, w13.shape[2]):
        raise ValueError(
            f"{op}: rows {tuple(x.shape)}, w13 {tuple(w13.shape)} [E, 2, F, D], w2 {tuple(w2.shape)} [E, D, F] and "
            f"counts {tuple(counts_E.shape)} [E] do not fit each other"
        )
    check_dtype(op, x)
    check_devices(op, rows=x, counts=counts_E)


def moe_mlp(
    x_RD: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    counts_E: Tensor,
    tiles: Tiles | None = None,
    late: LateGradients | None = None,
) -> Tensor:
    """As the public function; `tiles` sets the tile sizes, None = a fixed table.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, or a dtype without a kernel.
    """
    _check("moe_mlp", x_RD, w13_E2FD, w2_EDF, counts_E)
    return _MoeMlp.apply(x_RD, w13_E2FD, w2_EDF, counts_E, tiles, late)


def moe_layer_mlp(
    x_TD: Tensor,
    weights_TK: Tensor,
    order_R: Tensor,
    row_TK: Tensor,
    counts_E: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    shared_TD: Tensor | None = None,
    tiles: Tiles | None = None,
    late: LateGradients | None = None,
) -> Tensor:
    """From tokens to tokens where all experts are local: the rows are neither copied into expert order nor saved.

    y_TD[t] = sum over k, in order and in fp32, of weights_TK[t, k] * (expert's output for token t). Choices that are not
    kept (whose rows lie beyond the counts) add nothing and get zero gradients.

    Args:
        weights_TK: router weights, any float dtype.
        order_R, row_TK, counts_E: the plan of `sort_tokens`.
        shared_TD: added before the sum is rounded; x's shape and dtype.

    Raises:
        ValueError: as `moe_mlp`.
    """
    op = "moe_layer_mlp"
    _check(op, x_TD, w13_E2FD, w2_EDF, counts_E, order_R, row_TK)
    check_rows(op, "tokens", x_TD, row_TK.shape[0])
    if weights_TK.shape != row_TK.shape or not weights_TK.is_floating_point():
        raise ValueError(
            f"{op}: weights {weights_TK.dtype} {tuple(weights_TK.shape)} and row {tuple(row_TK.shape)} do not fit each other; "
            f"need floats [T, K]"
        )
    if shared_TD is not None and (shared_TD.shape != x_TD.shape or shared_TD.dtype != x_TD.dtype):
        raise ValueError(
            f"{op}: shared {shared_TD.dtype} {tuple(shared_TD.shape)} and tokens {x_TD.dtype} {tuple(x_TD.shape)} differ"
        )
    check_devices(op, rows=x_TD, weights=weights_TK, shared=shared_TD)
    return _MoeLayerMlp.apply(x_TD, weights_TK, order_R, row_TK, counts_E, w13_E2FD, w2_EDF, shared_TD, tiles, late)
