"""Parts of the page of recorded runs that are not about time: experts, counters of GPUs, and what was recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ...moe.errors import RunDirError
from .. import plots
from ..report_experts import MAP_CELLS
from ..report_parts import RunData, csv_link, figure, join, row, table
from ..report_sections import curves
from .diagnosis import rank_names

SOURCE = "comm.json"


def experts(run: RunData, index: int, of: str) -> str | None:
    """Rows at each expert as a map, layer x expert."""
    counts = run.comm.get("expert_rows", {})
    grids = {int(layer): line for layer, line in counts.items() if sum(line)}
    cells = sum(map(len, grids.values()))
    if not grids or cells > MAP_CELLS:
        return None
    width = max(map(len, grids.values()))
    load: list[list[float | None]] = [
        [n * len(line) / sum(line) for n in line] + [None] * (width - len(line)) for line in grids.values()
    ]
    title, name = f"Rows at each expert{of}", f"expert-load-{index}"
    steps = run.comm.get("steps", [])
    svg = plots.load_maps(name, title, {f"{len(steps)} sampled steps": load}, list(grids), wide=not of)
    top = max((v, layer, e) for layer, line in zip(grids, load, strict=True) for e, v in enumerate(line) if v is not None)
    what = (
        f"Rows that were sent, by those of an even share. Busiest: expert {top[2]} of layer {top[1]}, ×{top[0]:.2f}. "
        "White: exactly its share; red: more; blue: less."
    )
    rows = [[layer, e, v] for layer, line in zip(grids, load, strict=True) for e, v in enumerate(line)]
    return figure(title, svg, what, SOURCE, csv_link(name, ["layer", "expert", "load_ratio"], rows, SOURCE))


def gpu(runs: Sequence[RunData]) -> str | None:
    """Counters over time, and the newest of each rank."""
    keys = list(dict.fromkeys(k for run in runs for k in run.metrics.names if k.startswith("gpu/")))
    figures = row(*(curves(runs, key, key.split("/", 1)[1].replace("_", " "), zero=True) for key in keys))
    return join(figures, *(_gpu_ranks(run, f": {run.name}" if len(runs) > 1 else "") for run in runs))


def _gpu_ranks(run: RunData, of: str) -> str | None:
    """gpu.json: the newest values of each rank, and why a device is held back."""
    path = run.path / "gpu.json"
    if not path.exists():
        return None
    try:
        ranks = json.loads(path.read_text(encoding="utf-8"))["ranks"]
        names = list(ranks[0]["values"])
        told = [["n/a" if v is None else float(f"{v:.4g}") for v in r["values"].values()] for r in ranks]
        rows = [
            [f"{r['rank']} · {r['host']}", *values, ", ".join(r["reasons"]) or "–"] for r, values in zip(ranks, told, strict=True)
        ]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RunDirError(f"{path}: cannot be read ({error!r}); repair or remove it to get a page without it") from error
    return table(
        f"Newest counters of each GPU (gpu.json; n/a: the device does not tell){of}", ["rank", *names, "held back by"], rows
    )


def recording(run: RunData, several: bool) -> str:
    """What the figures are made of."""
    c = run.comm
    steps = c.get("steps", [])
    unaligned = c.get("unaligned_s", {})
    hosts = list(dict.fromkeys(h for h in c.get("hosts", []) if h))
    ranks_of = {h: rank_names([r for r, name in enumerate(c["hosts"]) if name == h]) for h in hosts[:32]}
    rows = [
        ["run directory", str(run.path)],
        ["state", run.state + (" (this page shows what was recorded so far)" if run.state == "running" else "")],
        ["sampled steps", f"{len(steps)}, the newest is {max(steps)}" if steps else "none"],
        ["ranks", c.get("ranks", 0)],
        *([["hosts", "; ".join(f"{h}: {r}" for h, r in ranks_of.items())]] if hosts else []),
        ["collectives", f"{c.get('collectives', 0)} with records on all their ranks; {c.get('left_out', 0)} records without"],
        ["clocks compared to", f"±{1e3 * c.get('clock_error_s', 0.0):.2g} ms"],
        ["schema of comm.json", c.get("schema", 1)],
    ]
    if unaligned:
        worst_ms = 1e3 * max(unaligned.values())
        rows.append(
            ["left out: clocks disagreed", f"{len(unaligned)} steps, by up to {worst_ms:.3g} ms: their times are not compared"]
        )
    return table(f"Recording{f': {run.name}' if several else ''}", ["what", "value"], rows)
