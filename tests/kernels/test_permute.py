"""permute and unpermute against their specifications: outputs, every gradient, drops that hold NaN, and reruns."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefold.kernels.permute import permute, reference, unpermute
from moefold.kernels.sort_tokens import sort_tokens
from numeric import assert_same, with_gradients
from row_cases import check_missing_rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPES = pytest.mark.parametrize(
    ("tokens", "k", "num_experts"),
    [(0, 2, 4), (1, 1, 1), (9, 1, 1), (7, 4, 4), (40, 2, 8), (17, 8, 32)],
    ids=["no-tokens", "one-row", "one-expert", "every-expert", "usual", "fine-grained"],
)
DROPS = pytest.mark.parametrize("drops", [False, True], ids=["dropless", "drops"])
DTYPES = pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["fp64", "fp32", "bf16"]
)
D = 6


def plan(tokens: int, k: int, num_experts: int, drops: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """order_R, row_TK, counts_E, kept_TK of random choices."""
    kept_TK = torch.rand(tokens, k) < 0.6 if drops else None
    return *sort_tokens(torch.rand(tokens, num_experts).argsort(-1)[:, :k], num_experts, kept_TK), kept_TK


@SHAPES
@DROPS
@DTYPES
def test_permute_equals_the_specification(
    tokens: int, k: int, num_experts: int, drops: bool, dtype: torch.dtype, rtol: float
) -> None:
    order_R, row_TK, counts_E, kept_TK = plan(tokens, k, num_experts, drops)
    inputs = {"x_TD": torch.randn(tokens, D).to(dtype)}
    got = with_gradients(partial(permute, order_R=order_R, row_TK=row_TK, kept_TK=kept_TK), inputs)

    def specified(x_TD: Tensor) -> Tensor:
        rows_RD = reference.permute(x_TD, order_R, row_TK)
        travels_R1 = (torch.arange(len(order_R)) < counts_E.sum())[:, None]
        return torch.where(travels_R1, rows_RD, rows_RD.detach())

    assert_same(got, with_gradients(specified, inputs), rtol)


@SHAPES
@DROPS
@DTYPES
def test_unpermute_equals_the_specification(
    tokens: int, k: int, num_experts: int, drops: bool, dtype: torch.dtype, rtol: float
) -> None:
    order_R, row_TK, _, kept_TK = plan(tokens, k, num_experts, drops)
    weights_TK = torch.rand(tokens, k).to(torch.promote_types(dtype, torch.float32))
    inputs = {"y_RD": torch.randn(tokens * k, D).to(dtype), "weights_TK": weights_TK}
    got, want = (
        with_gradients(partial(fn, order_R=order_R, row_TK=row_TK, kept_TK=kept_TK), inputs)
        for fn in (unpermute, reference.unpermute)
    )
    assert_same(got, want, rtol)


def test_rows_that_did_not_travel_leak_nowhere() -> None:
    order_R, row_TK, counts_E, kept_TK = plan(20, 3, 5, drops=True)
    end = int(counts_E.sum())
    clean_RD = torch.randn(60, D)
    dirty_RD = clean_RD.clone()
    dirty_RD[end:] = torch.nan
    weights_TK = torch.rand(20, 3)
    back = partial(unpermute, order_R=order_R, row_TK=row_TK, kept_TK=kept_TK)
    got, want = (with_gradients(back, {"y_RD": y, "weights_TK": weights_TK}) for y in (dirty_RD, clean_RD))
    assert_same(got, want)
    assert not got["gradient of y_RD"][end:].any()
    # backward of permute: what comes back on rows that did not travel is no gradient
    x_TD = torch.randn(20, D, requires_grad=True)
    grad_dirty, grad_clean = (
        torch.autograd.grad(permute(x_TD, order_R, row_TK, kept_TK), x_TD, rows)[0] for rows in (dirty_RD, clean_RD)
    )
    assert_same({"gradient of x_TD": grad_dirty}, {"gradient of x_TD": grad_clean})


@pytest.mark.parametrize("share", [0.6, 0.0, 1.0])
def test_rows_that_are_not_kept_may_be_missing(share: float) -> None:
    check_missing_rows(permute, unpermute, share)


def test_weights_of_what_did_not_travel_may_hold_anything() -> None:
    order_R, row_TK, _, kept_TK = plan(20, 3, 5, drops=True)
    assert kept_TK is not None
    inputs = {"y_RD": torch.randn(60, D), "weights_TK": torch.rand(20, 3)}
    back = partial(unpermute, order_R=order_R, row_TK=row_TK, kept_TK=kept_TK)
    want = with_gradients(back, inputs)
    assert_same(with_gradients(back, inputs | {"weights_TK": inputs["weights_TK"].masked_fill(~kept_TK, torch.nan)}), want)


@DROPS
def test_without_weights_rows_are_summed(drops: bool) -> None:
    order_R, row_TK, _, kept_TK = plan(20, 3, 5, drops)
    inputs, shared_TD = {"y_RD": torch.randn(60, D)}, torch.randn(20, D)
    ones_TK = torch.ones(20, 3)
    got = with_gradients(lambda y_RD: unpermute(y_RD, None, order_R, row_TK, kept_TK, shared_TD), inputs)
    want = with_gradients(lambda y_RD: unpermute(y_RD, ones_TK, order_R, row_TK, kept_TK) + shared_TD, inputs)
    assert_same(got, want, rtol=1e-6)


@given(tokens=st.integers(1, 12), k=st.sampled_from([1, 2, 4, 8]), spare=st.integers(0, 5), seed=st.integers(0, 1 << 16))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equal_weights_bring_every_token_back(tokens: int, k: int, spare: int, seed: int) -> None:
    torch.manual_seed(seed)
    order_R, row_TK, _, _ = plan(tokens, k, k + spare, drops=False)
    x_TD = torch.randint(-99, 99, (tokens, D)).double()
    back_TD = unpermute(permute(x_TD, order_R, row_TK), torch.full((tokens, k), 1 / k, dtype=torch.float64), order_R, row_TK)
    # 1/k is a power of two: halves, quarters and eighths of small integers add up exactly
    assert torch.equal(back_TD, x_TD)


def test_rows_stand_in_expert_order() -> None:
    indices_TK = torch.tensor([[2, 0], [0, 1], [2, 1]])
    order_R, row_TK, _ = sort_tokens(indices_TK, 3)
    rows_RD = permute(torch.tensor([[10.0], [11.0], [12.0]]), order_R, row_TK)
    assert rows_RD.flatten().tolist() == [10, 11, 11, 12, 10, 12]


@DROPS
def test_strided_inputs(drops: bool) -> None:
    order_R, row_TK, _, kept_TK = plan(10, 4, 6, drops)
    x_DT, y_DR, weights_KT = torch.randn(D, 10), torch.randn(D, 40), torch.rand(4, 10)
    there = partial(permute, order_R=order_R, row_TK=row_TK, kept_TK=kept_TK)
    assert_same(with_gradients(there, {"x_TD": x_DT.T}), with_gradients(there, {"x_TD": x_DT.T.contiguous()}), rtol=1e-6)
    back = partial(unpermute, order_R=order_R, row_TK=row_TK, kept_TK=kept_TK)
    got = with_gradients(back, {"y_RD": y_DR.T, "weights_TK": weights_KT.T})
    want = with_gradients(back, {"y_RD": y_DR.T.contiguous(), "weights_TK": weights_KT.T.contiguous()})
    assert_same(got, want, rtol=1e-6)


@DROPS
def test_reruns_are_bitwise_equal(drops: bool) -> None:
    order_R, row_TK, _, kept_TK = plan(200, 8, 16, drops)
    inputs = {"y_RD": torch.randn(1600, D), "weights_TK": torch.rand(200, 8)}
    back = partial(unpermute, order_R=order_R, row_TK=row_TK, kept_TK=kept_TK)
    first = with_gradients(back, inputs)
    for _ in range(3):
        assert_same(with_gradients(back, inputs), first)


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
