"""Collectives by size: right data, right formulas, the same on all ranks, in time, and the times that torch's profiler sees."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from helpers import GlooPool
from moefold.parallel import comm_ops
from moefold.parallel.comm_groups import layout_groups, make_seat, ping_pairs, world_groups
from moefold.parallel.comm_ops import OPERATIONS, Call, uneven_split
from moefold.parallel.comm_sweep import Curve, Stopwatch, SweepPlan, Swept, percentile, sweep
from moefold.parallel.nodes import NodeMap
from moefold.parallel.topology import Topology

CPU = torch.device("cpu")
QUICK = SweepPlan(sizes=(256, 1024, 4096), iters=3, warmup=1, budget_s=5.0)


def swept(rank: int, world: int, nodes: NodeMap, plan: SweepPlan, names: tuple[str, ...] = tuple(OPERATIONS)) -> Swept:
    seat, why = make_seat("world", [tuple(range(world))], nodes=nodes)
    assert (why == "") == (seat.levels is not None)
    return sweep([(seat, name) for name in names if seat.levels or name != "hierarchical"], plan, CPU)


def alike(results: list[Swept]) -> tuple[Curve, ...]:
    assert all(result.curves == results[0].curves for result in results), "agreed by all ranks"
    return results[0].curves


@pytest.mark.ranks
@pytest.mark.parametrize("nodes", [NodeMap((0, 0, 1, 1)), NodeMap((0, 1, 1, 0))], ids=["in order", "interleaved"])
def test_every_operation_moves_the_right_data_and_counts_it(gloo_pool: GlooPool, nodes: NodeMap) -> None:
    results = gloo_pool.run(swept, 4, nodes, QUICK)
    curves = {curve.operation: curve for curve in alike(results)}
    assert set(curves) == set(OPERATIONS)
    share = {"all_reduce": 1.5, "send_recv": 1.0}
    wire = {"all_reduce": 1.5, "send_recv": 1.0, "hierarchical": 1.0, "uneven": 1.5}
    for name, curve in curves.items():
        assert [row.size for row in curve.rows] == [256, 1024, 4096]
        assert curve.fit is not None and curve.fit.ranks == 4 and curve.first_call_s > 0 and curve.stopped is None
        for row in curve.rows:
            assert row.wrong == 0 and row.count * 4 == row.size and row.iters == 3 and row.dtype == "float32"
            assert 0 < row.time_s <= row.p95_s and row.fastest_rank_s <= row.slowest_rank_s
            assert row.algbw == row.size / row.time_s
            assert row.busbw == pytest.approx(row.algbw * share.get(name, 0.75))
            # what does not divide evenly goes to the hottest rank
            assert row.wire_max == pytest.approx(row.size * wire.get(name, 0.75), rel=0.1)
            assert row.wire_mean == pytest.approx(row.size * (0.75 if name == "uneven" else wire.get(name, 0.75)))
    assert all(result.clock_error_s is not None for result in results)


def test_the_hottest_rank_gets_its_multiple() -> None:
    assert uneven_split(400, 4, 2.0) == [202, 66, 66, 66]
    assert uneven_split(400, 4, 1.0) == [100, 100, 100, 100]
    assert uneven_split(400, 4, 9.0) == [400, 0, 0, 0]


def corrupted(rank: int, world: int) -> list[int]:
    real = comm_ops.exchange_rows

    def exchange_rows(*args: Any) -> torch.Tensor:
        out = real(*args)
        if rank == 1:
            out[5] += 1
        return out

    comm_ops.exchange_rows = exchange_rows
    try:
        curves = swept(rank, world, NodeMap((0, 0)), QUICK, ("all_to_all", "all_gather")).curves
    finally:
        comm_ops.exchange_rows = real
    return [row.wrong for curve in curves for row in curve.rows]


@pytest.mark.ranks
def test_wrong_data_is_counted_on_every_rank(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(corrupted, 2) == [[1, 1, 1, 0, 0, 0]] * 2


@pytest.mark.ranks
def test_a_sweep_without_time_stops_on_all_ranks_at_the_same_size(gloo_pool: GlooPool) -> None:
    sizes = tuple(256 * 2**i for i in range(12))
    results = gloo_pool.run(swept, 2, NodeMap((0, 0)), replace(QUICK, sizes=sizes, budget_s=1e-3), ("all_to_all", "all_reduce"))
    for curve in alike(results):
        assert [row.size for row in curve.rows] == list(sizes[:4]) and curve.stopped == sizes[4]
        assert {row.iters for row in curve.rows} == {3}


def late(rank: int, world: int, per_group: int) -> tuple[list[float], float]:
    seat, _ = make_seat("x", [tuple(range(i, i + per_group)) for i in range(0, world, per_group)], nodes=NodeMap((0,) * world))

    def ready() -> None:
        time.sleep(0.05 * rank)

    watch = Stopwatch(CPU)
    watch.synchronise()
    call = Call(4, 1, 4, 4, lambda: None, lambda: dist.all_reduce(torch.zeros(1), group=seat.group), lambda: 0, ready)
    runs = watch.runs(call, 5, seat.group)
    return runs.seconds, runs.skew_s


@pytest.mark.ranks
def test_waiting_for_a_rank_that_starts_late_is_skew_and_no_transfer(gloo_pool: GlooPool) -> None:
    for seconds, skew_s in gloo_pool.run(late, 2, 2):
        assert min(seconds) < 0.02
        assert skew_s == pytest.approx(0.05, abs=0.03)


def alone(rank: int, world: int) -> float:
    watch = Stopwatch(CPU)
    watch.synchronise()
    ready, work = (lambda: time.sleep(0.1 * rank)), (lambda: time.sleep(0.03))
    seat, _ = make_seat("x", [(0,), (1,)], nodes=NodeMap((0, 0)))
    return min(watch.runs(Call(4, 1, 4, 4, lambda: None, work, lambda: 0, ready), 3, seat.group).seconds)


@pytest.mark.ranks
def test_a_late_start_in_another_group_takes_no_time_off(gloo_pool: GlooPool) -> None:
    assert all(seconds >= 0.03 for seconds in gloo_pool.run(alone, 2))


def jumped(rank: int, world: int) -> list[float | None]:
    watch, seen = Stopwatch(CPU), []
    for _ in range(2):
        watch.synchronise()
        seen.append(watch.clock_error_s)
    watch.offsets = tuple(replace(offset, offset_s=offset.offset_s + index) for index, offset in enumerate(watch.offsets))
    watch.synchronise()
    return [*seen, watch.clock_error_s]


@pytest.mark.ranks
def test_a_clock_that_jumps_is_noticed(gloo_pool: GlooPool) -> None:
    for before, again, after in gloo_pool.run(jumped, 2):
        assert before is not None and again is not None and after is None


def profiled(rank: int, world: int) -> tuple[Swept, list[float]]:
    """A sweep of torch's own all-to-all, and how long the profiler saw its calls."""
    plan = SweepPlan(sizes=(2**22,), iters=9, warmup=1, budget_s=30.0)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        result = swept(rank, world, NodeMap((0, 0)), plan, ("torch",))
    seen = [event.time_range.elapsed_us() * 1e-6 for event in record.events() if event.name == "gloo:all_to_all"]
    return result, seen


