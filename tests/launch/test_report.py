"""The report: one offline file, complete or explained, from good, broken and hostile run directories."""

from __future__ import annotations

import base64
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from moefold.launch import plots
from moefold.launch.metrics import MetricsWriter
from moefold.launch.report import SECTIONS, report
from moefold.launch.report_experts import dead_experts, separation, snapshots
from moefold.launch.report_parts import load_runs, number
from moefold.launch.report_sections import breakdown, verdict
from moefold.moe.errors import RunDirError

CONFIG = """
[model]
dim = 128
num_layers = 5
num_heads = 4
vocab_size = 257
max_seq_len = 256
dense_prefix_layers = 1
dense_ffn_dim = 256
[model.moe]
num_experts = 16
top_k = 2
expert_dim = 64
[train]
steps = 1000
lr = {lr}
"""
LAYERS, EXPERTS = 4, 16


def step_values(rng: random.Random, step: int, dead: bool = False) -> dict[str, Any]:
    """Values such as a real run logs: a falling loss, experts that even out, steps with a slow tail."""
    spread = 0.15 + 0.9 * math.exp(-step / 150)
    load = [[max(0.0, 1 + rng.gauss(0, spread) * (1 + 0.2 * layer)) for _ in range(EXPERTS)] for layer in range(LAYERS)]
    if dead:
        load[2][5] = load[2][11] = 0.0
    tilt = [[rng.gauss(0, 0.15 + 0.12 * layer) for _ in range(EXPERTS)] for layer in range(LAYERS)]
    step_s = 0.21 + abs(rng.gauss(0, 0.01)) + (rng.random() < 0.04) * 0.15
    return {
        "train/loss": 1.6 + 4 * math.exp(-step / 180) + rng.gauss(0, 0.05),
        "train/aux_loss": 1 + spread / 10,
        "train/grad_norm": 0.6 + 3 * math.exp(-step / 60) + abs(rng.gauss(0, 0.15)) + (rng.random() < 0.02) * 3,
        "train/lr": 1e-3 * min(1, step / 100) * (0.55 + 0.45 * math.cos(math.pi * step / 1000)),
        "train/tokens": step * 8192,
        "perf/step_s": step_s,
        "perf/tokens_per_s": 8192 / step_s,
        "perf/tokens_per_s_gpu": 2048 / step_s,
        "perf/data_wait_s": 0.004,
        "perf/comm_s": 0.03 + abs(rng.gauss(0, 0.006)),
        "perf/optimizer_s": 0.017,
        "perf/checkpoint_s": 0.03 if step % 100 == 0 else 0.0,
        "perf/log_s": 0.0004,
        "mem/peak_gib": 1.84,
        "moe/load_cv": spread,
        "moe/load_max": max(map(max, load)) if step < 500 else 1.12,
        "moe/max_violation": 2 * spread,
        "moe/max_violation_micro": 2 * spread + 0.5,
        "moe/dead_frac": 2 / 64 if dead else 0.0,
        "moe/drop_frac": 0.0,
        "moe/load_LE": load,
        "moe/domain_load": {
            "code": [[max(0.0, a + b) for a, b in zip(r, t, strict=True)] for r, t in zip(load, tilt, strict=True)],
            "prose": [[max(0.0, a - 2 * b) for a, b in zip(r, t, strict=True)] for r, t in zip(load, tilt, strict=True)],
        },
    }


def make_run(path: Path, *, seed: int = 0, lr: float = 1e-3, dead: bool = False, steps: int = 1000) -> Path:
    """A run directory of two attempts: the first is killed at 46 % with a checkpoint at 40 %, the second completes."""
    rng = random.Random(seed)
    path.mkdir(parents=True)
    path.joinpath("config.toml").write_text(CONFIG.format(lr=lr))
    origin = {"git": {"commit": "0123abc", "dirty": False}, "torch": "2.13.0", "argv": ["moefold", "pretrain", "a.toml"]}
    path.joinpath("origin.json").write_text(json.dumps(origin))
    kill, resume = int(steps * 0.46), int(steps * 0.4)
    for attempt, (first, last) in enumerate([(0, kill), (resume, steps)]):
        writer = MetricsWriter(path / "metrics.jsonl", attempt=attempt, start_step=first)
        for step in range(first + 10, last + 1, 10):
            writer.write("step", step, step_values(rng, step, dead))
            if step % 100 == 0:
                bits = 1.9 + 3 * math.exp(-step / 250)
                domain = {"eval/bits_per_byte/code": bits - 0.1, "eval/bits_per_byte/prose": bits + 0.3}
                base = {"eval/bigram_bits_per_byte": 3.41}
                writer.write("eval", step, {"eval/loss": bits * math.log(2), "eval/bits_per_byte": bits, **domain, **base})
        writer.close()
    attempts = [
        {"start": 1.7e9, "end": 1.7e9 + 100, "exit_code": 1, "world_size": 4, "error": "rank 3: killed by signal 9\ntraceback"},
        {"start": 1.7e9 + 200, "end": 1.7e9 + 4000, "exit_code": 0, "world_size": 4, "error": None},
    ]
    path.joinpath("status.json").write_text(json.dumps({"state": "completed", "attempts": attempts}))
    path.joinpath("sample.txt").write_text("def forward(self, x):\n    return x < 3 & y\n")
    return path
