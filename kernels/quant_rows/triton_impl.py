"""quant_rows in Triton: one pass over the rows. A program holds whole blocks, so that none is read twice.

Codes are bitwise those of the reference: divisions and the rounding to a code are exact, by operations that compiled and
interpreted kernels agree on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import cdiv, check_devices, interpreting, next_power_of_2, row_major
from .format import Format

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
TO_WHOLE = tl.constexpr(1.5 * 2.0**23)
"""Adding this leaves no bits for a fraction: the sum is rounded to a whole number, ties to even."""
TO_SMALLEST_E4M3 = tl.constexpr(1.5 * 2.0**14)
"""Adding this rounds to multiples of 2^-9, the distance of e4m3's codes below 2^-6."""


def choose_groups(lanes: int) -> tuple[int, int]:
    """Blocks per program and warps: 32 values per thread, which is four loads of 16 bytes in bf16."""
    warps = min(16, max(4, lanes // 1024))
    return max(1, 32 * 32 * warps // lanes), warps


@triton.jit
def _block_offsets(  # type: ignore[no-untyped-def]
    R, D, stride, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr
):
    """(block number, offsets in x, offsets in rows without gaps, mask) of this program's blocks."""
    n = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, LANES)
    row, column = n // BLOCKS, (n % BLOCKS)[:, None] * BLOCK + lane[None, :]
    inside = (row < R)[:, None] & (lane < BLOCK)[None, :] & (column < D)
    return n, row[:, None] * stride + column, row[:, None] * D + column, inside


@triton.jit
def _nearest_e4m3(x):  # type: ignore[no-untyped-def]
    """fp32 rounded to the nearest value of e4m3, ties to even; |x| <= 448. The cast that follows is then exact anywhere."""
    bits = x.to(tl.int32, bitcast=True)
    # keep 3 of 23 mantissa bits: add just under half of the last one kept, plus itself for ties to even; a carry may
    # run into the exponent, which is right
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    small = ((x + TO_SMALLEST_E4M3) - TO_SMALLEST_E4M3).to(tl.int32, bitcast=True)
    # what is rounded to zero keeps its sign, as in a cast
    rounded = tl.where(tl.abs(x) < 0.015625, small | (bits & -0x80000000), normal)
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x, codes, scales, R, D, stride, LARGEST: tl.constexpr, INTEGER: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    n, source, target, inside = _block_offsets(R, D, stride, BLOCK, BLOCKS, GROUPS, LANES)
    values = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
    size = tl.abs(values)
    # infinite and NaN sizes are counted: what a maximum makes of NaN differs between machines
    broken = tl.sum((~(size < float("inf"))).to(tl.int32), 1) > 0
    largest = tl.where(broken, 0.0, tl.max(tl.where(size < float("inf"), size, 0.0), 1))
    scale = tl.maximum(tl.div_rn(largest, tl.full((GROUPS,), LARGEST, tl.float32)), TINY)
    scaled = tl.div_rn(tl.where(broken[:, None], 0.0, values), tl.broadcast_to(scale[:, None], (GROUPS, LANES)))
    scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
    if INTEGER:
        rounded = (scaled + TO_WHOLE) - TO_WHOLE
    elif UPCAST:
        # the interpreter's cast does not round to nearest
        rounded = _nearest_e4m3(scaled)
    else:
        rounded = scaled
    tl.store(codes + target, rounded.to(codes.dtype.element_ty), mask=inside)
    tl.store(scales + n, tl.where(broken, float("nan"), scale), mask=n < R * BLOCKS)


@triton.jit
def _dequantize(  # type: ignore[no-untyped-def]
    codes, scales, out, R, D, stride,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    n, source, target, inside = _block_offsets(R, D, stride, BLOCK, BLOCKS, GROUPS, LANES)
    scale = tl.load(scales + n, mask=n < R * BLOCKS, other=0.0)
    values = tl.load(codes + source, mask=inside).to(tl.float32) * scale[:, None]
    tl.store(out + target, values.to(out.dtype.element_ty), mask=inside)


def quantize_rows(x_RD: Tensor, format: Format, block: int, groups: int | None = None) -> tuple[Tensor, Tensor]:
    """As the reference; `groups` is the number of blocks per program, a power of two."""
    check_devices("quantize_rows", x_RD=x_RD)
    (R, D), blocks, lanes = x_RD.shape, cdiv(x_RD.shape[1], block), next_power_of_2(block)
    codes_RD = torch.empty(R, D, dtype=format.dtype, device=x_RD.device)
    scales_RB = torch.empty(R, blocks, dtype=torch.float32, device=x_RD.device)
    if codes_RD.numel():
        x_RD = row_major(x_RD)
        chosen, warps = choose_groups(lanes)
        flags = {"BLOCK": block, "BLOCKS": blocks, "GROUPS": groups or chosen, "LANES": lanes, "UPCAST": interpreting()}
        grid = (cdiv(R * blocks, groups or chosen),)
        strides = (R, D, x_RD.stride(0))
        _quantize[grid](
            x_RD, codes_RD, scales_RB, *strides, LARGEST=format.largest, INTEGER=format.integer, num_warps=warps, **flags
        )
    return codes_RD, scales_RB


def dequantize_rows(codes_RD: Tensor, scales_RB: Tensor, block: int, dtype: torch.dtype, groups: int | None = None) -> Tensor:
    """As the reference; `groups` is the number of blocks per program, a power of two."""
    check_devices("dequantize_rows", codes_RD=codes_RD, scales_RB=scales_RB)
    (R, D), lanes = codes_RD.shape, next_power_of_2(block)
    out_RD = torch.empty(R, D, dtype=dtype, device=codes_RD.device)
    if out_RD.numel():
        codes_RD, blocks = row_major(codes_RD), scales_RB.shape[1]
        chosen, warps = choose_groups(lanes)
        flags = {"BLOCK": block, "BLOCKS": blocks, "GROUPS": groups or chosen, "LANES": lanes}
        grid = (cdiv(R * blocks, groups or chosen),)
        _dequantize[grid](codes_RD, scales_RB.contiguous(), out_RD, R, D, codes_RD.stride(0), num_warps=warps, **flags)
    return out_RD
