"""Models and batches that do not fit a topology."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moefold.moe.config import ModelConfig, MoEConfig, RouterConfig
from moefold.moe.errors import Problem, TopologyError
from moefold.parallel.topology import Topology, check_model, require_model
from topologies import suggested, topologies

TOP_1 = RouterConfig(renormalize=False)
"""The only kind of router that may choose one expert; it lets num_experts be 1."""


def model(**changes: object) -> ModelConfig:
    moe = MoEConfig(num_experts=16, top_k=2, expert_dim=96)
    base = ModelConfig(dim=64, num_layers=4, num_heads=8, num_kv_heads=4, vocab_size=512, max_seq_len=128, moe=moe)
    return replace(base, **changes)  # type: ignore[arg-type]


def found(problems: list[Problem]) -> list[tuple[str, str]]:
    return [(p.where, p.what) for p in problems]


def test_a_model_that_fits_has_no_problems() -> None:
    topo = Topology(32, pp=4, tp=4, ep=8)
    assert check_model(topo, model(), global_batch=8, micro_batch=2, seq_len=128) == []
    require_model(topo, model(), global_batch=8, micro_batch=2, seq_len=128)


@pytest.mark.parametrize(
    ("topo", "changes", "where", "what"),
    [
        (Topology(32, ep=32), {}, "parallel.ep", "is 32, but must divide model.moe.num_experts = 16; nearest legal values: 16"),
        # 6 divides 96 as well, but not the 8 ranks.
        (
            Topology(64, etp=64),
            {},
            "parallel.etp",
            "is 64, but must divide model.moe.expert_dim = 96; nearest legal values: 32",
        ),
        (
            Topology(8, tp=8),
            {"num_heads": 12, "num_kv_heads": 12, "head_dim": 8, "vocab_size": 528},
            "parallel.tp",
            "is 8, but must divide model.num_heads = 12; nearest legal values: 4",
        ),
        (Topology(8, tp=8), {}, "parallel.tp", "is 8, but must divide model.num_kv_heads = 4; nearest legal values: 4"),
        (
            Topology(4, tp=4),
            {"vocab_size": 258},
            "parallel.tp",
            "is 4, but must divide model.vocab_size = 258; nearest legal values: 2; or pad model.vocab_size to 260",
        ),
        (
            Topology(4, tp=4),
            {"dense_prefix_layers": 1, "dense_ffn_dim": 130},
            "parallel.tp",
            "is 4, but must divide model.dense_ffn_dim = 130; nearest legal values: 2",
        ),
        (
            Topology(8, pp=8),
            {},
            "parallel.pp",
            "is 8, but num_layers = 4 leaves stages empty; nearest legal values: 4",
        ),
        (
            Topology(4, ep=4),
            {"moe": None, "dense_ffn_dim": 128},
            "parallel.ep",
            "is 4, but the model has no MoE layers; set it to 1",
        ),
        (
            Topology(4, etp=2),
            {"dense_prefix_layers": 4, "dense_ffn_dim": 128},
            "parallel.etp",
            "is 2, but the model has no MoE layers; set it to 1",
        ),
    ],
    ids=["ep", "etp", "heads", "kv-heads", "vocab", "dense-ffn", "pp", "ep-without-moe", "etp-with-dense-layers-only"],
)
def test_what_does_not_fit_the_model(topo: Topology, changes: dict[str, object], where: str, what: str) -> None:
    problems = found(check_model(topo, model(**changes)))
    assert (where, what) in problems
    assert {w for w, _ in problems} == {where}


def test_a_dense_ffn_width_that_no_layer_uses_is_not_judged() -> None:
    assert check_model(Topology(4, tp=4), model(dense_ffn_dim=130)) == []


@pytest.mark.parametrize(
    ("topo", "batch", "expected"),
    [
        (
            Topology(8, cp=2, tp=4),
            {"seq_len": 100},
            ("data.seq_len", "is 100, but tp * cp = 8 ranks share a sequence evenly; nearest legal values: 96, 104"),
        ),
        (
            Topology(8, tp=2),
            {"global_batch": 10},
            ("train.global_batch", "is 10, but must be a multiple of dp * micro_batch = 4 * 1 = 4; nearest legal values: 8, 12"),
        ),
        (
            Topology(8, tp=2),
            {"global_batch": 3, "micro_batch": 2},
            ("train.global_batch", "is 3, but must be a multiple of dp * micro_batch = 4 * 2 = 8; nearest legal values: 8"),
        ),
        (
            Topology(8, tp=2),
            {"global_batch": 24, "micro_batch": 4},
            ("parallel.micro_batch", "is 4, but must divide global_batch / dp = 6; nearest legal values: 3, 6"),
        ),
        (Topology(8), {"global_batch": 8, "micro_batch": 0}, ("parallel.micro_batch", "is 0, but must be positive")),
        (Topology(8), {"global_batch": -8}, ("train.global_batch", "is -8, but must be positive")),
    ],
    ids=["seq-len", "global-batch", "global-batch-below-one-step", "micro-batch", "micro-batch-zero", "global-batch-negative"],
)
def test_what_does_not_fit_the_batch(topo: Topology, batch: dict[str, int], expected: tuple[str, str]) -> None:
    assert found(check_model(topo, model(), **batch)) == [expected]


def test_a_suggested_tp_also_splits_the_sequence() -> None:
    problems = found(check_model(Topology(16, cp=2, tp=8), model(), seq_len=100))
    assert problems[0] == ("parallel.tp", "is 8, but must divide model.num_kv_heads = 4; nearest legal values: 2")


def test_all_misfits_of_model_and_batch_come_in_one_error() -> None:
    bad = model(num_heads=6, num_kv_heads=3, head_dim=8, vocab_size=513, dense_prefix_layers=1, dense_ffn_dim=66)
    topo = Topology(128, pp=1, tp=4, ep=32, etp=4)
    with pytest.raises(TopologyError) as caught:
        require_model(
            topo, replace(bad, moe=MoEConfig(num_experts=8, top_k=1, expert_dim=30, router=TOP_1)), global_batch=33, seq_len=9
        )
    where = [p.where for p in caught.value.problems]
    assert sorted(where) == sorted(["parallel.ep", "parallel.etp", "data.seq_len", "train.global_batch"] + ["parallel.tp"] * 4)


@settings(max_examples=100, deadline=None)
@given(
    topo=topologies(max_world=96),
    num_experts=st.integers(1, 64),
    expert_dim=st.integers(1, 256),
    heads=st.integers(1, 16),
    per_kv=st.sampled_from([1, 2, 4]),
    vocab=st.integers(1, 600),
)
def test_suggestions_for_a_model_mend_all_it_says_about_a_degree(
    topo: Topology, num_experts: int, expert_dim: int, heads: int, per_kv: int, vocab: int
) -> None:
    moe = MoEConfig(num_experts=num_experts, top_k=1, expert_dim=expert_dim, router=TOP_1)
    config = model(num_layers=64, num_heads=heads * per_kv, num_kv_heads=heads, head_dim=8, vocab_size=vocab, moe=moe)
    for problem in check_model(topo, config):
        name = problem.where.removeprefix("parallel.")
        for value in suggested(problem.what):
            mended = replace(topo, dp=None, **{name: value})  # type: ignore[arg-type]
            assert problem.where not in {p.where for p in check_model(mended, config)}
