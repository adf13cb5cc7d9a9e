"""A user's configuration made small enough for processes on this machine, with every feature that could break parity kept.

Sizes shrink (width, depth, experts, vocabulary, sequence); degrees of parallelism, accumulation, score functions, groups,
balance, capacity, norms, biases, windows, tied embeddings and dense layers stay. There are no documents (`data.document_mask`).
"""

from __future__ import annotations

from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING

from ..moe.config import ModelConfig, MoEConfig

if TYPE_CHECKING:
    from ..parallel.parity import ParityCase
    from ..parallel.topology import Topology
    from .settings import RunConfig

STEPS = 3
"""Updates that are compared; the third is the first that starts from moments which two different steps have formed."""


def parity_case(config: RunConfig, topology: Topology) -> ParityCase:
    """The small float64 case of a configuration on a topology that it fits (see `check_model`).

    Masked positions are random, and differ between sequences, so that ranks hold unequal numbers of valid tokens. The learning
    rate is large, so that a wrong update is far above rounding.
    """
    from ..parallel.engine import OptimizerSettings
    from ..parallel.parity import ParityCase

    o = config.train.optimizer
    per_rank = config.train.global_batch // topology.dp
    rows = config.parallel.micro_batch or per_rank
    num_micro = min(per_rank // rows, 4)
    seq_len = _at_least(8, topology.tp)
    return ParityCase(
        model=small_model(config.model, topology, seq_len),
        global_batch=topology.dp * num_micro * min(rows, 2),
        seq_len=seq_len,
        num_micro=num_micro,
        steps=STEPS,
        valid_share=0.6,
        recompute=config.parallel.recompute,
        ranks_per_node=None if config.parallel.ranks_per_node is None else min(config.parallel.ranks_per_node, topology.world),
        pieces=config.parallel.pieces,
        gradient_windows=config.parallel.gradient_windows,
        seed=config.train.seed,
        optimizer=OptimizerSettings(
            betas=(o.beta1, o.beta2),
            eps=o.eps,
            weight_decay=o.weight_decay,
            grad_clip=config.train.grad_clip,
            implementation=o.implementation,
        ),
    )


def small_model(model: ModelConfig, topology: Topology, seq_len: int) -> ModelConfig:
    """The model with small sizes that still divide by the topology's degrees."""
    prefix, every = min(model.dense_prefix_layers, 1), min(model.moe_every, 2)
    moe_layers = min(len(model.moe_layers), 2)
    if moe_layers:
        layers = prefix + (moe_layers - 1) * every + 1
    else:
        layers = prefix = min(model.num_layers, 2)
    ratio = min(model.num_heads // model.resolved_kv_heads, 2)
    kv_heads = _at_least(min(model.resolved_kv_heads, 2), topology.tp)
    small = replace(
        model,
        dim=16,
        num_layers=layers,
        num_heads=kv_heads * ratio,
        num_kv_heads=kv_heads,
        head_dim=4,
        attention_experts=min(model.attention_experts, 3),
        rope_fraction=1.0 if model.rope_fraction == 1 else 0.5,
        sliding_window=None if model.sliding_window is None else min(model.sliding_window, 3),
        vocab_size=_at_least(32, topology.tp),
        max_seq_len=seq_len,
        dense_prefix_layers=prefix,
        moe_every=every,
        dense_ffn_dim=None if model.dense_ffn_dim is None else _at_least(16, topology.tp),
    )
    return small if model.moe is None else replace(small, moe=small_moe(model.moe, topology))


def small_moe(moe: MoEConfig, topology: Topology) -> MoEConfig:
    """The layer with fewer and narrower experts: as many as choice, groups and ep need, local ones still (in)divisible by edp."""
    router, top_k = moe.router, min(moe.top_k, 4)
    unit = lcm(topology.ep, router.num_groups)

    def like_the_original(experts: int) -> bool:
        group = experts // router.num_groups
        uneven = [bool(n // topology.ep % topology.edp_shard) for n in (experts, moe.num_experts)]
        enough = experts >= min(2 * top_k, moe.num_experts) and top_k <= router.top_groups * group
        return enough and uneven[0] == uneven[1] and (group >= 2 or group == moe.num_experts // router.num_groups)

    # the original number is a multiple of the unit too, and like itself
    experts = next(n for n in range(unit, moe.num_experts + 1, unit) if n == moe.num_experts or like_the_original(n))
    return replace(
        moe,
        num_experts=experts,
        top_k=min(top_k, experts),
        expert_dim=_at_least(8, topology.etp),
        num_shared_experts=min(moe.num_shared_experts, 2),
        shared_dim=None if moe.shared_dim is None else min(moe.shared_dim, 12),
    )


def _at_least(size: int, unit: int) -> int:
    """The smallest multiple of `unit` from `size` on."""
    return -(-size // unit) * unit
