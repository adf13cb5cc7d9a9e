"""Production launches of the memory-bound kernels: gate, sort, permute, combine and quantisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from moefold.kernels.permute.triton_impl import permute, unpermute
from moefold.kernels.quant_rows import dequantize_rows, quantize_rows
from moefold.kernels.sort_tokens.triton_impl import sort_tokens
from moefold.kernels.topk_gate import GateRule, topk_gate

T = 32768
BF16 = torch.bfloat16
GATES = {
    # name: experts, bias, rule; after public models
    "softmax-128-8": (128, False, GateRule(top_k=8)),
    "softmax-512-10": (512, False, GateRule(top_k=10)),
    "late-softmax-32-4": (32, False, GateRule(top_k=4, order="topk_softmax")),
    "sigmoid-groups-256-8": (256, True, GateRule(top_k=8, score="sigmoid", scaling_factor=2.5, num_groups=8, top_groups=4)),
}


def meta(*shape: int, dtype: torch.dtype = BF16, leaf: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=leaf)


def backward(outputs: Iterable[Tensor]) -> None:
    """Gradients for all outputs, contiguous as a kernel before them would write them."""
    outputs = list(outputs)
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])


def gate(experts: int, biased: bool, rule: GateRule) -> None:
    bias_E = meta(experts, dtype=torch.float32) if biased else None
    valid_T = meta(T, dtype=torch.bool)
    found = topk_gate(meta(T, experts, dtype=torch.float32, leaf=True), rule, bias_E, valid_T, backend="triton")
    backward((found.weights_TK, found.scores_TE, found.z_T))


def sort(experts: int, k: int, drops: bool) -> None:
    kept_TK = meta(T, k, dtype=torch.bool) if drops else None
    sort_tokens(meta(T, k, dtype=torch.int64), experts, kept_TK)


def move(width: int, k: int, drops: bool = False, adds: bool = False, dtype: torch.dtype = BF16) -> None:
    order_R, row_TK = meta(T * k, dtype=torch.int64), meta(T, k, dtype=torch.int64)
    kept_TK = meta(T, k, dtype=torch.bool) if drops else None
    backward([permute(meta(T, width, dtype=dtype, leaf=True), order_R, row_TK, kept_TK)])
    residual_TD, shared_TD = ((meta(T, width, dtype=dtype) if adds else None) for _ in range(2))
    rows_RD, weights_TK = meta(T * k, width, dtype=dtype, leaf=True), meta(T, k, dtype=torch.float32, leaf=True)
    backward([unpermute(rows_RD, weights_TK, order_R, row_TK, kept_TK, residual_TD, shared_TD)])


def quantize(format: str, width: int, block: int | None) -> None:
    codes_RD, scales_RB = quantize_rows(meta(T, width), format, block, backend="triton")
    dequantize_rows(codes_RD, scales_RB, BF16, block, backend="triton")


def calls() -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {f"gate {name}": partial(gate, *case) for name, case in GATES.items()}
    found["sort 128-8"] = partial(sort, 128, 8, False)
    found["sort 512-10 drops"] = partial(sort, 512, 10, True)
    found["permute 2048-8"] = partial(move, 2048, 8)
    found["permute 2880-4 drops adds"] = partial(move, 2880, 4, drops=True, adds=True)
    found["permute 4096-2 fp32"] = partial(move, 4096, 2, dtype=torch.float32)
    found["quantize e4m3 2048 rows"] = partial(quantize, "e4m3", 2048, None)
    found["quantize e4m3 7168 blocks"] = partial(quantize, "e4m3", 7168, 128)
    found["quantize int8 7168 rows"] = partial(quantize, "int8", 7168, None)
    return found
