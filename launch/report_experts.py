"""The report's sections on expert load: over time, by layer and by domain of the text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from . import plots
from .metrics import metric
from .plots import Series
from .report_parts import SOURCE, RunData, Runs, csv_link, figure, join, row
from .report_sections import curves

# Pixels of all load maps of a figure together: their images are most of the size of a page.
MAP_CELLS, MAP_COUNT = 60_000, 6
# An expert without tokens in one batch can be chance; in so many records in a row it is not.
DEAD_RECORDS = 3
Grid = Sequence[Sequence[float | None]]


def experts(runs: Runs) -> str | None:
    """Load of every expert over time, how uneven it is, and experts that nobody uses."""
    return join(
        _maps(runs),
        row(
            curves(runs, "moe/load_cv", "Unevenness of the load", zero=True, smooth=True),
            _violations(runs),
            curves(runs, "moe/dead_frac", "Experts without tokens", zero=True, unless_zero=True),
            curves(runs, "moe/drop_frac", "Dropped token-expert pairs", zero=True, unless_zero=True),
            curves(runs, "moe/router_logit_max", "Largest router logit", zero=True, smooth=True),
            curves(runs, "moe/bias_max", "Largest expert bias", zero=True, smooth=True, unless_zero=True),
        ),
        *(_dead(run) for run in runs),
    )


def _maps(runs: Runs) -> str | None:
    if len(runs) == 1:
        steps, grids = runs[0].metrics.arrays("moe/load_LE")
        if not grids:
            return None
        chosen = snapshots(len(grids), max(1, min(MAP_COUNT, MAP_CELLS // max(1, _cells(grids[-1])))))
        maps = {f"step {steps[i]}": grids[i] for i in chosen}
        title = "Load of every expert over time"
        layers, newest = runs[0].layers(len(grids[-1])), (steps[-1], grids[-1])
        csv = _map_csv("load", {f"step {newest[0]}": newest[1]}, layers)
        return _map_figure("load-maps", title, maps, layers, csv)
    found = [(run, run.metrics.arrays("moe/load_LE")) for run in runs]
    figures = []
    # Runs may differ in layers and experts, so each has its own map.
    for i, (run, (steps, grids)) in enumerate(found):
        if grids and _cells(grids[-1]) <= MAP_CELLS / len(runs):
            layers, maps = run.layers(len(grids[-1])), {f"step {steps[-1]}": grids[-1]}
            figures.append(
                _map_figure(
                    f"load-{i}",
                    f"Load of every expert: {run.name}",
                    maps,
                    layers,
                    _map_csv(f"load-{i}", maps, layers),
                    wide=False,
                )
            )
    if figures or not any(grids for _, (_, grids) in found):
        return row(*figures)
    return '<p class="none">The maps of so many experts and runs are too large for one page: make a report of each run.</p>'


def _map_figure(name: str, title: str, maps: Mapping[str, Grid], layers: Sequence[int], csv: str, *, wide: bool = True) -> str:
    m = metric("moe/load_LE" if not name.startswith("domain") else "moe/domain_load")
    what = f"{m.key}: {m.definition}. White: exactly its share; red: more; blue: less; darkest blue: none."
    return figure(title, plots.load_maps(name, title, maps, layers, wide=wide), what, SOURCE, csv)


def _map_csv(name: str, maps: Mapping[str, Grid], layers: Sequence[int]) -> str:
    width = max(len(r) for grid in maps.values() for r in grid)
    rows = [[caption, layer, *cells] for caption, grid in maps.items() for layer, cells in zip(layers, grid, strict=False)]
    return csv_link(name, ["map", "layer", *(f"expert_{e}" for e in range(width))], rows, SOURCE)


def _cells(grid: Grid) -> int:
    return sum(len(r) for r in grid)


def snapshots(count: int, wanted: int) -> list[int]:
    """Indices of at most `wanted` of `count` records, evenly spread, from the first to the last (the last, if only one)."""
    if wanted == 1 or count == 1:
        return [count - 1]
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})


def _violations(runs: Runs) -> str | None:
    """Largest violation in the global batch and inside micro-batches: the first is about balance, the second about stragglers."""
    series, keys = [], ("moe/max_violation", "moe/max_violation_micro")
    for run in runs:
        of = f"{run.name}: " if len(runs) > 1 else ""
        for key, label in zip(keys, ("global batch", "micro-batch"), strict=True):
            xs, ys = run.metrics.column(key)
            if ys:
                series.append(Series(of + label, xs, ys))
    if not series:
        return None
    title = "Largest violation of balance"
    svg = plots.lines("violation", title, "step", "max load / ideal - 1", series, smooth=True, from_zero=True)
    rows = [[s.label, x, y] for s in series for x, y in zip(s.x, s.y, strict=True)]
    what = " ".join(f"{key}: {metric(key).definition}." for key in keys)
    return figure(title, svg, what, SOURCE, csv_link("violation", ["what", "step", "value"], rows, SOURCE))


def dead_experts(run: RunData) -> dict[int, list[int]]:
    """Layer -> experts that got no token in any of the last DEAD_RECORDS records of the load."""
    _, grids = run.metrics.arrays("moe/load_LE")
    if not grids:
        return {}
    recent = grids[-DEAD_RECORDS:]
    layers = run.layers(len(grids[-1]))
    found = {
        layers[i]: [e for e in range(len(cells)) if all(grid[i][e] == 0 for grid in recent)] for i, cells in enumerate(grids[-1])
    }
    return {layer: experts for layer, experts in found.items() if experts}


def _dead(run: RunData) -> str | None:
    count = len(run.metrics.arrays("moe/load_LE")[1])
    if not count:
        return None
    span = f"the last {min(DEAD_RECORDS, count)} records of the load" if count > 1 else "the only record of the load"
    dead = dead_experts(run)
    name = escape(run.name)
    if not dead:
        return f'<p class="card">{name}: no dead experts. Every expert got tokens in at least one of {span}.</p>'
    items = "".join(f"<li>layer {layer}: {', '.join(map(str, experts))}</li>" for layer, experts in dead.items())
    return f'<div class="card"><h3>{name}: dead experts</h3><p>Without a token in {span}:</p><ul>{items}</ul></div>'


def domains(runs: Runs) -> str | None:
    """Load by source of the text in the newest record: which layers have experts of their own for a kind of text."""
    figures = []
    for i, run in enumerate(runs):
        steps, values = run.metrics.arrays("moe/domain_load")
        if not values or not values[-1]:
            continue
        maps: dict[str, Any] = values[-1]
        first = next(iter(maps.values()))
        layers = run.layers(len(first))
        title = f"Load by domain at step {steps[-1]}" + (f": {run.name}" if len(runs) > 1 else "")
        if _cells(first) * len(maps) > MAP_CELLS / len(runs):
            figures.append(f'<p class="none">{escape(title)}: too large for this page, see moe/domain_load in {SOURCE}.</p>')
            continue
        apart = separation(list(maps.values()))
        note = ""
        if len(maps) > 1 and apart:
            best = max(range(len(apart)), key=apart.__getitem__)
            note = (
                f"<p>Layer {layers[best]} tells the domains apart most: an expert's load ratio differs by "
                f"{apart[best]:.2f} between them on average; over all layers by {sum(apart) / len(apart):.2f}.</p>"
            )
        figures.append(_map_figure(f"domain-{i}", title, maps, layers, _map_csv(f"domain-{i}", maps, layers)) + note)
    return join(*figures)


def separation(grids: Sequence[Grid]) -> list[float]:
    """Per layer: largest minus smallest load ratio of an expert between domains, mean over experts; 0 = the same routing."""
    out = []
    for rows in zip(*grids, strict=True):
        spans = []
        for cells in zip(*rows, strict=True):
            known = [c for c in cells if c is not None and math.isfinite(c)]
            spans.append(max(known) - min(known) if known else 0.0)
        out.append(sum(spans) / len(spans) if spans else 0.0)
    return out
