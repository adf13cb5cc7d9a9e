"""Collectives on plain tensors, differentiable where gradients need them. Groups are arguments, never looked up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def all_gather_dim(x: Tensor, dim: int, group: Group) -> Tensor:
    """Concatenate the ranks' equal parts along `dim`."""
    size = dist.get_world_size(group)
    if size == 1:
        return x
    parts = x.new_empty(size * x.shape[0], *x.shape[1:])
    # named differently from torch 2.13 on
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    gather(parts, x.contiguous(), group=group)
    return parts.unflatten(0, (size, -1)).movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter_dim(x: Tensor, dim: int, group: Group) -> Tensor:
    """Sum over ranks, each keeping its part of `dim`."""
    size = dist.get_world_size(group)
    if size == 1:
        return x
    parts = x.unflatten(dim, (size, -1)).movedim(dim, 0).contiguous()
    out = torch.empty_like(parts[0])
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    scatter(out, parts.flatten(0, 1), group=group)
    return out


class GatherSequence(torch.autograd.Function):
    """[B, S / n, D] -> [B, S, D]; the gradients of the ranks' copies are summed and scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather_dim(x, 1, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_dim(grad, 1, ctx.group), None


class ScatterSequence(torch.autograd.Function):
    """Partial sums [B, S, D] -> [B, S / n, D], summed over ranks; the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return reduce_scatter_dim(x, 1, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather_dim(grad, 1, ctx.group), None


class SumOverGroup(torch.autograd.Function):
    """Sum a value that each rank knows a part of and all ranks go on to use: the gradient is summed as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        out = x.clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def exchange_rows(x_RD: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
    """Uneven all-to-all: the first send[0] rows go to rank 0 of the group and so on; returns what arrives, in rank order.

    On gloo every receive is posted before any send: its own all-to-all does it the other way round and reaches about half of a
    link.
    """
    out_XD = x_RD.new_empty(sum(receive), *x_RD.shape[1:])
    x_RD = x_RD[: sum(send)].contiguous()
    if dist.get_backend(group) != "gloo":
        dist.all_to_all_single(out_XD, x_RD, list(receive), list(send), group=group)
        return out_XD
    me = dist.get_rank(group)
    outgoing, incoming = x_RD.split(list(send)), out_XD.split(list(receive))
    incoming[me].copy_(outgoing[me])
    peers = [(me + step) % len(send) for step in range(1, len(send))]
    works = [dist.irecv(incoming[p], group=group, group_src=p) for p in peers if receive[p]]
    works += [dist.isend(outgoing[p], group=group, group_dst=p) for p in peers if send[p]]
    for work in works:
        assert work is not None
        work.wait()
    return out_XD


class ExchangeRows(torch.autograd.Function):
    """`exchange_rows`, with gradients going the other way."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
        ctx.args, ctx.rows = (receive, send, group), x_RD.shape[0]
        return exchange_rows(x_RD, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor | None, ...]:
        grad_RD = exchange_rows(grad_XD, *ctx.args)
        if ctx.rows > grad_RD.shape[0]:
            # rows that did not travel
            grad_RD = torch.cat([grad_RD, grad_RD.new_zeros(ctx.rows - grad_RD.shape[0], *grad_RD.shape[1:])])
        return grad_RD, None, None, None
