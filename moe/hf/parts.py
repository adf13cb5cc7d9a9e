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
    if config.positions == "learned":
        shapes["positions"] = (config.max_seq_len, D)
    for i in range(config.num_layers):
        inside = attention_shapes(config) | ffn_shapes(config, config.is_moe_layer(i))
        shapes |= {f"layers.{i}.{name}": shape for name, shape in inside.items()}
    shapes |= _norm("head.norm", config)
    if not config.tie_embeddings:
        shapes["head.weight"] = (V, D)
    return shapes


def attention_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Parts of one layer's attention, with the norm before or after it; names start below the layer.

    Of several attention experts each has parts of its own, `attention.experts.2.q`; keys and values that all share are named as
    where there is one.
    """
    D, d = config.dim, config.resolved_head_dim
    Q, C = config.num_heads * d, config.resolved_kv_heads * d
    shapes: dict[str, Shape] = {"q": (Q, D), "k": (C, D), "v": (C, D), "o": (D, Q)}
    if config.attention_bias != "none":
        shapes |= {"q_bias": (Q,), "k_bias": (C,), "v_bias": (C,)}
    if config.attention_bias == "all":
        shapes["o_bias"] = (D,)
    if config.qk_norm != "none":
        q, k = (d, d) if config.qk_norm == "head" else (Q, C)
        shapes |= {"q_norm": (q,), "k_norm": (k,)}
    N, norm = config.attention_experts, _norm("attention_norm", config)
    if N == 1:
        return norm | {f"attention.{name}": shape for name, shape in shapes.items()}
    common = {name for name in shapes if name[0] in "kv"} if config.attention_expert_kv == "shared" else set()
    found: dict[str, Shape] = norm | {"attention.router": (N, D)}
    found |= {f"attention.{name}": shape for name, shape in shapes.items() if name in common}
    for i in range(N):
        found |= {f"attention.experts.{i}.{name}": shape for name, shape in shapes.items() if name not in common}
    return found


def ffn_shapes(config: ModelConfig, moe_layer: bool) -> dict[str, Shape]:
    """Parts of one layer's feed-forward network, dense or with experts, and its norm; names start below the layer."""
    D = config.dim
    shapes = _norm("ffn_norm", config)
    if not moe_layer:
        return shapes | _network("ffn", config, config.dense_ffn_dim or 0)
    moe = config.moe
    assert moe is not None
    shapes["moe.router"] = (moe.num_experts, D)
    if moe.balance.expert_bias:
        shapes["moe.router_bias"] = (moe.num_experts,)
    for e in range(moe.num_experts):
        shapes |= _network(f"moe.experts.{e}", config, moe.expert_dim)
    if moe.shared_width:
        shapes |= _network("moe.shared", config, moe.shared_width)
    if moe.shared_gate:
        shapes["moe.shared_gate"] = (1, D)
    return shapes


def _norm(name: str, config: ModelConfig) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {name: (config.dim,)}
    return shapes | ({f"{name}_bias": (config.dim,)} if config.norm == "layer" else {})


def _network(name: str, config: ModelConfig, width: int) -> dict[str, Shape]:
    """A feed-forward network. Without a gate, `up` is its first matrix."""
    first, dim = ("gate", "up") if config.ffn_gate else ("up",), config.dim
    shapes: dict[str, Shape] = {f"{name}.{which}": (width, dim) for which in first}
    shapes[f"{name}.down"] = (dim, width)
    if config.ffn_bias:
        shapes |= {f"{name}.{which}_bias": (width,) for which in first}
        shapes[f"{name}.down_bias"] = (dim,)
    return shapes
