"""Experts that take time as on a device of their own: asleep, so that neither other ranks nor the network lose a core by it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moefold.kernels.moe_mlp import LateGradients
from moefold.moe.layer import MoELayer


class _Asleep(torch.autograd.Function):
    """Takes so many seconds forward, and so many backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, there_s: float, back_s: float) -> Tensor:
        ctx.back_s = back_s
        time.sleep(there_s)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.back_s)
        return grad, None, None


def add_sleep(layer: MoELayer, row_s: float) -> None:
    """Have the experts of a layer sleep for so long per row: once forward, once for the gradients of rows, and once for those of
    weights, when these are computed. What they compute is computed as well."""
    layer.experts.compute = functools.partial(_compute, layer.experts.compute, row_s)  # type: ignore[method-assign]


def _compute(compute: Callable[..., Tensor], row_s: float, x: Tensor, counts_E: Tensor, *args: Any, **how: Any) -> Tensor:
    seconds, by = row_s * int(counts_E.sum()), how.get("by")
    if by is not None:
        _sleep_late(by.gradients, seconds)
    return _Asleep.apply(compute(x, counts_E, *args, **how), seconds, seconds if by is not None else 2 * seconds)


def _sleep_late(gradients: LateGradients, seconds: float) -> None:
    put = gradients.put

    def later(work: Callable[[], Any], *args: Any) -> Any:
        def slow() -> Any:
            time.sleep(seconds)
            return work()

        return put(slow, *args)

    gradients.put = later  # type: ignore[method-assign]
