"""Stages of a step: how moments are dealt out, and what hooks see of a real step without changing it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import GlooPool
from moefold.moe.config import CompressConfig, ModelConfig, MoEConfig
from moefold.parallel.comm_record import CommRecord
from moefold.parallel.engine import Engine, MicroBatch
from moefold.parallel.mesh import build_mesh, find_nodes
from moefold.parallel.recorder import CommRecorder
from moefold.parallel.stage_clock import STAGES, StageSpan, split_by_stage
from moefold.parallel.step_profile import StepProfile, profile_steps, time_steps
from moefold.parallel.topology import Topology


def record(what: str, begin_s: float, wait_s: float | None, end_s: float) -> CommRecord:
    fixed: dict[str, Any] = {"step": 0, "seq": 0, "axis": "ep_etp", "members": (0, 1), "call": 0, "op": "all_to_all", "layer": 0}
    return CommRecord(
        **fixed, what=what, direction="forward", sent=(0, 8), received=(0, 8), begin_s=begin_s, wait_s=wait_s, end_s=end_s
    )


def test_moments_belong_to_the_innermost_stage_and_waiting_goes_before_all() -> None:
    spans = [
        StageSpan("other", 0, "forward", 1.0, 9.0),
        StageSpan("experts", 0, "forward", 2.0, 5.0),
        StageSpan("permute", 0, "forward", 2.0, 8.0),
        StageSpan("head", None, "backward", 11.0, 14.0),
    ]
    waits = [record("combine", 3.0, 4.5, 6.0), record("gather_weights", 6.0, None, 7.0)]
    times = split_by_stage(spans, waits, 0.0, 12.0)
    assert times == {
        ("other", None, "update"): pytest.approx(1.0 + 2.0),  # before the first stage, and between 9 and 11
        ("other", 0, "forward"): pytest.approx(1.0 + 1.0),
        ("experts", 0, "forward"): pytest.approx(2.5),  # inside of permute, though both begin at once
        ("combine", 0, "forward"): pytest.approx(1.5),  # the time that it was waited for, not that it was under way
        ("permute", 0, "forward"): pytest.approx(2.0),
        ("head", None, "backward"): pytest.approx(1.0),  # cut at the end of the step
    }
    assert sum(times.values()) == pytest.approx(12.0)


def test_spread_is_that_of_the_median() -> None:
    steady = StepProfile((1.0,) * 4, (), {}, {}, 0.0)
    assert steady.spread == 0
    shaky, once = (StepProfile(s, (), {}, {}, 0.0) for s in ((0.9, 1.0, 1.1, 1.0), (1.0, 1.0, 1.0, 9.0)))
    assert shaky.median_s == 1.0 and 0.03 < shaky.spread < 0.06
    assert once.spread == 0, "one disturbed step of four says nothing of the others"


def tiny(**moe: Any) -> ModelConfig:
    experts = MoEConfig(num_experts=8, top_k=2, expert_dim=32, num_shared_experts=1, **moe)
    return ModelConfig(dim=32, num_layers=2, num_heads=2, vocab_size=64, max_seq_len=32, moe=experts)


def profiled(rank: int, world: int) -> list[tuple[StepProfile, list[float], list[str]]]:
    device, found = torch.device("cpu"), []
    mesh = build_mesh(Topology(world, ep=world), device, nodes=find_nodes(1))
    tokens = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(rank))
    batch = [MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]
    lsh = CompressConfig(method="lsh", rate=0.5, hashes=4, wire="int8")
    for model, options in (
        (tiny(), {}),
        (tiny(dispatcher="hierarchical"), {"pieces": 2, "recompute": "selective"}),
        (tiny(compress=lsh), {}),
    ):
        engine = Engine(model, mesh, recorder=CommRecorder(rank, device), **options)
        before = engine.train_step(batch, 0.0).loss
        profile = profile_steps(engine, batch, 2)
        time_steps(engine, batch, 1)
        after = engine.train_step(batch, 0.0).loss
        left = [name for name in ("compute", "late", "start", "step") for owner in _owners(engine) if _patched(owner, name)]
        found.append((profile, [before, profile.loss, after], left))
    return found


def _owners(engine: Engine) -> list[Any]:
    return [engine.optimizer, *(part for layer in engine.layers for part in (layer.experts, layer.dispatcher))]


def _patched(owner: Any, name: str) -> bool:
    return "timed" in repr(vars(owner).get(name))


@pytest.mark.ranks
@pytest.mark.alone
def test_a_step_is_told_apart_on_two_ranks_and_left_as_it_was(gloo_pool: GlooPool) -> None:
    ranks = gloo_pool.run(profiled, 2)
    for (profile, losses, left), (other, *_) in zip(*ranks, strict=True):
        assert left == [], "nothing stays attached"
        assert losses[0] == losses[1] == losses[2], "hooks and timed steps change no number"
        assert profile.stages == other.stages and profile.seconds == other.seconds
        assert set(s.stage for s in profile.stages) <= set(STAGES)
        seen = {(s.stage, s.direction) for s in profile.stages if s.mean_s > 0}
        both = ("attention", "route", "permute", "dispatch", "experts", "combine", "restore", "shared", "head", "gather weights")
        assert {(stage, way) for stage in both for way in ("forward", "backward")} <= seen
        assert {("sort", "forward"), ("optimizer", "update"), ("gradients", "backward"), ("embed", "backward")} <= seen
        # two of the three slices of work in experts come in backward; time alone says no more on a busy machine
        assert profile.total("experts", direction="backward") > 0.5 * profile.total("experts", direction="forward")
        assert profile.total("other") < 0.5 * sum(s.mean_s for s in profile.stages)
        for stage in profile.stages:
            assert stage.mean_s <= stage.most_s * (1 + 1e-9)
        exposed = {("dispatch", "forward"), ("combine", "backward")}
        for s in profile.by_stage():
            if (s.stage, s.direction) in exposed:
                assert s.skew_s + s.transfer_s == pytest.approx(s.mean_s, rel=0.05, abs=1e-4)
    plain, two_levels, compressed = (profile for profile, *_ in ranks[0])
    assert not any(s.stage == "compress" for s in plain.stages)
    assert compressed.total("compress", direction="forward") > 0 and compressed.total("compress", direction="backward") > 0
    # 2 ranks x 64 tokens x 2 choices, forward; with compression at most half of them, rounded up
    assert [sum(rows) for rows in plain.rows_LE.values()] == [256, 256]
    assert all(64 < sum(rows) <= 128 for rows in compressed.rows_LE.values())
    assert set(two_levels.sent_bytes) == {"across_nodes"} and set(plain.sent_bytes) == {"ep_etp"}
    assert compressed.sent_bytes["ep_etp"] < 0.3 * plain.sent_bytes["ep_etp"]
