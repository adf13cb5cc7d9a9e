"""moe_mlp as one autograd function over a loop of matmuls: the fastest way on CPU, and the way for fp64.

Saves the input rows and the pre-activation only; the hidden rows are formed again in backward. All products of one
expert run back to back, so its rows stay in cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activation import Activation, act, act_backward


def _segments(counts_E: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of every expert that has rows. Reads the counts on the host."""
    segments, start = [], 0
    for e, count in enumerate(counts_E.tolist()):
        if count:
            segments.append((e, start, start + count))
        start += count
    return segments


class MoeMlpLoop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        w13_E2FD: Tensor,
        w2_EDF: Tensor,
        counts_E: Tensor,
        activation: Activation = "silu",
        b13_E2F: Tensor | None = None,
    ) -> Tensor:
        _, _, F, D = w13_E2FD.shape
        segments = _segments(counts_E)
        y_RD = x_RD.new_empty(x_RD.shape[0], D)
        y_RD[segments[-1][2] if segments else 0 :] = 0
        # one small tensor per expert: memory that is used again and again, where one large tensor comes fresh from the system
        pre_activations = []
        for e, lo, hi in segments:
            pre_NG = torch.mm(x_RD[lo:hi], w13_E2FD[e].reshape(-1, D).T)
            if b13_E2F is not None:
                pre_NG += b13_E2F[e].flatten()
            hidden_NF = act(pre_NG[:, :F], activation)
            if pre_NG.shape[1] > F:
                hidden_NF.mul_(pre_NG[:, F:])
            torch.mm(hidden_NF, w2_EDF[e].T, out=y_RD[lo:hi])
            pre_activations.append(pre_NG)
        ctx.save_for_backward(x_RD, w13_E2FD, w2_EDF, b13_E2F, *pre_activations)
        ctx.segments, ctx.activation = segments, activation
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, w13_E2FD, w2_EDF, b13_E2F, *pre_activations = ctx.saved_tensors
        F, D = w13_E2FD.shape[2:]
        grad_x_RD = torch.empty_like(x_RD)
        grad_x_RD[ctx.segments[-1][2] if ctx.segments else 0 :] = 0
        # row-major whatever the weights are, so that the products below can be written in place
        grad_w13, grad_w2 = w13_E2FD.new_empty(w13_E2FD.shape), w2_EDF.new_empty(w2_EDF.shape)
        for e in set(range(len(grad_w2))).difference(e for e, _, _ in ctx.segments):
            grad_w13[e], grad_w2[e] = 0, 0
        grad_b13 = None if b13_E2F is None else torch.zeros_like(b13_E2F)
        for (e, lo, hi), pre_NG in zip(ctx.segments, pre_activations, strict=True):
            gate_NF, up_NF = pre_NG[:, :F], pre_NG[:, F:]
            grad_hidden_NF = grad_RD[lo:hi] @ w2_EDF[e]
            hidden_NF = act(gate_NF, ctx.activation)
            grad_pre_NG = torch.empty_like(pre_NG)
            if up_NF.shape[1]:
                torch.mul(grad_hidden_NF, hidden_NF, out=grad_pre_NG[:, F:])
                grad_hidden_NF.mul_(up_NF)
                hidden_NF.mul_(up_NF)
            act_backward(grad_hidden_NF, gate_NF, grad_pre_NG[:, :F], ctx.activation)
            torch.mm(grad_RD[lo:hi].T, hidden_NF, out=grad_w2[e])
            torch.mm(grad_pre_NG.T, x_RD[lo:hi], out=grad_w13[e].view(-1, D))
            torch.mm(grad_pre_NG, w13_E2FD[e].reshape(-1, D), out=grad_x_RD[lo:hi])
            if grad_b13 is not None:
                grad_b13[e] = grad_pre_NG.sum(0).view_as(grad_b13[e])
        return grad_x_RD, grad_w13, grad_w2, None, None, grad_b13
