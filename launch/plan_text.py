"""A plan of communication overlap as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..moe.dispatch import Pieces
from ..parallel.gradient_placement import Placement
from ..parallel.plan import Plan

if TYPE_CHECKING:
    from .plan import Findings, PlanResult, Variant

SHOWN = (1, 2, 4, 8)


def render(result: PlanResult) -> str:
    """Tables: links, experts, predicted times by number of pieces, what other ways of sending would take."""
    m, load, here = result.plan.model, result.plan.model.load, result.plan.fingerprint
    lines = [
        f"plan for {here.world} rank{'s' * (here.world != 1)} on {len(here.hosts)} host{'s' * (len(here.hosts) != 1)}, "
        f"ep {here.ep}, etp {here.etp}, {here.backend}",
        f"  {layers_text(m.layers)}: {load.num_experts} experts of {load.dim} x {load.expert_dim}, top {load.top_k}, "
        f"{load.tokens} tokens per rank and pass, {load.row_bytes} bytes a row, dispatcher '{m.dispatcher}'",
    ]
    if result.findings is not None:
        lines += ["", *_measured(result.plan, result.findings, result.seconds), "", *_predicted(result.findings)]
        lines += ["", *_what_if(result.findings.variants), "", *_gradients(result.findings.gradients)]
        lines += ["", *(line for text in result.findings.timelines for line in text.splitlines())]
    lines += ["", *result.notes, verdict(result.plan)]
    return "\n".join(lines + ([f"written: {result.out}"] if result.out else []))


def layers_text(layers: tuple[int, ...]) -> str:
    """'MoE layers 0-3, 6'."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return f"MoE layer{'s' * (len(layers) != 1)} " + ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in runs)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def size_text(size: float) -> str:
    if size == float("inf"):
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 999.5 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _measured(made: Plan, found: Findings, seconds: float) -> list[str]:
    rows = [("link", "operation", "ranks", "alpha ms", "bandwidth/s", "bucket", "half at", "error mean, max")]
    for name, fit in made.links.items():
        m, errors = fit.model, f"{fit.mean_error:.0%}, {fit.max_error:.0%}"
        cells = (_ms(m.alpha_s), size_text(m.bytes_per_s), size_text(m.bucket_bytes), size_text(m.half_bandwidth_bytes), errors)
        rows.append((name, fit.what, str(fit.ranks), *cells))
    work = [("experts", "alpha ms", "GFLOP/s", "error mean, max")]
    for name, compute in zip(("forward", "backward"), found.experts, strict=True):
        rate = 1e-9 / compute.model.s_per_flop if compute.model.s_per_flop else float("inf")
        errors = f"{compute.mean_error:.0%}, {compute.max_error:.0%}"
        work.append((name, _ms(compute.model.alpha_s), f"{rate:.3g}", errors))
    assert made.costs is not None
    slower = f"experts and exchanges slow each other down {made.costs.contention:.2f} times"
    return [f"measured in {seconds:.1f} s", *_table(rows), "", *_table(work), f"  {slower}"]


def _predicted(found: Findings) -> list[str]:
    choice = found.variants[0].choice
    ways = {choice.way(n).chunks: choice.way(n) for n in SHOWN} | {way.chunks: way for way in (choice.mirrored, choice.best)}
    rows = [("pieces", "forward", "backward", "together", "")]
    for way in sorted(ways.values(), key=lambda way: (way.chunks.units, way.chunks.forward, way.chunks.backward)):
        times = (_ms(way.forward_s), _ms(way.backward_s), _ms(way.both_s))
        rows.append((str(way.chunks), *times, "<- chosen" if way is choice.best else ""))
    return ["predicted time of a layer, ms", *_table(rows)]


def _what_if(variants: tuple[Variant, ...]) -> list[str]:
    rows = [("dispatcher", "rows", "sent across nodes", "inside", "pieces", "together", "")]
    for variant in variants:
        c, sent = variant.choice, variant.sent
        last = "<- configured" if variant is variants[0] else ""
        cells = (size_text(sent["across"]), size_text(sent["inside"]), str(c.chunks), _ms(c.best.both_s), last)
        rows.append((variant.dispatcher, f"{variant.rate:.0%}", *cells))
    return ["what if, ms (every expert as likely; without the work of compression)", *_table(rows)]


def _gradients(placed: Placement | None) -> list[str]:
    if placed is None:
        return ["gradients: no data ranks to add them up with"]
    return [
        f"gradients take {_ms(placed.serial_s)} ms to add up; in the gaps of the slow link in backward all but "
        f"{_ms(placed.exposed_s)} ms of it are hidden (predicted; parallel.gradient_windows = true puts them there)"
    ]


def verdict(plan: Plan) -> str:
    """What a plan says, in one line. Of several layers, which all send as much, the first speaks for all."""
    first, where = plan.layers[0], layers_text(plan.model.layers)
    if first.forward_s is None or first.backward_s is None or first.forward_1_s is None or first.backward_1_s is None:
        return "all experts are on every rank: there is no link to plan for, 1 piece"
    if first.chunks.units == 1:
        return f"{where}: 1 piece, as more would take longer"
    gain = (first.forward_1_s + first.backward_1_s) / (first.forward_s + first.backward_s)
    return f"{where}: {pieces_text(first.chunks)}, predicted {gain:.2f} times as fast as one"


def pieces_text(pieces: Pieces) -> str:
    """'3 pieces', or '2 pieces forward and 4 backward'."""
    few, many = pieces.forward, pieces.backward
    return f"{few} piece{'s' * (few != 1)}" + (f" forward and {many} backward" if few != many else "")
