"""Several ranks inside one test: forked gloo processes, a pool of them that stays alive, or threads of this process.

Everywhere a case is `fn(rank, world_size, *args)`; `torch.distributed` is initialised on all ranks when it starts and
its return values come back as a list in the order of ranks. A rank that fails raises `RankError` in the test.

Which one: `run_threads` for wide tables (milliseconds; no send/recv, one shared random state); `GlooPool` (fixture `gloo_pool`)
for real processes at tens of milliseconds a case; `run_ranks` where a case needs fresh processes or a function that
is not at module level. `in_child` forks without `torch.distributed`, for work that is to die.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SEED = 1234
_PR_SET_PDEATHSIG = 1


class RankError(RuntimeError):
    """A rank failed, died or did not answer. `rank` is the first one that did; its exception is `__cause__` where it has one."""

    def __init__(self, rank: int, message: str):
        super().__init__(message)
        self.rank = rank


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Run `fn(rank, world_size, *args)` on freshly forked processes, one torch thread each, joined by gloo.

    Forked, so `fn` and `args` may be anything, and what the test has patched holds in the ranks too. Return values are pickled.

    Raises:
        RankError: with the first failing rank's traceback; the other ranks are killed.
    """
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    ranks: list[_Rank] = []
    try:
        for rank in range(world_size):
            ranks.append(_fork(rank, folder, lambda r, conn: _serve_once(r, conn, fn, args, world_size, folder, timeout_s)))
        return _collect(ranks, timeout_s)
    finally:
        _kill(ranks)
        shutil.rmtree(folder, ignore_errors=True)


class GlooPool:
    """Worker processes that are forked once and form a new gloo world for every case.

    Workers know the modules that were imported before they were forked, which under pytest are all test modules. Each case
    gets a new default process group of exactly `world_size` ranks, a fixed seed, and the default dtype and determinism
    settings of the test. A case that fails costs its workers; the next one forks new ones.
    """

    def __init__(self, size: int):
        self.size = size
        self._folder = Path(tempfile.mkdtemp(prefix="pool-"))
        self._ranks: list[_Rank] = []
        self._cases = 0

    def run(self, fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
        """Run `fn(rank, world_size, *args)` on `world_size` of the workers; `fn` must be at the top level of a module.

        Raises:
            RankError: with the first failing rank's traceback.
            ValueError: more ranks than the pool has.
            TypeError: `fn` or its arguments cannot be pickled.
        """
        if world_size > self.size:
            raise ValueError(f"this pool has {self.size} workers, the case wants {world_size}")
        self._cases += 1
        store = self._folder / f"store-{self._cases}"
        try:
            job = pickle.dumps((fn, args, world_size, store, _settings(), timeout_s))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(f"a pool gets its work by pickle, so use functions at module level: {error}") from error
        _preload()
        while len(self._ranks) < world_size:
            self._ranks.append(_fork(len(self._ranks), self._folder, _serve_many))
        busy = self._ranks[:world_size]
        done = False
        try:
            for worker in busy:
                worker.conn.send_bytes(job)
            results = _collect(busy, timeout_s)
            done = True
            return results
        finally:
            if not done:  # an unknown state: ranks may hang in a collective, and answers of this case must not meet the next
                _kill(self._ranks)
                self._ranks = []
            with suppress(FileNotFoundError):
                store.unlink()

    def close(self) -> None:
        _kill(self._ranks)
        self._ranks = []
        shutil.rmtree(self._folder, ignore_errors=True)


def run_threads(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Run `fn(rank, world_size, *args)` on threads of this process, joined by torch's threaded process group.

    The fastest way, for what needs neither send/recv nor a random state of its own: draw from explicit generators.

    Raises:
        RankError: with the first failing rank's traceback, or when a rank does not end in time.
    """
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    results: list[Any] = [None] * world_size
    failures: list[tuple[int, BaseException]] = []
    store = dist.HashStore()

    def rank_main(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
            results[rank] = fn(rank, world_size, *args)
        except BaseException as error:
            failures.append((rank, error))
            threaded.ProcessLocalGroup.exception_handle(error)  # wakes ranks that wait for this one
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    try:
        threads = [threading.Thread(target=rank_main, args=(r,), daemon=True) for r in range(world_size)]
        for thread in threads:
            thread.start()
        end_s = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, end_s - time.monotonic()))
        late = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
        if late and not failures:
            threaded.ProcessLocalGroup.exception_handle(TimeoutError())
            raise RankError(late[0], f"ranks {late} of {world_size} have not ended after {timeout_s:g} s")
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    if failures:
        rank, error = failures[0]
        text = "".join(traceback.format_exception(error))
        raise RankError(rank, f"rank {rank} of {world_size} failed:\n{text}") from error
    return results


@dataclass
class _Rank:
    """One worker process, seen from the test."""

    rank: int
    process: BaseProcess
    conn: Connection
    stacks: Path


@dataclass
class _Failure:
    rank: int
    text: str
    error: BaseException | None = None
    died: bool = False


def in_child(work: Callable[[], object]) -> int:
    """Exit status of a forked process that does `work`; negative: the signal that ended it."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _preload() -> None:
    """Import here, once, what each worker would otherwise import for itself at its first sharded case."""
    for module in (
        "torch._dynamo",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
    ):
        import_module(module)


def _fork(rank: int, folder: Path, serve: Callable[[int, Connection], None]) -> _Rank:
    """Start a process that runs `serve(rank, conn)`; the fork shares everything that is imported by now."""
    ours, theirs = multiprocessing.Pipe()
    stacks = folder / f"stacks-{rank}"
    process = multiprocessing.get_context("fork").Process(target=_child, args=(rank, theirs, stacks, serve), daemon=True)
    process.start()
    theirs.close()  # only the child holds its end now, so its death reads as end of file here
    return _Rank(rank, process, ours, stacks)


def _child(rank: int, conn: Connection, stacks: Path, serve: Callable[[int, Connection], None]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # never outlive a killed test run
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the test's process decides on Ctrl-C
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # do not depend on the machine's name resolving
    torch.set_num_threads(1)
    with stacks.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file)  # the parent asks with it where a rank hangs
        serve(rank, conn)


def _serve_once(
    rank: int, conn: Connection, fn: Callable[..., Any], args: tuple[Any, ...], world_size: int, folder: Path, timeout_s: float
) -> None:
    _answer(conn, rank, lambda: _case(fn, args, rank, world_size, folder / "store", timeout_s))


def _serve_many(rank: int, conn: Connection) -> None:
    while True:
        try:
            job = conn.recv_bytes()
        except EOFError:
            return
        _answer(conn, rank, lambda job=job: _unpacked(job, rank))  # type: ignore[misc]


def _unpacked(job: bytes, rank: int) -> Any:
    fn, args, world_size, store, settings, timeout_s = pickle.loads(job)
    _apply(settings)
    return _case(fn, args, rank, world_size, store, timeout_s)


def _case(fn: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, store: Path, timeout_s: float) -> Any:
    random.seed(SEED)
    torch.manual_seed(SEED)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s + 30),  # the test's process notices first, and says where each rank stands
    )
    result = fn(rank, world_size, *args)
    if dist.is_initialized():
        dist.barrier()  # nobody takes his connections away from a rank that still needs them
        dist.destroy_process_group()
    return result


