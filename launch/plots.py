"""Plots as SVG text: pure functions from data to a string. matplotlib is imported when a plot is drawn.

Every plot is transparent; its ink is `currentColor` and its curves are CSS variables (`--series-0`, ...) with fall-backs,
so the page decides about light and dark, and the file is readable on its own. The same data always gives the same text:
no dates, no random ids. `name` prefixes all ids, so several plots can stand in one page.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of one curve; with more than three in a plot, each gets fewer, so that the size of a page has a bound.
MAX_POINTS = 400
# Widths in inches of figures as wide as the page and half as wide: their letters come out about equal.
WIDE, HALF = 9.2, 4.9
# Stand-ins that matplotlib accepts as colours; `_finish` replaces them by CSS.
_INK, _GRID = "#010203", "#010204"
# Told apart with colour-blindness (after Okabe and Ito) and with at least 3:1 contrast on white; the page sets lighter
# ones for dark mode. Runs differ in dashes too, for print and for people who see no colour.
_SERIES = ("#0072b2", "#c44e00", "#00835f", "#b0508a", "#8a6d00", "#5b5bb5")
_DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_SERIES_KEYS = tuple(f"#0102{i:02x}" for i in range(16, 16 + len(_SERIES)))


@dataclass(frozen=True)
class Series:
    """One curve: x and y of the same length; NaN in y leaves a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def color(index: int) -> str:
    """Colour of the series `index` for CSS: a variable of the page, with a fall-back."""
    return f"var(--series-{index % len(_SERIES)}, {_SERIES[index % len(_SERIES)]})"


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
        ax = _axes(fig, xlabel, ylabel)
        points = max(60, MAX_POINTS * 3 // max(3, len(series)))
        for i, s in enumerate(series):
            ink, dash = _SERIES_KEYS[i % len(_SERIES)], _DASHES[(i // len(_SERIES) if len(series) > 6 else i) % len(_DASHES)]
            raw = thinned(s.x, s.y, points)
            few = len(raw[0]) < 25
            if smooth and not few:
                ax.plot(*raw, color=ink, alpha=0.3, linewidth=0.8)
                ax.plot(*thinned(s.x, smoothed(s.y), points), color=ink, linewidth=1.8, linestyle=dash, label=_label(s.label))
            else:
                ax.plot(
                    *raw, color=ink, linewidth=1.6, linestyle=dash, marker="o" if few else None, markersize=3.5, label=s.label
                )
        if from_zero:
            ax.set_ylim(bottom=0)
        if len(series) > 1:
            _legend(fig, ax)

    return _render(name, title, draw, width=WIDE if wide else HALF)


def stack(name: str, title: str, xlabel: str, ylabel: str, x: Sequence[float], parts: Mapping[str, Sequence[float]]) -> str:
    """Quantities that add up to a whole, as stacked areas over x, the first one at the bottom. NaN counts as nothing."""

    def draw(fig: Figure) -> None:
        ax = _axes(fig, xlabel, ylabel)
        rows = [[0.0 if math.isnan(v) else v for v in values] for values in parts.values()]
        # Areas need the same x for all of them, so they are averaged over blocks rather than thinned one by one.
        size = math.ceil(len(x) / 120) or 1
        xs = [_mean(x[i : i + size]) for i in range(0, len(x), size)]
        means = [[_mean(row[i : i + size]) for i in range(0, len(row), size)] for row in rows]
        if len(xs) == 1:
            bottom = 0.0
            for i, (label, row) in enumerate(zip(parts, means, strict=True)):
                ink = _SERIES_KEYS[i % len(_SERIES)]
                ax.bar([0], row, bottom=bottom, width=0.4, color=ink, alpha=0.75, label=label)
                bottom += row[0]
            ax.set_xlim(-1, 1)
            ax.set_xticks([0], [_tick(xs[0])])
        else:
            ax.stackplot(xs, means, labels=list(parts), colors=_SERIES_KEYS, alpha=0.75, linewidth=0)
            ax.margins(x=0)
        ax.set_ylim(bottom=0)
        _legend(fig, ax)

    return _render(name, title, draw, width=HALF)


def histogram(name: str, title: str, xlabel: str, ylabel: str, series: Sequence[Series], marks: Sequence[float] = ()) -> str:
    """Distribution of the y of every series as a share of its values. marks: quantiles (0..1) to show as upright lines."""

    def draw(fig: Figure) -> None:
        ax = _axes(fig, xlabel, ylabel)
        finite = [[v for v in s.y if math.isfinite(v)] for s in series]
        everything = sorted(v for values in finite for v in values)
        # A few very slow steps would squeeze all others into one bar: they are counted in the last one.
        low, high = everything[0], max(quantile(everything, 0.99) * 1.05, everything[0] * 1.02 + 1e-9)
        width = (high - low) / 40
        edges = [low + i * width for i in range(41)]
        for i, (s, values) in enumerate(zip(series, finite, strict=True)):
            ink = _SERIES_KEYS[i % len(_SERIES)]
            weights = [1 / len(values)] * len(values)
            at = [quantile(sorted(values), q) for q in marks]
            label = _label(s.label) + "".join(f", p{q * 100:g} {v:.3g}" for q, v in zip(marks, at, strict=True))
            ax.hist(
                [min(v, high) for v in values], edges, weights=weights, color=ink, alpha=0.45, histtype="stepfilled", label=label
            )
            for value, dash in zip(at, _DASHES[1:], strict=False):
                ax.axvline(min(value, high), color=ink, linestyle=dash, linewidth=1.4)
        _legend(fig, ax)

    return _render(name, title, draw, width=HALF)


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

        axes = fig.subplots(count, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for ax, (caption, grid) in zip(axes, maps.items(), strict=False):
            data = [[math.nan if v is None else v for v in row] for row in grid]
            # Few levels compress well; an odd number of them keeps white at the centre.
            levels = colormaps["RdBu_r"].resampled(33)
            shown = ax.imshow(data, cmap=levels, norm=TwoSlopeNorm(1.0, 0.0, top), aspect="auto", interpolation="none")
            ax.set_title(caption, fontsize=9, color=_INK)
            _layer_ticks(ax, layers)
        for ax in axes[len(maps) :]:
            ax.remove()
        fig.supxlabel("expert", fontsize=9, color=_INK)
        fig.supylabel("layer", fontsize=9, color=_INK)
        bar = fig.colorbar(shown, ax=[a for a in axes if a.figure is not None], extend="max", fraction=0.05, pad=0.02, aspect=30)
        bar.set_label("load / ideal", color=_INK, fontsize=9)
        ticks = [0, 0.5, 1, *([1.5] if top <= 3 else []), *range(2, int(top) + 1, max(1, int(top) // 4))]
        bar.set_ticks(ticks, labels=[_tick(t) for t in ticks])

    return _render(
        name, title, draw, width=WIDE if wide else HALF, height=max(1.9, 0.6 + count * min(2.8, 1.1 + 0.07 * len(layers)))
    )


def matrix(name: str, title: str, values: Sequence[Sequence[float]], axes: tuple[str, str], unit: str) -> str:
    """A table of numbers as a map with colours from 0 to the largest. axes: what its rows and its columns are."""

    def draw(fig: Figure) -> None:
        from matplotlib import colormaps

        ax = fig.add_subplot()
        top = max((v for row in values for v in row), default=0.0) or 1.0
        shown = ax.imshow(values, cmap=colormaps["Blues"].resampled(32), vmin=0, vmax=top, interpolation="none")
        _layer_ticks(ax, range(len(values)))
        ax.set_ylabel(axes[0])
        ax.set_xlabel(axes[1])
        bar = fig.colorbar(shown, ax=ax, fraction=0.05, pad=0.02)
        bar.set_label(unit, color=_INK, fontsize=9)
        bar.ax.yaxis.set_major_formatter(lambda v, _: _tick(float(f"{v:.3g}")))

    return _render(name, title, draw, width=HALF, height=3.6)


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


def _axes(fig: Figure, xlabel: str, ylabel: str) -> Axes:
    from matplotlib.ticker import FuncFormatter

    ax = fig.add_subplot()
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(True, color=_GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda v, _: _tick(v)))
    return ax


def _tick(value: float) -> str:
    """A number on an axis, short and without a shared offset that readers overlook."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):g}{unit}"
    return f"{value:g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2g}"


def _layer_ticks(ax: Axes, layers: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    step = math.ceil(len(layers) / 6)
    ax.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _label(text: str) -> str:
    """A name as a label: matplotlib leaves out those that begin with an underscore, unless something stands before it."""
    return f"\u200b{text}" if text.startswith("_") else text


def _legend(fig: Figure, ax: Axes) -> None:
    """Above the plot, where it hides no data, in as many columns as fit."""
    handles, labels = ax.get_legend_handles_labels()
    labels = [label if len(label) <= 48 else f"{label[:30]}…{label[-17:]}" for label in labels]
    # In points: 8-point letters are about 4.6 wide, a handle with its gaps 40.
    columns = int(fig.get_figwidth() * 72 // (max(map(len, labels)) * 4.6 + 40))
    fig.legend(
        handles,
        labels,
        frameon=False,
        fontsize=8,
        labelcolor=_INK,
        loc="outside upper left",
        ncols=max(1, min(columns, len(labels))),
        borderpad=0,
        columnspacing=1.2,
    )


def _render(name: str, title: str, draw: Callable[[Figure], None], *, width: float, height: float = 2.9) -> str:
    """Draw on a figure of `width` x `height` inches and give it back as an `<svg>` element named by `title`."""
    import io

    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink: dict[str, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"), _INK
    )
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.parse_math": False,
    }
    # These settings are read while drawing, so there is no way around a (restored) global context.
    # Starting from the defaults keeps a user's own matplotlibrc out of the report.
    defaults = {k: v for k, v in mpl.rcParamsDefault.items() if k != "backend"}
    settings: Any = {**defaults, **style, **ink}
    with mpl.rc_context(settings):
        fig = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(fig)
        draw(fig)
        buffer = io.StringIO()
        fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _finish(buffer.getvalue(), name, title)


def _finish(svg: str, name: str, title: str) -> str:
    """matplotlib's file as an element for a page: CSS colours, own ids, the page's font, half the size, an accessible name."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(_INK, "currentColor").replace(_GRID, "var(--grid, #b9b9b9)")
    for i, key in enumerate(_SERIES_KEYS):
        svg = svg.replace(key, color(i))
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    # Rules of a style element would hold for the whole page; these two are inherited, so the root can carry them.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    # Hundredths of a point cannot be seen.
    svg = re.sub(r' (?:d|x|y)="[^"]*"|rotate\([^)]*\)', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    return svg.replace(
        "<svg ", f'<svg role="img" aria-label="{escape(title)}" style="stroke-linejoin: round; stroke-linecap: butt" ', 1
    ).strip()
