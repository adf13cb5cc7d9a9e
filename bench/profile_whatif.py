"""How well `moefold profile moe` predicts steps that are sent another way: predicted against measured over real links.

Four hosts (network namespaces on this machine) are joined by shaped links. For each rate one base step is profiled, its links,
experts and compression are measured alone, and every way is predicted: dispatchers, rows in one byte, LSH compression at two
rates, pieces, foldings. Then an engine of each way takes steps, in turns. `error` is predicted / measured - 1.

Both rates take about 8 minutes on 2 cores; with `--rates 300mbit` it is 3. All eight ranks share the cores of this machine: the
faster the links, the more of a step is the processor's, which other programs take from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .a2a.case import refuse
from .result import Result, Row
from .whatif.case import Shape

ROOT = Path(__file__).resolve().parents[1]
START_S, LINK_S = 120.0, 400.0
"""Limits of a job's start and of all that is done at one rate."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--rates", nargs="+", default=["100mbit", "300mbit"], metavar="RATE", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="steps of each way that are timed (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps of the base that are profiled (default: %(default)s)")
    parser.add_argument("--measure-s", type=float, default=3.0, help="for each folding's links (default: %(default)s)")
    parser.add_argument("--ranks-per-host", type=int, default=Shape.ranks_per_host, help="(default: %(default)s)")
    parser.add_argument("--host-sequences", type=int, default=Shape.host_sequences, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="last rate only, 2 rounds: to see that it runs")


def run(options: argparse.Namespace) -> Result:
    shape = replace(Shape(), ranks_per_host=options.ranks_per_host, host_sequences=options.host_sequences)
    rates, rounds, steps, measure_s = options.rates, options.rounds, options.steps, options.measure_s
    if options.quick:
        rates, rounds, steps, measure_s = rates[-1:], 2, 2, 1.0
    found = measure(shape, rates, {"rounds": rounds, "steps": steps, "measure_s": measure_s})
    return Result(table(rates, found), figures(rates, found))


def measure(shape: Shape, rates: Sequence[str], orders: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Of each rate, every way. Exits with 2 where no lab can be made."""
    if (tests := str(ROOT / "tests")) not in sys.path:
        sys.path.append(tests)
    from lab.bed import Lab, LabError, LabUnavailable

    with tempfile.TemporaryDirectory(prefix="moefold-bench-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps({"shape": asdict(shape), "links": len(rates), **orders}))
        try:
            with Lab(hosts=shape.hosts) as lab:
                return _in_lab(lab, shape, rates, folder)
        except LabUnavailable as error:
            refuse(f"needs hosts to measure between, and none can be made here: {error}")
        except LabError as error:
            refuse(error)


def _in_lab(lab: Any, shape: Shape, rates: Sequence[str], folder: Path) -> list[list[dict[str, Any]]]:
    job = lab.start_torchrun(
        "bench.whatif.job",
        [folder],
        nproc_per_node=shape.ranks_per_host,
        timeout_s=START_S + len(rates) * LINK_S,
        launcher=["--max-restarts=0"],
        cwd=ROOT,
    )
    job.on[0].wait_for("ready", START_S)
    found = []
    for link, rate in enumerate(rates):
        lab.shape(None, rate)
        (folder / f"go-{link}").touch()
        job.on[0].wait_for(f"measured {link}", LINK_S)
        found.append(json.loads((folder / f"found-{link}.json").read_text()))
        print(f"  {rate}: done", file=sys.stderr, flush=True)
    job.wait().check()
    return found


def table(rates: Sequence[str], found: Sequence[Sequence[Mapping[str, Any]]]) -> list[Row]:
    """A row for each rate and way, in the order of predicted times. least_ms, most_ms: of the measured steps."""
    return [
        {
            "link": rate,
            "way": way["name"],
            "predicted_ms": 1e3 * way["seconds"],
            "plus_minus_ms": 1e3 * way["error_s"],
            "measured_ms": 1e3 * way["measured_s"],
            "least_ms": 1e3 * min(way["measurements_s"]),
            "most_ms": 1e3 * max(way["measurements_s"]),
            "error": way["seconds"] / way["measured_s"] - 1,
            "base": way["is_base"],
            **{f"{part}_ms": 1e3 * way["parts"].get(part, 0.0) for part in ("layers", "rows", "sharding", "codec", "wire")},
        }
        for rate, ways in zip(rates, found, strict=True)
        for way in ways
    ]


def figures(rates: Sequence[str], found: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """By rate, and the worst over rates, which goals are stated for.

    median_error: of the ways' absolute relative errors, the base left out. rank_correlation: Spearman's. best_over_best: measured
    time of the way that is predicted to be best, by that of the best measured one.
    """
    all_figures: dict[str, float] = {}
    worst: dict[str, list[float]] = {"median_error": [], "rank_correlation": [], "best_over_best": []}
    for rate, ways in zip(rates, found, strict=True):
        predicted, measured = [w["seconds"] for w in ways], [w["measured_s"] for w in ways]
        others = [abs(w["seconds"] / w["measured_s"] - 1) for w in ways if not w["is_base"]]
        chosen = min(ways, key=lambda w: w["seconds"])
        values = {
            "median_error": statistics.median(others),
            "rank_correlation": spearman(predicted, measured),
            "best_over_best": chosen["measured_s"] / min(measured),
        }
        for name, value in values.items():
            all_figures[f"{name}_{rate}"] = value
            worst[name].append(value)
        all_figures[f"prediction_took_s_{rate}"] = ways[0]["prediction_took_s"]
    return all_figures | {name: (min if name == "rank_correlation" else max)(values) for name, values in worst.items()}


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation of two lists without ties."""
    ranks = [[sorted(values).index(v) for v in values] for values in (one, other)]
    n = len(one)
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (n * (n * n - 1))
