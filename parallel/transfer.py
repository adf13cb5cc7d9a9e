"""Rows under way between ranks: an exchange that is started in one place and waited for in another, forward and backward.

Forward, the computation between `start` and `finish` runs while rows travel. Backward mirrors it: the gradient of `finish` starts
the way back, the gradient of `start` waits for it, and what autograd runs between the two (later pieces first) hides it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .comm_record import Direction
from .recorder import Probe, Span
from .wire import Wire


class Exchange:
    """One uneven all-to-all under way: the first send[0] rows go to rank 0 of the group and so on; `out` receives in rank order.

    On gloo every receive is posted before any send: its own all-to-all does it the other way round and reaches about half of a
    link.
    wire: how rows [R, D] travel; None = as they are.
    """

    def __init__(
        self,
        x_RD: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        group: dist.ProcessGroup,
        probe: Probe | None,
        rows_E: Tensor | None,
        direction: Direction | None,
        wire: Wire | None = None,
    ):
        rows_RD = x_RD[: sum(send)]
        # both kept until the end: the transport reads one and writes the other
        self.rows = rows_RD.contiguous() if wire is None else wire.pack(rows_RD)
        self.arriving = self.rows.new_empty(sum(receive), *self.rows.shape[1:])
        self.wire = wire
        # what is packed has no rows before it has come: their shape, without memory for them
        self.out = self.arriving if wire is None else x_RD.new_empty(()).expand(sum(receive), *x_RD.shape[1:])
        self.sources: list[int] = []
        self.span: Span | None = None
        if probe is not None:
            row_bytes = self.rows.element_size() * math.prod(self.rows.shape[1:])
            traffic: dict[str, Any] = {"send": send, "receive": receive, "row_bytes": row_bytes, "rows_E": rows_E}
            self.span = probe.span("all_to_all", direction=direction, **traffic).__enter__()
        if dist.get_backend(group) == "gloo":
            self.works = self._start_on_gloo(send, receive, group)
        else:
            splits = (list(receive), list(send))
            self.works = [dist.all_to_all_single(self.arriving, self.rows, *splits, group=group, async_op=True)]

    def _start_on_gloo(self, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> list[dist.Work | None]:
        me = dist.get_rank(group)
        outgoing, incoming = self.rows.split(list(send)), self.arriving.split(list(receive))
        peers = [(me + step) % len(send) for step in range(1, len(send))]
        self.sources = [p for p in peers if receive[p]]
        works = [dist.irecv(incoming[p], group=group, group_src=p) for p in self.sources]
        works += [dist.isend(outgoing[p], group=group, group_dst=p) for p in peers if send[p]]
        incoming[me].copy_(outgoing[me])
        return works

    def wait(self) -> Tensor:
        """`out`, filled."""
        span = self.span
        if span is not None:
            clock = span.probe.recorder.clock
            span.done_before = clock.host and all(work is not None and work.is_completed() for work in self.works)
            span.waiting = clock.mark()
        try:
            for index, work in enumerate(self.works):
                assert work is not None
                work.wait()
                if span is not None and index < len(self.sources):
                    span.arrived(self.sources[index])
        except BaseException:
            if span is not None:
                span.failed = True
            raise
        finally:
            if span is not None:
                span.ended = span.probe.recorder.clock.mark()
        if self.wire is not None:
            self.out = self.wire.unpack(self.arriving, self.out.shape[1], self.out.dtype)
        self.works, self.rows, self.arriving = [], self.out, self.out
        return self.out


def exchange_rows(
    x_RD: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: dist.ProcessGroup,
    probe: Probe | None = None,
    direction: Direction | None = None,
) -> Tensor:
    """An `Exchange` that is waited for at once: what arrives, in rank order. Not differentiable; `Transfer` is."""
    return Exchange(x_RD, send, receive, group, probe, None, direction).wait()


class Transfer:
    """One exchange of rows [R, D] with gradients that go the other way; used once.

    Args:
        send, receive: rows to and from each rank of the group; rows beyond the sum of `send` stay, and get zero gradients.
        probe: where both directions are recorded. rows_E: for the recorder, see `CommRecord.rows_E`.
        wire: how rows travel, and their gradients; None = as they are.
    """

    def __init__(
        self,
        send: Sequence[int],
        receive: Sequence[int],
        group: dist.ProcessGroup,
        probe: Probe | None = None,
        rows_E: Tensor | None = None,
        wire: Wire | None = None,
    ):
        self.send, self.receive, self.group, self.probe, self.rows_E = send, receive, group, probe, rows_E
        self.wire = wire
        self.flight: Exchange | None = None

    def start(self, x_RD: Tensor) -> Tensor:
        """Begin; returns what `finish` takes, whose values mean nothing before."""
        return _Start.apply(x_RD, self)

    def finish(self, arriving_XD: Tensor) -> Tensor:
        """Wait; returns the rows that arrived, in rank order."""
        return _Finish.apply(arriving_XD, self)

    def launch(self, x_RD: Tensor, backward: bool) -> Tensor:
        sizes = (self.receive, self.send) if backward else (self.send, self.receive)
        direction: Direction = "backward" if backward else "forward"
        rows_E = None if backward else self.rows_E
        self.flight = Exchange(x_RD, *sizes, self.group, self.probe, rows_E, direction, self.wire)
        return self.flight.out

    def wait(self) -> Tensor:
        assert self.flight is not None, "waited for rows that were never sent"
        out, self.flight = self.flight.wait(), None
        return out


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer, ctx.rows = transfer, x_RD.shape[0]
        return transfer.launch(x_RD, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, None]:
        # the argument only says that _Finish has started the way back
        grad_RD = ctx.transfer.wait()
        missing = ctx.rows - grad_RD.shape[0]
        return (torch.cat([grad_RD, grad_RD.new_zeros(missing, *grad_RD.shape[1:])]) if missing else grad_RD), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving_XD: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.wait().view_as(arriving_XD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.launch(grad_XD, backward=True)
        # what arrives has another number of rows than autograd expects here; it is handed on by _Start
        return grad_XD, None
