"""The verb `moefold profile comm`: its options and examples. Imports no torch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..verb import Flags, Verb, add_files, print_json

if TYPE_CHECKING:
    from ..settings import RunConfig

LAYOUT = ("dp", "hsdp", "tp", "ep", "etp")


def _options(parser: argparse.ArgumentParser) -> None:
    add_files(parser, "*")
    smallest = "smallest size: bytes, 8K, 1M (default: %(default)s); 128 fits latency best"
    parser.add_argument("--begin", default="8K", metavar="SIZE", help=smallest)
    parser.add_argument("--end", default="64M", metavar="SIZE", help="largest size (default: %(default)s)")
    parser.add_argument("--factor", type=float, default=2.0, metavar="X", help="from one size to the next (default: %(default)s)")
    parser.add_argument("--iters", type=int, default=20, metavar="N", help="repetitions of each size (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=5, metavar="N", help="more before these (default: %(default)s)")
    parser.add_argument("--budget-s", type=float, default=60.0, metavar="S", help="seconds for all (default: %(default)s)")
    hottest = "uneven: what the hottest rank gets, in means (default: %(default)s)"
    parser.add_argument("--imbalance", type=float, default=2.0, metavar="X", help=hottest)
    parser.add_argument("--ops", metavar="A,B", help="only these: all_to_all, torch, uneven, hierarchical, all_gather, ...")
    parser.add_argument("--groups", metavar="A,B", help="only these: world, ep_etp, tp, dp_shard, inside, across, ...")
    parser.add_argument("--dtype", default="float32", metavar="TYPE", help="float32, bfloat16 or float16 (default: %(default)s)")
    parser.add_argument("--no-pairs", action="store_true", help="do not measure every two ranks")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="print JSON, or write it")
    parser.add_argument("--csv", metavar="FILE", help="write one line for each collective and size")
    parser.add_argument("--html", metavar="FILE", help="write an HTML page")


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def _config(files: list[str], flags: Flags) -> RunConfig:
    """The configuration; without a file one whose layout is what the flags say."""
    from ..config import load

    if files:
        return load(*files, flags=flags).config
    free: dict[str, object] = {f"parallel.{name}": 1 for name in LAYOUT} | {"parallel.dp": "none"}
    return load("quickstart", overrides=free, flags=flags).config


def _run(options: argparse.Namespace, flags: Flags) -> int:
    config = _config(options.files, flags)
    from dataclasses import replace

    from .comm import CommOptions, parse_size, profile_comm

    wanted = CommOptions(
        begin=parse_size(options.begin, "--begin"),
        end=parse_size(options.end, "--end"),
        operations=_names(options.ops),
        groups=_names(options.groups),
        pairs=not options.no_pairs,
        **{name: getattr(options, name) for name in ("factor", "iters", "warmup", "budget_s", "imbalance", "dtype")},
    )
    files: dict[str, Any] = {"csv_file": options.csv, "html_file": options.html}
    if options.json not in (None, "-"):
        files["json_file"] = options.json
    has_layout = bool(options.files) or any(f"parallel.{name}" in flags for name in LAYOUT)
    result = profile_comm(
        config.parallel, wanted, layout=has_layout, device=config.train.device, threads=config.train.threads, **files
    )
    if result.rank == 0 and options.json == "-":
        print_json(result.to_dict())
    elif result.rank == 0:
        result = replace(result, written=tuple(file for file in files.values() if file))
        print(result.render())
    return result.exit_code


VERB = Verb(
    "measure collectives by size and every pair of ranks; name a slow host or link",
    (
        "torchrun --nproc-per-node 4 -m moefold.launch.profile comm --budget-s 30",
        "torchrun --nproc-per-node 4 -m moefold.launch.profile comm --parallel.ep 2 --parallel.tp 2 --end 16M --html comm.html",
    ),
    (
        ("--parallel.ep N", "measure the groups of a layout instead of all ranks (also .tp, .etp, .hsdp)"),
        ("--parallel.ranks_per_node N", "neighbouring ranks that share a host, where host names do not tell"),
        ("--parallel.timeout_s S", "longest time that one collective may take"),
    ),
    _options,
    _run,
)