@pytest.mark.ranks
@pytest.mark.alone
def test_times_are_those_that_torch_profiler_records(gloo_pool: GlooPool) -> None:
    results = gloo_pool.run(profiled, 2)
    [curve] = alike([result for result, _ in results])
    [row] = curve.rows
    # the last ones are the timed ones; the slower rank counts
    slowest = [max(pair) for pair in zip(*(seen[-row.iters :] for _, seen in results), strict=True)]
    assert len(slowest) == row.iters
    assert row.time_s == pytest.approx(statistics.median(slowest), rel=0.25, abs=5e-4)


def test_groups_of_a_layout_are_named_once() -> None:
    nodes = NodeMap.by_size(8, 4)
    groups = layout_groups(Topology(8, ep=4, tp=2), nodes)
    assert groups["tp"] == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert groups["ep_etp=inside"] == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert set(groups) == {"tp", "dp_shard", "edp_shard", "ep_etp=inside"}
    assert layout_groups(Topology(8, ep=8, tp=8), nodes)["ep_etp=tp"] == (tuple(range(8)),)
    assert layout_groups(Topology(1), NodeMap((0,))) == {}


def test_groups_of_all_ranks_by_host() -> None:
    assert world_groups(NodeMap((0, 1, 1, 0))) == {
        "world": ((0, 1, 2, 3),),
        "inside": ((0, 3), (1, 2)),
        "across": ((0, 1), (2, 3)),
    }
    assert list(world_groups(NodeMap((0, 0, 0)))) == ["world=inside"]
    assert list(world_groups(NodeMap((0, 1, 2)))) == ["world=across"]
    assert list(world_groups(NodeMap((0, 0, 1)))) == ["world"], "hosts do not hold equal parts"


def test_ping_pong_is_played_between_hosts_where_there_are_several() -> None:
    assert ping_pairs(range(8), NodeMap.by_size(8, 2)) == ((0, 2), (4, 6))
    assert ping_pairs(range(3), NodeMap((0, 0, 0))) == ((0, 1),)
    assert ping_pairs((4,), NodeMap((0,) * 5)) == ()


def test_percentile_is_a_value_that_was_measured() -> None:
    assert [percentile([3.0, 1.0, 2.0], share) for share in (0.3, 0.5, 0.95)] == [1.0, 2.0, 3.0]
    assert percentile([1.0], 0.95) == 1.0 and not math.isnan(percentile(list(map(float, range(20))), 0.95))
