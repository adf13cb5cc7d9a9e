"""Rewrites: the same function with other weights, so that a format can hold it that lacks one of the model's settings.

All are exact in real numbers. Stored weights that are multiplied are rounded once more, except by powers of two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from ..config import ModelConfig
from .family import Family, NotHeldError, Runtime
from .matrix import Constant, Matrix, Scaled
from .parts import part_shapes

Parts = dict[str, Matrix]


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """One rewrite.

    name: how it is asked for. says: what is done, for the report. config: the model after it. parts: new parts, from the model
    before it and its parts; what it does not return stays.
    """

    name: str
    says: str
    config: Callable[[ModelConfig], ModelConfig]
    parts: Callable[[ModelConfig, Mapping[str, Matrix]], Parts]

    def apply(self, config: ModelConfig, parts: Mapping[str, Matrix]) -> tuple[ModelConfig, Parts]:
        """The model and its parts after the rewrite, parts in the order of files."""
        after = self.config(config)
        changed = {**parts, **self.parts(config, parts)}
        return after, {part: changed[part] for part in part_shapes(after)}


def adapt(family: Family, config: ModelConfig, runtime: Runtime = "transformers") -> tuple[ModelConfig, tuple[Rewrite, ...]]:
    """The model as `family` can hold it, and the rewrites that lead there, in order; none where it can already.

    Raises NotHeldError with every reason for which there is no rewrite.
    """
    done: list[Rewrite] = []
    while broken := family.broken(config, runtime):
        used = {rewrite.name for rewrite in done}
        final = tuple(reason for limit, reason in broken if limit.remedy is None or limit.remedy in used)
        if final:
            raise NotHeldError(family.model_type, final)
        rewrite = REWRITES[str(broken[0][0].remedy)]
        done.append(rewrite)
        config = rewrite.config(config)
    return config, tuple(done)


def rewritten(
    rewrites: tuple[Rewrite, ...], config: ModelConfig, parts: Mapping[str, Matrix]
) -> tuple[ModelConfig, dict[str, Matrix]]:
    """A model and its parts after several rewrites, one after another."""
    now = dict(parts)
    for rewrite in rewrites:
        config, now = rewrite.apply(config, now)
    return config, now


def _scaled(parts: Mapping[str, Matrix], factor: float, wanted: Callable[[str], bool]) -> Parts:
    return {name: Scaled(matrix, factor) for name, matrix in parts.items() if wanted(name)}


def _zeros(config: ModelConfig, after: ModelConfig, parts: Mapping[str, Matrix]) -> Parts:
    """The parts that the model gets with new settings, zeros in the dtype of the embedding."""
    old = part_shapes(config)
    return {p: Constant(shape, 0.0, parts["embed"].dtype) for p, shape in part_shapes(after).items() if p not in old}


def _untied(config: ModelConfig, parts: Mapping[str, Matrix]) -> Parts:
    return {"head.weight": parts["embed"]} if config.tie_embeddings else {}


def _fold_embed_scale(config: ModelConfig, parts: Mapping[str, Matrix]) -> Parts:
    return {**_untied(config, parts), "embed": Scaled(parts["embed"], config.embed_scale)}


def _fold_attention_scale(config: ModelConfig, parts: Mapping[str, Matrix]) -> Parts:
    assert config.attention_scale is not None
    factor = config.attention_scale * config.resolved_head_dim**0.5
    # a norm undoes any factor before it
    names = ("attention.q", "attention.q_bias") if config.qk_norm == "none" else ("attention.q_norm",)
    return _scaled(parts, factor, lambda name: name.endswith(names))


def _fold_residual_scale(config: ModelConfig, parts: Mapping[str, Matrix]) -> Parts:
    last = ("attention_norm", "ffn_norm") if config.norm_order == "post" else (".o", ".down")
    ends = (*last, *(f"{name}_bias" for name in last))
    return _scaled(parts, config.residual_scale, lambda name: name.startswith("layers.") and name.endswith(ends))


def _fold_routed_scaling(config: ModelConfig, parts: Mapping[str, Matrix]) -> Parts:
    assert config.moe is not None
    factor = config.moe.router.scaling_factor
    return _scaled(parts, factor, lambda name: ".moe.experts." in name and name.endswith((".down", ".down_bias")))


def _unscaled_routing(config: ModelConfig) -> ModelConfig:
    assert config.moe is not None
    return replace(config, moe=replace(config.moe, router=replace(config.moe.router, scaling_factor=1.0)))


def _shared_gate(config: ModelConfig) -> ModelConfig:
    assert config.moe is not None
    return replace(config, moe=replace(config.moe, shared_gate=True))


def _open_shared_gate(config: ModelConfig, parts: Mapping[str, Matrix]) -> Parts:
    return _zeros(config, _shared_gate(config), parts) | _scaled(parts, 2.0, _of_shared_output)


def _of_shared_output(name: str) -> bool:
    return name.endswith((".moe.shared.down", ".moe.shared.down_bias"))


def _one_shared(config: ModelConfig) -> ModelConfig:
    assert config.moe is not None
    return replace(config, moe=replace(config.moe, num_shared_experts=1, shared_dim=None))


def _with(**settings: object) -> Callable[[ModelConfig], ModelConfig]:
    return lambda config: replace(config, **settings)  # type: ignore[arg-type]


def _filled(change: Callable[[ModelConfig], ModelConfig]) -> Callable[[ModelConfig, Mapping[str, Matrix]], Parts]:
    return lambda config, parts: _zeros(config, change(config), parts)


_ALL = (
    Rewrite(
        name="untie",
        says="the head, which was the embedding, is a copy of it",
        config=_with(tie_embeddings=False),
        parts=_untied,
    ),
    Rewrite(
        name="fold_embed_scale",
        says="the embedding is multiplied by embed_scale; the head, if it was the embedding, is a copy of that before",
        config=_with(tie_embeddings=False, embed_scale=1.0),
        parts=_fold_embed_scale,
    ),
    Rewrite(
        name="fold_attention_scale",
        says="queries (or the norm of queries) are multiplied by attention_scale * sqrt(head_dim)",
        config=_with(attention_scale=None),
        parts=_fold_attention_scale,
    ),
    Rewrite(
        name="fold_residual_scale",
        says="output projections of attention and feed-forward (or the norms after them) are multiplied by residual_scale",
        config=_with(residual_scale=1.0),
        parts=_fold_residual_scale,
    ),
    Rewrite(
        name="fold_logits_scale",
        says="the weight of the last norm, and its bias, are divided by logits_scale",
        config=_with(logits_scale=1.0),
        parts=lambda config, parts: _scaled(parts, 1 / config.logits_scale, lambda name: name.startswith("head.norm")),
    ),
    Rewrite(
        name="fold_routed_scaling",
        says="down projections of routed experts are multiplied by the router's scaling_factor",
        config=_unscaled_routing,
        parts=_fold_routed_scaling,
    ),
    Rewrite(
        name="zero_qkv_bias",
        says="biases of queries, keys and values are added as zeros",
        config=_with(attention_bias="qkv"),
        parts=_filled(_with(attention_bias="qkv")),
    ),
    Rewrite(
        name="zero_output_bias",
        says="the bias of attention's output projection is added as zeros",
        config=_with(attention_bias="all"),
        parts=_filled(_with(attention_bias="all")),
    ),
    Rewrite(
        name="open_shared_gate",
        says="the shared expert's sigmoid gate is added with weight 0, which halves, and its down projection is doubled",
        config=_shared_gate,
        parts=_open_shared_gate,
    ),
    Rewrite(
        name="zero_shared_expert",
        says="one shared expert is added as zeros",
        config=_one_shared,
        parts=_filled(_one_shared),
    ),
)
REWRITES: Mapping[str, Rewrite] = MappingProxyType({rewrite.name: rewrite for rewrite in _ALL})
