"""Production launches of grouped_gemm and moe_mlp."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moefold.kernels.grouped_gemm.triton_impl import grouped_gemm
from moefold.kernels.moe_mlp.triton_impl import moe_layer_mlp, moe_mlp


class Shape(NamedTuple):
    """Tokens, model dimension, hidden dimension, experts, choices."""

    T: int
    D: int
    F: int
    E: int
    K: int


QWEN3_30B = Shape(32768, 2048, 768, 128, 8)
GPT_OSS_20B = Shape(32768, 2880, 2880, 32, 4)
"""Dimensions that are no multiples of a tile."""
FEW_ROWS = Shape(512, 2048, 768, 128, 8)
"""32 rows per expert: the small tiles."""


def empty(*shape: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def weights(s: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return empty(s.E, 2, s.F, s.D, dtype=dtype), empty(s.E, s.D, s.F, dtype=dtype)


def plan(s: Shape) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(empty(*shape, dtype=torch.int64, grad=False) for shape in ((s.T * s.K,), (s.T, s.K), (s.E,)))  # type: ignore[return-value]


def backward(y: Tensor) -> None:
    y.backward(torch.empty_like(y))


def rows(s: Shape, dtype: torch.dtype) -> None:
    backward(moe_mlp(empty(s.T * s.K, s.D, dtype=dtype), *weights(s, dtype), plan(s)[2]))


def layer(s: Shape, dtype: torch.dtype) -> None:
    x, router = empty(s.T, s.D, dtype=dtype), empty(s.T, s.K, dtype=torch.float32)
    backward(moe_layer_mlp(x, router, *plan(s), *weights(s, dtype)))


def product(s: Shape, dtype: torch.dtype) -> None:
    order, row, counts = plan(s)
    backward(grouped_gemm(empty(s.T, s.D, dtype=dtype), empty(s.E, s.F, s.D, dtype=dtype), counts, order, row))


def calls() -> dict[str, Callable[[], object]]:
    return {
        "moe_mlp qwen3-30b bf16": partial(rows, QWEN3_30B, torch.bfloat16),
        "moe_mlp gpt-oss-20b bf16": partial(rows, GPT_OSS_20B, torch.bfloat16),
        "moe_layer_mlp qwen3-30b bf16": partial(layer, QWEN3_30B, torch.bfloat16),
        "moe_layer_mlp qwen3-30b fp16": partial(layer, QWEN3_30B, torch.float16),
        "moe_layer_mlp few-rows bf16": partial(layer, FEW_ROWS, torch.bfloat16),
        "moe_mlp qwen3-30b fp32": partial(rows, QWEN3_30B, torch.float32),
        "grouped_gemm gather bf16": partial(product, QWEN3_30B, torch.bfloat16),
    }
