"""A communication profile as text for a terminal, as CSV and as plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...parallel.comm_sweep import Curve, Row
from ...parallel.cost_model import LinkFit, LinkModel
from ...parallel.link_verdict import BETWEEN, LATENCY, LATENCY_S, WITHIN, rate_text
from ..report_parts import csv_text

if TYPE_CHECKING:
    from ...parallel.comm_pairs import Pair
    from .comm import CommProfile

SHOWN = 12
"""Hosts or ranks up to which a matrix is printed; all are in the JSON."""
TIMES = ("time", "p95", "min rank", "max rank", "skew")
HEAD = ("size", "count", "type", *TIMES, "algbw", "busbw", "wire mean", "wire max", "#wrong")
UNITS = ("(B)", "(elements)", "", "(us)", "(us)", "(us)", "(us)", "(us)", "(GB/s)", "(GB/s)", "(B)", "(B)", "")
DEFINITIONS = (
    "size: bytes of one rank's buffer, its own part included: what it sends, for all_gather what it gathers",
    "time: median over iterations, from the last start in a group, behind a barrier, to the last end; first call left out",
    "min rank, max rank: over ranks, of medians until their own end; skew: median of last start - first start, no part of time",
    "algbw = size / time; busbw = algbw x (n-1)/n, all_reduce x 2(n-1)/n, send_recv x 1, n: ranks of a group; GB = 1e9 bytes",
    "wire: bytes that leave or reach a rank, whichever is more, mean and max over ranks; send_recv: half of a ping-pong",
    "model: time = alpha + max(0, wire max - bucket) / bandwidth; half: wire bytes that reach half of the bandwidth",
)
CSV_HEAD = (
    *("operation", "group", "ranks", "size_bytes", "count", "type", "iterations", "time_us", "p95_us", "min_rank_us"),
    *("max_rank_us", "skew_us", "algbw_gb_per_s", "busbw_gb_per_s", "wire_mean_bytes", "wire_max_bytes", "wrong", "model_us"),
)


def render(profile: CommProfile) -> str:
    """Every table, then what is slow, and the verdict last."""
    n, hosts = len(profile.hosts), len(profile.node_names)
    lines = [f"{n} ranks on {hosts} host{'s' * (hosts != 1)}, {profile.backend} on {profile.device}, {profile.seconds:.1f} s"]
    for curve in profile.curves:
        lines += ["", *_sweep_table(profile, curve)]
    lines += ["", *_fit_table(profile.curves), "", *_pair_tables(profile), ""]
    lines += [f"# {text}" for text in (*DEFINITIONS, *thresholds())]
    lines += [f"note: {text}" for text in profile.notes]
    lines += [f"slow: {finding.text}" for finding in profile.findings]
    return "\n".join([*lines, "", verdict(profile), *(f"written: {file}" for file in profile.written)])


def verdict(profile: CommProfile) -> str:
    """What is wrong, or slow, or that nothing is."""
    broken = [row for curve in profile.curves for row in curve.rows if row.wrong]
    if broken:
        first = broken[0]
        where = f"{first.operation} over {first.scope} at {size_text(first.size)}"
        return f"data arrived wrong: {profile.wrong} elements, first in {where}; do not train on these links"
    if profile.findings:
        more = len(profile.findings) - 1
        return profile.findings[0].text + (f" (and {more} more)" if more else "")
    speed = _speed(profile.curves)
    if profile.pairs is None:
        return f"data arrived right{speed}; pairs of ranks were not measured"
    part = "" if profile.pairs.done == profile.pairs.rounds else " among the pairs that there was time for"
    return f"no host, link or rank stands out{part}{speed}"


def _speed(curves: Sequence[Curve]) -> str:
    main = next((c for c in curves if c.operation == "all_to_all"), curves[0])
    best = max(main.rows, key=lambda row: row.busbw)
    alpha = "" if main.fit is None else f", alpha {us(main.fit.model.alpha_s)} us"
    return f"; {main.operation} over {main.scope} reaches busbw {rate_text(best.busbw)} at {size_text(best.size)}{alpha}"


def thresholds() -> tuple[str, ...]:
    """From where on something is called slow."""
    return (
        f"slow: below 1/{BETWEEN:g} of the usual rate between hosts (1/{WITHIN:g} inside a host and for ranks), measured twice;"
        f" latency over {LATENCY:g} times the usual and {1e3 * LATENCY_S:g} ms more;"
        " a host is named where most of its pairs are slow, else the link",
    )


def us(seconds: float) -> str:
    """Microseconds, at least three digits."""
    return f"{1e6 * seconds:.0f}" if seconds >= 1e-3 else f"{1e6 * seconds:.3g}"


def size_text(size: float) -> str:
    """8 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 999.5 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}" if math.isfinite(size) else "-"


