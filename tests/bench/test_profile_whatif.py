"""The benchmark of predictions, without links: its ways, its figures from planted times, and its goals."""

from __future__ import annotations

from typing import Any

import pytest
from bench.profile_whatif import figures, spearman, table
from bench.result import load_goals
from bench.whatif.case import Shape, ways

from moefold.launch.config import Loaded, check_world


def planted(name: str, predicted_s: float, measured_s: float, base: bool = False) -> dict[str, Any]:
    times = {"seconds": predicted_s, "error_s": 0.1, "measured_s": measured_s, "measurements_s": [0.9 * measured_s, measured_s]}
    return {"name": name, "parts": {"layers": 0.5}, "is_base": base, "prediction_took_s": 3.0, **times}


def test_ways_are_many_and_cover_what_is_to_be_predicted() -> None:
    shape = Shape()
    found = ways(shape)
    assert len(found) >= 12 and len(set(found)) == len(found) and found[0].folding == (shape.world, 1, 1)
    assert {w.dispatcher for w in found} == {"all_to_all", "hierarchical"}
    assert {w.wire for w in found} == {"none", "int8", "e4m3"} and len({w.rate for w in found}) == 3
    assert len({w.pieces for w in found}) == 3 and len({w.folding for w in found}) == 4
    topology = check_world(Loaded(shape.config(), {}), shape.world)
    for way in found:
        model = way.model(shape.config().model)
        assert way.topology(topology).world == shape.world and model.moe is not None


def test_figures_follow_from_predicted_and_measured_times() -> None:
    good = [planted("a", 1.0, 1.1), planted("b", 2.0, 1.6), planted("base", 3.0, 3.0, True), planted("c", 4.0, 5.0)]
    bad = [planted("a", 1.0, 4.0), planted("b", 2.0, 2.0), planted("base", 3.0, 3.0, True), planted("c", 4.0, 1.0)]
    found = figures(["1mbit", "2mbit"], [good, bad])
    assert found["median_error_1mbit"] == pytest.approx(0.2), "1/11, 1/4 and 1/5: the base is no prediction"
    assert found["rank_correlation_1mbit"] == 1 and found["best_over_best_1mbit"] == 1
    assert found["best_over_best"] == found["best_over_best_2mbit"] == 4
    assert found["rank_correlation"] == found["rank_correlation_2mbit"] == pytest.approx(-0.8)
    assert found["median_error"] == found["median_error_2mbit"] == 0.75
    rows = table(["1mbit", "2mbit"], [good, bad])
    assert len(rows) == 8 and rows[0]["error"] == pytest.approx(1 / 1.1 - 1) and rows[0]["least_ms"] == pytest.approx(990)


def test_rank_correlation_is_that_of_ranks() -> None:
    assert spearman([1, 2, 3, 4, 5], [10, 20, 50, 40, 30]) == pytest.approx(1 - 6 * 8 / 120)


def test_every_goal_has_its_figure() -> None:
    found = figures(["1mbit"], [[planted("a", 1.0, 1.1), planted("base", 2.0, 2.0, True)]])
    goals = {goal.figure: goal for goal in load_goals("profile_whatif")}
    assert set(goals) == {"median_error", "rank_correlation", "best_over_best"} and set(goals) <= set(found)
    assert goals["median_error"].at_most == 0.1 and goals["rank_correlation"].at_least == 0.9
