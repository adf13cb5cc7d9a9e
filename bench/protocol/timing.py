"""Times of several contenders, taken in turns in one process, so that a machine that changes its speed changes it for all.

On a GPU a sample is the time between two events around one call, after 256 MiB were written so that the L2 cache holds nothing
of use, and with nothing else under way. On a CPU (smoke runs) it is wall time.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]

FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Budget:
    """How long to measure: `warm_ups` calls each, then `samples` turns; a contender that has taken `enough_ms` leaves after
    `least` of them."""

    warm_ups: int = 10
    samples: int = 50
    enough_ms: float = 500.0
    least: int = 10


@dataclass(frozen=True)
class Samples:
    """Milliseconds of each turn, in order; or `why_not`. clock_mhz, power_w: of the GPU meanwhile, None where not said."""

    ms: tuple[float, ...] = ()
    why_not: str | None = None
    clock_mhz: float | None = None
    power_w: float | None = None


def quantiles(ms: Sequence[float]) -> tuple[float, float, float]:
    """The 10th, 50th and 90th percentile of at least one sample, by linear interpolation."""
    if len(ms) == 1:
        return ms[0], ms[0], ms[0]
    cuts = statistics.quantiles(ms, n=10, method="inclusive")
    return cuts[0], cuts[4], cuts[8]


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The median of (their time / our time) over the turns that both took part in."""
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=False))


def one_line(error: BaseException) -> str:
    """The kind and first line of an error, short enough for a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


class Clock:
    """Takes samples on one device: holds the memory that flushes the cache and the events."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cuda = device.type == "cuda"
        self.flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device) if self.cuda else None

    def sample_ms(self, call: Call) -> float:
        """One call, from a cold cache."""
        if self.flush is None:
            start_s = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start_s)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # nothing of the contender before, so that a contender's time does not depend on whom it follows
        torch.cuda.synchronize(self.device)
        self.flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def take_turns(calls: Mapping[str, Call], clock: Clock, budget: Budget, gauges: Gauges | None = None) -> dict[str, Samples]:
    """Samples of every call. One that raises leaves, and carries the reason (out of memory, for example)."""
    why_not: dict[str, str] = {}
    taken: dict[str, list[float]] = {name: [] for name in calls}

    def attempt(name: str, sample: Call) -> None:
        try:
            sample()
        except Exception as error:
            # whatever another project's code raises: the table shows it, and the others go on
            why_not[name] = one_line(error)

    def turn(name: str) -> None:
        taken[name].append(clock.sample_ms(calls[name]))

    for _ in range(budget.warm_ups):
        for name in [n for n in calls if n not in why_not]:
            attempt(name, calls[name])
    # a collection in the middle of a sample would be charged to whoever is timed: between rounds instead, of new objects only
    gc.freeze()
    gc.disable()
    try:
        for number in range(budget.samples):
            gc.collect()
            for name in [n for n in calls if n not in why_not and not _has_enough(taken[n], budget)]:
                attempt(name, lambda name=name: turn(name))  # type: ignore[misc]
            if gauges is not None and number % 10 == 5:
                gauges.read()
    finally:
        gc.enable()
        gc.unfreeze()
    clock_mhz, power_w = gauges.take() if gauges is not None else (None, None)
    return {
        name: Samples(why_not=why_not[name]) if name in why_not else Samples(tuple(ms), None, clock_mhz, power_w)
        for name, ms in taken.items()
    }


def _has_enough(ms: Sequence[float], budget: Budget) -> bool:
    return len(ms) >= budget.least and sum(ms) >= budget.enough_ms


def replay_ms(call: Call, clock: Clock, budget: Budget) -> float | str:
    """Median milliseconds of a CUDA graph of the call, one replay after the other, the cache as the last one left it; or why not.

    Without the host's time for launches, which no sample of a small kernel is free of.
    """
    if not clock.cuda:
        return "no CUDA"
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream(clock.device)
        side.wait_stream(torch.cuda.current_stream(clock.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream(clock.device).wait_stream(side)
        with torch.cuda.graph(graph):
            held = call()
    except Exception as error:
        return one_line(error)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(budget.samples)]
    graph.replay()
    for begin, end in pairs:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize(clock.device)
    # the graph writes into the memory of these tensors
    del held
    graph.reset()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


class Gauges:
    """Clock and power of a GPU from its driver, read now and then; None where the driver does not say."""

    def __init__(self, device: torch.device):
        self._handle: Any = None
        self._clocks: list[float] = []
        self._powers: list[float] = []
        if device.type != "cuda":
            return
        try:
            import pynvml
        except ImportError:
            return
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        except pynvml.NVMLError:
            self._handle = None  # a virtual machine may not be let at it; the table shows that nothing was said

    def driver(self) -> str:
        """The driver's version, or "n/a"."""
        if self._handle is None:
            return "n/a"
        import pynvml

        return str(pynvml.nvmlSystemGetDriverVersion())

    def read(self) -> None:
        """Note the present clock and power."""
        if self._handle is None:
            return
        import pynvml

        for store, ask in (
            (self._clocks, lambda: float(pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_SM))),
            (self._powers, lambda: pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3),
        ):
            try:
                store.append(ask())
            except pynvml.NVMLError:
                continue  # this one is not said on this machine

    def take(self) -> tuple[float | None, float | None]:
        """Medians since the last take: (SM clock in MHz, power in W)."""
        both = tuple(statistics.median(x) if x else None for x in (self._clocks, self._powers))
        self._clocks, self._powers = [], []
        return both[0], both[1]
