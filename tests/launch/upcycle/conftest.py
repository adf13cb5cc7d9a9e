"""Tiny random dense models of transformers, one for each kind in the rule table that can be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import LLAMA3, randomize

SIZES = MappingProxyType(
    {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 61,
        "max_position_embeddings": 64,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
)
DENSE: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "Llama 1-3": ("llama", {"head_dim": 12}),
        "Llama 3.1, tied": ("llama", {"rope_parameters": dict(LLAMA3), "tie_word_embeddings": True}),
        "Llama, attention bias": ("llama", {"attention_bias": True}),
        "Mistral": ("mistral", {"sliding_window": None, "head_dim": 12}),
        "Mistral, sliding window": ("mistral", {"sliding_window": 4}),
        "Qwen2, Qwen2.5": ("qwen2", {}),
        "Qwen3": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
        "OLMo 2": ("olmo2", {}),
        "Gemma 1": ("gemma", {"head_dim": 12, "tie_word_embeddings": True}),
    }
)
"""Name in the rule table -> (model_type, what differs from SIZES), each with grouped queries."""


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a model, saved when first asked for."""
    folders: dict[tuple[str, torch.dtype], Path] = {}

    def saved(name: str = "Llama 1-3", dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in folders:
            from transformers import AutoConfig, AutoModelForCausalLM

            model_type, keys = DENSE[name]
            torch.manual_seed(0)
            config = AutoConfig.for_model(model_type, **{**SIZES, **keys})
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            randomize(model)
            folders[name, dtype] = tmp_path_factory.mktemp("dense")
            model.to(dtype).save_pretrained(folders[name, dtype])
        return folders[name, dtype]

    return saved


@pytest.fixture(scope="session")
def logits() -> Callable[[Path], Tensor]:
    """What transformers computes with the model in a folder; a missing or unused tensor is an error."""
    found: dict[Path, Tensor] = {}

    def compute(folder: Path) -> Tensor:
        if folder not in found:
            from transformers import AutoModelForCausalLM

            kinds = {"attn_implementation": "eager", "experts_implementation": "eager"}
            model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **kinds)
            assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
            with torch.no_grad():
                found[folder] = model.eval()(torch.arange(34).view(2, 17) * 7 % 61).logits
        return found[folder]

    return compute
