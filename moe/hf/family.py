"""What a family of checkpoints is: a `model_type`, how its config.json is a `ModelConfig`, and how parts make its tensors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from ..config import BalanceConfig, ModelConfig, MoEConfig, RouterConfig
from ..errors import ConfigError, Problem
from .fields import Fields, gate_name, rope_fields
from .parts import Shape, part_shapes

Runtime = Literal["transformers", "vllm"]
"""The program that a checkpoint is written for. Files are the same in kind; what the program makes of them is not."""
Transform = Literal["one_plus", "transposed"]
"""What lies between a part and its values in a file: see `Layout`."""


class NotHeldError(ConfigError):
    """A model that a format cannot hold, or that the program it is written for would not compute as it is."""

    title = "cannot be written"

    def __init__(self, model_type: str, reasons: tuple[str, ...]):
        self.model_type, self.reasons = model_type, reasons
        super().__init__([Problem(model_type, reason) for reason in reasons])


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One thing that a format cannot hold, or that a program running it does otherwise than its config.json says.

    broken: the reason, for a model that goes beyond the limit; else None.
    remedy: name of the exact rewrite after which the model is within the limit (see `rewrites`); None = there is none.
    runtime, version: the program whose limit it is, and its version that was read; None = of the format itself.
    """

    broken: Callable[[ModelConfig], str | None]
    remedy: str | None = None
    runtime: Runtime | None = None
    version: str = ""


def _attention_experts(config: ModelConfig) -> str | None:
    count = config.attention_experts
    return None if count == 1 else f"attention_experts is {count}, but attention experts are native only; legal: 1"


NO_ATTENTION_EXPERTS = Limit(broken=_attention_experts)
"""Of every format but our own: none of them has several attention blocks in a layer."""


def _only(name: str, legal: object, why: str) -> Limit:
    def broken(config: ModelConfig) -> str | None:
        value = getattr(config, name)
        return None if value == legal else f"{name} is {value!r}, but the format has {why}; legal: {legal!r}"

    return Limit(broken=broken)


LLAMA_KINDS = (
    _only("norm", "rms", "RMSNorm, not LayerNorm"),
    _only("positions", "rotary", "rotary positions, not learned positions"),
    _only("ffn_gate", True, "a gate in every feed-forward network"),
    _only("ffn_bias", False, "no biases in feed-forward networks"),
)
"""Limits of every format that is built like Llama: what no weights can make up for."""


@dataclass(frozen=True)
class Layout:
    """How one tensor of a file is made: rows of the parts one after another, in `shape`.

    parts: names, empty for a tensor that holds no information and is filled with zeros.
    transform: "one_plus" where the file has w and the part is 1 + w (Gemma's norms); "transposed" where the file has the matrix
    of the parts with rows and columns exchanged, in `shape` (GPT-2's projections).
    """

    shape: Shape
    parts: tuple[str, ...]
    transform: Transform | None = None


LLAMA_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "embed": "model.embed_tokens.weight",
        "head.norm": "model.norm.weight",
        "head.weight": "lm_head.weight",
        "attention_norm": "input_layernorm.weight",
        **{f"attention.{p}": f"self_attn.{p}_proj.weight" for p in "qkvo"},
        **{f"attention.{p}_bias": f"self_attn.{p}_proj.bias" for p in "qkvo"},
        **{f"attention.{p}_norm": f"self_attn.{p}_norm.weight" for p in "qk"},
        "ffn_norm": "post_attention_layernorm.weight",
        **{f"ffn.{p}": f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
    }
)
"""Part -> tensor, as in Llama. Names of layers are below `model.layers.{i}`."""

ROUTED_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "moe.router": "mlp.gate.weight",
        **{f"moe.experts.{p}": f"mlp.experts.{{e}}.{p}_proj.weight" for p in ("gate", "up", "down")},
    }
)
"""Part -> tensor of router and experts in most formats."""


