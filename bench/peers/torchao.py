"""torchao: bringing rows that have arrived from several ranks into expert order."""

from __future__ import annotations

import torch
from torch import Tensor

from ..protocol.contender import Contender, Named, Problem, absent, by_autograd
from . import NEEDS_CUDA, compiles_for

RANKS = 8
"""Source ranks where a problem on one rank does not say how many."""


def permute_and_pad(name: str, x_RD: Tensor, counts_WL: Tensor, direction_RD: Tensor) -> Contender:
    """Rows in the order (source rank, expert) -> (expert, source rank).

    counts_WL: int64, rows from each rank for each local expert. Asked for no padding, it still gives an empty expert one row of
    zeros, so that only counts without empty experts can be compared.
    """
    from torchao.prototype.moe_training.ep.permute import permute_and_pad as regroup

    if not compiles_for(x_RD.device):
        return absent(name, NEEDS_CUDA)
    ranks, experts = counts_WL.shape
    if not bool((counts_WL.sum(0) > 0).all()):
        return absent(name, "pads empty experts, of which this routing has some")
    counts, leaves = counts_WL.flatten(), {"dX": x_RD.detach().requires_grad_()}

    def forward() -> Tensor:
        return regroup(leaves["dX"], counts, ranks, experts, 1)[1][: len(x_RD)]

    return by_autograd(name, forward, leaves, direction_RD, note="with its plan")


def generate_indices(name: str, problem: Problem) -> Contender:
    """Only places for rows that are sorted on every source rank already, from their counts: it never sees a choice."""
    from torchao.prototype.moe_training.ep.kernels import generate_permute_indices

    if not compiles_for(problem.device):
        return absent(name, NEEDS_CUDA)
    E, R = problem.shape.E, problem.shape.R
    ranks = RANKS if E % RANKS == 0 else 1
    counts = torch.bincount(problem.indices_TK.flatten(), minlength=E)

    def forward() -> Named:
        return {"order": generate_permute_indices(counts, E // ranks, ranks, R + E, 1)[0]}

    return Contender(name, forward, kind="bound", note=f"regroups counts of {ranks} ranks, sorts nothing")
