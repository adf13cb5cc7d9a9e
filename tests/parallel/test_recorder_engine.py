"""A training step under the recorder: no collective is missed, no number changes."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers import run_threads
from moefold.parallel.comm_record import CommRecord
from moefold.parallel.mesh import build_mesh, find_nodes
from moefold.parallel.parity import RecordingEngine, run_steps
from moefold.parallel.parity_layouts import VARIANTS, Layout
from moefold.parallel.recorder import CommRecorder
from moefold.parallel.recorder_analysis import ALL_TO_ALL, collectives, expert_rows, summary, traffic_matrix

OPS = {
    "all_reduce": ("all_reduce",),
    "all_to_all": ("all_to_all_single",),
    "all_gather": ("all_gather_single", "all_gather_into_tensor"),
    "reduce_scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
}
CASES = (
    (Layout(2), "plain"),
    (Layout(4, tp=2, ep=2), "full-qk-norm"),
    (Layout(4, tp=2, ep=4), "capacity-position"),
    (Layout(4, hsdp=2, tp=2), "micro"),
    (Layout(4, hsdp=4, ep=2, etp=2), "recompute"),
    (Layout(4, hsdp=2, ep=2), "exact"),
)
BY_NAME = {v.name: v for v in VARIANTS}
STEPS = 2


def trained(rank: int, world: int, layout: Layout, variant: str, ranks_per_node: int = 0) -> tuple[Any, Any, list[CommRecord]]:
    """(figures without recorder, figures with it, its records). ranks_per_node: for a dispatcher in two levels; 0 = one."""
    case = BY_NAME[variant].build(layout, 2, steps=STEPS)
    nodes = None
    if ranks_per_node and case.model.moe is not None:
        moe = dataclasses.replace(case.model.moe, dispatcher="hierarchical")
        case = dataclasses.replace(case, model=dataclasses.replace(case.model, moe=moe))
        nodes = find_nodes(ranks_per_node)
    mesh = build_mesh(layout.topology, torch.device("cpu"), nodes=nodes)
    recorder = CommRecorder(rank, mesh.device)
    figures = []
    for given in (None, recorder):
        settings = {"seed": case.seed, "precision": case.precision, "recompute": case.recompute, "optimizer": case.optimizer}
        engine = RecordingEngine(case.model, mesh, **settings, recorder=given)
        CALLS.counting = given is not None
        ran = run_steps(engine, case, range(STEPS)).figures
        figures.append((ran.loss, ran.grad_norm))
        CALLS.counting = False
    return *figures, recorder.take()


class Calls(threading.local):
    """Counts the calls of this thread's rank that move data."""

    counting = False

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()


CALLS = Calls()


def counted(rank: int, world: int, *args: Any) -> tuple[Any, Any, list[CommRecord], Counter[str]]:
    return *trained(rank, world, *args), CALLS.counts


@pytest.mark.parametrize(("layout", "variant"), CASES, ids=lambda value: getattr(value, "name", value))
def test_every_collective_of_a_step_is_recorded(layout: Layout, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for op, names in OPS.items():
        for name in names:
            if hasattr(dist, name):
                monkeypatch.setattr(dist, name, counting(getattr(dist, name), op))
    results = run_threads(counted, layout.world, layout, variant)
    for plain, recorded, records, calls in results:
        assert recorded == plain, "the same numbers, to the last bit"
        assert Counter(r.op for r in records) == calls and calls
        assert {r.step for r in records} == set(range(STEPS))
    found = collectives([records for _, _, records, _ in results])
    assert sum(len(c.records) for c in found) == sum(len(records) for _, _, records, _ in results), "all find their partners"
    for c in found:
        assert len({(r.op, r.what, r.layer, r.direction, r.step) for r in c.records}) == 1, "partners did the same"


def counting(fn: Any, op: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        if CALLS.counting and dist.get_world_size(group) > 1:
            CALLS.counts[op] += 1
        return fn(*args, **kwargs)

    return call


def test_both_levels_of_a_dispatcher_are_recorded() -> None:
    results = run_threads(trained, 4, Layout(4, ep=4), "plain", 2)
    for plain, recorded, records in results:
        assert recorded == plain
        levels = {r.axis: {other.what for other in records if other.axis == r.axis} for r in records if r.what in ALL_TO_ALL}
        assert levels == {"across_nodes": set(ALL_TO_ALL), "inside_node": set(ALL_TO_ALL) - {"notes"}}
    one_level = [mine for *_, mine in run_threads(trained, 4, Layout(4, ep=4), "plain")]
    assert expert_rows([records for *_, records in results]) == expert_rows(one_level), "each choice is counted once"


def test_rows_and_bytes_of_the_all_to_all_agree() -> None:
    layout = Layout(4, hsdp=4, ep=4)
    records = [mine for _, _, mine in run_threads(trained, 4, layout, "plain")]
    rows = expert_rows(records)
    assert rows.keys() == {1}
    # forward and backward, each of dispatch and combine, float64 rows of width 16; each rank sends to itself too
    moved = sum(sum(line) for line in traffic_matrix(records, what=["dispatch", "combine"]))
    assert moved == 4 * sum(rows[1]) * 16 * 8
    there, back = (traffic_matrix(records, what=[what]) for what in ("dispatch", "combine"))
    assert sum(map(sum, there)) == sum(map(sum, back))
    data = summary(records)
    directions = {(row["what"], row["direction"]) for row in data["layers"] if row["what"] in ALL_TO_ALL}
    assert directions == {("counts", "forward")} | {
        (what, d) for what in ("dispatch", "combine") for d in ("forward", "backward")
    }
    assert {row["layer"] for row in data["layers"] if row["what"] in ALL_TO_ALL} == {1}
