"""The protocol of the kernels' benchmarks: formulas, routings, who is refused, timing in turns, and merging of processes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from bench.protocol import formulas
from bench.protocol.contender import Contender, Named, Problem, Raw, absent, by_autograd, make_problem
from bench.protocol.costs import saved_bytes
from bench.protocol.experts import ExactJudge, plain_results
from bench.protocol.gate import Checked, admit, allowances, check_expert_order, relative_error, renumbered, results_of
from bench.protocol.limits import cublas_bound, measure_limits
from bench.protocol.shapes import (
    ROUTINGS,
    SHAPES,
    TINY,
    Shape,
    expert_parallel_view,
    route,
    rows_max_over_mean,
    shape_named,
    sweep,
)
from bench.protocol.table import MEASURED, Setting, Work, figure, least_ratio, measure, merge
from bench.protocol.timing import Budget, Clock, Gauges, quantiles, ratio, take_turns
from torch import Tensor

from moefold.kernels.moe_mlp import moe_layer_mlp, moe_mlp
from moefold.kernels.sort_tokens import sort_tokens

CPU = torch.device("cpu")
MIB = 2**20
BY_NAME = {shape.name: shape for shape in SHAPES}
QUICK = Budget(warm_ups=1, samples=3, least=1)


# Milliseconds at 790 TFLOP/s and 4.3 TB/s, shares, and MiB, computed by hand from the formulas.
@pytest.mark.parametrize(
    ("name", "up_ms", "down_ms", "permute_ms", "combine_ms", "padding", "least_mib", "scatter_mib"),
    [
        ("A", 2.09, 1.04, 0.28, 0.28, 0.031, 896, 2944),
        ("B", 2.78, 1.39, 0.28, 0.28, 0.016, 1152, 3200),
        ("C", 9.74, 4.87, 0.09, 0.09, 0.016, 1920, 2432),
        ("D", 4.87, 2.44, 0.25, 0.25, 0.25, 624, 2416),
        ("E", 5.51, 2.75, 0.22, 0.22, 0.016, 1620, 3060),
        ("F", 1.74, 0.87, 0.34, 0.34, 0.10, 768, 3328),
        ("G", 5.57, 2.78, 0.56, 0.56, 0.031, 1280, 5376),
    ],
)
def test_formulas(
    name: str,
    up_ms: float,
    down_ms: float,
    permute_ms: float,
    combine_ms: float,
    padding: float,
    least_mib: int,
    scatter_mib: int,
) -> None:
    shape, rates = BY_NAME[name], (790e12, 4.3e12)
    assert formulas.bound_ms(formulas.up_flops(shape), formulas.up_bytes(shape), *rates) == pytest.approx(up_ms, abs=0.006)
    assert formulas.bound_ms(formulas.down_flops(shape), formulas.down_bytes(shape), *rates) == pytest.approx(down_ms, abs=0.006)
    assert formulas.bound_ms(0, formulas.permute_bytes(shape), *rates) == pytest.approx(permute_ms, abs=0.006)
    assert formulas.bound_ms(0, formulas.combine_bytes(shape), *rates) == pytest.approx(combine_ms, abs=0.006)
    assert formulas.padding_share(shape) == pytest.approx(padding, abs=0.005)
    assert formulas.saved_minimum_bytes(shape) == least_mib * MIB
    assert formulas.saved_scatter_bytes(shape) == scatter_mib * MIB


def test_layer_flops_are_those_of_its_six_products() -> None:
    shape = BY_NAME["A"]
    assert formulas.layer_flops(shape, "fwd") == formulas.up_flops(shape) + formulas.down_flops(shape)
    assert formulas.layer_flops(shape, "fwd+bwd") == 3 * formulas.layer_flops(shape, "fwd") == 18 * 262144 * 2048 * 768
    assert formulas.layer_flops(shape, "bwd") == 2 * formulas.layer_flops(shape, "fwd")


ROUTED = Shape("routed", 512, 8, 8, 16, 4)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_give_every_token_different_experts_and_the_same_ones_again(routing: str) -> None:
    indices_TK, weights_TK = route(ROUTED, routing, seed=3)
    assert indices_TK.dtype == torch.int64
    assert int(indices_TK.min()) >= 0 and int(indices_TK.max()) < ROUTED.E
    assert (indices_TK.sort(1).values.diff(dim=1) > 0).all()
    assert (weights_TK > 0).all() and torch.equal(weights_TK, weights_TK.bfloat16().float())
    again, other = route(ROUTED, routing, seed=3), route(ROUTED, routing, seed=4)
    assert torch.equal(again[0], indices_TK) and torch.equal(again[1], weights_TK)
    assert not torch.equal(other[0], indices_TK)


def test_routings_differ_in_balance() -> None:
    fullest = {routing: rows_max_over_mean(route(ROUTED, routing)[0], ROUTED.E) for routing in ROUTINGS}
    assert fullest["balanced"] < 1.3
    assert fullest["zipf"] > 2
    # 25 % of 2048 rows at one of 16 experts
    assert fullest["hot"] == 0.25 * 16
    counts_E = torch.bincount(route(ROUTED, "empty")[0].flatten(), minlength=ROUTED.E)
    assert int((counts_E == 0).sum()) == 2
    assert (torch.bincount(route(ROUTED, "balanced")[0].flatten(), minlength=ROUTED.E) > 0).all()


def test_the_hot_expert_gets_each_token_at_most_once() -> None:
    indices_TK, _ = route(Shape("many", 256, 8, 8, 16, 8), "hot")
    assert rows_max_over_mean(indices_TK, 16) == 16 / 8


def test_routing_that_leaves_too_few_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="4 different experts"):
        route(Shape("narrow", 8, 8, 8, 4, 4), "empty")
    with pytest.raises(ValueError, match="no routing 'even'"):
        route(TINY, "even")  # type: ignore[arg-type]


def test_views_and_sweeps_of_shapes() -> None:
    view = expert_parallel_view(BY_NAME["D"])
    assert (view.T, view.E, view.K, view.grouped) == (8192, 32, 1, True)
    indices_TK, weights_TK = route(replace(view, T=64, H=8, F=8), "zipf")
    assert (indices_TK.diff(dim=0) >= 0).all() and (weights_TK == 1).all()
    with pytest.raises(ValueError, match="3 ranks do not divide"):
        expert_parallel_view(TINY, 3)
    assert [shape.T for shape in sweep(BY_NAME["A"])][-1] == 32768 and sweep(BY_NAME["A"])[-1] == BY_NAME["A"]
    assert sweep(BY_NAME["A"])[0].name == "A-1024"
    with pytest.raises(ValueError, match="no shape 'H'; there are A, B"):
        shape_named("H")


def test_data_is_neither_zero_nor_constant() -> None:
    problem = make_problem(TINY, "balanced", torch.float32, "cpu")
    for x, std in ((problem.x_TD, 0.2), (problem.direction_TD, 0.2), (problem.w13_E2FD, 0.02), (problem.w2_EDF, 0.02)):
        assert float(x.std()) == pytest.approx(std, rel=0.2)


def layer(problem: Problem, forward: Callable[..., Tensor] | None = None, **settings: object) -> Contender:
    """A contender on the torch back ends; `forward` takes the plain output and returns what is claimed."""
    leaves = problem.leaves()
    x, w13, w2, *weights = leaves.values()

    def run() -> Tensor:
        plan = sort_tokens(problem.indices_TK, problem.shape.E, backend="torch")
        if problem.shape.grouped:
            y = moe_mlp(x, w13, w2, plan[2], backend="loop")
        else:
            y = moe_layer_mlp(x, weights[0], *plan, w13, w2, backend="loop")
        return forward(y) if forward else y

    return by_autograd("ours", run, leaves, problem.direction_TD, **({"kind": "ours"} | settings))  # type: ignore[arg-type]


@pytest.fixture
def problem() -> Problem:
    return make_problem(TINY, "empty", torch.float32, "cpu")


def admitted(problem: Problem, contenders: Sequence[Contender]) -> list[Checked]:
    judge = ExactJudge(problem)
    return admit(contenders, judge, allowances(judge(plain_results(problem))), CPU)


def test_a_right_contender_passes(problem: Problem) -> None:
    (checked,) = admitted(problem, [layer(problem)])
    assert checked.refused is None
    assert set(checked.errors) == {"out", "dX", "dW13", "dW2", "dS"}
    assert max(checked.errors.values()) < 1e-6


def test_exact_results_agree_with_plain_autograd(problem: Problem) -> None:
    x, w13, w2, s = (x.detach().double().requires_grad_() for x in problem.leaves().values())
    out = torch.zeros_like(x)
    for k in range(TINY.K):
        e = problem.indices_TK[:, k]
        gate, up = (torch.einsum("tfd,td->tf", w13[e, half], x) for half in (0, 1))
        out = out + s[:, k, None] * torch.einsum("tdf,tf->td", w2[e], torch.nn.functional.silu(gate) * up)
    grads = torch.autograd.grad(out, [x, w13, w2, s], problem.direction_TD.double())
    want = {"out": out.detach(), **dict(zip(("dX", "dW13", "dW2", "dS"), grads, strict=True))}
    errors = ExactJudge(problem)(want)
    assert set(errors) == set(want) and max(errors.values()) < 1e-12


@pytest.mark.parametrize("name", ["dX", "dW13", "dW2", "dS"])
def test_a_wrong_gradient_is_refused_by_name(problem: Problem, name: str) -> None:
    right = layer(problem)

    def gradients(raw: Raw) -> Named:
        named = right.named_gradients(raw)
        return {**named, name: named[name] * 1.01}

    (checked,) = admitted(problem, [replace(right, kind="peer", gradients=gradients)])
    assert checked.refused is not None and f"error of {name} 1.0" in checked.refused and "," not in checked.refused


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda named: {k: x for k, x in named.items() if k != "dS"}, "no dS among its results"),
        (lambda named: {**named, "dW2": named["dW2"].mT}, r"dW2 is \(4, 16, 32\), not \(4, 32, 16\)"),
        (lambda named: {**named, "dW2": named["dW2"] + 1e-30}, "not exactly zero, though it has no rows"),
        (lambda named: {**named, "dX": named["dX"] * math.nan}, "error of dX nan"),
    ],
    ids=["missing", "shape", "empty-expert", "nan"],
)
def test_results_that_cannot_be_right_are_refused(problem: Problem, change: Callable[[Named], Named], says: str) -> None:
    right = layer(problem)
    wrong = replace(right, kind="peer", gradients=lambda raw: change(right.named_gradients(raw)))
    with_reason = admitted(problem, [wrong])[0].refused
    assert with_reason is not None and re.search(says, with_reason)


def test_a_peer_that_raises_is_refused_and_the_others_go_on(problem: Problem) -> None:
    def fail(y: Tensor) -> Tensor:
        raise KeyError("no such kernel")

    first, second = admitted(problem, [layer(problem, fail, kind="peer"), layer(problem)])
    assert first.refused == "KeyError: 'no such kernel'"
    assert second.refused is None


def test_ours_that_is_wrong_ends_the_benchmark(problem: Problem) -> None:
    with pytest.raises(SystemExit, match=r"'ours' fails its check, so nothing is timed: error of out 1.0"):
        admitted(problem, [layer(problem, lambda y: y + 0.01 * y.detach())])


def test_ours_that_does_not_repeat_itself_ends_the_benchmark(problem: Problem) -> None:
    calls: list[int] = []

    def unsteady(y: Tensor) -> Tensor:
        calls.append(0)
        return y + (len(calls) % 2) * torch.finfo(torch.float32).eps * y

    with pytest.raises(SystemExit, match="two runs differ in out"):
        admitted(problem, [layer(problem, unsteady)])


@pytest.mark.parametrize("grouped", [False, True], ids=["tokens", "rows"])
def test_the_order_of_experts_is_free(grouped: bool) -> None:
    shape = expert_parallel_view(TINY, 2) if grouped else TINY
    problem = make_problem(shape, "balanced", torch.float32, "cpu")
    other, back = renumbered(problem, torch.roll(torch.arange(shape.E), 1))
    assert not torch.equal(other.w2_EDF, problem.w2_EDF)
    results = results_of(layer(problem))
    assert check_expert_order(results, layer(other), back) is None
    wrong = layer(other, lambda y: y + y.detach().abs().max())
    assert check_expert_order(results, wrong, back) == "results depend on the order of experts: out"


def test_relative_error_of_zeros() -> None:
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    assert relative_error(torch.tensor([1.1]), torch.tensor([1.0])) == pytest.approx(0.1, rel=1e-5)


def test_turns_alternate_and_whoever_raises_leaves() -> None:
    order: list[str] = []

    def broken() -> None:
        order.append("c")
        raise RuntimeError("out of memory\nmore")

    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b"), "c": broken}
    taken = take_turns(calls, Clock(CPU), Budget(warm_ups=1, samples=3))
    assert "".join(order) == "abc" + "ab" * 3
    assert len(taken["a"].ms) == len(taken["b"].ms) == 3
    assert taken["c"].why_not == "RuntimeError: out of memory" and not taken["c"].ms


def test_a_slow_contender_leaves_when_it_has_enough() -> None:
    budget = Budget(warm_ups=0, samples=20, enough_ms=0.0, least=4)
    assert len(take_turns({"a": lambda: None}, Clock(CPU), budget)["a"].ms) == 4


def test_quantiles_and_ratios() -> None:
    assert quantiles([float(i) for i in range(11)]) == (1.0, 5.0, 9.0)
    assert quantiles([2.0]) == (2.0, 2.0, 2.0)
    # the third turn of the first is left out: the other had none
    assert ratio([2.0, 6.0, 100.0], [1.0, 2.0]) == 2.5


def test_saved_bytes_count_each_storage_once_and_weights_apart() -> None:
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)

    def forward() -> Tensor:
        y = x @ w
        return y * y.exp()

    saved = saved_bytes(forward, [w])
    assert saved.weights == 4 * 4 * 4
    # x, y (twice, one storage) and exp(y)
    assert saved.activations == 3 * 8 * 4 * 4


def setting() -> Setting:
    clock = Clock(CPU)
    return Setting(clock, QUICK, Gauges(CPU), measure_limits(clock, torch.float32, QUICK, mm_size=16, copy_bytes=2**12))


def test_rows_have_the_same_columns_whoever_they_are_about(problem: Problem) -> None:
    peers = [replace(layer(problem), kind="peer", name="peer"), cublas_bound(problem), absent("missing", "not installed")]
    checked = [
        *admitted(problem, [layer(problem), *peers]),
        Checked(replace(layer(problem), name="bad"), {}, refused="error of out"),
    ]
    place = {"unit": "experts", "shape": str(TINY), "routing": "empty", "max_over_mean": 1.0}
    rows = measure(place, checked, setting(), lambda part: Work(1e9, 1e6, 1e4))
    assert all(set(row) == {*place, "contender", "kind", "pass", "note", *MEASURED} for row in rows)
    notes = {row["contender"]: row["note"] for row in rows if row["pass"] == "-"}
    assert notes == {"missing": "absent: not installed", "bad": "refused: error of out"}
    timed = [row for row in rows if row["pass"] != "-"]
    assert len(timed) == 9
    ours = {row["pass"]: row for row in timed if row["contender"] == "ours"}
    assert ours["fwd"]["ratio"] == 1
    assert ours["fwd"]["tflops"] == pytest.approx(1e9 / ours["fwd"]["p50_ms"] / 1e9)
    assert ours["fwd"]["gb_s"] == pytest.approx(1e6 / ours["fwd"]["p50_ms"] / 1e6)
    assert ours["bwd"]["difference_ms"] == ours["fwd+bwd"]["p50_ms"] - ours["fwd"]["p50_ms"]
    bound = next(row for row in timed if row["kind"] == "bound" and row["pass"] == "bwd")
    assert bound["of_bound_%"] == 100
    assert ours["bwd"]["of_bound_%"] == pytest.approx(100 * bound["p50_ms"] / ours["bwd"]["p50_ms"])
    assert ours["fwd"]["peak_mib"] is None and ours["fwd"]["launches"] is None, "not said on a CPU, and never 0"


def row(**cells: object) -> dict:
    return {"unit": "experts", "shape": "A: T32768 H1", "routing": "balanced", "contender": "ours", "kind": "ours"} | {
        "pass": "fwd", "p50_ms": 1.0, "ratio": 1.0, "note": "", **cells,
    }  # fmt: skip


def test_figures_come_from_the_rows_that_are_meant() -> None:
    rows = [
        row(p50_ms=2.0),
        row(p50_ms=3.0, shape="A-1024: T1024 H1"),
        row(contender="x", kind="peer", ratio=0.97),
        row(contender="y", kind="bound", ratio=0.5),
        row(contender="x", kind="peer", ratio=0.1, **{"pass": "bwd"}),
    ]
    assert figure(rows, "p50_ms", {"shape": "A: T32768 ", "contender": "ours"}) == 2.0
    assert figure(rows, "p50_ms", {"shape": "B", "contender": "ours"}) is None
    assert least_ratio(rows, ("fwd", "fwd+bwd")) == 0.97


def test_merging_takes_medians_of_numbers_and_keeps_words() -> None:
    runs = [[row(p50_ms=p, ratio=None, note="n")] for p in (1.0, 9.0, 2.0)]
    (merged,) = merge(runs)
    assert merged["p50_ms"] == 2.0 and merged["note"] == "n" and merged["ratio"] is None
    with pytest.raises(ValueError, match="different rows"):
        merge([[row()], [row(contender="other")]])


def test_a_contender_runs_or_says_why_not() -> None:
    with pytest.raises(ValueError, match="'x' needs either"):
        Contender("x")
