"""Options that all benchmarks of kernels share, what follows from them, and runs in several processes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import torch

from moefold.kernels.triton_support import interpreting

from ..result import Result, Row
from .contender import Contender
from .limits import measure_limits
from .shapes import ROUTINGS, SHAPES, SMALL, SWEEP_T, TINY, Routing, Shape, shape_named, sweep
from .table import Setting, merge
from .timing import Budget, Clock, Gauges

DTYPES = ("bf16", "fp16", "fp32")
_TORCH_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of every benchmark of kernels."""
    names = [shape.name for shape in SHAPES]
    parser.add_argument(
        "--shapes", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)} (default: all)"
    )
    parser.add_argument(
        "--routings",
        nargs="+",
        choices=ROUTINGS,
        default=["balanced"],
        metavar="NAME",
        help=f"of {', '.join(ROUTINGS)} (default: balanced)",
    )
    parser.add_argument("--sweep-tokens", action="store_true", help=f"shape A with T of {SWEEP_T} in place of --shapes")
    parser.add_argument("--rounds", type=int, default=50, help="samples of each contender and pass (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="fresh processes, of whose rows the medians are shown")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16; with --smoke on a CPU fp32")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda; with --smoke the CPU")
    parser.add_argument("--smoke", action="store_true", help="a small shape and few rounds, to see that everything runs")


def add_unit_options(parser: argparse.ArgumentParser, units: Sequence[str]) -> None:
    """`add_options`, and which units to measure and which contenders to leave out."""
    add_options(parser)
    parser.add_argument(
        "--units", nargs="+", choices=units, default=list(units), metavar="NAME", help=f"of {', '.join(units)} (default: all)"
    )
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="contenders to leave out, by name in the table")


@dataclass(frozen=True)
class Plan:
    """What a run is going to measure."""

    shapes: tuple[Shape, ...]
    routings: tuple[Routing, ...]
    dtype: torch.dtype
    device: torch.device
    budget: Budget
    smoke: bool


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan that options ask for. Ends the process with code 2 and a message where this machine cannot do it."""
    device = options.device or ("cpu" if options.smoke else "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        refuse("this benchmark times kernels on a CUDA device, and torch finds none; --smoke runs a tiny case on the CPU")
    if device == "cpu" and not options.smoke:
        refuse("--device cpu goes with --smoke only: the shapes are made for GPUs, and times of a CPU say nothing about kernels")
    if options.rounds < 1 or options.processes < 1:
        refuse(f"--rounds {options.rounds} --processes {options.processes}: both must be at least 1")
    dtype = options.dtype or ("fp32" if device == "cpu" else "bf16")
    shapes = tuple(sweep(shape_named("A")) if options.sweep_tokens else map(shape_named, options.shapes))
    budget = Budget(samples=options.rounds)
    if options.smoke:
        shapes, budget = (SMALL if device == "cuda" else TINY,), Budget(0, min(options.rounds, 3), least=1)
    return Plan(
        shapes, tuple(options.routings), dict(zip(DTYPES, _TORCH_DTYPES, strict=True))[dtype], torch.device(device), budget,
        options.smoke,
    )  # fmt: skip


def run_units(
    bench: str,
    options: argparse.Namespace,
    unit_rows: Callable[[str, Plan, Setting, LeftOut], Sequence[Row]],
    figures: Callable[[Sequence[Row]], Mapping[str, float]],
) -> Result:
    """Measure every unit of a benchmark, here or in fresh processes, and form its figures."""
    plan = plan_of(options)
    if options.processes > 1:
        rows = in_processes(bench, options)
    else:
        setting, left_out = setting_of(plan), LeftOut(options.without)
        rows = [row for unit in options.units for row in unit_rows(unit, plan, setting, left_out)]
        left_out.warn()
    return Result(rows, figures(rows))


class LeftOut:
    """Contenders that `--without` names."""

    def __init__(self, names: Collection[str]):
        self.names, self.met = frozenset(names), set[str]()

    def keep(self, contenders: Sequence[Contender]) -> list[Contender]:
        """Those that are not left out."""
        self.met |= {one.name for one in contenders} & self.names
        return [one for one in contenders if one.name not in self.names]

    def warn(self) -> None:
        """Says which names nobody had; at the end of a run, since units have different contenders."""
        if missed := sorted(self.names - self.met):
            print(f"--without: no contender was named {', '.join(missed)}", file=sys.stderr)


def our_backend(device: torch.device) -> Literal["triton", "torch"]:
    """What "ours" is: the Triton kernels on a GPU and where Triton interprets (TRITON_INTERPRET=1), else the torch back ends."""
    return "triton" if device.type == "cuda" or interpreting() else "torch"


def backend_note(device: torch.device) -> str:
    """`our_backend` in words for the table."""
    if our_backend(device) == "torch":
        return "torch back ends: Triton has no GPU here and does not interpret"
    return "Triton" if device.type == "cuda" else "Triton, interpreted"


def refuse(message: str) -> NoReturn:
    """Ends the process with exit code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def setting_of(plan: Plan) -> Setting:
    """Clock, gauges, and the limits of this machine: on a CPU of a size that only shows that they are measured."""
    clock = Clock(plan.device)
    sizes = {} if plan.device.type == "cuda" else {"mm_size": 128, "copy_bytes": 2**20}
    limits, gauges = measure_limits(clock, plan.dtype, plan.budget, **sizes), Gauges(plan.device)
    speeds = f"{limits.mm_tflops:.4g} TFLOP/s in a product, {limits.copy_gb_s:.4g} GB/s in a copy"
    print(f"driver {gauges.driver()}; limits: {speeds}", file=sys.stderr, flush=True)
    return Setting(clock, plan.budget, gauges, limits)


def in_processes(bench: str, options: argparse.Namespace) -> list[Row]:
    """The merged rows of `options.processes` fresh processes, one after the other. Ends with the code of one that fails."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.processes):
            path = Path(folder) / f"{number}.json"
            command = [sys.executable, "-m", "bench", bench, "--json", str(path), *words_of(options)]
            done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
            if done.returncode:
                print(f"process {number} of {options.processes} ended with {done.returncode}", file=sys.stderr)
                raise SystemExit(done.returncode)
            runs.append(json.loads(path.read_text())["rows"])
    return merge(runs)


def words_of(options: argparse.Namespace) -> list[str]:
    """The command line of one of several processes."""
    words: list[str] = ["--shapes", *options.shapes, "--routings", *options.routings, "--rounds", str(options.rounds)]
    words += [word for word, given in (("--smoke", options.smoke), ("--sweep-tokens", options.sweep_tokens)) if given]
    given: Sequence[tuple[str, str | None]] = (("--dtype", options.dtype), ("--device", options.device))
    for flag, value in given:
        words += [] if value is None else [flag, value]
    for flag in ("units", "without"):
        values = getattr(options, flag, None)
        words += [f"--{flag}", *values] if values else []
    return words
