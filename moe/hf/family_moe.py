"""Families with experts: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, FlexOlmo, GLM-4-MoE and Granite-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..config import ModelConfig, RouterConfig
from .family import LLAMA_NAMES, ROUTED_NAMES, HuggingFaceFamily, Layout
from .family_dense import POST_NORM_NAMES, qwen_layers, read_bias, read_window, whole_rope, write_qwen_window
from .fields import Fields
from .limits import (
    ALL_MOE,
    NO_SHARED,
    NO_WINDOW,
    NORMALIZED,
    POST_NORM,
    PRE_NORM,
    ROUTED,
    UNSCALED,
    UNSCALED_EMBEDDING,
    VLLM_LIMITS,
    WHOLE_ROPE,
    WIDTH_OF_HEADS,
    attention_bias,
    experts,
    normalized,
    qk_norm,
    rule,
)

NAMES: Mapping[str, str] = MappingProxyType({**LLAMA_NAMES, **ROUTED_NAMES})
OTHER_COUNT: Mapping[str, str] = MappingProxyType({"num_experts": "num_local_experts"})


def shared_names(module: str) -> dict[str, str]:
    """Part -> tensor of shared experts that are called `module`."""
    return {f"moe.shared.{p}": f"mlp.{module}.{p}_proj.weight" for p in ("gate", "up", "down")}


def balance(fields: Fields, top_k: int, moe_layers: int) -> dict[str, Any]:
    """Coefficient of the load-balancing loss. There it is the mean over layers of a loss that is top_k at balance, here the sum
    of losses that are 1."""
    return {"aux_loss_coeff": fields.number("router_aux_loss_coef") * top_k / max(moe_layers, 1)}


def write_balance(config: ModelConfig) -> dict[str, Any]:
    """`router_aux_loss_coef`, with the same loss in training as here."""
    moe = experts(config)
    return {
        "router_aux_loss_coef": moe.balance.aux_loss_coeff * len(config.moe_layers) / moe.top_k,
        "output_router_logits": False,
    }


def zero_width(config: ModelConfig, prefix: str, names: Mapping[str, str]) -> dict[str, Layout]:
    """Shared experts of no width, which some formats want where there are none."""
    D = config.dim
    shapes = {"moe.shared.gate": (0, D), "moe.shared.up": (0, D), "moe.shared.down": (D, 0), "moe.shared_gate": (1, D)}
    wanted = [(i, part) for i in config.moe_layers for part in shapes if part in names]
    return {f"{prefix}{i}.{names[part]}": Layout(shapes[part], ()) for i, part in wanted}


class Mixtral(HuggingFaceFamily):
    """Mixtral: softmax, top-k, weights always divided by their sum; every layer has experts."""

    model_type, architecture, moe = "mixtral", "MixtralForCausalLM", True
    defaults = MappingProxyType(
        {
            "num_key_value_heads": 8,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-5,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "router_aux_loss_coef": 0.001,
        }
    )
    names = MappingProxyType(
        {
            **LLAMA_NAMES,
            "moe.router": "block_sparse_moe.gate.weight",
            "moe.experts.gate": "block_sparse_moe.experts.{e}.w1.weight",
            "moe.experts.up": "block_sparse_moe.experts.{e}.w3.weight",
            "moe.experts.down": "block_sparse_moe.experts.{e}.w2.weight",
        }
    )
    in_memory = MappingProxyType({"mlp": "block_sparse_moe"})
    limits = (
        PRE_NORM,
        qk_norm("none"),
        *attention_bias("none"),
        WHOLE_ROPE,
        UNSCALED_EMBEDDING,
        *UNSCALED,
        ALL_MOE,
        *ROUTED,
        NORMALIZED,
        NO_SHARED,
        *VLLM_LIMITS["mixtral"],
    )

    def read_more(self, fields: Fields, settings: dict[str, Any]) -> None:
        whole_rope(fields, settings)
        settings["sliding_window"] = read_window(fields, None)
        E, K, F = (fields.size(k) for k in ("num_local_experts", "num_experts_per_tok", "intermediate_size"))
        aux = balance(fields, K, settings["num_layers"])
        settings["moe"] = {"num_experts": E, "top_k": K, "expert_dim": F, "balance": aux}

    def write_more(self, config: ModelConfig) -> dict[str, Any]:
        moe = experts(config)
        return {
            "intermediate_size": moe.expert_dim,
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "sliding_window": config.sliding_window,
            "router_jitter_noise": 0.0,
        } | write_balance(config)


class Qwen2Moe(HuggingFaceFamily):
    """Qwen2-MoE: fine-grained experts, and shared ones behind a sigmoid gate; some layers may be dense."""

    model_type, architecture, moe = "qwen2_moe", "Qwen2MoeForCausalLM", True
    defaults = MappingProxyType(
        {
            "num_key_value_heads": 16,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
            "num_experts": 60,
            "router_aux_loss_coef": 0.001,
            "qkv_bias": True,
        }
    )
    aliases = OTHER_COUNT
    names = MappingProxyType({**NAMES, **shared_names("shared_expert"), "moe.shared_gate": "mlp.shared_expert_gate.weight"})
    limits = (
        PRE_NORM,
        qk_norm("none"),
        *attention_bias("none", "qkv"),
        WHOLE_ROPE,
        UNSCALED_EMBEDDING,
        *UNSCALED,
        *ROUTED,
        rule(
            lambda c: experts(c).shared_width > 0 and not experts(c).shared_gate,
            lambda c: "moe.shared_gate is False, but the format has a sigmoid gate before its shared expert",
            remedy="open_shared_gate",
        ),
        *VLLM_LIMITS["qwen2_moe"],
    )

    def read_more(self, fields: Fields, settings: dict[str, Any]) -> None:
        layers = settings["num_layers"]
        settings["attention_bias"] = "qkv" if fields.flag("qkv_bias") else "none"
        usual = [i % 2 == 0 and i < fields.get("max_window_layers") for i in range(layers)]
        settings["sliding_window"] = read_window(fields, qwen_layers(fields, layers, usual))
        read_qwen_experts(fields, settings, fields.count("shared_expert_intermediate_size"))

    def write_more(self, config: ModelConfig) -> dict[str, Any]:
        more = {"qkv_bias": config.attention_bias == "qkv", "shared_expert_intermediate_size": experts(config).shared_width}
        return write_qwen_window(config) | write_qwen_experts(config) | more

    def fillers(self, config: ModelConfig) -> dict[str, Layout]:
        # the modules are built whatever their width, so their tensors would be reported as missing
        return {} if experts(config).shared_width else zero_width(config, self.layer_prefix, self.names)


def read_qwen_experts(fields: Fields, settings: dict[str, Any], shared_width: int = 0) -> None:
    """The experts of Qwen2- and Qwen3-MoE, and the dense layers among them."""
    whole_rope(fields, settings)
    layers, step = settings["num_layers"], fields.size("decoder_sparse_step")
    only_dense = fields.get("mlp_only_layers", [])
    sparse = [i for i in range(layers) if i not in only_dense and (i + 1) % step == 0]
    if not sparse:
        fields.refuse("mlp_only_layers", f"is {only_dense} with decoder_sparse_step = {step}, which leaves no layer with experts")
    E, K, F = (fields.size(k) for k in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"))
    prefix, every = (sparse or [0])[0], (sparse[1] - sparse[0] if len(sparse) > 1 else layers)
    if sparse != list(range(prefix, layers, every)):
        fields.refuse(
            "mlp_only_layers", f"leaves experts in layers {sparse}; only every n-th layer after dense ones can have them"
        )
    renormalize = fields.flag("norm_topk_prob")
    if len(sparse) < layers:
        settings["dense_ffn_dim"] = fields.size("intermediate_size")
    fields.known.add("intermediate_size")
    settings |= {"dense_prefix_layers": prefix, "moe_every": every if prefix or every > 1 else 1}
    settings["moe"] = {
        "num_experts": E,
        "top_k": K,
        "expert_dim": F,
        "num_shared_experts": shared_width // F if shared_width % F == 0 else 1,
        "shared_dim": shared_width if shared_width % F else None,
        "shared_gate": shared_width > 0,
        "router": {"renormalize": renormalize},
        "balance": balance(fields, K, len(sparse)),
    }


def write_qwen_experts(config: ModelConfig) -> dict[str, Any]:
    """The keys of Qwen2- and Qwen3-MoE for experts and dense layers."""
    moe = experts(config)
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_dim,
        "norm_topk_prob": normalized(moe),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(config.num_layers) if not config.is_moe_layer(i)],
        "intermediate_size": config.dense_ffn_dim or moe.expert_dim,
    } | write_balance(config)


class Qwen3Moe(HuggingFaceFamily):
    """Qwen3-MoE: fine-grained experts, a norm on each head's queries and keys; some layers may be dense."""

    model_type, architecture, moe = "qwen3_moe", "Qwen3MoeForCausalLM", True
    defaults = MappingProxyType(
        {
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
            "router_aux_loss_coef": 0.001,
        }
    )
    names = NAMES
    aliases = OTHER_COUNT
    limits = (
        PRE_NORM,
        qk_norm("head"),
        *attention_bias("none", "all", runtime="transformers"),
        WHOLE_ROPE,
        UNSCALED_EMBEDDING,
        *UNSCALED,
        *ROUTED,
        NO_SHARED,
        *VLLM_LIMITS["qwen3_moe"],
    )

    def read_more(self, fields: Fields, settings: dict[str, Any]) -> None:
        settings |= {"qk_norm": "head", "attention_bias": read_bias(fields)}
        slides = fields.flag("use_sliding_window")
        settings["sliding_window"] = read_window(fields, [slides] * settings["num_layers"])
        read_qwen_experts(fields, settings)

    def write_more(self, config: ModelConfig) -> dict[str, Any]:
        slides = config.sliding_window is not None
        window = {"use_sliding_window": slides, "sliding_window": config.sliding_window}
        return window | write_qwen_experts(config) | {"attention_bias": config.attention_bias != "none"}


