"""Specification of `moe_mlp`: one gated network per expert, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import Activation, act


def moe_mlp(x_RD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, counts_E: Tensor, activation: Activation = "silu") -> Tensor:
    """As the public function: experts one after the other."""
    outputs, start = [], 0
    for e, count in enumerate(counts_E.tolist()):
        rows_ND = x_RD[start : start + count]
        hidden_NF = act(rows_ND @ w13_E2FD[e, 0].T, activation) * (rows_ND @ w13_E2FD[e, 1].T)
        outputs.append(hidden_NF @ w2_EDF[e].T)
        start += count
    outputs.append(x_RD.new_zeros(x_RD.shape[0] - start, w2_EDF.shape[1]))
    return torch.cat(outputs)
