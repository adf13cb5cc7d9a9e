"""Means and restored rows of LSH compression against their specification: every gradient, and what must be exact."""

from __future__ import annotations

from functools import partial
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefold.kernels import lsh
from moefold.kernels.lsh import (
    Buckets,
    bucket_rows,
    centroids,
    cross_polytope_codes,
    farther_than,
    make_rotation,
    reference,
    restore,
)
from moefold.kernels.permute import permute, unpermute
from moefold.kernels.sort_tokens import sort_tokens
from numeric import assert_same, with_gradients

pytestmark = pytest.mark.usefixtures("poisoned_memory")
D = 6
CODES, INDICES = torch.zeros(3, 2, dtype=torch.int64), torch.tensor([[0, 1]] * 3)
SHAPES = pytest.mark.parametrize(
    ("tokens", "k", "num_experts"),
    [(0, 2, 4), (1, 1, 1), (9, 1, 1), (7, 4, 4), (20, 2, 8)],
    ids=["no-tokens", "one-row", "one-expert", "every-expert", "usual"],
)
MASKS = pytest.mark.parametrize("masks", ["none", "kept", "exact", "both"])
WEIGHTED = pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
DTYPES = pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=["fp64", "fp32", "bf16"]
)


def bucketed(tokens: int, k: int, num_experts: int, masks: str = "none", codes: int = 3) -> Buckets:
    """Buckets of random choices whose tokens have one of `codes` codes."""
    indices_TK = torch.rand(tokens, num_experts).argsort(-1)[:, :k]
    kept_TK = torch.rand(tokens, k) < 0.6 if masks in ("kept", "both") else None
    exact_TK = torch.rand(tokens, k) < 0.3 if masks in ("exact", "both") else None
    return bucket_rows(torch.randint(0, codes, (tokens, 1)), indices_TK, num_experts, kept_TK, exact_TK)


def layer(module: ModuleType, buckets: Buckets, detach: bool = False, compensated: bool = True) -> partial[Tensor]:
    """Means, a smooth expert and the restored rows, as a function of tokens, weights, compensation and the expert's matrix."""

    def run(x_TD: Tensor, weights_TK: Tensor, a_D: Tensor, matrix_DD: Tensor) -> Tensor:
        c_CD = module.centroids(x_TD, buckets, weights_TK)
        y_CD = torch.tanh(c_CD @ matrix_DD)
        y_TD = module.restore(y_CD, c_CD, x_TD, weights_TK, buckets, a_D if compensated else None, detach)
        return y_TD if compensated else y_TD + 0 * a_D

    return partial(run)


