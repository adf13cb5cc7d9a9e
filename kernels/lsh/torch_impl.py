"""The LSH operations in torch: gathers and sums over a bucket's rows in their order, so that reruns are bitwise equal.

Autograd's own backward of a gather is an indexed add, which is slow on CPU and uses float atomics on GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from ..permute.torch_impl import BLOCK_ROWS, gather_sum
from .buckets import Buckets


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are formed: fp64 for fp64, else fp32."""
    return torch.promote_types(dtype, torch.float32)


def cross_polytope_codes(x_TD: Tensor, rotation_HPD: Tensor) -> Tensor:
    """As the public function."""
    wide, (H, P, D) = wide_dtype(x_TD.dtype), rotation_HPD.shape
    along_THP = (x_TD.to(wide) @ rotation_HPD.reshape(H * P, D).to(wide).T).view(-1, H, P)
    # NaN counts as farthest, so that every back end has the same code for it; argmax takes the first of equal ones
    axis_TH = torch.where(along_THP.isnan(), torch.inf, along_THP.abs()).argmax(-1)
    return 2 * axis_TH + (along_THP.gather(-1, axis_TH[..., None]).squeeze(-1) < 0)


def segment_sum(rows_ND: Tensor, buckets: Buckets, per_row: int, weights_TK: Tensor | None) -> Tensor:
    """wide [C, D]: sum over the choices of a bucket, in order, of weights_TK[choice] * rows_ND[choice // per_row]."""
    wide = wide_dtype(rows_ND.dtype)
    C, choice_N = buckets.experts_C.numel(), buckets.order_R[: buckets.num_rows]
    if not C or not rows_ND.shape[1]:
        return rows_ND.new_zeros(C, rows_ND.shape[1], dtype=wide)
    # sums each bag's rows one after another, without a copy of the gathered rows
    return embedding_bag(
        choice_N // per_row,
        rows_ND.detach().to(wide),
        buckets.starts_C1,
        mode="sum",
        per_sample_weights=None if weights_TK is None else weights_TK.detach().flatten()[choice_N].to(wide),
        include_last_offset=True,
    )


def spread(values_CD: Tensor, buckets: Buckets, weights_TK: Tensor) -> Tensor:
    """[T, D]: sum over kept k of weights_TK[t, k] * values_CD[bucket of (t, k)]. Differentiates the mean, and restores rows."""
    kept_TK = buckets.kept_TK
    if not buckets.num_rows:
        return values_CD.new_zeros(buckets.bucket_TK.shape[0], values_CD.shape[1])
    if kept_TK is not None:
        # these weights hold no meaning either: a product of their NaN with 0 would be NaN
        weights_TK = weights_TK.masked_fill(~kept_TK, 0)
    return gather_sum(values_CD, buckets.bucket_TK, weights_TK, kept_TK)


def inverse_sizes(buckets: Buckets, dtype: torch.dtype) -> Tensor:
    """[T, K]: 1 / (rows of a choice's bucket); anything where it is not kept."""
    if not buckets.num_rows:
        return buckets.bucket_TK.to(dtype)
    return buckets.starts_C1.diff().to(dtype).reciprocal()[buckets.bucket_TK]


def shares(weights_TK: Tensor, totals_C: Tensor, buckets: Buckets) -> Tensor:
    """q_TK: the part that a choice's row has in its centroid; those of a bucket sum to 1. Anything where it is not kept.

    Args:
        totals_C: sum of each bucket's weights, in the dtype of the result.
    """
    plain_TK = inverse_sizes(buckets, totals_C.dtype)
    if not buckets.num_rows:
        return plain_TK
    totals_TK = totals_C[buckets.bucket_TK]
    return torch.where(totals_TK != 0, weights_TK.detach().to(totals_C.dtype) / totals_TK, plain_TK)


def share_gradient(products_TK: Tensor, totals_C: Tensor, buckets: Buckets, dtype: torch.dtype) -> Tensor:
    """Gradient of the weights of a mean from products_TK = <gradient of c, x - c>: d c / d w = (x - c) / (sum of w).

    0 where the weights of a bucket sum to 0: the mean has no derivative there.
    """
    if not buckets.num_rows:
        return torch.zeros_like(products_TK, dtype=dtype)
    totals_TK = totals_C[buckets.bucket_TK]
    grad_TK = torch.where(totals_TK != 0, products_TK / totals_TK, 0.0).to(dtype)
    return grad_TK if buckets.kept_TK is None else grad_TK.masked_fill(~buckets.kept_TK, 0)


