"""How many bytes of gradients each window takes, and what is left to wait for."""

from __future__ import annotations

import math

import pytest

from moefold.parallel.cost_model import LinkModel
from moefold.parallel.gradient_placement import LayerGaps, WindowBytes, gap_between, place_gradients
from moefold.parallel.schedule import Op, run

LINK = LinkModel(0.5, 1.0)
"""Half a second and one per byte."""


def test_gradients_go_into_the_windows_of_later_layers() -> None:
    layers = [LayerGaps(9.0, 2.5, 4.0, 5.0), LayerGaps(2.5, 0.4, 0.0, 3.0), LayerGaps(0.0, 4.5, 0.0, 1.0)]
    placed = place_gradients(layers, LINK, last_bytes=6.0)
    # nothing is there for the first window, half of its experts' gradients fit into the next; 2 of 2 + 5, the gap of 0.4 is too
    # short; then 4 of 5 + 3
    assert placed.windows == (WindowBytes(0, 2), WindowBytes(2, 0), WindowBytes(0, 4))
    assert placed.exposed_s == pytest.approx(0.5 + 5 + 6)
    assert placed.serial_s == pytest.approx(4 + 5 + 3 + 1 + 6 + 5 * 0.5)
    assert placed.gain_s == pytest.approx(10.0)


def test_what_exists_before_the_first_layer_waits_for_its_experts() -> None:
    placed = place_gradients([LayerGaps(2.5, 0.0, 0.0, 0.0)], LINK, first_bytes=3.0)
    assert placed.windows == (WindowBytes(2, 0),) and placed.exposed_s == pytest.approx(1.5)


def test_without_windows_nothing_is_gained_but_fewer_starts() -> None:
    placed = place_gradients([LayerGaps(0.0, 0.0, 0.0, 2.0)] * 2, LINK)
    assert placed.windows == (WindowBytes(0, 0),) * 2
    assert (placed.exposed_s, placed.serial_s) == (4.5, 5.0)
    assert place_gradients([LayerGaps(1.0, 1.0, 0.0, 0.0)], LINK).exposed_s == 0


def test_a_link_without_slope_takes_all_there_is() -> None:
    assert math.isinf(LinkModel(0.5, 0.0).fits(1.0))
    placed = place_gradients([LayerGaps(1.0, 1.0, 2.0, 7.0)], LinkModel(0.5, 0.0), first_bytes=3.0)
    assert placed.windows == (WindowBytes(3, 2),) and placed.exposed_s == 0.5


def test_the_gap_is_what_lies_between_exchanges() -> None:
    there = Op("there", "across", 2.0)
    experts = Op("experts", "compute", 3.0, ("there",))
    back = Op("back", "across", 1.0, ("experts",))
    shared = Op("shared", "compute", 4.0, ("experts",))
    assert gap_between(run([there, experts, back, shared]), "across") == 3.0
