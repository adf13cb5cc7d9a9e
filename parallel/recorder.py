"""Every collective of a training step, as this rank saw it: what, with whom, how many bytes, and when.

A `CommRecorder` belongs to one rank. Whatever communicates holds a `Probe`, made once by `probe_for` with all that does not
change between calls (axis, group, purpose, layer), and opens a `Span` around each call. Spans go into a ring of fixed size, so
that recording never grows, and their times are marks of a `Clock`, which are read when somebody asks, so that it never waits.
Without a recorder the probe is None and costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from .comm_record import CommRecord, Direction, Op
from .recorder_clock import Clock, CudaClock, HostClock, Mark

_NOTHING = nullcontext()
CAPACITY = 1 << 13
"""Spans that a ring holds: some tens of steps of a small model, at least one of a large one."""


class _Group:
    """One communicator of this rank: its members, and how many collectives it has begun here."""

    __slots__ = ("axis", "calls", "here", "members")

    def __init__(self, axis: str, members: tuple[int, ...], here: int):
        self.axis, self.members, self.here, self.calls = axis, members, here, 0


class Span:
    """One collective under way; a context manager around a call that returns when it has ended.

    For asynchronous work use `launched`, or `launch` and `waited`.
    """

    __slots__ = (
        "arrivals",
        "begun",
        "call",
        "direction",
        "done_before",
        "ended",
        "failed",
        "nbytes",
        "op",
        "probe",
        "receive",
        "row_bytes",
        "rows_E",
        "send",
        "seq",
        "step",
        "waiting",
    )

    def __init__(
        self,
        probe: Probe,
        op: Op,
        nbytes: int,
        direction: Direction | None,
        send: Sequence[int],
        receive: Sequence[int],
        row_bytes: int,
        rows_E: Tensor | None,
    ):
        self.probe, self.op, self.nbytes, self.rows_E = probe, op, nbytes, rows_E
        self.send, self.receive, self.row_bytes = send, receive, row_bytes
        self.direction: Direction = direction or probe.recorder.direction
        self.begun: Mark | None = None
        self.waiting: Mark | None = None
        self.ended: Mark | None = None
        self.arrivals: list[Mark | None] | None = None
        self.failed = self.done_before = False
        self.step = self.seq = self.call = -1

    def __enter__(self) -> Span:
        self.probe.recorder.admit(self)
        self.begun = self.waiting = self.probe.recorder.clock.mark()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.failed = kind is not None
        self.ended = self.probe.recorder.clock.mark()

    def launch(self) -> Span:
        """It begins, and nobody waits for it yet: see `waited`."""
        self.__enter__()
        self.waiting = None
        return self

    def arrived(self, member: int) -> None:
        """Rows of this member of the group are here."""
        if self.arrivals is None:
            self.arrivals = [None] * len(self.probe.group.members)
        self.arrivals[member] = self.probe.recorder.clock.mark()

    def complete(self) -> bool:
        """Whether all marks can be read."""
        return self.ended is not None and self.probe.recorder.clock.ready(self.ended)

    def record(self) -> CommRecord:
        """The finished span, its bytes counted and its marks read."""
        p, seconds = self.probe, self.probe.recorder.clock.seconds
        assert self.begun is not None and self.ended is not None
        sent, received = self.traffic()
        return CommRecord(
            step=self.step,
            seq=self.seq,
            axis=p.group.axis,
            members=p.group.members,
            call=self.call,
            op=self.op,
            what=p.what,
            layer=p.layer,
            direction=self.direction,
            sent=sent,
            received=received,
            begin_s=seconds(self.begun),
            wait_s=None if self.waiting is None else seconds(self.waiting),
            end_s=seconds(self.ended),
            exact_end=not self.done_before,
            failed=self.failed,
            rows_E=None if self.rows_E is None else tuple(self.rows_E.tolist()),
            arrivals_s=None if self.arrivals is None else tuple(None if m is None else seconds(m) for m in self.arrivals),
        )

    def traffic(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bytes (sent to, received from) each member; see `CommRecord`."""
        size, here = len(self.probe.group.members), self.probe.group.here
        if self.op == "all_to_all":
            return tuple(n * self.row_bytes for n in self.send), tuple(n * self.row_bytes for n in self.receive)
        shares = {"all_gather": self.nbytes, "reduce_scatter": -(-self.nbytes // size), "all_reduce": -(-2 * self.nbytes // size)}
        each = tuple(0 if p == here else shares[self.op] for p in range(size))
        return each, each


class Probe:
    """Where one door of one layer reports to. what: purpose; layer: index of the block, None outside; see `CommRecord`."""

    __slots__ = ("group", "layer", "recorder", "what")

    def __init__(self, recorder: CommRecorder, group: _Group, what: str, layer: int | None):
        self.recorder, self.group, self.what, self.layer = recorder, group, what, layer

    def span(
        self,
        op: Op,
        nbytes: int = 0,
        *,
        direction: Direction | None = None,
        send: Sequence[int] = (),
        receive: Sequence[int] = (),
        row_bytes: int = 0,
        rows_E: Tensor | None = None,
    ) -> Span:
        """A span to enter around the call.

        nbytes: of this rank's part (all_gather), or of its whole input. send, receive, row_bytes: for an all-to-all, rows to and
        from each member and bytes of one. direction: None = that of the recorder. rows_E: kept, not copied; do not write to it.
        """
        return Span(self, op, nbytes, direction, send, receive, row_bytes, rows_E)


class CommRecorder:
    """The collectives of one rank, newest last, in a ring of `capacity` spans.

    Args:
        rank: this rank.
        device: whose work is timed: "cuda" by events on the streams, read when they have passed; others by the host's clock.
        capacity: spans kept; the oldest are overwritten, and `dropped` counts those that were never read.
        clock: instead of that of the device.

    The engine sets `direction`, of records whose door does not know it, and `sums_over_replicas`, whether backward adds gradients
    over replicas.
    """

    def __init__(self, rank: int, device: torch.device, *, capacity: int = CAPACITY, clock: Clock | None = None):
        if capacity < 1:
            raise ValueError(f"capacity = {capacity}: a ring holds at least 1 span")
        self.rank, self.capacity = rank, capacity
        self.clock: Clock = clock or (CudaClock() if device.type == "cuda" else HostClock())
        self.step = 0
        self.direction: Direction = "forward"
        self.sums_over_replicas = True
        self.begun = 0
        self.dropped = 0
        self._taken = 0
        self._ring: list[Span | None] = [None] * capacity
        self._groups: dict[tuple[str, tuple[int, ...]], _Group] = {}

    def start_step(self, step: int) -> None:
        """Records from here on belong to this optimizer step."""
        self.step, self.direction = step, "forward"

    def anchor(self) -> None:
        """Tell the clock that the host has just waited for the device: then both clocks can be compared for free."""
        self.clock.anchor()

    @contextmanager
    def during(self, direction: Direction) -> Iterator[None]:
        """Records inside are of this direction, unless their door knows better."""
        before, self.direction = self.direction, direction
        try:
            yield
        finally:
            self.direction = before

    def probe(self, axis: str, group: dist.ProcessGroup, what: str, layer: int | None = None) -> Probe:
        """A probe for one purpose. Probes of the same axis and members count their calls together."""
        members = tuple(dist.get_process_group_ranks(group))
        key = (axis, members)
        if key not in self._groups:
            self._groups[key] = _Group(axis, members, members.index(self.rank))
        return Probe(self, self._groups[key], what, layer)

    def admit(self, span: Span) -> None:
        """Number a span that begins and put it into the ring."""
        span.step, span.seq, span.call = self.step, self.begun, span.probe.group.calls
        span.probe.group.calls += 1
        slot = self.begun % self.capacity
        if self._ring[slot] is not None and self.begun - self.capacity >= self._taken:
            self.dropped += 1
        self._ring[slot] = span
        self.begun += 1

    def spans(self, first: int = 0) -> list[Span]:
        """Spans in the ring from number `first` on, oldest first; some may be under way."""
        start = max(first, self.begun - self.capacity)
        found = (self._ring[n % self.capacity] for n in range(start, self.begun))
        return [span for span in found if span is not None]

    def calls(self) -> dict[tuple[str, tuple[int, ...]], int]:
        """Collectives begun, by (axis, members)."""
        return {key: group.calls for key, group in list(self._groups.items())}

    def records(self, *, step: int | None = None) -> list[CommRecord]:
        """Finished collectives in the ring, of one step or of all."""
        return [s.record() for s in self.spans() if (step is None or s.step == step) and s.complete()]

    def take(self) -> list[CommRecord]:
        """Finished collectives that were not taken before. Stops at the first that is under way: the next call begins with it."""
        taken = []
        for span in self.spans(self._taken):
            if not span.complete():
                break
            taken.append(span.record())
            self._taken = span.seq + 1
        return taken


def probe_for(
    recorder: CommRecorder | None, axis: str, group: dist.ProcessGroup, what: str, layer: int | None = None
) -> Probe | None:
    """`recorder.probe(...)`, None without a recorder: doors hold what this returns and pass it on."""
    return None if recorder is None else recorder.probe(axis, group, what, layer)


def recorded(
    probe: Probe | None, op: Op, tensor: Tensor | None = None, direction: Direction | None = None
) -> AbstractContextManager[object]:
    """A span around a call on `tensor` (of an all-gather this rank's part, else the whole input); without a probe, nothing."""
    if probe is None:
        return _NOTHING
    return probe.span(op, 0 if tensor is None else tensor.numel() * tensor.element_size(), direction=direction)


def launched(
    start: Callable[[], dist.Work | None], probe: Probe | None, op: Op, tensor: Tensor, direction: Direction | None = None
) -> Callable[[], None]:
    """Begin asynchronous work on `tensor` by `start` and return what waits for it. Waiting again does nothing.

    The time from here to the wait is hidden, that of the wait is exposed.
    """
    span = None if probe is None else probe.span(op, tensor.numel() * tensor.element_size(), direction=direction).launch()
    work = start()
    assert work is not None, "the work has to be started with async_op=True, on a member of the group"
    return functools.partial(waited, work, span)


def waited(work: dist.Work, span: Span | None) -> None:
    """Wait for work whose span began by `Span.launch`, None without a recorder."""
    if span is None or span.ended is not None:
        work.wait()
        return
    clock = span.probe.recorder.clock
    span.done_before = clock.host and work.is_completed()
    span.waiting = clock.mark()
    try:
        work.wait()
    except BaseException:
        span.failed = True
        raise
    finally:
        span.ended = clock.mark()
