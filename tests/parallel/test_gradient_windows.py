"""Sums of gradients in windows of backward: the same numbers, in the same order on every rank, and nothing left behind."""

from __future__ import annotations

import time
import weakref
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import GlooPool, run_threads
from moefold.parallel import gradient_windows
from moefold.parallel.comm_record import CommRecord
from moefold.parallel.gradient_placement import WindowBytes
from moefold.parallel.gradient_windows import Windows
from moefold.parallel.mesh import build_mesh, nodes_for
from moefold.parallel.parity import ParityCase, RecordingEngine, make_batch, micro_rows, run_steps
from moefold.parallel.parity_layouts import VARIANTS, Layout
from moefold.parallel.recorder import CommRecorder
from moefold.parallel.recorder_analysis import collectives
from moefold.parallel.recorder_stall import state_of

BY_NAME = {v.name: v for v in VARIANTS}
STEPS = 2
CPU = torch.device("cpu")
GIVEN: Windows = {3: WindowBytes(experts=1536, rest=4096), 1: WindowBytes(experts=0, rest=1 << 20)}
"""Less than there is, nothing, and more than there is."""


def case_of(
    layout: Layout, variant: str = "plain", num_micro: int = 1, ranks_per_node: int | None = None, **more: Any
) -> ParityCase:
    """MoE layers 1 and 3 of 5, so that there are windows of all kinds. The first rank's first micro-batch is empty."""
    case = BY_NAME[variant].build(layout, num_micro, steps=STEPS)
    model = replace(case.model, num_layers=5, moe_every=2)
    assert model.moe is not None
    if ranks_per_node is not None:
        model = replace(model, moe=replace(model.moe, dispatcher="hierarchical"))
    return replace(case, model=model, ranks_per_node=ranks_per_node, **more)


def engine_of(case: ParityCase, layout: Layout, windows: Windows, recorder: CommRecorder | None = None) -> RecordingEngine:
    mesh = build_mesh(layout.topology, CPU, nodes=nodes_for(case.model, case.ranks_per_node))
    how: dict[str, Any] = {"precision": case.precision, "recompute": case.recompute, "pieces": case.pieces}
    how |= {"seed": case.seed, "optimizer": case.optimizer, "recorder": recorder}
    return RecordingEngine(case.model, mesh, gradient_windows=windows, **how)


Outcome = tuple[float, list[CommRecord], list[CommRecord]]


def both(rank: int, world: int, case: ParityCase, layout: Layout, windows: Windows) -> Outcome:
    """The largest difference between FSDP's sums and those in windows, and the records of both."""
    recorders = [CommRecorder(rank, CPU) for _ in range(2)]
    with mock.patch.object(gradient_windows, "LEAST_BYTES", 64):
        engines = [engine_of(case, layout, w, r) for w, r in zip((False, windows), recorders, strict=True)]
        off, on = (run_steps(engine, case, range(STEPS)) for engine in engines)
    differences = [
        a - b for a, b in zip(off.figures.loss + off.figures.grad_norm, on.figures.loss + on.figures.grad_norm, strict=True)
    ]
    for a, b in zip((*off.gradients, off.weights), (*on.gradients, on.weights), strict=True):
        assert a.keys() == b.keys()
        differences += [float(np.abs(a[name].values - b[name].values).max(initial=0.0)) for name in a]
    return max(map(abs, differences)), recorders[0].take(), recorders[1].take()


def sums(records: list[CommRecord]) -> list[CommRecord]:
    """Those of FSDP's gradients."""
    axes = ("dp_shard", "dp_replicate", "edp_shard", "edp_replicate")
    return [r for r in records if r.what == "gradients" and r.axis in axes]


