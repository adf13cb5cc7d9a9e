"""A job for several hosts: rows are exchanged both ways, checked to the last bit, and timed. Each rank prints one JSON line."""

from __future__ import annotations

import json
import os
import socket
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor

from moefold.parallel.transfer import Transfer, exchange_rows

WIDTH = 256


def rows_between(source: int, target: int) -> int:
    """Of the uneven exchange: different for every pair, and none for one of them."""
    return 0 if (source, target) == (1, 2) else 3 + 5 * source + 7 * target


def content(source: int, target: int) -> Tensor:
    """What `source` sends to `target`: numbers that occur nowhere else."""
    count = rows_between(source, target)
    first = 1000.0 * source + 100.0 * target
    return first + torch.arange(count, dtype=torch.float64)[:, None].expand(-1, WIDTH) + 1e-3 * torch.arange(WIDTH)


def check_both_ways(rank: int, world: int) -> None:
    send = [rows_between(rank, target) for target in range(world)]
    receive = [rows_between(source, rank) for source in range(world)]
    x_RD = torch.cat([content(rank, target) for target in range(world)]).requires_grad_()
    transfer = Transfer(send, receive, dist.group.WORLD)
    y_XD = transfer.finish(transfer.start(x_RD))
    want_XD = torch.cat([content(source, rank) for source in range(world)])
    assert torch.equal(y_XD, want_XD), "rows that have arrived are not those that were sent"
    y_XD.backward(-2 * want_XD)
    assert torch.equal(x_RD.grad, -2 * x_RD), "gradients have not come back to the rows that they belong to"


def timed(rows: int, group: dist.ProcessGroup) -> float:
    """Seconds of one even exchange of `rows` rows per rank of the group, until its last rank has its part."""
    x_RD = torch.full((rows, WIDTH), float(dist.get_rank()))
    parts = [rows // dist.get_world_size(group)] * dist.get_world_size(group)
    dist.barrier(group)
    start_s = time.perf_counter()
    exchange_rows(x_RD, parts, parts, group)
    seconds = torch.tensor(time.perf_counter() - start_s)
    dist.all_reduce(seconds, dist.ReduceOp.MAX, group)
    return float(seconds)


def main(rows: int, repeats: int) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    check_both_ways(rank, world)
    # one rank of each host: with a single peer, an exchange whose sends hold up its receives is half as fast
    one_each = dist.new_group(list(range(0, world, int(os.environ["LOCAL_WORLD_SIZE"]))))
    seconds = {}
    for name, group in (("all", dist.group.WORLD), ("one_each", one_each)):
        if group != dist.GroupMember.NON_GROUP_MEMBER:
            timed(rows, group)  # the first one also opens connections
            seconds[name] = [timed(rows, group) for _ in range(repeats)]
        dist.barrier()
    facts = {
        "rank": rank,
        "node": int(os.environ["GROUP_RANK"]),
        "host": socket.gethostname(),
        "threads": torch.get_num_threads(),
        "bytes": rows * WIDTH * 4,
        "seconds": seconds,
    }
    print(json.dumps(facts) + "\n", end="", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
