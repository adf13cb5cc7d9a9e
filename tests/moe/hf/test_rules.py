"""Which format holds which model: the table, and every reason for which a config.json is not read or a model not written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from moefold.moe.config import BalanceConfig, CompressConfig, ModelConfig, MoEConfig, RouterConfig
from moefold.moe.errors import CheckpointError, ConfigError
from moefold.moe.hf.families import FAMILIES, REFUSED, family_of, ignored_tensors, read_parts, write_tensors
from moefold.moe.hf.family import NotHeldError
from moefold.moe.hf.files import Checkpoint
from moefold.moe.hf.matrix import Constant
from moefold.moe.hf.parts import part_shapes
from moefold.moe.hf.rules import ARCHETYPES, TARGETS, markdown, rule_for, rule_table

TABLE = {
    # mixtral, qwen2_moe, qwen3_moe, olmoe, flex_olmo, glm4_moe, granitemoe, deepseek_v2, deepseek_v3
    "Llama 1-3": "= = x x x = = x x",
    "Llama 3.1, tied": "= = x x x = = x x",
    "Llama, attention bias": "x x x x x x = x x",
    "Llama, MLP bias": "x x x x x x x x x",
    "Mistral": "= = x x x = = x x",
    "Mistral, sliding window": "= = x x x x x x x",
    "Qwen2, Qwen2.5": "x = x x x = (=) x x",
    "Qwen3": "x x = x x = x x x",
    "OLMo 2": "x x x x = x x x x",
    "OLMo 3": "x x x x x x x x x",
    "Gemma 1": "(=) (=) x x x (=) = x x",
    "Gemma 2": "x x x x x x x x x",
    "Gemma 3": "x x x x x x x x x",
    "GPT-2": "x x x x x x x x x",
}
IN_VLLM = {
    **dict.fromkeys(TABLE, "x x x x x x x x x"),
    "Llama 1-3": "= (=) x x x (=) = x x",
    "Llama 3.1, tied": "= (=) x x x (=) = x x",
    "Mistral": "= (=) x x x (=) = x x",
    "Qwen2, Qwen2.5": "x = x x x (=) x x x",
    "Qwen3": "x x = x x (=) x x x",
    "OLMo 2": "x x x x = x x x x",
}


@pytest.mark.parametrize(("runtime", "want"), [("transformers", TABLE), ("vllm", IN_VLLM)], ids=["transformers", "vllm"])
def test_the_table(runtime: Any, want: Mapping[str, str]) -> None:
    rules = rule_table(runtime)
    marks = {(rule.dense, rule.target): rule.mark for rule in rules}
    assert {dense: " ".join(marks[dense, target] for target in TARGETS) for dense in ARCHETYPES} == want
    assert all(rule.reasons for rule in rules if rule.mark == "x")
    assert markdown(rules).count("\n") == len(TABLE) + 2


@pytest.mark.parametrize(
    ("dense", "target", "runtime", "words"),
    [
        ("Llama 1-3", "qwen3_moe", "transformers", ["qk_norm is 'none'", "'head'"]),
        ("Llama, attention bias", "qwen2_moe", "transformers", ["attention_bias is 'all'", "output projection"]),
        ("Llama, attention bias", "granitemoe", "vllm", ["no biases", "vllm 0.33"]),
        ("Llama, MLP bias", "mixtral", "transformers", ["mlp_bias is True"]),
        ("Mistral, sliding window", "mixtral", "vllm", ["sliding_window is 4096", "ignores the window", "vllm 0.33"]),
        ("Mistral, sliding window", "glm4_moe", "transformers", ["sliding_window is 4096"]),
        ("Gemma 1", "mixtral", "vllm", ["activation is 'gelu_tanh'", "SiLU"]),
        ("OLMo 2", "olmoe", "transformers", ["norm_order is 'post'"]),
        ("Llama 1-3", "deepseek_v3", "transformers", ["rotary key", "latent"]),
        ("GPT-2", "mixtral", "transformers", ["learned positions", "LayerNorm"]),
    ],
)
def test_a_reason_names_the_setting_and_its_value(dense: str, target: str, runtime: Any, words: list[str]) -> None:
    told = " ".join(rule_for(dense, ARCHETYPES[dense], target, runtime).reasons)
    assert all(word in told for word in words), told


SMALL: Mapping[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 37,
    "max_position_embeddings": 32,
    "intermediate_size": 24,
}
UNREADABLE: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"hidden_act": "relu"}, "hidden_act (config.json): is 'relu'"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "factor = 'two'"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ between layers"),
    ("llama", {"partial_rotary_factor": 0.5}, "turns whole heads"),
    ("llama", {"hidden_size": "16"}, "hidden_size (config.json): is '16'"),
    ("llama", {"vocab_size": None}, "vocab_size (config.json): is missing"),
    ("llama", {"attention_bias": "yes"}, "attention_bias (config.json): is 'yes'"),
    ("llama", {"rms_norm_eps": None, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping (config.json): is 50.0"),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "layers [0] see everything"),
    ("gemma", {"use_bidirectional_attention": True}, "only causal attention"),
    ("gemma", {"hidden_act": "gelu", "hidden_activation": "silu"}, "hidden_activation (config.json): is 'silu'"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
    ("olmoe", {"num_experts": 4, "num_local_experts": 5}, "another name for it"),
    ("qwen3_moe", {"num_hidden_layers": 4, "mlp_only_layers": [1]}, "leaves experts in layers [0, 2, 3]"),
    ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "no layer with experts"),
    ("glm4_moe", {"n_shared_experts": -1}, "n_shared_experts (config.json): is -1"),
]


@pytest.mark.parametrize(("model_type", "keys", "told"), UNREADABLE, ids=[f"{t}-{'-'.join(k)}" for t, k, _ in UNREADABLE])
def test_what_is_not_read_says_why(model_type: str, keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FAMILIES[model_type].read({**SMALL, "model_type": model_type, **keys})
    assert told in str(caught.value)


def test_all_problems_of_a_config_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match="4 problems") as caught:
        FAMILIES["llama"].read({**SMALL, "mlp_bias": True, "hidden_act": "relu", "vocab_size": 0, "softcap": 30})
    assert all(word in str(caught.value) for word in ("mlp_bias", "relu", "vocab_size", "softcap"))


@pytest.mark.parametrize("model_type", [*REFUSED, "qwen4", None])
def test_other_types_are_refused(model_type: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        family_of({"model_type": model_type} if model_type else {})
    assert REFUSED.get(model_type or "", "read are llama") in str(caught.value)


MOE = MoEConfig(num_experts=4, top_k=2, expert_dim=12)
MODEL = ModelConfig(dim=16, num_layers=4, num_heads=4, vocab_size=37, max_seq_len=32, moe=MOE)
SIGMOID = replace(MOE, router=RouterConfig(score="sigmoid", num_groups=2, top_groups=1, group_score="max"))
UNWRITABLE: list[tuple[str, dict[str, Any], str, str]] = [
    ("llama", {}, "has layers with experts", "transformers"),
    ("mixtral", {"moe": None, "dense_ffn_dim": 24}, "no layer with experts", "transformers"),
    ("mixtral", {"dense_prefix_layers": 1, "dense_ffn_dim": 24}, "layers 0 are dense", "transformers"),
    ("glm4_moe", {"moe_every": 2, "dense_ffn_dim": 24, "moe": SIGMOID}, "layers 1, 3 are dense", "transformers"),
    ("glm4_moe", {"moe": SIGMOID}, "group_score is 'max'", "transformers"),
    ("glm4_moe", {"moe": replace(SIGMOID, shared_dim=13)}, "13 wide", "transformers"),
    ("glm4_moe", {}, "moe.router.score is 'softmax'", "transformers"),
    ("glm4_moe", {"moe": replace(SIGMOID, shared_dim=12, shared_gate=True)}, "shared_gate is True", "transformers"),
    ("mixtral", {"moe": SIGMOID}, "moe.router.score is 'sigmoid'", "transformers"),
    ("mixtral", {"moe": replace(MOE, router=RouterConfig(renormalize=False))}, "renormalize is False", "transformers"),
    ("mixtral", {"moe": replace(MOE, router=RouterConfig(num_groups=2))}, "top_groups is 1 of 2", "transformers"),
    ("mixtral", {"moe": replace(MOE, balance=BalanceConfig(expert_bias=True))}, "expert_bias is True", "transformers"),
    ("mixtral", {"moe": replace(MOE, capacity_factor=1.0)}, "capacity_factor is 1.0", "transformers"),
    ("mixtral", {"moe": replace(MOE, shared_dim=8)}, "shared experts of width 8", "transformers"),
    ("mixtral", {"rope_fraction": 0.5}, "rope_fraction is 0.5", "transformers"),
    ("olmoe", {"qk_norm": "full", "head_dim": 6}, "head_dim is 6", "transformers"),
    ("olmoe", {"qk_norm": "full"}, "never divides a token's weights", "vllm"),
    ("olmoe", {"qk_norm": "full", "norm_eps": 1e-6}, "norm_eps is 1e-06", "vllm"),
    ("qwen2_moe", {"head_dim": 6}, "head_dim is 6", "vllm"),
    ("granitemoe", {"head_dim": 6}, "head_dim is 6", "vllm"),
    ("qwen3_moe", {"qk_norm": "head", "attention_bias": "all"}, "attention_bias is 'all'", "vllm"),
    ("llama", {"num_heads": 3, "head_dim": 6, "moe": None, "dense_ffn_dim": 24}, "num_heads is 3", "transformers"),
    ("gemma", {"moe": None, "dense_ffn_dim": 24}, "embed_scale is 1.0", "transformers"),
    ("moefold", {}, "vllm does not know", "vllm"),
    ("moefold", {"moe": replace(MOE, compress=CompressConfig(method="lsh", compensation="scalar"))}, "no part", "transformers"),
]


@pytest.mark.parametrize(("target", "settings", "told", "runtime"), UNWRITABLE, ids=lambda v: v if isinstance(v, str) else "")
def test_what_a_format_cannot_hold_is_refused(target: str, settings: dict[str, Any], told: str, runtime: Any) -> None:
    config = replace(MODEL, **settings)
    with pytest.raises(NotHeldError) as caught:
        FAMILIES[target].write(config, runtime)
    assert told in str(caught.value)
    with pytest.raises(NotHeldError):
        write_tensors(FAMILIES[target], config, {n: Constant(s) for n, s in part_shapes(config).items()}, runtime)


def test_weights_that_sum_to_one_anyway_need_no_switch() -> None:
    for router in (RouterConfig(order="topk_softmax", renormalize=False), RouterConfig(num_groups=2, top_groups=2)):
        assert FAMILIES["mixtral"].write(replace(MODEL, moe=replace(MOE, router=router)))["num_local_experts"] == 4
    all_chosen = replace(MOE, top_k=4, router=RouterConfig(renormalize=False))
    assert FAMILIES["qwen3_moe"].write(replace(MODEL, qk_norm="head", moe=all_chosen))["norm_topk_prob"] is True


def test_the_balance_loss_keeps_its_size() -> None:
    """There a mean over layers that is top_k at balance, here a sum of ones."""
    written = FAMILIES["mixtral"].write(replace(MODEL, moe=replace(MOE, balance=BalanceConfig(aux_loss_coeff=0.01))))
    assert written["router_aux_loss_coef"] == pytest.approx(0.01 * 4 / 2)


def llama_folder(folder: Path, keys: Mapping[str, Any], change: Mapping[str, Any]) -> Checkpoint:
    """A Llama checkpoint of zeros. `change`: tensors to put in, None to leave out."""
    import json

    config_json = {**SMALL, "model_type": "llama", **keys}
    family = FAMILIES["llama"]
    tensors = {n: np.zeros(layout.shape, np.float32) for n, layout in family.tensors(family.read(config_json)).items()}
    tensors = {name: value for name, value in {**tensors, **change}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config_json))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint.open(folder)


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    added = {frequencies: np.ones(2, np.float32), "lm_head.weight": np.zeros((37, 16), np.float32)}
    checkpoint = llama_folder(tmp_path, {"tie_word_embeddings": True}, added)
    config, parts = read_parts(checkpoint)
    assert "head.weight" not in parts
    assert set(ignored_tensors(checkpoint, FAMILIES["llama"], config)) == set(added)


@pytest.mark.parametrize(
    ("keys", "change", "told"),
    [
        ({}, {"lm_head.weight": None}, "set tie_word_embeddings to true"),
        ({}, {"model.layers.1.mlp.up_proj.weight": None}, "lacks model.layers.1.mlp.up_proj.weight"),
        ({}, {"model.layers.2.mlp.up_proj.weight": np.zeros((24, 16), np.float32)}, "would be lost"),
        ({}, {"model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)}, "would be lost"),
        ({}, {"model.norm.weight": np.zeros(15, np.float32)}, "has shape [15], but config.json makes it [16]"),
        ({"tie_word_embeddings": True}, {"lm_head.weight": np.ones((37, 16), np.float32)}, "tie_word_embeddings to false"),
    ],
)
def test_tensors_that_do_not_fit_the_config(tmp_path: Path, keys: dict[str, Any], change: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_parts(llama_folder(tmp_path, keys, change))
    assert told in str(caught.value)


def test_parts_that_do_not_fit_the_model() -> None:
    config = replace(MODEL, moe=None, dense_ffn_dim=24)
    parts = {n: Constant(s) for n, s in part_shapes(config).items() if n != "layers.2.ffn.up"}
    with pytest.raises(CheckpointError, match=r"layers\.2\.ffn\.up"):
        write_tensors(FAMILIES["llama"], config, parts)


def test_layers_that_predict_further_tokens_are_ignored() -> None:
    glm = FAMILIES["glm4_moe"]
    assert "no logits depend" in str(glm.ignored("model.layers.4.eh_proj.weight", MODEL))
    assert glm.ignored("model.layers.3.eh_proj.weight", MODEL) is None


def test_our_own_config_is_strict() -> None:
    native = FAMILIES["moefold"]
    table = native.write(MODEL)
    assert native.read(table) == MODEL
    with pytest.raises(ConfigError, match=r"model\.moe\.router\.topk"):
        native.read({"model": {**table["model"], "moe": {"num_experts": 4, "top_k": 2, "expert_dim": 4, "router": {"topk": 2}}}})
    with pytest.raises(ConfigError, match="num_layers"):
        native.read({"model": {"dim": 16}})


def test_no_torch_is_imported() -> None:
    code = "import sys, moefold.moe.hf.rules; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_the_readme_has_the_table() -> None:
    readme = (Path(__file__).resolve().parents[3] / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("<!-- rules -->\n")[2].partition("<!-- /rules -->")[0]
    assert shown == markdown(rule_table()), "print it again: moefold.moe.hf.rules.markdown(rule_table())"
