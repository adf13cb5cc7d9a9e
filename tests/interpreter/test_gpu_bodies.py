"""The checks of tests/gpu in Triton's interpreter, in small: they pass for our kernels, and see what they are there to see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count

import pytest
import torch
from torch import Tensor

from gpu import bodies, large_bodies, routing_bodies
from gpu.measures import Relay, captured, host_waits, inside_wider_rows, transposed
from gpu.operations import OPERATIONS, Draw, Operation, Outputs, Size
from gpu.routing_bodies import RULES, RuleCase
from moefold.kernels.topk_gate import GateRule

pytestmark = pytest.mark.usefixtures("poisoned_memory")
CPU = torch.device("cpu")
SMALL = Size(T=9, K=2, E=4, D=12, F=6, drops=True)


def draw() -> Draw:
    return Draw(CPU, torch.float32)


def problem(op: str, size: Size = SMALL) -> Operation:
    return OPERATIONS[op](size, draw())


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_is_exact(op: str) -> None:
    bodies.check_exact(problem(op))


@pytest.mark.parametrize("size", [Size(0, 2, 4, 6, 4), Size(14, 2, 8, 1, 1, "few"), Size(14, 2, 4, 6, 4, "one")], ids=str)
@pytest.mark.parametrize("op", ["unpermute-shared", "grouped_gemm-tokens", "centroids-weighted"])
def test_ugly_sizes(op: str, size: Size) -> None:
    bodies.check_exact(problem(op, size))


@pytest.mark.parametrize("relay", [transposed, inside_wider_rows])
def test_strided_tensors(relay: Relay) -> None:
    operation = problem("restore")
    assert any(not relay(x).is_contiguous() for x in operation.leaves.values())
    assert all(torch.equal(relay(x), x) for x in operation.leaves.values())
    bodies.check_exact(operation, relay)


@pytest.mark.parametrize("op", ["unpermute", "restore"])
def test_reruns_and_waits(op: str) -> None:
    bodies.check_repeats(problem(op))
    bodies.check_never_waits(problem(op))


def test_gate() -> None:
    routing_bodies.check_gate(RULES["odd-groups"], 5, draw())


def test_choices_that_rounding_could_change_are_left_out() -> None:
    logits_TE = torch.tensor([[1.0, 0.0, -1.0, -2.0], [1.0, 1.0 + 1e-7, -1.0, -2.0], [1.0, 0.0, -1.0, -1.0]])
    assert routing_bodies.clear_tokens(logits_TE, GateRule(top_k=2), None).tolist() == [True, False, True]
    # group sums 1, 1 + 1e-7 and less
    logits_TE = torch.tensor([[1.0, 0.0, 0.5, 0.5 + 1e-7, -9.0, -9.0], [1.0, 0.5, 0.4, 0.3, -9.0, -9.0]])
    rule = GateRule(top_k=1, order="topk_softmax", num_groups=3, top_groups=1)
    assert routing_bodies.clear_tokens(logits_TE, rule, None).tolist() == [False, True]


def test_routing() -> None:
    routing_bodies.check_ties(draw(), 6, 8, 3)
    routing_bodies.check_broken_logits(draw(), 9, 6, 2)
    routing_bodies.check_sort(Size(30, 2, 5, 1, 1, drops=True), draw())


def test_lsh_and_quantised_rows() -> None:
    routing_bodies.check_codes(draw(), 70, 20, 3, 4)
    routing_bodies.check_buckets(Size(20, 2, 3, 1, 1, drops=True), draw())
    routing_bodies.check_distances(Size(30, 2, 3, 24, 1, drops=True), draw())
    routing_bodies.check_quantised(draw(), 9, 20, 8, inside_wider_rows)


def test_captured() -> None:
    bodies.check_captured(Size(3, 1, 2, 8, 6), draw(), backward=True)


def test_large() -> None:
    size = Size(12, 2, 3, 10, 6)
    large_bodies.check_permute_offsets(size, draw())
    large_bodies.check_unpermute_offsets(size, draw())
    large_bodies.check_product_offsets(size, draw(), gather=True)
    large_bodies.check_product_offsets(size, draw(), gather=False)
    large_bodies.check_layer_offsets(size, draw())


def test_the_layer_and_its_memory() -> None:
    bodies.check_layer(Size(8, 2, 4, 12, 6), draw(), "triton")
    bodies.check_saved(Size(12, 2, 4, 96, 48), draw())


def broken(operation: Operation, name: str, change: Callable[[Tensor], Tensor]) -> Operation:
    """Ours with one result changed: an output, or what comes back for a leaf."""

    def ours(**leaves: Tensor) -> Outputs:
        inputs = {n: _Changed.apply(x, change) if n == name else x for n, x in leaves.items()}
        return {n: change(y) if n == name else y for n, y in operation.ours(**inputs).items()}

    return replace(operation, ours=ours)


class _Changed(torch.autograd.Function):
    """The identity, whose gradient is changed."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change  # type: ignore[attr-defined]
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad), None  # type: ignore[attr-defined]


