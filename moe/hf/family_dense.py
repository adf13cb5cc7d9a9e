"""Dense families: Llama, Mistral, Qwen2, Qwen3, OLMo2 and the first Gemma."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..config import ModelConfig
from .family import LLAMA_NAMES, HuggingFaceFamily, Transform
from .fields import Fields
from .limits import NO_WINDOW, POST_NORM, PRE_NORM, UNSCALED, UNSCALED_EMBEDDING, WHOLE_ROPE, attention_bias, qk_norm, rule

POST_NORM_NAMES: Mapping[str, str] = MappingProxyType(
    {"attention_norm": "post_attention_layernorm.weight", "ffn_norm": "post_feedforward_layernorm.weight"}
)


def read_bias(fields: Fields) -> str:
    """`attention_bias`: of all four projections, or of none."""
    return "all" if fields.flag("attention_bias") else "none"


def read_dense(fields: Fields, settings: dict[str, Any]) -> None:
    """What dense models have and no model with experts: the width of every layer."""
    settings["dense_ffn_dim"] = fields.size("intermediate_size")
    whole_rope(fields, settings)


def whole_rope(fields: Fields, settings: dict[str, Any]) -> None:
    """Refuse a part of the head that is not turned, which most formats do not know."""
    if settings["rope_fraction"] != 1:
        what = f"is {settings['rope_fraction']}, but {fields.model_type} turns whole heads"
        fields.refuse("partial_rotary_factor", what)


def read_window(fields: Fields, sliding: list[bool] | None) -> int | None:
    """`sliding_window` where every layer slides (`sliding` by layer, or None = all that have a window do)."""
    fields.known |= {"use_sliding_window", "max_window_layers", "layer_types"}
    window = fields.get("sliding_window")
    if not window or (sliding is not None and not any(sliding)):
        return None
    if sliding is not None and not all(sliding):
        full = [i for i, slides in enumerate(sliding) if not slides]
        what = f"is {window} in some layers, but layers {full} see everything; only one window for all or none can be represented"
        fields.refuse("sliding_window", what)
        return None
    return fields.size("sliding_window")


def qwen_layers(fields: Fields, layers: int, usual: list[bool]) -> list[bool]:
    """Which layers of a Qwen model slide: by `layer_types`, else as the format means it (`usual`)."""
    types = fields.get("layer_types")
    if not fields.flag("use_sliding_window"):
        return [False] * layers
    return usual if types is None else [kind == "sliding_attention" for kind in types]


def write_qwen_window(config: ModelConfig) -> dict[str, Any]:
    """The keys by which a Qwen model slides in all layers or in none."""
    slides = config.sliding_window is not None
    return {
        "use_sliding_window": slides,
        "sliding_window": config.sliding_window,
        "max_window_layers": 0 if slides else config.num_layers,
        "layer_types": ["sliding_attention" if slides else "full_attention"] * config.num_layers,
    }


class Llama(HuggingFaceFamily):
    """Llama 1 to 3.x and what is built like it. Biases in its feed-forward network cannot be represented."""

    model_type, architecture = "llama", "LlamaForCausalLM"
    limits = (
        PRE_NORM,
        qk_norm("none"),
        *attention_bias("none", "all"),
        NO_WINDOW,
        WHOLE_ROPE,
        UNSCALED_EMBEDDING,
        *UNSCALED,
        rule(
            lambda c: bool(c.dim % c.num_heads),
            lambda c: f"num_heads is {c.num_heads}, which does not divide dim = {c.dim}: transformers refuses that for llama",
        ),
    )

    def read_more(self, fields: Fields, settings: dict[str, Any]) -> None:
        read_dense(fields, settings)
        settings["attention_bias"] = read_bias(fields)
        fields.only("mlp_bias", False, "biases of the feed-forward network cannot be represented")
        fields.only("rope_interleaved", False, "the rows of queries and keys would have to be permuted")

    def write_more(self, config: ModelConfig) -> dict[str, Any]:
        return {"intermediate_size": config.dense_ffn_dim, "attention_bias": config.attention_bias == "all", "mlp_bias": False}


class Mistral(HuggingFaceFamily):
    """Mistral 7B and its like, with or without a sliding window in every layer."""

    model_type, architecture = "mistral", "MistralForCausalLM"
    defaults = MappingProxyType({"num_key_value_heads": 8, "sliding_window": 4096})
    limits = (PRE_NORM, qk_norm("none"), *attention_bias("none"), WHOLE_ROPE, UNSCALED_EMBEDDING, *UNSCALED)

    def read_more(self, fields: Fields, settings: dict[str, Any]) -> None:
        read_dense(fields, settings)
        settings["sliding_window"] = read_window(fields, None)
        if fields.raw.get("layer_types"):
            fields.refuse("layer_types", "is set, but transformers does not look at it for mistral; delete it")

    def write_more(self, config: ModelConfig) -> dict[str, Any]:
        return {"intermediate_size": config.dense_ffn_dim, "sliding_window": config.sliding_window}


class Qwen2(HuggingFaceFamily):
    """Qwen2 and Qwen2.5: biases of queries, keys and values."""

    model_type, architecture = "qwen2", "Qwen2ForCausalLM"
    defaults = MappingProxyType({"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28})
    limits = (PRE_NORM, qk_norm("none"), *attention_bias("qkv"), WHOLE_ROPE, UNSCALED_EMBEDDING, *UNSCALED)

    def read_more(self, fields: Fields, settings: dict[str, Any]) -> None:
        read_dense(fields, settings)
        settings["attention_bias"] = "qkv"
        layers = settings["num_layers"]
        usual = [i >= fields.get("max_window_layers") for i in range(layers)]
        settings["sliding_window"] = read_window(fields, qwen_layers(fields, layers, usual))

    def write_more(self, config: ModelConfig) -> dict[str, Any]:
        return {"intermediate_size": config.dense_ffn_dim} | write_qwen_window(config)


class Qwen3(Qwen2):
    """Qwen3: a norm on each head's queries and keys."""

    model_type, architecture = "qwen3", "Qwen3ForCausalLM"
    defaults = MappingProxyType({**Qwen2.defaults, "head_dim": 128})
    limits = (PRE_NORM, qk_norm("head"), *attention_bias("none", "all"), WHOLE_ROPE, UNSCALED_EMBEDDING, *UNSCALED)

    def read_more(self, fields: Fields, settings: dict[str, Any]) -> None:
        super().read_more(fields, settings)
        settings |= {"attention_bias": read_bias(fields), "qk_norm": "head"}

    def write_more(self, config: ModelConfig) -> dict[str, Any]:
        return super().write_more(config) | {"attention_bias": config.attention_bias == "all"}


