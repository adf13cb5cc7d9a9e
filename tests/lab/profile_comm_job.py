"""A job for several hosts that profiles its links whenever a test asks for it, and times a ping-pong of its own beside it.

Orders are files in a folder that all hosts see: `0.json`, `1.json`, ... with fields of `CommOptions`; `null` is the end. Rank 0
answers each with one JSON line: the order's number, the profile, and the gloo ping-pong between the first two ranks.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moefold.launch.profile.comm import CommOptions, profile_comm

BURSTS, TURNS = 20, 16


def ask(folder: Path, number: int) -> Any:
    """The order, the same on all ranks, as soon as it is there."""
    said: list[Any] = [None]
    if dist.get_rank() == 0:
        path = folder / f"{number}.json"
        while not path.exists():
            time.sleep(0.02)
        said = [json.loads(path.read_text())]
    dist.broadcast_object_list(said)
    return said[0]


def ping_pong(nbytes: int) -> float:
    """Half of the time that ranks 0 and 1 need to send each other this many bytes: mean of the fastest of several bursts."""
    rank, x, seconds = dist.get_rank(), torch.zeros(nbytes, dtype=torch.uint8), []
    dist.barrier()
    for _ in range(BURSTS if rank < 2 else 0):
        start_s = time.perf_counter()
        for _ in range(TURNS):
            if rank == 0:
                dist.send(x, 1)
                dist.recv(x, 1)
            else:
                dist.recv(x, 0)
                dist.send(x, 0)
        seconds.append((time.perf_counter() - start_s) / TURNS)
    return min(seconds) / 2 if seconds else 0.0


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    number = 0
    while (order := ask(folder, number)) is not None:
        if order.get("operations") is not None:
            order["operations"] = tuple(order["operations"])
        before_s = ping_pong(order["begin"])
        result = profile_comm(options=CommOptions(**order))
        pongs = [before_s, ping_pong(order["begin"])]
        if dist.get_rank() == 0:
            print(json.dumps({"order": number, "ping_pong_s": pongs, "profile": result.to_dict()}) + "\n", end="", flush=True)
        number += 1
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
