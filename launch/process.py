"""This process as one rank: joining the others, its device and threads, stop requests, and how it ends."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from ..moe.errors import CommError, ConfigError, MoefoldError, Problem
from .rundir import RunDir, state_of, write_json

PATIENCE = timedelta(days=1)
"""How long ranks wait for the one that prepares data or writes a report: work, not a collective that hangs."""
GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Socket closed",
    "failed to recv, got 0 bytes",
    "remote process exited",
    "NCCL communicator was aborted",
)
"""What the errors of a rank say when another rank has gone."""
NO_MEMORY = ("can't allocate memory", "not enough memory", "CUDA out of memory")


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
        """From a process group that exists already, else from the variables that torchrun sets; alone without both."""
        env = os.environ
        if dist.is_initialized():
            rank, world = dist.get_rank(), dist.get_world_size()
            return Rank(rank, world, int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", world)), True)
        if "RANK" not in env or "WORLD_SIZE" not in env:
            return Rank(0, 1, 0, 1, False)
        return Rank(
            int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1)), True
        )


def choose_device(wanted: str, here: Rank) -> torch.device:
    """The device of this rank. Raises ConfigError for cuda without a GPU for each rank of this machine, on all of them."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if here.local_world > count:
        what = f"is '{wanted}', but this machine has {count} GPUs for {here.local_world} ranks"
        raise ConfigError([Problem("train.device", f"{what}; start fewer ranks per node, or use 'cpu'")])
    return torch.device("cuda", here.local_rank)


@contextmanager
def joined(here: Rank, device: torch.device, *, timeout_s: float, threads: int | None = None) -> Iterator[dist.Store | None]:
    """The default process group of all ranks while the body runs; yields its store. Leaves a group that exists already alone,
    and then yields None.

    Raises CommError where the ranks do not find each other.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // here.local_world))
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if dist.is_initialized():
            yield None
            return
        store = _join(here, device, timedelta(seconds=timeout_s))
        try:
            yield store
        finally:
            dist.destroy_process_group()
    finally:
        torch.set_num_threads(threads_before)


def _join(here: Rank, device: torch.device, timeout: timedelta) -> dist.Store:
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        rank, world = (here.rank, here.world) if here.launched else (0, 1)
        store = _fresh_store(here, timeout) if here.launched else dist.HashStore()
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except dist.DistError as error:
        what = f"rank {here.rank} of {here.world} did not find the others"
        raise CommError(f"{what} (parallel.timeout_s = {timeout.total_seconds():g}): {_first_line(error)}") from error
    return store


def _fresh_store(here: Rank, timeout: timedelta) -> dist.Store:
    """The launcher's store, under a prefix that all ranks of this start agree on.

    torchrun gives a job that it restarts the store of the one that was killed, and with it the addresses of dead processes. The
    number of restarts is no prefix: nodes count only their own. So rank 0 draws a word, and every other rank asks for it with a
    word of its own until that comes back, which one from before cannot do.
    """
    store: dist.Store = next(dist.rendezvous("env://", here.rank, here.world, timeout=timeout))[0]
    word = secrets.token_hex(8)
    if here.rank == 0:
        store.set("moefold/start", word)
        for rank in range(1, here.world):
            store.set(f"moefold/{word}/yes/{rank}", store.get(f"moefold/{word}/ask/{rank}").decode())
        return dist.PrefixStore(word, store)
    end_s = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end_s:
        start = store.get("moefold/start").decode()
        store.set(f"moefold/{start}/ask/{here.rank}", word)
        answer = f"moefold/{start}/yes/{here.rank}"
        for _ in range(20):
            if store.check([answer]) and store.get(answer).decode() == word:
                return dist.PrefixStore(start, store)
            time.sleep(0.02)
    raise dist.DistStoreError(f"rank 0 has not answered for {timeout.total_seconds():g} s")


class Crew:
    """All ranks of a run: what one of them tells the others, and which of them are alive. Made by every rank together.

    store: of the default process group, if this program made it.
    """

    def __init__(self, store: dist.Store | None = None) -> None:
        self.store = store
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.members: list[tuple[str, int]] = [("", 0)] * self.world
        dist.all_gather_object(self.members, (socket.gethostname(), os.getpid()), group=self.group)

    def share(self, value: object) -> Any:
        """Rank 0's value on every rank."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def from_first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, on every rank; or its error, on every rank. Only rank 0 is to tell the user of it."""
        outcome: Any = None
        if self.rank == 0:
            try:
                outcome = (work(), None)
            except Exception as error:  # the others wait in `share`: they must hear of it
                failed = error if isinstance(error, MoefoldError) else None
                self.share((None, failed or PeerFailedError(f"rank 0: {type(error).__name__}: {error}")))
                raise
        value, problem = self.share(outcome)
        if problem is not None:
            problem.told = True
            raise problem
        return value

    def wait(self) -> None:
        """Until every rank is here."""
        dist.barrier(group=self.group)

    def dead(self) -> list[int]:
        """Ranks on this machine whose process does not exist any more."""
        host = socket.gethostname()
        return [r for r, (where, pid) in enumerate(self.members) if where == host and not _alive(pid)]


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"  # ended, but its parent has not asked how yet


