"""Model configuration: what is refused and in which words, all problems at once, and which layers have experts."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefold.launch.settings import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimizerConfig,
    RunConfig,
    RunSection,
    SourceConfig,
    TrainConfig,
)
from moefold.moe.config import BalanceConfig, ModelConfig, MoEConfig, RouterConfig
from moefold.moe.errors import ConfigError
from moefold.parallel.config import ParallelConfig

Build = Callable[..., object]


def moe(**changes: Any) -> MoEConfig:
    return MoEConfig(**({"num_experts": 8, "top_k": 2, "expert_dim": 32} | changes))


def model(**changes: Any) -> ModelConfig:
    base = {"dim": 64, "num_layers": 4, "num_heads": 4, "vocab_size": 512, "max_seq_len": 128, "moe": moe()}
    return ModelConfig(**(base | changes))


def problems_of(build: Build, **changes: Any) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        build(**changes)
    for problem in caught.value.problems:
        assert f"{problem.where}: {problem.what}" in str(caught.value)
    return [(p.where, p.what) for p in caught.value.problems]


ROUTER = [
    ({"num_groups": 0}, "model.moe.router.num_groups", "is 0, but must be positive"),
    ({"top_groups": -1}, "model.moe.router.top_groups", "is -1, but must be positive"),
    ({"scaling_factor": 0.0}, "model.moe.router.scaling_factor", "is 0.0, but must be positive"),
    ({"scaling_factor": math.nan}, "model.moe.router.scaling_factor", "is nan, but must be positive and finite"),
    ({"scaling_factor": math.inf}, "model.moe.router.scaling_factor", "is inf, but must be positive and finite"),
    ({"num_groups": 2, "top_groups": 3}, "model.moe.router.top_groups", "is 3, more than num_groups = 2"),
    (
        {"score": "sigmoid", "order": "topk_softmax"},
        "model.moe.router.order",
        "is 'topk_softmax', which needs score = 'softmax'; use 'softmax_topk'",
    ),
]
BALANCE = [
    ({name: value}, f"model.moe.balance.{name}", f"is {value}, but must not be negative")
    for name in ("aux_loss_coeff", "straggler_coeff", "z_loss_coeff", "carry", "bias_update_rate")
    for value in (-0.5, math.nan)
] + [({"carry": math.inf}, "model.moe.balance.carry", "is inf, but must not be negative, and must be finite")]
MOE = [
    ({"num_experts": 0}, "model.moe.num_experts", "is 0, but must be positive"),
    ({"top_k": 0}, "model.moe.top_k", "is 0, but must be positive"),
    ({"expert_dim": -32}, "model.moe.expert_dim", "is -32, but must be positive"),
    ({"num_shared_experts": -1}, "model.moe.num_shared_experts", "is -1, but must be >= 0"),
    ({"capacity_factor": 0.0}, "model.moe.capacity_factor", "is 0.0: no token would reach an expert; use a positive factor, or"),
    ({"capacity_factor": math.nan}, "model.moe.capacity_factor", "is nan: no token would reach an expert"),
    ({"capacity_factor": math.inf}, "model.moe.capacity_factor", "is inf: leave it out for dropless"),
    ({"top_k": 9}, "model.moe.top_k", "is 9, more than num_experts = 8"),
    (
        {"router": RouterConfig(num_groups=3)},
        "model.moe.router.num_groups",
        "is 3, which does not divide num_experts = 8; legal: [1, 2, 4, 8]",
    ),
    (
        {"top_k": 3, "router": RouterConfig(num_groups=4, top_groups=1)},
        "model.moe.router.top_groups",
        "leaves 2 experts to choose from, fewer than top_k = 3",
    ),
    (
        {"router": RouterConfig(num_groups=8, top_groups=4, group_score="top2_sum")},
        "model.moe.router.group_score",
        "is 'top2_sum', but groups hold one expert; use 'max'",
    ),
    (
        {"top_k": 1},
        "model.moe.router.renormalize",
        "with top_k = 1 makes every weight 1, so the router would get no gradient from the loss; set renormalize = false",
    ),
    (
        {"top_k": 1, "router": RouterConfig(order="topk_softmax", renormalize=False)},
        "model.moe.router.renormalize",
        "and order = 'softmax_topk'",
    ),
    ({"top_k": 1, "router": RouterConfig(score="sigmoid")}, "model.moe.router.renormalize", "makes every weight 1"),
    ({"shared_dim": 0}, "model.moe.shared_dim", "is 0, but must be positive"),
    (
        {"shared_gate": True},
        "model.moe.shared_gate",
        "is true, but there are no shared experts to weigh; set num_shared_experts or shared_dim, or leave it out",
    ),
]
MODEL = [
    *(
        ({name: 0}, f"model.{name}", "is 0, but must be positive")
        for name in (
            *("dim", "num_layers", "num_heads", "head_dim", "vocab_size", "max_seq_len", "moe_every", "dense_ffn_dim"),
            *("rope_theta", "norm_eps", "init_std", "sliding_window"),
            *("attention_scale", "embed_scale", "residual_scale", "logits_scale"),
        )
    ),
    ({"norm_eps": math.inf}, "model.norm_eps", "is inf, but must be positive and finite"),
    ({"init_std": math.nan}, "model.init_std", "is nan, but must be positive and finite"),
    ({"head_dim": -16}, "model.head_dim", "is -16, but must be positive"),
    ({"num_heads": 5}, "model.num_heads", "is 5, which does not divide dim = 64; set head_dim"),
    ({"head_dim": 15}, "model.head_dim", "is 15, but rotary embedding needs an even number"),
    ({"num_heads": 64}, "model.head_dim", "is 1, but rotary embedding needs an even number"),
    ({"num_kv_heads": 3}, "model.num_kv_heads", "is 3, which does not divide num_heads = 4"),
    ({"num_kv_heads": 8}, "model.num_kv_heads", "is 8, which does not divide num_heads = 4"),
    ({"num_kv_heads": 0}, "model.num_kv_heads", "is 0, which does not divide num_heads = 4"),
    ({"dense_prefix_layers": -1}, "model.dense_prefix_layers", "is -1, but must be between 0 and num_layers = 4"),
    ({"dense_prefix_layers": 5}, "model.dense_prefix_layers", "is 5, but must be between 0 and num_layers = 4"),
    ({"moe": None}, "model.dense_ffn_dim", "is not set, but some layers are dense; set the hidden width of their FFN"),
    ({"moe_every": 2}, "model.dense_ffn_dim", "is not set, but some layers are dense"),
    ({"dense_prefix_layers": 1}, "model.dense_ffn_dim", "is not set, but some layers are dense"),
    ({"dense_ffn_dim": -1}, "model.dense_ffn_dim", "is -1, but must be positive"),
    ({"embed_scale": math.nan}, "model.embed_scale", "is nan, but must be positive and finite"),
    ({"rope_fraction": 0.0}, "model.rope_fraction", "is 0.0, but must be over 0 and at most 1 (1 turns whole heads)"),
    ({"rope_fraction": 1.5}, "model.rope_fraction", "is 1.5, but must be over 0 and at most 1"),
    (
        {"rope_fraction": 0.2},
        "model.rope_fraction",
        "is 0.2, which turns 3 of head_dim = 16 columns, but rotary embedding needs an even number; legal: multiples of 0.125",
    ),
    ({"rope_fraction": 0.01}, "model.rope_fraction", "is 0.01, which turns 0 of head_dim = 16 columns"),
    (
        {"activation": "gelu_tanh", "moe": moe(kernels="triton")},
        "model.moe.kernels",
        "is 'triton', whose products are SwiGLU without biases only, but activation = 'gelu_tanh'; use 'auto' or 'torch'",
    ),
]
RULES = [
    *((RouterConfig, *rule) for rule in ROUTER),
    *((BalanceConfig, *rule) for rule in BALANCE),
    *((moe, *rule) for rule in MOE),
    *((model, *rule) for rule in MODEL),
]


WRONG_TYPES = [
    (RouterConfig, {"score": "tanh"}, "model.moe.router.score", "is 'tanh', but must be one of 'softmax', 'sigmoid'"),
    (RouterConfig, {"renormalize": 1}, "model.moe.router.renormalize", "is 1, but must be true or false"),
    (RouterConfig, {"num_groups": 2.0}, "model.moe.router.num_groups", "is 2.0, but must be a whole number"),
    (BalanceConfig, {"scope": ["micro"]}, "model.moe.balance.scope", "is ['micro'], but must be one of 'global', 'micro'"),
    (BalanceConfig, {"carry": "1"}, "model.moe.balance.carry", "is '1', but must be a number"),
    (moe, {"top_k": True}, "model.moe.top_k", "is True, but must be a whole number"),
    (moe, {"capacity_factor": "2"}, "model.moe.capacity_factor", "is '2', but must be a number or None"),
    (moe, {"drop_policy": "last"}, "model.moe.drop_policy", "is 'last', but must be one of 'position', 'probability'"),
    (moe, {"router": {"score": "softmax"}}, "model.moe.router", "is {'score': 'softmax'}, but must be a RouterConfig"),
    (model, {"num_heads": None}, "model.num_heads", "is None, but must be a whole number"),
    (model, {"qk_norm": None}, "model.qk_norm", "is None, but must be one of 'none', 'head', 'full'"),
    (model, {"moe": 8}, "model.moe", "is 8, but must be a MoEConfig or None"),
    (model, {"attention_bias": True}, "model.attention_bias", "is True, but must be one of 'none', 'qkv', 'all'"),
    (model, {"activation": "gelu"}, "model.activation", "is 'gelu', but must be one of 'silu', 'gelu_tanh'"),
    (model, {"norm_order": None}, "model.norm_order", "is None, but must be one of 'pre', 'post'"),
    (model, {"rope_scaling": {"kind": "linear"}}, "model.rope_scaling", "but must be a RopeScaling or None"),
    (ParallelConfig, {"recompute": "full"}, "parallel.recompute", "is 'full', but must be one of 'none', 'selective'"),
    (ParallelConfig, {"dp": 0.5}, "parallel.dp", "is 0.5, but must be a whole number or None"),
    (ParallelConfig, {"timeout_s": math.inf}, "parallel.timeout_s", "is inf, but must be positive and finite"),
    (RunSection, {"name": 3}, "run.name", "is 3, but must be a string"),
    (SourceConfig, {"type": "csv"}, "data.sources.type", "is 'csv', but must be one of 'python-code', 'python-docs'"),
    (DataConfig, {"sources": ["a"]}, "data.sources", "is ['a'], but must be a tuple, each element a SourceConfig"),
    (OptimizerConfig, {"weight_decay": math.nan}, "train.optimizer.weight_decay", "is nan, but must not be negative"),
    (TrainConfig, {"steps": 1.5}, "train.steps", "is 1.5, but must be a whole number or None"),
    (TrainConfig, {"steps": 1, "grad_clip": math.nan}, "train.grad_clip", "is nan, but must be positive and finite"),
    (TrainConfig, {"steps": 1, "eval_every": -1}, "train.eval_every", "is -1, but must not be negative"),
    (CheckpointConfig, {"async_save": "yes"}, "checkpoint.async_save", "is 'yes', but must be true or false"),
    (LogConfig, {"every": "10"}, "log.every", "is '10', but must be a whole number"),
    (RunConfig, {"model": 1, "train": TrainConfig(steps=1)}, "model", "is 1, but must be a ModelConfig"),
]


def rule_id(rule: tuple[Any, dict[str, Any], str, str]) -> str:
    _, changes, where, _ = rule
    plain = [f"{name}={value}" for name, value in changes.items() if not isinstance(value, RouterConfig)]
    return "-".join([where, *plain])


@pytest.mark.parametrize(("build", "changes", "where", "what"), RULES, ids=map(rule_id, RULES))
def test_each_rule_names_the_setting_and_its_value(build: Build, changes: dict[str, Any], where: str, what: str) -> None:
    [(found_where, found_what)] = problems_of(build, **changes)
    assert found_where == where
    assert what in found_what


@pytest.mark.parametrize(("build", "changes", "where", "what"), WRONG_TYPES, ids=map(rule_id, WRONG_TYPES))
def test_a_record_built_in_python_is_checked_like_a_file(build: Build, changes: dict[str, Any], where: str, what: str) -> None:
    [(found_where, found_what)] = problems_of(build, **changes)
    assert found_where == where
    assert what in found_what


def test_all_wrong_types_come_at_once() -> None:
    found = problems_of(model, dim="64", tie_embeddings="no", qk_norm="both", moe={})
    assert [where for where, _ in found] == ["model.dim", "model.qk_norm", "model.tie_embeddings", "model.moe"]


def test_whole_numbers_are_numbers() -> None:
    assert BalanceConfig(aux_loss_coeff=1) == BalanceConfig(aux_loss_coeff=1.0)


@pytest.mark.parametrize(
    ("build", "changes"),
    [
        (moe, {"top_k": 9}),
        (moe, {"num_experts": 0}),
        (moe, {"top_k": 0}),
        (RouterConfig, {"num_groups": 0}),
        (model, {"dense_ffn_dim": 0, "moe": None}),
        (model, {"head_dim": 0}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_one_mistake_is_one_problem(build: Build, changes: dict[str, Any]) -> None:
    assert len(problems_of(build, **changes)) == 1


@pytest.mark.parametrize(
    ("build", "changes", "expected"),
    [
        (
            RouterConfig,
            {"top_groups": 2, "scaling_factor": -1.0, "score": "sigmoid", "order": "topk_softmax"},
            ["router.top_groups", "router.scaling_factor", "router.order"],
        ),
        (
            BalanceConfig,
            {"aux_loss_coeff": -1.0, "straggler_coeff": -1.0, "z_loss_coeff": -1.0, "carry": -1.0, "bias_update_rate": -1.0},
            [f"balance.{n}" for n in ("aux_loss_coeff", "straggler_coeff", "z_loss_coeff", "carry", "bias_update_rate")],
        ),
        (
            moe,
            {
                "top_k": 1,
                "expert_dim": 0,
                "num_shared_experts": -1,
                "capacity_factor": -2.0,
                "router": RouterConfig(num_groups=3),
            },
            ["expert_dim", "num_shared_experts", "capacity_factor", "router.num_groups", "router.renormalize"],
        ),
    ],
    ids=["router", "balance", "moe"],
)
def test_all_problems_of_a_moe_section_come_at_once(build: Build, changes: dict[str, Any], expected: list[str]) -> None:
    assert sorted(where for where, _ in problems_of(build, **changes)) == sorted(f"model.moe.{name}" for name in expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"dim": 0, "num_layers": -1, "vocab_size": 0, "norm_eps": -1.0, "dense_prefix_layers": 1, "dense_ffn_dim": -4},
            ["dim", "num_layers", "vocab_size", "norm_eps", "dense_prefix_layers", "dense_ffn_dim"],
        ),
        (
            {"num_heads": 6, "num_kv_heads": 4, "dense_prefix_layers": 9},
            ["num_heads", "num_kv_heads", "dense_prefix_layers"],
        ),
    ],
    ids=["sizes", "attention"],
)
def test_all_problems_of_a_model_come_at_once(changes: dict[str, Any], expected: list[str]) -> None:
    assert sorted(where for where, _ in problems_of(model, **changes)) == sorted(f"model.{name}" for name in expected)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(RouterConfig, id="router-defaults"),
        pytest.param(BalanceConfig, id="balance-defaults"),
        pytest.param(lambda: moe(top_k=8), id="every-expert"),
        pytest.param(lambda: moe(num_experts=1, top_k=1, router=RouterConfig(renormalize=False)), id="one-expert"),
        pytest.param(lambda: moe(router=RouterConfig(num_groups=4, top_groups=1)), id="top_k-fills-the-groups"),
        pytest.param(
            lambda: moe(router=RouterConfig(num_groups=8, top_groups=2, group_score="max")), id="groups-of-one-scored-by-max"
        ),
        pytest.param(lambda: moe(capacity_factor=0.01, num_shared_experts=0), id="tiny-capacity"),
        pytest.param(lambda: BalanceConfig(aux_loss_coeff=0, carry=0, bias_update_rate=0), id="balance-switched-off"),
        pytest.param(lambda: model(num_kv_heads=1), id="one-kv-head"),
        pytest.param(lambda: model(num_heads=5, head_dim=16), id="head_dim-frees-num_heads"),
        pytest.param(lambda: model(dense_prefix_layers=4, dense_ffn_dim=128), id="dense-layers-only"),
        pytest.param(lambda: model(moe=None, dense_ffn_dim=128), id="no-moe"),
    ],
)
def test_the_edge_of_what_is_legal_is_accepted(build: Build) -> None:
    assert build() == build()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (0, 1, 2, 3, 4, 5, 6)),
        ({"moe": None}, ()),
        ({"dense_prefix_layers": 1}, (1, 2, 3, 4, 5, 6)),
        ({"dense_prefix_layers": 7}, ()),
        ({"moe_every": 2}, (0, 2, 4, 6)),
        ({"moe_every": 3, "dense_prefix_layers": 2}, (2, 5)),
        ({"moe_every": 9, "dense_prefix_layers": 6}, (6,)),
    ],
    ids=["every-layer", "no-moe", "prefix-of-1", "prefix-of-all", "every-2nd", "every-3rd-after-2", "step-beyond-the-end"],
)
def test_which_layers_have_experts(changes: dict[str, Any], expected: tuple[int, ...]) -> None:
    config = model(num_layers=7, dense_ffn_dim=128, **changes)
    assert config.moe_layers == expected
    assert [config.is_moe_layer(i) for i in range(7)] == [i in expected for i in range(7)]


@given(layers=st.integers(1, 40), prefix=st.integers(0, 40), every=st.integers(1, 12))
def test_moe_layers_start_after_the_prefix_and_are_evenly_spaced(layers: int, prefix: int, every: int) -> None:
    prefix = min(prefix, layers)
    chosen = model(num_layers=layers, dense_prefix_layers=prefix, moe_every=every, dense_ffn_dim=128).moe_layers
    assert all(b - a == every for a, b in pairwise(chosen))
    assert chosen[:1] == ((prefix,) if prefix < layers else ())
    assert not chosen or chosen[-1] + every >= layers


def test_heads_resolve_to_their_defaults() -> None:
    assert (model().resolved_head_dim, model().resolved_kv_heads) == (16, 4)
    given_heads = model(head_dim=24, num_kv_heads=2)
    assert (given_heads.resolved_head_dim, given_heads.resolved_kv_heads) == (24, 2)


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({}, 0),
        ({"tie_embeddings": True}, -512 * 64),
        ({"qk_norm": "head"}, 2 * 2 * 16),
        ({"qk_norm": "full"}, 2 * (64 + 32)),
        ({"moe": moe(num_shared_experts=1)}, 2 * 3 * 64 * 32),
        ({"moe": moe(num_shared_experts=1, shared_dim=48, shared_gate=True)}, 2 * (3 * 64 * 48 + 64)),
        ({"attention_bias": "qkv"}, 2 * (64 + 2 * 32)),
        ({"attention_bias": "all"}, 2 * (64 + 2 * 32 + 64)),
        # One of two layers trades router and experts for a dense feed-forward of width 96.
        ({"dense_prefix_layers": 1, "dense_ffn_dim": 96}, 3 * 64 * 96 - 64 * 8 - 8 * 3 * 64 * 32),
    ],
    ids=[
        "plain",
        "tied",
        "qk-norm-head",
        "qk-norm-full",
        "shared-expert",
        "gated-shared",
        "qkv-bias",
        "all-biases",
        "dense-prefix",
    ],
)
def test_parameters_counted_by_hand(changes: dict[str, Any], extra: int) -> None:
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64
    layer = attention + 2 * 64 + 64 * 8 + 8 * 3 * 64 * 32
    config = model(num_layers=2, num_kv_heads=2, **changes)
    assert config.num_params == 2 * 512 * 64 + 64 + 2 * layer + extra
    unused = len(config.moe_layers) * (8 - 2) * 3 * 64 * 32
    assert config.num_active_params == config.num_params - unused


def test_records_are_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        moe().top_k = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        MoEConfig(8, 2, 32)  # type: ignore[misc]


def test_a_changed_copy_is_checked_again() -> None:
    with pytest.raises(ConfigError, match=r"model\.moe\.top_k: is 16, more than num_experts = 8"):
        replace(moe(), top_k=16)


def test_importing_the_configuration_does_not_import_torch() -> None:
    code = "import sys; import moefold.moe.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
