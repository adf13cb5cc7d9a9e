"""A job that adds a small tensor over all ranks again and again, until it is broken. One JSON line per rank and step."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist


def main(size_bytes: int, timeout_s: float) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    x = torch.ones(size_bytes // 4)
    step = 0
    while True:
        start_s = time.perf_counter()
        dist.all_reduce(x.fill_(1.0))
        seconds = time.perf_counter() - start_s
        assert bool((x == dist.get_world_size()).all())
        print(json.dumps({"step": step, "seconds": seconds}) + "\n", end="", flush=True)
        step += 1


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
