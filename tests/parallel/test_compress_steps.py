"""Training steps with compression: any way of sending gives the same numbers, and the trained scale is one on all ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from helpers import GlooPool, run_threads
from moefold.moe.config import BalanceConfig, CompressConfig
from moefold.moe.model import Model
from moefold.parallel.apply import moe_layers
from moefold.parallel.parity import (
    ParityCase,
    RankTrace,
    RecordingEngine,
    assemble,
    build_engine,
    make_batch,
    micro_rows,
    run_steps,
)
from moefold.parallel.parity_layouts import VARIANTS, Layout

PLAIN = next(v for v in VARIANTS if v.name == "plain")
SCALE = "layers.1.moe.codec.scale_D"
BOUNDED: dict[str, Any] = {"radius": 0.8, "gate_weighted": True}


def make_case(layout: Layout, moe: dict[str, Any] | None = None, **compress: Any) -> ParityCase:
    """Three steps of a small model in float64, with compression and one data rank's worth of padding."""
    case = PLAIN.build(layout, 1, steps=3)
    config = CompressConfig(**({"method": "lsh", "rate": 0.4, "compensation": "diagonal", "hash_width": 4} | compress))
    assert case.model.moe is not None
    return replace(case, model=replace(case.model, moe=replace(case.model.moe, compress=config, **(moe or {}))))


def build(case: ParityCase, layout: Layout, sampled: int = 0, rate: float = 0.4) -> tuple[RecordingEngine, list[int]]:
    """An engine, and the rows that it will send: grows by one number with each pass of a layer."""
    engine, rows = build_engine(case, layout.degrees), []  # type: ignore[var-annotated]
    engine.set_compression(rate, sampled)
    for layer in moe_layers(engine.model):
        assert layer.codec is not None
        layer.codec.register_forward_hook(lambda module, args, result: rows.append(int(result[1].rows)))
    return engine, rows


def steps(
    rank: int, world: int, case: ParityCase, layout: Layout, sampled: int = 0, rate: float = 0.4
) -> tuple[RankTrace, list[int]]:
    engine, rows = build(case, layout, sampled, rate)
    return run_steps(engine, case, range(case.steps)), rows


@pytest.mark.ranks
@pytest.mark.parametrize("compensation", ["scalar", "diagonal"])
def test_ranks_agree_on_loss_and_scale(compensation: str, gloo_pool: GlooPool) -> None:
    layout = Layout(2, ep=2)
    case = make_case(layout, compensation=compensation, radius=0.9, gate_weighted=True, exact_choices=1)
    (one, rows), (other, _) = gloo_pool.run(steps, 2, case, layout, 4)
    assert np.isfinite(one.figures.loss).all() and len(set(one.figures.loss)) == 3
    assert one.figures.loss == other.figures.loss and one.figures.grad_norm == other.figures.grad_norm
    scale = one.weights[SCALE].values
    assert scale.shape == ((1,) if compensation == "scalar" else (case.model.dim,))
    assert (scale != 0).all() and np.isfinite(scale).all()
    assert np.array_equal(scale, other.weights[SCALE].values)
    assert len(rows) == 3 and 0 < max(rows) < case.global_batch // 2 * case.seq_len * 2


def whole(traces: list[RankTrace]) -> dict[str, np.ndarray]:
    """Weights after the last step."""
    return {name: assemble([t.weights[name] for t in traces])[0] for name in traces[0].weights}


@pytest.fixture(scope="module")
def flat_run() -> list[tuple[RankTrace, list[int]]]:
    """All experts on each of four ranks."""
    layout = Layout(4)
    return run_threads(steps, 4, make_case(layout, **BOUNDED), layout)


@pytest.mark.parametrize(
    ("layout", "dispatcher", "how"),
    [
        (Layout(4, ep=2), "all_to_all", {}),
        (Layout(4, ep=2, etp=2), "all_to_all", {"pieces": 3}),
        (Layout(4, ep=4), "hierarchical", {"ranks_per_node": 2, "pieces": 2}),
        (Layout(4, ep=2, etp=2), "hierarchical", {"ranks_per_node": 2}),
    ],
    ids=lambda value: value.name if isinstance(value, Layout) else str(value),
)
def test_where_experts_live_changes_no_number(
    layout: Layout, dispatcher: str, how: dict[str, int], flat_run: list[tuple[RankTrace, list[int]]]
) -> None:
    # tokens are split alike, over data ranks: only the way to the experts differs
    case = replace(make_case(layout, {"dispatcher": dispatcher}, **BOUNDED), **how)  # type: ignore[arg-type]
    got = run_threads(steps, 4, case, layout)
    assert [rows for _, rows in got] == [rows for _, rows in flat_run]
    assert got[0][0].figures.loss == pytest.approx(flat_run[0][0].figures.loss, rel=1e-10)
    ours, theirs = (whole([trace for trace, _ in found]) for found in (got, flat_run))
    assert {n: np.abs(ours[n] - x).max() for n, x in theirs.items() if not np.allclose(ours[n], x, rtol=1e-8, atol=1e-9)} == {}


