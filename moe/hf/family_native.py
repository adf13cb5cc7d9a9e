"""Our own format as one more family: config.json holds the section `model`, tensors have the names of the model's state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType, NoneType
from typing import Any, cast, get_args, get_type_hints

from ..config import ModelConfig
from ..errors import ConfigError, Problem
from .family import Family, Limit, NotHeldError, Runtime
from .fields import ORIGIN

NATIVE = "moefold"
"""`model_type` of our own format."""

_ATTENTION: Mapping[str, str] = MappingProxyType(
    {
        "q": "wq_QD",
        "k": "wk_CD",
        "v": "wv_CD",
        "o": "wo_DQ",
        "q_bias": "bq_Q",
        "k_bias": "bk_C",
        "v_bias": "bv_C",
        "o_bias": "bo_D",
        "q_norm": "q_norm.weight_D",
        "k_norm": "k_norm.weight_D",
    }
)
NATIVE_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "embed": "embed.weight_VD",
        "positions": "embed.positions_SD",
        "head.norm": "head.norm.weight_D",
        **{f"{norm}_bias": f"{norm}.bias_D" for norm in ("attention_norm", "ffn_norm", "head.norm")},
        "head.weight": "head.weight_VD",
        "attention_norm": "attention_norm.weight_D",
        **{f"attention.{part}": f"attention.{name}" for part, name in _ATTENTION.items()},
        **{f"attention.experts.{part}": f"attention.members.{{e}}.{name}" for part, name in _ATTENTION.items()},
        "attention.router": "attention.router.weight_ND",
        "ffn_norm": "ffn_norm.weight_D",
        "ffn.gate": "ffn.w13_2FD",
        "ffn.up": "ffn.w13_2FD",
        "ffn.down": "ffn.w2_DF",
        "ffn.gate_bias": "ffn.b13_2F",
        "ffn.up_bias": "ffn.b13_2F",
        "ffn.down_bias": "ffn.b2_D",
        "moe.router": "moe.router.weight_ED",
        "moe.router_bias": "moe.router.expert_bias_E",
        "moe.experts.gate": "moe.experts.w13_E2FD",
        "moe.experts.up": "moe.experts.w13_E2FD",
        "moe.experts.down": "moe.experts.w2_EDF",
        "moe.experts.gate_bias": "moe.experts.b13_E2F",
        "moe.experts.up_bias": "moe.experts.b13_E2F",
        "moe.experts.down_bias": "moe.b2_ED",
        "moe.shared.gate": "moe.shared_expert.w13_2FD",
        "moe.shared.up": "moe.shared_expert.w13_2FD",
        "moe.shared.down": "moe.shared_expert.w2_DF",
        "moe.shared.gate_bias": "moe.shared_expert.b13_2F",
        "moe.shared.up_bias": "moe.shared_expert.b13_2F",
        "moe.shared.down_bias": "moe.shared_expert.b2_D",
        "moe.shared_gate": "moe.shared_expert.gate_D",
    }
)


class Native(Family):
    """Everything that `ModelConfig` can say, dense or with experts."""

    model_type, architecture = NATIVE, "moefold.Model"
    names = NATIVE_NAMES
    layer_prefix = "layers."
    leading = MappingProxyType(
        {
            "ffn.w13_2FD": "2",
            "ffn.b13_2F": "2",
            "moe.experts.w13_E2FD": "E2",
            "moe.experts.b13_E2F": "E2",
            "moe.experts.w2_EDF": "E",
            "moe.b2_ED": "E",
            "moe.shared_expert.w13_2FD": "2",
            "moe.shared_expert.b13_2F": "2",
            "moe.shared_expert.gate_D": "-",
        }
    )

    def read(self, config_json: Mapping[str, Any]) -> ModelConfig:
        """The model of a config.json of our own. Raises ConfigError for keys that are not known and for values that cannot be."""
        table = config_json.get("model")
        if not isinstance(table, dict):
            raise ConfigError([Problem("model", "is missing: a config.json of moefold holds the section model", ORIGIN)])
        return from_table(ModelConfig, table, "model")

    def write(self, config: ModelConfig, runtime: Runtime = "transformers") -> dict[str, Any]:
        """config.json of our own. Raises NotHeldError for trained numbers of compression, which are no part, and for vLLM."""
        reasons = tuple(reason for _, reason in self.broken(config, runtime))
        if reasons:
            raise NotHeldError(self.model_type, reasons)
        return {"model_type": self.model_type, "architectures": [self.architecture], "model": dataclasses.asdict(config)}

    def broken(self, config: ModelConfig, runtime: Runtime = "transformers") -> list[tuple[Limit, str]]:
        reasons = []
        if config.moe is not None and config.moe.codec_params(config.dim):
            kind = config.moe.compress.compensation
            reasons.append(f"moe.compress.compensation is {kind!r}, whose trained numbers are no part of any file; use 'none'")
        if runtime == "vllm":
            reasons.append("vllm does not know this format; choose another")
        return [(Limit(broken=lambda _: None), reason) for reason in reasons]

    def ignored(self, name: str, config: ModelConfig) -> str | None:
        if ".codec." in name:
            return "used only where rows are compressed in training"
        return None


def from_table(record: type[Any], table: Mapping[str, Any], path: str) -> Any:
    """A configuration record from nested tables. Raises ConfigError naming keys that it does not have."""
    hints = get_type_hints(record)
    unknown = [key for key in table if key not in hints]
    if unknown:
        raise ConfigError([Problem(f"{path}.{key}", f"is not a setting; known: {', '.join(hints)}", ORIGIN) for key in unknown])
    values = {}
    for key, value in table.items():
        inner = [hint for hint in (hints[key], *get_args(hints[key])) if hint is not NoneType and dataclasses.is_dataclass(hint)]
        nested = isinstance(value, Mapping) and len(inner) == 1
        values[key] = from_table(cast(type[Any], inner[0]), value, f"{path}.{key}") if nested else value
    try:
        return record(**values)
    except TypeError as error:
        raise ConfigError([Problem(path, f"cannot be read: {error}", ORIGIN)]) from error
