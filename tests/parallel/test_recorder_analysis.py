"""Planted timelines: what is known of them must come out, and causes of waiting must not be taken for one another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from moefold.parallel.comm_record import CommRecord
from moefold.parallel.recorder_analysis import (
    Split,
    aligned,
    collectives,
    expert_rows,
    last_counts,
    summary,
    totals,
    traffic_matrix,
)
from moefold.parallel.recorder_verdict import verdicts

ROW_BYTES = 8


@dataclass
class Machine:
    """A model of ranks that compute and communicate, from which records follow.

    factor: of each rank's time to compute. link_s: seconds per byte from rank to rank where not the usual ones.
    """

    world: int
    factor: dict[int, float] = field(default_factory=dict)
    link_s: dict[tuple[int, int], float] = field(default_factory=dict)
    usual_s: float = 1e-6
    latency_s: float = 1e-5

    def __post_init__(self) -> None:
        self.now = [0.0] * self.world
        self.records: list[list[CommRecord]] = [[] for _ in range(self.world)]
        self.calls = 0

    def compute(self, seconds: Sequence[float]) -> None:
        for rank, s in enumerate(seconds):
            self.now[rank] += s * self.factor.get(rank, 1.0)

    def exchange(self, what: str, rows: Sequence[Sequence[int]], *, direction: str = "forward", rows_E: Any = None) -> None:
        """All-to-all of rows[from][to]; each rank receives from one peer after another, once both have come."""
        begins = list(self.now)
        for rank in range(self.world):
            t, arrivals = begins[rank], [None] * self.world
            for peer in [(rank + step) % self.world for step in range(1, self.world)]:
                if rows[peer][rank]:
                    nbytes = rows[peer][rank] * ROW_BYTES
                    own_s = self.latency_s + nbytes * self.link_s.get((peer, rank), self.usual_s)
                    t = max(t, begins[peer]) + own_s
                    arrivals[peer] = t  # type: ignore[call-overload]
            sent = tuple(n * ROW_BYTES for n in rows[rank])
            received = tuple(rows[p][rank] * ROW_BYTES for p in range(self.world))
            extra = {"arrivals_s": tuple(arrivals), "rows_E": None if rows_E is None else rows_E[rank]}
            self.add(rank, "all_to_all", what, begins[rank], t, sent, received, direction=direction, layer=0, **extra)
            self.now[rank] = t
        self.calls += 1

    def all_reduce(self, what: str = "norm", took_s: float = 1e-4) -> None:
        begins, end = list(self.now), max(self.now) + took_s
        for rank in range(self.world):
            self.add(rank, "all_reduce", what, begins[rank], end, (8,) * self.world, (8,) * self.world)
            self.now[rank] = end
        self.calls += 1

    def add(
        self,
        rank: int,
        op: str,
        what: str,
        begin: float,
        end: float,
        sent: Any,
        received: Any,
        layer: int | None = None,
        **extra: Any,
    ) -> None:
        settings = {"direction": "forward", "wait_s": begin, **extra}
        record = CommRecord(
            step=0,
            seq=len(self.records[rank]),
            axis="ep_etp",
            members=tuple(range(self.world)),
            call=self.calls,
            op=op,  # type: ignore[arg-type]
            what=what,
            layer=layer,
            sent=sent,
            received=received,
            begin_s=begin,
            end_s=end,
            **settings,
        )
        self.records[rank].append(record)

    def steps(self, count: int, rows: Sequence[Sequence[int]], rows_E: Any = None, row_s: float = 2e-6) -> Machine:
        """Training steps: attention, dispatch, experts (time by rows), combine, norm."""
        back = [list(column) for column in zip(*rows, strict=True)]
        for _ in range(count):
            self.compute([0.01] * self.world)
            self.exchange("dispatch", rows, rows_E=rows_E)
            self.compute([row_s * sum(rows[p][r] for p in range(self.world)) for r in range(self.world)])
            self.exchange("combine", back)
            self.compute([0.005] * self.world)
            self.all_reduce()
        return self


def even(world: int, rows: int = 1000) -> list[list[int]]:
    return [[rows] * world for _ in range(world)]


def record(rank: int, begin: float, end: float, wait: float | None = None, **settings: Any) -> CommRecord:
    """An all-reduce of ranks 0 and 1; waited for from `wait` on, or at once."""
    base = CommRecord(
        step=0,
        seq=0,
        axis="world",
        members=(0, 1),
        call=0,
        op="all_reduce",
        what="norm",
        layer=None,
        direction="update",
        sent=(8, 8),
        received=(8, 8),
        begin_s=begin,
        wait_s=begin if wait is None else wait,
        end_s=end,
    )
    return replace(base, **settings)


def splits(*records: CommRecord) -> list[Split]:
    (found,) = collectives([[r] for r in records])
    return list(found.splits)


def test_waiting_for_the_last_is_skew_and_the_rest_is_transfer() -> None:
    first, last = splits(record(0, 1.0, 5.0), record(1, 4.0, 5.0))
    assert first == Split(skew_s=3.0, transfer_s=1.0)
    assert last == Split(transfer_s=1.0)


def test_what_passes_while_a_rank_works_is_hidden() -> None:
    # rank 0 starts at 1 and waits from 4.5 on; rank 1 came at 4
    assert splits(record(0, 1.0, 5.0, wait=4.5), record(1, 4.0, 5.0))[0] == Split(transfer_s=0.5, hidden_s=3.5)
    # here it begins to wait before the last has come
    assert splits(record(0, 1.0, 5.0, wait=3.0), record(1, 4.0, 5.0))[0] == Split(1.0, 1.0, 2.0)


def test_a_wait_that_nobody_saw_is_neither_exposed_nor_hidden() -> None:
    assert splits(record(0, 1.0, 5.0, wait_s=None), record(1, 4.0, 5.0))[0] == Split(unseen_s=4.0)


def test_rows_are_awaited_from_their_senders_only() -> None:
    late = {"op": "all_to_all", "sent": (0, 0), "received": (0, 0)}
    assert splits(record(0, 1.0, 2.0, **late), record(1, 4.0, 5.0, **late))[0] == Split(transfer_s=1.0)
    late = {"op": "all_to_all", "sent": (0, 8), "received": (0, 8)}
    assert splits(record(0, 1.0, 5.0, **late), record(1, 4.0, 5.0, **late))[0] == Split(skew_s=3.0, transfer_s=1.0)


def test_clocks_that_differ_are_aligned() -> None:
    wrong = [[record(0, 1.0, 5.0)], [record(1, 104.0, 105.0, arrivals_s=(104.5, None))]]
    right = aligned(wrong, [0.0, -100.0])
    (found,) = collectives(right)
    assert list(found.splits) == [Split(3.0, 1.0), Split(transfer_s=1.0)]
    assert found.last_rank == 1 and found.late_s == pytest.approx(3.0)
    assert right[1][0].arrivals_s == (4.5, None)
    with pytest.raises(ValueError, match="1 clock offsets for the records of 2 ranks"):
        aligned(wrong, [0.0])


def test_collectives_without_a_record_on_every_rank_are_left_out_and_counted() -> None:
    whole = [[record(0, 1, 2), record(0, 3, 4, call=1, seq=1)], [record(1, 1, 2), record(1, 3, 4, call=1, seq=1, failed=True)]]
    assert [c.first.call for c in collectives(whole)] == [0]
    assert summary(whole)["left_out"] == 2


def test_traffic_and_rows_add_up() -> None:
    machine = Machine(3)
    machine.exchange("dispatch", [[1, 2, 3], [4, 5, 6], [7, 8, 9]], rows_E=[(1, 5), (2, 6), (3, 7)])
    machine.all_reduce()
    assert traffic_matrix(machine.records, what=["dispatch"]) == [[8, 16, 24], [32, 40, 48], [56, 64, 72]]
    assert traffic_matrix(machine.records)[0][1] == 16 + 8
    assert expert_rows(machine.records) == {0: [6, 18]}


def test_of_two_levels_the_one_that_knows_all_experts_counts() -> None:
    machine = Machine(2)
    machine.exchange("dispatch", even(2, 1), rows_E=[(1, 2, 3, 4), (5, 6, 7, 8)])
    machine.exchange("dispatch", even(2, 1), rows_E=[(1, 1), (1, 1)])
    assert expert_rows(machine.records) == {0: [6, 8, 10, 12]}


def test_the_summary_is_json_with_rows_for_layers() -> None:
    data = json.loads(json.dumps(summary(Machine(2).steps(2, even(2)).records)))
    assert {(row["layer"], row["what"]) for row in data["layers"]} == {(0, "dispatch"), (0, "combine"), (None, "norm")}
    assert data["collectives"] == 6 and data["steps"] == [0] and data["left_out"] == 0
    assert data["total"]["skew_s"] + data["total"]["transfer_s"] == pytest.approx(
        sum(row["skew_s"] + row["transfer_s"] for row in data["layers"])
    )
    assert data["total"]["exposed_share"] == pytest.approx(
        (data["total"]["skew_s"] + data["total"]["transfer_s"]) / data["covered_s"]
    )


def test_records_survive_json() -> None:
    mine = Machine(2).steps(1, even(2), rows_E=[(1, 2), (3, 4)]).records[1]
    assert [CommRecord.from_dict(json.loads(json.dumps(r.to_dict()))) for r in mine] == mine


def test_an_even_machine_has_no_culprit() -> None:
    assert verdicts(Machine(4).steps(5, even(4)).records) == ()


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("world", [2, 4])
def test_a_slow_rank_is_named(rank: int, world: int) -> None:
    rank = min(rank, world - 1)
    machine = Machine(world, factor={rank: 1.6}).steps(5, even(world))
    (found,) = verdicts(machine.records)
    assert (found.kind, found.rank) == ("slow_rank", rank)
    # 5 steps, in which the others wait for 0.6 of each stretch of work
    per_step_s = 0.6 * (0.01 + 2e-6 * 1000 * world + 0.005)
    assert found.lost_s == pytest.approx(5 * per_step_s * (world - 1), rel=0.15)
    assert f"rank {rank} computes" in found.text
    assert last_counts(collectives(machine.records), at_least_s=1e-3) == {rank: 15}


def test_a_hot_expert_is_named_and_its_rank_is_not_called_slow() -> None:
    # experts 0 to 7, two for each rank; expert 5 of rank 2 gets most rows
    per_expert = [500, 500, 500, 500, 500, 4500, 500, 500]
    rows = [[sum(per_expert[2 * r : 2 * r + 2]) for r in range(4)] for _ in range(4)]
    machine = Machine(4, usual_s=1e-9).steps(5, rows, rows_E=[tuple(per_expert)] * 4)
    (found,) = verdicts(machine.records)
    assert (found.kind, found.rank, found.layer, found.expert) == ("hot_expert", 2, 0, 5)
    assert found.lost_s == pytest.approx(5 * 3 * 2e-6 * (4 * 5000 - 4 * 1000), rel=0.05)


def test_a_slow_rank_with_a_hot_expert_is_blamed_for_each_part() -> None:
    rows = [[1000, 1000, 3000, 1000] for _ in range(4)]
    machine = Machine(4, usual_s=1e-9, factor={2: 1.5}).steps(5, rows)
    found = {v.kind: v for v in verdicts(machine.records)}
    assert found.keys() == {"slow_rank", "hot_expert"} and {v.rank for v in found.values()} == {2}
    assert found["hot_expert"].lost_s == pytest.approx(5 * 3 * 2e-6 * 4 * 2000, rel=0.05)
    # before the first collective nobody knows how long a rank has worked
    assert found["slow_rank"].lost_s == pytest.approx(3 * 0.5 * (4 * 0.01 + 5 * (2e-6 * 12000 + 0.005)), rel=0.05)


def test_a_slow_link_is_named_and_no_rank_is() -> None:
    machine = Machine(4, link_s={(1, 3): 1e-5}, usual_s=1e-7).steps(5, even(4, 500))
    found = verdicts(machine.records)
    assert [(v.kind, v.rank, v.peer) for v in found] == [("slow_link", 1, 3)]
    assert "from rank 1 to rank 3" in found[0].text


def test_a_rank_with_slow_links_is_named_once() -> None:
    slow = {link: 1e-5 for other in (0, 1, 2) for link in ((3, other), (other, 3))}
    found = verdicts(Machine(4, link_s=slow, usual_s=1e-7).steps(5, even(4, 500)).records)
    assert [(v.kind, v.rank, v.peer) for v in found] == [("slow_link", 3, None)]


def test_a_link_is_judged_by_the_wait_and_not_by_what_passed_before() -> None:
    """Rank 0 works while rows are under way and asks for them late; rank 1 waits at once."""
    machine = Machine(2, usual_s=1e-9)
    for _ in range(5):
        machine.exchange("dispatch", even(2, 500))
        machine.compute([0.01, 0.01])
    busy = [replace(r, begin_s=r.begin_s - 0.005, wait_s=r.begin_s) for r in machine.records[0]]
    idle = [
        replace(r, begin_s=r.begin_s - 0.005, wait_s=r.begin_s - 0.005, end_s=r.end_s - 0.005, arrivals_s=(r.end_s - 0.005, None))
        for r in machine.records[1]
    ]
    assert not [v for v in verdicts([busy, idle], min_share=0.001) if v.kind == "slow_link"]


def test_a_hot_expert_is_named_where_rows_travel_in_pieces() -> None:
    rows = [[500, 500, 2500, 500] for _ in range(4)]
    back = [list(column) for column in zip(*rows, strict=True)]
    machine = Machine(4, usual_s=1e-9)
    for _ in range(5):
        for what, way in (("dispatch", rows), ("dispatch", rows), ("combine", back), ("combine", back)):
            if what == "combine":
                machine.compute([2e-6 * sum(line[r] for line in rows) for r in range(4)])
            machine.exchange(what, way)
        machine.all_reduce()
    assert {(v.kind, v.rank) for v in verdicts(machine.records)} == {("hot_expert", 2)}


def test_short_messages_are_no_slow_link() -> None:
    rows = even(4, 1000)
    rows[1][3] = 1  # one row takes its latency, a thousand times the usual seconds per byte
    assert verdicts(Machine(4, usual_s=1e-8, latency_s=1e-4).steps(5, rows, row_s=1e-8).records) == ()


def test_lateness_that_was_caught_elsewhere_is_not_blamed_twice() -> None:
    """Rank 1 leaves a collective late because of its link, and so comes late to the next one: the link is the cause."""
    machine = Machine(2, link_s={(0, 1): 1e-4}, usual_s=1e-7).steps(5, even(2, 500))
    assert {v.kind for v in verdicts(machine.records)} == {"slow_link"}


def test_totals_group_as_asked() -> None:
    found = collectives(Machine(2, factor={1: 2.0}).steps(1, even(2)).records)
    by_rank = totals(found, lambda _, rank: rank)
    assert by_rank[0].skew_s > 10 * by_rank[1].skew_s
    assert sum(s.exposed_s for s in by_rank.values()) == pytest.approx(
        sum(s.exposed_s for s in totals(found, lambda r, _: r.what).values())
    )
