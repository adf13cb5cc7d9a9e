"""comm.json: what the recorders of all ranks saw of the sampled steps. Pure, and without torch.

The file is bounded: at most `HISTORY_CELLS` values of each kind over time, `SPANS` spans of the newest step and traffic matrices
of `MATRIX_RANKS` ranks; that is below 2 MB for any number of steps, and for 1024 ranks below 3 MB.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..moe.errors import RunDirError
from ..parallel.comm_record import CommRecord
from ..parallel.recorder_analysis import ALL_TO_ALL, Collective, Records, collectives, stretches, summary, totals
from ..parallel.recorder_verdict import verdicts
from .rundir import write_atomic

SCHEMA = 2
"""2: hosts, times over time, spans of a step, verdicts with all their fields. Files of schema 1 are read as they are."""
ROWS = ("dispatch", "combine")
"""Purposes that move rows."""
HISTORY_CELLS = 8192
"""Samples x ranks of which times are kept; where it is full, every second sample goes."""
SPANS = 24_000
MATRIX_RANKS = 256
CLOCK_SLACK_S = 1e-3
"""Beyond what the clocks are known to be apart, how much too early an end may seem."""
SERIES = ("work_s", "a2a_s", "other_s", "skew_s", "cpu_wait_s")


@dataclass(frozen=True)
class Sample:
    """One step on all ranks. records: on one clock. cpu_wait_s: of each rank, per step, the time that its threads that
    compute were ready to run and no core was free; None where the system does not tell."""

    step: int
    records: Records
    cpu_wait_s: Sequence[float | None]


class History:
    """Times of each rank over the whole run, evenly thinned so that it stays small."""

    def __init__(self, ranks: int):
        self.room = max(8, HISTORY_CELLS // max(1, ranks))
        self.rows: list[tuple[int, Mapping[str, list[float | None]]]] = []
        self._stride, self._seen = 1, 0

    def add(self, sample: Sample) -> None:
        self._seen += 1
        if (self._seen - 1) % self._stride:
            return
        if len(self.rows) >= self.room:
            self.rows, self._stride = self.rows[::2], 2 * self._stride
        self.rows.append((sample.step, rank_times(sample)))

    def to_dict(self) -> dict[str, Any]:
        """steps: [S]; each of `SERIES`: [S][ranks], seconds of the step, None where not known."""
        return {"steps": [step for step, _ in self.rows], **{name: [row[name] for _, row in self.rows] for name in SERIES}}


def rank_times(sample: Sample) -> dict[str, list[float | None]]:
    """`SERIES` of one step: work_s outside of collectives, waiting in the all-to-all and in others, the part of both for the last
    rank, and the time without a core."""
    found = collectives(sample.records)
    a2a = totals((c for c in found if c.first.what in ALL_TO_ALL), lambda _, rank: rank)
    other = totals((c for c in found if c.first.what not in ALL_TO_ALL), lambda _, rank: rank)
    out: dict[str, list[float | None]] = {name: [] for name in SERIES}
    for rank, mine in enumerate(sample.records):
        parts = stretches(mine)
        covered_s = sum(max(r.end_s for r in part) - min(r.begin_s for r in part) for part in parts)
        splits = [s for s in (a2a.get(rank), other.get(rank)) if s is not None]
        waited_s = sum(s.exposed_s + s.unseen_s for s in splits)
        out["work_s"].append(round(max(0.0, covered_s - waited_s), 6))
        out["a2a_s"].append(round(a2a[rank].exposed_s if rank in a2a else 0.0, 6))
        out["other_s"].append(round(other[rank].exposed_s if rank in other else 0.0, 6))
        out["skew_s"].append(round(sum(s.skew_s for s in splits), 6))
        cpu_wait_s = sample.cpu_wait_s[rank]
        out["cpu_wait_s"].append(None if cpu_wait_s is None else round(cpu_wait_s, 6))
    return out


def disorder_s(found: Sequence[Collective]) -> float:
    """By how much a collective seems to have ended on one rank before it had begun on one that it needs: never, on one clock."""
    worst = -math.inf
    for c in found:
        for record in c.records:
            needed = (o.begin_s for place, o in enumerate(c.records) if record.op != "all_to_all" or record.received[place])
            worst = max(worst, max(needed, default=-math.inf) - record.end_s)
    return worst


def waited_for(found: Sequence[Collective], world: int) -> dict[str, list[float]]:
    """Seconds that the others waited for each rank to come, in the all-to-all and in every collective."""
    seconds = {"a2a_s": [0.0] * world, "all_s": [0.0] * world}
    for c in found:
        lost_s = sum(s.skew_s for s in c.splits)
        seconds["all_s"][c.last_rank] += lost_s
        if c.first.what in ALL_TO_ALL:
            seconds["a2a_s"][c.last_rank] += lost_s
    return {name: [round(s, 6) for s in values] for name, values in seconds.items()}


def step_spans(sample: Sample, prefer: Sequence[int] = ()) -> dict[str, Any]:
    """The collectives of one step as plain data, times in microseconds since its first.

    kinds: [what, axis, layer, direction, op]; ranks: rank -> [kind, begin, when it began to wait (None: not seen), when the last
    rank had come (None: not known), end]. At most `SPANS` in all: of too many ranks some are left out (`prefer` are kept), and of
    too long a step the end.
    """
    world = len(sample.records)
    start_s = min((r.begin_s for mine in sample.records for r in mine), default=0.0)
    longest = max(map(len, sample.records), default=0)
    room = max(1, SPANS // max(1, min(longest, SPANS)))
    kept = list(range(world))
    if world > room:
        spread = [round(i * (world - 1) / max(1, room - 1)) for i in range(room)]
        kept = sorted(list(dict.fromkeys([*prefer, *spread]))[:room])
    skews = {
        (rank, record.seq): split.skew_s
        for c in collectives(sample.records)
        for rank, record, split in zip(c.first.members, c.records, c.splits, strict=True)
    }
    kinds: dict[tuple[Any, ...], int] = {}
    ranks: dict[str, list[list[int | None]]] = {}
    for rank in kept:
        rows = []
        for r in sorted(sample.records[rank], key=lambda r: r.begin_s)[:SPANS]:
            kind = kinds.setdefault((r.what, r.axis, r.layer, r.direction, r.op), len(kinds))
            skew_s = skews.get((rank, r.seq))
            moving_s = None if r.wait_s is None or skew_s is None else r.wait_s + skew_s
            moments = (r.begin_s, r.wait_s, moving_s, r.end_s)
            rows.append([kind, *(None if t is None else round(1e6 * (t - start_s)) for t in moments)])
        ranks[str(rank)] = rows
    left_out = sum(map(len, sample.records)) - sum(map(len, ranks.values()))
    return {"step": sample.step, "kinds": [list(k) for k in kinds], "ranks": ranks, "left_out": left_out}


def rows_abroad(records: Records) -> dict[str, int]:
    """Bytes of rows (dispatch and combine, both ways) that ranks sent to others, by axis."""
    found: dict[str, int] = {}
    for rank, mine in enumerate(records):
        for record in mine:
            if record.what in ROWS:
                abroad = sum(n for peer, n in zip(record.members, record.sent, strict=True) if peer != rank)
                found[record.axis] = found.get(record.axis, 0) + abroad
    return found


def comm_data(
    samples: Sequence[Sample], history: History, hosts: Sequence[str], clock_error_s: float, unaligned: Mapping[int, float]
) -> dict[str, Any]:
    """All of comm.json. unaligned: steps left out because their clocks disagreed -> by how much, in seconds."""
    world = len(hosts)
    every: list[list[CommRecord]] = [[r for sample in samples for r in sample.records[rank]] for rank in range(world)]
    causes = [asdict(v) for v in verdicts(every)]
    data = {"schema": SCHEMA, "hosts": list(hosts), "clock_error_s": clock_error_s, "verdicts": causes, **summary(every)}
    if world > MATRIX_RANKS:
        data |= {"traffic_bytes": [], "all_to_all_bytes": []}
    blamed = [v["rank"] for v in causes]
    return data | {
        "rows_abroad_bytes": rows_abroad(every),
        "waited_for": waited_for(collectives(every), world),
        "rank_times": _means([rank_times(sample) for sample in samples], world),
        "history": history.to_dict(),
        "spans": step_spans(samples[-1], blamed) if samples else None,
        "unaligned_s": {str(step): seconds for step, seconds in unaligned.items()},
    }


def _means(rows: Sequence[Mapping[str, list[float | None]]], world: int) -> dict[str, list[float | None]]:
    """`SERIES` per rank, mean over the samples."""
    sums: dict[str, list[float | None]] = defaultdict(list)
    for name in SERIES:
        for rank in range(world):
            known = [v for row in rows if (v := row[name][rank]) is not None]
            sums[name].append(sum(known) / len(known) if known else None)
    return dict(sums)


def write_comm(path: Path, data: Mapping[str, Any]) -> None:
    """Write comm.json in one go: one line for each key, as indented matrices would be most of the file."""
    lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.items())
    write_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")


def check_comm(path: Path, data: Mapping[str, Any]) -> None:
    """Raises RunDirError for a file that a later version wrote."""
    schema = data.get("schema", 1)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise RunDirError(
            f"{path}: schema {schema}, but this moefold reads up to {SCHEMA}; update moefold, or move the file away"
        )
