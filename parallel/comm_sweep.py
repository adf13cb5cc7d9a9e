"""How long collectives take by size: a sweep over groups of ranks with aligned starts, checked data and a link model for each.

Every repetition starts behind a barrier, and takes from the last start in a group to the last end: waiting for a rank that came
late is no transfer. How far apart the starts were is given beside it (skew). Both are read from the aligned clocks of the ranks;
starts that are closer together than these clocks are known count as one. The first call of each collective makes connections and
is given apart. All decisions are taken from agreed times, so all ranks stop at the same size.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .comm_ops import OPERATIONS, Call, Operation, Seat
from .cost_model import LinkFit, fit_link
from .recorder_clock import Clock, CudaClock, HostClock, Offset, clock_offsets

MIN_ITERS = 3
"""Repetitions of a size, at least, when time is short."""
MIN_SIZES = 4
"""Sizes that are measured however short the time is: a link model has three numbers."""
CLOCK_ROUNDS, CLOCK_DRIFT_S = 8, 0.005
"""Readings of each clock; and what it may change against the first's from one operation to the next, beyond their uncertainty."""


@dataclass(frozen=True)
class SweepPlan:
    """What to measure. sizes: ascending bytes, see `comm_ops` for what they count. budget_s: for all operations together."""

    operations: tuple[str, ...] = tuple(OPERATIONS)
    sizes: tuple[int, ...] = tuple(8192 * 2**power for power in range(14))
    iters: int = 20
    warmup: int = 5
    imbalance: float = 2.0
    dtype: torch.dtype = torch.float32
    budget_s: float = 60.0


@dataclass(frozen=True)
class Row:
    """One collective at one size.

    ranks: of one group. size, count: bytes and elements, see `comm_ops`. time_s, p95_s: over `iters` repetitions, from the last
    start to the last end. fastest_rank_s, slowest_rank_s: over ranks, of their medians, each until its own end. skew_s: median of
    last start - first start.
    wire_mean, wire_max: bytes that cross the wire, over the ranks of a group. wrong: elements with wrong data, on all ranks.
    """

    operation: str
    scope: str
    ranks: int
    size: int
    count: int
    dtype: str
    iters: int
    time_s: float
    p95_s: float
    fastest_rank_s: float
    slowest_rank_s: float
    skew_s: float
    wire_mean: float
    wire_max: float
    wrong: int

    @property
    def algbw(self) -> float:
        """S / time, bytes/s."""
        return self.size / self.time_s

    @property
    def busbw(self) -> float:
        """algbw times a factor by the size of the group, so that it can be compared with the rate of a link; as in nccl-tests."""
        return self.algbw * OPERATIONS[self.operation].factor(self.ranks)


@dataclass(frozen=True)
class Curve:
    """One collective on one kind of group over all sizes.

    fit: model of the medians by `wire_max` bytes, what a job gets; fastest: of the fastest iterations, what the links can do when
    nothing else disturbs. None for fewer than three sizes. first_call_s: with making of connections. stopped: the first size that
    there was no time for.
    """

    operation: str
    scope: str
    ranks: int
    rows: tuple[Row, ...]
    fit: LinkFit | None
    fastest: LinkFit | None
    first_call_s: float
    stopped: int | None = None


@dataclass(frozen=True)
class Swept:
    """curves: alike on all ranks. clock_error_s: of starts on the ranks' clocks; None: a clock changed, no skew is known."""

    curves: tuple[Curve, ...]
    clock_error_s: float | None
    seconds: float


class Stopwatch:
    """Times that all ranks agree on. Collective, over the default group.

    clock_error_s: by how much the ranks' clocks may differ after `synchronise`, at most; None once one has jumped.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.clock: Clock = CudaClock() if device.type == "cuda" else HostClock()
        self.offsets: tuple[Offset, ...] = ()
        self.clock_error_s: float | None = 0.0

    def synchronise(self) -> None:
        """Compare the ranks' clocks, now and again: they drift apart."""
        assert dist.group.WORLD is not None
        before, self.offsets = self.offsets, clock_offsets(dist.group.WORLD, CLOCK_ROUNDS)
        for a, b in zip(before, self.offsets, strict=False):
            if abs(a.offset_s - b.offset_s) > a.error_s + b.error_s + CLOCK_DRIFT_S:
                self.clock_error_s = None
        if self.clock_error_s is not None:
            self.clock_error_s = max(self.clock_error_s, *(offset.error_s for offset in self.offsets))

    def align(self) -> None:
        """Until every rank is here, and has nothing under way."""
        dist.all_reduce(torch.zeros(1, device=self.device))
        self.settle()

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.clock.anchor()

    def time(self, call: Call) -> tuple[float, float]:
        """(seconds, start on the first rank's clock) of one run that starts on all ranks together; each rank has its own."""
        self.align()
        call.ready()
        self.settle()
        begin = self.clock.mark()
        call.run()
        end = self.clock.mark()
        self.settle()
        start_s = self.clock.seconds(begin)
        seconds = self.clock.seconds(end) - start_s
        return seconds, start_s + (self.offsets[dist.get_rank()].offset_s if self.offsets else 0.0)

    def runs(self, call: Call, count: int, group: dist.ProcessGroup | None = None) -> Runs:
        """`count` runs that start on all ranks together. group: those that wait for each other in a run; None = all."""
        marks = [self.time(call) for _ in range(count)]
        starts_s = [start_s if call.timed else -math.inf for _, start_s in marks]
        first_s = [-start_s if call.timed else -math.inf for _, start_s in marks]
        agreed = self.largest([*starts_s, *first_s])
        skews_s = [last + first for last, first in zip(agreed[:count], agreed[count:], strict=True)]
        # another group's late start holds nobody up
        last_s = self.largest(starts_s, group) if call.waits else starts_s
        known_s = math.inf if self.clock_error_s is None else self.clock_error_s
        own = [
            (seconds - max(0.0, late_s - start_s - known_s)) * call.part if call.timed else -math.inf
            for (seconds, start_s), late_s in zip(marks, last_s, strict=True)
        ]
        middle = statistics.median(own)
        *slowest, most, least = self.largest([*own, middle, -middle if call.timed else -math.inf])
        return Runs([max(seconds, 1e-9) for seconds in slowest], -least, most, max(0.0, statistics.median(skews_s)))

    def largest(self, values: Sequence[float], group: dist.ProcessGroup | None = None) -> list[float]:
        """Of each value, the largest over the ranks of the group; None = all."""
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
        found: list[float] = tensor.tolist()
        return found

    def total(self, value: int) -> int:
        """The sum over ranks."""
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor)
        return int(tensor)


