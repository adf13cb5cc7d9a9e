"""Small pretraining jobs for tests of the launcher: text, settings, ranks in forked processes, and torchrun."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

from helpers import run_ranks
from moefold.launch import config as configuration
from moefold.launch.metrics import read_metrics
from moefold.launch.rundir import RunDir
from moefold.launch.settings import RunConfig
from moefold.moe.errors import MoefoldError
from moefold.parallel.engine import Engine

WORDS = ("the", "a", "model", "token", "expert", "router", "learns", "sends", "to", "of", "far", "near", "loss", "falls", "rises")
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
    preload()
    return run_ranks(_pretrain_rank, world, config, before, timeout_s=timeout_s)


def preload() -> None:
    """Import here, once, what every forked rank would otherwise import for itself."""
    for module in ("torch._dynamo", "torch.distributed.fsdp", "moefold.launch.pretrain"):
        import_module(module)


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


class ForkedCommand:
    """`moefold ARGS` on ranks as torchrun starts them, but forked from here: takes less time, and each has an exit code.

    before: called with the rank in each process first, to patch what the case is about.
    """

    def __init__(self, world: int, args: Sequence[object], cwd: Path, before: Callable[[int], None] | None = None):
        preload()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.start_s = time.monotonic()
        self.logs = Path(tempfile.mkdtemp(prefix="command-", dir=cwd))
        context = multiprocessing.get_context("fork")
        words = [str(a) for a in args]
        self.ranks = [
            context.Process(target=_command_rank, args=(r, world, port, words, cwd, self.logs, before), daemon=True)
            for r in range(world)
        ]
        for process in self.ranks:
            process.start()

    def wait(self, timeout_s: float = 60.0) -> list[Ended]:
        """How every rank ended; -9 for one that was killed. Fails where a rank does not end in time."""
        end_s = self.start_s + timeout_s
        try:
            for rank, process in enumerate(self.ranks):
                process.join(max(0.0, end_s - time.monotonic()))
                assert process.exitcode is not None, f"rank {rank} has not ended after {timeout_s:g} s:\n{self.text('err')}"
        finally:
            for process in self.ranks:
                process.kill()
        seconds = time.monotonic() - self.start_s
        return [
            Ended(p.exitcode or 0, (self.logs / f"{r}.out").read_text(), (self.logs / f"{r}.err").read_text(), seconds)
            for r, p in enumerate(self.ranks)
        ]

    def text(self, kind: str) -> str:
        return "\n".join(p.read_text() for p in sorted(self.logs.glob(f"*.{kind}")))


def command_ranks(
    world: int, args: Sequence[object], cwd: Path, before: Callable[[int], None] | None = None, timeout_s: float = 60.0
) -> list[Ended]:
    """Run `ForkedCommand` to its end."""
    return ForkedCommand(world, args, cwd, before).wait(timeout_s)


def _command_rank(
    rank: int, world: int, port: int, words: list[str], cwd: Path, logs: Path, before: Callable[[int], None] | None
) -> None:
    import torch

    from moefold.launch.cli import main

    for stream, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(logs / f"{rank}.{kind}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    # the streams that the test runner has put in place write elsewhere
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - for the rest of the process
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if world > 1:
        places = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        os.environ |= {key: str(value) for key, value in places.items()}
    if before is not None:
        before(rank)
    try:
        code = main(words)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    # at once, as at the end of a program: what torch leaves behind is not for the test runner's exit handlers
    os._exit(code)


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
    start_s = time.monotonic()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=cwd, env=environment(), **pipes) as process:  # type: ignore[call-overload]
        try:
            out, err = process.communicate(timeout=timeout_s)
        finally:
            end_tree(process)
    return Ended(process.returncode, out, err, time.monotonic() - start_s)


def end_tree(process: subprocess.Popen[str]) -> None:
    """Kill a process, if it is alive, and what it has started: torchrun's workers would outlive it."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()


def alone(work: Callable[[], None], timeout_s: float = 60.0) -> None:
    """Run `work` in a forked process; fails if it does.

    For what makes a process group: one made here, and its threads, would be part of every process that is forked later.
    """
    preload()
    process = multiprocessing.get_context("fork").Process(target=_alone, args=(work,), daemon=True)
    process.start()
    process.join(timeout_s)
    process.kill()
    process.join()
    assert process.exitcode == 0, f"exit code {process.exitcode}; its traceback is above"


def _alone(work: Callable[[], None]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def at_step(step: int, act: Callable[[], None], ranks: tuple[int, ...]) -> Callable[[int], None]:
    """A patch for `before`: the ranks act in place of training step `step` (from 0)."""

    def before(rank: int) -> None:
        real = Engine.train_step

        def train_step(self: Engine, *args, **kwargs):  # type: ignore[no-untyped-def]
            if self.step == step and rank in ranks:
                act()
            return real(self, *args, **kwargs)

        Engine.train_step = train_step  # type: ignore[method-assign]

    return before


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
