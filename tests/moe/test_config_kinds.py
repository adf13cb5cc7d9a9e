"""Settings of the kinds of models: rotary scaling, what is counted, and tables that older versions wrote."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest

from moefold.moe.config import ModelConfig, MoEConfig, RopeScaling, with_defaults
from moefold.moe.errors import ConfigError

LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 64}
ROPE = [
    ({"kind": "linear", "factor": 0.0}, "model.rope_scaling.factor", "is 0.0, but must be positive"),
    (LLAMA3 | {"factor": math.inf}, "model.rope_scaling.factor", "is inf, but must be positive and finite"),
    (LLAMA3 | {"original_max_seq_len": 0}, "model.rope_scaling.original_max_seq_len", "is 0, but must be positive"),
    (LLAMA3 | {"low_freq_factor": 4.0}, "model.rope_scaling.low_freq_factor", "is 4.0, but must be under high_freq_factor = 4.0"),
    (
        {"kind": "llama3", "factor": 8.0},
        "model.rope_scaling.original_max_seq_len",
        "is not set, but kind = 'llama3' needs it; set the longest sequence that the model saw before scaling",
    ),
    (
        {"kind": "linear", "factor": 2.0, "original_max_seq_len": 64},
        "model.rope_scaling.original_max_seq_len",
        "is 64, which only kind = 'llama3' uses; leave it out",
    ),
    ({"kind": "yarn", "factor": 2.0}, "model.rope_scaling.kind", "is 'yarn', but must be one of 'linear', 'llama3'"),
]


def moe(**changes: Any) -> MoEConfig:
    return MoEConfig(**({"num_experts": 8, "top_k": 2, "expert_dim": 32} | changes))


def model(**changes: Any) -> ModelConfig:
    base = {"dim": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 512, "max_seq_len": 128, "moe": moe()}
    return ModelConfig(**(base | changes))


@pytest.mark.parametrize(("changes", "where", "what"), ROPE, ids=lambda value: value if isinstance(value, str) else None)
def test_rotary_scaling_that_cannot_be_is_refused(changes: dict[str, Any], where: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RopeScaling(**changes)
    [problem] = caught.value.problems
    assert problem.where == where
    assert what in problem.what


def test_flops_count_products_and_what_attention_sees() -> None:
    plain = model()
    seq_len = 100
    pairs = plain.flops_per_token(seq_len) - plain.flops_per_token(1) + 3 * 2 * 2 * 64
    assert pairs == 3 * 2 * 2 * seq_len * 64
    # the first 10 positions see 10 / 2 on average, the others 10, where all see seq_len / 2
    saved = plain.flops_per_token(seq_len) - model(sliding_window=10).flops_per_token(seq_len)
    assert saved == pytest.approx(3 * 2 * 4 * 64 * (seq_len / 2 - (10 - 10 * 10 / 2 / seq_len)))
    assert model(sliding_window=seq_len).flops_per_token(seq_len) == plain.flops_per_token(seq_len)
    # biases are added, the gate of shared experts is a product with one column
    assert model(attention_bias="all").flops_per_token(seq_len) == plain.flops_per_token(seq_len)
    gated, shared = (model(moe=moe(shared_dim=8, shared_gate=on)) for on in (True, False))
    assert gated.flops_per_token(seq_len) - shared.flops_per_token(seq_len) == 3 * 2 * 2 * 64


def test_what_an_older_version_wrote_is_the_model_that_was_meant() -> None:
    known = asdict(model(moe=moe(num_shared_experts=1)))
    new = ("attention_bias", "sliding_window", "rope_scaling", "embed_scale")
    older = {name: value for name, value in known.items() if name not in new}
    older["moe"] = {name: value for name, value in known["moe"].items() if name not in ("shared_gate", "compress")}
    older["moe"]["router"] = {"score": "sigmoid"}
    known["moe"]["router"]["score"] = "sigmoid"
    assert with_defaults(older) == known
    assert with_defaults(known) == known
    assert older["moe"]["router"] == {"score": "sigmoid"}
    dense = asdict(model(moe=None, dense_ffn_dim=8, rope_scaling=RopeScaling(kind="linear", factor=2.0)))
    del dense["rope_scaling"]["low_freq_factor"]
    assert with_defaults(dense)["rope_scaling"]["low_freq_factor"] == 1.0
    assert with_defaults(dense)["moe"] is None
    assert with_defaults({"unknown": 3})["unknown"] == 3
