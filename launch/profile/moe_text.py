"""`profile moe` for a terminal: stages, experts' load, what else the step could take, and the verdict. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...parallel.step_profile import StageTime
from ..plan_text import size_text
from ..report_parts import csv_text

if TYPE_CHECKING:
    from .moe import MoeProfile
    from .whatif import Outcome

SHOWN = 16
"""Ways in the table of a terminal: the best, and the base."""
STAGE_HEAD = ("stage", "direction", "mean_ms", "most_ms", "share", "skew_ms", "transfer_ms", "hidden_ms")
WAY_HEAD = ("way", "predicted_ms", "plus_minus_ms", "gain", "measured_ms", "off", "across_mb", "inside_mb")


def shown_stages(found: MoeProfile) -> list[StageTime]:
    """All of them, or those of a MoE layer."""
    from .moe import LAYER_STAGES

    stages = found.profile.by_stage()
    return [s for s in stages if found.whole_step or s.stage in LAYER_STAGES]


def stage_rows(found: MoeProfile) -> list[tuple[str | float, ...]]:
    """Of `STAGE_HEAD`. share: of what is shown."""
    stages = shown_stages(found)
    whole = sum(s.mean_s for s in stages) or 1.0
    rows: list[tuple[str | float, ...]] = []
    for s in stages:
        waits = (1e3 * s.skew_s, 1e3 * s.transfer_s, 1e3 * s.hidden_s)
        rows.append((s.stage, s.direction, 1e3 * s.mean_s, 1e3 * s.most_s, s.mean_s / whole, *waits))
    return rows


def stage_csv(found: MoeProfile) -> str:
    return csv_text(STAGE_HEAD, stage_rows(found))


def way_row(outcome: Outcome) -> tuple[str | float | None, ...]:
    """Of `WAY_HEAD`; MB = 10^6 bytes of rows that a rank sends in a step."""
    p, measured_s = outcome.prediction, outcome.measured_s
    sent = [p.sent_bytes[where] / 1e6 for where in ("across", "inside")]
    took = None if measured_s is None else 1e3 * measured_s
    return (p.way.name, 1e3 * p.seconds, 1e3 * p.error_s, outcome.gain, took, outcome.error, *sent)


def shown_ways(found: MoeProfile, most: int = SHOWN) -> list[Outcome]:
    """The best ways, those that were measured, and the base."""
    if found.what_if is None:
        return []
    every = found.what_if.outcomes
    return [o for place, o in enumerate(every) if place < most or o.measured_s is not None or o.way == found.what_if.base]


def verdict(found: MoeProfile) -> str:
    """One sentence."""
    stages = shown_stages(found)
    whole = sum(s.mean_s for s in stages) or 1.0
    travel = [s for s in stages if s.stage in ("counts", "dispatch", "combine")]
    share = sum(s.mean_s for s in travel) / whole
    waited = sum(s.skew_s for s in travel) / (sum(s.skew_s + s.transfer_s for s in travel) or 1.0)
    what = "step" if found.whole_step else "layer"
    text = f"{share:.0%} of the {what} is dispatch and combine, {waited:.0%} of that waiting for the last rank"
    if found.what_if is None:
        return text
    timed = [o for o in found.what_if.outcomes if o.measured_s is not None and o.way != found.what_if.base]
    base_s = found.profile.median_s
    if timed:
        best = min(timed, key=lambda o: o.measured_s or 0.0)
        assert best.measured_s is not None
        own = next((o.measured_s for o in found.what_if.outcomes if o.way == found.what_if.base and o.measured_s), base_s)
        gain = own / best.measured_s
        if gain > 1:
            return f"{text}; {best.way.name} is {gain:.2f} times as fast (measured)"
        return f"{text}; none of the {len(timed)} ways that were measured is faster"
    best = found.what_if.outcomes[0]
    if best.way == found.what_if.base or base_s - best.prediction.seconds < best.prediction.error_s:
        return f"{text}; no other way is predicted to be clearly faster"
    return f"{text}; {best.way.name} would be {best.gain:.2f} times as fast (predicted)"


def render(found: MoeProfile) -> str:
    p = found.profile
    lines = [
        f"profile of {'a step' if found.whole_step else 'one MoE layer'} on {found.world} rank{'s' * (found.world != 1)}: "
        f"{found.way.name}",
        f"  {found.load}, {found.tokens} tokens per rank and pass; {len(p.seconds)} steps, median {1e3 * p.median_s:.4g} ms "
        f"(+-{p.spread:.1%})",
        "",
        "stages, ms: mean over ranks, the slowest rank of each layer, and of their collectives what a rank waits for the last "
        "one (skew), for the wire (transfer), and what is hidden",
        *_table(_heads(STAGE_HEAD), [_stage_cells(row) for row in stage_rows(found)]),
        "",
        *_bytes(found),
        *_loads(found),
    ]
    if found.what_if is not None:
        rows = [[*_way_cells(o), "<- configured" if o.way == found.what_if.base else ""] for o in shown_ways(found)]
        count = len(found.what_if.outcomes)
        lines += ["", f"what if: the {len(rows)} of {count} ways with the least predicted time, and those measured"]
        lines += _table([*_heads(WAY_HEAD), ""], rows)
        lines += ["  ways with LSH or one byte per value change the numbers; memory is not predicted", *found.what_if.notes]
    return "\n".join([*lines, *(["", *found.notes] if found.notes else []), "", verdict(found)])


def _heads(names: Sequence[str]) -> list[str]:
    return [name.replace("_", " ") for name in names]


def _stage_cells(row: Sequence[str | float]) -> list[str]:
    stage, direction, mean, most, share, *waits = row
    return [str(stage), str(direction), _ms(mean), _ms(most), f"{share:.1%}", *(_ms(w) if w else "-" for w in waits)]


def _way_cells(outcome: Outcome) -> list[str]:
    name, predicted, error, gain, took, off, *sent = way_row(outcome)
    found = ["-" if took is None else _ms(took), "-" if off is None else f"{off:+.1%}"]
    return [str(name), _ms(predicted), _ms(error), f"{gain:.2f}", *found, *(_ms(s) if s else "-" for s in sent)]


def _ms(value: str | float | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _bytes(found: MoeProfile) -> list[str]:
    sent, formula = found.profile.sent_bytes, found.formula_bytes
    if not sent:
        return ["nothing travels between ranks"]
    parts = ", ".join(f"{size_text(size)} over {axis}" for axis, size in sent.items())
    even = ", ".join(f"{size_text(size)} {where}" for where, size in formula.items() if size)
    return [f"sent by a rank in a step's all-to-alls: {parts}; rows by formula, if every set of experts is as likely: {even}"]


def _loads(found: MoeProfile) -> list[str]:
    lines = []
    for layer, rows in found.profile.rows_LE.items():
        mean = sum(rows) / len(rows) or 1.0
        top = max(range(len(rows)), key=rows.__getitem__)
        spare = f"least {min(rows) / mean:.2f}"
        lines.append(f"layer {layer}: expert {top} has {max(rows) / mean:.2f} times the mean rows, {spare} times")
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    first = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(head, widths, strict=True))]
    lines = ["  " + "  ".join(first).rstrip()]
    for row in rows:
        cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines
