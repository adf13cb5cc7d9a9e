"""Which format can hold which dense model as copies of itself: computed, by reading, upcycling and asking the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ..config import BalanceConfig, ModelConfig, MoEConfig
from ..errors import ConfigError
from .families import FAMILIES, REFUSED, family_of
from .family import Family, NotHeldError, Runtime
from .rewrites import adapt

TARGETS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "glm4_moe", "granitemoe", "deepseek_v2", "deepseek_v3")
"""Formats with experts, in the order of the table; those that hold no rotary dense model are there to say why."""

_SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    }
)
_LLAMA3: Mapping[str, Any] = MappingProxyType(
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
)


def _archetype(model_type: str, **keys: Any) -> Mapping[str, Any]:
    return MappingProxyType({**_SIZES, "model_type": model_type, **keys})


ARCHETYPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "Llama 1-3": _archetype("llama"),
        "Llama 3.1, tied": _archetype("llama", rope_scaling=dict(_LLAMA3), rope_theta=5e5, tie_word_embeddings=True),
        "Llama, attention bias": _archetype("llama", attention_bias=True),
        "Llama, MLP bias": _archetype("llama", mlp_bias=True),
        "Mistral": _archetype("mistral", sliding_window=None),
        "Mistral, sliding window": _archetype("mistral", sliding_window=4096),
        "Qwen2, Qwen2.5": _archetype("qwen2"),
        "Qwen3": _archetype("qwen3"),
        "OLMo 2": _archetype("olmo2"),
        "OLMo 3": _archetype("olmo3"),
        "Gemma 1": _archetype("gemma", head_dim=256, hidden_act="gelu_pytorch_tanh"),
        "Gemma 2": _archetype("gemma2"),
        "Gemma 3": _archetype("gemma3_text"),
        "GPT-2": MappingProxyType({"model_type": "gpt2"}),
    }
)
"""config.json of the kinds of dense models that the table has rows for."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One cell of the table.

    rewrites: names of the exact rewrites that are needed. reasons: why the target cannot hold the model; none if it can.
    """

    dense: str
    target: str
    rewrites: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def mark(self) -> str:
        """`=` exact, `(=)` exact after rewrites, `x` impossible."""
        return "x" if self.reasons else "(=)" if self.rewrites else "="


def rule_table(runtime: Runtime = "transformers") -> tuple[Rule, ...]:
    """Every archetype with every target, row by row."""
    return tuple(rule_for(name, table, target, runtime) for name, table in ARCHETYPES.items() for target in TARGETS)


def rule_for(name: str, config_json: Mapping[str, Any], target: str, runtime: Runtime = "transformers") -> Rule:
    """Whether `target` can hold the dense model of a config.json as copies of its feed-forward network."""
    if config_json["model_type"] in REFUSED:
        return Rule(dense=name, target=target, reasons=(REFUSED[config_json["model_type"]],))
    try:
        dense = family_of(config_json).read(config_json)
    except ConfigError as error:
        return Rule(dense=name, target=target, reasons=tuple(f"{p.where} {p.what}" for p in error.problems))
    if target not in FAMILIES:
        return Rule(dense=name, target=target, reasons=(REFUSED[target],))
    family = FAMILIES[target]
    try:
        _, rewrites = adapt(family, copies(dense, family), runtime)
    except NotHeldError as error:
        return Rule(dense=name, target=target, reasons=error.reasons)
    return Rule(dense=name, target=target, rewrites=tuple(rewrite.name for rewrite in rewrites))


def copies(dense: ModelConfig, target: Family, num_experts: int = 8, top_k: int = 2) -> ModelConfig:
    """A dense model whose feed-forward layers are `num_experts` copies, routed as `target` does it."""
    moe = MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        expert_dim=dense.dense_ffn_dim or 1,
        router=target.routing,
        balance=BalanceConfig(expert_bias=target.expert_bias),
    )
    return replace(dense, moe=moe, dense_ffn_dim=None)


def markdown(rules: tuple[Rule, ...]) -> str:
    """The table as Markdown: a row for each dense model, a column for each target."""
    targets = list(dict.fromkeys(rule.target for rule in rules))
    marks = {(rule.dense, rule.target): rule.mark for rule in rules}
    lines = [f"| dense model | {' | '.join(targets)} |", "|---" * (len(targets) + 1) + "|"]
    for dense in dict.fromkeys(rule.dense for rule in rules):
        lines.append(f"| {dense} | {' | '.join(marks[dense, target] for target in targets)} |")
    return "\n".join(lines) + "\n"
