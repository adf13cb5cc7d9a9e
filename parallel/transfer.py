"""Rows under way between ranks: an exchange that is started in one place and waited for in another, forward and backward.

Forward, the computation between `start` and `finish` runs while rows travel. Backward mirrors it: the gradient of `finish` starts
the way back, the gradient of `start` waits for it, and what autograd runs between the two (later units first) hides it.
Neighbouring units may share an exchange, in either direction (`transfers`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..moe.dispatch import Pieces
from .comm_record import Direction
from .recorder import Probe, Span
from .wire import Wire


class Exchange:
    """One uneven all-to-all under way: the first send[0] rows go to rank 0 of the group and so on; they arrive in rank order.

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
        self.wire, self.unpacked = wire, (x_RD.shape[-1], x_RD.dtype)
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
        """The rows that have arrived."""
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
        arrived, self.works, self.rows, self.arriving = self.arriving, [], self.rows[:0], self.arriving[:0]
        return arrived if self.wire is None else self.wire.unpack(arrived, *self.unpacked)


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


class Convoy:
    """One exchange, in one direction, of the rows of several transfers. It leaves when the last of them has handed over its rows,
    and is waited for when the first of them wants what came; what it carries for a rank lies in the order of the transfers.

    size: transfers that will join. wire: as for `Transfer`.
    """

    def __init__(self, size: int, group: dist.ProcessGroup, probe: Probe | None, direction: Direction, wire: Wire | None):
        self.size, self.group, self.probe, self.direction, self.wire = size, group, probe, direction, wire
        self.sends: list[Sequence[int]] = []
        self.receives: list[Sequence[int]] = []
        self.rows_E: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}
        self.exchange: Exchange | None = None
        self.arrived: dict[int, Tensor] = {}

    def join(self, send: Sequence[int], receive: Sequence[int], rows_E: Tensor | None = None) -> Seat:
        """A place for the rows of one transfer."""
        self.sends.append(send)
        self.receives.append(receive)
        if rows_E is not None:
            self.rows_E = rows_E if self.rows_E is None else self.rows_E + rows_E
        return Seat(self, len(self.sends) - 1)

    def put(self, place: int, x_RD: Tensor) -> None:
        self.waiting[place] = x_RD
        if len(self.waiting) < self.size:
            return
        rows_RD, send, receive = x_RD, self.sends[0], self.receives[0]
        if self.size > 1:
            blocks = [self.waiting[i][: sum(sizes)].split(list(sizes)) for i, sizes in enumerate(self.sends)]
            rows_RD = torch.cat([block for of_rank in zip(*blocks, strict=True) for block in of_rank])
            send, receive = ([sum(of_rank) for of_rank in zip(*each, strict=True)] for each in (self.sends, self.receives))
        self.waiting = {}
        self.exchange = Exchange(rows_RD, send, receive, self.group, self.probe, self.rows_E, self.direction, self.wire)

    def take(self, place: int) -> Tensor:
        if self.exchange is not None:
            rows_RD, self.exchange = self.exchange.wait(), None
            if self.size == 1:
                return rows_RD
            blocks = rows_RD.split([n for of_rank in zip(*self.receives, strict=True) for n in of_rank])
            self.arrived = {i: torch.cat(blocks[i :: self.size]) for i in range(self.size)}
        assert place in self.arrived, "waited for rows that were never sent"
        return self.arrived.pop(place)


@dataclass(frozen=True)
class Seat:
    """The place of one transfer in a convoy."""

    convoy: Convoy
    place: int

    def put(self, x_RD: Tensor) -> Tensor:
        """Hand over rows; returns a tensor of the shape of those that will arrive, without memory for them."""
        self.convoy.put(self.place, x_RD)
        return without_values(x_RD, sum(self.convoy.receives[self.place]))

    def take(self) -> Tensor:
        """The rows that arrived, in rank order."""
        return self.convoy.take(self.place)


def without_values(x_RD: Tensor, rows: int) -> Tensor:
    """A tensor [rows, D] like `x_RD` that takes no memory, and that nobody may read."""
    return x_RD.new_empty(()).expand(rows, *x_RD.shape[1:])


class Transfer:
    """One exchange of rows [R, D] with gradients that go the other way; used once.

    Args:
        send, receive: rows to and from each rank of the group; rows beyond the sum of `send` stay, and get zero gradients.
        probe: where both directions are recorded. rows_E: for the recorder, see `CommRecord.rows_E`.
        wire: how rows travel, and their gradients; None = as they are.
        convoys: forward and backward, to travel with other transfers; they know group, probe and wire. None = alone.
    """

    def __init__(
        self,
        send: Sequence[int],
        receive: Sequence[int],
        group: dist.ProcessGroup,
        probe: Probe | None = None,
        rows_E: Tensor | None = None,
        wire: Wire | None = None,
        convoys: tuple[Convoy, Convoy] | None = None,
    ):
        there, back = convoys or (Convoy(1, group, probe, "forward", wire), Convoy(1, group, probe, "backward", wire))
        self.there, self.back = there.join(send, receive, rows_E), back.join(receive, send)

    def start(self, x_RD: Tensor) -> Tensor:
        """Begin; returns what `finish` takes, whose values mean nothing."""
        return _Start.apply(x_RD, self)

    def finish(self, arriving_XD: Tensor) -> Tensor:
        """Wait; returns the rows that arrived, in rank order."""
        return _Finish.apply(arriving_XD, self)


def transfers(
    pieces: Pieces,
    sizes: Sequence[tuple[Sequence[int], Sequence[int]]],
    group: dist.ProcessGroup,
    probe: Probe | None = None,
    rows_E: Sequence[Tensor] | None = None,
    wire: Wire | None = None,
) -> list[Transfer]:
    """A transfer for each unit, of (send, receive) rows, in `pieces.forward` exchanges and `pieces.backward` on the way back.

    Units start in their order, and each is finished in backward as autograd comes to it: the last first. A unit may be waited
    for only when all that share its exchange have been started. rows_E: of each unit.

    Raises:
        ValueError: sizes of another number of units.
    """
    if len(sizes) != pieces.units:
        raise ValueError(f"rows of {len(sizes)} units, but tokens are cut into {pieces.units}")
    ways: list[list[Convoy]] = []
    directions: tuple[tuple[int, Direction], ...] = ((pieces.forward, "forward"), (pieces.backward, "backward"))
    for exchanges, direction in directions:
        together = pieces.units // exchanges
        shared = [Convoy(together, group, probe, direction, wire) for _ in range(exchanges)]
        ways.append([convoy for convoy in shared for _ in range(together)])
    each_E: Sequence[Tensor | None] = rows_E if rows_E is not None else [None] * len(sizes)
    units = zip(sizes, each_E, *ways, strict=True)
    return [Transfer(s, r, group, rows_E=counts_E, convoys=(there, back)) for (s, r), counts_E, there, back in units]


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer, ctx.rows = transfer, x_RD.shape[0]
        return transfer.there.put(x_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, None]:
        # the argument only says that _Finish has handed over the gradients
        grad_RD = ctx.transfer.back.take()
        missing = ctx.rows - grad_RD.shape[0]
        return (torch.cat([grad_RD, grad_RD.new_zeros(missing, *grad_RD.shape[1:])]) if missing else grad_RD), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving_XD: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.there.take()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.back.put(grad_XD)
        # what arrives has another number of rows than autograd expects here; it is handed on by _Start
        return without_values(grad_XD, grad_XD.shape[0]), None
