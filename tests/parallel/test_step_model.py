"""Predicted steps on planted costs: what must follow exactly from a formula, what is carried over, and how sure it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moefold.parallel.cost_model import ComputeFit, ComputeModel, LinkFit, LinkModel
from moefold.parallel.plan import Load
from moefold.parallel.step_costs import Measured
from moefold.parallel.step_model import Alone, Base, Folding, Prediction, calibrate, copies, layers_work, predict
from moefold.parallel.step_profile import StageTime, StepProfile
from moefold.parallel.step_volume import HopRows, Volume, Way

LINK_S, FLOP_S, STEP_S = 1e-8, 1e-10, 2.0
LOAD = Load(tokens=1000, dim=64, row_bytes=256, num_experts=8, top_k=4, expert_dim=32, ep=4, nodes=2)
FLAT = Way(dispatcher="all_to_all", ep=4)
TWO = replace(FLAT, dispatcher="hierarchical")
ROWS = 4000.0
"""Of one rank: every choice of its tokens."""


def fit(error: float = 0.0, alpha_s: float = 0.0) -> LinkFit:
    return LinkFit("all_to_all", 4, LinkModel(alpha_s, LINK_S), (), error, error)


def products(error: float = 0.0) -> ComputeFit:
    return ComputeFit(ComputeModel(0.0, FLOP_S), (), error, error)


def folding(error: float = 0.0, **changes: object) -> Folding:
    links = dict.fromkeys(("flat", "across", "inside"), fit(error))
    made = Folding(LOAD, links, (products(error), products(error)), 1.0, Measured(0.3), 1000, 68)
    return replace(made, **changes)  # type: ignore[arg-type]


def volumes(rate: float = 1.0) -> dict[Way, list[Volume]]:
    """Two layers. Flat rows leave the rank for 3 of 4 ranks; two levels send 800 rows up and half of all inside."""
    flat = [Volume((HopRows(0.75 * ROWS * rate, 1.0),), ROWS * rate, ROWS * rate)] * 2
    two = [Volume((HopRows(800 * rate, 1.0), HopRows(0.5 * ROWS * rate, 1.0)), ROWS * rate, ROWS * rate)] * 2
    return {replace(FLAT, rate=rate): flat, replace(TWO, rate=rate): two}


def base(way: Way = FLAT, stages: tuple[StageTime, ...] = (), jitter: float = 0.0) -> Base:
    seconds = (STEP_S - jitter, STEP_S, STEP_S + jitter)
    return Base(way, StepProfile(seconds, stages, {}, {}, 0.0), 2, 1)


ALONE = Alone({0.5: Measured(0.01)}, {"int8": Measured(1e-6)})


def predicted(ways: list[Way], on: Base, error: float = 0.0, **more: Folding) -> list[Prediction]:
    foldings = {FLAT.folding: folding(error), (2, 1, 1): more.get("half", folding(error))}
    counted = volumes() | volumes(0.5)
    counted |= {replace(way, ep=2): rows for way, rows in volumes().items()}
    return predict(ways, on, foldings, counted, ALONE)


def exchange_s(rows: float, row_bytes: int = 256) -> float:
    """Both ways, both directions, both layers."""
    return 2 * 4 * rows * row_bytes * LINK_S


FLOPS_S = 2 * 3 * 6 * ROWS * 64 * 32 * FLOP_S
"""Forward and twice that backward, both layers."""
LATE_S = FLOPS_S / 3
"""Half of backward: the gradients of weights, which are computed while those of rows travel."""


def test_the_base_is_what_was_measured() -> None:
    [same] = predicted([FLAT], base())
    assert same.seconds == STEP_S and same.error_s == 0
    assert same.parts["layers"] == pytest.approx(exchange_s(0.75 * ROWS) + FLOPS_S - LATE_S, rel=1e-3)


def test_compression_halves_rows_and_costs_its_own_work() -> None:
    [half] = predicted([replace(FLAT, rate=0.5)], base())
    less = (exchange_s(0.75 * ROWS) + FLOPS_S - LATE_S) / 2
    assert half.seconds == pytest.approx(STEP_S - less + 2 * 0.01, rel=1e-3)
    assert half.sent_bytes["across"] + half.sent_bytes["inside"] == pytest.approx(exchange_s(0.75 * ROWS) / LINK_S / 2)


def test_rows_in_one_byte_travel_faster_and_are_packed_four_times() -> None:
    [packed] = predicted([replace(FLAT, wire="int8")], base())
    # a quarter of its exchanges hides what is computed late, and is shorter than that
    less = exchange_s(0.75 * ROWS) - LATE_S - exchange_s(0.75 * ROWS, 68) * 3 / 4
    assert packed.seconds == pytest.approx(STEP_S - less + 4 * 2 * ROWS * 1e-6, rel=1e-3)


def test_two_levels_have_their_own_rows_and_copies() -> None:
    copying = (StageTime("permute", 0, "forward", 0.1, 0.1), StageTime("restore", 0, "backward", 0.06, 0.06))
    [two] = predicted([TWO], base(stages=copying))
    up_s, inside_s = exchange_s(800), exchange_s(0.5 * ROWS)
    # notes travel with the rows that go up: a number for weight and one for place of each choice, one way
    notes_s = 2 * 2 * 800 * 2 * 4 * 4 * LINK_S
    hidden_s = up_s / 4 + notes_s / 2  # what goes up in backward, both layers
    assert two.parts["layers"] == pytest.approx(up_s + inside_s + notes_s + FLOPS_S - hidden_s, rel=1e-2)
    # 800 tokens go to the other node and as many stay; each is copied once on its way there, and once back
    passing = 2 * 2 * 800
    assert two.parts["rows"] == pytest.approx(0.16 * (4 * ROWS + passing) / (4 * ROWS))
    less = exchange_s(0.75 * ROWS) - LATE_S - up_s - inside_s - notes_s + hidden_s - 0.16 * passing / (4 * ROWS)
    assert two.seconds == pytest.approx(STEP_S - less, rel=1e-3)
    [few] = predicted([replace(TWO, rate=0.5)], base(stages=copying))
    assert few.parts["rows"] == pytest.approx(0.16 * (4 * ROWS / 2 + passing / 2) / (4 * ROWS))


def test_a_node_of_one_rank_orders_no_rows_by_source() -> None:
    alone = folding(load=replace(LOAD, nodes=4))
    rows = volumes()[FLAT] + [Volume((HopRows(900, 1.0),), ROWS, ROWS)]
    assert copies(FLAT, alone.load, rows[:1]) == 4 * ROWS
    assert copies(TWO, alone.load, rows[2:]) == 2 * ROWS + 2 * 900 * 4 / 3


def test_another_folding_pays_for_its_sharding_and_updates() -> None:
    stages = (StageTime("optimizer", None, "update", 0.2, 0.2),)
    half = folding(sharding=Measured(0.8), parameters=3000)
    [found] = predicted([replace(FLAT, ep=2)], base(stages=stages), half=half)
    assert found.seconds == pytest.approx(STEP_S + (0.8 - 0.3) + 0.2 * (3 - 1))


def test_pieces_gain_what_products_hide() -> None:
    [one, four] = predict([FLAT, replace(FLAT, pieces=4)], base(), {FLAT.folding: folding()}, volumes(), ALONE)
    assert four.parts["layers"] < one.parts["layers"] and four.seconds < one.seconds == STEP_S


def test_measured_stages_stretch_links_and_products() -> None:
    waits = [StageTime(s, 0, d, 0.05, 0.05) for s in ("dispatch", "combine") for d in ("forward", "backward")]
    stages = (*waits, StageTime("experts", 0, "forward", 0.02, 0.03), StageTime("experts", 0, "backward", 0.04, 0.06))
    on = base(stages=stages)
    found = calibrate(on, folding(), volumes()[FLAT])
    assert found.experts == pytest.approx(0.09 / FLOPS_S, rel=1e-3)
    assert found.exchange == pytest.approx((0.2 + 0.09 / 3) / exchange_s(0.75 * ROWS), rel=1e-3)
    [half] = predicted([replace(FLAT, rate=0.5)], on)
    assert half.parts["layers"] == pytest.approx((0.2 + 0.09) / 2, rel=2e-2)
    never = calibrate(base(stages=(StageTime("experts", 0, "forward", 9e9, 9e9),)), folding(), volumes()[FLAT])
    assert never.experts == 5.0 and never.exchange == 1.0, "nonsense is bounded, and nothing measured changes nothing"


def test_the_busiest_node_sets_the_time_of_a_link() -> None:
    hot = [Volume((HopRows(0.75 * ROWS, 1.5),), ROWS, 1.2 * ROWS)]
    even = [Volume((HopRows(0.75 * ROWS, 1.0),), ROWS, ROWS)]
    [slow], [fast] = (layers_work(FLAT, folding(), rows) for rows in (hot, even))
    assert slow.hops[0].out_bytes == pytest.approx(1.5 * fast.hops[0].out_bytes)
    assert slow.flops == pytest.approx(1.2 * fast.flops) and fast.hops[0].out_bytes == pytest.approx(0.75 * ROWS * 256)


def test_doubt_grows_with_what_changes() -> None:
    steady, half, other = predicted([FLAT, replace(FLAT, rate=0.5), replace(FLAT, ep=2)], base(jitter=0.1), error=0.2)
    spread = base(jitter=0.1).profile.spread
    assert steady.error_s == pytest.approx(spread * STEP_S)
    assert steady.error_s < half.error_s < other.error_s, "of another folding nothing was measured together with the base"
