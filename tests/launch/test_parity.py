"""The verb `parity`: a layout passes, a wrong one fails with its tensor's name, and any configuration can be made small."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

import planted_ranks
from moefold.launch import parity as verb
from moefold.launch.local_ranks import run_local_ranks
from moefold.launch.parity import parity
from moefold.launch.parity_case import parity_case
from moefold.launch.settings import RunConfig
from moefold.moe.errors import CommError, ConfigError, TopologyError
from moefold.moe.presets import PRESETS
from moefold.parallel.topology import Topology, check_model

pytestmark = [pytest.mark.ranks, pytest.mark.alone]


def quickstart(**overrides: Any) -> RunConfig:
    """The shipped configuration without its own degrees of parallelism."""
    free: dict[str, Any] = {"parallel.dp": None, "parallel.hsdp": 1, "parallel.ep": 1}
    return RunConfig.load("quickstart", overrides=free | overrides)


def test_two_expert_parallel_ranks_pass() -> None:
    result = parity(quickstart(**{"parallel.ep": 2, "parallel.micro_batch": 8}), 2)
    assert result.passed and result.exit_code == 0, result.render()
    assert result.case.num_micro == 2
    quantities = [d.quantity for d in result.differences]
    assert {"loss", "gradient", "grad_norm", "balance", "update", "resumed", "loaded_alone"} <= set(quantities)
    assert set(quantities) == {name for name, _ in verb.MEANINGS}
    text = result.render()
    assert "PASSED" in text and "FAIL " not in text
    assert all(quantity in text for quantity in quantities)
    assert json.loads(json.dumps(result.to_dict()))["passed"] is True


def test_a_factor_of_two_fails_with_the_name_of_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "on_rank", planted_ranks.doubled_experts)
    result = parity(quickstart(**{"parallel.ep": 2}), 2)
    assert result.exit_code == 1 and not result.passed
    gradient = next(d for d in result.failures if d.quantity == "gradient")
    assert "moe.experts" in gradient.where and "step 0" in gradient.where
    assert gradient.worst == pytest.approx(1.0)
    text = result.render()
    assert text.splitlines()[-1].startswith("FAILED")
    assert gradient.where in text
    assert "gradient" in result.to_dict()["failures"]


def test_a_checkpoint_that_restores_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "on_rank", planted_ranks.stale_checkpoint)
    result = parity(quickstart(), 2)
    assert [d.quantity for d in result.failures] == ["resumed"]
    assert result.exit_code == 1


def test_more_than_sixteen_ranks_name_a_smaller_world() -> None:
    config = quickstart(**{"parallel.tp": 4, "parallel.ep": 8, "train.global_batch": 32})
    with pytest.raises(ConfigError, match="at most 16") as caught:
        parity(config, 32)
    assert "--world 4 --parallel.dp 2 --parallel.tp 2 --parallel.ep 2 --parallel.etp 1 --parallel.hsdp 1" in str(caught.value)


@pytest.mark.parametrize(
    ("world", "degrees"),
    [(32, {"ep": 32}), (64, {"tp": 4, "hsdp": 4, "ep": 8, "etp": 2}), (24, {"hsdp": 24}), (18, {"tp": 3, "ep": 6})],
    ids=str,
)
def test_the_smaller_world_is_legal_and_small(world: int, degrees: dict[str, int]) -> None:
    words = verb._too_large(Topology(world, **degrees)).split("--")[1:]
    named = {key.removeprefix("parallel."): int(value) for key, value in (word.split() for word in words)}
    smaller = Topology(**named)
    assert smaller.world <= 8
    assert {n for n in ("tp", "ep", "etp", "hsdp") if getattr(smaller, n) > 1} == set(degrees)


def test_two_nodes_and_pieces_pass() -> None:
    two_levels = {"model.moe.dispatcher": "hierarchical", "parallel.ranks_per_node": 1, "parallel.pieces": 2}
    two_levels["parallel.gradient_windows"] = True
    result = parity(quickstart(**{"parallel.ep": 2} | two_levels), 2)
    assert result.passed, result.render()
    assert (result.case.ranks_per_node, result.case.pieces, result.case.gradient_windows) == (1, 2, True)


def test_settings_that_depend_on_the_layout_on_purpose_are_refused_together() -> None:
    inexact = {"model.moe.compress.method": "lsh", "model.moe.compress.wire": "int8"}
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*compress\.wire: is 'int8'.*compress\.method: is 'lsh', which merges"):
        parity(quickstart(**{"parallel.ep": 2} | inexact), 2)


def test_a_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(TopologyError, match=r"parallel\.ep"):
        parity(quickstart(**{"parallel.ep": 3}), 2)


class TestSmallCase:
    FITTING = (
        (16, {"ep": 8}),
        (16, {"tp": 4, "ep": 16}),
        (8, {"tp": 2, "etp": 2, "ep": 4}),
        (4, {"hsdp": 2}),
        (12, {"ep": 4, "hsdp": 3}),
    )

    @pytest.mark.parametrize("preset", list(PRESETS))
    @pytest.mark.parametrize(("world", "degrees"), FITTING, ids=str)
    def test_a_preset_becomes_small_and_still_fits(self, preset: str, world: int, degrees: dict[str, int]) -> None:
        topology = Topology(world, **degrees)
        config = RunConfig.load(
            overrides={"model.preset": preset, "train.steps": 10, "train.global_batch": 4 * topology.dp, "data.seq_len": 128}
        )
        if check_model(topology, config.model):
            pytest.skip("the preset itself does not fit this topology")
        case = parity_case(config, topology)
        assert check_model(topology, case.model, global_batch=case.global_batch, seq_len=case.seq_len) == []
        assert case.model.num_params < 100_000
        same_kinds(config, case)

    def test_accumulation_and_optimizer_are_kept(self) -> None:
        config = quickstart(**{"parallel.micro_batch": 1, "train.grad_clip": 0.25, "train.optimizer.beta2": 0.9})
        case = parity_case(config, Topology(4))
        assert (case.num_micro, case.global_batch) == (4, 16)
        assert (case.optimizer.grad_clip, case.optimizer.betas) == (0.25, (0.9, 0.9))

    def test_experts_that_are_uneven_over_their_data_ranks_stay_uneven(self) -> None:
        topology = Topology(8, ep=2)
        case = parity_case(quickstart(**{"model.moe.num_experts": 12}), topology)
        assert case.model.moe is not None
        assert case.model.moe.num_experts // 2 % topology.edp_shard

    def test_kinds_of_models_keep_their_settings_in_small(self) -> None:
        kind = {"attention_bias": "all", "sliding_window": 64, "rope_fraction": 0.25, "norm_order": "post"}
        gated = {"moe.shared_dim": 500, "moe.shared_gate": True}
        case = parity_case(quickstart(**{f"model.{name}": value for name, value in (kind | gated).items()}), Topology(2, tp=2))
        model, moe = case.model, case.model.moe
        assert (model.attention_bias, model.norm_order, model.rope_fraction) == ("all", "post", 0.5)
        assert model.sliding_window is not None and model.sliding_window < case.seq_len
        assert moe is not None and moe.shared_gate and moe.shared_width == 12
        mixed = {"model.attention_experts": 8, "model.attention_expert_kv": "shared"}
        model = parity_case(quickstart(**mixed), Topology(2, tp=2)).model
        assert (model.attention_experts, model.attention_expert_kv) == (3, "shared")

    def test_a_model_that_is_dense_stays_dense(self) -> None:
        config = quickstart()
        dense = replace(config, model=replace(config.model, moe=None, dense_ffn_dim=64))
        prefix = replace(config, model=replace(config.model, dense_prefix_layers=2, dense_ffn_dim=64))
        for one in (dense, prefix):
            assert parity_case(one, Topology(2)).model.moe_layers == ()


def same_kinds(config: RunConfig, case: Any) -> None:
    """Whatever is not a size is as the user set it."""
    big, small = config.model, case.model
    for name in ("qk_norm", "tie_embeddings", "rope_theta", "norm_eps"):
        assert getattr(small, name) == getattr(big, name)
    assert bool(small.dense_prefix_layers) == bool(big.dense_prefix_layers)
    assert (small.resolved_kv_heads < small.num_heads) == (big.resolved_kv_heads < big.num_heads)
    assert (small.moe is None) == (big.moe is None)
    if small.moe is not None and big.moe is not None:
        assert small.moe.router == big.moe.router and small.moe.balance == big.moe.balance
        assert (small.moe.capacity_factor, small.moe.drop_policy) == (big.moe.capacity_factor, big.moe.drop_policy)
        assert bool(small.moe.num_shared_experts) == bool(big.moe.num_shared_experts)


class TestLocalRanks:
    def test_results_come_in_the_order_of_ranks(self) -> None:
        assert run_local_ranks(planted_ranks.sum_of_ranks, 3, 2) == [6, 6, 6]

    def test_a_failing_rank_is_named_with_its_traceback(self) -> None:
        with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed.*fails_on_one.*no such luck"):
            run_local_ranks(planted_ranks.fails_on_one, 2)

    def test_a_rank_that_dies_is_named(self) -> None:
        with pytest.raises(RuntimeError, match="rank 1 of 2 died"):
            run_local_ranks(planted_ranks.dies_on_one, 2)

    def test_a_rank_that_hangs_is_named(self) -> None:
        with pytest.raises(CommError, match=r"have not ended after 3 s"):
            run_local_ranks(planted_ranks.hangs_on_one, 2, timeout_s=3)