def one_value(x: Tensor) -> Tensor:
    """One value among many is off: too little for the error of the whole, not for that of its row."""
    changed = x.clone()
    changed[3, 2] += 1e-4
    return changed


@pytest.mark.parametrize(("name", "said"), [("rows", "rows: error"), ("x_TD", "gradient of x_TD: error")])
@pytest.mark.parametrize("change", [one_value, lambda x: x * (1 + 1e-5), lambda x: torch.where(x > 2, torch.nan, x)])
def test_a_wrong_result_is_named(name: str, said: str, change: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError, match=said):
        bodies.check_exact(broken(problem("permute", Size(90, 2, 4, 12, 6)), name, change))


def test_chance_is_seen() -> None:
    calls = count()
    with pytest.raises(AssertionError, match="two runs differ, or hold NaN, in rows"):
        bodies.check_repeats(broken(problem("permute"), "rows", lambda x: x + 1e-7 * next(calls)))


@pytest.mark.parametrize("name", ["rows", "x_TD"], ids=["forward", "backward"])
@pytest.mark.parametrize("read", [lambda x: x * x.amax().item(), lambda x: x if x.any() else -x], ids=["item", "bool"])
def test_a_wait_is_seen(name: str, read: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError, match="waits 1 times instead of 0"):
        bodies.check_never_waits(broken(problem("permute"), name, read))


def test_a_missing_wait_is_seen() -> None:
    with pytest.raises(AssertionError, match="waits 0 times instead of 1"), host_waits(CPU, expected=1):
        torch.ones(3).sum()


def test_a_layer_on_torch_is_seen() -> None:
    with pytest.raises(AssertionError, match="ran on torch"):
        bodies.check_layer(Size(8, 2, 4, 12, 6), draw(), "auto")


def test_memory_beside_the_formula_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    wasteful = OPERATIONS["moe_layer_mlp"]

    def made(size: Size, draw: Draw) -> Operation:
        # a square keeps its input, here a copy of the tokens
        return broken(wasteful(size, draw), "tokens", lambda y: y.clone().square())

    monkeypatch.setattr(bodies, "expert_layer", made)
    with pytest.raises(AssertionError, match=r"bytes are kept, 1\.[1-9]"):
        bodies.check_saved(Size(12, 2, 4, 96, 48), draw())


def test_a_graph_that_does_not_run_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "captured", lambda step, device: captured(lambda: None, device))
    with pytest.raises(AssertionError, match="a replay differs in output"):
        bodies.check_captured(Size(3, 1, 2, 8, 6), draw(), backward=False)


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("permute", large_bodies.check_permute_offsets),
        ("unpermute", large_bodies.check_unpermute_offsets),
        ("grouped_gemm", partial(large_bodies.check_product_offsets, gather=True)),
    ],
)
def test_a_wrong_offset_is_seen(monkeypatch: pytest.MonkeyPatch, name: str, check: Callable[[Size, Draw], None]) -> None:
    right = getattr(large_bodies, name)
    # the last rows are those of the beginning, as with an offset that wrapped around
    monkeypatch.setattr(large_bodies, name, lambda *args, **kwargs: torch.cat([(y := right(*args, **kwargs))[:-2], y[:2]]))
    with pytest.raises(AssertionError):
        check(Size(12, 2, 3, 10, 6), draw())


def test_rules_cover_every_way_of_the_gate() -> None:
    rules = [case.rule for case in RULES.values()]
    for name, values in (
        ("score", {"softmax", "sigmoid"}),
        ("order", {"softmax_topk", "topk_softmax"}),
        ("renormalize", {True, False}),
        ("group_score", {"top2_sum", "max"}),
    ):
        assert {getattr(rule, name) for rule in rules} == values
    assert {case.biased for case in RULES.values()} == {True, False}
    assert RuleCase(7, False, GateRule(top_k=7)) in RULES.values()