def _gb(rate: float) -> str:
    return f"{rate / 1e9:.3g}" if math.isfinite(rate) else "-"


def _row(row: Row, skew_known: bool) -> tuple[str, ...]:
    times = (us(row.time_s), us(row.p95_s), us(row.fastest_rank_s), us(row.slowest_rank_s))
    wire = (f"{row.wire_mean:.0f}", f"{row.wire_max:.0f}")
    skew = us(row.skew_s) if skew_known else "n/a"
    return (str(row.size), str(row.count), row.dtype, *times, skew, _gb(row.algbw), _gb(row.busbw), *wire, str(row.wrong))


def _title(profile: CommProfile, curve: Curve) -> str:
    count = len(profile.groups[curve.scope])
    name = {
        "all_to_all": "all_to_all (receives first)" if profile.backend == "gloo" else "all_to_all",
        "torch": "torch (all_to_all_single)",
        "uneven": f"uneven all_to_all (hottest rank x{min(profile.options.imbalance, curve.ranks):g})",
    }.get(curve.operation, curve.operation)
    groups = "" if count == 1 else f", {count} groups at once"
    return f"{name} over {curve.scope}: {curve.ranks} ranks{groups}; first call {us(curve.first_call_s)} us"


def _sweep_table(profile: CommProfile, curve: Curve) -> list[str]:
    known = profile.swept.clock_error_s is not None
    return [_title(profile, curve), *_table([HEAD, UNITS, *(_row(row, known) for row in curve.rows)])]


def _fit_table(curves: Sequence[Curve]) -> list[str]:
    rows = [("operation", "group", "alpha us", "bandwidth", "bucket", "half at", "error mean, max", "alpha us", "bandwidth")]
    for curve in curves:
        if curve.fit is not None and curve.fastest is not None:
            m, least = curve.fit.model, curve.fastest.model
            errors = f"{curve.fit.mean_error:.1%}, {curve.fit.max_error:.1%}"
            sizes = (size_text(m.bucket_bytes), size_text(m.half_bandwidth_bytes))
            cells = (us(m.alpha_s), _rate(m), *sizes, errors, us(least.alpha_s), _rate(least))
            rows.append((curve.operation, curve.scope, *cells))
    title = "link models of the medians, and of the fastest iterations"
    return [title, *_table(rows)] if len(rows) > 1 else [f"{title}: three sizes are needed"]


def _rate(model: LinkModel) -> str:
    return rate_text(model.bytes_per_s) if math.isfinite(model.bytes_per_s) else "-"


