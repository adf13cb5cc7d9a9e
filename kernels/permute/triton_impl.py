"""permute and unpermute in Triton: gathers only, in both directions; many rows per program; sums in fixed order of k.

Every kernel walks its rows' columns in steps, so that one compiled kernel serves every width. Rows are int64 wherever they
are multiplied by a stride: R * D passes 2^31 at real sizes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..triton_support import cdiv, check_devices, next_power_of_2, row_major, wide_dtype

Tile = tuple[int, int]
"""Rows and columns of one step of a program, both powers of two."""


def choose_tile(width: int, element_bytes: int) -> Tile:
    """16 KiB per step: with 256 threads, four loads of 16 bytes are in flight in each, which is what hides HBM's latency.

    Columns first, up to 2 KiB of a row, since neighbouring rows of a gather lie apart in memory.
    """
    columns = min(next_power_of_2(width), 2048 // element_bytes)
    return max(1, 16384 // element_bytes // columns), columns


@triton.jit
def _gather_rows(  # type: ignore[no-untyped-def]
    x, order, out, R, D, stride_x, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[r] = x[order[r] // K]: a copy, so that no value changes its bits."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.load(order + r, mask=r < R, other=0) // K
    for first in range(0, D, COLUMNS):
        d = first + tl.arange(0, COLUMNS)
        inside = (r < R)[:, None] & (d < D)[None, :]
        values = tl.load(x + token[:, None] * stride_x + d[None, :], mask=inside)
        tl.store(out + r[:, None] * D + d[None, :], values, mask=inside)


@triton.jit
def _gather_sum(  # type: ignore[no-untyped-def]
    y, row, weights, kept, residual, shared, out, T, D, stride_y, stride_residual, stride_shared,
    K: tl.constexpr, WEIGHTED: tl.constexpr, HAS_KEPT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_SHARED: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k of weights[t, k] * y[row[t, k]], then + shared[t] + residual[t]; all sums in WIDE."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for first in range(0, D, COLUMNS):
        d = first + tl.arange(0, COLUMNS)
        inside = (t < T)[:, None] & (d < D)[None, :]
        total = tl.zeros((ROWS, COLUMNS), WIDE)
        # unrolled: the loads of all k are issued before the first sum waits for one
        for k in tl.static_range(K):
            here = t < T
            if HAS_KEPT:
                # a row that did not travel holds no meaning: it is not read, a product with 0 would keep its NaN
                here = here & (tl.load(kept + t * K + k, mask=here, other=0) != 0)
            r = tl.load(row + t * K + k, mask=here, other=0)
            part = tl.load(y + r[:, None] * stride_y + d[None, :], mask=here[:, None] & inside, other=0).to(WIDE)
            if WEIGHTED:
                part *= tl.load(weights + t * K + k, mask=here, other=0).to(WIDE)[:, None]
            total += part
        if HAS_SHARED:
            total += tl.load(shared + t[:, None] * stride_shared + d[None, :], mask=inside, other=0).to(WIDE)
        if HAS_RESIDUAL:
            total += tl.load(residual + t[:, None] * stride_residual + d[None, :], mask=inside, other=0).to(WIDE)
        tl.store(out + t[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _spread_gradient(  # type: ignore[no-untyped-def]
    grad, y, weights, order, kept, grad_y, grad_weights, R, D, stride_grad, stride_y,
    K: tl.constexpr, HAS_KEPT: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of row r = row[t, k]: grad_y[r] = weights[t, k] * grad[t], and grad_weights[t, k] = <grad[t], y[r]>."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    choice = tl.load(order + r, mask=r < R, other=0)
    token = choice // K
    travels = r < R
    if HAS_KEPT:
        travels = travels & (tl.load(kept + choice, mask=r < R, other=0) != 0)
    weight = tl.load(weights + choice, mask=travels, other=0).to(WIDE)
    product = tl.zeros((ROWS, COLUMNS), WIDE)
    for first in range(0, D, COLUMNS):
        d = first + tl.arange(0, COLUMNS)
        inside = (r < R)[:, None] & (d < D)[None, :]
        read = inside & travels[:, None]
        upstream = tl.load(grad + token[:, None] * stride_grad + d[None, :], mask=read, other=0).to(WIDE)
        values = tl.load(y + r[:, None] * stride_y + d[None, :], mask=read, other=0).to(WIDE)
        product += upstream * values
        # zeros on rows that do not travel: nothing was read for them
        tl.store(grad_y + r[:, None] * D + d[None, :], (upstream * weight[:, None]).to(grad_y.dtype.element_ty), mask=inside)
    # each choice stands at one row, so that these writes never meet
    tl.store(grad_weights + choice, tl.sum(product, 1).to(grad_weights.dtype.element_ty), mask=r < R)


def _tl_dtype(dtype: torch.dtype) -> Any:
    return tl.float64 if wide_dtype(dtype) == torch.float64 else tl.float32


def _gather(x_TD: Tensor, order_R: Tensor, K: int, tile: Tile | None) -> Tensor:
    (_, D), R = x_TD.shape, order_R.numel()
    out_RD = x_TD.new_empty(R, D)
    if out_RD.numel():
        rows, columns = tile or choose_tile(D, x_TD.element_size())
        x_TD = row_major(x_TD)
        grid = (cdiv(R, rows),)
        _gather_rows[grid](x_TD, order_R, out_RD, R, D, x_TD.stride(0), K=K, ROWS=rows, COLUMNS=columns, num_warps=8)
    return out_RD


def gather_sum(
    y_RD: Tensor,
    row_TK: Tensor,
    weights_TK: Tensor | None = None,
    kept_TK: Tensor | None = None,
    residual_TD: Tensor | None = None,
    shared_TD: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """sum over k, in order, of weights_TK[t, k] * y_RD[row_TK[t, k]], then + shared + residual, in fp32 (fp64 for fp64).

    Not differentiable; `unpermute` is. The result has y's dtype. `tile`: rows and columns per step, None = `choose_tile`.
    """
    (T, K), D = row_TK.shape, y_RD.shape[1]
    out_TD = y_RD.new_empty(T, D)
    if not out_TD.numel():
        return out_TD
    # the accumulator is wide, whatever the rows' dtype: a smaller tile keeps it in registers
    rows, columns = tile or choose_tile(D, wide_dtype(y_RD.dtype).itemsize)
    y_RD = row_major(y_RD)
    residual, shared = (y_RD if x is None else row_major(x) for x in (residual_TD, shared_TD))
    _gather_sum[(cdiv(T, rows),)](
        y_RD,
        row_TK.contiguous(),
        y_RD if weights_TK is None else weights_TK.contiguous(),
        row_TK if kept_TK is None else kept_TK.contiguous(),
        residual,
        shared,
        out_TD,
        T,
        D,
        y_RD.stride(0),
        residual.stride(0),
        shared.stride(0),
        K=K,
        WEIGHTED=weights_TK is not None,
        HAS_KEPT=kept_TK is not None,
        HAS_RESIDUAL=residual_TD is not None,
        HAS_SHARED=shared_TD is not None,
        WIDE=_tl_dtype(y_RD.dtype),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=8,
    )
    return out_TD


def spread_gradient(
    grad_TD: Tensor,
    y_RD: Tensor,
    weights_TK: Tensor,
    order_R: Tensor,
    kept_TK: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of y_RD and weights_TK of the weighted gather-sum, in one pass over the rows. What is not kept gets zeros."""
    (R, D), K = y_RD.shape, weights_TK.shape[1]
    grad_y_RD = y_RD.new_empty(R, D)
    # each row writes its choice's gradient; choices without a row need their zeros from here
    new = torch.empty_like if weights_TK.numel() == R else torch.zeros_like
    grad_weights_TK = new(weights_TK, memory_format=torch.contiguous_format)
    if not R:
        return grad_y_RD, grad_weights_TK
    rows, columns = tile or choose_tile(D, wide_dtype(y_RD.dtype).itemsize)
    grad_TD, y_RD = row_major(grad_TD), row_major(y_RD)
    _spread_gradient[(cdiv(R, rows),)](
        grad_TD,
        y_RD,
        weights_TK.contiguous(),
        order_R,
        order_R if kept_TK is None else kept_TK.contiguous(),
        grad_y_RD,
        grad_weights_TK,
        R,
        D,
        grad_TD.stride(0),
        y_RD.stride(0),
        K=K,
        HAS_KEPT=kept_TK is not None,
        WIDE=_tl_dtype(y_RD.dtype),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=8,
    )
    return grad_y_RD, grad_weights_TK


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, row_TK: Tensor, kept_TK: Tensor | None, tile: Tile | None) -> Tensor:
        ctx.save_for_backward(row_TK, kept_TK)
        ctx.tile = tile
        return _gather(x_TD, order_R, row_TK.shape[1], tile)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        row_TK, kept_TK = ctx.saved_tensors
        return gather_sum(grad_RD, row_TK, None, kept_TK, tile=ctx.tile), None, None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y_RD: Tensor,
        weights_TK: Tensor,
        order_R: Tensor,
        row_TK: Tensor,
        kept_TK: Tensor | None,
        residual_TD: Tensor | None,
        shared_TD: Tensor | None,
        tile: Tile | None,
    ) -> Tensor:
        ctx.save_for_backward(y_RD, weights_TK, order_R, kept_TK)
        ctx.tile = tile
        ctx.adds = (residual_TD is not None, shared_TD is not None)
        return gather_sum(y_RD, row_TK, weights_TK, kept_TK, residual_TD, shared_TD, tile)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        y_RD, weights_TK, order_R, kept_TK = ctx.saved_tensors
        grad_y_RD, grad_weights_TK = spread_gradient(grad_TD, y_RD, weights_TK, order_R, kept_TK, ctx.tile)
        return grad_y_RD, grad_weights_TK, None, None, None, *(grad_TD if add else None for add in ctx.adds), None


