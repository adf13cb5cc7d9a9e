"""A communication profile as sections of an HTML page: bandwidth by size with link models, tables, maps of pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from .. import plots
from ..report_parts import csv_text, figure, join, row, table
from ..svg import DASHES, HALF, SERIES_KEYS, axes, legend, render
from .comm_tables import CSV_HEAD, DEFINITIONS, host_latencies, pair_rows, size_text, sweep_rows, thresholds
from .page import Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ...parallel.comm_pairs import Pair
    from ...parallel.comm_sweep import Curve
    from .comm import CommProfile

SOURCE = "moefold profile comm"
DRAWN = 256
"""Hosts or ranks up to which a map is drawn: more cannot be told apart."""


def sections(profile: CommProfile) -> list[Section]:
    """Bandwidth, link models, pairs, and what the numbers mean."""
    return [
        Section("Bandwidth by size", "comm-bandwidth", _bandwidth(profile), csv=csv_text(CSV_HEAD, sweep_rows(profile))),
        Section("Link models", "comm-models", _models(profile), "three sizes are needed: raise --end or --budget-s"),
        _pairs(profile),
        Section("What the numbers mean", "comm-definitions", _definitions(profile)),
    ]


def _bandwidth(profile: CommProfile) -> str:
    # one message alone is so much faster than a collective that it would press the others' curves to the floor
    plots_of: dict[str, list[Curve]] = {}
    for curve in profile.curves:
        kind = "Ping-pong" if curve.operation == "send_recv" else "Bus bandwidth"
        plots_of.setdefault(f"{kind} over {curve.scope}", []).append(curve)
    figures = [_curves(f"busbw-{index}", title, curves) for index, (title, curves) in enumerate(plots_of.items())]
    head = ("operation", "group", "ranks", "size", "time (us)", "p95 (us)", "skew (us)", "busbw (GB/s)", "#wrong")
    rows = []
    for cells in sweep_rows(profile):
        named = dict(zip(CSV_HEAD, cells, strict=True))
        shown = [named[n] for n in ("time_us", "p95_us", "skew_us", "busbw_gb_per_s", "wrong")]
        rows.append([named["operation"], named["group"], named["ranks"], size_text(named["size_bytes"]), *shown])
    return join(row(*figures), table("All measurements", head, rows)) or ""


def _curves(name: str, title: str, curves: Sequence[Curve]) -> str:
    """Measured points, and the models as lines."""

    def draw(fig: Figure) -> None:
        ax = axes(fig, "size: one rank's buffer", "bus bandwidth (GB/s)")
        ax.set_xscale("log", base=2)
        for i, curve in enumerate(curves):
            ink = SERIES_KEYS[i % len(SERIES_KEYS)]
            sizes = [r.size for r in curve.rows]
            ax.plot(sizes, [r.busbw / 1e9 for r in curve.rows], color=ink, linestyle="none", marker="o", markersize=3.5)
            dash: Any = DASHES[i % len(DASHES)]
            ax.plot(*model_line(curve), color=ink, linestyle=dash, linewidth=1.4, label=curve.operation)
        ax.xaxis.set_major_formatter(lambda v, _: size_text(v))
        ax.set_ylim(bottom=0)
        legend(fig, ax)

    svg = render(name, title, draw, width=HALF)
    what = (
        f"Points: measured over {curves[0].ranks} ranks; lines: alpha-beta model of the medians (joined points without one). "
        "busbw = size / time x (n-1)/n, for all_reduce 2(n-1)/n."
    )
    return figure(title, svg, what, SOURCE)


def model_line(curve: Curve) -> tuple[list[float], list[float]]:
    """Sizes, and the bus bandwidth (GB/s) that a curve's model gives for them."""
    if curve.fit is None:
        return [float(r.size) for r in curve.rows], [r.busbw / 1e9 for r in curve.rows]
    first, last = curve.rows[0], curve.rows[-1]
    xs = [first.size * (last.size / first.size) ** (i / 48) for i in range(49)]
    # what is sent is in proportion to the size; so is busbw to size / time
    wire, factor = last.wire_max / last.size, last.busbw * last.time_s / last.size
    # a model of noisy times may begin at 0 seconds, where a bandwidth means nothing
    points = [(x, seconds) for x in xs if (seconds := curve.fit.model.seconds(wire * x)) > 0]
    return [x for x, _ in points], [factor * x / seconds / 1e9 for x, seconds in points]


