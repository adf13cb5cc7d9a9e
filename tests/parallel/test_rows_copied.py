"""What is copied into rows on the way to experts: what travels, and no row for a choice that does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import run_threads
from moefold.kernels.permute import permute
from moefold.moe.dispatch import DispatchPlan, make_plan
from moefold.moe.experts import GroupedExperts
from moefold.parallel import all_to_all, hierarchical
from moefold.parallel.apply import build_dispatcher
from moefold.parallel.mesh import build_mesh
from moefold.parallel.nodes import NodeMap
from moefold.parallel.step_volume import DispatcherName
from moefold.parallel.topology import Topology

WORLD, T, E, K, D = 4, 30, 8, 4, 5


def plan_of(rank: int, kept: float) -> DispatchPlan:
    generator = torch.Generator().manual_seed(rank)
    indices_TK = torch.rand(T, E, generator=generator).argsort(-1)[:, :K]
    kept_TK = torch.rand(T, K, generator=generator) < kept
    return make_plan(indices_TK, torch.rand(T, K, generator=generator), E, None if kept == 1 else kept_TK)


def gradients(rank: int, world: int, name: DispatcherName, nodes: str, kept: float) -> None:
    mesh = build_mesh(Topology(world, ep=world), torch.device("cpu"), nodes=NodeMap.by_name(nodes))
    dispatcher, experts = build_dispatcher(name, mesh, E), GroupedExperts(E // world, D, 3)
    assert dispatcher is not None
    torch.nn.init.ones_(experts.w13_E2FD), torch.nn.init.ones_(experts.w2_EDF)
    x_TD = torch.ones(T, D, requires_grad=True)
    dispatcher(x_TD, plan_of(rank, kept), experts).sum().backward()
    assert x_TD.grad is not None


@pytest.mark.parametrize("kept", [1, 0.5, 0])
@pytest.mark.parametrize(("name", "nodes"), [("all_to_all", "aabb"), ("hierarchical", "abba"), ("hierarchical", "abcd")])
def test_only_what_travels_is_copied(name: DispatcherName, nodes: str, kept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[int] = []
    back: list[int] = []

    def counted(x_TD: Tensor, *plan: Any) -> Tensor:
        rows_RD = permute(x_TD, *plan)
        if x_TD.shape[1] == D:  # the weights of choices are laid out in the same way
            there.append(len(rows_RD))
            if rows_RD.requires_grad:
                rows_RD.register_hook(lambda grad_RD: back.append(len(grad_RD)))
        return rows_RD

    for module in (all_to_all, hierarchical):
        monkeypatch.setattr(module, "permute", counted)
    run_threads(gradients, WORLD, name, nodes, kept)
    plans = [plan_of(rank, kept) for rank in range(WORLD)]
    wanted = sum(int(plan.counts_E.sum()) for plan in plans)
    if name == "hierarchical":
        # a node of one rank copies as it computes
        wanted *= len(set(nodes)) < WORLD
        node_E = torch.tensor([nodes.index(node) for node in nodes]).repeat_interleave(E // WORLD)
        for plan in plans:
            kept_TK = torch.ones(T, K, dtype=torch.bool) if plan.kept_TK is None else plan.kept_TK
            pairs = {(t, int(node_E[plan.indices_TK[t, k]])) for t, k in kept_TK.nonzero().tolist()}
            wanted += len(pairs)
    assert sum(there) == sum(back) == wanted
