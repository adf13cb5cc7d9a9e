"""Plots of communication as SVG text: a timeline of ranks, and bars of parts. Pure functions from data to a string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .svg import GRID, INK, SERIES_KEYS, WIDE, legend, render, tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HATCHES = ("", "////", "\\\\\\\\", "....", "xxxx", "----")
"""Beside colour, so that parts can be told apart on paper and by people who see no colour."""
PIXELS = 1400
"""Of a timeline's width: what would be narrower than one is drawn with its neighbours."""
BARS = 5000
"""In one timeline, over all ranks; each is about 30 bytes of the page."""
Bars = Sequence[tuple[float, float]]


def timeline(
    name: str, title: str, xlabel: str, rows: Mapping[str, Mapping[str, Bars]], kinds: Mapping[str, tuple[int, float]]
) -> str:
    """What each row (a rank) was in over time. rows: label -> kind -> (start, end). kinds: kind -> (colour, opacity)."""

    def draw(fig: Figure) -> None:
        from matplotlib.patches import Patch

        ax = fig.add_subplot()
        end = max((e for bars in rows.values() for spans in bars.values() for _, e in spans), default=1.0)
        grain = end / PIXELS
        while sum(len(joined(s, grain)) for bars in rows.values() for s in bars.values()) > BARS:
            grain *= 1.5
        for kind, (series, alpha) in kinds.items():
            boxes = [(a, b, y) for y, bars in enumerate(rows.values()) for a, b in joined(bars.get(kind, ()), grain)]
            _boxes(ax, boxes, SERIES_KEYS[series], alpha)
        ax.set_xlim(0, end)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        step = -(-len(rows) // 32)
        ax.set_yticks(range(0, len(rows), step), list(rows)[::step])
        ax.set_xlabel(xlabel)
        ax.xaxis.set_major_formatter(lambda v, _: tick(v))
        ax.tick_params(axis="y", length=0)
        ax.grid(True, axis="x", color=GRID, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines["left"].set_visible(False)
        patches = [Patch(facecolor=SERIES_KEYS[i], alpha=alpha, label=kind) for kind, (i, alpha) in kinds.items()]
        fig.legend(handles=patches, frameon=False, fontsize=8, labelcolor=INK, loc="outside upper left", ncols=3, borderpad=0)

    return render(name, title, draw, width=WIDE, height=max(1.6, min(7.0, 1.0 + 0.26 * len(rows))))


def joined(spans: Bars, grain: float) -> list[tuple[float, float]]:
    """Spans with gaps below `grain` between them as one, and shorter ones as long as that; so that few bars show many."""
    out: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if out and start - out[-1][1] < grain:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, max(end, start + grain)))
    return out


def _boxes(ax: Axes, boxes: Sequence[tuple[float, float, float]], ink: str, alpha: float) -> None:
    """(left, right, middle) each as a box, all in one path: as elements of their own they would be most of the page."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    if not boxes:
        return
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(boxes)
    corners = [p for a, b, y in boxes for p in ((a, y - 0.4), (b, y - 0.4), (b, y + 0.4), (a, y + 0.4), (a, y - 0.4))]
    ax.add_patch(PathPatch(Path(corners, codes), facecolor=ink, alpha=alpha, edgecolor="none"))


def parts_of_a_whole(name: str, title: str, xlabel: str, rows: Sequence[str], parts: Mapping[str, Sequence[float]]) -> str:
    """A bar for each row, made of parts one after another. parts: label -> value of each row."""

    def draw(fig: Figure) -> None:
        ax = fig.add_subplot()
        left = [0.0] * len(rows)
        for index, (label, values) in enumerate(parts.items()):
            ink = SERIES_KEYS[index % len(SERIES_KEYS)]
            hatch = HATCHES[index % len(HATCHES)]
            style = {"color": ink, "alpha": 0.8} if not hatch else {"facecolor": "none", "edgecolor": ink, "hatch": hatch}
            ax.barh(range(len(rows)), values, left=left, height=0.72, label=label, linewidth=0.8, **style)
            left = [a + b for a, b in zip(left, values, strict=True)]
        ax.set_ylim(len(rows) - 0.5, -0.5)
        step = -(-len(rows) // 32)
        ax.set_yticks(range(0, len(rows), step), list(rows)[::step])
        ax.set_xlabel(xlabel)
        ax.margins(x=0)
        ax.xaxis.set_major_formatter(lambda v, _: tick(v))
        ax.grid(True, axis="x", color=GRID, linewidth=0.6)
        ax.set_axisbelow(True)
        legend(fig, ax)

    return render(name, title, draw, width=WIDE, height=max(1.5, min(7.0, 0.9 + 0.3 * len(rows))))
