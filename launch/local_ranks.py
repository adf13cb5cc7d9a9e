"""Several ranks on this machine without torchrun: processes joined by gloo, for checks that compare layouts."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ..moe.errors import CommError

PRELOAD = ("moefold.launch.local_ranks", "moefold.launch.checkpoint", "moefold.parallel.parity_compare", "torch._dynamo")
"""Imported once by the server that ranks are forked from, instead of by each rank."""


def run_local_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """Run `fn(rank, world, *args)` on `world` new processes that are joined by gloo; the results in the order of ranks.

    `fn` must be at the top level of a module, and `args` and results picklable. Ranks are forked from a server process without
    threads or accelerator state, so this works from a notebook and after CUDA was used; a script that calls it needs the usual
    `if __name__ == "__main__":`.

    Raises:
        RuntimeError: a rank failed, with its traceback, or died.
        CommError: ranks that have not ended after `timeout_s` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    with tempfile.TemporaryDirectory(prefix="moefold-ranks-") as folder:
        workers = []
        try:
            for rank in range(world):
                ours, theirs = context.Pipe(duplex=False)
                job = (theirs, fn, rank, world, str(Path(folder) / "store"), timeout_s, args)
                process = context.Process(target=_serve, args=job, daemon=True, name=f"rank {rank}")
                process.start()
                theirs.close()  # the rank holds the only other end now, so that its death is an end of file here
                workers.append((process, ours))
            return _collect([conn for _, conn in workers], timeout_s)
        finally:
            for process, conn in workers:
                process.kill()
                process.join()
                conn.close()


def _collect(conns: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str | None] = {}
    end_s = time.monotonic() + timeout_s
    while open_ranks := [rank for rank in range(len(conns)) if rank not in results and rank not in failures]:
        ready = wait([conns[rank] for rank in open_ranks], max(0.0, end_s - time.monotonic()))
        if not ready:
            break
        for rank in open_ranks:
            if conns[rank] in ready:
                try:
                    ok, value = conns[rank].recv()
                except EOFError:
                    ok, value = False, None
                (results if ok else failures)[rank] = value
        if failures:
            # one that died makes others fail: its end is the better explanation, so give it time to show
            end_s = min(end_s, time.monotonic() + 0.2)
    dead = [rank for rank, text in failures.items() if text is None]
    if dead:
        raise RuntimeError(f"rank {dead[0]} of {len(conns)} died without an answer")
    for rank, text in failures.items():
        raise RuntimeError(f"rank {rank} of {len(conns)} failed:\n{text}")
    if open_ranks:
        raise CommError(f"ranks {open_ranks} of {len(conns)} have not ended after {timeout_s:g} s")
    return [results[rank] for rank in range(len(conns))]


def _serve(
    conn: Connection, fn: Callable[..., Any], rank: int, world: int, store: str, timeout_s: float, args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
        )
        result = fn(rank, world, *args)
        dist.barrier()  # nobody takes his connections away from a rank that still needs them
        conn.send((True, result))
        dist.destroy_process_group()
    except BaseException:
        conn.send((False, traceback.format_exc()))
        time.sleep(timeout_s)  # keep the connections until the parent has read this and ends the process
