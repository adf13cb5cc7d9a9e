"""Plots: the same SVG each time, with the page's colours, ids of their own and no data lost from sight."""

from __future__ import annotations

import math
import re

import pytest

from moefold.launch import plots


def test_smoothing_neither_lags_nor_spreads_values_that_are_not_finite() -> None:
    ramp = [float(i) for i in range(200)]
    assert plots.smoothed(ramp)[100] == pytest.approx(100)
    spike = plots.smoothed([1.0] * 50 + [math.nan] + [1.0] * 50)
    assert spike == pytest.approx([1.0] * 101)
    assert all(math.isnan(v) for v in plots.smoothed([math.nan] * 3))
    noise = [(-1.0) ** i for i in range(100)]
    assert max(map(abs, plots.smoothed(noise, span=20)[10:90])) < 0.1


def test_thinned_curve_keeps_its_ends_and_its_spikes() -> None:
    y = [0.0] * 10_000
    y[7_777] = 5.0
    svg = plots.lines("a", "t", "x", "y", [plots.Series("run", range(10_000), y)])
    assert len(svg) < 40_000
    xs, ys = plots.thinned(range(10_000), y, 400)
    assert (xs[0], xs[-1], max(ys)) == (0, 9_999, 5.0) and len(xs) <= 402


def test_svg_is_the_same_each_time_and_takes_its_colours_from_the_page() -> None:
    draw = lambda name: plots.lines(name, "t <", "x", "y", [plots.Series("a", [1, 2], [1, 2]), plots.Series("b", [1, 2], [2, 1])])  # noqa: E731
    assert draw("one") == draw("one")
    assert "currentColor" in draw("one") and "var(--series-1," in draw("one") and 'aria-label="t &lt;"' in draw("one")
    one, two = (set(re.findall(r' id="([^"]*)"', draw(name))) for name in ("one", "two"))
    assert one and two and not one & two
    assert "#0102" not in draw("one")


def test_plotting_leaves_the_users_matplotlib_settings_alone() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plots.histogram("h", "t", "x", "y", [plots.Series("a", [1, 2, 3], [1.0, 2.0, math.nan])], (0.5,))
    assert dict(mpl.rcParams) == before


def test_load_maps_scale_is_centred_at_one_and_survives_missing_values() -> None:
    svg = plots.load_maps("m", "load", {"step 1": [[0.0, 1.0, None]], "step 2": [[9.0, 1.0, 1.0]]}, [3])
    texts = re.findall(r">([^<\n]+)</text>", svg)
    assert svg.count("<image") == 2
    assert {"step 1", "step 2", "expert", "layer", "load / ideal", "0", "1", "3"} <= set(texts)


def test_step_breakdown_with_a_single_record_is_a_bar() -> None:
    svg = plots.stack("s", "t", "step", "s", [10], {"a": [1.0], "b": [math.nan]})
    assert {"10", "a", "b"} <= set(re.findall(r">([^<\n]+)</text>", svg))


def test_a_plot_over_whole_numbers_has_no_fractions_on_its_axis() -> None:
    def ticks(x: list[float]) -> list[str]:
        svg = plots.lines("a", "t", "x", "y", [plots.Series("run", x, [0.0, 1.0])])
        return re.findall(r"middle; [^>]*>(-?[\d.]+)</text>", svg)

    assert ticks([0.0, 2.0]) == ["0", "1", "2"]
    assert any("." in label for label in ticks([0.5, 1.5]))
