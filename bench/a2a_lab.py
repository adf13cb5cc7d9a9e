"""What the all-to-all of a training step costs over real links, and what each measure against it gains.

Four hosts (network namespaces on this machine) with two ranks each are joined by shaped links; one torchrun job takes training
steps of one model with each way of sending in turns, on text of this machine, after some steps that train. A link's rate is that
of each host in each direction. `flat` posts every receive first: on gloo that is the fair baseline, and its own all-to-all is
shown beside it. DeepSpeed's layer has the same weights in a loop that does less beside it (bench/a2a/deepspeed_peer.py); it is
also shown with receives first, and with a capacity over which it drops choices (not exact); it takes part in every third round.
Nothing is timed unless all exact ways have the same loss. `times_faster` is the median over rounds of (time of flat / time of
this one) in the same round. `flat` and `hierarchical` compute nothing while they wait; weights' gradients that come late, pieces
and windows are overlap. All ranks share the cores of one machine, so that computing and the network stack disturb each other
more than on a cluster, and steps that compute less gain by that too. With `--expert-us`, experts take time on top that nobody
else loses, as on accelerators.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefold.launch.data.loader import open_data
from moefold.launch.settings import DataConfig

from .a2a.case import (
    DEEPSPEED,
    DEEPSPEED_DROPPING,
    DEEPSPEED_RECEIVING,
    EVERYTHING,
    FLAT,
    HIERARCHICAL,
    OVERLAPPED,
    VOCAB,
    Case,
    Turn,
    Variant,
    check_losses,
    chosen,
    refuse,
)
from .result import Result, Row

ROOT = Path(__file__).resolve().parents[1]
START_S, ROUND_S = 240.0, 120.0
"""Limits of a job's start and of one round."""
COMPARABLE = (0.3, 0.6)
"""Part of a hierarchical step's time in transfer for which the gain of overlap is judged."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--rates", nargs="+", default=["100mbit", "300mbit"], metavar="RATE", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="per rate (default: %(default)s)")
    parser.add_argument("--ranks-per-host", type=int, default=Case.ranks_per_host, help="(default: %(default)s)")
    parser.add_argument("--train-steps", type=int, default=Case.train_steps, help="before all turns (default: %(default)s)")
    parser.add_argument("--without", nargs="*", default=[], metavar="WORD", help="variants to leave out: beginnings of names")
    how = "let experts also sleep N microseconds per row, as on a device of their own; leaves DeepSpeed out"
    parser.add_argument("--expert-us", type=float, default=0.0, metavar="N", help=how)
    parser.add_argument("--quick", action="store_true", help="last rate only, 2 rounds, small batches: to see that it runs")


def run(options: argparse.Namespace) -> Result:
    rates, rounds = options.rates, options.rounds
    try:
        variants = chosen(options.without)
        sizes = {"ranks_per_host": options.ranks_per_host, "train_steps": options.train_steps, "expert_us": options.expert_us}
        case = Case(**sizes)
    except ValueError as error:
        refuse(error)
    if options.quick:
        rates, rounds, case = rates[-1:], 2, replace(case, host_sequences=case.ranks_per_host, train_steps=4)
    if case.expert_us:
        # its experts are its own, and would not sleep
        variants = [v for v in variants if not v.deepspeed]
    first, turns = measure(case, variants, rates, rounds)
    return Result(table(case, variants, rates, first, turns), figures(case, rates, turns))


def windows(case: Case, folder: Path) -> Tensor:
    """Text of this machine: int64 [train_steps + 1, rows of a global batch, seq_len + 1]."""
    rows = case.world * case.sequences
    data = open_data(
        DataConfig(seq_len=case.seq_len), vocab_size=VOCAB, global_batch=rows, cache_dir=folder / "data", eval_batches=0
    )
    batches = [data.train.batch(step) for step in range(case.train_steps + 1)]
    return torch.stack([torch.cat([b.tokens_BS, b.labels_BS[:, -1:]], 1) for b in batches])


def measure(case: Case, variants: list[Variant], rates: list[str], rounds: int) -> tuple[list[Turn], list[Turn]]:
    """(turns that were not timed, turns of all rates). Exits with 2 where no lab can be made, or losses differ."""
    if (tests := str(ROOT / "tests")) not in sys.path:
        sys.path.append(tests)
    from lab.bed import Lab, LabError, LabUnavailable

    with tempfile.TemporaryDirectory(prefix="moefold-bench-") as name:
        try:
            with Lab(hosts=case.hosts) as lab:
                return _in_lab(lab, case, variants, rates, rounds, Path(name))
        except LabUnavailable as error:
            refuse(f"needs hosts to measure between, and none can be made here: {error}")
        except LabError as error:
            refuse(error)


def _in_lab(
    lab: Any, case: Case, variants: list[Variant], rates: list[str], rounds: int, folder: Path
) -> tuple[list[Turn], list[Turn]]:
    orders = {"case": asdict(case), "variants": [asdict(v) for v in variants], "links": len(rates), "rounds": rounds}
    (folder / "job.json").write_text(json.dumps(orders))
    torch.save(windows(case, folder), folder / "windows.pt")
    limit_s = START_S + len(rates) * (rounds + 1) * ROUND_S
    job = lab.start_torchrun(
        "bench.a2a.job", [folder], nproc_per_node=case.ranks_per_host, timeout_s=limit_s, launcher=["--max-restarts=0"], cwd=ROOT
    )
    job.on[0].wait_for("ready", START_S)
    first = _read(folder / "first.json")
    try:
        check_losses(first, variants)
    except ValueError as error:
        refuse(error)
    turns: list[Turn] = []
    for link, rate in enumerate(rates):
        lab.shape(None, rate)
        (folder / f"go-{link}").touch()
        job.on[0].wait_for(f"measured {link}", (rounds + 1) * ROUND_S)
        turns += _read(folder / f"turns-{link}.json")
        print(f"  {rate}: {rounds} rounds done", file=sys.stderr, flush=True)
    job.wait().check()
    check_losses([t for t in first if t.variant == FLAT] + turns, variants)
    return first, turns


def _read(path: Path) -> list[Turn]:
    return [Turn(**data) for data in json.loads(path.read_text())]


def times_faster(turns: Sequence[Turn], link: int, one: str, other: str) -> list[float]:
    """(time of `other` / time of `one`) of each round of a link; empty where one of them did not take part."""
    of: dict[str, dict[int, float]] = {
        name: {t.number: t.seconds for t in turns if t.link == link and t.variant == name} for name in (one, other)
    }
    return [of[other][number] / seconds for number, seconds in of[one].items() if number in of[other]]


def table(
    case: Case, variants: Sequence[Variant], rates: Sequence[str], first: Sequence[Turn], turns: Sequence[Turn]
) -> list[Row]:
    """A row for each rate and variant: medians over the rounds.

    cpu_ms: processor time of all ranks by the number of cores: on free links a step could not take less here.
    between_hosts_mb, rows_between_hosts: per step, all hosts together; MB = 10^6 bytes of all-to-alls in both directions, rows
    of the forward dispatch by those of the flat one. rows_to_experts: of the choices. exposed, transfer: see `Turn`.
    """
    errors = {t.variant: t.error for t in first}
    rows: list[Row] = []
    for link, rate in enumerate(rates):
        mine = {v.name: [t for t in turns if t.link == link and t.variant == v.name] for v in variants}
        flat_rows = statistics.median(t.rows_between for t in mine[FLAT])
        for name, own in mine.items():
            ratios = times_faster(turns, link, name, FLAT)
            rows.append(
                {
                    "link": rate,
                    "variant": name,
                    "step_ms": 1e3 * statistics.median(t.seconds for t in own),
                    "least_ms": 1e3 * min(t.seconds for t in own),
                    "cpu_ms": 1e3 * statistics.median(t.cpu_s for t in own) / len(os.sched_getaffinity(0)),
                    "times_faster": statistics.median(ratios),
                    "worst": min(ratios),
                    "best": max(ratios),
                    "between_hosts_mb": statistics.median(t.bytes_between for t in own) / 1e6,
                    "rows_between_hosts": statistics.median(t.rows_between for t in own) / flat_rows,
                    "rows_to_experts": statistics.median(t.rows_sent for t in own) / case.choices,
                    "exposed": statistics.median(t.exposed for t in own),
                    "transfer": statistics.median(t.transfer for t in own),
                    "loss": statistics.median(t.loss for t in own),
                    "error": errors.get(name),
                }
            )
    return rows


def figures(case: Case, rates: Sequence[str], turns: Sequence[Turn]) -> Mapping[str, float]:
    """Gains by rate, and what goals are stated for: the least gain over the rates.

    `overlap_gain` is that of the best of `OVERLAPPED` over no overlap, taken where the hierarchical step spends `COMPARABLE` of
    its time in transfer; without such a rate it is absent.
    """
    found: dict[str, float] = {"formula": case.formula}
    wanted = {
        "hierarchical_gain": (HIERARCHICAL, FLAT),
        "everything_gain": (EVERYTHING, FLAT),
        "everything_over_deepspeed": (EVERYTHING, DEEPSPEED),
        "everything_over_deepspeed_receiving_first": (EVERYTHING, DEEPSPEED_RECEIVING),
        "everything_over_deepspeed_dropping": (EVERYTHING, DEEPSPEED_DROPPING),
    }
    least: dict[str, list[float]] = {}
    for link, rate in enumerate(rates):
        for name, (one, other) in wanted.items():
            if ratios := times_faster(turns, link, one, other):
                found[f"{name}_{rate}"] = statistics.median(ratios)
                least.setdefault(name, []).append(found[f"{name}_{rate}"])
        gains = [statistics.median(r) for name in OVERLAPPED if (r := times_faster(turns, link, name, HIERARCHICAL))]
        shares = [t.transfer for t in turns if t.link == link and t.variant == HIERARCHICAL]
        if gains and shares:
            found[f"overlap_gain_{rate}"] = max(gains)
            found[f"transfer_share_{rate}"] = share = statistics.median(shares)
            if COMPARABLE[0] <= share <= COMPARABLE[1]:
                least.setdefault("overlap_gain", []).append(max(gains))
    return found | {name: min(gains) for name, gains in least.items()}
