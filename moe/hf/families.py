"""All families by `model_type`, and what is done with them: reading a checkpoint as parts, writing parts as its tensors."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError, Problem
from .codec import FLOATS
from .family import Family, Layout, NotHeldError, Runtime
from .family_dense import Gemma, Llama, Mistral, Olmo2, Qwen2, Qwen3
from .family_gpt2 import Gpt2
from .family_moe import FlexOlmo, Mixtral, Olmoe, Qwen2Moe, Qwen3Moe
from .family_native import NATIVE, Native
from .family_scored import Glm4Moe, GraniteMoe
from .fields import ORIGIN
from .files import Checkpoint
from .fused import unfused
from .matrix import Cols, Constant, Matrix, Reshaped, Rows, Stacked, WeightedSum
from .parts import Shape, part_shapes
from .transposed import Band, Transposed

_ALL: tuple[Family, ...] = (
    *(Llama(), Mistral(), Qwen2(), Qwen3(), Olmo2(), Gemma(), Gpt2()),
    *(Mixtral(), Qwen2Moe(), Qwen3Moe(), Olmoe(), FlexOlmo(), Glm4Moe(), GraniteMoe()),
)
FAMILIES: Mapping[str, Family] = MappingProxyType({family.model_type: family for family in (*_ALL, Native())})

_MLA = "its attention keeps one rotary key for all heads and norms a latent of keys and values"
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "gpt_neox": "LayerNorm, and a feed-forward network without a gate and with biases",
        "opt": "learned positions, LayerNorm, and a feed-forward network without a gate and with biases",
        "bloom": "ALiBi positions, LayerNorm, and a feed-forward network without a gate",
        "falcon": "LayerNorm, and a feed-forward network without a gate",
        "phi": "LayerNorm, biases in the feed-forward network, and attention beside it instead of before it",
        "phi3": "fused projections, which are not split, and longrope frequencies in its long-context models",
        "gemma2": "norms before and after attention and feed-forward, soft-capped scores, and a window in every second layer",
        "gemma3": "norms before and after attention and feed-forward, and a window in five of six layers",
        "gemma3_text": "norms before and after attention and feed-forward, and a window in five of six layers",
        "gemma4": "a norm of values, norms before and after attention and feed-forward, and windows in some layers",
        "olmo": "LayerNorm without weights",
        "olmo3": "a window in three of four layers",
        "stablelm": "LayerNorm with biases",
        "cohere": "LayerNorm, and attention beside the feed-forward network instead of before it",
        "phimoe": "LayerNorm, and a router that samples its experts one after another",
        "ernie4_5_moe": "rotary embedding of neighbouring columns, and biases of another pattern",
        "gpt_oss": "another activation, biases in router and experts, and attention sinks",
        "deepseek_v2": _MLA,
        "deepseek_v3": _MLA,
        "kimi_k2": _MLA,
        "glm4_moe_lite": _MLA,
    }
)
"""Types that are known and cannot be represented, with the reason."""


def family_of(config_json: Mapping[str, Any], tensors: Collection[str] = ()) -> Family:
    """The family of a config.json, with the names that files with `tensors` have. Raises ConfigError for one that is not read,
    with the reason where it is known."""
    kind = config_json.get("model_type")
    if kind is not None and kind in FAMILIES:
        return FAMILIES[kind].named_as(tensors)
    if kind is None:
        raise ConfigError([Problem("model_type", f"is missing; read are {', '.join(FAMILIES)}", ORIGIN)])
    if kind in REFUSED:
        what = f"is {kind!r}, which cannot be represented: {REFUSED[kind]}; read are {', '.join(FAMILIES)}"
        raise ConfigError([Problem("model_type", what, ORIGIN)])
    close = difflib.get_close_matches(str(kind), FAMILIES, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError([Problem("model_type", f"is {kind!r}, which is not known; {hint}read are {', '.join(FAMILIES)}", ORIGIN)])


CARRIED_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def carried(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a source's config.json that say nothing about the model and go with it: its special tokens.

    What the source leaves out stays null: the default of another format need not be a token of this vocabulary.
    """
    return {key: config_json[key] for key in CARRIED_FIELDS if config_json.get(key) is not None}


def read_parts(checkpoint: Checkpoint) -> tuple[ModelConfig, dict[str, Matrix]]:
    """The model of a checkpoint and all of its parts, lazily. Every tensor is used, or ignored with its reason (`ignored`).

    Raises ConfigError for a model that cannot be represented; CheckpointError for tensors that are missing, of another shape than
    config.json says, or that nothing is known about.
    """
    family = family_of(checkpoint.config, checkpoint.tensors)
    config = family.read(checkpoint.config)
    layouts, tensors = family.tensors(config), unfused(checkpoint, family, config)
    missing = [name for name, layout in layouts.items() if layout.parts and name not in tensors]
    if missing:
        hint = "; if the head is the embedding, set tie_word_embeddings to true" if missing == ["lm_head.weight"] else ""
        raise CheckpointError(f"{checkpoint.folder} lacks {_few(missing)}, which its config.json asks for{hint}")
    ignored_tensors(checkpoint, family, config)
    shapes, parts, band = part_shapes(config), dict[str, Matrix](), Band()
    for name, layout in layouts.items():
        if layout.parts:
            parts |= _parts_of(checkpoint.folder, name, tensors[name], layout, shapes, band)
    return config, {part: parts[part] for part in shapes}


