"""What the recorder of a rank holds: exact bytes, when and for whom it waited, never more than its ring; and clocks apart."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from helpers import GlooPool, run_threads
from moefold.parallel import collectives
from moefold.parallel.comm_record import CommRecord
from moefold.parallel.mesh import build_mesh
from moefold.parallel.parity import RecordingEngine, build_engine, run_steps
from moefold.parallel.parity_layouts import VARIANTS, Layout
from moefold.parallel.peers import MeshPeers
from moefold.parallel.recorder import CommRecorder, launched, probe_for
from moefold.parallel.recorder_analysis import aligned, traffic_matrix
from moefold.parallel.recorder_analysis import collectives as joined
from moefold.parallel.recorder_clock import CudaClock, HostClock, clock_offsets
from moefold.parallel.recorder_fsdp import record_sharding
from moefold.parallel.recorder_verdict import verdicts
from moefold.parallel.topology import Topology
from moefold.parallel.transfer import Transfer, exchange_rows

CPU = torch.device("cpu")


def world_group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def one_of_each(rank: int, world: int) -> list[CommRecord]:
    """One collective of every kind and, for those with gradients, its backward."""
    recorder, group = CommRecorder(rank, CPU), world_group()
    probe = recorder.probe("tp", group, "test", layer=3)
    recorder.start_step(7)
    x = torch.ones(2, 3 * world, 5, dtype=torch.float64, requires_grad=True)
    collectives.GatherSequence.apply(x, group, probe).sum().backward()
    collectives.ScatterSequence.apply(x, group, probe).sum().backward()
    collectives.SumOverGroup.apply(x, group, probe).sum().backward()
    with recorder.during("update"):
        collectives.all_reduce(torch.ones(3, dtype=torch.int32), group, probe)
    MeshPeers(group, group, recorder, layer=3).gather_sequence(torch.ones(2, 5, dtype=torch.bool))
    return recorder.take()


@pytest.mark.parametrize("world", [2, 3])
def test_bytes_follow_from_the_shapes(world: int) -> None:
    n = 8 * 2 * 3 * world * 5
    parts = [
        # op, direction, bytes to each other rank
        ("all_gather", "forward", n),
        ("reduce_scatter", "backward", n),
        ("reduce_scatter", "forward", n // world),
        ("all_gather", "backward", n // world),
        ("all_reduce", "forward", 2 * n // world),
        ("all_reduce", "backward", 2 * n // world),
        ("all_reduce", "update", -(-2 * 12 // world)),
        ("all_gather", "forward", 8 * 2 * 5),
    ]
    for rank, records in enumerate(run_threads(one_of_each, world)):
        expected = [(op, d, tuple(0 if p == rank else each for p in range(world))) for op, d, each in parts]
        assert [(r.op, r.direction, r.sent) for r in records] == expected
        assert all(r.received == r.sent and r.members == tuple(range(world)) for r in records)
        assert [r.call for r in records] == [r.seq for r in records] == list(range(8))
        assert {(r.step, r.layer, r.axis) for r in records} == {(7, 3, "tp")}
        assert [r.what for r in records] == ["test"] * 7 + ["capacity"]


ROWS = ((2, 0, 3), (1, 1, 0), (4, 5, 6))
"""ROWS[source][target]"""


def exchanges(rank: int, world: int) -> tuple[list[CommRecord], list[CommRecord], Any]:
    """Records with a probe, and the same exchange without one."""
    recorder, group = CommRecorder(rank, CPU), world_group()
    probe = recorder.probe("ep_etp", group, "dispatch", layer=0)
    x_RD = torch.randn(sum(ROWS[rank]) + 1, 4, requires_grad=True)
    receive = [ROWS[source][rank] for source in range(world)]
    counts_E = torch.tensor([rank, 10])
    recorded = Transfer(ROWS[rank], receive, group, probe, counts_E)
    out_XD = recorded.finish(recorded.start(x_RD))
    out_XD.sum().backward()
    collectives.exchange_blocks(torch.zeros(world, 2, dtype=torch.int64), group, probe)
    without_XD = exchange_rows(x_RD.detach(), ROWS[rank], receive, group)
    return recorder.records(), recorder.take() + recorder.take(), torch.equal(out_XD, without_XD)


@pytest.mark.ranks
def test_rows_of_an_exchange_are_counted_for_each_peer(gloo_pool: GlooPool) -> None:
    results = gloo_pool.run(exchanges, 3)
    for rank, (records, taken, same) in enumerate(results):
        assert same and taken == records, "nothing is taken twice"
        there, back, blocks = records
        assert there.sent == tuple(16 * n for n in ROWS[rank]) == back.received
        assert there.received == tuple(16 * ROWS[source][rank] for source in range(3)) == back.sent
        assert (there.direction, back.direction) == ("forward", "backward")
        assert there.rows_E == (rank, 10) and back.rows_E is None
        assert blocks.sent == blocks.received == (16,) * 3
        heard = [t is not None for t in there.arrivals_s or ()]
        assert heard == [source != rank and ROWS[source][rank] > 0 for source in range(3)]
        assert all(there.begin_s <= t <= there.end_s for t in there.arrivals_s or () if t is not None)
    matrix = traffic_matrix([records[:1] for records, _, _ in results])
    assert matrix == [[16 * n for n in row] for row in ROWS]


def many(rank: int, world: int, count: int) -> tuple[list[int], list[int], int, int]:
    recorder = CommRecorder(rank, CPU, capacity=5)
    probe = recorder.probe("world", world_group(), "norm")
    taken = []
    for index in range(count):
        recorder.start_step(index)
        collectives.all_reduce(torch.ones(1), world_group(), probe)
        if index == 3:
            taken = [r.seq for r in recorder.take()]
    return taken, [r.step for r in recorder.records()], recorder.dropped, len([*recorder.records(step=count - 1)])


def test_the_ring_keeps_the_newest_and_counts_what_nobody_read() -> None:
    taken, kept, dropped, of_last_step = run_threads(many, 2, 12)[0]
    assert taken == [0, 1, 2, 3]
    assert kept == [7, 8, 9, 10, 11]
    assert dropped == 12 - 5 - len(taken)
    assert of_last_step == 1


def test_a_ring_has_room() -> None:
    with pytest.raises(ValueError, match="capacity = 0"):
        CommRecorder(0, CPU, capacity=0)


def test_without_a_recorder_there_is_no_probe() -> None:
    assert probe_for(None, "world", None, "norm") is None  # type: ignore[arg-type]


def meanwhile(rank: int, world: int, late_s: float, work_s: float) -> tuple[list[CommRecord], list[int]]:
    """Rank 1 comes late; rank 0 works while the sum is under way."""
    recorder = CommRecorder(rank, CPU)
    probe = recorder.probe("world", world_group(), "balance")
    dist.barrier()
    time.sleep(late_s * rank)
    x = torch.ones(4)
    wait = launched(lambda: dist.all_reduce(x, async_op=True), probe, "all_reduce", x)
    under_way = [len(recorder.records()), len(recorder.take())]
    time.sleep(work_s)
    wait()
    wait()
    return recorder.take(), [*under_way, int(x.sum())]


@pytest.mark.ranks
def test_asynchronous_work_is_hidden_until_it_is_waited_for(gloo_pool: GlooPool) -> None:
    results = gloo_pool.run(meanwhile, 2, 0.3, 0.1)
    assert [state for _, state in results] == [[0, 0, 8]] * 2, "under way it is no record; waiting twice changes nothing"
    (found,) = joined([records for records, _ in results])
    first, last = found.splits
    assert found.last_rank == 1
    assert first.hidden_s == pytest.approx(0.1, abs=0.05)
    assert first.skew_s == pytest.approx(0.2, abs=0.06)
    assert last.hidden_s == pytest.approx(0.1, abs=0.05)
    assert last.skew_s == 0 and last.transfer_s < 0.05 and not found.records[1].exact_end


def fails(rank: int, world: int) -> tuple[list[CommRecord], int]:
    recorder = CommRecorder(rank, CPU)
    probe = recorder.probe("world", world_group(), "norm")
    with pytest.raises(RuntimeError):
        collectives.all_reduce(torch.ones(2).to(torch.float8_e4m3fn), world_group(), probe)
    return recorder.records(), recorder.dropped


def test_a_collective_that_raises_is_marked(gloo_pool: GlooPool) -> None:
    (records, _), *_ = gloo_pool.run(fails, 1)
    assert [r.failed for r in records] == [True]


def clocks(rank: int, world: int, apart_s: float) -> tuple[Any, list[CommRecord]]:
    """Each rank's clock is `apart_s` before that of the one below; the last rank comes late."""

    def now() -> float:
        return time.perf_counter() + apart_s * rank

    offsets = clock_offsets(world_group(), now=now)
    recorder = CommRecorder(rank, CPU, clock=HostClock(now))
    probe = recorder.probe("world", world_group(), "norm")
    dist.barrier()
    time.sleep(0.2 * (rank == world - 1))
    collectives.all_reduce(torch.ones(1), world_group(), probe)
    return offsets, recorder.take()


