"""What the ranks' recorders saw of a step: metrics for every line, and comm.json in the run directory."""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..parallel.comm_record import CommRecord
from ..parallel.recorder import CommRecorder
from ..parallel.recorder_analysis import ALL_TO_ALL, Split, aligned, collectives, elapsed_s, summary, totals, traffic_matrix
from ..parallel.recorder_clock import Offset, clock_offsets
from ..parallel.recorder_stall import StallWatch
from ..parallel.recorder_verdict import verdicts
from .process import Crew
from .rundir import write_json

SCHEMA = 1
SAMPLES = 8
"""Steps that comm.json is made of: the newest that were sampled. One alone would judge by chance."""
ROWS = ("dispatch", "combine")
"""Purposes that move rows."""
CLOCKS_EVERY = 32
"""Samples after which the clocks of the ranks are compared again."""


def watch_stalls(recorder: CommRecorder | None, crew: Crew, timeout_s: float) -> AbstractContextManager[object]:
    """While the body runs, a collective that takes a quarter of the time-out is accounted for on standard error."""
    if recorder is None or crew.store is None:
        return nullcontext()
    store: dist.Store = crew.store.clone()  # type: ignore[attr-defined]  # known since torch 2.8, missing in its stubs
    return StallWatch(recorder, store, crew.world, timeout_s / 4)


class CommLog:
    """Gathers the records of one step from all ranks whenever asked; rank 0 keeps the newest samples and writes them down.

    Call `write` at the end: the file is too slow to be written with every line.

    Args:
        recorder: of this rank.
        group: all ranks; it must carry CPU tensors.
        path: of comm.json.
    """

    def __init__(self, recorder: CommRecorder, group: dist.ProcessGroup, path: Path):
        self.recorder, self.group, self.path = recorder, group, path
        self._samples: deque[list[list[CommRecord]]] = deque(maxlen=SAMPLES)
        self._offsets: tuple[Offset, ...] = ()
        self._count = 0

    def sample(self, step: int) -> dict[str, float]:
        """The `comm/` metrics of this step on rank 0, which writes comm.json at every `SAMPLES`th; else empty. Collective."""
        if self._count % CLOCKS_EVERY == 0:
            self._offsets = clock_offsets(self.group)
        self._count += 1
        mine = self.recorder.records(step=step)
        first = dist.get_rank(self.group) == 0
        gathered: list[Any] | None = [None] * dist.get_world_size(self.group) if first else None
        dist.gather_object(mine, gathered, group=self.group, group_dst=0)
        if gathered is None:
            return {}
        records = aligned(gathered, [o.offset_s for o in self._offsets])
        self._samples.append(records)
        if self._count % SAMPLES == 0:
            self.write()
        return comm_metrics(records)

    def write(self) -> None:
        """Write comm.json, if this is rank 0 and has samples."""
        if not self._samples:
            return
        every = [[r for sample in self._samples for r in sample[rank]] for rank in range(len(self._samples[0]))]
        found = verdicts(every)
        data = {
            "schema": SCHEMA,
            "clock_error_s": max(o.error_s for o in self._offsets),
            "verdicts": [{"kind": v.kind, "rank": v.rank, "share": v.share, "text": v.text} for v in found],
            **summary(every),
            "rows_abroad_bytes": rows_abroad(every),
        }
        write_json(self.path, data)


def rows_abroad(records: list[list[CommRecord]]) -> dict[str, int]:
    """Bytes of rows (dispatch and combine, both ways) that ranks sent to others, by axis."""
    found: dict[str, int] = {}
    for rank, mine in enumerate(records):
        for record in mine:
            if record.what in ROWS:
                abroad = sum(n for peer, n in zip(record.members, record.sent, strict=True) if peer != rank)
                found[record.axis] = found.get(record.axis, 0) + abroad
    return found


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
