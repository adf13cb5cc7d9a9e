"""What the records of all ranks say together: who waited for whom, what the wire took, what was hidden. Without torch.

A collective cannot move before its last rank has come. So what a rank waits until then is *skew*, the rest is *transfer*; both
count only as far as the rank did nothing else meanwhile (*exposed*). Work that went on while it was under way *hides* it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from .comm_record import CommRecord

Records = Sequence[Sequence[CommRecord]]
"""Records of each rank, in the order of ranks."""


@dataclass(frozen=True, slots=True)
class Split:
    """Seconds of collectives: skew_s and transfer_s the rank waited; hidden_s it worked meanwhile (at most, where a collective
    had ended before it was waited for); unseen_s nobody saw whether it waited."""

    skew_s: float = 0.0
    transfer_s: float = 0.0
    hidden_s: float = 0.0
    unseen_s: float = 0.0

    @property
    def exposed_s(self) -> float:
        return self.skew_s + self.transfer_s

    def __add__(self, other: Split) -> Split:
        return Split(
            self.skew_s + other.skew_s,
            self.transfer_s + other.transfer_s,
            self.hidden_s + other.hidden_s,
            self.unseen_s + other.unseen_s,
        )


@dataclass(frozen=True)
class Collective:
    """One collective on all its ranks: records and splits in the order of the group's members, times on one clock."""

    records: tuple[CommRecord, ...]
    splits: tuple[Split, ...]

    @property
    def first(self) -> CommRecord:
        """For what is the same on all members."""
        return self.records[0]

    @property
    def last_rank(self) -> int:
        """The rank that came last."""
        return max(zip(self.records, self.first.members, strict=True), key=lambda pair: pair[0].begin_s)[1]

    @property
    def late_s(self) -> float:
        """How much later the last rank came than the others' median."""
        begins = sorted(r.begin_s for r in self.records)
        return begins[-1] - median(begins[:-1]) if len(begins) > 1 else 0.0


def aligned(records: Records, offsets_s: Sequence[float] | None = None) -> list[list[CommRecord]]:
    """The records with all times on the clock of rank 0. offsets_s: see `recorder_clock.clock_offsets`; None = one clock."""
    shifts = offsets_s or [0.0] * len(records)
    if len(shifts) != len(records):
        raise ValueError(f"{len(shifts)} clock offsets for the records of {len(records)} ranks: give one for each rank")
    return [[_shifted(r, by_s) for r in mine] for mine, by_s in zip(records, shifts, strict=True)]


def _shifted(record: CommRecord, by_s: float) -> CommRecord:
    return replace(
        record,
        begin_s=record.begin_s + by_s,
        wait_s=None if record.wait_s is None else record.wait_s + by_s,
        end_s=record.end_s + by_s,
        arrivals_s=None if record.arrivals_s is None else tuple(None if t is None else t + by_s for t in record.arrivals_s),
    )


def collectives(records: Records) -> list[Collective]:
    """Collectives that all their members have a record of, in the order in which they began. Failed ones are left out.

    records: of every rank, on one clock. A ring that has wrapped lacks the oldest records: those collectives are not here.
    """
    found: dict[Hashable, dict[int, CommRecord]] = defaultdict(dict)
    for rank, mine in enumerate(records):
        for record in mine:
            if not record.failed:
                found[record.key][rank] = record
    whole = [tuple(by_rank[m] for m in next(iter(by_rank.values())).members if m in by_rank) for by_rank in found.values()]
    out = [Collective(group, tuple(_splits(group))) for group in whole if len(group) == len(group[0].members)]
    return sorted(out, key=lambda c: min(r.begin_s for r in c.records))


def _splits(group: Sequence[CommRecord]) -> Iterable[Split]:
    for here, record in enumerate(group):
        if record.wait_s is None:
            yield Split(unseen_s=record.end_s - record.begin_s)
            continue
        # rows come from some ranks only: nobody waits for the others
        needed = [
            other.begin_s
            for place, other in enumerate(group)
            if record.op != "all_to_all" or record.received[place] or place == here
        ]
        moving_s = min(max(record.wait_s, *needed), record.end_s) if needed else record.wait_s
        yield Split(moving_s - record.wait_s, record.end_s - moving_s, record.wait_s - record.begin_s)


