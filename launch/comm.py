"""What the ranks' recorders saw of a step: metrics for every line, and comm.json in the run directory."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..parallel.comm_record import CommRecord
from ..parallel.recorder import CommRecorder
from ..parallel.recorder_analysis import ALL_TO_ALL, Split, aligned, collectives, elapsed_s, totals, traffic_matrix
from ..parallel.recorder_clock import Offset, clock_offsets
from ..parallel.recorder_stall import StallWatch
from .comm_file import CLOCK_SLACK_S, History, Sample, comm_data, disorder_s, write_comm
from .process import Crew

SAMPLES = 8
"""Steps that comm.json is made of: the newest that were sampled. One alone would judge by chance."""
CLOCKS_EVERY = 32
"""Samples after which the clocks of the ranks are compared again."""
UNALIGNED = 64
"""Newest steps that are named in comm.json because their records could not be on one clock."""
DRIFT = 1e-4
"""Of the time since clocks were compared, how far they may have gone apart: crystals stay below."""


def watch_stalls(recorder: CommRecorder | None, crew: Crew, timeout_s: float) -> AbstractContextManager[object]:
    """While the body runs, a collective that takes a quarter of the time-out is accounted for on standard error."""
    if recorder is None or crew.store is None:
        return nullcontext()
    store: dist.Store = crew.store.clone()  # type: ignore[attr-defined]  # known since torch 2.8, missing in its stubs
    return StallWatch(recorder, store, crew.world, timeout_s / 4)


class CoreWait:
    """How long the threads that compute were ready to run while no core was free, per step since the last question.

    They are the main one and those of autograd; others, of the transport, wait without holding up anything.
    """

    def __init__(self, tasks: Path = Path("/proc/self/task"), main: int | None = None):
        self._tasks, self._main = tasks, str(os.getpid() if main is None else main)
        self._before = self._read()
        self._step: int | None = None

    def per_step_s(self, step: int) -> float | None:
        """Mean over the steps since the last call; None at the first, and where the system does not tell."""
        now, steps = self._read(), 0 if self._step is None else step - self._step
        before, self._before, self._step = self._before, now, step
        if now is None or before is None or steps < 1:
            return None
        # a thread that has ended took its count with it
        return sum(max(0, ns - before.get(task, 0)) for task, ns in now.items()) / 1e9 / steps

    def _read(self) -> dict[str, int] | None:
        """Nanoseconds on a run queue, by thread: the second number of schedstat."""
        found = {}
        try:
            for task in self._tasks.iterdir():
                if task.name == self._main or (task / "comm").read_text().startswith("pt_autograd"):
                    found[task.name] = int((task / "schedstat").read_text().split()[1])
        except FileNotFoundError:
            return found or None  # one thread has just ended, or this system keeps no such count
        except (OSError, IndexError, ValueError):
            return None
        return found


class CommLog:
    """Gathers the records of one step from all ranks whenever asked; rank 0 keeps the newest samples and writes them down.

    Call `write` at the end: the file is too slow to be written with every line.

    Args:
        recorder: of this rank.
        group: all ranks; it must carry CPU tensors.
        path: of comm.json.
        hosts: name of each rank's machine; None = not known.
    """

    def __init__(self, recorder: CommRecorder, group: dist.ProcessGroup, path: Path, hosts: Sequence[str] | None = None):
        self.recorder, self.group, self.path = recorder, group, path
        world = dist.get_world_size(group)
        self.hosts = tuple(hosts) if hosts is not None else ("",) * world
        self.offsets: tuple[Offset, ...] = ()
        # the clock that records are made by: on a GPU its moments are already those of the host
        self._now = recorder.clock.mark if recorder.clock.host else time.perf_counter
        self._compared_s = 0.0
        self._samples: deque[Sample] = deque(maxlen=SAMPLES)
        self._history = History(world)
        self._core_wait = CoreWait()
        self._unaligned: dict[int, float] = {}
        self._count = 0
        self._again = True

    def sample(self, step: int) -> dict[str, float]:
        """The `comm/` metrics of this step on rank 0, which writes comm.json at every `SAMPLES`th; else empty. Collective.

        A step whose records cannot be on one clock, as after a jump of one, is counted and left out; the clocks are then compared
        again.
        """
        if self._count % CLOCKS_EVERY == 0 or self._again:
            self.compare_clocks()
        self._count += 1
        mine = (self.recorder.records(step=step), self._core_wait.per_step_s(step + 1))
        first = dist.get_rank(self.group) == 0
        gathered: list[Any] | None = [None] * dist.get_world_size(self.group) if first else None
        dist.gather_object(mine, gathered, group=self.group, group_dst=0)
        metrics = {} if gathered is None else self._keep(step, gathered)
        # all ranks have to know, as comparing clocks takes all of them
        told = [self._again]
        dist.broadcast_object_list(told, group=self.group, group_src=0)
        self._again = told[0]
        return metrics

    @property
    def latest(self) -> Sample:
        """The last sample that was kept, on rank 0. Raises IndexError before the first."""
        return self._samples[-1]

    def compare_clocks(self) -> tuple[Offset, ...]:
        """Find how far the clocks are apart. Collective."""
        self.offsets, self._compared_s = clock_offsets(self.group, now=self._now), time.perf_counter()
        self._again = False
        return self.offsets

    def _keep(self, step: int, gathered: Sequence[tuple[list[CommRecord], float | None]]) -> dict[str, float]:
        records = aligned([theirs for theirs, _ in gathered], [o.offset_s for o in self.offsets])
        apart_s = disorder_s(collectives(records))
        errors_s = sorted((o.error_s for o in self.offsets), reverse=True)[:2]
        if apart_s > sum(errors_s) + CLOCK_SLACK_S + DRIFT * (time.perf_counter() - self._compared_s):
            self._unaligned[step] = apart_s
            self._unaligned = dict(list(self._unaligned.items())[-UNALIGNED:])
            self._again = True
            return {}
        sample = Sample(step, records, [cpu_wait_s for _, cpu_wait_s in gathered])
        self._samples.append(sample)
        self._history.add(sample)
        if self._count % SAMPLES == 0:
            self.write()
        return comm_metrics(records)

    def write(self) -> None:
        """Write comm.json, if this is rank 0 and has samples."""
        if self._samples or self._unaligned:
            error_s = max(o.error_s for o in self.offsets)
            write_comm(self.path, comm_data(self._samples, self._history, self.hosts, error_s, self._unaligned))


def comm_metrics(records: list[list[CommRecord]]) -> dict[str, float]:
    """The `comm/` metrics of one step from the records of all ranks, on one clock; empty where nothing was recorded."""
    world, covered_s = len(records), elapsed_s(records)
    if not covered_s:
        return {}
    by_kind = totals(collectives(records), lambda record, _: record.what in ALL_TO_ALL)
    a2a, whole = by_kind.get(True, Split()), sum(by_kind.values(), Split())
    sent = traffic_matrix(records, what=ALL_TO_ALL)
    abroad = sum(n for rank, line in enumerate(sent) for peer, n in enumerate(line) if peer != rank)
    return {
        "comm/a2a_s": a2a.exposed_s / world,
        "comm/a2a_share": a2a.exposed_s / covered_s,
        "comm/a2a_gib": abroad / world / 2**30,
        "comm/exposed_share": whole.exposed_s / covered_s,
        "comm/hidden_s": whole.hidden_s / world,
        "comm/skew_s": whole.skew_s / world,
    }