def host_latencies(profile: CommProfile) -> dict[Pair, float]:
    """(host, host) -> seconds, median over ranks' pairs."""
    assert profile.pairs is not None
    found: dict[Pair, list[float]] = {}
    for (a, b), way in profile.pairs.ways.items():
        ends = (profile.nodes.node_of_rank[a], profile.nodes.node_of_rank[b])
        if ends[0] != ends[1]:
            found.setdefault(ends, []).append(way.latency_s)
    return {ends: sorted(values)[len(values) // 2] for ends, values in found.items()}


def _pair_tables(profile: CommProfile) -> list[str]:
    pairs = profile.pairs
    if pairs is None:
        return ["pairs of ranks: not measured"]
    rounds = f"{pairs.done} round{'s' * (pairs.done != 1)} of disjoint pairs"
    about = f"{rounds}, {size_text(pairs.nbytes)} a shot, {pairs.seconds:.1f} s"
    lines = [f"pairs of ranks ({about}); from row to column"]
    names = profile.node_names
    if len(names) > 1:
        rates = {pair: rate / 1e6 for pair, rate in pairs.host_rates(profile.nodes).items()}
        lines += _matrix("MB/s between hosts, all their ranks at once", rates, names)
        lines += _matrix("latency between hosts, us", {p: 1e6 * s for p, s in host_latencies(profile).items()}, names)
    if len(names) < len(profile.hosts):
        ranks = [str(rank) for rank in range(len(profile.hosts))]
        lines += _matrix("MB/s between ranks", {p: w.bytes_per_s / 1e6 for p, w in pairs.ways.items()}, ranks)
        lines += _matrix("latency between ranks, us", {p: 1e6 * w.latency_s for p, w in pairs.ways.items()}, ranks)
    return lines


def _matrix(title: str, values: dict[Pair, float], names: Sequence[str]) -> list[str]:
    if len(names) > SHOWN:
        ordered = sorted(values.values())
        middle = ordered[len(ordered) // 2]
        return [f"  {title}: least {ordered[0]:.4g}, median {middle:.4g}, most {ordered[-1]:.4g} (all are in the JSON)"]
    head = ("", *names)
    rows = [(a, *(f"{values[i, j]:.4g}" if (i, j) in values else "-" for j in range(len(names)))) for i, a in enumerate(names)]
    return [f"  {title}", *(f"  {line}" for line in _table([head, *rows]))]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def sweep_rows(profile: CommProfile) -> list[list[Any]]:
    """Cells under `CSV_HEAD`."""
    known, out = profile.swept.clock_error_s is not None, []
    for curve in profile.curves:
        for r in curve.rows:
            model = None if curve.fit is None else 1e6 * curve.fit.model.seconds(r.wire_max)
            times = [1e6 * s for s in (r.time_s, r.p95_s, r.fastest_rank_s, r.slowest_rank_s)]
            skew = 1e6 * r.skew_s if known else None
            rates = [r.algbw / 1e9, r.busbw / 1e9]
            start = [r.operation, r.scope, r.ranks, r.size, r.count, r.dtype, r.iters]
            out.append([*start, *times, skew, *rates, r.wire_mean, r.wire_max, r.wrong, model])
    return out


def sweep_csv(profile: CommProfile) -> str:
    """One line for each collective and size."""
    return csv_text(CSV_HEAD, sweep_rows(profile))


def pair_rows(profile: CommProfile) -> list[list[Any]]:
    """from, to, host, host, bytes/s, latency in seconds, pairs at once."""
    assert profile.pairs is not None
    names, node = profile.node_names, profile.nodes.node_of_rank
    return [
        [a, b, names[node[a]], names[node[b]], w.bytes_per_s, w.latency_s, w.at_once] for (a, b), w in profile.pairs.ways.items()
    ]


def to_dict(profile: CommProfile) -> dict[str, Any]:
    """Times in seconds, sizes in bytes, rates in bytes/s."""
    from .comm import SCHEMA

    pairs = profile.pairs
    matrix = None
    if pairs is not None:
        head = ("from", "to", "from_host", "to_host", "bytes_per_s", "latency_s", "at_once")
        matrix = {
            **{"rounds": pairs.rounds, "done": pairs.done, "shot_bytes": pairs.nbytes, "seconds": pairs.seconds},
            "ways": [dict(zip(head, row, strict=True)) for row in pair_rows(profile)],
            "hosts": [
                {"from": profile.node_names[a], "to": profile.node_names[b], "bytes_per_s": rate}
                for (a, b), rate in pairs.host_rates(profile.nodes).items()
            ],
        }
    return {
        **{"schema": SCHEMA, "version": __version__, "verdict": verdict(profile), "tone": profile.tone},
        **{"hosts": list(profile.hosts), "backend": profile.backend, "device": profile.device, "seconds": profile.seconds},
        "options": profile.options.to_dict(),
        "groups": {name: [list(members) for members in groups] for name, groups in profile.groups.items()},
        "clock_error_s": profile.swept.clock_error_s,
        "curves": [_curve_dict(curve) for curve in profile.curves],
        "pairs": matrix,
        "findings": [asdict(finding) for finding in profile.findings],
        "notes": list(profile.notes),
        "definitions": [*DEFINITIONS, *thresholds()],
    }


def _curve_dict(curve: Curve) -> dict[str, Any]:
    rows = [{**asdict(row), "algbw": row.algbw, "busbw": row.busbw} for row in curve.rows]
    head = {"operation": curve.operation, "group": curve.scope, "ranks": curve.ranks, "first_call_s": curve.first_call_s}
    fits = {"fit": _fit_dict(curve.fit), "fastest": _fit_dict(curve.fastest)}
    return {**head, "stopped_at_bytes": curve.stopped, **fits, "rows": rows}


def _fit_dict(fit: LinkFit | None) -> dict[str, Any] | None:
    if fit is None:
        return None
    model = fit.model
    finite = model.beta_s_per_byte > 0
    return {
        **{"alpha_s": model.alpha_s, "beta_s_per_byte": model.beta_s_per_byte, "bucket_bytes": model.bucket_bytes},
        "bytes_per_s": model.bytes_per_s if finite else None,
        "half_bandwidth_bytes": model.half_bandwidth_bytes if finite else None,
        "mean_error": fit.mean_error,
        "max_error": fit.max_error,
        "residuals": [{"bytes": m, "measured_s": t, "model_s": model.seconds(m)} for m, t in fit.samples],
    }
