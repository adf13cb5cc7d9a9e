"""The report's section on communication: who sends how much to whom, where the waiting is, and why."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from . import plots
from .report_parts import RunData, Runs, csv_link, figure, join, row, table
from .report_sections import curves

SOURCE = "comm.json"
MATRIX_RANKS = 256
"""Ranks up to which a traffic matrix is drawn: more cannot be told apart."""


def communication(runs: Runs) -> str | None:
    """Waiting over time, its causes, the traffic matrix, and time by layer and purpose."""
    found = [run for run in runs if run.comm]
    if not found:
        return None
    return join(
        row(
            curves(runs, "comm/a2a_share", "Share of the all-to-all", zero=True, smooth=True),
            curves(runs, "comm/exposed_share", "Share of all waiting for collectives", zero=True, smooth=True),
            curves(runs, "comm/skew_s", "Waiting for the last rank", zero=True, smooth=True),
            curves(runs, "comm/a2a_gib", "Bytes of the all-to-all", zero=True),
        ),
        *(_causes(run, len(runs) > 1) for run in found),
        row(*(_matrix(run, index, len(runs) > 1) for index, run in enumerate(found))),
        *(_layers(run, len(runs) > 1) for run in found),
        *(_ranks(run, len(runs) > 1) for run in found),
    )


def _of(run: RunData, several: bool) -> str:
    return f": {run.name}" if several else ""


def _causes(run: RunData, several: bool) -> str:
    steps, error_ms = run.comm.get("steps", []), 1e3 * run.comm.get("clock_error_s", 0.0)
    about = f"{len(steps)} sampled steps up to {max(steps, default=0)}; clocks compared to ±{error_ms:.2g} ms"
    causes = [v.get("text", "") for v in run.comm.get("verdicts", [])] or ["no rank, link or expert stands out"]
    items = "".join(f"<li>{escape(text)}</li>" for text in causes)
    return f'<div class="card"><h3>Why ranks wait{escape(_of(run, several))}</h3><ul>{items}</ul><p>{escape(about)}.</p></div>'


def _matrix(run: RunData, index: int, several: bool) -> str | None:
    steps = len(run.comm.get("steps", []))
    whole = run.comm.get("all_to_all_bytes", [])
    if not steps or not any(map(any, whole)) or len(whole) > MATRIX_RANKS:
        return None
    mib = [[n / steps / 2**20 for n in line] for line in whole]
    title, name = f"Traffic of the all-to-all{_of(run, several)}", f"traffic-{index}"
    hosts = run.comm.get("hosts", [])
    borders = [r for r in range(1, len(hosts)) if hosts[r] != hosts[r - 1]]
    svg = plots.matrix(name, title, mib, ("from rank", "to rank"), "MiB/step", borders=borders)
    rows = [[source, target, n] for source, line in enumerate(mib) for target, n in enumerate(line)]
    what = "Bytes of counts, dispatch and combine, forward and backward. The diagonal stays on its rank."
    return figure(title, svg, what, SOURCE, csv_link(name, ["from", "to", "mib_per_step"], rows, SOURCE))


def _layers(run: RunData, several: bool) -> str | None:
    ranks_and_steps = run.comm.get("ranks", 1) * max(1, len(run.comm.get("steps", [])))

    def cells(line: Mapping[str, Any]) -> list[Any]:
        layer = "–" if line["layer"] is None else str(line["layer"])
        times = [1e3 * line[name] / ranks_and_steps for name in ("skew_s", "transfer_s", "hidden_s", "unseen_s")]
        return [layer, line["what"], line["axis"], line["direction"], *times, 100 * line["exposed_share"]]

    head = ["layer", "what", "axis", "direction", "skew (ms)", "transfer (ms)", "hidden (ms)", "unseen (ms)", "exposed (%)"]
    rows = [cells(line) for line in run.comm.get("layers", [])]
    return table(f"Time by layer, per rank and step ({SOURCE}){_of(run, several)}", head, rows) if rows else None


def _ranks(run: RunData, several: bool) -> str | None:
    steps, last = max(1, len(run.comm.get("steps", []))), run.comm.get("last", {})
    rows = [
        [
            rank,
            1e3 * line["skew_s"] / steps,
            1e3 * line["transfer_s"] / steps,
            100 * line["exposed_share"] * run.comm["ranks"],
            last.get(rank, 0),
        ]
        for rank, line in run.comm.get("by_rank", {}).items()
    ]
    head = ["rank", "skew (ms/step)", "transfer (ms/step)", "exposed (%)", "came last (times)"]
    return table(f"Waiting by rank ({SOURCE}){_of(run, several)}", head, rows) if rows else None
