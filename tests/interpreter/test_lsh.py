"""The LSH kernels against their specification: codes, means, restored rows, every gradient, large buckets, and broken rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from moefold.kernels.lsh import Buckets, bucket_rows, cross_polytope_codes, make_rotation, reference, torch_impl, triton_impl
from moefold.kernels.lsh.triton_impl import centroids, farther_than, restore, segment_sum
from numeric import assert_same, with_gradients

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPES = pytest.mark.parametrize(
    ("tokens", "k", "num_experts", "width"),
    [(0, 2, 4, 8), (1, 1, 1, 6), (13, 1, 1, 16), (7, 4, 4, 21), (14, 2, 5, 33)],
    ids=["no-tokens", "one-row", "one-expert", "every-expert", "ragged-tiles"],
)
MASKS = pytest.mark.parametrize("masks", ["none", "both"])
DTYPES = pytest.mark.parametrize(
    ("dtype", "rtol"),
    # the interpreter cuts bf16 off instead of rounding it
    [(torch.float64, 1e-13), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)],
    ids=["fp64", "fp16", "bf16"],
)
TILE, CHUNK = (4, 32), 4


def bucketed(tokens: int, k: int, num_experts: int, masks: str = "none", codes: int = 3) -> Buckets:
    """Buckets of random choices whose tokens have one of `codes` codes."""
    indices_TK = torch.rand(tokens, num_experts).argsort(-1)[:, :k]
    kept_TK, exact_TK = (None, None) if masks == "none" else (torch.rand(tokens, k) < 0.6, torch.rand(tokens, k) < 0.3)
    return bucket_rows(torch.randint(0, codes, (tokens, 1)), indices_TK, num_experts, kept_TK, exact_TK)


def connected(fn: Callable[..., Tensor], **tensors: Tensor) -> Tensor:
    """fn(**tensors), with a gradient for every input even where the specification needs none of it."""
    output = fn(**tensors)
    return output + (0 * sum(x.nan_to_num().sum() for x in tensors.values())).to(output.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("tokens", "hashes", "width", "dim"),
    [(0, 2, 4, 8), (1, 1, 1, 1), (21, 3, 4, 70), (9, 6, 16, 32), (5, 3, 128, 20)],
    ids=["no-tokens", "one-row", "ragged-tiles", "usual", "several-groups"],
)
def test_codes_equal_the_specification(tokens: int, hashes: int, width: int, dim: int, dtype: torch.dtype) -> None:
    # whole numbers: sums are exact in any order, and ties are frequent
    x_TD, rotation_HPD = torch.randint(-2, 3, (tokens, dim)).to(dtype), torch.randint(-1, 2, (hashes, width, dim)).to(dtype)
    got_TH = triton_impl.cross_polytope_codes(x_TD, rotation_HPD, tokens=16)
    assert_same({"codes": got_TH}, {"codes": reference.cross_polytope_codes(x_TD, rotation_HPD)})


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's product of NaN
def test_codes_of_strided_and_of_broken_rows() -> None:
    x_DT, rotation_HPD = torch.randint(-9, 9, (12, 10)).float(), torch.randint(-9, 9, (3, 4, 12)).float()
    # an infinite value meets zeros and both signs: its token reaches infinitely far along some axes, and nowhere along others
    x_DT[3, 4], x_DT[:, 7], x_DT[2, 9] = torch.nan, torch.nan, torch.inf
    rotation_HPD[:, :2, 2] = torch.tensor([1.0, 0.0])
    codes = partial(cross_polytope_codes, rotation_HPD=rotation_HPD.mT.contiguous().mT)
    assert_same({"codes": codes(x_DT.T, backend="triton")}, {"codes": codes(x_DT.T, backend="torch")})


def test_codes_name_what_the_kernel_cannot_hash() -> None:
    with pytest.raises(ValueError, match=r"tokens torch.float64, .*use backend 'torch'"):
        cross_polytope_codes(torch.zeros(3, 8).double(), make_rotation(8, 1, 4, seed=0), backend="triton")
    with pytest.raises(ValueError, match=r"\(1, 512, 512\).* at most 256 directions"):
        cross_polytope_codes(torch.zeros(3, 512), torch.zeros(1, 512, 512), backend="triton")


def assert_centroids(
    buckets: Buckets, width: int, weighted: bool, dtype: torch.dtype = torch.float32, rtol: float = 3e-6
) -> None:
    inputs = {"x_TD": torch.randn(buckets.bucket_TK.shape[0], width).to(dtype)}
    if weighted:
        inputs["weights_TK"] = torch.rand(buckets.bucket_TK.shape).to(torch.promote_types(dtype, torch.float32))

    def means(x_TD: Tensor, weights_TK: Tensor | None = None) -> Tensor:
        return centroids(x_TD, buckets, weights_TK, TILE, CHUNK)

    want = with_gradients(partial(connected, partial(reference.centroids, buckets=buckets)), inputs)
    assert_same(with_gradients(means, inputs), want, rtol)


@SHAPES
@MASKS
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
def test_centroids_equal_the_specification(tokens: int, k: int, num_experts: int, width: int, masks: str, weighted: bool) -> None:
    assert_centroids(bucketed(tokens, k, num_experts, masks), width, weighted)


@DTYPES
def test_centroids_of_other_dtypes(dtype: torch.dtype, rtol: float) -> None:
    assert_centroids(bucketed(12, 2, 3, "both"), 17, True, dtype, rtol)


def assert_restored(
    buckets: Buckets, width: int, compensation: str, dtype: torch.dtype = torch.float32, rtol: float = 3e-6
) -> None:
    (T, K), C, wide = buckets.bucket_TK.shape, len(buckets.experts_C), torch.promote_types(dtype, torch.float32)
    shapes = {"expert_CD": (C, width), "centroids_CD": (C, width), "x_TD": (T, width)}
    inputs = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()} | {"weights_TK": torch.rand(T, K).to(wide)}
    given = {"buckets": buckets, "detach_residual": False}
    if compensation == "none":
        given["compensation"] = None
    else:
        inputs["compensation"] = torch.randn(() if compensation == "scalar" else width).to(wide)
    got, want = (
        with_gradients(partial(connected, partial(fn, **given)), inputs)
        for fn in (partial(restore, tile=TILE, chunk=CHUNK), reference.restore)
    )
    assert_same(got, want, rtol)


@SHAPES
@MASKS
@pytest.mark.parametrize("compensation", ["none", "scalar", "vector"])
def test_restore_equals_the_specification(
    tokens: int, k: int, num_experts: int, width: int, masks: str, compensation: str
) -> None:
    assert_restored(bucketed(tokens, k, num_experts, masks), width, compensation)


@DTYPES
def test_restored_rows_of_other_dtypes(dtype: torch.dtype, rtol: float) -> None:
    assert_restored(bucketed(12, 2, 3, "both"), 17, "vector", dtype, rtol)


@MASKS
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
def test_detached_residuals_equal_autograd(masks: str, weighted: bool) -> None:
    buckets, matrix_DD = bucketed(18, 2, 4, masks), torch.randn(12, 12).double()
    inputs = {"x_TD": torch.randn(18, 12), "weights_TK": torch.rand(18, 2), "a_D": torch.randn(12)}

    def layer(module: object, x_TD: Tensor, weights_TK: Tensor, a_D: Tensor) -> Tensor:
        c_CD = module.centroids(x_TD, buckets, weights_TK if weighted else None)
        return module.restore(torch.tanh(c_CD @ matrix_DD), c_CD, x_TD, weights_TK, buckets, a_D, True)

    doubled = {name: value.double() for name, value in inputs.items()}
    got, want = (with_gradients(partial(layer, module), doubled) for module in (triton_impl, reference))
    assert_same(got, want, 1e-12)


@pytest.mark.parametrize("sizes", [[40], [1, 40], [4, 5, 4, 5], [3, 9, 1, 4, 8, 2], [16, 1, 16, 1, 16], [5, 5, 5, 5, 5]], ids=str)
def test_buckets_larger_than_a_chunk(sizes: list[int]) -> None:
    codes_T1 = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])[:, None]
    codes_T1 = torch.cat([codes_T1, torch.zeros(3, 1, dtype=torch.int64)])
    kept_T1 = torch.arange(len(codes_T1))[:, None] < sum(sizes)
    shuffled_T = torch.randperm(len(codes_T1))
    buckets = bucket_rows(codes_T1[shuffled_T], torch.zeros_like(codes_T1), 1, kept_T1[shuffled_T])
    assert buckets.starts_C1.diff().tolist() == sizes
    rows_TD, weights_T1, a_D = torch.randn(len(codes_T1), 20).double(), torch.rand(len(codes_T1), 1).double(), torch.randn(20)
    sum_CD, scaled_CD = segment_sum(rows_TD, buckets, 1, weights_T1, factor=a_D, tile=(2, 16), chunk=CHUNK)
    want_CD = torch_impl.segment_sum(rows_TD, buckets, 1, weights_T1)
    assert_same({"sum": sum_CD, "scaled": scaled_CD}, {"sum": want_CD, "scaled": -a_D * want_CD}, 1e-14)
    means_CD = centroids(rows_TD, buckets, None, (2, 16), CHUNK)
    assert_same({"means": means_CD}, {"means": torch_impl.centroids(rows_TD, buckets, None)}, 1e-14)


@MASKS
def test_rows_beyond_the_radius(masks: str) -> None:
    buckets = bucketed(25, 2, 4, masks)
    x_TD = torch.randn(25, 20)
    x_TD[3] = torch.nan
    c_CD = torch_impl.centroids(x_TD, buckets, None)
    far_TK = farther_than(x_TD, c_CD, buckets, 0.7, TILE)
    assert torch.equal(far_TK, reference.farther_than(x_TD, c_CD, buckets, 0.7))
    assert far_TK.any() and not far_TK.all()


def test_what_did_not_travel_leaks_nowhere() -> None:
    kept_TK = torch.rand(20, 2) < 0.5
    buckets = bucket_rows(torch.randint(0, 3, (20, 1)), torch.rand(20, 4).argsort(-1)[:, :2], 4, kept_TK)
    idle_T1 = ~kept_TK.any(1, keepdim=True)
    assert idle_T1.any()
    clean = {"x_TD": torch.randn(20, 12), "weights_TK": torch.rand(20, 2), "a_D": torch.randn(12)}
    dirty = {
        "x_TD": clean["x_TD"].masked_fill(idle_T1, torch.nan),
        "weights_TK": clean["weights_TK"].masked_fill(~kept_TK, torch.nan),
        "a_D": clean["a_D"],
    }

    def layer(x_TD: Tensor, weights_TK: Tensor, a_D: Tensor) -> Tensor:
        c_CD = centroids(x_TD, buckets, weights_TK, TILE, CHUNK)
        return restore(torch.tanh(c_CD), c_CD, x_TD, weights_TK, buckets, a_D, False, TILE, CHUNK)

    got, want = (with_gradients(layer, inputs) for inputs in (dirty, clean))
    assert_same(got, want)
    assert not got["gradient of x_TD"][idle_T1[:, 0]].any() and not got["gradient of weights_TK"][~kept_TK].any()


def test_reruns_and_other_tiles() -> None:
    buckets = bucketed(20, 2, 3, "both")
    inputs = {"x_TD": torch.randn(20, 24), "weights_TK": torch.rand(20, 2), "a": torch.randn(())}

    def layer(tile: tuple[int, int] | None, chunk: int, x_TD: Tensor, weights_TK: Tensor, a: Tensor) -> Tensor:
        c_CD = centroids(x_TD, buckets, weights_TK, tile, chunk)
        return restore(torch.tanh(c_CD), c_CD, x_TD, weights_TK, buckets, a, False, tile, chunk)

    first, again, other = (
        with_gradients(partial(layer, *tiles), inputs) for tiles in ((TILE, CHUNK), (TILE, CHUNK), (None, triton_impl.CHUNK))
    )
    assert_same(again, first)
    assert_same(other, first, 1e-5)


def test_strided_inputs_and_expanded_gradients() -> None:
    buckets = bucketed(10, 2, 4, "both")
    C = len(buckets.experts_C)
    rows, inputs = partial(restore, buckets=buckets, detach_residual=False, tile=TILE, chunk=CHUNK), {
        "expert_CD": torch.randn(12, C).T,
        "centroids_CD": torch.randn(C, 24)[:, :12],
        "x_TD": torch.randn(12, 10).T,
        "weights_TK": torch.rand(2, 10).T,
        "compensation": torch.randn(24)[::2],
    }  # fmt: skip
    got, want = (with_gradients(rows, {n: fn(x) for n, x in inputs.items()}) for fn in (lambda x: x, torch.Tensor.contiguous))
    assert_same(got, want)
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    output_TD = rows(*leaves[:4], compensation=leaves[4])
    expanded, ones = (
        dict(zip(inputs, torch.autograd.grad(output_TD, leaves, grad, retain_graph=True), strict=True))
        for grad in (torch.ones(()).expand(10, 12), torch.ones(10, 12))
    )
    assert_same(expanded, ones)
    means_CD = centroids(inputs["x_TD"], buckets, inputs["weights_TK"], TILE, CHUNK)
    assert_same({"c": means_CD}, {"c": reference.centroids(inputs["x_TD"], buckets, inputs["weights_TK"])}, 1e-6)


def test_offsets_beyond_two_to_the_31() -> None:
    # three rows, 2^30 apart, in memory of which only these are ever touched: numpy's, as torch's would be poisoned
    far_TD = torch.from_numpy(np.empty(2**31 + 8, dtype=np.float16)).as_strided((3, 8), (2**30, 1))
    far_TD.copy_(torch.arange(24).view(3, 8))
    near_TD, weights_T1 = far_TD.contiguous(), torch.tensor([[0.5], [1.0], [0.25]])
    buckets = bucket_rows(torch.tensor([[1], [0], [1]]), torch.zeros(3, 1, dtype=torch.int64), 1)

    def layer(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        c_CD = centroids(x_TD, buckets, weights_TK, TILE)
        return restore(2 * c_CD, c_CD, x_TD, weights_TK, buckets, torch.ones(()), False, TILE)

    got, want = (with_gradients(layer, {"x_TD": x, "weights_TK": weights_T1}) for x in (far_TD, near_TD))
    assert_same(got, want)
    rotation_HPD = make_rotation(8, 2, 4, seed=0, dtype=torch.float16)
    codes_TH = triton_impl.cross_polytope_codes(far_TD, rotation_HPD, tokens=16)
    assert torch.equal(codes_TH, triton_impl.cross_polytope_codes(near_TD, rotation_HPD, tokens=16))


def test_tensors_on_two_devices_are_named() -> None:
    buckets = bucketed(3, 1, 1)
    with pytest.raises(ValueError, match="x_TD on meta, order_R on cpu"):
        centroids(torch.zeros(3, 4, device="meta"), buckets, None)
