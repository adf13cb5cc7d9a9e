"""Collectives on plain tensors, differentiable where gradients need them. Groups are arguments, never looked up.

Each takes the probe of its caller, which records when and how many bytes; None records nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .comm_record import Direction
from .recorder import Probe, Span, recorded

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


def exchange_blocks(x_PX: Tensor, group: Group, probe: Probe | None = None, rows_E: Tensor | None = None) -> Tensor:
    """Even all-to-all: block p of `x_PX` (contiguous) goes to rank p of the group; returns the ranks' blocks for this one.

    rows_E: for the recorder only, see `CommRecord.rows_E`.
    """
    out_PX = torch.empty_like(x_PX)
    with _exchange(probe, x_PX, (1,) * x_PX.shape[0], (1,) * x_PX.shape[0], None, rows_E):
        dist.all_to_all_single(out_PX, x_PX, group=group)
    return out_PX


def exchange_rows(
    x_RD: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: Group,
    probe: Probe | None = None,
    *,
    rows_E: Tensor | None = None,
    direction: Direction | None = None,
) -> Tensor:
    """Uneven all-to-all: the first send[0] rows go to rank 0 of the group and so on; returns what arrives, in rank order.

    On gloo every receive is posted before any send: its own all-to-all does it the other way round and reaches about half of a
    link.
    rows_E: for the recorder only, see `CommRecord.rows_E`.
    """
    out_XD = x_RD.new_empty(sum(receive), *x_RD.shape[1:])
    x_RD = x_RD[: sum(send)].contiguous()
    with _exchange(probe, x_RD, send, receive, direction, rows_E) as span:
        if dist.get_backend(group) != "gloo":
            dist.all_to_all_single(out_XD, x_RD, list(receive), list(send), group=group)
        else:
            _exchange_on_gloo(out_XD, x_RD, send, receive, group, span)
    return out_XD


def _exchange_on_gloo(
    out_XD: Tensor, x_RD: Tensor, send: Sequence[int], receive: Sequence[int], group: Group, span: Span | None
) -> None:
    me = dist.get_rank(group)
    outgoing, incoming = x_RD.split(list(send)), out_XD.split(list(receive))
    incoming[me].copy_(outgoing[me])
    peers = [(me + step) % len(send) for step in range(1, len(send))]
    sources = [p for p in peers if receive[p]]
    works = [dist.irecv(incoming[p], group=group, group_src=p) for p in sources]
    works += [dist.isend(outgoing[p], group=group, group_dst=p) for p in peers if send[p]]
    for index, work in enumerate(works):
        assert work is not None
        work.wait()
        if span is not None and index < len(sources):
            span.arrived(sources[index])


def _exchange(
    probe: Probe | None,
    x_RD: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    direction: Direction | None,
    rows_E: Tensor | None,
) -> AbstractContextManager[Span | None]:
    """A span around an exchange of rows, or of blocks along the first dim; without a probe, nothing."""
    if probe is None:
        return nullcontext()
    row_bytes = x_RD.element_size() * math.prod(x_RD.shape[1:])
    return probe.span("all_to_all", direction=direction, send=send, receive=receive, row_bytes=row_bytes, rows_E=rows_E)


class ExchangeRows(torch.autograd.Function):
    """`exchange_rows`, with gradients going the other way."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        group: Group,
        probe: Probe | None = None,
        rows_E: Tensor | None = None,
    ) -> Tensor:
        ctx.args, ctx.rows = (receive, send, group, probe), x_RD.shape[0]
        return exchange_rows(x_RD, send, receive, group, probe, rows_E=rows_E, direction="forward")

    @staticmethod
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor | None, ...]:
        grad_RD = exchange_rows(grad_XD, *ctx.args, direction="backward")
        if ctx.rows > grad_RD.shape[0]:
            # rows that did not travel
            grad_RD = torch.cat([grad_RD, grad_RD.new_zeros(ctx.rows - grad_RD.shape[0], *grad_RD.shape[1:])])
        return grad_RD, None, None, None, None, None
