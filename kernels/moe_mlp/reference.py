"""Specification of `moe_mlp`: one network per expert, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import Activation, act


def moe_mlp(
    x_RD: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    counts_E: Tensor,
    activation: Activation = "silu",
    b13_E2F: Tensor | None = None,
) -> Tensor:
    """As the public function: experts one after the other."""
    outputs, start = [], 0
    for e, count in enumerate(counts_E.tolist()):
        rows_ND = x_RD[start : start + count]
        pre_2NF = rows_ND @ w13_E2FD[e].mT
        if b13_E2F is not None:
            pre_2NF = pre_2NF + b13_E2F[e, :, None]
        # the gate is the first of two; without it, up is the only one
        hidden_NF = act(pre_2NF[0], activation)
        outputs.append((hidden_NF * pre_2NF[1] if len(pre_2NF) == 2 else hidden_NF) @ w2_EDF[e].T)
        start += count
    outputs.append(x_RD.new_zeros(x_RD.shape[0] - start, w2_EDF.shape[1]))
    return torch.cat(outputs)
