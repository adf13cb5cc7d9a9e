"""Experts made of neurons of a dense FFN: rows of gate and up with their biases, columns of down. The order of neurons does not
matter. The bias of down is of no neuron: it is whole in every expert, so that weights that sum to 1 give it once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..config import ModelConfig
from ..hf.matrix import Cols, Constant, Matrix, Padded, Rows, Scaled, Stacked
from .choices import Choice, Picked
from .options import UpcycleOptions
from .sizes import Sizes, find_sizes

Ffn = Mapping[str, Matrix]
"""gate [F, D] (where there is one), up [F, D], down [D, F] of a dense FFN or of one expert, and where it has them their biases:
gate_bias [F], up_bias [F], down_bias [D]."""
Neurons = tuple[int, int] | Choice
"""(start, stop) of neighbours, or any."""


def sizes_of(ffn: Ffn, options: UpcycleOptions, config: ModelConfig) -> Sizes:
    """The sizes that `config` was planned with; it names no dense width itself where every layer has experts."""
    return find_sizes(replace(config, moe=None, dense_ffn_dim=width_of(ffn)), options)


def width_of(ffn: Ffn) -> int:
    """How many neurons it has."""
    return ffn["up"].num_rows


def take(ffn: Ffn, neurons: Neurons) -> Ffn:
    """Some neurons of an FFN. Neighbours' rows of gate and up stay ranges of the file, which are copied as they are."""
    if isinstance(neurons, tuple):
        start, stop = neurons
        if (start, stop) == (0, width_of(ffn)):
            return ffn
        cut = {0: lambda matrix: Rows(matrix, start, stop), 1: lambda matrix: Cols(matrix, start, stop)}
        return {name: cut[axis](matrix) if (axis := axis_of(name)) is not None else matrix for name, matrix in ffn.items()}
    return {
        name: Picked(matrix, neurons, axis) if (axis := axis_of(name)) is not None else matrix for name, matrix in ffn.items()
    }


def axis_of(name: str) -> int | None:
    """Where a part has its neurons: 0 = rows, 1 = columns (of a bias, which is one row); None = nowhere."""
    return {"gate": 0, "up": 0, "down_bias": None}.get(name, 1)


def scaled(expert: Ffn, options: UpcycleOptions, factor: float, *, has_bias: bool = True) -> Ffn:
    """The expert with its output scaled by `factor`, where scale_placement says ("both": for a gate that is homogeneous).

    The bias of down is scaled so that those of a token's experts sum to that of the dense FFN: pieces of a copy, whose outputs
    are scaled to be summed, all have it whole. has_bias: False where the shared expert has it.
    """
    out = dict(expert)
    if "down_bias" in expert:
        applied = 1.0 if options.scale_placement == "routed_scaling" else factor
        bias = expert["down_bias"]
        out["down_bias"] = _times(bias, applied / options.pieces) if has_bias else Constant(bias.shape, 0.0, bias.dtype)
    if options.scale_placement == "both":
        root = factor ** (1 / sum(name in expert for name in ("gate", "up", "down")))
        return out | {name: _times(matrix, root) for name, matrix in expert.items() if name != "down_bias"}
    return out if options.scale_placement == "routed_scaling" else out | {"down": _times(expert["down"], factor)}


def _times(matrix: Matrix, factor: float) -> Matrix:
    return matrix if factor == 1 else Scaled(matrix, factor)


def padded(expert: Ffn, width: int) -> Ffn:
    """The expert with neurons of zeros up to `width`: act(0) = 0, times columns of zeros."""
    have = width_of(expert)
    if have == width:
        return expert

    def longer(name: str, matrix: Matrix) -> Matrix:
        if name == "down":
            return Padded(matrix, matrix.num_rows, width)
        more = Constant((width - have, *matrix.shape[1:]), 0.0, matrix.dtype)
        return matrix if axis_of(name) is None else Stacked((matrix, more))

    return {name: longer(name, matrix) for name, matrix in expert.items()}


def silent(expert: Ffn) -> Ffn:
    """The expert without output: its down projection, and the bias of that, are 0. It still gets gradients, as its neurons are
    not 0."""
    last = {name: matrix for name, matrix in expert.items() if name in ("down", "down_bias")}
    return {**expert, **{name: Constant(matrix.shape, 0.0, matrix.dtype) for name, matrix in last.items()}}


def expert_parts(layer: int, index: int, expert: Ffn) -> dict[str, Matrix]:
    """Under the names of parts."""
    return {f"layers.{layer}.moe.experts.{index}.{name}": matrix for name, matrix in expert.items()}


def shared_parts(layer: int, ffn: Ffn, options: UpcycleOptions, sizes: Sizes) -> dict[str, Matrix]:
    """The shared expert of a layer and its gate, if there are any.

    A gate of weight 0 passes sigmoid(0) = 1/2 of the output, so that the down projection, and its bias, are doubled.
    """
    if not sizes.shared_dim:
        return {}
    if sizes.shared[1]:
        shared = take(ffn, sizes.shared)
    else:
        shared = silent(take(ffn, (0, min(sizes.shared_dim, sizes.dense))))
    if options.shared_gate and sizes.shared[1]:
        shared = {name: Scaled(m, 2.0) if name in ("down", "down_bias") else m for name, m in shared.items()}
    shared = padded(shared, sizes.shared_dim)
    parts = {f"layers.{layer}.moe.shared.{name}": matrix for name, matrix in shared.items()}
    if options.shared_gate:
        first = ffn["up"]
        parts[f"layers.{layer}.moe.shared_gate"] = Constant((1, first.cols), 0.0, first.dtype)
    return parts


def router_parts(layer: int, rows: Matrix, options: UpcycleOptions) -> dict[str, Matrix]:
    """The router of a layer and its selection bias, if there is one."""
    parts = {f"layers.{layer}.moe.router": rows}
    if options.expert_bias:
        parts[f"layers.{layer}.moe.router_bias"] = Constant((rows.num_rows,), 0.0, "F32")
    return parts