@pytest.mark.ranks
def test_clocks_are_compared_over_the_wire(gloo_pool: GlooPool) -> None:
    results = gloo_pool.run(clocks, 3, 1000.0)
    offsets = results[0][0]
    assert all(o == offsets for o, _ in results), "every rank knows the same"
    for rank, offset in enumerate(offsets):
        assert abs(offset.offset_s + 1000 * rank) <= offset.error_s + 1e-9 < 0.05
    (found,) = joined(aligned([records for _, records in results], [o.offset_s for o in offsets]))
    assert found.last_rank == 2
    assert [s.skew_s for s in found.splits] == [pytest.approx(0.2, abs=0.08), pytest.approx(0.2, abs=0.08), 0]


def straggler(rank: int, world: int, slow: int) -> list[CommRecord]:
    recorder = CommRecorder(rank, CPU)
    probe = recorder.probe("world", world_group(), "norm")
    for _ in range(5):
        collectives.all_reduce(torch.ones(1), world_group(), probe)
        time.sleep(0.05 if rank == slow else 0.01)
    return recorder.take()


@pytest.mark.ranks
def test_a_slow_process_is_named(gloo_pool: GlooPool) -> None:
    worst = verdicts(gloo_pool.run(straggler, 4, 2))[0]
    assert (worst.kind, worst.rank) == ("slow_rank", 2)


