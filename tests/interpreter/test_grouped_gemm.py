"""The ragged products in Triton's interpreter against their specification in fp64: outputs and every gradient by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from moefold.kernels.grouped_gemm import grouped_gemm as public
from moefold.kernels.grouped_gemm import reference
from moefold.kernels.grouped_gemm.launch import make_plan
from moefold.kernels.grouped_gemm.tiles import Tile, Tiles, choose_tiles
from moefold.kernels.grouped_gemm.triton_impl import grouped_gemm, grouped_swiglu, grouped_weight_grad
from moefold.kernels.sort_tokens import sort_tokens
from numeric import assert_same, with_gradients

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TILES = Tiles(16, *(4 * [Tile(32, 16, 4, 2)]), 32)
"""Small, so that a few rows and columns are several tiles and rests of tiles."""
COUNTS = {
    "no-rows": [0, 0, 0],
    "one-expert": [21],
    "one-takes-all": [0, 40, 0, 0],
    "tiles-and-one": [16, 17, 15, 1],
    "empty-experts": [0, 4, 0, 0, 33, 0],
}
D, N = 24, 40
RTOL = 2e-6


def tensors(counts: list[int], extra_rows: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"x": (sum(counts) + extra_rows, D), "w_END": (len(counts), N, D)}
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def run(fn: Callable[..., Tensor], inputs: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: x.double() for name, x in with_gradients(fn, {n: x.to(dtype) for n, x in inputs.items()}).items()}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("extra_rows", [0, 3], ids=["all-rows-used", "rows-beyond-the-counts"])
def test_equals_the_specification(counts: list[int], extra_rows: int) -> None:
    inputs, counts_E = tensors(counts, extra_rows), torch.tensor(counts)
    want = run(partial(reference.grouped_gemm, counts_E=counts_E), inputs)
    assert_same(run(partial(grouped_gemm, counts_E=counts_E, tiles=TILES), inputs, torch.float32), want, RTOL)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=["fp16", "bf16"])
def test_16_bit_inputs_are_summed_in_fp32(dtype: torch.dtype, rtol: float) -> None:
    inputs, counts_E = tensors([19, 0, 9], dtype=dtype), torch.tensor([19, 0, 9])
    want = run(partial(reference.grouped_gemm, counts_E=counts_E), inputs)
    assert_same(run(partial(grouped_gemm, counts_E=counts_E, tiles=TILES), inputs, dtype), want, rtol)


def test_the_production_tiles() -> None:
    inputs, counts_E = tensors([70, 3]), torch.tensor([70, 3])
    want = run(partial(reference.grouped_gemm, counts_E=counts_E), inputs)
    assert_same(run(partial(grouped_gemm, counts_E=counts_E), inputs, torch.float32), want, RTOL)


def plan(T: int, K: int, E: int, drop: bool) -> tuple[Tensor, Tensor, Tensor]:
    indices_TK = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    return sort_tokens(indices_TK, E, torch.rand(T, K) < 0.7 if drop else None)


@pytest.mark.parametrize("drop", [False, True], ids=["all-kept", "some-dropped"])
@pytest.mark.parametrize(("T", "K", "E"), [(30, 3, 4), (17, 4, 4), (33, 1, 1)], ids=["usual", "all-experts", "one-expert"])
def test_rows_are_gathered(T: int, K: int, E: int, drop: bool) -> None:
    order_R, row_TK, counts_E = plan(T, K, E, drop)
    inputs = {"x": torch.randn(T, D), "w_END": torch.randn(E, N, D)}
    options = {"counts_E": counts_E, "order_R": order_R, "row_TK": row_TK}
    want = run(partial(reference.grouped_gemm, **options), inputs)
    assert_same(run(partial(grouped_gemm, **options, tiles=TILES), inputs, torch.float32), want, RTOL)


@pytest.mark.parametrize("gather", [False, True], ids=["rows", "tokens"])
def test_swiglu(gather: bool) -> None:
    order_R, row_TK, counts_E = plan(15, 2, 3, drop=True)
    x, w13_E2FD = torch.randn(15 if gather else 30, D), torch.randn(3, 2, 20, D)
    options = {"counts_E": counts_E} | ({"order_R": order_R, "row_TK": row_TK} if gather else {})
    got = grouped_swiglu(x, w13_E2FD, **options, tiles=TILES)
    want = reference.grouped_swiglu(x.double(), w13_E2FD.double(), **options)
    names = ("pre_RF2", "hidden_RF")
    assert_same({n: t.double() for n, t in zip(names, got, strict=True)}, dict(zip(names, want, strict=True)), RTOL)


@pytest.mark.parametrize("gather", [False, True], ids=["rows", "tokens"])
def test_weight_gradient(gather: bool) -> None:
    order_R, row_TK, counts_E = plan(15, 2, 3, drop=True)
    grad_RN, x = torch.randn(30, N), torch.randn(15 if gather else 30, D)
    options = {"counts_E": counts_E} | ({"order_R": order_R, "row_TK": row_TK} if gather else {})
    got = grouped_weight_grad(grad_RN, x, **options, tiles=TILES).double()
    assert_same({"grad": got}, {"grad": reference.grouped_weight_grad(grad_RN.double(), x.double(), **options)}, RTOL)


def test_rows_beyond_the_counts_are_not_read() -> None:
    inputs, counts_E = tensors([5, 0, 18], extra_rows=20), torch.tensor([5, 0, 18])
    fn = partial(grouped_gemm, counts_E=counts_E, tiles=TILES)
    want = run(fn, inputs, torch.float32)
    inputs["x"][23:] = torch.nan
    got = run(fn, inputs, torch.float32)
    assert_same(got, want)
    assert not got["output"][23:].any()
    assert not got["gradient of x"][23:].any()


def test_strided_tensors_and_gradients() -> None:
    inputs, counts_E = tensors([9, 14]), torch.tensor([9, 14])
    strided = {name: x.mT.contiguous().mT for name, x in inputs.items()}

    def transposed(**inputs: Tensor) -> Tensor:
        return grouped_gemm(**inputs, counts_E=counts_E, tiles=TILES).T

    assert_same(run(transposed, strided, torch.float32), run(transposed, inputs, torch.float32))
    views = inputs | {"x": torch.cat([inputs["x"], torch.full((23, 3), torch.nan)], 1)[:, :D]}
    assert not views["x"].is_contiguous()
    assert_same(run(transposed, views, torch.float32), run(transposed, inputs, torch.float32))


def test_reruns_are_bitwise_equal() -> None:
    inputs, fn = tensors([33, 0, 18]), partial(grouped_gemm, counts_E=torch.tensor([33, 0, 18]), tiles=TILES)
    assert_same(run(fn, inputs, torch.float32), run(fn, inputs, torch.float32))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("extra_rows", [0, 35])
def test_tiles_cover_every_row_once(counts: list[int], extra_rows: int) -> None:
    num_rows = sum(counts) + extra_rows
    tiles = make_plan(torch.tensor(counts), num_rows, 16).tiles_3M.T.tolist()
    expert_of_row = [e for e, count in enumerate(counts) for _ in range(count)] + [len(counts)] * extra_rows
    covered = [(row, expert) for expert, first, end in tiles for row in range(first, end)]
    assert covered == list(enumerate(expert_of_row))
    assert all(end - first <= 16 for _, first, end in tiles)


def test_counts_that_name_too_many_rows_stay_inside() -> None:
    tiles = make_plan(torch.tensor([10, 50, 7]), 20, 16).tiles_3M.T.tolist()
    assert [(first, end) for _, first, end in tiles if first < end] == [(0, 10), (10, 20)]


def test_tiles_are_chosen_by_mean_rows() -> None:
    few, many = (choose_tiles(torch.bfloat16, rows, experts=8).rows for rows in (8 * 20, 8 * 1000))
    assert few < many


def test_the_public_function_takes_the_back_end() -> None:
    inputs, counts_E = tensors([9, 14]), torch.tensor([9, 14])
    assert_same(run(partial(public, counts_E=counts_E, backend="triton"), inputs, torch.float32),
                run(partial(public, counts_E=counts_E), inputs), RTOL)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"w_END": torch.zeros(2, N, D, dtype=torch.float16)}, r"torch.float32 .*torch.float16 .*one dtype"),
        ({"w_END": torch.zeros(2, N, D + 1)}, r"\(6, 24\).*\(2, 40, 25\).*differ in D"),
        ({"w_END": torch.zeros(3, N, D)}, r"\(3, 40, 24\).*counts torch.int64 \(2,\)"),
        ({"counts_E": torch.tensor([3, 3], dtype=torch.int32)}, r"counts torch.int32"),
        ({"w_END": torch.zeros(2, N, D, device="meta")}, r"weights on meta"),
        ({"order_R": torch.arange(6)}, r"come together"),
        ({"order_R": torch.arange(5), "row_TK": torch.zeros(3, 2, dtype=torch.int64)}, r"\(5,\).*\(3, 2\)"),
        ({"order_R": torch.arange(6), "row_TK": torch.zeros(3, 2, dtype=torch.int64)}, r"\(6, 24\) has 6 rows; 3"),
        ({"x": torch.zeros(6, D).int(), "w_END": torch.zeros(2, N, D).int()}, r"int32; the Triton kernels take"),
    ],
    ids=["dtypes", "dims", "experts", "counts", "devices", "half-a-plan", "plan-shapes", "tokens", "int32"],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Tensor], says: str) -> None:
    good = {"x": torch.zeros(6, D), "w_END": torch.zeros(2, N, D), "counts_E": torch.tensor([3, 3])}
    with pytest.raises(ValueError, match=says):
        grouped_gemm(**good | changes)
