"""What formats and the programs that run them cannot hold, as data: small builders of `Limit`, and what vLLM assumes.

Every reason names the setting, its value and what would be legal. A remedy is the name of a rewrite in `rewrites`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ..config import ModelConfig, MoEConfig
from .family import Limit, Runtime

VLLM = "0.33.0"
"""The version of vLLM whose source the limits of runtime "vllm" were read in."""


def setting(config: ModelConfig, path: str) -> Any:
    """Value of a dotted path below `model`, such as `moe.router.score`."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def only(
    path: str, *legal: Any, why: str, remedy: str | None = None, runtime: Runtime | None = None, at: tuple[Any, ...] | None = None
) -> Limit:
    """A setting that must have one of the values `legal`. With `at`, the limit (and its remedy) is for these values alone."""

    def broken(config: ModelConfig) -> str | None:
        value = setting(config, path)
        if value in legal or (at is not None and value not in at):
            return None
        return f"{path} is {value!r}, but {why}; legal: {', '.join(map(repr, legal))}"

    return Limit(broken=broken, remedy=remedy, runtime=runtime, version=VLLM if runtime == "vllm" else "")


def rule(
    broken: Callable[[ModelConfig], bool],
    reason: Callable[[ModelConfig], str],
    *,
    remedy: str | None = None,
    runtime: Runtime | None = None,
) -> Limit:
    """A limit on more than one setting: broken where `broken` says so."""
    version = VLLM if runtime == "vllm" else ""
    return Limit(broken=lambda c: reason(c) if broken(c) else None, remedy=remedy, runtime=runtime, version=version)


def experts(config: ModelConfig) -> MoEConfig:
    """The experts of a model that has some."""
    assert config.moe is not None
    return config.moe


def normalized(moe: MoEConfig) -> bool:
    """Whether a token's weights sum to 1 (before scaling): by renormalising, by a softmax of the chosen, or because all are
    chosen."""
    r = moe.router
    all_chosen = r.score == "softmax" and moe.top_k == moe.num_experts
    return r.renormalize or r.order == "topk_softmax" or all_chosen


def grouped(moe: MoEConfig) -> bool:
    """Whether groups keep a token from any expert."""
    return moe.router.top_groups < moe.router.num_groups


def plain_scale(config: ModelConfig) -> bool:
    """Whether attention is scaled by head_dim^-0.5."""
    scale = config.attention_scale
    return scale is None or math.isclose(scale, config.resolved_head_dim**-0.5, rel_tol=1e-12)


def divided_heads(config: ModelConfig) -> bool:
    """Whether the heads together are as wide as the model."""
    return config.num_heads * config.resolved_head_dim == config.dim


UNSCALED: tuple[Limit, ...] = (
    rule(
        lambda c: not plain_scale(c),
        lambda c: f"attention_scale is {c.attention_scale}, but the format always takes head_dim^-0.5",
        remedy="fold_attention_scale",
    ),
    only("residual_scale", 1.0, why="the format has no multiplier there", remedy="fold_residual_scale"),
    only("logits_scale", 1.0, why="the format has no divisor there", remedy="fold_logits_scale"),
)
"""The multipliers of Granite that most formats lack."""

UNSCALED_EMBEDDING = only("embed_scale", 1.0, why="the format has no multiplier there", remedy="fold_embed_scale")
WHOLE_ROPE = only("rope_fraction", 1.0, why="the format turns whole heads")
NO_WINDOW = only("sliding_window", None, why="the format has no sliding window")
PRE_NORM = only("norm_order", "pre", why="the format has its norms before attention and feed-forward only")
POST_NORM = only("norm_order", "post", why="the format has its norms after attention and feed-forward only")


def qk_norm(*legal: str) -> Limit:
    """Norms of queries and keys: never folded away, since what they divide by depends on the token."""
    forced = "" if "none" in legal else " and cannot be without"
    return only("qk_norm", *legal, why=f"the format has norms of queries and keys of its own kind only{forced}")


def attention_bias(*legal: str, runtime: Runtime | None = None) -> tuple[Limit, ...]:
    """Biases of attention; those that a format has and the model has not are filled with zeros."""
    if legal == ("none",):
        return (only("attention_bias", *legal, why="the format has no such biases", runtime=runtime),)
    if "all" in legal:
        why = "the format has them on all four projections or on none"
        return (only("attention_bias", *legal, why=why, remedy="zero_output_bias", runtime=runtime),)
    output = only("attention_bias", *legal, why="the format has none on the output projection", runtime=runtime, at=("all",))
    if "none" in legal:
        return (output,)
    why = "the format always has them on queries, keys and values"
    return (output, only("attention_bias", *legal, why=why, remedy="zero_qkv_bias", runtime=runtime, at=("none",)))


