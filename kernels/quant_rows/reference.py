"""Specification of `quantize_rows` and `dequantize_rows` in torch; the way on CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .format import Format


def quantize_rows(x_RD: Tensor, format: Format, block: int) -> tuple[Tensor, Tensor]:
    """As the public function, with the block resolved to a number of columns."""
    (R, D), blocks = x_RD.shape, -(-x_RD.shape[1] // block)
    padded_RBN = torch.nn.functional.pad(x_RD.float(), (0, blocks * block - D)).view(R, blocks, block)
    # amax of inf or NaN: both make the scale NaN, and NaN stays NaN on the way back
    largest_RB = padded_RBN.abs().amax(-1)
    scales_RB = (largest_RB / format.largest).clamp_min(torch.finfo(torch.float32).tiny)
    scales_RB = scales_RB.masked_fill(~largest_RB.isfinite(), torch.nan)
    scaled_RBN = torch.where(scales_RB.isnan()[..., None], 0.0, padded_RBN / scales_RB[..., None])
    scaled_RBN = scaled_RBN.clamp(-format.largest, format.largest)
    codes_RBN = (scaled_RBN.round() if format.integer else scaled_RBN).to(format.dtype)
    return codes_RBN.flatten(1)[:, :D].contiguous(), scales_RB


def dequantize_rows(codes_RD: Tensor, scales_RB: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """As the public function, with the block resolved to a number of columns."""
    scales_RD = scales_RB.repeat_interleave(block, 1)[:, : codes_RD.shape[1]]
    return (codes_RD.float() * scales_RD).to(dtype)
