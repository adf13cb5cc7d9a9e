"""The ragged products in Triton: see triton_kernels.py for how, and tiles.py for the sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..permute.triton_impl import gather_sum
from ..triton_support import check_devices, interpreting
from .checks import check_inputs, check_rows
from .launch import DTYPES, Plan, Weights, make_plan, rows_times_weights, weight_grad
from .tiles import Tiles, choose_tiles


def check_dtype(op: str, x: Tensor) -> None:
    """Raises ValueError for dtypes without a kernel; fp64 is for comparisons in the interpreter only."""
    if x.dtype not in DTYPES and not (x.dtype == torch.float64 and interpreting()):
        raise ValueError(f"{op}: {x.dtype}; the Triton kernels take {', '.join(map(str, DTYPES))}, use backend 'reference'")


def plan_for(
    x: Tensor, counts_E: Tensor, order_R: Tensor | None, row_TK: Tensor | None, tiles: Tiles | None
) -> tuple[Plan, Tiles]:
    """The tile plan of `x`'s rows in expert order (`x` holds tokens where an order is given), and the tiles it is for."""
    num_rows = x.shape[0] if order_R is None else order_R.numel()
    if num_rows >= 1 << 31:
        raise ValueError(f"{num_rows} rows: the Triton kernels number rows in 31 bits; split the batch")
    choices = 1 if row_TK is None else row_TK.shape[1]
    tiles = tiles or choose_tiles(x.dtype, num_rows, counts_E.numel())
    return make_plan(counts_E, num_rows, tiles.rows, order_R, choices), tiles


def swiglu_weights(w13_E2FD: Tensor) -> Weights:
    """The gate and up projections as one matrix per expert, whose rows 2f and 2f + 1 are gate and up of f; no copy."""
    _, _, F, D = w13_E2FD.shape
    return Weights(w13_E2FD, 2 * F, D, stride_n=D, stride_k=1, stride_half=F * D, paired_n=True)


def swiglu_weights_transposed(w13_E2FD: Tensor) -> Weights:
    """The transposes of `swiglu_weights`: from pairs back to the model's dimension."""
    _, _, F, D = w13_E2FD.shape
    return Weights(w13_E2FD, D, 2 * F, stride_n=1, stride_k=D, stride_half=F * D, paired_k=True)


def _check(
    op: str, x: Tensor, w: dict[str, Tensor], counts_E: Tensor, order_R: Tensor | None, row_TK: Tensor | None, **others: Tensor
) -> None:
    check_inputs(op, {"rows": x, **others}, w, counts_E, order_R, row_TK)
    if row_TK is not None:
        check_rows(op, "tokens", x, row_TK.shape[0])
    check_dtype(op, x)
    check_devices(op, rows=x, counts=counts_E)


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_END: Tensor, counts_E: Tensor, order_R: Tensor | None, row_TK: Tensor | None, tiles: Tiles | None
    ) -> Tensor:
        plan, tiles = plan_for(x, counts_E, order_R, row_TK, tiles)
        w_END = w_END.contiguous()
        ctx.save_for_backward(x, w_END, row_TK)
        ctx.plan, ctx.tiles = plan, tiles
        _, N, D = w_END.shape
        return rows_times_weights(x, Weights(w_END, N, D, D, 1), plan, tiles.rows, tiles.plain)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, ...]:
        x, w_END, row_TK = ctx.saved_tensors
        plan, tiles = ctx.plan, ctx.tiles
        _, N, D = w_END.shape
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            rows = plan._replace(order_R=None)
            grad_x = rows_times_weights(grad_RN, Weights(w_END, D, N, 1, D), rows, tiles.rows, tiles.plain)[0]
            grad_x = grad_x if row_TK is None else gather_sum(grad_x, row_TK)
        if ctx.needs_input_grad[1]:
            grad_w = weight_grad(grad_RN, x, torch.empty_like(w_END), plan, tiles, "" if row_TK is None else "b")
        return grad_x, grad_w, None, None, None, None


def grouped_gemm(
    x: Tensor,
    w_END: Tensor,
    counts_E: Tensor,
    order_R: Tensor | None = None,
    row_TK: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """As the public function; `tiles` sets the tile sizes, None = `choose_tiles`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, or a dtype without a kernel.
    """
    _check("grouped_gemm", x, {"weights": w_END}, counts_E, order_R, row_TK)
    if w_END.ndim != 3 or w_END.shape[2] != x.shape[1]:
        raise ValueError(f"grouped_gemm: rows {tuple(x.shape)} [R, D] and weights {tuple(w_END.shape)} [E, N, D] differ in D")
    return _GroupedGemm.apply(x, w_END, counts_E, order_R, row_TK, tiles)


def grouped_swiglu(
    x: Tensor,
    w13_E2FD: Tensor,
    counts_E: Tensor,
    order_R: Tensor | None = None,
    row_TK: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """(pre_RF2, hidden_RF) as the reference, in one launch; not differentiable, `moe_mlp` is.

    Raises:
        ValueError: as `grouped_gemm`.
    """
    _check("grouped_swiglu", x, {"w13": w13_E2FD}, counts_E, order_R, row_TK)
    if w13_E2FD.ndim != 4 or w13_E2FD.shape[1] != 2 or w13_E2FD.shape[3] != x.shape[1]:
        raise ValueError(f"grouped_swiglu: rows {tuple(x.shape)} [R, D] and w13 {tuple(w13_E2FD.shape)} [E, 2, F, D] do not fit")
    plan, tiles = plan_for(x, counts_E, order_R, row_TK, tiles)
    weights = swiglu_weights(w13_E2FD.contiguous())
    pre, hidden = rows_times_weights(x, weights, plan, tiles.rows, tiles.swiglu, swiglu=True)
    return pre.unflatten(1, (-1, 2)), hidden


def grouped_weight_grad(
    grad_RN: Tensor,
    x: Tensor,
    counts_E: Tensor,
    order_R: Tensor | None = None,
    row_TK: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """grad_w_END as the reference; not differentiable.

    Raises:
        ValueError: as `grouped_gemm`.
    """
    op = "grouped_weight_grad"
    _check(op, x, {}, counts_E, order_R, row_TK, grad=grad_RN)
    plan, tiles = plan_for(x, counts_E, order_R, row_TK, tiles)
    check_rows(op, "grad", grad_RN, plan.num_rows)
    out = x.new_empty(counts_E.numel(), grad_RN.shape[1], x.shape[1])
    return weight_grad(grad_RN, x, out, plan, tiles, "" if row_TK is None else "b")
