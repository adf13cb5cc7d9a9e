"""Rows that hash alike travel as one: codes, buckets, centroids, and the rows restored from what the experts made of them.

LSH-MoE (arXiv 2411.08446): tokens that an expert would see as nearly the same vector are replaced by their mean on the way to
it. The owner keeps the tokens, and adds what the mean had lost, x - c, to what comes back.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backend import Backend, choose
from . import torch_impl
from .buckets import Buckets, bucket_rows
from .checks import MAX_WIDTH, check_bucket_rows, check_centroids, check_codes, check_compensation, check_same_device
from .rotation import make_rotation


def cross_polytope_codes(x_TD: Tensor, rotation_HPD: Tensor, backend: Backend = "auto") -> Tensor:
    """Codes of H cross-polytope hashes (Andoni et al. 2015, arXiv 1509.02897, section 3), each of P random directions.

    Rows at a small angle often have equal codes; the length of a row does not matter. Not differentiable.

    Args:
        x_TD: tokens, any float type.
        rotation_HPD: of `make_rotation`; rounded to the tokens' dtype. Products are summed in at least fp32.
        backend: "torch", or "triton" for CUDA tensors, at most MAX_WIDTH directions and no fp64; "auto" as `backend.rule` says
            of matrix products, and torch for wider hashes.

    Returns:
        codes_TH: int64 in [0, 2P): twice the axis on which R_h x reaches farthest, plus one where it does so downwards. Ties
            go to the lowest code. A row with NaN has some code in this range.

    Raises:
        ValueError: shapes, dtypes, devices or a back end that do not fit each other.
    """
    check_codes(x_TD, rotation_HPD)
    x_TD, rotation_HPD = x_TD.detach(), rotation_HPD.detach().to(x_TD.dtype)
    if backend == "auto" and rotation_HPD.shape[1] > MAX_WIDTH:
        backend = "torch"
    if choose("cross_polytope_codes", backend, x_TD, products=True) == "triton":
        # not at the top: triton is absent on some machines without a GPU
        from . import triton_impl

        if rotation_HPD.shape[1] > MAX_WIDTH or x_TD.dtype == torch.float64:
            raise ValueError(
                f"cross_polytope_codes: tokens {x_TD.dtype}, rotation {tuple(rotation_HPD.shape)} [H, P, D]; the Triton kernel "
                f"hashes fp16, bf16 and fp32 into at most {MAX_WIDTH} directions, use backend 'torch'"
            )
        return triton_impl.cross_polytope_codes(x_TD, rotation_HPD)
    return torch_impl.cross_polytope_codes(x_TD, rotation_HPD)


def centroids(x_TD: Tensor, buckets: Buckets, weights_TK: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """c_CD: the mean of each bucket's rows, summed in their order in at least fp32; in the tokens' dtype.

    Differentiable in the tokens and in the weights. A bucket of one row is that row, bit by bit.

    Args:
        weights_TK: not negative; c = sum w x / sum w, which for the gate's weights minimises the error of the gated sum. The
            plain mean for a bucket whose weights are all 0, whose weights then get no gradient. None = plain means.
        backend: "torch", or "triton" for CUDA tensors; "auto" as `backend.rule` says.

    Raises:
        ValueError: shapes, dtypes, devices or a back end that do not fit each other.
    """
    check_centroids("centroids", x_TD, buckets, weights_TK)
    if choose("centroids", backend, x_TD) == "triton":
        from . import triton_impl

        return triton_impl.centroids(x_TD, buckets, weights_TK)
    return torch_impl.centroids(x_TD, buckets, weights_TK)


def restore(
    expert_CD: Tensor,
    centroids_CD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    buckets: Buckets,
    compensation: Tensor | None = None,
    detach_residual: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """y_t = sum over kept k of w_tk (E_b + a (x_t - c_b)), b the bucket of (t, k): algorithm 1 of LSH-MoE with the combine.

    Formed as a x_t (sum of w) + sum of w (E - a c)_b, so that no residual is ever stored; summed in the order of k in at
    least fp32. Differentiable in every tensor: the true gradient of this formula.

    Args:
        expert_CD: what the experts made of the centroids, in the tokens' dtype as centroids_CD.
        compensation: a, one number or one per column [D] (ones are the paper's); None adds no residual.
        detach_residual: the residual passes no gradient to tokens and centroids, which then get theirs through the experts
            alone. Compensation and weights get the same gradients.
        backend: "torch", or "triton" for CUDA tensors; "auto" as `backend.rule` says.

    Returns:
        y_TD in the tokens' dtype; 0 for a token of which nothing travels.

    Raises:
        ValueError: shapes, dtypes, devices or a back end that do not fit each other.
    """
    check_centroids("restore", x_TD, buckets, weights_TK)
    check_bucket_rows("restore", "expert_CD", expert_CD, x_TD, buckets)
    check_bucket_rows("restore", "centroids_CD", centroids_CD, x_TD, buckets)
    check_compensation("restore", compensation, x_TD)
    check_same_device("restore", x_TD=x_TD, weights_TK=weights_TK)
    if choose("restore", backend, x_TD) == "triton":
        from . import triton_impl

        return triton_impl.restore(expert_CD, centroids_CD, x_TD, weights_TK, buckets, compensation, detach_residual)
    return torch_impl.restore(expert_CD, centroids_CD, x_TD, weights_TK, buckets, compensation, detach_residual)


def farther_than(x_TD: Tensor, centroids_CD: Tensor, buckets: Buckets, epsilon: float, backend: Backend = "auto") -> Tensor:
    """exact_TK: kept choices with |x - c| > epsilon |x|, which then travel alone: the argument for a second `bucket_rows`.

    A NaN is farther than any distance, so a broken row breaks no other one: all rows that had to share its centroid are
    returned. Not differentiable. `backend`: as for `centroids`.

    Raises:
        ValueError: shapes, dtypes, devices, a back end or an epsilon that do not fit.
    """
    check_centroids("farther_than", x_TD, buckets, None)
    check_bucket_rows("farther_than", "centroids_CD", centroids_CD, x_TD, buckets)
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"farther_than: epsilon = {epsilon}; need a part of a row's length, 0 or more")
    x_TD, centroids_CD = x_TD.detach(), centroids_CD.detach()
    if choose("farther_than", backend, x_TD) == "triton":
        from . import triton_impl

        return triton_impl.farther_than(x_TD, centroids_CD, buckets, epsilon)
    return torch_impl.farther_than(x_TD, centroids_CD, buckets, epsilon)


__all__ = [
    "Backend",
    "Buckets",
    "bucket_rows",
    "centroids",
    "cross_polytope_codes",
    "farther_than",
    "make_rotation",
    "restore",
]
