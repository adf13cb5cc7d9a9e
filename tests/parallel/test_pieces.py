"""Forward and backward with their own number of pieces: how many exchanges there are, what each carries, what is done meanwhile,
and the same numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import run_threads
from moefold.moe.compress import LSHCodec
from moefold.moe.config import CompressConfig, MoEConfig
from moefold.moe.dispatch import Dispatcher, Pieces, make_plan
from moefold.moe.experts import GroupedExperts
from moefold.moe.init import init_weights
from moefold.parallel.apply import build_dispatcher
from moefold.parallel.comm_record import CommRecord
from moefold.parallel.mesh import build_mesh
from moefold.parallel.nodes import NodeMap
from moefold.parallel.parity import RankTrace, run_layout, run_reference
from moefold.parallel.parity_compare import compare
from moefold.parallel.parity_layouts import LAYOUTS, VARIANTS, Layout
from moefold.parallel.recorder import CommRecorder
from moefold.parallel.topology import Topology
from moefold.parallel.transfer import transfers

D, E, K, T = 6, 8, 2, 24
TOLERANCE = 1e-9


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (2, 3), (4, 6), (-2, -1)])
def test_pieces_that_cannot_share_units_are_refused(numbers: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{numbers[0]} pieces forward and {numbers[1]} backward: .* divide the other"):
        Pieces(*numbers)


def test_units_are_the_finer_of_both_cuts() -> None:
    assert [Pieces(*numbers).units for numbers in ((1, 1), (2, 4), (6, 3))] == [1, 4, 6]
    assert Pieces.of(3) == Pieces(3, 3) and Pieces.of(Pieces(1, 2)) == Pieces(1, 2)
    assert (str(Pieces(3, 3)), str(Pieces(1, 2))) == ("3", "1 forward, 2 backward")


def passed(rank: int, world: int, nodes: str, pieces: Pieces) -> tuple[Tensor, list[Tensor], list[CommRecord]]:
    """A layer there and back: what comes out, the gradients of tokens and of a rank's experts, and the records. Rank 1 has no
    tokens."""
    mesh = build_mesh(Topology(world, ep=world), torch.device("cpu"), nodes=NodeMap.by_name(list(nodes)) if nodes else None)
    recorder = CommRecorder(rank, torch.device("cpu"))
    name = "hierarchical" if nodes else "all_to_all"
    dispatcher: Dispatcher | None = build_dispatcher(name, mesh, E, pieces=pieces, recorder=recorder, layer=0)
    assert dispatcher is not None
    experts = GroupedExperts(E, D, 4)
    init_weights(experts, seed=0)
    experts = experts.double()
    for parameter in experts.parameters():
        parameter.data = parameter.data[rank * E // world : (rank + 1) * E // world].clone()
    generator, tokens = torch.Generator().manual_seed(rank), 0 if rank == 1 else T
    x_TD = torch.randn(tokens, D, dtype=torch.float64, generator=generator).requires_grad_()
    weights_TK = torch.rand(tokens, K, dtype=torch.float64, generator=generator).requires_grad_()
    indices_TK = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(tokens)] or [torch.empty(K)])[:tokens]
    kept_TK = torch.rand(tokens, K, generator=generator) < 0.9
    y_TD = dispatcher(x_TD, make_plan(indices_TK.long(), weights_TK, E, kept_TK), experts)
    with recorder.during("backward"):
        (y_TD * torch.randn(y_TD.shape, dtype=torch.float64, generator=generator)).sum().backward()
    grads = [p.grad for p in (x_TD, weights_TK, *experts.parameters())]
    return y_TD.detach(), [g for g in grads if g is not None], recorder.records()


def numbers_of(records: list[CommRecord], axis: str, what: str, direction: str) -> list[CommRecord]:
    return [r for r in records if (r.axis, r.what, r.direction) == (axis, what, direction)]


@pytest.mark.parametrize(("nodes", "world"), [("", 4), ("abab", 4), ("abcd", 4)])
def test_each_direction_has_its_own_number_of_exchanges(nodes: str, world: int) -> None:
    axis = "across_nodes" if nodes else "ep_etp"
    whole = run_threads(passed, world, nodes, Pieces())
    for pieces in (Pieces(2, 4), Pieces(4, 2), Pieces(1, 3), Pieces(2, 1)):
        for (y_TD, grads, records), (one_TD, one_grads, one_records) in zip(
            run_threads(passed, world, nodes, pieces), whole, strict=True
        ):
            torch.testing.assert_close(y_TD, one_TD, rtol=1e-12, atol=1e-13)
            assert len(grads) == len(one_grads) == 4
            for grad, one in zip(grads, one_grads, strict=True):
                torch.testing.assert_close(grad, one, rtol=1e-12, atol=1e-13)
            for what in ("dispatch", "combine", *(["notes"] if nodes else [])):
                for direction, n in (("forward", pieces.forward), ("backward", pieces.backward)):
                    found, [one_record] = (numbers_of(r, axis, what, direction) for r in (records, one_records))
                    assert len(found) == n, (what, direction)
                    assert [sum(to) for to in zip(*(r.sent for r in found), strict=True)] == list(one_record.sent)
                    assert [sum(to) for to in zip(*(r.received for r in found), strict=True)] == list(one_record.received)
                    if one_record.rows_E is not None:
                        assert [sum(e) for e in zip(*(r.rows_E or () for r in found), strict=True)] == list(one_record.rows_E)


def test_all_that_can_be_under_way_is_before_anything_is_waited_for() -> None:
    for pieces in (Pieces(2, 4), Pieces(4, 2)):
        for _, _, records in run_threads(passed, 4, "", pieces):
            for what, direction in (("dispatch", "forward"), ("combine", "backward")):
                found = numbers_of(records, "ep_etp", what, direction)
                assert all(r.wait_s is not None for r in found)
                assert max(r.begin_s for r in found) <= min(r.wait_s or 0.0 for r in found)


class Watched(torch.autograd.Function):
    """Shared experts that note when they are computed, on the clock of the recorder."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, seen: dict[str, float]) -> Tensor:
        ctx.seen, seen["forward"] = seen, time.perf_counter()
        return 2 * x_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        ctx.seen["backward"] = time.perf_counter()
        return 2 * grad_TD, None


