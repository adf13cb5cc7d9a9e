"""The gradient norm counts each logical parameter once, is the same on every rank, and limits what clipping leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers import run_ranks, run_threads
from moefold.parallel.gradients import clip_gradients, complete_gradients, gradient_norm
from moefold.parallel.parity import RecordingEngine, build_engine, run_steps
from moefold.parallel.parity_layouts import VARIANTS, Layout

LAYOUTS = (
    Layout(1),
    Layout(4),
    Layout(4, tp=4),
    Layout(4, ep=4),
    Layout(4, hsdp=4),
    Layout(4, tp=2, etp=2, ep=2),
    Layout(4, hsdp=2, ep=2),
    Layout(8, hsdp=2, tp=2, ep=2),
)
PLAIN = next(v for v in VARIANTS if v.name == "plain")


def engine_with_gradients(layout: Layout, value: Callable[[RecordingEngine, int], float], only: str = "") -> RecordingEngine:
    """An engine where each element of parameter number i has gradient value(engine, i) here; 0 where the name lacks `only`."""
    engine = build_engine(PLAIN.build(layout, 1, steps=1), layout.degrees)
    for index, p in enumerate(engine.parameters):
        filled = value(engine, index) if only in p.placement.name else 0.0
        p.parameter.grad = torch.full_like(p.parameter, filled)
    return engine


def sizes(engine: RecordingEngine) -> list[int]:
    return [math.prod(p.placement.global_shape) for p in engine.parameters]


def norms(rank: int, world: int, layout: Layout) -> tuple[float, float]:
    """(norm, norm by counting the elements of all logical parameters) where parameter i has gradient i + 1 everywhere."""
    engine = engine_with_gradients(layout, lambda _, i: i + 1)
    expected = math.sqrt(sum(n * (i + 1) ** 2 for i, n in enumerate(sizes(engine))))
    return float(gradient_norm(engine.parameters, engine.mesh)), expected


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_norm_counts_each_logical_parameter_once(layout: Layout) -> None:
    results = run_threads(norms, layout.world, layout)
    assert len(set(results)) == 1, "ranks disagree"
    assert results[0][0] == pytest.approx(results[0][1], rel=1e-13)


def norm_of_one(rank: int, world: int, layout: Layout, name: str) -> tuple[float, float]:
    engine = engine_with_gradients(layout, lambda *_: 1.0, only=name)
    elements = sum(n for n, p in zip(sizes(engine), engine.parameters, strict=True) if name in p.placement.name)
    return float(gradient_norm(engine.parameters, engine.mesh)), math.sqrt(elements)


@pytest.mark.parametrize("name", ["router", "experts.w13", "shared_expert", "wo_DQ", "attention_norm", "embed"])
def test_norm_of_each_kind_of_parameter(name: str) -> None:
    layout = LAYOUTS[-1]
    for norm, expected in run_threads(norm_of_one, layout.world, layout, name):
        assert norm == pytest.approx(expected, rel=1e-13)


def missing_gradient(rank: int, world: int, layout: Layout) -> float:
    engine = engine_with_gradients(layout, lambda *_: 1.0, only="router")
    for p in engine.parameters:
        if rank and "router" in p.placement.name:
            p.parameter.grad = None
    complete_gradients(engine.parameters, engine.mesh)
    return float(gradient_norm(engine.parameters, engine.mesh))


def test_a_rank_without_gradient_counts_as_zero() -> None:
    layout = LAYOUTS[1]
    assert run_threads(missing_gradient, 4, layout) == [pytest.approx(math.sqrt(8 * 16))] * 4


def summed(rank: int, world: int, layout: Layout) -> dict[str, float]:
    """Value of each parameter's gradient after the sums, where every rank put in its number, 1 to world."""
    engine = engine_with_gradients(layout, lambda engine, _: engine.mesh.rank + 1.0)
    complete_gradients(engine.parameters, engine.mesh)
    values = {p.placement.name: p.local_grad for p in engine.parameters}
    return {name: float(grad.flatten()[0]) for name, grad in values.items() if grad is not None and grad.numel()}


def test_sums_go_over_the_ranks_that_hold_the_whole_weight() -> None:
    layout = Layout(4, tp=2, ep=2)
    for rank, got in enumerate(run_threads(summed, 4, layout)):
        neighbours = {0: 1 + 2, 1: 1 + 2, 2: 3 + 4, 3: 3 + 4}[rank]
        assert got["layers.1.moe.router.weight_ED"] == 1 + 2 + 3 + 4
        assert got["layers.0.attention_norm.weight_D"] == neighbours
        assert got["layers.1.moe.experts.w13_E2FD"] == got["layers.0.attention.wq_QD"] == rank + 1


def clipped(rank: int, world: int, layout: Layout, limit: float) -> tuple[float, float]:
    engine = engine_with_gradients(layout, lambda _, i: i + 1)
    before = gradient_norm(engine.parameters, engine.mesh)
    clip_gradients(engine.parameters, before, limit)
    return float(before), float(gradient_norm(engine.parameters, engine.mesh))


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[-1]], ids=lambda layout: layout.name)
def test_clipping_limits_the_norm_and_only_from_above(layout: Layout) -> None:
    for _, after in run_threads(clipped, layout.world, layout, 0.5):
        assert after == pytest.approx(0.5, rel=1e-6)
    for before, after in run_threads(clipped, layout.world, layout, 1e6):
        assert after == before


def replica_sums(rank: int, world: int, layout: Layout, num_micro: int) -> int:
    """All-reduces over the replicas of dense weights in one step."""
    engine = build_engine(PLAIN.build(layout, num_micro, steps=1), layout.degrees)
    replicas, calls, real = engine.mesh.dense.get_group("dp_replicate"), [], dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.get("group"))
        return real(*args, **kwargs)

    dist.all_reduce = counted
    run_steps(engine, PLAIN.build(layout, num_micro, steps=1), range(1))
    return sum(group is replicas for group in calls)


def test_gradients_are_added_over_replicas_once_per_step() -> None:
    # of 4 ranks, so that the replicas are not the group of all ranks, where counts are added too
    layout = Layout(4, hsdp=2)
    once, accumulated = (run_ranks(replica_sums, 4, layout, num_micro) for num_micro in (1, 2))
    assert once == accumulated
    assert min(once) > 0
