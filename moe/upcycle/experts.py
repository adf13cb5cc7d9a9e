"""Experts made of neurons of a dense FFN: rows of gate and up, columns of down. The order of neurons does not matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..config import ModelConfig
from ..hf.matrix import Cols, Constant, Matrix, Padded, Rows, Scaled, Stacked
from .choices import Choice, Picked
from .options import UpcycleOptions
from .sizes import Sizes, find_sizes

Ffn = Mapping[str, Matrix]
"""gate [F, D], up [F, D], down [D, F] of a dense FFN or of one expert."""
Neurons = tuple[int, int] | Choice
"""(start, stop) of neighbours, or any."""


def sizes_of(ffn: Ffn, options: UpcycleOptions, config: ModelConfig) -> Sizes:
    """The sizes that `config` was planned with; it names no dense width itself where every layer has experts."""
    return find_sizes(replace(config, moe=None, dense_ffn_dim=ffn["gate"].num_rows), options)


def take(ffn: Ffn, neurons: Neurons) -> Ffn:
    """Some neurons of an FFN. Neighbours' rows of gate and up stay ranges of the file, which are copied as they are."""
    if isinstance(neurons, tuple):
        start, stop = neurons
        if (start, stop) == (0, ffn["gate"].num_rows):
            return ffn
        return {
            "gate": Rows(ffn["gate"], start, stop),
            "up": Rows(ffn["up"], start, stop),
            "down": Cols(ffn["down"], slice(start, stop)),
        }
    return {name: Picked(matrix, neurons, axis_of(name)) for name, matrix in ffn.items()}


def axis_of(name: str) -> int:
    """Where a matrix has its neurons: 0 = rows, 1 = columns."""
    return 1 if name == "down" else 0


def scaled(expert: Ffn, options: UpcycleOptions, factor: float) -> Ffn:
    """The expert with its output scaled by `factor`, where scale_placement says ("both": for a gate that is homogeneous)."""
    if factor == 1 or options.scale_placement == "routed_scaling":
        return expert
    if options.scale_placement == "both":
        return {name: Scaled(matrix, factor ** (1 / 3)) for name, matrix in expert.items()}
    return {**expert, "down": Scaled(expert["down"], factor)}


def padded(expert: Ffn, width: int) -> Ffn:
    """The expert with neurons of zeros up to `width`: act(0) * 0 = 0, times columns of zeros."""
    have, dim = expert["gate"].num_rows, expert["gate"].cols
    if have == width:
        return expert

    def longer(matrix: Matrix) -> Matrix:
        return Stacked((matrix, Constant((width - have, dim), 0.0, matrix.dtype)))

    return {"gate": longer(expert["gate"]), "up": longer(expert["up"]), "down": Padded(expert["down"], dim, width)}


def silent(expert: Ffn) -> Ffn:
    """The expert without output: its down projection is 0. It still gets gradients, as its neurons are not 0."""
    down = expert["down"]
    return {**expert, "down": Constant(down.shape, 0.0, down.dtype)}


def expert_parts(layer: int, index: int, expert: Ffn) -> dict[str, Matrix]:
    """Under the names of parts."""
    return {f"layers.{layer}.moe.experts.{index}.{name}": matrix for name, matrix in expert.items()}


def shared_parts(layer: int, ffn: Ffn, options: UpcycleOptions, sizes: Sizes) -> dict[str, Matrix]:
    """The shared expert of a layer and its gate, if there are any.

    A gate of weight 0 passes sigmoid(0) = 1/2 of the output, so that the down projection is doubled.
    """
    if not sizes.shared_dim:
        return {}
    if sizes.shared[1]:
        shared = take(ffn, sizes.shared)
    else:
        shared = silent(take(ffn, (0, min(sizes.shared_dim, sizes.dense))))
    if options.shared_gate and sizes.shared[1]:
        shared = {**shared, "down": Scaled(shared["down"], 2.0)}
    shared = padded(shared, sizes.shared_dim)
    parts = {f"layers.{layer}.moe.shared.{name}": matrix for name, matrix in shared.items()}
    if options.shared_gate:
        gate = ffn["gate"]
        parts[f"layers.{layer}.moe.shared_gate"] = Constant((1, gate.cols), 0.0, gate.dtype)
    return parts


def router_parts(layer: int, rows: Matrix, options: UpcycleOptions) -> dict[str, Matrix]:
    """The router of a layer and its selection bias, if there is one."""
    parts = {f"layers.{layer}.moe.router": rows}
    if options.expert_bias:
        parts[f"layers.{layer}.moe.router_bias"] = Constant((rows.num_rows,), 0.0, "F32")
    return parts
