"""Named model shapes: small tables of `ModelConfig` keywords. Imports no torch.

A preset is the shape and the routing of a published model; text, optimizer and layout are the user's.
In TOML: `model.preset = "olmoe-1b-7b"` inside `[model]`; every other key of `[model]` then changes one value of it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from .config import BalanceConfig, ModelConfig, MoEConfig, RouterConfig
from .errors import ConfigError, Problem

Table = dict[str, Any]


def debug() -> Table:
    """0.3 M parameters, for tests and first steps: 2 layers, 8 experts, byte vocabulary."""
    return {
        "dim": 64,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 264,
        "max_seq_len": 256,
        "moe": {"num_experts": 8, "top_k": 2, "expert_dim": 64},
    }


def olmoe_1b_7b() -> Table:
    """OLMoE-1B-7B (arXiv 2409.02060): 64 experts, top-8, weights not renormalised, query/key norm over the full width."""
    return {
        "dim": 2048,
        "num_layers": 16,
        "num_heads": 16,
        "vocab_size": 50304,
        "max_seq_len": 4096,
        "qk_norm": "full",
        "norm_eps": 1e-5,
        "moe": {
            "num_experts": 64,
            "top_k": 8,
            "expert_dim": 1024,
            "router": {"renormalize": False},
            "balance": {"aux_loss_coeff": 0.01, "z_loss_coeff": 0.001},
        },
    }


def qwen3_30b_a3b() -> Table:
    """Qwen3-30B-A3B (arXiv 2505.09388): 128 experts, top-8, no shared expert, grouped-query attention."""
    return {
        "dim": 2048,
        "num_layers": 48,
        "num_heads": 32,
        "num_kv_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_seq_len": 40960,
        "qk_norm": "head",
        "rope_theta": 1e6,
        "moe": {"num_experts": 128, "top_k": 8, "expert_dim": 768, "balance": {"aux_loss_coeff": 0.001}},
    }


def mixtral_8x7b() -> Table:
    """Mixtral 8x7B (arXiv 2401.04088): 8 wide experts, top-2, renormalised."""
    return {
        "dim": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "vocab_size": 32000,
        "max_seq_len": 32768,
        "rope_theta": 1e6,
        "norm_eps": 1e-5,
        "moe": {"num_experts": 8, "top_k": 2, "expert_dim": 14336, "balance": {"aux_loss_coeff": 0.02}},
    }


def deepseek_moe_16b() -> Table:
    """DeepSeekMoE 16B (arXiv 2401.06066): first layer dense, 2 shared and 64 fine-grained experts, top-6, not renormalised."""
    return {
        "dim": 2048,
        "num_layers": 28,
        "num_heads": 16,
        "vocab_size": 102400,
        "max_seq_len": 4096,
        "dense_prefix_layers": 1,
        "dense_ffn_dim": 10944,
        "init_std": 0.006,
        "moe": {
            "num_experts": 64,
            "top_k": 6,
            "expert_dim": 1408,
            "num_shared_experts": 2,
            "router": {"renormalize": False},
            "balance": {"aux_loss_coeff": 0.001},
        },
    }


def gshard_coarse() -> Table:
    """The coarse-grained counterpart of deepseek-moe-16b: GShard-style top-2 over few wide experts (arXiv 2006.16668).

    Two experts of 4 * 1408 are as wide as the 2 shared and 6 routed ones of 1408 there, so both models spend the
    same active parameters and nearly the same total; only the granularity differs.
    """
    table = deepseek_moe_16b()
    table["moe"] = {"num_experts": 16, "top_k": 2, "expert_dim": 4 * 1408, "balance": {"aux_loss_coeff": 0.01}}
    return table


PRESETS: Mapping[str, Callable[[], Table]] = MappingProxyType(
    {
        "debug": debug,
        "olmoe-1b-7b": olmoe_1b_7b,
        "qwen3-30b-a3b": qwen3_30b_a3b,
        "mixtral-8x7b": mixtral_8x7b,
        "deepseek-moe-16b": deepseek_moe_16b,
        "gshard-coarse": gshard_coarse,
    }
)


def preset(name: str) -> Table:
    """A fresh table of `ModelConfig` keywords (nested for `moe`), to be merged with other settings.

    Raises ConfigError naming the known presets.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ConfigError([Problem("model.preset", f"is '{name}', which is not a preset; {hint}known: {', '.join(PRESETS)}")])
    return PRESETS[name]()


def build(name: str) -> ModelConfig:
    """The model of a preset, unchanged. Raises ConfigError for an unknown name."""
    table = preset(name)
    moe = table.pop("moe")
    router = RouterConfig(**moe.pop("router", {}))
    balance = BalanceConfig(**moe.pop("balance", {}))
    return ModelConfig(**table, moe=MoEConfig(**moe, router=router, balance=balance))
