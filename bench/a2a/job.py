"""The torchrun job of `bench.a2a_lab`: `python -m bench.a2a.job FOLDER`, from the root of the repository.

FOLDER has what the job is to do (`job.json`, `windows.pt`). Rank 0 writes `first.json` and says "ready"; then it waits, for
each link, for a file `go-I` that says that the links have their rate, and writes `turns-I.json` and says "measured I".
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from moefold.parallel.mesh import find_nodes

from .case import Case, Turn, Variant
from .steps import Bench

TIMEOUT_S = 300.0
POLL_S = 0.02


@record
def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    job = json.loads((folder / "job.json").read_text())
    variants = [Variant(**v) for v in job["variants"]]
    bench = Bench(Case(**job["case"]), variants, torch.load(folder / "windows.pt"), find_nodes())
    write(folder / "first.json", bench.first_round())
    say("ready")
    for link in range(job["links"]):
        await_links(folder / f"go-{link}")
        bench.round(link, 1)  # buffers of the sockets find their size
        turns = [turn for number in range(job["rounds"]) for turn in bench.round(link, number)]
        write(folder / f"turns-{link}.json", turns)
        say(f"measured {link}")
    dist.barrier()
    dist.destroy_process_group()


def await_links(path: Path) -> None:
    """Until rank 0 sees the file."""
    if dist.get_rank() == 0:
        end_s = time.monotonic() + TIMEOUT_S
        while not path.exists():
            if time.monotonic() > end_s:
                raise TimeoutError(f"{path.name} has not come in {TIMEOUT_S:g} s")
            time.sleep(POLL_S)
    dist.barrier()


def write(path: Path, turns: list[Turn]) -> None:
    """By rank 0, which has the turns of all."""
    if dist.get_rank() == 0:
        path.write_text(json.dumps([asdict(turn) for turn in turns]))


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
