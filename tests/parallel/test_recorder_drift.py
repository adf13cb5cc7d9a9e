"""Whether exchanges take as long as a plan predicts: times of hand-made records, and when a plan is called stale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from moefold.parallel.comm_record import CommRecord
from moefold.parallel.cost_model import LinkModel
from moefold.parallel.recorder_analysis import Collective, collectives
from moefold.parallel.recorder_drift import FACTOR, SAMPLES, Compared, Drift, compare

LINKS = {"flat": LinkModel(1.0, 0.001)}
"""1 s for each exchange and 1 ms for each byte."""


def exchange(
    call: int,
    begins: tuple[float, float],
    ends: tuple[float, float],
    *,
    what: str = "dispatch",
    axis: str = "ep_etp",
    waits: tuple[float, float] | None = None,
    exact: tuple[bool, bool] = (True, True),
    sent: tuple[tuple[int, int], tuple[int, int]] = ((7, 1000), (400, 7)),
) -> list[CommRecord]:
    """Of two ranks; rank 0 sends 1000 bytes to rank 1, which sends 400."""
    return [
        CommRecord(
            step=0,
            seq=call,
            axis=axis,
            members=(0, 1),
            call=call,
            op="all_to_all",
            what=what,
            layer=0,
            direction="forward",
            sent=sent[rank],
            received=(sent[0][rank], sent[1][rank]),
            begin_s=begins[rank],
            wait_s=(waits or begins)[rank],
            end_s=ends[rank],
            exact_end=exact[rank],
        )
        for rank in (0, 1)
    ]


def step(*records: Sequence[CommRecord]) -> list[Collective]:
    return collectives([[of_ranks[rank] for of_ranks in records] for rank in (0, 1)])


def test_rows_move_once_both_ranks_have_come_and_until_the_last_has_its_rows() -> None:
    assert compare(step(exchange(0, (0.0, 3.0), (6.0, 7.0))), LINKS) == Compared((4.0, 2.0), (4.0, 2.0), (1, 1))


def test_an_exchange_waits_for_the_one_before_on_its_connections() -> None:
    first, second = exchange(0, (0.0, 0.0), (5.0, 5.0)), exchange(1, (1.0, 1.0), (8.0, 8.0), what="combine")
    assert compare(step(first, second), LINKS).seen == (5.0 + 3.0, 4.0)
    elsewhere = [replace(r, members=(0, 1), axis="inside_node") for r in second]
    both = LINKS | {"inside": LinkModel(0.5, 0.0)}
    assert compare(step(first, elsewhere), both).seen == (5.0 + 7.0, 2.5)


def test_what_moves_no_rows_or_has_no_model_does_not_count() -> None:
    counts, norm = exchange(0, (0.0, 0.0), (9.0, 9.0), what="counts"), exchange(1, (9.0, 9.0), (10.0, 10.0), axis="world")
    assert compare(step(counts, norm), LINKS) == Compared()
    rows = exchange(2, (0.0, 0.0), (12.0, 12.0))
    assert compare(step(counts, rows), LINKS).seen == (3.0, 2.0), "but counts keep the connections busy"


@pytest.mark.parametrize(
    "late",
    [
        exchange(0, (0.0, 0.0), (9.0, 9.0), exact=(False, False)),
        exchange(0, (0.0, 0.0), (5.0, 9.0), exact=(True, False)),
        exchange(0, (0.0, 0.0), (9.0, 9.0), waits=(8.9, 8.9)),
    ],
    ids=["over-before", "last-over-before", "hidden"],
)
def test_an_end_that_nobody_saw_is_a_bound_only(late: list[CommRecord]) -> None:
    assert compare(step(late), LINKS) == Compared((0.0, 0.0), (9.0, 2.0), (0, 1))
    after = compare(step(late, exchange(1, (1.0, 1.0), (10.0, 10.0))), LINKS)
    assert after == Compared((0.0, 0.0), (18.0, 4.0), (0, 2)), "nor is it known when the next one could begin to move"
    apart = compare(step(late, exchange(1, (20.0, 20.0), (22.0, 22.0))), LINKS)
    assert apart.seen == (2.0, 2.0)


def taking(seconds: float, exact: bool = True) -> list[Collective]:
    """A step whose only exchange takes so long; 2 s are predicted."""
    return step(exchange(0, (0.0, 0.0), (seconds, seconds), exact=(exact, exact)))


def test_a_plan_is_stale_after_enough_samples_in_a_row_and_told_once() -> None:
    drift = Drift(LINKS, contention=1.5)
    slow, usual, fast = taking(2 * FACTOR * 1.5 + 0.1), taking(2 * FACTOR * 1.5 - 0.1), taking(2 / FACTOR - 0.1)
    for sample in (*[slow] * (SAMPLES - 1), usual, *[slow] * (SAMPLES - 1), fast, *[slow] * (SAMPLES - 1)):
        assert drift.add(sample) is None
    said = drift.add(slow)
    assert said is not None and "take 3 times as long as the plan of overlap predicts (6.1e+03 ms against 2e+03 ms" in said
    assert drift.add(slow) is None and drift.said == said


def test_a_link_that_has_become_faster_is_told_even_where_nobody_waits() -> None:
    for exact in (True, False):
        drift = Drift(LINKS, contention=1.5)
        told = [drift.add(taking(0.9, exact)) for _ in range(SAMPLES)]
        assert told[:-1] == [None] * (SAMPLES - 1)
        assert told[-1] is not None and "take 0.45 times as long" in told[-1] and "beyond 1 / 2 times" in told[-1]
    drift = Drift(LINKS, contention=1.0)
    assert [drift.add(taking(90.0, exact=False)) for _ in range(2 * SAMPLES)] == [None] * 2 * SAMPLES, "only a bound"


def test_clocks_that_are_apart_prove_nothing() -> None:
    for seconds in (4.5, 0.9):
        drift = Drift(LINKS, contention=1.0)
        assert [drift.add(taking(seconds), clock_error_s=0.3) for _ in range(2 * SAMPLES)] == [None] * 2 * SAMPLES
    assert Drift({}, 1.0).add(taking(9.0)) is None