def check(found: list[Outcome], windows: Windows, tolerance: float = 0.0) -> None:
    assert all(worst <= tolerance for worst, _, _ in found)
    orders = [[(r.axis, r.op, r.what, r.layer, r.direction, r.step) for r in on] for _, _, on in found]
    assert all(order == orders[0] for order in orders)
    for c in collectives([on for _, _, on in found]):
        assert (
            len({(r.op, r.what, r.layer, r.direction, r.step, sum(r.sent) if r.op != "all_to_all" else 0) for r in c.records})
            == 1
        )
    for _, off, on in found:
        moved = [sum(sum(r.sent) for r in sums(records)) for records in (off, on)]
        # parts of a sum may each be rounded up
        assert moved[0] <= moved[1] <= moved[0] * (1.01 if windows is GIVEN else 1)
        rows = [
            r for r in on if r.what in ("dispatch", "combine", "notes") and r.direction == "backward" and r.axis != "inside_node"
        ]
        for s in sums(on):
            between = [r.what for r in rows if r.begin_s < s.begin_s < r.end_s]
            assert s.direction == "backward" and between == [], "the link is idle when a sum is started"


@pytest.mark.parametrize(
    ("layout", "case", "windows"),
    [
        (Layout(4), {}, GIVEN),
        (Layout(4, ep=4), {"variant": "hot-expert", "num_micro": 2}, True),
        (Layout(4, etp=2, ep=2), {"pieces": 2}, GIVEN),
        (Layout(4, ep=2), {"ranks_per_node": 1, "pieces": 2, "num_micro": 2}, True),
        (Layout(4, hsdp=4, ep=4), {"num_micro": 2}, True),
        (Layout(4, hsdp=2, tp=2), {}, GIVEN),
    ],
    ids=str,
)
def test_the_numbers_are_those_of_sums_at_once(layout: Layout, case: dict[str, Any], windows: Windows) -> None:
    check(run_threads(both, 4, case_of(layout, **case), layout, windows), windows)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("layout", "case", "windows"),
    [
        (Layout(4, ep=2), {}, GIVEN),
        (Layout(4, tp=2, ep=2), {"variant": "recompute", "num_micro": 2}, GIVEN),
        (Layout(4, hsdp=2, ep=2), {"num_micro": 3}, True),
    ],
    ids=str,
)
def test_so_they_are_between_processes(gloo_pool: GlooPool, layout: Layout, case: dict[str, Any], windows: Windows) -> None:
    """To the last bit: gloo adds up the parts of a scatter in the order in which it adds up the whole."""
    found = gloo_pool.run(both, 4, case_of(layout, **case), layout, windows)
    check(found, windows)

    def goes_on(s: CommRecord, records: list[CommRecord]) -> bool:
        """Whether something else begins while this sum is under way and nobody waits for it."""
        return s.wait_s is not None and any(s.begin_s < r.begin_s < s.wait_s for r in records)

    assert any(goes_on(s, on) for _, _, on in found for s in sums(on))
    assert not any(goes_on(s, off) for _, off, _ in found for s in sums(off))
    if layout.hsdp == 1 and "variant" not in case:
        for _, off, on in found:
            whole = sum(input_bytes(r) for r in sums(off) if r.step == 0 and r.layer == 4)
            given = bytes_by_window(on)
            assert given[3, "experts"] == min(1536, whole) == 1536
            assert 4096 - 8 * 4 < given[3, "rest"] <= 4096
            assert given[1, "experts"] == 0 and given[1, "rest"] > 4096
            assert {r.layer for r in sums(off) if r.step == 0} == {r.layer for r in sums(on) if r.step == 0}


def input_bytes(r: CommRecord) -> int:
    return max(r.sent) * len(r.members)


def bytes_by_window(records: list[CommRecord]) -> dict[tuple[int, str], int]:
    """Started in each window of the first step, by what had come before on the link of rows."""
    found: dict[tuple[int, str], int] = {(layer, window): 0 for layer in (1, 3) for window in ("experts", "rest", "none")}
    at = (1, "none")
    step = [r for r in records if r.step == 0 and r.direction == "backward"]
    left = {r.layer for r in sums(step)} - {r.layer for r in sums(step) if r.layer is not None}
    assert left == {None}, "embedding and head come last"
    last = min(r.seq for r in sums(step) if r.layer is None)
    for r in step:
        if r.what in ("combine", "dispatch") and r.layer is not None:
            at = (r.layer, "experts" if r.what == "combine" else "rest")
        elif r in sums(step) and r.seq < last and r.layer != 0:
            found[at] += input_bytes(r)
    return found


class Failed(RuntimeError):
    """What a test has a backward fail with."""