def _models(profile: CommProfile) -> str | None:
    head = (
        "operation",
        "group",
        "alpha (us)",
        "bandwidth (GB/s)",
        "bucket",
        "half bandwidth at",
        "mean error (%)",
        "max error (%)",
    )
    rows = []
    for curve in profile.curves:
        if curve.fit is not None:
            m, fit = curve.fit.model, curve.fit
            rate = m.bytes_per_s / 1e9 if math.isfinite(m.bytes_per_s) else None
            sizes = [size_text(m.bucket_bytes), size_text(m.half_bandwidth_bytes)]
            rows.append([curve.operation, curve.scope, 1e6 * m.alpha_s, rate, *sizes, 100 * fit.mean_error, 100 * fit.max_error])
    return table("time = alpha + max(0, wire bytes - bucket) / bandwidth", head, rows) if rows else None


def _pairs(profile: CommProfile) -> Section:
    title, anchor = "Every two hosts and ranks", "comm-pairs"
    if profile.pairs is None:
        return Section(title, anchor, None, "it was left out (--no-pairs)")
    names = profile.node_names
    maps: list[str | None] = []
    if 1 < len(names) <= DRAWN:
        rates = {p: v / 1e6 for p, v in profile.pairs.host_rates(profile.nodes).items()}
        maps.append(_map("host-rates", "Bandwidth between hosts", rates, names, "MB/s", "All ranks of a host at once."))
        late = {p: 1e6 * v for p, v in host_latencies(profile).items()}
        maps.append(_map("host-latency", "Latency between hosts", late, names, "us", "Half of the answer to a few bytes."))
    if len(names) < len(profile.hosts) <= DRAWN:
        ranks = [str(rank) for rank in range(len(profile.hosts))]
        own = {p: w.bytes_per_s / 1e6 for p, w in profile.pairs.ways.items()}
        about = "Pairs of the same two hosts are measured at once and share what hosts share."
        maps.append(_map("rank-rates", "Bandwidth between ranks", own, ranks, "MB/s", about))
        late = {p: 1e6 * w.latency_s for p, w in profile.pairs.ways.items()}
        maps.append(_map("rank-latency", "Latency between ranks", late, ranks, "us", "Half of the answer to a few bytes."))
    found = [f.text for f in profile.findings] or ["no host, link or rank stands out"]
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    body = join(f'<div class="card"><h3>What is slow</h3><ul>{items}</ul></div>', row(*maps)) or ""
    head = ("from", "to", "from_host", "to_host", "bytes_per_s", "latency_s", "at_once")
    return Section(title, anchor, body, csv=csv_text(head, pair_rows(profile)))


def _map(name: str, title: str, values: Mapping[Pair, float], names: Sequence[str], unit: str, about: str) -> str:
    grid = [[values.get((i, j), math.nan) for j in range(len(names))] for i in range(len(names))]
    kind = "host" if "host" in name else "rank"
    svg = plots.matrix(name, title, grid, (f"from {kind}", f"to {kind}"), unit, columns=names)
    rows = "" if kind == "rank" else f" Rows and columns: {', '.join(names[:16])}{' ...' * (len(names) > 16)}."
    return figure(title, svg, about + rows, SOURCE)


def _definitions(profile: CommProfile) -> str:
    lines = (*DEFINITIONS, *thresholds(), *profile.notes)
    return f'<div class="card"><ul>{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul></div>'
