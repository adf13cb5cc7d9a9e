"""Next-token cross-entropy, chunk by chunk, with the vocabulary whole or sharded."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# logits of one chunk take at most this many elements
CHUNK_ELEMENTS = 1 << 23


class VocabShard(Protocol):
    """Which rows of the output head this rank holds, and how partial results are joined over the ranks that hold the others."""

    offset: int

    def max(self, x: Tensor) -> Tensor: ...

    def sum(self, x: Tensor) -> Tensor: ...


class WholeVocab:
    """All rows are here."""

    offset = 0

    def max(self, x: Tensor) -> Tensor:
        return x

    def sum(self, x: Tensor) -> Tensor:
        return x


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of token losses; gradients are formed with the losses, so that no logits are kept or computed twice."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, w_VD: Tensor, labels_T: Tensor, valid_T: Tensor | None, shard: VocabShard, wide: torch.dtype
    ) -> Tensor:
        total = torch.zeros((), dtype=wide, device=x_TD.device)
        grad_x_TD = torch.empty_like(x_TD) if ctx.needs_input_grad[0] else None
        grad_w_VD = torch.zeros_like(w_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        rows = max(1, CHUNK_ELEMENTS // w_VD.shape[0])
        for lo in range(0, x_TD.shape[0], rows):
            chunk = slice(lo, lo + rows)
            logits_CV = (x_TD[chunk] @ w_VD.T).to(wide)
            labels_C = labels_T[chunk] - shard.offset
            here_C = (labels_C >= 0) & (labels_C < w_VD.shape[0])
            labels_C1 = labels_C.clamp(0, w_VD.shape[0] - 1)[:, None]
            valid_C = torch.ones_like(here_C) if valid_T is None else valid_T[chunk]
            logits_CV -= shard.max(logits_CV.amax(-1))[:, None]
            target_C = logits_CV.gather(-1, labels_C1)[:, 0].masked_fill(~here_C, 0)
            exp_CV = logits_CV.exp_()
            sums_3C = shard.sum(torch.stack([exp_CV.sum(-1), target_C, here_C.to(wide)]))
            loss_C = (sums_3C[0].log() - sums_3C[1]).masked_fill(sums_3C[2] == 0, torch.nan)
            total += loss_C.masked_fill(~valid_C, 0).sum()
            if grad_x_TD is None and grad_w_VD is None:
                continue
            # d loss / d logits = softmax - onehot, 0 for invalid tokens
            grad_CV = exp_CV.div_(sums_3C[0][:, None])
            grad_CV.scatter_add_(-1, labels_C1, -here_C.to(wide)[:, None])
            grad_CV = grad_CV.masked_fill_(~valid_C[:, None], 0).to(x_TD.dtype)
            if grad_x_TD is not None:
                torch.mm(grad_CV, w_VD, out=grad_x_TD[chunk])
            if grad_w_VD is not None:
                grad_w_VD += grad_CV.T @ x_TD[chunk]
        ctx.save_for_backward(grad_x_TD, None if grad_w_VD is None else grad_w_VD.to(w_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # multiplied in the wide dtype: 1 / tokens rounded to bf16 would scale every gradient by up to 0.4 %
        grads = [None if g is None else (g.to(grad.dtype) * grad).to(g.dtype) for g in ctx.saved_tensors]
        return *grads, None, None, None, None


def cross_entropy_sum(
    x_TD: Tensor, w_VD: Tensor, labels_T: Tensor, valid_T: Tensor | None = None, shard: VocabShard | None = None
) -> Tensor:
    """Sum over valid tokens of -log softmax(x w^T)[label], a scalar in at least fp32.

    Never holds more than CHUNK_ELEMENTS logits. With a sharded vocabulary `w_VD` is this rank's rows, the result is the same on
    every rank of the shard group, and the gradient of x_TD is this rank's part of a sum.

    Args:
        x_TD: final hidden states.
        w_VD: output head.
        labels_T: int64 token ids in the whole vocabulary.
            A valid token's label outside the vocabulary makes the loss NaN.
        valid_T: bool; False adds no loss and no gradient, whatever the label. None = all.
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    if not torch.is_grad_enabled():
        # a custom function forms gradients wherever its inputs ask for them, also where nothing is recorded
        x_TD, w_VD = x_TD.detach(), w_VD.detach()
    return ChunkedCrossEntropy.apply(x_TD, w_VD, labels_T, valid_T, shard or WholeVocab(), wide)