def totals(found: Iterable[Collective], by: Callable[[CommRecord, int], Hashable]) -> dict[Any, Split]:
    """Sums of the splits. by: (record, rank) -> what they are grouped under, such as `lambda record, rank: rank`."""
    sums: dict[Any, Split] = defaultdict(Split)
    for collective in found:
        for record, rank, split in zip(collective.records, collective.first.members, collective.splits, strict=True):
            sums[by(record, rank)] += split
    return dict(sums)


def traffic_matrix(records: Records, *, what: Sequence[str] | None = None) -> list[list[int]]:
    """Bytes from each rank (row) to each rank (column), as the senders counted them; a rank's own rows are on the diagonal.

    what: purposes that count; None = all.
    """
    world = len(records)
    matrix = [[0] * world for _ in range(world)]
    for rank, mine in enumerate(records):
        for record in mine:
            if what is None or record.what in what:
                for peer, nbytes in zip(record.members, record.sent, strict=True):
                    matrix[rank][peer] += nbytes
    return matrix


def last_counts(found: Iterable[Collective], *, at_least_s: float = 0.0) -> dict[int, int]:
    """How often each rank came last, by more than `at_least_s` after the others' median."""
    counts: dict[int, int] = defaultdict(int)
    for collective in found:
        if len(collective.records) > 1 and collective.late_s > at_least_s:
            counts[collective.last_rank] += 1
    return dict(counts)


def expert_rows(records: Records) -> dict[int, list[int]]:
    """Rows for each expert of each layer, over all ranks and forward passes: layer -> [E].

    Where rows travel in two levels, only the outer one knows all experts of the layer: it counts.
    """
    found: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for mine in records:
        for record in mine:
            if record.rows_E is not None and record.layer is not None:
                found[record.layer].append(record.rows_E)
    whole = {layer: [r for r in rows if len(r) == max(map(len, rows))] for layer, rows in found.items()}
    return {layer: [sum(column) for column in zip(*rows, strict=True)] for layer, rows in whole.items()}


def elapsed_s(records: Records) -> float:
    """Time that the records cover, added over ranks; without that of steps between which they have a gap."""
    parts = [part for mine in records for part in stretches(mine)]
    return sum(max(r.end_s for r in part) - min(r.begin_s for r in part) for part in parts)


def stretches(mine: Sequence[CommRecord]) -> list[list[CommRecord]]:
    """The records of one rank by the time they began, cut where steps are missing."""
    out: list[list[CommRecord]] = []
    for record in sorted(mine, key=lambda r: r.begin_s):
        if not out or not 0 <= record.step - out[-1][-1].step <= 1:
            out.append([])
        out[-1].append(record)
    return out


def summary(records: Records) -> dict[str, Any]:
    """Plain data for JSON: what a report shows of these records (of all ranks, on one clock).

    Times are seconds added over ranks. layers: one row for each (layer, purpose, direction). share: of the time that the records
    cover. left_out: records without a partner on every rank.
    """
    found = collectives(records)
    covered_s = elapsed_s(records)
    by_layer = totals(found, lambda r, _: (-1 if r.layer is None else r.layer, r.what, r.axis, r.direction))
    whole = sum((s for c in found for s in c.splits), Split())
    matched = sum(len(c.records) for c in found)
    return {
        "ranks": len(records),
        "steps": sorted({r.step for mine in records for r in mine}),
        "collectives": len(found),
        "left_out": sum(map(len, records)) - matched,
        "covered_s": covered_s,
        "total": _plain(whole, covered_s),
        "by_rank": {str(rank): _plain(s, covered_s) for rank, s in sorted(totals(found, lambda _, rank: rank).items())},
        "layers": [
            {"layer": None if layer < 0 else layer, "what": what, "axis": axis, "direction": direction, **_plain(s, covered_s)}
            for (layer, what, axis, direction), s in sorted(by_layer.items())
        ],
        "last": {str(rank): n for rank, n in sorted(last_counts(found).items())},
        "traffic_bytes": traffic_matrix(records),
        "all_to_all_bytes": traffic_matrix(records, what=ALL_TO_ALL),
        "expert_rows": {str(layer): rows for layer, rows in sorted(expert_rows(records).items())},
    }


ALL_TO_ALL = ("counts", "dispatch", "notes", "combine")
"""Purposes that are the all-to-all of an MoE layer."""


def _plain(split: Split, covered_s: float) -> Mapping[str, float]:
    return {**asdict(split), "exposed_share": split.exposed_s / covered_s if covered_s else 0.0}
