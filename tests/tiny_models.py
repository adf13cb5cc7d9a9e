"""Tiny random models of transformers, one of every family that checkpoints are read from and written as."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moefold.moe.config import ModelConfig
from moefold.moe.hf.families import FAMILIES, write_tensors
from moefold.moe.hf.matrix import FileRange, Matrix
from moefold.moe.model import Model

SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 37,
        "max_position_embeddings": 32,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
)
LLAMA3 = MappingProxyType(
    {
        "rope_type": "llama3",
        "rope_theta": 5e3,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }
)
_DENSE = {"intermediate_size": 24}
_GPT2 = {"n_inner": 26, "num_key_value_heads": None}
_QWEN_MOE = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
_GLM = {"moe_intermediate_size": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "routed_scaling_factor": 1.5}
_FEW = {"intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
_LOCAL = {"intermediate_size": 12, "num_local_experts": 4, "num_experts_per_tok": 2}
_MULTIPLIERS = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}
_SLIDES = {"use_sliding_window": True, "sliding_window": 4}

MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "llama": ("llama", {**_DENSE, "rope_theta": 5e3}),
        "llama-bias-llama3-tied": (
            "llama",
            {**_DENSE, "attention_bias": True, "rope_parameters": dict(LLAMA3), "tie_word_embeddings": True},
        ),
        "llama-linear": ("llama", {**_DENSE, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        "mistral": ("mistral", {**_DENSE, "sliding_window": None, "head_dim": 6}),
        "mistral-window": ("mistral", {**_DENSE, "sliding_window": 4}),
        "qwen2": ("qwen2", _DENSE),
        "qwen2-window": ("qwen2", {**_DENSE, **_SLIDES, "max_window_layers": 0}),
        "qwen3": ("qwen3", {**_DENSE, "head_dim": 6, "tie_word_embeddings": True}),
        "olmo2": ("olmo2", _DENSE),
        "gemma": ("gemma", {**_DENSE, "head_dim": 6, "tie_word_embeddings": True}),
        "gpt2": ("gpt2", {**_GPT2, "tie_word_embeddings": True}),
        "gpt2-unscaled": ("gpt2", {**_GPT2, "scale_attn_weights": False, "hidden_size": 20, "n_inner": None}),
        "mixtral": ("mixtral", {**_LOCAL, "sliding_window": 5}),
        "qwen2_moe": ("qwen2_moe", {**_QWEN_MOE, "shared_expert_intermediate_size": 20}),
        "qwen2_moe-bare": (
            "qwen2_moe",
            {
                **_QWEN_MOE,
                **_SLIDES,
                "shared_expert_intermediate_size": 0,
                "qkv_bias": False,
                "mlp_only_layers": [0],
                "intermediate_size": 24,
                "layer_types": ["sliding_attention"] * 2,
            },
        ),
        "qwen3_moe": ("qwen3_moe", {**_QWEN_MOE, "norm_topk_prob": False, "head_dim": 6, "decoder_sparse_step": 2, **_DENSE}),
        "olmoe": ("olmoe", _FEW),
        "flex_olmo": ("flex_olmo", {**_FEW, "norm_topk_prob": True}),
        "glm4_moe": (
            "glm4_moe",
            {**_GLM, **_DENSE, "use_qk_norm": True, "attention_bias": True, "head_dim": 8, "n_group": 2, "topk_group": 1},
        ),
        "glm4_moe-bare": ("glm4_moe", {**_GLM, "n_shared_experts": 0, "first_k_dense_replace": 0, "partial_rotary_factor": 1.0}),
        "granitemoe": ("granitemoe", {**_LOCAL, **_MULTIPLIERS, "attention_bias": True}),
    }
)
"""Name -> (model_type, keys of config.json besides `SIZES`), each with something that the others lack."""


def tiny_model(name: str, seed: int = 0) -> Any:
    """A model in float32 with random weights, norms and biases included, in evaluation mode; attention and experts in plain
    loops."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, keys = MODELS[name]
    config = AutoConfig.for_model(model_type, **{**SIZES, **keys})
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model)
    return model


def randomize(model: Any) -> None:
    """Fill every parameter and selection bias with normal numbers, vectors around 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3)


def stored(matrix: Matrix) -> bytes:
    """The bytes of a matrix in its own dtype."""
    out = bytearray()
    for chunk in matrix.chunks(matrix.dtype):
        if isinstance(chunk, FileRange):
            out += chunk.path.read_bytes()[chunk.offset : chunk.offset + chunk.nbytes]
        else:
            out += chunk
    return bytes(out)


def as_tensors(matrices: Mapping[str, Matrix]) -> dict[str, Tensor]:
    """Tensors of F32 matrices."""
    return {n: torch.from_numpy(np.frombuffer(stored(m), "<f4").copy()).view(m.shape) for n, m in matrices.items()}


def native_model(config: ModelConfig, parts: Mapping[str, Matrix]) -> Model:
    """Our model with the weights of parts."""
    model = Model(config, init=False)
    state = as_tensors(write_tensors(FAMILIES["moefold"], config, parts))
    if config.tie_embeddings:
        state["head.weight_VD"] = state["embed.weight_VD"]
    model.load_state_dict(state)
    return model
