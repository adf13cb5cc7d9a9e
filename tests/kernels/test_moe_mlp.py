"""moe_mlp: every back end against the specification, with empty experts, rows beyond the counts, and strided tensors."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moefold.kernels import moe_mlp as op
from moefold.kernels.moe_mlp import Backend, LateGradients, act, choose_backend, moe_layer_mlp, moe_mlp
from moefold.kernels.permute import permute, unpermute
from moefold.kernels.sort_tokens import sort_tokens
from numeric import assert_same, with_gradients

pytestmark = pytest.mark.usefixtures("poisoned_memory")
D, F = 8, 16
COUNTS = {
    "no-rows": [0, 0, 0],
    "one-expert": [11],
    "one-takes-all": [0, 13, 0, 0],
    "usual": [5, 1, 7, 3],
    "empty-experts": [0, 4, 0, 0, 9, 0],
    "one-row-each": [1] * 8,
}
BACKENDS = [
    pytest.param("loop", torch.float64, 1e-13, id="loop-fp64"),
    pytest.param("loop", torch.float32, 2e-6, id="loop-fp32"),
    pytest.param("loop", torch.bfloat16, 2e-2, id="loop-bf16"),
    pytest.param("grouped", torch.float32, 2e-6, id="grouped-fp32"),
    pytest.param("grouped", torch.bfloat16, 2e-2, id="grouped-bf16"),
]


def tensors(counts: list[int], dtype: torch.dtype, extra_rows: int = 0) -> dict[str, Tensor]:
    E, R = len(counts), sum(counts) + extra_rows
    shapes = {"x_RD": (R, D), "w13_E2FD": (E, 2, F, D), "w2_EDF": (E, D, F)}
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def run(backend: Backend, counts: list[int], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return with_gradients(partial(moe_mlp, counts_E=torch.tensor(counts), backend=backend), inputs)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("extra_rows", [0, 3], ids=["all-rows-used", "rows-beyond-the-counts"])
@pytest.mark.parametrize(("backend", "dtype", "rtol"), BACKENDS)
def test_equals_the_specification(backend: Backend, dtype: torch.dtype, rtol: float, counts: list[int], extra_rows: int) -> None:
    inputs = tensors(counts, dtype, extra_rows)
    # what bf16 loses is judged by the exact result for the same bf16 inputs
    wide = torch.promote_types(dtype, torch.float32)
    want = run("reference", counts, {name: x.to(wide) for name, x in inputs.items()})
    got = run(backend, counts, inputs)
    assert all(x.dtype == dtype for x in got.values())
    assert_same({name: x.to(wide) for name, x in got.items()}, want, rtol)


@pytest.mark.parametrize(("backend", "dtype", "rtol"), BACKENDS)
def test_rows_beyond_the_counts_may_hold_anything(backend: Backend, dtype: torch.dtype, rtol: float) -> None:
    counts, inputs = [3, 0, 6], tensors([3, 0, 6], dtype, extra_rows=4)
    want = run(backend, counts, inputs)
    inputs["x_RD"][9:] = torch.nan
    got = run(backend, counts, inputs)
    assert_same(got, want)
    assert not got["output"][9:].any()
    assert not got["gradient of x_RD"][9:].any()


@pytest.mark.parametrize(("backend", "dtype", "rtol"), BACKENDS)
def test_gradients_that_come_back_beyond_the_counts_are_ignored(backend: Backend, dtype: torch.dtype, rtol: float) -> None:
    inputs = {name: x.requires_grad_() for name, x in tensors([3, 0, 6], dtype, extra_rows=4).items()}
    y_RD = moe_mlp(**inputs, counts_E=torch.tensor([3, 0, 6]), backend=backend)
    clean_RD = torch.randn(y_RD.shape).to(dtype)
    dirty_RD = clean_RD.clone()
    dirty_RD[9:] = torch.nan
    got, want = (
        dict(zip(inputs, torch.autograd.grad(y_RD, list(inputs.values()), grad_RD, retain_graph=True), strict=True))
        for grad_RD in (dirty_RD, clean_RD)
    )
    assert_same(got, want)


@pytest.mark.parametrize(("backend", "dtype", "rtol"), BACKENDS)
def test_strided_tensors(backend: Backend, dtype: torch.dtype, rtol: float) -> None:
    counts, inputs = [4, 2, 5], tensors([4, 2, 5], dtype)
    strided = {name: x.mT.contiguous().mT for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in strided.values())

    def transposed(**inputs: Tensor) -> Tensor:  # so that a strided gradient comes back
        return moe_mlp(**inputs, counts_E=torch.tensor(counts), backend=backend).T

    assert_same(with_gradients(transposed, strided), with_gradients(transposed, inputs), rtol)


@pytest.mark.parametrize(("backend", "dtype", "rtol"), BACKENDS)
def test_reruns_are_bitwise_equal(backend: Backend, dtype: torch.dtype, rtol: float) -> None:
    counts, inputs = [40, 0, 25, 63], tensors([40, 0, 25, 63], dtype)
    first = run(backend, counts, inputs)
    for _ in range(3):
        assert_same(run(backend, counts, inputs), first)


def test_the_gate_comes_first() -> None:
    w13_E2FD = torch.tensor([2.0, 3.0]).view(1, 2, 1, 1)
    y_RD = moe_mlp(torch.ones(1, 1), w13_E2FD, torch.full((1, 1, 1), 5.0), torch.tensor([1]))
    assert y_RD.item() == pytest.approx(2 / (1 + torch.exp(torch.tensor(-2.0)).item()) * 3 * 5)


@pytest.mark.parametrize(("backend", "dtype", "rtol"), BACKENDS)
def test_gelu_equals_the_specification(backend: Backend, dtype: torch.dtype, rtol: float) -> None:
    counts, wide = COUNTS["empty-experts"], torch.promote_types(dtype, torch.float32)
    inputs = tensors(counts, dtype, extra_rows=3)
    how = {"counts_E": torch.tensor(counts), "activation": "gelu_tanh"}
    want = with_gradients(partial(moe_mlp, **how, backend="reference"), {name: x.to(wide) for name, x in inputs.items()})
    got = with_gradients(partial(moe_mlp, **how, backend=backend), inputs)
    assert_same({name: x.to(wide) for name, x in got.items()}, want, rtol)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("backend", "dtype", "rtol"), BACKENDS)
def test_networks_without_a_gate_and_with_biases(backend: Backend, dtype: torch.dtype, rtol: float, gated: bool) -> None:
    """The specification is one network per expert, written out; rows beyond the counts give biases no gradient."""
    counts, inner = COUNTS["empty-experts"], 2 if gated else 1
    inputs = tensors(counts, dtype, extra_rows=3)
    inputs |= {"w13_E2FD": inputs["w13_E2FD"][:, :inner], "b13_E2F": torch.randn(len(counts), inner, F).to(dtype)}
    wide = torch.promote_types(dtype, torch.float32)

    def written_out(x_RD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, b13_E2F: Tensor) -> Tensor:
        rows = list(x_RD.split([*counts, 3]))
        for e, (w13_2FD, w2_DF, b13_2F) in enumerate(zip(w13_E2FD, w2_EDF, b13_E2F, strict=True)):
            first, *second = (torch.nn.functional.linear(rows[e], w, b) for w, b in zip(w13_2FD, b13_2F, strict=True))
            hidden = torch.nn.functional.gelu(first, approximate="tanh") * (second[0] if second else 1)
            rows[e] = hidden @ w2_DF.T
        return torch.cat([*rows[:-1], 0 * rows[-1]])

    want = with_gradients(written_out, {name: x.to(wide) for name, x in inputs.items()})
    for chosen, bound in ((backend, rtol), ("reference", rtol)):
        how = partial(moe_mlp, counts_E=torch.tensor(counts), activation="gelu_tanh", backend=chosen)
        got = with_gradients(how, inputs)
        assert_same({name: x.to(wide) for name, x in got.items()}, want, bound)


def test_triton_has_neither_biases_nor_networks_without_a_gate() -> None:
    rows = torch.empty(0, D)
    assert choose_backend(rows, gated=False, biased=True) == "loop"
    with pytest.raises(ValueError, match="has SwiGLU without biases only, not a network without a gate; use 'auto' or 'torch'"):
        choose_backend(rows, "triton", "gelu_tanh", gated=False)
    inputs = tensors([2], torch.float32)
    with pytest.raises(ValueError, match="not a network with biases"):
        moe_mlp(**inputs, counts_E=torch.tensor([2]), backend="triton", b13_E2F=torch.zeros(1, 2, F))
    with pytest.raises(ValueError, match=r"biases \(1, 1, 16\) are not those of w13, \(1, 2, 16\)"):
        moe_mlp(**inputs, counts_E=torch.tensor([2]), b13_E2F=torch.zeros(1, 1, F))


def test_gelu_is_its_tanh_formula() -> None:
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    want = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    assert_same({"gelu": act(x, "gelu_tanh")}, {"gelu": want}, 1e-14)


def test_triton_has_silu_only(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    # also where the rule would choose Triton
    monkeypatch.setattr(op, "choose", lambda name, backend, *_, **__: "triton" if backend == "auto" else backend)
    op._say_torch.cache_clear()
    rows = torch.empty(0, D)
    with caplog.at_level(logging.INFO, logger="moefold.kernels"):
        assert [choose_backend(rows, "auto", "gelu_tanh") for _ in range(2)] == ["loop", "loop"]
    assert choose_backend(rows, "auto", "silu") == "triton"
    assert [record.getMessage() for record in caplog.records] == [
        "moe_mlp runs on torch (the Triton products have silu only, not gelu_tanh)"
    ]
    with pytest.raises(ValueError, match="moe_mlp: backend 'triton' has silu only, not gelu_tanh; use 'auto' or 'torch'"):
        choose_backend(rows, "triton", "gelu_tanh")
    with pytest.raises(ValueError, match="activation 'relu' is none of 'silu', 'gelu_tanh'"):
        choose_backend(rows, "auto", "relu")  # type: ignore[arg-type]


def test_auto_takes_the_loop_on_cpu() -> None:
    assert {choose_backend(torch.empty(0, D, dtype=dtype)) for dtype in (torch.float64, torch.bfloat16)} == {"loop"}
    counts, inputs = [2, 3], tensors([2, 3], torch.float64)
    assert_same(run("auto", counts, inputs), run("loop", counts, inputs))


def test_unknown_back_ends_are_refused() -> None:
    with pytest.raises(ValueError, match="moe_mlp: backend 'fastest' is none of 'auto', 'torch', 'triton'"):
        run("fastest", [2, 3], tensors([2, 3], torch.float64))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["auto", "torch", "reference", "loop"])
@pytest.mark.parametrize("drops", [False, True], ids=["all-kept", "some-dropped"])
def test_tokens_to_tokens_is_permute_experts_unpermute_and_the_addition(backend: Backend, drops: bool) -> None:
    T, E, K = 19, 4, 2
    indices_TK = torch.rand(T, E).argsort(-1)[:, :K]
    kept_TK = torch.rand(T, K) < 0.6 if drops else None
    order_R, row_TK, counts_E = sort_tokens(indices_TK, E, kept_TK)
    inputs = {"x_TD": torch.randn(T, D), "weights_TK": torch.rand(T, K), "shared_TD": torch.randn(T, D)}
    inputs |= {name: x for name, x in tensors([0] * E, torch.float32).items() if name != "x_RD"}
    inputs = {name: x.double() for name, x in inputs.items()}

    def in_steps(x_TD: Tensor, weights_TK: Tensor, shared_TD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor) -> Tensor:
        y_RD = moe_mlp(permute(x_TD, order_R, row_TK, kept_TK), w13_E2FD, w2_EDF, counts_E, "reference")
        return unpermute(y_RD, weights_TK, order_R, row_TK, kept_TK) + shared_TD

    plan = {"order_R": order_R, "row_TK": row_TK, "counts_E": counts_E, "kept_TK": kept_TK, "backend": backend}
    assert_same(with_gradients(partial(moe_layer_mlp, **plan), inputs), with_gradients(in_steps, inputs), 1e-13)


@pytest.mark.parametrize(
    "wrong",
    [
        {"x_RD": (6, D + 1)},
        {"w13_E2FD": (2, 3, F, D)},
        {"w13_E2FD": (3, 2, F, D)},
        {"w2_EDF": (2, F, D)},
        {"w2_EDF": (2, D, F + 1)},
        {"counts_E": (3,)},
    ],
    ids=lambda wrong: f"{next(iter(wrong))}-{next(iter(wrong.values()))}",
)
def test_shapes_that_do_not_fit_are_refused(wrong: dict[str, tuple[int, ...]]) -> None:
    shapes: dict[str, tuple[int, ...]] = {"x_RD": (6, D), "w13_E2FD": (2, 2, F, D), "w2_EDF": (2, D, F), "counts_E": (2,)}
    inputs = {name: torch.zeros(shape) for name, shape in (shapes | wrong).items()}
    with pytest.raises(ValueError, match="do not fit each other"):
        moe_mlp(**{**inputs, "counts_E": inputs["counts_E"].long()})


class Step(torch.autograd.Function):
    """A step of the way to the experts, told when backward comes to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[str], name: str) -> Tensor:
        ctx.log, ctx.name = log, name
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.log.append(ctx.name)
        return grad, None, None


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_late_gradients_are_the_same_and_come_when_rows_are_on_their_way(backend: Backend, biased: bool) -> None:
    counts, dtype = [3, 0, 5], torch.float32
    inputs = tensors(counts, dtype, extra_rows=2)
    if biased:
        inputs["b13_E2F"] = torch.randn(3, 2, F)
    log: list[str] = []

    class Told(LateGradients):
        def due(self, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            log.append("weights")
            return super().due(grads)

    early = partial(moe_mlp, counts_E=torch.tensor(counts), backend=backend)

    def late(x_RD: Tensor, **weights: Tensor) -> Tensor:
        gradients = Told()
        x_RD = Step.apply(x_RD, log, "wait")
        taken = dict(zip(weights, gradients.taken(*weights.values()), strict=True))
        return early(x_RD=Step.apply(x_RD, log, "send"), **taken, late=gradients)

    assert_same(with_gradients(late, inputs), with_gradients(early, inputs), rtol=0)
    assert log == ["send", "weights", "wait"]


def test_weights_with_late_gradients_are_used_once() -> None:
    inputs, late = tensors([4], torch.float32), LateGradients()
    w13, w2 = late.taken(inputs["w13_E2FD"].requires_grad_(), inputs["w2_EDF"])
    assert w13 is not None and w2 is not None
    both = [moe_mlp(x, w13, w2, torch.tensor([4]), "loop", late=late) for x in (inputs["x_RD"], 2 * inputs["x_RD"])]
    with pytest.raises(RuntimeError, match="used by one operation only"):
        (both[0] + both[1]).sum().backward()


def test_frozen_weights_have_no_late_gradients() -> None:
    inputs, late = tensors([4], torch.float32), LateGradients()
    w13, w2 = late.taken(inputs["w13_E2FD"], inputs["w2_EDF"])
    assert w13 is not None and w2 is not None
    moe_mlp(inputs["x_RD"].requires_grad_(), w13, w2, torch.tensor([4]), "loop", late=late).sum().backward()
    assert inputs["x_RD"].grad is not None and inputs["w13_E2FD"].grad is None and late.due(()) == ()