@dataclass(frozen=True)
class Runs:
    """seconds: of each run, from the last start to the last end. fastest_s, slowest_s: of ranks' medians. skew_s: of starts."""

    seconds: list[float]
    fastest_s: float
    slowest_s: float
    skew_s: float


def applicable(operation: Operation, seat: Seat) -> bool:
    """Whether it can be measured, and differs from the others, in this seat."""
    if seat.ranks == 1 or (operation.two_levels and seat.levels is None):
        return False
    return not operation.gloo_only or dist.get_backend(seat.group) == "gloo"


def sweep(jobs: Sequence[tuple[Seat, str]], plan: SweepPlan, device: torch.device) -> Swept:
    """Time every (seat, operation). Collective: every rank calls it with seats in the same scopes and the same plan.

    Each operation gets an equal part of the time that is left; within it, repetitions become fewer before sizes are left out.
    """
    start_s = time.perf_counter()
    watch, curves = Stopwatch(device), []
    left_s = plan.budget_s
    for index, (seat, name) in enumerate(jobs):
        job_s = time.perf_counter()
        watch.synchronise()
        curves.append(_curve(seat, name, plan, watch, left_s / (len(jobs) - index)))
        left_s -= watch.largest([time.perf_counter() - job_s])[0]
    watch.synchronise()
    return Swept(tuple(curves), watch.clock_error_s, time.perf_counter() - start_s)


def _curve(seat: Seat, name: str, plan: SweepPlan, watch: Stopwatch, budget_s: float) -> Curve:
    rows: list[Row] = []
    times: list[tuple[float, list[float]]] = []
    first_call_s, stopped = math.nan, None
    left_s = budget_s
    for index, size in enumerate(plan.sizes):
        begin_s = time.perf_counter()
        if len(rows) >= MIN_SIZES and _least_s(rows[-1], size) > left_s:
            stopped = size
            break
        call = OPERATIONS[name].build(seat, size, plan.dtype, watch.device, plan.imbalance)
        if rows and call.size <= rows[-1].size:
            continue  # many ranks: a block has at least one element
        call.fresh()
        once_s = watch.runs(call, 1, seat.group).seconds[0]
        wrong = watch.total(call.wrong())
        first_call_s = once_s if not rows else first_call_s
        share_s = left_s / (len(plan.sizes) - index)
        row, found = _timed(seat, name, call, wrong, plan, watch, share_s)
        rows.append(row)
        times.append((call.wire_max, found))
        left_s -= watch.largest([time.perf_counter() - begin_s])[0]
    fit = fastest = None
    if len({size for size, _ in times}) >= 3:
        fit = fit_link(times, what=name, ranks=seat.ranks)
        fastest = fit_link(times, what=name, ranks=seat.ranks, of="minimum")
    return Curve(name, seat.name, seat.ranks, tuple(rows), fit, fastest, first_call_s, stopped)


def _least_s(last: Row, size: int) -> float:
    """Time for the fewest repetitions of a larger size, with the check of its data."""
    return last.time_s * max(1.0, size / last.size) * (MIN_ITERS + 2)


def _timed(
    seat: Seat, name: str, call: Call, wrong: int, plan: SweepPlan, watch: Stopwatch, share_s: float
) -> tuple[Row, list[float]]:
    once_s = watch.runs(call, 1, seat.group).seconds[0] / call.part
    affordable = int(share_s / once_s)
    iters = max(MIN_ITERS, min(plan.iters, affordable))
    for _ in range(min(plan.warmup, max(0, affordable - iters))):
        watch.time(call)
    found = watch.runs(call, iters, seat.group)
    row = Row(
        operation=name,
        scope=seat.name,
        ranks=seat.ranks,
        size=call.size,
        count=call.count,
        dtype=str(plan.dtype).removeprefix("torch."),
        iters=iters,
        time_s=statistics.median(found.seconds),
        p95_s=percentile(found.seconds, 0.95),
        fastest_rank_s=found.fastest_s,
        slowest_rank_s=found.slowest_s,
        skew_s=found.skew_s,
        wire_mean=call.wire_mean,
        wire_max=call.wire_max,
        wrong=wrong,
    )
    return row, found.seconds


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
