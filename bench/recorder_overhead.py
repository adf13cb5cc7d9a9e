"""What the communication recorder costs: training steps with and without it, in turns, in one process group.

Each rank holds two engines of the quickstart's model, one with a recorder, and lets them take a step in turns, so that whatever
else the machine does meets both. `overhead` is the ratio of the medians over steps, less 1; `overhead_of_pairs` the median of the
ratios of neighbouring steps, in which drift cancels. On a busy machine both are as uncertain as their difference says. So the
recorder's own time is measured as well: `direct_share` is that of empty spans, as many as a step has, by the time of a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from moefold.launch.config import Loaded, check_world
from moefold.launch.local_ranks import run_local_ranks
from moefold.launch.settings import RunConfig
from moefold.parallel.engine import Engine, MicroBatch
from moefold.parallel.mesh import build_mesh, nodes_for
from moefold.parallel.recorder import CommRecorder

from .result import Result, Row

WARM_UP = 5
CPU = torch.device("cpu")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--ranks", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of each kind (default: %(default)s)")


def run(options: argparse.Namespace) -> Result:
    seconds, spans, span_s = run_local_ranks(on_rank, options.ranks, options.steps, timeout_s=600.0)[0]
    off_s, on_s = (statistics.median(s) for s in (seconds["off"], seconds["on"]))
    pairs = statistics.median(on / off for on, off in zip(seconds["on"], seconds["off"], strict=True))
    rows: list[Row] = [
        {"recorder": name, "median_step_ms": 1e3 * statistics.median(s), "quartile_ms": 1e3 * statistics.quantiles(s)[0]}
        for name, s in seconds.items()
    ]
    figures = {"overhead": on_s / off_s - 1, "overhead_of_pairs": pairs - 1, "spans_per_step": spans}
    figures |= {"span_us": 1e6 * span_s, "direct_share": spans * span_s / off_s}
    return Result(rows, figures)


def on_rank(rank: int, world: int, steps: int) -> tuple[dict[str, list[float]], float, float]:
    """(seconds of each step without and with recorder, spans per step, seconds per span) of this rank."""
    layout = {"parallel.dp": world, "parallel.hsdp": world, "parallel.ep": 2}
    config = RunConfig.load("quickstart", overrides=layout)
    nodes = nodes_for(config.model, config.parallel.ranks_per_node)
    mesh = build_mesh(check_world(Loaded(config, {}), world), CPU, nodes=nodes)
    recorder = CommRecorder(rank, CPU)
    engines = {"off": Engine(config.model, mesh), "on": Engine(config.model, mesh, recorder=recorder)}
    tokens = torch.randint(0, config.model.vocab_size, (config.train.global_batch // world, config.data.seq_len + 1))
    batch = [MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for index in range(WARM_UP + steps):
        # who is first in a pair changes, as the second one finds warmer caches
        for name in ("off", "on") if index % 2 else ("on", "off"):
            dist.barrier()
            start_s = time.perf_counter()
            engines[name].train_step(batch, 1e-3)
            if index >= WARM_UP:
                seconds[name].append(time.perf_counter() - start_s)
    spans = recorder.begun / (WARM_UP + steps)
    return seconds, spans, time_of_span(recorder)


def time_of_span(recorder: CommRecorder, count: int = 10_000) -> float:
    """Seconds that one span with nothing in it takes."""
    assert dist.group.WORLD is not None
    probe: Any = recorder.probe("world", dist.group.WORLD, "nothing")
    start_s = time.perf_counter()
    for _ in range(count):
        with probe.span("all_reduce", 4):
            pass
    return (time.perf_counter() - start_s) / count
