"""The experts' computation in Triton's interpreter against its specification in fp64: outputs and every gradient by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moefold.kernels.grouped_gemm.tiles import Tile, Tiles
from moefold.kernels.moe_mlp import LateGradients, reference
from moefold.kernels.moe_mlp import moe_layer_mlp as public_layer
from moefold.kernels.moe_mlp.triton_impl import moe_layer_mlp, moe_mlp
from moefold.kernels.permute import reference as permutation
from moefold.kernels.sort_tokens import sort_tokens
from numeric import assert_same, with_gradients

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TILES = Tiles(16, *(4 * [Tile(32, 32, 4, 2)]), 32)
FINE = Tiles(16, Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(16, 16, 4, 2), Tile(32, 16, 4, 2), 16)
"""Small, so that a few rows and columns are several tiles and rests of tiles; FINE along every axis of every kernel."""
COUNTS = {
    "no-rows": [0, 0, 0],
    "one-expert": [21],
    "one-takes-all": [0, 40, 0, 0],
    "tiles-and-one": [16, 17, 15, 1],
    "empty-experts": [0, 4, 0, 0, 33, 0],
}
D, F = 24, 20
RTOL = 4e-6
small_mlp, small_layer = partial(moe_mlp, tiles=TILES), partial(moe_layer_mlp, tiles=TILES)


def weights(E: int, D: int = D, F: int = F) -> dict[str, Tensor]:
    return {"w13_E2FD": torch.randn(E, 2, F, D), "w2_EDF": torch.randn(E, D, F)}


def tensors(counts: list[int], extra_rows: int = 0, D: int = D, F: int = F) -> dict[str, Tensor]:
    return {"x_RD": torch.randn(sum(counts) + extra_rows, D), **weights(len(counts), D, F)}


def run(fn: Callable[..., Tensor], inputs: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: x.double() for name, x in with_gradients(fn, {n: x.to(dtype) for n, x in inputs.items()}).items()}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("extra_rows", [0, 3], ids=["all-rows-used", "rows-beyond-the-counts"])
def test_equals_the_specification(counts: list[int], extra_rows: int) -> None:
    inputs, counts_E = tensors(counts, extra_rows), torch.tensor(counts)
    want = run(partial(reference.moe_mlp, counts_E=counts_E), inputs)
    assert_same(run(partial(small_mlp, counts_E=counts_E), inputs, torch.float32), want, RTOL)


@pytest.mark.parametrize(("D", "F"), [(32, 32), (35, 21), (1, 1)], ids=["whole-tiles", "odd", "one"])
def test_dimensions(D: int, F: int) -> None:
    inputs, counts_E = tensors([18, 3], 2, D, F), torch.tensor([18, 3])
    want = run(partial(reference.moe_mlp, counts_E=counts_E), inputs)
    assert_same(run(partial(moe_mlp, counts_E=counts_E, tiles=FINE), inputs, torch.float32), want, RTOL)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)], ids=["fp16", "bf16"])
def test_16_bits(dtype: torch.dtype, rtol: float) -> None:
    inputs, counts_E = {n: x.to(dtype) for n, x in tensors([19, 0, 9]).items()}, torch.tensor([19, 0, 9])
    want = run(partial(reference.moe_mlp, counts_E=counts_E), inputs)
    assert_same(run(partial(small_mlp, counts_E=counts_E), inputs, dtype), want, rtol)


def test_the_production_tiles() -> None:
    inputs, counts_E = tensors([66, 3], D=66, F=40), torch.tensor([66, 3])
    want = run(partial(reference.moe_mlp, counts_E=counts_E), inputs)
    assert_same(run(partial(moe_mlp, counts_E=counts_E), inputs, torch.float32), want, RTOL)


def test_rows_beyond_the_counts_and_their_gradients_are_not_read() -> None:
    counts_E, inputs = torch.tensor([3, 0, 18]), tensors([3, 0, 18], extra_rows=17)
    grad_RD = torch.randn(38, D)

    def gradients() -> dict[str, Tensor]:
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        y_RD = small_mlp(**leaves, counts_E=counts_E)
        grads = torch.autograd.grad(y_RD, list(leaves.values()), grad_RD)
        return {"output": y_RD.detach(), **dict(zip(leaves, grads, strict=True))}

    want = gradients()
    inputs["x_RD"][21:] = torch.nan
    grad_RD[21:] = torch.nan
    got = gradients()
    assert_same(got, want)
    assert not got["output"][21:].any()
    assert not got["x_RD"][21:].any()


def test_an_infinite_row_stays_with_its_expert() -> None:
    counts_E, inputs = torch.tensor([5, 7]), tensors([5, 7])
    fn = partial(small_mlp, counts_E=counts_E)
    want = run(fn, inputs, torch.float32)
    inputs["x_RD"][6] = torch.inf
    got = run(fn, inputs, torch.float32)
    assert not got["gradient of w2_EDF"][1].isfinite().all()
    for name in ("gradient of w13_E2FD", "gradient of w2_EDF"):
        assert torch.equal(got[name][0], want[name][0]), name
    assert torch.equal(got["output"][:5], want["output"][:5])


def test_strided_tensors() -> None:
    counts_E, inputs = torch.tensor([9, 14]), tensors([9, 14])
    strided = {name: x.mT.contiguous().mT for name, x in inputs.items()}

    def transposed(**inputs: Tensor) -> Tensor:  # so that a strided gradient comes back
        return small_mlp(**inputs, counts_E=counts_E).T

    assert_same(run(transposed, strided, torch.float32), run(transposed, inputs, torch.float32))


def test_only_the_rows_and_the_pre_activation_are_saved() -> None:
    inputs = {name: x.requires_grad_() for name, x in tensors([9, 14]).items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        small_mlp(**inputs, counts_E=torch.tensor([9, 14]))
    held = {x.data_ptr() for x in inputs.values()}
    assert [x.shape for x in saved if x.data_ptr() not in held] == [(23, 2 * F)]


def test_reruns_are_bitwise_equal() -> None:
    inputs, fn = tensors([17, 0, 8]), partial(small_mlp, counts_E=torch.tensor([17, 0, 8]))
    assert_same(run(fn, inputs, torch.float32), run(fn, inputs, torch.float32))


def layer_reference(
    x_TD: Tensor, weights_TK: Tensor, order_R: Tensor, row_TK: Tensor, counts_E: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor
) -> Tensor:
    """Permute, experts, weighted sum: what `moe_layer_mlp` is short for."""
    y_RD = reference.moe_mlp(permutation.permute(x_TD, order_R, row_TK), w13_E2FD, w2_EDF, counts_E)
    kept_TK = row_TK < counts_E.sum()
    return permutation.unpermute(y_RD, weights_TK, order_R, row_TK, kept_TK)


def layer_case(T: int, K: int, E: int, drop: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    indices_TK = torch.stack([torch.randperm(E)[:K] for _ in range(T)]) if T else torch.zeros(0, K, dtype=torch.int64)
    plan = sort_tokens(indices_TK, E, torch.rand(T, K) < 0.7 if drop else None)
    inputs = {"x_TD": torch.randn(T, D), "weights_TK": torch.rand(T, K), **weights(E)}
    return inputs, dict(zip(("order_R", "row_TK", "counts_E"), plan, strict=True))


@pytest.mark.parametrize("drop", [False, True], ids=["all-kept", "some-dropped"])
@pytest.mark.parametrize(
    ("T", "K", "E"), [(14, 3, 5), (9, 4, 4), (33, 1, 1), (0, 2, 3)], ids=["usual", "all-experts", "one-expert", "no-tokens"]
)
def test_layer_equals_the_specification(T: int, K: int, E: int, drop: bool) -> None:
    inputs, plan = layer_case(T, K, E, drop)
    want = run(partial(layer_reference, **plan), inputs)
    assert_same(run(partial(moe_layer_mlp, **plan, tiles=FINE), inputs, torch.float32), want, RTOL)


def test_layer_adds_the_shared_experts() -> None:
    inputs, plan = layer_case(14, 3, 5)
    inputs["shared_TD"] = torch.randn(14, D)
    want = run(lambda shared_TD, **others: layer_reference(**others, **plan) + shared_TD, inputs)
    assert_same(run(partial(small_layer, **plan), inputs, torch.float32), want, RTOL)
    assert_same(run(partial(public_layer, **plan, backend="triton"), inputs, torch.float32), want, RTOL)


def test_layer_in_float64() -> None:
    inputs, plan = layer_case(14, 3, 5)
    assert_same(run(partial(small_layer, **plan), inputs), run(partial(layer_reference, **plan), inputs), 1e-13)


def test_layer_production_tiles() -> None:
    inputs, plan = layer_case(20, 2, 3)
    want = run(partial(layer_reference, **plan), inputs)
    assert_same(run(partial(moe_layer_mlp, **plan), inputs, torch.float32), want, RTOL)


def test_layer_one_expert_takes_all() -> None:
    inputs, _ = layer_case(33, 1, 3)
    plan = dict(zip(("order_R", "row_TK", "counts_E"), sort_tokens(torch.ones(33, 1, dtype=torch.int64), 3), strict=True))
    want = run(partial(layer_reference, **plan), inputs)
    got = run(partial(small_layer, **plan), inputs, torch.float32)
    assert_same(got, want, RTOL)
    assert not got["gradient of w2_EDF"][[0, 2]].any()


def test_layer_weights_of_what_is_dropped_may_hold_anything() -> None:
    """Their rows are zeros; their gradients too."""
    inputs, plan = layer_case(15, 3, 4, drop=True)
    dropped_TK = plan["row_TK"] >= plan["counts_E"].sum()
    assert dropped_TK.any()
    fn = partial(small_layer, **plan)
    want = run(fn, inputs, torch.float32)
    assert not want["gradient of weights_TK"][dropped_TK].any()
    got = run(fn, inputs | {"weights_TK": inputs["weights_TK"].masked_fill(dropped_TK, 1e30)}, torch.float32)
    assert_same(got, want)


def test_layer_reruns_are_bitwise_equal() -> None:
    inputs, plan = layer_case(15, 3, 4, drop=True)
    fn = partial(small_layer, **plan)
    assert_same(run(fn, inputs, torch.float32), run(fn, inputs, torch.float32))


def test_weights_without_gradient_cost_none() -> None:
    inputs = tensors([9, 14])
    x_RD = inputs["x_RD"].requires_grad_()
    small_mlp(x_RD, inputs["w13_E2FD"], inputs["w2_EDF"], torch.tensor([9, 14])).sum().backward()
    assert x_RD.grad is not None
    assert inputs["w13_E2FD"].grad is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"w2_EDF": torch.zeros(2, D, F).half()}, r"torch.float32 .*torch.float16 .*one dtype"),
        ({"w2_EDF": torch.zeros(2, F, D)}, r"\(2, 2, 20, 24\).*\(2, 20, 24\).*do not fit"),
        ({"w13_E2FD": torch.zeros(2, 3, F, D)}, r"\(2, 3, 20, 24\).*do not fit"),
        ({"counts_E": torch.tensor([3, 2, 1])}, r"counts torch.int64 \(3,\)"),
        ({"w2_EDF": torch.zeros(2, D, F, device="meta")}, r"w2 on meta"),
        ({"weights_TK": torch.zeros(3, 3)}, r"\(3, 3\).*\(3, 2\)"),
        ({"weights_TK": torch.zeros(3, 2, dtype=torch.int64)}, r"need floats"),
        ({"x_TD": torch.zeros(4, D)}, r"\(4, 24\) has 4 rows; 3"),
        ({"shared_TD": torch.zeros(3, D + 1)}, r"shared torch.float32 \(3, 25\).*differ"),
    ],
    ids=["dtypes", "w2", "w13", "experts", "devices", "weights", "integer-weights", "tokens", "shared"],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Tensor], says: str) -> None:
    plan = {"order_R": torch.arange(6), "row_TK": torch.arange(6).view(3, 2), "counts_E": torch.tensor([3, 3])}
    good = {"x_TD": torch.zeros(3, D), "weights_TK": torch.zeros(3, 2), **plan, **weights(2)}
    with pytest.raises(ValueError, match=says):
        moe_layer_mlp(**good | changes)


@pytest.mark.parametrize("layer", [False, True], ids=["rows", "tokens"])
def test_gradients_of_weights_may_come_late(layer: bool) -> None:
    inputs, plan = layer_case(9, 2, 4) if layer else (tensors([17, 0, 8], 2), {"counts_E": torch.tensor([17, 0, 8])})
    fn = partial(small_layer if layer else small_mlp, **plan)
    puts: list[int] = []

    class Told(LateGradients):
        def put(self, *args: Any) -> Any:
            puts.append(1)
            return super().put(*args)

    def late(w13_E2FD: Tensor, w2_EDF: Tensor, **others: Tensor) -> Tensor:
        gradients = Told()
        w13, w2 = gradients.taken(w13_E2FD, w2_EDF)
        return fn(**others, w13_E2FD=w13, w2_EDF=w2, late=gradients)

    assert_same(run(late, inputs, torch.float32), run(fn, inputs, torch.float32))
    assert puts == [1]
