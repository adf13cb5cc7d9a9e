"""GPT-2: learned positions, LayerNorm, no gate in its feed-forward network, biases everywhere, projections stored transposed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from ..config import ModelConfig
from .family import HuggingFaceFamily, Limit, Transform
from .fields import Fields
from .limits import (
    NO_WINDOW,
    PRE_NORM,
    UNSCALED,
    UNSCALED_EMBEDDING,
    WIDTH_OF_HEADS,
    only,
    plain_scale,
    qk_norm,
    rule,
)

PREFIX = "transformer."
_FUSED = MappingProxyType({"attn.c_attn.weight": "", "attn.c_attn.bias": ""})
_STORED: Mapping[str, str] = MappingProxyType(
    {
        **{f"attention.{p}": "attn.c_attn" for p in "qkv"},
        "attention.o": "attn.c_proj",
        "ffn.up": "mlp.c_fc",
        "ffn.down": "mlp.c_proj",
    }
)
"""Projection -> module below the layer. Its weight is stored [columns in, rows out]."""
_NAMES: Mapping[str, str] = MappingProxyType(
    {
        **{part: f"{module}.weight" for part, module in _STORED.items()},
        **{f"{part}_bias": f"{module}.bias" for part, module in _STORED.items()},
        **{f"{norm}": f"{module}.weight" for norm, module in (("attention_norm", "ln_1"), ("ffn_norm", "ln_2"))},
        **{f"{norm}_bias": f"{module}.bias" for norm, module in (("attention_norm", "ln_1"), ("ffn_norm", "ln_2"))},
        "head.weight": "lm_head.weight",
    }
)
_OUTSIDE: Mapping[str, str] = MappingProxyType(
    {"embed": "wte.weight", "positions": "wpe.weight", "head.norm": "ln_f.weight", "head.norm_bias": "ln_f.bias"}
)


class Gpt2(HuggingFaceFamily):
    """GPT-2 and what is built like it.

    prefix: of all names but the head's; files of the model without its head, such as the first releases, have none.
    """

    model_type, architecture = "gpt2", "GPT2LMHeadModel"
    leading = _FUSED
    defaults = MappingProxyType(
        {
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_positions": 1024,
            "vocab_size": 50257,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
        }
    )
    kinds: tuple[Limit, ...] = (
        only("norm", "layer", why="the format has LayerNorm"),
        only("positions", "learned", why="the format has a table of positions"),
        only("ffn_gate", False, why="the format has no gate in its feed-forward network"),
        only("ffn_bias", True, why="the format has biases in its feed-forward network"),
    )
    limits = (
        PRE_NORM,
        qk_norm("none"),
        only("attention_bias", "all", why="the format has all four of them", remedy="zero_output_bias"),
        rule(
            lambda c: c.resolved_kv_heads != c.num_heads,
            lambda c: f"num_kv_heads is {c.resolved_kv_heads}, but the format has as many as heads: {c.num_heads}",
        ),
        WIDTH_OF_HEADS,
        NO_WINDOW,
        UNSCALED_EMBEDDING,
        rule(
            lambda c: not plain_scale(c) and c.attention_scale != 1,
            lambda c: f"attention_scale is {c.attention_scale}, but the format has head_dim^-0.5 or 1",
            remedy="fold_attention_scale",
        ),
        *UNSCALED[1:],
    )

    def __init__(self, prefix: str = PREFIX):
        self.layer_prefix = f"{prefix}h."
        self.names = MappingProxyType({**_NAMES, **{part: f"{prefix}{name}" for part, name in _OUTSIDE.items()}})

    def named_as(self, tensors: Collection[str]) -> Gpt2:
        bare = _OUTSIDE["embed"] in tensors and f"{PREFIX}{_OUTSIDE['embed']}" not in tensors
        return Gpt2("") if bare else self

    def read_shared(self, fields: Fields) -> dict[str, Any]:
        D = fields.size("n_embd")
        scaled = fields.flag("scale_attn_weights")
        return {
            "dim": D,
            "num_layers": fields.size("n_layer"),
            "num_heads": fields.size("n_head"),
            "vocab_size": fields.size("vocab_size"),
            "max_seq_len": fields.size("n_positions"),
            "dense_ffn_dim": fields.size("n_inner", fallback=4 * D),
            "norm_eps": fields.number("layer_norm_epsilon"),
            "init_std": fields.number("initializer_range"),
            "tie_embeddings": fields.flag("tie_word_embeddings"),
            "activation": fields.activation("activation_function"),
            "attention_scale": None if scaled else 1.0,
            "attention_bias": "all",
            "norm": "layer",
            "positions": "learned",
            "ffn_gate": False,
            "ffn_bias": True,
        }

    def read_more(self, fields: Fields, settings: dict[str, Any]) -> None:
        why = "scores divided by the number of the layer are not computed"
        fields.only("scale_attn_by_inverse_layer_idx", False, why)
        fields.only("add_cross_attention", False, "attention to another sequence is not computed")
        # in which order scores are computed, how long the mask in the file is, dropout, and heads that are no language model's
        fields.known |= {"reorder_and_upcast_attn", "n_ctx", "attn_pdrop", "pruned_heads"}
        fields.known |= {key for key in fields.raw if key.startswith("summary_")}

    def write_shared(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "n_embd": config.dim,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_positions": config.max_seq_len,
            "n_ctx": config.max_seq_len,
            "n_inner": config.dense_ffn_dim,
            "vocab_size": config.vocab_size,
            "activation_function": "silu" if config.activation == "silu" else "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "initializer_range": config.init_std,
            "tie_word_embeddings": config.tie_embeddings,
            "scale_attn_weights": plain_scale(config),
        }

    def write_more(self, config: ModelConfig) -> dict[str, Any]:
        dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        off = dict.fromkeys(("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"), False)
        return dropout | off | {"use_cache": True, "bos_token_id": None, "eos_token_id": None}

    def transform(self, part: str) -> Transform | None:
        inside = part.split(".", 2)[-1] if part.startswith("layers.") else part
        return "transposed" if inside in _STORED else None

    def ignored(self, name: str, config: ModelConfig) -> str | None:
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            return "a mask of later positions, or the number put in their place, which follow from config.json"
        return super().ignored(name, config)
