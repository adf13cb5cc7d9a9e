"""Small pretraining jobs for tests of the launcher: text, settings, ranks in forked processes, and torchrun."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import run_ranks
from moefold.launch import config as configuration
from moefold.launch.metrics import read_metrics
from moefold.launch.rundir import RunDir
from moefold.launch.settings import RunConfig
from moefold.moe.errors import MoefoldError

WORDS = "the a model token expert router learns sends to of and far near many few loss falls rises when then".split()
TINY: dict[str, object] = {
    "model.dim": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.vocab_size": 264,
    "model.max_seq_len": 32,
    "model.moe.num_experts": 4,
    "model.moe.top_k": 2,
    "model.moe.expert_dim": 16,
    "data.seq_len": 32,
    "train.global_batch": 8,
    "train.steps": 8,
    "train.lr": 1e-2,
    "train.warmup_steps": 2,
    "train.eval_batches": 2,
    "train.sample_tokens": 0,
    "train.threads": 1,
    "log.every": 1,
    "log.tensorboard": False,
    "log.report": False,
    "parallel.timeout_s": 60.0,
}


def write_corpus(path: Path, size: int = 100_000) -> Path:
    """About `size` bytes of sentences that a model can learn something about; the same at every call."""
    draw = random.Random(7)
    lines: list[str] = []
    while sum(map(len, lines)) < size:
        lines.append(" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) + ".\n")
    path.write_text("".join(lines))
    return path


def settings(folder: Path, run: str = "run", **changes: object) -> dict[str, object]:
    """Dotted settings of a tiny run in `folder`/`run`; `changes` are written with `__` for the dots."""
    text = folder / "text.txt"
    if not text.exists():
        write_corpus(text)
    source = {"type": "text", "path": str(text), "name": "text"}
    base = {**TINY, "data.sources": [source], "run.dir": str(folder / run)}
    return base | {name.replace("__", "."): value for name, value in changes.items()}


def make_config(folder: Path, run: str = "run", **changes: object) -> RunConfig:
    """The configuration of `settings`."""
    return configuration.load(overrides=settings(folder, run, **changes)).config


def toml_file(folder: Path, run: str = "run", **changes: object) -> Path:
    """The same as a file."""
    path = folder / f"{run}.toml"
    path.write_text(configuration.dump(make_config(folder, run, **changes)))
    return path


def pretrain_ranks(world: int, config: RunConfig, before: Any = None, timeout_s: float = 60.0) -> list[int | str]:
    """`pretrain(config)` on forked ranks: each one's exit code, or the text of its named error.

    before: called with the rank in each process first, to patch what the case is about.
    """
    return run_ranks(_pretrain_rank, world, config, before, timeout_s=timeout_s)


def _pretrain_rank(rank: int, world: int, config: RunConfig, before: Any) -> int | str:
    from moefold.launch.pretrain import pretrain

    if before is not None:
        before(rank)
    try:
        return pretrain(config).exit_code
    except MoefoldError as error:
        return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float


def torchrun_command(world: int, *args: str, script: Path | None = None) -> list[str]:
    """The command line of torchrun with a rendezvous of its own."""
    target = [str(script)] if script is not None else ["-m", "moefold.launch.pretrain"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return [*launcher, *target, *map(str, args)]


def environment() -> dict[str, str]:
    """Of a child: one thread per process, and no sign of a job that this test may run in."""
    ours = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    return {**ours, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def run_command(command: Sequence[str], cwd: Path, timeout_s: float = 60.0) -> Ended:
    """Run a command to its end."""
    import time

    start_s = time.monotonic()
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout_s)
    return Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - start_s)


def losses(folder: Path) -> dict[int, float]:
    """Step -> training loss of a run directory."""
    steps, values = read_metrics(folder / "metrics.jsonl").column("train/loss")
    return {int(s): v for s, v in zip(steps, values, strict=True)}


def last_attempt(folder: Path) -> dict[str, Any]:
    """The newest attempt in status.json."""
    return RunDir.open(folder).status()["attempts"][-1]


def complete_steps(folder: Path) -> list[int]:
    """Steps whose checkpoints look complete."""
    return [int(p.name.removeprefix("step-")) for p in RunDir.open(folder).completed_checkpoints()]


def meta_of(checkpoint: Path) -> dict[str, Any]:
    """complete.json of a checkpoint."""
    return json.loads((checkpoint / "complete.json").read_text())