DROPLESS = only("moe.capacity_factor", None, why="the format drops no token; set it to None if the model is to be used so")
ROUTED: tuple[Limit, ...] = (
    DROPLESS,
    only("moe.router.score", "softmax", why="the format has a softmax router"),
    only("moe.balance.expert_bias", False, why="the format has no selection bias"),
    only("moe.router.scaling_factor", 1.0, why="the format has no such factor", remedy="fold_routed_scaling"),
    rule(
        lambda c: grouped(experts(c)),
        lambda c: (
            f"moe.router.top_groups is {experts(c).router.top_groups} of {experts(c).router.num_groups} groups, but the "
            "format has no group limit; legal: top_groups = num_groups"
        ),
    ),
)
"""Limits of formats with a plain softmax router."""

NORMALIZED = rule(
    lambda c: not normalized(experts(c)),
    lambda c: (
        "moe.router.renormalize is False, but the format always divides a token's weights by their sum; legal: True, or "
        "order = 'topk_softmax'"
    ),
)
NO_SHARED = rule(
    lambda c: experts(c).shared_width > 0,
    lambda c: f"moe has shared experts of width {experts(c).shared_width}, but the format has none",
)
ALL_MOE = rule(
    lambda c: len(c.moe_layers) < c.num_layers,
    lambda c: (
        f"layers {_dense_layers(c)} are dense, but the format has experts in every layer; legal: dense_prefix_layers = 0 and "
        "moe_every = 1"
    ),
)
DENSE_PREFIX = rule(
    lambda c: c.moe_layers != tuple(range(c.num_layers - len(c.moe_layers), c.num_layers)),
    lambda c: (
        f"layers {_dense_layers(c)} are dense, but the format can have dense layers only before all others; legal: moe_every = 1"
    ),
)
WIDTH_OF_HEADS = rule(
    lambda c: not divided_heads(c),
    lambda c: f"head_dim is {c.resolved_head_dim}, but the format has it fixed to dim / num_heads = {c.dim / c.num_heads:g}",
)


def _dense_layers(config: ModelConfig) -> str:
    return ", ".join(str(i) for i in range(config.num_layers) if not config.is_moe_layer(i))


def _vllm(path: str, *legal: Any, why: str, remedy: str | None = None, at: tuple[Any, ...] | None = None) -> Limit:
    return only(path, *legal, why=why, remedy=remedy, runtime="vllm", at=at)


_SILU = _vllm("activation", "silu", why="the fused experts compute SiLU, whatever hidden_act says")
_HEADS = rule(
    lambda c: not divided_heads(c),
    lambda c: f"head_dim is {c.resolved_head_dim}, but the model class has it fixed to dim / num_heads = {c.dim / c.num_heads:g}",
    runtime="vllm",
)
_NO_WINDOW = _vllm("sliding_window", None, why="the model class ignores the window")

VLLM_LIMITS: Mapping[str, tuple[Limit, ...]] = MappingProxyType(
    {
        "mixtral": (_SILU, _NO_WINDOW),
        "qwen2_moe": (
            _SILU,
            _NO_WINDOW,
            _HEADS,
            _vllm("attention_bias", "qkv", why="the model class always has them", remedy="zero_qkv_bias", at=("none",)),
        ),
        "qwen3_moe": (
            _SILU,
            _vllm("attention_bias", "none", "qkv", why="the model class has no bias of the output projection"),
            _vllm("sliding_window", None, why="it is not known whether the model class keeps the window"),
        ),
        "olmoe": (
            _SILU,
            _HEADS,
            rule(
                lambda c: normalized(experts(c)),
                lambda c: (
                    "moe.router.renormalize is True, but the model class never divides a token's weights by their sum, whatever "
                    "norm_topk_prob says"
                ),
                runtime="vllm",
            ),
            _vllm("norm_eps", 1e-5, why="the norms of queries and keys have theirs fixed"),
        ),
        "flex_olmo": (_SILU,),
        "granitemoe": (
            _SILU,
            _HEADS,
            _vllm("attention_bias", "none", why="the model class has no biases, whatever the file holds"),
        ),
        "glm4_moe": (
            _SILU,
            rule(
                lambda c: experts(c).shared_width == 0,
                lambda c: "moe has no shared expert, but the model class expects at least one",
                remedy="zero_shared_expert",
                runtime="vllm",
            ),
        ),
    }
)
"""What vLLM's model classes do otherwise than config.json says, and so the models that must not be given to them."""
