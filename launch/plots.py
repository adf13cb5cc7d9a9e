"""Plots as SVG text: pure functions from data to a string, drawn by `svg.render`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .svg import DASHES, HALF, INK, SERIES, SERIES_KEYS, WIDE, axes, label_text, layer_ticks, legend, render, tick
from .svg import color as color

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of one curve; with more than three in a plot, each gets fewer, so that the size of a page has a bound.
MAX_POINTS = 400


@dataclass(frozen=True)
class Series:
    """One curve: x and y of the same length; NaN in y leaves a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def lines(
    name: str,
    title: str,
    xlabel: str,
    ylabel: str,
    series: Sequence[Series],
    *,
    smooth: bool = False,
    from_zero: bool = False,
    wide: bool = False,
) -> str:
    """Curves over a common x axis. smooth: draw the data pale and a running mean (`smoothed`) on top.
    wide: for the full width of a page instead of half of it."""

    def draw(fig: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        ax = axes(fig, xlabel, ylabel)
        points = max(60, MAX_POINTS * 3 // max(3, len(series)))
        for i, s in enumerate(series):
            ink, dash = SERIES_KEYS[i % len(SERIES)], DASHES[(i // len(SERIES) if len(series) > 6 else i) % len(DASHES)]
            raw = thinned(s.x, s.y, points)
            few = len(raw[0]) < 25
            if smooth and not few:
                ax.plot(*raw, color=ink, alpha=0.3, linewidth=0.8)
                ax.plot(*thinned(s.x, smoothed(s.y), points), color=ink, linewidth=1.8, linestyle=dash, label=label_text(s.label))
            else:
                ax.plot(
                    *raw, color=ink, linewidth=1.6, linestyle=dash, marker="o" if few else None, markersize=3.5, label=s.label
                )
        if all(float(x).is_integer() for s in series for x in s.x):
            # there is no step and no layer 0.5
            ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
        if from_zero:
            ax.set_ylim(bottom=0)
        if len(series) > 1:
            legend(fig, ax)

    return render(name, title, draw, width=WIDE if wide else HALF)


def stack(name: str, title: str, xlabel: str, ylabel: str, x: Sequence[float], parts: Mapping[str, Sequence[float]]) -> str:
    """Quantities that add up to a whole, as stacked areas over x, the first one at the bottom. NaN counts as nothing."""

    def draw(fig: Figure) -> None:
        ax = axes(fig, xlabel, ylabel)
        rows = [[0.0 if math.isnan(v) else v for v in values] for values in parts.values()]
        # Areas need the same x for all of them, so they are averaged over blocks rather than thinned one by one.
        size = math.ceil(len(x) / 120) or 1
        xs = [_mean(x[i : i + size]) for i in range(0, len(x), size)]
        means = [[_mean(row[i : i + size]) for i in range(0, len(row), size)] for row in rows]
        if len(xs) == 1:
            bottom = 0.0
            for i, (label, row) in enumerate(zip(parts, means, strict=True)):
                ink = SERIES_KEYS[i % len(SERIES)]
                ax.bar([0], row, bottom=bottom, width=0.4, color=ink, alpha=0.75, label=label)
                bottom += row[0]
            ax.set_xlim(-1, 1)
            ax.set_xticks([0], [tick(xs[0])])
        else:
            ax.stackplot(xs, means, labels=list(parts), colors=SERIES_KEYS, alpha=0.75, linewidth=0)
            ax.margins(x=0)
        ax.set_ylim(bottom=0)
        legend(fig, ax)

    return render(name, title, draw, width=HALF)


def histogram(name: str, title: str, xlabel: str, ylabel: str, series: Sequence[Series], marks: Sequence[float] = ()) -> str:
    """Distribution of the y of every series as a share of its values. marks: quantiles (0..1) to show as upright lines."""

    def draw(fig: Figure) -> None:
        ax = axes(fig, xlabel, ylabel)
        finite = [[v for v in s.y if math.isfinite(v)] for s in series]
        everything = sorted(v for values in finite for v in values)
        # A few very slow steps would squeeze all others into one bar: they are counted in the last one.
        low, high = everything[0], max(quantile(everything, 0.99) * 1.05, everything[0] * 1.02 + 1e-9)
        width = (high - low) / 40
        edges = [low + i * width for i in range(41)]
        for i, (s, values) in enumerate(zip(series, finite, strict=True)):
            ink = SERIES_KEYS[i % len(SERIES)]
            weights = [1 / len(values)] * len(values)
            at = [quantile(sorted(values), q) for q in marks]
            label = label_text(s.label) + "".join(f", p{q * 100:g} {v:.3g}" for q, v in zip(marks, at, strict=True))
            ax.hist(
                [min(v, high) for v in values], edges, weights=weights, color=ink, alpha=0.45, histtype="stepfilled", label=label
            )
            for value, dash in zip(at, DASHES[1:], strict=False):
                ax.axvline(min(value, high), color=ink, linestyle=dash, linewidth=1.4)
        legend(fig, ax)

    return render(name, title, draw, width=HALF)


def load_maps(
    name: str, title: str, maps: Mapping[str, Sequence[Sequence[float | None]]], layers: Sequence[int], *, wide: bool = True
) -> str:
    """Load ratio, layer x expert, as small maps with one common colour scale centred at 1.0 (white).

    maps: caption of a map -> [layer][expert] load ratios. layers: the model's index of every row. The scale ends at the
    99th percentile, at 2 at least; larger values have its last colour.
    """
    values = sorted(v for grid in maps.values() for row in grid for v in row if v is not None and math.isfinite(v))
    top = max(2.0, math.ceil(quantile(values, 0.99) * 2) / 2) if values else 2.0
    columns = min(3 if wide else 1, len(maps))
    count = math.ceil(len(maps) / columns)

    def draw(fig: Figure) -> None:
        from matplotlib import colormaps
        from matplotlib.colors import TwoSlopeNorm

        panels = fig.subplots(count, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for ax, (caption, grid) in zip(panels, maps.items(), strict=False):
            data = [[math.nan if v is None else v for v in row] for row in grid]
            # Few levels compress well; an odd number of them keeps white at the centre.
            levels = colormaps["RdBu_r"].resampled(33)
            shown = ax.imshow(data, cmap=levels, norm=TwoSlopeNorm(1.0, 0.0, top), aspect="auto", interpolation="none")
            ax.set_title(caption, fontsize=9, color=INK)
            layer_ticks(ax, layers)
        for ax in panels[len(maps) :]:
            ax.remove()
        fig.supxlabel("expert", fontsize=9, color=INK)
        fig.supylabel("layer", fontsize=9, color=INK)
        bar = fig.colorbar(
            shown, ax=[a for a in panels if a.figure is not None], extend="max", fraction=0.05, pad=0.02, aspect=30
        )
        bar.set_label("load / ideal", color=INK, fontsize=9)
        ticks = [0, 0.5, 1, *([1.5] if top <= 3 else []), *range(2, int(top) + 1, max(1, int(top) // 4))]
        bar.set_ticks(ticks, labels=[tick(t) for t in ticks])

    return render(
        name, title, draw, width=WIDE if wide else HALF, height=max(1.9, 0.6 + count * min(2.8, 1.1 + 0.07 * len(layers)))
    )


def matrix(
    name: str,
    title: str,
    values: Sequence[Sequence[float]],
    sides: tuple[str, str],
    unit: str,
    *,
    borders: Sequence[int] = (),
    upright: bool = True,
    columns: Sequence[object] | None = None,
) -> str:
    """A table of numbers as a map with colours from 0 to the largest; NaN stays empty. sides: what its rows and its columns are.

    borders: rows before which a line is drawn, and columns too where `upright`; as between machines. columns: their names.
    """

    def draw(fig: Figure) -> None:
        from matplotlib import colormaps

        ax = fig.add_subplot()
        top = max((v for row in values for v in row if math.isfinite(v)), default=0.0) or 1.0
        blues = colormaps["Blues"].resampled(32)
        shown = ax.imshow(values, cmap=blues, vmin=0, vmax=top, interpolation="none", aspect="equal" if upright else "auto")
        layer_ticks(ax, range(len(values)))
        if columns is not None:
            step = math.ceil(len(columns) / 8) or 1
            ax.set_xticks(range(0, len(columns), step), [str(c) for c in columns[::step]])
        for border in borders:
            # dark on light, so that it shows on any colour
            for ink, width in (("white", 2.4), ("black", 0.8)):
                ax.axhline(border - 0.5, color=ink, linewidth=width)
                if upright:
                    ax.axvline(border - 0.5, color=ink, linewidth=width)
        ax.set_ylabel(sides[0])
        ax.set_xlabel(sides[1])
        bar = fig.colorbar(shown, ax=ax, fraction=0.05, pad=0.02)
        bar.set_label(unit, color=INK, fontsize=9)
        bar.ax.yaxis.set_major_formatter(lambda v, _: tick(float(f"{v:.3g}")))

    height = 3.6 if upright else max(1.8, min(3.6, 1.0 + 0.14 * len(values)))
    return render(name, title, draw, width=HALF, height=height)


def smoothed(y: Sequence[float], span: float | None = None) -> list[float]:
    """Running mean of y, weighted exponentially to both sides so that it does not lag behind; NaN is passed over.

    span: in points, how far the weights reach; default a fiftieth of all.
    """
    keep = 1 - 1 / max(2.0, span if span is not None else len(y) / 50)

    def one_side(values: Sequence[float]) -> list[tuple[float, float]]:
        total, weight, out = 0.0, 0.0, []
        for v in values:
            total, weight = (keep * total + v, keep * weight + 1) if math.isfinite(v) else (keep * total, keep * weight)
            out.append((total, weight))
        return out

    before, after, out = one_side(y), one_side(y[::-1])[::-1], []
    for v, (t0, w0), (t1, w1) in zip(y, before, after, strict=True):
        # The point itself is in both sides.
        t, w = (t0 + t1 - v, w0 + w1 - 1) if math.isfinite(v) else (t0 + t1, w0 + w1)
        out.append(t / w if w > 0 else math.nan)
    return out


def quantile(ordered: Sequence[float], q: float) -> float:
    """The `q` quantile (0..1) of ascending values, interpolated linearly. There must be at least one."""
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def thinned(x: Sequence[float], y: Sequence[float], points: int) -> tuple[list[float], list[float]]:
    """At most about `points` points: of every block its lowest and its highest, so that spikes stay visible."""
    if len(x) <= points:
        return list(x), list(y)
    size = math.ceil(2 * len(x) / points)
    chosen: list[int] = []
    for start in range(0, len(x), size):
        block = [i for i in range(start, min(start + size, len(x))) if math.isfinite(y[i])] or [start]
        chosen += sorted({min(block, key=y.__getitem__), max(block, key=y.__getitem__)})
    chosen = sorted({0, *chosen, len(x) - 1})
    return [x[i] for i in chosen], [y[i] for i in chosen]
