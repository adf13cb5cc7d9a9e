"""Time for the recorder: marks that cost no waiting, and how far the clocks of the ranks are apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

Mark = Any
"""What a clock gives for a moment; only the clock that made it can read it."""


class Clock(Protocol):
    """host: marks are moments of the host, not of a stream of work on a device."""

    host: bool

    def mark(self) -> Mark:
        """This moment: of the host, or of the current stream."""
        ...

    def ready(self, mark: Mark) -> bool:
        """Whether the moment has passed, without waiting for it."""
        ...

    def seconds(self, mark: Mark) -> float:
        """The moment in seconds on the host's clock; it must have passed."""
        ...

    def anchor(self) -> None:
        """Called when the device has nothing left to do."""
        ...


class HostClock:
    """For collectives that return when they have ended, as gloo's do. now: seconds, never going back."""

    host = True

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.mark = now

    def ready(self, mark: float) -> bool:
        return True

    def seconds(self, mark: float) -> float:
        return mark

    def anchor(self) -> None:
        """The host has one clock."""


class CudaClock:
    """CUDA events on the current stream. Nothing waits for them: they are read once they have passed.

    The events' time becomes the host's by anchors: an event and the host's time, taken when the stream is empty. Each mark refers
    to the newest anchor before it, so that neither the drift between both clocks nor the 32-bit floats of `elapsed_time` add up.
    """

    host = False

    def __init__(self) -> None:
        torch.cuda.synchronize()  # once, before training
        self.anchor()

    def mark(self) -> tuple[torch.cuda.Event, tuple[torch.cuda.Event, float]]:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event, self._anchor

    def ready(self, mark: tuple[torch.cuda.Event, Any]) -> bool:
        return bool(mark[0].query())

    def seconds(self, mark: tuple[torch.cuda.Event, tuple[torch.cuda.Event, float]]) -> float:
        event, (base, host_s) = mark
        return host_s + base.elapsed_time(event) / 1e3

    def anchor(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._anchor = (event, time.perf_counter())


@dataclass(frozen=True)
class Offset:
    """Add `offset_s` to a rank's time to get that of rank 0; right to +-error_s."""

    offset_s: float
    error_s: float


def clock_offsets(group: dist.ProcessGroup, rounds: int = 16, now: Callable[[], float] = time.perf_counter) -> tuple[Offset, ...]:
    """How far the clock of each rank of the group is from that of its first, known to all. Collective, through CPU tensors.

    The first rank asks each other rank for its time, `rounds` times, and believes the answer that came back fastest: its time is
    that of the middle of the way, up to half the way (Cristian, Distributed Computing 3, 1989, section 3).
    """
    size, here = dist.get_world_size(group), dist.get_rank(group)
    # only one rank asks at a time: two at once would wait for each other
    found = torch.zeros(size, 2, dtype=torch.float64)
    reading = torch.zeros(1, dtype=torch.float64)
    for peer in range(1, size):
        best = (float("inf"), 0.0)
        for _ in range(rounds if here in (0, peer) else 0):
            if here == peer:
                dist.recv(reading, group=group, group_src=0)
                reading.fill_(now())
                dist.send(reading, group=group, group_dst=0)
                continue
            asked_s = now()
            dist.send(reading, group=group, group_dst=peer)
            dist.recv(reading, group=group, group_src=peer)
            heard_s = now()
            best = min(best, ((heard_s - asked_s) / 2, (asked_s + heard_s) / 2 - float(reading)))
        if here == 0:
            found[peer] = torch.tensor([best[1], best[0]])
    if size > 1:
        dist.broadcast(found, group=group, group_src=0)
    return tuple(Offset(float(offset_s), float(error_s)) for offset_s, error_s in found)
