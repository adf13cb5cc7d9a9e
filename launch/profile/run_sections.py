"""The sections of the page of recorded runs: each a function from runs to HTML, or to None where they have no data for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from types import MappingProxyType
from typing import Any

from ...parallel.recorder_analysis import ALL_TO_ALL
from .. import plots, plots_comm
from ..report_parts import RunData, csv_link, csv_text, figure, join, row, table
from ..report_sections import curves
from .diagnosis import Diagnosis
from .page import Section
from .run_about import SOURCE, experts, gpu, recording

RECORD = "it is written by runs on several ranks with log.comm = true, at every 8th metric line (log.every) and at the end"
OLDER = "this run was recorded by an earlier version of moefold, which kept less; record again"
MATRIX_RANKS, TIMELINE_RANKS = 256, 64
"""Ranks up to which a matrix and a timeline are drawn: more cannot be told apart."""
KINDS: Mapping[str, tuple[int, float]] = MappingProxyType(
    {
        "all-to-all: the last rank is late": (1, 0.4),
        "all-to-all: transfer": (1, 1.0),
        "other collectives: the last rank is late": (2, 0.4),
        "other collectives: transfer": (2, 1.0),
        "under way while the rank works": (0, 0.35),
    }
)
"""Of bars in a timeline, with colour and opacity: the colours of `PARTS`, pale where nothing moves."""
PARTS = ("work", "all-to-all", "other collectives")
Found = Sequence[tuple[RunData, Diagnosis]]


def sections(found: Found, everyone: Sequence[RunData]) -> list[Section]:
    """All of them. found: runs with recordings and their diagnosis; everyone: also those without."""
    runs = [run for run, _ in found]
    return [
        Section(
            "Where the time of a step goes", "time", join(_split_table(runs), _overlay(runs), _each(runs, _rank_bars)), RECORD
        ),
        Section("Why ranks wait", "causes", join(*(_causes(run, d, len(found) > 1) for run, d in found)), RECORD),
        Section("Timeline of a step", "timeline", _each(runs, _timeline), OLDER),
        Section("Traffic of the all-to-all", "traffic", _each(runs, _traffic), _no_traffic(runs)),
        Section("Ranks over time", "ranks", _each(runs, _heat), OLDER),
        Section("Collectives by purpose and layer", "layers", _each(runs, _layers), RECORD, _layers_csv(runs)),
        Section("Expert load", "experts", _beside(runs, experts), "no rows were sent to experts: the model has no MoE layers"),
        Section("Memory", "memory", row(curves(everyone, "mem/peak_gib", "Peak memory", zero=True)), "no metric line yet"),
        Section(
            "GPU counters",
            "gpu",
            gpu(everyone),
            "set log.gpu = true on machines with NVIDIA GPUs and nvidia-ml-py; counters that a device lacks are absent",
        ),
        Section("What was recorded", "recording", join(*(recording(run, len(found) > 1) for run in runs)), RECORD),
    ]


def _each(runs: Sequence[RunData], draw: Callable[[RunData, int, str], str | None]) -> str | None:
    """`draw(run, index, suffix of titles)` of every run."""
    return join(*(draw(run, i, f": {run.name}" if len(runs) > 1 else "") for i, run in enumerate(runs)))


def _beside(runs: Sequence[RunData], draw: Callable[[RunData, int, str], str | None]) -> str | None:
    """As `_each`, but side by side."""
    return _each(runs, draw) if len(runs) == 1 else row(*(draw(run, i, f": {run.name}") for i, run in enumerate(runs)))


def _borders(comm: Mapping[str, Any]) -> list[int]:
    """Ranks that are the first of their host."""
    hosts = comm.get("hosts", [])
    return [r for r in range(1, len(hosts)) if hosts[r] != hosts[r - 1]]


def _rank_label(comm: Mapping[str, Any], rank: int) -> str:
    hosts = comm.get("hosts", [])
    return f"{rank} · {hosts[rank]}" if rank < len(hosts) and hosts[rank] else str(rank)


def _split(run: RunData) -> list[float]:
    """Milliseconds of a step, mean over ranks and sampled steps: all, work, all-to-all, other collectives, skew, hidden."""
    c = run.comm
    each = c.get("ranks", 1) * max(1, len(c.get("steps", []))) / 1e3
    layers, whole = c.get("layers", []), c.get("total", {})
    a2a_s = sum(r["skew_s"] + r["transfer_s"] for r in layers if r["what"] in ALL_TO_ALL)
    other_s = sum(r["skew_s"] + r["transfer_s"] for r in layers if r["what"] not in ALL_TO_ALL)
    covered_s = c.get("covered_s", 0.0)
    work_s = covered_s - a2a_s - other_s - whole.get("unseen_s", 0.0)
    return [x / each for x in (covered_s, work_s, a2a_s, other_s, whole.get("skew_s", 0.0), whole.get("hidden_s", 0.0))]


def _split_table(runs: Sequence[RunData]) -> str:
    head = [
        "run",
        "step (ms)",
        "work (%)",
        "all-to-all (%)",
        "other collectives (%)",
        "of both: last rank late (%)",
        "hidden (ms)",
    ]
    rows = []
    for run in runs:
        step, *parts, hidden = _split(run)
        rows.append([run.name, step, *(100 * x / step if step else math.nan for x in parts), hidden])
    return table("Time of a step, from its first collective to its last; mean over ranks and sampled steps", head, rows)


def _overlay(runs: Sequence[RunData]) -> str | None:
    """The same as bars, where there are several runs to compare."""
    if len(runs) < 2:
        return None
    rows = [_split(run) for run in runs]
    parts = {name: [r[i] for r in rows] for i, name in enumerate(PARTS, start=1)}
    svg = plots_comm.parts_of_a_whole("runs", "Time of a step by run", "time per step (ms)", [r.name for r in runs], parts)
    data = [[run.name, *r] for run, r in zip(runs, rows, strict=True)]
    head = ["run", "step_ms", "work_ms", "all_to_all_ms", "other_ms", "skew_ms", "hidden_ms"]
    what = "Mean over ranks and sampled steps. Work: outside of all collectives; the rest: waiting in them (exposed)."
    return figure("Time of a step by run", svg, what, SOURCE, csv_link("runs", head, data, SOURCE))


def _rank_bars(run: RunData, index: int, of: str) -> str | None:
    times = run.comm.get("rank_times")
    if not times or not times.get("work_s"):
        return None
    ranks = range(len(times["work_s"]))
    values = [[1e3 * (v or 0.0) for v in times[name]] for name in ("work_s", "a2a_s", "other_s")]
    parts = dict(zip(PARTS, values, strict=True))
    title, name = f"Time of a step by rank{of}", f"rank-bars-{index}"
    labels = [_rank_label(run.comm, r) for r in ranks]
    svg = plots_comm.parts_of_a_whole(name, title, "time per step (ms)", labels, parts)
    what = (
        "Mean of the sampled steps. Work: outside of all collectives; the rest: waiting in them (exposed). A rank whose work is "
        "longer than the others' makes them wait."
    )
    core = [None if v is None else 1e3 * v for v in times["cpu_wait_s"]]
    data = [[r, *(v[r] for v in values), core[r]] for r in ranks]
    head = ["rank", "work_ms", "all_to_all_ms", "other_ms", "without_core_ms"]
    return figure(title, svg, what, SOURCE, csv_link(name, head, data, SOURCE))


def _causes(run: RunData, diagnosis: Diagnosis, several: bool) -> str:
    def items(findings: Sequence[Any]) -> str:
        return "".join(f"<li>{escape(f.text)} ({f.of_waiting:.0%} of all waiting).</li>" for f in findings)

    title = f"Causes{f': {run.name}' if several else ''}"
    body = f"<ul>{items(diagnosis.findings)}</ul>" if diagnosis.findings else "<p>No rank, link or expert stands out.</p>"
    if diagnosis.minor:
        body += f"<p>Smaller, perhaps echoes of these:</p><ul>{items(diagnosis.minor)}</ul>"
    return f'<div class="card"><h3>{escape(title)}</h3>{body}</div>{_waited_for(run, several) or ""}'


def _waited_for(run: RunData, several: bool) -> str | None:
    waits = run.comm.get("waited_for")
    steps, last = max(1, len(run.comm.get("steps", []))), run.comm.get("last", {})
    if not waits:
        return None
    order = sorted(range(len(waits["all_s"])), key=lambda r: -waits["all_s"][r])[:16]
    whole_s = sum(waits["all_s"]) or math.nan
    rows = [
        [
            _rank_label(run.comm, r),
            1e3 * waits["a2a_s"][r] / steps,
            1e3 * waits["all_s"][r] / steps,
            100 * waits["all_s"][r] / whole_s,
            last.get(str(r), 0),
        ]
        for r in order
        if waits["all_s"][r] > 0
    ]
    head = ["rank", "in the all-to-all (ms/step)", "in all collectives (ms/step)", "of all such waiting (%)", "came last (times)"]
    caption = f"Whom the others waited for, added over ranks{f': {run.name}' if several else ''}"
    return table(caption, head, rows) if rows else None


def _timeline(run: RunData, index: int, of: str) -> str | None:
    spans = run.comm.get("spans")
    if not spans or not spans.get("ranks"):
        return None
    ranks = list(spans["ranks"])
    step = -(-len(ranks) // TIMELINE_RANKS)
    chosen = ranks[::step]
    rows: dict[str, dict[str, list[tuple[float, float]]]] = {}
    data = []
    names = list(KINDS)
    for rank in chosen:
        bars: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        for kind, begin, wait, moving, end in spans["ranks"][rank]:
            what, axis, layer, direction, _ = spans["kinds"][kind]
            first = 0 if what in ALL_TO_ALL else 2
            waits = begin if wait is None else wait
            moves = waits if moving is None else moving
            for name, a, b in ((names[4], begin, waits), (names[first], waits, moves), (names[first + 1], moves, end)):
                if b > a:
                    bars[name].append((a / 1e3, b / 1e3))
            data.append([rank, what, axis, layer, direction, begin / 1e3, waits / 1e3, moves / 1e3, end / 1e3])
        rows[_rank_label(run.comm, int(rank))] = bars
    shown = {kind: look for kind, look in KINDS.items() if any(bars[kind] for bars in rows.values())}
    title, name = f"Step {spans['step']}, rank by rank{of}", f"timeline-{index}"
    svg = plots_comm.timeline(name, title, "time since the first collective of the step (ms)", rows, shown)
    some = f" {len(chosen)} of {run.comm['ranks']} ranks are shown." if len(chosen) < run.comm["ranks"] else ""
    cut = f" {spans['left_out']} collectives were not kept." if spans.get("left_out") else ""
    what = f"Each bar is a collective on the clock of rank 0; where there is none, the rank works.{some}{cut}"
    head = ["rank", "what", "axis", "layer", "direction", "begin_ms", "waits_ms", "moves_ms", "end_ms"]
    return figure(title, svg, what, SOURCE, csv_link(name, head, data, SOURCE))


def _traffic(run: RunData, index: int, of: str) -> str | None:
    steps, whole = len(run.comm.get("steps", [])), run.comm.get("all_to_all_bytes", [])
    if not steps or not any(map(any, whole)) or len(whole) > MATRIX_RANKS:
        return None
    mib = [[n / steps / 2**20 for n in line] for line in whole]
    title, name = f"Bytes from rank to rank{of}", f"traffic-{index}"
    svg = plots.matrix(name, title, mib, ("from rank", "to rank"), "MiB/step", borders=_borders(run.comm))
    rows = [[source, target, n] for source, line in enumerate(mib) for target, n in enumerate(line)]
    hosts = run.comm.get("hosts", [])
    lines = " Lines: between hosts." if _borders(run.comm) else ""
    what = f"Counts, dispatch and combine, both ways; the diagonal stays on its rank.{lines}"
    fig = figure(title, svg, what, SOURCE, csv_link(name, ["from", "to", "mib_per_step"], rows, SOURCE))
    return row(fig, _host_traffic(hosts, mib, of))


def _host_traffic(hosts: Sequence[str], mib: Sequence[Sequence[float]], of: str) -> str | None:
    names = list(dict.fromkeys(h for h in hosts if h))
    if len(names) < 2 or len(names) > 32 or len(hosts) != len(mib):
        return None
    place = {name: i for i, name in enumerate(names)}
    sums = [[0.0] * len(names) for _ in names]
    for source, line in enumerate(mib):
        for target, n in enumerate(line):
            if source != target:
                sums[place[hosts[source]]][place[hosts[target]]] += n
    rows = [[name, *sums[i], sum(n for j, n in enumerate(sums[i]) if j != i)] for i, name in enumerate(names)]
    return table(f"From host to host (MiB/step){of}", ["from", *names, "to others"], rows)


def _no_traffic(runs: Sequence[RunData]) -> str:
    many = [run.comm["ranks"] for run in runs if run.comm.get("ranks", 0) > MATRIX_RANKS]
    return f"more than {MATRIX_RANKS} ranks cannot be told apart in a map ({many[0]} here)" if many else RECORD


def _heat(run: RunData, index: int, of: str) -> str | None:
    history = run.comm.get("history")
    if not history or not history.get("steps"):
        return None
    figures = []
    named = (("work_s", "Work of each rank"), ("a2a_s", "Waiting in the all-to-all"), ("other_s", "Waiting in other collectives"))
    for key, caption in (*named, ("cpu_wait_s", "Ready to run, but no core was free")):
        by_rank = [[math.nan if v is None else 1e3 * v for v in line] for line in zip(*history[key], strict=True)]
        if not any(v > 0 for line in by_rank for v in line if math.isfinite(v)):
            continue
        name, title = f"{key.replace('_', '-')}-{index}", f"{caption}{of}"
        sides, borders = ("rank", "step"), _borders(run.comm)
        svg = plots.matrix(name, title, by_rank, sides, "ms/step", borders=borders, upright=False, columns=history["steps"])
        rows = [[s, r, v] for r, line in enumerate(by_rank) for s, v in zip(history["steps"], line, strict=True)]
        meaning = {
            "work_s": "Time outside of collectives: a dark row is a slow rank, a dark column a slow step.",
            "cpu_wait_s": "Threads that compute on run queues, mean over the steps since the last sample.",
        }.get(key, "Exposed: the rank did nothing else meanwhile.")
        figures.append(figure(title, svg, meaning, SOURCE, csv_link(name, ["step", "rank", "ms"], rows, SOURCE)))
    return row(*figures)


LAYER_HEAD = (
    "what",
    "axis",
    "direction",
    "layer",
    "skew (ms)",
    "transfer (ms)",
    "exposed (ms)",
    "hidden (ms)",
    "unseen (ms)",
    "exposed (%)",
)


def _layer_rows(run: RunData) -> list[list[Any]]:
    each = run.comm.get("ranks", 1) * max(1, len(run.comm.get("steps", [])))
    out = []
    for line in run.comm.get("layers", []):
        skew, transfer, hidden, unseen = (1e3 * line[k] / each for k in ("skew_s", "transfer_s", "hidden_s", "unseen_s"))
        layer = "–" if line["layer"] is None else str(line["layer"])
        share = 100 * line["exposed_share"]
        head = [line["what"], line["axis"], line["direction"], layer]
        out.append([*head, skew, transfer, skew + transfer, hidden, unseen, share])
    return sorted(out, key=lambda r: -r[6])


def _layers(run: RunData, index: int, of: str) -> str | None:
    rows = _layer_rows(run)
    if not rows:
        return None
    totals: dict[tuple[str, str, str], list[float]] = {}
    for r in rows:
        sums = totals.setdefault((r[0], r[1], r[2]), [0.0] * 6)
        for i, value in enumerate(r[4:]):
            sums[i] += value
    brief = [[*key, *sums] for key, sums in sorted(totals.items(), key=lambda item: -item[1][2])]
    caption = (
        f"Per rank and step{of}. Skew: until the last rank has come; transfer: from then on; hidden: the rank worked meanwhile"
    )
    whole = table(caption, [h for h in LAYER_HEAD if h != "layer"], brief)
    detail = table(f"By layer{of}", LAYER_HEAD, rows[:400])
    return f"{whole}<details><summary>By layer ({len(rows)} rows)</summary>{detail}</details>"


def _layers_csv(runs: Sequence[RunData]) -> str | None:
    rows = [[run.name, *r] for run in runs for r in _layer_rows(run)]
    head = [
        "run",
        "what",
        "axis",
        "direction",
        "layer",
        "skew_ms",
        "transfer_ms",
        "exposed_ms",
        "hidden_ms",
        "unseen_ms",
        "exposed_pct",
    ]
    return csv_text(head, rows) if rows else None