def travelling(weights_TK: Tensor, buckets: Buckets, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(sum of each token's kept weights [T, 1], tokens of which nothing travels, bool [T, 1] or None)."""
    weights_TK = weights_TK.detach().to(dtype)
    if buckets.kept_TK is None:
        return weights_TK.sum(1, keepdim=True), None
    return weights_TK.masked_fill(~buckets.kept_TK, 0).sum(1, keepdim=True), ~buckets.kept_TK.any(1, keepdim=True)


def _cleared(rows_ND: Tensor, mask_N1: Tensor | None) -> Tensor:
    """Rows without those that the mask names, whatever these hold: a product with 0 would keep their NaNs."""
    return rows_ND if mask_N1 is None else rows_ND.masked_fill(mask_N1, 0)


def _blocks(tokens: int, device: torch.device) -> Iterator[slice]:
    """All tokens at once on a GPU; on a CPU so many that a block and its products stay in a core's cache."""
    step = BLOCK_ROWS if device.type == "cpu" else max(1, tokens)
    return (slice(lo, lo + step) for lo in range(0, tokens, step))


def _residuals(x_TD: Tensor, centroids_CD: Tensor, buckets: Buckets, rows: slice, k: int) -> Tensor:
    """wide x_t - c_b for choice k of the tokens `rows`; 0 where it is not kept."""
    wide = wide_dtype(x_TD.dtype)
    residual_ND = x_TD[rows].to(wide) - centroids_CD.index_select(0, buckets.bucket_TK[rows, k]).to(wide)
    return _cleared(residual_ND, None if buckets.kept_TK is None else ~buckets.kept_TK[rows, k, None])


def farther_than(x_TD: Tensor, centroids_CD: Tensor, buckets: Buckets, epsilon: float) -> Tensor:
    """As the public function."""
    far_TK = torch.zeros_like(buckets.bucket_TK, dtype=torch.bool)
    if not buckets.num_rows:
        return far_TK
    limit_T = epsilon * torch.linalg.vector_norm(x_TD, dim=-1, dtype=wide_dtype(x_TD.dtype))
    for rows in _blocks(x_TD.shape[0], x_TD.device):
        for k in range(far_TK.shape[1]):
            # not "farther": the distance of a NaN is not within any limit
            far_TK[rows, k] = ~(_residuals(x_TD, centroids_CD, buckets, rows, k).norm(dim=-1) <= limit_T[rows])
    return far_TK if buckets.kept_TK is None else far_TK & buckets.kept_TK


class Centroids(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor | None, buckets: Buckets) -> Tensor:
        ctx.buckets, ctx.dtype, wide = buckets, x_TD.dtype, wide_dtype(x_TD.dtype)
        if weights_TK is None:
            sizes_C1 = buckets.starts_C1.diff().to(wide)[:, None]
            return (segment_sum(x_TD, buckets, buckets.bucket_TK.shape[1], None) / sizes_C1).to(x_TD.dtype)
        totals_C = segment_sum(weights_TK.to(wide).reshape(-1, 1), buckets, 1, None).squeeze(1)
        shares_TK = shares(weights_TK, totals_C, buckets)
        c_CD = segment_sum(x_TD, buckets, buckets.bucket_TK.shape[1], shares_TK).to(x_TD.dtype)
        ctx.weights_dtype = weights_TK.dtype
        ctx.save_for_backward(shares_TK, *((x_TD, c_CD, totals_C) if ctx.needs_input_grad[1] else ()))
        return c_CD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_CD: Tensor) -> tuple[Tensor | None, ...]:
        buckets, wide = ctx.buckets, wide_dtype(ctx.dtype)
        shares_TK, *saved = ctx.saved_tensors or (inverse_sizes(buckets, wide),)
        grad_x_TD = spread(grad_CD, buckets, shares_TK) if ctx.needs_input_grad[0] else None
        if not saved:
            return grad_x_TD, None, None
        x_TD, c_CD, totals_C = saved
        products_TK = torch.zeros(buckets.bucket_TK.shape, dtype=wide, device=x_TD.device)
        for rows in _blocks(x_TD.shape[0] if buckets.num_rows else 0, x_TD.device):
            for k in range(products_TK.shape[1]):
                upstream_ND = grad_CD.index_select(0, buckets.bucket_TK[rows, k]).to(wide)
                products_TK[rows, k] = (upstream_ND * _residuals(x_TD, c_CD, buckets, rows, k)).sum(-1)
        return grad_x_TD, share_gradient(products_TK, totals_C, buckets, ctx.weights_dtype), None


class Restore(torch.autograd.Function):
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
    ) -> Tensor:
        ctx.save_for_backward(expert_CD, centroids_CD, x_TD, weights_TK, compensation)
        ctx.buckets, ctx.detach_residual, wide = buckets, detach_residual, wide_dtype(x_TD.dtype)
        if compensation is None:
            return spread(expert_CD, buckets, weights_TK)
        a, (sums_T1, idle_T1) = compensation.to(wide), travelling(weights_TK, buckets, wide)
        # the difference stays wide: rounded to bf16, a row that travelled exactly would not come back exactly
        y_TD = spread(torch.addcmul(expert_CD.to(wide), a, centroids_CD.to(wide), value=-1), buckets, weights_TK)
        return y_TD.addcmul_(_cleared(x_TD.to(wide), idle_T1) * a, sums_T1).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        expert_CD, centroids_CD, x_TD, weights_TK, compensation = ctx.saved_tensors
        buckets, wide, needed = ctx.buckets, wide_dtype(x_TD.dtype), ctx.needs_input_grad
        residual_moves = compensation is not None and not ctx.detach_residual
        sums_T1, idle_T1 = travelling(weights_TK, buckets, wide)
        grad_TD = _cleared(grad_TD.to(wide), idle_T1)
        grads: list[Tensor | None] = [None] * 5
        if needed[0] or (needed[1] and residual_moves):
            sum_CD = segment_sum(grad_TD, buckets, weights_TK.shape[1], weights_TK)
            grads[0] = sum_CD.to(expert_CD.dtype)
            grads[1] = (sum_CD * -compensation.to(wide)).to(centroids_CD.dtype) if residual_moves else None
        if needed[2] and residual_moves:
            grads[2] = (grad_TD * sums_T1).mul_(compensation.to(wide)).to(x_TD.dtype)
        if needed[3] or needed[4]:
            grads[3], grads[4] = _small_gradients(grad_TD, expert_CD, centroids_CD, x_TD, weights_TK, compensation, buckets)
        return *(grad if need else None for grad, need in zip(grads, needed, strict=False)), None, None


