"""Feed-forward layers written from their definitions, in float64 numpy: what upcycled parts are to compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from moefold.moe.config import ModelConfig, RouterConfig
from moefold.moe.hf.matrix import Given, Matrix
from moefold.moe.hf.parts import part_shapes

Values = npt.NDArray[np.float64]

GPT2: Mapping[str, Any] = {
    "activation": "gelu_tanh",
    "ffn_gate": False,
    "ffn_bias": True,
    "norm": "layer",
    "positions": "learned",
    "attention_bias": "all",
}
"""Fields of `ModelConfig` that make it a model of the kind of GPT-2."""


def dense_config(width: int = 24, dim: int = 8, **changes: Any) -> ModelConfig:
    """A dense model of two small layers."""
    table: dict[str, Any] = {"dim": dim, "num_layers": 2, "num_heads": 2, "vocab_size": 11, "max_seq_len": 16}
    return ModelConfig(**(table | {"dense_ffn_dim": width} | changes))


def dense_parts(config: ModelConfig, seed: int = 0) -> dict[str, Matrix]:
    """Random float64 weights; FFN matrices such that gates are of size 1, where activations are far from linear."""
    draw = np.random.default_rng(seed)
    shapes = part_shapes(config)
    return {name: Given(draw.normal(0, shape[-1] ** -0.5, shape)) for name, shape in shapes.items()}


def tokens(dim: int = 8, count: int = 16, seed: int = 1) -> Values:
    return np.random.default_rng(seed).normal(size=(count, dim))


def arrays(parts: Mapping[str, Matrix]) -> dict[str, Values]:
    return {name: matrix.rows().astype(np.float64).reshape(matrix.shape) for name, matrix in parts.items()}


def act(x: Values, kind: str) -> Values:
    if kind == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def ffn(x_TD: Values, weights: Mapping[str, Values], prefix: str, kind: str) -> Values:
    """down(act(gate x) * up x), or down(act(up x)) where there is no gate; with the biases that there are."""

    def project(y_TX: Values, name: str) -> Values:
        return y_TX @ weights[f"{prefix}.{name}"].T + weights.get(f"{prefix}.{name}_bias", np.zeros(1))

    up_TF = project(x_TD, "up")
    hidden_TF = act(project(x_TD, "gate"), kind) * up_TF if f"{prefix}.gate" in weights else act(up_TF, kind)
    return project(hidden_TF, "down")


def best(values: list[float], k: int, ties: str) -> list[int]:
    """Indices of the k largest values; among equals the lowest index first, the highest, or odd ones."""
    before = {"low": lambda i: i, "high": lambda i: -i, "odd": lambda i: (i % 2 == 0, i)}[ties]
    return sorted(range(len(values)), key=lambda i: (-values[i], before(i)))[:k]


def choose(logits: list[float], bias: list[float], rule: RouterConfig, top_k: int, ties: str) -> dict[int, float]:
    """Weight of each chosen expert of one token."""
    shifted = [math.exp(z - max(logits)) for z in logits]
    scores = [z / sum(shifted) for z in shifted] if rule.score == "softmax" else [1 / (1 + math.exp(-z)) for z in logits]
    ranking = [s + b for s, b in zip(logits if rule.order == "topk_softmax" else scores, bias, strict=True)]
    if rule.num_groups > 1:
        size = len(logits) // rule.num_groups
        groups = [sorted(ranking[g * size : (g + 1) * size], reverse=True) for g in range(rule.num_groups)]
        value = [group[0] if rule.group_score == "max" else sum(group[:2]) for group in groups]
        chosen_groups = best(value, rule.top_groups, ties)
        ranking = [r if e // size in chosen_groups else -math.inf for e, r in enumerate(ranking)]
    chosen = best(ranking, top_k, ties)
    if rule.order == "topk_softmax":
        weights = {e: shifted[e] / sum(shifted[f] for f in chosen) for e in chosen}
    else:
        weights = {e: scores[e] / (sum(scores[f] for f in chosen) if rule.renormalize else 1) for e in chosen}
    return {e: w * rule.scaling_factor for e, w in weights.items()}


def moe_forward(x_TD: Values, weights: Mapping[str, Values], config: ModelConfig, layer: int = 0, ties: str = "low") -> Values:
    """Output [T, D] of one MoE layer."""
    moe, at = config.moe, f"layers.{layer}.moe"
    assert moe is not None
    logits_TE = x_TD @ weights[f"{at}.router"].T
    # equal rows must give equal logits, which a matrix product need not do
    for e in range(1, moe.num_experts):
        twin = next(f for f in range(e + 1) if np.array_equal(weights[f"{at}.router"][f], weights[f"{at}.router"][e]))
        logits_TE[:, e] = logits_TE[:, twin]
    bias = weights.get(f"{at}.router_bias", np.zeros(moe.num_experts)).tolist()
    outputs = [ffn(x_TD, weights, f"{at}.experts.{e}", config.activation) for e in range(moe.num_experts)]
    y_TD = np.zeros_like(x_TD)
    for t in range(len(x_TD)):
        for e, weight in choose(logits_TE[t].tolist(), bias, moe.router, moe.top_k, ties).items():
            y_TD[t] += weight * outputs[e][t]
    if moe.shared_width:
        shared_TD = ffn(x_TD, weights, f"{at}.shared", config.activation)
        if moe.shared_gate:
            shared_TD = shared_TD / (1 + np.exp(-(x_TD @ weights[f"{at}.shared_gate"].T)))
        y_TD += shared_TD
    return y_TD


def relative(found: Values, wanted: Values) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def gap(dense: tuple[ModelConfig, Mapping[str, Matrix]], moe: tuple[ModelConfig, Mapping[str, Matrix]], **how: Any) -> float:
    """Relative error of the first MoE layer against the dense layer it was made of, on random tokens."""
    layer, x_TD = moe[0].moe_layers[0], tokens(dense[0].dim)
    wanted = ffn(x_TD, arrays(dense[1]), f"layers.{layer}.ffn", dense[0].activation)
    return relative(moe_forward(x_TD, arrays(moe[1]), moe[0], layer, **how), wanted)
