"""Every rewrite changes the weights and not the function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moefold.moe.config import ModelConfig, MoEConfig, RouterConfig
from moefold.moe.hf.families import FAMILIES
from moefold.moe.hf.family import NotHeldError
from moefold.moe.hf.matrix import Given, Matrix
from moefold.moe.hf.parts import part_shapes
from moefold.moe.hf.rewrites import REWRITES, adapt, rewritten
from tiny_models import native_model

MOE = MoEConfig(num_experts=4, top_k=2, expert_dim=12, num_shared_experts=1)
BASE = ModelConfig(dim=16, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=37, max_seq_len=32, moe=MOE)
DENSE_FIRST: dict[str, Any] = {"dense_prefix_layers": 1, "dense_ffn_dim": 20}
BIASED: dict[str, Any] = {"norm": "layer", "ffn_bias": True, "attention_bias": "all"}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("untie", {"tie_embeddings": True}),
    ("fold_embed_scale", {"tie_embeddings": True, "embed_scale": 3.0}),
    ("fold_embed_scale", {"embed_scale": 3.0}),
    ("fold_attention_scale", {"attention_scale": 0.9, "attention_bias": "qkv"}),
    ("fold_attention_scale", {"attention_scale": 0.9, "qk_norm": "head"}),
    ("fold_attention_scale", {"attention_scale": 0.9, "qk_norm": "full"}),
    ("fold_residual_scale", {"residual_scale": 0.3, "attention_bias": "all", **DENSE_FIRST}),
    ("fold_residual_scale", {"residual_scale": 0.3, "norm_order": "post", **DENSE_FIRST}),
    ("fold_logits_scale", {"logits_scale": 5.0, "tie_embeddings": True}),
    ("fold_routed_scaling", {"moe": replace(MOE, router=RouterConfig(scaling_factor=2.5))}),
    ("fold_residual_scale", {"residual_scale": 0.3, **BIASED, **DENSE_FIRST}),
    ("fold_residual_scale", {"residual_scale": 0.3, "norm_order": "post", **BIASED}),
    ("fold_logits_scale", {"logits_scale": 5.0, **BIASED}),
    ("fold_routed_scaling", {"moe": replace(MOE, router=RouterConfig(scaling_factor=2.5)), **BIASED}),
    ("open_shared_gate", BIASED),
    ("zero_qkv_bias", {}),
    ("zero_output_bias", {"attention_bias": "qkv"}),
    ("open_shared_gate", {}),
    ("zero_shared_expert", {"moe": replace(MOE, num_shared_experts=0)}),
]


def random_parts(config: ModelConfig) -> dict[str, Matrix]:
    generator = np.random.default_rng(0)
    made: dict[str, Matrix] = {}
    for name, shape in part_shapes(config).items():
        made[name] = Given(generator.normal(len(shape) == 1, 0.3, shape).astype(np.float32))
    return made


@pytest.mark.parametrize(("name", "settings"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_the_function_stays(name: str, settings: dict[str, Any]) -> None:
    before = replace(BASE, **settings)
    parts = random_parts(before)
    after, new_parts = rewritten((REWRITES[name],), before, parts)
    assert after != before
    assert list(new_parts) == list(part_shapes(after))
    tokens_BS = torch.arange(22).view(2, 11) * 7 % 37
    with torch.no_grad():
        want, got = (native_model(c, p)(tokens_BS)[0] for c, p in ((before, parts), (after, new_parts)))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
        if name.startswith("fold"):  # the setting does something: without new parts the function is another
            old = {part: parts.get(part, matrix) for part, matrix in new_parts.items()}
            assert not torch.allclose(native_model(after, old)(tokens_BS)[0], want, rtol=0.02, atol=0.02)


def test_every_rewrite_is_tried() -> None:
    assert {name for name, _ in CASES} == set(REWRITES)


def test_only_what_is_needed_is_rewritten() -> None:
    config = replace(BASE, moe=replace(MOE, shared_gate=True))
    assert adapt(FAMILIES["qwen2_moe"], config) == (config, ())
    scaled = replace(config, logits_scale=2.0, moe=replace(MOE, router=RouterConfig(scaling_factor=2.0)))
    adapted, rewrites = adapt(FAMILIES["qwen2_moe"], scaled)
    assert [r.name for r in rewrites] == ["fold_logits_scale", "fold_routed_scaling", "open_shared_gate"]
    assert adapted == replace(config, moe=replace(MOE, shared_gate=True))


def test_what_no_rewrite_helps_is_told_at_once() -> None:
    config = replace(BASE, norm_order="post", attention_bias="qkv", logits_scale=2.0)
    with pytest.raises(NotHeldError) as caught:
        adapt(FAMILIES["mixtral"], config)
    told = " ".join(caught.value.reasons)
    assert all(word in told for word in ("norm_order", "attention_bias", "shared experts of width 12"))
    assert "logits_scale" not in told