PLAIN = next(v for v in VARIANTS if v.name == "plain")


def sharded(rank: int, world: int, layout: Layout, micros: int) -> tuple[bool, list[CommRecord], dict[str, int]]:
    """(same numbers as without recorder, records of one step, elements of this rank's share of the weights by where)."""
    case = PLAIN.build(layout, micros, steps=2)
    plain, engine = build_engine(case, layout.degrees), build_engine(case, layout.degrees)
    recorder = CommRecorder(rank, CPU)
    record_sharding(engine.model, engine.mesh, recorder)
    before = engine._sum_over_replicas

    def sum_over_replicas(now: bool) -> None:
        recorder.sums_over_replicas = now
        before(now)

    engine._sum_over_replicas = sum_over_replicas  # type: ignore[method-assign]
    with recorder.during("backward"):  # what no door says otherwise
        same = losses(plain, case) == losses(engine, case)
    local: dict[str, int] = {}
    for p in engine.parameters:
        if p.placement.kind != "whole":
            where = p.placement.name.split(".")[1] + p.placement.kind if "layers." in p.placement.name else "root"
            local[where] = local.get(where, 0) + p.local.numel()
    return same, recorder.take(), local


def losses(engine: RecordingEngine, case: Any) -> list[float]:
    figures = run_steps(engine, case, range(case.steps)).figures
    return [*figures.loss, *figures.grad_norm]


@pytest.mark.parametrize(
    "layout", [Layout(2), Layout(4, ep=2), Layout(4, hsdp=2), Layout(4, hsdp=4, ep=2)], ids=lambda layout: layout.name
)
def test_what_fsdp_sends_is_recorded_and_changes_nothing(layout: Layout) -> None:
    results = run_threads(sharded, layout.world, layout, 2)
    # FSDP pads what does not divide, so that every rank sends as much as the one with the largest share
    local = {where: max(other[where] for _, _, other in results) for where in results[0][2]}
    for same, records, _ in results:
        assert same
        topology = layout.topology
        for what, op in (("gather_weights", "all_gather"), ("gradients", "reduce_scatter")):
            dense = [r for r in records if r.what == what and r.op == op and r.axis == "dp_shard"]
            assert bool(dense) == (topology.dp_shard > 1)
            for r in dense:
                share = local["root" if r.layer is None else f"{r.layer}dense"]
                assert max(r.sent) == 8 * share, "float64 weights of this rank go to every other"
                assert sum(r.sent) == 8 * share * (topology.dp_shard - 1)
        sums = [r for r in records if r.axis == "dp_replicate"]
        # embedding and head, and two blocks, once in each of two steps, though there are two micro-batches
        assert len(sums) == (2 * 3 if topology.dp_replicate > 1 else 0)
        for r in sums:
            share = local["root" if r.layer is None else f"{r.layer}dense"]
            assert max(r.sent) == -(-2 * 8 * share // topology.dp_replicate)


def unfollowed(rank: int, world: int) -> None:
    engine = build_engine(PLAIN.build(Layout(2), 1, steps=1), {})
    record_sharding(engine.model, engine.mesh, CommRecorder(rank, CPU))
    assert isinstance(engine.model, FSDPModule)
    with pytest.raises(ValueError, match="unshard synchronously"):
        engine.model.unshard(async_op=True)


def test_what_cannot_be_followed_is_refused() -> None:
    run_threads(unfollowed, 2)


def unsharded(rank: int, world: int) -> None:
    from moefold.moe.model import Model

    mesh = build_mesh(Topology(world), CPU)
    with pytest.raises(AssertionError, match="record after `parallelize`"):
        record_sharding(Model(PLAIN.build(Layout(1), 1).model), mesh, CommRecorder(rank, CPU))


def test_a_model_is_sharded_first() -> None:
    run_threads(unsharded, 1)


@pytest.mark.gpu
def test_events_of_a_stream_become_times_of_the_host() -> None:
    clock = CudaClock()
    before_s = time.perf_counter()
    torch.cuda._sleep(200_000_000)
    mark = clock.mark()
    assert not clock.ready(mark), "asking does not wait"
    torch.cuda.synchronize()
    after_s = time.perf_counter()
    assert clock.ready(mark)
    assert before_s < clock.seconds(mark) <= after_s + 1e-3
    clock.anchor()
    assert clock.seconds(clock.mark() if torch.cuda.synchronize() is None else None) >= clock.seconds(mark)
