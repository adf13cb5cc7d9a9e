"""This process as one rank: joining the others, its device and threads, stop requests, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from ..moe.errors import CommError, ConfigError, MoefoldError, Problem
from .rundir import RunDir, state_of, write_json


@dataclass(frozen=True)
class Rank:
    """Where this process stands. launched: by torchrun, else alone."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    launched: bool

    @staticmethod
    def here() -> Rank:
        """From the variables that torchrun sets; alone without them."""
        env = os.environ
        if "RANK" not in env or "WORLD_SIZE" not in env:
            return Rank(0, 1, 0, 1, False)
        return Rank(
            int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1)), True
        )


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this rank. Raises ConfigError for cuda without enough GPUs."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        what = f"is '{wanted}', but this machine has {torch.cuda.device_count()} GPUs and this is local rank {local_rank}"
        raise ConfigError([Problem("train.device", f"{what}; start fewer ranks per node, or use 'cpu'")])
    return torch.device("cuda", local_rank)


@contextmanager
def joined(here: Rank, device: torch.device, *, timeout_s: float, threads: int | None = None) -> Iterator[None]:
    """The default process group of all ranks while the body runs. Leaves a group that exists already alone."""
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // here.local_world))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_s)
    if here.launched:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


class StopRequest:
    """Remembers that somebody asked the job to stop: a scheduler (TERM, USR1, USR2) or a person (INT; a second one ends at once)."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    @property
    def exit_code(self) -> int:
        return 130 if self.signal == signal.SIGINT else 75

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __enter__(self) -> StopRequest:
        try:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        except ValueError:
            # not the main thread (a notebook cell run in a thread): the host program keeps its handlers
            self._previous.clear()
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


# --- how a rank ends --------------------------------------------------------------------------------------------------------------


def is_secondary(error: BaseException) -> bool:
    """Whether an error only says that another rank has gone."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(s in text for s in ("Connection closed by peer", "Connection reset by peer"))


def as_named(error: BaseException) -> BaseException:
    """Time-outs of collectives as CommError, which has their exit code."""
    text = str(error)
    if isinstance(error, (RuntimeError, dist.DistBackendError)) and ("Timed out" in text or "timed out" in text):
        return CommError(f"a collective did not complete in time (parallel.timeout_s): {text.splitlines()[0]}")
    return error


def exit_code_of(error: BaseException) -> int:
    """Process exit code that goes with an error."""
    if isinstance(error, MoefoldError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return 6
    return 1


def record_failure(run: RunDir, here: Rank, error: BaseException, wait_s: float = 3.0) -> tuple[int, str]:
    """Write down why this rank ends, find the first cause among all ranks, and have it in status.json.

    Returns the exit code and message of the first cause. Every failing rank calls it; the lowest that is alive records.
    """
    folder = run.logs()
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "rank": here.rank,
        "host": socket.gethostname(),
        "time_s": time.time(),
        "secondary": is_secondary(error),
        "exit_code": exit_code_of(error),
        "message": f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error)),
    }
    write_json(folder / f"error-rank-{here.rank:05d}.json", report)
    # rank 0 gives the others a moment to write theirs; the others give rank 0 a moment to record, then do it themselves
    end_s = time.monotonic() + (wait_s if here.rank else wait_s / 2)
    while time.monotonic() < end_s:
        if here.rank and _recorded(run):
            break
        if not here.rank and (not report["secondary"] or _first_cause(folder)["rank"] != here.rank):
            break
        time.sleep(0.1)
    cause = _first_cause(folder)
    message = f"rank {cause['rank']} on {cause['host']}: {cause['message']}"
    if not _recorded(run):
        run.finish_attempt(state_of(cause["exit_code"]), exit_code=cause["exit_code"], error=message)
    return cause["exit_code"], message


def _recorded(run: RunDir) -> bool:
    attempts = run.status()["attempts"]
    return bool(attempts) and attempts[-1]["exit_code"] is not None


def _first_cause(folder: Path) -> dict:
    """The earliest error that is not just about a peer that has gone; the earliest of any kind failing that."""
    reports = [json.loads(p.read_text()) for p in folder.glob("error-rank-*.json")]
    return min(reports, key=lambda r: (r["secondary"], r["time_s"]))
