"""Reading the keys of a config.json: each is asked for by name, and those that nobody asked for are an error."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..config import Activation, RopeScaling
from ..errors import ConfigError, Problem

ORIGIN = "config.json"

NEUTRAL = frozenset(
    (
        # the file and the program
        *("architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path"),
        *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "torchscript", "attn_implementation"),
        *("_attn_implementation", "_attn_implementation_autoset", "experts_implementation", "chunk_size_feed_forward"),
        *("transformers.js_config", "use_bfloat16", "pretraining_tp", "unsloth_fixed", "unsloth_version"),
        *("is_encoder_decoder", "is_decoder", "problem_type", "id2label", "label2id", "task_specific_params", "finetuning_task"),
        # tokens and the generation of text
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "cls_token_id", "tokenizer_class"),
        *("decoder_start_token_id", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "max_length"),
        *("min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "length_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences"),
        # training
        *("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "embd_pdrop"),
        *("output_router_logits", "router_jitter_noise"),
    )
)
"""Keys that change nothing of what a model computes."""

SHARED_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False}
)

GATES: Mapping[str, Activation] = MappingProxyType(
    {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
)


def gate_name(activation: Activation) -> str:
    """The name of an activation in config.json."""
    return {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[activation]


class Fields:
    """The keys of one config.json. Asking for one marks it as known; problems are collected until `check`."""

    def __init__(
        self,
        raw: Mapping[str, Any],
        model_type: str,
        defaults: Mapping[str, Any] = MappingProxyType({}),
        aliases: Mapping[str, str] = MappingProxyType({}),
    ):
        self.raw, self.model_type, self.aliases = raw, model_type, aliases
        self.defaults = {**SHARED_DEFAULTS, **defaults}
        self.known = {"model_type"}
        self.problems: list[Problem] = []

    def get(self, key: str, fallback: Any = None) -> Any:
        """Value of a key; the format's default, or `fallback`, where it is absent or null."""
        self.known.add(key)
        other = self.aliases.get(key)
        if other is not None and other in self.raw:
            self.known.add(other)
            if key in self.raw and self.raw[key] != self.raw[other]:
                self.refuse(key, f"is {self.raw[key]!r}, but {other}, another name for it, is {self.raw[other]!r}")
            return self.raw[other]
        value = self.raw.get(key, self.defaults.get(key))
        return fallback if value is None else value

    def refuse(self, key: str, what: str) -> None:
        """Note a reason why the model cannot be represented."""
        self.known.add(key)
        self.problems.append(Problem(key, what, ORIGIN))

    def size(self, key: str, fallback: int | None = None) -> int:
        """A positive whole number; missing without a fallback is a problem. 1 after a problem, so that reading goes on."""
        value = self.get(key, fallback)
        if value is None:
            self.refuse(key, "is missing")
        elif not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            self.refuse(key, f"is {value!r}, but must be a whole number over 0")
        else:
            return value
        return 1

    def count(self, key: str) -> int:
        """A whole number, 0 included; null is 0."""
        value = self.get(key, 0)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        self.refuse(key, f"is {value!r}, but must be a whole number, 0 or more")
        return 0

    def number(self, key: str, fallback: float | None = None) -> float:
        """A number, as a float."""
        value = self.get(key, fallback)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        self.refuse(key, "is missing" if value is None else f"is {value!r}, but must be a number")
        return 1.0

    def flag(self, key: str) -> bool:
        """true or false; absent is false unless the format's default says otherwise."""
        value = self.get(key, False)
        if not isinstance(value, bool):
            self.refuse(key, f"is {value!r}, but must be true or false")
        return bool(value)

    def activation(self, key: str) -> Activation:
        """The function of the gate."""
        name = self.get(key)
        if name not in GATES:
            self.refuse(key, f"is {name!r}, but only SiLU and GELU by its tanh formula are computed: {', '.join(GATES)}")
        return GATES.get(name, "silu")

    def only(self, key: str, neutral: Any, why: str) -> None:
        """A key that must have the value with which it changes nothing."""
        value = self.get(key, neutral)
        if value != neutral:
            self.refuse(key, f"is {value!r}, but {why}; only {neutral!r} is read")

    def check(self) -> None:
        """Raise ConfigError with all problems, unknown keys among them."""
        for key, value in self.raw.items():
            if key not in self.known and key not in NEUTRAL and value not in (None, False, 0, "", [], {}):
                what = f"is {value!r}, and what it does in a {self.model_type} model is not known"
                self.refuse(key, f"{what}; if it changes nothing of what the model computes, delete it from config.json")
        if self.problems:
            raise ConfigError(self.problems)


def rope_fields(fields: Fields, positions: int) -> dict[str, Any]:
    """Keywords of `ModelConfig` for rotary embedding, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    theta = fields.number("rope_theta", fallback=10_000.0)
    fraction = fields.number("partial_rotary_factor", fallback=1.0)
    old, new = fields.get("rope_scaling"), fields.get("rope_parameters")
    # transformers looks at the older key first
    key, table = ("rope_scaling", old) if old else ("rope_parameters", new or {})
    if not isinstance(table, dict) or any(isinstance(v, dict) for v in table.values()):
        fields.refuse(key, f"is {table!r}: rotary embeddings that differ between layers cannot be represented")
        table = {}
    rest = dict(table)
    kind = rest.pop("rope_type", None) or rest.pop("type", None) or "default"
    rest.pop("type", None)
    for name in [name for name, value in rest.items() if isinstance(value, str)]:
        fields.refuse(key, f"has {name} = {rest.pop(name)!r}, but must have a number")
    theta, fraction = rest.pop("rope_theta", None) or theta, rest.pop("partial_rotary_factor", None) or fraction
    settings: dict[str, Any] = {"rope_theta": float(theta), "rope_fraction": float(fraction), "rope_scaling": None}
    if kind == "default":
        rest.clear()  # transformers reads nothing else for this kind
    elif kind == "linear":
        settings["rope_scaling"] = RopeScaling(kind="linear", factor=float(rest.pop("factor", 1.0)))
        rest.pop("original_max_position_embeddings", None)  # of no meaning for this kind
    elif kind == "llama3":
        settings["rope_scaling"] = _llama3(fields, key, rest, positions)
    else:
        fields.refuse(key, f"has rope_type {kind!r}, but only default, linear and llama3 are computed")
        rest.clear()
    for name, value in rest.items():
        fields.refuse(key, f"has {name} = {value!r}, which is not known for rope_type {kind!r}")
    return settings


def _llama3(fields: Fields, key: str, rest: dict[str, Any], positions: int) -> RopeScaling | None:
    values = {name: rest.pop(name, None) for name in ("factor", "low_freq_factor", "high_freq_factor")}
    original = rest.pop("original_max_position_embeddings", None) or positions
    missing = [name for name, value in values.items() if value is None]
    if missing:
        fields.refuse(key, f"has rope_type 'llama3', but lacks {', '.join(missing)}")
        return None
    return RopeScaling(kind="llama3", original_max_seq_len=int(original), **{k: float(v) for k, v in values.items()})
