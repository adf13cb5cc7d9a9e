"""`python -m bench NAME [--json PATH] [--check] [options of the benchmark]`.

A benchmark is a module of this folder with a docstring, `run(options) -> Result`, and perhaps `options(parser)` for more flags.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from .provenance import provenance
from .provenance import render as render_provenance
from .result import Result, as_json, check, load_goals, render

FOLDER = Path(__file__).parent
NOT_BENCHMARKS = frozenset({"__init__", "__main__", "provenance", "result"})


def names() -> list[str]:
    """The benchmarks: every other module of this folder."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in NOT_BENCHMARKS)


def listing() -> str:
    """Every benchmark with the first line of its docstring, read without importing it."""
    docs = {name: ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or "" for name in names()}
    width = max(map(len, docs), default=0)
    return "\n".join(f"  {name:{width}}  {doc.splitlines()[0] if doc else ''}" for name, doc in docs.items())


def parser_for(name: str, module: ModuleType) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=module.__doc__)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write rows, figures and provenance to this file")
    parser.add_argument("--check", action="store_true", help="exit 1 where a goal of bench/goals.toml is missed")
    if hasattr(module, "options"):
        module.options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one benchmark. Returns 0; 1 if `--check` finds a missed goal; 2 for an unknown name, or a check without goals."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m bench NAME [--json PATH] [--check] ...\n\n{listing()}")
        return 0 if argv else 2
    name = argv[0]
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        print(f"no benchmark '{name}'{f'; did you mean {near[0]!r}?' if near else ''}\n{listing()}", file=sys.stderr)
        return 2
    module = import_module(f".{name}", __package__)
    options = parser_for(name, module).parse_args(argv[1:])
    goals = load_goals(name)
    if options.check and not goals:
        print(f"bench/goals.toml states no goal for {name}, so there is nothing to check", file=sys.stderr)
        return 2
    facts = provenance(argv)
    print(render_provenance(facts), flush=True)
    result: Result = module.run(options)
    print(f"\n{render(result.rows)}\n")
    for figure, value in result.figures.items():
        print(f"{figure} = {value:.6g}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(as_json(result, facts), indent=2) + "\n")
    if not options.check:
        return 0
    import torch

    lines, kept = check(goals, result.figures, cuda=torch.cuda.is_available())
    print("\n" + "\n".join(lines))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
