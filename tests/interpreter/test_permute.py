"""The gather kernels against the specifications of permute and unpermute: outputs, every gradient, drops, strides, reruns."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from moefold.kernels import permute as public
from moefold.kernels.permute import reference
from moefold.kernels.permute.triton_impl import choose_tile, permute, unpermute
from moefold.kernels.sort_tokens import sort_tokens
from numeric import assert_same, with_gradients
from row_cases import check_missing_rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPES = pytest.mark.parametrize(
    ("tokens", "k", "num_experts", "width"),
    [(0, 2, 4, 8), (1, 1, 1, 6), (9, 1, 1, 32), (7, 4, 4, 75), (40, 2, 8, 16), (17, 8, 32, 33)],
    ids=["no-tokens", "one-row", "one-expert", "every-expert", "whole-tiles", "ragged-tiles"],
)
DROPS = pytest.mark.parametrize("drops", [False, True], ids=["dropless", "drops"])
DTYPES = pytest.mark.parametrize(
    ("dtype", "rtol"),
    # the interpreter cuts bf16 off instead of rounding it
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)],
    ids=["fp64", "fp32", "fp16", "bf16"],
)
TILE = (8, 16)


def plan(tokens: int, k: int, num_experts: int, drops: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """order_R, row_TK, counts_E, kept_TK of random choices."""
    kept_TK = torch.rand(tokens, k) < 0.6 if drops else None
    return *sort_tokens(torch.rand(tokens, num_experts).argsort(-1)[:, :k], num_experts, kept_TK), kept_TK


@SHAPES
@DROPS
@DTYPES
def test_permute_equals_the_specification(
    tokens: int, k: int, num_experts: int, width: int, drops: bool, dtype: torch.dtype, rtol: float
) -> None:
    order_R, row_TK, counts_E, kept_TK = plan(tokens, k, num_experts, drops)
    inputs = {"x_TD": torch.randn(tokens, width).to(dtype)}
    got = with_gradients(partial(permute, order_R=order_R, row_TK=row_TK, kept_TK=kept_TK, tile=TILE), inputs)

    def specified(x_TD: Tensor) -> Tensor:
        rows_RD = reference.permute(x_TD, order_R, row_TK)
        travels_R1 = (torch.arange(len(order_R)) < counts_E.sum())[:, None]
        return torch.where(travels_R1, rows_RD, rows_RD.detach())

    want = with_gradients(specified, inputs)
    assert_same(got, want, rtol)
    assert_same({"output": got["output"]}, {"output": want["output"]})


@SHAPES
@DROPS
@DTYPES
def test_unpermute_equals_the_specification(
    tokens: int, k: int, num_experts: int, width: int, drops: bool, dtype: torch.dtype, rtol: float
) -> None:
    order_R, row_TK, _, kept_TK = plan(tokens, k, num_experts, drops)
    weights_TK = torch.rand(tokens, k).to(torch.promote_types(dtype, torch.float32))
    inputs = {"y_RD": torch.randn(tokens * k, width).to(dtype), "weights_TK": weights_TK}
    places = {"order_R": order_R, "row_TK": row_TK, "kept_TK": kept_TK}
    got = with_gradients(partial(unpermute, tile=TILE, **places), inputs)
    assert_same(got, with_gradients(partial(reference.unpermute, **places), inputs), rtol)


@pytest.mark.parametrize("names", [("residual_TD",), ("shared_TD",), ("residual_TD", "shared_TD")], ids="+".join)
def test_residual_and_shared_experts_are_added(names: tuple[str, ...]) -> None:
    order_R, row_TK, _, kept_TK = plan(21, 3, 5, drops=True)
    inputs = {"y_RD": torch.randn(63, 20), "weights_TK": torch.rand(21, 3), **{name: torch.randn(21, 20) for name in names}}
    places = {"order_R": order_R, "row_TK": row_TK, "kept_TK": kept_TK}

    def specified(y_RD: Tensor, weights_TK: Tensor, **adds: Tensor) -> Tensor:
        return reference.unpermute(y_RD, weights_TK, **places) + sum(adds.values())

    assert_same(with_gradients(partial(unpermute, tile=TILE, **places), inputs), with_gradients(specified, inputs), 1e-6)


def test_rows_that_did_not_travel_leak_nowhere() -> None:
    order_R, row_TK, counts_E, kept_TK = plan(20, 3, 5, drops=True)
    end = int(counts_E.sum())
    clean_RD = torch.randn(60, 12)
    dirty_RD = clean_RD.clone()
    dirty_RD[end:] = torch.nan
    weights_TK = torch.rand(20, 3)
    dirty_weights_TK = weights_TK.masked_fill(~kept_TK, torch.nan)
    back = partial(unpermute, order_R=order_R, row_TK=row_TK, kept_TK=kept_TK, tile=TILE)
    got = with_gradients(back, {"y_RD": dirty_RD, "weights_TK": dirty_weights_TK})
    assert_same(got, with_gradients(back, {"y_RD": clean_RD, "weights_TK": weights_TK}))
    assert not got["gradient of y_RD"][end:].any()
    x_TD = torch.randn(20, 12, requires_grad=True)
    grad_dirty, grad_clean = (
        torch.autograd.grad(permute(x_TD, order_R, row_TK, kept_TK, TILE), x_TD, rows)[0] for rows in (dirty_RD, clean_RD)
    )
    assert_same({"gradient of x_TD": grad_dirty}, {"gradient of x_TD": grad_clean})


@pytest.mark.parametrize("share", [0.6, 0.0, 1.0])
def test_rows_that_are_not_kept_may_be_missing(share: float) -> None:
    check_missing_rows(partial(public.permute, backend="triton"), partial(public.unpermute, backend="triton"), share)


def test_strided_inputs_and_expanded_gradients() -> None:
    order_R, row_TK, _, kept_TK = plan(10, 4, 6, drops=True)
    x_DT, y_RD, weights_KT = torch.randn(24, 10), torch.randn(40, 48), torch.rand(4, 10)
    there = partial(permute, order_R=order_R, row_TK=row_TK, kept_TK=kept_TK, tile=TILE)
    assert_same(with_gradients(there, {"x_TD": x_DT.T}), with_gradients(there, {"x_TD": x_DT.T.contiguous()}))
    back = partial(unpermute, order_R=order_R, row_TK=row_TK, kept_TK=kept_TK, tile=TILE)
    got = with_gradients(back, {"y_RD": y_RD[:, :24], "weights_TK": weights_KT.T})
    want = with_gradients(back, {"y_RD": y_RD[:, :24].contiguous(), "weights_TK": weights_KT.T.contiguous()})
    assert_same(got, want)
    leaf_RD = y_RD[:, :24].detach().requires_grad_()
    output_TD = back(leaf_RD, weights_KT.T)
    expanded, contiguous = (
        torch.autograd.grad(output_TD, leaf_RD, ones, retain_graph=True)[0]
        for ones in (torch.ones(()).expand(10, 24), torch.ones(10, 24))
    )
    assert_same({"gradient of y_RD": expanded}, {"gradient of y_RD": contiguous})


def test_strided_masks() -> None:
    kept_KT = torch.rand(3, 11) < 0.6
    order_R, row_TK, _ = sort_tokens(torch.rand(11, 6).argsort(-1)[:, :3], 6, kept_KT.T)
    inputs = {"y_RD": torch.randn(33, 8), "weights_TK": torch.rand(11, 3)}
    got, want = (
        with_gradients(partial(fn, order_R=order_R, row_TK=row_TK, kept_TK=kept_KT.T), inputs)
        for fn in (unpermute, reference.unpermute)
    )
    assert_same(got, want, 1e-6)


def test_reruns_and_other_row_tiles_are_bitwise_equal() -> None:
    order_R, row_TK, _, kept_TK = plan(25, 4, 16, drops=True)
    inputs = {"y_RD": torch.randn(100, 40), "weights_TK": torch.rand(25, 4)}
    first, again, other = (
        with_gradients(partial(unpermute, order_R=order_R, row_TK=row_TK, kept_TK=kept_TK, tile=tile), inputs)
        for tile in (TILE, TILE, (32, 16))
    )
    assert_same(again, first)
    assert_same(other, first)


def test_sums_are_formed_in_fp32() -> None:
    # in bf16, 1 + 2^-9 is 1 again: sixteen such steps would be lost
    k = 17
    order_R, row_TK, _ = sort_tokens(torch.arange(k)[None], k)
    y_RD = torch.full((k, 1), 2.0**-9, dtype=torch.bfloat16)
    y_RD[0] = 1
    assert unpermute(y_RD, torch.ones(1, k), order_R, row_TK).item() == 1 + 2.0**-5
    x_TD = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    (grad_TD,) = torch.autograd.grad(permute(x_TD, order_R, row_TK), x_TD, y_RD)
    assert grad_TD.item() == 1 + 2.0**-5


def test_tiles_of_production_size() -> None:
    order_R, row_TK, _, kept_TK = plan(20, 3, 7, drops=True)
    places = {"order_R": order_R, "row_TK": row_TK, "kept_TK": kept_TK}
    inputs = {"y_RD": torch.randn(60, 1100), "weights_TK": torch.rand(20, 3)}
    assert choose_tile(1100, 4)[1] < 1100 < 3 * choose_tile(1100, 4)[1], "a row takes several steps, the last one in part"
    got, want = (with_gradients(partial(fn, **places), inputs) for fn in (unpermute, reference.unpermute))
    assert_same(got, want, 1e-6)


def test_offsets_beyond_two_to_the_31() -> None:
    # three rows, 2^30 apart, in memory of which only these are ever touched: numpy's, as torch's would be poisoned
    x_TD = torch.from_numpy(np.empty(2**31 + 8, dtype=np.int8)).as_strided((3, 8), (2**30, 1))
    x_TD.copy_(torch.arange(24).view(3, 8))
    order_R, row_TK, _ = sort_tokens(torch.tensor([[1], [0], [0]]), 2)
    assert permute(x_TD, order_R, row_TK).tolist() == torch.arange(24).view(3, 8)[[1, 2, 0]].tolist()


LONG = torch.int64
GOOD = {
    "y_RD": torch.zeros(6, 5),
    "weights_TK": torch.zeros(3, 2),
    "order_R": torch.zeros(6, dtype=LONG),
    "row_TK": torch.zeros(3, 2, dtype=LONG),
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"y_RD": torch.zeros(7, 5)}, r"7 expert rows and row \(3, 2\)"),
        ({"weights_TK": torch.zeros(2, 3)}, r"weights \(2, 3\) and row \(3, 2\)"),
        ({"order_R": torch.zeros(5, dtype=LONG)}, r"order \(5,\)"),
        ({"order_R": torch.zeros(5, dtype=LONG), "kept_TK": torch.ones(3, 2, dtype=torch.bool)}, "order .*, 6 expert rows"),
        ({"order_R": torch.zeros(6, dtype=torch.int32)}, "order is torch.int32"),
        ({"row_TK": torch.zeros(3, 2)}, "row is torch.float32"),
        ({"kept_TK": torch.ones(3, 2)}, "mask is torch.float32"),
        ({"kept_TK": torch.ones(2, 3, dtype=torch.bool)}, r"\(2, 3\); need bool \(3, 2\)"),
        ({"residual_TD": torch.zeros(3, 4)}, r"residual is .*\(3, 4\), the result is .*\(3, 5\)"),
        ({"shared_TD": torch.zeros(3, 5).half()}, "shared is torch.float16"),
        ({"weights_TK": torch.zeros(3, 2, device="meta")}, "y_RD on cpu, weights_TK on meta"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_unpermute_names_what_does_not_fit(change: dict[str, Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        unpermute(**{**GOOD, **change})


def test_permute_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"tokens \(4, 5\) .*row \(3, 2\)"):
        permute(torch.zeros(4, 5), GOOD["order_R"], GOOD["row_TK"])
    with pytest.raises(ValueError, match="x_TD on meta, order_R on cpu"):
        permute(torch.zeros(3, 5, device="meta"), GOOD["order_R"], GOOD["row_TK"])
