"""From parts of dense models to parts of a Mixture-of-Experts model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..config import ModelConfig
from ..errors import CheckpointError
from ..hf.matrix import Matrix
from ..hf.parts import attention_shapes, part_shapes
from .experts import Ffn
from .method import Models
from .methods import METHODS
from .options import UpcycleOptions

DenseModel = tuple[ModelConfig, Mapping[str, Matrix]]


def upcycle_parts(dense: Sequence[DenseModel], options: UpcycleOptions) -> tuple[ModelConfig, dict[str, Matrix]]:
    """The model that `options` make of dense models, and its parts in the order of files; nothing is read, except what a method
    checks first (flex_olmo: that frozen weights are equal).

    Raises ConfigError for options that do not fit, CheckpointError for parts that are not those of their model, DataError for
    centroids that do not fit.
    """
    for number, (config, parts) in enumerate(dense):
        _check_parts(number, config, parts)
    method = METHODS[options.method]
    config = method.plan([model for model, _ in dense], options)
    method.check(dense, options)
    made: dict[str, Matrix] = {}
    for index in config.moe_layers:
        made |= method.layer(index, [_ffn(parts, index) for _, parts in dense], options, config)
    for index in range(config.num_layers):
        made |= method.attention(index, [_attention(model, parts, index) for model, parts in dense], options, config)
    out: dict[str, Matrix] = {}
    for name, shape in part_shapes(config).items():
        out[name] = made.pop(name) if name in made else method.rest(name, [parts[name] for _, parts in dense], options)
        if out[name].shape != shape:
            raise AssertionError(f"{options.method} made {name} of shape {out[name].shape}, but it must be {shape}")
    if made:
        raise AssertionError(f"{options.method} made parts that the model does not have: {sorted(made)}")
    return config, out


def fitted(dense: Models, options: UpcycleOptions, holds: Callable[[ModelConfig], bool]) -> UpcycleOptions:
    """The options with `group_limited` decided: whole copies are chosen first where the target can say so.

    holds: whether the target can hold a model. Raises ConfigError as `plan`.
    """
    if options.group_limited is not None:
        return options
    config = METHODS[options.method].plan(dense, options)
    if config.moe is None or config.moe.router.num_groups == 1 or holds(config):
        return options
    return replace(options, group_limited=False)


def _check_parts(number: int, config: ModelConfig, parts: Mapping[str, Matrix]) -> None:
    shapes = part_shapes(config)
    wrong = [f"{name} is missing" for name in shapes if name not in parts]
    wrong += [f"{name} is not part of it" for name in parts if name not in shapes]
    wrong += [
        f"{name} is {list(parts[name].shape)}, not {list(shape)}"
        for name, shape in shapes.items()
        if name in parts and parts[name].shape != shape
    ]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"dense model {number}: {'; '.join(wrong[:5])}{more}")


def _ffn(parts: Mapping[str, Matrix], layer: int) -> Ffn:
    below = f"layers.{layer}.ffn."
    return {name.removeprefix(below): matrix for name, matrix in parts.items() if name.startswith(below)}


def _attention(config: ModelConfig, parts: Mapping[str, Matrix], layer: int) -> dict[str, Matrix]:
    names = [name for name in attention_shapes(config) if name.startswith("attention.")]
    return {name.removeprefix("attention."): parts[f"layers.{layer}.{name}"] for name in names}
