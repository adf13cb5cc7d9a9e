"""The LSH operations in Triton: launches, and the two autograd functions."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..permute.triton_impl import Tile, choose_tile, gather_sum
from ..triton_support import cdiv, check_devices, interpreting, next_power_of_2, row_major, wide_dtype
from .buckets import Buckets
from .checks import MAX_WIDTH
from .torch_impl import inverse_sizes, share_gradient, shares
from .triton_kernels import (
    codes_kernel,
    join_kernel,
    piece_kernel,
    product_kernel,
    residual_gradient_kernel,
    restore_kernel,
    segment_kernel,
)

CHUNK = 128
"""Rows of a bucket that one program sums; larger buckets are summed in pieces of so many."""


def _tl_dtype(dtype: torch.dtype) -> Any:
    return tl.float64 if wide_dtype(dtype) == torch.float64 else tl.float32


def _segment_tile(width: int, element_bytes: int) -> Tile:
    """Rows and columns of one step: 8 KiB by 128 threads. Few rows, as most buckets have few."""
    columns = min(next_power_of_2(width), 1024 // element_bytes)
    return max(1, min(8192 // element_bytes // columns, 32)), columns


def cross_polytope_codes(x_TD: Tensor, rotation_HPD: Tensor, tokens: int = 64) -> Tensor:
    """As the public function; `tokens` per program, a power of two."""
    (T, D), (H, P, _) = x_TD.shape, rotation_HPD.shape
    check_devices("cross_polytope_codes", x_TD=x_TD, rotation_HPD=rotation_HPD)
    codes_TH = torch.empty(T, H, dtype=torch.int64, device=x_TD.device)
    if not codes_TH.numel():
        return codes_TH
    # matrix instructions take at least 16 columns
    hashes = max(min(next_power_of_2(H), MAX_WIDTH // P), cdiv(16, P))
    x_TD = row_major(x_TD)
    codes_kernel[(cdiv(T, tokens), cdiv(H, hashes))](
        x_TD, rotation_HPD.contiguous(), codes_TH, T, D, H, x_TD.stride(0),
        WIDTH=P, HASHES=hashes, TOKENS=tokens, DEPTH=32 if x_TD.dtype == torch.float32 else 64, UPCAST=interpreting(),
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return codes_TH


def segment_sum(
    rows_ND: Tensor,
    buckets: Buckets,
    per_row: int,
    weights_TK: Tensor | None = None,
    mean: bool = False,
    factor: Tensor | None = None,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor | None]:
    """(sum over the choices of each bucket of weights[choice] * rows[choice // per_row], -factor * that sum), both [C, D].

    Args:
        mean: divide by the number of choices.
        factor: one number or one per column; None = no second result.
        dtype: of the results, None = that of the rows.
        tile: rows and columns per step, powers of two, None = `_segment_tile`. `chunk`: most rows summed by one program.
    """
    C, D, N = buckets.experts_C.numel(), rows_ND.shape[1], buckets.num_rows
    out_CD = rows_ND.new_empty(C, D, dtype=dtype)
    scaled_CD = None if factor is None else torch.empty_like(out_CD)
    if not out_CD.numel():
        return out_CD, scaled_CD
    rows, columns = tile or _segment_tile(D, rows_ND.element_size())
    rows_ND, wide, order_R, starts_C1 = row_major(rows_ND), wide_dtype(rows_ND.dtype), buckets.order_R, buckets.starts_C1
    weights = rows_ND if weights_TK is None else weights_TK.contiguous()
    factor = rows_ND if factor is None else factor
    scaled = out_CD if scaled_CD is None else scaled_CD
    stride_factor = int(factor.ndim == 1)
    flags: dict[str, Any] = {"CHUNK": chunk, "WIDE": _tl_dtype(rows_ND.dtype), "COLUMNS": columns}
    read: dict[str, Any] = {"PER_ROW": per_row, "WEIGHTED": weights_TK is not None, "ROWS": rows}
    write: dict[str, Any] = {"MEAN": mean, "SCALED": scaled_CD is not None}
    across = cdiv(D, columns)
    segment_kernel[(C, across)](
        rows_ND,
        order_R,
        weights,
        starts_C1,
        factor,
        out_CD,
        scaled,
        D,
        rows_ND.stride(0),
        stride_factor,
        **flags,
        **read,
        **write,
    )
    if chunk < N:
        stretches = cdiv(N, chunk)
        pieces = rows_ND.new_empty(2 * stretches, D, dtype=wide)
        bucket = buckets.bucket_TK.contiguous()
        piece_kernel[(2 * stretches, across)](
            rows_ND, order_R, weights, bucket, starts_C1, pieces, N, D, rows_ND.stride(0), **flags, **read
        )
        join_kernel[(stretches, across)](
            order_R, bucket, starts_C1, pieces, factor, out_CD, scaled, N, D, stride_factor, **flags, **write
        )
    return out_CD, scaled_CD


def _products(
    op: str,
    left: Tensor | None,
    centroids_CD: Tensor,
    x_TD: Tensor,
    buckets: Buckets,
    expert_CD: Tensor | None = None,
    factor: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """wide [T, K]: <left, expert + factor * (x - c)>, 0 where not kept; `op` as LEFT of the kernel.

    Without experts the factor is 1; with experts and no factor there is no residual.
    """
    (T, K), D = buckets.bucket_TK.shape, x_TD.shape[1]
    out_TK = torch.empty(T, K, dtype=wide_dtype(x_TD.dtype), device=x_TD.device)
    if not out_TK.numel():
        return out_TK
    # up to four tiles are read in one step: of the usual size they would spill registers
    rows, columns = tile or choose_tile(D, 2 * out_TK.element_size())
    x_TD, centroids_CD = row_major(x_TD), row_major(centroids_CD)
    left = x_TD if left is None else row_major(left)
    expert = x_TD if expert_CD is None else row_major(expert_CD)
    kept_TK = buckets.kept_TK
    product_kernel[(cdiv(T * K, rows),)](
        left, expert, centroids_CD, x_TD, buckets.bucket_TK.contiguous(), x_TD if kept_TK is None else kept_TK.contiguous(),
        x_TD if factor is None else factor, out_TK, T * K, D, left.stride(0), expert.stride(0), centroids_CD.stride(0),
        x_TD.stride(0), int(factor is not None and factor.ndim == 1),
        K=K, LEFT=op, HAS_EXPERT=expert_CD is not None, HAS_RESIDUAL=expert_CD is None or factor is not None,
        HAS_KEPT=kept_TK is not None, WIDE=_tl_dtype(x_TD.dtype), ROWS=rows, COLUMNS=columns, num_warps=8,
    )  # fmt: skip
    return out_TK


class _Centroids(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor | None, buckets: Buckets, tile: Tile | None, chunk: int) -> Tensor:
        ctx.buckets, ctx.dtype, ctx.tile, wide, K = buckets, x_TD.dtype, tile, wide_dtype(x_TD.dtype), buckets.bucket_TK.shape[1]
        if weights_TK is None:
            return segment_sum(x_TD, buckets, K, mean=True, tile=tile, chunk=chunk)[0]
        # sums of the weights: rows of one column
        totals_C1, _ = segment_sum(weights_TK.to(wide).reshape(-1, 1), buckets, 1, chunk=chunk)
        shares_TK = shares(weights_TK, totals_C1[:, 0], buckets)
        c_CD, _ = segment_sum(x_TD, buckets, K, shares_TK, tile=tile, chunk=chunk)
        ctx.weights_dtype = weights_TK.dtype
        ctx.save_for_backward(shares_TK, *((x_TD, c_CD, totals_C1[:, 0]) if ctx.needs_input_grad[1] else ()))
        return c_CD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_CD: Tensor) -> tuple[Tensor | None, ...]:
        buckets = ctx.buckets
        shares_TK, *saved = ctx.saved_tensors or (inverse_sizes(buckets, wide_dtype(ctx.dtype)),)
        grad_x_TD, grad_weights_TK = None, None
        if ctx.needs_input_grad[0]:
            grad_x_TD = gather_sum(grad_CD, buckets.bucket_TK, shares_TK, buckets.kept_TK, tile=ctx.tile)
        if saved:
            x_TD, c_CD, totals_C = saved
            products_TK = _products("bucket", grad_CD, c_CD, x_TD, buckets, tile=ctx.tile)
            grad_weights_TK = share_gradient(products_TK, totals_C, buckets, ctx.weights_dtype)
        return grad_x_TD, grad_weights_TK, None, None, None


def _residual_gradients(
    grad_TD: Tensor,
    centroids_CD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    compensation: Tensor,
    buckets: Buckets,
    for_x: bool,
    for_factor: bool,
    tile: Tile | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, and of the compensation, through the residuals."""
    (T, D), K, kept_TK = x_TD.shape, weights_TK.shape[1], buckets.kept_TK
    rows, columns = tile or choose_tile(D, wide_dtype(x_TD.dtype).itemsize)
    programs = cdiv(T, rows)
    grad_x_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    # T = 0 launches nothing: the sum over no parts is 0
    partial_ND = x_TD.new_empty(programs, D, dtype=wide_dtype(x_TD.dtype))
    grad_TD, centroids_CD, x_TD = row_major(grad_TD), row_major(centroids_CD), row_major(x_TD)
    if grad_x_TD.numel() and (for_x or for_factor):
        residual_gradient_kernel[(programs,)](
            grad_TD, centroids_CD, x_TD, weights_TK.contiguous(), buckets.bucket_TK.contiguous(),
            x_TD if kept_TK is None else kept_TK.contiguous(), compensation, grad_x_TD, partial_ND, T, D,
            grad_TD.stride(0), centroids_CD.stride(0), x_TD.stride(0), compensation.ndim,
            K=K, HAS_KEPT=kept_TK is not None, FOR_X=for_x, FOR_FACTOR=for_factor,
            WIDE=_tl_dtype(x_TD.dtype), ROWS=rows, COLUMNS=columns, num_warps=8,
        )  # fmt: skip
    if not for_factor:
        return grad_x_TD, None
    return grad_x_TD, partial_ND.sum(0 if compensation.ndim else None).to(compensation.dtype)


class _Restore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        expert_CD: Tensor,
        centroids_CD: Tensor,
        x_TD: Tensor,
        weights_TK: Tensor,
        compensation: Tensor | None,
        buckets: Buckets,
        detach_residual: bool,
        tile: Tile | None,
        chunk: int,
    ) -> Tensor:
        ctx.save_for_backward(expert_CD, centroids_CD, x_TD, weights_TK, compensation)
        ctx.buckets, ctx.detach_residual, ctx.tile, ctx.chunk = buckets, detach_residual, tile, chunk
        (T, K), D, kept_TK = buckets.bucket_TK.shape, x_TD.shape[1], buckets.kept_TK
        if compensation is None:
            return gather_sum(expert_CD, buckets.bucket_TK, weights_TK, kept_TK, tile=tile)
        y_TD = x_TD.new_empty(T, D)
        if y_TD.numel():
            rows, columns = tile or choose_tile(D, wide_dtype(x_TD.dtype).itemsize)
            expert_CD, centroids_CD, x_TD = row_major(expert_CD), row_major(centroids_CD), row_major(x_TD)
            restore_kernel[(cdiv(T, rows),)](
                expert_CD, centroids_CD, x_TD, weights_TK.contiguous(), buckets.bucket_TK.contiguous(),
                x_TD if kept_TK is None else kept_TK.contiguous(), compensation, y_TD, T, D,
                expert_CD.stride(0), centroids_CD.stride(0), x_TD.stride(0), compensation.ndim,
                K=K, HAS_KEPT=kept_TK is not None, WIDE=_tl_dtype(x_TD.dtype), ROWS=rows, COLUMNS=columns, num_warps=8,
            )  # fmt: skip
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        expert_CD, centroids_CD, x_TD, weights_TK, compensation = ctx.saved_tensors
        buckets, needed, tile = ctx.buckets, ctx.needs_input_grad, ctx.tile
        moving = compensation is not None and not ctx.detach_residual
        grads: list[Tensor | None] = [None] * 5
        if needed[0] or (needed[1] and moving):
            factor = compensation if moving else None
            K = weights_TK.shape[1]
            grads[:2] = segment_sum(grad_TD, buckets, K, weights_TK, factor=factor, tile=tile, chunk=ctx.chunk)
        if compensation is not None:
            # both from one pass over the residuals
            ways = (needed[2] and moving, needed[4], tile)
            grad_x_TD, grads[4] = _residual_gradients(grad_TD, centroids_CD, x_TD, weights_TK, compensation, buckets, *ways)
            grads[2] = grad_x_TD if moving else None
        if needed[3]:
            products_TK = _products("token", grad_TD, centroids_CD, x_TD, buckets, expert_CD, compensation, tile)
            grads[3] = products_TK.to(weights_TK.dtype)
        return *(grad if need else None for grad, need in zip(grads, needed, strict=False)), None, None, None, None


def centroids(x_TD: Tensor, buckets: Buckets, weights_TK: Tensor | None, tile: Tile | None = None, chunk: int = CHUNK) -> Tensor:
    """As the public function; `tile` and `chunk` as for `segment_sum`."""
    check_devices("centroids", x_TD=x_TD, weights_TK=weights_TK, order_R=buckets.order_R)
    return _Centroids.apply(x_TD, weights_TK, buckets, tile, chunk)


def restore(
    expert_CD: Tensor,
    centroids_CD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    buckets: Buckets,
    compensation: Tensor | None,
    detach_residual: bool,
    tile: Tile | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """As the public function; `tile` and `chunk` as for `segment_sum`."""
    rows = {"expert_CD": expert_CD, "centroids_CD": centroids_CD, "x_TD": x_TD, "compensation": compensation}
    check_devices("restore", weights_TK=weights_TK, order_R=buckets.order_R, **rows)
    if compensation is not None:
        compensation = compensation.contiguous()
    return _Restore.apply(expert_CD, centroids_CD, x_TD, weights_TK, compensation, buckets, detach_residual, tile, chunk)


def farther_than(x_TD: Tensor, centroids_CD: Tensor, buckets: Buckets, epsilon: float, tile: Tile | None = None) -> Tensor:
    """As the public function."""
    check_devices("farther_than", x_TD=x_TD, centroids_CD=centroids_CD, order_R=buckets.order_R)
    squares_TK = _products("residual", None, centroids_CD, x_TD, buckets, tile=tile)
    limit_T1 = epsilon * torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=squares_TK.dtype)
    # not "farther": the distance of a NaN is not within any limit
    far_TK = ~(squares_TK.sqrt() <= limit_T1)
    return far_TK if buckets.kept_TK is None else far_TK & buckets.kept_TK
