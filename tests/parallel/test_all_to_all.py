"""Rows reach the ranks of their experts in the promised order, and come back to where they were, whatever the splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import GlooPool, RankError, run_threads
from moefold.moe.dispatch import Computing, DispatchPlan, Experts, Pieces, make_plan
from moefold.parallel.all_to_all import AllToAllDispatcher, by_expert
from moefold.parallel.mesh import build_mesh
from moefold.parallel.topology import Topology
from moefold.parallel.transfer import exchange_rows

TOPOLOGIES = ((2, 2, 1), (2, 1, 2), (4, 4, 1), (4, 2, 1), (4, 2, 2), (4, 1, 2), (4, 1, 4), (8, 4, 2))
"""(world, ep, etp)"""
PIECES = (Pieces(3, 3), Pieces(1, 3), Pieces(2, 4), Pieces(4, 2), Pieces(2, 1))


@dataclass(frozen=True)
class Case:
    """Tokens of each rank and their experts: choice[rank][token] lists K different experts. spare: rows that do not travel."""

    world: int
    ep: int
    etp: int
    experts: int
    choices: tuple[tuple[tuple[int, ...], ...], ...]
    spare: int = 0

    @property
    def top_k(self) -> int:
        return max((len(experts) for rank in self.choices for experts in rank), default=1)

    def tokens(self, rank: int) -> Tensor:
        """[T, 2]: source rank and token."""
        return torch.tensor([[rank, t] for t in range(len(self.choices[rank]))], dtype=torch.float64).view(-1, 2)

    def indices(self, rank: int) -> Tensor:
        return torch.tensor(self.choices[rank], dtype=torch.int64).view(-1, self.top_k)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    world, ep, etp = draw(st.sampled_from(TOPOLOGIES))
    experts = ep * draw(st.integers(1, 3))
    top_k = draw(st.integers(1, min(3, experts)))
    # few favourites make one expert hot and leave others without rows
    favourites = draw(st.integers(top_k, experts))
    token = st.permutations(range(favourites)).map(lambda order: tuple(order[:top_k]))
    rank = st.lists(token, max_size=5).map(tuple)
    choices = draw(st.tuples(*[rank] * world))
    return Case(world, ep, etp, experts, choices, draw(st.integers(0, 2)))


def expected_at_expert(case: Case, members: tuple[int, ...], expert: int) -> list[list[float]]:
    """Rows of one expert by the promised order (source rank, token, k), told from the choices alone."""
    rows = []
    for source in members:
        for token, chosen in enumerate(case.choices[source]):
            rows += [[float(source), float(token)] for choice in chosen if choice == expert]
    return rows


class Witness:
    """Experts that keep what they are given, and return a function of it."""

    def __init__(self, returns: Callable[[Tensor], Tensor]):
        self.returns = returns
        self.rows: list[list[float]] = []
        self.counts: list[int] = []

    def __call__(self, x_TD: Tensor, work: Callable[[Tensor, Experts], Tensor]) -> Tensor:
        return work(x_TD, self)

    def late(self) -> Computing:
        return self

    def compute(self, x: Tensor, counts_E: Tensor, plan: DispatchPlan | None = None, shared_TD: Tensor | None = None) -> Tensor:
        assert plan is None and shared_TD is None
        self.rows += x.tolist()
        self.counts = counts_E.tolist()
        return self.returns(x)


def plan_of(case: Case, rank: int) -> DispatchPlan:
    """The case's choices with random weights, and behind them tokens that do not travel."""
    T, K = len(case.choices[rank]), case.top_k
    indices_TK = torch.cat([case.indices(rank), torch.arange(K).expand(case.spare, K)])
    kept_TK = (torch.arange(T + case.spare) < T)[:, None].expand(-1, K)
    weights_TK = torch.rand(T + case.spare, K, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    return make_plan(indices_TK, weights_TK, case.experts, kept_TK if case.spare else None)


def travel(rank: int, world: int, case: Case, pieces: int | Pieces = 1) -> None:
    """There and back on one rank; asserts what arrived, what came back, and the gradient."""
    topology = Topology(world, ep=case.ep, etp=case.etp)
    mesh = build_mesh(topology, torch.device("cpu"))
    dispatcher = AllToAllDispatcher(mesh.ep_etp_group, case.ep, case.etp, case.experts, pieces=pieces)
    plan = plan_of(case, rank)
    x_TD = torch.cat([case.tokens(rank), torch.full((case.spare, 2), torch.nan, dtype=torch.float64)]).requires_grad_()
    # each slice of an expert gives its share of the identity
    experts = Witness(lambda rows_XD: rows_XD / case.etp)
    y_TD = dispatcher(x_TD, plan, experts)

    members = topology.group_of("ep_etp", rank)
    mine = topology.expert_range(mesh.coordinates.ep, case.experts)
    expected = [expected_at_expert(case, members, expert) for expert in mine]
    if pieces == 1:
        assert experts.counts == [len(rows) for rows in expected]
        assert experts.rows == [row for rows in expected for row in rows]
    else:
        assert sorted(experts.rows) == sorted(row for rows in expected for row in rows)

    T = len(case.choices[rank])
    total_T1 = plan.weights_TK.sum(1, keepdim=True)
    torch.testing.assert_close(y_TD[:T], (x_TD * total_T1)[:T], rtol=1e-14, atol=0)
    assert not y_TD[T:].any()
    direction = torch.randn(y_TD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    y_TD.backward(direction)
    assert x_TD.grad is not None
    torch.testing.assert_close(x_TD.grad[:T], (direction * total_T1)[:T], rtol=1e-14, atol=1e-15)
    assert not x_TD.grad[T:].any()


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), pieces=st.sampled_from(PIECES))
@example(case=Case(4, 4, 1, 8, ((), ((0, 1),), ((0, 7), (0, 3)), ())), pieces=Pieces(1, 3))
@example(case=Case(4, 2, 2, 2, (((1,),) * 5, (), ((1,),), ((0,),))), pieces=Pieces(4, 2))
@example(case=Case(2, 2, 1, 2, ((), ())), pieces=Pieces(2, 4))
@example(case=Case(8, 4, 2, 4, (((3,),) * 4,) * 8, spare=1), pieces=Pieces(2, 1))
def test_identity_experts_return_every_row(case: Case, pieces: Pieces) -> None:
    run_threads(travel, case.world, case)
    run_threads(travel, case.world, case, pieces)


