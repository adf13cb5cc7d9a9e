"""Production launches of LSH compression: codes, means of buckets, restored rows and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moefold.kernels.lsh import Buckets, centroids, cross_polytope_codes, farther_than, restore

T = 32768
RATE = 5
"""Rows per bucket: the paper's rate of about 20 %."""


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, leaf: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=leaf)


def buckets(k: int, drops: bool = False, experts: int = 128) -> Buckets:
    integers, C = partial(meta, dtype=torch.int64), T * k // RATE
    kept_TK = meta(T, k, dtype=torch.bool) if drops else None
    return Buckets(integers(T, k), kept_TK, integers(T * k), integers(C + 1), integers(experts), integers(C), T * k)


def codes(width: int, hashes: int, directions: int, dtype: torch.dtype = torch.bfloat16) -> None:
    cross_polytope_codes(meta(T, width, dtype=dtype), meta(hashes, directions, width), backend="triton")


def means(width: int, k: int, weighted: bool, drops: bool = False) -> None:
    x_TD, weights_TK = meta(T, width, leaf=True), meta(T, k, dtype=torch.float32, leaf=True)
    c_CD = centroids(x_TD, buckets(k, drops), weights_TK if weighted else None, backend="triton")
    c_CD.backward(torch.empty_like(c_CD))


def rows(width: int, k: int, compensated: bool, drops: bool = False) -> None:
    plan = buckets(k, drops)
    C = len(plan.experts_C)
    expert_CD, c_CD, x_TD = (meta(n, width, leaf=True) for n in (C, C, T))
    weights_TK, a_D = meta(T, k, dtype=torch.float32, leaf=True), meta(width, dtype=torch.float32, leaf=True)
    y_TD = restore(expert_CD, c_CD, x_TD, weights_TK, plan, a_D if compensated else None, backend="triton")
    y_TD.backward(torch.empty_like(y_TD))


def radius(width: int, k: int) -> None:
    plan = buckets(k)
    farther_than(meta(T, width), meta(len(plan.experts_C), width), plan, 0.5, backend="triton")


def calls() -> dict[str, Callable[[], object]]:
    return {
        "lsh codes 2048 16x8": partial(codes, 2048, 16, 8),
        "lsh codes 2048 8x32": partial(codes, 2048, 8, 32),
        "lsh codes 768 6x64 fp32": partial(codes, 768, 6, 64, torch.float32),
        "lsh centroids 2048-8": partial(means, 2048, 8, False),
        "lsh centroids 2880-4 weighted drops": partial(means, 2880, 4, True, True),
        "lsh restore 2048-8": partial(rows, 2048, 8, True),
        "lsh restore 2880-4 plain drops": partial(rows, 2880, 4, False, True),
        "lsh restore 7168-8 drops": partial(rows, 7168, 8, True, True),
        "lsh radius 2048-8": partial(radius, 2048, 8),
    }