def ignored_tensors(checkpoint: Checkpoint, family: Family, config: ModelConfig) -> dict[str, str]:
    """Tensors of a checkpoint that are no part of the model, each with the reason. Raises CheckpointError for unknown ones."""
    layouts, found, unknown = family.tensors(config), {}, []
    tensors = unfused(checkpoint, family, config)
    for name, tensor in tensors.items():
        reason = None if name not in layouts or layouts[name].parts else "the format wants it, but nothing depends on it"
        if name in layouts and reason is None:
            continue
        reason = reason or family.ignored(name, config)
        if name == "lm_head.weight" and config.tie_embeddings:
            if not _equal(tensor, tensors[family.tensor_name("embed")]):
                what = "differs from the embedding, but config.json ties them: set tie_word_embeddings to false"
                raise CheckpointError(f"{checkpoint.folder}: {name} {what}")
            reason = "the same as the embedding, which the head is tied to"
        if reason is None:
            unknown.append(name)
        else:
            found[name] = reason
    if unknown:
        what = f"is no tensor of a {family.model_type} model with this config.json, so it would be lost; is model_type right?"
        raise CheckpointError(f"{checkpoint.folder}: {_few(unknown)} {what}")
    return found


def write_tensors(
    family: Family, config: ModelConfig, parts: Mapping[str, Matrix], runtime: Runtime = "transformers"
) -> dict[str, Matrix]:
    """The tensors of a family's files, made of parts, in the order of the files. To be stored in their own dtype, or any other.

    Raises NotHeldError where the family cannot hold the model (see `rewrites.adapt`), CheckpointError for parts that do not
    belong to it.
    """
    reasons = tuple(reason for _, reason in family.broken(config, runtime))
    if reasons:
        raise NotHeldError(family.model_type, reasons)
    shapes = part_shapes(config)
    wrong = [p for p in shapes.keys() | parts.keys() if p not in shapes or p not in parts or parts[p].shape != shapes[p]]
    if wrong:
        raise CheckpointError(
            f"the parts do not make up the model: {_few(sorted(wrong))} is missing, unknown or of another shape"
        )
    dtype, band = parts["embed"].dtype, Band()
    return {name: _tensor(layout, parts, dtype, band) for name, layout in family.tensors(config).items()}


def _parts_of(
    folder: Path, name: str, tensor: Matrix, layout: Layout, shapes: Mapping[str, Shape], band: Band
) -> dict[str, Matrix]:
    """The parts in one tensor."""
    if tensor.dtype not in FLOATS:
        # of biases and our own tensors too, whose names do not tell files.py that they are weights
        raise CheckpointError(f"{folder}: {name} is {tensor.dtype}, so it is quantised: use the checkpoint that it was made from")
    if tensor.shape != layout.shape:
        raise CheckpointError(f"{folder}: {name} has shape {list(tensor.shape)}, but config.json makes it {list(layout.shape)}")
    if layout.transform == "one_plus":
        # in F32 at least: 1 + w keeps few of the bits that w has near 0
        tensor = WeightedSum((tensor, Constant(tensor.shape, 1.0)), (1.0, 1.0))
    elif layout.transform == "transposed":
        tensor = Transposed(tensor, band)
    if len(layout.parts) == 1:
        (part,) = layout.parts
        return {part: tensor if tensor.shape == shapes[part] else Reshaped(tensor, shapes[part])}
    found: dict[str, Matrix] = {}
    start = 0
    for part in layout.parts:
        # vectors one after another are columns of one row, or rows of their own
        count = shapes[part][0] if len(tensor.shape) == 1 else prod(shapes[part][:-1])
        piece = (Cols if len(tensor.shape) == 1 else Rows)(tensor, start, start + count)
        found[part] = piece if piece.shape == shapes[part] else Reshaped(piece, shapes[part])
        start += count
    return found


def _tensor(layout: Layout, parts: Mapping[str, Matrix], dtype: str, band: Band) -> Matrix:
    """One tensor of its parts."""
    if not layout.parts:
        return Constant(layout.shape, 0.0, dtype)
    pieces = tuple(parts[part] for part in layout.parts)
    whole = pieces[0] if len(pieces) == 1 else Stacked(pieces)
    if layout.transform == "one_plus":
        whole = _less_one(whole)
    elif layout.transform == "transposed":
        whole = whole.of if isinstance(whole, Transposed) else Transposed(whole, band)
    return whole if whole.shape == layout.shape else Reshaped(whole, layout.shape)


def _less_one(matrix: Matrix) -> Matrix:
    """w of 1 + w; where that was made of a w from a file, this very w."""
    one = Constant(matrix.shape, 1.0)
    if isinstance(matrix, WeightedSum) and matrix.parts[1:] == (one,) and matrix.weights == (1.0, 1.0) and matrix.divisor == 1:
        return matrix.parts[0]
    return WeightedSum((matrix, one), (1.0, -1.0))


def _equal(one: Matrix, other: Matrix) -> bool:
    """Whether two matrices have the same values, compared block by block."""
    if one.shape != other.shape:
        return False
    return all(bool((one.rows(a, b) == other.rows(a, b)).all()) for a, b in one.steps())


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


__all__ = [
    "FAMILIES",
    "NATIVE",
    "REFUSED",
    "carried",
    "family_of",
    "ignored_tensors",
    "read_parts",
    "write_tensors",
]
