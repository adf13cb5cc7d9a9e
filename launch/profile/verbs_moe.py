"""The verb `moefold profile moe`. Imports no torch."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ...moe.errors import ConfigError, Problem
from ..verb import Flags, Verb, add_files, print_json

if TYPE_CHECKING:
    from .moe import MoeProfile


def _options(parser: argparse.ArgumentParser) -> None:
    add_files(parser)
    parser.add_argument("--layer", action="store_true", help="one MoE layer instead of the whole step")
    parser.add_argument("--whole-step", action="store_true", help="the whole step, as without --layer")
    parser.add_argument(
        "--routing",
        choices=["natural", "balanced", "zipf", "recorded"],
        default="natural",
        help="how tokens choose experts: as the initialised router does, evenly, by Zipf's law, or as a run has recorded "
        "(default: %(default)s)",
    )
    parser.add_argument("--zipf", type=float, default=1.0, metavar="S", help="exponent of --routing zipf (default: %(default)s)")
    parser.add_argument("--from-run", metavar="RUN", help="run directory with the loads of --routing recorded")
    parser.add_argument("--tokens", choices=["random", "text"], default="random", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="steps to time (default: %(default)s)")
    parser.add_argument("--no-predict", action="store_true", help="only stages: predict no other ways")
    parser.add_argument("--measure", default="0", metavar="N", help="time the N best predicted ways too, or 'all' (default: 0)")
    parser.add_argument(
        "--measure-s",
        type=float,
        default=2.0,
        metavar="S",
        help="seconds to measure each layout's links for (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="FILE", help="write an HTML page")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="print the findings as JSON, or write them to FILE")
    parser.add_argument("--csv", metavar="FILE", help="write the table of stages as CSV")


def _run(options: argparse.Namespace, flags: Flags) -> int:
    from ..config import load

    measure = _measure(options.measure)
    if options.layer and options.whole_step:
        raise ConfigError([Problem("--layer", "does not go with --whole-step; leave one of them out")])
    loaded = load(*options.files, flags=flags)
    from .case import Load
    from .moe import profile_moe

    found = profile_moe(
        loaded.config,
        load=Load(options.routing, options.zipf, options.from_run, options.tokens),
        whole_step=not options.layer,
        steps=options.steps,
        predict=not options.no_predict,
        measure=measure,
        measure_s=options.measure_s,
        progress=lambda text: print(text, file=sys.stderr, flush=True),
    )
    if found.rank == 0:
        _write(found, options)
    return found.exit_code


def _measure(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError([Problem("--measure", f"is {text!r}, but must be a number of ways or 'all'")]) from None


def _write(found: MoeProfile, options: argparse.Namespace) -> None:
    from ..html_page import write_text

    if options.out:
        from .page import write_page

        write_page(options.out, "Step by stage", found.verdict(), found.sections())
    if options.csv:
        write_text(Path(options.csv), found.to_csv(), "--csv")
    if options.json == "-":
        print_json(found.to_dict())
        return
    if options.json:
        write_text(Path(options.json), json.dumps(found.to_dict(), indent=2, ensure_ascii=False) + "\n", "--json")
    print(found.render())
    if options.out:
        print(f"page: {options.out}")


VERB = Verb(
    "time a training step stage by stage, and say what it would take sent in other ways",
    (
        "torchrun --nproc-per-node 2 -m moefold.launch.profile moe quickstart --parallel.dp 2 --parallel.hsdp 2 --measure 3",
        "torchrun --nproc-per-node 4 -m moefold.launch.profile moe quickstart --routing zipf --zipf 1.2 --json moe.json",
    ),
    (
        ("--parallel.ep N", "expert-parallel ranks"),
        ("--model.moe.dispatcher NAME", "all_to_all or hierarchical"),
        ("--train.global_batch N", "sequences of the step"),
    ),
    _options,
    _run,
)