def layer_inputs(buckets: Buckets, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    T, K = buckets.bucket_TK.shape
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {"x_TD": torch.randn(T, D), "weights_TK": torch.rand(T, K), "a_D": torch.randn(D), "matrix_DD": torch.randn(D, D)}
    return {name: value.to(wide if name in ("weights_TK", "a_D") else dtype) for name, value in inputs.items()}


# means and restored rows


@SHAPES
@MASKS
@WEIGHTED
@DTYPES
def test_centroids_equal_the_specification(
    tokens: int, k: int, num_experts: int, masks: str, weighted: bool, dtype: torch.dtype, rtol: float
) -> None:
    buckets = bucketed(tokens, k, num_experts, masks)
    everything = layer_inputs(buckets, dtype)
    inputs = {name: everything[name] for name in ("x_TD", "weights_TK")[: 1 + weighted]}
    got, want = (with_gradients(partial(fn, buckets=buckets), inputs) for fn in (centroids, reference_centroids))
    assert_same(got, want, rtol)


def reference_centroids(x_TD: Tensor, buckets: Buckets, weights_TK: Tensor | None = None) -> Tensor:
    # differentiable in every input, even where no bucket is left to depend on it
    connected = 0 * x_TD.nan_to_num().sum() + (0 if weights_TK is None else 0 * weights_TK.nan_to_num().sum())
    return (reference.centroids(x_TD, buckets, weights_TK) + connected).to(x_TD.dtype)


@SHAPES
@MASKS
@DTYPES
@pytest.mark.parametrize("compensation", ["none", "scalar", "vector"])
def test_restore_equals_the_specification(
    tokens: int, k: int, num_experts: int, masks: str, dtype: torch.dtype, rtol: float, compensation: str
) -> None:
    buckets = bucketed(tokens, k, num_experts, masks)
    C, wide = len(buckets.experts_C), torch.promote_types(dtype, torch.float32)
    inputs = {
        "expert_CD": torch.randn(C, D).to(dtype),
        "centroids_CD": torch.randn(C, D).to(dtype),
        "x_TD": torch.randn(tokens, D).to(dtype),
        "weights_TK": torch.rand(tokens, k).to(wide),
        "compensation": torch.randn(() if compensation == "scalar" else D).to(wide),
    }
    got, want = (
        with_gradients(partial(restored, module=module, used=compensation != "none", buckets=buckets), inputs)
        for module in (lsh, reference)
    )
    assert_same(got, want, rtol)


def restored(
    expert_CD: Tensor, centroids_CD: Tensor, x_TD: Tensor, weights_TK: Tensor, compensation: Tensor,
    module: ModuleType, used: bool, buckets: Buckets,
) -> Tensor:  # fmt: skip
    y_TD = module.restore(expert_CD, centroids_CD, x_TD, weights_TK, buckets, compensation if used else None)
    # so that every gradient exists, whatever the back end needed
    return y_TD + (0 * sum(x.sum() for x in (expert_CD, centroids_CD, x_TD, weights_TK, compensation))).to(y_TD.dtype)


@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("compensated", [True, False], ids=["compensated", "plain"])
def test_gradients_are_those_of_the_formula(masks: str, compensated: bool) -> None:
    buckets = bucketed(7, 2, 3, masks, codes=2)
    run, inputs = layer(lsh, buckets, compensated=compensated), layer_inputs(buckets)
    leaves = [value.requires_grad_() for value in inputs.values()]
    assert torch.autograd.gradcheck(lambda *args: run(*args), leaves, atol=1e-7, rtol=1e-6)


@MASKS
@pytest.mark.parametrize("detach", [False, True], ids=["through", "detached"])
def test_layer_equals_autograd(masks: str, detach: bool) -> None:
    buckets = bucketed(20, 2, 5, masks)
    inputs = layer_inputs(buckets)
    got, want = (with_gradients(layer(module, buckets, detach), inputs) for module in (lsh, reference))
    assert_same(got, want, 1e-12)
    if detach and masks == "none":
        through = with_gradients(layer(lsh, buckets), inputs)
        assert_same({"output": got["output"]}, {"output": through["output"]})
        assert not torch.allclose(got["gradient of x_TD"], through["gradient of x_TD"])


def test_members_of_a_bucket_share_the_detached_gradient() -> None:
    # with equal weights every member of a bucket gets J^T S / N, and with the residual g d + (J^T S - S) / N
    buckets = bucket_rows(torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 1, dtype=torch.int64), 1)
    x_TD, grad_TD, matrix_DD = torch.randn(4, D), torch.randn(4, D), torch.randn(D, D)
    gate_T1 = torch.rand(4, 1)

    def gradient(detach: bool) -> Tensor:
        leaf_TD = x_TD.clone().requires_grad_()
        c_CD = centroids(leaf_TD, buckets)
        y_TD = restore(c_CD @ matrix_DD, c_CD, leaf_TD, gate_T1, buckets, torch.ones(()), detach)
        return torch.autograd.grad(y_TD, leaf_TD, grad_TD)[0]

    s_D = (gate_T1 * grad_TD).sum(0)
    detached_TD = (matrix_DD @ s_D / 4).expand(4, D)
    assert_same({"detached": gradient(True)}, {"detached": detached_TD}, 1e-6)
    assert_same({"through": gradient(False)}, {"through": gate_T1 * grad_TD + detached_TD - s_D / 4}, 1e-6)


# what must hold whatever the numbers