def _check_plan(op: str, rows: int | None, order_R: Tensor, row_TK: Tensor, kept_TK: Tensor | None) -> None:
    for name, index in (("order", order_R), ("row", row_TK)):
        if index.dtype != torch.int64:
            raise ValueError(f"{op}: {name} is {index.dtype}; need int64, as sort_tokens returns it")
    choices = row_TK.numel()
    # only rows that are not kept may be missing
    fits = order_R.ndim == 1 and (len(order_R) == choices if kept_TK is None else len(order_R) <= choices)
    if row_TK.ndim != 2 or not fits or rows not in (None, len(order_R)):
        counted = "" if rows is None else f", {rows} expert rows"
        raise ValueError(
            f"{op}: order {tuple(order_R.shape)} [T * K]{counted} and row {tuple(row_TK.shape)} [T, K] do not fit each other"
        )
    if kept_TK is not None and (kept_TK.dtype != torch.bool or kept_TK.shape != row_TK.shape):
        raise ValueError(f"{op}: the mask is {kept_TK.dtype} {tuple(kept_TK.shape)}; need bool {tuple(row_TK.shape)} as row's")


def permute(x_TD: Tensor, order_R: Tensor, row_TK: Tensor, kept_TK: Tensor | None = None, tile: Tile | None = None) -> Tensor:
    """As the public function; `tile` sets rows and columns per step, None = `choose_tile`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    _check_plan("permute", None, order_R, row_TK, kept_TK)
    if x_TD.ndim != 2 or x_TD.shape[0] != row_TK.shape[0]:
        raise ValueError(f"permute: tokens {tuple(x_TD.shape)} [T, D] and row {tuple(row_TK.shape)} [T, K] differ in T")
    check_devices("permute", x_TD=x_TD, order_R=order_R, row_TK=row_TK, kept_TK=kept_TK)
    return _Permute.apply(x_TD, order_R, row_TK, kept_TK, tile)


def unpermute(
    y_RD: Tensor,
    weights_TK: Tensor,
    order_R: Tensor,
    row_TK: Tensor,
    kept_TK: Tensor | None = None,
    residual_TD: Tensor | None = None,
    shared_TD: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """As the public function, and on request + shared_TD + residual_TD in the same pass, added in this order before rounding.

    Args:
        residual_TD, shared_TD: the residual stream and the shared experts' output, in y's dtype; differentiable.
        tile: rows and columns per step, None = `choose_tile`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    T, D = row_TK.shape[0], y_RD.shape[-1]
    _check_plan("unpermute", y_RD.shape[0], order_R, row_TK, kept_TK)
    if y_RD.ndim != 2 or weights_TK.shape != row_TK.shape:
        raise ValueError(
            f"unpermute: rows {tuple(y_RD.shape)} [R, D], weights {tuple(weights_TK.shape)} and row {tuple(row_TK.shape)} "
            f"[T, K] do not fit each other"
        )
    for name, add in (("residual", residual_TD), ("shared", shared_TD)):
        if add is not None and (add.shape != (T, D) or add.dtype != y_RD.dtype):
            raise ValueError(
                f"unpermute: {name} is {add.dtype} {tuple(add.shape)}, the result is {y_RD.dtype} {(T, D)}; they must agree"
            )
    adds = {"residual_TD": residual_TD, "shared_TD": shared_TD}
    check_devices("unpermute", y_RD=y_RD, weights_TK=weights_TK, order_R=order_R, row_TK=row_TK, kept_TK=kept_TK, **adds)
    return _Unpermute.apply(y_RD, weights_TK, order_R, row_TK, kept_TK, residual_TD, shared_TD, tile)
