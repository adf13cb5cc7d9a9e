"""The verb `moefold profile run`. Imports no torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ...moe.errors import RunDirError
from ..verb import Flags, Verb, print_json


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, finished or running; several are compared")
    parser.add_argument("--out", metavar="FILE", help="HTML page (default: profile.html in the run directory)")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="print the findings as JSON, or write them to FILE")
    parser.add_argument("--csv", metavar="FILE", help="write the table of collectives as CSV")
    parser.add_argument("--trace", metavar="FILE", help="write one trace of all ranks for Perfetto (.json or .json.gz)")


def _run(options: argparse.Namespace, flags: Flags) -> int:
    from ..html_page import write_text
    from .run import default_page, profile_run

    found = profile_run(*options.runs)
    if options.trace and len(options.runs) > 1:
        raise RunDirError("--trace takes one run: clocks of different jobs cannot be compared")
    page = found.write(options.out or default_page(found.runs))
    lines = [found.render(), f"page: {page}"]
    if options.trace:
        from .trace_merge import merge_traces

        merged = merge_traces(found.runs[0], options.trace)
        lines.append(merged.render())
    if options.csv:
        write_text(Path(options.csv), found.to_csv(), "--csv")
    if options.json == "-":
        print_json(found.to_dict())
        return 0
    if options.json:
        write_text(Path(options.json), json.dumps(found.to_dict(), indent=2, ensure_ascii=False) + "\n", "--json")
    print("\n".join(lines))
    return 0


VERB = Verb(
    "say from the recordings of a job where its communication time goes, and who is to blame",
    (
        "moefold profile run runs/quickstart-20260801-120000",
        "moefold profile run runs/a runs/b --out comparison.html --json findings.json",
    ),
    (),
    _options,
    _run,
    settings=False,
)