def fail_once(rank: int, world: int) -> tuple[list[Any], list[list[float]]]:
    """What is left after a backward that failed, and losses of the steps after it, in windows and without."""
    layout = Layout(2, ep=2)
    case = case_of(layout)
    batch = make_batch(case, 0).rows(*micro_rows(case, 2, rank, 0))

    def fail(module: torch.nn.Module, args: Any, out: Tensor) -> None:
        def raise_(grad: Tensor) -> None:
            raise Failed("in backward")

        out.register_hook(raise_)

    recorder, losses, left = CommRecorder(rank, CPU), [], []
    for windows in (True, False):
        engine = engine_of(case, layout, windows, recorder)
        handle = engine.model.blocks[0].attention.register_forward_hook(fail)
        with pytest.raises(Failed, match="in backward"):
            engine.train_step([batch], 0.1)
        handle.remove()
        if (w := engine.windows) is not None:
            left = [w._queue, w._under_way, w._outs, w._partial, [p for p in engine.parameters if p.local_grad is not None]]
            left = [*map(len, left), w.deferring, state_of(recorder, time.monotonic(), {}).open]
        for p in engine.parameters:
            p.parameter.grad = None
        losses.append([engine.train_step([batch], 0.1).loss for _ in range(3)])
    return left, losses


def test_nothing_is_left_of_a_backward_that_fails() -> None:
    for left, (on, off) in run_threads(fail_once, 2):
        assert left == [0, 0, 0, 0, 0, False, None]
        assert on == off and len(set(on)) == 3


def freed(rank: int, world: int) -> tuple[int, int, int]:
    """(gradients that were handed over, the most that were there at once, those still there after the step)."""
    layout = Layout(2, ep=2)
    case, seen, most = case_of(layout, num_micro=2), [], [0]
    engine = engine_of(case, layout, True)
    assert engine.windows is not None
    add = engine.windows.add

    def watched(by: Any, out: Tensor, source: Tensor | None) -> None:
        assert source is not None
        seen.append(weakref.ref(source))
        add(by, out, source)
        most.append(sum(ref() is not None for ref in seen))

    with mock.patch.object(engine.windows, "add", watched):
        batch = make_batch(case, 0)
        engine.train_step([batch.rows(*micro_rows(case, 2, rank, m)) for m in range(2)], 0.1)
    return len(seen), max(most), sum(ref() is not None for ref in seen)


def test_gradients_are_freed_as_they_are_summed() -> None:
    # 5 blocks and the rest of the model, twice; one rank has each expert. Sums of threads have ended when they have begun
    for handed, most, left in run_threads(freed, 2):
        assert (handed, left) == (12, 0) and most <= 4


def copied(rank: int, world: int) -> str:
    layout = Layout(2)
    case = case_of(layout)
    engine = engine_of(case, layout, True)
    parameter = engine.model.blocks[2].attention.wq_QD

    def copy(p: torch.nn.Parameter) -> None:
        assert p.grad is not None
        p.grad = p.grad.clone()

    others = [p for p in engine.model.blocks[2].parameters() if p is not parameter]
    for p in (parameter, *others):
        p.register_post_accumulate_grad_hook(copy)
    with pytest.raises(RuntimeError) as error:
        engine.train_step([make_batch(case, 0).rows(*micro_rows(case, 2, rank, 0))], 0.1)
    return str(error.value)


def test_gradients_that_lie_elsewhere_are_refused() -> None:
    for text in run_threads(copied, 2):
        assert "gradients of layer 2 (dp) are not where they are being summed" in text
        assert "parallel.gradient_windows = false" in text


def launched(rank: int, world: int) -> list[bool]:
    """Whether a rank counts as being in a collective: when it is started, when it is waited for, and when it has ended."""
    recorder = CommRecorder(rank, CPU)
    span = recorder.probe("world", torch.distributed.group.WORLD, "gradients").span("all_reduce", 8).launch()  # type: ignore[arg-type]
    found = [state_of(recorder, 1.0, {}).open is not None]
    span.waiting = recorder.clock.mark()
    found.append(state_of(recorder, 1.0, {}).open is not None)
    span.ended = recorder.clock.mark()
    return [*found, state_of(recorder, 1.0, {}).open is not None]


def test_a_rank_is_stuck_only_in_what_it_waits_for() -> None:
    assert run_threads(launched, 2) == [[False, True, False]] * 2
