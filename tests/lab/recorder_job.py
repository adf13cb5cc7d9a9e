"""A job that trains a small model under the recorder, in stretches that a test asks for, and says who is to blame for each.

Orders are files in a folder that all hosts see: `0.json`, `1.json`, ... with the fields of `Order`; one without steps is the end.
Rank 0 answers each with one JSON line: its number, seconds per step, and the verdicts.

Attention and experts take time in proportion to their work as on a device of their own, by sleeping: so the ranks do not take
cores from one another, and a busy machine does not decide.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moefold.moe.config import BalanceConfig, ModelConfig, MoEConfig
from moefold.parallel.engine import Engine, MicroBatch
from moefold.parallel.mesh import build_mesh
from moefold.parallel.recorder import CommRecorder
from moefold.parallel.recorder_analysis import aligned
from moefold.parallel.recorder_clock import clock_offsets
from moefold.parallel.recorder_verdict import verdicts
from moefold.parallel.topology import Topology

SEQUENCES, LENGTH = 4, 64
EXPERTS_PER_RANK = 2
ATTENTION_S = 0.010
ROW_S = 80e-6


@dataclass(frozen=True)
class Order:
    """One stretch of training. settling: steps before those that count. slow_rank: computes `factor` times as long.

    hot_expert: wanted by every token.
    """

    steps: int = 0
    settling: int = 1
    slow_rank: int | None = None
    factor: float = 1.0
    hot_expert: int | None = None


class Work(torch.autograd.Function):
    """Takes so many seconds, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return grad, None


class Device:
    """How fast this rank computes."""

    factor = 1.0

    def attend(self, forward: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
        return Work.apply(forward(x, *args), self.factor * ATTENTION_S)

    def compute(self, compute: Callable[..., Tensor], x: Tensor, *args: Any, **how: Any) -> Tensor:
        return Work.apply(compute(x, *args, **how), self.factor * ROW_S * len(x))


def attach(device: Device, engine: Engine) -> None:
    for block in engine.model.blocks:
        assert block.moe is not None
        block.attention.forward = functools.partial(device.attend, block.attention.forward)
        block.moe.experts.compute = functools.partial(device.compute, block.moe.experts.compute)  # type: ignore[method-assign]


def next_order(folder: Path, number: int) -> Order:
    """The same on all ranks, as soon as it is there."""
    said: list[Any] = [None]
    if dist.get_rank() == 0:
        path = folder / f"{number}.json"
        while not path.exists():
            time.sleep(0.02)
        said = [json.loads(path.read_text())]
    dist.broadcast_object_list(said)
    return Order(**said[0])


def train(engine: Engine, device: Device, order: Order) -> float:
    """Run the stretch; seconds per step of those that count."""
    rank = engine.mesh.rank
    device.factor = order.factor if rank == order.slow_rank else 1.0
    for layer in engine.layers:
        layer.router.expert_bias_E.zero_()
        if order.hot_expert is not None:
            layer.router.expert_bias_E[order.hot_expert] = 100.0
    start_s = 0.0
    for step in range(order.settling + order.steps):
        if step == order.settling:
            assert engine.recorder is not None
            engine.recorder.take()
            start_s = time.perf_counter()
        generator = torch.Generator().manual_seed(1000 * engine.step + rank)
        text_BS = torch.randint(0, engine.config.vocab_size, (SEQUENCES, LENGTH + 1), generator=generator)
        engine.train_step([MicroBatch(text_BS[:, :-1], text_BS[:, 1:])], 1e-4)
    return (time.perf_counter() - start_s) / order.steps


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    balance = BalanceConfig(expert_bias=True, bias_update_rate=1e-6)
    moe = MoEConfig(num_experts=EXPERTS_PER_RANK * world, top_k=2, expert_dim=16, balance=balance)
    config = ModelConfig(dim=64, num_layers=2, num_heads=2, vocab_size=64, max_seq_len=LENGTH, moe=moe)
    mesh = build_mesh(Topology(world, ep=world), torch.device("cpu"))
    recorder = CommRecorder(rank, mesh.device)
    engine, device = Engine(config, mesh, recorder=recorder), Device()
    attach(device, engine)
    group = dist.group.WORLD
    assert group is not None
    offsets_s = [offset.offset_s for offset in clock_offsets(group)]
    number = 0
    while (order := next_order(folder, number)).steps:
        step_s = train(engine, device, order)
        gathered: list[Any] | None = [None] * world if rank == 0 else None
        dist.gather_object(recorder.take(), gathered)
        if gathered is not None:
            found = [asdict(v) for v in verdicts(aligned(gathered, offsets_s))]
            print(json.dumps({"order": number, "step_s": step_s, "verdicts": found}) + "\n", end="", flush=True)
        number += 1
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