@pytest.mark.ranks
@pytest.mark.parametrize(("world", "ep", "etp"), [(2, 2, 1), (2, 1, 2), (4, 2, 2), (8, 4, 2)])
def test_identity_experts_return_every_row_on_processes(world: int, ep: int, etp: int, gloo_pool: GlooPool) -> None:
    uneven = tuple(tuple(((r + t) % 4, 3 - (r + t) % 2) for t in range(r % 3) if (r + t) % 4 < 2) for r in range(world))
    gloo_pool.run(travel, world, Case(world, ep, etp, 4, uneven, spare=1))
    gloo_pool.run(travel, world, Case(world, ep, etp, 4, uneven, spare=1), Pieces(2, 4))


def gradient_against_differences(rank: int, world: int, case: Case) -> tuple[Tensor, Tensor]:
    """(by autograd, by central differences) of the sum of all ranks' losses, with respect to this rank's tokens.

    The losses depend on the tokens through experts elsewhere, differently for each slice of an expert.
    """
    mesh = build_mesh(Topology(world, ep=case.ep, etp=case.etp), torch.device("cpu"))
    dispatcher = AllToAllDispatcher(mesh.ep_etp_group, case.ep, case.etp, case.experts, pieces=Pieces(4, 2))
    plan = plan_of(case, rank)
    generator = torch.Generator().manual_seed(rank)
    x_TD, weight_TD = torch.randn(2, len(plan.indices_TK), 2, dtype=torch.float64, generator=generator)
    squares = Witness(lambda rows_XD: rows_XD.square() * (mesh.coordinates.etp + 1))

    def loss(x_TD: Tensor) -> float:
        total = (dispatcher(x_TD, plan, squares) * weight_TD).sum()
        dist.all_reduce(total)
        return float(total)

    leaf = x_TD.clone().requires_grad_()
    (dispatcher(leaf, plan, squares) * weight_TD).sum().backward()
    numeric, step = torch.zeros_like(x_TD), 1e-3
    # every rank takes part in each evaluation, but only the owner moves a value
    for owner, choices in enumerate(case.choices):
        for index in range(2 * (len(choices) + case.spare)):
            delta = torch.zeros_like(x_TD)
            if owner == rank:
                delta.view(-1)[index] = step
            difference = (loss(x_TD + delta) - loss(x_TD - delta)) / (2 * step)
            if owner == rank:
                numeric.view(-1)[index] = difference
    assert leaf.grad is not None
    return leaf.grad, numeric


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 2, 1, 4, (((0, 3), (1, 2)), ((3, 0),)), spare=1),
        Case(4, 2, 2, 2, (((1,), (0,)), (), ((1,),), ((1,), (1,)))),
        Case(4, 4, 1, 4, (((3, 0),), (), ((3, 1),), ((3, 0),))),
    ],
    ids=["ep2", "ep2-etp2", "ep4-hot"],
)
def test_gradients_equal_differences(case: Case) -> None:
    for grad, numeric in run_threads(gradient_against_differences, case.world, case):
        torch.testing.assert_close(grad, numeric, rtol=1e-8, atol=1e-9)


