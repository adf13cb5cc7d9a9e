"""Rows on the wire in one byte per value: what an exchange sends in place of its rows, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kernels.backend import Backend
from ..kernels.quant_rows import FLOATS, dequantize_rows, quantize_rows
from ..moe.config import MoEConfig
from ..moe.errors import CommError


@dataclass(frozen=True)
class Wire:
    """A row of D values as D + 4 ceil(D / block) bytes (`CompressConfig.row_bytes`): a code for each value and then the fp32
    scales, so that one exchange takes both, and as bytes, so that every transport does.

    Every row of an exchange is sent so, also those that a rank sends to itself: then a row arrives as the same numbers wherever
    its expert lives, and results are the same for all degrees of expert parallelism over 1, where nothing is exchanged. The
    gradient of the rounding is taken as the identity (straight through), and gradients, on their way back, are rounded like
    rows. So dispatch and combine are, forward and backward; DeepSeek-V3 (arXiv 2412.19437, 3.3.2) keeps combine in bf16.

    format, block: see `quantize_rows`, also for the bounds of the error. kernels: back end of the rounding.
    """

    format: Literal["int8", "e4m3"]
    block: int | None = 128
    kernels: Backend = "auto"

    @staticmethod
    def of(config: MoEConfig) -> Wire | None:
        """The wire of a layer, None where rows travel as they are."""
        c = config.compress
        return None if c.wire == "none" else Wire(c.wire, c.wire_block, config.kernels)

    def pack(self, x_RD: Tensor) -> Tensor:
        """uint8 [R, D + 4 ceil(D / block)].

        Raises:
            CommError: rows that are not float16, bfloat16 or float32.
        """
        if x_RD.dtype not in FLOATS:
            raise CommError(
                f"model.moe.compress.wire = {self.format!r} sends float16, bfloat16 or float32 rows in one byte per value, but "
                f"these are {x_RD.dtype}: set train.precision to 'bf16' or 'fp32', or wire to 'none' to send them exactly"
            )
        codes_RD, scales_RB = quantize_rows(x_RD, self.format, self.block, self.kernels)
        return torch.cat([codes_RD.view(torch.uint8), scales_RB.view(torch.uint8)], 1)

    def unpack(self, bytes_RW: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        """Rows [R, dim] from what `pack` made of them."""
        codes = torch.int8 if self.format == "int8" else torch.float8_e4m3fn
        # a copy: amid the bytes of a row, scales are not at addresses that four bytes may be read from
        scales = bytes_RW[:, dim:].clone(memory_format=torch.contiguous_format).view(-1).view(torch.float32)
        scales_RB = scales.view(bytes_RW.shape[0], (bytes_RW.shape[1] - dim) // 4)
        return dequantize_rows(bytes_RW[:, :dim].view(codes), scales_RB, dtype, self.block, self.kernels)
