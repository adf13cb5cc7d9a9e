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
from moefold.parallel.parity import ParityCase, RankTrace, RecordingEngine, Trace, run_layout, run_reference
from moefold.parallel.parity_compare import Difference, compare
from moefold.parallel.parity_layouts import ACCUMULATIONS, LAYOUTS, VARIANTS, Layout, Planned, plan
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
    variants = {variant.name: variant for variant in VARIANTS}
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
    if case.valid_share < 1:
        assert case.seq_len * case.global_batch > reference.counts[0][0].sum() / 2 if reference.counts else True


@pytest.mark.parametrize("planned", PLAN, ids=lambda p: p.name)
def test_layout_gives_the_numbers_of_one_process(planned: Planned) -> None:
    reference, ranks = run(planned)
    assert too_far(compare(reference, ranks)) == {}
    show_that_it_happened(planned, reference)
