"""From measurements to rows: one row for each contender and pass, with the same columns in every benchmark of kernels."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..result import Cell, Row
from .contender import Contender
from .costs import MIB, Counts, Saved, count, held_bytes, peak_bytes, saved_bytes
from .gate import Checked, free
from .limits import Limits
from .shapes import PASSES, Pass
from .timing import Budget, Call, Clock, Gauges, Samples, one_line, quantiles, ratio, replay_ms, take_turns

Place = Mapping[str, Cell]
"""What the rows of one group are about: unit, shape, routing, max_over_mean."""

MEASURED = (
    "p10_ms", "p50_ms", "p90_ms", "graph_ms", "difference_ms", "tflops", "of_mm_%", "of_bound_%", "gb_s", "of_copy_%",
    "peak_mib", "saved_mib", "saved_%", "held_mib", "launches", "syncs", "ratio", "error", "first_s", "sm_mhz", "power_w",
)  # fmt: skip
"""Columns of numbers; None (shown as "-") where there is nothing to say.

graph_ms: replays of a CUDA graph, warm cache. difference_ms: backward as (fwd+bwd) - fwd. of_bound_%: time of the bound by this
one's. saved_mib: kept by autograd, weights apart; saved_%: of what `Work.saved` gives. held_mib: by the allocator. ratio: this
one's time by ours. error: the largest relative error of a result. first_s: the first call, compilation included.
"""


@dataclass(frozen=True)
class Work:
    """What a pass must do at the least: operations and bytes; None where the figure says nothing. saved: bytes that 100 % of
    saved_% stands for."""

    flops: float | None = None
    bytes: float | None = None
    saved: float | None = None


@dataclass(frozen=True)
class Setting:
    """With what to measure; the same for all rows of a run."""

    clock: Clock
    budget: Budget
    gauges: Gauges
    limits: Limits | None


def call_of(contender: Contender, part: Pass) -> Call | None:
    """One pass of a contender, ready to be called; None where it has no backward. For "bwd" the forward has been done."""
    forward, backward = contender.forward, contender.backward
    assert forward is not None
    if part == "fwd":
        return forward
    if backward is None:
        return None
    if part == "bwd":
        outputs = forward()
        return lambda: backward(outputs, True)
    return lambda: backward(forward(), False)


def measure(
    place: Place, checked: Sequence[Checked], setting: Setting, work: Callable[[Pass], Work], parts: Iterable[Pass] = PASSES
) -> list[Row]:
    """Rows of one group: those that run in turns, pass by pass, and those that are absent or refused with the reason."""
    rows = [
        _row(
            place,
            one,
            None,
            note=f"absent: {one.contender.why_absent}" if one.contender.why_absent else f"refused: {one.refused}",
        )
        for one in checked
        if one.contender.why_absent or one.refused
    ]
    running = [one for one in checked if not (one.contender.why_absent or one.refused)]
    costs = {one.contender.name: _kept(one.contender, setting) for one in running}
    medians: dict[tuple[str, Pass], float] = {}
    for part in parts:
        rows += _measure_pass(place, running, setting, part, work(part), costs, medians)
        free(setting.clock.device)
    return with_differences(rows)


Kept = tuple[Saved | None, int | None]


def _kept(contender: Contender, setting: Setting) -> Kept:
    """What one forward keeps for backward: by autograd, and by the allocator."""
    if contender.backward is None or contender.kind == "bound":
        return None, None
    assert contender.forward is not None
    weights = [x for name, x in (contender.leaves or {}).items() if name.startswith("dW")]
    return saved_bytes(contender.forward, weights), held_bytes(contender.forward, setting.clock.device)


def _measure_pass(
    place: Place,
    running: Sequence[Checked],
    setting: Setting,
    part: Pass,
    work: Work,
    costs: Mapping[str, Kept],
    medians: dict[tuple[str, Pass], float],
) -> list[Row]:
    made, failed = _calls(running, part)
    calls = {name: call for name, call in made.items() if call is not None}
    taken = failed | take_turns(calls, setting.clock, setting.budget, setting.gauges)
    medians |= {(name, part): quantiles(samples.ms)[1] for name, samples in taken.items() if samples.ms}
    ours = next((one.contender.name for one in running if one.contender.kind == "ours"), None)
    bound_ms = next((medians.get((one.contender.name, part)) for one in running if one.contender.kind == "bound"), None)
    rows: list[Row] = []
    for one in (one for one in running if one.contender.name in taken):
        name, samples = one.contender.name, taken[one.contender.name]
        if samples.why_not is not None:
            rows.append(_row(place, one, part, note=f"stopped: {samples.why_not}"))
            continue
        numbers = _speed(samples, work, setting.limits) | _memory(costs[name], work) | _queue(calls[name], part, setting)
        p50_ms = medians[name, part]
        numbers["ratio"] = ratio(samples.ms, taken[ours].ms) if ours is not None and taken[ours].ms else None
        numbers["of_bound_%"] = None if bound_ms is None else 100 * bound_ms / p50_ms
        note = numbers.pop("note")
        rows.append(_row(place, one, part, numbers, note=str(note or "")))
    return rows


def _calls(running: Sequence[Checked], part: Pass) -> tuple[dict[str, Call | None], dict[str, Samples]]:
    """The calls of one pass; and for those whose forward failed when all had to be in memory at once, the reason."""
    made: dict[str, Call | None] = {}
    failed: dict[str, Samples] = {}
    for one in running:
        try:
            made[one.contender.name] = call_of(one.contender, part)
        except Exception as error:
            failed[one.contender.name] = Samples(why_not=one_line(error))
    return made, failed


def _speed(samples: Samples, work: Work, limits: Limits | None) -> dict[str, Cell]:
    p10, p50, p90 = quantiles(samples.ms)
    tflops = None if work.flops is None else work.flops / p50 / 1e9
    gb_s = None if work.bytes is None else work.bytes / p50 / 1e6
    return {
        "p10_ms": p10,
        "p50_ms": p50,
        "p90_ms": p90,
        "tflops": tflops,
        "of_mm_%": None if tflops is None or limits is None else 100 * tflops / limits.mm_tflops,
        "gb_s": gb_s,
        "of_copy_%": None if gb_s is None or limits is None else 100 * gb_s / limits.copy_gb_s,
        "sm_mhz": samples.clock_mhz,
        "power_w": samples.power_w,
    }


def _memory(kept: Kept, work: Work) -> dict[str, Cell]:
    saved, held = kept
    return {
        "saved_mib": None if saved is None else saved.activations / MIB,
        "saved_%": None if saved is None or work.saved is None else 100 * saved.activations / work.saved,
        "held_mib": None if held is None else held / MIB,
    }


def _queue(call: Call, part: Pass, setting: Setting) -> dict[str, Cell]:
    """Peak memory, launches, waits, and replays where nothing waits; the reason against replays as "note"."""
    device = setting.clock.device
    peak = peak_bytes(call, device)
    counts = count(call, device)
    replayed = _replayed(call, part, counts, setting)
    return {
        "peak_mib": None if peak is None else peak / MIB,
        "launches": counts.launches,
        "syncs": counts.syncs,
        "graph_ms": replayed if isinstance(replayed, float) else None,
        "note": replayed if isinstance(replayed, str) else None,
    }


def _replayed(call: Call, part: Pass, counts: Counts, setting: Setting) -> float | str | None:
    if not setting.clock.cuda or part == "bwd":
        # autograd runs backward on the stream of its forward, which is outside of the graph
        return None
    if counts.syncs:
        # a capture that fails can leave the allocator unusable, so that it is not tried where it must fail
        return "no graph: waits for the device"
    replayed = replay_ms(call, setting.clock, setting.budget)
    return f"no graph: {replayed}" if isinstance(replayed, str) else replayed


def _row(place: Place, one: Checked, part: Pass | None, numbers: Mapping[str, Cell] | None = None, note: str = "") -> Row:
    contender = one.contender
    found: dict[str, Cell] = dict.fromkeys(MEASURED) | dict(numbers or {})
    if part is not None:
        found["error"] = max(one.errors.values(), default=None)
        found["first_s"] = one.first_s
    notes = "; ".join(text for text in (contender.note, note) if text)
    return {**place, "contender": contender.name, "kind": contender.kind, "pass": part or "-", **found, "note": notes}


def with_differences(rows: Sequence[Row]) -> list[Row]:
    """The rows, with backward as the difference of the medians of fwd+bwd and fwd in the rows of bwd."""
    times = {_key(row): row["p50_ms"] for row in rows}
    out: list[Row] = []
    for row in rows:
        both, forward = (times.get((*_key(row)[:-1], part)) for part in ("fwd+bwd", "fwd"))
        known = row["pass"] == "bwd" and isinstance(both, float) and isinstance(forward, float)
        out.append({**row, "difference_ms": both - forward} if known else row)  # type: ignore[operator]
    return out


def _key(row: Row) -> tuple[Cell, ...]:
    return (*(row[name] for name in row if name in ("unit", "shape", "routing", "contender")), row["pass"])


def figure(rows: Sequence[Row], column: str, where: Mapping[str, str]) -> float | None:
    """The number in `column` of the one row that has the words of `where` (a shape: that begins so); None where there is none."""
    found = [row[column] for row in rows if _matches(row, where)]
    numbers = [cell for cell in found if isinstance(cell, int | float)]
    return float(numbers[0]) if len(numbers) == 1 else None


def _matches(row: Row, where: Mapping[str, str]) -> bool:
    return all(str(row[name]) == want or (name == "shape" and str(row[name]).startswith(want)) for name, want in where.items())


def least_ratio(rows: Sequence[Row], parts: Collection[str]) -> float | None:
    """The least of (their time / our time) over all peers and groups: how we stand where the best other one is best."""
    cells = [row["ratio"] for row in rows if row["kind"] == "peer" and row["pass"] in parts]
    return min((float(cell) for cell in cells if isinstance(cell, int | float)), default=None)


def merge(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Rows of several processes that ran the same: medians of the numbers, the first one's words (all words where they differ).

    Raises:
        ValueError: the processes did not measure the same rows.
    """
    keys = [[_key(row) for row in rows] for rows in runs]
    if any(sorted(map(str, k)) != sorted(map(str, keys[0])) for k in keys):
        raise ValueError("the processes measured different rows; a contender failed in one of them, see their tables")
    tables = [dict(zip(k, rows, strict=True)) for k, rows in zip(keys, runs, strict=True)]
    return [{name: _merged([table[key][name] for table in tables]) for name in tables[0][key]} for key in keys[0]]


def _merged(cells: Sequence[Cell]) -> Cell:
    numbers = [cell for cell in cells if isinstance(cell, int | float) and not isinstance(cell, bool)]
    if numbers:
        return statistics.median(numbers)
    words = list(dict.fromkeys(str(cell) for cell in cells if cell is not None))
    return " | ".join(words) if words else None
