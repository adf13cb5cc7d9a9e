"""The page of `profile moe`: stages, experts' load, and the other ways of sending, predicted and measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import svg
from ..report_parts import csv_text, figure, join, table
from .moe_text import STAGE_HEAD, WAY_HEAD, shown_stages, shown_ways, stage_csv, stage_rows, way_row
from .page import Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .moe import MoeProfile
    from .whatif import Outcome

SOURCE = "moefold profile moe --json"
PARTS = ("work", "the last rank is late", "transfer")
PLOTTED = 24
"""Ways in the plot: the best and the measured ones."""


def sections(found: MoeProfile) -> list[Section]:
    what = "step" if found.whole_step else "MoE layer"
    ways = None if found.what_if is None else join(_ways_plot(found), _ways_table(found))
    ways_csv = None if found.what_if is None else csv_text(WAY_HEAD, [way_row(o) for o in found.what_if.outcomes])
    return [
        Section(
            f"Where the time of a {what} goes", "stages", join(_stage_plot(found), _stage_table(found)), "", stage_csv(found)
        ),
        Section(
            "The same step sent another way",
            "what-if",
            ways,
            "start it on several ranks, without --no-predict: one rank has nothing to send",
            ways_csv,
        ),
        Section("Rows of the experts", "experts", _experts(found), "rows are counted where they travel to other ranks"),
    ]


def _stage_plot(found: MoeProfile) -> str:
    stages = shown_stages(found)
    labels = [f"{s.stage} ({s.direction})" for s in stages]
    rows = [(max(0.0, s.mean_s - s.skew_s - s.transfer_s), s.skew_s, s.transfer_s) for s in stages]

    def draw(fig: Figure) -> None:
        ax = svg.axes(fig, "ms, mean over ranks", "")
        left = [0.0] * len(rows)
        for part, name in enumerate(PARTS):
            values = [1e3 * row[part] for row in rows]
            ax.barh(range(len(rows)), values, left=left, color=svg.SERIES_KEYS[part], alpha=0.8, label=name)
            left = [a + b for a, b in zip(left, values, strict=True)]
        ax.set_yticks(range(len(rows)), labels)
        ax.invert_yaxis()
        svg.legend(fig, ax)

    plot = svg.render("stages", "Stages of a step", draw, width=svg.WIDE, height=0.6 + 0.19 * len(rows))
    text = (
        "Time of each stage, exposed: the parts add up to the step. Work: computing and starting exchanges; the rest is waiting."
    )
    return figure("Stages", plot, text, SOURCE)


def _stage_table(found: MoeProfile) -> str:
    return table("Stages", [name.replace("_", " ") for name in STAGE_HEAD], stage_rows(found))


def _ways_plot(found: MoeProfile) -> str:
    assert found.what_if is not None
    outcomes, base = shown_ways(found, PLOTTED), found.what_if.base

    def draw(fig: Figure) -> None:
        ax = svg.axes(fig, "ms per step", "")
        places = list(range(len(outcomes)))
        predicted = [1e3 * o.prediction.seconds for o in outcomes]
        errors = [1e3 * o.prediction.error_s for o in outcomes]
        label = "predicted, ± one standard deviation"
        ax.errorbar(predicted, places, xerr=errors, fmt="o", markersize=4, color=svg.SERIES_KEYS[0], elinewidth=1.2, label=label)
        timed = [(1e3 * o.measured_s, place) for place, o in zip(places, outcomes, strict=True) if o.measured_s is not None]
        if timed:
            took, where = zip(*timed, strict=True)
            ax.plot(took, where, linestyle="none", marker="D", markersize=4, color=svg.SERIES_KEYS[1], label="measured")
        ax.set_yticks(places, [_label(o, o.way == base) for o in outcomes])
        ax.invert_yaxis()
        svg.legend(fig, ax)

    plot = svg.render("ways", "Predicted time of other ways", draw, width=svg.WIDE, height=0.7 + 0.2 * len(outcomes))
    text = (
        "Time of the same step in other configurations, the base's unexplained remainder carried over. Memory is not predicted."
    )
    return figure("What if", plot, text, SOURCE)


def _label(outcome: Outcome, base: bool) -> str:
    return outcome.way.name + " (configured)" * base


def _ways_table(found: MoeProfile) -> str:
    heads = [name.replace("_", " ") for name in WAY_HEAD]
    return table("Ways; MB = 10^6 bytes that a rank sends in a step", heads, [way_row(o) for o in shown_ways(found, PLOTTED)])


def _experts(found: MoeProfile) -> str | None:
    rows = found.profile.rows_LE
    if not rows:
        return None
    lines: list[Sequence[str | int | float]] = []
    for layer, counts in rows.items():
        mean = sum(counts) / len(counts) or 1.0
        lines.append((layer, sum(counts), max(counts) / mean, min(counts) / mean, counts.index(max(counts))))
    head = ("layer", "rows of a step", "most / mean", "least / mean", "expert with most")
    return table("Rows that experts get in forward, all ranks together", head, lines)
