"""The quantisation kernels give bitwise the specification's codes and scales, and its rows back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from moefold.kernels.quant_rows import FORMATS, dequantize_rows, quantize_rows, triton_impl
from numeric import assert_same

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EACH_FORMAT = pytest.mark.parametrize("format", FORMATS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])


def codes_and_scales(x_RD: Tensor, format: str, block: int | None, backend: str) -> dict[str, Tensor]:
    """As whole numbers, so that NaN scales compare too."""
    codes_RD, scales_RB = quantize_rows(x_RD, format, block, backend)
    assert codes_RD.dtype == FORMATS[format].dtype
    return {"codes": codes_RD.view(torch.uint8), "scales": scales_RB.nan_to_num(-1)}


def assert_like_the_specification(x_RD: Tensor, format: str, block: int | None) -> None:
    got, want = (codes_and_scales(x_RD, format, block, backend) for backend in ("triton", "torch"))
    assert_same(got, want)
    codes_RD, scales_RB = quantize_rows(x_RD, format, block, "torch")
    back, back_want = (dequantize_rows(codes_RD, scales_RB, x_RD.dtype, block, name) for name in ("triton", "torch"))
    assert torch.equal(back.isnan(), back_want.isnan())
    # the interpreter cuts bf16 off instead of rounding it: one unit in the last of 8 bits
    rtol = 2.0**-7 if x_RD.dtype == torch.bfloat16 else 0.0
    assert_same({"rows": back.nan_to_num(0)}, {"rows": back_want.nan_to_num(0)}, rtol)


@EACH_FORMAT
@DTYPES
@pytest.mark.parametrize(
    ("rows", "width", "block"),
    [(0, 8, None), (4, 0, None), (1, 1, None), (5, 75, None), (7, 128, 128), (3, 300, 128), (9, 50, 16), (2, 40, 7)],
    ids=["no-rows", "no-columns", "one", "rows", "whole-block", "ragged-blocks", "small-blocks", "odd-blocks"],
)
def test_equals_the_specification(rows: int, width: int, block: int | None, dtype: torch.dtype, format: str) -> None:
    x_RD = torch.randn(rows, width) * 10.0 ** torch.randint(-3, 3, (rows, 1))
    assert_like_the_specification(x_RD.to(dtype), format, block)


@EACH_FORMAT
def test_every_code_and_every_tie(format: str) -> None:
    # scale 1: the values are codes, the middles between neighbours, and their neighbours in fp32
    largest = FORMATS[format].largest
    codes = torch.arange(256, dtype=torch.uint8).view(FORMATS[format].dtype).float()
    codes = codes[codes.isfinite() & (codes.abs() <= largest)].sort().values
    middles = (codes[1:] + codes[:-1]) / 2
    values = torch.cat([codes, middles, middles.nextafter(torch.tensor(1e9)), middles.nextafter(torch.tensor(-1e9))])
    assert quantize_rows(values[None], format)[1].item() == 1
    assert_like_the_specification(values[None], format, None)


@EACH_FORMAT
def test_zeros_tiny_huge_and_broken_blocks(format: str) -> None:
    x_RD = torch.randn(9, 64)
    x_RD[0] = 0
    x_RD[1] = 1e-42
    x_RD[2] *= 1e-37
    x_RD[3] = torch.finfo(torch.float32).max
    x_RD[4, 3], x_RD[5, 40], x_RD[6, 60], x_RD[7, :2] = torch.nan, torch.inf, -torch.inf, torch.tensor([torch.nan, torch.inf])
    for block in (None, 32):
        assert_like_the_specification(x_RD, format, block)


@EACH_FORMAT
def test_strided_rows(format: str) -> None:
    assert_like_the_specification(torch.randn(20, 6).T, format, 8)
    assert_like_the_specification(torch.randn(6, 40)[:, 3:23], format, 8)
    codes_RD, scales_RB = quantize_rows(torch.randn(6, 40), format, 8)
    got, want = (dequantize_rows(codes_RD[:, :24], scales_RB[:, :3], torch.float32, 8, name) for name in ("triton", "torch"))
    assert_same({"rows": got}, {"rows": want})


@EACH_FORMAT
def test_other_tiles_are_bitwise_equal(format: str) -> None:
    x_RD = torch.randn(13, 40)
    (codes, scales), (other_codes, other_scales) = (
        triton_impl.quantize_rows(x_RD, FORMATS[format], 16, groups) for groups in (2, 64)
    )
    assert torch.equal(codes.view(torch.uint8), other_codes.view(torch.uint8))
    assert torch.equal(scales, other_scales)
    rows, other_rows = (triton_impl.dequantize_rows(codes, scales, 16, torch.float32, groups) for groups in (2, 64))
    assert torch.equal(rows, other_rows)


def test_offsets_beyond_two_to_the_31() -> None:
    # three rows, 2^30 apart, in memory of which only these are ever touched: numpy's, as torch's would be poisoned
    codes_RD = torch.from_numpy(np.empty(2**31 + 8, dtype=np.int8)).as_strided((3, 8), (2**30, 1))
    codes_RD.copy_(torch.arange(24).view(3, 8))
    rows_RD = dequantize_rows(codes_RD, torch.ones(3, 1), torch.float32, backend="triton")
    assert rows_RD.tolist() == torch.arange(24).view(3, 8).tolist()


def test_devices_are_named() -> None:
    codes_RD, scales_RB = quantize_rows(torch.randn(2, 4), "int8")
    with pytest.raises(ValueError, match="codes_RD on cpu, scales_RB on meta"):
        dequantize_rows(codes_RD, scales_RB.to("meta"), torch.float32, backend="triton")
