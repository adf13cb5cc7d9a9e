"""Liger-Kernel: its fused MoE in Triton, forward and backward, and the routing metadata that it starts from."""

from __future__ import annotations

import os
from types import ModuleType
from unittest.mock import patch

import torch

from ..protocol.contender import Contender, Named, Problem, absent, by_autograd
from . import NEEDS_CUDA, compiles_for


def fused_moe(name: str, problem: Problem) -> Contender:
    """Forward and backward from tokens. Its backward adds up dS by float atomics, so that reruns may differ."""
    liger = _fused_moe_module()
    if not compiles_for(problem.device):
        return absent(name, NEEDS_CUDA)
    leaves = problem.leaves()
    x_TD, w13, w2, weights_TK = leaves.values()
    indices_TK = problem.indices_TK.to(torch.int32)

    def forward() -> torch.Tensor:
        return liger.LigerFusedMoEFunction.apply(x_TD, w13.flatten(1, 2), w2, indices_TK, weights_TK)

    return by_autograd(name, forward, leaves, problem.direction_TD)


def routing_metadata(name: str, problem: Problem) -> Contender:
    """Order, row and counts in three kernels, and the tile table of its products, for which it waits for the GPU once."""
    liger = _fused_moe_module()
    if not compiles_for(problem.device):
        return absent(name, NEEDS_CUDA)
    indices_TK = problem.indices_TK.to(torch.int32)

    def forward() -> Named:
        counts_E, _, _, order_R, row_R, *_ = liger.compute_routing_metadata(indices_TK, problem.shape.E)
        return {"order": order_R, "row": row_R.view(indices_TK.shape), "counts": counts_E}

    return Contender(name, forward, note="with its tile table")


def _fused_moe_module() -> ModuleType:
    from moefold.kernels.triton_support import interpreting

    # the interpreter has no autotuner; with this setting, which is read at import, each kernel has one configuration
    with patch.dict(os.environ, {"LIGER_FUSED_MOE_AUTOTUNE": "0"} if interpreting() else {}):
        import liger_kernel.ops.fused_moe as module
    return module
