"""The numbers of one process on torch, from a few layouts on the Triton kernels: part of the invariance table."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import pytest

from helpers import GlooPool
from moefold.kernels import topk_gate
from moefold.kernels.moe_mlp import MoeMlpLoop
from moefold.kernels.permute.torch_impl import Permute, Unpermute
from moefold.parallel.parity import ParityCase, RankTrace, run_layout, run_reference
from moefold.parallel.parity_compare import compare
from moefold.parallel.parity_layouts import LAYOUTS, VARIANTS

CASES = (
    ("1:single", "plain"),
    ("1:single", "capacity-probability"),
    ("2:dp", "late-softmax"),
    ("2:ep2", "hot-expert"),
    ("2:tp2-ep2", "sigmoid-groups"),
    ("2:etp2", "recompute"),
)


def on_rank(rank: int, world_size: int, case: ParityCase, degrees: dict[str, int]) -> RankTrace:
    with ExitStack() as without_torch:
        for owner, name in (
            (MoeMlpLoop, "forward"),
            (Permute, "forward"),
            (Unpermute, "forward"),
            (topk_gate.reference, "topk_gate"),
        ):
            without_torch.enter_context(mock.patch.object(owner, name, side_effect=AssertionError("ran on torch")))
        return run_layout(case, degrees)


@pytest.mark.parametrize(("layout_name", "variant_name"), CASES, ids=["-".join(case) for case in CASES])
def test_triton_gives_the_numbers_of_torch(gloo_pool: GlooPool, layout_name: str, variant_name: str) -> None:
    layout = next(x for x in LAYOUTS if x.name == layout_name)
    case = next(x for x in VARIANTS if x.name == variant_name).build(layout, 1, steps=2)
    assert case.model.moe is not None
    reference = run_reference(case, dp=layout.topology.dp)
    on_triton = replace(case, model=replace(case.model, moe=replace(case.model.moe, kernels="triton")))
    ranks = gloo_pool.run(on_rank, layout.world, on_triton, layout.degrees, timeout_s=120)
    assert {d.quantity: (d.worst, d.where) for d in compare(reference, ranks) if not d.worst <= 1e-9} == {}
