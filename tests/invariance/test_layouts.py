"""Any layout, same numbers: loss, gradients, norms, auxiliary terms, counts and updates equal one process to 1e-9, in float64.

The table of layouts and model variants is in `moefold.parallel.parity_layouts`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch.distributed.fsdp import FSDPModule

from helpers import GlooPool, run_threads
from moefold.parallel import gradients
from moefold.parallel.parity import ParityCase, RankTrace, RecordingEngine, Trace, make_batch, run_layout, run_reference
from moefold.parallel.parity_compare import Difference, compare
from moefold.parallel.parity_layouts import (
    ACCUMULATIONS,
    LAYOUTS,
    MODELS,
    SENDINGS,
    VARIANTS,
    Planned,
    Sending,
    model_cases,
    plan,
)
from moefold.parallel.sharding import Placement

TOLERANCE = 1e-9
PLAN = plan()


def on_rank(rank: int, world_size: int, case: ParityCase, degrees: dict[str, int]) -> RankTrace:
    return run_layout(case, degrees)


def run(planned: Planned, runner: Callable[..., list[Any]] = run_threads) -> tuple[Trace, list[RankTrace]]:
    case = planned.build()
    reference = run_reference(case, dp=planned.layout.topology.dp)
    return reference, runner(on_rank, planned.layout.world, case, planned.layout.degrees)


def too_far(differences: list[Difference]) -> dict[str, tuple[float, str]]:
    return {d.quantity: (d.worst, d.where) for d in differences if not d.worst <= TOLERANCE}


def named(name: str) -> Planned:
    """A combination of layout, accumulation and variant that the plan need not hold, by its test id: `4:tp2-ep2-x2-micro`."""
    layouts = {layout.name: layout for layout in LAYOUTS}
    variants = {variant.name: variant for variant in VARIANTS + MODELS}
    where, _, rest = name.partition("-x")
    num_micro, _, variant = rest.partition("-")
    return Planned(layouts[where], int(num_micro), variants[variant])


def show_that_it_happened(planned: Planned, reference: Trace) -> None:
    """A variant whose feature never acts would prove nothing."""
    name, case = planned.variant.name, planned.build()
    if name.startswith("capacity"):
        assert all(step.sum() > 0 for step in reference.dropped), "no choice was dropped"
    if name == "clipped":
        limit = case.optimizer.grad_clip
        assert limit is not None and min(reference.grad_norm) > limit, "no gradient was clipped"
    if name == "hot-expert":
        for step in reference.counts:
            assert (step[:, 0] == step.sum(1) / 2).all(), "not every token went to expert 0"
            assert not step[:, 4:].any(), "the last experts got rows"


@pytest.mark.parametrize("planned", PLAN + model_cases(), ids=lambda p: p.name)
def test_layout_gives_the_numbers_of_one_process(planned: Planned) -> None:
    reference, ranks = run(planned)
    assert too_far(compare(reference, ranks)) == {}
    show_that_it_happened(planned, reference)


SENT_OTHERWISE = tuple((planned, sending) for sending in SENDINGS for planned in PLAN if sending.fits(planned.layout))
"""Every sixth of these runs: all of them would say little more."""


@pytest.mark.parametrize(("planned", "sending"), SENT_OTHERWISE[::6], ids=lambda x: x.name)
def test_the_way_rows_travel_changes_no_number(planned: Planned, sending: Sending) -> None:
    case = replace(planned.build(), steps=2)
    reference = run_reference(case, dp=planned.layout.topology.dp)
    ranks = run_threads(on_rank, planned.layout.world, sending.over(case), planned.layout.degrees)
    assert too_far(compare(reference, ranks)) == {}


ON_PROCESSES = (
    "8:tp2-ep4-x1-late-softmax",
    "8:tp2-etp2-ep2-x2-sigmoid-groups",
    "8:hsdp2-tp2-ep2-x1-prior-carry-2",
    "8:ep2-x2-uneven-width",
    "4:etp2-ep2-x2-hot-expert",
    "4:tp2-ep2-x4-exact",
    "4:ep4-x1-hot-expert",
    "4:tp2-etp2-x1-plain",
    "4:tp2-x1-full-qk-norm",
    "4:hsdp2-ep2-x2-capacity-probability",
    "2:ep2-x4-recompute",
    "2:dp-x2-dense",
)


@pytest.mark.ranks
@pytest.mark.parametrize("name", ON_PROCESSES)
def test_layout_on_processes(name: str, gloo_pool: GlooPool) -> None:
    planned = named(name)
    reference, ranks = run(planned, gloo_pool.run)
    assert too_far(compare(reference, ranks)) == {}
    show_that_it_happened(planned, reference)


@pytest.mark.parametrize("name", ["2:dp-x2", "4:ep4-x1", "4:tp2-ep2-x2", "4:etp2-ep2-x1", "2:tp2-x2", "8:hsdp2-tp2-ep2-x1"])
def test_recompute_changes_no_bit(name: str) -> None:
    planned = named(f"{name}-recompute")
    case = replace(planned.build(), steps=2)
    with_it, without = (
        run_threads(on_rank, planned.layout.world, c, planned.layout.degrees) for c in (case, replace(case, recompute="none"))
    )
    for mine, other in zip(with_it, without, strict=True):
        assert mine.figures.loss == other.figures.loss
        for step, gradients_of_step in enumerate(mine.gradients):
            for name_of, piece in gradients_of_step.items():
                assert np.array_equal(piece.values, other.gradients[step][name_of].values), f"{name_of}, step {step}"


def test_a_rerun_changes_no_bit() -> None:
    planned = named("4:tp2-ep2-x2-plain")
    first, second = (run(planned)[1] for _ in range(2))
    for mine, other in zip(first, second, strict=True):
        assert mine.figures.grad_norm == other.figures.grad_norm
        assert all(np.array_equal(p.values, other.weights[name].values) for name, p in mine.weights.items())


class TestTheTable:
    def test_has_every_layout_with_every_accumulation(self) -> None:
        assert {(p.layout, p.num_micro) for p in PLAN} == {(layout, m) for layout in LAYOUTS for m in ACCUMULATIONS}

    def test_has_no_layout_twice(self) -> None:
        assert len({layout.topology for layout in LAYOUTS}) == len(LAYOUTS) >= 24

    @pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
    def test_gives_every_variant_six_layouts_one_of_eight_ranks(self, variant: Any) -> None:
        layouts = {p.layout for p in PLAN if p.variant.name == variant.name}
        assert len(layouts) >= 6
        assert max(layout.world for layout in layouts) == 8

    def test_has_batches_with_unequal_and_with_no_valid_tokens(self) -> None:
        planned = named("4:ep2-x1-plain")
        case = planned.build()
        valid = [make_batch(case, step).valid for step in range(case.steps)]
        per_rank = np.array([v.sum(1).tolist() for v in valid if v is not None])
        assert per_rank.shape == (5, 4)
        assert not per_rank[:, 0].any()
        assert all(len(set(step)) > 1 for step in per_rank.tolist())
        assert any(len(set(step)) == 4 for step in per_rank.tolist())


def doubled(self: RecordingEngine, *args: Any, original: Callable[..., None] = RecordingEngine._forward_backward) -> None:
    """Backward whose experts come out twice as large, as where a sum is taken for a mean."""
    original(self, *args)
    for p in self.parameters:
        if p.placement.kind == "expert" and p.local_grad is not None:
            p.local_grad.mul_(2)


def averaged(module: FSDPModule, factor: float) -> None:
    original_factor(module, 2.0)


original_factor = FSDPModule.set_gradient_divide_factor


class TestAPlantedMistakeIsFound:
    """The suite can fail, and says where."""

    def wrong(self, name: str) -> dict[str, str]:
        return {quantity: where for quantity, (_, where) in too_far(compare(*run(named(name)))).items()}

    def test_expert_gradients_doubled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(RecordingEngine, "_forward_backward", doubled)
        wrong = self.wrong("4:ep2-x1-plain")
        assert "moe.experts" in wrong["gradient"]
        assert "grad_norm" in wrong

    def test_router_gradient_not_summed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Placement, "sum_group", lambda p: "tp" if p.kind == "dense" and p.tp_dim is None else "none")
        wrong = self.wrong("4:tp2-ep2-x1-plain")
        assert "router.weight_ED" in wrong["gradient"]
        assert "router.weight_ED" in wrong["between_ranks"]

    def test_output_bias_on_one_rank_of_the_sequence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = Placement.sum_group
        monkeypatch.setattr(Placement, "sum_group", lambda p: "none" if p.name.endswith("bo_D") else original(p))
        assert "attention.bo_D" in self.wrong("2:tp2-x1-biased-post-norm")["gradient"]

    def test_norm_counts_replicas(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Placement, "replicas", lambda p, mesh: 1)
        wrong = self.wrong("4:hsdp2-ep2-x1-plain")
        assert "grad_norm" in wrong
        assert "gradient" not in wrong

    def test_norm_of_this_rank_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def local_norm(parameters: Any, mesh: Any, recorder: Any) -> Any:
            return gradients.gradient_norm(parameters[:-1], mesh)

        monkeypatch.setattr("moefold.parallel.engine.gradient_norm", local_norm)
        assert "grad_norm" in self.wrong("2:ep2-x1-clipped")

    def test_data_parallel_mean_instead_of_sum(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(FSDPModule, "set_gradient_divide_factor", averaged)
        assert "gradient" in self.wrong("2:dp-x1-plain")

    def test_balance_counts_of_one_rank(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("moefold.parallel.peers.MeshPeers.start_sum", lambda self, counts, scope: lambda: counts)
        wrong = self.wrong("4:ep4-x1-plain")
        assert "gradient" in wrong
        assert "loss" in wrong  # of later steps

    def test_expert_bias_from_one_rank(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def moved(bias_E: Any, counts_E: Any, rate: float) -> None:
            bias_E += rate

        monkeypatch.setattr("moefold.parallel.engine.update_expert_bias", moved)
        assert "router.expert_bias_E" in self.wrong("2:ep2-x1-expert-bias")["expert_bias"]
