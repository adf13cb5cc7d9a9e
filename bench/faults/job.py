"""The torchrun job of `bench.profile_faults`: `python -m bench.faults.job FOLDER`, from the root of the repository.

Orders are files in FOLDER that all hosts see: `0.json`, `1.json`, ... with the fields of `Order`; one without steps is the end.
After each, rank 0 has written the run directory `run-N` with the recordings of that stretch, and says "done N".

Attention and experts take time in proportion to their work, as on a device of their own: by sleeping, so that ranks do not take
cores from one another; or, where the order says so, by computing on one core of this machine, which then can be taken from them.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from moefold.launch.comm import CommLog
from moefold.moe.config import BalanceConfig, ModelConfig, MoEConfig
from moefold.parallel.engine import Engine, MicroBatch
from moefold.parallel.mesh import build_mesh
from moefold.parallel.recorder import CommRecorder
from moefold.parallel.topology import Topology

SEQUENCES, LENGTH = 4, 64
EXPERTS_PER_RANK = 2
ATTENTION_S, ROW_S = 0.010, 80e-6
WAIT_S = 120.0


@dataclass(frozen=True)
class Order:
    """One stretch of training. settling: steps before those that count. slow_rank: computes `factor` times as long. hot_expert:
    wanted by every token. alone: the rank that has the last core of this machine to itself, while the others share the first;
    all then compute for real."""

    steps: int = 0
    settling: int = 2
    slow_rank: int | None = None
    factor: float = 1.0
    hot_expert: int | None = None
    alone: int | None = None


class Work(torch.autograd.Function):
    """Takes so many seconds, forward and backward: asleep, or of a core."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float, real: bool) -> Tensor:
        ctx.how = seconds, real
        spend(seconds, real)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        spend(*ctx.how)
        return grad, None, None


def spend(seconds: float, real: bool) -> None:
    if not real:
        time.sleep(seconds)
        return
    end_s = time.thread_time() + seconds
    while time.thread_time() < end_s:
        pass


class Device:
    """How fast this rank computes, and whether it does so for real."""

    factor = 1.0
    real = False

    def attend(self, forward: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
        return Work.apply(forward(x, *args), self.factor * ATTENTION_S, self.real)

    def compute(self, compute: Callable[..., Tensor], x: Tensor, *args: Any, **how: Any) -> Tensor:
        return Work.apply(compute(x, *args, **how), self.factor * ROW_S * len(x), self.real)


class Bench:
    """One engine with a recorder, whose stretches are recorded one after another."""

    def __init__(self, folder: Path):
        self.folder, self.rank, self.world = folder, dist.get_rank(), dist.get_world_size()
        balance = BalanceConfig(expert_bias=True, bias_update_rate=1e-6)
        moe = MoEConfig(num_experts=EXPERTS_PER_RANK * self.world, top_k=2, expert_dim=16, balance=balance)
        config = ModelConfig(dim=64, num_layers=2, num_heads=2, vocab_size=64, max_seq_len=LENGTH, moe=moe)
        mesh = build_mesh(Topology(self.world, ep=self.world), torch.device("cpu"))
        self.recorder = CommRecorder(self.rank, mesh.device)
        self.engine, self.device = Engine(config, mesh, recorder=self.recorder), Device()
        for block in self.engine.model.blocks:
            assert block.moe is not None
            block.attention.forward = functools.partial(self.device.attend, block.attention.forward)
            experts = block.moe.experts
            experts.compute = functools.partial(self.device.compute, experts.compute)  # type: ignore[method-assign]
        self.hosts: list[str] = [""] * self.world
        dist.all_gather_object(self.hosts, socket.gethostname())
        self.cores = sorted(os.sched_getaffinity(0))

    def stretch(self, number: int, order: Order) -> None:
        """Train as ordered, and write its recordings to the run directory `run-<number>`."""
        self.device.factor = order.factor if self.rank == order.slow_rank else 1.0
        self.device.real = order.alone is not None
        cores = self.cores if order.alone is None else self.cores[-1:] if order.alone == self.rank else self.cores[:1]
        for task in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(task), cores)  # threads of autograd and gloo are there already
        for layer in self.engine.layers:
            layer.router.expert_bias_E.zero_()
            if order.hot_expert is not None:
                layer.router.expert_bias_E[order.hot_expert] = 100.0
        run = self.folder / f"run-{number}"
        group = dist.group.WORLD
        assert group is not None
        log = CommLog(self.recorder, group, run / "comm.json", self.hosts)
        if self.rank == 0:
            run.mkdir()
            (run / "status.json").write_text(json.dumps({"schema": 1, "state": "completed", "attempts": []}))
        for step in range(order.settling + order.steps):
            generator = torch.Generator().manual_seed(1000 * self.engine.step + self.rank)
            text_BS = torch.randint(0, self.engine.config.vocab_size, (SEQUENCES, LENGTH + 1), generator=generator)
            self.engine.train_step([MicroBatch(text_BS[:, :-1], text_BS[:, 1:])], 1e-4)
            if step >= order.settling:
                log.sample(self.engine.step - 1)
        log.write()


def next_order(folder: Path, number: int) -> Order:
    """The same on all ranks, as soon as it is there."""
    said: list[Any] = [None]
    if dist.get_rank() == 0:
        path, end_s = folder / f"{number}.json", time.monotonic() + WAIT_S
        while not path.exists():
            if time.monotonic() > end_s:
                raise TimeoutError(f"{path.name} has not come in {WAIT_S:g} s")
            time.sleep(0.02)
        said = [json.loads(path.read_text())]
    dist.broadcast_object_list(said)
    return Order(**said[0])


@record
def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    bench, number = Bench(folder), 0
    while (order := next_order(folder, number)).steps:
        bench.stretch(number, order)
        if bench.rank == 0:
            print(f"done {number}.", flush=True)
        number += 1
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
