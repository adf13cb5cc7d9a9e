"""sort_tokens against its specification: the plan, its inverse and the counts, for any choices and drops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefold.kernels.sort_tokens import count_choices, sort_tokens
from moefold.kernels.sort_tokens.reference import sort_tokens as reference
from numeric import assert_same

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAMES = ("order_R", "row_TK", "counts_E")


def assert_like_the_specification(indices_TK: Tensor, num_experts: int, kept_TK: Tensor | None) -> None:
    got, want = (fn(indices_TK, num_experts, kept_TK) for fn in (sort_tokens, reference))
    assert_same(dict(zip(NAMES, got, strict=True)), dict(zip(NAMES, want, strict=True)))


def choices(tokens: int, k: int, num_experts: int) -> Tensor:
    return torch.rand(tokens, num_experts).argsort(-1)[:, :k]


@pytest.mark.parametrize(
    ("tokens", "k", "num_experts"),
    [(0, 2, 4), (1, 1, 1), (5, 1, 1), (7, 4, 4), (64, 2, 8), (33, 8, 64), (3, 2, 300)],
    ids=["no-tokens", "one-row", "one-expert", "every-expert", "usual", "fine-grained", "mostly-empty-experts"],
)
@pytest.mark.parametrize("drops", [False, True], ids=["dropless", "drops"])
def test_equals_the_specification(tokens: int, k: int, num_experts: int, drops: bool) -> None:
    kept_TK = torch.rand(tokens, k) < 0.7 if drops else None
    assert_like_the_specification(choices(tokens, k, num_experts), num_experts, kept_TK)


@given(data=st.data(), num_experts=st.integers(1, 5), k=st.integers(1, 3), tokens=st.integers(0, 8))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_the_specification_for_any_choices(data: st.DataObject, num_experts: int, k: int, tokens: int) -> None:
    size = tokens * k
    flat = data.draw(st.lists(st.integers(0, num_experts - 1), min_size=size, max_size=size))
    kept = data.draw(st.none() | st.lists(st.booleans(), min_size=size, max_size=size))
    indices_TK = torch.tensor(flat, dtype=torch.int64).view(tokens, k)
    kept_TK = None if kept is None else torch.tensor(kept, dtype=torch.bool).view(tokens, k)
    assert_like_the_specification(indices_TK, num_experts, kept_TK)


def test_one_expert_may_take_all() -> None:
    indices_TK = torch.full((6, 1), 2)
    assert_like_the_specification(indices_TK, 4, None)
    assert sort_tokens(indices_TK, 4)[2].tolist() == [0, 0, 6, 0]


def test_everything_may_be_dropped() -> None:
    _, row_TK, counts_E = sort_tokens(choices(4, 2, 3), 3, torch.zeros(4, 2, dtype=torch.bool))
    assert row_TK.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert counts_E.tolist() == [0, 0, 0]


def test_strided_choices_and_masks() -> None:
    indices_KT, kept_KT = choices(9, 4, 6).T.contiguous(), torch.rand(4, 9) < 0.5
    assert not indices_KT.T.is_contiguous()
    assert_like_the_specification(indices_KT.T, 6, kept_KT.T)
    assert_like_the_specification(indices_KT.T, 6, (torch.arange(9) < 5)[:, None].expand(-1, 4))


def test_more_experts_than_a_short_integer_holds() -> None:
    indices_TK = torch.tensor([[39_999, 3], [32_767, 39_999], [40_000 - 1, 0]])
    kept_TK = torch.tensor([[True, True], [True, True], [False, True]])
    order_R, _, counts_E = sort_tokens(indices_TK, 40_000, kept_TK)
    assert order_R.tolist() == [5, 1, 2, 0, 3, 4]
    assert {e: int(counts_E[e]) for e in (0, 3, 32_767, 39_999)} == {0: 1, 3: 1, 32_767: 1, 39_999: 2}
    assert counts_E.sum() == 5


def test_counts_of_each_row() -> None:
    choices_BN = torch.tensor([[0, 2, 2, 3], [1, 1, 1, 1]])
    assert count_choices(choices_BN, 5).tolist() == [[1, 0, 2, 1, 0], [0, 4, 0, 0, 0]]
    assert count_choices(choices_BN[:, :0], 3).tolist() == [[0, 0, 0], [0, 0, 0]]
