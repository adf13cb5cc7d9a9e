"""Tokens that cross to a node once: the results of the flat exchange over any nodes, and as few crossings as the formula says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import GlooPool, run_threads
from moefold.moe.dispatch import Computing, Dispatcher, DispatchPlan, Experts, make_plan
from moefold.moe.experts import GroupedExperts
from moefold.parallel.all_to_all import AllToAllDispatcher
from moefold.parallel.apply import build_dispatcher
from moefold.parallel.hierarchical import HierarchicalDispatcher, first_of_node
from moefold.parallel.mesh import Mesh, build_mesh
from moefold.parallel.nodes import NodeMap
from moefold.parallel.recorder import CommRecorder
from moefold.parallel.topology import Topology
from numeric import assert_same

D, F = 5, 4
Figures = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A layer's exchange. nodes: the node of each rank, a letter each. tokens: of each rank.

    choice: "uniform", "hot" (every token wants expert E - 1), "dropped" (a third of the choices travels) or "nothing" (none).
    """

    nodes: str
    ep: int
    etp: int = 1
    experts: int = 8
    top_k: int = 3
    tokens: tuple[int, ...] = (5, 0, 9, 2, 7, 1, 3, 8)
    choice: str = "uniform"
    dtype: torch.dtype = torch.float64
    pieces: int = 1

    @property
    def world(self) -> int:
        return len(self.nodes)

    @property
    def name(self) -> str:
        return f"{self.nodes}-ep{self.ep}-etp{self.etp}-top{self.top_k}of{self.experts}-{self.choice}-x{self.pieces}"

    def inputs(self, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x_TD, weights_TK, indices_TK, kept_TK of a rank; what does not travel holds NaN."""
        generator, T = torch.Generator().manual_seed(100 + rank), self.tokens[rank]
        draws_TE = torch.rand(T, self.experts, generator=generator)
        if self.choice == "hot":
            draws_TE[:, -1] = 2
        indices_TK = draws_TE.argsort(-1, descending=True)[:, : self.top_k]
        x_TD = torch.randn(T, D, dtype=torch.float64, generator=generator).to(self.dtype)
        weights_TK = torch.rand(T, self.top_k, dtype=torch.float64, generator=generator).to(
            torch.promote_types(self.dtype, torch.float32)
        )
        if self.choice not in ("dropped", "nothing"):
            return x_TD, weights_TK, indices_TK, None
        kept_TK = torch.rand(T, self.top_k, generator=generator) < (1 / 3 if self.choice == "dropped" else 0)
        return (
            x_TD.masked_fill(~kept_TK.any(1, True), torch.nan),
            weights_TK.masked_fill(~kept_TK, torch.nan),
            indices_TK,
            kept_TK,
        )

    def weights(self) -> tuple[Tensor, Tensor]:
        """w13_E2FD, w2_EDF of all experts."""
        generator = torch.Generator().manual_seed(7)
        shapes = ((self.experts, 2, F, D), (self.experts, D, F))
        w13_E2FD, w2_EDF = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
        return w13_E2FD.to(self.dtype), w2_EDF.to(self.dtype)

    def topology(self) -> Topology:
        return Topology(self.world, ep=self.ep, etp=self.etp)


def make_mesh(case: Case) -> Mesh:
    return build_mesh(case.topology(), torch.device("cpu"), nodes=NodeMap.by_name(case.nodes))


def local_experts(case: Case, mesh: Mesh) -> GroupedExperts:
    """This rank's experts, or its slices of them."""
    mine = mesh.topology.expert_range(mesh.coordinates.ep, case.experts)
    part = slice(mesh.coordinates.etp * F // case.etp, (mesh.coordinates.etp + 1) * F // case.etp)
    experts = GroupedExperts(len(mine), D, F // case.etp).to(case.dtype)
    w13_E2FD, w2_EDF = case.weights()
    with torch.no_grad():
        experts.w13_E2FD.copy_(w13_E2FD[mine.start : mine.stop, :, part])
        experts.w2_EDF.copy_(w2_EDF[mine.start : mine.stop, :, part])
    return experts


def sender(case: Case, mesh: Mesh, recorder: CommRecorder | None = None) -> Dispatcher:
    found = build_dispatcher("hierarchical", mesh, case.experts, pieces=case.pieces, recorder=recorder, layer=0)
    assert found is not None
    return found


def forward_backward(case: Case, rank: int, mesh: Mesh, dispatcher: Dispatcher, shared: bool = True) -> Figures:
    """Output and every gradient of one pass."""
    x_TD, weights_TK, indices_TK, kept_TK = case.inputs(rank)
    x_TD.requires_grad_()
    weights_TK.requires_grad_()
    experts = local_experts(case, mesh)
    plan = make_plan(indices_TK, weights_TK, case.experts, kept_TK)
    y_TD = dispatcher(x_TD, plan, experts, (lambda x_TD: 0.5 * x_TD.nan_to_num()) if shared else None)
    direction_TD = torch.randn(y_TD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    y_TD.backward(direction_TD.to(y_TD.dtype))
    named = {"x": x_TD, "weights": weights_TK, "w13": experts.w13_E2FD, "w2": experts.w2_EDF}
    gradients = {f"gradient of {n}": torch.zeros_like(x) if x.grad is None else x.grad for n, x in named.items()}
    return {"output": y_TD.detach(), **gradients}


def both_ways(rank: int, world: int, case: Case, want_two_levels: bool) -> tuple[Figures, Figures]:
    """(in two levels, flat) on one rank."""
    mesh = make_mesh(case)
    found = sender(case, mesh)
    assert isinstance(found, HierarchicalDispatcher if want_two_levels else AllToAllDispatcher)
    flat = AllToAllDispatcher(mesh.ep_etp_group, case.ep, case.etp, case.experts)
    return forward_backward(case, rank, mesh, found), forward_backward(case, rank, mesh, flat)


LAYOUTS = (
    Case("ab", 2),
    Case("aabb", 4),
    Case("abab", 4),
    Case("abba", 4),
    Case("abcd", 4),
    Case("abab", 2),
    Case("aabb", 2, etp=2),
    Case("abcabc", 6, experts=6),
    Case("aaaabbbb", 8),
    Case("abcdabcd", 8),
    Case("aabbccdd", 8, experts=16),
    Case("aabbaabb", 4, etp=2),
    Case("aabbbbaa", 4, etp=2),
    Case("abbaabba", 4),
)
DEGENERATE = (
    Case("abba", 4, choice="hot"),
    Case("aabb", 4, choice="dropped"),
    Case("abab", 4, choice="nothing"),
    Case("aabb", 2, etp=2, choice="dropped"),
    Case("aabb", 4, top_k=1),
    Case("abab", 4, top_k=8),
    Case("aabb", 4, experts=4, top_k=4, choice="dropped"),
    Case("aabb", 4, tokens=(0, 0, 0, 0)),
    Case("abab", 4, tokens=(0, 0, 11, 0), choice="hot"),
    Case("abba", 4, choice="dropped", pieces=2),
    Case("aabb", 2, etp=2, pieces=4),
)


@pytest.mark.parametrize("case", [*LAYOUTS, *DEGENERATE], ids=lambda case: case.name)
def test_two_levels_give_the_results_of_the_flat_exchange(case: Case) -> None:
    for in_two_levels, flat in run_threads(both_ways, case.world, case, True):
        assert_same(in_two_levels, flat, 1e-13)
        assert all(x.isfinite().all() for x in in_two_levels.values()), "what does not travel has leaked"


@pytest.mark.ranks
@pytest.mark.parametrize(
    "case", [Case("abba", 4, choice="dropped"), Case("aabbbbaa", 4, etp=2, pieces=2)], ids=lambda case: case.name
)
def test_two_levels_give_the_results_of_the_flat_exchange_on_processes(case: Case, gloo_pool: GlooPool) -> None:
    for in_two_levels, flat in gloo_pool.run(both_ways, case.world, case, True):
        assert_same(in_two_levels, flat, 1e-13)


def test_two_levels_in_bf16_are_as_far_from_fp64_as_the_flat_exchange() -> None:
    case = Case("aabb", 4, top_k=4, tokens=(40, 30, 0, 50))
    for rank, ((in_two_levels, flat), (_, exact)) in enumerate(
        zip(
            run_threads(both_ways, 4, replace(case, dtype=torch.bfloat16), True),
            run_threads(both_ways, 4, case, True),
            strict=True,
        )
    ):
        assert_same(in_two_levels, flat, 0.03)
        for name, want in exact.items():
            if want.numel():
                errors = [(x[name].double() - want).norm().item() for x in (in_two_levels, flat)]
                assert errors[0] <= 1.5 * errors[1], f"rank {rank}, {name}: {errors}"


@pytest.mark.parametrize("case", [Case("aaaa", 4), Case("aabb", 2), Case("aaaa", 2, etp=2)], ids=lambda case: case.name)
def test_groups_on_one_node_need_no_second_level(case: Case) -> None:
    for in_two_levels, flat in run_threads(both_ways, case.world, case, False):
        assert_same(in_two_levels, flat)


def one_process(case: Case) -> list[Figures]:
    """The same from all tokens and all experts at once, choice by choice."""
    w13_E2FD, w2_EDF = (w.requires_grad_() for w in case.weights())
    results = []
    for rank in range(case.world):
        x_TD, weights_TK, indices_TK, kept_TK = case.inputs(rank)
        x_TD.requires_grad_()
        weights_TK.requires_grad_()
        gate_TKF, up_TKF = torch.einsum("tkgfd,td->gtkf", w13_E2FD[indices_TK], x_TD)
        expert_TKD = torch.einsum("tkdf,tkf->tkd", w2_EDF[indices_TK], torch.nn.functional.silu(gate_TKF) * up_TKF)
        assert kept_TK is None
        y_TD = (weights_TK[..., None] * expert_TKD).sum(1)
        y_TD.backward(torch.randn(y_TD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)))
        results.append({"output": y_TD.detach(), "gradient of x": x_TD.grad, "gradient of weights": weights_TK.grad})
    return [{**r, "gradient of w13": w13_E2FD.grad, "gradient of w2": w2_EDF.grad} for r in results]


def in_two_levels(rank: int, world: int, case: Case) -> Figures:
    mesh = make_mesh(case)
    return forward_backward(case, rank, mesh, sender(case, mesh), shared=False)


@pytest.mark.parametrize("case", [Case("aabb", 4), Case("abba", 4)], ids=lambda case: case.name)
def test_two_levels_give_the_results_of_one_process(case: Case) -> None:
    each = case.experts // case.ep
    for rank, (got, want) in enumerate(zip(run_threads(in_two_levels, case.world, case), one_process(case), strict=True)):
        mine = {n: x[rank * each : (rank + 1) * each] if n.endswith(("w13", "w2")) else x for n, x in want.items()}
        assert_same(got, mine, 1e-13)


def test_a_rerun_changes_no_bit() -> None:
    case = Case("abba", 4, tokens=(30, 0, 20, 41))
    for first, second in zip(*(run_threads(in_two_levels, case.world, case) for _ in range(2)), strict=True):
        assert_same(first, second)


class Witness:
    """Experts that give rows back as they are, and remember them."""

    def __init__(self) -> None:
        self.seen: list[list[tuple[int, int]]] = []

    def __call__(self, x_TD: Tensor, work: Callable[[Tensor, Experts], Tensor]) -> Tensor:
        return work(x_TD, self)

    def late(self) -> Computing:
        return self

    def compute(self, x: Tensor, counts_E: Tensor, plan: DispatchPlan | None = None, shared_TD: Tensor | None = None) -> Tensor:
        self.seen += [[(int(r), int(t)) for r, t in block.tolist()] for block in x.split(counts_E.tolist())]
        return x


def order_at_experts(rank: int, world: int, case: Case) -> list[list[tuple[int, int]]]:
    """Rows of each of this rank's experts, as (source rank, token)."""
    mesh, witness = make_mesh(case), Witness()
    _, weights_TK, indices_TK, kept_TK = case.inputs(rank)
    x_TD = torch.tensor([[rank, t] for t in range(len(weights_TK))], dtype=torch.float64).view(-1, 2)
    sender(case, mesh)(x_TD, make_plan(indices_TK, weights_TK, case.experts, kept_TK), witness)
    return witness.seen


@pytest.mark.parametrize("nodes", ["aabb", "abba"])
def test_rows_at_an_expert_stand_in_the_promised_order(nodes: str) -> None:
    case = Case(nodes, 4)
    place = {rank: sorted(i for i, n in enumerate(nodes) if n == nodes[rank]).index(rank) for rank in range(4)}
    for rank, seen in enumerate(run_threads(order_at_experts, 4, case)):
        for expert, rows in enumerate(seen, 2 * rank):
            wanted = [(s, t) for s in range(4) for t, chosen in enumerate(case.inputs(s)[2].tolist()) if expert in chosen]
            assert rows == sorted(wanted, key=lambda row: (place[row[0]], *row))


# what crosses


def crossings(rank: int, world: int, case: Case) -> Counter[tuple[int, int, str]]:
    """Rows of one pass over the network by (source, target, purpose and direction)."""
    mesh, recorder = make_mesh(case), CommRecorder(rank, torch.device("cpu"))
    forward_backward(case, rank, mesh, sender(case, mesh, recorder), shared=False)
    size, found = case.dtype.itemsize, Counter[tuple[int, int, str]]()
    for record in recorder.records():
        if record.axis == "across_nodes" and record.what != "counts":
            row_bytes = size * (2 * case.top_k if record.what == "notes" else D)
            for target, sent_bytes in zip(record.members, record.sent, strict=True):
                assert sent_bytes % row_bytes == 0
                found[rank, target, f"{record.what} {record.direction}"] += sent_bytes // row_bytes
    return found


def pairs(case: Case) -> Counter[tuple[int, str]]:
    """Distinct (token, node) of the choices that travel, by (source rank, node)."""
    per_rank = case.experts // case.ep
    found: Counter[tuple[int, str]] = Counter()
    for rank in range(case.world):
        _, _, indices_TK, kept_TK = case.inputs(rank)
        kept_TK = torch.ones_like(indices_TK, dtype=torch.bool) if kept_TK is None else kept_TK
        for chosen, kept in zip(indices_TK.tolist(), kept_TK.tolist(), strict=True):
            for node in {case.nodes[e // per_rank * case.etp] for e, k in zip(chosen, kept, strict=True) if k}:
                found[rank, node] += 1
    return found


@pytest.mark.parametrize(
    "case",
    [
        Case("abba", 4),
        Case("abcd", 4, choice="dropped"),
        Case("aabb", 4, top_k=8),
        Case("aabb", 2, etp=2),
        Case("abab", 4, choice="nothing"),
        Case("aaaabbbb", 8, choice="hot"),
    ],
    ids=lambda case: case.name,
)
def test_a_token_crosses_to_a_node_once_and_its_sum_comes_back(case: Case) -> None:
    total = sum(run_threads(crossings, case.world, case), Counter())
    wanted = pairs(case)
    for what in ("dispatch", "notes", "combine"):
        # what goes out with the tokens' rows comes back with their gradients
        out, back = ("forward", "backward") if what != "combine" else ("backward", "forward")
        rows = {(s, t): n for (s, t, purpose), n in total.items() if purpose == f"{what} {out}" and n}
        assert {(source, case.nodes[target]): n for (source, target), n in rows.items()} == dict(wanted), what
        returned = {(t, s): n for (s, t, purpose), n in total.items() if purpose == f"{what} {back}" and n}
        assert returned == rows, what


@pytest.mark.parametrize("pieces", [1, 3])
def test_uniform_routing_crosses_as_often_as_the_formula_says(pieces: int) -> None:
    case = Case("abcd", 4, experts=16, top_k=4, tokens=(1000,) * 4, pieces=pieces)
    total = sum(run_threads(crossings, 4, case), Counter())
    rows = sum(n for (_, _, purpose), n in total.items() if purpose == "dispatch forward") / 4000
    nodes, E, K = 4, 16, 4
    assert rows == pytest.approx(nodes * (1 - math.comb(E - E // nodes, K) / math.comb(E, K)), rel=0.01)
    assert rows < 0.75 * K, "no better than one row for each choice"


@given(
    nodes=st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), max_size=5),
    kept=st.none() | st.lists(st.booleans(), min_size=20, max_size=20),
)
@settings(deadline=None)
def test_the_first_kept_choice_for_each_node_is_marked(nodes: list[list[int]], kept: list[bool] | None) -> None:
    node_TK = torch.tensor(nodes, dtype=torch.int64).view(-1, 4)
    kept_TK = None if kept is None else torch.tensor(kept)[: node_TK.numel()].view(-1, 4)
    first_TK = first_of_node(node_TK, kept_TK)
    for t, wanted in enumerate(nodes):
        travels = [k for k in range(4) if kept_TK is None or kept_TK[t, k]]
        assert first_TK[t].tolist() == [k in travels and wanted[k] not in [wanted[j] for j in travels if j < k] for k in range(4)]


# gradients


def gradients_of_one_token(rank: int, world: int, case: Case, source: int, token: int) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weights where one token of one rank has a gradient at its output."""
    mesh = make_mesh(case)
    x_TD, weights_TK, indices_TK, kept_TK = case.inputs(rank)
    x_TD.requires_grad_()
    weights_TK.requires_grad_()
    plan = make_plan(indices_TK, weights_TK, case.experts, kept_TK)
    y_TD = sender(case, mesh)(x_TD, plan, local_experts(case, mesh))
    direction_TD = torch.zeros_like(y_TD)
    if rank == source:
        direction_TD[token] = 1
    y_TD.backward(direction_TD)
    assert x_TD.grad is not None and weights_TK.grad is not None
    return x_TD.grad, weights_TK.grad


@pytest.mark.parametrize("choice", ["uniform", "dropped"])
def test_the_gradient_of_a_token_reaches_only_its_own_row_and_weights(choice: str) -> None:
    case, source, token = Case("abba", 4, choice=choice), 2, 3
    kept_TK = case.inputs(source)[3]
    travels_K = torch.ones(case.top_k, dtype=torch.bool) if kept_TK is None else kept_TK[token]
    assert travels_K.any() and (kept_TK is None or not travels_K.all())
    for rank, (x_TD, weights_TK) in enumerate(run_threads(gradients_of_one_token, 4, case, source, token)):
        own_T = torch.tensor([rank == source and t == token for t in range(case.tokens[rank])], dtype=torch.bool)
        assert torch.equal(x_TD.ne(0).any(1), own_T)
        assert torch.equal(weights_TK.ne(0), own_T[:, None] & travels_K)


original_init = HierarchicalDispatcher.__init__


def in_order_of_nodes(self: HierarchicalDispatcher, *args: Any, **options: Any) -> None:
    """Takes the order of nodes for that of the process group."""
    original_init(self, *args, **options)
    for node, experts in enumerate(self.groups.levels.experts(len(self.node_E))):
        self.node_E[list(experts)] = node


def test_nodes_taken_for_places_in_the_group_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HierarchicalDispatcher, "__init__", in_order_of_nodes)
    with pytest.raises(AssertionError, match="differs by"):
        test_two_levels_give_the_results_of_the_flat_exchange(Case("abba", 4))