@given(seed=st.integers(0, 1 << 16), compensated=st.booleans())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_linear_experts_conserve_the_sum_of_a_bucket(seed: int, compensated: bool) -> None:
    torch.manual_seed(seed)
    buckets, x_TD, matrix_DD = bucketed(15, 1, 3), torch.randn(15, D).double(), torch.randn(D, D).double()
    c_CD, a_D = centroids(x_TD, buckets), torch.randn(D).double()
    y_TD = restore(c_CD @ matrix_DD, c_CD, x_TD, torch.ones(15, 1).double(), buckets, a_D if compensated else None)
    for lo, hi in zip(buckets.starts_C1[:-1], buckets.starts_C1[1:], strict=True):
        rows_N = buckets.order_R[lo:hi]
        assert_same({"sum": y_TD[rows_N].sum(0)}, {"sum": (x_TD[rows_N] @ matrix_DD).sum(0)}, 1e-12)


@WEIGHTED
def test_residuals_of_a_bucket_sum_to_zero(weighted: bool) -> None:
    buckets = bucketed(30, 3, 4, "both")
    x_TD = torch.randn(30, D).double()
    weights_TK = torch.rand(30, 3).double() if weighted else torch.ones(30, 3).double()
    c_CD = centroids(x_TD, buckets, weights_TK if weighted else None)
    for b, (lo, hi) in enumerate(zip(buckets.starts_C1[:-1], buckets.starts_C1[1:], strict=True)):
        rows_N = buckets.order_R[lo:hi]
        residual_ND = weights_TK.flatten()[rows_N, None] * (x_TD[rows_N // 3] - c_CD[b])
        assert residual_ND.sum(0).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_rows_with_codes_of_their_own_are_exact(dtype: torch.dtype) -> None:
    x_TD, weights_TK = torch.randn(20, D).to(dtype), torch.rand(20, 3).to(torch.promote_types(dtype, torch.float32))
    indices_TK = torch.rand(20, 5).argsort(-1)[:, :3]
    buckets = bucket_rows(torch.arange(20)[:, None], indices_TK, 5)
    order_R, row_TK, counts_E = sort_tokens(indices_TK, 5)
    assert_same({"order": buckets.order_R, "counts": buckets.counts_E}, {"order": order_R, "counts": counts_E})

    def compressed(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        c_CD = centroids(x_TD, buckets, weights_TK)
        return restore(torch.tanh(c_CD), c_CD, x_TD, weights_TK, buckets, torch.ones(()))

    def exact(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        return unpermute(torch.tanh(permute(x_TD, order_R, row_TK)), weights_TK, order_R, row_TK)

    assert torch.equal(centroids(x_TD, buckets, weights_TK), permute(x_TD, order_R, row_TK))
    rtol = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    inputs = {"x_TD": x_TD, "weights_TK": weights_TK}
    got, want = with_gradients(compressed, inputs), with_gradients(exact, inputs)
    assert_same(got, want, rtol)
    # the forward difference is that of fp32 sums, before rounding to bf16
    assert_same({"output": got["output"]}, {"output": want["output"]}, min(rtol, 4e-3))


def test_exact_rows_give_the_compensation_no_gradient() -> None:
    # a difference of two sums would leave noise, which an optimizer scales up
    buckets = bucket_rows(torch.arange(30)[:, None], torch.rand(30, 4).argsort(-1)[:, :2], 4)
    x_TD, weights_TK, a_D = torch.randn(30, D), torch.rand(30, 2), torch.ones(D, requires_grad=True)
    c_CD = centroids(x_TD, buckets)
    (grad_D,) = torch.autograd.grad(restore(2 * c_CD, c_CD, x_TD, weights_TK, buckets, a_D).sum(), a_D)
    assert not grad_D.any()


def test_equal_tokens_are_one_row_per_expert() -> None:
    x_TD, weights_TK = torch.randn(1, D).double().expand(9, D), torch.rand(9, 2).double()
    codes_TH = cross_polytope_codes(x_TD, make_rotation(D, 3, 4, seed=2))
    indices_TK = torch.tensor([[0, 3], [3, 2], [0, 2]]).repeat(3, 1)
    buckets = bucket_rows(codes_TH, indices_TK, 5)
    assert buckets.counts_E.tolist() == [1, 0, 1, 1, 0]
    c_CD = centroids(x_TD, buckets)
    assert_same({"means": c_CD}, {"means": x_TD[:3]}, 1e-15)
    y_TD = restore(torch.tanh(c_CD), c_CD, x_TD, weights_TK, buckets, torch.ones(()))
    assert_same({"rows": y_TD}, {"rows": torch.tanh(x_TD) * weights_TK.sum(1, keepdim=True)}, 1e-14)


def test_weights_of_zero_give_a_plain_mean_and_take_no_gradient() -> None:
    buckets = bucket_rows(torch.tensor([[0], [0], [1], [1]]), torch.zeros(4, 1, dtype=torch.int64), 1)
    x_TD, weights_T1 = torch.randn(4, D), torch.tensor([[0.0], [0], [0], [2]], requires_grad=True)
    c_CD = centroids(x_TD, buckets, weights_T1)
    assert_same({"means": c_CD.detach()}, {"means": torch.stack([x_TD[:2].mean(0), x_TD[3]])}, 1e-6)
    (grad_T1,) = torch.autograd.grad(c_CD.sum(), weights_T1)
    expected_T = torch.zeros(4)
    expected_T[2] = (x_TD[2] - x_TD[3]).sum() / 2
    assert_same({"gradient": grad_T1[:, 0]}, {"gradient": expected_T}, 1e-6)


# broken values


@MASKS
def test_what_did_not_travel_leaks_nowhere(masks: str) -> None:
    kept_TK = torch.rand(20, 2) < 0.5
    exact_TK = torch.rand(20, 2) < 0.3 if masks in ("exact", "both") else None
    buckets = bucket_rows(torch.randint(0, 3, (20, 1)), torch.rand(20, 4).argsort(-1)[:, :2], 4, kept_TK, exact_TK)
    clean = layer_inputs(buckets)
    idle_T1 = ~kept_TK.any(1, keepdim=True)
    assert idle_T1.any()
    dirty = clean | {"x_TD": clean["x_TD"].masked_fill(idle_T1, torch.nan)}
    dirty["weights_TK"] = clean["weights_TK"].masked_fill(~kept_TK, torch.nan)
    got, want = (with_gradients(layer(lsh, buckets), inputs) for inputs in (dirty, clean))
    assert_same(got, want)
    assert not got["output"][idle_T1[:, 0]].any() and not got["gradient of x_TD"][idle_T1[:, 0]].any()
    assert not got["gradient of weights_TK"][~kept_TK].any()
    c_CD = centroids(clean["x_TD"], buckets)
    assert torch.equal(farther_than(dirty["x_TD"], c_CD, buckets, 0.1), farther_than(clean["x_TD"], c_CD, buckets, 0.1))


def test_broken_gradients_stay_with_the_rows_they_belong_to() -> None:
    kept_T1 = torch.tensor([[True], [True], [False], [True]])
    buckets = bucket_rows(torch.tensor([[0], [0], [0], [1]]), torch.zeros(4, 1, dtype=torch.int64), 1, kept_T1)
    x_TD, weights_T1, a_D = (torch.randn(shape, requires_grad=True) for shape in ((4, D), (4, 1), (D,)))
    c_CD = centroids(x_TD, buckets, weights_T1.square())
    grad_CD = torch.ones(2, D)
    grad_CD[0] = torch.nan
    for grad in torch.autograd.grad(c_CD, [x_TD, weights_T1], grad_CD, retain_graph=True):
        assert grad.isfinite().all(1).tolist() == [False, False, True, True]
    # what comes back for a token of which nothing travelled is no gradient
    y_TD, grad_TD = restore(2 * c_CD, c_CD, x_TD, weights_T1, buckets, a_D), torch.ones(4, D)
    clean, dirty = (
        dict(enumerate(torch.autograd.grad(y_TD, [x_TD, weights_T1, a_D], grad, retain_graph=True)))
        for grad in (grad_TD, grad_TD.masked_fill(~kept_T1, torch.nan))
    )
    assert_same(dirty, clean)


def test_a_broken_row_breaks_its_bucket_alone() -> None:
    codes_TH, indices_TK = torch.tensor([[0], [0], [1], [1]]), torch.zeros(4, 1, dtype=torch.int64)
    buckets = bucket_rows(codes_TH, indices_TK, 1)
    x_TD, weights_T1 = torch.randn(4, D), torch.ones(4, 1)
    x_TD[1] = torch.nan
    c_CD = centroids(x_TD, buckets)
    y_TD = restore(c_CD, c_CD, x_TD, weights_T1, buckets, torch.ones(()))
    assert y_TD.isfinite().all(1).tolist() == [False, False, True, True]
    # sent alone, it breaks no other
    exact_TK = farther_than(x_TD, c_CD, buckets, 100.0)
    assert exact_TK.flatten().tolist() == [True, True, False, False]
    buckets = bucket_rows(codes_TH, indices_TK, 1, exact_TK=exact_TK)
    assert centroids(x_TD, buckets).isfinite().all(1).tolist() == [True, True, False]


@MASKS
def test_rows_beyond_the_radius(masks: str) -> None:
    buckets = bucketed(25, 2, 4, masks)
    x_TD = torch.randn(25, D).double()
    c_CD = centroids(x_TD, buckets)
    far_TK = farther_than(x_TD, c_CD, buckets, 0.7)
    assert torch.equal(far_TK, reference.farther_than(x_TD, c_CD, buckets, 0.7))
    assert far_TK.any() and not far_TK.all()
    assert not farther_than(torch.zeros(25, D), torch.zeros_like(c_CD, dtype=torch.float32), buckets, 0.0).any()


# reruns, strides, and what is refused


def test_reruns_are_bitwise_equal() -> None:
    buckets = bucketed(300, 4, 8, "both", codes=5)
    inputs = layer_inputs(buckets, torch.float32)
    first, again = (with_gradients(layer(lsh, buckets), inputs) for _ in range(2))
    assert_same(again, first)


def test_strided_inputs() -> None:
    buckets = bucketed(10, 2, 4, "kept")
    inputs = layer_inputs(buckets)
    strided = {name: value.T.contiguous().T if value.ndim == 2 else value for name, value in inputs.items()}
    assert not strided["x_TD"].is_contiguous()
    got, want = (with_gradients(layer(lsh, buckets), x) for x in (strided, inputs))
    assert_same(got, want, 1e-13)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x_TD": torch.zeros(4, D)}, r"tokens torch.float32 \(4, 6\) and bucket_TK \(3, 2\)"),
        ({"x_TD": torch.zeros(3, D, dtype=torch.int64)}, "tokens torch.int64"),
        ({"weights_TK": torch.zeros(3, 1)}, r"weights .*\(3, 1\) and bucket_TK \(3, 2\)"),
        ({"expert_CD": torch.zeros(3, D)}, r"expert_CD is .*\(3, 6\); tokens .*\(3, 6\) in 2 buckets"),
        ({"centroids_CD": torch.zeros(2, D).half()}, "centroids_CD is torch.float16.*tokens torch.float32"),
        ({"compensation": torch.zeros(D + 1)}, r"compensation is .*\(7,\) and tokens \(3, 6\)"),
        ({"compensation": torch.zeros((), device="meta")}, "compensation on meta, x_TD on cpu"),
        ({"backend": "cuda"}, "backend 'cuda'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_restore_names_what_does_not_fit(change: dict[str, object], said: str) -> None:
    buckets = bucket_rows(CODES, INDICES, 2)
    good = {"expert_CD": torch.zeros(2, D), "centroids_CD": torch.zeros(2, D), "x_TD": torch.zeros(3, D)}
    with pytest.raises(ValueError, match=f"restore: .*{said}"):
        restore(**{**good, "weights_TK": torch.zeros(3, 2), "buckets": buckets, **change})


def test_means_and_distances_name_what_does_not_fit() -> None:
    buckets, x_TD = bucket_rows(CODES, INDICES, 2), torch.zeros(3, D)
    with pytest.raises(ValueError, match=r"centroids: weights .*\(2, 2\) and bucket_TK \(3, 2\)"):
        centroids(x_TD, buckets, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="epsilon = nan"):
        farther_than(x_TD, torch.zeros(2, D), buckets, float("nan"))
    with pytest.raises(ValueError, match="backend 'fast'"):
        centroids(x_TD, buckets, backend="fast")
