"""What every back end of the LSH operations refuses, in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .buckets import Buckets

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_WIDTH = 256
"""Directions in one tile of the Triton kernel, of one hash or of several: by 64 tokens half of 256 threads' registers."""


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """Raises ValueError, with every tensor's device, where they are not all on one."""
    devices = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{op}: {', '.join(f'{n} on {d}' for n, d in devices.items())}; all tensors must be on one device")


def check_codes(x_TD: Tensor, rotation_HPD: Tensor) -> None:
    """Inputs of `cross_polytope_codes`."""
    op = "cross_polytope_codes"
    if x_TD.ndim != 2 or x_TD.dtype not in FLOATS:
        raise ValueError(f"{op}: tokens are {x_TD.dtype} {tuple(x_TD.shape)}; need a float type and [T, D]")
    if rotation_HPD.ndim != 3 or rotation_HPD.dtype not in FLOATS or rotation_HPD.shape[2] != x_TD.shape[1]:
        raise ValueError(
            f"{op}: the rotation is {rotation_HPD.dtype} {tuple(rotation_HPD.shape)} and tokens {tuple(x_TD.shape)} [T, D]; "
            f"need a float type and [H, P, D] with the same D"
        )
    width = rotation_HPD.shape[1]
    if width < 1 or width & (width - 1):
        raise ValueError(f"{op}: the rotation {tuple(rotation_HPD.shape)} [H, P, D] has P = {width}; need a power of two")
    check_same_device(op, x_TD=x_TD, rotation_HPD=rotation_HPD)


def check_choices(
    codes_TH: Tensor,
    indices_TK: Tensor,
    num_experts: int,
    kept_TK: Tensor | None,
    exact_TK: Tensor | None,
    max_rows: int | Tensor | None,
    num_codes: int | None,
) -> None:
    """Inputs of `bucket_rows`."""
    op = "bucket_rows"
    for name, x in (("codes", codes_TH), ("indices", indices_TK)):
        if x.ndim != 2 or x.dtype != torch.int64:
            raise ValueError(f"{op}: {name} are {x.dtype} {tuple(x.shape)}; need int64 with a row per token")
    if codes_TH.shape[0] != indices_TK.shape[0]:
        raise ValueError(f"{op}: codes {tuple(codes_TH.shape)} [T, H] and indices {tuple(indices_TK.shape)} [T, K] differ in T")
    for name, mask in (("kept", kept_TK), ("exact", exact_TK)):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != indices_TK.shape):
            raise ValueError(
                f"{op}: the mask {name} is {mask.dtype} {tuple(mask.shape)}; "
                f"need bool of the indices' shape {tuple(indices_TK.shape)}"
            )
    if num_experts < 1:
        raise ValueError(f"{op}: {num_experts} experts; need at least one")
    if isinstance(max_rows, Tensor):
        # its value stays on the device, unread
        if max_rows.ndim or max_rows.dtype != torch.int64:
            raise ValueError(f"{op}: max_rows is {max_rows.dtype} {tuple(max_rows.shape)}; need an int64 scalar")
        check_same_device(op, codes_TH=codes_TH, max_rows=max_rows)
    elif max_rows is not None and max_rows < 0:
        raise ValueError(f"{op}: max_rows = {max_rows}; need 0 or more, or None for no limit")
    if num_codes is not None and num_codes < 1:
        raise ValueError(f"{op}: num_codes = {num_codes}; need one or more, or None for any codes")
    check_same_device(op, codes_TH=codes_TH, indices_TK=indices_TK, kept_TK=kept_TK, exact_TK=exact_TK)


def check_centroids(op: str, x_TD: Tensor, buckets: Buckets, weights_TK: Tensor | None) -> None:
    """Tokens, and weights if any, belong to the choices that were bucketed."""
    bucket_TK = buckets.bucket_TK
    if x_TD.ndim != 2 or x_TD.dtype not in FLOATS or x_TD.shape[0] != bucket_TK.shape[0]:
        raise ValueError(
            f"{op}: tokens {x_TD.dtype} {tuple(x_TD.shape)} and bucket_TK {tuple(bucket_TK.shape)} [T, K]; "
            f"need a float type and [T, D] with the same T"
        )
    if weights_TK is not None and (weights_TK.dtype not in FLOATS or weights_TK.shape != bucket_TK.shape):
        raise ValueError(
            f"{op}: weights {weights_TK.dtype} {tuple(weights_TK.shape)} and bucket_TK {tuple(bucket_TK.shape)} [T, K]; "
            f"need a float type and the same shape"
        )
    check_same_device(op, x_TD=x_TD, weights_TK=weights_TK, bucket_TK=bucket_TK)


def check_bucket_rows(op: str, name: str, rows_CD: Tensor, x_TD: Tensor, buckets: Buckets) -> None:
    """One row per bucket, as wide as the tokens and of their dtype."""
    expected = (buckets.experts_C.numel(), x_TD.shape[1])
    if rows_CD.shape != expected or rows_CD.dtype != x_TD.dtype:
        raise ValueError(
            f"{op}: {name} is {rows_CD.dtype} {tuple(rows_CD.shape)}; tokens {x_TD.dtype} {tuple(x_TD.shape)} in "
            f"{expected[0]} buckets need {x_TD.dtype} {expected} [C, D]"
        )
    check_same_device(op, **{name: rows_CD}, x_TD=x_TD)


def check_compensation(op: str, compensation: Tensor | None, x_TD: Tensor) -> None:
    """None, one number or one per column."""
    if compensation is None:
        return
    if compensation.dtype not in FLOATS or compensation.shape not in ((), x_TD.shape[1:]):
        raise ValueError(
            f"{op}: compensation is {compensation.dtype} {tuple(compensation.shape)} and tokens {tuple(x_TD.shape)} [T, D]; "
            f"need a float type and shape () or [D]"
        )
    check_same_device(op, compensation=compensation, x_TD=x_TD)