class Family(ABC):
    """One `model_type`. Subclasses say what is special; `read`, `write` and `tensors` are what others call."""

    model_type: str
    architecture: str
    """Class of transformers."""
    moe: bool = False
    names: Mapping[str, str] = LLAMA_NAMES
    leading: Mapping[str, str] = MappingProxyType({})
    """Fused tensors: name below the layer -> first axes, "E" experts and "2" gate and up (length 1 where there is no gate); the
    rows of the parts, or the parts themselves if they are vectors, follow. "-" is a matrix of one row that the file has as a
    vector."""
    layer_prefix: str = "model.layers."
    in_memory: Mapping[str, str] = MappingProxyType({})
    """Names below the layer that transformers 5 has in memory alone, and so some programs save them -> those in files."""
    defaults: Mapping[str, Any] = MappingProxyType({})
    """What the format means by a key that is not in config.json, where this is not the same for all."""
    aliases: Mapping[str, str] = MappingProxyType({})
    """Keys of config.json -> other names under which programs write them."""
    kinds: tuple[Limit, ...] = LLAMA_KINDS
    """Limits of what the model is made of: those that formats share."""
    limits: tuple[Limit, ...] = ()
    routing: RouterConfig = RouterConfig()
    """Routing that a new model of this family is given."""
    expert_bias: bool = False
    """Whether a new model of this family has a selection bias."""

    @abstractmethod
    def read(self, config_json: Mapping[str, Any]) -> ModelConfig:
        """The model that a config.json describes. Raises ConfigError with every reason why it cannot be represented."""

    @abstractmethod
    def write(self, config: ModelConfig, runtime: Runtime = "transformers") -> dict[str, Any]:
        """config.json of a model. Raises NotHeldError with every reason why this format, or `runtime`, cannot hold it."""

    def named_as(self, tensors: Collection[str]) -> Family:
        """This family with the names of tensors as in files that hold `tensors`, where programs write them differently."""
        return self

    def broken(self, config: ModelConfig, runtime: Runtime = "transformers") -> list[tuple[Limit, str]]:
        """Limits that a model goes beyond, each with the reason in words."""
        if (config.moe is not None and bool(config.moe_layers)) != self.moe:
            what = "has no layer with experts" if self.moe else "has layers with experts, and this format has none"
            return [(Limit(broken=lambda _: what), f"the model {what}")]
        asked = [limit for limit in (NO_ATTENTION_EXPERTS, *self.kinds, *self.limits) if limit.runtime in (None, runtime)]
        found = [(limit, limit.broken(config)) for limit in asked]
        return [(limit, reason + _who(limit)) for limit, reason in found if reason is not None]

    def tensors(self, config: ModelConfig) -> dict[str, Layout]:
        """Name and layout of every tensor in the files of a model, in the order of its parts."""
        shapes, grouped = part_shapes(config), dict[str, list[str]]()
        for part in shapes:
            grouped.setdefault(self.tensor_name(part), []).append(part)
        layouts = {name: self._layout(name, parts, shapes, config) for name, parts in grouped.items()}
        return layouts | self.fillers(config)

    def fillers(self, config: ModelConfig) -> dict[str, Layout]:
        """Tensors that the format wants though they hold no information."""
        return {}

    def ignored(self, name: str, config: ModelConfig) -> str | None:
        """Why a tensor of a source that is in no layout may be left out; None = it may not."""
        if name.endswith("rotary_emb.inv_freq"):
            return "frequencies of the rotary embedding, which follow from config.json"
        return None

    def tensor_name(self, part: str) -> str:
        """The tensor that holds a part."""
        prefix, inside, expert = split_part(part)
        name = self.names[inside].format(e=expert)
        return f"{self.layer_prefix}{prefix}.{name}" if prefix else name

    def transform(self, part: str) -> Transform | None:
        """What lies between a part and its values in the file."""
        return None

    def _layout(self, name: str, parts: list[str], shapes: Mapping[str, Shape], config: ModelConfig) -> Layout:
        leaf, transform = name.removeprefix(self.layer_prefix).split(".", 1)[-1], self.transform(parts[0])
        if leaf not in self.leading:
            (part,) = parts
            return Layout(shapes[part][::-1] if transform == "transposed" else shapes[part], (part,), transform)
        if self.leading[leaf] == "-":
            return Layout((math.prod(shapes[parts[0]]),), tuple(parts))
        experts = config.moe.num_experts if config.moe else 0
        leading = tuple({"E": experts, "2": 2 if config.ffn_gate else 1}[axis] for axis in self.leading[leaf])
        rows = sum(shapes[p][0] for p in parts)
        shape = (*leading, rows // math.prod(leading), *shapes[parts[0]][1:])
        return Layout(shape[::-1] if transform == "transposed" else shape, tuple(parts), transform)


class HuggingFaceFamily(Family):
    """A `model_type` of transformers: settings that all of them share, and what its subclass adds to them."""

    def read_shared(self, fields: Fields) -> dict[str, Any]:
        """Keywords of `ModelConfig` that families give alike."""
        return shared_settings(fields)

    def write_shared(self, config: ModelConfig) -> dict[str, Any]:
        """Keys of config.json that families take alike."""
        return shared_fields(config)

    @abstractmethod
    def read_more(self, fields: Fields, settings: dict[str, Any]) -> None:
        """Add to `settings`, which hold what all families share, what this one's config.json says besides. `moe` is a table of
        keywords, because records check themselves and all problems are to be told at once."""

    @abstractmethod
    def write_more(self, config: ModelConfig) -> dict[str, Any]:
        """Keys of config.json beyond those that all families share."""

    def read(self, config_json: Mapping[str, Any]) -> ModelConfig:
        """The model that a config.json describes, as transformers understands it.

        Raises ConfigError with every reason why it cannot be represented: a setting we cannot compute, one of a wrong type, and
        keys that are not known, which might change what the model computes.
        """
        fields = Fields(config_json, self.model_type, self.defaults, self.aliases)
        settings = self.read_shared(fields)
        self.read_more(fields, settings)
        fields.check()
        moe = settings.pop("moe", None)
        if moe is not None:
            kinds = {"router": RouterConfig, "balance": BalanceConfig}
            moe = MoEConfig(**{name: kinds[name](**value) if name in kinds else value for name, value in moe.items()})
        return ModelConfig(**settings, moe=moe)

    def write(self, config: ModelConfig, runtime: Runtime = "transformers") -> dict[str, Any]:
        """config.json of a model, with every key that decides what it computes.

        What no model knows (special tokens, type of the weights) is null or left out: see `families.carried`.
        Raises NotHeldError with every reason why this format, or `runtime`, cannot hold the model.
        """
        reasons = tuple(reason for _, reason in self.broken(config, runtime))
        if reasons:
            raise NotHeldError(self.model_type, reasons)
        named = {"architectures": [self.architecture], "model_type": self.model_type}
        return named | self.write_shared(config) | self.write_more(config)


def _who(limit: Limit) -> str:
    return f" ({limit.runtime} {limit.version})" if limit.runtime and limit.version else ""


def split_part(part: str) -> tuple[str, str, str]:
    """Layer, name inside it and expert, "" where there is none: `layers.3.moe.experts.5.up` -> ("3", "moe.experts.up", "5"), and
    so for attention experts."""
    if not part.startswith("layers."):
        return "", part, ""
    _, layer, inside = part.split(".", 2)
    kind, found, which = inside.partition(".experts.")
    if not found:
        return layer, inside, ""
    expert, leaf = which.split(".")
    return layer, f"{kind}.experts.{leaf}", expert


def shared_settings(fields: Fields) -> dict[str, Any]:
    """Keywords of `ModelConfig` that every family's config.json gives alike."""
    D, H = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv = fields.size("num_key_value_heads", fallback=H)
    head = fields.size("head_dim", fallback=D // H)
    positions = fields.size("max_position_embeddings")
    settings: dict[str, Any] = {
        "dim": D,
        "num_layers": fields.size("num_hidden_layers"),
        "num_heads": H,
        "num_kv_heads": None if kv == H else kv,
        "head_dim": None if head * H == D else head,
        "vocab_size": fields.size("vocab_size"),
        "max_seq_len": positions,
        "norm_eps": fields.number("rms_norm_eps"),
        "tie_embeddings": fields.flag("tie_word_embeddings"),
        "init_std": fields.number("initializer_range"),
        "activation": fields.activation("hidden_act"),
    }
    return settings | rope_fields(fields, positions)


def shared_fields(config: ModelConfig) -> dict[str, Any]:
    """Keys of config.json that every family takes.

    Rotary settings are written twice, alike: `rope_parameters` for transformers from version 5 on, and the keys before that.
    Special tokens are null, because what a format means by their absence may lie outside this vocabulary.
    """
    scaling: dict[str, Any] | None = None
    if config.rope_scaling is not None:
        r = config.rope_scaling
        scaling = {"rope_type": r.kind, "factor": r.factor}
        if r.kind == "llama3":
            scaling |= {"low_freq_factor": r.low_freq_factor, "high_freq_factor": r.high_freq_factor}
            scaling["original_max_position_embeddings"] = r.original_max_seq_len
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.resolved_kv_heads,
        "head_dim": config.resolved_head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "hidden_act": gate_name(config.activation),
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
