"""moe_mlp as one autograd function over a loop of matmuls: the fastest way on CPU, and the way for fp64.

Saves the input rows and the pre-activation only; the hidden rows are formed again in backward. All products of one
expert run back to back, so its rows stay in cache, unless the weights' gradients are to come late.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activation import Activation, act, act_backward
from .late import Grads, LateGradients


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
        late: LateGradients | None = None,
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
        ctx.segments, ctx.activation, ctx.late = segments, activation, late
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, w13_E2FD, w2_EDF, b13_E2F, *pre_activations = ctx.saved_tensors
        weights = (w13_E2FD, w2_EDF, b13_E2F)
        grad_x_RD = torch.empty_like(x_RD)
        grad_x_RD[ctx.segments[-1][2] if ctx.segments else 0 :] = 0
        inner = _through_rows(ctx, grad_RD, grad_x_RD, w13_E2FD, w2_EDF, pre_activations)
        if ctx.late is None or not ctx.needs_input_grad[1]:
            grads = _of_weights(inner, grad_RD, x_RD, *weights)
        else:
            kept = list(inner)
            grads = ctx.late.put(lambda: _of_weights(kept, grad_RD, x_RD, *weights), weights)
        grad_w13, grad_w2, grad_b13 = grads
        return grad_x_RD, grad_w13, grad_w2, None, None, grad_b13, None


class _Inner(NamedTuple):
    """Of the rows of one expert: what the gradients of its weights are made of."""

    expert: int
    rows: slice
    grad_pre_NG: Tensor
    hidden_NF: Tensor


def _through_rows(
    ctx: Any, grad_RD: Tensor, grad_x_RD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, pre_activations: list[Tensor]
) -> Iterator[_Inner]:
    """Fills the rows' gradients, expert by expert."""
    F, D = w13_E2FD.shape[2:]
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
        torch.mm(grad_pre_NG, w13_E2FD[e].reshape(-1, D), out=grad_x_RD[lo:hi])
        yield _Inner(e, slice(lo, hi), grad_pre_NG, hidden_NF)


def _of_weights(
    inner: Iterable[_Inner], grad_RD: Tensor, x_RD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, b13_E2F: Tensor | None
) -> Grads:
    """Gradients of w13, w2 and b13."""
    # row-major whatever the weights are, so that the products below can be written in place
    grad_w13, grad_w2 = w13_E2FD.new_empty(w13_E2FD.shape), w2_EDF.new_empty(w2_EDF.shape)
    grad_b13 = None if b13_E2F is None else torch.zeros_like(b13_E2F)
    without_rows = set(range(len(grad_w2)))
    for e, rows, grad_pre_NG, hidden_NF in inner:
        torch.mm(grad_RD[rows].T, hidden_NF, out=grad_w2[e])
        torch.mm(grad_pre_NG.T, x_RD[rows], out=grad_w13[e].view(-1, x_RD.shape[1]))
        if grad_b13 is not None:
            grad_b13[e] = grad_pre_NG.sum(0).view_as(grad_b13[e])
        without_rows.remove(e)
    for e in without_rows:
        grad_w13[e], grad_w2[e] = 0, 0
    return grad_w13, grad_w2, grad_b13
