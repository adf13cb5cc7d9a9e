"""Experts that a file holds in one tensor per layer, as transformers 5 has them in memory, seen as one tensor per expert."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ModelConfig
from ..errors import CheckpointError
from .codec import FLOATS
from .family import Family
from .files import Checkpoint
from .matrix import Matrix, Rows
from .transposed import Band, Transposed

GATE_UP, DOWN = "gate_up_proj", "down_proj"


def unfused(checkpoint: Checkpoint, family: Family, config: ModelConfig) -> Mapping[str, Matrix]:
    """The tensors of a checkpoint under the names of its family's files, each expert's projections on their own, lazily.

    Fused experts are read in two forms: that of transformers 5 in memory, `gate_up_proj` [E, 2F, D] with the rows of gate before
    those of up, and `down_proj` [E, D, F]; and both of them transposed, [E, D, 2F] and [E, F, D]. Where the shapes are those of
    transformers, they are taken for that; the others never fit as well, as 2F = D and F = D are not both true.

    Raises CheckpointError where one of the two tensors is missing, of other shapes or quantised, and where experts are there
    twice.
    """
    module_name, each, _ = family.names.get("moe.experts.gate", "").partition(".{e}.")
    if config.moe is None or not each:
        return checkpoint.tensors
    named = _in_files(checkpoint, family)
    found, band = dict[str, Matrix](), Band()
    modules = {f"{family.layer_prefix}{i}.{module_name}": str(i) for i in config.moe_layers}
    for name, tensor in named.items():
        module, _, leaf = name.rpartition(".")
        if module not in modules or leaf not in (GATE_UP, DOWN):
            found[name] = tensor
            continue
        other = f"{module}.{DOWN if leaf == GATE_UP else GATE_UP}"
        if other not in named:
            raise CheckpointError(
                f"{checkpoint.folder} has {name}, but not {other}: copy the missing file, or save the model again"
            )
        if leaf == GATE_UP:
            experts = _experts(checkpoint, (name, tensor), (other, named[other]), config, band)
            for inside, matrix in experts.items():
                part = f"layers.{modules[module]}.moe.experts.{inside}"
                found[family.tensor_name(part)] = matrix
                if family.tensor_name(part) in named:
                    what = f"{checkpoint.folder} has {name} and {family.tensor_name(part)}"
                    raise CheckpointError(f"{what}: experts are there in two forms, remove one")
    return found


def _in_files(checkpoint: Checkpoint, family: Family) -> dict[str, Matrix]:
    """Tensors by the names that files have, where a module is called otherwise in memory."""
    named: dict[str, Matrix] = {}
    for name, tensor in checkpoint.tensors.items():
        usual = name
        for here, there in family.in_memory.items():
            usual = usual.replace(f".{here}.", f".{there}.", 1) if name.startswith(family.layer_prefix) else usual
        if usual != name and usual in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.folder} has {usual} and {name}, which is the same by another name: remove one")
        named[usual] = tensor
    return named


def _experts(
    checkpoint: Checkpoint, gate_up: tuple[str, Matrix], down: tuple[str, Matrix], config: ModelConfig, band: Band
) -> dict[str, Matrix]:
    """`5.up` -> the matrix of expert 5, and so on for all."""
    moe = config.moe
    assert moe is not None
    E, F, D = moe.num_experts, moe.expert_dim, config.dim
    for name, tensor in (gate_up, down):
        if tensor.dtype not in FLOATS:
            what = f"{name} is {tensor.dtype}, so it is quantised: use the checkpoint that it was made from"
            raise CheckpointError(f"{checkpoint.folder}: {what}")
    both, upright, turned = (gate_up[1], down[1]), ((E, 2 * F, D), (E, D, F)), ((E, D, 2 * F), (E, F, D))
    shapes = tuple(tensor.shape for tensor in both)
    if shapes not in (upright, turned):
        said, want, or_else = (" and ".join(str(list(shape)) for shape in pair) for pair in (shapes, upright, turned))
        what = f"{gate_up[0]} and {down[0]} have shapes {said}, but config.json makes them {want}, or transposed {or_else}"
        raise CheckpointError(f"{checkpoint.folder}: {what}")
    found: dict[str, Matrix] = {}
    for e in range(E):
        expert: list[Matrix] = [Rows(tensor, e * tensor.shape[1], (e + 1) * tensor.shape[1]) for tensor in both]
        if shapes != upright:
            expert = [Transposed(matrix, band) for matrix in expert]
        found |= {f"{e}.gate": Rows(expert[0], 0, F), f"{e}.up": Rows(expert[0], F, 2 * F), f"{e}.down": expert[1]}
    return found
