"""Transformer Engine: its Triton kernels for permute and unpermute, without its compiled library where that is not there."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..protocol.contender import Contender, Named, Problem, Raw, absent, by_autograd
from . import NEEDS_CUDA, dense_routing, modules_replaced

PACKAGE = "transformer_engine"
MODULE = f"{PACKAGE}.pytorch.permutation"


def permute(name: str, problem: Problem, direction_RD: Tensor) -> Contender:
    """Its map of rows, 2 E + 1 numbers for each token, is made by the same call from a dense map of choices."""
    theirs = permutation_module()
    if problem.device.type != "cuda":
        return absent(name, NEEDS_CUDA)
    chosen_TE = dense_routing(problem)[0].to(torch.int32)
    leaves = {"dX": problem.leaves()["dX"]}

    def forward() -> Tensor:
        return theirs.moe_permute(leaves["dX"], chosen_TE, problem.shape.R)[0]

    return by_autograd(name, forward, leaves, direction_RD, note="with its plan")


def unpermute(name: str, problem: Problem, y_RD: Tensor) -> Contender:
    theirs = permutation_module()
    if problem.device.type != "cuda":
        return absent(name, NEEDS_CUDA)
    chosen_TE, weights_TE = dense_routing(problem)
    row_map = theirs.moe_permute(problem.x_TD, chosen_TE.to(torch.int32), problem.shape.R)[1]
    leaves = {"dY": y_RD.detach().requires_grad_(), "dS": weights_TE.requires_grad_()}

    def forward() -> Tensor:
        return theirs.moe_unpermute(leaves["dY"], row_map, merging_probs=leaves["dS"], restore_shape=problem.x_TD.shape)

    def gradients(raw: Raw) -> Named:
        grads = {key: grad for key, grad in zip(leaves, raw, strict=True) if grad is not None}
        return {**grads, "dS": grads["dS"].gather(1, problem.indices_TK)}

    return by_autograd(name, forward, leaves, problem.direction_TD, gradients=gradients)


def row_id_map(name: str, problem: Problem) -> Contender:
    """The plan alone: three kernels over a map of T (2 E + 1) numbers, of which the first K of a token are its rows."""
    theirs = permutation_module()
    if problem.device.type != "cuda":
        return absent(name, NEEDS_CUDA)
    shape = problem.shape
    chosen_TE = dense_routing(problem)[0].to(torch.int32)

    def forward() -> Named:
        map_TM = theirs.triton_permutation.make_row_id_map(chosen_TE, shape.T, shape.E)
        return {"rows": map_TM[:, : shape.K]}

    return Contender(name, forward, note="from a dense map of choices")


@cache
def permutation_module() -> ModuleType:
    """Its module of permutations.

    The package loads compiled libraries when it is imported, which its Triton kernels do not use. Where these are missing, the
    modules that would load them, and the types of quantised tensors, are empty stand-ins while the kernels are imported.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    if importlib.util.find_spec(f"{PACKAGE}_torch") is not None:
        return importlib.import_module(MODULE)
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named '{PACKAGE}'", name=PACKAGE)
    with modules_replaced(PACKAGE, stand_ins(Path(next(iter(spec.submodule_search_locations))))):
        return importlib.import_module(MODULE)


def stand_ins(root: Path) -> dict[str, ModuleType]:
    """By name: packages that find their modules below `root` but run nothing, and modules with empty types."""
    made: dict[str, ModuleType] = {}
    for package in ("", ".common", ".pytorch", ".pytorch.triton"):
        module = made[PACKAGE + package] = ModuleType(PACKAGE + package)
        module.__path__ = [str(root.joinpath(*package.strip(".").split(".")))]
    types = {
        "quantized_tensor": "QuantizedTensor",
        "tensor.float8_tensor": "Float8Tensor",
        "tensor.float8_blockwise_tensor": "Float8BlockwiseQTensor",
        "tensor.mxfp8_tensor": "MXFP8Tensor",
    }
    for module_name, type_name in types.items():
        module = made[f"{PACKAGE}.pytorch.{module_name}"] = ModuleType(module_name)
        setattr(module, type_name, type(type_name, (), {}))
    made[f"{PACKAGE}.pytorch.quantized_tensor"].__dict__["_quantized_tensor_passthrough_ops"] = set()
    made[f"{PACKAGE}.pytorch.tensor"] = ModuleType("tensor")
    made[f"{PACKAGE}.pytorch.constants"] = ModuleType("constants")
    made[f"{PACKAGE}.pytorch.constants"].__dict__["TE_DType"] = {}
    made[f"{PACKAGE}_torch"] = ModuleType(f"{PACKAGE}_torch")
    return made
