"""grouped_gemm: the torch back end against the specification."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from moefold.kernels.grouped_gemm import Backend, grouped_gemm
from moefold.kernels.sort_tokens import sort_tokens
from numeric import assert_same, with_gradients

pytestmark = pytest.mark.usefixtures("poisoned_memory")
D, N = 8, 16
COUNTS = {"no-rows": [0, 0], "one-expert": [11], "one-takes-all": [0, 13, 0], "empty-experts": [0, 4, 0, 0, 9, 0]}
DTYPES = [
    pytest.param(torch.float64, 1e-13, id="loop-fp64"),
    pytest.param(torch.float32, 2e-6, id="grouped_mm-fp32"),
    pytest.param(torch.bfloat16, 2e-2, id="grouped_mm-bf16"),
]


def run(backend: Backend, inputs: dict[str, Tensor], **options: Tensor) -> dict[str, Tensor]:
    return {n: x.double() for n, x in with_gradients(partial(grouped_gemm, backend=backend, **options), inputs).items()}


def specification(inputs: dict[str, Tensor], **options: Tensor) -> dict[str, Tensor]:
    return run("reference", {name: x.double() for name, x in inputs.items()}, **options)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("extra_rows", [0, 3], ids=["all-rows-used", "rows-beyond-the-counts"])
@pytest.mark.parametrize(("dtype", "rtol"), DTYPES)
def test_equals_the_specification(dtype: torch.dtype, rtol: float, counts: list[int], extra_rows: int) -> None:
    inputs = {"x": torch.randn(sum(counts) + extra_rows, D).to(dtype), "w_END": torch.randn(len(counts), N, D).to(dtype)}
    counts_E = torch.tensor(counts)
    assert_same(run("torch", inputs, counts_E=counts_E), specification(inputs, counts_E=counts_E), rtol)


@pytest.mark.parametrize(("dtype", "rtol"), DTYPES)
def test_rows_are_gathered(dtype: torch.dtype, rtol: float) -> None:
    indices_TK = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    plan = dict(zip(("order_R", "row_TK", "counts_E"), sort_tokens(indices_TK, 4, torch.rand(9, 2) < 0.7), strict=True))
    inputs = {"x": torch.randn(9, D).to(dtype), "w_END": torch.randn(4, N, D).to(dtype)}
    assert_same(run("torch", inputs, **plan), specification(inputs, **plan), rtol)


@pytest.mark.parametrize(("dtype", "rtol"), DTYPES)
def test_rows_beyond_the_counts_may_hold_anything(dtype: torch.dtype, rtol: float) -> None:
    inputs = {"x": torch.randn(9, D).to(dtype), "w_END": torch.randn(2, N, D).to(dtype)}
    want = run("torch", inputs, counts_E=torch.tensor([2, 3]))
    inputs["x"][5:] = torch.nan
    assert_same(run("torch", inputs, counts_E=torch.tensor([2, 3])), want)


def test_strided_weights_and_gradients() -> None:
    inputs = {"x": torch.randn(5, D), "w_END": torch.randn(2, N, D)}
    strided = {name: x.mT.contiguous().mT for name, x in inputs.items()}
    counts_E = torch.tensor([2, 3])

    def transposed(**inputs: Tensor) -> Tensor:
        return grouped_gemm(**inputs, counts_E=counts_E).T

    assert_same(with_gradients(transposed, strided), with_gradients(transposed, inputs), 2e-6)


def test_a_wrong_dim_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(5, 8\).*\(2, 16, 9\).*differ in D"):
        grouped_gemm(torch.zeros(5, D), torch.zeros(2, N, D + 1), torch.tensor([2, 3]))
