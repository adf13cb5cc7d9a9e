"""quant_rows keeps its error bounds on every kind of row, and broken values stay visible."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefold.kernels.quant_rows import FORMATS, dequantize_rows, quantize_rows

EACH_FORMAT = pytest.mark.parametrize("format", FORMATS)
ROUNDING = 1 + 2.0**-20
"""Some fp32 roundings on top of the bounds."""


def there_and_back(x_RD: Tensor, format: str, block: int | None) -> tuple[Tensor, Tensor]:
    """The rows that come back, and every value's scale."""
    codes_RD, scales_RB = quantize_rows(x_RD, format, block)
    back_RD = dequantize_rows(codes_RD, scales_RB, torch.float32, block)
    return back_RD, scales_RB.repeat_interleave(block or x_RD.shape[1], 1)[:, : x_RD.shape[1]]


def bound(x_RD: Tensor, scales_RD: Tensor, format: str) -> Tensor:
    """What the public function says of a value's error."""
    if format == "int8":
        return scales_RD / 2
    return torch.maximum(x_RD.abs() / 16, scales_RD / 1024)


@EACH_FORMAT
@pytest.mark.parametrize("block", [None, 128, 7])
@given(seed=st.integers(0, 1 << 16), exponent=st.integers(-44, 38), spread=st.integers(0, 12))
@example(seed=7, exponent=-1, spread=7)
@settings(max_examples=25, deadline=None)
def test_error_bounds(format: str, block: int | None, seed: int, exponent: int, spread: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_RD = (torch.rand(4, 300, generator=generator) - 0.5) * torch.rand(4, 300, generator=generator) ** spread * 10.0**exponent
    back_RD, scales_RD = there_and_back(x_RD, format, block)
    # dividing by the scale and multiplying again rounds in fp32, in proportion to the value
    rounding_RD = x_RD.abs() * 2.0**-22
    assert ((back_RD - x_RD).abs() <= bound(x_RD, scales_RD, format) * ROUNDING + rounding_RD).all()
    assert (scales_RD <= x_RD.abs().amax() / FORMATS[format].largest * ROUNDING + 1.2e-38).all(), "no wider than needed"


@EACH_FORMAT
def test_the_largest_of_a_block_comes_back(format: str) -> None:
    x_RD = torch.randn(20, 256)
    back_RD, _ = there_and_back(x_RD, format, 64)
    at = x_RD.view(20, 4, 64).abs().argmax(-1, keepdim=True)
    largest, came_back = (rows.view(20, 4, 64).gather(-1, at) for rows in (x_RD, back_RD))
    torch.testing.assert_close(came_back, largest, rtol=1e-6, atol=0)


@EACH_FORMAT
def test_blocks_have_scales_of_their_own(format: str) -> None:
    x_RD = torch.ones(1, 256)
    x_RD[:, 128:] = 1e-6
    back_RD, _ = there_and_back(x_RD, format, 128)
    torch.testing.assert_close(back_RD, x_RD, rtol=1e-6, atol=0)
    assert not there_and_back(x_RD, format, None)[0][:, 128:].any(), "one scale per row loses the small half"


@EACH_FORMAT
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "minus-inf"])
def test_a_broken_value_breaks_its_block_and_no_other(format: str, broken: float) -> None:
    x_RD = torch.randn(2, 32)
    x_RD[0, 20] = broken
    back_RD, _ = there_and_back(x_RD, format, 16)
    assert back_RD[0, 16:].isnan().all()
    assert back_RD[0, :16].isfinite().all() and back_RD[1].isfinite().all()


@EACH_FORMAT
@pytest.mark.parametrize("width", [0, 5])
@pytest.mark.parametrize("rows", [0, 3])
def test_zeros_and_empty_rows(format: str, rows: int, width: int) -> None:
    back_RD, _ = there_and_back(torch.zeros(rows, width), format, 2)
    assert torch.equal(back_RD, torch.zeros(rows, width))


CODES, SCALES = quantize_rows(torch.ones(2, 8), "int8", 4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.ones(2, 8), "fp4"), "format 'fp4' is none of 'e4m3', 'int8'"),
        ((torch.ones(8), "int8"), r"float32 \(8,\); need"),
        ((torch.ones(2, 8).double(), "int8"), "float64"),
        ((torch.ones(2, 8), "int8", 0), "one scale for 0 columns"),
        ((torch.ones(2, 40_000), "int8"), "one scale for 40000 columns"),
        ((torch.ones(2, 8), "int8", None, "cuda"), "backend 'cuda'"),
    ],
    ids=["format", "shape", "dtype", "block", "too-wide", "backend"],
)
def test_quantize_names_what_does_not_fit(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        quantize_rows(*arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((CODES.float(), SCALES, torch.float32, 4), "codes are torch.float32"),
        ((CODES, SCALES, torch.int32, 4), "for torch.int32"),
        ((CODES, SCALES, torch.float32, 8), r"scales are torch.float32 \(2, 2\); codes \(2, 8\) in blocks of 8 .*\(2, 1\)"),
        ((CODES, SCALES.half(), torch.float32, 4), "scales are torch.float16"),
    ],
    ids=["codes", "dtype", "scales-shape", "scales-dtype"],
)
def test_dequantize_names_what_does_not_fit(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dequantize_rows(*arguments)


def test_the_public_functions_need_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from moefold.kernels.quant_rows import quantize_rows\n"
        "from moefold.kernels.topk_gate import GateRule, topk_gate\n"
        "quantize_rows(torch.ones(2, 4), 'int8'); topk_gate(torch.zeros(2, 4), GateRule(top_k=2))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