@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=4))
@settings(deadline=None, derandomize=True)
def test_by_expert_is_a_stable_sort_of_blocks(blocks: list[list[int]]) -> None:
    counts_NL = torch.tensor(blocks)
    expert_X = torch.cat([torch.full((n,), e) for row in blocks for e, n in enumerate(row)])
    index_X, inverse_X = by_expert(counts_NL, int(counts_NL.sum()))
    assert torch.equal(index_X, torch.sort(expert_X, stable=True).indices)
    assert torch.equal(index_X[inverse_X], torch.arange(len(expert_X)))


SPLITS = {
    "even": [[2, 2, 2], [2, 2, 2], [2, 2, 2]],
    "ragged": [[0, 3, 1], [4, 0, 0], [2, 5, 1]],
    "only-to-self": [[3, 0, 0], [0, 0, 0], [0, 0, 2]],
    "nothing": [[0, 0, 0]] * 3,
    "one-receives-all": [[0, 7, 0], [0, 1, 0], [0, 9, 0]],
}


def both_exchanges(rank: int, world: int, splits: list[list[int]], dtype: torch.dtype) -> tuple[Any, Any]:
    send, receive = splits[rank], [splits[source][rank] for source in range(world)]
    # a transposed view with rows to spare: neither contiguity nor an exact length is asked of the caller
    x_RD = (torch.arange(3 * (sum(send) + 2)).view(3, -1) + 100 * rank).to(dtype).T
    assert dist.group.WORLD is not None
    ours = exchange_rows(x_RD, send, receive, dist.group.WORLD)
    theirs = torch.empty(sum(receive), 3, dtype=dtype)
    dist.all_to_all_single(theirs, x_RD[: sum(send)].contiguous(), receive, send)
    return ours.tolist(), theirs.tolist()


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS.keys())
def test_exchange_on_gloo_equals_its_all_to_all(splits: list[list[int]], dtype: torch.dtype, gloo_pool: GlooPool) -> None:
    for ours, theirs in gloo_pool.run(both_exchanges, 3, splits, dtype):
        assert ours == theirs


def test_rows_in_order_of_arrival_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    unsorted = lambda counts_NL, total: (torch.arange(total), torch.arange(total))  # noqa: E731
    monkeypatch.setattr("moefold.parallel.all_to_all.by_expert", unsorted)
    with pytest.raises(RankError, match="AssertionError"):
        run_threads(travel, 2, Case(2, 2, 1, 4, (((0, 1),), ((0, 1),))))
