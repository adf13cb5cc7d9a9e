"""Records of a job that never ran: ranks on hosts, layers with experts, and what holds them up; for tests of who is to blame.

Every rank computes, dispatches, computes experts, combines, and sums gradients, forward and backward, with times that follow from
the numbers here and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moefold.launch.comm_file import History, Sample, comm_data, write_comm
from moefold.parallel.comm_record import CommRecord, Direction, Op

ATTENTION_S, ROW_S, LINK_BYTES_S = 0.010, 20e-6, 25e6
ROWS, ROW_BYTES = 64, 1024
"""From each rank to each expert."""


@dataclass(frozen=True, kw_only=True)
class CommCase:
    """hosts: of each rank. slow: rank -> times as long for all computing. hot: rank whose first expert gets `hot_factor` times
    the rows. slow_links: ranks whose links take `link_factor` times as long. cpu_wait_s: rank -> without a core, per step."""

    hosts: Sequence[str] = ("a", "a", "b", "b")
    layers: int = 2
    experts_per_rank: int = 2
    steps: int = 3
    slow: Mapping[int, float] = field(default_factory=dict)
    hot: int | None = None
    hot_factor: float = 6.0
    slow_links: frozenset[int] = frozenset()
    link_factor: float = 12.0
    cpu_wait_s: Mapping[int, float] = field(default_factory=dict)
    clock_jump_s: float = 0.0

    @property
    def world(self) -> int:
        return len(self.hosts)

    def rows(self, target: int) -> int:
        """From any rank to all experts of `target`."""
        each = ROWS * self.experts_per_rank
        return each + (int((self.hot_factor - 1) * ROWS) if target == self.hot else 0)


class _Job:
    def __init__(self, case: CommCase):
        self.case = case
        self.now = [0.0] * case.world
        self.out: list[list[CommRecord]] = [[] for _ in range(case.world)]
        self.calls = 0

    def work(self, seconds: Sequence[float]) -> None:
        for rank, s in enumerate(seconds):
            self.now[rank] += s * self.case.slow.get(rank, 1.0)

    def together(self, step: int, op: Op, what: str, layer: int | None, direction: Direction, rows: Any = None) -> None:
        """One collective of all: nobody moves before what it needs has been begun."""
        c, world = self.case, self.case.world
        begin, axis = list(self.now), "ep_etp" if op == "all_to_all" else "world"
        for here in range(world):
            send = tuple((rows(here, q) if rows else 64) * ROW_BYTES for q in range(world))
            receive = tuple((rows(q, here) if rows else 64) * ROW_BYTES for q in range(world))
            arrivals: list[float | None] = []
            clock = begin[here]
            for q in range(world):
                if q == here:
                    arrivals.append(None)
                    continue
                pace = c.link_factor if c.slow_links & {q, here} else 1.0
                clock = max(clock, begin[q]) + pace * receive[q] / LINK_BYTES_S / world
                arrivals.append(clock)
            end = max(*begin, clock) if op != "all_to_all" else max(begin[here], clock)
            self.now[here] = end + 1e-5
            counts = None
            if what == "dispatch" and direction == "forward":
                by_rank = [[rows(here, q) // c.experts_per_rank] * c.experts_per_rank for q in range(world)]
                if c.hot is not None:
                    by_rank[c.hot] = [rows(here, c.hot) - ROWS * (c.experts_per_rank - 1), *[ROWS] * (c.experts_per_rank - 1)]
                counts = tuple(n for line in by_rank for n in line)
            self.out[here].append(
                CommRecord(
                    step=step,
                    seq=len(self.out[here]),
                    axis=axis,
                    members=tuple(range(world)),
                    call=self.calls,
                    op=op,
                    what=what,
                    layer=layer,
                    direction=direction,
                    sent=send,
                    received=receive,
                    begin_s=begin[here],
                    wait_s=begin[here],
                    end_s=end,
                    rows_E=counts,
                    arrivals_s=tuple(arrivals) if op == "all_to_all" else None,
                )
            )
        self.calls += 1

    def exchange(self, step: int, what: str, layer: int, direction: Direction) -> None:
        there = (what, direction) in (("dispatch", "forward"), ("combine", "backward"))
        rows = (lambda _, q: self.case.rows(q)) if there else (lambda p, _: self.case.rows(p))
        self.together(step, "all_to_all", what, layer, direction, rows)

    def step(self, step: int) -> None:
        c = self.case
        experts = [ROW_S * c.world * c.rows(rank) for rank in range(c.world)]
        self.together(step, "all_reduce", "tokens", None, "forward")
        for direction, layers in (("forward", range(c.layers)), ("backward", reversed(range(c.layers)))):
            for layer in layers:
                self.work([ATTENTION_S] * c.world)
                first, then = ("dispatch", "combine") if direction == "forward" else ("combine", "dispatch")
                self.exchange(step, first, layer, direction)  # type: ignore[arg-type]
                self.work(experts)
                self.exchange(step, then, layer, direction)  # type: ignore[arg-type]
        self.together(step, "reduce_scatter", "gradients", None, "backward")
        self.together(step, "all_reduce", "norm", None, "update")


def samples(case: CommCase) -> list[Sample]:
    """The steps of the job, as rank 0 keeps them."""
    job, out = _Job(case), []
    for step in range(case.steps):
        before = [len(mine) for mine in job.out]
        job.step(step)
        records = [mine[n:] for mine, n in zip(job.out, before, strict=True)]
        out.append(Sample(step, records, [case.cpu_wait_s.get(r, 0.0) for r in range(case.world)]))
    return out


def recorded(case: CommCase) -> dict[str, Any]:
    """What comm.json of the job holds, after a way through JSON."""
    found, history = samples(case), History(case.world)
    for sample in found:
        history.add(sample)
    return json.loads(json.dumps(comm_data(found, history, case.hosts, 5e-5, {})))


def make_recorded_run(path: Path, case: CommCase, state: str = "completed", **more: Any) -> Path:
    """A run directory of the job with nothing in it but status and recordings. more: keys of comm.json to replace."""
    path.mkdir(parents=True)
    (path / "status.json").write_text(json.dumps({"schema": 1, "state": state, "attempts": []}))
    write_comm(path / "comm.json", recorded(case) | more)
    return path
