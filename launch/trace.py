"""A window of torch.profiler over some steps of some ranks: one file each, with what is needed to put them on one clock.

`trace/attempt-NN/` of the run directory gets, from each chosen rank, `rank-NNNNN.trace.json.gz` (as torch writes it) and
`rank-NNNNN.json`: marks that tie the profiler's clock to the one that collectives are recorded by, how far that one is from rank
0's, and the recorded collectives of the window. `profile/trace_merge.py` makes one trace of them.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..parallel.recorder import CommRecorder
from ..parallel.recorder_clock import Offset
from .rundir import write_atomic

SCHEMA = 1
MARK = "moefold/clock"
"""Name of the spans that tie both clocks together."""
MARKS = 5
DEFAULT_RANKS = 8


class TraceWindow:
    """Traces the steps start <= step < stop on this rank, if it is chosen. Every rank has one and calls it.

    Args:
        compare: finds how far the clocks of all ranks are apart; collective.
        recorder: of this rank; None = collectives are not recorded.
        now: seconds, of the clock that `compare` and the recorder read.
    """

    def __init__(
        self,
        steps: tuple[int, int],
        ranks: Sequence[int],
        rank: int,
        folder: Path,
        compare: Callable[[], tuple[Offset, ...]],
        recorder: CommRecorder | None = None,
        now: Callable[[], float] = time.perf_counter,
    ):
        self.steps, self.rank, self.folder, self.compare, self.recorder = steps, rank, folder, compare, recorder
        self.now = now
        self.chosen = rank in ranks
        self._profile: profile | None = None
        self._marks: list[float] = []
        self._offsets: list[Offset] = []

    def before(self, step: int) -> None:
        """Call before each step: begins with the first of the window. Collective at that step."""
        if step != self.steps[0]:
            return
        self._offsets = [self.compare()[self.rank]]
        if self.chosen:
            devices = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(activities=devices)
            self._profile.start()
            self._mark()

    def after(self, step: int) -> None:
        """Call after each step: ends with the last of the window. Collective at that step."""
        if step != self.steps[1] - 1 or not self._offsets:
            return
        self._offsets.append(self.compare()[self.rank])
        self._finish()

    def close(self) -> None:
        """At the end of training: keep what a window that was cut short has seen."""
        self._finish()

    def _mark(self) -> None:
        """Spans whose inside is known on our clock; several, of which the shortest counts."""
        for _ in range(MARKS):
            with record_function(MARK):
                self._marks.append(self.now())

    def _finish(self) -> None:
        running, self._profile = self._profile, None
        if running is None:
            return
        self._mark()
        running.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = f"rank-{self.rank:05d}"
        part = self.folder / f".{stem}.part.json.gz"
        running.export_chrome_trace(str(part))
        part.replace(self.folder / f"{stem}.trace.json.gz")
        records = []
        if self.recorder is not None:
            records = [r.to_dict() for r in self.recorder.records() if self.steps[0] <= r.step < self.steps[1]]
        about = {
            "schema": SCHEMA,
            "rank": self.rank,
            "host": socket.gethostname(),
            "steps": list(self.steps),
            "marks_s": self._marks,
            "offsets_s": [o.offset_s for o in self._offsets],
            "errors_s": [o.error_s for o in self._offsets],
            "records": records,
        }
        write_atomic(self.folder / f"{stem}.json", json.dumps(about) + "\n")
