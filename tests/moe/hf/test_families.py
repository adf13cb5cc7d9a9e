"""Checkpoints that transformers has written are read as parts and written again: the same bytes, the same model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moefold.moe.config import ModelConfig
from moefold.moe.hf.families import FAMILIES, carried, family_of, read_parts, write_tensors
from moefold.moe.hf.files import Checkpoint
from moefold.moe.hf.matrix import Given, Matrix
from moefold.moe.hf.parts import part_shapes
from moefold.moe.hf.rewrites import adapt, rewritten
from moefold.moe.hf.rules import copies
from moefold.moe.model import Model
from tiny_models import MODELS, SIZES, as_tensors, native_model, stored, tiny_model

NATIVE = FAMILIES["moefold"]
TOKENS_BS = torch.arange(22).view(2, 11) * 7 % 37


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model of transformers, and the folder that it was saved in."""
    model, folder = tiny_model(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def their_model(folder: Path, config_json: Mapping[str, Any], tensors: Mapping[str, Matrix]) -> Any:
    """What transformers makes of a config.json and tensors; an unused or missing tensor is an error."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json))
    save_file(as_tensors(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    kinds = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **kinds)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out = model(TOKENS_BS)
    return out[0] if isinstance(out, tuple) else out.logits


def gap(one: Any, other: Any) -> float:
    """Largest difference of logits, relative to the largest logit."""
    a, b = logits(one), logits(other)
    return float((a - b).abs().max() / b.abs().max())


def test_parts_are_those_of_the_model(saved: tuple[Any, Path]) -> None:
    checkpoint = Checkpoint.open(saved[1])
    config, parts = read_parts(checkpoint)
    assert {name: part.shape for name, part in parts.items()} == part_shapes(config)
    assert list(parts) == list(part_shapes(config))
    layouts = family_of(checkpoint.config).tensors(config)
    assert {name: layout.shape for name, layout in layouts.items()} == {n: t.shape for n, t in checkpoint.tensors.items()}
    assert config.num_params == sum(parameter.numel() for parameter in saved[0].parameters()) - filled(layouts)


def filled(layouts: Mapping[str, Any]) -> int:
    """Numbers in tensors that hold nothing."""
    return sum(int(np.prod(layout.shape)) for layout in layouts.values() if not layout.parts)


def test_our_model_computes_the_same(saved: tuple[Any, Path]) -> None:
    config, parts = read_parts(Checkpoint.open(saved[1]))
    assert gap(native_model(config, parts), saved[0]) < 1e-5


def test_written_again_it_is_the_same(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = saved
    checkpoint = Checkpoint.open(folder)
    family = family_of(checkpoint.config)
    config, parts = read_parts(checkpoint)
    config_json = family.write(config)
    assert family.read(config_json) == config
    # what holds no information is written as zeros, whatever it was
    wanted = {n: stored(t) for n, t in checkpoint.tensors.items() if family.tensors(config)[n].parts}
    tensors = write_tensors(family, config, parts)
    assert {n: stored(m) for n, m in tensors.items() if n in wanted} == wanted
    again = their_model(tmp_path / "again", config_json, tensors)
    assert torch.equal(logits(again), logits(model))
    # and through our own format, whose tensors are fused otherwise
    ours = write_tensors(NATIVE, config, parts)
    assert NATIVE.read(json.loads(json.dumps(NATIVE.write(config)))) == config
    assert set(ours) == {n for n in Model(config, init=False).state_dict() if n != "head.weight_VD" or not config.tie_embeddings}


REWRITTEN = [
    ("gemma", "mixtral", "transformers", {"fold_embed_scale"}),
    ("gemma", "qwen2_moe", "transformers", {"fold_embed_scale"}),
    ("gemma", "glm4_moe", "transformers", {"fold_embed_scale"}),
    ("gemma", "granitemoe", "transformers", set()),
    ("qwen2", "granitemoe", "transformers", {"zero_output_bias"}),
    ("llama-linear", "qwen2_moe", "vllm", {"zero_qkv_bias"}),
    ("llama-linear", "glm4_moe", "vllm", {"zero_shared_expert"}),
    ("llama-bias-llama3-tied", "granitemoe", "transformers", set()),
    ("mistral-window", "qwen2_moe", "transformers", set()),
    ("mistral", "mixtral", "vllm", set()),
    ("qwen3", "qwen3_moe", "vllm", set()),
    ("qwen3", "glm4_moe", "transformers", set()),
    ("olmo2", "flex_olmo", "transformers", set()),
    (
        "granitemoe",
        "mixtral",
        "transformers",
        {"fold_embed_scale", "fold_attention_scale", "fold_residual_scale", "fold_logits_scale"},
    ),
    ("glm4_moe-bare", "glm4_moe", "vllm", {"zero_shared_expert"}),
]


@pytest.mark.parametrize(("source", "target", "runtime", "names"), REWRITTEN, ids=lambda v: v if isinstance(v, str) else "")
def test_copies_of_a_dense_model_are_that_model(source: str, target: str, runtime: Any, names: set[str], tmp_path: Path) -> None:
    """Dense models are given experts that are copies, models with experts are written in another format."""
    model, family = tiny_model(source), FAMILIES[target]
    if source == "granitemoe":  # its biases no other format holds
        model.config.attention_bias = False
        for layer in model.model.layers:
            for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(layer.self_attn, projection).bias = None
    model.save_pretrained(tmp_path / "source")
    config, parts = read_parts(Checkpoint.open(tmp_path / "source"))
    if config.moe is None:
        config, parts = copied(config, parts, family)
    adapted, rewrites = adapt(family, config, runtime)
    assert {rewrite.name for rewrite in rewrites} == names
    config_json = family.write(adapted, runtime)
    now, new_parts = rewritten(rewrites, config, parts)
    assert now == adapted
    out = their_model(tmp_path / "out", config_json, write_tensors(family, now, new_parts, runtime))
    # weights that do not sum to 1 shrink what the norm after them divides by, and so let its eps be seen
    rtol = 2e-3 if target == "flex_olmo" else 1e-5
    assert gap(out, model) < rtol
    assert gap(native_model(now, new_parts), model) < rtol


def copied(dense: ModelConfig, parts: Mapping[str, Matrix], family: Any) -> tuple[ModelConfig, dict[str, Matrix]]:
    """Every feed-forward network as four copies of itself, with a random router."""
    config = copies(dense, family, num_experts=4)
    made = {}
    generator = np.random.default_rng(0)
    for name, shape in part_shapes(config).items():
        layer, _, leaf = name.partition(".moe.")
        if leaf.startswith("experts."):
            made[name] = parts[f"{layer}.ffn.{leaf.rsplit('.', 1)[-1]}"]
        elif leaf:
            made[name] = Given(generator.normal(0, 0.3, shape).astype(np.float32))
        else:
            made[name] = parts[name]
    return config, made


def test_special_tokens_go_with_the_model() -> None:
    assert carried({"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None, "hidden_size": 8}) == {
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
    }


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in ("gpt2", "moefold")])
def test_keys_left_out_mean_what_transformers_means(model_type: str) -> None:
    from transformers import AutoConfig

    least = {**SIZES, "num_key_value_heads": 4, "intermediate_size": 24, "model_type": model_type}
    theirs = AutoConfig.for_model(**least).to_dict()
    settings = ("sliding_window", "use_sliding_window", "mlp_only_layers", "pad_token_id", "bos_token_id", "eos_token_id")
    assert FAMILIES[model_type].read(least) == FAMILIES[model_type].read(theirs)
    without_kv = {key: value for key, value in least.items() if key != "num_key_value_heads" and key not in settings}
    full = AutoConfig.for_model(**without_kv).to_dict()
    if without_kv["num_attention_heads"] % full["num_key_value_heads"] == 0:
        assert FAMILIES[model_type].read(without_kv) == FAMILIES[model_type].read(full)
