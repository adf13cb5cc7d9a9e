"""Collectives on plain tensors, differentiable where gradients need them. Groups are arguments, never looked up.

Each takes the probe of its caller, which records when and how many bytes; None records nothing.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .comm_record import Direction
from .recorder import Probe, recorded

Group = dist.ProcessGroup


def all_reduce(
    x: Tensor,
    group: Group,
    probe: Probe | None = None,
    *,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    direction: Direction | None = None,
) -> Tensor:
    """Replace `x` by its sum over ranks, or what `op` says; returns it."""
    with recorded(probe, "all_reduce", x, direction):
        dist.all_reduce(x, op=op, group=group)
    return x


def all_gather_dim(x: Tensor, dim: int, group: Group, probe: Probe | None = None, direction: Direction | None = None) -> Tensor:
    """Concatenate the ranks' equal parts along `dim`."""
    size = dist.get_world_size(group)
    if size == 1:
        return x
    parts = x.new_empty(size * x.shape[0], *x.shape[1:])
    # named differently from torch 2.13 on
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    with recorded(probe, "all_gather", x, direction):
        gather(parts, x.contiguous(), group=group)
    return parts.unflatten(0, (size, -1)).movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter_dim(
    x: Tensor, dim: int, group: Group, probe: Probe | None = None, direction: Direction | None = None
) -> Tensor:
    """Sum over ranks, each keeping its part of `dim`."""
    size = dist.get_world_size(group)
    if size == 1:
        return x
    parts = x.unflatten(dim, (size, -1)).movedim(dim, 0).contiguous()
    out = torch.empty_like(parts[0])
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    with recorded(probe, "reduce_scatter", x, direction):
        scatter(out, parts.flatten(0, 1), group=group)
    return out


class GatherSequence(torch.autograd.Function):
    """[B, S / n, D] -> [B, S, D]; the gradients of the ranks' copies are summed and scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, probe: Probe | None = None) -> Tensor:
        ctx.group, ctx.probe = group, probe
        return all_gather_dim(x, 1, group, probe, "forward")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter_dim(grad, 1, ctx.group, ctx.probe, "backward"), None, None


class ScatterSequence(torch.autograd.Function):
    """Partial sums [B, S, D] -> [B, S / n, D], summed over ranks; the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, probe: Probe | None = None) -> Tensor:
        ctx.group, ctx.probe = group, probe
        return reduce_scatter_dim(x, 1, group, probe, "forward")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather_dim(grad, 1, ctx.group, ctx.probe, "backward"), None, None


class SumOverGroup(torch.autograd.Function):
    """Sum a value that each rank knows a part of and all ranks go on to use: the gradient is summed as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, probe: Probe | None = None) -> Tensor:
        ctx.group, ctx.probe = group, probe
        return all_reduce(x.clone(), group, probe, direction="forward")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_reduce(grad.clone(), ctx.group, ctx.probe, direction="backward"), None, None


def exchange_blocks(x_PX: Tensor, group: Group, probe: Probe | None = None) -> Tensor:
    """Even all-to-all: block p of `x_PX` (contiguous) goes to rank p of the group; returns the ranks' blocks for this one."""
    out_PX, one_each = torch.empty_like(x_PX), (1,) * x_PX.shape[0]
    block_bytes = x_PX.element_size() * math.prod(x_PX.shape[1:])
    traffic: dict[str, Any] = {"send": one_each, "receive": one_each, "row_bytes": block_bytes}
    with nullcontext() if probe is None else probe.span("all_to_all", **traffic):
        dist.all_to_all_single(out_PX, x_PX, group=group)
    return out_PX