def _small_gradients(
    grad_TD: Tensor,
    expert_CD: Tensor,
    centroids_CD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    compensation: Tensor | None,
    buckets: Buckets,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the weights, <grad, E + a (x - c)>, and of a, sum over rows of w (x - c) grad.

    From the residuals themselves: as a difference of two sums, the gradient of a would be noise instead of 0 where every row
    travelled exactly.
    """
    wide = grad_TD.dtype
    grad_weights_TK = torch.zeros(weights_TK.shape, dtype=wide, device=x_TD.device)
    grad_a_D = None if compensation is None else grad_TD.new_zeros(grad_TD.shape[1])
    for rows in _blocks(x_TD.shape[0] if buckets.num_rows else 0, x_TD.device):
        for k in range(weights_TK.shape[1]):
            unkept_N1 = None if buckets.kept_TK is None else ~buckets.kept_TK[rows, k, None]
            value_ND = expert_CD.index_select(0, buckets.bucket_TK[rows, k]).to(wide)
            if compensation is not None and grad_a_D is not None:
                residual_ND = _residuals(x_TD, centroids_CD, buckets, rows, k)
                value_ND = torch.addcmul(value_ND, residual_ND, compensation.to(wide))
                weights_N1 = _cleared(weights_TK[rows, k, None].to(wide), unkept_N1)
                grad_a_D += (residual_ND * grad_TD[rows]).mul_(weights_N1).sum(0)
            grad_weights_TK[rows, k] = _cleared(value_ND * grad_TD[rows], unkept_N1).sum(-1)
    if compensation is None or grad_a_D is None:
        return grad_weights_TK.to(weights_TK.dtype), None
    grad_a = grad_a_D if compensation.ndim else grad_a_D.sum()
    return grad_weights_TK.to(weights_TK.dtype), grad_a.to(compensation.dtype)


def centroids(x_TD: Tensor, buckets: Buckets, weights_TK: Tensor | None) -> Tensor:
    """As the public function."""
    return Centroids.apply(x_TD, weights_TK, buckets)


def restore(
    expert_CD: Tensor,
    centroids_CD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    buckets: Buckets,
    compensation: Tensor | None,
    detach_residual: bool,
) -> Tensor:
    """As the public function."""
    return Restore.apply(expert_CD, centroids_CD, x_TD, weights_TK, compensation, buckets, detach_residual)