@pytest.mark.parametrize("how", [{"pieces": 2}, {"recompute": "selective"}], ids=str)
def test_measuring_the_error_changes_no_bit_of_training(how: dict[str, Any]) -> None:
    layout = Layout(2, ep=2)
    case = replace(make_case(layout), **how)
    with_it, without = (run_threads(steps, 2, case, layout, sampled) for sampled in (3, 0))
    for (mine, _), (other, _) in zip(with_it, without, strict=True):
        assert mine.figures.loss == other.figures.loss
        for name, piece in mine.weights.items():
            assert np.array_equal(piece.values, other.weights[name].values), name


def test_steps_in_which_every_row_travels_are_those_without_compression() -> None:
    layout = Layout(2, ep=2)
    case, plain = make_case(layout), make_case(layout, method="none")
    warm, exact = run_threads(steps, 2, case, layout, 0, 1.0), run_threads(run_plain, 2, plain, layout)
    for (trace, _), other in zip(warm, exact, strict=True):
        assert trace.figures.loss == other.figures.loss
        assert (trace.weights.pop(SCALE).values == 0).all(), "moved without a gradient"
        for name, piece in other.weights.items():
            assert np.array_equal(piece.values, trace.weights[name].values), name


def run_plain(rank: int, world: int, case: ParityCase, layout: Layout) -> RankTrace:
    return run_steps(build_engine(case, layout.degrees), case, range(case.steps))


def scale_gradient(rank: int, world: int, case: ParityCase, layout: Layout) -> tuple[list[float], list[float]]:
    """(by backward, by central differences) of the loss of a step with respect to some numbers of the scale."""
    engine, _ = build(case, layout)
    [scale_D] = [p.local for p in engine.parameters if p.placement.name == SCALE]
    start, end = micro_rows(case, engine.mesh.topology.dp, engine.mesh.coordinates.dp, 0)

    def loss() -> float:
        return engine.train_step([make_batch(case, 0).rows(start, end)], 0.0).loss

    places, eps, found = (0, 5, 15), 1e-4, []
    loss()
    by_backward = engine.recorded[0][SCALE].values[list(places)].tolist()
    for place in places:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                scale_D[place] += sign * eps
            values.append(loss())
            with torch.no_grad():
                scale_D[place] -= sign * eps
        found.append((values[0] - values[1]) / (2 * eps))
    return by_backward, found


@pytest.mark.parametrize("layout", [Layout(2, ep=2), Layout(2, tp=2), Layout(4, tp=2, ep=2)], ids=lambda layout: layout.name)
def test_the_gradient_of_the_scale_is_that_of_the_loss_of_all_ranks(layout: Layout) -> None:
    case = make_case(layout, {"balance": BalanceConfig(aux_loss_coeff=0.0)})
    case = replace(case, model=replace(case.model, init_std=0.3))
    for by_backward, by_differences in run_threads(scale_gradient, layout.world, case, layout):
        assert by_backward == pytest.approx(by_differences, rel=1e-5, abs=1e-10)
        assert all(abs(g) > 1e-6 for g in by_backward)


def test_the_scale_stays_whole_and_wide_in_bf16() -> None:
    layout = Layout(2, ep=2)
    case = replace(make_case(layout), precision="bf16")
    traces = [trace for trace, _ in run_threads(steps, 2, case, layout)]
    assert traces[0].figures.loss == traces[1].figures.loss and np.isfinite(traces[0].figures.loss).all()
    scale = traces[0].weights[SCALE].values
    assert scale.shape == (case.model.dim,) and (scale != 0).all()
    assert (scale != torch.from_numpy(scale).bfloat16().double().numpy()).any(), "rounded to bf16"
    assert np.array_equal(scale, traces[1].weights[SCALE].values)


def test_a_model_has_the_parameters_that_its_layout_trains() -> None:
    layout = Layout(2, ep=2)
    case = make_case(layout)
    [names, _] = run_threads(parameter_names, 2, case, layout)
    assert names == [name for name, _ in Model(case.model).named_parameters()]
    assert SCALE in names


def parameter_names(rank: int, world: int, case: ParityCase, layout: Layout) -> list[str]:
    return [p.placement.name for p in build_engine(case, layout.degrees).parameters]