def shared_beside(rank: int, world: int, compressed: bool, pieces: Pieces) -> dict[str, tuple[float, float, float]]:
    """(rows sent, shared experts, wait) of a layer, forward and backward; the result holds the shared experts' part."""
    mesh = build_mesh(Topology(world, ep=world), torch.device("cpu"))
    recorder, seen = CommRecorder(rank, torch.device("cpu")), dict[str, float]()
    dispatcher = build_dispatcher("all_to_all", mesh, E, pieces=pieces, recorder=recorder, layer=0)
    assert dispatcher is not None
    experts = GroupedExperts(E // world, D, 4)
    init_weights(experts, seed=0)
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    plan = make_plan(torch.arange(T * K).view(T, K) % E, torch.ones(T, K), E)

    def shared(x_TD: Tensor) -> Tensor:
        return Watched.apply(x_TD, seen)

    def layer(x_TD: Tensor, shared: Callable[[Tensor], Tensor] | None) -> Tensor:
        if not compressed:
            return dispatcher(x_TD, plan, experts, shared)
        compress = CompressConfig(method="lsh", rate=0.5, hash_width=4)
        codec = LSHCodec(D, MoEConfig(num_experts=E, top_k=K, expert_dim=4, compress=compress))
        if codec.scale_D is not None:
            torch.nn.init.zeros_(codec.scale_D)
        return codec(dispatcher, x_TD, plan, experts, shared)[0]

    without_TD = layer(x_TD.detach(), None)
    first = recorder.begun
    y_TD = layer(x_TD, shared)
    torch.testing.assert_close(y_TD, without_TD + 2 * x_TD)
    with recorder.during("backward"):
        y_TD.sum().backward()
    found = {}
    for direction in ("forward", "backward"):
        sent = numbers_of([s.record() for s in recorder.spans(first)], "ep_etp", "dispatch", direction)
        found[direction] = (max(r.begin_s for r in sent), seen[direction], min(r.wait_s or 0.0 for r in sent))
    return found


@pytest.mark.parametrize("compressed", [False, True])
def test_shared_experts_are_computed_while_rows_travel(compressed: bool) -> None:
    for pieces in (Pieces(), Pieces(1, 2)):
        for found in run_threads(shared_beside, 2, compressed, pieces):
            for sent_s, shared_s, wait_s in found.values():
                assert sent_s < shared_s < wait_s


def test_rows_of_another_number_of_units_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 1 units, but tokens are cut into 4"):
        transfers(Pieces(2, 4), [([0], [0])], None)  # type: ignore[arg-type]


def on_rank(rank: int, world: int, case: Any, degrees: dict[str, int]) -> RankTrace:
    return run_layout(case, degrees)


@pytest.mark.parametrize(
    ("layout", "variant", "pieces", "nodes"),
    [
        (Layout(4, ep=4), "hot-expert", Pieces(2, 4), None),
        (Layout(4, etp=2, ep=2), "recompute", Pieces(4, 2), None),
        (Layout(4, tp=2, ep=4), "capacity-position", Pieces(1, 3), 2),
        (Layout(4, hsdp=2, ep=2), "plain", Pieces(3, 1), 1),
    ],
    ids=str,
)
def test_layouts_give_the_numbers_of_one_process(layout: Layout, variant: str, pieces: Pieces, nodes: int | None) -> None:
    """The first rank's first micro-batch has no valid tokens."""
    assert layout in LAYOUTS
    case = next(v for v in VARIANTS if v.name == variant).build(layout, 2, steps=2)
    reference = run_reference(case, dp=layout.topology.dp)
    assert case.model.moe is not None
    if nodes is not None:
        case = replace(case, model=replace(case.model, moe=replace(case.model.moe, dispatcher="hierarchical")))
    sent: dict[str, Any] = {"pieces": pieces, "ranks_per_node": nodes}
    ranks = run_threads(on_rank, layout.world, replace(case, **sent), layout.degrees)
    assert [d for d in compare(reference, ranks) if not d.worst <= TOLERANCE] == []