def _answer(conn: Connection, rank: int, work: Callable[[], Any]) -> None:
    """Send the result, or the failure. A failing rank keeps its process group, so that the others do not fail because of it."""
    try:
        conn.send_bytes(pickle.dumps((True, work())))
    except BaseException as error:
        text = traceback.format_exc()
        try:
            message = pickle.dumps((False, _Failure(rank, text, error)))
            pickle.loads(message)  # some exceptions pickle, but cannot be rebuilt
        except Exception:
            message = pickle.dumps((False, _Failure(rank, text)))
        conn.send_bytes(message)
        time.sleep(3600)  # until the parent has seen it and ends this process


def _collect(ranks: list[_Rank], timeout_s: float) -> list[Any]:
    """Answers of all ranks in order; raises `RankError` at the first that fails."""
    results: dict[int, Any] = {}
    failures: list[_Failure] = []
    waiting = {worker.conn: worker for worker in ranks}
    end_s = time.monotonic() + timeout_s
    while waiting:
        ready = wait(list(waiting), max(0.0, end_s - time.monotonic()))
        if not ready and failures:
            break
        if not ready:
            late = sorted(worker.rank for worker in waiting.values())
            stacks = "\n".join(f"rank {worker.rank}:\n{_stacks(worker)}" for worker in waiting.values())
            raise RankError(late[0], f"ranks {late} of {len(ranks)} have not ended after {timeout_s:g} s; they are at\n{stacks}")
        for conn in ready:
            worker = waiting.pop(conn)  # type: ignore[call-overload]
            outcome = _receive(worker)
            if isinstance(outcome, _Failure):
                failures.append(outcome)
                end_s = min(end_s, time.monotonic() + 0.2)  # one that died may have made others fail: give it time to show
            else:
                results[worker.rank] = outcome[0]
    if failures:
        first = next((f for f in failures if f.died), failures[0])
        others = sorted(f.rank for f in failures if f is not first)
        also = f"\n(failed as well: ranks {others})" if others else ""
        raise RankError(first.rank, f"rank {first.rank} of {len(ranks)} failed:\n{first.text}{also}") from first.error
    return [results[worker.rank] for worker in ranks]


def _receive(worker: _Rank) -> tuple[Any] | _Failure:
    try:
        ok, value = pickle.loads(worker.conn.recv_bytes())
    except (EOFError, ConnectionResetError):
        worker.process.join(5)
        return _Failure(worker.rank, f"its process died, exit code {worker.process.exitcode}", died=True)
    return (value,) if ok else value


def _stacks(worker: _Rank) -> str:
    """Where the Python threads of a rank stand now."""
    assert worker.process.pid is not None
    os.kill(worker.process.pid, signal.SIGUSR1)
    end_s = time.monotonic() + 2
    while time.monotonic() < end_s and not worker.stacks.stat().st_size:
        time.sleep(0.02)
    return worker.stacks.read_text()


def _kill(ranks: list[_Rank]) -> None:
    for worker in ranks:
        worker.process.kill()
    for worker in ranks:
        worker.process.join(10)
        worker.conn.close()


def _settings() -> tuple[torch.dtype, int]:
    return torch.get_default_dtype(), torch.get_deterministic_debug_mode()


def _apply(settings: tuple[torch.dtype, int]) -> None:
    torch.set_default_dtype(settings[0])
    # use_deterministic_algorithms would do, but imports the compiler, which takes seconds in every worker
    torch.set_deterministic_debug_mode(settings[1])
