"""The counting sort's kernels against the specification, and the tile table against a loop over experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moefold.kernels.sort_tokens import triton_impl
from moefold.kernels.sort_tokens.reference import sort_tokens as reference
from numeric import assert_same

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAMES = ("order_R", "row_TK", "counts_E")


def choices(tokens: int, k: int, num_experts: int) -> Tensor:
    return torch.rand(tokens, num_experts).argsort(-1)[:, :k]


def assert_like_the_specification(indices_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None, block: int = 32) -> None:
    got = triton_impl._sort(indices_TK, num_experts, kept_TK, block)
    want = reference(indices_TK, num_experts, kept_TK)
    assert_same(dict(zip(NAMES, got, strict=True)), dict(zip(NAMES, want, strict=True)))


@pytest.mark.parametrize("drops", [False, True], ids=["dropless", "drops"])
@pytest.mark.parametrize(
    ("tokens", "k", "num_experts", "block"),
    [(0, 2, 4, 32), (1, 1, 1, 16), (50, 1, 1, 16), (7, 4, 4, 32), (64, 2, 8, 64), (33, 8, 60, 32), (3, 2, 300, 256)],
    ids=["no-tokens", "one-row", "one-expert", "every-expert", "whole-tiles", "ragged-tiles", "mostly-empty-experts"],
)
def test_equals_the_specification(tokens: int, k: int, num_experts: int, block: int, drops: bool) -> None:
    kept_TK = torch.rand(tokens, k) < 0.7 if drops else None
    assert_like_the_specification(choices(tokens, k, num_experts), num_experts, kept_TK, block)


def test_one_expert_may_take_all() -> None:
    assert_like_the_specification(torch.full((100, 1), 2), 4)


def test_everything_may_be_dropped() -> None:
    assert_like_the_specification(choices(40, 2, 3), 3, torch.zeros(40, 2, dtype=torch.bool))


def test_strided_choices_and_masks() -> None:
    indices_KT, kept_KT = choices(19, 4, 6).T.contiguous(), torch.rand(4, 19) < 0.5
    assert_like_the_specification(indices_KT.T, 6, kept_KT.T)
    assert_like_the_specification(indices_KT.T, 6, (torch.arange(19) < 5)[:, None].expand(-1, 4))


def test_an_index_of_no_expert_is_sorted_behind_all() -> None:
    indices_TK = torch.tensor([[1, -1], [7, 0], [1, 2]])
    order_R, row_TK, counts_E = triton_impl.sort_tokens(indices_TK, 3)
    assert order_R.tolist() == [3, 0, 4, 5, 1, 2]
    assert row_TK.tolist() == [[1, 4], [5, 0], [2, 3]]
    assert counts_E.tolist() == [1, 2, 1]


def test_the_plan_is_the_same_for_every_tile() -> None:
    indices_TK, kept_TK = choices(60, 3, 9), torch.rand(60, 3) < 0.8
    # 180 choices: one tile of 256, or twelve of 16 whose counts are added up in steps of four
    large, small = (triton_impl._sort(indices_TK, 9, kept_TK, block, scan) for block, scan in ((256, 1024), (16, 4)))
    assert_same(dict(zip(NAMES, small, strict=True)), dict(zip(NAMES, large, strict=True)))


@pytest.mark.parametrize(
    ("indices_TK", "num_experts", "kept_TK", "said"),
    [
        (torch.zeros(4, dtype=torch.int64), 2, None, r"int64 \(4,\); need int64 \[T, K\]"),
        (torch.zeros(4, 2), 2, None, "float32"),
        (torch.zeros(4, 2, dtype=torch.int64), 2, torch.ones(4, 3, dtype=torch.bool), r"\(4, 3\); .*\(4, 2\)"),
        (torch.zeros(4, 2, dtype=torch.int64), 2, torch.ones(4, 2), "float32"),
        (torch.zeros(4, 2, dtype=torch.int64), 5000, None, "5000 experts"),
        (torch.zeros(4, 2, dtype=torch.int64), 0, None, "0 experts"),
        (
            torch.zeros(4, 2, dtype=torch.int64),
            2,
            torch.ones(4, 2, dtype=torch.bool, device="meta"),
            "indices_TK on cpu, kept_TK on meta",
        ),
    ],
    ids=["shape", "dtype", "mask-shape", "mask-dtype", "too-many-experts", "no-expert", "devices"],
)
def test_what_does_not_fit_is_named(indices_TK: Tensor, num_experts: int, kept_TK: Tensor | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        triton_impl.sort_tokens(indices_TK, num_experts, kept_TK)
