"""Presets against published sizes, an independent parameter count, and each other."""

from __future__ import annotations

import pytest
import torch

from moefold.moe.config import ModelConfig
from moefold.moe.errors import ConfigError
from moefold.moe.presets import PRESETS, build, preset

# Name -> (total, active) parameters as the authors round them.
PUBLISHED = {
    "olmoe-1b-7b": (6.9e9, 1.3e9),
    "qwen3-30b-a3b": (30.5e9, 3.3e9),
    "mixtral-8x7b": (46.7e9, 12.9e9),
    "deepseek-moe-16b": (16.4e9, 2.8e9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    model = build(name)
    total, active = PUBLISHED[name]
    assert model.num_params == pytest.approx(total, rel=0.01)
    assert model.num_active_params == pytest.approx(active, rel=0.02)


def transformers_model(name: str, model: ModelConfig) -> torch.nn.Module:
    """The model of another library with the same shape, without memory for its weights."""
    import transformers as hf

    assert model.moe is not None
    shape = dict(
        hidden_size=model.dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.resolved_kv_heads,
        head_dim=model.resolved_head_dim,
        vocab_size=model.vocab_size,
        num_experts_per_tok=model.moe.top_k,
        tie_word_embeddings=model.tie_embeddings,
    )
    experts, width = model.moe.num_experts, model.moe.expert_dim
    with torch.device("meta"):
        if name == "mixtral-8x7b":
            return hf.MixtralForCausalLM(hf.MixtralConfig(**shape, num_local_experts=experts, intermediate_size=width))
        if name == "olmoe-1b-7b":
            return hf.OlmoeForCausalLM(hf.OlmoeConfig(**shape, num_experts=experts, intermediate_size=width))
        return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**shape, num_experts=experts, moe_intermediate_size=width))


@pytest.mark.parametrize("name", ["olmoe-1b-7b", "qwen3-30b-a3b", "mixtral-8x7b"])
def test_parameter_count_equals_that_of_transformers(name):
    model = build(name)
    assert model.num_params == sum(p.numel() for p in transformers_model(name, model).parameters())


def test_flops_of_qwen3_at_4096_are_what_vendor_tables_imply():
    assert build("qwen3-30b-a3b").flops_per_token(4096) == pytest.approx(23.1e9, rel=0.003)


def test_coarse_twin_has_equal_active_and_similar_total_parameters():
    fine, coarse = build("deepseek-moe-16b"), build("gshard-coarse")
    assert coarse.num_active_params == pytest.approx(fine.num_active_params, rel=0.01)
    assert coarse.flops_per_token(4096) == pytest.approx(fine.flops_per_token(4096), rel=0.01)
    assert coarse.num_params == pytest.approx(fine.num_params, rel=0.04)
    assert coarse.moe is not None and fine.moe is not None
    assert coarse.moe.expert_dim == 4 * fine.moe.expert_dim


def test_deepseek_moe_has_one_dense_layer_and_no_renormalisation():
    model = build("deepseek-moe-16b")
    assert model.moe_layers == tuple(range(1, 28))
    assert model.moe is not None and not model.moe.router.renormalize


def test_debug_is_small_and_speaks_bytes():
    model = build("debug")
    assert model.num_params < 1e6
    assert model.vocab_size >= 257


@pytest.mark.parametrize("name", PRESETS)
def test_tables_are_fresh_copies(name):
    table = preset(name)
    table["dim"] = 1
    table["moe"]["top_k"] = 1
    assert preset(name)["dim"] != 1
    assert preset(name)["moe"]["top_k"] != 1
    assert PRESETS[name].__doc__


def test_unknown_name_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'mixtral-8x7b'") as error:
        preset("mixtral8x7b")
    assert "olmoe-1b-7b" in str(error.value)
