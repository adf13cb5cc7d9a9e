"""Families whose routing is special: GLM-4-MoE, by sigmoid with a bias, and Granite-MoE, by a softmax of the chosen."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import Any

from ..config import ModelConfig, RouterConfig
from .family import LLAMA_NAMES, HuggingFaceFamily, Layout, shared_fields
from .family_dense import read_bias, whole_rope
from .family_moe import NAMES, balance, shared_names, write_balance, zero_width
from .fields import Fields
from .limits import (
    ALL_MOE,
    DENSE_PREFIX,
    DROPLESS,
    NO_SHARED,
    NO_WINDOW,
    NORMALIZED,
    PRE_NORM,
    ROUTED,
    UNSCALED,
    UNSCALED_EMBEDDING,
    VLLM_LIMITS,
    WHOLE_ROPE,
    attention_bias,
    experts,
    grouped,
    only,
    qk_norm,
    rule,
)


class Glm4Moe(HuggingFaceFamily):
    """GLM-4-MoE: sigmoid scores with bias and groups (as DeepSeek-V3), partial rotary embedding, dense first layers."""

    model_type, architecture, moe = "glm4_moe", "Glm4MoeForCausalLM", True
    defaults = MappingProxyType(
        {
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "n_routed_experts": 128,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
        }
    )
    names = MappingProxyType({**NAMES, "moe.router_bias": "mlp.gate.e_score_correction_bias", **shared_names("shared_experts")})
    routing = RouterConfig(score="sigmoid")
    expert_bias = True
    aliases = MappingProxyType({"n_routed_experts": "num_local_experts"})
    limits = (
        PRE_NORM,
        qk_norm("none", "head"),
        *attention_bias("none", "qkv"),
        NO_WINDOW,
        UNSCALED_EMBEDDING,
        *UNSCALED,
        DENSE_PREFIX,
        DROPLESS,
        only("moe.router.score", "sigmoid", why="the format has a sigmoid router"),
        only("moe.shared_gate", False, why="the format has no gate before its shared experts"),
        rule(
            lambda c: experts(c).shared_width % experts(c).expert_dim > 0,
            lambda c: (
                f"the shared experts are {experts(c).shared_width} wide, but the format has them in multiples of expert_dim = "
                f"{experts(c).expert_dim}"
            ),
        ),
        rule(
            lambda c: grouped(experts(c)) and experts(c).router.group_score != "top2_sum",
            lambda c: "moe.router.group_score is 'max', but the format scores a group by its two best experts; legal: 'top2_sum'",
        ),
        rule(
            lambda c: experts(c).num_experts < 2,
            lambda c: "moe.num_experts is 1, but the format takes the two best experts of a group",
        ),
        *VLLM_LIMITS["glm4_moe"],
    )

    def read_more(self, fields: Fields, settings: dict[str, Any]) -> None:
        settings["attention_bias"] = "qkv" if fields.flag("attention_bias") else "none"
        settings["qk_norm"] = "head" if fields.flag("use_qk_norm") else "none"
        E, K, F = (fields.size(k) for k in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"))
        groups, best = fields.size("n_group"), fields.size("topk_group")
        scaling, renormalize = fields.number("routed_scaling_factor"), fields.flag("norm_topk_prob")
        dense = fields.count("first_k_dense_replace")
        if dense:
            settings |= {"dense_prefix_layers": dense, "dense_ffn_dim": fields.size("intermediate_size")}
        # null is none, absent is one
        shared = fields.count("n_shared_experts")
        # extra layers that predict further tokens: their tensors are ignored, with that reason
        fields.known |= {"intermediate_size", "num_nextn_predict_layers", "num_mtp_layers"}
        router = {"score": "sigmoid", "renormalize": renormalize, "scaling_factor": scaling}
        settings["moe"] = {
            "num_experts": E,
            "top_k": K,
            "expert_dim": F,
            "num_shared_experts": shared,
            "router": router | {"num_groups": groups, "top_groups": best},
            # the format has no coefficient of a load-balancing loss
            "balance": {"expert_bias": True, "aux_loss_coeff": 0.0},
        }

    def write_more(self, config: ModelConfig) -> dict[str, Any]:
        moe = experts(config)
        r, limited = moe.router, grouped(moe)
        return {
            "attention_bias": config.attention_bias == "qkv",
            "use_qk_norm": config.qk_norm == "head",
            # absent, it would mean 0.5
            "partial_rotary_factor": config.rope_fraction,
            "rope_parameters": shared_fields(config)["rope_parameters"] | {"partial_rotary_factor": config.rope_fraction},
            "intermediate_size": config.dense_ffn_dim or moe.expert_dim,
            "first_k_dense_replace": config.num_layers - len(config.moe_layers),
            "moe_intermediate_size": moe.expert_dim,
            "n_routed_experts": moe.num_experts,
            "n_shared_experts": moe.shared_width // moe.expert_dim,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": r.renormalize,
            "routed_scaling_factor": r.scaling_factor,
            "n_group": r.num_groups if limited else 1,
            "topk_group": r.top_groups if limited else 1,
            "num_nextn_predict_layers": 0,
        }

    def fillers(self, config: ModelConfig) -> dict[str, Layout]:
        moe = experts(config)
        name = f"{self.layer_prefix}{{}}.{self.names['moe.router_bias']}"
        bias = {} if moe.balance.expert_bias else {name.format(i): Layout((moe.num_experts,), ()) for i in config.moe_layers}
        return bias | ({} if moe.shared_width else zero_width(config, self.layer_prefix, self.names))

    def ignored(self, name: str, config: ModelConfig) -> str | None:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= config.num_layers:
            return "a layer that predicts further tokens, which no logits depend on"
        return super().ignored(name, config)


class GraniteMoe(HuggingFaceFamily):
    """Granite-MoE: multipliers of embeddings, attention, residuals and logits; experts fused in one tensor per layer."""

    model_type, architecture, moe = "granitemoe", "GraniteMoeForCausalLM", True
    defaults = MappingProxyType(
        {
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        }
    )
    names = MappingProxyType(
        {
            **LLAMA_NAMES,
            "moe.router": "block_sparse_moe.router.layer.weight",
            "moe.experts.gate": "block_sparse_moe.input_linear.weight",
            "moe.experts.up": "block_sparse_moe.input_linear.weight",
            "moe.experts.down": "block_sparse_moe.output_linear.weight",
        }
    )
    leading = MappingProxyType({"block_sparse_moe.input_linear.weight": "E", "block_sparse_moe.output_linear.weight": "E"})
    routing = RouterConfig(order="topk_softmax")
    limits = (
        PRE_NORM,
        qk_norm("none"),
        *attention_bias("none", "all"),
        NO_WINDOW,
        WHOLE_ROPE,
        ALL_MOE,
        *ROUTED,
        NORMALIZED,
        NO_SHARED,
        *VLLM_LIMITS["granitemoe"],
    )

    def read_more(self, fields: Fields, settings: dict[str, Any]) -> None:
        whole_rope(fields, settings)
        E, K, F = (fields.size(k) for k in ("num_local_experts", "num_experts_per_tok", "intermediate_size"))
        aux = balance(fields, K, settings["num_layers"])
        head = settings["head_dim"] or settings["dim"] // settings["num_heads"]
        scale = fields.number("attention_multiplier")
        settings |= {
            "attention_bias": read_bias(fields),
            "attention_scale": None if scale == head**-0.5 else scale,
            "embed_scale": fields.number("embedding_multiplier"),
            "residual_scale": fields.number("residual_multiplier"),
            "logits_scale": fields.number("logits_scaling"),
        }
        router = {"order": self.routing.order}
        settings["moe"] = {"num_experts": E, "top_k": K, "expert_dim": F, "router": router, "balance": aux}

    def write_more(self, config: ModelConfig) -> dict[str, Any]:
        moe, scale = experts(config), config.attention_scale
        return {
            "intermediate_size": moe.expert_dim,
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "attention_bias": config.attention_bias == "all",
            "attention_multiplier": config.resolved_head_dim**-0.5 if scale is None else scale,
            "embedding_multiplier": config.embed_scale,
            "residual_multiplier": config.residual_scale,
            "logits_scaling": config.logits_scale,
        } | write_balance(config)
