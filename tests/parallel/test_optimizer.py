"""Learning rates at the edges of their schedules, who decays, and AdamW on shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import run_threads
from moefold.parallel.optimizer import decays, learning_rate
from moefold.parallel.parity import build_engine
from moefold.parallel.parity_layouts import VARIANTS, Layout

COSINE: dict[str, Any] = {"peak": 2.0, "total_steps": 11, "schedule": "cosine", "min_ratio": 0.1}
WSD: dict[str, Any] = {"peak": 2.0, "total_steps": 20, "schedule": "wsd", "min_ratio": 0.1}


def rates(**settings: Any) -> list[float]:
    return [learning_rate(step, **settings) for step in range(settings["total_steps"])]


class TestSchedules:
    @pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
    def test_warmup_climbs_evenly_to_the_peak(self, schedule: str) -> None:
        first = rates(**(WSD | {"schedule": schedule, "warmup_steps": 4}))[:5]
        assert first == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])

    def test_cosine_has_peak_middle_and_end(self) -> None:
        got = rates(**COSINE)
        assert (got[0], got[5], got[10]) == pytest.approx((2.0, 1.1, 0.2))
        assert got == sorted(got, reverse=True)

    def test_cosine_starts_at_the_end_of_the_warmup(self) -> None:
        got = rates(**COSINE, warmup_steps=3)
        assert got[2:4] == pytest.approx([2.0, 2.0])
        assert got[-1] == pytest.approx(0.2)

    def test_wsd_decays_over_the_last_fifth(self) -> None:
        got = rates(**WSD)
        assert got[:16] == [2.0] * 16
        assert got[15:] == pytest.approx([2.0, 1.55, 1.1, 0.65, 0.2])

    def test_wsd_decay_length_can_be_set(self) -> None:
        got = rates(**WSD, decay_steps=10)
        assert got[9] == 2.0 > got[10]
        assert got[-1] == pytest.approx(0.2)

    def test_constant_stays_at_the_peak(self) -> None:
        assert set(rates(**(WSD | {"schedule": "constant"}))) == {2.0}

    @pytest.mark.parametrize("schedule", ["cosine", "wsd"])
    @pytest.mark.parametrize("total_steps", [1, 2])
    def test_very_short_runs_stay_within_the_range(self, schedule: str, total_steps: int) -> None:
        got = rates(**(WSD | {"schedule": schedule, "total_steps": total_steps}))
        assert all(0.2 - 1e-12 <= rate <= 2.0 for rate in got)

    @pytest.mark.parametrize("settings", [COSINE, WSD], ids=["cosine", "wsd"])
    def test_after_the_end_it_stays_at_the_end(self, settings: dict[str, Any]) -> None:
        assert learning_rate(1000, **settings) == pytest.approx(0.2)


LAYOUT = Layout(4, tp=2, ep=2)


def plain_case() -> Any:
    return VARIANTS[0].build(LAYOUT, 1, steps=1)


def weight_decays(rank: int, world: int) -> dict[str, tuple[bool, float]]:
    """Parameter -> (what `decays` says, the weight decay of its group in the optimizer)."""
    engine = build_engine(plain_case(), LAYOUT.degrees)
    optimizer = engine.optimizer
    decay_of = {id(x): group["weight_decay"] for group in optimizer.adamw.param_groups for x in group["params"]}
    pairs = zip(optimizer.parameters, optimizer.locals, strict=True)
    return {p.placement.name: (decays(p), decay_of[id(x)]) for p, x in pairs}


def test_matrices_decay_but_not_norms_and_routers() -> None:
    for seen in run_threads(weight_decays, LAYOUT.world):
        for name, (decayed, value) in seen.items():
            assert decayed == (value > 0), name
            assert decayed == ("norm" not in name and "router" not in name), name
        assert {"layers.1.moe.router.weight_ED", "layers.1.moe.experts.w13_E2FD", "head.norm.weight_D"} <= set(seen)


def one_decaying_step(rank: int, world: int) -> dict[str, float]:
    """Largest |weight after / weight before - (1 - lr * decay)| after a step without any gradient."""
    engine = build_engine(plain_case(), LAYOUT.degrees)
    before = {p.placement.name: p.local.clone() for p in engine.parameters}
    for p in engine.parameters:
        p.parameter.grad = torch.zeros_like(p.parameter)
    engine.optimizer.step(lr=0.1)
    assert all(p.parameter.grad is None for p in engine.parameters)
    kept = {True: 1 - 0.1 * engine.settings.weight_decay, False: 1.0}
    gaps = {p.placement.name: (p.local - before[p.placement.name] * kept[decays(p)]).abs() for p in engine.parameters}
    return {name: float(gap.max()) for name, gap in gaps.items() if gap.numel()}


def test_a_step_without_gradients_only_decays() -> None:
    for gaps in run_threads(one_decaying_step, LAYOUT.world):
        assert max(gaps.values()) < 1e-15


def moments_after_steps(rank: int, world: int) -> tuple[set[str], bool, set[float]]:
    """(keys of the moments, whether all have the shape of their shard, step counts) after the step was set to 7."""
    optimizer = build_engine(plain_case(), LAYOUT.degrees).optimizer
    optimizer.set_step(7)
    moments = optimizer.moments()
    fitting = all(moment.shape == p.local.shape for p, _, moment in moments)
    return {key for _, key, _ in moments}, fitting, {float(optimizer.adamw.state[x]["step"]) for x in optimizer.locals}


def test_moments_are_shaped_like_the_shards_and_the_step_is_set_for_all() -> None:
    assert run_threads(moments_after_steps, LAYOUT.world) == [({"exp_avg", "exp_avg_sq"}, True, {7.0})] * LAYOUT.world