class Olmoe(HuggingFaceFamily):
    """OLMoE: norms over all queries and keys of a token; every layer has experts."""

    model_type, architecture, moe = "olmoe", "OlmoeForCausalLM", True
    defaults = MappingProxyType({"rms_norm_eps": 1e-5, "num_experts_per_tok": 8, "num_experts": 64, "router_aux_loss_coef": 0.01})
    names = NAMES
    aliases = OTHER_COUNT
    routing = RouterConfig(renormalize=False)
    limits = (
        PRE_NORM,
        qk_norm("full"),
        *attention_bias("none", "all"),
        WIDTH_OF_HEADS,
        NO_WINDOW,
        WHOLE_ROPE,
        UNSCALED_EMBEDDING,
        *UNSCALED,
        ALL_MOE,
        *ROUTED,
        NO_SHARED,
        *VLLM_LIMITS["olmoe"],
    )

    def read_more(self, fields: Fields, settings: dict[str, Any]) -> None:
        whole_rope(fields, settings)
        fields.only("clip_qkv", None, "clipped queries, keys and values are not computed")
        settings |= {"qk_norm": "full", "attention_bias": read_bias(fields)}
        E, K, F = (fields.size(k) for k in ("num_experts", "num_experts_per_tok", "intermediate_size"))
        router = {"renormalize": fields.flag("norm_topk_prob")}
        aux = balance(fields, K, settings["num_layers"])
        settings["moe"] = {"num_experts": E, "top_k": K, "expert_dim": F, "router": router, "balance": aux}

    def write_more(self, config: ModelConfig) -> dict[str, Any]:
        moe = experts(config)
        return {
            "intermediate_size": moe.expert_dim,
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": normalized(moe),
            "attention_bias": config.attention_bias == "all",
            "clip_qkv": None,
        } | write_balance(config)


class FlexOlmo(Olmoe):
    """FlexOlmo (arXiv 2507.07024): OLMo 2 with experts in every layer."""

    model_type, architecture, moe = "flex_olmo", "FlexOlmoForCausalLM", True
    defaults = MappingProxyType({"rope_theta": 5e5, "num_experts_per_tok": 5, "num_experts": 7, "router_aux_loss_coef": 0.01})
    names = MappingProxyType({**NAMES, **POST_NORM_NAMES})
    aliases = OTHER_COUNT
    limits = (
        POST_NORM,
        qk_norm("full"),
        *attention_bias("none", "all"),
        NO_WINDOW,
        WHOLE_ROPE,
        UNSCALED_EMBEDDING,
        *UNSCALED,
        ALL_MOE,
        *ROUTED,
        NO_SHARED,
        *VLLM_LIMITS["flex_olmo"],
    )

    def read_more(self, fields: Fields, settings: dict[str, Any]) -> None:
        super().read_more(fields, settings)
        settings["norm_order"] = "post"