class Olmo2(HuggingFaceFamily):
    """OLMo 2: norms after attention and feed-forward, and over all queries and keys of a token."""

    model_type, architecture = "olmo2", "Olmo2ForCausalLM"
    names = MappingProxyType({**LLAMA_NAMES, **POST_NORM_NAMES})
    defaults = MappingProxyType({"rms_norm_eps": 1e-5})
    limits = (
        POST_NORM,
        qk_norm("full"),
        *attention_bias("none", "all"),
        NO_WINDOW,
        WHOLE_ROPE,
        UNSCALED_EMBEDDING,
        *UNSCALED,
    )

    def read_more(self, fields: Fields, settings: dict[str, Any]) -> None:
        read_dense(fields, settings)
        settings |= {"attention_bias": read_bias(fields), "qk_norm": "full", "norm_order": "post"}

    def write_more(self, config: ModelConfig) -> dict[str, Any]:
        return {"intermediate_size": config.dense_ffn_dim, "attention_bias": config.attention_bias == "all"}


class Gemma(HuggingFaceFamily):
    """The first Gemma: embeddings times sqrt(dim), GELU, norm weights stored as what is added to 1."""

    model_type, architecture = "gemma", "GemmaForCausalLM"
    defaults = MappingProxyType(
        {"num_key_value_heads": 16, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
    )
    limits = (
        PRE_NORM,
        qk_norm("none"),
        *attention_bias("none", "all"),
        NO_WINDOW,
        WHOLE_ROPE,
        *UNSCALED,
        rule(
            lambda c: not math.isclose(c.embed_scale, c.dim**0.5, rel_tol=1e-9),
            lambda c: f"embed_scale is {c.embed_scale}, but the format always takes sqrt(dim) = {c.dim**0.5}",
        ),
    )

    def read_more(self, fields: Fields, settings: dict[str, Any]) -> None:
        read_dense(fields, settings)
        later = fields.activation("hidden_activation") if fields.raw.get("hidden_activation") else None
        if fields.get("hidden_act") == "gelu":
            # the first releases say gelu and mean its tanh formula, as transformers reads it
            fields.problems = [p for p in fields.problems if p.where != "hidden_act"]
            settings["activation"] = "gelu_tanh"
        if later not in (None, settings["activation"]):
            what = f"is {fields.get('hidden_activation')!r}, but hidden_act is {fields.get('hidden_act')!r}; keep the one meant"
            fields.refuse("hidden_activation", what)
        fields.only("use_bidirectional_attention", False, "only causal attention is computed")
        settings |= {"attention_bias": read_bias(fields), "embed_scale": settings["dim"] ** 0.5}

    def write_more(self, config: ModelConfig) -> dict[str, Any]:
        return {"intermediate_size": config.dense_ffn_dim, "attention_bias": config.attention_bias == "all"}

    def transform(self, part: str) -> Transform | None:
        return "one_plus" if part.endswith("norm") else None
