"""LSH codes and buckets against their specification: ties, budgets, order, broken rows, and what is refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moefold.kernels.lsh import Buckets, bucket_rows, cross_polytope_codes, make_rotation, reference
from numeric import assert_same

pytestmark = pytest.mark.usefixtures("poisoned_memory")
CODES, INDICES = torch.zeros(3, 2, dtype=torch.int64), torch.tensor([[0, 1]] * 3)


def tensors(buckets: Buckets) -> dict[str, Tensor]:
    """Everything that buckets hold, by name."""
    found = {field.name: getattr(buckets, field.name) for field in fields(buckets)}
    return {name: torch.as_tensor(value) for name, value in found.items() if value is not None}


# codes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize(("tokens", "hashes", "width"), [(0, 2, 4), (1, 1, 1), (30, 3, 4), (5, 2, 16)])
def test_codes_equal_the_specification(tokens: int, hashes: int, width: int, dtype: torch.dtype) -> None:
    # whole numbers: sums are exact in any order, and ties are frequent
    x_TD, rotation_HPD = torch.randint(-2, 3, (tokens, 5)).to(dtype), torch.randint(-1, 2, (hashes, width, 5)).to(dtype)
    codes_TH = cross_polytope_codes(x_TD, rotation_HPD)
    assert_same({"codes": codes_TH}, {"codes": reference.cross_polytope_codes(x_TD, rotation_HPD)})


def test_a_code_names_the_farthest_axis_and_its_sign() -> None:
    x_TD = torch.tensor([[3.0, 1, 0, 0], [1, -3, 0, 0], [0, 0, 0, 2], [0, 0, -2, -2], [2, 0, 0, -2], [0, 0, 0, 0]])
    assert cross_polytope_codes(x_TD, torch.eye(4)[None]).flatten().tolist() == [0, 3, 6, 5, 0, 0]


def test_codes_ignore_the_length_of_a_row() -> None:
    x_TD, rotation_HPD = torch.randn(50, 32), make_rotation(32, 4, 8, seed=1)
    scaled_TD = x_TD * 2.0 ** torch.randint(-40, 40, (50, 1))
    assert torch.equal(cross_polytope_codes(x_TD, rotation_HPD), cross_polytope_codes(scaled_TD, rotation_HPD))


def test_codes_of_broken_rows_are_codes_and_break_no_other() -> None:
    x_TD, rotation_HPD = torch.randn(6, 8), make_rotation(8, 3, 4, seed=1)
    broken_TD = x_TD.clone()
    broken_TD[1], broken_TD[3, 2], broken_TD[4, 5] = torch.nan, torch.nan, torch.inf
    codes_TH, clean_TH = (cross_polytope_codes(x, rotation_HPD) for x in (broken_TD, x_TD))
    assert ((codes_TH >= 0) & (codes_TH < 8)).all()
    assert torch.equal(codes_TH[[0, 2, 5]], clean_TH[[0, 2, 5]])


def test_codes_of_strided_rows_carry_no_gradient() -> None:
    x_DT, rotation_HPD = torch.randn(8, 12, requires_grad=True), make_rotation(8, 2, 4, seed=3)
    codes_TH = cross_polytope_codes(x_DT.T, rotation_HPD)
    assert torch.equal(codes_TH, cross_polytope_codes(x_DT.T.contiguous(), rotation_HPD))
    assert not codes_TH.requires_grad


def test_near_rows_have_equal_codes_more_often() -> None:
    base_TD, other_TD, rotation_HPD = torch.randn(400, 64), torch.randn(400, 64), make_rotation(64, 1, 16, seed=5)
    codes_TH, *found = (cross_polytope_codes(x, rotation_HPD) for x in (base_TD, base_TD + 0.1 * other_TD, other_TD))
    near, far = ((codes_TH == x).double().mean().item() for x in found)
    assert near > 0.7 > 0.2 > far


def test_rotation_rows_are_orthonormal_and_repeatable() -> None:
    rotation_HPD = make_rotation(24, 3, 8, seed=11, dtype=torch.float64)
    eye_HPP = torch.eye(8, dtype=torch.float64).expand(3, 8, 8)
    assert_same({"products": rotation_HPD @ rotation_HPD.mT}, {"products": eye_HPP}, 1e-14)
    assert torch.equal(rotation_HPD, make_rotation(24, 3, 8, seed=11, dtype=torch.float64))
    assert torch.equal(rotation_HPD.bfloat16(), make_rotation(24, 3, 8, seed=11, dtype=torch.bfloat16))
    assert not torch.equal(rotation_HPD, make_rotation(24, 3, 8, seed=12, dtype=torch.float64))
    assert not torch.equal(rotation_HPD[0], rotation_HPD[1]), "hashes differ"
    # both signs occur at every place: QR alone would fix some
    first_S = torch.stack([make_rotation(4, 1, 4, seed=s)[0].diagonal() for s in range(40)])
    assert ((first_S > 0).any(0) & (first_S < 0).any(0)).all()


@pytest.mark.parametrize("sizes", [(8, 0, 4), (8, 1, 3), (8, 1, 16), (8, 1, 0)])
def test_rotation_names_sizes_that_cannot_be(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=f"{sizes[1]} hashes of width {sizes[2]} for dim {sizes[0]}"):
        make_rotation(*sizes, seed=0)


# buckets


@st.composite
def choices(draw: st.DrawFn) -> dict[str, object]:
    tokens, k, hashes = draw(st.integers(0, 12)), draw(st.integers(1, 3)), draw(st.integers(0, 3))
    num_experts = k + draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    codes_TH = torch.randint(-1, 1 + draw(st.integers(0, 2)), (tokens, hashes), generator=generator)
    draws_TE = torch.rand(tokens, num_experts, generator=generator)
    kept_TK, exact_TK = (torch.rand(tokens, k, generator=generator) < draw(st.sampled_from([0, 0.3, 0.8, 1])) for _ in range(2))
    return {
        "codes_TH": codes_TH,
        "indices_TK": draws_TE.argsort(-1)[:, :k],
        "num_experts": num_experts,
        "kept_TK": draw(st.sampled_from([None, kept_TK])),
        "exact_TK": draw(st.sampled_from([None, exact_TK])),
        "max_rows": draw(st.none() | st.integers(0, 40)),
    }


@given(case=choices())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_buckets_equal_the_specification(case: dict[str, object]) -> None:
    got, want = bucket_rows(**case), reference.bucket_rows(**case)
    assert_same(tensors(got), tensors(want))
    assert isinstance(got.num_rows, int)
    sizes_C = got.starts_C1.diff()
    assert (sizes_C > 0).all() and sizes_C.sum() == got.num_rows
    C, max_rows, all_kept = len(sizes_C), case["max_rows"], bucket_rows(**{**case, "max_rows": 0})
    if max_rows is not None:
        # never over the budget, but for what one bucket per expert and the exact choices need
        assert max(max_rows, len(all_kept.experts_C)) >= C
        assert len(bucket_rows(**{**case, "max_rows": None}).experts_C) >= C


@given(data=st.data(), num_codes=st.sampled_from([1, 2, 6, 16, 1 << 21, 1 << 40, 1 << 62]), hashes=st.integers(1, 12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_codes_that_are_sorted_together_give_the_same_buckets(data: st.DataObject, num_codes: int, hashes: int) -> None:
    few = sorted({0, num_codes // 2, num_codes - 1})
    rows = data.draw(st.lists(st.lists(st.sampled_from(few), min_size=hashes, max_size=hashes), min_size=1, max_size=12))
    codes_TH, indices_TK = torch.tensor(rows), torch.zeros(len(rows), 1, dtype=torch.int64)
    got, want = (bucket_rows(codes_TH, indices_TK, 1, num_codes=n) for n in (num_codes, None))
    assert_same(tensors(got), tensors(want))


class Operations(TorchDispatchMode):
    """Names of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_sizes_that_depend_on_values_are_asked_for_once() -> None:
    # on a GPU these wait for the device; the one list of numbers at the end does not pass through here
    with Operations() as seen:
        bucket_rows(CODES, INDICES, 2, INDICES > 0, INDICES > 1, max_rows=2)
    assert {"sort", "cumsum"} <= seen.names
    assert not seen.names & {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive"}


def test_buckets_of_an_example() -> None:
    codes_TH = torch.tensor([[5, 1], [2, 0], [5, 1], [5, 0]])
    indices_TK = torch.tensor([[1, 0], [1, 2], [1, 0], [0, 1]])
    exact_TK = torch.tensor([[False, False], [False, False], [False, True], [False, False]])
    kept_TK = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    buckets = bucket_rows(codes_TH, indices_TK, 4, kept_TK, exact_TK)
    # expert 0: codes (5, 0), (5, 1), then token 2 alone; expert 1: codes (2, 0), (5, 0), (5, 1)
    assert buckets.bucket_TK.tolist() == [[5, 1], [3, 0], [5, 2], [0, 4]]
    assert buckets.order_R.tolist() == [6, 1, 5, 2, 7, 0, 4, 3]
    assert buckets.starts_C1.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert buckets.counts_E.tolist() == [3, 3, 0, 0]
    assert buckets.experts_C.tolist() == [0, 0, 0, 1, 1, 1]
    assert buckets.num_rows == 7


@pytest.mark.parametrize(
    ("max_rows", "sizes"),
    [
        (None, [2, 1, 1, 1, 1, 1]),
        (6, [2, 1, 1, 1, 1, 1]),
        (5, [2, 1, 1, 2, 1]),  # three coarse buckets; the largest is split, which fills the budget
        (4, [4, 2, 1]),  # splitting the largest would make five; nothing behind it is tried
        (3, [4, 2, 1]),
        (2, [6, 1]),
        (0, [6, 1]),
    ],
)
def test_budget_of_an_example(max_rows: int | None, sizes: list[int]) -> None:
    # expert 0 has the tokens 0..5 in two coarse codes, of three and two fine ones; expert 1 has token 6
    codes_TH = torch.tensor([[0, 0], [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [0, 0]])
    buckets = bucket_rows(codes_TH, torch.tensor([[0]] * 6 + [[1]]), 2, max_rows=max_rows)
    assert buckets.starts_C1.diff().tolist() == sizes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"codes_TH": CODES.int()}, "codes are torch.int32"),
        ({"codes_TH": CODES[:2]}, r"codes \(2, 2\) .* indices \(3, 2\)"),
        ({"indices_TK": INDICES.float()}, "indices are torch.float32"),
        ({"kept_TK": torch.ones(3, 2)}, "mask kept is torch.float32"),
        ({"exact_TK": torch.ones(3, 1, dtype=torch.bool)}, r"mask exact is .* \(3, 1\); .* \(3, 2\)"),
        ({"num_experts": 0}, "0 experts"),
        ({"max_rows": -1}, "max_rows = -1"),
        ({"num_codes": 0}, "num_codes = 0"),
        ({"exact_TK": torch.ones(3, 2, dtype=torch.bool, device="meta")}, "indices_TK on cpu, exact_TK on meta"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bucket_rows_names_what_does_not_fit(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=f"bucket_rows: .*{said}"):
        bucket_rows(**{"codes_TH": CODES, "indices_TK": INDICES, "num_experts": 2, **change})


@pytest.mark.parametrize(
    ("x_TD", "rotation_HPD", "said"),
    [
        (torch.zeros(3, 6), torch.zeros(2, 4, 5), r"rotation is .*\(2, 4, 5\) and tokens \(3, 6\)"),
        (torch.zeros(3, 6), torch.zeros(2, 3, 6), "P = 3"),
        (torch.zeros(3, 6, dtype=torch.int64), torch.zeros(2, 4, 6), "tokens are torch.int64"),
        (torch.zeros(3, 6), torch.zeros(2, 4, 6, device="meta"), "x_TD on cpu, rotation_HPD on meta"),
    ],
    ids=["width", "no-power-of-two", "integers", "devices"],
)
def test_codes_name_what_does_not_fit(x_TD: Tensor, rotation_HPD: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=f"cross_polytope_codes: .*{said}"):
        cross_polytope_codes(x_TD, rotation_HPD)
