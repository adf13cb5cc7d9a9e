"""Whether `moefold profile run` names what holds a job up: eight planted faults and four runs without one.

Four hosts (network namespaces on this machine) with one rank each are joined by shaped links; one torchrun job trains a small
model in stretches, each with a fault of its own, and records each into a run directory, of which `profile run` then gives its
verdict. Found: it names the planted cause, on the right host and, of experts, the right one. Confused: it names another cause,
alone or beside it. False alarm: it names one where nothing was planted. A burdened processor is a core of this machine that the
rank shares with other programs; the other ranks then share another core, so that they are slower too, but not as slow.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from moefold.launch.profile.diagnosis import Diagnosis, Finding
from moefold.launch.profile.run import profile_run

from .faults.job import EXPERTS_PER_RANK, Order
from .result import Result, Row

ROOT = Path(__file__).resolve().parents[1]
HOSTS, RATE = 4, "200mbit"
STEPS = 8
START_S, STRETCH_S = 120.0, 90.0
"""Limits of the job's start and of one stretch."""
BURDEN = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
for _ in range(int(sys.argv[2]) - 1):
    if os.fork() == 0:
        os.setsid()  # programs of one session get one share of a core together
        break
while True:
    pass
"""


@dataclass(frozen=True)
class Planted:
    """What is wrong with one stretch. kind, rank, expert: as they should be named; kind None = nothing is wrong.

    rate: of the link of the host of `rank`, if it is not that of all. programs: that compute beside that rank.
    """

    name: str
    kind: str | None = None
    rank: int | None = None
    expert: int | None = None
    rate: str | None = None
    programs: int = 0
    order: dict[str, Any] = field(default_factory=dict)


def hot(expert: int) -> Planted:
    return Planted(f"hot expert {expert}", "hot_expert", expert // EXPERTS_PER_RANK, expert, order={"hot_expert": expert})


def slow(rank: int, factor: float) -> Planted:
    return Planted(f"host {rank} x{factor:g}", "slow_rank", rank, order={"slow_rank": rank, "factor": factor})


def link(rank: int, rate: str) -> Planted:
    return Planted(f"links of host {rank} at {rate}", "slow_link", rank, rate=rate)


def burdened(rank: int, programs: int) -> Planted:
    return Planted(f"{programs} programs on host {rank}", "busy_cpu", rank, programs=programs, order={"alone": rank})


CASES = (
    Planted("nothing, first"),
    slow(1, 2.5),
    link(2, "20mbit"),
    burdened(3, 10),
    hot(1),
    Planted("nothing, second"),
    slow(3, 2.0),
    link(0, "20mbit"),
    Planted("nothing, third"),
    burdened(1, 8),
    hot(5),
    Planted("nothing, last"),
)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each stretch (default: %(default)s)")
    parser.add_argument("--only", nargs="*", type=int, metavar="N", help="only these of the cases, counted from 0")


def run(options: argparse.Namespace) -> Result:
    cases = CASES if options.only is None else tuple(CASES[n] for n in options.only)
    if len(os.sched_getaffinity(0)) < 2:
        refuse("needs two cores, so that one can be burdened and the other not")
    if (tests := str(ROOT / "tests")) not in sys.path:
        sys.path.append(tests)
    from lab.bed import Lab, LabError, LabUnavailable

    with tempfile.TemporaryDirectory(prefix="moefold-bench-") as name:
        try:
            with Lab(hosts=HOSTS, rate=RATE) as lab:
                return _in_lab(lab, cases, options.steps, Path(name))
        except LabUnavailable as error:
            refuse(f"needs hosts to train on, and none can be made here: {error}")
        except LabError as error:
            refuse(error)


def refuse(reason: object) -> NoReturn:
    """End the benchmark with exit code 2 and the reason."""
    print(f"profile_faults: {reason}", file=sys.stderr, flush=True)
    sys.exit(2)


def _in_lab(lab: Any, cases: Sequence[Planted], steps: int, folder: Path) -> Result:
    limit_s = START_S + len(cases) * STRETCH_S
    job = lab.start_torchrun("bench.faults.job", [folder], timeout_s=limit_s, launcher=["--max-restarts=0"], cwd=ROOT)
    rows: list[Row] = []
    for number, case in enumerate(cases):
        with planted(lab, case):
            start_s = time.monotonic()
            _order(folder, number, Order(steps=steps, **case.order))
            job.on[0].wait_for(f"done {number}.", STRETCH_S + (START_S if number == 0 else 0.0))
        row = judged(case, profile_run(folder / f"run-{number}").diagnoses[0])
        rows.append({**row, "seconds": time.monotonic() - start_s})
        print(f"  {case.name}: {row['verdict']}", file=sys.stderr, flush=True)
    _order(folder, len(cases), Order())
    job.wait().check()
    return Result(rows, figures(rows))


def _order(folder: Path, number: int, order: Order) -> None:
    unseen = folder / "order"
    unseen.write_text(json.dumps(asdict(order)))
    unseen.rename(folder / f"{number}.json")


@contextmanager
def planted(lab: Any, case: Planted) -> Any:
    """The fault is there while the body runs, as far as it is none of the job's own."""
    burden = None
    if case.rate is not None:
        lab.shape(case.rank, case.rate)
    if case.programs:
        core = str(max(os.sched_getaffinity(0)))
        burden = lab.start(case.rank, [sys.executable, "-I", "-S", "-c", BURDEN, core, str(case.programs)], STRETCH_S * 2)
    try:
        yield
    finally:
        if burden is not None:
            burden.stop()
        if case.rate is not None:
            lab.shape(case.rank, RATE)


def is_right(case: Planted, finding: Finding) -> bool:
    """Whether it names what was planted, where it was planted."""
    place = finding.ranks == (case.rank,) and finding.host == f"nl{case.rank}"
    return finding.kind == case.kind and place and (case.expert is None or finding.expert == case.expert)


def judged(case: Planted, said: Diagnosis) -> Row:
    """A row of the table. found: the planted cause is named (of no fault: nothing is); confused: another one is."""
    right = [f for f in said.findings if is_right(case, f)]
    others = [f for f in said.findings if f not in right]
    return {
        "planted": case.name,
        "found": bool(right) if case.kind is not None else not others,
        "confused": bool(others) and case.kind is not None,
        "false_alarm": bool(others) and case.kind is None,
        "share": max((f.share for f in said.findings), default=0.0),
        "verdict": said.line,
    }


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Counts. found: of the planted faults; those without one are in `false_alarms`."""
    return {
        "found": float(sum(bool(row["found"]) for row, case in _faulty(rows))),
        "confused": float(sum(bool(row["confused"]) for row in rows)),
        "false_alarms": float(sum(bool(row["false_alarm"]) for row in rows)),
        "seconds": float(sum(float(row["seconds"] or 0.0) for row in rows)),
    }


def _faulty(rows: Sequence[Row]) -> list[tuple[Row, Planted]]:
    known = {case.name: case for case in CASES}
    return [(row, known[str(row["planted"])]) for row in rows if known[str(row["planted"])].kind is not None]
