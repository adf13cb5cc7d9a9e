"""How far every layout is from one process: the worst relative differences, in float64 on gloo.

Runs the table of `moefold.parallel.parity_layouts`, each layout with 1, 2 and 4 micro-batches, on real processes.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict

from moefold.launch.local_ranks import run_local_ranks
from moefold.parallel.parity import ParityCase, RankTrace, run_layout, run_reference
from moefold.parallel.parity_compare import Difference, compare
from moefold.parallel.parity_layouts import LAYOUTS, Layout, Planned, plan

from .result import Result, Row

SHOWN = ("loss", "grad_norm", "gradient", "update")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", metavar="TEXT", help="layouts whose name contains this, such as `8:` or `tp2`")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")


def run(options: argparse.Namespace) -> Result:
    by_layout: dict[Layout, list[Planned]] = defaultdict(list)
    for planned in plan():
        by_layout[planned.layout].append(planned)
    chosen = [layout for layout in LAYOUTS if options.only in layout.name]
    if not chosen:
        sys.exit(f"no layout contains {options.only!r}; there are: {', '.join(layout.name for layout in LAYOUTS)}")
    rows = [measure(layout, by_layout[layout], options.seed) for layout in chosen]
    worst = max(float(row["anything"]) for row in rows)  # type: ignore[arg-type]
    cases = sum(len(by_layout[layout]) for layout in chosen)
    return Result(rows, {"worst_relative_difference": worst, "layouts": len(rows), "cases": cases})


def measure(layout: Layout, planned: list[Planned], seed: int) -> Row:
    """The row of one layout: over its cases, the worst difference of each quantity, and of anything that is compared."""
    cases = [p.build(seed=seed) for p in planned]
    per_rank = run_local_ranks(on_rank, layout.world, cases, layout.degrees)
    worst: dict[str, float] = defaultdict(float)
    where = Difference("", 0.0, "")
    for index, case in enumerate(cases):
        reference = run_reference(case, dp=layout.topology.dp)
        for d in compare(reference, [traces[index] for traces in per_rank]):
            worst[d.quantity] = max(worst[d.quantity], d.worst)
            where = max(where, d, key=lambda one: one.worst)
    print(f"  {layout.name}: {max(worst.values()):.1e}", file=sys.stderr, flush=True)
    topology = layout.topology
    degrees: dict[str, int] = {name: getattr(topology, name) for name in ("dp", "hsdp", "tp", "edp", "ep", "etp")}
    return {
        "layout": layout.name,
        **degrees,
        "variants": ", ".join(p.variant.name for p in planned),
        **{name: worst[name] for name in SHOWN},
        "anything": where.worst,
        "where": f"{where.quantity}: {where.where}",
    }


def on_rank(rank: int, world: int, cases: list[ParityCase], degrees: dict[str, int]) -> list[RankTrace]:
    return [run_layout(case, degrees) for case in cases]
