"""How a plot becomes SVG that belongs to its page: ink, colours, fonts, ids. matplotlib is imported when a plot is drawn.

Every plot is transparent; its ink is `currentColor` and its curves are CSS variables (`--series-0`, ...) with fall-backs,
so the page decides about light and dark, and the file is readable on its own. The same data always gives the same text:
no dates, no random ids. `name` prefixes all ids, so several plots can stand in one page.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Widths in inches of figures as wide as the page and half as wide: their letters come out about equal.
WIDE, HALF = 9.2, 4.9
# Stand-ins that matplotlib accepts as colours; `_finish` replaces them by CSS.
INK, GRID = "#010203", "#010204"
# Told apart with colour-blindness (after Okabe and Ito) and with at least 3:1 contrast on white; the page sets lighter
# ones for dark mode. Runs differ in dashes too, for print and for people who see no colour.
SERIES = ("#0072b2", "#c44e00", "#00835f", "#b0508a", "#8a6d00", "#5b5bb5")
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
SERIES_KEYS = tuple(f"#0102{i:02x}" for i in range(16, 16 + len(SERIES)))


def color(index: int) -> str:
    """Colour of the series `index` for CSS: a variable of the page, with a fall-back."""
    return f"var(--series-{index % len(SERIES)}, {SERIES[index % len(SERIES)]})"


def axes(fig: Figure, xlabel: str, ylabel: str) -> Axes:
    from matplotlib.ticker import FuncFormatter

    ax = fig.add_subplot()
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(True, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda v, _: tick(v)))
    return ax


def tick(value: float) -> str:
    """A number on an axis, short and without a shared offset that readers overlook."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):g}{unit}"
    return f"{value:g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2g}"


def layer_ticks(ax: Axes, layers: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    step = math.ceil(len(layers) / 6)
    ax.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def label_text(text: str) -> str:
    """A name as a label: matplotlib leaves out those that begin with an underscore, unless something stands before it."""
    return f"\u200b{text}" if text.startswith("_") else text


def legend(fig: Figure, ax: Axes) -> None:
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
        labelcolor=INK,
        loc="outside upper left",
        ncols=max(1, min(columns, len(labels))),
        borderpad=0,
        columnspacing=1.2,
    )


def render(name: str, title: str, draw: Callable[[Figure], None], *, width: float, height: float = 2.9) -> str:
    """Draw on a figure of `width` x `height` inches and give it back as an `<svg>` element named by `title`."""
    import io

    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink: dict[str, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK
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
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--grid, #b9b9b9)")
    for i, key in enumerate(SERIES_KEYS):
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
