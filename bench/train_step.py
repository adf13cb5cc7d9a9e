"""Where a training step of the quickstart spends its time: model, communication, optimizer, data, logging.

Four ranks on this machine, joined by gloo, run the quickstart's configuration and the product's own training loop. The training
loop's clock gives data, optimizer and logging of rank 0; the rest of a step is the model and its communication. How much of
that is communication is measured in a second, profiled stretch: the time in which a collective is under way on rank 0 and no
operator computes. It is a share of the time there, because the profiler makes everything slower. With fewer cores than ranks,
communication is mostly waiting for ranks that have no core.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from moefold.launch.checkpoint import Checkpointer
from moefold.launch.config import Loaded, check_world
from moefold.launch.data.loader import Prefetcher, open_data
from moefold.launch.local_ranks import run_local_ranks
from moefold.launch.metrics import Sinks
from moefold.launch.pretrain import build_engine
from moefold.launch.process import Crew, StopRequest
from moefold.launch.settings import RunConfig
from moefold.launch.train import Times, Trainer
from moefold.parallel.mesh import build_mesh, nodes_for

from .result import Result, Row

WORLD = 4
WARM_UP = 5
STEP = "bench: step"
Intervals = list[tuple[float, float]]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--config", default="quickstart", help="file or name of a configuration (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="steps of the timed stretch (default: %(default)s)")
    parser.add_argument("--profiled-steps", type=int, default=15, help="of the profiled stretch (default: %(default)s)")


def run(options: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory(prefix="moefold-bench-") as folder:
        steps, profiled = options.steps, options.profiled_steps
        measured = run_local_ranks(on_rank, WORLD, options.config, folder, steps, profiled, timeout_s=600.0)[0]
    times: dict[str, float] = measured["seconds"]
    whole_s = sum(times.values())
    rows: list[Row] = [{"part": part, "ms_per_step": 1e3 * s / steps, "share": s / whole_s} for part, s in times.items()]
    other = sum(times[part] for part in ("optimizer", "data", "logging")) / whole_s
    figures = {"other_share": other, "communication_share": times["communication"] / whole_s}
    figures |= {"tokens_per_s": measured["tokens"] / whole_s, "collectives_per_step": measured["collectives"] / profiled}
    return Result(rows, figures)


def on_rank(rank: int, world: int, config_name: str, folder: str, steps: int, profiled: int) -> dict[str, Any]:
    """Train; seconds of the timed stretch by part, tokens trained on in it, and collectives of the profiled one."""
    overrides: dict[str, object] = {"train.steps": WARM_UP + steps + profiled, "train.device": "cpu", "train.warmup_steps": 0}
    config = RunConfig.load(config_name, overrides=overrides)
    torch.set_num_threads(config.train.threads or max(1, len(os.sched_getaffinity(0)) // world))
    trainer = build_trainer(config, rank, world, Path(folder))
    total = trainer.config.train.total_steps(config.data.seq_len)
    try:
        with Prefetcher(trainer.load, 0, total) as batches:
            train(trainer, batches, WARM_UP, total)
            tokens = trainer.tokens
            spent = train(trainer, batches, steps, total)
            tokens = trainer.tokens - tokens
            # on all ranks, or the one that is profiled would be the slowest and never wait
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                train(trainer, batches, profiled, total)
    finally:
        trainer.sinks.close()
    share, collectives = communication(profiler) if rank == 0 else (0.0, 0)
    inside_s = spent.step - spent.data - spent.optimizer
    seconds = {"model": inside_s - share * spent.step, "communication": share * spent.step}
    seconds |= {"optimizer": spent.optimizer, "data": spent.data, "logging": spent.log}
    return {"seconds": seconds, "tokens": tokens, "collectives": collectives}


def build_trainer(config: RunConfig, rank: int, world: int, folder: Path) -> Trainer:
    """The training loop of a run, without its run directory: nothing is saved or evaluated."""
    crew = Crew()
    data = open_data(
        config.data,
        vocab_size=config.model.vocab_size,
        global_batch=config.train.global_batch,
        cache_dir=folder / "data",
        eval_batches=0,
        is_writer=rank == 0,
        share=crew.share,
    )
    nodes = nodes_for(config.model, config.parallel.ranks_per_node)
    mesh = build_mesh(check_world(Loaded(config, {}), world), torch.device("cpu"), nodes=nodes)
    engine = build_engine(config, mesh, len(data.domains))
    checkpointer = Checkpointer(folder / "checkpoints", keep=1, background=False)
    total = config.train.total_steps(config.data.seq_len)
    sinks = Sinks(folder / "metrics.jsonl", total_steps=total, rank=rank, console=False)
    return Trainer(config, engine, data, checkpointer, sinks, StopRequest(), {})


def train(trainer: Trainer, batches: Any, steps: int, total: int) -> Times:
    """Steps as the training loop does them, with their metric records; what they took."""
    spent = Times()
    trainer.times = Times()
    for index in range(1, steps + 1):
        with record_function(STEP):
            result = trainer.train_step(batches, total)
        if index % trainer.config.log.every == 0 or index == steps:
            # `log` starts a new record, which begins with the time that it took itself
            before = trainer.times
            trainer.log(result)
            for name in ("step", "data", "optimizer"):
                setattr(spent, name, getattr(spent, name) + getattr(before, name))
            spent.log += trainer.times.log
            trainer.times.log = 0.0
    return spent


def communication(profiler: profile) -> tuple[float, int]:
    """Share of the steps' time in which a gloo collective is under way and no operator computes; number of collectives.

    Raises RuntimeError where the profile holds no step or no collective: then the share would be 0 without meaning it.
    """
    events = profiler.events() or []
    spans = [(str(e.name), float(e.time_range.start), float(e.time_range.end)) for e in events]
    steps = union([(start, end) for name, start, end in spans if name == STEP])
    moving = [(start, end) for name, start, end in spans if name.startswith("gloo:")]
    computing = union([(start, end) for name, start, end in spans if name.startswith("aten::")])
    if not steps or not moving:
        names = ", ".join(sorted({name for name, _, _ in spans})[:40])
        raise RuntimeError(f"the profile has {len(steps)} steps and {len(moving)} gloo collectives; it has events of: {names}")
    inside = overlap(union(moving), steps)
    exposed = length(inside) - length(overlap(inside, computing))
    return exposed / length(steps), len(moving)


def union(intervals: Intervals) -> Intervals:
    """Disjoint intervals in order that cover the same time."""
    merged: Intervals = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def overlap(a: Intervals, b: Intervals) -> Intervals:
    """The time that is in both; each is disjoint and in order."""
    shared, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            shared.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return shared


def length(intervals: Intervals) -> float:
    return sum(end - start for start, end in intervals)
