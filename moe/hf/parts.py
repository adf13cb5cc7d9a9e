"""Parts: the names of single matrices in which every family's tensors, and every upcycling, are spoken of.

A part is one matrix or vector of one layer or expert, such as `layers.3.moe.experts.5.down`. Families differ in how they
name and fuse these; what is between two families is only parts.
"""

from __future__ import annotations

from ..config import ModelConfig

Shape = tuple[int, ...]


def part_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shape of every part of a model, in the order in which files hold them. A matrix is [rows out, columns in]."""
    V, D = config.vocab_size, config.dim
    shapes: dict[str, Shape] = {"embed": (V, D)}
    for i in range(config.num_layers):
        inside = attention_shapes(config) | ffn_shapes(config, config.is_moe_layer(i))
        shapes |= {f"layers.{i}.{name}": shape for name, shape in inside.items()}
    shapes["head.norm"] = (D,)
    if not config.tie_embeddings:
        shapes["head.weight"] = (V, D)
    return shapes


def attention_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Parts of one layer's attention, with the norm before or after it; names start below the layer."""
    D, d = config.dim, config.resolved_head_dim
    Q, C = config.num_heads * d, config.resolved_kv_heads * d
    shapes: dict[str, Shape] = {"attention_norm": (D,)}
    shapes |= {"attention.q": (Q, D), "attention.k": (C, D), "attention.v": (C, D), "attention.o": (D, Q)}
    if config.attention_bias != "none":
        shapes |= {"attention.q_bias": (Q,), "attention.k_bias": (C,), "attention.v_bias": (C,)}
    if config.attention_bias == "all":
        shapes["attention.o_bias"] = (D,)
    if config.qk_norm != "none":
        q, k = (d, d) if config.qk_norm == "head" else (Q, C)
        shapes |= {"attention.q_norm": (q,), "attention.k_norm": (k,)}
    return shapes


def ffn_shapes(config: ModelConfig, moe_layer: bool) -> dict[str, Shape]:
    """Parts of one layer's feed-forward network, dense or with experts, and its norm; names start below the layer."""
    D = config.dim
    shapes: dict[str, Shape] = {"ffn_norm": (D,)}
    if not moe_layer:
        return shapes | _swiglu("ffn", D, config.dense_ffn_dim or 0)
    moe = config.moe
    assert moe is not None
    shapes["moe.router"] = (moe.num_experts, D)
    if moe.balance.expert_bias:
        shapes["moe.router_bias"] = (moe.num_experts,)
    for e in range(moe.num_experts):
        shapes |= _swiglu(f"moe.experts.{e}", D, moe.expert_dim)
    if moe.shared_width:
        shapes |= _swiglu("moe.shared", D, moe.shared_width)
    if moe.shared_gate:
        shapes["moe.shared_gate"] = (1, D)
    return shapes


def _swiglu(name: str, dim: int, width: int) -> dict[str, Shape]:
    return {f"{name}.gate": (width, dim), f"{name}.up": (width, dim), f"{name}.down": (dim, width)}
