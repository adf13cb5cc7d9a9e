"""Rows in one byte per value with fp32 scales, to halve what crosses the wire."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..backend import Backend, choose
from . import reference
from .format import FORMATS, Format

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MAX_BLOCK = 32768
"""Columns of one scale."""


def _resolve_block(op: str, block: int | None, width: int) -> int:
    """Columns of one scale, at least 1 so that rows without columns need no special case."""
    resolved = max(width, 1) if block is None else block
    if not 1 <= resolved <= MAX_BLOCK:
        raise ValueError(f"{op}: one scale for {resolved} columns; 1 to {MAX_BLOCK} are possible, usual is block = 128")
    return resolved


def quantize_rows(
    x_RD: Tensor, format: Literal["e4m3", "int8"], block: int | None = None, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """One byte per value, one scale per block of columns: x is about code * scale, with scale = max |x| / largest code.

    The error of a value is at most scale / 2 for int8, and at most max(|x| / 16, scale / 1024) for e4m3 (half a unit in the
    last of 3 mantissa bits; below 2^-6 its steps are equal), up to fp32 rounding. Values round to the nearest code, ties to
    even. A block of zeros gives zero codes; its scale, like that of any block under 1e-36, is the smallest normal number.
    A block that holds inf or NaN gets zero codes and a NaN scale, so that all of it comes back as NaN: a broken value stays
    visible. Not differentiable.

    Args:
        x_RD: fp16, bf16 or fp32.
        block: columns per scale (128 as in DeepSeek-V3, arXiv 2412.19437, 3.3.2); None = one scale per row. The last block of
            a row may be shorter.

    Returns:
        codes_RD: float8_e4m3fn or int8.
        scales_RB: fp32 [R, ceil(D / block)].

    Raises:
        ValueError: wrong shape, dtype, format or block.
    """
    if format not in FORMATS:
        raise ValueError(f"quantize_rows: format {format!r} is none of {', '.join(map(repr, FORMATS))}")
    if x_RD.ndim != 2 or x_RD.dtype not in FLOATS:
        raise ValueError(f"quantize_rows: rows are {x_RD.dtype} {tuple(x_RD.shape)}; need float16, bfloat16 or float32 [R, D]")
    resolved = _resolve_block("quantize_rows", block, x_RD.shape[1])
    if choose("quantize_rows", backend, x_RD) == "triton":
        # not at the top: triton is absent on some machines without a GPU
        from . import triton_impl

        return triton_impl.quantize_rows(x_RD.detach(), FORMATS[format], resolved)
    return reference.quantize_rows(x_RD.detach(), FORMATS[format], resolved)


def dequantize_rows(
    codes_RD: Tensor, scales_RB: Tensor, dtype: torch.dtype, block: int | None = None, backend: Backend = "auto"
) -> Tensor:
    """code * scale, formed in fp32 and rounded to `dtype` (fp16, bf16 or fp32): x_RD of `quantize_rows` with the same block.

    Raises:
        ValueError: wrong shapes, dtypes, devices or block.
    """
    known = [f.dtype for f in FORMATS.values()]
    if codes_RD.ndim != 2 or codes_RD.dtype not in known or dtype not in FLOATS:
        raise ValueError(
            f"dequantize_rows: codes are {codes_RD.dtype} {tuple(codes_RD.shape)} for {dtype}; need float8_e4m3fn or int8 [R, D] "
            f"for float16, bfloat16 or float32"
        )
    resolved = _resolve_block("dequantize_rows", block, codes_RD.shape[1])
    expected = (codes_RD.shape[0], -(-codes_RD.shape[1] // resolved))
    if scales_RB.shape != expected or scales_RB.dtype != torch.float32:
        raise ValueError(
            f"dequantize_rows: scales are {scales_RB.dtype} {tuple(scales_RB.shape)}; codes {tuple(codes_RD.shape)} in blocks of "
            f"{resolved} columns need float32 {expected}"
        )
    if choose("dequantize_rows", backend, codes_RD) == "triton":
        from . import triton_impl

        return triton_impl.dequantize_rows(codes_RD, scales_RB, resolved, dtype)
    return reference.dequantize_rows(codes_RD, scales_RB, resolved, dtype)


__all__ = ["FORMATS", "Backend", "Format", "dequantize_rows", "quantize_rows"]
