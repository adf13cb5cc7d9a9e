"""Gradients of weights that are computed after those of rows have been handed on.

What sends the rows' gradients to other ranks can then start to do so half a backward earlier, and the products with the weights'
gradients are computed while they travel: the split of backward that zero-bubble pipelines use (Qi et al., arXiv 2401.10241), here
for the all-to-all.

Autograd runs what is ready in the reverse order of its making. So `taken` is called in forward where, in backward, the weights'
turn shall come: after the operation that starts to send was made (in backward that is waited for later) and before the one that
waits (in backward that starts to send earlier).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Grads = tuple[Tensor | None, ...]
WITH_LATE = ("loop", "triton")
"""Implementations of the experts that put gradients off; others compute all of them together."""


class LateGradients:
    """The gradients of one use of some weights; between the operation that uses them and the weights' turn it holds the work."""

    def __init__(self) -> None:
        self._work: Callable[[], Grads] | None = None

    def taken(self, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
        """These weights, to be used once, by an operation that may `put` their gradients off."""
        given = [w for w in weights if w is not None]
        taken = iter(_Taken.apply(self, *given))
        return tuple(None if w is None else next(taken) for w in weights)

    def put(self, work: Callable[[], Grads], weights: tuple[Tensor | None, ...]) -> Grads:
        """Put off `work`, which returns the gradients of all of these weights; returns what autograd is given for now.

        Nobody may read that. It has the shapes of the gradients, no memory, and is not a number.

        Raises:
            RuntimeError: the weights are used a second time.
        """
        if self._work is not None:
            raise RuntimeError("weights whose gradients come late are used by one operation only")
        self._work = work
        return tuple(None if w is None else w.new_full((), torch.nan).expand(w.shape) for w in weights)

    def due(self, grads: Grads) -> Grads:
        """The gradients, computed now if they were put off; else as they were."""
        work, self._work = self._work, None
        return grads if work is None else tuple(grad for grad in work() if grad is not None)


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, late: LateGradients, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.late = late
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.late.due(grads)