class StopRequest:
    """Remembers that the job was asked to stop: by a scheduler (TERM, USR1, USR2) or a person (INT; the second ends at once)."""

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
            if handler is not None:  # else it was set by a library in C, and Python cannot give it back
                signal.signal(number, handler)  # type: ignore[arg-type]


class PeerFailedError(MoefoldError):
    """Another rank ended the run. `exit_code` is the one of its error."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Failure:
    """The first cause of the end of a run. recorded_here: whether this rank is the one that recorded it, and is to tell it."""

    exit_code: int
    message: str
    recorded_here: bool


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_secondary(error: BaseException) -> bool:
    """Whether an error only says that another rank has gone."""
    if isinstance(error, PeerFailedError):
        return True
    return any(isinstance(e, (RuntimeError, OSError)) and any(text in str(e) for text in GONE) for e in _chain(error))


def as_named(error: BaseException) -> BaseException:
    """Time-outs of collectives as CommError, which has their exit code."""
    late = ("timed out", "timeout")
    if isinstance(error, RuntimeError) and not is_secondary(error) and any(t in str(error).lower() for t in late):
        return CommError(
            f"a collective did not complete within parallel.timeout_s: {_first_line(error)}; a rank hangs or is too slow: "
            "see the logs of all ranks, or raise parallel.timeout_s"
        )
    return error


def exit_code_of(error: BaseException) -> int:
    """Process exit code that goes with an error."""
    if isinstance(error, MoefoldError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return 6
    return 6 if isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY) else 1


def record_failure(run: RunDir, crew: Crew, error: BaseException, wait_s: float = 3.0) -> Failure:
    """Write down why this rank ends, and have the first cause among all ranks in status.json.

    Every failing rank calls it. One that only lost its peers gives them `wait_s` to say why they went.
    """
    folder = run.logs()
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "rank": crew.rank,
        "host": socket.gethostname(),
        "time_s": time.time(),
        "secondary": is_secondary(error),
        "exit_code": exit_code_of(error),
        "message": f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error)),
    }
    write_json(folder / f"error-rank-{crew.rank:05d}.json", report)
    claim = folder / "first-error"
    end_s = time.monotonic() + wait_s
    while report["secondary"] and not claim.exists() and time.monotonic() < end_s and not _silent(crew, folder):
        time.sleep(0.05)
    cause = _first_cause(crew, folder)
    try:
        # the exclusive creation of one file decides which rank records and tells
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return Failure(cause["exit_code"], cause["message"], False)
    run.finish_attempt(state_of(cause["exit_code"]), exit_code=cause["exit_code"], error=cause["message"])
    return Failure(cause["exit_code"], cause["message"], True)


def _reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in folder.glob("error-rank-*.json")]


def _silent(crew: Crew, folder: Path) -> list[int]:
    """Ranks that died without a report."""
    reported = {r["rank"] for r in _reports(folder)}
    return [r for r in crew.dead() if r not in reported]


def _first_cause(crew: Crew, folder: Path) -> dict[str, Any]:
    """exit_code and message of the earliest error that is not just about a peer that has gone; else of the rank that was killed;
    else of the earliest of any kind."""
    first = min(_reports(folder), key=lambda r: (r["secondary"], r["time_s"]))
    killed = _silent(crew, folder) if first["secondary"] else []
    if not killed:
        return {"exit_code": first["exit_code"], "message": f"rank {first['rank']} on {first['host']}: {first['message']}"}
    host, pid = crew.members[killed[0]]
    what = "ended without a word: it was killed (by the system if memory ran out, see dmesg) or crashed outside Python"
    return {"exit_code": 1, "message": f"rank {killed[0]} on {host}: process {pid} {what}"}
